"""The chat template: contents intact, nothing unasked, one prompt for training and generation, masks on answers only.

Owns the tier-0 checks of `tokenizer.chat_template`. Leaves out what the trainer makes of it (`rows.py`).
"""

import datetime
import re
from typing import Any

from .audit import closing_ids
from .runner import Outcome, check, failed, passed, warned
from .spans import SENTINELS, template_marks
from .subject import NotApplicable, NotRun, Subject
from .tokenizer import first_difference

ROLES = (
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("user", "assistant"),
)
NULL = re.compile(r"None(?![a-z])|\b(?:null|nan|NaN)\b")
SPICE = "<b>&amp; \"q\" 'a' {{ x }} {% y %}"  # what escaping, markup and jinja would change


def need_template(subject: Subject) -> Any:
    subject.need("tokenizer")
    if not getattr(subject.tokenizer, "chat_template", None):
        if subject.is_chat:
            raise NotRun("chat is asked for, and the tokenizer has no chat template")
        raise NotApplicable("the tokenizer has no chat template")
    return subject.tokenizer


def render(tokenizer: Any, messages: list[dict[str, Any]], generation: bool = False, **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **options)


def messages_of(tokenizer: Any, roles: tuple[str, ...], extra: str = "") -> list[dict[str, Any]]:
    """A sentinel word per message; as a list of parts where the template takes no plain text (vision models)."""
    words = [f"{mark}{extra}" for mark in SENTINELS[: len(roles)]]
    plain = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    try:
        if SENTINELS[0] in render(tokenizer, [{"role": "user", "content": SENTINELS[0]}]):
            return plain
        parts = [dict(m, content=[{"type": "text", "text": m["content"]}]) for m in plain]
        return parts if SENTINELS[0] in render(tokenizer, parts) else plain
    except Exception:  # the template refuses this conversation: the caller will say so
        return plain


def said(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"]


def conversation(tokenizer: Any, extra: str = "") -> tuple[list[dict[str, Any]], str]:
    """The richest conversation that the template takes, and its text. Raises NotRun for a template that takes none."""
    reason = ""
    for roles in ROLES:
        messages = messages_of(tokenizer, roles, extra)
        try:
            return messages, render(tokenizer, messages)
        except Exception as error:  # templates refuse roles in words of their own
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    raise NotRun(f"the template renders no conversation ({reason})")


@check("template-alters-content", family="template", tier=0, catalogue="K5")
def template_alters_content(subject: Subject) -> Outcome:
    """A message is lost, doubled or changed on its way through the template.

    Symptom: the model never sees a system prompt, or sees code with escaped quotes.
    Example: a loop that skips the first message; an HTML-escaping filter.
    Detected: sentinel words in every message must appear once; contents with quotes, tags and braces come back as they
        were.
    Tolerance: white space at either end may be trimmed (official templates do): noted.
    Spares: templates that refuse a system prompt, or put it into the user's turn.
    Fix: write {{ message['content'] }} once per message, without filters.
    Sources: ms-swift#9279, functionary#132.
    """
    tokenizer = need_template(subject)
    messages, text = conversation(tokenizer)
    bad = []
    for index, message in enumerate(messages):
        count = text.count(said(message))
        if count != 1:
            bad.append(
                {"row": index, "note": f"{message['role']} content appears {count} times", "text": said(message)}
            )
    spiced, changed = conversation(tokenizer, f" {SPICE}")
    for index, message in enumerate(spiced):
        if changed.count(said(message)) != 1 and not bad:
            at = changed.find(SENTINELS[index])
            shown = changed[at : at + len(said(message)) + 24] if at >= 0 else ""
            bad.append({"row": index, "note": f"{message['role']} content is changed", "text": shown})
    if bad:
        return failed(
            f"{len(bad)} of {len(messages)} messages do not come through as they are", "each once, intact", bad
        )
    padded, text = conversation(tokenizer, "\n  x \n")
    trims = sum(said(m) not in text for m in padded)
    note = f"; white space around {trims} of them is trimmed, serving must do the same" if trims else ""
    return passed(f"{len(messages)} messages come through once, intact{note}", "each once, intact")


@check("template-writes-none", family="template", tier=0, catalogue="K5")
def template_writes_none(subject: Subject) -> Outcome:
    """A field that is empty becomes the word None.

    Symptom: a fifth of the rows trains on the word None.
    Example: {{ message['name'] }} or a null `input` column; tables fill missing keys with null.
    Detected: messages with the optional keys set to null (as Arrow tables do), and the user's rows that hold nulls, are
        rendered: no None, null or nan that the same row without its nulls does not have.
    Tolerance: none.
    Spares: the word None in a content.
    Fix: test for it in the template: {% if message.name %}; drop null fields before rendering.
    Sources: unsloth#10813, Starjob#2, trl's datasets with tool calls.
    """
    tokenizer = need_template(subject)
    messages, plain = conversation(tokenizer)
    bad: list[dict[str, Any]] = []
    texts = {"a missing key": plain}
    for key in ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "tools", "images"):
        try:
            texts[f"{key}=null"] = render(tokenizer, [{**m, key: None} for m in messages])
        except Exception:
            continue
    for what, text in texts.items():
        if found := NULL.search(text):
            bad.append({"note": f"{what} is written as {found[0]}", "text": _around(text, found)})
    looked = 0
    for index, row in enumerate(subject.rows[:500]):
        given = row.get("messages")
        if not isinstance(given, list) or not any(None in m.values() for m in given if isinstance(m, dict)):
            continue
        looked += 1
        try:
            text, clean = render(tokenizer, given), render(tokenizer, [_without_nulls(m) for m in given])
        except Exception:
            continue
        found = NULL.search(text)
        if found and len(NULL.findall(text)) > len(NULL.findall(clean)):
            bad.append({"row": index, "note": f"null is written as {found[0]}", "text": _around(text, found)})
    measured = f"{len(texts)} forms of missing keys and {looked} rows with nulls rendered, {len(bad)} write the word"
    return failed(measured, "0", bad[:5]) if bad else passed(measured, "0")


def _around(text: str, found: re.Match) -> str:
    return text[max(0, found.start() - 30) : found.end() + 8]


@check("null-becomes-word", family="template", tier=1, catalogue="K5")
def null_becomes_word(subject: Subject) -> Outcome:
    """Empty fields of the data have become the word None in what is trained on.

    Symptom: the model says None, or answers to a request that is not there.
    Example: f"### Input:\\n{row['input']}" where a table holds null.
    Detected: rows with a null or NaN field whose text holds the word None, null or nan although no other field does.
    Tolerance: none.
    Spares: rows without nulls; texts that speak of None in a field of their own.
    Fix: leave the part out where the field is empty: `if row["input"]:`.
    Sources: unsloth#10813, Starjob#2.
    """
    subject.need("rows")
    empty = [(i, row) for i, row in enumerate(subject.rows) if any(map(_is_null, row.values()))]
    if not empty:
        raise NotApplicable("no row has an empty field")
    trained = {}
    if subject.tokenizer is not None and subject.training is not None:
        for item in subject.labelled_rows(200):
            trained[item.index] = subject.tokenizer.decode(item.input_ids)
    bad, looked = [], 0
    for index, row in empty[:2000]:
        # the text column is what was made of the others; a trainer's row is what it made of all
        parts = [v for key, value in row.items() if key != "text" for v in _strings(value)]
        text = trained.get(index) or str(row.get("text") or "")
        if not any(part.strip() and part in text for part in parts):
            continue
        looked += bool(text)
        found = NULL.search(text)
        if found and not any(map(NULL.search, parts)):
            bad.append({"row": index, "note": f"an empty field is written as {found[0]}", "text": _around(text, found)})
    measured = f"{len(bad)} of {looked} rows with empty fields hold the word"
    return failed(measured, "0", bad[:5]) if bad else passed(measured, "0")


def _strings(value: Any) -> list[str]:
    """Every text in a row's field, those of messages included."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _strings(part)]


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in message.items() if v is not None} | ({} if message.get("content") else {"content": ""})


@check("template-adds-text", family="template", tier=0, catalogue="K5")
def template_adds_text(subject: Subject) -> Outcome:
    """The template writes something that nobody said, and that changes by the day.

    Symptom: training and serving see different prompts, and a cached data set differs from a fresh one.
    Example: strftime_now in the system prompt.
    Detected: a conversation without system prompt is rendered at two dates; words outside contents are counted.
    Tolerance: the same text at both dates.
    Spares: a fixed default system prompt: noted, it must be the same in serving.
    Fix: pass the date as a variable, or freeze it in the template.
    Sources: trl#3328, Llama-3.1's template.
    """
    tokenizer = need_template(subject)
    try:
        messages = messages_of(tokenizer, ("user", "assistant"))
        now = render(tokenizer, messages)
        then = _rendered_at(tokenizer, messages, datetime.datetime(2001, 2, 3))
    except Exception as error:
        raise NotRun(f"a conversation of user and assistant cannot be rendered ({type(error).__name__})") from None
    if now != then:
        at = next((i for i, (a, b) in enumerate(zip(now, then, strict=False)) if a != b), 0)
        start = max(0, at - 30)
        return warned(
            "the rendered text depends on the date", "the same text", [{"position": at, "text": now[start : at + 30]}]
        )
    head = now[: now.find(SENTINELS[0])]
    words = [w for w in head.replace("|", " ").replace(">", " ").replace("<", " ").split() if w.isalpha()]
    note = f"; {len(words)} words before the first message, serving must write them too" if len(words) > 4 else ""
    return passed(f"the same text at two dates{note}", "the same text")


def _rendered_at(tokenizer: Any, messages: list[dict[str, Any]], moment: datetime.datetime) -> str:
    """The text as it would be rendered then: transformers' `strftime_now` reads this module's clock."""
    from transformers.utils import chat_template_utils as module

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return moment

    before = module.datetime
    module.datetime = Frozen
    try:
        return render(tokenizer, messages)
    finally:
        module.datetime = before


@check("generation-prompt-mismatch", family="template", tier=0, catalogue="K6")
def generation_prompt_mismatch(subject: Subject) -> Outcome:
    """Generation starts from another prompt than the one that was trained on.

    Symptom: the first words of every answer are odd; the model writes its own header.
    Example: `assistant\\n` missing after <|im_start|> in one of the two; a think block that is emitted twice.
    Detected: the conversation with add_generation_prompt must be the beginning of the conversation with its answer,
        and the answer must follow at once.
    Tolerance: white space between prompt and answer; a think block or channel marker is a warning.
    Spares: thinking templates that prefill at inference only (a warning).
    Fix: end the generation prompt exactly where the assistant's content begins in training.
    Sources: trl#6361, NeMo-Automodel#3739, MiniCPM-V#141.
    """
    tokenizer = need_template(subject)
    messages = messages_of(tokenizer, ("user", "assistant"))
    try:
        prompt, full = render(tokenizer, messages[:1], True), render(tokenizer, messages)
        bare = render(tokenizer, messages[:1])
    except Exception as error:
        raise NotRun(f"a conversation of user and assistant cannot be rendered ({type(error).__name__})") from None
    limit = "a prefix that ends where the answer begins"
    if not full.startswith(prompt):
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full))
        )
        evidence = [{"position": at, "text": f"{prompt[max(0, at - 20):at + 30]} | {full[max(0, at - 20):at + 30]}",
                     "note": "generation | training"}]  # fmt: skip
        if "think" in prompt[at:].lower() or "think" in full[at : at + 40].lower():
            return warned("the generation prompt has another think block than training", limit, evidence)
        return failed(f"the prompts part at character {at}", limit, evidence)
    rest = full[len(prompt) : full.find(SENTINELS[1])]
    if not rest.strip():
        return passed("the answer follows the generation prompt at once", limit)
    evidence = [{"position": len(prompt), "text": rest, "note": "the model must write this before its answer"}]
    text = f"{len(rest)} characters of markup stand between generation prompt and answer"
    is_ignored = prompt == bare
    is_channel = not is_ignored and any(mark in rest for mark in ("<|", "think", "<")) and "assistant" not in rest
    return warned(text, limit, evidence) if is_channel else failed(text, limit, evidence)


@check("earlier-turns-rewritten", family="template", tier=0, catalogue="K6")
def earlier_turns_rewritten(subject: Subject) -> Outcome:
    """Earlier turns look different once the conversation goes on.

    Symptom: reinforcement over several turns trains on tokens that were never sampled.
    Example: a template that strips <think> of past turns.
    Detected: the text of the first two messages must be the beginning of the text of four.
    Tolerance: up to the end of the second message's content.
    Spares: thinking templates, by design: a warning. A fail only where several turns are trained in one row.
    Fix: train on the last turn only, or use a template that preserves prefixes.
    Sources: ms-swift#4939, torchtitan#4504.
    """
    tokenizer = need_template(subject)
    messages = messages_of(tokenizer, ("user", "assistant", "user", "assistant"))
    try:
        short, long = render(tokenizer, messages[:2]), render(tokenizer, messages)
    except Exception as error:
        raise NotRun(f"a conversation of several turns cannot be rendered ({type(error).__name__})") from None
    end = short.find(SENTINELS[1]) + len(SENTINELS[1])
    if end < len(SENTINELS[1]) or long.startswith(short[:end]):
        return passed("earlier turns stay as they are", "the same beginning")
    at = first_difference(short, long)
    evidence = [{"position": at, "text": f"{short[max(0, at - 20):at + 30]} | {long[max(0, at - 20):at + 30]}",
                 "note": "alone | with a turn behind"}]  # fmt: skip
    text = f"the first turn is written differently from character {at} on when another follows"
    several = any(
        sum(m.get("role") == "assistant" for m in row.get("messages") or []) > 1 for row in subject.rows[:200]
    )
    is_whole = bool(subject.settings.get("assistant_only_loss")) and several
    return failed(text, "the same beginning", evidence) if is_whole else warned(text, "the same beginning", evidence)


@check("assistant-mask-wrong", family="template", tier=0, catalogue="K9")
def assistant_mask_wrong(subject: Subject) -> Outcome:
    """The template's generation marks do not enclose exactly the answers.

    Symptom: nothing is trained, or the user's words are; the model never learns to stop.
    Example: {% generation %} missing, around the whole message, or closed before the end of turn.
    Detected: the mask that the tokenizer returns for sentinel messages, decoded: every answer with its end of turn, and
        no other content.
    Tolerance: none.
    Spares: templates without marks where no assistant mask is asked for; trainers that bring their own template.
    Fix: write {% generation %}{{ message['content'] }}<end of turn>{% endgeneration %}.
    Sources: transformers#34172, #47325, trl#4201, marin#7237.
    """
    tokenizer = need_template(subject)
    source = str(tokenizer.chat_template)
    has_marks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
    is_asked = bool(subject.settings.get("assistant_only_loss"))
    if not has_marks:
        if not is_asked or _trl_knows(tokenizer):
            raise NotApplicable("the template has no generation marks, and no assistant mask is asked for")
        note = "no {% generation %} in the template, and assistant_only_loss asks for its mask"
        row = [{"row": 0, "text": _first_text(subject)}] if subject.rows else []
        return failed("the assistant mask is empty", "every answer", [{"note": note}, *row])
    messages, _ = conversation(tokenizer)
    try:
        out = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
    except Exception as error:
        raise NotRun(f"the tokenizer returns no assistant mask ({type(error).__name__})") from None
    ids, mask = _flat(out["input_ids"]), _flat(out["assistant_masks"])
    inside = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
    bad = []
    squeezed = inside.replace(" ", "")
    for message in messages:
        is_in, is_answer = said(message).replace(" ", "") in squeezed, message["role"] == "assistant"
        if is_in != is_answer:
            bad.append(
                {"note": f"{message['role']} content is {'masked' if is_answer else 'trained'}", "text": inside[:80]}
            )
    if not bad:
        closing = closing_ids(tokenizer, template_marks(tokenizer))
        ends = [k for k in range(len(mask)) if mask[k] and (k + 1 == len(mask) or not mask[k + 1])]
        tails = [{ids[j] for j in range(max(0, k - 2), k + 1)} for k in ends]
        if closing and not any(tail & closing for tail in tails):
            bad.append({"ids": sorted(closing), "note": "the end of turn is outside the mask, so it is never trained"})
    if bad:
        return failed(f"{len(bad)} parts are on the wrong side of the mask", "answers with their end of turn", bad)
    return passed(f"{sum(mask)} of {len(mask)} tokens are masked in, answers with their end of turn", "answers only")


def _flat(value: Any) -> list[int]:
    value = value.tolist() if hasattr(value, "tolist") else list(value)
    return value[0] if value and isinstance(value[0], list) else value


def _trl_knows(tokenizer: Any) -> bool:
    """TRL replaces stock templates by its own ones with marks."""
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer) is not None
    except Exception:
        return False


def _first_text(subject: Subject) -> str:
    try:
        return render(subject.tokenizer, subject.rows[0]["messages"])[:160]
    except Exception:
        return ""
