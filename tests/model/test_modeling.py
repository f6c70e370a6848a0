"""What the model computes, on redrawn weights: against the specification, and against itself run another way."""

import math

import pytest
import torch
from helpers import TINY, random_ids, redraw, tiny_model
from reference_gpt import reference_logits, reference_loss_sum

from llmkit.model import LlmkitConfig, LlmkitForCausalLM, LlmkitForSequenceClassification

CLOSE = dict(atol=1e-5, rtol=0)  # float32 against float64: at most 4.4e-6 measured, on logits of size 4
SHAPES = {
    "default": {},
    "gqa": dict(num_key_value_heads=2),
    "mqa": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "no_qk_norm": dict(qk_norm=False),
    "relu2": dict(hidden_act="relu2"),
    "softcap": dict(final_logit_softcapping=1.5),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    "eps": dict(rms_norm_eps=0.1),
    "odd_sizes": dict(vocab_size=61, hidden_size=42, num_attention_heads=3, num_hidden_layers=3, intermediate_size=51),
    "head_dim": dict(head_dim=6, num_key_value_heads=2),
    "nanochat_like": dict(hidden_act="relu2", final_logit_softcapping=1.5, num_key_value_heads=2, qk_norm=False),
}
PACKED = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [0] * 7 + [1] * 5])  # document of each token
POSITIONS = torch.tensor([[*range(5), 0, *range(6)], [*range(7), *range(5)]])


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=10, do_sample=False, **kwargs)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_the_reference(shape, attn):
    model = tiny_model(attn=attn, **shape)
    ids = random_ids(2, 12, model.config.vocab_size)
    expected = reference_logits(model.state_dict(), model.config, ids)
    torch.testing.assert_close(logits_of(model, ids).double(), expected, **CLOSE)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_restarting_positions_isolate_packed_documents(attn):
    model, ids = tiny_model(attn=attn, num_key_value_heads=2), random_ids(2, 12)
    packed = logits_of(model, ids, position_ids=POSITIONS)
    expected = reference_logits(model.state_dict(), model.config, ids, PACKED)
    torch.testing.assert_close(packed.double(), expected, **CLOSE)
    torch.testing.assert_close(packed[1:, 7:], logits_of(model, ids[1:, 7:]), **CLOSE)
    assert (packed - logits_of(model, ids))[1, 7:].abs().max() > 0.1  # without position_ids documents do mix


@pytest.mark.parametrize("tied", [False, True])
def test_fresh_model_starts_at_ln_V_with_zero_output_projections(tied):
    torch.manual_seed(0)
    model = LlmkitForCausalLM(LlmkitConfig(tie_word_embeddings=tied))
    ids = random_ids(4, 64, 512)
    loss = model(ids, labels=ids, use_cache=False).loss.item()
    assert abs(loss - math.log(512)) < 0.1  # measured +0.013, tied +0.029
    for name, p in model.named_parameters():
        is_output, is_norm = name.endswith(("o_proj.weight", "down_proj.weight")), p.ndim == 1
        assert p.unique().tolist() == [0.0] if is_output else p.unique().tolist() == [1.0] if is_norm else True, name
        if not (is_output or is_norm):
            assert abs(p.std().item() / 0.02 - 1) < 0.03 and abs(p.mean().item()) < 1e-3, name


def test_relu2_and_swiglu_have_equal_parameter_counts_by_default():
    counts = [LlmkitForCausalLM(LlmkitConfig(hidden_size=96, hidden_act=a)).num_parameters() for a in ("silu", "relu2")]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(hidden_size=100, num_attention_heads=3), ["hidden_size=100", "num_attention_heads=3", "head_dim"]),
        (dict(num_attention_heads=4, num_key_value_heads=3), ["num_attention_heads=4", "num_key_value_heads=3"]),
        (dict(head_dim=7), ["head_dim=7"]),
        (dict(hidden_size=12, num_attention_heads=4), ["head_dim=3"]),
        (dict(hidden_act="gelu"), ["hidden_act='gelu'", "silu", "relu2"]),
    ],
)
def test_impossible_shapes_raise_naming_the_keys(options, words):
    with pytest.raises(ValueError) as error:
        LlmkitConfig(**options)
    assert all(word in str(error.value) for word in words)


def test_future_tokens_have_exactly_no_gradient():
    model, t = tiny_model(), 5
    embeds = model.model.embed_tokens(random_ids(1, 12)).detach().requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits[0, t].square().sum().backward()
    assert torch.equal(embeds.grad[0, t + 1 :], torch.zeros(6, 32))
    assert (embeds.grad[0, : t + 1].abs().sum(-1) > 1e-3).all()  # while every past token has some


def test_inputs_embeds_equal_input_ids_and_exactly_one_is_taken():
    model, ids = tiny_model(), random_ids(2, 12)
    embeds = model.model.embed_tokens(ids)
    assert torch.equal(model(inputs_embeds=embeds, use_cache=False).logits, logits_of(model, ids))
    for both_or_none in (dict(input_ids=ids, inputs_embeds=embeds), {}):
        with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
            model(**both_or_none)


def test_logits_to_keep_is_a_slice():
    model, ids = tiny_model(), random_ids(2, 12)
    full = logits_of(model, ids)
    torch.testing.assert_close(logits_of(model, ids, logits_to_keep=3), full[:, -3:], **CLOSE)
    torch.testing.assert_close(logits_of(model, ids, logits_to_keep=torch.tensor([0, 4])), full[:, [0, 4]], **CLOSE)


@pytest.mark.parametrize("shape", ["gqa", "no_qk_norm", "nanochat_like"])
def test_generation_is_the_same_cached_uncached_and_static(shape):
    model, ids = tiny_model(**SHAPES[shape]), random_ids(2, 6)
    uncached = greedy(model, ids, use_cache=False)
    assert uncached.shape == (2, 16) and len(uncached[:, 6:].unique()) > 3  # not one token forever
    assert torch.equal(greedy(model, ids), uncached)
    assert torch.equal(greedy(model, ids, cache_implementation="static", disable_compile=True), uncached)


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6]], ids=["token_by_token", "chunks"])
def test_stepwise_logits_with_cache_equal_one_pass(chunks):
    model, ids = tiny_model(num_key_value_heads=2), random_ids(2, 12)
    cache, steps = None, []
    for piece in ids.split(chunks, dim=1):
        with torch.no_grad():
            out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits_of(model, ids), **CLOSE)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_logits(side, attn):
    model, ids, pads = tiny_model(attn=attn), random_ids(1, 8), random_ids(1, 4, seed=1)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pads)
    row, mask = ((pads, ids), (zeros, ones)) if side == "left" else ((ids, pads), (ones, zeros))
    kept = slice(4, None) if side == "left" else slice(8)
    padded = logits_of(model, torch.cat(row, 1), attention_mask=torch.cat(mask, 1))[:, kept]
    torch.testing.assert_close(padded, logits_of(model, ids), **CLOSE)


@pytest.mark.parametrize("options", [{}, dict(cache_implementation="static", disable_compile=True)])
def test_left_padding_never_changes_generation(options):
    model, short, long = tiny_model(), random_ids(1, 4), random_ids(1, 7, seed=1)
    batch = torch.cat((torch.cat((torch.zeros(1, 3, dtype=torch.long), short), 1), long))
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    both = greedy(model, batch, attention_mask=mask, **options)
    assert torch.equal(both[:1, 7:], greedy(model, short)[:, 4:])
    assert torch.equal(both[1:, 7:], greedy(model, long)[:, 7:])


def test_beams_run_and_sampling_repeats_with_its_seed():
    model, ids = tiny_model(), random_ids(2, 6)
    beams = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    assert beams.shape == (2, 16)
    sums = [-reference_loss_sum(logits_of(model, rows), rows).item() for rows in (beams, greedy(model, ids))]
    assert sums[0] >= sums[1]  # beams search for likelier texts than greedy, and find them here
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(ids, max_new_tokens=10, do_sample=True, top_k=20, temperature=0.9))
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def test_loss_shifts_by_one_ignores_minus_100_and_honours_num_items_in_batch():
    model, ids = tiny_model(final_logit_softcapping=1.5), random_ids(4, 12)
    labels = ids.clone()
    labels[0, :7] = labels[2, 3:] = -100
    total = reference_loss_sum(reference_logits(model.state_dict(), model.config, ids), labels).item()
    num_items = (labels[:, 1:] != -100).sum()
    assert num_items == 5 + 11 + 2 + 11
    mean = model(ids, labels=labels, use_cache=False).loss.item()
    assert mean == pytest.approx(total / 29, abs=1e-5)
    halves = [
        model(i, labels=x, num_items_in_batch=num_items, use_cache=False).loss.item()
        for i, x in zip(ids.split(2), labels.split(2), strict=True)
    ]
    assert sum(halves) == pytest.approx(mean, abs=1e-5)  # gradient accumulation adds up to the full batch


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_keeps_loss_and_gradients(use_reentrant):
    ids, results = random_ids(2, 12), []
    for is_checkpointed in (False, True):
        model = tiny_model(tie_word_embeddings=True).train()
        if is_checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(ids, labels=ids, position_ids=POSITIONS, use_cache=False).loss
        loss.backward()
        assert len(calls) == 1 + is_checkpointed  # recomputed in backward
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_the_vocabulary_keeps_the_old_tokens(tied):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 12)
    before, old_rows = logits_of(model, ids), model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(128)
    assert model.config.vocab_size == 128
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (128, 32)
    assert torch.equal(model.lm_head.weight[:97], old_rows)
    after = logits_of(model, ids)
    assert after.shape == (2, 12, 128)
    torch.testing.assert_close(after[..., :97], before, **CLOSE)  # a matmul of another width rounds differently
    assert model(torch.full((1, 4), 127), labels=torch.full((1, 4), 127), use_cache=False).loss.isfinite()


@pytest.mark.medium
@pytest.mark.parametrize(
    "backend",
    ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # 63 s of C++ builds
)
def test_compiled_forward_and_gradients_equal_uncompiled(backend):
    model, ids = tiny_model(num_key_value_heads=2).train(), random_ids(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        out = forward(ids, labels=ids, position_ids=POSITIONS, use_cache=False)
        out.loss.backward()
        results.append((out.logits, out.loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_hidden_states_count_layers_plus_one_and_attentions_are_causal_distributions():
    model, ids = tiny_model(attn="eager", num_hidden_layers=3), random_ids(2, 12)
    out = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(out.hidden_states) == 3 + 1 and len(out.attentions) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)  # the last one is after the final norm
    for weights in out.attentions:
        assert weights.shape == (2, 4, 12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12), **CLOSE)
        assert not weights.triu(1).any()


def test_lora_attaches_to_every_projection_and_trains_nothing_else():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(), random_ids(2, 12)
    before = logits_of(model, ids)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {name.split(".")[-1] for name in model.peft_config["default"].target_modules}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert torch.equal(logits_of(model, ids), before)
    model(ids, labels=ids, use_cache=False).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)


def test_bfloat16_runs_close_to_float32():
    model, ids = tiny_model(), random_ids(2, 12)
    expected = logits_of(model, ids)
    out = model.to(torch.bfloat16)(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and greedy(model, ids).shape == (2, 22)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(out.logits.float(), expected, atol=0.3, rtol=0)  # measured 0.10, logits of size 4


def test_classifier_scores_the_last_real_token():
    config = LlmkitConfig(**TINY, pad_token_id=0, num_labels=1)
    model = redraw(LlmkitForSequenceClassification(config), std=0.2).eval()
    ids = random_ids(1, 8).clamp(min=1)
    score = model(ids).logits
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.long)), 1)
    torch.testing.assert_close(model(padded, attention_mask=(padded != 0).long()).logits, score, **CLOSE)
    hidden = model.model(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(score, hidden @ model.score.weight.T, **CLOSE)


def test_parallel_plans_name_modules_that_exist():
    model = tiny_model()
    names = {name.replace(".0.", ".*.") for name, _ in model.model.named_modules()}
    assert set(model.config.base_model_tp_plan) | set(model.config.base_model_pp_plan) <= names
    linears = {name for name in names if name.endswith("_proj") and ".1." not in name}
    assert linears <= set(model.config.base_model_tp_plan)
