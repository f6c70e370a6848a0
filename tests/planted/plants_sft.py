"""Bugs of a chat model, planted in what `llmkit sft` builds of a recipe: template, labels, batches, loss, resume.

The subject is the recipe's own, so that the twins show our trainer to be clean where others have the bug.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer

from llmkit.align import job, preflight, rows
from llmkit.align.trainer import ByToken
from llmkit.check.subject import Subject
from llmkit.data.template import CHATML
from llmkit.tuning import SftConfig
from planted.plant import plant


def recipe(folder: Path, template: str = CHATML, given: list | None = None, tier: int = 2, **keys: Any) -> Subject:
    """Of a recipe on a tiny Llama whose tokenizer opens texts with BOS; chats of two turns."""
    tiny.llama().save_pretrained(folder / "base")
    tiny.bpe_tokenizer(bos=True, chat=False).save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, given or tiny.chat_rows(24, turns=2))))
    (folder / "template.jinja").write_text(template)
    settings = dict(
        output_dir=str(folder / "run"), model_name_or_path=str(folder / "base"), data_dir=str(folder),
        datasets=[{"path": "json", "data_files": "rows.jsonl"}], chat_template_path=str(folder / "template.jinja"),
        test_split_size=0.25, max_length=256, max_steps=8, per_device_train_batch_size=2, learning_rate=1e-3,
        use_cpu=True, max_bad_rows=24,
    )  # fmt: skip
    return preflight.get_subject(SftConfig(**settings | keys), tier)


def edited(is_planted: bool, before: str, after: str) -> str:
    assert before in CHATML
    return CHATML.replace(before, after) if is_planted else CHATML


# ---- the template


@plant("sft-header-of-generation", caught_by="generation-prompt-mismatch", bug="C5", evidence="assistant")
def header_of_generation(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Generation opens the answer with another header than training."""
    before = "if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    return recipe(folder, edited(is_planted, before, before.replace("assistant", "answer")), tier=0)


@plant("sft-system-skipped", caught_by="template-alters-content", bug="C10", evidence="system")
def system_skipped(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The system prompt never reaches the model."""
    skip = "{%- elif message['role'] != 'system' -%}"
    return recipe(folder, edited(is_planted, "{%- else -%}", skip), tier=0)


@plant("sft-two-bos", caught_by="double-bos", bug="T4")
def two_bos(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The rendered text, which has a BOS already, goes through the tokenizer, which adds another."""
    subject = recipe(folder)
    if is_planted:
        dataset = subject.training.trainer.train_dataset
        bos = subject.tokenizer.bos_token_id
        subject.training.trainer.train_dataset = dataset.map(
            lambda row: {"input_ids": [bos, *row["input_ids"]], "labels": [-100, *row["labels"]]}
        )
    return subject


@plant("sft-end-outside-marks", caught_by="eos-not-trained", bug="C7", evidence="<|im_end|>")
def end_outside_marks(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The end of the turn stands behind the generation marks: the model never learns to stop."""
    inside = "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    outside = "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}"
    return recipe(folder, edited(is_planted, inside, outside))


@plant("sft-marks-around-all", caught_by="prompt-trained", bug="C2")
def marks_around_all(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The marks enclose the questions as well."""
    before = "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    return recipe(folder, edited(is_planted, before, f"{{%- generation -%}}{before}{{%- endgeneration -%}}"))


@plant("sft-last-answer-only", caught_by="answer-not-trained", bug="C2", status="warn", evidence="last turn only")
def last_answer_only(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Marks for the last answer alone, in chats of two."""
    before = "{%- if message['role'] == 'assistant' -%}"
    return recipe(folder, edited(is_planted, before, before.replace("'assistant' ", "'assistant' and loop.last ")))


# ---- labels


@plant("sft-labels-too-early", caught_by="prompt-trained", bug="C4")
def labels_too_early(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Training begins twenty tokens before the answer."""
    tokenize = rows.tokenize_row

    def early(*given: Any) -> tuple[list[int], list[bool]]:
        ids, mask = tokenize(*given)
        return ids, [any(mask[k : k + 21]) for k in range(len(mask))]

    if is_planted:
        patch.setattr(rows, "tokenize_row", early)
    return recipe(folder)


@plant("sft-cut-in-silence", caught_by="answer-truncated", bug="D8")
def cut_in_silence(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Rows are cut to max_length, as TRL does, instead of being left out and counted."""
    if is_planted:
        label = rows.Labeller.__call__

        def cut(self: Any, row: dict[str, Any]) -> dict[str, Any]:
            self.can_be_long = True
            return {name: ids[:100] for name, ids in label(self, row).items()}

        patch.setattr(rows.Labeller, "__call__", cut)
    return recipe(folder, given=[*tiny.chat_rows(12), *tiny.chat_rows(12, turns=3)], max_length=100)


# ---- batches and loss


@plant("sft-packed-rows-see-each-other", caught_by="packed-documents-leak", bug="M5")
def packed_rows_see_each_other(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The packed batch loses the positions that keep its rows apart."""
    collate = rows.PackedCollator.__call__

    def without_positions(self: Any, given: list) -> dict[str, Any]:
        batch = collate(self, given)
        width = batch["input_ids"].shape[1]
        return batch | {"position_ids": torch.arange(width).expand_as(batch["input_ids"]).clone()}

    if is_planted:
        patch.setattr(rows.PackedCollator, "__call__", without_positions)
    return recipe(folder, packing=True)


@plant("sft-padding-trained", caught_by="pad-trained", bug="L6")
def padding_trained(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Padding of a packed batch is labelled."""
    collate = rows.PackedCollator.__call__

    def labelled(self: Any, given: list) -> dict[str, Any]:
        batch = collate(self, given)
        for i, row in enumerate(given):
            batch["labels"][i, len(row["input_ids"]) :] = self.pad_token_id
        return batch

    if is_planted:
        patch.setattr(rows.PackedCollator, "__call__", labelled)
    return recipe(folder, packing=True, max_length=200)


@plant("sft-mean-of-means", caught_by="accumulation-changes-gradient", bug="L4")
def mean_of_means(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The number of tokens in the whole batch is not passed on: every micro-batch is its own mean."""
    if is_planted:
        compute = ByToken.compute_loss

        def alone(
            self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return compute(self, model, inputs, return_outputs, None)

        patch.setattr(ByToken, "compute_loss", alone)
    given = [*tiny.chat_rows(12), *tiny.chat_rows(12, turns=3)]
    return recipe(folder, given=given, gradient_accumulation_steps=4)


# ---- adapters and resuming


@plant("sft-adapter-frozen", caught_by="lora-gets-no-gradient", bug="O4", evidence="lora_")
def adapter_frozen(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Half of the adapter is frozen before the trainer sees it."""
    make = job.get_model

    def frozen(*given: Any) -> Any:
        model, notes = make(*given)
        for module in model.modules():  # a layer whose adapter nothing reaches
            if is_planted and hasattr(module, "lora_B") and len(module.lora_B):
                module.scaling = {"default": 0.0}
        return model, notes

    patch.setattr(job, "get_model", frozen)
    return recipe(folder, use_peft=True)


@plant("sft-resume-without-moments", caught_by="resume-optimizer", bug="R4", evidence="exp_avg")
def resume_without_moments(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The optimiser's file is deleted from checkpoints to save room."""
    save = Trainer._save_checkpoint

    def thin(self: Any, *given: Any, **keys: Any) -> None:
        save(self, *given, **keys)
        for path in Path(self.args.output_dir).glob("checkpoint-*/optimizer.pt"):
            path.unlink()

    if is_planted:
        patch.setattr(Trainer, "_save_checkpoint", thin)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return recipe(folder)
