"""Is what was exported the same model: logits, token ids, rendered conversations; else the export is refused.

Owns what is compared, for every target, and how far apart it may be.

    probe = probe_of(model, tokenizer);  check_logits(probe, logits, TOLERANCE, "the GGUF");  check_ids(...)

Leaves out how a target is read back: the other model, or tokenizer, is handed in.
"""

import dataclasses
import itertools
import unicodedata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..align.merge import TEXTS, Difference, compare, get_logits, probe_rows
from ..check.conversations import conversation, render
from ..check.spans import special_texts
from ..check.subject import NotRun
from ..check.torture import TORTURE
from ..config import UserError

MAX_SPECIAL = 64  # special tokens that are tried inside a text


@dataclasses.dataclass(frozen=True)
class Limit:
    """`weights`: of each tensor the norm of the gap, as a share of its own; `engine`: mean gap of llama.cpp's logits.

    The latter as a share of their deviation, where both hold the rounded weights: its sums differ, f16 and q8_0 round
    activations too. Measured on 2 to 24 random layers of width 32 to 768, which amplify more than trained ones do, in
    f32, f16 and q8_0: weights 0, 2.2e-4 and 5.5e-3 (toy models 2.1e-4 and 6.5e-3), engine 5e-5, 0.013 and 0.20 (toy
    models 8e-7, 5e-4 and 0.014; a GPT-2 in f32 1.4e-4).
    """

    weights: float
    engine: float


LIMITS = {"f32": Limit(0.0, 5e-3), "f16": Limit(1e-2, 0.03), "q8_0": Limit(2e-2, 0.4)}


@dataclasses.dataclass(frozen=True)
class Probe:
    """Rows (1, T) of random ids and of real text, and the original's logits on them, (N, V) float32."""

    rows: list[Tensor]
    logits: Tensor


def probe_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Probe:
    rows = probe_rows(model, tokenizer)
    return Probe(rows, get_logits(model, rows))


def texts_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The torture set, ordinary text, and every special token inside a text."""
    inside = {f"{token} inside a text": f"one {token}two\n{token}" for token in special_texts(tokenizer)[:MAX_SPECIAL]}
    return TORTURE | {f"text {k}": text for k, text in enumerate(TEXTS)} | inside | {"nothing": ""}


def rounded(probe: Probe, model: PreTrainedModel, other: PreTrainedModel) -> Probe:
    """The rows, and the logits of `model` (which is used up) with the weights of `other`, as rounded as they are.

    What still differs from `other` is then no rounding, which in 8 bit would hide a wrong setting.
    """
    theirs = other.state_dict()
    model.load_state_dict({name: theirs[name] for name in model.state_dict()})
    return Probe(probe.rows, get_logits(model, probe.rows))


def check_logits(probe: Probe, logits: Tensor, limit: float, what: str) -> Difference:
    """Raises UserError where the mean gap is above `limit`, a share of the original's standard deviation."""
    found = compare(probe.logits, logits)
    if not found.mean / found.deviation <= limit:  # also where it is not a number
        raise UserError(
            f"logits of {what} differ from the model's by {found.mean:.2g} on average, {found.max:.2g} at most "
            f"(their deviation is {found.deviation:.2g}; allowed: {limit:.2g} of it); nothing was written"
        )
    return found


def check_equal_logits(probe: Probe, other: PreTrainedModel, what: str) -> Difference:
    """Bit for bit."""
    logits = get_logits(other, probe.rows)
    if not torch.equal(logits, probe.logits):
        found = compare(probe.logits, logits)
        raise UserError(f"logits of {what} differ from the model's by {found.max:.2g}; nothing was written")
    return compare(probe.logits, logits)


def check_weights(model: PreTrainedModel, other: PreTrainedModel, limit: float, what: str) -> float:
    """Of all tensors the largest norm of the gap, as a share of the tensor's own. Raises UserError above `limit`."""
    theirs, worst = other.state_dict(), 0.0
    for name, tensor in model.state_dict().items():
        gap = (theirs[name].float() - tensor.float()).norm().item() / max(tensor.float().norm().item(), 1e-12)
        if not gap <= limit:
            raise UserError(
                f"{what}: {name} is {gap:.2g} of its norm away from the model's (allowed: {limit:.2g}); "
                "nothing was written"
            )
        worst = max(worst, gap)
    return worst


def check_ids(
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[str, bool], list[int]],
    what: str,
    normalizer: str | None = None,
) -> int:
    """Of every text, bare and with what is added around it; how many. `encode(text, add_special_tokens)` is theirs.

    Texts that the tokenizer's `normalizer`, which the target does without, changes are left out. Raises UserError.
    """
    form: Any = normalizer
    texts = {n: t for n, t in texts_of(tokenizer).items() if form is None or unicodedata.is_normalized(form, t)}
    for name, text in texts.items():
        for special in (False, True):
            ours, theirs = list(tokenizer(text, add_special_tokens=special)["input_ids"]), encode(text, special)
            if ours != theirs:
                at = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
                raise UserError(
                    f"token ids of {what} differ on {name!r}: {text[:40]!r} goes on after {at} with "
                    f"{ours[at : at + 8]}, there with {theirs[at : at + 8]}; nothing was written"
                )
    return len(texts)


def chats_of(tokenizer: PreTrainedTokenizerBase) -> list[list[dict[str, Any]]]:
    """Conversations that the template takes: sentinels, and the torture set as contents; none without a template."""
    if not tokenizer.chat_template:
        return []
    try:
        messages, _ = conversation(tokenizer)
    except NotRun:
        return []
    texts = [*TORTURE.values()]
    return [
        messages,
        *([m | {"content": texts[(k + i) % len(texts)]} for i, m in enumerate(messages)] for k in range(3)),
    ]


def check_template(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, what: str) -> int:
    """Every conversation, open and closed; how many were rendered alike. Raises UserError."""
    if bool(tokenizer.chat_template) != bool(other.chat_template):
        raise UserError(
            f"{what} {'lacks the' if tokenizer.chat_template else 'has a'} chat template; nothing was written"
        )
    chats = chats_of(tokenizer)
    for chat in chats:
        for generation in (False, True):
            ours, theirs = (render(t, chat, generation) for t in (tokenizer, other))
            if ours != theirs:
                raise UserError(
                    f"{what} renders a conversation otherwise: {ours!r}, there {theirs!r}; nothing was written"
                )
    return 2 * len(chats)


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, other: Any, what: str, normalizer: str | None = None
) -> tuple[int, int]:
    """Ids and template against another tokenizer of transformers; the number of texts and of conversations."""

    def encode(text: str, special: bool) -> list[int]:
        return list(other(text, add_special_tokens=special)["input_ids"])

    return check_ids(tokenizer, encode, what, normalizer), check_template(tokenizer, other, what)


def say_tokens(num_texts: int, num_chats: int) -> str:
    chats = f"{num_chats} conversations render the same" if num_chats else "no chat template"
    return f"tokens    the same ids on {num_texts} texts (torture set, special tokens inside text); {chats}"
