"""What becomes of a text on its way to ids and back, after a save, and beside the parent's tokenizer.

Owns the texts that tokenizers lose, what a tokenizer is made to lose, and the tier-0 checks of round trips.

    altered = alterations(tokenizer, {"newlines": "one\\n\\ntwo"})

Leaves out ids and control tokens (`tokenizer.py`).
"""

import json
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runner import Outcome, check, failed, first_line, passed, warned
from .spans import decode, special_texts
from .subject import NotApplicable, NotRun, Subject

# what gets lost: white space, scripts, joined emoji, code. Each is judged only as far as the vocabulary can spell it.
TORTURE = {
    "newlines": "one\n\ntwo\nthree\n",
    "tabs and indents": "def f():\n\tif x:\n\t\treturn 1\n    y = 2\n",
    "CRLF": "a\r\nb\r\n",
    "trailing blanks": "end   ",
    "leading blanks": "   start",
    "runs of blanks": "a  b   c    d",
    "digits": "1234567890 3.14159 1,000,000 2026-11-25",
    "code": 'for (int i=0; i<n; ++i) { a[i] = "x\\n"; }  // end',
    "capitals": "The iPhone of NASA",
    "accents": "Ünïcödé naïve façade",
    "decomposed accents": "e\u0301 a\u0308 n\u0303",
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd",
    "right to left": "שלום عربى",
    "ideographs": "你好，世界。こんにちは",
    "punctuation": 'Hello , world ! don\'t "quote" ... (a) [b]',
}
MARKED = "\u2581"  # SentencePiece's blank
SHOWN = 12  # characters on either side of a difference
OWN = 60  # of the user's texts, 400 characters each


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def first_difference(a: Any, b: Any) -> int:
    """Where two sequences part; the length of the shorter one where it begins the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def own_texts(subject: Subject) -> dict[str, str]:
    """Beginnings of a few dozen texts of the user's rows, by where they are."""
    found: dict[str, str] = {}
    for index, row in enumerate(subject.rows[:40]):
        for key, value in row.items():
            messages = value if isinstance(value, list) else []
            texts = [value] if isinstance(value, str) else [m.get("content") for m in messages if isinstance(m, dict)]
            for k, text in enumerate(t for t in texts if isinstance(t, str) and t):
                found[f"row {index}, {key}" + (f" {k}" if messages else "")] = text[:400]
    return dict(list(found.items())[:OWN])


# what a tokenizer is made to do


@dataclass(frozen=True)
class Nature:
    """What the parts of a tokenizer say that it does to a text by design."""

    kind: str  # bytes, pieces (SentencePiece), words (splits on white space), characters, or unknown
    parts: frozenset[str]  # types of its normaliser, pre-tokeniser and decoder
    has_decoder: bool
    adds_blank: bool  # a blank before a word


def _types(state: Any) -> Iterator[str]:
    if isinstance(state, dict):
        yield from (state["type"] for _ in range(isinstance(state.get("type"), str)))
        for value in state.values():
            yield from _types(value)
    elif isinstance(state, list):
        for value in state:
            yield from _types(value)


def _state(tokenizer: Any) -> dict[str, Any] | None:
    """The JSON of a fast tokenizer without its vocabulary, which is most of it; None for one written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts = {k: getattr(backend, k) for k in ("normalizer", "pre_tokenizer", "decoder")}
    state = {}
    for name, part in parts.items():
        try:
            state[name] = json.loads(part.__getstate__()) if part is not None else None
        except (AttributeError, TypeError, ValueError):  # one written in Python
            state[name] = {"type": "Custom"}
    return state | {"model": {"type": type(backend.model).__name__}}


def nature(tokenizer: Any) -> Nature:
    state = _state(tokenizer)
    if state is None:
        return Nature("unknown", frozenset(), True, False)
    before = set(_types(state["pre_tokenizer"]))
    parts = before | set(_types(state["normalizer"])) | set(_types(state["decoder"]))
    splits = before & {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"}
    marks = "Metaspace" in parts or MARKED in json.dumps([state["normalizer"], state["decoder"]], ensure_ascii=False)
    if "ByteLevel" in parts:
        kind = "bytes"
    elif splits or "BertNormalizer" in parts or state["model"]["type"] == "WordPiece":
        kind = "words"
    else:
        kind = "pieces" if marks else "characters"
    adds_blank = '"add_prefix_space": true' in json.dumps(state["pre_tokenizer"]) or marks
    return Nature(kind, frozenset(parts), state["decoder"] is not None, adds_blank)


def normalised(tokenizer: Any, text: str) -> str:
    """What the declared normaliser makes of a text, SentencePiece's marks as blanks."""
    normaliser = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normaliser is None or "ByteLevel" in type(normaliser).__name__:
        return text
    try:
        return str(normaliser.normalize_str(text)).replace(MARKED, " ")
    except Exception:  # one written in Python
        return text


def byte_letters() -> dict[int, str]:
    """byte -> the letter that byte-level vocabularies write for it (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(rest)}


class Alphabet:
    """The characters that a vocabulary can spell."""

    def __init__(self, tokenizer: Any):
        vocabulary = tokenizer.get_vocab()
        self.bytes: set[int] = {b for b in range(256) if f"<0x{b:02X}>" in vocabulary}
        if nature(tokenizer).kind == "bytes":
            self.bytes |= {b for b, letter in byte_letters().items() if letter in vocabulary}
        added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        self.letters = set("".join(token for token in vocabulary if token not in added))
        self.letters |= {c for c in added if len(c) == 1}  # SentencePiece models add "\n" or a tab like that
        self.letters |= {" "} if MARKED in self.letters else set()
        self.is_blind = nature(tokenizer).kind == "words"  # to white space, by design

    def lacks(self, text: str) -> set[str]:
        lacking = {c for c in set(text) if c not in self.letters and not set(c.encode("utf-8")) <= self.bytes}
        return {c for c in lacking if not (self.is_blind and c.isspace())}


# what it does

CHANGES = {
    "edge": "white space at the right edge is lost",
    "blanks": "runs of blanks are collapsed",
    "white": "white space is lost",
    "inserted": "white space is put in",
    "letters": "characters are changed",
    "case": "case, accents or width are changed",
}


@dataclass(frozen=True)
class Alteration:
    """What became of one text. `stage`: the normaliser, or the rest."""

    name: str
    text: str
    back: str
    stage: str
    what: str  # of CHANGES
    ids: tuple[int, ...] = ()

    def evidence(self) -> dict[str, Any]:
        at = first_difference(self.text, self.back)
        cut = slice(max(0, at - SHOWN), at + SHOWN)
        note = f"{self.name}: {CHANGES[self.what]} by the {self.stage}, from character {at} on"
        row = re.match(r"row (\d+),", self.name)
        found = {
            "position": at,
            "text": f"{self.text[cut]!r} -> {self.back[cut]!r}",
            "ids": list(self.ids),
            "note": note,
        }
        return ({"row": int(row[1])} if row else {}) | found


def _folded(text: str) -> str:
    """Without case, accents and width."""
    parts = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in parts if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")


def _is_part(few: str, many: str) -> bool:
    """Whether `few` comes out of `many` by leaving characters out."""
    rest = iter(many)
    return all(c in rest for c in few)


def difference(text: str, back: str) -> str | None:
    """In which way a text has changed; None where it has not, but for blanks at its left edge (a dummy prefix)."""
    if text.lstrip(" ") == back.lstrip(" "):
        return None
    if "".join(text.split()) != "".join(back.split()):
        return "case" if _folded("".join(text.split())) == _folded("".join(back.split())) else "letters"
    if text.strip() == back.strip():
        return "edge"
    if _is_part(text.strip(), back):
        return "inserted"
    is_blank_only = text.split() == back.split() and text.strip().replace(" ", "") == back.strip().replace(" ", "")
    return "blanks" if is_blank_only else "white"


def alterations(tokenizer: Any, texts: dict[str, str]) -> tuple[list[Alteration], dict[str, set[str]]]:
    """What is altered of `texts`, and by name the characters that the vocabulary lacks (those are not judged)."""
    alphabet, found, beyond = Alphabet(tokenizer), [], {}
    unknown = tokenizer.unk_token_id
    for name, text in texts.items():
        spoken = normalised(tokenizer, text)
        ids = encode(tokenizer, text)
        if what := difference(text, spoken):
            found.append(Alteration(name, text, spoken, "normaliser", what, tuple(ids[:8])))
        lacking = alphabet.lacks(spoken)
        if lacking or (unknown is not None and unknown in ids):
            beyond[name] = lacking
            continue
        back = decode(tokenizer, ids).replace(MARKED, " ")
        if what := difference(spoken, back):
            found.append(Alteration(name, spoken, back, "pre-tokeniser or decoder", what, tuple(ids[:8])))
    return found, beyond


def severity(item: Alteration, kind: Nature) -> str:
    """pass, warn or fail: the less a tokenizer of this kind is made to lose such a thing, the worse it is."""
    is_strict = kind.kind in ("bytes", "characters")
    if item.stage == "normaliser":
        if item.what == "case":
            return "pass"
        if item.what == "letters":  # of plain English nothing but case may change
            return "fail" if item.text.isascii() and item.name != "punctuation" else "warn"
        if item.what in ("edge", "inserted") or kind.kind in ("words", "unknown"):
            return "warn"
        if item.what == "blanks" and kind.kind == "pieces":  # SentencePiece's remove_extra_whitespaces
            return "warn"
        return "warn" if kind.parts & {"Precompiled", "Nmt", "BertNormalizer"} else "fail"
    if item.what in ("letters", "case"):
        return "fail" if kind.has_decoder or kind.kind == "bytes" else "warn"
    if item.what == "edge":
        return "warn"
    if item.what == "inserted":
        return "fail" if is_strict and kind.has_decoder and not kind.adds_blank else "warn"
    return "warn" if kind.kind in ("words", "unknown") else "fail"


def _own_words(tokenizer: Any) -> dict[str, str]:
    """A text of the vocabulary's own words: what a vocabulary of whole words can spell."""
    added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    words = [token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha() and token not in added]
    return {"words of the vocabulary": " ".join(sorted(words, key=lambda w: (-len(w), w))[:20])} if words else {}


def stripping_tokens(tokenizer: Any) -> list[dict[str, Any]]:
    """Control tokens that eat white space on both sides of them."""
    found = []
    spared = {getattr(tokenizer, "mask_token", None)} | {tokenizer.pad_token} - {tokenizer.eos_token}
    for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if not (getattr(token, "lstrip", False) and getattr(token, "rstrip", False)) or str(token) in spared:
            continue
        text = f"a \n{token}\n b"
        back = decode(tokenizer, encode(tokenizer, text))
        if back != text:
            found.append({"ids": [token_id], "note": f"{token} strips both sides", "text": f"{text!r} -> {back!r}"})
    return found


@check("text-lost", family="tokenizer", tier=0, catalogue="K4")
def text_lost(subject: Subject) -> Outcome:
    """Encoding and decoding a text does not give it back.

    Symptom: generated code has no line breaks or indents; spaces before punctuation vanish in answers.
    Example: a newline that pre-tokenisation throws away; a control token declared with lstrip and rstrip.
    Detected: a torture set (line breaks, tabs, indents, CRLF, trailing blanks, joined emoji, accents in both forms,
        right to left, digits, code), the user's own rows, and text around each control token go there and back.
    Tolerance: what the vocabulary can spell must come back; white space at the left edge does not count.
    Spares: characters that the vocabulary lacks (counted; a warning where they are in the user's rows), a dummy
        prefix, lower-casing, accent-stripping and NFKC normalisers (noted), tokens that strip on one side. A warning:
        tokenizers that split on white space or collapse blanks by design, white space lost at the right edge, blanks
        that come in because there is no decoder.
    Fix: keep white space in the pre-tokeniser and decoder; declare special tokens without lstrip and rstrip.
    Sources: transformers#21120, #24569, #33371, tokenizers#959.
    """
    subject.need("tokenizer")
    tokenizer, kind, own = subject.tokenizer, nature(subject.tokenizer), own_texts(subject)
    texts = TORTURE | _own_words(tokenizer) | own
    altered, beyond = alterations(tokenizer, texts)
    if len(beyond) == len(texts):
        raise NotRun("no sample can be spelled by this vocabulary")
    grades: dict[str, list[Alteration]] = {"fail": [], "warn": [], "pass": []}
    for item in sorted(altered, key=lambda item: item.name not in own):  # the user's rows first
        grades[severity(item, kind)].append(item)
    stripped = stripping_tokens(tokenizer)
    lost = grades["fail"] + grades["warn"]
    names = {item.name for item in lost}
    measured = f"{len(names)} of {len(texts)} texts come back otherwise"
    if mine := len(names & set(own)):
        measured += f", {mine} of them from the rows"
    measured += f"; {len(beyond)} hold characters outside the vocabulary" if beyond else ""
    changed = {item.name for item in grades["pass"]}
    measured += f"; the normaliser changes case, accents or width in {len(changed)}" if changed else ""
    if stripped:
        measured += f"; white space around {stripped[0]['note'].split()[0]} is eaten"
        return failed(measured, "0", [*stripped, *(item.evidence() for item in lost[:4])])
    if grades["fail"]:
        return failed(measured, "0", [item.evidence() for item in lost[:6]])
    missing = set(own) & set(beyond)
    evidence = [item.evidence() for item in lost[:5]]
    if len(missing) > 0.1 * len(own):
        evidence += [
            {"text": "".join(sorted(beyond[name])) or own[name][:40], "note": f"{name}: characters without an id"}
            for name in sorted(missing)[:3]
        ]
    is_white = any(item.what in ("white", "blanks") for item in lost)
    fix = "none, if this tokenizer is meant to drop white space: no model can learn it then" if is_white else None
    return warned(measured, "0", evidence, fix) if evidence else passed(measured, "0")


# after a save


def _fingerprint(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    return {
        "ids": [encode(tokenizer, text) for text in texts],
        "special tokens around a text": encode(tokenizer, "Hello", True),
        "special ids": {k: getattr(tokenizer, f"{k}_id") for k in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "control tokens": special_texts(tokenizer),
        "chat template": getattr(tokenizer, "chat_template", None),
        "padding side": tokenizer.padding_side,
        "vocabulary size": len(tokenizer),
        "decoding": [decode(tokenizer, encode(tokenizer, text)) for text in texts],
    }


@check("tokenizer-changes-on-reload", family="tokenizer", tier=0, catalogue="K4")
def tokenizer_changes_on_reload(subject: Subject) -> Outcome:
    """The tokenizer that is saved is not the one that comes back.

    Symptom: the published model answers worse than the one that was evaluated.
    Example: a chat template that is not saved; a change of the backend that only lives in memory.
    Detected: save_pretrained and from_pretrained in a temporary folder: ids of a torture set and their decoding,
        special ids, template.
    Tolerance: none; a padding side that was set after loading: a warning.
    Spares: fields that say where a tokenizer came from.
    Fix: make the change before saving through the tokenizer's own methods, and save the template with it.
    Sources: transformers#25814, LlamaFactory#5232, llama-cpp-rs#1096.
    """
    subject.need("tokenizer")
    tokenizer = subject.tokenizer
    if not hasattr(tokenizer, "save_pretrained"):
        raise NotApplicable("the tokenizer cannot be saved")
    texts = [*TORTURE.values(), *(f"a{t}b" for t in special_texts(tokenizer)[:20])]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            loaded = load_again(tokenizer, folder)
        except Exception as error:
            return failed("what was saved cannot be loaded", "equal", [{"note": first_line(error)}])
    a, b = _fingerprint(tokenizer, texts), _fingerprint(loaded, texts)
    bad = [key for key in a if a[key] != b[key]]
    evidence: list[dict[str, Any]] = []
    for key in bad:
        if key in ("ids", "decoding"):
            k = next(k for k in range(len(texts)) if a[key][k] != b[key][k])
            was, now = a[key][k][:12], b[key][k][:12]
            evidence.append({"text": texts[k], "note": f"{key}: {was!r} -> {now!r}"})
        elif key == "chat template":
            evidence.append({"note": "the chat template is another one" if b[key] else "the chat template is gone"})
        else:
            evidence.append({"note": f"{key}: {a[key]!r} -> {b[key]!r}"[:200]})
    if bad == ["padding side"]:  # transformers writes the one that it was loaded with
        return warned("padding side changed", "equal", evidence, "set tokenizer.padding_side after loading")
    if bad:
        return failed(f"{', '.join(bad)} changed", "equal", evidence)
    return passed(f"{len(texts)} texts, special ids and template are the same", "equal")


def load_again(tokenizer: Any, folder: str) -> Any:
    """As a fresh process would; a class of the user's own, which no Auto class knows, by itself."""
    from transformers import AutoTokenizer

    config = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "auto_map" in config or not type(tokenizer).__module__.startswith("transformers."):
        return type(tokenizer).from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


# beside the parent


@check("tokenizer-differs-from-reference", family="tokenizer", tier=0, catalogue="K4")
def tokenizer_differs_from_reference(subject: Subject) -> Outcome:
    """Texts have other ids than under the parent's tokenizer.

    Symptom: a fine-tuned model starts far above its parent's loss.
    Example: another pre-tokeniser expression after a conversion; digits split otherwise; a BOS that is no longer added.
    Detected: ids of a torture set and of the user's rows under this tokenizer and that of --reference, and the special
        tokens that each puts around a text.
    Tolerance: none.
    Spares: tokens that were added; a message that a library prints says nothing, only ids do.
    Fix: use the parent's tokenizer.json and add tokens to it.
    Sources: transformers#42131, #42591, Tokenicer#61.
    """
    subject.need("tokenizer", "reference_tokenizer")
    mine, theirs = subject.tokenizer, subject.reference_tokenizer
    known = theirs.get_vocab()
    added = [t for t in map(str, getattr(mine, "added_tokens_decoder", {}).values()) if t not in known]
    texts = TORTURE | own_texts(subject)
    bad = []
    for name, text in texts.items():
        a, b = encode(mine, text), encode(theirs, text)
        if a != b and not any(t in text for t in added):
            at = first_difference(a, b)
            bad.append(
                {"position": at, "ids": a[:12], "text": text[:60], "note": f"{name}: the reference has {b[:12]}"}
            )
    around = [encode(t, "Hello", True) for t in (mine, theirs)]
    if around[0] != around[1] and not bad:
        note = f"special tokens around a text: the reference has {around[1]}"
        return failed("special tokens around a text differ", "0", [{"ids": around[0], "note": note}])
    if bad:
        return failed(f"{len(bad)} of {len(texts)} texts have other ids", "0", bad[:5])
    return passed(f"{len(texts)} texts have the reference's ids", "0")
