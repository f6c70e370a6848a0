"""The lean decoder against the model that it decodes, and its tokens against those of `generate`."""

import pytest
import torch
from helpers import random_ids, tiny_model
from tiny import llama

from llmkit.deploy.decode import LeanDecoder, lean_refusal

SHAPES = {
    "default": {},
    "grouped": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "llama": {"qk_norm": False},
    "relu2": {"hidden_act": "relu2"},
    "soft-capped": {"final_logit_softcapping": 2.0},
    "tied": {"tie_word_embeddings": True},
    "scaled rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
NOISE = 3e-5  # of logits of deviation 1 to 3; other orders of summation differ by 2e-6 to 8e-6 here


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_logits_are_the_models_at_every_position(options):
    model, ids = tiny_model(**options), random_ids(1, 20)
    expected = model(ids, use_cache=False).logits[0]
    decoder = LeanDecoder(model)
    for t in range(20):
        assert (decoder.forward(ids[0, t : t + 1]) - expected[t]).abs().max() < NOISE
    decoder.reset()
    assert (decoder.forward(ids[0]) - expected[-1]).abs().max() < NOISE  # all at once


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_greedy_tokens_are_those_of_generate(options):
    model, prompt = tiny_model(**options), random_ids(1, 7)
    expected = model.generate(prompt, max_new_tokens=50, do_sample=False, pad_token_id=0)[0, 7:].tolist()
    decoder, found = LeanDecoder(model), []
    logits = decoder.forward(prompt[0])
    while len(found) < 50:
        found.append(int(logits.argmax()))
        logits = decoder.forward(torch.tensor(found[-1:]))
    assert found == expected


def test_a_prompt_in_parts_is_the_prompt_and_a_forgotten_end_is_forgotten():
    model, ids = tiny_model(num_key_value_heads=2), random_ids(1, 20)
    expected = model(ids, use_cache=False).logits[0]
    decoder = LeanDecoder(model)
    decoder.forward(ids[0, :6])
    assert (decoder.forward(ids[0, 6:15]) - expected[14]).abs().max() < NOISE
    decoder.forward(torch.tensor([5, 5, 5]))
    decoder.reset(15)
    decoder.reset(17)  # that many are not there
    assert decoder.length == 15
    assert (decoder.forward(ids[0, 15:]) - expected[19]).abs().max() < NOISE


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_the_model_stays_what_it_was_and_no_projection_is_held_twice(options):
    model, ids = tiny_model(**options), random_ids(2, 20)
    expected, weights = model(ids).logits, {name: p.clone() for name, p in model.named_parameters()}
    decoder = LeanDecoder(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert (model(ids).logits - expected).abs().max() < NOISE
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    fused = decoder.layers[1]
    for layer, matrix in [(attention.q_proj, fused.qkv), (attention.v_proj, fused.qkv), (mlp.gate_proj, fused.up)]:
        assert layer.weight.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()


def test_what_cannot_be_decoded_is_refused_with_its_reason():
    assert lean_refusal(tiny_model()) is None
    assert "LlamaForCausalLM" in lean_refusal(llama())
    assert "bfloat16" in lean_refusal(tiny_model().to(torch.bfloat16))
    quantized = tiny_model()
    quantized.is_quantized = True
    assert "quantised" in lean_refusal(quantized)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type='dynamic' changes with the length"):
        LeanDecoder(tiny_model(rope_parameters=rope))


def test_more_positions_than_the_cache_holds_are_an_error_and_change_nothing():
    decoder = LeanDecoder(tiny_model(), size=8)
    decoder.forward(torch.arange(6))
    with pytest.raises(ValueError, match="9 positions, the cache holds 8"):
        decoder.forward(torch.arange(3))
    assert decoder.length == 6
