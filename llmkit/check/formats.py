"""The report for other programs: GitHub annotations and JUnit.   print(github(report)); print(junit(report))"""

from xml.etree import ElementTree

from .console import evidence_line
from .report import CheckResult, Report

LEVELS = {"fail": "error", "warn": "warning", "not_run": "warning"}


def _text(c: CheckResult) -> str:
    lines = [c.measured, *(f"limit: {c.limit}" for _ in [0] if c.limit), *map(evidence_line, c.evidence[:5])]
    return "\n".join([*lines, *(f"do: {' '.join(c.fix.split())}" for _ in [0] if c.fix)])


def _escaped(text: str, extra: str = "") -> str:
    """Workflow commands escape %, CR and LF; in properties also : and , ."""
    for character in f"%\r\n{extra}":
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def github(report: Report) -> str:
    """A workflow command per finding, and a notice with the summary."""
    lines = [
        f"::{LEVELS[c.status]} title={_escaped(f'{c.id} ({c.status})', ':,')}::{_escaped(_text(c))}"
        for c in report.checks
        if c.status in LEVELS
    ]
    return "\n".join([*lines, f"::notice title=llmkit check::{_escaped(f'{report.target}: {report.summary()}')}"])


def junit(report: Report) -> str:
    """One test case per check; what did not run is an error, what does not apply is skipped."""
    counts = {"tests": len(report.checks), "failures": report.count("fail"), "errors": report.count("not_run"),
              "skipped": report.count("not_applicable")}  # fmt: skip
    suite = ElementTree.Element(
        "testsuite", name=f"llmkit check {report.target}", **{k: str(v) for k, v in counts.items()}
    )
    for c in report.checks:
        case = ElementTree.SubElement(suite, "testcase", classname=c.family, name=c.id, time=f"{c.seconds:.3f}")
        kind = {"fail": "failure", "not_run": "error", "not_applicable": "skipped", "warn": "system-out"}.get(c.status)
        if kind in ("failure", "error", "skipped"):
            ElementTree.SubElement(case, kind, message=_clean(c.measured)).text = _clean(_text(c))
        elif kind:
            ElementTree.SubElement(case, kind).text = _clean(f"warning: {_text(c)}")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode")


def _clean(text: str) -> str:
    """Without the control characters that XML 1.0 forbids."""
    return "".join(c for c in text if c in "\t\n\r" or (ord(c) >= 32 and not 0xD800 <= ord(c) <= 0xDFFF))
