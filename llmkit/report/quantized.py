"""The page's part about quantised models: what each lost against the model it was made of, and what it saved.

Reads what `read_quantized` takes from the files of a run of `llmkit quantize`; any of it may be missing. Leaves out
how it was measured (deploy/cost.py says it), and models that `llmkit eval` compares.
"""

from typing import Any

from .markup import Html, name, percent, size_text, table, text

Facts = dict[str, Any]
FIGURES = ("loss", "original_loss", "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high",
           "top1_agreement", "kl", "num_documents")  # fmt: skip
MEASURED = ("disk_bytes", "memory_bytes", "process_bytes", "decode_tokens_per_second", "prefill_tokens_per_second")
SHOWN_NAMES = 4
CSS = """
#quantized + p + .wide td { vertical-align: top; } #quantized ~ .wide .over { color: var(--lost); font-weight: 650; }
"""


def quantized(stages: list[Facts]) -> str:
    """A row for each quantised stage."""
    found = [s for s in stages if s["quantized"]]
    if not found:
        return ""
    rows: list[list[object]] = [_row(s, s["quantized"]) for s in found]
    head = ["stage", "perplexity, times the original's", "same likeliest token, KL", "weights", "tokens/s, batch 1",
            "task scores", "layers left as they were"]  # fmt: skip
    note = (
        "Each against the model it was made of, on the same text; in brackets 95 % of ratios over resampled documents. "
        "Before → after. On CPUs bitsandbytes saves memory, not time."
    )
    return f'<h2 id="quantized">What quantisation cost</h2><p class="soft small">{text(note)}</p>{table(head, rows)}'


def _row(stage: Facts, q: Facts) -> list[object]:
    ratios, agreements = [], []
    for shard, f in q["shards"].items():
        over = q["limit"] is not None and (f["perplexity_ratio"] or 0) > q["limit"]
        between = (f["perplexity_ratio_low"], f["perplexity_ratio_high"])
        interval = "" if None in between else f" [{between[0]:.4f}, {between[1]:.4f}]"
        said = "" if f["perplexity_ratio"] is None else f"{f['perplexity_ratio']:.4f}"
        figure = f"{text(said)}{' ✗' * over}"
        ratios.append(f"{name(shard)} {f'<b class=over>{figure}</b>' if over else figure}{text(interval)}")
        kl = "" if f["kl"] is None else f", {f['kl']:.2g} nats"
        agreements.append(f"{name(shard)} {percent(f['top1_agreement'])}{kl}")
    if q["limit"] is not None:
        ratios.append(f'<span class="soft">limit {q["limit"]:g}</span>')
    m = q["measured"]
    sizes = [
        f"{what} {size_text(m[f'original_{key}'])} → {size_text(m[key])}"
        for what, key in (("disk", "disk_bytes"), ("memory", "memory_bytes"), ("process", "process_bytes"))
        if m[key] is not None and m[f"original_{key}"] is not None
    ]
    speeds = [
        f"{what} {m[f'original_{key}']:,.0f} → {m[key]:,.0f}"
        for what, key in (("decode", "decode_tokens_per_second"), ("prefill", "prefill_tokens_per_second"))
        if m[key] is not None and m[f"original_{key}"] is not None
    ]
    tasks = [f"{name(task)} {before:.3f} → {after:.3f}" for task, (before, after) in q["tasks"].items()]
    left = [f"{_names(names)} ({text(reason)})" for reason, names in q["left"].items()]
    told = [name(stage["name"]), f"{text(q['method'] or '')}, of {name(stage['parent_name'] or stage['parent'])}"]
    cells = (told, ratios, agreements, sizes, speeds, tasks, left)
    return [Html("<br>".join(lines)) for lines in cells]


def _names(names: dict[str, int]) -> str:
    shown = [f"{count} × {name(n)}" if count > 1 else name(n) for n, count in list(names.items())[:SHOWN_NAMES]]
    rest = len(names) - SHOWN_NAMES
    return ", ".join(shown) + (f" and {rest} more kinds" if rest > 0 else "")


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
