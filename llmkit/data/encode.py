"""Text to ids to disk: the part of tokenising that runs in worker processes, so it imports no torch or transformers.

    writer = StoreWriter(folder, core, eos_id)        # core: a tokenizers.Tokenizer
    writer.write(texts); writer.close()               # as often as there are texts; memory stays flat
    merge_stores([part_0, part_1], folder)            # one store of what several workers wrote

Owns `tokens.ds`, `.index`, `.metadata`, `.logprob` (see shards.py) and how much text is encoded at a time: a document
above `max_bytes` is cut where its ids stay the same (cuts.py), else refused. Leaves out opening a store.
"""

import hashlib
import json
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ..config import UserError
from .cuts import cut_finder

NAME = "tokens.ds"
MAX_BYTES = 256 * 1024  # of one text: at 2 to 4 bytes per token it takes 25 to 55 MB while it is encoded
BATCH_BYTES = 512 * 1024  # of the texts that are encoded together
COPY_BYTES = 16 * 1024 * 1024
SURROGATE = re.compile("[\ud800-\udfff]")


def num_utf8_bytes(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(len(text[i : i + MAX_BYTES].encode("utf-8", "surrogatepass")) for i in range(0, len(text), MAX_BYTES))


def id_dtype(num_ids: int) -> np.dtype:
    """Of a token store."""
    return np.dtype("<u2" if num_ids <= 65536 else "<u4")


class Metadata(NamedTuple):
    header: str  # TOKENIZER|BYTES OF AN ID
    dtype: np.dtype
    num_tokens: int


def read_metadata(path: Path) -> Metadata:
    """What `.metadata` says of a `.ds` file. Raises OSError, ValueError or TypeError where it is damaged."""
    header, count = Path(f"{path}.metadata").read_text().splitlines()[:2]
    return Metadata(header, np.dtype(f"<u{header.rsplit('|', 1)[-1]}"), int(count))


def file_hash(path: Path) -> str:
    """SHA-256 of the content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Encoder:
    """Ids of texts alone: no BOS, no EOS, and special-token strings in a text are not control tokens.

    Sets `encode_special_tokens` on `core` and takes away its truncation and padding, as transformers does.
    """

    def __init__(self, core: Tokenizer, max_bytes: int = MAX_BYTES, where: str = "text"):
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        self.core, self.max_bytes, self.where = core, max_bytes, where
        self.find_cut = cut_finder(core)

    def cuts(self, text: str) -> list[int] | None:
        """Where the pieces of at most `max_bytes` end; None where there is no place for a cut that is needed."""
        cuts: list[int] = []
        start = 0
        while start < len(text) or not cuts:
            high = start + self._num_chars(text[start : start + self.max_bytes])
            cut = high if high == len(text) else self.find_cut(text, start, high) if self.find_cut else None
            if cut is None:
                return None
            cuts.append(cut)
            start = cut
        return cuts

    def _num_chars(self, text: str) -> int:
        """How many characters of `text` fit into `max_bytes`."""
        if len(text) * 4 <= self.max_bytes or text.isascii():
            return len(text)
        encoded = text.encode("utf-8", "surrogatepass")
        if len(encoded) <= self.max_bytes:
            return len(text)
        end = self.max_bytes
        while encoded[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        return len(encoded[:end].decode("utf-8", "surrogatepass"))

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32] | None]:
        """Ids of each text, or None for one that is too long to encode and has no place to cut it.

        Raises UserError for a lone surrogate, which no UTF-8 can hold.
        """
        encoded: list[NDArray[np.uint32] | None] = []
        rest: list[NDArray[np.uint32]] = []  # of a text that goes on in the next batch
        for ids, ends in self.batches(texts):
            start = 0
            for end in ends.tolist():
                if end < 0:
                    encoded.append(None)
                    continue
                encoded.append(np.concatenate([*rest, ids[start:end]]))
                rest, start = [], end
            rest.append(ids[start:])
        return encoded

    def batches(self, texts: Iterable[str]) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        """Ids of texts one after the other, and where in them texts end; -1 for a text that was refused.

        A batch is at most BATCH_BYTES and a piece, so a long text may go on in the next one.
        """
        pieces: list[str] = []
        ends: list[int] = []  # in pieces
        size = 0
        for text in texts:
            cuts = self.cuts(text)
            if cuts is None:
                ends.append(-1)
                continue
            for start, cut in zip([0, *cuts], cuts, strict=False):
                pieces.append(text[start:cut])
                if cut == len(text):
                    ends.append(len(pieces))
                size += num_utf8_bytes(pieces[-1])
                if size >= BATCH_BYTES:
                    yield self._encode(pieces, ends)
                    pieces, ends, size = [], [], 0
        if ends:
            yield self._encode(pieces, ends)

    def _encode(self, pieces: list[str], ends: list[int]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids, num_ids = array("I"), [0]
        for encoding in self._encode_pieces(pieces):
            ids += array("I", encoding.ids)  # 17 ns per token; a list of all first is 30
            num_ids.append(len(ids))
        return np.frombuffer(ids, np.uint32), np.asarray([num_ids[end] if end >= 0 else -1 for end in ends], np.int64)

    def _encode_pieces(self, pieces: list[str]) -> list[Encoding]:
        try:
            return self.core.encode_batch_fast(pieces, add_special_tokens=False)
        except TypeError:  # what `tokenizers` says to a lone surrogate
            for piece in pieces:
                if found := SURROGATE.search(piece):
                    around = piece[max(0, found.start() - 20) : found.start() + 20]
                    raise UserError(
                        f"{self.where}: lone surrogate {found[0]!r} in {around!r}; remove it first"
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
        self.dtype = id_dtype(core.get_vocab_size())
        self.num_tokens = self.num_documents = self.num_bytes = self.num_seen = 0
        self.refused: list[tuple[int, int]] = []  # (number of the text among all that came, its bytes)
        self.is_log_prob_known = True
        self._tokens, self._ends, self._log_probs = (
            (folder / f"{NAME}{suffix}").open("wb") for suffix in ("", ".index", ".logprob")
        )

    def write(self, texts: Sequence[str], log_probs: Sequence[float | None] | None = None) -> None:
        """Raises UserError for a character that the tokenizer does not know, where `unk_id` is given."""
        first = 0
        for ids, ends in self.encoder.batches(texts):
            self._check(ids, ends, texts[first:])
            last = first + len(ends)
            self._append(ids, ends[ends >= 0])
            self._count(ends >= 0, texts[first:last], log_probs[first:last] if log_probs is not None else [None])
            first = last

    def _append(self, ids: NDArray[np.uint32], ends: NDArray[np.int64]) -> None:
        np.insert(ids, ends, self.eos_id).astype(self.dtype).tofile(self._tokens)
        (ends + np.arange(1, len(ends) + 1) + self.num_tokens).astype("<u8").tofile(self._ends)
        self.num_documents += len(ends)
        self.num_tokens += len(ids) + len(ends)

    def _count(self, is_kept: NDArray[np.bool_], texts: Sequence[str], log_probs: Sequence[float | None]) -> None:
        for number, (text, kept) in enumerate(zip(texts, is_kept, strict=True), self.num_seen):
            size = num_utf8_bytes(text)
            if kept:
                self.num_bytes += size
            else:
                self.refused.append((number, size))
        self.num_seen += len(texts)
        self.is_log_prob_known = self.is_log_prob_known and None not in log_probs
        if self.is_log_prob_known:
            np.asarray(log_probs, "<f8")[is_kept].tofile(self._log_probs)

    def _check(self, ids: NDArray[np.uint32], ends: NDArray[np.int64], texts: Sequence[str]) -> None:
        if self.unk_id is not None and (is_unknown := ids == self.unk_id).any():
            at = int(np.argmax(is_unknown))
            after = np.maximum.accumulate(np.maximum(ends, 0))  # a refused text ends where the one before it does
            which = int(np.searchsorted(after, at, side="right"))
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

    Raises UserError where the parts are of different tokenizers, or one is cut short.
    """
    metadata = [read_metadata(part / NAME) for part in parts]
    headers = {found.header for found in metadata}
    if len(headers) != 1:
        raise UserError(f"{folder}: parts of different tokenizers ({', '.join(sorted(headers))}); tokenise them again")
    folder.mkdir(parents=True, exist_ok=True)
    manifests = [json.loads((part / "manifest.json").read_text()) for part in parts]
    counts: dict[str, Any] = {
        key: sum(m[key] for m in manifests) for key in ("num_documents", "num_tokens", "num_bytes")
    }
    width, offset = metadata[0].dtype.itemsize, 0
    with (folder / NAME).open("wb") as tokens, (folder / f"{NAME}.index").open("wb") as index:
        for part, manifest in zip(parts, manifests, strict=True):
            _append_file(part / NAME, tokens)
            if (found := tokens.tell() // width - offset) != manifest["num_tokens"]:
                raise UserError(
                    f"{part / NAME}: holds {found} tokens, its manifest says {manifest['num_tokens']}; tokenise again"
                )
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
