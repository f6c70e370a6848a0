"""Our recipes against nanoGPT's README command for CPUs: the same text, one thread, in alternation, several seeds.

    python benchmarks/vs_nanogpt.py NANOGPT_DIR --data tiny_shakespeare.txt [--seeds 0 1 2]

nanoGPT: 4 layers, 128 wide, context 64, batch 12, 2,000 iterations. Ours: pretrain_cpu_quick.yaml and pretrain_cpu.yaml
of recipes/shakespeare-char. Both models are scored by one function: nats per character over all windows of 64
characters of the last 10 % that do not overlap. Counted is the CPU time of the training loop alone, on both sides: no
imports, no preparation, no evaluation, no saving. Leaves out wall time, which on a busy machine says little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nanogpt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"pretrain_cpu_quick": (1.8982, 1 / 6), "pretrain_cpu": (1.62, 1.0)}  # nats per character, share of its CPU


def score(model_dir: Path, text: str) -> float:
    """Our model on the same windows; it has never seen an EOS inside a text, nor does it here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmkit import model as ours  # noqa: F401  registers llmkit
    from llmkit.run import quiet_libraries

    quiet_libraries()
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = AutoTokenizer.from_pretrained(model_dir)(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    assert len(ids) == len(text), "one id per character"
    return nanogpt.score_windows(
        ids, lambda x, y: F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten())
    )


def train(recipe: str, data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """{"cpu_s": of the loop, "loss", "num_parameters"}."""
    run = folder / f"{recipe}-{seed}"
    words = ["--data_dir", str(data.parent.resolve()), "--output_dir", str(run), "--store_dir", str(folder / "store")]
    words += ["--seed", str(seed), "--use_cpu", "true"]
    command = [
        sys.executable,
        "-m",
        "llmkit",
        "pretrain",
        str(ROOT / f"recipes/shakespeare-char/{recipe}.yaml"),
        *words,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llmkit failed:\n{done.stderr[-2000:]}")
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    if metrics["num_alerts"]:
        raise SystemExit(f"{recipe}, seed {seed}: {metrics['num_alerts']} alerts, see {run}/alerts.jsonl")
    _, held_out = nanogpt.split(data.read_text(encoding="utf-8"))
    return {
        "cpu_s": metrics["train_cpu_s"],
        "loss": score(run / "model", held_out),
        "num_parameters": metrics["num_parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--data", type=Path, required=True, help="tiny_shakespeare.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, Any]]] = {"nanoGPT": [], **{recipe: [] for recipe in TARGETS}}
    console = Console(highlight=False, width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nanogpt.prepare(args.data, folder / "nanogpt")
        for seed in args.seeds:
            theirs = nanogpt.train(args.nanogpt, folder / "nanogpt", [], seed)
            # from the end of iteration 0 to that of 2,000: 2,000 iterations, the first of which is not the slow one
            runs["nanoGPT"].append(theirs | {"cpu_s": theirs["cpu_s"][-1] - theirs["cpu_s"][0]})
            for recipe in TARGETS:
                runs[recipe].append(train(recipe, args.data, folder, seed))
            for who, seen in runs.items():
                last = seen[-1]
                share = last["cpu_s"] / runs["nanoGPT"][-1]["cpu_s"]
                console.print(
                    f"seed {seed}  {who:<20} {last['loss']:.4f} nats/char  {last['cpu_s']:7.1f} CPU s  "
                    f"share {share:.3f} = 1/{1 / share:.1f}"
                )
    table = Table("", "parameters", "nats/char", "target", "CPU s", "share of nanoGPT's", "target", title="medians")
    total = statistics.median(run["cpu_s"] for run in runs["nanoGPT"])
    for who, seen in runs.items():
        loss, cpu_s = (statistics.median(run[key] for run in seen) for key in ("loss", "cpu_s"))
        shares = [a["cpu_s"] / b["cpu_s"] for a, b in zip(seen, runs["nanoGPT"], strict=True)]
        target = TARGETS.get(who)
        table.add_row(
            who,
            f"{seen[0]['num_parameters']:,}",
            f"{loss:.4f}",
            f"{target[0]:.4f}" if target else "",
            f"{cpu_s:.1f}",
            f"{statistics.median(shares):.3f}" if target else "1",
            f"{target[1]:.3f}" if target else "",
        )
    console.print(table)
    console.print(f"nanoGPT: {1000 * total / 2000:.1f} ms CPU per iteration")


if __name__ == "__main__":
    main()
