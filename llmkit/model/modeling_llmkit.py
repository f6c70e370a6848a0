"""llmkit's GPT: pre-norm RMSNorm, RoPE, grouped-query attention, QK-norm, SwiGLU, no biases.

Owns the model and nothing else. This file travels with every saved model as remote code, so it imports only torch,
transformers and its own config. With the default options its maths is Qwen3's, operation by operation, which is why
`convert.py` can hand the same weights to anything that runs Qwen3. Options that leave Qwen3: `qk_norm=False` (then it
is Llama), `hidden_act="relu2"`, `final_logit_softcapping`.

    model = LlmkitForCausalLM(LlmkitConfig(vocab_size=512)); logits = model(ids, use_cache=False).logits  # (B, T, V)

Output projections start at zero, so a fresh model ignores its context: redraw the weights before testing behaviour.
Documents packed in one row stay apart when `position_ids` restart at 0, attention_mask is None and there is no cache.

Letters: B rows, T positions, V vocabulary, D width, H query heads, K head size.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_llmkit import LlmkitConfig


class RMSNormWithFusedBackward(torch.autograd.Function):
    """LlmkitRMSNorm, bit for bit; its backward is one kernel of LayerNorm instead of ten passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = x.pow(2)
        inverse_rms = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return torch.mul(x, inverse_rms, out=squares).mul_(weight)  # into memory that is already in the cache

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        # LayerNorm whose mean is 0 is RMSNorm, but its backward subtracts the mean of grad * weight: add that again.
        subtracted = inverse_rms * (grad @ weight).unsqueeze(-1)  # times the row length
        needed = [True, ctx.needs_input_grad[1], False]  # x, weight, bias
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(inverse_rms), inverse_rms, weight, None, needed
        )
        return grad_x.add_(subtracted, alpha=1 / weight.numel()), grad_weight, None


class LlmkitRMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        is_plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if self.training and is_plain and not torch.compiler.is_compiling():  # a compiler fuses by itself
            return RMSNormWithFusedBackward.apply(x, self.weight, self.eps)
        x_f32 = x.float()
        x_f32 = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x_f32.to(x.dtype)


class LlmkitRotaryEmbedding(nn.Module):
    """Rotation angles of RoPE (Su et al. 2021, eq. 15), in the half-split layout of Llama and Qwen.

    The class name and the five attributes are what `PreTrainedModel._init_weights` looks for to rebuild the
    non-persistent buffers after `from_pretrained`; renamed, they would silently be uninitialised memory.
    """

    def __init__(self, config: LlmkitConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)  # (K / 2,)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: LlmkitConfig, **kwargs) -> tuple[Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos(), angles.sin()
        tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (B or 1, T, K)
        # On a CPU a table that all rows share is written out for every head: long runs of memory multiply faster.
        is_written_out = self.training and len(position_ids) == 1 and x.device.type == "cpu"
        num_heads = self.config.num_attention_heads if is_written_out else 1
        return tuple((f * self.attention_scaling).to(x.dtype).unsqueeze(2).repeat(1, 1, num_heads, 1) for f in tables)


def rotate(x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, H, K) turned: (low, high) * cos + (high, low) * (-sin, sin), which rounds as Qwen3's formula does."""
    cos, sin = (f[:, :, : x.shape[2]] for f in position_embeddings)  # fewer heads: keys, or tensor parallelism
    return (x * cos).add_(x.roll(x.shape[-1] // 2, dims=-1).mul_(sin))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + mask) v; the mask is additive. Returns (B, T, H, K) and the weights (B, H, T, S)."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LlmkitAttention(nn.Module):
    def __init__(self, config: LlmkitConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.o_proj.starts_at_zero = True
        if config.qk_norm:
            self.q_norm = LlmkitRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = LlmkitRMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        B, T, _ = hidden_states.shape
        shape = (B, T, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape))  # (B, T, H, K)
        key = self.k_norm(self.k_proj(hidden_states).view(shape))  # (B, T, H_kv, K)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)  # (B, H_kv, T, K)

        query, key = (rotate(x, position_embeddings).transpose(1, 2) for x in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, T, H, K)
        return self.o_proj(out.reshape(B, T, -1).contiguous()), weights


class LlmkitMLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6), or squared ReLU without a gate (So et al. 2021)."""

    def __init__(self, config: LlmkitConfig):
        super().__init__()
        self.is_gated = config.hidden_act == "silu"
        if self.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.starts_at_zero = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up if self.is_gated else self.act_fn(up))


class LlmkitDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LlmkitConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlmkitAttention(config, layer_idx)
        self.mlp = LlmkitMLP(config)
        self.input_layernorm = LlmkitRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlmkitRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlmkitPreTrainedModel(PreTrainedModel):
    config_class = LlmkitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlmkitDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LlmkitDecoderLayer, "attentions": LlmkitAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # matrices and embeddings N(0, initializer_range), norms 1, RoPE tables
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


class LlmkitModel(LlmkitPreTrainedModel):
    def __init__(self, config: LlmkitConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LlmkitDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlmkitRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlmkitRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Takes input_ids (B, T) or inputs_embeds (B, T, D); returns last_hidden_state (B, T, D), after the final norm.

        Raises ValueError unless exactly one of the two is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given_position_ids = position_ids
        if position_ids is None:
            num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + num_past
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=given_position_ids,  # our own never restart; a compiler cannot see that, and would mask
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class LlmkitForCausalLM(LlmkitPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: LlmkitConfig):
        super().__init__(config)
        self.model = LlmkitModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _logits(self, hidden_states: Tensor) -> Tensor:
        logits = self.lm_head(hidden_states)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _losses(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """-log p of every label, (N,) float32, 0 where the label is -100; hidden_states (N, D)."""
        return nn.functional.cross_entropy(self._logits(hidden_states).float(), labels, reduction="none")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shifted_labels: Tensor | None = None,
        chunk_tokens: int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or only the last `logits_to_keep` positions; loss in nats per token when labels are given.

        labels[t] == ids[t]: the loss shifts by one; -100 is ignored. `num_items_in_batch` replaces the divisor.
        With `shifted_labels` (B, T), shifted_labels[t] == ids[t + 1], there are no logits and `loss` is (B, T), in
        nats, 0 where ignored: the head then runs on `chunk_tokens` positions at a time, and once more in backward, so
        that a large vocabulary takes memory for one chunk only.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if shifted_labels is not None:
            size = chunk_tokens or shifted_labels.numel()
            parts = zip(
                outputs.last_hidden_state.flatten(0, 1).split(size), shifted_labels.flatten().split(size), strict=True
            )
            losses = [checkpoint(self._losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
            return CausalLMOutputWithPast(loss=torch.cat(losses).view(shifted_labels.shape))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LlmkitForSequenceClassification(GenericForSequenceClassification, LlmkitPreTrainedModel):
    """One score per sequence, read at its last token: the shape of a reward model."""

    def __init__(self, config: LlmkitConfig):
        LlmkitPreTrainedModel.__init__(self, config)  # theirs asks AutoModel, which wants to be told again to run code
        self.num_labels = config.num_labels
        self.model = LlmkitModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
