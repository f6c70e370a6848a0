"""What the model will really see: the first rows of a training loader, and totals over many.

Owns the totals, and what is worth a second look.   print(describe(batches, tokenizer).totals)

Leaves out reading a batch (`batches.py`), where batches come from (`inspect_verb.py`) and how rows are shown
(`inspect_console.py`, `inspect_page.py`).
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import UserError
from .batches import KL, MASKED, PADDING, PAIR, READ, STATES, TRAINED, Reader, Row, Sequence, key_of, token_text

VERSION = 1
COUNTED_ROWS, COUNTED_TOKENS = 1_000, 1_000_000  # looked at for the totals: whichever comes first
BINS = 24  # of the histogram


@dataclass
class Inspection:
    """The rows that are shown, and totals over these and the ones after them."""

    target: str
    step: int | None  # that the rows begin at; None: of no training
    kind: str  # tokens, pairs, scores, prompts
    rows: list[Row]
    totals: dict[str, Any]
    is_redacted: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Inspection":
        rows = [Row(**row | {"sequences": [Sequence(**s) for s in row["sequences"]]}) for row in value["rows"]]
        return cls(**{k: v for k, v in value.items() if k != "version"} | {"rows": rows})

    def redacted(self) -> "Inspection":
        """Ids instead of text; of a column that holds text, how long it is."""
        rows = [
            dataclasses.replace(
                row,
                sequences=[dataclasses.replace(s, texts=None) for s in row.sequences],
                columns={k: f"{len(v):,} characters" if isinstance(v, str) else v for k, v in row.columns.items()},
            )
            for row in self.rows
        ]
        return dataclasses.replace(self, rows=rows, is_redacted=True)


def describe(
    batches: Iterable[Any],
    tokenizer: Any,
    num_rows: int = 5,
    settings: dict[str, Any] | None = None,
    is_paired: bool | None = None,
    tokenize_prompts: Callable[[list[Any]], list[list[int]]] | None = None,
    target: str = "",
    step: int | None = None,
) -> Inspection:
    """The first `num_rows` rows of the batches; the totals count up to 1,000 rows or a million tokens.

    Raises UserError where there is no row, or no token in a batch.
    """
    reader = Reader(tokenizer, settings, is_paired, tokenize_prompts)
    rows: list[Row] = []
    num_tokens, is_whole = 0, False
    for row in _all_rows(batches, reader):
        row.number = len(rows)
        rows.append(row)
        num_tokens += sum(len(s.ids) for s in row.sequences)
        if len(rows) >= max(num_rows, COUNTED_ROWS) or (num_tokens >= COUNTED_TOKENS and len(rows) >= num_rows):
            break
    else:
        is_whole = True
    if not rows:
        where = f"step={step}: " if step else ""
        raise UserError(
            f"{where}the loader yields no row from there on; look at the data set{', or lower it' * bool(step)}"
        )
    totals = count(rows, reader) | {"to_the_end": is_whole}
    texts: dict[int, str] = {}
    for row in rows[:num_rows]:
        for s in row.sequences:
            texts |= {i: token_text(tokenizer, i) for i in set(s.ids) - set(texts)}
            s.texts = [texts[i] for i in s.ids]
    return Inspection(target, step, _kind(rows), rows[:num_rows], totals)


def _all_rows(batches: Iterable[Any], reader: Reader) -> Iterator[Row]:
    last = ""
    for batch in batches:
        if isinstance(batch, (list, tuple)):  # reinforcement: completions are used for several steps
            if (key := "".join(map(key_of, batch))) == last:
                continue
            last = key
        yield from reader.rows(batch)


def _kind(rows: list[Row]) -> str:
    sequences = rows[0].sequences
    if not any(s.count(state) for row in rows for s in row.sequences for state in (TRAINED, MASKED)):
        return "scores" if len(sequences) > 1 or "label" in rows[0].columns else "prompts"
    return "pairs" if sequences[0].name in PAIR else "tokens"


def count(rows: list[Row], reader: Reader) -> dict[str, Any]:
    """Totals over rows; writes into their notes what is worth a look."""
    sequences = [s for row in rows for s in row.sequences]
    lengths = [s.num_real for s in sequences]
    edges = np.histogram_bin_edges(lengths, bins=min(BINS, max(max(lengths) - min(lengths), 1)))
    totals: dict[str, Any] = {
        "rows": len(rows),
        "sequences": len(sequences),
        "tokens": sum(len(s.ids) for s in sequences),
    }
    totals |= {state: sum(s.count(state) for s in sequences) for state in STATES}
    totals |= {"shortest": min(lengths), "median": int(np.median(lengths)), "longest": max(lengths)}
    totals |= {"max_length": reader.limit, "has_shifted": reader.has_shifted}
    totals |= {"is_told_apart": reader.is_told_apart, "documents": sum(1 + len(s.starts) for s in sequences)}
    totals |= {"rows_of_several_documents": sum(any(s.starts for s in row.sequences) for row in rows)}
    first: dict[Any, int] = {}
    for row in rows:
        if (same := first.setdefault(_content(row), row.number)) != row.number:
            row.notes.append(f"the same as row {same}")
        row.notes += [note for s in row.sequences for note in _notes(s, reader)]
    notes = Counter(note for row in rows for note in {_what(note) for note in row.notes})
    totals |= {"notes": dict(notes.most_common())}
    counts, edges = np.histogram(lengths, bins=edges)
    totals["histogram"] = {"low": int(edges[0]), "high": int(edges[-1]), "counts": counts.tolist()}
    return totals


def _content(row: Row) -> Any:
    """What makes two rows the same: their tokens but for padding; without tokens, their columns."""
    ids = [tuple(i for i, state in zip(s.ids, s.states, strict=True) if state != PADDING) for s in row.sequences]
    return tuple(ids) if any(ids) else key_of(row.columns)


def _what(note: str) -> str:
    return "the same as an earlier row" if note.startswith("the same as row") else note.split(": ")[-1]


NO_TOKEN = "no token is trained"
CUT = "fills max_length and ends without a stop token"


def _notes(s: Sequence, reader: Reader) -> Iterator[str]:
    """What one should look at twice."""
    where = f"{s.name}: " if s.name else ""
    if MASKED in s.states and TRAINED not in s.states:
        yield where + NO_TOKEN
    if reader.limit and s.name != KL and not reader.is_stream and _is_cut(s, reader.limit):
        yield where + CUT
    if s.odd_labels:
        yield where + "labels are other tokens than those of the row"
    if not all(0 <= i < reader.num_ids for i in s.ids):
        yield where + "ids that the tokenizer does not have"
    if s.num_trained_padding:
        yield where + "padding is trained"


def _is_cut(s: Sequence, limit: int) -> bool:
    """A document takes the whole row, or what is left of it, and none of its last two tokens is special."""
    real = [t for t, state in enumerate(s.states) if state != PADDING]
    if len(real) < limit:
        return False
    bounds = [real[0], *s.starts, real[-1] + 1]
    for start, end in itertools.pairwise(bounds):
        is_whole = end - start >= limit or (end == bounds[-1] and len(real) <= limit + 1)
        if is_whole and not any(s.special[max(start, end - 2) : end]):
            return True
    return False


# what console and page share


def legend(i: Inspection) -> list[tuple[str, str]]:
    """(state, what it means) of the states that occur."""
    read = {
        "prompts": "sent to generation; nothing of it is trained",
        "scores": "read; what is trained is the score of the whole row",
    }
    meanings = {
        TRAINED: "the loss asks for this token, given those before it: labels stand at the token that they ask for, "
        "whether the batch or the model shifts them",
        MASKED: "read, never asked for",
        PADDING: "fills the row up: neither read nor asked for",
        READ: read.get(i.kind, "read without a gradient: a baseline is estimated on it"),
    }
    if i.kind == "pairs":
        meanings[TRAINED] = "its probability is in the loss: up where chosen, down where rejected"
    return [(state, text) for state, text in meanings.items() if i.totals[state]]


def document_sign(i: Inspection) -> str:
    """What `¶` means, where there is one."""
    if not any(s.starts for row in i.rows for s in row.sequences):
        return ""
    told = i.totals["is_told_apart"]
    return "another document begins: " + ("positions start again" if told else "after an EOS, and positions run on")


def facts(i: Inspection) -> list[tuple[str, str]]:
    """(name, value) of the totals, in words."""
    t = i.totals
    shares = [f"{t[state] / t['tokens']:.1%} {state}" for state in STATES if t[state] and t["tokens"]]
    lengths = f"{t['shortest']:,} to {t['longest']:,} tokens, median {t['median']:,}"
    lengths += f"; max_length is {t['max_length']:,}" if t["max_length"] else ""
    lengths += " and one that is only predicted" if t["has_shifted"] and t["max_length"] else ""
    where = "" if i.step is None else f" from step {i.step} on"
    where += ", to the end of the epoch" if t["to_the_end"] and i.step is not None else ""
    found = [("rows", f"{t['rows']:,} looked at{where}; {len(i.rows):,} shown")]
    if t["tokens"]:
        found += [("tokens", f"{t['tokens']:,}: {', '.join(shares)}"), ("row length", lengths)]
    if t["rows_of_several_documents"]:
        found.append(("documents", f"{t['documents'] / t['sequences']:.1f} per row"))
    return found


def both_ends(items: Any, first: int, last: int, spared: int = 0) -> tuple[Any, int, Any]:
    """(first, number left out, last) of what has more than all three together; else (items, 0, nothing)."""
    hidden = len(items) - first - last
    return (items[:first], hidden, items[-last:]) if hidden > spared else (items, 0, items[:0])


def runs(s: Sequence) -> list[tuple[str, int, int]]:
    """(state, start, end) of the stretches of one state; a document begins a stretch."""
    bounds = {0, *s.starts, *(t for t in range(1, len(s.ids)) if s.states[t] != s.states[t - 1])}
    ordered = [*sorted(bounds), len(s.ids)]
    return [(s.states[a], a, b) for a, b in itertools.pairwise(ordered) if a < b]
