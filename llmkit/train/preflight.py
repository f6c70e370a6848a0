"""A pretraining recipe as a subject of the checks: our own loop, handed over like anyone's trainer.

Owns `PretrainTraining`, which runs the real `fit` for a few steps in a folder of its own.

    subject = get_subject(config, tier=2)      # llmkit check recipe.yaml
"""

import contextlib
import copy
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig

from ..check.attach import builder
from ..check.subject import LabelledRow, NotApplicable, Schedule, Step, Subject, Trace
from ..config import UserError
from ..data.loader import IGNORE, Loader, Rows
from ..data.sources import eval_shard_names, parse_sources
from ..evaluate.perplexity import score_rows, token_losses
from ..hardware import Device
from ..run import Run, check_output_dir, quiet_libraries, resolve_model_dir
from ..verbs import PretrainConfig
from .build import (
    Job,
    check_config,
    check_vocabulary,
    flops_per_token,
    folders,
    fresh_config,
    get_model,
    get_rows,
    get_tokenizer,
    identity,
)
from .checkpoint import find_checkpoint, load_weights
from .engines import check_engine, engine_kind, start_accelerator, start_engine
from .optim import build_optimizer, lr_factor, planned_rates
from .overfit import for_overfit
from .pretrain import _isolate, fit


def get_subject(config: PretrainConfig, tier: int, is_data_only: bool = False, is_start: bool = False) -> Subject:
    """Tokenizer and config for tier 0, data and model from tier 1. Raises UserError as `pretrain` itself would.

    `is_data_only`: what a run would read, without a model. `is_start`: the run starts next, output_dir must be free.
    """
    check_config(config)
    config = for_overfit(config)
    check_engine(engine_kind(), config)
    quiet_libraries()
    if is_start and not config.resume_from_checkpoint:
        check_output_dir(Path(config.output_dir))
    sources = parse_sources(config.datasets, "datasets")
    eval_sources = parse_sources(config.eval_datasets, "eval_datasets")
    eval_shard_names(eval_sources)
    tokenizer = get_tokenizer(config, sources, *folders(config))
    subject = Subject(
        target=config.model_name_or_path or config.model_type,
        tokenizer=tokenizer,
        settings=dataclasses.asdict(config),
        is_scratch=config.model_name_or_path is None,
        trust_remote_code=config.trust_remote_code,
        make_model=builder(config.trust_remote_code),
    )
    if config.model_name_or_path:
        path = resolve_model_dir(config.model_name_or_path)
        subject.folder = Path(path) if Path(path).is_dir() else None
    if tier == 0:
        subject.config = _config(config, tokenizer)
        text_config = subject.config.get_text_config()
        check_vocabulary(getattr(text_config, "vocab_size", len(tokenizer)), tokenizer)
        return subject
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    if not is_data_only:
        subject.model = get_model(config, tokenizer)
        subject.config = subject.model.config
    console = Console(stderr=True, quiet=not (is_data_only and sys.stderr.isatty()))
    train_rows, shards = get_rows(config, sources, eval_sources, tokenizer, console)
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows_per_step *= config.num_processes or 1
    fractions: Any = [source.fraction for source in sources] if sources[0].fraction else None
    loader = Loader(train_rows, rows_per_step, config.seed if config.data_seed is None else config.data_seed, fractions)
    subject.training = PretrainTraining(config, tokenizer, loader, shards, fractions)
    return subject


def _config(config: PretrainConfig, tokenizer: Any) -> Any:
    if not config.model_name_or_path:
        return fresh_config(config, tokenizer)
    path = resolve_model_dir(config.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_name_or_path={path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None


class PretrainTraining:
    """See `check.subject.Training`. Batches hold shift_labels, which the loss reads, and labels for the checks."""

    def __init__(self, config: PretrainConfig, tokenizer: Any, loader: Loader, shards: dict[str, Rows], fractions: Any):
        self.config, self.tokenizer, self.loader, self.shards = config, tokenizer, loader, shards
        self.fractions = fractions
        self.settings = dataclasses.asdict(config)

    def _rows(self, count: int) -> dict[str, Tensor]:
        """The first rows of training, in the order of training."""
        steps = range(-(-count // self.loader.rows_per_step))
        batches = [self.loader.batch(step) for step in steps]
        return {key: torch.cat([batch[key] for batch in batches])[:count] for key in batches[0]}

    def batches_from(self, step: int) -> Iterator[dict[str, Tensor]]:
        """Global batches from an optimiser step on, as many as an epoch has; position_ids where the model gets them."""
        if not 0 <= step < self.num_steps():
            raise UserError(f"step={step}; allowed: 0 to {self.num_steps() - 1}, the steps of this recipe")
        kept = {"input_ids", "shift_labels", *(["position_ids"] if _isolate(self.config) else [])}
        for at in range(step, step + -(-self.loader.num_rows // self.loader.rows_per_step)):
            yield {key: value for key, value in self.loader.batch(at).items() if key in kept}

    def labelled_rows(self, count: int) -> list[LabelledRow]:
        rows, batch = [], self._rows(count)
        for index in range(len(batch["input_ids"])):
            ids, labels = batch["input_ids"][index].tolist(), batch["shift_labels"][index].tolist()
            ids, labels = [*ids, labels[-1]], [IGNORE, *labels]
            while len(labels) > 1 and labels[-1] == IGNORE:  # padding, or a BOS whose document goes on elsewhere
                ids.pop(), labels.pop()
            rows.append(LabelledRow(index, ids, labels))
        return rows

    def batches(self, num_batches: int, batch_size: int, ragged: bool = False) -> list[dict[str, Any]]:
        rows = self._rows(num_batches * batch_size)
        rows["shift_labels"][:, -1] = IGNORE  # that token is not among input_ids, so `labels` could not name it
        first = torch.full_like(rows["input_ids"][:, :1], IGNORE)
        rows["labels"] = torch.cat([first, rows["shift_labels"][:, :-1]], 1)
        if ragged:  # our rows are full: some end sooner here, in padding
            pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
            for i in range(len(rows["labels"])):
                keep = rows["labels"].shape[1] * (i + 1) // len(rows["labels"])
                rows["labels"][i, keep:] = rows["shift_labels"][i, keep - 1 :] = IGNORE
                rows["input_ids"][i, keep:] = pad
        parts = {key: value.split(batch_size) for key, value in rows.items()}
        return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]

    def backward(self, model: nn.Module, micro_batches: list[dict[str, Any]]) -> float:
        model.zero_grad(set_to_none=True)
        model.train()
        total, num_tokens = 0.0, sum(int((batch["shift_labels"] != IGNORE).sum()) for batch in micro_batches)
        for batch in micro_batches:
            loss = token_losses(model, batch, _isolate(self.config)).sum() / num_tokens
            loss.backward()
            total += float(loss.detach())
        return total

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, self.config)

    def num_steps(self) -> int:
        c, rows = self.config, self.loader.rows_per_step
        return c.max_steps or max(1, -(-int(c.num_train_epochs * self.loader.num_rows) // rows))

    def schedule_of(self, model: nn.Module) -> Schedule:
        return Schedule(self.config.lr_scheduler_type, has_planned_peak=True, is_cyclic=False)

    def learning_rates(self, model: nn.Module, num_steps: int | None = None) -> list[float]:
        total = num_steps or self.num_steps()
        return [self.config.learning_rate * lr_factor(step, self.config, total) for step in range(total)]

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
        """`fit` itself. Order is a function of (seed, step), so `num_rows` changes nothing that could be seen."""
        known = {field.name for field in dataclasses.fields(self.config)}
        place = folder / f"run{len(list(folder.glob('run*')))}"  # a run that goes on branches off
        config = dataclasses.replace(
            self.config, output_dir=str(place), max_steps=num_steps, save_steps=stop_at, save_total_limit=None,
            eval_steps=None, eval_on_start=False, sample_prompts=[], ngram_order=None, logging_steps=1,
            report_to="none", torch_compile=False, resume_from_checkpoint=None, use_cpu=True, bf16=False,
        )  # fmt: skip
        config = dataclasses.replace(config, **{k: v for k, v in (settings or {}).items() if k in known})
        trace, loader = Trace(), copy.copy(self.loader)
        loader.rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        console, device = Console(quiet=True), Device("cpu", "", False, torch.get_num_threads(), None)
        model.zero_grad(set_to_none=True)
        checkpoint = None
        if resume_from is not None:
            checkpoint = find_checkpoint(place, str(resume_from), lambda line: None)
            assert checkpoint is not None, "a named checkpoint is found, or raises"
            model = load_weights(model, checkpoint)
        accelerator = start_accelerator("single", device, config)
        same = identity(config, model, self.tokenizer, loader, self.fractions)
        run = Run.start(place, "pretrain", config, {})
        engine = start_engine(accelerator, "single", model, config, False)
        flops = flops_per_token(model, config.max_length)
        job = Job(
            config, device, engine, console, run, self.tokenizer, loader, {}, num_steps, flops, True, same,
            time.perf_counter(),
        )  # fmt: skip
        batch, step = loader.batch, engine.step
        ids: list[list[int]] = []
        peak = max(planned_rates(engine.optimizer, config, 1.0))

        def recorded_batch(at: int, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
            rows = batch(at, rank, world_size)
            ids[:] = rows["input_ids"].tolist()
            return rows

        def recorded_step(judge: Any) -> None:
            share = max(group["lr"] for group in engine.optimizer.param_groups) / peak  # Muon has a rate of its own
            if not trace.first_weights:
                trace.first_weights, trace.first_optimizer = _copies(model), {"state": engine.get_state()}
            for name, p in model.named_parameters():
                largest = float(p.grad.abs().max()) if p.grad is not None and p.grad.numel() else 0.0
                trace.gradients[name] = max(trace.gradients.get(name, 0.0), largest)

            def judged(norm: Tensor) -> Tensor:  # clipped by now
                clipped = [p.grad.norm() for p in engine.trainable if p.grad is not None]
                trace.norms.append((float(norm), float(torch.stack(clipped).norm())))
                return judge(norm)

            step(judged)
            trace.steps.append(Step(list(ids), share * config.learning_rate, 0.0))
            if len(trace.steps) == stop_at:
                trace.weights, trace.optimizer = _copies(model), {"state": engine.get_state()}

        loader.batch = recorded_batch  # type: ignore[method-assign, assignment]
        engine.step = recorded_step  # type: ignore[method-assign]
        fit(job, checkpoint)
        _read_losses(place, trace)
        if stop_at is None:
            trace.weights, trace.optimizer = _copies(model), {"state": engine.get_state()}
        trace.checkpoints = {int(path.name.split("-")[1]): path for path in (place / "checkpoints").glob("step-*")}
        trace.steps = trace.steps[:stop_at]  # `fit` ran to its end; what comes later is not looked at
        return trace

    def evaluate(
        self, model: nn.Module, batch_size: int, num_rows: int, batches: list[tuple[float, int, int]] | None = None
    ) -> dict[str, float]:
        if not self.shards:
            raise NotApplicable("no eval_datasets given")
        name, rows = next(iter(self.shards.items()))
        eos, isolate = self.tokenizer.eos_token_id, _isolate(self.config)
        score = score_rows(model, rows.first(num_rows), batch_size, eos, isolate=isolate)
        if batches is not None:
            batches.append((score.loss, score.num_tokens, score.num_tokens))
        return {f"eval_{name}_loss": score.loss}

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        yield  # nothing of it is ever written to


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _read_losses(folder: Path, trace: Trace) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for step, row in zip(trace.steps, [row for row in rows if "loss" in row], strict=True):
        step.loss = row["loss"]
