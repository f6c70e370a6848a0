"""Recipes: flat YAML in, a frozen dataclass out, nothing silently ignored.

Owns how a verb gets its settings. The keys are those of TrainingArguments, TRL and PEFT; ours are the rest.

    config = load(PretrainConfig, ["recipes/toy/pretrain.yaml", "--max_steps", "10", "seed=1"])

The command line wins over the recipe. Leaves out what a value means: the verb that uses it checks that.
"""

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line, exit code 2, no traceback."""


# keys that older versions of transformers and TRL used -> what to write today
RENAMED = {
    "torch_dtype": "bf16: true|false",
    "warmup_ratio": "warmup_steps (a number below 1 is a share of all steps)",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "seq_len": "max_length",
    "block_size": "max_length",
    "evaluation_strategy": "eval_steps",
    "eval_strategy": "eval_steps (null evaluates at the end only)",
    "save_strategy": "save_steps (null saves at the end only)",
    "logging_strategy": "logging_steps",
    "overwrite_output_dir": "output_dir (a run is never overwritten: choose another folder or remove it)",
    "no_cuda": "use_cpu",
    "gradient_checkpointing": "activation_checkpointing",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "logging_dir": "output_dir (metrics.jsonl lies there)",
    "packing": "packing_strategy",
    "tokenizer": "tokenizer_name",
    "tokenizer_name_or_path": "tokenizer_name",
    "dataset_name": "datasets (a list of {path, name, split, data_files})",
}


def required(text: str) -> Any:
    """A text that the user must give; the verb refuses an empty one."""
    return dataclasses.field(default="", metadata={"help": text, "required": True})


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help line; mutable defaults are copied."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Train a causal LM: ours, any `model_type` from a config, or an existing checkpoint (full or LoRA)."""

    output_dir: str = required("run folder; must not hold another run")
    overfit: int | None = option(
        None, "first of all: train on so many rows only, to no loss, and see every document come back word for word"
    )
    # model
    model_type: str = option("llmkit", "architecture to build from scratch: llmkit, qwen3, gpt2, ...")
    config_overrides: dict = option({}, "fields of that architecture's config, e.g. {hidden_size: 128}")
    model_name_or_path: str | None = option(None, "continue from this folder or Hub id instead of starting afresh")
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2, flex_attention; null: the default")
    trust_remote_code: bool = option(False, "run the code that comes with model_name_or_path")
    use_peft: bool = option(False, "train a LoRA adapter; model/ then holds the merged weights, adapter/ the adapter")
    lora_r: int = option(16, "LoRA rank")
    lora_alpha: int = option(32, "LoRA scale: the update is multiplied by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout on the LoRA input")
    lora_target_modules: str | list = option("all-linear", "modules that get an adapter")
    # tokenizer
    tokenizer_name: str | None = option(None, "folder or Hub id; null: the model's own, or train one on the data")
    tokenizer_type: Literal["bpe", "char"] = option("bpe", "what to train: byte-level BPE, or one id per character")
    vocab_size: int = option(1024, "ids of the BPE to train, special tokens included")
    # data
    datasets: list = option([], "training data: list of {path, name, split, data_files, columns, sample_by, fraction}")
    eval_datasets: list = option([], "validation shards: the same, each with a shard name `shard`")
    data_dir: str = option(".", "folder that relative data_files start from")
    store_dir: str | None = option(None, "folder of the token stores; null: `data` beside output_dir")
    max_length: int = option(256, "tokens in a row: the context trained on")
    packing_strategy: Literal["bos_bestfit", "contiguous"] = option(
        "bos_bestfit", "bos_bestfit: whole documents, each after a BOS; contiguous: one long stream, cut into rows"
    )
    document_isolation: bool = option(True, "bos_bestfit: attention stays inside a document")
    # optimisation
    max_steps: int = option(0, "optimiser steps; 0: num_train_epochs decide")
    num_train_epochs: float = option(1.0, "passes over the rows when max_steps is 0")
    per_device_train_batch_size: int = option(16, "rows per process and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per step; exact: divides by the tokens of all of them")
    optim: Literal["adamw_torch", "adamw_torch_fused", "muon"] = option(
        "adamw_torch_fused", "muon: Muon for the matrices inside the layers, AdamW for the rest"
    )
    learning_rate: float = option(3e-3, "peak rate of AdamW")
    muon_learning_rate: float = option(0.02, "peak rate of Muon")
    muon_momentum: float = option(0.95, "Nesterov momentum of Muon")
    weight_decay: float = option(0.1, "decoupled decay of matrices and embeddings; norms and biases get none")
    adam_beta1: float = option(0.9, "AdamW beta1")
    adam_beta2: float = option(0.95, "AdamW beta2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: never")
    lr_scheduler_type: Literal["warmup_stable_decay", "cosine", "linear", "constant"] = option(
        "warmup_stable_decay", "shape of the learning rate after warm-up"
    )
    lr_scheduler_kwargs: dict = option(
        {}, "num_decay_steps (warmup_stable_decay; below 1 a share of all steps, default 0.2), min_lr_ratio (default 0)"
    )
    warmup_steps: float = option(0.02, "steps of linear warm-up; below 1 a share of all steps")
    bf16: bool | None = option(None, "bfloat16 autocast; null: where the GPU has it")
    torch_compile: bool = option(False, "compile the model")
    activation_checkpointing: bool = option(False, "recompute activations in backward: less memory, a third more time")
    seed: int = option(0, "seed of the weights, of dropout and of sampling")
    data_seed: int | None = option(None, "seed of the row order; null: the same as seed")
    use_cpu: bool = option(False, "stay on the CPU even where there is an accelerator")
    # what is seen on the way
    logging_steps: int = option(10, "steps between lines of metrics.jsonl")
    eval_steps: int | None = option(None, "steps between evaluations on every shard; null: at the end only")
    eval_on_start: bool = option(False, "evaluate before the first step too")
    per_device_eval_batch_size: int = option(32, "rows per forward pass of an evaluation")
    ngram_order: int | None = option(None, "also score a count model with this many tokens of context on every shard")
    save_steps: int | None = option(None, "steps between checkpoints; null: none, model/ at the end")
    save_total_limit: int | None = option(None, "checkpoints kept; the oldest goes first")
    resume_from_checkpoint: bool | str | None = option(
        None, "true: go on from the newest good checkpoint of output_dir, or from its start; or a checkpoint's folder"
    )
    sample_prompts: list = option([""], "continued at every evaluation, shown and kept in metrics.jsonl")
    sample_max_new_tokens: int = option(64, "length of those samples")
    report_to: Literal["none", "trackio"] = option("none", "also log there")
    project: str = option("llmkit", "Trackio project")
    run_name: str | None = option(None, "Trackio run; null: the name of output_dir")
    # start
    skip_checks: bool = option(False, "start without the checks of tier 0 (seconds), or although one of them fails")
    check_ignore: list = option([], "[{check: NAME, reason: TEXT}]: a fail of that check becomes a warning")
    accelerate_config: str | None = option(None, "relaunch under accelerate with this config: a name or a path")
    num_processes: int | None = option(None, "relaunch under accelerate with so many processes")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Make token stores of text: read, clean, deduplicate, split, decontaminate, tokenise, report."""

    output_dir: str = required("corpus folder: a token store per shard, tokenizer/, report.html; must not hold another")
    # text
    datasets: list = option(
        [], "training text: list of {path, name, split, data_files, columns, sample_by}; with fraction, a store each"
    )
    eval_datasets: list = option([], "validation shards: the same, each with a shard name `shard`")
    benchmark_datasets: list = option([], "what must not be trained on, e.g. {path: json, data_files: gsm8k.jsonl}")
    data_dir: str = option(".", "folder that relative data_files start from")
    max_bad_rows: int = option(0, "rows that cannot be read or hold no text: so many are counted and left out")
    max_doc_bytes: int = option(64 << 20, "longest document in bytes; a longer one is a bad row")
    # cleaning; what is not asked for is only reported
    fix_encoding: bool = option(False, "mend mojibake and lone surrogates as ftfy suggests, and count it")
    filters: list = option(
        [], "gopher_quality, gopher_repetition, c4_quality, fineweb_quality; or NAME: {option: value}"
    )
    exact_dedup: bool = option(True, "of documents with the same normalised text keep the first")
    near_dedup: bool = option(True, "of documents with nearly the same words keep the first (MinHash, then measured)")
    near_dedup_threshold: float = option(0.8, "Jaccard index of the words from which documents are near duplicates")
    test_split_size: float = option(0.0, "share of the documents held out as the shard `validation`")
    decontaminate: bool = option(True, "no training document holds a validation or benchmark text, or 13 words of it")
    # tokens
    tokenizer_name: str | None = option(None, "folder or Hub id; null: train one on the training text")
    tokenizer_type: Literal["bpe", "char"] = option("bpe", "what to train: byte-level BPE, or one id per character")
    vocab_size: int = option(32768, "ids of the BPE to train, special tokens included")
    trust_remote_code: bool = option(False, "run the code that comes with tokenizer_name")
    max_length: int | None = option(None, "also plan the rows of this context and report how full they are")
    packing_strategy: Literal["bos_bestfit", "contiguous"] = option("bos_bestfit", "how training will pack documents")
    seed: int = option(0, "decides which documents are held out")
    # where it runs
    engine: Literal["local", "slurm", "ray"] = option("local", "this machine's cores, or a cluster through datatrove")
    num_workers: int | None = option(None, "tasks at a time; null: all cores (a cluster: no limit)")
    engine_kwargs: dict = option({}, "of datatrove's executor: partition, time, cpus_per_task, venv_path, ...")
    dry_run: bool = option(False, "slurm and ray: show what would be submitted, and end")
    keep_work: bool = option(False, "keep the cleaned text and every decision about it in output_dir/work")


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Tune any causal LM on instructions (full, LoRA, QLoRA, DoRA): every key of TRL's SFTConfig works, these are ours.

    llmkit sft recipe.yaml [--key value ...]
    """

    PASSES_ON: typing.ClassVar[str] = "SFTConfig"

    output_dir: str = required("run folder; must not hold another run")
    overfit: int | None = option(
        None, "first of all: train on so many rows only, to no loss, and see every answer come back word for word"
    )
    # model
    model_name_or_path: str = required("run folder, model folder or Hub id to start from")
    model_revision: str = option("main", "branch, tag or commit of a Hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "of the weights; auto: as stored. Whole models train in float32, with bf16 autocast where there is"
    )
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2, flex_attention; null: the default")
    trust_remote_code: bool = option(False, "run the code that comes with model_name_or_path")
    # PEFT
    use_peft: bool = option(False, "train a LoRA adapter; adapter/ holds it, model/ the merged weights")
    lora_r: int = option(16, "LoRA rank")
    lora_alpha: int = option(32, "LoRA scale: the update is multiplied by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout on the LoRA input")
    lora_target_modules: str | list = option("all-linear", "modules that get an adapter")
    lora_modules_to_save: list | None = option(
        None, "modules trained in full and saved with the adapter, e.g. [lm_head]"
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(lora_r) instead (Kalajdzievski 2023)")
    use_dora: bool = option(False, "train magnitude and direction apart (DoRA, Liu et al. 2024)")
    load_in_4bit: bool = option(False, "QLoRA: the base in 4 bit (bitsandbytes; works on CPUs too)")
    load_in_8bit: bool = option(False, "the base in 8 bit, the same")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit number format")
    use_bnb_nested_quant: bool = option(False, "quantise the scales too")
    # data
    datasets: list = option(
        [], "training rows: list of {path, name, split, data_files, columns, format, fraction}; text, chat or pairs"
    )
    eval_datasets: list = option([], "validation shards: the same, each with a shard name `shard`")
    data_dir: str = option(".", "folder that relative data_files start from")
    test_split_size: float = option(0.0, "share of the training rows held out as the shard `validation`, by data_seed")
    max_bad_rows: int = option(0, "rows that cannot be trained on: so many are counted and left out")
    chat_template_path: str | None = option(
        None, "a .jinja file, or `chatml`; null: the tokenizer's own, or ChatML where it has none"
    )
    eos_token: str | None = option(None, "token that ends an answer; null: the template's own end of turn")
    max_length: int = option(1024, "tokens in a row; a longer row is a bad row, since its answer would be cut")
    packing: bool = option(False, "several rows in one, kept apart by position_ids")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = option("bfd", "bfd: best fit, whole rows")
    assistant_only_loss: bool | None = option(None, "train on every answer of a chat; null: on chats, yes")
    completion_only_loss: bool | None = option(None, "train on the completion only; null: on prompt/completion, yes")
    # optimisation
    max_steps: int = option(0, "optimiser steps; 0: num_train_epochs decide")
    num_train_epochs: float = option(3.0, "passes over the rows when max_steps is 0")
    per_device_train_batch_size: int = option(8, "rows per process and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per step; exact: divides by the tokens of all of them")
    optim: str = option("adamw_torch_fused", "any optimiser of TrainingArguments")
    learning_rate: float = option(2e-5, "peak rate; LoRA wants about ten times that of full training")
    weight_decay: float = option(0.0, "decoupled decay of matrices and embeddings; norms and biases get none")
    adam_beta1: float = option(0.9, "AdamW beta1")
    adam_beta2: float = option(0.999, "AdamW beta2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: never")
    lr_scheduler_type: str = option("linear", "any schedule of TrainingArguments: linear, cosine, constant, ...")
    lr_scheduler_kwargs: dict = option({}, "settings of that schedule")
    warmup_steps: float = option(0.03, "steps of linear warm-up; below 1 a share of all steps")
    bf16: bool | None = option(None, "bfloat16 autocast; null: where the GPU has it")
    gradient_checkpointing: bool | None = option(
        None, "recompute activations in backward: less memory, a third more time; null: on a GPU, yes"
    )
    seed: int = option(0, "seed of new weights, of dropout and of sampling")
    data_seed: int | None = option(None, "seed of splits and of the row order; null: the same as seed")
    use_cpu: bool = option(False, "stay on the CPU even where there is an accelerator")
    # what is seen on the way
    logging_steps: int = option(10, "steps between lines of metrics.jsonl")
    eval_steps: int | None = option(None, "steps between evaluations on every shard; null: at the end only")
    eval_on_start: bool = option(False, "evaluate before the first step too")
    per_device_eval_batch_size: int = option(16, "rows per forward pass of an evaluation")
    eval_answers: int = option(
        0, "rows of every shard answered greedily at the end, compared with theirs word for word"
    )
    max_new_tokens: int = option(256, "longest of those answers")
    save_steps: int | None = option(None, "steps between checkpoints; null: none, model/ at the end")
    save_total_limit: int | None = option(None, "checkpoints kept; the oldest goes first")
    resume_from_checkpoint: bool | str | None = option(
        None, "true: go on from the newest good checkpoint of output_dir, or from its start; or a checkpoint's folder"
    )
    report_to: Literal["none", "trackio"] = option("none", "also log there")
    project: str = option("llmkit", "Trackio project")
    run_name: str | None = option(None, "Trackio run; null: the name of output_dir")
    # start
    skip_checks: bool = option(False, "start without the checks of tier 0 (seconds), or although one of them fails")
    check_ignore: list = option([], "[{check: NAME, reason: TEXT}]: a fail of that check becomes a warning")
    accelerate_config: str | None = option(None, "relaunch under accelerate with this config: a name or a path")
    num_processes: int | None = option(None, "relaunch under accelerate with so many processes")
    passed_on: dict = option({}, "further keys of TRL's SFTConfig; written like the others, not inside this one")


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Write adapter and base as one plain model, after checking that its logits are those of the adapted base.

    llmkit merge --model_name_or_path runs/my/sft --output_dir merged
    """

    model_name_or_path: str = required("adapter folder, or the run folder that holds it")
    output_dir: str = required("folder to write; must not exist")
    base_model_name_or_path: str | None = option(None, "the base; null: the one that the adapter names")
    dequantize: bool = option(
        False, "the adapter was trained on a quantised base: merge it into the full-precision weights all the same"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of the merged weights; auto: the base's")
    trust_remote_code: bool = option(False, "run the code that comes with the base")
    use_cpu: bool = option(False, "stay on the CPU even where there is an accelerator")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt; the text streams as it is written."""

    model_name_or_path: str = required("run folder, model folder or Hub id")
    prompt: str = option("", "text to continue; empty: start a document")
    max_new_tokens: int = option(128, "longest continuation")
    temperature: float = option(1.0, "0: greedy")
    top_k: int | None = option(None, "sample among the k likeliest tokens only")
    top_p: float | None = option(None, "sample among the likeliest tokens of this total probability")
    seed: int = option(0, "the same seed writes the same text on the same machine")
    trust_remote_code: bool = option(False, "run the code that comes with the model")
    use_cpu: bool = option(False, "stay on the CPU even where there is an accelerator")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as a stock transformers folder that needs no code of ours."""

    model_name_or_path: str = required("run folder or model folder")
    to: str = option("qwen3", "qwen3, or llama for a model without QK-norm")
    output_dir: str = required("folder to write; must not exist")


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Find the silent bugs of a model, tokenizer, template, data set and trainer before the expensive run.

    llmkit check --model_name_or_path DIR [--dataset rows.jsonl] [--chat]   a model folder or Hub id
    llmkit check recipe.yaml [--key value ...]                              what a recipe would train
    llmkit check [flags] -- python sft.py ...                               the trainer of your own command
    """

    model_name_or_path: str | None = option(None, "model folder, run folder or Hub id")
    tokenizer_name: str | None = option(None, "tokenizer folder or Hub id; null: the model's own")
    dataset: str | None = option(None, "training rows: .jsonl, .json, .txt, .parquet, .csv or a Hub id, TRL's columns")
    eval_dataset: str | None = option(None, "held-out rows, the same")
    peft_adapter: str | None = option(None, "PEFT adapter folder that belongs to the model")
    reference: str | None = option(None, "folder it was made from: before a merge, export, resize or quantisation")
    max_length: int | None = option(None, "tokens a row is cut to in training")
    chat: bool = option(False, "the chat template is in use: check it, also without a data set")
    trust_remote_code: bool = option(False, "run the code that comes with the model")
    tier: int = option(2, "0 files only, 1 and rows, 2 and a shrunk model, 3 and every stored tensor")
    only: str | None = option(None, "these checks or families only, comma-separated")
    skip: str | None = option(None, "not these")
    check_ignore: list = option([], "[{check: NAME, reason: TEXT}]: a fail of that check becomes a warning")
    list: bool = option(False, "show every check and end")
    explain: str | None = option(None, "a check's symptom, example, fix and sources, and end")
    demo: str | None = option(
        None, "plant that bug in a tiny model, offline, and show it being caught; `list` names them"
    )
    json: str | None = option(None, "write the results there")
    html: str | None = option(None, "write a page for people there")
    format: Literal["text", "github", "junit"] = option("text", "text; github: workflow annotations; junit: XML")
    redact: bool = option(False, "token ids instead of text in every output")


@dataclasses.dataclass(frozen=True)
class TokenizerTrainConfig:
    """Train a byte-level BPE or char-level tokenizer on your text, and check it.

    llmkit tokenizer train recipe.yaml [--key value ...]
    """

    output_dir: str = required("folder of the tokenizer; must not exist")
    tokenizer_type: Literal["bpe", "char"] = option("bpe", "byte-level BPE, or one id per character")
    vocab_size: int = option(1024, "ids of the BPE, special tokens included")
    special_tokens: list = option([], "more control tokens, one id each, e.g. [<|tool|>]")
    chat_tokens: list = option(["<|im_start|>", "<|im_end|>"], "control tokens of the chat template; [] for none")
    chat_template_path: str | None = option(None, "chat template to save with it: a .jinja file")
    add_bos_token: bool = option(True, "tokenizer(text) opens with BOS, as rows of packing_strategy: bos_bestfit do")
    # data
    datasets: list = option([], "training text: list of {path, name, split, data_files, columns, sample_by, fraction}")
    data_dir: str = option(".", "folder that relative data_files start from")
    max_train_bytes: int = option(200_000_000, "text a BPE is trained on at most, shared between the data sets")
    # the checks at the end: as in `llmkit tokenizer check`
    max_check_bytes: int = option(20_000_000, "text of each data set that is encoded at most")
    check_ignore: list = option([], "[{check: NAME, reason: TEXT}]: a fail of that check becomes a warning")
    json: str | None = option(None, "write results and figures there")
    html: str | None = option(None, "write a page for people there")
    plot: str | None = option(None, "write the rank-frequency plot there, a .png")
    redact: bool = option(False, "token ids instead of text in every output")


@dataclasses.dataclass(frozen=True)
class TokenizerCheckConfig:
    """Check any tokenizer: round trips, BOS and EOS, control tokens, storage, reloading; and how it suits your text.

    llmkit tokenizer check --tokenizer_name DIR_OR_HUB_ID [--dataset rows.jsonl] [--key value ...]
    llmkit tokenizer check recipe.yaml [--key value ...]
    """

    tokenizer_name: str = required("tokenizer folder, run folder or Hub id")
    trust_remote_code: bool = option(False, "run the code that comes with the tokenizer")
    # data
    dataset: str | None = option(None, "one shard: .txt, .jsonl, .json, .parquet, .csv or a Hub id, TRL's columns")
    datasets: list = option([], "several: list of {path, name, split, data_files, columns, sample_by, shard}")
    data_dir: str = option(".", "folder that relative data_files start from")
    max_check_bytes: int = option(20_000_000, "text of each data set that is encoded at most")
    # what is done with the result
    check_ignore: list = option([], "[{check: NAME, reason: TEXT}]: a fail of that check becomes a warning")
    json: str | None = option(None, "write results and figures there")
    html: str | None = option(None, "write a page for people there")
    plot: str | None = option(None, "write the rank-frequency plot there, a .png")
    redact: bool = option(False, "token ids instead of text in every output")


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Show what the model will really see: rows as the trainer's own loader makes them, token by token, trained or not.

    llmkit inspect recipe.yaml [--key value ...]                        what a recipe would train on
    llmkit inspect [flags] -- python sft.py ...                         what the trainer of your own command would
    llmkit inspect --tokenizer_name DIR --dataset rows.jsonl [flags]    rows as TRL's SFT makes them
    """

    num_rows: int = option(5, "rows to show; the totals count 1,000 rows or a million tokens")
    step: int = option(0, "optimiser step to begin at")
    tokenizer_name: str | None = option(None, "with dataset: tokenizer or model folder, or Hub id")
    dataset: str | None = option(None, "rows: .jsonl, .json, .txt, .parquet, .csv or a Hub id, in TRL's columns")
    max_length: int | None = option(None, "with dataset: tokens a row is cut to")
    json: str | None = option(None, "write the rows and totals there")
    html: str | None = option(None, "write a page for people there")
    redact: bool = option(False, "token ids instead of text in every output")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or mapping as a key: PyYAML refuses it
            if key_node.value in seen:
                raise UserError(
                    f"key {key_node.value!r} is given twice (line {key_node.start_mark.line + 1}); keep one"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text "1e-3", which `_Loader` would read as a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )

T = TypeVar("T")


def read_recipe(path: Path) -> dict:
    """The keys of a recipe; raises UserError naming file and line when it is not flat YAML."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; `ls recipes/*/` lists the ones that come with llmkit") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a YAML recipe") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}:{where} is not valid YAML ({getattr(error, 'problem', error)}); mend that line"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, expected `key: value` lines")
    return values


def _allowed(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_allowed(arg) for arg in typing.get_args(hint))
    return "null" if hint is type(None) else hint.__name__


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _unknown(key: str, known: list[str], verb: str) -> str:
    if key in RENAMED:
        return f"key {key!r} has another name here; write {RENAMED[key]}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"nearest: {near[0]!r}" if near else f"`llmkit help {verb}` lists all keys"
    try:  # only on the way to an error: seconds of import
        from transformers import TrainingArguments

        if key in {field.name for field in dataclasses.fields(TrainingArguments)}:
            return (
                f"key {key!r} is one of TrainingArguments that `llmkit {verb}` does not implement; remove it ({hint})"
            )
    except ImportError:
        pass
    return f"unknown key {key!r}; {hint}"


# keys of TRL's configs that the house decides -> what to write instead
NOT_PASSED_ON = {
    "deepspeed": "accelerate_config: zero2",
    "fsdp": "accelerate_config: fsdp2",
    "fsdp_config": "accelerate_config: fsdp2",
    "parallelism_config": "accelerate_config",
    "accelerator_config": "accelerate_config",
    "push_to_hub": "nothing: a model is published once it was evaluated",
    "disable_tqdm": "nothing: the bar is ours",
    "gradient_checkpointing_kwargs": "nothing: use_reentrant=False is set",
    "model_init_kwargs": "dtype, attn_implementation and model_revision as keys of their own",
    "pad_token": "nothing: the tokenizer's own, or its end-of-text token",
    "dataset_kwargs": "nothing: rows are prepared here",
    "fp16": "bf16: true, or null",
    "truncation_mode": "nothing: rows are never cut",
    "dataset_text_field": "datasets.0.columns: {yours: text}",
    "shuffle_dataset": "nothing: rows are shuffled anew in every epoch, by data_seed",
    "eval_packing": "packing",
    "padding_free": "packing: true",
    "load_best_model_at_end": "nothing: model/ is the last step, checkpoints/ has the others",
    "remove_unused_columns": "nothing",
    "do_train": "nothing",
    "do_eval": "eval_datasets",
}


def _passed_on_hint(cls: Any, key: str) -> Any:
    """The type of a further key of the TRL config that the verb rides on, None where there is no such key.

    Raises UserError for one that the house decides.
    """
    if not hasattr(cls, "PASSES_ON"):
        return None
    if key in NOT_PASSED_ON or key.startswith("hub_"):
        raise UserError(f"key {key!r} of TRL is not used here; write {NOT_PASSED_ON.get(key, 'nothing')}")
    try:  # only for such a key: seconds of import
        import trl
    except ImportError:
        return None
    theirs = getattr(trl, cls.PASSES_ON)
    names = {field.name for field in dataclasses.fields(theirs)}
    return typing.get_type_hints(theirs)[key] if key in names else None


def _fits_theirs(value: Any, hint: Any) -> bool:
    try:
        return _fits(value, hint)
    except TypeError:  # dict[str, Any] and the like: TRL looks at those itself
        return True


def parse_args(argv: list[str]) -> tuple[Path | None, dict[str, str]]:
    """Splits the words after the verb into a recipe and raw overrides: `--key value`, `--key=value`, `key=value`."""
    recipe: str | None = None
    raw: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                has_value = bool(words) and not words[0].startswith("--")
                value = words.pop(0) if has_value else "true"
        elif "=" in word and not (word.endswith((".yaml", ".yml")) and Path(word).is_file()):
            key, _, value = word.partition("=")
        elif recipe is None:
            recipe = word
            continue
        else:
            raise UserError(f"unexpected word {word!r} after {recipe!r}; write options as --key value")
        key = key.replace("-", "_")
        if key == "config":
            if recipe is not None:
                raise UserError(f"two recipes, {recipe!r} and {value!r}; give one")
            recipe = value
        elif key in raw:
            raise UserError(f"--{key} is given twice; keep one")
        else:
            raw[key] = value
    return (Path(recipe) if recipe else None), raw


def _set_nested(values: dict, path: list[str], value: Any, key: str) -> None:
    """`config_overrides.hidden_size=64` and `datasets.0.path=x` reach into a mapping or a list."""
    target: Any = values
    for name, deeper in zip(path, [*path[1:], None], strict=True):
        index: Any = int(name) if isinstance(target, list) and name.isdigit() else name
        if isinstance(target, list) and (not isinstance(index, int) or index >= len(target)):
            raise UserError(f"--{key}: {name!r} is no item of a list of {len(target)}; count from 0")
        if deeper is None:
            target[index] = value
        else:
            if isinstance(target, dict):
                target.setdefault(index, {})
            target = target[index]
            if not isinstance(target, (dict, list)):
                raise UserError(f"--{key}: {name!r} holds {target!r}, which has no part {deeper!r}")


def load(cls: type[T], argv: list[str], verb: str = "pretrain") -> T:
    """The verb's config from recipe and command line; raises UserError for anything unknown or of a wrong type."""
    recipe, raw = parse_args(argv)
    values = read_recipe(recipe) if recipe else {}
    origin = dict.fromkeys(values, str(recipe))
    every = typing.get_type_hints(cls)
    hints = {field.name: every[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    passed_on = dict(values.get("passed_on") or {})
    for key, text in raw.items():
        head, *rest = key.split(".")
        try:
            value = yaml.load(text, Loader=_Loader)
        except UserError as error:
            raise UserError(f"--{key}: {error}") from None
        except (yaml.YAMLError, ValueError):
            value = text
        if rest:
            values.setdefault(head, {})
            _set_nested(values, [head, *rest], value, key)
        else:  # a prompt "123" or "yes" stays text where the key takes text
            values[head] = (
                text if head in hints and not _fits(value, hints[head]) and _fits(text, hints[head]) else value
            )
        origin[head] = f"--{key}"
    for key, value in list(values.items()):
        if key not in hints and (theirs := _passed_on_hint(cls, str(key))) is not None:
            if not _fits_theirs(value, theirs):
                raise UserError(f"{origin[key]}: {key}={value!r} is {type(value).__name__}; allowed: {theirs}")
            passed_on[key] = values.pop(key)
            continue
        if key not in hints:
            raise UserError(f"{origin[key]}: {_unknown(str(key), list(hints), verb)}")
        if not _fits(value, hints[key]):
            raise UserError(
                f"{origin[key]}: {key}={value!r} is {type(value).__name__}; allowed: {_allowed(hints[key])}"
            )
        if isinstance(value, int) and _fits(value, float) and hints[key] is float:
            values[key] = float(value)
    if passed_on:
        values["passed_on"] = passed_on
    return cls(**values)


def dump(config: Any) -> str:
    """The config as a recipe that runs again as it is; keys in the order of the dataclass."""
    values = dataclasses.asdict(config)
    values |= values.pop("passed_on", {})
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def describe(cls: type) -> str:
    """One line per key: name, allowed values, default, meaning."""
    hints = typing.get_type_hints(cls)
    fields = [(f, _allowed(hints[f.name])) for f in dataclasses.fields(cls) if f.name != "passed_on"]
    lines = []
    for field, allowed in fields:
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        shown = "default " + yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        shown = "required" if "required" in field.metadata else shown
        lines.append(f"  {field.name:<28} {field.metadata['help']}\n  {'':<28} [{allowed}; {shown}]")
    return "\n".join(lines)
