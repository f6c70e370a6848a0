"""Inspected rows as one page for people: self-contained, light and dark, readable without colours.   page(i) -> html

What is trained is underlined and tinted, what is masked is not, padding is struck through; each token tells its
position, id and label when it is pointed at. Long stretches are cut in the middle, so that a browser can hold them.
"""

from html import escape

from ..check.console import visible
from ..check.page import document, html_text
from .batches import IGNORE, PADDING, TRAINED, Row, Sequence
from .inspect import Inspection, both_ends, document_sign, facts, legend, runs
from .inspect_console import row_title, sequence_title, token_sign

MOST_TOKENS = 60_000  # on the page: about 5 MB
FEWEST = 200  # of a stretch, however many rows
STRETCHES = 400  # of a sequence
STYLE = """
:root { --trained: #14693a; --tint: #dff3e5; --tint2: #c8e8d3; --masked: #5b636d; --read: #1f5fa8; --read-tint: #e3eefb;
  --read-tint2: #cfe1f6; }
@media (prefers-color-scheme: dark) { :root { --trained: #7ddb9c; --tint: #17301f; --tint2: #20452c; --masked: #99a2ad;
  --read: #8dbcf5; --read-tint: #16273b; --read-tint2: #1f3754; } }
body { max-width: 76rem; }
.tokens { font: .88rem/1.75 ui-monospace, "SF Mono", Menlo, Consolas, monospace; direction: ltr; margin: .4rem 0 0; }
.tokens > span { display: block; padding-left: 5.2rem; position: relative; }
.tokens > span::before { content: attr(data-state); position: absolute; left: 0; color: var(--soft);
  font: .75rem/2.05 system-ui, sans-serif; }
.tokens > span.start { border-top: 1px dashed var(--line); margin-top: .3rem; padding-top: .3rem; }
.tokens > span.start::before { content: "¶ " attr(data-state); }
.tokens i { font-style: normal; unicode-bidi: isolate; display: inline-block; max-width: 100%; line-height: 1.5;
  border-radius: .15rem; border-bottom: 2px solid transparent; }
.tokens b { font-weight: 400; opacity: .55; }
.trained i { background: var(--tint); border-bottom-color: var(--trained); }
.trained i:nth-of-type(even) { background: var(--tint2); }
.read i { background: var(--read-tint); } .read i:nth-of-type(even) { background: var(--read-tint2); }
.masked i { color: var(--masked); }
.masked i:nth-of-type(even) { background: color-mix(in srgb, var(--masked) 13%, transparent); }
.padding i { color: var(--masked); text-decoration: line-through; }
.tokens i.x { font-weight: 700; outline: 1px solid currentColor; outline-offset: -1px; border-radius: .25rem;
  padding: 0 .15rem; }
.tokens i.odd { outline: 2px solid var(--fail); }
.tokens i.n { margin-right: -2ch; }
.tokens u { color: var(--soft); text-decoration: none; font: .8rem system-ui, sans-serif; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; } .pair > div { min-width: 0; }
@media (max-width: 52rem) { .pair { grid-template-columns: 1fr; } .tokens > span { padding: 1.1rem 0 0; }
  .tokens > span::before { top: 0; line-height: 1.2; } }
article { content-visibility: auto; contain-intrinsic-size: auto 14rem; }
article h4 { margin: .5rem 0 0; font-size: .92rem; } h4 .soft { font-weight: 400; }
.look { font-weight: 600; color: var(--warn); margin: .2rem 0 0; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 3.2rem; max-width: 24rem; margin-top: .9rem; }
.bars span { flex: 1; background: var(--soft); min-height: 1px; }
.ends { display: flex; justify-content: space-between; max-width: 24rem; }
dl.legend { margin-top: .9rem; } .legend .tokens { margin: 0; }
@media print { article { content-visibility: visible; } .tokens i { print-color-adjust: exact; } }
"""
SAMPLE = "token"


def page(i: Inspection) -> str:
    num_runs = sum(min(len(runs(s)), STRETCHES) for row in i.rows for s in row.sequences)
    most = max(MOST_TOKENS // max(num_runs, 1), FEWEST)
    looks = [f"{n:,} of {i.totals['rows']:,} rows: {note}" for note, n in i.totals["notes"].items()]
    body = [
        f"<h1>llmkit inspect: <b>{html_text(i.target)}</b></h1>",
        '<p class="verdict">What the model will really see</p>',
        "".join(f'<p class="look">! {html_text(look)}</p>' for look in looks),
        f"<dl>{''.join(f'<dt>{html_text(name)}</dt><dd>{html_text(value)}</dd>' for name, value in facts(i))}</dl>",
        _histogram(i),
        _legend(i),
        *(_row(row, i, most) for row in i.rows),
    ]
    return document(f"llmkit inspect: {i.target}", body, STYLE)


def _histogram(i: Inspection) -> str:
    bins = i.totals["histogram"]
    counts = bins["counts"]
    if i.totals["shortest"] == i.totals["longest"]:
        return ""
    width = (bins["high"] - bins["low"]) / len(counts)
    bars = "".join(
        f'<span style="height:{100 * n / max(counts):.1f}%" title="{n:,} from {bins["low"] + k * width:,.0f} to '
        f'{bins["low"] + (k + 1) * width:,.0f} tokens"></span>'
        for k, n in enumerate(counts)
    )
    ends = f"<span>{bins['low']:,}</span><span>tokens per row</span><span>{bins['high']:,}</span>"
    drawn = f'<div class="bars" role="img" aria-label="rows by length">{bars}</div>'
    return f'{drawn}<div class="ends small soft">{ends}</div>'


def _legend(i: Inspection) -> str:
    lines = [
        (f'<span class="tokens"><span class="{state}" style="padding:0"><i>{SAMPLE}</i></span></span>', state, text)
        for state, text in legend(i)
    ]
    special = '<span class="tokens"><span style="padding:0"><i class="x">token</i></span></span>'
    lines.append((special, "special", "a control token of the tokenizer, in whichever state"))
    rows = "".join(f"<dt>{sample}</dt><dd><b>{state}</b>: {html_text(text)}</dd>" for sample, state, text in lines)
    if sign := document_sign(i):
        rows += f'<dt class="soft">¶</dt><dd>{sign}</dd>'
    hint = "Point at a token for its position, id and label."
    return f'<dl class="legend small">{rows}</dl><p class="small soft">{hint}</p>'


def _row(row: Row, i: Inspection, most: int) -> str:
    parts = "".join(f"<div>{_sequence(s, most, is_alone=len(row.sequences) == 1)}</div>" for s in row.sequences)
    kind = ' class="pair"' if len(row.sequences) > 1 else ""
    title = row_title(row) + (f' <span class="soft">{sequence_title(row.sequences[0])}</span>' if not kind else "")
    notes = "".join(f'<p class="look">! {html_text(note)}</p>' for note in row.notes)
    columns = "".join(f"<dt>{html_text(k)}</dt><dd>{_column(v, i)}</dd>" for k, v in row.columns.items())
    columns = f"<dl>{columns}</dl>" if columns else ""
    return f"<article><h3>{title}</h3>{notes}<div{kind}>{parts}</div>{columns}</article>"


def _column(value: object, i: Inspection) -> str:
    if not isinstance(value, str) or i.is_redacted:
        return html_text(str(value))
    lines = (visible(line, len(line) + 1) for line in value.splitlines(keepends=True))
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _sequence(s: Sequence, most: int, is_alone: bool) -> str:
    title = "" if is_alone else f'<h4>{html_text(s.name)} <span class="soft">{sequence_title(s)}</span></h4>'
    odd = dict(s.odd_labels)
    first, hidden, last = both_ends(runs(s), STRETCHES // 2, STRETCHES // 2)
    body = "".join(_run(s, run, most, odd) for run in first)
    body += f"<span><u>… {hidden:,} stretches …</u></span>" if hidden else ""
    body += "".join(_run(s, run, most, odd) for run in last)
    return f'{title}<p class="tokens">{body}</p>'


def _run(s: Sequence, run: tuple[str, int, int], most: int, odd: dict[int, int]) -> str:
    """A stretch of one state; of a long one both ends, of padding the first token and how many there are."""
    state, start, end = run
    kind = f"{state} start" if start in s.starts else state
    if state == PADDING:
        inside = f"{_token(s, start, odd)} <u>× {end - start:,}</u>"
    else:
        first, hidden, last = both_ends(range(start, end), most * 3 // 4, most // 4)
        inside = "".join(_token(s, t, odd) for t in first)
        inside += f"<u> … {hidden:,} tokens … </u>" if hidden else ""
        inside += "".join(_token(s, t, odd) for t in last)
    return f'<span class="{kind}" data-state="{state}">{inside}</span>'


def _token(s: Sequence, t: int, odd: dict[int, int]) -> str:
    label = odd.get(t, s.ids[t] if s.states[t] == TRAINED else IGNORE)
    sign = token_sign(s.texts[t]) if s.texts else f"{s.ids[t]} "
    ends_line = s.texts is not None and s.texts[t].endswith("\n")
    classes = " ".join(["x"] * s.special[t] + ["odd"] * (t in odd) + ["n"] * ends_line)
    kind = f' class="{classes}"' if classes else ""
    shown = escape(sign).replace("·", "<b>·</b>")
    return f'<i{kind} title="position {t}, id {s.ids[t]}, label {label}">{shown}</i>{"<br>" * ends_line}'
