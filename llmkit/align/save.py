"""What a post-training run leaves: `model/`, and `adapter/` for LoRA.

model_dir = save_model(trainer, tokenizer, run, console)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ..config import UserError
from ..data.tokenizer import save_tokenizer
from ..run import Run, written_beside
from .lora import is_quantized, put_on, save_adapter
from .merge import merge


def save_model(
    trainer: Any, tokenizer: PreTrainedTokenizerBase, run: Run, console: Console, load_base: Callable[[], Any]
) -> Path:
    """Writes the folders and returns the one that loads as a model. Every rank calls: whole weights are gathered.

    The merged model is made of the adapter as it was saved, on a base that `load_base` loads anew.
    An adapter on a quantised base is not merged: `llmkit merge` does that when it is asked to.
    Raises UserError for weights that are not finite.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    model = trainer.accelerator.unwrap_model(trainer.model)
    folder = run.folder / "model"
    is_adapter, is_generator = hasattr(model, "merge_and_unload"), hasattr(model, "generation_config")
    if run.is_main:
        if not all(w.isfinite().all() for w in weights.values() if w.is_floating_point()):
            raise UserError("the weights are not finite any more: not saved; lower learning_rate or raise warmup_steps")
        model.config.use_cache = True
        if is_adapter:
            with written_beside(run.folder / "adapter", replace=True) as partial:
                save_adapter(model, partial, weights)
                save_tokenizer(tokenizer, partial)
                if is_generator:
                    model.generation_config.save_pretrained(partial)
            if is_quantized(model):
                console.print("adapter   the base is quantised, so nothing is merged: `llmkit merge` writes one model")
                folder = run.folder / "adapter"
            else:
                adapted = put_on(load_base(), run.folder / "adapter", str(model.config.name_or_path))
                merged = merge(adapted, tokenizer)
                if is_generator:
                    merged.generation_config = model.generation_config
                with written_beside(folder, replace=True) as partial:
                    merged.save_pretrained(partial)
                    save_tokenizer(tokenizer, partial)
        else:
            with written_beside(folder, replace=True) as partial:
                model.save_pretrained(partial, state_dict=weights)
                save_tokenizer(tokenizer, partial)
    trainer.accelerator.wait_for_everyone()
    return folder
