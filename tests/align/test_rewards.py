"""Rewards: values by hand, one line for every mistake, and a self-test that finds what can be hacked."""

import math
import sys

import numpy as np
import pytest

from llmkit.align.rewards import Reward, get_rewards, self_test
from llmkit.config import UserError
from llmkit.data.toychat import rows


def values(entry, said, **columns):
    """Of one builtin on one row; None for no opinion."""
    columns = {key: [value] for key, value in columns.items()}
    value = get_rewards([entry])[0](prompts=["?"], completions=[said], completion_ids=[[1]], **columns)[0]
    return None if math.isnan(value) else value


def asked(*answers, **columns):
    return [{"prompt": f"Question {i}?", "answer": answer, **columns} for i, answer in enumerate(answers)]


def of_values(function):
    return [Reward("mine", 1.0, function)]


# ---- builtins


@pytest.mark.parametrize(
    ("said", "expected"), [("the red one", 1), ("  the red one\n", 1), ("the red one.", 0), ("The red one", 0), ("", 0)]
)
def test_exact_answer_is_the_answer_and_nothing_else(said, expected):
    assert values("exact_answer", said, answer="the red one ") == expected


def test_an_answer_that_is_a_number_or_missing():
    assert values("exact_answer", "72", answer=72) == 1
    assert values("exact_answer", "None", answer=None) is None


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        ("She has 1,234 now.", "1234", 1),
        ("1,234,567.89", "1234567.89", 1),
        ("1,2345", "12345", 0),  # no thousands: 1 and 2345
        ("It costs $3.50.", "3.5", 1),
        ("It costs \\$3.50", "$3.50", 1),
        ("-$7", "-7", 1),
        ("$-7", "-7", 1),
        ("−7", "-7", 1),
        ("-7", "7", 0),
        ("10-7", "7", 1),  # a difference, not a sign
        ("50%", "50", 1),
        ("3/4", "0.75", 1),
        ("0.75", "3/4", 1),
        ("1/3", "0.33", 0),
        ("\\frac{3}{4}", "3/4", 1),
        ("1/0", "0", 1),  # no fraction
        (".5", "0.5", 1),
        ("so it is...5", "5", 1),
        ("72 cm^2", "72", 1),  # an exponent is no number
        ("72, says GPT4", "72", 1),
        ("first 72, then 9", "72", 0),  # the last one counts
        ("#### 72\nas 48 + 24 shows", "72", 1),
        ("####\n**72**", "72", 1),
        ("#### 5\n#### 72 of 80", "72", 1),  # the last mark
        ("#### Step 2\nso 72", "72", 1),  # a heading
        ("\\boxed{5}, or \\boxed{\\frac{72}{1}} of 100", "72", 1),
        ("#### 72, not \\boxed{5}", "72", 1),
        ("9007199254740993", "9007199254740992", 0),  # equal as floats
        ("9" * 5000, "9", 0),  # more digits than int() reads
        ("none", "72", 0),
        ("", "72", 0),
        ("72", "48 / 2 = 24, and 48 + 24 = 72\n#### 72 of 100", 1),
        ("72", "24 then 72", 1),
        ("24", "none of 24 #### unknown", None),
        ("72", "no number", None),
    ],
)
def test_numeric_answer(said, answer, expected):
    assert values("numeric_answer", said, answer=answer) == expected


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        ("I say 72 or 5", "72", 1),
        ("1,000 or so", "1000", 1),
        ("172 or 720", "72", 0),
        ("7.2", "72", 0),
        ("1,2345", "2345", 1),
        ("the red one is here", "red one", 1),
        ("hundred ones", "red one", 0),
        ("is it c++?", "c++", 1),
        ("abc", "a.c", 0),
        ("anything", " ", None),
    ],
)
def test_contains_answer(said, answer, expected):
    assert values("contains_answer", said, answer=answer) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("<think>\n2 and 2\n</think>\n4", 1),
        ("  <think>so</think>4 ", 1),
        ("<think></think>4", 0),
        ("<think> \n</think>4", 0),
        ("well, <think>so</think>4", 0),
        ("4", 0),
    ],
)
def test_format_wants_a_thought_where_the_pattern_names_it(said, expected):
    assert values({"format": {"pattern": "<think>(?P<think>.*)</think>.*"}}, said) == expected


def test_format_without_that_group_takes_an_empty_thought():
    assert values({"format": {"pattern": "<think>.*</think>.*"}}, "<think></think>4") == 1
    assert values({"format": {"pattern": "(<think>(?P<think>.*)</think>)?4"}}, "4") == 1  # optional


def test_length_rises_or_falls_with_words():
    said = ["", "a b", "a b c d", "a b c d e"]
    assert [values({"length": {"max_words": 4}}, s) for s in said] == [0, 0.5, 1, 1]
    assert [values({"length": {"max_words": 4, "is_penalty": True}}, s) for s in said] == [1, 0.5, 0, 0]


def test_chats_are_read_by_their_last_message_and_texts_as_they_are():
    chat = [{"role": "assistant", "content": None}, {"role": "assistant", "content": "72"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "7"}, {"type": "text", "text": "2"}]}]
    reward = get_rewards(["exact_answer"])[0]
    got = reward(prompts=["?"] * 3, completions=[chat, parts, "72"], completion_ids=None, answer=["72"] * 3)
    assert got.tolist() == [1, 1, 1] and got.dtype == np.float64
    assert values("exact_answer", [{"role": "assistant", "content": None}], answer="None") == 0


def test_another_answer_column_and_the_line_when_it_is_missing():
    assert values({"exact_answer": {"answer_column": "gold"}}, "a", answer="b", gold="a") == 1
    with pytest.raises(UserError, match=r"reward exact_answer: no column 'answer' in the rows \(columns: gold\)"):
        get_rewards(["exact_answer"])[0](prompts=["?"], completions=["a"], trainer_state=object(), gold=["a"])


# ---- from recipe to rewards


@pytest.mark.parametrize(
    ("funcs", "message"),
    [
        ("exact_answer", "reward_funcs: 'exact_answer'; write a list of at least one of: exact_answer, numeric_"),
        ([], "reward_funcs: []; write a list"),
        (["exact_anwser"], "unknown reward 'exact_anwser'; nearest: 'exact_answer'; allowed: exact_answer, numeric_"),
        (["zzz"], "unknown reward 'zzz'; allowed: exact_answer"),
        ([3], "reward_funcs: 3; write a name"),
        ([{"length": {}, "format": {}}], "write a name, or one {name: {option: value}}"),
        ([{"length": 3}], "write a name, or one {name: {option: value}}"),
        ([{"length": {"words": 3}}], "length has no option words=3; it takes: max_words (int), is_penalty (bool)"),
        ([{"length": {"max_words": "3"}}], "length has no option max_words='3'; it takes: max_words (int)"),
        ([{"length": {"max_words": True}}], "length has no option max_words=True"),
        ([{"length": {"max_words": 0}}], "reward_funcs: length: max_words=0; allowed: 1 or more"),
        (["format"], "format has no pattern; it takes: pattern (str)"),
        ([{"format": {"pattern": "(a"}}], "reward_funcs: format: pattern='(a' is no regular expression (missing )"),
        (["length", "length"], "two columns of the logs are called 'length'"),
        (["no_such_module:f"], "'no_such_module' cannot be imported (ModuleNotFoundError: No module named 'no_such_mo"),
        (["no_such_file.py:f"], "'no_such_file.py' cannot be imported (FileNotFoundError: "),
        ([":f"], "'' cannot be imported (ValueError: Empty module name)"),
        (["textwrap:no_such"], "'textwrap' has no function 'no_such'; it has: wrap, fill"),
        (["math:pi"], "'math' has no function 'pi'; it has: none"),
        ([{"textwrap:fill": {"width": 3}}], "textwrap:fill takes no options here, only builtins do"),
    ],
)
def test_a_mistake_in_reward_funcs_is_one_line(funcs, message):
    with pytest.raises(UserError) as caught:
        get_rewards(funcs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [[1.0], [1, "2"], [1, math.inf], [1, True], 1.0, {}])
def test_weights_are_as_many_finite_numbers(weights):
    with pytest.raises(UserError, match=r"^reward_weights: .*; write a list of 2 numbers, one for each"):
        get_rewards(["exact_answer", "length"], weights)


def test_names_weights_and_options_of_a_recipe():
    rewards = get_rewards(["exact_answer", {"length": None}, {"format": {"pattern": "a"}}], [2, -0.5, 0])
    assert [(r.name, r.weight) for r in rewards] == [("exact_answer", 2.0), ("length", -0.5), ("format", 0.0)]
    assert [r.weight for r in get_rewards(["exact_answer", "length"])] == [1.0, 1.0]


MINE = """
from __future__ import annotations
import dataclasses
@dataclasses.dataclass
class Point:
    x: int
OFFSET = 1
def score(completions, **columns):
    return [len(text) + OFFSET for text in completions]
"""


def test_functions_of_ones_own_come_from_a_file_or_a_module_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.py").write_text(MINE)
    (tmp_path / "rewards_of_this_test.py").write_text(MINE + "total = score\n")
    before = list(sys.path)
    for path in ("folder/mine.py:score", "rewards_of_this_test:score"):
        (reward,) = get_rewards([path])
        assert reward.name == "score" and reward(prompts=["", ""], completions=["", "ab"]).tolist() == [1, 3]
    assert sys.path == before
    with pytest.raises(UserError, match="two columns of the logs are called 'score'"):
        get_rewards(["folder/mine.py:score", "rewards_of_this_test:score"])
    with pytest.raises(UserError, match="two columns of the logs are called 'total'"):
        get_rewards(["rewards_of_this_test:total"])


@pytest.mark.parametrize(
    ("source", "said"), [("def f(:", "SyntaxError: invalid"), ("raise SystemExit(3)", "SystemExit: 3")]
)
def test_a_file_that_does_not_run_is_one_line(tmp_path, source, said):
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(UserError, match=rf"cannot be imported \({said}"):
        get_rewards([f"{tmp_path}/broken.py:f"])
    assert str(tmp_path) not in sys.path


# ---- what a reward returns


def raises(**arguments):
    raise ValueError("first\nsecond")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "raises ValueError: first; mend the function"),
        (lambda **_: 1 // 0, "raises ZeroDivisionError: integer division or modulo by zero; mend"),
        (lambda **_: (1, 2), "returns tuple; expected a list of 2 numbers or None"),
        (lambda **_: [1, 2, 3], "returns 3 values; expected a list of 2 numbers or None"),
        (lambda **_: [1, "yes"], "value 1 is 'yes' (str); allowed: a number, true or false, None"),
        (lambda **_: [[1], 1], "value 0 is [1] (list); allowed: a number"),
        (lambda **_: [1, math.nan], "value 1 is nan (float); return None for 'no opinion'"),
        (lambda **_: [-math.inf, 1], "value 0 is -inf (float); return None for 'no opinion'"),
    ],
)
def test_what_a_reward_must_not_do_is_one_line_that_names_it(function, message):
    with pytest.raises(UserError) as caught:
        Reward("mine", 1.0, function)(prompts=["", ""], completions=["a", "b"])
    assert str(caught.value).startswith(f"reward mine: {message}") and "\n" not in str(caught.value)


def test_numbers_booleans_and_none_become_an_array():
    given = [1, 0.5, True, None, np.float32(2), np.int64(3), np.bool_(False)]
    got = Reward("mine", 1.0, lambda **_: given)(prompts=[""] * 7, completions=[""] * 7)
    np.testing.assert_array_equal(got, [1, 0.5, 1, math.nan, 2, 3, 0])
    assert got.dtype == np.float64


# ---- the self-test


def test_an_exact_reward_passes_on_chats_without_a_warning():
    report = self_test(get_rewards(["exact_answer"]), rows("prompts", "train", 0, 100))
    assert report.num_rows == 64 and report.warnings == [] and report.num_none == {"exact_answer": 0}
    assert {case: means["total"] for case, means in report.table.items()} == {
        "gold": 1, "wrong": 0, "empty": 0, "answer spam": 0, "prompt echo": 0, "all options": 0,
    }  # fmt: skip


def test_the_table_weighs_the_rewards_and_counts_none_as_nothing():
    tested = asked("1", "2 2 2", *["no", "number"] * 9)
    report = self_test(
        get_rewards(["exact_answer", "numeric_answer", {"length": {"max_words": 4}}], [2, 1, -0.4]), tested
    )
    gold = report.table["gold"]
    assert report.num_none == {"exact_answer": 0, "numeric_answer": 18, "length": 0}
    assert gold["numeric_answer"] == pytest.approx(2 / 20)
    assert gold["length"] == pytest.approx((19 * 0.25 + 0.75) / 20)
    assert gold["total"] == pytest.approx(2 * 1 + 2 / 20 - 0.4 * 5.5 / 20)
    assert "numeric_answer has no opinion (None) on 18 right answers" in report.warnings


def test_the_made_up_completions():
    seen = []

    def look(completions, answer, prompts, completion_ids, trainer_state, log_metric, **columns):
        log_metric("anything", trainer_state.global_step)
        assert [len(ids) for ids in completion_ids] == [len(text) for text in completions]
        assert sorted(columns) == ["kind", "log_extra"] and columns["kind"] == ["k"] * 4
        seen.append(completions)
        return [float(said == gold) for said, gold in zip(completions, answer, strict=True)]

    report = self_test(of_values(look), asked("a", "b", "c", "a", kind="k"), template="<t>")
    assert dict(zip(report.table, seen, strict=True)) == {
        "gold": ["a", "b", "c", "a"],
        "wrong": ["b", "c", "a", "b"],
        "empty": [""] * 4,
        "template only": ["<t>"] * 4,
        "answer spam": [" ".join(answer * 20) for answer in "abca"],
        "prompt echo": ["Question 0?", "Question 1?", "Question 2?", "Question 3?"],
        "all options": ["a b c"] * 4,
    }


def test_a_chat_gets_chats_and_echoes_its_last_user_turn():
    seen = []

    def look(completions, **columns):
        seen.append(completions)
        return [float(said[0]["content"] == "4") for said in completions]

    turns = [("user", "2 + 2?"), ("assistant", "5"), ("user", "Sure?"), ("assistant", "")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    report = self_test(of_values(look), [{"prompt": prompt, "answer": "4"}])
    at = list(report.table).index("prompt echo")
    assert seen[at] == [[{"role": "assistant", "content": "Sure?"}]]
    assert list(report.table) == ["gold", "empty", "answer spam", "prompt echo"]  # "4" backwards is no wrong answer


def test_one_answer_for_all_is_wrong_backwards():
    report = self_test(get_rewards(["exact_answer"]), asked("abc", "abc"))
    assert report.table["wrong"]["total"] == 0 and "all options" not in report.table


def test_the_template_of_a_format_are_its_tags():
    pattern = r"\<think>(?P<note>[^<]*)<\/think>\s*<answer>.*</answer>"
    rewards = get_rewards(["exact_answer", {"format": {"pattern": pattern}}])
    report = self_test(rewards, asked("a", "b"))
    assert report.table["template only"] == {"exact_answer": 0, "format": 1, "total": 1}
    assert report.warnings[0].startswith("template only earns 1.00, the right answer 1.00: this can be hacked; ")
    assert self_test(rewards, asked("a", "b"), template="<x>").table["template only"]["total"] == 0


def test_what_earns_as_much_as_a_right_answer_is_a_warning():
    report = self_test(get_rewards(["contains_answer", "length"], [1, 0.5]), asked("a", "b"))
    assert [warning.split(",")[0] for warning in report.warnings] == [
        "answer spam earns 1.16",
        "all options earns 1.02",
    ]


def test_gold_that_earns_no_more_than_nothing_is_refused():
    with pytest.raises(
        UserError, match=r"right answer from an empty one \(gold 0\.10, empty 0\.10 on average of 2 rows\)"
    ):
        self_test(of_values(lambda completions, **_: [0.1] * len(completions)), asked("a", "b"))
    with pytest.raises(UserError, match=r"gold 0\.98, empty 1\.00 .*or weigh it higher$"):
        self_test(get_rewards([{"length": {"is_penalty": True}}]), asked("a", "b"))
    with pytest.raises(UserError, match=r"gold -0\.10, empty 0\.00 .* gold is ahead in 9 of them"):
        self_test(
            of_values(lambda completions, **_: [{"": 0, "9": -10}.get(c, 1) for c in completions]), asked(*range(10))
        )


def test_the_noise_of_sums_tells_nothing():
    first = Reward("first", 1.0, lambda completions, **_: [0.1 if said else 0.3 for said in completions])
    second = Reward("second", 1.0, lambda completions, **_: [0.2 if said else 0.0 for said in completions])
    assert 0.1 + 0.2 > 0.3
    with pytest.raises(UserError, match=r"gold 0\.30, empty 0\.30"):
        self_test([first, second], asked("a", "b"))


@pytest.mark.parametrize(("num_silent", "is_refused"), [(1, False), (2, True)])
def test_gold_must_be_ahead_in_nine_rows_of_ten(num_silent, is_refused):
    tested = asked(*["no number"] * num_silent, *"12345678"[: 8 - num_silent], "9", "10")
    rewards = get_rewards(["numeric_answer"])
    if not is_refused:
        assert (
            len(tested) == 10
            and "numeric_answer has no opinion (None) on 1 right answers" in self_test(rewards, tested).warnings
        )
        return
    with pytest.raises(UserError, match=r"gold is ahead in 8 of them, 9 in 10 are needed; numeric_answer has no opin"):
        self_test(rewards, tested)


def test_a_reward_that_gives_every_case_the_same_is_a_warning():
    by_prompt = Reward("by_prompt", 1.0, lambda prompts, **_: [float(len(prompt)) for prompt in prompts])
    never = Reward("never", 1.0, lambda prompts, **_: [None] * len(prompts))
    report = self_test([*get_rewards(["exact_answer"]), by_prompt, never], asked("a", "b"))
    assert [w.split(":")[0] for w in report.warnings if "constant" in w] == [
        "by_prompt is constant",
        "never is constant",
    ]


def test_rows_without_an_answer_are_counted_and_no_answer_at_all_means_no_self_test():
    rewards = get_rewards(["exact_answer"])
    report = self_test(rewards, [*asked("a", None, " ", "b"), {"prompt": "?"}])
    assert report.num_rows == 2 and report.warnings == [
        "self-test of reward_funcs: 3 of 5 rows have no 'answer'; left out"
    ]
    for none in ([], [{"prompt": "?"}]):
        report = self_test(rewards, none)
        assert report.num_rows == 0 and report.table == {} and "it is not possible" in report.warnings[0]
        assert report.lines() == [f"warning: {report.warnings[0]}"]


def test_the_answer_column_of_a_builtin_is_that_of_the_self_test():
    tested = [{"prompt": "?", "gold": text} for text in "ab"]
    assert self_test(get_rewards([{"exact_answer": {"answer_column": "gold"}}]), tested).num_rows == 2


def test_the_table_is_aligned():
    lines = self_test(get_rewards(["contains_answer", "length"], [1, 100]), asked("a b", "c d")).lines()
    assert lines[:3] == [
        "             contains_answer  length  total",
        "gold                    1.00    0.03   4.12",
        "wrong                   0.00    0.03   3.12",
    ]
    assert lines[-1].startswith("warning: ")
