"""What a post-training run needs before its first step: settings, tokenizer with its template, model, TRL's arguments.

Owns refusing what cannot work, and the defaults that depend on the machine.

    check_config(config);  tokenizer, template = get_tokenizer(config, is_chat);  model = get_model(config, template)

Leaves out the rows (`rows.py`), adapters (`lora.py`) and the verbs.
"""

import dataclasses
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes
from ..check.conversations import written_by_template
from ..config import UserError
from ..data.template import CHATML, read_template, template_hash
from ..data.tokenizer import CHAT, load_tokenizer
from ..hardware import Device
from ..run import resolve_model_dir
from ..train.build import probe_attention
from ..tuning import TuningConfig
from . import lora

# keys, what their value must be, how to say it; a verb that lacks a key skips it
BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "max_length per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps "
        "eval_steps save_steps save_total_limit max_new_tokens overfit eval_tasks_limit max_completion_length "
        "steps_per_generation num_iterations gold_prompts",
        lambda v: v >= 1,
        "1 or more",
    ),
    ("num_generations", lambda v: v >= 2, "2 or more: answers are compared with each other"),
    ("beta", lambda v: 0 <= v < math.inf, "0 or more"),
    ("temperature", lambda v: 0 < v < math.inf, "above 0"),
    (
        "learning_rate weight_decay warmup_steps max_grad_norm rank_weight desirable_weight undesirable_weight",
        lambda v: 0 <= v < math.inf,
        "0 or more",
    ),
    ("max_steps num_train_epochs max_bad_rows eval_answers eval_samples", lambda v: 0 <= v < math.inf, "0 or more"),
    ("seed data_seed", lambda v: 0 <= v < 2**32, "0 to 4294967295"),
    ("adam_beta1 adam_beta2 test_split_size", lambda v: 0 <= v < 1, "0 or more, below 1"),
    ("adam_epsilon", lambda v: v > 0, "above 0"),
    *lora.BOUNDS,
]
# keys, when they count, why they do not otherwise
DEPENDENT: list[tuple[str, Callable[[Any], bool], str]] = [
    ("eval_tasks_limit", lambda c: bool(c.eval_tasks), "without eval_tasks"),
    ("greater_is_better", lambda c: c.load_best_model_at_end, "without load_best_model_at_end: true"),
    ("packing_strategy", lambda c: c.packing, "without packing: true"),
    ("save_total_limit", lambda c: c.save_steps is not None, "without save_steps"),
    ("num_train_epochs", lambda c: c.max_steps == 0, "with max_steps"),
    ("project run_name", lambda c: c.report_to != "none", "without report_to: trackio"),
    ("hub_model_id hub_private_repo license", lambda c: c.push_to_hub, "without push_to_hub: true"),
    ("max_new_tokens", lambda c: _has_answers(c), "without eval_answers or eval_samples"),
    ("eval_answers eval_on_start", lambda c: _has_shard(c), "without a validation shard"),
    (
        "eval_steps",
        lambda c: _has_shard(c) or bool(c.eval_tasks) or hasattr(c, "gold_verifier"),
        "without a validation shard or eval_tasks",
    ),
    ("lora_dropout", lambda c: not getattr(c, "disable_dropout", False), "with disable_dropout: true"),
    ("loss_weights", lambda c: isinstance(c.loss_type, list), "with one loss_type"),
    *lora.DEPENDENT,
]


def _has_shard(config: Any) -> bool:
    return bool(config.eval_datasets or config.test_split_size)


def _has_answers(config: Any) -> bool:
    return any(getattr(config, key, None) for key in ("eval_answers", "overfit", "eval_samples"))


def check_config(config: Any) -> None:
    """Raises UserError for settings that conflict or would be ignored."""
    if not config.output_dir:
        raise UserError("output_dir is missing; name a run folder, e.g. --output_dir runs/my/sft")
    if not config.model_name_or_path:
        raise UserError("model_name_or_path is missing; name a run folder, a model folder or a Hub id")
    if not config.datasets:
        raise UserError("datasets is missing; name rows, e.g. datasets: [{path: json, data_files: rows.jsonl}]")
    for keys, is_allowed, allowed in BOUNDS:
        for key in keys.split():
            value = getattr(config, key, None)
            if value is not None and not is_allowed(value):
                raise UserError(f"{key}={value}; allowed: {allowed}")
    for keys, is_used, needed in DEPENDENT:
        for key in keys.split():
            if not hasattr(config, key) or getattr(config, key) == getattr(type(config)(), key):
                continue
            if not is_used(config):
                raise UserError(f"{key}={getattr(config, key)!r} has no effect {needed}; remove it")
    if not config.max_steps and config.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs={config.num_train_epochs}; allowed: above 0, or set max_steps")


# ---- tokenizer and template


@dataclasses.dataclass
class Template:
    """Which chat template a run uses, and what came with it."""

    note: str = ""
    new_tokens: list[int] = dataclasses.field(default_factory=list)  # ids that the base model never saw
    end_of_turn: int | None = None
    sha256: str | None = None


def parent_manifest(model_dir: str) -> dict[str, Any]:
    """Of the run that a model folder belongs to: model/ or adapter/ of it, or of one of its checkpoints."""
    for folder in (Path(model_dir).absolute(), *list(Path(model_dir).absolute().parents)[:3]):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict) and "stage" in manifest:
            return manifest
    return {}


def get_tokenizer(config: Any, is_chat: bool) -> tuple[PreTrainedTokenizerBase, Template]:
    """The model's own tokenizer, with the chat template of this run where the rows are chats.

    Raises UserError for a template that differs from the one that the parent was trained with.
    """
    path = resolve_model_dir(config.model_name_or_path)
    tokenizer = load_tokenizer(path, config.trust_remote_code, "model_name_or_path", config.model_revision)
    template = Template()
    if is_chat:
        _set_template(tokenizer, template, config.chat_template_path, parent_manifest(path))
    elif config.chat_template_path:
        raise UserError(f"chat_template_path={config.chat_template_path!r} has no effect on rows that are no chats")
    if config.eos_token:
        if config.eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token={config.eos_token!r}: the tokenizer has no such token; name one of its own")
        tokenizer.eos_token = config.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        template.note += f"; no pad token, {tokenizer.eos_token} pads (padding is never trained)"
    return tokenizer, template


def _set_template(tokenizer: Any, template: Template, asked: str | None, parent: dict[str, Any]) -> None:
    own, trained = tokenizer.chat_template, parent.get("chat_template")
    wanted = read_template(asked) if asked else own or CHATML
    tokenizer.chat_template = wanted
    template.sha256 = template_hash(tokenizer)
    if trained and template.sha256 != trained:
        raise UserError(
            f"chat_template_path={asked!r}: differs from the template that {parent['stage']} of this model was trained "
            f"with ({str(trained)[:12]}); remove chat_template_path"
        )
    template.note = "the tokenizer's own" if not asked or wanted == own else f"{asked}, not the tokenizer's own"
    if not own:
        template.note = asked or "ChatML, since the tokenizer has none"
    if wanted == CHATML:
        known = tokenizer.get_vocab()
        missing = [token for token in CHAT if token not in known]
        if missing:
            tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
            template.note += f", {' '.join(missing)} added"
        if not own:  # reserved or not, nothing has trained them
            template.new_tokens = tokenizer.convert_tokens_to_ids(CHAT)
    written = written_by_template(tokenizer)
    end = written.end if written else ""
    if end in tokenizer.get_vocab():
        template.end_of_turn = tokenizer.convert_tokens_to_ids(end)
        if wanted != own:
            tokenizer.eos_token = end


# ---- model


def load_model(
    config: Any, quantization: Any = None, device: Device | None = None, cls: Any = AutoModelForCausalLM, **more: Any
) -> PreTrainedModel:
    """The weights that the recipe starts from. Raises UserError."""
    path = resolve_model_dir(config.model_name_or_path)
    if config.attn_implementation:
        more["attn_implementation"] = config.attn_implementation
    if quantization is not None:
        more["quantization_config"] = quantization
    if device and (quantization is not None or "quantization_config" in lora.stored_config(path)):
        rank = os.environ.get("LOCAL_RANK", "0")
        more["device_map"] = {"": f"cuda:{rank}" if device.type == "cuda" else device.type}  # else: any GPU there is
    try:
        return cls.from_pretrained(
            path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            **more,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"model_name_or_path={path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None


def get_model(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    device: Device,
    load: Callable[..., PreTrainedModel] = load_model,
) -> tuple[PreTrainedModel, list[str]]:
    """The model to train, adapters included, and lines to say. Raises UserError for what does not fit."""
    path = resolve_model_dir(config.model_name_or_path)
    if (Path(path) / "adapter_config.json").exists():
        raise UserError(
            f"model_name_or_path={path!r} is an adapter; write one model of it and its base first: "
            f"llmkit merge --model_name_or_path {path} --output_dir merged"
        )
    model = load(config, lora.quantization(config, path, device), device)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and limit < config.max_length:
        raise UserError(
            f"max_length={config.max_length} exceeds the model's max_position_embeddings={limit}; lower the first"
        )
    if getattr(config, "packing", False) and not _keeps_apart(model, config):
        raise UserError(
            f"packing=true: {model.config.model_type} does not keep packed rows apart with "
            f"attn_implementation={model.config._attn_implementation!r}; set packing to false"
        )
    added = lora.grow_embeddings(model, len(tokenizer))
    notes = [f"model     {len(added)} embeddings added for new tokens, each the mean of the others"] if added else []
    _set_special_ids(model, tokenizer, template)
    model.config.use_cache = False
    if config.use_peft:
        model = lora.add_adapter(model, config, sorted({*template.new_tokens, *added}))
    return model, notes


def get_reference(config: Any, tokenizer: PreTrainedTokenizerBase, template: Template, model: Any) -> Any:
    """The frozen model that preferences are measured against; None under LoRA, where it is the base without adapter.

    Raises UserError for a reference with another vocabulary: its log-probabilities would be those of other texts.
    """
    name = config.ref_model_name_or_path
    if name is None and config.use_peft:
        return None
    at = dataclasses.replace(config, model_name_or_path=name or config.model_name_or_path)
    if name is not None:
        path = resolve_model_dir(name)
        theirs = load_tokenizer(path, config.trust_remote_code, "ref_model_name_or_path", config.model_revision)
        own, other = tokenizer.get_vocab(), theirs.get_vocab()
        differ = [token for token in sorted(own, key=lambda t: own[t]) if other.get(token) != own[token]]
        differ = [token for token in differ if own[token] not in template.new_tokens or token in other]
        if differ:
            raise UserError(
                f"ref_model_name_or_path={name!r}: has another tokenizer than model_name_or_path ({len(differ):,} "
                f"tokens differ, the first is {differ[0]!r}); name a reference with the same one, or none"
            )
        trained = parent_manifest(path).get("chat_template")
        if trained and template.sha256 and trained != template.sha256:
            raise UserError(
                f"ref_model_name_or_path={name!r}: was trained with another chat template ({str(trained)[:12]}) than "
                f"this run has ({template.sha256[:12]}); name a reference with the same one, or none"
            )
    reference = load_model(at)
    lora.grow_embeddings(reference, model.get_input_embeddings().weight.shape[0])
    reference.config.use_cache = False
    return reference.requires_grad_(False).eval()


def _keeps_apart(model: PreTrainedModel, config: Any) -> bool:
    """Tried on a small model of the same class; flash attention reads the lengths that TRL's collator gives it."""
    if config.packing_strategy == "wrapped" or model.config._attn_implementation.startswith("flash"):
        return True
    from ..check.attach import builder
    from ..check.shrink import build_small
    from ..check.subject import NotRun, Subject

    subject = Subject("", config=model.config, make_model=builder(config.trust_remote_code))
    try:
        with torch.random.fork_rng([]):
            return probe_attention(build_small(subject, keep_vocabulary=False))[1]
    except NotRun as error:
        raise UserError(f"packing=true cannot be tried on this model ({error}); set packing to false") from None


def _set_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Generation ends with the turn, and with the document as before."""
    text_config = model.config.get_text_config()
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not hasattr(model, "generation_config"):  # a classifier
        return
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    ends = [template.end_of_turn, tokenizer.eos_token_id, *known]
    ids = list(dict.fromkeys(i for i in ends if i is not None))
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id


# ---- TRL's arguments

OWN = {"output_dir", "report_to", "run_name", "project", "max_steps", "save_steps", "eval_steps", "trust_remote_code"}
OWN |= {
    "assistant_only_loss",
    "completion_only_loss",
    "chat_template_path",
    "eos_token",
    "passed_on",
    "use_cpu",
    "bf16",
}
OWN |= {"gradient_checkpointing", "resume_from_checkpoint", "lr_scheduler_kwargs", "eval_on_start"}
OWN |= {"push_to_hub", "hub_model_id", "hub_private_repo"}  # pushed whole, after the run
OWN |= {"load_best_model_at_end", "metric_for_best_model", "greater_is_better"}


def trl_arguments(cls: Any, config: Any, device: Device, kind: str, **more: Any) -> Any:
    """TRL's config: keys of the same name as they are, and what depends on the machine. Raises UserError.

    TRL asks for bf16 and recomputed activations everywhere; here they are on where the hardware gains by them.
    """
    theirs = {field.name for field in dataclasses.fields(cls)}
    same = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in theirs - OWN}
    saves = (
        {"save_strategy": "steps", "save_steps": config.save_steps} if config.save_steps else {"save_strategy": "no"}
    )
    looks = (
        {"eval_strategy": "steps", "eval_steps": config.eval_steps} if config.eval_steps and _has_shard(config) else {}
    )
    machine: dict[str, Any] = {"use_cpu": device.type == "cpu", "bf16": device.bf16}
    if device.type == "cpu" and kind == "ddp":
        machine["ddp_backend"] = "gloo"
    if kind.startswith("zero"):
        machine |= _deepspeed(kind, device)
    recompute = config.gradient_checkpointing
    settings = {
        **same,
        **saves,
        **looks,
        **machine,
        "output_dir": tempfile.gettempdir(),  # set when the run has its folder
        "max_steps": config.max_steps or -1,
        "gradient_checkpointing": device.type != "cpu" if recompute is None else recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "lr_scheduler_kwargs": config.lr_scheduler_kwargs or None,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "eval_on_start": config.eval_on_start and not config.resume_from_checkpoint,
        **more,
        **config.passed_on,
    }
    try:
        with warnings.catch_warnings():  # TRL's own default is spelled as in transformers 4
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            return cls(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{cls.__name__}: {' '.join(str(error).split())}; mend that key") from None


def _deepspeed(kind: str, device: Device) -> dict[str, Any]:
    """ZeRO through transformers. On CPU processes nobody may say use_cpu: it would silently be DDP."""
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    stage = int(kind[-1])
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    zero: dict[str, Any] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    if offload != "none":
        zero["offload_optimizer"] = {"device": offload}
    given: dict[str, Any] = {
        "deepspeed": {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
    }
    if device.type == "cpu":
        from accelerate import PartialState

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build of 90 s; gloo does it too
        PartialState(backend="gloo")
        given |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    return given


def model_config(config: TuningConfig) -> Any:
    """The config alone, for the checks before a run. Raises UserError."""
    path = resolve_model_dir(config.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(
            path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_name_or_path={path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None
