"""What users get wrong: each mistake is one line that names the key or file, exit code 2, and costs nothing saved.

llmkit: vocab_size=5 of the model is smaller than the tokenizer's 15 ids; set config_overrides.vocab_size to ...
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
import yaml

from llmkit import cli, hardware

CORPUS = "the cat sat on the mat. " * 40
BASE = {
    "datasets": [{"path": "text", "data_files": "corpus.txt"}],
    "config_overrides": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "tokenizer_type": "char",
    "max_length": 32,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "sample_max_new_tokens": 4,
    "use_cpu": True,
}


def text(data_files: object, **keys) -> dict:
    return {"datasets": [{"path": "text", "data_files": data_files, **keys}]}


def overrides(**keys) -> dict:
    return {"config_overrides": BASE["config_overrides"] | keys}


# (keys that spoil the recipe, what the line must say)
MISTAKES = {
    # data
    "a missing file": (text("no.txt"), "data_files='no.txt': no such file"),
    "a folder instead of a file": (text("folder.txt"), "folder.txt"),
    "an empty corpus": (text("empty.txt"), "empty.txt train: no text in it"),
    "an empty corpus for BPE": (text("empty.txt") | {"tokenizer_type": "bpe"}, "empty.txt train: no text in it"),
    "an empty slice": (text("corpus.txt", split="train[:0]"), "no text in it"),
    "a split that is none": (text("corpus.txt", split="test"), "split='test'"),
    "text shorter than a row": (text("short.txt") | {"packing_strategy": "contiguous"}, "short.txt train: 4 tokens"),
    "text that is not UTF-8": (text("latin.txt"), "latin.txt: bytes that are not UTF-8"),
    "an entry without path": ({"datasets": ["corpus.txt"]}, "datasets[0]='corpus.txt'"),
    "an unknown key of an entry": (text("corpus.txt", dat=3), "datasets[0]: unknown key 'dat'"),
    "data_files that are no names": (text(5), "data_files=5"),
    "a split that is a number": (text("corpus.txt", split=5), "split=5"),
    "no data": ({"datasets": []}, "datasets is missing"),
    "a fraction on some entries": (
        {"datasets": [*text("corpus.txt", fraction=0.5)["datasets"], *text("corpus.txt")["datasets"]]},
        "give `fraction` for every entry or for none",
    ),
    "a negative fraction": (text("corpus.txt", fraction=-0.5), "datasets[0]: fraction=-0.5"),
    "two shards of one name": (
        {"eval_datasets": 2 * text("corpus.txt", shard="a")["datasets"]},
        "eval_datasets: shard names ['a', 'a']",
    ),
    "a shard with unseen characters": (
        {"eval_datasets": text("other.txt", shard="v")["datasets"]},
        "other.txt train: character 'Z' at position 3",
    ),
    # recipe
    "an unknown key": ({"max_step": 3}, "unknown key 'max_step'; nearest: 'max_steps'"),
    "a wrong type": ({"max_steps": "ten"}, "max_steps='ten' is str; allowed: int"),
    "no output_dir": ({"output_dir": ""}, "output_dir is missing"),
    # model
    "a vocabulary below the tokenizer's": (overrides(vocab_size=5), "set config_overrides.vocab_size to "),
    "heads that do not divide": (overrides(num_attention_heads=3), "hidden_size=32 is not a multiple of"),
    "an unknown field": (overrides(hiden_size=32), "config_overrides: llmkit has no 'hiden_size'; nearest"),
    "an unknown architecture": ({"model_type": "lamma"}, "model_type='lamma' is unknown"),
    "an architecture that writes no text": ({"model_type": "t5", "config_overrides": {}}, "config_overrides: "),
    "a context above the model's": (overrides(max_position_embeddings=16), "max_length=32 exceeds"),
    "overrides of a checkpoint": ({"model_name_or_path": "x"}, "has no effect with model_name_or_path"),
    "a missing tokenizer": ({"tokenizer_name": "./nowhere", "tokenizer_type": "bpe"}, "tokenizer_name='./nowhere'"),
    # numbers
    **{f"{key} {value}": ({key: value}, f"{key}={value}") for key, value in [
        ("max_steps", -1), ("learning_rate", -0.1), ("muon_learning_rate", -0.1), ("weight_decay", -0.1),
        ("warmup_steps", -1.0), ("max_grad_norm", -1.0), ("max_length", 0), ("per_device_train_batch_size", -2),
        ("per_device_eval_batch_size", 0), ("gradient_accumulation_steps", 0), ("logging_steps", 0), ("eval_steps", -1),
        ("save_steps", 0), ("save_total_limit", 0), ("sample_max_new_tokens", 0), ("num_processes", -3),
    ]},
    "an unknown key of the schedule": ({"lr_scheduler_kwargs": {"decay": 1}}, "lr_scheduler_kwargs: unknown key"),
    "a BPE below the bytes": ({"tokenizer_type": "bpe", "vocab_size": 10}, "vocab_size=10 is too small"),
    # machine
    "bf16 without the hardware": ({"bf16": True}, "bf16=true: cpu ("),
    "an unknown accelerate config": ({"accelerate_config": "zeero"}, "accelerate_config='zeero': no such file"),
    "no heads": (overrides(num_attention_heads=0), "num_attention_heads"),
    "a negative width": (overrides(hidden_size=-32), "config_overrides: "),
    "fewer than no layers": (overrides(num_hidden_layers=-1), "config_overrides: "),
    "a field of a wrong type": (overrides(hidden_size="big"), "hidden_size"),
    "num_train_epochs -1": ({"num_train_epochs": -1.0, "max_steps": 0}, "num_train_epochs=-1.0"),
    "adam_beta1 1.5": ({"adam_beta1": 1.5}, "adam_beta1=1.5"),
    "adam_epsilon -1": ({"adam_epsilon": -1.0}, "adam_epsilon=-1.0"),
    "muon_momentum 2": ({"optim": "muon", "muon_momentum": 2.0}, "muon_momentum=2.0"),
    "ngram_order 0": ({"ngram_order": 0}, "ngram_order=0"),
    "seed -1": ({"seed": -1}, "seed=-1"),
    "learning_rate nan": ({"learning_rate": float("nan")}, "learning_rate=nan"),
    "a schedule of words": ({"lr_scheduler_kwargs": {"num_decay_steps": "x"}}, "num_decay_steps"),
    "a prompt without room": ({"sample_prompts": ["cat " * 20]}, "sample_prompts: 'cat cat"),
    "epochs without end": ({"max_steps": 0, "num_train_epochs": float("inf")}, "num_train_epochs=inf"),
    "a seed above 32 bits": ({"seed": 5_000_000_000}, "seed=5000000000"),
    "a rank of no adapter": ({"lora_r": 4}, "lora_r=4 has no effect without use_peft: true"),
    "a rate of another optimiser": ({"muon_learning_rate": 0.5}, "has no effect without optim: muon"),
    "isolation in one stream": (
        {"packing_strategy": "contiguous", "document_isolation": False}, "has no effect with packing_strategy"
    ),
    "a decay that cosine has not": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_decay_steps": 5}}, "has no effect with cosine"
    ),
    "a limit of no checkpoints": ({"save_total_limit": 3}, "has no effect without save_steps"),
    "a folder as path": ({"datasets": [{"path": "folder.txt"}]}, "path='folder.txt' is a folder without tokens"),
    "a prompt that is a number": ({"sample_prompts": [5]}, "sample_prompts"),
    "lora_r 0": ({"use_peft": True, "lora_r": 0}, "lora_r=0"),
    "an adapter on nothing": ({"use_peft": True, "lora_target_modules": "nothing"}, "lora_target_modules"),
    "output_dir under a file": ({"output_dir": "corpus.txt/run"}, "corpus.txt"),
    "store_dir under a file": ({"store_dir": "corpus.txt/data"}, "corpus.txt"),
    "the key of a missing checkpoint": (
        {"model_name_or_path": "./nowhere", "config_overrides": {}, "tokenizer_type": "bpe"},
        "model_name_or_path='./nowhere'",
    ),
}  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with texts of every kind."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(hardware, "measured_cpu_flops", lambda: 1e9)
    for name, content in {"corpus": CORPUS, "empty": "", "short": "cat", "other": "catZ" * 40}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 40)
    (tmp_path / "folder.txt").mkdir()
    return tmp_path


def recipe(work: Path, **keys) -> str:
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "runs/new"} | BASE | keys))
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def the_line(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """Runs a verb that must fail; returns what it says."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("llmkit: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def refuse(work: Path, keys: dict, expected: str, capsys: pytest.CaptureFixture) -> None:
    """One line, and an unfinished run in the way keeps its bytes."""
    (work / "runs" / "new").mkdir(parents=True)
    for name in ("manifest.json", "metrics.jsonl"):
        (work / "runs" / "new" / name).write_text('{"stage": "pretrain", "step": 1}\n')
    path = recipe(work, **keys)
    before = contents(work)
    assert expected in the_line(["pretrain", path], capsys)
    after = contents(work)
    assert {name: after.get(name) for name in before} == before
    assert all(
        name.startswith("runs/data/") for name in set(after) - set(before)
    )  # token stores, good for the next try


@pytest.mark.parametrize("keys, expected", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_costs_nothing(keys, expected, work, capsys):
    refuse(work, keys, expected, capsys)


def test_the_recipe_without_a_mistake_runs_and_a_second_run_leaves_it_alone(work, capsys):
    """The control of this file: only the planted mistake can be what is refused."""
    path = recipe(work)
    assert cli.main(["pretrain", path]) == 0
    before = contents(work)
    assert {"runs/new/model/model.safetensors", "runs/new/result.json"} < set(before)
    assert "output_dir='runs/new': holds another run (model, result.json)" in the_line(["pretrain", path], capsys)
    assert cli.main(["check", path, "--tier", "0"]) == 0  # which asks what a run would do, and needs no free folder
    assert contents(work) == before


def test_best_fit_trains_on_a_text_shorter_than_a_row(work):
    assert cli.main(["pretrain", recipe(work, **text("short.txt"))]) == 0


@pytest.mark.parametrize("output_dir, expected", [(".", "not a run folder"), ("corpus.txt", "is a file")])
def test_foreign_files_are_left_alone(output_dir, expected, work, capsys):
    path = recipe(work, output_dir=output_dir)
    before = contents(work)
    assert expected in the_line(["pretrain", path], capsys)
    assert contents(work) == before


def test_muon_with_nothing_to_train_says_what_to_use(work, capsys):
    path = recipe(work, optim="muon", **overrides(num_hidden_layers=0))
    assert "optim='muon'" in the_line(["pretrain", path], capsys)
    assert not (work / "runs/new/model").exists()


def test_a_model_that_cannot_fit_on_the_disk_is_refused_before_training(work, monkeypatch, capsys):
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "output_dir='runs/new': 0 MB free" in the_line(["pretrain", recipe(work)], capsys)
    assert not (work / "runs/new").exists()


def test_a_disk_that_fills_while_training_is_one_line(work, monkeypatch, capsys):
    def save(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save)
    assert "runs/new/model: the disk is full" in the_line(["pretrain", recipe(work)], capsys)
    assert sorted(contents(work / "runs/new")) == ["check.json", "manifest.json", "metrics.jsonl", "recipe.yaml"]
    monkeypatch.undo()
    assert cli.main(["pretrain", recipe(work), "--data_dir", str(work), "--output_dir", str(work / "runs/new")]) == 0


def test_a_disk_that_fills_while_tokenising_is_one_line(work, monkeypatch, capsys):
    def save(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", save)
    assert "disk is full" in the_line(["pretrain", recipe(work)], capsys)


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["generate"], "model_name_or_path is missing"),
        (["generate", "--model_name_or_path", "./nowhere"], "model_name_or_path='./nowhere': no such folder"),
        (["generate", "--model_name_or_path", "x", "--max_new_tokens", "0"], "max_new_tokens=0"),
        (["generate", "--model_name_or_path", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "--model_name_or_path", "x", "--top_k", "0"], "top_k=0"),
        (["generate", "--model_name_or_path", "x", "--top_p", "1.5"], "top_p=1.5"),
        (["generate", "--model_name_or_path", "x", "--temperature", "0", "--top_k", "5"], "temperature=0 is greedy"),
        (["generate", "--model_name_or_path", "corpus.txt"], "model_name_or_path='corpus.txt'"),
        (["export", "--output_dir", "out"], "model_name_or_path is missing"),
        (["export", "--model_name_or_path", "x"], "output_dir is missing"),
        (["export", "--model_name_or_path", "x", "--output_dir", "out", "--to", "onnx"], "to='onnx'"),
        (["export", "--model_name_or_path", "x", "--output_dir", "out", "--outtype", "f32"], "outtype='f32' has no"),
        (["export", "--model_name_or_path", "x", "--output_dir", "."], "output_dir='.': exists already"),
        (["export", "--model_name_or_path", "./nowhere", "--output_dir", "out"], "model_name_or_path='./nowhere'"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value,
)
def test_deploy_refuses_in_one_line(argv, expected, work, capsys):
    before = contents(work)
    assert expected in the_line(argv, capsys)
    assert contents(work) == before


@pytest.mark.medium
def test_nothing_else_reaches_stderr_in_a_process_of_its_own(work):
    """Libraries log to the stderr of their import time, which capsys does not see."""
    root = Path(__file__).parent.parent.parent
    argv = [sys.executable, "-m", "llmkit", "pretrain", recipe(work, **overrides(vocab_size=5))]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("llmkit: vocab_size=5")
