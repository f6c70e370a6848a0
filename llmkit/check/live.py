"""What hangs on a live transformers Trainer: put back as it was, or handed to a small model.

Owns restoring generators, optimisers and the user's own objects, the forward that TRL writes on a model, and picking
rows of any kind of data set. Leaves out running a trainer (`hf_trainer.py`).
"""

import collections
import contextlib
import functools
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .forward import bare
from .subject import attributes_restored

LOOKED_AT = 256  # rows among which short or ragged ones are chosen
ELEMENTS = 60_000_000  # logits of one batch of a probe at most: rows x tokens x ids


def own_objects(trainer: Any) -> list[Any]:
    """What hangs on a trainer and may keep a state of its own: collators, samplers, schedulers, loss scalers."""
    elsewhere = (type, ModuleType, FunctionType, MethodType, nn.Module, Tensor, torch.optim.Optimizer, Path)
    named = ("Tokenizer", "Processor", "Callback", "Arguments", "Config")
    found: dict[int, Any] = {}
    queue = [*vars(trainer).values(), getattr(trainer.accelerator, "scaler", None)]
    for _ in range(3):
        level, queue = queue, []
        for value in level:
            if isinstance(value, (list, tuple)) and len(value) <= 20:
                queue += value
            if id(value) in found or not hasattr(value, "__dict__") or isinstance(value, elsewhere):
                continue
            if value is trainer or type(value).__module__.split(".")[0] == "accelerate" or len(found) > 100:
                continue
            if any(word in c.__name__ for c in type(value).__mro__ for word in named):
                continue
            found[id(value)] = value
            queue += vars(value).values()
    return list(found.values())


@contextlib.contextmanager
def generators_restored(objects: list[Any]) -> Iterator[None]:
    """The random generators among their attributes are as before."""
    values = {id(v): v for o in objects for v in vars(o).values()}.values()
    torches = [(g, g.get_state()) for g in values if isinstance(g, torch.Generator)]
    pythons = [(g, g.getstate()) for g in values if isinstance(g, random.Random)]
    numpys = [(g, g.bit_generator.state) for g in values if isinstance(g, np.random.Generator)]
    try:
        yield
    finally:
        for torch_generator, torch_state in torches:
            torch_generator.set_state(torch_state)
        for python_generator, python_state in pythons:
            python_generator.setstate(python_state)
        for numpy_generator, numpy_state in numpys:
            numpy_generator.bit_generator.state = numpy_state


@contextlib.contextmanager
def optimizer_restored(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Its moments, rates and attributes are as before, in the same tensors; inside it works on copies."""
    state, groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    with attributes_restored(optimizer):
        optimizer.state = collections.defaultdict(
            dict, {p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for p, s in state.items()}
        )
        try:
            yield
        finally:
            optimizer.state = state
            for group, before in zip(optimizer.param_groups, groups, strict=False):
                group.clear()
                group.update(before)


def gradient_norm(trainer: Any) -> float:
    """Of all gradients together, as the optimiser will see them: without the factor of a loss scaler."""
    squares = [float(p.grad.float().square().sum()) for p in trainer.model.parameters() if p.grad is not None]
    scaler = trainer.accelerator.scaler
    return math.sqrt(sum(squares)) / (scaler.get_scale() if scaler is not None and not _is_unscaled(trainer) else 1.0)


def _is_unscaled(trainer: Any) -> bool:
    states = getattr(trainer.accelerator.scaler, "_per_optimizer_states", {})
    return any(getattr(s.get("stage"), "name", "") == "UNSCALED" for s in states.values())


def patch_forward_as(live: Any, small: Any) -> None:
    """TRL writes a `forward` of its own on the model it trains, closed over the original: the small one gets the same.

    Whoever lends the small model takes it off again (`restored`).
    """
    live, small = bare(live), bare(small)
    function = getattr(vars(live).get("forward"), "__func__", None)
    if live is small or not isinstance(function, FunctionType) or "forward" in vars(small):
        return

    def other(value: Any) -> Any:
        if value is live:
            return small
        return getattr(small, value.__name__) if getattr(value, "__self__", None) is live else value

    cells = tuple(CellType(other(cell.cell_contents)) for cell in function.__closure__ or ())
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copied.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copied, type(small).forward)
    small.forward = MethodType(copied, small)


def is_indexed(dataset: Any) -> bool:
    """Rows can be picked: not a stream, and not None."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def some_rows(dataset: Any, num_rows: int | None, vocabulary: int) -> Any:
    """The first `num_rows` rows that are short enough for logits of eight of them; of a stream, its first rows."""
    if num_rows is None:
        return dataset
    if not is_indexed(dataset):
        return list(itertools.islice(iter(dataset), num_rows))
    if num_rows >= len(dataset):
        return dataset
    lengths = [_length(dataset[i]) for i in range(min(len(dataset), LOOKED_AT))]
    picks = [i for i, n in enumerate(lengths) if n * vocabulary * 8 <= ELEMENTS][:num_rows]
    if len(picks) < num_rows:
        picks = sorted(sorted(range(len(lengths)), key=lambda i: lengths[i])[:num_rows])
    return dataset.select(picks) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, picks)


def _length(row: Any) -> int:
    return len(row["input_ids"]) if isinstance(row, dict) and "input_ids" in row else 0
