"""The specification of llmkit's GPT, and the oracle of its tests: the maths in plain torch, in float64.

Written from the papers, not from the model: rotations are complex numbers, heads are a loop, the mask is two
conditions. Reads the shape from any object with the config's field names. Leaves out caches, dropout and speed.

    logits = reference_logits(model.state_dict(), model.config, ids)  # (B, T, V)

Letters: B rows, T positions, V vocabulary, D width, K head size.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4)."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_TK: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """RoPE (Su et al. 2021, eq. 15), half-split: entries i and i + K/2 are one complex number.

    At position t it turns by the angle t * theta^(-2i/K).
    """
    half = x_TK.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions_T[:, None] * frequencies  # (T, K / 2)
    turned = torch.complex(x_TK[:, :half], x_TK[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention(x_TD: Tensor, weights: dict[str, Tensor], config, positions_T: Tensor, may_see_TT: Tensor) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023): query head h reads key/value head h // group.

    QK-norm, one weight vector of size K for all heads, comes before the rotation (Qwen3).
    """
    K, theta = config.head_dim, config.rope_parameters["rope_theta"]
    group = config.num_attention_heads // config.num_key_value_heads
    outputs = []
    for h in range(config.num_attention_heads):
        rows, kv_rows = slice(h * K, (h + 1) * K), slice(h // group * K, (h // group + 1) * K)
        query = x_TD @ weights["self_attn.q_proj.weight"][rows].T  # (T, K)
        key = x_TD @ weights["self_attn.k_proj.weight"][kv_rows].T
        value = x_TD @ weights["self_attn.v_proj.weight"][kv_rows].T
        if config.qk_norm:
            query = rms_norm(query, weights["self_attn.q_norm.weight"], config.rms_norm_eps)
            key = rms_norm(key, weights["self_attn.k_norm.weight"], config.rms_norm_eps)
        scores = rotate(query, positions_T, theta) @ rotate(key, positions_T, theta).T / math.sqrt(K)  # (T, T)
        outputs.append(scores.masked_fill(~may_see_TT, -math.inf).softmax(-1) @ value)
    return torch.cat(outputs, dim=-1) @ weights["self_attn.o_proj.weight"].T


def mlp(x_TD: Tensor, weights: dict[str, Tensor], hidden_act: str) -> Tensor:
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020, eq. 6). relu2: down(max(0, up x)^2) (So et al. 2021)."""
    up = x_TD @ weights["mlp.up_proj.weight"].T
    if hidden_act == "relu2":
        inner = up.clamp(min=0).square()
    else:
        gate = x_TD @ weights["mlp.gate_proj.weight"].T
        inner = gate * gate.sigmoid() * up
    return inner @ weights["mlp.down_proj.weight"].T


def row_logits(weights: dict[str, Tensor], config, ids_T: Tensor, documents_T: Tensor) -> Tensor:
    """One row: a position sees itself and earlier positions of its own document, where counting starts at 0."""
    eps, steps = config.rms_norm_eps, torch.arange(len(ids_T))
    may_see = (steps[None, :] <= steps[:, None]) & (documents_T[None, :] == documents_T[:, None])  # (T, T)
    positions = may_see.sum(-1) - 1
    x = weights["model.embed_tokens.weight"][ids_T]  # (T, D)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = x + attention(rms_norm(x, layer["input_layernorm.weight"], eps), layer, config, positions, may_see)
        x = x + mlp(rms_norm(x, layer["post_attention_layernorm.weight"], eps), layer, config.hidden_act)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = rms_norm(x, weights["model.norm.weight"], eps) @ weights[head].T
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def reference_logits(weights: dict[str, Tensor], config, ids: Tensor, documents: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) float64 of ids (B, T). `documents` (B, T) numbers the document of each token; None means one."""
    weights = {name: w.detach().double() for name, w in weights.items()}
    documents = torch.zeros_like(ids) if documents is None else documents
    return torch.stack([row_logits(weights, config, *row) for row in zip(ids, documents, strict=True)])


def reference_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum in nats of -log p(labels[t + 1] | ids[..t]); labels[t] == ids[t], and -100 is left out."""
    targets = labels[:, 1:]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)  # (B, T - 1)
    return -logp[targets != -100].sum()
