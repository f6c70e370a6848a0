"""The training rows with their labels, and whose every token is: what the label audit (`rows.py`) judges.

Owns labelling raw rows as TRL's SFTTrainer would, reading a conversation out of a raw row, and what training is meant
to teach (answers only, or everything).

    audit = audit_of(subject); audit.rows[0].parts

Leaves out the verdicts (`rows.py`) and the search for contents (`spans.py`).
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .runner import first_line
from .spans import (
    ANSWERS,
    Marks,
    Part,
    decode,
    locate,
    parse,
    segments,
    special_ids,
    template_marks,
    token_spans,
)
from .subject import LabelledRow, NotApplicable, NotRun, Subject

ROWS = 400  # looked at
SHOWN = 3  # pieces of evidence at most
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


# raw rows


def content_text(content: Any) -> str:
    """A message's content as text; lists of parts are joined."""
    if isinstance(content, list):
        return "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""


def conversation(raw: dict[str, Any], text_field: str = "text") -> list[tuple[str, str]]:
    """(role, content) of a row in TRL's columns, empty where it has none of them.

    A text prompt has role prompt, a text completion completion, plain text text; an assistant's turns inside a prompt
    are history.
    """
    prompt, completion, messages = raw.get("prompt"), raw.get("completion"), raw.get("messages")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [("prompt", prompt), ("completion", completion)]
    if isinstance(prompt, list) and isinstance(completion, list):
        given = [("history" if m.get("role") == "assistant" else m.get("role"), m) for m in prompt]
        given += [(m.get("role"), m) for m in completion]
    elif isinstance(messages, list):
        given = [(m.get("role"), m) for m in messages]
    else:
        return [("text", raw[text_field])] if isinstance(raw.get(text_field), str) else []
    return [(str(role), content_text(m.get("content"))) for role, m in given]


def has_answer(raw: dict[str, Any]) -> bool:
    """Whether a row has anything that instruction tuning could teach; tool calls count."""
    messages = [m for key in ("messages", "completion") if isinstance(raw.get(key), list) for m in raw[key]]
    return any(role in ANSWERS and content.strip() for role, content in conversation(raw)) or any(
        m.get("role") == "assistant" and m.get("tool_calls") for m in messages
    )


def label_rows_counted(subject: Subject, count: int) -> tuple[list[LabelledRow], list[tuple[int, str]]]:
    """Raw rows as TRL's SFT makes them, and (index, error) of those that cannot be rendered or tokenised."""
    rows: list[LabelledRow] = []
    broken: list[tuple[int, str]] = []
    template = training_template(subject.tokenizer, subject.settings)
    for index, raw in enumerate(subject.rows[:count]):
        try:
            ids, mask = tokenize_row(subject.tokenizer, subject.settings, raw, template)
        except Exception as error:
            broken.append((index, first_line(error)))
            continue
        labels = [i if keep else -100 for i, keep in zip(ids, mask, strict=True)]
        length = subject.settings.get("max_length")
        if length and not subject.settings.get("packing"):
            cut = slice(-length, None) if subject.settings.get("truncation_mode") == "keep_end" else slice(length)
            ids, labels = ids[cut], labels[cut]
        rows.append(LabelledRow(index, ids, labels, raw))
    return rows, broken


def training_template(tokenizer: Any, settings: dict[str, Any]) -> str | None:
    """TRL's own template with marks, where it trains with that one instead of a stock template without."""
    if not settings.get("assistant_only_loss") or MARKS.search(str(tokenizer.chat_template)):
        return None
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer)
    except Exception:  # not installed, or not one of the stock templates
        return None


def tokenize_row(
    tokenizer: Any, settings: dict[str, Any], raw: dict[str, Any], template: str | None = None
) -> tuple[list[int], list[bool]]:
    """ids and whether each is trained, uncut, as TRL's SFTTrainer makes them of a row in its columns.

    Raises ValueError for a row without a column that TRL knows, and whatever the template raises.
    """
    if "input_ids" in raw:
        ids = list(raw["input_ids"])
        labels = raw.get("labels") or ids
        return ids, [label != -100 for label in labels]
    tools = json.loads(raw["tools"]) if isinstance(raw.get("tools"), str) else raw.get("tools")
    options = {
        "tools": tools,
        "chat_template": template,
        "return_dict": True,
        **(raw.get("chat_template_kwargs") or {}),
    }
    only_answers = bool(settings.get("assistant_only_loss"))
    prompt: Any = raw.get("prompt")
    completion: Any = raw.get("completion")
    prompt_ids: list[int] | None = None
    if isinstance(prompt, list):
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        given = tokenizer.apply_chat_template(prompt + completion, return_assistant_tokens_mask=only_answers, **options)
    elif isinstance(prompt, str) and isinstance(completion, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        given = tokenizer(prompt + _ended(completion, tokenizer))
    elif isinstance(raw.get("messages"), list):
        given = tokenizer.apply_chat_template(raw["messages"], return_assistant_tokens_mask=only_answers, **options)
    elif isinstance(raw.get(_text_field(settings)), str):
        given = tokenizer(_ended(raw[_text_field(settings)], tokenizer))
    else:
        raise ValueError(f"none of messages, prompt and completion, text among {sorted(raw)}")
    ids = list(given["input_ids"])
    mask = [bool(m) for m in given["assistant_masks"]] if only_answers and "assistant_masks" in given else None
    mask = mask or [True] * len(ids)
    if prompt_ids is not None and settings.get("completion_only_loss") is not False:
        same = [a == b for a, b in zip(prompt_ids, ids, strict=False)]
        begin = same.index(False) if False in same else len(same)
        mask = [keep and k >= begin for k, keep in enumerate(mask)]
    return ids, mask


def _text_field(settings: dict[str, Any]) -> str:
    return settings.get("dataset_text_field") or "text"


def _ended(text: str, tokenizer: Any) -> str:
    eos = tokenizer.eos_token
    return text if not eos or text.endswith(eos) else text + eos


# rows, audited


@dataclass
class AuditedRow:
    row: LabelledRow
    is_trained: list[bool]  # by position
    text: str
    parts: list[Part]  # contents that were found in the row, in order; empty where none was
    contents: list[tuple[str, str]]  # of its raw form; empty where that is not known
    is_cut: bool = False  # the row lost its end

    @property
    def answers(self) -> list[Part]:
        return [part for part in self.parts if part.is_answer]


@dataclass
class Audit:
    tokenizer: Any
    rows: list[AuditedRow]
    kind: str  # chat, completion, text, or unknown: raw form and markup are not known
    stops: set[int]
    openers: set[int]  # control tokens at the start of a user's turn in the template
    masks_context: bool  # training is meant to teach answers only
    is_asked: bool  # ... and the settings say so
    is_packed: bool
    max_length: int | None  # asked for
    cut_at: int | None  # the length that rows were cut at, as far as it can be seen
    broken: list[tuple[int, str]] = field(default_factory=list)  # rows that could not be rendered
    dropped: list[int] = field(default_factory=list)  # rows that the trainer left out for training nothing
    num_given: int = 0  # rows before dropping

    @property
    def located(self) -> list[AuditedRow]:
        """Rows whose answers were found."""
        return [item for item in self.rows if item.answers]

    def show(self, item: AuditedRow, start: int, stop: int, note: str) -> dict[str, Any]:
        """Evidence: the tokens start to stop of a row."""
        start, stop = max(start, 0), min(stop, len(item.row.input_ids))
        ids = item.row.input_ids[start:stop]
        return {"row": item.row.index, "position": start, "text": decode(self.tokenizer, ids), "ids": ids, "note": note}

    def is_blank(self, item: AuditedRow, position: int) -> bool:
        """White space, which may follow a stop token."""
        return not decode(self.tokenizer, [item.row.input_ids[position]]).strip()


def audit_of(subject: Subject) -> Audit:
    """Made once per subject. Raises NotApplicable without rows or tokenizer, and for trainers of another kind."""
    subject.need("tokenizer")
    if subject.training is None:
        subject.need("rows")
    return subject.once("audit", lambda: _audit(subject))


def _audit(subject: Subject) -> Audit:
    broken: list[tuple[int, str]] = []
    dropped, num_given = _dropped(subject)
    if subject.training is None:
        rows, broken = label_rows_counted(subject, ROWS)
        if not rows:
            raise NotRun(f"none of {len(broken)} rows can be rendered: {broken[0][1]}")
    elif dropped and len(dropped) == num_given:
        rows = []
    else:
        rows = subject.labelled_rows(ROWS)
    rows = [_shifted_back(row) for row in rows]
    settings, tokenizer = subject.settings, subject.tokenizer
    marks = template_marks(tokenizer)
    is_packed = bool(settings.get("packing"))
    audited = [_located(subject, row, marks, is_packed) for row in rows]
    max_length = settings.get("max_length") or None
    cut_at = _cut_length([len(row.input_ids) for row in rows])
    stops = stop_ids(subject, marks)
    kind = _kind(audited)
    if not is_packed:
        _mark_cut(audited, stops, max_length, cut_at)
    is_asked = bool(settings.get("assistant_only_loss")) or _completion_only(settings, kind)
    opening = tokenizer(marks.user_open, add_special_tokens=False)["input_ids"] if marks else []
    openers = set(opening) & special_ids(tokenizer) - closing_ids(tokenizer, marks)
    audit = Audit(tokenizer, audited, kind, stops, openers, is_asked, is_asked, is_packed, max_length, cut_at)
    audit.masks_context = is_asked or _seems_to_mask(audit)
    audit.broken, audit.dropped, audit.num_given = broken, dropped, num_given or len(rows) + len(broken)
    return audit


def stop_ids(subject: Subject, marks: Marks | None) -> set[int]:
    """Ids that end generation, or a turn in the tokenizer's template."""
    tokenizer = subject.tokenizer
    found: list[Any] = []
    generation = getattr(subject.model, "generation_config", None)
    for holder in (tokenizer, generation, getattr(subject.model, "config", None) or subject.config):
        value = getattr(holder, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [value]
    return {int(i) for i in found if i is not None} | closing_ids(tokenizer, marks)


def closing_ids(tokenizer: Any, marks: Marks | None) -> set[int]:
    """Control tokens behind an answer in the tokenizer's template."""
    found: set[int] = set()
    for close in marks.assistant_closes if marks else ():
        ids = tokenizer(close, add_special_tokens=False)["input_ids"]
        found |= set([i for i in ids if i in special_ids(tokenizer)][:1])
    return found


def _shifted_back(row: LabelledRow) -> LabelledRow:
    """Labels that the collator shifted already (labels[t] == ids[t+1]) as all others; `loss.py` judges the shift."""
    ids, labels = row.input_ids, row.labels
    trained = [t for t, label in enumerate(labels) if label != -100]
    here = sum(labels[t] == ids[t] for t in trained)
    ahead = sum(t + 1 < len(ids) and labels[t] == ids[t + 1] for t in trained)
    if here >= ahead:
        return row
    return LabelledRow(row.index, ids, [-100, *labels[:-1]], row.raw)


def _located(subject: Subject, row: LabelledRow, marks: Marks | None, is_packed: bool) -> AuditedRow:
    tokenizer, ids = subject.tokenizer, row.input_ids
    text, spans = token_spans(tokenizer, ids)
    raw = row.raw if row.raw is not None and not is_packed else None
    contents = conversation(raw, _text_field(subject.settings)) if raw else []
    eos = tokenizer.eos_token or ""
    contents = [
        (role, _without_end(content, eos) if role in ("completion", "text") else content) for role, content in contents
    ]
    parts: list[Part] = []
    if contents and contents[0][0] != "text":
        special = special_ids(tokenizer)
        opaque = [spans[k] for k, i in enumerate(ids) if i in special]
        anchors = None if contents[0][0] == "prompt" else _anchors(subject, tuple(role for role, _ in contents))
        parts = locate(text, spans, contents, anchors, opaque)
        if not any(part.is_answer for part in parts):  # a tokenizer may lower-case, or lose white space
            shown = [(role, _round_trip(tokenizer, content)) for role, content in contents]
            parts = locate(text, spans, shown, [_round_trip(tokenizer, a) for a in anchors or []] or None, opaque)
    elif marks:
        parts = parse(text, spans, marks)
    trained = [label != -100 for label in row.labels]
    return AuditedRow(row, trained, text, parts, contents)


def _round_trip(tokenizer: Any, text: str) -> str:
    return decode(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _anchors(subject: Subject, roles: tuple[str, ...]) -> list[str] | None:
    known = subject.memory.setdefault("anchors", {})
    if roles not in known:
        real = ["assistant" if role == "history" else role for role in roles]
        known[roles] = segments(subject.tokenizer, real)
    return known[roles]


def _without_end(text: str, eos: str) -> str:
    while eos and text.endswith(eos):
        text = text[: -len(eos)]
    return text


def _kind(rows: list[AuditedRow]) -> str:
    """What most rows are."""
    kinds: Counter[str] = Counter()
    for item in rows:
        role = item.contents[0][0] if item.contents else ""
        if role == "prompt":
            kinds["completion"] += 1
        elif item.answers or role not in ("", "text"):
            kinds["chat"] += 1
        else:
            kinds["text" if role == "text" else "unknown"] += 1
    return kinds.most_common(1)[0][0] if kinds else "unknown"


def _completion_only(settings: dict[str, Any], kind: str) -> bool:
    if "completion_only_loss" not in settings or kind not in ("completion", "chat"):
        return False
    asked = settings["completion_only_loss"]
    return bool(asked) or (asked is None and kind == "completion")


def _seems_to_mask(audit: Audit) -> bool:
    """Most rows that have context leave some of it out of the loss."""
    masked = [
        any(not item.is_trained[t] for part in item.parts if not part.is_answer for t in part.tokens)
        for item in audit.rows
        if any(not part.is_answer and part.tokens for part in item.parts)
    ]
    if masked:
        return sum(masked) * 2 > len(masked)
    special = special_ids(audit.tokenizer)  # packed rows mask the BOS of every document
    behind_start = [
        [t for t, i in zip(item.is_trained[1:], item.row.input_ids[1:], strict=False) if t or i not in special]
        for item in audit.rows
    ]
    return bool(behind_start) and sum(any(t) and not all(t) for t in behind_start) * 2 > len(behind_start)


def _cut_length(lengths: list[int]) -> int | None:
    """The greatest length, where so many rows have it that they were cut there."""
    if not lengths or min(lengths) == max(lengths):
        return None
    number = lengths.count(max(lengths))
    return max(lengths) if number >= max(3, 0.02 * len(lengths)) else None


def _mark_cut(rows: list[AuditedRow], stops: set[int], max_length: int | None, cut_at: int | None) -> None:
    """Rows that lost their end: the last content breaks off, or a row of the greatest length has no stop token.

    Where the greatest length is not a setting, a missing stop token says something only if other rows have one.
    """
    whole = [item for item in rows if len(item.row.input_ids) not in (max_length, cut_at)]
    ends = sum(bool(stops & set(_behind(item))) for item in whole) * 2 >= len(whole)
    limits = {max_length, cut_at if ends else None} - {None}
    for item in rows:
        is_full = len(item.row.input_ids) in limits
        has_stop = bool(stops & set(_behind(item)))
        last = item.parts[-1] if item.parts else None
        if item.contents and item.contents[-1][0] != "text":
            is_found = last is not None and last.number == len(item.contents) - 1
            breaks_off = is_found and last is not None and last.is_cut
            item.is_cut = breaks_off or (is_full and not (is_found and has_stop))
        else:
            item.is_cut = is_full and not has_stop


def _behind(item: AuditedRow) -> list[int]:
    """The ids behind a row's last content, or its last three."""
    if item.parts:
        return [] if item.parts[-1].is_cut else item.row.input_ids[item.parts[-1].after :]
    return item.row.input_ids[-3:]


def _dropped(subject: Subject) -> tuple[list[int], int]:
    """Rows that TRL's SFTTrainer filtered out since truncation left nothing to train, and the rows before that.

    A filtered `datasets.Dataset` still holds the table of all rows.
    """
    dataset = getattr(getattr(subject.training, "trainer", None), "train_dataset", None)
    table, kept = getattr(dataset, "_data", None), getattr(dataset, "_indices", None)
    if table is None or kept is None or "labels" not in table.column_names:
        return [], 0
    left_out = sorted(set(range(table.num_rows)) - set(kept.column(0).to_pylist()))
    labels = table.column("labels")
    dropped = [i for i in left_out[:20_000] if all(label == -100 for label in labels[i].as_py())]
    return dropped, table.num_rows


HEADER = 3  # tokens that most rows have at the same distance from where training begins: the markup before answers
NEAR = 16  # how far from there it is looked for


def boundary_shift(rows: list[AuditedRow]) -> tuple[int, int] | None:
    """Where training begins, for rows of which neither contents nor markup are known: (shift, number of rows).

    Answers follow the same markup in all rows ("### Response:"), and differ. 0: training begins right behind it, or in
    it; n: n tokens later; -n: n tokens before it begins. None: no such markup near, or rows with several spans.
    """
    begins = [(item.row.input_ids, item.is_trained.index(True)) for item in rows if True in item.is_trained[1:]]
    if len(begins) < 8 or len(begins) * 2 < len(rows):
        return None

    def is_common(offset: int) -> bool:
        found = Counter(ids[b + offset] if 0 <= b + offset < len(ids) else -1 for ids, b in begins)
        token, number = found.most_common(1)[0]
        return token >= 0 and number >= 0.95 * len(begins)

    common = {offset: is_common(offset) for offset in range(-NEAR - HEADER, NEAR)}
    for end in sorted(range(-NEAR, NEAR), key=abs):  # the first offset behind the markup
        if not common[end] and all(common[end - k] for k in range(1, HEADER + 1)):
            start = next((o for o in range(end - 1, -NEAR - HEADER - 1, -1) if not common[o]), -NEAR - HEADER - 1) + 1
            return -end if end <= 0 else min(-start, 0), len(begins)
    return None


def need_language_rows(audit: Audit) -> None:
    """Raises NotApplicable where the rows teach no answers: plain text."""
    if audit.kind == "text" or (audit.kind == "unknown" and not audit.masks_context):
        raise NotApplicable("plain text: every token is taught, there are no prompts and answers")
