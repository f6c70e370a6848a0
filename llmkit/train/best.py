"""The best weights of a run by a figure of its evaluations, instead of the last ones.

Owns best.safetensors and best.json of a run folder.   best.see(step, {"toyworld_recall_acc": 0.9}, model)

Keeps the trained parameters only, so that of an adapter it is small; a run that goes on after a kill finds it. Equal
figures: the earlier step stays. Leaves out weights that are sharded over processes.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..config import UserError
from ..run import write_json

NAME = "best"
LOWER = (
    "loss",
    "bits_per_byte",
    "perplexity",
    "ter",
    "brier_score",
    "nll",
    "ranking",
)  # ends of figures that are better when lower


class Best:
    """`metric` is the name of a figure in metrics.jsonl, with or without `eval_`."""

    def __init__(self, folder: Path, metric: str, greater_is_better: bool | None, resume_step: int | None):
        self.folder, self.metric = folder, metric.removeprefix("eval_")
        is_lower = self.metric.endswith(LOWER)
        self.is_up = not is_lower if greater_is_better is None else greater_is_better
        self.step, self.value = 0, -math.inf if self.is_up else math.inf
        if resume_step is not None:
            self.read(resume_step)

    def read(self, last_step: int) -> None:
        """What the folder holds, unless it is of a later step, which will be found again."""
        path = self.folder / f"{NAME}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["step"] <= last_step and kept["metric"] == self.metric:
                self.step, self.value = kept["step"], kept["value"]

    def see(self, step: int, figures: dict[str, Any], model: Any) -> None:
        """Keeps the weights when the figure is the best so far."""
        value = figures.get(self.metric, figures.get(f"eval_{self.metric}"))
        if value is None:
            return
        if value > self.value if self.is_up else value < self.value:
            self.step, self.value = step, float(value)
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{NAME}.partial"
            save_file({name: p.detach().cpu().contiguous().clone() for name, p in _trained(model)}, partial)
            partial.replace(self.folder / f"{NAME}.safetensors")
            write_json(self.folder / f"{NAME}.json", {"metric": self.metric, "step": step, "value": self.value})

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """The best weights back into the model."""
        kept = load_file(self.folder / f"{NAME}.safetensors")
        for name, parameter in _trained(model):
            parameter.copy_(kept[name])

    def remove(self) -> None:
        """The weights are in model/ now; what was best stays written."""
        (self.folder / f"{NAME}.safetensors").unlink(missing_ok=True)


def _trained(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def check_best(config: Any, figures: list[str], is_sharded: bool) -> None:
    """Raises UserError for what cannot be; `figures` are those that every evaluation gives."""
    if config.metric_for_best_model and not config.load_best_model_at_end:
        raise UserError("metric_for_best_model has no effect without load_best_model_at_end: true; add it")
    if not config.load_best_model_at_end:
        return
    if not config.metric_for_best_model:
        raise UserError(f"load_best_model_at_end=true: name metric_for_best_model; allowed: {', '.join(figures)}")
    if config.eval_steps is None:
        raise UserError("load_best_model_at_end=true: there is one evaluation, at the end; set eval_steps")
    if is_sharded:
        raise UserError("load_best_model_at_end=true: not under zero3 or fsdp2, where no rank has the whole model")
    if config.metric_for_best_model.removeprefix("eval_") not in figures:
        raise UserError(
            f"metric_for_best_model={config.metric_for_best_model!r}: no evaluation gives that figure; "
            f"allowed: {', '.join(figures)}"
        )
