"""Pretraining: our model, any architecture from a config, or an existing checkpoint (full or LoRA).

Owns the loop, which reads from top to bottom: `main` prepares, `fit` trains, `_finish` says what came out.

    llmkit pretrain recipes/toy/pretrain.yaml --max_steps 100

loss = sum over tokens / number of tokens in the global batch, so accumulation and world size change nothing.
Leaves out mixture-of-experts balancing losses: the loss is the cross-entropy alone.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import UserError
from ..data.loader import Loader, Rows
from ..data.sources import eval_shard_names, parse_sources
from ..data.tokenizer import bos_id, fingerprint
from ..evaluate.ngram import NgramModel
from ..evaluate.perplexity import ShardScore, token_losses
from ..hardware import cpu_seconds, detect, peak_memory_bytes, use_threads
from ..report.console import shard_table
from ..report.plots import plot_losses
from ..run import LOST, Result, Run, check_output_dir, command_name, finished_steps, quiet_libraries, stop_signals
from ..verbs import PretrainConfig
from .best import Best, check_best
from .build import (
    Job,
    check_attention,
    check_config,
    check_disk,
    check_prompts,
    flops_per_token,
    folders,
    get_model,
    get_rows,
    get_tokenizer,
    identity,
)
from .checkpoint import (
    Checkpoint,
    check_same,
    clear_the_way,
    find_checkpoint,
    load_weights,
    restore_generators,
    save_checkpoint,
    save_run_model,
)
from .engines import check_engine, engine_kind, start_accelerator, start_engine
from .monitor import Monitor, NotFinite, first_not_finite
from .optim import lr_factor, planned_rates, set_learning_rate
from .overfit import for_overfit, judge_overfit
from .watch import evaluate, progress_bar, say_progress, score_shards, start_scorer, start_tracker, take_best, track

# in the errors of gloo and NCCL when a process at the other end is gone
LOST_CONTACT = ("closed by peer", "reset by peer", "connection refused", "remote process exited")


def main(config: PretrainConfig) -> Result:
    """Checks the inputs, prepares data and model, trains, writes the run folder. Raises UserError."""
    started = time.perf_counter()
    check_config(config)
    config = for_overfit(config)
    kind = engine_kind()
    check_engine(kind, config)
    quiet_libraries()
    folder, (data_dir, store_dir) = Path(config.output_dir), folders(config)
    device = detect(config.use_cpu, config.bf16)
    accelerator = start_accelerator(kind, device, config)
    console = Console(quiet=not accelerator.is_main_process, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a log file: room for the table
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(folder, config.resume_from_checkpoint, console.print)
    goes_on = checkpoint is not None and checkpoint.folder.resolve().parent.parent == folder.resolve()
    if not goes_on:
        check_output_dir(folder)
    sources = parse_sources(config.datasets, "datasets")
    eval_sources = parse_sources(config.eval_datasets, "eval_datasets")
    eval_shard_names(eval_sources)

    with accelerator.main_process_first():  # rank 0 writes tokenizer and stores, the others find them
        tokenizer = get_tokenizer(config, sources, data_dir, store_dir)
    check_prompts(config, tokenizer)
    set_seed(config.seed)
    model = get_model(config, tokenizer)
    can_isolate = check_attention(model, config)
    with accelerator.main_process_first():
        train_rows, shards = get_rows(config, sources, eval_sources, tokenizer, console)

    scorer = start_scorer(config, tokenizer, kind)
    figures = [f"{name}_{what}" for name in shards for what in ("loss", "bits_per_byte")]
    check_best(config, figures + (scorer.figures() if scorer else []), kind in ("zero3", "fsdp2"))
    if config.overfit:
        train_rows = [train_rows[0].first(config.overfit)]
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    data_seed = config.seed if config.data_seed is None else config.data_seed
    fractions: Any = [source.fraction for source in sources] if sources[0].fraction else None
    loader = Loader(train_rows, rows_per_step, data_seed, fractions)
    max_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * loader.num_rows / rows_per_step))
    must_match = identity(config, model, tokenizer, loader, fractions)
    changed: list[str] = []
    if checkpoint:
        changed = check_same(checkpoint, must_match, dataclasses.asdict(config))
        _check_unfinished(folder if goes_on else None, checkpoint.step, max_steps)
        model = load_weights(model, checkpoint)
    if not goes_on:
        check_disk(folder, model, config, max_steps)
    model_flops = flops_per_token(model, config.max_length)
    device = use_threads(device, model_flops * config.max_length * config.per_device_train_batch_size)
    facts = {
        "hardware": str(device),
        "engine": kind,
        "num_processes": accelerator.num_processes,
        "seed": config.seed,
        "data_seed": data_seed,
        "parent": config.model_name_or_path,
        "overfit": config.overfit,
        "documents_open_with_bos": config.packing_strategy == "bos_bestfit",
        "tokenizer": fingerprint(tokenizer),
        "datasets": [r.store.manifest for r in train_rows],
        "eval_shards": {name: {**r.store.manifest, "entropy": r.entropy} for name, r in shards.items()},
    }
    accelerator.wait_for_everyone()  # every rank has read the checkpoint before rank 0 tidies up around it
    resume_step = checkpoint.step if checkpoint and goes_on else None
    try:
        run = Run.start(folder, "pretrain", config, facts, accelerator.is_main_process, resume_step)
        if accelerator.is_main_process:
            clear_the_way(folder, checkpoint)
            if checkpoint and goes_on:
                check_disk(folder, model, config, max_steps - checkpoint.step)
        engine = start_engine(accelerator, kind, model, config, device.bf16)
        job = Job(
            config, device, engine, console, run, tokenizer, loader, shards, max_steps, model_flops, can_isolate,
            must_match, started, scorer,
        )  # fmt: skip
        if config.load_best_model_at_end:
            job.best = Best(folder, str(config.metric_for_best_model), config.greater_is_better, resume_step)
        _announce(job, train_rows, kind)
        if config.resume_from_checkpoint:
            _say_resume(console, checkpoint, changed)
        set_seed(config.seed + accelerator.process_index)  # every rank drops out other activations
        result = fit(job, checkpoint)
        if config.overfit and result.status == "ok":
            result = judge_overfit(job, train_rows[0], result)
        accelerator.wait_for_everyone()
        if accelerator.num_processes > 1:
            # gloo's thread needs the GIL to drop that barrier, and DDP's destructor joins the thread without giving it
            # up: a rank once hung here. Asleep, the GIL is free.
            time.sleep(0.5)
        accelerator.end_training()  # leaves the process group, or gloo's threads may abort a rank as it exits
        return result
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if accelerator.num_processes == 1 or not any(word in text.lower() for word in LOST_CONTACT):
            raise
        raise UserError(
            f"rank {accelerator.process_index} of {accelerator.num_processes} stops: {LOST}; "
            f"go on with --resume_from_checkpoint true ({text[:80]})"
        ) from None


def _check_unfinished(folder: Path | None, step: int, max_steps: int) -> None:
    """Raises UserError where nothing is left to do. `folder` of the run that goes on; None when one branches off."""
    done = finished_steps(folder) if folder else step
    if (done or 0) >= max_steps or step > max_steps:
        raise UserError(f"max_steps={max_steps}: step {max(done or 0, step)} is reached already; raise max_steps")


def _say_resume(console: Console, checkpoint: Checkpoint | None, changed: list[str]) -> None:
    if checkpoint is None:
        console.print("resume    no checkpoint yet: from step 0")
        return
    console.print(f"resume    {checkpoint.folder}, step {checkpoint.step:,}")
    for line in changed:
        console.print(f"changed   {line}", markup=False)


def _announce(job: Job, train_rows: list[Rows], kind: str) -> None:
    c, model = job.config, job.engine.bare_model
    total, trainable = job.engine.num_parameters()
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
        + (f", {job.engine.world_size} processes ({kind})" if job.engine.world_size > 1 else "")
    )


@dataclasses.dataclass
class Progress:
    """How far the run is; what a checkpoint keeps of it."""

    step: int = 0  # steps done
    tokens: int = 0
    wall_s: float = 0.0  # all times add up over the starts of a run; CPU seconds are those of rank 0
    cpu_s: float = 0.0
    train_wall_s: float = 0.0  # evaluating and saving not counted
    train_cpu_s: float = 0.0
    # (loss, grad norm, skipped, bad) of the steps that are not logged yet
    window: list[list[float]] = dataclasses.field(default_factory=list)


def fit(job: Job, checkpoint: Checkpoint | None = None) -> Result:
    """The loop: batch, forward, backward, clip, judge, update, log, evaluate, save."""
    config, engine, run, device = job.config, job.engine, job.run, job.engine.accelerator.device
    monitor = Monitor(run, device, job.console.print)
    at = _restore(job, checkpoint, monitor) if checkpoint else Progress()
    tracker = start_tracker(config) if engine.rank == 0 else None
    started, cpu_started = time.perf_counter(), cpu_seconds()
    paused_s = paused_cpu_s = 0.0  # evaluating and saving
    window_started, window_steps, window_tokens = 0.0, 0, 0  # seconds of training, without the pauses

    @contextlib.contextmanager
    def paused() -> Iterator[None]:
        nonlocal paused_s, paused_cpu_s
        start, cpu_start = time.perf_counter(), cpu_seconds()
        yield
        paused_s += time.perf_counter() - start
        paused_cpu_s += cpu_seconds() - cpu_start

    def train_seconds() -> float:
        return time.perf_counter() - started - paused_s

    def progress() -> Progress:
        return dataclasses.replace(
            at,
            wall_s=at.wall_s + time.perf_counter() - job.started,
            cpu_s=at.cpu_s + cpu_seconds(),
            train_wall_s=at.train_wall_s + train_seconds(),
            train_cpu_s=at.train_cpu_s + cpu_seconds() - cpu_started - paused_cpu_s,
        )

    if config.eval_on_start and at.step == 0:
        with paused():
            evaluate(job, 0, monitor, tracker)
    engine.model.train()
    with stop_signals(is_rank=engine.world_size > 1) as asked, progress_bar(job) as bar:
        task = bar.add_task("train", total=job.max_steps, completed=at.step, note="")
        for step, batch, num_tokens in _batches(job, at.step):
            factor = lr_factor(step, config, job.max_steps)
            set_learning_rate(engine.optimizer, factor)
            loss = torch.zeros((), device=device)
            micro_batches = _micro_batches(job, batch)
            for i, micro_batch in enumerate(micro_batches):
                micro_loss = _loss(job, micro_batch) / num_tokens  # of the whole global batch, on every rank
                engine.backward(micro_loss, is_last=i == len(micro_batches) - 1)
                loss += micro_loss.detach()
            loss = engine.sum(loss)
            done = at.step = step + 1
            if monitor.looks_at_gradients(step, config, job.max_steps):
                monitor.see_gradients(done, engine.grad_norms())
            engine.step(lambda grad_norm, loss=loss: monitor.judge(loss, grad_norm))  # type: ignore[misc]

            at.tokens += num_tokens
            window_steps += 1
            window_tokens += num_tokens
            if engine.rank == 0:
                if job.loader.pattern is None:  # the sources of a mixture have epochs of their own
                    monitor.see_batch(done, step * job.loader.rows_per_step // job.loader.num_rows, batch["input_ids"])
                rates = [group["lr"] for group in engine.optimizer.param_groups]
                monitor.see_learning_rates(done, rates, planned_rates(engine.optimizer, config, factor))
            is_last_step, is_log = done == job.max_steps, done % config.logging_steps == 0
            saves = bool(config.save_steps) and (done % (config.save_steps or 1) == 0 or is_last_step)
            stops = engine.any(asked())
            if device.type == "cpu" or is_log or is_last_step or saves or stops:
                try:
                    at.window += monitor.drain()  # the only wait for the device
                except NotFinite as error:
                    raise _explain(job, error, progress(), monitor) from None
            if is_log or is_last_step:
                seconds = train_seconds() - window_started
                rate = window_tokens / seconds
                places = window_steps * job.loader.rows_per_step * config.max_length / seconds
                peak = job.device.peak_flops
                row = {
                    "step": done,
                    "epoch": round(done * job.loader.rows_per_step / job.loader.num_rows, 4),
                    "loss": sum(row[0] for row in at.window) / len(at.window),
                    "learning_rate": config.learning_rate * factor,
                    "grad_norm": at.window[-1][1],
                    "num_skipped_steps": monitor.num_skipped,
                    "num_input_tokens_seen": at.tokens,
                    "tokens_per_second": round(rate, 1),
                    "mfu": round(places * job.flops_per_token / peak / engine.world_size, 4) if peak else None,
                    "peak_memory_bytes": peak_memory_bytes(device),
                    "wall_s": round(progress().wall_s, 2),
                    "train_cpu_s": round(progress().train_cpu_s, 3),
                }
                run.log(row)
                track(tracker, row)
                mfu = f"  MFU {row['mfu']:.0%}" if peak else ""
                note = f"loss {row['loss']:.4f}  {rate:,.0f} tok/s{mfu}"
                bar.update(task, completed=done, note=note)
                say_progress(job, bar, done, note)
                at.window, window_started, window_steps, window_tokens = [], train_seconds(), 0, 0
            if config.eval_steps and done % config.eval_steps == 0 and not is_last_step:
                with paused():
                    evaluate(job, done, monitor, tracker)
            if saves or (stops and not is_last_step):
                with paused():
                    path = _save(job, progress(), monitor)
            if stops and not is_last_step:
                return _stop(job, path, progress(), monitor)
        with paused():  # a signal now is too late: the run is done
            if job.best:
                evaluate(job, job.max_steps, monitor, tracker)
                take_best(job)
            save_run_model(engine, job.tokenizer, run.folder)
    at = progress()
    scores = score_shards(job) if job.best else evaluate(job, job.max_steps, monitor, tracker)
    if tracker:
        tracker.finish()
    return _finish(job, scores, at, monitor)


def _batches(job: Job, first: int) -> Iterator[tuple[int, dict[str, Tensor], int]]:
    """(step, this rank's share of the global batch on the CPU, labels of the whole batch) for the steps to come.

    Where there is a GPU a thread prepares the next one, in pinned memory, while the GPU works on this one.
    """
    engine, is_gpu = job.engine, job.device.type == "cuda"

    def load(step: int) -> tuple[int, dict[str, Tensor], int]:
        batch = job.loader.batch(step, engine.rank, engine.world_size)
        if is_gpu:
            batch = {key: rows.pin_memory() for key, rows in batch.items()}
        return step, batch, job.loader.num_labels(step)

    if not is_gpu:
        yield from map(load, range(first, job.max_steps))
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, first)
        for step in range(first, job.max_steps):
            batch = ahead.result()
            ahead = pool.submit(load, step + 1)
            yield batch


def _micro_batches(job: Job, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """This rank's share of the global batch, on its device, cut into forward passes."""
    size, device = job.config.per_device_train_batch_size, job.engine.accelerator.device
    parts = {key: rows.to(device, non_blocking=True).split(size) for key, rows in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def _loss(job: Job, batch: dict[str, Tensor]) -> Tensor:
    """Sum over the labels of a micro-batch, in nats."""
    with job.engine.autocast():
        return token_losses(job.engine.model, batch, _isolate(job.config)).sum()


def _isolate(config: PretrainConfig) -> bool:
    return config.packing_strategy == "bos_bestfit" and config.document_isolation


def _restore(job: Job, checkpoint: Checkpoint, monitor: Monitor) -> Progress:
    """Optimiser, random generators and monitor as they were; the weights were loaded before the engine wrapped them."""
    engine, tensors = job.engine, checkpoint.tensors
    engine.set_state(load_file(checkpoint.folder / "optimizer.safetensors"))
    monitor.restore({key: tensors[f"monitor/{key}"] for key in monitor.state}, checkpoint.step)
    if not restore_generators(tensors, engine.rank, engine.accelerator.device):
        torch.manual_seed(job.config.seed + engine.rank)
    return Progress(**{field.name: checkpoint.state[field.name] for field in dataclasses.fields(Progress)})


def _save(job: Job, at: Progress, monitor: Monitor) -> Path:
    state = {
        **dataclasses.asdict(at),
        "num_processes": job.engine.world_size,
        "identity": job.identity,
        "recipe": dataclasses.asdict(job.config),
    }
    tensors = {f"monitor/{key}": value for key, value in monitor.state.items()}
    return save_checkpoint(job.engine, job.tokenizer, job.run.folder, state, tensors, job.config.save_total_limit)


def _explain(job: Job, error: NotFinite, at: Progress, monitor: Monitor) -> UserError:
    """Runs the bad batch again with hooks, keeps it, and says which module and tensor went bad first."""
    engine, size = job.engine, job.config.per_device_train_batch_size
    engine.optimizer.zero_grad()
    batch = job.loader.batch(error.step - 1, engine.rank, engine.world_size)  # a function of the step
    found = None
    for i, micro_batch in enumerate(_micro_batches(job, batch)):

        def forward_backward(micro_batch: dict[str, Tensor] = micro_batch) -> None:
            engine.backward(_loss(job, micro_batch), is_last=True)

        where = first_not_finite(engine.bare_model, forward_backward)
        found = found or (where and (i, where))
    culprits = [(rank, *what) for rank, what in enumerate(engine.gather(found)) if what]
    rank, i, where = culprits[0] if culprits else (0, 0, "everything was finite when the batch was run again")
    path = job.run.folder / f"not-finite-step-{error.step:08d}.safetensors"
    if engine.rank == 0:
        rows = job.loader.batch(error.step - 1, rank, engine.world_size)
        save_file({key: value[i * size : (i + 1) * size].contiguous() for key, value in rows.items()}, path)
    alert = {"kind": "not-finite", "message": f"{error}; first bad: {where}", "first": where, "batch": path.name}
    job.run.append("alerts.jsonl", {"step": error.step, **alert})
    job.run.finish(_result(job, "failed", {}, at, monitor))
    return UserError(
        f"{error}: the run stops before the update; first bad: {where}; its batch is in {path}; if it is no bug of the "
        "model, lower learning_rate or raise warmup_steps"
    )


def _stop(job: Job, path: Path, at: Progress, monitor: Monitor) -> Result:
    """Asked to end by a signal: the checkpoint is written, say how to go on."""
    job.console.print(f"stopped   by a signal at step {at.step:,} of {job.max_steps:,}, saved {path}")
    job.console.print(f"go on     {command_name()} pretrain {job.run.folder}/recipe.yaml --resume_from_checkpoint true")
    return job.run.finish(_result(job, "stopped", {}, at, monitor))


def _result(job: Job, status: str, shards: dict[str, Any], at: Progress, monitor: Monitor) -> Result:
    return Result(
        stage="pretrain",
        status=status,
        model_dir=str(job.run.model_dir),
        parent=job.config.model_name_or_path,
        wall_s=round(at.wall_s, 2),
        cpu_s=round(at.cpu_s, 2),
        tokens=at.tokens,
        shards=shards,
        metrics={
            "train_wall_s": round(at.train_wall_s, 2),
            "train_cpu_s": round(at.train_cpu_s, 2),
            "steps": at.step,
            "num_skipped_steps": monitor.num_skipped,
            "num_alerts": monitor.num_alerts,
            "num_parameters": job.engine.num_parameters()[0],
            **({"best_step": job.best.step, f"best_{job.best.metric}": job.best.value} if job.best else {}),
        },
    )


def _finish(job: Job, scores: dict[str, ShardScore], at: Progress, monitor: Monitor) -> Result:
    """Writes result.json and the plot; says the loss and gap of every shard, the time, and what to do next."""
    config, run, say = job.config, job.run, job.console.print
    counts: dict[str, float] = {}
    if config.ngram_order and job.engine.rank == 0:
        ngram = NgramModel(job.loader.sources[0].store, config.ngram_order, bos_id(job.tokenizer), len(job.tokenizer))
        counts = {name: ngram.loss(rows.store) for name, rows in job.shards.items()}
    shards = {name: score.to_dict() for name, score in scores.items()}
    for name, loss in counts.items():
        entropy = shards[name]["entropy"]
        shards[name][f"ngram{config.ngram_order}_loss"] = loss
        if entropy is not None:
            shards[name]["closed"] = (loss - shards[name]["loss"]) / (loss - entropy)
    result = run.finish(_result(job, "ok", shards, at, monitor))
    if job.engine.rank != 0:
        return result
    plot = plot_losses(run.folder)
    if shards:
        say(shard_table(shards, config.ngram_order))
    say(
        f"trained   {at.tokens:,} tokens in {at.train_wall_s:.0f} s "
        f"({at.tokens / max(at.train_wall_s, 1e-9):,.0f} per second), {result.wall_s:.0f} s in all"
    )
    if monitor.num_alerts:
        say(f"alerts    {monitor.num_alerts}, {monitor.num_skipped} steps skipped: {run.folder / 'alerts.jsonl'}")
    say(f"model     {run.model_dir}   curves  {plot}")
    llmkit = command_name()
    say(f"try it    {llmkit} generate --model_name_or_path {run.folder} --max_new_tokens 100")
    if job.engine.bare_model.config.model_type == "llmkit":
        name = "qwen3" if job.engine.bare_model.config.qk_norm else "llama"
        say("share it  outside llmkit the folder needs trust_remote_code=True; a plain copy for everything else:")
        say(f"          {llmkit} export --model_name_or_path {run.folder} --to {name} --output_dir {run.folder}/{name}")
    return result
