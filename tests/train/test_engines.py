"""Engines: two gloo processes give what one gives, and resume from each other's checkpoints.

python -m pytest tests/train/test_engines.py            (each launch takes about ten seconds)
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers import tiny_model
from safetensors.torch import load_file
from test_pretrain import RECIPE, ROOT, metrics, run

from llmkit import launch
from llmkit.config import PretrainConfig, UserError, read_recipe
from llmkit.train.checkpoint import damage
from llmkit.train.engines import Engine, Fsdp2, check_engine, engine_kind, start_engine

KEYS = {"lr_scheduler_type": "constant", "warmup_steps": 2, "save_steps": 4}  # no schedule that depends on max_steps
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
RANKS = Path(__file__).parent / "engine_ranks.py"


def environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return {k: v for k, v in os.environ.items() if k not in names} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(folder: Path, engine: str, **keys) -> list[str]:
    path = folder / "recipe.yaml"
    recipe = {"output_dir": str(folder / "run"), "store_dir": str(folder / "data")} | RECIPE | KEYS
    recipe |= {"accelerate_config": "cpu" if engine == "ddp" else engine, "num_processes": 2}
    path.write_text(yaml.safe_dump(recipe | {"per_device_train_batch_size": 2} | keys))
    return [sys.executable, "-m", "llmkit", "pretrain", str(path)]


def two(folder: Path, engine: str, **keys) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, engine, **keys), capture_output=True, text=True, env=environment(), timeout=240
    )


def ranks(recipe: str) -> list[int]:
    """Process ids of the training processes, without the command and torchrun that started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if b"LOCAL_RANK=" in path.read_bytes() and recipe in (path.parent / "cmdline").read_text():
                found.append(int(path.parent.name))
    return found


def compare(one: Path, other: Path, tolerance: float) -> None:
    losses = [[row["loss"] for row in metrics(path) if "loss" in row] for path in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    first, second = (load_file(path / "model/model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for key in first:
        assert (first[key] - second[key]).norm() <= 1e-4 * first[key].norm(), key


@pytest.fixture(scope="module", params=["adamw_torch_fused", "muon"])
def one(request, tmp_path_factory) -> tuple[str, Path]:
    """One process: 12 steps in one go, with checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp(request.param)
    run(folder, max_steps=12, optim=request.param, **KEYS)
    return request.param, folder


@pytest.mark.medium
@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_then_two_then_one_equals_one_process(engine, one, tmp_path):
    """Steps 1-4 alone, 5-8 on two processes, 9-12 alone again. Measured: losses 1e-6, weights 4e-5 (Muon 5e-5)."""
    optim, folder = one
    if optim == "muon" and engine.startswith("zero"):
        pytest.skip("refused: test_what_an_engine_cannot_do_is_refused_by_name")
    ours = tmp_path / "run"
    shutil.copytree(folder / "run", ours)
    shutil.copytree(folder / "data", tmp_path / "data")
    for step in (8, 12):
        shutil.rmtree(ours / f"checkpoints/step-{step:08d}")
    (ours / "result.json").unlink()
    done = two(tmp_path, engine, resume_from_checkpoint=True, max_steps=8, optim=optim)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    assert "resume    " in done.stdout and f"2 processes ({engine})" in done.stdout
    manifest = json.loads((ours / "manifest.json").read_text())
    assert (manifest["engine"], manifest["num_processes"]) == (engine, 2)
    names = {path: sorted(p.name for p in (path / "model").iterdir()) for path in (ours, folder / "run")}
    assert len(set(map(tuple, names.values()))) == 1  # the same plain model folder
    run(tmp_path, max_steps=12, optim=optim, resume_from_checkpoint=True, **KEYS)
    compare(folder / "run", ours, 1e-5 if optim != "muon" else 1e-4)


@pytest.mark.medium
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_clips_judges_and_skips_as_one_process_does(engine, tmp_path):
    """On the ranks: gradient norms, a skipped step that changes nothing, a gradient that is not finite."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += ["--log_dir", str(tmp_path)]
    said = launch.engine_environment(read_recipe(launch.find_config("cpu" if engine == "ddp" else engine)))
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [*launcher, str(RANKS), engine], capture_output=True, text=True, env=environment() | said | paths, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 2


@pytest.mark.medium
def test_a_killed_rank_ends_the_run_with_one_line_and_the_run_resumes(tmp_path):
    start = command(tmp_path, "ddp", max_steps=3000, save_steps=10)
    process = subprocess.Popen(
        start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    folder = tmp_path / "run"
    while process.poll() is None and not list(folder.glob("checkpoints/step-*")):
        time.sleep(0.05)
    os.kill(max(ranks(str(tmp_path / "recipe.yaml"))), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("\n") == 1, err
    assert "another process ended or was killed; go on with --resume_from_checkpoint true" in err
    newest = max(folder.glob("checkpoints/step-*"))
    assert damage(newest) is None
    step = int(newest.name[-8:])
    done = two(tmp_path, "ddp", max_steps=step + 2, resume_from_checkpoint=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(1, step + 3))


@pytest.mark.medium
def test_sigterm_to_the_launcher_lets_both_ranks_save(tmp_path):
    start = command(tmp_path, "ddp", max_steps=3000, save_steps=2000)
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size > 500):
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, err
    assert "stopped   by a signal" in out
    step = json.loads((tmp_path / "run/result.json").read_text())["metrics"]["steps"]
    assert damage(tmp_path / f"run/checkpoints/step-{step:08d}") is None


@pytest.mark.parametrize(
    "variables, kind",
    [
        ({}, "single"),
        ({"WORLD_SIZE": "2"}, "ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "zero2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
    ],
)
def test_the_engine_is_what_the_launcher_says(variables, kind, monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert engine_kind() == kind


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1; allowed: fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage=0; allowed: 1, 2"),
    ],
)
def test_engines_that_do_not_exist_here_are_refused(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        engine_kind()


@pytest.mark.parametrize(
    "kind, keys, said",
    [
        ("zero1", {"optim": "muon"}, "use fsdp2 or ddp"),
        ("zero2", {"optim": "muon"}, "use fsdp2 or ddp"),
        ("zero3", {"optim": "muon"}, "use fsdp2 or ddp"),
        ("zero3", {"use_peft": True}, "use ddp"),
        ("zero2", {"optim": "adamw_torch"}, "use adamw_torch_fused"),
        ("fsdp2", {"use_peft": True}, "use ddp"),
        ("zero3", {"torch_compile": True}, "use zero2 or fsdp2"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_name(kind, keys, said):
    with pytest.raises(UserError, match=said):
        check_engine(kind, PretrainConfig(**keys))
    check_engine("ddp", PretrainConfig(**keys))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_engine_that_did_not_wrap_the_model_is_refused(kind, monkeypatch):
    """Accelerate turns engines off without a word where it thinks that they cannot run."""
    if kind == "fsdp2":
        monkeypatch.setattr(Fsdp2, "_wrap", Engine._wrap)
    said = rf"asked for {kind}, got LlmkitForCausalLM on 1 processes; allowed: single, ddp"
    with pytest.raises(UserError, match=said):
        start_engine(Accelerator(cpu=True), kind, tiny_model(), PretrainConfig(), bf16=False)


def test_torch_has_not_been_told_of_ranks_by_these_tests():
    assert not torch.distributed.is_initialized()
