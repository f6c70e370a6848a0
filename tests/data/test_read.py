"""Every row of a broken file is read, or named with its line and what is wrong with it."""

import gzip
import json
import tracemalloc

import pytest

from llmkit.config import UserError
from llmkit.data.read import EVERY, plan_shares, read_share
from llmkit.data.sources import Source, _load_hub


@pytest.fixture(autouse=True)
def no_earlier_data_sets():
    _load_hub.cache_clear()


def rows(folder, source, share_bytes=1 << 20, limit=1000):
    shares, total = plan_shares(source, folder, share_bytes)
    return [row for share in shares for row in read_share(source, share, limit, total)]


def jsonl(folder, *lines):
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return rows(folder, Source(path="json", data_files="a.jsonl"))


@pytest.mark.parametrize(
    "line, problem, note",
    [
        (b"not json", "bad-json", "not json"),
        (b"[1, 2]", "bad-json", "[1, 2]"),
        (b'{"text": "cut', "bad-json", "cut"),
        (b'{"body": "x", "id": 3}', "missing-column", "no 'text' among body, id"),
        (b'{"text": null}', "null", "text=None"),
        (b'{"text": NaN}', "null", "text=nan"),
        (b'{"text": {"a": null}}', "not-text", "text={'a': None}"),
        (b'{"text": 7}', "not-text", "text=7"),
        (b'{"text": "caf\xe9"}', "bad-utf8", "byte 13 (0xe9)"),
        (rb'{"text": "x\ud800y"}', "lone-surrogate", "character 1"),
        (rb'{"text": "x\u0000y"}', "nul-byte", "character 1"),
        (b'{"text": "' + b"x" * 2000 + b'"}', "too-long", "2,013 bytes"),
    ],
)
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path, line, problem, note):
    good = b'{"text": "fine"}'
    before, bad, after = jsonl(tmp_path, good, line, good)
    assert (before.text, after.text) == ("fine", "fine") and not before.problem and not after.problem
    assert bad.where == "a.jsonl line 2" and bad.problem == problem and note in bad.note


def test_nested_columns_are_reached_and_their_nulls_named(tmp_path):
    lines = [b'{"doc": {"text": "in"}}', b'{"doc": {"text": null}}', b'{"doc": null}', b'{"doc.text": "flat"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = rows(tmp_path, Source(path="json", data_files="a.jsonl", columns=["doc.text"]))
    assert [(row.text, row.problem) for row in found] == [("in", None), ("", "null"), ("", "null"), ("flat", None)]


def test_a_benchmark_row_gives_all_of_its_texts(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "q", "n": 1, "choices": {"text": ["a", "b"]}}\n')
    (row,) = rows(tmp_path, Source(path="json", data_files="a.jsonl", columns=[EVERY]))
    assert row.text.split(EVERY) == ["q", "a", "b"]


def test_lines_have_all_three_endings(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\nthree\rfour\n\nlast")
    found = rows(tmp_path, Source(path="text", data_files="a.txt", sample_by="line"))
    assert [(row.text, row.where.split()[-1]) for row in found] == [
        ("one", "1"), ("two", "2"), ("three", "3"), ("four", "3"), ("", "4"), ("last", "5"),
    ]  # fmt: skip


def test_paragraphs_end_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n a\nb\r\n \t\n\nc\n" + b"y" * 2000 + b"\n\nd")
    found = rows(tmp_path, Source(path="text", data_files="a.txt", sample_by="paragraph"))
    assert [(row.text, row.problem, row.where) for row in found] == [
        (" a\nb", None, "a.txt line 2"),
        ("", "too-long", "a.txt line 6"),
        ("d", None, "a.txt line 9"),
    ]


@pytest.mark.parametrize("share_bytes", [7, 64, 1 << 20])
def test_shares_hold_every_line_once_and_know_its_number(tmp_path, share_bytes):
    lines = [f"line {i} " + "x" * (i * 7 % 40) for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    source = Source(path="text", data_files="a.txt", sample_by="line")
    shares, total = plan_shares(source, tmp_path, share_bytes)
    assert total == 50 and (len(shares) > 2) == (share_bytes < 1000)
    found = rows(tmp_path, source, share_bytes)
    assert [row.text for row in found] == lines
    assert [row.where for row in found] == [f"a.txt line {i + 1}" for i in range(50)]


@pytest.mark.parametrize(
    "split, expected", [("train[:40%]", range(20)), ("train[45:]", range(45, 50)), ("train[3:5]", (3, 4))]
)
def test_a_slice_counts_rows_over_all_files(tmp_path, split, expected):
    for name, numbers in (("a", range(30)), ("b", range(30, 50))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in numbers))
    source = Source(path="json", data_files=["a.jsonl", "b.jsonl"], split=split)
    assert [int(row.text) for row in rows(tmp_path, source, share_bytes=50)] == list(expected)


def test_a_slice_counts_lines_as_the_file_has_them(tmp_path):
    """A line with lone carriage returns gives several rows, and was counted as several by some of the reading."""
    (tmp_path / "a.txt").write_bytes(b"a\rb\rc\n" + b"".join(b"%d\n" % i for i in range(1, 10)))
    for split, expected in (("train[:20%]", "a b c 1"), ("train[1:3]", "1 2"), ("train[90%:]", "9")):
        source = Source(path="text", data_files="a.txt", sample_by="line", split=split)
        assert " ".join(row.text for row in rows(tmp_path, source, share_bytes=8)) == expected
        (tmp_path / "b.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
        source = Source(path="text", data_files="b.txt.gz", sample_by="line", split=split)
        assert " ".join(row.text for row in rows(tmp_path, source)) == expected


def test_slices_of_paragraphs_and_of_an_array_count_them(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nb\n\nc\n\nd\n")
    source = Source(path="text", data_files="a.txt", sample_by="paragraph", split="train[:50%]")
    assert [row.text for row in rows(tmp_path, source)] == ["a", "b"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": c} for c in "abcd"]))
    source = Source(path="json", data_files="a.json", split="train[50%:]")
    assert [row.text for row in rows(tmp_path, source)] == ["c", "d"]


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    found = rows(tmp_path, Source(path="text", data_files="**/x.txt"))
    assert [(row.where, row.text) for row in found] == [("a/x.txt", "a"), ("b/x.txt", "b")]


def test_a_slice_of_one_text_counts_characters(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    assert rows(tmp_path, Source(path="text", data_files="a.txt", split="train[90%:]"))[0].text == "9"


def test_a_gzip_that_was_cut_short_gives_what_it_holds_and_says_so(tmp_path):
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000)), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = rows(tmp_path, Source(path="json", data_files="a.jsonl.gz"))
    assert [row.text for row in found[:-1]] == [str(i) for i in range(len(found) - 1)] and len(found) > 1000
    assert found[-1].problem == "cut-short"


def test_csv_and_parquet_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"a\nb"\n2,caf\xe9\n3,"x"y\n')
    found = rows(tmp_path, Source(path="csv", data_files="a.csv"))
    assert [(row.text, row.problem) for row in found] == [("a\nb", None), ("caf\udce9", "bad-utf8"), ("", "bad-csv")]
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,one\n2,"x"y\n3,three\n4,"x"y\n5,five\n6,"open\n')
    found = rows(tmp_path, Source(path="csv", data_files="a.csv"))
    assert [(row.text, row.where) for row in found] == [
        ("one", "a.csv row 0"), ("", "a.csv line 3"), ("three", "a.csv row 2"), ("", "a.csv line 5"),
        ("five", "a.csv row 4"), ("", "a.csv line 7"),
    ]  # fmt: skip
    (tmp_path / "a.csv").write_bytes(b'id,"te"xt\n1,one\n2,two\n')
    found = rows(tmp_path, Source(path="csv", data_files="a.csv"))
    assert [row.problem for row in found] == ["bad-csv", "missing-column", "missing-column"]
    pq.write_table(pa.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), tmp_path / "a.parquet", row_group_size=2)
    source = Source(path="parquet", data_files="a.parquet")
    found = rows(tmp_path, source)
    assert [(row.where, row.text, row.problem) for row in found] == [
        ("a.parquet row 0", "a", None), ("a.parquet row 1", "", "null"), ("a.parquet row 2", "c", None),
    ]  # fmt: skip
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"b.parquet: cannot be read as parquet"):
        plan_shares(Source(path="parquet", data_files="b.parquet"), tmp_path)


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "jsonl.gz", "hub"])
def test_a_row_above_the_limit_is_named_and_its_neighbours_are_read(tmp_path, kind, monkeypatch):
    """1,000 bytes are allowed, of UTF-8 and not of the file: the array is longer, and é takes two."""
    texts = ["é" * 500, "é" * 501, "x" * 1000, "short"]
    table, name = [{"id": i, "text": text} for i, text in enumerate(texts)], f"a.{kind}"
    source = Source(path=kind.split(".")[0].replace("jsonl", "json"), data_files=name)
    if kind == "csv":
        (tmp_path / name).write_text("id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in table))
    elif kind == "parquet":
        import pandas

        pandas.DataFrame(table).to_parquet(tmp_path / name)
    elif kind == "json":
        (tmp_path / name).write_text(json.dumps(table))
    elif kind == "jsonl.gz":  # here the line counts
        table = [{"text": "y" * 900}, {"text": "y" * 1001}, {"text": "y" * 900}, {"text": "short"}]
        (tmp_path / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in table).encode()))
    else:
        import datasets

        rows_of_hub = datasets.Dataset.from_list(table)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: rows_of_hub)
        source = Source(path="some/where")
    found = rows(tmp_path, source)
    assert [row.problem for row in found] == [None, "too-long", None, None]
    assert found[1].note == ("1,014 bytes" if kind == "jsonl.gz" else "1,002 bytes") and found[1].text == ""


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_long_document_is_never_held(tmp_path, name):
    size = 30_000_000
    (tmp_path / name).write_bytes(gzip.compress(b"z" * size) if name.endswith("gz") else b"z" * size)
    shares, _ = plan_shares(source := Source(path="text", data_files=name), tmp_path)
    tracemalloc.start()
    (row,) = read_share(source, shares[0], 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (row.problem, row.note) == ("too-long", f"{size:,} bytes") and peak < 6e6


def test_a_data_set_of_the_hub_is_loaded_once(tmp_path, monkeypatch):
    import datasets

    loads = []
    rows_of_hub = datasets.Dataset.from_dict({"text": [str(i) for i in range(25)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: loads.append((args, keys)) or rows_of_hub)
    monkeypatch.setattr("llmkit.data.read.HUB_SHARE", 10)
    found = rows(tmp_path, Source(path="some/rows", data_files=["x.json"], fraction=0.5))
    assert [row.text for row in found] == [str(i) for i in range(25)] and found[24].where == "some/rows row 24"
    assert loads == [(("some/rows", None), {"data_files": ["x.json"], "split": "train", "streaming": False})]
    rows(tmp_path, Source(path="some/rows", data_files=["y.json"]))
    assert len(loads) == 2


def test_toyworld_keeps_its_log_probabilities(tmp_path):
    source = Source(path="builtin/toyworld", split="train[:6]", name="facts")
    found = rows(tmp_path, source)
    assert len(found) == 6 and all(row.log_prob < 0 for row in found)


def test_one_long_line_is_never_held(tmp_path):
    size = 30_000_000
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"short\n")
        for _ in range(30):
            file.write(b"z" * (size // 30))
        file.write(b"\nend\n")
    shares, _ = plan_shares(source := Source(path="text", data_files="a.txt", sample_by="line"), tmp_path)
    tracemalloc.start()
    found = [row for share in shares for row in read_share(source, share, 1000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(row.text, row.problem) for row in found] == [("short", None), ("", "too-long"), ("end", None)]
    assert found[1].note == f"{size + 1:,} bytes" and peak < 4e6
