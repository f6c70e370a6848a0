"""Four ways to hand something to the checks: a folder, a recipe, a command, a live trainer.

Owns turning each into a `Subject`.

    subject = from_folder(settings)             # llmkit check --model_name_or_path DIR --dataset rows.jsonl
    subject = from_parts(trainer=trainer)       # llmkit.check.run(trainer)

A recipe becomes a `Subject` in the stage that runs it; a command is `command.py`'s. Leaves out the verb (`verb.py`).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..config import UserError
from ..run import resolve_model_dir
from ..verbs import CheckConfig
from .columns import COLUMNS, with_trl_columns
from .forward import bare
from .hf_trainer import HFTraining, settings_of
from .report import Report
from .runner import Selection, run
from .stored import check_folder
from .subject import Subject

MAX_ROWS = 20_000


# a folder or a Hub id


def load_tokenizer(name: str, trust_remote_code: bool, key: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(_cannot_load(key, name, error, trust_remote_code)) from None


def _cannot_load(key: str, name: str, error: Exception, trusts: bool) -> str:
    text = str(error).strip().split("\n")[0]
    if "trust_remote_code" in str(error) and not trusts:
        return f"{key}={name!r}: comes with code of its own; read it, then add --trust_remote_code to run it"
    what = f"{type(error).__name__}: {text[:200]}"
    return f"{key}={name!r}: cannot be loaded ({what}); expected a transformers folder or Hub id"


def load_config(name: str, trust_remote_code: bool) -> Any:
    """Raises UserError for what is no model folder, needs its own code, or holds pickled weights only."""
    from transformers import AutoConfig

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"model_name_or_path={name!r}: has no config.json; name a folder that save_pretrained wrote")
    if not folder.exists() and name.startswith((".", "/", "~")):
        raise UserError(f"model_name_or_path={name!r}: no such folder; name a model folder or a Hub id")
    if folder.is_dir():
        check_folder(folder)
        pickled = [
            p.name
            for p in folder.glob("*")
            if p.name.startswith("pytorch_model") and p.suffix in (".bin", ".pt", ".pth")
        ]
        if pickled and not any(folder.glob("*.safetensors")):
            raise UserError(
                f"model_name_or_path={name!r}: only pickled weights ({pickled[0]}), which can run code when loaded; "
                "write them as safetensors where you trust them: model.save_pretrained(folder)"
            )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(_cannot_load("model_name_or_path", name, error, trust_remote_code)) from None


def builder(trust_remote_code: bool) -> Any:
    """config -> a freshly drawn model of the class that AutoModelForCausalLM takes for it."""
    from transformers import AutoModelForCausalLM

    def make(config: Any) -> Any:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)

    return make


def read_rows(name: str, key: str, limit: int = MAX_ROWS) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json, .txt file or a Hub data set, at most `limit`. Raises UserError without usable column."""
    path = Path(name)
    try:
        if path.is_file() and path.suffix == ".txt":
            rows = [{"text": line} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif path.is_file() and path.suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            is_list = text.lstrip().startswith("[")
            rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = _rows_by_datasets(name, key, limit)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={name!r}: cannot be read ({error}); expected JSON lines, JSON, text or a Hub id"
        ) from None
    rows = rows[:limit]
    if not rows or not isinstance(rows[0], dict):
        raise UserError(f"{key}={name!r}: holds no rows; expected one JSON object per row")
    rows = [with_trl_columns(row) for row in rows]
    if not any(column in rows[0] for column in COLUMNS):
        raise UserError(
            f"{key}={name!r}: no usable column in {sorted(rows[0])}; expected messages, text, or prompt and completion"
        )
    return rows


def _rows_by_datasets(name: str, key: str, limit: int) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{key}={name!r}: needs `pip install datasets`, or name a .jsonl file") from None
    kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(name).suffix)
    try:
        if kind:
            found = datasets.load_dataset(kind, data_files=name, split="train")
        elif Path(name).is_dir():
            found = datasets.load_from_disk(name)
            found = found["train"] if isinstance(found, dict) else found
        else:
            found = datasets.load_dataset(name, split="train", streaming=True).take(limit)
    except Exception as error:
        raise UserError(f"{key}={name!r}: cannot be loaded ({str(error).splitlines()[0][:200]})") from None
    return [dict(row) for row in (found.select(range(min(limit, len(found)))) if hasattr(found, "select") else found)]


def from_folder(settings: CheckConfig) -> Subject:
    """The subject that the flags of `llmkit check` name."""
    name = settings.model_name_or_path
    if name is None and settings.tokenizer_name is None:
        raise UserError(
            "nothing to check: give --model_name_or_path, --tokenizer_name, a recipe, or a command after `--`; "
            "`llmkit help check` lists the ways"
        )
    path = resolve_model_dir(name) if name else None
    subject = Subject(target=str(name or settings.tokenizer_name), is_chat=settings.chat)
    subject.trust_remote_code = settings.trust_remote_code
    if path:
        subject.config = load_config(path, settings.trust_remote_code)
        subject.make_model = builder(settings.trust_remote_code)
        subject.folder = Path(path) if Path(path).is_dir() else None
    has_own = path and (subject.folder is None or any(subject.folder.glob("tokenizer*")))
    if settings.tokenizer_name or has_own:
        key = "tokenizer_name" if settings.tokenizer_name else "model_name_or_path"
        subject.tokenizer = load_tokenizer(settings.tokenizer_name or str(path), settings.trust_remote_code, key)
    if settings.dataset:
        subject.rows = read_rows(settings.dataset, "dataset")
    if settings.eval_dataset:
        subject.eval_rows = read_rows(settings.eval_dataset, "eval_dataset")
    if settings.max_length is not None:
        subject.settings["max_length"] = settings.max_length
    for key in ("peft_adapter", "reference"):
        value = getattr(settings, key)
        if value and not Path(resolve_model_dir(value)).is_dir():
            raise UserError(f"{key}={value!r}: no such folder")
        if value:
            check_folder(Path(resolve_model_dir(value)))
    if settings.peft_adapter:
        subject.adapter = Path(settings.peft_adapter)
        if not (subject.adapter / "adapter_config.json").is_file():
            raise UserError(f"peft_adapter={settings.peft_adapter!r}: has no adapter_config.json; name a PEFT folder")
    if settings.reference:
        subject.reference = Path(resolve_model_dir(settings.reference))
        if any(subject.reference.glob("tokenizer*")):
            subject.reference_tokenizer = load_tokenizer(
                str(subject.reference), settings.trust_remote_code, "reference"
            )
    return subject


# live objects


def _as_rows(dataset: Any, limit: int = MAX_ROWS) -> list[dict[str, Any]]:
    if dataset is None:
        return []
    if isinstance(dataset, (str, Path)):
        return read_rows(str(dataset), "dataset", limit)
    if isinstance(dataset, dict):  # named evaluation sets
        return [row for part in dataset.values() for row in _as_rows(part, limit)][:limit]
    rows: list[dict[str, Any]] = []
    source: Iterable[Any] = dataset
    for row in source:
        rows.append(with_trl_columns(dict(row)) if isinstance(row, dict) else {"input_ids": row})
        if len(rows) >= limit:
            break
    return rows


def from_parts(
    trainer: Any = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    dataset: Any = None,
    eval_dataset: Any = None,
    args: Any = None,
    reference: str | Path | None = None,
    peft_adapter: str | Path | None = None,
    chat: bool | None = None,
    scratch: bool = False,
    target: str | None = None,
) -> Subject:
    """`trainer`, or the parts: a model (or its folder), a tokenizer (or its folder), rows, TrainingArguments."""
    if isinstance(model, (str, Path)):
        settings = CheckConfig(model_name_or_path=str(model), reference=str(reference) if reference else None)
        subject = from_folder(settings)
    else:
        subject = Subject(target or "")
        subject.reference = Path(reference) if reference else None
        if subject.reference and any(subject.reference.glob("tokenizer*")):
            subject.reference_tokenizer = load_tokenizer(str(subject.reference), False, "reference")
    if trainer is not None:
        model = trainer.model
        tokenizer = tokenizer if tokenizer is not None else getattr(trainer, "processing_class", None)
        subject.training = HFTraining(trainer)
        subject.settings = dict(subject.training.settings)
        dataset = dataset if dataset is not None else getattr(trainer, "train_dataset", None)
        eval_dataset = eval_dataset if eval_dataset is not None else getattr(trainer, "eval_dataset", None)
        subject.target = target or f"{type(trainer).__name__} of {type(bare(model)).__name__}"
    if args is not None:
        subject.settings |= settings_of(args)
    if model is not None and not isinstance(model, (str, Path)):
        subject.model, subject.config = model, model.config
        base = bare(model)
        subject.make_model = type(base)._from_config if hasattr(type(base), "_from_config") else type(base)
        subject.target = subject.target or type(base).__name__
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(str(tokenizer), False, "tokenizer")
    subject.tokenizer = getattr(tokenizer, "tokenizer", tokenizer) if tokenizer is not None else subject.tokenizer
    subject.rows, subject.eval_rows = _as_rows(dataset), _as_rows(eval_dataset)
    subject.adapter = Path(peft_adapter) if peft_adapter else None
    has_messages = any("messages" in row or isinstance(row.get("prompt"), list) for row in subject.rows[:1])
    subject.is_chat = has_messages if chat is None else chat
    subject.is_scratch = scratch
    subject.target = subject.target or "parts"
    return subject


def run_python(
    trainer: Any = None, *, tier: int = 2, only: Any = (), skip: Any = (), ignore: Any = (), **parts: Any
) -> Report:
    """`llmkit.check.run`: see `from_parts` for the parts; `ignore` is [{"check": ..., "reason": ...}]."""
    return run(from_parts(trainer, **parts), selection(tier, only, skip, ignore))


def selection(tier: int, only: Any, skip: Any, ignore: Any) -> Selection:
    """From words, comma-separated texts or lists. Raises UserError for an ignore entry without check or reason."""

    def words(value: Any) -> tuple[str, ...]:
        return tuple(w.strip() for w in (value.split(",") if isinstance(value, str) else value or ()) if w.strip())

    pairs = []
    for item in ignore or ():
        if not isinstance(item, dict) or set(item) != {"check", "reason"}:
            raise UserError(f"check_ignore: {item!r}; expected {{check: NAME, reason: TEXT}}")
        pairs.append((str(item["check"]), str(item["reason"])))
    return Selection(tier, words(only), words(skip), tuple(pairs))
