"""The page's parts about evaluations: the table of benchmarks, how they were asked, regression prompts.

Reads what evals.py gives. On a phone the table stands as a block for each row, so that nothing is hidden at the right.
"""

import math

from .evals import Facts, changed, failing, parent_of
from .markup import Html, differing, folded, name, quoted, text
from .verdict import BY_CHANCE, difference, figure, interval, signed

SIGNS = {"gained": "✓ gained", "lost": "✗ lost", None: "≈ within noise"}
SHOWN_PROMPTS = 100  # that passed unchanged
LONGEST = 2000  # characters of an answer shown
CSS = """
.bench td, .bench thead th { padding: .3rem .6rem; } .bench th { font-size: .93rem; }
.bench thead th:first-child { width: 21%; } .bench th b { color: var(--ink); }
.bench tbody th { color: var(--ink); vertical-align: top; min-width: 9rem; }
.bench tbody th .soft, .bench td .soft { font-weight: 400; font-size: .84rem; }
.bench tbody th .soft { display: block; } .bench td { min-width: 6rem !important; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; } .bench td b { font-weight: 650; }
.bench .diff { display: block; font-size: .84rem; color: var(--soft); } .bench .flag { font-size: .84rem;
  white-space: nowrap; } .bench .who { display: none; }
.bench .in > th { padding-left: .9rem; font-weight: 400; } .bench tr.part th { color: var(--soft); font-weight: 600; }
.flag.gained { color: var(--good); } .flag.lost, .bad { color: var(--lost); font-weight: 650; }
td.lost { background: color-mix(in srgb, var(--lost) 12%, transparent); box-shadow: inset 3px 0 var(--lost);
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
td.lost .diff { color: var(--ink); } .flag.same { color: var(--soft); } .nowrap { white-space: nowrap; }
.prompt { border-left: 5px solid var(--line); padding: .1rem .8rem; margin: .7rem 0; break-inside: avoid; }
.prompt.bad { border-left: 5px solid var(--lost); color: inherit; font-weight: inherit; }
.prompt.changed { border-left: 5px dashed var(--warn); }
.prompt h3 { font-size: 1rem; margin: 0; } .prompt h4 { font-size: .93rem; margin: .5rem 0 0; font-weight: 600; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .2rem 1rem; }
.sides p { margin: .2rem 0 0; font-size: .84rem; color: var(--soft); }
del { color: var(--lost); } ins { color: var(--good); text-decoration: underline 2px; }
@media (max-width: 40rem) {
  .bench, .bench tbody, .bench tr, .bench td, .bench tbody th { display: block; } .bench thead { display: none; }
  .bench tr { border-bottom: 1px solid var(--line); padding: .25rem 0; } .bench tr.part { padding-bottom: 0; }
  .bench td, .bench tbody th { border: 0; padding: 0; } .bench tbody th .soft { display: inline; }
  .bench td { display: grid; grid-template-columns: 4.4rem 6.9rem auto 1fr; gap: 0 .4rem; align-items: baseline; }
  .bench td.none { display: none; } .bench .who { display: inline; color: var(--soft); font-size: .86rem; }
  .bench .range { display: none; } .bench td.lost { padding: 0 0 0 .4rem; grid-template-columns: 4rem 6.9rem auto 1fr; }
  .sides { grid-template-columns: 1fr; } }
@media print { .bench { font-size: 9pt; } .bench td, .bench thead th { padding: .2rem .3rem; } }
"""


def benchmarks(evals: list[Facts]) -> str:
    """Of every evaluation the table, and how it was asked."""
    parts = []
    for evaluation in evals:
        if evaluation["problem"]:
            parts.append(f'<p class="soft">{name(evaluation["folder"])}: {text(evaluation["problem"])}</p>')
            continue
        title = f"<h3>{name(evaluation['folder'])}</h3>" if len(evals) > 1 else ""
        parts.append(title + _table(evaluation) + _how(evaluation))
    return f'<h2 id="benchmarks">Benchmarks</h2>{"".join(parts)}' if parts else ""


def _table(evaluation: Facts) -> str:
    names = [column["name"] for column in evaluation["columns"]]
    heads = "".join(
        f"<th><b>{name(column['name'])}</b>"
        + (f'<br><span class="soft">against {name(column["parent"])}</span>' if column["parent"] else "")
        + "</th>"
        for column in evaluation["columns"]
    )
    body, folds, part = "", "", ""
    for row in evaluation["rows"]:
        if row["kind"] == "shard" and part != "shard":
            part = "shard"
            note = "loss on raw text, lower is better; perplexity is its exponential"
            body += (
                f'<tr class="part"><th colspan="{len(names) + 1}">Raw text <span class="soft">{note}</span></th></tr>'
            )
        line = _line(evaluation, row, names)
        if row.get("is_folded"):
            folds += line
        else:
            body += line
    head = f"<thead><tr><th></th>{heads}</tr></thead>"
    table = f'<div class="wide"><table class="bench">{head}<tbody>{body}</tbody></table></div>'
    if folds:
        rest = f'<div class="wide"><table class="bench">{head}<tbody>{folds}</tbody></table></div>'
        table += folded("the tasks of large groups, which count as a whole", rest)
    return table


def _line(evaluation: Facts, row: Facts, names: list[str]) -> str:
    number, unit = (row["num_documents"], "documents") if row["kind"] == "shard" else (row["num_items"], "items")
    said = [row["unit"] if row["kind"] == "shard" else row["metric"], f"{number:,.0f} {unit}" if number else ""]
    if row["kind"] == "group":
        said.append(f"{row['num_tasks']} tasks together" if row["num_tasks"] else "")
    if not row["higher_is_better"] and row["kind"] != "shard":
        said.append("lower is better")
    if row["entropy"] is not None:
        said.append(f"true entropy {row['entropy']:.4f} (perplexity {_exp(row['entropy'])})")
    note = f' <span class="soft">{text(" · ".join(filter(None, said)))}</span>'
    cells = "".join(_cell(evaluation, row, column) for column in names)
    return f"<tr{' class=in' * bool(row['group'])}><th>{name(row['name'])}{note}</th>{cells}</tr>"


def _exp(nats: float) -> str:
    return f"{math.exp(nats):.4g}" if nats < 50 else "∞"


def _cell(evaluation: Facts, row: Facts, column: str) -> str:
    """Value ± error, then the paired difference with its interval and what it means."""
    who, score = f'<span class="who">{name(column)}</span>', row["scores"].get(column)
    if not score or score["value"] is None:
        why = "no number" if score else ""
        return f'<td class="{"" if why else "none"}">{who}{why}</td>'
    error = f" ±{figure(score['stderr'], row)}" if score["stderr"] is not None else ""
    said = f'<span class="nowrap"><b>{figure(score["value"], row)}</b><span class="soft">{error}</span></span>'
    after = _cut(score)
    if row["kind"] == "shard" and "bits" not in row["unit"]:
        after = f'<span class="diff range">perplexity {_exp(score["value"])}</span>{after}'
    pair = row["pairs"].get(column)
    if not pair:
        return f"<td>{who}{said}{after}</td>"
    flag, parent = pair["flag"], parent_of(evaluation, column)
    other = f" against {name(pair['against'])}" if pair["against"] != parent and pair["against"] else ""
    is_loss = flag == "lost" and not other
    word = f'<span class="flag {flag or "same"}">{SIGNS[flag]}</span>' if flag or pair["low"] is not None else ""
    diff = f'<span class="nowrap">{signed(pair["difference"], row)}</span>'
    diff += f' <span class="range nowrap">{text(interval(row, pair))}</span>{other}'
    said = f'{who}{said} {word}<span class="diff">{diff}</span>{after}'
    return f'<td{" class=lost" * is_loss} title="{text(difference(row, pair))}">{said}</td>'


def _cut(score: Facts) -> str:
    said = [f"{score[key]:,.0f} {word}" for key, word in (("num_cut", "cut"), ("num_nan", "no number")) if score[key]]
    return f' <span class="soft">{", ".join(said)}</span>' if said else ""


def _how(evaluation: Facts) -> str:
    """What was the same for everyone, what each task was asked like, and how sure the flags are."""
    num_pairs = sum(len(row["pairs"]) for row in evaluation["rows"])
    note = "± is the standard error; [ ] the 95 % interval of the difference on the same items (paired bootstrap). "
    note += "✗ lost and ✓ gained: the interval does not hold 0."
    if num_pairs >= BY_CHANCE:
        note += f" Of {num_pairs:,} such comparisons about {num_pairs / BY_CHANCE:.0f} are flagged by chance alone."
    set_up = "; ".join(f"<b>{text(label)}</b> {text(value)}" for label, value in evaluation["how"])
    windows = sorted({int(row["window"]) for row in evaluation["rows"] if row["window"]})
    if windows:
        set_up += f"; <b>window of raw text</b> {' and '.join(f'{w:,}' for w in windows)} tokens"
    devices = sorted({c["device"] for c in evaluation["columns"] if c["device"]})
    set_up += f"; <b>on</b> {text(', '.join(devices))}" if devices else ""
    tasks = [row for row in evaluation["rows"] if row["kind"] == "task"]
    each = "".join(f"<li>{name(row['name'])}: {text(_asked(row))}</li>" for row in tasks if _asked(row))
    asked = folded("How each task was asked", f'<ul class="small">{each}</ul>') if each else ""
    lead = f'<p class="small soft">Asked alike: {set_up.removeprefix("; ")}.</p>' if set_up else ""
    return f'<p class="small soft">{text(note)}</p>{lead}{asked}'


def _asked(row: Facts) -> str:
    said = [{True: "as a chat", False: "as plain text"}.get(row["is_chat"], ""), row["asked"] or ""]
    said.append(f"{row['num_fewshot']:.0f} examples before it" if row["num_fewshot"] is not None else "")
    return ", ".join(filter(None, [*said, row["data"] or ""]))


# regression prompts


def prompts(evals: list[Facts]) -> str:
    """What fails or has changed comes first, with the difference; the rest is folded away."""
    parts = []
    for evaluation in evals:
        if not evaluation["prompts"]:
            continue
        bad, new = ({(prompt["name"], column) for prompt, column in find(evaluation)} for find in (failing, changed))
        loud = {prompt for prompt, _ in bad | new}
        shown = [p for p in evaluation["prompts"] if p["name"] in loud]
        quiet = [p for p in evaluation["prompts"] if p["name"] not in loud]
        note = f"{len(evaluation['prompts']):,} prompts of {evaluation['regression_file'] or 'a file'}: "
        note += f"{len(bad):,} failing, {len(new):,} changed. Struck through: recorded before; underlined: new. "
        note += "A stage whose parent failed too counts only where nothing was made of it."
        parts.append(f'<p class="small soft">{text(note)}</p>' + "".join(_prompt(p, bad, new) for p in shown))
        if quiet:
            rest = f"<p>and {len(quiet) - SHOWN_PROMPTS:,} more</p>" if len(quiet) > SHOWN_PROMPTS else ""
            cards = "".join(_prompt(p, bad, new) for p in quiet[:SHOWN_PROMPTS])
            parts.append(folded(f"{len(quiet):,} as before", cards + rest))
    return f'<h2 id="prompts">Regression prompts</h2>{"".join(parts)}' if parts else ""


def _prompt(prompt: Facts, bad: set[tuple[str, str]], new: set[tuple[str, str]]) -> str:
    is_bad, is_new = (any((prompt["name"], column) in those for column in prompt["answers"]) for those in (bad, new))
    kind = "bad" if is_bad else "changed" if is_new else ""
    expect = f'<p class="small soft">expected: {name(_short(prompt["expect"]))}</p>' if prompt["expect"] else ""
    sides = "".join(
        _answer(column, answer, (prompt["name"], column) in bad) for column, answer in prompt["answers"].items()
    )
    head = f"<h3>{name(prompt['name'])}</h3>{quoted(_short(prompt['prompt']))}{expect}"
    return f'<div class="prompt {kind}">{head}<div class="sides">{sides}</div></div>'


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[:LONGEST]} … ({len(value) - LONGEST:,} characters more)"


def _answer(column: str, answer: Facts, is_bad: bool) -> Html:
    """Old, new and the difference where it changed; else the answer."""
    passed = {True: "✓ as expected", False: "✗ not as expected", None: ""}[answer["passed"]]
    mark = f'<span class="{"bad" if is_bad else "soft"}">{passed}</span>'
    new = _short(answer["answer"]) or "(nothing)"
    body: str = quoted(new)
    if answer["changed"]:
        mark += " · <b>! changed</b>"
        old = _short(answer["recorded"] or "") or "(nothing)"
        body = f"<p>old</p>{quoted(old)}<p>new</p>{quoted(new)}<p>difference</p>{differing(old, new)}"
    missed = [f"missed {said}" for said in answer["failed"] if said != answer["note"]]
    note = "".join(f"<p>{text(_short(said))}</p>" for said in [*missed, answer["note"]] if said)
    return Html(f"<div><h4>{name(column)} {mark}</h4>{body}{note}</div>")
