"""Packed rows: documents that must not see each other, and whose positions begin again.

Owns checks of family `model`. Where a trainer packs, its own batches and loss are looked at; else the forward pass.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .forward import accepts, backends, bare, isolates_by_position, logits_of, others, recurrent, text_config
from .measure import CAUSAL, EQUAL, LEAST, difference, floor, need_alive, probed, share
from .runner import Outcome, check, failed, passed
from .subject import NotApplicable, NotRun, Subject, without_dropout

TOKENS = 2048  # of a batch that is looked at


def wants_isolation(settings: dict[str, Any]) -> bool:
    """Packing is on, and documents are not joined on purpose."""
    if settings.get("document_isolation") is False or settings.get("packing_strategy") in ("contiguous", "wrapped"):
        return False
    return bool(settings.get("packing") or settings.get("padding_free"))


@check("packed-documents-leak", family="model", tier=2, catalogue="K21")
def packed_documents_leak(subject: Subject) -> Outcome:
    """Documents that share a packed row see each other.

    Symptom: answers are conditioned on an unrelated earlier sample; packing trains a worse model than padding.
    Example: packed ids with sdpa and no position_ids; a mask of ones that switches packing detection off.
    Detected: where a trainer packs, its own batch through its own loss: a loss on the second document alone gives the
        embedded tokens of the first one a gradient. Else two documents in one row, position_ids starting again, no
        attention_mask, no cache: the logits of the second must not move when the first one changes.
    Tolerance: 1e-5 of the logits' deviation (same shapes), or of the second document's gradient.
    Spares: training that asks for no isolation (contiguous GPT-style rows), and architectures that do not keep
        documents apart by position_ids: there this does not apply unless packing is on.
    Fix: pass position_ids that restart and no attention_mask, or use an attention that takes cu_seqlens; else turn
        packing off for this model.
    Sources: axolotl#3796, functionary#132, ms-swift#4736, trl#3526.
    """
    is_packing = wants_isolation(subject.settings)
    if is_packing and subject.training is not None:
        return _leak_in_training(subject)
    with probed(subject) as (model, ids):
        if not accepts(model, "position_ids"):
            if is_packing:
                return failed(
                    "packing is on, and the forward takes no position_ids: documents cannot be kept apart",
                    "", [{"note": f"{type(bare(model)).__name__}.forward"}], "turn packing off for this model",
                )  # fmt: skip
            raise NotApplicable("the forward takes no position_ids, and packing is not on")
        if not is_packing and (recurrent(model) or not isolates_by_position(model)):
            raise NotApplicable("this architecture does not tell documents by position_ids, and packing is not on")
        worst, bad = 0.0, []
        for backend in backends(model):
            with backend:
                leak, _, row, position = _packed(model, ids)
            worst = max(worst, leak)
            if not leak <= CAUSAL:
                note = f"{backend.name}: logits move by {leak:.1e} when the document before changes"
                bad.append({"row": row, "position": position, "note": note})
    text = f"the document before moves logits by {worst:.1e} of their deviation"
    return failed(text, f"{CAUSAL:.0e}", bad) if bad else passed(text, f"{CAUSAL:.0e}")


def _packed(model: Any, ids: Tensor) -> tuple[float, float, int, int]:
    """(leak into the second document, its distance from alone, row and position of the leak); splits differ by row."""
    size = ids.shape[1]
    starts = [(size // 2, size // 3, size - 4)[row % 3] for row in range(len(ids))]
    start = torch.tensor(starts, device=ids.device)[:, None]
    at = torch.arange(size, device=ids.device).expand_as(ids)
    positions = torch.where(at < start, at, at - start)
    is_first = at < start
    packed = logits_of(model, ids, position_ids=positions)
    moved = logits_of(model, torch.where(is_first, others(ids), ids), position_ids=positions)
    scale = need_alive(packed)
    if difference(packed[is_first], moved[is_first], scale) <= LEAST:
        raise NotRun("changing a document does not move its own logits: no positive control")
    gap = (packed - moved).abs().amax(-1).masked_fill(is_first, 0) / scale
    row, position = divmod(int((gap > CAUSAL).flatten().int().argmax()), size)
    apart = [share(packed[k, s:], logits_of(model, ids[k : k + 1, s:])[0], scale, model) for k, s in enumerate(starts)]
    return float(gap.max()), max(apart), row, position


@check("packed-positions-not-reset", family="model", tier=2, catalogue="K21")
def packed_positions_not_reset(subject: Subject) -> Outcome:
    """Documents in a packed row are kept apart, and their positions are not those that they have alone.

    Symptom: with learned positions every document but the first is trained at positions where it will never be used.
    Example: positions that run on over the whole row; a forward that masks by position_ids and embeds `arange`.
    Detected: where a trainer packs, the position_ids of its batch at the beginning of every document, for models whose
        logits change when all positions are shifted. Else two documents in one row with position_ids that start
        again: the second one's logits must be those that it gets alone.
    Tolerance: 1e-4 of the logits' deviation, or 10 times what rounding does to this model.
    Spares: models that see distances only (RoPE, ALiBi), for positions that run on; architectures that do not keep
        documents apart by position_ids.
    Fix: restart position_ids with every document, and take positions from them alone.
    Sources: Fast-LLM#177, huggingface/blog#2307.
    """
    is_packing = wants_isolation(subject.settings)
    if is_packing and subject.training is not None:
        return _positions_in_training(subject)
    with probed(subject) as (model, ids):
        if not accepts(model, "position_ids"):
            raise NotApplicable("the forward takes no position_ids")
        if recurrent(model) or not isolates_by_position(model):
            raise NotApplicable("this architecture does not tell documents by position_ids")
        limit, found = floor(model, ids), []
        for backend in backends(model):
            with backend:
                leak, apart, *_ = _packed(model, ids)
            if leak <= CAUSAL:
                found.append((apart, backend.name))
    if not found:
        raise NotRun("documents see each other: packed-documents-leak says where")
    apart, name = max(found)
    text = f"packed against alone, logits differ by {apart:.1e} of their deviation"
    if not apart <= limit:
        return failed(text, f"{limit:.0e}", [{"row": 0, "note": f"{name}: the second document of a row"}])
    return passed(text, f"{limit:.0e}")


# a trainer's own batches


def _packed_batch(subject: Subject) -> tuple[dict[str, Any], list[tuple[int, int, int]]]:
    """A batch, and (row, start, end) of its documents. Raises NotRun where no row holds two of them."""
    batch = subject.training.batches(1, 2)[0]
    ids = batch["input_ids"]
    if ids.numel() > TOKENS:
        batch = subject.training.batches(1, 1)[0]
        ids = batch["input_ids"]
    documents = _documents(batch, subject)
    if not any(start > 0 for _, start, _ in documents):
        raise NotRun("no row of the first batch holds two documents")
    return batch, documents


def _documents(batch: dict[str, Any], subject: Subject) -> list[tuple[int, int, int]]:
    """By cu_seq_lens, seq_idx, positions that restart, or else the tokens that end one."""
    ids = batch["input_ids"]
    size = ids.shape[1]
    begins = torch.zeros_like(ids).bool()
    begins[:, 0] = True
    lengths, numbers, positions = (batch.get(k) for k in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if isinstance(lengths, Tensor):
        begins.view(-1)[lengths.flatten()[:-1].long()] = True
    elif isinstance(numbers, Tensor) and numbers.shape == ids.shape:
        begins[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    elif isinstance(positions, Tensor) and positions.shape == ids.shape and (positions[:, 1:] == 0).any():
        begins[:, 1:] |= (positions[:, 1:] == 0) & (positions[:, :-1] != 0)
    else:
        tokenizer = subject.tokenizer
        ends = {getattr(tokenizer, "eos_token_id", None), getattr(text_config(subject), "eos_token_id", None)}
        for end in (e for e in ends if isinstance(e, int)):
            begins[:, 1:] |= ids[:, :-1] == end
    found = []
    for row in range(len(ids)):
        starts = [*begins[row].nonzero().flatten().tolist(), size]
        found += [(row, a, b) for a, b in itertools.pairwise(starts)]
    return found


def _leak_in_training(subject: Subject) -> Outcome:
    batch, documents = _packed_batch(subject)
    row, start, end = max((d for d in documents if d[1] > 0), key=lambda d: d[2] - d[1])
    if end - start < 3:
        raise NotRun("the packed documents hold no more than two tokens")
    with subject.small_model(keep_vocabulary=True) as model, without_dropout(model):
        _as_trainer_sets(model, subject.settings)
        with _embedded(model) as seen:
            subject.training.backward(model, [_taught_alone(batch, row, start, end)])
        gradients = [
            hidden.grad for hidden in seen if hidden.grad is not None and hidden.shape[:2] == batch["input_ids"].shape
        ]
    if not gradients:
        raise NotRun("the trainer's loss gave the embedded tokens of its batch no gradient")
    size = gradients[0].abs().amax(-1)[row]  # (T,)
    own = float(size[start:end].max())
    if not own > 0:
        raise NotRun("a loss on one document gives its own tokens no gradient: no positive control")
    leak = float(size[:start].max()) / own
    text = f"a loss on document 2 gives the tokens before it {leak:.1e} of its own gradient"
    if leak > CAUSAL:
        position = int(size[:start].argmax())
        keys = ", ".join(sorted(batch))
        note = f"the document from {start} to {end} sees position {position}; the batch holds {keys}"
        ids = batch["input_ids"][row, max(0, start - 4) : start + 4].tolist()
        return failed(text, f"{CAUSAL:.0e}", [{"row": row, "position": position, "ids": ids, "note": note}])
    return passed(text, f"{CAUSAL:.0e}")


def _as_trainer_sets(model: Any, settings: dict[str, Any]) -> None:
    """`train()` writes use_cache into the config; a balancing loss would tie all tokens together."""
    for config in (bare(model).config, text_config(bare(model))):
        config.use_cache = bool(settings.get("use_cache", False))
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False


def _taught_alone(batch: dict[str, Any], row: int, start: int, end: int) -> dict[str, Any]:
    """The batch with labels for the inside of one document only."""
    ids, taught = batch["input_ids"], dict(batch)
    labels = torch.full_like(ids, -100)
    labels[row, start + 1 : end] = ids[row, start + 1 : end]
    if "labels" in batch:
        taught["labels"] = labels
    if isinstance(batch.get("shift_labels"), Tensor):
        taught["shift_labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    return taught


@contextlib.contextmanager
def _embedded(model: Any) -> Iterator[list[Tensor]]:
    """Whatever the input embedding gives inside, each with its gradient after a backward pass."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        hidden = output.detach().requires_grad_(torch.is_grad_enabled())
        seen.append(hidden)
        return hidden

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _positions_in_training(subject: Subject) -> Outcome:
    batch, documents = _packed_batch(subject)
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != batch["input_ids"].shape:
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    off = [(row, start, int(positions[row, start])) for row, start, _ in documents if int(positions[row, start]) != 0]
    with probed(subject) as (model, ids):
        if not accepts(model, "position_ids"):
            raise NotApplicable("the forward takes no position_ids")
        limit = floor(model, ids)
        at = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        plain, shifted = (logits_of(model, ids, position_ids=at + shift) for shift in (0, 5))
        moved = share(plain, shifted, need_alive(plain), model)
    text = f"{len(documents) - len(off)} of {len(documents)} documents begin at position 0"
    if off and moved > max(limit, EQUAL):
        row, start, position = off[0]
        note = f"this document begins at position {position}; a shift of all positions moves logits by {moved:.1e}"
        return failed(text, "all of them", [{"row": row, "position": start, "note": note}])
    if off:
        text += "; this model sees distances only"
    return passed(text, "all of them")
