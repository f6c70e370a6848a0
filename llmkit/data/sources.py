"""Where text comes from: builtin/toyworld, local files, Hub data sets.

Owns reading. Every source yields documents (text, log-probability or None); nothing is cleaned, dropped or changed.

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
from pathlib import Path
from typing import Any, NamedTuple

from ..config import UserError, _allowed, _fits
from . import toyworld

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
    columns: list | None = None  # the one text column; default `text`
    fraction: float | None = None  # share of the packed rows in a mixture
    sample_by: str = "document"  # text files: document | paragraph | line, as in `datasets`
    streaming: bool = False  # Hub: do not download the whole set first
    shard: str | None = None  # the name of a validation shard in reports


def _ignored_keys(source: Source) -> list[str]:
    """Keys that were given and would have no effect on this kind of source."""
    if source.path.startswith("builtin/"):
        unused = ["data_files", "columns", "sample_by", "streaming"]
    elif builder := _builder(source):
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


def _split(split: str, where: str) -> tuple[str, str | None, str | None]:
    """`train[:90%]` -> ("train", None, "90%")."""
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if not match:
        raise UserError(f"{where}: split={split!r} is not understood; allowed: e.g. train, train[:90%], train[100:200]")
    return match.group(1), match.group(2), match.group(3)


def _bound(bound: str | None, total: int, default: int) -> int:
    if bound is None:
        return default
    return total * int(bound[:-1]) // 100 if bound.endswith("%") else min(int(bound), total)


def _inside(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder in order of their names."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    return [path] if path.is_file() else []


def _files(source: Source, data_dir: Path) -> list[Path]:
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


def _builder(source: Source) -> str | None:
    """text, json, csv or parquet for local files; None for a Hub id."""
    if source.path in BUILDERS:
        if source.data_files is None:
            raise UserError(f"path={source.path!r} reads local files: name them with data_files")
        return source.path
    suffix = Path(source.path).suffix.lower()
    if source.data_files is None and suffix in SUFFIXES:
        return SUFFIXES[suffix]
    return None


def read_text(path: Path) -> str:
    """The file as UTF-8 with its newlines as they are; raises UserError naming the byte that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8; "
            "convert the file, e.g. `iconv -f latin1 -t utf-8`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _text_documents(source: Source, paths: list[Path]) -> Iterator[str]:
    name, start, stop = _split(source.split, source.path)
    if name != "train":
        raise UserError(f"split={source.split!r}: local text files have only `train`; slice it, e.g. train[90%:]")
    if source.sample_by == "document" and len(paths) == 1:
        text = read_text(paths[0])
        yield text[_bound(start, len(text), 0) : _bound(stop, len(text), len(text))]
        return
    docs: list[str] = []
    for path in paths:
        text = read_text(path)
        if source.sample_by == "line":
            docs += [line for line in re.split(r"\r\n|\r|\n", text) if line]  # splitlines() cuts at U+2028, \f, ... too
        elif source.sample_by == "paragraph":
            docs += [part for part in re.split(r"\r?\n\s*\n", text) if part.strip()]
        else:
            docs.append(text)
    yield from docs[_bound(start, len(docs), 0) : _bound(stop, len(docs), len(docs))]


def _rows(source: Source, builder: str | None, paths: list[Path]) -> Any:
    """A `datasets` data set; its own errors become one line that says where to look."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if builder is None:
            return datasets.load_dataset(
                source.path, source.name, data_files=source.data_files, split=source.split, streaming=source.streaming
            )
        return datasets.load_dataset(builder, data_files=[str(p) for p in paths], split=source.split)
    except Exception as error:  # dozens of types, from pyarrow to aiohttp
        for path in paths:
            if builder in ("json", "csv"):
                read_text(path)  # a clearer reason, where it is the encoding
        reason = (str(error.__cause__ or error).strip() or "nothing in it").splitlines()[0]
        if builder is None:
            raise UserError(
                f"path={source.path!r}: could not be loaded from the Hub ({reason}); check the id and the network, or "
                "point at a local copy with `path: json|csv|parquet|text` and `data_files:`"
            ) from None
        raise UserError(f"{paths[0]}: cannot be read as {builder} ({reason}); check the file") from None


def _where(source: Source) -> str:
    return f"path={source.path!r}" + (f" data_files={source.data_files!r}" if source.data_files is not None else "")


def _column(source: Source, row: dict) -> str:
    wanted = source.columns or ["text"]
    if len(wanted) != 1:
        raise UserError(f"{_where(source)}: columns={wanted!r}; pretraining reads exactly one text column")
    if wanted[0] not in row:
        raise UserError(f"{_where(source)}: no column {wanted[0]!r}; found {', '.join(row)}; set `columns:`")
    return wanted[0]


def documents(source: Source, data_dir: Path) -> Iterator[Doc]:
    """Every document of a source, in order. Raises UserError for what is missing, unreadable or not text."""
    if source.path.startswith("builtin/"):
        yield from _toyworld(source)
        return
    builder = _builder(source)
    paths = _files(source, data_dir) if builder else []
    if builder == "text":
        yield from (Doc(text, None) for text in _text_documents(source, paths))
        return
    column = None
    try:
        for i, row in enumerate(_rows(source, builder, paths)):
            column = column or _column(source, row)
            text = row[column]
            if not isinstance(text, str):
                raise UserError(f"{_where(source)} row {i}: {column}={text!r} is not text; drop or mend that row")
            yield Doc(text, None)
    except UnicodeDecodeError as error:  # pyarrow finds it only when the row is read
        for path in paths if builder != "parquet" else []:
            read_text(path)
        raise UserError(f"{_where(source)}: not UTF-8 ({error.reason}); convert the text") from None


def _toyworld(source: Source) -> Iterator[Doc]:
    if source.path != "builtin/toyworld":
        raise UserError(f"path={source.path!r}: no such built-in corpus; allowed: builtin/toyworld")
    kinds = list(toyworld.KINDS) if source.name is None else [source.name]
    if kinds[0] not in toyworld.KINDS:
        raise UserError(
            f"builtin/toyworld: name={source.name!r}; allowed: {', '.join(toyworld.KINDS)}, or none for all"
        )
    split, start, stop = _split(source.split, source.path)
    if split not in ("train", "validation") or stop is None or "%" in (start or "") + stop:
        raise UserError(
            f"builtin/toyworld: split={source.split!r}; it never ends, so say how many documents, "
            "e.g. train[:30000] or validation[:500]"
        )
    for i in range(int(start or 0), int(stop)):
        yield Doc(*toyworld.document(kinds[i % len(kinds)], split, i))


def _hub_revision(source: Source) -> str:
    """The commit of a streamed data set, or the fingerprint of a downloaded one."""
    if not source.streaming:
        return str(_rows(source, None, [])._fingerprint)
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
    elif builder := _builder(source):
        for path in _files(source, data_dir):
            digest.update(builder.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update(_hub_revision(source).encode())
    return digest.hexdigest()
