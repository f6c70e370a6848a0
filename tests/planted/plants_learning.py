"""Bugs that keep a model from learning, and from saying what it learned."""

from pathlib import Path

import pytest
import torch
from tiny import bpe_tokenizer, llama, lm_trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant


@plant("embeddings-n01-tied", caught_by="initial-loss", bug="M10", evidence="embed_tokens")
def embeddings_n01_tied(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Embeddings are drawn N(0, 1) under a tied head."""
    model = llama(tie_word_embeddings=True)
    if is_planted:
        nn.init.normal_(model.model.embed_tokens.weight)
    return from_parts(model=model, scratch=True)


@plant("router-softmax-twice", caught_by="moe-balance-void", bug="M11", evidence="auxiliary loss")
def router_softmax_twice(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The balancing loss takes a softmax of probabilities."""
    from transformers.models.mixtral import modeling_mixtral

    if is_planted:
        loss = modeling_mixtral.load_balancing_loss_func
        patch.setattr(
            modeling_mixtral,
            "load_balancing_loss_func",
            lambda logits, *a, **k: loss(tuple(x.softmax(-1) for x in logits), *a, **k),
        )
    return from_parts(model=mixtral())


@plant("balancing-loss-not-added", caught_by="moe-balance-void", bug="M11", evidence="router_aux_loss_coef")
def balancing_loss_not_added(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The balancing loss is computed and never enters the loss."""
    model = mixtral()
    if is_planted:
        model.router_aux_loss_coef = 0.0  # the config still promises 0.1
    return from_parts(model=model)


def mixtral():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@plant("targets-of-other-rows", caught_by="does-not-overfit", bug="L1", evidence="learning rates")
def targets_of_other_rows(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Every step the loss pairs rows with the targets of others."""

    class Shuffled(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            if labels is not None:
                labels = labels[torch.randperm(len(labels))]
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    return from_parts(model=(Shuffled if is_planted else LlamaForCausalLM)(llama().config))


@plant("loss-predicts-itself", caught_by="does-not-overfit", bug="L2", evidence="0% of the next tokens")
def loss_predicts_itself(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The model's own loss has no shift: what it learns is useless for writing."""

    class NoShift(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            if labels is not None:
                out.loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
            return out

    return from_parts(model=(NoShift if is_planted else LlamaForCausalLM)(llama().config))


@plant("generate-never-stops", caught_by="does-not-overfit", bug="C9", evidence="does not stop")
def generate_never_stops(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The EOS that was learned is not among the stop tokens of generate."""
    if is_planted:
        generate = LlamaForCausalLM.generate
        patch.setattr(
            LlamaForCausalLM,
            "generate",
            lambda self, *a, **k: generate(
                self, *a, **{n: v for n, v in k.items() if n != "eos_token_id"}, eos_token_id=7
            ),
        )
    return from_parts(model=llama())


@plant("unseeded-noise", caught_by="same-seed-differs", bug="R2", evidence="losses")
def unseeded_noise(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Noise on the embedding comes from a generator of its own."""
    model = llama()
    if is_planted:
        generator = torch.Generator()
        generator.seed()

        def noise(module, args, out):
            return out + torch.randn(out.shape, generator=generator) * 0.1

        model.model.embed_tokens.register_forward_hook(noise)
    return from_parts(model=model)


@plant("decode-is-empty", caught_by="sample-does-not-decode", bug="T5", evidence="sampled ids")
def decode_is_empty(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The tokenizer's decoder drops everything."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        from tokenizers import decoders

        tokenizer.backend_tokenizer.decoder = decoders.Replace(__import__("tokenizers").Regex("."), "")
    return from_parts(model=llama(vocab_size=len(tokenizer)), tokenizer=tokenizer)


@plant("init-never-called", caught_by="initial-loss", bug="M10", evidence="lm_head")
def init_never_called(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """initializer_range is ten times and more what it should be."""
    return from_parts(model=llama(initializer_range=0.5 if is_planted else 0.02), scratch=True)


@plant("balancing-counts-padding", caught_by="moe-balance-void", bug="M11", status="warn", evidence="padding")
def balancing_counts_padding(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The balancing loss ignores the attention mask."""
    from transformers.models.mixtral import modeling_mixtral

    if is_planted:
        loss = modeling_mixtral.load_balancing_loss_func
        patch.setattr(
            modeling_mixtral, "load_balancing_loss_func", lambda logits, experts, k, mask=None: loss(logits, experts, k)
        )
    return from_parts(model=mixtral())


@plant("hidden-state-detached", caught_by="does-not-overfit", bug="F1", evidence="learning rates")
def hidden_state_detached(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The loss is computed from logits that are cut off from the weights; only a scale is left to learn."""

    class Detached(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, input_ids=None, labels=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            logits = out.logits.detach() * self.scale if is_planted else out.logits * self.scale
            if labels is not None:
                out.loss = self.loss_function(logits, labels, self.config.vocab_size)
            out.logits = logits
            return out

    return from_parts(model=Detached(llama().config))


@plant("end-has-no-label", caught_by="does-not-overfit", bug="C7", evidence="has no label")
def end_has_no_label(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The collator masks every EOS, since padding is EOS too."""
    tokenizer = bpe_tokenizer(chat=False)
    if is_planted:
        tokenizer.pad_token = tokenizer.eos_token
    return from_parts(lm_trainer(tokenizer=tokenizer))


@plant("own-collator-drops-end", caught_by="does-not-overfit", bug="C7", evidence="does not stop")
def own_collator_drops_end(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """An own collator gives the last token of every row no label."""

    def collate(rows):
        length = max(len(row["input_ids"]) for row in rows)
        ids, labels = torch.zeros(len(rows), length).long(), torch.full((len(rows), length), -100)
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            ids[i, :count] = torch.tensor(row["input_ids"])
            labels[i, : count - is_planted] = ids[i, : count - is_planted]
        return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}

    return from_parts(lm_trainer(collator=collate))


@plant("loss-of-reversed-rows", caught_by="does-not-overfit", bug="L1", evidence="of the next tokens")
def loss_of_reversed_rows(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The trainer's own loss pairs logits with the row read backwards."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            targets = labels.flip(1) if is_planted else labels
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    return from_parts(lm_trainer(cls=Own))


@plant("cache-loses-a-token", caught_by="does-not-overfit", bug="M5", evidence="another token")
def cache_loses_a_token(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """With a cache, positions start at 0 again: only generate shows it."""

    class Restarting(LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
            if is_planted and past_key_values is not None and input_ids.shape[1] == 1:
                position_ids = torch.zeros_like(input_ids)
            return super().forward(
                input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs
            )

    return from_parts(model=Restarting(llama().config))


@plant("clock-in-the-loss", caught_by="same-seed-differs", bug="R2", evidence="losses")
def clock_in_the_loss(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The trainer's loss carries noise from a generator that was seeded by the clock."""
    generator = torch.Generator()
    generator.seed()

    class Noisy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs).loss
            return loss * (1 + 0.01 * torch.rand((), generator=generator)) if is_planted else loss

    return from_parts(lm_trainer(cls=Noisy))


@plant("generate-raises", caught_by="sample-does-not-decode", bug="M5", evidence="KeyError")
def generate_raises(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """An own prepare_inputs_for_generation reads what generate no longer hands over."""
    if is_planted:

        def prepare(self, input_ids, **kwargs):
            return {"input_ids": input_ids[:, -1:], "past_key_values": kwargs["past"]}

        patch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", prepare)
    tokenizer = bpe_tokenizer()
    return from_parts(model=llama(), tokenizer=tokenizer)
