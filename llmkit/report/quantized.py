"""The page's part about quantised models: what each lost against the model it was made of, and what it saved.

Reads what `read_quantized` takes from the files of a run of `llmkit quantize`; any of it may be missing. Leaves out
how it was measured (deploy/cost.py says it), and models that `llmkit eval` compares.
"""

import math
from typing import Any

from .markup import Html, name, percent, size_text, table, text

Facts = dict[str, Any]
FIGURES = ("loss", "original_loss", "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high",
           "top1_agreement", "kl", "num_documents")  # fmt: skip
SHOWN_NAMES = 4
SIZES = {"disk_bytes": "on disk", "memory_bytes": "in memory", "process_bytes": "of a process"}
SPEEDS = {"decode_tokens_per_second": "tokens/s, decode", "prefill_tokens_per_second": "tokens/s, prefill"}
MEASURED = (*SIZES, *SPEEDS)
NOTE = (
    "Each stage against the model it was made of, on the same text; in brackets the 95 % interval over resampled "
    "documents. KL is in nats per token. Speed is that of batch 1 on the machine of the run; process is what a fresh "
    "one grows by when it loads the model and runs it once."
)
ARROW = " → "


def quantized(stages: list[Facts]) -> str:
    """What was lost on every shard, what was saved, task scores, which layers stayed; empty without such a stage."""
    found = [s for s in stages if s["quantized"]]
    if not found:
        return ""
    tasks = _tasks(found)
    left = "".join(f"<li>{name(s['name'])} left as they were: {_left(s['quantized']['left'])}</li>" for s in found)
    parts = [f'<p class="soft small">{text(NOTE)}</p>', _losses(found), _savings(found), tasks]
    return f'<h2 id="quantized">What quantisation cost</h2>{"".join(parts)}<ul class="plain">{left}</ul>'


def _losses(found: list[Facts]) -> Html:
    rows: list[list[object]] = []
    for s in found:
        q = s["quantized"]
        for i, (shard, f) in enumerate(q["shards"].items()):
            limit = q["limit"]
            ratio = "" if f["perplexity_ratio"] is None else f"{f['perplexity_ratio']:.4f}"
            is_over = limit is not None and (f["perplexity_ratio"] or 0) > limit
            rows.append([
                "" if i else s["name"] + f" ({q['method']})" * bool(q["method"]), shard,
                Html(f'<b class="bad">✗ {text(ratio)}</b>') if is_over else ratio,
                "" if limit is None else f"{limit:g}",
                "" if None in (low := f["perplexity_ratio_low"], high := f["perplexity_ratio_high"])
                else f"[{low:.4f}, {high:.4f}]",
                _between(_exp(f["original_loss"]), _exp(f["loss"])), percent(f["top1_agreement"]),
                "" if f["kl"] is None else f"{f['kl']:.2g}",
            ])  # fmt: skip
    # what decides comes first: a phone shows no more than that without a swipe
    return table(["stage", "text", ">times", ">limit", ">95 %", ">perplexity", ">same likeliest token", ">KL"], rows)


def _exp(loss: float | None) -> str:
    return "" if loss is None or loss > 100 else f"{math.exp(loss):.4f}"


def _between(before: str, after: str) -> str:
    return before + ARROW + after if before and after else ""


def _savings(found: list[Facts]) -> Html:
    rows: list[list[object]] = []
    for s in found:
        m = s["quantized"]["measured"]
        sizes = [_between(size_text(m[f"original_{key}"]), size_text(m[key])) for key in SIZES]
        speeds = [_between(_rate(m[f"original_{key}"]), _rate(m[key])) for key in SPEEDS]
        rows.append([s["name"], s["parent_name"] or s["parent"] or "", *sizes, *speeds])
    return table(["stage", "of", *(f">{title}" for title in (*SIZES.values(), *SPEEDS.values()))], rows)


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _tasks(found: list[Facts]) -> str:
    found = [s for s in found if s["quantized"]["tasks"]]
    tasks = list(dict.fromkeys(task for s in found for task in s["quantized"]["tasks"]))
    rows: list[list[object]] = []
    for task in tasks:
        pairs = [s["quantized"]["tasks"].get(task) for s in found]
        rows.append([task, *("" if pair is None else f"{pair[0]:.4f}{ARROW}{pair[1]:.4f}" for pair in pairs)])
    return table(["task", *(f">{s['name']}" for s in found)], rows) if rows else ""


def _left(reasons: dict[str, dict[str, int]]) -> str:
    said = []
    for reason, names in reasons.items():
        shown = [f"{count} × {name(n)}" if count > 1 else name(n) for n, count in list(names.items())[:SHOWN_NAMES]]
        rest = len(names) - SHOWN_NAMES
        said.append(f"{', '.join(shown)}{f' and {rest} more kinds' * (rest > 0)} ({text(reason)})")
    return "; ".join(said) or "nothing"


def is_allowed(row: Facts, pair: Facts, limit: float | None) -> bool:
    """Whether a quantised stage's loss on raw text is below the limit that it was made under; others have no limit."""
    if limit is None or limit <= 0 or row["kind"] != "shard" or pair["difference"] is None:
        return False
    return pair["difference"] <= math.log(limit)


def complaint(stage: Facts) -> str | None:
    """Why a quantised stage failed; None for any other."""
    q = stage["quantized"]
    if not q or stage["status"] != "failed" or q["limit"] is None:
        return None
    ratios = {shard: f["perplexity_ratio"] or 0 for shard, f in q["shards"].items()}
    over = {shard: ratio for shard, ratio in ratios.items() if ratio > q["limit"]}
    if not over:
        return None
    worst = max(over, key=lambda shard: over[shard])
    return (
        f"{stage['name']} ({q['method'] or 'quantised'}): perplexity on {worst} is {over[worst]:.4f} times that of "
        f"{stage['parent_name'] or stage['parent'] or 'the original'}, limit {q['limit']:g}"
    )
