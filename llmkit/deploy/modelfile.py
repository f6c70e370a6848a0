"""Ollama's Modelfile: the weights, the chat template in Go's text/template, the tokens that end an answer.

Owns the translation, for templates that write each turn as opening + content + closing.   text = modelfile(...)

What a Jinja template writes is found by asking it, and the translation is used only where it renders the same
conversations. Any other template is left out, in words: Ollama then goes by the one in the GGUF, as far as it can.
"""

import dataclasses
import itertools
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..check.conversations import render
from ..check.spans import SENTINELS

ROLES = ("system", "user", "assistant")
EDGES = " {} \n"  # templates may trim what a message begins and ends with


@dataclasses.dataclass(frozen=True)
class Turns:
    """What a template writes: `head` once, then around each content what its role says, `prompt` for an answer."""

    head: str
    around: dict[str, tuple[str, str]]
    prompt: str

    def render(self, messages: list[dict[str, str]], generation: bool) -> str:
        turns = [m["content"].join(self.around[m["role"]]) for m in messages]
        return self.head + "".join(turns) + (self.prompt if generation else "")


def _chat(*roles: str, form: str = "{}") -> list[dict[str, str]]:
    return [{"role": r, "content": form.format(word)} for r, word in zip(roles, SENTINELS, strict=False)]


def _parts(tokenizer: Any, *roles: str) -> list[str]:
    """What is written before, between and behind the contents."""
    text, parts = render(tokenizer, _chat(*roles)), []
    for message in _chat(*roles):
        before, text = text.split(message["content"], 1)
        parts.append(before)
    return [*parts, text]


def turns_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Turns, bool] | None:
    """The translation, and whether the template trims contents; None for one that is not a row of such turns."""
    try:
        opening, between, answer_end = _parts(tokenizer, "user", "assistant")
        _, user_end = _parts(tokenizer, "user")
        _, _, again, _ = _parts(tokenizer, "user", "assistant", "user")
        asked = render(tokenizer, _chat("user"), True)
        closed = render(tokenizer, _chat("user"))
    except Exception:  # refusals of templates, and contents that do not come back
        return None
    if not (between.startswith(user_end) and again.startswith(answer_end) and asked.startswith(closed)):
        return None
    user, answer = again.removeprefix(answer_end), between.removeprefix(user_end)
    if not opening.endswith(user):
        return None
    head = opening.removesuffix(user)
    around = {"user": (user, user_end), "assistant": (answer, answer_end)}
    try:
        first, second, _ = _parts(tokenizer, "system", "user")
        if first.startswith(head) and second.endswith(user):
            around["system"] = (first.removeprefix(head), second.removesuffix(user))
    except Exception:  # no system prompts
        pass
    turns = Turns(head, around, asked.removeprefix(closed))
    if not _is_right(tokenizer, turns, "{}"):
        return None
    return turns, not _is_right(tokenizer, turns, EDGES)


def _is_right(tokenizer: Any, turns: Turns, form: str) -> bool:
    """On every conversation of up to four messages that the template takes."""
    for count in range(1, 5):
        for roles in itertools.product(ROLES, repeat=count):
            chat = _chat(*roles, form=form)
            for generation in (False, True):
                try:
                    text = render(tokenizer, chat, generation)
                except Exception:  # it refuses this order of roles
                    continue
                if not set(roles) <= set(turns.around) or text != turns.render(chat, generation):
                    return False
    return True


def _go(text: str) -> str:
    """As it is; as a quoted string in an action where it would open one, end TEMPLATE, or lose what Ollama drops.

    Ollama's parser drops characters that cannot be printed, such as no-break spaces, but for tabs and line ends.
    """
    is_kept = all(c.isprintable() or c in "\t\r\n" for c in text)
    if is_kept and "{{" not in text and '"""' not in text and not text.endswith("{"):
        return text
    quoted = json.dumps(text, ensure_ascii=False)  # escapes that Go knows too
    return "{{ " + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted) + " }}"


def go_template(turns: Turns, head: str) -> str:
    """Every message by its role, then the opening of an answer."""
    says = "{{ else if "
    cases = [
        f'eq .Role "{role}" }}}}{_go(opening)}{{{{ .Content }}}}{_go(closing)}'
        for role, (opening, closing) in sorted(turns.around.items(), key=lambda item: ROLES.index(item[0]))
    ]
    return (
        f"{_go(head)}{{{{ range .Messages }}}}{{{{ if {says.join(cases)}{{{{ end }}}}{{{{ end }}}}{_go(turns.prompt)}"
    )


def modelfile(
    gguf_name: str, tokenizer: PreTrainedTokenizerBase, ends: list[str], adds_bos: bool, context: int | None
) -> tuple[str, list[str]]:
    """The file's text, and what there is to say about it, a line each."""
    notes: list[str] = []
    template: str | None = "{{ .Prompt }}"  # a model that continues text: nothing around it
    if tokenizer.chat_template:
        template, found = None, turns_of(tokenizer)
        if found is None:
            notes.append("the chat template is more than a row of turns, which TEMPLATE cannot say; it is in the GGUF")
        else:
            turns, trims = found
            bos = tokenizer.bos_token or ""
            opens = bool(bos) and turns.head.startswith(bos)
            head = turns.head.removeprefix(bos) if adds_bos and opens else turns.head  # llama.cpp writes it already
            template = go_template(turns, head)
            if adds_bos and not opens:
                notes.append(f"the chat template writes no {bos}, and llama.cpp adds one before every prompt")
            if trims:
                notes.append("the chat template trims messages at both ends, TEMPLATE does not")
    lines = [f"FROM ./{gguf_name}"]
    lines += [f'TEMPLATE """{template}"""'] if template is not None else []
    lines += [f'PARAMETER stop "{end}"' for end in ends]  # Ollama takes what is between the quotes as it is
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    return "\n".join(lines) + "\n", notes
