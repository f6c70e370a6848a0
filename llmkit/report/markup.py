"""What a report page is made of: harmless text, tables, bars.   document(title, body) -> html

The page opens without a network and runs nothing: one file, no script, and a policy that forbids both. Every string
that came from outside goes through `text` or `quoted`; only `Html` is put in as it is. Leaves out plots (svg.py).
"""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from html import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Control characters, blanks that look like another blank or like nothing, what reorders a line, halves of surrogate
# pairs (UTF-8 cannot hold them), tags. The joiners U+200C and U+200D stay: emoji and Persian are spelt with them.
UNSEEN = (
    "[\x00-\x1f\x7f-\xa0\xad\u061c\u1680\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u2064\u2066-\u206f\u3000\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
UNSEEN_RE = re.compile(UNSEEN)
SIGN = re.compile(f"(?m:^ +| +$| {{2,}})|{UNSEEN}")  # single blanks between words are seen anyway
INNER = re.compile(f" {{2,}}|{UNSEEN}")  # in the middle of a text
MOST_PAIRS = 4_000_000  # of words compared: a second or two
NAMES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #59616a; --line: #d8dce1; --paper: #fff; --card: #f6f7f9;
  --bar: #3d6ea8; --lost: #c4622d; --warn: #8a5a00; --good: #1d6b3a; --sign: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3abb5; --line: #3a4048; --paper: #16181b;
  --card: #1f2226; --bar: #7fb0e8; --lost: #f0a06a; --warn: #ffc861; --good: #7ddb9c; --sign: #d9a13b; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 1.6rem auto; padding: 0 1.25rem 2rem; overflow-wrap: anywhere; }
h1 { font-size: 1rem; font-weight: 600; margin: 0; color: var(--soft); } h1 b { color: var(--ink); }
h1 span { font-weight: 400; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; } h2, h3 { break-after: avoid; }
li, tr, figure { break-inside: avoid; }
.verdict { font-size: 1.35rem; font-weight: 650; line-height: 1.35; margin: .3rem 0 .6rem; }
.soft { color: var(--soft); } .small { font-size: .9rem; } p.soft { margin: .2rem 0 .5rem; }
ul.look { list-style: none; padding: 0; margin: .5rem 0; }
ul.look li { border-left: 5px solid var(--warn); background: var(--card); padding: .4rem .8rem; margin: .35rem 0;
  border-radius: 0 .3rem .3rem 0; }
ul.look b { font-weight: 600; } ul.look span { display: block; color: var(--soft); font-size: .93rem; }
p.fine { border-left: 5px solid var(--good); background: var(--card); padding: .4rem .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
td, th { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: .86rem; vertical-align: bottom; overflow-wrap: normal; }
td:not(.n, .bar) { min-width: 7rem; } td:first-child:not(.n) { min-width: 8rem; }
td.n, th.n { text-align: right; width: 1%; font-variant-numeric: tabular-nums; } td.n { white-space: nowrap; }
th.n { min-width: 5.2rem; }
td.bar, th.bar { width: 26%; min-width: 5rem; } td:last-child, th:last-child { padding-right: 0; }
.track { display: flex; height: .8rem; margin-top: .35rem; border-radius: .1rem; overflow: hidden; }
.track i { background: var(--bar); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.track i + i, i.lost { background: var(--lost); }
i.key { display: inline-block; width: .8rem; height: .8rem; vertical-align: -.05rem; margin: 0 .2rem 0 .1rem;
  background: var(--bar); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
i.key.lost { background: var(--lost); }
summary { cursor: pointer; } summary:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
.folds { font-size: .93rem; } .folds h3 { font-size: .93rem; margin: 1.1rem 0 .1rem; }
.folds .line { display: grid; grid-template-columns: 1fr 5.5rem 5.5rem 6rem 22%; gap: 0 .9rem; padding: .3rem 0;
  border-bottom: 1px solid var(--line); list-style: none; font-variant-numeric: tabular-nums; }
.folds .line > * + * { text-align: right; }
.folds .line.head { color: var(--soft); font-size: .86rem; font-weight: 600; }
.folds summary::-webkit-details-marker { display: none; }
.folds .line > :first-child { padding-left: 1.1rem; text-indent: -1.1rem; }
.folds .line > :first-child::before { content: "▸"; display: inline-block; width: 1.1rem; text-indent: 0;
  color: var(--soft); }
.folds details[open] .line > :first-child::before { content: "▾"; } .folds .head > :first-child::before { content: ""; }
.folds ul { list-style: none; margin: .5rem 0 1rem 1.1rem; padding: 0; } .folds li { margin: 0 0 .55rem; }
pre { margin: .1rem 0 0; padding: .3rem .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .25rem; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: .84rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre bdi { color: var(--sign); border-bottom: 1px dotted; }
.plots { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; margin: 1rem 0; } figure { margin: 0; max-width: 100%; }
figcaption { font-size: .9rem; color: var(--soft); } figcaption b { color: var(--ink); font-weight: 600; }
svg { max-width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); } svg .mark { fill: var(--bar); }
svg .curve { stroke: var(--bar); fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .middle { stroke: var(--lost); stroke-width: 1.5; stroke-dasharray: 4 3; } svg text.middle { fill: var(--lost);
  stroke: none; }
svg .line, svg .level { fill: none; stroke: var(--bar); stroke-width: 1.8; stroke-linejoin: round; }
svg .dot { fill: var(--bar); } svg .lead { stroke: var(--line); } svg text.of { fill: var(--ink); }
svg .level { stroke-dasharray: 1 3; stroke-width: 1.4; }
svg .soft { stroke: var(--soft); stroke-width: 1; } svg text.soft { stroke: none; }
svg .k1 { stroke: var(--lost); } svg .line.k1 { stroke-dasharray: 7 3; } svg .dot.k1 { fill: var(--lost); }
svg .k2 { stroke: var(--good); } svg .line.k2 { stroke-dasharray: 2 2; } svg .dot.k2 { fill: var(--good); }
svg .k3 { stroke: var(--ink); } svg .line.k3 { stroke-dasharray: 9 2 2 2; } svg .dot.k3 { fill: var(--ink); }
svg .k4 { stroke: var(--sign); } svg .line.k4 { stroke-dasharray: 12 4; } svg .dot.k4 { fill: var(--sign); }
svg .k5 { stroke: var(--soft); } svg .line.k5 { stroke-dasharray: 4 2 1 2; } svg .dot.k5 { fill: var(--soft); }
svg text.of { stroke: none; } svg .dot { stroke: none; }
@media (max-width: 40rem) { .roomy { display: none; } td, th { padding-right: .6rem; }
  td:first-child:not(.n) { min-width: 7rem; } th.n { min-width: 0; }
  td.bar, th.bar { min-width: 3rem; } .folds .line { grid-template-columns: 1fr 4.6rem 4.6rem; }
  .folds .line > :first-child { grid-column: 1 / -1; } .folds .line > :nth-child(2) { grid-column: 1; }
  .folds .line > :last-child { display: none; } }
@media print { body { margin: 0; max-width: none; font-size: 10.5pt; } .wide { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


class Html(str):
    """Markup that is put in as it is."""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole HTML document in our style and what comes on top of it; empty parts of the body are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{CSS}{style}</style></head><body>\n"
        + "\n".join(filter(None, body))
        + "\n</body></html>\n"
    )


def _code(char: str) -> str:
    point = ord(char)
    return NAMES.get(char) or (
        f"\\x{point:02x}" if point < 256 else f"\\u{point:04x}" if point < 65536 else f"\\U{point:08x}"
    )


def printable(value: object) -> str:
    """On one line; what is unseen, reorders the line or breaks UTF-8 stands as an escape."""
    return UNSEEN_RE.sub(lambda match: _code(match[0]), str(value))


def text(value: object) -> str:
    """A string from outside as harmless markup."""
    return escape(printable(value))


def name(value: object) -> Html:
    """A name from outside, which cannot reorder what stands beside it."""
    return Html(f"<bdi>{text(value)}</bdi>")


def quoted(value: str) -> Html:
    """A text with its white space as signs; lines end where they do in the text."""
    return Html(f'<pre dir="auto">{_signed(value)}</pre>' if value else "")


def _signed(value: str, signs: re.Pattern[str] = SIGN) -> str:
    def sign(match: re.Match[str]) -> str:
        found = match[0]
        shown = "·" * len(found) if found[0] == " " else _code(found)
        return f"<bdi>{shown}</bdi>" + "\n" * (found == "\n")  # bdi: `dir=auto` looks past it for the direction

    return signs.sub(sign, escape(value))


def differing(old: str, new: str) -> Html:
    """The new text with what it has more underlined and what it lacks struck through, word by word.

    Texts of thousands of words are not compared: all of the old one, then all of the new one.
    """
    a, b = (re.findall(r"\s+|\S+", value) for value in (old, new))
    if len(a) * len(b) > MOST_PAIRS:
        a, b = [old], [new]
    body = ""
    for tag, i, j, k, end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            body += _signed("".join(a[i:j]), INNER)
            continue
        body += f"<del>{_signed(''.join(a[i:j]))}</del>" if j > i else ""
        body += f"<ins>{_signed(''.join(b[k:end]))}</ins>" if end > k else ""
    return Html(f'<pre dir="auto">{body}</pre>')


def table(head: list[str], rows: list[list[object]]) -> Html:
    """A table; `>rows` is a column of numbers, `|bar` of bars, `||bar` of bars that a small screen leaves out."""
    kinds = [
        "n" if title[0] == ">" else "bar roomy" if title[:2] == "||" else "bar" if title[0] == "|" else ""
        for title in head
    ]

    def line(tag: str, values: Iterable[object]) -> str:
        cells = zip(kinds, values, strict=True)
        return "<tr>" + "".join(f'<{tag} class="{k}">{cell(v)}</{tag}>' if k else f"<{tag}>{cell(v)}</{tag}>"
                                for k, v in cells) + "</tr>"  # fmt: skip

    body = "".join(line("td", row) for row in rows)
    return Html(f'<div class="wide"><table>{line("th", (title.lstrip(">|") for title in head))}{body}</table></div>')


def cell(value: object) -> str:
    if isinstance(value, Html):
        return value
    return "" if value is None else f"{value:,}" if isinstance(value, int) else name(value) if value else ""


def track(*shares: float) -> Html:
    """A bar; the second part of it is what was lost. It repeats a number beside it, so readers of the page skip it."""
    parts = "".join(f'<i style="width:{min(1, max(0, share)):.2%}"></i>' for share in shares if share > 0)
    return Html(f'<div class="track" aria-hidden="true">{parts}</div>')


def folded(summary: str, body: str) -> Html:
    return Html(f"<details><summary>{text(summary)}</summary>{body}</details>")


def percent(share: float | None) -> str:
    if share is None:
        return ""
    return "<0.01%" if 0 < share < 0.0001 else f"{share:.2%}"


def size_text(size: float | None) -> str:
    """Bytes in three digits: 9 B, 34.0 KB, 1.70 MB."""
    if size is None:
        return ""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("KB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:,.{2 if size < 9.995 else 1 if size < 99.95 else 0}f} {unit}"
