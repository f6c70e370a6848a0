"""Several processes: relaunches the verb under `accelerate launch`.

Owns `accelerate_config: NAME|PATH` and `num_processes: N`. A name is a file of accelerate_configs/.
Starting under `accelerate launch ... -m llmkit pretrain recipe.yaml` works too, then nothing is relaunched.
"""

import os
import subprocess
import sys
from pathlib import Path

from .config import PretrainConfig, UserError, read_recipe

CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"


def is_main() -> bool:
    """Rank 0 of this launch, or not launched at all."""
    return os.environ.get("RANK", "0") == "0"


def is_wanted(config: PretrainConfig) -> bool:
    """A relaunch is asked for, and this process is not itself the result of one."""
    return "LOCAL_RANK" not in os.environ and bool(config.accelerate_config or config.num_processes not in (None, 1))


def find_config(name: str) -> Path:
    """The YAML of a name or path; raises UserError listing what there is."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UserError(f"accelerate_config={name!r}: no such file; allowed: a path to a .yaml, or {names}")
    return path


def command(config: PretrainConfig, verb: str, argv: list[str]) -> list[str]:
    """`accelerate launch` with the verb as it was called; LOCAL_RANK then stops a second round."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    path = find_config(config.accelerate_config or "cpu")
    settings = read_recipe(path)
    num_processes = config.num_processes or settings.get("num_processes", 1)
    return [*launch, "--config_file", str(path), "--num_processes", str(num_processes), "-m", "llmkit", verb, *argv]


def relaunch(config: PretrainConfig, verb: str, argv: list[str]) -> int:
    if config.num_processes is not None and config.num_processes < 1:
        raise UserError(f"num_processes={config.num_processes}; allowed: 1 or more")
    return subprocess.run(command(config, verb, argv)).returncode
