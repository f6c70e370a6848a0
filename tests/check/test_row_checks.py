"""The label audit: its oracle finds contents in any rendering, and clean unusual data is not called broken."""

import os
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from planted.plants_rows import HEADER, after_marker, collate, rendered, trainer_of, with_prompt_masked
from tiny import (
    CHATML,
    CORPUS,
    WORDS,
    arguments,
    bpe_tokenizer,
    chat_rows,
    completion_rows,
    llama,
    lm_trainer,
    sft_trainer,
    text_rows,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from llmkit.check import rows as row_checks
from llmkit.check.attach import from_parts
from llmkit.check.audit import audit_of, conversation, has_answer
from llmkit.check.report import CheckResult
from llmkit.check.runner import Check, get_check, run_one
from llmkit.check.spans import _spans_by_decoding, decode, locate, template_marks, token_spans
from llmkit.check.subject import Subject

IDS = [
    "no-token-trained",
    "prompt-trained",
    "answer-not-trained",
    "eos-not-trained",
    "double-eos",
    "answer-truncated",
    "pad-trained",
    "rows-without-answer",
]
REAL = Path(__file__).parents[3] / "shared" / "data" / "alpaca_en_demo.json"


def statuses(subject: Subject) -> dict[str, str]:
    return {id: run_one(get_check(id), subject).status for id in IDS}


def result(id: str, subject: Subject) -> CheckResult:
    return run_one(get_check(id), subject)


def is_clean(subject: Subject) -> tuple[bool, dict[str, str]]:
    found = statuses(subject)
    return all(status in ("pass", "not_applicable") for status in found.values()), found


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece-like, lower-casing: decoding is not the text that was encoded."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"],
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz.,:;!?\n"),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>")
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    result.chat_template = CHATML
    return result


# the oracle


@pytest.mark.parametrize("make", [bpe_tokenizer, lambda: bpe_tokenizer(bos=True), unigram])
def test_spans_by_decoding_equal_the_tokenizers_offsets(make):
    tokenizer = make()
    ids = tokenizer("The red cat sings.\n\nTwo stones, né?  ", add_special_tokens=False)["input_ids"]
    text, spans = _spans_by_decoding(tokenizer, ids)
    assert text == decode(tokenizer, ids)
    assert all(a <= b for a, b in spans) and spans[-1][1] == len(text)
    joined, given = token_spans(tokenizer, ids)
    assert joined == text and len(given) == len(ids)


@pytest.mark.parametrize("answer", ["A", "4", "user", "assistant", "start", "im", "The same. The same."])
def test_short_answers_are_found_at_their_place_and_not_in_the_markup(answer):
    tokenizer = bpe_tokenizer()
    for template in (CHATML, CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant: ")):
        text = f"<|im_start|>user\nIs it A or 4, user?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        ids = tokenizer(text)["input_ids"]
        text, spans = token_spans(tokenizer, ids)
        opaque = [span for span, i in zip(spans, ids, strict=True) if i in (3, 4)]
        contents = [("user", "Is it A or 4, user?"), ("assistant", answer)]
        anchors = None if template is CHATML else ["<|im_start|>user\n", "<|im_start|>assistant\n"]
        user, found = locate(text, spans, contents, anchors, opaque)
        assert text[: found.start].endswith("assistant\n") and text[found.start : found.end] == answer
        assert text[user.start : user.end] == contents[0][1] and text[user.end :].startswith("<|im_end|>")


def test_a_content_that_breaks_off_is_cut():
    tokenizer = bpe_tokenizer()
    ids = tokenizer("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nThe red ca")["input_ids"]
    text, spans = token_spans(tokenizer, ids)
    parts = locate(text, spans, [("user", "Hi there"), ("assistant", "The red cat sings.")], None, [])
    assert [part.is_cut for part in parts] == [False, True]
    assert parts[1].after == len(ids)


def test_marks_of_chatml_are_read_off_the_template():
    marks = template_marks(bpe_tokenizer())
    assert marks.user_open == "<|im_start|>user\n"
    assert marks.assistant_open == "<|im_end|>\n<|im_start|>assistant\n"
    assert marks.assistant_closes == ("<|im_end|>",)


def test_conversations_are_read_from_every_column():
    assert conversation({"prompt": "a", "completion": "b"}) == [("prompt", "a"), ("completion", "b")]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    assert conversation({"messages": turns}) == [("user", "q"), ("assistant", "a")]
    assert conversation({"prompt": turns, "completion": turns[1:]})[1:] == [("history", "a"), ("assistant", "a")]
    assert conversation({"text": "x"}) == [("text", "x")]
    assert conversation({"input_ids": [1]}) == []
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert has_answer({"messages": [turns[0], call]})
    assert not has_answer({"messages": turns[:1]})


CONVERSATIONS = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in chat_rows()]


@pytest.mark.parametrize(
    "rows, options",
    [
        (chat_rows(turns=2), dict(assistant_only_loss=True)),
        (chat_rows(), {}),
        (chat_rows(), dict(max_length=50)),
        (chat_rows(), dict(max_length=50, truncation_mode="keep_end")),
        (completion_rows(), {}),
        (completion_rows(), dict(completion_only_loss=False)),
        (CONVERSATIONS, {}),
        (text_rows(), {}),
    ],
)
def test_rows_labelled_here_are_those_of_trl(rows, options):
    theirs = from_parts(sft_trainer(rows, **options)).labelled_rows(32)
    given = dict(max_length=128) | options
    ours = from_parts(tokenizer=bpe_tokenizer(), dataset=rows, args=arguments(SFTConfig, **given)).labelled_rows(32)
    assert [(r.input_ids, r.labels) for r in ours] == [(r.input_ids, r.labels) for r in theirs]


def test_rows_that_cannot_be_rendered_are_counted():
    rows = chat_rows()
    rows[3]["messages"] = [{"role": "user"}]
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = CHATML.replace("{% for message", "{{ 0 / messages[1:] | length }}{% for message")
    subject = from_parts(tokenizer=tokenizer, dataset=rows)
    assert len(row_checks.label_rows(subject, 32)) == 31
    found = result("no-token-trained", subject)
    assert found.status == "fail" and "1 cannot be rendered" in found.measured
    assert found.evidence[0]["row"] == 3


# what must not be called broken


@pytest.mark.parametrize(
    "make",
    [
        lambda: sft_trainer(assistant_only_loss=True),
        lambda: sft_trainer(),  # everything is trained
        lambda: sft_trainer(chat_rows(turns=3), assistant_only_loss=True, max_length=512),
        lambda: sft_trainer(completion_rows()),
        lambda: sft_trainer(completion_rows(), completion_only_loss=False),
        lambda: sft_trainer(CONVERSATIONS),
        lambda: sft_trainer(text_rows()),
        lambda: sft_trainer(chat_rows(turns=2), packing=True, assistant_only_loss=True),
        lambda: sft_trainer(chat_rows(turns=2), packing=True, packing_strategy="wrapped"),
        lambda: sft_trainer(padding_free=True, max_length=None),
        lambda: sft_trainer(tokenizer=unigram(), assistant_only_loss=True, max_length=300),
        lambda: sft_trainer(tokenizer=bpe_tokenizer(bos=True), assistant_only_loss=True),
        lambda: sft_trainer(pad_to_multiple_of=8),
        lambda: lm_trainer(),
    ],
)
def test_clean_trainers_pass(make):
    clean, found = is_clean(from_parts(make()))
    assert clean, found


def test_padding_with_eos_is_fine_where_only_padding_is_masked():
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = rendered(tokenizer, chat_rows())
    clean, found = is_clean(from_parts(trainer_of(rows, tokenizer, lambda fs: collate(fs, pad=4))))
    assert clean, found
    clean, found = is_clean(from_parts(sft_trainer(tokenizer=tokenizer, assistant_only_loss=True)))
    assert clean, found


def test_padding_to_one_length_with_eos_is_fine_where_it_is_masked():
    tokenizer = bpe_tokenizer(chat=False)
    tokenizer.pad_token = tokenizer.eos_token
    rows = []
    for row in completion_rows():
        row = with_prompt_masked(row, tokenizer)
        missing = 80 - len(row["input_ids"])
        rows.append({"input_ids": row["input_ids"] + [2] * missing, "labels": row["labels"] + [-100] * missing})
    found = statuses(from_parts(trainer_of(rows, tokenizer)))
    assert found["eos-not-trained"] == "pass" and "fail" not in found.values(), found


def test_training_the_last_turn_only_is_a_choice():
    tokenizer = bpe_tokenizer()
    marker = tokenizer(HEADER)["input_ids"]
    collator = after_marker(marker, "nothing")

    def last(features):
        batch = collator(features)
        for labels in batch["labels"]:
            turns = (labels == 4).nonzero().flatten().tolist()
            labels[: turns[-2] + 1] = -100
        return batch

    rows = [r | m for r, m in zip(rendered(tokenizer, chat_rows(turns=2)), chat_rows(turns=2), strict=True)]
    clean, found = is_clean(from_parts(trainer_of(rows, tokenizer, last)))
    assert clean, found


def test_a_masked_think_block_is_a_choice():
    tokenizer = bpe_tokenizer()
    rows = chat_rows()
    for row in rows:
        row["messages"][1]["content"] = "<think>\nThe cat.\n</think>\n\n" + row["messages"][1]["content"]
    marker = tokenizer("</think>\n\n")["input_ids"]
    encoded = [e | row for e, row in zip(rendered(tokenizer, rows), rows, strict=True)]
    subject = from_parts(trainer_of(encoded, tokenizer, after_marker(marker, "nothing")))
    assert result("answer-not-trained", subject).status == "pass"


def test_a_newline_behind_the_stop_token_and_two_different_stop_tokens_are_fine():
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = CHATML.replace("{% endgeneration %}\n", "\n</s>{% endgeneration %}\n")
    subject = from_parts(sft_trainer(tokenizer=tokenizer, assistant_only_loss=True))
    clean, found = is_clean(subject)
    assert clean, found


def test_text_without_stop_tokens_warns_and_packed_text_does_not_apply():
    tokenizer = bpe_tokenizer(chat=False)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer([r["text"] for r in text_rows()])["input_ids"]]
    assert result("eos-not-trained", from_parts(trainer_of(rows, tokenizer))).status == "warn"
    packed = [{"input_ids": list(range(9 + k, 30 + k)), "labels": list(range(9 + k, 30 + k))} for k in range(20)]
    assert result("eos-not-trained", from_parts(trainer_of(packed, tokenizer))).status == "not_applicable"


def test_a_merge_across_the_join_warns_and_does_not_fail():
    """The prompt ends in r and the completion begins with ed, which is one token: red."""
    tokenizer = bpe_tokenizer(chat=False)
    rows = [{"prompt": r["prompt"] + " r", "completion": "ed" + r["completion"]} for r in completion_rows()]
    subject = from_parts(sft_trainer(rows, tokenizer))
    assert audit_of(subject).rows[0].answers[0].joins  # the merge is there
    found = statuses(subject)
    assert set(found.values()) <= {"pass", "warn"}, found


def test_cut_from_the_front_keeps_the_end():
    subject = from_parts(sft_trainer(assistant_only_loss=True, max_length=50, truncation_mode="keep_end"))
    found = statuses(subject)
    assert found["answer-truncated"] == found["eos-not-trained"] == "pass", found
    assert "fail" not in found.values()


def test_a_few_cut_rows_are_no_fault():
    rows = chat_rows(60)
    rows[5]["messages"][1]["content"] *= 9
    subject = from_parts(sft_trainer(rows, assistant_only_loss=True, max_length=100))
    assert result("answer-truncated", subject).status == "pass"
    assert "fail" not in statuses(subject).values()


def test_completion_only_loss_on_rows_without_completion_trains_prompts():
    """TRL says nothing and masks nothing."""
    found = result("prompt-trained", from_parts(sft_trainer(completion_only_loss=True)))
    assert found.status == "fail"


@pytest.mark.parametrize(
    "offset, prompt, answer", [(0, "pass", "pass"), (-4, "pass", "pass"), (-12, "fail", "pass"), (2, "pass", "fail")]
)
def test_rows_of_which_only_ids_are_known_are_judged_by_their_common_markup(offset, prompt, answer):
    """-4 trains tokens of the markup only, -12 some of the question; the answers begin with unlike words."""
    tokenizer = bpe_tokenizer(chat=False)
    rows = [
        {
            "prompt": r["prompt"].removesuffix("A:") + "A-n-s:",
            "completion": f"{WORDS[k % len(WORDS)]} {r['completion']}",
        }
        for k, r in enumerate(completion_rows(64))
    ]
    rows = [with_prompt_masked(row, tokenizer, offset) for row in rows]
    subject = from_parts(trainer_of([{k: r[k] for k in ("input_ids", "labels")} for r in rows], tokenizer))
    assert result("prompt-trained", subject).status == prompt
    assert result("answer-not-trained", subject).status == answer


def test_other_trainers_do_not_apply():
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "Q: a?", "chosen": " yes", "rejected": " no"}] * 4
    args = arguments(DPOConfig, gradient_checkpointing=False)
    dataset = Dataset.from_list(rows)
    tokenizer = bpe_tokenizer()
    trainer = DPOTrainer(
        llama(), args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=LoraConfig()
    )
    assert set(statuses(from_parts(trainer)).values()) == {"not_applicable"}


def test_a_model_alone_does_not_apply():
    assert set(statuses(from_parts(model=llama())).values()) == {"not_applicable"}


def test_every_check_explains_itself():
    from llmkit.check.runner import SECTIONS, all_checks

    mine: list[Check] = [c for c in all_checks() if c.family in ("rows", "loss")]
    assert len(mine) == 14
    assert all(c.section(name) for c in mine for name in SECTIONS), [(c.id, c.title) for c in mine]


# real rows through a live SFTTrainer


@pytest.mark.medium
@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="alpaca_en_demo.json is not at hand")
@pytest.mark.parametrize(
    "mistake, id",
    [
        pytest.param("", "", marks=pytest.mark.slow),
        pytest.param("no-marks", "no-token-trained", marks=pytest.mark.slow),
        pytest.param("no-eos", "eos-not-trained", marks=pytest.mark.slow),
        pytest.param("short", "answer-truncated", marks=pytest.mark.slow),
        ("pad-is-eos", "eos-not-trained"),
    ],
)
def test_mistakes_in_a_script_on_real_rows_are_caught(mistake, id, monkeypatch):
    """Alpaca rows, a byte BPE trained on them: the mistake's row is shown; the correct script passes everything."""
    from llmkit.check.command import run_command
    from llmkit.verbs import CheckConfig

    script = [sys.executable, str(Path(__file__).parent / "real_sft.py"), str(REAL), *filter(None, [mistake])]
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    report = run_command(CheckConfig(only="rows,loss"), script)
    found = {c.id: c.status for c in report.checks}
    if not mistake:
        assert set(found.values()) <= {"pass", "not_applicable"}, found
        return
    assert found[id] == "fail"
    shown = next(c for c in report.checks if c.id == id).evidence[0]
    assert isinstance(shown["row"], int)
    assert mistake == "short" or shown["text"]
