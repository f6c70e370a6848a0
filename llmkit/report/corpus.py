"""What became of a corpus: a page for people that opens without a network, and a summary for the console.

    page(figures) -> html;  print_summary(figures, console)

Reads the figures of `report.json` that `llmkit data` writes; imports no stage. Plots are small inline SVG.
"""

import math
import re
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

FATES = {
    "bad": ("Rows that could not be read", "left out"),
    "dropped": ("Documents that were dropped", "dropped"),
    "changed": ("Documents that were changed", "changed"),
    "seen": ("Found, and kept as it is", "kept"),
}
TODO = {
    "mojibake": "text was decoded with the wrong encoding: look at the rows below; fix_encoding: true mends them",
    "null-word": "documents that are the word None or null: empty fields were written as text; drop them at the source",
    "replacement-character": "U+FFFD: characters were lost before the text came here; fetch it again if it matters",
    "control-character": "control characters: terminal output or binary data in the text",
    "not-cuttable": "documents of more than 256 KB without a place to cut them; part them at the source",
}
MANY_UNUSED, LOW_FILL, MANY_DROPPED = 0.2, 0.95, 0.5  # shares from which a finding is worth a line
RARE = 0.0001  # share of the characters under which a script is not shown
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 190, 52, 34  # of a plot, in px
CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #59616a; --line: #d8dce1; --paper: #fff; --card: #f6f7f9;
  --bar: #3d6ea8; --drop: #c4622d; --warn: #8a5a00; --good: #1d6b3a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3abb5; --line: #3a4048; --paper: #16181b;
  --card: #1f2226; --bar: #7fb0e8; --drop: #f0a06a; --warn: #ffc861; --good: #7ddb9c; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 1.6rem auto; padding: 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1rem; font-weight: 600; margin: 0; color: var(--soft); } h1 b { color: var(--ink); }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; break-after: avoid; }
.verdict { font-size: 1.35rem; font-weight: 650; margin: .3rem 0 .6rem; }
.soft { color: var(--soft); } .small { font-size: .9rem; }
ul.look { list-style: none; padding: 0; margin: .6rem 0; }
ul.look li { border-left: 5px solid var(--warn); background: var(--card); padding: .35rem .8rem; margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 34%; } .track { display: flex; height: .8rem; margin-top: .35rem; }
.track i { background: var(--bar); } .track i + i { background: var(--drop); opacity: .75; }
summary { cursor: pointer; } details ul { list-style: none; margin: .3rem 0 .6rem; padding: 0; }
details li { margin: 0 0 .35rem; }
pre { margin: .1rem 0 0; padding: .3rem .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .25rem; white-space: pre-wrap; unicode-bidi: isolate;
  font: .84rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre i { font-style: normal; color: var(--warn); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } figure { margin: 0; max-width: 100%; }
figcaption { font-size: .9rem; color: var(--soft); } svg { max-width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .grid { stroke: var(--line); }
svg .mark { fill: var(--bar); } svg .curve { stroke: var(--bar); fill: none; stroke-width: 2; }
@media print { body { margin: 0; max-width: none; font-size: 10.5pt; } }
"""
PRINTED = """addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => d.open = true));"""
SIGN = re.compile(r"[ \x00-\x1f\x7f-\x9f]")
SIGNS = {" ": "·", "\n": "\\n\n", "\t": "\\t", "\r": "\\r"}


def page(figures: dict[str, Any]) -> str:
    """A whole HTML document."""
    parts = [
        f"<h1>llmkit data: <b>{escape(figures['corpus'])}</b> <span>{escape(figures.get('made', ''))}</span></h1>",
        f'<p class="verdict">{escape(verdict(figures))}</p>',
        _look(figures),
        _flow(figures["flow"]),
        *(_reasons(figures["reasons"], fate) for fate in FATES),
        _stores(figures["stores"]),
        _sources(figures["sources"]),
        _text(figures),
        _seconds(figures.get("seconds", {})),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>llmkit data: {escape(figures['corpus'])}</title><style>{CSS}</style><script>{PRINTED}</script></head>"
        "<body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n"
    )


def print_summary(figures: dict[str, Any], console: Console) -> None:
    """What came in, what happened, what came out, as aligned tables."""
    flow = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("left", "right", "left", "right"):
        flow.add_column(justify=justify)  # type: ignore[arg-type]
    for step in figures["flow"]:
        flow.add_row(step["step"], f"{step['documents']:,}", "documents", megabytes(step["bytes"]))
    console.print(flow, "")
    if figures["reasons"]:
        reasons = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("", "reason"):
            reasons.add_column(name, overflow="fold")
        for name in ("rows", "share"):
            reasons.add_column(name, justify="right")
        for r in figures["reasons"]:
            reasons.add_row(r["fate"], r["reason"], f"{r['count']:,}", f"{r['share']:.2%}")
        console.print(reasons, "")
    stores = Table(box=None, pad_edge=False, header_style="bold")
    stores.add_column("store", overflow="fold")
    for name in ("documents", "tokens", "bytes each", "rows", "filled"):
        stores.add_column(name, justify="right")
    for name, store in figures["stores"].items():
        packing = store.get("packing")
        filled = (f"{packing['rows']:,}", f"{packing['utilisation']:.2%}") if packing else ("", "")
        counts = (f"{store['documents']:,}", f"{store['tokens']:,}", f"{store['bytes_per_token']:.2f}")
        stores.add_row(name, *counts, *filled)
    console.print(stores, "")


def verdict(figures: dict[str, Any]) -> str:
    """What came out, and what most of the rest fell to, in a sentence."""
    rows = sum(source["rows"] for source in figures["sources"])
    documents = sum(store["documents"] for store in figures["stores"].values())
    tokens = sum(store["tokens"] for store in figures["stores"].values())
    gone = [r for r in figures["reasons"] if r["fate"] in ("bad", "dropped")]
    became = f"{rows:,} rows became {documents:,} documents of {tokens:,} tokens"
    if not gone:
        return f"{became}; none was dropped."
    most = max(gone, key=lambda r: r["count"])
    return f"{became}; {sum(r['count'] for r in gone):,} fell out, most of them as {most['reason']}."


def findings(figures: dict[str, Any]) -> list[str]:
    """What a person should look at before training, each with what to do."""
    found = []
    if bad := [r for r in figures["reasons"] if r["fate"] == "bad"]:
        kinds = ", ".join(f"{r['reason']} {r['count']:,}" for r in bad)
        found.append(
            f"rows that could not be read: {kinds}; where they are stands below, mend the file if they are many"
        )
    for r in figures["reasons"]:
        if r["reason"] in TODO:
            found.append(f"{r['count']:,} × {r['reason']}: {TODO[r['reason']]}")
        elif r["share"] > MANY_DROPPED:
            found.append(f"{r['reason']} takes {r['share']:.0%} of all rows: is it meant for this text?")
    if common := figures.get("boilerplate"):
        found.append(
            f"runs of 13 words of {len(common):,} held-back texts stand in so many training documents that they count "
            f"as boilerplate (a licence, a header), e.g. {common[0]}"
        )
    for name, store in figures["stores"].items():
        if (packing := store.get("packing")) and packing["utilisation"] < LOW_FILL:
            found.append(
                f"{name}: rows of {packing['max_length']:,} are {packing['utilisation']:.1%} full; documents of few "
                "different lengths fit badly: try another max_length"
            )
    frequencies = figures.get("frequencies")
    if frequencies and frequencies["unused"] > MANY_UNUSED * frequencies["vocabulary"]:
        found.append(
            f"{frequencies['unused']:,} of {frequencies['vocabulary']:,} ids never occur in the training text: "
            "take a smaller vocabulary, or more text"
        )
    return found


def _look(figures: dict[str, Any]) -> str:
    found = findings(figures)
    return f'<ul class="look">{"".join(f"<li>{escape(line)}</li>" for line in found)}</ul>' if found else ""


def _table(head: list[str], rows: list[list[Any]]) -> str:
    """Cells that are numbers (or given as ("n", text)) stand right; ("html", text) is put in as it is."""

    def cell(value: Any, tag: str = "td") -> str:
        kind, text = value if isinstance(value, tuple) else ("n" if isinstance(value, int) else "", value)
        shown = f"{text:,}" if isinstance(text, int) else str(text)
        css = f' class="{kind}"' if kind in ("n", "bar") else ""
        return f"<{tag}{css}>{shown if kind in ('html', 'bar') else escape(shown)}</{tag}>"

    right = [isinstance(v, int) or (isinstance(v, tuple) and v[0] == "n") for v in rows[0]] if rows else []
    heads = "".join(cell(("n", h) if r else h, "th") for h, r in zip(head, right, strict=True)) if rows else ""
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{heads}</tr>{body}</table>"


def megabytes(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} KB"


def _flow(flow: list[dict[str, Any]]) -> str:
    """What is left after each step, as bars of the documents that came in."""
    first = max(1, flow[0]["documents"])
    rows, before = [], first
    for step in flow:
        here, lost = step["documents"] / first, (before - step["documents"]) / first
        bar = f'<div class="track"><i style="width:{here:.2%}"></i><i style="width:{lost:.2%}"></i></div>'
        lost_text = f"−{before - step['documents']:,}" if before > step["documents"] else ""
        row = [step["step"], step["documents"], ("n", lost_text), ("n", megabytes(step["bytes"])), ("bar", bar)]
        rows.append(row)
        before = step["documents"]
    return "<h2>The training text, step by step</h2>" + _table(["after", "documents", "lost", "size", ""], rows)


def _reasons(reasons: list[dict[str, Any]], fate: str) -> str:
    mine = [r for r in reasons if r["fate"] == fate]
    if not mine:
        return ""
    rows = []
    for r in mine:
        examples = "".join(map(_example, r["examples"]))
        name = f"<details><summary>{escape(r['reason'])}</summary><ul>{examples}</ul></details>"
        rows.append([("html", name), r["count"], ("n", f"{r['share']:.2%}"), ("n", megabytes(r["bytes"]))])
    title, verb = FATES[fate]
    return f"<h2>{title}</h2>" + _table(
        [f"reason (open it for up to ten rows that were {verb})", "rows", "share", "size"], rows
    )


def _example(example: dict[str, Any]) -> str:
    note = f" · {escape(example['note'])}" if example.get("note") else ""
    return f'<li><span class="soft small">{escape(example["where"])}{note}</span>{_quoted(example["text"])}</li>'


def _quoted(text: str) -> str:
    """White space and control characters as signs."""

    def sign(match: re.Match[str]) -> str:
        char = match[0]
        return f"<i>{SIGNS[char]}</i>" if char in SIGNS else f"<i>\\x{ord(char):02x}</i>"

    return f"<pre>{SIGN.sub(sign, escape(text))}</pre>" if text else ""


def _stores(stores: dict[str, dict[str, Any]]) -> str:
    rows: list[list[Any]] = []
    for name, store in stores.items():
        packing = store.get("packing")
        fill = f"{packing['utilisation']:.2%} of {packing['rows']:,} × {packing['max_length']:,}" if packing else ""
        rows.append([name, store["documents"], store["tokens"], ("n", f"{store['bytes_per_token']:.2f}"), ("n", fill)])
    return "<h2>Token stores</h2>" + _table(["store", "documents", "tokens", "bytes per token", "rows filled"], rows)


def _sources(sources: list[dict[str, Any]]) -> str:
    rows: list[list[Any]] = []
    for s in sources:
        q = s["quantiles"]
        lengths = [("n", f"{q[key]:,.0f}" if key in q else "") for key in ("0.1", "0.5", "0.9")]
        size = ("n", megabytes(s["bytes"]))
        rows.append([s["name"], s["store"], s["rows"], s["documents"], size, *lengths, s["longest"]])
    head = ["source", "store", "rows", "documents", "size", "10 % below", "median bytes", "90 % below", "longest"]
    plots = [
        f"<figure>{histogram(*s['histogram'])}<figcaption>{escape(s['name'])}</figcaption></figure>"
        for s in sources[:6]
        if s["documents"] > 1
    ]
    return f'<h2>Sources</h2>{_table(head, rows)}<div class="plots">{"".join(plots)}</div>'


def _text(figures: dict[str, Any]) -> str:
    scripts = [
        [name, ("n", f"{share:.2%}"), ("bar", f'<div class="track"><i style="width:{share:.2%}"></i></div>')]
        for name, share in figures["scripts"].items()
        if share >= RARE
    ]
    out = "<h2>Characters</h2>" + _table(["script", "share", ""], scripts)
    if figures["lines"]:
        lines = [[count, ("html", _quoted(line[:160]))] for line, count in figures["lines"][:10]]
        out += "<h2>Commonest lines</h2>" + _table(["documents", "line"], lines)
    if frequencies := figures.get("frequencies"):
        size, unused, rare = (frequencies[key] for key in ("vocabulary", "unused", "under_100"))
        note = f"{unused:,} of {size:,} ids never occur ({unused / size:.1%}), {rare:,} fewer than 100 times"
        plot = curve(frequencies["zipf"], "rank of the id", "occurrences")
        out += f"<h2>Vocabulary</h2><figure>{plot}<figcaption>{escape(note)}</figcaption></figure>"
    return out


def _seconds(seconds: dict[str, dict[str, float]]) -> str:
    if not seconds:
        return ""
    rows = [[name, ("n", f"{s['wall_s']:,.1f}"), ("n", f"{s['cpu_s']:,.1f}")] for name, s in seconds.items()]
    table = _table(["step", "seconds, all tasks", "CPU seconds"], rows)
    return f"<details><summary>What it took</summary>{table}</details>"


# plots


def _ticks(low: float, high: float) -> list[int]:
    """Powers of ten from low to high, not more than six of them."""
    powers = range(math.ceil(math.log10(max(low, 1))), math.floor(math.log10(max(high, 1))) + 1)
    return [10**p for p in powers][:: max(1, math.ceil(len(powers) / 6))]


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def _svg(title: str, body: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg {size} role="img"><title>{escape(title)}</title>{body}</svg>'


def _log_place(value: float, low: float, high: float, start: float, stop: float) -> float:
    span = math.log10(high) - math.log10(low) or 1.0
    return start + (stop - start) * (math.log10(value) - math.log10(low)) / span


def _x_axis(low: float, high: float, label: str) -> str:
    base = HEIGHT - BOTTOM
    body = f'<line class="grid" x1="{LEFT}" y1="{base}" x2="{WIDTH}" y2="{base}"/>'
    for tick in _ticks(low, high):
        x = _log_place(tick, low, high, LEFT, WIDTH - 12)
        body += f'<text x="{x:.1f}" y="{base + 14}" text-anchor="middle">{_short(tick)}</text>'
    return body + f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>'


def histogram(edges: list[float], counts: list[int], label: str = "bytes of a document") -> str:
    """Bars over logarithmic edges; the axis begins at the first bar that is not empty."""
    filled = [i for i, count in enumerate(counts) if count]
    first, last = (filled[0], filled[-1]) if filled else (0, len(counts) - 1)
    low, high, top, base = edges[first], edges[last + 1], max(counts) or 1, HEIGHT - BOTTOM
    body = _x_axis(low, high, label)
    for share in (0.5, 1.0):
        y = base - share * (base - 14)
        body += f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}"/>'
        body += f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(round(top * share))}</text>'
    for i in range(first, last + 1):
        a, b = (_log_place(edges[i + k], low, high, LEFT, WIDTH - 12) for k in (0, 1))
        height = counts[i] / top * (base - 14)
        place = f'x="{a:.1f}" y="{base - height:.1f}" width="{max(1, b - a - 1):.1f}" height="{height:.1f}"'
        body += f'<rect class="mark" {place}/>'
    return _svg(f"histogram: {label}", body)


def curve(points: list[list[int]], x_label: str, y_label: str) -> str:
    """A line through (x, y), both axes logarithmic; points with y = 0 are left out."""
    shown = [(x, y) for x, y in points if y > 0]
    if len(shown) < 2:
        return ""
    x_high, y_low, y_high = shown[-1][0], min(y for _, y in shown), max(y for _, y in shown)
    base = HEIGHT - BOTTOM
    body = _x_axis(1, x_high, x_label)
    for tick in _ticks(y_low, y_high):
        y = _log_place(tick, y_low, y_high, base, 14)
        body += f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}"/>'
        body += f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
    places = (
        f"{_log_place(x, 1, x_high, LEFT, WIDTH - 12):.1f},{_log_place(y, y_low, y_high, base, 14):.1f}"
        for x, y in shown
    )
    body += f'<polyline class="curve" points="{" ".join(places)}"/>'
    return _svg(f"{y_label} by {x_label}, logarithmic", body)
