"""Pictures as PNG.   plot_losses(run_folder)  ->  run_folder/loss.png

Owns pictures drawn from the figures of JSON files; imports no stage.
"""

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CURVE_POINTS = 200


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
    from matplotlib.ticker import LogLocator, NullFormatter

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
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="step", ylabel="nats per token", title=f"{folder}")
    axes.grid(alpha=0.25, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    for text in figure.findobj(Text):  # a folder or shard may be called a$b$: that is no formula
        text.set_parse_math(False)
    path = folder / "loss.png"
    figure.savefig(path)
    return path


def rank_curve(counts: NDArray[np.int64]) -> list[list[int]]:
    """[rank, uses] of the ids that are used, the commonest first; at most 200 of them, evenly on a log axis.

    Takes the uses of every id: (V,).
    """
    used = np.sort(counts[counts > 0])[::-1]
    if not len(used):
        return []
    ranks = np.unique(np.geomspace(1, len(used), CURVE_POINTS).round().astype(int))
    return [[int(rank), int(used[rank - 1])] for rank in ranks]


def plot_frequencies(curves: dict[str, list[list[int]]], title: str) -> bytes:
    """Uses of an id against its rank, both axes logarithmic: PNG of `name -> [[rank, uses], ...]`.

    A grey line has the slope -1 of Zipf's law; where a curve falls off at its right end the vocabulary is too large.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="rank of the id", ylabel="uses", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    drawn = {name: curve for name, curve in curves.items() if curve}
    for i, (name, curve) in enumerate(drawn.items()):
        axes.plot(*zip(*curve, strict=True), color=f"C{i % 10}", lw=1.6, label=name[:40])
    if drawn:
        most, last = max(c[0][1] for c in drawn.values()), max(c[-1][0] for c in drawn.values())
        end = min(last, most)  # where one use is reached
        axes.plot([1, end], [most, most / end], color="0.7", lw=1, ls="--", zorder=0, label="slope -1")
        axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    for text in figure.findobj(Text):  # a shard may be called a$b$: that is no formula
        text.set_parse_math(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
