"""Bugs of the loss: shifts, masks that it forgets, denominators, accumulation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import bpe_tokenizer, llama, lm_trainer, sft_trainer
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Trainer
from transformers.models.llama import modeling_llama
from trl import SFTTrainer

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant
from planted.plants_rows import collate


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """As it should be: shifted by one, -100 ignored."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def lm_collator(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return collate([{"input_ids": f["input_ids"], "labels": f["input_ids"]} for f in features])


def own_loss(loss: Any) -> type[Trainer]:
    """A Trainer whose compute_loss is loss(logits, batch, num_items_in_batch)."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            value = loss(outputs.logits, inputs, num_items_in_batch)
            return (value, outputs) if return_outputs else value

    return Own


def with_own_loss(loss: Any, is_planted: bool, **options: Any) -> Subject:
    """The twin's loss is the sum of token losses by their number in the whole step."""

    def right(logits: torch.Tensor, batch: Any, num_items: Any) -> torch.Tensor:
        return cross_entropy(logits, batch["labels"], "sum") / num_items

    return from_parts(lm_trainer(cls=own_loss(loss if is_planted else right), **options))


def llama_with(forward: Any, is_planted: bool) -> LlamaForCausalLM:
    """A Llama whose class has another forward."""
    model = llama(eos_token_id=2)
    if is_planted:
        model.__class__ = type("OwnLlama", (LlamaForCausalLM,), {"forward": forward})
    return model


@plant("collator-shifts-too", caught_by="labels-misaligned", bug="L1", evidence="shifted twice")
def collator_shifts_too(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The collator makes labels[t] = input_ids[t + 1], and the model shifts as well."""

    def shifted(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = lm_collator(features)
        batch["labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return batch

    return from_parts(lm_trainer(collator=shifted if is_planted else lm_collator))


@plant("forward-shifts-twice", caught_by="labels-misaligned", bug="L1", evidence="shifted twice")
def forward_shifts_twice(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A model whose forward shifts labels before the loss function does."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if labels is not None:
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return LlamaForCausalLM.forward(self, input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    return from_parts(model=llama_with(forward, is_planted))


@plant("loss-without-shift", caught_by="labels-misaligned", bug="L2", evidence="no shift")
def loss_without_shift(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """compute_loss compares the logits with the labels of the same position."""
    return with_own_loss(lambda x, b, n: F.cross_entropy(x.flatten(0, 1), b["labels"].flatten()), is_planted)


@plant("smoothing-without-shift", caught_by="labels-misaligned", bug="L2", evidence="no shift")
def smoothing_without_shift(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Label smoothing for a class that transformers does not know as a causal LM: its smoother does not shift."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return LlamaForCausalLM.forward(self, input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    return from_parts(lm_trainer(model=llama_with(forward, is_planted), label_smoothing_factor=0.1))


@plant("padding-in-loss", caught_by="pad-in-loss", bug="L6")
def padding_in_loss(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The collator pads labels with the pad token."""
    pad = 0 if is_planted else -100
    return from_parts(
        lm_trainer(collator=lambda fs: collate([dict(f, labels=f["input_ids"]) for f in fs], label_pad=pad))
    )


@plant("loss-over-input-ids", caught_by="pad-in-loss", bug="L6")
def loss_over_input_ids(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """compute_loss uses input_ids as labels, padding included."""
    return with_own_loss(lambda x, b, n: cross_entropy(x, b["input_ids"]), is_planted)


@plant("pad-id-ignored-in-loss", caught_by="end-not-in-loss", bug="T3")
def pad_id_ignored_in_loss(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """compute_loss ignores the pad token, which is EOS."""
    tokenizer = bpe_tokenizer(chat=False)
    tokenizer.pad_token = tokenizer.eos_token

    def loss(logits: torch.Tensor, batch: Any, num_items: Any) -> torch.Tensor:
        labels = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)
        return cross_entropy(logits, labels)

    return with_own_loss(loss, is_planted, tokenizer=tokenizer, collator=lm_collator)


@plant("template-end-not-in-loss", caught_by="end-not-in-loss", bug="C7", evidence="<|im_end|>")
def template_end_not_in_loss(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The end of turn stands behind endgeneration."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
        )
    return from_parts(sft_trainer(tokenizer=tokenizer, assistant_only_loss=True))


@plant("loss-trains-prompts", caught_by="loss-ignores-mask", bug="C4", evidence="-100")
def loss_trains_prompts(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """An SFTTrainer's compute_loss that makes its own labels from the attention mask."""

    class Own(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            return super().compute_loss(model, inputs, *args, **kwargs)

    return from_parts(sft_trainer(cls=Own if is_planted else None, assistant_only_loss=True))


@plant("first-answer-token-dropped", caught_by="loss-ignores-mask", bug="L7", evidence="is not taught")
def first_answer_token_dropped(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """compute_loss leaves out the first labelled token of every row."""

    class Own(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            labels = inputs["labels"].clone()
            labels[range(len(labels)), (labels != -100).int().argmax(1)] = -100
            return super().compute_loss(model, inputs | {"labels": labels}, *args, **kwargs)

    return from_parts(sft_trainer(cls=Own if is_planted else None, assistant_only_loss=True))


@plant("mean-over-all-positions", caught_by="token-weights", bug="L4")
def mean_over_all_positions(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The denominator counts masked positions."""
    return with_own_loss(lambda x, b, n: cross_entropy(x, b["labels"], "sum") / b["labels"].numel(), is_planted)


@plant("first-label-counted", caught_by="token-weights", bug="L4", evidence="nothing predicts")
def first_label_counted(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The denominator counts the first label of every row, which no position predicts."""
    return with_own_loss(lambda x, b, n: cross_entropy(x, b["labels"], "sum") / (b["labels"] != -100).sum(), is_planted)


@plant("mean-per-row", caught_by="token-weights", bug="L4", status="warn", evidence="every row counts alike")
def mean_per_row(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The loss is a mean of the rows' means: may be meant."""

    def loss(logits: torch.Tensor, batch: Any, num_items: Any) -> torch.Tensor:
        return sum(cross_entropy(x[None], y[None]) for x, y in zip(logits, batch["labels"], strict=True)) / len(logits)

    return with_own_loss(loss, is_planted)


@plant("mean-per-micro-batch", caught_by="accumulation-changes-gradient", bug="L3", evidence="nothing divides")
def mean_per_micro_batch(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """compute_loss takes the mean and ignores num_items_in_batch; the Trainer trusts that it did not."""
    return with_own_loss(lambda x, b, n: cross_entropy(x, b["labels"]), is_planted, gradient_accumulation_steps=4)


@plant("divided-twice", caught_by="accumulation-changes-gradient", bug="L3")
def divided_twice(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A training_step that divides by the number of micro-batches what is normalised already."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs) / self.args.gradient_accumulation_steps

    return from_parts(lm_trainer(cls=Own if is_planted else Trainer, gradient_accumulation_steps=4))


@plant("num-items-swallowed", caught_by="accumulation-changes-gradient", bug="L3", evidence="nothing divides")
def num_items_swallowed(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A model whose forward takes **kwargs and drops num_items_in_batch."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return LlamaForCausalLM.forward(self, input_ids, attention_mask=attention_mask, labels=labels)

    model = llama_with(forward, is_planted)
    return from_parts(lm_trainer(model=model, gradient_accumulation_steps=2))


@plant("no-num-items", caught_by="accumulation-changes-gradient", bug="L3", evidence="averaged as wholes")
def no_num_items(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A model whose forward takes no **kwargs: the means of unequal micro-batches are averaged."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return LlamaForCausalLM.forward(self, input_ids, attention_mask=attention_mask, labels=labels)

    return from_parts(lm_trainer(model=llama_with(forward, is_planted), gradient_accumulation_steps=4))


@plant("loss-function-patched", caught_by="accumulation-changes-gradient", bug="L3")
def loss_function_patched(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A faster loss function, patched into the class, that takes the mean; no trainer is given."""

    def fast(self, logits, labels, vocab_size, **kwargs):
        return cross_entropy(logits, labels)

    if is_planted:
        patch.setattr(modeling_llama.LlamaForCausalLM, "loss_function", fast)
    return from_parts(model=llama())
