"""Reading that survives bad rows: every row of a source, or one line that says what is wrong with it and where.

Owns how the files of a corpus are cut into shares that tasks read side by side, and what counts as a bad row.

    shares, _ = plan_shares(source, data_dir)             # in the order of the corpus
    for row in read_share(source, share, max_doc_bytes):  # Row(where, text, log_prob, problem, note)

Lines of text and JSON files are cut at line ends; a Parquet file by row groups; anything packed or nested is one share.
Memory is that of one row; of a JSON array that of the whole file. Leaves out what is done about a problem.
"""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..config import UserError
from . import toyworld
from .encode import num_utf8_bytes
from .sources import Source, bound, describe, find_builder, find_files, hub_rows, parse_split, toyworld_range

EVERY = "\x1e"  # as a column: all texts of a row, joined by this sign
SHARE_BYTES = 16 << 20
TOYWORLD_SHARE, TOYWORLD_BYTES = 20_000, 280  # documents; of one, about
HUB_SHARE = 10_000  # rows
PROBLEMS = {
    "bad-utf8": "bytes that are not UTF-8; convert the file, e.g. `iconv -f latin1 -t utf-8`",
    "bad-json": "a line that is not a JSON object",
    "bad-csv": "a row that is not CSV",
    "missing-column": "a row without the text column; set `columns:`",
    "null": "a null where the text should be; it would become the word None",
    "not-text": "a value that is no text",
    "too-long": "a document above max_doc_bytes; split it, or raise max_doc_bytes",
    "cut-short": "a compressed file that ends too early; fetch it again",
    "lone-surrogate": "half of a surrogate pair, which UTF-8 cannot hold; fix_encoding: true replaces it",
    "nul-byte": "a NUL character: binary data, or UTF-16 read as something else",
}
FORBIDDEN = ((re.compile("[\ud800-\udfff]"), "lone-surrogate"), (re.compile("\0"), "nul-byte"))


class Row(NamedTuple):
    where: str  # file and line, or source and row
    text: str
    log_prob: float | None = None
    problem: str | None = None  # a key of PROBLEMS
    note: str = ""  # what was found there


def _bad(where: str, problem: str, note: str, text: str = "") -> Row:
    return Row(where, text, None, problem, note)


@dataclasses.dataclass(frozen=True)
class Share:
    """Part of a source that one task reads from front to back."""

    path: str | None  # None: not a file
    start: int = 0  # first byte, row group, document or row; of a stream the shard
    stop: int | None = None  # the end of it; None: all; of a stream the number of its shards
    first_row: int = 0  # lines of the file before it
    before: int = 0  # rows of the source before this file
    size: int = 0  # bytes, about
    name: str = ""  # of the file, from data_dir on


def _kind(source: Source, path: str) -> str:
    """How a file is read: lines | paragraphs | document | jsonl | json | csv | parquet."""
    builder = find_builder(source)
    if builder == "text":
        return {"line": "lines", "paragraph": "paragraphs", "document": "document"}[source.sample_by]
    if builder == "json":
        with _open(path) as file:
            try:
                return "json" if file.read(4096).lstrip()[:1] == b"[" else "jsonl"
            except (EOFError, zlib.error, gzip.BadGzipFile):
                return "jsonl"
    return str(builder)


def _open(path: str) -> Any:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def share_size(num_bytes: int, num_workers: int) -> int:
    """Bytes of a share: so small that all workers have several, within 1 and 16 MB."""
    return max(1 << 20, min(SHARE_BYTES, num_bytes // (16 * num_workers)))


def plan_shares(source: Source, data_dir: Path, share_bytes: int = SHARE_BYTES) -> tuple[list[Share], int]:
    """The shares of a source in its order, and its number of rows (0 where no slice needs it).

    Reads line files once, to count their lines (1.4 to 2.7 GB/s).
    """
    if source.columns is not None and (isinstance(source.columns, dict) or len(source.columns) != 1):
        raise UserError(f"{describe(source)}: columns={source.columns!r}; pretraining reads exactly one text column")
    if source.path.startswith("builtin/"):
        _, _, first, last = toyworld_range(source)
        steps = range(first, last, TOYWORLD_SHARE)
        spans = [(k, min(k + TOYWORLD_SHARE, last)) for k in steps]
        return [Share(None, a, b, size=(b - a) * TOYWORLD_BYTES) for a, b in spans], last - first
    if find_builder(source) is None:
        found = hub_rows(source)
        if source.streaming:
            return [Share(None, k, found.num_shards) for k in range(found.num_shards)], 0
        starts = range(0, len(found), HUB_SHARE)
        return [Share(None, k, min(k + HUB_SHARE, len(found))) for k in starts], len(found)
    if parse_split(source.split, source.path)[0] != "train":
        raise UserError(
            f"{describe(source)}: split={source.split!r}; local files have only `train`; slice it, e.g. train[90%:]"
        )
    shares: list[Share] = []
    rows = 0
    for path in map(str, find_files(source, data_dir)):
        found, count = _file_shares(path, _kind(source, path), share_bytes, "[" in source.split)
        name = os.path.relpath(path, data_dir) if Path(path).is_relative_to(data_dir) else path
        shares += [dataclasses.replace(share, before=rows, name=name) for share in found]
        rows += count
    return shares, rows


def _file_shares(path: str, kind: str, share_bytes: int, is_sliced: bool) -> tuple[list[Share], int]:
    """Shares of a file and how many rows it has; 0 where nobody needs to know."""
    size = Path(path).stat().st_size
    if kind == "parquet":
        import pyarrow.parquet

        try:
            meta = pyarrow.parquet.ParquetFile(path).metadata
        except Exception as error:  # pyarrow's own types
            raise UserError(
                f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}); check the file"
            ) from None
        first, shares = 0, []
        for g in range(meta.num_row_groups):
            group = meta.row_group(g)
            shares.append(Share(path, g, g + 1, first, size=group.total_byte_size))
            first += group.num_rows
        return shares, first
    if kind not in ("lines", "jsonl") or path.endswith(".gz"):
        share = Share(path, size=size)
        rows = _numbered(_file_rows(kind, share, SHARE_BYTES, [])) if is_sliced else iter(())
        return [share], max((number + 1 for number, _ in rows), default=0)
    shares, lines, start = [], 0, 0
    with open(path, "rb") as file:
        position, first = 0, 0
        while chunk := file.read(share_bytes):
            cut = chunk.rfind(b"\n") + 1
            lines += chunk.count(b"\n")
            if cut:
                shares.append(Share(path, start, position + cut, first, size=position + cut - start))
                start, first = position + cut, lines
            position += len(chunk)
    if start < size:  # the last line has no end
        shares.append(Share(path, start, size, first, size=size - start))
        lines += 1
    return shares, lines


def read_share(source: Source, share: Share, max_doc_bytes: int, total_rows: int = 0) -> Iterator[Row]:
    """The rows of a share; a slice of `split` counts rows of the source (`total_rows`), or characters of one text."""
    for row in _unfiled(source, share) if share.path is None else _filed(source, share, max_doc_bytes, total_rows):
        if len(row.text) * 4 > max_doc_bytes and (size := num_utf8_bytes(row.text)) > max_doc_bytes:
            row = _bad(row.where, "too-long", f"{size:,} bytes")
        yield row


def _filed(source: Source, share: Share, max_doc_bytes: int, total_rows: int) -> Iterator[Row]:
    """The rows of a share of a file that its slice names."""
    kind = _kind(source, str(share.path))
    _, start, stop = parse_split(source.split, source.path)
    if kind == "document" and (start or stop) and total_rows <= 1:
        for row in _file_rows(kind, share, max_doc_bytes, []):
            low, high = bound(start, len(row.text), 0), bound(stop, len(row.text), len(row.text))
            yield row._replace(text=row.text[low:high])
        return
    low, high = bound(start, total_rows, 0), bound(stop, total_rows, sys.maxsize)
    for number, row in _numbered(_file_rows(kind, share, max_doc_bytes, list(source.columns or ["text"]))):
        if low <= share.before + share.first_row + number < high:
            yield row


def _numbered(rows: Iterator[Row]) -> Iterator[tuple[int, Row]]:
    """Numbers as slices count: what a lone CR divides, an old Mac's lines, is one line of the file."""
    number, last = -1, None
    for row in rows:
        number += row.where != last
        last = row.where
        yield number, row


def _unfiled(source: Source, share: Share) -> Iterator[Row]:
    """toyworld and the Hub."""
    if source.path.startswith("builtin/"):
        kinds, split, _, _ = toyworld_range(source)
        for i in range(share.start, share.stop or 0):
            text, log_prob = toyworld.document(kinds[i % len(kinds)], split, i)
            yield Row(f"{source.name or 'toyworld'} document {i}", text, log_prob)
        return
    rows, first, where = hub_rows(source), share.start, f"{source.path} row"
    if source.streaming:
        rows, first = rows.shard(num_shards=share.stop, index=share.start), 0
        where = f"{source.path} shard {share.start} row"
    else:
        rows = rows.select(range(share.start, share.stop or len(rows)))
    for i, found in enumerate(rows, first):
        yield _value(found, list(source.columns or ["text"]), f"{where} {i}")


def _file_rows(kind: str, share: Share, max_doc_bytes: int, columns: list) -> Iterator[Row]:
    """Every row of a share of a file, good or bad, in order."""
    path = str(share.path)
    name = share.name
    if kind == "parquet":
        yield from _parquet(share, columns)
        return
    try:
        with _open(path) as file:
            if kind in ("lines", "jsonl"):
                for number, line in enumerate(_lines(file, share, max_doc_bytes), share.first_row + 1):
                    yield from _line(kind, line, columns, f"{name} line {number}")
            elif kind == "paragraphs":
                yield from _paragraphs(file, name, max_doc_bytes)
            elif kind == "document":
                yield _document(file, name, max_doc_bytes)
            elif kind == "json":
                yield from _array(file.read(), columns, name)
            else:
                yield from _csv(file, columns, name)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield _bad(name, "cut-short", str(error))


def _lines(file: IO[bytes], share: Share, limit: int) -> Iterator[bytes | int]:
    """Lines with their ends; the number of bytes of one that is longer than `limit`, of which no more is held."""
    if share.start:
        file.seek(share.start)
    left = sys.maxsize if share.stop is None else share.stop - share.start
    while left > 0 and (line := file.readline(limit + 2)):
        size = len(line)
        while not line.endswith(b"\n") and (rest := file.readline(1 << 20) if size > limit else b""):
            size, line = size + len(rest), rest
        left -= size
        yield line if size <= limit + 2 else size


def _line(kind: str, line: bytes | int, columns: list, where: str) -> Iterator[Row]:
    if isinstance(line, int):
        yield _bad(where, "too-long", f"{line:,} bytes")
    elif kind == "jsonl":
        yield _json(line, columns, where)
    else:
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        parts = text.split(b"\r") if b"\r" in text else [text]  # an old Mac's lines
        for part in parts:
            yield _decoded(part, where)


def _paragraphs(file: IO[bytes], name: str, limit: int) -> Iterator[Row]:
    """Lines up to the next blank one."""
    held: list[bytes] = []
    size = first = 0
    for number, line in enumerate(itertools.chain(_lines(file, Share(None), limit), [b""]), 1):
        if isinstance(line, int) or line.strip():
            first = first or number
            size += line if isinstance(line, int) else len(line)
            if size <= limit and not isinstance(line, int):
                held.append(line)
        elif size:
            where = f"{name} line {first}"
            text = b"".join(held).removesuffix(b"\n").removesuffix(b"\r")
            yield _decoded(text, where) if size <= limit else _bad(where, "too-long", f"{size:,} bytes")
            held, size, first = [], 0, 0


def _document(file: IO[bytes], name: str, limit: int) -> Row:
    """A whole file; of one that is longer than `limit`, unpacked, no more is held."""
    held, size = bytearray(), 0
    while part := file.read(1 << 20):
        size += len(part)
        if size <= limit:
            held += part
    return _decoded(held, name) if size <= limit else _bad(name, "too-long", f"{size:,} bytes")


def _decoded(raw: bytes | bytearray, where: str) -> Row:
    try:
        return _checked(raw.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        shown = raw[max(0, error.start - 20) : error.start + 20].decode("utf-8", "backslashreplace").strip()
        return _bad(where, "bad-utf8", f"byte {error.start} (0x{raw[error.start]:02x}): {shown}")


def _json(line: bytes, columns: list, where: str) -> Row:
    if not line.strip():
        return Row(where, "")
    try:
        return _value(json.loads(line.decode("utf-8")), columns, where)
    except UnicodeDecodeError:
        return _decoded(line, where)
    except ValueError as error:
        shown = line[:80].decode("utf-8", "backslashreplace").rstrip("\n")
        return _bad(where, "bad-json", f"{str(error).split(':')[0]}: {shown}")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _value(found: Any, columns: list, where: str) -> Row:
    """The text column of a row; `columns: [meta.text]` reaches into a nested one."""
    column = columns[0] if columns else "text"
    if column == EVERY:
        return _checked(EVERY.join(_texts(found)), where)
    value = found
    for part in [column] if isinstance(found, dict) and column in found else column.split("."):
        if not isinstance(value, dict):
            kind = "null" if value is None else "bad-json" if value is found else "missing-column"
            return _bad(where, kind, repr(value)[:80])
        if part not in value:
            return _bad(where, "missing-column", f"no {column!r} among {', '.join(map(str, list(value)[:8]))}")
        value = value[part]
    if value is None or value != value:  # NaN, as pandas writes an empty field
        return _bad(where, "null", f"{column}={value!r}")
    if not isinstance(value, str):
        return _bad(where, "not-text", f"{column}={repr(value)[:60]}")
    return _checked(value, where)


def _checked(text: str, where: str) -> Row:
    if text.isascii():
        at = text.find("\0")
        return Row(where, text) if at < 0 else _bad(where, "nul-byte", _around(text, at), text)
    for pattern, problem in FORBIDDEN:
        if match := pattern.search(text):
            return _bad(where, problem, _around(text, match.start()), text)
    return Row(where, text)


def _around(text: str, at: int) -> str:
    return f"character {at}: {text[max(0, at - 20) : at + 20]!r}"


def _array(raw: bytes, columns: list, name: str) -> Iterator[Row]:
    try:
        rows = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        yield _decoded(raw, name)
        return
    except ValueError as error:
        yield _bad(name, "bad-json", str(error)[:80])
        return
    for i, row in enumerate(rows):
        yield _value(row, columns, f"{name} row {i}")


def _csv(file: IO[bytes], columns: list, name: str) -> Iterator[Row]:
    """The row behind a broken one begins at the next line; without a header no row has a text column."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        _ = reader.fieldnames
    except csv.Error as error:
        yield _bad(f"{name} line 1", "bad-csv", str(error))
        reader.fieldnames = []
    for i in itertools.count():
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield _bad(f"{name} line {reader.reader.line_num}", "bad-csv", str(error))
            continue
        if row is None:
            return
        found = _value(row, columns, f"{name} row {i}")
        if found.problem == "lone-surrogate":  # what surrogateescape made of bytes
            found = found._replace(problem="bad-utf8")
        yield found


def _parquet(share: Share, columns: list) -> Iterator[Row]:
    import pyarrow.parquet

    name, file = share.name, pyarrow.parquet.ParquetFile(share.path)
    head = columns[0].split(".")[0]
    column = columns[0] if columns[0] in file.schema_arrow.names else head
    if column != EVERY and column not in file.schema_arrow.names:
        found = dict.fromkeys(file.schema_arrow.names)
        for i in range(share.first_row, share.first_row + file.metadata.row_group(share.start).num_rows):
            yield _value(found, columns, f"{name} row {i}")
        return
    i = share.first_row
    for batch in file.iter_batches(64, row_groups=[share.start], columns=None if column == EVERY else [column]):
        for found in batch.to_pylist():
            yield _value(found, columns, f"{name} row {i}")
            i += 1
