"""How the figures of `llmkit tokenizer` look: lines for a terminal, and a section of the page of `llmkit check`.

Owns both, from the same dictionary that the JSON file holds.

    print_figures(figures, console);  page(report, section(figures, png), STYLE)
"""

import base64
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..check.console import BLANKS, hang, printable
from ..check.page import html_text

QUIET_S = 5.0  # a bar appears when it takes longer
LONGEST = 40  # characters of a token
SHOWN = 5  # longest tokens on a terminal
STYLE = """
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 0 2.5rem; align-items: start; }
img.plot { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: .4rem; }
td code { white-space: pre-wrap; } td.bar { width: 30%; padding-right: 0; }
td.bar i { display: block; height: .7rem; margin-top: .35rem; background: var(--pass); opacity: .55;
  border-radius: .15rem; }
.scroll { overflow-x: auto; }
"""


@contextlib.contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """Yields `say(what, bytes so far, of how many at most)`: a bar on a terminal, after five seconds."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(24), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        timer = threading.Timer(QUIET_S, bar.update, [task], {"visible": True})
        timer.daemon = True
        timer.start()

        def say(what: str, done: int, most: int | None) -> None:
            bar.tasks[0].total = most  # `update` would take None for "as before"
            bar.update(task, description=what, completed=done)

        try:
            yield say
        finally:
            timer.cancel()


def token_text(item: dict[str, Any]) -> str:
    """A token on one line: \\n, \\t, and · for blanks that the eye would lose; its id where the text is redacted."""
    if "text" not in item:
        return f"id {item['id']}"
    text = BLANKS.sub(lambda blanks: "·" * len(blanks[0]), item["text"])
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return printable(text.translate({10: "\\n", 13: "\\r", 9: "\\t"}))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else "0%" if share == 0 else f"{share:.2%}" if share < 0.01 else f"{share:.1%}"


COLUMNS = {
    "documents": "documents",
    "tokens": "tokens",
    "bytes_per_token": "bytes/token",
    "characters_per_token": "chars/token",
    "unknown": "unknown",
}


def notes(figures: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know, a sentence each."""
    found = []
    for name, shard in figures["shards"].items():
        if shard["is_cut"]:
            found.append(f"{name}: only its first {shard['bytes'] / 1e6:.1f} MB were read (max_check_bytes)")
        if shard["unknown"]:
            found.append(f"{name}: {shard['unknown']:,} tokens are unknown; `llmkit pretrain` refuses such text")
        if shard["altered_pieces"]:
            count = f"{shard['altered_pieces']:,} of {shard['pieces']:,}"
            found.append(f"{name}: {count} pieces of text come back otherwise")
        if shard["surrogates"]:
            found.append(f"{name}: {shard['surrogates']:,} halves of surrogate pairs were counted as U+FFFD")
    return found + figures["notes"]


def facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The vocabulary on the text of all shards, a line each."""
    v = figures["vocabulary"]
    number = v["ids"] - v["control_tokens"]
    shards = figures["shards"].values()
    keys = ("pieces", "altered_pieces", "unjudged_pieces")
    num_pieces, num_altered, num_unjudged = (sum(shard[key] for shard in shards) for key in keys)
    back = f"{num_pieces:,} pieces of text encoded and decoded, {num_altered:,} come back otherwise"
    back += f", {num_unjudged:,} hold unknown tokens" if num_unjudged else ""
    return [
        ("round trip", back),
        ("vocabulary", f"{v['ids']:,} ids, {v['control_tokens']} of them control tokens"),
        ("seen", f"{v['tokens']:,} tokens, {v['tokens'] / max(number, 1):,.1f} for each id"),
        ("never used", f"{v['never_used']:,} ids ({_percent(v['never_used_share'])}) in this text"),
        ("used < 10", f"{v['used_below_10']:,} ids ({_percent(v['used_below_10_share'])}), the unused ones included"),
        ("one byte", f"{_percent(v['single_byte_share'])} of tokens are a single byte of a longer character"),
    ]


def print_figures(figures: dict[str, Any], console: Console) -> None:
    """Nothing where no text was given."""
    if not figures["shards"]:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("shard", overflow="ellipsis", no_wrap=True)
    for column in ("MB", *COLUMNS.values()):
        table.add_column(column, justify="right", no_wrap=True)
    for name, shard in figures["shards"].items():
        numbers = [_number(shard[key]) for key in COLUMNS]
        table.add_row(Text(printable(name)), f"{shard['bytes'] / 1e6:.2f}", *numbers)
    console.print(table)
    console.print()
    v = figures["vocabulary"]
    common = "  ".join(f"{token_text(item)} {_percent(item['share'])}" for item in v["commonest"])
    long = "  ".join(f"{token_text(item)} {item['bytes']}" for item in v["longest"][:SHOWN])
    for name, text in [*facts(figures), ("commonest", common), ("longest", f"{long}  bytes")]:
        hang(console, Text(f"{name:<12}", style="dim"), Text(text))
    for text in notes(figures):
        hang(console, Text(f"{'note':<12}", style="yellow"), Text(printable(text)))
    console.print()


def section(figures: dict[str, Any], png: bytes | None) -> str:
    """HTML: shards, vocabulary, the plot inline, commonest and longest tokens; empty where no text was given."""
    if not figures["shards"]:
        return ""
    head = "".join(f'<th class="num">{name}</th>' for name in ("MB", *COLUMNS.values()))
    rows = "".join(
        f'<tr><td>{html_text(name)}</td><td class="num">{shard["bytes"] / 1e6:.2f}</td>'
        + "".join(f'<td class="num">{_number(shard[key])}</td>' for key in COLUMNS)
        + "</tr>"
        for name, shard in figures["shards"].items()
    )
    lines = "".join(f"<dt>{name}</dt><dd>{html_text(text)}</dd>" for name, text in facts(figures))
    told = "".join(f"<dt>note</dt><dd>{html_text(text)}</dd>" for text in notes(figures))
    parts = [
        f'<h2>Your text</h2><div class="scroll"><table><tr><th>shard</th>{head}</tr>{rows}</table></div>',
        f"<h2>The vocabulary on it</h2><dl>{lines}{told}</dl>",
    ]
    if png is not None:
        data = base64.b64encode(png).decode()
        parts.append(
            f'<p><img class="plot" alt="uses of an id against its rank" src="data:image/png;base64,{data}"></p>'
        )
    v = figures["vocabulary"]
    return "\n".join([*parts, f'<div class="two">{_commonest(v["commonest"])}{_longest(v["longest"])}</div>'])


def _commonest(items: list[dict[str, Any]]) -> str:
    most = max((item["share"] for item in items), default=1)
    rows = "".join(
        f'<tr><td class="num soft">{item["id"]}</td><td><code>{html_text(token_text(item))}</code></td>'
        f'<td class="num">{_percent(item["share"])}</td>'
        f'<td class="bar"><i style="width: {item["share"] / most:.1%}"></i></td></tr>'
        for item in items
    )
    head = '<th class="num">id</th><th>token</th><th class="num">share</th><th></th>'
    return f"<div><h2>Commonest tokens</h2><table><tr>{head}</tr>{rows}</table></div>"


def _longest(items: list[dict[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td class="num soft">{item["id"]}</td><td><code>{html_text(token_text(item))}</code></td>'
        f'<td class="num">{item["bytes"]}</td><td class="num">{item["count"]:,}</td></tr>'
        for item in items
    )
    head = '<th class="num">id</th><th>token</th><th class="num">bytes</th><th class="num">uses</th>'
    return f"<div><h2>Longest tokens</h2><table><tr>{head}</tr>{rows}</table></div>"
