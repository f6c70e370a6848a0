"""A tokenizer whose ids can be written by hand, and stores of a few words.

letters: 0..4 are BOS, EOS, PAD and the chat marks, 5 is <|unk|>, 6 is the space, then a = 7, b = 8, ... z = 32.
"""

import string

import pytest

from llmkit.data.shards import build_store
from llmkit.data.sources import Doc
from llmkit.data.tokenizer import train_bpe, train_char


@pytest.fixture(scope="session")
def letters():
    return train_char([" " + string.ascii_lowercase])


@pytest.fixture(scope="session")
def bpe():
    return train_bpe(["the cat sat on the mat, and the dog ran after the cat; it's 1234 o'clock\n"] * 20, 285)


@pytest.fixture
def make_store(tmp_path, letters):
    def make(texts, tokenizer=letters, name="store", log_probs=None):
        docs = [Doc(text, log_probs[i] if log_probs else None) for i, text in enumerate(texts)]
        return build_store(docs, tokenizer, tmp_path / name, "hash of " + name, "somewhere")

    return make
