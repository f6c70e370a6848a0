"""The three ways in which a card says to load a model: which they are, and that they work as they are pasted."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from deploy.exported import bpe, chat_model
from deploy.fake_hub import TOKEN, FakeHub
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmkit.config import UserError
from llmkit.deploy import push
from llmkit.verbs import PushConfig


def told(folder: Path, out: Path, **given) -> str:
    """The section of the card."""
    how = dict(model_name_or_path=str(folder), hub_model_id="ann/toy", license="mit", output_dir=str(out))
    push.main(PushConfig(**how | given))
    return (out / "README.md").read_text().split("## How to load it\n")[1].split("\n## ")[0]


def ours(folder: Path, **options) -> Path:
    tiny_model(vocab_size=420, **options).save_pretrained(folder)
    tiny.bpe_tokenizer(bos=True, chat=False).save_pretrained(folder)
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def adapter(folder: Path, base: Path | str, **config) -> Path:
    folder.mkdir(parents=True)
    values = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "r": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({"w": np.ones(3, np.float32)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "--to qwen3"),
        ({"qk_norm": False}, "--to llama"),
        ({"final_logit_softcapping": 15.0}, None),
        ({"hidden_act": "relu2"}, None),
    ],
)
def test_a_model_is_only_said_to_become_what_it_can_become(options, said, tmp_path):
    """`--to qwen3` was written for all, and refused for the other two."""
    text = told(ours(tmp_path / "m", **options), tmp_path / "o")
    assert (said in text) if said else ("llmkit export" not in text and 'pipeline("text-generation"' in text)
    assert len(re.findall(r"^(?:With|As|Or|Then)\b", text, flags=re.M)) == 3


def test_a_quantised_model_is_not_said_to_be_exported(tmp_path):
    folder = ours(tmp_path / "m")
    change(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    text = told(folder, tmp_path / "o")
    assert "llmkit export" not in text and "vllm" not in text


def test_the_tokenizer_of_a_repository_with_code_does_not_ask(tmp_path):
    """Without trust_remote_code it waits 15 s for an answer at the keyboard."""
    text = told(ours(tmp_path / "m"), tmp_path / "o")
    assert 'AutoTokenizer.from_pretrained("ann/toy", trust_remote_code=True)' in text


def test_an_adapter_of_a_quantised_base_is_loaded_on_one_and_merged_knowingly(tmp_path):
    base = ours(tmp_path / "base")
    folder = adapter(tmp_path / "lora", base)
    (folder / "base_quantization.json").write_text('{"_load_in_4bit": true, "load_in_4bit": true}')
    text = told(folder, tmp_path / "o", base_model="ann/base")
    assert "quantization_config=BitsAndBytesConfig(load_in_4bit=True))" in text and "--dequantize true" in text


@pytest.mark.parametrize("rank, room", [(16, None), (24, "32")])
def test_vllm_is_told_of_a_rank_that_it_does_not_expect(rank, room, tmp_path):
    text = told(adapter(tmp_path / "lora", "qwen/base", r=rank), tmp_path / "o")
    assert "vllm serve qwen/base --enable-lora --lora-modules tuned=ann/toy" in text
    assert (f"--max-lora-rank {room}" in text) if room else ("max-lora-rank" not in text)


def test_an_adapter_with_a_reward_head_is_no_writer(tmp_path):
    """Its base is one, and the card had it write text."""
    folder = adapter(tmp_path / "lora", ours(tmp_path / "base"), task_type="SEQ_CLS")
    text = told(folder, tmp_path / "o", base_model="ann/base")
    assert "AutoModelForCausalLM" not in text and "num_labels=1" in text
    assert "pipeline_tag: text-classification" in (tmp_path / "o/README.md").read_text()


def test_gguf_is_loaded_by_the_name_that_it_has(tmp_path):
    folder = tmp_path / "g"
    folder.mkdir()
    (folder / "toy-f16.gguf").write_bytes(b"GGUF")
    (folder / "Modelfile").write_text("FROM ./toy-f16.gguf\n")
    text = told(folder, tmp_path / "o")
    assert 'filename="toy-f16.gguf"' in text and "llama-cli -m model/toy-f16.gguf" in text
    assert "ollama create toy -f Modelfile" in text and "NAME" not in text


def test_a_variant_with_code_beside_a_model_without_is_refused(tmp_path):
    """transformers looks for code at the root of a repository only."""
    plain = tmp_path / "plain"
    shutil.copytree(ours(tmp_path / "m"), plain)
    change(plain / "config.json", auto_map={})
    with pytest.raises(UserError, match="code is loaded from the first folder only; push 'm' by itself"):
        told(plain, tmp_path / "o", variants=[str(tmp_path / "m")])
    told(tmp_path / "m", tmp_path / "o", variants=[str(plain)])


# as they are pasted


PASTE = """
import contextlib, io, json, os, shlex, sys
for folder, blocks in json.loads(sys.stdin.read()).items():
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    names = {}
    for kind, text in blocks:
        if kind == "python":
            exec(text, names)
            continue
        for words in map(shlex.split, text.splitlines()):
            print(folder, *words, flush=True)
            if words[0] == "hf":
                from huggingface_hub import snapshot_download
                snapshot_download(words[2], local_dir=words[words.index("--local-dir") + 1])
            elif words[0] == "llmkit" and words[1] != "grpo":
                from llmkit.cli import run_verb
                assert run_verb(words[1], words[2:]) == 0
            elif words[0] == "llmkit":
                from llmkit.align.grpo import is_classifier
                assert is_classifier("reward")
            else:
                assert words[0] == "vllm", words
    os.chdir("..")
"""


@pytest.mark.slow
def test_every_way_works_as_it_is_pasted(tmp_path):
    """Our model, its Qwen3 twin, an adapter, a reward model, an adapter with a reward head."""
    from llmkit.model.convert import to_plain

    base = chat_model(tmp_path / "base", bpe())
    to_plain(AutoModelForCausalLM.from_pretrained(base), "qwen3").save_pretrained(tmp_path / "qwen3")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "reward")
    for task, auto, name in (
        ("CAUSAL_LM", AutoModelForCausalLM, "lora"),
        ("SEQ_CLS", AutoModelForSequenceClassification, "head"),
    ):
        labels = {} if task == "CAUSAL_LM" else {"num_labels": 1}
        lora = LoraConfig(task_type=task, target_modules=["q_proj"])
        get_peft_model(auto.from_pretrained(base, **labels), lora).save_pretrained(tmp_path / name)
    for name in ("qwen3", "reward", "lora", "head"):
        bpe().save_pretrained(tmp_path / name)
    torch.manual_seed(0)
    with FakeHub() as server:
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        env = {key: value for key, value in os.environ.items() if key not in offline}
        env |= {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        found = {}
        for name in ("base", "qwen3", "reward", "lora", "head"):
            words = ["--model_name_or_path", str(tmp_path / name), "--hub_model_id", f"ann/{name}", "--license", "mit"]
            words += ["--base_model", "ann/base"] if name in ("lora", "head") else []
            words += ["--output_dir", str(tmp_path / "out" / name), "--dry_run", "false"]
            done = subprocess.run([sys.executable, "-m", "llmkit", "push", *words], env=env, capture_output=True)
            assert done.returncode == 0, done.stderr.decode()
            text = (tmp_path / "out" / name / "README.md").read_text()
            text = text.split("## How to load it\n")[1].split("\n## ")[0]
            found[str(tmp_path / f"at_{name}")] = re.findall(r"```(python|sh)\n(.*?)```", text, flags=re.S)
        code = [sys.executable, "-c", PASTE]
        ran = subprocess.run(code, input=json.dumps(found), env=env, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
        assert "run the custom code" not in ran.stdout + ran.stderr  # nothing asks at the keyboard
    shown = [shlex.split(line)[1:3] for line in ran.stdout.splitlines() if line.startswith(str(tmp_path))]
    for call in (["llmkit", "generate"], ["llmkit", "export"], ["llmkit", "merge"], ["hf", "download"]):
        assert call in shown
