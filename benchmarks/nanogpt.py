"""nanoGPT, run as it is: what the comparisons share.

Owns its data files, a run of its own `train.py` in a process of its own with the CPU time of every iteration, and the
score of its model over windows that do not overlap.

    folder = prepare(Path("tiny_shakespeare.txt"), tmp); run = train(checkout, folder, ["--max_iters=300"], seed=0)

Nothing of the checkout is changed: the data, the output and the arguments lie outside it. Evaluations and saving are
switched off, so that only the loop is timed. Leaves out GPUs.
"""

import builtins
import json
import os
import pickle
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# the CPU command of nanoGPT's README, with evaluations and checkpoints off
README_COMMAND = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 "
    "--eval_interval=1000000000 --eval_iters=1 --always_save_checkpoint=False"
).split()
WINDOW = 64


def split(text: str) -> tuple[str, str]:
    """First 90 % to train on, last 10 % to validate, as nanoGPT cuts it."""
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


def prepare(text_file: Path, folder: Path) -> Path:
    """Writes train.bin, val.bin and meta.pkl, which nanoGPT's own prepare.py would download the text for."""
    folder.mkdir(parents=True, exist_ok=True)
    text = text_file.read_text(encoding="utf-8")
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    for name, part in zip(("train", "val"), split(text), strict=True):
        np.asarray([stoi[c] for c in part], np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@torch.no_grad()
def score_windows(ids: Tensor, nll: Any) -> float:
    """Mean nats per character over all windows of 64 that do not overlap; `nll(x, y)` -> mean over a batch."""
    count = (len(ids) - 1) // WINDOW
    x, y = (ids[i : i + count * WINDOW].view(count, WINDOW) for i in (0, 1))
    total = sum(float(nll(a, b)) * len(a) for a, b in zip(x.split(128), y.split(128), strict=True))
    return total / count


def train(checkout: Path, folder: Path, extra: list[str], seed: int, threads: int = 1) -> dict[str, Any]:
    """{"cpu_s": CPU seconds at the end of every iteration, "loss": of the final model, on the validation text}."""
    command = [sys.executable, str(Path(__file__).resolve()), str(folder.resolve()), str(seed), *README_COMMAND]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *extra], cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nanoGPT failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(folder: Path, seed: int, arguments: list[str]) -> None:
    """In the process of its own, in the checkout: its train.py; the line after an iteration is the clock's tick."""
    ticks: list[float] = []
    say, seed_with = builtins.print, torch.manual_seed

    def tick(*words: Any, **options: Any) -> None:
        if words and str(words[0]).startswith("iter "):
            ticks.append(time.process_time())

    builtins.print = tick  # type: ignore[assignment]
    torch.manual_seed = lambda value: seed_with(value + seed)
    sys.argv = ["train.py", *arguments, f"--dataset={folder}", f"--out_dir={folder / 'out'}"]
    sys.path.insert(0, os.getcwd())
    state = runpy.run_path("train.py", run_name="__main__")
    builtins.print = say
    model = state["raw_model"].eval()
    ids = torch.from_numpy(np.fromfile(folder / "val.bin", np.uint16).astype(np.int64))
    loss = score_windows(ids, lambda x, y: model(x, y)[1])
    say(json.dumps({"cpu_s": ticks, "loss": loss, "num_parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
