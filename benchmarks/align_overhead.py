"""What tuning by llmkit costs over the bare TRL script with the same settings: seconds of training, in alternation.

    python benchmarks/align_overhead.py --model_name_or_path runs/toy/pretrain --rounds 5
    python benchmarks/align_overhead.py --verb dpo --model_name_or_path runs/toy/sft

Both train the same rows in the same batches; the losses must be equal. Counted is the time of `train()` alone, so that
reading rows and loading libraries is not. Prints the median of the ratios of neighbouring runs. With --packing rows are
packed, where TRL's batches are made for flash attention. Of grpo the monitor's look at every batch is counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = 4000
KEYS: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 256, "per_device_train_batch_size": 8, "learning_rate": 3e-3},
    "dpo": {"max_length": 256, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "beta": 1.0},
    "grpo": {
        "per_device_train_batch_size": 64, "learning_rate": 1e-4, "num_generations": 8, "max_completion_length": 48,
    },
}  # fmt: skip
NAMES = {"sft": "instructions", "dpo": "preferences", "grpo": "sums"}
OURS = {
    "sft": {},
    "dpo": {"eval_samples": "0"},
    "grpo": {"max_length": "256", "reward_funcs": "[exact_answer]", "gold_verifier": "numeric_answer"},
}


def exact(*, completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    return [float(said[-1]["content"].strip() == gold) for said, gold in zip(completions, answer, strict=True)]


def bare(verb: str, model_dir: str, steps: int, packing: bool, out: Path) -> None:
    """The script that a user of TRL writes; labels and template are TRL's own work."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmkit import model  # noqa: F401  registers our architecture
    from llmkit.data import toychat
    from llmkit.data.template import CHATML

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    columns = {"sft": ["messages"], "dpo": ["prompt", "chosen", "rejected"], "grpo": ["prompt", "answer"]}[verb]
    rows = [{c: row[c] for c in columns} for row in toychat.rows(NAMES[verb], "train", 0, ROWS)]
    more: dict[str, Any] = {}
    if verb == "sft":
        tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
        more = {"assistant_only_loss": True, "packing": packing}
    args = getattr(trl, f"{verb.upper()}Config")(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        disable_tqdm=True, save_strategy="no", max_steps=steps, seed=0, lr_scheduler_type="linear", logging_steps=10,
        **KEYS[verb], **more,
    )  # fmt: skip
    trainer = getattr(trl, f"{verb.upper()}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **({"reward_funcs": exact} if verb == "grpo" else {}),
    )
    trainer.train()
    history = trainer.state.log_history
    told = {
        "seconds": history[-1]["train_runtime"],
        "losses": [row["loss"] for row in history if "loss" in row],
    }
    out.write_text(json.dumps(told))


def ours(verb: str, model_dir: str, steps: int, packing: bool, folder: Path) -> dict:
    words = {key: str(value) for key, value in KEYS[verb].items()} | OURS[verb]
    words |= {
        "output_dir": str(folder), "model_name_or_path": model_dir, "max_steps": str(steps),
        "warmup_steps": "0", "use_cpu": "true", "skip_checks": "true", "logging_steps": "10",
        "datasets": f"[{{path: builtin/toyworld, name: {NAMES[verb]}, split: 'train[:{ROWS}]'}}]",
    }  # fmt: skip
    if packing:
        words["packing"] = "true"
    flags = [f"--{key}={value}" for key, value in words.items()]
    subprocess.run([sys.executable, "-m", "llmkit", verb, *flags], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = json.loads((folder / "result.json").read_text())["metrics"]["train_wall_s"]
    return {"seconds": seconds, "losses": [row["loss"] for row in rows if "loss" in row]}


def theirs(verb: str, model_dir: str, steps: int, packing: bool, out: Path) -> dict:
    command = [sys.executable, __file__, "--bare", str(out), "--model_name_or_path", model_dir, "--steps", str(steps)]
    command += ["--verb", verb, *["--packing"] * packing]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--verb", choices=KEYS, default="sft")
    parser.add_argument("--model_name_or_path", default="runs/toy/pretrain/model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path, verb = options.model_name_or_path, options.verb
    path = str(Path(path) / "model") if (Path(path) / "model").is_dir() else path
    if options.bare:
        bare(verb, path, options.steps, options.packing, Path(options.bare))
        return
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(options.rounds):
            a = theirs(verb, path, options.steps, options.packing, Path(folder) / f"{k}.json")
            b = ours(verb, path, options.steps, options.packing, Path(folder) / str(k))
            far = max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))
            ratios.append(b["seconds"] / a["seconds"])
            print(
                f"round {k + 1}: TRL {a['seconds'] / options.steps * 1e3:.1f} ms a step, llmkit "
                f"{b['seconds'] / options.steps * 1e3:.1f}, ratio {ratios[-1]:.3f}, losses differ by {far:.1e}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f} of {options.rounds} rounds of {options.steps} steps")


if __name__ == "__main__":
    main()
