r"""Where a long document may be cut so that the ids of its pieces, one after the other, are the ids of the whole.

    find_cut = cut_finder(core)           # None: this tokenizer gives no such place
    find_cut(text, low, high)             # the last place p with low < p <= high, or None

Why it matters: `tokenizers` holds 300 to 420 bytes of memory per token while it encodes, so one line of 200 MB takes
20 GB. Cutting anywhere changes ids; cutting where the following holds does not. Leaves out the encoding.

The proof. A tokenizer works through the text in four steps; each must give the same left and right of the cut p as on
the two pieces alone. Two kinds of place are used, both next to white space:

    word   between an ASCII letter and a blank that an ASCII letter follows: `the| cat`
    line   after a line feed that follows a character x which is not white space, before a letter: `end.\n|Next`

1. Added tokens are found by their text alone. One that crosses p would hold white space, as both kinds of p have some
   directly beside them; so tokenizers with such tokens are left out, and those whose tokens look at or swallow their
   neighbours (lstrip, rstrip, single_word). Of special tokens only the text counts: in a text they are not looked for,
   yet a match of one hides what overlaps it.
2. The normalizer: none, Lowercase (character by character), or NFC, NFD, NFKC, NFKD. Before a blank, and after a line
   feed, nothing composes or is reordered across (both have combining class 0 and occur in no composition), and both
   stay what they are. A letter of `line` stays a letter under NFC and NFD, not under NFKC (U+FC5E becomes a blank and
   two marks), where x and the letter must be ASCII. That x does not become white space is checked for every character
   there is by the tests.
3. The pre-tokenizer.
   a) One token per character ([\s\S], no normalizer, no added tokens that are looked for): every place will do.
   b) The regular expressions below, isolated. They have no look-behind and no anchor, so what is found from p on
      depends on the text from p on. It remains that no match holds both sides of p, and that every match before p is
      the same when the text ends at p.
      word: p - 1 is a letter. Each alternative that can hold a letter ends with its run of letters (or a contraction
      of ' and letters after it), so ends at p, before a blank as at the end of the text; a blank stands only at the
      beginning of a match. No \s+ ends at p; its look-ahead (?!\S) from further left sees the same characters.
      line: p - 1 is \n and p - 2 is x. Either x is neither letter, number nor white space: then
      ` ?[^\s\p{L}\p{N}]+[\r\n]*` (o200k: [\r\n/]*) takes x and \n and ends before the letter as at the end. Or no
      match holds both: then one begins at \n, and \s*[\r\n]+ takes just it; the letter is no part of it, as
      [^\r\n\p{L}\p{N}]? may not be a line feed. In GPT-2's, which has neither [\r\n] rule, \n is taken by \s+ where
      a letter follows and by \s+(?!\S) where the text ends: the same one character. (After a blank it would not be:
      `  \n` at the end is one match, before a letter two. Hence x.)
      A ByteLevel behind it maps what it is given, piece by piece. With add_prefix_space GPT-2's puts a blank before a
      text without one, so only `word` will do.
   c) Whitespace, WhitespaceSplit, BertPreTokenizer first: white space parts tokens and belongs to none, and what
      belongs together within a word does not look beyond it; likewise Digits, Punctuation, ByteLevel behind them.
4. The model sees one pre-token at a time; only BPE's dropout makes it draw lots.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

FindCut = Callable[[str, int, int], int | None]

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # also cl100k, as it is converted
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
REGEXES = frozenset([_QWEN2, _QWEN35, _LLAMA3, _O200K, _TEKKEN])
ANY_CHARACTER = r"[\s\S]"
PARTED_BY_WHITE_SPACE = frozenset(["Whitespace", "WhitespaceSplit", "BertPreTokenizer"])
WITHIN_A_WORD = frozenset(["Digits", "Punctuation", "ByteLevel", *PARTED_BY_WHITE_SPACE])
NORMALIZERS = frozenset(["NFC", "NFD", "NFKC", "NFKD", "Lowercase"])
STRIDE = 4096  # characters looked through at a time, from the end: a cut is rarely far

_WORD = r"(?<=[A-Za-z])(?= [A-Za-z])"
_NOT_BLANK = r"[^\s\u0085\u180e\u200b]"  # whatever any version of Unicode called white space


def _ranges(chars: list[int]) -> str:
    """The inside of a character class."""
    starts = [c for i, c in enumerate(chars) if i == 0 or chars[i - 1] != c - 1]
    ends = [c for i, c in enumerate(chars) if i == len(chars) - 1 or chars[i + 1] != c + 1]
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(starts, ends, strict=True))


def _letters() -> str:
    """Letters of Unicode 3.2 that still are: the regex engine of `tokenizers` may know another version than Python."""
    old, new = unicodedata.ucd_3_2_0.category, unicodedata.category
    return _ranges([c for c in range(0x10000) if old(chr(c))[0] == new(chr(c))[0] == "L"])


@functools.cache
def _pattern(kinds: tuple[str, ...], is_ascii: bool) -> re.Pattern[str]:
    line = r"(?<=[!-~]\n)(?=[A-Za-z])" if is_ascii else rf"(?<={_NOT_BLANK}\n)(?=[{_letters()}])"
    return re.compile("|".join({"word": _WORD, "line": line}[kind] for kind in kinds))


def _parts(state: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences flattened."""
    if state is None:
        return []
    return [part for s in state[inner] for part in _parts(s, inner)] if state["type"] == "Sequence" else [state]


def _state(component: Any) -> dict[str, Any] | None:
    return None if component is None else json.loads(component.__getstate__())


def _split(part: dict[str, Any]) -> str | None:
    """The regular expression of an isolating split."""
    plain = part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]
    return part["pattern"].get("Regex") if plain else None


def _kinds(parts: list[dict[str, Any]]) -> tuple[str, ...]:
    """Which of `word` and `line` a pre-tokenizer allows."""
    if not parts:
        return ()
    first, rest = parts[0], parts[1:]
    if first["type"] in PARTED_BY_WHITE_SPACE and all(part["type"] in WITHIN_A_WORD for part in rest):
        return ("word", "line")
    if first["type"] == "ByteLevel" and first["use_regex"] and not rest:
        return ("word",) if first["add_prefix_space"] else ("word", "line")
    mapped = all(p["type"] == "ByteLevel" and not p["use_regex"] and not p["add_prefix_space"] for p in rest)
    return ("word", "line") if _split(first) in REGEXES and mapped else ()


def cut_finder(core: Tokenizer) -> FindCut | None:
    """How to find a place where a text may be cut; None where no place is known to leave the ids as they are."""
    if not isinstance(core, Tokenizer):
        return None  # a tokenizer written in Python
    added = core.get_added_tokens_decoder().values()
    normalizers = _parts(_state(core.normalizer), "normalizers")
    parts = _parts(_state(core.pre_tokenizer), "pretokenizers")
    if getattr(core.model, "dropout", None):
        return None
    if len(parts) == 1 and _split(parts[0]) == ANY_CHARACTER and not normalizers and all(t.special for t in added):
        return lambda text, low, high: high
    if any(token.lstrip or token.rstrip or token.single_word for token in added) or any(
        re.search(r"\s", unicodedata.normalize("NFKC", token.content) + token.content) for token in added
    ):
        return None
    names = {part["type"] for part in normalizers}
    kinds = _kinds(parts)
    if not names <= NORMALIZERS or not kinds:
        return None
    is_ascii = bool(names & {"NFKC", "NFKD"})
    return lambda text, low, high: _last(_pattern(kinds, is_ascii), text, low, high)


def _last(pattern: re.Pattern[str], text: str, low: int, high: int) -> int | None:
    """The last match p, low < p <= high."""
    stop = high
    while stop > low:
        start = max(low, stop - STRIDE)
        found = [m.start() for m in pattern.finditer(text, start + 1, stop + 2) if m.start() <= stop]
        if found:
            return found[-1]
        stop = start
    return None
