"""Tasks while a model trains: a few items of a few tasks, at every evaluation, figures by name.

Owns what `eval_tasks` of a training recipe asks for.

    scorer = TaskScorer(["toyworld_recall"], tokenizer, limit=50);  scorer.score(model)["toyworld_recall_acc"]

Looking changes nothing: the model's mode and all random numbers come back. Leaves out comparing models (verb.py).
"""

import tempfile
from pathlib import Path
from typing import Any

from . import harness, task_index
from .asking import decide
from .columns import Column


class TaskScorer:
    """Tasks are found and their data read at once, so that a mistake costs no training. Raises UserError."""

    def __init__(
        self,
        names: list[str] | str,
        tokenizer: Any,
        data_dir: Path | None = None,
        limit: int | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
    ):
        asked = names.split(",") if isinstance(names, str) else names
        units = task_index.expand([str(name).strip() for name in asked])
        self.tokenizer, self.limit, self.batch_size, self.max_length = tokenizer, limit, batch_size, max_length
        with tempfile.TemporaryDirectory() as work:
            manager = task_index.make_manager(units, None, data_dir, Path(work))
            task_index.check_code(manager, units, is_allowed=False)
            self.loaded = task_index.load(manager, units)
        self.asking = decide([Column("model", "", None, None, "", 0)], {"model": tokenizer}, None)

    def figures(self) -> list[str]:
        """The names that `score` will give."""
        tasks, groups = self.loaded["tasks"], self.loaded["groups"]
        names = [f"{name}_{metric}" for name, task in tasks.items() for metric in task.aggregation()]
        return names + [
            f"{name}_{metric.metric}" for name, g in groups.items() for metric in g.aggregate_metric_list or []
        ]

    def headline(self, figures: dict[str, float]) -> str:
        """For the console: groups, and tasks that are in none."""
        grouped = {task.task_name for group in self.loaded["groups"].values() for task in group.get_all_tasks()}
        hidden = tuple(f"{name}_" for name in grouped)
        return "  ".join(f"{k} {v:.4f}" for k, v in figures.items() if not (hidden and k.startswith(hidden)))

    def score(self, model: Any) -> dict[str, float]:
        """TASK_METRIC, and of a group GROUP_METRIC; of several filters the first."""
        was_training = model.training
        lm = harness.make_lm(
            "model", model, self.tokenizer, self.batch_size, self.max_length, harness.Journal(None), ""
        )
        flat: dict[str, Any] = {}
        try:
            for is_chat in (False, True):
                tasks = {n: t for n, t in self.loaded["tasks"].items() if self.asking.is_chat(t.OUTPUT_TYPE) == is_chat}
                if tasks:
                    end = self.asking.ends.get("model", "") if is_chat else ""
                    harness.prepare_tasks(tasks, lm, None, {}, end)
                    flat |= harness.run(lm, {"tasks": tasks}, is_chat, self.limit, None, False)["results"]
        finally:
            model.train(was_training)
        flat |= {name: g.aggregate(flat) for name, g in self.loaded["groups"].items() if g.has_aggregation}
        figures: dict[str, float] = {}
        for name, found in flat.items():
            for key, value in found.items():
                metric, comma, _ = key.partition(",")
                if comma and not metric.endswith("_stderr") and isinstance(value, float):
                    figures.setdefault(f"{name}_{metric}", float(value))
        return figures
