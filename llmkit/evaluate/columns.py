"""What is evaluated: the artefact on this disk, named by its bytes.

Owns a column of the comparison: where its files are, which run they came from, and the hash that its results carry.

    columns = find_columns(["runs/toy/pretrain", "runs/toy/sft"]);  columns[1].parent == "pretrain"

A folder always wins over a Hub id of the same name. Leaves out how a model is asked (asking.py) and loading it.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..config import UserError, read_recipe
from ..run import resolve_model_dir

# what decides the answers of a model folder
PARTS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.py", "*.model", "*.txt")
WEIGHTS = ("*.safetensors", "*.bin")
RECORDS = ("manifest.json", "result.json", "published.json")  # beside the weights where the model folder is the run


@dataclasses.dataclass(frozen=True)
class Column:
    name: str
    model_dir: str
    run: str | None  # the run folder that it belongs to
    parent: str | None  # name of the nearest ancestor among the columns
    fingerprint: str
    num_bytes: int  # of the weights


def find_columns(names: list[str]) -> list[Column]:
    """One column for each name, in their order. Raises UserError for what is no model, or is named twice."""
    folders = [_local(name) for name in names]
    labels = _labels(names, folders)
    runs = [run_of(folder) for folder in folders]
    known = {run.resolve(): label for run, label in zip(runs, labels, strict=True) if run}
    known |= {folder.resolve(): label for folder, label in zip(folders, labels, strict=True)}
    columns = []
    for label, folder, run in zip(labels, folders, runs, strict=True):
        columns.append(
            Column(
                label,
                str(folder),
                str(run) if run else None,
                _ancestor(run, known) if run else None,
                fingerprint(folder),
                sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern)),
            )
        )
    for i, column in enumerate(columns):
        for other in columns[:i]:
            if Path(column.model_dir).resolve() == Path(other.model_dir).resolve():
                raise UserError(f"models: {names[i]!r} is named twice; name every model once")
    return columns


def _local(name: str) -> Path:
    """The folder with the model's files; those of a Hub id are fetched. Raises UserError."""
    folder = Path(resolve_model_dir(name))
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"models: {name!r} is an adapter; write one model of it and its base first: "
                f"llmkit merge --model_name_or_path {name} --output_dir merged"
            )
        if not (folder / "config.json").is_file():
            hint = "; its adapter/ has to be merged first: llmkit merge" if (folder / "adapter").is_dir() else ""
            raise UserError(f"models: {name!r} has no config.json and no model/; name a run or model folder{hint}")
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"models: {name!r}: no such folder; name a run folder, a model folder or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(PARTS)))
    except Exception as error:  # a dozen types, from httpx to its own
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"models: {name!r} is no folder here and cannot be fetched from the Hub ({reason}); check the name"
        ) from None


def _labels(names: list[str], folders: list[Path]) -> list[str]:
    """The shortest end of each path that no other shares; of a Hub id the whole of it."""
    parts = []
    for name, folder in zip(names, folders, strict=True):
        is_local = Path(name).expanduser().exists()
        path = folder.absolute().parts if is_local else tuple(name.split("/"))
        parts.append(path[:-1] if is_local and path[-1] == "model" and len(path) > 1 else path)
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["-".join(part.strip("/") for part in path[-depth:]) for path in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def run_of(folder: Path) -> Path | None:
    """Of a model folder: itself or what is above it, where a manifest says so."""
    for above in (folder, folder.parent, *(folder.parent.parents[:2])):
        if manifest_of(above).get("stage"):
            return above
    return None


def manifest_of(run: Path) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        found = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def started_in(run: Path) -> Path:
    """The folder that the paths of a run start from: `output_dir` of its recipe ends in it; where it does not, here."""
    try:
        name = Path(str(read_recipe(run / "recipe.yaml").get("output_dir") or "")).parts
    except UserError:
        return Path()
    at = run.resolve()
    start = at.parents[len(name) - 1] if 0 < len(name) < len(at.parts) and at.parts[-len(name) :] == name else Path()
    return Path() if start == Path.cwd() else start


def lineage(run: Path) -> list[Path]:
    """The run and the runs that it came from, the nearest first; as far as they are still there."""
    found: list[Path] = []
    at: Path | None = run
    while at and at.is_dir() and at.resolve() not in [path.resolve() for path in found]:
        found.append(at)
        named = manifest_of(at).get("parent")
        parent = (started_in(at) / named if (started_in(at) / named).is_dir() else Path(named)) if named else None
        at = (run_of(parent) or parent) if parent else None
    return found


def _ancestor(run: Path, known: dict[Path, str]) -> str | None:
    own = known.get(run.resolve())
    for above in lineage(run)[1:]:
        for place in (above, above / "model"):
            if (label := known.get(place.resolve())) and label != own:
                return label
    return None


def fingerprint(folder: Path) -> str:
    """SHA-256 of names and contents of all that decides what the model answers."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in PARTS for path in folder.glob(pattern)}):
        if path.name in RECORDS:
            continue
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
