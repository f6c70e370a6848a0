"""Is one column better than another? Paired on the same items, so that what both find hard says nothing.

Owns the bootstrap of a difference of means.   pair = compare(values, others);  pair.flag  ->  "gained" | "lost" | None

Resamples the items (Efron 1979; paired: Koehn 2004, "Statistical significance tests for machine translation
evaluation"). Leaves out metrics that are no mean over items.
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
    p: float  # two-sided: twice the share of draws on the other side of 0
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
    point, draws = 0.0, np.zeros(DRAWS)
    for k, share in enumerate(shares):
        gap = np.asarray(values[k], np.float64) - np.asarray(others[k], np.float64)
        weight = np.ones(len(gap)) if weights is None else np.asarray(weights[k], np.float64)
        point += share * gap.sum() / weight.sum()
        draws += share * _resampled(gap, weight, rng)
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    p = min(1.0, 2 * float(min(np.mean(draws <= 0), np.mean(draws >= 0))))
    is_up = low > 0 if higher_is_better else high < 0
    is_down = high < 0 if higher_is_better else low > 0
    return Pair(float(point), float(low), float(high), p, "gained" if is_up else "lost" if is_down else None)


def _resampled(gap: NDArray[np.float64], weight: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """(DRAWS,) figures of resampled items. Equal items are drawn together: 14,000 answers, right or wrong, are 3."""
    kinds, counts = np.unique(np.stack([gap, weight]), axis=1, return_counts=True)
    n, out = len(gap), np.empty(DRAWS)
    step = max(1, 20_000_000 // len(counts))
    for start in range(0, DRAWS, step):
        drawn = rng.multinomial(n, counts / n, size=min(step, DRAWS - start)).astype(np.float64)
        out[start : start + len(drawn)] = (drawn @ kinds[0]) / (drawn @ kinds[1])
    return out
