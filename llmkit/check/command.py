"""`llmkit check [flags] -- CMD…`: starts the user's own command unchanged and checks the trainer that it builds.

Owns the child process and what comes back from it.   report = run_command(settings, ["python", "sft.py"])

The child's Python finds a `sitecustomize.py` of ours first on its PYTHONPATH (the environment's own one is still run),
which installs `hook.py`. That works through `trl sft` and `accelerate launch` too, since children inherit it.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import UserError
from ..verbs import CheckConfig
from .hook import WANTED
from .report import Report

PACKAGE = Path(__file__).parents[1]
SITECUSTOMIZE = """
import importlib.machinery, importlib.util, os, sys
_here = os.path.dirname(os.path.abspath(__file__))
_spec = importlib.util.spec_from_file_location("llmkit_check_hook", {hook!r})
_hook = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_hook)
_hook.install()
_paths = [p for p in sys.path if os.path.abspath(p) != _here]
_own = importlib.machinery.PathFinder.find_spec("sitecustomize", _paths)  # that of the user's environment
if _own is not None and _own.loader is not None:
    _own.loader.exec_module(importlib.util.module_from_spec(_own))
"""
POLL_S = 0.2
OWN_LOOP = {  # verb -> what to call from Python
    "check": "llmkit.check.run(model=..., tokenizer=..., dataset=...)",
    "inspect": "llmkit.data.inspect.describe(batches, tokenizer)",
}


def run_command(
    settings: CheckConfig, command: list[str], on_progress: Callable[[str, int, int], Any] | None = None
) -> Report:
    """Raises UserError for a command that cannot be started or never reaches `train()`."""
    stdout = None if settings.format == "text" else 2  # stderr: our own output is for a program
    call = "llmkit.check.command:check_found"
    return Report.from_dict(call_in_command(call, dataclasses.asdict(settings), command, "check", on_progress, stdout))


def call_in_command(
    call: str,
    settings: dict[str, Any],
    command: list[str],
    verb: str,
    on_progress: Callable[[str, int, int], Any] | None = None,
    stdout: int | None = None,
) -> Any:
    """What `call` ("module:function") writes when the command's trainer is at `train()`; see `check_found`.

    Raises UserError for a command that cannot be started or never gets there, and for an "error" that was written.
    """
    if not command:
        raise UserError(f"no command after `--`; e.g. llmkit {verb} -- python sft.py")
    if shutil.which(command[0]) is None:
        raise UserError(f"command {command[0]!r}: not found; write it as you would to train")
    with tempfile.TemporaryDirectory(prefix="llmkit-check-") as folder:
        (Path(folder) / "sitecustomize.py").write_text(SITECUSTOMIZE.format(hook=str(PACKAGE / "check" / "hook.py")))
        out = Path(folder) / "report.json"
        wanted = {"package": str(PACKAGE), "out": str(out), "call": call, "settings": settings}
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, WANTED: json.dumps(wanted)}
        child = subprocess.Popen(command, env=environment, stdout=stdout)
        try:
            while True:
                try:
                    code = child.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if on_progress and (state := _read(out.with_suffix(".progress"))):
                        on_progress(*state)
        except BaseException:
            child.terminate()
            raise
        value = _read(out)
    if value is None:
        raise UserError(_no_report(command, code, verb))
    if "error" in value:
        raise UserError(value["error"])
    return value


def _no_report(command: list[str], code: int, verb: str) -> str:
    shown = " ".join(command)
    if code:
        return f"`{shown}` ended with exit code {code} before train() of a Trainer was called; mend that first (above)"
    return (
        f"`{shown}` ended without calling train() of a transformers Trainer, so there was nothing to {verb}; "
        f"for a loop of your own: {OWN_LOOP[verb]}"
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_found(path: Path, value: Any) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, default=str), encoding="utf-8")
    os.replace(partial, path)


# in the child


def check_found(wanted: dict[str, Any], given: dict[str, Any], trainer: Any = None, failure: str | None = None) -> None:
    """Called by the hook with the trainer, or with the arguments of a constructor that failed."""
    from .attach import from_parts, selection
    from .runner import run

    settings, out = wanted["settings"], Path(wanted["out"])
    parts: dict[str, Any] = {key: settings[key] for key in ("reference", "peft_adapter") if settings[key]}
    if settings["chat"]:
        parts["chat"] = True
    parts["dataset"] = settings["dataset"] or given.get("train_dataset")
    parts["eval_dataset"] = settings["eval_dataset"] or given.get("eval_dataset")
    try:
        if trainer is not None:
            subject = from_parts(trainer, **parts)
        else:
            tokenizer = given.get("processing_class") or given.get("tokenizer")
            subject = from_parts(model=given.get("model"), tokenizer=tokenizer, args=given.get("args"), **parts)
        subject.failure = failure

        def on_start(item: Any, number: int, total: int) -> None:
            write_found(out.with_suffix(".progress"), [item.id, number, total])

        chosen = selection(settings["tier"], settings["only"], settings["skip"], settings["check_ignore"])
        write_found(out, run(subject, chosen, on_start).to_dict())
    except UserError as error:
        write_found(out, {"error": str(error)})
