"""The report for other programs: GitHub annotations and JUnit.   print(github(report)); print(junit(report))"""

from xml.etree import ElementTree

from .console import advice, evidence_line
from .report import CheckResult, Report

LEVELS = {"fail": "error", "warn": "warning", "not_run": "warning"}
SHOWN_EVIDENCE = 5


def _text(c: CheckResult) -> str:
    """Title, finding, evidence and advice, a line each."""
    lines = [c.title, c.measured, f"limit: {c.limit}" if c.limit else ""]
    lines += [evidence_line(item) for item in c.evidence[:SHOWN_EVIDENCE]]
    lines += [": ".join(advice(c)) if c.fix else ""]
    return "\n".join(filter(None, lines))


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
    suite = ElementTree.Element(
        "testsuite",
        name=_clean(f"llmkit check {report.target}"),
        tests=str(len(report.checks)),
        failures=str(report.count("fail")),
        errors=str(report.count("not_run")),
        skipped=str(report.count("not_applicable")),
    )
    for c in report.checks:
        case = ElementTree.SubElement(suite, "testcase", classname=c.family, name=c.id, time=f"{c.seconds:.3f}")
        text = _clean(_text(c))
        if c.status == "warn":
            ElementTree.SubElement(case, "system-out").text = f"warning: {text}"
        elif c.status == "not_applicable":
            ElementTree.SubElement(case, "skipped", message=_clean(c.measured))
        elif c.status != "pass":
            kind = "failure" if c.status == "fail" else "error"
            ElementTree.SubElement(case, kind, message=_clean(c.measured)).text = text
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode")


def _clean(text: str) -> str:
    """Without the characters that XML 1.0 forbids."""
    return "".join(
        c for c in text if c in "\t\n\r" or 32 <= ord(c) < 0xD800 or 0xDFFF < ord(c) < 0xFFFE or ord(c) > 0xFFFF
    )
