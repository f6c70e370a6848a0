"""The run folder: whole or not at all, whatever the disk does, and never over another run."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit import __version__
from llmkit.config import UserError, load
from llmkit.report.plots import plot_losses, read_metrics
from llmkit.run import Result, Run, check_output_dir, remove_partials, resolve_model_dir, write_json, written_beside
from llmkit.verbs import PretrainConfig

RESULT = Result("pretrain", "ok", "x/model", None, 1.5, 2.5, 7, {"a": {"loss": 1.0, "entropy": None}}, {"steps": 2})
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_folder_appears_whole_under_its_name(tmp_path):
    with written_beside(tmp_path / "deep" / "model") as partial:
        assert partial.parent == tmp_path / "deep" and not any(partial.iterdir())  # same file system, so rename works
        (partial / "a").write_text("1")
        assert not (tmp_path / "deep" / "model").exists()
    assert contents(tmp_path) == {"deep/model/a": b"1"}


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt(), SystemExit(1)], ids=type)
def test_a_failure_leaves_nothing_and_is_not_hidden(error, tmp_path):
    with pytest.raises(type(error)) as raised, written_beside(tmp_path / "model") as partial:
        (partial / "a").write_text("1")
        raise error
    assert raised.value is error and not any(tmp_path.iterdir())


@pytest.mark.parametrize("exist_ok", [False, True])
def test_of_two_writers_the_first_wins(exist_ok, tmp_path):
    """They shared one partial folder, and each removed the other's files."""
    refused = contextlib.nullcontext() if exist_ok else pytest.raises(UserError, match="another run is writing there")
    with refused, written_beside(tmp_path / "model", exist_ok=exist_ok) as late:
        (late / "a").write_text("late")
        with written_beside(tmp_path / "model") as partial:
            (partial / "a").write_text("first")
        assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert contents(tmp_path) == {"model/a": b"first"} and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_of_the_block_is_not_taken_for_another_writer(tmp_path):
    error = OSError(errno.ENOTEMPTY, "Directory not empty")
    with pytest.raises(OSError) as raised, written_beside(tmp_path / "model", exist_ok=True):
        raise error
    assert raised.value is error and not any(tmp_path.iterdir())


def test_an_earlier_folder_is_never_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    with pytest.raises(UserError, match="exists already"), written_beside(tmp_path / "model") as partial:
        (partial / "a").write_text("new")
    assert contents(tmp_path) == {"model/a": b"old"}


@pytest.mark.parametrize(
    "error",
    [
        NO_SPACE,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
    ids=lambda error: str(error)[:12],
)
def test_a_full_disk_is_the_users_to_mend_and_costs_no_earlier_save(error, tmp_path):
    with written_beside(tmp_path / "step-1") as partial:
        (partial / "a").write_text("1")
    is_full = pytest.raises(UserError, match=r"step-2: the disk is full \(\d+ MB free\)")
    with is_full, written_beside(tmp_path / "step-2") as partial:
        (partial / "a").write_text("2")
        raise error
    assert contents(tmp_path) == {"step-1/a": b"1"}


def test_a_disk_too_full_for_a_folder_is_said_too(tmp_path, monkeypatch):
    """The parent is then missing as well, and asking it for free space once crashed."""

    def refuse(*_, **__):
        raise NO_SPACE

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="the disk is full"), written_beside(tmp_path / "checkpoints" / "step-1"):
        pass


def test_a_model_that_outgrows_a_real_disk_leaves_the_earlier_one(small_disk):
    from accelerate import Accelerator
    from helpers import tiny_model

    from llmkit.data.tokenizer import train_char
    from llmkit.train.checkpoint import damage, save_checkpoint, save_run_model
    from llmkit.train.engines import Engine

    tokenizer, config = train_char(["abc"]), PretrainConfig(optim="muon")
    small, big = (
        Engine(Accelerator(cpu=True), tiny_model(**size), config, False) for size in ({}, {"hidden_size": 256})
    )
    save_run_model(small, tokenizer, small_disk)
    save_checkpoint(small, tokenizer, small_disk, {"step": 1}, {}, None)
    before = contents(small_disk)
    assert "model/model.safetensors" in before
    for save in (
        lambda: save_run_model(big, tokenizer, small_disk),  # 7 MB
        lambda: save_checkpoint(big, tokenizer, small_disk, {"step": 2}, {}, 1),
    ):
        with pytest.raises(UserError, match="the disk is full") as error:
            save()
        assert "\n" not in str(error.value)
        assert contents(small_disk) == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["checkpoints", "model"]
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000001"]
    assert damage(small_disk / "checkpoints/step-00000001") is None


def test_a_full_disk_at_the_result_keeps_the_earlier_result(small_disk):
    write_json(small_disk / "result.json", {"a": 1})
    (small_disk / "ballast").write_bytes(bytes(2**20 - 2 * os.sysconf("SC_PAGE_SIZE")))
    with pytest.raises(UserError, match=r"result.json: the disk is full"):
        write_json(small_disk / "result.json", {"a": "x" * 2**16})
    assert json.loads((small_disk / "result.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "result.json"]


def test_logging_to_a_full_disk_never_stops_a_run(small_disk):
    run = Run.start(small_disk / "run", "pretrain", PretrainConfig(), {})
    for step in range(300):
        run.log({"step": step, "text": "x" * 5000})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert 100 < len(lines) < 300 and json.loads(lines[0])["step"] == 0


def test_a_disk_full_at_the_start_names_output_dir(small_disk):
    (small_disk / "run").mkdir()
    with pytest.raises(OSError), (small_disk / "ballast").open("wb") as file:
        file.write(bytes(2**21))
    with pytest.raises(UserError, match=r"^output_dir='.*/run': cannot be written \(the disk is full\)"):
        Run.start(small_disk / "run", "pretrain", PretrainConfig(), {})


def test_a_run_says_what_it_is(tmp_path):
    config = PretrainConfig(output_dir=str(tmp_path), learning_rate=1e-3)
    run = Run.start(tmp_path / "run", "pretrain", config, {"seed": 3})
    run.log({"step": 1, "loss": 2.0})
    assert run.finish(RESULT) is RESULT
    assert sorted(contents(tmp_path / "run")) == ["manifest.json", "metrics.jsonl", "recipe.yaml", "result.json"]
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert {"stage", "command", "started", "versions", "git_commit", "seed"} == set(manifest)
    assert manifest["stage"] == "pretrain" and manifest["seed"] == 3 and manifest["command"]
    assert manifest["versions"]["llmkit"] == __version__ and {"python", "torch"} < set(manifest["versions"])
    assert load(PretrainConfig, [str(run.folder / "recipe.yaml")]) == config
    assert read_metrics(run.folder) == [{"step": 1, "loss": 2.0}]
    result = json.loads((run.folder / "result.json").read_text())
    keys = ["stage", "status", "model_dir", "parent", "wall_s", "cpu_s", "tokens", "shards", "metrics"]  # DESIGN, 3
    assert list(result) == keys and result["shards"] == {"a": {"loss": 1.0, "entropy": None}}
    assert run.model_dir == tmp_path / "run" / "model"


def test_other_ranks_write_nothing(tmp_path):
    run = Run.start(tmp_path / "run", "pretrain", PretrainConfig(), {}, is_main=False)
    run.log({"step": 1})
    run.finish(RESULT)
    assert not any(tmp_path.iterdir())


def test_logging_survives_a_folder_that_is_gone(tmp_path):
    run = Run.start(tmp_path / "run", "pretrain", PretrainConfig(), {})
    shutil.rmtree(run.folder)
    run.log({"step": 1})


def test_output_dir_may_be_new_empty_or_a_run_without_weights(tmp_path):
    check_output_dir(tmp_path / "new")
    check_output_dir(tmp_path)
    Run.start(tmp_path, "pretrain", PretrainConfig(), {}).log({"step": 1})
    check_output_dir(tmp_path)
    Run.start(tmp_path, "pretrain", PretrainConfig(), {})
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # no lines of two runs in one file


@pytest.mark.parametrize("name", ["model", "adapter", "checkpoints", "result.json"])
def test_output_dir_with_results_is_refused(name, tmp_path):
    Run.start(tmp_path, "pretrain", PretrainConfig(), {})
    (tmp_path / name / "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"output_dir='{tmp_path}': holds another run \({name}\)"):
        check_output_dir(tmp_path)


def test_output_dir_with_foreign_files_or_a_file_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and not a run folder"):
        check_output_dir(tmp_path)
    with pytest.raises(UserError, match="is a file; name a folder"):
        check_output_dir(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="cannot be written"):
        Run.start(tmp_path / "thesis.tex" / "run", "pretrain", PretrainConfig(), {})


@pytest.mark.parametrize("manifest", ['{"num_tokens": 5}', "5", '["stage"]', "{", ""])
def test_a_manifest_without_a_stage_makes_no_run_folder(manifest, tmp_path):
    """`--output_dir` of a token store once wrote a run into it."""
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="is not empty and not a run folder"):
        check_output_dir(tmp_path)


def test_two_runs_never_write_in_one_folder(tmp_path):
    """The second emptied the metrics of the first, which had no weights yet."""
    pytest.importorskip("fcntl")
    first = Run.start(tmp_path, "pretrain", PretrainConfig(), {})
    first.log({"step": 1})
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"^output_dir='{tmp_path}': another run is writing there; choose another"):
        Run.start(tmp_path, "pretrain", PretrainConfig(), {})
    assert contents(tmp_path) == before and ".lock" in before
    first.finish(RESULT)
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(UserError, match=r"holds another run \(result.json\)"):  # finished since the stage looked
        Run.start(tmp_path, "pretrain", PretrainConfig(), {})
    assert "metrics.jsonl" in contents(tmp_path) and not (tmp_path / ".lock").exists()


def test_the_lock_of_a_killed_or_failed_run_is_no_lock(tmp_path):
    (tmp_path / ".lock").touch()
    check_output_dir(tmp_path)
    run = Run.start(tmp_path, "pretrain", PretrainConfig(), {})
    del run
    assert sorted(contents(tmp_path)) == ["manifest.json", "metrics.jsonl", "recipe.yaml"]


def test_a_run_folder_stands_for_its_model(tmp_path):
    assert resolve_model_dir(str(tmp_path)) == str(tmp_path)
    (tmp_path / "model").mkdir()
    assert resolve_model_dir(str(tmp_path)) == str(tmp_path)  # no config.json: not a model
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_model_dir(str(tmp_path)) == str(tmp_path / "model")
    assert resolve_model_dir("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_a_line_cut_by_a_full_disk_does_not_cost_the_plot(tmp_path):
    """`log` may leave half a line on a full disk; the plot after training then crashed."""
    Run.start(tmp_path, "pretrain", PretrainConfig(), {}).log({"step": 1, "loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with pytest.warns(UserWarning, match=r"metrics.jsonl: skipped 1 of 2 lines"):
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("shard", ["val", "a$_$", "100%"])
def test_a_plot_takes_any_shard_name(shard, tmp_path):
    """Matplotlib reads $...$ as mathematics, and raises where it is not."""
    folder = tmp_path / "run$_$"
    run = Run.start(folder, "pretrain", PretrainConfig(), {"eval_shards": {shard: {"entropy": 1.0}, "unseen": {}}})
    run.log({"step": 1, "loss": 9.0})
    run.log({"step": 1, f"eval_{shard}_loss": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_losses(folder).read_bytes().startswith(b"\x89PNG")


def test_an_empty_run_still_has_a_plot(tmp_path):
    Run.start(tmp_path, "pretrain", PretrainConfig(), {})
    assert plot_losses(tmp_path) == tmp_path / "loss.png"


def test_a_run_killed_inside_its_first_save_is_no_run_in_the_way(tmp_path):
    """`checkpoints/` with nothing but a hidden partial folder once made the run impossible to resume or replace."""
    Run.start(tmp_path / "run", "pretrain", PretrainConfig(), {}).unlock()
    (tmp_path / "run/checkpoints/.step-00000008.abcd1234").mkdir(parents=True)
    check_output_dir(tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000008").mkdir()
    with pytest.raises(UserError, match="holds another run"):
        check_output_dir(tmp_path / "run")


def test_others_can_read_what_a_run_saves(tmp_path):
    """safetensors writes files that only their owner can read."""
    with written_beside(tmp_path / "model") as partial:
        (partial / "a").touch(mode=0o600)
    assert (tmp_path / "model/a").stat().st_mode & 0o777 == 0o644


def test_a_kill_between_the_two_renames_keeps_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a").write_text("old")
    real = os.rename

    def rename(a, b):
        if Path(b).name == "model":
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), written_beside(tmp_path / "model", replace=True) as partial:
        (partial / "a").write_text("new")
    monkeypatch.undo()
    remove_partials(tmp_path)
    assert (tmp_path / "model/a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]
