"""Stores are datatrove's files to the byte, damage is refused, and a row plan holds every token once."""

import json
import math
import shutil
import struct

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from llmkit.config import UserError
from llmkit.data import shards
from llmkit.data.shards import open_store, plan_rows
from llmkit.data.tokenizer import train_bpe, train_char

WORDS = ["ab", "cde fg", "", "h"]  # the empty one holds no text: counted, not stored


def test_files_are_written_as_worked_out_by_hand(make_store):
    store = make_store(WORDS, log_probs=[-1.0, -2.0, -9.0, -4.5])
    files = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    assert files["tokens.ds"] == struct.pack("<12H", 7, 8, 1, 9, 10, 11, 6, 12, 13, 1, 14, 1)
    assert files["tokens.ds.index"] == struct.pack("<3Q", 3, 10, 12)
    assert files["tokens.ds.logprob"] == struct.pack("<3d", -1.0, -2.0, -4.5)
    assert files["tokens.ds.metadata"].decode().splitlines()[:2] == ["llmkit|2", "12"]
    manifest = json.loads(files["manifest.json"])
    counts = ("num_documents", "num_tokens", "num_bytes", "num_empty_documents_skipped")
    assert [manifest[key] for key in counts] == [3, 12, 2 + 6 + 1, 1]
    assert (manifest["source"], store.fingerprint) == ("somewhere", "hash of store")
    assert store.num_tokens == 12 and store.starts.tolist() == [0, 3, 10]
    assert store.entropy == pytest.approx(7.5 / 12)


def test_bytes_are_counted_in_utf8_and_entropy_is_unknown_where_a_document_has_none(make_store):
    store = make_store(["é😀", "a"], train_char(["é😀a"]), log_probs=[-1.0, None])
    assert store.manifest["num_bytes"] == 2 + 4 + 1 and store.entropy is None


@pytest.fixture
def write_with_datatrove(tmp_path):
    pytest.importorskip("datatrove", reason="writes the store to compare with")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    def write(texts, tokenizer, eos_token="<|endoftext|>"):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        name = str(tmp_path / "tokenizer" / "tokenizer.json")
        writer = DocumentTokenizer(str(tmp_path / "trove"), name, eos_token=eos_token, shuffle_documents=False)
        writer.run([Document(text=text, id=str(i)) for i, text in enumerate(texts)])
        return tmp_path / "trove"

    return write


def test_store_equals_what_datatrove_writes(write_with_datatrove, make_store, letters):
    ours, [theirs] = make_store(WORDS).folder, write_with_datatrove(filter(None, WORDS), letters).glob("*.ds")
    for suffix in ("", ".index"):
        assert (ours / f"tokens.ds{suffix}").read_bytes() == theirs.with_name(theirs.name + suffix).read_bytes()
    lines = theirs.with_name(theirs.name + ".metadata").read_text().splitlines()
    our_lines = (ours / "tokens.ds.metadata").read_text().splitlines()
    assert len(lines) == len(our_lines) == 3 and lines[1] == our_lines[1]
    assert lines[0].split("|")[1] == our_lines[0].split("|")[1] == "2"


def test_store_written_by_datatrove_opens_and_refuses_another_tokenizer(write_with_datatrove, make_store, bpe):
    texts = ["the dog ran after the cat, and the mat sat", "x" * 3000]
    folder = write_with_datatrove(texts, bpe)
    store = open_store(folder, bpe)
    assert (store.tokens == make_store(texts, bpe).tokens).all() and store.manifest["num_bytes"] is None
    for other in (train_bpe(["another text with other words in it"] * 9, 285), train_char(texts)):
        with pytest.raises(UserError, match="trove: document 0"):
            open_store(folder, other)


def test_store_without_eos_is_refused(write_with_datatrove, letters):
    """Documents that did not end with this tokenizer's EOS were not checked at all: any tokenizer would do."""
    folder = write_with_datatrove(["ab"], letters, eos_token=None)
    with pytest.raises(UserError, match=r"trove: document 0 ends with id 8, not with EOS \(1\)"):
        open_store(folder, letters)


def test_store_of_several_datatrove_tasks_merged_opens(tmp_path, bpe):
    """As a cluster leaves it: documents shuffled twice, absolute paths and one more `.metadata` without tokens."""
    pytest.importorskip("datatrove", reason="writes the store")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    texts = [
        "the cat",
        "a\n\nmat <|im_end|> there",
        "é 12",
        "",
        "x" * 3000,
        "the dog ran",
        "sat",
    ]  # a forged control token
    bpe.save_pretrained(tmp_path / "tokenizer")
    name = str(tmp_path / "tokenizer" / "tokenizer.json")
    for rank in range(3):
        step = DocumentTokenizer(str(tmp_path / "parts"), name, eos_token="<|endoftext|>", seed=rank)
        step.run([Document(text=text, id=str(i)) for i, text in enumerate(texts[rank::3])], rank, 3)
    DocumentTokenizerMerger(str(tmp_path / "parts"), str(tmp_path / "merged"), "corpus", seed=1, progress=False).run()
    assert len(list((tmp_path / "merged").glob("*.metadata"))) == 2
    with pytest.raises(UserError, match="holds 3 token files"):
        open_store(tmp_path / "parts", bpe)
    store = open_store(tmp_path / "merged", bpe)
    found = [store.tokens[a : int(b)].tolist() for a, b in zip(store.starts, store.ends, strict=True)]
    assert sorted(found) == sorted([*bpe.encode(text, add_special_tokens=False), bpe.eos_token_id] for text in texts)
    assert plan_rows(store, 32).pieces[:, 1].sum() == store.num_tokens


@pytest.mark.parametrize("num_ids, size, form", [(65536, 2, "H"), (65537, 4, "I")])
def test_ids_take_four_bytes_above_65536(make_store, num_ids, size, form):
    chars = [chr(0x10000 + i) for i in range(num_ids - 6)]  # 5 special tokens and <|unk|> come first
    store = make_store([chars[-1]], train_char(chars))
    assert (store.folder / "tokens.ds").read_bytes() == struct.pack(f"<2{form}", num_ids - 1, 1)
    assert (store.folder / "tokens.ds.metadata").read_text().startswith(f"llmkit|{size}\n")
    assert store.tokens.tolist() == [num_ids - 1, 1]


def test_store_of_an_untidy_tokenizer_opens(make_store):
    """A decoder that tidies up spaces, and truncation left in tokenizer.json, made a store refuse its own tokenizer."""
    core = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, " ": 2, ".": 3}))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    core.enable_truncation(2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=True)
    assert make_store(["a a ."], tokenizer).tokens.tolist() == [1, 2, 1, 2, 3, 0]


def test_tokenizer_written_in_python_makes_a_store_that_opens(make_store):
    """It has no `tokenizers` behind it; a ByT5 id is a byte + 3."""
    assert make_store(["ab", "é</s>"], ByT5Tokenizer()).tokens.tolist() == [
        *(100, 101, 1),
        *(0xC3 + 3, 0xA9 + 3, *(ord(c) + 3 for c in "</s>"), 1),
    ]


def test_text_that_spells_a_control_token_is_text(make_store, bpe):
    tokens = make_store(["a <|im_end|> b"], bpe).tokens.tolist()
    assert bpe.decode(tokens[:-1]) == "a <|im_end|> b" and not set(tokens[:-1]) & set(bpe.all_special_ids)


DAMAGE = {
    "token lost": lambda folder: (folder / "tokens.ds").write_bytes((folder / "tokens.ds").read_bytes()[:-2]),
    "half a token lost": lambda folder: (folder / "tokens.ds").write_bytes((folder / "tokens.ds").read_bytes()[:-1]),
    "all tokens lost": lambda folder: (folder / "tokens.ds").write_bytes(b""),
    "index cut": lambda folder: (folder / "tokens.ds.index").write_bytes((folder / "tokens.ds.index").read_bytes()[:8]),
    "index gone": lambda folder: (folder / "tokens.ds.index").unlink(),
    "metadata gone": lambda folder: (folder / "tokens.ds.metadata").unlink(),
    "metadata cut": lambda folder: (folder / "tokens.ds.metadata").write_text("letters|2"),
    "metadata garbled": lambda folder: (folder / "tokens.ds.metadata").write_text("letters\nmany\n"),
    "tokens gone": lambda folder: (folder / "tokens.ds").unlink(),
    "two files": lambda folder: shutil.copy(folder / "tokens.ds", folder / "more.ds"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_store_is_refused_in_one_line_that_names_it(make_store, letters, damage):
    folder = make_store(WORDS).folder
    damage(folder)
    with pytest.raises(UserError, match=str(folder)) as error:
        open_store(folder, letters)
    assert "\n" not in str(error.value)


def test_store_of_another_tokenizer_is_refused(make_store, bpe):
    with pytest.raises(UserError, match="made by another tokenizer"):
        open_store(make_store(WORDS).folder, bpe)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_corpus_without_text_is_refused(make_store, tmp_path, texts):
    with pytest.raises(UserError, match=rf"somewhere: no text in it \({len(texts)} empty documents\)"):
        make_store(texts)
    assert not list(tmp_path.iterdir())


def test_build_that_fails_leaves_nothing_behind(make_store, tmp_path):
    with pytest.raises(UserError, match="not in the tokenizer"):
        make_store(["fine", "!"])
    assert not list(tmp_path.iterdir())


def test_store_can_be_read_by_whoever_may_read_its_parent(make_store, tmp_path):
    (tmp_path / "plain").mkdir()
    assert make_store(WORDS).folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.fixture
def ragged(make_store):
    """200 documents of 1 to 50 letters: with EOS 2 to 51 tokens."""
    rng = np.random.default_rng(0)
    return make_store(["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 51, 200)])


@pytest.mark.parametrize("table_sizes", [0, 1000], ids=["best_fit", "table"])
@pytest.mark.parametrize("context", [1, 2, 16, 50, 51, 300])
def test_row_plan_holds_every_token_once_and_no_row_overflows(ragged, monkeypatch, context, table_sizes):
    monkeypatch.setattr(shards, "TABLE_SIZES", table_sizes)
    plan = plan_rows(ragged, context)
    start, length, document = plan.pieces.T
    places = np.concatenate([np.arange(s, s + n) for s, n in zip(start, length, strict=True)])
    assert sorted(places.tolist()) == list(range(ragged.num_tokens))
    assert (np.searchsorted(ragged.ends, start, side="right") == document).all()
    assert (start + length <= ragged.ends[document]).all()  # a piece never crosses the end of its document
    used = np.add.reduceat(length + 1, plan.rows[:-1])  # each piece opens with its own BOS
    assert plan.rows[0] == 0 and plan.rows[-1] == len(plan.pieces) and used.max() <= plan.capacity == context + 1
    lengths = np.diff(ragged.ends.astype(int), prepend=0).tolist()
    assert plan.num_restarts == sum(math.ceil(n / context) - 1 for n in lengths)
    assert plan.utilisation == pytest.approx(used.sum() / (plan.num_rows * (context + 1)))
    best = math.ceil(used.sum() / (context + 1))
    assert best <= plan.num_rows <= 11 / 9 * best + 1  # best-fit decreasing (Johnson 1974); the bound is to the optimum


@pytest.mark.parametrize("table_sizes", [0, 1000], ids=["best_fit", "table"])
def test_row_plan_of_a_hand_worked_corpus(make_store, monkeypatch, table_sizes):
    """With BOS and EOS: 4, 5, 3 and, cut in two, 8 + 4 places; rows of 8 hold 8, 5 + 3 and 4 + 4."""
    monkeypatch.setattr(shards, "TABLE_SIZES", table_sizes)
    plan = plan_rows(make_store(["ab", "cde", "f", "ghijklmno"]), context=7)
    rows = [plan.pieces[a:b].tolist() for a, b in zip(plan.rows[:-1], plan.rows[1:], strict=True)]
    assert rows == [[[9, 7, 3]], [[3, 4, 1], [7, 2, 2]], [[0, 3, 0], [16, 3, 3]]]
    assert (plan.num_restarts, plan.utilisation) == (1, 1.0)


@pytest.mark.parametrize(
    "texts, context, table_sizes, expected",
    [
        (["e", "ab", "ghijk"], 10, 0, [[2, 1], [0]]),  # places 3, 4, 7 into 11: the longest that fits
        (["e", "ab", "ghijk"], 10, 1000, [[2, 1], [0]]),
        (["ab", "cd", "e", "f"], 9, 0, [[0, 1], [2, 3]]),  # places 4, 4, 3, 3 into 10
        (["ab", "cd", "e", "f"], 9, 1000, [[0, 2, 3], [1]]),  # the table sees that 4 + 3 + 3 leaves nothing empty
    ],
)
def test_rows_are_filled_as_well_as_they_can_be(make_store, monkeypatch, texts, context, table_sizes, expected):
    monkeypatch.setattr(shards, "TABLE_SIZES", table_sizes)
    plan = plan_rows(make_store(texts), context)
    assert [plan.pieces[a:b, 2].tolist() for a, b in zip(plan.rows[:-1], plan.rows[1:], strict=True)] == expected


def test_row_plan_is_cached_per_context_and_reloads_equal(ragged):
    for context in (16, 17):
        first = plan_rows(ragged, context)
        path = ragged.folder / f"rows-{context}.npz"
        written = path.stat().st_mtime_ns
        again = plan_rows(ragged, context)
        assert path.stat().st_mtime_ns == written  # read, not planned again
        assert (first.pieces == again.pieces).all() and (first.rows == again.rows).all()
        assert (first.num_restarts, first.capacity) == (again.num_restarts, again.capacity)


def test_row_plan_of_a_store_that_was_written_anew_is_made_anew(make_store):
    """datatrove tokenising into the same folder left the old plan in place, and rows were cut anywhere."""
    old, new = make_store(["ab", "cde", "f"]), make_store(["abcdef", "ab"], name="new")
    plan_rows(old, 7)
    shutil.copy(old.folder / "rows-7.npz", new.folder)
    assert sorted(plan_rows(new, 7).pieces.tolist()) == [[0, 7, 0], [7, 3, 1]]


def test_a_document_too_long_for_memory_is_refused_with_the_way_out(tmp_path, bpe):
    with pytest.raises(UserError, match=r"big.txt: a document of 300,000 bytes .* set sample_by"):
        shards.build_store([shards.Doc("a" * n, None) for n in (1000, 300_000)], bpe, tmp_path / "s", "hash", "big.txt")
    assert not list(tmp_path.iterdir())
