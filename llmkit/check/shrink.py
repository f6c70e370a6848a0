"""Shrink mode: a small model of the same class and kind of configuration, for finding bugs of code in seconds.

Owns which numbers of a config become small, and that every kind of layer stays.

    model = build_small(subject, keep_vocabulary=False)

A window, a soft-cap, a RoPE scaling, experts, a recurrent block: whatever has code of its own is kept, smaller. Leaves
out weights: they are redrawn by `subject.redraw_`.
"""

import copy
from typing import Any

import torch
from torch import nn

from .subject import SMALL, VOCABULARY, NotRun, Subject

WIDTH, HEADS, HEAD_DIM, WINDOW, EXPERTS = 64, 4, 16, 8, 4
LARGEST = 3 * SMALL  # parameters of a shrunk model with its whole vocabulary
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
ALL_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
# field -> what it may be at most; fields that are absent or None stay so
LIMITS: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "d_inner", "mamba_d_ssm"), 2 * WIDTH
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_intermediate_dim"), WIDTH // 2),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), WIDTH // 2),
    **dict.fromkeys(
        ("head_dim", "v_head_dim", "qk_nope_head_dim", "query_pre_attn_scalar", "attention_head_dim"), HEAD_DIM
    ),
    **dict.fromkeys(
        ("global_head_dim", "swa_head_dim", "kv_channels", "linear_key_head_dim", "linear_value_head_dim"), HEAD_DIM
    ),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "linear_num_key_heads", "linear_num_value_heads"), 16),
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_DIM),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),  # times the head is expand * width
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mem_blocks"), 1),
    **dict.fromkeys(("attention_hidden_size", "hidden_size_per_layer_input"), WIDTH),
}
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id")


def count_parameters(subject: Subject, config: Any) -> int:
    assert subject.make_model is not None
    with torch.device("meta"):
        return sum(p.numel() for p in subject.make_model(copy.deepcopy(config)).parameters())


def build_small(subject: Subject, keep_vocabulary: bool) -> nn.Module:
    """A model of the subject's class, at full size where that is small. Raises NotRun where it cannot be built."""
    if subject.make_model is None:
        raise NotRun("the model is too large to probe, and its class cannot be built from a config")
    config: Any = copy.deepcopy(subject.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        if count_parameters(subject, config) <= SMALL // 4:
            return subject.make_model(config)
        small = shrink(config, keep_vocabulary)
        if (count := count_parameters(subject, small)) > LARGEST:
            raise ValueError(f"{count:,} parameters are left after shrinking")
        return subject.make_model(small)
    except Exception as error:
        text = str(error).strip().split("\n")[0][:120]
        raise NotRun(f"no small model of this configuration can be built ({type(error).__name__}: {text})") from None


def shrink(config: Any, keep_vocabulary: bool = False) -> Any:
    """The same kind of config with few layers, narrow ones; values are the originals where they are small already."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "model_type", "dtype")}
    layers = next((values[key] for key in LAYERS if isinstance(values.get(key), int)), 0)
    kept = _kept_layers(values, layers)
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and layers and len(value) == layers:
            values[key] = [value[i] for i in kept]
        elif key in LIMITS and isinstance(value, int) and not isinstance(value, bool):
            values[key] = min(value, LIMITS[key])
        elif key in LAYERS and isinstance(value, int):
            values[key] = len(kept)
    _shrink_heads(values, config)
    _shrink_periods(values)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(key), dict):
            values[key] = _shrink_rope(values[key], values)
    if "head_dim" in values and "qk_rope_head_dim" in values:  # DeepSeek calls the rotary part its head_dim
        values["head_dim"] = (
            values["qk_rope_head_dim"] if config.head_dim == config.qk_rope_head_dim else values["head_dim"]
        )
    if not keep_vocabulary and isinstance(values.get("vocab_size"), int):
        values["vocab_size"] = min(values["vocab_size"], VOCABULARY)
        for i, key in enumerate(SPECIAL_IDS):
            values[key] = _clipped(values.get(key), values["vocab_size"], i)
    for nested in ("ffn_config", "attn_config", "text_config"):
        if isinstance(values.get(nested), dict):
            inner = values[nested]
            values[nested] = {
                k: min(v, LIMITS[k]) if k in LIMITS and isinstance(v, int) else v for k, v in inner.items()
            }
    return type(config).from_dict(values)


def _clipped(value: Any, size: int, instead: int) -> Any:
    if isinstance(value, list):
        return [v if v < size else instead for v in value] or None
    return instead if isinstance(value, int) and value >= size else value


def _kept_layers(values: dict[str, Any], layers: int) -> list[int]:
    """Indices that hold every kind of layer once, two at least."""
    kinds: list[Any] = [()] * layers
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and layers and len(value) == layers:
            kinds = [(*kind, str(v)) for kind, v in zip(kinds, value, strict=True)]
        if key in ("first_k_dense_replace", "num_dense_layers") and isinstance(value, int):
            kinds = [(*kind, i < value) for i, kind in enumerate(kinds)]
    first: dict[Any, int] = {}
    for i, kind in enumerate(kinds):
        first.setdefault(kind, i)
    kept = sorted(first.values())[:8]
    kept += [i for i in range(layers) if i not in kept][: max(0, min(2, layers) - len(kept))]
    pattern = values.get("block_types") or values.get("layers_block_type")
    if isinstance(pattern, (list, tuple)) and len(pattern) != layers:  # a pattern that repeats (RecurrentGemma)
        kept = list(range(min(layers, len(set(pattern)) + 1)))
    return sorted(kept) or [0, 1]


def _shrink_heads(values: dict[str, Any], config: Any) -> None:
    """Few heads with the ratio of query to key heads that there was; widths stay multiples of the heads."""
    name = next((key for key in ALL_HEADS if isinstance(values.get(key), int) and values[key] > 0), None)
    if name is None:
        return
    before, heads = values[name], min(values[name], HEADS)
    if "state_size" in values and "expand" in values:  # Mamba 2: heads times their size are expand * width
        heads = min(before, values["expand"] * WIDTH // HEAD_DIM)
    values[name] = heads
    for key in KV_HEADS:
        if isinstance(values.get(key), int) and values[key] > 0:
            values[key] = max(1, heads * values[key] // before)
    for key in ("num_global_key_value_heads", "num_attention_heads_per_layer"):
        if isinstance(values.get(key), int):
            values[key] = min(values[key], heads)


def _shrink_periods(values: dict[str, Any]) -> None:
    """Hybrids that count their attention or expert layers: every second one, four layers."""
    for kind in ("attn_layer", "expert_layer"):
        if isinstance(values.get(f"{kind}_period"), int) and values[f"{kind}_period"] > 1:
            values[f"{kind}_period"], values[f"{kind}_offset"] = 2, 1
            for key in LAYERS:
                if isinstance(values.get(key), int):
                    values[key] = 4


def _shrink_rope(rope: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Per-frequency factors as long as half of the rotary part."""
    if rope and all(isinstance(v, dict) for v in rope.values()):  # one per kind of layer
        return {kind: _shrink_rope(inner, values) for kind, inner in rope.items()}
    width = values.get("head_dim") or HEAD_DIM
    half = max(1, int(width * (rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1)) // 2)
    rope = {k: v[:half] if k in ("short_factor", "long_factor") and isinstance(v, list) else v for k, v in rope.items()}
    if isinstance(rope.get("mrope_section"), list):
        parts = len(rope["mrope_section"])
        rope["mrope_section"] = [half - half // parts * (parts - 1), *[half // parts] * (parts - 1)]
    return rope
