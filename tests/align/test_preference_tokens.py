"""Tokens of preferences: those of TRL's own trainers; no row is cut, or matched with its own prompt's answer."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset

from llmkit.align import reward_model
from llmkit.align.job import make_console
from llmkit.align.preferences import (
    LabelledEncoder,
    PairEncoder,
    PromptEncoder,
    RankedCollator,
    RankedEncoder,
    RewardEncoder,
    as_prompts,
    mismatched,
    with_margins,
)
from llmkit.align.rows import IDS, IGNORE, CannotTrain, bad_note, get_data
from llmkit.config import UserError
from llmkit.tuning import DpoConfig, GrpoConfig, KtoConfig, RewardConfig, RrhfConfig


def settings(cls=DpoConfig, **given):
    return cls(**{"output_dir": "x", "model_name_or_path": "y", "max_length": 256} | given)


def says(text):
    return [{"role": "assistant", "content": text}]


def chat_pairs(count=4, turns=1):
    chats = [row["messages"] for row in tiny.chat_rows(count, turns)]
    return [{"prompt": m[:-1], "chosen": m[-1:], "rejected": says(f"two {k} bird")} for k, m in enumerate(chats)]


def text_pairs(count=4):
    """Answers that begin alike, in the middle of a word: they part later than the prompt ends."""
    rows = tiny.completion_rows(count)
    return [row | {"chosen": row["completion"], "rejected": f"{row['completion'][:9]} two"} for row in rows]


def glued_pairs():
    """A prompt that ends in the middle of a token of one answer, and not of the other's."""
    answers = ("d cat", " dog")
    return [{"prompt": "Q: The re", "chosen": a, "rejected": b} for a, b in (answers, answers[::-1])]


ROWS = {
    "chat": chat_pairs(),
    "chat with turns and a system prompt": [
        row | {"prompt": [{"role": "system", "content": "Be small."}, *row["prompt"]]} for row in chat_pairs(4, turns=2)
    ],
    "text": [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in text_pairs()],
    "text across a token": glued_pairs(),
}


def labelled(rows):
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]


def prepared(trainer, config, rows, **more):
    """What TRL's trainer makes of rows, untrained."""
    arguments = tiny.arguments(config, max_length=256, gradient_checkpointing=False)
    return trainer(
        args=arguments, processing_class=tiny.bpe_tokenizer(), train_dataset=Dataset.from_list(rows), **more
    ).train_dataset


def same(encoder, rows, theirs, columns):
    assert len(theirs) == len(rows)
    for row, expected in zip(rows, theirs, strict=True):
        ours = encoder(row)
        assert {name: ours[name] for name in columns} == {name: expected[name] for name in columns}


@pytest.mark.medium
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_tokens_of_pairs_are_those_of_trls_dpo_trainer(rows):
    from trl import DPOConfig, DPOTrainer

    theirs = prepared(DPOTrainer, DPOConfig, rows, model=tiny.llama(), ref_model=tiny.llama())
    same(PairEncoder(tiny.bpe_tokenizer(), settings()), rows, theirs, ("prompt_ids", "chosen_ids", "rejected_ids"))


@pytest.mark.medium
@pytest.mark.parametrize("rows", map(labelled, ROWS.values()), ids=ROWS)
def test_tokens_of_labelled_answers_are_those_of_trls_kto_trainer(rows):
    from trl import KTOConfig, KTOTrainer

    theirs = prepared(KTOTrainer, KTOConfig, rows, model=tiny.llama(), ref_model=tiny.llama())
    encoder = LabelledEncoder(tiny.bpe_tokenizer(), settings(KtoConfig))
    same(encoder, rows, theirs, ("prompt_ids", "completion_ids", "label"))


def classifier():
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(tiny.llama(num_labels=1).config)


@pytest.mark.medium
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_tokens_of_a_reward_model_are_those_of_trls_reward_trainer(rows):
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer

    theirs = prepared(RewardTrainer, Arguments, rows, model=classifier())
    same(RewardEncoder(tiny.bpe_tokenizer(), settings(RewardConfig)), rows, theirs, ("chosen_ids", "rejected_ids"))


def test_a_prompt_ends_where_the_tokens_of_an_answer_begin_to_differ():
    """`The re` + `d cat` is `The red cat`: of `re` nothing is left in the prompt, for both answers."""
    tokenizer = tiny.bpe_tokenizer()
    ids = PairEncoder(tokenizer, settings())(glued_pairs()[0])
    said = [tokenizer.decode(ids[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert said == ["Q: The", " red cat<|im_end|>", " re dog<|im_end|>"]


def test_an_answer_ends_with_its_end_of_turn_and_a_prompt_with_the_opening_of_one():
    tokenizer = tiny.bpe_tokenizer()
    row = chat_pairs(1)[0]
    ids = PairEncoder(tokenizer, settings())(row)
    asked, answer = row["prompt"][0]["content"], row["chosen"][0]["content"]
    opened = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids["prompt_ids"]) == opened
    assert tokenizer.decode(ids["chosen_ids"]).rstrip("\n") == f"{answer}<|im_end|>"
    assert tokenizer.decode(ids["rejected_ids"]).rstrip("\n") == "two 0 bird<|im_end|>"
    whole = RewardEncoder(tokenizer, settings(RewardConfig))(row)
    assert tokenizer.decode(whole["chosen_ids"]).rstrip("\n") == f"{opened}{answer}<|im_end|>"


def test_ranked_answers_have_the_tokens_of_pairs():
    for rows in ROWS.values():
        for row in rows:
            pair = PairEncoder(tiny.bpe_tokenizer(), settings())(row)
            given = {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "scores": [0.0, 2.5]}
            assert RankedEncoder(tiny.bpe_tokenizer(), settings(RrhfConfig))(given) == {
                "prompt_ids": pair["prompt_ids"],
                "completion_ids": [pair["rejected_ids"], pair["chosen_ids"]],
                "scores": [0.0, 2.5],
            }


def test_what_is_counted_as_trained_is_the_answers():
    tokenizer = tiny.bpe_tokenizer()
    encoder = PairEncoder(tokenizer, settings())
    columns = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    assert encoder.sequences(columns) == [([5, 6, 7], [IGNORE, IGNORE, 7]), ([5, 6, 8, 9], [IGNORE, IGNORE, 8, 9])]
    columns = {"prompt_ids": [5], "completion_ids": [7, 8], "label": True}
    assert LabelledEncoder(tokenizer, settings()).sequences(columns) == [([5, 7, 8], [IGNORE, 7, 8])]
    columns = {"prompt_ids": [5], "completion_ids": [[7], [8]], "scores": [1.0, 0.0]}
    assert RankedEncoder(tokenizer, settings()).sequences(columns) == [([5, 7], [IGNORE, 7]), ([5, 8], [IGNORE, 8])]
    columns = {"chosen_ids": [5, 7], "rejected_ids": [5, 8], "margin": None}
    assert RewardEncoder(tokenizer, settings()).sequences(columns) == [([5, 7], [5, 7]), ([5, 8], [5, 8])]
    assert PromptEncoder(tokenizer, settings(GrpoConfig)).sequences({"prompt_ids": [5]}) == [([5], [IGNORE])]


# ---- rows that are left out


@pytest.mark.parametrize(("encoder", "cls"), [(PairEncoder, DpoConfig), (RewardEncoder, RewardConfig)])
@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_is_as_long_as_its_longer_answer_and_never_cut(encoder, cls, longer):
    row = chat_pairs(1)[0] | {longer: says("small " * 20)}
    ids = PairEncoder(tiny.bpe_tokenizer(), settings(max_length=1000))(row)
    size = len(ids["prompt_ids"]) + len(ids[f"{longer}_ids"])
    assert encoder(tiny.bpe_tokenizer(), settings(cls, max_length=size))(row)
    with pytest.raises(CannotTrain, match=rf"^longer than max_length={size - 1}$"):
        encoder(tiny.bpe_tokenizer(), settings(cls, max_length=size - 1))(row)


def test_every_answer_may_be_too_long():
    tokenizer = tiny.bpe_tokenizer()
    answer = {"prompt": "a ", "completion": "cat " * 40, "label": True}
    with pytest.raises(CannotTrain, match=r"^longer than max_length=32$"):
        LabelledEncoder(tokenizer, settings(KtoConfig, max_length=32))(answer)
    row = {"prompt": "a ", "completions": ["cat", "dog", "cat " * 40], "scores": [2.0, 1.0, 0.0]}
    with pytest.raises(CannotTrain, match=r"^longer than max_length=32$"):
        RankedEncoder(tokenizer, settings(RrhfConfig, max_length=32))(row)


@pytest.mark.parametrize("prompt", [chat_pairs(1)[0]["prompt"], "The red cat sings. The old dog runs."])
def test_a_prompt_leaves_room_for_the_answer(prompt):
    tokenizer = tiny.bpe_tokenizer()

    def encoder(room):
        return PromptEncoder(tokenizer, settings(GrpoConfig, max_length=room + 30, max_completion_length=30))

    ids = encoder(98)({"prompt": prompt})["prompt_ids"]
    said = (
        f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n" if prompt[0] != "T" else prompt
    )
    assert tokenizer.decode(ids) == said
    assert encoder(len(ids))({"prompt": prompt}) == {"prompt_ids": ids}
    room = len(ids) - 1
    with pytest.raises(CannotTrain, match=rf"^longer than max_length - max_completion_length={room}$"):
        encoder(room)({"prompt": prompt})


def test_a_prompt_is_written_with_the_options_that_the_trainer_gives_the_template():
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.chat_template = tiny.CHATML + "{% if terse %}red{% endif %}"
    row = {"prompt": chat_pairs(1)[0]["prompt"]}
    plain = PromptEncoder(tokenizer, settings(GrpoConfig, max_length=512))(row)["prompt_ids"]
    passed_on = {"chat_template_kwargs": {"terse": True}}
    given = PromptEncoder(tokenizer, settings(GrpoConfig, max_length=512, passed_on=passed_on))(row)["prompt_ids"]
    assert tokenizer.decode(given) == tokenizer.decode(plain) + "red"


def test_what_the_template_refuses_and_what_has_no_tokens_is_said():
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(CannotTrain, match=r"^the chat template refuses it \(no system turns here\)$"):
        PairEncoder(tokenizer, settings())(chat_pairs(1)[0])
    with pytest.raises(CannotTrain, match=r"^the chat template refuses it \(no system turns here\)$"):
        PromptEncoder(tokenizer, settings(GrpoConfig, max_length=512))({"prompt": chat_pairs(1)[0]["prompt"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"  # never writes an answer
    with pytest.raises(CannotTrain, match=r"^no token of an answer$"):
        PairEncoder(tokenizer, settings())(chat_pairs(1)[0])
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"  # never writes the prompt
    with pytest.raises(CannotTrain, match=r"^no token of the prompt before the answer$"):
        PairEncoder(tokenizer, settings())(chat_pairs(1)[0])
    with pytest.raises(CannotTrain, match=r"^chosen = rejected as tokens$"):
        PairEncoder(tiny.bpe_tokenizer(), settings())({"prompt": "a ", "chosen": "cat", "rejected": "cat<|im_end|>"})


def write(folder, rows, name="rows.jsonl", **entry):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return {"path": "json", "data_files": name} | entry


ROW = chat_pairs(1)[0]
BAD = [
    ROW | {"rejected": ROW["chosen"]},
    ROW | {"chosen": says(" ")},
    ROW | {"chosen": says("cat " * 300)},
    ROW | {"rejected": says("dog " * 300)},
    {"chosen": ROW["chosen"], "rejected": ROW["rejected"]},
]
COUNTED = "1 chosen = rejected, 1 empty answer, 2 longer than max_length=256, 1 no prompt"


@pytest.mark.parametrize(("encoder", "cls"), [(PairEncoder, DpoConfig), (RewardEncoder, RewardConfig)])
def test_bad_rows_up_to_max_bad_rows_are_counted_with_their_reasons(tmp_path, encoder, cls):
    config = settings(
        cls, data_dir=str(tmp_path), datasets=[write(tmp_path, [ROW, *BAD, *chat_pairs()])], max_bad_rows=5
    )
    data = get_data(config, encoder(tiny.bpe_tokenizer(), config))
    assert data.train["row"][:] == [1, 7, 8, 9, 10] and bad_note(data) == [
        f"left out  json rows.jsonl train: {COUNTED}"
    ]
    assert data.notes == ["data      json rows.jsonl train: 5 rows, chat, chosen against rejected answers"]
    assert json.loads(data.train["raw"][0]) == ROW | {"row": 1}


def test_a_bad_pair_is_one_bad_row_though_it_would_make_two(tmp_path):
    config = settings(KtoConfig, data_dir=str(tmp_path), datasets=[write(tmp_path, [ROW, BAD[0], BAD[3]])])
    with pytest.raises(UserError) as error:
        get_data(config, LabelledEncoder(tiny.bpe_tokenizer(), config))
    assert str(error.value).startswith(
        "max_bad_rows=0: 2 rows cannot be trained on: json rows.jsonl train: 1 x chosen = rejected (first: row 2); "
        "json rows.jsonl train: 1 x longer than max_length=256 (first: row 3); mend"
    )


def test_bad_rows_above_max_bad_rows_are_an_error_that_names_the_first_of_each_problem(tmp_path):
    config = settings(data_dir=str(tmp_path), datasets=[write(tmp_path, [ROW, *BAD])], max_bad_rows=4)
    with pytest.raises(UserError) as error:
        get_data(config, PairEncoder(tiny.bpe_tokenizer(), config))
    said = str(error.value)
    assert said.startswith("max_bad_rows=4: 5 rows cannot be trained on: json rows.jsonl train: 1 x chosen = rejected")
    for part in ("(first: row 2)", "1 x empty answer (first: row 3)", "2 x longer than max_length=256 (first: row 4)"):
        assert part in said
    assert said.endswith("1 x no prompt (first: row 6); mend them, or leave them out by max_bad_rows: 5")


def test_tokens_are_counted_of_both_answers(tmp_path):
    """Two rows of a batch begin with the same prompt, which is read twice."""
    config = settings(data_dir=str(tmp_path), datasets=[write(tmp_path, chat_pairs(3))])
    data = get_data(config, PairEncoder(tiny.bpe_tokenizer(), config))
    rows = list(data.train)
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    facts = data.facts["train"]
    assert facts["rows"] == 3 and facts["trained_tokens"] == answers
    assert facts["tokens"] == answers + 2 * sum(len(row["prompt_ids"]) for row in rows)


def test_prompts_come_back_with_their_columns_in_the_order_of_the_rows(tmp_path):
    rows = [{"prompt": row["prompt"], "answer": f"a{k}"} for k, row in enumerate(chat_pairs(5))]
    config = settings(
        GrpoConfig, data_dir=str(tmp_path), datasets=[write(tmp_path, rows)], max_length=512, test_split_size=0.4
    )
    data = get_data(config, PromptEncoder(tiny.bpe_tokenizer(), config))
    for part in (data.train, data.shards["validation"]):
        given = as_prompts(part)
        assert [(row["prompt"], row["answer"]) for row in given] == [
            (rows[n - 1]["prompt"], rows[n - 1]["answer"]) for n in part["row"]
        ]
    assert data.notes[0] == "data      json rows.jsonl train: 5 rows, chat prompts, with answer"


# ---- margins


def test_a_margin_reaches_the_loss_of_the_reward_model(tmp_path):
    """It was once left out in silence. TRL: -log sigmoid(r_chosen - r_rejected - margin)."""
    from trl.trainer.reward_trainer import DataCollatorForPreference

    def columns(margins):
        rows = [row if m is None else row | {"margin": m} for row, m in zip(chat_pairs(3), margins, strict=True)]
        config = settings(RewardConfig, data_dir=str(tmp_path), datasets=[write(tmp_path, rows)])
        return with_margins(get_data(config, RewardEncoder(tiny.bpe_tokenizer(), config)).train)

    rows = columns([0.5, 2, -1])
    assert DataCollatorForPreference(pad_token_id=0)(list(rows))["margin"].tolist() == [0.5, 2.0, -1.0]
    assert "margin" not in columns([None] * 3).column_names
    with pytest.raises(UserError, match=r"^datasets: margin on 2 of 3 rows; on all, or on none$"):
        columns([0.5, None, 1])


@pytest.mark.medium
@pytest.mark.parametrize("margins", [[3.0, -2.0], [None, None]])
def test_the_reward_verb_trains_with_the_margins_of_the_rows(tmp_path, margins):
    """-log sigmoid(r_chosen - r_rejected - margin), by hand from the scores of the last tokens."""
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "model")
    rows = [row | ({} if m is None else {"margin": m}) for row, m in zip(chat_pairs(2), margins, strict=True)]
    entry = write(tmp_path, rows)
    config = RewardConfig(
        output_dir=str(tmp_path / "run"), model_name_or_path=str(tmp_path / "model"), data_dir=str(tmp_path),
        datasets=[entry], eval_datasets=[entry | {"shard": "x"}], max_length=256, use_cpu=True,
    )  # fmt: skip
    trainer = reward_model.prepare(config, make_console()).trainer
    model = trainer.model.eval()
    with torch.no_grad():
        scores = [
            [model(input_ids=torch.tensor([row[name]])).logits[0, 0] for name in ("chosen_ids", "rejected_ids")]
            for row in trainer.train_dataset
        ]
        losses = [-F.logsigmoid(c - r - (m or 0.0)) for (c, r), m in zip(scores, margins, strict=True)]
    expected = float(sum(losses)) / 2
    assert trainer.evaluate()["eval_x_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("margin", ["0.5", float("nan"), True])
def test_a_margin_that_is_no_number_is_a_bad_row(margin):
    with pytest.raises(CannotTrain, match=r"^margin is .*: no number$"):
        RewardEncoder(tiny.bpe_tokenizer(), settings(RewardConfig))(ROW | {"margin": margin})


# ---- answers to other prompts


def numbered(prompts):
    """Row i has the prompt named and the answer [i]."""
    rows = {"prompt_ids": [[ord(p)] for p in prompts], "completion_ids": [[i] for i in range(len(prompts))]}
    return Dataset.from_dict(rows).cast_column("prompt_ids", IDS).cast_column("completion_ids", IDS)


@pytest.mark.parametrize(
    ("prompts", "answers"),
    [
        ("abc", [1, 2, 0]),
        ("aabb", [2, 2, 0, 0]),  # pairs made two rows: TRL would give row 1 the answer of row 0, its own prompt's
        ("aabbcc", [2, 2, 4, 4, 0, 0]),
        ("abba", [1, 3, 3, 1]),  # the last and the first have the same prompt
        ("aaab", [3, 3, 3, 0]),
        ("abab", [1, 2, 3, 0]),
    ],
)
def test_a_mismatched_answer_is_of_the_next_row_with_another_prompt(prompts, answers):
    rows = mismatched(numbered(prompts))
    assert [ids[0] for ids in rows["KL_completion_ids"]] == answers
    assert all(prompts[i] != prompts[j] for i, j in enumerate(answers))
    assert rows.features["KL_completion_ids"] == rows.features["completion_ids"]


def test_rows_that_were_shuffled_are_matched_as_they_lie():
    rows = mismatched(numbered("aabb").select([3, 0, 2, 1]))  # b a b a
    assert [ids[0] for ids in rows["KL_completion_ids"]] == [0, 2, 1, 3]


def test_without_another_prompt_there_is_no_mismatched_answer():
    """The row's own answer was once taken, and the KL term then is no baseline."""
    with pytest.raises(UserError, match=r"^datasets: all 2 rows of a set have the same prompt; KTO"):
        mismatched(numbered("aa"))


def test_no_row_of_pairs_made_two_is_matched_with_its_own_prompt(tmp_path):
    config = settings(KtoConfig, data_dir=str(tmp_path), datasets=[write(tmp_path, chat_pairs(6))])
    rows = mismatched(get_data(config, LabelledEncoder(tiny.bpe_tokenizer(), config)).train)
    assert len(rows) == 12
    of = {}  # an answer -> the prompts that it answers
    for row in rows:
        of.setdefault(tuple(row["completion_ids"]), set()).add(tuple(row["prompt_ids"]))
    assert not any(tuple(row["prompt_ids"]) in of[tuple(row["KL_completion_ids"])] for row in rows)


# ---- batches of ranked answers


def test_ranked_answers_lie_one_below_the_other():
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [[7, 8, 9], [10]], "scores": [1.0, 0.5]},
        {"prompt_ids": [11], "completion_ids": [[12], [13, 14], [15, 16]], "scores": [0.0, 2.0, -1.0]},
    ]
    batch = RankedCollator(pad_token_id=0)(rows)
    x = IGNORE
    expected = {
        "input_ids": [
            [5, 6, 7, 8, 9],
            [5, 6, 10, 0, 0],
            [11, 12, 0, 0, 0],
            [11, 13, 14, 0, 0],
            [11, 15, 16, 0, 0],
        ],
        "attention_mask": [
            [1, 1, 1, 1, 1],
            [1, 1, 1, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
        ],
        "labels": [
            [x, x, 7, 8, 9],
            [x, x, 10, x, x],
            [x, 12, x, x, x],
            [x, 13, 14, x, x],
            [x, 15, 16, x, x],
        ],
        "scores": [1.0, 0.5, 0.0, 2.0, -1.0],
        "group": [0, 0, 1, 1, 1],
    }
    assert {name: values.tolist() for name, values in batch.items()} == expected
    assert {values.dtype for name, values in batch.items() if name != "scores"} == {torch.long}
    assert batch["scores"].dtype == torch.float32


def test_a_pad_token_inside_an_answer_is_an_answer():
    """The mask follows the lengths, not the ids: many tokenizers pad with the end of turn."""
    rows = [{"prompt_ids": [4, 5], "completion_ids": [[6, 4], [4]], "scores": [1.0, 0.0]}]
    batch = RankedCollator(pad_token_id=4)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 6, 4], [IGNORE, IGNORE, 4, IGNORE]]
