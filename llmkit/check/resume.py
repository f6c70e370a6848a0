"""Stopping and going on: N steps, a checkpoint, a new process and N steps more must be 2N steps straight.

Owns the three runs (made once per subject, `compare_runs`) and the checks that read them. Family `trainer`.
Leaves out what a checkpoint's files hold (`saving.py`).
"""

import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .live import is_indexed
from .runner import Outcome, check, failed, passed, warned
from .subject import DROPOUTS, NotApplicable, NotRun, Subject, Trace, redraw_

STEPS, CUT = 8, 4  # of the whole run; where it is cut: epochs have three steps, so inside the second one
DROPOUT = 0.1
SAMPLER_FIX = "Resume at the end of an epoch, or take the order from a sampler with a seed of its own."
RENAMED_FIX = "Before `train(resume_from_checkpoint=...)`, build the model by `from_pretrained` of that checkpoint."


@dataclass
class Comparison:
    """What differs between the straight run and the resumed one; steps count from 1."""

    noise: float = 0.0  # largest difference of a loss before the cut, between two runs from the same seed
    is_repeatable: bool = True  # those two saw the same rows
    num_distinct: int = 0  # rows seen
    rows: list[tuple[int, list[list[int]], list[list[int]]]] = field(default_factory=list)  # step, straight, resumed
    rates: list[tuple[int, float, float]] = field(default_factory=list)
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    num_moments: int = 0  # tensors and numbers in the saved optimiser
    moments: list[str] = field(default_factory=list)  # paths in it that are not as saved
    loaded: list[tuple[str, float]] = field(default_factory=list)  # weights after loading that are not as saved
    is_renamed: bool = False  # these are in the checkpoint under other names, by transformers' own doing
    final: list[tuple[str, float]] = field(default_factory=list)  # weights at the end
    final_share: float = 0.0  # of the distance trained
    straight_rates: list[float] = field(default_factory=list)
    planned_rates: list[float] = field(default_factory=list)  # by the schedule alone


def short_run_settings(subject: Subject) -> dict[str, Any]:
    """Small steps of one process: at most two rows by two micro-batches."""
    given = subject.settings
    return {
        "per_device_train_batch_size": min(int(given.get("per_device_train_batch_size") or 1), 2),
        "gradient_accumulation_steps": min(int(given.get("gradient_accumulation_steps") or 1), 2),
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None,
        "auto_find_batch_size": False,
    }


def is_stream(subject: Subject) -> bool:
    dataset = getattr(getattr(subject.training, "trainer", None), "train_dataset", None)
    return dataset is not None and not is_indexed(dataset)


def compare_runs(subject: Subject) -> Comparison:
    """Straight, cut and resumed; kept on the subject, with the reason where they could not be made."""
    subject.need("training", "model")
    if subject.settings.get("save_only_model"):
        raise NotApplicable("save_only_model=True: checkpoints hold weights alone, by choice")
    return subject.once("resume", lambda: _compare_runs(subject))


def _compare_runs(subject: Subject) -> Comparison:
    settings, training = short_run_settings(subject), subject.training
    step_rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    dataset = getattr(getattr(training, "trainer", None), "train_dataset", None)
    if not is_stream(subject) and dataset is not None and len(dataset) < 3 * step_rows:
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        step_rows = 1
    given = dict(num_steps=STEPS, num_rows=3 * step_rows, settings=settings)
    with tempfile.TemporaryDirectory() as folder, subject.small_model(keep_vocabulary=True) as model:
        with with_dropout(model, DROPOUT):
            _new_process(subject, model, is_same=True)
            straight = training.run(model, Path(folder) / "straight", **given)
            _new_process(subject, model, is_same=True)
            cut = training.run(model, Path(folder) / "cut", stop_at=CUT, **given)
            if CUT not in cut.checkpoints:
                raise NotRun(f"no folder checkpoint-{CUT} was written")
            _new_process(subject, model, is_same=False)
            resumed = training.run(model, Path(folder) / "cut", resume_from=cut.checkpoints[CUT], **given)
        found = _differences(straight, cut, resumed)
        found.is_renamed = _is_renamed(subject, model, cut.checkpoints[CUT], cut.weights, [n for n, _ in found.loaded])
        with contextlib.suppress(NotApplicable):  # it follows the evaluations
            found.planned_rates = training.learning_rates(model, STEPS)
    return found


def _new_process(subject: Subject, model: Any, is_same: bool) -> None:
    """Seeds as a constructor does. A resumed process drew other numbers since then, and starts from other weights.

    An adapter's checkpoint does not hold the frozen weights below it, which come with the model again.
    """
    seed = int(subject.settings.get("seed") or 0)
    redraw_(model)
    if not is_same:
        has_adapter = hasattr(model, "peft_config")
        kept = {p: p.data for p in model.parameters() if has_adapter and not p.requires_grad}
        redraw_(model, seed=1)
        for p, data in kept.items():
            p.data = data
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    for _ in range(1 if is_same else 7):
        random.random(), np.random.rand(), torch.rand(())


@contextlib.contextmanager
def with_dropout(model: nn.Module, rate: float) -> Iterator[None]:
    """Every dropout that the model has is in use, so that the random state matters. Undone by who lent the model."""
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else DROPOUTS
        for name in names:
            if isinstance(vars(module).get(name), (int, float)) and not isinstance(vars(module)[name], bool):
                setattr(module, name, rate)
    yield


def _differences(straight: Trace, cut: Trace, resumed: Trace) -> Comparison:
    found = Comparison(straight_rates=[s.learning_rate for s in straight.steps])
    if len(straight.steps) != STEPS or len(cut.steps) != CUT:
        raise NotRun(f"asked for {STEPS} and {CUT} steps, the trainer made {len(straight.steps)} and {len(cut.steps)}")
    for a, same_step in zip(straight.steps, cut.steps, strict=False):
        found.is_repeatable &= a.ids == same_step.ids
        found.noise = max(found.noise, abs(a.loss - same_step.loss))
    found.num_distinct = len({tuple(row) for step in straight.steps for row in step.ids})
    later = dict(enumerate(resumed.steps, CUT + 1))
    for number, a in enumerate(straight.steps[CUT:], CUT + 1):
        b = later.get(number)
        if b is None or a.ids != b.ids:
            found.rows.append((number, a.ids, b.ids if b else []))
        if b is not None and abs(a.learning_rate - b.learning_rate) > 1e-6 * max(a.learning_rate, b.learning_rate):
            found.rates.append((number, a.learning_rate, b.learning_rate))
        if b is not None and a.loss != b.loss:
            found.losses.append((number, a.loss, b.loss))
    saved, loaded = (flatten(_without_rates(t)) for t in (cut.optimizer, resumed.first_optimizer))
    found.num_moments = len(saved)
    found.moments = [path for path, value in saved.items() if path not in loaded or not same(value, loaded[path])]
    found.loaded = _unequal(cut.weights, resumed.first_weights)
    found.final = _unequal(straight.weights, resumed.weights)
    distance = sum(float((straight.weights[n] - w).double().square().sum()) for n, w in straight.first_weights.items())
    apart = sum(float((straight.weights[n] - w).double().square().sum()) for n, w in resumed.weights.items())
    found.final_share = (apart / distance) ** 0.5 if distance else float(apart > 0)
    return found


def _is_renamed(subject: Subject, model: Any, checkpoint: Path, saved: dict[str, Tensor], lost: list[str]) -> bool:
    """save_pretrained writes experts (and some heads) under the names of the published weights; transformers' Trainer
    (seen in 5.9 to 5.23) loads a checkpoint without renaming them back, and only warns of missing keys."""
    if not lost or not getattr(subject.training, "has_stock_checkpoints", False):
        return False
    try:
        read = dict(type(model).from_pretrained(checkpoint, dtype=torch.float32).named_parameters())
    except Exception:
        return False
    return all(name in read and torch.equal(read[name].detach().cpu(), saved[name]) for name in lost)


def _unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[str, float]]:
    return [(n, float((a[n] - b[n]).abs().max())) for n in a if n in b and not torch.equal(a[n], b[n])]


def _without_rates(state: Any) -> Any:
    """An optimiser's state_dict without its groups, which hold settings and rates."""
    if not isinstance(state, dict):
        return state
    return {k: _without_rates(v) for k, v in state.items() if k != "param_groups"}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """{"state.0.exp_avg": tensor, ...} of nested dicts and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if pairs is None:
        return {path: value}
    return {p: v for key, inner in pairs for p, v in flatten(inner, f"{path}.{key}" if path else str(key)).items()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.cpu(), b.cpu().to(a.dtype))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is not None and b is not None and float(a) == float(b)
    return bool(a == b)


def _need_data_position(subject: Subject) -> None:
    if subject.settings.get("ignore_data_skip"):
        raise NotApplicable("ignore_data_skip=True: a resumed run starts the data anew, by choice")
    if is_stream(subject):
        raise NotApplicable("the training set is a stream: where it goes on is its own affair")


@check("resume-data-order", family="trainer", tier=2, catalogue="K29")
def resume_data_order(subject: Subject) -> Outcome:
    """A resumed run sees other rows than the run that it continues.

    Symptom: after every restart some rows are trained twice and others never; the loss drops or jumps at the cut.
    Example: a sampler that seeds itself from the global random state; an epoch counter that starts at 0 again.
    Detected: 8 steps in a row against 4, a checkpoint, a new process (other weights, other random state, no optimiser)
        and 4 more, cut in the middle of the second epoch: the rows of every step must be the same ones.
    Tolerance: none; at least three distinct rows are seen.
    Spares: `ignore_data_skip=True`, streams, checkpoints of weights alone (`save_only_model`), collators that draw. A
        warning where a sampler of transformers' own loses the order (`group_by_length`).
    Fix: seed the sampler from `args.seed` and the epoch, restore both on resume, and skip the rows that were trained.
    Sources: ms-swift#10050, accelerate#4195, transgenic#59, transformers#8878.
    """
    subject.need("training", "model")
    _need_data_position(subject)
    runs = compare_runs(subject)
    limit = "the same rows in every step"
    if runs.num_distinct < 3:
        raise NotRun(f"only {runs.num_distinct} distinct rows: their order cannot be told")
    if _draws(subject):
        raise NotApplicable("the collator draws at random: the same row comes out different each time")
    if not runs.is_repeatable:
        return failed("two runs from the same seed see different rows, so no resumed one can go on where it was", limit)
    if not runs.rows:
        return passed(f"steps {CUT + 1} to {STEPS} see the same rows after a resume at {CUT}", limit)
    evidence = [
        {"ids": rows[0][:16] if rows else [], "note": f"first row of step {number}, {which}"}
        for number, straight, resumed in runs.rows[:2]
        for which, rows in (("straight", straight), ("resumed", resumed))
    ]
    if reason := getattr(subject.training, "order_lost_by_design", None):
        what = f"{len(runs.rows)} of {STEPS - CUT} steps after a resume see other rows: {reason}"
        return warned(f"{what} draws the order from the global random state", limit, evidence, SAMPLER_FIX)
    missing = sum(not b for _, _, b in runs.rows)
    what = f"; {missing} of them are not made at all" if missing else ""
    return failed(f"{len(runs.rows)} of {STEPS - CUT} steps after a resume see other rows{what}", limit, evidence)


def _draws(subject: Subject) -> bool:
    """The collator makes another batch of the same rows, now or then."""
    try:
        first, *others = (subject.training.batches(1, 2)[0] for _ in range(5))
    except NotApplicable:
        return False
    return any(not same(v, other.get(k)) for other in others for k, v in first.items() if isinstance(v, Tensor))


@check("resume-learning-rate", family="trainer", tier=2, catalogue="K29")
def resume_learning_rate(subject: Subject) -> Outcome:
    """The learning rate of a resumed run restarts or jumps.

    Symptom: a spike of the loss after each restart (warm-up or peak rate again), or a run that crawls at the end.
    Example: the scheduler is built anew with last_epoch=-1; its horizon is recomputed from what is left.
    Detected: the runs of `resume-data-order`: the rate of every step must be that of the straight run.
    Tolerance: 1e-6 of the rate.
    Spares: `save_only_model=True`; a constant schedule has nothing to lose.
    Fix: save and load the scheduler's state (`scheduler.pt`), and keep the horizon that the run was planned with.
    Sources: speculators#900, lightly-train#301, OneTrainer#1604, pytorch#60265.
    """
    runs = compare_runs(subject)
    limit = "the straight run's rate at every step"
    if runs.rates:
        number, a, b = runs.rates[0]
        evidence = [{"note": f"step {n}: {x:.3g} straight, {y:.3g} resumed"} for n, x, y in runs.rates]
        return failed(f"step {number}: rate {b:.3g} after a resume, {a:.3g} in the straight run", limit, evidence)
    return passed(f"rates of steps {CUT + 1} to {STEPS} are equal", limit)


@check("resume-optimizer", family="trainer", tier=2, catalogue="K29")
def resume_optimizer(subject: Subject) -> Outcome:
    """A resumed run starts without the optimiser's moments.

    Symptom: the loss jumps after a restart and needs hundreds of steps to come back.
    Example: `optimizer.pt` is not written, is deleted to save room, or nobody loads it.
    Detected: the runs of `resume-data-order`: the optimiser before the first resumed step against the one that was
        saved, tensor by tensor (moments, step counters).
    Tolerance: none: they went through a file.
    Spares: `save_only_model=True`, optimisers without state.
    Fix: save and load the optimiser's state_dict, for the same parameters in the same order.
    Sources: ACE-Step#742, FastChat#1280, alpaca-lora#72, transformers#29383.
    """
    runs = compare_runs(subject)
    limit = "every moment as saved"
    if runs.moments:
        evidence = [{"note": f"optimiser {path}"} for path in runs.moments[:5]]
        return failed(f"{len(runs.moments)} of {runs.num_moments} moments are not restored", limit, evidence)
    return passed(
        f"{runs.num_moments} moments and counters restored" if runs.num_moments else "it keeps no state", limit
    )


@check("resume-weights", family="trainer", tier=2, catalogue="K29")
def resume_weights(subject: Subject) -> Outcome:
    """A resumed run does not continue with the saved weights, or ends with other weights than a straight run.

    Symptom: the loss is that of a fresh model after a restart, or two runs that should be one drift apart.
    Example: load_state_dict(strict=False) with a prefix on every key; random states that are not restored.
    Detected: the runs of `resume-data-order`, with dropout on: weights after loading equal the saved ones; where rows,
        rates and moments are right too, losses and final weights equal those of the straight run.
    Tolerance: bit for bit where two runs from the same seed are; else a tenth of the distance trained.
    Spares: nondeterministic kernels, `save_only_model=True`, frozen weights below an adapter. A warning where
        transformers' own Trainer loses weights that save_pretrained renamed (experts of Mixtral and Qwen3-MoE).
    Fix: load strictly, look at missing keys; restore python's, numpy's and torch's random state before the first step.
    Sources: train-llm-from-scratch#37, nanoGPT#325, torchtitan#2498, transformers#46628.
    """
    runs = compare_runs(subject)
    limit = "bit for bit" if runs.noise == 0 else f"a tenth of the distance trained (two equal runs: {runs.noise:.1e})"
    if runs.loaded:
        evidence = [{"note": f"{name} is off by {gap:.2g} after loading"} for name, gap in runs.loaded[:5]]
        if runs.is_renamed:
            what = (
                f"transformers' Trainer does not read {len(runs.loaded)} weights back, which it wrote under other names"
            )
            return warned(what, "as saved", evidence, RENAMED_FIX)
        return failed(f"{len(runs.loaded)} weights are not the saved ones after a resume", "as saved", evidence)
    if runs.rows or runs.rates or runs.moments:
        return passed("the saved weights are loaded (what follows differs: see the other resume checks)", "as saved")
    if subject.settings.get("ignore_data_skip") or is_stream(subject) or not runs.is_repeatable or _draws(subject):
        return passed("the saved weights are loaded", "as saved")
    is_off = bool(runs.final or runs.losses) if runs.noise == 0 else runs.final_share > 0.1
    if is_off:
        evidence = [{"note": f"step {n}: loss {a:.6f} straight, {b:.6f} resumed"} for n, a, b in runs.losses[:3]]
        evidence += [{"note": f"{name} is off by {gap:.2g} at the end"} for name, gap in runs.final[:3]]
        what = f"with dropout on, {len(runs.losses)} of {STEPS - CUT} losses and {len(runs.final)} final weights differ"
        return failed(f"{what} from the straight run ({runs.final_share:.1%} of the distance)", limit, evidence)
    return passed(f"losses and final weights of {STEPS} steps are equal, dropout on", limit)
