"""Instruction tuning of any causal LM: full, LoRA, QLoRA, DoRA, on TRL's SFTTrainer.

Owns the verb: rows -> model -> trainer, and the answers at the end; the course of the run is `job.py`'s.

    llmkit sft recipes/toy/sft.yaml --overfit 32

Before the first long run `--overfit N` trains on N rows until they come back word for word: what cannot learn a few
rows by heart learns nothing from many. Leaves out preferences (`dpo`, `kto`, ...) and how good an answer is.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..config import UserError
from ..evaluate.answers import AnswerScore, score_answers
from ..report.console import shard_table
from ..run import Result, Run
from ..train.engines import engine_kind
from ..train.overfit import LEARNT, for_overfit, verdict
from ..tuning import SftConfig
from .job import Figures, Job, get_parts, make_job, run, shard_figures
from .rows import Labeller, PackedCollator, pack
from .trainer import ByToken


def main(config: SftConfig) -> Result:
    """Checks the inputs, prepares rows and model, trains, writes the run folder. Raises UserError."""
    return run(for_overfit(config), "sft", prepare)


def prepare(config: SftConfig, console: Console, started: float = 0.0) -> Job:
    """Rows, tokenizer, model and trainer of a recipe. Raises UserError."""
    if config.eval_answers and (kind := engine_kind()) in ("zero3", "fsdp2"):
        raise UserError(f"eval_answers={config.eval_answers}: not under {kind}, where no rank has the whole model")
    from trl import SFTConfig, SFTTrainer

    parts = get_parts(config, SFTConfig, Labeller)
    args, data, model, tokenizer = parts.args, parts.data, parts.model, parts.tokenizer
    make = pack if config.packing else (lambda rows, config: rows)
    is_apart = config.packing and config.packing_strategy != "wrapped"
    if is_apart and not model.config._attn_implementation.startswith("flash"):
        collator = PackedCollator(tokenizer.pad_token_id)
        args.packing = False  # of TRL, whose packed batches are for flash attention
    else:
        collator = None
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer: Any = type("Trainer", (ByToken, SFTTrainer), {})(
        model=model,
        args=args,
        train_dataset=make(data.train, config),
        eval_dataset={name: make(rows, config) for name, rows in data.shards.items()} or None,
        processing_class=tokenizer,
        data_collator=collator,
    )
    args.packing = config.packing
    for key, value in data.settings.items():  # the rows are labelled already: for whoever reads the settings
        setattr(trainer.args, key, value)
    job = make_job("sft", config, console, parts, trainer, finish, started, parts.named(["loss"]))
    told = data.facts["train"]
    if config.overfit:
        job.until_learnt = 0.002 * told["rows"] / told["trained_tokens"]  # two answers in 1,000 wrong
    return job


def finish(job: Job, run: Run, is_best: bool) -> Figures:
    """Losses of every shard, and its answers."""
    losses, shards, metrics = shard_figures(job, is_best), {}, {}
    for name in job.data.shards:
        loss, tokens = losses[f"{name}_loss"], job.data.facts[f"shard.{name}"]["trained_tokens"]
        bits = loss * tokens / math.log(2) / max(1, job.data.answer_bytes(name))
        shards[name] = {"loss": loss, "bits_per_byte": bits, "entropy": None, "gap_stderr": None}
    if not run.is_main:
        return shards, {}, "ok"
    say = job.console.print
    if shards:
        say(shard_table(shards, None))
    asked = {"overfit": job.data.train} if job.is_overfit else job.data.shards if job.config.eval_answers else {}
    status = "ok"
    for name, rows in asked.items():
        score = _answers(job, rows, name)
        _say_answers(say, name, score)
        write_answers(run.folder / f"answers_{name}.jsonl", score)
        metrics[f"{name}_exact_match"] = score.exact_match
        metrics |= {f"{name}_exact_match_{kind}": share for kind, share in score.by_kind().items()}
        if job.is_overfit:
            _say_overfit(job, score)
            status = "ok" if score.exact_match >= LEARNT else "failed"
    return shards, metrics, status


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
