"""Answers, compared word for word: a model is asked what a data set asks, greedily.

Owns the question and the expected answer of a row, batched greedy generation, and exact match by kind.

    score = score_answers(model, tokenizer, rows, batch_size=32, max_new_tokens=64);  score.exact_match

An answer is what stands before the end of the turn, white space around it aside. Leaves out sampling and judging.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


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


def question_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str] | None:
    """ids up to where the last answer begins, and that answer; None for a row without one, or with tools."""
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), list):
        messages = [*row["prompt"], *row["completion"]]
    if messages is not None:
        last = messages[-1]
        if last["role"] != "assistant" or not isinstance(last.get("content"), str) or last.get("tool_calls"):
            return None
        options = dict(row.get("chat_template_kwargs") or {})
        given: Any = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )
        return list(given["input_ids"]), last["content"]
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
    was_training, cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        asked.sort(key=lambda item: -len(item[1]))
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            for (i, ids, expected), (text, ended) in zip(
                batch, _generate(model, tokenizer, [ids for _, ids, _ in batch], max_new_tokens), strict=True
            ):
                kind = str(rows[i].get("kind") or "")
                answers[i] = Answer(tokenizer.decode(ids), expected, text, kind, ended)
            tell(len(batch))
    finally:
        model.train(was_training)
        model.config.use_cache = cache
    return AnswerScore([answers[i] for i in sorted(answers)])


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy continuation of every prompt without its special tokens, and whether it ended by itself."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), width), pad, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    limit = getattr(model.config, "max_position_embeddings", None)
    room = max_new_tokens if limit is None else max(1, min(max_new_tokens, limit - width))
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=pad,
        eos_token_id=sorted(ends), temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    texts = []
    for new in out[:, width:].tolist():
        end = next((k for k, i in enumerate(new) if i in ends), None)
        texts.append((tokenizer.decode(new[:end], skip_special_tokens=True), end is not None))
    return texts
