"""The measurement against a naive loop: each document alone after a BOS, or plain windows of the stream."""

import math

import numpy as np
import pytest
import torch
from helpers import random_ids, tiny_model

from llmkit.data.loader import Rows
from llmkit.data.shards import build_store
from llmkit.data.sources import Doc
from llmkit.data.tokenizer import train_char
from llmkit.evaluate import perplexity
from llmkit.evaluate.perplexity import score_rows, token_losses

BOS, EOS, PAD = 0, 1, 2
CONTEXT = 12
TEXTS = ["ab", "hgfedcba", "é", "a" * 30, "cafébabe", "bad cab", "gh" * 7, "f", "deaf dad", "bead"]


@pytest.fixture
def make_rows(tmp_path):
    def make(packing, log_probs=None, texts=TEXTS, context=CONTEXT):
        docs = [Doc(text, log_probs[i] if log_probs else None) for i, text in enumerate(texts)]
        tokenizer = train_char(["abcdefgh é"])
        store = build_store(docs, tokenizer, tmp_path / f"{packing}{bool(log_probs)}", "hash", "somewhere")
        return Rows(store, context, packing, BOS, PAD)

    return make


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@torch.no_grad()
def surprise(model, ids: list[int]) -> np.ndarray:
    """-log p in nats of ids[1:], in float64 from the logits of one row alone."""
    log_p = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double().log_softmax(-1)
    return -log_p[range(len(ids) - 1), ids[1:]].numpy()


def naive_documents(model, store, context=CONTEXT) -> list[np.ndarray]:
    """Per document the surprise of each token; longer documents in pieces that each open with a BOS."""
    out = []
    for start, end in zip(store.starts, store.ends.astype(int), strict=True):
        ids = store.tokens[start:end].tolist()
        pieces = [ids[at : at + context] for at in range(0, len(ids), context)]
        out.append(np.concatenate([surprise(model, [BOS, *piece]) for piece in pieces]))
    return out


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_packed_loss_equals_each_document_alone(model, make_rows, batch_size):
    rows = make_rows("bos_bestfit")
    alone = naive_documents(model, rows.store)
    score = score_rows(model, rows, batch_size, EOS)
    assert score.num_tokens == rows.store.num_tokens == sum(map(len, alone))
    assert score.loss == pytest.approx(np.concatenate(alone).mean(), abs=1e-5)
    assert (score.entropy, score.gap, score.gap_stderr) == (None, None, None)


@pytest.mark.filterwarnings(
    "error"
)  # a window of its own batch was a read-only array, and torch complained to the user
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_contiguous_loss_equals_naive_windows(model, make_rows, batch_size):
    rows = make_rows("contiguous")
    stream = rows.store.tokens.tolist()
    windows = [surprise(model, stream[at : at + CONTEXT + 1]) for at in range(0, len(stream) - 1, CONTEXT)]
    score = score_rows(model, rows, batch_size, EOS)
    assert score.num_tokens == len(stream) - 1
    assert score.loss == pytest.approx(np.concatenate(windows).mean(), abs=1e-5)


@pytest.mark.parametrize("packing", ["bos_bestfit", "contiguous"])
def test_bits_per_byte_leave_eos_out_and_count_utf8_bytes(model, make_rows, packing):
    rows = make_rows(packing)
    num_bytes = sum(map(len, TEXTS)) + 2  # two é of two bytes
    if packing == "bos_bestfit":
        nats = sum(part[:-1].sum() for part in naive_documents(model, rows.store))
    else:
        stream = rows.store.tokens.tolist()
        windows = [surprise(model, stream[at : at + CONTEXT + 1]) for at in range(0, len(stream) - 1, CONTEXT)]
        nats = np.concatenate(windows)[np.array(stream[1:]) != EOS].sum()
    expected = nats / math.log(2) / num_bytes
    assert score_rows(model, rows, 3, EOS).bits_per_byte == pytest.approx(expected, abs=1e-5)


def test_uniform_model_scores_ln_V_and_as_many_bits(make_rows):
    uniform = tiny_model()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    score = score_rows(uniform, make_rows("bos_bestfit"), 4, EOS)
    num_letters = sum(map(len, TEXTS))
    assert score.loss == pytest.approx(math.log(97), abs=1e-6)
    assert score.bits_per_byte == pytest.approx(num_letters * math.log2(97) / (num_letters + 2), abs=1e-5)


def test_gap_and_its_standard_error_come_from_documents(model, make_rows):
    log_probs = [-2.5 * i - 1 for i in range(len(TEXTS))]
    rows = make_rows("bos_bestfit", log_probs, context=60)
    excess = [part.sum() + log_p for part, log_p in zip(naive_documents(model, rows.store, 60), log_probs, strict=True)]
    score = score_rows(model, rows, 3, EOS)
    n, mean = len(excess), sum(excess) / len(excess)
    assert score.entropy == pytest.approx(-sum(log_probs) / rows.store.num_tokens)
    assert score.gap == pytest.approx(sum(excess) / rows.store.num_tokens, abs=1e-5)
    variance = sum((x - mean) ** 2 for x in excess) / (n - 1)
    assert score.gap_stderr == pytest.approx(math.sqrt(n * variance) / rows.store.num_tokens, abs=1e-5)
    assert list(score.to_dict()) == ["loss", "bits_per_byte", "entropy", "gap_stderr"]


@pytest.mark.parametrize("packing", ["contiguous", "bos_bestfit"])
def test_documents_that_are_cut_have_no_entropy_to_reach(packing, model, make_rows):
    rows = make_rows(packing, [-1.0] * len(TEXTS))
    assert rows.plan is None or rows.plan.num_restarts > 0
    score = score_rows(model, rows, 4, EOS)
    assert score.entropy is None and score.gap is None and score.gap_stderr is None


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_as_it_was_and_without_dropout(make_rows, training):
    model = tiny_model(attention_dropout=0.5).train(training)
    rows = make_rows("bos_bestfit")
    scores = [score_rows(model, rows, 2, EOS).loss for _ in range(2)]
    assert model.training == training and all(m.training == training for m in model.modules())
    assert scores[0] == scores[1] == score_rows(tiny_model(), rows, 2, EOS).loss
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"final_logit_softcapping": 5.0}], ids=str)
def test_a_head_cut_into_chunks_gives_the_same_losses_and_gradients(options, monkeypatch):
    """20 positions in chunks of 7; some labels are ignored."""
    results = []
    ids = random_ids(2, 11)
    labels = ids[:, 1:].masked_fill(torch.arange(10) % 4 == 0, -100)
    batch = {"input_ids": ids[:, :-1], "shift_labels": labels}
    for size in (None, 7):
        monkeypatch.setattr(perplexity, "chunk_tokens", lambda *_, size=size: size)
        model = tiny_model(**options).train()
        losses = token_losses(model, batch, isolate=False)
        (losses * torch.arange(20.0).view(2, 10)).sum().backward()
        results.append([losses, *(p.grad for p in model.parameters())])
    assert results[0][0].shape == (2, 10) and (results[1][0][labels == -100] == 0).all()
    for whole, cut in zip(*results, strict=True):
        assert torch.allclose(whole, cut, atol=1e-5)


def test_only_large_vocabularies_are_cut():
    cpu = torch.device("cpu")
    assert perplexity.chunk_tokens(65, 12 * 64, cpu) is None and perplexity.chunk_tokens(32768, 4096, cpu) is None
    assert perplexity.chunk_tokens(32768, 4097, cpu) == 512 and perplexity.chunk_tokens(2**25, 4097, cpu) == 1


def test_the_head_really_sees_chunks_and_no_logits_are_kept(monkeypatch):
    ids, seen = random_ids(2, 11), []
    monkeypatch.setattr(perplexity, "chunk_tokens", lambda *_: 7)
    model = tiny_model().train()
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    losses = token_losses(model, {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}, isolate=False)
    assert seen == [7, 7, 6]
    losses.sum().backward()
    assert sorted(seen[3:]) == [6, 7, 7]  # once more in backward


def test_a_cut_head_keeps_documents_apart(monkeypatch):
    ids, results = random_ids(2, 13), []
    positions = torch.arange(12).remainder(6).expand(2, 12).contiguous()
    batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "position_ids": positions}
    for size in (None, 5):
        monkeypatch.setattr(perplexity, "chunk_tokens", lambda *_, size=size: size)
        results.append([token_losses(tiny_model(), batch, isolate=isolate) for isolate in (True, False)])
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert not torch.allclose(results[1][0], results[1][1], atol=1e-3)


def test_a_wrapped_model_is_cut_too(monkeypatch):
    """DDP hides config behind .module."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    ids, model = random_ids(2, 11), tiny_model()
    batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
    monkeypatch.setattr(perplexity, "chunk_tokens", lambda *_: 7)
    assert torch.equal(token_losses(Wrapper(model), batch, False), token_losses(model, batch, False))


@pytest.mark.parametrize("num_processes", [2, 3, 4, 5])
def test_every_rank_takes_every_turn_and_counts_its_own_share_only(num_processes, model, make_rows):
    """Sharded weights: a rank without a batch left must take part, or the others wait for ever."""

    class Part:
        def __init__(self, rank, sums):
            self.num_processes, self.process_index, self.sums = num_processes, rank, sums

        def reduce(self, x):
            self.sums.append(x)
            return x

    rows, parts, turns, calls = make_rows("bos_bestfit", [-1.0] * len(TEXTS)), [], [], []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for rank in range(num_processes):
        parts.append([])
        calls.clear()
        score_rows(model, rows, 1, EOS, Part(rank, parts[-1]))
        turns.append(len(calls))
    (nats, _, count), whole = sum(sums[0] for sums in parts).tolist(), score_rows(model, rows, 1, EOS)
    assert (nats / count, count) == (pytest.approx(whole.loss, abs=1e-12), whole.num_tokens)
    assert len(set(turns)) == 1
