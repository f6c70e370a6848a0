"""Perplexity of any causal LM on raw text: every document on its own, after a BOS, in windows that are stated.

Owns the figures that `llmkit eval` gives for validation shards.   scores = score_texts(model, tokenizer, texts, 1024)

Windows are those of lm-eval's rolling perplexity: what they score does not overlap, and each later one sees one token
of the one before, the last one more. Bits per byte count the bytes of the raw text and leave out the EOS; nats per
token count it, so that a corpus with a known entropy can be compared. Leaves out packed stores (perplexity.py).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import UserError
from ..data.loader import IGNORE
from ..data.tokenizer import bos_id
from .perplexity import token_losses

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Per document, (N,): nats on its text and on its EOS, text tokens, bytes."""

    nats: Floats
    eos_nats: Floats
    num_tokens: Floats
    num_bytes: Floats

    @property
    def loss(self) -> float:
        """Nats per token, EOS included."""
        return float((self.nats + self.eos_nats).sum() / (self.num_tokens + 1).sum())

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.num_bytes.sum())

    @property
    def stderr(self) -> float | None:
        """Of the loss, over documents (of a ratio, by its linearisation); None of a single one."""
        count = len(self.nats)
        if count < 2:
            return None
        rest = self.nats + self.eos_nats - self.loss * (self.num_tokens + 1)
        return float(rest.std(ddof=1) * math.sqrt(count) / (self.num_tokens + 1).sum())


def windows(ids: list[int], prefix: int, eos: int, window: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels), at most `window` long, in which every id is a label once, and EOS the last of the last one.

    As lm-eval: a last window that is not full looks further back instead. What is only looked at is IGNORE.
    """
    stream, found = [prefix, *ids], []
    for first in range(0, len(ids), window):
        last = min(first + window, len(ids))
        start = max(0, last - window)
        found.append((stream[start:last], [IGNORE] * (first - start) + ids[first:last]))
    inputs, labels = found[-1] if found else ([], [])
    if len(inputs) < window:
        found[-1:] = [([*inputs, stream[-1]], [*labels, eos])]
    else:
        found.append((stream[-window:], [IGNORE] * (window - 1) + [eos]))
    return found


@torch.no_grad()
def score_texts(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    window: int,
    batch_size: int,
    tell: Callable[[int, int], object] = lambda done, more: None,
) -> TextScores:
    """Every token of every text once. Raises UserError where a loss is NaN. The model's mode comes back."""
    device = next(model.parameters()).device
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    rows = []  # document, whether its EOS is the last label, inputs, labels
    for index, ids in enumerate(encoded):
        found = windows(ids, bos_id(tokenizer), tokenizer.eos_token_id, window)
        rows += [(index, k == len(found) - 1, *pair) for k, pair in enumerate(found)]
    rows.sort(key=lambda row: -len(row[3]))
    nats, eos_nats = np.zeros(len(texts)), np.zeros(len(texts))
    tell(0, len(rows))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            block = rows[start : start + batch_size]
            batch = _batch([(inputs, labels) for *_, inputs, labels in block], tokenizer.eos_token_id, device)
            losses = token_losses(model, batch, isolate=False).double().cpu().numpy()
            for row, (index, is_end, _, labels) in zip(losses, block, strict=True):
                nats[index] += row[: len(labels) - is_end].sum()
                eos_nats[index] += row[len(labels) - 1] * is_end
            tell(len(block), 0)
    finally:
        model.train(was_training)
    if np.isnan(nats).any():
        raise UserError(
            f"the loss of {int(np.isnan(nats).sum())} of {len(nats)} documents is NaN; check weights, dtype"
        )
    sizes = np.array([len(ids) for ids in encoded], np.float64)
    return TextScores(nats, eos_nats, sizes, np.array([len(text.encode()) for text in texts], np.float64))


def _batch(pairs: list[tuple[list[int], list[int]]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and shift_labels, (B, T), padded on the right."""
    width = max(len(inputs) for inputs, _ in pairs)
    ids = [inputs + [pad] * (width - len(inputs)) for inputs, _ in pairs]
    labels = [labels + [IGNORE] * (width - len(labels)) for _, labels in pairs]
    return {"input_ids": torch.tensor(ids, device=device), "shift_labels": torch.tensor(labels, device=device)}
