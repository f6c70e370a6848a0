"""toyworld as lm-eval tasks: held-out questions that are answered in words, and continuations that are scored.

Rows are those of the split `test`, which no stage trains on and no recipe validates on.
"""

import random
from functools import cache
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from llmkit.data import toychat, toyworld


def questions(kind: str, num_items: int, **_: Any) -> dict[str, Dataset]:
    """{"test": messages and answer} of one kind of question."""
    return {"test": Dataset.from_list(list(_questions(kind, num_items)))}


@cache
def _questions(kind: str, num_items: int) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = []
    index = 0
    while len(found) < num_items:
        row = toychat.row("prompts", "test", index)
        index += 1
        if row["kind"] == kind:
            found.append({"messages": row["prompt"], "answer": row["answer"]})
    return tuple(found)


def transcript(doc: dict[str, Any]) -> str:
    """The conversation without a template: what is told, Q: and A:."""
    marks = {"system": "{}\n", "user": "Q: {}\n", "assistant": "A: {}\n"}
    return "".join(marks[m["role"]].format(m["content"]) for m in doc["messages"]) + "A:"


class Questions(ConfigurableTask):
    """Whole conversations as chats, with their system prompt and turns; an answer is right word for word."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **how: Any) -> str:
        if how.get("apply_chat_template"):
            system = how.get("system_instruction")
            first = [{"role": "system", "content": system}] if system and doc["messages"][0]["role"] != "system" else []
            return str(how["chat_template"]([*first, *doc["messages"]]))
        return transcript(doc)

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        return {"exact_match": float(results[0].strip() == doc["answer"])}


def recall(**_: Any) -> dict[str, Dataset]:
    """Every fact of every town in both of pretraining's wordings, to be told from the facts of the other towns."""
    rows = []
    for town, facts in toyworld.WORLD.towns.items():
        for topic, wordings in toyworld.TOWN_FACTS.items():
            options = sorted({others[topic] for others in toyworld.WORLD.towns.values()})
            for wording in wordings:
                before = wording.split(" {}")[0]
                text = f"{town} is a small town. {before}"
                rows.append({"text": text, "choices": options, "answer": options.index(facts[topic])})
    return {"test": Dataset.from_list(rows)}


def counting(num_items: int, **_: Any) -> dict[str, Dataset]:
    """A running count, its last total to be told from all others."""
    rows = []
    for index in range(num_items):
        document = toyworld.document("arithmetic", "test", index).text
        sentences = document.removesuffix(".").split(". ")
        told = ". ".join(sentences[: random.Random(index).randint(2, len(sentences))])
        text, total = told.rsplit(" ", 1)
        totals = [str(n) for n in range(toyworld.WORLD.largest_number + 1)]
        rows.append({"text": text, "choices": totals, "answer": totals.index(total)})
    return {"test": Dataset.from_list(rows)}
