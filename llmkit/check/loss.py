"""What the loss teaches: the token right behind, answers and their end, no padding, every token alike. Tier 2.

Owns the checks that run the user's own collator and loss on a small model with redrawn weights. Leaves out how a
gradient is read (`probe.py`) and which labels there should be (`rows.py`).
"""

from typing import Any

import torch
from torch import Tensor

from .audit import stop_ids
from .forward import text_config
from .probe import Probe, need_same_forward, own_backward, ragged_batch, run_probe, takes_num_items, without_cache
from .rows import padding_of
from .runner import Outcome, check, failed, passed, warned
from .spans import decode, template_marks
from .subject import LabelledRow, NotApplicable, NotRun, Subject, without_dropout

NUM_ROWS = 8
NUM_ROWS_OF_MANY_IDS = 4  # where a row's logits are large: half the time
MANY_IDS = 50_000
LENGTHS = (9, 14, 18, 23, 31, 37, 42, 48)  # of random rows, where there is no trainer
SAME_TARGET = 0.7  # cosine from which a gradient counts as cross-entropy to a token; others measure below 0.3
SHOWN = 3


def _num_rows(subject: Subject) -> int:
    many = subject.training is not None and getattr(text_config(subject), "vocab_size", 0) > MANY_IDS
    return NUM_ROWS_OF_MANY_IDS if many else NUM_ROWS


def _probe(subject: Subject) -> Probe:
    return subject.once("probe", lambda: _make_probe(subject))


def _make_probe(subject: Subject) -> Probe:
    subject.need("model")
    training = subject.training
    batch = training.batches(1, _num_rows(subject), ragged=True)[0] if training is not None else None
    with subject.small_model(keep_vocabulary=batch is not None) as model:
        need_same_forward(subject, model)
        without_cache(model)
        if batch is None:
            return run_probe(model, own_backward, ragged_batch(model, LENGTHS))
        return run_probe(model, training.backward, batch)


def _shift(probe: Probe) -> tuple[Tensor, Tensor]:
    """(positions that can be judged, the shift each was trained with). Raises NotRun for a loss of another kind."""
    judged = probe.supervised & probe.is_distinct
    if not judged.any():
        raise NotRun("the loss has no gradient at any position that could be judged")
    best, shift = probe.cosine.max(0)
    if best[judged].median() < SAME_TARGET:
        raise NotRun(
            f"the loss is not cross-entropy to the row's own tokens (cosine {best[judged].median():.2f} at best)"
        )
    apart = probe.cosine.sort(0).values  # control: the three candidates must differ from one another
    if (apart[-1] - apart[-2])[judged].median() < 0.1:
        raise NotRun("targets cannot be told apart by their gradients")
    return judged & (best >= SAME_TARGET), shift


def _aligned(subject: Subject) -> Probe:
    """The probe of a loss that predicts the next token. Raises NotRun for one that does not."""
    probe = _probe(subject)
    judged, shift = _shift(probe)
    if (shift[judged] != 1).float().mean() > 0.01:
        raise NotRun("the loss does not predict the next token: see labels-misaligned")
    return probe


def _show(subject: Subject, probe: Probe, row: int, position: int, note: str) -> dict[str, Any]:
    """Evidence: a few tokens around a position of a row of the batch; row is that of the data set where it is known."""
    ids = probe.ids[row, max(position - 5, 0) : position + 3].tolist()
    text = {"text": decode(subject.tokenizer, ids)} if subject.tokenizer is not None and subject.training else {}
    return {"row": _row_index(subject, probe, row), "position": position, "ids": ids, **text, "note": note}


def _row_index(subject: Subject, probe: Probe, row: int) -> int:
    padding = set(_padding(subject, probe)[row])
    known = _alone(subject).get(tuple(i for t, i in enumerate(probe.ids[row].tolist()) if t not in padding))
    return known.index if known is not None else row


def _alone(subject: Subject) -> dict[tuple[int, ...], LabelledRow]:
    """The first training rows by their ids, so that a row of a batch is known again."""
    if subject.training is None:
        return {}
    return subject.once("alone", lambda: {tuple(row.input_ids): row for row in subject.training.labelled_rows(256)})


def _padding(subject: Subject, probe: Probe) -> list[list[int]]:
    return subject.once("padding", lambda: padding_of(probe.batch, _alone(subject)))


def _is_padding(subject: Subject, probe: Probe) -> Tensor:
    """(B, T)"""
    found = torch.zeros_like(probe.expected)
    for row, positions in enumerate(_padding(subject, probe)):
        found[row, positions] = True
    return found


def _next(flags: Tensor) -> Tensor:
    """(B, T): of the token behind each position; the last position has none."""
    shifted = flags.roll(-1, 1)
    shifted[:, -1] = False
    return shifted


def _places(flags: Tensor) -> list[tuple[int, int]]:
    return [(int(b), int(t)) for b, t in flags.nonzero()]


def _one_per_row(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    first = {row: (row, t) for row, t in reversed(places)}
    return [first[row] for row in sorted(first)][:SHOWN]


@check("labels-misaligned", family="loss", tier=2, catalogue="K24")
def labels_misaligned(subject: Subject) -> Outcome:
    """The loss does not predict the next token: labels are shifted twice, or not at all.

    Symptom: the loss goes to 0 (no shift: the token itself is given) or stays high (double shift), samples are garbage.
    Example: a collator that shifts labels for a model that shifts them again; label smoothing without a shift.
    Detected: the loss's gradient at every position is compared with that of cross-entropy to the token 0, 1 and 2
        places ahead, through the model's own head.
    Tolerance: 1 % of positions; a cosine of 0.7 counts as the same target, other targets measure below 0.3.
    Spares: labels shifted by the collator for a loss that does not shift; multi-token heads, which add other terms.
    Fix: shift once: labels[t] == input_ids[t] for transformers models, whose loss shifts by one.
    Sources: transformers#17960, transformers#47395, transformers#46898.
    """
    probe = _probe(subject)
    judged, shift = _shift(probe)
    wrong = judged & (shift != 1)
    share = float(wrong.sum() / judged.sum())
    measured = f"{share:.1%} of {int(judged.sum())} supervised positions are not taught the next token"
    if share <= 0.01:
        return passed(measured, "1%")
    usual = int(shift[wrong].mode().values)
    what = {0: "the token itself (no shift)", 2: "the token after the next (shifted twice)"}[usual]
    places = _one_per_row(_places(wrong & (shift == usual)))
    evidence = [_show(subject, probe, b, t, f"position {t} is taught the token at {t + usual}") for b, t in places]
    return failed(f"{measured}, but {what}", "1%", evidence)


@check("pad-in-loss", family="loss", tier=2, catalogue="K24")
def pad_in_loss(subject: Subject) -> Outcome:
    """Padding gets a gradient.

    Symptom: the loss depends on how rows are batched, and means little; the model emits padding.
    Example: labels = input_ids.clone(); a loss of one's own that forgets ignore_index.
    Detected: in a batch of rows as unlike in length as the data has them, no position whose next token is padding may
        have a gradient.
    Tolerance: none: such a position has a gradient of exactly 0.
    Spares: EOS as padding, where only the row's own EOS is taught; batches without padding; another term than
        cross-entropy (z-loss) warns.
    Fix: labels of -100 where attention_mask is 0, and a loss that ignores -100.
    Sources: mlx-lm#1855, axolotl#3988, trl#6357.
    """
    probe = _aligned(subject)
    padding = _is_padding(subject, probe)
    if not padding.any():
        raise NotApplicable("the batch holds no padding: rows of one length, packing, or a padding-free collator")
    touched = probe.supervised & _next(padding)
    wrong = touched & (probe.cosine[1] >= SAME_TARGET)
    measured = f"{int(touched.sum())} of {int(_next(padding).sum())} positions before padding have a gradient"
    if not touched.any():
        return passed(measured, "0")
    if not wrong.any():
        return warned(f"{measured}, not by cross-entropy", "0", fix="leave padding out of that other term too")
    places = _one_per_row(_places(wrong))
    return failed(measured, "0", [_show(subject, probe, b, t, f"padding at {t + 1} is taught") for b, t in places])


@check("end-not-in-loss", family="loss", tier=2, catalogue="K24")
def end_not_in_loss(subject: Subject) -> Outcome:
    """The stop token at the end of a row gets no gradient although the token before it does.

    Symptom: generation never stops.
    Example: a collator that masks all pad tokens while pad is EOS; a template with <|im_end|> outside of its marks.
    Detected: through the loss itself: where the last token before a row's stop token is taught, so must the stop be.
    Tolerance: none.
    Spares: rows that end in a prompt, were cut, or have no stop token (see eos-not-trained).
    Fix: give the tokenizer a pad token of its own, and keep the end of turn inside the generation marks.
    Sources: trl#6357, trl#3091, granite-3.1#2.
    """
    subject.need("training", "tokenizer")
    probe = _aligned(subject)
    stops = stop_ids(subject, template_marks(subject.tokenizer))
    judged, wrong = 0, []
    for row, padding in enumerate(_padding(subject, probe)):
        ids = probe.ids[row].tolist()
        real = [t for t in range(len(ids)) if t not in set(padding)]
        while real and not decode(subject.tokenizer, [ids[real[-1]]]).strip():
            real.pop()
        if len(real) < 3 or ids[real[-1]] not in stops or not probe.supervised[row, real[-1] - 2]:
            continue
        judged += 1
        if not probe.supervised[row, real[-1] - 1]:
            wrong.append((row, real[-1]))
    if not judged:
        raise NotApplicable("no row of the batch has a stop token right behind a token that is taught")
    measured = f"the stop token of {len(wrong)} of {judged} rows has no gradient"
    if not wrong:
        return passed(measured, "0")
    return failed(
        measured, "0", [_show(subject, probe, b, t, "the stop token is not taught") for b, t in wrong[:SHOWN]]
    )


@check("loss-ignores-mask", family="loss", tier=2, catalogue="K24")
def loss_ignores_mask(subject: Subject) -> Outcome:
    """The loss teaches tokens whose label is -100, or leaves out tokens that have a label.

    Symptom: prompts are learned although they were masked; the first token of every answer is not learned.
    Example: a loss of one's own over input_ids; `logprobs[start + 1:]`.
    Detected: the positions with a gradient are compared with those whose next token has a label.
    Tolerance: none for tokens left out; a gradient at a masked position fails where it points to the masked token.
    Spares: other terms at masked positions (z-loss, distillation) warn; the first label of a row, which nothing
        predicts.
    Fix: compute the loss from labels with ignore_index=-100, over all positions.
    Sources: fw-ai/cookbook#388, trl#1550.
    """
    probe = _aligned(subject)
    padding = _next(_is_padding(subject, probe))
    expected = probe.expected.clone()
    expected[:, -1] &= isinstance(probe.batch.get("shift_labels"), Tensor)
    extra, missing = probe.supervised & ~expected & ~padding, expected & ~probe.supervised & ~padding
    extra[:, -1] = False
    num_masked = int((~expected & ~padding).sum())
    measured = (
        f"{int(extra.sum())} of {num_masked} masked positions are taught, "
        f"{int(missing.sum())} of {int(expected.sum())} labelled ones are not"
    )
    taught = extra & (probe.cosine[1] >= SAME_TARGET)
    notes = [(place, "its label is -100, and it is taught") for place in _one_per_row(_places(taught))]
    notes += [(place, "it has a label, and is not taught") for place in _one_per_row(_places(missing))]
    evidence = [_show(subject, probe, b, t + 1, note) for (b, t), note in notes]
    if taught.any() or missing.any():
        return failed(measured, "0", evidence[:SHOWN])
    if extra.any():
        return warned(f"{measured}; not by cross-entropy", "0", fix="look whether that other term is meant to be there")
    return passed(measured, "0")


@check("token-weights", family="loss", tier=2, catalogue="K24")
def token_weights(subject: Subject) -> Outcome:
    """Tokens do not count alike, or all of them too much or too little.

    Symptom: the effective learning rate is off by a factor; short rows count more than long ones.
    Example: a mean over all positions instead of the supervised ones; a denominator that counts the first label.
    Detected: the weight of every supervised token is read off the gradient; for a mean over tokens all are equal and
        sum to 1.
    Tolerance: 1 % between tokens; the sum warns from 0.1 % and fails from 1 % (float32 noise is 1e-5). Label smoothing
        widens both by itself.
    Spares: per-row means, sums and unequal weights, which may be meant, warn; DFT; weights that the collator gives.
        Older transformers count the first label: warned.
    Fix: divide the sum over tokens by num_items_in_batch, or by the number of labels behind the first that are not
        -100.
    Sources: transformers#46204, transformers#34191.
    """
    settings = subject.settings
    if settings.get("loss_type") == "dft":
        raise NotApplicable("loss_type=dft weighs tokens by their probability")
    probe = _aligned(subject)
    given = [key for key in probe.batch if "weight" in key or "loss_scale" in key]
    if given:
        raise NotApplicable(f"the collator gives weights: {given[0]}")
    smoothing = float(settings.get("label_smoothing_factor") or 0)
    is_on = probe.supervised & probe.expected
    if not is_on.any():
        raise NotRun("the loss teaches no labelled position: see loss-ignores-mask")
    if not smoothing and probe.cosine[1][is_on].median() < 1 - 1e-5:
        raise NotRun("the loss has other terms beside cross-entropy: token weights cannot be read off")
    weights = probe.weight[is_on]
    total, count, mean = float(weights.sum()), int(is_on.sum()), float(weights.mean())
    spread = float((weights / mean - 1).abs().max())
    measured = f"{count} tokens weigh {total:.4f} in all, single ones up to {spread:.1%} off their mean"
    limit = "1 in all, single ones 1%"
    if spread > 0.01 + 3 * smoothing:
        rows = [(float(probe.weight[b][is_on[b]].sum()), b) for b in range(len(is_on)) if is_on[b].any()]
        per_row = [probe.weight[b][is_on[b]] for _, b in rows]
        is_row_mean = all(float((w / w.mean() - 1).abs().max()) < 0.01 for w in per_row)
        is_row_mean &= max(r for r, _ in rows) < 1.01 * min(r for r, _ in rows)
        what = "every row counts alike, whatever its length" if is_row_mean else "tokens count unequally"
        return warned(
            f"{measured}: {what}", limit, fix="if that is not meant: divide the sum over tokens by their number"
        )
    if abs(total - 1) <= 1e-3 + 2 * smoothing:
        return passed(measured, limit)
    if abs(mean - 1) < 1e-3:
        return warned(f"{measured}: the loss is a sum over tokens", limit)
    num_first = int((probe.batch["labels"][:, 0] != -100).sum())
    evidence = [_show(subject, probe, *_places(is_on)[0], note=f"weighs {float(weights[0]) * count:.4f} / {count}")]
    if num_first and abs(total - count / (count + num_first)) < 3e-4:
        measured += f": {num_first} labels at the start of rows are counted, which nothing predicts"
        return (warned if _counts_by_library(subject, probe, count + num_first) else failed)(measured, limit, evidence)
    return (failed if abs(total - 1) > 0.01 + 2 * smoothing else warned)(measured, limit, evidence)


def _counts_by_library(subject: Subject, probe: Probe, number: int) -> bool:
    """The installed transformers itself hands over such a number of tokens, as older versions do."""
    trainer = getattr(subject.training, "trainer", None)
    count = getattr(trainer, "get_batch_samples", None)
    if count is None or not getattr(count, "__module__", "").startswith(("transformers.", "trl.")):
        return False
    return int(count(iter([probe.batch]), 1, probe.ids.device)[1] or 0) == number


@check("accumulation-changes-gradient", family="loss", tier=2, catalogue="K25")
def accumulation_changes_gradient(subject: Subject) -> Outcome:
    """The same rows give another gradient when they are accumulated over micro-batches.

    Symptom: runs with gradient accumulation differ from runs with large batches: short rows count too much, or the
        gradient is larger by the number of micro-batches.
    Example: a mean per micro-batch; a forward that takes **kwargs and ignores num_items_in_batch, so that nobody
        divides.
    Detected: 8 (4) rows of unlike length as 1 x 8, 4 x 2 and 8 x 1 through the trainer's own step; gradients compared.
    Tolerance: 1e-4 of the gradient's norm (float32 noise measures 1e-6) and 0.1 % of its size.
    Spares: without gradient accumulation it only warns; balancing losses of mixtures of experts are switched off;
        means per row, which give the same gradient.
    Fix: divide the sum of token losses by num_items_in_batch; in a loss of your own set loss_is_scaled_for_ga.
    Sources: transformers#34191, trl#2175, transformers#37766, transformers#35438.
    """
    subject.need("model")
    training = subject.training
    number = _num_rows(subject)
    splits = [(1, number), (number // 2, 2), (number, 1)]
    given = [training.batches(*split, ragged=True) for split in splits] if training is not None else []
    if given and _has_left_padding(given[0][0]):  # positions may depend on it, which is not this check's matter
        given = [_sliced(given[0][0], size) for _, size in splits]
    with subject.small_model(keep_vocabulary=training is not None) as model:
        need_same_forward(subject, model)
        without_cache(model)
        _without_balancing_loss(model, training)
        if training is None:
            if not takes_num_items(model):
                raise NotApplicable("the model takes no num_items_in_batch, and no trainer is given")
            whole = ragged_batch(model, LENGTHS)
            given = [_sliced(whole, size) for _, size in splits]
        backward = training.backward if training is not None else own_backward
        gradients = []
        with without_dropout(model):
            for micro_batches in given:
                backward(model, micro_batches)
                grads = [p.grad.detach().float().flatten() for p in model.parameters() if p.grad is not None]
                if not grads:
                    raise NotRun("the loss leaves no gradient")
                gradients.append(torch.cat(grads))
                model.zero_grad(set_to_none=True)
    size = gradients[0].norm()
    if not size > 0:
        raise NotRun("the gradient is 0")
    if len({len(g) for g in gradients}) > 1:
        raise NotRun("other parameters have a gradient when rows are split")
    errors = [float((g - gradients[0]).norm() / size) for g in gradients[1:]]
    ratios = [float(g.norm() / size) for g in gradients[1:]]
    measured = f"{number} x 1 and {number // 2} x 2 rows against 1 x {number}: "
    measured += f"gradient off by {errors[1]:.1e} and {errors[0]:.1e}, "
    measured += f"size x {ratios[1]:.3f} and x {ratios[0]:.3f}"
    limit = "1e-4, size within 0.1%"
    if max(errors) < 1e-4 and max(abs(r - 1) for r in ratios) < 1e-3:
        return passed(measured, limit)
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in given[-1]]
    cause = (
        "nothing divides by the number of micro-batches" if ratios[1] > 3 else "micro-batches are averaged as wholes"
    )
    cause = "the loss is divided by their number twice" if ratios[1] < 0.3 else cause
    evidence = [{"note": f"tokens trained in the {number} micro-batches: {counts}; {cause}"}]
    if subject.settings.get("gradient_accumulation_steps") == 1:
        return warned(f"{measured}; gradient_accumulation_steps is 1 now", limit, evidence)
    return failed(measured, limit, evidence)


def _has_left_padding(batch: dict[str, Any]) -> bool:
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())


def _sliced(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    number = len(batch["input_ids"])
    return [
        {k: v[b : b + size] if isinstance(v, Tensor) and len(v) == number else v for k, v in batch.items()}
        for b in range(0, number, size)
    ]


def _without_balancing_loss(model: torch.nn.Module, training: Any) -> None:
    """It is a mean per micro-batch by design. Undone by `small_model` and by the runner."""
    trainer = getattr(training, "trainer", None)
    for holder in (*model.modules(), *(getattr(m, "config", None) for m in model.modules()), trainer):
        if holder is not None and getattr(holder, "router_aux_loss_coef", None):
            holder.router_aux_loss_coef = 0.0
