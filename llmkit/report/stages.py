"""The page's parts about runs: the chain, where each came from, curves, alarms, checks, fingerprints, size and speed.

Reads what runs.py gives. A part without anything to say is left out, or says what is unknown.
"""

import shlex
from typing import Any

from .curves import loss_plot, pace_plots, reward_plots
from .evals import Facts
from .markup import Html, cell, folded, name, size_text, table, text
from .runs import bare
from .svg import short
from .verdict import differences

CHECKED = {"pass": "passed", "warn": "warned", "fail": "failed", "not_run": "did not run"}
SHOWN_METRICS, SHOWN_PLOTS, SHOWN_CHECKS, SHOWN_LINES = 12, 8, 20, 3  # then folded away
CSS = """
.chain { display: flex; flex-wrap: wrap; gap: .3rem .5rem; align-items: center; margin: .6rem 0; padding: 0;
  list-style: none; font-size: .93rem; }
.chain li { display: flex; gap: .5rem; align-items: center; } .chain .box { border: 1px solid var(--line);
  border-radius: .3rem; background: var(--card); padding: .1rem .6rem; }
.chain .box.bad { border: 2px dashed var(--lost); font-weight: 400; color: inherit; }
.chain .soft { font-size: .86rem; } .chain .of { color: var(--soft); }
ol.line { list-style: none; padding: 0; margin: .5rem 0; }
ol.line > li { border-left: 3px solid var(--bar); padding: .1rem 0 .5rem .8rem; margin: 0; }
ol.line dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .05rem 1rem;
  margin: .1rem 0 0; font-size: .93rem; } ol.line dl div { display: grid; grid-template-columns: 6.5rem 1fr; }
ol.line dt { color: var(--soft); } ol.line dd { margin: 0; min-width: 0; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
ol.line h3 { margin: 0; } code { font: .86rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
td code { white-space: nowrap; }
ul.plain { list-style: none; margin: .3rem 0; padding: 0; } ul.plain li { margin: .15rem 0; }
@media print { .plots { gap: .6rem 1rem; } .plots svg { width: 8.6cm; } }
"""


def clock(seconds: float | None) -> str:
    """12.3 s, 16 min 33 s, 3 h 05 min, 2 d 04 h."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"


def chain(stages: list[Facts]) -> str:
    """Parent -> child on one line; a second child of the same parent begins a line of its own."""
    lines: list[list[Facts]] = []
    for s in stages:
        line = next((line for line in lines if s["parent_name"] and line[-1]["name"] == s["parent_name"]), None)
        if line:
            line.append(s)
        else:
            lines.append([s])
    drawn = [f'<ol class="chain" aria-label="lineage">{_links(line)}</ol>' for line in lines]
    rest = drawn[SHOWN_LINES:]
    return "".join(drawn[:SHOWN_LINES]) + (folded(f"{len(rest)} more lines of descent", "".join(rest)) if rest else "")


def _links(line: list[Facts]) -> str:
    first = line[0]
    out = f'<li><span class="of">{name(first["parent_name"] or first["parent"])}</span></li>' if first["parent"] else ""
    for i, s in enumerate(line):
        said = " · ".join(filter(None, [short(s["tokens"]) + " tokens" if s["tokens"] else "", clock(s["wall_s"])]))
        state = "" if s["status"] == "ok" else f' <b class="bad">✗ {text(s["status"])}</b>'
        kind = f' <span class="soft">{name(s["stage"])}</span>' if s["stage"] != s["name"] else ""
        arrow = '<span aria-hidden="true">→</span>' if i or first["parent"] else ""
        box = f"<b>{name(s['name'])}</b>{kind}{state}" + (f' <span class="soft">{text(said)}</span>' if said else "")
        out += f'<li>{arrow}<span class="box{" bad" * bool(state)}">{box}</span></li>'
    return out


def lineage(stages: list[Facts]) -> str:
    """Every stage with all that made it."""
    out = ""
    for s in stages:
        rows: list[tuple[str, Any]] = [
            ("from", name(s["parent"]) if s["parent"] else "nothing before it"),
            ("tokens", f"{s['tokens']:,.0f}" if s["tokens"] else None),
            ("steps", f"{s['steps']:,.0f}" if s["steps"] else None),
            ("time", clock(s["wall_s"])),
            ("engine", _engine(s)),
            ("hardware", s["hardware"]),
            ("git commit", (s["git_commit"] or "")[:12]),
            ("recipe", s["recipe"]),
            ("seed", s["seed"]),
            ("overfit on", f"{s['overfit']:,.0f} rows, as a test" if s["overfit"] else None),
            ("started", s["started"]),
            ("started before", f"{s['num_earlier_starts']} times, gone on with" if s["num_earlier_starts"] else None),
            ("folder", s["folder"]),
            ("not read", "; ".join(s["problems"])),
        ]
        facts = "".join(f"<div><dt>{k}</dt><dd>{cell(v)}</dd></div>" for k, v in rows if v is not None and v != "")
        kind = "" if s["stage"] == s["name"] else f' <span class="soft">{name(s["stage"])}</span>'
        state = "" if s["status"] == "ok" else f' <span class="bad">✗ {text(s["status"])}</span>'
        out += f"<li><h3>{name(s['name'])}{kind}{state}</h3><dl>{facts}</dl></li>"
    return f'<h2 id="lineage">Where each stage came from</h2><ol class="line">{out}</ol>' if out else ""


def _engine(s: Facts) -> str | None:
    if s["engine"] is None or s["num_processes"] is None:
        return s["engine"]
    return f"{s['engine']}, {s['num_processes']:.0f} process{'es' * (s['num_processes'] != 1)}"


def own_figures(stages: list[Facts]) -> str:
    """What the stages measured on themselves: loss beside the true entropy, and their metrics."""
    stages = [s for s in stages if s["shards"] or s["metrics"]]
    if not stages:
        return ""
    rows: list[list[object]] = []
    for s in stages:
        for shard, found in s["shards"].items():
            entropy, loss = found["entropy"], found["loss"]
            if loss is None:
                continue
            gap = f"{loss - entropy:+.4f}" if entropy is not None else ""
            gap += f" ±{found['gap_stderr']:.4f}" if gap and found["gap_stderr"] is not None else ""
            bits = found["bits_per_byte"]
            rows.append([f"{s['name']}: {shard}", f"{loss:.4f}", "" if entropy is None else f"{entropy:.4f}", gap,
                         "" if bits is None else f"{bits:.4f}"])  # fmt: skip
    head = ["shard", ">loss", ">true entropy", ">gap", ">bits/byte"]
    out = table(head, rows) if rows else ""
    metrics: list[list[object]] = [
        [f"{s['name']}: {key}", f"{v:.6g}"] for s in stages for key, v in s["metrics"].items()
    ]
    if metrics:
        shown = table(["figure", ">value"], metrics)
        out += folded(f"{len(metrics):,} more figures", shown) if len(metrics) > SHOWN_METRICS else shown
    note = "Each on its own validation shards, in nats per token: not compared, so without a flag."
    return f'<h2 id="own">What the stages measured themselves</h2><p class="soft small">{note}</p>{out}'


def curves(stages: list[Facts]) -> str:
    """Loss of every run, then learning rate and gradient norm, then what trainers log of preferences and rewards."""
    losses = [(s, [figure] if (figure := loss_plot(s)) else []) for s in stages]
    missing = [s["name"] for s, found in losses if not found]
    out = _plots("Loss", "curves", losses)
    out += f'<p class="soft small">No loss to draw: {text(", ".join(missing))}.</p>' if missing else ""
    out += _plots("Learning rate and gradient norm", "pace", [(s, pace_plots(s)) for s in stages])
    return out + _plots("Rewards, entropy, lengths", "rewards", [(s, reward_plots(s)) for s in stages])


def _plots(title: str, anchor: str, drawn: list[tuple[Facts, list[Html]]]) -> str:
    """Those of a run begin a line; a run of many folds the rest away."""
    is_single = all(len(found) <= 1 for _, found in drawn)
    groups = [[figure for _, found in drawn for figure in found]] if is_single else [found for _, found in drawn]
    parts = ""
    for found in filter(None, groups):
        found.sort(key=lambda figure: "<svg" not in figure)  # what never moved is a line of text
        parts += f'<div class="plots">{"".join(found[:SHOWN_PLOTS])}</div>'
        if rest := found[SHOWN_PLOTS:]:
            parts += folded(f"{len(rest)} more", f'<div class="plots">{"".join(rest)}</div>')
    return f'<h2 id="{anchor}">{title}</h2>{parts}' if parts else ""


def alarms(stages: list[Facts]) -> str:
    """What the monitors raised, by stage and kind."""
    items = ""
    for s in stages:
        for kind in s["alerts"]["kinds"]:
            times = f", {kind['count']:,} times" if kind["count"] > 1 else ""
            said = [(f"step {a['step']:,.0f}: " if a["step"] is not None else "") + a["message"] for a in kind["said"]]
            said += [f"e.g. {a['example']}" for a in kind["said"][:1] if a["example"]]
            more = kind["count"] - len(kind["said"])
            said += [f"and {more:,} more"] if more else []
            lines = "".join(f"<span>{text(line)}</span>" for line in said)
            items += f"<li><b>✗ {name(s['name'])}: {name(kind['kind'])}{times}</b>{lines}</li>"
        if s["alerts"]["bad_lines"]:
            count = s["alerts"]["bad_lines"]
            items += f"<li><b>! {name(s['name'])}: {count:,} lines of alerts.jsonl are no JSON</b></li>"
    shown = f'<ul class="look">{items}</ul>' if items else '<p class="fine">No run raised one.</p>'
    return f'<h2 id="alarms">Alarms</h2>{shown}' if stages else ""


def samples(stages: list[Facts]) -> str:
    """Answers to the same questions before the first step and after the last, of runs that keep them."""
    out = ""
    for s in stages:
        if s["samples"]:
            rows: list[list[object]] = [[q["question"], q["first"], q["last"], q["good"]] for q in s["samples"]]
            out += f"<h3>{name(s['name'])}</h3>" + table(["question", "at first", "at the end", "chosen"], rows)
    return f'<h2 id="samples">Answers while it trained</h2>{out}' if out else ""


def checks(stages: list[Facts]) -> str:
    """What the checks before each run found."""
    if not stages:
        return ""
    parts = ""
    for s in stages:
        if s["check"] is None:
            parts += f"<li>{name(s['name'])}: unknown, there is no check.json</li>"
            continue
        said = ", ".join(f"{n} {CHECKED[status]}" for status, n in s["check"]["counts"].items() if n) or "no check ran"
        items = [_check(c) for c in s["check"]["found"]]
        shown = f'<ul class="look">{"".join(items[:SHOWN_CHECKS])}</ul>' if items else ""
        if rest := items[SHOWN_CHECKS:]:
            shown += folded(f"{len(rest)} more", f'<ul class="look">{"".join(rest)}</ul>')
        parts += f"<li>{name(s['name'])}: {said}{shown}</li>"
    return f'<h2 id="checks">Checks before each run</h2><ul class="plain">{parts}</ul>'


def _check(c: Facts) -> str:
    mark = {"fail": "✗ FAIL", "warn": "! WARN", "not_run": "? DID NOT RUN"}[c["status"]]
    found = " ".join(filter(None, [c["title"], c["measured"]]))
    fix = f"<span>→ {text(c['fix'])}</span>" if c["fix"] and c["status"] != "not_run" else ""
    return f"<li><b>{mark} {name(c['id'])}</b> {text(found)}{fix}</li>"


def fingerprints(stages: list[Facts], evals: list[Facts]) -> str:
    """Hashes of tokenizer, template, model and data of every run; where they or the versions differ, in words."""
    if not stages:
        return ""
    rows: list[list[object]] = []
    for s in stages:
        models = [c["fingerprint"] for e in evals for c in e["columns"] if c["stage_name"] == s["name"]]
        prints = s["fingerprints"] | {"model": next(filter(None, models), None)}
        data = [f"{key[6:]} {value[:8]}" for key, value in prints.items() if key.startswith("data: ") and value]
        short_of = [
            Html(f"<code>{text((prints[key] or 'unknown')[:12])}</code>")
            for key in ("tokenizer", "chat template", "model")
        ]
        rows.append([s["name"], *short_of, "; ".join(data) or "unknown"])
    differing = differences({"stages": stages})
    items = "".join(f"<li>{text(said)}</li>" for said in differing)
    same = _same(stages)
    none = '<p class="fine">The runs do not differ in what is recorded.</p>' if len(stages) > 1 else ""
    out: str = table(["stage", "tokenizer", "chat template", "model", "data"], rows)
    out += f"<p>What differs:</p><ul>{items}</ul>" if items else none
    return f'<h2 id="fingerprints">Fingerprints and versions</h2>{out}<p class="soft small">{text(same)}</p>'


def _same(stages: list[Facts]) -> str:
    """Versions that all runs share."""
    known = [s["versions"] for s in stages if s["versions"]]
    if not known:
        return "Versions are unknown: no manifest.json could be read."
    shared = [f"{k} {v}" for k, v in known[0].items() if all(other.get(k) == v for other in known)]
    return f"In all runs: {', '.join(shared) or 'no version is the same'}."


def sizes(stages: list[Facts], evals: list[Facts]) -> str:
    """Parameters, bytes and speed; what was timed on different machines is said to be no comparison."""
    rows: list[list[object]] = []
    for s in stages:
        columns = [c for e in evals for c in e["columns"] if c["stage_name"] == s["name"]]
        known = {
            k: next((c[k] for c in columns if c[k] is not None), None) for k in ("num_parameters", "num_bytes", "dtype")
        }
        size = s["num_bytes"] or known["num_bytes"]
        parameters = s["num_parameters"] or known["num_parameters"]
        rate = s["tokens_per_second"]
        extra = [f"{k}: {v:,.6g}" for k, v in s["metrics"].items() if k.endswith("tokens_per_second")]
        speed = "; ".join(([f"{rate:,.0f}"] if rate else []) + ([] if s["quantized"] else extra))
        rows.append([s["name"], f"{parameters:,.0f}" if parameters else "", size_text(size), known["dtype"] or "",
                     speed, clock(s["wall_s"]), bare(s["hardware"]) or "unknown"])  # fmt: skip
    named = {c["stage_name"] for e in evals for c in e["columns"]} & {s["name"] for s in stages}
    for c in (c for e in evals for c in e["columns"] if c["stage_name"] not in named):
        parameters = f"{c['num_parameters']:,.0f}" if c["num_parameters"] else ""
        rows.append([c["name"], parameters, size_text(c["num_bytes"]), c["dtype"] or "", "", "", ""])
    if not rows:
        return ""
    machines = {bare(s["hardware"]) for s in stages if s["tokens_per_second"]}
    note = "Tokens per second of training: padding, evaluations and saving count differently in each stage. "
    if len(machines) > 1:
        note += "! Measured on different hardware: these speeds are not comparable."
    head = ["model", ">parameters", ">weights on disk", "dtype", ">tokens/s", ">wall time", "hardware"]
    return f'<h2 id="sizes">Size and speed</h2>{table(head, rows)}<p class="soft small">{text(note)}</p>'


def contamination(stages: list[Facts], corpora: dict[str, Facts]) -> str:
    """Was evaluation text in the training data? What the corpora say, and where nobody looked."""
    items = ""
    for s in stages:
        if not s["contamination"]:
            items += f"<li>{name(s['name'])}: unknown, its recipe names no data set that could be looked up</li>"
        for data in s["contamination"]:
            items += f"<li>{name(s['name'])}, {name(data['source'])}: {_held(data, corpora)}</li>"
    title = '<h2 id="contamination">Evaluation text in the training data</h2>'
    return f'{title}<ul class="plain">{items}</ul>' if items else ""


def _held(data: Facts, corpora: dict[str, Facts]) -> str:
    corpus = corpora.get(data["corpus"] or "")
    if corpus is None:
        if data["path"] == "builtin/toyworld":
            return "its training and evaluation splits share no row, by construction; nothing else was looked for"
        return "unknown, there is no report of `llmkit data` for it"
    if corpus["problem"]:
        return f"unknown, {text(corpus['problem'])}"
    if corpus["is_decontaminated"] is False:
        return f"unknown, {name(corpus['folder'])} was made with decontaminate: false"
    against = [*(f"shard {shard}" for shard in corpus["shards"]), *corpus["benchmarks"]]
    if not against:
        return f"unknown, {name(corpus['folder'])} was made without anything to hold it against"
    said = f"{corpus['num_dropped']:,} documents were dropped that held text of {', '.join(against)}"
    if corpus["num_boilerplate"]:
        said += f"; {corpus['num_boilerplate']:,} texts were taken for boilerplate and kept"
    return text(said)


def commands(stages: list[Facts], evals: list[Facts], words: str) -> str:
    """What to type to make it all again, in order."""
    made = [*stages, *evals]
    lines = [(one["command"] or f"# {shlex.quote(one['folder'])}: unknown, no manifest.json") for one in made]
    body = "\n".join(text(line) for line in [*lines, f"llmkit report {words}"])
    note = "In this order, each at its git commit; recipe.yaml in the folder of a run has every setting."
    return f'<h2 id="commands">Commands</h2><p class="soft small">{note}</p><pre>{body}</pre>' if made else ""
