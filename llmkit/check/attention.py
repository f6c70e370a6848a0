"""What attention does elsewhere than in one plain pass: with a cache, with another backend, at the edge of its window.

Owns checks of family `model`. Leaves out causality and padding (`model.py`) and packed rows (`packing.py`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .forward import (
    accepts,
    backends,
    bare,
    draw_ids,
    logits_of,
    longest_row,
    others,
    recurrent,
    text_config,
    window_of,
)
from .measure import CAUSAL, LEAST, floor, need_alive, on_each, share
from .runner import Outcome, check, failed, passed
from .subject import NotApplicable, NotRun, Subject

NEW = 8  # tokens generated
SLIDING = ("sliding_attention", "sliding")  # in layer_types
LOCAL = (*SLIDING, "local", "attention", "hybrid_sliding")  # in layer_types and the like


def generated(model: Any, prompt: Tensor, mask: Tensor | None = None, count: int = NEW) -> tuple[Tensor, Tensor]:
    """(B, n, V) raw scores of greedily generated tokens, with the cache, and (B, T + n) ids."""
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt) if mask is None else mask, max_new_tokens=count,
        min_new_tokens=count, do_sample=False, num_beams=1, use_cache=True, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return torch.stack(out.logits, 1).float(), out.sequences


@check("cache-differs", family="model", tier=2, catalogue="K22")
def cache_differs(subject: Subject) -> Outcome:
    """Generating with the cache is not what the model computes without it.

    Symptom: evaluation losses are fine and generated text is not.
    Example: positions that start at 0 again with every cached step; a cache slot that is overwritten too early.
    Detected: rows in one pass against the same rows token by token, in chunks of 1, 3 and the rest, and in a long
        chunk before short ones, with and without a mask, past the sliding window; then what `generate` with its cache
        gives every new token against a plain pass over what it wrote.
    Tolerance: 1e-4 of the logits' deviation, or 10 times what rounding does to this model; the median over positions
        for a mixture of experts.
    Spares: models that return no cache. RoPE scaling that switches with the length sees one length only.
    Fix: positions and the mask must start where the cache ends; look at `cache_position`, `get_seq_length`, the window.
    Sources: torchtune#959, transformers#48748, mlx-examples#977.
    """
    found = [item for items in on_each(subject, _cached_ways, rows=2) for item in items]
    if not found:
        raise NotRun("the model returned no cache, and generate does not run")
    bad = [item for item in found if not item[1] <= item[2]]
    worst, limit = max(moved for _, moved, _, _ in found), max(limit for *_, limit, _ in found)
    text = f"cached logits move by {worst:.1e} of their deviation"
    if bad:
        evidence = [{"row": 0, "position": at, "note": f"{name}: {moved:.1e}"} for name, moved, _, at in bad]
        return failed(text, f"{limit:.0e}", evidence)
    return passed(f"{text}, {len(found)} ways", f"{limit:.0e}")


def _cached_ways(model: Any, ids: Tensor) -> list[tuple[str, float, float, int]]:
    """(way, share, limit, first position that is off) of every way to use a cache that runs."""
    has_cache = accepts(model, "past_key_values") or accepts(model, "cache_params")
    if not has_cache:
        raise NotApplicable("the forward takes no cache")
    limit, size = floor(model, ids), ids.shape[1]
    whole = logits_of(model, ids)
    scale = need_alive(whole)
    results: list[tuple[str, Tensor, Tensor]] = []
    if accepts(model, "past_key_values") and not recurrent(model):
        ways = {"token by token": [1] * size, "chunks of 1, 3 and the rest": [1, 3, size - 4]}
        ways["a long chunk, then 1 and 2"] = [size - 3, 1, 2]
        for name, chunks in ways.items():
            for is_masked in (True, False) if accepts(model, "attention_mask") else (False,):
                logits = _in_chunks(model, ids, chunks, is_masked)
                if logits is not None:
                    results.append((name if is_masked else f"{name}, no mask", whole, logits))
    for start in (size - NEW, 3):
        with contextlib.suppress(Exception):  # a model that cannot generate is not asked to
            new, sequences = generated(model, ids[:, :start], count=min(size - start, 2 * NEW + 4))
            plain = logits_of(model, sequences)[:, start - 1 : -1]
            results.append((f"generate after {start} tokens", plain, new[:, : plain.shape[1]]))
    found = []
    for name, plain, logits in results:
        gaps = (plain - logits).abs().amax((0, 2)) > limit * scale
        at = int(gaps.nonzero()[0]) if gaps.any() else 0
        at += int(name.split()[2]) if name.startswith("generate") else 0
        found.append((name, share(plain, logits, scale, model), limit, at))
    return found


def _in_chunks(model: Any, ids: Tensor, chunks: list[int], is_masked: bool) -> Tensor | None:
    """Logits of the rows, fed in chunks with the cache. None without a cache."""
    cache, parts, at = None, [], 0
    for size in chunks:
        arguments: dict[str, Any] = {"input_ids": ids[:, at : at + size], "use_cache": True, "past_key_values": cache}
        if not accepts(model, "use_cache"):
            del arguments["use_cache"]
        if is_masked:
            arguments["attention_mask"] = torch.ones_like(ids[:, : at + size])
        out = model(**arguments)
        is_tuple = isinstance(out, tuple)
        cache = (out[1] if len(out) > 1 else None) if is_tuple else getattr(out, "past_key_values", None)
        if cache is None:
            return None
        parts.append(out[0] if is_tuple else out.logits)
        at += size
    return torch.cat(parts, 1).float()


@check("backend-changes-logits", family="model", tier=2, catalogue="K23")
def backend_changes_logits(subject: Subject) -> Outcome:
    """Attention backends disagree: one of them drops the window, the soft-cap, the sinks or the scale.

    Symptom: the loss jumps when a faster attention is switched on; a model trained under one backend is served by
        another and answers worse.
    Example: a sliding window that only eager applies; a soft-cap that sdpa ignores.
    Detected: eager against sdpa on rows longer than the window, with no mask and with padding, in evaluation and in
        training mode; and training mode against evaluation, dropout off.
    Tolerance: 1e-4 of the logits' deviation, or 10 times what rounding does to this model; the median over positions
        for a mixture of experts.
    Spares: training modes that are random by design (a router that samples), batch norm.
    Fix: pass the window, soft-cap and scale to every attention function.
    Sources: transformers#32309, LlamaFactory#7387, unsloth#8253, transformers#39408.
    """
    found = [item for items in on_each(subject, _backend_ways) for item in items]
    if not found:
        raise NotApplicable("the model has one attention backend, and training mode is random")
    bad = [item for item in found if not item[1] <= item[2]]
    name, worst, limit, _ = max(found, key=lambda item: item[1] if item[1] == item[1] else float("inf"))
    if bad:
        evidence = [{"row": 0, "position": at, "note": f"{name}: {moved:.1e}"} for name, moved, _, at in bad[:6]]
        return failed(f"{name}: logits differ by {worst:.1e} of their deviation", f"{limit:.0e}", evidence)
    return passed(f"{len(found)} pairs differ by {worst:.1e} of the logits' deviation", f"{limit:.0e}")


def _backend_ways(model: Any, ids: Tensor) -> list[tuple[str, float, float, int]]:
    """(pair, share, limit, position) of backends in each mode, and of the two modes under each backend."""
    limit = floor(model, ids)
    masks: dict[str, Tensor | None] = {"no mask": None}
    if accepts(model, "attention_mask"):
        padded = torch.ones_like(ids)
        padded[:, -3:] = 0
        masks["padded right"] = padded
    real = slice(0, ids.shape[1] - 3)
    results: dict[tuple[str, str, str], Tensor] = {}
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    for mode in ("evaluation", "training"):
        model.train(mode == "training")
        for backend in backends(model):
            with backend:
                for name, mask in masks.items():
                    logits = logits_of(model, ids, mask)[:, real]
                    if mode == "training" and (
                        has_batch_norm or not torch.equal(logits, logits_of(model, ids, mask)[:, real])
                    ):
                        continue
                    results[backend.name, name, mode] = logits
    model.eval()
    scale = need_alive(next(iter(results.values())))
    found = []
    for (first, mask, mode), logits in results.items():
        for other, against in results.items():
            is_pair = (
                other[1:] == (mask, mode)
                if other[0] > first
                else other == (first, mask, "training") and mode == "evaluation"
            )
            if not is_pair:
                continue
            name = (
                f"{other[0]} against {first}, {mask}, {mode}"
                if other[0] > first
                else f"training against evaluation, {first}, {mask}"
            )
            at = int((logits - against).abs().amax((0, 2)).argmax())
            found.append((name, share(logits, against, scale, model), limit, at))
    return found


@check("window-not-applied", family="model", tier=2, catalogue="K23")
def window_not_applied(subject: Subject) -> Outcome:
    """The attention does not see as far as the config says: no sliding window, another one, or one too many.

    Symptom: memory grows with the context although a window is set; long texts score worse than at release.
    Example: `sliding_window` that no backend is given; a window that is one token off; a global layer made local.
    Detected: every layer alone (the others hand on what they get): a token is changed, and the last later position
        whose logits move shows how far the layer sees. Each backend, with no mask and with a mask of ones, both modes.
    Tolerance: none for classes of transformers, where a window counts the token itself; one token for others.
    Spares: layers that see by other means (recurrent ones, convolutions), chunks, attention that picks its tokens.
    Fix: build the mask with `create_sliding_window_causal_mask`, and hand the window to the attention function.
    Sources: unsloth#8253, transformers#39408, #32522.
    """
    with probed_window(subject) as (model, window):
        config = text_config(model)
        layers, kinds = _layers(model, config), _kinds(config)
        if recurrent(model):
            raise NotApplicable("layers that carry a state see further than a window")
        if layers is None:
            raise NotRun("the model's layers were not found")
        if longest_row(model) < 3 * window:
            raise NotRun(f"a row of {3 * window} tokens would be needed")
        ids = draw_ids(model, 1, 3 * window)
        slack = 0 if _counts_itself(model) else 1
        seen: dict[int, set[int]] = {}
        bad = []
        for index, name, reach in _reaches(model, layers, ids, window):
            seen.setdefault(index, set()).add(reach)
            is_local = kinds[index] in LOCAL
            if is_local and not window - slack <= reach <= window + slack:
                far = "the whole row" if reach >= ids.shape[1] else f"{reach} tokens"
                bad.append({"note": f"layer {index}, {name}: sees {far}, the config says {window}"})
            elif kinds[index] == "full_attention" and reach <= window + 1:
                bad.append({"note": f"layer {index}, {name}: sees {reach} tokens, the config says all of them"})
    text = ", ".join(f"layer {i}: {'/'.join(str(r) for r in sorted(reaches))}" for i, reaches in seen.items())
    text = f"tokens seen in a row of {ids.shape[1]}: {text}"
    return failed(text, f"a window of {window}", bad[:6]) if bad else passed(text, f"a window of {window}")


@contextlib.contextmanager
def probed_window(subject: Subject) -> Iterator[tuple[Any, int]]:
    """A model whose window is short, and the window. Raises NotApplicable where the config sets none."""
    subject.need("model")
    config = text_config(subject)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not isinstance(window, int) or not window_of(config) or (kinds and not any(k in SLIDING for k in kinds)):
        raise NotApplicable("the config sets no sliding window")
    lend = subject.small_model if window <= 64 and subject.is_small else subject.small_window
    with lend() as model, torch.no_grad():
        yield model, int(text_config(model).sliding_window)


def _kinds(config: Any) -> list[str]:
    return list(getattr(config, "layer_types", None) or ["sliding_attention"] * int(config.num_hidden_layers))


def _counts_itself(model: Any) -> bool:
    return any(kind.__module__.startswith("transformers.models.") for kind in type(bare(model)).__mro__)


def _layers(model: Any, config: Any) -> nn.ModuleList | None:
    lists = [m for m in bare(model).modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    return lists[0] if lists else None


def _reaches(model: Any, layers: nn.ModuleList, ids: Tensor, window: int) -> Iterator[tuple[int, str, int]]:
    """(layer, branch, number of tokens that a position sees, itself included) of one layer of each kind, alone."""
    changed = ids.clone()
    changed[:, 0] = others(ids)[:, 0]
    masks = {"no mask": None} | ({"mask of ones": torch.ones_like(ids)} if accepts(model, "attention_mask") else {})
    for index in range(min(len(layers), 6)):
        with _alone(layers, index):
            for backend in backends(model):
                for name, mask in masks.items():
                    for mode in ("evaluation", "training")[: 1 + (name == "no mask")]:
                        model.train(mode == "training")
                        with backend:
                            a, b = logits_of(model, ids, mask), logits_of(model, changed, mask)
                        model.eval()
                        gap = (a - b).abs().amax((0, 2)) / need_alive(a)
                        if gap[0] <= LEAST:
                            raise NotRun("changing a token does not move its own logits: no positive control")
                        reach = 1 + int((gap > CAUSAL / 10).nonzero()[-1])
                        yield index, f"{backend.name}, {name}, {mode}", reach


@contextlib.contextmanager
def _alone(layers: nn.ModuleList, index: int) -> Iterator[None]:
    """Every other layer hands on the hidden state that it gets."""

    def skip(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [m.register_forward_hook(skip, with_kwargs=True) for i, m in enumerate(layers) if i != index]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
