"""What goes and what stays: an allow-list, and nothing in it that belongs to this machine."""

import hashlib
import json
import os
import pickle
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmkit.config import UserError
from llmkit.deploy.files import check_private, collect, find_kind, find_private, without_local_paths

FAKE_TOKEN = "hf_" + "z" * 34


def put(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def model(folder: Path, config: str = "{}", **texts: str) -> Path:
    put(folder, config__json=config, **texts)
    save_file({"w": np.ones(3, np.float32)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapter(folder: Path, base: str) -> Path:
    put(folder, adapter_config__json=json.dumps({"base_model_name_or_path": base, "r": 8}))
    save_file({"w": np.ones(3, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def names(folder: Path, into: str = "") -> list[str]:
    return [item.path for item in collect(folder, find_kind(str(folder))[1], into)[0]]


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def test_of_a_model_folder_only_what_is_on_the_list_goes(tmp_path):
    folder = model(
        tmp_path / "m", generation_config__json="{}", chat_template__jinja="x", tokenizer__json="{}",
        metrics__jsonl="{}", feedback__jsonl="{}", training_args__bin="x", optimizer__safetensors="x", notes__txt="x",
        README__md="x", run__log="x", setup__py="x",
    )  # fmt: skip
    (folder / ".env").write_text("secret")
    put(folder / ".git", config="x")
    put(folder / "additional_chat_templates", tools__jinja="x")
    items, stays = collect(folder, "model")
    assert [item.path for item in items] == [
        "additional_chat_templates/tools.jinja", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert stays == [
        ".env", ".git/config", "README.md", "feedback.jsonl", "metrics.jsonl", "notes.txt", "optimizer.safetensors",
        "run.log",
        "setup.py", "training_args.bin",
    ]  # fmt: skip


def test_code_goes_where_auto_map_names_it_and_what_it_imports_from_beside(tmp_path):
    mapped = {"AutoConfig": "conf.C", "AutoModel": "net.M", "AutoTokenizer": [None, "tok.T"], "X": "other/repo--far.F"}
    folder = model(
        tmp_path / "m", json.dumps({"auto_map": mapped}), conf__py="", net__py="from .parts import x\nimport os\n",
        parts__py="from .conf import C\n", tok__py="", unused__py="",
    )  # fmt: skip
    assert [n for n in names(folder) if n.endswith(".py")] == ["conf.py", "net.py", "parts.py", "tok.py"]
    (folder / "parts.py").unlink()
    assert "parts.py: is missing" in refusal(collect, folder, "model")


def test_a_run_folder_stands_for_its_model_and_exports_and_adapters_are_known(tmp_path):
    model(tmp_path / "run/model")
    put(tmp_path / "gguf", model__gguf="x", Modelfile="FROM ./model.gguf", notes__txt="", __half__gguf="x")
    adapter(tmp_path / "lora/adapter", "ann/base")
    assert find_kind(str(tmp_path / "run")) == (tmp_path / "run/model", "model")
    assert find_kind(str(tmp_path / "lora")) == (tmp_path / "lora/adapter", "adapter")
    assert names(tmp_path / "gguf", "q8") == ["q8/Modelfile", "q8/model.gguf"]
    assert names(tmp_path / "lora/adapter") == ["adapter_config.json", "adapter_model.safetensors"]
    assert "holds no config.json" in refusal(find_kind, str(tmp_path))
    assert "no such folder" in refusal(find_kind, str(tmp_path / "nowhere"))
    assert "no such folder" in refusal(find_kind, "ann/on-the-hub")


def test_a_pickle_is_never_published(tmp_path):
    folder = put(tmp_path, config__json="{}")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "pytorch_model.bin is a pickle, which is never published" in refusal(collect, folder, "model")


def test_weights_that_are_cut_or_incomplete_are_refused(tmp_path):
    folder = model(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert "model.safetensors: cannot be read" in refusal(collect, folder, "model")
    (folder / "model.safetensors").write_bytes(whole)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-2.safetensors, which is not there" in refusal(collect, folder, "model")


def test_a_link_that_leaves_the_folder_is_refused_and_one_inside_goes(tmp_path):
    folder = model(tmp_path / "m")
    put(tmp_path / "secret", tokenizer__json="{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret/tokenizer.json")
    assert "tokenizer.json: is a link that leaves the folder" in refusal(collect, folder, "model")
    (folder / "tokenizer.json").unlink()
    put(folder, tokenizer_config__json="{}")
    (folder / "special_tokens_map.json").symlink_to(folder / "tokenizer_config.json")
    assert "special_tokens_map.json" in names(folder)


def test_a_base_on_this_machine_becomes_its_hub_id_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "runs/base")
    for base in ("runs/base", str(tmp_path / "runs/base"), "../elsewhere/base"):
        items, _ = collect(adapter(tmp_path / "lora", base), "adapter")
        assert "base_model_name_or_path is a folder of this machine" in refusal(without_local_paths, items, None)
        changed, said = without_local_paths(items, "ann/base")
        assert json.loads(changed[0].read()) == {"base_model_name_or_path": "ann/base", "r": 8} and len(said) == 1
        assert changed[0].size == len(changed[0].read())
    assert "names no base" in refusal(without_local_paths, collect(adapter(tmp_path / "lora", ""), "adapter")[0], None)
    items, _ = collect(adapter(tmp_path / "lora", "qwen/Qwen3-0.6B"), "adapter")
    assert without_local_paths(items, "ann/base") == (items, [])
    items, _ = collect(model(tmp_path / "m", json.dumps({"_name_or_path": str(tmp_path)})), "model")
    changed, _ = without_local_paths(items, None)
    assert json.loads(changed[0].read()) == {}


@pytest.mark.parametrize(
    "text",
    [
        "/home/ann/x", "see /tmp/a.txt", "C:\\Users\\ann", "/root/model", str(Path.home() / "x"), tempfile.gettempdir(),
        f"'{os.getcwd()}/runs'", FAKE_TOKEN, "file:///home/ann/x", "node1:/home/ann/x",
    ],
)  # fmt: skip
def test_paths_of_a_machine_and_tokens_are_seen(text):
    assert find_private(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://x.org/home/ann",
        "and/or",
        "runs/toy/pretrain",
        "a/tmp/b",
        "/v1/chat",
        "hf_hub",
        "the root/tmp of it",
        "50/50",
    ],
)
def test_what_only_looks_like_one_is_spared(text):
    assert find_private(text) is None


@pytest.mark.parametrize(
    "file, text, where",
    [
        ("config.json", '{"a": {"b": ["x", "/home/ann/m"]}}', "a.b.1"),
        ("tokenizer_config.json", '{"name_or_path": "/tmp/tok"}', "name_or_path"),
        ("chat_template.jinja", "{# ok #}\n{# /home/ann/t.jinja #}", "line 2"),
        ("tokenizer_config.json", f'{{"token": "{FAKE_TOKEN}"}}', "token"),
        ("tokenizer_config.json", '{"name_or_path": "/data/models/m"}', "name_or_path"),
        ("generation_config.json", "{", "is no JSON"),
        ("tokenizer_config.json", '["x"]', "holds a list"),
    ],
)
def test_what_would_tell_something_is_refused_by_file_and_key(file, text, where, tmp_path):
    folder = model(tmp_path / "m")
    (folder / file).write_text(text)
    line = refusal(check_private, collect(folder, "model")[0])
    assert line.startswith(f"{file}: ") and where in line and FAKE_TOKEN not in line


@pytest.mark.parametrize("text, said", [("{", "is no JSON"), ("[1]", "holds a list"), ('{"a": "\xe9"}', "is no JSON")])
def test_a_config_that_is_broken_is_one_line(text, said, tmp_path):
    folder = model(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    line = refusal(without_local_paths, collect(folder, "model")[0], None)
    assert line.startswith("config.json: ") and said in line and "\n" not in line


def test_headers_of_weights_are_looked_at_too(tmp_path):
    folder = model(tmp_path / "m")
    save_file({"w": np.ones(1)}, folder / "model.safetensors", {"made_of": "/home/ann/run"})
    assert refusal(check_private, collect(folder, "model")[0]).startswith("model.safetensors: made_of holds")
    place = str(tmp_path).encode()
    put(tmp_path / "g", x__gguf="")
    (tmp_path / "g/x.gguf").write_bytes(b"GGUF" + os.getcwd().encode() + b"/runs" + place)
    if len(Path.cwd().parts) > 2:
        assert "its header holds" in refusal(check_private, collect(tmp_path / "g", "gguf")[0])


def test_a_vocabulary_may_hold_any_text(tmp_path):
    """A tokenizer of code knows /home/ann as a token: that is no path of this machine."""
    folder = model(tmp_path / "m")
    held = {"model": {"vocab": {"/home/ann": 5}, "merges": ["/tmp /x"]}, "added_tokens": [{"content": "/home/x"}]}
    put(folder, tokenizer__json=json.dumps(held), vocab__json='{"/home/ann": 1}', merges__txt="/home /ann")
    check_private(collect(folder, "model")[0])


def test_hashes_are_those_of_the_hub(tmp_path):
    """git's own word for a blob, and sha256 of the bytes."""
    (item,) = [i for i in collect(model(tmp_path / "m"), "model")[0] if i.path == "model.safetensors"]
    sha256, blob = item.hashes()
    assert sha256 == hashlib.sha256(item.source.read_bytes()).hexdigest()
    told = subprocess.run(["git", "hash-object", str(item.source)], capture_output=True, text=True)
    assert blob == told.stdout.strip()
