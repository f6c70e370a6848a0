"""A family of four runs and their evaluation, as the stages write them: numbers by hand, no model behind them."""

import json
import math
from pathlib import Path
from typing import Any

VERSIONS = {"llmkit": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"}
CPU = "cpu (AMD EPYC), 2 threads, float32, 0.2 TFLOP/s peak"
GPU = "cuda (NVIDIA L4), bfloat16, 121 TFLOP/s peak"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_run(folder: Path, stage: str, rows: list[dict[str, Any]], parent: str | None = None, **given: Any) -> None:
    """Manifest, result, recipe and metrics of a run; `given` are fields of result and manifest."""
    result = {
        "stage": stage, "status": "ok", "model_dir": f"{folder}/model", "parent": parent, "wall_s": 100.0,
        "cpu_s": 190.0, "tokens": 50_000, "shards": {}, "metrics": {"train_wall_s": 50.0, "num_parameters": 810_560},
    }  # fmt: skip
    manifest = {
        "stage": stage, "command": ["llmkit", stage, f"recipes/toy/{stage}.yaml"], "versions": VERSIONS, "seed": 0,
        "started": "2026-01-01T10:00:00+0000", "git_commit": "82591adf2aee7216", "hardware": CPU, "engine": "single",
        "num_processes": 1, "parent": parent, "tokenizer": "1b085b24894a6e4d", "chat_template": "0073cd2e5295",
        "overfit": None,
    }  # fmt: skip
    write(folder / "result.json", result | {key: value for key, value in given.items() if key in result})
    write(folder / "manifest.json", manifest | {key: value for key, value in given.items() if key in manifest})
    write_lines(folder / "metrics.jsonl", rows)
    (folder / "recipe.yaml").write_text("datasets:\n- {path: builtin/toyworld, split: train}\n")


def falling(step: int, start: float, end: float) -> float:
    return end + (start - end) * math.exp(-step / 60)


def write_family(root: Path) -> None:
    """pretrain -> sft -> dpo -> grpo, and eval of all four."""
    steps = range(10, 501, 10)
    rows: list[dict[str, Any]] = []
    for n in steps:
        rows.append({"step": n, "loss": falling(n, 3.4, 0.29), "learning_rate": 0.01 * (1 - n / 500),
                     "grad_norm": 0.1 + falling(n, 0.8, 0.1), "num_input_tokens_seen": 100 * n})  # fmt: skip
        if n % 100 == 0:
            rows.append({"step": n, "eval_stories_loss": falling(n, 3, 0.24), "eval_facts_loss": falling(n, 3, 0.30)})
    shards = {
        "stories": {"loss": 0.2403, "bits_per_byte": 0.0874, "entropy": 0.2230, "gap_stderr": 0.0002},
        "facts": {"loss": 0.3002, "bits_per_byte": 0.1032, "entropy": 0.2824, "gap_stderr": 0.0003},
    }
    write_run(root / "pretrain", "pretrain", rows, shards=shards, chat_template=None, tokenizer="3a042d21fd2278c2")
    rows = [{"step": n, "loss": falling(n, 8.6, 0.04), "learning_rate": 0.002 * (1 - n / 500), "grad_norm": 1.0,
             "entropy": falling(n, 2, 0.05), "mean_token_accuracy": 1 - falling(n, 0.8, 0.02),
             "num_tokens": 100.0 * n} for n in steps]  # fmt: skip
    write_run(root / "sft", "sft", rows, str(root / "pretrain"), metrics={"questions_exact_match": 0.8238})
    rows = [{"step": n, "loss": falling(n, 0.69, 0.3), "learning_rate": 1e-5, "grad_norm": 2.0 + math.sin(n),
             "rewards/chosen": 0.002 * n, "rewards/rejected": -0.004 * n, "rewards/margins": 0.006 * n,
             "rewards/accuracies": 1 - falling(n, 0.5, 0.1), "logps/chosen": -20 - 0.02 * n,
             "logps/rejected": -25 - 0.08 * n, "num_tokens": 100.0 * n} for n in steps]  # fmt: skip
    write_run(root / "dpo", "dpo", rows, str(root / "sft"), hardware=GPU)
    rows = [{"step": n, "loss": 0.01, "learning_rate": 1e-6, "grad_norm": 0.3, "reward": 1 - falling(n, 0.7, 0.1),
             "reward_std": 0.2, "kl": 0.0004 * n, "entropy": falling(n, 0.5, 0.1), "frac_reward_zero_std": 0.3,
             "completions/mean_length": 12 + 0.05 * n, "completions/max_length": 32, "num_tokens": 100.0 * n}
            for n in steps]  # fmt: skip
    write_run(root / "grpo", "grpo", rows, str(root / "dpo"), hardware=GPU, git_commit="4b1087a3f067d451")
    alert = {"kind": "length-hacking", "message": "answers grow while the exact match falls"}
    write_lines(root / "grpo" / "alerts.jsonl", [{"step": 310, **alert}, {"step": 420, **alert}])
    check = {"id": "pad-trained", "status": "warn", "title": "Padding is trained.", "measured": "3 of 50 rows",
             "fix": "mask it"}  # fmt: skip
    write(root / "sft" / "check.json", {"version": 1, "checks": [check, {"id": "double-bos", "status": "pass"}]})
    write(root / "eval" / "comparison.json", comparison(root))
    command = ["llmkit", "eval", *NAMES, "--output_dir", "eval"]
    write(root / "eval" / "manifest.json", {"stage": "eval", "command": command, "started": "2026-01-02T10:00:00+0000"})


NAMES = ["pretrain", "sft", "dpo", "grpo"]
PARENTS = {"sft": "pretrain", "dpo": "sft", "grpo": "dpo"}
TASKS = {  # name: (values, half widths of the intervals, what they are called)
    "all": ([0.0, 0.707, 0.755, 0.736], 0.02, ["gained", "gained", None]),
    "facts": ([0.0, 1.0, 1.0, 1.0], 0.01, ["gained", None, None]),
    "spelling": ([0.0, 0.912, 0.900, 0.820], 0.03, ["gained", None, "lost"]),
    "sums": ([0.0, 0.566, 0.640, 0.655], 0.04, ["gained", "gained", None]),
    "unknown": ([0.0, 0.351, 0.480, 0.470], 0.05, ["gained", "gained", None]),
}


def task(name: str) -> dict[str, Any]:
    values, half, flags = TASKS[name]
    pairs = []
    for i, flag in enumerate(flags):
        by = values[i + 1] - values[i]
        pairs.append({"column": NAMES[i + 1], "against": NAMES[i], "difference": by, "low": by - half,
                      "high": by + half, "p": 0.01, "flag": flag})  # fmt: skip
    return {
        "name": f"toyworld_{name}", "group": "toyworld", "kind": "generate", "metric": "exact_match", "filter": "none",
        "higher_is_better": True, "num_items": 350, "num_fewshot": 0, "is_chat": True, "stops": ["\n"],
        "data": f"builtin/toyworld {name}", "pairs": pairs,
        "scores": {n: {"value": v, "stderr": 0.019, "num_cut": 0, "num_nan": 0, "wall_s": 3.2}
                   for n, v in zip(NAMES, values, strict=True)},
    }  # fmt: skip


def shard(name: str, losses: list[float], entropy: float | None, flags: list[str | None]) -> dict[str, Any]:
    pairs = []
    for i, flag in enumerate(flags):
        by = losses[i + 1] - losses[i]
        pairs.append({"column": NAMES[i + 1], "against": NAMES[i], "difference": by, "low": by - 0.002,
                      "high": by + 0.002, "p": 0.0, "flag": flag})  # fmt: skip
    return {
        "name": name, "data": f"builtin/toyworld {name} validation[:400]", "window": 256, "num_documents": 400,
        "num_tokens": 34_349, "num_bytes": 136_206, "entropy": entropy, "pairs": pairs,
        "scores": {n: {"loss": v, "stderr": 0.001, "bits_per_byte": 0.09, "wall_s": 1.0}
                   for n, v in zip(NAMES, losses, strict=True)},
    }  # fmt: skip


def comparison(root: Path) -> dict[str, Any]:
    columns = [
        {"name": n, "model_dir": f"{root}/{n}/model", "run": f"{root}/{n}", "parent": PARENTS.get(n),
         "fingerprint": n.encode().hex() * 4, "num_parameters": 810_560, "num_bytes": 3_300_000, "dtype": "float32",
         "max_length": 512, "device": "cpu (AMD EPYC)"}
        for n in NAMES
    ]  # fmt: skip

    def answer(said: str, recorded: str | None, passed: bool) -> dict[str, Any]:
        changed = recorded is not None and recorded != said
        return {"answer": said, "passed": passed, "recorded": recorded, "changed": changed}

    river = "Which river is in Norda?"
    where = {"name": "where", "prompt": river, "expect": "exact: the Esk", "answers": {
        "sft": answer("the Esk", "the Esk", True), "dpo": answer("the Esk", None, True),
        "grpo": answer("It is the river Esk.", "the Esk", False),
    }}  # fmt: skip
    count = {"name": "count", "prompt": "Ada has 7 figs.\nThen she eats 3.", "expect": "numeric: 4", "answers": {
        "sft": answer("Now she has 4.", None, True), "dpo": answer("Now she has  4.", "Now she has 4.", True),
        "grpo": answer("Now she has 4.", None, True),
    }}  # fmt: skip
    colour = {"name": "colour", "prompt": "What colour was it?", "expect": "exact: red", "answers": {
        n: answer("red", None, True) for n in NAMES[1:]
    }}  # fmt: skip
    group = {key: value for key, value in task("all").items() if key not in ("group", "kind", "is_chat", "stops")}
    group |= {"name": "toyworld", "num_items": 1400}
    return {
        "version": 1,
        "columns": columns,
        "how": {"num_fewshot": None, "limit": None, "seed": 0, "chat_template_sha256": "0073cd2e" * 8,
                "chat_template_of": "sft", "bos": "<|bos|>", "versions": {"lm_eval": "0.4.13"}},
        "tasks": [task(name) for name in TASKS if name != "all"],
        "groups": [group],
        "shards": [
            shard("stories", [0.2403, 0.2531, 0.2535, 0.2661], 0.2230, ["lost", None, "lost"]),
            shard("web", [3.1, 3.05, 3.051, 3.052], None, ["gained", None, None]),
        ],
        "regression": {"file": "recipes/toy/regression.yaml", "prompts": [colour, where, count]},
    }  # fmt: skip
