"""The same weights under another name: llmkit <-> Qwen3 (QK-norm) and Llama (no QK-norm).

Owns the mapping of configs; tensor names are identical, so weights move 1:1 and logits are equal bit for bit.

    qwen3 = to_plain(model)            # Qwen3ForCausalLM, or LlamaForCausalLM when qk_norm is off
    model = from_plain(qwen3)

Leaves out everything that is not a causal LM of these two shapes.
"""

from copy import deepcopy

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .configuration_llmkit import LlmkitConfig
from .modeling_llmkit import LlmkitForCausalLM

TARGETS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps attention_dropout "
    "use_cache tie_word_embeddings pad_token_id bos_token_id eos_token_id"
).split()


def _move(model: PreTrainedModel, config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    twin = cls._from_config(config, dtype=model.dtype).to(model.device)  # .to(dtype) would round RoPE's frequencies
    twin.load_state_dict(model.state_dict(), strict=True)
    twin.generation_config = deepcopy(model.generation_config)
    return twin.train(model.training)


def _shared(config: PreTrainedConfig) -> dict:
    return {key: getattr(config, key) for key in SHARED} | {"rope_parameters": dict(config.rope_parameters)}


def to_plain(model: LlmkitForCausalLM, target: str | None = None) -> PreTrainedModel:
    """The same function as a stock transformers model that vLLM, llama.cpp and others run without our code.

    `target` is "qwen3" or "llama"; None picks the one that fits. Raises ValueError naming the option that it lacks.
    """
    config = model.config
    target = target or ("qwen3" if config.qk_norm else "llama")
    if target not in TARGETS:
        raise ValueError(f"to={target!r} is unknown; allowed: {', '.join(TARGETS)}")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r} has no {target} equivalent; train with 'silu' to export")
    if config.final_logit_softcapping is not None:
        raise ValueError(
            f"final_logit_softcapping={config.final_logit_softcapping} has no {target} equivalent; "
            "train with null to export"
        )
    if config.qk_norm != (target == "qwen3"):
        raise ValueError(
            f"qk_norm={config.qk_norm} has no {target} equivalent; use to={'qwen3' if config.qk_norm else 'llama'}"
        )
    config_cls, model_cls = TARGETS[target]
    return _move(model, config_cls(**_shared(config)), model_cls)


def from_plain(model: PreTrainedModel) -> LlmkitForCausalLM:
    """Our model with the weights of a Qwen3 or Llama; raises ValueError for options that ours lacks."""
    config = model.config
    if config.model_type not in TARGETS:
        raise ValueError(f"model_type={config.model_type!r} cannot become llmkit; allowed: {', '.join(TARGETS)}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(config, key, False):
            raise ValueError(f"{key}=True has no llmkit equivalent")
    if config.hidden_act != "silu":  # their relu2 is gated, ours is not
        raise ValueError(f"hidden_act={config.hidden_act!r} has no llmkit equivalent; allowed: 'silu'")
    ours = LlmkitConfig(**_shared(config), qk_norm=config.model_type == "qwen3")
    return _move(model, ours, LlmkitForCausalLM)
