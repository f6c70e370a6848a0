"""Perplexity of raw text: windows by hand, lm-eval's own, and the figures that training gives."""

import math

import numpy as np
import pytest
import tiny
import torch

from llmkit.config import UserError
from llmkit.data.loader import IGNORE
from llmkit.evaluate.texts import score_texts, windows

X = IGNORE


def test_windows_by_hand():
    assert windows([5, 6], 1, 9, 4) == [([1, 5, 6], [5, 6, 9])]
    assert windows([5, 6, 7, 8], 1, 9, 4) == [([1, 5, 6, 7], [5, 6, 7, 8]), ([5, 6, 7, 8], [X, X, X, 9])]
    assert windows([2, 3, 4, 5, 6], 1, 9, 3) == [([1, 2, 3], [2, 3, 4]), ([3, 4, 5], [X, 5, 6]), ([4, 5, 6], [X, X, 9])]
    assert windows([], 1, 9, 4) == [([1], [9])]


@pytest.mark.parametrize("length", [1, 4, 5, 7, 8, 9, 23])
def test_windows_are_those_of_lm_eval(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(100, 100 + length))
    theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, 1, 8, 1)]
    ours = [(i, [t for t in labels if t not in (X, 9)]) for i, labels in windows(ids, 1, 9, 8)]
    ours = [(i, labels) for i, labels in ours if labels]
    assert [labels for _, labels in ours] == [scored for _, scored in theirs]
    for (inputs, labels), (context, scored) in zip(ours, theirs, strict=True):
        seen = [*context, *scored][:-1]
        assert inputs[: len(seen)] == seen and len(inputs) - len(seen) in (0, 1)  # the last one predicts EOS too
        assert labels == scored


def test_a_text_is_scored_token_by_token():
    """Against one forward pass per prefix."""
    model, tokenizer = tiny.llama().eval(), tiny.bpe_tokenizer(bos=True)
    texts = ["The red cat sings.", "one two", "The old river runs. blue, large!"]
    scores = score_texts(model, tokenizer, texts, 64, 2)
    for k, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        nats = []
        for at, target in enumerate([*ids, tokenizer.eos_token_id]):
            logits = model(torch.tensor([[1, *ids[:at]]])).logits[0, -1]
            nats.append(-logits.log_softmax(-1)[target].item())
        assert scores.nats[k] == pytest.approx(sum(nats[:-1]), abs=1e-4)
        assert scores.eos_nats[k] == pytest.approx(nats[-1], abs=1e-4)
        assert (scores.num_tokens[k], scores.num_bytes[k]) == (len(ids), len(text))
    total = scores.nats.sum() + scores.eos_nats.sum()
    assert scores.loss == pytest.approx(total / (scores.num_tokens.sum() + 3))
    assert scores.bits_per_byte == pytest.approx(scores.nats.sum() / math.log(2) / sum(map(len, texts)))


def test_the_batch_changes_nothing():
    model, tokenizer = tiny.llama(), tiny.bpe_tokenizer()
    texts = [("The red cat. " * n)[: 7 * n] for n in range(1, 9)]
    one, many = (score_texts(model, tokenizer, texts, 16, size) for size in (1, 8))
    assert one.nats == pytest.approx(many.nats, abs=1e-4)
    assert model.training  # as it was


def test_bytes_are_those_of_utf8():
    scores = score_texts(tiny.llama(), tiny.bpe_tokenizer(), ["é€😀"], 64, 1)
    assert scores.num_bytes[0] == 2 + 3 + 4


def test_the_standard_error_is_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(tiny.WORDS, rng.integers(3, 30))) for _ in range(200)]
    scores = score_texts(tiny.llama(), tiny.bpe_tokenizer(), texts, 64, 50)
    drawn = rng.integers(0, 200, (4000, 200))
    nats, sizes = scores.nats + scores.eos_nats, scores.num_tokens + 1
    losses = nats[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert scores.stderr == pytest.approx(losses.std(), rel=0.1)
    assert score_texts(tiny.llama(), tiny.bpe_tokenizer(), ["The"], 64, 1).stderr is None


def test_nan_is_refused():
    model = tiny.llama()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="the loss of 1 of 1 documents is NaN"):
        score_texts(model, tiny.bpe_tokenizer(), ["The red"], 64, 1)
