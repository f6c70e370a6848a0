"""What a training run needs before its first step: tokenizer, token stores, model.

Owns reading a recipe's model and data keys, and refusing what cannot work.   model = get_model(config, tokenizer)

Leaves out the loop and everything written into the run folder.
"""

import difflib
import hashlib
import importlib.util
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.progress import Progress, TextColumn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import model as ours  # noqa: F401  registers llmkit with the Auto classes
from ..config import UserError
from ..data.encode import NAME
from ..data.loader import Loader, Rows
from ..data.shards import Store, build_store, open_store
from ..data.sources import Source, describe, documents, eval_shard_names, source_fingerprint
from ..data.tokenizer import bos_id, fingerprint, load_tokenizer, save_tokenizer, train_tokenizer
from ..evaluate.in_training import TaskScorer
from ..hardware import Device
from ..run import Run, resolve_model_dir, written_beside
from ..verbs import PretrainConfig
from .best import Best
from .engines import Engine

BPE_SAMPLE_CHARACTERS = 50_000_000  # taken from all sources in turn, document by document


@dataclass
class Job:
    """Everything the loop needs, built once by `pretrain.main`."""

    config: PretrainConfig
    device: Device
    engine: Engine
    console: Console
    run: Run
    tokenizer: PreTrainedTokenizerBase
    loader: Loader
    shards: dict[str, Rows]
    max_steps: int
    flops_per_token: float
    can_isolate: bool
    identity: dict[str, Any]
    started: float
    scorer: TaskScorer | None = None
    best: Best | None = None


# keys, what their value must be, how to say it
BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "max_length per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps "
        "eval_steps save_steps save_total_limit sample_max_new_tokens ngram_order lora_r lora_alpha overfit "
        "eval_tasks_limit",
        lambda v: v >= 1,
        "1 or more",
    ),
    (
        "learning_rate muon_learning_rate weight_decay warmup_steps max_grad_norm max_steps num_train_epochs",
        lambda v: 0 <= v < math.inf,
        "0 or more",
    ),
    ("seed data_seed", lambda v: 0 <= v < 2**32, "0 to 4294967295"),
    ("adam_beta1 adam_beta2 muon_momentum lora_dropout", lambda v: 0 <= v < 1, "0 or more, below 1"),
    ("adam_epsilon", lambda v: v > 0, "above 0"),
]


# keys, when they count, why they do not otherwise
DEPENDENT: list[tuple[str, Callable[[PretrainConfig], bool], str]] = [
    ("eval_tasks_limit", lambda c: bool(c.eval_tasks), "without eval_tasks"),
    ("greater_is_better", lambda c: c.load_best_model_at_end, "without load_best_model_at_end: true"),
    ("model_type config_overrides", lambda c: not c.model_name_or_path, "with model_name_or_path"),
    ("tokenizer_type", lambda c: not c.model_name_or_path and not c.tokenizer_name, "with a given tokenizer"),
    ("lora_r lora_alpha lora_dropout lora_target_modules", lambda c: c.use_peft, "without use_peft: true"),
    ("muon_learning_rate muon_momentum", lambda c: c.optim == "muon", "without optim: muon"),
    ("document_isolation", lambda c: c.packing_strategy == "bos_bestfit", "with packing_strategy: contiguous"),
    ("save_total_limit", lambda c: c.save_steps is not None, "without save_steps"),
    ("num_train_epochs", lambda c: c.max_steps == 0, "with max_steps"),
    ("project run_name", lambda c: c.report_to != "none", "without report_to: trackio"),
    ("hub_model_id hub_private_repo license", lambda c: c.push_to_hub, "without push_to_hub: true"),
    ("trust_remote_code", lambda c: bool(c.model_name_or_path or c.tokenizer_name), "without a model or tokenizer"),
    (
        "vocab_size",
        lambda c: not c.model_name_or_path and not c.tokenizer_name and c.tokenizer_type == "bpe",
        "unless a BPE is trained",
    ),
]


def check_config(config: PretrainConfig) -> None:
    """Raises UserError for settings that conflict or would be ignored."""
    if not config.output_dir:
        raise UserError("output_dir is missing; name a run folder, e.g. --output_dir runs/my/pretrain")
    if not config.datasets:
        raise UserError(
            "datasets is missing; name training data, e.g. datasets: [{path: text, data_files: corpus.txt}]"
        )
    if config.overfit and len(config.datasets) > 1:
        raise UserError(f"overfit={config.overfit} takes rows of one training source; give one entry of datasets")
    if config.ngram_order and len(config.datasets) > 1:
        raise UserError(f"ngram_order={config.ngram_order} counts one training source; set it to null for a mixture")
    for keys, is_allowed, allowed in BOUNDS:
        for key in keys.split():
            value = getattr(config, key)
            if value is not None and not is_allowed(value):
                raise UserError(f"{key}={value}; allowed: {allowed}")
    for keys, is_used, needed in DEPENDENT:
        for key in keys.split():
            if not is_used(config) and getattr(config, key) != getattr(PretrainConfig(), key):
                raise UserError(f"{key}={getattr(config, key)!r} has no effect {needed}; remove it")
    for key, package in (("use_peft", "peft"), ("report_to", "trackio")):
        if getattr(config, key) not in (False, "none") and importlib.util.find_spec(package) is None:
            raise UserError(f"{key}={getattr(config, key)} needs {package}: `pip install {package}`")
    if not config.max_steps and config.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs={config.num_train_epochs}; allowed: above 0, or set max_steps")
    for key, value in config.lr_scheduler_kwargs.items():
        if key not in ("num_decay_steps", "min_lr_ratio"):
            raise UserError(f"lr_scheduler_kwargs: unknown key {key!r}; allowed: num_decay_steps, min_lr_ratio")
        if key == "num_decay_steps" and config.lr_scheduler_type != "warmup_stable_decay":
            raise UserError(f"lr_scheduler_kwargs.{key} has no effect with {config.lr_scheduler_type}; remove it")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise UserError(f"lr_scheduler_kwargs.{key}={value!r}; allowed: a number, 0 or more")
    for prompt in config.sample_prompts:
        if not isinstance(prompt, str):
            raise UserError(f"sample_prompts: {prompt!r} is {type(prompt).__name__}; allowed: text, in quotes")


def _training_texts(sources: list[Source], data_dir: Path, num_characters: float) -> Iterator[str]:
    """Documents of all sources in turn, until `num_characters` are reached."""
    for docs in itertools.zip_longest(*(documents(source, data_dir) for source in sources)):
        for doc in docs:
            if doc is not None:
                yield doc.text
                num_characters -= len(doc.text)
        if num_characters <= 0:
            return


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
    stores = [source.path for source in sources if is_store(source, data_dir)]
    if stores:
        raise UserError(f"path={stores[0]!r} holds tokens already: name their tokenizer with tokenizer_name")
    kind = "char" if config.tokenizer_type == "char" else f"bpe{config.vocab_size}"
    text_hash = hashlib.sha256("".join(source_fingerprint(source, data_dir) for source in sources).encode())
    folder = store_dir / f"tokenizer-{kind}-{config.packing_strategy}-{text_hash.hexdigest()[:12]}"
    if not folder.exists():
        most = math.inf if config.tokenizer_type == "char" else BPE_SAMPLE_CHARACTERS
        texts, opens_with_bos = _training_texts(sources, data_dir, most), config.packing_strategy == "bos_bestfit"
        tokenizer = train_tokenizer(config.tokenizer_type, texts, config.vocab_size, opens_with_bos)
        with written_beside(folder, exist_ok=True) as partial:
            save_tokenizer(tokenizer, partial)
    return load_tokenizer(str(folder))


def check_prompts(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a sample prompt that leaves no room to write in."""
    for prompt in config.sample_prompts:
        count = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if count + 1 >= config.max_length:
            raise UserError(f"sample_prompts: {prompt[:40]!r}... has {count} tokens, max_length is {config.max_length}")


def is_store(source: Source, data_dir: Path) -> bool:
    """A folder of tokens, made here or by datatrove. Raises UserError for keys that would have no effect on it."""
    folder = data_dir / source.path
    if not list(folder.glob("*.ds")):
        if folder.is_dir():
            raise UserError(
                f"path={source.path!r} is a folder without tokens; to read its files write "
                f"path: text|json|csv|parquet and data_files: {source.path}"
            )
        return False
    plain = Source(path=source.path, fraction=source.fraction, shard=source.shard)
    ignored = [field.name for field in fields(Source) if getattr(source, field.name) != getattr(plain, field.name)]
    if ignored:
        raise UserError(f"path={source.path!r} holds tokens already: {ignored[0]} has no effect on them; remove it")
    return True


def get_store(
    source: Source, data_dir: Path, store_dir: Path, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Store:
    """The tokenised corpus, from the cache when text and tokenizer are the same to the byte."""
    if is_store(source, data_dir):
        return open_store(data_dir / source.path, tokenizer)
    source_hash = source_fingerprint(source, data_dir)
    folder = store_dir / f"{source_hash[:12]}-{fingerprint(tokenizer)[:12]}"
    if (folder / NAME).exists():
        return open_store(folder, tokenizer)
    where = describe(source)
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} documents"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"tokenising {where}", total=None)
        return build_store(
            documents(source, data_dir), tokenizer, folder, source_hash, where, lambda n: progress.advance(task, n)
        )


def get_rows(
    config: PretrainConfig,
    sources: list[Source],
    eval_sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> tuple[list[Rows], dict[str, Rows]]:
    """Training rows of every source, and those of every validation shard by its name; stores are made or found."""
    data_dir, store_dir = folders(config)
    stores = [get_store(source, data_dir, store_dir, tokenizer, console) for source in [*sources, *eval_sources]]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = [Rows(store, config.max_length, config.packing_strategy, bos_id(tokenizer), pad) for store in stores]
    return rows[: len(sources)], dict(zip(eval_shard_names(eval_sources), rows[len(sources) :], strict=True))


def folders(config: PretrainConfig) -> tuple[Path, Path]:
    """data_dir and store_dir."""
    return Path(config.data_dir), Path(config.store_dir or Path(config.output_dir).parent / "data")


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the embedding has fewer rows than the tokenizer ids."""
    if rows < len(tokenizer):
        raise UserError(
            f"vocab_size={rows} of the model is smaller than the tokenizer's {len(tokenizer)} ids; "
            f"set config_overrides.vocab_size to {len(tokenizer)} or more, or leave it out"
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
    check_vocabulary(model.get_input_embeddings().num_embeddings, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and limit < config.max_length:
        raise UserError(
            f"max_length={config.max_length} exceeds the model's max_position_embeddings={limit}; lower the first"
        )
    if config.use_peft:
        model = _add_lora(model, config)
    if config.activation_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # its name in later versions
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@torch.no_grad()
def probe_attention(model: PreTrainedModel) -> tuple[bool, bool]:
    """Whether no token sees a later one, and whether documents packed by position_ids do not see each other.

    Two rows of two documents of four tokens each; changing the last token must leave all earlier logits alone, changing
    the first document those of the second. All weights are redrawn meanwhile, since zero projections would hide a leak.
    """
    was_training, weights = model.training, {name: p.clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise * 0.05 if p.ndim > 1 else 1 + 0.1 * noise)
    model.eval()
    size = min(model.get_input_embeddings().num_embeddings, 100)
    ids = torch.randint(size, (2, 8), generator=generator)
    last, first = ids.clone(), ids.clone()
    last[:, -1], first[:, :4] = (ids[:, -1] + 1) % size, (ids[:, :4] + 1) % size
    inputs = {"position_ids": torch.arange(8).remainder(4).expand(2, 8).contiguous(), "use_cache": False}
    logits, after_last, after_first = (model(input_ids=x, **inputs).logits for x in (ids, last, first))
    tolerance = 1e-4 * logits.std()
    is_causal = bool((logits - after_last)[:, :-1].abs().max() <= tolerance)
    is_isolated = bool((logits - after_first)[:, 4:].abs().max() <= tolerance)
    for name, p in model.named_parameters():
        p.copy_(weights[name])
    model.train(was_training)
    return is_causal, is_isolated


def check_attention(model: PreTrainedModel, config: PretrainConfig) -> bool:
    """Whether the model keeps packed documents apart; tried, not looked up.

    Raises UserError for a model that sees the future, or that cannot keep documents apart where that is asked for.
    """
    wants_isolation = config.packing_strategy == "bos_bestfit" and config.document_isolation
    if (config.attn_implementation or "").startswith("flash"):
        if wants_isolation:  # transformers reads packed position_ids there only for a batch of one row
            raise UserError(
                f"document_isolation=true does not work with attn_implementation={config.attn_implementation!r}; "
                "use sdpa or flex_attention, or set document_isolation to false"
            )
        return False  # needs a GPU, cannot be tried here
    kind = model.config.model_type
    try:
        is_causal, is_isolated = probe_attention(model)
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"model_type={kind!r} does not run as a causal LM here ({str(error).splitlines()[0]})"
        ) from None
    if not is_causal:
        raise UserError(f"model_type={kind!r}: tokens see later ones, so it is no causal LM; e.g. llmkit, qwen3, gpt2")
    if wants_isolation and not is_isolated:
        raise UserError(
            f"document_isolation=true: {kind} does not keep packed documents apart (it ignores position_ids); "
            "set document_isolation to false"
        )
    return is_isolated


def fresh_config(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of a model that starts from scratch. Raises UserError for a field that its architecture lacks."""
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
        return transformers.AutoConfig.for_model(config.model_type, **settings)
    except CONFIG_ERRORS as error:
        raise _bad_overrides(error) from None


CONFIG_ERRORS = (ArithmeticError, ImportError, RuntimeError, StrictDataclassError, TypeError, ValueError)


def _bad_overrides(error: Exception) -> UserError:
    return UserError(f"config_overrides: {' '.join(str(error.__cause__ or error).split())}")


def _fresh_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, attention: dict) -> PreTrainedModel:
    model_config = fresh_config(config, tokenizer)
    try:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, **attention)
    except CONFIG_ERRORS as error:
        raise _bad_overrides(error) from None
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _add_lora(model: PreTrainedModel, config: PretrainConfig) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model  # check_config has looked for it

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
    """FLOPs per token, forward and backward: 6 per matrix parameter (4 if frozen), attention 12 * layers * width * T.

    Embedding look-ups are free, the head is not; attention is counted in full although half of it is masked
    (Chowdhery et al. 2022, appendix B). Norms, softmax and the activation are left out.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    if head is not None and id(head.weight) in embeddings:
        matrices.append(head.weight)
    c = model.config
    heads = getattr(c, "num_attention_heads", None) or 0
    width = heads * (getattr(c, "head_dim", None) or (c.hidden_size // heads if heads else 0))
    per_matrix = sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices)
    return per_matrix + 12 * c.num_hidden_layers * width * context


VOLATILE = ("transformers_version", "_name_or_path", "dtype", "use_cache", "_attn_implementation", "architectures")


def _sample_hash(tokens: np.ndarray, num_blocks: int = 64, size: int = 4096) -> str:
    """Of blocks spread over the whole store: what changed it almost surely touched one, and 20 GB are not read."""
    starts = np.linspace(0, max(0, len(tokens) - size), num_blocks).astype(int)
    return hashlib.sha256(b"".join(tokens[start : start + size].tobytes() for start in starts)).hexdigest()


def identity(
    config: PretrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    fractions: list[float] | None,
) -> dict[str, Any]:
    """What must be the same when a run goes on, by names whose first word says whose it is; causes before effects."""
    names = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    stores = [rows.store for rows in loader.sources]
    same: dict[str, Any] = {f"dataset.{i}": store.fingerprint for i, store in enumerate(stores)}
    same |= {"tokenizer": fingerprint(tokenizer), "rows_per_step": loader.rows_per_step}
    same |= {f"dataset.{i}.tokens": [s.num_tokens, _sample_hash(s.tokens)] for i, s in enumerate(stores)}
    same |= {"dataset.fractions": fractions, "dataset.seed": loader.seed, "dataset.max_length": config.max_length}
    same |= {"dataset.packing_strategy": config.packing_strategy, "optimizer.optim": config.optim}
    same |= {f"model.{k}": v for k, v in sorted(model.config.to_dict().items()) if k not in VOLATILE}
    same["model.trainable"] = hashlib.sha256(repr(names).encode()).hexdigest()
    if config.use_peft:
        frozen = hashlib.sha256()
        for p in model.parameters():
            if not p.requires_grad:
                frozen.update(p.detach().numpy().tobytes())
        same |= {"model.frozen": frozen.hexdigest(), "model.lora_alpha": config.lora_alpha}
    return same


def check_disk(folder: Path, model: PreTrainedModel, config: PretrainConfig, steps_left: int) -> None:
    """Raises UserError when there is no room for model/ and the checkpoints that are kept, and one more on the way.

    Counted are weights and one number of optimiser state per weight: less than AdamW takes.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    num_saves = math.ceil(steps_left / config.save_steps) if config.save_steps else 0
    if config.save_total_limit and num_saves:
        num_kept = len(list((folder / "checkpoints").glob("step-*")))
        num_saves = max(1, min(num_saves, config.save_total_limit + 1 - num_kept))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed, free = weights + num_saves * (weights + trained), shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output_dir={str(folder)!r}: {free / 1e6:.0f} MB free, model and {num_saves} checkpoints take "
            f"{needed / 1e6:.0f} MB or more; make room, choose another output_dir or lower save_total_limit"
        )
