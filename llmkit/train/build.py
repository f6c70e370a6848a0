"""What a training run needs before its first step: tokenizer, token stores, model.

Owns reading a recipe's model and data keys, and refusing what cannot work.   model = get_model(config, tokenizer)

Leaves out the loop and everything written into the run folder.
"""

import difflib
import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.progress import Progress, TextColumn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes
from ..config import PretrainConfig, UserError
from ..data.shards import NAME, Store, build_store, open_store
from ..data.sources import Source, documents, source_fingerprint
from ..data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, train_bpe, train_char
from ..run import resolve_model_dir, written_beside

BPE_SAMPLE_DOCUMENTS = 20_000  # a BPE of a few thousand merges does not change with more


# keys, what their value must be, how to say it
BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "max_length per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps "
        "eval_steps save_steps save_total_limit sample_max_new_tokens ngram_order lora_r lora_alpha",
        lambda v: v >= 1,
        "1 or more",
    ),
    (
        "learning_rate muon_learning_rate weight_decay warmup_steps max_grad_norm max_steps seed data_seed",
        lambda v: 0 <= v < math.inf,
        "0 or more",
    ),
    ("adam_beta1 adam_beta2 muon_momentum lora_dropout", lambda v: 0 <= v < 1, "0 or more, below 1"),
    ("adam_epsilon", lambda v: v > 0, "above 0"),
]


def check_config(config: PretrainConfig) -> None:
    """Raises UserError for settings that conflict or would be ignored."""
    if not config.output_dir:
        raise UserError("output_dir is missing; name a run folder, e.g. --output_dir runs/my/pretrain")
    if not config.datasets:
        raise UserError(
            "datasets is missing; name training data, e.g. datasets: [{path: text, data_files: corpus.txt}]"
        )
    if config.model_name_or_path and config.config_overrides:
        raise UserError("config_overrides has no effect with model_name_or_path; remove one of them")
    if config.ngram_order and len(config.datasets) > 1:
        raise UserError(f"ngram_order={config.ngram_order} counts one training source; set it to null for a mixture")
    for keys, is_allowed, allowed in BOUNDS:
        for key in keys.split():
            value = getattr(config, key)
            if value is not None and not is_allowed(value):
                raise UserError(f"{key}={value}; allowed: {allowed}")
    if not config.max_steps and config.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs={config.num_train_epochs}; allowed: above 0, or set max_steps")
    for key, value in config.lr_scheduler_kwargs.items():
        if key not in ("num_decay_steps", "min_lr_ratio"):
            raise UserError(f"lr_scheduler_kwargs: unknown key {key!r}; allowed: num_decay_steps, min_lr_ratio")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise UserError(f"lr_scheduler_kwargs.{key}={value!r}; allowed: a number, 0 or more")
    for prompt in config.sample_prompts:
        if not isinstance(prompt, str):
            raise UserError(f"sample_prompts: {prompt!r} is {type(prompt).__name__}; allowed: text, in quotes")


def check_engine() -> None:
    """Raises UserError for the sharding engines: Accelerate would turn them into plain DDP on a CPU without a word."""
    for name in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise UserError(
                f"accelerate_config: {name} does not run under pretrain yet; allowed: cpu, single_gpu, multi_gpu"
            )


def _training_texts(sources: list[Source], data_dir: Path) -> Iterator[str]:
    return (doc.text for source in sources for doc in documents(source, data_dir))


def get_tokenizer(
    config: PretrainConfig, sources: list[Source], data_dir: Path, store_dir: Path
) -> PreTrainedTokenizerBase:
    """The named tokenizer, the checkpoint's own, or one trained on the training data (never on validation text).

    A trained one is kept in `store_dir`, under the hash of its text, so that every rank and run has the same.
    """
    if config.tokenizer_name or config.model_name_or_path:
        name = config.tokenizer_name or resolve_model_dir(config.model_name_or_path or "")
        key = "tokenizer_name" if config.tokenizer_name else "model_name_or_path"
        return load_tokenizer(name, config.trust_remote_code, key)
    kind = "char" if config.tokenizer_type == "char" else f"bpe{config.vocab_size}"
    text_hash = hashlib.sha256("".join(source_fingerprint(source, data_dir) for source in sources).encode())
    folder = store_dir / f"tokenizer-{kind}-{text_hash.hexdigest()[:12]}"
    if not folder.exists():
        texts = _training_texts(sources, data_dir)
        if config.tokenizer_type == "char":
            tokenizer = train_char(texts)
        else:
            tokenizer = train_bpe(itertools.islice(texts, BPE_SAMPLE_DOCUMENTS), config.vocab_size)
        with written_beside(folder) as partial:
            save_tokenizer(tokenizer, partial)
    return load_tokenizer(str(folder))


def get_store(
    source: Source, data_dir: Path, store_dir: Path, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Store:
    """The tokenised corpus, from the cache when text and tokenizer are the same to the byte."""
    folder = data_dir / source.path
    if list(folder.glob("*.ds")):
        return open_store(folder, tokenizer)
    source_hash = source_fingerprint(source, data_dir)
    folder = store_dir / f"{source_hash[:12]}-{fingerprint(tokenizer)[:12]}"
    if (folder / NAME).exists():
        return open_store(folder, tokenizer)
    where = " ".join(str(part) for part in (source.path, source.name, source.data_files, source.split) if part)
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} documents"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"tokenising {where}", total=None)
        return build_store(
            documents(source, data_dir), tokenizer, folder, source_hash, where, lambda n: progress.advance(task, n)
        )


def get_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A fresh model of `model_type`, or a checkpoint, in float32. Raises UserError for what does not fit."""
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    if config.model_name_or_path:
        path = resolve_model_dir(config.model_name_or_path)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, trust_remote_code=config.trust_remote_code, dtype=torch.float32, **attention
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"model_name_or_path={path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None
    else:
        model = _fresh_model(config, tokenizer, attention)
    rows = model.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        raise UserError(
            f"vocab_size={rows} of the model is smaller than the tokenizer's {len(tokenizer)} ids; "
            f"set config_overrides.vocab_size to {len(tokenizer)} or more, or leave it out"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and limit < config.max_length:
        raise UserError(
            f"max_length={config.max_length} exceeds the model's max_position_embeddings={limit}; lower the first"
        )
    if config.use_peft:
        model = _add_lora(model, config)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _fresh_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, attention: dict) -> PreTrainedModel:
    try:
        blank = transformers.AutoConfig.for_model(config.model_type)
    except ValueError:
        raise UserError(
            f"model_type={config.model_type!r} is unknown to transformers; e.g. llmkit, qwen3, llama, gpt2"
        ) from None
    unknown = [key for key in config.config_overrides if not hasattr(blank, key)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(vars(blank)), n=1)
        raise UserError(
            f"config_overrides: {config.model_type} has no {unknown[0]!r}" + (f"; nearest: {near[0]!r}" if near else "")
        )
    for key, value in config.config_overrides.items():
        if isinstance(value, int) and value < 0 and key.startswith(("num_", "n_", "hidden_", "vocab_")):
            raise UserError(f"config_overrides: {key}={value}; allowed: 0 or more")
    length_key = "n_positions" if hasattr(blank, "n_positions") else "max_position_embeddings"
    settings = {
        "vocab_size": len(tokenizer),
        length_key: config.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | config.config_overrides
    try:
        model_config = transformers.AutoConfig.for_model(config.model_type, **settings)
        return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, **attention)
    except (ArithmeticError, ImportError, RuntimeError, StrictDataclassError, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(f"config_overrides: {' '.join(str(cause).split())}") from None


def _add_lora(model: PreTrainedModel, config: PretrainConfig) -> PreTrainedModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("use_peft=true needs peft; install it with `pip install llmkit[align]`") from None
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules={config.lora_target_modules!r}: {' '.join(str(error).split())}") from None


def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Forward and backward FLOPs per token: 6 per matrix parameter and 12 * layers * width * T for attention.

    Embedding look-ups are free, the head is not; attention is counted in full although half of it is masked
    (Chowdhery et al. 2022, appendix B). Norms, softmax and the activation are left out.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings)
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in embeddings:
        matrices += head.weight.numel()
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 6 * matrices + 12 * c.num_hidden_layers * c.num_attention_heads * head_dim * context


def check_disk(folder: Path, model: PreTrainedModel) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output_dir={str(folder)!r}: {free / 1e6:.0f} MB free, the model alone takes {needed / 1e6:.0f} MB; "
            "make room or choose another output_dir"
        )
