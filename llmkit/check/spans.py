"""Which tokens of a row are whose: the text of every token, and where the contents of a conversation lie in it.

Owns the offset oracle of the label audit. It works on what the row's ids decode to, so it does not matter who rendered
and tokenised them: TRL, a template, or the user's own format string.

    text, spans = token_spans(tokenizer, ids)
    parts = locate(text, spans, [("user", "Hi"), ("assistant", "Hello")], anchors)

Leaves out labels (`audit.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ANSWERS = ("assistant", "completion")  # what instruction tuning teaches; every other role is context
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to
SENTINELS = [f"Qzk{letter}jx" for letter in "abcdefghijklmnopqrstuvwxyz"]  # no template changes or contains these
ANCHOR = 24  # characters of markup before a content that fix its place
LONG = 16  # characters of a content that is not found in the markup by chance
BEGINNING = 8  # ... of one that breaks off


@dataclass
class Part:
    """One content in a row. `tokens` lie wholly inside; a token that also holds a neighbour's characters is a join."""

    role: str
    start: int  # in characters of the row's text
    end: int
    number: int = 0  # of the content in its conversation
    is_cut: bool = False  # the row ends before the content does
    tokens: list[int] = field(default_factory=list)  # positions, those of white space at either end left out
    joins: list[int] = field(default_factory=list)
    after: int = 0  # position of the first token behind the content

    @property
    def is_answer(self) -> bool:
        return self.role in ANSWERS


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_spans(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row and the characters (first, behind the last) of every token in it."""
    text = decode(tokenizer, ids)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if again["input_ids"] == ids:
            return text, [(int(a), int(b)) for a, b in again["offset_mapping"]]
    return _spans_by_decoding(tokenizer, ids)


def _spans_by_decoding(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """Two decodings of a few ids per token: for ids that are not what their own text encodes to."""
    text, spans = "", []
    context, read = 0, 0  # ids[context:read] have been read, and give the next piece its surroundings
    for k in range(len(ids)):
        before = decode(tokenizer, ids[context:read])
        piece = decode(tokenizer, ids[context : k + 1])[len(before) :]
        if (piece and not piece.endswith(REPLACEMENT)) or k - read >= 8:
            spans += [(len(text), len(text) + len(piece))] * (k + 1 - read)
            text, context, read = text + piece, read, k + 1
    return text, spans + [(len(text), len(text))] * (len(ids) - read)


# markup of the tokenizer's chat template


def segments(tokenizer: Any, roles: Sequence[str]) -> list[str] | None:
    """The markup before, between and after the contents of a conversation of these roles; None: not to be had."""
    if not getattr(tokenizer, "chat_template", None) or len(roles) > len(SENTINELS):
        return None
    marks = SENTINELS[: len(roles)]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may refuse an order of roles
        return None
    found, position = [], 0
    for mark in marks:
        if text.count(mark) != 1 or text.find(mark) < position:
            return None
        start = text.find(mark)
        found.append(text[position:start])
        position = start + len(mark)
    return [*found, text[position:]]


@dataclass(frozen=True)
class Marks:
    """What encloses contents in the tokenizer's template."""

    user_open: str
    assistant_open: str  # with the end of the user's turn
    assistant_closes: tuple[str, ...]  # special tokens behind an answer, between turns and at the end; may be none


def template_marks(tokenizer: Any) -> Marks | None:
    found = segments(tokenizer, ("user", "assistant", "user", "assistant"))
    if found is None:
        return None
    assistant_open = _common_suffix(found[1], found[3])
    user_open = _common_suffix(found[0], found[2])
    specials = special_texts(tokenizer)
    closes = []
    for tail in (found[2].removesuffix(user_open), found[4]):
        places = [(tail.find(text), text) for text in specials if text in tail]
        closes += [min(places)[1]] if places else []
    closes = closes or [c for c in [_common_suffix(found[2][::-1], found[4][::-1])[::-1].strip()] if c]
    if not assistant_open.strip():
        return None
    return Marks(user_open.lstrip(), assistant_open, tuple(dict.fromkeys(closes)))


def special_texts(tokenizer: Any) -> list[str]:
    """Tokens that no text of a user encodes to: control tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = {str(token) for token in added.values() if getattr(token, "special", True)}
    return sorted(texts | set(tokenizer.all_special_tokens))


def special_ids(tokenizer: Any) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(text) for text in special_texts(tokenizer)}


def _common_suffix(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return a[len(a) - length :]


# contents in a row


def locate(
    text: str,
    spans: list[tuple[int, int]],
    contents: list[tuple[str, str]],
    anchors: Sequence[str] | None,
    opaque: list[tuple[int, int]],
) -> list[Part]:
    """The contents that are in the text, in order. `opaque`: characters of special tokens, which no content holds.

    `anchors[k]`: the markup before content k. Without it a content is searched: the first place for context, for an
    answer the last one before the next content, since a short answer may occur in the markup before it as well.
    """
    parts: list[Part] = []
    position = 0
    for k, (role, content) in enumerate(contents):
        forms = [form for form in dict.fromkeys((content, content.strip())) if form]
        anchor = anchors[k][-ANCHOR:] if anchors else ""
        place = _anchored(text, forms, anchor, position) or _adjacent(text, forms, position)
        if place is None:
            following = contents[k + 1][1].strip() if k + 1 < len(contents) else ""
            limit = text.find(following, position) if len(following) >= LONG else -1
            place = _searched(text, forms, position, limit if limit >= 0 else len(text), opaque, role in ANSWERS)
        is_cut = place is None
        if place is None:
            place = _cut(text, forms, anchor, position)
        if place is None:
            continue
        part = Part(role, *place, number=k, is_cut=is_cut)
        assign_tokens(part, text, spans)
        parts.append(part)
        position = part.end
    return parts


def _anchored(text: str, forms: list[str], anchor: str, position: int) -> tuple[int, int] | None:
    for form in forms if anchor else ():
        start = text.find(anchor + form, max(position - len(anchor), 0))
        if start >= 0:
            return start + len(anchor), start + len(anchor) + len(form)
    return None


def _adjacent(text: str, forms: list[str], position: int) -> tuple[int, int] | None:
    return next(((position, position + len(form)) for form in forms if text.startswith(form, position)), None)


def _searched(
    text: str, forms: list[str], low: int, high: int, opaque: list[tuple[int, int]], is_answer: bool
) -> tuple[int, int] | None:
    for form in forms:
        places: list[tuple[int, int]] = []
        start = text.find(form, low, high)
        while start >= 0 and len(places) < 1000:
            end = start + len(form)
            is_inside = any(a < end and start < b and not (start <= a and b <= end) for a, b in opaque)
            breaks_word = (start > 0 and text[start - 1].isalnum() and form[0].isalnum()) or (
                end < len(text) and text[end].isalnum() and form[-1].isalnum()
            )
            if not is_inside and (not breaks_word or len(form) >= LONG):
                places.append((start, end))
            start = text.find(form, start + 1, high)
        if places:
            return places[-1] if is_answer else places[0]
    return None


def _cut(text: str, forms: list[str], anchor: str, position: int) -> tuple[int, int] | None:
    """A content whose beginning is the end of the text."""
    whole = text.rstrip(REPLACEMENT)
    for form in forms:
        if anchor:
            found = text.find(anchor, max(position - len(anchor), 0))
            starts = range(found + len(anchor), len(whole))[:1] if found >= 0 else range(0)
        else:
            starts = range(max(position, len(whole) - len(form)), len(whole) - BEGINNING)
        for start in starts:
            if form.startswith(whole[start:]):
                return start, len(text)
    return None


def parse(text: str, spans: list[tuple[int, int]], marks: Marks) -> list[Part]:
    """Users' and assistants' contents by the template's markup: for rows whose raw form is not known, packed too."""
    parts: list[Part] = []
    position = 0
    while True:
        answer = text.find(marks.assistant_open, position)
        user = text.find(marks.user_open, position) if marks.user_open.strip() else -1
        if answer < 0 and user < 0:
            break
        if answer < 0 or 0 <= user < answer:
            start = user + len(marks.user_open)
            end = text.find(marks.assistant_open, start)
            part = Part("user", start, end if end >= 0 else len(text), is_cut=end < 0)
        else:
            start = answer + len(marks.assistant_open)
            stops = marks.assistant_closes or ((marks.user_open,) if marks.user_open.strip() else ())
            end = min((place for stop in stops if (place := text.find(stop, start)) >= 0), default=-1)
            part = Part("assistant", start, end if end >= 0 else len(text), is_cut=end < 0)
        assign_tokens(part, text, spans)
        parts.append(part)
        position = part.end
    return parts


def assign_tokens(part: Part, text: str, spans: list[tuple[int, int]]) -> None:
    inside = []
    part.after = len(spans)
    for k, (start, end) in enumerate(spans):
        if end <= start:
            continue
        if part.start <= start and end <= part.end:
            inside.append(k)
        elif start < part.end and part.start < end:
            part.joins.append(k)
        elif start >= part.end:
            part.after = k
            break
    while inside and not text[slice(*spans[inside[-1]])].strip():
        inside.pop()
    while inside and not text[slice(*spans[inside[0]])].strip():
        inside.pop(0)
    part.tokens = inside
