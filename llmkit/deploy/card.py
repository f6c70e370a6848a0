"""The model card: README.md of a repository, written from what is known and nothing else.

    text = write(known);  validate(text)

Owns its words and its metadata (the Hub's model-index). A fact that is not known is left out, or said to be unknown.
Leaves out where the facts come from (facts.py).
"""

import re
from typing import Any

import yaml

from ..config import UserError
from ..report.evals import against_parent, counted
from ..report.runs import Facts, bare
from .facts import Known, check_card_text, portable
from .files import HUB_ID, is_local
from .licence import LICENCES
from .ways import ways

VERBS = {
    "pretrain": "pretrained", "sft": "tuned on instructions", "dpo": "tuned on preference pairs",
    "kto": "tuned on answers marked good or bad", "rrhf": "tuned on ranked answers", "grpo": "tuned on rewards",
    "reward": "trained to tell which of two answers is better", "merge": "merged with its adapter",
    "quantize": "quantised", "export": "converted",
}  # fmt: skip
MADE_OF = ("merge", "quantize", "export")  # another model, without training
UNTOLD = ("epoch", "num_texts", "num_chats", "num_bytes")  # figures that say nothing of the model
SHAPE = (  # names that configs give a fact -> how it is said
    (("num_hidden_layers", "n_layer"), "layers"),
    (("hidden_size", "n_embd"), "wide"),
    (("num_attention_heads", "n_head"), "heads"),
    (("vocab_size",), "token ids"),
)
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")


def _first(config: Facts, names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _is_ours(known: Known) -> bool:
    return bool(known.stages) or known.config.get("model_type") == "llmkit"


# ---- metadata


def _results(known: Known) -> list[Any]:
    """One EvalResult for each score: the error and the number of items stand in its name and in its arguments."""
    from huggingface_hub import EvalResult

    found = []
    for row in known.evaluation["rows"] if known.evaluation else []:
        score = row["scores"].get(known.column)
        if row["kind"] == "group" or not score or score["value"] is None:
            continue
        error, items = score["stderr"], row["num_items"]
        name = row["metric"] + (f" (± {error:.4f} standard error)" if error is not None else "")
        args = {"stderr": error, "num_items": items, "num_fewshot": row["num_fewshot"], "unit": row["unit"] or None}
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"[^\w.-]", "-", row["name"]),
                dataset_name=row["name"],
                metric_type=row["metric"],
                metric_name=name,
                metric_value=round(score["value"], 6),
                metric_args={k: _rounded(v) for k, v in args.items() if v is not None},
            )
        )
    done = {result.dataset_name for result in found}
    for shard, facts in (known.stages[0]["shards"] if known.stages else {}).items():
        if facts["loss"] is None or shard in done:
            continue
        args = {"unit": "nats per token", "bits_per_byte": facts["bits_per_byte"], "entropy": facts["entropy"]}
        args["gap_stderr"] = facts["gap_stderr"]
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"[^\w.-]", "-", shard),
                dataset_name=f"{shard} (validation)",
                metric_type="loss",
                metric_name="cross-entropy in nats per token",
                metric_value=round(facts["loss"], 6),
                metric_args={k: _rounded(v) for k, v in args.items() if v is not None},
            )
        )
    return found


def metadata(known: Known) -> Any:
    """ModelCardData: what the Hub searches and shows beside the card."""
    from huggingface_hub import ModelCardData

    tags = ["llmkit"] * _is_ours(known) + [stage["stage"] for stage in known.stages[:1]]
    tags += ["conversational"] * (known.has_chat_template and not known.is_reward) + ["gguf"] * (known.kind == "gguf")
    results = _results(known)
    data = ModelCardData(
        license=known.license,
        base_model=known.base_model,
        language=known.language[0] if len(known.language) == 1 else known.language or None,
        library_name={"model": "transformers", "adapter": "peft"}.get(known.kind),
        pipeline_tag="text-classification" if known.is_reward else "text-generation",
        tags=tags or None,
        datasets=known.datasets or None,
        model_name=known.repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    )
    optional = {"license_name": known.license_name, "license_link": known.license_link}
    optional["base_model_relation"] = known.relation if known.base_model else None
    for key, value in optional.items():
        if value:
            data[key] = value
    return data


# ---- sections


def _what(known: Known) -> list[str]:
    shape = [f"{value:,} {said}" for names, said in SHAPE if (value := _first(known.config, names)) is not None]
    shape = [] if known.kind == "adapter" else shape  # that would be its base's
    context = _first(known.config, CONTEXT)
    kind = {"adapter": "A PEFT adapter", "gguf": "A GGUF file"}.get(known.kind, "A causal language model")
    if known.is_reward:
        kind = "A PEFT adapter (with a reward head)" if known.kind == "adapter" else "A reward model (one score)"
    made = VERBS.get(known.stages[0]["stage"]) if known.stages else None
    made = f", {made} with llmkit" if made else ", made" if known.base_model else ""
    of = f"from {_link(known.base_model)}" if known.base_model else ""
    of = f"for {_link(known.base_model)}" if known.kind == "adapter" and known.base_model else of
    said = f"{kind} {of}{made}" if known.kind == "adapter" and of else f"{kind}{made} {of}".strip()
    facts = [f"{known.num_parameters:,} parameters"] if known.num_parameters else []
    facts += shape + ([f"a context of {context:,} tokens"] if context else [])
    if "quantization_config" in known.config:
        facts.append(f"stored quantised ({known.config['quantization_config'].get('quant_method', 'unknown method')})")
    lines = [f"{said}: {', '.join(facts)}." if facts else f"{said}."]
    architecture = (known.config.get("architectures") or [known.config.get("model_type")])[0]
    if architecture:
        lines[0] += f" Architecture{' of its base' if known.kind == 'adapter' else ''}: {architecture}."
    if known.has_chat_template:
        does = "It scores the last answer of a chat" if known.is_reward else "It answers in a chat"
        lines[0] += f" {does}: the template comes with the tokenizer."
    return [*lines, *(f"\n{_variant(known, name, kind)}" for name, kind in known.variants)]


def _link(repo: str) -> str:
    return f"[{repo}](https://huggingface.co/{repo})"


def _variant(known: Known, name: str, kind: str) -> str:
    if kind == "gguf":
        return f"The folder `{name}` holds it as GGUF."
    if kind == "adapter":
        call = f'PeftModel.from_pretrained(model, "{known.repo_id}", subfolder="{name}")'
        return f"The folder `{name}` holds an adapter: `{call}`."
    return f'The folder `{name}` holds a variant: `from_pretrained("{known.repo_id}", subfolder="{name}")`.'


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min" if seconds < 7200 else (
        f"{seconds / 3600:,.1f} h"
    )  # fmt: skip


def _made(known: Known) -> list[str]:
    if not known.stages:
        return ["Not known: no run of llmkit belongs to this folder."]
    lines = []
    chain = [f"{s['name']} ({s['stage']})" for s in reversed(known.stages)]
    began = known.began
    start = "new weights" if not began else f"{began} (no longer there)" if is_local(began) else began
    lines += [f"Lineage: {' → '.join([start, *chain])}.", ""]
    rows = []
    for stage, recipe in reversed(list(zip(known.stages, known.recipes, strict=True))):
        if stage["stage"] in MADE_OF:
            continue
        processes = f", {stage['num_processes']} processes" if (stage["num_processes"] or 1) > 1 else ""
        rows.append(
            [
                stage["name"],
                f"{stage['tokens']:,}" if stage["tokens"] is not None else "unknown",
                f"{stage['steps']:,}" if stage["steps"] is not None else "unknown",
                _seconds(stage["wall_s"]) if stage["wall_s"] is not None else "unknown",
                _flops(stage, recipe),
                (bare(stage["hardware"]) or "unknown") + processes,
                ", ".join(f"{key} {value}" for key, value in stage["seeds"].items() if value is not None) or "unknown",
            ]
        )
    lines += _table(["stage", "tokens", "steps", "wall time", "compute", "hardware", "seeds"], rows)
    lines += ["Compute is 6 × parameters × tokens, in FLOP; unknown where a stage did more or less than that.", ""]
    for stage, recipe in zip(known.stages, known.recipes, strict=True):
        commit = f"llmkit at commit {stage['git_commit'][:12]}" if stage["git_commit"] else "llmkit, commit unknown"
        used = ", ".join(f"{name} {version}" for name, version in stage["versions"].items()) or "versions unknown"
        lines += [f"<details><summary>{stage['name']}: command and recipe</summary>", "", "```sh"]
        lines += [stage["command"] or "# unknown", "```", "", f"{commit}; {used}.", ""]
        if recipe:
            lines += [
                "```yaml",
                yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110).strip(),
                "```",
                "",
            ]
        lines += ["</details>", ""]
    return lines


def _flops(stage: Facts, recipe: Facts) -> str:
    if not stage["tokens"] or not stage["num_parameters"] or stage["stage"] not in ("pretrain", "sft"):
        return "unknown"  # of the others a reference, a reward model or sampling has its share
    if recipe.get("use_peft"):
        return "unknown"  # no gradients of the weights that stay
    return f"{6 * stage['num_parameters'] * stage['tokens']:.1e}"


def _data(known: Known) -> list[str]:
    lines = []
    trained = [stage for stage in known.stages if stage["stage"] not in MADE_OF]
    for stage in trained:
        rows = []
        for data in stage["data"]:
            count = data["num_documents"] if data["num_documents"] is not None else data["rows"]
            tokens = data["num_tokens"] if data["num_tokens"] is not None else data["tokens"]
            counts = [f"{n:,}" if n is not None else "unknown" for n in (count, tokens)]
            sha = f"`{data['fingerprint'][:16]}`" if data["fingerprint"] else "unknown"
            rows.append([data["source"].replace("shard.", "validation: "), *counts, sha])
        sources = ", ".join(dict.fromkeys(data["source"] for data in stage["contamination"]))
        lines += [f"{stage['name']}: from {sources or 'unknown sources'}.", ""]
        lines += _table(["data", "documents or rows", "tokens", "SHA-256 (its first 16)"], rows)
    lines += ["What was held against it, so that no evaluation text was trained on:", ""]
    for stage in trained:
        held = [f"- {stage['name']}, {d['source']}: {_held(d, known)}" for d in stage["contamination"]]
        lines += held or [f"- {stage['name']}: not checked, its recipe names no data that could be looked up"]
    return [*lines, ""] if trained else ["Not known."]


def _held(data: Facts, known: Known) -> str:
    corpus = known.corpora.get(data["corpus"] or "")
    if corpus is None:
        is_toy = data["path"] == "builtin/toyworld"
        return "training and evaluation splits share no row, by construction; nothing else was checked" if is_toy else (
            "not checked"
        )  # fmt: skip
    against = [*(f"shard {shard}" for shard in corpus["shards"]), *corpus["benchmarks"]]
    if corpus["problem"] or corpus["is_decontaminated"] is False or not against:
        return "not checked"
    return portable(f"{corpus['num_dropped']:,} documents dropped that held text of {', '.join(against)}")


def _evaluated(known: Known) -> list[str]:
    lines = []
    evaluation, column = known.evaluation, known.column
    if evaluation and column:
        rows = []
        for row in (r for r in evaluation["rows"] if column in r["scores"]):
            score, pair = row["scores"][column], against_parent(evaluation, row, column)
            error = f" ± {score['stderr']:.4f}" if score["stderr"] is not None else ""
            value = f"{score['value']:.4f}{error}" if score["value"] is not None else "unknown"
            change = "" if not pair else f"{_signed(pair['difference'])} {pair['flag'] or 'within the noise'}"
            asked = "raw text" if row["kind"] == "shard" else "chat" if row["is_chat"] else "plain text"
            asked = "its tasks together" if row["kind"] == "group" else asked
            shots = f", {row['num_fewshot']}-shot" if row["num_fewshot"] is not None else ""
            items = row["num_items"] if row["num_items"] is not None else row["num_documents"]
            metric = row["metric"] + ("" if row["higher_is_better"] else " ↓")
            metric += f" ({row['unit']})" if row["unit"] else ""
            rows.append([row["name"], metric, value, change, f"{items:,}" if items else "", asked + shots])
        parent = next(c["parent"] for c in evaluation["columns"] if c["name"] == column)
        head = ["task", "metric", "value ± standard error", f"against {parent}", "items", "asked as"]
        if not any(row[3] for row in rows):
            head, rows = head[:3] + head[4:], [row[:3] + row[4:] for row in rows]
        lines += _table(head, rows)
        note = "Higher is better; lower where there is a ↓."
        if len(head) == 6:
            note += " A difference is gained or lost where the 95 % interval of the paired difference does not hold 0."
        if any("± 0.0000" in row[2] for row in rows):
            note += " An error of 0 means that all items came out the same, not that the next one must."
        lines += [note, ""]
        lines += [f"- {label}: {said}" for label, said in evaluation["how"] if label != "chat template of"] + [""]
    else:
        lines += [f"Beyond the figures of the run itself nothing is quoted: {known.no_evaluation}.", ""]
    own = known.stages[0] if known.stages else None
    shards = own["shards"] if own else {}
    rows = []
    for name, facts in shards.items():
        gap = None if facts["entropy"] is None or facts["loss"] is None else facts["loss"] - facts["entropy"]
        error = f" ± {facts['gap_stderr']:.4f}" if facts["gap_stderr"] is not None else ""
        cells = [facts["loss"], facts["entropy"], None, facts["bits_per_byte"]]
        said = [f"{value:.4f}" if value is not None else "unknown" for value in cells]
        said[2] = f"{_signed(gap)}{error}" if gap is not None else "unknown"
        rows.append([name, *said])
    if rows:
        lines += ["Validation shards at the end of the run:", ""]
        lines += _table(
            ["shard", "loss (nats per token)", "true entropy", "gap ± standard error", "bits per byte"], rows
        )
    if own and own["metrics"]:
        figures = [[name, _figure(value)] for name, value in own["metrics"].items() if name not in UNTOLD]
        lines += [
            "What the run measured itself; no errors were recorded for these:",
            "",
            *_table(["figure", "value"], figures),
        ]
    return lines


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _limits(known: Known) -> list[str]:
    """Each line comes from a fact, or says that there is none."""
    lines = []
    own = known.stages[0] if known.stages else {}
    if known.kind != "adapter" and known.num_parameters and known.num_parameters < 1e9:
        expect = "scores without meaning" if known.is_reward else "inventions"
        lines.append(f"It is small ({known.num_parameters:,} parameters): outside its training text expect {expect}.")
    if context := _first(known.config, CONTEXT):
        lines.append(f"It reads at most {context:,} tokens at once; what is longer was never seen in training.")
    said = (
        f"Its text is in: {', '.join(known.language)}."
        if known.language
        else "The language of its text was not recorded."
    )
    lines.append(said)
    sources = {data["path"] for stage in known.stages for data in stage["contamination"]}
    if sources == {"builtin/toyworld"} and not known.base_model:
        lines.append("Its text is about a small made-up world, and no other.")
    if known.evaluation and known.column:
        lost = [(r, p) for r, p in counted(known.evaluation, known.column) if p["flag"] == "lost"]
        lines += [f"It lost against {p['against']}: {r['name']} {_signed(p['difference'])}." for r, p in lost]
        if not lost and any(against_parent(known.evaluation, r, known.column) for r in known.evaluation["rows"]):
            lines.append("Against its parent it lost nothing beyond the noise in what was measured.")
    elif not known.is_reward and not (known.stages and (not own["parent"] or own["stage"] in MADE_OF)):
        lines.append("It was not compared with its parent, or that comparison is not at hand.")
    for stage in known.stages:
        for kind in stage["alerts"]["kinds"]:
            first = f", first at step {kind['first_step']}" if kind["first_step"] is not None else ""
            what = (kind["said"] or [{"message": ""}])[0]["message"]
            lines.append(f"{stage['name']} raised {kind['count']} × {kind['kind']}{first}: {what}".rstrip(": "))
        if stage["status"] != "ok":
            lines.append(f"{stage['name']} did not come to its end: {stage['status']}.")
        for check in stage["check"]["found"] if stage["check"] else []:
            said = check["title"] or check["measured"]
            lines.append(f"A check before {stage['name']}: {check['id']} ({check['status']}): {said}")
    if not known.stages or not any(stage["check"] for stage in known.stages):
        lines.append("No checks before training are on record.")
    lines.append("Nothing was measured about bias, safety or truthfulness beyond the tables above.")
    return [f"- {line}" for line in lines]


def _licence(known: Known) -> list[str]:
    of = f" That of its parent, {_link(known.base_model)}, may ask for more." if known.base_model else ""
    name = f"{known.license_name} ({known.license})" if known.license_name else known.license
    link = f": <{known.license_link}>" if known.license_link else ""
    return [f"{name}{link}.{of}"]


def write(known: Known) -> str:
    """README.md, whole. Raises UserError should a path of this machine have got into it."""
    sections = [
        (f"# {known.repo_id.split('/')[1]}", _what(known)),
        ("## How to load it", ways(known)),
        ("## How it was made", _made(known)),
        ("## Data", _data(known)),
        ("## Evaluation", _evaluated(known)),
        ("## Limits", _limits(known)),
        ("## Licence", _licence(known)),
    ]
    body = "\n\n".join(f"{title}\n\n" + "\n".join(lines).strip() for title, lines in sections)
    text = f"---\n{metadata(known).to_yaml()}\n---\n\n{body}\n"
    check_card_text(text)
    return text


def validate(text: str) -> None:
    """What the Hub would refuse, found here. Raises UserError in one line."""
    found = re.match(r"---\n(.*?)\n---\n", text, flags=re.S)
    if not found:
        raise UserError("README.md: has no metadata between two lines of ---")
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise UserError(f"README.md: its metadata is no YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(data, dict):
        raise UserError("README.md: its metadata holds no keys")
    bases = data.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    rules = [
        (data.get("license") in LICENCES, "license", "an identifier of the Hub, or other"),
        (data.get("license") != "other" or bool(data.get("license_name")), "license_name", "the name of license=other"),
        (bool(data.get("pipeline_tag")), "pipeline_tag", "text-generation, text-classification"),
        (all(HUB_ID.fullmatch(str(base)) for base in bases), "base_model", "a Hub id"),
        (data.get("base_model_relation") in (None, "finetune", "adapter", "quantized", "merge"), "base_model_relation",
         "finetune, adapter, quantized, merge"),
        (not (data.get("base_model_relation") and not bases), "base_model_relation", "with base_model only"),
    ]  # fmt: skip
    for is_good, key, allowed in rules:
        if not is_good:
            raise UserError(f"README.md: {key}={data.get(key)!r}; allowed: {allowed}")
    from huggingface_hub import ModelCardData

    try:
        ModelCardData(**{str(key): value for key, value in data.items()})
    except (ValueError, TypeError) as error:
        raise UserError(
            f"README.md: its metadata does not hold together ({' '.join(str(error).split())[:120]})"
        ) from None
