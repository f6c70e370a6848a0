"""Clean tiny models of many architectures, and clean tokenizers of many kinds. Built from configs, offline.

    model, tokenizer = animal("gemma3")

Every model is what `AutoModelForCausalLM.from_config` makes of a stock config; nothing is edited.
"""

import functools
import string
from typing import Any

import torch
from tiny import CORPUS, bpe_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import llmkit.model  # noqa: F401  registers our own

# name -> (model_type, fields)
ANIMALS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neo": (
        "gpt_neo",
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
        },
    ),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256}),
    "codegen": ("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 32}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {}),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "exaone4": ("exaone4", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "helium": ("helium", {}),
    "arcee": ("arcee", {}),
    "nanochat": ("nanochat", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "qwen2-moe": (
        "qwen2_moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4,
        },
    ),
    "mamba": ("mamba", {"state_size": 4}),
    "recurrent-gemma": ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3}),
    "llmkit": ("llmkit", {}),
    "llmkit-relu2-softcap": ("llmkit", {"final_logit_softcapping": 15.0, "hidden_act": "relu2"}),
}  # fmt: skip
COMMON = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=256,
)  # fmt: skip
NO_HEAD_DIM = ("falcon", "opt", "bloom", "mpt", "gptj", "gpt2", "codegen", "gpt_neo")


def char_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One id per character, no unknown one but <unk>."""
    characters = ["<unk>", "<s>", "</s>", "<pad>", *string.printable, *"éüñç你好שלום"]
    vocabulary = {c: i for i, c in enumerate(dict.fromkeys(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = dict(unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **({"bos_token": "<s>"} if bos else {}))


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: metaspace with a dummy prefix, byte fallback, BOS by the post-processor."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        unk_token="<unk>", show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    import json

    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = bpe_tokenizer(chat=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


TOKENIZERS = {
    "char": lambda: char_tokenizer(True),
    "char without BOS": lambda: char_tokenizer(False),
    "byte BPE with BOS": lambda: bpe_tokenizer(bos=True, chat=False),
    "byte BPE without BOS": lambda: bpe_tokenizer(chat=False),
    "byte BPE, chat": bpe_tokenizer,
    "unigram": unigram_tokenizer,
    "prefix space": prefix_space_tokenizer,
}


@functools.cache
def _default(model_type: str) -> Any:
    return AutoConfig.for_model(model_type)


def animal(name: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """The model and a tokenizer of the next kind in turn, of one vocabulary and with the same special ids."""
    model_type, fields = ANIMALS[name]
    tokenizer = list(TOKENIZERS.values())[list(ANIMALS).index(name) % len(TOKENIZERS)]()
    known = {k: v for k, v in COMMON.items() if hasattr(_default(model_type), k)}
    if model_type in NO_HEAD_DIM:
        known.pop("head_dim", None)
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(model_type, **known | {"vocab_size": len(tokenizer)} | ids | fields)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config), tokenizer
