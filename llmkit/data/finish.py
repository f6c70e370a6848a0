"""The last steps of a corpus: its tokenizer, the joined stores, and the figures that the report reads.

Owns `report.json`: what came in, what happened to it for which reason with examples, what came out. The whole corpus is
never in memory: figures are added up from what the steps left in the work folder.
"""

import dataclasses
import json
import os
import shutil
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from ..report.corpus import page
from ..report.plots import rank_curve
from ..run import Result, write_json, write_text
from . import clean, stages
from .encode import NAME, file_hash, merge_stores, read_metadata
from .sources import describe
from .stages import (
    FATES,
    HELD_OUT,
    HELD_OUT_SHARD,
    Plan,
    final_fates,
    load_array,
    load_notes,
    training_texts,
)

TRAINING_BYTES = 100_000_000  # of text that a BPE is trained on
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
COMMONEST = 20
LISTS = ("duplicates.jsonl", "contaminated.jsonl")


def tokenizer(work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Trains a tokenizer on the kept training documents, unless the recipe named one (it lies there already)."""
    from .tokenizer import save_tokenizer, train_tokenizer

    plan, folder = Plan.load(work), Path(work, "tokenizer")
    config = plan.config
    if config.tokenizer_name:
        return
    texts = training_texts(work, plan, 1 << 62 if config.tokenizer_type == "char" else TRAINING_BYTES)
    opens_with_bos = config.packing_strategy == "bos_bestfit"
    made = train_tokenizer(config.tokenizer_type, texts, config.vocab_size, opens_with_bos)
    shutil.rmtree(folder, ignore_errors=True)
    save_tokenizer(made, folder)
    write_ids(made, work)


def write_ids(made: Any, work: str) -> None:
    """What light workers must know of a tokenizer besides tokenizer.json."""
    from .tokenizer import fingerprint

    found = {"eos": made.eos_token_id, "unk": made.unk_token_id, "fingerprint": fingerprint(made), "size": len(made)}
    write_json(Path(work, "ids.json"), found)


def finish(work: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Joins the parts, puts stores, tokenizer and lists into the corpus folder, and writes report and result."""
    plan = Plan.load(work)
    output = Path(plan.output)
    figures = report(work, plan)
    ids = json.loads(Path(work, "ids.json").read_text(encoding="utf-8"))
    for name in plan.store_names:
        parts = sorted(path for path in Path(work, "parts", name).glob("*") if path.is_dir())
        store = Path(work, "stores", name)
        shutil.rmtree(store, ignore_errors=True)
        if not parts or not merge_stores(parts, store)["num_documents"]:
            raise UserError(
                f"{name}: no document is left of it; see the lists and notes in {work}, and mend the recipe"
            )
        figures["stores"][name] = _store_figures(plan, store, ids, name)
    figures["frequencies"] = _frequencies(work, plan, ids["size"])
    for name in plan.store_names:
        shutil.rmtree(output / name, ignore_errors=True)
        os.rename(Path(work, "stores", name), output / name)
    shutil.copytree(Path(work, "tokenizer"), output / "tokenizer", dirs_exist_ok=True)
    for name in LISTS:
        if Path(work, name).exists():
            shutil.copy(Path(work, name), output / name)
    write_json(output / "report.json", figures)
    write_text(output / "report.html", page(figures))
    _write_result(output, figures)


def _store_figures(plan: Plan, folder: Path, ids: dict[str, Any], name: str) -> dict[str, Any]:
    """Counts of a store, completed in its manifest too; with max_length its row plan is made and measured."""
    from .shards import Store, plan_rows

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    figures = {key: manifest[f"num_{key}"] for key in ("documents", "tokens", "bytes")}
    figures["bytes_per_token"] = figures["bytes"] / max(1, figures["tokens"] - figures["documents"])
    sources = [s for s, store in zip(plan.sources, plan.stores, strict=True) if store == name] or plan.sources
    manifest["source"] = ", ".join(str(source.data_files or source.path) for source in sources)
    manifest |= {"fingerprint": file_hash(folder / NAME), "tokenizer": ids["fingerprint"]}
    write_json(folder / "manifest.json", manifest)
    if plan.config.max_length and plan.config.packing_strategy == "bos_bestfit":
        ends = np.fromfile(folder / f"{NAME}.index", "<u8")
        rows = plan_rows(Store(folder, _tokens(folder), ends, manifest, None), plan.config.max_length)
        figures["packing"] = {
            "max_length": plan.config.max_length,
            "rows": rows.num_rows,
            "utilisation": rows.utilisation,
            "restarts": rows.num_restarts,
        }
    return figures


def _tokens(folder: Path) -> NDArray:
    return np.memmap(folder / NAME, read_metadata(folder / NAME).dtype, mode="r")


def _frequencies(work: str, plan: Plan, size: int) -> dict[str, Any]:
    """How often the ids of the vocabulary stand in the training stores: rank and count for a Zipf plot, dead share."""
    counts = np.zeros(size, np.int64)
    for name in dict.fromkeys(plan.stores[: plan.num_train]):
        tokens = _tokens(Path(work, "stores", name))
        for k in range(0, len(tokens), 1 << 22):
            counts += np.bincount(tokens[k : k + (1 << 22)], minlength=size)
    return {
        "vocabulary": size,
        "unused": int((counts == 0).sum()),
        "under_100": int((counts < 100).sum()),
        "zipf": rank_curve(counts),
    }


def report(work: str, plan: Plan) -> dict[str, Any]:
    """Figures of everything before the stores."""
    ranks = range(len(plan.tasks))
    notes, lines, sources = clean.Notes(), Counter[str](), []
    read = load_notes(work, "read", list(ranks))
    for i, source in enumerate(plan.sources):
        mine = [rank for rank in ranks if plan.tasks[rank].source == i]
        role = "train" if i < plan.num_train else "validation"
        sources.append(_source_figures(work, source, role, plan.stores[i], mine, [read[rank] for rank in mine]))
    for found in read:
        notes.merge(found["notes"])
        lines.update(dict(found["lines"]))
    steps = ["duplicates", *(["contamination"] if plan.has_reference else [])]
    later = [note for step in steps for note in load_notes(work, step, [0])]
    for found in [*later, *load_notes(work, "tokenise", list(ranks))]:
        notes.merge(found["notes"])
    return {
        "corpus": str(plan.output),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "flow": _flow(work, plan, sources),
        "sources": sources,
        "reasons": _reasons(notes, sources),
        "boilerplate": later[-1].get("boilerplate", []) if later else [],
        "scripts": _scripts(work, plan),
        "seconds": stages.seconds(work),
        "lines": [[line, count] for line, count in lines.most_common(COMMONEST) if count > 1],
        "stores": {},
    }


def _source_figures(
    work: str, source: Any, role: str, store: str, ranks: list[int], read: list[dict[str, Any]]
) -> dict[str, Any]:
    lengths = np.concatenate([load_array(work, "lengths", r) for r in ranks] or [np.empty(0, np.int64)])
    own = clean.Notes()
    for found in read:
        own.merge(found["notes"])
    edges = np.geomspace(1, max(2, lengths.max(initial=2)), 41)
    return {
        "name": describe(source),
        "role": role,
        "store": store,
        "rows": len(lengths) + own.count("bad") + own.count("dropped"),
        "bad_rows": own.count("bad"),
        "documents": len(lengths),
        "bytes": int(lengths.sum()),
        "characters": sum(found["characters"] for found in read),
        "quantiles": {str(q): float(np.quantile(lengths, q)) for q in QUANTILES} if len(lengths) else {},
        "longest": int(lengths.max(initial=0)),
        "histogram": [edges.tolist(), np.histogram(lengths, edges)[0].tolist()],
    }


def _flow(work: str, plan: Plan, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents and bytes of the training data after each step."""
    train = [s for s in sources if s["role"] == "train"]
    flow = [{"step": "rows", "documents": sum(s["rows"] for s in train), "bytes": None}]
    flow.append(
        {"step": "clean", "documents": sum(s["documents"] for s in train), "bytes": sum(s["bytes"] for s in train)}
    )
    totals: dict[str, NDArray[np.int64]] = {}
    for rank in plan.train_tasks:
        lengths, fates = load_array(work, "lengths", rank), final_fates(work, plan, rank)
        for k, fate in enumerate(FATES):
            here = fates == k
            totals[fate] = totals.get(fate, np.zeros(2, np.int64)) + np.array([here.sum(), lengths[here].sum()])
    left = np.array([flow[-1]["documents"], flow[-1]["bytes"]], np.int64)
    after = {"exact-duplicate": "exact duplicates out", "near-duplicate": "near duplicates out"}
    after |= {FATES[HELD_OUT]: f"held out ({HELD_OUT_SHARD})", "contaminated": "contaminated out"}
    for fate, step in after.items():
        if fate in totals and totals[fate][0]:
            left = left - totals[fate]
            flow.append({"step": step, "documents": int(left[0]), "bytes": int(left[1])})
    return flow


def _reasons(notes: clean.Notes, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every reason with its count, share of all rows, and examples; the most frequent first."""
    rows = max(1, sum(s["rows"] for s in sources))
    order = {"bad": 0, "dropped": 1, "changed": 2, "seen": 3}
    found = [
        {
            "fate": fate,
            "reason": reason,
            "count": entry["count"],
            "share": entry["count"] / rows,
            "bytes": entry["bytes"] if fate != "bad" else None,  # a row that was not read has no known size
            "examples": [{"where": where, "text": text, "note": note} for _, where, text, note in entry["examples"]],
        }
        for (fate, reason), entry in notes.found.items()
    ]
    return sorted(found, key=lambda r: (order[r["fate"]], -r["count"]))


def _scripts(work: str, plan: Plan) -> dict[str, float]:
    """Shares of the characters by script, the commonest first."""
    totals: Counter[str] = Counter()
    for rank in range(len(plan.tasks)):
        for point, count in load_array(work, "code_points", rank).T.tolist():
            totals[_script(chr(point))] += count
    every = max(1, sum(totals.values()))
    return {name: count / every for name, count in totals.most_common()}


def _script(char: str) -> str:
    """Latin, Cyrillic, Cjk, ...; digits, marks and white space of all scripts are a kind each."""
    category = unicodedata.category(char)
    if char.isspace() or category.startswith("Z"):
        return "white space"
    if category.startswith("N"):
        return "digits"
    if category[0] in "PS":
        return "punctuation and symbols"
    if category[0] == "C":
        return "control and unassigned"
    return unicodedata.name(char, "unnamed").split()[0].split("-")[0].capitalize()


def _write_result(output: Path, figures: dict[str, Any]) -> None:
    shards = {
        name: {"loss": None, "bits_per_byte": None, "entropy": None, **store}
        for name, store in figures["stores"].items()
    }
    metrics = {f"{r['fate']}: {r['reason']}": r["count"] for r in figures["reasons"]}
    started = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["started_s"]
    tokens = sum(store["tokens"] for store in figures["stores"].values())
    cpu = sum(spent["cpu_s"] for spent in figures["seconds"].values())
    result = Result("data", "ok", "", None, time.time() - started, cpu, tokens, shards, metrics)
    write_json(output / "result.json", dataclasses.asdict(result))
