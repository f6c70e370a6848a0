"""Run folders as they are, whole or broken: every JSON file that a stage leaves, read without trusting it.

    folders, corpora, evals = find(["runs/toy"]);  stages = in_order([read_stage(folder) for folder in folders])

Owns which folders are meant by a word, what is taken from their files, and who came from whom. A file that is missing
or no JSON is a problem of that stage, never an error; a field of another type counts as missing. Leaves out what was
evaluated (evals.py) and the curves (curves.py).
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from ..config import UserError, read_recipe
from .curves import LARGEST, read_curves
from .quantized import FIGURES, MEASURED

Facts = dict[str, Any]
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
BOOKS = {"steps", "num_parameters", "train_wall_s", "train_cpu_s", "num_skipped_steps", "num_alerts", "num_bad_rows"}
SHOWN_ALERTS = 5  # of a kind
SHOWN_SAMPLES = 4


def number(value: Any) -> float | int | None:
    """A number that can be reckoned with, else None."""
    return value if type(value) in (int, float) and abs(value) < LARGEST else None


def string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def mapping(value: Any) -> Facts:
    return {str(key): entry for key, entry in value.items()} if isinstance(value, dict) else {}


def rows_of(value: Any) -> list[Facts]:
    """The mappings of a list."""
    return [mapping(row) for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def strings(value: Any) -> dict[str, str]:
    return {key: entry for key, entry in mapping(value).items() if isinstance(entry, str)}


def read_json(path: Path) -> tuple[Facts, str | None]:
    """The mapping of a file, and what is wrong with it: missing, or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except (OSError, ValueError, RecursionError):
        return {}, f"{path.name} cannot be read: it is no JSON"
    return (mapping(found), None) if isinstance(found, dict) else ({}, f"{path.name} holds no JSON object")


# which folders


def kind_of(folder: Path) -> str | None:
    """eval, corpus or run; None for any other folder."""
    if (folder / "comparison.json").is_file():
        return "eval"
    manifest, _ = read_json(folder / "manifest.json")
    result, problem = read_json(folder / "result.json")
    stage = manifest.get("stage") or result.get("stage")
    if stage == "data":
        return "corpus"
    if stage == "eval":  # still running: comparison.json comes last
        return "eval"
    return "run" if stage or (folder / "metrics.jsonl").is_file() or problem != "result.json is missing" else None


def find(words: list[str]) -> tuple[list[Path], list[Path], list[Path]]:
    """Run, corpus and eval folders behind the words, each once; a folder of folders stands for those in it.

    Of those, runs of --overfit are left out, which test the pipeline, and exports, which are a stage once more.

    Raises UserError for a word that is no folder, or holds nothing to report.
    """
    found: dict[str, dict[Path, Path]] = {"run": {}, "corpus": {}, "eval": {}}
    for word in words:
        folder = Path(word).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "no such folder"
            raise UserError(f"runs: {word!r}: {what}; name run folders, eval folders, or a folder of them: runs/toy")
        kind = kind_of(folder)
        inside = [] if kind else sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
        those = [(folder, kind)] if kind else [(path, kind) for path in inside if (kind := kind_of(path))]
        those = [(path, of) for path, of in those if path == folder or not _is_no_stage(path)] or those
        if not those:
            held = ", ".join(path.name for path in inside[:5]) or "no folder"
            raise UserError(
                f"runs: {word!r}: neither a run (result.json) nor an evaluation (comparison.json), and none is in it "
                f"(it holds {held}); name the folder of a run, or one that holds runs"
            )
        for path, kind in those:
            found[str(kind)].setdefault(path.resolve(), path)
    return tuple(list(group.values()) for group in found.values())  # type: ignore[return-value]


def _is_no_stage(folder: Path) -> bool:
    manifest, _ = read_json(folder / "manifest.json")
    return number(manifest.get("overfit")) is not None or manifest.get("stage") == "export"


# one stage


def read_stage(folder: Path) -> Facts:
    """All that the page says of a run; `problems` says what of it could not be read."""
    result, no_result = read_json(folder / "result.json")
    manifest, no_manifest = read_json(folder / "manifest.json")
    curves = read_curves(folder / "metrics.jsonl")
    metrics = {key: value for key, value in mapping(result.get("metrics")).items() if number(value) is not None}
    status = string(result.get("status"))
    if no_result:
        status = "unfinished" if no_result.endswith("missing") else "broken"
    tokens, wall_s = number(result.get("tokens")), number(result.get("wall_s"))
    busy_s = number(metrics.get("train_wall_s")) or wall_s
    steps = number(metrics.get("steps")) or curves["last_step"]
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "stage": string(result.get("stage")) or string(manifest.get("stage")) or "run",
        "status": status or "broken",
        "problems": [text for text in (no_result, no_manifest) if text]
        + [text for text in curves.pop("problems") if tokens or status != "ok" or not text.endswith("is missing")],
        "parent": string(manifest.get("parent")) or string(result.get("parent")),
        "parent_name": None,
        "tokens": tokens,
        "steps": steps,
        "wall_s": wall_s,
        "tokens_per_second": tokens / busy_s if tokens and busy_s else None,
        **_origin(manifest),
        "num_parameters": number(metrics.get("num_parameters")),
        "num_bytes": _num_bytes(folder),
        "shards": {shard: _shard(facts) for shard, facts in mapping(result.get("shards")).items()},
        "metrics": {key: value for key, value in metrics.items() if key not in BOOKS},
        "quantized": read_quantized(manifest, result),
        "alerts": read_alerts(folder / "alerts.jsonl"),
        "samples": read_samples(folder / "samples.jsonl"),
        "check": _read_check(folder / "check.json"),
        "curves": curves,
        "contamination": _contamination(folder / "recipe.yaml"),
    }


def _command(manifest: Facts) -> list[str]:
    words = manifest.get("command")
    words = [str(word) for word in words] if isinstance(words, list) else []
    return ["python", "-m", "llmkit", *words[1:]] if words and words[0] == "__main__.py" else words


def command_line(manifest: Facts) -> str | None:
    return shlex.join(_command(manifest)) or None


def _origin(manifest: Facts) -> Facts:
    """Who made it, where, with what: the manifest's facts."""
    command = _command(manifest)
    data = manifest.get("datasets")  # a list of stores (pretraining), or shard -> facts (tuning)
    named = rows_of(data) or [{"source": key, **mapping(facts)} for key, facts in mapping(data).items()]
    hashes = {str(row.get("source")): string(row.get("fingerprint")) or string(row.get("sha256")) for row in named}
    return {
        "command": command_line(manifest),
        "recipe": next((word for word in command if word.endswith((".yaml", ".yml"))), None),
        "num_earlier_starts": len(rows_of(manifest.get("earlier"))),
        "started": string(manifest.get("started")),
        "engine": string(manifest.get("engine")),
        "num_processes": number(manifest.get("num_processes")),
        "hardware": string(manifest.get("hardware")),
        "git_commit": string(manifest.get("git_commit")),
        "seed": number(manifest.get("seed")),
        "overfit": number(manifest.get("overfit")),  # rows that were learnt by heart, for a test
        "versions": strings(manifest.get("versions")),
        "fingerprints": {
            "tokenizer": string(manifest.get("tokenizer")),
            "chat template": string(manifest.get("chat_template")),
            "model": None,  # an evaluation knows it
            **{f"data: {source}": found for source, found in hashes.items() if found},
        },
    }


def _shard(facts: Any) -> Facts:
    return {key: number(mapping(facts).get(key)) for key in ("loss", "bits_per_byte", "entropy", "gap_stderr")}


def read_quantized(manifest: Facts, result: Facts) -> Facts | None:
    """What a run of `llmkit quantize` measured against its original; None for any other run."""
    if "quantize" not in (result.get("stage"), manifest.get("stage")):
        return None
    metrics = {key: number(value) for key, value in mapping(result.get("metrics")).items()}
    keys = {f"{prefix}{key}" for key in MEASURED for prefix in ("", "original_")}
    tasks = {}
    for key, after in metrics.items():
        before = metrics.get(f"original_{key}")
        if key not in keys and before is not None and after is not None:
            tasks[key] = (before, after)
    left: dict[str, dict[str, int]] = {}  # reason -> layer, the same of every block told once -> how many
    for layer, reason in strings(manifest.get("left_layers")).items():
        short = ".".join("*" if part.isdigit() else part for part in layer.split("."))
        names = left.setdefault(reason, {})
        names[short] = names.get(short, 0) + 1
    shards = {shard: mapping(facts) for shard, facts in mapping(result.get("shards")).items()}
    return {
        "method": string(manifest.get("quantization")),
        "limit": metrics.get("max_perplexity_ratio"),
        "shards": {shard: {key: number(facts.get(key)) for key in FIGURES} for shard, facts in shards.items()},
        "measured": {key: metrics.get(key) for key in sorted(keys)},
        "tasks": tasks,
        "left": left,
    }


def _num_bytes(folder: Path) -> int | None:
    """Of the weights in model/, else of the adapter."""
    for part in (folder / "model", folder / "adapter", folder):
        try:
            sizes = [path.stat().st_size for path in part.iterdir() if path.suffix in WEIGHTS]
        except OSError:
            continue
        if sizes:
            return sum(sizes)
    return None


def read_alerts(path: Path) -> Facts:
    """`kinds`: each with its count, the step of the first and a few messages; `bad_lines`: no JSON."""
    kinds: dict[str, Facts] = {}
    bad = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in filter(str.strip, lines):
        try:
            alert = mapping(json.loads(line))
        except (ValueError, RecursionError):
            bad += 1
            continue
        kind = string(alert.get("kind")) or "alert"
        seen = kinds.setdefault(kind, {"kind": kind, "count": 0, "first_step": number(alert.get("step")), "said": []})
        seen["count"] += 1
        if len(seen["said"]) < SHOWN_ALERTS:
            step = number(alert.get("step"))
            said = {key: string(alert.get(key)) or "" for key in ("message", "example")}
            seen["said"].append({"step": step, **said})
    return {"count": sum(kind["count"] for kind in kinds.values()), "kinds": list(kinds.values()), "bad_lines": bad}


def read_samples(path: Path) -> list[Facts]:
    """Of every question that a run on preferences kept asking: the first and the last answer, and the good one."""
    found: dict[str, Facts] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            row = mapping(json.loads(line))
        except (ValueError, RecursionError):
            continue
        question, given = string(row.get("question")), row.get("given")
        if question is None or not isinstance(given, str):
            continue
        told = found.setdefault(
            question, {"question": question, "first": given, "good": string(row.get("chosen")) or ""}
        )
        told |= {"last": given, "last_step": number(row.get("step"))}
    return list(found.values())[:SHOWN_SAMPLES]


def _read_check(path: Path) -> Facts | None:
    """Counts by status, and what failed, warned or did not run; None where nothing was checked."""
    report, problem = read_json(path)
    if problem:
        return None
    checks = rows_of(report.get("checks"))
    found = [c for status in ("fail", "not_run", "warn") for c in checks if c.get("status") == status]
    keys = ("id", "status", "title", "measured", "limit", "fix")
    counts = {status: sum(c.get("status") == status for c in checks) for status in ("pass", "warn", "fail", "not_run")}
    return {"counts": counts, "found": [{key: string(c.get(key)) or "" for key in keys} for c in found]}


def _contamination(recipe: Path) -> list[Facts]:
    """Of every data set of the recipe: the corpus report that says what was held against it, None without one."""
    try:
        values = read_recipe(recipe)
    except UserError:
        return []
    found = []
    for row in rows_of(values.get("datasets")):
        path = string(row.get("path")) or "?"
        files = row.get("data_files")
        label = f"{path} {files}" if files else path
        at = next((f for f in (Path(path), Path(path).parent) if (f / "report.json").is_file()), None)
        found.append({"source": label, "corpus": str(at) if at else None, "path": path})
    return found


def read_corpus(folder: Path) -> Facts:
    """What `llmkit data` dropped from a corpus because evaluation text was in it."""
    report, problem = read_json(folder / "report.json")
    reasons = [r for r in rows_of(report.get("reasons")) if "contaminat" in str(r.get("reason"))]
    recipe: Facts = {}
    try:
        recipe = read_recipe(folder / "recipe.yaml")
    except UserError:
        problem = problem or "recipe.yaml cannot be read"
    given = rows_of(recipe.get("benchmark_datasets"))
    boilerplate = report.get("boilerplate")
    return {
        "folder": str(folder),
        "problem": problem,
        "is_decontaminated": recipe.get("decontaminate") if isinstance(recipe.get("decontaminate"), bool) else None,
        "benchmarks": [" ".join(str(row[k]) for k in ("path", "name", "data_files") if row.get(k)) for row in given],
        "shards": sorted(
            {str(s.get("store")) for s in rows_of(report.get("sources")) if s.get("role") == "validation"}
        ),
        "num_dropped": sum(int(number(r.get("count")) or 0) for r in reasons if r.get("fate") == "dropped"),
        "num_boilerplate": len(boilerplate) if isinstance(boilerplate, list) else 0,
    }


# who came from whom


def named(called: str | None, folders: list[str], beside: str | None = None) -> str | None:
    """The folder that `called` means, a path as somebody typed it, maybe of its model/; None: none of them.

    Where that path is gone, since the runs were moved, the only folder of that name is meant; it has to lie beside
    the folder that calls it so, if that is given.
    """
    if not called:
        return None
    ends = [Path(called), Path(called).parent] if Path(called).name in ("model", "adapter") else [Path(called)]
    real = {folder: Path(folder).resolve() for folder in folders}
    meant = {end.resolve() for end in ends}
    if found := [folder for folder in folders if real[folder] in meant]:
        return found[0]
    same = [folder for folder in folders if real[folder].name == ends[-1].name]
    is_beside = len(same) == 1 and (beside is None or real[same[0]].parent == Path(beside).resolve().parent)
    return same[0] if is_beside and not ends[-1].exists() else None


def in_order(stages: list[Facts]) -> list[Facts]:
    """Parents before their children; names made unique, `parent_name` filled in where the parent is among them."""
    folders = [stage["folder"] for stage in stages]
    for depth in (1, 2, None):  # the shortest end of the path that no other has
        for stage in stages:
            parts = Path(stage["folder"]).resolve().parts
            stage["name"] = "/".join(parts[-depth:]) if depth else str(Path(*parts))
        if len({stage["name"] for stage in stages}) == len(stages):
            break
    names = {stage["folder"]: stage["name"] for stage in stages}
    for stage in stages:
        parent = named(stage["parent"], folders, beside=stage["folder"])
        stage["parent_name"] = names[parent] if parent and parent != stage["folder"] else None
    done: list[Facts] = []

    def add(parent: str | None) -> None:
        for stage in stages:
            if stage["parent_name"] == parent and stage not in done:
                done.append(stage)
                add(stage["name"])

    add(None)
    for stage in stages:  # two runs that name each other: a broken lineage ends no report
        if stage not in done:
            stage["parent_name"] = None
            done.append(stage)
            add(stage["name"])
    return done


def bare(hardware: str | None) -> str | None:
    """Without the peak, which is measured anew by every run."""
    return re.sub(r",\s*[\d.]+ TFLOP/s peak$", "", hardware) if hardware else None


def peak(hardware: str | None) -> float | None:
    found = re.search(r"([\d.]+) TFLOP/s peak$", hardware or "")
    return float(found[1]) if found else None
