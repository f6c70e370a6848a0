"""`llmkit check -- CMD`: the user's own command is started unchanged, its trainer taken at `train()`."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.check.command import run_command
from llmkit.check.hook import Hook
from llmkit.config import UserError
from llmkit.verbs import CheckConfig

TESTS = str(Path(__file__).parents[1])
LINES = f"""
import sys
sys.path.insert(0, {TESTS!r})
import tiny
"""
ONLY = CheckConfig(only="future-leak")
pytestmark = pytest.mark.medium


def script(folder: Path, *lines: str) -> list[str]:
    path = folder / "script.py"
    own = f"import tempfile; tempfile.tempdir = {str(folder)!r}"  # the hook ends the process before it tidies up
    path.write_text("\n".join([own, LINES, *lines]) + "\n")
    return [sys.executable, str(path)]


def test_the_trainer_is_checked_and_nothing_is_trained(tmp_path):
    end = "open('trained', 'w')"
    command = script(tmp_path, "t = tiny.lm_trainer()", "t.train()", end)
    report = run_command(ONLY, command)
    assert [(c.id, c.status) for c in report.checks] == [("future-leak", "pass")]
    assert report.target == "Trainer of LlamaForCausalLM"
    assert not Path("trained").exists()


@pytest.mark.slow
def test_a_subclass_whose_train_calls_the_parents_is_checked(tmp_path):
    lines = ["class T(tiny.Trainer):", "    def train(self, *a, **k):", "        return super().train(*a, **k)"]
    report = run_command(ONLY, script(tmp_path, *lines, "tiny.lm_trainer(cls=T).train()"))
    assert report.exit_code == 0


def test_a_constructor_that_raises_is_checked_with_what_it_was_given(tmp_path):
    lines = [
        "class T(tiny.Trainer):",
        "    def __init__(self, *a, **k):",
        "        raise RuntimeError('no assistant tokens')",
        "tiny.lm_trainer(cls=T)",
    ]
    report = run_command(CheckConfig(only="future-leak"), script(tmp_path, *lines))
    assert report["future-leak"].status == "pass"  # the model was found among the arguments
    assert report.target == "LlamaForCausalLM"


def test_a_command_that_never_trains_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"without calling train\(\)"):
        run_command(ONLY, [sys.executable, "-c", "print(1)"])
    with pytest.raises(UserError, match="exit code 3 before train"):
        run_command(ONLY, [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="'nosuchcommand': not found"):
        run_command(ONLY, ["nosuchcommand"])
    with pytest.raises(UserError, match="no command after"):
        run_command(ONLY, [])


@pytest.mark.slow
def test_the_environments_own_sitecustomize_still_runs(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['MINE'] = 'yes'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = script(tmp_path, "import os", "assert os.environ['MINE'] == 'yes'", "tiny.lm_trainer().train()")
    assert run_command(ONLY, command).exit_code == 0


@pytest.mark.slow
def test_accelerate_launch_reaches_the_trainer(tmp_path):
    python, path = script(tmp_path, "tiny.lm_trainer().train()")
    launch = [python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", path]
    assert run_command(ONLY, launch).exit_code == 0


def test_a_trainer_without_hash_is_remembered_as_long_as_it_lives(monkeypatch):
    """TRL 1.5's KTOTrainer is a dataclass: its constructor raised `unhashable type` under the hook."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    trainer_class = dataclasses.make_dataclass("T", ["model"], namespace={"train": print})
    (hook := Hook({})).patch(trainer_class)
    trainer = trainer_class("a model")
    assert list(hook.made.values()) == [{"model": "a model"}]
    del trainer
    assert not hook.made


def test_the_hook_does_nothing_where_nobody_asked(tmp_path):
    out = subprocess.run([sys.executable, "-c", "from llmkit.check import hook; hook.install(); print('ok')"],
                         capture_output=True, text=True, cwd=TESTS + "/..", env=os.environ)  # fmt: skip
    assert out.stdout == "ok\n"
