"""`llmkit report`: every stage side by side, as one page that opens without a network, and as JSON.

    llmkit report runs/toy --json report.json --fail_on_regression

Owns the verb and the order of the page: the verdict first, then the benchmarks, then all that explains them. Reads JSON
files of run folders (runs.py), evaluations (evals.py) and logs (curves.py); imports no stage. The page's parts are
bench.py, quantized.py and stages.py, what it comes to is verdict.py.
"""

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import UserError
from ..run import write_json, write_text
from ..verbs import ReportConfig
from . import bench, quantized, stages
from .evals import Facts, read_eval
from .markup import document, folded, name, printable, text
from .runs import find, in_order, named, read_corpus, read_stage
from .verdict import figure as shown_figure
from .verdict import findings, regressions, verdict

VERSION = 1
SHOWN_FINDINGS, SHOWN_REGRESSIONS = 5, 50
CSS = """
.verdict { margin: .3rem 0 .3rem; } p.verdict + p.verdict { font-size: 1.05rem; font-weight: 500; margin-top: 0; }
ul.look.top { margin: .4rem 0; font-size: .95rem; } ul.look.top li { padding: .15rem .8rem; margin: .2rem 0; }
ul.look.top li.fail { border-left-color: var(--lost); } ul.look.top b { font-weight: 700; white-space: nowrap; }
ul.look.top li.fail b { color: var(--lost); } ul.look.top li.warn b { color: var(--warn); }
ul.look.top li.warn { border-left-style: dashed; } ul.look.top span { display: inline; font-size: inherit; }
a { color: inherit; } ul.look.top a { text-decoration-style: dotted; text-underline-offset: .2em; }
h2#benchmarks { margin-top: .8rem; }
@media (max-width: 40rem) { body { margin-top: .8rem; } p.verdict { font-size: 1.12rem; }
  p.verdict + p.verdict { font-size: .95rem; } ul.look.top { font-size: .86rem; }
  ul.look.top li { padding: .1rem .6rem; line-height: 1.4; } ul.look.top li.fail > span { display: none; }
  .chain .soft { display: none; } .chain { gap: .2rem; margin: .4rem 0; } }
"""


def main(config: ReportConfig) -> int:
    """1 where `fail_on_regression` finds one, else 0. Raises UserError."""
    if not config.runs:
        raise UserError("runs is missing; name run folders, eval folders or a folder of them: llmkit report runs/toy")
    words = [str(word) for word in config.runs]
    for key in ("html", "json"):
        value = getattr(config, key)
        if value and (Path(value).is_dir() or not Path(value).absolute().parent.is_dir()):
            raise UserError(f"{key}={value!r}: name a file in a folder that exists")
    figures = gather(words)
    if config.fail_on_regression and not any(not found["problem"] for found in figures["evals"]):
        raise UserError(
            "fail_on_regression=true: no evaluation (comparison.json) is among these folders, so nothing was compared; "
            "run llmkit eval and name its folder, too"
        )
    html = Path(config.html) if config.html else default_page(words)
    write_text(html, page(figures))
    if config.json:
        write_json(Path(config.json), figures)
    console = Console(highlight=False, soft_wrap=True)
    print_summary(figures, console)
    written = " and ".join(filter(None, [str(html), config.json]))
    console.print(f"\nwritten   {printable(written)}", markup=False)
    if not config.fail_on_regression:
        return 0
    for said in figures["regressions"][:SHOWN_REGRESSIONS]:
        console.print(f"regressed {printable(said)}", markup=False)
    console.print(f"{len(figures['regressions'])} regressions", markup=False)
    return int(bool(figures["regressions"]))


def default_page(words: list[str]) -> Path:
    """report.html in the folder that all words share; here, where they share nothing."""
    shared = Path(os.path.commonpath([os.path.abspath(os.path.expanduser(word)) for word in words]))
    shared = Path.cwd() if shared == Path(shared.anchor) else shared
    return (
        Path(os.path.relpath(shared / "report.html")) if shared.is_relative_to(Path.cwd()) else shared / "report.html"
    )


def gather(words: list[str]) -> dict[str, Any]:
    """All figures of the page, as they stand in its JSON. Raises UserError."""
    run_folders, corpus_folders, eval_folders = find(words)
    if not run_folders and not eval_folders:
        raise UserError(f"runs: {words[0]!r}: holds a corpus, whose page `llmkit data` made; name runs, too")
    ordered = in_order([read_stage(folder) for folder in run_folders])
    evals = [read_eval(folder) for folder in eval_folders]
    names = {stage["folder"]: stage["name"] for stage in ordered}
    for column in (column for evaluation in evals for column in evaluation["columns"]):
        folder = named(column["run"] or column["model_dir"], list(names))
        alike = column["name"] if not column["run"] and column["name"] in names.values() else None
        column["stage_name"] = names[folder] if folder else alike
    wanted = {data["corpus"] for stage in ordered for data in stage["contamination"] if data["corpus"]}
    corpora = {corpus: read_corpus(Path(corpus)) for corpus in sorted({*wanted, *map(str, corpus_folders)})}
    figures: dict[str, Any] = {
        "version": VERSION,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "words": words,
        "stages": ordered,
        "evals": evals,
        "corpora": corpora,
    }
    figures["verdict"] = verdict(figures)
    figures["findings"] = findings(figures)
    figures["regressions"] = regressions(figures)
    return figures


def page(figures: dict[str, Any]) -> str:
    """A whole HTML document."""
    runs, evals = figures["stages"], figures["evals"]
    trained = [stage for stage in runs if not stage["quantized"]]
    words = " ".join(figures["words"])
    parts = [
        f"<h1>llmkit report: <b>{name(words)}</b> <span>{text(figures['made'])}</span></h1>",
        "".join(f'<p class="verdict">{text(said)}</p>' for said in figures["verdict"]),
        _look(figures["findings"]),
        stages.chain([*trained, *(stage for stage in runs if stage["quantized"])]),
        bench.benchmarks(evals),
        quantized.quantized(runs),
        stages.own_figures(trained),
        stages.lineage(runs),
        stages.curves(trained),
        stages.alarms(trained),
        stages.samples(trained),
        bench.prompts(evals),
        stages.checks(trained),
        stages.fingerprints(runs, evals),
        stages.sizes(runs, evals),
        stages.contamination(trained, figures["corpora"]),
        stages.commands(runs, evals, words),
    ]
    return document(f"llmkit report: {words}", parts, bench.CSS + stages.CSS + CSS)


def _look(found: list[dict[str, str]]) -> str:
    """The worst few; the rest is folded away."""
    items = []
    for one in found:
        todo = f" <span>→ {text(one['todo'])}</span>" if one["todo"] else ""
        what = f'<a href="#{one["at"]}">{text(one["what"])}</a>' if one["at"] else text(one["what"])
        mark = {"fail": "✗", "warn": "!"}[one["mark"]]
        items.append(f'<li class="{one["mark"]}"><b>{mark}</b> {what}{todo}</li>')
    shown = f'<ul class="look top">{"".join(items[:SHOWN_FINDINGS])}</ul>' if items else ""
    rest = items[SHOWN_FINDINGS:]
    return shown + (
        folded(f"{len(rest)} more to look at", f'<ul class="look top">{"".join(rest)}</ul>') if rest else ""
    )


# console


def print_summary(figures: dict[str, Any], console: Console) -> None:
    """The runs, the benchmarks, the verdict, what to look at; a value with neither word changed within the noise."""
    console.print(_runs_table(figures["stages"]), "")
    for evaluation in figures["evals"]:
        if not evaluation["problem"]:
            console.print(_bench_table(evaluation), "")
    for said in figures["verdict"]:
        console.print(Text(printable(said), style="bold"))
    for one in figures["findings"][:SHOWN_FINDINGS]:
        console.print(Text(f"  {'FAIL' if one['mark'] == 'fail' else 'look'}  {printable(one['what'])}"))
    if len(figures["findings"]) > SHOWN_FINDINGS:
        console.print(f"  and {len(figures['findings']) - SHOWN_FINDINGS} more, on the page", markup=False)


def _runs_table(runs: list[Facts]) -> Table:
    made = _columns("stage", "from", "status", ">tokens", ">time", ">alarms")
    for s in runs:
        tokens = f"{s['tokens']:,.0f}" if s["tokens"] else ""
        cells = [s["name"], s["parent_name"] or s["parent"] or "", s["status"], tokens, stages.clock(s["wall_s"])]
        made.add_row(*(Text(printable(value)) for value in cells), str(s["alerts"]["count"] or ""))
    return made


def _bench_table(evaluation: Facts) -> Table:
    names = [column["name"] for column in evaluation["columns"]]
    made = _columns("", *(f">{printable(column)}" for column in names))
    for row in evaluation["rows"]:
        if row.get("is_folded"):
            continue
        cells = []
        for column in names:
            score, pair = row["scores"].get(column) or {"value": None}, row["pairs"].get(column)
            flag = "" if pair is None or not pair["flag"] else pair["flag"]
            cells.append(Text(f"{shown_figure(score['value'], row)} {flag:<6}"))
        made.add_row(Text(printable(("  " if row["group"] else "") + row["name"])), *cells)
    return made


def _columns(*titles: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        is_number = title.startswith(">")
        made.add_column(Text(title.removeprefix(">")), justify="right" if is_number else "left", no_wrap=is_number)
    return made
