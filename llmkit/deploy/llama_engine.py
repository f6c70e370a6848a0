"""A GGUF in the real llama.cpp, where the package llama_cpp is installed: its ids and logits.

Owns the few calls.   with opened(path) as engine: engine.logits(rows); engine.encode(text, True)

Never required. Quiet, on the CPU, with a float32 cache: the default one, in float16, would round what is compared.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_CONTEXT = 2048  # tokens of cache; nothing that is compared is longer


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


class Engine:
    """One opened file."""

    def __init__(self, path: Path, context: int):
        import llama_cpp

        self.silence = llama_cpp.llama_log_callback(lambda *_: None)  # warnings too; C holds it
        llama_cpp.llama_log_set(self.silence, None)
        self.model: Any = llama_cpp.Llama(
            str(path),
            n_ctx=min(context, MAX_CONTEXT),
            logits_all=True,
            n_gpu_layers=0,
            n_threads=min(4, os.cpu_count() or 1),
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
        self.ends = lambda i: bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self.model.model), i))

    def encode(self, text: str, special: bool) -> list[int]:
        """Special tokens in the text count as such, as they do in transformers."""
        return list(self.model.tokenize(text.encode(), add_bos=special, special=True))

    def logits(self, rows: list[Tensor]) -> Tensor:
        """(N, V) float32, of all positions of all rows (1, T)."""
        found = []
        for row in rows:
            self.model.reset()
            self.model.eval(row[0].tolist())
            found.append(np.array(self.model.scores[: row.shape[1]]))
        return torch.from_numpy(np.concatenate(found)).float()


@contextlib.contextmanager
def opened(path: Path, context: int) -> Iterator[Engine]:
    """Closed in the end. Raises ValueError for a file that llama.cpp cannot load."""
    engine = Engine(path, context)
    try:
        yield engine
    finally:
        engine.model.close()
