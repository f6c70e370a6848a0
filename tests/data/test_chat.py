"""Rows to tune on: every usual format becomes TRL's columns; what teaches nothing is named and counted."""

import json

import pytest

from llmkit.check.columns import problem_of, with_trl_columns
from llmkit.config import UserError
from llmkit.data.chat import Bad, load_rows
from llmkit.data.sources import Source

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CHAT = [USER, ANSWER]


def texts(row):
    return [(m["role"], m["content"]) for m in row["messages"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n\n1 2"), ("assistant", "3")]),
        ({"instruction": "Add", "input": "", "output": "3"}, [("user", "Add"), ("assistant", "3")]),
        (
            {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "s"},
            [("system", "s"), ("user", "Hi"), ("assistant", "Ho")],
        ),
        ({"conversations": [{"role": "user", "content": "Hi"}]}, [("user", "Hi")]),
        ({"prompt": "q", "response": "a"}, [("user", "q"), ("assistant", "a")]),
    ],
)
def test_formats_become_messages(given, expected):
    row = with_trl_columns(given)
    assert texts(row) == expected
    assert all(set(m) == {"role", "content"} for m in row["messages"])


@pytest.mark.parametrize("row", [{"prompt": "q", "completion": "a"}, {"text": "t"}, {"messages": CHAT, "tools": "[]"}])
def test_rows_in_trls_columns_stay(row):
    assert with_trl_columns(row) == row


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, ANSWER, ANSWER]}, "two assistant turns in a row"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty answer"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "assistant turn: content is missing"),
        ({"messages": [USER, {"role": "assistant", "content": 7}]}, "assistant turn: content is int"),
        ({"messages": [{"content": "x"}]}, "a turn without role"),
        ({"messages": ["x"]}, "a turn without role"),
        ({"messages": "x"}, "messages is str: not a list"),
        ({"prompt": "q", "completion": ""}, "empty answer"),
        ({"prompt": "q", "completion": 7}, "prompt is str, completion int: not text"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant turn"),
        ({"text": " "}, "empty text"),
        ({"text": None}, "text is missing"),
        ({"messages": CHAT}, None),
        ({"messages": [*CHAT, USER]}, None),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}, None),
        ({"prompt": "q", "completion": "a"}, None),
        ({"prompt": [USER], "completion": [ANSWER]}, None),
        ({"text": "t"}, None),
    ],
)
def test_what_teaches_nothing(row, problem):
    assert problem_of(row) == problem


def write(path, rows):
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text)
    return Source(path="json", data_files=path.name)


def test_roles_of_messages_are_those_of_templates(tmp_path):
    """Only here: the checks show what a template makes of the role that is written."""
    turns = [{"role": "human", "content": "Hi", "tool_calls": None}, {"role": "gpt", "content": "Ho"}]
    assert next(load_rows(write(tmp_path / "rows.jsonl", [{"messages": turns}]), tmp_path))["messages"] == CHAT
    assert with_trl_columns({"messages": turns}) == {"messages": turns}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_are_numbered_from_1_and_bad_ones_set_apart(tmp_path, name):
    source = write(tmp_path / name, [{"messages": CHAT}, {"messages": [USER]}, {"messages": CHAT}])
    assert list(load_rows(source, tmp_path)) == [
        {"messages": CHAT, "row": 1},
        Bad(2, "no assistant turn"),
        {"messages": CHAT, "row": 3},
    ]


def test_columns_rename_and_a_slice_is_read(tmp_path):
    write(tmp_path / "rows.jsonl", [{"frage": str(i), "antwort": "a", "id": i} for i in range(4)])
    source = Source(
        path="json", data_files="rows.jsonl", split="train[2:]", columns={"frage": "question", "antwort": "answer"}
    )
    assert [texts(row)[0][1] for row in load_rows(source, tmp_path)] == ["2", "3"]


def test_texts_of_a_file_are_rows(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    rows = list(load_rows(Source(path="text", data_files="a.txt", sample_by="line"), tmp_path))
    assert [row["text"] for row in rows if not isinstance(row, Bad)] == ["one", "two"]
    assert [row for row in rows if isinstance(row, Bad)] == [Bad(2, "empty text")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a": "x", "b": "y"}], "no format that is known among the columns a, b"),
        ([{"prompt": "p", "chosen": "x", "rejected": "y"}], "preference pairs"),
    ],
)
def test_an_unknown_format_is_one_line(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        list(load_rows(write(tmp_path / "rows.jsonl", rows), tmp_path))


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: not JSON"):
        list(load_rows(Source(path="json", data_files="rows.jsonl"), tmp_path))
    with pytest.raises(UserError, match="no 'x' among text"):
        (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
        list(load_rows(Source(path="json", data_files="rows.jsonl", columns={"x": "text"}), tmp_path))


def test_toyworld_rows_and_its_mistakes(tmp_path):
    source = Source(path="builtin/toyworld", name="instructions", split="train[10:13]")
    rows = list(load_rows(source, tmp_path))
    assert len(rows) == 3 and all(row["messages"][-1]["role"] == "assistant" for row in rows)
    for wrong, said in (
        ({"name": "stories"}, "name='stories'; allowed: instructions"),
        ({"split": "train"}, "how many"),
    ):
        given = {"name": "instructions", "split": "train[:9]"} | wrong
        with pytest.raises(UserError, match=said):
            list(load_rows(Source(path="builtin/toyworld", **given), tmp_path))
