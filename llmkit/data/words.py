"""Words as numbers: what duplicates and contamination are compared by.

    normalise("Ｔhe  CAT")  -> "the cat";  word_hashes(text)  -> (num_words,) uint64;  ngrams(hashes, 13)

Two texts that differ in case, compatibility forms (NFKC) or white space are the same here. A word is a run of letters
and digits; scripts without blanks between words count every character. Light: this runs in worker processes.
"""

import re
import unicodedata
from collections.abc import Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
ASCII_WORD = re.compile(r"\w+", re.ASCII)
MIX = np.uint64(0x9E3779B97F4A7C15)
RUN = 13  # words in a row that two texts share by contamination only (Brown et al. 2020)
CACHED_WORDS = 1_000_000  # about 150 MB; then it starts afresh


class _Hashes(dict[str, int]):
    """word -> its hash, computed when it is first asked for."""

    def __missing__(self, word: str) -> int:
        self[word] = value = xxhash.xxh3_64_intdigest(word.encode())
        return value


_cache = _Hashes()


def normalise(text: str) -> str:
    """NFKC, case folded, runs of white space as one blank."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """The text in parts of about `size` characters, each but the first beginning at a blank or a line end.

    A list of the words of a long text takes 13 times its memory; one of a part does not matter.
    """
    start = 0
    while len(text) - start > size:
        stop = start + size
        cut = max(text.rfind(" ", start + 1, stop), text.rfind("\n", start + 1, stop))
        if cut < 0:
            cut = min((at for at in (text.find(" ", stop), text.find("\n", stop)) if at >= 0), default=len(text))
        yield text[start:cut]
        start = cut
    yield text[start:]


def text_hash(text: str) -> tuple[int, int]:
    """128 bits of the normalised text, as two numbers."""
    digest = xxhash.xxh3_128()
    for number, part in enumerate(filter(None, map(normalise, pieces(text)))):
        digest.update(b" " * (number > 0) + part.encode("utf-8", "surrogatepass"))
    value = digest.intdigest()
    return value >> 64, value & (1 << 64) - 1


def words(text: str) -> Iterator[str]:
    for part in map(normalise, pieces(text)):
        yield from (ASCII_WORD if part.isascii() else WORD).findall(part)


def word_hashes(text: str) -> NDArray[np.uint64]:
    """One hash for each word of the normalised text, in order: (num_words,)."""
    if len(_cache) > CACHED_WORDS:
        _cache.clear()
    return np.fromiter(map(_cache.__getitem__, words(text)), np.uint64)


def ngrams(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A hash for each window of n words, in order: (max(0, num_words - n + 1),)."""
    if len(hashes) < n:
        return np.empty(0, np.uint64)
    count = len(hashes) - n + 1
    out = np.zeros(count, np.uint64)
    for k in range(n):  # wraps at 2^64 on purpose
        out = (out ^ hashes[k : k + count]) * MIX
        out ^= out >> np.uint64(29)
    return out
