"""Pretraining: our model, any architecture from a config, or an existing checkpoint (full or LoRA).

Owns the loop, which reads from top to bottom: `main` prepares, `fit` trains, `_finish` says what came out.

    llmkit pretrain recipes/toy/pretrain.yaml --max_steps 100

loss = sum over tokens / number of tokens in the global batch, so accumulation and world size change nothing.
Leaves out exact resume, and mixture-of-experts balancing losses: the loss is the cross-entropy alone.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .. import model as ours  # registers llmkit with the Auto classes
from ..config import PretrainConfig, UserError
from ..data.loader import Loader, Rows
from ..data.shards import NAME, Store, build_store, open_store
from ..data.sources import Source, documents, parse_sources, source_fingerprint
from ..data.tokenizer import bos_id, fingerprint, load_tokenizer, train_bpe, train_char
from ..evaluate.ngram import NgramModel
from ..evaluate.perplexity import ShardScore, score_rows, token_losses
from ..hardware import Device, cpu_seconds, detect, peak_memory_bytes
from ..report.plots import plot_losses
from ..run import Result, Run, check_output_dir, resolve_model_dir
from .checkpoint import save_checkpoint, save_run_model
from .optim import build_optimizer, lr_factor, set_learning_rate

BPE_SAMPLE_DOCUMENTS = 20_000  # a BPE of a few thousand merges does not change with more


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

    @property
    def bare_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)


def check_config(config: PretrainConfig) -> None:
    """Raises UserError for settings that conflict or would be ignored."""
    if not config.output_dir:
        raise UserError("output_dir is missing; name a run folder, e.g. --output_dir runs/my/pretrain")
    if not config.datasets:
        raise UserError("datasets is missing; name training data, e.g. datasets: [{path: text, data_files: corpus.txt}]")
    if config.model_name_or_path and config.config_overrides:
        raise UserError("config_overrides has no effect with model_name_or_path; remove one of them")
    if config.packing_strategy == "contiguous" and config.eval_steps is not None and config.eval_steps < 1:
        raise UserError(f"eval_steps={config.eval_steps}; allowed: 1 or more, or null")
    for key in (
        "max_length per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps "
        "eval_steps save_steps save_total_limit sample_max_new_tokens"
    ).split():
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"{key}={value}; allowed: 1 or more")
    for key in "learning_rate muon_learning_rate weight_decay warmup_steps max_grad_norm max_steps".split():
        if getattr(config, key) < 0:
            raise UserError(f"{key}={getattr(config, key)}; allowed: 0 or more")
    unknown = set(config.lr_scheduler_kwargs) - {"num_decay_steps", "min_lr_ratio"}
    if unknown:
        raise UserError(f"lr_scheduler_kwargs: unknown key {min(unknown)!r}; allowed: num_decay_steps, min_lr_ratio")


def quiet_libraries() -> None:
    """Silences what a user cannot act on, each at its source."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*", module="peft.*")


def _training_texts(sources: list[Source], data_dir: Path) -> Any:
    return (doc.text for source in sources for doc in documents(source, data_dir))


def get_tokenizer(config: PretrainConfig, sources: list[Source], data_dir: Path) -> PreTrainedTokenizerBase:
    """The named tokenizer, the checkpoint's own, or one trained on the training data (never on validation text)."""
    if config.tokenizer_name or config.model_name_or_path:
        name = config.tokenizer_name or resolve_model_dir(config.model_name_or_path or "")
        return load_tokenizer(name, config.trust_remote_code)
    if config.tokenizer_type == "char":
        return train_char(_training_texts(sources, data_dir))
    return train_bpe(itertools.islice(_training_texts(sources, data_dir), BPE_SAMPLE_DOCUMENTS), config.vocab_size)


def get_store(source: Source, data_dir: Path, store_dir: Path, tokenizer: PreTrainedTokenizerBase, console: Console) -> Store:
    """The tokenised corpus, from the cache when text and tokenizer are the same to the byte."""
    folder = data_dir / source.path
    if list(folder.glob("*.ds")):
        return open_store(folder, tokenizer)
    source_hash = source_fingerprint(source, data_dir)
    folder = store_dir / f"{source_hash[:12]}-{fingerprint(tokenizer)[:12]}"
    if (folder / NAME).exists():
        return open_store(folder, tokenizer)
    where = " ".join(str(part) for part in (source.path, source.name, source.data_files, source.split) if part)
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} documents"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"tokenising {where}", total=None)
        return build_store(
            documents(source, data_dir), tokenizer, folder, source_hash, where, lambda n: progress.advance(task, n)
        )


def get_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A fresh model of `model_type`, or a checkpoint, in float32. Raises UserError for what does not fit."""
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    if config.model_name_or_path:
        path = resolve_model_dir(config.model_name_or_path)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, trust_remote_code=config.trust_remote_code, dtype=torch.float32, **attention
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"model_name_or_path={path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None
    else:
        model = _fresh_model(config, tokenizer, attention)
    rows = model.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        raise UserError(
            f"vocab_size={rows} of the model is smaller than the tokenizer's {len(tokenizer)} ids; "
            f"set config_overrides.vocab_size to {len(tokenizer)} or more, or leave it out"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and limit < config.max_length:
        raise UserError(f"max_length={config.max_length} exceeds the model's max_position_embeddings={limit}; lower the first")
    if config.use_peft:
        model = _add_lora(model, config)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _fresh_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, attention: dict) -> PreTrainedModel:
    try:
        blank = transformers.AutoConfig.for_model(config.model_type)
    except ValueError:
        raise UserError(f"model_type={config.model_type!r} is unknown to transformers; e.g. llmkit, qwen3, llama, gpt2") from None
    unknown = [key for key in config.config_overrides if not hasattr(blank, key)]
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], list(vars(blank)), n=1)
        raise UserError(
            f"config_overrides: {config.model_type} has no {unknown[0]!r}" + (f"; nearest: {near[0]!r}" if near else "")
        )
    length_key = "n_positions" if hasattr(blank, "n_positions") else "max_position_embeddings"
    settings = {
        "vocab_size": len(tokenizer),
        length_key: config.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | config.config_overrides
    try:
        model_config = transformers.AutoConfig.for_model(config.model_type, **settings)
        with contextlib.ExitStack():
            return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, **attention)
    except (ValueError, TypeError, ImportError) as error:
        cause = error.__cause__ or error
        raise UserError(f"config_overrides: {' '.join(str(cause).split())}") from None


def _add_lora(model: PreTrainedModel, config: PretrainConfig) -> PreTrainedModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("use_peft=true needs peft; install it with `pip install llmkit[align]`") from None
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Forward and backward FLOPs per token: 6 per matrix parameter and 12 * layers * width * T for attention.

    Embedding look-ups are free, the head is not; attention is counted in full although half of it is masked
    (Chowdhery et al. 2022, appendix B). Norms, softmax and the activation are left out.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings)
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in embeddings:
        matrices += head.weight.numel()
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 6 * matrices + 12 * c.num_hidden_layers * c.num_attention_heads * head_dim * context


def main(config: PretrainConfig) -> Result:
    """Checks the inputs, prepares data and model, trains, writes the run folder. Raises UserError for a user's mistake."""
    check_config(config)
    quiet_libraries()
    folder, data_dir = Path(config.output_dir), Path(config.data_dir)
    store_dir = Path(config.store_dir) if config.store_dir else folder.parent / "data"
    device = detect(config.use_cpu, config.bf16)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if device.bf16 else "no")
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    check_output_dir(folder)
    sources = parse_sources(config.datasets, "datasets")
    eval_sources = parse_sources(config.eval_datasets, "eval_datasets")
    names = [source.shard or source.name or f"validation{i}" for i, source in enumerate(eval_sources)]
    if len(set(names)) < len(names):
        raise UserError(f"eval_datasets: shard names {names} are not all different; set `shard:` on each")

    with accelerator.main_process_first():  # rank 0 writes the stores, the others find them
        tokenizer = get_tokenizer(config, sources, data_dir)
        stores = [get_store(source, data_dir, store_dir, tokenizer, console) for source in [*sources, *eval_sources]]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        rows = [Rows(store, config.max_length, config.packing_strategy, bos_id(tokenizer), pad) for store in stores]
    train_rows, shards = rows[: len(sources)], dict(zip(names, rows[len(sources) :], strict=True))

    set_seed(config.seed)
    model = get_model(config, tokenizer)
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    data_seed = config.seed if config.data_seed is None else config.data_seed
    fractions = [source.fraction for source in sources] if sources[0].fraction else None
    loader = Loader(train_rows, rows_per_step, data_seed, fractions)  # type: ignore[arg-type]
    max_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * loader.num_rows / rows_per_step))
    _check_disk(folder, model)
    facts = {
        "hardware": str(device),
        "num_processes": accelerator.num_processes,
        "seed": config.seed,
        "data_seed": data_seed,
        "parent": config.model_name_or_path,
        "tokenizer": fingerprint(tokenizer),
        "datasets": [r.store.manifest for r in train_rows],
        "eval_shards": {name: {**r.store.manifest, "entropy": r.store.entropy} for name, r in shards.items()},
    }
    run = Run.start(folder, "pretrain", config, facts, accelerator.is_main_process)
    job = Job(
        config, device, accelerator, console, run, model, tokenizer, loader, shards, max_steps,
        flops_per_token(model, config.max_length),
    )  # fmt: skip
    _announce(job, train_rows)
    return fit(job)


def _check_disk(folder: Path, model: PreTrainedModel) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output_dir={str(folder)!r}: {free / 1e6:.0f} MB free, the model alone takes {needed / 1e6:.0f} MB; "
            "make room or choose another output_dir"
        )


def _announce(job: Job, train_rows: list[Rows]) -> None:
    c, model = job.config, job.model
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_tokens = sum(rows.store.num_tokens for rows in train_rows)
    tokens_per_step = job.loader.rows_per_step * c.max_length
    say = job.console.print
    say(f"model     {model.config.model_type}, {total:,} parameters" + (f", {trainable:,} trainable" if trainable < total else ""))
    plan = train_rows[0].plan
    use = f", rows {plan.utilisation:.1%} used, {plan.num_restarts:,} restarts" if plan and len(train_rows) == 1 else ""
    say(f"data      {num_tokens:,} tokens in {job.loader.num_rows:,} rows of {c.max_length}{use}")
    say(
        f"plan      {job.max_steps:,} steps of {job.loader.rows_per_step} rows: {job.max_steps * tokens_per_step:,} places, "
        f"{job.max_steps * job.loader.rows_per_step / job.loader.num_rows:.2f} epochs, "
        f"{job.max_steps * tokens_per_step * job.flops_per_token:.2g} FLOPs"
    )
    say(f"machine   {job.device}" + (f", {job.accelerator.num_processes} processes" if job.accelerator.num_processes > 1 else ""))


def fit(job: Job) -> Result:
    """The loop: batch, forward, backward, clip, step, log, evaluate, save."""
    config, accelerator, run = job.config, job.accelerator, job.run
    if config.torch_compile:
        job.model.compile()
    optimizer = build_optimizer(job.model, config)
    job.model, optimizer = accelerator.prepare(job.model, optimizer)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    tracker = _start_tracker(config) if accelerator.is_main_process else None
    started, cpu_started = time.perf_counter(), cpu_seconds()
    eval_s = tokens_seen = 0
    window_loss = torch.zeros((), device=accelerator.device)
    window_started, window_tokens, window_steps = started, 0, 0
    scores: dict[str, ShardScore] = {}

    def evaluate(step: int) -> dict[str, ShardScore]:
        nonlocal eval_s, window_started
        start = time.perf_counter()
        scores = _evaluate(job, step, tracker)
        eval_s += time.perf_counter() - start
        window_started += time.perf_counter() - start
        return scores

    if config.eval_on_start:
        evaluate(0)
    job.model.train()
    with _progress(job) as progress:
        bar = progress.add_task("train", total=job.max_steps, note="")
        for step in range(job.max_steps):
            num_tokens = job.loader.num_labels(step)  # of the whole global batch, on every rank
            factor = lr_factor(step, config, job.max_steps)
            set_learning_rate(optimizer, factor)
            batch = job.loader.batch(step, rank, world_size)
            micro_batches = [
                {key: part.to(accelerator.device, non_blocking=True) for key, part in zip(batch, parts, strict=True)}
                for parts in zip(*(rows.split(config.per_device_train_batch_size) for rows in batch.values()), strict=True)
            ]
            for i, micro in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(job.model):
                    loss = token_losses(job.model, micro, _isolate(config)).sum() / num_tokens
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
                seconds = time.perf_counter() - window_started
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
                if tracker:
                    tracker.log(row, step=done)
                if not math.isfinite(mean_loss):
                    raise UserError(
                        f"loss is {mean_loss} at step {done}: the run stops, nothing was saved over; "
                        "lower learning_rate or raise warmup_steps"
                    )
                mfu = f"  MFU {row['mfu']:.0%}" if peak else ""
                progress.update(bar, completed=done, note=f"loss {mean_loss:.4f}  {rate:,.0f} tok/s{mfu}")
                _say_progress(job, progress, done, str(progress.tasks[0].fields["note"]))
                window_loss.zero_()
                window_started, window_tokens, window_steps = time.perf_counter(), 0, 0
            if config.eval_steps and done % config.eval_steps == 0 and done < job.max_steps:
                scores = evaluate(done)
            if config.save_steps and done % config.save_steps == 0 and done < job.max_steps:
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    save_checkpoint(job.bare_model, job.tokenizer, run.folder, done, config.save_total_limit)
                window_started = time.perf_counter() if window_steps == 0 else window_started
    train_s, train_cpu_s = time.perf_counter() - started - eval_s, cpu_seconds() - cpu_started
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_run_model(job.bare_model, job.tokenizer, run.folder)
    scores = evaluate(job.max_steps)
    if tracker:
        tracker.finish()
    return _finish(job, scores, tokens_seen, train_s, train_cpu_s)


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
            job.bare_model, rows, job.config.per_device_eval_batch_size, job.tokenizer.eos_token_id, job.accelerator
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
        if tracker:
            tracker.log({key: value for key, value in row.items() if key != "samples"}, step=step)
        losses = "  ".join(f"{name} {score.loss:.4f}" for name, score in scores.items())
        if losses:
            job.console.print(f"eval {step:>6,}/{job.max_steps:,}  {losses}")
        for sample in row["samples"]:
            job.console.print(f"  sample  {json.dumps(sample, ensure_ascii=False)[1:-1]}", style="dim", markup=False, soft_wrap=True)
    return scores


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
    with torch.random.fork_rng():
        torch.manual_seed(job.config.seed)
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
    try:
        import trackio
    except ImportError:
        raise UserError("report_to='trackio' needs trackio; install it with `pip install llmkit[train]`") from None
    return trackio.init(project=config.project, name=config.run_name or Path(config.output_dir).name)


def _finish(job: Job, scores: dict[str, ShardScore], tokens: int, train_s: float, train_cpu_s: float) -> Result:
    """Writes result.json and the plot; says the loss per shard, the gap to the entropy, the time, and what to do next."""
    config, run, say = job.config, job.run, job.console.print
    counts: dict[str, float] = {}
    if config.ngram_order and job.accelerator.is_main_process:
        if len(job.loader.sources) > 1:
            raise UserError("ngram_order counts one training source; set it to null for a mixture")
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
            wall_s=round(time.perf_counter() - run.started, 2),
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
        say(_table(shards, config.ngram_order))
    say(f"trained   {tokens:,} tokens in {train_s:.0f} s ({tokens / train_s:,.0f} per second), {result.wall_s:.0f} s in all")
    say(f"model     {run.model_dir}   curves  {plot}")
    say(f"try it    llmkit generate --model_name_or_path {run.folder} --max_new_tokens 100")
    if job.bare_model.config.model_type == "llmkit":
        say(
            "share it  outside llmkit the folder needs trust_remote_code=True; a plain copy for everything else:\n"
            f"          llmkit export --model_name_or_path {run.folder} --output_dir {run.folder}/{_plain_name(job)} --to {_plain_name(job)}"
        )
    return result


def _plain_name(job: Job) -> str:
    return "qwen3" if job.bare_model.config.qk_norm else "llama"


def _table(shards: dict[str, dict[str, Any]], ngram_order: int | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    known = any(shard["entropy"] is not None for shard in shards.values())
    table.add_column("shard")
    columns = ["loss", *(["true entropy", "gap"] if known else []), "bits/byte"]
    columns += [f"{ngram_order}-gram counts"] if ngram_order else []
    columns += ["gap closed"] if known and ngram_order else []
    for column in columns:
        table.add_column(column, justify="right")
    for name, s in shards.items():
        cells = [f"{s['loss']:.4f}"]
        if known:
            stderr = f" ±{s['gap_stderr']:.4f}" if s["gap_stderr"] is not None else ""
            has = s["entropy"] is not None
            cells += [f"{s['entropy']:.4f}" if has else "", f"{s['loss'] - s['entropy']:+.4f}{stderr}" if has else ""]
        cells.append(f"{s['bits_per_byte']:.4f}" if s["bits_per_byte"] is not None else "")
        if ngram_order:
            cells.append(f"{s[f'ngram{ngram_order}_loss']:.4f}")
        if known and ngram_order:
            cells.append(f"{s['closed']:.1%}" if "closed" in s else "")
        table.add_row(name, *cells)
    return table
