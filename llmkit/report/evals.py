"""What an evaluation found, row by row.   evaluation = read_eval(folder);  lost(row, column) -> pair | None

Owns comparison.json as the page needs it: rows (groups, their tasks, shards of raw text), columns, how they were asked,
regression prompts. A field that is missing or of another type counts as unknown. Leaves out what to make of it
(verdict.py).
"""

import json
from pathlib import Path
from typing import Any

from .runs import Facts, command_line, mapping, number, read_json, rows_of, string, strings

SMALL_GROUP = 12  # tasks up to which each counts; a larger group counts as a whole
FLAGS = ("gained", "lost")
HOW = {
    "num_fewshot": "examples before the question",
    "limit": "items of each task at most",
    "chat_template_sha256": "chat template",
    "chat_template_of": "chat template of",
    "chat_templates": "chat templates",
    "templates_borrowed": "templates borrowed",
    "bos": "BOS before a prompt",
    "system_instruction": "system prompt",
    "gen_kwargs": "generation settings",
    "batch_size": "batch size",
    "dtype": "dtype",
    "seed": "seed",
}
NULLS = {"num_fewshot": "as each task says", "limit": "all", "bos": "none", "chat_template_sha256": "none: plain text"}
OWN = ("is_chat", "num_fewshot")  # of each task, told beside its name


def read_eval(folder: Path) -> Facts:
    """`problem` says why nothing could be read of it."""
    found, problem = read_json(folder / "comparison.json")
    manifest, _ = read_json(folder / "manifest.json")
    columns = [_column(column) for column in rows_of(found.get("columns")) if string(column.get("name"))]
    names = [column["name"] for column in columns]
    if not problem and not columns:
        problem = "comparison.json has no columns"
    groups = [_row(row, "group", names) for row in rows_of(found.get("groups"))]
    tasks = [_row(row, "task", names) for row in rows_of(found.get("tasks"))]
    shards = [_row(row, "shard", names) for row in rows_of(found.get("shards"))]
    return {
        "folder": str(folder),
        "problem": problem,
        "started": string(manifest.get("started")),
        "command": command_line(manifest),
        "columns": columns,
        "how": _how(mapping(found.get("how")), names),
        "limit": number(mapping(found.get("how")).get("limit")),
        "versions": strings(mapping(found.get("how")).get("versions")),
        "rows": _grouped(groups, tasks) + shards,
        **_regression(mapping(found.get("regression")), names),
    }


def _column(column: Facts) -> Facts:
    texts = {key: string(column.get(key)) for key in ("model_dir", "run", "parent", "fingerprint", "dtype", "device")}
    numbers = {key: number(column.get(key)) for key in ("num_parameters", "num_bytes", "max_length")}
    return {"name": column["name"], "stage_name": None, **texts, **numbers}


def _row(row: Facts, kind: str, names: list[str]) -> Facts:
    scores, is_up = mapping(row.get("scores")), row.get("higher_is_better") is not False and kind != "shard"
    return {
        "kind": kind,
        "name": string(row.get("name")) or "?",
        "group": string(row.get("group")),
        "metric": string(row.get("metric")) or ("loss" if kind == "shard" else ""),
        "unit": string(row.get("unit")) or ("nats per token" if kind == "shard" else ""),
        "higher_is_better": is_up,
        "asked": string(row.get("kind")),
        "is_chat": row.get("is_chat") if isinstance(row.get("is_chat"), bool) else None,
        "data": string(row.get("data")),
        **{key: number(row.get(key)) for key in ("num_items", "num_fewshot", "window", "num_documents", "entropy")},
        "scores": {name: _score(mapping(scores[name])) for name in names if name in scores},
        "pairs": {pair["column"]: pair for raw in rows_of(row.get("pairs")) if (pair := _pair(raw, is_up, names))},
    }


def _score(score: Facts) -> Facts:
    """`value` is the loss of a shard."""
    value = number(score.get("value"))
    numbers = {key: number(score.get(key)) for key in ("stderr", "bits_per_byte", "num_cut", "num_nan", "wall_s")}
    return {"value": number(score.get("loss")) if value is None else value, **numbers}


def _pair(raw: Facts, is_up: bool, names: list[str]) -> Facts | None:
    """None without a difference. A flag that is missing is what the interval says."""
    difference, low, high = (number(raw.get(key)) for key in ("difference", "low", "high"))
    if raw.get("column") not in names or difference is None:
        return None
    flag = raw.get("flag") if raw.get("flag") in FLAGS else None
    if "flag" not in raw and low is not None and high is not None and (low > 0 or high < 0):
        flag = "gained" if (low > 0) == is_up else "lost"
    against = string(raw.get("against"))
    return {
        "column": raw["column"],
        "against": against,
        "difference": difference,
        "low": low,
        "high": high,
        "flag": flag,
    }


def _grouped(groups: list[Facts], tasks: list[Facts]) -> list[Facts]:
    """Each group with its tasks behind it; `is_folded` are the tasks of a large one."""
    named = {group["name"]: [task for task in tasks if task["group"] == group["name"]] for group in groups}
    rows: list[Facts] = []
    for task in tasks:
        if task["group"] not in named:
            rows.append({**task, "group": None, "is_folded": False})
    for group in groups:
        members = named[group["name"]]
        rows.append(group | {"is_folded": False, "num_tasks": len(members)})
        rows += [task | {"is_folded": len(members) > SMALL_GROUP} for task in members]
    return rows


def _how(how: Facts, names: list[str]) -> list[list[str]]:
    """[label, what was set] of how all were asked; notes last."""
    found = [[label, _said(how[key], NULLS.get(key, "none"), names)] for key, label in HOW.items() if key in how]
    return found + [["note", str(note)] for note in _list(how.get("notes"))]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _said(value: Any, null: str, names: list[str]) -> str:
    """A hash as its beginning; a mapping of all columns to one value as that value."""
    if isinstance(value, dict):
        each = {str(key): _said(entry, null, names) for key, entry in value.items()}
        if len(set(each.values())) == 1 and set(each) == set(names):
            return next(iter(each.values()))
        return "; ".join(f"{key}: {entry}" for key, entry in each.items()) or "none"
    if value is None or value == []:
        return null
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return said[:12] if len(said) == 64 and set(said) <= set("0123456789abcdef") else said


def _regression(regression: Facts, names: list[str]) -> Facts:
    """`prompts`: each with the answers of the columns that were asked."""
    prompts = []
    for prompt in rows_of(regression.get("prompts")):
        answers = mapping(prompt.get("answers"))
        asked = {name: mapping(answers[name]) for name in names if name in answers}
        prompts.append(
            {
                "name": string(prompt.get("name")) or "?",
                "prompt": string(prompt.get("prompt")) or "",
                "expect": string(prompt.get("expect")) or "",
                "answers": {
                    name: {
                        "answer": string(answer.get("answer")) or "",
                        "passed": answer.get("passed") if isinstance(answer.get("passed"), bool) else None,
                        "recorded": answer["recorded"] if isinstance(answer.get("recorded"), str) else None,
                        "changed": answer.get("changed") is True,
                        "failed": [said for said in _list(answer.get("failed")) if isinstance(said, str)],
                        "note": string(answer.get("note")) or "",
                    }
                    for name, answer in asked.items()
                },
            }
        )
    return {"regression_file": string(regression.get("file")), "prompts": prompts}


# what counts


def parent_of(evaluation: Facts, name: str) -> str | None:
    return next((column["parent"] for column in evaluation["columns"] if column["name"] == name), None)


def against_parent(evaluation: Facts, row: Facts, name: str) -> Facts | None:
    """The paired difference of a column to the column that it came from."""
    pair = row["pairs"].get(name)
    return pair if pair and pair["against"] == parent_of(evaluation, name) and pair["against"] else None


def counted(evaluation: Facts, name: str) -> list[tuple[Facts, Facts]]:
    """(row, pair) of all that a column is judged by: shards, tasks, large groups as a whole.

    A small group counts only where it lost and none of its tasks did.
    """
    found = []
    for row in evaluation["rows"]:
        pair = against_parent(evaluation, row, name)
        if pair is None or row.get("is_folded"):
            continue
        if row["kind"] == "group" and 0 < row["num_tasks"] <= SMALL_GROUP:
            members = [task for task in evaluation["rows"] if task["group"] == row["name"]]
            flags = [(against_parent(evaluation, task, name) or {}).get("flag") for task in members]
            if pair["flag"] != "lost" or "lost" in flags:
                continue
        found.append((row, pair))
    return found


def failing(evaluation: Facts) -> list[tuple[Facts, str]]:
    """(prompt, column) of regression prompts that count as failed.

    A base model cannot answer a chat: what fails in a stage counts where its parent passed, or where nothing was made
    of that stage.
    """
    parents = {column["name"]: column["parent"] for column in evaluation["columns"]}
    ends = [name for name in parents if name not in parents.values()]
    found = []
    for prompt in evaluation["prompts"]:
        for name, answer in prompt["answers"].items():
            before = prompt["answers"].get(parents.get(name))
            if answer["passed"] is False and (name in ends or (before and before["passed"])):
                found.append((prompt, name))
    return found


def changed(evaluation: Facts) -> list[tuple[Facts, str]]:
    """(prompt, column) of answers that are not the recorded ones."""
    prompts = evaluation["prompts"]
    return [(prompt, name) for prompt in prompts for name, answer in prompt["answers"].items() if answer["changed"]]
