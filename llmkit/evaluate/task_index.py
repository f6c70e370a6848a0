"""Which tasks: stock ones of lm-eval by name, ours, a folder of yours; their data from the Hub or from local files.

Owns names and sets, and running a stock definition on local files, unchanged but for where its rows come from.

    manager = make_manager(names, include_path=None, data_dir=Path("data"));  load(manager, ["gsm8k"])["tasks"]

Leaves out asking the model (harness.py).
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import UserError
from .harness import quiet

OURS = Path(__file__).parent / "tasks"
SETS = {  # quick: minutes on one GPU; full: what papers compare
    "core": ["arc_easy", "piqa", "hellaswag", "winogrande", "lambada_openai"],
    "full": [
        "arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "lambada_openai", "openbookqa", "boolq",
        "mmlu", "gsm8k", "humaneval",
    ],
    "toyworld": ["toyworld_recall", "toyworld_counting", "toyworld_answers"],
}  # fmt: skip
SHUT_OFF = ("humaneval",)  # run by coderunner.py
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def expand(names: list[str]) -> list[str]:
    """Sets by their tasks, each task once."""
    return list(dict.fromkeys(task for name in names for task in SETS.get(name, [name])))


def make_manager(names: list[str], include_path: str | None, data_dir: Path | None, work: Path) -> Any:
    """lm-eval's TaskManager that knows all of `names`; stock definitions read data_dir's files where it has them.

    The stock index (14,000 tasks) takes seconds and is read only where it is needed. `work` gets the definitions that
    point at local files. Raises UserError for unknown names.
    """
    quiet()
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise UserError(f"include_path={include_path!r}: no such folder; name one with task definitions (.yaml)")
    mine = [str(OURS), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=mine, include_defaults=False)
    if any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=mine, include_defaults=True)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*SETS, *manager.all_tasks], n=3, cutoff=0.6)
            raise UserError(
                f"tasks: {name!r} is unknown; "
                + (f"nearest: {', '.join(near)}" if near else "`lm-eval ls tasks` lists the stock ones")
            )
    if data_dir is not None:
        work.mkdir(parents=True, exist_ok=True)
        for task in dict.fromkeys(leaf for name in names for leaf in leaves(name, manager.task_index)):
            _read_locally(task, manager, data_dir, work)
    return manager


def leaves(name: str, index: Any) -> Iterator[str]:
    """The tasks that a group or tag stands for; of a task itself."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = index.get(name)
    if entry is None or entry.kind.name in ("TASK", "PY_TASK"):
        yield name
    elif entry.kind.name == "TAG":
        for tagged in sorted(entry.tags):
            yield from leaves(tagged, index)
    else:
        members = (entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)).get("task") or []
        for member in [members] if isinstance(members, str) else members:
            yield from _member_leaves(member, index)


def _member_leaves(member: Any, index: Any) -> Iterator[str]:
    if isinstance(member, str):
        yield from leaves(member, index)
    elif isinstance(member.get("task"), list):
        for inner in member["task"]:
            yield from _member_leaves(inner, index)
    else:
        yield from leaves(member.get("task") or member.get("group"), index)


def _read_locally(name: str, manager: Any, data_dir: Path, work: Path) -> None:
    """Points a task at its files in data_dir, where the rows that it scores are there."""
    import dataclasses

    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name != "TASK" or entry.yaml_path is None:
        return
    stock = load_yaml(entry.yaml_path, resolve_func=False)
    if "custom_dataset" in stock or not stock.get("dataset_path"):
        return
    scored = stock.get("test_split") or stock.get("validation_split")
    splits = list(dict.fromkeys(stock[key] for key in SPLITS if stock.get(key)))
    files = {split: found for split in splits if (found := find_file(name, stock, split, split == scored, data_dir))}
    if scored not in files:
        return
    own = {key: stock.get(key) if stock.get(key) in files else None for key in SPLITS}
    kinds = {SUFFIXES[path.suffix] for path in files.values()}
    if len(kinds) > 1:
        shown = ", ".join(str(path) for path in files.values())
        raise UserError(f"data_dir={str(data_dir)!r}: the files of {name} are of several kinds ({shown}); use one")
    definition = {
        "include": str(Path(entry.yaml_path).resolve()),
        "task": name,
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
        "tag": None,
        **own,
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(definition, sort_keys=False), encoding="utf-8")
    manager.task_index[name] = dataclasses.replace(entry, yaml_path=path, cfg=None)


def find_file(name: str, stock: dict[str, Any], split: str, is_scored: bool, data_dir: Path) -> Path | None:
    """TASK_SPLIT.jsonl, DATASET_SPLIT.jsonl, DATASET_CONFIG_SPLIT.jsonl, or the layout of a Hub data set; .json,
    .parquet and .csv too. What is scored may be TASK.jsonl alone."""
    dataset, config = str(stock["dataset_path"]), stock.get("dataset_name")
    stems = [name, Path(dataset).name] + ([f"{Path(dataset).name}_{config}"] if config else [])
    names = [f"{stem}_{split}" for stem in stems] + ([name] if is_scored else [])
    for stem in names:
        for suffix in SUFFIXES:
            if (path := data_dir / f"{stem}{suffix}").is_file():
                return path
    for folder in (data_dir / dataset, data_dir / Path(dataset).name):
        for inside in (folder / str(config), folder / "data", folder) if config else (folder / "data", folder):
            found = [path for path in sorted(inside.glob(f"{split}*")) if path.suffix in SUFFIXES]
            if found:
                return found[0]
    return None


def _is_ours(definition: Path) -> bool:
    """Whether a task's definition is one of this package, or one that only points it at local files."""
    import yaml

    if definition.resolve().is_relative_to(OURS):
        return True
    written = yaml.load(definition.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    keys = {"include", "task", "dataset_path", "dataset_name", "dataset_kwargs", "tag", *SPLITS}
    return set(written) <= keys and "include" in written and Path(written["include"]).is_relative_to(OURS)


def check_code(manager: Any, names: list[str], is_allowed: bool) -> None:
    """Raises UserError for tasks that run what the model wrote: where that was not allowed, or cannot be shut off."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for task in dict.fromkeys(leaf for name in names for leaf in leaves(name, manager.task_index)):
        entry = manager.task_index.get(task)
        path = entry and entry.yaml_path
        if not path or not load_yaml(path, resolve_func=False).get("unsafe_code"):
            continue
        if not _is_ours(Path(path)):
            raise UserError(
                f"task {task!r} runs code that the model wrote with all your rights; allowed: {', '.join(SHUT_OFF)}, "
                "whose programs are shut off from this machine"
            )
        if not is_allowed:
            raise UserError(
                f"task {task!r} runs code that the model wrote; if you want that, add --allow_code_execution: programs "
                "are shut off from this machine, or the task is refused"
            )
        from .coderunner import probe

        probe()


def load(manager: Any, names: list[str]) -> dict[str, Any]:
    """lm-eval's {tasks, groups, group_map}, data read. Raises UserError where the data is out of reach."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return manager.load(names)
    except UserError:
        raise
    except Exception as error:  # from pyarrow to httpx
        name = next((n for n in names if _fails(manager, n)), names[0])
        leaf = next(iter(leaves(name, manager.task_index)))
        if not isinstance(error, (OSError, datasets.exceptions.DatasetsError)):  # OSError: of the network too
            where = getattr(manager.task_index[leaf], "yaml_path", None)
            raise UserError(f"task {name!r}: cannot be set up ({_reason(error)}); mend {where}") from error
        raise UserError(
            f"task {name!r}: its data cannot be read ({_reason(error)}); put it into a folder as "
            f"{leaf}_test.jsonl (rows as on the Hub; few-shot examples in {leaf}_train.jsonl) and name it by --data_dir"
        ) from None


def _fails(manager: Any, name: str) -> bool:
    try:
        manager.load([name])
    except Exception:
        return True
    return False


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def describe_data(task: Any) -> str:
    """Where a task's rows come from, as reports name it."""
    config = task.config
    files = (config.dataset_kwargs or {}).get("data_files") if isinstance(config.dataset_kwargs, dict) else None
    if files:
        return ", ".join(files.values()) if isinstance(files, dict) else json.dumps(files)
    return " ".join(str(part) for part in (config.dataset_path, config.dataset_name) if part) or "builtin"
