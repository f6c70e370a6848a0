"""Updates against torch's own optimisers, who gets which update, and the schedules worked out by hand."""

import copy
import math

import pytest
import torch
from helpers import random_ids, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config

from llmkit.config import UserError
from llmkit.train.optim import (
    Muon,
    build_optimizer,
    lr_factor,
    num_steps,
    orthogonalise,
    set_learning_rate,
    split_parameters,
)
from llmkit.verbs import PretrainConfig

SHAPES = [(16, 48), (48, 16), (16, 48), (24, 24), (1, 8), (8, 1)]  # wide, tall, both of one size, square, vectors


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def redraw_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def config(**options) -> PretrainConfig:
    return PretrainConfig(**options)


def in_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return orthogonalise(x.bfloat16()).to(x.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize(
    "iteration, tolerance",
    [
        (in_bfloat16, 1e-6),  # torch's precision: equal to the bit when measured
        (orthogonalise, 4e-3),  # our float32: at most 1.8e-3 after 5 steps whose entries move by 2e-3 each
    ],
    ids=["bfloat16", "float32"],
)
def test_muon_equals_torch_muon(monkeypatch, weight_decay, iteration, tolerance):
    monkeypatch.setattr("llmkit.train.optim.orthogonalise", iteration)
    ours, theirs = parameters(), parameters()
    muon = Muon(ours, lr=0.02, momentum=0.9, weight_decay=weight_decay)
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=weight_decay, nesterov=True, adjust_lr_fn="original"
    )
    for step in range(5):
        for params in (ours, theirs):
            redraw_grads(params, seed=step + 1)
        muon.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("shape", [(3, 16, 48), (1, 32, 32), (2, 1, 8)])
def test_orthogonalise_is_near_the_polar_factor(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    out = orthogonalise(x).double()
    singular_values = torch.linalg.svdvals(out)
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3
    # same singular vectors: only the values moved
    core = u.mT @ out @ vh.mT
    torch.testing.assert_close(core, torch.diag_embed(torch.diagonal(core, dim1=-2, dim2=-1)), atol=1e-5, rtol=0)
    assert (torch.diagonal(core, dim1=-2, dim2=-1) > 0.6).all()
    assert out.shape == x.shape and orthogonalise(torch.zeros(shape)).abs().max() == 0


def test_batched_matrices_equal_one_by_one():
    together, alone = parameters(), parameters()
    batched, single = Muon(together, lr=0.1), [Muon([p], lr=0.1) for p in alone]
    for step in range(3):
        redraw_grads(together, step)
        redraw_grads(alone, step)
        batched.step()
        for muon in single:
            muon.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_muon_decays_by_hand_skips_parameters_without_gradient_and_refuses_vectors():
    still, decayed = torch.nn.Parameter(torch.ones(2, 4)), torch.nn.Parameter(torch.ones(2, 4))
    decayed.grad = torch.zeros(2, 4)
    Muon([still, decayed], lr=0.1, weight_decay=0.5).step()
    assert (still == 1).all() and torch.equal(decayed, torch.full((2, 4), 0.95))
    with pytest.raises(ValueError, match=r"found a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=0.1)


MODELS = {
    "untied": lambda: tiny_model(),
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64)
    ),
}
OUTER = {  # embeddings and head, by name
    "untied": {"model.embed_tokens.weight", "lm_head.weight"},
    "tied": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
}


@pytest.fixture(params=MODELS)
def named_model(request):
    return request.param, MODELS[request.param]()


@pytest.mark.parametrize("optim", ["muon", "adamw_torch", "adamw_torch_fused"])
def test_every_trainable_parameter_is_in_one_group_and_vectors_are_not_decayed(named_model, optim):
    name, model = named_model
    frozen = next(p for p in model.parameters() if p.ndim == 1)
    frozen.requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, config(optim=optim, weight_decay=0.1))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p is not frozen)
    for group in optimizer.param_groups:
        assert all((p.ndim < 2) == (group["weight_decay"] == 0) for p in group["params"])
    hidden, others, vectors = split_parameters(model)
    assert {names[id(p)] for p in others} == OUTER[name]
    assert all(p.ndim == 2 for p in hidden) and len(hidden) == {"gpt2": 8}.get(name, 14) and vectors
    if optim == "muon":
        assert optimizer.param_groups[0]["params"] == hidden and optimizer.param_groups[0]["lr"] == 0.02


def test_muon_without_a_hidden_matrix_is_an_error_that_names_the_other_choice():
    model = tiny_model()
    for p in split_parameters(model)[0]:
        p.requires_grad_(False)
    with pytest.raises(UserError, match=r"optim='muon'.*adamw_torch_fused"):
        build_optimizer(model, config(optim="muon"))


def gradient(model, seed: int) -> None:
    ids = random_ids(2, 8, 97, seed=seed)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def test_adamw_part_of_muon_equals_torch_adamw_exactly():
    model, plain = tiny_model(), tiny_model()
    settings = dict(weight_decay=0.1, learning_rate=1e-2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    optimizer = build_optimizer(model, config(optim="muon", **settings))
    _, others, vectors = split_parameters(plain)
    adamw = torch.optim.AdamW(
        [{"params": others}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, fused=True,
    )  # fmt: skip
    for step in range(3):
        gradient(model, step)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        adamw.step()
    for part, reference in zip(split_parameters(model)[1:], (others, vectors), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, reference, strict=True))


@pytest.mark.parametrize("optim", ["muon", "adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("tied", [False, True])
def test_restored_optimizer_takes_the_same_next_step(optim, tied):
    model = tiny_model(tie_word_embeddings=tied)
    optimizer = build_optimizer(model, config(optim=optim))
    for step in range(2):
        gradient(model, step)
        set_learning_rate(optimizer, 1 - 0.3 * step)
        optimizer.step()
    twin = copy.deepcopy(model)
    restored = build_optimizer(twin, config(optim=optim))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["lr"] for g in restored.param_groups] == [g["lr"] for g in optimizer.param_groups]
    for m, o in ((model, optimizer), (twin, restored)):
        gradient(m, 2)
        set_learning_rate(o, 0.5)
        o.step()
        o.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(p.grad is None for p in twin.parameters())


def test_set_learning_rate_scales_every_group_from_its_own_peak():
    optimizer = build_optimizer(tiny_model(), config(optim="muon", learning_rate=0.4, muon_learning_rate=0.8))
    for factor in (0.5, 0.25, 1.0):  # from the peak, not from the last rate
        set_learning_rate(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == [0.8 * factor, 0.4 * factor, 0.4 * factor]
    assert optimizer.muon.param_groups[0]["lr"] == 0.8 and optimizer.adamw.param_groups[0]["lr"] == 0.4


def half_cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


WSD = "warmup_stable_decay"
SCHEDULES = [  # kind, warm-up, kwargs, max_steps, factor of each step
    ("constant", 0, {}, 4, [1, 1, 1, 1]),
    ("constant", 2, {}, 4, [1 / 2, 1, 1, 1]),
    ("linear", 0, {}, 4, [1, 3 / 4, 2 / 4, 1 / 4]),
    ("linear", 2, {}, 6, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
    ("linear", 0.5, {}, 4, [1 / 2, 1, 1, 1 / 2]),  # a share of all steps
    ("linear", 0, {"min_lr_ratio": 0.2}, 4, [1, 0.8, 0.6, 0.4]),
    ("cosine", 1, {}, 5, [1, 1, half_cosine(1 / 4), 1 / 2, half_cosine(3 / 4)]),
    ("cosine", 0, {"min_lr_ratio": 0.5}, 2, [1, 0.75]),
    (WSD, 0, {"num_decay_steps": 4}, 6, [1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
    (WSD, 1, {"num_decay_steps": 0.5}, 4, [1, 1, 1, 1 / 2]),
    (WSD, 0, {}, 10, [1] * 9 + [1 / 2]),  # the last 20 %
    (WSD, 2, {"num_decay_steps": 100}, 4, [1 / 2, 1, 1, 1 / 2]),  # no longer than what warm-up leaves
    (WSD, 0, {"num_decay_steps": 2, "min_lr_ratio": 0.1}, 4, [1, 1, 1, 0.55]),
    (WSD, 0, {"num_decay_steps": 0}, 3, [1, 1, 1]),
    ("linear", 5, {}, 3, [1 / 5, 2 / 5, 3 / 5]),
]


@pytest.mark.parametrize("kind, warmup, kwargs, max_steps, expected", SCHEDULES)
def test_schedule_as_worked_out_by_hand(kind, warmup, kwargs, max_steps, expected):
    settings = config(lr_scheduler_type=kind, warmup_steps=warmup, lr_scheduler_kwargs=kwargs)
    assert [lr_factor(step, settings, max_steps) for step in range(max_steps)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", WSD])
@pytest.mark.parametrize("max_steps", [1, 2, 7, 600])
def test_no_step_is_wasted_at_rate_zero(kind, max_steps):
    settings = config(lr_scheduler_type=kind)  # warm-up 2 %, decay 20 %
    factors = [lr_factor(step, settings, max_steps) for step in range(max_steps)]
    assert min(factors) > 0 and max(factors) == 1


def test_count_below_one_is_a_share():
    assert [num_steps(v, 600) for v in (0, 0.02, 0.3, 1, 1.0, 20)] == [0, 12, 180, 1, 1, 20]


def test_muon_scales_gpt2_matrices_by_what_goes_in_and_out():
    """Conv1D keeps (in, out): the same layer and gradient as a Linear must take the same step."""
    from transformers.pytorch_utils import Conv1D

    grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    linear, conv = torch.nn.Linear(8, 32, bias=False), Conv1D(32, 8)
    split_parameters(torch.nn.ModuleList([conv]))
    steps = []
    for weight, g in ((linear.weight, grad), (conv.weight, grad.T.contiguous())):
        before = weight.detach().clone()
        weight.grad = g
        Muon([weight], lr=0.1).step()
        steps.append(weight.detach() - before)
    assert torch.allclose(steps[0], steps[1].T, atol=1e-6)
