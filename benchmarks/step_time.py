"""CPU time of a training step against nanoGPT's, at nanoGPT's own size: whole loops, in alternation.

    python benchmarks/step_time.py NANOGPT_DIR --data tiny_shakespeare.txt [--rounds 5] [--compile]

Both run as a user starts them, each in a process of its own, on one thread: nanoGPT's README command for CPUs (4
layers, 128 wide, context 64, 12 rows, AdamW) and `llmkit pretrain` with as many parameters. Counted is the CPU time of
iterations 100 to 300 of the loop: data, forward, backward, clipping, update, logging, here also the monitor.
Also, without nanoGPT: what a head cut into chunks costs and saves at a large vocabulary.
Leaves out compiling itself, evaluation and saving.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nanogpt

FIRST, LAST = 100, 300
ROOT = Path(__file__).resolve().parent.parent
# 4 layers x (4 x 128^2 + 3 x 128 x 336) + 2 x 68 x 128: 0.80 M, nanoGPT has 0.80 M
SHAPE = "{hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 336}"


def ours(data: Path, folder: Path, compile_model: bool) -> tuple[float, int]:
    """CPU seconds per step, and the number of parameters."""
    settings = {
        "data_dir": str(data.parent.resolve()),
        "output_dir": str(folder / "run"),
        "store_dir": str(folder.parent / "store"),
        "config_overrides": SHAPE,
        "max_length": "64",
        "max_steps": str(LAST),
        "per_device_train_batch_size": "12",
        "optim": "adamw_torch_fused",
        "learning_rate": "0.001",
        "muon_learning_rate": "0.02",
        "torch_compile": str(compile_model).lower(),
        "use_cpu": "true",
        "eval_datasets": "[]",
        "eval_steps": "null",
        "sample_prompts": "[]",
        "logging_steps": "10",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "llmkit", "pretrain", str(ROOT / "recipes/shakespeare-char/pretrain.yaml"), *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llmkit failed:\n{done.stderr[-2000:]}")
    at = {}
    for line in (folder / "run/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train_cpu_s" in row:
            at[row["step"]] = row["train_cpu_s"]
    count = json.loads((folder / "run/result.json").read_text())["metrics"]["num_parameters"]
    return (at[LAST] - at[FIRST]) / (LAST - FIRST), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--data", type=Path, required=True, help="tiny_shakespeare.txt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compiled against compiled; default eager against eager")
    args = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nanogpt.prepare(args.data, folder / "nanogpt")
        for i in range(args.rounds):
            extra = [f"--max_iters={LAST}", f"--compile={args.compile}"]
            theirs = nanogpt.train(args.nanogpt, folder / "nanogpt", extra, seed=i)
            step = (theirs["cpu_s"][LAST] - theirs["cpu_s"][FIRST]) / (LAST - FIRST)
            mine, count = ours(args.data, folder / str(i), args.compile)
            ratios.append(mine / step)
            print(
                f"round {i + 1}   nanoGPT {1e3 * step:6.2f} ms ({theirs['num_parameters']:,} parameters)   "
                f"llmkit {1e3 * mine:6.2f} ms ({count:,})   ratio {mine / step:.3f}",
                flush=True,
            )
    mode = "compiled" if args.compile else "eager"
    print(f"{mode}: llmkit takes {statistics.median(ratios):.3f} of nanoGPT's CPU time, median of {args.rounds} rounds")


if __name__ == "__main__":
    main()
