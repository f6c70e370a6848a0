"""Several processes: relaunches the verb under Accelerate's launcher.

Owns `accelerate_config: NAME|PATH` and `num_processes: N`. A name is a file of accelerate_configs/.
Starting under `accelerate launch ... -m llmkit pretrain recipe.yaml` works too, then nothing is relaunched.

On CPUs `accelerate launch` starts a single process unless there is MPI, so there it is torchrun's launcher (gloo).
"""

import os
import subprocess
import sys
from pathlib import Path

from .config import PretrainConfig, UserError, read_recipe

CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"
LAUNCHED = ("LLMKIT_LAUNCHED", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # ours, torchrun's, accelerate launch's


def is_main() -> bool:
    """Rank 0 of this launch, or not launched at all."""
    return os.environ.get("RANK", "0") == "0"


def is_wanted(config: PretrainConfig) -> bool:
    """A relaunch is asked for, and this process is not itself the result of one."""
    launched = any(name in os.environ for name in LAUNCHED)
    return not launched and bool(config.accelerate_config or config.num_processes not in (None, 1))


def find_config(name: str) -> Path:
    """The YAML of a name or path; raises UserError listing what there is."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UserError(f"accelerate_config={name!r}: no such file; allowed: a path to a .yaml, or {names}")
    return path


def _default_config() -> str:
    import torch

    return "multi_gpu" if torch.cuda.is_available() else "cpu"


def command(config: PretrainConfig, verb: str, argv: list[str]) -> list[str]:
    """The launcher's command line, with the verb as it was called."""
    path = find_config(config.accelerate_config or _default_config())
    settings = read_recipe(path)
    count = str(config.num_processes or settings.get("num_processes", 1))
    if settings.get("use_cpu"):
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", count]
    else:
        launcher = ["accelerate.commands.launch", "--config_file", str(path), "--num_processes", count]
    return [sys.executable, "-m", *launcher, "-m", "llmkit", verb, *argv]


def relaunch(config: PretrainConfig, verb: str, argv: list[str]) -> int:
    """Runs the verb in several processes and returns the launcher's exit code."""
    if config.num_processes is not None and config.num_processes < 1:
        raise UserError(f"num_processes={config.num_processes}; allowed: 1 or more")
    threads = max(1, (os.cpu_count() or 1) // (config.num_processes or 1))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {"LLMKIT_LAUNCHED": "1"}
    return subprocess.run(command(config, verb, argv), env=environment).returncode
