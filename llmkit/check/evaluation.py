"""Whether an evaluation measures the model: in eval mode, whatever the batch size, with the right formula.

Owns the evaluations (made once per subject, `evaluate_all`) and the checks that read them. Family `trainer`.
Leaves out what is evaluated: the split, its prompts.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject

SIZES = (4, 1, 8)  # of batches; the first one is made twice
ROWS = 13  # so that a batch of each size but one is left over; a multiple where such a batch is dropped
PERPLEXITY = ("perplexity", "ppl")
SHOWN = 5


@dataclass
class Evaluations:
    """What evaluating the same rows showed, by batch size."""

    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)  # per target, where batches could be followed
    losses_by_label: dict[int, float] = field(default_factory=dict)  # the same, had each loss been divided by labels
    again: dict[str, float] = field(default_factory=dict)  # the first size, a second time
    in_train_mode: set[str] = field(default_factory=set)  # modules that a forward found so
    stays_in_eval: set[str] = field(default_factory=set)  # modules that trained before and no more afterwards
    reported: str | None = None  # name of the loss among the metrics


def evaluate_all(subject: Subject) -> Evaluations:
    subject.need("training", "model")
    trainer = getattr(subject.training, "trainer", None)
    if trainer is not None and not subject.eval_rows and trainer.eval_dataset is None:
        raise NotApplicable("no evaluation set given")
    return subject.once("evaluations", lambda: _evaluate_all(subject))


def _evaluate_all(subject: Subject) -> Evaluations:
    training, found = subject.training, Evaluations()
    rows = 16 if subject.settings.get("dataloader_drop_last") else ROWS
    with subject.small_model(keep_vocabulary=True) as model:
        batch = training.batches(1, 2)
        model.train()
        with _train_modes(model) as before:
            training.backward(model, batch)
        model.zero_grad(set_to_none=True)
        model.train()
        for size in SIZES:
            batches: list[tuple[float, int, int]] = []
            with _train_modes(model) as found_training:
                found.metrics[size] = training.evaluate(model, size, rows, batches)
            found.in_train_mode |= found_training
            targets = sum(n for _, n, _ in batches)
            if targets:
                found.losses[size] = sum(loss * n for loss, n, _ in batches) / targets
                found.losses_by_label[size] = sum(loss * n for loss, _, n in batches) / targets
        model.train()
        found.again = training.evaluate(model, SIZES[0], rows)
        with _train_modes(model) as after:
            training.backward(model, batch)
        found.stays_in_eval = before - after
    names = [k for k in found.again if k.endswith("loss")]
    found.reported = min(names, key=len, default=None)
    return found


class _train_modes:
    """Names of the modules whose forward, inside, found them in training mode."""

    def __init__(self, model: nn.Module):
        self.model, self.names, self.hooks = model, set[str](), list[Any]()

    def __enter__(self) -> set[str]:
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(self._note(name)))
        return self.names

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, inputs: Any) -> None:
            if module.training:
                self.names.add(name)

        return note

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def _shown(names: set[str], note: str) -> list[dict[str, Any]]:
    return [
        {"note": f"{name or 'the model'} {note}"} for name in sorted(names, key=lambda n: (n.count("."), n))[:SHOWN]
    ]


@check("eval-in-train-mode", family="trainer", tier=2, catalogue="K30")
def eval_in_train_mode(subject: Subject) -> Outcome:
    """The model is evaluated in training mode, or trained in eval mode after an evaluation.

    Symptom: the evaluation loss is noisy and too high (dropout is active), or regularisation ends at the first
        evaluation.
    Example: an `evaluate` of one's own without `model.eval()`; a step without `model.train()`; `F.dropout(x, 0.1)`,
        whose default is training.
    Detected: hooks on every module during the trainer's evaluation, and in its training step before and after one;
        two evaluations of the same rows.
    Tolerance: none: the two losses are equal bit for bit on a CPU (1e-5 elsewhere).
    Spares: modules that the trainer keeps in eval mode all the time (a frozen part).
    Fix: `model.eval()` before and `model.train()` after every evaluation; `F.dropout(x, p, training=self.training)`.
    Sources: pytorch/examples#114, mmd#14, IBM seq2seq#33.
    """
    found = evaluate_all(subject)
    limit = "eval mode during, training mode after, twice the same"
    if found.in_train_mode:
        evidence = _shown(found.in_train_mode, "is in training mode")
        return failed(f"{len(found.in_train_mode)} modules are evaluated in training mode", limit, evidence)
    if found.stays_in_eval:
        evidence = _shown(found.stays_in_eval, "trains before an evaluation, not after it")
        return failed(f"{len(found.stays_in_eval)} modules stay in eval mode after an evaluation", limit, evidence)
    if found.reported is None:
        raise NotRun("the evaluation reports no loss to compare")
    a, b = found.metrics[SIZES[0]].get(found.reported, math.nan), found.again[found.reported]
    tolerance = 0.0 if next(subject.model.parameters()).device.type == "cpu" else 1e-5 * abs(a)
    if not abs(a - b) <= tolerance:
        return failed(f"two evaluations of the same rows differ: {a:.6f} and {b:.6f}", limit)
    return passed(f"every module in eval mode, {found.reported} {a:.4f} twice", limit)


@check("eval-depends-on-batch-size", family="trainer", tier=2, catalogue="K30")
def eval_depends_on_batch_size(subject: Subject) -> Outcome:
    """The evaluation loss depends on the batch size.

    Symptom: two evaluations of one model cannot be compared; the loss jumps with the machine.
    Example: padding counted in the loss; a mean over batches of unlike numbers of tokens.
    Detected: the first rows in batches of 1, 4 and 8: the loss per trained token, summed over the trainer's own
        batches, and the loss that it reports.
    Tolerance: 1e-4 of the loss per token. The reported one: 5e-2, a warning.
    Spares: a Trainer that divides by labels, the first of each row included (older transformers, some models still).
        transformers' Trainer averages the batches' means weighted by rows, so that what it reports depends on the batch
        size wherever rows are unlike: a warning at most, with the size of it.
    Fix: mask padding with -100; report the sum of losses over all tokens divided by their number.
    Sources: transformers#39241, transformers#24839, mlx-lm#1855, axolotl#3988.
    """
    found = evaluate_all(subject)
    spread = min(_spread(list(losses.values())) for losses in (found.losses, found.losses_by_label))
    name = found.reported
    reported = [m[name] for m in found.metrics.values() if name in m] if name else []
    limit = "1e-4 per token, 5e-2 as reported"
    evidence = [{"note": f"batches of {size}: {loss:.5f} per token"} for size, loss in found.losses.items()]
    evidence += [{"note": f"batches of {s}: {name} {m[name]:.5f}"} for s, m in found.metrics.items() if name in m]
    if len(found.losses) == len(SIZES) and spread > 1e-4:
        return failed(f"the loss per token differs by {spread:.2%} between batches of 1, 4 and 8", limit, evidence)
    if not reported:
        raise NotRun("the evaluation reports no loss to compare")
    off = _spread(reported)
    if not found.losses and off > 1e-3:
        return failed(f"{name} differs by {off:.1%} between batches of 1, 4 and 8", limit, evidence)
    if off > 5e-2:
        why = "the trainer averages the means of batches, so longer rows weigh less"
        return warned(f"{name} differs by {off:.1%} between batches of 1, 4 and 8: {why}", limit, evidence)
    return passed(f"per token within {spread:.1e}, {name} within {off:.1e} for batches of 1, 4 and 8", limit)


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / max(abs(max(values)), 1e-12) if values else 0.0


@check("perplexity-formula", family="trainer", tier=2, catalogue="K30")
def perplexity_formula(subject: Subject) -> Outcome:
    """A reported perplexity is not the exponential of the reported loss.

    Symptom: perplexities that no other tool reproduces; 2**loss is far too small.
    Example: `2 ** loss` of a loss in nats; the mean of the batches' perplexities.
    Detected: every metric called perplexity or ppl against exp(loss) of the same evaluation.
    Tolerance: 1 %: rounding for a log; 30 % where it may be the mean of exponentials: a warning.
    Spares: bits per byte; evaluations without a perplexity.
    Fix: `math.exp(loss)`, of the mean loss per token in nats.
    Sources: SpeedrunningPLMs#2, reformer-pytorch#147.
    """
    found = evaluate_all(subject)
    metrics = found.again
    names = [k for k in metrics if k.rpartition("_")[2] in PERPLEXITY or k in PERPLEXITY]
    if not names:
        raise NotApplicable("no perplexity among the metrics")
    for name in names:
        loss = metrics.get(name.rpartition("_")[0] + "_loss", metrics.get(found.reported or "", math.nan))
        off = abs(metrics[name] / math.exp(loss) - 1) if loss < 700 else math.nan
        if not off <= 0.01:
            what = f"{name} is {metrics[name]:.4g}, exp(loss) is {math.exp(loss):.4g}"
            evidence = [{"note": f"2**loss is {2**loss:.4g}"}]
            return (failed if not off <= 0.3 else warned)(what, "equal within 1 %", evidence)
    return passed(f"{', '.join(names)} equal exp(loss)", "within 1 %")
