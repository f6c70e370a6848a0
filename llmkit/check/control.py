"""Control tokens and text: what a user's text can write, and what ends a document or a prompt.

Owns three tier-0 checks of the family `tokenizer`. Leaves out ids (`tokenizer.py`) and beginnings (`bos.py`).
"""

from typing import Any

from .conversations import turn_ends
from .runner import Outcome, check, failed, passed, warned
from .spans import decode, special_texts
from .subject import NotApplicable, NotRun, Subject
from .torture import encode


def spelled(tokenizer: Any, text: str) -> list[int]:
    """Its ids where control tokens in a text are to stay text: how our token stores are written."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@check("special-token-forged", family="tokenizer", tier=0, catalogue="K2")
def special_token_forged(subject: Subject) -> Outcome:
    """Text can write a control token: what somebody typed ends the document.

    Symptom: documents break off where a page speaks of </s>; a user's message opens a turn of the assistant.
    Example: a Unigram vocabulary that holds </s> with the best score of all pieces.
    Detected: every control token inside a text, encoded with split_special_tokens=True, as `llmkit` writes token
        stores: no control id may come out.
    Tolerance: none, but a warning: it does harm only where the data hold such text.
    Spares: `tokenizer(text)` without that argument reads control tokens by design; so do added tokens that are not
        called special (<think>).
    Fix: give control tokens a score far below every piece (Unigram), or take their spelling out of the data.
    Sources: transformers#22490, transformers#25081, renderers#116.
    """
    subject.need("tokenizer")
    tokenizer, limit = subject.tokenizer, "0"
    controls = {t: int(i) for t in special_texts(tokenizer) if (i := tokenizer.convert_tokens_to_ids(t)) is not None}
    read = [t for t, i in controls.items() if i in encode(tokenizer, f"a {t} b")]  # the positive control
    if not controls:
        raise NotApplicable("the tokenizer has no control token")
    if not read:
        raise NotRun("no control token is read even where it may be: nothing could be forged")
    ids = set(controls.values())
    forged = []
    for token in read:
        for text in (f"a{token}b", f"a {token} b"):
            if found := [i for i in spelled(tokenizer, text) if i in ids - {tokenizer.unk_token_id}]:
                item = {"ids": found, "text": text, "note": f"{token!r} becomes id {found[0]}"}
                forged.append(item)
                break
    count = f"{len(forged)} of {len(read)} control tokens can be written by text"
    if forged:
        return warned(f"{count}, split_special_tokens=True notwithstanding", limit, forged)
    return passed(f"{count} in a token store; tokenizer(text) reads them, by design", limit)


@check("eos-undeclared", family="tokenizer", tier=0, catalogue="K2")
def eos_undeclared(subject: Subject) -> Outcome:
    """The tokenizer has no EOS: nothing ends a document.

    Symptom: documents run into each other in training, and generation never stops by itself.
    Example: a tokenizer.json that was wrapped without eos_token=.
    Detected: eos_token and its id.
    Tolerance: none; where the chat template ends turns by a control token, a warning.
    Spares: BOS and EOS that are one token (GPT-2).
    Fix: tokenizer.eos_token = "<|endoftext|>", a token of its vocabulary; then save it.
    Sources: lit-llama#329, TinyLlama#116, instructlab/training#672.
    """
    subject.need("tokenizer")
    tokenizer, limit = subject.tokenizer, "an EOS"
    if tokenizer.eos_token_id is not None:
        return passed(f"{tokenizer.eos_token!r} is id {tokenizer.eos_token_id}", limit)
    what = "no eos_token: `llmkit pretrain` refuses it, documents could not be told apart"
    if closing := sorted(turn_ends(tokenizer)):
        return warned(f"{what}; the template ends turns by {decode(tokenizer, closing)}", limit, [{"ids": closing}])
    return failed(what, limit)


@check("eos-behind-prompt", family="tokenizer", tier=0, catalogue="K2")
def eos_behind_prompt(subject: Subject) -> Outcome:
    """The tokenizer puts EOS behind every text, a prompt included.

    Symptom: the model answers something else, or nothing: in training, a new document begins behind EOS.
    Example: add_eos_token=True, or a post-processor of an encoder-decoder.
    Detected: a plain text is encoded with special tokens, as `tokenizer(prompt)` does.
    Tolerance: none, but a warning: a trainer may want it.
    Spares: EOS at the beginning, where it is BOS as well.
    Fix: let the data step append EOS; save the tokenizer with add_eos_token=False.
    Sources: transformers#3311, instructlab/training#672.
    """
    subject.need("tokenizer")
    tokenizer, limit = subject.tokenizer, "a prompt ends with its own text"
    if tokenizer.eos_token_id is None:
        raise NotApplicable("the tokenizer has no EOS")
    ids = encode(tokenizer, "Hello", True)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        shown = [{"ids": ids, "text": "Hello", "note": f"{tokenizer.eos_token!r} stands behind it"}]
        return warned("a prompt is ended by EOS before the model begins", limit, shown)
    return passed(f"'Hello' ends with id {ids[-1]}" if ids else "no token is put behind a text", limit)
