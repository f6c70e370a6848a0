"""`llmkit tokenizer train|check`: figures as counted by hand, the text that is read, what is written and refused."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from tiny import bpe_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from llmkit import cli
from llmkit.check import runner
from llmkit.data.encode import Encoder
from llmkit.data.sources import Source
from llmkit.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe, train_char
from llmkit.data.tokenizer_report import notes, token_text
from llmkit.data.tokenizer_train import Sample
from llmkit.data.vocabulary import count_shard, pieces, shard_figures, vocabulary_figures, within
from llmkit.report.plots import plot_frequencies, rank_curve

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))
TEXT = "The cat sat.\n\n  It's 1234 o'clock; the dog ran\r\nafter it.\n\tEnd   \n" * 40


@pytest.fixture(scope="module")
def letters_of_bytes():
    """No merges: one token for each byte, after five control tokens."""
    return train_bpe(["abc"], 261)


def counted(texts, tokenizer, max_bytes=10**6):
    return count_shard("x", texts, tokenizer, max_bytes)


def encode(tokenizer, texts):
    return [ids.tolist() for ids in Encoder(tokenizer.backend_tokenizer).encode(texts)]


# figures


def test_a_shard_is_counted_as_by_hand(letters):
    """a = 7, b = 8, the space = 6: five tokens and one."""
    shard = counted(["ab ab", "b"], letters)
    assert {i: int(n) for i, n in enumerate(shard.counts) if n} == {6: 1, 7: 2, 8: 3}
    figures = shard_figures(shard)
    expected = dict(documents=2, pieces=2, bytes=6, characters=6, tokens=6, bytes_per_token=1.0, unknown=0)
    assert {key: figures[key] for key in expected} == expected
    assert figures["curve"] == [[1, 3], [2, 2], [3, 1]]
    assert not (figures["is_cut"] or figures["altered_pieces"] or figures["surrogates"] or figures["unjudged_pieces"])


def test_the_vocabulary_is_counted_as_by_hand(letters):
    """33 ids, 6 of them control tokens; of the other 27 three are used."""
    found = vocabulary_figures([counted(["ab ab"], letters), counted(["b"], letters)], letters)
    assert (found["ids"], found["control_tokens"], found["tokens"]) == (33, 6, 6)
    assert (found["never_used"], found["used_below_10"]) == (24, 27)
    assert (found["never_used_share"], found["used_below_10_share"]) == (24 / 27, 1.0)
    assert [(item["id"], item["text"], item["count"]) for item in found["commonest"]] == [
        (8, "b", 3), (7, "a", 2), (6, " ", 1),
    ]  # fmt: skip
    assert [item["share"] for item in found["commonest"]] == [3 / 6, 2 / 6, 1 / 6]


def test_an_id_used_ten_times_is_not_rare(letters):
    assert vocabulary_figures([counted(["a" * 10 + "b" * 9], letters)], letters)["used_below_10"] == 26


def test_bytes_of_longer_characters_are_told_from_ascii(letters_of_bytes):
    """a, two bytes of é, three of €: six tokens, five of them a byte of a longer character."""
    shard = counted(["aé€"], letters_of_bytes)
    figures, found = shard_figures(shard), vocabulary_figures([shard], letters_of_bytes)
    assert (figures["tokens"], figures["bytes_per_token"], figures["characters_per_token"]) == (6, 1.0, 0.5)
    assert (found["single_byte_tokens"], found["single_byte_share"]) == (5, 5 / 6)
    assert {item["text"] for item in found["commonest"]} == {"a", "\\xc3", "\\xa9", "\\xe2", "\\x82", "\\xac"}


def test_the_longest_tokens_are_measured_in_bytes():
    tokenizer = train_bpe(["ééééé " * 50, "abcd " * 50], 300)
    longest = vocabulary_figures([counted(["é"], tokenizer)], tokenizer)["longest"]
    assert longest[0] | {"id": 0} == {"id": 0, "text": " ééééé", "bytes": 11, "count": 0}


def test_unknown_characters_are_counted_and_not_judged(letters):
    figures = shard_figures(counted(["aZb", "ab"], letters))
    assert (figures["unknown"], figures["unjudged_pieces"], figures["altered_pieces"]) == (1, 1, 0)


def test_half_a_surrogate_pair_is_counted_not_a_crash(letters_of_bytes):
    figures = shard_figures(counted(["a\ud83db"], letters_of_bytes))
    assert (figures["surrogates"], figures["characters"], figures["bytes"]) == (1, 3, 5)  # U+FFFD has three bytes


def test_text_that_does_not_come_back_is_counted_and_shown_first():
    tokenizer = bpe_tokenizer(chat=False)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("#", "removed"), backend.pre_tokenizer])
    shard = counted(["fine", "x" * 5000 + "#y", "fine"], tokenizer)
    assert shard.num_altered == 1 and "#y" in shard.excerpts[0]


def test_text_that_looks_like_a_control_token_stays_text(letters_of_bytes):
    shard = counted(["<|endoftext|>"], letters_of_bytes)
    assert shard.num_tokens == 13 and not shard.counts[:5].any()


def test_a_curve_keeps_its_ends_and_at_most_200_points():
    found = rank_curve(np.arange(5000))
    assert found[0] == [1, 4999] and found[-1] == [4999, 1] and len(found) <= 200
    assert all(uses == 5000 - rank for rank, uses in found)


# the text that is read


@pytest.mark.parametrize("longest", [50, 200, 1000])
def test_pieces_are_the_text_and_change_no_token(longest):
    """Empty lines and indents are tokens of several characters here: a cut inside one would show."""
    bpe = train_bpe([TEXT], 400)
    found = list(pieces(TEXT, longest))
    assert "".join(found) == TEXT and max(map(len, found)) <= longest and len(found) > 1
    assert [i for ids in encode(bpe, found) for i in ids] == encode(bpe, [TEXT])[0]


def test_pieces_end_where_a_line_ends_and_no_blank_follows():
    assert list(pieces("ab\ncd\n  ef", 8)) == ["ab\n", "cd\n  ef"]
    assert list(pieces("ab cd ef", 6)) == ["ab cd", " ef"] and list(pieces("abcdef", 4)) == ["abcd", "ef"]


@pytest.mark.parametrize("text", ["a b " * 100, "x" * 300, "\n" * 300, " " * 300, "é\n" * 200, ""])
def test_pieces_of_odd_text_are_the_text(text):
    found = list(pieces(text, 64))
    assert "".join(found) == text and all(0 < len(piece) <= 64 for piece in found)


def test_reading_stops_at_the_byte(letters):
    assert within("ééé", 5) == ("éé", 4, True) and within("ééé", 6) == ("ééé", 6, False)
    shard = counted(["abc", "def", "ghi"], letters, max_bytes=5)
    assert (shard.num_bytes, shard.num_documents, shard.is_cut) == (5, 2, True)
    assert not counted(["abc", "de"], letters, max_bytes=5).is_cut


def sample(folder, sizes, max_bytes, **fractions):
    """Sources of lines of nine letters; which letter says whose."""
    sources = []
    for name, lines in sizes.items():
        (folder / f"{name}.txt").write_text(f"{name * 9}\n" * lines)
        sources.append(Source(f"{name}.txt", sample_by="line", fraction=fractions.get(name)))
    found = Sample(sources, folder, max_bytes, lambda n: None)
    return found, "".join(found)


def test_sources_share_the_bytes_until_they_end(tmp_path):
    found, text = sample(tmp_path, {"a": 2, "b": 100, "c": 100}, 198)
    assert found.num_bytes == [18, 90, 90] and found.is_cut
    assert [text.count(letter) for letter in "abc"] == [18, 90, 90]
    found, text = sample(tmp_path, {"a": 2, "b": 3}, 10**6)
    assert found.num_bytes == [18, 27] and not found.is_cut


def test_fractions_share_the_bytes(tmp_path):
    assert sample(tmp_path, {"a": 100, "b": 100}, 360, a=0.75, b=0.25)[0].num_bytes == [270, 90]


# train


def train(folder, *words, text=TEXT, name="tok"):
    (folder / "corpus.txt").write_bytes(text.encode())
    entry = f"[{{path: text, data_files: {folder}/corpus.txt}}]"
    return cli.main(["tokenizer", "train", "--output_dir", str(folder / name), "--datasets", entry, *words])


def test_train_writes_the_tokenizer_of_the_library_call(tmp_path, capsys):
    assert train(tmp_path, "--vocab_size", "300") == 0
    mine, theirs = load_tokenizer(str(tmp_path / "tok")), train_bpe([TEXT], 300)
    assert mine.get_vocab() == theirs.get_vocab() and mine("cat", add_special_tokens=False) == theirs("cat")
    assert mine("cat")["input_ids"][0] == mine.bos_token_id
    out = capsys.readouterr().out
    assert re.search(r"read      corpus 0.00 MB: all of it\ntrained   byte-level BPE, 300 ids in \d", out)
    assert f"saved     {tmp_path / 'tok'}\n" in out and "ok    special-token-forged" in out
    assert not list(tmp_path.glob(".tok*"))


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_control_tokens_come_first_are_one_id_and_end_in_the_folder(kind, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}<|u|>{{ m['content'] }}<|e|>{% endfor %}", encoding="utf-8"
    )
    words = ["--chat_tokens", "[<|u|>, <|e|>]", "--special_tokens", "[<|tool|>]", "--tokenizer_type", kind]
    words += ["--chat_template_path", str(tmp_path / "t.jinja"), "--add_bos_token", "false"]
    assert train(tmp_path, *words, text=TEXT + "0123456789abcdefghijklmnopqrstuvwxyz<|>/") in (0, 1)
    tokenizer = load_tokenizer(str(tmp_path / "tok"))
    names = ["<|bos|>", "<|endoftext|>", "<|pad|>", "<|u|>", "<|e|>", "<|tool|>"]
    assert [tokenizer(name)["input_ids"] for name in names] == [[i] for i in range(6)]
    assert "<|im_start|>" not in tokenizer.get_vocab()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the dog"}], tokenize=True)["input_ids"]
    assert (ids[0], ids[-1]) == (3, 4) and tokenizer.decode(ids[1:-1]) == "the dog"


def test_no_control_tokens_of_a_chat_are_needed(tmp_path):
    assert train(tmp_path, "--vocab_size", "259", "--chat_tokens", "[]") == 0
    assert len(load_tokenizer(str(tmp_path / "tok"))) == 259


def test_a_cut_corpus_and_a_vocabulary_that_is_not_filled_are_told(tmp_path, capsys):
    assert train(tmp_path, "--vocab_size", "2000", "--max_train_bytes", "100") == 0
    out = capsys.readouterr().out
    assert "read      corpus 0.00 MB: the first 0.00 MB (max_train_bytes)" in out
    assert "vocab_size=2,000 was not reached" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", ""], "output_dir is missing"),
        (["--datasets", "[]"], "datasets is missing"),
        (["--vocab_size", "260"], "vocab_size=260 is too small; allowed: at least 261"),
        (["--max_train_bytes", "0"], "max_train_bytes=0; allowed: 1 or more"),
        (["--max_check_bytes", "0"], "max_check_bytes=0; allowed: 1 or more"),
        (["--tokenizer_type", "char", "--vocab_size", "300"], "vocab_size=300 has no effect"),
        (["--special_tokens", "[<|im_end|>]"], "'<|im_end|>' is there already"),
        (["--special_tokens", "[5]"], "special_tokens: 5; allowed: text"),
        (["--chat_tokens", "['<|a|> ']"], "no blanks around it"),
        (["--chat_template_path", "no.jinja"], "chat_template_path='no.jinja': cannot be read"),
        (["--html", "nosuch/x.html"], "the folder 'nosuch' does not exist"),
        (["--check_ignore", "[{check: eos-undeclared}]"], "check_ignore: "),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(words, message, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("abc")
    given = {"--output_dir": str(tmp_path / "tok"), "--datasets": f"[{{path: {tmp_path}/corpus.txt}}]"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert cli.main(["tokenizer", "train", *(word for pair in given.items() for word in pair)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "datasets: no text in them"), (b"caf\xe9", "bytes that are not UTF-8")]
)
def test_text_that_cannot_be_used_is_one_line_and_leaves_nothing(content, message, tmp_path, capsys):
    (tmp_path / "x.txt").write_bytes(content)
    words = ["--output_dir", str(tmp_path / "tok"), "--datasets", f"[{{path: {tmp_path}/x.txt}}]"]
    assert cli.main(["tokenizer", "train", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_folder_that_is_there_is_never_written_over(tmp_path, capsys):
    (tmp_path / "tok").mkdir()
    assert train(tmp_path) == 2
    assert "tok': exists already" in capsys.readouterr().err and not list((tmp_path / "tok").iterdir())


# check


@pytest.fixture
def saved(tmp_path):
    """Saves a tokenizer, and gives its folder's name."""

    def save(tokenizer):
        save_tokenizer(tokenizer, tmp_path / "tok")
        return str(tmp_path / "tok")

    return save


def check(name, *words):
    return cli.main(["tokenizer", "check", "--tokenizer_name", name, *words])


def test_the_checks_are_those_of_llmkit_check(saved, tmp_path, capsys):
    (tmp_path / "x.txt").write_text(TEXT)
    out = str(tmp_path / "x.json")
    assert check(saved(train_bpe([TEXT], 300)), "--dataset", str(tmp_path / "x.txt"), "--json", out) == 0
    found = json.loads(Path(out).read_text())
    assert [c["id"] for c in found["checks"]] == [c.id for c in runner.all_checks() if c.family == "tokenizer"]
    assert found["shards"]["x"]["tokens"] == len(encode(train_bpe([TEXT], 300), [TEXT])[0])
    assert found["tokenizer"]["store_dtype"] == "uint16" and found["vocabulary"]["ids"] == 300
    assert found["summary"]["exit_code"] == 0 and found["version"] == 1
    assert {c["id"]: c["status"] for c in found["checks"]}["ids-overflow-storage"] == "pass"


def test_a_chat_template_is_checked_too_on_the_rows(saved, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "red cat"}, {"role": "assistant", "content": "blue"}]}]
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[0]))
    out = str(tmp_path / "x.json")
    check(saved(bpe_tokenizer()), "--dataset", str(tmp_path / "x.jsonl"), "--json", out)
    found = json.loads(Path(out).read_text())
    assert {c["family"] for c in found["checks"]} == {"tokenizer", "template"}
    assert (found["shards"]["x"]["documents"], found["shards"]["x"]["characters"]) == (2, len("red cat" + "blue"))


def test_no_eos_fails_and_says_what_follows(saved, capsys):
    assert check(saved(bpe_tokenizer(chat=False, eos_token=None))) == 1
    out = capsys.readouterr().out
    assert "FAIL  eos-undeclared" in out and "`llmkit pretrain` refuses it" in out
    assert check(saved(bpe_tokenizer(chat=False, eos_token=None)), "--check_ignore",
                 "[{check: eos-undeclared, reason: a bare vocabulary}]") == 0  # fmt: skip


def test_what_the_text_shows_fails_the_check_of_round_trips(saved, tmp_path, capsys):
    """Only a tab behind 3,000 letters is lost: no torture text has it, and no beginning of a row."""
    tokenizer = bpe_tokenizer(chat=False)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(?<=q)\t"), "removed"), backend.pre_tokenizer]
    )
    (tmp_path / "x.txt").write_text("a" * 3000 + "q\tb")
    assert check(saved(tokenizer), "--dataset", str(tmp_path / "x.txt")) == 1
    out = capsys.readouterr().out
    assert "aaaq" in out
    assert "FAIL  text-lost" in out and "1 pieces of text encoded and decoded, 1 come back otherwise" in out
    assert check(str(tmp_path / "tok"), "--dataset", str(tmp_path / "x.txt"), "--redact") == 1
    assert "aaaq" not in capsys.readouterr().out


def test_the_page_stands_alone_and_redact_holds_everywhere(saved, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("zebra zebra zebra\n" * 50)
    files = {key: str(tmp_path / f"x.{key}") for key in ("json", "html", "plot")}
    words = ["--dataset", str(tmp_path / "x.txt"), *(w for k, v in files.items() for w in (f"--{k}", v))]
    name = saved(train_bpe(["zebra zebra zebra\n" * 50], 280))

    def seen(*more):
        assert check(name, *words, *more) == 0
        return capsys.readouterr().out, Path(files["html"]).read_text(), Path(files["json"]).read_text()

    for out in seen():
        assert "zebra" in out
    for out in seen("--redact"):
        assert "zebra" not in out
    html = Path(files["html"]).read_text()
    assert html.count('src="data:image/png;base64,') == 1 and not re.search(r'(src|href)="(?!data:|#)', html)
    assert Path(files["plot"]).read_bytes().startswith(b"\x89PNG")


def test_several_shards_have_names_of_their_own(saved, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("red cat")
    entries = [f"{{path: {tmp_path}/a.txt}}", f"{{path: {tmp_path}/a.txt}}", f"{{path: {tmp_path}/b.txt, shard: B}}"]
    out = str(tmp_path / "x.json")
    assert check(saved(bpe_tokenizer(chat=False)), "--datasets", f"[{', '.join(entries)}]", "--json", out) == 0
    assert list(json.loads(Path(out).read_text())["shards"]) == ["a", "a 2", "B"]


def test_a_tokenizer_written_in_python_is_read_less_and_that_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmkit.data.tokenizer_check.SLOW_BYTES", 1000)
    ByT5Tokenizer().save_pretrained(tmp_path / "tok")
    (tmp_path / "x.txt").write_text("word " * 400)
    check(str(tmp_path / "tok"), "--dataset", str(tmp_path / "x.txt"))
    out = " ".join(capsys.readouterr().out.split())
    assert "only its first 0.0 MB were read" in out and "written in Python: slow" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer_name", ""], "tokenizer_name is missing"),
        (["--tokenizer_name", "./nosuch"], "no such folder"),
        (["--tokenizer_name", "{folder}"], "holds no tokenizer"),
        (["--tokenizer_name", "{folder}/broken"], "cannot be loaded (JSONDecodeError"),
        (["--tokenizer_name", "{tok}", "--dataset", "nosuch.jsonl"], "dataset='nosuch.jsonl': no such file"),
        (["--tokenizer_name", "{tok}", "--dataset", "{folder}/empty.txt"], "no text in it (1 empty documents)"),
        (["--tokenizer_name", "{tok}", "--dataset", "{folder}/latin.txt"], "bytes that are not UTF-8"),
        (["--tokenizer_name", "{tok}", "--plot", "x.png"], "nothing to draw without text"),
        (["--tokenizer_name", "{tok}", "--html", "{folder}"], "is a folder; name a file"),
    ],
)
def test_what_cannot_be_checked_is_one_line(words, message, saved, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "t").mkdir()
    tok = saved(train_char(["abc"])) if "{tok}" in words else ""
    assert cli.main(["tokenizer", "check", *(w.format(folder=tmp_path, tok=tok) for w in words)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# storage, plot, tokens


def test_an_id_that_a_token_store_would_refuse_fails(saved, capsys):
    """Three ids, the last one 70,000: the store takes its type from their number."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "word": 70_000}, unk_token="<unk>"))
    holes = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    assert check(saved(holes)) == 1
    assert "largest id 70000, stored as uint16" in capsys.readouterr().out


def test_a_plot_is_drawn_of_any_curves():
    for curves in ({}, {"empty": []}, {"one": [[1, 5]]}, {"a$b$": [[1, 100], [50, 1]], "b": [[1, 7], [2, 1]]}):
        assert plot_frequencies(curves, "x").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" the", "·the"), ("\n\t", "\\n\\t"), ("a  b ", "a··b·"), ("x" * 60, "x" * 40 + "…"), ("\x1b[2J", "\\x1b[2J")],
)
def test_a_token_is_shown_on_one_line(text, shown):
    assert token_text({"id": 3, "text": text}) == shown and token_text({"id": 3}) == "id 3"


def test_notes_say_what_a_reader_must_know(letters):
    shard = counted(["abZ"], letters, max_bytes=3)
    figures = {"shards": {"x": shard_figures(shard) | {"is_cut": True}}, "notes": []}
    assert notes(figures) == [
        "x: only its first 0.0 MB were read (max_check_bytes)",
        "x: 1 tokens are unknown; `llmkit pretrain` refuses such text",
    ]


@pytest.mark.real
@pytest.mark.skipif(not (DATA / "wiki_demo.txt").exists(), reason="wiki_demo.txt is not at hand")
def test_real_text_comes_back_and_is_counted_as_the_backend_counts(tmp_path, capsys):
    text = (DATA / "wiki_demo.txt").read_text(encoding="utf-8")[:300_000]
    tokenizer = train_bpe([text[:100_000]], 1000)
    shard = counted([text], tokenizer)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert shard.num_altered == 0
    assert shard.num_tokens == len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
