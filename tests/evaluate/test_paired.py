"""The paired bootstrap: figures by hand, and how often it is wrong where there is nothing to find."""

import numpy as np
import pytest

from llmkit.evaluate.paired import DRAWS, compare


def arrays(*rows):
    return [np.array(row, np.float64) for row in rows]


def test_the_difference_is_that_of_the_means():
    pair = compare(arrays([1, 1, 0, 1]), arrays([1, 0, 0, 0]))
    assert pair.difference == 0.5
    assert pair.low <= 0.5 <= pair.high


def test_equal_columns_differ_by_nothing_for_sure():
    pair = compare(arrays([1, 0, 1, 1]), arrays([1, 0, 1, 1]))
    assert (pair.difference, pair.low, pair.high, pair.p, pair.flag) == (0, 0, 0, 1, None)


def test_pairing_sees_what_two_standard_errors_hide():
    """30 of 1,000 items lost and none gained: 0.500 ± 0.016 beside 0.470 ± 0.016, and no doubt about it."""
    before = np.repeat([1.0, 0.0], 500)
    after = before.copy()
    after[:30] = 0
    pair = compare([after], [before])
    assert pair.flag == "lost" and pair.p < 0.001
    assert pair.high < -0.015


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Against resampling item by item, written out."""
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 2, 80).astype(float), rng.integers(0, 2, 80).astype(float)
    gap = a - b
    plain = gap[rng.integers(0, 80, (40_000, 80))].mean(axis=1)
    pair = compare([a], [b])
    assert pair.low == pytest.approx(np.quantile(plain, 0.025), abs=0.0126)  # one item of 80 is 0.0125
    assert pair.high == pytest.approx(np.quantile(plain, 0.975), abs=0.0126)


def test_lower_is_better_turns_the_flag():
    low, high = arrays([1, 1, 1, 1, 1, 1.1]), arrays([2, 2, 2, 2, 2, 2.1])
    assert compare(low, high, higher_is_better=False).flag == "gained"
    assert compare(high, low, higher_is_better=False).flag == "lost"
    assert compare(low, high, higher_is_better=True).flag == "lost"


def test_weights_make_a_ratio_of_sums():
    """Bits over bytes: (10 - 8 + 4 - 3) / (5 + 10)."""
    pair = compare(arrays([10, 4]), arrays([8, 3]), False, arrays([5, 10]))
    assert pair.difference == pytest.approx(3 / 15)


@pytest.mark.parametrize("by_size, expected", [(True, (1 + 0) / 5), (False, (1 / 1 + 0 / 4) / 2)])
def test_a_group_counts_items_or_tasks(by_size, expected):
    pair = compare(arrays([1], [1, 0, 1, 0]), arrays([0], [1, 0, 1, 0]), by_size=by_size)
    assert pair.difference == pytest.approx(expected)


def test_a_group_resamples_inside_its_tasks():
    """One task always gains, the other never moves: there is nothing uncertain about their mean."""
    ones, zeros = [1] * 8, [0] * 8
    pair = compare(arrays(ones, zeros), arrays(zeros, zeros), by_size=False)
    assert (pair.low, pair.high) == (0.5, 0.5)


@pytest.mark.parametrize("num_items, least", [(60, 0.0), (400, 0.02)])
def test_it_flags_about_one_in_twenty_where_there_is_nothing(num_items, least):
    """Columns swapped at random, item by item, 300 times: 5 %, and fewer where a dozen items differ; binomial noise."""
    rng = np.random.default_rng(0)
    a = (rng.random(num_items) < 0.6).astype(float)
    b = np.where(rng.random(num_items) < 0.8, a, 1 - a)
    flags = 0
    for k in range(300):
        swap = rng.random(num_items) < 0.5
        flags += compare([np.where(swap, a, b)], [np.where(swap, b, a)], seed=k).flag is not None
    assert least <= flags / 300 <= 0.08


def test_many_different_values_are_drawn_in_parts():
    rng = np.random.default_rng(1)
    a = rng.normal(size=3000)
    pair = compare([a + 0.1], [a])
    assert pair.difference == pytest.approx(0.1) and pair.flag == "gained"
    assert DRAWS == 10_000


def test_five_items_of_a_hundred_lost_and_none_gained_is_not_enough():
    """By hand: five coins fall on one side in 2 of 32 throws, 6.25 %; six in 3.1 %."""
    before = np.ones(100)
    for num_lost, flag in ((5, None), (6, "lost")):
        after = before.copy()
        after[:num_lost] = 0
        pair = compare([after], [before])
        assert pair.p == pytest.approx(2 / 2**num_lost, abs=0.01)
        assert (pair.flag, pair.high < 0) == (flag, flag is not None)
