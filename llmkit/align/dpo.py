"""Preference pairs: DPO and its relatives, on TRL's DPOTrainer.

    llmkit dpo recipes/toy/dpo.yaml

Owns the verb. At the first step the loss is ln 2 (sigmoid): model and reference are the same. What it does is watched
(`samples.py`), since a loss that falls may mean that both answers become less likely. Leaves out making pairs.
"""

from typing import Any

from rich.console import Console

from ..config import UserError
from ..run import Result, Run
from ..tuning import DpoConfig
from .build import get_reference
from .job import Figures, Job, get_parts, make_job, run, shard_figures
from .preferences import PairEncoder
from .samples import PreferenceWatch, lengths
from .trainer import ByRow, without_spare_adapter

# of TRL 1.16, whose config takes any word, and whose trainer refuses it at the first step
LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()
FIGURES = ["loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen"]


def main(config: DpoConfig) -> Result:
    """Checks the inputs, prepares rows, model and reference, trains, writes the run folder. Raises UserError."""
    return run(config, "dpo", prepare)


def prepare(config: DpoConfig, console: Console, started: float = 0.0) -> Job:
    """Rows, tokenizer, model, reference and trainer of a recipe. Raises UserError."""
    loss_type = config.loss_type if isinstance(config.loss_type, list) else [config.loss_type]
    if unknown := [name for name in loss_type if name not in LOSSES]:
        raise UserError(f"loss_type={unknown[0]!r}; allowed: {', '.join(LOSSES)}, or a list of several")
    if config.loss_weights is not None and len(config.loss_weights) != len(loss_type):
        raise UserError(f"loss_weights={config.loss_weights}: write {len(loss_type)} numbers, one for each loss_type")
    from trl import DPOConfig, DPOTrainer

    parts = get_parts(config, DPOConfig, PairEncoder, sequences_per_row=2, loss_type=loss_type)
    trainer: Any = type("Trainer", (ByRow, DPOTrainer), {})(
        model=parts.model,
        ref_model=get_reference(config, parts.tokenizer, parts.template, parts.model),
        args=parts.args,
        train_dataset=parts.data.train,
        eval_dataset=parts.data.shards or None,
        processing_class=parts.tokenizer,
    )
    without_spare_adapter(trainer)
    job = make_job("dpo", config, console, parts, trainer, finish, started, parts.named(FIGURES))
    job.notes += lengths(parts.data.train, "chosen_ids", "rejected_ids")
    job.callbacks.append(PreferenceWatch())
    return job


def finish(job: Job, run: Run, is_best: bool) -> Figures:
    """Figures of every shard: mean over its rows."""
    return {}, shard_figures(job, is_best), "ok"
