"""`llmkit inspect`: which token is learnt, written out by hand for every kind of batch, and what people get to see.

The letters tokenizer (conftest): BOS 0, EOS 1, PAD 2, <|im_start|> 3, <|im_end|> 4, blank 6, a = 7, b = 8, ...
"""

import io
import json
import sys
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from train.test_pretrain import RECIPE
from transformers import PreTrainedTokenizerFast

from llmkit import cli
from llmkit.check.hf_trainer import HFTraining
from llmkit.config import UserError
from llmkit.data.batches import Reader, token_text
from llmkit.data.inspect import Inspection, describe, runs
from llmkit.data.inspect_console import print_inspection
from llmkit.data.inspect_page import page
from llmkit.data.inspect_verb import inspect_found
from llmkit.data.loader import IGNORE, Loader, Rows

TESTS = str(Path(__file__).parents[1])
T, M, P, R = "trained", "masked", "padding", "read"


def states(sequence) -> list[str]:
    return sequence.states


def printed(inspection: Inspection, **options) -> str:
    out = io.StringIO()
    print_inspection(inspection, Console(file=out, width=100, highlight=False, **options))
    return out.getvalue()


# states, by hand


def test_a_packed_pretraining_row(make_store, letters):
    """BOS a b EOS | BOS c EOS | PAD PAD in nine places; the last one is only predicted, and here it is padding."""
    rows = Rows(make_store(["ab", "c"]), 8, "bos_bestfit", 0, 2)
    batch = Loader([rows], 1, seed=0).batch(0)
    (s,) = describe([batch], letters, settings={"packing": True}).rows[0].sequences
    assert s.ids == [0, 7, 8, 1, 0, 9, 1, 2]
    assert s.states == [M, T, T, T, M, T, T, P]
    assert s.starts == [4] and s.special == [True, False, False, True, True, False, True, True]
    assert s.texts == ["<|bos|>", "a", "b", "<|endoftext|>", "<|bos|>", "c", "<|endoftext|>", "<|pad|>"]
    assert runs(s) == [(M, 0, 1), (T, 1, 4), (M, 4, 5), (T, 5, 7), (P, 7, 8)]


def test_the_last_label_is_a_token_of_the_row(make_store, letters):
    """A full row has one token more than input_ids: the loss asks for it, so it is shown."""
    rows = Rows(make_store(["abcdefg"]), 8, "bos_bestfit", 0, 2)
    batch = Loader([rows], 1, seed=0).batch(0)
    (s,) = describe([batch], letters).rows[0].sequences
    assert s.ids == [0, 7, 8, 9, 10, 11, 12, 13, 1] and s.states == [M] + [T] * 8
    assert batch["input_ids"].shape == (1, 8)


def test_a_row_without_new_positions_shows_documents_by_their_eos(letters):
    batch = {"input_ids": torch.tensor([[7, 1, 8, 9]]), "shift_labels": torch.tensor([[1, 8, 9, 1]])}
    packed, alone = (describe([batch], letters, settings={"packing": p}).rows[0].sequences[0] for p in (True, False))
    assert packed.starts == [2] and alone.starts == []
    assert "positions run on" in page(describe([batch], letters, settings={"packing": True}))
    assert packed.states == [M, T, T, T, T]


def test_an_sft_row_with_masked_prompt_and_padding(letters):
    """Labels that the model shifts: the one at the first place is never asked for, whatever it says."""
    batch = {
        "input_ids": torch.tensor([[3, 7, 4, 8, 9, 4], [3, 7, 4, 4, 2, 2]]),
        "labels": torch.tensor([[3, -100, -100, 8, 9, 4], [-100, -100, -100, 4, -100, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    }
    found = describe([batch], letters)
    assert [row.sequences[0].states for row in found.rows] == [[M, M, M, T, T, T], [M, M, M, T, P, P]]
    assert {k: found.totals[k] for k in ("rows", "tokens", T, M, P, "shortest", "longest")} == {
        "rows": 2, "tokens": 12, T: 4, M: 6, P: 2, "shortest": 4, "longest": 6,
    }  # fmt: skip
    assert found.kind == "tokens" and not any(row.notes for row in found.rows)


def test_both_ways_of_shifting_look_the_same(letters):
    ids = [3, 7, 4, 8, 9, 4]
    hf = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100, -100, -100, 8, 9, 4]])}
    ours = {"input_ids": torch.tensor([ids[:-1]]), "shift_labels": torch.tensor([[-100, -100, 8, 9, 4]])}
    a, b = (describe([batch], letters).rows[0].sequences[0] for batch in (hf, ours))
    assert a == b


def test_a_padding_free_row_shows_where_documents_begin(letters):
    batch = {
        "input_ids": torch.tensor([[3, 7, 4, 3, 8, 4]]),
        "labels": torch.tensor([[-100, 7, 4, -100, 8, 4]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    (s,) = describe([batch], letters).rows[0].sequences
    assert s.states == [M, T, T, M, T, T] and s.starts == [3]


def test_a_dpo_pair_is_one_row_of_two(letters):
    """TRL 1.x: the first half of the batch is chosen, the second rejected."""
    batch = {
        "input_ids": torch.tensor([[7, 8, 9, 4], [10, 11, 4, 2], [7, 8, 4, 2], [10, 12, 13, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1]]),
        "ref_chosen_logps": torch.tensor([-1.5, -2.0]),
    }
    found = describe([batch], letters)
    first, second = found.rows
    assert [(s.name, s.states) for s in first.sequences] == [("chosen", [M, M, T, T]), ("rejected", [M, M, T, P])]
    assert [(s.name, s.states) for s in second.sequences] == [("chosen", [M, T, T, P]), ("rejected", [M, T, T, T])]
    assert found.kind == "pairs" and first.columns == {"ref_chosen_logps": -1.5}


def test_pairs_under_names_of_their_own(letters):
    batch = {}
    for name, ids in (("chosen", [7, 8, 4]), ("rejected", [7, 9, 4])):
        batch |= {f"{name}_input_ids": torch.tensor([ids]), f"{name}_labels": torch.tensor([[-100, *ids[1:]]])}
    found = describe([batch], letters)
    assert [(s.name, s.states) for s in found.rows[0].sequences] == [("chosen", [M, T, T]), ("rejected", [M, T, T])]


def test_a_reward_model_trains_no_token(letters):
    batch = {"input_ids": torch.tensor([[7, 4], [8, 4]]), "attention_mask": torch.ones(2, 2), "margin": torch.ones(1)}
    found = describe([batch], letters, is_paired=True)
    assert [(s.name, s.states) for s in found.rows[0].sequences] == [("chosen", [R, R]), ("rejected", [R, R])]
    assert found.kind == "scores" and found.rows[0].columns == {"margin": 1.0}


def test_kto_rows_with_their_baseline(letters):
    batch = {
        "input_ids": torch.tensor([[7, 8, 4]]), "completion_mask": torch.tensor([[0, 1, 1]]),
        "KL_input_ids": torch.tensor([[7, 9, 4]]), "KL_completion_mask": torch.tensor([[0, 1, 1]]),
        "label": torch.tensor([False]),
    }  # fmt: skip
    row = describe([batch], letters).rows[0]
    assert [(s.name, s.states) for s in row.sequences] == [("answer", [M, T, T]), ("KL", [R, R, R])]
    assert row.columns == {"label": False}


def test_a_grpo_prompt_is_what_goes_to_generation(letters):
    """Each prompt comes once per completion, and a batch again while its completions are in use."""
    batch = [{"prompt": "ab", "answer": "4 - 3", "difficulty": 2}] * 3 + [{"prompt": "c", "answer": "x", "tags": ["y"]}]
    found = describe([batch, list(batch)], letters, tokenize_prompts=lambda p: [letters(t)["input_ids"] for t in p])
    first, second = found.rows
    assert (first.sequences[0].ids, first.sequences[0].states, first.times) == ([7, 8], [R, R], 3)
    assert first.columns == {"answer": "4 - 3", "difficulty": 2}
    assert (second.times, second.columns) == (1, {"answer": "x", "tags": '["y"]'})
    assert found.kind == "prompts" and found.totals["rows"] == 2


def test_a_prompt_that_nobody_tokenises_is_shown_as_text_and_said_so(letters):
    row = describe([[{"prompt": "ab"}]], letters).rows[0]
    assert row.columns == {"prompt": "ab"} and "before the chat template" in row.notes[0]


# what is worth a look


def labelled(ids, labels, mask=None) -> dict:
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    return batch | ({"attention_mask": torch.tensor([mask])} if mask else {})


@pytest.mark.parametrize(
    "batch, note",
    [
        (labelled([7, 8, 4], [-100, -100, -100]), "no token is trained"),
        (labelled([7, 8, 4, 2], [7, 8, 4, 2], [1, 1, 1, 0]), "padding is trained"),
        (labelled([7, 99, 4], [7, 99, 4]), "ids that the tokenizer does not have"),
        (labelled([7, 8, 9, 4], [8, 9, 4, -100]), "labels are other tokens than those of the row"),
        (labelled([7, 8, 9, 10, 11], [7, 8, 9, 10, 11]), "fills max_length and ends without a stop token"),
    ],
)
def test_what_looks_wrong_is_noted_and_counted(batch, note, letters):
    found = describe([batch, labelled([7, 4], [7, 4])], letters, settings={"max_length": 5})
    assert [row.notes for row in found.rows] == [[note], []]
    assert found.totals["notes"] == {note: 1}
    assert note in printed(found) and note in page(found)


def test_a_row_that_ends_in_a_stop_token_is_not_called_cut(letters):
    found = describe([labelled([7, 8, 9, 4, 6], [7, 8, 9, 4, 6])], letters, settings={"max_length": 5})
    assert found.totals["notes"] == {}  # as ChatML ends: <|im_end|> and a newline


def test_rows_cut_from_a_stream_are_not_called_cut(letters):
    settings = {"max_length": 5, "packing_strategy": "contiguous"}
    assert describe([labelled([7, 8, 9, 10, 11], [7, 8, 9, 10, 11])], letters, settings=settings).totals["notes"] == {}


def test_a_row_seen_before_is_counted_whatever_its_padding(letters):
    batches = [labelled([7, 4], [7, 4]), labelled([7, 4, 2], [7, 4, -100], [1, 1, 0]), labelled([8, 4], [8, 4])]
    found = describe(batches, letters)
    assert [row.notes for row in found.rows] == [[], ["the same as row 0"], []]
    assert found.totals["notes"] == {"the same as an earlier row": 1}


def test_totals_go_beyond_the_rows_shown(letters):
    batches = (labelled([7, 4], [-100, 4]) for _ in range(2000))
    found = describe(batches, letters, num_rows=2)
    assert len(found.rows) == 2 and found.totals["rows"] == 1000 and not found.totals["to_the_end"]
    assert describe([labelled([7, 4], [7, 4])], letters).totals["to_the_end"]


@pytest.mark.parametrize(
    "batches, what",
    [
        ([], "the loader yields no row from there on; look at the data set$"),
        ([{"pixel_values": torch.ones(1, 3)}], "hold no input_ids, only pixel_values"),
        ([torch.ones(1)], "batches are Tensor, not dictionaries"),
        ([[{"text": "a"}]], "hold neither input_ids nor prompt, only text"),
    ],
)
def test_batches_without_tokens_are_a_users_mistake(batches, what, letters):
    with pytest.raises(UserError, match=what):
        describe(batches, letters)


def test_token_text_keeps_white_space_and_bytes():
    bpe = tiny.bpe_tokenizer()
    ids = bpe(" red 😀\n")["input_ids"]
    texts = [token_text(bpe, i) for i in ids]
    assert texts[0] == " red" and texts[-1] == "\n"
    assert "".join(texts).encode("utf-8", "surrogateescape").decode() == " red 😀\n"
    assert token_text(bpe, 4) == "<|im_end|>" and token_text(bpe, 9999) == "<no token 9999>"


# what people see


class Words(PreTrainedTokenizerFast):
    """One id per word, so that a word which is found anywhere was shown on purpose."""


@pytest.fixture(scope="module")
def words() -> Words:
    names = ["<pad>", "<eos>", "zanzibar", "quokka", "<script>alert(1)</script>", "شجرة", "\u202eevil", " \n"]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Words(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def inspection(words) -> Inspection:
    ids = [2, 3, 4, 5, 6, 7, 2, 1, 0, 0]
    batch = labelled(ids, [-100, -100, 4, 5, 6, 7, 2, 1, -100, -100], [1] * 8 + [0] * 2) | {
        "answer": ["capybara & <b>"]
    }
    return describe([batch], words, target="<img src=x> trainer")


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.titles += [value for key, value in attributes if key == "title"]

    def handle_data(self, data):
        self.shown += data if self.tags[-1:] != ["style"] else ""


def test_the_page_escapes_everything_and_needs_no_network(inspection):
    html = page(inspection)
    found = Tags(html)
    assert not {"script", "img", "iframe", "link"} & set(found.tags)
    assert "<script>alert(1)</script>" in found.shown and "capybara & <b>" in found.shown
    assert "\u202e" not in html and r"\u202eevil" in found.shown
    assert "http" not in html and "src=" not in html.replace("&lt;img src=x&gt;", "") and "@import" not in html
    assert "position 2, id 4, label 4" in found.titles and "position 1, id 3, label -100" in found.titles


def test_a_long_row_keeps_both_ends_and_a_page_that_a_browser_holds(letters):
    ids = [3, *np.random.default_rng(0).integers(7, 33, 200_000).tolist(), 4]
    html = page(describe([labelled(ids, ids)], letters))  # two stretches share 60,000 tokens
    assert "170,001 tokens" in html and len(html) < 8_000_000
    assert f"position {len(ids) - 1}, id 4" in html
    out = printed(describe([labelled(ids, ids)], letters))
    assert len(out) < 3_000 and "<|im_end|>" in out


def test_a_row_of_many_stretches_is_cut_as_well(letters):
    ids, labels = [7, 8] * 5_000, [-100, 8] * 5_000
    found = describe([labelled(ids, labels)], letters)
    assert "… 9,600 stretches …" in page(found) and "… 9,960 stretches …" in printed(found)
    assert len(printed(found).splitlines()) < 60


def test_the_console_says_every_state_in_words(inspection):
    lines = printed(inspection).splitlines()
    rows = {line.split()[0]: line for line in lines[lines.index("") :] if line.startswith("  ")}
    assert "zanzibarquokka" in next(line for line in lines if line.startswith("  masked      z"))
    assert next(line for line in lines if line.startswith("  padding     <")) == "  padding     <pad> × 2"
    assert "trained" in rows and "\x1b" not in printed(inspection) and "\u202e" not in printed(inspection)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_console_wraps_at_its_width(width, letters):
    ids = [3, *range(7, 33), *[6] * 200, 4]
    out = io.StringIO()
    print_inspection(describe([labelled(ids, ids)], letters), Console(file=out, width=width, force_terminal=False))
    assert max(map(len, out.getvalue().splitlines())) <= width


def test_colour_and_underlines_are_for_terminals(inspection):
    assert "\x1b[4" in printed(inspection, force_terminal=True, color_system="standard").replace("\x1b[32;4", "\x1b[4")
    assert "\x1b[3" not in printed(inspection, force_terminal=True, no_color=True)


def test_redacted_shows_no_text_anywhere(inspection):
    hidden = Inspection.from_dict(json.loads(json.dumps(inspection.redacted().to_dict())))
    outputs = [printed(hidden), page(hidden), json.dumps(hidden.to_dict(), ensure_ascii=False)]
    for text in ("zanzibar", "quokka", "alert", "شجرة", "evil", "capybara"):
        assert text in json.dumps(inspection.to_dict(), ensure_ascii=False)
        assert not any(text in output for output in outputs)
    assert "2 3" in outputs[0] and "id 4" in outputs[1] and "14 characters" in outputs[0]


def test_json_comes_back_as_it_was(inspection):
    assert Inspection.from_dict(json.loads(json.dumps(inspection.to_dict()))) == inspection


# real trainers and the command


def found_by(trainer, tmp_path, failure=None, **settings) -> Inspection:
    out, given = tmp_path / "found.json", {"num_rows": 2, "step": 0, "redact": False} | settings
    inspect_found({"out": str(out), "settings": given}, {}, trainer, failure)
    value = json.loads(out.read_text())
    if "error" in value:
        raise UserError(value["error"])
    return Inspection.from_dict(value)


def text_of(sequence, state: str) -> str:
    return "".join(t for t, s in zip(sequence.texts, sequence.states, strict=True) if s == state)


@pytest.mark.medium
def test_rows_are_those_of_the_first_steps_of_training():
    """Order, batches and accumulation as `train()` has them; nothing of the trainer has changed after a look."""
    options = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2, seed=5)
    trained: list[list[int]] = []

    def recorded(model, inputs, *rest, **kwargs):
        trained.extend(inputs["input_ids"].tolist())
        return step(model, inputs, *rest, **kwargs)

    trainer = tiny.sft_trainer(**options)
    seen = [b["input_ids"].tolist() for b in HFTraining(trainer).batches_from(0)]
    later = [b["input_ids"].tolist() for b in islice(HFTraining(trainer).batches_from(2), 2)]
    step, trainer.training_step = trainer.training_step, recorded
    trainer.train()
    assert trained == [row for batch in seen[:6] for row in batch]
    assert later == seen[4:6]


@pytest.mark.medium
def test_a_real_dpo_trainer(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    chats = tiny.chat_rows(6)
    rows = [
        {
            "prompt": r["messages"][:1],
            "chosen": r["messages"][1:],
            "rejected": [{"role": "assistant", "content": "two"}],
        }
        for r in chats
    ]
    trainer = DPOTrainer(
        model=tiny.llama(), ref_model=tiny.llama(), processing_class=tiny.bpe_tokenizer(),
        args=tiny.arguments(DPOConfig, max_length=64, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    found = found_by(trainer, tmp_path)
    for row in found.rows:
        chosen, rejected = row.sequences
        assert text_of(chosen, "trained") in [f"{r['chosen'][0]['content']}<|im_end|>" for r in rows]
        assert text_of(rejected, "trained") == "two<|im_end|>"
        assert text_of(chosen, "masked") == text_of(rejected, "masked")
        assert text_of(chosen, "masked").endswith("<|im_start|>assistant\n")
    assert found.kind == "pairs" and found.totals["rows"] == 6


@pytest.mark.medium
def test_a_real_grpo_trainer(tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": r["messages"][:1], "answer": f"number {k}"} for k, r in enumerate(tiny.chat_rows(6))]
    trainer = GRPOTrainer(
        model=tiny.llama(), reward_funcs=lambda completions, answer, **_: [0.0] * len(completions),
        processing_class=tiny.bpe_tokenizer(), train_dataset=Dataset.from_list(rows),
        args=tiny.arguments(
            GRPOConfig, per_device_train_batch_size=4, num_generations=2, gradient_checkpointing=False
        ),
    )  # fmt: skip
    found = found_by(trainer, tmp_path)
    expected = {
        f"<|im_start|>user\n{r['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n": r["answer"] for r in rows
    }
    assert [expected[text_of(row.sequences[0], "read")] for row in found.rows] == [
        r.columns["answer"] for r in found.rows
    ]
    assert [row.times for row in found.rows] == [2, 2] and found.kind == "prompts"


@pytest.mark.medium
def test_a_loader_that_raises_or_is_empty_is_told_in_a_line(tmp_path):
    def collate(rows):
        raise KeyError("secret words")

    with pytest.raises(UserError, match="own loader raised KeyError: 'secret words'; train"):
        found_by(tiny.lm_trainer(collator=collate), tmp_path)
    with pytest.raises(UserError, match="own loader raised KeyError; train"):
        found_by(tiny.lm_trainer(collator=collate), tmp_path, redact=True)
    trainer = tiny.lm_trainer()
    trainer.train_dataset = trainer.train_dataset.select([])
    with pytest.raises(UserError, match="own loader raised ValueError: num_samples"):
        found_by(trainer, tmp_path)
    with pytest.raises(UserError, match="step=99: the loader yields no row"):
        found_by(tiny.lm_trainer(), tmp_path, step=99)


@pytest.mark.medium
def test_a_commands_sft_trainer(tmp_path, capfd):
    """`llmkit inspect -- CMD`: the answers are trained up to their end of turn, and nothing else is."""
    lines = f"import sys, tempfile; sys.path.insert(0, {TESTS!r}); tempfile.tempdir = {str(tmp_path)!r}\n"
    lines += "import tiny; print('noise')"
    path = tmp_path / "sft.py"
    path.write_text(lines + "\ntiny.sft_trainer(assistant_only_loss=True).train()\nopen('trained', 'w')\n")
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    words = ["inspect", "--num_rows", "2", "--json", str(out), "--html", str(html), "--", sys.executable, str(path)]
    assert cli.main(words) == 0
    found = Inspection.from_dict(json.loads(out.read_text()))
    answers = {f"{r['messages'][1]['content']}<|im_end|>" for r in tiny.chat_rows()}
    assert {text_of(row.sequences[0], "trained") for row in found.rows} <= answers
    assert found.target == "SFTTrainer of LlamaForCausalLM" and found.totals["rows"] == 32
    assert not Path("trained").exists() and html.read_text().startswith("<!doctype html>")
    stdout, stderr = capfd.readouterr()
    assert stdout.startswith("llmkit inspect: SFTTrainer") and "noise" in stderr


def test_commands_that_never_reach_a_batch_are_a_users_mistake(tmp_path, capfd):
    assert cli.main(["inspect", "--", sys.executable, "-c", "print(1)"]) == 2
    assert "nothing to inspect; for a loop of your own: llmkit.data.inspect.describe(" in capfd.readouterr().err
    with pytest.raises(UserError, match="T raised RuntimeError: no; there are no batches to show"):
        found_by(None, tmp_path, failure="T raised RuntimeError: no")
    with pytest.raises(UserError, match=r"^T raised RuntimeError; there"):
        found_by(None, tmp_path, failure="T raised RuntimeError: a secret row", redact=True)


@pytest.fixture
def recipe(tmp_path) -> str:
    keys = {"output_dir": str(tmp_path / "run"), "store_dir": str(tmp_path / "data")} | RECIPE
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def test_a_recipe_shows_what_its_loader_yields_at_a_step(recipe, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert cli.main(["inspect", recipe, "--step", "3", "--num_rows", "2", "--json", str(out)]) == 0
    found = Inspection.from_dict(json.loads(out.read_text()))
    from llmkit import config, verbs
    from llmkit.train import preflight

    loader = preflight.get_subject(config.load(verbs.PretrainConfig, [recipe]), 1, is_data_only=True).training.loader
    batch = loader.batch(3)
    for row, ids, labels in zip(found.rows, batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=False):
        s = row.sequences[0]
        asked = [i if state == T else IGNORE for i, state in zip(s.ids, s.states, strict=True)][1:]
        assert s.ids[: len(ids)] == ids and asked == labels[: len(asked)]
    assert found.target == recipe and f"llmkit inspect: {recipe}" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("x")  # a run is there already: looking does no harm
    assert cli.main(["inspect", recipe, "--num_rows", "1"]) == 0


@pytest.mark.parametrize("isolation, sign", [("true", "positions start again"), ("false", "and positions run on")])
def test_a_recipe_says_whether_documents_are_told_apart(isolation, sign, recipe, capsys):
    assert cli.main(["inspect", recipe, "--document_isolation", isolation]) == 0
    out = capsys.readouterr().out
    assert f"¶ another document begins: {'after an EOS, ' * (isolation == 'false')}{sign}" in out
    assert out.count("\n¶ masked      <|bos|>") > 1


def test_rows_of_a_file_under_a_tokenizer(tmp_path, capsys):
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "tok")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in [{"prompt": "The", "completion": " red"}, {"prompt": "x"}]))
    assert cli.main(["inspect", "--tokenizer_name", str(tmp_path / "tok"), "--dataset", str(rows)]) == 0
    out = capsys.readouterr().out
    assert "  trained     ·red<|im_end|>" in out and "1 rows left out" in out


@pytest.mark.parametrize(
    "words, what",
    [
        ([], "nothing to inspect: give a recipe"),
        (["--num_rows", "0", "RECIPE"], "num_rows=0; allowed: 1 or more"),
        (["--step", "-1", "RECIPE"], "step=-1; allowed"),
        (["--step", "999", "RECIPE"], "step=999; allowed: 0 to"),
        (["--dataset", "x", "RECIPE"], "--dataset stands alone"),
        (["--html", "nowhere/x.html", "RECIPE"], "'nowhere' does not exist"),
        (["RECIPE", "--", "python"], "give one of them"),
        (["--", "nosuchcommand"], "'nosuchcommand': not found"),
        (["--"], "no command after `--`; e.g. llmkit inspect"),
        (["--step", "1", "--tokenizer_name", "x", "--dataset", "y"], "--step is not used with --dataset"),
    ],
)
def test_wrong_usage_is_one_line(words, what, recipe, capsys):
    assert cli.main(["inspect", *(recipe if w == "RECIPE" else w for w in words)]) == 2
    err = capsys.readouterr().err
    assert what in err and err.count("\n") == 1


def test_the_reader_tells_padding_without_a_mask_by_its_run(letters):
    reader = Reader(letters)
    s = reader.sequence(np.array([2, 2, 7, 2, 8, 2]), np.array([-100, -100, 7, -100, 8, -100]))
    assert s.states == [P, P, T, M, T, P]
