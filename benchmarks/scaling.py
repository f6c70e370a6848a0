"""Scaling: tokens per second and peak memory against model size, context and accumulation, beside the law for each.

Owns one table, one plot and one JSON of short `llmkit pretrain` runs, each in its own process and one thread, since
peak memory is that of a process:

    python benchmarks/scaling.py --output_dir runs/scaling     # about 3 minutes on one core

One axis moves at a time, away from a base shape. The laws:

    speed    tokens/s = S / FLOPs per token (`llmkit.train.build.flops_per_token`, plus Muon's share of a step); S in
             FLOP/s is the median of the AdamW runs, so a ratio under 1 says that a shape uses the processor worse
             than most. Muon: 5 iterations of 4 M^2 N + 2 M^3 for every hidden matrix (M, N), M <= N, once per step
    memory   bytes = F + 16 x parameters + k x tokens of a micro-batch x layers x width + 12 x tokens x vocabulary;
             16: float32 weight, gradient and AdamW's two averages; Muon has one, so 12 for hidden matrices; 12 of
             the logits: themselves, their log-softmax, their gradient. F (interpreter, libraries) and k (activations)
             are fitted to the AdamW runs; a second fit leaves the 16 free. It finds less where nothing is accumulated,
             since gradients are then born while activations die, and the law leaves out Muon's workspace

Accumulation enters no other way. The speed of a run is that of its fastest step: other users only slow the machine.
Leaves out several processes, GPUs (gpu_pretrain.py) and the validation loss.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from llmkit.hardware import detect
from llmkit.model import LlmkitConfig, LlmkitForCausalLM
from llmkit.train.build import flops_per_token
from llmkit.train.optim import split_parameters

VOCAB, HEAD_SIZE = 1024, 64
BYTES_PER_LOGIT = 12
FLOPS_PER_RUN = 4e11  # about 6 s: a small shape makes more steps, since its short ones are disturbed more easily


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int = 256
    layers: int = 4
    context: int = 256
    rows: int = 2
    accumulation: int = 1
    optim: str = "adamw_torch_fused"

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context * self.accumulation

    @property
    def recipe(self) -> dict[str, Any]:
        sizes = {"hidden_size": self.width, "num_hidden_layers": self.layers}
        return {
            "config_overrides": {**sizes, "num_attention_heads": self.width // HEAD_SIZE},
            "max_length": self.context,
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": self.accumulation,
            "optim": self.optim,
        }

    def describe(self) -> dict[str, float]:
        """FLOPs per token, optimiser included; parameters, and those that Muon updates. Allocates nothing."""
        config = LlmkitConfig(**self.recipe["config_overrides"], vocab_size=VOCAB, max_position_embeddings=self.context)
        with torch.device("meta"):
            model = LlmkitForCausalLM(config)
        hidden = split_parameters(model)[0] if self.optim == "muon" else []
        muon_flops = sum(5 * (4 * min(p.shape) * p.numel() + 2 * min(p.shape) ** 3) for p in hidden)
        return {
            "flops_per_token": flops_per_token(model, self.context) + muon_flops / self.tokens_per_step,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_muon": sum(p.numel() for p in hidden),
        }


BASE = Shape()
# axis -> (what its points are called, the shapes)
AXES: dict[str, tuple[str, list[Shape]]] = {
    "size": ("width", [dataclasses.replace(BASE, width=n) for n in (128, 256, 384, 512, 768)]),
    "context": ("context", [dataclasses.replace(BASE, context=n) for n in (128, 256, 512, 1024)]),
    "accumulation": ("accumulation", [dataclasses.replace(BASE, accumulation=n) for n in (1, 2, 4, 8)]),
    "size, Muon": ("width", [dataclasses.replace(BASE, width=n, optim="muon") for n in (256, 512)]),
}


def measure(shape: Shape, folder: Path, num_steps: int) -> dict[str, float]:
    """A short run in a process of its own: tokens/s of the fastest step, peak resident memory up to the last step."""
    name = "-".join(str(value) for value in dataclasses.astuple(shape))
    recipe = {
        **shape.recipe,
        "output_dir": str(folder / name),
        "store_dir": str(folder / "data"),
        "datasets": [{"path": "builtin/toyworld", "split": "train[:4000]"}],
        "vocab_size": VOCAB,
        "packing_strategy": "contiguous",
        "max_steps": num_steps,
        "logging_steps": 1,
        "sample_prompts": [],
        "use_cpu": True,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "llmkit", "pretrain", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ran.returncode:
        sys.exit(f"{name}: exit code {ran.returncode}: {ran.stderr.strip()[-500:]}")
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    return {
        "tokens_per_second": max(row["tokens_per_second"] for row in rows),
        "peak_bytes": max(row["peak_memory_bytes"] for row in rows),
    }


def add_laws(points: list[dict[str, Any]]) -> dict[str, float]:
    """Fits the laws to the AdamW points, writes their predictions into all; returns what was fitted."""
    fitted = [p for p in points if p["optim"] != "muon"]
    speed = float(np.median([p["tokens_per_second"] * p["flops_per_token"] for p in fitted]))

    def columns(chosen: list[dict[str, Any]]) -> np.ndarray:
        """One row per point: 1, bytes of activations over k, parameters."""
        tokens = [p["rows"] * p["context"] for p in chosen]
        sizes = [n * p["layers"] * p["width"] for n, p in zip(tokens, chosen, strict=True)]
        return np.stack([np.ones(len(chosen)), sizes, [p["num_parameters"] for p in chosen]], axis=1)

    def known(p: dict[str, Any]) -> float:
        return BYTES_PER_LOGIT * p["rows"] * p["context"] * VOCAB

    rest = np.array([p["peak_bytes"] - known(p) for p in fitted])
    free, *_ = np.linalg.lstsq(columns(fitted), rest, rcond=None)
    (fixed, k), *_ = np.linalg.lstsq(columns(fitted)[:, :2], rest - 16 * columns(fitted)[:, 2], rcond=None)
    for p, (one, size, parameters) in zip(points, columns(points), strict=True):
        p["law_tokens_per_second"] = speed / p["flops_per_token"]
        p["law_peak_bytes"] = float(fixed * one + k * size + 16 * parameters - 4 * p["num_muon"] + known(p))
    return {
        "flops_per_second": speed,
        "fixed_bytes": float(fixed),
        "activation_bytes_per_token_layer_width": float(k),
        "free_fit_bytes_per_parameter": float(free[2]),
    }


def table_of(points: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("axis", "at", "parameters", "MFLOP/token", "tokens/s", "law", "ratio", "peak MB", "law", "ratio"):
        table.add_column(column, justify="left" if column == "axis" else "right")
    for p in points:
        cells = [p["axis"], str(p["at"]), f"{p['num_parameters']:,}", f"{p['flops_per_token'] / 1e6:.1f}"]
        for key, unit in (("tokens_per_second", 1), ("peak_bytes", 1e6)):
            law = p[f"law_{key}"]
            cells += [f"{p[key] / unit:,.0f}", f"{law / unit:,.0f}", f"{p[key] / law:.2f}"]
        table.add_row(*cells)
    return table


def plot(points: list[dict[str, Any]], law: dict[str, float], path: Path) -> None:
    """Two rows of three panels: speed above, memory below; points are measured, lines are the laws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    panels = [("size", "num_parameters", "parameters"), ("context", "at", "context, tokens")]
    panels.append(("accumulation", "at", "gradient accumulation, micro-batches"))
    for column, (axis, key, label) in enumerate(panels):
        for row, (what, unit, title) in enumerate(
            (("tokens_per_second", 1, "tokens per second"), ("peak_bytes", 1e6, "peak memory, MB"))
        ):
            axes = grid[row, column]
            for name, color in ((axis, "C0"), (f"{axis}, Muon", "C3")):
                ours = [p for p in points if p["axis"] == name]
                x, optimiser = [p[key] for p in ours], "Muon" if color == "C3" else "AdamW"
                if ours:
                    axes.plot(x, [p[f"law_{what}"] / unit for p in ours], color=color, lw=1, label=f"{optimiser}, law")
                    axes.plot(x, [p[what] / unit for p in ours], "o", color=color, label=f"{optimiser}, measured")
            ticks = [p[key] for p in points if p["axis"] == axis]
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{t / 1e6:.1f}M" if t > 1e5 else str(t) for t in ticks])
            axes.minorticks_off()
            axes.set_ylabel(title if column == 0 else "")
            axes.set_xlabel(label if row == 1 else "")
            if row == 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:,.0f}")
            else:
                axes.set_ylim(bottom=0)
                axes.axhline(law["fixed_bytes"] / 1e6, color="0.6", ls=":", lw=1, label="fixed part")
            axes.grid(alpha=0.25)
            if column == 0:
                axes.legend(frameon=False, fontsize=8)
    shape = f"base: {BASE.layers} layers, {BASE.width} wide, context {BASE.context}, {BASE.rows} rows, one thread"
    figure.suptitle(f"llmkit pretrain, {shape}; points measured, lines the laws", fontsize=11)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/scaling"), help="of scaling.png and scaling.json")
    parser.add_argument("--steps", type=int, default=6, help="least steps of a run (default 6)")
    args = parser.parse_args()
    started, console = time.perf_counter(), Console(highlight=False, width=120)
    measured: dict[Shape, dict[str, float]] = {}
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, console.status("measuring") as status:
        measure(dataclasses.replace(BASE, width=64), Path(name), 1)  # tokenises, which needs memory of its own
        for axis, (what, shapes) in AXES.items():
            for shape in shapes:
                at = getattr(shape, what)
                status.update(f"measuring {axis}, {what} {at}")
                if shape not in measured:
                    flops_per_step = shape.tokens_per_step * shape.describe()["flops_per_token"]
                    num_steps = max(args.steps, min(100, round(FLOPS_PER_RUN / flops_per_step)))
                    measured[shape] = measure(shape, Path(name), num_steps)
                facts = {**dataclasses.asdict(shape), **shape.describe(), **measured[shape]}
                points.append({"axis": axis, "at": at, **facts})
    law = add_laws(points)
    console.print(table_of(points))
    print(
        f"speed   {law['flops_per_second'] / 1e9:.1f} GFLOP/s, on {detect(use_cpu=True)} for a plain matrix product\n"
        f"memory  {law['fixed_bytes'] / 1e6:.0f} MB fixed, {law['activation_bytes_per_token_layer_width']:.0f} bytes "
        "of activations per token, layer and width; bytes per parameter 16 as the law says, "
        f"{law['free_fit_bytes_per_parameter']:.1f} when fitted freely"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    result = {"law": law, "base": dataclasses.asdict(BASE), "points": points}
    (args.output_dir / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(points, law, args.output_dir / "scaling.png")
    print(f"wrote   {args.output_dir}/scaling.png and .json, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
