"""Tiny bases of several architectures, and adapters on them that have learnt a little. Offline, on the CPU.

folder = base("gpt2"); model = adapted("gpt2", load_in_4bit=True, new_tokens=2)
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from helpers import redraw
from tiny import bpe_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import llmkit.model  # noqa: F401  registers our own
from llmkit.align.lora import add_adapter, grow_embeddings, quantization
from llmkit.hardware import Device
from llmkit.tuning import SftConfig

CPU = Device("cpu", "test", False, 1, None)
ROWS = 448
SHAPE = dict(
    vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# name -> (model_type, fields); llama and phi have a head of their own, phi's has a bias; gpt2 is made of Conv1D
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0}),
    "llmkit": ("llmkit", {"tie_word_embeddings": True}),
    "phi": ("phi", {}),
    "odd-llama": ("llama", {"hidden_size": 40, "intermediate_size": 72, "head_dim": 10}),
    "deep-llama": ("llama", {"num_hidden_layers": 3}),
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "qlora4": {"load_in_4bit": True},
    "qlora8": {"load_in_8bit": True},
}


@functools.cache
def base(name: str) -> str:
    """A model folder with redrawn weights and a tokenizer of our own chat tokens."""
    model_type, fields = BASES[name]
    given = SHAPE if model_type != "gpt2" else {k: v for k, v in SHAPE.items() if k == "vocab_size" or "token" in k}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given | fields))
    folder = tempfile.mkdtemp(prefix=f"{name}-")
    redraw(model, std=0.1)
    with torch.no_grad():
        for p in (p for n, p in model.named_parameters() if n.endswith("bias")):
            p.sub_(1)  # redraw puts vectors near 1, as norms are
    model.save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return folder


def settings(**keys: Any) -> SftConfig:
    return dataclasses.replace(SftConfig(), **dict(use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.0) | keys)


def fresh(name: str, new_tokens: int = 0, **keys: Any) -> Any:
    """Base and untrained adapter; `new_tokens` rows are added to the vocabulary."""
    config = settings(**keys)
    model = AutoModelForCausalLM.from_pretrained(
        base(name), dtype=torch.float32, quantization_config=quantization(config, base(name), CPU)
    )
    torch.manual_seed(0)
    return add_adapter(model, config, grow_embeddings(model, ROWS + new_tokens) if new_tokens else ())


def ids(new_tokens: int = 0) -> torch.Tensor:
    """(2, 12), new tokens among them."""
    rows = torch.randint(ROWS, (2, 12), generator=torch.Generator().manual_seed(1))
    if new_tokens:
        rows[0, 3], rows[1, 7] = ROWS, ROWS + new_tokens - 1
    return rows


def train(model: Any, rows: torch.Tensor, steps: int = 2) -> Any:
    """A few steps that every trained tensor feels; back in eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def adapted(name: str, new_tokens: int = 0, **keys: Any) -> Any:
    return train(fresh(name, new_tokens, **keys), ids(new_tokens))


@torch.no_grad()
def logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows, use_cache=False).logits


def save_run(model: Any, folder: Path) -> Path:
    """The adapter as `llmkit sft` leaves it: tokenizer and generation config beside it."""
    from llmkit.align.lora import save_adapter

    save_adapter(model, folder)
    bpe_tokenizer().save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return folder
