"""Settings that contradict each other or the model."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from peft import LoraConfig, get_peft_model
from tiny import arguments, chat_rows, llama, lm_trainer, sft_trainer
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.llama import modeling_llama

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant

Patch = pytest.MonkeyPatch


def gpt2(**options: Any) -> Any:
    given = dict(vocab_size=424, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(**given | options))


@plant("rows-beyond-learned-positions", caught_by="length-beyond-positions", bug="M8", evidence="384 tokens")
def rows_beyond_learned_positions(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """max_length 512 over 64 learned positions, and a row of several turns that is longer."""
    length = 512 if is_planted else 64
    return from_parts(sft_trainer(rows=chat_rows(16, turns=6), model=gpt2(), max_length=length))


@plant("length-beyond-rope", caught_by="length-beyond-positions", bug="M8", status="warn", evidence="300 tokens")
def length_beyond_rope(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """Rows of 300 tokens for 256 rotary positions without scaling; the twin scales them."""
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model = llama() if is_planted else llama(rope_parameters=scaled)
    subject = from_parts(model=model, dataset=[{"input_ids": [5] * 300}])
    subject.settings = {"max_length": 300}
    return subject


@plant("rope-changed-after-loading", caught_by="rope-setting-ignored", bug="M8", evidence="configuration")
def rope_changed_after_loading(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The context is "extended" in the config of a model that is already built."""
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model = llama() if is_planted else llama(rope_parameters=scaled)
    model.config.rope_parameters = scaled
    return from_parts(model=model)


@plant("frequencies-written-over", caught_by="rope-setting-ignored", bug="M8", evidence="50.0%")
def frequencies_written_over(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """Linear scaling by two, done to the buffer and not to the configuration: it is lost on reload."""
    model = llama()
    if is_planted:
        model.model.rotary_emb.inv_freq.mul_(0.5)
    return from_parts(model=model)


@plant("theta-is-a-constant", caught_by="rope-setting-ignored", bug="M8", evidence="ignored")
def theta_is_a_constant(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The class uses 10000 whatever the configuration says, so rebuilding it changes nothing either."""
    if is_planted:

        def constant(config: Any, *given: Any, **kwargs: Any) -> Any:
            dim = config.hidden_size // config.num_attention_heads
            return 1.0 / (10_000.0 ** (torch.arange(0, dim, 2).float() / dim)), 1.0

        cls = modeling_llama.LlamaRotaryEmbedding
        patch.setattr(cls, "compute_default_rope_parameters", staticmethod(constant))
    return from_parts(model=llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))


@plant("scaling-is-dropped", caught_by="rope-setting-ignored", bug="M8", evidence="llama3")
def scaling_is_dropped(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A rotary class of one's own that reads theta and no scaling."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    if is_planted:
        plain = modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters
        patch.setitem(modeling_llama.ROPE_INIT_FUNCTIONS, "llama3", lambda config, *a, **k: plain(config))
    return from_parts(model=llama(rope_parameters=rope))


@plant("inv-freq-in-bf16", caught_by="rope-setting-ignored", bug="P2", status="warn", evidence="bfloat16")
def inv_freq_in_bf16(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """model.bfloat16() casts the buffer with the frequencies as well."""
    model = llama(max_position_embeddings=4096)
    return from_parts(model=model.bfloat16() if is_planted else model)


@plant("head-replaced-on-a-tied-model", caught_by="tied-head-mismatch", bug="M9", evidence="two tensors")
def head_replaced_on_a_tied_model(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A new lm_head on a model whose configuration ties it: it is lost when the model is saved."""
    model = llama(tie_word_embeddings=True)
    if is_planted:
        model.lm_head = nn.Linear(32, 424, bias=False)
    return from_parts(model=model)


@plant("tied-by-hand", caught_by="tied-head-mismatch", bug="M9", evidence="one tensor")
def tied_by_hand(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """The head is tied by hand and the configuration says that it is not."""
    model = llama(tie_word_embeddings=False)
    if is_planted:
        model.lm_head.weight = model.model.embed_tokens.weight
    return from_parts(model=model)


@plant("reentrant-over-an-adapter", caught_by="lora-with-reentrant-checkpointing", bug="F1", status="warn")
def reentrant_over_an_adapter(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """Layers are checkpointed by hand, reentrantly, under an adapter."""
    model = get_peft_model(llama(eos_token_id=2), LoraConfig(r=4))
    function = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=is_planted)
    model.get_base_model()._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    return from_parts(lm_trainer(model=model))


@plant("packing-for-a-model-without-positions", caught_by="packing-without-isolation", bug="M2", status="warn")
def packing_for_a_model_without_positions(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """BLOOM's forward takes no position_ids: packed documents see each other."""
    bloom = BloomConfig(vocab_size=424, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=4)
    model = BloomForCausalLM(bloom) if is_planted else llama()
    return from_parts(sft_trainer(rows=chat_rows(64), model=model, packing=True))


@plant("packing-with-a-mask", caught_by="packing-without-isolation", bug="M2", status="warn", evidence="attention_mask")
def packing_with_a_mask(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """A collator of one's own adds an attention mask of ones to packed rows."""
    trainer = sft_trainer(rows=chat_rows(64), packing=True)
    own = trainer.data_collator

    def with_mask(rows: list) -> dict[str, Any]:
        batch = own(rows)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    if is_planted:
        trainer.data_collator = with_mask
    return from_parts(trainer)


@plant("best-perplexity-is-the-highest", caught_by="best-metric-inverted", bug="R6", evidence="perplexity")
def best_perplexity_is_the_highest(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """transformers takes every metric that does not end in "loss" as better when it is higher."""
    args = arguments(metric_for_best_model="eval_perplexity", greater_is_better=None if is_planted else False)
    return from_parts(model=llama(), args=args)


@plant("best-accuracy-is-the-lowest", caught_by="best-metric-inverted", bug="R6", evidence="accuracy")
def best_accuracy_is_the_lowest(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """greater_is_better=False, left over from a run that kept the lowest loss."""
    args = arguments(metric_for_best_model="eval_mean_token_accuracy", greater_is_better=not is_planted)
    return from_parts(model=llama(), args=args)


@plant("bf16-weights-and-a-tiny-rate", caught_by="bf16-swallows-updates", bug="P1", status="warn", evidence="rounded")
def bf16_weights_and_a_tiny_rate(is_planted: bool, patch: Patch, folder: Path) -> Subject:
    """DPO's usual rate of 1e-6 on bfloat16 weights."""
    rate = 1e-6 if is_planted else 1e-2
    return from_parts(lm_trainer(model=llama(eos_token_id=2).bfloat16(), learning_rate=rate))
