"""A file of prompts, each with what is expected of its answer.

Owns its keys, their mistakes, and the judgement of an answer; regression.py asks.

    prompts = load_prompts(Path("recipes/toy/regression.yaml"));  judge(prompts[0], "the Esk") == []

The file is a list; decoding is greedy unless a prompt says otherwise:

    - name: river
      messages: [{role: user, content: Which river is in Norda?}]      # or `prompt: Norda lies on the`, a plain text
      expect: {exact: the Esk}                                         # one or several, all of which have to hold
      # max_new_tokens, do_sample, temperature, top_p, top_k, repetition_penalty, seed: as in GenerationConfig

    exact         the whole answer, white space around it aside; of a list, one
    contains      each of these texts; not_contains: none of them
    regex         each of these is found somewhere (Python's re.search)
    numeric       the last number of the answer, a number or {value, tolerance}; see `last_number`

Leaves out tools, images, and judging by taste.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config import UserError, _allowed, _fits, read_yaml

SAMPLING = ("temperature", "top_p", "top_k", "seed")  # what greedy decoding ignores
TEXTS = ("exact", "contains", "not_contains", "regex")
EXPECTATIONS = (*TEXTS, "numeric")


@dataclasses.dataclass(frozen=True)
class Prompt:
    name: str
    expect: dict[str, Any]  # texts as lists; numeric as (value, tolerance)
    prompt: str | None = None
    messages: list | None = None
    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # all tokens
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def question(self) -> str:
        """The text, or the last turn of the chat."""
        return self.prompt if self.messages is None else self.messages[-1]["content"]  # type: ignore[return-value]

    @property
    def decoding(self) -> dict[str, Any]:
        """What `generate` is given."""
        given: dict[str, Any] = {"repetition_penalty": self.repetition_penalty}
        if self.do_sample:
            given |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return given


def load_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order. Raises UserError naming file, prompt and key."""
    entries = read_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: holds {_kind(entries)}; expected a list of prompts, `- name: ...`")
    prompts: dict[str, Prompt] = {}
    for i, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            found = f"name={name!r}" if isinstance(entry, dict) else repr(entry)
            raise UserError(f"{path}: prompt {i + 1}: {found}; give it a name, a text of its own")
        if name in prompts:
            raise UserError(f"{path}: prompt {name!r}: the name is given twice; rename one")
        try:
            prompts[name] = _parse(entry)
        except UserError as error:
            raise UserError(f"{path}: prompt {name!r}: {error}") from None
    return list(prompts.values())


def _kind(value: Any) -> str:
    return "nothing" if value in (None, []) else type(value).__name__


def _known(keys: Iterable, known: Sequence[str], where: str = "") -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"nearest: {near[0]!r}" if near else f"allowed: {', '.join(known)}"
            raise UserError(f"unknown key {where + str(key)!r}; {hint}")


def _parse(entry: dict[str, Any]) -> Prompt:
    hints = typing.get_type_hints(Prompt)
    _known(entry, list(hints))
    for key, value in entry.items():
        if key != "expect" and not _fits(value, hints[key]):
            raise UserError(f"{key}={value!r} is {type(value).__name__}; allowed: {_allowed(hints[key])}")
    if (entry.get("prompt") is None) == (entry.get("messages") is None):
        found = "neither prompt nor messages" if entry.get("prompt") is None else "both prompt and messages"
        raise UserError(f"{found}; give one: prompt for a text to go on with, messages for a chat")
    if entry.get("prompt") == "":
        raise UserError("prompt='' is empty; give a text to go on with")
    if entry.get("messages") is not None:
        _check_messages(entry["messages"])
    prompt = Prompt(**entry | {"expect": _expectations(entry.get("expect"))})
    _check_decoding(prompt, entry)
    return prompt


def _check_messages(messages: list[Any]) -> None:
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{where}={message!r}; expected {{role: user, content: text}}")
        _known(message, ["role", "content"], f"{where}.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(
                    f"{where}.{key}={message.get(key)!r}; expected a text (in quotes if YAML reads it else)"
                )
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        last = messages[-1]["role"] if messages else "nothing"
        raise UserError(f"messages end with {last}; they have to end with what is asked, e.g. role user")


def _check_decoding(prompt: Prompt, entry: dict[str, Any]) -> None:
    for key, is_right, allowed in (
        ("max_new_tokens", prompt.max_new_tokens >= 1, "1 or more"),
        ("temperature", 0 < prompt.temperature < math.inf, "above 0; `do_sample: false` is greedy"),
        ("top_p", 0 < prompt.top_p <= 1, "above 0, at most 1"),
        ("top_k", prompt.top_k >= 0, "1 or more, or 0 for all tokens"),
        ("repetition_penalty", 0 < prompt.repetition_penalty < math.inf, "above 0; 1 is none"),
        ("seed", 0 <= prompt.seed < 2**63, "0 or more"),
    ):
        if not is_right:
            raise UserError(f"{key}={getattr(prompt, key)!r}; allowed: {allowed}")
    ignored = [key for key in SAMPLING if key in entry and not prompt.do_sample]
    if ignored:
        raise UserError(f"{ignored[0]}={entry[ignored[0]]!r} has no effect on greedy decoding; add `do_sample: true`")


def _expectations(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or not given:
        raise UserError(f"expect={given!r}; expected one or several of {', '.join(EXPECTATIONS)}, e.g. {{exact: red}}")
    _known(given, EXPECTATIONS, "expect.")
    found = {key: _texts(key, value) for key, value in given.items() if key != "numeric"}
    return found | ({"numeric": _number(given["numeric"])} if "numeric" in given else {})


def _texts(key: str, value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"expect.{key}={text!r} is {type(text).__name__}; allowed: a text; put it in quotes")
        if not text and key != "exact":
            raise UserError(f"expect.{key}='' is in every answer; give a text")
        if key == "regex":
            try:
                re.compile(text)
            except re.error as error:
                raise UserError(f"expect.regex={text!r} is no regular expression ({error}); mend it") from None
    if not texts:
        raise UserError(f"expect.{key}=[] expects nothing; give a text")
    return texts


def _number(given: Any) -> tuple[float, float]:
    parts = given if isinstance(given, dict) else {"value": given}
    _known(parts, ["value", "tolerance"], "expect.numeric.")
    value: Any = parts.get("value")
    tolerance: Any = parts.get("tolerance", 0)
    is_right = all(_fits(part, float) and math.isfinite(part) for part in (value, tolerance)) and tolerance >= 0
    if not is_right:
        raise UserError(f"expect.numeric={given!r}; allowed: a number, or {{value: number, tolerance: 0 or more}}")
    return float(value), float(tolerance)


# ---- the judgement

FIGURE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
NUMBER = re.compile(rf"(?<![\w.])(?P<sign>(?<![\w.)])[-\u2212])?(?P<figure>{FIGURE})(?:/(?P<below>{FIGURE}))?(?!\.?\d)")


def last_number(text: str) -> float | None:
    """The last number of a text, None without one.

    1,234.5 is one number and so is 3/4 (0.75); "7, 8" and "1,2" are two. A minus counts where no word or number stands
    before it: -3 and "is -3", but 3 in "10-3". Digits behind letters (H2O) are no number, nor is 1.2.3.
    """
    found = None
    for found in NUMBER.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    above, below = (float((found[part] or "1").replace(",", "")) for part in ("figure", "below"))
    value = above / below if below else math.nan
    return -value if found["sign"] else value


def judge(prompt: Prompt, answer: str) -> list[str]:
    """The expectations that an answer fails, in words; empty where all hold."""
    failed = []
    for key, expected in prompt.expect.items():
        if key == "exact":
            if answer.strip() not in [text.strip() for text in expected]:
                failed.append(said(key, expected))
        elif key == "numeric":
            number, (value, tolerance) = last_number(answer), expected
            # a rounding error is no error: 0.4 is within 0.1 of 0.3
            if number is None or not abs(number - value) <= tolerance + 1e-9 * abs(value):
                failed.append(f"{said(key, expected)} (found {'none' if number is None else f'{number:g}'})")
        else:
            is_in = {text: bool(re.search(text, answer)) if key == "regex" else text in answer for text in expected}
            missed = [text for text in expected if is_in[text] == (key == "not_contains")]
            failed += [said(key, [text]) for text in missed]
    return failed


def said(key: str, expected: Any) -> str:
    if key == "numeric":
        value, tolerance = expected
        return f"numeric: {value:g}" + (f" ± {tolerance:g}" if tolerance else "")
    return f"{key}: {(' | ' if key == 'exact' else ', ').join(expected)}"
