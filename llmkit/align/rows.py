"""Rows in TRL's columns -> tokens: what the post-training verbs read.

Owns which tokens of a row are trained, that no row is cut or dropped unseen, the mixture, the held-out split, packing.

    labeller = Labeller(tokenizer, config);  data = get_data(config, labeller)     # data.train, data.shards

labels[t] == ids[t], the loss shifts by one; -100 is not trained. The tokens are those of TRL's own preparation
(`check/audit.py` makes them, the tests compare); it is not used, since it cuts long rows in silence.
Leaves out batches: TRL's collator makes them; and preferences and prompts: `preferences.py`.
"""

import dataclasses
import hashlib
import json
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..check.audit import MARKS, tokenize_row, training_template
from ..config import UserError
from ..data.chat import ANSWERS, Bad, load_rows
from ..data.sources import Source, describe, parse_sources
from ..tuning import SftConfig, TuningConfig

IGNORE = -100
IDS = datasets.List(datasets.Value("int32"))
ALWAYS = {
    "row": datasets.Value("int32"),  # in its source, from 1
    "raw": datasets.Value("string"),  # the row in TRL's columns, as JSON
}


class CannotTrain(ValueError):
    """Why a row is left out."""


class Encoder(Protocol):
    """What a verb makes of a row."""

    tokenizer: PreTrainedTokenizerBase
    kind: str  # of rows: see data/chat.py
    features: dict[str, Any]  # of the columns it makes

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns. Raises CannotTrain."""

    def sequences(self, columns: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) of every sequence that a row's columns hold, to be counted."""

    def settings(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the recipe leaves open and the row decides."""

    def describe(self, row: dict[str, Any]) -> str: ...


class Labeller:
    """Tokens and labels of a row; what is trained follows from the row's columns unless the recipe says otherwise."""

    kind = ANSWERS
    features = {"input_ids": IDS, "labels": IDS}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SftConfig):
        self.tokenizer, self.config = tokenizer, config
        self.has_marks = bool(MARKS.search(str(tokenizer.chat_template)))
        self.template = training_template(tokenizer, {"assistant_only_loss": True})  # TRL's, for stock templates
        self.can_be_long = config.packing and config.packing_strategy != "bfd"  # cut into pieces, nothing is lost

    def settings(self, row: dict[str, Any]) -> dict[str, Any]:
        """assistant_only_loss and completion_only_loss for this row, both decided.

        Without generation marks a chat is trained as prompt and completion.
        """
        is_chat = "messages" in row or isinstance(row.get("prompt"), list)
        asked = self.config.assistant_only_loss
        only_answers = "messages" in row if asked is None else asked and is_chat
        can_mask = self.has_marks or self.template is not None
        is_pair = "completion" in row and self.config.completion_only_loss is not False
        return {
            "assistant_only_loss": bool(only_answers and can_mask),
            "completion_only_loss": bool(is_pair or (only_answers and not can_mask)),
        }

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """ids and labels. Raises CannotTrain."""
        settings = self.settings(row)
        given = _as_pair(row) if settings["completion_only_loss"] and "messages" in row else row
        template = self.template if settings["assistant_only_loss"] else None
        try:
            ids, is_trained = tokenize_row(self.tokenizer, settings, given, template)
        except Exception as error:  # templates raise what they like
            raise CannotTrain(f"the chat template refuses it ({first_line(error)})") from None
        if len(ids) > self.config.max_length and not self.can_be_long:
            raise CannotTrain(f"longer than max_length={self.config.max_length}")
        if True not in is_trained[1:]:  # the first token is predicted by nothing
            raise CannotTrain("no token to train on")
        labels = [i if keep else IGNORE for i, keep in zip(ids, is_trained, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def sequences(self, columns: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
        return [(columns["input_ids"], columns["labels"])]

    def describe(self, row: dict[str, Any]) -> str:
        settings = self.settings(row)
        if settings["assistant_only_loss"]:
            return f"chat, answers are trained{'' if self.has_marks else ', marks by TRL'}"
        kind = "chat" if "messages" in row or isinstance(row.get("prompt"), list) else "text"
        return f"{kind}, " + ("completions are trained" if settings["completion_only_loss"] else "all is trained")


def _as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """A chat of one answer as prompt and completion, which needs no marks in the template."""
    messages = row.get("messages") or [*row["prompt"], *row["completion"]]
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if answers != [len(messages) - 1]:
        raise CannotTrain("several answers, and the template has no generation marks")
    rest = {key: value for key, value in row.items() if key != "messages"}
    return rest | {"prompt": messages[:-1], "completion": messages[-1:]}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


@dataclasses.dataclass
class Data:
    """What is trained and validated on; `notes` say it in lines."""

    train: datasets.Dataset
    shards: dict[str, datasets.Dataset]  # unpacked
    notes: list[str]
    facts: dict[str, Any]  # for the manifest
    settings: dict[str, Any]  # assistant_only_loss and completion_only_loss of the training rows

    @property
    def fingerprint(self) -> str:
        return self.facts["train"]["sha256"]

    def answer_bytes(self, name: str) -> int:
        """UTF-8 bytes of what a shard trains or scores, ends of turns aside."""
        return self.facts[f"shard.{name}"]["trained_bytes"]


def get_data(config: TuningConfig, encoder: Encoder) -> Data:
    """Reads, encodes, mixes, splits. Raises UserError, also when more rows are bad than max_bad_rows."""
    seed = config.seed if config.data_seed is None else config.data_seed
    notes: list[str] = []
    bad: dict[str, list[Bad]] = {}
    sources = parse_sources(config.datasets, "datasets")
    overfit: int | None = getattr(config, "overfit", None)
    limit = overfit if len(sources) == 1 else None
    parts = [_encode(source, config, encoder, notes, bad, limit) for source in sources]
    train = _mix(parts, [source.fraction for source in sources], seed)
    shards = {}
    for i, source in enumerate(parse_sources(config.eval_datasets, "eval_datasets")):
        name = source.shard or source.name or f"validation{i}"
        if name in shards:
            raise UserError(f"eval_datasets: two shards named {name!r}; set `shard:` on each")
        shards[name] = _encode(source, config, encoder, notes, bad)
    _check_bad(bad, config)
    if config.test_split_size:
        if "validation" in shards:
            raise UserError("test_split_size: makes the shard `validation`, which eval_datasets has too; rename that")
        if not 1 <= round(config.test_split_size * len(train)) < len(train):
            raise UserError(
                f"test_split_size={config.test_split_size} of {len(train)} rows; allowed: a share in between"
            )
        train, shards["validation"] = _split(train, round(config.test_split_size * len(train)), seed)
        notes.append(f"held out  {len(shards['validation']):,} of the training rows as validation, by seed {seed}")
    if not len(train):
        raise UserError("datasets: no row that can be trained on; `llmkit inspect` shows what there is")
    if overfit and "text" in json.loads(train[0]["raw"]):
        raise UserError(f"overfit={overfit}: text has no answers to come back; `llmkit pretrain --overfit` has")
    if overfit:
        train, shards = train.select(range(min(overfit, len(train)))), {}
    facts: dict[str, Any] = {"train": _facts(train, encoder)}
    facts |= {f"shard.{name}": _facts(rows, encoder, has_bytes=True) for name, rows in shards.items()}
    facts["bad_rows"] = {name: dict(Counter(b.problem for b in found)) for name, found in bad.items() if found}
    return Data(train, shards, notes, facts, encoder.settings(json.loads(train[0]["raw"])))


def _encode(
    source: Source,
    config: TuningConfig,
    encoder: Encoder,
    notes: list[str],
    bad: dict[str, list[Bad]],
    limit: int | None = None,
) -> datasets.Dataset:
    """One entry as tokens and labels, on the disk in a folder that goes with the process."""
    name = describe(source)
    found: list[Bad] = bad.setdefault(name, [])
    first: list[dict[str, Any]] = []

    def rows() -> Iterator[dict[str, Any]]:
        num_good = 0
        for row in load_rows(source, Path(config.data_dir), encoder.kind):
            if isinstance(row, Bad):
                found.append(row)
                continue
            try:
                columns = encoder(row)
            except CannotTrain as error:
                found.append(Bad(row["row"], str(error)))
                continue
            if not first:
                first.append(row)
            yield {**columns, "row": row["row"], "raw": json.dumps(row, ensure_ascii=False)}
            num_good += 1
            if limit and num_good == limit:
                return

    dataset = _on_disk(rows, datasets.Features({**encoder.features, **ALWAYS}))
    if first:
        notes.append(f"data      {name}: {len(dataset):,} rows, {encoder.describe(first[0])}")
    return dataset


def _on_disk(rows: Callable[[], Iterator[dict[str, Any]]], features: datasets.Features) -> datasets.Dataset:
    from datasets.arrow_writer import ArrowWriter

    folder = tempfile.TemporaryDirectory(prefix="llmkit-rows-")
    path = f"{folder.name}/rows.arrow"
    with ArrowWriter(path=path, features=features) as writer:
        for row in rows():
            writer.write(row)
        writer.finalize()
    dataset = datasets.Dataset.from_file(path)
    weakref.finalize(dataset, folder.cleanup)
    return dataset


def _mix(parts: list[datasets.Dataset], fractions: list[float | None], seed: int) -> datasets.Dataset:
    """All rows; with fractions, so many of each part (drawn by seed) that they have these shares and one is used up."""
    if fractions[0] is not None:
        shares = np.array(fractions, float) / sum(f or 0 for f in fractions)
        total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        parts = [
            part.shuffle(seed=seed).select(range(round(total * share)))
            for part, share in zip(parts, shares, strict=True)
        ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _split(rows: datasets.Dataset, test_size: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train on and so many held out; of marked answers all to one prompt go the same way."""
    if "label" not in rows.column_names:
        split = rows.train_test_split(test_size=test_size, seed=seed)
        return split["train"], split["test"]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(rows["prompt_ids"]):
        groups.setdefault(tuple(prompt), []).append(i)
    order, held = list(groups.values()), set[int]()
    for k in np.random.default_rng(seed).permutation(len(order)):
        if len(held) >= test_size:
            break
        held |= set(order[k])
    kept = [i for i in range(len(rows)) if i not in held]
    return rows.select(kept), rows.select(sorted(held))


def _check_bad(bad: dict[str, list[Bad]], config: TuningConfig) -> None:
    """Raises UserError for more than max_bad_rows, naming the first row of every problem."""
    total = sum(map(len, bad.values()))
    if total <= config.max_bad_rows:
        return
    told = []
    for name, found in bad.items():
        kinds = Counter(b.problem for b in found)
        first = {b.problem: b.row for b in reversed(found)}
        told += [f"{name}: {count:,} x {problem} (first: row {first[problem]})" for problem, count in kinds.items()]
    raise UserError(
        f"max_bad_rows={config.max_bad_rows}: {total:,} rows cannot be trained on: {'; '.join(told)}; "
        f"mend them, or leave them out by max_bad_rows: {total}"
    )


def bad_note(data: Data) -> list[str]:
    """Lines that count what was left out."""
    lines = []
    for name, kinds in data.facts["bad_rows"].items():
        what = ", ".join(f"{count:,} {problem}" for problem, count in kinds.items())
        lines.append(f"left out  {name}: {what}")
    return lines


def has_chats(source: Source, config: TuningConfig, kind: str = ANSWERS) -> bool:
    """Whether an entry's first good row needs a chat template."""
    for row in load_rows(source, Path(config.data_dir), kind):
        if not isinstance(row, Bad):
            return "messages" in row or isinstance(row.get("prompt"), list)
    return False


def _facts(rows: datasets.Dataset, encoder: Encoder, has_bytes: bool = False) -> dict[str, Any]:
    """Rows, tokens, trained tokens, their bytes where asked for, and a hash over ids and labels in order."""
    digest = hashlib.sha256()
    num_tokens = num_trained = num_bytes = 0
    for row in rows.select_columns(list(encoder.features)).with_format("numpy"):
        for ids, labels in encoder.sequences(row):
            digest.update(np.asarray(ids, np.int32).tobytes() + np.asarray(labels, np.int32).tobytes())
            num_tokens += len(ids)
            trained = np.asarray(labels)[1:]
            trained = trained[trained != IGNORE]
            num_trained += len(trained)
            if has_bytes:
                num_bytes += len(encoder.tokenizer.decode(trained, skip_special_tokens=True).encode())
    told = {"rows": len(rows), "tokens": num_tokens, "trained_tokens": num_trained, "sha256": digest.hexdigest()}
    return told | ({"trained_bytes": num_bytes} if has_bytes else {})


def pack(rows: datasets.Dataset, config: SftConfig) -> datasets.Dataset:
    """As TRL packs; rows that share one are kept apart by position_ids (bfd)."""
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    kept = rows.select_columns(["input_ids", "labels"])
    return pack_dataset(kept, config.max_length, config.packing_strategy, {"keep_in_memory": True})


class PackedCollator:
    """Packed rows as (B, T) with position_ids that begin at 0 with every row inside, and no attention_mask.

    TRL's own collator lays a batch out as one row, for flash attention. Other kernels then build a mask of (B T, B T)
    and compute all of it: B times the work, and 17 GB for 256 rows of 256 tokens. Padding is a row of its own.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id),
            "labels": torch.full((len(rows), width), IGNORE),
            "position_ids": torch.zeros((len(rows), width), dtype=torch.long),
        }
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            lengths = [*(row.get("seq_lengths") or [size]), width - size]
            batch["input_ids"][i, :size] = torch.tensor(row["input_ids"])
            batch["labels"][i, :size] = torch.tensor(row["labels"])
            batch["position_ids"][i] = torch.cat([torch.arange(length) for length in lengths])
            starts = np.cumsum([0, *lengths[:-1]])
            batch["labels"][i, [s for s in starts if s < width]] = (
                IGNORE  # or a row would be asked for by the one before
            )
        return batch
