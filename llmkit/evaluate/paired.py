"""Is one column better than another? Paired on the same items, so that what both find hard says nothing.

Owns the bootstrap of a difference of means.   pair = compare(values, others);  pair.flag  ->  "gained" | "lost" | None

The interval resamples the items (Efron 1979; paired: Koehn 2004, "Statistical significance tests for machine
translation evaluation") and is widened to hold 0 where p is not below 5 %; p swaps the columns at random, item by item
(Fisher 1935). On their own, such intervals flag up to 8 % of nothing where a dozen items differ. Leaves out metrics
that are no mean over items.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Pair:
    """Of `value - other`; the interval holds 95 % of the resampled differences."""

    difference: float
    low: float
    high: float
    p: float  # two-sided: the share of swaps with as large a difference
    flag: str | None  # gained | lost: the interval does not hold 0


def compare(
    values: list[NDArray[np.float64]],
    others: list[NDArray[np.float64]],
    higher_is_better: bool = True,
    weights: list[NDArray[np.float64]] | None = None,
    by_size: bool = True,
    seed: int = 0,
) -> Pair:
    """Per task of a group its items (N,), the same items in both; one task is a list of one.

    A task's figure is the mean of its items, or sum(values) / sum(weights), e.g. nats over bytes. `by_size`: the
    group's figure counts every item the same; else every task. Items are resampled inside their task.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([len(v) for v in values], np.float64)
    shares = sizes / sizes.sum() if by_size else np.full(len(sizes), 1 / len(sizes))
    point, draws, swapped = 0.0, np.zeros(DRAWS), np.zeros(DRAWS)
    for k, share in enumerate(shares):
        gap = np.asarray(values[k], np.float64) - np.asarray(others[k], np.float64)
        weight = np.ones(len(gap)) if weights is None else np.asarray(weights[k], np.float64)
        point += share * gap.sum() / weight.sum()
        draws += share * _resampled(gap, weight, rng)
        swapped += share * _swapped(gap, rng) / weight.sum()
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    p = (1 + int(np.sum(np.abs(swapped) >= abs(point) - 1e-12))) / (DRAWS + 1)
    if p >= LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    is_up, is_down = (low > 0, high < 0) if higher_is_better else (high < 0, low > 0)
    flag = "gained" if is_up else "lost" if is_down else None
    return Pair(float(point), float(low), float(high), p, flag)


def _resampled(gap: NDArray[np.float64], weight: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """(DRAWS,) figures of resampled items. Equal items are drawn together: 14,000 answers, right or wrong, are 3."""
    kinds, counts = np.unique(np.stack([gap, weight]), axis=1, return_counts=True)
    n, out = len(gap), np.empty(DRAWS)
    step = max(1, 20_000_000 // len(counts))
    for start in range(0, DRAWS, step):
        drawn = rng.multinomial(n, counts / n, size=min(step, DRAWS - start)).astype(np.float64)
        out[start : start + len(drawn)] = (drawn @ kinds[0]) / (drawn @ kinds[1])
    return out


def _swapped(gap: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """(DRAWS,) sums of the gaps with random signs."""
    sizes, counts = np.unique(np.abs(gap[gap != 0]), return_counts=True)
    out = np.zeros(DRAWS)
    for size, count in zip(sizes, counts, strict=True):
        out += size * (2.0 * rng.binomial(count, 0.5, DRAWS) - count)
    return out
