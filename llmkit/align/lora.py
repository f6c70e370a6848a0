"""Adapters: LoRA, rsLoRA, DoRA on a plain base, or on one in 4 or 8 bit (QLoRA).

Owns the PEFT keys of a recipe, new tokens under an adapter, and an adapter read back onto its base.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization(config, path, device))
    model = add_adapter(model, config, new_token_ids);  model = load_base_and_adapter("runs/my/sft/adapter")

Leaves out merging (`merge.py`) and training. Experts kept as one tensor (MoE) get no adapter: LoRA sits on modules.
"""

import copy
import difflib
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes
from ..config import UserError
from ..hardware import Device
from ..run import resolve_model_dir
from ..tuning import TuningConfig

if TYPE_CHECKING:
    from peft import PeftModel

QUANTIZED = "base_quantization.json"  # in the folder of an adapter whose base was quantised

# keys, what their value must be, how to say it
BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    ("lora_r lora_alpha", lambda v: v >= 1, "1 or more"),
    ("lora_dropout", lambda v: 0 <= v < 1, "0 or more, below 1"),
]
# keys, when they count, why they do not otherwise
DEPENDENT: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora use_dora",
        lambda c: c.use_peft,
        "without use_peft: true",
    ),
    ("bnb_4bit_quant_type use_bnb_nested_quant", lambda c: c.load_in_4bit, "without load_in_4bit: true"),
]


# ---- the base


def stored_config(path: str, revision: str = "main") -> dict[str, Any]:
    """config.json as it is, no code run; empty where there is none, which loading the model will say better."""
    try:
        return PreTrainedConfig.get_config_dict(path, revision=revision)[0] if path else {}
    except (OSError, ValueError):
        return {}


def quantization(config: TuningConfig, path: str, device: Device) -> BitsAndBytesConfig | None:
    """How the base at `path` is loaded: None as it is stored, else in 4 or 8 bit. Raises UserError where it cannot be.

    Arithmetic is in bfloat16 where the GPU has it, else in float32. Embeddings, norms and head are never quantised.
    """
    wanted = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(config, key)]
    if "quantization_config" in stored_config(path, config.model_revision):
        if wanted:
            raise UserError(f"{wanted[0]}=true: {path!r} is stored in quantised form already; remove the key")
        if not config.use_peft:
            raise UserError(
                f"use_peft=false: {path!r} is stored in quantised form, so train an adapter: use_peft: true"
            )
        return None
    if not wanted:
        return None
    if len(wanted) == 2:
        raise UserError("load_in_4bit=true and load_in_8bit=true: a base has one of them; remove one")
    if not config.use_peft:
        raise UserError(
            f"{wanted[0]}=true: quantised weights cannot be trained, an adapter on them can; use_peft: true"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{wanted[0]}=true needs bitsandbytes: `pip install bitsandbytes`")
    if device.type == "mps":
        raise UserError(f"{wanted[0]}=true: not on mps ({device.name}); remove it, or set use_cpu: true")
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" and device.bf16 else torch.float32,
    )


def is_classifier(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


def keep_unpacked(model: nn.Module) -> None:
    """4-bit layers on a CPU with bfloat16 stay as they are when evaluated.

    bitsandbytes (0.50) repacks them for good at the first forward pass without gradients, into a form that has no
    backward: every later gradient through them is lost without a word. It also needs sizes that are multiples of 32
    and 64, and rounds to bfloat16. Unpacked, evaluating and training do the same float32 arithmetic.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _dequantized(model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """A plain float32 model of the rounded values; what transformers (5.23) dequantises in place cannot be saved."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    rounded = model.dequantize(torch.float32)
    weights = rounded.state_dict()
    for name, module in plain.named_modules():
        if isinstance(module, Conv1D) and isinstance(rounded.get_submodule(name), nn.Linear):
            weights[f"{name}.weight"] = weights[f"{name}.weight"].T
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return plain


@torch.no_grad()
def grow_embeddings(model: PreTrainedModel, num_rows: int) -> list[int]:
    """Embedding and head get `num_rows` rows; the ids that are new, each the mean of the old rows (Hewitt 2021)."""
    size = model.get_input_embeddings().weight.shape[0]
    if num_rows <= size:
        return []
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            layer.weight[size:] = layer.weight[:size].mean(0)
    return list(range(size, num_rows))


# ---- names of modules


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _is_named(name: str, targets: str | Iterable[str]) -> bool:
    """As PEFT reads target_modules: text is a regular expression, a list holds ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_any_named(names: Iterable[str], targets: str | Iterable[str]) -> bool:
    return any(_is_named(name, targets) for name in names)


def _ends(model: PreTrainedModel) -> list[str]:
    """Names of embedding and head."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [_name_of(model, layer) for layer in layers if layer is not None]


def _check_names(model: nn.Module, key: str, targets: str | Sequence[str]) -> None:
    """Raises UserError for a name without module: PEFT passes over it where another one has a module."""
    names = [name for name, _ in model.named_modules() if name]
    short = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            found = any(_is_named(name, targets if isinstance(targets, str) else [target]) for name in names)
        except re.error as error:
            raise UserError(f"{key}={targets!r}: no regular expression ({error}); or give a list of names") from None
        if not found:
            last = str(target).rpartition(".")[2]
            near = difflib.get_close_matches(last, short, n=3, cutoff=0.5) or short[:8]
            how = (
                f"text is a regular expression of whole names; a list would be [{near[0]}]; "
                if targets is target
                else ""
            )
            raise UserError(
                f"{key}={targets!r}: {type(model).__name__} has no module {target!r}; {how}nearest: {', '.join(near)}"
            )


def _check_targets(model: PreTrainedModel, config: TuningConfig) -> None:
    """Raises UserError for targets that match nothing, or whose adapter would not be trained or could not be merged."""
    targets = config.lora_target_modules
    if targets != "all-linear":
        if not targets:
            raise UserError(f"lora_target_modules={targets!r} is empty; allowed: all-linear, or names of modules")
        _check_names(model, "lora_target_modules", targets)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is not None and _is_named(name := _name_of(model, head), targets):
            raise UserError(
                f"lora_target_modules={targets!r}: an adapter on {name} would never be trained, the loss reads its "
                f"weight only; train it in full instead: lora_modules_to_save: [{name}]"
            )
        if _is_named(name := _name_of(model, embedding), targets) and _is_tied(model):
            raise UserError(
                f"lora_target_modules={targets!r}: {name} is also the head (tied), and merging would change both; "
                f"remove it, or train it in full: lora_modules_to_save: [{name.rpartition('.')[2]}]"
            )
    if config.lora_modules_to_save:
        _check_names(model, "lora_modules_to_save", config.lora_modules_to_save)


def _check_magnitudes(model: PreTrainedModel) -> None:
    """DoRA divides by the norm of every row: raises UserError for a matrix of zeros, as a fresh model of ours has."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point() and not weight.any():
            raise UserError(f"use_dora=true: {name} is all zero, and DoRA divides by its norm; train the base first")


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


# ---- the adapter


def _trained_rows(
    model: PreTrainedModel, config: TuningConfig, ids: list[int]
) -> tuple[dict[str, list[int]], list[str]]:
    """{module: rows} to train of embedding and untied head, and the modules to train in full.

    A head with bias is trained in full: PEFT (0.21) would drop the bias where it trains rows.
    """
    saved, rows = list(config.lora_modules_to_save or []), {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for layer in (embedding, head):
        name = _name_of(model, layer) if layer is not None else ""
        if not ids or not name or (_is_tied(model) and (layer is head or _is_any_named(_ends(model), saved))):
            continue
        if _is_named(name, saved):
            continue
        if getattr(layer, "bias", None) is not None:
            saved.append(name)
        else:
            rows[name] = ids
    if ids and _is_tied(model) and getattr(head, "bias", None) is not None:
        raise UserError(
            f"use_peft=true: {model.config.model_type} has a tied head with a bias, where rows of new tokens cannot be "
            "trained alone; set use_peft to false, or use a chat_template_path of tokens that the model knows"
        )
    return rows, saved


def train_in_float32(model: nn.Module) -> None:
    """Undoes what TRL (1.16) does to adapters on a quantised base: in bfloat16 small updates round to none."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def add_adapter(model: PreTrainedModel, config: TuningConfig, new_token_ids: Iterable[int] = ()) -> "PeftModel":
    """The model under a fresh adapter, base frozen; rows of `new_token_ids` are trained and saved with it.

    Raises UserError for keys that fit no module of this model.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("use_peft=true needs peft: `pip install peft`")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    _check_targets(model, config)
    if config.use_dora:
        _check_magnitudes(model)
    ids, was_tied = sorted(set(new_token_ids)), _is_tied(model)
    rows, saved = _trained_rows(model, config, ids)
    trains_tied = was_tied and _is_any_named(_ends(model), saved)
    adapter = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        modules_to_save=list(saved) or None,  # PEFT changes it
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        trainable_token_indices=rows or None,
        ensure_weight_tying=trains_tied,
        task_type="SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",  # PEFT then trains and saves the new head
    )
    if is_quantized(model):
        keep_unpacked(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainer's choice
    try:
        with warnings.catch_warnings():  # of Conv1D, whose transposed weight PEFT sets by itself
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            adapted = get_peft_model(model, adapter)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lora_target_modules={config.lora_target_modules!r}: {reason}") from None
    if trains_tied and not _is_tied(adapted):
        raise UserError(
            f"lora_modules_to_save={saved}: embedding and head of this model are tied, and would be trained apart; "
            f"name the head ({_ends(model)[1]}) to train both as one"
        )
    if trains_tied:  # PEFT (0.21) writes down the embedding instead, which it would not tie again if it is called wte
        adapted.peft_config["default"].modules_to_save = saved
    _give_head_its_bias(adapted)
    return adapted


def _give_head_its_bias(model: Any) -> None:
    """TRL (1.16) reads `lm_head.bias`, which PEFT's wrapper of trained rows lacks; it never wraps a head with one."""
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = None


# ---- an adapter from its folder


def adapter_dir(name: str) -> Path | None:
    """`name` itself or its adapter/, whichever holds an adapter."""
    folders = (Path(name), Path(name) / "adapter")
    return next((folder for folder in folders if (folder / "adapter_config.json").is_file()), None)


def recorded_base(folder: Path) -> str:
    """The base that the adapter names, empty where it names none."""
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/adapter_config.json: cannot be read ({type(error).__name__})") from None
    return str(found or "")


def base_of(folder: Path, given: str | None = None) -> str:
    """The base to load: the given one, or the one that the adapter names. Raises UserError for another base."""
    recorded = recorded_base(folder)
    if not given and not recorded:
        raise UserError(f"{folder}: names no base; give base_model_name_or_path")
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", recorded) is not None
    if not given and not is_hub_id and not Path(recorded).exists():
        raise UserError(f"{folder}: names the base {recorded!r}, which is not there; give base_model_name_or_path")
    path = resolve_model_dir(given or recorded)
    if given and recorded:
        theirs, own = stored_config(path), stored_config(recorded)
        for key in ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer"):
            if theirs.get(key) != own.get(key) and theirs and own:
                raise UserError(
                    f"base_model_name_or_path={given!r}: the adapter was trained on another base: {key} is "
                    f"{theirs.get(key)}, that of {recorded!r} is {own.get(key)}"
                )
    return path


def load_base_and_adapter(
    name: str,
    base: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    quantization_config: BitsAndBytesConfig | None = None,
    device: str = "cpu",
    dequantize: bool = False,
) -> "PeftModel":
    """An adapter folder (or the run folder that holds it) on its base, grown to the adapter's vocabulary, in eval mode.

    `dequantize`: a base that is stored in quantised form becomes a plain one of the same (rounded) values.
    Raises UserError when the folder is no adapter, when its base is not there or when it belongs to another base.
    """
    folder = adapter_dir(name)
    if folder is None:
        raise UserError(
            f"model_name_or_path={name!r}: has no adapter_config.json; name an adapter or a run that has one"
        )
    path = base_of(folder, base)
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": dtype}
    if quantization_config:  # None would hide that a base is stored in quantised form
        how["quantization_config"] = quantization_config
    if quantization_config or "quantization_config" in stored_config(path):  # else onto a GPU, whatever was asked for
        how["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **how)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"base_model_name_or_path={path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None
    if is_quantized(model):
        keep_unpacked(model)
        model = _dequantized(model, trust_remote_code) if dequantize else model
    adapted = put_on(model, folder, path)
    return adapted if is_quantized(model) else adapted.to(device)


def save_adapter(model: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """What was trained, and no more: of a grown embedding only the rows of new tokens, `put_on` grows it again.

    Beside it how the base was quantised, which PEFT does not keep, and which decides what merging means.
    """
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    if is_quantized(model):
        (folder / QUANTIZED).write_text(model.config.quantization_config.to_json_string(), encoding="utf-8")


def _stored_rows(config: Any, weights: dict[str, torch.Tensor], folder: Path) -> int:
    """Rows of the embedding that the adapter was trained with, at least."""
    trained = getattr(config, "trainable_token_indices", None) or {}
    rows = [max(ids) + 1 for ids in (trained.values() if isinstance(trained, dict) else [trained])]
    rows += [w.shape[0] for name, w in weights.items() if name.endswith(("embed_tokens.weight", "wte.weight"))]
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        rows.append(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size())
    return max(rows, default=0)


def put_on(model: PreTrainedModel, folder: Path, path: str) -> "PeftModel":
    """The adapter of a folder on a base in memory, every tensor in its place; raises UserError where one has none."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # older ones are pickles, which are never loaded
        raise UserError(f"{file}: is missing; save the adapter with PEFT 0.7 or later")
    try:
        config, weights = PeftConfig.from_pretrained(folder), load_file(file)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter cannot be read ({' '.join(str(error).split())[:200]})") from None
    grow_embeddings(model, _stored_rows(config, weights, folder))
    misfit = f"{folder}: does not fit the base {path!r}, it was trained on another one"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            adapted = get_peft_model(model, config)
            result = set_peft_model_state_dict(adapted, weights)
    except (ValueError, RuntimeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise UserError(f"{misfit} ({(lines or [' '.join(str(error).split())])[0][:200]})") from None
    missing = [name for name in get_peft_model_state_dict(adapted, save_embedding_layers=False) if name not in weights]
    # PEFT writes a grown layer that is trained in full twice, once under a name that it cannot read
    twins = {
        name.replace(".weight", ".modules_to_save.weight").replace(".bias", ".modules_to_save.bias") for name in weights
    }
    stray = [name for name in result.unexpected_keys if name not in twins]
    for what, names in (("has no place for", stray), ("lacks", missing)):
        if names:
            raise UserError(f"{misfit} ({what} {len(names)} tensors, e.g. {names[0]})")
    _give_head_its_bias(adapted)
    return adapted.eval()
