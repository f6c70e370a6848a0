"""A planted bug: what it is, who must catch it, and the same thing without it.

    @plant("no-causal-mask", caught_by="future-leak", bug="M1")
    def no_causal_mask(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject: ...

The function builds the subject, with the bug or (its twin) without; `patch` undoes itself, `folder` is empty.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmkit.check.subject import Subject

Build = Callable[[bool, pytest.MonkeyPatch, Path], Subject]
PLANTS: dict[str, "Plant"] = {}


@dataclass(frozen=True)
class Plant:
    name: str
    caught_by: str  # id of the check
    bug: str  # in the catalogue of bugs: D1 ... I4
    build: Build
    status: str  # fail, or warn where the catalogue says so
    evidence: str  # must be in the evidence or the measured text, in any case

    @property
    def what(self) -> str:
        return (self.build.__doc__ or self.name).split("\n")[0]


def plant(name: str, *, caught_by: str, bug: str, status: str = "fail", evidence: str = "") -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        assert name not in PLANTS, f"two plants named {name}"
        PLANTS[name] = Plant(name, caught_by, bug, build, status, evidence)
        return build

    return register


def all_plants() -> dict[str, Plant]:
    """Those of every `plants_*.py` beside this file."""
    import planted

    for module in pkgutil.iter_modules(planted.__path__):
        if module.name.startswith("plants_"):
            importlib.import_module(f"planted.{module.name}")
    return PLANTS
