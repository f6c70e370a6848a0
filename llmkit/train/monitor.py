"""The monitor: notices when a run goes wrong, stops it before the update or skips the update, and says why.

Owns `alerts.jsonl`, the rule for spikes, and finding the first module that goes bad.

    monitor = Monitor(run, device, say)
    skip = monitor.judge(loss, grad_norm)    # tensors in, a bool tensor out: nothing waits for the device
    monitor.drain()                          # now the host looks; raises NotFinite

What it raises: not-finite, spike-skipped, below-entropy, zero-gradient, learning-rate-off-plan, batch-repeated.
Leaves out repairing anything: rates and data stay as the recipe has them.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..evaluate.perplexity import ShardScore
from ..run import Run
from ..verbs import PretrainConfig
from .optim import num_steps

WINDOW = 128  # steps that a new loss or gradient norm is compared with
SIGMAS = 6.0
LEAST_HISTORY = 64  # before so many steps nothing is called a spike
# The standard deviation counts as at least so much of the mean: a loss that hardly moves any more makes no spikes out
# of nothing, and gradient norms have heavy tails (14 deviations, 8.7 times the mean in clean runs: recipes/LOG.md), so
# theirs must be 16 times the mean.
LEAST_SIGMA = (0.01, 2.5)  # of losses, of gradient norms
LOOKS_AT_GRADIENTS = 3  # steps after warm-up that every tensor's gradient is looked at


class NotFinite(ArithmeticError):
    """Loss or gradient of `step` is not finite; the weights are those of before that step."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        self.step, self.loss, self.grad_norm = step, loss, grad_norm
        super().__init__(
            f"gradient norm is {grad_norm} at step {step}" if math.isfinite(loss) else f"loss is {loss} at step {step}"
        )


class Monitor:
    """Judges every step on the device and keeps what must survive a restart in `state`."""

    def __init__(self, run: Run, device: torch.device, say: Callable[[str], object]):
        self.run, self.say = run, say
        self.window = torch.zeros(2, WINDOW, device=device)  # losses and gradient norms of accepted steps
        self.least_sigma = torch.tensor(LEAST_SIGMA, device=device)
        self.num_seen = 0
        self.is_bad = torch.zeros((), dtype=torch.bool, device=device)  # stays on: no update after a bad one
        self.pending: list[Tensor] = []  # (4,) loss, grad norm, skip, bad of steps that the host has not looked at
        self.first_pending = 1  # the step of pending[0], counted from 1
        self.num_skipped = self.num_alerts = 0
        self.epoch, self.batches = -1, set[int]()
        self.zero_streaks: dict[str, int] = {}
        self.said: set[str] = set()

    def alert(self, step: int, kind: str, message: str, **facts: Any) -> None:
        """One line in alerts.jsonl and on the console."""
        self.num_alerts += 1
        self.run.append("alerts.jsonl", {"step": step, "kind": kind, "message": message, **facts})
        self.say(f"alert     step {step}: {message}")

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """True where the update must not be made: not finite, or a spike. Takes those of the global batch.

        A spike lies more than 6 standard deviations above the mean of the last 128 accepted steps, in loss or in
        gradient norm (the rule of OLMo-core's SkipStepOptimizer, with LEAST_SIGMA added). It enters the window cut
        down to that limit, so a lasting change is accepted after a while.
        """
        new = torch.stack([loss.detach().float(), grad_norm.detach().float()])  # (2,)
        self.is_bad = self.is_bad | ~new.isfinite().all()
        skip = self.is_bad
        kept = new
        if self.num_seen >= LEAST_HISTORY:
            sigma, mean = torch.std_mean(self.window[:, : min(self.num_seen, WINDOW)], dim=1)
            limit = mean + SIGMAS * torch.maximum(sigma, self.least_sigma * mean.abs())
            skip = skip | (new > limit).any()
            kept = torch.minimum(new, limit)
        self.window[:, self.num_seen % WINDOW] = kept
        self.num_seen += 1
        self.pending.append(torch.stack([*new, skip.float(), self.is_bad.float()]))
        return skip

    def drain(self) -> list[list[float]]:
        """Waits for the device; (loss, grad norm, skipped, bad) of the steps since the last call. Raises NotFinite."""
        if not self.pending:
            return []
        rows = torch.stack(self.pending).tolist()
        for step, (loss, grad_norm, skip, bad) in enumerate(rows, self.first_pending):
            if bad:
                raise NotFinite(step, loss, grad_norm)
            if skip:
                self.num_skipped += 1
                self.alert(
                    step,
                    "spike-skipped",
                    f"spike, no update made: loss {loss:.4g}, gradient norm {grad_norm:.4g}, one of them more than "
                    f"{SIGMAS:g} standard deviations above the last {WINDOW} steps",
                    loss=loss,
                    grad_norm=grad_norm,
                )
        self.first_pending += len(rows)
        self.pending = []
        return rows

    def see_batch(self, step: int, epoch: int, ids: Tensor) -> None:
        """Remembers the batch of this rank, (B, T) ids on the CPU; the same one twice within an epoch is an alert."""
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, set()
        digest = int.from_bytes(hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest(), "little", signed=True)
        if digest in self.batches and "batch" not in self.said:
            self.said.add("batch")
            self.alert(step, "batch-repeated", f"the rows of this step were trained on before in epoch {epoch}")
        self.batches.add(digest)

    def looks_at_gradients(self, step: int, config: PretrainConfig, max_steps: int) -> bool:
        return 0 <= step - num_steps(config.warmup_steps, max_steps) < LOOKS_AT_GRADIENTS

    def see_gradients(self, step: int, norms: dict[str, float]) -> None:
        """Called for a few steps after warm-up with the norm of every trainable tensor's gradient."""
        for name, norm in norms.items():
            self.zero_streaks[name] = self.zero_streaks.get(name, 0) + 1 if norm == 0 else 0
            if self.zero_streaks[name] == LOOKS_AT_GRADIENTS:
                self.alert(
                    step,
                    "zero-gradient",
                    f"{name} had a zero gradient for {LOOKS_AT_GRADIENTS} steps: it is trainable and learns nothing",
                    tensor=name,
                )

    def see_learning_rates(self, step: int, rates: list[float], planned: list[float]) -> None:
        if "lr" not in self.said and any(
            abs(a - b) > 1e-6 * max(abs(b), 1e-12) for a, b in zip(rates, planned, strict=True)
        ):
            self.said.add("lr")
            self.alert(
                step, "learning-rate-off-plan", f"learning rates are {rates}, the schedule says {planned}", rates=rates
            )

    def see_scores(self, step: int, scores: dict[str, ShardScore]) -> None:
        """A loss below the true entropy, by more than 4 standard errors, is a leak or a wrong measurement."""
        for name, score in scores.items():
            if score.gap is not None and score.gap < -4 * (score.gap_stderr or 0.0):
                self.alert(
                    step,
                    "below-entropy",
                    f"{name}: loss {score.loss:.4f} is below the true entropy {score.entropy:.4f}: labels leak into "
                    "the input, or the loss is measured wrongly",
                    shard=name,
                )

    @property
    def state(self) -> dict[str, Tensor]:
        """What resuming needs for the same verdicts; call `drain` first. The look at gradients is not resumed."""
        said = int("lr" in self.said) + 2 * int("batch" in self.said)
        counts = torch.tensor([self.num_seen, self.num_skipped, self.num_alerts, self.epoch, said])
        batches = torch.tensor(sorted(self.batches), dtype=torch.int64)
        return {"window": self.window.cpu(), "counts": counts, "batches": batches}

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        self.window = state["window"].to(self.window.device)
        self.num_seen, self.num_skipped, self.num_alerts, self.epoch, said = state["counts"].tolist()
        self.said = {kind for bit, kind in enumerate(("lr", "batch")) if said >> bit & 1}
        self.batches, self.first_pending = set(state["batches"].tolist()), step + 1


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors inside tuples, lists, mappings and model outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _what(tensor: Tensor) -> str:
    """'3 of 1,024 values are nan', or '' when all are finite."""
    count = int((~tensor.isfinite()).sum())
    kind = "nan" if tensor.isnan().any() else "infinite"
    return f"{count:,} of {tensor.numel():,} values are {kind}" if count else ""


def first_not_finite(model: nn.Module, forward_backward: Callable[[], None]) -> str | None:
    """Runs forward and backward with hooks on every module; names the first module and tensor that went bad.

    In order of execution: a module's own weights, its input, its output, then, on the way back, the gradient at its
    output and of its weights. None when everything was finite this time.
    """
    found: list[str] = []
    handles: list[RemovableHandle] = []

    def see(where: str, tensor: Tensor) -> None:
        if not found and (what := _what(tensor.detach())):
            found.append(f"{where} ({what})")

    def watch_gradient(where: str, tensor: Tensor) -> None:
        if tensor.requires_grad:
            handles.append(tensor.register_hook(lambda grad: see(where, grad)))

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            for key, p in module.named_parameters(recurse=False):
                see(f"{name}: weight {key!r}", p)
            for tensor in _tensors(args):
                see(f"{name}: its input", tensor)

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            for tensor in _tensors(output):
                see(f"{name}: its output", tensor)
                watch_gradient(f"{name}: the gradient at its output", tensor)

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name or "model")))
        handles.append(module.register_forward_hook(after(name or "model")))
    for name, p in model.named_parameters():
        watch_gradient(f"{name}: its gradient", p)
    try:
        forward_backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
