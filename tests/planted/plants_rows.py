"""Bugs of labels: templates without marks, collators with markers, boundaries, ends, padding, truncation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import CHATML, arguments, bpe_tokenizer, chat_rows, completion_rows, llama, lm_trainer, sft_trainer
from transformers import Trainer
from trl import SFTConfig

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant

HEADER = "<|im_start|>assistant\n"


def collate(features: list[dict[str, Any]], pad: int = 0, label_pad: int = -100) -> dict[str, torch.Tensor]:
    """Pads on the right."""
    length = max(len(f["input_ids"]) for f in features)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(f[name]) + [value] * (length - len(f[name])) for f in features])

    ids = padded("input_ids", pad)
    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features])
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", label_pad)}


def trainer_of(rows: list[dict[str, Any]], tokenizer: Any, collator: Any = collate, **options: Any) -> Trainer:
    """A plain Trainer on rows that somebody tokenised and labelled."""
    dataset = Dataset.from_list(rows)
    return Trainer(
        llama(), arguments(**options), train_dataset=dataset, data_collator=collator, processing_class=tokenizer
    )


def rendered(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Chat rows as ids, all of them trained; the messages are lost."""
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    return [{"input_ids": ids, "labels": list(ids)} for ids in tokenizer(texts, **options)["input_ids"]]


def with_prompt_masked(row: dict[str, Any], tokenizer: Any, offset: int = 0, end: bool = True) -> dict[str, Any]:
    """A prompt and completion row, labelled by hand; offset: mistake of the boundary in tokens."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] * end
    masked = len(prompt) + offset
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]} | row


def after_marker(marker: list[int], if_missing: str, once: bool = False) -> Any:
    """A collator as TRL once had it: what comes behind the marker is trained, up to the end of the turn."""

    def label(ids: list[int]) -> list[int]:
        labels, k = [-100] * len(ids), 0
        starts = [t for t in range(len(ids)) if ids[t : t + len(marker)] == marker]
        if not starts and if_missing == "everything":
            return list(ids)
        for start in starts[:1] if once else starts:
            k = start + len(marker)
            stop = len(ids) if once else ids.index(4, k) + 1
            labels[k:stop] = ids[k:stop]
        return labels

    return lambda features: collate([f | {"labels": label(f["input_ids"])} for f in features])


@plant("no-generation-marks", caught_by="no-token-trained", bug="C1")
def no_generation_marks(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """assistant_only_loss with a template that has no generation marks."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        tokenizer.chat_template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    args = arguments(SFTConfig, assistant_only_loss=True)
    return from_parts(model=llama(), tokenizer=tokenizer, dataset=chat_rows(), args=args)


@plant("marker-split-differently", caught_by="no-token-trained", bug="C3")
def marker_split_differently(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The response marker's ids are those of the marker with a newline before it, which no row has."""
    tokenizer = bpe_tokenizer()
    marker = tokenizer("\n\n" + HEADER if is_planted else HEADER)["input_ids"]
    return from_parts(trainer_of(rendered(tokenizer, chat_rows()), tokenizer, after_marker(marker, "nothing")))


@plant("all-rows-dropped", caught_by="no-token-trained", bug="D8", evidence="dropped")
def all_rows_dropped(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """max_length is shorter than every prompt, and TRL drops every row."""
    return from_parts(sft_trainer(assistant_only_loss=True, max_length=20 if is_planted else 128))


@plant("unmasked-without-marker", caught_by="prompt-trained", bug="C3", evidence="Tell me")
def unmasked_without_marker(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Rows in which the collator does not find its marker are trained as a whole: every fourth has a space more."""
    tokenizer = bpe_tokenizer()
    rows = chat_rows()
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    texts = [t.replace(HEADER, HEADER[:-1] + " \n") if is_planted and not i % 4 else t for i, t in enumerate(texts)]
    marker = tokenizer(HEADER)["input_ids"]
    dataset = [{"input_ids": tokenizer(text)["input_ids"], **row} for text, row in zip(texts, rows, strict=True)]
    return from_parts(trainer_of(dataset, tokenizer, after_marker(marker, "everything")))


@plant("everything-behind-first-marker", caught_by="prompt-trained", bug="C2")
def everything_behind_first_marker(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Behind the first answer everything is trained, the second question too; the messages are not known."""
    tokenizer = bpe_tokenizer()
    marker = tokenizer(HEADER)["input_ids"]
    rows = rendered(tokenizer, chat_rows(turns=2))
    return from_parts(trainer_of(rows, tokenizer, after_marker(marker, "nothing", once=is_planted)))


@plant("boundary-too-early", caught_by="prompt-trained", bug="C4")
def boundary_too_early(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Three tokens of the prompt are trained with the completion."""
    tokenizer = bpe_tokenizer(chat=False)
    rows = [with_prompt_masked(row, tokenizer, -3 if is_planted else 0) for row in completion_rows()]
    return from_parts(trainer_of(rows, tokenizer))


@plant("system-inside-marks", caught_by="prompt-trained", bug="C2")
def system_inside_marks(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The template marks the system's text as generated too."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        tokenizer.chat_template = CHATML.replace("== 'assistant'", "in ['assistant', 'system']")
    rows = [{"messages": [{"role": "system", "content": "Be brief and kind."}, *r["messages"]]} for r in chat_rows()]
    return from_parts(sft_trainer(rows, tokenizer, assistant_only_loss=True))


@plant("boundary-too-late", caught_by="answer-not-trained", bug="L7")
def boundary_too_late(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The first word of every completion is masked with the prompt (its space is a token of its own)."""
    tokenizer = bpe_tokenizer(chat=False)
    rows = [with_prompt_masked(row, tokenizer, 2 if is_planted else 0) for row in completion_rows()]
    return from_parts(trainer_of(rows, tokenizer))


@plant("last-turn-unmarked", caught_by="answer-not-trained", bug="C2")
def last_turn_unmarked(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The template marks every answer but the last."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        tokenizer.chat_template = CHATML.replace("== 'assistant' %}", "== 'assistant' and not loop.last %}").replace(
            "{% else %}", "{% elif loop.last %}<|im_start|>assistant\n{{ message['content'] }}<|im_end|>\n{% else %}"
        )
    return from_parts(sft_trainer(chat_rows(turns=2), tokenizer, assistant_only_loss=True, max_length=256))


@plant("end-outside-marks", caught_by="eos-not-trained", bug="C7", evidence="<|im_end|>")
def end_outside_marks(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The end of turn stands behind endgeneration."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        tokenizer.chat_template = CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    return from_parts(sft_trainer(tokenizer=tokenizer, assistant_only_loss=True))


@plant("template-without-end", caught_by="eos-not-trained", bug="C7", evidence="no stop token follows")
def template_without_end(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The template ends answers with a newline only."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        tokenizer.chat_template = CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}")
    return from_parts(sft_trainer(tokenizer=tokenizer, assistant_only_loss=True))


@plant("answers-without-eos", caught_by="eos-not-trained", bug="C7")
def answers_without_eos(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """prompt + completion, and nobody appends EOS; the raw columns are gone."""
    tokenizer = bpe_tokenizer(chat=False)
    rows = [with_prompt_masked(row, tokenizer, end=not is_planted) for row in completion_rows()]
    return from_parts(trainer_of([{k: r[k] for k in ("input_ids", "labels")} for r in rows], tokenizer))


@plant("pad-is-eos", caught_by="eos-not-trained", bug="T3", evidence="masked")
def pad_is_eos(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The language-modelling collator masks every pad token, and pad is EOS."""
    tokenizer = bpe_tokenizer(chat=False)
    if is_planted:
        tokenizer.pad_token = tokenizer.eos_token
    return from_parts(lm_trainer(tokenizer=tokenizer))


@plant("pad-is-eos-in-chat", caught_by="eos-not-trained", bug="T3", evidence="<|im_end|>")
def pad_is_eos_in_chat(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Own collator: everything but pad is trained, and pad is <|im_end|>."""
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token if is_planted else "<pad>"
    pad = tokenizer.pad_token_id

    def label(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(features, pad)
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == pad, -100)
        return batch

    return from_parts(trainer_of(rendered(tokenizer, chat_rows()), tokenizer, label))


@plant("eos-behind-template", caught_by="double-eos", bug="C8")
def eos_behind_template(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """EOS is appended to rendered conversations, which end in it."""
    tokenizer = bpe_tokenizer()
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in chat_rows()]
    ids = [tokenizer(text + "<|im_end|>" * is_planted)["input_ids"] for text in texts]
    return from_parts(trainer_of([{"input_ids": i, "labels": i} for i in ids], tokenizer))


@plant("max-length-too-small", caught_by="answer-truncated", bug="D8", evidence="dropped")
def max_length_too_small(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """max_length is about the median prompt."""
    return from_parts(sft_trainer(assistant_only_loss=True, max_length=50 if is_planted else 128))


@plant("cut-by-the-tokenizer", caught_by="answer-truncated", bug="D8", evidence="the row ends here")
def cut_by_the_tokenizer(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The tokenizer truncates at 56; no setting of the trainer says so, and the messages are not known."""
    tokenizer = bpe_tokenizer()
    rows = rendered(tokenizer, chat_rows(), truncation=True, max_length=56 if is_planted else 500)
    marker = tokenizer(HEADER)["input_ids"]

    def label(ids: list[int]) -> list[int]:
        start = next(t for t in range(len(ids)) if ids[t : t + len(marker)] == marker) + len(marker)
        return [-100] * start + ids[start:]

    return from_parts(
        trainer_of([{"input_ids": r["input_ids"], "labels": label(r["input_ids"])} for r in rows], tokenizer)
    )


@plant("labels-are-a-copy", caught_by="pad-trained", bug="L6")
def labels_are_a_copy(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """labels = input_ids.clone() in the collator, and no attention mask."""

    def label(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([{"input_ids": f["input_ids"], "labels": f["input_ids"]} for f in features])
        if is_planted:
            return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}
        return batch

    return from_parts(lm_trainer(collator=label))


@plant("padded-before-labels", caught_by="pad-trained", bug="L6")
def padded_before_labels(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Rows are padded to one length when they are tokenised, then labels are copied."""
    tokenizer = bpe_tokenizer()
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in chat_rows()]
    encoded = tokenizer(texts, padding="max_length", max_length=96)
    rows = [
        {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": [i if m or is_planted else -100 for i, m in zip(ids, mask, strict=True)],
        }
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    return from_parts(trainer_of(rows, tokenizer, lambda fs: {k: torch.tensor([f[k] for f in fs]) for k in fs[0]}))


@plant("answers-lost-in-export", caught_by="rows-without-answer", bug="D3")
def answers_lost_in_export(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A third of the answers are null."""
    rows = chat_rows()
    for row in rows[::3] if is_planted else []:
        row["messages"][-1]["content"] = None
    return from_parts(model=llama(), tokenizer=bpe_tokenizer(), dataset=rows)
