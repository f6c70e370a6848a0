"""The next token of our own model on a CPU, one row at a time, without the overhead of `generate`.

Owns a static KV cache and the forward pass over it: the model's own maths on its own weights, in fewer calls. Query,
key and value are one product, gate and up another, both norms of attention one; positions come from a table.

    decoder = LeanDecoder(model);  logits = decoder.forward(ids)  # (V,) after the last of ids (T,)

Leaves out sampling (`sampling.py`), batches and other architectures: `lean_refusal` says why a model is not taken.
Letters as in modeling_llmkit.py: T new positions, S positions so far, H heads, K head size, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.modeling_llmkit import LlmkitDecoderLayer, LlmkitForCausalLM, rotate

ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not change with the length


def lean_refusal(model: nn.Module) -> str | None:
    """Why the model cannot be decoded here; None where it can."""
    if not isinstance(model, LlmkitForCausalLM):
        return f"it is a {type(model).__name__}, not our own model"
    if getattr(model, "is_quantized", False):
        return "its weights are quantised"
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return f"it is in {str(model.dtype).removeprefix('torch.')} on {model.device.type}, not in float32 on a CPU"
    rope = model.model.rotary_emb.rope_type
    return None if rope in ROPE else f"its rope_type={rope!r} changes with the length"


def _fused(*layers: nn.Linear) -> Tensor:
    """One matrix (D, N) of all, laid out for one row at a time: 1.7 times as fast from main memory as (N, D).

    The layers become views of it, so that no weight lies in memory twice.
    """
    whole = torch.cat([layer.weight.data for layer in layers]).t().contiguous()
    for layer, columns in zip(layers, whole.split([layer.out_features for layer in layers], dim=1), strict=True):
        layer.weight.data = columns.t()
    return whole


class _Layer:
    """The weights of a decoder layer as `forward` wants them, and its part of the cache."""

    def __init__(self, layer: LlmkitDecoderLayer, size: int):
        attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        self.is_gated = mlp.is_gated
        self.heads: list[int] = [config.num_attention_heads, config.num_key_value_heads]  # type: ignore[list-item]
        self.norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        self.eps = config.rms_norm_eps
        self.qkv = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.up = _fused(*([mlp.gate_proj, mlp.up_proj] if mlp.is_gated else [mlp.up_proj]))
        self.out, self.down, self.act_fn = _fused(attention.o_proj), _fused(mlp.down_proj), mlp.act_fn
        self.qk_norm = None
        if config.qk_norm:  # (H + H_kv, K)
            norms = zip((attention.q_norm, attention.k_norm), self.heads, strict=True)
            self.qk_norm = torch.cat([norm.weight.expand(count, -1) for norm, count in norms])
        self.cache = torch.zeros(2, 1, self.heads[1], size, self.head_dim)  # keys and values, (1, H_kv, S, K)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], start: int, mask: Tensor | None) -> Tensor:
        """x (T, D) at positions start to start + T."""
        end = start + len(x)
        qkv = F.rms_norm(x, x.shape[1:], self.norms[0], self.eps) @ self.qkv
        qk, value = qkv.view(len(x), -1, self.head_dim).split(
            [sum(self.heads), self.heads[1]], dim=1
        )  # (T, H + H_kv, K), (T, H_kv, K)
        if self.qk_norm is not None:
            qk = F.rms_norm(qk, (self.head_dim,), eps=self.eps).mul_(self.qk_norm)
        query, key = rotate(qk[None], rope).transpose(1, 2).split(self.heads, dim=1)
        keys, values = self.cache[0, :, :, :end], self.cache[1, :, :, :end]
        keys[:, :, start:] = key
        values[:, :, start:] = value.transpose(0, 1)
        causal = mask is None and len(x) > 1
        attended = F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=causal, enable_gqa=self.heads[0] != self.heads[1]
        )
        x = torch.addmm(x, attended.transpose(1, 2).reshape(len(x), -1), self.out)
        up = F.rms_norm(x, x.shape[1:], self.norms[1], self.eps) @ self.up
        if self.is_gated:
            gate, up = up.chunk(2, dim=-1)
            up = self.act_fn(gate) * up
        else:
            up = self.act_fn(up)
        return torch.addmm(x, up, self.down)


class LeanDecoder:
    """A row that grows: `length` positions are in the cache, of at most `size`.

    The model's projections become views of fused matrices, with the same values. Raises ValueError for a model that
    `lean_refusal` names, and for more positions than `size`.
    """

    @torch.no_grad()
    def __init__(self, model: LlmkitForCausalLM, size: int | None = None):
        if reason := lean_refusal(model):
            raise ValueError(f"cannot be decoded here: {reason}")
        self.size = size or model.config.max_position_embeddings
        self.length = 0
        self.cap, self.eps = model.config.final_logit_softcapping, model.config.rms_norm_eps
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        is_tied = model.lm_head.weight is self.embedding  # rows are looked up there: the head is a copy
        self.head = self.embedding.t().contiguous() if is_tied else _fused(model.lm_head)
        self.layers = [_Layer(layer, self.size) for layer in model.model.layers]
        was_training = model.training
        tables = model.eval().model.rotary_emb(self.embedding, torch.arange(self.size)[None])  # (1, S, 1, K)
        model.train(was_training)
        self.cos, self.sin = tables

    def reset(self, length: int = 0) -> None:
        """Forgets all positions from `length` on."""
        self.length = min(self.length, length)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Takes the next ids (T,); logits (V,) float32 of what follows the last of them."""
        start, end = self.length, self.length + len(ids)
        if end > self.size:
            raise ValueError(f"{end} positions, the cache holds {self.size}")
        x = F.embedding(ids, self.embedding)  # (T, D)
        rope = self.cos[:, start:end], self.sin[:, start:end]
        mask = None  # of several positions behind others: every one sees those before it
        if start and len(ids) > 1:
            mask = torch.ones(len(ids), end, dtype=torch.bool).tril(start)
        for layer in self.layers:
            x = layer.forward(x, rope, start, mask)
        self.length = end
        logits = (F.rms_norm(x[-1:], x.shape[1:], self.norm, self.eps) @ self.head)[0]
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
