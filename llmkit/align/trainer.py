"""TRL's trainers where they are not what the house promises.

Owns evaluation by token and by row. TRL is imported by the first use, since that takes seconds.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object


@contextlib.contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """What TRL logs is of this rank's batch: the last ones are uneven, which gathering does not survive."""
    for name in ("gather", "gather_for_metrics"):
        setattr(accelerator, name, lambda value, *args, **kwargs: value)
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


class _Sweep:
    """Every row of a shard once, whatever the number of processes and however uneven the last batch."""

    control: Any
    _metrics: dict[str, Any]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        shards = given if isinstance(given, dict) else {"": given}
        metrics = {}
        for name, rows in shards.items():
            for figure, value in self.figures(rows).items():
                metrics["_".join(filter(None, (metric_key_prefix, name, figure)))] = value
        self._metrics["eval"].clear()  # means over batches, which TRL would log as they are
        # log() goes by the model's mode, which is training again: it would write what the batches since the last log
        # gave into this row, and forget it
        held, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        self.log(metrics)
        self._metrics["train"] = held
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def figures(self, rows: Any) -> dict[str, float]:
        """Of one shard, by name. Every rank calls."""
        raise NotImplementedError

    def _batches(self, rows: Any) -> Iterator[tuple[dict[str, Any], Any, bool]]:
        """(batch, its mean loss, whether it counts): a rank without a batch left repeats one, which does not."""
        model = self._wrap_model(self.model, training=False)
        if not self.is_in_train and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        rows, size = self._remove_unused_columns(rows, description="evaluation"), self.args.eval_batch_size
        rank, world, num_batches = self.args.process_index, self.args.world_size, math.ceil(len(rows) / size)
        for turn in range(math.ceil(num_batches / world)):
            index = turn * world + rank
            first = min(index, num_batches - 1) * size
            batch = self.data_collator([rows[i] for i in range(first, min(first + size, len(rows)))])
            with _alone(self.accelerator):
                loss, _, _ = self.prediction_step(model, batch, prediction_loss_only=True)
            yield batch, loss, index < num_batches
        model.train(was_training)


class ByToken(_Sweep):
    """Comes before TRL's SFTTrainer: an evaluation is the loss per token."""

    _total_train_tokens: int

    def figures(self, rows: Any) -> dict[str, float]:
        sums = torch.zeros(2, device=self.args.device)
        for batch, loss, counts in self._batches(rows):
            count = (batch["labels"][..., 1:] != -100).sum().to(sums.device)
            if counts:
                sums += torch.stack([loss.float() * count, count.float()])
        total, count = self.accelerator.reduce(sums).tolist()
        return {"loss": total / max(count, 1)}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's; its count of tokens takes a batch without attention_mask for one row."""
        shape, before = inputs["input_ids"].shape, self._total_train_tokens
        loss = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs, num_items_in_batch
        )
        if "attention_mask" not in inputs:
            self._total_train_tokens += (self._total_train_tokens - before) * (shape[0] - 1)
            self._metrics["train" if model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        return loss


class ByRow(_Sweep):
    """Comes before TRL's trainers on preferences: an evaluation is a mean over rows, of the loss and of what they log.

    Rows come with their tokens, so TRL prepares nothing (it would cut and drop rows in silence).
    """

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def figures(self, rows: Any) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        for batch, loss, counts in self._batches(rows):
            logged = {key: values[-1] for key, values in self._metrics["eval"].items() if key != "num_tokens"}
            self._metrics["eval"].clear()
            for key, value in {"loss": loss.item(), **logged}.items():
                weight = self._weight(key, batch) if counts else 0.0
                sums[key] += value * weight
                weights[key] += weight
        names = sorted(set(gather_object(list(weights))))  # a rank may have had no bad answer
        both = torch.tensor([[sums[n] for n in names], [weights[n] for n in names]], device=self.args.device)
        totals, counted = self.accelerator.reduce(both).tolist()
        return {name: total / count for name, total, count in zip(names, totals, counted, strict=True) if count}

    def _weight(self, key: str, batch: dict[str, Any]) -> float:
        """Rows of the batch that a figure is a mean over: of answers marked good or bad, those of that kind."""
        if "label" not in batch:
            return float(len(batch["input_ids"]))
        good = float(batch["label"].sum())
        bad = len(batch["label"]) - good
        return {"chosen": good, "rejected": bad, "margins": min(good, bad)}.get(key.split("/")[-1], good + bad)


def without_spare_adapter(trainer: Any) -> None:
    """TRL copies a fresh adapter to have a reference; the base without any is the same, and costs no memory."""
    peft_config = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
    if "ref" in peft_config:
        trainer.model.delete_adapter("ref")
