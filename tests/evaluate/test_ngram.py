"""The count model against dictionaries, and its smallest case by hand."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from llmkit.data.shards import build_store
from llmkit.data.sources import Doc
from llmkit.data.tokenizer import train_char
from llmkit.evaluate.ngram import NgramModel

BOS, EOS = 0, 1
TRAIN = ["abab", "aab", "ba", "abcab", "c", "bbbbbb", "abab"]
OTHER = ["ab", "cabd", "bbc", "d", "abab"]  # d was never seen in training


@pytest.fixture
def make_store(tmp_path):
    def make(texts):
        docs = [Doc(text, None) for text in texts]
        return build_store(docs, train_char(["abcd"]), tmp_path / "".join(texts), "hash", "somewhere")

    return make


def witten_bell(train, other, order: int, vocab_size: int) -> float:
    """Mean -log p: p_k = (count + followers * p_{k-1}) / (total + followers), p_{-1} = 1 / V (Chen & Goodman 1998)."""

    def events(store):
        for start, end in zip(store.starts, store.ends.astype(int), strict=True):
            padded = [BOS] * order + store.tokens[start:end].tolist()
            for t in range(order, len(padded)):
                yield [tuple(padded[t - k : t]) for k in range(order + 1)], padded[t]

    counts: dict[tuple, Counter] = defaultdict(Counter)
    for contexts, token in events(train):
        for context in contexts:
            counts[context][token] += 1
    nats = []
    for contexts, token in events(other):
        p = 1 / vocab_size
        for context in contexts:
            if context in counts:
                total, followers = counts[context].total(), len(counts[context])
                p = (counts[context][token] + followers * p) / (total + followers)
        nats.append(-math.log(p))
    return sum(nats) / len(nats)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("texts", [OTHER, TRAIN], ids=["other", "train"])
def test_loss_equals_dictionaries(make_store, order, texts):
    train, other = make_store(TRAIN), make_store(texts)
    model = NgramModel(train, order, BOS, vocab_size=40)
    assert model.loss(other) == pytest.approx(witten_bell(train, other, order, 40), abs=1e-9)


def test_order_zero_as_worked_out_by_hand(make_store):
    """Seen: a a b EOS, so 4 tokens of 3 kinds; V = 10. p(a) = (2 + 3/10) / 7, p(EOS) = 1.3 / 7, unseen c: 0.3 / 7."""
    model = NgramModel(make_store(["aab"]), 0, BOS, vocab_size=10)
    expected = -(math.log(2.3 / 7) + math.log(0.3 / 7) + math.log(1.3 / 7)) / 3
    assert model.loss(make_store(["ac"])) == pytest.approx(expected, abs=1e-12)


def test_probabilities_of_all_continuations_sum_to_one(make_store):
    model = NgramModel(make_store(TRAIN), 2, BOS, vocab_size=10)

    class Text:
        def __init__(self, *ids):
            self.tokens, self.starts = np.array(ids, np.uint16), np.array([0])

    for head in ([6, 7], [7, 7], [9, 6], [8, 8]):  # ids 6 to 9 are a to d
        nats = 2 * model.loss(Text(*head))
        total = sum(math.exp(nats - 3 * model.loss(Text(*head, x))) for x in range(10))
        assert total == pytest.approx(1, abs=1e-9)


def test_context_never_reaches_into_the_document_before(make_store):
    train = make_store(TRAIN)
    model = NgramModel(train, 3, BOS, vocab_size=40)
    one, two = make_store(["ab"]), make_store(["cab"])
    both = make_store(["ab", "cab"])
    expected = (3 * model.loss(one) + 4 * model.loss(two)) / 7
    assert model.loss(both) == pytest.approx(expected, abs=1e-12)
