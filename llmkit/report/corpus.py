"""What became of a corpus: a page for people that opens without a network, and a summary for the console.

    page(figures) -> html;  print_summary(figures, console)

Reads the figures of `report.json` that `llmkit data` writes; imports no stage. A missing figure is left out.
"""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .markup import cell, document, folded, name, percent, printable, quoted, size_text, table, text, track
from .svg import curve, histogram

Figures = dict[str, Any]
FATES = {
    "bad": "Could not be read, and left out",
    "dropped": "Dropped",
    "changed": "Changed, and kept",
    "seen": "Found, and not changed",  # a filter may have dropped the document later
}
SEEN = {  # reason: (what is the matter, what to do)
    "mojibake": (
        "hold text decoded with the wrong encoding (mojibake)",
        "Set fix_encoding: true, which mends what ftfy is sure of.",
    ),
    "null-word": ("are only the word None, null or nan", "Empty fields were written as text: drop them at the source."),
    "replacement-character": (
        "hold U+FFFD: characters were lost before the text came here",
        "Decode the original again, if there is one; nothing here can bring them back.",
    ),
    "control-character": (
        "hold control characters",
        "Terminal output or binary data stands in the text, or a wrong encoding: look at the examples.",
    ),
    "not-cuttable": ("are over 256 KB without a place to cut them", "Part them where the text is made."),
}
MANY_UNUSED, LOW_FILL, MANY_DROPPED = 0.2, 0.95, 0.5  # shares from which a finding is worth a line
TAIL_ROWS = 2  # rows' worth of padding that the end of any store may leave
RARE = 0.0001  # share of the characters under which scripts share a line
SHOWN_LINES, SHOWN_SOURCES, SHOWN_PLOTS, SHOWN_LABELS, SHOWN_REASONS = 10, 20, 6, 3, 20


def page(figures: Figures) -> str:
    """A whole HTML document: what came of the corpus, what to look at, then the figures."""
    title = f"llmkit data: {figures.get('corpus', '')}"
    head = (
        f"<h1>llmkit data: <b>{name(figures.get('corpus', ''))}</b> <span>{text(figures.get('made', ''))}</span></h1>"
    )
    parts = [
        head,
        f'<p class="verdict">{text(verdict(figures))}</p>',
        _look(findings(figures)),
        _flow(figures.get("flow") or []),
        _reasons(figures.get("reasons") or []),
        _sources(figures.get("sources") or []),
        _scripts(figures.get("scripts") or {}),
        _lines(figures.get("lines") or []),
        _stores(figures.get("stores") or {}),
        _vocabulary(figures.get("frequencies") or {}),
        _seconds(figures.get("seconds") or {}),
    ]
    return document(title, parts)


# what it comes to


def verdict(figures: Figures) -> str:
    """What came out, and what most of the rest fell to, in a sentence."""
    rows = sum(source["rows"] for source in figures.get("sources") or [])
    stores = (figures.get("stores") or {}).values()
    documents, tokens = (sum(store[key] for store in stores) for key in ("documents", "tokens"))
    said = [f"{documents:,} of {_count(rows, 'row')} became {_count(tokens, 'token')}"]
    gone = {f: [r for r in figures.get("reasons") or [] if r["fate"] == f] for f in ("dropped", "bad")}
    dropped, bad = (sum(r["count"] for r in gone[fate]) for fate in ("dropped", "bad"))
    if dropped:
        most = max(gone["dropped"], key=lambda r: r["count"])
        often = "all of them" if most["count"] == dropped else f"most of them ({most['count']:,})"
        often = often if most["count"] > dropped / 2 else f"most often ({most['count']:,})"
        said.append(f"{_count(dropped, '')}{_was(dropped)} dropped, {often} as {most['reason']}")
    if bad:
        said.append(f"{bad:,} could not be read")
    return "; ".join(said if dropped or bad else [*said, "none was dropped"]) + "."


def findings(figures: Figures) -> list[tuple[str, str]]:
    """What a person should look at before training: (what was found, what to do)."""
    reasons, found = figures.get("reasons") or [], []
    if bad := [r for r in reasons if r["fate"] == "bad"]:
        kinds = ", ".join(f"{r['reason']} {r['count']:,}" for r in bad)
        found.append((f"{_count(sum(r['count'] for r in bad), 'row')} could not be read: {kinds}",
                      "File and line stand below; mend the file if they are many."))  # fmt: skip
    for r in reasons:
        if r["reason"] in SEEN and r["fate"] in ("seen", "dropped"):
            what, todo = SEEN[r["reason"]]
            what = f"{_count(r['count'], 'document')} {what if r['count'] > 1 else _singular(what)}"
            found.append((what, todo))
        elif r["fate"] == "dropped" and r["share"] > MANY_DROPPED:
            found.append((f"{r['reason']} drops {r['share']:.0%} of all rows", "Is it meant for text like this?"))
    if common := figures.get("boilerplate"):
        more = len(common) - SHOWN_LABELS
        rest = f" and {more:,} more (report.json lists them)" if more > 0 else ""
        what = f"{_count(len(common), 'held-back text')} share{'s' * (len(common) == 1)} runs of 13 words with so many "
        what += "training documents that these runs were taken for boilerplate (a licence, a header) and not held "
        what += "against a document"
        found.append((what, f"See that this is so: {', '.join(map(str, common[:SHOWN_LABELS]))}{rest}"))
    for store, s in (figures.get("stores") or {}).items():
        packing = s.get("packing") or {"rows": 0, "utilisation": 1.0}
        padding = 1 - packing["utilisation"]
        if padding > 1 - LOW_FILL and padding * packing["rows"] > TAIL_ROWS:
            what = f"{store}: rows of {packing['max_length']:,} tokens are only {packing['utilisation']:.1%} full"
            found.append((what, "Documents of few different lengths fit badly: try another max_length."))
    size, unused = ((figures.get("frequencies") or {}).get(key, 0) for key in ("vocabulary", "unused"))
    if unused > MANY_UNUSED * size:
        found.append((f"{unused:,} of {size:,} ids ({unused / size:.0%}) never occur in the training text",
                      "Take a smaller vocabulary, or more text."))  # fmt: skip
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}" if noun else f"{number:,} "


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def _singular(what: str) -> str:
    verb, rest = what.split(" ", 1)
    return f"{ {'hold': 'holds', 'are': 'is'}[verb] } {rest}".replace(" them", " it")


def _look(found: list[tuple[str, str]]) -> str:
    if not found:
        return '<h2>Things to look at</h2><p class="fine">Nothing stands out.</p>'
    items = "".join(f"<li><b>{text(what)}</b><span>→ {text(todo)}</span></li>" for what, todo in found)
    return f'<h2>Things to look at</h2><ul class="look">{items}</ul>'


# what happened


def _flow(flow: list[dict[str, Any]]) -> str:
    """What is left of the training text after each step, as bars of what came in."""
    if not flow:
        return ""
    most = {key: max(1, *(step.get(key) or 0 for step in flow), 1) for key in ("documents", "bytes")}
    rows, before = [], dict.fromkeys(most)
    for step in flow:
        bars = []
        for key, whole in most.items():
            here = step.get(key)
            lost = max(0, before[key] - here) if before[key] and here is not None else 0
            bars.append(track(here / whole, lost / whole) if here is not None else None)
        lost_rows = (before["documents"] or 0) - step["documents"]
        rows.append([step["step"], step["documents"], f"−{lost_rows:,}" if lost_rows > 0 else "", bars[0],
                     size_text(step.get("bytes")), bars[1]])  # fmt: skip
        before = {key: step.get(key) for key in most}
    key = 'What is <i class="key"></i>left, and what the step <i class="key lost"></i>took. Without held-back files.'
    head = ["after", ">documents", ">lost", "|", ">size", "||"]
    return f'<h2>The training text, step by step</h2><p class="soft small">{key}</p>{table(head, rows)}'


def _reasons(reasons: list[dict[str, Any]]) -> str:
    """Every reason by what it did, each to be opened for its examples."""
    if not reasons:
        return ""
    titles = "".join(f"<span>{title}</span>" for title in ("reason", "rows", "share", "size", ""))
    parts = [f'<div class="line head">{titles}</div>']
    for fate in dict.fromkeys([*FATES, *(r["fate"] for r in reasons)]):
        if mine := [r for r in reasons if r["fate"] == fate]:
            rows = sum(r["count"] for r in mine)
            parts.append(f'<h3>{text(FATES.get(fate, fate))} <span class="soft">{rows:,}</span></h3>')
            parts += map(_reason, mine)
    note = "Shares are of all rows, held-back files among them. Open a reason for examples, with white space as signs."
    return f'<h2>Reasons</h2><p class="soft small">{note}</p><div class="folds">{"".join(parts)}</div>'


def _reason(r: dict[str, Any]) -> str:
    cells = [name(r["reason"]), r["count"], percent(r["share"]), size_text(r.get("bytes")), track(r["share"])]
    line = "".join(f"<span>{cell(value)}</span>" for value in cells[:-1]) + cells[-1]
    examples = "".join(map(_example, r.get("examples") or [])) or '<li class="soft">no example was kept</li>'
    return f'<details><summary class="line">{line}</summary><ul>{examples}</ul></details>'


def _example(example: dict[str, Any]) -> str:
    note = f" · {name(example['note'])}" if example.get("note") else ""
    where = f'<span class="soft small">{name(example.get("where", ""))}{note}</span>'
    return f"<li>{where}{quoted(example.get('text') or '')}</li>"


# what it is


def _long_table(head: list[str], rows: list[list[object]], shown: int) -> str:
    """A table whose rows after the first few are folded away."""
    rest = rows[shown:]
    return table(head, rows[:shown]) + (folded(f"{len(rest):,} more", table(head, rest)) if rest else "")


def _sources(sources: list[dict[str, Any]]) -> str:
    if not sources:
        return ""
    rows: list[list[object]] = []
    for s in sources:
        lengths = [f"{s['quantiles'][q]:,.0f}" if q in s.get("quantiles", {}) else "" for q in ("0.1", "0.5", "0.9")]
        size = size_text(s.get("bytes"))
        rows.append([s["name"], s["store"], s["rows"], s.get("bad_rows", 0), s["documents"], size, *lengths,
                     s.get("longest")])  # fmt: skip
    head = ["source", "store", ">rows", ">bad", ">kept", ">size", ">10% below", ">median bytes", ">90% below",
            ">longest"]  # fmt: skip
    plots = [figure for figure in map(_lengths, sources) if figure]
    out = f"<h2>Sources</h2>{_long_table(head, rows, SHOWN_SOURCES)}"
    out += f'<div class="plots">{"".join(plots[:SHOWN_PLOTS])}</div>'
    if rest := plots[SHOWN_PLOTS:]:
        out += folded(f"lengths of {_count(len(rest), 'more source')}", f'<div class="plots">{"".join(rest)}</div>')
    return out


def _lengths(source: dict[str, Any]) -> str:
    """A histogram of the documents' bytes; of a single document there is nothing to draw."""
    if source["documents"] < 2 or not source.get("histogram"):
        return ""
    (edges, counts), median = source["histogram"], source.get("quantiles", {}).get("0.5")
    title = f"Lengths of the documents of {source['name']}"
    plot = histogram(edges, counts, title, "bytes of a document", "documents", median)
    return f"<figure><figcaption><b>{name(source['name'])}</b></figcaption>{plot}</figure>" if plot else ""


def _scripts(scripts: dict[str, float]) -> str:
    if not scripts:
        return ""
    rows: list[list[object]] = [[k, percent(share), track(share)] for k, share in scripts.items() if share >= RARE]
    rare = {script: share for script, share in scripts.items() if share < RARE}
    out = f"<h2>Characters</h2>{table(['script', '>share', '|'], rows)}"
    if rare:
        listed = f"{_count(len(rare), 'rarer script')}, {percent(sum(rare.values()))} together: {', '.join(rare)}"
        out += f'<p class="soft small">{text(listed)}</p>'
    return out


def _lines(lines: list[list[Any]]) -> str:
    if not lines:
        return ""
    rows: list[list[object]] = [[count, quoted(line[:160] + "…" * (len(line) > 160))] for line, count in lines]
    head = [">documents", "line"]
    return f"<h2>Commonest lines</h2>{_long_table(head, rows, SHOWN_LINES)}"


def _stores(stores: dict[str, dict[str, Any]]) -> str:
    if not stores:
        return ""
    rows: list[list[object]] = []
    for store, s in stores.items():
        packing = s.get("packing") or {}
        full = packing.get("utilisation")
        rows.append([store, s["documents"], s["tokens"], size_text(s.get("bytes")), f"{s['bytes_per_token']:.2f}",
                     packing.get("rows"), packing.get("max_length"), percent(full),
                     None if full is None else track(full, 1 - full)])  # fmt: skip
    head = ["store", ">documents", ">tokens", ">size", ">bytes per token", ">rows", ">tokens in a row", ">filled", "||"]
    return f"<h2>Token stores</h2>{table(head, rows)}"


def _vocabulary(frequencies: dict[str, Any]) -> str:
    if not frequencies:
        return ""
    size, unused, rare = (frequencies.get(key, 0) for key in ("vocabulary", "unused", "under_100"))
    note = f"{unused:,} of {size:,} ids never occur in the training text ({unused / max(1, size):.1%}); {rare:,} occur "
    note += "fewer than 100 times, too seldom to learn much from. Natural text falls as a nearly straight line (Zipf)."
    plot = curve(frequencies.get("zipf") or [], "Occurrences of an id by its rank", "rank of the id", "occurrences")
    return f'<h2>Vocabulary</h2><p class="soft small">{text(note)}</p><figure>{plot}</figure>'


def _seconds(seconds: dict[str, dict[str, float]]) -> str:
    if not seconds:
        return ""
    rows: list[list[object]] = [[step, f"{s['wall_s']:,.1f}", f"{s['cpu_s']:,.1f}"] for step, s in seconds.items()]
    return "<h2>What it took</h2>" + folded("Seconds of each step", table(["step", ">all tasks", ">CPU"], rows))


# console


def print_summary(figures: Figures, console: Console) -> None:
    """What came in, what happened, what came out, as aligned tables that fit 80 columns."""
    flow = _columns("training text after", ">documents", ">size")
    for step in figures.get("flow") or []:
        flow.add_row(Text(printable(step["step"])), f"{step['documents']:,}", size_text(step.get("bytes")))
    reasons, before = _columns("", "reason", ">rows", ">share"), ""
    every = figures.get("reasons") or []
    for r in every[:SHOWN_REASONS]:
        fate = r["fate"] if r["fate"] != before else ""
        before = r["fate"]
        reasons.add_row(fate, Text(printable(r["reason"])), f"{r['count']:,}", percent(r["share"]))
    if rest := every[SHOWN_REASONS:]:
        reasons.add_row("", f"{len(rest):,} more, in the report", f"{sum(r['count'] for r in rest):,}", "")
    stores = _columns("store", ">documents", ">tokens", ">bytes/token", ">rows", ">filled")
    for store, s in (figures.get("stores") or {}).items():
        packing = s.get("packing") or {}
        rows = f"{packing['rows']:,}" if packing else ""
        stores.add_row(Text(printable(store)), f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['bytes_per_token']:.2f}",
                       rows, percent(packing.get("utilisation")))  # fmt: skip
    for found in (flow, reasons, stores):
        if found.row_count:
            console.print(found, "")


def _columns(*titles: str) -> Table:
    """Numbers stand right and are never broken; names fold."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        if title.startswith(">"):
            made.add_column(title[1:], justify="right", no_wrap=True)
        else:
            made.add_column(title, overflow="fold")
    return made
