"""Turns of the chat template: one prompt for training and generation, one end, masks on the answers only.

Owns the tier-0 checks K6 and the static part of C1, C2 and C8, of the family `template`. Leaves out contents
(`template.py`) and what the trainer makes of them (`rows.py`).
"""

import re
from typing import Any

from .audit import MARKS, audit_of, training_template
from .conversations import ROLES, conversation, messages_of, need_template, render, said, turn_ends
from .runner import Outcome, check, failed, first_line, passed, warned
from .spans import SENTINELS, token_spans
from .subject import NotApplicable, NotRun, Subject
from .torture import encode, first_difference

THINKS = re.compile(r"think|reason|thought|channel", re.I)
WORDS = ("The", "the", "I", "Yes", "a", "1")  # with which answers begin
ANSWERED = (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant"))


def _beside(a: str, b: str, at: int) -> str:
    cut = slice(max(0, at - 20), at + 30)
    return f"{a[cut]!r} | {b[cut]!r}"


@check("generation-prompt-mismatch", family="template", tier=0, catalogue="K6")
def generation_prompt_mismatch(subject: Subject) -> Outcome:
    """Generation starts from another prompt than the one that was trained on.

    Symptom: the first words of every answer are odd; the model writes its own header.
    Example: `assistant\\n` missing after <|im_start|> in one of the two; a think block that is emitted twice.
    Detected: conversations (one turn, with a system prompt, two turns) with add_generation_prompt must be the beginning
        of the same with the answer, which must follow at once; and so must their ids.
    Tolerance: blanks between prompt and answer. A warning: a line break, a think block or a channel between them, and a
        last token of the prompt that merges with the answer.
    Spares: thinking templates that prefill at inference only (a warning).
    Fix: end the generation prompt exactly where the assistant's content begins in training, at no blank.
    Sources: trl#6361, NeMo-Automodel#3739, MiniCPM-V#141.
    """
    tokenizer = need_template(subject)
    limit, found, reason = "a prefix that ends where the answer begins", [], ""
    for roles in ANSWERED:
        messages = messages_of(tokenizer, roles)
        try:
            texts = [
                render(tokenizer, messages[:-1], True),
                render(tokenizer, messages[:-1]),
                render(tokenizer, messages),
            ]
        except Exception as error:
            reason = reason or first_line(error)
            continue
        if SENTINELS[len(roles) - 1] in texts[2]:
            found.append(_joined(tokenizer, texts[0], texts[1], texts[2], SENTINELS[len(roles) - 1]))
    if not found:
        raise NotRun(f"a conversation of user and assistant cannot be rendered ({reason or 'its answer is lost'})")
    worst = max(found, key=lambda item: ("pass", "warn", "fail").index(item[0]))
    verdict = {"pass": lambda text, limit, _: passed(text, limit), "warn": warned, "fail": failed}[worst[0]]
    return verdict(worst[1], limit, worst[2])


def _joined(tokenizer: Any, prompt: str, bare: str, full: str, answer: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Status, measured and evidence of one conversation. `bare`: the prompt without add_generation_prompt."""
    head = full[: full.find(answer)]  # what training has before the answer
    at = first_difference(prompt, head)
    evidence: list[dict[str, Any]] = [
        {"position": at, "text": _beside(prompt, full, at), "note": "generation | training"}
    ]
    missing, extra = head[at:], prompt[at:]
    if not extra and not missing.strip():
        if "\n" in missing:
            return "warn", "a line break stands between generation prompt and answer", evidence
        a = encode(tokenizer, prompt)
        for word in WORDS:
            b = encode(tokenizer, full.replace(answer, word))
            if b[: len(a)] != a:
                k = first_difference(a, b)
                evidence = [{"position": k, "ids": a[k:], "note": f"in training {b[k : k + 4]}, before {word!r}"}]
                return "warn", "the last token of the generation prompt merges with the answer", evidence
        return "pass", "the answer follows the generation prompt at once", []
    if not extra:
        text = f"{len(missing)} characters of markup stand between generation prompt and answer"
        evidence = [{"position": at, "text": missing, "note": "the model must write this before its answer"}]
        is_channel = prompt != bare and "<" in missing and "assistant" not in missing
        return "warn" if is_channel else "fail", text, evidence
    if THINKS.search(extra) or THINKS.search(missing):
        return "warn", "the generation prompt has another think block than training", evidence
    if not missing and not extra.strip(" "):
        return "warn", "the generation prompt ends in a blank that training has not", evidence
    return "fail", f"the prompts part at character {at}", evidence


@check("earlier-turns-rewritten", family="template", tier=0, catalogue="K6")
def earlier_turns_rewritten(subject: Subject) -> Outcome:
    """Earlier turns look different once the conversation goes on.

    Symptom: reinforcement over several turns trains on tokens that were never sampled.
    Example: a template that strips <think> of past turns.
    Detected: the text of the first two messages must be the beginning of the text of four; with plain answers, and with
        answers that think first.
    Tolerance: up to the end of the second message's content.
    Spares: thinking templates, by design: a warning. A fail only where training masks everything but answers and trains
        several of them in one row.
    Fix: train on the last turn only, or use a template that preserves prefixes.
    Sources: ms-swift#4939, torchtitan#4504.
    """
    tokenizer = need_template(subject)
    template = training_template(subject.tokenizer, subject.settings)
    options: dict[str, Any] = {"chat_template": template} if template else {}
    limit, looked, reason = "the same beginning", 0, ""
    for think in ("", "<think>\nso\n</think>\n\n"):
        messages = messages_of(tokenizer, ("user", "assistant", "user", "assistant"))
        if think and isinstance(messages[1]["content"], str):
            messages = [m | {"content": think + m["content"]} if m["role"] == "assistant" else m for m in messages]
        try:
            short = render(tokenizer, messages[:2], **options)
            long = render(tokenizer, messages, **options)
        except Exception as error:
            reason = reason or first_line(error)
            continue
        end = short.find(SENTINELS[1]) + len(SENTINELS[1])
        if end < len(SENTINELS[1]):
            continue
        looked += 1
        if long.startswith(short[:end]):
            continue
        at = first_difference(short, long)
        evidence: list[dict[str, Any]] = [
            {"position": at, "text": _beside(short, long, at), "note": "alone | with a turn behind"}
        ]
        text = f"the first turn is written differently from character {at} on when another follows"
        several = _rows_of_several(subject)
        if several and not think:
            evidence.append({"row": several[0], "note": f"{len(several)} rows train several answers"})
            return failed(text, limit, evidence)
        return warned(text, limit, evidence)
    if not looked:
        raise NotRun(f"a conversation of several turns cannot be rendered ({reason or 'its answer is lost'})")
    return passed("earlier turns stay as they are", limit)


def _rows_of_several(subject: Subject) -> list[int]:
    """Rows that train more than one answer, where answers only are trained."""
    try:
        audit = audit_of(subject)
    except (NotApplicable, NotRun):
        return []
    if not audit.masks_context:
        return []
    trained = [sum(any(item.is_trained[t] for t in part.tokens) for part in item.answers) for item in audit.rows]
    return [item.row.index for item, number in zip(audit.rows, trained, strict=True) if number > 1]


@check("doubled-end-of-turn", family="template", tier=0, catalogue="K3")
def doubled_end_of_turn(subject: Subject) -> Outcome:
    """The template ends an answer twice.

    Symptom: a token is trained behind the one that stops generation; packed rows look like empty turns.
    Example: {{ message['content'] }}<|im_end|>{{ eos_token }} where EOS is <|im_end|>.
    Detected: control tokens behind every answer of a sentinel conversation: the same one may not come twice.
    Tolerance: none.
    Spares: two different tokens (<|im_end|><|endoftext|>). What a trainer appends is `double-eos`.
    Fix: write one of the two.
    Sources: trl#4481, trl#4908.
    """
    tokenizer = need_template(subject)
    messages, text = conversation(tokenizer)
    closers = tokenizer.convert_ids_to_tokens(sorted(turn_ends(tokenizer)))
    bad, looked = [], 0
    for index, message in enumerate(messages):
        start = text.find(said(message)) + len(said(message))
        following = said(messages[index + 1]) if index + 1 < len(messages) else None
        tail = text[start : text.find(following, start) if following else len(text)]
        if message["role"] != "assistant" or not any(c in tail for c in closers):
            continue
        looked += 1
        twice = [c for c in closers if tail.count(c) > 1]
        if twice:
            bad.append({"position": index, "text": tail, "note": f"{twice[0]} {tail.count(twice[0])} times"})
    if not looked:
        raise NotApplicable("the template ends answers by no control token")
    if bad:
        return failed(f"{len(bad)} of {looked} answers end twice", "once", bad)
    return passed(f"{looked} answers end once", "once")


@check("assistant-mask-wrong", family="template", tier=0, catalogue="K9")
def assistant_mask_wrong(subject: Subject) -> Outcome:
    """The template's generation marks do not enclose exactly the answers.

    Symptom: nothing is trained, or the user's words are; the model never learns to stop.
    Example: {% generation %} missing, around the whole message, or closed before the end of turn.
    Detected: the mask that the tokenizer returns for sentinel messages (several turns, and one): every token of an
        answer and its end of turn, and none of another content.
    Tolerance: none. A generation prompt that is masked in: a warning, the model need not write it.
    Spares: templates without marks where no assistant mask is asked for; stock templates that TRL replaces by its own.
    Fix: write {% generation %}{{ message['content'] }}<end of turn>{% endgeneration %}.
    Sources: transformers#34172, #47325, trl#4201, marin#7237.
    """
    tokenizer = need_template(subject)
    template = training_template(subject.tokenizer, subject.settings)
    limit = "answers with their end of turn"
    if not template and not MARKS.search(str(tokenizer.chat_template)):
        if not subject.settings.get("assistant_only_loss"):
            raise NotApplicable("the template has no generation marks, and no assistant mask is asked for")
        note = "no {% generation %} in the template, and assistant_only_loss asks for its mask"
        row = [{"row": 0, "text": _first_text(subject)}] if subject.rows else []
        return failed("the assistant mask is empty", limit, [{"note": note}, *row])
    looked, reason = 0, ""
    headers: list[dict[str, Any]] = []
    for roles in ROLES:
        messages = messages_of(tokenizer, roles)
        try:
            out = tokenizer.apply_chat_template(
                messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True, chat_template=template
            )
        except Exception as error:
            reason = reason or first_line(error)
            continue
        ids, mask = _flat(out["input_ids"]), _flat(out["assistant_masks"])
        bad, header, count = _masked_wrongly(tokenizer, messages, ids, mask, _generation_prompt(tokenizer))
        looked += count
        headers += header
        if bad:
            text = f"{len(bad)} parts of a conversation are on the wrong side of the mask"
            return failed(text, limit, bad)
    if not looked:
        raise NotRun(f"no assistant mask to look at ({reason or 'contents are not found among the tokens'})")
    if headers:
        return warned(f"the generation prompt before {len(headers)} answers is masked in", limit, headers[:3])
    return passed(f"the mask holds {looked} answers with their end of turn", limit)


def _masked_wrongly(
    tokenizer: Any, messages: list[dict[str, Any]], ids: list[int], mask: list[int], prompt: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Evidence of what is on the wrong side, of prompts that are masked in, and the number of answers looked at."""
    text, spans = token_spans(tokenizer, ids)
    folded = text.casefold()
    closing = turn_ends(tokenizer)
    bad: list[dict[str, Any]] = []
    headers: list[dict[str, Any]] = []
    count, before = 0, 0
    for k, message in enumerate(messages):
        start = folded.find(said(message).casefold())
        if start < 0:
            continue
        end = start + len(said(message))
        inside = [t for t, (a, b) in enumerate(spans) if start <= a < b <= end]
        on = [t for t in inside if mask[t]]
        role, is_answer = message["role"], message["role"] == "assistant"
        shown = {"position": k, "text": text[max(0, start - 12) : end + 12]}
        if is_answer and len(on) < len(inside):
            bad.append(shown | {"note": f"{len(inside) - len(on)} of {len(inside)} tokens of an answer are masked out"})
        if not is_answer and on:
            bad.append(shown | {"note": f"{role} content is trained"})
        if is_answer and inside:
            count += 1
            nearest = next((said(m).casefold() for m in messages[k + 1 :]), None)
            stop = folded.find(nearest, end) if nearest else len(text)
            ends = [t for t, (a, _) in enumerate(spans) if end <= a < stop and ids[t] in closing]
            if ends and not mask[ends[0]] and len(on) == len(inside):
                note = "the end of turn is outside the mask, so it is never trained"
                bad.append(shown | {"ids": [ids[ends[0]]], "note": note})
            marked = [t for t, (a, b) in enumerate(spans) if before <= a < b <= start and mask[t]]
            opening = text[spans[marked[0]][0] : start] if marked else ""
            if prompt.strip() and prompt.strip() in opening:
                headers.append({"position": k, "text": opening, "note": "masked in before an answer"})
            before = stop if nearest else end
        else:
            before = end
    return bad, headers, count


def _generation_prompt(tokenizer: Any) -> str:
    """What add_generation_prompt adds."""
    messages = messages_of(tokenizer, ("user",))
    try:
        return render(tokenizer, messages, True).removeprefix(render(tokenizer, messages))
    except Exception:
        return ""


def _flat(value: Any) -> list[int]:
    value = value.tolist() if hasattr(value, "tolist") else list(value)
    return value[0] if value and isinstance(value[0], list) else value


def _first_text(subject: Subject) -> str:
    try:
        return render(subject.tokenizer, subject.rows[0]["messages"])[:160]
    except Exception:
        return ""
