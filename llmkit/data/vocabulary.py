"""What a tokenizer makes of real text: tokens per shard, and how often each of its ids is used.

Owns the figures of `llmkit tokenizer check`. Text is encoded as a token store's is: no BOS, no EOS, and what looks like
a control token stays text.

    shard = count_shard("wiki", texts, tokenizer, max_bytes=20_000_000)
    figures = vocabulary_figures([shard], tokenizer)

Leaves out whether the tokenizer is correct (`llmkit check`) and how the figures look (`tokenizer_report.py`).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check.runner import quiet
from ..check.spans import special_texts
from ..check.torture import MARKED, byte_letters, difference, first_difference, nature
from ..report.plots import rank_curve
from .encode import Encoder
from .shards import encoding_core

PIECE = 65_536  # characters that are encoded at once, at most 256 KB: an encoding takes about 400 bytes per token
BATCH = 1_000_000  # characters between two counts
EXCERPT = 400  # characters of a text that the checks look at
A_PIECE = 4  # excerpts of a piece
RARE = 10  # uses below which an id is called rare
COMMONEST, LONGEST = 20, 10


@dataclass
class Shard:
    """What was counted in a shard, or in the part of it that was read."""

    name: str
    num_documents: int = 0
    num_bytes: int = 0
    num_characters: int = 0
    num_unknown: int = 0  # tokens that are <unk>
    num_surrogates: int = 0  # halves of a surrogate pair, counted as U+FFFD
    num_pieces: int = 0  # that were encoded: documents, long ones in parts
    num_altered: int = 0  # pieces that do not come back, but for blanks at their left edge
    num_unjudged: int = 0  # pieces that hold <unk>: they cannot
    is_cut: bool = False  # there was more
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # (V,) uses of every id
    excerpts: list[str] = field(default_factory=list)  # for the checks; what is altered comes first

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


def pieces(text: str, longest: int = PIECE) -> Iterator[str]:
    """The text in parts, cut where a line ends and no blank follows, else at a blank, else anywhere.

    A cut behind such a line end changes no token of a tokenizer that splits text there (Qwen's, GPT-2's and ours).
    """
    start = 0
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest)
        while end > start and text[end + 1].isspace():
            end = text.rfind("\n", start, end)
        if end < start or text[end + 1].isspace():
            end = text.rfind(" ", start + 1, start + longest) - 1
        end = end + 1 if end >= start else start + longest
        yield text[start:end]
        start = end
    if text[start:]:
        yield text[start:]


def without_surrogates(text: str) -> tuple[str, int]:
    """Halves of a surrogate pair, which no UTF-8 can hold, become U+FFFD; and how many there were."""
    changed = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return changed, sum(a != b for a, b in zip(text, changed, strict=True)) if changed != text else 0


def within(text: str, max_bytes: float) -> tuple[str, int, bool]:
    """As much of the text as fits, its bytes, and whether that is less than all."""
    content = text.encode("utf-8")
    if len(content) <= max_bytes:
        return text, len(content), False
    text = content[: int(max_bytes)].decode("utf-8", "ignore")
    return text, len(text.encode("utf-8")), True


def count_shard(
    name: str,
    texts: Iterable[str],
    tokenizer: Any,
    max_bytes: int,
    on_bytes: Callable[[int], object] = lambda num_bytes: None,
    num_excerpts: int = 40,
) -> Shard:
    """Encodes documents until `max_bytes` of them are read, decodes them again, and counts.

    Memory: a document, and a million characters of encodings.
    """
    shard = Shard(name, counts=np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64))
    batch: list[str] = []
    waiting = 0
    for text in texts:
        if shard.is_cut:
            break
        shard.num_documents += 1
        for piece in pieces(text):
            if shard.num_bytes >= max_bytes:
                shard.is_cut = True
                break
            piece, num_surrogates = without_surrogates(piece)
            piece, num_bytes, shard.is_cut = within(piece, max_bytes - shard.num_bytes)
            shard.num_surrogates += num_surrogates
            shard.num_pieces += 1
            shard.num_bytes += num_bytes
            shard.num_characters += len(piece)
            batch.append(piece)
            waiting += len(piece)
            if waiting >= BATCH:
                _count(shard, batch, tokenizer, num_excerpts)
                on_bytes(shard.num_bytes)
                batch, waiting = [], 0
    if batch:
        _count(shard, batch, tokenizer, num_excerpts)
    on_bytes(shard.num_bytes)
    return shard


def _count(shard: Shard, batch: list[str], tokenizer: Any, num_excerpts: int) -> None:
    with quiet():  # "sequence is longer than the maximum": nothing is trained on here
        found = Encoder(encoding_core(tokenizer)).encode(batch)
        rows = [ids.tolist() for ids in found if ids is not None]  # none is too long
        backs = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ids = np.fromiter((i for row in rows for i in row), np.int64)
    shard.counts += np.bincount(ids, minlength=len(shard.counts))
    unknown = tokenizer.unk_token_id
    shard.num_unknown = int(shard.counts[unknown]) if unknown is not None else 0
    altered = []
    for text, row, back in zip(batch, rows, backs, strict=True):
        back = back.replace(MARKED, " ") if MARKED not in text else back
        if unknown in row:
            shard.num_unjudged += 1
        elif text != back and difference(text, back):
            shard.num_altered += 1
            at = first_difference(text.lstrip(" "), back.lstrip(" "))
            altered.append(text[max(0, at - EXCERPT // 2) :][:EXCERPT])
        if len(shard.excerpts) < num_excerpts:
            shard.excerpts += [text[k : k + EXCERPT] for k in range(0, len(text), EXCERPT)][:A_PIECE]
    shard.excerpts = [*altered, *shard.excerpts][:num_excerpts]


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """What each id writes; a token that is half a character is no UTF-8. Control tokens as they are spelled."""
    letters = {letter: byte for byte, letter in byte_letters().items()} if nature(tokenizer).kind == "bytes" else {}
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    found = {}
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            found[i] = token.encode("utf-8", "surrogatepass")
        elif letters:
            found[i] = b"".join(bytes([letters[c]]) if c in letters else c.encode() for c in token)
        elif byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            found[i] = bytes([int(byte[1], 16)])
        else:
            found[i] = token.replace(MARKED, " ").encode("utf-8", "surrogatepass")
    return found


def shard_figures(shard: Shard) -> dict[str, Any]:
    tokens = shard.num_tokens
    return {
        "documents": shard.num_documents,
        "bytes": shard.num_bytes,
        "characters": shard.num_characters,
        "tokens": tokens,
        "bytes_per_token": shard.num_bytes / tokens if tokens else None,
        "characters_per_token": shard.num_characters / tokens if tokens else None,
        "unknown": shard.num_unknown,
        "surrogates": shard.num_surrogates,
        "pieces": shard.num_pieces,
        "altered_pieces": shard.num_altered,
        "unjudged_pieces": shard.num_unjudged,
        "is_cut": shard.is_cut,
        "curve": rank_curve(shard.counts),
    }


def vocabulary_figures(shards: list[Shard], tokenizer: Any) -> dict[str, Any]:
    """Of all shards together. Shares of ids leave out control tokens, which text never writes."""
    counts = np.sum([shard.counts for shard in shards], axis=0)
    total = int(counts.sum())
    texts = token_bytes(tokenizer)
    control = {tokenizer.convert_tokens_to_ids(token) for token in special_texts(tokenizer)}
    ordinary = np.array(sorted(set(texts) - control), np.int64)
    uses = counts[ordinary]
    singles = [i for i in ordinary.tolist() if len(texts[i]) == 1 and texts[i][0] >= 0x80]
    never, rare = int((uses == 0).sum()), int((uses < RARE).sum())

    def entry(i: int) -> dict[str, Any]:
        text = texts.get(i, b"").decode("utf-8", "backslashreplace")
        return {"id": i, "text": text, "bytes": len(texts.get(i, b"")), "count": int(counts[i])}

    commonest = [int(i) for i in np.argsort(-counts, kind="stable")[:COMMONEST] if counts[i]]
    longest = sorted(ordinary.tolist(), key=lambda i: (-len(texts[i]), i))[:LONGEST]
    return {
        "ids": len(texts),
        "control_tokens": len(texts) - len(ordinary),
        "tokens": total,
        "never_used": never,
        "never_used_share": never / len(ordinary) if len(ordinary) else None,
        f"used_below_{RARE}": rare,
        f"used_below_{RARE}_share": rare / len(ordinary) if len(ordinary) else None,
        "single_byte_tokens": int(counts[singles].sum()),
        "single_byte_share": float(counts[singles].sum() / total) if total else None,
        "commonest": [entry(i) | {"share": float(counts[i] / total)} for i in commonest],
        "longest": [entry(i) for i in longest],
        "curve": rank_curve(counts),
    }
