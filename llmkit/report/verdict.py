"""What to make of the figures: the verdict in two sentences, what to look at, what makes CI fail.

    sentences = verdict(figures);  for finding in findings(figures): ...;  regressions(figures) == []

Reads what runs.py and evals.py give. A loss counts when the harness flagged it: the 95 % interval of the paired
difference to the parent does not hold 0. Leaves out markup.
"""

from datetime import datetime
from typing import Any

from .evals import changed, counted, failing
from .quantized import complaint, is_allowed
from .runs import bare, peak

Figures = dict[str, Any]
NAMED = 2  # rows named in a sentence
SHOWN_LOSSES = 4  # of a stage among the findings
MANY_CUT = 0.02  # share of answers cut short from which it is worth a line
BUSY = 1.5  # ratio of measured peaks of one machine from which something else ran there
BY_CHANCE = 20  # of so many comparisons one is flagged although nothing changed


def verdict(figures: Figures) -> list[str]:
    """What is bad, then what is good; one sentence each."""
    stages, evals = figures["stages"], _read(figures)
    bad = [f"{s['name']} {_status(s)}" for s in stages if s["status"] != "ok"]
    lost = by_stage(figures, "lost")
    if lost:
        bad += [
            f"{name} lost more than the noise on {len(rows)} of {_total(figures, name)} ({_named(rows)})"
            if not i
            else f"{name} on {len(rows)} of {_total(figures, name)} ({_named(rows)})"
            for i, (name, rows) in enumerate(_worst_first(lost))
        ]
    num_failing, num_changed = (sum(len(find(e)) for e in evals) for find in (failing, changed))
    if num_failing:
        bad.append(f"{_count(num_failing, 'regression prompt')} {'fails' if num_failing == 1 else 'fail'}")
    if num_changed:
        bad.append(f"{_count(num_changed, 'recorded answer')} changed")
    if alarms := [s for s in stages if s["alerts"]["count"]]:
        bad.append(_and([f"{_count(s['alerts']['count'], 'alarm')} in {s['name']}" for s in alarms]))
    if checks := sum(s["check"]["counts"]["fail"] for s in stages if s["check"]):
        bad.append(f"{_count(checks, 'check')} failed before training")
    gained = by_stage(figures, "gained")
    is_compared = any(counted(e, c["name"]) for e in evals for c in e["columns"])
    if not is_compared:
        good = "no evaluation compares these stages" if not evals else "no stage stands beside its parent"
        return [f"{_begin('; '.join(bad), stages)}."] * bool(bad) + [f"{_begin(good, stages)}."]
    if not lost:
        bad.append("no stage lost more than the noise against its parent")
    parts = [_gain(name, rows, _total(figures, name), not i) for i, (name, rows) in enumerate(gained.items())]
    good = "; ".join(parts) or "no stage gained more than the noise"
    return [f"{_begin(said, stages)}." for said in ("; ".join(bad), good)]


def _worst_first(lost: dict[str, list]) -> list[tuple[str, list]]:
    """Of the same number the latest first."""
    return sorted(reversed(lost.items()), key=lambda entry: -len(entry[1]))


def _named(rows: list[tuple[Figures, Figures]]) -> str:
    said = [f"{_label(row)} {signed(pair['difference'], row)}" for row, pair in rows[:NAMED]]
    return ", ".join([*said, f"{len(rows) - NAMED} more"] if len(rows) > NAMED else said)


def _label(row: Figures) -> str:
    return f"loss on {row['name']}" if row["kind"] == "shard" else row["name"]


def _gain(name: str, rows: list, total: int, is_first: bool) -> str:
    best = max(
        (row for row in rows if row[0]["kind"] != "shard"), key=lambda row: abs(row[1]["difference"]), default=None
    )
    most = f" (most: {best[0]['name']} {signed(best[1]['difference'], best[0])})" if best else ""
    return f"{name} {'gained ' if is_first else ''}on {len(rows)} of {total}{most}"


def _read(figures: Figures) -> list[Figures]:
    return [evaluation for evaluation in figures["evals"] if not evaluation["problem"]]


def by_stage(figures: Figures, flag: str) -> dict[str, list[tuple[Figures, Figures]]]:
    """column -> (row, pair) with this flag, over all evaluations."""
    found: dict[str, list[tuple[Figures, Figures]]] = {}
    limits = {s["name"]: s["quantized"]["limit"] for s in figures["stages"] if s["quantized"]}
    for evaluation in _read(figures):
        for column in evaluation["columns"]:
            limit = limits.get(column["stage_name"])
            those = [
                (row, pair)
                for row, pair in counted(evaluation, column["name"])
                if pair["flag"] == flag and not is_allowed(row, pair, limit)
            ]
            if those:
                found.setdefault(column["name"], []).extend(those)
    return found


def _total(figures: Figures, name: str) -> int:
    return sum(len(counted(evaluation, name)) for evaluation in _read(figures))


def regressions(figures: Figures) -> list[str]:
    """What `--fail_on_regression` fails for, a line each."""
    found = [
        f"{name} against {pair['against']}: {_label(row)} {difference(row, pair)}"
        for name, rows in by_stage(figures, "lost").items()
        for row, pair in rows
    ]
    for evaluation in _read(figures):
        found += [f"{name}: regression prompt {prompt['name']} fails" for prompt, name in failing(evaluation)]
        found += [f"{name}: the answer to {prompt['name']} changed" for prompt, name in changed(evaluation)]
    return found


def findings(figures: Figures) -> list[dict[str, str]]:
    """The worst first: {"mark": fail | warn, "what": ..., "todo": ..., "at": section}."""
    stages, evals, found = figures["stages"], _read(figures), []

    def say(mark: str, what: str, todo: str = "", at: str = "") -> None:
        found.append({"mark": mark, "what": what, "todo": todo, "at": at})

    for s in stages:
        if why := complaint(s):
            other = "" if s["quantized"]["method"] == "8bit" else "8 bit, or "
            say("fail", why, f"Its folder is whole; {other}more layers left as they are lose less.", "quantized")
        elif s["status"] != "ok":
            say("fail", f"{s['name']} {_status(s)}{_where(s)}", "Its figures are those of an unfinished run.", "curves")
    for name, rows in _worst_first(by_stage(figures, "lost")):
        shown = [f"{_label(row)} {_from_to(row, pair)}" for row, pair in rows[:SHOWN_LOSSES]]
        rest = f"; and {len(rows) - SHOWN_LOSSES} more" if len(rows) > SHOWN_LOSSES else ""
        say("fail", f"{name} lost against {rows[0][1]['against']}: {'; '.join(shown)}{rest}", "", "benchmarks")
    for evaluation in evals:
        failed = failing(evaluation)
        said = {(prompt["name"], name) for prompt, name in failed}
        for name, prompts in _by_column(failed).items():
            say("fail", f"{name} fails {_prompts(prompts)}", "", "prompts")
        otherwise = [(prompt, name) for prompt, name in changed(evaluation) if (prompt["name"], name) not in said]
        for name, prompts in _by_column(otherwise).items():
            say("warn", f"{name} answers {_prompts(prompts)} otherwise than recorded", "", "prompts")
    for s in stages:
        for kind in s["alerts"]["kinds"]:
            first = kind["said"][0]
            times = f"{kind['count']:,} times, first " if kind["count"] > 1 else ""
            at = f" ({times}at step {first['step']:,.0f})" if first["step"] is not None else f" ({kind['count']:,})"
            say("fail", f"{s['name']}: {kind['kind']}{at}", first["message"], "alarms")
    for s in stages:
        if s["check"] and s["check"]["counts"]["fail"]:
            ids = [c["id"] for c in s["check"]["found"] if c["status"] == "fail"]
            say("fail", f"{s['name']} was trained although {_and(ids)} failed", "", "checks")
    return sorted(found + _doubts(figures), key=lambda one: one["mark"] != "fail")


def _by_column(found: list[tuple[Figures, str]]) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {}
    for prompt, name in found:
        columns.setdefault(name, []).append(prompt["name"])
    return columns


def _prompts(names: list[str]) -> str:
    """the regression prompt a; 5 regression prompts: a, b, c, ..."""
    if len(names) == 1:
        return f"the regression prompt {names[0]}"
    return f"{len(names):,} regression prompts ({', '.join(names[:SHOWN_LOSSES])}{', …' * (len(names) > SHOWN_LOSSES)})"


def _doubts(figures: Figures) -> list[dict[str, str]]:
    """What makes the figures themselves doubtful."""
    stages, evals, found = figures["stages"], figures["evals"], []

    def say(what: str, todo: str = "", at: str = "benchmarks") -> None:
        found.append({"mark": "warn", "what": what, "todo": todo, "at": at})

    if not evals:
        words = " ".join(s["folder"] for s in stages)
        say(
            "there is no evaluation among these folders",
            f"llmkit eval {words} --output_dir DIR, then name DIR here, too",
            "",
        )
    for evaluation in evals:
        if evaluation["problem"]:
            say(f"{evaluation['folder']}: {evaluation['problem']}", "Run llmkit eval again.")
        asked = {c["stage_name"] for c in evaluation["columns"]}
        ended = [s for s in stages if s["status"] == "ok" and s["overfit"] is None]
        worth = [s["name"] for s in ended if not s["quantized"]]  # those compared themselves with their original
        if missing := [name for name in worth if name not in asked and len(evals) == 1]:
            say(f"not evaluated: {_and(missing)}", "Name them in llmkit eval, too.")
        for s in stages:
            if s["name"] in asked and is_later(s["started"], evaluation["started"]):
                say(f"{s['name']} was started again after {evaluation['folder']} evaluated it", "Evaluate it again.")
        if evaluation["limit"] is not None:
            say(
                f"only {evaluation['limit']:,g} items of each task were asked",
                "Leave out --limit for figures to quote.",
            )
        for row in evaluation["rows"]:
            for name, score in row["scores"].items():
                if score["num_cut"] and score["num_cut"] > MANY_CUT * (row["num_items"] or 0):
                    of = f" of {row['num_items']:,}" if row["num_items"] else ""
                    say(
                        f"{name}: {score['num_cut']:,}{of} items of {row['name']} were cut to fit",
                        "Cut items score low.",
                    )
                if score["num_nan"]:
                    say(f"{name}: {score['num_nan']:,} scores of {row['name']} are no number")
    for s in stages:
        for problem in s["problems"] if s["status"] in ("ok", "stopped") else []:
            say(f"{s['name']}: {problem}", "", "curves")
    return found


def differences(figures: Figures) -> list[str]:
    """What differs between the runs although it decides numbers, a sentence each."""
    stages, found = figures["stages"], []
    if len(stages) < 2:
        return []
    by_name = {s["name"]: s for s in stages}
    for key in ("tokenizer", "chat template"):
        for s in stages:
            mine, theirs = (
                (x or {}).get("fingerprints", {}).get(key) for x in (s, by_name.get(s["parent_name"] or ""))
            )
            if mine and theirs and mine != theirs:
                found.append(f"{s['name']} has another {key} than {s['parent_name']}")
    for package in sorted({p for s in stages for p in s["versions"]}):
        if len(values := _values(stages, lambda s, p=package: s["versions"].get(p) if s["versions"] else None)) > 1:
            found.append(f"{package}: {_each(values)}")
    for label, get in (
        ("git commit", lambda s: (s["git_commit"] or "")[:8] or None),
        ("hardware", lambda s: bare(s["hardware"])),
        ("engine", lambda s: s["engine"]),
        ("seed", lambda s: s["seed"]),
    ):
        if len(values := _values(stages, get)) > 1:
            found.append(f"{label}: {_each(values)}")
    machines: dict[str, list[tuple[float, str]]] = {}
    for s in stages:
        if s["hardware"] and (measured := peak(s["hardware"])):
            machines.setdefault(bare(s["hardware"]) or "", []).append((measured, s["name"]))
    for peaks in machines.values():
        (low, slow), (high, fast) = min(peaks), max(peaks)
        if high > BUSY * low:
            found.append(
                f"the same machine reached {high:g} TFLOP/s before {fast} and {low:g} before {slow}: "
                "something else ran there, so its times say little"
            )
    return found


def _values(stages: list[Figures], get: Any) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for s in stages:
        if (value := get(s)) is not None:
            values.setdefault(str(value), []).append(s["name"])
    return values


def _each(values: dict[str, list[str]]) -> str:
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items())


def is_later(one: str | None, other: str | None) -> bool:
    try:
        return datetime.fromisoformat(one or "") > datetime.fromisoformat(other or "")
    except (ValueError, TypeError):  # not both known; one with and one without a zone
        return False


# words


def _status(stage: Figures) -> str:
    said = {"failed": "failed", "stopped": "was stopped early", "unfinished": "has not finished (no result.json)"}
    return said.get(stage["status"], "is broken (result.json cannot be read)")


def _where(stage: Figures) -> str:
    last = stage["curves"]["last_step"]
    return f"; last logged at step {last:,}" if last else ""


def figure(value: float | None, row: Figures) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if row["kind"] == "shard" else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def signed(value: float, row: Figures) -> str:
    said = figure(abs(value), row)
    return ("−" if value < 0 else "+") + said


def interval(row: Figures, pair: Figures) -> str:
    """[low, high] of the difference, "" where it is not known."""
    if pair["low"] is None or pair["high"] is None:
        return ""
    return f"[{signed(pair['low'], row)}, {signed(pair['high'], row)}]"


def difference(row: Figures, pair: Figures) -> str:
    return f"{signed(pair['difference'], row)} {interval(row, pair)}".strip()


def _from_to(row: Figures, pair: Figures) -> str:
    scores = [(row["scores"].get(name) or {}).get("value") for name in (pair["against"], pair["column"])]
    way = f"{figure(scores[0], row)} → {figure(scores[1], row)}, " if None not in scores else ""
    return f"{way}{difference(row, pair)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _begin(said: str, stages: list[Figures]) -> str:
    """With a capital, unless it begins with a name."""
    return said if said.split(" ")[0] in {s["name"] for s in stages} else said[:1].upper() + said[1:]
