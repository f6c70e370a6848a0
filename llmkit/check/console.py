"""The report on a terminal: calm and aligned, what is wrong last, so that it stands just above the prompt.

Owns lines of text, with colour where there is a terminal, and how a piece of the user's data is shown on one line.

    print_report(report, Console())

Leaves out files (`formats.py`) and the page (`page.py`).
"""

import re
from collections import Counter
from typing import Any

from rich.console import Console
from rich.text import Text

from .report import CheckResult, Report

MARK = {"pass": "ok", "warn": "warn", "fail": "FAIL", "not_run": "not run", "not_applicable": "n/a"}
STYLE = {"pass": "green", "warn": "yellow", "fail": "bold red", "not_run": "magenta", "not_applicable": "dim"}
IGNORED = "ignored by check_ignore"  # how the runner's advice begins for a fail that the user has settled
SHOWN_EVIDENCE = 3
LONGEST = 160  # characters of a decoded text
BLANKS = re.compile(r" {2,}|^ +| +$", re.M)
ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


def printable(text: Any) -> str:
    """On one line; what a terminal would obey or swallow (escape codes, marks of direction, joiners) as its number."""
    characters = (c if c.isprintable() else " " if c == "\n" else f"\\{_number(ord(c))}" for c in str(text))
    return "".join(characters)


def _number(code: int) -> str:
    return f"x{code:02x}" if code < 256 else f"u{code:04x}" if code < 65536 else f"U{code:08x}"


def visible(text: str, longest: int = LONGEST) -> str:
    """White space as signs: \\n, \\t, · for blanks that the eye would lose; a long text keeps both ends."""
    text = BLANKS.sub(lambda blanks: "·" * len(blanks[0]), text)
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 2 :]}"
    return printable(text.translate(ESCAPES))


def place(item: dict[str, Any]) -> str:
    """`row 3, position 7` of a piece of evidence."""
    return ", ".join(f"{key} {item[key]}" for key in ("row", "position") if item.get(key) is not None)


def evidence_line(item: dict[str, Any]) -> str:
    """Where, what, and the text itself; its ids where there is no text (or it was redacted)."""
    parts = [place(item), printable(item.get("note") or "")]
    if item.get("text") is not None:
        parts.append(f"'{visible(str(item['text']))}'")
    elif item.get("ids"):
        parts.append(f"ids {item['ids'][:12]}{' …' if len(item['ids']) > 12 else ''}")
    return ": ".join(filter(None, parts))


def advice(c: CheckResult) -> tuple[str, str]:
    """(what kind of a sentence, the sentence)"""
    text = printable(" ".join(c.fix.split()))
    return ("note" if text.startswith(IGNORED) else "do"), text


def not_applicable(report: Report) -> list[tuple[str, int]]:
    """(reason, number of checks), the most frequent first."""
    return Counter(c.measured for c in report.checks if c.status == "not_applicable").most_common()


def print_report(report: Report, console: Console) -> None:
    """A line for each that passed; then, with evidence and advice, what warned, did not run and failed."""
    _line(console, Text(f"llmkit check: {printable(report.target)}", style="bold"))
    passed = [c for c in report.checks if c.status == "pass"]
    width = max((len(c.id) for c in passed), default=0)
    for c in passed:
        print_result(c, console, width)
    if reasons := not_applicable(report):
        text = "; ".join(printable(reason) + (f" ({count})" if count > 1 else "") for reason, count in reasons)
        head = Text(f"{MARK['not_applicable']:<4}  ", style="dim")
        hang(console, head, Text(f"{report.count('not_applicable')} checks: {text}", style="dim"))
    for status in ("warn", "not_run", "fail"):
        for c in report.checks:
            if c.status == status:
                _line(console, Text())
                print_result(c, console)
    _print_end(report, console)


def print_result(c: CheckResult, console: Console, width: int = 0) -> None:
    """One line where it passed (`width`: of the ids, to align them); else what was found, where, and what to do."""
    if c.status == "pass":
        limit = Text(f"  limit {printable(c.limit)}", style="dim") if c.limit else Text()
        hang(console, _head(c, width), Text(printable(c.measured)).append_text(limit), is_short=True)
        return
    hang(console, _head(c), Text(printable(c.title), style="dim"))
    lines = [("why" if c.status == "not_run" else "found", printable(c.measured))]
    lines += [("limit", printable(c.limit))] if c.limit else []
    lines += [("" if i else "where", evidence_line(e)) for i, e in enumerate(c.evidence[:SHOWN_EVIDENCE])]
    if len(c.evidence) > SHOWN_EVIDENCE:
        lines.append(("", f"and {len(c.evidence) - SHOWN_EVIDENCE} more"))
    lines += [advice(c)] if c.fix else []
    for name, text in lines:
        hang(console, Text(f"      {name:<7}", style="bold" if name == "do" else "dim"), Text(text))


def _print_end(report: Report, console: Console) -> None:
    """What one sees without scrolling: every fail in a line, the counts, the next step."""
    worst = [c for status in ("fail", "warn", "not_run") for c in report.checks if c.status == status]
    failed = [c for c in worst if c.status == "fail"]
    if worst:
        _line(console, Text())
    if len(failed) > 1:  # a single one stands right above
        width = max(len(c.id) for c in failed)
        for c in failed:
            hang(console, _head(c, width), Text(printable(c.title or c.measured)), is_short=True)
    _line(console, Text(report.summary(), style="bold"))
    if worst:
        _line(console, Text(f"more: llmkit check --explain {worst[0].id}", style="dim"))


def _head(c: CheckResult, width: int = 0) -> Text:
    return Text(f"{MARK[c.status]:<4}  ", style=STYLE[c.status]).append(f"{c.id:<{width}}  ", style="not dim")


def _line(console: Console, text: Text) -> None:
    console.print(text, no_wrap=True, overflow="ignore", crop=False, highlight=False)


def hang(console: Console, head: Text, body: Text, is_short: bool = False) -> None:
    """Wraps the body beside its head; `is_short`: on a terminal one line, cut where it ends."""
    room = max(console.width - head.cell_len, 20)
    if is_short and console.is_terminal:
        body.truncate(room, overflow="ellipsis")
    lines = body.wrap(console, room, overflow="fold") or [Text()]
    for number, line in enumerate(lines):
        line.rstrip()
        start = Text(" " * head.cell_len) if number else head
        whole = start + line
        whole.rstrip()
        _line(console, whole)
