"""`--overfit N`: a few rows must be learnt by heart, before many are tried.

Owns the settings of that trial, for every training verb, and its verdict for pretraining.

    config = for_overfit(config);  result = judge_overfit(job, rows, result)

A document is asked from the token on from which no other begins like it; before that nobody could know which is meant.
So the loss that is left is known as well: log(documents / equal documents) nats for every document.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..data.loader import IGNORE, Rows
from ..run import Result, write_json
from .build import Job

EPOCHS = 100  # at most
LEARNT = 0.99  # share of the answers that must come back
BATCH = 32


def for_overfit(config: Any) -> Any:
    """The recipe as the trial runs it: a folder of its own, many passes, no dropout or decay, nothing held out.

    An earlier trial in that folder is removed.
    """
    if not config.overfit:
        return config
    folder = Path(f"{config.output_dir}-overfit")
    with contextlib.suppress(OSError, ValueError):
        if json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("overfit"):
            shutil.rmtree(folder)
    off: dict[str, Any] = {
        "output_dir": str(folder), "weight_decay": 0.0, "eval_datasets": [], "eval_steps": None,
        "test_split_size": 0.0, "eval_on_start": False, "eval_answers": 0, "max_new_tokens": config.max_length,
        "save_steps": None, "save_total_limit": None, "sample_prompts": [], "ngram_order": None,
    }  # fmt: skip
    if config.use_peft:
        off["lora_dropout"] = 0.0
    if config.max_steps:  # meant for all rows
        rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        off["max_steps"] = min(config.max_steps, math.ceil(EPOCHS * config.overfit / rows_per_step))
    else:
        off["num_train_epochs"] = float(EPOCHS)
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{key: value for key, value in off.items() if key in known})


def pieces_of(rows: Rows) -> list[list[int]]:
    """What the rows hold, document by document, as the model sees it: from its BOS to its last token."""
    found = []
    for batch in rows.sweep(BATCH):
        for ids, labels, positions in zip(
            batch["input_ids"].tolist(), batch["shift_labels"].tolist(), batch["position_ids"].tolist(), strict=True
        ):
            starts = [t for t, position in enumerate(positions) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                known = [label for label in labels[start:end] if label != IGNORE]
                if known:
                    found.append([ids[start], *known])
    return found


def unique_from(pieces: list[list[int]]) -> list[int]:
    """For every piece, after how many tokens no other one begins like it; all of them for one that never stands out."""
    counts: Counter[tuple[int, ...]] = Counter()
    for piece in pieces:
        counts.update(tuple(piece[:k]) for k in range(1, len(piece) + 1))
    return [next((k for k in range(1, len(piece)) if counts[tuple(piece[:k])] == 1), len(piece)) for piece in pieces]


def floor_of(pieces: list[list[int]]) -> float:
    """Nats per token that are left when every piece is known by heart: which one it is must be guessed."""
    equal = Counter(map(tuple, pieces))
    nats = sum(count * math.log(len(pieces) / count) for count in equal.values())
    return nats / sum(len(piece) - 1 for piece in pieces)


@torch.no_grad()
def judge_overfit(job: Job, rows: Rows, result: Result) -> Result:
    """Lets the model finish every document, writes what it learnt into result.json, and says so."""
    if job.engine.rank != 0:
        return result
    model, say = job.engine.bare_model, job.console.print
    pieces = pieces_of(rows)
    asked = [(piece, k) for piece, k in zip(pieces, unique_from(pieces), strict=True) if k < len(piece)]
    model.eval()
    exact = 0
    wrong: list[tuple[list[int], list[int], int]] = []
    for piece, k in asked:
        ids = torch.tensor([piece[:k]], device=next(model.parameters()).device)
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(piece) - k, do_sample=False,
            eos_token_id=job.tokenizer.eos_token_id, pad_token_id=job.tokenizer.eos_token_id,
        )[0, k:].tolist()  # fmt: skip
        if new == piece[k:]:
            exact += 1
        else:
            wrong.append((piece, new, k))
    share = exact / max(1, len(asked))
    last = [json.loads(line) for line in (job.run.folder / "metrics.jsonl").read_text().splitlines()]
    loss, floor = [row["loss"] for row in last if "loss" in row][-1], floor_of(pieces)
    figures = {"overfit_exact_match": share, "overfit_loss": loss, "overfit_floor": floor}
    result = dataclasses.replace(
        result, status="ok" if share >= LEARNT else "failed", metrics={**result.metrics, **figures}
    )
    write_json(job.run.folder / "result.json", dataclasses.asdict(result))
    for piece, new, k in wrong[:3]:
        say(f"expected  {json.dumps(job.tokenizer.decode(piece[k:])[:200], ensure_ascii=False)}", markup=False)
        say(f"    came  {json.dumps(job.tokenizer.decode(new)[:200], ensure_ascii=False)}", markup=False)
    say(
        f"overfit   {exact:,} of {len(asked):,} documents word for word, loss {loss:.4f} (by heart: {floor:.4f})"
        + (f"; {len(pieces) - len(asked)} begin like others to their end" if len(asked) < len(pieces) else "")
    )
    say(verdict(share, "documents, loss and model"))
    return result


def verdict(share: float, what: str) -> str:
    if share >= LEARNT:
        return f"overfit   learnt by heart: {what} fit together; now train"
    return "overfit   NOT learnt by heart: raise max_steps or learning_rate; near no loss, look at what came"
