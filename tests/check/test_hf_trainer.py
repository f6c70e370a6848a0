"""Checking a live trainer leaves no trace: weights, moments, random states, attributes, and every later step."""

import copy
import pickle
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny import chat_rows, llama, lm_trainer, sft_trainer, text_rows
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer

import llmkit.check
from llmkit.check import shrink, subject
from llmkit.check.hf_trainer import HFTraining
from llmkit.check.live import patch_forward_as
from llmkit.check.subject import redraw_

FAMILIES = ("trainer", "settings")


def plain() -> Any:
    return lm_trainer(rows=text_rows(40), eval_rows=text_rows(8), max_steps=20, gradient_accumulation_steps=2)


def sft() -> Any:
    return sft_trainer(rows=chat_rows(40), eval_rows=chat_rows(8), max_steps=20, lr_scheduler_type="cosine")


def lora() -> Any:
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    return sft_trainer(rows=chat_rows(40), peft_config=config, max_steps=20, gradient_checkpointing=True)


def with_optimizer() -> Any:
    """The user's own optimiser and scheduler, the collator's generator, a data set with a counter."""
    model = llama(eos_token_id=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trainer = lm_trainer(rows=text_rows(40), model=model, max_steps=20)
    return Trainer(
        model=model,
        args=trainer.args,
        train_dataset=Counting(trainer.train_dataset),
        data_collator=Drawing(trainer.data_collator),
        processing_class=trainer.processing_class,
        optimizers=(optimizer, scheduler),
    )


class Counting(TorchDataset[dict[str, Any]]):
    def __init__(self, rows: Any):
        self.rows, self.reads = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> dict[str, Any]:
        self.reads += 1
        row: dict[str, Any] = self.rows[i]
        return row


class Drawing:
    """Drops a token where its own generators say so."""

    def __init__(self, collate: Any):
        self.collate = collate
        self.torch, self.numpy = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.python = random.Random(3)

    def __call__(self, rows: list) -> dict[str, Any]:
        batch = self.collate(rows)
        at = int(torch.randint(batch["labels"].shape[1], (1,), generator=self.torch))
        batch["labels"][int(self.numpy.integers(len(rows))), at] = -100
        batch["labels"][self.python.randrange(len(rows)), 0] = -100
        return batch


def states() -> list[Any]:
    return [random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()]


def optimizer_state(trainer: Any) -> Any:
    return copy.deepcopy(trainer.optimizer.state_dict()) if trainer.optimizer is not None else None


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def losses_of(trainer: Any) -> list[float]:
    """Of 20 further steps."""
    losses: list[float] = []
    step = trainer.training_step

    def recorded(*given: Any, **kwargs: Any) -> Any:
        loss = step(*given, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = recorded
    trainer.train()
    return losses


@pytest.mark.parametrize(
    "make, is_trained",
    [
        (plain, False),
        (sft, True),
        (lora, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(plain, True), (sft, False), (lora, True)]),
        *(pytest.param(with_optimizer, is_trained, marks=pytest.mark.slow) for is_trained in (False, True)),
    ],
    ids=lambda value: value.__name__ if callable(value) else "trained" if value else "fresh",
)
def test_a_checked_trainer_goes_on_bit_for_bit_as_an_unchecked_one(make, is_trained):
    trainers = [make(), make()]
    if is_trained:
        for trainer in trainers:
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            trainer.train()
    unchecked, checked = trainers
    attributes, rng = dict(vars(checked)), states()
    weights = {n: p.detach().clone() for n, p in checked.model.named_parameters()}
    storages = {n: p.data_ptr() for n, p in checked.model.named_parameters()}
    flags = {n: (m.training, len(m._forward_hooks)) for n, m in checked.model.named_modules()}
    moments, args = optimizer_state(checked), copy.deepcopy(vars(checked.args))
    report = llmkit.check.run(checked, only=FAMILIES)
    assert report.count("pass") > 8 and report.count("fail") == 0, report

    assert states() == rng
    assert {n: p.data_ptr() for n, p in checked.model.named_parameters()} == storages
    assert all(torch.equal(p, weights[n]) for n, p in checked.model.named_parameters())
    assert {n: (m.training, len(m._forward_hooks)) for n, m in checked.model.named_modules()} == flags
    assert all(p.grad is None for p in checked.model.parameters())
    assert equal(optimizer_state(checked), moments)
    assert vars(checked).keys() == attributes.keys()
    assert all(vars(checked)[k] is v for k, v in attributes.items())
    assert str(vars(checked.args)) == str(args)

    results = []
    for trainer in (unchecked, checked):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        losses = losses_of(trainer)
        results.append((losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, states()))
    assert len(results[0][0]) >= 20
    assert results[0][0] == results[1][0]
    assert all(torch.equal(w, results[1][1][n]) for n, w in results[0][1].items())
    assert results[0][2] == results[1][2]
    assert equal(optimizer_state(unchecked), optimizer_state(checked))


def test_all_families_together_leave_a_trainer_as_it_was():
    unchecked, checked = sft(), sft()
    llmkit.check.run(checked)
    torch.manual_seed(1)
    expected = losses_of(unchecked)
    torch.manual_seed(1)
    assert losses_of(checked) == expected


def test_a_long_list_on_a_trainer_is_restored_as_well():
    trainer = plain()
    trainer.seen, trainer.recent = list(range(5000)), deque([1, 2], maxlen=2)
    with HFTraining(trainer).unchanged():
        trainer.seen.append(1)
        trainer.recent.append(3)
    assert trainer.seen == list(range(5000)) and list(trainer.recent) == [1, 2]


def test_a_model_too_large_to_probe_is_checked_by_a_small_one_of_its_class(monkeypatch):
    """TRL's own forward is put on the small model too, and adapters and frozen tensors are where the live one's are."""
    monkeypatch.setattr(subject, "SMALL", 100)
    monkeypatch.setattr(shrink, "SMALL", 100)
    for trainer in (sft(), lora()):
        report = llmkit.check.run(trainer, only=FAMILIES)
        assert report.count("fail") == report.count("not_run") == 0, report
        assert report["resume-weights"].status == "pass"
    assert report["lora-gets-no-gradient"].status == "pass"
    assert report["frozen-parameter-moves"].status == "pass"


def test_the_patched_forward_of_a_live_model_is_rebound_to_the_small_one():
    live, small = sft().model, llama(seed=1)
    redraw_(small)
    if "forward" not in vars(live):
        pytest.skip("this TRL does not write on the model")
    patch_forward_as(live, small)
    ids = torch.tensor([[3, 5, 7, 9]])
    found = small(input_ids=ids, labels=ids, fused_lm_head=True)
    assert torch.allclose(found.loss, small(input_ids=ids, labels=ids).loss, atol=1e-5)


def test_a_run_keeps_the_horizon_and_saves_where_it_stops(tmp_path):
    training = HFTraining(plain())
    trace = training.run(training.trainer.model, tmp_path, num_steps=8, stop_at=3, num_rows=12)
    assert len(trace.steps) == 3 and list(trace.checkpoints) == [3]
    assert [s.learning_rate for s in trace.steps] == pytest.approx([1e-3, 0.875e-3, 0.75e-3])
    assert all(len(step.ids) == 4 for step in trace.steps)  # two rows by two micro-batches


def test_a_stream_is_run_on_its_first_rows(tmp_path):
    trainer = lm_trainer(max_steps=4)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    trace = HFTraining(trainer).run(trainer.model, tmp_path, num_steps=4, num_rows=6)
    assert len(trace.steps) == 4


def test_rows_too_long_for_the_logits_of_a_batch_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.check.live.ELEMENTS", 30 * 424 * 8)
    rows = text_rows(40)
    trainer = lm_trainer(rows=rows)
    trace = HFTraining(trainer).run(trainer.model, tmp_path, num_steps=4, num_rows=8)
    assert max(len(ids) for step in trace.steps for ids in step.ids) <= 30
