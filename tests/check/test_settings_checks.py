"""The lint of settings: what it must not flag."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import arguments, chat_rows, llama, lm_trainer, sft_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from llmkit.check import runner
from llmkit.check.attach import from_parts
from llmkit.check.report import CheckResult
from llmkit.check.subject import Subject

SMALL = dict(
    vocab_size=424,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD = {"original_max_position_embeddings": 64}
ROPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0} | OLD}),
    ("llama", {"rope_parameters": LLAMA3 | OLD}),
    ("phi3", {"rope_parameters": LONG | OLD} | OLD),
    ("gemma3_text", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    ("stablelm", {}),
    ("gpt_neox", {}),
    ("smollm3", {}),
    ("nanochat", {}),
    ("qwen3", {"head_dim": 16}),
]


def check(id: str, subject: Subject) -> CheckResult:
    return runner.run_one(runner.get_check(id), subject)


def build(kind: str, options: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | options))


def with_settings(model: Any, rows: Any = None, **settings: Any) -> Subject:
    subject = from_parts(model=model, dataset=rows)
    subject.settings = settings
    return subject


# positions


@pytest.mark.parametrize(("kind", "options"), ROPES, ids=lambda v: str(v)[:40])
def test_the_frequencies_of_every_kind_of_rope_are_as_configured(kind, options):
    model = build(kind, options)
    found = check("rope-setting-ignored", from_parts(model=model))
    assert found.status == "pass", found
    model(input_ids=torch.randint(5, 100, (1, 200)))  # dynamic ones write other frequencies now
    assert check("rope-setting-ignored", from_parts(model=model)).status == "pass"


def test_a_model_given_by_its_configuration_is_built_small():
    subject = Subject("config", config=AutoConfig.for_model("llama", **SMALL))
    subject.make_model = AutoModelForCausalLM.from_config
    assert check("rope-setting-ignored", subject).status == "pass"
    assert check("tied-head-mismatch", subject).status == "pass"


def test_models_without_rotary_positions_have_nothing_to_ignore():
    for kind in ("bloom", "gpt2"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, vocab_size=424, hidden_size=32, n_layer=1, n_head=4)
        )
        assert check("rope-setting-ignored", from_parts(model=model)).status == "not_applicable"


def test_half_precision_frequencies_of_a_short_model_are_no_matter():
    model = llama(max_position_embeddings=16).bfloat16()
    assert check("rope-setting-ignored", from_parts(model=model)).status == "pass"


def test_garbage_in_a_buffer_is_found():
    """What an `_init_weights` that forgets the buffer leaves after from_pretrained."""
    model = llama()
    model.model.rotary_emb.inv_freq.fill_(4.5e30)
    model.model.rotary_emb.original_inv_freq.fill_(float("nan"))
    assert check("rope-setting-ignored", from_parts(model=model)).status == "fail"


@pytest.mark.parametrize(
    ("model", "rows", "length", "status"),
    [
        (llama(), [40, 50], 256, "pass"),
        (llama(), [40, 50], 1024, "pass"),  # TRL's default, and no row is that long
        (llama(), [40, 50], 2048, "warn"),
        (llama(), [40, 300], 1024, "warn"),
        (llama(), None, 1024, "warn"),
        (llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}), [300], 1024, "pass"),
        (build("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}), [40], 256, "pass"),
        (build("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}), [300], 512, "fail"),
        (build("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}), None, 512, "fail"),
        (build("mamba", {"state_size": 8}), [900], 1024, "not_applicable"),
    ],
)
def test_rows_against_positions(model, rows, length, status):
    rows = [{"input_ids": [5] * n} for n in rows] if rows else None
    found = check("length-beyond-positions", with_settings(model, rows, max_length=length))
    assert found.status == status, found


# weights


@pytest.mark.parametrize("is_tied", [False, True])
def test_heads_are_tied_as_configured(is_tied):
    model = llama(tie_word_embeddings=is_tied)
    assert check("tied-head-mismatch", from_parts(model=model)).status == "pass"
    model.resize_token_embeddings(440)
    assert check("tied-head-mismatch", from_parts(model=model)).status == "pass"
    adapted = get_peft_model(model, LoraConfig(r=4))
    assert check("tied-head-mismatch", from_parts(model=adapted)).status == "pass"


def test_an_adapter_that_copies_a_tied_head_is_a_warning():
    adapted = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(r=4, modules_to_save=["lm_head"]))
    assert check("tied-head-mismatch", from_parts(model=adapted)).status == "warn"


def test_float32_weights_swallow_nothing():
    trainer = lm_trainer(learning_rate=1e-7)
    assert check("bf16-swallows-updates", from_parts(trainer)).status == "not_applicable"


def test_only_optimizers_of_adams_kind_are_judged_by_the_rate():
    trainer = lm_trainer(model=llama(eos_token_id=2).bfloat16(), learning_rate=1e-6, optim="sgd")
    assert check("bf16-swallows-updates", from_parts(trainer)).status == "not_applicable"


# a trainer's settings


def test_checkpointing_that_the_trainer_turns_on_asks_the_inputs_for_a_gradient():
    """True since transformers does it itself; `lora-gets-no-gradient` passes as well."""
    model = get_peft_model(llama(eos_token_id=2), LoraConfig(r=4))
    reentrant = {"use_reentrant": True}
    trainer = lm_trainer(model=model, gradient_checkpointing=True, gradient_checkpointing_kwargs=reentrant)
    subject = from_parts(trainer)
    assert check("lora-with-reentrant-checkpointing", subject).status == "pass"
    assert check("lora-gets-no-gradient", subject).status == "pass"


def test_packing_of_trl_is_isolated():
    rows = chat_rows(64)
    assert check("packing-without-isolation", from_parts(sft_trainer(rows=rows, packing=True))).status == "pass"
    joined = sft_trainer(rows=rows, packing=True, packing_strategy="wrapped")
    assert check("packing-without-isolation", from_parts(joined)).status == "not_applicable"
    assert check("packing-without-isolation", from_parts(sft_trainer())).status == "not_applicable"


@pytest.mark.parametrize(
    ("metric", "greater", "status"),
    [
        ("eval_loss", False, "pass"),
        ("loss", True, "fail"),
        ("eval_val_loss", None, "pass"),  # transformers looks at the ending
        ("eval_loss_math", None, "fail"),  # and takes this one for a score
        ("eval_perplexity", False, "pass"),
        ("eval_ppl", True, "fail"),
        ("eval_mean_token_accuracy", True, "pass"),
        ("exact_match", False, "fail"),
        ("eval_f1", True, "pass"),
        ("eval_quality_of_mine", True, "not_applicable"),
        (None, None, "not_applicable"),
    ],
)
def test_the_best_metric_and_its_direction(metric, greater, status):
    subject = from_parts(model=llama(), args=arguments(metric_for_best_model=metric, greater_is_better=greater))
    found = check("best-metric-inverted", subject)
    assert found.status == status, found
