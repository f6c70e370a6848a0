"""`llmkit tokenizer check`: any tokenizer, by the checks of `llmkit check`, and on the user's own text.

Owns which checks run and on what.   code = main(settings)

Leaves out the checks (`llmkit/check`), the counting (`vocabulary.py`) and how it looks (`tokenizer_report.py`).
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from glob import escape
from pathlib import Path
from typing import Any

from ..check.attach import load_tokenizer, read_rows, selection
from ..check.console import print_report
from ..check.page import page
from ..check.report import Report
from ..check.runner import run
from ..check.subject import Subject
from ..check.torture import nature
from ..check.verb import check_file, make_console
from ..config import UserError
from ..report.plots import plot_frequencies
from ..run import resolve_model_dir, write_bytes, write_json, write_text
from ..verbs import TokenizerCheckConfig, TokenizerTrainConfig
from .encode import id_dtype
from .sources import SUFFIXES, Source, documents, parse_sources
from .tokenizer_report import STYLE, print_figures, progress, section
from .vocabulary import Shard, count_shard, shard_figures, vocabulary_figures

Settings = TokenizerCheckConfig | TokenizerTrainConfig
SLOW_BYTES = 1_000_000  # of each shard, for a tokenizer written in Python
OWN = 40  # texts of the user's that the checks look at
CONTENTS = ("text", "prompt", "completion", "chosen", "rejected", "messages")  # TRL's columns with text


@dataclasses.dataclass(frozen=True)
class Texts:
    """A named shard of text. `rows`: in TRL's columns, where it came as such."""

    name: str
    read: Callable[[], Iterator[str]]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def main(settings: TokenizerCheckConfig) -> int:
    """0, 1 or 3, as `llmkit check`; raises UserError for 2."""
    if not settings.tokenizer_name:
        raise UserError("tokenizer_name is missing; name a folder or a Hub id, e.g. --tokenizer_name runs/my/tokenizer")
    check_outputs(settings)
    shards = shards_of(settings)
    name = resolve_model_dir(settings.tokenizer_name)
    path = Path(name)
    if not path.exists() and name.startswith((".", "/", "~")):
        raise UserError(f"tokenizer_name={name!r}: no such folder; name a tokenizer folder or a Hub id")
    if path.is_dir() and not any(path.glob("*token*")) and not any(path.glob("vocab*")):
        raise UserError(f"tokenizer_name={name!r}: holds no tokenizer; name a folder with tokenizer.json")
    tokenizer = load_tokenizer(name, settings.trust_remote_code, "tokenizer_name")
    return examine(tokenizer, settings.tokenizer_name, shards, settings)


def check_outputs(settings: Settings) -> None:
    """Raises UserError for settings that could only fail at the end."""
    selection(0, (), (), settings.check_ignore)
    if settings.max_check_bytes < 1:
        raise UserError(f"max_check_bytes={settings.max_check_bytes}; allowed: 1 or more")
    for key in ("json", "html", "plot"):
        if value := getattr(settings, key):
            check_file(key, Path(value))
    has_text = bool(settings.datasets or getattr(settings, "dataset", None))
    if settings.plot and not has_text:
        raise UserError(f"plot={settings.plot!r}: nothing to draw without text; give datasets, or --dataset FILE")
    if (settings.plot or (settings.html and has_text)) and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{'plot' if settings.plot else 'html'} needs matplotlib: `pip install matplotlib`")


def shards_of(settings: Settings) -> list[Texts]:
    """What `datasets` and `dataset` name; nothing is read yet, except rows that are not plain text."""
    sources = parse_sources(settings.datasets, "datasets")
    data_dir = Path(settings.data_dir)
    shards = [Texts(_name(source), _reader(source, data_dir)) for source in sources]
    if name := getattr(settings, "dataset", None):
        shards.append(_rows_of(name))
    seen: dict[str, int] = {}
    for k, shard in enumerate(shards):
        seen[shard.name] = seen.get(shard.name, 0) + 1
        if seen[shard.name] > 1:
            shards[k] = dataclasses.replace(shard, name=f"{shard.name} {seen[shard.name]}")
    return shards


def _name(source: Source) -> str:
    files = source.data_files[0] if isinstance(source.data_files, list) else source.data_files
    return source.shard or source.name or Path(files or source.path).stem


def _reader(source: Source, data_dir: Path) -> Callable[[], Iterator[str]]:
    return lambda: (doc.text for doc in documents(source, data_dir))


def _rows_of(name: str) -> Texts:
    path = Path(name)
    if path.suffix in SUFFIXES and not path.is_file():
        raise UserError(f"dataset={name!r}: no such file; name one that is there, or a Hub id")
    if path.suffix == ".txt":  # with its line ends, which rows would lose
        source = Source(path="text", data_files=escape(str(path.resolve())))
        return Texts(path.stem, _reader(source, Path("/")))
    rows = read_rows(name, "dataset")
    return Texts(path.stem, lambda: (text for row in rows for text in _contents(row)), rows)


def _contents(row: dict[str, Any]) -> Iterator[str]:
    """The texts of a row, without the template's markup."""
    for value in (row.get(column) for column in CONTENTS):
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            text = part.get("content") if isinstance(part, dict) else part
            if isinstance(text, str) and text:
                yield text


def examine(tokenizer: Any, target: str, texts: list[Texts], settings: Settings) -> int:
    """Counts, checks, prints and writes; the exit code. Raises UserError for a shard without text."""
    shards = _count(tokenizer, texts, settings.max_check_bytes)
    report = _check(tokenizer, target, texts, shards, settings)
    figures = get_figures(tokenizer, target, shards)
    if settings.redact:
        report = report.redacted()
        for items in (figures.get("vocabulary", {}).get(key, []) for key in ("commonest", "longest")):
            for item in items:
                del item["text"]
    written = _write(report, figures, settings)  # first: whoever reads the output may close it
    console = make_console()
    print_figures(figures, console)
    print_report(report, console)
    if not shards:
        console.print("how it suits your text: add --dataset FILE, or datasets", style="dim")
    for key in written:
        print(f"{key}: {getattr(settings, key)}")
    return report.exit_code


def _count(tokenizer: Any, texts: list[Texts], max_bytes: int) -> list[Shard]:
    most = max_bytes if getattr(tokenizer, "is_fast", False) else min(max_bytes, SLOW_BYTES)
    shards = []
    with progress() as say:
        for item in texts:
            on_bytes = functools.partial(say, f"encoding {item.name}", most=most)
            on_bytes(0)
            shard = count_shard(item.name, item.read(), tokenizer, most, on_bytes)
            if not shard.num_tokens:
                raise UserError(
                    f"{item.name}: no text in it ({shard.num_documents} empty documents); "
                    "point at a file or split that has some"
                )
            shards.append(shard)
    return shards


def _check(tokenizer: Any, target: str, texts: list[Texts], shards: list[Shard], settings: Settings) -> Report:
    share = max(1, OWN // max(len(shards), 1))
    chats = [row for item in texts for row in item.rows[:OWN] if "text" not in row]
    subject = Subject(target, tokenizer=tokenizer, is_chat=bool(chats))
    subject.rows = chats + [{"text": text} for shard in shards for text in shard.excerpts[:share]]
    subject.settings["store_dtype"] = id_dtype(len(tokenizer)).name
    families = ("tokenizer", *(["template"] if getattr(tokenizer, "chat_template", None) else []))
    return run(subject, selection(2, families, (), settings.check_ignore))


def get_figures(tokenizer: Any, target: str, shards: list[Shard]) -> dict[str, Any]:
    """What the JSON file holds beside the checks."""
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    vocabulary = tokenizer.get_vocab()
    special = {k: getattr(tokenizer, k) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    found: dict[str, Any] = {
        "tokenizer": {
            "name": target,
            "class": type(tokenizer).__name__,
            "kind": nature(tokenizer).kind,
            "is_fast": is_fast,
            "ids": len(vocabulary),
            "largest_id": max(vocabulary.values()),
            "store_dtype": id_dtype(len(tokenizer)).name,
            **special,
            "has_chat_template": bool(getattr(tokenizer, "chat_template", None)),
        },
        "shards": {shard.name: shard_figures(shard) for shard in shards},
        "notes": [],
    }
    if not is_fast and shards:
        size = f"{SLOW_BYTES / 1e6:.0f} MB"
        found["notes"].append(f"the tokenizer is written in Python: slow, so max_check_bytes is at most {size}")
    if shards:
        found["vocabulary"] = vocabulary_figures(shards, tokenizer)
    return found


def _write(report: Report, figures: dict[str, Any], settings: Settings) -> list[str]:
    """The keys of the files that were asked for, each written whole or not at all."""
    png = None
    if figures["shards"] and (settings.html or settings.plot):
        curves = {name: shard["curve"] for name, shard in figures["shards"].items()}
        png = plot_frequencies(curves, f"{figures['vocabulary']['ids']:,} ids: uses against rank")
    if settings.json:
        write_json(Path(settings.json), report.to_dict() | figures)
    if settings.html:
        html = page(report, section(figures, png), STYLE)
        write_text(Path(settings.html), html)
    if settings.plot and png is not None:
        write_bytes(Path(settings.plot), png)
    return [key for key in ("json", "html", "plot") if getattr(settings, key)]
