"""Answers marked good or bad, each alone: KTO, on TRL's KTOTrainer.

    llmkit kto recipes/toy/kto.yaml

Owns the verb. The KL term is estimated on answers to other prompts (`preferences.mismatched`). Leaves out making rows.
"""

from typing import Any

from rich.console import Console

from ..config import UserError
from ..run import Result
from ..tuning import KtoConfig
from .build import get_reference
from .dpo import finish
from .job import Job, get_parts, make_job, run
from .preferences import LabelledEncoder, mismatched
from .samples import PreferenceWatch
from .trainer import ByRow, without_spare_adapter

FIGURES = ["loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen"]


def main(config: KtoConfig) -> Result:
    """Checks the inputs, prepares rows, model and reference, trains, writes the run folder. Raises UserError."""
    return run(config, "kto", prepare)


def prepare(config: KtoConfig, console: Console, started: float = 0.0) -> Job:
    """Rows, tokenizer, model, reference and trainer of a recipe. Raises UserError."""
    from trl import KTOConfig, KTOTrainer

    parts = get_parts(config, KTOConfig, LabelledEncoder, sequences_per_row=2)
    labels = parts.data.train["label"]
    num_good = sum(labels)
    if num_good in (0, len(labels)):
        raise UserError(
            f"datasets: all {len(labels):,} labels are {'true' if num_good else 'false'}; KTO needs good and bad ones"
        )
    trainer: Any = type("Trainer", (ByRow, KTOTrainer), {})(
        model=parts.model,
        ref_model=get_reference(config, parts.tokenizer, parts.template, parts.model),
        args=parts.args,
        train_dataset=mismatched(parts.data.train),
        eval_dataset={name: mismatched(rows) for name, rows in parts.data.shards.items()} or None,
        processing_class=parts.tokenizer,
    )
    without_spare_adapter(trainer)
    job = make_job("kto", config, console, parts, trainer, finish, started, parts.named(FIGURES))
    job.notes += _balance(config, num_good, len(labels) - num_good)
    job.callbacks.append(PreferenceWatch())
    return job


def _balance(config: KtoConfig, num_good: int, num_bad: int) -> list[str]:
    """Ethayarajh et al. 2024, eq. 8: weight times number of the good is 1 to 4/3 times that of the bad."""
    ratio = config.desirable_weight * num_good / (config.undesirable_weight * num_bad)
    line = f"labels    {num_good:,} good, {num_bad:,} bad"
    if 1 <= ratio <= 4 / 3 or num_good == num_bad:
        return [line]
    weight = round(config.undesirable_weight * num_bad / num_good, 3)
    return [f"{line}: weighted {ratio:.2f} to 1, where 1 to 1.33 is advised; desirable_weight: {weight} gives 1"]
