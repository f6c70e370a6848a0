"""What `llmkit eval` costs over the bare lm-eval command line: the same tasks and model, in alternation.

    python benchmarks/eval_overhead.py --data_dir DIR --rounds 3 --limit 200

DIR has gsm8k_train.jsonl and gsm8k_test.jsonl. The model is a small Qwen3 of random weights with a context of 4,096 and
a vocabulary of its own; prompts have five examples. All figures must be equal to the last digit. Counted are whole
processes, each on one thread: with the start, the stock index of 14,000 tasks, and writing every sample. Prints
seconds per item and the median of the ratios of neighbouring runs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GENERATED = 64  # tokens


def make_model(folder: Path, data_dir: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from llmkit.data.tokenizer import train_tokenizer

    text = (data_dir / "gsm8k_train.jsonl").read_text(encoding="utf-8")[:1_000_000]
    tokenizer = train_tokenizer("bpe", [text], 2048, True)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_choices(path: Path, data_dir: Path, count: int) -> None:
    """A multiple-choice task of the same questions: the right number among its neighbours."""
    path.mkdir()
    rows = []
    for line in (data_dir / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        right = int(row["answer"].split("#### ")[1].replace(",", ""))
        rows.append({"question": row["question"], "choices": [str(right + k) for k in range(4)], "answer": 0})
    (path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (path / "choices.yaml").write_text(
        "task: numbers\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {path}/choices.jsonl}}}}\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
        encoding="utf-8",
    )


def make_gsm8k(path: Path, data_dir: Path) -> None:
    """For the bare command line: the stock definition on local files, as its users write it."""
    from pathlib import Path as P

    import lm_eval.tasks

    stock = P(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    files = {"train": f"{data_dir}/gsm8k_train.jsonl", "test": f"{data_dir}/gsm8k_test.jsonl"}
    text = f"include: {stock}\ntask: gsm8k\ndataset_path: json\ndataset_name: null\ndataset_kwargs: "
    (path / "gsm8k.yaml").write_text(text + json.dumps({"data_files": files}) + "\n", encoding="utf-8")


def timed(command: list[str]) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    data_dir, work = Path(options.data_dir).resolve(), Path(tempfile.mkdtemp())
    make_model(work / "small", data_dir)
    make_choices(work / "ours", data_dir, options.limit)
    shutil.copytree(work / "ours", work / "theirs")
    make_gsm8k(work / "theirs", data_dir)
    bin_dir = Path(sys.executable).parent
    shared = ["--limit", str(options.limit), "--batch_size", str(options.batch_size)]
    theirs = [
        f"{bin_dir}/lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={work}/small", "--device", "cpu",
        "--tasks", "gsm8k,numbers", "--include_path", f"{work}/theirs", "--gen_kwargs", f"max_gen_toks={GENERATED}",
        "--log_samples", "--output_path", f"{work}/bare", *shared,
    ]  # fmt: skip
    ours = [
        f"{bin_dir}/llmkit", "eval", f"{work}/small", "--tasks", "gsm8k,numbers", "--data_dir", str(data_dir),
        "--include_path", f"{work}/ours", "--gen_kwargs.max_gen_toks", str(GENERATED), "--use_cpu",
        "--output_dir", f"{work}/eval", *shared,
    ]  # fmt: skip
    ratios = []
    for k in range(options.rounds):
        shutil.rmtree(work / "eval", ignore_errors=True)
        seconds = [timed(theirs), timed(ours)] if k % 2 == 0 else [timed(ours), timed(theirs)][::-1]
        ratios.append(seconds[1] / seconds[0])
        print(f"lm-eval {seconds[0]:.1f} s, llmkit eval {seconds[1]:.1f} s, ratio {ratios[-1]:.3f}", flush=True)
    bare = json.loads(max((work / "bare").rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
    kept = json.loads((work / "eval/columns/small/results.json").read_text(encoding="utf-8"))["units"]
    num_equal = 0
    for unit in kept.values():
        for name, task in unit["tasks"].items():
            print(f"{name}: {task['wall_s'] / task['num_items']:.3f} s per item, {task['num_items']} items")
            for key, score in task["scores"].items():
                assert bare[name][key] == score["value"], (name, key, bare[name][key], score["value"])
                num_equal += 1
    print(f"{num_equal} figures are equal to the last digit; median ratio {statistics.median(ratios):.3f}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
