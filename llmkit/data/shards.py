"""The token store: what a corpus looks like after tokenising, and its row plan.

Owns `<name>.ds`, `.ds.index`, `.ds.metadata`: the files of datatrove's DocumentTokenizer, so a corpus tokenised on a
cluster loads here unchanged, plus `manifest.json` and, where the source knows it, `<name>.ds.logprob`.

    store = build_store(docs, tokenizer, folder);  store = open_store(folder, tokenizer)

Ids are little-endian uint16 (uint32 above 65,536 ids), documents one after the other, each ended by EOS and none opened
by BOS; the index is the cumulative end of each document as uint64. A store is written beside and renamed.
Leaves out cleaning and deduplication.
"""

import bisect
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..config import UserError
from .encode import Encoder, StoreWriter, file_hash, read_metadata
from .sources import Doc
from .tokenizer import fingerprint

TABLE_SIZES = 128  # packing looks ahead when the pieces have at most so many different lengths


@dataclass(frozen=True)
class Store:
    """A tokenised corpus on disk, memory-mapped."""

    folder: Path
    tokens: NDArray  # (num_tokens,) uint16 or uint32
    ends: NDArray[np.uint64]  # (num_docs,) index after each document's EOS
    manifest: dict
    log_probs: NDArray[np.float64] | None  # (num_docs,) nats per document, where known

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate(([0], self.ends[:-1])).astype(np.int64)

    @property
    def entropy(self) -> float | None:
        """True nats per token, EOS included; None where the source does not know."""
        return None if self.log_probs is None else float(-np.sum(self.log_probs) / self.num_tokens)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]


class _PythonCore:
    """A tokenizer without `tokenizers` behind it, as an Encoder wants it; it cannot be cut, and is slow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.get_vocab, self.get_vocab_size = tokenizer.get_vocab, tokenizer.__len__

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[SimpleNamespace]:
        found = self.tokenizer(texts, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
        return [SimpleNamespace(ids=ids) for ids in found]

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...


def encoding_core(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What an Encoder takes: the `tokenizers.Tokenizer` inside, or a stand-in for one written in Python."""
    return getattr(tokenizer, "backend_tokenizer", None) or _PythonCore(tokenizer)


def _write_store(
    docs: Iterable[Doc],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    source_hash: str,
    where: str,
    on_progress: Callable[[int], None],
) -> None:
    name = Path(tokenizer.name_or_path or "llmkit").name
    writer = StoreWriter(folder, encoding_core(tokenizer), tokenizer.eos_token_id, tokenizer.unk_token_id, name, where)
    num_empty, iterator = 0, iter(docs)
    while batch := list(islice(iterator, 1024)):
        kept = [doc for doc in batch if doc.text]
        num_empty += len(batch) - len(kept)
        writer.write([doc.text for doc in kept], [doc.log_prob for doc in kept])
        if writer.refused:
            raise UserError(
                f"{where}: a document of {writer.refused[0][1]:,} bytes has no place to cut it so that its ids stay "
                "the same, and is too long to encode in one piece; set sample_by: paragraph or line, or part it"
            )
        on_progress(len(kept))
    writer.close()
    if not writer.num_documents:
        raise UserError(f"{where}: no text in it ({num_empty} empty documents); point at a file or split that has some")
    manifest: dict[str, Any] = {"source": where, "fingerprint": source_hash, "tokenizer": fingerprint(tokenizer)}
    manifest |= {**writer.counts(), "num_empty_documents_skipped": num_empty}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def build_store(
    docs: Iterable[Doc],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    source_hash: str,
    where: str,
    on_progress: Callable[[int], None] = lambda num_docs: None,
) -> Store:
    """Tokenises documents into `folder`. Raises UserError when there is no text, or when an id is <unk>."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name  # not the scratch folder itself, which only its owner may read
        partial.mkdir()
        _write_store(docs, tokenizer, partial, source_hash, where, on_progress)
        with contextlib.suppress(OSError):  # another run was first
            os.rename(partial, folder)
    return open_store(folder, tokenizer)


def open_store(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Store:
    """A store written here or by datatrove. Raises UserError when it is cut short or made by another tokenizer."""
    names = sorted(folder.glob("*.ds"))
    if len(names) != 1:
        raise UserError(
            f"{folder}: holds {len(names)} token files, expected one `.ds`; merge them with datatrove first"
        )
    path = names[0]
    try:
        metadata = read_metadata(path)
        ends = np.fromfile(f"{path}.index", "<u8")
        tokens = np.memmap(path, metadata.dtype, mode="r")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: the file, .index or .metadata is damaged ({error}); tokenise the corpus again"
        ) from None
    if not len(ends) or ends[-1] != len(tokens) or metadata.num_tokens != len(tokens):
        raise UserError(
            f"{path}: holds {len(tokens)} tokens, its index says {int(ends[-1]) if len(ends) else 0}; tokenise again"
        )
    manifest_path = folder / "manifest.json"
    manifest = {"num_bytes": None} | (json.loads(manifest_path.read_text()) if manifest_path.exists() else {})
    if "fingerprint" not in manifest:  # written by datatrove, or by a StoreWriter alone
        manifest["fingerprint"] = file_hash(path)
    if manifest.get("tokenizer", fingerprint(tokenizer)) != fingerprint(tokenizer):
        raise UserError(f"{folder}: was made by another tokenizer; tokenise the corpus again or set its tokenizer_name")
    log_probs = np.fromfile(f"{path}.logprob", "<f8") if Path(f"{path}.logprob").exists() else None
    store = Store(folder, tokens, ends, manifest, log_probs)
    _check_sample(store, tokenizer)
    return store


def _check_sample(store: Store, tokenizer: PreTrainedTokenizerBase, num_docs: int = 4) -> None:
    """Decodes a few documents and tokenises them again: another tokenizer or a changed one gives other ids."""
    encoder = Encoder(encoding_core(tokenizer), max_bytes=1 << 30)  # 2,000 ids at a time
    for i in range(min(num_docs, len(store.ends))):
        ids = store.tokens[store.starts[i] : int(store.ends[i])]
        body, last = ids[:-1], int(ids[-1]) if len(ids) else None
        if body.max(initial=0) >= len(tokenizer):
            raise UserError(
                f"{store.folder}: document {i} has id {body.max()} of {len(tokenizer)}; set its tokenizer_name"
            )
        if last != tokenizer.eos_token_id:
            raise UserError(
                f"{store.folder}: document {i} ends with id {last}, not with EOS ({tokenizer.eos_token_id}); "
                "set its tokenizer_name, or tokenise again with EOS (datatrove: eos_token=)"
            )
        head = body[:2000].tolist()
        num_sure = len(head) if len(body) <= 2000 else 1000  # the last words of a cut text may split otherwise
        if not any(
            _again(encoder, tokenizer, head, is_text)[:num_sure] == head[:num_sure] for is_text in (True, False)
        ):
            raise UserError(
                f"{store.folder}: document {i} tokenises to other ids now; tokenise again or set its tokenizer_name"
            )


def _again(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, ids: list[int], is_text: bool) -> list[int]:
    """The ids of what these decode to, special-token strings read as text (ours) or as control tokens (datatrove)."""
    encoder.core.encode_special_tokens = is_text
    try:
        [again] = encoder.encode([tokenizer.decode(ids, clean_up_tokenization_spaces=False)])
    finally:
        encoder.core.encode_special_tokens = True
    assert again is not None, "2,000 ids are encoded in one piece"
    return again.tolist()


@dataclass(frozen=True)
class RowPlan:
    """Which pieces of a store make up which row: row r is pieces[rows[r] : rows[r + 1]]."""

    pieces: NDArray[np.int64]  # (num_pieces, 3) first token in the store, number of tokens, document
    rows: NDArray[np.int64]  # (num_rows + 1,)
    num_restarts: int  # pieces that continue a document longer than a row
    capacity: int  # places in a row: context + 1, since the last one is only predicted

    @property
    def num_rows(self) -> int:
        return len(self.rows) - 1

    @property
    def utilisation(self) -> float:
        """Share of the places that hold a token of the corpus or the BOS that opens it."""
        used = self.pieces[:, 1].sum() + len(self.pieces)
        return float(used / (self.num_rows * self.capacity))


def plan_rows(store: Store, context: int) -> RowPlan:
    """Best-fit packing of whole documents into rows of `context` + 1 places; written once beside the store.

    Longest first; each row is then filled with the pieces that leave the least of it empty. A document longer than a
    row is cut into pieces that each open with their own BOS (`num_restarts`). No token is dropped.
    """
    path = store.folder / f"rows-{context}.npz"
    capacity = context + 1
    digest = hashlib.sha256(store.ends.tobytes()).hexdigest()  # datatrove may have written the store anew
    saved = np.load(path) if path.exists() else {}
    if "ends" in saved and str(saved["ends"]) == digest:
        return RowPlan(saved["pieces"], saved["rows"], int(saved["num_restarts"]), capacity)
    lengths = store.ends.astype(np.int64) - store.starts
    num_pieces = -(-lengths // context)  # a piece holds at most `context` tokens, its BOS takes the other place
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    start = store.starts[document] + nth * context
    length = np.minimum(context, store.ends.astype(np.int64)[document] - start)
    order, rows = _best_fit(length + 1, capacity)
    plan = RowPlan(np.stack([start, length, document], 1)[order], rows, int((nth > 0).sum()), capacity)
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, pieces=plan.pieces, rows=plan.rows, num_restarts=plan.num_restarts, ends=np.array(digest))
    os.replace(partial, path)
    return plan


def _fill_table(present: list[int], capacity: int) -> NDArray[np.int64]:
    """For every room 0 .. capacity, the size to take next so that the row ends as full as it can; 0 where none fits."""
    sizes = np.asarray(present)
    filled, take = np.zeros(capacity + 1, np.int64), np.zeros(capacity + 1, np.int64)
    for room in range(present[0] if present else capacity + 1, capacity + 1):
        fitting = sizes[: np.searchsorted(sizes, room, side="right")]
        total = fitting + filled[room - fitting]
        best = len(total) - 1 - int(np.argmax(total[::-1]))  # among equals the longest
        filled[room], take[room] = total[best], fitting[best]
    return take


def _best_fit(sizes: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order of the items and the row boundaries (num_rows + 1,): longest first, then what fills the row best.

    With many different sizes the longest that fits is as good (0.02 % empty at 1,024 places) and needs no table; with
    few, the table holds until a size is used up. Costs about 1 s per million items, and up to 5 s for the tables.
    """
    by_size: dict[int, list[int]] = {}
    for i in np.argsort(sizes, kind="stable")[::-1].tolist():
        by_size.setdefault(int(sizes[i]), []).append(i)  # popped from the end: corpus order within a size
    present = sorted(by_size)
    take: NDArray[np.int64] | None = None
    order: list[int] = []
    rows = [0]
    while present:
        room, size = capacity, present[-1]
        while size:
            order.append(by_size[size].pop())
            room -= size
            if not by_size[size]:
                present.remove(size)
                take = None
            if len(present) > TABLE_SIZES:
                fitting = bisect.bisect_right(present, room)
                size = present[fitting - 1] if fitting else 0
            else:
                take = _fill_table(present, capacity) if take is None else take
                size = int(take[room])
        rows.append(len(order))
    return np.asarray(order), np.asarray(rows)
