"""The verb `llmkit check`: from flags to a report and an exit code.

Owns what is printed and written.   code = main(settings, subject, command)
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..config import CheckConfig, UserError
from .report import Report
from .runner import SECTIONS, Check, all_checks, get_check


def main(settings: CheckConfig, subject: Any = None, command: list[str] | None = None) -> int:
    """Checks a folder, the given subject or the trainer of a command. 0, 1 or 3; raises UserError for 2."""
    if settings.list:
        _print_list()
        return 0
    if settings.explain:
        print(explain(get_check(settings.explain)))
        return 0
    if settings.demo:
        from .demo import run_demo

        return run_demo(settings.demo)
    _check_settings(settings)
    from .attach import from_folder, selection
    from .command import run_command
    from .runner import run

    chosen = selection(settings.tier, settings.only, settings.skip, settings.check_ignore)
    with _progress() as on_progress:
        if command is not None:
            report = run_command(settings, command, on_progress)
        else:
            subject = subject or from_folder(settings)
            report = run(subject, chosen, lambda item, number, total: on_progress(item.id, number, total))
    return show(report, settings)


def _check_settings(settings: CheckConfig) -> None:
    if not 0 <= settings.tier <= 3:
        raise UserError(f"tier={settings.tier}; allowed: 0, 1, 2, 3")
    for key in ("json", "html"):
        value = getattr(settings, key)
        if value and not Path(value).resolve().parent.is_dir():
            raise UserError(f"{key}={value!r}: the folder {str(Path(value).parent)!r} does not exist; make it first")
        if value and Path(value).is_dir():
            raise UserError(f"{key}={value!r}: is a folder; name a file")


def show(report: Report, settings: CheckConfig) -> int:
    """Prints and writes what was asked for; returns the exit code."""
    from . import formats
    from .console import print_report
    from .page import page

    if settings.redact:
        report = report.redacted()
    if settings.json:
        report.write_json(Path(settings.json))
    if settings.html:
        Path(settings.html).write_text(page(report), encoding="utf-8")
    if settings.format == "text":
        console = Console(highlight=False, soft_wrap=False)
        if not console.is_terminal:
            console.width = 120
        print_report(report, console)
        for key in ("json", "html"):
            if value := getattr(settings, key):
                console.print(f"{key}: {value}", markup=False)
    else:
        print(getattr(formats, settings.format)(report))
    return report.exit_code


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("checking"),
        BarColumn(24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, start=True, visible=False)

        def on_progress(id: str, number: int, total: int) -> None:
            bar.update(task, completed=number, total=total, description=f"{number + 1}/{total} {id}", visible=True)

        yield on_progress


def explain(item: Check) -> str:
    """Every section of a check's docstring, for a terminal."""
    lines = [f"{item.id}   (family {item.family}, tier {item.tier}, {item.catalogue})", "", item.title]
    for name in SECTIONS:
        if text := item.section(name):
            lines += ["", name, *(f"  {line.strip()}" for line in text.split("\n"))]
    return "\n".join(lines)


def _print_list() -> None:
    checks = all_checks()
    width = max(len(c.id) for c in checks)
    for tier in sorted({c.tier for c in checks}):
        print(f"{'' if tier == 0 else chr(10)}tier {tier}: {TIERS[tier]}")
        for c in checks:
            if c.tier == tier:
                print(f"  {c.id:<{width}}  {c.family:<9}  {c.title}")


TIERS = ("files only, seconds", "and rows", "and a small model on the CPU, a minute", "and every stored tensor")
