"""The global batch is a pure function of (seed, step), and every token is seen as often as it should be."""

import numpy as np
import pytest
import torch

from llmkit.config import UserError
from llmkit.data.loader import IGNORE, Loader, Rows, permute

BOS, EOS, PAD, X = 0, 1, 2, IGNORE
KEYS = ("input_ids", "shift_labels", "position_ids")


@pytest.fixture
def corpus(make_store):
    """120 documents of 1 to 30 letters; the longer ones do not fit a row of 16."""

    def make(seed=0, num_docs=120, name="corpus"):
        rng = np.random.default_rng(seed)
        words = ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 31, num_docs)]
        return make_store(words, name=f"{name}{seed}")

    return make


def packed(store, context=16, packing="bos_bestfit"):
    return Rows(store, context, packing, BOS, PAD)


@pytest.fixture(params=["bos_bestfit", "contiguous"])
def rows(request, corpus):
    return packed(corpus(), packing=request.param)


@pytest.fixture(params=["epochs", "mixture"])
def loader(request, rows, corpus):
    fractions = [0.7, 0.3] if request.param == "mixture" else None
    return Loader([rows, packed(corpus(1, 40), packing=rows.packing)], 8, seed=3, fractions=fractions)


def equal(batches, others):
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(a[key], b[key]) and a[key].dtype == torch.int64 for a, b in pairs for key in KEYS)


def join(parts):
    return {key: torch.cat([part[key] for part in parts]) for key in KEYS}


def test_permute_is_a_bijection_that_depends_on_the_key():
    for size in [*range(1, 301), 4096, 5000]:
        orders = [permute(np.arange(size), size, key) for key in (0, 1)]
        for order in orders:
            assert sorted(order.tolist()) == list(range(size))
        if size > 10:
            assert (orders[0] != orders[1]).any() and (orders[0] != np.arange(size)).any()


def test_permute_is_seekable_and_leaves_its_argument_alone():
    whole, some = permute(np.arange(1000), 1000, 5), np.array([999, 3, 3, 500])
    assert permute(some, 1000, 5).tolist() == whole[[999, 3, 3, 500]].tolist() and some.tolist() == [999, 3, 3, 500]


def test_permuted_order_is_uncorrelated():
    """Correlation of n points is normal with deviation 1 / sqrt(n - 1); 60 of them stay within 4.2 deviations."""
    n = 4000
    for key in range(20):
        order, other = permute(np.arange(n), n, key), permute(np.arange(n), n, key + 1)
        for a, b in ((np.arange(n), order), (order[:-1], order[1:]), (order, other)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4.2 / np.sqrt(n)


def test_bestfit_rows_as_worked_out_by_hand(make_store):
    """ab (4 places with BOS and EOS), cde (5), f (3) into rows of 8: cde + f, then ab and padding."""
    batch = packed(make_store(["ab", "cde", "f"]), context=7).assemble(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[BOS, 9, 10, 11, EOS, BOS, 12], [BOS, 7, 8, EOS, PAD, PAD, PAD]]
    assert batch["shift_labels"].tolist() == [[9, 10, 11, EOS, X, 12, EOS], [7, 8, EOS, X, X, X, X]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 1, 2]]  # padding is a document
    assert batch["document"].tolist() == [[1, 1, 1, 1, -1, 2, 2], [0, 0, 0, -1, -1, -1, -1]]


def test_long_document_is_cut_into_rows_that_open_with_bos(make_store):
    batch = packed(make_store(["abcdefghij"]), context=4).assemble(np.arange(3))  # 11 tokens: 4 + 4 + 3
    assert batch["input_ids"].tolist() == [[BOS, 7, 8, 9], [BOS, 11, 12, 13], [BOS, 15, 16, EOS]]
    assert batch["shift_labels"].tolist() == [[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, EOS, X]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2 + [[0, 1, 2, 3]]


def test_contiguous_rows_as_worked_out_by_hand(make_store):
    """Stream a b c E d e f g E h E: one row of 4 less than fit, so that every epoch can cut elsewhere."""
    rows = packed(make_store(["abc", "defg", "h"]), 4, "contiguous")
    assert rows.num_rows == (11 - 4) // 4 == 1
    for shift, stream in ((0, [7, 8, 9, EOS, 10]), (3, [EOS, 10, 11, 12, 13])):
        batch = rows.assemble(np.array([0]), shift)
        assert batch["input_ids"].tolist() == [stream[:-1]] and batch["shift_labels"].tolist() == [stream[1:]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]


def test_contiguous_labels_are_the_next_tokens_of_the_stream(corpus):
    rows = packed(corpus(), packing="contiguous")
    stream = rows.store.tokens.astype(int)
    for shift in (0, 1, rows.context - 1):
        batch = rows.assemble(np.arange(rows.num_rows), shift)
        length = rows.num_rows * rows.context
        assert batch["input_ids"].ravel().tolist() == stream[shift : shift + length].tolist()
        assert batch["shift_labels"].ravel().tolist() == stream[shift + 1 : shift + length + 1].tolist()


def test_last_place_of_an_epoch_fits_whatever_the_length(make_store):
    for num_tokens in range(8, 17):
        rows = packed(make_store(["a" * (num_tokens - 1)], name=str(num_tokens)), 4, "contiguous")
        assert rows.assemble(np.array([rows.num_rows - 1]), shift=3)["shift_labels"].shape == (1, 4)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_sweep_predicts_every_token_once(rows, batch_size):
    labels = np.concatenate([batch["shift_labels"] for batch in rows.sweep(batch_size)])
    ids = np.concatenate([batch["input_ids"] for batch in rows.sweep(batch_size)])
    stream, is_label = rows.store.tokens.astype(int), labels != IGNORE
    if rows.packing == "contiguous":  # nothing stands before the first token; the last window is padded
        assert labels[is_label].tolist() == stream[1:].tolist()
        assert ids[is_label].tolist() == stream[:-1].tolist()
        assert (~is_label).sum() == -(len(stream) - 1) % rows.context
    else:
        document = np.concatenate([batch["document"] for batch in rows.sweep(batch_size)])
        assert sorted(labels[is_label].tolist()) == sorted(stream.tolist())
        assert ((document >= 0) == is_label).all()
        assert np.bincount(document[is_label]).tolist() == np.diff(rows.store.ends, prepend=np.uint64(0)).tolist()
        shifted = ids[:, 1:]
        assert (labels[:, :-1][is_label[:, :-1]] == shifted[is_label[:, :-1]]).all()
        assert np.isin(shifted[~is_label[:, :-1]], [BOS, PAD]).all()  # BOS and padding are never learnt


@pytest.mark.parametrize("num_tokens", [8, 9, 12, 13])
def test_last_window_of_a_sweep_may_be_partial(make_store, num_tokens):
    rows = packed(make_store(["a" * (num_tokens - 1)]), 4, "contiguous")
    labels = np.concatenate([batch["shift_labels"] for batch in rows.sweep(2)]).ravel()
    assert labels.tolist()[: num_tokens - 1] == [7] * (num_tokens - 2) + [EOS] and (labels[num_tokens - 1 :] == X).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_slice_the_same_global_batch(loader, world_size):
    for step in (0, 1, 7, 1000):
        parts = [loader.batch(step, rank, world_size) for rank in range(world_size)]
        assert all(len(part["input_ids"]) == 8 // world_size for part in parts)
        assert equal([join(parts)], [loader.batch(step)])


def test_batch_depends_on_seed_and_step_and_nothing_else(loader):
    steps = [0, 3, 10**6, 12, 1, 2]
    forward = [loader.batch(step) for step in steps]
    fresh = Loader(loader.sources, 8, 3, [0.7, 0.3] if loader.pattern is not None else None)
    backward = [fresh.batch(step) for step in reversed(steps)][::-1]
    assert equal(forward, backward)
    other = Loader(loader.sources, 8, 4, [0.7, 0.3] if loader.pattern is not None else None)
    assert not equal(forward, [other.batch(step) for step in steps])
    whole = Loader(loader.sources, 16, 3, [0.7, 0.3] if loader.pattern is not None else None)
    assert equal([join([loader.batch(4), loader.batch(5)])], [whole.batch(2)])  # accumulation sees the same rows


def test_num_labels_is_the_number_of_labels(loader):
    for step in (0, 1, 25, 1000):
        assert loader.num_labels(step) == int((loader.batch(step)["shift_labels"] != IGNORE).sum())


def test_one_epoch_sees_every_row_of_every_source_once_and_the_next_in_another_order(corpus):
    sources = [packed(corpus()), packed(corpus(1, 40))]
    loader = Loader(sources, rows_per_step=1, seed=0)
    assert loader.num_rows == sum(rows.num_rows for rows in sources)
    drawn = [tuple(loader.batch(step)["input_ids"][0].tolist()) for step in range(2 * loader.num_rows)]
    first, second = drawn[: loader.num_rows], drawn[loader.num_rows :]
    expected = [tuple(row) for rows in sources for row in rows.assemble(np.arange(rows.num_rows))["input_ids"].tolist()]
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second and first != expected


def test_one_contiguous_epoch_covers_one_stretch_of_the_stream_and_the_next_another(corpus):
    rows = packed(corpus(), packing="contiguous")
    loader = Loader([rows], rows_per_step=rows.num_rows, seed=0)
    stream, starts = rows.store.tokens.astype(int).tolist(), []
    for epoch in range(3):
        got = sorted(map(tuple, loader.batch(epoch)["input_ids"].tolist()))
        cuts = [
            [tuple(stream[s + r * 16 : s + r * 16 + 16]) for r in range(rows.num_rows)] for s in range(rows.context)
        ]
        starts.append([s for s, cut in enumerate(cuts) if sorted(cut) == got])
    assert all(len(found) == 1 for found in starts) and len({found[0] for found in starts}) > 1


FRACTIONS = [[0.7, 0.3], [0.2, 0.3, 0.5], [1, 1, 2], [0.6, 0.25, 0.1, 0.05], [0.9, 0.04, 0.03, 0.02, 0.01]]


@pytest.mark.parametrize("fractions", FRACTIONS, ids=str)
def test_mixture_keeps_its_fractions_in_every_window(corpus, fractions):
    sources = [packed(corpus(s, 20 + s)) for s in range(len(fractions))]
    loader = Loader(sources, rows_per_step=4, seed=0, fractions=fractions)
    source, _, _ = loader._locate(np.arange(3000))
    share = np.array(fractions) / sum(fractions)
    counts = np.cumsum(source[:, None] == np.arange(len(fractions)), axis=0)  # (3000, sources)
    assert np.abs(counts - share * np.arange(1, 3001)[:, None]).max() < 1
    for start in (0, 1, 371, 1999):
        window = np.bincount(source[start : start + 1000], minlength=len(fractions))
        np.testing.assert_allclose(window, share * 1000, atol=1e-9)


def test_mixture_sees_every_row_of_a_source_once_before_any_row_twice(corpus):
    sources = [packed(corpus()), packed(corpus(1, 40))]
    loader = Loader(sources, rows_per_step=1, seed=0, fractions=[0.25, 0.75])
    source, epoch, index = loader._locate(np.arange(8 * max(rows.num_rows for rows in sources)))
    for s, rows in enumerate(sources):
        orders = index[source == s][: 2 * rows.num_rows].reshape(2, -1)
        assert (np.sort(orders) == np.arange(rows.num_rows)).all() and (orders[0] != orders[1]).any()
        assert epoch[source == s][: 2 * rows.num_rows].tolist() == [0] * rows.num_rows + [1] * rows.num_rows


def test_fraction_that_would_never_be_drawn_is_an_error(corpus):
    """0.04 % rounded to none of the 1000 rows of a period: the source was never read, and nobody was told."""
    with pytest.raises(UserError, match=r"fraction=0\.0004"):
        Loader([packed(corpus()), packed(corpus(1))], 4, seed=0, fractions=[0.0004, 0.9996])


@pytest.mark.parametrize("context", [4, 100])
def test_too_little_text_for_contiguous_rows_is_an_error_that_says_what_fits(make_store, context):
    with pytest.raises(UserError, match=rf"somewhere: 7 tokens .* max_length={context}; allowed: max_length up to 3"):
        packed(make_store(["abcdef"]), context, "contiguous")


def test_four_ranks_together_see_every_row_exactly_once_an_epoch(corpus):
    rows = packed(corpus())
    loader = Loader([rows], rows_per_step=4, seed=0)
    drawn = [
        tuple(loader.batch(step, rank, 4)["input_ids"][0].tolist())
        for step in range(rows.num_rows)
        for rank in range(4)
    ]
    expected = sorted(map(tuple, rows.assemble(np.arange(rows.num_rows))["input_ids"].tolist()))
    for epoch in range(4):
        assert sorted(drawn[epoch * rows.num_rows : (epoch + 1) * rows.num_rows]) == expected
