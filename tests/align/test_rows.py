"""Tokens and labels of instruction rows: those of TRL's own preparation; nothing is cut or left out unseen."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import redraw

from llmkit.align.rows import IGNORE, CannotTrain, Labeller, PackedCollator, bad_note, get_data, pack
from llmkit.config import UserError
from llmkit.tuning import SftConfig


def settings(**given):
    return SftConfig(**{"output_dir": "x", "model_name_or_path": "y", "max_length": 128} | given)


def write(folder, rows, name="rows.jsonl", **entry):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return {"path": "json", "data_files": name} | entry


def recipe(folder, rows, **given):
    return settings(data_dir=str(folder), datasets=[write(folder, rows)], **given)


CONVERSATIONS = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in tiny.chat_rows(4)]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (tiny.chat_rows(4, turns=2), {"assistant_only_loss": True}),
        (tiny.completion_rows(4), {}),
        (tiny.completion_rows(4), {"completion_only_loss": False}),
        (CONVERSATIONS, {}),
        (tiny.text_rows(4), {}),
    ],
)
def test_tokens_and_labels_are_those_of_trls_own_preparation(rows, options):
    theirs = tiny.sft_trainer(rows=rows, max_length=256, **options).train_dataset
    config = settings(completion_only_loss=options.get("completion_only_loss"), max_length=256)
    label = Labeller(tiny.bpe_tokenizer(), config)
    for row, expected in zip(rows, theirs, strict=True):
        ids, labels = label(row).values()
        assert ids == expected["input_ids"] and labels == expected["labels"]


def test_every_answer_is_trained_with_its_end_and_nothing_else():
    tokenizer = tiny.bpe_tokenizer()
    row = tiny.chat_rows(1, turns=2)[0]
    ids, labels = Labeller(tokenizer, settings(max_length=256))(row).values()
    answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == "".join(f"{a}<|im_end|>" for a in answers)
    assert all(label in (i, IGNORE) for i, label in zip(ids, labels, strict=True))


def test_a_template_without_marks_trains_the_one_answer_of_a_chat():
    tokenizer = tiny.bpe_tokenizer()
    one, two = tiny.chat_rows(1)[0], tiny.chat_rows(1, turns=2)[0]
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    label = Labeller(tokenizer, settings())
    assert label.settings(one) == {"assistant_only_loss": False, "completion_only_loss": True}
    ids, labels = label(one).values()
    assert tokenizer.decode(ids).startswith("<|im_start|>user")
    # what follows the answer in the template is the completion's, too
    assert tokenizer.decode([i for i in labels if i != IGNORE]).strip() == f"{one['messages'][1]['content']}<|im_end|>"
    with pytest.raises(CannotTrain, match="several answers, and the template has no generation marks"):
        label(two)


BAD = [
    {"messages": [{"role": "user", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
    {"messages": [{"role": "user", "content": "cat " * 200}, {"role": "assistant", "content": "dog"}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "dog " * 200}]},
]


def test_bad_rows_are_an_error_that_names_the_first_of_each_problem(tmp_path):
    rows = [tiny.chat_rows(1)[0], *BAD, tiny.chat_rows(1)[0]]
    config = recipe(tmp_path, rows, max_bad_rows=3)
    with pytest.raises(UserError) as error:
        get_data(config, Labeller(tiny.bpe_tokenizer(), config))
    said = str(error.value)
    assert said.startswith("max_bad_rows=3: 4 rows cannot be trained on: json rows.jsonl train: 1 x no assistant turn")
    for part in ("(first: row 2)", "1 x empty answer (first: row 3)", "2 x longer than max_length=128 (first: row 4)"):
        assert part in said
    assert said.endswith("mend them, or leave them out by max_bad_rows: 4")


def test_bad_rows_up_to_the_limit_are_counted(tmp_path):
    config = recipe(tmp_path, [tiny.chat_rows(1)[0], *BAD, tiny.chat_rows(1)[0]], max_bad_rows=4)
    data = get_data(config, Labeller(tiny.bpe_tokenizer(), config))
    assert data.train["row"][:] == [1, 6]
    assert bad_note(data) == [
        "left out  json rows.jsonl train: 1 no assistant turn, 1 empty answer, 2 longer than max_length=128"
    ]


def test_pieces_that_are_packed_may_be_long(tmp_path):
    config = recipe(tmp_path, [BAD[3]], packing=True, packing_strategy="wrapped")
    data = get_data(config, Labeller(tiny.bpe_tokenizer(), config))
    assert sum(map(len, pack(data.train, config)["input_ids"])) == len(data.train[0]["input_ids"]) > 128


def test_packing_loses_no_token_and_fills_rows(tmp_path):
    config = recipe(tmp_path, tiny.chat_rows(24), packing=True, max_length=96)
    data = get_data(config, Labeller(tiny.bpe_tokenizer(), config))
    packed = pack(data.train, config)
    assert sorted(i for ids in packed["input_ids"] for i in ids) == sorted(
        i for ids in data.train["input_ids"] for i in ids
    )
    assert len(packed) < 24 and max(map(len, packed["input_ids"])) <= 96


def test_the_split_is_a_function_of_its_seed(tmp_path):
    def split(**given):
        config = recipe(tmp_path, tiny.chat_rows(20), test_split_size=0.2, **given)
        data = get_data(config, Labeller(tiny.bpe_tokenizer(), config))
        return data.train["row"][:], data.shards["validation"]["row"][:]

    train, held_out = split(seed=1)
    assert len(held_out) == 4 and sorted(train + held_out) == list(range(1, 21))
    assert split(seed=5, data_seed=1) == (train, held_out) != split(seed=2)


def test_fractions_are_shares_of_the_mixture(tmp_path):
    many = write(tmp_path, tiny.chat_rows(40), "many.jsonl", fraction=0.25)
    few = write(tmp_path, tiny.completion_rows(12), "few.jsonl", fraction=0.75)
    config = settings(data_dir=str(tmp_path), datasets=[many, few])
    data = get_data(config, Labeller(tiny.bpe_tokenizer(), config))
    kinds = ["messages" in json.loads(raw) for raw in data.train["raw"]]
    assert (kinds.count(True), kinds.count(False)) == (4, 12)


def test_overfit_takes_the_first_rows_and_holds_nothing_out(tmp_path):
    config = recipe(tmp_path, tiny.chat_rows(20), overfit=3)
    data = get_data(config, Labeller(tiny.bpe_tokenizer(), config))
    assert data.train["row"][:] == [1, 2, 3] and not data.shards


def test_the_fingerprint_is_that_of_ids_and_labels(tmp_path):
    config = recipe(tmp_path, tiny.chat_rows(4))
    first = get_data(config, Labeller(tiny.bpe_tokenizer(), config)).fingerprint
    assert first == get_data(config, Labeller(tiny.bpe_tokenizer(), config)).fingerprint
    all_trained = recipe(tmp_path, tiny.chat_rows(4), assistant_only_loss=False)
    assert first != get_data(all_trained, Labeller(tiny.bpe_tokenizer(), all_trained)).fingerprint
    assert isinstance(get_data(config, Labeller(tiny.bpe_tokenizer(), config)).train, Dataset)


def nats(model, batch):
    """Summed over the trained tokens."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return float(F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum"))


def test_a_packed_batch_has_the_loss_of_its_rows_alone_and_of_trls_own_batch(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    config = recipe(tmp_path, tiny.chat_rows(24), packing=True, max_length=96)
    data = get_data(config, Labeller(tiny.bpe_tokenizer(), config))
    packed = list(pack(data.train, config))
    assert len({len(row["input_ids"]) for row in packed}) > 1 and any(len(row["seq_lengths"]) > 1 for row in packed)
    model = redraw(tiny.llama()).eval()
    with torch.no_grad():
        alone = sum(nats(model, {k: torch.tensor([row[k]]) for k in ("input_ids", "labels")}) for row in data.train)
        ours = nats(model, PackedCollator(0)(packed))
        theirs = nats(model, {
            k: v for k, v in DataCollatorForLanguageModeling(0, padding_free=True)(packed).items()
            if k in ("input_ids", "labels", "position_ids")
        })  # fmt: skip
    assert ours == pytest.approx(alone, rel=1e-5) and theirs == pytest.approx(alone, rel=1e-5)
