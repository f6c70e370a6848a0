"""Small things that many tests need: a tiny model with weights that matter, and ids to feed it.

    model = tiny_model(num_key_value_heads=2); ids = random_ids(2, 12)

Fixtures live in `conftest.py`.
"""

import torch
from torch import Tensor, nn

from llmkit.model import LlmkitConfig, LlmkitForCausalLM

TINY = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)


def redraw(model: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Matrices N(0, std), vectors (norm weights) 1 + N(0, 0.1), in place; tied weights are drawn once.

    A fresh model has zero output projections and unit norms: most bugs of attention and MLP would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():  # yields a tied tensor once
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * std if p.ndim > 1 else 1 + noise * 0.1)
    return model


def tiny_model(seed: int = 0, attn: str = "sdpa", **options) -> LlmkitForCausalLM:
    """Redrawn and in eval mode. std 0.2 keeps attention far from uniform at width 32."""
    config = LlmkitConfig(**TINY | options)
    return redraw(LlmkitForCausalLM._from_config(config, attn_implementation=attn), seed, std=0.2).eval()


def random_ids(num_rows: int, length: int, vocab_size: int = TINY["vocab_size"], seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(seed))
