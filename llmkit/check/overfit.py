"""One batch learned by heart, and written again by `generate`: whatever is broken on the way shows, without a name.

Owns `does-not-overfit` (family `learning`). Leaves out what exactly is wrong: `loss.py`, `trainer.py` and `model.py`
have a check for each.
"""

import collections
import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .forward import accepts, bare, draw_ids, logits_of, num_ids, text_config
from .probe import expected_positions
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, Subject, without_dropout

# (steps, peak rate): 5e-2 for models that divide their logits by a constant, the last one for whatever is left
TRIES = ((80, 1e-2), (80, 5e-2), (80, 2e-3), (240, 5e-3))
LEARNED = 0.1  # nats per token above what the batch leaves open
PREDICTED, HOPELESS = 0.99, 0.5  # share of the next tokens that can be known
LARGE = 3_000_000  # parameters from which rows are fewer and shorter
PROMPT = 8  # tokens that stay in front of what is learned, at least
BUDGET_S = 30.0  # no further try is begun after this


@dataclass
class Said:
    """What `generate` did with a prompt."""

    is_right: bool = True
    note: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    hits: float | None = None  # of the next tokens that can be known; None where the labels are no next tokens
    said: Said | None = None

    @property
    def last(self) -> float:
        return self.losses[-1] if self.losses and math.isfinite(self.losses[-1]) else math.inf


@check("does-not-overfit", family="learning", tier=2, catalogue="K33")
def does_not_overfit(subject: Subject) -> Outcome:
    """One batch cannot be learned by heart, or `generate` does not write it again.

    Symptom: the loss falls and then stays, whatever the rate; or training looks fine and the model never stops.
    Example: a gradient that is detached, targets that are not in the inputs, an EOS that is in the rows and not in the
        loss, a cache that `generate` alone uses.
    Detected: up to four short rows, cut around the end of an answer, trained with the trainer's own collator and loss
        (the model's where there is no trainer) by an AdamW of our own on redrawn weights, all of them trainable; then
        `generate` must write an answer word for word and stop where the row does.
    Tolerance: learned is 0.1 nats above what the batch leaves open (rows that begin alike), or 99 % of the next tokens
        predicted; a fail only below half of them at every rate that is tried, a warning in between. Generation is
        asked only for an answer of which a plain forward predicts every token.
    Spares: losses with a floor (label smoothing, auxiliary losses): their tokens are predicted all the same; losses
        of another kind than next-token prediction, of which only a fall is asked; what is frozen, adapters too small
        to learn by heart; encoders; without a trainer, decoders of sequence-to-sequence models.
    Fix: look at labels-misaligned, no-gradient, end-not-in-loss and cache-differs, which name what is wrong.
    Sources: the practice of overfitting one batch before anything else.
    """
    subject.need("model")
    keep = subject.training is not None
    best, started = Result(), time.monotonic()
    with subject.small_model(keep_vocabulary=keep) as model:
        _need_causal(subject, model)
        batch = batch_of(subject, model)
    floor, most = _left_open(batch)
    tried: list[float] = []
    for steps, rate in TRIES:
        if time.monotonic() - started > BUDGET_S:
            break
        tried.append(rate)
        with subject.small_model(keep_vocabulary=keep) as model, without_dropout(model):
            for p in model.parameters():
                p.requires_grad_(p.is_floating_point())
            found = Result(_learn(subject, model, batch, steps, rate, floor))
            found.hits = _share_predicted(model, batch, most)
            if len(tried) == 1 or (found.hits or 0, -found.last) > (best.hits or 0, -best.last):
                best = found
                best.said = _generate(subject, model, batch)
        if best.last < floor + LEARNED or (best.hits or 0) >= PREDICTED:
            break
    return _judge(best, floor, tried)


def _judge(best: Result, floor: float, tried: list[float]) -> Outcome:
    if not best.losses or not math.isfinite(best.losses[0]):
        return failed("the first loss is not finite", "", [{"note": f"loss {best.losses[:1]}"}])
    share = "" if best.hits is None else f", {best.hits:.0%} of the next tokens predicted"
    measured = f"loss {best.losses[0]:.2f} -> {best.last:.3f} in {len(best.losses)} steps{share}"
    limit = f"{floor + LEARNED:.2f} nats, or {PREDICTED:.0%} predicted"
    evidence = [{"note": f"learning rates {tried} were tried"}]
    if best.hits is None:
        if best.last < max(LEARNED, 0.5 * best.losses[0]):
            return passed(measured, limit)
        if best.last > 0.95 * best.losses[0]:
            return failed(measured, "a loss that falls", evidence)
        return warned(measured, "half of the first loss", evidence)
    if best.hits < HOPELESS:
        return failed(measured, limit, evidence)
    if best.last > floor + LEARNED and best.hits < PREDICTED:
        return warned(measured, limit, evidence, "a loss with a floor may end here; else see labels-misaligned")
    if best.said is None:
        return passed(f"{measured}; generation was not asked", limit)
    if not best.said.is_right:
        return failed(f"{measured}; {best.said.note}", "word for word, then stop", [best.said.evidence])
    return passed(f"{measured}; {best.said.note}", limit)


def _need_causal(subject: Subject, model: Any) -> None:
    """Raises NotApplicable for encoders, and for decoders of pairs, whose own loss takes labels shifted already."""
    config = text_config(model)
    if getattr(config, "is_decoder", None) is False:
        raise NotApplicable("config.is_decoder=False: an encoder, which does not predict the next token")
    is_half = any(hasattr(config, key) for key in ("decoder_layers", "num_decoder_layers"))
    if subject.training is None and is_half:
        raise NotApplicable("the decoder of a sequence-to-sequence model: its loss takes shifted labels")


# the batch


def batch_of(subject: Subject, model: Any) -> dict[str, Any]:
    """Short rows of the trainer's, or random ones that end in EOS, all tokens trained."""
    is_large = sum(p.numel() for p in model.parameters()) > LARGE
    count, width = (2, 20) if is_large else (4, 40)
    if subject.training is None:
        ids = draw_ids(model, count, 12)
        for eos in stops(subject, model)[:1]:
            ids[:, -1] = eos
        return {"input_ids": ids, "labels": ids.clone()}
    device, batch = next(model.parameters()).device, subject.training.batches(1, count)[0]
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return _cut(batch, width)


def _cut(batch: dict[str, Any], width: int) -> dict[str, Any]:
    """Rows of at most `width` tokens that end just behind the first stretch of trained ones.

    Left as it is where it is short, or where it holds anything but one value per token.
    """
    if not {"input_ids", "labels"} <= batch.keys() or batch["input_ids"].shape[1] <= width:
        return batch
    shape = batch["input_ids"].shape
    if any(isinstance(v, Tensor) and v.shape != shape for v in batch.values()) or "shift_labels" in batch:
        return batch
    mask = batch.get("attention_mask", torch.ones(shape))
    trained = expected_positions(batch)
    starts = []
    for row in range(shape[0]):
        first, length = _first_stretch(trained[row])
        real = mask[row].nonzero().flatten().tolist() or [0]
        end = min(first + length + 2, real[-1] + 1)  # one token beyond the last target: an EOS without a label
        if length > width - PROMPT:  # a long answer: its beginning is as good
            end = first + 1 + width - PROMPT
        starts.append(max(0, min(max(real[0], end - width), shape[1] - width)))
    return {
        k: torch.stack([v[row, start : start + width] for row, start in enumerate(starts)])
        if isinstance(v, Tensor)
        else v
        for k, v in batch.items()
    }


def _first_stretch(flags: Tensor) -> tuple[int, int]:
    """(first, length) of the first run of True in (T,); (0, 0) without one."""
    places = flags.nonzero().flatten().tolist()
    length = next((n for n, (a, b) in enumerate(itertools.pairwise(places), 1) if b != a + 1), len(places))
    return (places[0], length) if places else (0, 0)


def _targets(batch: dict[str, Any]) -> Tensor | None:
    """(B, T) bool: positions whose next token in the row is learned. None where the labels are something else."""
    if not {"input_ids", "labels"} <= batch.keys() or batch["labels"].shape != batch["input_ids"].shape:
        return None
    ids, labels = batch["input_ids"], batch["labels"]
    is_on = labels != -100
    found = expected_positions(batch)
    agree = max(float((is_on & (labels == ids.roll(-s, 1))).sum()) for s in (0, 1)) / max(float(is_on.sum()), 1)
    return found if found[:, :-1].any() and agree > 0.9 else None


def _left_open(batch: dict[str, Any]) -> tuple[float, float]:
    """(nats per token that no model can learn, share of the next tokens that can be known): rows that begin alike."""
    targets = _targets(batch)
    if targets is None:
        return 0.0, 1.0
    follows: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for row, ids in enumerate(batch["input_ids"].tolist()):
        begins = _document_starts(batch, row)
        for t in targets[row, :-1].nonzero().flatten().tolist():
            begin = max((b for b in begins if b <= t), default=0)
            follows[tuple(ids[begin : t + 1])][ids[t + 1]] += 1
    total = sum(sum(c.values()) for c in follows.values())
    nats = sum(n * math.log(sum(c.values()) / n) for c in follows.values() for n in c.values())
    return nats / total, sum(max(c.values()) for c in follows.values()) / total


def _document_starts(batch: dict[str, Any], row: int) -> list[int]:
    """Where the row begins behind its padding, and where packed documents do, by position_ids; in order."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    first = int(mask[row].nonzero()[0]) if isinstance(mask, Tensor) and mask[row].any() else 0
    packed = (positions[row] == 0).nonzero().flatten().tolist() if isinstance(positions, Tensor) else []
    return sorted({first, *(p for p in packed if p > first)})


# learning it


def _learn(subject: Subject, model: Any, batch: dict[str, Any], steps: int, rate: float, floor: float) -> list[float]:
    """Losses in nats per trained token, until it is learned."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))
    losses: list[float] = []
    for step in range(steps):
        losses.append(backward(subject, model, batch))
        if not math.isfinite(losses[-1]) or losses[-1] < floor + LEARNED / 2:
            break
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5) * (1 - 0.9 * step / steps)
        optimizer.step()
    return losses


def backward(subject: Subject, model: Any, batch: dict[str, Any]) -> float:
    """Loss of the batch, gradients in the model; by the trainer where there is one."""
    if subject.training is not None:
        return subject.training.backward(model, [batch])
    model.train()
    model.zero_grad(set_to_none=True)
    if accepts(model, "labels"):
        out = model(**batch, **({"use_cache": False} if accepts(model, "use_cache") else {}))
        loss = out.loss if hasattr(out, "loss") else out[0]
    else:
        logits = logits_of(model, batch["input_ids"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


@torch.no_grad()
def _share_predicted(model: Any, batch: dict[str, Any], most: float) -> float | None:
    """Of the next tokens that can be known, how many a plain forward finds likeliest."""
    targets = _targets(batch)
    if targets is None:
        return None
    model.eval()
    ids = batch["input_ids"]
    logits = logits_of(model, ids, batch.get("attention_mask"), batch.get("position_ids"))[:, -ids.shape[1] :]
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:])[targets[:, :-1]]
    return min(1.0, float(right.float().mean()) / most)


# saying it again


def stops(subject: Subject, model: Any) -> list[int]:
    """Ids at which generation may end, as a Trainer leaves them: of tokenizer, generation config and config."""
    found: list[Any] = []
    for holder in (subject.tokenizer, getattr(bare(model), "generation_config", None), text_config(model)):
        value = getattr(holder, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [value]
    count = num_ids(model)
    return list(dict.fromkeys(i for i in found if isinstance(i, int) and 0 <= i < count))


@torch.no_grad()
def _generate(subject: Subject, model: Any, batch: dict[str, Any]) -> Said | None:
    """What `generate` writes instead of an answer that is known by heart; None where there is none to ask for."""
    targets = _targets(batch)
    if targets is None or not hasattr(bare(model), "generate"):
        return None
    model.eval()
    ends = set(stops(subject, model))
    for row in range(len(targets)):
        ids, prompt, answer, is_masked = _question(batch, targets, row, ends)
        tokens = torch.tensor([ids[: prompt + len(answer)]], device=targets.device)
        known = logits_of(model, tokens)[0, -tokens.shape[1] :].argmax(-1).tolist()
        trained = len(answer) - int(is_masked)
        wrong = [i for i in range(trained) if known[prompt - 1 + i] != answer[i]]
        skip = wrong[-1] + 1 if wrong else 0  # rows that begin alike go on differently
        if trained - skip >= min(4, trained) > 0:
            return _ask(model, tokens[:, : prompt + skip], answer[skip:], ends, is_masked, row)
    return None


def _question(
    batch: dict[str, Any], targets: Tensor, row: int, ends: set[int]
) -> tuple[list[int], int, list[int], bool]:
    """(ids of the row's first document, length of the prompt, answer, it ends in a stop token that has no label).

    The answer goes up to the first stop token. Where everything is trained, the prompt is a third of the row, or what
    comes before its last turn.
    """
    begin, *later = _document_starts(batch, row)
    mask = batch.get("attention_mask")
    last = int(mask[row].nonzero()[-1]) + 1 if isinstance(mask, Tensor) and mask[row].any() else targets.shape[1]
    end = min([last, *later])
    ids, flags = batch["input_ids"][row, begin:end].tolist(), targets[row, begin:end]
    first, length = _first_stretch(flags[:-1])
    prompt, stop = first + 1, first + 1 + length  # answer: ids[prompt:stop]
    if prompt < 4:
        breaks = [i + 1 for i in range(len(ids) // 3, stop - 4) if ids[i] in ends]
        prompt = min(max([prompt, len(ids) // 3, *breaks[-1:]]), stop)
    answer = ids[prompt:stop]
    cut = next((i for i, token in enumerate(answer) if token in ends), None)
    if cut is not None:
        return ids, prompt, answer[: cut + 1], False
    if answer and stop < len(ids) and ids[stop] in ends:
        return ids, prompt, [*answer, ids[stop]], True
    return ids, prompt, answer, False


def _ask(model: Any, prompt: Tensor, answer: list[int], ends: set[int], is_masked: bool, row: int) -> Said | None:
    from transformers import GenerationConfig

    inner, extra = bare(model), 4
    holder = model if hasattr(model, "generate") else inner
    inner.generation_config = GenerationConfig(  # the user's may penalise repetition
        do_sample=False, max_new_tokens=len(answer) + extra, pad_token_id=0, eos_token_id=sorted(ends) or None
    )
    try:
        out = holder.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))[0, prompt.shape[1] :].tolist()
    except Exception as error:
        return Said(note=f"generation could not be asked ({type(error).__name__})")
    evidence: dict[str, Any] = {"row": row, "ids": out[-16:]}
    if is_masked and out[: len(answer) - 1] == answer[:-1] and out[len(answer) - 1 : len(answer)] != answer[-1:]:
        note = "generate does not stop: the stop token behind the answer has no label"
        return Said(False, note, {**evidence, "position": prompt.shape[1] + len(answer) - 1, "note": note})
    if out[: len(answer)] != answer:
        at = next((i for i, (a, b) in enumerate(zip(out, answer, strict=False)) if a != b), len(out))
        note = "generate writes another token than a plain forward predicts"
        return Said(False, note, {**evidence, "position": prompt.shape[1] + at, "note": note})
    if answer[-1] in ends and len(out) > len(answer):
        note = "generate does not stop"
        return Said(False, note, {**evidence, "position": prompt.shape[1] + len(answer), "note": note})
    return Said(note="generated word for word" + (", then stopped" if answer[-1] in ends else ""))
