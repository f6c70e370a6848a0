"""A plain transformers folder with the same weights: Qwen3, or Llama where QK-norm is off.

Owns the verb; the mapping is `model/convert.py`.   llmkit export --model_name_or_path runs/toy/pretrain --output_dir q

The folder is written only when its logits equal the original's. Leaves out GGUF and models that are not ours.
"""

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .. import model as ours
from ..config import UserError
from ..data.tokenizer import load_tokenizer
from ..model.convert import TARGETS, to_plain
from ..run import Result, quiet_libraries, resolve_model_dir, written_beside
from ..verbs import ExportConfig


@torch.no_grad()
def main(config: ExportConfig) -> Result:
    """Converts, compares logits, reloads what was written and compares again. Raises UserError for what cannot be."""
    started = time.perf_counter()
    for key in ("model_name_or_path", "output_dir"):
        if not getattr(config, key):
            raise UserError(f"{key} is missing; e.g. --model_name_or_path runs/toy/pretrain --output_dir qwen3")
    if config.to not in TARGETS:
        raise UserError(f"to={config.to!r}; allowed: {', '.join(TARGETS)}")
    folder = Path(config.output_dir)
    if folder.exists():
        raise UserError(f"output_dir={str(folder)!r}: exists already; choose another or remove it")
    quiet_libraries()
    path = resolve_model_dir(config.model_name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_name_or_path={path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None
    if not isinstance(model, ours.LlmkitForCausalLM):
        raise UserError(f"model_name_or_path={path!r}: is a {model.config.model_type}, which is a plain model already")
    try:
        plain = to_plain(model, config.to)
    except ValueError as error:
        raise UserError(str(error)) from None
    ids = torch.randint(model.config.vocab_size, (2, min(64, model.config.max_position_embeddings)))
    logits = model(ids, use_cache=False).logits
    with written_beside(folder) as partial:
        plain.save_pretrained(partial)
        load_tokenizer(path).save_pretrained(partial)
        again = AutoModelForCausalLM.from_pretrained(partial).eval()
        difference = (again(ids, use_cache=False).logits - logits).abs().max().item()
        if difference > 1e-5:
            raise UserError(f"{folder}: logits differ by {difference:.2g} after the conversion; nothing was written")
    print(f"{folder}: {type(plain).__name__}, largest logit difference {difference:.1g} on {ids.numel()} random tokens")
    print(f'load it   AutoModelForCausalLM.from_pretrained("{folder}")')
    return Result("export", "ok", str(folder), path, time.perf_counter() - started, 0.0, 0, {}, {})
