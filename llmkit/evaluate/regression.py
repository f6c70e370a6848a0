"""Regression prompts: questions that a model answered once, asked again, and what has changed since.

Owns the answers of a model to a file of prompts (prompts.py), those that were accepted, and how both are shown.

    prompts = load_prompts(path);  replies = answer_prompts(model, tokenizer, prompts);  record(path, "sft", replies)
    found = outcomes(path, prompts, {"sft": replies});  show(found, Console())

Prompts are asked one by one, each with a seed of its own, so that an answer depends on no other prompt. Answers compare
on the machine that gave them: another device or dtype may tip a tie. Leaves out who is asked: that is the verb's.
"""

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..check.console import ESCAPES, printable, visible
from ..check.conversations import turn_ends
from ..config import UserError
from ..run import write_text
from .answers import answering, chat_ids, context_of, ends_of, generate
from .prompts import Prompt, judge, load_prompts, said

__all__ = ["Prompt", "Reply", "answer_prompts", "judge", "load_prompts", "outcomes", "record", "recorded", "show"]


@dataclasses.dataclass(frozen=True)
class Reply:
    text: str
    note: str = ""  # why it is not the whole answer
    is_asked: bool = True  # False: the prompt does not fit the context, so there is no answer


# ---- the answers


@torch.no_grad()
def answer_prompts(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> dict[str, Reply]:
    """name -> reply, each prompt asked alone. Mode and cache of the model and torch's random state come back.

    Raises UserError for a chat without a template, one that the template refuses, and a text without a token.
    """
    asked = [(prompt, _ids_of(prompt, tokenizer)) for prompt in prompts]  # all, so that a refusal costs no answers
    ends = ends_of(model, tokenizer)
    ends_of_turn = ends | turn_ends(tokenizer) if tokenizer.chat_template else ends
    with answering(model):
        return {
            prompt.name: _answer(model, tokenizer, prompt, ids, ends_of_turn if prompt.messages else ends)
            for prompt, ids in asked
        }


def _ids_of(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if prompt.prompt is not None:
        ids = list(tokenizer(prompt.prompt)["input_ids"])
        # some tokenizers close every text, and there would be nothing to go on with
        is_closed = bool(ids) and ids[-1] == tokenizer.eos_token_id
        ids = ids[:-1] if is_closed and not prompt.prompt.endswith(str(tokenizer.eos_token)) else ids
        if not ids:
            raise UserError(f"prompt {prompt.name!r}: {prompt.prompt!r} has no token in this vocabulary; change it")
        return ids
    if not tokenizer.chat_template:
        raise UserError(
            f"prompt {prompt.name!r} is a chat (messages), and the tokenizer has no chat template; "
            "ask a model that was tuned on chats, or write it as a text (prompt)"
        )
    try:
        return chat_ids(tokenizer, prompt.messages or [])
    except Exception as error:  # templates refuse in words of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"prompt {prompt.name!r}: the chat template refuses it ({reason}); change its messages"
        ) from None


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int], ends: set[int]) -> Reply:
    limit = context_of(model)
    if limit is not None and len(ids) >= limit:
        return Reply("", f"not asked: {len(ids)} tokens, the context holds {limit}", is_asked=False)
    with _seeded(prompt.seed):
        ((text, ended),) = generate(model, tokenizer, [ids], prompt.max_new_tokens, ends, **prompt.decoding)
    if ended:
        return Reply(text)
    is_full = limit is not None and limit - len(ids) < prompt.max_new_tokens
    return Reply(
        text, f"cut: the context of {limit} is full" if is_full else f"cut after {prompt.max_new_tokens} tokens"
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generators (CPU, CUDA) start at `seed`, and go on afterwards from where they were."""
    is_on = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if is_on else []):
        torch.manual_seed(seed)
        yield


# ---- what was accepted


def accepted_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.accepted.json")


def _read_accepted(path: Path) -> dict[str, dict[str, str]]:
    file = accepted_path(path)
    try:
        columns = json.loads(file.read_text(encoding="utf-8"))["columns"]
        is_right = all(isinstance(text, str) for answers in columns.values() for text in answers.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_right = False
    if not is_right:
        raise UserError(f"{file}: is no file of accepted answers; restore it, or remove it and accept anew")
    return columns


def recorded(path: Path, column: str) -> dict[str, str]:
    """name -> accepted answer; empty where there is none. Raises UserError for a file that is no such file."""
    return _read_accepted(path).get(column, {})


def record(path: Path, column: str, answers: Mapping[str, Reply]) -> Path:
    """Accepts these answers in place of all that this column had; those of others stay. Returns the file."""
    columns = _read_accepted(path)
    columns[column] = {name: reply.text for name, reply in answers.items() if reply.is_asked}
    file = accepted_path(path)
    try:
        write_text(file, json.dumps({"version": 1, "columns": columns}, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); make the folder writable") from None
    return file


def outcomes(path: Path, prompts: list[Prompt], answers: Mapping[str, Mapping[str, Reply]]) -> dict[str, Any]:
    """Of every prompt and column: the answer, whether it is as expected, and whether it is the accepted one.

    `answers` is column -> name -> reply. `num_unused`: accepted answers of these columns that no prompt asks for.
    """
    before = {column: recorded(path, column) for column in answers}
    names = {prompt.name for prompt in prompts}
    return {
        "file": str(path),
        "num_unused": sum(name not in names for column in before.values() for name in column),
        "prompts": [
            {
                "name": prompt.name,
                "prompt": prompt.question,
                "expect": "; ".join(said(key, expected) for key, expected in prompt.expect.items()),
                "answers": {
                    column: _outcome(prompt, replies[prompt.name], before[column].get(prompt.name))
                    for column, replies in answers.items()
                },
            }
            for prompt in prompts
        ],
    }


def _outcome(prompt: Prompt, reply: Reply, accepted: str | None) -> dict[str, Any]:
    failed = judge(prompt, reply.text) if reply.is_asked else [reply.note]
    return {
        "answer": reply.text,
        "passed": not failed,
        "recorded": accepted,
        "changed": accepted is not None and (not reply.is_asked or reply.text != accepted),
        "failed": failed,
        "note": reply.note,
    }


# ---- on a terminal

KEPT_WORDS = 6  # next to a change


def show(found: dict[str, Any], console: Console) -> None:
    """A line for every prompt; then what failed, and of what changed old, new and the words that differ."""
    prompts = found["prompts"]
    columns = list(prompts[0]["answers"])
    width = max(cell_len(printable(prompt["name"])) for prompt in prompts)
    cells = {(p["name"], column): _cell(p["answers"][column]) for p in prompts for column in columns}
    widths = {column: max(len(column), *(len(cells[p["name"], column]) for p in prompts)) for column in columns}
    _line(console, Text(f"regression  {found['file']}, {len(prompts)} prompts", style="bold"))
    _line(console, Text("  " + " " * width + "".join(f"  {c:<{widths[c]}}" for c in columns), style="dim"))
    for p in prompts:
        line = Text("  " + set_cell_size(printable(p["name"]), width))
        for column in columns:
            text = cells[p["name"], column]
            style = "red" if text.startswith("FAIL") else "yellow" if "changed" in text else "green"
            line.append("  ").append(f"{text:<{widths[column]}}", style)
        _line(console, line)
    for column in columns:
        _show_details(column, prompts, console)
    _line(console, Text())
    for column in columns:
        _line(console, Text(_summary(column, prompts)))
    if found["num_unused"]:
        _line(console, Text(f"{found['num_unused']} accepted answers belong to no prompt; accepting anew drops them"))


def _line(console: Console, text: Text) -> None:
    text.rstrip()
    console.print(text, soft_wrap=True, highlight=False)


def _cell(answer: dict[str, Any]) -> str:
    mark = "ok" if answer["passed"] else "FAIL"
    return f"{mark}, changed" if answer["changed"] else f"{mark}, new" if answer["recorded"] is None else mark


def _summary(column: str, prompts: list[dict[str, Any]]) -> str:
    answers = [prompt["answers"][column] for prompt in prompts]
    num_recorded = sum(answer["recorded"] is not None for answer in answers)
    changed = f"{sum(answer['changed'] for answer in answers)} of {num_recorded} accepted answers changed"
    passed = f"{column}: {sum(answer['passed'] for answer in answers)} of {len(answers)} as expected, "
    return passed + (changed if num_recorded else "none accepted yet (--accept)")


def _show_details(column: str, prompts: list[dict[str, Any]], console: Console) -> None:
    for prompt in prompts:
        answer = prompt["answers"][column]
        if answer["passed"] and not answer["changed"]:
            continue
        _line(console, Text(f"\n{printable(prompt['name'])}, {column}", style="bold"))
        for label, text in _details(prompt, answer):
            _line(console, Text(f"  {label:<8}  ", "dim").append_text(text))


def _details(prompt: dict[str, Any], answer: dict[str, Any]) -> Iterator[tuple[str, Text]]:
    yield "asked", Text(visible(prompt["prompt"]))
    if answer["note"]:
        yield "note", Text(answer["note"], "yellow")
    for failed in answer["failed"]:
        if failed != answer["note"]:
            yield "expected", Text(printable(failed), "red")
    if not answer["changed"]:
        yield "answer", Text(visible(answer["answer"]) or "(nothing)")
        return
    yield "old", Text(visible(answer["recorded"]) or "(nothing)")
    yield "new", Text(visible(answer["answer"]) or "(nothing)")
    yield "words", word_diff(answer["recorded"], answer["answer"])


def word_diff(old: str, new: str) -> Text:
    """On one line as wdiff writes it, [-old-]{+new+}; of what is equal, the words next to a change."""
    a, b = (re.findall(r"\s+|\S+", text) for text in (old, new))
    line = Text()
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    for k, (tag, i, j, m, n) in enumerate(blocks):
        if tag == "equal":
            line.append(_near_changes(a[i:j], has_before=k > 0, has_after=k < len(blocks) - 1))
            continue
        if j > i:
            line.append(f"[-{visible(''.join(a[i:j]))}-]", "red")
        if n > m:
            line.append(f"{{+{visible(''.join(b[m:n]))}+}}", "green")
    return line


def _near_changes(tokens: list[str], has_before: bool, has_after: bool) -> str:
    """Words and the blanks between them, less those far from a change."""
    first, last = 2 * KEPT_WORDS * has_before, 2 * KEPT_WORDS * has_after
    if len(tokens) <= first + last or not first + last:
        return _escaped(tokens)
    head, tail = _escaped(tokens[:first]), _escaped(tokens[len(tokens) - last :])
    return f"{head.rstrip()} … " * bool(head) + "… " * (not head) + tail.lstrip()


def _escaped(tokens: list[str]) -> str:
    return printable("".join(tokens).translate(ESCAPES))
