"""A model in 8 or 4 bit as a folder that `from_pretrained` reads, and at once what that cost.

    llmkit quantize recipes/toy/quantize_4bit.yaml

Owns the verb, from top to bottom: source -> which layers -> quantise and write -> read back -> measure both -> verdict.
What is measured is the folder as anyone loads it, on this machine: a CPU with AVX512-BF16 repacks 4-bit layers at their
first use and computes in bfloat16, other machines do not, so that both figures are told.
Leaves out other methods (GPTQ, AWQ, GGUF) and quantised training (`llmkit sft` with load_in_4bit).
"""

import contextlib
import dataclasses
import importlib.util
import io
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..align.lora import keep_unpacked
from ..config import UserError
from ..data.tokenizer import fingerprint, save_tokenizer
from ..evaluate.columns import find_columns
from ..hardware import cpu_seconds, detect
from ..report.markup import size_text
from ..run import Result, Run, check_output_dir, quiet_libraries, written_beside
from ..verbs import MergeConfig, QuantizeConfig
from .cost import Cost, compare_on, measure_speed, plain_load, resident_growth, weight_bytes
from .layers import Plan, bits_config, method, plan_layers, sizes_of
from .loading import Source, find, use_decode_threads
from .passages import Passages, find_passages

LIMITS = {8: 1.01, 4: 1.05}  # of the perplexity ratio
SAME_SPEED = 1.1  # ratio of medians up to which two models are as fast as each other: what the machine itself varies
FOUR_BIT_KEYS = ("bnb_4bit_quant_type", "use_bnb_nested_quant")


# ---- source


def check(config: QuantizeConfig) -> Source:
    """The model that is meant. Raises UserError for keys that do not go together and for what cannot be quantised."""
    source = find(config.model_name_or_path, config.trust_remote_code)
    if not config.output_dir:
        raise UserError("output_dir is missing; e.g. --output_dir runs/my/quantize-4bit")
    if config.load_in_8bit == config.load_in_4bit:
        how = "both are set" if config.load_in_8bit else "neither is set"
        raise UserError(f"load_in_8bit, load_in_4bit: {how}; choose one: --load_in_8bit or --load_in_4bit")
    defaults = QuantizeConfig("", "")
    for key in FOUR_BIT_KEYS:
        if config.load_in_8bit and getattr(config, key) != getattr(defaults, key):
            raise UserError(f"{key}={getattr(config, key)!r} has no effect without load_in_4bit: true; remove it")
    for key, needed in (("eval_tasks_limit", "eval_tasks"), ("data_dir", "eval_datasets")):
        if getattr(config, key) != getattr(defaults, key) and not getattr(config, needed):
            raise UserError(f"{key}={getattr(config, key)!r} has no effect without {needed}; remove it")
    for key in ("batch_size", "window", "eval_tasks_limit"):
        if (value := getattr(config, key)) is not None and value < 1:
            raise UserError(f"{key}={value}; allowed: 1 or more")
    if config.max_perplexity_ratio is not None and not config.max_perplexity_ratio >= 1:
        raise UserError(f"max_perplexity_ratio={config.max_perplexity_ratio}; allowed: 1 or more, or null")
    if source.is_quantized:
        what = f"is an adapter on {source.base!r}, which is" if source.is_adapter else "is"
        raise UserError(
            f"model_name_or_path={source.name!r}: {what} stored in quantised form already; name the original model"
        )
    if source.manifest.get("stage") == "reward":
        raise UserError(f"model_name_or_path={source.name!r}: is a reward model; allowed: models that write text")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("llmkit quantize needs bitsandbytes: `pip install bitsandbytes`")
    check_output_dir(Path(config.output_dir))
    return source


@contextlib.contextmanager
def _plain_folder(source: Source, config: QuantizeConfig) -> Iterator[str]:
    """The folder or Hub id to quantise: an adapter is merged first, into a folder that goes afterwards."""
    if not source.is_adapter:
        yield source.path
        return
    from ..align import merge

    with tempfile.TemporaryDirectory(prefix="llmkit-merged-") as work:
        settings = MergeConfig(
            source.path, f"{work}/model", trust_remote_code=source.trust_remote_code, use_cpu=config.use_cpu
        )
        with contextlib.redirect_stdout(io.StringIO()) as said:
            merge.main(settings)
        print(*(line for line in said.getvalue().splitlines() if work not in line), sep="\n")  # of a folder that goes
        yield f"{work}/model"


# ---- what is there before anything is written


@dataclasses.dataclass
class Job:
    """What is there once nothing can be wrong any more but the measuring."""

    config: QuantizeConfig
    source: Source
    console: Console
    device: str
    path: str  # of the plain model
    original: Any
    tokenizer: Any
    plan: Plan
    passages: dict[str, Passages]
    scorer: Any  # of eval_tasks, or None


def prepare(config: QuantizeConfig, source: Source, path: str) -> Job:
    """All that a mistake of the user's can break. Raises UserError."""
    console = Console(highlight=False, soft_wrap=True)
    device = detect(config.use_cpu, None).type
    if device not in ("cpu", "cuda"):
        console.print(f"machine   bitsandbytes does not run on {device}: the CPU does it", markup=False)
        device = "cpu"
    plain = dataclasses.replace(source, path=path, is_adapter=False)
    original, tokenizer = plain.load(device=device), plain.load_tokenizer()
    context = getattr(original.config.get_text_config(), "max_position_embeddings", None) or 2048
    scorer = None
    if config.eval_tasks:
        from ..evaluate.in_training import TaskScorer

        scorer = TaskScorer(config.eval_tasks, tokenizer, None, config.eval_tasks_limit, config.batch_size, context)
    plan = plan_layers(original, config)
    return Job(
        config, source, console, device, path, original, tokenizer, plan,
        find_passages(source, config, tokenizer, context), scorer,
    )  # fmt: skip


def _facts(job: Job) -> dict[str, Any]:
    theirs = job.source.manifest
    kept: dict[str, Any] = {key: theirs[key] for key in ("chat_template", "documents_open_with_bos") if key in theirs}
    return {
        "parent": job.config.model_name_or_path,
        "hardware": str(detect(job.device == "cpu")),
        "tokenizer": fingerprint(job.tokenizer),
        **kept,
        "quantization": method(job.config),
        "quantized_layers": job.plan.quantized,
        "left_layers": job.plan.left,
        "texts": {name: passages.what for name, passages in job.passages.items()},
    }


def _announce(job: Job) -> None:
    say = job.console.print
    sizes = {name: p.numel() for name, p in job.original.named_parameters()}
    inside = sum(math.prod(sizes_of(job.original.get_submodule(name))) for name in job.plan.quantized)
    num = len(job.plan.quantized)
    say(f"layers    {num} in {method(job.config)}, {inside / sum(sizes.values()):.1%} of all parameters", markup=False)
    say(f"left      {job.plan.told()}", markup=False)
    for name, passages in job.passages.items():
        say(f"text      {name}: {passages.num_documents:,} rows, {passages.what}", markup=False)


# ---- quantise, write, read back


def write(job: Job, folder: Path) -> None:
    """The quantised folder. Raises UserError where bitsandbytes refuses."""
    how = bits_config(job.config, job.plan, job.original.dtype)
    try:
        model = plain_load(job.path, job.device, job.config.trust_remote_code, quantization_config=how)
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{job.source.name}: bitsandbytes cannot quantise it here ({reason})") from None
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    assert found == set(job.plan.quantized), f"not as planned: {sorted(found ^ set(job.plan.quantized))}"
    with written_beside(folder) as partial:
        model.save_pretrained(partial)  # before its first use: a repacked double-quantised layer is saved rounded again
        save_tokenizer(job.tokenizer, partial)


def repacks(model: nn.Module) -> bool:
    """Whether its first use here turns 4-bit layers into the packed form, with arithmetic in bfloat16."""
    return any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())


# ---- measure


def measure(job: Job, run: Run) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """`shards` and `metrics` of result.json: the original against what is read back from disk."""
    config, say = job.config, job.console.print
    model = plain_load(run.model_dir, job.device, config.trust_remote_code)
    others = {"quantized": model}
    if packed := job.device == "cpu" and repacks(model):
        others["unpacked"] = plain_load(run.model_dir, job.device, config.trust_remote_code)
        keep_unpacked(others["unpacked"])
    pad = job.tokenizer.eos_token_id or 0
    width = max(9, *map(len, job.passages))
    shards: dict[str, dict[str, Any]] = {}
    unpacked: dict[str, float] = {}
    for name, passages in job.passages.items():
        try:
            found = compare_on(job.original, others, passages, config.batch_size, pad)
        except ValueError as error:
            raise UserError(f"{name}: {error}; check weights and dtype") from None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # layers whose weights are used by other ways than a forward pass (Mamba)
            shutil.rmtree(run.model_dir)
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{job.source.name}: does not run in {method(config)} and was not kept ({reason}); leave out the "
                "layers that cannot be quantised: --llm_int8_skip_modules, or try other bits"
            ) from None
        shards[name] = _shard(found["quantized"], passages.entropy_nats)
        say(f"{name:<{width}} {_told(found['quantized'])}", markup=False)
        if packed:
            unpacked[name] = found["unpacked"].ratio
    if packed:
        worst = max(unpacked, key=lambda name: unpacked[name])
        say(
            "measured  as this CPU runs it: packed, in bfloat16; where nothing is packed (GPUs, CPUs without "
            f"AVX512-BF16) the worst ratio is {unpacked[worst]:.4f} on {worst}", markup=False,
        )  # fmt: skip
    row = max((row[1] for passages in job.passages.values() for row in passages.rows), key=len)
    metrics = {"unpacked_perplexity_ratio": max(unpacked.values())} if packed else {}
    use_decode_threads(detect(job.device == "cpu"), job.original)
    metrics |= _sizes_of(job, run, model) | _speed(job, measure_speed({"original": job.original, **others}, row))
    if job.scorer:
        for prefix, asked in (("original_", job.original), ("", model)):
            metrics |= {f"{prefix}{name}": value for name, value in job.scorer.score(asked).items()}
        for name in job.scorer.figures():
            if name in metrics:
                say(f"task      {name} {metrics[f'original_{name}']:.4f} -> {metrics[name]:.4f}", markup=False)
    return shards, metrics


def _shard(cost: Cost, entropy_nats: float | None) -> dict[str, Any]:
    facts = dataclasses.asdict(cost)
    ratio, low, high = (facts.pop(key) for key in ("ratio", "low", "high"))
    return facts | {
        "perplexity_ratio": ratio,
        "perplexity_ratio_low": low,
        "perplexity_ratio_high": high,
        "entropy": None if entropy_nats is None else entropy_nats / cost.num_tokens,
    }


def _told(cost: Cost) -> str:
    return (
        f"perplexity {math.exp(cost.original_loss):.4f} -> {math.exp(cost.loss):.4f}, ratio {cost.ratio:.4f} "
        f"[{cost.low:.4f}, {cost.high:.4f}]; likeliest token the same at {cost.top1_agreement:.2%}, "
        f"KL {cost.kl:.2g} nats"
    )


def _sizes_of(job: Job, run: Run, model: Any) -> dict[str, Any]:
    """Weights on disk and in memory, and what a fresh process grows by, in bytes."""
    found: dict[str, Any] = {
        "num_parameters": sum(p.numel() for p in job.original.parameters()),
        "num_quantized_layers": len(job.plan.quantized),
        "num_left_layers": len(job.plan.left),
    }
    for prefix, path, loaded in (("original_", job.path, job.original), ("", str(run.model_dir), model)):
        found[f"{prefix}disk_bytes"] = find_columns([path])[0].num_bytes
        found[f"{prefix}memory_bytes"] = weight_bytes(loaded)
        found[f"{prefix}process_bytes"] = resident_growth(path, job.device, job.config.trust_remote_code)
    for what, key in (("on disk", "disk_bytes"), ("in memory", "memory_bytes"), ("of a process", "process_bytes")):
        before, after = (size_text(found[name]) or "could not be measured" for name in (f"original_{key}", key))
        job.console.print(f"size      {what}: {before} -> {after}", markup=False)
    return found


def _speed(job: Job, rates: dict[str, dict[str, float]]) -> dict[str, float]:
    told: list[str] = []
    metrics: dict[str, float] = {}
    for what in ("decode", "prefill"):
        before, after = rates["original"][what], rates["quantized"][what]
        metrics |= {f"original_{what}_tokens_per_second": before, f"{what}_tokens_per_second": after}
        ratio = max(before, after) / min(before, after)
        word = f"{ratio:.1f} times {'slower' if after < before else 'faster'}" if ratio > SAME_SPEED else "as fast"
        told.append(f"{what} {before:,.0f} -> {after:,.0f} tokens/s, {word}")
        if "unpacked" in rates:
            metrics[f"unpacked_{what}_tokens_per_second"] = rates["unpacked"][what]
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)}" if job.device == "cpu" else job.device
    job.console.print(f"speed     {'; '.join(told)} (batch 1, {where})", markup=False)
    return metrics


# ---- verdict


def _verdict(worst: str, facts: dict[str, Any], limit: float, config: QuantizeConfig) -> str:
    ratio, low, high = (facts[f"perplexity_ratio{end}"] for end in ("", "_low", "_high"))
    near = ""
    if low <= limit < high or low < limit <= high:
        near = f"; the interval [{low:.4f}, {high:.4f}] holds the limit: more text would decide"
    if ratio <= limit:
        return f"ok        perplexity at most {ratio:.4f} times the original's ({worst}); limit {limit:g}{near}"
    other = "" if config.load_in_8bit else "--load_in_8bit, or "
    return (
        f"FAILED    perplexity on {worst} is {ratio:.4f} times the original's, limit {limit:g}{near}; try {other}"
        "--llm_int8_skip_modules with the layers that lose most, or allow it: --max_perplexity_ratio"
    )


# ---- the verb


def main(config: QuantizeConfig) -> int:
    """1 where the perplexity ratio is above the limit; the folder is there all the same. Raises UserError."""
    started = time.perf_counter()
    quiet_libraries()
    source = check(config)
    with _plain_folder(source, config) as path:
        job = prepare(config, source, path)
        run = Run.start(Path(config.output_dir), "quantize", config, _facts(job))
        _announce(job)
        write(job, run.model_dir)
        shards, metrics = measure(job, run)
    worst = max(shards, key=lambda name: shards[name]["perplexity_ratio"])
    limit = config.max_perplexity_ratio or LIMITS[8 if config.load_in_8bit else 4]
    is_good = shards[worst]["perplexity_ratio"] <= limit
    run.finish(
        Result(
            stage="quantize",
            status="ok" if is_good else "failed",
            model_dir=str(run.model_dir),
            parent=config.model_name_or_path,
            wall_s=round(time.perf_counter() - started, 2),
            cpu_s=round(cpu_seconds(), 2),
            tokens=0,
            shards=shards,
            metrics={"perplexity_ratio": shards[worst]["perplexity_ratio"], "max_perplexity_ratio": limit, **metrics},
        )
    )
    job.console.print(_verdict(worst, shards[worst], limit, config), markup=False)
    job.console.print(f'load it   AutoModelForCausalLM.from_pretrained("{run.model_dir}")', markup=False)
    return int(not is_good)
