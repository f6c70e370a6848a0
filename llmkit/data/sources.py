"""Where text comes from: builtin/toyworld, local files, Hub data sets.

Owns what an entry of a recipe names, and its documents (text, log-probability or None): nothing is cleaned, dropped or
changed. Leaves out how files are read (read.py).

    source = Source(path="text", data_files="tiny_shakespeare.txt", split="train[:90%]")
    for text, log_prob in documents(source, data_dir=Path("data")): ...

A text file is one document unless `sample_by: line` or `paragraph` says otherwise; a percentage split of one document
counts its characters. No silent fallback: what cannot be reached is an error that says how to point at a local copy.
"""

import dataclasses
import glob
import hashlib
import json
import re
import typing
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..config import UserError, _allowed, _fits
from . import toyworld

LONGEST_DOCUMENT = 1 << 30  # bytes
SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
BUILDERS = tuple(dict.fromkeys(SUFFIXES.values()))


class Doc(NamedTuple):
    text: str
    log_prob: float | None  # nats, where the source knows it


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of `datasets:` or `eval_datasets:`; the names are those of TRL's DatasetConfig, plus three of ours."""

    path: str
    name: str | None = None
    data_files: str | list | None = None
    split: str = "train"
    columns: list | dict | None = None  # pretraining: the one text column, default `text`; sft: {theirs: ours}
    fraction: float | None = None  # share of the packed rows in a mixture
    sample_by: str = "document"  # text files: document | paragraph | line, as in `datasets`
    streaming: bool = False  # Hub: do not download the whole set first
    shard: str | None = None  # the name of a validation shard in reports


def _ignored_keys(source: Source) -> list[str]:
    """Keys that were given and would have no effect on this kind of source."""
    if source.path.startswith("builtin/"):
        unused = ["data_files", "columns", "sample_by", "streaming"]
    elif builder := find_builder(source):
        unused = ["name", "streaming", "columns" if builder == "text" else "sample_by"]
    else:
        unused = ["sample_by"]
    defaults = {field.name: field.default for field in dataclasses.fields(Source)}
    return [key for key in unused if getattr(source, key) != defaults[key]]


def parse_sources(entries: list, key: str) -> list[Source]:
    """The entries of a recipe's list; raises UserError naming the entry and what is wrong with it."""
    hints = typing.get_type_hints(Source)
    sources = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise UserError(
                f"{key}[{i}]={entry!r}: expected a mapping with a `path`, e.g. {{path: text, data_files: x.txt}}"
            )
        for name, value in entry.items():
            if name not in hints:
                raise UserError(f"{key}[{i}]: unknown key {name!r}; allowed: {', '.join(hints)}")
            if not _fits(value, hints[name]):
                found = type(value).__name__
                raise UserError(f"{key}[{i}]: {name}={value!r} is {found}; allowed: {_allowed(hints[name])}")
        if entry.get("sample_by", "document") not in ("document", "paragraph", "line"):
            raise UserError(f"{key}[{i}]: sample_by={entry['sample_by']!r}; allowed: document, paragraph, line")
        fraction = entry.get("fraction")
        if fraction is not None and fraction <= 0:
            raise UserError(f"{key}[{i}]: fraction={fraction!r}; allowed: a number above 0")
        sources.append(Source(**entry))
        for name in _ignored_keys(sources[-1]):
            raise UserError(f"{key}[{i}]: {name}={entry[name]!r} has no effect on path={entry['path']!r}; remove it")
    with_fraction = [source.fraction is not None for source in sources]
    if any(with_fraction) and not all(with_fraction):
        raise UserError(f"{key}: give `fraction` for every entry or for none")
    return sources


def eval_shard_names(eval_sources: list[Source]) -> list[str]:
    """Raises UserError when two shards have one name."""
    names = [source.shard or source.name or f"validation{i}" for i, source in enumerate(eval_sources)]
    if len(set(names)) < len(names):
        raise UserError(f"eval_datasets: shard names {names} are not all different; set `shard:` on each")
    return names


def parse_split(split: str, where: str) -> tuple[str, str | None, str | None]:
    """`train[:90%]` -> ("train", None, "90%")."""
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if not match:
        raise UserError(f"{where}: split={split!r} is not understood; allowed: e.g. train, train[:90%], train[100:200]")
    return match.group(1), match.group(2), match.group(3)


def bound(text: str | None, total: int, default: int) -> int:
    """One end of a slice as a number: `90%` of the total, or itself; the default where none is given."""
    if text is None:
        return default
    return total * int(text[:-1]) // 100 if text.endswith("%") else min(int(text), total)


def suffix(path: Path) -> str:
    """`.jsonl` of x.jsonl and of x.jsonl.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _inside(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder in order of their names."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if suffix(file) in SUFFIXES and file.is_file())
    return [path] if path.is_file() else []


def find_files(source: Source, data_dir: Path) -> list[Path]:
    patterns = source.data_files if source.data_files is not None else source.path
    paths: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = sorted(glob.glob(str(data_dir / Path(pattern).expanduser()), recursive=True))
        found = [file for name in matches for file in _inside(Path(name))]
        if not found:
            raise UserError(
                f"data_files={pattern!r}: no such file under {str(data_dir)!r}; "
                "put it there or name another folder with --data_dir"
            )
        paths += found
    return paths


def find_builder(source: Source) -> str | None:
    """text, json, csv or parquet for local files; None for a Hub id."""
    if source.path in BUILDERS:
        if source.data_files is None:
            raise UserError(f"path={source.path!r} reads local files: name them with data_files")
        return source.path
    return SUFFIXES.get(suffix(Path(source.path))) if source.data_files is None else None


def hub_rows(source: Source) -> Any:
    """A `datasets` data set of the Hub; its own errors become one line that says where to look."""
    keys = ("path", "name", "data_files", "split", "streaming")
    return _load_hub(json.dumps({key: getattr(source, key) for key in keys}))


@lru_cache(8)
def _load_hub(arguments: str) -> Any:
    """Once for each process: a corpus has a share for every 10,000 rows, and loading takes seconds."""
    import datasets

    datasets.disable_progress_bars()
    source = Source(**json.loads(arguments))
    try:
        return datasets.load_dataset(
            source.path, source.name, data_files=source.data_files, split=source.split, streaming=source.streaming
        )
    except Exception as error:  # dozens of types, from pyarrow to aiohttp
        reason = (str(error.__cause__ or error).strip() or "nothing in it").splitlines()[0]
        raise UserError(
            f"path={source.path!r}: could not be loaded from the Hub ({reason}); check the id and the network, or "
            "point at a local copy with `path: json|csv|parquet|text` and `data_files:`"
        ) from None


def documents(source: Source, data_dir: Path) -> Iterator[Doc]:
    """Every document of a source, in order. Raises UserError for what is missing, unreadable or not text."""
    from .read import PROBLEMS, plan_shares, read_share

    shares, total = plan_shares(source, data_dir)
    number = 0
    for share in shares:
        for row in read_share(source, share, LONGEST_DOCUMENT, total):
            if row.problem:
                raise UserError(
                    f"{row.where}: {PROBLEMS[row.problem]} ({row.note}); or leave such rows out by `llmkit data`"
                )
            if not row.text and source.sample_by == "line":
                continue  # between lines there is nothing, as in `datasets`
            number += 1
            yield Doc(row.text, row.log_prob)
    if not number:
        raise UserError(f"{describe(source)}: nothing in it; point at a file or split that has text")


def describe(source: Source) -> str:
    """A source as complaints and reports name it."""
    return " ".join(str(part) for part in (source.path, source.name, source.data_files, source.split) if part)


def toyworld_range(
    source: Source, names: tuple[str, ...] = tuple(toyworld.KINDS), splits: tuple[str, ...] = ("train", "validation")
) -> tuple[list[str], str, int, int]:
    """Kinds, split, first and last document of a toyworld source; raises UserError for what there is not.

    `names`: kinds of text, all where the source names none; or the kinds of rows of `toychat.py`.
    """
    if source.path != "builtin/toyworld":
        raise UserError(f"path={source.path!r}: no such built-in corpus; allowed: builtin/toyworld")
    has_text = names[0] in toyworld.KINDS
    kinds = list(names) if source.name is None and has_text else [source.name or ""]
    if kinds[0] not in names:
        raise UserError(
            f"builtin/toyworld: name={source.name!r}; allowed: {', '.join(names)}"
            + (", or none for all" if has_text else "")
        )
    split, start, stop = parse_split(source.split, source.path)
    if split not in splits or stop is None or "%" in (start or "") + stop:
        raise UserError(
            f"builtin/toyworld: split={source.split!r}; it never ends, so say how many "
            f"{'documents' if has_text else 'rows'}, e.g. train[:30000] or validation[:500]"
        )
    return kinds, split, int(start or 0), int(stop)


def _hub_revision(source: Source) -> str:
    """The commit of a streamed data set, or the fingerprint of a downloaded one."""
    if not source.streaming:
        return str(hub_rows(source)._fingerprint)
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source.path).sha)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"path={source.path!r}: cannot be streamed from the Hub ({reason}); check id and network"
        ) from None


def source_fingerprint(source: Source, data_dir: Path) -> str:
    """SHA-256 that changes with the documents: file contents, Hub revision, or the code of toyworld."""
    described = dataclasses.asdict(dataclasses.replace(source, fraction=None, shard=None))
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    if source.path.startswith("builtin/"):
        digest.update(Path(toyworld.__file__).read_bytes())
    elif builder := find_builder(source):
        for path in find_files(source, data_dir):
            digest.update(builder.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update(_hub_revision(source).encode())
    return digest.hexdigest()
