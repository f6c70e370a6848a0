"""Reward models: a score per answer, learnt from preference pairs (Bradley-Terry), on TRL's RewardTrainer.

    llmkit reward recipes/toy/reward.yaml       # model/: a sequence classifier with one label

Owns the verb. The score is read at the last token of prompt and answer. Leaves out what it is used for: the folder can
be named among the reward_funcs of `llmkit grpo`.
"""

import logging
import re
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from ..run import Result
from ..tuning import RewardConfig
from .build import load_model
from .dpo import finish
from .job import Job, get_parts, make_job, run
from .preferences import RewardEncoder, with_margins
from .samples import lengths
from .trainer import ByRow

FIGURES = ["loss", "accuracy", "margin", "mean_reward"]


def main(config: RewardConfig) -> Result:
    """Checks the inputs, prepares rows and model, trains, writes the run folder. Raises UserError."""
    return run(config, "reward", prepare)


def prepare(config: RewardConfig, console: Console, started: float = 0.0) -> Job:
    """Rows, tokenizer, model and trainer of a recipe. Raises UserError."""
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer

    parts = get_parts(config, Arguments, RewardEncoder, sequences_per_row=2, load=load_classifier)
    trainer: Any = type("Trainer", (ByRow, RewardTrainer), {})(
        model=parts.model,
        args=parts.args,
        train_dataset=with_margins(parts.data.train),
        eval_dataset={name: with_margins(rows) for name, rows in parts.data.shards.items()} or None,
        processing_class=parts.tokenizer,
    )
    job = make_job("reward", config, console, parts, trainer, finish, started, parts.named(FIGURES))
    job.load_base = load_classifier
    job.notes += lengths(parts.data.train, "chosen_ids", "rejected_ids", "prompts and chosen answers")
    return job


def load_classifier(config: Any, quantization: Any = None, device: Any = None) -> Any:
    """The body of the model that the recipe starts from, under a new head of one score, drawn by `seed`."""
    torch.manual_seed(config.seed)
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]
    for logger in loggers:
        logger.addFilter(_says_more_than_head)
    try:
        return load_model(config, quantization, device, AutoModelForSequenceClassification, num_labels=1)
    finally:
        for logger in loggers:
            logger.removeFilter(_says_more_than_head)


def _says_more_than_head(record: logging.LogRecord) -> bool:
    """That the old head is gone and the new one is fresh is what is wanted: such a report is not shown."""
    named = re.findall(r"^(\S+)\s*\|\s*(?:MISSING|UNEXPECTED)", record.getMessage(), re.MULTILINE)
    return not named or not all(re.fullmatch(r"(lm_head|embed_out|score|classifier)\..*", key) for key in named)
