"""Checks of optimisers, schedules, resuming and evaluation: what they must not flag, and their helpers."""

import functools
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import arguments, bpe_tokenizer, chat_rows, llama, lm_trainer, sft_trainer, text_rows
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer

from llmkit.check import runner
from llmkit.check.attach import from_parts
from llmkit.check.report import Report
from llmkit.check.resume import flatten, same
from llmkit.check.schedule import off_plan


def checked(trainer: Any, *only: str) -> Report:
    return runner.run(from_parts(trainer), runner.Selection(only=only or ("trainer", "settings")))


def troubles(report: Report) -> list[tuple[str, str, str]]:
    return [(c.status, c.id, c.measured) for c in report.checks if c.status in ("fail", "warn", "not_run")]


# clean trainers


CLEAN: dict[str, Any] = {
    "plain": lambda: lm_trainer(eval_rows=text_rows(13)),
    "sft": lambda: sft_trainer(eval_rows=chat_rows(13)),
    "sft-answers-only": lambda: sft_trainer(assistant_only_loss=True, eval_rows=chat_rows(13)),
    "sft-lora": lambda: sft_trainer(peft_config=LoraConfig(r=4, lora_dropout=0.1), eval_rows=chat_rows(13)),
    "sft-lora-checkpointed": lambda: sft_trainer(peft_config=LoraConfig(r=4), gradient_checkpointing=True),
    "sft-dora-and-embedding": lambda: sft_trainer(
        peft_config=LoraConfig(r=4, use_dora=True, modules_to_save=["embed_tokens"])
    ),
    "sft-packed": lambda: sft_trainer(rows=chat_rows(200), packing=True, eval_rows=chat_rows(13)),
    "sft-wrapped": lambda: sft_trainer(rows=chat_rows(200), packing=True, packing_strategy="wrapped"),
    "sft-padding-free": lambda: sft_trainer(padding_free=True, max_length=None, eval_rows=chat_rows(9)),
    "accumulation-by-epochs": lambda: sft_trainer(gradient_accumulation_steps=3, num_train_epochs=3, max_steps=-1),
    "few-rows-large-batches": lambda: lm_trainer(rows=text_rows(5), per_device_train_batch_size=8),
    "autocast": lambda: sft_trainer(bf16=True, eval_rows=chat_rows(13)),
    "label-smoothing": lambda: lm_trainer(label_smoothing_factor=0.1, eval_rows=text_rows(13)),
    "neftune": lambda: sft_trainer(neftune_noise_alpha=5),
    "last-batch-dropped": lambda: lm_trainer(dataloader_drop_last=True, eval_rows=text_rows(20)),
    "decay": lambda: lm_trainer(weight_decay=0.1),
    "adafactor": lambda: lm_trainer(optim="adafactor"),
    "sgd-without-state": lambda: lm_trainer(optim="sgd"),
    "frozen-embedding": lambda: lm_trainer(model=frozen_embedding()),
    "dropout": lambda: lm_trainer(model=gpt2(), eval_rows=text_rows(13)),
}


def frozen_embedding() -> Any:
    model = llama(eos_token_id=2)
    model.model.embed_tokens.requires_grad_(False)
    return model


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=424, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return GPT2LMHeadModel(config)


QUICK = ("plain", "sft-lora", "sft-packed", "accumulation-by-epochs", "label-smoothing", "dropout")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CLEAN])
def test_a_clean_trainer_has_no_finding(name):
    report = checked(CLEAN[name]())
    assert not troubles(report)
    assert report.count("pass") >= 9


def test_a_preference_trainer_has_no_finding(tmp_path):
    from trl import DPOConfig, DPOTrainer

    llama().save_pretrained(tmp_path)
    rows = [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for row in chat_rows()
    ]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path),
        args=arguments(DPOConfig, max_length=128, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=bpe_tokenizer(),
    )
    assert not troubles(checked(trainer))


def test_experts_without_a_token_and_renamed_weights_are_no_fail():
    """transformers' Trainer does lose Mixtral's experts on resume: a warning, since no user wrote that."""
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=424,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        max_position_embeddings=256,
    )
    report = checked(lm_trainer(model=AutoModelForCausalLM.from_config(config)))
    assert report.count("fail") == report.count("not_run") == 0, troubles(report)
    lost = report["resume-weights"]
    assert lost.status == "pass" or (lost.status == "warn" and "experts" in str(lost.evidence))


# spares of the optimiser


class MatricesAndRest(torch.optim.Optimizer):
    """Two optimisers behind one interface, whose groups are shared."""

    def __init__(self, model: Any, lr: float):
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.parts = [torch.optim.SGD(matrices, lr=lr, momentum=0.9), torch.optim.Adam(rest, lr=lr)]
        super().__init__([{"params": matrices}, {"params": rest}], {})
        self.param_groups = self.parts[0].param_groups + self.parts[1].param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(i)])
        self.param_groups = self.parts[0].param_groups + self.parts[1].param_groups


class TwoOptimizers(Trainer):
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = MatricesAndRest(self.model, self.args.learning_rate)
        return self.optimizer


def test_two_optimizers_behind_one_interface_are_united():
    report = checked(lm_trainer(cls=TwoOptimizers))
    assert not troubles(report)
    assert report["parameter-not-in-optimizer"].status == "pass"


class Rounding(torch.optim.AdamW):
    """Writes each update with stochastic rounding: right on average."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        exact = {p: p.data for group in self.param_groups for p in group["params"] if p.grad is not None}
        for p in exact:
            p.data, p.grad = p.data.float(), p.grad.float()
        super().step()
        for p, before in exact.items():
            noise = torch.randint_like(p.data, 1 << 16).int()
            bits = (p.data.view(torch.int32) + noise) & ~0xFFFF
            p.data, p.grad = bits.view(torch.float32).to(before.dtype), p.grad.to(before.dtype)


class Rounded(Trainer):
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = Rounding(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


def test_stochastic_rounding_loses_no_update():
    options = dict(model=llama(eos_token_id=2).bfloat16(), learning_rate=1e-5)
    assert checked(lm_trainer(**options), "update-lost-in-rounding")["update-lost-in-rounding"].status == "warn"
    options["model"] = llama(eos_token_id=2).bfloat16()
    found = checked(lm_trainer(cls=Rounded, **options), "update-lost-in-rounding")
    assert found["update-lost-in-rounding"].status == "pass", troubles(found)


def test_adapters_in_float32_over_a_bfloat16_base_lose_no_update():
    trainer = sft_trainer(model=llama().bfloat16(), peft_config=LoraConfig(r=4), learning_rate=1e-5)
    assert checked(trainer, "update-lost-in-rounding")["update-lost-in-rounding"].status == "not_applicable"


def test_a_multimodal_part_that_text_does_not_use_is_only_mentioned():
    model = llama(eos_token_id=2)
    model.vision_tower = torch.nn.Linear(4, 4)
    found = checked(lm_trainer(model=model), "no-gradient")["no-gradient"]
    assert found.status == "warn" and "vision_tower" in str(found.evidence)


def test_a_copied_head_below_an_adapter_stays_frozen():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    report = checked(sft_trainer(peft_config=config), "trainer")
    assert report.count("fail") == 0, troubles(report)


# schedules


def linear(steps: int, warmup: int = 0, peak: float = 1e-3, horizon: int | None = None) -> list[float]:
    end = horizon or steps
    down = [peak * max(0.0, (end - t) / max(end - warmup, 1)) for t in range(warmup, steps)]
    return [peak * t / warmup for t in range(warmup)] + down


def cosine(steps: int, period: int, peak: float = 1e-3) -> list[float]:
    return [peak * (1 + math.cos(math.pi * t / period)) / 2 for t in range(steps)]


@pytest.mark.parametrize(
    ("rates", "kind", "options"),
    [
        (linear(100), "linear", {}),
        (linear(100, 10), "linear", {}),
        (linear(3), "linear", {}),
        (cosine(100, 100), "cosine", {}),
        ([1e-3] * 50, "constant", {}),
        ([1e-3 * min(1, t / 10) for t in range(50)], "constant_with_warmup", {}),
        ([1e-3 / (1 + t) ** 0.5 for t in range(50)], "inverse_sqrt", {}),
        ([1e-3] * 80 + [1e-3 * (20 - t) / 20 for t in range(20)], "warmup_stable_decay", {"num_decay_steps": 20}),
        ([1e-3] * 98 + [1e-3, 5e-4], "warmup_stable_decay", {"num_decay_steps": 2}),
        (cosine(25, 25) * 4, "cosine_with_restarts", {}),
        (cosine(25, 25) * 4, None, {}),  # a user's own restarts: jumps of one step
        ([max(r, 1e-4) for r in cosine(100, 100)], "cosine_with_min_lr", {"min_lr": 1e-4}),
        (cosine(100, 50), "cosine", {"num_cycles": 1.0}),
        ([1e-3 * (1 - t / 100) ** 2 for t in range(100)], "polynomial", {"power": 2.0}),
        ([4e-5 + 1e-3 * t / 30 for t in range(29)] + linear(71), None, {}),  # one cycle
    ],
)
def test_a_schedule_as_planned_has_no_finding(rates, kind, options):
    assert off_plan(rates, None if kind is None else 1e-3, kind, options, 0) is None


@pytest.mark.parametrize(
    ("rates", "kind", "status", "word"),
    [
        (linear(100, horizon=10), "linear", "fail", "zero"),
        (linear(100, horizon=80), "linear", "warn", "zero"),
        (linear(100, horizon=400), "linear", "fail", "of the peak"),
        (linear(100, horizon=130), "linear", "warn", "of the peak"),
        (cosine(100, 25), None, "fail", "rises"),
        (cosine(100, 25), "cosine", "fail", "rises"),
        (linear(100, peak=2e-3), "linear", "fail", "above"),
        (linear(100, peak=2e-4), "linear", "fail", "not the"),
        ([1e-3 * t / 200 for t in range(100)], "linear", "warn", "warm-up"),
        ([0.0] * 20, "linear", "fail", "0 at every"),
    ],
)
def test_a_schedule_off_its_plan_is_found(rates, kind, status, word):
    warmup = 200 if "warm-up" in word else 0
    found = off_plan(rates, None if kind is None else 1e-3, kind, {}, warmup)
    assert found is not None and found[0] == status and word in found[1]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 12}),
        ("reduce_lr_on_plateau", {}),
    ],
)
def test_every_schedule_of_transformers_is_as_planned(kind, options):
    trainer = lm_trainer(
        max_steps=60,
        warmup_steps=6,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        eval_rows=text_rows(9),
        eval_strategy="steps",  # reduce_lr_on_plateau asks for it
        eval_steps=20,
    )
    report = checked(trainer, "learning-rate-off-plan", "learning-rate-not-per-step", "resume-learning-rate")
    assert not troubles(report)


def test_schedulers_of_the_users_own_are_as_planned():
    for make in (
        functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=40),
        functools.partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=10),
        functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10),
    ):
        model = llama(eos_token_id=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        trainer = lm_trainer(model=model, max_steps=40)
        trainer.optimizer, trainer.lr_scheduler = optimizer, make(optimizer)
        before = [group["lr"] for group in optimizer.param_groups], trainer.lr_scheduler.last_epoch
        report = checked(trainer, "learning-rate-off-plan", "learning-rate-not-per-step", "resume-learning-rate")
        assert not troubles(report), make
        assert ([group["lr"] for group in optimizer.param_groups], trainer.lr_scheduler.last_epoch) == before


def test_rates_per_layer_are_the_users_plan():
    model = llama(eos_token_id=2)
    groups = [{"params": [p], "lr": 1e-3 * 0.9**i} for i, p in enumerate(model.parameters())]
    trainer = lm_trainer(model=model, learning_rate=5e-5)
    trainer.optimizer = torch.optim.AdamW(groups)
    assert not troubles(checked(trainer, "learning-rate-off-plan", "weights-do-not-move"))


# spares of resuming


def test_restarting_the_data_by_choice_is_not_judged():
    report = checked(lm_trainer(ignore_data_skip=True), "trainer")
    assert report["resume-data-order"].status == "not_applicable"
    assert not troubles(report)


def test_checkpoints_of_weights_alone_are_not_judged():
    report = checked(lm_trainer(save_only_model=True), "trainer")
    names = ("resume-data-order", "resume-learning-rate", "resume-optimizer", "resume-weights")
    assert all(report[name].status == "not_applicable" for name in names)


def test_the_order_of_a_stream_is_not_judged():
    trainer = lm_trainer()
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    report = checked(trainer, "trainer")
    assert report["resume-data-order"].status == "not_applicable"
    assert report["resume-optimizer"].status == "pass"
    assert not troubles(report)


def test_an_order_that_a_sampler_of_transformers_loses_is_a_warning():
    found = checked(lm_trainer(accelerator_config={"use_seedable_sampler": False}), "resume-data-order")
    assert found["resume-data-order"].status == "warn"
    assert "use_seedable_sampler" in found["resume-data-order"].measured


def test_a_collator_that_draws_is_not_judged_by_what_it_drew():
    trainer = lm_trainer()
    collate = trainer.data_collator

    def masking(rows: list) -> Any:
        batch = collate(rows)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.3] = -100
        return batch

    trainer.data_collator = masking
    assert not troubles(checked(trainer, "resume-data-order", "resume-weights"))


def test_rows_that_are_all_the_same_show_no_order():
    found = checked(lm_trainer(rows=[{"text": "The cat runs."}] * 20), "resume-data-order")["resume-data-order"]
    assert found.status == "not_run" and "distinct" in found.measured


def test_nested_states_are_compared_leaf_by_leaf():
    state = {"a": {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}}}
    assert set(flatten(state)) == {"a.state.0.exp_avg", "a.state.0.step"}
    assert same(torch.tensor(3.0), 3.0) and not same(torch.ones(2), torch.zeros(2)) and not same(torch.ones(1), None)


# spares of evaluation


def test_what_the_stock_trainer_averages_is_a_warning_at_most():
    """One row of few tokens, hard to predict, among long ones."""
    rows = [{"text": "The cat runs. " * 12}] * 12 + [{"text": "?!"}]
    found = checked(lm_trainer(eval_rows=rows), "eval-depends-on-batch-size")["eval-depends-on-batch-size"]
    assert found.status in ("pass", "warn"), found
    assert "per token" in str(found.evidence) or found.status == "pass"


def test_a_perplexity_and_bits_per_byte_of_the_right_formula_pass():
    class Reports(Trainer):
        def log(self, logs: dict[str, float], *given: Any, **kwargs: Any) -> None:
            if "eval_loss" in logs:
                logs |= {"eval_ppl": math.exp(logs["eval_loss"]), "eval_bpb": logs["eval_loss"] / math.log(2)}
            super().log(logs, *given, **kwargs)

    found = checked(lm_trainer(cls=Reports, eval_rows=text_rows(13)), "perplexity-formula")["perplexity-formula"]
    assert found.status == "pass" and "eval_ppl" in found.measured


def test_a_part_that_always_stays_in_eval_mode_is_spared():
    class KeepsEval(Trainer):
        def training_step(self, model: Any, *given: Any, **kwargs: Any) -> Any:
            train = type(model).train

            def partly(mode: bool = True) -> Any:
                train(model, mode)
                model.model.embed_tokens.eval()
                return model

            model.train = partly
            return super().training_step(model, *given, **kwargs)

    found = checked(lm_trainer(cls=KeepsEval, eval_rows=text_rows(9)), "eval-in-train-mode")["eval-in-train-mode"]
    assert found.status == "pass", found


def test_named_evaluation_sets_are_evaluated():
    trainer = lm_trainer(eval_rows=text_rows(9))
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    assert not troubles(checked(trainer, "trainer"))


def test_a_trainer_without_a_training_set_is_not_applicable():
    trainer = lm_trainer(eval_rows=text_rows(9))
    trainer.train_dataset = None
    assert checked(trainer, "trainer").count("fail") == 0
