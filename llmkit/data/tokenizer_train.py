"""`llmkit tokenizer train`: a tokenizer folder from text, checked before anything is trained with it.

Owns the verb and which text it sees.   code = main(settings)

Every data set gives as many bytes (by its `fraction`, where it has one) until it ends. Leaves out the training itself
(`tokenizer.py`) and the checks (`tokenizer_check.py`).
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..check.verb import make_console
from ..config import UserError
from ..run import written_beside
from ..verbs import TokenizerTrainConfig
from .sources import Source, documents, parse_sources
from .tokenizer import BOS, EOS, PAD, UNK, load_tokenizer, save_tokenizer, train_tokenizer
from .tokenizer_check import check_outputs, examine, shards_of
from .tokenizer_report import progress
from .vocabulary import pieces, within, without_surrogates


class Sample:
    """The pieces of text of all sources, up to `max_bytes`; knows what it gave."""

    def __init__(self, sources: list[Source], data_dir: Path, max_bytes: float, on_bytes: Callable[[int], object]):
        self.sources, self.data_dir, self.max_bytes, self.on_bytes = sources, data_dir, max_bytes, on_bytes
        self.num_bytes = [0] * len(sources)
        self.is_cut = False

    def __iter__(self) -> Iterator[str]:
        streams = {
            i: (piece for doc in documents(source, self.data_dir) for piece in pieces(doc.text))
            for i, source in enumerate(self.sources)
        }
        while streams:
            i = min(streams, key=lambda i: self.num_bytes[i] / (self.sources[i].fraction or 1))
            piece = next(streams[i], None)
            if piece is None:
                del streams[i]
                continue
            room = self.max_bytes - sum(self.num_bytes)
            piece, num_bytes, self.is_cut = within(without_surrogates(piece)[0], room)
            self.num_bytes[i] += num_bytes
            self.on_bytes(sum(self.num_bytes))
            yield piece
            if self.is_cut:
                return


def main(settings: TokenizerTrainConfig) -> int:
    """Trains, writes the folder and checks it; the exit code of `llmkit check`. Raises UserError."""
    control = _check_settings(settings)
    folder, console = Path(settings.output_dir), make_console()
    folder.parent.mkdir(parents=True, exist_ok=True)  # a page may lie there, too
    check_outputs(settings)
    template = _template(settings.chat_template_path)
    sources = parse_sources(settings.datasets, "datasets")
    is_char = settings.tokenizer_type == "char"
    started = time.perf_counter()
    with progress() as say:
        most = None if is_char else settings.max_train_bytes
        sample = Sample(
            sources, Path(settings.data_dir), float("inf") if is_char else most or 0, lambda n: say("reading", n, most)
        )
        texts = _then(sample, lambda: say("learning merges", sum(sample.num_bytes), None))
        kind, size = settings.tokenizer_type, settings.vocab_size
        tokenizer = train_tokenizer(kind, texts, size, settings.add_bos_token, control)
    if not sum(sample.num_bytes):
        raise UserError("datasets: no text in them; point at files or a split that has some")
    tokenizer.chat_template = template
    with written_beside(folder) as partial:
        save_tokenizer(tokenizer, partial)
    shards = shards_of(settings)
    for line in summary(settings, sample, [s.name for s in shards], len(tokenizer), time.perf_counter() - started):
        console.print(line, soft_wrap=True)
    console.print()
    return examine(load_tokenizer(str(folder)), settings.output_dir, shards, settings)


def _check_settings(settings: TokenizerTrainConfig) -> list[str]:
    """The control tokens. Raises UserError for what conflicts, would be ignored, or is there already."""
    folder = Path(settings.output_dir)
    if not settings.output_dir:
        raise UserError("output_dir is missing; name a folder, e.g. --output_dir runs/my/tokenizer")
    if folder.exists():
        raise UserError(f"output_dir={settings.output_dir!r}: exists already; choose another folder, or remove it")
    if not settings.datasets:
        raise UserError("datasets is missing; name text, e.g. datasets: [{path: text, data_files: corpus.txt}]")
    if settings.max_train_bytes < 1:
        raise UserError(f"max_train_bytes={settings.max_train_bytes}; allowed: 1 or more")
    for key, why in (("vocab_size", "every character seen gets an id"), ("max_train_bytes", "it reads all the text")):
        if settings.tokenizer_type == "char" and getattr(settings, key) != getattr(TokenizerTrainConfig(), key):
            raise UserError(f"{key}={getattr(settings, key)} has no effect on tokenizer_type: char, {why}; remove it")
    return _control_tokens(settings)


def _control_tokens(settings: TokenizerTrainConfig) -> list[str]:
    seen = {BOS, EOS, PAD, UNK}
    tokens: list[str] = []
    for key in ("chat_tokens", "special_tokens"):
        for token in getattr(settings, key):
            if not isinstance(token, str) or len(token) < 2 or token != token.strip():
                raise UserError(f"{key}: {token!r}; allowed: text of two or more characters, no blanks around it")
            if token in seen:
                raise UserError(f"{key}: {token!r} is there already; leave it out")
            seen.add(token)
            tokens.append(token)
    return tokens


def _template(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"chat_template_path={name!r}: cannot be read ({reason}); name a .jinja file") from None


def _then(texts: Any, end: Callable[[], object]) -> Iterator[str]:
    yield from texts
    end()


def summary(
    settings: TokenizerTrainConfig, sample: Sample, names: list[str], num_ids: int, seconds: float
) -> list[str]:
    """What was read, made and written, a line each."""
    parts = ", ".join(f"{name} {n / 1e6:.2f} MB" for name, n in zip(names, sample.num_bytes, strict=True))
    how_much = f"the first {sum(sample.num_bytes) / 1e6:.2f} MB (max_train_bytes)" if sample.is_cut else "all of it"
    kind = "char-level" if settings.tokenizer_type == "char" else "byte-level BPE"
    few = ""
    if settings.tokenizer_type == "bpe" and num_ids < settings.vocab_size:
        few = f"; vocab_size={settings.vocab_size:,} was not reached: the text has no more pairs to merge"
    return [
        f"read      {parts}: {how_much}",
        f"trained   {kind}, {num_ids:,} ids in {seconds:.1f} s{few}",
        f"saved     {settings.output_dir}",
    ]
