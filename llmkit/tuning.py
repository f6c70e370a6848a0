"""The keys of the verbs that tune a model: sft, dpo, kto, rrhf, grpo, reward.

Every key of the TRL config that a verb rides on works (PASSES_ON); written down here are those that the house reads
itself, or gives another default. `llmkit help VERB` shows them. Leaves out which of them go together.
"""

import dataclasses
import typing
from typing import Literal

from .config import option, required


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """What all of them have."""

    output_dir: str = required("run folder; must not hold another run")
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
        [], "training rows: list of {path, name, split, data_files, columns, fraction}; what a row must hold: below"
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
    # optimisation
    max_steps: int = option(0, "optimiser steps; 0: num_train_epochs decide")
    num_train_epochs: float = option(1.0, "passes over the rows when max_steps is 0")
    per_device_train_batch_size: int = option(8, "rows per process and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per step")
    optim: str = option("adamw_torch_fused", "any optimiser of TrainingArguments")
    learning_rate: float = option(1e-6, "peak rate; LoRA wants about ten times that of full training")
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
    eval_tasks: str | list = option([], "tasks of `llmkit eval` to ask at every evaluation too, e.g. [toyworld_recall]")
    eval_tasks_limit: int | None = option(100, "items of each of them; null: all")
    load_best_model_at_end: bool = option(False, "model/ is the best step by metric_for_best_model, not the last")
    metric_for_best_model: str | None = option(None, "a figure of the evaluations: stories_loss, toyworld_recall_acc")
    greater_is_better: bool | None = option(None, "of that figure; null: not for losses, else yes")
    per_device_eval_batch_size: int = option(16, "rows per forward pass of an evaluation")
    save_steps: int | None = option(None, "steps between checkpoints; null: none, model/ at the end")
    save_total_limit: int | None = option(None, "checkpoints kept; the oldest goes first")
    resume_from_checkpoint: bool | str | None = option(
        None, "true: go on from the newest good checkpoint of output_dir, or from its start; or a checkpoint's folder"
    )
    report_to: Literal["none", "trackio"] = option("none", "also log there")
    project: str = option("llmkit", "Trackio project")
    run_name: str | None = option(None, "Trackio run; null: the name of output_dir")
    # the Hub
    push_to_hub: bool = option(False, "publish the model after the run; write access is checked before step 1")
    hub_model_id: str | None = option(None, "with push_to_hub: repository on the Hub, e.g. ann/toy-sft")
    hub_private_repo: bool = option(True, "with push_to_hub: a new repository is private; false: public at the end")
    license: str | None = option(None, "with push_to_hub: licence of the model, e.g. apache-2.0; null: the parent's")
    # start
    skip_checks: bool = option(False, "start without the checks of tier 0 (seconds), or although one of them fails")
    check_ignore: list = option([], "[{check: NAME, reason: TEXT}]: a fail of that check becomes a warning")
    accelerate_config: str | None = option(None, "relaunch under accelerate with this config: a name or a path")
    num_processes: int | None = option(None, "relaunch under accelerate with so many processes")
    passed_on: dict = option({}, "further keys of TRL's config; written like the others, not inside this one")


@dataclasses.dataclass(frozen=True)
class SftConfig(TuningConfig):
    """Tune any causal LM on instructions (full, LoRA, QLoRA, DoRA): every key of TRL's SFTConfig works, these are ours.

    A row is a chat, a prompt with its completion, or text.
    llmkit sft recipe.yaml [--key value ...]
    """

    PASSES_ON: typing.ClassVar[str] = "SFTConfig"

    num_train_epochs: float = option(3.0, "passes over the rows when max_steps is 0")
    learning_rate: float = option(2e-5, "peak rate; LoRA wants about ten times that of full training")
    gradient_accumulation_steps: int = option(1, "forward passes per step; exact: divides by the tokens of all of them")
    # of sft alone
    overfit: int | None = option(
        None, "first of all: train on so many rows only, to no loss, and see every answer come back word for word"
    )
    packing: bool = option(False, "several rows in one, kept apart by position_ids")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = option("bfd", "bfd: best fit, whole rows")
    assistant_only_loss: bool | None = option(None, "train on every answer of a chat; null: on chats, yes")
    completion_only_loss: bool | None = option(None, "train on the completion only; null: on prompt/completion, yes")
    eval_answers: int = option(
        0, "rows of every shard answered greedily at the end, compared with theirs word for word"
    )
    max_new_tokens: int = option(256, "longest of those answers")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(TuningConfig):
    """What verbs on preferences have in common."""

    lora_dropout: float = option(0.0, "dropout on the LoRA input; counts with disable_dropout: false only")
    disable_dropout: bool = option(True, "no dropout in the model, so that it differs from the reference by training")
    eval_samples: int = option(4, "prompts of the first shard answered greedily at every evaluation, to be read")
    max_new_tokens: int = option(256, "longest of those answers")


@dataclasses.dataclass(frozen=True)
class DpoConfig(PreferenceConfig):
    """Tune on preference pairs (Rafailov et al. 2023): every key of TRL's DPOConfig works, these are ours.

    A row has a chosen and a rejected answer, and a prompt or the turns before.
    llmkit dpo recipe.yaml [--key value ...]
    """

    PASSES_ON: typing.ClassVar[str] = "DPOConfig"

    beta: float = option(0.1, "how far the model may go from the reference; smaller: farther")
    ref_model_name_or_path: str | None = option(None, "the reference; null: the model that training starts from")
    loss_type: str | list = option("sigmoid", "any of TRL's, or several of them, e.g. [sigmoid, sft]")
    loss_weights: list | None = option(None, "of several: what each is multiplied by; null: 1")


@dataclasses.dataclass(frozen=True)
class KtoConfig(PreferenceConfig):
    """Tune on answers marked good or bad (Ethayarajh et al. 2024): every key of TRL's KTOConfig works, these are ours.

    A row is a chat, or a prompt with its completion, and a label; or a preference pair, which makes two of them.
    llmkit kto recipe.yaml [--key value ...]
    """

    PASSES_ON: typing.ClassVar[str] = "KTOConfig"

    beta: float = option(0.1, "how far the model may go from the reference; smaller: farther")
    ref_model_name_or_path: str | None = option(None, "the reference; null: the model that training starts from")
    desirable_weight: float = option(1.0, "what the loss of good answers is multiplied by")
    undesirable_weight: float = option(1.0, "what the loss of bad answers is multiplied by")


@dataclasses.dataclass(frozen=True)
class RrhfConfig(PreferenceConfig):
    """Tune on ranked answers (RRHF, Yuan et al. 2023), on transformers' Trainer: its keys work, these are ours.

    A row has a prompt, several `completions` and their `scores`; or is a preference pair.
    llmkit rrhf recipe.yaml [--key value ...]
    """

    PASSES_ON: typing.ClassVar[str] = "TrainingArguments"

    learning_rate: float = option(1e-5, "peak rate; LoRA wants about ten times that of full training")
    rank_weight: float = option(1.0, "of the ranking loss, beside the likelihood of the best answer")


@dataclasses.dataclass(frozen=True)
class RewardConfig(TuningConfig):
    """Train a reward model on preference pairs (Bradley-Terry): every key of TRL's RewardConfig works, these are ours.

    model/ is a sequence classifier with one label; `llmkit grpo` takes its folder among reward_funcs.
    llmkit reward recipe.yaml [--key value ...]
    """

    PASSES_ON: typing.ClassVar[str] = "RewardConfig"

    learning_rate: float = option(1e-5, "peak rate; LoRA wants about ten times that of full training")
    lora_dropout: float = option(0.0, "dropout on the LoRA input; counts with disable_dropout: false only")
    disable_dropout: bool = option(True, "no dropout in the model")


@dataclasses.dataclass(frozen=True)
class GrpoConfig(TuningConfig):
    """Tune on rewards of the model's own answers (GRPO, Shao et al. 2024), watched for reward hacking.

    A row has a prompt, or a question, and the columns that its rewards read, such as `answer`.
    Every key of TRL's GRPOConfig works, also those of vLLM; these are ours.
    llmkit grpo recipe.yaml [--key value ...]
    """

    PASSES_ON: typing.ClassVar[str] = "GRPOConfig"

    lora_dropout: float = option(0.0, "dropout on the LoRA input; counts with disable_dropout: false only")
    disable_dropout: bool = option(False, "no dropout in the model")
    # rewards
    reward_funcs: list = option(
        [], "exact_answer, numeric_answer, contains_answer, {format: {pattern: ...}}, length, module:function, a model"
    )
    reward_weights: list | None = option(None, "what each is multiplied by; null: 1")
    # answers
    num_generations: int = option(8, "answers per prompt")
    max_completion_length: int = option(256, "tokens of an answer at most")
    temperature: float = option(1.0, "of sampling")
    beta: float = option(0.0, "weight of the KL penalty; 0: none, and the monitor measures the KL all the same")
    steps_per_generation: int | None = option(None, "forward passes per generation; null: gradient_accumulation_steps")
    num_iterations: int = option(1, "steps on the same answers")
    # the monitor
    gold_verifier: str | dict | None = option(
        None, "a reward that is never optimised, named like one of reward_funcs: what the answers are really worth"
    )
    gold_prompts: int = option(128, "held-out prompts of eval_datasets that the monitor asks at every evaluation")
    canary_datasets: list = option([], "raw text whose loss must not rise: list as eval_datasets; a shard each")
    stop_on_alarm: bool = option(False, "end the run, and save the model, at the first alarm of reward hacking")
