"""Which layers of a model are quantised, which are not, and why.

    plan_layers(model, config).told() == "2 x model.layers.*.mlp.down_proj (width 100 does not divide by 64)"

On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks 4-bit layers at their first use, which ends in an error where
sizes are no multiples of 32 (out) and 64 (in). Such layers stay as they are, whatever this machine is, so that the
folder runs everywhere. Leaves out quantising itself (quantize.py).
"""

import dataclasses
import difflib

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import UserError
from ..verbs import QuantizeConfig

OUT, IN = 32, 64  # what the sizes of a packed 4-bit layer divide by


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which linear layers are quantised, and why the others are not, by name."""

    quantized: list[str]
    left: dict[str, str]
    skip_modules: list[str]  # as the config needs them; given, transformers leaves out its own default (the head)

    def told(self) -> str:
        """Reasons with the names they hold for, the same layer of every block told once."""
        groups: dict[str, dict[str, int]] = {}
        for name, reason in self.left.items():
            short = ".".join("*" if part.isdigit() else part for part in name.split("."))
            group = groups.setdefault(reason, {})
            group[short] = group.get(short, 0) + 1
        return "; ".join(
            f"{', '.join(f'{count} x {name}' if count > 1 else name for name, count in names.items())} ({reason})"
            for reason, names in groups.items()
        )


def plan_layers(model: PreTrainedModel, config: QuantizeConfig) -> Plan:
    """Raises UserError for a name to skip that fits nothing, and where no layer is left to quantise."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    for skipped in config.llm_int8_skip_modules:
        if all(should_convert_module(name, [str(skipped)]) for name in linear):
            near = difflib.get_close_matches(str(skipped), sorted({n.rpartition(".")[2] for n in linear}), 3, 0.3)
            raise UserError(
                f"llm_int8_skip_modules: {skipped!r} fits no linear layer of {type(model).__name__}; allowed: ends of "
                f"names, or beginnings up to a dot: {', '.join(near)}, {next(iter(linear)).rpartition('.')[0]}"
            )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    heads = {name for name, module in model.named_modules() if head is not None and module is head}
    left = {name: "embedding" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    narrow: list[str] = []
    for name, module in linear.items():
        if name in heads:
            left[name] = "head, tied to the embedding" if head.weight is embedding.weight else "head"
        elif not should_convert_module(name, [str(skipped) for skipped in config.llm_int8_skip_modules]):
            left[name] = "llm_int8_skip_modules"
        elif config.load_in_4bit and (why := _does_not_divide(module)):
            left[name] = why
            narrow.append(name)
    quantized = [name for name in linear if name not in left]
    held = {id(p) for name in (*linear, *left) for p in model.get_submodule(name).parameters()}
    left |= {
        name: "no linear layer" for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in held
    }  # experts kept in one tensor
    if not quantized:
        told = Plan([], left, []).told()
        raise UserError(
            f"model_name_or_path={config.model_name_or_path!r}: no layer can be quantised in "
            f"{'4' if config.load_in_4bit else '8'} bit: {told}"
            + ("; --load_in_8bit takes any width" if narrow else "")
        )
    kept = [str(skipped) for skipped in config.llm_int8_skip_modules] + _as_patterns(narrow, quantized, model)
    return Plan(quantized, left, sorted(heads) + kept if kept else [])


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of what is quantised: (out, in), also of GPT-2's transposed layers."""
    weight = module.weight
    return (weight.shape[1], weight.shape[0]) if isinstance(module, Conv1D) else (weight.shape[0], weight.shape[1])


def _does_not_divide(module: nn.Module) -> str:
    num_out, num_in = sizes_of(module)
    wrong = [(size, by) for size, by in ((num_in, IN), (num_out, OUT)) if size % by]
    if not wrong:
        return ""
    sizes, divisors = (" and ".join(map(str, values)) for values in zip(*wrong, strict=True))
    return f"width{'s' * (len(wrong) > 1)} {sizes} do{'es' * (len(wrong) == 1)} not divide by {divisors}"


def _as_patterns(names: list[str], quantized: list[str], model: PreTrainedModel) -> list[str]:
    """For llm_int8_skip_modules: the last part of a name where it fits these layers only, else all of it."""
    last = {name.rpartition(".")[2] for name in names}
    shared = {end for end in last if any(name.endswith(end) for name in quantized)}
    prefix = f"{model.base_model_prefix}."  # without it, the name holds for the model without head, too
    whole = [name.removeprefix(prefix) for name in names if name.rpartition(".")[2] in shared]
    return sorted(last - shared) + whole


def bits_config(config: QuantizeConfig, plan: Plan, dtype: torch.dtype) -> BitsAndBytesConfig:
    skip = plan.skip_modules or None
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def method(config: QuantizeConfig) -> str:
    """8bit, nf4, nf4-double, fp4."""
    if config.load_in_8bit:
        return "8bit"
    return config.bnb_4bit_quant_type + "-double" * config.use_bnb_nested_quant
