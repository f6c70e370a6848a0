"""The report on a terminal: calm and aligned, what is wrong last, so that it stands just above the prompt.

Owns lines of text, with colour where there is a terminal.   print_report(report, Console())

Leaves out files (`formats.py`) and the page (`page.py`).
"""

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .report import CheckResult, Report

MARK = {"pass": "ok", "warn": "warn", "fail": "FAIL", "not_run": "not run", "not_applicable": "n/a"}
STYLE = {"pass": "green", "warn": "yellow", "fail": "bold red", "not_run": "magenta", "not_applicable": "dim"}
SHOWN_EVIDENCE = 5
LONGEST = 160  # characters of a decoded text


def visible(text: str) -> str:
    """White space and control characters as symbols; long texts keep both ends."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def evidence_line(item: dict[str, Any]) -> str:
    where = [f"{key} {item[key]}" for key in ("row", "position") if key in item]
    parts = [", ".join(where)] if where else []
    parts += [str(item[key]) for key in ("note",) if item.get(key)]
    if item.get("text") is not None:
        parts.append(f"'{visible(str(item['text']))}'")
    elif item.get("ids"):
        parts.append(f"ids {item['ids'][:12]}{' …' if len(item['ids']) > 12 else ''}")
    return ": ".join(parts)


def print_report(report: Report, console: Console) -> None:
    """Passed ones in a line each, then what warned, did not run and failed with evidence and what to do."""
    console.print(Text(f"llmkit check: {report.target}", style="bold"))
    skipped = [c for c in report.checks if c.status == "not_applicable"]
    passed = [c for c in report.checks if c.status == "pass"]
    if passed:
        console.print(_table(passed))
    if skipped:
        reasons: dict[str, list[str]] = {}
        for c in skipped:
            reasons.setdefault(c.measured, []).append(c.id)
        console.print(Text("not applicable", style="dim"))
        for reason, ids in reasons.items():
            console.print(Padding(Text(f"{', '.join(ids)}: {reason}", style="dim"), (0, 0, 0, 2)))
    for status in ("warn", "not_run", "fail"):
        for c in report.checks:
            if c.status == status:
                _print_finding(c, console)
    console.print(Text(report.summary(), style="bold"))
    worst = next((c for s in ("fail", "warn", "not_run") for c in report.checks if c.status == s), None)
    if worst:
        console.print(f"[dim]more: llmkit check --explain {worst.id}[/dim]", highlight=False)


def _table(checks: list[CheckResult]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for c in checks:
        limit = Text(f"  limit {c.limit}", style="dim") if c.limit else Text()
        table.add_row(Text(MARK[c.status], style=STYLE[c.status]), c.id, Text(c.measured).append_text(limit))
    return table


def _print_finding(c: CheckResult, console: Console) -> None:
    console.print()
    console.print(Text(f"{MARK[c.status]}  ", style=STYLE[c.status]).append(c.id, style="bold"))
    lines = [("found", c.measured)] + ([("limit", c.limit)] if c.limit else [])
    lines += [("" if i else "where", evidence_line(e)) for i, e in enumerate(c.evidence[:SHOWN_EVIDENCE])]
    if len(c.evidence) > SHOWN_EVIDENCE:
        lines.append(("", f"and {len(c.evidence) - SHOWN_EVIDENCE} more"))
    if c.fix:
        lines.append(("do", " ".join(c.fix.split())))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(name, Text(text))
    console.print(Padding(table, (0, 0, 0, 2)))
