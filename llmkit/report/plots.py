"""Loss curves as PNG.   plot_losses(run_folder)  ->  run_folder/loss.png

Owns pictures drawn from the JSON files of a run folder; imports no stage.
"""

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a line that a full disk cut short is left out with a warning."""
    path, rows = folder / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    if len(rows) < len(lines):
        warnings.warn(f"{path}: skipped {len(lines) - len(rows)} of {len(lines)} lines, not JSON", stacklevel=2)
    return rows


def plot_losses(folder: Path) -> Path:
    """Training loss and every validation shard against steps, with the true entropy of a shard as a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    rows = read_metrics(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    if train:
        axes.plot(*zip(*train, strict=True), color="0.75", lw=1, label="train")
    lows = [loss for _, loss in train]
    for i, (shard, facts) in enumerate(manifest.get("eval_shards", {}).items()):
        points = [(row["step"], row[f"eval_{shard}_loss"]) for row in rows if f"eval_{shard}_loss" in row]
        if not points:
            continue
        lows += [loss for _, loss in points]
        axes.plot(*zip(*points, strict=True), color=f"C{i}", marker="o", ms=4, label=f"{shard}  {points[-1][1]:.4f}")
        if facts.get("entropy") is not None:
            lows.append(facts["entropy"])
            axes.axhline(
                facts["entropy"], color=f"C{i}", ls="--", lw=1, label=f"{shard} true entropy  {facts['entropy']:.4f}"
            )
    if lows and max(lows) > 4 * min(lows) > 0:  # a linear axis would press the end of the run flat
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.yaxis.set_minor_formatter("{x:.1g}")
    axes.set(xlabel="step", ylabel="nats per token", title=f"{folder}")
    axes.grid(alpha=0.25, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    for text in figure.findobj(Text):  # a folder or shard may be called a$b$: that is no formula
        text.set_parse_math(False)
    path = folder / "loss.png"
    figure.savefig(path)
    return path
