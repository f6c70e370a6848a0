"""A model for other engines: a stock Qwen3 or Llama folder, or GGUF with an Ollama Modelfile.

Owns the verb and the folders.   llmkit export --model_name_or_path runs/toy/sft --to gguf --output_dir exports/sft

What was written is read back and compared (`parity.py`) before the folder gets its name: one that computes, splits or
renders anything otherwise is not there afterwards. Leaves out GGUF (`gguf_export.py`).
"""

import json
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import model as ours
from ..config import UserError
from ..data.tokenizer import save_tokenizer
from ..hardware import cpu_seconds
from ..model.convert import TARGETS, to_plain
from ..run import Result, quiet_libraries, write_derived, written_beside
from ..verbs import ExportConfig
from . import parity
from .gguf_export import CONVERTER, write_gguf
from .loading import Source, find
from .merged import Loaded, load_merged


def check(config: ExportConfig) -> Source:
    """Raises UserError for what is missing, exists already, or has no effect."""
    for key in ("model_name_or_path", "output_dir"):
        if not getattr(config, key):
            raise UserError(f"{key} is missing; e.g. --model_name_or_path runs/toy/pretrain --output_dir qwen3")
    allowed = (*TARGETS, "gguf")
    if config.to not in allowed:
        raise UserError(f"to={config.to!r}; allowed: {', '.join(allowed)}")
    if Path(config.output_dir).exists():
        raise UserError(f"output_dir={config.output_dir!r}: exists already; choose another or remove it")
    if config.to != "gguf":
        for key in ("llama_cpp_dir", "outtype"):
            if getattr(config, key) is not None:
                raise UserError(f"{key}={getattr(config, key)!r} has no effect with to={config.to!r}; remove it")
    if config.llama_cpp_dir is not None and not (Path(config.llama_cpp_dir) / CONVERTER).is_file():
        raise UserError(f"llama_cpp_dir={config.llama_cpp_dir!r}: holds no {CONVERTER}; name a checkout of llama.cpp")
    return find(config.model_name_or_path, config.trust_remote_code)


def _stock(loaded: Loaded, target: str) -> PreTrainedModel:
    """Ours under its stock name; an adapter merged into that very architecture as it is. Raises UserError."""
    model, name = loaded.model, loaded.source.name
    if isinstance(model, ours.LlmkitForCausalLM):
        try:
            return to_plain(model, target)
        except ValueError as error:
            raise UserError(str(error)) from None
    kind = model.config.model_type
    if not loaded.source.is_adapter:
        raise UserError(f"model_name_or_path={name!r}: is a {kind}, which is a plain model already; --to gguf takes it")
    if kind != target:
        raise UserError(f"to={target!r}: {name!r} adapts a {kind}; `llmkit merge` writes that as a plain model")
    return model


def write_folder(config: ExportConfig, loaded: Loaded) -> tuple[dict[str, Any], list[str]]:
    """Stock weights, tokenizer with its template, generation settings; read back and compared bit for bit."""
    folder, plain = Path(config.output_dir), _stock(loaded, config.to)
    probe = parity.probe_of(loaded.model, loaded.tokenizer)
    with written_beside(folder) as partial:
        plain.save_pretrained(partial)
        save_tokenizer(loaded.tokenizer, partial)
        again = AutoModelForCausalLM.from_pretrained(partial).eval()
        found = parity.check_equal_logits(probe, again, str(folder))
        num_texts, num_chats = parity.check_tokens(
            loaded.tokenizer, AutoTokenizer.from_pretrained(partial), str(folder)
        )
        kept = [m.generation_config.to_diff_dict() | {"transformers_version": None} for m in (loaded.model, again)]
        if kept[0] != kept[1]:
            raise UserError(f"{folder}: generation_config is {kept[1]} after reading back, not {kept[0]}")
    dtype = str(plain.dtype).removeprefix("torch.")
    lines = [
        f"wrote     {folder}: {type(plain).__name__} in {dtype}, no code of ours",
        f"logits    equal, bit for bit, on {found.positions} positions of random ids and text",
        parity.say_tokens(num_texts, num_chats),
        f"load it   AutoModelForCausalLM.from_pretrained({json.dumps(str(folder), ensure_ascii=False)})",
        f"serve it  llmkit serve --model_name_or_path {shlex.quote(str(folder))}",
    ]
    return {"max_logit_difference": found.max, "num_texts": num_texts, "num_chats": num_chats}, lines


def main(config: ExportConfig) -> Result:
    """Checks, merges where it must, writes, reads back, compares. Raises UserError for what cannot be."""
    started = time.perf_counter()
    source = check(config)
    quiet_libraries()
    is_gguf = config.to == "gguf"
    loaded = load_merged(source, torch.float32 if is_gguf else None)
    metrics, lines = (write_gguf if is_gguf else write_folder)(config, loaded)
    print("\n".join(lines))
    wall_s, cpu_s = round(time.perf_counter() - started, 2), round(cpu_seconds(), 2)
    result = Result("export", "ok", config.output_dir, source.path, wall_s, cpu_s, 0, {}, metrics)
    write_derived(Path(config.output_dir), result, source.manifest)
    return result
