"""Ranked answers: RRHF (Yuan et al. 2023, "RRHF: Rank Responses to Align Language Models with Human Feedback").

    llmkit rrhf recipes/toy/rrhf.yaml

Owns the verb and its loss, on transformers' Trainer: TRL has none. No reference model, no sampling: k answers to a
prompt, ordered by their length-normalised log-probability as their scores order them, and the best one made likely.
Leaves out where scores come from.
"""

from collections import defaultdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import Trainer, TrainingArguments

from ..run import Result
from ..tuning import RrhfConfig
from .dpo import finish
from .job import Job, get_parts, make_job, run
from .preferences import RankedCollator, RankedEncoder
from .rows import IGNORE
from .samples import PreferenceWatch
from .trainer import ByRow

FIGURES = ["loss", "ranking", "nll", "rewards/accuracies", "rewards/margins", "logps/chosen"]


def ranked_pairs(scores_N: Tensor, group_N: Tensor) -> Tensor:
    """(N, N): whether i and j answer one prompt and j has the higher score."""
    return (group_N[:, None] == group_N[None, :]) & (scores_N[:, None] < scores_N[None, :])


def rank_loss(logps_N: Tensor, scores_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over pairs (i, j) of one prompt with score_i < score_j of max(0, p_i - p_j), per prompt; nats per token.

    `logps_N`: p, the length-normalised log-probability of each answer; `group_N`: its prompt, from 0.
    Returns the mean over prompts, and of all such pairs the share in order and the mean margin p_j - p_i, 0 of none.
    Source: Yuan et al. 2023, equation 2; the paper adds the prompts of a batch up, here they are averaged.
    """
    excess = (logps_N[:, None] - logps_N[None, :])[ranked_pairs(scores_N, group_N)]
    num_prompts, num_pairs = group_N.max() + 1, max(1, len(excess))
    return excess.clamp(min=0).sum() / num_prompts, (excess < 0).sum() / num_pairs, -excess.sum() / num_pairs


def best_answers(scores_N: Tensor, group_N: Tensor) -> Tensor:
    """Index of the first best answer of every prompt."""
    found = [(group_N == g).nonzero()[:, 0] for g in range(int(group_N.max()) + 1)]
    return torch.stack([members[scores_N[members].argmax()] for members in found])


def rrhf_loss(
    token_logps_NT: Tensor, mask_NT: Tensor, scores_N: Tensor, group_N: Tensor, rank_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """rank_weight * L_rank + L_ft (Yuan et al. 2023, equations 1 to 4), in nats, and what is logged.

    token_logps (N, T): log-probability of every token; mask (N, T): 1 on answer tokens. p is their mean over an answer.
    L_ft: -log-probability of the best answer of each prompt, summed over its tokens. Divided by its length it would be
    too weak: the ranking alone unlearns whole answers (recipes/LOG.md). Both are means over the prompts.
    """
    lengths = mask_NT.sum(1)
    sums = (token_logps_NT * mask_NT).sum(1)
    logps = sums / lengths
    ranking, in_order, margin = rank_loss(logps, scores_N, group_N)
    best = best_answers(scores_N, group_N)
    likelihood = -sums[best].mean()
    told = {
        "ranking": ranking.detach(),
        "nll": likelihood.detach(),
        "rewards/accuracies": in_order,
        "rewards/margins": margin.detach(),
        "logps/chosen": sums[best].mean().detach(),
        "mean_length_best": lengths[best].float().mean(),
    }
    return rank_weight * ranking + likelihood, told


class RrhfTrainer(ByRow, Trainer):
    """Batches of `RankedCollator`; logs under TRL's names."""

    def __init__(self, *args: Any, rank_weight: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rank_weight = rank_weight
        # not in the class: Trainer.__init__ sets it. The loss is a mean over prompts, to be divided by accumulation
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens = 0

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", "scores"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"][:, 1:]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORE
        )  # (N, T - 1), 0 where ignored
        loss, told = rrhf_loss(-losses, labels != IGNORE, inputs["scores"], inputs["group"], self.rank_weight)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            count = self.accelerator.reduce(inputs["attention_mask"].sum().float()).item()
            self._total_train_tokens += int(count)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for key, value in told.items():
            self._metrics[mode][key].append(self.accelerator.gather(value).mean().item())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _weight(self, key: str, batch: dict[str, Any]) -> float:
        """Pairs of the batch, or prompts: not answers, of which a prompt may have more than another."""
        if key.startswith("rewards/"):
            return float(ranked_pairs(batch["scores"], batch["group"]).sum())
        return float(batch["group"].max() + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        logs |= {key: sum(values) / len(values) for key, values in self._metrics[mode].items() if values}
        super().log(logs, start_time)
        self._metrics[mode].clear()


def main(config: RrhfConfig) -> Result:
    """Checks the inputs, prepares rows and model, trains, writes the run folder. Raises UserError."""
    return run(config, "rrhf", prepare)


def prepare(config: RrhfConfig, console: Console, started: float = 0.0) -> Job:
    """Rows, tokenizer, model and trainer of a recipe. Raises UserError."""
    parts = get_parts(config, TrainingArguments, RankedEncoder, sequences_per_row=4)
    if config.disable_dropout:
        from trl.trainer.utils import disable_dropout_in_model

        disable_dropout_in_model(parts.model)
    trainer = RrhfTrainer(
        model=parts.model,
        args=parts.args,
        train_dataset=parts.data.train,
        eval_dataset=parts.data.shards or None,
        processing_class=parts.tokenizer,
        data_collator=RankedCollator(parts.tokenizer.pad_token_id),
        rank_weight=config.rank_weight,
    )
    job = make_job("rrhf", config, console, parts, trainer, finish, started, parts.named(FIGURES))
    job.callbacks.append(PreferenceWatch())
    return job
