"""The run folder: where a stage writes what it did.

Owns `recipe.yaml`, `manifest.json`, `metrics.jsonl`, `result.json`, that folders appear whole or not at all, and the
signals that ask a run to stop.

    run = Run.start(Path(config.output_dir), "pretrain", config, {...}); run.log({"step": 1}); run.finish(result)

Leaves out weights: the stage saves them inside `with written_beside(folder) as partial:`.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from . import __version__, config

PACKAGES = ["torch", "transformers", "accelerate", "datasets", "tokenizers", "trl", "peft", "safetensors", "numpy"]
LOST = "another process ended or was killed"  # in the line of a rank that cannot go on without the others
CHECK = "check.json"  # what the checks before the run found
HANDED_OVER: dict[str, str] = {}  # file name -> text: found before the run, written into its folder once there is one
LOCK = ".lock"  # in the run folder while a run writes there
HOLDS_A_RUN = ("model", "adapter", "checkpoints", "result.json")
LOGS = ("metrics.jsonl", "alerts.jsonl", "samples.jsonl", "hacked.jsonl")
PARTIAL = re.compile(r"\.(step-\d{8}|model|adapter)\.(old|gone|\w{8})")  # what `written_beside` names


@dataclasses.dataclass(frozen=True)
class Result:
    """What `result.json` holds, for every stage; losses in nats per token, entropy null where it is not known."""

    stage: str
    status: str  # ok | stopped | failed
    model_dir: str
    parent: str | None
    wall_s: float
    cpu_s: float
    tokens: int
    shards: dict[str, dict[str, Any]]
    metrics: dict[str, Any]


def is_main() -> bool:
    """Rank 0 of this launch, or not launched at all."""
    return os.environ.get("RANK", "0") == "0"


def is_disk_full(error: BaseException) -> bool:
    """Also through libraries that keep only the text of the system's error (safetensors does)."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _fsync(path: Path) -> None:
    with contextlib.suppress(OSError):  # file systems that cannot
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename(partial: Path, folder: Path, exist_ok: bool, replace: bool) -> None:
    aside = folder.with_name(f".{folder.name}.old")
    try:
        if replace and folder.exists():
            os.rename(folder, aside)
        os.rename(partial, folder)
        shutil.rmtree(aside, ignore_errors=True)
        _fsync(folder.parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not exist_ok:
            raise config.UserError(
                f"{folder}: exists already, another run is writing there; choose another output_dir"
            ) from None
        shutil.rmtree(partial)


@contextlib.contextmanager
def written_beside(folder: Path, exist_ok: bool = False, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, renamed to it when the block ends well; removed when it does not.

    Readers see the whole folder or none, also after a power cut: every file is on the disk before the rename.
    Raises UserError when the disk is full; what was saved before is untouched.
    Raises UserError, too, when another process was first; `exist_ok` (a cache) takes what that one wrote, `replace`
    (a run that goes on) puts the new one in its place.
    """
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # two writers never share one
        partial.chmod(0o755)
        yield partial
        for path in (*partial.rglob("*"), partial):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes 0600
            _fsync(path)
        _rename(partial, folder, exist_ok, replace)
    except BaseException as error:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            existing = next(parent for parent in folder.absolute().parents if parent.exists())
            free = shutil.disk_usage(existing).free
            raise config.UserError(
                f"{folder}: the disk is full ({free / 1e6:.0f} MB free), this save was given up and earlier ones are "
                "untouched; make room or choose another output_dir"
            ) from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; raises UserError when the disk is full."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`; half a surrogate pair is written as its number."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_json`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise config.UserError(f"{path}: the disk is full, this file was not written; make room") from None
        raise


def _git_commit() -> str | None:
    try:
        here = Path(__file__).parent
        out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        return out.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def whence(stage: str) -> dict[str, Any]:
    """How any manifest begins: what was called, when, with which versions of what."""
    return {
        "stage": stage,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "git_commit": _git_commit(),
    }


def command_name() -> str:
    """How to call llmkit from here: the bare name where it is on the PATH."""
    if shutil.which("llmkit"):
        return "llmkit"
    called = Path(sys.argv[0])
    return os.path.relpath(called) if called.name == "llmkit" else f"{os.path.relpath(sys.executable)} -m llmkit"


def quiet_loggers() -> None:
    """What libraries say while they are imported: call it before."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # looks for kernels of the Hub, and does without


def quiet_libraries() -> None:
    """Silences what a user cannot act on, each at its source."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed else warns, at import, that it found no GPU
    transformers.utils.logging.disable_progress_bar()
    quiet_loggers()
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*")  # by DeepSpeed
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*", module="peft.*")
    # PEFT: of checkpoints, which hold what llmkit needs; and its own calls of what transformers renamed
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`", module="peft.*")
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast", module="bitsandbytes.*")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    for verb in ("enable", "disable"):  # TRL, around every forward pass of the reference
        said = f"`gradient_checkpointing_{verb}` is deprecated"
        warnings.filterwarnings("ignore", message=said, category=FutureWarning)


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers."""
    found = {"llmkit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _is_run_folder(folder: Path) -> bool:
    """Has a manifest that names a stage; the manifest of a token store does not."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "stage" in manifest


def run_status(folder: Path) -> str | None:
    """ok, stopped or failed; None for a run that has not ended, or was killed."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError):
        return None


def finished_steps(folder: Path) -> int | None:
    """Steps of a run that came to its end; None for any other."""
    if run_status(folder) != "ok":
        return None
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))["metrics"].get("steps")


def remove_partials(folder: Path) -> None:
    """What a process left that was killed inside `written_beside`: hidden folders that nobody finishes any more."""
    for path in folder.glob(".*.*"):
        if not PARTIAL.fullmatch(path.name):
            continue
        whole = path.with_name(path.stem[1:])
        if path.suffix == ".old" and not whole.exists():  # killed between the two renames
            os.rename(path, whole)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def cut_log(path: Path, last_step: int) -> None:
    """Drops the lines of a .jsonl that are later than `last_step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def stop_signals(is_rank: bool = False, tell: Callable[[], object] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM, SIGINT and SIGHUP only make the yielded function say True: the stage saves and ends.

    `tell` is called at the first of them. A second SIGINT interrupts at once, except on a rank, where the launcher
    decides. A SIGHUP that is ignored (nohup) stays so.
    """
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGINT and asked and not is_rank:
            raise KeyboardInterrupt
        asked.append(number)
        if len(asked) == 1:
            tell()

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield lambda: False
        return
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in known}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_output_dir(folder: Path) -> None:
    """Raises UserError when `folder` holds another run, or files that are no run at all."""
    if folder.is_file():
        raise config.UserError(f"output_dir={str(folder)!r}: is a file; name a folder")
    if not folder.exists():
        return
    held = [name for name in HOLDS_A_RUN if (folder / name).exists()]
    if "checkpoints" in held and not any((folder / "checkpoints").glob("[!.]*")):
        held.remove("checkpoints")  # killed inside its first save
    if held == ["result.json"] and run_status(folder) == "failed":
        held = []
    if held:
        how = "go on with it by --resume_from_checkpoint true, " if "checkpoints" in held else ""
        raise config.UserError(
            f"output_dir={str(folder)!r}: holds another run ({', '.join(held)}); "
            f"{how}choose another --output_dir, or move or remove that folder"
        )
    if any(path.name != LOCK for path in folder.iterdir()) and not _is_run_folder(folder):
        raise config.UserError(
            f"output_dir={str(folder)!r}: is not empty and not a run folder; choose another --output_dir"
        )


def _earlier_starts(folder: Path) -> list[dict]:
    """When, from where and with what the run in `folder` was started before; its manifest remembers."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    kept = ("started", "command", "num_processes", "resumed_at_step", "git_commit", "versions")
    return [*manifest.get("earlier", []), {key: manifest.get(key) for key in kept}]


def _lock(folder: Path) -> IO[str]:
    """An open file that keeps other runs out of `folder` until it is closed, or its process dies."""
    file = (folder.resolve() / LOCK).open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise config.UserError(
            f"output_dir={str(folder)!r}: another run is writing there; choose another --output_dir"
        ) from None
    except (ImportError, OSError):
        pass  # Windows, and file systems without locks: nothing to be had there
    return file


def _unlock(file: IO[str]) -> None:
    with contextlib.suppress(OSError):
        os.unlink(file.name)
    file.close()


class Run:
    """An open run folder. On ranks other than 0 (`is_main=False`) nothing is written."""

    def __init__(self, folder: Path, stage: str, is_main: bool = True):
        self.folder, self.stage, self.is_main = folder, stage, is_main
        self.started = time.perf_counter()
        self.unlock: Callable[[], object] = lambda: None

    @classmethod
    def start(
        cls,
        folder: Path,
        stage: str,
        settings: Any,
        facts: dict[str, Any],
        is_main: bool = True,
        resume_step: int | None = None,
    ) -> "Run":
        """Creates the folder with recipe and manifest. An earlier run there that saved no weights is replaced.

        With `resume_step` the run that lies there goes on after that step: logs are cut there, the manifest keeps the
        earlier starts. Holds the folder until `finish`, or until the run is dropped after an error. Raises
        UserError when another does.
        """
        run = cls(folder, stage, is_main)
        if is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                run.unlock = weakref.finalize(run, _unlock, _lock(folder))
                past: dict[str, Any] = {}
                if resume_step is None:
                    check_output_dir(folder)  # again: another run may have finished there since the stage looked
                    for name in LOGS:
                        (folder / name).unlink(missing_ok=True)
                    (folder / "metrics.jsonl").write_text("")
                else:
                    past = {"resumed_at_step": resume_step, "earlier": _earlier_starts(folder)}
                    for name in LOGS:
                        cut_log(folder / name, resume_step)
                (folder / "result.json").unlink(missing_ok=True)  # of a run that goes on, or had failed
                (folder / "recipe.yaml").write_text(config.dump(settings), encoding="utf-8")
                write_json(folder / "manifest.json", {**whence(stage), **past, **facts})
                while HANDED_OVER:
                    name, text = HANDED_OVER.popitem()
                    (folder / name).write_text(text, encoding="utf-8")
            except OSError as error:
                reason = "the disk is full" if is_disk_full(error) else error.strerror
                raise config.UserError(
                    f"output_dir={str(folder)!r}: cannot be written ({reason}); choose another"
                ) from None
        return run

    @property
    def model_dir(self) -> Path:
        return self.folder / "model"

    def log(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self.append("metrics.jsonl", row)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One line of a log; a full disk there never stops a run that could still save its weights."""
        if self.is_main:
            with contextlib.suppress(OSError), (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def finish(self, result: Result) -> Result:
        if self.is_main:
            write_json(self.folder / "result.json", dataclasses.asdict(result))
            self.unlock()
        return result


def write_derived(folder: Path, result: "Result", theirs: dict[str, Any]) -> None:
    """Manifest and result beside a model that a verb made of another one, whose manifest is `theirs`.

    So its lineage goes on, and what was trained is known: the template, whether documents open with BOS.
    """
    kept = ("tokenizer", "chat_template", "documents_open_with_bos", "overfit")
    facts = {"parent": result.parent} | {key: theirs[key] for key in kept if key in theirs}
    write_json(folder / "manifest.json", whence(result.stage) | facts)
    write_json(folder / "result.json", vars(result))


def resolve_model_dir(name_or_path: str) -> str:
    """A run folder stands for its `model/`, or for its `adapter/` where it has no whole model; the rest is as it is."""
    for inside, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
        if (Path(name_or_path) / inside / file).exists():
            return str(Path(name_or_path) / inside)
    return name_or_path
