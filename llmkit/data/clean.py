"""What is wrong with a document, the field's filters by their names, and a count of everything that happened.

    faults(text)  -> {"mojibake": "'cafÃ©', probably 'café'"};   mend(text) -> text as ftfy suggests
    keep = make_filters(["gopher_quality", {"c4_quality": {"min_num_sentences": 3}}])
    notes = Notes(); notes.add("dropped", "empty", where, text)

Finding changes nothing: a document is only mended or filtered where the recipe asks for it. The filters are datatrove's
(Gopher: Rae et al. 2021, tables A1 and §A1.1; C4: Raffel et al. 2020; FineWeb: Penedo et al. 2024).
"""

import bisect
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from ..config import UserError
from .encode import num_utf8_bytes

EXAMPLES = 10  # of each reason
SHOWN = 160  # characters of an example
WORD_NULLS = {"None", "null", "nan", "NaN", "NULL", "undefined", "<NA>"}
FILTERS = {
    "gopher_quality": ("gopher_quality_filter", "GopherQualityFilter"),
    "gopher_repetition": ("gopher_repetition_filter", "GopherRepetitionFilter"),
    "c4_quality": ("c4_filters", "C4QualityFilter"),
    "fineweb_quality": ("fineweb_quality_filter", "FineWebQualityFilter"),
}

# broken Unicode

_SIGNS = "".join(bytes([b]).decode("cp1252", "ignore") for b in range(0x80, 0xC0))  # as Windows-1252 shows these bytes
_NEXT = f"[\x80-\xbf{re.escape(_SIGNS)}]"
# UTF-8 read as Latin-1 or Windows-1252. Behind the leads Ä to ß the second byte counts only when it is a sign that
# nobody writes there: ß“ ends a German quotation, É— is a French dash. Â and Ã are no word's last letter.
_ODD = "\x80-\x9f\xa1-\xaa\xac-\xb6\xb8-\xba\xbc-\xbfŠŒŽšœžŸƒˆ˜†‡"
MOJIBAKE = re.compile(f"[\xc2\xc3]{_NEXT}|[\xc4-\xdf][{_ODD}]|[\xe0-\xef]{_NEXT}{{2}}|[\xf0-\xf4]{_NEXT}{{3}}")
CONTROL = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")  # not tab, newline, form feed, CR, NEL


def faults(text: str) -> dict[str, str]:
    """Broken Unicode in a text, and where it was lost as a word: kind -> what was found."""
    found = {}
    if text.strip() in WORD_NULLS:
        found["null-word"] = repr(text)
    if match := CONTROL.search(text):
        found["control-character"] = f"{len(CONTROL.findall(text))} of them, the first {_around(text, match.start())}"
    if text.isascii():
        return found
    if "\ufffd" in text:
        found["replacement-character"] = (
            f"{text.count(chr(0xFFFD))} of them, the first {_around(text, text.find(chr(0xFFFD)))}"
        )
    if note := mojibake(text):
        found["mojibake"] = note
    return found


def mojibake(text: str) -> str | None:
    """Where UTF-8 was decoded as something else: by ftfy's judgement of each line, or by the bytes themselves."""
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    for line in text.split("\n"):
        if line.isascii():
            continue
        match = MOJIBAKE.search(line)
        if not match and not is_bad(line):
            continue
        fixed = fix_encoding(line)
        if match or fixed != line:
            at = (
                match.start() if match else next(i for i, (a, b) in enumerate(zip(line, fixed, strict=False)) if a != b)
            )
            probably = f", probably {fixed[max(0, at - 10) : at + 12]!r}" if fixed != line else ""
            return f"{line[max(0, at - 10) : at + 12]!r}{probably}"
    return None


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 10) : at + 12])


def mend(text: str) -> str:
    """Encoding faults as ftfy mends them, line by line; lone surrogates become U+FFFD. Nothing else changes."""
    from ftfy import fix_encoding
    from ftfy.fixes import fix_surrogates

    if text.isascii():
        return text
    return "\n".join(line if line.isascii() else fix_encoding(line) for line in fix_surrogates(text).split("\n"))


# filters


def _filter_entries(entries: list) -> Iterator[tuple[str, dict]]:
    for entry in entries:
        name, options = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
        if name not in FILTERS or not isinstance(options or {}, dict):
            raise UserError(f"filters: {entry!r}; allowed: {', '.join(FILTERS)}, or NAME: {{option: value}}")
        yield name, options or {}


def make_filters(entries: list) -> Callable[[str], tuple[str | None, str]]:
    """A function text -> (text, "") when all filters keep it (C4 drops lines), or (None, "filter: rule")."""
    import importlib

    from datatrove.data import Document
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        """Words and punctuation marks; sentences end at . ! ? (their English default wants spaCy)."""

        def word_tokenize(self, text: str) -> list[str]:
            return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text) if part.strip()]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in re.finditer(r"\S[^.!?]*[.!?]?", text)]

    filters = []
    for name, options in _filter_entries(entries):
        module, cls = FILTERS[name]
        made = getattr(importlib.import_module(f"datatrove.pipeline.filters.{module}"), cls)
        known = [key for key in inspect.signature(made).parameters if key not in ("exclusion_writer", "language")]
        for key in options:
            if key not in known:
                raise UserError(f"filters: {name}.{key} is not known; allowed: {', '.join(known)}")
        filters.append((name, made(language=Words(), **options)))

    def keep(text: str) -> tuple[str | None, str]:
        document = Document(text=text, id="")
        for name, one in filters:
            result = one.filter(document)
            is_kept, rule = result if isinstance(result, tuple) else (result, "")
            if not is_kept:
                return None, f"{name}: {rule}" if rule else name
        return document.text, ""

    return keep


# counting


class Notes:
    """Counts by (fate, reason) with a few examples of each, spread over the corpus and the same at every run."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, fate: str, reason: str, where: str, text: str, note: str = "") -> None:
        """fate: bad (unreadable row: `text` says what was found) | dropped | changed | seen (found and kept)."""
        entry = self.found.setdefault((fate, reason), {"count": 0, "bytes": 0, "examples": []})
        entry["count"] += 1
        entry["bytes"] += num_utf8_bytes(text)
        rank = xxhash.xxh32_intdigest(where.encode())
        examples = entry["examples"]
        if len(examples) < EXAMPLES or rank < examples[-1][0]:
            shown = text[:SHOWN] + "…" * (len(text) > SHOWN)
            bisect.insort(examples, [rank, where, shown, note])
            del examples[EXAMPLES:]

    def to_list(self) -> list[list]:
        return [[*key, entry] for key, entry in self.found.items()]

    def merge(self, rows: list[list]) -> None:
        for fate, reason, other in rows:
            entry = self.found.setdefault((fate, reason), {"count": 0, "bytes": 0, "examples": []})
            entry["count"] += other["count"]
            entry["bytes"] += other["bytes"]
            entry["examples"] = sorted([*entry["examples"], *other["examples"]])[:EXAMPLES]

    def count(self, fate: str) -> int:
        return sum(entry["count"] for (f, _), entry in self.found.items() if f == fate)


class Measures:
    """What a text looks like as a whole: sizes, code points, commonest lines; adds up over tasks."""

    BATCH = 1 << 20  # characters
    LINES = 100_000

    def __init__(self) -> None:
        self.lengths: list[int] = []  # bytes of each document
        self.characters = 0
        self.code_points = np.zeros(0x110000, np.int64)
        self.lines: Counter[str] = Counter()
        self._held: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        self.lengths.append(num_utf8_bytes(text))
        self.characters += len(text)
        self._held.append(text)
        self._size += len(text)
        if self._size > self.BATCH:
            self.flush()

    def flush(self) -> None:
        text = "".join(self._held)
        for start in range(0, len(text), self.BATCH):
            counts = np.bincount(np.frombuffer(text[start : start + self.BATCH].encode("utf-32-le"), "<u4"))
            self.code_points[: len(counts)] += counts
        self.lines.update(line for text in self._held for line in set(map(str.strip, text.split("\n"))) if line)
        if len(self.lines) > self.LINES:  # the rare half goes: counts of what stays may be a little low
            self.lines = Counter(dict(self.lines.most_common(self.LINES // 2)))
        self._held, self._size = [], 0
