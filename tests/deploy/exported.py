"""Small runs to export: a model with redrawn weights, a byte-level BPE with ChatML, as a post-training run leaves them.

folder = chat_model(tmp_path / "m", qk_norm=False)
"""

import json
from pathlib import Path
from typing import Any

from helpers import tiny_model
from tiny import CORPUS
from tokenizers import Tokenizer, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmkit.data.template import CHATML
from llmkit.data.tokenizer import add_bos, train_bpe
from llmkit.deploy.gguf_tokenizer import IGNORE_MERGES, PRE_TOKENIZERS

TRIM = {"ByteLevel": {"trim_offsets": True}}

TEXTS = [
    *CORPUS,
    "def f(x):\n    return x\n",
    "Where is the cat? The cat is in the house, isn't it? 12 + 34 = 46\n" * 9,
]


def _retrained(tokenizer: Any, pre: str) -> Any:
    """The same with another pre-tokeniser of llama.cpp's, and merges learnt behind it."""
    steps = PRE_TOKENIZERS[pre]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [s | TRIM.get(s["type"], {}) for s in steps]}
    state["model"]["ignore_merges"] = pre in IGNORE_MERGES
    core = Tokenizer.from_str(json.dumps(state))
    special = ["<|bos|>", "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def bpe(template: str | None = CHATML, pre: str = "qwen2") -> Any:
    tokenizer = train_bpe(TEXTS, 400)
    if pre != "qwen2":
        tokenizer = _retrained(tokenizer, pre)
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
