"""Adapters: LoRA, rsLoRA, DoRA, on whole and on quantised bases.

Owns what PEFT and bitsandbytes are told, and refusing what would be silently wrong.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization(config, path, device))
    model = add_adapter(model, config, new_tokens)

Leaves out saving (`save.py`) and merging (`merge.py`).
"""

import difflib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..config import UserError
from ..hardware import Device, cpu_has_bf16

# as in train/build.py: keys, what their value must be, how to say it
BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    ("lora_r lora_alpha", lambda v: v >= 1, "1 or more"),
    ("lora_dropout", lambda v: 0 <= v < 1, "0 or more, below 1"),
]
# keys, when they count, why they do not otherwise
DEPENDENT: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora use_dora load_in_4bit "
        "load_in_8bit",
        lambda c: c.use_peft,
        "without use_peft: true",
    ),
    ("bnb_4bit_quant_type use_bnb_nested_quant", lambda c: c.load_in_4bit, "without load_in_4bit: true"),
]


def quantization(config: Any, path: str, device: Device) -> Any:
    """The BitsAndBytesConfig of the recipe, or None. Raises UserError where this machine cannot compute in it.

    A base that is stored quantised is loaded as it is stored.
    """
    if config.load_in_4bit and config.load_in_8bit:
        raise UserError("load_in_4bit=true and load_in_8bit=true; choose one")
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key}=true needs bitsandbytes: `pip install bitsandbytes`")
    if device.type == "mps":
        raise UserError(f"{key}=true: bitsandbytes has no kernels for {device.name}; set it to false, or use_cpu: true")
    if config.load_in_4bit and device.type == "cpu" and cpu_has_bf16():
        _check_widths(config, path)
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if device.bf16 else torch.float32,
    )


def _check_widths(config: Any, path: str) -> None:
    """bitsandbytes repacks 4-bit matrices for CPUs with bfloat16 in blocks of 32 outputs, and asserts on others."""
    base = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base, trust_remote_code=config.trust_remote_code)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        width = linear_width(module)
        if width and width % 32 and module is not head:
            raise UserError(
                f"load_in_4bit=true: {name} has {width} outputs, bitsandbytes on this CPU takes multiples of 32 only; "
                "use load_in_8bit, or a GPU"
            )


def linear_width(module: torch.nn.Module) -> int | None:
    """Outputs of a linear layer (GPT-2's Conv1D included), None for anything else."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features
    return module.nf if type(module).__name__ == "Conv1D" else None


@torch.no_grad()
def grow_vocabulary(model: PreTrainedModel, num_tokens: int) -> bool:
    """Adds rows to embedding and head until there are `num_tokens`; a new one is the mean of the others, never noise.

    Source: Hewitt 2021: else the new token would often be the likeliest of all. Embeddings that are long enough stay.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if num_tokens <= size:
        return False
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            layer.weight[size:] = layer.weight[:size].mean(0)
    return True


def add_adapter(model: PreTrainedModel, config: Any, new_tokens: list[int]) -> Any:
    """A PeftModel whose adapters are all that is trained, with the rows of `new_tokens` in embedding and head.

    Raises UserError for targets that match nothing, or that TRL could not train.
    """
    import peft

    if getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    target = config.lora_target_modules
    target = target[0] if isinstance(target, list) and len(target) == 1 else target
    _check_targets(model, target)
    if config.use_dora:
        _check_magnitudes(model)
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        **_trained_in_full(model, config.lora_modules_to_save or [], new_tokens),
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
        task_type="CAUSAL_LM",
    )
    was_tied, full = _is_tied(model), settings.modules_to_save and list(settings.modules_to_save)
    try:
        adapted = peft.get_peft_model(model, settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"lora_target_modules={config.lora_target_modules!r}: {' '.join(str(error).split())}") from None
    # PEFT puts the embedding's name there, and would not find GPT-2's head from it when it reads the adapter again
    settings.modules_to_save = full
    assert _is_tied(adapted) or not was_tied, "a tied head trains with its embedding"
    return adapted


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _trained_in_full(model: PreTrainedModel, asked: list, new_tokens: list[int]) -> dict[str, Any]:
    """PEFT's modules_to_save and trainable_token_indices, so that new tokens are learnt as input and as output.

    An untied embedding trains their rows only. The head is trained whole, and so is a tied embedding: TRL's loss reads
    the weights of the head, which PEFT's wrapper of single rows does not show it.
    """
    names = {module: name.split(".")[-1] for name, module in model.named_modules()}
    embedding, head = names[model.get_input_embeddings()], names[model.get_output_embeddings()]
    both = {embedding, head} & set(asked)
    if _is_tied(model):  # by the head's name: PEFT finds GPT-2's embedding from there, but not the other way round
        full = sorted((set(asked) - both) | ({head} if both or new_tokens else set()))
        return {"modules_to_save": full or None, "ensure_weight_tying": head in full}
    rows = {"trainable_token_indices": {embedding: list(new_tokens)}} if new_tokens and embedding not in asked else {}
    return {"modules_to_save": sorted({*asked, *([head] if new_tokens else [])}) or None} | rows


def _check_targets(model: PreTrainedModel, target: str | list) -> None:
    """Raises UserError for a name that no module has, and for the head, whose adapter TRL would never train."""
    if isinstance(target, str):  # all-linear, or a regular expression: PEFT says when it matches nothing
        return
    names = [name for name, _ in model.named_modules() if name]
    last = sorted({name.split(".")[-1] for name in names})
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    for wanted in target:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            near = difflib.get_close_matches(str(wanted), last, n=1, cutoff=0.3)
            known = f"; nearest: {near[0]!r}" if near else f"; modules: {', '.join(last)}"
            raise UserError(f"lora_target_modules: {wanted!r} matches no module of {model.config.model_type}{known}")
        if head and (wanted == head or head.endswith(f".{wanted}")):
            raise UserError(
                f"lora_target_modules: {wanted!r} is the output head, whose adapter TRL's loss would never train; "
                f"write lora_modules_to_save: [{wanted}]"
            )


def _check_magnitudes(model: PreTrainedModel) -> None:
    """DoRA divides by the norm of every row: raises UserError for matrices that are zero, as in a fresh model of ours."""
    for name, module in model.named_modules():
        if linear_width(module) and module.weight.is_floating_point() and not module.weight.any():
            raise UserError(f"use_dora=true: {name} is all zero, DoRA divides by its norm; train the base first")


# ---- adapters on the disk


def read_adapter(name: str) -> tuple[Path, dict[str, Any]]:
    """Folder and adapter_config.json of an adapter, or of the run that holds it. Raises UserError."""
    for folder in (Path(name) / "adapter", Path(name)):
        try:
            return folder, json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / 'adapter_config.json'}: cannot be read ({error}); expected PEFT's JSON") from None
    raise UserError(f"model_name_or_path={name!r}: holds no adapter (adapter_config.json); name a folder that has one")


def load_adapter(base: PreTrainedModel, folder: Path, where: str) -> Any:
    """base with the adapter on it. Raises UserError for an adapter of another base; PEFT would skip what does not fit."""
    import peft
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder}: has no adapter_model.safetensors; pickled adapters are not loaded")
    if any(folder.glob("tokenizer*")):  # tokens that it was trained with, and the base does not have
        grow_vocabulary(base, len(AutoTokenizer.from_pretrained(folder)))
    try:
        model = peft.PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = next((line for line in lines if "size mismatch" in line), lines[0])
        raise UserError(
            f"{folder}: is an adapter of another base than {where} ({first[:160]}); name its own by "
            "base_model_name_or_path"
        ) from None
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
    unused = stored - set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if unused:
        raise UserError(
            f"{folder}: is an adapter of another base than {where}: {len(unused)} of its {len(stored)} tensors fit "
            f"nowhere ({min(unused)}); name its own by base_model_name_or_path"
        )
    return model
