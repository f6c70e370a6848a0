"""What a run logged, as curves: read once, thinned, drawn.   read_curves(path) -> figures;  loss_plot(stage) -> figure

100,000 lines become a few hundred points that keep every extreme. What is not finite is counted, not drawn. Leaves out
runs that log elsewhere.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .markup import Html, name
from .svg import Line, lines

Points = list[list[float]]
MOST_POINTS = 300  # of a curve: twice its width on a phone
LARGEST = 1e300  # what is beyond, infinite or no number cannot be drawn
TOKENS = ("num_input_tokens_seen", "num_tokens")
PER_TOKEN = ("pretrain", "sft")  # stages whose loss is nats per token
AXES = {"step", "epoch", "wall_s", "train_cpu_s", *TOKENS}
# title, y label, keys of TRL's trainers; a * is any reward function
GROUPS: list[tuple[str, str, tuple[str, ...]]] = [
    ("Reward margin", "reward", ("rewards/margins", "margin")),
    ("Rewards of chosen and rejected", "reward", ("rewards/chosen", "rewards/rejected")),
    ("Chosen above rejected", "share", ("rewards/accuracies", "accuracy")),
    ("Log-probability of the answers", "nats", ("logps/chosen", "logps/rejected")),
    ("Reward", "reward", ("reward", "rewards/*/mean")),
    ("Reward, and what gold says of the same answers", "score", ("hack/proxy", "hack/gold", "proxy", "gold")),
    ("Which way the reward pushes gold", "z; below 0: down", ("hack/selection",)),
    ("Spread of the reward", "reward", ("reward_std", "rewards/*/std")),
    ("Prompts whose answers all got the same reward", "share", ("frac_reward_zero_std",)),
    ("KL from the reference", "nats", ("kl", "objective/kl")),
    ("Entropy of the next token", "nats per token", ("entropy",)),
    ("Length of the answers", "tokens",
     ("completions/mean_length", "completions/min_length", "completions/max_length")),
    ("Answers cut, updates clipped", "share", ("completions/clipped_ratio", "clip_ratio/region_mean", "clip_ratio")),
    ("Next token right", "share", ("mean_token_accuracy",)),
    ("Canaries: loss on raw text", "nats per token", ("canary/*",)),
    ("Sameness of the answers", "share",
     ("hack/duplicates", "hack/distinct_answers", "hack/distinct_3", "hack/repeats")),
    ("Hedging, echoes, empty thinking, answers cut", "share",
     ("hack/hedging", "hack/echo", "hack/empty_think", "hack/clipped")),
    ("Reward and length", "correlation", ("hack/length_correlation", "hack/length_correlation/*")),
    ("At the best that a reward ever gave", "share", ("hack/saturation/*",)),
]  # fmt: skip


def read_curves(path: Path) -> dict[str, Any]:
    """`series`: key -> thinned [[x, y], ...]; x counts tokens where the run does, else steps (`x` says which).

    `problems` says what was left out: lines that are no JSON, numbers that are not finite.
    """
    series: dict[str, list[tuple[float, float, float]]] = {}  # (tokens, step, y)
    bad, not_finite, tokens, step, num_rows = 0, 0, 0.0, 0.0, 0
    has_tokens = False
    for row in _rows(path):
        if row is None:
            bad += 1
            continue
        num_rows += 1
        step = row["step"] if _is_number(row.get("step")) else step
        for key in TOKENS:
            if _is_number(row.get(key)):
                tokens, has_tokens = row[key], True
        for key, value in row.items():
            if key in AXES or type(value) not in (int, float):
                continue
            if not abs(value) < LARGEST:
                not_finite += 1
            elif key in series:
                series[key].append((tokens, step, value))
            else:
                series[key] = [(tokens, step, value)]
    problems = [] if path.is_file() else [f"{path.name} is missing"]
    problems += [f"{bad:,} of {num_rows + bad:,} lines of {path.name} are no JSON and left out"] if bad else []
    problems += [f"{not_finite:,} numbers in {path.name} are not finite and left out"] if not_finite else []
    return {
        "x": "tokens" if has_tokens else "step",
        "series": {
            key: thin([[seen if has_tokens else at, y] for seen, at, y in points]) for key, points in series.items()
        },
        "last_step": int(step) if num_rows else None,
        "problems": problems,
    }


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Of every line its object, None for a line that is none (cut short by a kill)."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else None
    except OSError:
        return


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` points: the first, the last, and of every stretch its lowest and its highest."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


# drawing


def loss_plot(stage: dict[str, Any]) -> Html | None:
    """Training loss and every shard with its true entropy; None where neither was logged."""
    series = stage["curves"]["series"]
    drawn = [Line("train", series["loss"], is_soft=True)] if "loss" in series else []
    for key, points in series.items():
        if found := re.fullmatch(r"eval_(?:(.+)_)?loss", key):
            shard = found[1] or "eval"
            entropy = (stage["shards"].get(shard) or {}).get("entropy")
            drawn.append(Line(shard, points, level=entropy))
    if len(drawn) == 1:
        drawn = [dataclasses.replace(drawn[0], label="")]
    said = "dotted: the true entropy" if any(line.level is not None for line in drawn) else ""
    unit = "nats per token" if stage["stage"] in PER_TOKEN else "loss of the method"
    return _figure("Loss", drawn, stage, unit, said, may_be_log=True)


def pace_plots(stage: dict[str, Any]) -> list[Html]:
    """Learning rate and gradient norm."""
    series, made = stage["curves"]["series"], []
    for title, key in (("Learning rate", "learning_rate"), ("Gradient norm", "grad_norm")):
        drawn = [Line("", series[key])] if key in series else []
        made.append(_figure(title, drawn, stage, "", may_be_log=key == "grad_norm"))
    return [figure for figure in made if figure]


def reward_plots(stage: dict[str, Any]) -> list[Html]:
    """Preference and reward curves, by TRL's names; those of evaluations beside them."""
    made = [_figure(title, _lines_of(keys, stage), stage, y_label) for title, y_label, keys in GROUPS]
    return [figure for figure in made if figure]


def _owner(key: str) -> tuple[str, str]:
    """(what of GROUPS a logged key is, its shard); ("", "") for what is not drawn. The longest name wins:
    eval_mean_token_accuracy is no accuracy of a shard mean_token."""
    for wanted in sorted((wanted for _, _, keys in GROUPS for wanted in keys), key=len, reverse=True):
        pattern = r"(eval_(?:(.+)_)?)?" + re.escape(wanted).replace(r"\*", ".+")
        if found := re.fullmatch(pattern, key):
            return wanted, (found[2] or "eval") if found[1] else ""
    return "", ""


def _lines_of(keys: tuple[str, ...], stage: dict[str, Any]) -> list[Line]:
    """A line for each key that was logged: named by what differs between the keys, and by its shard."""
    drawn = []
    for key, points in stage["curves"]["series"].items():
        wanted, shard = _owner(key)
        if wanted in keys:
            end = key[key.index("rewards/") :] if wanted.startswith("rewards/") else wanted
            end = end.removeprefix("rewards/").removesuffix("/mean").removesuffix("/std").split("/")[-1]
            end = key[wanted.index("*") :] if end == "*" else end
            drawn.append((keys.index(wanted), end, shard, points))
    drawn.sort(key=lambda line: line[0])
    is_one = len({what for _, what, _, _ in drawn}) == 1
    return [
        Line("" if len(drawn) == 1 else f"{'' if is_one else what} {shard or 'train' * is_one}".strip(), points)
        for _, what, shard, points in drawn
    ]


def _figure(
    title: str, drawn: list[Line], stage: dict[str, Any], y_label: str, said: str = "", may_be_log: bool = False
) -> Html | None:
    values = {y for line in drawn for _, y in line.points}
    is_flat = len(values) == 1
    plot = "" if is_flat else lines(drawn, f"{title} of {stage['name']}", stage["curves"]["x"], y_label, may_be_log)
    if not plot and not is_flat:
        return None
    if len(drawn) == 1:
        said = f"{drawn[0].points[-1][1]:.3g} throughout" if is_flat else f"ends at {drawn[0].points[-1][1]:.3g}"
    note = f" · {said}" if said else ""
    return Html(f"<figure><figcaption><b>{name(stage['name'])}</b> · {title}{note}</figcaption>{plot}</figure>")
