"""Pretraining: our model, any architecture from a config, or an existing checkpoint (full or LoRA).

Owns the loop, which reads from top to bottom: `main` prepares, `fit` trains, `_finish` says what came out.

    llmkit pretrain recipes/toy/pretrain.yaml --max_steps 100

loss = sum over tokens / number of tokens in the global batch, so accumulation and world size change nothing.
Leaves out exact resume, and mixture-of-experts balancing losses: the loss is the cross-entropy alone.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import PretrainConfig, UserError
from ..data.loader import Loader, Rows
from ..data.sources import parse_sources
from ..data.tokenizer import bos_id, fingerprint
from ..evaluate.ngram import NgramModel
from ..evaluate.perplexity import ShardScore, score_rows, token_losses
from ..hardware import Device, cpu_seconds, detect, peak_memory_bytes
from ..report.console import shard_table
from ..report.plots import plot_losses
from ..run import Result, Run, check_output_dir, command_name, quiet_libraries
from .build import (
    check_attention,
    check_config,
    check_disk,
    check_engine,
    check_prompts,
    flops_per_token,
    get_model,
    get_store,
    get_tokenizer,
)
from .checkpoint import save_checkpoint, save_run_model
from .optim import build_optimizer, lr_factor, set_learning_rate


@dataclass
class Job:
    """Everything the loop needs, built once by `main`."""

    config: PretrainConfig
    device: Device
    accelerator: Accelerator
    console: Console
    run: Run
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    loader: Loader
    shards: dict[str, Rows]
    max_steps: int
    flops_per_token: float
    can_isolate: bool
    started: float

    @property
    def bare_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)


def main(config: PretrainConfig) -> Result:
    """Checks the inputs, prepares data and model, trains, writes the run folder. Raises UserError."""
    started = time.perf_counter()
    check_config(config)
    check_engine()
    quiet_libraries()
    folder, data_dir = Path(config.output_dir), Path(config.data_dir)
    store_dir = Path(config.store_dir) if config.store_dir else folder.parent / "data"
    device = detect(config.use_cpu, config.bf16)
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))  # the others wait while rank 0 tokenises
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if device.bf16 else "no", kwargs_handlers=[patient]
    )
    console = Console(quiet=not accelerator.is_main_process, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a log file: room for the table
    check_output_dir(folder)
    sources = parse_sources(config.datasets, "datasets")
    eval_sources = parse_sources(config.eval_datasets, "eval_datasets")
    names = [source.shard or source.name or f"validation{i}" for i, source in enumerate(eval_sources)]
    if len(set(names)) < len(names):
        raise UserError(f"eval_datasets: shard names {names} are not all different; set `shard:` on each")

    with accelerator.main_process_first():  # rank 0 writes tokenizer and stores, the others find them
        tokenizer = get_tokenizer(config, sources, data_dir, store_dir)
    check_prompts(config, tokenizer)
    set_seed(config.seed)
    model = get_model(config, tokenizer)
    can_isolate = check_attention(model, config)
    with accelerator.main_process_first():
        stores = [get_store(source, data_dir, store_dir, tokenizer, console) for source in [*sources, *eval_sources]]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        rows = [Rows(store, config.max_length, config.packing_strategy, bos_id(tokenizer), pad) for store in stores]
    train_rows, shards = rows[: len(sources)], dict(zip(names, rows[len(sources) :], strict=True))

    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    data_seed = config.seed if config.data_seed is None else config.data_seed
    fractions = [source.fraction for source in sources] if sources[0].fraction else None
    loader = Loader(train_rows, rows_per_step, data_seed, fractions)  # type: ignore[arg-type]
    max_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * loader.num_rows / rows_per_step))
    check_disk(folder, model)
    facts = {
        "hardware": str(device),
        "num_processes": accelerator.num_processes,
        "seed": config.seed,
        "data_seed": data_seed,
        "parent": config.model_name_or_path,
        "documents_open_with_bos": config.packing_strategy == "bos_bestfit",
        "tokenizer": fingerprint(tokenizer),
        "datasets": [r.store.manifest for r in train_rows],
        "eval_shards": {name: {**r.store.manifest, "entropy": r.entropy} for name, r in shards.items()},
    }
    run = Run.start(folder, "pretrain", config, facts, accelerator.is_main_process)
    job = Job(
        config, device, accelerator, console, run, model, tokenizer, loader, shards, max_steps,
        flops_per_token(model, config.max_length), can_isolate, started,
    )  # fmt: skip
    _announce(job, train_rows)
    return fit(job)


def _announce(job: Job, train_rows: list[Rows]) -> None:
    c, model = job.config, job.model
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_tokens = sum(rows.store.num_tokens for rows in train_rows)
    tokens_per_step = job.loader.rows_per_step * c.max_length
    say = job.console.print
    say(
        f"model     {model.config.model_type}, {total:,} parameters"
        + (f", {trainable:,} trainable" if trainable < total else "")
    )
    plan = train_rows[0].plan
    use = f", rows {plan.utilisation:.1%} used, {plan.num_restarts:,} restarts" if plan and len(train_rows) == 1 else ""
    skipped = sum(rows.store.manifest.get("num_empty_documents_skipped", 0) for rows in train_rows)
    if skipped:
        say(f"data      skipped {skipped:,} empty documents")
    say(f"data      {num_tokens:,} tokens in {job.loader.num_rows:,} rows of {c.max_length}{use}")
    say(
        f"plan      {job.max_steps:,} steps of {job.loader.rows_per_step} rows, "
        f"{job.max_steps * job.loader.rows_per_step / job.loader.num_rows:.2f} epochs, "
        f"{job.max_steps * tokens_per_step:,} places, "
        f"{job.max_steps * tokens_per_step * job.flops_per_token:.2g} FLOPs"
    )
    say(
        f"machine   {job.device}"
        + (f", {job.accelerator.num_processes} processes" if job.accelerator.num_processes > 1 else "")
    )


def fit(job: Job) -> Result:
    """The loop: batch, forward, backward, clip, step, log, evaluate, save."""
    config, accelerator, run = job.config, job.accelerator, job.run
    if config.torch_compile:
        job.model.compile()
    optimizer = build_optimizer(job.model, config)
    job.model, optimizer = accelerator.prepare(job.model, optimizer)
    world_size = accelerator.num_processes
    tracker = _start_tracker(config) if accelerator.is_main_process else None
    started, cpu_started = time.perf_counter(), cpu_seconds()
    paused_s = paused_cpu_s = 0.0  # evaluating and saving
    tokens_seen = 0
    window_loss = torch.zeros((), device=accelerator.device)
    window_started, window_tokens, window_steps = 0.0, 0, 0  # seconds of training, without the pauses

    @contextlib.contextmanager
    def paused() -> Iterator[None]:
        nonlocal paused_s, paused_cpu_s
        start, cpu_start = time.perf_counter(), cpu_seconds()
        yield
        paused_s += time.perf_counter() - start
        paused_cpu_s += cpu_seconds() - cpu_start

    def train_seconds() -> float:
        return time.perf_counter() - started - paused_s

    if config.eval_on_start:
        with paused():
            _evaluate(job, 0, tracker)
    job.model.train()
    with _progress(job) as progress:
        bar = progress.add_task("train", total=job.max_steps, note="")
        for step in range(job.max_steps):
            num_tokens = job.loader.num_labels(step)  # of the whole global batch, on every rank
            factor = lr_factor(step, config, job.max_steps)
            set_learning_rate(optimizer, factor)
            micro_batches = _micro_batches(job, step)
            for i, batch in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(job.model):
                    loss = token_losses(job.model, batch, _isolate(config)).sum() / num_tokens
                    accelerator.backward(loss * world_size)  # gradients are averaged over ranks: undo it
                window_loss += loss.detach()
            grad_norm = accelerator.clip_grad_norm_(job.model.parameters(), config.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()

            tokens_seen += num_tokens
            window_tokens += num_tokens
            window_steps += 1
            done = step + 1
            if done % config.logging_steps == 0 or done == job.max_steps:
                mean_loss = accelerator.reduce(window_loss).item() / window_steps  # the only wait for the device
                seconds = train_seconds() - window_started
                rate = window_tokens / seconds
                places = window_steps * job.loader.rows_per_step * config.max_length / seconds
                peak = job.device.peak_flops
                row = {
                    "step": done,
                    "epoch": round(done * job.loader.rows_per_step / job.loader.num_rows, 4),
                    "loss": mean_loss,
                    "learning_rate": config.learning_rate * factor,
                    "grad_norm": float(grad_norm),
                    "num_input_tokens_seen": tokens_seen,
                    "tokens_per_second": round(rate, 1),
                    "mfu": round(places * job.flops_per_token / peak / world_size, 4) if peak else None,
                    "peak_memory_bytes": peak_memory_bytes(accelerator.device),
                    "wall_s": round(time.perf_counter() - started, 2),
                }
                run.log(row)
                _track(tracker, row)
                if not math.isfinite(mean_loss):
                    raise UserError(
                        f"loss is {mean_loss} at step {done}: the run stops, nothing was saved over; "
                        "lower learning_rate or raise warmup_steps"
                    )
                mfu = f"  MFU {row['mfu']:.0%}" if peak else ""
                progress.update(bar, completed=done, note=f"loss {mean_loss:.4f}  {rate:,.0f} tok/s{mfu}")
                _say_progress(job, progress, done, str(progress.tasks[0].fields["note"]))
                window_loss.zero_()
                window_started, window_tokens, window_steps = train_seconds(), 0, 0
            if config.eval_steps and done % config.eval_steps == 0 and done < job.max_steps:
                with paused():
                    _evaluate(job, done, tracker)
            if config.save_steps and done % config.save_steps == 0 and done < job.max_steps:
                with paused():
                    _save(job, done)
    train_s, train_cpu_s = train_seconds(), cpu_seconds() - cpu_started - paused_cpu_s
    _save(job, None)
    scores = _evaluate(job, job.max_steps, tracker)
    if tracker:
        tracker.finish()
    return _finish(job, scores, tokens_seen, train_s, train_cpu_s)


def _micro_batches(job: Job, step: int) -> list[dict[str, torch.Tensor]]:
    """This rank's share of the global batch, on its device, cut into forward passes."""
    accelerator = job.accelerator
    batch = job.loader.batch(step, accelerator.process_index, accelerator.num_processes)
    size = job.config.per_device_train_batch_size
    parts = {key: rows.to(accelerator.device).split(size) for key, rows in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def _save(job: Job, step: int | None) -> None:
    """A checkpoint, or `model/` at the end; written by rank 0 while the others wait."""
    job.accelerator.wait_for_everyone()
    if not all(p.isfinite().all() for p in job.bare_model.parameters()):
        raise UserError(
            "the weights are not finite any more: not saved, earlier checkpoints are untouched; "
            "lower learning_rate or raise warmup_steps"
        )
    if job.accelerator.is_main_process:
        if step is None:
            save_run_model(job.bare_model, job.tokenizer, job.run.folder)
        else:
            save_checkpoint(job.bare_model, job.tokenizer, job.run.folder, step, job.config.save_total_limit)
    job.accelerator.wait_for_everyone()


def _isolate(config: PretrainConfig) -> bool:
    return config.packing_strategy == "bos_bestfit" and config.document_isolation


def _progress(job: Job) -> Progress:
    columns = (
        BarColumn(30),
        TextColumn("step {task.completed:,.0f}/{task.total:,.0f}  {task.fields[note]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=job.console, transient=True, disable=not job.console.is_terminal)


def _say_progress(job: Job, progress: Progress, done: int, note: str) -> None:
    """Where there is no terminal to draw a bar on, about ten lines for the whole run."""
    if progress.disable and (done * 10 // job.max_steps) > ((done - job.config.logging_steps) * 10 // job.max_steps):
        job.console.print(f"step {done:>6,}/{job.max_steps:,}  {note}")


def _evaluate(job: Job, step: int, tracker: Any) -> dict[str, ShardScore]:
    """Every shard and the samples; training's random numbers are not touched."""
    scores = {
        name: score_rows(
            job.bare_model,
            rows,
            job.config.per_device_eval_batch_size,
            job.tokenizer.eos_token_id,
            job.accelerator,
            job.can_isolate,
        )
        for name, rows in job.shards.items()
    }
    row: dict[str, Any] = {"step": step}
    for name, score in scores.items():
        row[f"eval_{name}_loss"] = score.loss
        row[f"eval_{name}_bits_per_byte"] = score.bits_per_byte
    if job.accelerator.is_main_process:
        row["samples"] = [write_sample(job, prompt) for prompt in job.config.sample_prompts]
        job.run.log(row)
        _track(tracker, row)
        losses = "  ".join(f"{name} {score.loss:.4f}" for name, score in scores.items())
        if losses:
            job.console.print(f"eval {step:>6,}/{job.max_steps:,}  {losses}")
        for sample in row["samples"]:
            job.console.print(
                f"  sample  {json.dumps(sample, ensure_ascii=False)[1:-1]}", style="dim", markup=False, soft_wrap=True
            )
    return scores


@contextlib.contextmanager
def own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds inside the block and puts the generators of CPU and device back after it."""
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
    if on_mps is not None:
        torch.mps.set_rng_state(on_mps)


@torch.no_grad()
def write_sample(job: Job, prompt: str) -> str:
    """One sampled continuation at temperature 0.8, the same random numbers every time."""
    model, tokenizer = job.bare_model, job.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if job.config.packing_strategy == "bos_bestfit" or not ids:
        ids = [bos_id(tokenizer) if job.config.packing_strategy == "bos_bestfit" else tokenizer.eos_token_id, *ids]
    room = max(1, min(job.config.sample_max_new_tokens, job.config.max_length - len(ids)))
    was_training = model.training
    model.eval()
    with own_random_numbers(job.config.seed, model.device):
        out = model.generate(
            torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            max_new_tokens=room,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _start_tracker(config: PretrainConfig) -> Any:
    if config.report_to != "trackio":
        return None
    import trackio  # check_config has looked for it

    return trackio.init(project=config.project, name=config.run_name or Path(config.output_dir).name)


def _track(tracker: Any, row: dict[str, Any]) -> None:
    if tracker:
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        tracker.log(numbers, step=row["step"])


def _finish(job: Job, scores: dict[str, ShardScore], tokens: int, train_s: float, train_cpu_s: float) -> Result:
    """Writes result.json and the plot; says the loss and gap of every shard, the time, and what to do next."""
    config, run, say = job.config, job.run, job.console.print
    counts: dict[str, float] = {}
    if config.ngram_order and job.accelerator.is_main_process:
        ngram = NgramModel(job.loader.sources[0].store, config.ngram_order, bos_id(job.tokenizer), len(job.tokenizer))
        counts = {name: ngram.loss(rows.store) for name, rows in job.shards.items()}
    shards = {name: score.to_dict() for name, score in scores.items()}
    for name, loss in counts.items():
        entropy = shards[name]["entropy"]
        shards[name][f"ngram{config.ngram_order}_loss"] = loss
        if entropy is not None:
            shards[name]["closed"] = (loss - shards[name]["loss"]) / (loss - entropy)
    result = run.finish(
        Result(
            stage="pretrain",
            status="ok",
            model_dir=str(run.model_dir),
            parent=config.model_name_or_path,
            wall_s=round(time.perf_counter() - job.started, 2),
            cpu_s=round(cpu_seconds(), 2),
            tokens=tokens,
            shards=shards,
            metrics={
                "train_wall_s": round(train_s, 2),
                "train_cpu_s": round(train_cpu_s, 2),
                "steps": job.max_steps,
                "num_parameters": sum(p.numel() for p in job.bare_model.parameters()),
            },
        )
    )
    if not job.accelerator.is_main_process:
        return result
    plot = plot_losses(run.folder)
    if shards:
        say(shard_table(shards, config.ngram_order))
    say(
        f"trained   {tokens:,} tokens in {train_s:.0f} s ({tokens / train_s:,.0f} per second), "
        f"{result.wall_s:.0f} s in all"
    )
    say(f"model     {run.model_dir}   curves  {plot}")
    llmkit = command_name()
    say(f"try it    {llmkit} generate --model_name_or_path {run.folder} --max_new_tokens 100")
    if job.bare_model.config.model_type == "llmkit":
        name = "qwen3" if job.bare_model.config.qk_norm else "llama"
        say("share it  outside llmkit the folder needs trust_remote_code=True; a plain copy for everything else:")
        say(f"          {llmkit} export --model_name_or_path {run.folder} --to {name} --output_dir {run.folder}/{name}")
    return result
