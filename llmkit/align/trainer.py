"""TRL's trainers where they are not what the house promises.

Owns evaluation by token. TRL is imported by the first use, since that takes seconds.
"""

import math
from typing import TYPE_CHECKING, Any

import torch


class ByToken:
    """Comes before one of TRL's trainers: an evaluation is the loss per token, not a mean over uneven batches."""

    control: Any
    _total_train_tokens: int

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        shards = given if isinstance(given, dict) else {"": given}
        metrics = {}
        for name, rows in shards.items():
            key = "_".join(filter(None, (metric_key_prefix, name, "loss")))
            metrics[key] = self._loss_per_token(rows)
        self._metrics["eval"].clear()  # entropy and accuracy of batches, which TRL would average the same way
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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

    def _loss_per_token(self, rows: Any) -> float:
        """Every row once, whatever the number of processes; a rank without a batch left repeats one and drops it."""
        model = self._wrap_model(self.model, training=False)
        if not self.is_in_train and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training, sums = model.training, torch.zeros(2, device=self.args.device)
        model.eval()
        rows, size = self._remove_unused_columns(rows, description="evaluation"), self.args.eval_batch_size
        rank, world, num_batches = self.args.process_index, self.args.world_size, math.ceil(len(rows) / size)
        for turn in range(math.ceil(num_batches / world)):
            index = turn * world + rank
            first = min(index, num_batches - 1) * size
            batch = self.data_collator([rows[i] for i in range(first, min(first + size, len(rows)))])
            loss, _, _ = self.prediction_step(model, batch, prediction_loss_only=True)
            count = (batch["labels"][..., 1:] != -100).sum().to(sums.device)
            if index < num_batches:
                sums += torch.stack([loss.float() * count, count.float()])
        model.train(was_training)
        total, count = self.accelerator.reduce(sums).tolist()
        return total / max(count, 1)
