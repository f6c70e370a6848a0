"""What a run on preferences tells while it trains: answers to read, and the ways in which a falling loss misleads.

Owns samples.jsonl (greedy answers to the same prompts at every evaluation) and two alarms in alerts.jsonl:
`chosen-less-likely`: the good answers have become less likely than under the reference, the bad ones only more so;
`longer-answers`: the model writes half as much again as at the start, and more than the good answers have.
Leaves out whether an answer is right.
"""

import json
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback

from ..data.preferences import as_answers
from ..evaluate.answers import score_answers

WINDOW = 5  # lines of the log that an alarm looks at together
FALL = 1.0  # nats per answer
LONGER = 1.5


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log; none where it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def lengths(rows: datasets.Dataset, good: str, bad: str, what: str = "chosen") -> list[str]:
    """A line on the mean length of good and bad answers: where they differ much, length is the easiest lesson."""
    means = [sum(map(len, rows[name])) / max(1, len(rows)) for name in (good, bad)]
    ratio = max(means) / max(1.0, min(means))
    more = f", {'chosen' if means[0] > means[1] else 'rejected'} {ratio:.1f} times as long" if ratio >= LONGER else ""
    return [f"lengths   {what} {means[0]:.1f}, rejected {means[1]:.1f} tokens{more}"]


class PreferenceWatch(TrainerCallback):
    """Comes before the watch of the run."""

    def begin(self, job: Any, run: Any, watch: Any) -> None:
        self.job, self.run = job, run
        self.rows: list[dict[str, Any]] = []
        self.raised: set[str] = set()
        self.window: list[dict[str, float]] = []
        self.at_start: float | None = None  # mean characters of an answer
        count = job.config.eval_samples
        shard = next(iter(job.data.shards.values()), job.data.train)
        if count and job.kind not in ("zero3", "fsdp2"):  # where no rank has the whole model
            self.rows = [as_answers(json.loads(text)) for text in shard["raw"][:count]]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            self._go_on()
        else:
            self._sample(0, model)

    def _go_on(self) -> None:
        """A resumed run is measured against the first answers, and repeats no alarm; its logs are cut already."""
        rows, alerts = read_lines(self.run.folder / "samples.jsonl"), read_lines(self.run.folder / "alerts.jsonl")
        self.raised = {row["kind"] for row in alerts}
        first = [len(row["given"]) for row in rows if row["step"] == rows[0]["step"]]
        self.at_start = sum(first) / len(first) if first else None

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            self._sample(state.global_step, model)

    def _sample(self, step: int, model: Any) -> None:
        if not self.rows or not self.run.is_main:
            return
        model = self.job.trainer.accelerator.unwrap_model(model)
        config = self.job.config
        score = score_answers(
            model, self.job.tokenizer, self.rows, config.per_device_eval_batch_size, config.max_new_tokens
        )
        for answer in score.answers:
            told = {"step": step, "question": answer.question, "chosen": answer.expected, "given": answer.given}
            self.run.append("samples.jsonl", told)
        mean = sum(len(answer.given) for answer in score.answers) / max(1, len(score.answers))
        good = sum(len(answer.expected) for answer in score.answers) / max(1, len(score.answers))
        first = json.dumps(score.answers[0].given[:90], ensure_ascii=False) if score.answers else ""
        self.job.console.print(f"sample {step:>4,}  {first}", markup=False)
        if self.at_start is None:
            self.at_start = mean
        elif mean >= LONGER * self.at_start and mean > good:
            self._raise(
                step, "longer-answers", f"answers have {mean:.0f} characters, {self.at_start:.0f} at the start and "
                f"{good:.0f} in the chosen ones: is length what it learns?",
            )  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        row = logs or {}
        if "loss" not in row or "rewards/chosen" not in row or "rewards/rejected" not in row:
            return
        self.window = [*self.window[1 - WINDOW :], row]
        beta = float(self.job.config.beta)
        if len(self.window) < WINDOW or not beta:
            return
        chosen, rejected = (
            sum(line[f"rewards/{side}"] for line in self.window) / WINDOW / beta for side in ("chosen", "rejected")
        )
        if chosen < -FALL and chosen > rejected:
            self._raise(
                state.global_step,
                "chosen-less-likely",
                f"chosen answers are {-chosen:.1f} nats less likely than under the reference, rejected ones "
                f"{-rejected:.1f}: the margin grows while both fall; raise beta, lower learning_rate, or add the "
                "likelihood: loss_type: [sigmoid, sft]",
            )

    def _raise(self, step: int, kind: str, message: str) -> None:
        if kind not in self.raised:
            self.raised.add(kind)
            self.run.append("alerts.jsonl", {"step": step, "kind": kind, "message": message})
            self.job.console.print(f"alert     step {step}: {message}", markup=False)
