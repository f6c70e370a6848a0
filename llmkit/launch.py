"""Several processes: relaunches the verb under Accelerate's launcher.

Owns `accelerate_config: NAME|PATH` and `num_processes: N`, and that the ranks say a mistake once.
A name is a file of accelerate_configs/.
Starting under `accelerate launch ... -m llmkit pretrain recipe.yaml` works too, then nothing is relaunched.

On CPUs `accelerate launch` starts a single process unless there is MPI, so there it is torchrun's launcher (gloo).
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from .config import UserError, read_recipe
from .run import LOST, run_status, stop_signals
from .verbs import PretrainConfig

CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"
LAUNCHED = ("LLMKIT_LAUNCHED", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # ours, torchrun's, accelerate launch's
ERROR_FILE = "LLMKIT_ERROR_FILE"  # names the file where a rank writes its one line, for the process that launched it


# sections of an accelerate YAML -> the keys that something comes of, or that say what is done anyway
USED: dict[str, tuple[str, ...]] = {
    "deepspeed_config": (
        "deepspeed_multinode_launcher",
        "zero_stage",
        "offload_optimizer_device",
        "offload_param_device",
        "zero3_init_flag",
        "zero3_save_16bit_model",
    ),
    "fsdp_config": (
        "fsdp_version",
        "fsdp_auto_wrap_policy",
        "fsdp_reshard_after_forward",
        "fsdp_state_dict_type",
        "fsdp_cpu_ram_efficient_loading",
        "fsdp_offload_params",
        "fsdp_activation_checkpointing",
    ),
}


def is_wanted(config: PretrainConfig) -> bool:
    """A relaunch is asked for, and this process is not itself the result of one."""
    launched = any(name in os.environ for name in LAUNCHED)
    return not launched and bool(config.accelerate_config or config.num_processes not in (None, 1))


def is_relaunched() -> bool:
    """This process is a rank of a relaunch: what is done once was done by the process that launched it."""
    return "LLMKIT_LAUNCHED" in os.environ


def find_config(name: str) -> Path:
    """The YAML of a name or path; raises UserError listing what there is."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UserError(f"accelerate_config={name!r}: no such file; allowed: a path to a .yaml, or {names}")
    return path


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_settings(name: str, settings: dict[str, Any]) -> None:
    """Raises UserError for settings of the YAML that would be ignored: the recipe decides them."""
    for section, used in USED.items():
        for key in settings.get(section) or {}:
            if key not in used:
                raise UserError(
                    f"accelerate_config={name}: {section}.{key} has no effect, the recipe's keys decide; remove it "
                    f"(allowed: {', '.join(used)})"
                )
    for kind, section in (("DEEPSPEED", "deepspeed_config"), ("FSDP", "fsdp_config")):
        if settings.get("distributed_type") == kind and not settings.get(section):
            raise UserError(f"accelerate_config={name}: distributed_type {kind} without {section}; e.g. zero2, fsdp2")
    if settings.get("mixed_precision") not in (None, "no", "bf16"):
        raise UserError(f"accelerate_config={name}: mixed_precision={settings['mixed_precision']}; allowed: no, bf16")


def read_config(config: PretrainConfig) -> tuple[Path, dict[str, Any], int]:
    """The YAML, what it says, and how many processes to start. Raises UserError for what cannot run here."""
    name = config.accelerate_config or ("multi_gpu" if not config.use_cpu and _has_gpu() else "cpu")
    path = find_config(name)
    settings = read_recipe(path)
    if config.use_cpu and not settings.get("use_cpu"):  # a GPU engine, tried out on CPU processes
        settings = settings | {"use_cpu": True, "num_processes": min(2, settings.get("num_processes", 1))}
    _check_settings(name, settings)
    count = settings.get("num_processes", 1) if config.num_processes is None else config.num_processes
    if not isinstance(count, int) or count < 1:
        raise UserError(f"num_processes={count}; allowed: 1 or more")
    if not settings.get("use_cpu") and not _has_gpu():
        raise UserError(
            f"accelerate_config={name}: needs an NVIDIA GPU, this machine has none; allowed here: cpu, or "
            "use_cpu: true to try the engine on CPU processes"
        )
    return path, settings, count


def engine_environment(settings: dict[str, Any]) -> dict[str, str]:
    """What `accelerate launch` would set for this YAML; CPU processes are started by torchrun instead."""
    if settings.get("distributed_type") == "DEEPSPEED":
        keys = {"ACCELERATE_USE_DEEPSPEED": True} | {
            f"ACCELERATE_DEEPSPEED_{key.upper()}": value for key, value in settings["deepspeed_config"].items()
        }
    elif settings.get("distributed_type") == "FSDP":
        keys = {"ACCELERATE_USE_FSDP": True} | {k.upper(): v for k, v in settings["fsdp_config"].items()}
    else:
        keys = {}
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in keys.items()}


def command(path: Path, settings: dict[str, Any], count: int, verb: str, argv: list[str], logs: Path) -> list[str]:
    """The launcher's command line, with the verb as it was called. `logs`: or torchrun leaves a folder in /tmp."""
    if settings.get("use_cpu"):
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    else:
        launcher = ["accelerate.commands.launch", "--config_file", str(path), "--num_processes", str(count)]
    return [sys.executable, "-m", *launcher, "--log_dir", str(logs), "-m", "llmkit", verb, *argv]


def say_error(line: str) -> None:
    """Prints the one line on stderr, or hands it to the process that launched this one, which prints it once."""
    path = os.environ.get(ERROR_FILE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    elif os.environ.get("LOCAL_RANK", "0") == "0" or LOST in line:
        print(line, file=sys.stderr)


def _watch(command: list[str], environment: dict[str, str], errors: Path) -> tuple[int, bool]:
    """Runs the launcher; its stderr passes through until a rank has said its error: what follows is torchrun's report.

    Stdout is not touched, so progress arrives live. A signal goes on to the ranks, once: they save and end. So the
    launcher has a process group of its own, or Ctrl-C would reach it a second time; it is told as a group, since
    accelerate's launcher of a single process passes nothing on, and torchrun's ranks have groups of their own.
    Returns the launcher's exit code, and whether a signal came.
    """
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0
    )
    with stop_signals(tell=lambda: os.killpg(process.pid, signal.SIGTERM)) as asked:

        def pass_on() -> None:
            for line in process.stderr or ():
                is_rank = line.startswith("[rank")  # a crash there, by torch's own hook; the rest is torchrun's report
                if is_rank or not (asked() or errors.stat().st_size):
                    print(line, end="", file=sys.stderr, flush=True)

        reader = threading.Thread(target=pass_on, daemon=True)
        reader.start()
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the second Ctrl-C
            process.kill()
            raise
        reader.join(timeout=2)  # not for ever: torch's compile workers may hold the pipe open
        return code, asked()


def relaunch(config: PretrainConfig, verb: str, argv: list[str]) -> int:
    """Runs the verb in several processes; returns 2 when a rank found the user's mistake, else the launcher's code.

    0 when a signal ended it and the ranks have saved, 1 when a rank was killed.
    """
    path, settings, count = read_config(config)
    threads = max(1, (os.cpu_count() or 1) // count)
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        errors = Path(folder) / "error"
        errors.touch()
        ours = {
            "LLMKIT_LAUNCHED": "1",
            ERROR_FILE: str(errors),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
        }  # saving takes time
        if settings.get("use_cpu"):
            ours |= engine_environment(settings)
        start = command(path, settings, count, verb, argv, Path(folder))
        code, is_asked = _watch(start, {"OMP_NUM_THREADS": str(threads)} | os.environ | ours, errors)
        said = errors.read_text(encoding="utf-8").splitlines()
    if code and is_asked and run_status(Path(config.output_dir)) == "stopped":  # the ranks have saved
        return 0
    if code and said:  # ranks that found a mistake all say the same; those that lost another do not know why
        causes = [line for line in said if LOST not in line]
        print((causes or said)[0], file=sys.stderr)
        return 2 if causes else 1
    if code and is_asked:
        print("llmkit: interrupted", file=sys.stderr)
        return 130
    return code
