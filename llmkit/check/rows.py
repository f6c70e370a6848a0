"""Which tokens are trained: prompts left out, answers whole, their end taught, padding never. Tier 1, no model needed.

Owns the verdicts of the label audit. The rows are taken from the trainer's own collator where there is one; otherwise
the raw rows are tokenised and labelled as TRL's SFTTrainer would. Leaves out how contents are found in a row
(`audit.py`, `spans.py`) and what the loss makes of the labels (`loss.py`).
"""

from typing import Any

from .audit import (
    SHOWN,
    Audit,
    AuditedRow,
    audit_of,
    boundary_shift,
    conversation,
    has_answer,
    label_rows_counted,
    need_language_rows,
)
from .runner import Outcome, check, failed, passed, warned
from .spans import Part, decode
from .subject import LabelledRow, NotApplicable, NotRun, Subject

FEW = 0.005  # of rows: more is a fault of the pipeline, fewer are odd rows
SOME = 0.05
BESIDE = 6  # tokens shown around a place


def label_rows(subject: Subject, count: int) -> list[LabelledRow]:
    """Raw rows tokenised and labelled as TRL's SFT would; those that cannot be rendered are left out (and reported by
    `no-token-trained`)."""
    return label_rows_counted(subject, count)[0]


def _need_located(audit: Audit) -> list[AuditedRow]:
    """Rows whose answers were found. Raises NotRun where they are too few to speak for the data."""
    whole = [item for item in audit.rows if not item.is_cut and not _is_known_empty(item)]
    found = [item for item in whole if item.answers]
    if not whole:
        raise NotRun("no row with a whole answer to look at")
    if len(found) * 2 < len(whole):
        raise NotRun(f"the answers of {len(whole) - len(found)} of {len(whole)} rows were not found among their tokens")
    return audit.located


def _is_known_empty(item: AuditedRow) -> bool:
    return bool(item.row.raw and item.contents and not has_answer(item.row.raw))


def _need_boundary(audit: Audit) -> tuple[int, int]:
    found = boundary_shift(audit.rows)
    if found is None:
        raise NotRun("neither the raw rows nor the markup are known, so prompts cannot be told from answers")
    return found


def _boundary_verdict(audit: Audit, measured: str, is_wrong: bool) -> Outcome:
    if not is_wrong:
        return passed(measured, "0 tokens")
    begins = [(item, item.is_trained.index(True)) for item in audit.rows[:SHOWN] if True in item.is_trained]
    evidence = [audit.show(item, b - BESIDE, b + BESIDE, f"training begins at {b}") for item, b in begins]
    return failed(measured, "0 tokens", evidence)


def _verdict(
    count: int, total: int, measured: str, evidence: list[dict[str, Any]], limit: float = FEW, name: str = "rows"
) -> Outcome:
    """Fail above the limit, warn for fewer, pass for none."""
    said = f"{limit:.1%} of {name}"
    if count > limit * total:
        return failed(measured, said, evidence[:SHOWN])
    return warned(measured, said, evidence[:SHOWN]) if count else passed(measured, said)


@check("no-token-trained", family="rows", tier=1, catalogue="K9")
def no_token_trained(subject: Subject) -> Outcome:
    """A row has an answer, and every one of its labels is -100.

    Symptom: the loss is 0, nan or suspiciously steady; part of the data is never learned.
    Example: `assistant_only_loss` with a chat template that has no {% generation %} marks; a response marker that the
        tokenizer splits differently in context.
    Detected: the labels that the trainer's own collator makes are counted per row. Rows that were cut before their
        answer are `answer-truncated`.
    Tolerance: 0.5 % of rows.
    Spares: rows without an answer; rows cut before their answer.
    Fix: put {% generation %} ... {% endgeneration %} around the assistant's content and its end-of-turn token in the
        chat template, or use prompt and completion columns.
    Sources: transformers#34172, trl#598, trl#4201, unsloth#2900.
    """
    audit = audit_of(subject)
    evidence = [{"row": index, "text": error, "note": "cannot be rendered"} for index, error in audit.broken]
    if not audit.rows:
        if not audit.dropped:
            raise NotApplicable("no rows")
        evidence += [{"row": index, "note": "dropped: nothing to train"} for index in audit.dropped]
        return failed(
            f"all {audit.num_given} rows train nothing, and the trainer dropped them", "0.5%", evidence[:SHOWN]
        )
    blank = [
        item
        for item in audit.rows
        if not any(item.is_trained[1:]) and not item.is_cut and not _is_known_empty(item) and len(item.row.labels) > 1
    ]
    if not any(any(item.is_trained[1:]) for item in audit.rows):  # for whatever reason
        blank = audit.rows
    evidence = [audit.show(item, 0, 24, "all labels are -100") for item in blank[:SHOWN]] + evidence
    if subject.failure:
        evidence.append({"note": subject.failure})
    total = len(audit.rows) + len(audit.broken)
    measured = f"{len(blank)} of {total} rows train no token"
    if audit.broken:
        measured += f", {len(audit.broken)} cannot be rendered"
    return _verdict(len(blank) + len(audit.broken), total, measured, evidence)


@check("prompt-trained", family="rows", tier=1, catalogue="K9")
def prompt_trained(subject: Subject) -> Outcome:
    """The prompt is trained although only answers should be.

    Symptom: the model asks questions, or goes on with the user's next turn; loss figures cannot be compared.
    Example: a mask that ends at the first marker it finds; a collator whose marker is missing in some rows.
    Detected: every row is decoded token by token, the contents of its messages are found in it, and tokens that lie
        wholly inside a system, user, tool or prompt content must not be trained.
    Tolerance: 0.5 % of rows. Tokens that merge across the join of prompt and answer are reported and do not fail.
    Spares: training on everything, by configuration or because no prompt is masked in most rows.
    Fix: mask by characters or by token ids of the whole rendered row (TRL: assistant_only_loss, completion_only_loss),
        not by searching for a marker.
    Sources: transformers#47325, trl#1550, torchtitan#4504, maxtext#4010.
    """
    audit = audit_of(subject)
    need_language_rows(audit)
    if not audit.masks_context:
        raise NotApplicable("prompts are trained in most rows, so they are meant to be")
    if audit.kind == "unknown":
        shift, number = _need_boundary(audit)
        measured = f"training begins {max(-shift, 0)} tokens before the markup that {number} rows have in common"
        return _boundary_verdict(audit, measured, is_wrong=shift < 0)
    rows, evidence, merged = _need_located(audit), [], 0
    for item in rows:
        wrong = []
        for part, following in zip(item.parts, [*item.parts[1:], None], strict=True):
            if part.is_answer or (part.role == "history" and not audit.is_asked):
                continue
            tokens = [t for t in part.tokens if t and item.is_trained[t]]
            if tokens and following is not None and following.is_answer and _is_merge(tokens, part, following):
                merged += 1
                continue
            wrong += tokens
        if wrong:
            note = f"{len(wrong)} tokens of the prompt are trained"
            evidence.append(audit.show(item, wrong[0], wrong[0] + 12, note))
    measured = f"{len(evidence)} of {len(rows)} rows train tokens of the prompt"
    if merged:
        measured += f"; in {merged} the prompt's end merges with the answer"
    return _verdict(len(evidence), len(rows), measured, evidence)


def _is_merge(tokens: list[int], part: Part, following: Part) -> bool:
    """The trained tokens are the last ones before a token that holds the end of the prompt and the answer's start."""
    shared = set(part.joins) & set(following.joins)
    return len(tokens) <= 3 and bool(shared) and tokens[-1] == min(shared) - 1 and tokens[-1] - tokens[0] < 3


@check("answer-not-trained", family="rows", tier=1, catalogue="K9")
def answer_not_trained(subject: Subject) -> Outcome:
    """Part of the answer is masked: its first token, its last turn, a stretch in the middle.

    Symptom: the model starts answers badly, or never learns the last turn of a conversation.
    Example: `labels[:len(prompt_ids) + 1] = -100`; a mask that stays off after the first turn.
    Detected: tokens that lie wholly inside an answer's content must be trained where any of that answer is, and the
        last answer of a row where any answer is.
    Tolerance: 0.5 % of rows; a first token that the answer shares with the prompt (a merge) warns.
    Spares: training the last turn only; a masked <think> block; white space at the ends; rows that train nothing.
    Fix: compare len(prompt ids) with the ids of the whole row: the answer starts where they part.
    Sources: fw-ai/cookbook#388, AReaL#1427, miles#1377.
    """
    audit = audit_of(subject)
    need_language_rows(audit)
    if audit.kind == "unknown":
        shift, number = _need_boundary(audit)
        measured = f"training begins {max(shift, 0)} tokens behind the markup that {number} rows have in common"
        return _boundary_verdict(audit, measured, is_wrong=shift > 0)
    rows = [item for item in _need_located(audit) if any(item.is_trained[t] for p in item.answers for t in p.tokens)]
    if not rows:
        raise NotRun("no row trains an answer: see no-token-trained")
    evidence, merged, early = [], 0, 0
    for item in rows:
        answers = [part for part in item.answers if part.tokens]
        trained = [any(item.is_trained[t] for t in part.tokens) for part in answers]
        masked = [
            t
            for part, is_on in zip(answers, trained, strict=True)
            for t in _masked(item, part)
            if is_on or part is answers[-1]
        ]
        if masked:
            note = f"{len(masked)} tokens of the answer are masked"
            evidence.append(audit.show(item, masked[0] - BESIDE, masked[0] + BESIDE, note))
        starts = [part.joins[0] for part in answers if part.joins and part.joins[0] < part.tokens[0]]
        merged += any(not item.is_trained[t] for t in starts)
        early += not all(trained[:-1])
    measured = f"{len(evidence)} of {len(rows)} rows mask part of an answer"
    if evidence:
        return _verdict(len(evidence), len(rows), measured, evidence)
    if merged > FEW * len(rows):
        measured = f"in {merged} of {len(rows)} rows the answer's first token is masked, as it merges with the prompt"
        return warned(measured, "0.5% of rows", fix="end the prompt at a token boundary (no trailing space)")
    if early > FEW * len(rows) and subject.settings.get("assistant_only_loss"):
        return warned(
            f"{early} of {len(rows)} rows train the last turn only, under assistant_only_loss", "0.5% of rows"
        )
    return passed(measured, "0.5% of rows")


def _masked(item: AuditedRow, part: Part) -> list[int]:
    """Positions inside an answer that are not trained; a masked <think> block at its start is somebody's choice."""
    masked = [t for t in part.tokens if not item.is_trained[t]]
    on = [t for t in part.tokens if item.is_trained[t]]
    if masked and on and masked[-1] < on[0]:
        behind = item.text[part.start : part.end].lstrip()
        if behind.startswith("<think>"):
            return []
    return masked


@check("eos-not-trained", family="rows", tier=1, catalogue="K9")
def eos_not_trained(subject: Subject) -> Outcome:
    """The token that ends an answer is missing or masked, so the model never learns to stop.

    Symptom: generation runs to max_new_tokens, repeating itself or inventing the user's next turn.
    Example: prompt + answer without EOS; <|im_end|> outside of {% generation %}; a collator that masks every pad token
        while pad is EOS.
    Detected: behind the last answer of a row (or its last trained token, where answers cannot be found) comes a token
        of the stop set, and it is trained. Stop set: EOS of tokenizer, config and generation config, and the
        template's end of turn.
    Tolerance: 95 % of the rows that were not cut.
    Spares: packed text without EOS (pretraining); plain text without any warns where rows differ in length; white
        space after the stop token; cut rows. Templates whose next turn ends the answer (GLM) warn where rows have one
        turn.
    Fix: append EOS to every answer, keep the end of turn inside the generation marks, and give the tokenizer a pad
        token of its own.
    Sources: trl#1623, trl#2059, trl#3091, stanford_alpaca#126, granite-3.1#2.
    """
    audit = audit_of(subject)
    if not audit.stops:
        raise NotRun("tokenizer, config and template name no stop token")
    if audit.located:
        places = [(item, *_end_of(audit, item, part)) for item in audit.located for part in _judged_turns(audit, item)]
        places = [(i, "trained" if kind == "missing" and _ends_earlier(audit, i) else kind, t) for i, kind, t in places]
    elif audit.kind == "chat":
        raise NotRun("the answers of the raw rows were not found among their tokens")
    else:
        places = _ends_of_rows(subject, audit)
        if places and all(kind == "missing" for _, kind, _ in places) and not _teaches_answers(subject, audit):
            evidence = [audit.show(item, t - BESIDE, t + 4, "the row ends here") for item, _, t in places[:SHOWN]]
            measured = (
                f"none of {len(places)} rows of unlike length ends in a stop token: right for continued text only"
            )
            return warned(measured, "5% of rows", evidence)
    if not places:
        raise NotRun("no row trains a whole answer: see answer-truncated and no-token-trained")
    masked = [(item, t) for item, kind, t in places if kind == "masked"]
    missing = [(item, t) for item, kind, t in places if kind == "missing"]
    bad, limit = len(masked) + len(missing), f"{SOME:.0%} of answers"
    measured = f"{bad} of {len(places)} answers do not end in a trained stop token"
    if bad <= SOME * len(places):
        return passed(measured, limit)
    evidence = [audit.show(item, t - BESIDE, t + 1, "the stop token is masked") for item, t in masked[:SHOWN]]
    evidence += [audit.show(item, t - BESIDE, t + 4, "no stop token follows the answer") for item, t in missing[:SHOWN]]
    measured += f" ({len(missing)} have none, {len(masked)} have it masked)"
    has_ends = any(audit.stops & set(item.row.input_ids) for item in audit.rows)
    if not masked and audit.openers and (audit.stops & audit.openers or not has_ends):
        measured += "; in this template the next turn's start ends an answer, and these rows have no next turn"
        return warned(measured, limit, evidence[:SHOWN])
    return failed(measured, limit, evidence[:SHOWN])


def _judged_turns(audit: Audit, item: AuditedRow) -> list[Part]:
    """A row's last answer where it is trained; in packs every trained answer that something follows."""
    answers = [part for part in item.answers if any(item.is_trained[t] for t in part.tokens)]
    if audit.is_packed:
        return [part for part in answers if part.after < len(item.row.input_ids)]
    return [part for part in answers if part is item.answers[-1] and not item.is_cut]


def _stop_after(audit: Audit, item: AuditedRow, part: Part) -> int | None:
    """Position of the first stop token behind an answer and before the next content."""
    later = [p.tokens[0] for p in item.parts if p.start >= part.end and p.tokens]
    behind = range(part.after, min(later, default=len(item.row.input_ids)))
    return next((t for t in behind if item.row.input_ids[t] in audit.stops), None)


def _end_of(audit: Audit, item: AuditedRow, part: Part) -> tuple[str, int]:
    """(trained, masked or missing, position)"""
    stop = _stop_after(audit, item, part)
    if stop is None:
        return "missing", part.tokens[-1]
    return "trained" if item.is_trained[stop] else "masked", stop


def _ends_earlier(audit: Audit, item: AuditedRow) -> bool:
    """Earlier answers of the row end in a trained stop token: the start of the next turn, in some templates."""
    return any(_end_of(audit, item, part)[0] == "trained" for part in item.answers[:-1] if part.tokens)


def _ends_of_rows(subject: Subject, audit: Audit) -> list[tuple[AuditedRow, str, int]]:
    """Likewise for rows whose answers cannot be told, by their last tokens. Raises NotApplicable for pretraining."""
    rows = [item for item in audit.rows if not item.is_cut and any(item.is_trained[1:])]
    is_even = len(rows) > 1 and len({len(item.row.input_ids) for item in rows}) == 1
    if audit.is_packed or (is_even and not audit.masks_context):
        raise NotApplicable("rows of one length: packed text has no answers that end")
    places = []
    for item in rows:
        t = _last(audit, item)
        kind = "missing" if item.row.input_ids[t] not in audit.stops else "trained" if item.is_trained[t] else "masked"
        places.append((item, kind, t))
    ended = [place for place in places if place[1] != "missing"]
    return ended if ended and not _teaches_answers(subject, audit) else places


def _teaches_answers(subject: Subject, audit: Audit) -> bool:
    return audit.masks_context or subject.is_chat or "completion_only_loss" in subject.settings


def _last(audit: Audit, item: AuditedRow) -> int:
    """Position of a row's last token that is neither white space nor padding; where padding is a stop, its first."""
    ids, pad = item.row.input_ids, audit.tokenizer.pad_token_id
    t = len(ids) - 1
    while t > 0 and ids[t] == pad and (ids[t - 1] == pad or pad not in audit.stops):
        t -= 1
    while t > 0 and audit.is_blank(item, t):
        t -= 1
    return t


@check("double-eos", family="rows", tier=1, catalogue="K9")
def double_eos(subject: Subject) -> Outcome:
    """Two stop tokens end an answer: the second is trained behind the first.

    Symptom: a trained token that is never generated; EOS becomes likely at places where it should not be.
    Example: EOS appended behind a chat template that ends in it already.
    Detected: behind the stop token of an answer, white space apart, the same stop token follows and is trained.
    Tolerance: 0.5 % of answers.
    Spares: two different stop tokens (<|end|> and <|endoftext|>); separators of packed text; EOS as padding that is
        not trained; tokenizers whose BOS is EOS.
    Fix: append EOS only to rows that do not end in it.
    Sources: trl#4481, trl#4908.
    """
    audit = audit_of(subject)
    if not audit.stops:
        raise NotRun("tokenizer, config and template name no stop token")
    ends: list[tuple[AuditedRow, int]] = []
    if audit.located:
        found = [(i, _stop_after(audit, i, part)) for i in audit.located for part in _judged_turns(audit, i)]
        ends = [(item, t) for item, t in found if t is not None]
    elif not audit.is_packed:
        for item in audit.rows:
            ids = item.row.input_ids
            trained = [t for t, is_on in enumerate(item.is_trained) if is_on and not audit.is_blank(item, t)]
            if trained and ids[trained[-1]] in audit.stops:
                is_double = len(trained) > 1 and ids[trained[-2]] == ids[trained[-1]]
                ends.append((item, trained[-2] if is_double else trained[-1]))
    if not ends:
        raise NotApplicable("no row ends in a stop token")
    evidence = []
    for item, t in ends:
        ids = item.row.input_ids
        behind = next((s for s in range(t + 1, len(ids)) if not audit.is_blank(item, s)), None)
        starts_document = audit.is_packed and audit.tokenizer.bos_token_id == ids[t]
        if behind is not None and ids[behind] == ids[t] and item.is_trained[behind] and not starts_document:
            evidence.append(audit.show(item, t - BESIDE, behind + 1, "a stop token behind a stop token"))
    measured = f"{len(evidence)} of {len(ends)} answers end in two stop tokens"
    return _verdict(len(evidence), len(ends), measured, evidence, name="answers")


@check("answer-truncated", family="rows", tier=1, catalogue="K10")
def answer_truncated(subject: Subject) -> Outcome:
    """max_length cuts answers off, or leaves nothing of them.

    Symptom: answers break off in mid-sentence after training; the model does not stop; much of the data is not used.
    Example: max_length=256 under prompts of 250 tokens; a tokenizer that truncates at 512 whatever the trainer says.
    Detected: rows at the length limit whose last content or stop token is not there any more, rows of which nothing
        is left to train, and rows that the trainer dropped for that.
    Tolerance: fail: more than half of the rows lose their end, 0.5 % train nothing, or 5 % were dropped. Warn: 5 % lose
        their end, or 0.5 % were dropped.
    Spares: pretraining and packing, which cut by design.
    Fix: raise max_length (and the model's position limit where it is lower), or filter long rows yourself.
    Sources: trl#1053, trl#5826, unsloth#2904, nanochat#590.
    """
    audit = audit_of(subject)
    if audit.is_packed:
        raise NotApplicable("packing: rows are cut by design")
    if audit.kind in ("text", "unknown") and not audit.masks_context and "completion_only_loss" not in subject.settings:
        raise NotApplicable("plain text: rows may be cut anywhere")
    rows, dropped = audit.rows, audit.dropped
    lost = [item for item in rows if item.is_cut]
    blank = [item for item in lost if not any(item.is_trained[1:])]
    longest = max((len(item.row.input_ids) for item in rows), default=0)
    measured = f"{len(lost)} of {len(rows)} rows lose their end, {len(blank)} of them train nothing"
    if dropped:
        measured += f"; the trainer dropped {len(dropped)} of {audit.num_given} rows that were left without an answer"
    measured += f"; the longest row has {longest} tokens, max_length is {audit.max_length or 'not set'}"
    if lost and audit.cut_at and audit.max_length and audit.cut_at < audit.max_length:
        measured += f", yet rows are cut at {audit.cut_at}"
    evidence = [audit.show(item, len(item.row.input_ids) - 12, 10**9, "the row ends here") for item in blank or lost]
    evidence = [{"row": i, "note": "dropped by the trainer: nothing to train"} for i in dropped[:1]] + evidence
    limit = "lost ends: warn 5%, fail 50%; nothing left: fail 0.5%; dropped: warn 0.5%, fail 5%"
    lost_share, blank_share, dropped_share = (
        len(part) / max(whole, 1) for part, whole in ((lost, len(rows)), (blank, len(rows)), (dropped, audit.num_given))
    )
    if lost_share > 0.5 or blank_share > FEW or dropped_share > SOME:
        return failed(measured, limit, evidence[:SHOWN])
    if lost_share > SOME or dropped_share > FEW:
        return warned(measured, limit, evidence[:SHOWN])
    return passed(measured, limit)


@check("pad-trained", family="rows", tier=1, catalogue="K9")
def pad_trained(subject: Subject) -> Outcome:
    """Padding is trained.

    Symptom: the loss depends on how rows are batched, falls fast and means little; the model emits padding.
    Example: `labels = input_ids.clone()` in a collator, or behind `padding="max_length"`.
    Detected: rows as unlike in length as possible go through the trainer's collator together; positions with attention
        0, or beyond the row as it was collated alone, must have label -100.
    Tolerance: none.
    Spares: EOS as padding, where only the row's own EOS is trained; padding-free batches; rows of one length.
    Fix: set labels to -100 where attention_mask is 0.
    Sources: mlx-lm#1855, axolotl#3988, trl#6357.
    """
    subject.need("training", "tokenizer")
    alone = {tuple(row.input_ids): row for row in subject.labelled_rows(64)}
    evidence, num_padding = [], 0
    for batch in subject.training.batches(1, 4, ragged=True):
        for k, padding in enumerate(padding_of(batch, alone)):
            ids, labels = batch["input_ids"][k].tolist(), batch["labels"][k].tolist()
            num_padding += len(padding)
            wrong = [t for t in padding if labels[t] != -100]
            if wrong:
                shown = ids[max(wrong[0] - BESIDE, 0) : wrong[0] + BESIDE]
                row = alone.get(tuple(i for t, i in enumerate(ids) if t not in set(padding)))
                where = {"row": row.index} if row else {}
                note = f"{len(wrong)} of {len(padding)} padding positions are trained"
                text = decode(subject.tokenizer, shown)
                evidence.append({**where, "position": wrong[0], "ids": shown, "text": text, "note": note})
    if not num_padding:
        raise NotApplicable("batches hold no padding: rows of one length, packing, or a padding-free collator")
    measured = f"{len(evidence)} rows of a batch train padding ({num_padding} positions of padding)"
    return failed(measured, "0", evidence[:SHOWN]) if evidence else passed(measured, "0")


def padding_of(batch: dict[str, Any], alone: dict[tuple[int, ...], LabelledRow]) -> list[list[int]]:
    """Positions of padding in every row: attention 0, or what was not there when the row was collated alone."""
    found = []
    mask = batch.get("attention_mask")
    for k, row in enumerate(batch["input_ids"].tolist()):
        padding = set()
        if mask is not None and mask.ndim == 2:
            padding = {t for t, is_on in enumerate(mask[k].tolist()) if not is_on}
        if not padding and tuple(row) not in alone:
            lengths = [n for n in range(1, len(row)) if tuple(row[:n]) in alone and len(set(row[n:])) == 1]
            if lengths:
                padding = set(range(max(lengths), len(row)))
            starts = [n for n in range(1, len(row)) if tuple(row[n:]) in alone and len(set(row[:n])) == 1]
            if not padding and starts:
                padding = set(range(min(starts)))
        found.append(sorted(padding))
    return found


@check("rows-without-answer", family="rows", tier=1, catalogue="K9")
def rows_without_answer(subject: Subject) -> Outcome:
    """Rows hold no answer: an empty output, or a conversation that ends before the assistant speaks.

    Symptom: fewer rows are learned from than were paid for; empty answers teach the model to say nothing.
    Example: an export in which every assistant message was lost; a null output column.
    Detected: the raw rows' assistant messages and completions are read.
    Tolerance: warn above 0.5 % of rows, fail above 5 %.
    Spares: answers that are tool calls; plain text.
    Fix: drop the rows, or find out where their answers went.
    Sources: datasets with null outputs (unsloth#10813, Starjob#2).
    """
    audit = audit_of(subject)
    seen = {item.row.index: item.row.raw for item in audit.rows if item.row.raw} or dict(enumerate(subject.rows))
    talks = {i: raw for i, raw in seen.items() if conversation(raw) and conversation(raw)[0][0] != "text"}
    if not talks:
        raise NotApplicable("the rows' raw form is not known, or they are plain text")
    silent = [index for index, raw in talks.items() if not has_answer(raw)]
    measured, limit = f"{len(silent)} of {len(talks)} rows have no answer", "warn 0.5%, fail 5%"
    evidence = []
    for index in silent[:SHOWN]:
        role, content = conversation(talks[index])[-1]
        evidence.append({"row": index, "text": content[-200:], "note": f"the last message is the {role}'s"})
    if len(silent) > SOME * len(talks):
        return failed(measured, limit, evidence)
    return warned(measured, limit, evidence) if len(silent) > FEW * len(talks) else passed(measured, limit)
