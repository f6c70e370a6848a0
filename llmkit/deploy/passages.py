"""The text that two models are compared on: rows of a run's own validation data, as tokens with labels.

Owns which text that is. A chat model is asked on its own kind of rows, where only answers count; raw text is off what
it was tuned on.   passages = find_passages(source, config, tokenizer, context);  passages["stories"].rows

labels[t] is the token after inputs[t], -100 is not scored. Leaves out what a model makes of it (cost.py).
"""

import dataclasses
from pathlib import Path
from typing import Any

from ..config import UserError, load, read_recipe
from ..data.sources import describe, documents
from ..data.tokenizer import bos_id
from ..evaluate.columns import Column, lineage, manifest_of
from ..evaluate.texts import windows
from ..evaluate.verb import find_shards
from ..verbs import EvalConfig, QuantizeConfig
from .loading import Source

WINDOW = 1024  # where nothing says with which context a model was trained


@dataclasses.dataclass(frozen=True)
class Passages:
    """Rows of one shard: (document, inputs, labels); a document longer than the window has several."""

    rows: list[tuple[int, list[int], list[int]]]
    num_documents: int
    what: str
    entropy_nats: float | None = None  # of all documents, where the source knows it


def find_passages(source: Source, config: QuantizeConfig, tokenizer: Any, context: int) -> dict[str, Passages]:
    """By shard. Raises UserError where there is no text, for data that cannot be read, and for a window without use."""
    runs = lineage(source.run) if source.run and not config.eval_datasets else []
    for run in runs:
        stage = manifest_of(run).get("stage")
        if stage == "sft" and (found := _answers(run, tokenizer)):
            if config.window:
                raise UserError(
                    f"window={config.window} has no effect on the rows of {run}, which stay whole; remove it, or name "
                    "raw text: eval_datasets"
                )
            return found
        if stage == "pretrain":
            break
    column = Column("model", source.path, str(source.run) if source.run else None, None, "", 0)
    shards, trained_length = find_shards(EvalConfig(eval_datasets=config.eval_datasets), [column])
    if not shards:
        raise UserError(
            f"eval_datasets is missing: {source.name!r} comes from no run whose validation text is known; "
            "name some text: eval_datasets: [{path: json, data_files: held_out.jsonl}]"
        )
    window = min(config.window or trained_length or WINDOW, context)
    return {
        name: _raw(shard, Path(config.data_dir) if config.eval_datasets else place, tokenizer, window)
        for name, (shard, place) in shards.items()
    }


def _raw(shard: Any, data_dir: Path, tokenizer: Any, window: int) -> Passages:
    """Every document after a BOS, its EOS scored too. Raises UserError for a shard without text."""
    found = list(documents(shard, data_dir))
    if not found:
        raise UserError(f"eval_datasets: {describe(shard)} holds no document; name another split or file")
    rows = []
    for index, ids in enumerate(tokenizer([doc.text for doc in found], add_special_tokens=False)["input_ids"]):
        rows += [(index, *pair) for pair in windows(ids, bos_id(tokenizer), tokenizer.eos_token_id, window)]
    known = [doc.log_prob for doc in found]
    nats = None if None in known else -sum(known)  # type: ignore[arg-type]
    return Passages(rows, len(found), f"raw text, windows of {window} tokens", nats)


def _answers(run: Path, tokenizer: Any) -> dict[str, Passages]:
    """Validation rows of a tuning run, as it labelled them; empty where it held none out."""
    from ..align.rows import Labeller, get_data
    from ..tuning import SftConfig

    recipe = read_recipe(run / "recipe.yaml")
    settings = dataclasses.replace(load(SftConfig, [str(run / "recipe.yaml")], "sft"), overfit=None)
    labeller = Labeller(tokenizer, settings)
    shards = {}
    if entries := recipe.get("eval_datasets"):
        for i, entry in enumerate(entries):  # each alone, as training rows: those of the run need not be read
            name = entry.get("shard") or entry.get("name") or f"validation{i}"
            alone = {key: value for key, value in entry.items() if key != "shard"}
            given = dataclasses.replace(settings, datasets=[alone], eval_datasets=[], test_split_size=0.0)
            shards[name] = get_data(given, labeller).train
    elif settings.test_split_size:
        shards = get_data(settings, labeller).shards
    return {name: _labelled(rows) for name, rows in shards.items()}


def _labelled(dataset: Any) -> Passages:
    rows = [(i, row["input_ids"][:-1], row["labels"][1:]) for i, row in enumerate(dataset)]
    return Passages(rows, len(rows), "answers of its own validation rows")
