"""The chat template and contents: each once, intact, no None, nothing unasked.

Owns the tier-0 checks K5. Leaves out prompts, turns and masks (`turns.py`, whose checks are of this family as well)
and what the trainer makes of the template (`rows.py`).
"""

import contextlib
import datetime
import re
from typing import Any

from . import turns  # noqa: F401  its checks are of this family as well
from .audit import content_text
from .conversations import (
    conversation,
    messages_of,
    need_template,
    options_of,
    own_conversation,
    render,
    said,
)
from .runner import Outcome, check, failed, first_line, passed, warned
from .spans import SENTINELS
from .subject import NotApplicable, NotRun, Subject
from .torture import encode, first_difference

NULL = re.compile(r"None(?![a-z])|\b(?:null|nan|NaN)\b")
THOUGHT = re.compile(r"<think>.*?</think>|^.*?</think>", re.S)
# what escaping, markup, jinja, trimming of lines, case and length would change; no white space at either end
SPICES = (
    "<b>&amp; \"q\" 'a' {{ x }} {% y %} \\n [z](w)",
    "one\n\n  two:\n\tthree  four\n\n\nFÜNF 你好 \U0001f44d",
    "long " * 1000 + "end",
)


@check("template-alters-content", family="template", tier=0, catalogue="K5")
def template_alters_content(subject: Subject) -> Outcome:
    """A message is lost, doubled or changed on its way through the template.

    Symptom: the model never sees a system prompt, or sees code with escaped quotes.
    Example: a loop that skips the first message; an HTML-escaping filter.
    Detected: sentinel words in every message must appear once, in order, also in longer conversations and in the orders
        of roles of the user's rows; contents with quotes, tags, braces, line breaks, and of 5,000 characters come back
        as they were, and so do the contents of the rows.
    Tolerance: white space at either end may be trimmed (official templates do): noted.
    Spares: templates that refuse a system prompt, or put it into the user's turn; <think> blocks of past turns; tool
        messages in a form of their own.
    Fix: write {{ message['content'] }} once per message, without filters.
    Sources: ms-swift#9279, functionary#132.
    """
    tokenizer = need_template(subject)
    messages, text = conversation(tokenizer)
    bad = _miscounted(messages, text)
    for probe in _longer(tokenizer, subject):
        bad += _miscounted(*probe) if not bad else []
    for spice in SPICES if not bad else ():
        bad += _changed(*conversation(tokenizer, f" {spice}"))
    rows, lost = (0, []) if bad else _rows_altered(subject)
    bad += lost
    limit = "each once, intact"
    if bad:
        return failed(f"{len(bad)} messages do not come through as they are", limit, bad[:6])
    padded, text = conversation(tokenizer, "\n  x \n")
    trims = sum(said(m) not in text for m in padded)
    note = f"; white space around {trims} of them is trimmed, serving must do the same" if trims else ""
    note += f"; so do those of {rows} rows" if rows else ""
    return passed(f"{len(messages)} messages come through once, intact{note}", limit)


def _miscounted(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    bad, places = [], []
    for index, message in enumerate(messages):
        count = text.count(said(message))
        places.append(text.find(said(message)))
        if count != 1:
            note = f"{message['role']} content appears {count} times (message {index} of {len(messages)})"
            bad.append({"position": index, "note": note, "text": said(message)})
    if not bad and places != sorted(places):
        bad.append({"note": f"{len(messages)} messages are written in another order"})
    return bad


def _changed(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    bad = []
    for index, message in enumerate(messages):
        wanted = said(message)
        at = text.find(SENTINELS[index])
        if at >= 0 and not text.startswith(wanted, at):
            off = first_difference(wanted, text[at : at + len(wanted)])
            cut = slice(max(0, off - 12), off + 12)
            shown = f"{wanted[cut]!r} -> {text[at : at + len(wanted)][cut]!r}"
            bad.append({"position": index, "note": f"{message['role']} content is changed", "text": shown})
    return bad


def _longer(tokenizer: Any, subject: Subject) -> list[tuple[list[dict[str, Any]], str]]:
    """Sentinel conversations of many turns, and in the orders of roles that the rows have."""
    roles = [tuple(str(m.get("role")) for m in own_conversation(row)) for row in subject.rows[:500]]
    orders = dict.fromkeys(
        r for r in roles if r and len(r) <= len(SENTINELS) and set(r) <= {"system", "user", "assistant"}
    )
    found = []
    with contextlib.suppress(NotRun):  # a template for few turns
        found.append(conversation(tokenizer, longer=4))
    for order in list(orders)[:20]:
        messages = messages_of(tokenizer, order)
        try:
            found.append((messages, render(tokenizer, messages)))
        except Exception:  # `no-token-trained` counts rows that cannot be rendered
            continue
    return found


def _rows_altered(subject: Subject) -> tuple[int, list[dict[str, Any]]]:
    """Rows that were rendered, and messages of theirs that are not in the text but for white space at the ends."""
    looked, bad = 0, []
    for index, row in enumerate(subject.rows[:200]):
        messages = own_conversation(row)
        try:
            text = render(subject.tokenizer, messages, **options_of(row)) if messages else ""
        except Exception:
            continue
        looked += bool(text)
        for k, message in enumerate(messages if text else []):
            content = content_text(message.get("content")).strip()
            content = THOUGHT.sub("", content).strip() if message.get("role") == "assistant" else content
            is_told = message.get("role") not in ("tool", "function", "ipython")
            if content and is_told and content not in text:
                note = f"{message.get('role')} content of message {k} is not in the text as it is"
                ids = encode(subject.tokenizer, content[:80])[:12]
                bad.append({"row": index, "position": k, "ids": ids, "text": content[:80], "note": note})
    return looked, bad


@check("template-writes-none", family="template", tier=0, catalogue="K5")
def template_writes_none(subject: Subject) -> Outcome:
    """A field that is empty becomes the word None.

    Symptom: a fifth of the rows trains on the word None.
    Example: {{ message['name'] }} or a null `input` column; tables fill missing keys with null.
    Detected: a plain conversation, one with the optional keys set to null (as Arrow tables do), and the user's rows
        that hold nulls are rendered: no None, null or nan that the template does not say by itself.
    Tolerance: none for missing keys and the user's rows; a null key that the rows do not hold: a warning.
    Spares: the word None in a content, or in the template's own text.
    Fix: test for it in the template: {% if message.name %}; drop null fields before rendering.
    Sources: unsloth#10813, Starjob#2, trl's datasets with tool calls.
    """
    tokenizer = need_template(subject)
    messages, plain = conversation(tokenizer)
    known = _literal_words(tokenizer)
    bad: list[dict[str, Any]] = []
    possible: list[dict[str, Any]] = []
    texts: dict[str, str] = {}
    for key in ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "tools", "images"):
        try:
            texts[f"{key}=null"] = render(tokenizer, [{**m, key: None} for m in messages])
        except Exception:
            continue
    for what, text in {"a missing key": plain, **texts}.items():
        found = next((m for m in NULL.finditer(text) if m[0] not in known), None)
        if found:
            item = {"note": f"{what} is written as {found[0]}", "text": _around(text, found)}
            (bad if text == plain else possible).append(item)
    looked = 0
    for index, row in enumerate(subject.rows[:500]):
        given = own_conversation(row)
        if not any(None in m.values() for m in given):
            continue
        looked += 1
        try:
            text, clean = render(tokenizer, given), render(tokenizer, [_without_nulls(m) for m in given])
        except Exception:
            continue
        found = NULL.search(text)
        if found and len(NULL.findall(text)) > len(NULL.findall(clean)):
            bad.append({"row": index, "note": f"null is written as {found[0]}", "text": _around(text, found)})
    number = len(bad) + len(possible)
    measured = f"{len(texts) + 1} forms of missing keys and {looked} rows with nulls rendered, {number} write the word"
    if bad:
        return failed(measured, "0", bad[:5])
    return warned(measured, "0", possible) if possible else passed(measured, "0")


def _literal_words(tokenizer: Any) -> set[str]:
    """None, null and nan as far as the template's own text holds them."""
    import jinja2  # transformers needs it for templates, and only for them

    try:
        tokens = list(jinja2.Environment().lex(str(tokenizer.chat_template)))
    except jinja2.TemplateSyntaxError:
        return set()
    return {word for _, kind, value in tokens if kind in ("data", "string") for word in NULL.findall(value)}


def _around(text: str, found: re.Match) -> str:
    return text[max(0, found.start() - 30) : found.end() + 8]


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in message.items() if v is not None} | ({} if message.get("content") else {"content": ""})


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


@check("template-adds-text", family="template", tier=0, catalogue="K5")
def template_adds_text(subject: Subject) -> Outcome:
    """The template writes something that nobody said, and that changes by the day.

    Symptom: training and serving see different prompts, and a cached data set differs from a fresh one.
    Example: strftime_now in the system prompt.
    Detected: conversations with and without system prompt are rendered at two dates; words outside contents are
        counted.
    Tolerance: the same text at both dates.
    Spares: a fixed default system prompt: noted, it must be the same in serving.
    Fix: pass the date as a variable, or freeze it in the template.
    Sources: trl#3328, Llama-3.1's template.
    """
    tokenizer = need_template(subject)
    texts, reason = [], ""
    for roles in (("user", "assistant"), ("system", "user", "assistant")):
        messages = messages_of(tokenizer, roles)
        try:
            texts.append((render(tokenizer, messages), _rendered_at(tokenizer, messages)))
        except Exception as error:
            reason = reason or first_line(error)
    if not texts:
        raise NotRun(f"a conversation of user and assistant cannot be rendered ({reason})")
    for now, then in texts:
        if now != then:
            at = first_difference(now, then)
            shown = [{"position": at, "text": now[max(0, at - 30) : at + 30]}]
            return warned("the rendered text depends on the date", "the same text", shown)
    head = texts[0][0][: max(texts[0][0].find(SENTINELS[0]), 0)]
    words = re.findall(r"(?<![\w|<])[A-Za-z']+(?![\w|>])", head)
    note = f"; {len(words)} words before the first message, serving must write them too" if len(words) > 4 else ""
    return passed(f"the same text at two dates{note}", "the same text")


def _rendered_at(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The text as it was rendered in 2001: transformers' `strftime_now` reads this module's clock."""
    from transformers.utils import chat_template_utils as module

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2001, 2, 3)

    before = module.datetime
    module.datetime = Frozen  # type: ignore[misc,assignment]
    try:
        return render(tokenizer, messages)
    finally:
        module.datetime = before  # type: ignore[misc]
