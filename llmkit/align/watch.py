"""What a TRL trainer tells while it runs: logs, the bar, checkpoints of the house's kind, the end by a signal.

Owns one callback for every post-training verb.   trainer.add_callback(Watch(run, console, identity, config))

The trainer writes `checkpoint-500`; when it is whole an index of SHA-256 sums is written into it, and it is renamed to
`step-00000500`, so that a folder of that name is always complete. Leaves out what a trainer logs.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import UserError
from ..evaluate.in_training import TaskScorer
from ..run import Run
from ..train.best import Best
from ..train.checkpoint import seal_checkpoint

# figures of an evaluation that the console shows
SHOWN = ("_loss", "rewards/margins", "rewards/accuracies", "_accuracy", "_margin", "_gold", "_proxy")


class Watch(TrainerCallback):
    """`asked` says whether a signal asked the run to end; `until_learnt` once at most that share of tokens is wrong."""

    def __init__(
        self,
        run: Run,
        console: Console,
        config: Any,
        identity: dict[str, Any],
        asked: Callable[[], bool] = lambda: False,
        until_learnt: float | None = None,
        scorer: TaskScorer | None = None,
        best: Best | None = None,
    ):
        self.run, self.console, self.config, self.identity = run, console, config, identity
        self.asked, self.until_learnt, self.scorer, self.best = asked, until_learnt, scorer, best
        self.bar: Progress | None = None
        self.started = time.perf_counter()
        self.window: tuple[float, float] | None = None  # time and tokens at the last log
        self.logged: list[dict[str, float]] = []  # in the epoch at hand
        self.is_stopped = False
        self.on_tasks: Callable[[int, dict[str, float]], object] = lambda step, figures: None

    # the bar and the log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        columns = (
            BarColumn(30),
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}  {task.fields[note]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.bar.add_task("train", total=state.max_steps, completed=state.global_step, note="")
        self.bar.start()
        self.window = (time.perf_counter(), float(state.num_input_tokens_seen))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        row = {"step": state.global_step} | {
            key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))
        }
        loss = row.get("loss")
        if loss is not None and not math.isfinite(loss):
            self.run.append(
                "alerts.jsonl", {"step": state.global_step, "kind": "not-finite", "message": f"loss is {loss}"}
            )
            raise UserError(
                f"loss is {loss} at step {state.global_step}: the run stops, earlier checkpoints are untouched; "
                "lower learning_rate or raise warmup_steps"
            )
        if self.window and "num_tokens" in row and "loss" in row:
            now = time.perf_counter()
            before, seen = self.window
            row["tokens_per_second"] = round((row["num_tokens"] - seen) / max(now - before, 1e-9), 1)
            self.window = (now, row["num_tokens"])
        row["wall_s"] = round(time.perf_counter() - self.started, 2)
        self.run.log(row)
        if loss is not None:
            self.logged.append(row)
            self._say(args, state, row)

    def _say(self, args: Any, state: Any, row: dict[str, Any]) -> None:
        rate = f"  {row['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in row else ""
        note = f"loss {row['loss']:.4f}{rate}"
        if self.bar and not self.bar.disable:
            self.bar.update(self.bar.task_ids[0], note=note)
        elif (done := state.global_step) and done * 10 // state.max_steps > (
            (done - args.logging_steps) * 10 // state.max_steps
        ):  # no terminal: about ten lines
            self.console.print(f"step {done:>6,}/{state.max_steps:,}  {note}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], model: Any = None, **kwargs: Any
    ) -> None:
        if self.best and self.run.is_main:
            self.best.see(state.global_step, metrics, model)
        shown = [f"{k[5:].removesuffix('_loss')} {v:.4f}" for k, v in metrics.items() if k.endswith(SHOWN)]
        if shown:
            self.console.print(f"eval {state.global_step:>6,}/{state.max_steps:,}  {'  '.join(shown)}")

    # the end

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)
        is_due = state.global_step == state.max_steps or state.global_step % (self.config.eval_steps or math.inf) == 0
        if self.scorer and is_due and self.run.is_main:
            self._score_tasks(self.scorer, state, model)
        if any_rank(self.asked()):
            self.is_stopped = control.should_save = control.should_training_stop = True

    def _score_tasks(self, scorer: TaskScorer, state: Any, model: Any) -> None:
        figures = scorer.score(model)
        self.run.log({"step": state.global_step} | {f"eval_{name}": value for name, value in figures.items()})
        self.console.print(f"tasks {state.global_step:>5,}/{state.max_steps:,}  {scorer.headline(figures)}")
        self.on_tasks(state.global_step, figures)
        if self.best:
            self.best.see(state.global_step, figures, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.until_learnt is not None and self.logged and _is_learnt(self.logged, self.until_learnt):
            control.should_training_stop = True
        self.logged.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar:
            self.bar.stop()

    # checkpoints

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if self.run.is_main:
            parent = Path(args.output_dir)
            written = parent / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (parent / "README.md").unlink(missing_ok=True)  # TRL's card, of a model that nobody publishes yet
            if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
                shutil.rmtree(written)
                raise UserError(
                    "the weights are not finite any more: not saved, earlier checkpoints are untouched; "
                    "lower learning_rate or raise warmup_steps"
                )
            told = {"step": state.global_step, "identity": self.identity, "recipe": dataclasses.asdict(self.config)}
            (written / "state.json").write_text(json.dumps(told, indent=1, default=str), encoding="utf-8")
            seal_checkpoint(written, parent / f"step-{state.global_step:08d}", self.config.save_total_limit)
        PartialState().wait_for_everyone()


def _is_learnt(rows: list[dict[str, float]], slack: float) -> bool:
    """Greedy decoding repeats the rows: nearly every token of the epoch is the likeliest one, with room to spare."""
    wrong = 1 - sum(row["mean_token_accuracy"] for row in rows) / len(rows)
    return wrong <= slack + 1e-9 and max(row["loss"] for row in rows) < 0.02


def any_rank(asked: bool) -> bool:
    """Whether any rank was asked to end: all must end at the same step."""
    if PartialState().num_processes == 1:
        return asked
    from accelerate.utils import gather_object

    return any(gather_object([asked]))
