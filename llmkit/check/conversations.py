"""Conversations to probe a chat template with: a sentinel word per message, in roles that the template takes.

Owns rendering them. Leaves out what is expected of the text (`template.py`, `turns.py`).

    messages, text = conversation(tokenizer)
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from .audit import closing_ids
from .runner import first_line
from .spans import SENTINELS, special_texts, template_marks
from .subject import NotApplicable, NotRun, Subject

ROLES = (
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("user", "assistant"),
)
# <|im_end|>, <end_of_turn>, </s>, <｜Assistant｜>, <turn|>: what templates write as control tokens
LITERAL = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]?>|</?[a-zA-Z_]{1,24}[|｜]?>")


def need_template(subject: Subject) -> Any:
    """The tokenizer. Raises NotApplicable without a template; NotRun where one was asked for."""
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
    """The text of one of `messages_of`."""
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"]


def conversation(tokenizer: Any, extra: str = "", longer: int = 0) -> tuple[list[dict[str, Any]], str]:
    """The richest conversation that the template takes, and its text; `longer`: so many more pairs of turns.

    Raises NotRun for a template that takes none.
    """
    reason = ""
    for roles in ROLES:
        messages = messages_of(tokenizer, roles + ("user", "assistant") * longer, extra)
        try:
            return messages, render(tokenizer, messages)
        except Exception as error:  # templates refuse roles in words of their own
            reason = first_line(error)
    raise NotRun(f"the template renders no conversation ({reason})")


@dataclass(frozen=True)
class Written:
    """What a template writes around contents."""

    text: str
    literals: list[str]  # that look like control tokens
    end: str  # the first one behind an answer, "" for none
    tail: str  # all that is behind the last answer


def written_by_template(tokenizer: Any) -> Written | None:
    """None without a template that renders."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        messages, text = conversation(tokenizer)
    except NotRun:
        return None
    parts = re.split("|".join(SENTINELS[: len(messages)]), text)
    specials = [re.escape(t) for t in sorted(special_texts(tokenizer), key=len, reverse=True)]
    pattern = re.compile("|".join([*specials, LITERAL.pattern]))
    literals = list(dict.fromkeys(literal for part in parts for literal in LITERAL.findall(part)))
    behind = pattern.search(parts[-1])
    return Written(text, literals, behind[0] if behind else "", parts[-1])


def turn_ends(tokenizer: Any) -> set[int]:
    """Ids of the tokens behind an answer in the template: special tokens, and added ones that are not called so."""
    found = closing_ids(tokenizer, template_marks(tokenizer))
    written = written_by_template(tokenizer)
    end = written.end if written and not found else ""
    ids = list(tokenizer(end, add_special_tokens=False)["input_ids"]) if end else []
    return found | set(ids if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else [])


def options_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row in TRL's columns gives to the template beside its messages."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return ({"tools": tools} if tools else {}) | (row.get("chat_template_kwargs") or {})


def own_conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a raw row, prompt and completion joined; empty where it has none."""
    given = row.get("messages")
    if given is None and isinstance(row.get("prompt"), list):
        rest = row.get("completion") if row.get("completion") is not None else row.get("chosen")
        given = [*row["prompt"], *(rest if isinstance(rest, list) else [])]
    return [m for m in given or [] if isinstance(m, dict)] if isinstance(given, list) else []
