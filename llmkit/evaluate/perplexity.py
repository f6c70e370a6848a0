"""Loss of a model on a validation shard: nats per token, bits per byte, and how far from the true entropy.

Owns the measurement, the same for every stage.   score = score_rows(model, rows, batch_size=32)

Nats per token count every text token and the EOS that ends each document; bits per byte leave EOS out, since it
stands for no byte of the raw text. Under bos_bestfit every document is scored on its own, after a BOS. Under contiguous
packing the windows do not overlap, and the first token of the shard is not predicted.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.loader import IGNORE, Rows


@dataclass(frozen=True)
class ShardScore:
    loss: float  # nats per token
    bits_per_byte: float | None
    entropy: float | None  # nats per token of these very documents, where the source knows it
    gap_stderr: float | None  # standard error of loss - entropy over documents
    num_tokens: int

    @property
    def gap(self) -> float | None:
        return None if self.entropy is None else self.loss - self.entropy

    def to_dict(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "entropy": self.entropy,
            "gap_stderr": self.gap_stderr,
        }


def forward_inputs(batch: dict[str, torch.Tensor], isolate: bool) -> dict[str, Any]:
    """What the model gets: no attention_mask and no cache, or packed documents would silently see each other."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if isolate:
        inputs["position_ids"] = batch["position_ids"]
    return inputs


def chunk_tokens(vocab_size: int, num_tokens: int, device: torch.device) -> int | None:
    """How many positions the head should take at once; None: all, since their logits fit easily.

    Cut are more than 2^27 logits (512 MB in float32, three times that with their gradients) on a CPU, or an eighth of a
    GPU's memory; not sooner, since the head runs once more in backward: a step takes 20 to 35 % longer at 32,768 ids.
    """
    is_gpu = device.type == "cuda"
    allowed = torch.cuda.get_device_properties(device).total_memory // 32 if is_gpu else 2**27
    return None if num_tokens * vocab_size <= allowed else max(1, (2**28 if is_gpu else 2**24) // vocab_size)


def token_losses(model: nn.Module, batch: dict[str, torch.Tensor], isolate: bool) -> torch.Tensor:
    """-log p of every label in nats, (B, T) float32, 0 where the label is ignored.

    Our own model cuts the head into chunks where the vocabulary is large; other architectures hold all logits.
    """
    config, labels = getattr(model, "module", model).config, batch["shift_labels"]
    if config.model_type == "llmkit":
        chunk = chunk_tokens(config.vocab_size, labels.numel(), labels.device)
        if chunk:
            return model(**forward_inputs(batch, isolate), shifted_labels=labels, chunk_tokens=chunk).loss
    logits = model(**forward_inputs(batch, isolate)).logits  # (B, T, V)
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE
    ).view_as(labels)


@torch.no_grad()
def score_rows(
    model: nn.Module, rows: Rows, batch_size: int, eos_token_id: int, accelerator: Any = None, isolate: bool = True
) -> ShardScore:
    """Every token of the shard once; with several processes each scores its share of the batches.

    `isolate=False` for a model that cannot keep packed documents apart: earlier documents of a row are then seen.
    The model's training flag comes back as it was.
    """
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nll = torch.zeros(len(rows.store.ends) + 1, dtype=torch.float64)  # per document; the last takes the rest
    sums = torch.zeros(3, dtype=torch.float64)  # nats, nats on EOS, tokens; on the CPU, since MPS has no float64
    sweep = rows.sweep(batch_size)
    while turn := list(itertools.islice(sweep, world_size)):  # sharded weights: every rank must take every turn
        is_spare = rank >= len(turn)
        arrays = turn[0 if is_spare else rank]
        batch = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}
        on_device = {key: value.to(device) for key, value in batch.items()}
        losses = token_losses(model, on_device, isolate=isolate and rows.plan is not None).cpu().double()
        if is_spare:
            continue
        labels = batch["shift_labels"]
        is_label = labels != IGNORE
        sums += torch.stack([losses.sum(), losses[labels == eos_token_id].sum(), is_label.sum()])
        if "document" in batch:
            nll.index_add_(0, batch["document"].flatten() % len(nll), losses.flatten())
    model.train(was_training)
    if world_size > 1:
        sums, nll = (accelerator.reduce(x.to(device)).cpu() for x in (sums, nll))
    total, on_eos, count = sums.tolist()
    num_bytes = rows.store.manifest.get("num_bytes")
    stderr, entropy = None, rows.entropy
    if entropy is not None and rows.plan is not None and rows.store.log_probs is not None:
        excess = nll[:-1].numpy() + rows.store.log_probs  # per document, nats above the grammar
        stderr = float(excess.std(ddof=1) * math.sqrt(len(excess)) / count) if len(excess) > 1 else None
    return ShardScore(
        loss=total / count,
        bits_per_byte=(total - on_eos) / math.log(2) / num_bytes if num_bytes else None,
        entropy=entropy,
        gap_stderr=stderr,
        num_tokens=int(count),
    )
