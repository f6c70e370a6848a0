"""The front desk: exit codes, help without heavy imports, one line for every mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit import __version__, cli, config
from llmkit.config import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_launch_variables(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def python(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]], ids=str)
def test_help_lists_every_verb(argv, capsys):
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert not err and all(f"\n  {verb}" in out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_lists_its_keys(verb, capsys):
    outs = []
    for argv in (["help", verb], [verb, "--help"], [verb, "x.yaml", "-h"]):
        assert cli.main(argv) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0].startswith(f"llmkit {verb}: ") and config.describe(cli.VERBS[verb][1]) in outs[0]
    assert outs[0] == outs[1] == outs[2]


def test_version_is_the_package_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("argv", [["pretrian"], ["help", "pretrian"], ["--pretrain"]], ids=str)
def test_an_unknown_verb_is_one_line_and_exit_2(argv, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith(f"llmkit: unknown verb {argv[-1]!r}; allowed: check, data, inspect, pretrain, ")


def fake_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def main(settings):
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", lambda *_: type("Module", (), {"main": staticmethod(main)}))


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("key=1; allowed: 2"), 2, "llmkit: key=1; allowed: 2\n"),
        (UserError("a message\nof two lines"), 2, "llmkit: a message of two lines\n"),
        (KeyboardInterrupt(), 130, "llmkit: interrupted\n"),
        (ModuleNotFoundError("No module named 'gone'", name="gone"), 2, None),
        (ImportError("Loading this needs `accelerate`:\npip install it"), 2, None),  # libraries leave the name out
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error, code, message, monkeypatch, capsys):
    fake_verb(monkeypatch, error)
    assert cli.main(["generate"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("llmkit: ") and (message is None or err == message)
    if isinstance(error, ImportError):
        assert (error.name or "Loading this needs") in err and "pip install" in err and "None" not in err


@pytest.mark.parametrize(
    "error",
    [ValueError("ours"), ImportError("no such name", name="llmkit.run"), BrokenPipeError("of a socket")],
    ids=type,
)
def test_a_crash_of_ours_keeps_its_traceback(error, monkeypatch):
    fake_verb(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["generate"])


def test_the_process_exits_with_the_code_of_main():
    done = python("-m", "llmkit", "nonsense")
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr


def test_help_and_wrong_types_load_nothing_heavy():
    """DESIGN: `llmkit --help` answers in under half a second, so it cannot load torch (seconds)."""
    calls = [["--help"], ["help", "pretrain"], ["pretrain", "--max_steps", "x"], ["pretrain", "no.yaml"]]
    heavy = ["torch", "transformers", "numpy", "accelerate", "datasets", "trl", "peft", "matplotlib"]
    done = python(
        "-c",
        "import sys; from llmkit.cli import main\n"
        f"print([main(argv) for argv in {calls}], [name for name in {heavy} if name in sys.modules])",
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 2, 2] []", done.stderr


def test_a_reader_that_leaves_is_no_error():
    """`llmkit help pretrain | head -1`: the write fails, and what is left in the buffer fails again at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "llmkit", "help", "pretrain"]
    done = subprocess.run(argv, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
