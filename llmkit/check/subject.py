"""What is checked: anyone's model, tokenizer, rows and trainer, behind a few names.

Owns borrowing a model (`with subject.small_model() as model`) so that nothing of it has changed afterwards.

    subject = Subject("runs/x", model=model, tokenizer=tokenizer)

Leaves out how a subject is found (`attach.py`) and every check.
"""

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

SMALL = 20_000_000  # parameters up to which a live model is probed itself; larger ones by a shrunk copy of their class
LONG = 1_000  # items of a list up to which what is inside of them is remembered as well
VOCABULARY = 256  # ids of a shrunk model, unless real rows must fit
T = TypeVar("T")


class NotApplicable(Exception):
    """The configuration alone says that this check has nothing to look at."""


class NotRun(Exception):
    """The check applies and could not be made, or could not show its positive control."""


@dataclass
class LabelledRow:
    """One training row as the loss sees it. labels[t] == input_ids[t] where trained; the loss shifts by one."""

    index: int  # in the training set
    input_ids: list[int]
    labels: list[int]  # -100 is ignored
    raw: dict[str, Any] | None = None  # the row it was made from: messages, prompt and completion, or text


@dataclass
class Step:
    """One optimiser step of `Training.run`."""

    ids: list[list[int]]  # input_ids of its rows, padding included, in order
    learning_rate: float
    loss: float


@dataclass
class Trace:
    """What happened in `Training.run`: steps, checkpoints by step, and the weights at the end (copies, on the CPU)."""

    steps: list[Step] = field(default_factory=list)
    checkpoints: dict[int, Path] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)  # its state_dict at the end
    first_weights: dict[str, Tensor] = field(default_factory=dict)  # before the first step, after a resume's loading
    first_optimizer: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)  # the largest |gradient| of each parameter over the steps
    norms: list[tuple[float, float]] = field(default_factory=list)  # of all gradients, before and after clipping


@dataclass
class Schedule:
    """What kind of schedule a trainer follows."""

    kind: str | None  # of transformers' lr_scheduler_type; None: the user's own
    has_planned_peak: bool  # the optimiser was made with the `learning_rate` of the settings
    is_cyclic: bool  # a scheduler class that restarts


class Training(Protocol):
    """A trainer, ours or anyone's, as the checks use it. `model` is always the one to work on: live or shrunk.

    Three methods may be absent: `num_steps()`, the optimiser steps of the whole run; `schedule_of(model) -> Schedule`,
    else the settings are believed; and `save(model, folder)`, what a run writes at its end, else `save_pretrained`.
    """

    settings: dict[str, Any]  # named as in TrainingArguments and SFTConfig

    def labelled_rows(self, count: int) -> list[LabelledRow]: ...

    def batches(self, num_batches: int, batch_size: int, ragged: bool = False) -> list[dict[str, Any]]:
        """Collated batches by the trainer's own collator; ragged: rows of lengths as unlike as the data has them."""
        ...

    def backward(self, model: nn.Module, micro_batches: list[dict[str, Any]]) -> float:
        """What the trainer does for one optimiser step up to the gradients, which are left in `model`; the loss."""
        ...

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer: ...

    def learning_rates(self, model: nn.Module, num_steps: int | None = None) -> list[float]:
        """The rate of every planned optimiser step, or of a run of so many steps."""
        ...

    def run(
        self,
        model: nn.Module,
        folder: Path,
        num_steps: int,
        stop_at: int | None = None,
        resume_from: Path | None = None,
        num_rows: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Trace:
        """Trains for real: `num_steps` is the horizon, `stop_at` saves and ends there, `num_rows` cuts the data set.

        `settings` that are to be others than the trainer's, for this run.
        """
        ...

    def evaluate(
        self, model: nn.Module, batch_size: int, num_rows: int, batches: list[tuple[float, int, int]] | None = None
    ) -> dict[str, float]:
        """The metrics; `batches` receives (loss, targets, labels) of each batch, first labels being no targets."""
        ...

    def unchanged(self) -> contextlib.AbstractContextManager[None]:
        """Restores whatever of the trainer was touched inside."""
        ...


@dataclass
class Subject:
    """Everything that is known; a check that needs a part which is None does not apply."""

    target: str
    model: Any = None  # live, a PreTrainedModel or PeftModel
    config: Any = None  # of the model; None only where there is no model at all
    tokenizer: Any = None
    rows: list[dict[str, Any]] = field(default_factory=list)  # raw training rows, in TRL's columns
    eval_rows: list[dict[str, Any]] = field(default_factory=list)
    training: Any = None  # a Training
    settings: dict[str, Any] = field(default_factory=dict)  # of a trainer or recipe; empty where there is none
    folder: Path | None = None  # of the model, where it was saved
    reference: Path | None = None  # the folder it was made from
    adapter: Path | None = None  # a PEFT adapter folder
    reference_tokenizer: Any = None
    is_chat: bool = False  # the tokenizer's template is in use
    is_scratch: bool = False  # weights that nothing has trained yet
    trust_remote_code: bool = False
    make_model: Callable[[Any], nn.Module] | None = None  # config -> a model of the same class, freshly drawn
    failure: str | None = None  # what the trainer's own constructor raised, where it did
    memory: dict[str, Any] = field(default_factory=dict, repr=False)  # what several checks share, by name
    _shrunk: dict[bool, nn.Module] = field(default_factory=dict, repr=False)

    def need(self, *parts: str) -> None:
        """Raises NotApplicable for the first part that is not there."""
        names = {"rows": "data set", "eval_rows": "evaluation set", "training": "trainer", "config": "model"}
        for part in parts:
            value = self.can_build() if part == "model" else getattr(self, part)
            if value is None or value is False or value == [] or value == {}:
                raise NotApplicable(f"no {names.get(part, part.replace('_', ' '))} given")

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned, or raised, when it was first asked for."""
        if name not in self.memory:
            try:
                self.memory[name] = make()
            except Exception as reason:
                self.memory[name] = reason
        found = self.memory[name]
        if isinstance(found, Exception):
            raise found
        return found

    def can_build(self) -> bool:
        return self.model is not None or (self.config is not None and self.make_model is not None)

    @property
    def is_small(self) -> bool:
        """Whether the live model itself is probed."""
        if self.model is None:
            return False
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters) <= SMALL and all(
            p.is_floating_point() and p.device.type != "meta" for p in parameters
        )

    @contextlib.contextmanager
    def small_model(self, seed: int = 0, keep_vocabulary: bool = False, draw: bool = True) -> Iterator[Any]:
        """The live model where it is small, else a shrunk one of its class: float32, eval, all weights redrawn.

        Dropout is off as long as the caller leaves it in eval mode. Whatever the block does to weights, gradients,
        modes and buffers is undone. `keep_vocabulary`: real ids must fit. `draw=False`: the weights it came with.
        """
        model = self.model if self.is_small else self._shrink(keep_vocabulary)
        with restored(model):
            without_autocast_(model)
            if draw:
                redraw_(model, seed)
            model.eval()
            yield model

    @contextlib.contextmanager
    def small_window(self, seed: int = 0) -> Iterator[Any]:
        """As `small_model`, and never the live one: its class, with a window that a short row goes beyond."""
        model = self._shrink(keep_vocabulary=False)
        with restored(model):
            redraw_(model, seed)
            model.eval()
            yield model

    def _shrink(self, keep_vocabulary: bool) -> nn.Module:
        from .alike import trained_alike
        from .shrink import build_small

        if keep_vocabulary not in self._shrunk:
            self._shrunk[keep_vocabulary] = trained_alike(self.model, build_small(self, keep_vocabulary))
        return self._shrunk[keep_vocabulary]

    def labelled_rows(self, count: int = 200) -> list[LabelledRow]:
        """Training rows as the loss sees them: from the trainer, or made here from the raw rows as TRL's SFT does."""
        if self.training is not None:
            return self.training.labelled_rows(count)
        from .rows import label_rows

        return label_rows(self, count)


def without_autocast_(model: nn.Module) -> None:
    """Takes off the 16-bit forward that accelerate leaves on a model which was trained; `restored` puts it back."""
    held = vars(model)
    if "forward" in held and "_original_forward" in held:
        held["forward"] = held["_original_forward"]


@torch.no_grad()
def redraw_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices N(0, 1/sqrt(fan_in)), vectors 1 + N(0, 0.1); tied weights are drawn once, float32, fresh storage.

    A fresh model has zero output projections, tiny logits and unit norms: most bugs of attention would not show.
    Parameters get new storage, so that `restored` can hand the old one back untouched.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        drawn = noise / max(p.shape[-1], 1) ** 0.5 if p.ndim > 1 else 1 + 0.1 * noise
        p.data = drawn.to(p.device)
    return model


def _contents(value: Any) -> Callable[[], None]:
    """Remembers what a container holds, containers inside included; the function puts it back, in the same objects."""
    if isinstance(value, dict):
        items, inner = dict(value), [_contents(v) for v in value.values()]

        def restore() -> None:
            if len(items) != len(value) or any(k not in value or value[k] is not v for k, v in items.items()):
                value.clear()
                value.update(items)
            for function in inner:
                function()

        return restore
    if isinstance(value, (list, deque)):
        copied = list(value)
        inner = [_contents(v) for v in value] if len(value) <= LONG else []  # rows of a data set, not a trainer's state

        def restore() -> None:
            if len(copied) != len(value) or any(a is not b for a, b in zip(copied, value, strict=True)):
                value.clear()
                value.extend(copied)
            for function in inner:
                function()

        return restore
    return lambda: None


@contextlib.contextmanager
def contents_restored(container: Any) -> Iterator[None]:
    """Afterwards a dict or list holds the same objects as before, and so do the containers in it."""
    restore = _contents(container)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def attributes_restored(*objects: Any) -> Iterator[None]:
    """Afterwards every attribute is the same object as before, and the containers among them hold the same."""
    restores = [(vars(o), dict(vars(o)), [_contents(v) for v in vars(o).values()]) for o in objects]
    try:
        yield
    finally:
        for held, before, contents in restores:
            held.clear()
            held.update(before)
            for function in contents:
                function()


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards parameters (same storage, same bits), buffers, gradients, hooks, modes and configs are as before."""
    parameters = [(p, p.data, p.data.clone(), p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    configs = [c for m in model.modules() for c in (getattr(m, "config", None), getattr(m, "generation_config", None))]
    touched = {id(o): o for o in (*model.modules(), *configs) if hasattr(o, "__dict__")}
    for p, *_ in parameters:
        p.grad = None
    try:
        with attributes_restored(*touched.values()):
            yield
    finally:
        with torch.no_grad():
            for p, data, values, grad, requires_grad in parameters:
                p.data = data
                if not torch.equal(data, values):
                    data.copy_(values)
                p.requires_grad_(requires_grad)
                p.grad = grad
            for buffer, values in buffers:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


DROPOUTS = (
    "attention_dropout",
    "attn_dropout",
    "dropout",
    "dropout_prob",
    "hidden_dropout",
    "resid_pdrop",
    "drop_rate",
)
RATES = ("drop", "jitter", "noise")  # in the names of whatever makes training mode random


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Every dropout rate is 0 inside, also in training mode: of modules, and the numbers that functional calls read."""
    changed: list[tuple[Any, str, float]] = []
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for owner in (*model.modules(), *(c for c in configs.values() if hasattr(c, "__dict__"))):
        is_dropout = isinstance(owner, nn.modules.dropout._DropoutNd)
        for name, rate in list(vars(owner).items()):
            is_rate = (is_dropout and name == "p") or any(word in name.lower() for word in RATES)
            if is_rate and isinstance(rate, float) and 0 < rate <= 1:
                changed.append((owner, name, rate))
                setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, rate in changed:
            setattr(owner, name, rate)


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Python's, numpy's and torch's global generators are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
