"""Every character survives, special tokens cannot be forged, and ids stay what they were."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from llmkit.config import UserError
from llmkit.data.tokenizer import (
    CHAT,
    EOS,
    PAD,
    SPECIAL,
    UNK,
    bos_id,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    train_char,
)

TORTURE = [
    "\n",
    "\n\n \n",
    "a\r\nb\rc\r\n\r\n",
    "\t\tif x:\n\t\t\treturn 1  \n",
    "trailing   ",
    "   leading",
    "a  b   c",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "é e\u0301 Å A\u030a ﬁ ½",  # NFC and NFD stay apart
    "שלום \u202eabc\u202c مرحبا",
    "0123456789 1,234.50 ١٢٣ ²",
    "\x00\x01\x7f\ufeff\u200b\U0010ffff\ufffd",
    "it's WE'LL don’t I'M",
    "def f(x): return {'a': [x**2 for _ in range(10)]}  # ok?!\n",
    "日本語のテキスト。한국어",
    "word.\n\n\n  Next",
    "x" * 50,
    "hello world . , ! don 't",  # a decoder that tidies up would close these gaps
    "".join(map(chr, range(32, 127))),
]
FORGED = "a" + "".join([*SPECIAL, UNK]) + "b " + EOS


@pytest.fixture(params=["bpe", "char"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else train_char([*TORTURE, FORGED])


def test_every_text_round_trips_through_a_store(tokenizer, make_store):
    store = make_store([*TORTURE, FORGED], tokenizer)
    bodies = [store.tokens[start : int(end) - 1].tolist() for start, end in zip(store.starts, store.ends, strict=True)]
    assert [tokenizer.decode(ids) for ids in bodies] == [*TORTURE, FORGED]
    special = {tokenizer.convert_tokens_to_ids(token) for token in [*SPECIAL, UNK]}
    assert not special.intersection(id for ids in bodies for id in ids)  # text cannot forge a control token
    assert (store.tokens[store.ends.astype(int) - 1] == tokenizer.eos_token_id).all()


def test_special_tokens_are_single_ids_and_come_first(tokenizer):
    assert [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL] == [[0], [1], [2], [3], [4]]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    assert tokenizer.decode([0, 3, 4, 1], skip_special_tokens=True) == ""
    assert CHAT == ["<|im_start|>", "<|im_end|>"] and SPECIAL[2] == PAD


def test_reloaded_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(str(tmp_path))
    texts = [*TORTURE, FORGED]
    for options in (dict(add_special_tokens=False), dict(split_special_tokens=True), {}):
        assert again(texts, **options)["input_ids"] == tokenizer(texts, **options)["input_ids"]
    assert fingerprint(again) == fingerprint(tokenizer) and again.padding_side == "left"


def test_bpe_reaches_its_vocab_size_and_names_the_smallest_one(bpe):
    assert len(bpe) == 285 and len(train_bpe(["abc"], 261)) == 261
    with pytest.raises(UserError, match=r"vocab_size=260 .* at least 261"):
        train_bpe(["abc"], 260)


@pytest.mark.parametrize("text", [*TORTURE, FORGED])
def test_pre_tokeniser_splits_as_qwen2(bpe, text):
    qwen2 = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    assert bpe.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) == qwen2.pre_tokenize_str(text)


def test_char_vocabulary_is_the_characters_in_code_point_order(letters):
    assert letters("a bz", add_special_tokens=False)["input_ids"] == [7, 6, 8, 32] and len(letters) == 33
    assert letters("a\n", add_special_tokens=False)["input_ids"] == [7, letters.unk_token_id]


def test_unseen_character_is_an_error_that_names_it(make_store):
    with pytest.raises(UserError, match=r"somewhere: character '\\n' at position 3 .* tokenizer_type: bpe"):
        make_store(["fine", "abc\nd"])


def test_fingerprint_changes_with_whatever_changes_ids(bpe, letters):
    renamed = train_char(["abc"])
    renamed.pad_token = renamed.eos_token
    extended = train_char(["abc"])
    extended.add_tokens(["<extra>"])
    texts = ["the cat sat on the mat and a hat " * 3]
    seen = [
        bpe,
        letters,
        train_char(["abc"]),
        train_char(["abd"]),
        renamed,
        extended,
        train_bpe(texts, 262),
        train_bpe(texts, 263),
    ]
    assert len({fingerprint(tokenizer) for tokenizer in seen}) == len(seen)
    assert fingerprint(train_char(["cab"])) == fingerprint(train_char(["abc"]))


def test_padding_a_batch_leaves_the_fingerprint_alone():
    """Truncation and padding are state of the last call: they made a store look like another tokenizer's."""
    tokenizer = train_char(["abc"])
    before = fingerprint(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert fingerprint(tokenizer) == before


def test_tokenizer_that_cannot_be_used_is_one_line_that_names_it(tmp_path):
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    plain.save_pretrained(tmp_path / "plain")
    for name, reason in (("gone", "no tokenizer could be loaded"), ("plain", "no eos_token")):
        with pytest.raises(UserError) as error:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(error.value) and name in str(error.value) and reason in str(error.value)


def test_documents_open_with_eos_where_there_is_no_bos(letters):
    class Qwen:
        bos_token_id, eos_token_id = None, 7

    assert bos_id(letters) == 0 and bos_id(Qwen) == 7
