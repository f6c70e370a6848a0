"""`llmkit eval`: models side by side, asked the same, compared item by item.

Owns the verb, which reads from top to bottom: columns -> how they are asked -> tasks and texts of each -> comparison.

    llmkit eval runs/toy/pretrain runs/toy/sft --tasks toyworld

What a column answered lies in output_dir/columns/NAME: results.json, samples/TASK.jsonl, prompts/TASK.txt. A task whose
results are there is not run again; one that was cut short goes on. Leaves out the page (report/report.py).
"""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .. import config as recipes
from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes
from ..config import UserError
from ..data.sources import Source, eval_shard_names, parse_sources
from ..data.tokenizer import load_tokenizer
from ..hardware import Device, cpu_seconds, detect
from ..report.console import comparison_table
from ..run import Result, quiet_libraries, whence, write_json, write_text
from ..verbs import EvalConfig
from . import task_index
from .asking import Asking, decide
from .columns import Column, find_columns, lineage, manifest_of
from .comparison import compare_columns
from .measure import check_owner, measure
from .regression import Prompt, load_prompts, show

CONTEXT = 2048  # where a model's config says nothing, as lm-eval


@dataclasses.dataclass
class Job:
    """What the verb knows before the first model is loaded."""

    config: EvalConfig
    folder: Path
    device: Device
    console: Console
    columns: list[Column]
    tokenizers: dict[str, Any]
    asking: Asking
    lengths: dict[str, int]  # context of each column
    units: list[str]  # tasks and groups as they were asked for
    manager: Any  # lm-eval's
    shards: dict[str, tuple[Source, Path]]
    window: int
    prompts: list[Prompt]  # of the regression file

    def load(self, column: Column) -> Any:
        """The model of a column, in eval mode. Raises UserError."""
        dtype = "auto" if self.config.dtype == "auto" else getattr(torch, self.config.dtype)
        where: dict[str, Any] = {}  # quantised, it would go onto a GPU, whatever was asked for, and could not leave it
        if "quantization_config" in PreTrainedConfig.get_config_dict(column.model_dir)[0]:
            where["device_map"] = {"": self.device.type}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                column.model_dir, dtype=dtype, trust_remote_code=self.config.trust_remote_code, **where
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{column.model_dir}: cannot be loaded ({reason})") from None
        return (model if where else model.to(self.device.type)).eval()

    @contextlib.contextmanager
    def progress(self, text: str) -> Iterator[Callable[[int, int], None]]:
        """Yields tell(done, new total)."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(text, total=0)

            def tell(done: int, more: int = 0) -> None:
                bar.update(task, advance=done, total=(bar.tasks[0].total or 0) + more)

            yield tell


def main(config: EvalConfig) -> int:
    """1 where an answer to a regression prompt is not the accepted one. Raises UserError."""
    started = time.perf_counter()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as work:
        job = prepare(config, Path(work))
        _announce(job)
        results = {column.name: measure(job, column) for column in job.columns}
    comparison = compare_columns(job, results)
    write_json(job.folder / "comparison.json", comparison)
    job.console.print()
    if job.units or job.shards:
        job.console.print(comparison_table(comparison))
        for row in comparison["tasks"]:
            for name, score in row["scores"].items():
                if score["num_cut"]:
                    what = "prompts" if row["kind"] == "generate" else "choices"
                    text = f"{score['num_cut']:,} {what} did not fit into the context and lost their beginning"
                    job.console.print(f"cut       {row['name']}, {name}: {text}", markup=False)
    if job.prompts:
        show(comparison["regression"], job.console)
    _finish(job, comparison, time.perf_counter() - started)
    answers = [a for prompt in comparison.get("regression", {}).get("prompts", []) for a in prompt["answers"].values()]
    return int(not config.accept and any(answer["changed"] for answer in answers))


def prepare(config: EvalConfig, work: Path) -> Job:
    """All that can be wrong before a model is loaded. Raises UserError."""
    _check(config)
    columns = find_columns([str(name) for name in config.models])
    tokenizers = {c.name: load_tokenizer(c.model_dir, config.trust_remote_code, "models") for c in columns}
    for tokenizer in tokenizers.values():
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    asking = decide(columns, tokenizers, config.apply_chat_template)
    lengths = {column.name: config.max_length or _context(column, config) for column in columns}
    shards, trained_length = find_shards(config, columns)
    units = _units(config)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(120, 60 + 32 * len(columns))  # a log file: room for the table
    if not units and not shards and not config.regression:
        raise UserError("tasks is missing; name some: --tasks core, or --tasks gsm8k --data_dir folder")
    for column in columns:
        check_owner(Path(config.output_dir), column)
    return Job(
        config=config,
        folder=Path(config.output_dir),
        device=detect(config.use_cpu, None),
        console=console,
        columns=columns,
        tokenizers=tokenizers,
        asking=asking,
        lengths=lengths,
        units=units,
        manager=_manager(config, units, work),
        shards=shards,
        window=min([config.window or trained_length or 1024, *lengths.values()]),
        prompts=load_prompts(Path(config.regression)) if config.regression else [],
    )


def _check(config: EvalConfig) -> None:
    if not config.models:
        raise UserError("models is missing; name run folders, model folders or Hub ids: llmkit eval runs/toy/sft ...")
    for key in ("limit", "batch_size", "max_length", "window"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"{key}={value}; allowed: 1 or more")
    if config.num_fewshot is not None and config.num_fewshot < 0:
        raise UserError(f"num_fewshot={config.num_fewshot}; allowed: 0 or more")
    if config.accept and not config.regression:
        raise UserError("accept=true has no effect without regression; name a regression.yaml, or remove it")


def _units(config: EvalConfig) -> list[str]:
    names = config.tasks.split(",") if isinstance(config.tasks, str) else config.tasks
    return task_index.expand([str(name).strip() for name in names if str(name).strip()])


def _manager(config: EvalConfig, units: list[str], work: Path) -> Any:
    if config.data_dir and not Path(config.data_dir).is_dir():
        raise UserError(f"data_dir={config.data_dir!r}: no such folder; name one with files like TASK_test.jsonl")
    if not units:
        return None
    data_dir = Path(config.data_dir) if config.data_dir else None
    manager = task_index.make_manager(units, config.include_path, data_dir, work)
    task_index.check_code(manager, units, config.allow_code_execution)
    return manager


def _context(column: Column, config: EvalConfig) -> int:
    """Tokens of context, from the names that lm-eval knows."""
    try:
        found = AutoConfig.from_pretrained(column.model_dir, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{column.model_dir}: cannot be loaded ({str(error).splitlines()[0]})") from None
    text_config = found.get_text_config()
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    return next((value for name in names if (value := getattr(text_config, name, None))), CONTEXT)


def find_shards(config: EvalConfig, columns: list[Column]) -> tuple[dict[str, tuple[Source, Path]], int | None]:
    """Validation shards by name with their data_dir, and the context they were trained with; those of the runs that
    the columns come from where the recipe names none."""
    if config.eval_datasets:
        sources = parse_sources(config.eval_datasets, "eval_datasets")
        return {n: (s, Path(".")) for n, s in zip(eval_shard_names(sources), sources, strict=True)}, None
    found: dict[str, tuple[Source, Path]] = {}
    length = None
    for column in columns:
        for run in lineage(Path(column.run)) if column.run else []:
            if manifest_of(run).get("stage") != "pretrain" or not (run / "recipe.yaml").is_file():
                continue
            recipe = recipes.read_recipe(run / "recipe.yaml")
            sources = parse_sources(recipe.get("eval_datasets") or [], "eval_datasets")
            place = Path(recipe.get("data_dir") or ".")
            found |= {n: (s, place) for n, s in zip(eval_shard_names(sources), sources, strict=True)}
            length = min(length or recipe["max_length"], recipe["max_length"])
    return found, length


def _announce(job: Job) -> None:
    """Who is asked, and how: the same for everyone."""
    say = job.console.print
    for column in job.columns:
        came = f" (from {column.parent})" if column.parent else ""
        say(f"column    {column.name}{came}: {column.model_dir}  {column.fingerprint[:12]}", markup=False)
    chat = "tasks that generate are asked as chats" if job.asking.templates else "plain text for all tasks"
    if job.asking.scores_in_chat:
        chat = "all tasks are asked as chats"
    bos = {str(value) for value in job.asking.bos.values()}
    opens = f"{bos.pop()} opens a prompt" if len(bos) == 1 else f"prompts open with {job.asking.bos}"
    say(f"asked     {chat}; {opens.replace('None opens a prompt', 'no BOS')}", markup=False)
    for column in job.columns:
        opened = manifest_of(Path(column.run)).get("documents_open_with_bos") if column.run else None
        if opened and job.asking.bos[column.name] is None:
            say(f"WARNING   {column.name}: training opened texts with a BOS, its tokenizer adds none", markup=False)
    if job.shards:
        say(f"texts     {', '.join(job.shards)}: windows of {job.window} tokens", markup=False)
    say(f"machine   {job.device}", markup=False)


def _finish(job: Job, comparison: dict[str, Any], wall_s: float) -> None:
    """recipe.yaml, manifest.json and result.json, as of every stage."""
    write_text(job.folder / "recipe.yaml", recipes.dump(job.config))
    write_json(
        job.folder / "manifest.json", {**whence("eval"), "hardware": str(job.device), "parent": job.columns[-1].run}
    )
    metrics = {
        f"{row['name']}/{name}": score["value"]
        for row in [*comparison["tasks"], *comparison["groups"]]
        for name, score in row["scores"].items()
    }
    result = Result(
        stage="eval",
        status="ok",
        model_dir=job.columns[-1].model_dir,
        parent=job.columns[-1].run,
        wall_s=round(wall_s, 2),
        cpu_s=round(cpu_seconds(), 2),
        tokens=0,
        shards={},
        metrics=metrics,
    )
    write_json(job.folder / "result.json", dataclasses.asdict(result))
    job.console.print(f"\nwritten   {job.folder / 'comparison.json'}", markup=False)
