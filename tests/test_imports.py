"""Imports point to the right, never left: the folders follow the life of a model (DESIGN, section 2).

cli -> plan -> deploy -> align -> train -> evaluate -> {data, model} -> check -> {config, verbs, run, hardware, axes}
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmkit"
FRONT_DESK = ("cli", "launch", "env")
BASE = ("config", "verbs", "tuning", "run", "hardware", "axes")
STAGES = ("plan", "deploy", "align", "train", "evaluate", "data", "model", "check")  # from left to right
SIBLINGS = {"data", "model"}  # neither imports the other
HEAVY = {"trl", "deepspeed", "bitsandbytes", "gradio", "lm_eval", "trackio", "peft", "matplotlib"}
LIGHT = {"yaml"}  # the one third party that the front desk loads at once
PLUGINS = ("evaluate/tasks/", "evaluate/metrics/")  # loaded by lm-eval and evaluate, never by llmkit
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def allowed_units(unit: str) -> set[str]:
    """The folders and files of llmkit that code in `unit` may import, itself included."""
    if unit in ("", "__main__"):  # llmkit/__init__.py; python -m llmkit
        return {"cli"} if unit else set()
    if unit in FRONT_DESK:
        return {*FRONT_DESK, *STAGES, "report", *BASE}
    if unit in BASE:
        return set(BASE)
    if unit == "check":
        return {"check", "config", "verbs", "run", "hardware"}
    if unit == "report":
        return {"report", *BASE}
    right = set(STAGES[STAGES.index(unit) + 1 :])
    return {unit, *(right - SIBLINGS if unit in SIBLINGS else right), "report", *BASE}


def imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; relative ones are resolved, `from .. import x` is `llmkit.x`."""
    here = ["llmkit", *Path(module).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    parts = Path(module).with_suffix("").parts
    unit = "" if parts == ("__init__",) else parts[0]
    found = []
    for line, name in imported(module, source):
        if name.split(".")[0] != "llmkit" or name == "llmkit.__version__":
            continue
        target = [*name.split("."), ""][1]
        if target not in allowed_units(unit):
            found.append(f"{module}:{line}: {unit or 'llmkit'} may not import {target or 'all of llmkit'} ({name})")
    return found


def loaded_at_once(source: str) -> set[str]:
    """Third parties that importing the module loads: not inside a function, not under TYPE_CHECKING."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
        todo += ast.iter_child_nodes(node)
    return names - set(sys.stdlib_module_names) - {"llmkit"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_the_right(module):
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_place(module):
    parts = Path(module).with_suffix("").parts
    alone = {"__init__", "__main__", *FRONT_DESK, *BASE}
    assert parts[0] in (alone if len(parts) == 1 else {*STAGES, "report"})


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(PLUGINS)])
def test_heavy_libraries_wait_for_the_verb(module):
    third_parties = loaded_at_once(MODULES[module].read_text(encoding="utf-8"))
    assert not third_parties & HEAVY
    if module.split(".")[0] in ("__init__", "__main__", *FRONT_DESK, *BASE):
        assert third_parties <= LIGHT


@pytest.mark.parametrize("name", ["configuration_llmkit", "modeling_llmkit"])
def test_remote_code_imports_only_its_neighbour(name):
    """Both files travel alone with a saved model, where there is no llmkit."""
    source = MODULES[f"model/{name}.py"].read_text(encoding="utf-8")
    ours = re.findall(r"^ *((?:from|import) (?:\.|llmkit).*)", ast.unparse(ast.parse(source)), flags=re.M)
    assert all(re.match(r"from \.(configuration|modeling)_llmkit import ", line) for line in ours)


@pytest.mark.parametrize(
    "module, source, target",
    [
        ("data/loader.py", "from ..train.optim import Muon", "train"),
        ("data/loader.py", "from .. import model as ours", "model"),
        ("model/convert.py", "import llmkit.data.loader", "data"),
        ("check/runner.py", "def f():\n    from llmkit.model import x", "model"),
        ("check/runner.py", "from ..axes import x", "axes"),
        ("check/runner.py", "from ..report.plots import x", "report"),
        ("report/plots.py", "from ..train import pretrain", "train"),
        ("evaluate/harness.py", "if True:\n    from ..cli import main", "cli"),
        ("train/pretrain.py", "from ..launch import is_main", "launch"),
        ("train/pretrain.py", "import llmkit", "all of llmkit"),
        ("run.py", "from .data import shards", "data"),
        ("config.py", "from . import hardware, cli", "cli"),
        ("__init__.py", "from .config import load", "config"),
    ],
)
def test_the_checker_finds_planted_violations(module, source, target):
    (found,) = violations(module, source)
    assert f" may not import {target} (" in found


def test_the_checker_allows_what_the_design_allows():
    source = "from .. import __version__, model as ours\nfrom ..report.plots import x\nfrom ..run import Run"
    assert violations("train/pretrain.py", source) == []
    assert violations("check/model/shape.py", "from ...config import UserError\nfrom ..subject import Subject") == []
    assert loaded_at_once("import os\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import trl\n") == set()
    assert loaded_at_once("if x:\n    import trl.y\nclass A:\n    from torch import nn\n") == {"trl", "torch"}
