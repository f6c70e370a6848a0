"""What the optimiser holds and what of its updates arrives. Checks of family `trainer`.

Owns `optimizer_of`: the optimiser of the live trainer. Leaves out what real steps do (`trainer.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject

SHOWN = 5  # parameters named in evidence
HALVES = (torch.bfloat16, torch.float16)
REPEATS = 32  # steps with one gradient


def is_adapter(name: str) -> bool:
    return "lora_" in name or "lora." in name or "modules_to_save" in name


def named(names: Any, note: str = "") -> list[dict[str, Any]]:
    """Evidence that names parameters, the first few of them."""
    ordered = sorted(names)
    more = [{"note": f"and {len(ordered) - SHOWN} more"}] if len(ordered) > SHOWN else []
    return [{"note": f"{name}{note}"} for name in ordered[:SHOWN]] + more


def optimizer_of(subject: Subject) -> torch.optim.Optimizer:
    """Of the live model, whatever its size: building one allocates no moments."""
    subject.need("training")
    if subject.model is None:
        raise NotApplicable("no model given")
    name = str(subject.settings.get("optim") or "")
    if "layerwise" in name or "lomo" in name:
        raise NotApplicable(f"optim={name} updates inside the backward pass and has no groups")
    optimizer = subject.training.make_optimizer(subject.model)
    if optimizer is None or not getattr(optimizer, "param_groups", None):
        raise NotRun("the trainer made no optimiser with param_groups")
    return optimizer


@check("parameter-not-in-optimizer", family="trainer", tier=2, catalogue="K27")
def parameter_not_in_optimizer(subject: Subject) -> Outcome:
    """A trainable parameter is in no group of the optimiser, or in two.

    Symptom: part of the model, or the whole adapter, is never updated.
    Example: `optimizers=(AdamW(model.parameters()), None)` before `get_peft_model`; a filter by name that forgets one.
    Detected: the optimiser that the trainer makes or was given, on the live model: every parameter that requires a
        gradient is in exactly one group, by identity.
    Tolerance: none.
    Spares: frozen parameters in a group (they have no gradient), optimisers that update inside the backward pass,
        several optimisers behind one interface (their groups are united), groups that hold float32 copies.
    Fix: build the optimiser last, from `[p for p in model.parameters() if p.requires_grad]`.
    Sources: HVPNeT#5, SiamCAR#18, pytorch/examples#1325.
    """
    optimizer = optimizer_of(subject)
    counts: dict[int, int] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            counts[id(p)] = counts.get(id(p), 0) + 1
    trainable = {n: p for n, p in subject.model.named_parameters() if p.requires_grad}
    if not trainable:
        raise NotApplicable("no parameter is trainable")
    missing = [n for n, p in trainable.items() if id(p) not in counts]
    twice = [n for n, p in trainable.items() if counts.get(id(p), 0) > 1]
    limit = "each trainable tensor in one group"
    held = [p for group in optimizer.param_groups for p in group["params"]]
    are_copies = all(p.dtype == torch.float32 for p in held) and all(p.dtype in HALVES for p in trainable.values())
    if len(missing) == len(trainable) and are_copies:
        raise NotRun("the optimiser holds float32 copies of the parameters: which is whose cannot be told")
    if missing or twice:
        evidence = named(missing, " is in no group") + named(twice, " is in several groups")
        what = f"{len(missing)} of {len(trainable)} trainable tensors are in no group"
        return failed(what if missing else f"{len(twice)} tensors are in several groups", limit, evidence)
    return passed(f"{len(trainable)} trainable tensors, each in one group", limit)


@check("decay-on-norms", family="trainer", tier=2, catalogue="K27")
def decay_on_norms(subject: Subject) -> Outcome:
    """Weight decay pulls norms or biases towards zero.

    Symptom: none that shows early; long runs lose some quality, norms with weights near 1 shrink.
    Example: a filter by type (`nn.LayerNorm`) that does not know the model's own RMSNorm.
    Detected: the optimiser's groups with weight_decay > 0: parameters of modules that are called norms, biases, and
        other one-dimensional weights.
    Tolerance: a warning only: some decay everything on purpose.
    Spares: embeddings (a choice), adapters, one-dimensional parameters of other kinds (state-space models, sinks).
    Fix: put parameters with fewer than two dimensions into a group with weight_decay 0.
    Sources: transformers#35927, Fast-LLM#542.
    """
    optimizer = optimizer_of(subject)
    decayed = {id(p) for g in optimizer.param_groups if (g.get("weight_decay") or 0) > 0 for p in g["params"]}
    if not decayed:
        return passed("no group has weight decay", "no norm and no bias")
    found = [
        name
        for name, p in subject.model.named_parameters()
        if id(p) in decayed and p.requires_grad and not is_adapter(name) and _is_norm_or_bias(subject.model, name, p)
    ]
    if found:
        return warned(f"{len(found)} norms and biases have weight decay", "none", named(found))
    return passed(f"weight decay on {len(decayed)} tensors, no norm and no bias among them", "none")


def _is_norm_or_bias(model: nn.Module, name: str, p: Tensor) -> bool:
    holder, _, last = name.rpartition(".")
    is_norm = "norm" in type(model.get_submodule(holder)).__name__.lower()
    return p.ndim < 2 and (is_norm or last in ("weight", "bias", "scale", "gamma", "beta"))


@check("update-lost-in-rounding", family="trainer", tier=2, catalogue="K27")
def update_lost_in_rounding(subject: Subject) -> Outcome:
    """Updates are smaller than half a step of the weights' 16-bit format and vanish.

    Symptom: the loss falls at first and stalls early; norms, whose weights are near 1, never move.
    Example: `model.bfloat16()`, AdamW and a rate of 1e-5: 0 of 768 weights moved, against 603 in float32.
    Detected: 32 steps of the trainer's optimiser with one real gradient at the peak rate, with the weights in their
        own format and in float32: how much of the distance arrives.
    Tolerance: a warning below one half of it.
    Spares: float32 weights (mixed precision keeps them), adapters in float32, stochastic rounding, Kahan summation
        (what arrives is measured, not the format), optimisers that keep float32 copies.
    Fix: load in float32 and train with `bf16=True` (autocast), train a float32 adapter, or raise the rate.
    Sources: ml-by-hand#85, pytorch/ao#1124, torchtune#2254, OneTrainer#996.
    """
    subject.need("training", "model")
    if subject.model is None:
        raise NotApplicable("no model given")
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    if sum(p.numel() for p in trained if p.dtype in HALVES) * 2 < sum(p.numel() for p in trained) or not trained:
        raise NotApplicable("the trained weights are not in a 16-bit format")
    dtype = next(p.dtype for p in trained if p.dtype in HALVES)
    with subject.small_model(keep_vocabulary=True, draw=False) as model:
        if not subject.is_small:
            for p in model.parameters():
                p.data = p.data.to(dtype)
        subject.training.backward(model, subject.training.batches(1, 2))
        weights = {
            p: p.data for p in model.parameters() if p.requires_grad and p.grad is not None and p.dtype in HALVES
        }
        gradients = {p: p.grad.detach() for p in weights if p.grad is not None}
        if not any(bool((g != 0).any()) for g in gradients.values()):
            raise NotRun("no 16-bit weight gets a gradient")
        peak = max(subject.training.learning_rates(model)[:10_000])
        lost, keeps_copies = _distance(subject, model, weights, gradients, peak, dtype)
        full, _ = _distance(subject, model, weights, gradients, peak, torch.float32)
    share = lost / full if full else 1.0
    limit = "at least half"
    if share < 0.5 and not keeps_copies:
        return warned(f"{share:.0%} of the updates at rate {peak:.1e} arrive in {str(dtype)[6:]} weights", limit)
    how = " (it keeps float32 copies)" if keeps_copies else ""
    return passed(f"{share:.0%} of the updates at rate {peak:.1e} arrive in {str(dtype)[6:]} weights{how}", limit)


def _distance(
    subject: Subject, model: nn.Module, weights: Any, gradients: Any, rate: float, dtype: torch.dtype
) -> tuple[float, bool]:
    """How far all weights together move in this format; whether the optimiser's state holds them in float32."""
    with subject.training.unchanged():
        for p, data in weights.items():
            p.data = data.to(dtype, copy=True)
            p.grad = gradients[p].to(dtype)
        optimizer = subject.training.make_optimizer(model)
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(REPEATS):
            optimizer.step()
        copies = [
            p
            for p, state in optimizer.state.items()
            for value in state.values()
            if isinstance(value, Tensor) and value.dtype == torch.float32 and value.shape == p.shape and p.ndim > 1
            if float((value - p.data.float()).abs().max()) <= 0.05 * float(p.data.abs().max())
        ]
        moved = sum(float((p.data.double() - data.double()).abs().sum()) for p, data in weights.items())
    return moved, bool(copies) and dtype != torch.float32
