"""Qwen3 and Llama twins hold the same weights and give the same logits, bit for bit, or conversion refuses."""

import json

import pytest
import torch
from helpers import TINY, random_ids, redraw, tiny_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmkit.model.convert import from_plain, to_plain

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [{}, dict(num_key_value_heads=2, head_dim=6), dict(rope_parameters=YARN)], ids=str)
@pytest.mark.parametrize("qk_norm, twin", [(True, Qwen3ForCausalLM), (False, LlamaForCausalLM)])
def test_twin_gives_exactly_equal_logits_there_and_back(qk_norm, twin, shape, tied, dtype, tmp_path):
    tiny_model(qk_norm=qk_norm, tie_word_embeddings=tied, **shape).to(dtype).save_pretrained(tmp_path)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(2, 40)
    expected = logits_of(model, ids)
    plain = to_plain(model)
    assert type(plain) is twin and plain.dtype == dtype
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert torch.equal(logits_of(plain, ids), expected)
    back = from_plain(plain)
    differing = {key for key, value in model.config.to_dict().items() if back.config.to_dict()[key] != value}
    assert differing <= {"architectures", "dtype", "_name_or_path"}  # written by save_pretrained
    assert torch.equal(logits_of(back, ids), expected)


@pytest.mark.parametrize("cls, config_cls", [(Qwen3ForCausalLM, Qwen3Config), (LlamaForCausalLM, LlamaConfig)])
def test_stock_model_becomes_ours_exactly(cls, config_cls):
    plain = redraw(cls(config_cls(**TINY, num_key_value_heads=2, head_dim=8, intermediate_size=64)), std=0.2).eval()
    ids = random_ids(2, 12)
    assert torch.equal(logits_of(from_plain(plain), ids), logits_of(plain, ids))


def test_exported_folder_needs_no_code_of_ours(tmp_path):
    model, ids = tiny_model(), random_ids(2, 12)
    model.generation_config.max_new_tokens = 7
    to_plain(model).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "llmkit" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert loaded.generation_config.max_new_tokens == 7


def test_twin_shares_no_memory_with_the_original():
    model, ids = tiny_model(), random_ids(1, 4)
    before, plain = logits_of(model, ids), to_plain(model)
    redraw(plain, seed=1)
    plain.generation_config.top_k = 7
    assert torch.equal(logits_of(model, ids), before)
    assert model.generation_config.top_k != 7


@pytest.mark.parametrize(
    "options, target, word",
    [
        (dict(hidden_act="relu2"), None, "hidden_act='relu2'"),
        (dict(final_logit_softcapping=15.0), None, "final_logit_softcapping=15.0"),
        (dict(qk_norm=True), "llama", "qk_norm=True"),
        (dict(qk_norm=False), "qwen3", "qk_norm=False"),
        ({}, "gpt2", "to='gpt2'"),
    ],
)
def test_options_that_the_target_lacks_raise_by_name(options, target, word):
    with pytest.raises(ValueError, match=word):
        to_plain(tiny_model(**options), target)


@pytest.mark.parametrize(
    "cls, config_cls, options, word",
    [
        (Qwen3ForCausalLM, Qwen3Config, dict(attention_bias=True), "attention_bias"),
        (Qwen3ForCausalLM, Qwen3Config, dict(use_sliding_window=True, max_window_layers=0), "use_sliding_window"),
        (Qwen3ForCausalLM, Qwen3Config, dict(hidden_act="gelu"), "hidden_act"),
        (LlamaForCausalLM, LlamaConfig, dict(mlp_bias=True), "mlp_bias"),
        (LlamaForCausalLM, LlamaConfig, dict(hidden_act="relu2"), "hidden_act"),  # gated there, ungated here
        (GPT2LMHeadModel, GPT2Config, {}, "model_type='gpt2'"),
    ],
)
def test_options_that_ours_lacks_raise_by_name(cls, config_cls, options, word):
    with pytest.raises(ValueError, match=word):
        from_plain(cls(config_cls(**TINY | dict(intermediate_size=64, num_key_value_heads=4, head_dim=8) | options)))
