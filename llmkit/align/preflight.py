"""A tuning recipe as a subject of the checks: its own trainer, handed over like anyone's.

subject = get_subject(config, tier=2)      # llmkit check recipe.yaml, llmkit inspect recipe.yaml
"""

import dataclasses
import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..check.attach import builder, from_parts
from ..check.subject import Subject
from ..data.chat import ANSWERS, LABELLED, PAIRS, PROMPTS, RANKED, Bad, load_rows
from ..data.preferences import as_answers
from ..data.sources import parse_sources
from ..run import check_output_dir, quiet_libraries, resolve_model_dir
from ..train.overfit import for_overfit
from ..tuning import DpoConfig, GrpoConfig, KtoConfig, RewardConfig, RrhfConfig, SftConfig, TuningConfig
from .build import check_config, get_tokenizer, model_config
from .rows import Labeller, has_chats

ROWS = 400  # handed over raw
# keys of a verb -> the module that prepares it, the rows that it reads
STAGES: dict[type[TuningConfig], tuple[str, str]] = {
    SftConfig: ("sft", ANSWERS),
    DpoConfig: ("dpo", PAIRS),
    KtoConfig: ("kto", LABELLED),
    RrhfConfig: ("rrhf", RANKED),
    RewardConfig: ("reward_model", PAIRS),
    GrpoConfig: ("grpo", PROMPTS),
}


def get_subject(config: Any, tier: int, is_data_only: bool = False, is_start: bool = False) -> Subject:
    """Tokenizer, template, config and raw rows for tier 0; the trainer from tier 1. Raises UserError as the verb.

    `is_data_only` changes nothing: rows come out of the whole trainer. `is_start`: output_dir must be free.
    """
    quiet_libraries()
    if isinstance(config, SftConfig):
        config = for_overfit(config)
    check_config(config)
    if is_start and not config.resume_from_checkpoint:
        check_output_dir(Path(config.output_dir))
    module, kind = STAGES[type(config)]
    if tier == 0:
        return _files_only(config, kind)
    prepare: Callable[..., Any] = importlib.import_module(f".{module}", __package__).prepare
    job = prepare(config, Console(quiet=True))
    subject = from_parts(trainer=job.trainer, dataset=_raw(job.data.train), target=config.model_name_or_path)
    subject.eval_rows = [row for rows in job.data.shards.values() for row in _raw(rows)][:ROWS]
    subject.is_chat = job.template.sha256 is not None
    _locate(subject, config)
    return subject


def _files_only(config: Any, kind: str) -> Subject:
    sources = parse_sources(config.datasets, "datasets")
    parse_sources(config.eval_datasets, "eval_datasets")
    is_chat = any(has_chats(source, config, kind) for source in sources)
    tokenizer, _ = get_tokenizer(config, is_chat)
    good = (row for row in load_rows(sources[0], Path(config.data_dir), kind) if not isinstance(row, Bad))
    rows = [] if kind == PROMPTS else [as_answers(row) for row in itertools.islice(good, ROWS)]
    settings = dataclasses.asdict(config)
    if kind != ANSWERS:
        settings["completion_only_loss"] = True
    elif rows:
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


def _locate(subject: Subject, config: TuningConfig) -> None:
    path = Path(resolve_model_dir(config.model_name_or_path))
    subject.folder = path if path.is_dir() else None
    subject.trust_remote_code = config.trust_remote_code


def _raw(rows: Any) -> list[dict[str, Any]]:
    return [as_answers(json.loads(text)) for text in rows.select(range(min(ROWS, len(rows))))["raw"]]
