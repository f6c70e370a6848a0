"""`--overfit N`: settings of the trial, what a document is asked from, and the loss that nobody can go below."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from train.test_pretrain import RECIPE

from llmkit import config
from llmkit.config import UserError
from llmkit.train import pretrain
from llmkit.train.overfit import floor_of, for_overfit, unique_from
from llmkit.tuning import SftConfig
from llmkit.verbs import PretrainConfig


def test_a_document_is_asked_from_where_no_other_begins_like_it():
    a, b, c = [0, 1, 2, 3], [0, 1, 5, 6], [0, 9, 9, 9]
    assert unique_from([a, b, c]) == [3, 3, 2]
    assert unique_from([a, a]) == [4, 4]  # never: two are equal
    assert unique_from([[0, 1], [0, 1, 2]]) == [2, 2 + 1]  # one is the beginning of the other


def test_the_loss_that_is_left_is_that_of_guessing_which_document_it_is():
    """Four documents of three tokens, two of them equal: log 4 for each of two, log 2 for each of the pair."""
    pieces = [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9], [0, 7, 8, 9]]
    assert floor_of(pieces) == pytest.approx((2 * math.log(4) + 2 * math.log(2)) / 12)
    assert floor_of([[0, 1, 2]]) == 0


def test_the_trial_has_a_folder_of_its_own_and_holds_nothing_out():
    given = SftConfig(output_dir="runs/x", overfit=8, eval_datasets=[{"path": "a"}], save_steps=5, weight_decay=0.1)
    made = for_overfit(given)
    assert made.output_dir == "runs/x-overfit" and not made.eval_datasets and made.save_steps is None
    assert made.weight_decay == 0 and made.num_train_epochs == 100
    assert for_overfit(dataclasses.replace(given, overfit=None)).output_dir == "runs/x"


def test_max_steps_of_the_whole_run_are_cut_to_100_passes():
    given = PretrainConfig(overfit=8, max_steps=19_000, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert for_overfit(given).max_steps == 100
    assert for_overfit(dataclasses.replace(given, max_steps=7)).max_steps == 7


def recipe(tmp_path: Path, **keys) -> PretrainConfig:
    own = {"output_dir": str(tmp_path / "run"), "store_dir": str(tmp_path / "data"), "overfit": 4}
    return PretrainConfig(**{**RECIPE, **own, **keys})


@pytest.mark.medium
@pytest.mark.parametrize("packing", ["bos_bestfit", "contiguous"])
def test_pretraining_learns_its_rows_by_heart_or_says_that_it_did_not(tmp_path, packing, capsys):
    keys = {"packing_strategy": packing, "learning_rate": 1e-2, "optim": "adamw_torch_fused"}
    failed = pretrain.main(recipe(tmp_path, max_steps=2, **keys))
    assert failed.status == "failed" and "NOT learnt by heart" in capsys.readouterr().out
    done = pretrain.main(recipe(tmp_path, max_steps=160, **keys))
    told = json.loads((tmp_path / "run-overfit/result.json").read_text())
    assert told == dataclasses.asdict(done) and not (tmp_path / "run").exists()
    if packing == "bos_bestfit":
        assert done.status == "ok" and done.metrics["overfit_exact_match"] >= 0.99
        assert done.metrics["overfit_loss"] == pytest.approx(done.metrics["overfit_floor"], abs=0.1)


def test_a_mixture_is_refused(tmp_path):
    keys = recipe(tmp_path, datasets=RECIPE["datasets"] * 2)
    with pytest.raises(UserError, match="overfit=4 takes rows of one training source"):
        pretrain.main(keys)
    assert "overfit" in config.describe(PretrainConfig)
