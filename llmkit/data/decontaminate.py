"""Contamination: training documents that hold text of a validation shard or of a benchmark.

Owns the index of what must not be trained on and the search for it: the whole text (normalised hash), and any 13
words in a row (Brown et al. 2020, appendix C). Runs that stand in more than `COMMON` training documents are boilerplate
(licences, headers): they are counted and listed, and do not condemn a document; a text that is there whole always does.

    index = Index.build([("validation 12", text), ...]);  index.hits(text) -> (k,) numbers of the runs that it holds
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .words import RUN, ngrams, text_hash, word_hashes

COMMON = 10  # training documents; theirs is the same number


@dataclass
class Index:
    """Sorted hashes of what is held back, and whose they are."""

    runs: NDArray[np.uint64]  # (num_runs,) sorted
    owners: NDArray[np.uint32]  # (num_runs,) number of a text that has the run
    texts: NDArray[np.uint64]  # (num_texts, 2) hash of every whole text

    @classmethod
    def build(cls, texts: Iterable[str]) -> "Index":
        runs, owners, hashes = [], [], []
        for number, text in enumerate(texts):
            found = np.unique(ngrams(word_hashes(text), RUN))
            runs.append(found)
            owners.append(np.full(len(found), number, np.uint32))
            hashes.append(text_hash(text))
        every = np.concatenate(runs or [np.empty(0, np.uint64)])
        unique, first = np.unique(every, return_index=True)
        whose = np.concatenate(owners or [np.empty(0, np.uint32)])[first]
        return cls(unique, whose, np.array(hashes, np.uint64).reshape(-1, 2))

    def save(self, path: Path) -> None:
        np.savez(path, runs=self.runs, owners=self.owners, texts=self.texts)

    @classmethod
    def load(cls, path: Path) -> "Index":
        with np.load(path) as saved:
            return cls(saved["runs"], saved["owners"], saved["texts"])

    def hits(self, text: str) -> NDArray[np.int64]:
        """Numbers of the runs of this index that the text holds."""
        found = ngrams(word_hashes(text), RUN)
        if not len(found) or not len(self.runs):
            return np.empty(0, np.int64)
        at = np.minimum(np.searchsorted(self.runs, found), len(self.runs) - 1)
        return np.unique(at[self.runs[at] == found])

    def whole(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """For (num_docs, 2) hashes of whole texts the number of the text held back, or -1."""
        known = {(int(a), int(b)): i for i, (a, b) in reversed(list(enumerate(self.texts.tolist())))}
        return np.array([known.get((int(a), int(b)), -1) for a, b in hashes.tolist()], np.int64)


def judge(runs: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """One run for each document that holds it -> which of them condemn their document, and the runs that do not."""
    number, inverse, counts = np.unique(runs, return_inverse=True, return_counts=True)
    return counts[inverse] <= COMMON, number[counts > COMMON]
