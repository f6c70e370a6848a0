"""Runs inside the user's own process, before their code: takes the live Trainer at the moment `train()` is called.

Owns the patch of `transformers.Trainer`; started by a `sitecustomize.py` that `command.py` puts on PYTHONPATH.
Imports nothing but the standard library until a trainer is there, since every Python that the command starts runs it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
import traceback
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

WANTED = "LLMKIT_CHECK"  # environment: JSON of {"package", "out", "call", "settings"}
TRAINER = "transformers.trainer"


class Hook(importlib.abc.MetaPathFinder):
    """Finds llmkit where it lies, and patches the Trainer's module when that has been imported."""

    def __init__(self, wanted: dict[str, Any]):
        self.wanted = wanted
        self.made: dict[int, dict[str, Any]] = {}  # by id: TRL 1.5's KTOTrainer is a dataclass and has no hash
        self.last: tuple[type, dict[str, Any]] | None = None  # of a constructor that has not reached train() yet
        self.is_looking = False
        self.is_checking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == "llmkit" and not self.is_looking:  # the user's environment need not have it
            self.is_looking = True
            try:
                found = importlib.util.find_spec(name)
            finally:
                self.is_looking = False
            folder = Path(self.wanted["package"])
            return found or importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
        if name != TRAINER or self.is_looking:
            return None
        self.is_looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_looking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.patch(module.Trainer)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def patch(self, trainer_class: Any) -> None:
        """Remembers what every Trainer is made of, and stops at `train()`."""
        hook, train = self, trainer_class.train

        def new(cls: type, *args: Any, **kwargs: Any) -> Any:
            trainer: Any = object.__new__(cls)
            given = dict(zip(_positional(cls), args, strict=False)) | kwargs
            hook.made[id(trainer)] = given
            weakref.finalize(trainer, hook.made.pop, id(trainer), None)
            hook.last = (cls, given)
            return trainer

        def checked(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if hook.is_checking:
                return train(trainer, *args, **kwargs)
            hook.is_checking = True
            hook.report(trainer=trainer, given=hook.made.get(id(trainer), {}))

        trainer_class.__new__ = staticmethod(new)
        trainer_class.train = checked
        before = sys.excepthook

        def excepthook(kind: Any, error: Any, trace: Any) -> None:
            before(kind, error, trace)
            if hook.last and not hook.is_checking and issubclass(kind, Exception):
                hook.is_checking = True
                text = str(error).strip().split("\n")[0][:300]
                hook.report(given=hook.last[1], failure=f"{hook.last[0].__name__} raised {kind.__name__}: {text}")

        sys.excepthook = excepthook

    def report(self, **found: Any) -> None:
        """Calls what was asked for, which leaves its result for the parent, and ends the process: nothing of the user's
        run happens after this."""
        code = 0
        if os.environ.get("RANK", "0") == "0":
            try:
                module, name = self.wanted["call"].split(":")
                getattr(importlib.import_module(module), name)(self.wanted, **found)
            except BaseException:
                traceback.print_exc()
                code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _positional(cls: type) -> list[str]:
    """Names of a constructor's positional arguments; of its parent's where it only takes `*args`."""
    for parent in cls.__mro__:
        kinds = [(name, p.kind) for name, p in inspect.signature(parent.__init__).parameters.items()]  # type: ignore[misc]
        if inspect.Parameter.VAR_POSITIONAL not in (kind for _, kind in kinds):
            return [name for name, kind in kinds[1:] if kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return []


def install() -> None:
    wanted = os.environ.get(WANTED)
    if wanted and not any(type(finder).__name__ == "Hook" for finder in sys.meta_path):
        sys.meta_path.insert(0, Hook(json.loads(wanted)))
