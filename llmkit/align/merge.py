"""Adapter and base as one plain model.

Owns the verb, and the proof: the merged model's logits are those of the adapted one, or nothing is written.

    llmkit merge --model_name_or_path runs/my/sft --output_dir merged

An adapter that was trained on a quantised base fits that base: in full-precision weights it answers a little otherwise.
So it is merged only with --dequantize, and how far the two are apart is measured and said.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes
from ..config import MergeConfig, UserError
from ..data.tokenizer import save_tokenizer
from ..hardware import cpu_seconds, detect
from ..run import Result, quiet_libraries, resolve_model_dir, written_beside
from .build import parent_manifest
from .lora import load_adapter, read_adapter

TOLERANCE = 1e-4  # of the logits, in units of their standard deviation where that is above 1
ROWS, LENGTH = 4, 32


def probe_ids(model: Any) -> Tensor:
    """(ROWS, LENGTH) random ids, the same every time."""
    size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """(B, T, V) float32 on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def merge(model: Any) -> Any:
    """The PeftModel merged into its base, in place. Raises UserError when its logits change by more than TOLERANCE."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any("bnb" in type(m).__module__ or "bitsandbytes" in type(m).__module__ for m in model.modules()):
        raise UserError("the base is quantised: merging would round the adapter to its few bits; see llmkit merge")
    ids = probe_ids(model)
    before = logits_of(model, ids)
    if not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise UserError("the model has no adapter to merge")
    merged = model.merge_and_unload()
    error = float((logits_of(merged, ids) - before).abs().max()) / max(1.0, float(before.std()))
    if not error <= TOLERANCE:
        raise UserError(
            f"merged and adapted logits differ by {error:.1e} (allowed {TOLERANCE:.0e}), so nothing is written; "
            "merge in float32: --dtype float32"
        )
    return merged


def main(config: MergeConfig) -> Result:
    """Loads base and adapter, merges, compares, writes the folder. Raises UserError."""
    started = time.perf_counter()
    for key in ("model_name_or_path", "output_dir"):
        if not getattr(config, key):
            raise UserError(f"{key} is missing; `llmkit help merge` shows an example")
    out = Path(config.output_dir)
    if out.exists():
        raise UserError(f"output_dir={config.output_dir!r}: exists already; choose another")
    quiet_libraries()
    folder, told = read_adapter(config.model_name_or_path)
    name = resolve_model_dir(config.base_model_name_or_path or told.get("base_model_name_or_path") or "")
    if not name:
        raise UserError(f"{folder}: names no base; give base_model_name_or_path")
    quantized = parent_manifest(str(folder)).get("quantization")
    if quantized and not config.dequantize:
        raise UserError(
            f"{folder}: was trained on a {quantized} base, and fits that one; --dequantize merges it into the "
            "full-precision weights all the same, and measures the difference"
        )
    device = detect(config.use_cpu).type
    model = load_adapter(_load_base(name, config, device), folder, name)
    tokenizer = AutoTokenizer.from_pretrained(folder if any(folder.glob("tokenizer*")) else name)
    ids = probe_ids(model)
    adapted = logits_of(model, ids)
    if quantized:
        _say_difference(adapted, _quantized_logits(name, config, folder, str(quantized), ids, device), str(quantized))
    merged = merge(model)
    if (folder / "generation_config.json").exists():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    with written_beside(out) as partial:
        merged.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
    error = float((logits_of(merged, ids) - adapted).abs().max())
    print(f"merged    {folder} into {name}: logits within {error:.1e}\nmodel     {out}", flush=True)
    seconds = time.perf_counter() - started
    return Result("merge", "ok", str(out), str(folder), seconds, cpu_seconds(), 0, {}, {"max_logit_difference": error})


def _load_base(name: str, config: MergeConfig, device: str, quantization: Any = None) -> Any:
    """In the dtype asked for. Raises UserError, also for a base that is stored quantised."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            trust_remote_code=config.trust_remote_code,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            quantization_config=quantization,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"base_model_name_or_path={name!r}: cannot be loaded ({str(error).splitlines()[0]}); name the base of the "
            "adapter by base_model_name_or_path"
        ) from None
    if quantization is None and getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            f"base_model_name_or_path={name!r}: is stored quantised; an adapter is merged into full-precision weights "
            "only: name those by base_model_name_or_path"
        )
    return model.to(device) if quantization is None else model


def _quantized_logits(
    name: str, config: MergeConfig, folder: Path, bits: str, ids: Tensor, device: str
) -> Tensor | None:
    """Of the adapter on the base it was trained on; None where this machine cannot compute them."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit")
    if bits == "4bit":
        settings.bnb_4bit_quant_type = "nf4"
        settings.bnb_4bit_compute_dtype = torch.float32
    try:
        return logits_of(load_adapter(_load_base(name, config, device, settings), folder, name), ids)
    except (ImportError, RuntimeError, AssertionError):
        return None


def _say_difference(merged: Tensor, quantized: Tensor | None, bits: str) -> None:
    if quantized is None:
        print(f"compared  the {bits} base does not run here: the difference to what was trained is not known")
        return
    change = (merged - quantized).abs()
    same = (merged.argmax(-1) == quantized.argmax(-1)).float().mean()
    print(
        f"compared  to the adapter on its {bits} base: logits differ by {change.mean():.3f} on average, "
        f"{change.max():.3f} at most (their deviation is {quantized.std():.3f}); same first choice for {same:.1%}"
    )


