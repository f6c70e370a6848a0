"""Recipes: flat YAML in, a frozen dataclass out, nothing silently ignored.

Owns how a verb gets its settings. The keys are those of TrainingArguments, TRL and PEFT; ours are the rest.

    config = load(PretrainConfig, ["recipes/toy/pretrain.yaml", "--max_steps", "10", "seed=1"])

The command line wins over the recipe. Leaves out what a value means: the verb that uses it checks that.
"""

import dataclasses
import difflib
import json
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

# keys of TRL's configs that the house decides -> what to write instead
NOT_PASSED_ON = {
    "deepspeed": "accelerate_config: zero2",
    "fsdp": "accelerate_config: fsdp2",
    "fsdp_config": "accelerate_config: fsdp2",
    "parallelism_config": "accelerate_config",
    "accelerator_config": "accelerate_config",
    "hub_token": "nothing: HF_TOKEN, or `hf auth login`",
    "hub_strategy": "nothing: a model is published once it is whole",
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
    "remove_unused_columns": "nothing",
    "do_train": "nothing",
    "do_eval": "eval_datasets",
}


def required(text: str) -> Any:
    """A text that the user must give; the verb refuses an empty one."""
    return dataclasses.field(default="", metadata={"help": text, "required": True})


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help line; mutable defaults are copied."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


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


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; raises UserError naming file and line when it is not YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a YAML file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}:{where} is not valid YAML ({getattr(error, 'problem', error)}); mend that line"
        ) from None


def read_recipe(path: Path) -> dict:
    """The keys of a recipe; raises UserError naming file and line when it is not flat YAML."""
    if not path.exists():
        raise UserError(f"{path}: no such recipe; `ls recipes/*/` lists the ones that come with llmkit")
    values = read_yaml(path)
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
    if key in RENAMED and re.split(r"[:\s]", RENAMED[key])[0] in known:
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


def _passed_on_hint(cls: Any, key: str) -> Any:
    """The type of a further key of the TRL config that the verb rides on, None where there is no such key.

    Raises UserError for one that the house decides.
    """
    if not hasattr(cls, "PASSES_ON"):
        return None
    if key in NOT_PASSED_ON or key.startswith("hub_"):
        raise UserError(f"key {key!r} of TRL is not used here; write {NOT_PASSED_ON.get(key, 'nothing')}")
    try:  # only for such a key: seconds of import
        import transformers
        import trl
    except ImportError:
        return None
    theirs = getattr(trl, cls.PASSES_ON, None) or getattr(transformers, cls.PASSES_ON)
    names = {field.name for field in dataclasses.fields(theirs)}
    return typing.get_type_hints(theirs)[key] if key in names else None


def _fits_theirs(value: Any, hint: Any) -> bool:
    try:
        return _fits(value, hint)
    except TypeError:  # dict[str, Any] and the like: TRL looks at those itself
        return True


def parse_args(argv: list[str], cls: Any = None) -> tuple[Path | None, dict[str, str]]:
    """Splits the words after the verb into a recipe and raw overrides: `--key value`, `--key=value`, `key=value`.

    A config class with WORDS, the name of a list, takes any number of plain words: they become that key. A recipe then
    is a .yaml, and a switch takes no word behind it but true or false (`--fail_on_regression runs/toy`).
    """
    recipe: str | None = None
    raw: dict[str, str] = {}
    taken: list[str] = []
    takes_words = getattr(cls, "WORDS", None)
    switches = {key for key, hint in typing.get_type_hints(cls).items() if hint is bool} if takes_words else set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                has_value = bool(words) and not words[0].startswith("--")
                if has_value and key.replace("-", "_") in switches:
                    has_value = words[0] in ("true", "false")
                value = words.pop(0) if has_value else "true"
        elif "=" in word and not (Path(word).is_file() if word.endswith((".yaml", ".yml")) else _is_there(word, cls)):
            key, _, value = word.partition("=")
        elif takes_words and not (word.endswith((".yaml", ".yml")) and recipe is None):
            taken.append(word)
            continue
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
    if taken and takes_words in raw:
        raise UserError(f"--{takes_words} and the word {taken[0]!r}; name them in one way")
    if taken:
        raw[str(takes_words)] = json.dumps(taken, ensure_ascii=False)  # a list of YAML, too
    return (Path(recipe) if recipe else None), raw


def _is_there(word: str, cls: Any) -> bool:
    """A folder with an equals sign in its name, among words that name folders."""
    return hasattr(cls, "WORDS") and Path(word).exists()


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
    recipe, raw = parse_args(argv, cls)
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
