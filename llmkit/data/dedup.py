"""Duplicates: exact ones by the hash of the normalised text, near ones by MinHash, verified.

Owns which documents go. datatrove's MinHash (signatures, sorted buckets) proposes pairs; each is then measured, so that
nothing is dropped by an unlucky hash: `similarity`, the Jaccard index of the words, must reach the threshold. Of every
group the first document in the order of the corpus stays.

Signatures are over pairs of neighbouring words, 50 buckets of 6: with a tenth of the words replaced, wherever they
stand, two texts share 0.68 of their pairs and meet in a bucket with probability 1 - (1 - 0.68^6)^50 = 0.994; two
unrelated texts, which share about 0.05, with 8e-7.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .words import ngrams, normalise, pieces, word_hashes, words

BUCKETS, HASHES = 50, 6
CHUNK = 8192  # word pairs hashed at a time: 20 MB
Place = tuple[int, int]  # (task, document of the task)


def exact_duplicates(hashes: list[NDArray[np.uint64]]) -> list[NDArray[np.int64]]:
    """For each document the global number of the first one with its hash (itself where it is the first).

    Takes (num_docs, 2) uint64 for each task and returns (num_docs,) for each; 32 bytes a document.
    """
    if not hashes:
        return []
    every = np.concatenate(hashes)
    order = np.lexsort((np.arange(len(every)), every[:, 1], every[:, 0]))
    starts = np.ones(len(every), bool)
    starts[1:] = (every[order[1:]] != every[order[:-1]]).any(1)
    first = np.empty(len(every), np.int64)
    first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return np.split(first, np.cumsum([len(h) for h in hashes])[:-1])


def signature_step(folder: Path) -> Any:
    """datatrove's first MinHash stage, over word pairs and in pieces, so that a long text costs no memory."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer

    class NoWords(WordTokenizer):  # given so that none is loaded; `get_shingles` splits words itself
        def word_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        sent_tokenize = span_tokenize = word_tokenize

    class Signature(MinhashDedupSignature):
        def get_shingles(self, text: str) -> NDArray[np.uint64]:
            return np.unique(ngrams(word_hashes(text), 2)).reshape(-1, 1)

        def get_signature(self, shingles: NDArray[np.uint64]) -> list[list[int]]:
            whole = super().get_signature
            parts = [np.array(whole(shingles[k : k + CHUNK])) for k in range(0, len(shingles), CHUNK)]
            return np.minimum.reduce(parts).tolist()

    return Signature(str(folder), config=minhash_config(), language=NoWords())


def minhash_config() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    return MinhashConfig(n_grams=2, num_buckets=BUCKETS, hashes_per_bucket=HASHES)


def candidates(folder: Path) -> NDArray[np.int64]:
    """Pairs that met in a bucket, each once: (num_pairs, 2, 2) of [earlier or later][task, document], in order."""
    files = sorted(folder.glob("*.dups"))
    met = np.concatenate([np.fromfile(path, "<u4").reshape(-1, 2, 2) for path in files] or [np.empty((0, 2, 2), "<u4")])
    place = met[..., 0].astype(np.uint64) << np.uint64(32) | met[..., 1].astype(np.uint64)
    pairs = np.unique(np.sort(place, axis=1), axis=0)
    return np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)], -1).astype(np.int64)


def bags(text: str) -> tuple[Counter[str], Counter[str]]:
    """The words of a text, and what stands between its blanks, each as often as it occurs."""
    return Counter(words(text)), Counter(word for part in pieces(text) for word in normalise(part).split())


def similarity(a: tuple[Counter[str], ...], b: tuple[Counter[str], ...]) -> float:
    """Jaccard index |A and B| / |A or B| of two texts' bags, by whichever way of splitting finds more alike.

    A text of which a tenth of the words was replaced has 0.9 / 1.1 = 0.82, wherever they stood.
    """
    found = [(sum((x & y).values()), sum(x.values()) + sum(y.values())) for x, y in zip(a, b, strict=True)]
    return max(both / (every - both) if every else 1.0 for both, every in found)


def near_duplicates(
    pairs: NDArray[np.int64], bags_of: Callable[[Place], tuple[Counter[str], ...]], threshold: float
) -> dict[Place, tuple[Place, float]]:
    """Documents to drop -> (an earlier one that they repeat, similarity). Groups are joined; the first one stays."""
    parent: dict[Place, Place] = {}

    def root(a: Place) -> Place:
        while a in parent:
            a = parent[a]
        return a

    found: dict[Place, tuple[Place, float]] = {}
    for (task_a, doc_a), (task_b, doc_b) in pairs.tolist():
        a, b = (task_a, doc_a), (task_b, doc_b)
        alike = similarity(bags_of(a), bags_of(b))
        if alike < threshold:
            continue
        found.setdefault(b, (a, alike))
        first, second = sorted((root(a), root(b)))
        if first != second:
            parent[second] = first
            found.setdefault(second, (first, alike))
    return found
