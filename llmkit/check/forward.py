"""Calling anyone's forward: what it takes, which branches it has, logits whatever it returns.

Owns the ways in which one model can be run.   for name, run in branches(model, ids): run(ids).logits

Leaves out what the results mean (`model.py`).
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BACKENDS = ("eager", "sdpa")
RECURRENT = ("mamba", "rwkv", "recurrent", "lru", "xlstm", "rglru", "delta", "linear_attention", "ssm", "shortconv")
IDS = 200  # ids drawn from at most


def bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any, name: str) -> bool:
    """Whether the class's own forward names this argument (`**kwargs` alone does not count for it)."""
    return name in inspect.signature(type(bare(model)).forward).parameters


def logits_of(model: Any, ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
    """(B, T, V) of one pass without cache, from a ModelOutput, a tuple or a bare tensor."""
    arguments: dict[str, Any] = {"input_ids": ids}
    if accepts(model, "use_cache"):
        arguments["use_cache"] = False
    if mask is not None:
        arguments["attention_mask"] = mask
    if position_ids is not None:
        arguments["position_ids"] = position_ids
    out = model(**arguments)
    logits = getattr(out, "logits", None)
    if logits is None:
        logits = out if isinstance(out, Tensor) else out[0]
    return logits.float()


def num_ids(model: Any) -> int:
    """Rows of the embedding, whatever an adapter put around it."""
    embedding = model.get_input_embeddings()
    count = getattr(embedding, "num_embeddings", None)
    return count if count is not None else len(embedding.weight)


def draw_ids(model: Any, rows: int, length: int, seed: int = 0) -> Tensor:
    """(rows, length) random ids without the config's special ones."""
    config = text_config(model)
    special = {getattr(config, key, None) for key in ("pad_token_id", "bos_token_id")}
    eos = getattr(config, "eos_token_id", None)
    special |= set(eos) if isinstance(eos, list) else {eos}
    size = min(num_ids(model), IDS)
    allowed = torch.tensor([i for i in range(size) if i not in special] or list(range(size)))
    picks = torch.randint(len(allowed), (rows, length), generator=torch.Generator().manual_seed(seed))
    return allowed[picks].to(next(model.parameters()).device)


def text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def length_beyond_window(model: Any) -> int:
    """A row long enough for the window to matter, within the positions that the model has."""
    config = text_config(model)
    windows = [
        getattr(config, key, None) for key in ("sliding_window", "attention_window_size", "attention_chunk_size")
    ]
    window = max([w for w in windows if isinstance(w, int) and w > 0], default=0)
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")]
    most = min([n for n in limits if isinstance(n, int) and n > 0], default=4096)
    length = 24 if window == 0 else min(2 * window + 9, 200)
    return max(8, min(length, most - 8))


def recurrent(model: Any) -> bool:
    """Some layer carries a state along the row: padding left of it is seen, packed documents run into each other."""
    names = {type(module).__name__.lower() for module in bare(model).modules()}
    return any(word in name for name in names for word in RECURRENT)


def positions_of(model: Any, mask: Tensor) -> Tensor | None:
    """position_ids as `generate` makes them from a mask; None where the forward takes none."""
    if not accepts(model, "position_ids"):
        return None
    return (mask.cumsum(-1) - 1).clamp_min(0)


def isolates_by_position(model: Any) -> bool:
    """Whether the code of this architecture hands position_ids to the mask: then restarting ones must isolate."""
    module = inspect.getmodule(type(bare(model)))
    try:
        source = inspect.getsource(module) if module else ""
    except OSError:
        return False
    calls = re.findall(r"(?:create_causal_mask\(|mask_kwargs = \{)(.*?)[)}]\n", source, flags=re.S)
    return any("position_ids" in call for call in calls)


class Backend(contextlib.AbstractContextManager):
    """Inside, the model's attention is the named one."""

    def __init__(self, model: Any, name: str | None):
        self.model, self.wanted = bare(model), name
        self.name = name or "the only backend"

    def __enter__(self) -> "Backend":
        if self.wanted:
            self.before = self.model.config._attn_implementation
            self.model.set_attn_implementation(self.wanted)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.wanted:
            self.model.set_attn_implementation(self.before)


def backends(model: Any) -> list[Backend]:
    """eager and sdpa where both work, the one that is set first; a nameless one where nothing can be switched."""
    inner = bare(model)
    current = getattr(inner.config, "_attn_implementation", None)
    if not hasattr(inner, "set_attn_implementation") or current not in BACKENDS:
        return [Backend(model, None)]
    found = []
    for name in (current, *(other for other in BACKENDS if other != current)):
        try:
            with Backend(model, name):
                pass
            found.append(Backend(model, name))
        except Exception:
            continue
    return found or [Backend(model, None)]


@dataclass
class Pass:
    logits: Tensor  # (B, T, V) of the tokens handed in, padding cut off again
    is_real: Tensor  # (B, T) bool


def branches(model: Any, ids: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Pass]]]:
    """(name, run) of every way through the forward: backend x mask x mode. Each run takes ids like `ids`."""
    masks = ["no mask"]
    if accepts(model, "attention_mask"):
        masks += ["mask of ones", "padded right"] + ([] if recurrent(model) else ["padded left"])
    for backend in backends(model):
        for mask in masks:
            for mode in ("evaluation", "training"):
                if mode == "training" and mask in ("mask of ones",):
                    continue  # the same code as without training, seen by the others

                def run(rows: Tensor, backend: Backend = backend, mask: str = mask, mode: str = mode) -> Pass:
                    return _run(model, rows, backend, mask, mode)

                yield f"{backend.name}, {mask}, {mode}", run


def _run(model: nn.Module, ids: Tensor, backend: Backend, kind: str, mode: str) -> Pass:
    ones = torch.ones_like(ids)
    pad = torch.full_like(ids[:, :3], int(ids[0, 0]))
    rows, mask, real = ids, None, slice(None)
    if kind == "mask of ones":
        mask = ones
    elif kind == "padded right":
        rows, mask, real = torch.cat([ids, pad], 1), torch.cat([ones, 0 * pad], 1), slice(0, ids.shape[1])
    elif kind == "padded left":
        rows, mask, real = torch.cat([pad, ids], 1), torch.cat([0 * pad, ones], 1), slice(pad.shape[1], None)
    positions = positions_of(model, mask) if kind == "padded left" and mask is not None else None
    was_training = model.training
    model.train(mode == "training")
    try:
        with backend:
            logits = logits_of(model, rows, mask, positions)
    finally:
        model.train(was_training)
    return Pass(logits[:, real], torch.ones_like(ids, dtype=torch.bool))
