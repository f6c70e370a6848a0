"""Tasks asked while a model trains, and the best step by a figure of them."""

import json

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from train.test_pretrain import RECIPE

from llmkit import cli
from llmkit.evaluate.in_training import TaskScorer
from llmkit.train.best import Best


def weights(model, value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def test_the_best_step_comes_back(tmp_path):
    model, best = tiny.llama(), Best(tmp_path, "words_acc", None, None)
    for step, value in enumerate((0.2, 0.8, 0.8, 0.5), 1):
        best.see(step, {"eval_words_acc": value, "eval_words_loss": 1.0}, weights(model, step))
    assert (best.step, best.value) == (2, 0.8)  # of equal figures the earlier
    best.restore(model)
    assert all((p == 2).all() for p in model.parameters())


@pytest.mark.parametrize("metric, is_greater, expected", [
    ("eval_words_loss", None, 2), ("words_bits_per_byte", None, 2), ("words_acc", None, 1), ("words_acc", False, 2),
])  # fmt: skip
def test_losses_are_better_when_lower(tmp_path, metric, is_greater, expected):
    best = Best(tmp_path, metric, is_greater, None)
    for step, value in ((1, 3.0), (2, 2.0)):
        best.see(step, {metric.removeprefix("eval_"): value}, tiny.llama())
    assert best.step == expected


def test_only_what_is_trained_is_kept(tmp_path):
    model = tiny.llama()
    for name, p in model.named_parameters():
        p.requires_grad = "norm" in name
    Best(tmp_path, "acc", None, None).see(1, {"acc": 1.0}, model)
    assert {name for name in load_file(tmp_path / "best.safetensors") if "norm" not in name} == set()


def test_a_run_that_goes_on_finds_it_and_drops_what_is_later(tmp_path):
    Best(tmp_path, "acc", None, None).see(8, {"acc": 0.9}, tiny.llama())
    assert Best(tmp_path, "acc", None, resume_step=10).value == 0.9
    assert Best(tmp_path, "acc", None, resume_step=4).step == 0
    assert Best(tmp_path, "other", None, resume_step=10).step == 0


def test_looking_changes_neither_mode_nor_random_numbers():
    model, tokenizer = tiny.llama(), tiny.bpe_tokenizer(bos=True)
    scorer = TaskScorer("toyworld_recall,toyworld_facts", tokenizer, limit=4)
    assert scorer.figures() == ["toyworld_recall_acc", "toyworld_facts_exact_match"]
    before = torch.get_rng_state()
    first, again = scorer.score(model), scorer.score(model)
    assert first == again and list(first) == scorer.figures()
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert scorer.headline(first).startswith("toyworld_recall_acc 0.")


def pretrain(folder, **keys):
    places = {"output_dir": str(folder / "run"), "store_dir": str(folder / "data")}
    (folder / "r.yaml").write_text(yaml.safe_dump(RECIPE | places | keys))
    return ["pretrain", str(folder / "r.yaml"), "--skip_checks"]


BEST = {"load_best_model_at_end": True}
TASKS = {"eval_tasks": ["toyworld_recall"], "eval_tasks_limit": 8, "eval_steps": 2}


def test_pretraining_asks_tasks_and_ends_with_the_best(tmp_path):
    """The loss falls in every step, so its opposite is best in the first evaluation: model/ is that of step 2."""
    worst = BEST | {"metric_for_best_model": "stories_loss", "greater_is_better": True}
    assert cli.main(pretrain(tmp_path, max_steps=6, **TASKS, **worst)) == 0
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    looked = [row for row in rows if "eval_toyworld_recall_acc" in row]
    assert [row["step"] for row in looked] == [2, 4, 6]
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["best_step"] == 2
    assert result["shards"]["stories"]["loss"] == pytest.approx(looked[0]["eval_stories_loss"], abs=1e-6)
    assert not (run / "best.safetensors").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
    for keys, expected in [
        (BEST | TASKS, "name metric_for_best_model; allowed: stories_loss, stories_bits_per_byte, toyworld_recall_acc"),
        (BEST | TASKS | {"metric_for_best_model": "stories_los"}, "no evaluation gives that figure"),
        (BEST | {"metric_for_best_model": "stories_loss"}, "there is one evaluation, at the end"),
        ({"metric_for_best_model": "stories_loss"}, "has no effect without load_best_model_at_end: true"),
        ({"eval_tasks_limit": 5}, "eval_tasks_limit=5 has no effect without eval_tasks"),
        ({"eval_tasks": ["toyworld_recal"]}, "'toyworld_recal' is unknown; nearest: toyworld_recall"),
    ]:
        capsys.readouterr()
        assert cli.main(pretrain(tmp_path, max_steps=2, **keys)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line
