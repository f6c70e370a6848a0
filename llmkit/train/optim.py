"""Optimisers and learning-rate schedules.

Owns which parameter gets which update, Muon with batched Newton-Schulz, and the schedule as a function of the step.

    optimizer = build_optimizer(model, config); set_learning_rate(optimizer, lr_factor(step, config, max_steps))

Leaves out clipping and scaling of gradients: the loop does that.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..config import UserError
from ..verbs import PretrainConfig

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest slope at 0, lands in about [0.7, 1.2]
BATCH_ELEMENTS = 2**22  # matrices orthogonalised at once: more are no faster, and their temporaries take memory


def orthogonalise(matrices_BMN: Tensor, num_steps: int = 5) -> Tensor:
    """Moves all singular values of each matrix (B, M, N), M <= N, close to 1 by a quintic Newton-Schulz iteration.

    Batched over equal shapes: on a CPU one call per matrix costs about as much as the model itself.
    Runs in bfloat16 on a GPU and in the given dtype on a CPU. Source: Jordan et al. 2024, "Muon", with their constants.
    """
    a, b, c = NS_COEFFICIENTS
    x = matrices_BMN.bfloat16() if matrices_BMN.is_cuda else matrices_BMN
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT  # (B, M, M)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices_BMN.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): p -= lr * sqrt(max(1, out / in)) * NS(nesterov(grad)).

    Takes matrices only. State per matrix: `momentum_buffer`, of the matrix' own shape.
    Raises ValueError for a parameter that is no matrix.
    """

    def __init__(self, params: list, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None  # as in torch's fused optimisers: 1.0 on the device means no update
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices, found a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:  # wide and tall matrices of one size share a batch, the tall ones transposed
                    shapes.setdefault((min(p.shape), max(p.shape)), []).append(p)
            size = [max(1, BATCH_ELEMENTS // math.prod(shape)) for shape in shapes]
            batches = [ps[i : i + n] for ps, n in zip(shapes.values(), size, strict=True) for i in range(0, len(ps), n)]
            for same in batches:
                if self.found_inf is None:
                    self._step_batch(same, **{key: group[key] for key in ("lr", "momentum", "weight_decay")})
                    continue
                changed = [*same, *(self._buffer(p) for p in same)]
                before = [t.detach().clone() for t in changed]
                self._step_batch(same, **{key: group[key] for key in ("lr", "momentum", "weight_decay")})
                for t, old in zip(changed, before, strict=True):
                    t.copy_(torch.where(self.found_inf.bool(), old, t))  # a NaN times 0 would be a NaN

    def _buffer(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _step_batch(self, same: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        is_tall = [p.shape[0] > p.shape[1] for p in same]
        buffers = [self._buffer(p) for p in same]
        grads = [p.grad for p in same]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, buffers, momentum)
        whole = [u.full_tensor() if isinstance(u, DTensor) else u for u in nesterov]  # FSDP2: every rank does all
        stacked = torch.stack([u.T if tall else u for u, tall in zip(whole, is_tall, strict=True)])
        updates = orthogonalise(stacked).unbind()
        if weight_decay:
            torch._foreach_mul_(same, 1 - lr * weight_decay)
        for p, update, tall in zip(same, updates, is_tall, strict=True):
            num_out, num_in = reversed(p.shape) if getattr(p, "is_in_out", False) else p.shape
            update = update.T if tall else update
            if isinstance(p, DTensor):
                update = DTensor.from_local(update, p.device_mesh).redistribute(placements=p.placements)
            p.add_(update, alpha=-lr * math.sqrt(max(1.0, num_out / num_in)))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for one set of parameters and AdamW for the others, as a single optimiser."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.param_groups = [*muon.param_groups, *adamw.param_groups]  # the same dicts: rates set here reach both
        self.state = muon.state = adamw.state  # each holds its own parameters only
        self.found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        self.muon.found_inf = self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state


def split_parameters(model: nn.Module) -> tuple[list, list, list]:
    """Trainable parameters as (hidden matrices, other matrices: embeddings and head, vectors)."""
    outer = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        outer.add(id(head.weight))
    trainable = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trainable if p.ndim == 2 and id(p) not in outer]
    for module in model.modules():
        if isinstance(module, Conv1D):  # GPT-2 keeps its matrices as (in, out)
            module.weight.is_in_out = True  # type: ignore[assignment]
    others = [p for p in trainable if p.ndim >= 2 and (p.ndim > 2 or id(p) in outer)]
    return hidden, others, [p for p in trainable if p.ndim < 2]


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest. Norms and biases are never decayed.

    Every group carries `peak_lr`, which `set_learning_rate` scales.
    """
    hidden, others, vectors = split_parameters(model)
    use_muon = config.optim == "muon" and bool(hidden)
    if config.optim == "muon" and not hidden:
        raise UserError("optim='muon': this model has no trainable hidden matrix; use adamw_torch_fused")
    decayed = others if use_muon else hidden + others
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=config.optim != "adamw_torch",
    )
    optimizer: torch.optim.Optimizer = adamw
    if use_muon:
        optimizer = MuonAdamW(Muon(hidden, config.muon_learning_rate, config.muon_momentum, config.weight_decay), adamw)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def num_steps(value: float, max_steps: int) -> int:
    """A count of steps; below 1 it is a share of all steps."""
    return round(value * max_steps) if value < 1 else int(value)


def lr_factor(step: int, config: PretrainConfig, max_steps: int) -> float:
    """Learning rate of step 0 .. max_steps - 1 as a share of its peak. Pure, so there is no state to save."""
    warmup = num_steps(config.warmup_steps, max_steps)
    if step < warmup:
        return (step + 1) / warmup
    floor = config.lr_scheduler_kwargs.get("min_lr_ratio", 0.0)
    kind, span = config.lr_scheduler_type, max_steps - warmup
    if kind == "constant":
        return 1.0
    if kind == "warmup_stable_decay":  # Hu et al. 2024, §4: flat, then down
        span = min(span, num_steps(config.lr_scheduler_kwargs.get("num_decay_steps", 0.2), max_steps))
    left = min(1.0, (max_steps - step) / max(1, span))  # 1 until the decay begins; 1 / span at the last step
    shape = 0.5 * (1 - math.cos(math.pi * left)) if kind == "cosine" else left
    return floor + (1 - floor) * shape


def set_learning_rate(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def planned_rates(optimizer: torch.optim.Optimizer, config: PretrainConfig, factor: float) -> list[float]:
    """What the rate of every group must be when the schedule stands at `factor`, from the recipe alone."""
    count = len(optimizer.muon.param_groups) if isinstance(optimizer, MuonAdamW) else 0
    peaks = [config.muon_learning_rate] * count + [config.learning_rate] * (len(optimizer.param_groups) - count)
    return [peak * factor for peak in peaks]
