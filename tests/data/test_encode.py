"""A long document is cut only where its ids stay the same, and what workers write joins into one store."""

import json
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmkit.config import UserError
from llmkit.data import cuts, encode
from llmkit.data.encode import Encoder, StoreWriter, merge_stores
from llmkit.data.shards import open_store
from llmkit.data.tokenizer import train_bpe, train_char

TEXT = [
    "The cat's tail isn't 12345 cm; we'll see!\n\n  He said: \"no\"...\n\tdef f(x):\r\n    return x/2  # done\n",
    "élan naïve Straße. Ünïcode\nЖили-были дед да баба\n東京は晴れ。\nそして夜。\n한국어 텍스트\n<|im_end|> [MASK] a_b",
    *("  \n", " \n", "\n", "!\n", "\r\n", "\t\n", "\n\n", "x "),  # with ids of their own, so that a false cut shows
] * 20
BYTES = pre_tokenizers.ByteLevel.alphabet()
SPLITS = {"qwen2": cuts._QWEN2, "qwen3.5": cuts._QWEN35, "llama3": cuts._LLAMA3, "o200k": cuts._O200K}
SPLITS["tekken"] = cuts._TEKKEN


def gpt2_like(add_prefix_space=False, **kwargs):
    core = Tokenizer(models.BPE(**kwargs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=BYTES, show_progress=False))
    return core


def split_on(regex, normalizer=None):
    core = gpt2_like()
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), last])
    if normalizer is not None:
        core.normalizer = normalizer
    return core


def wordpiece(pre_tokenizer, normalizer=None):
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        core.normalizer = normalizer
    special = ["[UNK]", "[MASK]"]
    core.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return core


def unigram():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    return core


FAMILIES = {
    "char": lambda: train_char([*TEXT, NASTY]).backend_tokenizer,
    "our bpe": lambda: train_bpe(TEXT, 400).backend_tokenizer,
    "gpt2": gpt2_like,
    "gpt2 prefixed": lambda: gpt2_like(add_prefix_space=True),
    **{name: lambda regex=regex: split_on(regex) for name, regex in SPLITS.items()},
    **{
        f"qwen2 {kind.__name__}": lambda kind=kind: split_on(SPLITS["qwen2"], kind())
        for kind in (normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD, normalizers.Lowercase)
    },
    "gpt2 lowercase nfkc": lambda: with_normalizer(gpt2_like(), [normalizers.NFKC(), normalizers.Lowercase()]),
    "whitespace": lambda: wordpiece(pre_tokenizers.Whitespace()),
    "whitespace split": lambda: wordpiece(pre_tokenizers.WhitespaceSplit()),
    "bert": lambda: wordpiece(pre_tokenizers.BertPreTokenizer(), normalizers.Lowercase()),
    "whitespace, digits": lambda: wordpiece(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)])
    ),
}
NASTY = "aeZtsſKé'\n\r\t  \u00a0\u3000\u200b\u180e\u0085\x1c/.!¨0९Ⅷǅʰ\u0301\u0338\u0345\u200d\ufc5e東カ가😀<|_"


def with_normalizer(core, steps):
    core.normalizer = normalizers.Sequence(steps)
    return core


def nasty_text(rng, num_words=60):
    """Words, line ends and whatever is awkward, so that there are places to cut, and traps beside them."""
    words = [
        "the",
        " cat",
        " sat",
        "'s",
        "'ll go",
        "\n",
        "\r\n",
        "  \n",
        "end.\nNext",
        "x\nÉcole",
        "\n東",
        " <|im_end|>",
        "/\n/",
    ]
    parts = [
        str(rng.choice(words)) if rng.random() < 0.6 else "".join(rng.choice(list(NASTY), rng.integers(1, 5)))
        for _ in range(num_words)
    ]
    return "".join(parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_have_the_ids_of_the_whole(name):
    core, rng = FAMILIES[name](), np.random.default_rng(0)
    core.add_tokens(["<|", "é_"] if name != "char" else [])  # plain tokens are looked for in the text
    whole = Encoder(core, 1 << 20)
    num_cuts = 0
    for _ in range(120):
        text = nasty_text(rng)
        for max_bytes in (24, 64, 200):
            encoder = Encoder(core, max_bytes)
            places = encoder.cuts(text)
            if places is None:
                continue
            num_cuts += len(places) - 1
            sizes = [len(text[a:b].encode()) for a, b in zip([0, *places], places, strict=False)]
            assert places[-1] == len(text) and max(sizes) <= max_bytes
            assert (encoder.encode([text])[0] == whole.encode([text])[0]).all(), (text, places)
    assert num_cuts > 100


@pytest.mark.parametrize("name", [*FAMILIES, "unigram"])
def test_every_single_cut_place_keeps_the_ids(name):
    """All places that a finder offers, one at a time: far more than the last one before a limit."""
    core, rng = {**FAMILIES, "unigram": unigram}[name](), np.random.default_rng(1)
    encoder = Encoder(core)
    if name == "unigram":
        assert encoder.find_cut is None
        return
    for _ in range(30):
        text = nasty_text(rng, 40)
        places = {encoder.find_cut(text, high - 1, high) for high in range(1, len(text))} - {None}
        whole = core.encode(text, add_special_tokens=False).ids
        halves = [part for p in places for part in (text[:p], text[p:])]
        ids = [e.ids for e in core.encode_batch_fast(halves, add_special_tokens=False)]
        assert all(a + b == whole for a, b in zip(ids[::2], ids[1::2], strict=True))


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 100])
def test_the_last_place_before_the_limit_is_found(monkeypatch, stride):
    monkeypatch.setattr(cuts, "STRIDE", stride)
    find_cut = Encoder(gpt2_like()).find_cut
    text = "aa b cc,  d\ne ff g\n\nh i"
    places = [2, 4, 12, 13, 16, 21]  # 12 follows a line feed
    for low in range(len(text)):
        for high in range(low, len(text)):
            assert find_cut(text, low, high) == max((p for p in places if low < p <= high), default=None)


def test_normalizers_keep_what_stands_beside_a_cut():
    """For every character there is: x before a line feed does not become white space, a letter after it stays one."""
    before, after = re.compile(cuts._NOT_BLANK), re.compile(f"[{cuts._letters()}]")
    for char in map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]):
        for form in ("NFC", "NFD") if before.match(char) else ():
            assert before.match(unicodedata.normalize(form, char)[-1])
        if after.match(char):
            for form in ("NFC", "NFD"):
                found = unicodedata.normalize(form, "\n" + char)
                assert found[0] == "\n" and unicodedata.category(found[1])[0] == "L"
            assert unicodedata.category(char.lower()[0])[0] == "L"


NEVER = {
    "dropout": lambda: gpt2_like(dropout=0.1),
    "metaspace": unigram,
    "another regex": lambda: split_on(SPLITS["qwen2"] + "|x"),
    "another normalizer": lambda: split_on(SPLITS["qwen2"], normalizers.Strip()),
    "no pre-tokenizer": lambda: Tokenizer(models.BPE()),
    "blank in a token": lambda: with_token("a b"),
    "blank in a normalised token": lambda: with_token("a\u00a8b"),
    "lstrip": lambda: with_token("<t>", lstrip=True),
    "rstrip": lambda: with_token("<t>", rstrip=True),
    "single word": lambda: with_token("<t>", single_word=True),
    "removed": lambda: removed(),
}


def with_token(content, **kwargs):
    core = gpt2_like()
    core.add_tokens([AddedToken(content, **kwargs)])
    return core


def removed():
    core = gpt2_like()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(SPLITS["qwen2"]), "removed")
    return core


@pytest.mark.parametrize("make", NEVER.values(), ids=NEVER)
def test_tokenizer_without_a_proof_is_never_cut(make):
    encoder = Encoder(make(), 64)
    assert encoder.find_cut is None
    ids, refused = encoder.encode(["the cat", "the cat sat " * 10])
    assert ids is not None and refused is None


def test_char_level_with_a_token_that_is_looked_for_is_not_cut_inside_it():
    core = train_char(["abc \n"]).backend_tokenizer
    core.add_tokens(["abc"])
    assert Encoder(core, 4).encode(["ababc ab"]) == [None]


@pytest.mark.parametrize("name", [*FAMILIES, "unigram"])
def test_ids_are_those_of_transformers(name):
    """No BOS, no EOS, no control token out of text, whatever post-processor, truncation or padding is set."""
    core = {**FAMILIES, "unigram": unigram}[name]()
    core.add_special_tokens(["<|im_end|>", "[MASK]"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    rng = np.random.default_rng(2)
    texts = [*TEXT[:2], "", "\n", *(nasty_text(rng, 30) for _ in range(20))]
    expected = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    core = tokenizer.backend_tokenizer
    core.enable_truncation(3)
    core.enable_padding(length=9)
    assert [ids.tolist() for ids in Encoder(core).encode(texts)] == expected


def test_no_call_encodes_more_than_a_batch_and_a_piece(monkeypatch):
    monkeypatch.setattr(encode, "BATCH_BYTES", 100)
    core = gpt2_like()
    encoder, calls = Encoder(core, 40), []
    monkeypatch.setattr(
        encoder, "_encode_pieces", lambda pieces: calls.append(pieces) or core.encode_batch_fast(pieces)
    )
    texts = ["", "the cat sat on the mat é " * 30, "x" * 41, "a", "x\ny" * 30, ""]
    found = encoder.encode(texts)
    assert [text for call in calls for text in call if len(text.encode()) > 40] == []
    assert max(sum(len(text.encode()) for text in call) for call in calls) < 140 and len(calls) > 7
    assert found[2] is None
    for text, ids in zip(texts, found, strict=True):
        assert ids is None or ids.tolist() == core.encode(text).ids


def test_lone_surrogate_is_an_error_that_shows_it():
    encoder = Encoder(gpt2_like(), where="my.txt")
    with pytest.raises(UserError, match=r"my\.txt: lone surrogate '\\ud800' in 'bc\\ud800d'"):
        encoder.encode(["a", "bc\ud800d"])


@pytest.fixture
def write(tmp_path, letters):
    def write(folder_name, texts, log_probs=None, core=letters.backend_tokenizer, eos_id=1, unk_id=5, **kwargs):
        folder = tmp_path / folder_name
        folder.mkdir()
        writer = StoreWriter(folder, core, eos_id, unk_id, **kwargs)
        for i, text in enumerate(texts):
            writer.write([text], None if log_probs is None else [log_probs[i]])
        writer.close()
        return writer

    return write


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("log_probs", [None, [-1.0, -2.0, -3.0, -4.0], [-1.0, None, -3.0, -4.0]])
def test_merged_parts_are_the_store_of_all_texts(write, letters, tmp_path, log_probs):
    texts = ["ab", "cde", "", "f"]
    whole = write("whole", texts, log_probs)
    some = [None if log_probs is None else log_probs[a:b] for a, b in ((0, 1), (1, 1), (1, 4))]
    parts = [write(f"part{i}", texts[a:b], some[i]) for i, (a, b) in enumerate(((0, 1), (1, 1), (1, 4)))]
    counts = merge_stores([part.folder for part in parts], tmp_path / "merged")
    assert counts == whole.counts() == {"num_documents": 4, "num_tokens": 10, "num_bytes": 6}
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    assert ("tokens.ds.logprob" in files(tmp_path / "whole")) == (log_probs is not None and None not in log_probs)
    store = open_store(tmp_path / "merged", letters)
    assert store.tokens.tolist() == [7, 8, 1, 9, 10, 11, 1, 1, 12, 1] and store.ends.tolist() == [3, 7, 8, 10]


def test_long_documents_are_written_as_if_encoded_whole(write, tmp_path, monkeypatch, bpe):
    text = "the cat sat on the mat " * 50
    monkeypatch.setattr(encode, "BATCH_BYTES", 100)
    monkeypatch.setattr(encode.Encoder.__init__, "__defaults__", (60, "text"))
    core = bpe.backend_tokenizer
    writer = write("store", ["ab", text, "x" * 61, "y"], core=core, unk_id=None)
    ids = [core.encode(t, add_special_tokens=False).ids for t in ("ab", text, "y")]
    assert np.fromfile(tmp_path / "store/tokens.ds", "<u2").tolist() == [i for part in ids for i in [*part, 1]]
    assert (
        np.fromfile(tmp_path / "store/tokens.ds.index", "<u8").tolist() == np.cumsum([len(p) + 1 for p in ids]).tolist()
    )
    assert writer.refused == [(2, 61)] and writer.num_bytes == 2 + len(text) + 1


def test_refused_texts_keep_log_probs_in_step(tmp_path, bpe):
    writer = StoreWriter(tmp_path, bpe.backend_tokenizer, 1)
    writer.write(["a", "x" * 300_000, "b"], [-1.0, -2.0, -3.0])
    writer.write(["x" * 300_001], [-4.0])
    writer.close()
    assert writer.refused == [(1, 300_000), (3, 300_001)]
    assert np.fromfile(tmp_path / "tokens.ds.logprob").tolist() == [-1.0, -3.0]


def test_unknown_character_names_the_text_that_has_it(write):
    with pytest.raises(UserError, match="w: character '!' at position 2 is not in the tokenizer"):
        write("store", ["fine", "ab!"], where="w")


def test_id_above_the_storage_type_is_an_error(write):
    """Ids with a hole: two of them, but the second is 70,000, which 16 bits would store as 4,464."""
    core = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="id 70000 does not fit uint16"):
        write("store", ["a b"], core=core, eos_id=0, unk_id=None)


def test_parts_of_different_tokenizers_are_not_joined(write, tmp_path):
    write("a", ["ab"])
    write("b", ["ab"], name="other")
    with pytest.raises(UserError, match=r"parts of different tokenizers \(llmkit\|2, other\|2\)"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")


def test_part_that_was_cut_short_is_not_joined(write, tmp_path):
    write("a", ["abc"])
    (tmp_path / "a/tokens.ds").write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"a/tokens.ds: holds 1 tokens, its manifest says 4"):
        merge_stores([tmp_path / "a"], tmp_path / "merged")


def test_workers_import_neither_torch_nor_transformers():
    code = (
        "import sys, llmkit.data.encode; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)) == []
