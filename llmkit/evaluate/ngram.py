"""A count model: what a model must beat to have learnt more than short contexts.

Owns an interpolated n-gram over token ids with Witten-Bell smoothing (Chen & Goodman 1998, §2.5).

    baseline = NgramModel(train_store, order=5, bos_id=0, vocab_size=1024); baseline.loss(store)   # nats per token

`order` counts the tokens of context; contexts stop at the document's BOS. Sorted arrays, no pruning: memory is about
16 bytes per distinct context and order. Leaves out everything a neural model is for.
"""

import numpy as np
from numpy.typing import NDArray

from ..data.shards import Store

MIX = np.uint64(0x9E3779B97F4A7C15)


def _context_hashes(store: Store, order: int, bos_id: int) -> tuple[NDArray[np.uint64], list[NDArray[np.uint64]]]:
    """Token ids and, for each context length 0 .. order, a 64-bit hash of the tokens before each position."""
    tokens = np.asarray(store.tokens, np.uint64)
    nth = np.arange(len(tokens)) - np.repeat(store.starts, np.diff(np.append(store.starts, len(tokens))))
    hashes = [np.zeros(len(tokens), np.uint64)]
    for back in range(1, order + 1):
        earlier = np.full(len(tokens), bos_id, np.uint64)  # at and beyond the start of the document
        earlier[back:] = np.where(nth[back:] >= back, tokens[:-back], np.uint64(bos_id))
        mixed = (hashes[-1] + earlier + np.uint64(1)) * MIX
        hashes.append(mixed ^ (mixed >> np.uint64(31)))
    return tokens, hashes


def _lookup(keys: NDArray[np.uint64], values: NDArray[np.int64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


class NgramModel:
    def __init__(self, store: Store, order: int, bos_id: int, vocab_size: int):
        self.order, self.bos_id, self.vocab_size = order, bos_id, vocab_size
        tokens, hashes = _context_hashes(store, order, bos_id)
        self.tables = []
        for context in hashes:
            pairs, first, pair_counts = np.unique((context + tokens) * MIX, return_index=True, return_counts=True)
            contexts, totals = np.unique(context, return_counts=True)
            kinds = np.unique(context[first], return_counts=True)[1]  # distinct followers of each context
            self.tables.append((pairs, pair_counts, contexts, totals, kinds))

    def loss(self, store: Store) -> float:
        """Mean -log p in nats per token, EOS included."""
        tokens, hashes = _context_hashes(store, self.order, self.bos_id)
        p = np.full(len(tokens), 1 / self.vocab_size)
        for context, (pairs, pair_counts, contexts, totals, kinds) in zip(hashes, self.tables, strict=True):
            seen, followers = _lookup(contexts, totals, context), _lookup(contexts, kinds, context)
            count = _lookup(pairs, pair_counts, (context + tokens) * MIX)
            p = np.where(seen > 0, (count + followers * p) / np.maximum(1, seen + followers), p)
        return float(-np.log(p).mean())
