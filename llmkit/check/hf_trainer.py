"""A transformers Trainer (TRL's and the user's own subclasses included) behind the `Training` of `subject.py`.

Owns making batches, losses, optimisers and short runs with the trainer's own methods, and undoing what that left.

    training = HFTraining(trainer); training.backward(model, training.batches(1, 8))

Uses the overridable methods (`get_batch_samples`, `training_step`, `create_optimizer`, `train`, `evaluate`) and never
copies what they do: whatever a subclass changed is what runs.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .forward import text_config
from .live import (
    ELEMENTS,
    LOOKED_AT,
    generators_restored,
    gradient_norm,
    is_indexed,
    optimizer_restored,
    own_objects,
    patch_forward_as,
    some_rows,
)
from .subject import (
    LabelledRow,
    NotApplicable,
    NotRun,
    Schedule,
    Step,
    Trace,
    attributes_restored,
    contents_restored,
)

RAW_COLUMNS = ("messages", "prompt", "completion", "text", "chosen", "rejected", "conversations")


def settings_of(args: Any) -> dict[str, Any]:
    """TrainingArguments and its descendants as plain values."""
    return {name: getattr(value, "value", value) for name, value in vars(args).items() if not name.startswith("_")}


def clone(batch: Any) -> Any:
    """Losses may pop keys of a batch or write into it."""
    if not hasattr(batch, "items"):
        return copy.deepcopy(batch)
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in batch.items()}


def _raw(given: Any) -> dict[str, Any]:
    """What is left of the raw row beside its tokens; `llmkit sft` keeps it as JSON."""
    if not isinstance(given, dict):
        return {}
    return json.loads(given["raw"]) if "raw" in given else {k: given[k] for k in RAW_COLUMNS if k in given}


class HFTraining:
    """See `Training`."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.settings = settings_of(trainer.args)

    # what it trains on

    def _dataset(self) -> Any:
        dataset = self.trainer.train_dataset
        if dataset is None:
            raise NotApplicable("the trainer has no train_dataset")
        if not is_indexed(dataset):
            raise NotRun("the train_dataset is a stream without length: its rows cannot be picked")
        if len(dataset) == 0:
            raise NotRun("the train_dataset holds no row")
        return dataset

    def _collate(self, indices: list[int]) -> dict[str, Any]:
        trainer, dataset = self.trainer, self._dataset()
        collate = trainer.data_collator
        try:
            import datasets

            is_table = isinstance(dataset, datasets.Dataset)
        except ImportError:
            is_table = False
        if is_table:
            dataset = trainer._remove_unused_columns(dataset, description="training")
        else:
            collate = trainer._get_collator_with_removed_columns(collate, description="training")
        return collate([dataset[i] for i in indices])

    def batches_from(self, step: int) -> Iterator[Any]:
        """What `train()` is fed from an optimiser step on, up to the end of the epoch, in its order."""
        self._need_one_process()
        with self.unchanged():
            first = step * self.trainer.args.gradient_accumulation_steps
            yield from itertools.islice(iter(self.trainer.get_train_dataloader()), first, None)

    @property
    def has_own_loader(self) -> bool:
        """The user wrote `get_train_dataloader`, or the data set is a stream: rows come from the loader only."""
        module = type(self.trainer).get_train_dataloader.__module__
        return not module.startswith(("transformers.", "trl.")) or not is_indexed(self.trainer.train_dataset)

    @property
    def order_lost_by_design(self) -> str | None:
        """A sampler of transformers' own that takes the order of an epoch from the global random state: its name."""
        names = ("get_train_dataloader", "_get_dataloader", "_get_train_sampler", "train")
        if not self._is_stock(names):
            return None
        strategy = str(getattr(self.trainer.args, "train_sampling_strategy", "random"))
        if strategy == "group_by_length":
            return f"train_sampling_strategy={strategy}"
        is_seedable = getattr(self.trainer.args.accelerator_config, "use_seedable_sampler", True)
        return None if is_seedable else "use_seedable_sampler=False"

    @property
    def has_stock_checkpoints(self) -> bool:
        """Nobody overrode how checkpoints are written and read."""
        return self._is_stock(("_save_checkpoint", "save_model", "_save", "_load_from_checkpoint", "train"))

    def _is_stock(self, names: tuple[str, ...]) -> bool:
        trainer = self.trainer
        modules = [(getattr(type(trainer), name).__module__ or "").split(".")[0] for name in names]
        return not any(name in vars(trainer) for name in names) and set(modules) <= {"transformers", "trl"}

    def labelled_rows(self, count: int) -> list[LabelledRow]:
        if self.has_own_loader:
            return self._rows_of_loader(count)
        rows, dataset = [], self._dataset()
        for index in range(min(count, len(dataset))):
            batch, given = self._collate([index]), dataset[index]
            rows += _unpadded(batch, [index], _raw(given) or None)
        return rows

    def _rows_of_loader(self, count: int) -> list[LabelledRow]:
        rows: list[LabelledRow] = []
        for batch in self.trainer.get_train_dataloader():
            rows += _unpadded(batch, list(range(len(rows), len(rows) + len(batch["input_ids"]))), None)
            if len(rows) >= count:
                break
        return rows[:count]

    @functools.cached_property
    def _lengths(self) -> list[tuple[int, int, int]]:
        """(tokens, trained ones, index) of the first rows, each collated alone; the shortest first."""
        lengths = []
        for i in range(min(len(self._dataset()), LOOKED_AT)):
            batch = _labelled(self._collate([i]))
            lengths.append((batch["input_ids"].numel(), int((batch["labels"] != -100).sum()), i))
        return sorted(lengths)

    def _choose(self, count: int, ragged: bool) -> list[int]:
        """Rows of few tokens; ragged: as different in length as possible among these."""
        lengths = self._lengths
        vocabulary = self._vocabulary()
        short = [(trained, i) for n, trained, i in lengths if trained and n * vocabulary * 8 <= ELEMENTS] or [
            (trained, i) for n, trained, i in lengths[:count] if trained
        ]
        if not short:
            raise NotRun(f"none of the first {len(lengths)} rows trains a token")
        if ragged:
            short.sort()
            picks = [round(k * (len(short) - 1) / max(count - 1, 1)) for k in range(count)]
        else:
            picks = [k % len(short) for k in range(count)]
        return [short[k][1] for k in picks]

    def batches(self, num_batches: int, batch_size: int, ragged: bool = False) -> list[dict[str, Any]]:
        indices = self._choose(num_batches * batch_size, ragged)
        return [self._collate(indices[b : b + batch_size]) for b in range(0, len(indices), batch_size)]

    # what it does with them

    def backward(self, model: nn.Module, micro_batches: list[dict[str, Any]]) -> float:
        self._need_one_process()
        trainer, total = self.trainer, 0.0
        with self.unchanged():
            patch_forward_as(trainer.model, model)
            trainer.args.gradient_accumulation_steps = len(micro_batches)
            model.zero_grad(set_to_none=True)
            device = next(model.parameters()).device
            batches = [
                {k: v.to(device) if isinstance(v, Tensor) else v for k, v in clone(b).items()} for b in micro_batches
            ]
            samples, num_items = trainer.get_batch_samples(iter(batches), len(batches), device)
            trainer.current_gradient_accumulation_steps = len(samples)
            for batch in samples:
                total += float(trainer.training_step(model, batch, num_items))
        return total

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The trainer's own where it belongs to `model`: handed to the constructor, or left by an earlier `train()`."""
        trainer = self.trainer
        if trainer.optimizer is not None and model is trainer.model:
            return getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        with self.unchanged():
            trainer.model, trainer.optimizer = model, None
            trainer.create_optimizer()
            return trainer.optimizer

    def num_steps(self) -> int:
        """Planned optimiser steps."""
        args = self.trainer.args
        if args.max_steps > 0:
            return args.max_steps
        batches = len(self.trainer.get_train_dataloader())
        return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))

    @property
    def was_given_scheduler(self) -> bool:
        """A scheduler was handed to the constructor."""
        return self.trainer.lr_scheduler is not None and not self.trainer._created_lr_scheduler

    def make_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """The trainer's schedule over `num_steps`; use it inside `unchanged`."""
        trainer = self.trainer
        if self.was_given_scheduler:
            return trainer.lr_scheduler
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        trainer.optimizer, trainer.lr_scheduler = optimizer, None
        return trainer.create_scheduler(num_training_steps=num_steps, optimizer=optimizer)

    def learning_rates(self, model: nn.Module, num_steps: int | None = None) -> list[float]:
        optimizer, rates = self.make_optimizer(model), []
        with self.unchanged(), optimizer_restored(optimizer):
            self.trainer.model = model
            if num_steps:
                self.trainer.args.max_steps = num_steps
            total = self.num_steps()
            scheduler = self.make_scheduler(optimizer, total)
            if any(group["lr"] is None for group in optimizer.param_groups):
                raise NotApplicable("the optimiser sets its rates itself")
            if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) or _follows_metric(scheduler):
                raise NotApplicable(f"{type(scheduler).__name__} follows the evaluations")
            for _ in range(total):
                rates.append(max(group["lr"] for group in optimizer.param_groups))
                optimizer._opt_called = True  # type: ignore[attr-defined]  # nothing is stepped, which it would warn of
                scheduler.step()
        return rates

    def schedule_of(self, model: nn.Module) -> Schedule:
        optimizer, args = self.make_optimizer(model), self.trainer.args
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        with self.unchanged(), optimizer_restored(optimizer):
            self.trainer.model = model
            scheduler = self.make_scheduler(optimizer, self.num_steps())
            functions = [getattr(f, "func", f) for f in getattr(scheduler, "lr_lambdas", None) or [None]]
        is_stock = all((getattr(f, "__module__", None) or "").startswith("transformers.") for f in functions)
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        is_cyclic = any(word in type(scheduler).__name__ for word in ("Cyclic", "Restarts"))
        return Schedule(name if is_stock else None, max(rates) == args.learning_rate, is_cyclic)

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
        """As in a new process: an optimiser without moments. `settings`: TrainingArguments that are to be others."""
        from transformers import TrainerControl, TrainerState
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

        self._need_one_process()
        trainer, trace = self.trainer, Trace()
        with self.unchanged():
            args = trainer.args
            for name, value in {**_shortened(num_steps, folder), **(settings or {})}.items():
                setattr(args, name, value)
            self._use(model)
            trainer.train_dataset = some_rows(trainer.train_dataset, num_rows, self._vocabulary())
            trainer._train_batch_size = args.train_batch_size
            trainer.eval_dataset = None
            recorder = _recorder(trainer, trace, stop_at or num_steps)
            flow = [DefaultFlowCallback(), recorder]
            trainer.callback_handler = CallbackHandler(flow, model, trainer.processing_class, trainer.optimizer, None)
            trainer.state, trainer.control = TrainerState(), TrainerControl()
            step, clip = trainer.training_step, trainer._clip_grad_norm

            def recorded_step(model: nn.Module, inputs: Any, *rest: Any, **kwargs: Any) -> Tensor:
                if not hasattr(inputs, "keys") or "input_ids" not in inputs:
                    raise NotApplicable("its batches hold no input_ids: not a language-modelling trainer")
                recorder.ids += inputs["input_ids"].tolist()
                loss = step(model, inputs, *rest, **kwargs)
                recorder.loss += float(loss)
                return loss

            def recorded_clip(*given: Any, **kwargs: Any) -> Any:
                recorder.norm = gradient_norm(trainer)
                return clip(*given, **kwargs)

            trainer.training_step, trainer._clip_grad_norm = recorded_step, recorded_clip
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            trace.weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
            trace.optimizer = copy.deepcopy(trainer.optimizer.state_dict())
        trace.checkpoints = {int(p.name.split("-")[1]): p for p in folder.glob("checkpoint-*")}
        if not trace.steps:
            raise NotRun("train() ended without an optimiser step that its callbacks were told of")
        return trace

    def _vocabulary(self) -> int:
        return int(getattr(text_config(self.trainer.model), "vocab_size", 50_000))

    def _use(self, model: nn.Module) -> None:
        """Makes `model` the trainer's, as a fresh process would: inside `unchanged` only."""
        trainer = self.trainer
        patch_forward_as(trainer.model, model)
        optimizer, given = getattr(trainer.optimizer, "optimizer", trainer.optimizer), self.was_given_scheduler
        if model is not trainer.model:  # theirs are the live model's
            optimizer, given = None, False
        trainer.model = trainer.model_wrapped = model
        if optimizer is not None:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] if given else group.get("initial_lr", group["lr"])
        trainer.optimizer = optimizer
        if not given:
            trainer.lr_scheduler = None

    def evaluate(
        self, model: nn.Module, batch_size: int, num_rows: int, batches: list[tuple[float, int, int]] | None = None
    ) -> dict[str, float]:
        from transformers.trainer_callback import CallbackHandler

        self._need_one_process()
        trainer = self.trainer
        with self.unchanged():
            dataset = trainer.eval_dataset
            if isinstance(dataset, dict):
                dataset = next(iter(dataset.values()))
            if dataset is None:
                raise NotApplicable("the trainer has no eval_dataset")
            trainer.eval_dataset = some_rows(dataset, num_rows, self._vocabulary())
            trainer.args.per_device_eval_batch_size = batch_size
            trainer.args.report_to, trainer.args.disable_tqdm = [], True
            patch_forward_as(trainer.model, model)
            trainer.model = trainer.model_wrapped = model
            trainer.callback_handler = CallbackHandler([], model, trainer.processing_class, None, None)
            predict = trainer.prediction_step

            def recorded(model: nn.Module, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
                labels = inputs.get("labels") if hasattr(inputs, "get") else None
                is_trained = labels != -100 if isinstance(labels, Tensor) else torch.zeros(0)
                counts = int(is_trained[..., 1:].sum()), int(is_trained.sum())
                output = predict(model, inputs, *rest, **kwargs)
                if batches is not None and output[0] is not None:
                    batches.append((float(output[0].mean()), *counts))
                return output

            trainer.prediction_step = recorded
            metrics = trainer.evaluate()
            logged = trainer.state.log_history[-1:] or [{}]  # where a `log` of the user's adds to it
            return {k: float(v) for k, v in {**logged[0], **metrics}.items() if isinstance(v, (int, float))}

    def save(self, model: nn.Module, folder: Path) -> None:
        """What the trainer writes at the end of a run."""
        self._need_one_process()
        trainer = self.trainer
        with self.unchanged():
            trainer.model = trainer.model_wrapped = model
            trainer.args.output_dir, trainer.args.push_to_hub = str(folder), False
            trainer.save_model(str(folder))

    def _need_one_process(self) -> None:
        if self.trainer.args.world_size > 1:
            raise NotRun(f"{self.trainer.args.world_size} processes: run the check with one")

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        trainer = self.trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        held = [trainer, trainer.accelerator, trainer.state, trainer.control, *own_objects(trainer)]
        from accelerate.state import GradientState

        shared = GradientState._shared_state
        with contextlib.ExitStack() as stack:
            stack.enter_context(generators_restored(held))
            stack.enter_context(attributes_restored(*held))
            stack.enter_context(contents_restored(shared))
            if optimizer is not None:
                stack.enter_context(optimizer_restored(optimizer))
            trainer.args = copy.copy(trainer.args)
            yield


def _follows_metric(scheduler: Any) -> bool:
    return "metrics" in inspect.signature(scheduler.step).parameters


def _labelled(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch. Raises NotApplicable for one of another kind of trainer."""
    if "input_ids" not in batch or "labels" not in batch:
        raise NotApplicable("the collator makes no input_ids and labels: not a language-modelling trainer")
    return batch


def _unpadded(batch: dict[str, Any], indices: list[int], raw: dict[str, Any] | None) -> list[LabelledRow]:
    rows, mask = [], _labelled(batch).get("attention_mask")
    for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        keep = mask[index].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(ids).bool()
        rows.append(LabelledRow(indices[index], ids[keep].tolist(), labels[keep].tolist(), raw))
    return rows


def _shortened(num_steps: int, folder: Path) -> dict[str, Any]:
    """TrainingArguments of a short run that only saves."""
    return {
        "output_dir": str(folder),
        "max_steps": num_steps,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "save_total_limit": None,
        "save_only_model": False,
        "push_to_hub": False,
        "report_to": [],
        "disable_tqdm": True,
    }


def _recorder(trainer: Any, trace: Trace, stop_at: int) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        """One `Step` per optimiser step; saves and ends at `stop_at`."""

        ids: list[list[int]] = []
        loss = 0.0
        rate = 0.0
        norm: float | None = None  # before clipping

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trace.first_weights = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()}
            trace.first_optimizer = copy.deepcopy(trainer.optimizer.state_dict())

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rate = max(group["lr"] for group in trainer.optimizer.param_groups)
            for name, p in trainer.model.named_parameters():
                size = 0.0 if p.grad is None else float(p.grad.abs().max())
                trace.gradients[name] = max(size, trace.gradients.get(name, 0.0))
            if self.norm is not None:
                trace.norms.append((self.norm, gradient_norm(trainer)))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            trace.steps.append(Step(self.ids, self.rate, self.loss))
            self.ids, self.loss, self.norm = [], 0.0, None
            control.should_log = control.should_evaluate = False
            control.should_save = control.should_training_stop = state.global_step >= stop_at
            return control

    return Recorder()
