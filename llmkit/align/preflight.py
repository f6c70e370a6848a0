"""An SFT recipe as a subject of the checks: its own trainer, handed over like anyone's.

subject = get_subject(config, tier=2)      # llmkit check recipe.yaml, llmkit inspect recipe.yaml
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..check.attach import builder, from_parts
from ..check.subject import Subject
from ..data.chat import Bad, load_rows
from ..data.sources import parse_sources
from ..run import check_output_dir, quiet_libraries, resolve_model_dir
from ..train.overfit import for_overfit
from ..verbs import SftConfig
from .build import check_config, get_tokenizer, model_config
from .rows import Labeller, has_chats
from .sft import prepare

ROWS = 400  # handed over raw


def get_subject(config: SftConfig, tier: int, is_data_only: bool = False, is_start: bool = False) -> Subject:
    """Tokenizer, template, config and raw rows for tier 0; the trainer itself from tier 1. Raises UserError as `sft`.

    `is_data_only` changes nothing: rows come out of the whole trainer. `is_start`: output_dir must be free.
    """
    quiet_libraries()
    config = for_overfit(config)
    check_config(config)
    if is_start and not config.resume_from_checkpoint:
        check_output_dir(Path(config.output_dir))
    if tier == 0:
        return _files_only(config)
    job = prepare(config, Console(quiet=True))
    subject = from_parts(trainer=job.trainer, dataset=_raw(job.data.train), target=config.model_name_or_path)
    subject.eval_rows = [row for rows in job.data.shards.values() for row in _raw(rows)][:ROWS]
    subject.is_chat = job.template.sha256 is not None
    _locate(subject, config)
    return subject


def _files_only(config: SftConfig) -> Subject:
    sources = parse_sources(config.datasets, "datasets")
    parse_sources(config.eval_datasets, "eval_datasets")
    is_chat = any(has_chats(source, config) for source in sources)
    tokenizer, _ = get_tokenizer(config, is_chat)
    rows = list(
        itertools.islice(
            (row for row in load_rows(sources[0], Path(config.data_dir)) if not isinstance(row, Bad)), ROWS
        )
    )
    settings = dataclasses.asdict(config)
    if rows:
        settings |= Labeller(tokenizer, config).settings(rows[0])
    subject = Subject(
        target=config.model_name_or_path,
        tokenizer=tokenizer,
        config=model_config(config),
        rows=rows,
        settings=settings,
        is_chat=is_chat,
        make_model=builder(config.trust_remote_code),
    )
    text_config = subject.config.get_text_config()
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))  # as the run grows it
    _locate(subject, config)
    return subject


def _locate(subject: Subject, config: SftConfig) -> None:
    path = Path(resolve_model_dir(config.model_name_or_path))
    subject.folder = path if path.is_dir() else None
    subject.trust_remote_code = config.trust_remote_code


def _raw(rows: Any) -> list[dict[str, Any]]:
    return [json.loads(text) for text in rows.select(range(min(ROWS, len(rows))))["raw"]]
