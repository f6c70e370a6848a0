"""What is seen of a run on the way: the bar, Trackio, evaluations and samples.

Owns that looking changes nothing: random numbers and the training flag come back as they were.

    scores = evaluate(job, step, monitor, tracker)

Leaves out the loop.
"""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import UserError
from ..data.tokenizer import bos_id
from ..evaluate.in_training import TaskScorer
from ..evaluate.perplexity import ShardScore, score_rows
from ..verbs import PretrainConfig
from .build import Job
from .monitor import Monitor


def progress_bar(job: Job) -> Progress:
    columns = (
        BarColumn(30),
        TextColumn("step {task.completed:,.0f}/{task.total:,.0f}  {task.fields[note]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=job.console, transient=True, disable=not job.console.is_terminal)


def say_progress(job: Job, progress: Progress, done: int, note: str) -> None:
    """Where there is no terminal to draw a bar on, about ten lines for the whole run."""
    if progress.disable and (done * 10 // job.max_steps) > ((done - job.config.logging_steps) * 10 // job.max_steps):
        job.console.print(f"step {done:>6,}/{job.max_steps:,}  {note}")


def evaluate(job: Job, step: int, monitor: Monitor, tracker: Any) -> dict[str, ShardScore]:
    """Every shard and the samples; training's random numbers are not touched. Every rank calls."""
    engine = job.engine
    scores = score_shards(job)
    monitor.see_scores(step, scores)
    samples = []
    if engine.rank == 0 or engine.is_sharded:  # sharded weights: every rank takes part in every forward pass
        samples = [write_sample(job, prompt) for prompt in job.config.sample_prompts]
    row: dict[str, Any] = {"step": step}
    for name, score in scores.items():
        row[f"eval_{name}_loss"] = score.loss
        row[f"eval_{name}_bits_per_byte"] = score.bits_per_byte
    if engine.rank == 0:
        tasks = score_tasks(job)
        row |= {f"eval_{name}": value for name, value in tasks.items()}
        row["samples"] = samples
        job.run.log(row)
        if job.best:
            job.best.see(step, row, engine.bare_model)
        track(tracker, row)
        losses = "  ".join(f"{name} {score.loss:.4f}" for name, score in scores.items())
        if losses:
            job.console.print(f"eval {step:>6,}/{job.max_steps:,}  {losses}")
        if tasks and job.scorer:
            job.console.print(f"tasks {step:>5,}/{job.max_steps:,}  {job.scorer.headline(tasks)}")
        for sample in row["samples"]:
            job.console.print(
                f"  sample  {json.dumps(sample, ensure_ascii=False)[1:-1]}", style="dim", markup=False, soft_wrap=True
            )
    return scores


def score_shards(job: Job) -> dict[str, ShardScore]:
    """Every shard with the weights as they are. Every rank calls."""
    engine = job.engine
    with engine.autocast():
        return {
            name: score_rows(
                engine.bare_model,
                rows,
                job.config.per_device_eval_batch_size,
                job.tokenizer.eos_token_id,
                engine.accelerator,
                job.can_isolate,
            )
            for name, rows in job.shards.items()
        }


def start_scorer(config: Any, tokenizer: Any, kind: str) -> TaskScorer | None:
    """For `eval_tasks`; None without. Raises UserError."""
    if not config.eval_tasks:
        return None
    if kind in ("zero3", "fsdp2"):
        raise UserError(f"eval_tasks={config.eval_tasks!r}: not under {kind}, where no rank has the whole model")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"eval_tasks={config.eval_tasks!r} needs lm-eval: `pip install 'llmkit[eval]'`")
    size, place = config.per_device_eval_batch_size, Path(config.data_dir)
    return TaskScorer(config.eval_tasks, tokenizer, place, config.eval_tasks_limit, size)


def score_tasks(job: Job) -> dict[str, float]:
    if not job.scorer:
        return {}
    with job.engine.autocast():
        return job.scorer.score(job.engine.bare_model)


def take_best(job: Job) -> None:
    """The best weights of the run in place of the last ones. Every rank calls."""
    assert job.best is not None
    job.engine.accelerator.wait_for_everyone()
    job.best.read(job.max_steps)  # rank 0 wrote it
    job.best.restore(job.engine.bare_model)
    job.engine.accelerator.wait_for_everyone()
    if job.engine.rank == 0:
        job.best.remove()
    job.console.print(f"best      step {job.best.step:,}: {job.best.metric} {job.best.value:.4f}")


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
    model, tokenizer = job.engine.bare_model, job.tokenizer
    device = job.engine.accelerator.device
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if job.config.packing_strategy == "bos_bestfit" or not ids:
        ids = [bos_id(tokenizer) if job.config.packing_strategy == "bos_bestfit" else tokenizer.eos_token_id, *ids]
    room = max(1, min(job.config.sample_max_new_tokens, job.config.max_length - len(ids)))
    was_training = model.training
    model.eval()
    with own_random_numbers(job.config.seed, device), job.engine.autocast():
        out = model.generate(
            torch.tensor([ids], device=device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
            max_new_tokens=room,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def start_tracker(config: PretrainConfig) -> Any:
    if config.report_to != "trackio":
        return None
    import trackio  # check_config has looked for it

    name = config.run_name or Path(config.output_dir).name
    return trackio.init(project=config.project, name=name, resume="allow" if config.resume_from_checkpoint else "never")


def track(tracker: Any, row: dict[str, Any]) -> None:
    if tracker:
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        tracker.log(numbers, step=row["step"])
