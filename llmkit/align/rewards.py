"""Reward functions of reinforcement, by name or `module:function`, and what they give before anything is trained.

Owns the builtin rewards, the checks on what any reward returns, and a self-test that finds rewards that can be hacked.

    rewards = get_rewards(["numeric_answer", {"format": {"pattern": "<think>.+</think>.*"}}, "rewards/mine.py:score"])
    for line in self_test(rewards, rows).lines(): print(line)

Called as TRL calls them: `fn(prompts=, completions=, completion_ids=, **columns)` gives a number, or None for "no
opinion", per completion. Prompts and completions are texts, or chats. Leaves out async functions and reward models.
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import itertools
import math
import numbers
import re
import runpy
import sys
import types
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from ..config import UserError

Function = Callable[..., list[float | None]]

# sign, digits with or without thousands, denominator; not the 2 of x^2, the 4 of GPT4, the 3 of 1.2.3
NUMBER = re.compile(
    r"((?<![\w)\]}%])[-−])?\\?[$€£]?((?<![A-Za-z0-9_^])(?<!\^\{)(?<![0-9]\.)(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
    r"(?:\.[0-9]+)?|(?<![A-Za-z0-9_.^])\.[0-9]+)(?:/(0*[1-9][0-9]{0,19})(?![0-9/]|\.[0-9]))?"
)
FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
MARKED = re.compile(r"####\s{0,8}([^\w\n]{0,8}[0-9].*)")  # "#### 72"; "#### Step 2" is a heading; bounds: linear time
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def text_of(said: Any) -> str:
    """A prompt or completion as text: of a chat the last message, of several parts their texts."""
    content = said if isinstance(said, str) else said[-1]["content"] if said else ""
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content or ""


def find_numbers(text: str) -> list[Decimal]:
    """Every number of a text, in its order; $ and % count for nothing, 3/4 is 0.75.

    Decimal, since int() refuses the 5,000 digits of a babbling model and float() rounds products of large numbers.
    """
    found = []
    for sign, digits, denominator in NUMBER.findall(FRACTION.sub(r"\1/\2", text)):
        number = Decimal(sign.replace("−", "-") + digits.replace(",", ""))
        found.append(number / Decimal(denominator) if denominator else number)
    return found


def final_number(text: str, is_gold: bool = False) -> Decimal | None:
    """What follows the last `####`, else (of a completion) what is in the last \\boxed{}, else the last number."""
    marked = text.split("####")[1:] if is_gold else MARKED.findall(text)
    boxed = [] if is_gold else BOXED.findall(text)
    found = find_numbers(marked[-1] if marked else boxed[-1] if boxed else text)
    return found[0 if marked else -1] if found else None


# ---- builtins: options -> function


def _each(score: Callable[..., float | None], column: str = "") -> Function:
    """`score(completion)`, or `score(completion, answer)` with None for a row that has no answer."""

    def reward(*, prompts: list, completions: list, completion_ids: Any = None, **columns: Any) -> list[float | None]:
        if not column:
            return [score(text_of(said)) for said in completions]
        if column not in columns:
            known = ", ".join(key for key, value in columns.items() if isinstance(value, list)) or "none"
            raise UserError(f"no column {column!r} in the rows (columns: {known}); name yours as answer_column")
        pairs = zip(completions, columns[column], strict=True)
        return [None if answer is None else score(text_of(said), str(answer)) for said, answer in pairs]

    return reward


def exact_answer(answer_column: str = "answer") -> Function:
    """1.0 for the answer word for word and nothing else. Not to be gamed; a right answer in other words gets 0.0."""
    return _each(lambda said, answer: float(said.strip() == answer.strip()), answer_column)


def numeric_answer(answer_column: str = "answer") -> Function:
    """1.0 when a completion ends on the answer's number, None where the answer has none; 50% is 50.

    Gamed by: anything at all before that number, such as the answer many times.
    """

    def score(said: str, answer: str) -> float | None:
        gold = final_number(answer, is_gold=True)
        return None if gold is None else float(final_number(said) == gold)

    return _each(score, answer_column)


def contains_answer(answer_column: str = "answer") -> Function:
    """1.0 when the answer's number, or the text of an answer without one, is anywhere in it as a whole word.

    Gamed by: naming every possible answer, counting from 0 to 100; to look at, or with a low weight.
    """

    def score(said: str, answer: str) -> float | None:
        gold, text = final_number(answer, is_gold=True), answer.strip()
        if gold is not None:
            return float(gold in find_numbers(said))
        return float(bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said))) if text else None

    return _each(score, answer_column)


def format(pattern: str) -> Function:
    """1.0 when the whole text has this form (re.DOTALL); a group `(?P<think>...)` without a word in it gives 0.0.

    Gamed by: the form with nonsense in it, since it says nothing of the answer; never the only reward.
    """
    try:
        form = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            f"reward_funcs: format: pattern={pattern!r} is no regular expression ({error}); mend it"
        ) from None

    def score(said: str) -> float:
        match = form.fullmatch(said.strip())
        thought = match.groupdict().get("think") if match else None
        return float(match is not None and (thought is None or bool(thought.strip())))

    return _each(score)


def length(max_words: int = 64, is_penalty: bool = False) -> Function:
    """Rises from 0 to 1 at `max_words` words and stays there; a penalty falls from 1 to 0.

    Gamed by: rambling on or, as a penalty, saying nothing; its weight belongs far below the answer's.
    """
    if max_words < 1:
        raise UserError(f"reward_funcs: length: max_words={max_words}; allowed: 1 or more")
    return _each(lambda said: abs(is_penalty - min(len(said.split()) / max_words, 1.0)))


BUILTINS: dict[str, Callable[..., Function]] = {
    make.__name__: make for make in (exact_answer, numeric_answer, contains_answer, format, length)
}


# ---- from recipe to rewards


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function under the name that logs show; calling it checks what comes out."""

    name: str
    weight: float
    function: Function
    options: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)  # of a builtin

    def __call__(self, **arguments: Any) -> np.ndarray:
        """(N,) float64, NaN for None. Takes TRL's keywords; raises UserError with the reward and what is wrong."""
        expected = len(arguments["completions"])
        try:
            values = self.function(**arguments)
        except Exception as error:
            said = str(error) if isinstance(error, UserError) else f"raises {_said(error)}; mend the function"
            raise UserError(f"reward {self.name}: {said}") from error
        if not isinstance(values, list) or len(values) != expected:
            found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
            raise UserError(f"reward {self.name}: returns {found}; expected a list of {expected} numbers or None")
        for index, value in enumerate(values):
            is_number = isinstance(value, (numbers.Real, np.bool_))
            if value is not None and not (is_number and abs(float(value)) < math.inf):
                hint = "return None for 'no opinion'" if is_number else "allowed: a number, true or false, None"
                raise UserError(f"reward {self.name}: value {index} is {value!r:.50} ({type(value).__name__}); {hint}")
        return np.array([math.nan if value is None else float(value) for value in values])


def get_rewards(reward_funcs: Any, reward_weights: Any = None) -> list[Reward]:
    """The rewards of a recipe, in its order. Raises UserError for whatever cannot be called or weighed."""
    if not isinstance(reward_funcs, list) or not reward_funcs:
        raise UserError(f"reward_funcs: {reward_funcs!r}; write a list of at least one of: {ALLOWED}")
    weights = [1.0] * len(reward_funcs) if reward_weights is None else reward_weights
    is_list = isinstance(weights, list) and all(type(w) in (int, float) and math.isfinite(w) for w in weights)
    if not is_list or len(weights) != len(reward_funcs):
        needed = f"a list of {len(reward_funcs)} numbers, one for each of reward_funcs, or null for 1.0 each"
        raise UserError(f"reward_weights: {weights!r}; write {needed}")
    rewards = [_reward(entry, float(weight)) for entry, weight in zip(reward_funcs, weights, strict=True)]
    names = [*(reward.name for reward in rewards), "total"]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"reward_funcs: two columns of the logs are called {twice[0]!r}; rename or remove one")
    return rewards


ALLOWED = ", ".join([*BUILTINS, "module:function", "file.py:function"])


def _said(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _reward(entry: Any, weight: float) -> Reward:
    name, options = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, None)
    options = {} if options is None else options  # `- exact_answer:` in YAML
    if not isinstance(name, str) or not isinstance(options, dict):
        raise UserError(f"reward_funcs: {entry!r}; write a name, or one {{name: {{option: value}}}}")
    if ":" in name and options:
        raise UserError(f"reward_funcs: {name} takes no options here, only builtins do; set them in the function")
    if ":" in name:
        return Reward(name.rpartition(":")[2], weight, _load(name))
    if name not in BUILTINS:
        near = "".join(f"nearest: {known!r}; " for known in difflib.get_close_matches(name, list(BUILTINS), 1, 0.5))
        raise UserError(f"reward_funcs: unknown reward {name!r}; {near}allowed: {ALLOWED}")
    taken = inspect.signature(BUILTINS[name]).parameters
    kinds = ", ".join(f"{key} ({parameter.annotation.__name__})" for key, parameter in taken.items())
    for key, value in options.items():
        if key not in taken or type(value) is not taken[key].annotation:
            raise UserError(f"reward_funcs: {name} has no option {key}={value!r}; it takes: {kinds}")
    if name == "format" and not options:
        raise UserError(f"reward_funcs: format has no pattern; it takes: {kinds}")
    return Reward(name, weight, BUILTINS[name](**options), options)


def _load(path: str) -> Function:
    """The function of `module:function` or `file.py:function`, found from the current folder, too."""
    source, _, name = path.rpartition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()  # a file written a moment ago
        known = runpy.run_path(source) if source.endswith(".py") else vars(importlib.import_module(source))
    except (Exception, SystemExit) as error:
        raise UserError(f"reward_funcs: {path}: {source!r} cannot be imported ({_said(error)}); mend it") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    if not callable(known.get(name)):
        functions = ", ".join(key for key, value in known.items() if inspect.isfunction(value)) or "none"
        raise UserError(f"reward_funcs: {path}: {source!r} has no function {name!r}; it has: {functions}")
    return known[name]


# ---- the self-test

MAX_ROWS = 64
EPSILON = 1e-9  # rewards are sums of a few numbers near 1
STATE = types.SimpleNamespace(global_step=0, max_steps=1, epoch=0.0)
# what TRL hands over besides columns
CONTEXT: dict[str, Any] = {"trainer_state": STATE, "log_extra": lambda *_: None, "log_metric": lambda *_: None}


@dataclasses.dataclass
class SelfTest:
    """What completions made up by hand earn; means over rows, None as 0."""

    table: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # case -> {reward or "total": mean}
    num_none: dict[str, int] = dataclasses.field(default_factory=dict)  # reward -> right answers without an opinion
    num_rows: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """An aligned table, cases down and rewards across, then the warnings."""
        rows = [[case, *(f"{mean:.2f}" for mean in means.values())] for case, means in self.table.items()]
        rows = [["", *self.table["gold"]], *rows] if rows else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{case:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths[1:], strict=True))
            for case, *cells in rows
        ]
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]


def self_test(rewards: list[Reward], rows: Iterable[dict[str, Any]], template: str = "") -> SelfTest:
    """What right, wrong, empty and cheating completions earn on the first 64 rows.

    `rows` have a prompt, the answer column (`answer`, or a builtin's answer_column) and what else the rewards read.
    Raises UserError when a right answer earns no more than an empty one, on average or in more than one row of ten.
    """
    column = next((r.options["answer_column"] for r in rewards if "answer_column" in r.options), "answer")
    first = list(itertools.islice(rows, MAX_ROWS))
    tested = [row for row in first if row.get(column) is not None and str(row[column]).strip()]
    report = SelfTest(num_rows=len(tested))
    if len(tested) < len(first) or not first:
        found = f"{len(first) - len(tested)} of {len(first)} rows have no {column!r}"
        report.warnings = [f"self-test of reward_funcs: {found}; {'left out' if tested else 'it is not possible'}"]
    if not tested:
        return report
    cases = _completions(tested, [str(row[column]) for row in tested], template or _tags(rewards))
    values = {case: evaluate(rewards, tested, texts) for case, texts in cases.items()}  # case -> (rewards, N)
    weights = np.array([reward.weight for reward in rewards])
    totals = {case: weights @ np.nan_to_num(array) for case, array in values.items()}  # case -> (N,)
    for case, array in values.items():
        means = [*np.nan_to_num(array).mean(axis=1).tolist(), float(totals[case].mean())]
        report.table[case] = dict(zip([*(reward.name for reward in rewards), "total"], means, strict=True))
    report.num_none = {r.name: int(np.isnan(row).sum()) for r, row in zip(rewards, values["gold"], strict=True)}
    _judge(report, int((totals["gold"] > totals["empty"] + EPSILON).sum()))
    for i, reward in enumerate(rewards):
        if all(np.array_equal(array[i], values["gold"][i], equal_nan=True) for array in values.values()):
            report.warnings.append(f"{reward.name} is constant: nothing here shows that it tells completions apart")
    return report


def _judge(report: SelfTest, num_ahead: int) -> None:
    """Adds warnings; raises UserError when right answers are not ahead of empty ones."""
    gold, empty = report.table["gold"]["total"], report.table["empty"]["total"]
    silent = [f"{name} has no opinion (None) on {num} right answers" for name, num in report.num_none.items() if num]
    if gold <= empty + EPSILON or 10 * num_ahead < 9 * report.num_rows:
        found = f"gold {gold:.2f}, empty {empty:.2f} on average of {report.num_rows} rows"
        why = "; ".join([f"gold is ahead in {num_ahead} of them, 9 in 10 are needed", *silent])
        raise UserError(
            f"reward_funcs: cannot tell a right answer from an empty one ({found}); {why}; "
            "add a reward that reads the answer, such as exact_answer, or weigh it higher"
        )
    for case, means in report.table.items():
        if case != "gold" and means["total"] >= gold - EPSILON:
            found = f"{case} earns {means['total']:.2f}, the right answer {gold:.2f}: this can be hacked"
            report.warnings.append(f"{found}; use a stricter reward (exact_answer), or weigh the others lower")
    report.warnings += silent


def _tags(rewards: list[Reward]) -> str:
    """The tags that a pattern of `format` asks for: <think></think> of <think>.+</think>."""
    pattern = "".join(reward.options.get("pattern", "") for reward in rewards)
    return "".join(re.findall(r"</?\w+>", re.sub(r"\(\?P<\w+>|\\", "", pattern)))


def _completions(rows: list[dict[str, Any]], answers: list[str], template: str) -> dict[str, list[str]]:
    """case -> a completion per row; left out are cases that would be another: no template, no second answer."""
    prompts = [row["prompt"] for row in rows]
    asked = [text_of(p if isinstance(p, str) else [turn for turn in p if turn["role"] == "user"]) for p in prompts]
    distinct = list(dict.fromkeys(answer.strip() for answer in answers))  # at most MAX_ROWS
    others = [
        next((other for other in answers[i:] + answers[:i] if other.strip() != answer.strip()), answer[::-1])
        for i, answer in enumerate(answers)
    ]
    cases = {"gold": answers, "wrong": others, "empty": [""] * len(rows), "template only": [template] * len(rows)}
    cases |= {"answer spam": [" ".join([answer] * 20) for answer in answers], "prompt echo": asked}
    cases["all options"] = [" ".join(distinct)] * len(rows)
    same = {"template only": not template, "all options": len(distinct) == 1, "wrong": others == answers}
    return {case: texts for case, texts in cases.items() if not same.get(case)}


def evaluate(rewards: list[Reward], rows: list[dict[str, Any]], texts: list[str]) -> np.ndarray:
    """(rewards, N) values of these texts, each in the form of its row's prompt."""
    keys = {key for row in rows for key in row} - {"prompt", "completion", "completion_ids"}
    completions = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
    ids = [list(text.encode()) for text in texts]  # bytes, since there is no tokenizer here
    arguments = CONTEXT | {key: [row.get(key) for row in rows] for key in sorted(keys)}
    arguments |= {"prompts": [row["prompt"] for row in rows], "completions": completions, "completion_ids": ids}
    return np.stack([reward(**arguments) for reward in rewards])
