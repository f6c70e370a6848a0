"""The shape of llmkit's GPT.

Owns `LlmkitConfig`, an ordinary `PreTrainedConfig`. This file travels with every saved model as remote code, so it
imports nothing from llmkit. Leaves out sampling settings: they belong in `generation_config.json`.

    LlmkitConfig(vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_llmkit.LlmkitConfig",
    "AutoModel": "modeling_llmkit.LlmkitModel",
    "AutoModelForCausalLM": "modeling_llmkit.LlmkitForCausalLM",
    "AutoModelForSequenceClassification": "modeling_llmkit.LlmkitForSequenceClassification",
}


@strict
class LlmkitConfig(PreTrainedConfig):
    """Shape of a `LlmkitForCausalLM`; field names are those of Qwen3.

    `hidden_act` is "silu" (SwiGLU: gate, up and down) or "relu2" (squared ReLU: up and down only).
    `num_key_value_heads`, `head_dim` and `intermediate_size` follow from the others when None.
    Raises ValueError when heads do not divide, `head_dim` is odd (RoPE turns pairs) or `hidden_act` is unknown.
    """

    model_type = "llmkit"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    qk_norm: bool = True
    max_position_embeddings: int = 256
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    final_logit_softcapping: float | None = None
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value}; allowed: 1 or more")
        heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                    "change one of them or set head_dim"
                )
            self.head_dim = self.hidden_size // heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, RoPE needs an even one; change num_attention_heads")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={self.num_key_value_heads}; "
                "every key/value head must serve the same number of query heads"
            )
        if self.hidden_act not in ("silu", "relu2"):
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; allowed: 'silu' (SwiGLU), 'relu2'")
        if self.intermediate_size is None:  # 8/3 or 4 widths: the same parameter count either way, in steps of 32
            width = self.hidden_size * 8 / 3 if self.hidden_act == "silu" else self.hidden_size * 4
            self.intermediate_size = max(32, 32 * round(width / 32))
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)  # save_pretrained alone would leave AutoModel out, which vLLM wants
