"""The report as one page for people: self-contained, printable, readable without colours.   page(report) -> html

The first screen says what is wrong and what to do; evidence follows, and what passed is folded away below.
"""

import re
from collections.abc import Iterable
from html import escape
from typing import Any

from .console import MARK, advice, not_applicable, place, printable, visible
from .report import CheckResult, Report

SYMBOL = {"pass": "✓", "warn": "!", "fail": "✗", "not_run": "?", "not_applicable": "–"}
WORD = {"pass": "passed", "warn": "warned", "fail": "failed", "not_run": "did not run", "not_applicable": "n/a"}
TITLES = {"fail": "What is wrong", "not_run": "What could not be checked", "warn": "What to look at"}
MANY = 3  # findings from which on a list of them comes first
SHOWN_EVIDENCE = 8
LONGEST = 600  # characters of a decoded text
SIGNS = re.compile(r"\\(?:[nrt\\]|x\w\w|u\w{4}|U\w{8})|·+")  # what `visible` writes for white space
CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #59616a; --line: #d8dce1; --paper: #fff; --card: #f6f7f9;
  --fail: #b3261e; --warn: #8a5a00; --not_run: #6b3fa0; --pass: #1d6b3a; --sign: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3abb5; --line: #3a4048; --paper: #16181b;
  --card: #1f2226; --fail: #ff8a80; --warn: #ffc861; --not_run: #cfa8ff; --pass: #7ddb9c; --sign: #d9a13b; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 1.6rem auto; padding: 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1rem; font-weight: 600; margin: 0; color: var(--soft); } h1 b { color: var(--ink); }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; } h2, h3 { break-after: avoid; } li, tr { break-inside: avoid; }
.verdict { font-size: 1.35rem; font-weight: 650; margin: .3rem 0 .5rem; }
.counts { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; padding: 0; margin: 0; list-style: none; }
.soft { color: var(--soft); } .small { font-size: .9rem; }
.mark { font-weight: 700; white-space: nowrap; }
.fail .mark { color: var(--fail); } .warn .mark { color: var(--warn); }
.not_run .mark { color: var(--not_run); } .pass .mark { color: var(--pass); }
ol.list { list-style: none; margin: .5rem 0; padding: 0; }
ol.list li { padding: .3rem 0 .3rem 5.5rem; border-top: 1px solid var(--line); position: relative; }
ol.list p { margin: 0; } ol.list .mark { position: absolute; left: 0; }
a { color: inherit; text-underline-offset: .15em; } a.id, h3 { font-weight: 650; }
article { border: 1px solid var(--line); border-left: 5px solid var(--soft); border-radius: .4rem;
  background: var(--card); padding: .6rem 1rem .7rem; margin: .7rem 0; }
article.fail { border-left-color: var(--fail); } article.warn { border-left: 5px dashed var(--warn); }
article.not_run { border-left: 5px dotted var(--not_run); }
h3 { margin: 0; font-size: 1.02rem; } h3 .soft { font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .9rem; margin: .35rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; } dd.do { font-weight: 600; }
dd ul { list-style: none; margin: 0; padding: 0; } dd li { margin: 0 0 .35rem; }
code { font: .86rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: .1rem 0 0; padding: .3rem .5rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: .25rem; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; direction: ltr;
  font: .86rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre i { font-style: normal; color: var(--sign); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; vertical-align: top; overflow-wrap: break-word; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid var(--line); }
tr.pass td:nth-child(-n+2) { white-space: nowrap; }
summary { cursor: pointer; margin: 1.4rem 0 .4rem; font-weight: 600; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .3rem; }
  tr.pass td:nth-child(-n+2) { white-space: normal; } }
@media print { body { margin: 0; max-width: none; font-size: 10.5pt; } }
"""
PRINTED = """addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => d.open = true));"""


def page(report: Report, extra: str = "", style: str = "") -> str:
    """`extra`: HTML between what was found and what passed, with CSS of its own."""
    found = {status: [c for c in report.checks if c.status == status] for status in TITLES}
    counts = "".join(_count(report, status) for status in (*TITLES, "pass", "not_applicable") if report.count(status))
    body = [
        f"<h1>llmkit check: <b>{html_text(report.target)}</b></h1>",
        f'<p class="verdict">{html_text(verdict(report))}</p>',
        f'<ul class="counts">{counts}</ul>',
    ]
    all_found = [c for checks in found.values() for c in checks]
    if len(all_found) >= MANY:
        body.append(f'<ol class="list">{"".join(map(_listed, all_found))}</ol>')
    for status, title in TITLES.items():
        if found[status]:
            body.append(f"<h2>{title}</h2>{''.join(map(_card, found[status]))}")
    body += [extra, _passed(report, is_open=not all_found), _not_applicable(report)]
    seconds = sum(c.seconds for c in report.checks)
    note = f"{len(report.checks)} checks in {seconds:.1f} s; {report.versions()}"
    body.append(f'<p class="soft small">{html_text(note)}</p>')
    title = f"{SYMBOL['fail' if found['fail'] else 'pass']} llmkit check: {report.target}"
    return document(title, body, style, PRINTED)


def document(title: str, parts: Iterable[str], style: str = "", script: str = "") -> str:
    """A whole page of HTML parts, empty ones left out, in our own style and what comes on top of it."""
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html_text(title)}</title><style>{CSS}{style}</style>{code}</head><body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def verdict(report: Report) -> str:
    """What to make of it, in a sentence."""
    fails, unknown, warnings = (report.count(status) for status in ("fail", "not_run", "warn"))
    if fails:
        return f"{_checks(fails)} failed: mend {'it' if fails == 1 else 'them'} before you start the run."
    if unknown:
        return f"Nothing failed, but {_checks(unknown)} could not run."
    if warnings:
        return f"Nothing failed; {_checks(warnings)} warned: have a look."
    return "Nothing wrong was found." if report.count("pass") else "Nothing was checked."


def _checks(count: int) -> str:
    return f"{count} check{'s' * (count != 1)}"


def html_text(value: str) -> str:
    return escape(printable(value))


def _prose(value: str) -> str:
    """Text in which `backticks` stand around code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html_text(value))


def _count(report: Report, status: str) -> str:
    return f'<li class="{status}"><span class="mark">{SYMBOL[status]}</span> {report.count(status)} {WORD[status]}</li>'


def _listed(c: CheckResult) -> str:
    """A finding in the list at the top: what is wrong, and what to do."""
    head = f'<span class="mark">{SYMBOL[c.status]} {MARK[c.status]}</span>'
    name = f'<a class="id" href="#{html_text(c.id)}">{html_text(c.id)}</a>'
    what = html_text(c.title if c.status != "not_run" and c.title else c.measured)
    todo = f'<p class="small soft">→ {_prose(advice(c)[1])}</p>' if c.fix else ""
    return f'<li class="{c.status}">{head}{name} <span>{what}</span>{todo}</li>'


def _card(c: CheckResult) -> str:
    head = f'<span class="mark">{SYMBOL[c.status]} {MARK[c.status]}</span> {html_text(c.id)}'
    lines = [("why" if c.status == "not_run" else "found", "", html_text(c.measured))]
    if c.limit:
        lines.append(("limit", "", html_text(c.limit)))
    if c.fix:
        kind, text = advice(c)
        lines.append((kind, kind, _prose(text)))
    if c.evidence:
        more = len(c.evidence) - SHOWN_EVIDENCE
        rest = f'<li class="soft">and {more} more</li>' if more > 0 else ""
        lines.append(("where", "", f"<ul>{''.join(map(_evidence, c.evidence[:SHOWN_EVIDENCE]))}{rest}</ul>"))
    rows = "".join(f'<dt>{name}</dt><dd class="{kind}">{text}</dd>' for name, kind, text in lines)
    title = f'<span class="soft">{html_text(c.title)}</span>' if c.title else ""
    return f'<article class="{c.status}" id="{html_text(c.id)}"><h3>{head}</h3>{title}<dl>{rows}</dl></article>'


def _evidence(item: dict[str, Any]) -> str:
    parts = [f'<span class="soft">{html_text(place(item))}</span>', html_text(item.get("note") or "")]
    if item.get("text") is None and item.get("ids"):
        parts.append(f"<code>ids {html_text(str(item['ids'][:24]))}</code>")
    line = " · ".join(part for part in parts if part and part != '<span class="soft"></span>')
    text = item.get("text")
    return f"<li>{line}{_quoted(str(text)) if text is not None else ''}</li>"


def _quoted(text: str) -> str:
    """The user's text with its white space as signs; lines end where they do in the text."""
    marked = SIGNS.sub(lambda sign: f"<i>{sign[0]}</i>", escape(visible(text, LONGEST)))
    return f"<pre>{re.sub(r'<i>.n</i>(?!$)', lambda sign: sign[0] + chr(10), marked)}</pre>"


def _passed(report: Report, is_open: bool) -> str:
    passed = [c for c in report.checks if c.status == "pass"]
    if not passed:
        return ""
    rows = "".join(
        f'<tr class="pass"><td class="mark">{SYMBOL["pass"]} {MARK["pass"]}</td><td>{html_text(c.id)}</td>'
        f"<td>{html_text(c.measured)}</td><td>{html_text(c.limit)}</td></tr>"
        for c in passed
    )
    head = "<tr><th></th><th>check</th><th>what was measured</th><th>limit</th></tr>"
    summary = f"<summary>{_checks(len(passed))} passed</summary>"
    return f"<details{' open' * is_open}>{summary}<table>{head}{rows}</table></details>"


def _not_applicable(report: Report) -> str:
    reasons = not_applicable(report)
    if not reasons:
        return ""
    ids = {reason: [c.id for c in report.checks if c.measured == reason] for reason, _ in reasons}
    rows = "".join(f"<tr><td>{html_text(r)}</td><td>{html_text(', '.join(ids[r]))}</td></tr>" for r, _ in reasons)
    summary = f"<summary>{_checks(report.count('not_applicable'))} did not apply</summary>"
    return f"<details>{summary}<table>{rows}</table></details>"
