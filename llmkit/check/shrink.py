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

from .forward import text_config
from .subject import SMALL, VOCABULARY, NotRun, Subject

WIDTH, HEADS, HEAD_DIM, WINDOW, EXPERTS, CHUNK = 64, 4, 16, 8, 4, 8
LARGEST = 3 * SMALL  # parameters of a shrunk model with its whole vocabulary
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers")
ALL_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
    "num_query_groups",
)  # fmt: skip
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
# what a field may be at most; fields that are absent or None stay so
AT_MOST: dict[int, str] = {
    WIDTH: "hidden_size n_embd d_model lru_width word_embed_proj_dim embedding_size embedding_dim emb_dim",
    2 * WIDTH: "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size d_inner attention_hidden_size decoder_ffn_dim "
    "encoder_ffn_dim shared_mlp_intermediate_size",
    WIDTH // 2: "moe_intermediate_size expert_ffn_hidden_size moe_intermediate_dim shared_expert_intermediate_size "
    "shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size attention_head_dim",
    HEAD_DIM: "head_dim v_head_dim qk_nope_head_dim query_pre_attn_scalar global_head_dim swa_head_dim kv_channels "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim d_head "
    "q_lora_rank kv_lora_rank laurel_rank hidden_size_per_layer_input index_head_dim adapter_rank",
    HEAD_DIM // 2: "qk_rope_head_dim rotary_dim state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank",
    8: "mamba_n_heads mamba_num_heads",  # times the head is expand * width
    EXPERTS: "num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts "
    "linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads",
    2: "num_experts_per_tok num_experts_per_token moe_top_k moe_k experts_per_token moe_topk zero_expert_num top_k",
    1: "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts mamba_n_groups "
    "n_groups mamba_ngroups first_k_dense_replace moe_layer_start_index num_dense_layers num_nextn_predict_layers "
    "num_mem_blocks num_layers_per_stack",
    WINDOW: "sliding_window attention_window_size attention_chunk_size window_size",
    CHUNK: "mamba_chunk_size chunk_size",
}
LIMITS = {field: most for most, fields in AT_MOST.items() for field in fields.split()}
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "n_words")
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
            return subject.make_model(with_short_window(config))
        make, config = _text_part(subject.make_model, config)
        small = shrink(config, keep_vocabulary)
        with torch.device("meta"):
            count = sum(p.numel() for p in make(copy.deepcopy(small)).parameters())
        if count > LARGEST:
            raise ValueError(f"{count:,} parameters are left after shrinking")
        return make(small)
    except Exception as error:
        text = " ".join(str(error).split())[:150]
        raise NotRun(f"no small model of this configuration can be built ({type(error).__name__}: {text})") from None


def with_short_window(config: Any) -> Any:
    """The same config, with windows that a short row goes beyond."""
    for inner in (config, text_config(config)):
        for key in ("sliding_window", "attention_window_size", "attention_chunk_size"):
            value = getattr(inner, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
                setattr(inner, key, WINDOW)
    return config


def _text_part(make: Any, config: Any) -> tuple[Any, Any]:
    """Of a multi-modal model, the causal LM of its text config: pictures and sound are not what is checked here."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = text_config(config)
    if text is config:
        return make, config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{type(text).__name__} has no causal language model of its own")
    return lambda c: AutoModelForCausalLM.from_config(c, dtype=torch.float32), text


def shrink(config: Any, keep_vocabulary: bool = False) -> Any:
    """The same kind of config with few layers, narrow ones; values are the originals where they are small already."""
    before = config.to_dict()
    values = {k: v for k, v in before.items() if k not in ("transformers_version", "model_type", "dtype")}
    layers = next((values[key] for key in LAYERS if isinstance(values.get(key), int)), 0)
    kept = _kept_layers(values, layers)
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and layers and len(value) == layers:
            values[key] = [_limited(key, value[i]) for i in kept]
        elif _holds_layers(key, value, layers):
            values[key] = [kept.index(i) for i in value if i in kept]
        elif key in LAYERS and isinstance(value, int):
            values[key] = min(value, len(kept))
        else:
            values[key] = _limited(key, value)
    _shrink_heads(values)
    _shrink_periods(values, layers)
    if isinstance(values.get("per_layer_config"), dict):
        chosen = {i: v for k, v in values["per_layer_config"].items() if str(k).isdigit() and (i := int(k)) in kept}
        values["per_layer_config"] = {kept.index(i): _shrink_own(own, values, before) for i, own in chosen.items()}
    _keep_relations(values, before, kept)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(key), dict):
            values[key] = _shrink_rope(values[key], values)
    if not keep_vocabulary and isinstance(values.get("vocab_size"), int):
        for key in VOCABULARIES:
            if isinstance(values.get(key), int):
                values[key] = min(values[key], VOCABULARY)
        for i, key in enumerate(SPECIAL_IDS):
            values[key] = _clipped(values.get(key), values["vocab_size"], i)
    for nested in ("ffn_config", "attn_config"):
        if isinstance(values.get(nested), dict):
            values[nested] = {k: _limited(k, v) for k, v in values[nested].items()}
    return type(config).from_dict(values)


def _limited(key: str, value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return min(value, LIMITS[key]) if is_number and key in LIMITS else value


def _holds_layers(key: str, value: Any, layers: int) -> bool:
    """A list of indices of layers, such as mlp_only_layers or attn_layer_indices."""
    is_named = key.endswith(("_layers", "_indices", "_idxs", "_layer_ids"))
    return is_named and isinstance(value, (list, tuple)) and all(isinstance(i, int) and i < layers for i in value)


def _shrink_own(own: Any, values: dict[str, Any], before: dict[str, Any]) -> Any:
    """What one layer has of its own; what is larger than the other layers' stays larger."""
    small = dict(own)
    for key, value in own.items():
        small[key] = values.get(key, value)
        if isinstance(value, int) and isinstance(before.get(key), int) and before[key]:
            small[key] = max(1, values[key] * value // before[key])
    return small


def _keep_relations(values: dict[str, Any], before: dict[str, Any], kept: list[int]) -> None:
    """Fields that must fit each other, and did."""
    has = lambda *keys: all(isinstance(before.get(k), int) for k in keys)  # noqa: E731
    if has("qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"):
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    if has("head_dim", "qk_rope_head_dim") and before["head_dim"] == before["qk_rope_head_dim"]:
        values["head_dim"] = values["qk_rope_head_dim"]  # DeepSeek calls the rotary part its head_dim
    elif has("head_dim", "qk_head_dim") and before["head_dim"] == before["qk_head_dim"]:
        values["head_dim"] = values["qk_head_dim"]
    elif (
        has("head_dim", "qk_nope_head_dim", "qk_rope_head_dim")
        and before["head_dim"] == before["qk_nope_head_dim"] + before["qk_rope_head_dim"]
    ):
        values["head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    if has("mamba_d_ssm", "mamba_n_heads", "mamba_d_head"):
        values["mamba_d_ssm"] = values["mamba_n_heads"] * values["mamba_d_head"]
    if has("n_mamba_heads", "mamba_headdim"):
        values["n_mamba_heads"] = 2 * WIDTH // values["mamba_headdim"]
    if has("d_head", "n_head", "d_model"):
        values["d_head"] = values["d_model"] // values["n_head"]
    if has("num_layers_per_stack", "num_hidden_layers"):
        share = before["num_hidden_layers"] // before["num_layers_per_stack"]
        values["num_hidden_layers"] = share * values["num_layers_per_stack"]
    if before.get("num_kv_shared_layers"):
        first = before["num_hidden_layers"] - before["num_kv_shared_layers"]
        values["num_kv_shared_layers"] = sum(i >= first for i in kept)


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
        elif _holds_layers(key, value, layers):
            kinds = [(*kind, i in value) for i, kind in enumerate(kinds)]
        elif key == "per_layer_config" and isinstance(value, dict):
            own = {int(k): str(v) for k, v in value.items() if str(k).isdigit()}
            kinds = [(*kind, own.get(i)) for i, kind in enumerate(kinds)]
        elif key in ("first_k_dense_replace", "num_dense_layers") and isinstance(value, int):
            kinds = [(*kind, i < value) for i, kind in enumerate(kinds)]
        elif key == "num_kv_shared_layers" and isinstance(value, int):
            kinds = [(*kind, i >= layers - value) for i, kind in enumerate(kinds)]
    first: dict[Any, int] = {}
    for i, kind in enumerate(kinds):
        first.setdefault(kind, i)
    kept = sorted(first.values())[:8]
    kept += [i for i in range(layers) if i not in kept][: max(0, min(2, layers) - len(kept))]
    pattern = values.get("block_types") or values.get("layers_block_type")
    if isinstance(pattern, (list, tuple)) and len(pattern) != layers:  # a pattern that repeats (RecurrentGemma)
        kept = list(range(min(layers, len(set(pattern)) + 1)))
    return sorted(kept) or [0, 1]


def _shrink_heads(values: dict[str, Any]) -> None:
    """Few heads with the ratio of query to key heads that there was; widths stay multiples of the heads."""
    names = [key for key in ALL_HEADS if isinstance(values.get(key), int) and values[key] > 0]
    if not names:
        return
    before, heads = values[names[0]], min(values[names[0]], HEADS)
    if "state_size" in values and "expand" in values:  # Mamba 2: heads times their size are expand * width
        heads = min(before, values["expand"] * WIDTH // HEAD_DIM)
    else:
        heads = next(h for h in range(heads, 0, -1) if WIDTH % h == 0)
    for name in names:
        values[name] = min(values[name], heads)
    for key in KV_HEADS:
        if isinstance(values.get(key), int) and values[key] > 0:
            values[key] = max(1, heads * values[key] // before)
            while heads % values[key]:
                values[key] -= 1
    for key in ("num_global_key_value_heads", "num_attention_heads_per_layer"):
        if isinstance(values.get(key), int):
            values[key] = min(values[key], heads)


def _shrink_periods(values: dict[str, Any], layers: int) -> None:
    """Hybrids that count their attention or expert layers: every second one, four layers."""
    if any(isinstance(v, (list, tuple)) and len(v) == values.get("num_hidden_layers") for v in values.values()):
        return  # they are listed as well
    for period, offset in (("attn_layer", "attn_layer_offset"), ("expert_layer", "expert_layer_offset")):
        if isinstance(values.get(f"{period}_period"), int) and values[f"{period}_period"] > 1:
            values[f"{period}_period"], values[offset] = 2, 1
            for key in LAYERS:
                if isinstance(values.get(key), int):
                    values[key] = min(4, layers)
    for key in ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "moe_every_n_layers"):
        if isinstance(values.get(key), int) and values[key] > 2:
            values[key] = 2


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
