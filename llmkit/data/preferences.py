"""Preferences and prompts, in any of the usual formats: pairs, marked answers, ranked answers, prompts with columns.

Owns what a row becomes, in TRL's columns, and why one is of no use:

    pairs     prompt, chosen, rejected         a pair from DPO data; turns before it, or shared turns, are the prompt
    labelled  prompt, completion, label        label: true or false; a pair makes two
    ranked    prompt, completions, scores      a pair has the scores 1 and 0
    prompts   prompt, and every other column   for reward functions

    for row in as_pairs(given): ...            # TRL's columns; raises Useless, which says what is wrong

A prompt is a text with texts to follow, or turns with turns to follow. Leaves out reading files (`chat.py`) and tokens.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from ..check.columns import problem_of, turn

QUESTIONS = ("instruction", "question", "query")


class Useless(ValueError):
    """What is wrong with a row."""


def _turns(value: Any) -> list[dict[str, Any]]:
    """An answer given as a turn, or as turns."""
    return [turn(t) for t in (value if isinstance(value, list) else [value])]


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _role(given: Any) -> Any:
    return given.get("role") if isinstance(given, dict) else None


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _history(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns before an instruction, which alpaca writes as [[question, answer], ...]. Raises Useless."""
    given = row.get("history") if "instruction" in row else None
    if given and not (isinstance(given, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in given)):
        raise Useless("history is no list of [question, answer]")
    return [turn for asked, answer in given or [] for turn in (*_user(asked), {"role": "assistant", "content": answer})]


def prompt_of(row: dict[str, Any]) -> Any:
    """The turns or the text before an answer; None where the row has none of its own. Raises Useless."""
    for key in ("prompt", "conversations", "messages"):
        if isinstance(row.get(key), list) and row[key]:
            return _system(row) + _turns(row[key])
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return _system(row) + _user(row["prompt"]) if row.get("system") else row["prompt"]
    asked = next((row[key] for key in QUESTIONS if isinstance(row.get(key), str) and row[key].strip()), None)
    if asked is None:
        return None
    extra = row.get("input") if isinstance(row.get("input"), str) and row.get("input") else None
    return _system(row) + _history(row) + _user(f"{asked}\n\n{extra}" if extra else asked)


def _shared(answers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The turns with which all of them begin, without the last of any."""
    count = 0
    while all(count < len(turns) - 1 and turns[count] == answers[0][count] for turns in answers):
        count += 1
    return answers[0][:count]


def _unfit(answers: list[Any]) -> str:
    """What is wrong with answers that are neither all texts nor all turns."""
    if any(answer is None for answer in answers):
        return "an answer is missing"
    kinds = sorted({type(answer).__name__ for answer in answers if not isinstance(answer, (str, list, dict))})
    if kinds:
        return f"an answer is {', '.join(kinds)}: not text or turns"
    return "empty answer" if not all(answers) else "an answer is text, another one turns"


def _with_prompt(row: dict[str, Any], answers: list[Any]) -> tuple[Any, list[Any]]:
    """Prompt and answers, both texts or both turns. Raises Useless."""
    prompt = prompt_of(row)
    if all(isinstance(answer, str) for answer in answers):
        if prompt is None:
            raise Useless("no prompt")
        if isinstance(prompt, str):
            return prompt, answers
        answers = [[{"role": "assistant", "content": text}] for text in answers]
    elif not all(isinstance(answer, (list, dict)) and answer for answer in answers):
        raise Useless(_unfit(answers))
    answers = [_turns(answer) for answer in answers]
    if any(len(turns) > 1 and _role(turns[0]) not in ("assistant", None) for turns in answers):  # whole chats
        shared = _shared(answers)
        answers, prompt = [turns[len(shared) :] for turns in answers], shared and _system(row) + shared
    if not prompt:
        raise Useless("no prompt")
    return (_user(prompt) if isinstance(prompt, str) else prompt), answers


def _check_prompt(prompt: Any) -> None:
    """Raises Useless for turns that are answered already, or ask nothing."""
    last = prompt[-1] if isinstance(prompt, list) else None
    if _role(last) == "assistant":
        raise Useless("the prompt ends with an assistant turn")
    if _role(last) == "user" and not text_of([last]).strip():
        raise Useless("the prompt asks nothing")


def _check(prompt: Any, answers: list[Any]) -> None:
    """Raises Useless for a prompt that asks nothing, or an answer that says nothing."""
    _check_prompt(prompt)
    for answer in answers:
        problem = problem_of({"prompt": prompt, "completion": answer})
        if problem:
            raise Useless(problem)
        if isinstance(answer, list) and any(t["role"] == "user" for t in answer):
            raise Useless("a user turn in an answer")


def text_of(answer: Any) -> str:
    """An answer as one text."""
    return answer if isinstance(answer, str) else "\n".join(str(t.get("content") or "") for t in answer)


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("tools", "chat_template_kwargs", "kind", "margin") if row.get(key) is not None}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    prompt, (chosen, rejected) = _with_prompt(row, [row.get("chosen"), row.get("rejected")])
    _check(prompt, [chosen, rejected])
    if text_of(chosen).strip() == text_of(rejected).strip():
        raise Useless("chosen = rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | _kept(row)


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    if "completion" not in row and isinstance(row.get("messages"), list):
        turns = _system(row) + _turns(row["messages"])
        prompt, completion = turns[:-1], turns[-1:]
        if not prompt:
            raise Useless("no prompt")
    else:
        prompt, (completion,) = _with_prompt(row, [row.get("completion")])
    _check(prompt, [completion])
    label = row.get("label")
    if label not in (True, False):  # 0 and 1 are among them
        raise Useless(f"label is {label!r}: not true or false")
    return {"prompt": prompt, "completion": completion, "label": bool(label)} | _kept(row)


def _ranked(row: dict[str, Any]) -> dict[str, Any]:
    answers = next((row[key] for key in ("completions", "responses") if isinstance(row.get(key), list)), None)
    scores = row.get("scores")
    if answers is None or len(answers) < 2:
        raise Useless("fewer than two completions")
    if not isinstance(scores, list):
        raise Useless("scores missing")
    if len(scores) != len(answers):
        raise Useless(f"{len(scores)} scores for {len(answers)} completions")
    if not all(type(score) in (int, float, bool) and math.isfinite(score) for score in scores):
        raise Useless("a score is no number")
    if len(set(scores)) == 1:
        raise Useless("scores all equal")
    prompt, answers = _with_prompt(row, answers)
    _check(prompt, answers)
    return {"prompt": prompt, "completions": answers, "scores": [float(score) for score in scores]} | _kept(row)


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    prompt = prompt_of(row)
    if isinstance(prompt, list) and _role(prompt[-1]) == "assistant":  # a chat: its last answer is the gold one
        row = {"answer": prompt[-1].get("content")} | row
        prompt = prompt[:-1]
    if not prompt:
        raise Useless("no prompt")
    _check_prompt(prompt)
    if isinstance(prompt, list) and (problem := problem_of({"messages": [*prompt, *_ANY]})):
        raise Useless(problem)
    used = {"prompt", "conversations", "messages", "system"}
    if not used & set(row) - {"system"}:  # beside a prompt a question is a column like any other
        used |= {*QUESTIONS, "input"} | ({"history"} if "instruction" in row else set())
    return {"prompt": prompt} | {key: value for key, value in row.items() if key not in used}


_ANY = [{"role": "assistant", "content": "."}]


def _is_pair(row: dict[str, Any]) -> bool:
    """Also one that lacks an answer, which is told so."""
    return "chosen" in row or "rejected" in row


def as_pairs(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield _pair(row)


def as_labelled(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not _is_pair(row):
        yield _labelled(row)
        return
    pair = _pair(row)
    rest = {key: value for key, value in pair.items() if key not in ("chosen", "rejected", "margin")}
    yield rest | {"completion": pair["chosen"], "label": True}
    yield rest | {"completion": pair["rejected"], "label": False}


def as_ranked(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not _is_pair(row):
        yield _ranked(row)
        return
    pair = _pair(row)
    yield {"prompt": pair["prompt"], "completions": [pair["chosen"], pair["rejected"]], "scores": [1.0, 0.0]} | _kept(
        row
    )


def as_prompts(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield _prompt(row)


def as_answers(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the answer that it makes likely as the completion."""
    if "chosen" in row:
        return {"prompt": row["prompt"], "completion": row["chosen"]}
    if "completions" in row:
        best = max(range(len(row["scores"])), key=lambda k: row["scores"][k])
        return {"prompt": row["prompt"], "completion": row["completions"][best]}
    return row


# kind -> what makes rows of it, which toyworld sets hold it, what it expects of the columns
KINDS: dict[str, tuple[Callable[[dict[str, Any]], Iterator[dict[str, Any]]], tuple[str, ...], str]] = {
    "pairs": (as_pairs, ("preferences",), "chosen and rejected, with prompt or the turns before them"),
    "labelled": (as_labelled, ("preferences",), "completion (or messages) and label, or chosen and rejected"),
    "ranked": (as_ranked, ("rankings", "preferences"), "prompt, completions and scores, or chosen and rejected"),
    "prompts": (as_prompts, ("prompts", "sums", "unknown"), "prompt, messages, question or instruction"),
}


def is_of_kind(row: dict[str, Any], kind: str) -> bool:
    """Whether the columns, some of them empty, are of that kind: else every row is refused, and one line says it."""
    if kind == "prompts":
        return bool({"prompt", "messages", "conversations", *QUESTIONS} & set(row))
    if {"chosen", "rejected"} <= set(row):
        return True
    if kind == "labelled":
        return "label" in row and bool({"completion", "messages"} & set(row))
    return kind == "ranked" and bool({"completions", "responses"} & set(row))
