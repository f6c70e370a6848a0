"""Small runs to export: a model with redrawn weights, a byte-level BPE with ChatML, as a post-training run leaves them.

folder = chat_model(tmp_path / "m", qk_norm=False)
"""

from pathlib import Path
from typing import Any

from helpers import tiny_model
from tiny import CORPUS

from llmkit.data.template import CHATML
from llmkit.data.tokenizer import add_bos, train_bpe

TEXTS = [
    *CORPUS,
    "def f(x):\n    return x\n",
    "Where is the cat? The cat is in the house, isn't it? 12 + 34 = 46\n" * 9,
]


def bpe(template: str | None = CHATML) -> Any:
    tokenizer = train_bpe(TEXTS, 400)
    add_bos(tokenizer)
    tokenizer.chat_template = template
    tokenizer.eos_token = "<|im_end|>" if template else tokenizer.eos_token
    return tokenizer


def chat_model(folder: Path, tokenizer: Any = None, seed: int = 0, **options: Any) -> Path:
    """Ends at <|im_end|> and <|endoftext|>."""
    tokenizer = tokenizer or bpe()
    given = {"vocab_size": len(tokenizer) + 3, "hidden_size": 64, "max_position_embeddings": 128, "bos_token_id": 0}
    model = tiny_model(seed, **given | options)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 1]
    model.generation_config.pad_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
