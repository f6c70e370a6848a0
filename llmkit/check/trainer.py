"""What training does to every parameter: three real steps of the trainer on redrawn weights.

Owns the audit (made once per subject, `audit_steps`) and the checks that read it. Leaves out the rest of this family:
the optimiser (`optimizer.py`), resuming (`resume.py`), evaluation (`evaluation.py`) and the schedule (`schedule.py`).
"""

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import evaluation, resume, schedule  # noqa: F401  # checks of this family
from .optimizer import is_adapter, named
from .resume import short_run_settings
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject

STEPS, RATE = 3, 1e-3  # of the audit: no warm-up, so that every step moves
KEY_BIAS = re.compile(r"(^|[._])(k|key)(_proj)?\.bias$")  # softmax ignores it: its gradient is zero by mathematics
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass
class Steps:
    """What three real steps did. Names are those of `named_parameters`."""

    trainable: set[str] = field(default_factory=set)  # before the first step
    thawed: list[str] = field(default_factory=list)  # trainable only afterwards
    gradients: dict[str, float] = field(default_factory=dict)  # largest absolute one
    unmoved: set[str] = field(default_factory=set)
    sizes: dict[str, float] = field(default_factory=dict)  # largest |weight|
    called: set[str] = field(default_factory=set)  # parameters whose module took part in a forward
    norms: list[tuple[float, float]] = field(default_factory=list)
    rate: float = 0.0  # the largest one
    error: str | None = None  # what the trainer raised about gradients


def audit_steps(subject: Subject) -> Steps:
    subject.need("training", "model")
    return subject.once("steps", lambda: _audit_steps(subject))


def _audit_steps(subject: Subject) -> Steps:
    settings = short_run_settings(subject)
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * STEPS
    settings |= {"learning_rate": RATE, "warmup_steps": 0, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}
    if "warmup_ratio" in subject.settings:
        settings["warmup_ratio"] = 0.0
    found = Steps()
    with tempfile.TemporaryDirectory() as folder, subject.small_model(keep_vocabulary=True) as model:
        found.trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        hooks = [m.register_forward_pre_hook(_noting(found.called, name)) for name, m in _owners(model).items()]
        try:
            trace = subject.training.run(model, Path(folder), STEPS, num_rows=rows, settings=settings)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            found.error = str(error).split("\n")[0]
            return found
        finally:
            for hook in hooks:
                hook.remove()
        found.called = {n for n, _ in model.named_parameters() if _owner(model, n) in found.called}
        found.thawed = [n for n, p in model.named_parameters() if p.requires_grad and n not in found.trainable]
    found.gradients, found.norms = trace.gradients, trace.norms
    found.unmoved = {n for n, w in trace.weights.items() if n in trace.first_weights and _is_same(trace, n)}
    found.sizes = {n: float(w.abs().max()) for n, w in trace.weights.items() if w.numel()}
    found.rate = max(step.learning_rate for step in trace.steps)
    return found


def _is_same(trace: Any, name: str) -> bool:
    return torch.equal(trace.weights[name], trace.first_weights[name])


def _noting(called: set[str], name: str) -> Any:
    return lambda module, inputs: called.add(name)


def _owner(model: nn.Module, parameter: str) -> str:
    """The module that uses a parameter: its holder, or what holds that where it is a mere container."""
    name = parameter.rpartition(".")[0]
    while name and isinstance(model.get_submodule(name), CONTAINERS):
        name = name.rpartition(".")[0]
    return name


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in {_owner(model, n) for n, _ in model.named_parameters()}}


@check("no-gradient", family="trainer", tier=2, catalogue="K27")
def no_gradient(subject: Subject) -> Outcome:
    """A trainable parameter never gets a gradient.

    Symptom: the loss falls less than it should; parts of the model stay at their initial values.
    Example: a `.detach()` or `torch.no_grad()` too many; reentrant checkpointing over inputs without gradient.
    Detected: three real steps of the trainer (its own settings, checkpointing included) on redrawn weights: the
        gradient of every trainable tensor before the optimiser's step.
    Tolerance: exactly zero, or none at all, in every step.
    Spares: adapters (`lora-gets-no-gradient`), experts that no token reached, the key projection's bias (softmax
        ignores it), modules that no forward calls (a vision tower on text: a warning).
    Fix: look for detach, no_grad, .data and reentrant checkpointing between the named parameter and the loss.
    Sources: transformers#26221, peft#1142.
    """
    steps = audit_steps(subject)
    limit = "a gradient in every trainable tensor"
    if steps.error and not any(is_adapter(n) for n in steps.trainable):
        return failed(f"backward fails: {steps.error}", limit)
    judged = {n for n in steps.trainable if not is_adapter(n) and not KEY_BIAS.search(n) and "expert" not in n}
    if not judged:
        raise NotApplicable("adapters alone are trained")
    if steps.error:
        raise NotRun(f"backward fails: {steps.error}")
    without = {n for n in judged if steps.gradients.get(n, 0.0) == 0.0}
    broken = without & steps.called
    if broken:
        return failed(f"{len(broken)} of {len(judged)} trainable tensors get no gradient", limit, named(broken))
    if without:
        evidence = named(without, ": its module takes no part in the forward pass")
        return warned(f"{len(without)} of {len(judged)} trainable tensors are not used", limit, evidence)
    return passed(f"{len(judged)} trainable tensors get a gradient", limit)


@check("lora-gets-no-gradient", family="trainer", tier=2, catalogue="K27")
def lora_gets_no_gradient(subject: Subject) -> Outcome:
    """An adapter gets no gradient.

    Symptom: the loss is finite and does not fall; after thousands of steps every lora_B is still zero.
    Example: `gradient_checkpointing_kwargs={"use_reentrant": True}` on a PEFT model whose inputs require no gradient.
    Detected: three real steps with the trainer's own checkpointing, lora_A and lora_B redrawn: the gradient of every
        trainable adapter tensor.
    Tolerance: exactly zero, or none at all, in every step; or a backward pass that finds nothing to train.
    Spares: lora_A while lora_B is zero (both are redrawn), experts that no token reached, modules that no forward
        calls.
    Fix: `gradient_checkpointing_kwargs={"use_reentrant": False}`, or `model.enable_input_require_grads()`.
    Sources: open-unlearning#178, ai-toolkit#1054, transformers#26221, peft#1142, peft#1402.
    """
    subject.need("training", "model")
    if not hasattr(subject.model, "peft_config"):
        raise NotApplicable("no adapter is trained")
    steps = audit_steps(subject)
    limit = "a gradient in every adapter tensor"
    if steps.error:
        return failed(f"backward fails: {steps.error}", limit)
    judged = {n for n in steps.trainable if is_adapter(n) and "expert" not in n}
    if not judged:
        raise NotApplicable("no trainable tensor belongs to an adapter")
    broken = {n for n in judged if steps.gradients.get(n, 0.0) == 0.0} & steps.called
    if broken:
        return failed(f"{len(broken)} of {len(judged)} adapter tensors get no gradient", limit, named(broken))
    return passed(f"{len(judged)} adapter tensors get a gradient", limit)


@check("weights-do-not-move", family="trainer", tier=2, catalogue="K27")
def weights_do_not_move(subject: Subject) -> Outcome:
    """A trainable parameter has a gradient and stays as it is.

    Symptom: the loss falls less than it should, or not at all; the saved model equals the one that was loaded.
    Example: the parameter is in no optimiser group; a group has rate 0; the optimiser holds another model's tensors.
    Detected: three real steps in float32 at a rate of 1e-3: tensors with a gradient must differ afterwards.
    Tolerance: one changed element is enough; not judged where the rate is too small to show in float32.
    Spares: tensors without gradient (`no-gradient`), rates of the user's own scheduler that start at zero.
    Fix: build the optimiser after adapters, freezing and resizing, from the parameters that require a gradient.
    Sources: HVPNeT#5, SiamCAR#18, ai-toolkit#1054.
    """
    steps = audit_steps(subject)
    if steps.error:
        raise NotRun(f"backward fails: {steps.error}")
    judged = {n for n in steps.trainable if steps.gradients.get(n, 0.0) > 0 and steps.rate > 1e-6 * steps.sizes[n]}
    if not judged:
        raise NotRun("no trainable tensor has a gradient and a rate that would show")
    still = judged & steps.unmoved
    limit = "every trainable tensor moves"
    if still:
        return failed(f"{len(still)} of {len(judged)} trainable tensors do not move", limit, named(still))
    return passed(f"{len(judged)} trainable tensors move within {STEPS} steps", limit)


@check("frozen-parameter-moves", family="trainer", tier=2, catalogue="K27")
def frozen_parameter_moves(subject: Subject) -> Outcome:
    """A frozen parameter changes during training, or a tied one is trained by surprise.

    Symptom: the base below an adapter is no longer the published one; merging or reloading gives another model.
    Example: `requires_grad_(True)` somewhere in the step; a weight norm or clamp on all parameters; training only
        lm_head where it is tied, which trains the input embedding with it.
    Detected: three real steps: tensors that were frozen before are bit for bit the same afterwards. Trainable tensors
        with several names, while whole layers are frozen, are listed.
    Tolerance: none. Tied tensors: a warning.
    Spares: buffers and averaged copies; models without a frozen tensor.
    Fix: freeze before the optimiser is built and nowhere later; untie the head (`tie_word_embeddings=False`).
    Sources: sparseml#965, ocannl#673, transformers#11903.
    """
    steps = audit_steps(subject)
    if steps.error:
        raise NotRun(f"backward fails: {steps.error}")
    frozen = set(steps.sizes) - steps.trainable
    if not frozen:
        raise NotApplicable("no parameter is frozen")
    moved = frozen - steps.unmoved
    limit = "frozen tensors are equal bit for bit"
    if moved:
        notes = {n: " (requires a gradient by now)" if n in steps.thawed else "" for n in moved}
        evidence = [item for n in sorted(moved)[:5] for item in named([n], notes[n])]
        return failed(f"{len(moved)} of {len(frozen)} frozen tensors move within {STEPS} steps", limit, evidence)
    tied = _tied_and_trained(subject.model)
    if tied and any(re.search(r"\.\d+\.", n) and not is_adapter(n) for n in frozen):
        evidence = [{"note": f"one tensor: {' = '.join(names)}"} for names in tied]
        return warned(
            f"{len(frozen)} frozen tensors stay; {len(tied)} trained ones have a second name", limit, evidence
        )
    return passed(f"{len(frozen)} frozen tensors stay within {STEPS} steps", limit)


def _tied_and_trained(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad and not is_adapter(name):
            names.setdefault(id(p), []).append(name)
    return [found for found in names.values() if len(found) > 1]


@check("clipping-wrong", family="trainer", tier=2, catalogue="K27")
def clipping_wrong(subject: Subject) -> Outcome:
    """Gradients are clipped to another norm than the one that is set.

    Symptom: training crawls (everything clipped to almost nothing) or explodes (nothing clipped).
    Example: clipping before the loss scaler's factor is taken off; clipping by value; a norm per tensor.
    Detected: the norm of all gradients before and after the trainer's clipping, in three real steps: after it it is
        the smaller of itself and `max_grad_norm`.
    Tolerance: 1 %; 16-bit gradients are normed in float32.
    Spares: trainers that clip nowhere (`max_grad_norm` 0 or none); clipping inside the optimiser is not seen.
    Fix: unscale first, then `torch.nn.utils.clip_grad_norm_` over all parameters at once, then step.
    Sources: pytorch-lightning#9599, returnn#1590, waifu-diffusion#64.
    """
    subject.need("training", "model")
    limit_norm = subject.settings.get("max_grad_norm") or 0.0
    if not limit_norm > 0:
        raise NotApplicable("max_grad_norm is not set: nothing is clipped")
    steps = audit_steps(subject)
    if steps.error:
        raise NotRun(f"backward fails: {steps.error}")
    if not steps.norms:
        raise NotApplicable("the trainer clips elsewhere")
    due = [min(before, limit_norm) for before, _ in steps.norms]
    wrong = [(k, *norms) for k, norms in enumerate(steps.norms, 1) if abs(norms[1] - due[k - 1]) > 0.01 * due[k - 1]]
    limit = f"the smaller of the norm and {limit_norm:g}"
    if wrong:
        evidence = [{"note": f"step {k}: norm {a:.4g} before, {b:.4g} after"} for k, a, b in wrong]
        return failed(f"step {wrong[0][0]}: norm {wrong[0][1]:.4g} becomes {wrong[0][2]:.4g}", limit, evidence)
    before, after = max(steps.norms)
    return passed(f"a norm of {before:.3g} becomes {after:.3g}", limit)


@check("trainer-raises", family="trainer", tier=0, catalogue="K9")
def trainer_raises(subject: Subject) -> Outcome:
    """The trainer cannot even be built.

    Symptom: the command ends with a traceback before it trains.
    Example: assistant_only_loss with a template that TRL finds no marks in.
    Detected: the constructor of a Trainer raised, and nothing caught it; what it had been given is checked all the
        same.
    Tolerance: none.
    Spares: trainers that are built.
    Fix: mend what the message says; another failed check of this report may name the cause.
    Sources: trl#6966, marin#7237.
    """
    if subject.training is not None:
        return passed("the trainer is built")
    if subject.failure is None:
        raise NotApplicable("no trainer given")
    return failed("its constructor raised an error", "", [{"text": subject.failure, "note": "it says"}])
