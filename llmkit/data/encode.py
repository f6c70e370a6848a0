"""Text to ids to disk: the part of tokenising that runs in worker processes, so it imports no torch or transformers.

    writer = StoreWriter(folder, core, eos_id)        # core: a tokenizers.Tokenizer
    writer.write(texts); writer.close()               # as often as there are texts; memory stays flat
    merge_stores([part_0, part_1], folder)            # one store of what several workers wrote

Owns `tokens.ds`, `.index`, `.metadata`, `.logprob` (see shards.py) and how much text is encoded at a time: a document
above `max_bytes` is cut where its ids stay the same (cuts.py), else refused. Leaves out opening a store.
"""

import json
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ..config import UserError
from .cuts import cut_finder

NAME = "tokens.ds"
MAX_BYTES = 256 * 1024  # of one text: at 2 to 4 bytes per token it takes 25 to 55 MB while it is encoded
BATCH_BYTES = 1024 * 1024  # of the texts that are encoded together
COPY_BYTES = 16 * 1024 * 1024
SURROGATE = re.compile("[\ud800-\udfff]")


def num_utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class Encoder:
    """Ids of texts alone: no BOS, no EOS, and special-token strings in a text are not control tokens.

    Sets `encode_special_tokens` on `core` and takes away its truncation and padding.
    """

    def __init__(self, core: Tokenizer, max_bytes: int = MAX_BYTES, where: str = "text"):
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        self.core, self.max_bytes, self.where = core, max_bytes, where
        self.find_cut = cut_finder(core)

    def pieces(self, text: str) -> list[str] | None:
        """The text in pieces of at most `max_bytes`; None where it has no place to cut it."""
        if len(text) * 4 <= self.max_bytes or num_utf8_bytes(text) <= self.max_bytes:
            return [text]
        if self.find_cut is None:
            return None
        pieces, start = [], 0
        while start < len(text):
            high = start + self._num_chars(text[start : start + self.max_bytes])
            cut = high if high == len(text) else self.find_cut(text, start, high)
            if cut is None:
                return None
            pieces.append(text[start:cut])
            start = cut
        return pieces

    def _num_chars(self, text: str) -> int:
        """How many characters of `text` fit into `max_bytes`."""
        if text.isascii():
            return len(text)
        return len(text.encode("utf-8", "surrogatepass")[: self.max_bytes].decode("utf-8", "ignore"))

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32] | None]:
        """Ids of each text, or None for one that is too long to encode and has no place to cut it.

        Raises UserError for a lone surrogate, which no UTF-8 can hold.
        """
        encoded: list[NDArray[np.uint32] | None] = []
        for ids, lengths in self.batches(texts):
            stops = np.cumsum(np.maximum(lengths, 0)).tolist()
            encoded += [None if n < 0 else ids[b - n : b] for n, b in zip(lengths.tolist(), stops, strict=True)]
        return encoded

    def batches(self, texts: Iterable[str]) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        """Ids of several texts one after the other, and how many each has; -1 for one that was refused."""
        batch: list[list[str] | None] = []
        size = 0
        for text in texts:
            pieces = self.pieces(text)
            batch.append(pieces)
            size += len(text) if pieces else 0
            if size >= BATCH_BYTES:
                yield self._encode(batch)
                batch, size = [], 0
        if batch:
            yield self._encode(batch)

    def _encode(self, batch: list[list[str] | None]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        flat = [piece for pieces in batch for piece in pieces or []]
        ids, num_ids = array("I"), []
        for encoding in self._encode_pieces(flat):
            ids += array("I", encoding.ids)
            num_ids.append(len(ids))
        stops = np.concatenate([[0], num_ids])
        num_pieces = np.asarray([-1 if pieces is None else len(pieces) for pieces in batch])
        last = np.cumsum(np.maximum(num_pieces, 0))
        lengths = np.where(num_pieces < 0, -1, np.diff(stops[last], prepend=0))
        return np.frombuffer(ids, np.uint32), lengths.astype(np.int64)

    def _encode_pieces(self, pieces: list[str]) -> list[Encoding]:
        try:
            return self.core.encode_batch_fast(pieces, add_special_tokens=False)
        except TypeError:  # what `tokenizers` says to a lone surrogate
            for piece in pieces:
                if found := SURROGATE.search(piece):
                    around = piece[max(0, found.start() - 20) : found.start() + 20]
                    raise UserError(
                        f"text has the lone surrogate {found[0]!r} in {around!r}; remove it first"
                    ) from None
            raise


class StoreWriter:
    """Appends documents to the files of a token store in `folder`, which exists."""

    def __init__(
        self,
        folder: Path,
        core: Tokenizer,
        eos_id: int,
        unk_id: int | None = None,
        name: str = "llmkit",  # of the tokenizer, for `.metadata`
        where: str = "text",  # what a complaint begins with
    ):
        self.folder, self.eos_id, self.unk_id, self.name, self.where = folder, eos_id, unk_id, name, where
        self.encoder = Encoder(core, where=where)
        self.dtype = np.dtype("<u2" if core.get_vocab_size() <= 65536 else "<u4")
        self.num_tokens = self.num_documents = self.num_bytes = self.num_seen = 0
        self.refused: list[tuple[int, int]] = []  # (number of the text among all that came, its bytes)
        self.is_log_prob_known = True
        self._tokens, self._ends, self._log_probs = (
            (folder / f"{NAME}{suffix}").open("wb") for suffix in ("", ".index", ".logprob")
        )

    def write(self, texts: Sequence[str], log_probs: Sequence[float | None] | None = None) -> None:
        """Raises UserError for a character that the tokenizer does not know, where `unk_id` is given."""
        first = 0
        for ids, lengths in self.encoder.batches(texts):
            some = slice(first, first + len(lengths))
            self._append(texts[some], ids, lengths, log_probs[some] if log_probs is not None else [None])
            first += len(lengths)

    def _append(
        self,
        texts: Sequence[str],
        ids: NDArray[np.uint32],
        lengths: NDArray[np.int64],
        log_probs: Sequence[float | None],
    ) -> None:
        is_kept = lengths >= 0
        stops = np.cumsum(lengths[is_kept])
        self._check(texts, ids, lengths)
        np.insert(ids, stops, self.eos_id).astype(self.dtype).tofile(self._tokens)
        (stops + np.arange(1, len(stops) + 1) + self.num_tokens).astype("<u8").tofile(self._ends)
        self.is_log_prob_known = self.is_log_prob_known and None not in log_probs
        if self.is_log_prob_known:
            np.asarray(log_probs, "<f8")[is_kept].tofile(self._log_probs)
        for i, text in enumerate(texts):
            size = num_utf8_bytes(text)
            if is_kept[i]:
                self.num_bytes += size
            else:
                self.refused.append((self.num_seen + i, size))
        self.num_seen += len(texts)
        self.num_documents += len(stops)
        self.num_tokens += len(ids) + len(stops)

    def _check(self, texts: Sequence[str], ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> None:
        if self.unk_id is not None and (ids == self.unk_id).any():
            at = int(np.argmax(ids == self.unk_id))
            which = int(np.searchsorted(np.cumsum(np.maximum(lengths, 0)), at, side="right"))
            raise unknown_character(texts[which], self.encoder.core, self.where)
        largest = max(int(ids.max(initial=0)), self.eos_id)
        if largest > np.iinfo(self.dtype).max:
            raise UserError(
                f"{self.where}: id {largest} does not fit {self.dtype.name}, which holds the "
                f"{self.encoder.core.get_vocab_size()} ids of the tokenizer; number them without gaps"
            )

    def close(self) -> None:
        """Finishes the files and writes the counts into `manifest.json`."""
        for file in (self._tokens, self._ends, self._log_probs):
            file.close()
        if not self.is_log_prob_known or not self.num_documents:
            (self.folder / f"{NAME}.logprob").unlink()
        _write_counts(self.folder, f"{self.name}|{self.dtype.itemsize}", self.counts())

    def counts(self) -> dict[str, int]:
        return {"num_documents": self.num_documents, "num_tokens": self.num_tokens, "num_bytes": self.num_bytes}


def _write_counts(folder: Path, header: str, counts: dict[str, int]) -> None:
    total = counts["num_tokens"]
    (folder / f"{NAME}.metadata").write_text(f"{header}\n{total}\n{total / 1e6:.3f} MT")
    (folder / "manifest.json").write_text(json.dumps(counts, indent=1))


def unknown_character(text: str, core: Tokenizer, where: str = "text") -> UserError:
    known = core.get_vocab()
    position, char = next(((i, c) for i, c in enumerate(text) if c not in known), (0, text[0]))
    return UserError(
        f"{where}: character {char!r} at position {position} is not in the tokenizer; "
        "train it on text that has it, or use tokenizer_type: bpe"
    )


def merge_stores(parts: Sequence[Path], folder: Path) -> dict[str, int]:
    """Joins the parts, in order, into one store in `folder`, and returns the sums of their counts.

    Raises UserError where the parts are of different tokenizers.
    """
    headers = {(part / f"{NAME}.metadata").read_text().splitlines()[0] for part in parts}
    if len(headers) != 1:
        raise UserError(f"{folder}: parts of different tokenizers ({', '.join(sorted(headers))}); tokenise them again")
    folder.mkdir(parents=True, exist_ok=True)
    manifests = [json.loads((part / "manifest.json").read_text()) for part in parts]
    counts: dict[str, Any] = {
        key: sum(m[key] for m in manifests) for key in ("num_documents", "num_tokens", "num_bytes")
    }
    offset = 0
    with (folder / NAME).open("wb") as tokens, (folder / f"{NAME}.index").open("wb") as index:
        for part, manifest in zip(parts, manifests, strict=True):
            _append_file(part / NAME, tokens)
            (np.fromfile(part / f"{NAME}.index", "<u8") + np.uint64(offset)).tofile(index)
            offset += manifest["num_tokens"]
    filled = [part for part, manifest in zip(parts, manifests, strict=True) if manifest["num_documents"]]
    if filled and all((part / f"{NAME}.logprob").exists() for part in filled):
        with (folder / f"{NAME}.logprob").open("wb") as log_probs:
            for part in filled:
                _append_file(part / f"{NAME}.logprob", log_probs)
    _write_counts(folder, headers.pop(), counts)
    return counts


def _append_file(path: Path, out: Any) -> None:
    with path.open("rb") as file:
        shutil.copyfileobj(file, out, COPY_BYTES)
