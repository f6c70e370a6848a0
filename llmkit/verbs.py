"""The keys of every verb: their names, types, defaults and what they mean.

A class a verb; the keys are those of TrainingArguments, TRL and PEFT, ours are the rest. `llmkit help VERB` shows them.
Leaves out how they are read (`config.py`), and which of them go together: the verb checks that.
"""

import dataclasses
import typing
from typing import Literal

from .config import option, required


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
    eval_tasks: str | list = option([], "tasks of `llmkit eval` to ask at every evaluation too, e.g. [toyworld_recall]")
    eval_tasks_limit: int | None = option(100, "items of each of them; null: all")
    load_best_model_at_end: bool = option(False, "model/ is the best step by metric_for_best_model, not the last")
    metric_for_best_model: str | None = option(None, "a figure of the evaluations: stories_loss, toyworld_recall_acc")
    greater_is_better: bool | None = option(None, "of that figure; null: not for losses, else yes")
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
class EvalConfig:
    """Compare models side by side: tasks of lm-eval, perplexity of raw text, regression prompts; paired, item by item.

    llmkit eval RUN|DIR|HUB_ID ... [--tasks gsm8k,hellaswag] [--key value ...]
    llmkit eval recipe.yaml RUN|DIR|HUB_ID ... [--key value ...]
    """

    WORDS: typing.ClassVar[str] = "models"

    models: list = option([], "run folders, model folders or Hub ids, a column each: parents first")
    output_dir: str = option("runs/eval", "what was found, per item; an evaluation that was cut short goes on there")
    # tasks
    tasks: str | list = option([], "lm-eval's names (tasks, groups, tags), ours, or the sets core, full, toyworld")
    data_dir: str | None = option(None, "folder with local data of stock tasks, as TASK_test.jsonl; null: the Hub")
    include_path: str | None = option(None, "folder with task definitions of your own (.yaml)")
    num_fewshot: int | None = option(None, "examples before the question; null: as the task says")
    limit: int | None = option(None, "items of each task, for a first look; the figures are then of those alone")
    gen_kwargs: dict = option({}, "generation settings over the task's own, e.g. {max_gen_toks: 128}")
    allow_code_execution: bool = option(False, "run what the model wrote (humaneval), shut off from this machine")
    # how the models are asked
    apply_chat_template: bool | None = option(
        None, "null: tasks that generate are asked as chats where every model can be; true: all tasks; false: none"
    )
    system_instruction: str | None = option(None, "system prompt of every question")
    # raw text
    eval_datasets: list = option([], "raw text: list of {path, data_files, ..., shard}; none: that of the runs")
    window: int | None = option(None, "tokens of context in perplexity; null: the smallest context among the models")
    # regression prompts
    regression: str | None = option(None, "a regression.yaml: prompts with what their answers must be")
    accept: bool = option(False, "record today's answers to the regression prompts as the right ones")
    # how it runs
    batch_size: int = option(16, "rows per forward pass")
    max_length: int | None = option(None, "tokens of context; null: what the model has")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of the weights; auto: as stored")
    trust_remote_code: bool = option(False, "run the code that comes with a model")
    use_cpu: bool = option(False, "stay on the CPU even where there is an accelerator")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Every stage on one page: what each gained and lost against its parent, curves, alarms, and where it came from.

    llmkit report RUN ... [--html report.html] [--json report.json] [--fail_on_regression]
    """

    WORDS: typing.ClassVar[str] = "runs"

    runs: list = option([], "run folders, eval folders, or a folder that holds some: runs/toy")
    html: str | None = option(None, "page to write; null: report.html in the folder that all of them share")
    json: str | None = option(None, "write the figures there")
    fail_on_regression: bool = option(
        False,
        "exit 1 where a stage lost more than the noise against its parent, or a regression prompt fails or has changed",
    )


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt, or every prompt of a file; the text streams as it is written.

    llmkit generate --model_name_or_path RUN|DIR|HUB_ID [--prompt TEXT] [--key value ...]
    """

    model_name_or_path: str = required("run folder, model folder, adapter folder or Hub id")
    # what is continued
    prompt: str = option("", "text to continue; empty: start a document")
    prompts_file: str | None = option(
        None, "many: .txt, a prompt a line; .jsonl, {prompt: text} or {messages: [...]} a line"
    )
    output_file: str | None = option(None, "with prompts_file: the .jsonl to write; null: the console alone")
    apply_chat_template: bool = option(False, "the prompt is what a user says: asked in the chat template")
    system_instruction: str | None = option(None, "with apply_chat_template: the system prompt")
    # how; the names are those of GenerationConfig
    max_new_tokens: int = option(128, "longest continuation")
    temperature: float = option(1.0, "0: greedy")
    top_k: int | None = option(None, "sample among the k likeliest tokens only")
    top_p: float | None = option(None, "sample among the likeliest tokens of this total probability")
    min_p: float | None = option(None, "sample among tokens at least this likely, relative to the likeliest")
    repetition_penalty: float = option(1.0, "above 1: tokens that are there already become less likely")
    num_beams: int = option(1, "beams of a beam search; 1: none")
    stop_strings: list = option([], "texts that end a continuation; they are kept")
    seed: int = option(0, "the same seed writes the same text on the same machine")
    batch_size: int = option(8, "with prompts_file: prompts at a time")
    # how it runs
    show_probs: bool = option(False, "colour every token by its probability")
    decoder: Literal["auto", "lean", "transformers"] = option(
        "auto", "lean: our own loop for our own model on a CPU, token for token the same; auto: wherever it can"
    )
    trust_remote_code: bool = option(False, "run the code that comes with the model")
    use_cpu: bool = option(False, "stay on the CPU even where there is an accelerator")


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Write a model in 8 or 4 bit with bitsandbytes, and measure at once what that cost.

    llmkit quantize --model_name_or_path RUN|DIR --output_dir DIR --load_in_4bit [--key value ...]
    """

    model_name_or_path: str = required("run folder, model folder, adapter folder or Hub id")
    output_dir: str = required("run folder; must not hold another run")
    # how; the names are those of TRL's ModelConfig and BitsAndBytesConfig
    load_in_8bit: bool = option(False, "8 bit (LLM.int8)")
    load_in_4bit: bool = option(False, "4 bit")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "of load_in_4bit")
    use_bnb_nested_quant: bool = option(False, "of load_in_4bit: the scales are quantised too (double quantisation)")
    llm_int8_skip_modules: list = option(
        [], "ends of names of layers that stay as they are, besides embeddings, head and what 4 bit cannot hold"
    )
    # what it cost
    eval_datasets: list = option(
        [], "raw text: list of {path, data_files, ..., shard}; none: what the run it comes from was validated on"
    )
    data_dir: str = option(".", "folder that relative data_files start from")
    window: int | None = option(None, "tokens of context of raw text; null: as the runs were trained, at most 1024")
    eval_tasks: str | list = option([], "tasks of `llmkit eval` to ask before and after, e.g. [toyworld_answers]")
    eval_tasks_limit: int | None = option(None, "items of each of them; null: all")
    max_perplexity_ratio: float | None = option(
        None, "quantised to original, a fail above it; null: 1.01 for 8 bit, 1.05 for 4 bit"
    )
    batch_size: int = option(16, "rows per forward pass")
    trust_remote_code: bool = option(False, "run the code that comes with the model")
    use_cpu: bool = option(False, "stay on the CPU even where there is an accelerator")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a trained model for other engines: a stock transformers folder, or GGUF with an Ollama Modelfile.

    llmkit export --model_name_or_path RUN|DIR --to qwen3|llama|gguf --output_dir DIR
    """

    model_name_or_path: str = required("run folder, model folder, or adapter folder, which is merged")
    to: str = option("qwen3", "qwen3; llama for a model without QK-norm; gguf for llama.cpp, Ollama, LM Studio")
    output_dir: str = required("folder to write; must not exist")
    outtype: Literal["f32", "f16", "q8_0"] | None = option(
        None, "with to=gguf: numbers of the matrices, in llama.cpp's words; null: f16"
    )
    llama_cpp_dir: str | None = option(
        None, "with to=gguf: a checkout of llama.cpp, whose converter takes models that are not ours"
    )
    trust_remote_code: bool = option(False, "run the code that comes with the model")


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """Publish a model on the Hub with a card made of its run; without --dry_run false only say what would go.

    llmkit push --model_name_or_path RUN|DIR --hub_model_id NAME/MODEL [--dry_run false]
    """

    model_name_or_path: str = required("run folder, model folder, adapter folder or folder of an export")
    hub_model_id: str = required("repository on the Hub, e.g. ann/toy-sft")
    output_dir: str = option("runs/push", "the card, and push.json: what goes, what became of it")
    dry_run: bool = option(True, "say what would go, send nothing")
    hub_private_repo: bool = option(True, "a new repository is private; false publishes it once all of it is there")
    update: bool = option(False, "the repository is there already: replace what is in it")
    variants: list = option([], "folders that go along, each into a folder of its name: quantised, adapters, GGUF")
    # the card
    license: str | None = option(None, "e.g. apache-2.0; null: the parent's")
    license_name: str | None = option(None, "with license=other: what it is called")
    license_link: str | None = option(None, "with license=other: address of its text")
    base_model: str | None = option(None, "Hub id of the parent; null: the one that the run came from")
    language: str | list | None = option(None, "of the training text, e.g. en")
    eval_dir: str | None = option(None, "folder of `llmkit eval` with figures; null: `eval` beside the run")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Serve a plain model folder with OpenAI's API, through `transformers serve`.

    llmkit serve --model_name_or_path DIR [--port 8000]
    """

    model_name_or_path: str = required("folder that needs no code of ours (`llmkit export`), or Hub id")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: every machine that reaches this one may ask")
    port: int = option(8000, "port to listen on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of the weights; auto: as stored")
    use_cpu: bool = option(False, "stay on the CPU even where there is an accelerator")


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
