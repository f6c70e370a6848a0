"""A model in one piece, as an export needs it: an adapter merged, what cannot be merged refused.

loaded = load_merged(find(config.model_name_or_path), torch.float32);  loaded.model, loaded.tokenizer
"""

import dataclasses
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..align.lora import stored_config
from ..align.merge import merge, set_special_ids, trained_on
from ..config import UserError
from .loading import Source


@dataclasses.dataclass(frozen=True)
class Loaded:
    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """Of the run, else of the folder, which may be `.`: runs/toy/sft -> sft."""
        return os.path.basename(os.path.abspath(self.source.run or self.source.path))


def _refuse_quantized(source: Source) -> None:
    if source.is_adapter and trained_on(Path(source.path), source.base):
        raise UserError(
            f"model_name_or_path={source.name!r}: is an adapter on a quantised base; "
            f"`llmkit merge --model_name_or_path {source.name} --dequantize true --output_dir merged` first"
        )
    if source.is_quantized:
        raise UserError(
            f"model_name_or_path={source.name!r}: is stored in quantised form; export the model that it was made of "
            "(--to gguf --outtype q8_0 has 8 bit of its own)"
        )


def _refuse_classifier(source: Source) -> None:
    kind = next(iter(stored_config(source.base).get("architectures") or []), "")
    if kind.endswith("Classification"):
        raise UserError(
            f"model_name_or_path={source.name!r}: is a {kind}, which has no head that writes text; allowed: a causal LM"
        )


def load_merged(source: Source, dtype: torch.dtype | None) -> Loaded:
    """In eval mode on the CPU; `dtype`: None as it is stored. Raises UserError for what no target takes."""
    _refuse_quantized(source)
    _refuse_classifier(source)
    tokenizer = source.load_tokenizer()
    if not source.is_adapter:
        return Loaded(source, source.load(dtype or "auto"), tokenizer)
    model = merge(source.load("auto"), tokenizer)
    model.config.use_cache = True
    set_special_ids(model, tokenizer, Path(source.path))
    for p in model.parameters():
        p.data = p.data.to(dtype or p.dtype)  # `model.to` would round the frequencies of RoPE too
    return Loaded(source, model.eval(), tokenizer)
