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
# in the names of modules that carry a state along the row, or pool blocks of it
RECURRENT = (
    "mamba", "rwkv", "recurrent", "lru", "lstm", "delta", "linear_attention", "linearattention", "lightning",
    "shortconv", "retention", "gatedlinear", "hyena", "compressor",
)  # fmt: skip
RECURRENT_KINDS = ("linear", "mamba", "conv", "recurrent", "ssm", "rwkv")  # in layer_types and the like
WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "local_attention", "window_size")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "block_size")
SHORT, LONG = 24, 200  # tokens of a row, without and with a window
IDS = 200  # ids drawn from at most


def bare(model: Any) -> Any:
    """Without an adapter's or the compiler's wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any, name: str) -> bool:
    """Whether the forward names this argument, or hands **kwargs on to an inherited or inner one that does."""
    inner = bare(model)
    within = getattr(inner, getattr(inner, "base_model_prefix", "") or "", None)
    for kind in (*type(inner).__mro__, type(within)):
        forward = vars(kind).get("forward")
        if forward is None or kind is nn.Module:
            continue
        parameters = inspect.signature(forward).parameters
        if name in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


def logits_of(
    model: Any, ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None, **more: Any
) -> Tensor:
    """(B, T, V) of one pass, without cache unless asked for, from a ModelOutput, a dict, a tuple or a bare tensor."""
    arguments: dict[str, Any] = dict(more)
    if accepts(model, "use_cache"):
        arguments.setdefault("use_cache", False)
    if mask is not None:
        arguments["attention_mask"] = mask
    if position_ids is not None:
        arguments["position_ids"] = position_ids
    out = _called(model, ids, arguments)
    if out.shape[1] != ids.shape[1] and "labels" not in more and accepts(model, "labels"):
        out = _called(model, ids, arguments | {"labels": ids})  # nanoGPT gives the last position alone without labels
    return out.float()


def _called(model: Any, ids: Tensor, arguments: dict[str, Any]) -> Tensor:
    out = model(input_ids=ids, **arguments) if accepts(model, "input_ids") else model(ids, **arguments)
    logits = out.get("logits") if isinstance(out, dict) else getattr(out, "logits", None)
    if logits is None and isinstance(out, (tuple, list)):
        logits = next(part for part in out if isinstance(part, Tensor) and part.ndim == 3)
    return out if logits is None else logits


def num_ids(model: Any) -> int:
    """Rows of the embedding, whatever an adapter put around it."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        return int(getattr(model.config, "vocab_size", 0) or found[0].num_embeddings)
    count = getattr(embedding, "num_embeddings", None)
    return count if count is not None else len(embedding.weight)


def special_ids(model: Any) -> list[int]:
    """Pad, EOS and BOS of the config, those that have a row."""
    config = text_config(model)
    found: list[Any] = []
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(config, key, None)
        found += value if isinstance(value, (list, tuple)) else [value]
    return list(dict.fromkeys(t for t in found if isinstance(t, int) and 0 <= t < num_ids(model)))


def draw_ids(model: Any, rows: int, length: int, seed: int = 0) -> Tensor:
    """(rows, length) random ids without the config's special ones."""
    special = special_ids(model)
    size = min(num_ids(model), IDS)
    allowed = torch.tensor([i for i in range(size) if i not in special] or list(range(size)))
    picks = torch.randint(len(allowed), (rows, length), generator=torch.Generator().manual_seed(seed))
    return allowed[picks].to(next(model.parameters()).device)


def others(ids: Tensor) -> Tensor:
    """Another id in every place, of those that occur in `ids`."""
    known = ids.unique()
    return known[(torch.searchsorted(known, ids) + 1) % len(known)]


def text_config(owner: Any) -> Any:
    """The language model's part of a config, or of what has one; the whole where there is no such part, or several."""
    config = getattr(owner, "config", owner)
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # several
        return config


def window_of(config: Any) -> int:
    """The longest window of the config; 0 where there is none."""
    if getattr(config, "use_sliding_window", True) is False:
        return 0
    windows = [getattr(config, key, None) for key in WINDOWS]
    return max([w for w in windows if isinstance(w, int) and not isinstance(w, bool) and w > 0], default=0)


def longest_row(model: Any) -> int:
    """Positions that the model has."""
    limits = [getattr(text_config(model), key, None) for key in POSITIONS]
    return min([n for n in limits if isinstance(n, int) and n > 0], default=4096)


def length_beyond_window(model: Any) -> int:
    """A row long enough for the window to matter, within the positions that the model has."""
    window = window_of(text_config(model))
    length = SHORT if window == 0 else max(SHORT, min(2 * window + 9, LONG))
    return max(8, min(length, longest_row(model) - 8))


def recurrent(model: Any) -> bool:
    """Some layer carries a state along the row: padding left of it is seen, packed documents run into each other."""
    names = {type(module).__name__.lower() for module in bare(model).modules()}
    config = text_config(model)
    kinds = [getattr(config, key, None) for key in ("layer_types", "layers_block_type", "block_types")]
    kinds = [str(k) for kind in kinds if isinstance(kind, (list, tuple)) for k in kind]
    return (
        any(word in str(name) for name in names for word in RECURRENT)
        or any(word in str(kind) for kind in kinds for word in RECURRENT_KINDS)
        or any(isinstance(m, nn.Conv1d) and m.kernel_size[0] > 1 for m in bare(model).modules())
    )


def is_mixture(model: Any) -> bool:
    """Tokens choose experts: a near-tie of the router may flip by rounding."""
    words = ("moe", "expert", "router", "sparsemoe", "mixtureof")
    return any(word in type(module).__name__.lower() for module in bare(model).modules() for word in words)


def positions_of(model: Any, mask: Tensor) -> Tensor | None:
    """position_ids as `generate` makes them from a mask; None where the forward takes none."""
    if not accepts(model, "position_ids"):
        return None
    return (mask.cumsum(-1) - 1).clamp_min(0)


def isolates_by_position(model: Any) -> bool:
    """Whether the code of this architecture hands position_ids to the mask: then restarting ones must isolate."""
    inner = bare(model)
    within = getattr(inner, getattr(inner, "base_model_prefix", "") or "", None)
    for module in {inspect.getmodule(kind) for kind in (*type(inner).__mro__, type(within))}:
        if module is None or not hasattr(module, "create_causal_mask"):
            continue
        try:
            source = inspect.getsource(module)
        except (OSError, TypeError):
            continue
        calls = re.findall(r"(?:= create_\w*mask\(|= mask_function\(|mask_kwargs = \{)(.*?)[)}]\n", source, flags=re.S)
        if any("position_ids" in call for call in calls):
            return True
    return False


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
    logits: Tensor  # (B, T, V) of the tokens handed in, padding cut off again; 0 where a row ended before
    is_real: Tensor  # (B, T) bool: there is a token


Run = Callable[[Tensor], Pass]
MISSING = (0, 5, 2)  # tokens that the rows of a padded batch lack, in turn: some rows have no padding


def branches(model: Any, ids: Tensor) -> Iterator[tuple[str, Run]]:
    """(name, run) of every way through the forward: backend x mask x mode, and what hangs on none of them."""
    masks = ["no mask"]
    if accepts(model, "attention_mask"):
        masks += ["mask of ones", "padded right"] + ([] if recurrent(model) else ["padded left"])
    found = backends(model)
    for backend in found:
        for mask in masks:
            for mode in ("evaluation", "training"):
                yield f"{backend.name}, {mask}, {mode}", _runner(model, backend, mask, mode)
    first = found[0]
    yield f"{first.name}, no mask, one row", lambda rows: _one_by_one(_runner(model, first, "no mask"), rows)
    for mask in masks[:2]:
        if accepts(model, "use_cache"):
            yield f"{first.name}, {mask}, with cache", _runner(model, first, mask, use_cache=True)
        if accepts(model, "labels"):
            yield f"{first.name}, {mask}, training with labels", _runner(model, first, mask, "training", labels=True)
        if getattr(bare(model), "supports_gradient_checkpointing", False):
            yield f"{first.name}, {mask}, training with checkpointing", _runner(model, first, mask, "checkpointing")


def _runner(model: Any, backend: Backend, mask: str, mode: str = "evaluation", **more: Any) -> Run:
    return lambda rows: _run(model, rows, backend, mask, mode, **more)


def _one_by_one(run: Run, rows: Tensor) -> Pass:
    passes = [run(rows[i : i + 1]) for i in range(len(rows))]
    return Pass(torch.cat([p.logits for p in passes]), torch.cat([p.is_real for p in passes]))


def _run(
    model: Any, ids: Tensor, backend: Backend, kind: str, mode: str, labels: bool = False, use_cache: bool = False
) -> Pass:
    rows, mask, is_real = padded(ids, kind, filler(model, ids))
    positions = positions_of(model, mask) if kind == "padded left" else None
    more: dict[str, Any] = ({"labels": rows} if labels else {}) | ({"use_cache": True} if use_cache else {})
    was_training = [(module, module.training) for module in model.modules()]
    model.train(mode != "evaluation")
    torch.manual_seed(0)  # whatever is drawn in training mode is drawn alike
    try:
        with backend, checkpointing(model) if mode == "checkpointing" else contextlib.nullcontext():
            logits = logits_of(model, rows, None if kind == "no mask" else mask, positions, **more)
    finally:
        for module, flag in was_training:
            module.training = flag
    return Pass(gathered(logits, mask), is_real)


@contextlib.contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Layers are run by gradient checkpointing, where the class can."""
    inner = bare(model)
    before = inner.is_gradient_checkpointing
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if not before:
            inner.gradient_checkpointing_disable()


def filler(model: Any, ids: Tensor) -> int:
    """What padding is made of: the pad id, or EOS where there is none."""
    special = special_ids(model)
    return special[0] if special else int(ids[0, 0])


def padded(ids: Tensor, kind: str, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as a batch would hold them, their mask, and which of the tokens given are in it: (B, T) each."""
    rows, mask = ids.clone(), torch.ones_like(ids)
    if kind not in ("padded right", "padded left"):
        return rows, mask, mask.bool()
    is_real = torch.ones_like(ids).bool()
    for row in range(len(ids)):
        keep = ids.shape[1] - MISSING[row % len(MISSING)]
        is_real[row, keep:] = False
        place = slice(0, keep) if kind == "padded right" else slice(ids.shape[1] - keep, None)
        rows[row], mask[row] = pad, 0
        rows[row, place], mask[row, place] = ids[row, :keep], 1
    return rows, mask, is_real


def gathered(logits: Tensor, mask: Tensor) -> Tensor:
    """(B, T, V) with every row's real tokens first, as they were before padding; 0 behind them."""
    out = torch.zeros_like(logits)
    for row, real in enumerate(mask.bool()):
        out[row, : int(real.sum())] = logits[row, real]
    return out
