"""Whether the learning rate does what was planned: by a dry run of the schedule, and step by step in a real run.

Owns the judgement of a list of rates (`off_plan`). Checks of family `trainer`. Leaves out resuming (`resume.py`).
"""

from typing import Any

from .resume import compare_runs
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Schedule, Subject

LONGEST = 200_000  # steps of a dry run: seconds
DECAYS = ("linear", "cosine", "polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")


def off_plan(
    rates: list[float], peak: float | None, kind: str | None, options: dict[str, Any], warmup: float
) -> tuple[str, str] | None:
    """(fail or warn, what is wrong) of the rates of all planned steps, or None.

    `peak`: None where the optimiser has rates of its own. `kind`: of transformers' schedules, None for the user's.
    """
    top, steps = max(rates), len(rates)
    first, last = rates.index(top), steps - 1 - rates[::-1].index(top)
    if top <= 0:
        return "fail", "the rate is 0 at every step"
    if peak and top > peak * 1.001:
        return "fail", f"it reaches {top:.3g} at step {first + 1}, above the {peak:.3g} that is set"
    if peak and top < peak * 0.98 and steps > 3:
        if warmup >= steps:
            return "warn", f"the warm-up of {warmup:g} steps is longer than the run of {steps}: the peak is {top:.3g}"
        if top < peak * 0.5 or kind is not None:
            return "fail", f"its highest is {top:.3g} at step {first + 1}, not the {peak:.3g} that is set"
    climb = _climbs_at(rates, first, kind, options)
    if climb is not None:
        return "fail", f"it rises again at step {climb + 1}, after it had fallen to {rates[climb - 1]:.3g}"
    low = next((i for i in range(first, steps) if max(rates[i:]) <= 1e-4 * top), steps)
    idle = (steps - low) / steps
    if steps >= 10 and idle > 0.3:
        return "fail", f"it is zero from step {low + 1} of {steps} on"
    if steps >= 10 and idle > 0.1:
        return "warn", f"it is zero for the last {idle:.0%} of {steps} steps"
    return _never_decays(rates, top, last, kind, options)


def _climbs_at(rates: list[float], first: int, kind: str | None, options: dict[str, Any]) -> int | None:
    """The step at which the rate rises after its peak. In a schedule of the user's, a jump of one step is a restart."""
    if kind == "cosine_with_restarts" or "num_cycles" in options:
        return None
    smallest = 1e-12 * max(rates)
    climbs = {i for i in range(first + 1, len(rates)) if rates[i] > rates[i - 1] * (1 + 1e-6) + smallest}
    if kind is None:
        climbs = {i for i in climbs if i - 1 in climbs or i + 1 in climbs}
    return min(climbs, default=None)


def _never_decays(
    rates: list[float], top: float, last: int, kind: str | None, options: dict[str, Any]
) -> tuple[str, str] | None:
    if kind not in DECAYS or "num_cycles" in options:
        return None
    floor = max(float(options.get("min_lr_ratio") or 0), float(options.get("min_lr_rate") or 0))
    floor = max(floor, float(options.get("min_lr") or 0) / top, float(options.get("lr_end") or 0) / top)
    length = int(options.get("num_decay_steps") or len(rates) - last)
    if length < 10:
        return None
    end = rates[-1] / top
    if end > floor + 0.1 + 3 / length:
        how = "fail" if end > floor + 0.5 else "warn"
        return how, f"a {kind} schedule ends at {end:.0%} of the peak: it was planned for more than {len(rates)} steps"
    return None


def _declared(settings: dict[str, Any]) -> Schedule:
    return Schedule(str(settings.get("lr_scheduler_type") or ""), True, False)


@check("learning-rate-off-plan", family="trainer", tier=1, catalogue="K8")
def learning_rate_off_plan(subject: Subject) -> Outcome:
    """The learning rate does not follow its plan over the steps that are planned.

    Symptom: the rate is zero long before the end, never falls, climbs again, or never reaches its peak.
    Example: a schedule whose horizon counts epochs, or micro-batches, where steps are meant.
    Detected: a dry run of the trainer's own scheduler over all planned optimiser steps: its peak is `learning_rate`,
        it does not rise after it fell, is not zero for long, and has fallen at the end where its type says so.
    Tolerance: 0.1 % above the peak, 2 % below it; zero for at most 10 % of the steps (30 %: fail).
    Spares: constant, restarts (`cosine_with_restarts`, jumps of schedulers with restarts), warmup_stable_decay, rates
        that follow a metric, optimisers and schedulers of the user's own (their peak is their own).
    Fix: hand the scheduler the number of optimiser steps: batches / accumulation / processes x epochs.
    Sources: accelerate#2926, accelerate#662, transformers#24088, diffusers#4387, villa#1495.
    """
    subject.need("training")
    if subject.model is None:
        raise NotApplicable("no model given")
    settings, training = subject.settings, subject.training
    if hasattr(training, "num_steps") and (total := training.num_steps()) > LONGEST:
        raise NotRun(f"{total} steps are too many for a dry run")
    rates = training.learning_rates(subject.model)
    if not rates:
        raise NotRun("no step is planned")
    how = training.schedule_of(subject.model) if hasattr(training, "schedule_of") else _declared(settings)
    if how.is_cyclic:
        raise NotApplicable("the scheduler restarts by design")
    peak = settings.get("learning_rate") if how.has_planned_peak else None
    options = settings.get("lr_scheduler_kwargs") or {}
    warmup = float(settings.get("warmup_steps") or 0)
    wrong = off_plan(rates, peak, how.kind, options, warmup)
    limit = "up to the set rate, then down by the end of the run"
    if wrong:
        picks = sorted({0, len(rates) // 4, len(rates) // 2, 3 * len(rates) // 4, len(rates) - 1})
        evidence = [{"note": f"step {i + 1}: {rates[i]:.3g}"} for i in picks]
        return (failed if wrong[0] == "fail" else warned)(wrong[1], limit, evidence)
    return passed(f"{max(rates):.3g} at its highest, {rates[-1]:.3g} at the end of {len(rates)} steps", limit)


@check("learning-rate-not-per-step", family="trainer", tier=2, catalogue="K8")
def learning_rate_not_per_step(subject: Subject) -> Outcome:
    """The schedule moves other than once per optimiser step.

    Symptom: the rate falls twice (or more) as fast as planned; with accumulation the end of the run trains nothing.
    Example: `lr_scheduler.step()` in the loss or in every micro-batch, besides the trainer's own.
    Detected: the rates of a real run of 8 steps against a dry run of the same scheduler over 8 steps.
    Tolerance: 1e-6 of the rate.
    Spares: constant rates, where nothing can differ; rates that follow a metric.
    Fix: call `scheduler.step()` once, after `optimizer.step()`, and nowhere else.
    Sources: accelerate#2926, diffusers#3954, transformers#24088.
    """
    runs = compare_runs(subject)
    if not runs.planned_rates:
        raise NotApplicable("the rate follows the evaluations")
    limit = "one move per optimiser step"
    pairs = list(enumerate(zip(runs.straight_rates, runs.planned_rates, strict=False), 1))
    off = [(k, a, b) for k, (a, b) in pairs if abs(a - b) > 1e-6 * max(abs(a), abs(b), 1e-12)]
    if off:
        evidence = [{"note": f"step {k}: {a:.3g} in the run, {b:.3g} planned"} for k, a, b in off[:4]]
        return failed(f"{len(off)} of {len(pairs)} steps train at another rate than planned", limit, evidence)
    return passed(f"{len(pairs)} steps train at the planned rates", limit)
