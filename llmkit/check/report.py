"""What the checks found: for a console, a notebook, a file, a script.

Owns the result format (DESIGN, section 3) and the exit code.   print(report); report.exit_code; report.raise_on_fail()

Leaves out how results come about.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from .. import __version__
from ..run import versions

VERSION = 1
SHOWN_VERSIONS = ("llmkit", "python", "torch", "transformers", "tokenizers", "trl", "peft")
STATUSES = ("fail", "not_run", "warn", "pass", "not_applicable")  # the worst first
CRASH = re.compile(r"(the check crashed: \w+): .* (\(\S+:\d+\))", re.S)  # how the runner says it


class CheckFailed(AssertionError):
    """At least one check failed; the message names them."""


@dataclasses.dataclass
class CheckResult:
    """One line of the report. `evidence`: dicts with any of row, position, text, ids, note."""

    id: str
    family: str
    tier: int
    status: str
    measured: str = ""
    limit: str = ""
    evidence: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fix: str = ""
    seconds: float = 0.0
    title: str = ""  # what the check finds, in a sentence


@dataclasses.dataclass
class Report:
    target: str
    checks: list[CheckResult] = dataclasses.field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(c.status == status for c in self.checks)

    def __getitem__(self, id: str) -> CheckResult:
        return {c.id: c for c in self.checks}[id]

    @property
    def exit_code(self) -> int:
        """0: every applicable check passed or warned; 1: a fail; 3: no fail, but one did not run."""
        return 1 if self.count("fail") else 3 if self.count("not_run") else 0

    def raise_on_fail(self) -> "Report":
        found = [c for c in self.checks if c.status == "fail"]
        if found:
            raise CheckFailed("; ".join(f"{c.id}: {c.measured}" for c in found))
        return self

    def summary(self) -> str:
        """Counts in words, and the time."""
        names = {
            "fail": "failed",
            "not_run": "did not run",
            "warn": "warned",
            "pass": "passed",
            "not_applicable": "not applicable",
        }
        counts = [f"{self.count(status)} {name}" for status, name in names.items() if self.count(status)]
        return f"{', '.join(counts) or 'no checks'} ({sum(c.seconds for c in self.checks):.1f} s)"

    def versions(self) -> str:
        """Of what decides what a check sees."""
        found = {name: version for name, version in versions().items() if name in SHOWN_VERSIONS}
        return ", ".join(f"{name} {version}" for name, version in found.items())

    def __str__(self) -> str:
        import io

        from rich.console import Console

        from .console import print_report

        out = io.StringIO()
        print_report(self, Console(file=out, width=110, highlight=False))
        return out.getvalue()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """In a notebook: the page, in a frame of its own so that its style stays inside."""
        from html import escape

        from .page import page

        return f'<iframe srcdoc="{escape(page(self))}" style="width:100%;height:34rem;border:0"></iframe>'

    def redacted(self) -> "Report":
        """Without text of the user's data: ids, rows and positions stay; an exception's message may quote a row."""
        checks = [
            dataclasses.replace(
                c,
                measured=CRASH.sub(r"\1 \2", c.measured),
                evidence=[{k: v for k, v in e.items() if k != "text"} for e in c.evidence],
            )
            for c in self.checks
        ]
        return Report(self.target, checks)

    def to_dict(self) -> dict[str, Any]:
        summary: dict[str, Any] = {status: self.count(status) for status in STATUSES}
        summary |= {"exit_code": self.exit_code, "seconds": round(sum(c.seconds for c in self.checks), 3)}
        rows = [dataclasses.asdict(c) for c in self.checks]
        return {"version": VERSION, "llmkit": __version__, "target": self.target, "checks": rows, "summary": summary}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Report":
        """Fields of another version are left out."""
        known = {field.name for field in dataclasses.fields(CheckResult)}
        return cls(
            value["target"], [CheckResult(**{k: v for k, v in row.items() if k in known}) for row in value["checks"]]
        )

    def to_json(self) -> str:
        """As any UTF-8 file can hold it: half a surrogate pair is \\ud83d, as JSON has it."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, default=str) + "\n"
        return text.encode(errors="backslashreplace").decode()

    def write_json(self, path: Path) -> None:
        path.write_text(self.to_json(), encoding="utf-8")
