"""Preferences and prompts: every usual format becomes TRL's columns, and what is of no use is named, row by row."""

import json
import os
from pathlib import Path

import pytest

from llmkit.config import UserError
from llmkit.data import preferences
from llmkit.data.chat import LABELLED, PAIRS, PROMPTS, RANKED, Bad, load_rows
from llmkit.data.sources import Source

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


S, Q, GOOD, BAD = system("s"), user("q"), says("good"), says("bad")
EARLIER = [user("hi"), says("ho")]
TURNED = {"chosen": [GOOD], "rejected": [BAD]}
TEXTS = {"chosen": "good", "rejected": "bad"}
PAIR = {"prompt": "q", **TEXTS}
HUMAN = {"from": "human", "value": "q"}
GPT = {"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "7"}


def made(kind, row):
    return list(preferences.KINDS[kind][0](row))


# ---- what a row becomes


@pytest.mark.parametrize(
    ("given", "prompt", "answers"),
    [
        (PAIR, "q", TEXTS),
        ({"prompt": [Q], **TURNED}, [Q], TURNED),
        ({"prompt": [*EARLIER, Q], **TURNED}, [*EARLIER, Q], TURNED),
        ({"prompt": [Q], **TEXTS}, [Q], TURNED),
        ({"prompt": "q", **TURNED}, [Q], TURNED),
        ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, [Q], TURNED),
        ({"messages": [Q], **TURNED}, [Q], TURNED),
        ({"conversations": [HUMAN], **GPT}, [Q], TURNED),
        ({"conversations": [HUMAN], **GPT, "system": "s"}, [S, Q], TURNED),
        ({"conversations": [HUMAN], **TEXTS}, [Q], TURNED),
        ({"chosen": [Q, GOOD], "rejected": [Q, BAD]}, [Q], TURNED),
        ({"chosen": [S, *EARLIER, Q, GOOD], "rejected": [S, *EARLIER, Q, BAD]}, [S, *EARLIER, Q], TURNED),
        ({"prompt": "q", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, [Q], TURNED),
        ({"chosen": [Q, GOOD], "rejected": [Q, BAD], "system": "s"}, [S, Q], TURNED),
        ({"instruction": "q", **TEXTS}, [Q], TURNED),
        ({"instruction": "q", "input": "i", **TEXTS}, [user("q\n\ni")], TURNED),
        ({"instruction": "q", "input": "", "system": "s", **TEXTS}, [S, Q], TURNED),
        ({"instruction": "q", "history": [["hi", "ho"]], "system": "s", **TEXTS}, [S, *EARLIER, Q], TURNED),
        ({"question": "q", **TEXTS}, [Q], TURNED),
        ({"query": "q", **TEXTS}, [Q], TURNED),
        ({"prompt": "q", "system": "s", **TEXTS}, [S, Q], TURNED),
        ({"prompt": [Q], "system": "s", **TURNED}, [S, Q], TURNED),
        (
            {"prompt": [Q], "chosen": [CALL, RESULT, GOOD], "rejected": [BAD]},
            [Q],
            {"chosen": [CALL, RESULT, GOOD], "rejected": [BAD]},
        ),
    ],
)
def test_every_format_of_pairs(given, prompt, answers):
    """A system prompt beside a text, and alpaca's history, were once left out in silence."""
    assert made(PAIRS, given) == [{"prompt": prompt, **answers}]


def test_pairs_keep_what_templates_and_losses_read_and_nothing_else():
    kept = {"tools": "[]", "chat_template_kwargs": {"a": 1}, "kind": "k", "margin": 0.5}
    assert made(PAIRS, {**PAIR, **kept, "score_chosen": 3, "id": 7}) == [{**PAIR, **kept}]
    assert made(PAIRS, {**PAIR, "tools": None}) == [PAIR]


@pytest.mark.parametrize(
    ("given", "prompt", "completion", "label"),
    [
        ({"prompt": "q", "completion": "good", "label": True}, "q", "good", True),
        ({"prompt": "q", "completion": "bad", "label": False}, "q", "bad", False),
        ({"prompt": "q", "completion": "good", "label": 1}, "q", "good", True),
        ({"prompt": "q", "completion": "bad", "label": 0}, "q", "bad", False),
        ({"prompt": [Q], "completion": [GOOD], "label": True}, [Q], [GOOD], True),
        ({"prompt": [Q], "completion": "good", "label": True}, [Q], [GOOD], True),
        ({"prompt": "q", "completion": [GOOD], "label": True}, [Q], [GOOD], True),
        ({"completion": [*EARLIER, Q, GOOD], "label": True}, [*EARLIER, Q], [GOOD], True),
        ({"instruction": "q", "input": "i", "completion": "bad", "label": 0}, [user("q\n\ni")], [BAD], False),
        ({"messages": [Q, GOOD], "label": True}, [Q], [GOOD], True),
        ({"messages": [*EARLIER, Q, BAD], "label": False}, [*EARLIER, Q], [BAD], False),
        ({"messages": [HUMAN, GPT["chosen"]], "label": True}, [Q], [GOOD], True),
        ({"messages": [Q, GOOD], "label": True, "system": "s"}, [S, Q], [GOOD], True),
    ],
)
def test_every_format_of_labelled_answers(given, prompt, completion, label):
    (row,) = made(LABELLED, given)
    assert row == {"prompt": prompt, "completion": completion, "label": label}
    assert type(row["label"]) is bool


def test_a_pair_makes_a_good_row_and_a_bad_one():
    assert made(LABELLED, {**PAIR, "margin": 2, "kind": "k"}) == [
        {"prompt": "q", "kind": "k", "completion": "good", "label": True},
        {"prompt": "q", "kind": "k", "completion": "bad", "label": False},
    ]


@pytest.mark.parametrize(
    ("given", "prompt", "completions", "scores"),
    [
        ({"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}, "q", ["a", "b", "c"], [1, 3, 2]),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [0.5, 0.5000001]}, "q", ["a", "b"], [0.5, 0.5000001]),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [True, False]}, "q", ["a", "b"], [1, 0]),
        ({"prompt": [Q], "completions": ["good", "bad"], "scores": [1, 0]}, [Q], [[GOOD], [BAD]], [1, 0]),
        ({"prompt": [Q], "completions": [[GOOD], [BAD]], "scores": [1, 0]}, [Q], [[GOOD], [BAD]], [1, 0]),
        ({"prompt": [Q], "completions": [GOOD, BAD], "scores": [1, 0]}, [Q], [[GOOD], [BAD]], [1, 0]),
        ({"completions": [[Q, GOOD], [Q, BAD]], "scores": [-1, 0]}, [Q], [[GOOD], [BAD]], [-1, 0]),
        ({"instruction": "q", "responses": ["good", "bad"], "scores": [1, 0]}, [Q], [[GOOD], [BAD]], [1, 0]),
        (PAIR, "q", ["good", "bad"], [1, 0]),
        ({"conversations": [HUMAN], **GPT}, [Q], [[GOOD], [BAD]], [1, 0]),
    ],
)
def test_every_format_of_ranked_answers(given, prompt, completions, scores):
    (row,) = made(RANKED, given)
    assert row == {"prompt": prompt, "completions": completions, "scores": scores}
    assert all(type(score) is float for score in row["scores"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prompt": "q"}, {"prompt": "q"}),
        ({"prompt": "q", "system": "s"}, {"prompt": [S, Q]}),
        ({"prompt": [Q], "answer": "a", "id": 7}, {"prompt": [Q], "answer": "a", "id": 7}),
        ({"question": "q", "answer": "a"}, {"prompt": [Q], "answer": "a"}),
        ({"query": "q", "hard": True}, {"prompt": [Q], "hard": True}),
        ({"instruction": "q", "input": "i", "output": "o"}, {"prompt": [user("q\n\ni")], "output": "o"}),
        ({"instruction": "q", "history": [["hi", "ho"]]}, {"prompt": [*EARLIER, Q]}),
        ({"question": "q", "history": "of Rome"}, {"prompt": [Q], "history": "of Rome"}),
        ({"messages": [Q, GOOD]}, {"prompt": [Q], "answer": "good"}),
        ({"messages": [*EARLIER, Q, GOOD], "n": 1}, {"prompt": [*EARLIER, Q], "answer": "good", "n": 1}),
        ({"messages": [Q, GOOD], "answer": "7"}, {"prompt": [Q], "answer": "7"}),
        ({"messages": [Q]}, {"prompt": [Q]}),
        ({"conversations": [HUMAN, GPT["chosen"]], "system": "s"}, {"prompt": [S, Q], "answer": "good"}),
        ({"prompt": "q", "question": "x", "input": "y"}, {"prompt": "q", "question": "x", "input": "y"}),
    ],
)
def test_every_format_of_prompts_keeps_its_other_columns(given, expected):
    assert made(PROMPTS, given) == [expected]


def test_the_answer_that_a_row_makes_likely():
    assert preferences.as_answers(PAIR) == {"prompt": "q", "completion": "good"}
    ranked = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1.0, 3.0, 3.0]}
    assert preferences.as_answers(ranked) == {"prompt": "q", "completion": "b"}
    labelled = {"prompt": "q", "completion": "bad", "label": False}
    assert preferences.as_answers(labelled) == labelled


# ---- what is of no use


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**PAIR, "rejected": " good\n"}, "chosen = rejected"),
        ({"prompt": [Q], "chosen": [GOOD], "rejected": [GOOD]}, "chosen = rejected"),
        ({**PAIR, "chosen": ""}, "empty answer"),
        ({**PAIR, "rejected": " \n"}, "empty answer"),
        ({"prompt": [Q], "chosen": [GOOD], "rejected": [says("")]}, "empty answer"),
        ({"prompt": [Q], "chosen": [], "rejected": [BAD]}, "empty answer"),
        ({"prompt": "q", "rejected": "bad"}, "an answer is missing"),
        ({"prompt": [Q], "chosen": [GOOD]}, "an answer is missing"),
        ({"prompt": "q", "chosen": 7, "rejected": "bad"}, "an answer is int: not text or turns"),
        ({"prompt": "q", "chosen": "good", "rejected": [BAD]}, "an answer is text, another one turns"),
        (TEXTS, "no prompt"),
        (TURNED, "no prompt"),
        ({**PAIR, "prompt": " "}, "no prompt"),
        ({**PAIR, "prompt": 7}, "no prompt"),
        ({"chosen": [Q, GOOD], "rejected": [user("other"), BAD]}, "no prompt"),
        ({"prompt": [user(" ")], **TURNED}, "the prompt asks nothing"),
        ({"prompt": [Q, GOOD], **TURNED}, "the prompt ends with an assistant turn"),
        ({"prompt": [Q, CALL], "chosen": [GOOD], "rejected": [BAD]}, "the prompt ends with an assistant turn"),
        ({"chosen": [Q, GOOD, user("x"), GOOD], "rejected": [Q, BAD]}, "a user turn in an answer"),
        ({"prompt": [Q], "chosen": [GOOD, Q, GOOD], "rejected": [BAD]}, "a user turn in an answer"),
        ({"prompt": [Q], "chosen": [GOOD, GOOD], "rejected": [BAD]}, "two assistant turns in a row"),
        ({"prompt": [Q], "chosen": [RESULT], "rejected": [BAD]}, "no assistant turn"),
        ({"prompt": "q", "chosen": ["good"], "rejected": ["bad"]}, "a turn without role"),
        ({"prompt": "q", "chosen": ["good", "x"], "rejected": ["bad", "x"]}, "a turn without role"),
        ({"prompt": ["q"], **TEXTS}, "a turn without role"),
        ({"prompt": [user(None)], **TURNED}, "the prompt asks nothing"),
        ({"prompt": [user(7)], **TURNED}, "user turn: content is int"),
        ({"prompt": "q", "system": 7, **TEXTS}, "system turn: content is int"),
        ({"instruction": "q", "history": ["hi"], **TEXTS}, "history is no list of [question, answer]"),
    ],
)
def test_a_pair_of_no_use(row, problem):
    """Lists of texts where turns belong once ended in a traceback."""
    for kind in (PAIRS, LABELLED, RANKED):
        with pytest.raises(preferences.Useless) as error:
            made(kind, row)
        assert str(error.value) == problem


def ranked(**given):
    return {"prompt": "q", "completions": ["a", "b"], "scores": [1, 0]} | given


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (ranked(completions=["a"], scores=[1]), "fewer than two completions"),
        (ranked(completions="ab"), "fewer than two completions"),
        ({"prompt": "q", "scores": [1, 0]}, "fewer than two completions"),
        ({"prompt": "q", "completions": ["a", "b"]}, "scores missing"),
        (ranked(scores=[1]), "1 scores for 2 completions"),
        (ranked(scores=[1, 0, 2]), "3 scores for 2 completions"),
        (ranked(scores=[2, 2.0]), "scores all equal"),
        (ranked(scores=[1, float("nan")]), "a score is no number"),
        (ranked(scores=[float("inf"), 1]), "a score is no number"),
        (ranked(scores=["1", "0"]), "a score is no number"),
        (ranked(scores=[1, None]), "a score is no number"),
        (ranked(completions=["a", " "]), "empty answer"),
        (ranked(completions=["a", None]), "an answer is missing"),
        (ranked(prompt=""), "no prompt"),
        (ranked(prompt=[Q, GOOD]), "the prompt ends with an assistant turn"),
        (ranked(prompt=[Q], completions=[[GOOD, Q, GOOD], [BAD]]), "a user turn in an answer"),
    ],
)
def test_ranked_answers_of_no_use(row, problem):
    with pytest.raises(preferences.Useless) as error:
        made(RANKED, row)
    assert str(error.value) == problem


def labelled(**given):
    return {"prompt": "q", "completion": "a", "label": True} | given


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (labelled(label="true"), "label is 'true': not true or false"),
        (labelled(label=2), "label is 2: not true or false"),
        (labelled(label=0.5), "label is 0.5: not true or false"),
        ({"prompt": "q", "completion": "a"}, "label is None: not true or false"),
        (labelled(completion=""), "empty answer"),
        ({"prompt": "q", "label": True}, "an answer is missing"),
        ({"completion": "a", "label": True}, "no prompt"),
        ({"messages": [GOOD], "label": True}, "no prompt"),
        ({"messages": [], "label": True}, "no prompt"),
        ({"messages": [S, Q], "label": True}, "no assistant turn"),
        ({"messages": [Q, GOOD, BAD], "label": True}, "the prompt ends with an assistant turn"),
        ({"messages": [Q, says(" ")], "label": True}, "empty answer"),
        ({"messages": ["q", "a"], "label": True}, "a turn without role"),
    ],
)
def test_labelled_answers_of_no_use(row, problem):
    with pytest.raises(preferences.Useless) as error:
        made(LABELLED, row)
    assert str(error.value) == problem


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": " "}, "no prompt"),
        ({"answer": "a"}, "no prompt"),
        ({"messages": [GOOD]}, "no prompt"),
        ({"messages": [Q, GOOD, BAD]}, "the prompt ends with an assistant turn"),
        ({"prompt": [user("")]}, "the prompt asks nothing"),
        ({"prompt": [user(7)]}, "user turn: content is int"),
        ({"prompt": ["q"]}, "a turn without role"),
    ],
)
def test_prompts_of_no_use(row, problem):
    with pytest.raises(preferences.Useless) as error:
        made(PROMPTS, row)
    assert str(error.value) == problem


# ---- files


def write(folder, rows):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Source(path="json", data_files="rows.jsonl")


def test_rows_of_a_file_are_numbered_and_bad_ones_set_apart(tmp_path):
    source = write(tmp_path, [PAIR, {**PAIR, "chosen": "bad"}, {**PAIR, "prompt": ""}, PAIR])
    bad = [Bad(2, "chosen = rejected"), Bad(3, "no prompt")]
    assert list(load_rows(source, tmp_path, PAIRS)) == [{**PAIR, "row": 1}, *bad, {**PAIR, "row": 4}]
    two = [{"prompt": "q", "completion": text, "label": text == "good"} for text in ("good", "bad")]
    assert list(load_rows(source, tmp_path, LABELLED)) == [
        *({**row, "row": 1} for row in two), *bad, *({**row, "row": 4} for row in two)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "good", "lacks"),
    [
        (PAIRS, PAIR, "chosen"),
        (LABELLED, PAIR, "rejected"),
        (LABELLED, labelled(), "completion"),
        (RANKED, PAIR, "chosen"),
    ],
)
def test_a_first_row_that_lacks_an_answer_is_a_bad_row_like_any_other(tmp_path, kind, good, lacks):
    """It was once taken for a file of another format."""
    source = write(tmp_path, [{**good, lacks: None}, good])
    first, *rest = load_rows(source, tmp_path, kind)
    assert first == Bad(1, "an answer is missing") and rest and not any(isinstance(row, Bad) for row in rest)


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        (PAIRS, {"question": "q", "answer": "a"}, "chosen and rejected, with prompt or the turns before them"),
        (PAIRS, labelled(), "chosen and rejected, with prompt or the turns before them"),
        (LABELLED, {"messages": [Q, GOOD]}, "completion (or messages) and label, or chosen and rejected"),
        (LABELLED, {"label": True, "text": "t"}, "completion (or messages) and label, or chosen and rejected"),
        (RANKED, labelled(), "prompt, completions and scores, or chosen and rejected"),
        (PROMPTS, {"text": "t", "answer": "a"}, "prompt, messages, question or instruction"),
    ],
)
def test_a_file_of_another_kind_is_one_line(tmp_path, kind, row, expected):
    source = write(tmp_path, [row])
    with pytest.raises(UserError) as error:
        list(load_rows(source, tmp_path, kind))
    columns = ", ".join(sorted(row))
    assert str(error.value) == (
        f"json rows.jsonl train: columns {columns}; expected {expected}; `columns: {{yours: ours}}` renames"
    )


def test_columns_rename(tmp_path):
    write(tmp_path, [{"ask": "q", "win": "good", "lose": "bad"}])
    names = {"ask": "prompt", "win": "chosen", "lose": "rejected"}
    source = Source(path="json", data_files="rows.jsonl", columns=names)
    assert list(load_rows(source, tmp_path, PAIRS)) == [{**PAIR, "row": 1}]


@pytest.mark.parametrize("kind", ["answers", *preferences.KINDS])
@pytest.mark.parametrize(
    "name, text, said",
    [
        ("rows.jsonl", "", "nothing in it; point at a file or split that has rows"),
        ("rows.json", "[]", 'cannot be read (Instruction "train" corresponds to no data!); expected rows of one kind'),
    ],
)
def test_an_empty_file_is_one_line(tmp_path, kind, name, text, said):
    """`datasets` raises a StopIteration without a word, which once became a traceback."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        list(load_rows(Source(path="json", data_files=name), tmp_path, kind))
    assert str(error.value) == f"json {name} train: {said}"


@pytest.mark.parametrize(("kind", "allowed"), [(kind, names) for kind, (_, names, _) in preferences.KINDS.items()])
def test_toyworld_has_rows_of_every_kind(tmp_path, kind, allowed):
    for name in allowed:
        rows = list(load_rows(Source(path="builtin/toyworld", name=name, split="train[:40]"), tmp_path, kind))
        assert not any(isinstance(row, Bad) for row in rows)
        assert [row["row"] for row in rows][:: 2 if kind == LABELLED else 1] == list(range(1, 41))
    with pytest.raises(UserError, match=rf"name='instructions'; allowed: {', '.join(allowed)}$"):
        list(load_rows(Source(path="builtin/toyworld", name="instructions", split="train[:4]"), tmp_path, kind))


# ---- real data


def real(name, kind):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA}/{name} is not there")
    raw = (DATA / name).read_text(encoding="utf-8")
    given = json.loads(raw) if name.endswith(".json") else [json.loads(line) for line in raw.splitlines()]
    return given, list(load_rows(Source(path="json", data_files=name), DATA, kind))


@pytest.mark.real
@pytest.mark.parametrize(("kind", "per_row"), [(PAIRS, 1), (LABELLED, 2), (RANKED, 1)])
def test_all_299_real_pairs_are_good(kind, per_row):
    given, rows = real("dpo_en_demo.json", kind)
    assert len(given) == 299 and len(rows) == 299 * per_row and not any(isinstance(row, Bad) for row in rows)
    k = next(k for k, row in enumerate(given) if len(row["conversations"]) == 3)
    asked, chosen, rejected = given[k]["conversations"], given[k]["chosen"]["value"], given[k]["rejected"]["value"]
    prompt = [user(asked[0]["value"]), says(asked[1]["value"]), user(asked[2]["value"])]
    first = {"prompt": prompt, "row": k + 1}
    assert (
        rows[k * per_row : (k + 1) * per_row]
        == {
            PAIRS: [first | {"chosen": [says(chosen)], "rejected": [says(rejected)]}],
            LABELLED: [first | {"completion": [says(text)], "label": text == chosen} for text in (chosen, rejected)],
            RANKED: [first | {"completions": [[says(chosen)], [says(rejected)]], "scores": [1.0, 0.0]}],
        }[kind]
    )


@pytest.mark.real
def test_all_300_real_labelled_answers_are_good():
    given, rows = real("kto_en_demo.json", LABELLED)
    assert len(given) == len(rows) == 300 and not any(isinstance(row, Bad) for row in rows)
    assert [row["label"] for row in rows] == [row["label"] for row in given]
    turns = given[1]["messages"]
    assert len(turns) == 6
    assert rows[1] == {"prompt": turns[:5], "completion": turns[5:], "label": given[1]["label"], "row": 2}


@pytest.mark.real
def test_all_7473_real_questions_are_prompts():
    given, rows = real("gsm8k_train.jsonl", PROMPTS)
    assert len(given) == len(rows) == 7473 and not any(isinstance(row, Bad) for row in rows)
    assert rows[0]["answer"].endswith("#### 72")
    assert rows[41] == {"prompt": [user(given[41]["question"])], "answer": given[41]["answer"], "row": 42}
