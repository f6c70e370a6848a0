"""What learns, and what only looks odd: losses with a floor, rows that begin alike, adapters, wide heads, muP."""

import math

import pytest
import torch
from planted.plants_learning import mixtral
from tiny import CORPUS, bpe_tokenizer, chat_rows, completion_rows, llama, lm_trainer, sft_trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer

from llmkit.check import overfit
from llmkit.check.attach import from_parts
from llmkit.check.report import CheckResult
from llmkit.check.runner import get_check, run_one


def result(name: str, trainer=None, **parts) -> CheckResult:
    return run_one(get_check(name), from_parts(trainer, **parts))


# the first loss


def test_a_wide_head_may_cost_what_its_width_costs():
    """Unit numbers over a head of deviation 0.02: 4096 of them cost 0.8 nats, which Llama-7B does from scratch."""
    wide = llama(hidden_size=4096, intermediate_size=8, num_hidden_layers=1, vocab_size=300, head_dim=8)
    found = result("initial-loss", model=wide, scratch=True)
    assert found.status == "pass" and float(found.measured.split()[1].rstrip(",")) > math.log(300) + 0.5


def test_a_head_of_zeros_is_exactly_undecided():
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    assert result("initial-loss", model=model, scratch=True).status == "pass"


def test_trained_weights_are_not_asked_and_multipliers_are_a_warning():
    assert result("initial-loss", model=llama()).status == "not_applicable"
    config = AutoConfig.for_model(
        "granite", vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=0.02,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert result("initial-loss", model=model, scratch=True).status == "warn"


# experts


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "jamba", "phimoe"])
def test_stock_experts_collapse_by_exactly_experts_over_chosen(kind):
    from llmkit.check.attach import builder
    from llmkit.check.subject import Subject

    subject = Subject(kind, config=AutoConfig.for_model(kind), make_model=builder(False))
    found = run_one(get_check("moe-balance-void"), subject)
    assert found.status == "pass" and "undecided 2.00 (exact 2.0)" in found.measured, found


def test_dense_models_and_all_experts_chosen_are_not_asked():
    assert result("moe-balance-void", model=llama()).status == "not_applicable"
    model = mixtral()
    model.config.num_experts_per_tok = 8
    assert result("moe-balance-void", model=model).status == "not_applicable"


# learning by heart


def test_what_rows_leave_open_is_known_by_hand():
    """Three rows begin with 1; after it come 2, 2 and 3: ln(3/2) twice and ln 3 once, of six targets, five knowable."""
    ids = torch.tensor([[1, 2, 4], [1, 2, 5], [1, 3, 4]])
    nats, share = overfit._left_open({"input_ids": ids, "labels": ids})
    first = 2 * math.log(3 / 2) + math.log(3)
    second = 2 * math.log(2)
    assert nats == pytest.approx((first + second) / 6) and share == pytest.approx((2 + 1 + 1) / 6)


def test_rows_are_cut_around_the_end_of_their_answer():
    """Row 0: 20 of prompt, 3 of answer, an EOS without label, padding. Row 1 trains 25 tokens from position 2 on."""
    ids = torch.arange(1, 31).repeat(2, 1)
    labels = torch.full_like(ids, -100)
    labels[0, 20:23] = ids[0, 20:23]
    labels[1, 2:27] = ids[1, 2:27]
    mask = torch.ones_like(ids)
    mask[0, 25:] = 0
    cut = overfit._cut({"input_ids": ids, "labels": labels, "attention_mask": mask}, 12)
    assert cut["input_ids"][0].tolist() == list(range(13, 25))  # ends with the token behind the answer
    assert cut["input_ids"][1].tolist() == list(range(1, 13))
    assert (cut["labels"][0] != -100).sum() == 3


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**dict(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM") | options)


LONG = [
    {
        "messages": [
            {"role": "user", "content": "Tell me"},
            {"role": "assistant", "content": "".join(CORPUS[(i * 37 + j * 11) % len(CORPUS)] for j in range(15))},
        ]
    }
    for i in range(16)
]
TRAINERS = {
    "adapter of one rank": lambda: sft_trainer(peft_config=lora(lora_dropout=0.1)),
    "adapter and embedding": lambda: sft_trainer(
        model=llama(tie_word_embeddings=True), peft_config=lora(modules_to_save=["embed_tokens"])
    ),
    "token rows": lambda: sft_trainer(peft_config=lora(trainable_token_indices=[3, 4])),
    "long answers": lambda: sft_trainer(rows=LONG, max_length=512, assistant_only_loss=True),
    "three turns": lambda: sft_trainer(rows=chat_rows(turns=3), max_length=256),
    "packing": lambda: sft_trainer(packing=True),
    "completions": lambda: sft_trainer(
        rows=completion_rows(), tokenizer=bpe_tokenizer(chat=False), model=llama(eos_token_id=2)
    ),
    "all rows begin with BOS": lambda: lm_trainer(tokenizer=bpe_tokenizer(bos=True, chat=False)),
    "label smoothing": lambda: lm_trainer(label_smoothing_factor=0.1),
    "noise on embeddings": lambda: sft_trainer(neftune_noise_alpha=5),
    "bfloat16": lambda: sft_trainer(model=llama().bfloat16()),
    "dropout": lambda: lm_trainer(model=llama(attention_dropout=0.3, eos_token_id=2)),
    "frozen but for the head": lambda: lm_trainer(model=all_but_head_frozen()),
}


def all_but_head_frozen():
    model = llama(eos_token_id=2)
    model.model.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", TRAINERS)
def test_clean_trainers_learn_a_batch_by_heart(name):
    trainer = TRAINERS[name]()
    wanted = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    found = result("does-not-overfit", trainer)
    assert found.status == "pass", found
    assert {n: p.requires_grad for n, p in trainer.model.named_parameters()} == wanted


def test_labels_that_the_collator_shifts_are_next_tokens_all_the_same():
    class Shifted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels").roll(-1, 1)
            labels[:, -1] = -100
            logits = model(**inputs).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    assert result("does-not-overfit", lm_trainer(cls=Shifted)).status == "pass"


def test_a_generation_config_that_penalises_repetition_is_not_a_bug():
    model = llama()
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.do_sample = True
    assert result("does-not-overfit", model=model, tokenizer=bpe_tokenizer()).status == "pass"


def test_a_model_without_labels_and_without_generate_learns_by_plain_cross_entropy():
    class Bare(LlamaForCausalLM):
        generate = None

        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    found = result("does-not-overfit", model=Bare(llama().config))
    assert found.status == "pass", found


# the same run


def test_dropout_and_a_collator_that_draws_are_the_same_run_again():
    inner = lm_trainer().data_collator

    class Drawing:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(3)

        def __call__(self, rows):
            batch = inner(rows)
            noise = torch.rand(batch["labels"].shape, generator=self.generator) < 0.2
            batch["labels"] = batch["labels"].masked_fill(noise | (torch.rand(batch["labels"].shape) < 0.1), -100)
            return batch

    trainer = lm_trainer(collator=Drawing(), model=llama(attention_dropout=0.2, eos_token_id=2))
    assert result("same-seed-differs", trainer).status == "pass"
    assert result("same-seed-differs", model=llama(attention_dropout=0.2)).status == "pass"


# a sample


def test_rows_beyond_the_tokenizer_and_special_tokens_are_no_bug():
    tokenizer = bpe_tokenizer()
    assert result("sample-does-not-decode", model=llama(vocab_size=9000), tokenizer=tokenizer).status == "pass"


@pytest.mark.parametrize("kind", ["bert", "bart", "prophetnet"])
def test_encoders_and_halves_of_pairs_are_not_asked_to_predict_the_next_token(kind):
    from llmkit.check.attach import builder
    from llmkit.check.subject import Subject

    subject = Subject(kind, config=AutoConfig.for_model(kind), make_model=builder(False))
    assert run_one(get_check("does-not-overfit"), subject).status == "not_applicable"
