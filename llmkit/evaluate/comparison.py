"""Columns beside each other: every figure with its error, and with the paired difference to where it came from.

Owns comparison.json, which reports read.   comparison = compare_columns(job, results)

Differences are of the same items and against the parent; a column without one stands against the first. A metric that
is no mean over items has no paired test. Leaves out measuring (measure.py).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..run import versions
from .measure import read_samples
from .paired import compare
from .regression import Reply, outcomes, record

VERSION = 1


def compare_columns(job: Any, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """comparison.json of the results of all columns, by name."""
    names = [column.name for column in job.columns]
    against = {column.name: column.parent or names[0] for column in job.columns}
    pairs = [(name, against[name]) for name in names if against[name] != name]
    return {
        "version": VERSION,
        "columns": [_column(job, column, results[column.name]) for column in job.columns],
        "how": {
            "num_fewshot": job.config.num_fewshot,
            "limit": job.config.limit,
            "chat_templates": job.asking.hashes,
            "templates_borrowed": job.asking.lenders,
            "bos": job.asking.bos,
            "system_instruction": job.config.system_instruction,
            "gen_kwargs": job.config.gen_kwargs,
            "batch_size": job.config.batch_size,
            "dtype": job.config.dtype,
            "notes": job.asking.notes,
            "versions": versions(),
        },
        "tasks": [row for unit in job.units for row in _tasks(job, results, names, pairs, unit)],
        "groups": [row for unit in job.units for row in _groups(job, results, names, pairs, unit)],
        "shards": [_shard(job, results, names, pairs, name) for name in job.shards],
        **({"regression": _regression(job, results)} if job.prompts else {}),
    }


def _regression(job: Any, results: dict[str, Any]) -> dict[str, Any]:
    kept = {column.name: results[column.name]["regression"]["replies"] for column in job.columns}
    replies = {column: {name: Reply(**reply) for name, reply in found.items()} for column, found in kept.items()}
    found = outcomes(Path(job.config.regression), job.prompts, replies)
    if job.config.accept:
        for column, answers in replies.items():
            record(Path(job.config.regression), column, answers)
    return found


def _column(job: Any, column: Any, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": column.name,
        "model_dir": column.model_dir,
        "run": column.run,
        "parent": column.parent,
        "fingerprint": column.fingerprint,
        "max_length": job.lengths[column.name],
        **results.get("model", {}),
    }


def _tasks(
    job: Any, results: dict[str, Any], names: list[str], pairs: list[tuple[str, str]], unit: str
) -> list[dict[str, Any]]:
    rows = []
    group_of = {
        task: name for name, group in results[names[0]]["units"][unit]["groups"].items() for task in group["tasks"]
    }
    for task in results[names[0]]["units"][unit]["tasks"]:
        found = {name: results[name]["units"][unit]["tasks"][task] for name in names}
        first = found[names[0]]
        key = first_metric(first["scores"])
        metric, _, way = (key or ",").partition(",")
        is_up = first["higher_is_better"].get(metric, True)
        shared = ("kind", "num_items", "num_fewshot", "is_chat", "stops", "data")
        rows.append(
            {
                "name": task,
                "group": group_of.get(task),
                **{what: first[what] for what in shared},
                "metric": metric,
                "filter": way,
                "higher_is_better": is_up,
                "scores": {name: _score(found[name], key) for name in names},
                "pairs": [
                    pair
                    for name, other in pairs
                    if (pair := _pair(job.folder, name, other, [task], metric, way, is_up, first["means"]))
                ],
            }
        )
    return rows


def first_metric(scores: dict[str, Any]) -> str | None:
    """The figure that stands for a task: bits per byte of text, else the one that its definition names first."""
    return next((key for key in scores if key.startswith("bits_per_byte,")), next(iter(scores), None))


def _score(found: dict[str, Any], key: str | None) -> dict[str, Any]:
    others = {name: score for name, score in found["scores"].items() if name != key}
    score = found["scores"].get(key) or {"value": None, "stderr": None}
    return {**score, "num_cut": found["num_cut"], "wall_s": found["wall_s"], "others": others}


def _groups(
    job: Any, results: dict[str, Any], names: list[str], pairs: list[tuple[str, str]], unit: str
) -> list[dict[str, Any]]:
    rows = []
    for group, first in results[names[0]]["units"][unit]["groups"].items():
        tasks = results[names[0]]["units"][unit]["tasks"]
        key = first_metric(first["scores"])
        if key is None:
            continue
        metric, _, way = key.partition(",")
        is_up = tasks[first["tasks"][0]]["higher_is_better"].get(metric, True)
        is_mean = all(metric in tasks[task]["means"] for task in first["tasks"])
        rows.append(
            {
                "name": group,
                "metric": metric,
                "filter": way,
                "higher_is_better": is_up,
                "tasks": first["tasks"],
                "num_items": sum(tasks[task]["num_items"] for task in first["tasks"]),
                "scores": {name: results[name]["units"][unit]["groups"][group]["scores"][key] for name in names},
                "pairs": [
                    pair
                    for name, other in pairs
                    if is_mean
                    and (
                        pair := _pair(
                            job.folder, name, other, first["tasks"], metric, way, is_up, [metric], first["by_size"]
                        )
                    )
                ],
            }
        )
    return rows


def _pair(
    folder: Path,
    name: str,
    other: str,
    tasks: list[str],
    metric: str,
    way: str,
    is_up: bool,
    means: list[str],
    by_size: bool = True,
) -> dict[str, Any] | None:
    """None for a metric that no paired test is for."""
    values, others, weights = [], [], []
    for task in tasks:
        mine, theirs = (_by_item(folder, column, task, metric, way) for column in (name, other))
        items = [item for item in mine if item in theirs]
        if not items:
            return None
        if metric in means:
            values.append(np.array([mine[i] for i in items], np.float64))
            others.append(np.array([theirs[i] for i in items], np.float64))
            weights.append(np.ones(len(items)))
        elif metric == "bits_per_byte":  # (log-likelihood, bytes)
            values.append(np.array([-mine[i][0] / math.log(2) for i in items]))
            others.append(np.array([-theirs[i][0] / math.log(2) for i in items]))
            weights.append(np.array([mine[i][1] for i in items], np.float64))
        else:
            return None
    pair = compare(values, others, is_up, weights, by_size)
    return {"column": name, "against": other, **vars(pair)}


def _by_item(folder: Path, column: str, task: str, metric: str, way: str) -> dict[Any, Any]:
    rows = read_samples(folder, column, task)
    return {row["doc_id"]: row[metric] for row in rows if row["filter"] == way and metric in row}


def _shard(
    job: Any, results: dict[str, Any], names: list[str], pairs: list[tuple[str, str]], shard: str
) -> dict[str, Any]:
    """Differences in nats per token where the tokenizers are the same, else in bits per byte."""
    found = {name: results[name]["shards"][shard] for name in names}
    first = found[names[0]]
    is_same = len({found[name]["num_tokens"] for name in names}) == 1
    rows = {name: read_samples(job.folder, name, f"shard.{shard}") for name in names}

    def values(name: str) -> Any:
        if is_same:
            return np.array([row["nats"] + row["eos_nats"] for row in rows[name]])
        return np.array([row["nats"] / math.log(2) for row in rows[name]])

    weights = np.array([row["num_tokens"] + 1 if is_same else row["num_bytes"] for row in rows[names[0]]], np.float64)
    shared = ("data", "window", "num_documents", "num_tokens", "num_bytes", "entropy")
    return {
        "name": shard,
        **{what: first[what] for what in shared},
        "unit": "nats per token" if is_same else "bits per byte",
        "scores": {
            name: {what: found[name][what] for what in ("loss", "stderr", "bits_per_byte", "wall_s")} for name in names
        },
        "pairs": [
            {"column": name, "against": other, **vars(compare([values(name)], [values(other)], False, [weights]))}
            for name, other in pairs
            if len(weights) > 1
        ],
    }
