"""Rows for training: the global batch is a pure function of (seed, step).

Owns order, mixture and assembly of rows. Ranks slice the same global batch, so any world size sees the same data in
the same order and resuming needs no state and no replay: just ask for the step.

    loader = Loader([Rows(store, 256, "bos_bestfit", bos, pad)], rows_per_step=32, seed=0)
    batch = loader.batch(step)        # the whole global batch; loader.batch(step, rank=1, world_size=4) a quarter of it

A batch holds input_ids and shift_labels, (B, T) int64: shift_labels[t] is the token after input_ids[t], -100 where
nothing is learnt (padding, and the BOS that opens the next document). Leaves out the device.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import UserError
from .shards import RowPlan, Store, plan_rows

IGNORE = -100


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """A seekable random permutation of range(size): a 6-round Feistel network with cycle walking.

    Any index costs the same, whatever the size, so nothing is shuffled in memory (Black & Rogaway 2002, §3).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    round_keys = np.frombuffer(hashlib.sha256(str(key).encode()).digest() * 2, "<u8")[:6]
    out = np.asarray(index, np.uint64).copy()
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for round_key in round_keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo = out >= size
    return out.astype(np.int64)


@dataclass
class Rows:
    """The rows of one store under one packing."""

    store: Store
    context: int
    packing: str
    bos_id: int
    pad_id: int
    plan: RowPlan | None = None

    def __post_init__(self) -> None:
        if self.packing == "bos_bestfit":
            self.plan = plan_rows(self.store, self.context)
        elif self.store.num_tokens < 2 * self.context:
            count, where = self.store.num_tokens, self.store.manifest.get("source", self.store.folder)
            raise UserError(
                f"{where}: {count} tokens are too few for rows of max_length={self.context}; "
                f"allowed: max_length up to {count // 2}, or more text"
            )

    @property
    def entropy(self) -> float | None:
        """True nats per token, or None: not known, or out of reach because documents are cut into several pieces."""
        return self.store.entropy if self.plan and not self.plan.num_restarts else None

    @property
    def num_rows(self) -> int:
        """contiguous leaves room for a shift: less than two contexts of every epoch are not seen in that epoch."""
        return self.plan.num_rows if self.plan else (self.store.num_tokens - self.context) // self.context

    def first(self, count: int) -> "Rows":
        """The first rows only."""
        few = copy.copy(self)
        if self.plan is not None:
            few.plan = dataclasses.replace(self.plan, rows=self.plan.rows[: count + 1])
        else:
            few.store = dataclasses.replace(self.store, tokens=self.store.tokens[: (count + 1) * self.context])
        return few

    def assemble(self, indices: NDArray[np.int64], shift: int = 0) -> dict[str, NDArray[np.int64]]:
        """input_ids, shift_labels, position_ids (B, T) and document (B, T), the document a label belongs to, or -1."""
        if self.plan is None:
            starts = np.asarray(indices)[:, None] * self.context + shift + np.arange(self.context + 1)
            full = self.store.tokens[starts].astype(np.int64)  # (B, T + 1)
            positions = np.broadcast_to(np.arange(self.context), (len(full), self.context))
            return {"input_ids": full[:, :-1], "shift_labels": full[:, 1:], "position_ids": positions}
        shape = (len(indices), self.plan.capacity)
        full, labels = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        positions, document = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        for b, r in enumerate(indices):
            at = 0
            for start, length, doc in self.plan.pieces[self.plan.rows[r] : self.plan.rows[r + 1]]:
                end = at + length + 1
                full[b, at] = self.bos_id
                full[b, at + 1 : end] = labels[b, at + 1 : end] = self.store.tokens[start : start + length]
                positions[b, at:end] = np.arange(length + 1)
                document[b, at + 1 : end] = doc
                at = end
            positions[b, at:] = np.arange(shape[1] - at)  # padding is a document of its own
        return {
            "input_ids": full[:, :-1],
            "shift_labels": labels[:, 1:],
            "position_ids": positions[:, :-1],
            "document": document[:, 1:],
        }

    def sweep(self, batch_size: int) -> Iterator[dict[str, NDArray[np.int64]]]:
        """Batches that predict every token of the store once: all rows, or windows that do not overlap."""
        if self.plan is not None:
            for first in range(0, self.num_rows, batch_size):
                yield self.assemble(np.arange(first, min(first + batch_size, self.num_rows)))
            return
        num_labels = self.store.num_tokens - 1  # nothing stands before the first token
        for first in range(0, num_labels, batch_size * self.context):
            count = min(batch_size * self.context, num_labels - first)
            width = -(-count // self.context) * self.context
            span = np.pad(self.store.tokens[first : first + count + 1].astype(np.int64), (0, width - count))
            labels = span[1:].copy()
            labels[count:] = IGNORE
            shape = (-1, self.context)
            positions = np.broadcast_to(np.arange(self.context), (width // self.context, self.context))
            yield {
                "input_ids": span[:-1].reshape(shape),
                "shift_labels": labels.reshape(shape),
                "position_ids": positions,
            }


class Loader:
    """Global batches of `rows_per_step` rows from one or several stores.

    Without fractions all rows of all stores form one epoch. With fractions, row k of the run comes from the store that
    is furthest behind its share, in a pattern of fixed period, so every window has the right proportions.
    """

    def __init__(self, sources: list[Rows], rows_per_step: int, seed: int, fractions: list[float] | None = None):
        self.sources, self.rows_per_step, self.seed = sources, rows_per_step, seed
        self.sizes = np.asarray([rows.num_rows for rows in sources])
        self.ends = np.cumsum(self.sizes)
        self.pattern = _mixture_pattern(fractions) if fractions else None

    @property
    def num_rows(self) -> int:
        return int(self.ends[-1])

    def _locate(self, k: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Row numbers of the whole run -> (source, epoch of that source, row within it)."""
        if self.pattern is None:
            epoch, index = k // self.num_rows, k % self.num_rows
            for e in np.unique(epoch):
                index[epoch == e] = permute(index[epoch == e], self.num_rows, self._key(0, int(e)))
            source = np.searchsorted(self.ends, index, side="right")
            return source, epoch, index - (self.ends - self.sizes)[source]
        period = len(self.pattern)
        source = self.pattern[k % period]
        before = np.stack([np.concatenate(([0], np.cumsum(self.pattern == s))) for s in range(len(self.sources))])
        nth = (k // period) * before[source, -1] + before[source, k % period]  # how many of its rows came earlier
        epoch, index = nth // self.sizes[source], nth % self.sizes[source]
        for s, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
            here = (source == s) & (epoch == e)
            index[here] = permute(index[here], int(self.sizes[s]), self._key(s, e))
        return source, epoch, index

    def _key(self, source: int, epoch: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{source}/{epoch}".encode()).digest()[:8], "little")

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
        """This rank's rows of the global batch of a step, in order; rank r holds the r-th contiguous slice."""
        share = self.rows_per_step // world_size
        k = np.arange(share) + step * self.rows_per_step + rank * share
        source, epoch, index = self._locate(k)
        parts: list[tuple[int, dict[str, NDArray[np.int64]]]] = []
        for b in range(share):
            rows = self.sources[source[b]]
            shift = self._key(-1, int(epoch[b])) % rows.context  # contiguous: every epoch cuts the stream elsewhere
            parts.append((b, rows.assemble(index[b : b + 1], shift)))
        keys = ("input_ids", "shift_labels", "position_ids")
        return {key: torch.from_numpy(np.concatenate([part[key] for _, part in parts])) for key in keys}

    def num_labels(self, step: int) -> int:
        """Tokens that the whole global batch of a step trains on: the same number on every rank, without talking."""
        source, _, index = self._locate(np.arange(self.rows_per_step) + step * self.rows_per_step)
        total = 0
        for s, r in zip(source.tolist(), index.tolist(), strict=True):
            plan = self.sources[s].plan
            total += int(plan.pieces[plan.rows[r] : plan.rows[r + 1], 1].sum()) if plan else self.sources[s].context
        return total


def _mixture_pattern(fractions: list[float], period: int = 1000) -> NDArray[np.int64]:
    share = np.asarray(fractions) / sum(fractions)
    counts = np.floor(share * period).astype(int)
    counts[np.argsort(counts - share * period)[: period - counts.sum()]] += 1
    if not counts.all():
        smallest = fractions[int(np.argmin(share))]
        raise UserError(
            f"fraction={smallest} is under 1 row in {period}, so it would never be read; raise or remove it"
        )
    pattern, given = np.empty(period, np.int64), np.zeros(len(share))
    for k in range(period):
        owed = np.where(given < counts, share * (k + 1) - given, -np.inf)
        pattern[k] = int(np.argmax(owed))
        given[pattern[k]] += 1
    return pattern
