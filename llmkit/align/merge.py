"""Adapter and base as one plain model, written only when its logits are those of the adapted base.

Owns the verb, the check, and what a merge onto full precision costs an adapter that was trained on a quantised base.

    llmkit merge --model_name_or_path runs/my/sft --output_dir merged;  plain = merge(peft_model, tokenizer)

Leaves out merging into quantised weights, which would round the adapter away, and merging several adapters.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config import UserError, read_recipe
from ..data.tokenizer import load_tokenizer, save_tokenizer
from ..evaluate.columns import manifest_of, run_of
from ..hardware import cpu_seconds
from ..run import Result, quiet_libraries, write_derived, written_beside
from ..verbs import MergeConfig
from .lora import QUANTIZED, adapter_dir, base_of, is_quantized, load_base_and_adapter, recorded_base, stored_config

TOLERANCE = 1e-4  # of the logits' deviation, in float32; noise: 4e-6 on 2 random layers, 2e-5 on 24
MAX_TOKENS = 64  # of a row that logits are compared on
TEXTS = (
    "The river was high that spring, and the ferry had stopped running two days before they reached the village.",
    "Question: a train leaves at 9:40 and arrives at 13:05. How long is the journey?\nAnswer: 3 hours and 25 minutes.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0\n",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two models' logits on the same rows; `deviation` is the standard deviation of the first one's."""

    max: float
    mean: float
    deviation: float
    top1: float  # share of positions with the same likeliest token
    positions: int

    @property
    def relative(self) -> float:
        return self.max / self.deviation


def probe_rows(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Tensor]:
    """Rows (1, T) to compare logits on: texts, each also as a chat where there is a template, and random ids.

    The random row opens with the last rows of the embedding, where new tokens are.
    """
    size = model.get_input_embeddings().weight.shape[0]
    length = min(MAX_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS)
    ids = torch.randint(size, (length,), generator=torch.Generator().manual_seed(0))
    last = torch.arange(size - min(4, size, length), size)
    rows = [torch.cat([last, ids])[:length]]
    for text in TEXTS:
        if tokenizer is None:
            break
        rows.append(torch.tensor(tokenizer(text)["input_ids"][:length]))
        if tokenizer.chat_template:
            from jinja2 import TemplateError

            chat: Any = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            with contextlib.suppress(TemplateError):  # one may refuse any role; the plain text stands
                rows.append(torch.tensor(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][:length]))
    return [row[None] for row in rows if len(row)]


@torch.no_grad()
def get_logits(model: Any, rows: list[Tensor]) -> Tensor:
    """(N, V) float32 on the CPU, of all positions of all rows."""
    device = model.get_input_embeddings().weight.device
    logits = [model(input_ids=row.to(device), use_cache=False).logits[0] for row in rows]
    return torch.cat(logits).float().cpu()


def compare(logits: Tensor, others: Tensor) -> Difference:
    """Of (N, V) and (N, V)."""
    gap = (logits - others).abs()
    top1 = (logits.argmax(-1) == others.argmax(-1)).float().mean().item()
    return Difference(gap.max().item(), gap.mean().item(), logits.std().item(), top1, len(logits))


def merge_checked(model: Any, rows: list[Tensor]) -> tuple[PreTrainedModel, Difference]:
    """As `merge`, in float32, with how far it was from the adapted model."""
    if is_quantized(model):
        raise UserError("the base is quantised: merging into it would round the adapter away; `llmkit merge` says more")
    if not hasattr(model, "merge_and_unload"):
        kind = model.peft_config[model.active_adapter].peft_type.value
        raise UserError(f"the adapter is of the kind {kind}, which is no change of weights and cannot be merged")
    model = model.float().eval()
    adapted, was_tied = get_logits(model, rows), model.config.get_text_config().tie_word_embeddings
    merged = model.merge_and_unload()
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if (
        head is not None and was_tied and torch.equal(head.weight, embedding.weight)
    ):  # PEFT unties what it trained in full
        head.weight, merged.config.get_text_config().tie_word_embeddings = embedding.weight, True
    difference = compare(adapted, get_logits(merged, rows))
    if not difference.relative <= TOLERANCE:
        raise UserError(
            f"merged logits differ from the adapted model's by {difference.max:.2g}, {difference.relative:.2g} of "
            f"their deviation; allowed: {TOLERANCE:.0e}; nothing was written"
        )
    return merged, difference


def merge(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """The plain model that an adapted one (which is used up) stands for, in its base's dtype.

    Merged in float32. Raises UserError when its logits are farther from the adapted ones than TOLERANCE times their
    standard deviation, or when the base is quantised.
    """
    dtype = model.get_base_model().dtype
    merged, _ = merge_checked(model, probe_rows(model, tokenizer))
    return _cast(merged, dtype)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Weights only: `model.to(dtype)` would round the frequencies of RoPE too, which no file holds."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


# ---- the verb


def trained_on(folder: Path, path: str) -> dict[str, Any] | None:
    """How the base was quantised when the adapter was trained, None where it was not, or nobody wrote it down."""
    if (folder / QUANTIZED).is_file():
        return json.loads((folder / QUANTIZED).read_text(encoding="utf-8"))
    for parent in list(folder.absolute().parents)[:3]:  # run/adapter, run/checkpoints/step-00000500/adapter
        if (parent / "manifest.json").is_file() and (parent / "recipe.yaml").is_file():
            recipe = read_recipe(parent / "recipe.yaml")
            found = {key: recipe[key] for key in ("load_in_4bit", "load_in_8bit") if recipe.get(key)}
            if recipe.get("load_in_4bit"):
                found["bnb_4bit_quant_type"] = recipe.get("bnb_4bit_quant_type", "nf4")
                found["bnb_4bit_use_double_quant"] = recipe.get("use_bnb_nested_quant", False)
            if found:
                return found
    stored = (stored_config(base).get("quantization_config") for base in (path, recorded_base(folder)))
    return next((how for how in stored if how), None)


def _how(quantized: dict[str, Any]) -> str:
    bits = "4 bit" if quantized.get("load_in_4bit") else "8 bit" if quantized.get("load_in_8bit") else "quantised form"
    return f"a base in {bits}"


def _tokenizer(config: MergeConfig, folder: Path, path: str) -> tuple[PreTrainedTokenizerBase, bool]:
    """The adapter's own tokenizer with its chat template, else the base's; and whether it is the adapter's."""
    has_own = (folder / "tokenizer_config.json").is_file()
    return load_tokenizer(str(folder) if has_own else path, config.trust_remote_code, "model_name_or_path"), has_own


def set_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What the adapter's run decided about where an answer ends."""
    text_config = model.config.get_text_config()
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _logits_on_quantized(
    config: MergeConfig, folder: Path, path: str, quantized: dict[str, Any], device: str, rows: list[Tensor]
) -> Tensor:
    """Of the adapter on the base that it was trained on, with float32 arithmetic."""
    stored = [base for base in (path, recorded_base(folder)) if "quantization_config" in stored_config(base)]
    how = None if stored else BitsAndBytesConfig.from_dict(quantized | {"bnb_4bit_compute_dtype": "float32"})
    model = load_base_and_adapter(
        str(folder), (stored or [path])[0], torch.float32, config.trust_remote_code, how, device
    )
    return get_logits(model, rows)


def check(config: MergeConfig) -> tuple[Path, str, dict[str, Any] | None]:
    """Adapter, base, and how that was quantised in training. Raises UserError for what cannot or must not be merged."""
    for key in ("model_name_or_path", "output_dir"):
        if not getattr(config, key):
            raise UserError(f"{key} is missing; e.g. --model_name_or_path runs/my/sft --output_dir merged")
    if Path(config.output_dir).exists():
        raise UserError(f"output_dir={config.output_dir!r}: exists already; choose another or remove it")
    folder = adapter_dir(config.model_name_or_path)
    if folder is None:
        raise UserError(
            f"model_name_or_path={config.model_name_or_path!r}: has no adapter_config.json; "
            "name an adapter, or a run that trained one"
        )
    path = base_of(folder, config.base_model_name_or_path)
    quantized = trained_on(folder, path)
    if quantized and not config.dequantize:
        raise UserError(
            f"model_name_or_path={str(folder)!r}: the adapter was trained on {_how(quantized)}, which makes up for its "
            "rounding; on full-precision weights it is another model. --dequantize true merges it into those all the "
            "same and says how far the two are apart"
        )
    if config.dequantize and not quantized:
        raise UserError(
            f"dequantize=true has no effect: {str(folder)!r} was not trained on a quantised base; remove it"
        )
    return folder, path, quantized


def main(config: MergeConfig) -> Result:
    """Checks, merges in float32, compares, writes, reads back and compares again."""
    started = time.perf_counter()
    folder, path, quantized = check(config)
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu"  # float32 of mps is not compared
    tokenizer, has_own = _tokenizer(config, folder, path)
    model = load_base_and_adapter(
        str(folder), path, torch.float32, config.trust_remote_code, None, device, dequantize=bool(quantized)
    )
    adapter = next(iter(model.peft_config.values()))
    rows = probe_rows(model, tokenizer)
    merged, difference = merge_checked(model, rows)
    logits = get_logits(merged, rows)
    metrics = {"merge_max_logit_difference": difference.max, "logit_deviation": difference.deviation}
    print(
        f"merged    {adapter.peft_type.value} of rank {getattr(adapter, 'r', '-')} into {merged.config.model_type}: "
        f"largest logit difference {difference.max:.1g}, {difference.relative:.1g} of their deviation, on "
        f"{difference.positions} positions"
    )
    if quantized:
        far = compare(_logits_on_quantized(config, folder, path, quantized, device, rows), logits)
        metrics |= {f"quantized_{key}": value for key, value in dataclasses.asdict(far).items()}
        print(
            f"trained   on {_how(quantized)}; against that, logits of the merged model differ by {far.max:.2g} at "
            f"most, {far.mean:.2g} on average (deviation {far.deviation:.2g}); the likeliest token is the same at "
            f"{far.top1:.1%} of positions"
        )
    dtype = _dtype(config, path)
    merged = _cast(merged, dtype)
    merged.config.use_cache = True
    if has_own:
        set_special_ids(merged, tokenizer, folder)
    rounded = _write(config, merged, tokenizer, logits, rows, device)
    metrics |= {"num_parameters": sum(p.numel() for p in merged.parameters()), "rounding_max": rounded.max}
    if dtype != torch.float32:
        print(
            f"rounded   to {dtype}: logits differ by {rounded.max:.2g} at most, the likeliest token is the same at "
            f"{rounded.top1:.1%} of positions"
        )
    print(f'load it   AutoModelForCausalLM.from_pretrained("{config.output_dir}")')
    wall_s, cpu_s = round(time.perf_counter() - started, 2), round(cpu_seconds(), 2)
    result = Result("merge", "ok", config.output_dir, str(folder), wall_s, cpu_s, 0, {}, metrics)
    write_derived(Path(config.output_dir), result, manifest_of(run) if (run := run_of(folder)) else {})
    return result


def _dtype(config: MergeConfig, path: str) -> torch.dtype:
    stored = stored_config(path)
    name = config.dtype if config.dtype != "auto" else stored.get("dtype") or stored.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


def _write(
    config: MergeConfig,
    merged: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    logits: Tensor,
    rows: list[Tensor],
    device: str,
) -> Difference:
    """The folder, once what was read back from it computes what the model in memory does; how far rounding moved it."""
    folder = Path(config.output_dir)
    written = get_logits(merged, rows)
    if not written.isfinite().all():
        raise UserError(f"dtype={config.dtype}: logits are not finite in it; choose float32 or bfloat16")
    with written_beside(folder) as partial:
        merged.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        again = AutoModelForCausalLM.from_pretrained(
            partial, dtype=merged.dtype, trust_remote_code=config.trust_remote_code
        )
        read = compare(written, get_logits(again.to(device).eval(), rows))
        if not read.relative <= TOLERANCE:
            raise UserError(
                f"{folder}: logits differ by {read.max:.2g} after writing and reading back; nothing was written"
            )
        shutil.rmtree(partial / "__pycache__", ignore_errors=True)
    return compare(logits, written)
