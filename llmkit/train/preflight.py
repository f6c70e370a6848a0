"""A pretraining recipe as a subject of the checks: our own loop, handed over like anyone's trainer.

Owns `PretrainTraining`, which runs the real `fit` for a few steps in a folder of its own.

    subject = get_subject(config, tier=2)      # llmkit check recipe.yaml
"""

import contextlib
import copy
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig

from ..check.attach import builder
from ..check.subject import LabelledRow, NotApplicable, Step, Subject, Trace
from ..config import PretrainConfig, UserError
from ..data.loader import IGNORE, Loader, Rows
from ..data.sources import parse_sources
from ..data.tokenizer import bos_id
from ..evaluate.perplexity import score_rows, token_losses
from ..hardware import Device
from ..run import Run, check_output_dir, quiet_libraries, resolve_model_dir
from .build import (
    Job,
    check_config,
    eval_shard_names,
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
from .optim import build_optimizer, lr_factor
from .pretrain import _isolate, fit


def get_subject(config: PretrainConfig, tier: int) -> Subject:
    """Tokenizer and config for tier 0, data and model from tier 1. Raises UserError as `pretrain` itself would."""
    check_config(config)
    check_engine(engine_kind(), config)
    quiet_libraries()
    if not config.resume_from_checkpoint:
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
        return subject
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    subject.model = get_model(config, tokenizer)
    subject.config = subject.model.config
    train_rows, shards = get_rows(config, sources, eval_sources, tokenizer, Console(quiet=True))
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
        self.settings = dataclasses.asdict(config) | {"packing": True}

    def _rows(self, count: int) -> dict[str, Tensor]:
        """The first rows of training, in the order of training."""
        steps = range(-(-count // self.loader.rows_per_step))
        batches = [self.loader.batch(step) for step in steps]
        return {key: torch.cat([batch[key] for batch in batches])[:count] for key in batches[0]}

    def labelled_rows(self, count: int) -> list[LabelledRow]:
        rows, batch, bos = [], self._rows(count), bos_id(self.tokenizer)
        for index in range(len(batch["input_ids"])):
            ids, labels = batch["input_ids"][index].tolist(), batch["shift_labels"][index].tolist()
            last = labels[-1] if labels[-1] != IGNORE else bos
            rows.append(LabelledRow(index, [*ids, last], [IGNORE, *labels]))
        return rows

    def batches(self, num_batches: int, batch_size: int, ragged: bool = False) -> list[dict[str, Any]]:
        rows = self._rows(num_batches * batch_size)
        rows["shift_labels"][:, -1] = IGNORE  # that token is not among input_ids, so `labels` could not name it
        first = torch.full_like(rows["input_ids"][:, :1], IGNORE)
        rows["labels"] = torch.cat([first, rows["shift_labels"][:, :-1]], 1)
        if ragged:  # our rows are full: the labels of some are taken away from the right
            for i in range(len(rows["labels"])):
                keep = rows["labels"].shape[1] * (i + 1) // len(rows["labels"])
                rows["labels"][i, keep:] = rows["shift_labels"][i, keep - 1 :] = IGNORE
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

    def learning_rates(self, model: nn.Module) -> list[float]:
        total = self.num_steps()
        return [self.config.learning_rate * lr_factor(step, self.config, total) for step in range(total)]

    def run(
        self,
        model: nn.Module,
        folder: Path,
        num_steps: int,
        stop_at: int | None = None,
        resume_from: Path | None = None,
        num_rows: int | None = None,
    ) -> Trace:
        """`fit` itself. Order is a function of (seed, step), so `num_rows` changes nothing that could be seen."""
        config = dataclasses.replace(
            self.config, output_dir=str(folder), max_steps=num_steps, save_steps=stop_at, save_total_limit=None,
            eval_steps=None, eval_on_start=False, sample_prompts=[], ngram_order=None, logging_steps=1,
            report_to="none", torch_compile=False, resume_from_checkpoint=None, use_cpu=True, bf16=False,
        )  # fmt: skip
        trace, loader = Trace(), copy.copy(self.loader)
        console, device = Console(quiet=True), Device("cpu", "", False, torch.get_num_threads(), None)
        model.zero_grad(set_to_none=True)
        checkpoint = None
        if resume_from is not None:
            checkpoint = find_checkpoint(folder, str(resume_from), lambda line: None)
            model = load_weights(model, checkpoint) if checkpoint else model
        accelerator = start_accelerator("single", device, config)
        same = identity(config, model, self.tokenizer, loader, self.fractions)
        run = Run.start(folder, "pretrain", config, {})
        engine = start_engine(accelerator, "single", model, config, False)
        flops = flops_per_token(model, config.max_length)
        job = Job(
            config, device, engine, console, run, self.tokenizer, loader, {}, num_steps, flops, True, same,
            time.perf_counter(),
        )  # fmt: skip
        batch, step = loader.batch, engine.step
        ids: list[list[int]] = []

        def recorded_batch(at: int, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
            rows = batch(at, rank, world_size)
            ids[:] = rows["input_ids"].tolist()
            return rows

        def recorded_step(judge: Any) -> None:
            rate = max(group["lr"] for group in engine.optimizer.param_groups)
            step(judge)
            trace.steps.append(Step(list(ids), rate, 0.0))

        loader.batch = recorded_batch  # type: ignore[method-assign, assignment]
        engine.step = recorded_step  # type: ignore[method-assign]
        fit(job, checkpoint)
        _read_losses(folder, trace)
        trace.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        trace.optimizer = {"state": engine.get_state()}
        trace.checkpoints = {int(path.name.split("-")[1]): path for path in (folder / "checkpoints").glob("step-*")}
        if stop_at:
            trace.steps = trace.steps[:stop_at]
        return trace

    def evaluate(self, model: nn.Module, batch_size: int, num_rows: int) -> dict[str, float]:
        if not self.shards:
            raise NotApplicable("no eval_datasets given")
        name, rows = next(iter(self.shards.items()))
        eos, isolate = self.tokenizer.eos_token_id, _isolate(self.config)
        return {f"eval_{name}_loss": score_rows(model, _first(rows, num_rows), batch_size, eos, isolate=isolate).loss}

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        yield  # nothing of it is ever written to


def _read_losses(folder: Path, trace: Trace) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for step, row in zip(trace.steps, [row for row in rows if "loss" in row], strict=True):
        step.loss = row["loss"]


def _first(rows: Rows, count: int) -> Rows:
    """The first rows of a shard only."""
    few = copy.copy(rows)
    if rows.plan is not None:
        few.plan = dataclasses.replace(rows.plan, rows=rows.plan.rows[: count + 1])
    else:
        few.store = dataclasses.replace(rows.store, tokens=rows.store.tokens[: count * rows.context + 1])
    return few
