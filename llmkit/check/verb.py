"""The verb `llmkit check`: from flags to a report and an exit code.

Owns what is printed and written.   code = main(settings, subject, command)
"""

import contextlib
import dataclasses
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from ..config import UserError
from ..verbs import CheckConfig
from .console import hang, print_report
from .report import Report
from .runner import SECTIONS, Check, all_checks, get_check

TIERS = ("files only, seconds", "and rows", "and a small model on the CPU, a minute", "and every stored tensor")
ALONE = ("list", "explain", "demo")  # flags that check nothing of the user's
OUTPUT = ("tier", "only", "skip", "check_ignore", "json", "html", "format", "redact")
OF_A_COMMAND = ("dataset", "eval_dataset", "peft_adapter", "reference", "chat")  # what may be added to its trainer
PIPED_COLUMNS = 120  # where nothing says how wide the reader is
WIDEST = 96  # a paragraph
QUIET_S = 1.0  # a bar appears when the checks take longer


def main(settings: CheckConfig, subject: Any = None, command: list[str] | None = None) -> int:
    """Checks a folder, the given subject or the trainer of a command. 0, 1 or 3; raises UserError for 2."""
    _check_settings(settings, subject, command)
    if settings.list:
        _print_list()
        return 0
    if settings.explain:
        _print_explained(get_check(settings.explain))
        return 0
    if settings.demo:
        from .demo import run_demo

        return run_demo(settings.demo)
    from .attach import from_folder, selection
    from .command import run_command
    from .runner import run, select

    chosen = selection(settings.tier, settings.only, settings.skip, settings.check_ignore)
    select(chosen)  # unknown names are told before anything is loaded
    is_text = settings.format == "text"
    with _progress() as on_progress, contextlib.nullcontext() if is_text else contextlib.redirect_stdout(sys.stderr):
        if command is not None:
            report = run_command(settings, command, on_progress)
        else:
            subject = subject or from_folder(settings)
            report = run(subject, chosen, lambda item, number, total: on_progress(item.id, number, total))
    return show(report, settings)


def _check_settings(settings: CheckConfig, subject: Any, command: list[str] | None) -> None:
    """Raises UserError for what could only be ignored, and for files that could not be written in the end."""
    given = [f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != f.default]
    given = [name for name in given if getattr(settings, name) not in ([], "")]
    alone = [name for name in ALONE if name in given]
    rest = [name for name in given if name not in alone[:1]]
    if alone and (rest or command is not None):
        raise UserError(
            f"--{alone[0]} stands alone; leave out {', '.join(f'--{name}' for name in rest) or 'the command'}"
        )
    if command is not None and (unused := [name for name in rest if name not in (*OUTPUT, *OF_A_COMMAND)]):
        raise UserError(f"--{unused[0]} is not used with a command: what its trainer has is checked; leave it out")
    if subject is not None and (unused := [name for name in rest if name not in OUTPUT]):
        raise UserError(f"--{unused[0]} is not used with a recipe: what it would train is checked; leave it out")
    if not 0 <= settings.tier < len(TIERS):
        raise UserError(f"tier={settings.tier}; allowed: 0, 1, 2, 3")
    for key in ("json", "html"):
        if value := getattr(settings, key):
            check_file(key, Path(value))


def check_file(key: str, path: Path) -> None:
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{key}={str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first")
    if path.is_dir():
        raise UserError(f"{key}={str(path)!r}: is a folder; name a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{key}={str(path)!r}: cannot be written; name a file where you may write")


def show(report: Report, settings: CheckConfig) -> int:
    """Prints and writes what was asked for; returns the exit code."""
    from . import formats
    from .page import page

    if settings.redact:
        report = report.redacted()
    if settings.json:
        report.write_json(Path(settings.json))
    if settings.html:
        Path(settings.html).write_text(page(report), encoding="utf-8", errors="backslashreplace")
    console = make_console()
    if settings.format != "text":
        print(getattr(formats, settings.format)(report))
        return report.exit_code
    print_report(report, console)
    for key in ("json", "html"):
        if value := getattr(settings, key):
            print(f"{key}: {value}")
    return report.exit_code


def make_console() -> Console:
    """Standard output; characters that its encoding lacks become escapes instead of an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_COLUMNS
    return console


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the running check, on a terminal and after a second; it leaves nothing behind."""
    columns = (
        TextColumn("checking"),
        BarColumn(24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        timer = threading.Timer(QUIET_S, bar.update, [task], {"visible": True})
        timer.daemon = True

        def on_progress(id: str, number: int, total: int) -> None:
            bar.update(task, completed=number, total=total, description=id)
            if not timer.is_alive() and not timer.finished.is_set():
                timer.start()

        try:
            yield on_progress
        finally:
            timer.cancel()


def _print_explained(item: Check) -> None:
    """Every section of a check's docstring."""
    console = make_console()
    width = min(console.width, WIDEST)

    def paragraph(text: str, indent: str = "") -> None:
        lines = textwrap.wrap(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)
        console.print(Text("\n".join(lines)), soft_wrap=True)

    console.print(Text(item.id, style="bold"), soft_wrap=True)
    paragraph(item.title)
    console.print()
    for name in SECTIONS:
        if text := item.section(name):
            console.print(Text(name, style="bold"))
            paragraph(text, "    ")
    console.print(Text(f"tier {item.tier}, family {item.family}", style="dim"), soft_wrap=True)


def _print_list() -> None:
    checks = all_checks()
    console = make_console()
    width = max(len(c.id) for c in checks)
    for tier, name in enumerate(TIERS):
        console.print(Text(f"tier {tier}: {name}", style="bold"))
        for c in (c for c in checks if c.tier == tier):
            hang(console, Text(f"  {c.id:<{width}}  {c.family:<9}  "), Text(c.title))
    console.print(Text(f"{len(checks)} checks; llmkit check --explain NAME says more", style="dim"))
