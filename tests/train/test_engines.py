"""Engines: two gloo processes give what one gives, and resume from each other's checkpoints.

python -m pytest tests/train/test_engines.py            (each launch takes about ten seconds; warm_ranks.py saves them)
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
from warm_ranks import WarmRanks

from llmkit import launch
from llmkit.config import UserError, read_recipe
from llmkit.train.checkpoint import damage
from llmkit.train.engines import Engine, Fsdp2, check_engine, engine_kind, start_engine
from llmkit.verbs import PretrainConfig

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


def engine_variables(engine: str) -> dict[str, str]:
    return launch.engine_environment(read_recipe(launch.find_config("cpu" if engine == "ddp" else engine)))


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


@pytest.fixture(scope="module")
def warm():
    found = WarmRanks(environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    yield found
    found.close()


LAUNCHED = [pytest.param(e, True, marks=[pytest.mark.slow] * (e != "zero3")) for e in ENGINES]


@pytest.mark.medium
@pytest.mark.parametrize("engine, is_launched", [*((engine, False) for engine in ENGINES), *LAUNCHED])
def test_one_process_then_two_then_one_equals_one_process(engine, is_launched, one, warm, tmp_path):
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
    keys = {"resume_from_checkpoint": True, "max_steps": 8, "optim": optim}
    if is_launched:
        done = two(tmp_path, engine, **keys)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        words = command(tmp_path, engine, **keys)
        code, out, err = warm.run(engine_variables(engine), words[words.index("pretrain") :])
    assert code == 0 and not err, err[-3000:]
    assert "resume    " in out and f"2 processes ({engine})" in out
    manifest = json.loads((ours / "manifest.json").read_text())
    assert (manifest["engine"], manifest["num_processes"]) == (engine, 2)
    names = {path: sorted(p.name for p in (path / "model").iterdir()) for path in (ours, folder / "run")}
    assert len(set(map(tuple, names.values()))) == 1  # the same plain model folder
    run(tmp_path, max_steps=12, optim=optim, resume_from_checkpoint=True, **KEYS)
    compare(folder / "run", ours, 1e-5 if optim != "muon" else 1e-4)


@pytest.mark.medium
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_clips_judges_and_skips_as_one_process_does(engine, warm):
    """On the ranks: gradient norms, a skipped step that changes nothing, a gradient that is not finite."""
    code, out, err = warm.run(engine_variables(engine), [str(RANKS), engine])
    assert code == 0, err[-3000:]
    assert out.count("ok") == 2


@pytest.mark.medium
def test_a_killed_rank_ends_the_run_with_one_line_and_the_run_resumes(warm, tmp_path):
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
    words = command(tmp_path, "ddp", max_steps=step + 2, resume_from_checkpoint=True)
    code, _, err = warm.run(engine_variables("ddp"), words[words.index("pretrain") :])
    assert code == 0, err[-3000:]
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
