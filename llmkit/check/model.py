"""How a model behaves: causality, padding, batches. Redrawn weights, float32, tiny rows.

Owns the tier-2 checks of one forward pass. Caches, backends and windows are in `attention.py`, packed rows in
`packing.py`: of this family as well. Leaves out the loss (`loss.py`) and saved files (`saving.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import attention, packing  # noqa: F401  whose checks are of this family
from .forward import (
    Pass,
    Run,
    accepts,
    backends,
    bare,
    branches,
    draw_ids,
    filler,
    gathered,
    logits_of,
    longest_row,
    num_ids,
    others,
    padded,
    positions_of,
    recurrent,
    special_ids,
)
from .measure import CAUSAL, EQUAL, LEAST, difference, floor, need_alive, noise, on_each, probed, share, typical
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject

ALIGNED = 128  # tokens of padding that architectures which pool blocks of a row do not see
FAR = 160  # tokens of the one long row


@check("future-leak", family="model", tier=2, catalogue="K19")
def future_leak(subject: Subject) -> Outcome:
    """A token sees tokens that come after it.

    Symptom: training loss falls far below what held-out text allows, and generation is garbage: the model copies its
        targets from the future.
    Example: attention with `is_causal=False`, or a mask that one branch (sdpa without padding) forgets.
    Detected: tokens from a position on are changed; logits before it must not move. Every branch is tried: each
        attention backend, no mask, all ones, padding right and left, evaluation and training mode, with labels, with
        checkpointing, with a cache, one row alone, a long row, rows beyond the window.
    Tolerance: 1e-5 of the logits' deviation: both runs have the same shapes, so that only the mask matters; more where
        the same input does not repeat, or where rounding does more.
    Spares: models whose loss is not next-token prediction (encoders, diffusion). Rows have one length, so that RoPE
        scaling that depends on the length sees the same.
    Fix: look for the mask of the branch that is named; in transformers models `is_causal` and `create_causal_mask`.
    Sources: transformers#48748, keras#23038, LLMs-from-scratch#1062, torchtune#959.
    """
    bad, moves = [], []
    for leaks in on_each(subject, _leaks):
        bad += [(moved, evidence) for moved, limit, evidence in leaks if not moved <= limit]
        moves += [(moved, name["note"].split(":")[0]) for moved, _, name in leaks]
    worst, where = max(moves)
    text = f"earlier logits move by {worst:.1e} of their deviation"
    if bad:
        evidence = [item for _, item in sorted(bad, key=lambda pair: -pair[0])]
        names = "; ".join(item["note"].split(":")[0] for item in evidence)
        evidence = [*evidence[:5], {"note": f"all that leak: {names}"}]
        return failed(f"{text} ({where}); {len(bad)} of {len(moves)} branches leak", f"{CAUSAL:.0e}", evidence)
    return passed(f"{text}, {len(moves)} branches", f"{CAUSAL:.0e}")


def _leaks(model: Any, ids: Tensor) -> list[tuple[float, float, dict[str, Any]]]:
    """(what earlier logits move by, limit, where) of every branch."""
    found, limit = [], max(CAUSAL, 10 * noise(model, ids))
    for name, run in branches(model, ids):
        try:
            found.append(_leak(name, run, ids, limit))
        except Exception:
            if " with " not in name:  # with a cache, labels or checkpointing: not every model can
                raise
    far = draw_ids(model, 1, min(FAR, longest_row(model) - 8))
    if far.shape[1] > ids.shape[1]:
        found.append(_leak("a long row, no mask, evaluation", next(branches(model, far))[1], far, limit))
    return found


def _leak(name: str, run: Run, ids: Tensor, limit: float) -> tuple[float, float, dict[str, Any]]:
    size = ids.shape[1]
    cuts = [(size // 2, size - 1, min(3, size - 1))[row % 3] for row in range(len(ids))]
    is_later = torch.arange(size, device=ids.device) >= torch.tensor(cuts, device=ids.device)[:, None]
    changed = torch.where(is_later, others(ids), ids)
    before, after = run(ids), run(changed)
    scale = need_alive(before.logits)
    later = is_later & before.is_real
    if difference(before.logits[later], after.logits[later], scale) <= LEAST:
        raise NotRun(f"{name}: changing tokens moves no logits at all: no positive control")
    gap = _gap(before, after, ~is_later)
    moved = difference(gap, torch.zeros_like(gap), scale)
    if moved > limit:  # or does the same input move as well?
        limit = max(limit, 100 * difference(before.logits, run(ids).logits, scale))
    row, position = divmod(int(gap.nan_to_num(torch.inf).argmax()), size)
    note = f"{name}: logits at position {position} move by {moved:.1e} when tokens from {cuts[row]} on change"
    return moved, limit, {"row": row, "position": position, "note": note}


def _gap(before: Pass, after: Pass, where: Tensor) -> Tensor:
    """(B, T) largest difference over the vocabulary, 0 where it is not asked for."""
    return (before.logits - after.logits).abs().amax(-1).masked_fill(~(where & before.is_real), 0)


@check("padding-changes-logits", family="model", tier=2, catalogue="K20")
def padding_changes_logits(subject: Subject) -> Outcome:
    """Padding changes what the model says about real tokens.

    Symptom: batched generation is worse than one prompt at a time; the shorter a prompt, the worse.
    Example: position_ids counted from the left edge, padding included; a mask that is not added to the scores.
    Detected: rows alone against the same rows in a batch padded right and left, with attention_mask, and position_ids
        made from the mask as `generate` makes them; then the first scores of `generate` itself.
    Tolerance: 1e-4 of the logits' deviation, or 10 times what rounding does to this model; the median over positions
        for a mixture of experts.
    Spares: recurrent models (Mamba, RWKV, RG-LRU) are not asked for left padding; architectures that pool blocks of a
        row are padded by whole blocks; a forward without attention_mask is not asked at all; one without position_ids
        only by `generate`.
    Fix: derive positions from the mask (`attention_mask.cumsum(-1) - 1`) and mask padding in every backend.
    Sources: transformers#18388, #18478, nnsight#673, unsloth#3699.
    """
    with probed(subject) as (model, ids):
        if not accepts(model, "attention_mask"):
            raise NotApplicable("the forward takes no attention_mask")
        limit = floor(model, ids)
        alone = torch.cat([logits_of(model, ids[row : row + 1]) for row in range(len(ids))])
        scale = need_alive(alone)
        found: list[tuple[float, dict[str, Any]]] = []
        sides = ["right"] + ["left"] * (not recurrent(model) and accepts(model, "position_ids"))
        for side in sides:
            for backend in backends(model):
                with backend:
                    moved, row, position = _moved_by_padding(model, ids, alone, scale, side)
                note = f"padded {side}, {backend.name}: logits move by {moved:.1e}"
                found.append((moved, {"row": row, "position": position, "note": note}))
        moved = _moved_in_generate(model, ids[:2], scale, limit)  # type: ignore[assignment]
        has_positions = accepts(model, "position_ids")
        if moved is not None:
            found.append((moved, {"row": 0, "note": f"scores of generate, padded left: they move by {moved:.1e}"}))
    worst = max(moved for moved, _ in found)
    bad = [evidence for moved, evidence in sorted(found, key=lambda pair: -pair[0]) if not moved <= limit]
    text = f"logits of real tokens move by {worst:.1e} of their deviation"
    if bad and all("generate" in item["note"] for item in bad) and not has_positions and _is_stock(subject):
        return warned(
            f"{text}: this architecture cannot be padded left", f"{limit:.0e}", bad, "generate one row a time"
        )
    return failed(text, f"{limit:.0e}", bad[:6]) if bad else passed(text, f"{limit:.0e}")


def _is_stock(subject: Subject) -> bool:
    kind = type(bare(subject.model)) if subject.model is not None else None
    return kind is None or kind.__module__.startswith("transformers.models.")


def _moved_by_padding(
    model: Any, ids: Tensor, alone: Tensor, scale: Tensor, side: str
) -> tuple[float, int | None, int | None]:
    """(share, row, position) of the largest difference; the least over padding by a few tokens and by whole blocks."""
    rows, mask, is_real = padded(ids, f"padded {side}", filler(model, ids))
    best: tuple[float, int | None, int | None] = (float("inf"), None, None)
    for extra in (0, ALIGNED):
        if extra and (rows.shape[1] + extra > longest_row(model) or best[0] <= EQUAL):
            break
        blank = torch.full((len(ids), extra), filler(model, ids), device=ids.device)
        whole = ids if extra else rows  # rows of one length, all of them behind so many pads
        part = torch.cat([blank, whole] if side == "left" else [whole, blank], 1)
        ones = torch.ones_like(ids) if extra else mask
        part_mask = torch.cat([0 * blank, ones] if side == "left" else [ones, 0 * blank], 1)
        out = logits_of(model, part, part_mask, positions_of(model, part_mask) if side == "left" else None)
        here = torch.ones_like(is_real) if extra else is_real
        gap = (alone - gathered(out, part_mask)[:, : ids.shape[1]]).abs().amax(-1).masked_fill(~here, 0)
        moved = float(typical(gap[here], model) / scale)
        if not moved >= best[0]:
            row, position = divmod(int(gap.argmax()), ids.shape[1])
            best = (moved if moved == moved else float("inf"), row, position)
    return best


def _moved_in_generate(model: Any, ids: Tensor, scale: Tensor, limit: float) -> float | None:
    """By what the scores of two new tokens move in a batch padded left; None where `generate` does not run."""
    if recurrent(model) or not hasattr(model, "generate"):
        return None
    best = None
    for width in (5, ALIGNED):
        if best is not None and (best <= limit or ids.shape[1] + width > longest_row(model)):
            break
        blank = torch.full((1, width), filler(model, ids), device=ids.device)
        whole = torch.cat([blank, ids[:1]], 1)
        mask = torch.cat([0 * blank, torch.ones_like(ids[:1])], 1)
        try:
            first, second = (attention.generated(model, *given)[0] for given in ((ids[:1], None), (whole, mask)))
        except Exception:  # a model that cannot generate has no batched prompts to spoil
            return None
        moved = share(first[:, 0], second[:, 0], scale, model)
        if (first[:, 0].argmax(-1) == second[:, 0].argmax(-1)).all():  # the same first token: compare the next as well
            moved = max(moved, share(first[:, 1], second[:, 1], scale, model))
        best = moved if best is None else min(best, moved)
    return best


@check("forward-not-repeatable", family="model", tier=2, catalogue="K20")
def forward_not_repeatable(subject: Subject) -> Outcome:
    """The same input gives other logits, in evaluation mode.

    Symptom: evaluation jitters, preference log-probabilities differ between two passes, a reloaded model looks broken.
    Example: functional dropout without `training=self.training`; noise that is left on.
    Detected: the same rows twice in evaluation mode, with the dropout rates that the model has.
    Tolerance: none on a CPU, 1e-6 of the logits' deviation elsewhere.
    Spares: training mode.
    Fix: pass `training=self.training` to every functional dropout, and switch noise off in eval().
    Sources: trl#744, #2042, examples of E4.
    """
    subject.need("model")
    with subject.small_model() as model, torch.no_grad():
        ids, worst, bad = draw_ids(model, 3, 24 if longest_row(model) > 32 else 8), 0.0, []
        limit = 0.0 if ids.device.type == "cpu" else 1e-6
        for backend in backends(model):
            with backend:
                a, b = logits_of(model, ids), logits_of(model, ids)
            moved = difference(a, b, need_alive(a))
            worst = max(worst, moved)
            if moved > limit:
                row, position = divmod(int((a - b).abs().amax(-1).argmax()), ids.shape[1])
                bad.append({"row": row, "position": position, "note": f"{backend.name}: two passes of the same rows"})
    text = f"logits move by {worst:g} of their deviation"
    return failed(text, f"{limit:g}", bad) if bad else passed(text, f"{limit:g}")


@check("batch-changes-logits", family="model", tier=2, catalogue="K20")
def batch_changes_logits(subject: Subject) -> Outcome:
    """A row's logits depend on the other rows of its batch.

    Symptom: evaluation depends on the batch size, a sample changes with what it is batched with.
    Example: statistics over the batch (BatchNorm, centring), a reshape that mixes rows, expert capacity.
    Detected: other rows are replaced, the rows are permuted, and a row is run alone; its logits must not move. In
        training mode as well, dropout off.
    Tolerance: 1e-4 of the logits' deviation, or 10 times what rounding does to this model; the median over positions
        for a mixture of experts, where a near-tie of the router may flip.
    Spares: training modes that do not repeat (a router that samples).
    Fix: compute every statistic along the last dimension only; look at `view` and `transpose` of the batch dimension.
    Sources: transformers#39241, mlx-lm#1855.
    """
    with probed(subject, rows=4) as (model, ids):
        limit = floor(model, ids)
        found: dict[Any, Any] = {}
        for mode in ("evaluation", "training"):
            model.train(mode == "training")
            a = logits_of(model, ids)
            scale = need_alive(a)
            if mode == "training" and difference(a, logits_of(model, ids), scale) > 0:
                continue
            replaced = torch.cat([ids[:1], draw_ids(model, 3, ids.shape[1], seed=9)])
            gaps = {
                "other rows replaced": a[:1] - logits_of(model, replaced)[:1],
                "rows permuted": a - logits_of(model, ids.flip(0)).flip(0),
                "a row alone": a[:1] - logits_of(model, ids[:1]),
            }
            found |= {f"{name}, {mode}": gap.abs().amax(-1) / scale for name, gap in gaps.items()}
        model.eval()
        shares = {name: float(typical(gap, model)) for name, gap in found.items()}
    bad = [(name, moved) for name, moved in shares.items() if not moved <= limit]
    text = f"logits of a row move by {max(shares.values()):.1e} of their deviation"
    if bad:
        places = [divmod(int(found[name].argmax()), ids.shape[1]) for name, _ in bad]
        evidence = [
            {"row": row, "position": position, "note": f"{name}: {moved:.1e}"}
            for (name, moved), (row, position) in zip(bad, places, strict=True)
        ]
        return failed(text, f"{limit:.0e}", evidence)
    return passed(text, f"{limit:.0e}")


@check("pads-inferred-from-ids", family="model", tier=2, catalogue="K20")
def pads_inferred_from_ids(subject: Subject) -> Outcome:
    """Real tokens are taken for padding because of their id.

    Symptom: every EOS inside a conversation is invisible to the model when pad and EOS are one token.
    Example: `attention_mask = input_ids != pad_token_id` inside the forward.
    Detected: rows that contain the pad, EOS and BOS ids, against rows that hold an ordinary id in their place whose
        embedding is made the same: with no mask and with a mask of ones, the same logits. And no mask against ones.
    Tolerance: 1e-4 of the logits' deviation, or 10 times what rounding does to this model.
    Spares: `generate`, which may guess a mask and says so; models to which the id of an ordinary token matters beyond
        its embedding (hashed n-grams).
    Fix: take padding from attention_mask alone.
    Sources: onnxruntime-genai#1694, trl#6357.
    """
    with probed(subject) as (model, ids):
        special = special_ids(model)
        if not special:
            raise NotApplicable("the config names no pad, EOS or BOS id")
        limit = floor(model, ids)
        masks = {"no mask": None} | (
            {"a mask of ones": torch.ones_like(ids)} if accepts(model, "attention_mask") else {}
        )
        found: list[tuple[float, str]] = []
        table, is_renamed = _embedding(model), False
        for token in special:
            rows = ids.clone()
            rows[:, 3], rows[:, 6] = token, token
            results = {name: logits_of(model, rows, mask) for name, mask in masks.items()}
            scale = need_alive(results["no mask"])
            for name, logits in results.items():
                moved = share(results["no mask"], logits, scale, model)
                found.append((moved, f"id {token}: no mask against {name}"))
                stand_in = next((t for t in range(num_ids(model)) if t not in special and not (rows == t).any()), None)
                if table is None or stand_in is None:
                    continue
                control, moved = (
                    _moved_by_name(model, table, rows, t, stand_in, masks[name], logits, scale)
                    for t in (int(rows[0, 4]), token)
                )
                is_renamed |= control <= limit
                if control <= limit:
                    found.append((moved, f"id {token} against another id of the same embedding, {name}"))
    if not is_renamed and len(masks) == 1:
        raise NotRun("no id could be given another's embedding, and the forward takes no mask")
    moved, note = max(found)
    text = f"logits move by {moved:.1e} of their deviation"
    if not moved <= limit:
        return failed(text, f"{limit:.0e}", [{"row": 0, "position": 3, "ids": special, "note": note}])
    return passed(f"{text} whatever the ids of pad, EOS and BOS", f"{limit:.0e}")


def _embedding(model: Any) -> nn.Parameter | None:
    try:
        return model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None


def _moved_by_name(
    model: Any, table: nn.Parameter, rows: Tensor, token: int, other: int, mask: Tensor | None, logits: Tensor,
    scale: Tensor,
) -> float:  # fmt: skip
    """What logits move by when `other`, given the embedding of `token` meanwhile, takes its place in the rows.

    Its own logit is left out: heads may be tied.
    """
    held = table.data
    try:
        table.data = held.clone()
        table.data[other] = held[token]
        moved = logits_of(model, torch.where(rows == token, other, rows), mask)
    finally:
        table.data = held
    keep = torch.arange(logits.shape[-1], device=logits.device) != other
    return share(logits[..., keep], moved[..., keep], scale, model)
