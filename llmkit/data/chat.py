"""Rows to tune on: builtin/toyworld, local files, Hub data sets, in any of the usual formats.

Owns loading the rows of one entry of `datasets:`, in TRL's columns, with those that teach nothing set apart.

    for row in load_rows(source, data_dir): ...      # columns of TRL, and `row`: its number in the source, from 1

Text, chat (messages, sharegpt, from/value), prompt/completion, alpaca and question/answer are told by their columns
(`check/columns.py`); preferences and prompts are made by `preferences.py`; `columns: {theirs: ours}` renames first.
Leaves out templates and tokens: `align/rows.py`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from ..check.columns import problem_of, turn, with_trl_columns
from ..config import UserError
from . import preferences
from .sources import Source, describe, find_builder, find_files, hub_rows, toyworld_range

ANSWERS = "answers"
PAIRS, LABELLED, RANKED, PROMPTS = preferences.KINDS
EMPTY = "nothing in it; point at a file or split that has rows"
KEPT = ("messages", "prompt", "completion", "text", "tools", "chat_template_kwargs", "kind")


class Bad(NamedTuple):
    row: int  # from 1
    problem: str


def load_rows(source: Source, data_dir: Path, kind: str = ANSWERS) -> Iterator[dict[str, Any] | Bad]:
    """Good rows, each with `row`, and the others. Raises UserError for what cannot be read or has no known format."""
    number = 0
    for number, raw in enumerate(_read(source, data_dir, kind), 1):
        given = {key: value for key, value in raw.items() if value is not None}
        if kind != ANSWERS:
            if number == 1:  # by all its columns: what a row lacks is a bad row, not another format
                _check_kind(source, raw, kind)
            yield from _preference(given, kind, number)
            continue
        row = with_trl_columns(given)
        if isinstance(row.get("messages"), list):  # roles as templates know them, no empty columns
            row = row | {"messages": [turn(t) for t in row["messages"]]}
        if number == 1:
            _check_format(source, given, row)
        kept = {key: row[key] for key in KEPT if row.get(key) is not None}
        problem = problem_of(row)
        yield kept | {"row": number} if problem is None else Bad(number, problem)
    if not number:
        raise UserError(f"{describe(source)}: {EMPTY}")


def _preference(given: dict[str, Any], kind: str, number: int) -> Iterator[dict[str, Any] | Bad]:
    try:
        for row in preferences.KINDS[kind][0](given):
            yield row | {"row": number}
    except preferences.Useless as error:
        yield Bad(number, str(error))


def _check_kind(source: Source, raw: dict[str, Any], kind: str) -> None:
    """Raises UserError where the columns are not those of that kind."""
    if not preferences.is_of_kind(raw, kind):
        raise UserError(
            f"{describe(source)}: columns {', '.join(sorted(raw))}; expected {preferences.KINDS[kind][2]}; "
            "`columns: {yours: ours}` renames"
        )


def _check_format(source: Source, given: dict[str, Any], row: dict[str, Any]) -> None:
    """Raises UserError where the first row is of no format that is known."""
    if "messages" in row or {"prompt", "completion"} <= set(row) or "text" in row:
        return
    if "chosen" in row:
        raise UserError(f"{describe(source)}: preference pairs (chosen, rejected); `llmkit sft` takes answers")
    raise UserError(
        f"{describe(source)}: no format that is known among the columns {', '.join(sorted(given))}; expected messages, "
        "conversations, prompt and completion, instruction and output, question and answer, or text; "
        "`columns: {yours: ours}` renames"
    )


def _read(source: Source, data_dir: Path, kind: str) -> Any:
    """An iterable of raw rows."""
    if source.path.startswith("builtin/"):
        from . import toychat

        allowed = ("instructions",) if kind == ANSWERS else preferences.KINDS[kind][1]
        names, split, first, last = toyworld_range(source, allowed, toychat.SPLITS)
        return toychat.rows(names[0], split, first, last)
    builder = find_builder(source)
    if builder is None:
        found = hub_rows(source)
    else:
        found = _local(source, builder, [str(path) for path in find_files(source, data_dir)])
    if isinstance(source.columns, dict):
        missing = [name for name in source.columns if name not in found.column_names]
        if missing:
            raise UserError(
                f"{describe(source)}: columns: no {missing[0]!r} among {', '.join(sorted(found.column_names))}"
            )
        found = found.rename_columns(source.columns)
    elif source.columns:
        raise UserError(f"{describe(source)}: columns={source.columns!r}; here it renames: {{yours: ours}}")
    return found


def _local(source: Source, kind: str, files: list[str]) -> Any:
    """By `datasets`; whose cache is keyed by the files' content, so an edited file is read anew."""
    datasets.disable_progress_bars()
    options: dict[str, Any] = {"sample_by": source.sample_by} if kind == "text" else {}
    try:
        return datasets.load_dataset(kind, data_files=files, split=source.split, **options)
    except Exception as error:
        raise UserError(f"{describe(source)}: {_reason(files, error)}") from None


def _reason(files: list[str], error: Exception) -> str:
    """The line that is no JSON where there is one, else what `datasets` said first: of an empty file, nothing."""
    for name in files:
        if not name.endswith(".jsonl"):
            continue
        with open(name, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return f"{name}:{number}: not a JSON object; mend that line"
                except ValueError as wrong:
                    return f"{name}:{number}: not JSON ({wrong}); mend that line"
    if not any(os.path.getsize(name) for name in files):
        return EMPTY
    cause = error.__cause__ or error
    said = str(cause).strip() or type(cause).__name__
    return f"cannot be read ({said.splitlines()[0][:200]}); expected rows of one kind"
