"""The verb `llmkit data`: sources -> clean -> deduplicate -> split -> decontaminate -> tokenise -> stores and report.

Owns the recipe's meaning and the order of the steps: each is a datatrove pipeline, so that a laptop, Slurm and Ray run
the same code. A run that was cut goes on where it stopped; no store appears in the corpus folder before it is whole.

    main(config)    # DataConfig; prints what came out, writes report.html, report.json, result.json
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import UserError
from ..report.corpus import print_summary
from ..run import Run, is_disk_full, run_status
from ..verbs import DataConfig
from . import clean, dedup, executor, finish, stages
from .read import EVERY, Share, plan_shares, share_size
from .sources import find_builder, find_files, parse_sources, source_fingerprint
from .stages import HELD_OUT_SHARD, Plan, Stage, Task

SMALL_BYTES = 8 << 20  # one process is as fast
MANY_WORKERS = 64  # of a cluster, where the recipe does not say
LAYOUT = 1  # of the work folder: an unfinished run of another one starts afresh
NOT_OF_THE_TEXT = ("output_dir", "engine", "engine_kwargs", "num_workers", "dry_run", "keep_work", "max_bad_rows")


# before the first step


def check_settings(config: DataConfig) -> None:
    """Raises UserError for what could not work or would have no effect."""
    if not config.output_dir:
        raise UserError("output_dir is missing; add it to the recipe or --output_dir FOLDER")
    if not config.datasets:
        raise UserError("datasets is missing; add e.g. datasets: [{path: text, data_files: corpus.txt}]")
    if not 0 <= config.test_split_size < 1:
        raise UserError(f"test_split_size={config.test_split_size}; allowed: a share, 0 or more and below 1")
    if not 0.7 <= config.near_dedup_threshold <= 1:
        raise UserError(
            f"near_dedup_threshold={config.near_dedup_threshold}; allowed: 0.7 to 1 (Jaccard index of words)"
        )
    for key, least in (("max_bad_rows", 0), ("max_doc_bytes", 1)):
        if getattr(config, key) < least:
            raise UserError(f"{key}={getattr(config, key)}; allowed: {least} or more")
    if config.max_length is not None and config.max_length < 2:
        raise UserError(f"max_length={config.max_length}; allowed: 2 or more, or null for no row plan")
    if config.benchmark_datasets and not config.decontaminate:
        raise UserError("benchmark_datasets has no effect with decontaminate: false; remove one of them")
    if config.engine == "local" and config.engine_kwargs:
        raise UserError("engine_kwargs has no effect with engine: local; remove it")
    if config.engine == "slurm" and not {"partition", "time"} <= set(config.engine_kwargs):
        raise UserError("engine: slurm needs engine_kwargs: {partition: NAME, time: HH:MM:SS}")
    if config.engine == "local" and config.dry_run:
        raise UserError("dry_run shows what would be submitted; it needs engine: slurm or ray")
    clean.make_filters(config.filters)


def make_plan(config: DataConfig) -> Plan:
    """What every task reads, and which store it goes to."""
    data_dir = Path(config.data_dir)
    train = parse_sources(config.datasets, "datasets")
    held_back = parse_sources(config.eval_datasets, "eval_datasets")
    benchmarks = [
        dataclasses.replace(s, columns=s.columns or [EVERY])
        for s in parse_sources(config.benchmark_datasets, "benchmark_datasets")
    ]
    mixed = any(source.fraction is not None for source in train)
    for i, source in enumerate(train):
        if source.shard and not mixed:
            raise UserError(
                f"datasets[{i}]: shard={source.shard!r} has no effect without `fraction`, as all entries go into one "
                "store `train`; remove it, or give every entry a fraction and so a store of its own"
            )
    stores = [source.shard or f"train-{i}" if mixed else "train" for i, source in enumerate(train)]
    stores += [source.shard or source.name or f"validation{i}" for i, source in enumerate(held_back)]
    taken = [*(stores if mixed else ["train", *stores[len(train) :]]), *[HELD_OUT_SHARD] * bool(config.test_split_size)]
    for name in taken:
        if taken.count(name) > 1 or name in ("tokenizer", "work") or "/" in name:
            raise UserError(
                f"the store name {name!r} is taken or not allowed; set `shard:` of the entry to another name"
            )
    tasks, rows = [], []
    for i, source in enumerate([*train, *held_back]):
        files = find_files(source, data_dir) if find_builder(source) else []
        size = share_size(sum(path.stat().st_size for path in files), num_workers(config))
        shares, count = plan_shares(source, data_dir, size)
        rows.append(count)
        tasks += [Task(i, group) for group in _groups(shares, size)]
    return Plan(config, config.output_dir, [*train, *held_back], stores, len(train), rows, tasks, benchmarks)


def num_workers(config: DataConfig) -> int:
    return config.num_workers or (os.cpu_count() or 1 if config.engine == "local" else MANY_WORKERS)


def _groups(shares: list[Share], share_bytes: int) -> Iterator[list[Share]]:
    """Small files together, so that a task has about `share_bytes` to read."""
    held: list[Share] = []
    for share in shares:
        is_unknown = share.path is None and not share.size
        if held and (is_unknown or sum(s.size for s in held) + share.size > share_bytes):
            yield held
            held = []
        held.append(share)
    if held:
        yield held


def make_stages(plan: Plan, work: Path) -> list[Stage]:
    """The pipelines in their order; each needs what the one before it wrote."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets

    def step(function: Callable, tasks: int = 1) -> Stage:
        return Stage(function.__name__, [partial(stages.timed, function, str(work))], tasks)

    found = [step(stages.read, len(plan.tasks))]
    if plan.config.near_dedup:
        buckets = MinhashDedupBuckets(
            str(work / "signatures"), str(work / "buckets"), config=dedup.minhash_config(), lines_to_buffer=1000
        )
        found.append(Stage("buckets", [buckets], dedup.BUCKETS))
    found.append(step(stages.duplicates))
    if plan.has_reference:
        found += [step(stages.reference), step(stages.find_hits, len(plan.train_tasks)), step(stages.contamination)]
    return [*found, step(finish.tokenizer), step(stages.tokenise, len(plan.tasks)), step(finish.finish)]


# the verb


def work_key(config: DataConfig) -> str:
    """Changes with the text and with every setting that decides what becomes of it."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_OF_THE_TEXT}
    digest = hashlib.sha256(json.dumps([LAYOUT, settings], sort_keys=True).encode())
    for key in ("datasets", "eval_datasets", "benchmark_datasets"):
        for source in parse_sources(getattr(config, key), key):
            digest.update(source_fingerprint(source, Path(config.data_dir)).encode())
    return digest.hexdigest()[:12]


def main(config: DataConfig) -> dict[str, Any] | None:
    """Makes the corpus; the figures of its report, None where a cluster goes on.

    Raises UserError for what cannot be read, and leaves no store then.
    """
    console = Console()
    check_settings(config)
    if config.engine != "local":  # a node may start its tasks anywhere
        places: dict[str, Any] = {k: str(Path(getattr(config, k)).absolute()) for k in ("output_dir", "data_dir")}
        config = dataclasses.replace(config, **places)
    output = Path(config.output_dir)
    if run_status(output) == "ok":
        raise UserError(
            f"output_dir={config.output_dir!r}: holds a finished corpus; choose another, or remove that folder"
        )
    tokenizer = _named_tokenizer(config)
    key = work_key(config)
    work = output / "work" / key
    if (work / "plan.json").exists():  # the tasks stay as they were cut, whatever num_workers is now
        plan = dataclasses.replace(Plan.load(str(work)), config=config)
    else:
        plan = make_plan(config)
    if config.dry_run:
        was_there = output.exists()
        executor.submit(make_stages(plan, work), work / "logs", config, console)
        if not was_there:
            shutil.rmtree(output, ignore_errors=True)  # datatrove makes folders for its logs
        return None
    run = Run.start(output, "data", config, {"started_s": time.time(), "text": key})
    try:
        for other in (output / "work").glob("*"):  # behind the lock: nobody is at work there
            if other.name != key:
                console.print(f"removed   {other}: an unfinished run of another recipe or text")
                shutil.rmtree(other)
        if work.is_dir():
            console.print(f"goes on   with what an earlier run left in {work}")
        work.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None and not (work / "tokenizer").exists():
            tokenizer.save_pretrained(work / "tokenizer")
            finish.write_ids(tokenizer, str(work))
        plan.save(work)
        return _run(plan, work, console)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"{output}: the disk is full; no store was written, and what was done so far is kept in {work}: make room "
            "and give the same command again"
        ) from None
    finally:
        run.unlock()


def _run(plan: Plan, work: Path, console: Console) -> dict[str, Any] | None:
    """All steps here, or as jobs of a cluster; the figures of the report, where there are some yet."""
    config, output = plan.config, Path(plan.output)
    if config.engine != "local":
        executor.submit(make_stages(plan, work), work / "logs", config, console)
        return None
    size = sum(share.size for task in plan.tasks for share in task.shares)
    workers = 1 if 0 < size < SMALL_BYTES and not config.num_workers else num_workers(config)
    much = f"{size / 1e6:,.1f} MB to read, " if size else ""
    console.print(f"plan      {much}{len(plan.tasks)} tasks, at most {workers} at a time")
    executor.run_local(make_stages(plan, work), work / "logs", workers, console)
    figures = json.loads((output / "report.json").read_text(encoding="utf-8"))
    print_summary(figures, console)
    console.print(f"report    {output / 'report.html'}", soft_wrap=True, highlight=False)
    if not config.keep_work:
        shutil.rmtree(output / "work")
    return figures


def _named_tokenizer(config: DataConfig) -> Any:
    """The tokenizer of the recipe, before anything is read; None when one is to be trained."""
    if not config.tokenizer_name:
        return None
    from .tokenizer import load_tokenizer

    found = load_tokenizer(config.tokenizer_name, config.trust_remote_code)
    if not found.is_fast:
        raise UserError(
            f"tokenizer_name={config.tokenizer_name!r}: is written in Python; convert it to a tokenizer.json"
        )
    return found
