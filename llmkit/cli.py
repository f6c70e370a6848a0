"""The front desk: `llmkit <verb> recipe.yaml --key value`.

Owns the verb table and the exit codes: 0 done, 1 crashed, 2 the user's mistake (one line), 130 interrupted,
141 when nobody reads the output any more (`llmkit help x | head -1`).
Leaves out everything heavy: a verb's module is imported when the verb runs.
"""

import importlib
import os
import select
import sys
from typing import Any

from . import __version__, config, launch, run

# verb -> (module, config class, what it does)
VERBS: dict[str, tuple[str, type, str]] = {
    "pretrain": ("train.pretrain", config.PretrainConfig, "train a causal LM from scratch, or go on training one"),
    "generate": ("deploy.generate", config.GenerateConfig, "continue a prompt, streaming"),
    "export": ("deploy.export", config.ExportConfig, "write a plain Qwen3 or Llama folder that needs no llmkit"),
}


def usage() -> str:
    rows = "\n".join(f"  {verb:<10} {text}" for verb, (_, _, text) in VERBS.items())
    return (
        f"llmkit {__version__}: train small language models so that nothing goes silently wrong\n\n"
        "usage: llmkit <verb> [recipe.yaml] [--key value | --key=value | key=value ...]\n"
        f"       llmkit help <verb>        every key, what it allows, its default\n\n{rows}"
    )


def help_for(verb: str) -> str:
    _, cls, _ = VERBS[verb]
    return f"llmkit {verb}: {(cls.__doc__ or '').strip()}\n\n{config.describe(cls)}"


def _verb(word: str) -> str:
    if word not in VERBS:
        raise config.UserError(f"unknown verb {word!r}; allowed: {', '.join(VERBS)}; `llmkit --help` says what they do")
    return word


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help") or argv == ["help"]:
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] == "help":
        print(help_for(_verb(argv[1])))
        return 0
    verb, rest = _verb(argv[0]), argv[1:]
    if "-h" in rest or "--help" in rest:
        print(help_for(verb))
        return 0
    module, cls, _ = VERBS[verb]
    settings: Any = config.load(cls, rest, verb)
    if cls is config.PretrainConfig:
        if launch.is_wanted(settings):
            return launch.relaunch(settings, verb, rest)
        if launch.is_main():
            print(f"# llmkit {verb}\n{config.dump(settings)}", flush=True)
    try:
        importlib.import_module(f".{module}", __package__).main(settings)
    except ImportError as error:
        if error.name and error.name.startswith("llmkit"):
            raise
        what = repr(error.name) if error.name else f"a package: {error}"  # transformers and accelerate give no name
        raise config.UserError(
            f"llmkit {verb} needs {what}; run `make setup-all` or `pip install -e '.[all]'`"
        ) from None
    return 0


def _is_stdout_closed() -> bool:
    """The reader of our output is gone; a BrokenPipeError may also come from a socket, and that is a crash."""
    poll = select.poll()
    poll.register(1, 0)  # errors and hang-ups are reported unasked
    return bool(poll.poll(0))


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        code = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, since at exit nobody could catch what it raises
        return code
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return 141
    except config.UserError as error:
        launch.say_error(" ".join(["llmkit:", *str(error).split("\n")]))  # one line, whatever a library put into it
        return 2
    except OSError as error:
        if not (run.is_disk_full(error) or isinstance(error, (NotADirectoryError, PermissionError))):
            raise
        reason = "the disk is full" if run.is_disk_full(error) else error.strerror
        launch.say_error(f"llmkit: {error.filename or 'writing'}: {reason}; make room or choose another folder")
        return 2
    except KeyboardInterrupt:
        launch.say_error("llmkit: interrupted")
        return 130
