"""Saving: a plain transformers folder, whole or not at all.

Owns `model/`, `adapter/` and `checkpoints/step-00000500/` of a run folder.

    save_run_model(model, tokenizer, run.folder)

A checkpoint holds `model/`. Leaves out optimiser and RNG state: resuming is not implemented yet.
"""

import copy
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer import save_tokenizer
from ..run import written_beside


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Config, safetensors, tokenizer, generation config, our model's code. Raises UserError on a full disk."""
    with written_beside(folder) as partial:
        model.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)


def save_run_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `folder/model`; for a LoRA model the merged weights, and the adapter beside them as `folder/adapter`."""
    if hasattr(model, "merge_and_unload"):
        with written_beside(folder / "adapter") as partial:
            model.save_pretrained(partial)
        model = copy.deepcopy(model).merge_and_unload()
    save_model(model, tokenizer, folder / "model")


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, step: int, save_total_limit: int | None
) -> Path:
    """Writes `checkpoints/step-NNNNNNNN`, then removes the oldest beyond `save_total_limit`."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    with written_beside(path) as partial:
        save_run_model(model, tokenizer, partial)
    for old in sorted(path.parent.glob("step-*"))[: -save_total_limit if save_total_limit else 0]:
        shutil.rmtree(old)
    return path
