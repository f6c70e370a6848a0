"""Documents come out as they lie in the file, and every wrong entry is one line that says where."""

import json

import datasets
import pandas
import pytest

from llmkit.config import UserError
from llmkit.data.sources import Source, documents, parse_sources, source_fingerprint

TEXT = "one  \r\ntwo\n\n \nthree\u2028é\x0c\ttail\n\n\nfour\r\n"
TEXTS = ["a\r\nb \n", "", "  é\n", "NFD e\u0301 👩‍👩‍👧 \u05d0\u05d1", '"quoted", comma']


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(folder, **entry):
    return [doc.text for doc in documents(parse_sources([entry], "datasets")[0], folder)]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(TEXT.encode())
    return tmp_path


@pytest.mark.parametrize(
    "sample_by, expected",
    [
        ("document", [TEXT]),
        ("paragraph", ["one  \r\ntwo", "three\u2028é\x0c\ttail", "four"]),
        ("line", ["one  ", "two", " ", "three\u2028é\x0c\ttail", "four"]),  # only newlines end a line, as in `datasets`
    ],
)
def test_text_is_cut_where_asked_and_changed_nowhere(corpus, sample_by, expected):
    assert read(corpus, path="text", data_files="corpus.txt", sample_by=sample_by) == expected


def test_paragraphs_of_a_crlf_file_keep_no_half_newline(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\r\n\r\nc\r\n")
    assert read(tmp_path, path="dos.txt", sample_by="paragraph") == ["a\r\nb", "c"]


def test_percentages_of_one_document_cut_its_characters_into_two_exact_parts(tmp_path):
    text = "".join(chr(200 + i) for i in range(1003))  # 2 bytes each: 90 % of the characters are not 90 % of the bytes
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    [head] = read(tmp_path, path="x.txt", split="train[:90%]")
    [tail] = read(tmp_path, path="x.txt", split="train[90%:]")
    assert len(head) == 902 and head + tail == text
    assert read(tmp_path, path="x.txt", split="train[10:20]") == [text[10:20]]


def test_slices_of_several_documents_count_documents(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    all_five = [f"document {i}" for i in range(5)]
    assert read(tmp_path, path="text", data_files="*.txt") == all_five  # sorted by name
    assert read(tmp_path, path="text", data_files=["3.txt", "1.txt"]) == [all_five[3], all_five[1]]
    assert read(tmp_path, path="text", data_files="*.txt", split="train[:40%]") == all_five[:2]
    assert read(tmp_path, path="text", data_files="*.txt", split="train[3:]") == all_five[3:]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "content"])
def test_tables_give_one_column_unchanged(tmp_path, kind, column):
    texts = [text for text in TEXTS if text or kind != "csv"]  # an empty cell of a csv is a null
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    name = {"json": "x.jsonl", "csv": "x.csv", "parquet": "x.parquet"}[kind]
    if kind == "json":
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write = pandas.DataFrame(rows).to_csv if kind == "csv" else pandas.DataFrame(rows).to_parquet
        write(tmp_path / name, index=False)
    columns = {} if column == "text" else {"columns": [column]}
    assert read(tmp_path, path=kind, data_files=name, **columns) == texts
    assert read(tmp_path, path=name, **columns) == texts
    assert read(tmp_path, path=name, split="train[1:3]", **columns) == texts[1:3]


@pytest.fixture
def broken(tmp_path):
    (tmp_path / "ok.txt").write_text("hello")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin1"))
    (tmp_path / "ok.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin1"))
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "a"\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    return tmp_path


BAD = {  # entry -> what its line must name
    "missing file": (dict(path="text", data_files="gone.txt"), ["gone.txt", "--data_dir"]),
    "missing path": (dict(path="gone.jsonl"), ["gone.jsonl"]),
    "folder of text": (dict(path="text", data_files="folder"), ["folder", "no such file"]),
    "folder of json": (dict(path="json", data_files="folder"), ["folder", "no such file"]),
    "invalid utf-8": (dict(path="latin.txt"), ["latin.txt", "byte 2 (0xef)"]),
    "invalid utf-8 in json": (dict(path="latin.jsonl"), ["latin.jsonl", "byte 10 (0xe9)"]),
    "torn json": (dict(path="torn.jsonl"), ["torn.jsonl"]),
    "empty json": (dict(path="empty.jsonl"), ["empty.jsonl"]),
    "empty csv": (dict(path="empty.csv"), ["empty.csv"]),
    "torn parquet": (dict(path="torn.parquet"), ["torn.parquet"]),
    "wrong column": (dict(path="ok.jsonl", columns=["body"]), ["ok.jsonl", "'body' among text"]),
    "two columns": (dict(path="ok.jsonl", columns=["text", "id"]), ["ok.jsonl", "columns=['text', 'id']"]),
    "null row": (dict(path="json", data_files="null.jsonl"), ["null.jsonl line 2", "text=None"]),
    "number": (dict(path="json", data_files="number.jsonl"), ["number.jsonl line 1", "text=3"]),
    "unknown key": (dict(path="ok.txt", weight=2), ["datasets[0]", "'weight'", "fraction"]),
    "no path": (dict(data_files="ok.txt"), ["datasets[0]", "`path`"]),
    "builder alone": (dict(path="json"), ["'json'", "data_files"]),
    "bad sample_by": (dict(path="ok.txt", sample_by="page"), ["sample_by='page'", "paragraph"]),
    "bad fraction": (dict(path="ok.txt", fraction=0), ["fraction=0"]),
    "fraction is text": (dict(path="ok.txt", fraction="half"), ["fraction='half'"]),
    "split is no text": (dict(path="ok.txt", split=90), ["datasets[0]", "split=90"]),
    "bad slice": (dict(path="ok.txt", split="train[:90"), ["ok.txt", "'train[:90'"]),
    "other split of text": (dict(path="ok.txt", split="test"), ["split='test'", "train"]),
    "other split of json": (dict(path="ok.jsonl", split="test"), ["ok.jsonl", "test"]),
    "ignored columns": (dict(path="ok.txt", columns=["body"]), ["datasets[0]", "columns"]),
    "ignored sample_by": (dict(path="ok.jsonl", sample_by="line"), ["datasets[0]", "sample_by"]),
    "ignored data_files": (
        dict(path="builtin/toyworld", split="train[:9]", data_files="x"),
        ["datasets[0]", "data_files"],
    ),
    "endless toyworld": (dict(path="builtin/toyworld"), ["split='train'", "train[:30000]"]),
    "share of toyworld": (dict(path="builtin/toyworld", split="train[:10%]"), ["'train[:10%]'"]),
    "other split of toyworld": (dict(path="builtin/toyworld", split="test[:9]"), ["'test[:9]'"]),
    "unknown kind": (dict(path="builtin/toyworld", name="poems", split="train[:9]"), ["'poems'", "stories"]),
    "unknown builtin": (dict(path="builtin/world", split="train[:9]"), ["'builtin/world'", "builtin/toyworld"]),
    "hub out of reach": (dict(path="nobody/nothing"), ["'nobody/nothing'", "local copy", "data_files"]),
}


@pytest.mark.parametrize("entry, named", BAD.values(), ids=BAD)
def test_bad_entry_is_one_line_that_names_it(broken, entry, named):
    with pytest.raises(UserError) as error:
        read(broken, **entry)
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in named), line


def test_fraction_is_given_for_all_entries_or_none():
    entries = [dict(path="a.txt", fraction=0.5), dict(path="b.txt")]
    with pytest.raises(UserError, match="datasets: give `fraction` for every entry"):
        parse_sources(entries, "datasets")
    assert [s.fraction for s in parse_sources([e | dict(fraction=1) for e in entries], "datasets")] == [1, 1]


def test_fingerprint_follows_the_documents_and_not_the_bookkeeping(corpus, tmp_path):
    def of(**entry):
        return source_fingerprint(Source(**entry), tmp_path)

    entry = dict(path="text", data_files="corpus.txt")
    first = of(**entry)
    assert first == of(**entry) == of(**entry, fraction=0.5, shard="x")
    others = [
        of(**entry, split="train[:90%]"),
        of(**entry, sample_by="line"),
        of(path="builtin/toyworld", split="train[:9]"),
    ]
    (corpus / "corpus.txt").write_bytes(TEXT.encode() + b".")
    others.append(of(**entry))
    assert len({first, *others}) == 5
