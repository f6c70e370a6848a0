"""Runs checks over a subject: one after the other, nothing changed afterwards, nothing skipped silently.

Owns the table of checks, which of them run, and what a result is.

    @check("future-leak", family="model", tier=2, catalogue="K19")
    def future_leak(subject: Subject) -> Outcome: ...

    report = run(subject, Selection(tier=2))

Leaves out what a result looks like on a screen (`report.py`).
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import UserError
from .report import CheckResult, Report
from .subject import NotApplicable, NotRun, Subject, same_random_state

FAMILIES = ("tokenizer", "template", "settings", "rows", "model", "loss", "trainer", "saving", "learning", "weights")
SECTIONS = ("Symptom", "Example", "Detected", "Tolerance", "Spares", "Fix", "Sources")  # of a check's docstring


@dataclasses.dataclass
class Outcome:
    """What a check found. `evidence`: dicts with any of row, position, text, ids, note; text may be redacted."""

    status: str  # pass, warn or fail
    measured: str
    limit: str = ""
    evidence: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fix: str | None = None  # None: the one of the docstring


def passed(measured: str, limit: str = "") -> Outcome:
    return Outcome("pass", measured, limit)


def warned(
    measured: str, limit: str = "", evidence: list[dict[str, Any]] | None = None, fix: str | None = None
) -> Outcome:
    return Outcome("warn", measured, limit, evidence or [], fix)


def failed(
    measured: str, limit: str = "", evidence: list[dict[str, Any]] | None = None, fix: str | None = None
) -> Outcome:
    return Outcome("fail", measured, limit, evidence or [], fix)


@dataclasses.dataclass(frozen=True)
class Check:
    id: str
    family: str
    tier: int
    catalogue: str
    function: Callable[[Subject], Outcome]

    def section(self, name: str) -> str:
        return sections(self.function.__doc__ or "").get(name, "")

    @property
    def title(self) -> str:
        return inspect.cleandoc(self.function.__doc__ or "").split("\n")[0]


def sections(docstring: str) -> dict[str, str]:
    """`Symptom: ...` paragraphs of a docstring, each up to the next one; line breaks inside are kept."""
    found: dict[str, str] = {}
    current = ""
    for line in inspect.cleandoc(docstring).split("\n"):
        name, colon, rest = line.partition(":")
        if colon and name in SECTIONS:
            current, line = name, rest.strip()
        if current:
            found[current] = f"{found[current]}\n{line}" if current in found else line
    return {name: text.strip() for name, text in found.items()}


_CHECKS: dict[str, Check] = {}


def check(id: str, *, family: str, tier: int, catalogue: str) -> Callable:
    def register(function: Callable[[Subject], Outcome]) -> Callable[[Subject], Outcome]:
        assert id not in _CHECKS or _CHECKS[id].function.__qualname__ == function.__qualname__, f"two checks named {id}"
        _CHECKS[id] = Check(id, family, tier, catalogue, function)
        return function

    return register


def all_checks() -> list[Check]:
    """Every check, by tier, family and the order in its file."""
    for family in FAMILIES:
        importlib.import_module(f".{family}", __package__)
    return sorted(_CHECKS.values(), key=lambda c: (c.tier, FAMILIES.index(c.family)))


@dataclasses.dataclass(frozen=True)
class Selection:
    tier: int = 2  # and everything cheaper
    only: tuple[str, ...] = ()  # ids or families; overrules tier
    skip: tuple[str, ...] = ()
    ignore: tuple[tuple[str, str], ...] = ()  # (id, reason): a fail becomes a warn that says so


def get_check(name: str) -> Check:
    """Raises UserError naming the nearest id."""
    known = {c.id: c for c in all_checks()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"nearest: {near[0]!r}" if near else "`llmkit check --list` shows all"
        raise UserError(f"no check is named {name!r}; {hint}")
    return known[name]


def select(selection: Selection) -> list[Check]:
    checks = all_checks()

    def names(words: tuple[str, ...]) -> set[str]:
        return {c.id for word in words for c in ([c for c in checks if c.family == word] or [get_check(word)])}

    for id, reason in selection.ignore:
        get_check(id)
        if not reason.strip():
            raise UserError(f"check_ignore: {id!r} has no reason; write {{check: {id}, reason: ...}}")
    wanted = names(selection.only) or {c.id for c in checks if c.tier <= selection.tier}
    return [c for c in checks if c.id in wanted - names(selection.skip)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries say little while a check plays with them; nothing of that concerns the user."""
    from transformers.utils import logging as hf_logging

    verbosity, disabled = hf_logging.get_verbosity(), logging.root.manager.disable
    hf_logging.set_verbosity_error()
    logging.disable(logging.ERROR)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        logging.disable(disabled)
        if bars:
            hf_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The exception as evidence: its class, and the beginning of what it says."""
    text = str(error).strip().split("\n")[0][:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def run_one(item: Check, subject: Subject, ignored: str | None = None) -> CheckResult:
    """One check; a crash inside becomes `not_run` with the exception in one line."""
    started = time.perf_counter()
    result = CheckResult(item.id, item.family, item.tier, "not_run", title=item.title)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(same_random_state())
            if subject.training is not None:
                stack.enter_context(subject.training.unchanged())
            torch.manual_seed(0)
            outcome = item.function(subject)
        result.status, result.measured, result.limit = outcome.status, outcome.measured, outcome.limit
        result.evidence = outcome.evidence
        if outcome.status in ("warn", "fail"):
            result.fix = outcome.fix or item.section("Fix")
    except NotApplicable as reason:
        result.status, result.measured = "not_applicable", str(reason)
    except NotRun as reason:
        result.measured = str(reason)
    except Exception as error:
        text = (str(error).strip() or "no message").split("\n")[0][:200]
        result.measured = f"the check crashed: {type(error).__name__}: {text} ({_where(error)})"
    if ignored and result.status == "fail":
        result.status, result.fix = "warn", f"ignored by check_ignore: {ignored}"
    result.seconds = round(time.perf_counter() - started, 3)
    return result


def run(
    subject: Subject, selection: Selection | None = None, on_start: Callable[[Check, int, int], Any] | None = None
) -> Report:
    """All selected checks in order. `on_start(check, number, total)` is called before each: for a progress bar."""
    selection = selection or Selection()
    checks = select(selection)
    ignore = dict(selection.ignore)
    report = Report(subject.target)
    for number, item in enumerate(checks):
        if on_start:
            on_start(item, number, len(checks))
        report.checks.append(run_one(item, subject, ignore.get(item.id)))
    return report
