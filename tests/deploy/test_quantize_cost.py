"""Figures of a smaller model against the original, by hand; and the text that they are taken on."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import tiny
import torch
import yaml
from torch import nn
from transformers import BitsAndBytesConfig

from llmkit.config import UserError
from llmkit.deploy import cost
from llmkit.deploy.cost import compare_on, measure_speed, resident_growth, weight_bytes
from llmkit.deploy.loading import find
from llmkit.deploy.passages import Passages, find_passages
from llmkit.verbs import QuantizeConfig


class Fixed(nn.Module):
    """Says the same logits at every position: a distribution over three tokens."""

    def __init__(self, *probs: float):
        super().__init__()
        self.table = nn.Embedding(3, 3)
        self.logits = torch.tensor(probs).log()
        self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(vocab_size=3))

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, use_cache):
        return types.SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 3))


ROWS = [(0, [0, 0], [0, 1]), (0, [0], [2]), (1, [0, 0, 0], [-100, 0, 0])]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_figures_by_hand(batch_size):
    """Tokens 0 1 2 of the first document, 0 0 of the second; a label of -100 counts nowhere."""
    found = compare_on(Fixed(0.5, 0.3, 0.2), {"q": Fixed(0.3, 0.6, 0.1)}, Passages(ROWS, 2, ""), batch_size, 0)["q"]
    before = -(3 * math.log(0.5) + math.log(0.3) + math.log(0.2)) / 5
    after = -(3 * math.log(0.3) + math.log(0.6) + math.log(0.1)) / 5
    assert (found.original_loss, found.loss) == pytest.approx((before, after))
    assert found.ratio == pytest.approx(math.exp(after - before))
    kl = 0.5 * math.log(0.5 / 0.3) + 0.3 * math.log(0.3 / 0.6) + 0.2 * math.log(0.2 / 0.1)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert (found.top1_agreement, found.num_documents, found.num_tokens) == (0.0, 2, 5)


@pytest.mark.parametrize("most", [1, 9, 18])
def test_batches_cut_short_by_a_large_vocabulary_skip_no_row(monkeypatch, most):
    first, other = Fixed(0.5, 0.3, 0.2), Fixed(0.3, 0.6, 0.1)
    whole = compare_on(first, {"q": other}, Passages(ROWS, 2, ""), 16, 0)["q"]
    monkeypatch.setattr(cost, "MOST_LOGITS", most)
    cut = compare_on(first, {"q": other}, Passages(ROWS, 2, ""), 16, 0)["q"]
    assert dataclasses.asdict(cut) == pytest.approx(dataclasses.asdict(whole), rel=1e-5)


def test_the_same_model_costs_nothing():
    found = compare_on(Fixed(0.5, 0.3, 0.2), {"q": Fixed(0.5, 0.3, 0.2)}, Passages(ROWS, 2, ""), 16, 0)["q"]
    assert (found.ratio, found.low, found.high, found.top1_agreement) == (1.0, 1.0, 1.0, 1.0)
    assert found.kl == pytest.approx(0, abs=1e-7)


def test_the_interval_is_that_of_resampled_documents():
    """Against a bootstrap written down here, over 40 documents of differing length and loss."""
    rng = np.random.default_rng(3)
    counts = rng.integers(5, 50, 40).astype(float)
    before = counts * 1.5
    after = before + counts * rng.normal(0.05, 0.02, 40)
    found = cost._cost(after, before, counts, 0.5, 0.1)
    draws = rng.integers(0, 40, (20_000, 40))
    ratios = np.exp((after - before)[draws].sum(1) / counts[draws].sum(1))
    assert (found.low, found.high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=1e-3)
    assert found.low < found.ratio < found.high


def test_a_loss_that_is_no_number_is_said():
    with pytest.raises(ValueError, match="the loss of the q model is not finite"):
        compare_on(Fixed(0.5, 0.3, 0.2), {"q": Fixed(1.0, 0.0, 0.0)}, Passages(ROWS, 2, ""), 16, 0)


def test_speed_is_told_for_every_model():
    models = {"a": tiny.llama(), "b": tiny.llama()}
    found = measure_speed(models, [1, 5, 7, 9])
    assert set(found) == {"a", "b"} and all(rate > 0 for rates in found.values() for rate in rates.values())


def test_speed_of_a_context_of_a_few_tokens():
    """Eight of its positions were filled before the first token."""
    found = measure_speed({"a": tiny.llama(max_position_embeddings=6)}, [1, 5, 7, 9, 8, 6])
    assert found["a"]["decode"] > 0


@pytest.mark.parametrize("is_double", [False, True])
def test_scales_of_4_bit_count_as_memory(tmp_path, is_double):
    """Blocks of 64 weights share one: 4 bytes each, or 1 byte and 4 for every 256 of them."""
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=is_double)
    model = cost.plain_load(tmp_path, "cpu", quantization_config=how)
    sizes = [64 * 64, 32 * 64, 32 * 64, 64 * 64, 128 * 64, 128 * 64, 128 * 64] * 2
    blocks = [size // 64 for size in sizes]
    expected = sum(n + 4 * math.ceil(n / 256) for n in blocks) if is_double else sum(4 * n for n in blocks)
    assert weight_bytes(model) - model.get_memory_footprint() == expected


def test_scales_of_8_bit_count_as_memory_once_it_has_run(tmp_path):
    """A float32 for every row of a layer."""
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = cost.plain_load(tmp_path, "cpu", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with torch.no_grad():
        model(torch.tensor([[1, 5]]))
    rows = (64 + 32 + 32 + 64 + 128 + 128 + 64) * 2
    assert weight_bytes(model) - model.get_memory_footprint() == 4 * rows


@pytest.mark.medium
def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    tiny.llama(vocab_size=40_000, hidden_size=256).save_pretrained(tmp_path)  # 82 MB in two tables
    grown = resident_growth(str(tmp_path), "cpu", False)
    assert grown is not None and 41e6 < grown < 100e6  # at least the head; of the embedding few rows are touched


# ---- the text


def run_folder(folder, stage, parent, recipe, **facts):
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"stage": stage, "parent": parent, **facts}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tiny.llama().save_pretrained(folder / "model")
    tiny.bpe_tokenizer(bos=True).save_pretrained(folder / "model")
    return str(folder)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """pretrain -> sft -> grpo, with a validation file each of the first two."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.text_rows(3)))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(4)))
    raw = {"path": "json", "data_files": "raw.jsonl", "shard": "raw"}
    asked = {"path": "json", "data_files": "chats.jsonl", "shard": "asked"}
    base = run_folder(tmp_path / "pretrain", "pretrain", None,
                      {"output_dir": "o", "eval_datasets": [raw], "max_length": 64})  # fmt: skip
    recipe = {"output_dir": "o", "model_name_or_path": base, "datasets": [asked | {"data_files": "none.jsonl"}],
              "eval_datasets": [asked], "max_length": 256}  # fmt: skip
    recipe["datasets"][0].pop("shard")
    sft = run_folder(tmp_path / "sft", "sft", base, recipe)
    return base, sft, run_folder(tmp_path / "grpo", "grpo", sft, {"output_dir": "o"})


def passages(name, **keys):
    return find_passages(find(name), QuantizeConfig(name, "o", **keys), tiny.bpe_tokenizer(bos=True), 256)


def test_a_base_model_is_asked_on_the_raw_text_of_its_run(family):
    found = passages(family[0])
    assert list(found) == ["raw"] and found["raw"].num_documents == 3
    tokenizer = tiny.bpe_tokenizer(bos=True)
    ids = tokenizer(tiny.text_rows(1)[0]["text"], add_special_tokens=False)["input_ids"]
    assert [row for row in found["raw"].rows if row[0] == 0] == [
        (0, [tokenizer.bos_token_id, *ids], [*ids, tokenizer.eos_token_id])
    ]


@pytest.mark.parametrize("which", [1, 2])
def test_a_chat_model_is_asked_on_answers_of_its_own_kind(family, which):
    """Also one that was tuned further; the training rows, whose file is gone, are not read."""
    found = passages(family[which])
    assert list(found) == ["asked"] and found["asked"].num_documents == 4
    tokenizer = tiny.bpe_tokenizer(bos=True)
    _, inputs, labels = found["asked"].rows[0]
    answer = tiny.chat_rows(1)[0]["messages"][1]["content"]
    assert tokenizer.decode([label for label in labels if label != -100]) == f"{answer}<|im_end|>"
    at = next(i for i, label in enumerate(labels) if label != -100)
    assert inputs[at + 1] == labels[at]


def test_a_model_that_was_trained_on_as_raw_text_is_asked_on_raw_text(family, tmp_path):
    """Also where its parent was tuned on chats."""
    raw = {"path": "json", "data_files": "raw.jsonl", "shard": "raw"}
    name = run_folder(tmp_path / "more", "pretrain", family[1],
                      {"output_dir": "o", "eval_datasets": [raw], "max_length": 64})  # fmt: skip
    assert list(passages(name)) == ["raw"]


def test_a_window_is_no_longer_than_the_context(family):
    found = find_passages(find(family[0]), QuantizeConfig(family[0], "o", window=999), tiny.bpe_tokenizer(bos=True), 9)
    assert max(len(row[1]) for row in found["raw"].rows) == 9


def test_a_window_without_use_is_refused(family):
    with pytest.raises(UserError, match=r"window=64 has no effect on the rows of .*sft, which stay whole"):
        passages(family[1], window=64)
    assert max(len(row[1]) for row in passages(family[0], window=8)["raw"].rows) == 8


def test_text_that_is_named_wins(family):
    named = [{"path": "json", "data_files": "raw.jsonl", "shard": "mine"}]
    assert list(passages(family[1], eval_datasets=named)) == ["mine"]
