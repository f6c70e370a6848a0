"""How far logits moved, and how far rounding alone would have moved them. For behavioural checks.

Owns the units: differences are shares of the logits' standard deviation.

    with probed(subject) as (model, ids):
        moved, limit = difference(a, b, need_alive(a)), floor(model, ids)

Leaves out what was done to the model in between.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .forward import LONG, draw_ids, is_mixture, length_beyond_window, logits_of, text_config, window_of
from .subject import NotRun, Subject, without_dropout

CAUSAL, EQUAL = 1e-5, 1e-4  # of the logits' standard deviation: same shapes, other shapes
LEAST = 1e-4  # what a positive control must move


def difference(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """Largest difference in units of `scale`; infinite where one of them is not finite, 0 of nothing."""
    if a.numel() == 0:
        return 0.0
    moved = (a - b).abs().max() / scale.clamp_min(1e-12)
    return float(moved) if torch.isfinite(moved) else float("inf")


def typical(gap: Tensor, model: Any) -> Tensor:
    """The largest gap over positions; the median for a mixture of experts, where rounding may flip some routes."""
    return gap.median() if is_mixture(model) else gap.max()


def share(a: Tensor, b: Tensor, scale: Tensor, model: Any) -> float:
    """`difference` of (..., T, V), by `typical`."""
    if a.numel() == 0:
        return 0.0
    moved = typical((a - b).abs().amax(-1).flatten(), model) / scale.clamp_min(1e-12)
    return float(moved) if torch.isfinite(moved) else float("inf")


@torch.no_grad()
def noise(model: Any, ids: Tensor) -> float:
    """What the logits move by when every parameter is rounded otherwise: by about one part in eight million.

    A measure of the model alone: where rows, padding or caches are mixed up it stays what it is.
    """
    before = logits_of(model, ids)
    generator = torch.Generator().manual_seed(5)
    held = [(p, p.data) for p in model.parameters() if p.is_floating_point()]
    try:
        for p, data in held:
            p.data = data * (1 + 2**-23 * torch.randn(data.shape, generator=generator).to(data))
        after = logits_of(model, ids)
    finally:
        for p, data in held:
            p.data = data
    return share(before, after, before.std(), model)


def floor(model: Any, ids: Tensor) -> float:
    """The limit for logits of other shapes, caches or kernels."""
    return max(EQUAL, 10 * noise(model, ids))


def need_alive(logits: Tensor) -> Tensor:
    """Their standard deviation. Raises NotRun for logits that are constant or not finite: nothing could be seen."""
    scale = logits.std()
    if not torch.isfinite(logits).all():
        raise NotRun("logits are not finite with redrawn weights")
    if scale < 1e-6:
        raise NotRun("logits are constant with redrawn weights")
    return scale


@contextlib.contextmanager
def probed(subject: Subject, rows: int = 3, seed: int = 0) -> Iterator[tuple[Any, Tensor]]:
    """The small model without dropout, and random ids (rows, T) that go beyond its window."""
    subject.need("model")
    with subject.small_model(seed) as model, without_dropout(model), torch.no_grad():
        yield model, draw_ids(model, rows, length_beyond_window(model))


Look = Callable[[Any, Tensor], Any]


def on_each(subject: Subject, look: Look, rows: int = 3) -> list[Any]:
    """look(model, ids) of the small model, and of a copy of its class with a window that a short row goes beyond."""
    with probed(subject, rows) as (model, ids):
        results = [look(model, ids)]
        is_long = window_of(text_config(model)) > (LONG - 9) // 2
    if is_long:
        with contextlib.suppress(NotRun), subject.small_window() as model, without_dropout(model), torch.no_grad():
            results.append(look(model, draw_ids(model, rows, length_beyond_window(model))))
    return results
