"""What is known of a model that is published, read from its folder, its run and the runs before it.

    facts = gather("ann/toy-sft", folder, "model", run, parent, ("apache-2.0", "given"), config)

Owns which evaluation speaks of these very weights, and that no path of this machine gets into the card.
Leaves out the words (card.py).
"""

import dataclasses
import json
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

from .. import tuning, verbs
from ..config import UserError, read_recipe
from ..evaluate.columns import fingerprint
from ..report.evals import read_eval
from ..report.runs import Facts, mapping, number, read_corpus, read_json, read_stage, rows_of, string, strings
from ..run import resolve_model_dir
from .files import HUB_ID, find_private, is_local
from .licence import Parent, ancestors

LOADERS = ("json", "text", "csv", "parquet", "arrow")  # of `datasets`: names of formats, not of data sets
# not facts about the model: where it was written, where it was sent
NOT_TOLD = ("output_dir", "store_dir", "data_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "license")


@dataclasses.dataclass
class Known:
    """Of one model; `stages`: its run, then those before it. None and empty: not known."""

    repo_id: str
    kind: str  # model, adapter, gguf
    license: str
    license_name: str | None
    license_link: str | None
    base_model: str | None
    relation: str | None  # to base_model, in the Hub's words
    language: list[str]
    config: Facts  # of an adapter that of its base, where it lies here
    num_parameters: int | None
    num_bytes: int
    has_tokenizer: bool
    has_chat_template: bool
    is_reward: bool
    rank: int  # of an adapter
    base_quantization: Facts  # that an adapter was trained on
    files: list[str]  # of the repository, without the card
    began: str | None  # what the first of all stages began with; None: new weights
    stages: list[Facts]
    recipes: list[Facts]  # of each stage, what differs from the defaults
    datasets: list[str]  # Hub ids
    corpora: dict[str, Facts]
    evaluation: Facts | None
    column: str | None
    no_evaluation: str  # why there is none
    variants: list[tuple[str, str]]  # folder of the repository, kind


def portable(text: str) -> str:
    """Absolute paths shortened to their last part; addresses of the net stay."""
    return re.sub(
        r"(?:\bfile://|(?<![\w/.])(?:~[\w.-]*)?)(?:/[^\s/'\",:;()\]}]+){2,}/?",
        lambda m: "…/" + m[0].rstrip("/").split("/")[-1],
        text,
    )


def _recipe(run: Path, stage: str) -> Facts:
    """Settings of a run that are not the defaults of its verb; all of them where the verb is not known."""
    try:
        values = read_recipe(run / "recipe.yaml")
    except UserError:
        return {}
    cls: Any = next((c for p in (verbs, tuning) for n, c in vars(p).items() if n.lower() == f"{stage}config"), None)
    defaults = vars(cls()) if cls else {}
    told = {k: v for k, v in values.items() if k not in NOT_TOLD and (k not in defaults or v != defaults[k])}
    return json.loads(portable(json.dumps(told, ensure_ascii=False, default=str)))


def _parameters(folder: Path) -> int | None:
    """Numbers stored in the safetensors of a folder, by their headers; None for quantised ones: packed."""
    if "quantization_config" in read_json(folder / "config.json")[0]:
        return None
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None


def _config(folder: Path, kind: str) -> Facts:
    if kind == "adapter":
        folder = Path(
            resolve_model_dir(str(read_json(folder / "adapter_config.json")[0].get("base_model_name_or_path")))
        )
    return read_json(folder / "config.json")[0]


def _evaluation(folder: Path, run: Path | None, eval_dir: str | None) -> tuple[Facts | None, str | None, str]:
    """The evaluation and its column of these very bytes; else why there is none. Raises UserError."""
    place = Path(eval_dir) if eval_dir else run.parent / "eval" if run else None
    if eval_dir and not (Path(eval_dir) / "comparison.json").is_file():
        raise UserError(f"eval_dir={eval_dir!r}: holds no comparison.json; name the output_dir of `llmkit eval`")
    if place is None or not (place / "comparison.json").is_file():
        return None, None, "no evaluation was found beside the run"
    found = read_eval(place)
    if found["problem"]:
        return None, None, f"the evaluation could not be read ({found['problem']})"
    own = fingerprint(folder)
    if column := next((c["name"] for c in found["columns"] if c["fingerprint"] == own), None):
        return found, column, ""
    same = [c["name"] for c in found["columns"] if run and c["run"] and Path(c["run"]).resolve() == run.resolve()]
    if same:
        return (
            None,
            None,
            f"the one that was found is of other weights of {same[0]!r}: run `llmkit eval` again",
        )
    return None, None, "the one that was found does not hold this model"


def _hub_datasets(recipes: list[Facts]) -> list[str]:
    rows = [row for recipe in recipes for row in rows_of(recipe.get("datasets"))]
    paths = [str(row.get("path")) for row in rows if row.get("path") not in LOADERS]
    ids = [p for p in paths if HUB_ID.fullmatch(p) and not p.startswith("builtin/") and not is_local(p)]
    return list(dict.fromkeys(ids))


def languages(given: str | list | None, stages: list[Facts]) -> list[str]:
    """As given; English where all text came from our own toy world; else unknown. Raises UserError for no code."""
    codes = [given] if isinstance(given, str) else list(given or [])
    for code in codes:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", str(code)):
            raise UserError(f"language={code!r}; allowed: codes of ISO 639, e.g. en or [en, de]; code; multilingual")
    sources = [str(data["path"]) for stage in stages for data in stage["contamination"]]
    return codes or (["en"] if sources and all(s == "builtin/toyworld" for s in sources) else [])


def _relation(kind: str, config: Facts, run_stage: str | None, is_direct: bool) -> str | None:
    """None for the very weights of the parent in another format: the Hub has no word for that."""
    if kind == "adapter":
        return "adapter"
    if not is_direct:
        return "finetune"  # of a stage between the two that is not on the Hub
    if kind == "gguf" or "quantization_config" in config:
        return "quantized"
    return None if run_stage == "export" else "finetune"


def _stages(runs: list[Path]) -> list[Facts]:
    """What is read of them, with every text made fit to leave this machine."""
    found = []
    for run in runs:
        stage = read_stage(run)
        for key in ("curves", "samples"):  # long, and quoted nowhere
            stage.pop(key)
        raw = read_json(run / "manifest.json")[0]
        data = raw.get("datasets")
        named = rows_of(data) or [{"source": k, **v} for k, v in mapping(data).items() if k != "bad_rows"]
        keys = ("num_documents", "rows", "num_tokens", "tokens", "trained_tokens", "num_bytes")
        stage["data"] = [
            {
                "source": string(row.get("source")) or "?",
                "fingerprint": string(row.get("fingerprint")) or string(row.get("sha256")),
                **{key: number(row.get(key)) for key in keys},
            }
            for row in map(mapping, named)
        ]
        stage["seeds"] = {key: number(raw.get(key)) for key in ("seed", "data_seed")}
        stage["versions"] = strings(raw.get("versions"))
        corpora = [data["corpus"] for data in stage["contamination"]]
        stage = json.loads(portable(json.dumps(stage, ensure_ascii=False, default=str)))
        for data, corpus in zip(stage["contamination"], corpora, strict=True):
            data["corpus"] = corpus  # a key, never shown as it is
        found.append(stage)
    return found


def gather(
    repo_id: str,
    folder: Path,
    kind: str,
    runs: list[Path],
    parent: Parent,
    license: str,
    config: verbs.PushConfig,
    variants: list[tuple[str, str]],
    files: list[str],
) -> Known:
    """Reads everything; hashes the weights where there is an evaluation. `runs`: its own first. Raises UserError."""
    stages = _stages(runs)
    recipes = [_recipe(run, stage["stage"]) for run, stage in zip(runs, stages, strict=True)]
    stored = _config(folder, kind)
    evaluation, column, no_evaluation = _evaluation(folder, runs[0] if runs else None, config.eval_dir)
    wanted = {data["corpus"] for stage in stages for data in stage["contamination"] if data["corpus"]}
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")]
    tokenizer, _ = read_json(folder / "tokenizer_config.json")
    adapter, _ = read_json(folder / "adapter_config.json")
    how, _ = read_json(folder / "base_quantization.json")
    began = ancestors(runs[0])[1] if runs else None
    return Known(
        repo_id=repo_id,
        kind=kind,
        license=license,
        license_name=config.license_name,
        license_link=config.license_link,
        base_model=parent.hub_id,
        relation=_relation(kind, stored, stages[0]["stage"] if stages else None, parent.is_direct)
        if parent.hub_id
        else None,
        language=languages(config.language, stages),
        config=stored,
        num_parameters=_parameters(folder) or (stages[0]["num_parameters"] if stages else None),
        num_bytes=sum(path.stat().st_size for path in weights),
        has_tokenizer=bool(tokenizer),
        has_chat_template=(folder / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template")),
        is_reward=any("SequenceClassification" in name for name in stored.get("architectures") or [])
        or adapter.get("task_type") == "SEQ_CLS",
        rank=int(number(adapter.get("r")) or 0),
        base_quantization={key: value for key, value in how.items() if key[0] != "_"},
        files=files,
        began=portable(began) if began else None,
        stages=stages,
        recipes=recipes,
        datasets=_hub_datasets(recipes),
        corpora={corpus: read_corpus(Path(corpus)) for corpus in sorted(wanted)},
        evaluation=evaluation,
        column=column,
        no_evaluation=no_evaluation,
        variants=variants,
    )


def check_card_text(text: str) -> None:
    """Raises UserError where something of this machine got into a card: a fault of ours, and it must not go out."""
    for n, line in enumerate(text.splitlines(), 1):
        if found := find_private(line):
            raise UserError(f"README.md: line {n} holds {found}; remove it from the run's recipe or command")
