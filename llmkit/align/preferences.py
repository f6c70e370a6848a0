"""Preferences and prompts -> tokens: what dpo, kto, rrhf, reward and grpo read.

Owns the columns of every verb, in the names of TRL's collators, and the batch of ranked answers.

    data = get_data(config, PairEncoder(tokenizer, config))        # prompt_ids, chosen_ids, rejected_ids

Prompt and answer are cut where the tokens of the prompt alone and of both together part, as TRL does. No row is cut
to `max_length`: a longer one is a bad row. Leaves out reading rows (`data/preferences.py`) and losses.
"""

import json
import math
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..check.audit import tokenize_row
from ..config import UserError
from ..data.chat import LABELLED, PAIRS, PROMPTS, RANKED
from ..tuning import TuningConfig
from .rows import IDS, IGNORE, CannotTrain, first_line

Sequences = list[tuple[list[int], list[int]]]


class _Encoder:
    """Tokens of one prompt and its answers."""

    kind = PAIRS
    features: dict[str, Any] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TuningConfig):
        self.tokenizer, self.config = tokenizer, config

    def settings(self, row: dict[str, Any]) -> dict[str, Any]:
        return {}

    def split(self, row: dict[str, Any], answers: list[Any]) -> tuple[list[int], list[list[int]]]:
        """prompt_ids, and the ids of every answer with its end of turn. Raises CannotTrain."""
        found = []
        for answer in answers:
            given = row | {"completion": answer}
            try:
                ids, is_answer = tokenize_row(self.tokenizer, {"completion_only_loss": True}, given)
            except Exception as error:  # templates raise what they like
                raise CannotTrain(f"the chat template refuses it ({first_line(error)})") from None
            if len(ids) > self.config.max_length:
                raise CannotTrain(f"longer than max_length={self.config.max_length}")
            if True not in is_answer:
                raise CannotTrain("no token of an answer")
            found.append((ids, is_answer.index(True)))
        begin = min(start for _, start in found)
        if begin == 0:
            raise CannotTrain("no token of the prompt before the answer")
        return found[0][0][:begin], [ids[begin:] for ids, _ in found]

    @staticmethod
    def _labelled(prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
        prompt, answer = list(prompt), list(answer)
        return prompt + answer, [IGNORE] * len(prompt) + answer

    def _how(self, row: dict[str, Any]) -> str:
        return "chat" if isinstance(row["prompt"], list) else "text"


class PairEncoder(_Encoder):
    """prompt_ids, chosen_ids, rejected_ids."""

    features = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt, (chosen, rejected) = self.split(row, [row["chosen"], row["rejected"]])
        if chosen == rejected:
            raise CannotTrain("chosen = rejected as tokens")
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    def sequences(self, columns: dict[str, Any]) -> Sequences:
        return [self._labelled(columns["prompt_ids"], columns[name]) for name in ("chosen_ids", "rejected_ids")]

    def describe(self, row: dict[str, Any]) -> str:
        return f"{self._how(row)}, chosen against rejected answers"


class RewardEncoder(PairEncoder):
    """chosen_ids and rejected_ids, each with its prompt; margin, or None (`with_margins`)."""

    features = {"chosen_ids": IDS, "rejected_ids": IDS, "margin": datasets.Value("float32")}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, margin = super().__call__(row), row.get("margin")
        if margin is not None and not (type(margin) in (int, float) and math.isfinite(margin)):
            raise CannotTrain(f"margin is {margin!r}: no number")
        whole = {name: ids["prompt_ids"] + ids[name] for name in ("chosen_ids", "rejected_ids")}
        return whole | {"margin": margin}

    def sequences(self, columns: dict[str, Any]) -> Sequences:
        return [(list(columns[name]), list(columns[name])) for name in ("chosen_ids", "rejected_ids")]


class LabelledEncoder(_Encoder):
    """prompt_ids, completion_ids, label; KTO's mismatched answers are added by `mismatched`."""

    kind = LABELLED
    features = {"prompt_ids": IDS, "completion_ids": IDS, "label": datasets.Value("bool")}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt, (answer,) = self.split(row, [row["completion"]])
        return {"prompt_ids": prompt, "completion_ids": answer, "label": row["label"]}

    def sequences(self, columns: dict[str, Any]) -> Sequences:
        return [self._labelled(columns["prompt_ids"], columns["completion_ids"])]

    def describe(self, row: dict[str, Any]) -> str:
        return f"{self._how(row)}, answers marked good or bad"


class RankedEncoder(_Encoder):
    """prompt_ids, completion_ids (k lists), scores (k)."""

    kind = RANKED
    features = {
        "prompt_ids": IDS,
        "completion_ids": datasets.List(IDS),
        "scores": datasets.List(datasets.Value("float32")),
    }

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt, answers = self.split(row, row["completions"])
        return {"prompt_ids": prompt, "completion_ids": answers, "scores": row["scores"]}

    def sequences(self, columns: dict[str, Any]) -> Sequences:
        return [self._labelled(columns["prompt_ids"], answer) for answer in columns["completion_ids"]]

    def describe(self, row: dict[str, Any]) -> str:
        return f"{self._how(row)}, answers ranked by their scores"


class PromptEncoder(_Encoder):
    """prompt_ids: looked at and counted; the trainer reads the row itself (`as_prompts`)."""

    kind = PROMPTS
    features = {"prompt_ids": IDS}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        options = self.config.passed_on.get("chat_template_kwargs") or {}  # the trainer's, too
        try:
            ids = (
                self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **options)[
                    "input_ids"
                ]
                if isinstance(prompt, list)
                else self.tokenizer(prompt)["input_ids"]
            )
        except Exception as error:
            raise CannotTrain(f"the chat template refuses it ({first_line(error)})") from None
        room = self.config.max_length - self.config.max_completion_length  # type: ignore[attr-defined]
        if len(ids) > room:
            raise CannotTrain(f"longer than max_length - max_completion_length={room}")
        return {"prompt_ids": list(ids)}

    def sequences(self, columns: dict[str, Any]) -> Sequences:
        ids = list(columns["prompt_ids"])
        return [(ids, [IGNORE] * len(ids))]

    def describe(self, row: dict[str, Any]) -> str:
        columns = ", ".join(key for key in row if key not in ("prompt", "row", "raw"))
        return f"{self._how(row)} prompts" + (f", with {columns}" if columns else "")


def as_prompts(rows: datasets.Dataset) -> datasets.Dataset:
    """Prompts and the columns that rewards read, as TRL's GRPOTrainer takes them; None where a row lacks one.

    Raises UserError for a column that holds values of several kinds.
    """
    found = [json.loads(text) for text in rows["raw"]]
    for key in (columns := list(dict.fromkeys(key for row in found for key in row))):
        kinds: dict[str, int] = {}  # kind -> the first row of it
        for row in found:
            if row.get(key) is not None:
                kind = "number" if type(row[key]) in (int, float) else type(row[key]).__name__
                kinds.setdefault(kind, row["row"])
        if len(kinds) > 1:
            told = ", ".join(f"{kind} (row {row})" for kind, row in kinds.items())
            raise UserError(f"datasets: column {key!r} holds {told}; make them one kind, e.g. all text")
    return datasets.Dataset.from_list([{key: row.get(key) for key in columns} for row in found])


def with_margins(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of RewardEncoder for TRL's collator: a margin on every row, or no such column. Raises UserError."""
    num_missing = sum(margin is None for margin in rows["margin"])
    if 0 < num_missing < len(rows):
        raise UserError(f"datasets: margin on {len(rows) - num_missing:,} of {len(rows):,} rows; on all, or on none")
    return rows.remove_columns("margin") if num_missing else rows


def mismatched(rows: datasets.Dataset) -> datasets.Dataset:
    """KTO's KL term is estimated on answers to other prompts: of the next row whose prompt differs.

    TRL takes the row before within a batch, which in pairs made two rows is the other answer to the same prompt.
    Raises UserError where no row has another prompt.
    """
    prompts, answers = rows["prompt_ids"][:], rows["completion_ids"][:]
    count = len(rows)
    found, other = [], 0
    for i in range(count):
        other = max(other, i + 1)
        while other < i + count and prompts[other % count] == prompts[i]:
            other += 1
        if other == i + count:
            raise UserError(
                f"datasets: all {count:,} rows of a set have the same prompt; KTO estimates its KL term on answers to "
                "other prompts, so add some"
            )
        found.append(answers[other % count])
    return rows.add_column("KL_completion_ids", found, feature=IDS)


class RankedCollator:
    """Rows of k answers each as one batch of (sum k, T): input_ids, attention_mask, labels, scores, group."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [(row["prompt_ids"], answer) for row in rows for answer in row["completion_ids"]]
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        batch = {
            "input_ids": torch.full((len(pairs), width), self.pad_token_id),
            "attention_mask": torch.zeros((len(pairs), width), dtype=torch.long),
            "labels": torch.full((len(pairs), width), IGNORE),
            "scores": torch.tensor([score for row in rows for score in row["scores"]], dtype=torch.float32),
            "group": torch.tensor([i for i, row in enumerate(rows) for _ in row["scores"]]),
        }
        for i, (prompt, answer) in enumerate(pairs):
            size = len(prompt) + len(answer)
            batch["input_ids"][i, :size] = torch.tensor(prompt + answer)
            batch["attention_mask"][i, :size] = 1
            batch["labels"][i, len(prompt) : size] = torch.tensor(answer)
        return batch
