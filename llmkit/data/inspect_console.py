"""Inspected rows on a terminal: a stretch of trained, masked or padded tokens per paragraph, named in the margin.

Owns lines of text. Colour repeats what the margin says, so nothing is lost in a pipe.   print_inspection(i, Console())
"""

import re
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ..check.console import LONGEST, hang, printable, visible
from .batches import MASKED, PADDING, READ, TRAINED, Row, Sequence
from .inspect import Inspection, both_ends, document_sign, facts, legend, runs

STYLE = {TRAINED: "green", MASKED: "dim", PADDING: "dim italic", READ: "blue"}
MARGIN = 10  # columns that hold the state
HEAD, TAIL, SPARED = 160, 40, 80  # tokens shown of a stretch with more than all three
STRETCHES = 40  # of a sequence
BARS = " ▁▂▃▄▅▆▇█"
STRAY_BYTE = re.compile(r"\\udc([89a-f]\w)")  # as `visible` writes surrogateescape


def print_inspection(i: Inspection, console: Console) -> None:
    line(console, Text(f"llmkit inspect: {printable(i.target)}", style="bold"))
    for name, value in facts(i):
        hang(console, margin(name, "dim"), Text(value))
    if i.totals["shortest"] < i.totals["longest"]:
        hang(console, margin(""), Text(histogram(i)))
    for note, number in i.totals["notes"].items():
        head = margin("look", "bold yellow")
        hang(console, head, Text(f"{number:,} of {i.totals['rows']:,} rows: {note}"))
    line(console, Text())
    for state, meaning in legend(i):
        hang(console, margin(state, STYLE[state]), Text(meaning, style="dim"))
    signs = "a token begins where underlining changes; " if has_underlines(i, console) else ""
    what = f"{signs}special tokens are bold" if console.is_terminal else ""
    if what := "; ".join(filter(None, [what, document_sign(i) and f"¶ {document_sign(i)}"])):
        hang(console, margin("signs", "dim"), Text(what, style="dim"))
    for row in i.rows:
        line(console, Text())
        print_row(row, i, console)


def margin(name: str, style: str = "", sign: str = " ") -> Text:
    """What stands left of a paragraph; the style ends with it."""
    return Text.assemble((f"{sign} {name:<{MARGIN}}  ", style))


def has_underlines(i: Inspection, console: Console) -> bool:
    return console.is_terminal and any(s.texts for row in i.rows for s in row.sequences)


def histogram(i: Inspection) -> str:
    """Rows by length, a sign per bin."""
    bins = i.totals["histogram"]
    most = max(bins["counts"])
    bars = "".join(BARS[-(-n * (len(BARS) - 1) // most)] for n in bins["counts"])
    return f"{bins['low']:,} {bars} {bins['high']:,} tokens"


def row_title(row: Row) -> str:
    times = f", sent {row.times} times" if row.times > 1 else ""
    return f"row {row.number}{times}"


def sequence_title(s: Sequence) -> str:
    counts = [f"{n:,} {state}" for state in (TRAINED, MASKED, READ, PADDING) if (n := s.count(state))]
    documents = f", {1 + len(s.starts)} documents" if s.starts else ""
    return f"{len(s.ids):,} tokens{documents}: {', '.join(counts)}" if s.ids else ""


def print_row(row: Row, i: Inspection, console: Console) -> None:
    titles = [": ".join(filter(None, [s.name, sequence_title(s)])) for s in row.sequences]
    head = "  ".join([row_title(row), *(titles if len(titles) == 1 else [])])
    line(console, Text(head, style="bold"))
    for note in row.notes:
        hang(console, margin("look", "bold yellow"), Text(printable(note)))
    for s, title in zip(row.sequences, titles, strict=True):
        if len(titles) > 1:
            line(console, Text(f"  {title}", style="bold"))
        print_sequence(s, console)
    for name, value in row.columns.items():
        text = visible(value, 4 * LONGEST) if isinstance(value, str) and not i.is_redacted else str(value)
        hang(console, margin(printable(name)[:MARGIN], "dim"), Text(text))


def print_sequence(s: Sequence, console: Console) -> None:
    first, hidden, last = both_ends(runs(s), STRETCHES // 2, STRETCHES // 2)
    for run in first:
        print_run(s, run, console)
    if hidden:
        line(console, margin("") + Text(f"… {hidden:,} stretches …", style="dim"))
    for run in last:
        print_run(s, run, console)


def print_run(s: Sequence, run: tuple[str, int, int], console: Console) -> None:
    state, start, end = run
    label = margin(state, STYLE[state], "¶" if start in s.starts else " ")
    room = max(console.width - label.cell_len, 20)
    for nth, text in enumerate(wrapped(pieces(s, state, start, end, console.is_terminal), room)):
        text.rstrip()
        line(console, (margin("") if nth else label) + text)


def pieces(s: Sequence, state: str, start: int, end: int, is_underlined: bool) -> Iterator[tuple[Text, bool]]:
    """(a token, whether its text ends a line); a long stretch in the middle, and all padding, as how many there are."""
    if state == PADDING:
        yield Text(f"{shown(s, start)} × {end - start:,}", style=STYLE[state]), False
        return
    first, hidden, last = both_ends(range(start, end), HEAD, TAIL, SPARED)
    for t in (*first, *[None] * bool(hidden), *last):
        if t is None:
            yield Text(f" … {hidden:,} tokens … ", style="dim"), False
            continue
        style = STYLE[state] + " bold not dim" * s.special[t]
        style += " underline" * (is_underlined and s.texts is not None and t % 2)
        ends_line = s.texts is not None and s.texts[t].endswith("\n")
        yield Text(shown(s, t) + ("" if s.texts else " "), style=style), ends_line


def shown(s: Sequence, t: int) -> str:
    return token_sign(s.texts[t]) if s.texts else str(s.ids[t])


def token_sign(text: str) -> str:
    """A token on a line: every blank as `·`, a byte that is no character alone as `\\xf0`."""
    sign = visible(text).replace(" ", "·") if text else "∅"
    return STRAY_BYTE.sub(r"\\x\1", sign)


def wrapped(parts: Iterator[tuple[Text, bool]], room: int) -> Iterator[Text]:
    """Lines of whole tokens; a line ends where the text's own does."""
    at, width = Text(), 0
    for part, ends_line in parts:
        if width and width + part.cell_len > room:
            yield at
            at, width = Text(), 0
        while part.cell_len > room:  # a token wider than the terminal
            head = next(n for n in range(len(part.plain), 0, -1) if cell_len(part.plain[:n]) <= room)
            yield part[:head]
            part = part[head:]
        at, width = at + part, width + part.cell_len
        if ends_line:
            yield at
            at, width = Text(), 0
    if width:
        yield at


def line(console: Console, text: Text) -> None:
    console.print(text, no_wrap=True, overflow="ignore", crop=False, highlight=False)
