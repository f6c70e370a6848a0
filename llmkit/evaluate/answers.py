"""Answers, compared word for word: a model is asked what a data set asks, greedily.

Owns the question and the expected answer of a row, batched generation, and exact match by kind.

    score = score_answers(model, tokenizer, rows, batch_size=32, max_new_tokens=64);  score.exact_match

An answer is what stands before the end of the turn, white space around it aside. Leaves out judging.
"""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

# greedy, whatever the model's generation_config.json says: its repetition penalty or beams would change the answers
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": None,
    "temperature": None, "top_p": None, "top_k": None, "min_p": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Answer:
    question: str  # as the model gets it
    expected: str
    given: str
    kind: str
    ended: bool  # by itself, not by max_new_tokens

    @property
    def is_exact(self) -> bool:
        return self.ended and self.given.strip() == self.expected.strip()


@dataclasses.dataclass(frozen=True)
class AnswerScore:
    answers: list[Answer]

    @property
    def num_exact(self) -> int:
        return sum(answer.is_exact for answer in self.answers)

    @property
    def exact_match(self) -> float:
        """Share of the answers that are right word for word; 0 of none."""
        return self.num_exact / max(1, len(self.answers))

    def by_kind(self) -> dict[str, float]:
        kinds = defaultdict(list)
        for answer in self.answers:
            kinds[answer.kind].append(answer)
        return {kind: AnswerScore(answers).exact_match for kind, answers in sorted(kinds.items()) if kind}


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """ids of a chat up to where the next answer begins."""
    given: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    return list(given["input_ids"])


def question_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str] | None:
    """ids up to where the last answer begins, and that answer; None for a row without one, or with tools."""
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), list):
        messages = [*row["prompt"], *row["completion"]]
    if messages is not None:
        last = messages[-1]
        if last["role"] != "assistant" or not isinstance(last.get("content"), str) or last.get("tool_calls"):
            return None
        return chat_ids(tokenizer, messages[:-1], **row.get("chat_template_kwargs") or {}), last["content"]
    if isinstance(row.get("prompt"), str):
        return list(tokenizer(row["prompt"])["input_ids"]), row["completion"]
    return None


@torch.no_grad()
def score_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    batch_size: int,
    max_new_tokens: int,
    tell: Callable[[int], object] = lambda count: None,
) -> AnswerScore:
    """Every row of TRL's columns that has an answer, in their order. Mode and cache of the model come back.

    `tell` hears of the number of rows done. Longest questions first, so that what does not fit fails at once.
    """
    asked = [(i, *found) for i, row in enumerate(rows) if (found := question_of(row, tokenizer))]
    answers: dict[int, Answer] = {}
    with answering(model):
        asked.sort(key=lambda item: -len(item[1]))
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            for (i, ids, expected), (text, ended) in zip(
                batch, generate(model, tokenizer, [ids for _, ids, _ in batch], max_new_tokens), strict=True
            ):
                kind = str(rows[i].get("kind") or "")
                answers[i] = Answer(tokenizer.decode(ids), expected, text, kind, ended)
            tell(len(batch))
    return AnswerScore([answers[i] for i in sorted(answers)])


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """The model in eval mode with its cache on; as it was afterwards."""
    was_training, cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        yield
    finally:
        model.train(was_training)
        model.config.use_cache = cache


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: the model's own and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}


def context_of(model: Any) -> int | None:
    """Tokens of prompt and answer together; None where the config names no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    ends: set[int] | None = None,
    **decoding: Any,
) -> list[tuple[str, bool]]:
    """Continuation of every prompt without its special tokens, and whether it ended by itself.

    Greedy where `decoding` does not say otherwise. An answer ends at one of `ends` (default: `ends_of`), after
    `max_new_tokens`, or where the context is full.
    """
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), width), pad, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    ends = ends_of(model, tokenizer) if ends is None else ends
    limit = context_of(model)
    room = max_new_tokens if limit is None else max(1, min(max_new_tokens, limit - width))
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=room, pad_token_id=pad, eos_token_id=sorted(ends),
        **GREEDY | decoding,
    )  # fmt: skip
    texts = []
    for new in out[:, width:].tolist():
        end = next((k for k, i in enumerate(new) if i in ends), None)
        texts.append((tokenizer.decode(new[:end], skip_special_tokens=True), end is not None))
    return texts
