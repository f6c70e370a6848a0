"""Checkpoints: what resuming gives back, what it refuses, and that damage is noticed.

python -m pytest tests/train/test_checkpoint.py
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_pretrain import RECIPE, ROOT, metrics, run

from llmkit import cli
from llmkit.config import UserError
from llmkit.train import build, checkpoint
from llmkit.train.checkpoint import damage, find_checkpoint
from llmkit.train.monitor import Monitor
from llmkit.verbs import PretrainConfig

pytestmark = pytest.mark.medium  # whole runs, a second each
STEP_4 = "checkpoints/step-00000004"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def is_equal(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def losses(folder: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(folder) if "loss" in row]


def interrupted(folder: Path, last: int = 4, **keys) -> Path:
    """A run whose checkpoints and results after step `last` never happened."""
    run(folder, save_steps=2, **keys)
    for path in (folder / "run/checkpoints").iterdir():
        if int(path.name[-8:]) > last:
            shutil.rmtree(path)
    (folder / "run/result.json").unlink()
    shutil.rmtree(folder / "run/model")
    return folder / "run"


def refused(folder: Path, capsys, **keys) -> str:
    path = folder / "recipe.yaml"
    recipe = {"output_dir": str(folder / "run"), "store_dir": str(folder / "data"), "save_steps": 2} | RECIPE
    path.write_text(yaml.safe_dump(recipe | {"resume_from_checkpoint": True} | keys))
    capsys.readouterr()
    assert cli.main(["pretrain", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


CASES = {
    "muon": {"optim": "muon"},
    "adamw": {"optim": "adamw_torch_fused"},
    "plain adamw": {"optim": "adamw_torch"},
    "dropout": {"config_overrides": RECIPE["config_overrides"] | {"attention_dropout": 0.3}},
    "tied": {"config_overrides": RECIPE["config_overrides"] | {"tie_word_embeddings": True}},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "gpt2 with dropout": {"model_type": "gpt2", "config_overrides": {"n_embd": 32, "n_layer": 1, "n_head": 2}},
}


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_a_resumed_run_equals_one_that_was_never_interrupted(keys, tmp_path, capsys):
    whole = tmp_path / "whole"
    run(tmp_path, output_dir=str(whole), **keys)
    folder = interrupted(tmp_path, **keys)
    run(tmp_path, save_steps=2, resume_from_checkpoint=True, **keys)
    assert f"resume    {folder / STEP_4}, step 4" in capsys.readouterr().out
    assert is_equal(whole, folder)
    assert losses(whole) == losses(folder)  # each step logged once
    results = [json.loads((path / "result.json").read_text()) for path in (whole, folder)]
    assert results[0]["tokens"] == results[1]["tokens"] and results[0]["shards"] == results[1]["shards"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["resumed_at_step"] == 4 and len(manifest["earlier"]) == 1


def test_lora_resumes_to_the_bit_although_merging_rounds(tmp_path):
    pytest.importorskip("peft")
    run(tmp_path, output_dir=str(tmp_path / "base"))
    keys = {
        "model_name_or_path": str(tmp_path / "base"),
        "config_overrides": {},
        "vocab_size": 1024,
        "use_peft": True,
    }
    whole = tmp_path / "whole"
    run(tmp_path, output_dir=str(whole), **keys)
    folder = interrupted(tmp_path, **keys)
    assert (folder / STEP_4 / "trainable.safetensors").exists()
    run(tmp_path, save_steps=2, resume_from_checkpoint=True, **keys)
    assert is_equal(whole, folder) and losses(whole) == losses(folder)
    first, second = (load_file(path / "adapter/adapter_model.safetensors") for path in (whole, folder))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_resuming_without_a_checkpoint_starts_anew_and_says_so(tmp_path, capsys):
    assert run(tmp_path, resume_from_checkpoint=True)["status"] == "ok"
    assert "resume    no checkpoint yet: from step 0" in capsys.readouterr().out


def test_the_newest_good_checkpoint_is_used_when_the_newest_is_damaged(tmp_path, capsys):
    whole = tmp_path / "whole"
    run(tmp_path, output_dir=str(whole))
    folder = interrupted(tmp_path)
    path = folder / STEP_4 / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run(tmp_path, save_steps=2, resume_from_checkpoint=True)
    out = capsys.readouterr().out
    assert "step-00000004 is damaged: optimizer.safetensors was changed" in out and "step 2" in out
    assert is_equal(whole, folder) and losses(whole) == losses(folder)
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert {"damaged-step-00000004", "step-00000004", "step-00000006"} <= names


def test_every_flipped_bit_is_noticed(tmp_path):
    """One random bit in every file, 20 times."""
    folder = interrupted(tmp_path) / STEP_4
    assert damage(folder) is None
    generator = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {"index.json", "state.json", "state.safetensors", "optimizer.safetensors", "model.safetensors"} <= {
        path.name for path in files
    }
    for path in files:
        good = path.read_bytes()
        bits = generator.sample(range(8 * len(good)), 20)
        for bit in bits:
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            assert damage(folder), f"bit {bit} of {path.name}"
        path.write_bytes(good)
    (folder / ".DS_Store").touch()
    assert damage(folder) is None  # what others put beside the files is no damage


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"datasets": [{"path": "builtin/toyworld", "split": "train[:301]"}]}, "the dataset differs"),
        ({"max_length": 128}, "the dataset differs from that of step-00000004: dataset.max_length was 256, is 128"),
        ({"seed": 1}, "the dataset differs from that of step-00000004: dataset.seed was 0, is 1"),
        ({"vocab_size": 500}, "the tokenizer differs"),
        ({"config_overrides": RECIPE["config_overrides"] | {"rms_norm_eps": 1e-5}}, "model.rms_norm_eps was 1e-06"),
        ({"config_overrides": RECIPE["config_overrides"] | {"hidden_size": 64}}, "the model differs"),
        ({"datasets": 2 * RECIPE["datasets"]}, "the dataset differs from that of step-00000004: dataset.1 was null"),
        ({"optim": "muon"}, "the optimizer differs"),
        ({"per_device_train_batch_size": 8}, "the batch differs from that of step-00000004: rows_per_step was 4, is 8"),
    ],
)
def test_another_data_set_tokenizer_or_model_is_refused_by_name(keys, said, tmp_path, capsys):
    folder = interrupted(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert said in refused(tmp_path, capsys, **keys)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_changed_settings_are_listed(tmp_path, capsys):
    interrupted(tmp_path)
    capsys.readouterr()
    run(tmp_path, save_steps=3, resume_from_checkpoint=True, learning_rate=0.001, data_dir=str(tmp_path))
    changed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert changed == ["changed   learning_rate: 0.003 -> 0.001", "changed   save_steps: 2 -> 3"]


def test_a_finished_run_is_not_run_again_but_can_be_prolonged(tmp_path, capsys):
    run(tmp_path, save_steps=2)
    assert "max_steps=6: step 6 is reached already; raise max_steps" in refused(tmp_path, capsys)
    assert run(tmp_path, save_steps=2, resume_from_checkpoint=True, max_steps=8)["metrics"]["steps"] == 8
    assert [row[0] for row in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_data_set_that_is_no_longer_there_is_refused(tmp_path):
    before = {"identity": {"dataset.0": "a", "dataset.1": "b", "model.new": 1}, "recipe": {}, "step": 1}
    found = checkpoint.Checkpoint(tmp_path / "step-00000001", before, {})
    with pytest.raises(UserError, match=r"the dataset differs .* dataset.1 was \"b\", is null"):
        checkpoint.check_same(found, {"dataset.0": "a"}, {})
    found.state["identity"].pop("dataset.1")
    assert checkpoint.check_same(found, {"dataset.0": "a", "model.other": 2}, {}) == []  # of another transformers


def test_a_store_whose_tokens_were_edited_is_refused(tmp_path, capsys):
    """Its manifest still names the same text."""
    interrupted(tmp_path)
    path = next(path for path in (tmp_path / "data").glob("*/tokens.ds") if path.stat().st_size > 20_000)
    tokens = bytearray(path.read_bytes())
    tokens[1000:1002] = tokens[1002:1004] if tokens[1000:1002] != tokens[1002:1004] else b"\x05\x00"
    path.write_bytes(tokens)
    assert "the dataset differs from that of step-00000004: dataset.0.tokens" in refused(tmp_path, capsys)


def test_lines_of_the_log_average_over_a_restart(tmp_path):
    """logging_steps 6 with a kill after step 4: the line of step 6 holds all six losses, as if nothing had been."""
    whole = tmp_path / "whole"
    run(tmp_path, output_dir=str(whole), logging_steps=6)
    folder = interrupted(tmp_path, logging_steps=6)
    run(tmp_path, save_steps=2, resume_from_checkpoint=True, logging_steps=6)
    assert losses(whole) == losses(folder) and len(losses(folder)) == 1


def test_there_is_nothing_to_go_on_with_beyond_max_steps(tmp_path, capsys):
    interrupted(tmp_path)
    assert "max_steps=3: step 4 is reached already" in refused(tmp_path, capsys, max_steps=3)
    run(tmp_path, save_steps=4, resume_from_checkpoint=True)  # ends at 6 with its newest checkpoint there
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    assert "max_steps=6: step 6 is reached already" in refused(tmp_path, capsys)


def test_a_finished_run_without_checkpoints_is_not_told_to_resume(tmp_path, capsys):
    run(tmp_path)
    error = refused(tmp_path, capsys, save_steps=None)
    assert "holds another run (model, result.json); choose another --output_dir" in error


def test_a_resume_needs_room_for_what_is_left_only(tmp_path, monkeypatch):
    """Ten checkpoints of the whole run were asked for although nine were there."""
    model = torch.nn.Linear(100, 1000, bias=False)  # 400 kB
    (tmp_path / "checkpoints/step-00000009").mkdir(parents=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_300_000))
    keys = PretrainConfig(save_steps=1, save_total_limit=2)
    build.check_disk(tmp_path, model, keys, steps_left=1)
    build.check_disk(tmp_path / "new", model, PretrainConfig(save_steps=1), steps_left=1)
    for more in (PretrainConfig(save_steps=1), PretrainConfig(save_steps=1, save_total_limit=3)):
        with pytest.raises(UserError, match="lower save_total_limit"):
            build.check_disk(tmp_path, model, more, steps_left=3)


def test_a_run_in_the_way_says_how_to_go_on(tmp_path, capsys):
    interrupted(tmp_path)
    assert "--resume_from_checkpoint true" in refused(tmp_path, capsys, resume_from_checkpoint=None)


def test_a_named_checkpoint_branches_off_into_another_folder(tmp_path, capsys):
    folder = interrupted(tmp_path)
    step_2 = folder / "checkpoints/step-00000002"
    assert "step-00000004 of the same run is newer" in refused(tmp_path, capsys, resume_from_checkpoint=str(step_2))
    assert "no such folder" in refused(tmp_path, capsys, resume_from_checkpoint="nowhere")
    keys = {"resume_from_checkpoint": str(step_2), "output_dir": str(tmp_path / "branch")}
    assert run(tmp_path, **keys)["metrics"]["steps"] == 6
    assert [row[0] for row in losses(tmp_path / "branch")] == [3, 4, 5, 6] and step_2.exists()


def test_when_all_are_damaged_the_run_is_not_started_over(tmp_path):
    folder = tmp_path / "checkpoints/step-00000001"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="all 1 checkpoints"):
        find_checkpoint(tmp_path, True, print)


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    """`.old` without its successor was killed between two renames: it is the only copy."""
    parent = tmp_path / "checkpoints"
    for name in (".step-00000006.abcd1234", ".step-00000002.old", ".step-00000004.old", "step-00000004"):
        (parent / name).mkdir(parents=True)
    checkpoint.clear_the_way(tmp_path, None)
    assert sorted(path.name for path in parent.iterdir()) == ["step-00000002", "step-00000004"]


def test_random_generators_come_back():
    device = torch.device("cpu")
    random.gauss(0, 1)  # leaves a second value behind
    np.random.standard_normal()
    saved = {f"rng/0/{key}": value for key, value in checkpoint._generators(device).items()}

    def draw() -> list:
        return [random.gauss(0, 1), random.random(), *np.random.standard_normal(2), *torch.rand(2).tolist()]

    first = draw()
    assert checkpoint.restore_generators(saved, 0, device) and draw() == first
    assert not checkpoint.restore_generators(saved, 1, device)


def test_logs_are_cut_where_the_run_goes_on(tmp_path):
    from llmkit.run import cut_log

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n{"step": 2, "lo')
    cut_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# `llmkit pretrain` that waits in its fourth step until a signal has come: how fast it trains decides nothing
WAITING = """
import os, signal, sys
from pathlib import Path
from llmkit import cli
from llmkit.train import pretrain

has_come, comes = os.pipe()
os.set_blocking(comes, False)
signal.set_wakeup_fd(comes)
factor = pretrain.lr_factor

def waiting_factor(step, *rest):
    if step == 3:
        Path(sys.argv[2]).touch()
        os.read(has_come, 1)
    return factor(step, *rest)

pretrain.lr_factor = waiting_factor
sys.exit(cli.main(["pretrain", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_0(number, tmp_path):
    """A new process, since signals go to a process; the resumed run equals an uninterrupted one."""
    whole, waits = tmp_path / "whole", tmp_path / "waits"
    keys = {"max_steps": 8, "logging_steps": 1}
    path = tmp_path / "recipe.yaml"
    recipe = {"output_dir": str(tmp_path / "run"), "store_dir": str(tmp_path / "data")} | RECIPE | keys
    path.write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WAITING, str(path), str(waits)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not waits.exists():
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err
    assert "stopped   by a signal at step 4 of 8" in out and "--resume_from_checkpoint true" in out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "stopped" and result["metrics"]["steps"] == 4
    again = run(tmp_path, resume_from_checkpoint=True, **keys)
    assert again["status"] == "ok"
    run(tmp_path, output_dir=str(whole), **keys)
    assert is_equal(whole, tmp_path / "run") and losses(whole) == losses(tmp_path / "run")


def test_identity_has_every_key(tmp_path):
    state = json.loads((interrupted(tmp_path) / STEP_4 / "state.json").read_text())
    keys = set(state["identity"])
    assert {
        "tokenizer", "rows_per_step", "dataset.0", "dataset.0.tokens", "dataset.fractions", "dataset.seed",
        "dataset.max_length", "dataset.packing_strategy", "optimizer.optim", "model.trainable", "model.hidden_size",
    } <= keys  # fmt: skip
    assert {key.split(".")[0] for key in keys} == {"tokenizer", "rows_per_step", "dataset", "optimizer", "model"}
    assert build.VOLATILE and not any(key.removeprefix("model.") in build.VOLATILE for key in keys)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"datasets": [{"path": "builtin/toyworld", "split": "train[300:600]"}]}, "dataset.0"),
        ({"packing_strategy": "contiguous"}, "dataset.packing_strategy"),
    ],
)
def test_another_data_set_with_the_same_tokenizer_is_refused(keys, said, tmp_path, capsys):
    """Where the tokenizer is trained on the data, its fingerprint would differ, too."""
    run(tmp_path, output_dir=str(tmp_path / "base"))
    given = {"tokenizer_name": str(tmp_path / "base/model"), "vocab_size": 1024}
    interrupted(tmp_path, **given)
    assert said in refused(tmp_path, capsys, **keys, **given)


def test_another_base_model_or_rank_is_refused_for_lora(tmp_path, capsys):
    pytest.importorskip("peft")
    run(tmp_path, output_dir=str(tmp_path / "base"))
    keys = {"model_name_or_path": str(tmp_path / "base"), "config_overrides": {}, "vocab_size": 1024, "use_peft": True}
    interrupted(tmp_path, **keys)
    for change, said in (({"lora_r": 4}, "model.trainable"), ({"lora_alpha": 4}, "model.lora_alpha was 32, is 4")):
        assert f"differs from that of step-00000004: {said}" in refused(tmp_path, capsys, **keys, **change)
    run(tmp_path, output_dir=str(tmp_path / "other"), seed=1)
    shutil.copy(tmp_path / "other/model/model.safetensors", tmp_path / "base/model/model.safetensors")
    assert "differs from that of step-00000004: model.frozen" in refused(tmp_path, capsys, **keys)


def test_a_resumed_run_has_the_monitor_it_had(tmp_path, monkeypatch):
    keys, seen, before = {"max_steps": 70, "save_steps": 68}, [], Monitor.judge
    run(tmp_path, **keys)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000070")
    (tmp_path / "run/result.json").unlink()
    shutil.rmtree(tmp_path / "run/model")
    state = load_file(tmp_path / "run/checkpoints/step-00000068/state.safetensors")

    def judge(self, *args):
        if not seen:
            seen.append({k: v.clone() for k, v in self.state.items()} | {"first": self.first_pending})
        return before(self, *args)

    monkeypatch.setattr(Monitor, "judge", judge)
    run(tmp_path, **keys, resume_from_checkpoint=True)
    assert seen[0].pop("first") == 69 and all(torch.equal(v, state[f"monitor/{k}"]) for k, v in seen[0].items())
    assert seen[0]["counts"][0] == 68


def test_a_missing_file_is_noticed(tmp_path):
    folder = interrupted(tmp_path) / STEP_4
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        good = path.read_bytes()
        path.unlink()
        assert path.name in (damage(folder) or "")
        path.write_bytes(good)
    assert damage(folder) is None


def test_an_index_with_other_spacing_is_noticed(tmp_path):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "a").write_text("a")
    text = checkpoint._as_text(checkpoint._files(folder))
    (folder / "index.json").write_text(text)
    assert damage(folder) is None
    for bad in (text + " ", text[:-1], text.replace("\n", "")):
        (folder / "index.json").write_text(bad)
        assert damage(folder) == "index.json was changed"


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path, capsys):
    folder = interrupted(tmp_path) / STEP_4
    (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:-1])
    keys = {"resume_from_checkpoint": str(folder), "output_dir": str(tmp_path / "branch")}
    assert "state.safetensors was changed (SHA-256 differs)" in refused(tmp_path, capsys, **keys)


def test_a_branch_is_a_run_of_its_own(tmp_path, capsys):
    step_4 = interrupted(tmp_path) / STEP_4
    keys = {"resume_from_checkpoint": str(step_4), "output_dir": str(tmp_path / "branch")}
    run(tmp_path, **keys)
    assert "resumed_at_step" not in json.loads((tmp_path / "branch/manifest.json").read_text())
    assert "holds another run" in refused(tmp_path, capsys, **keys)


def test_the_whole_folder_wins_over_the_old_one(tmp_path):
    for name in (".step-00000004.old", "step-00000004"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "file").write_text(name)
    checkpoint.clear_the_way(tmp_path, None)
    found = [(path.name, (path / "file").read_text()) for path in (tmp_path / "checkpoints").iterdir()]
    assert found == [("step-00000004", "step-00000004")]


def test_alerts_are_cut_with_the_metrics_and_go_with_a_replaced_run(tmp_path):
    folder = interrupted(tmp_path)
    (folder / "alerts.jsonl").write_text('{"step": 3}\n{"step": 5}\n')
    run(tmp_path, save_steps=2, resume_from_checkpoint=True)
    assert (folder / "alerts.jsonl").read_text() == '{"step": 3}\n'
    for name in ("model", "checkpoints"):
        shutil.rmtree(folder / name)
    (folder / "result.json").unlink()
    run(tmp_path)
    assert not (folder / "alerts.jsonl").exists()


def test_every_earlier_start_is_remembered_and_time_adds_up(tmp_path):
    folder, before = tmp_path / "run", None
    for steps in (2, 4, 6):
        run(tmp_path, save_steps=2, max_steps=steps, resume_from_checkpoint=True)
        state = json.loads((folder / f"checkpoints/step-{steps:08d}/state.json").read_text())
        times = ("wall_s", "cpu_s", "train_wall_s", "train_cpu_s")
        assert not before or all(state[key] > before[key] for key in times)
        before = state
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [e["resumed_at_step"] for e in manifest["earlier"]] == [None, 2] and manifest["resumed_at_step"] == 4


def test_a_run_killed_after_its_last_checkpoint_is_finished_by_resuming(tmp_path):
    folder = interrupted(tmp_path, last=6)
    result = run(tmp_path, save_steps=2, resume_from_checkpoint=True)
    assert result["status"] == "ok" and (folder / "model/model.safetensors").exists()
    assert [row[0] for row in losses(folder)] == [1, 2, 3, 4, 5, 6]


def test_the_last_step_is_saved_too_and_only_the_newest_are_kept(tmp_path):
    run(tmp_path, max_steps=7, save_steps=2, save_total_limit=2)
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"step-00000006", "step-00000007"}
