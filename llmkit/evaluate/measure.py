"""One column: the model loaded once, asked all that is not answered yet, every answer kept.

Owns columns/NAME of an evaluation: results.json, samples/TASK.jsonl, prompts/TASK.txt.   measure(job, column)

A result is kept under a key of all that decides it: the model's bytes, the task's definition, how it was asked. Leaves
out what the figures mean beside another column's (comparison.py).
"""

import dataclasses
import hashlib
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..config import UserError
from ..data.sources import describe, documents
from ..run import write_json, write_text
from . import harness, task_index
from .columns import Column
from .regression import answer_prompts
from .texts import score_texts


def column_dir(folder: Path, name: str) -> Path:
    return folder / "columns" / name


def read_results(folder: Path, name: str) -> dict[str, Any]:
    """What is kept of a column; empty where there is nothing. Raises UserError for a file that is not ours."""
    path = column_dir(folder, name) / "results.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and it is measured again") from None


def check_owner(folder: Path, column: Column) -> None:
    """Raises UserError when the folder holds another model's results under this name."""
    found = read_results(folder, column.name)
    if found and found.get("fingerprint") != column.fingerprint:
        place = column_dir(folder, column.name)
        raise UserError(
            f"{place}: holds results of another model (fingerprint {str(found.get('fingerprint'))[:12]}, "
            f"{column.model_dir} has {column.fingerprint[:12]}); remove that folder, or choose another --output_dir"
        )


def measure(job: Any, column: Column) -> dict[str, Any]:
    """All tasks and texts of a column; loads the model only where something is missing. Raises UserError."""
    place = column_dir(job.folder, column.name)
    results = read_results(job.folder, column.name) or {"fingerprint": column.fingerprint, "units": {}, "shards": {}}
    loaded = {unit: task_index.load(job.manager, [unit]) for unit in job.units}
    keys = {unit: unit_key(job, column, loaded[unit]) for unit in job.units}
    units = [unit for unit in job.units if results["units"].get(unit, {}).get("key") != keys[unit]]
    texts = {name: _texts(job, name) for name in job.shards}
    shard_keys = {
        name: _hash([job.window, column.fingerprint, job.config.dtype, *rows[0]]) for name, rows in texts.items()
    }
    shards = [name for name in texts if results["shards"].get(name, {}).get("key") != shard_keys[name]]
    prompts_key = _hash([column.fingerprint, job.asking.hashes.get(column.name), job.config.dtype, job.prompts])
    needs_replies = bool(job.prompts) and results.get("regression", {}).get("key") != prompts_key
    if not units and not shards and not needs_replies:
        job.console.print(f"{column.name:<12} all there already", markup=False)
        return results
    model = job.load(column)
    results["model"] = facts(model, column, job)
    journal = harness.Journal(place / "journal.jsonl")
    lm = harness.make_lm(
        column.name, model, job.tokenizers[column.name], job.config.batch_size, job.config.max_length, journal,
        _hash([column.fingerprint, job.asking.hashes.get(column.name), job.config.dtype]),
    )  # fmt: skip
    if units:
        found = _ask(job, column, lm, {unit: loaded[unit] for unit in units})
        for unit in units:
            results["units"][unit] = {"key": keys[unit], **found[unit]}
        write_json(place / "results.json", results)
    for name in shards:
        results["shards"][name] = {"key": shard_keys[name], **_score_shard(job, column, model, name, *texts[name])}
        write_json(place / "results.json", results)
    if needs_replies:
        replies = answer_prompts(model, job.tokenizers[column.name], job.prompts)
        kept = {name: dataclasses.asdict(reply) for name, reply in replies.items()}
        results["regression"] = {"key": prompts_key, "replies": kept}
        write_json(place / "results.json", results)
    journal.close()
    return results


def facts(model: Any, column: Column, job: Any) -> dict[str, Any]:
    return {
        "num_parameters": model.num_parameters(),  # counts what is packed in 4 bit
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(job.device),
        "num_bytes": column.num_bytes,
    }


def unit_key(job: Any, column: Column, loaded: dict[str, Any]) -> str:
    """Of all that decides the results of a task or group."""
    config = job.config
    definitions = {name: _definition(task, config.num_fewshot) for name, task in sorted(loaded["tasks"].items())}
    how = [config.num_fewshot, config.limit, config.gen_kwargs, config.system_instruction, config.max_length]
    is_chat = {job.asking.is_chat(task.OUTPUT_TYPE) for task in loaded["tasks"].values()}
    template = job.asking.hashes.get(column.name) if True in is_chat else None
    return _hash([column.fingerprint, definitions, how, template, config.dtype, config.batch_size])


def _definition(task: Any, num_fewshot: int | None) -> list[str]:
    """Of a task: its settings, the rows it scores and those it shows; nothing that is another one in every process."""
    shown = {key: value for key, value in task.config.to_dict().items() if not callable(value)}
    shown["metadata"] = {k: v for k, v in (shown.get("metadata") or {}).items() if k != "config_source"}  # a path
    settings = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(shown.items(), key=str)))  # functions inside lists
    examples = list(task.fewshot_docs()) if task.config.num_fewshot or num_fewshot else []
    return [settings, _hash(list(task.eval_docs)), _hash(examples)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _ask(job: Any, column: Column, lm: Any, loaded: dict[str, Any]) -> dict[str, Any]:
    """Results by unit: one pass of lm-eval over all tasks that are asked plainly, one over all chats."""
    tasks = {name: task for parts in loaded.values() for name, task in parts["tasks"].items()}
    is_chat = {name: job.asking.is_chat(task.OUTPUT_TYPE) for name, task in tasks.items()}
    results: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for way in (False, True):
        chosen = {name: task for name, task in tasks.items() if is_chat[name] == way}
        if chosen:
            found = _pass(job, column, lm, chosen, way)
            figures |= found["results"]
            for name, task in chosen.items():
                results[name] = _task_result(task, found, name) | {
                    "is_chat": way,
                    "num_cut": lm.num_cut[name],
                    "wall_s": round(lm.seconds.get(name, 0.0), 3),
                }
    out = {}
    for unit, parts in loaded.items():
        groups = {name: group for name, group in (parts.get("groups") or {}).items() if group.has_aggregation}
        out[unit] = {
            "tasks": {name: results[name] for name in parts["tasks"]},
            "groups": {name: _group_result(group, figures) for name, group in groups.items()},
        }
    return out


def _pass(job: Any, column: Column, lm: Any, tasks: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    """lm-eval's results, samples kept."""
    config = job.config
    end = job.asking.ends.get(column.name, "") if is_chat else ""
    harness.prepare_tasks(tasks, lm, config.num_fewshot, config.gen_kwargs, end)
    lm.num_cut, lm.seconds = Counter(), {}
    with job.progress(column.name) as lm.tell:
        found = harness.run(
            lm, {"tasks": tasks}, is_chat, config.limit, config.system_instruction, config.allow_code_execution
        )
    for name, samples in found["samples"].items():
        _keep_samples(column_dir(job.folder, column.name), name, samples, lm)
    return found


def _scores(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc,none": {"value", "stderr"}} of lm-eval's flat figures."""
    found = {}
    for key, value in results.items():
        metric, comma, way = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float, np.number)):
            stderr = results.get(f"{metric}_stderr,{way}")
            is_known = isinstance(stderr, (int, float, np.number)) and not np.isnan(stderr)
            found[key] = {"value": float(value), "stderr": float(stderr) if is_known else None}  # type: ignore[arg-type]
    return found


def _task_result(task: Any, found: dict[str, Any], name: str) -> dict[str, Any]:
    ups = found["higher_is_better"].get(name) or {}
    generation = task.config.generation_kwargs or {}
    return {
        "scores": _scores(found["results"][name]),
        "kind": {"generate_until": "generate", "multiple_choice": "choice"}.get(task.OUTPUT_TYPE, "loglikelihood"),
        "higher_is_better": {metric: bool(up) for metric, up in ups.items() if up is not None},
        "means": sorted(metric for metric, fn in task.aggregation().items() if fn.__name__ == "mean"),
        "num_items": len({sample["doc_id"] for sample in found["samples"][name]}),
        "num_fewshot": task.config.num_fewshot,
        "stops": list(generation.get("until") or []) if task.OUTPUT_TYPE == "generate_until" else [],
        "data": task_index.describe_data(task),
    }


def _group_result(group: Any, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "scores": _scores(group.aggregate(figures)),
        "tasks": [task.task_name for task in group.get_all_tasks()],
        "by_size": all(metric.weight_by_size for metric in group.aggregate_metric_list),
    }


def _keep_samples(place: Path, name: str, samples: list[dict[str, Any]], lm: Any) -> None:
    """A line per item and filter; the first prompt as text and as the ids that the model gets."""
    (place / "samples").mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps(sample, default=_plain, ensure_ascii=False) + "\n" for sample in samples)
    write_text(place / "samples" / f"{name}.jsonl", rows)
    first = samples[0]["arguments"][0]
    text = str(first[0])
    (place / "prompts").mkdir(exist_ok=True)
    write_text(place / "prompts" / f"{name}.txt", text)
    write_json(
        place / "prompts" / f"{name}.json",
        {"text": text, "ids": lm.tok_encode(text), "then": first[1] if len(first) > 1 else None},
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def read_samples(folder: Path, column: str, task: str) -> list[dict[str, Any]]:
    path = column_dir(folder, column) / "samples" / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- raw text


def _texts(job: Any, name: str) -> tuple[list[str], float | None]:
    """The documents of a shard, and their true log-probability where it is known."""
    source, data_dir = job.shards[name]
    found = list(documents(source, data_dir))
    known = [doc.log_prob for doc in found]
    return [doc.text for doc in found], None if None in known else -sum(known)  # type: ignore[arg-type]


def _score_shard(
    job: Any, column: Column, model: Any, name: str, texts: list[str], entropy_nats: float | None
) -> dict[str, Any]:
    started = time.perf_counter()
    with job.progress(f"{column.name} {name}") as tell:
        scores = score_texts(model, job.tokenizers[column.name], texts, job.window, job.config.batch_size, tell)
    place = column_dir(job.folder, column.name) / "samples"
    place.mkdir(parents=True, exist_ok=True)
    arrays = zip(scores.nats, scores.eos_nats, scores.num_tokens, scores.num_bytes, strict=True)
    write_text(
        place / f"shard.{name}.jsonl",
        "".join(
            json.dumps({"doc_id": i, "nats": a, "eos_nats": e, "num_tokens": int(t), "num_bytes": int(b)}) + "\n"
            for i, (a, e, t, b) in enumerate(arrays)
        ),
    )
    num_tokens = int(scores.num_tokens.sum()) + len(texts)
    return {
        "loss": scores.loss,
        "stderr": scores.stderr,
        "bits_per_byte": scores.bits_per_byte,
        "num_documents": len(texts),
        "num_tokens": num_tokens,
        "num_bytes": int(scores.num_bytes.sum()),
        "entropy": None if entropy_nats is None else entropy_nats / num_tokens,
        "window": job.window,
        "data": describe(job.shards[name][0]),
        "wall_s": round(time.perf_counter() - started, 3),
    }
