"""What a smaller copy of a model costs and saves: perplexity, agreement, bytes, memory, tokens per second.

    scores = compare_on(original, {"quantized": model}, passages, batch_size=16, pad=0);  scores["quantized"].ratio

Everything is measured on both models and on the same text. Tokens per second are of batch 1, the models in turn, the
median of the rounds. Memory is that of a fresh process with one model: `python -m llmkit.deploy.cost FOLDER cpu 0`.
Leaves out which text (passages.py) and how a model became smaller (quantize.py).
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data.loader import IGNORE
from ..evaluate.paired import compare

if TYPE_CHECKING:  # the fresh process needs none of what it imports
    from .passages import Passages

MOST_LOGITS = 2**26  # of one batch of one model: 256 MB in float32, twice that for what is made of them
ROUNDS, NEW_TOKENS, PREFILL = 5, 32, 256


# ---- perplexity and agreement


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one model against the original, on one shard; `low` and `high` hold 95 % of resampled documents' ratios."""

    loss: float  # nats per token
    original_loss: float
    ratio: float  # of perplexities
    low: float
    high: float
    top1_agreement: float  # share of positions with the same likeliest token
    kl: float  # nats per position, original to this one
    num_documents: int
    num_tokens: int


@torch.no_grad()
def compare_on(
    original: Any, others: dict[str, Any], passages: "Passages", batch_size: int, pad: int
) -> dict[str, Cost]:
    """By name of the other model. Raises ValueError where a loss is not finite."""
    assert "original" not in others, "a name of ours"
    nats = {name: np.zeros(passages.num_documents) for name in ("original", *others)}
    agree, kl = dict.fromkeys(others, 0.0), dict.fromkeys(others, 0.0)
    counts = np.zeros(passages.num_documents)
    rows = sorted(passages.rows, key=lambda row: -len(row[1]))
    start = 0
    while start < len(rows):
        length = len(rows[start][1])
        size = min(batch_size, max(1, MOST_LOGITS // (length * original.config.get_text_config().vocab_size)))
        block = rows[start : start + size]
        start += size
        ids, labels = _pad([row[1] for row in block], pad), _pad([row[2] for row in block], IGNORE)
        documents = torch.tensor([row[0] for row in block])[:, None].expand_as(labels)[labels != IGNORE].numpy()
        wanted = labels[labels != IGNORE]  # (N,) over all scored positions
        np.add.at(counts, documents, 1)
        logp = _log_probs(original, ids, labels)  # (N, V)
        np.add.at(nats["original"], documents, _nats(logp, wanted))
        for name, model in others.items():
            logq = _log_probs(model, ids, labels)
            np.add.at(nats[name], documents, _nats(logq, wanted))
            agree[name] += (logp.argmax(-1) == logq.argmax(-1)).sum().item()
            kl[name] += F.kl_div(logq, logp, reduction="sum", log_target=True).item()
    for name, found in nats.items():
        if not np.isfinite(found).all():
            raise ValueError(f"the loss of the {name} model is not finite on some documents")
    total = counts.sum()
    return {name: _cost(nats[name], nats["original"], counts, agree[name] / total, kl[name] / total) for name in others}


def _cost(nats: NDArray, original: NDArray, counts: NDArray, agreement: float, kl: float) -> Cost:
    pair = compare([nats], [original], higher_is_better=False, weights=[counts])
    total = counts.sum()
    ratio, low, high = (math.exp(value) for value in (pair.difference, pair.low, pair.high))
    return Cost(nats.sum() / total, original.sum() / total, ratio, low, high, agreement, kl, len(counts), int(total))


def _pad(rows: list[list[int]], value: int) -> Tensor:
    """(B, T), padded on the right, where causal attention never looks from a scored position."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def _log_probs(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """(N, V) float32 of the scored positions."""
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=ids.to(device), use_cache=False).logits  # (B, T, V)
    return F.log_softmax(logits[labels.to(device) != IGNORE].float(), -1)


def _nats(logp: Tensor, wanted: Tensor) -> NDArray:
    return -logp.gather(1, wanted.to(logp.device)[:, None])[:, 0].double().cpu().numpy()


# ---- speed


@torch.no_grad()
def measure_speed(models: dict[str, Any], row: list[int]) -> dict[str, dict[str, float]]:
    """{name: {decode, prefill}} in tokens per second: greedy with a cache, and one pass over a row of the text."""
    device = next(iter(models.values())).get_input_embeddings().weight.device
    ids = torch.tensor([row[:PREFILL]], device=device)  # (1, T)
    context = getattr(next(iter(models.values())).config.get_text_config(), "max_position_embeddings", None) or 2048
    opening = ids[:, : max(1, min(8, ids.shape[1], context // 2))]
    count = min(NEW_TOKENS, context - opening.shape[1])

    def decode(model: Any) -> float:
        seconds = _timed(device, lambda: model.generate(
            opening, attention_mask=torch.ones_like(opening), do_sample=False, max_new_tokens=count,
            min_new_tokens=count, pad_token_id=0,
        ))  # fmt: skip
        return count / seconds

    def prefill(model: Any) -> float:
        return ids.shape[1] / _timed(device, lambda: model(input_ids=ids, use_cache=False))

    rates: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            found = {"decode": decode(model), "prefill": prefill(model)}
            for what, rate in found.items():
                rates[name][what] += [rate] if turn else []  # the first warms up: packing, kernels
    return {name: {what: statistics.median(values) for what, values in found.items()} for name, found in rates.items()}


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ---- memory


def weight_bytes(model: Any) -> int:
    """Parameters, buffers, and the scales of quantised layers, which `get_memory_footprint` leaves out."""
    scales = 0
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)  # of 4 bit
        held = [state, getattr(state, "state2", None)] if state is not None else []
        scales += sum(part.absmax.nbytes for part in held if part is not None)
        rows = getattr(getattr(module, "state", None), "SCB", None)  # of 8 bit, once it has run
        scales += rows.nbytes if isinstance(rows, Tensor) else 0
    return model.get_memory_footprint() + scales


def resident_growth(path: str, device: str, trust_remote_code: bool) -> int | None:
    """Bytes that a fresh process holds more once it has loaded the model and run it once; None where that failed.

    Files are mapped, so that rows of an embedding which no token asked for are not among them.
    """
    words = [sys.executable, "-m", __name__, path, device, str(int(trust_remote_code))]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        return int(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        return None


def _loads_and_runs(path: str, device: str, trust_remote_code: bool) -> int:
    """In the fresh process. The second load counts: the first brought the libraries in, and has gone again."""
    import psutil

    from ..run import quiet_libraries

    quiet_libraries()
    ids = torch.zeros((1, 8), dtype=torch.long, device=device)
    before, grown = 0, 0
    for _ in range(2):
        _give_back()
        before = psutil.Process().memory_info().rss
        model = plain_load(path, device, trust_remote_code)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        grown = torch.cuda.max_memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss - before
        del model
    return grown


def _give_back() -> None:
    """Memory that nothing holds goes back to the system, where it can be told to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def plain_load(path: str | Path, device: str, trust_remote_code: bool = False, **how: Any) -> Any:
    """As anyone loads it: `from_pretrained` and no more, in the dtype that is stored, in eval mode."""
    from transformers import AutoModelForCausalLM

    from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes

    where = {"device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, **where, **how).eval()


if __name__ == "__main__":
    print(json.dumps(_loads_and_runs(sys.argv[1], sys.argv[2], sys.argv[3] == "1")))
