"""How the models are asked: decided once, from their own files, and the same for every column.

Owns whether tasks that generate are asked as chats, in whose template, and what opens a prompt.

    asking = decide(columns, tokenizers, apply_chat_template=None);  asking.is_chat("sft")

A base model beside its tuned child is asked in the child's template where its vocabulary has the template's tokens;
where one of the columns cannot be asked as a chat, none is. Tasks that only score text (multiple choice, perplexity)
are asked plainly unless `apply_chat_template: true`: they are defined on running text.
"""

import dataclasses
from typing import Any

from ..check.conversations import written_by_template
from ..config import UserError
from ..data.template import template_hash
from .columns import Column


@dataclasses.dataclass(frozen=True)
class Asking:
    """`templates` is empty where nobody is asked as a chat."""

    templates: dict[str, str]  # column -> chat template, its own or a borrowed one
    lenders: dict[str, str]  # column -> the column whose template it borrowed
    hashes: dict[str, str | None]
    ends: dict[str, str]  # column -> what ends a turn in its template
    bos: dict[str, str | None]  # column -> what its tokenizer opens a text with
    scores_in_chat: bool  # multiple choice as a chat too
    notes: list[str]

    def is_chat(self, output_type: str) -> bool:
        """Of a task: whether it is asked as a chat."""
        return bool(self.templates) and (output_type == "generate_until" or self.scores_in_chat)


def decide(columns: list[Column], tokenizers: dict[str, Any], apply_chat_template: bool | None) -> Asking:
    """Gives the tokenizers that borrow a template that template. Raises UserError for a chat that cannot be."""
    notes: list[str] = []
    bos = {column.name: opening(tokenizers[column.name]) for column in columns}
    lenders: dict[str, str] = {}
    has_own = [column.name for column in columns if tokenizers[column.name].chat_template]
    without = [column for column in columns if column.name not in has_own]
    is_chat = apply_chat_template is not False and bool(has_own)
    if apply_chat_template and not has_own:
        raise UserError("apply_chat_template=true: none of the models has a chat template; leave it out")
    for column in without if is_chat else []:
        lender = _lender(column, columns, tokenizers, has_own)
        if lender:
            lenders[column.name] = lender
        elif apply_chat_template:
            raise UserError(
                f"apply_chat_template=true: {column.name} has no chat template, and its vocabulary lacks the tokens of "
                f"the others' ({', '.join(has_own)}); leave that model out, or ask everyone plainly"
            )
        else:
            is_chat = False
            notes.append(f"{column.name} cannot be asked as a chat, so nobody is")
            break
    if not is_chat:
        return Asking({}, {}, {}, {}, bos, False, notes)
    for name, lender in lenders.items():
        tokenizers[name].chat_template = tokenizers[lender].chat_template
    names = [column.name for column in columns]
    return Asking(
        {name: tokenizers[name].chat_template for name in names},
        lenders,
        {name: template_hash(tokenizers[name]) for name in names},
        {name: end_of_turn(tokenizers[name]) for name in names},
        bos,
        bool(apply_chat_template),
        notes + [f"{name} has no chat template and is asked in that of {lender}" for name, lender in lenders.items()],
    )


def opening(tokenizer: Any) -> str | None:
    """The BOS token, where the tokenizer itself puts it before a text."""
    ids = tokenizer("a")["input_ids"]
    is_bos = tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
    return tokenizer.bos_token if is_bos else None


def end_of_turn(tokenizer: Any) -> str:
    written = written_by_template(tokenizer)
    return written.end if written and written.end in tokenizer.get_vocab() else ""


def _lender(column: Column, columns: list[Column], tokenizers: dict[str, Any], has_own: list[str]) -> str | None:
    """The nearest column with a template that this vocabulary can write: a child first."""
    children = [other.name for other in columns if other.parent == column.name and other.name in has_own]
    vocabulary = tokenizers[column.name].get_vocab()
    for name in [*children, *has_own]:
        written = written_by_template(tokenizers[name])
        if written and all(token in vocabulary for token in written.literals):
            return name
    return None
