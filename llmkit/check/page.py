"""The report as one page for people: self-contained, printable, readable without colours.   page(report) -> html

The first screen says what is wrong and what to do; what passed is folded away below.
"""

from html import escape
from typing import Any

from .console import MARK, visible
from .report import CheckResult, Report

SYMBOL = {"pass": "✓", "warn": "!", "fail": "✗", "not_run": "?", "not_applicable": "–"}
TITLES = {"fail": "What is wrong", "warn": "Look at this", "not_run": "Could not be checked"}
CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5d646d; --line: #d8dce1; --paper: #fff; --card: #f6f7f9;
  --fail: #b3261e; --warn: #8a5a00; --not_run: #6b3fa0; --pass: #1d6b3a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3abb5; --line: #3a4048; --paper: #16181b;
  --card: #1f2226; --fail: #ff8a80; --warn: #ffc861; --not_run: #cfa8ff; --pass: #7ddb9c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.45rem; margin: 0; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .6rem; }
.target { color: var(--soft); margin: .1rem 0 .9rem; overflow-wrap: anywhere; }
.counts { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; margin: 0; list-style: none; }
.counts li { border: 1px solid var(--line); border-radius: .5rem; padding: .15rem .7rem; }
.verdict { font-size: 1.15rem; font-weight: 600; margin: .2rem 0 .8rem; }
article { border: 1px solid var(--line); border-left: 5px solid var(--soft); border-radius: .4rem;
  background: var(--card); padding: .7rem 1rem; margin: .7rem 0; break-inside: avoid; }
article h3 { margin: 0; font-size: 1.02rem; } article p { margin: .3rem 0; }
.fail { border-left-color: var(--fail); } .warn { border-left-color: var(--warn); }
.not_run { border-left-color: var(--not_run); }
.mark { font-weight: 700; } .fail .mark, .mark.fail { color: var(--fail); }
.warn .mark, .mark.warn { color: var(--warn); }
.not_run .mark, .mark.not_run { color: var(--not_run); } .mark.pass { color: var(--pass); }
.do { font-weight: 600; } .soft { color: var(--soft); font-size: .9rem; }
ul.evidence { list-style: none; margin: .4rem 0; padding: 0; }
ul.evidence li { margin: .25rem 0; } code { font: .88rem/1.45 ui-monospace, monospace; background: var(--paper);
  border: 1px solid var(--line); border-radius: .25rem; padding: .05rem .3rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); }
td:first-child { white-space: nowrap; } summary { cursor: pointer; margin: 1.6rem 0 .5rem; font-weight: 600; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } details > * { display: revert; } }
"""


def page(report: Report) -> str:
    found = {status: [c for c in report.checks if c.status == status] for status in TITLES}
    body = [
        "<h1>llmkit check</h1>",
        f'<p class="target">{escape(report.target)}</p>',
        f'<p class="verdict">{escape(_verdict(report))}</p>',
        f'<ul class="counts">{"".join(_count(report, status) for status in (*TITLES, "pass", "not_applicable"))}</ul>',
    ]
    for status, title in TITLES.items():
        if found[status]:
            body.append(f"<h2>{title}</h2>" + "".join(map(_card, found[status])))
    rest = [c for c in report.checks if c.status in ("pass", "not_applicable")]
    if rest:
        rows = "".join(map(_row, sorted(rest, key=lambda c: c.status == "not_applicable")))
        head = "<tr><th></th><th>check</th><th>what was measured</th><th>limit</th></tr>"
        is_open = "" if any(found.values()) else " open"
        body.append(
            f"<details{is_open}><summary>Passed and not applicable</summary><table>{head}{rows}</table></details>"
        )
    seconds = sum(c.seconds for c in report.checks)
    note = f"{len(report.checks)} checks in {seconds:.1f} s; versions: {escape(report.versions())}"
    body.append(f'<p class="soft">{note}</p>')
    title = f"{SYMBOL['fail' if found['fail'] else 'pass']} llmkit check: {report.target}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _verdict(report: Report) -> str:
    fails, unknown, warnings = (report.count(status) for status in ("fail", "not_run", "warn"))
    if fails:
        return (
            f"{fails} check{'s' * (fails > 1)} failed: mend {'them' if fails > 1 else 'it'} before you start the run."
        )
    if unknown:
        return f"Nothing failed, but {unknown} check{'s' * (unknown > 1)} could not run."
    return "Nothing failed." + (f" {warnings} warning{'s' * (warnings > 1)} to look at." if warnings else "")


def _count(report: Report, status: str) -> str:
    mark = f'<span class="mark {status}">{SYMBOL[status]}</span>'
    return f"<li>{mark} {report.count(status)} {escape(MARK[status] if status != 'fail' else 'failed')}</li>"


def _card(c: CheckResult) -> str:
    parts = [f'<h3><span class="mark">{SYMBOL[c.status]} {MARK[c.status]}</span> {escape(c.id)}</h3>']
    limit = f' <span class="soft">(limit {escape(c.limit)})</span>' if c.limit else ""
    parts.append(f"<p>{escape(c.measured)}{limit}</p>")
    if c.fix:
        parts.append(f'<p class="do">→ {escape(" ".join(c.fix.split()))}</p>')
    if c.evidence:
        more = f'<p class="soft">and {len(c.evidence) - 8} more</p>' if len(c.evidence) > 8 else ""
        parts.append(f'<ul class="evidence">{"".join(map(_evidence, c.evidence[:8]))}</ul>{more}')
    return f'<article class="{c.status}" id="{escape(c.id)}">{"".join(parts)}</article>'


def _evidence(item: dict[str, Any]) -> str:
    where = ", ".join(f"{key} {item[key]}" for key in ("row", "position") if key in item)
    parts = [f'<span class="soft">{escape(where)}</span>'] if where else []
    if item.get("note"):
        parts.append(escape(str(item["note"])))
    if item.get("text") is not None:
        parts.append(f"<code>{escape(visible(str(item['text'])))}</code>")
    elif item.get("ids"):
        parts.append(f"<code>ids {escape(str(item['ids'][:24]))}</code>")
    return f"<li>{' · '.join(parts)}</li>"


def _row(c: CheckResult) -> str:
    mark = f'<span class="mark {c.status}">{SYMBOL[c.status]} {MARK[c.status]}</span>'
    return f"<tr><td>{mark}</td><td>{escape(c.id)}</td><td>{escape(c.measured)}</td><td>{escape(c.limit)}</td></tr>"
