"""The logit-gradient probe reads the right figures, and unusual losses are not called broken."""

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from planted.plants_loss import cross_entropy, lm_collator, own_loss
from planted.plants_rows import trainer_of
from tiny import arguments, bpe_tokenizer, chat_rows, completion_rows, llama, lm_trainer, sft_trainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, OPTConfig

from llmkit.check import shrink, subject
from llmkit.check.attach import from_parts
from llmkit.check.probe import own_backward, ragged_batch, run_probe
from llmkit.check.report import CheckResult
from llmkit.check.runner import get_check, run_one
from llmkit.check.subject import Subject, redraw_

IDS = [
    "labels-misaligned",
    "pad-in-loss",
    "end-not-in-loss",
    "loss-ignores-mask",
    "token-weights",
    "accumulation-changes-gradient",
]


def statuses(subject: Subject) -> dict[str, str]:
    return {id: run_one(get_check(id), subject).status for id in IDS}


def result(id: str, subject: Subject) -> CheckResult:
    return run_one(get_check(id), subject)


def with_loss(loss: Any, **options: Any) -> Subject:
    return from_parts(lm_trainer(cls=own_loss(loss), collator=lm_collator, **options))


def right(logits: torch.Tensor, batch: Any, num_items: Any) -> torch.Tensor:
    return cross_entropy(logits, batch["labels"], "sum") / num_items


# the probe


def test_weights_positions_and_targets_are_those_of_a_loss_written_by_hand():
    """Row 0: positions 1 and 2 weigh 0.5 and 0.25; row 1: position 0 weighs 3, and is taught the token itself."""
    model = redraw_(llama()).eval()
    ids = torch.tensor([[7, 8, 9, 10, 11], [20, 21, 22, 23, 24]])

    def backward(model, batches):
        log_probs = model(input_ids=ids).logits.log_softmax(-1)
        loss = -0.5 * log_probs[0, 1, 9] - 0.25 * log_probs[0, 2, 10] - 3 * log_probs[1, 0, 20]
        loss.backward()
        return 0.0

    probe = run_probe(model, backward, {"input_ids": ids, "labels": ids})
    assert probe.supervised.nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]
    assert probe.weight[0, 1:3].tolist() == pytest.approx([0.5, 0.25], abs=1e-4)
    assert probe.cosine[:, 1, 0].argmax() == 0 and probe.cosine[0, 1, 0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
        OPTConfig(  # calls its decoder past its backbone, which projects to another width
            vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=16, max_position_embeddings=64,
        ),
    ],
    ids=["gpt2", "opt"],
)  # fmt: skip
def test_the_hidden_state_is_found_in_other_architectures(config):
    model = redraw_(AutoModelForCausalLM.from_config(config)).eval()
    probe = run_probe(model, own_backward, ragged_batch(model, (9, 20)))
    assert (probe.supervised == probe.expected).all()
    assert probe.weight[probe.supervised].sum() == pytest.approx(1, abs=1e-4)


def test_nothing_is_left_behind_in_the_model():
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    subject = from_parts(lm_trainer(model=model))
    statuses(subject)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# clean and unusual


@pytest.mark.parametrize(
    "make",
    [
        lambda: sft_trainer(assistant_only_loss=True),
        lambda: sft_trainer(completion_rows()),
        lambda: sft_trainer(peft_config=LoraConfig()),
        lambda: sft_trainer(chat_rows(turns=2), packing=True, assistant_only_loss=True),
        lambda: sft_trainer(padding_free=True, max_length=None, gradient_accumulation_steps=2),
        lambda: sft_trainer(loss_type="dft"),
        lambda: sft_trainer(gradient_accumulation_steps=4, weight_decay=0.1, max_grad_norm=0.1),
        lambda: lm_trainer(),
        lambda: lm_trainer(model=llama(attention_dropout=0.3)),
        lambda: lm_trainer(label_smoothing_factor=0.1),
        lambda: lm_trainer(neftune_noise_alpha=5),
    ],
)
def test_clean_trainers_pass(make):
    found = statuses(from_parts(make()))
    assert set(found.values()) <= {"pass", "not_applicable"}, found


def test_prompt_tuning_has_virtual_tokens_before_the_row():
    from peft import get_peft_model

    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    found = statuses(from_parts(lm_trainer(model=model)))
    assert "fail" not in found.values() and found["labels-misaligned"] == "pass", found


def test_padding_on_the_left_passes():
    tokenizer = bpe_tokenizer(chat=False, padding_side="left")
    found = statuses(from_parts(lm_trainer(tokenizer=tokenizer, gradient_accumulation_steps=2)))
    assert set(found.values()) == {"pass"}, found


def test_labels_shifted_by_the_collator_for_a_loss_that_does_not_shift_pass():
    def shifted(features):
        batch = lm_collator(features)
        return batch | {"labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}

    def loss(logits, batch, num_items):
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    found = statuses(from_parts(lm_trainer(cls=own_loss(loss), collator=shifted)))
    assert {found[id] for id in IDS[:-1]} == {"pass"}, found


def test_a_mean_per_batch_warns_only_while_nothing_is_accumulated():
    found = statuses(with_loss(lambda x, b, n: cross_entropy(x, b["labels"])))
    assert found.pop("accumulation-changes-gradient") == "warn"
    assert set(found.values()) == {"pass"}


def test_a_sum_over_tokens_warns():
    found = result("token-weights", with_loss(lambda x, b, n: cross_entropy(x, b["labels"], "sum")))
    assert found.status == "warn" and "sum over tokens" in found.measured


def test_another_term_on_the_logits_is_not_called_broken():
    def z_loss(logits, batch, num_items):
        return right(logits, batch, num_items) + 1e-2 * logits.logsumexp(-1).square().mean()

    found = statuses(with_loss(z_loss))
    assert "fail" not in found.values() and found["labels-misaligned"] == "pass", found


def test_distillation_from_soft_targets_is_not_judged():
    def distil(logits, batch, num_items):
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(logits.shape, generator=generator).mul(3).softmax(-1)
        return -(teacher * logits.log_softmax(-1)).sum(-1).mean()

    found = result("labels-misaligned", with_loss(distil))
    assert found.status == "not_run" and "not cross-entropy" in found.measured


def test_two_forwards_are_not_judged():
    class Twice(own_loss(right)):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return sum(super(Twice, self).compute_loss(model, inputs, *args, **kwargs) for _ in range(2)) / 2

    found = result("labels-misaligned", from_parts(lm_trainer(cls=Twice, collator=lm_collator)))
    assert found.status == "not_run" and "2 times" in found.measured


def test_a_balancing_loss_does_not_change_what_accumulation_is_judged_by():
    config = MixtralConfig(
        vocab_size=424, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    subject = from_parts(lm_trainer(model=model, gradient_accumulation_steps=4))
    assert set(statuses(subject).values()) == {"pass"}
    assert model.router_aux_loss_coef == 0.1 and model.config.router_aux_loss_coef == 0.1


@pytest.mark.parametrize("options", [dict(assistant_only_loss=True), dict(peft_config=LoraConfig())])
def test_a_model_too_large_to_probe_is_checked_by_a_shrunk_copy(monkeypatch, options):
    """TRL's fused head is put on the copy too."""
    monkeypatch.setattr(subject, "SMALL", 1000)
    monkeypatch.setattr(shrink, "SMALL", 1000)
    found = statuses(from_parts(sft_trainer(model=llama(hidden_size=128), **options)))
    assert set(found.values()) == {"pass"}, found


def test_a_replaced_forward_of_a_large_model_is_not_run(monkeypatch):
    monkeypatch.setattr(subject, "SMALL", 1000)
    monkeypatch.setattr(shrink, "SMALL", 1000)
    model = llama()
    trainer = lm_trainer(model=model)
    model.forward = functools.wraps(type(model).forward)(lambda *a, **k: type(model).forward(model, *a, **k))
    found = result("labels-misaligned", from_parts(trainer))
    assert found.status == "not_run" and "shrunk copy" in found.measured


def test_weights_that_the_collator_gives_do_not_apply():
    def weighted(features):
        batch = lm_collator(features)
        return batch | {"loss_weights": torch.rand(batch["labels"].shape)}

    def loss(logits, batch, num_items):
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        return (each * batch["loss_weights"][:, 1:].flatten()).sum() / num_items

    trainer = lm_trainer(cls=own_loss(loss), collator=weighted, remove_unused_columns=False)
    assert result("token-weights", from_parts(trainer)).status == "not_applicable"


def test_a_model_alone_is_probed_with_its_own_loss():
    found = statuses(from_parts(model=llama()))
    assert found.pop("end-not-in-loss") == "not_applicable"
    assert set(found.values()) == {"pass"}


def test_a_model_without_num_items_and_trainer_does_not_apply():
    model = llama()
    model.accepts_loss_kwargs = False
    assert result("accumulation-changes-gradient", from_parts(model=model)).status == "not_applicable"


def test_rows_of_equal_length_have_no_padding():
    tokenizer = bpe_tokenizer(chat=False)
    rows = [{"input_ids": list(range(10 + k, 30 + k)), "labels": list(range(10 + k, 30 + k))} for k in range(16)]
    subject = from_parts(trainer_of(rows, tokenizer, gradient_accumulation_steps=2))
    found = statuses(subject)
    assert found["pad-in-loss"] == "not_applicable" and "fail" not in found.values(), found


def test_preference_trainers_do_not_apply():
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": "Q: a?", "chosen": " yes", "rejected": " no"}] * 4)
    args = arguments(DPOConfig, gradient_checkpointing=False)
    trainer = DPOTrainer(
        llama(), args=args, train_dataset=rows, processing_class=bpe_tokenizer(), peft_config=LoraConfig()
    )
    assert set(statuses(from_parts(trainer)).values()) == {"not_applicable"}
