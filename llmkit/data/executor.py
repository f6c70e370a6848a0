"""Where the steps of a corpus run: this machine's cores, Slurm or Ray, all by datatrove's executors.

    run_local(stages, logs, num_workers, console);  submit(stages, logs, config, console)

Owns the bar, and that a worker which dies or an interrupt ends the run instead of hanging it.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import UserError
from ..verbs import DataConfig
from .stages import Stage

POLL_S = 0.3
PRELOADED = ["llmkit.data.executor", "llmkit.data.finish", "datatrove.pipeline.dedup.minhash"]  # else 0.4 s a worker
KILLED = [-getattr(signal, name) for name in ("SIGKILL", "SIGSEGV", "SIGBUS") if hasattr(signal, name)]


class QuietExecutor(LocalPipelineExecutor):
    """Without datatrove's log on the console; what fails in a task is raised here."""

    def run(self) -> Any:
        logger.disable("datatrove")
        return super().run()

    def _launch_run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        logger.disable("datatrove")
        if multiprocess.parent_process() is not None:  # in a worker: the main process ends it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return super()._launch_run_for_rank(*args, **kwargs)


def run_local(stages: list[Stage], logs: Path, num_workers: int, console: Console) -> None:
    """On this machine's cores. Raises UserError when a worker was killed, KeyboardInterrupt on SIGINT and SIGTERM."""
    multiprocess.set_forkserver_preload(PRELOADED)
    with _watched(console) as on_stage:
        for number, stage in enumerate(stages, 1):
            # a pool even for one task: what a step held in memory goes with its process
            workers = 1 if num_workers == 1 else max(2, min(num_workers, stage.tasks))
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if min(num_workers, stage.tasks) == 1 else "false"
            on_stage(f"{number}/{len(stages)} {stage.name}", logs / stage.name / "completions", stage.tasks)
            QuietExecutor(stage.steps, stage.tasks, workers, logging_dir=str(logs / stage.name)).run()


@contextmanager
def _watched(console: Console) -> Iterator[Callable[[str, Path, int], None]]:
    """A bar of the running step's tasks, counted by the files that datatrove leaves; an eye on its workers."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(24), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    ended, dead = threading.Event(), threading.Event()
    folder = Path("/")
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=1)

        def follow() -> None:
            workers: set[Any] = set()
            while not ended.wait(POLL_S):
                if folder.name == "completions" and folder.is_dir():
                    progress.update(task, completed=sum(1 for _ in folder.iterdir()))
                workers.update(multiprocess.active_children())
                if any(worker.exitcode in KILLED for worker in workers):  # the pool would wait for it for ever
                    dead.set()
                    os.kill(os.getpid(), wake)  # a real signal: it ends the wait for a lock
                    return

        def on_stage(name: str, completions: Path, total: int) -> None:
            nonlocal folder
            folder = completions
            progress.reset(task, description=name, total=total)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, interrupt) if _is_main_thread() else None
        wake = signal.SIGTERM if _is_main_thread() else signal.SIGINT  # SIGINT may be ignored: `llmkit data ... &`
        threading.Thread(target=follow, daemon=True).start()
        try:
            yield on_stage
        except KeyboardInterrupt:
            if not dead.is_set():
                raise
            raise UserError(
                "a worker process was killed, as the system does when memory runs out; give the same command again, "
                "with a smaller --num_workers: what was done so far is kept"
            ) from None
        finally:
            ended.set()
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def submit(stages: list[Stage], logs: Path, config: DataConfig, console: Console) -> None:
    """On a cluster: one job a step, each after the one before it. With dry_run they are shown and not submitted."""
    logger.disable("datatrove")
    made: Any = None
    for stage in stages:
        made = _cluster_executor(stage, logs.resolve() / stage.name, config, made)
        if config.dry_run:
            _show(stage, made, console)
        elif config.engine == "ray":
            made.run()
    if config.engine == "slurm" and not config.dry_run:
        made.run()  # submits what it depends on first
        console.print(f"submitted {len(stages)} jobs; the last one writes the report")


def _cluster_executor(stage: Stage, logs: Path, config: DataConfig, before: Any) -> Any:
    keys: dict[str, Any] = {"logging_dir": str(logs), "depends": before, **config.engine_kwargs}
    if config.num_workers:
        keys["workers"] = min(config.num_workers, stage.tasks)
    try:
        if config.engine == "slurm":
            from datatrove.executor.slurm import SlurmPipelineExecutor

            return SlurmPipelineExecutor(stage.steps, stage.tasks, job_name=f"llmkit-{stage.name}", **keys)
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(stage.steps, stage.tasks, **keys)
    except TypeError as error:
        raise UserError(
            f"engine_kwargs: {error}; allowed: the arguments of datatrove's {config.engine} executor"
        ) from None


def _show(stage: Stage, made: Any, console: Console) -> None:
    if hasattr(made, "get_launch_file_contents"):
        command = f"srun -l -n 1 launch_pickled_pipeline {made.logging_dir.resolve_paths('executor.pik')}"
        script = made.get_launch_file_contents(made.get_sbatch_args(min(stage.tasks, made.max_array_size)), command)
        console.print(script, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(f"{stage.name:<14} {stage.tasks:>6} tasks", highlight=False)
