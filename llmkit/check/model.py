"""How a model behaves: causality, padding, packing, cache. Redrawn weights, float32, tiny rows.

Owns the tier-2 checks of the forward pass. Leaves out the loss (`loss.py`) and saved files (`saving.py`).

Differences are given as a share of the logits' standard deviation. What float32 does to a repeated, differently shaped
forward pass is measured on the model itself (`noise`), so that a deep or badly conditioned one is not called broken.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .forward import (
    accepts,
    backends,
    branches,
    draw_ids,
    isolates_by_position,
    length_beyond_window,
    logits_of,
    positions_of,
    recurrent,
)
from .runner import Outcome, check, failed, passed
from .subject import NotApplicable, NotRun, Subject, without_dropout

CAUSAL, EQUAL = 1e-5, 1e-4  # of the logits' standard deviation: same shapes, other shapes


def noise(model: nn.Module, ids: Tensor) -> float:
    """What the logits of a row move by when it is run alone and beside copies of itself: rounding of other shapes.

    Beside other rows they would also move where rows see each other, and a bug would raise its own limit.
    """
    whole, alone = logits_of(model, ids[:1].expand(len(ids), -1)), logits_of(model, ids[:1])
    return float((whole[:1] - alone).abs().median() / whole.std().clamp_min(1e-12))


def difference(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """Largest difference in units of `scale`; infinite where one of them is not finite."""
    moved = (a - b).abs().max() / scale.clamp_min(1e-12)
    return float(moved) if torch.isfinite(moved) else float("inf")


def need_alive(logits: Tensor) -> Tensor:
    """Their standard deviation. Raises NotRun for logits that are constant or not finite: nothing could be seen."""
    scale = logits.std()
    if not torch.isfinite(logits).all():
        raise NotRun("logits are not finite with redrawn weights")
    if scale < 1e-6:
        raise NotRun("logits are constant with redrawn weights")
    return scale


@contextlib.contextmanager
def probed(subject: Subject, rows: int = 3, seed: int = 0) -> Iterator[tuple[Any, Tensor]]:
    """The small model without dropout, and random ids (rows, T) that go beyond its window."""
    subject.need("model")
    with subject.small_model(seed) as model, without_dropout(model), torch.no_grad():
        yield model, draw_ids(model, rows, length_beyond_window(model))


@check("future-leak", family="model", tier=2, catalogue="K19")
def future_leak(subject: Subject) -> Outcome:
    """A token sees tokens that come after it.

    Symptom: training loss falls far below what held-out text allows, and generation is garbage: the model copies its
        targets from the future.
    Example: attention with `is_causal=False`, or a mask that one branch (sdpa without padding) forgets.
    Detected: tokens from a position on are changed; logits before it must not move. Every branch is tried: each
        attention backend, no mask, all ones, padding right and left, evaluation and training mode.
    Tolerance: 1e-5 of the logits' deviation: both runs have the same shapes, so that only the mask matters; 100 times
        what the same input moves when it is run twice, where that is more.
    Spares: models whose loss is not next-token prediction (encoders, diffusion). Rows have one length, so that RoPE
        scaling that depends on the length sees the same.
    Fix: look for the mask of the branch that is named; in transformers models `is_causal` and `create_causal_mask`.
    Sources: transformers#48748, keras#23038, LLMs-from-scratch#1062, torchtune#959.
    """
    with probed(subject) as (model, ids):
        size, cut = ids.shape[1], ids.shape[1] // 2
        worst, where, count = 0.0, "", 0
        bad: list[dict[str, Any]] = []
        for name, run in branches(model, ids):
            for at in (cut, size - 1):
                other = ids.clone()
                other[:, at:] = (ids[:, at:] + 1 + torch.arange(size - at, device=ids.device)) % int(ids.max() + 1)
                before, again, after = run(ids), run(ids), run(other)
                scale = need_alive(before.logits)
                if difference(before.logits[:, at:], after.logits[:, at:], scale) <= 1e-4:
                    raise NotRun(f"{name}: changing tokens moves no logits at all: no positive control")
                seen = before.is_real.clone()
                seen[:, at:] = False
                if not seen.any():
                    continue
                moved = difference(before.logits[seen], after.logits[seen], scale)
                limit = max(CAUSAL, 100 * difference(before.logits, again.logits, scale))
                count += 1
                if moved > worst:
                    worst, where = moved, name
                if moved > limit:
                    gap = (before.logits - after.logits).abs().amax(-1).masked_fill(~seen, 0)
                    row, position = divmod(int(gap.argmax()), size)
                    note = f"{name}: logits at position {position} move by {moved:.1e} when tokens from {at} on change"
                    bad.append({"row": row, "position": position, "note": note})
        text = f"earlier logits move by {worst:.1e} of their deviation" + (f" ({where})" if worst > CAUSAL else "")
    if bad:
        return failed(f"{text}; {len(bad)} of {count} branches leak", f"{CAUSAL:.0e}", bad[:6])
    return passed(f"{text}, {count} branches", f"{CAUSAL:.0e}")


@check("padding-changes-logits", family="model", tier=2, catalogue="K20")
def padding_changes_logits(subject: Subject) -> Outcome:
    """Padding changes what the model says about real tokens.

    Symptom: batched generation is worse than one prompt at a time; the shorter a prompt, the worse.
    Example: position_ids counted from the left edge, padding included; a mask that is not added to the scores.
    Detected: a row alone against the same row padded right and left, with attention_mask, and position_ids made from
        the mask as `generate` makes them; then the first scores of `generate` itself.
    Tolerance: 1e-4 of the logits' deviation, or 30 times the rounding between a row alone and in a batch.
    Spares: recurrent models (Mamba, RWKV, RG-LRU) are not asked for left padding through a plain forward; a model
        whose forward takes no attention_mask is not asked at all.
    Fix: derive positions from the mask (`attention_mask.cumsum(-1) - 1`) and mask padding in every backend.
    Sources: transformers#18388, #18478, nnsight#673, unsloth#3699.
    """
    with probed(subject) as (model, ids):
        if not accepts(model, "attention_mask"):
            raise NotApplicable("the forward takes no attention_mask")
        floor = max(EQUAL, 30 * noise(model, ids))
        alone = logits_of(model, ids)
        scale = need_alive(alone)
        pad = torch.full_like(ids[:, :5], int(ids[0, 0]))
        worst, bad = 0.0, []
        for side in ("right", "left"):
            if side == "left" and recurrent(model):
                continue
            padded = torch.cat([ids, pad] if side == "right" else [pad, ids], 1)
            mask = torch.ones_like(padded)
            real = slice(0, ids.shape[1]) if side == "right" else slice(pad.shape[1], None)
            mask[:, : pad.shape[1]] = int(side == "right")
            mask[:, ids.shape[1] :] *= int(side == "left")
            for backend in backends(model):
                with backend:
                    out = logits_of(model, padded, mask, positions_of(model, mask))[:, real]
                moved = difference(alone, out, scale)
                worst = max(worst, moved)
                if moved > floor:
                    position = int((alone - out).abs().amax((0, 2)).argmax())
                    bad.append({"row": 0, "position": position, "note": f"padded {side}, {backend.name}: {moved:.1e}"})
        first = _generate_difference(model, ids, pad, scale)
        if first is not None:
            worst = max(worst, first)
            if first > floor:
                bad.append({"row": 0, "note": f"first scores of generate, padded left: {first:.1e}"})
    if bad:
        return failed(f"logits of real tokens move by {worst:.1e} of their deviation", f"{floor:.0e}", bad)
    return passed(f"logits of real tokens move by {worst:.1e} of their deviation", f"{floor:.0e}")


def _generate_difference(model: Any, ids: Tensor, pad: Tensor, scale: Tensor) -> float | None:
    """First scores of a left-padded prompt against those of the prompt alone; None where there is no `generate`."""
    if recurrent(model) or not hasattr(model, "generate"):
        return None
    scores = []
    for padding in (pad[:, :0], pad):
        prompt = torch.cat([padding, ids], 1)
        mask = torch.ones_like(prompt)
        mask[:, : padding.shape[1]] = 0
        try:
            out = model.generate(
                input_ids=prompt, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=1,
                output_logits=True, return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
        except Exception:  # a model that cannot generate has no batched prompts to spoil
            return None
        scores.append(out.logits[0])
    return difference(scores[0], scores[1], scale)


@check("forward-not-repeatable", family="model", tier=2, catalogue="K20")
def forward_not_repeatable(subject: Subject) -> Outcome:
    """The same input gives other logits, in evaluation mode.

    Symptom: evaluation jitters, preference log-probabilities differ between two passes, a reloaded model looks broken.
    Example: functional dropout without `training=self.training`; noise that is left on.
    Detected: the same rows twice in evaluation mode.
    Tolerance: none on a CPU, 1e-6 of the logits' deviation elsewhere.
    Spares: training mode.
    Fix: pass `training=self.training` to every functional dropout, and switch noise off in eval().
    Sources: trl#744, #2042, examples of E4.
    """
    with probed(subject) as (model, ids):
        a, b = logits_of(model, ids), logits_of(model, ids)
        scale = need_alive(a)
        moved, limit = difference(a, b, scale), 0.0 if ids.device.type == "cpu" else 1e-6
    if moved > limit:
        row, position = divmod(int((a - b).abs().amax(-1).argmax()), ids.shape[1])
        evidence = [{"row": row, "position": position, "note": "two passes of the same rows"}]
        return failed(f"logits move by {moved:.1e} of their deviation", f"{limit:g}", evidence)
    return passed(f"logits move by {moved:g} of their deviation", f"{limit:g}")


@check("batch-changes-logits", family="model", tier=2, catalogue="K20")
def batch_changes_logits(subject: Subject) -> Outcome:
    """A row's logits depend on the other rows of its batch.

    Symptom: evaluation depends on the batch size, a sample changes with what it is batched with.
    Example: statistics over the batch (BatchNorm, centring), a reshape that mixes rows, expert capacity.
    Detected: other rows are replaced, and the rows are permuted; the logits of a row must not move.
    Tolerance: 1e-4 of the logits' deviation, or 30 times the rounding between a row alone and in a batch.
    Spares: mixture-of-experts models in which a near-tie of the router flips by rounding (the row is then judged by
        the median of its positions).
    Fix: compute every statistic along the last dimension only; look at `view` and `transpose` of the batch dimension.
    Sources: transformers#39241, mlx-lm#1855.
    """
    with probed(subject, rows=4) as (model, ids):
        floor = max(EQUAL, 30 * noise(model, ids))
        a = logits_of(model, ids)
        scale = need_alive(a)
        others = torch.cat([ids[:1], draw_ids(model, 3, ids.shape[1], seed=9)])
        b, c = logits_of(model, others)[:1], logits_of(model, ids.flip(0)).flip(0)
        gaps = {"other rows replaced": (a[:1] - b).abs().amax(-1), "rows permuted": (a - c).abs().amax(-1)}
        shares = {name: float(gap.median() / scale) for name, gap in gaps.items()}
    name, moved = max(shares.items(), key=lambda item: item[1])
    if not moved <= floor:
        row, position = divmod(int(gaps[name].argmax()), ids.shape[1])
        evidence = [{"row": row, "position": position, "note": name}]
        return failed(f"logits of a row move by {moved:.1e} of their deviation: {name}", f"{floor:.0e}", evidence)
    return passed(f"logits of a row move by {moved:.1e} of their deviation", f"{floor:.0e}")


@check("pads-inferred-from-ids", family="model", tier=2, catalogue="K20")
def pads_inferred_from_ids(subject: Subject) -> Outcome:
    """Real tokens are taken for padding because of their id.

    Symptom: every EOS inside a conversation is invisible to the model when pad and EOS are one token.
    Example: `attention_mask = input_ids != pad_token_id` inside the forward.
    Detected: rows that contain the pad and EOS ids, with no mask and with a mask of ones: the same logits.
    Tolerance: 1e-4 of the logits' deviation, or 30 times the rounding between a row alone and in a batch.
    Spares: `generate`, which may guess a mask and says so.
    Fix: take padding from attention_mask alone.
    Sources: onnxruntime-genai#1694, trl#6357.
    """
    with probed(subject) as (model, ids):
        if not accepts(model, "attention_mask"):
            raise NotApplicable("the forward takes no attention_mask")
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        found = [getattr(config, key, None) for key in ("pad_token_id", "eos_token_id", "bos_token_id")]
        special = [t for value in found for t in (value if isinstance(value, list) else [value])]
        special = [t for t in special if isinstance(t, int) and 0 <= t < model.get_input_embeddings().num_embeddings]
        if not special:
            raise NotApplicable("the config names no pad, EOS or BOS id")
        floor = max(EQUAL, 30 * noise(model, ids))
        for k, token in enumerate(special):
            ids[:, 3 + 2 * k] = token
        a, b = logits_of(model, ids), logits_of(model, ids, torch.ones_like(ids))
        moved = difference(a, b, need_alive(a))
    if moved > floor:
        position = int((a - b).abs().amax((0, 2)).argmax())
        evidence = [{"row": 0, "position": position, "ids": special, "note": "no mask against a mask of ones"}]
        return failed(f"logits move by {moved:.1e} of their deviation", f"{floor:.0e}", evidence)
    return passed(f"no mask and a mask of ones differ by {moved:.1e} of the deviation", f"{floor:.0e}")


@check("packed-documents-leak", family="model", tier=2, catalogue="K21")
def packed_documents_leak(subject: Subject) -> Outcome:
    """Documents that share a packed row see each other.

    Symptom: answers are conditioned on an unrelated earlier sample; packing trains a worse model than padding.
    Example: packed ids with sdpa and no position_ids; a mask of ones that switches packing detection off.
    Detected: two documents in one row, position_ids starting again, no attention_mask, no cache: the logits of the
        second must be those that it gets alone, and must not move when the first one changes.
    Tolerance: 1e-5 of the logits' deviation for the leak (same shapes), 1e-4 for equality with the document alone.
    Spares: training that asks for no isolation (contiguous GPT-style rows), and models that take no position_ids:
        there this does not apply unless packing is on.
    Fix: pass position_ids that restart and no attention_mask, or use an attention that takes cu_seqlens; else turn
        packing off for this model.
    Sources: axolotl#3796, functionary#132, ms-swift#4736, trl#3526.
    """
    is_packing = bool(subject.settings.get("packing") or subject.settings.get("padding_free"))
    is_packing &= subject.settings.get("document_isolation", True) is not False
    is_packing &= subject.settings.get("packing_strategy") not in ("contiguous", "wrapped")
    with probed(subject) as (model, ids):
        if not accepts(model, "position_ids") or recurrent(model):
            if is_packing:
                return failed(
                    "packing is on, and the forward takes no position_ids: documents cannot be kept apart",
                    "", [{"note": f"{type(model).__name__}.forward"}], "turn packing off for this model",
                )  # fmt: skip
            raise NotApplicable("the model does not tell packed documents by position_ids, and packing is not on")
        half = ids.shape[1] // 2
        position_ids = torch.arange(ids.shape[1], device=ids.device)
        position_ids[half:] -= half
        position_ids = position_ids.expand_as(ids)
        other = ids.clone()
        other[:, :half] = (ids[:, :half] + 1) % int(ids.max() + 1)
        worst, apart, bad = 0.0, 0.0, []
        for backend in backends(model):
            with backend:
                packed = logits_of(model, ids, position_ids=position_ids)
                moved_by = logits_of(model, other, position_ids=position_ids)
                alone = logits_of(model, ids[:, half:])
            scale = need_alive(packed)
            if difference(packed[:, :half], moved_by[:, :half], scale) <= 1e-4:
                raise NotRun("changing a document does not move its own logits: no positive control")
            leak = difference(packed[:, half:], moved_by[:, half:], scale)
            gap = difference(packed[:, half:], alone, scale)
            worst, apart = max(worst, leak), max(apart, gap)
            if leak > CAUSAL:
                gaps = (packed - moved_by)[:, half:].abs().amax((0, 2))
                position = half + int((gaps > CAUSAL * scale).nonzero()[0])
                note = (
                    f"{backend.name}: logits at position {position} move by {leak:.1e} when the document before changes"
                )
                bad.append({"row": 0, "position": position, "note": note})
            elif gap > max(EQUAL, 30 * noise(model, ids)):
                bad.append({"row": 0, "position": half, "note": f"{backend.name}: differs from alone by {gap:.1e}"})
        if bad and not is_packing and not isolates_by_position(model):
            raise NotApplicable("this architecture ignores restarting position_ids, and packing is not on")
    text = f"the document before moves logits by {worst:.1e}, packed against alone {apart:.1e} of their deviation"
    if bad:
        return failed(text, f"{CAUSAL:.0e}, {EQUAL:.0e}", bad)
    return passed(text, f"{CAUSAL:.0e}, {EQUAL:.0e}")


@check("cache-differs", family="model", tier=2, catalogue="K22")
def cache_differs(subject: Subject) -> Outcome:
    """Generating with the cache is not what the model computes without it.

    Symptom: evaluation losses are fine and generated text is not.
    Example: positions that start at 0 again with every cached step; a cache slot that is overwritten too early.
    Detected: a row in one pass against the same row token by token and in chunks of 1, 3 and the rest, past the
        sliding window; then greedy `generate` with and without cache.
    Tolerance: 1e-4 of the logits' deviation, or 30 times the rounding between a row alone and in a batch; the median
        over positions where a mixture of experts flips by rounding.
    Spares: models that return no cache. RoPE scaling that switches with the length sees one length only.
    Fix: positions and the mask must start where the cache ends; look at `cache_position`, `get_seq_length`, the window.
    Sources: torchtune#959, transformers#48748, mlx-examples#977.
    """
    with probed(subject, rows=2) as (model, ids):
        if not accepts(model, "past_key_values") and not accepts(model, "cache_params"):
            raise NotApplicable("the forward takes no cache")
        floor = max(EQUAL, 30 * noise(model, ids))
        whole = logits_of(model, ids)
        scale = need_alive(whole)
        results: dict[str, Tensor] = {}
        if accepts(model, "past_key_values") and not recurrent(model):
            for name, chunks in (("token by token", [1] * ids.shape[1]), ("chunks", [1, 3, 0])):
                results[name] = _cached(model, ids, chunks)
        results = {name: logits for name, logits in results.items() if logits is not None}
        gaps = {name: (whole - logits).abs().amax(-1) for name, logits in results.items()}
        shares = {name: float(_robust(gap, model) / scale) for name, gap in gaps.items()}
        stepped = _greedy(model, ids[:, : ids.shape[1] - 6], floor * scale)
    bad = [
        {"row": 0, "position": int((gaps[name] > floor * scale).any(0).nonzero()[0]), "note": f"{name}: {share:.1e}"}
        for name, share in shares.items()
        if not share <= floor
    ]
    if stepped:
        bad.append({"row": 0, "position": stepped[0], "note": f"greedy generate: {stepped[1]}"})
    if not shares and stepped is None:
        raise NotRun("the model returned no cache, and generate does not run")
    worst = max(shares.values(), default=0.0)
    if bad:
        return failed(f"cached logits move by {worst:.1e} of their deviation", f"{floor:.0e}", bad)
    return passed(f"cached logits move by {worst:.1e} of their deviation, generate agrees", f"{floor:.0e}")


def _robust(gap: Tensor, model: Any) -> Tensor:
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return gap.median() if any(getattr(config, name, None) for name in names) else gap.max()


def _cached(model: Any, ids: Tensor, chunks: list[int]) -> Tensor | None:
    """Logits of the row, fed in chunks with the cache; 0 stands for the rest. None without a cache."""
    cache, parts, at = None, [], 0
    for size in chunks:
        size = size or ids.shape[1] - at
        arguments: dict[str, Any] = {"input_ids": ids[:, at : at + size], "use_cache": True, "past_key_values": cache}
        if accepts(model, "attention_mask"):
            arguments["attention_mask"] = torch.ones_like(ids[:, : at + size])
        out = model(**arguments)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            return None
        parts.append(out.logits)
        at += size
    return torch.cat(parts, 1)


def _greedy(model: Any, prompt: Tensor, slack: Tensor) -> tuple | None:
    """(position, what differs) of greedy generation with the cache, () where it agrees, None where it does not run.

    Every generated token must be the argmax of a plain forward over what stands before it, near-ties spared.
    """
    if not hasattr(model, "generate"):
        return None
    try:
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, num_beams=1, use_cache=True, pad_token_id=0,
        )  # fmt: skip
    except Exception:
        return None
    logits = logits_of(model, out)[:, prompt.shape[1] - 1 : -1]
    eos = model.generation_config.eos_token_id if getattr(model, "generation_config", None) else None
    if eos is not None:  # min_new_tokens keeps EOS from being chosen
        logits[..., eos] = -torch.inf
    new = out[:, prompt.shape[1] :]
    chosen = logits.gather(-1, new[..., None])[..., 0]
    short = logits.max(-1).values - chosen
    wrong = (short > 10 * slack).any(0).nonzero()
    if len(wrong):
        step = int(wrong[0])
        return prompt.shape[1] + step, f"new token {step + 1} is not the likeliest one of a pass without cache"
    return ()


@check("backend-changes-logits", family="model", tier=2, catalogue="K19")
def backend_changes_logits(subject: Subject) -> Outcome:
    """Attention backends disagree: one of them drops the window, the soft-cap, the sinks or the scale.

    Symptom: the loss jumps when a faster attention is switched on; a model trained under one backend is served by
        another and answers worse.
    Example: a sliding window that only eager applies; a soft-cap that sdpa ignores.
    Detected: eager against sdpa on rows longer than the window, in evaluation and in training mode, with query and
        key weights drawn large enough for a soft-cap to bite.
    Tolerance: 1e-4 of the logits' deviation, or 30 times the rounding between a row alone and in a batch.
    Spares: models that have one backend only.
    Fix: pass the window, soft-cap and scale to every attention function.
    Sources: transformers#32309, LlamaFactory#7387, unsloth#8253, transformers#39408.
    """
    with probed(subject) as (model, ids):
        found = backends(model)
        if len(found) < 2:
            raise NotApplicable("the model has one attention backend")
        floor = max(EQUAL, 30 * noise(model, ids))
        results = {}
        for training in (False, True):
            model.train(training)
            for backend in found:
                with backend:
                    results[f"{backend.name}, {'training' if training else 'evaluation'}"] = logits_of(model, ids)
        model.eval()
        first, *others = results.items()
        scale = need_alive(first[1])
        shares = {name: difference(first[1], logits, scale) for name, logits in others}
        name, moved = max(shares.items(), key=lambda item: item[1])
    if moved > floor:
        position = int((first[1] - results[name]).abs().amax((0, 2)).argmax())
        evidence = [{"row": 0, "position": position, "note": f"{name} against {first[0]}"}]
        return failed(f"{name} and {first[0]} differ by {moved:.1e} of the deviation", f"{floor:.0e}", evidence)
    return passed(f"{len(results)} ways differ by {moved:.1e} of the deviation", f"{floor:.0e}")


@check("window-not-applied", family="model", tier=2, catalogue="K19")
def window_not_applied(subject: Subject) -> Outcome:
    """The sliding window of the config is not what the attention does.

    Symptom: memory grows with the context although a window is set; long texts score worse than at release.
    Example: `sliding_window` that no backend is given; a window that is one token too wide in a branch.
    Detected: the token that lies just outside the window of every local layer is changed: the logits of a later
        position move only as far as the stacked windows reach. Only where all layers are local.
    Tolerance: 1e-5 of the logits' deviation (same shapes).
    Spares: global layers, attention sinks, windows counted with or without the token itself (one token of slack per
        layer).
    Fix: build the mask with `create_sliding_window_causal_mask`, and hand the window to the attention function.
    Sources: unsloth#8253, transformers#39408, #32522.
    """
    with probed(subject) as (model, ids):
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if not isinstance(window, int) or window <= 0 or getattr(config, "use_sliding_window", True) is False:
            raise NotApplicable("the config sets no sliding window")
        if kinds is not None and set(kinds) != {"sliding_attention"}:
            raise NotApplicable("not all layers are local")
        layers = int(config.num_hidden_layers)
        reach = layers * window + layers  # a token of slack per layer
        length = reach + 6
        if length > 4096:
            raise NotRun(f"a row of {length} tokens would be needed")
        ids = draw_ids(model, 1, length)
        other = ids.clone()
        other[:, 0] = (ids[:, 0] + 1) % int(ids.max() + 1)
        a, b = logits_of(model, ids), logits_of(model, other)
        scale = need_alive(a)
        gap = (a - b).abs().amax((0, 2)) / scale
    if gap[0] <= 1e-4:
        raise NotRun("changing a token does not move its own logits: no positive control")
    beyond = gap[reach:]
    if beyond.max() > CAUSAL:
        position = reach + int(beyond.argmax())
        note = f"token 0 moves logits at position {position}; {layers} windows of {window} end before"
        return failed(
            f"{float(beyond.max()):.1e} of the deviation", f"{CAUSAL:.0e}", [{"position": position, "note": note}]
        )
    return passed(f"nothing is seen beyond {layers} windows of {window}", f"{CAUSAL:.0e}")
