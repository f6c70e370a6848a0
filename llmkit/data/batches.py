"""A training batch, ours, transformers' or TRL's, as plain rows of tokens.

Owns saying of each token whether it is learnt, however the batch says it: labels, shift_labels, completion_mask.

    rows = Reader(tokenizer, settings).rows(batch)

Leaves out where batches come from (`inspect_verb.py`) and what is counted over many rows (`inspect.py`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check.spans import special_ids
from ..check.torture import byte_letters
from ..config import UserError

IGNORE = -100
STATES = TRAINED, MASKED, PADDING, READ = ("trained", "masked", "padding", "read")
LONGEST = 4_000  # characters of a column
PAIR = ("chosen", "rejected")
KL = "KL"  # KTO's mismatched answers: they estimate a baseline and get no gradient

Ids = NDArray[np.int64]


@dataclass
class Sequence:
    """One row of input_ids, token by token. The lists are of equal length."""

    name: str  # "", or which of a row's sequences
    ids: list[int]
    states: list[str]  # of STATES: learnt or not is said of the token that is predicted, not of the one before it
    special: list[bool]
    starts: list[int]  # positions at which another document begins
    odd_labels: list[tuple[int, int]]  # (position, label) where the loss asks for another token than stands there
    num_trained_padding: int = 0
    texts: list[str] | None = None  # of each token alone; None: not shown, or redacted

    def count(self, state: str) -> int:
        return self.states.count(state)

    @property
    def num_real(self) -> int:
        return len(self.ids) - self.count(PADDING)


@dataclass
class Row:
    """One row of the data as a batch holds it: a sequence, or several that belong together."""

    number: int  # in the order of training, from the step that was asked for
    sequences: list[Sequence]
    columns: dict[str, Any] = field(default_factory=dict)  # what else is handed on: labels, margins, reward columns
    times: int = 1  # how often in a row: a prompt goes to generation once per completion
    notes: list[str] = field(default_factory=list)


# tokens

_BYTES = {letter: byte for byte, letter in byte_letters().items()}


def token_text(tokenizer: Any, token_id: int) -> str:
    """What one id stands for, white space included; bytes that are no character alone as Python's surrogateescape."""
    piece = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    if piece is None:
        return f"<no token {token_id}>"
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in text and set(piece) <= set(_BYTES):
        return bytes(_BYTES[c] for c in piece).decode("utf-8", "surrogateescape")
    if piece.startswith("▁") and not text.startswith(" "):  # sentencepiece strips the blank of a first token
        return " " + text
    return text if text and "\ufffd" not in text else piece


# batches


class Reader:
    """Batches of one trainer -> rows. `settings` are its own, as TrainingArguments and SFTConfig name them.

    `is_paired`: the first half of a batch are chosen, the second half rejected; None: by what the batch holds.
    `tokenize_prompts`: what turns the prompts of a reinforcement batch into ids.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: dict[str, Any] | None = None,
        is_paired: bool | None = None,
        tokenize_prompts: Callable[[list[Any]], list[list[int]]] | None = None,
    ):
        self.tokenizer, self.is_paired, self.tokenize_prompts = tokenizer, is_paired, tokenize_prompts
        settings = settings or {}
        self.limit = settings.get("max_length")
        self.is_packed = bool(settings.get("packing", "packing_strategy" in settings))  # our recipes always pack
        self.is_stream = self.is_packed and settings.get("packing_strategy") in ("contiguous", "wrapped")
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.eos_id, self.pad_id = eos, pad if pad is not None else eos
        self.special, self.num_ids = special_ids(tokenizer), len(tokenizer)
        self.has_shifted = False  # rows end in a token that is only predicted
        self.is_told_apart = True  # position_ids tell the model where documents begin

    def rows(self, batch: Any) -> list[Row]:
        """Numbers are left at 0. Raises UserError for a batch without tokens."""
        if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], dict):
            return self._prompts(list(batch))
        if not hasattr(batch, "keys"):
            raise UserError(f"its batches are {type(batch).__name__}, not dictionaries: no tokens to show")
        arrays = {key: _array(value) for key, value in batch.items()}
        prefixes = self._prefixes(arrays)
        found = {name: self._sequences(arrays, prefix, name) for name, prefix in prefixes.items()}
        is_paired = "completion_mask" in arrays and not {"labels", "label"} & set(arrays)
        is_paired = is_paired if self.is_paired is None else self.is_paired
        if is_paired and list(found) == [""] and len(found[""]) % 2 == 0:
            half = len(found[""]) // 2
            found = {"chosen": found[""][:half], "rejected": found[""][half:]}
            for name, sequences in found.items():
                for sequence in sequences:
                    sequence.name = name
        count = min(map(len, found.values()))
        used = tuple(f"{prefix}{key}" for prefix in prefixes.values() for key in ("input_ids", "labels"))
        columns = {k: v for k, v in arrays.items() if k not in used and v is not None and v.shape == (count,)}
        columns = {k: v for k, v in columns.items() if not k.startswith(("cu_seq_lens", "max_length"))}
        return [
            Row(0, [sequences[i] for sequences in found.values()], {k: _plain(v[i]) for k, v in columns.items()})
            for i in range(count)
        ]

    def _prefixes(self, arrays: dict[str, Any]) -> dict[str, str]:
        """Name of each sequence of a row -> what its keys begin with."""
        if "chosen_input_ids" in arrays:
            return {name: f"{name}_" for name in PAIR if f"{name}_input_ids" in arrays}
        main = "" if "input_ids" in arrays else "completion_"
        if arrays.get(f"{main}input_ids") is None:
            raise UserError(f"its batches hold no input_ids, only {', '.join(map(str, arrays))}: no tokens to show")
        baseline = f"KL_{main}"
        return {"answer": main, KL: baseline} if f"{baseline}input_ids" in arrays else {"": main}

    def _sequences(self, arrays: dict[str, Any], prefix: str, name: str) -> list[Sequence]:
        ids = np.atleast_2d(arrays[f"{prefix}input_ids"])  # (B, T)

        def like(key: str) -> Any:
            value = arrays.get(f"{prefix}{key}")
            value = None if value is None else np.atleast_2d(value)
            return value if value is not None and value.shape == ids.shape else None

        labels, shifted, answers = like("labels"), like("shift_labels"), like("completion_mask")
        attention, positions = like("attention_mask"), like("position_ids")
        rows = []
        for b in range(len(ids)):
            row, learnt, more = ids[b], None, {}
            if shifted is not None:
                self.has_shifted = True
                row, learnt = np.append(row, shifted[b, -1]), np.insert(shifted[b], 0, IGNORE)
                row, learnt = (row[:-1], learnt[:-1]) if learnt[-1] == IGNORE else (row, learnt)
            elif name != KL and (labels is not None or answers is not None):
                learnt = labels[b].copy() if labels is not None else np.where(answers[b] == 1, row, IGNORE)
                learnt[0] = IGNORE  # the loss shifts by one: nothing stands before the first token
            if attention is not None:
                more["attention"] = np.append(attention[b], [1] * (len(row) - len(ids[b])))
            if positions is not None:
                more["positions"] = np.append(positions[b], [1] * (len(row) - len(ids[b])))
            rows.append(self.sequence(row, learnt, name, **more))
        return rows

    def sequence(
        self,
        ids: Ids,
        learnt: Ids | None,
        name: str = "",
        attention: Ids | None = None,
        positions: Ids | None = None,
    ) -> Sequence:
        """`learnt` (T,): what the loss asks for at the place of each token, or IGNORE; None: for nothing at all."""
        is_learnt = learnt != IGNORE if learnt is not None else np.zeros(len(ids), bool)
        is_pad = attention == 0 if attention is not None else _ends(ids == self.pad_id, ~is_learnt)
        is_sure_pad = (ids == self.pad_id) & (self.pad_id != self.eos_id)
        codes = np.where(is_learnt, 0, np.where(is_pad, 2, 3 if learnt is None else 1))  # of STATES
        begins = positions == 0 if positions is not None else np.zeros(len(ids), bool)
        begins = begins & ~is_pad & (np.cumsum(~is_pad) > 1)
        if positions is None and self.is_packed and self.eos_id is not None:  # seen by the eye only
            begins = np.insert(ids[:-1] == self.eos_id, 0, False) & ~is_pad
            self.is_told_apart &= not begins.any()
        odd = np.flatnonzero(is_learnt & (learnt != ids)) if learnt is not None else np.zeros(0, int)
        return Sequence(
            name=name,
            ids=ids.tolist(),
            states=[STATES[code] for code in codes.tolist()],
            special=[i in self.special for i in ids.tolist()],
            starts=np.flatnonzero(begins).tolist(),
            odd_labels=[(int(t), int(learnt[t])) for t in odd],  # type: ignore[index]
            num_trained_padding=int((is_learnt & (is_pad if attention is not None else is_sure_pad)).sum()),
        )

    def _prompts(self, batch: list[dict[str, Any]]) -> list[Row]:
        """Rows as reinforcement trainers collate them: a prompt, and columns for the reward functions."""
        rows: list[dict[str, Any]] = []
        times: list[int] = []
        for item in batch:
            if rows and key_of(item) == key_of(rows[-1]):
                times[-1] += 1
            else:
                rows.append(item)
                times.append(1)
        if "prompt" not in rows[0]:
            raise UserError(
                f"its batches hold neither input_ids nor prompt, only {', '.join(rows[0])}: nothing to show"
            )
        prompts = [row["prompt"] for row in rows]
        ids: list[list[int]] = [[] for _ in rows]
        note = ["shown before the chat template: the trainer has no method that applies it"]
        if self.tokenize_prompts is not None:
            ids, note = [list(given) for given in self.tokenize_prompts(prompts)], []
        found = []
        for row, given, count in zip(rows, ids, times, strict=True):
            columns = {k: _plain(v) for k, v in row.items() if k != "prompt" or not given}
            tokens = np.asarray(given, np.int64)
            found.append(Row(0, [self.sequence(tokens, None, attention=tokens * 0 + 1)], columns, count, list(note)))
        return found


def _ends(is_pad: NDArray[np.bool_], is_free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Padding where no mask names it: ids of the padding token, not learnt, in one run at either end."""
    run = is_pad & is_free
    return np.logical_and.accumulate(run) | np.logical_and.accumulate(run[::-1])[::-1]


def _array(value: Any) -> Any:
    """Tensors and lists of numbers or texts as arrays; None for everything else."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    try:
        found = np.asarray(value)
    except ValueError:  # ragged
        return None
    return found if found.dtype != object else None


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def key_of(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)
