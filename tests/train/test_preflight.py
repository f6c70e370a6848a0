"""Our own loop, handed to the checks: what they are given is what `pretrain` trains on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from train.test_pretrain import RECIPE

from llmkit import cli, verbs
from llmkit.check.subject import same_random_state, without_dropout
from llmkit.data.loader import IGNORE
from llmkit.train import preflight


@pytest.fixture
def recipe(tmp_path) -> verbs.PretrainConfig:
    keys = {"output_dir": str(tmp_path / "run"), "store_dir": str(tmp_path / "data")} | RECIPE
    return verbs.PretrainConfig(**keys)


@pytest.fixture
def subject(recipe):
    return preflight.get_subject(recipe, tier=2)


def test_tier_0_builds_no_model_and_no_store(recipe, tmp_path):
    subject = preflight.get_subject(recipe, tier=0)
    assert subject.model is None and subject.training is None
    assert subject.config.vocab_size == len(subject.tokenizer) and subject.is_scratch
    assert [p.name.split("-")[0] for p in (tmp_path / "data").iterdir()] == ["tokenizer"]


def test_rows_hold_every_label_where_the_loss_reads_it(subject):
    row = subject.training.labelled_rows(1)[0]
    batch = subject.training.loader.batch(0)
    assert row.input_ids[:-1] == batch["input_ids"][0].tolist()
    assert row.labels == [IGNORE, *batch["shift_labels"][0].tolist()]
    assert all(label in (IGNORE, token) for label, token in zip(row.labels, row.input_ids, strict=True))


def test_a_row_that_trains_nothing_keeps_its_first_token(subject, monkeypatch):
    """Padding was cut from its end until nothing was left, and then an IndexError."""
    batch = subject.training.loader.batch(0)
    batch["shift_labels"][:] = IGNORE
    monkeypatch.setattr(subject.training.loader, "batch", lambda step: batch)
    row = subject.training.labelled_rows(1)[0]
    assert row.input_ids == batch["input_ids"][0, :1].tolist() and row.labels == [IGNORE]


def test_accumulated_gradients_are_those_of_one_batch(subject):
    training, rows = subject.training, subject.training.batches(1, 4, ragged=True)
    parts = training.batches(4, 1, ragged=True)
    assert len({int((p["labels"] != IGNORE).sum()) for p in parts}) == 4
    grads = []
    for micro_batches in (rows, parts):
        with subject.small_model() as model, without_dropout(model):
            training.backward(model, micro_batches)
            grads.append([p.grad.clone() for p in model.parameters()])
    for whole, summed in zip(*grads, strict=True):
        torch.testing.assert_close(whole, summed, rtol=1e-4, atol=1e-6)


def test_a_run_of_the_checks_is_the_real_loop_and_resumes_exactly(subject, tmp_path):
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    traces = []
    for seed, folder, options in ((0, "a", {}), (0, "b", {"stop_at": 2}), (5, "c", {})):
        if folder == "c":
            options = {"resume_from": traces[1].checkpoints[2]}
        with subject.small_model(seed=seed) as model, same_random_state():
            traces.append(subject.training.run(model, tmp_path / folder, 4, **options))
    straight, stopped, resumed = traces
    assert [len(t.steps) for t in traces] == [4, 2, 2]
    assert [dataclasses.astuple(s) for s in straight.steps] == [
        dataclasses.astuple(s) for s in (*stopped.steps, *resumed.steps)
    ]
    assert all(torch.equal(straight.weights[name], resumed.weights[name]) for name in before)
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())


def test_evaluation_does_not_depend_on_the_batch(subject):
    losses = [subject.training.evaluate(subject.model, size, 6)["eval_stories_loss"] for size in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def write(recipe: verbs.PretrainConfig, folder: Path, **keys) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(dataclasses.replace(recipe, **keys))))
    return str(path)


def test_a_run_begins_with_tier_0_and_keeps_the_report(recipe, tmp_path, capsys):
    assert cli.main(["pretrain", write(recipe, tmp_path, max_steps=1, sample_prompts=[])]) == 0
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    assert report["summary"]["fail"] == 0 and {c["tier"] for c in report["checks"]} == {0}
    assert "\nchecks    " in capsys.readouterr().out


def test_a_failed_check_keeps_a_run_from_starting_unless_skipped(recipe, tmp_path, capsys, monkeypatch):
    def broken(*args, **options):
        subject = get_subject(*args, **options)
        subject.config.vocab_size = 9
        return subject

    get_subject = preflight.get_subject
    monkeypatch.setattr(preflight, "get_subject", broken)
    path = write(recipe, tmp_path, max_steps=1, sample_prompts=[])
    assert cli.main(["pretrain", path]) == 1
    captured = capsys.readouterr()
    assert "ids-beyond-embedding" in captured.out and "was not started" in captured.err
    assert not (tmp_path / "run").exists()
    ignored = write(recipe, tmp_path, max_steps=1, check_ignore=[{"check": "ids-beyond-embedding", "reason": "spare"}])
    assert cli.main(["pretrain", ignored]) == 0
    skipped = write(recipe, tmp_path, max_steps=1, output_dir=str(tmp_path / "other"))
    assert cli.main(["pretrain", skipped, "--skip_checks"]) == 0
    assert not (tmp_path / "other" / "check.json").exists()


def test_a_recipe_is_checked_with_flags_of_both(recipe, tmp_path, capsys):
    path = write(recipe, tmp_path)
    code = cli.main(["check", path, "--only", "future-leak", "--max_steps", "5", "--json", str(tmp_path / "out.json")])
    assert code == 0
    assert json.loads((tmp_path / "out.json").read_text())["checks"][0]["status"] == "pass"
    assert not (tmp_path / "run").exists()
