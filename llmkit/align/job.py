"""The course of a post-training run, the same for every verb: prepare, start or go on, train, save, say what came out.

Owns the run folder, what must be the same when a run goes on, and result.json; a verb owns `prepare` and `finish`.

    def main(config):
        return run(config, "dpo", prepare)        # prepare(config, console) -> Job

Leaves out rows and trainers (each verb's), what is told while it trains (`watch.py`), the saved folders (`save.py`).
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from ..config import UserError
from ..data.sources import parse_sources
from ..data.tokenizer import fingerprint
from ..evaluate.in_training import TaskScorer
from ..hardware import Device, cpu_seconds, detect, use_threads
from ..report.plots import plot_losses
from ..run import (
    Result,
    Run,
    check_output_dir,
    command_name,
    finished_steps,
    is_main,
    quiet_libraries,
    stop_signals,
)
from ..train.best import Best, check_best
from ..train.build import VOLATILE, flops_per_token
from ..train.checkpoint import Checkpoint, check_same, clear_the_way, find_checkpoint
from ..train.engines import engine_kind
from ..train.watch import start_scorer
from .build import Template, check_config, get_model, get_tokenizer, load_model, trl_arguments
from .lora import is_quantized, train_in_float32
from .rows import Data, Encoder, bad_note, get_data, has_chats
from .save import save_model
from .watch import Watch

Figures = tuple[dict[str, Any], dict[str, Any], str]  # shards and metrics of result.json, and a status


@dataclasses.dataclass
class Job:
    """What a verb has built before the first step."""

    stage: str
    config: Any
    device: Device
    kind: str  # engine
    console: Console
    tokenizer: PreTrainedTokenizerBase
    template: Template
    data: Data
    trainer: Any  # align/trainer.py
    finish: Callable[["Job", Run, bool], Figures]  # (job, run, the weights are those of the best step)
    started: float = 0.0
    scorer: TaskScorer | None = None
    callbacks: list[Any] = dataclasses.field(default_factory=list)  # told before the watch is
    notes: list[str] = dataclasses.field(default_factory=list)  # to be said before the first step
    same: dict[str, Any] = dataclasses.field(default_factory=dict)  # more that must be the same when a run goes on
    load_base: Callable[..., Any] = load_model  # that an adapter is merged into
    until_learnt: float | None = None  # end once at most that share of tokens is wrong

    @property
    def is_overfit(self) -> bool:
        return bool(getattr(self.config, "overfit", None))


def run(config: Any, stage: str, prepare: Callable[[Any, Console, float], Job]) -> Result:
    """Checks the inputs, prepares, trains, writes the run folder. Raises UserError."""
    started = time.perf_counter()
    folder = Path(config.output_dir)
    console = make_console()
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(folder, config.resume_from_checkpoint, console.print)
    goes_on = checkpoint is not None and checkpoint.folder.resolve().parent.parent == folder.resolve()
    if not goes_on:
        check_output_dir(folder)
    job = prepare(config, console, started)
    same = identity(job)
    changed = check_same(checkpoint, same, dataclasses.asdict(config)) if checkpoint else []
    if checkpoint:
        _check_unfinished(folder if goes_on else None, checkpoint.step, num_steps(job.trainer))
    resume_step = checkpoint.step if checkpoint and goes_on else None
    started_run = Run.start(folder, stage, config, facts(job), is_main(), resume_step)
    job.trainer.args.output_dir = str(folder / "checkpoints")
    if started_run.is_main:
        clear_the_way(folder, checkpoint)
        for left in (folder / "checkpoints").glob("checkpoint-*"):  # killed while it was written
            shutil.rmtree(left)
    _announce(job)
    if config.resume_from_checkpoint:
        console.print(f"resume    {checkpoint.folder}, step {checkpoint.step:,}" if checkpoint else "resume    step 0")
        for line in changed:
            console.print(f"changed   {line}", markup=False)
    return fit(job, started_run, same, checkpoint)


def make_console() -> Console:
    console = Console(quiet=not is_main(), highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a log file: room for the table
    return console


# ---- before the first step


@dataclasses.dataclass
class Parts:
    """What every verb needs for its trainer."""

    device: Device
    kind: str  # engine
    args: Any  # of TRL
    tokenizer: PreTrainedTokenizerBase
    template: Template
    data: Data
    model: Any

    def named(self, figures: list[str]) -> list[str]:
        """Figures of every shard."""
        return [f"{name}_{figure}" for name in self.data.shards for figure in figures]


def get_parts(
    config: Any,
    args_class: type,
    make_encoder: Callable[[Any, Any], Encoder],
    sequences_per_row: int = 1,
    load: Callable[..., Any] = load_model,
    **more: Any,
) -> Parts:
    """Arguments, tokenizer, rows and model of a recipe; `more` are arguments of TRL's. Raises UserError."""
    check_config(config)
    quiet_libraries()
    kind, device = engine_kind(), detect(config.use_cpu, config.bf16)
    if kind == "fsdp2" and device.type == "cpu":
        raise UserError("accelerate_config: fsdp2 runs on GPUs only for tuning; use zero2, or cpu for DDP")
    args = trl_arguments(args_class, config, device, kind, **more)  # starts the process group
    sources = parse_sources(config.datasets, "datasets")
    tokenizer, template = get_tokenizer(
        config,
        any(has_chats(source, config, make_encoder.kind) for source in sources),  # type: ignore[attr-defined]
    )
    data = get_data(config, make_encoder(tokenizer, config))
    set_seed(config.seed)
    model, notes = get_model(config, tokenizer, template, device, load)
    data.notes += notes
    with contextlib.suppress(AttributeError, TypeError):  # architectures whose size is not told in the usual fields
        flops = flops_per_token(getattr(model, "base_model", model), config.max_length)
        rows = config.per_device_train_batch_size * sequences_per_row
        device = use_threads(device, flops * rows * _mean_length(data, config) / sequences_per_row)
    return Parts(device, kind, args, tokenizer, template, data, model)


def _mean_length(data: Data, config: Any) -> float:
    """Tokens of a row, all of its sequences together."""
    if getattr(config, "packing", False):
        return float(config.max_length)
    return float(data.facts["train"]["tokens"] / max(1, len(data.train)))


def make_job(
    stage: str,
    config: Any,
    console: Console,
    parts: Parts,
    trainer: Any,
    finish: Any,
    started: float,
    figures: list[str],
) -> Job:
    """`figures`: what an evaluation gives, by name."""
    assert trainer.is_deepspeed_enabled == parts.kind.startswith("zero"), "use_cpu would silently make DDP of DeepSpeed"
    if is_quantized(parts.model):
        train_in_float32(parts.model)
    trainer.remove_callback(PrinterCallback)  # which prints dictionaries
    scorer = start_scorer(config, parts.tokenizer, parts.kind)
    check_best(config, figures + (scorer.figures() if scorer else []), parts.kind in ("zero3", "fsdp2"))
    return Job(
        stage, config, parts.device, parts.kind, console, parts.tokenizer, parts.template, parts.data, trainer, finish,
        started, scorer,
    )  # fmt: skip


def num_steps(trainer: Any) -> int:
    """Planned optimiser steps."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    num_batches = len(trainer.get_train_dataloader())  # of GRPO as many as forward passes
    per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * max(1, per_epoch))


def identity(job: Job) -> dict[str, Any]:
    """What must be the same when a run goes on, by names whose first word says whose it is."""
    config, model = job.config, job.trainer.model
    trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    packing = [getattr(config, key, None) for key in ("packing", "packing_strategy", "max_length")]
    same: dict[str, Any] = {
        "dataset.sha256": job.data.fingerprint,
        "dataset.packing": packing,
        "dataset.seed": [config.seed, config.data_seed],
        "tokenizer": fingerprint(job.tokenizer),
        "template.sha256": job.template.sha256,
        "rows_per_step": config.per_device_train_batch_size * config.gradient_accumulation_steps * world,
        "optimizer.optim": config.optim,
        "model.trainable": sorted(trained.items()),
    }
    base = model.config.to_dict()
    return same | job.same | {f"model.{key}": value for key, value in sorted(base.items()) if key not in VOLATILE}


def facts(job: Job) -> dict[str, Any]:
    """For the manifest: where the model comes from, and what it is trained on."""
    config = job.config
    return {
        "hardware": str(job.device),
        "engine": job.kind,
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "seed": config.seed,
        "data_seed": config.seed if config.data_seed is None else config.data_seed,
        "parent": config.model_name_or_path,
        "tokenizer": fingerprint(job.tokenizer),
        "chat_template": job.template.sha256,
        "documents_open_with_bos": _opens_with_bos(job.tokenizer),
        "quantization": "4bit" if config.load_in_4bit else "8bit" if config.load_in_8bit else None,
        "overfit": getattr(config, "overfit", None),
        "datasets": job.data.facts,
        "eval_shards": {name: {"entropy": None} for name in job.data.shards},
    }


def _opens_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _check_unfinished(folder: Path | None, step: int, max_steps: int) -> None:
    """Raises UserError where nothing is left to do. `folder` of the run that goes on; None when one branches off."""
    done = finished_steps(folder) if folder else step
    if (done or 0) >= max_steps or step > max_steps:
        raise UserError(f"max_steps={max_steps}: step {max(done or 0, step)} is reached already; raise max_steps")


def _announce(job: Job) -> None:
    say, model, args = job.console.print, job.trainer.model, job.trainer.args
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = "4-bit " if job.config.load_in_4bit else "8-bit " if job.config.load_in_8bit else ""
    say(
        f"model     {how}{model.config.model_type}, {total:,} parameters"
        + (f", {trainable:,} trainable" if trainable < total else "")
    )
    if job.template.sha256:
        say(f"template  {job.template.note} ({job.template.sha256[:12]})", markup=False)
    elif job.template.note:
        say(f"tokenizer {job.template.note[2:]}", markup=False)
    for line in [*job.data.notes, *bad_note(job.data), *job.notes]:
        say(line, markup=False)
    told = job.data.facts["train"]
    trained = f", {told['trained_tokens']:,} of them trained" if told["trained_tokens"] else ""
    say(f"tokens    {told['tokens']:,} in {told['rows']:,} rows{trained}")
    rows = len(job.trainer.train_dataset)
    packed = f" ({rows:,} packed)" if getattr(job.config, "packing", False) else ""
    size = args.train_batch_size * args.gradient_accumulation_steps
    at_most = ", at most" if job.is_overfit else ""
    what = "answers" if job.stage == "grpo" else "rows"
    say(f"plan      {num_steps(job.trainer):,} steps of {size} {what} per process{packed}{at_most}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    say(f"machine   {job.device}" + (f", {processes} processes ({job.kind})" if processes > 1 else ""))


# ---- training


def fit(job: Job, run: Run, same: dict[str, Any], checkpoint: Checkpoint | None) -> Result:
    """Trains, then says what came out. A signal saves a checkpoint and ends the run."""
    config, trainer = job.config, job.trainer
    world = int(os.environ.get("WORLD_SIZE", "1"))
    with stop_signals(is_rank=world > 1) as asked:
        best = None
        if config.load_best_model_at_end:
            resume_step = checkpoint.step if checkpoint else None
            best = Best(run.folder, str(config.metric_for_best_model), config.greater_is_better, resume_step)
        watch = Watch(run, job.console, config, same, asked, job.until_learnt, job.scorer, best)
        for callback in job.callbacks:
            callback.begin(job, run, watch)
            trainer.add_callback(callback)
        trainer.add_callback(watch)
        if checkpoint:  # TRL counts tokens from the start of the process
            before = json.loads((checkpoint.folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            trainer._total_train_tokens = next((r["num_tokens"] for r in reversed(before) if "num_tokens" in r), 0)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        except UserError:
            run.finish(result_of(job, run, "failed", {}, {}))
            raise
        finally:
            watch.close()
    if watch.is_stopped:
        step = trainer.state.global_step
        job.console.print(f"stopped   by a signal at step {step:,} of {trainer.state.max_steps:,}, checkpoint saved")
        verb = job.stage
        job.console.print(f"go on     {command_name()} {verb} {run.folder}/recipe.yaml --resume_from_checkpoint true")
        return run.finish(result_of(job, run, "stopped", {}, {}))
    if best:
        _take_best(job, best)
    model_dir = save_model(trainer, job.tokenizer, run, job.console, lambda: job.load_base(config))
    return _finish(job, run, model_dir, best)


def _take_best(job: Job, best: Best) -> None:
    """The best weights of the run in place of the last ones. Every rank calls."""
    trainer, step = job.trainer, job.trainer.state.global_step
    if trainer.eval_dataset and not last_figures(job):
        trainer.evaluate()  # of the last step: it may be the best
    trainer.accelerator.wait_for_everyone()
    best.read(step)  # rank 0 wrote it
    best.restore(trainer.accelerator.unwrap_model(trainer.model))
    trainer.accelerator.wait_for_everyone()
    job.console.print(f"best      step {best.step:,}: {best.metric} {best.value:.4f}")


def last_figures(job: Job) -> dict[str, float]:
    """What the evaluation of the last step gave, `eval_` aside; empty where there was none."""
    state = job.trainer.state
    for row in state.log_history[-2:]:  # the end of training logs a line of its own
        if row.get("step") == state.global_step and all(f"eval_{name}_loss" in row for name in job.data.shards):
            return {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
    return {}


def shard_figures(job: Job, is_best: bool) -> dict[str, float]:
    """Figures of every shard by the weights that are kept, SHARD_FIGURE. Every rank calls."""
    trainer = job.trainer
    if not trainer.eval_dataset:
        return {}
    if is_best:  # the weights are not those of the last step
        return {f"{n}_{k}": v for n, rows in trainer.eval_dataset.items() for k, v in trainer.figures(rows).items()}
    return last_figures(job) or {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}


def _finish(job: Job, run: Run, model_dir: Path, best: Best | None = None) -> Result:
    """Figures of the verb, result.json, where everything lies."""
    shards, metrics, status = job.finish(job, run, best is not None)
    job.trainer.accelerator.wait_for_everyone()
    result = result_of(job, run, status, shards, metrics, model_dir)
    if best:
        result.metrics.update({"best_step": best.step, f"best_{best.metric}": best.value})
    if not run.is_main:
        return result
    run.finish(result)
    if best:
        best.remove()
    say = job.console.print
    say(f"trained   {result.tokens:,} tokens in {result.metrics['train_wall_s']:.0f} s, {result.wall_s:.0f} s in all")
    say(f"model     {model_dir}   curves  {plot_losses(run.folder)}")
    return result


def result_of(
    job: Job, run: Run, status: str, shards: dict[str, Any], metrics: dict[str, Any], model_dir: Path | None = None
) -> Result:
    history = job.trainer.state.log_history
    ended: dict[str, Any] = next((row for row in reversed(history) if "train_runtime" in row), {})
    seen = next((row["num_tokens"] for row in reversed(history) if "num_tokens" in row), 0)
    told: dict[str, Any] = {
        "train_wall_s": round(ended.get("train_runtime", 0.0), 2),
        "steps": job.trainer.state.global_step,
        "num_parameters": sum(p.numel() for p in job.trainer.model.parameters()),
        "num_bad_rows": sum(sum(kinds.values()) for kinds in job.data.facts["bad_rows"].values()),
    }
    return Result(
        stage=job.stage,
        status=status,
        model_dir=str(model_dir or run.model_dir),
        parent=job.config.model_name_or_path,
        wall_s=round(time.perf_counter() - job.started, 2),
        cpu_s=round(cpu_seconds(), 2),
        tokens=int(seen),
        shards=shards,
        metrics=told | metrics,
    )
