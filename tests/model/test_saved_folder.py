"""A saved folder holds everything: reloaded here, or in a process that has no llmkit, it is the same function."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_ids, tiny_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llmkit.model import LlmkitForCausalLM, LlmkitForSequenceClassification, LlmkitModel

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SHAPES = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "llama_like": dict(qk_norm=False, num_key_value_heads=2, head_dim=6),
    "nanochat_like": dict(hidden_act="relu2", final_logit_softcapping=1.5),
    "yarn": dict(rope_parameters=YARN),
    "linear": dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
}
STRANGER = """
import sys
sys.modules["llmkit"] = None  # `import llmkit` now raises, even if it is installed
import torch
from transformers import AutoModel, AutoModelForCausalLM
folder, ids, resaved = sys.argv[1], torch.load("ids.pt"), "resaved"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(resaved)
again = AutoModelForCausalLM.from_pretrained(resaved, trust_remote_code=True)
assert not any(name.startswith("llmkit") and module for name, module in sys.modules.items())
with torch.no_grad():
    outputs = {
        "logits": model(ids, use_cache=False).logits,
        "hidden": base(ids, use_cache=False).last_hidden_state,
        "resaved": again(ids, use_cache=False).logits,
        "generated": model.generate(ids, max_new_tokens=8, do_sample=False),
    }
torch.save(outputs, "outputs.pt")
"""


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reloaded_model_is_bit_equal_with_its_buffers(shape, tmp_path):
    model, ids = tiny_model(**shape), random_ids(2, 40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlmkitForCausalLM and not loaded.training
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "model.rotary_emb.inv_freq" in ours
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert type(AutoModel.from_pretrained(tmp_path)) is LlmkitModel


def test_rope_frequencies_stay_float32_in_a_bfloat16_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_model_saves_and_trains_one_tensor(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert ("lm_head.weight" in names) != tied
    assert "model.embed_tokens.weight" in names
    for m in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (m.lm_head.weight is m.model.embed_tokens.weight) == tied
        assert ("lm_head.weight" in dict(m.named_parameters())) != tied


def test_folder_carries_its_code_and_no_sampling_settings(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for auto, reference in config["auto_map"].items():
        module, cls = reference.split(".")
        assert f"class {cls}" in (tmp_path / f"{module}.py").read_text(), auto
    heads = {"AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"} | heads
    assert not {"temperature", "top_k", "top_p", "do_sample", "max_new_tokens"} & config.keys()
    assert AutoConfig.from_pretrained(tmp_path).head_dim == 8


@pytest.mark.medium
@pytest.mark.parametrize("shape", ["nanochat_like"])
def test_folder_runs_exactly_equal_in_a_process_without_llmkit(shape, tmp_path):
    model, ids = tiny_model(**SHAPES[shape]), random_ids(2, 12)
    folder, cwd = tmp_path / "model", tmp_path / "elsewhere"
    cwd.mkdir()
    model.save_pretrained(folder)
    torch.save(ids, cwd / "ids.pt")
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", STRANGER, str(folder)]  # -I: neither cwd nor PYTHONPATH is importable
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(cwd / "outputs.pt")
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state
    assert torch.equal(outputs["logits"], logits_of(model, ids))
    assert torch.equal(outputs["resaved"], outputs["logits"])
    assert torch.equal(outputs["hidden"], hidden)
    assert torch.equal(outputs["generated"], model.generate(ids, max_new_tokens=8, do_sample=False))
    assert {p.name for p in Path(cwd / "resaved").glob("*.py")} == {p.name for p in folder.glob("*.py")}


@pytest.mark.medium
def test_a_reward_model_loads_in_a_process_without_llmkit(tmp_path):
    """Its body once came from AutoModel, which refused to run the folder's code although that was allowed."""
    model, ids = LlmkitForSequenceClassification(tiny_model().config), random_ids(2, 12)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForSequenceClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "torch.save(model(torch.load('ids.pt')).logits.detach(), 'logits.pt')\n"
    )
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model.eval()(ids).logits)
