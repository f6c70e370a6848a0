"""Instruction tuning of any causal LM: full, LoRA, QLoRA, DoRA, on TRL's SFTTrainer.

Owns the verb, which reads from top to bottom: recipe -> rows -> model -> trainer -> model/ and result.json.

    llmkit sft recipes/toy/sft.yaml --overfit 32

Before the first long run `--overfit N` trains on N rows until they come back word for word: what cannot learn a few
rows by heart learns nothing from many. Leaves out preferences (`dpo`, `kto`, ...) and how good an answer is.
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
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from ..config import UserError
from ..data.sources import parse_sources
from ..data.tokenizer import fingerprint
from ..evaluate.answers import AnswerScore, score_answers
from ..evaluate.in_training import TaskScorer
from ..hardware import Device, cpu_seconds, detect, use_threads
from ..report.console import shard_table
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
from ..train.overfit import LEARNT, for_overfit, verdict
from ..train.watch import start_scorer
from ..verbs import SftConfig
from .build import Template, check_config, get_model, get_tokenizer, load_model, trl_arguments
from .lora import is_quantized, train_in_float32
from .rows import Data, Labeller, PackedCollator, bad_note, get_data, has_chats, pack
from .save import save_model
from .trainer import ByToken
from .watch import Watch


@dataclasses.dataclass
class Job:
    """What the verb has built before the first step."""

    config: SftConfig
    device: Device
    kind: str  # engine
    console: Console
    tokenizer: PreTrainedTokenizerBase
    template: Template
    data: Data
    trainer: Any  # align/trainer.py
    started: float
    scorer: TaskScorer | None = None


def main(config: SftConfig) -> Result:
    """Checks the inputs, prepares rows and model, trains, writes the run folder. Raises UserError."""
    started = time.perf_counter()
    config = for_overfit(config)
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
    run = Run.start(folder, "sft", config, facts(job), is_main(), resume_step)
    job.trainer.args.output_dir = str(folder / "checkpoints")
    if run.is_main:
        clear_the_way(folder, checkpoint)
        for left in (folder / "checkpoints").glob("checkpoint-*"):  # killed while it was written
            shutil.rmtree(left)
    _announce(job)
    if config.resume_from_checkpoint:
        console.print(f"resume    {checkpoint.folder}, step {checkpoint.step:,}" if checkpoint else "resume    step 0")
        for line in changed:
            console.print(f"changed   {line}", markup=False)
    return fit(job, run, same, checkpoint)


def make_console() -> Console:
    console = Console(quiet=not is_main(), highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a log file: room for the table
    return console


def prepare(config: SftConfig, console: Console, started: float = 0.0) -> Job:
    """Rows, tokenizer, model and trainer of a recipe. Raises UserError."""
    check_config(config)
    quiet_libraries()
    kind, device = engine_kind(), detect(config.use_cpu, config.bf16)
    if kind == "fsdp2" and device.type == "cpu":
        raise UserError("accelerate_config: fsdp2 runs on GPUs only for `llmkit sft`; use zero2, or cpu for DDP")
    if config.eval_answers and kind in ("zero3", "fsdp2"):
        raise UserError(f"eval_answers={config.eval_answers}: not under {kind}, where no rank has the whole model")
    from trl import SFTConfig, SFTTrainer

    args = trl_arguments(SFTConfig, config, device, kind)  # starts the process group
    sources = parse_sources(config.datasets, "datasets")
    tokenizer, template = get_tokenizer(config, any(has_chats(source, config) for source in sources))
    data = get_data(config, Labeller(tokenizer, config))
    set_seed(config.seed)
    model, notes = get_model(config, tokenizer, template, device)
    data.notes += notes
    with contextlib.suppress(AttributeError, TypeError):  # architectures whose size is not told in the usual fields
        flops = flops_per_token(getattr(model, "base_model", model), config.max_length)
        device = use_threads(device, flops * config.per_device_train_batch_size * _mean_length(data, config))
    make = pack if config.packing else (lambda rows, config: rows)
    is_apart = config.packing and config.packing_strategy != "wrapped"
    if is_apart and not model.config._attn_implementation.startswith("flash"):
        collator = PackedCollator(tokenizer.pad_token_id)
        args.packing = False  # of TRL, whose packed batches are for flash attention
    else:
        collator = None
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer = type("Trainer", (ByToken, SFTTrainer), {})(
        model=model,
        args=args,
        train_dataset=make(data.train, config),
        eval_dataset={name: make(rows, config) for name, rows in data.shards.items()} or None,
        processing_class=tokenizer,
        data_collator=collator,
    )
    args.packing = config.packing
    assert trainer.is_deepspeed_enabled == kind.startswith("zero"), "use_cpu would silently make DDP of DeepSpeed"
    if is_quantized(model):
        train_in_float32(model)
    for key, value in data.settings.items():  # the rows are labelled already: for whoever reads the settings
        setattr(trainer.args, key, value)
    trainer.remove_callback(PrinterCallback)  # which prints dictionaries
    scorer = start_scorer(config, tokenizer, kind)
    figures = [f"{name}_loss" for name in data.shards] + (scorer.figures() if scorer else [])
    check_best(config, figures, kind in ("zero3", "fsdp2"))
    return Job(config, device, kind, console, tokenizer, template, data, trainer, started, scorer)


def _mean_length(data: Data, config: SftConfig) -> float:
    return config.max_length if config.packing else data.facts["train"]["tokens"] / max(1, len(data.train))


def num_steps(trainer: Any) -> int:
    """Planned optimiser steps."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * max(1, per_epoch))


def identity(job: Job) -> dict[str, Any]:
    """What must be the same when a run goes on, by names whose first word says whose it is."""
    config, model = job.config, job.trainer.model
    trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    same: dict[str, Any] = {
        "dataset.sha256": job.data.fingerprint,
        "dataset.packing": [config.packing, config.packing_strategy, config.max_length],
        "dataset.seed": [config.seed, config.data_seed],
        "tokenizer": fingerprint(job.tokenizer),
        "template.sha256": job.template.sha256,
        "rows_per_step": config.per_device_train_batch_size * config.gradient_accumulation_steps * world,
        "optimizer.optim": config.optim,
        "model.trainable": sorted(trained.items()),
    }
    base = model.config.to_dict()
    return same | {f"model.{key}": value for key, value in sorted(base.items()) if key not in VOLATILE}


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
        "overfit": config.overfit,
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
    for line in [*job.data.notes, *bad_note(job.data)]:
        say(line, markup=False)
    told = job.data.facts["train"]
    say(f"tokens    {told['tokens']:,} in {told['rows']:,} rows, {told['trained_tokens']:,} of them trained")
    rows = len(job.trainer.train_dataset)
    packed = f" ({rows:,} packed)" if job.config.packing else ""
    size = args.train_batch_size * args.gradient_accumulation_steps
    at_most = ", at most" if job.config.overfit else ""
    say(f"plan      {num_steps(job.trainer):,} steps of {size} rows per process{packed}{at_most}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    say(f"machine   {job.device}" + (f", {processes} processes ({job.kind})" if processes > 1 else ""))


def fit(job: Job, run: Run, same: dict[str, Any], checkpoint: Checkpoint | None) -> Result:
    """Trains, then says what came out. A signal saves a checkpoint and ends the run."""
    config, trainer = job.config, job.trainer
    world = int(os.environ.get("WORLD_SIZE", "1"))
    with stop_signals(is_rank=world > 1) as asked:
        told = job.data.facts["train"]
        slack = 0.002 * told["rows"] / told["trained_tokens"] if config.overfit else None  # two answers in 1,000 wrong
        best = None
        if config.load_best_model_at_end:
            resume_step = checkpoint.step if checkpoint else None
            best = Best(run.folder, str(config.metric_for_best_model), config.greater_is_better, resume_step)
        watch = Watch(run, job.console, config, same, asked, slack, job.scorer, best)
        trainer.add_callback(watch)
        if checkpoint:  # TRL counts tokens from the start of the process
            before = json.loads((checkpoint.folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            trainer._total_train_tokens = next((r["num_tokens"] for r in reversed(before) if "num_tokens" in r), 0)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        except UserError:
            run.finish(_result(job, run, "failed", {}, {}))
            raise
        finally:
            watch.close()
    if watch.is_stopped:
        step = trainer.state.global_step
        job.console.print(f"stopped   by a signal at step {step:,} of {trainer.state.max_steps:,}, checkpoint saved")
        job.console.print(f"go on     {command_name()} sft {run.folder}/recipe.yaml --resume_from_checkpoint true")
        return run.finish(_result(job, run, "stopped", {}, {}))
    if best:
        _take_best(job, best)
    model_dir = save_model(trainer, job.tokenizer, run, job.console, lambda: load_model(config))
    return _finish(job, run, model_dir, best)


def _take_best(job: Job, best: Best) -> None:
    """The best weights of the run in place of the last ones. Every rank calls."""
    trainer, step = job.trainer, job.trainer.state.global_step
    if trainer.eval_dataset and not any(_has_losses(row, job) for row in trainer.state.log_history[-2:]):
        trainer.evaluate()  # of the last step: it may be the best
    trainer.accelerator.wait_for_everyone()
    best.read(step)  # rank 0 wrote it
    best.restore(trainer.accelerator.unwrap_model(trainer.model))
    trainer.accelerator.wait_for_everyone()
    job.console.print(f"best      step {best.step:,}: {best.metric} {best.value:.4f}")


def _finish(job: Job, run: Run, model_dir: Path, best: Best | None = None) -> Result:
    """Losses of every shard, answers, result.json; says what came out and what to do next."""
    shards = {}
    if job.trainer.eval_dataset:
        last = job.trainer.state.log_history[-2:]  # the end of training logs a line of its own
        done = [row for row in last if row.get("step") == job.trainer.state.global_step and _has_losses(row, job)]
        if best:  # the weights are not those of the last step
            metrics = {
                f"eval_{n}_loss": job.trainer._loss_per_token(rows) for n, rows in job.trainer.eval_dataset.items()
            }
        else:
            metrics = done[-1] if done else job.trainer.evaluate()
        shards = {
            name: {"loss": metrics[f"eval_{name}_loss"], "bits_per_byte": None, "entropy": None, "gap_stderr": None}
            for name in job.data.shards
        }
        for name in job.data.shards:
            tokens, num_bytes = job.data.facts[f"shard.{name}"]["trained_tokens"], job.data.answer_bytes(name)
            shards[name]["bits_per_byte"] = shards[name]["loss"] * tokens / math.log(2) / max(1, num_bytes)
    scores: dict[str, AnswerScore] = {}
    if run.is_main:
        asked = (
            {"overfit": job.data.train} if job.config.overfit else job.data.shards if job.config.eval_answers else {}
        )
        scores = {name: _answers(job, rows, name) for name, rows in asked.items()}
    job.trainer.accelerator.wait_for_everyone()
    status = "ok"
    if job.config.overfit and scores and scores["overfit"].exact_match < LEARNT:
        status = "failed"
    result = _result(job, run, status, shards, scores, model_dir)
    if best:
        result.metrics.update({"best_step": best.step, f"best_{best.metric}": best.value})
    if not run.is_main:
        return result
    run.finish(result)
    if best:
        best.remove()
    say = job.console.print
    if shards:
        say(shard_table(shards, None))
    for name, score in scores.items():
        _say_answers(say, name, score)
        write_answers(run.folder / f"answers_{name}.jsonl", score)
    say(f"trained   {result.tokens:,} tokens in {result.metrics['train_wall_s']:.0f} s, {result.wall_s:.0f} s in all")
    say(f"model     {model_dir}   curves  {plot_losses(run.folder)}")
    if job.config.overfit:
        _say_overfit(job, scores["overfit"])
    return result


def _has_losses(row: dict[str, Any], job: Job) -> bool:
    return all(f"eval_{name}_loss" in row for name in job.data.shards)


def _answers(job: Job, rows: Any, name: str) -> AnswerScore:
    """Of a shard's first rows (all for --overfit), by the model in memory."""
    count = len(rows) if job.config.overfit else min(len(rows), job.config.eval_answers)
    raw = [json.loads(text) for text in rows.select(range(count))["raw"]]
    model = job.trainer.accelerator.unwrap_model(job.trainer.model)
    with Progress(console=job.console, transient=True, disable=not job.console.is_terminal) as bar:
        task = bar.add_task(f"answers {name}", total=count)
        return score_answers(
            model, job.tokenizer, raw, job.config.per_device_eval_batch_size, job.config.max_new_tokens,
            lambda done: bar.advance(task, done),
        )  # fmt: skip


def _say_answers(say: Callable[..., object], name: str, score: AnswerScore) -> None:
    kinds = "  ".join(f"{kind} {share:.1%}" for kind, share in score.by_kind().items())
    say(f"answers   {name}: {score.num_exact:,} of {len(score.answers):,} word for word ({score.exact_match:.1%})")
    if kinds:
        say(f"          {kinds}")


def write_answers(path: Path, score: AnswerScore) -> None:
    """Every question, what was expected and what came, as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for answer in score.answers:
            row = dataclasses.asdict(answer) | {"exact": answer.is_exact}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _say_overfit(job: Job, score: AnswerScore) -> None:
    say = job.console.print
    for answer in [answer for answer in score.answers if not answer.is_exact][:3]:
        say(f"expected  {json.dumps(answer.expected[:200], ensure_ascii=False)}", markup=False)
        say(f"    came  {json.dumps(answer.given[:200], ensure_ascii=False)}", markup=False)
    say(verdict(score.exact_match, "rows, masks, template and model"))


def _result(
    job: Job,
    run: Run,
    status: str,
    shards: dict[str, Any],
    scores: dict[str, AnswerScore],
    model_dir: Path | None = None,
) -> Result:
    history = job.trainer.state.log_history
    ended: dict[str, Any] = next((row for row in reversed(history) if "train_runtime" in row), {})
    seen = next((row["num_tokens"] for row in reversed(history) if "num_tokens" in row), 0)
    metrics: dict[str, Any] = {
        "train_wall_s": round(ended.get("train_runtime", 0.0), 2),
        "steps": job.trainer.state.global_step,
        "num_parameters": sum(p.numel() for p in job.trainer.model.parameters()),
        "num_bad_rows": sum(sum(kinds.values()) for kinds in job.data.facts["bad_rows"].values()),
    }
    for name, score in scores.items():
        metrics[f"{name}_exact_match"] = score.exact_match
        metrics |= {f"{name}_exact_match_{kind}": share for kind, share in score.by_kind().items()}
    return Result(
        stage="sft",
        status=status,
        model_dir=str(model_dir or run.model_dir),
        parent=job.config.model_name_or_path,
        wall_s=round(time.perf_counter() - job.started, 2),
        cpu_s=round(cpu_seconds(), 2),
        tokens=int(seen),
        shards=shards,
        metrics=metrics,
    )
