"""What a column is: the files on this disk, their hash, and which other column it came from."""

import json

import pytest
import tiny

from llmkit.config import UserError
from llmkit.evaluate.columns import find_columns, lineage


def model(folder, seed=0, bos=False):
    tiny.llama(seed).save_pretrained(folder)
    tiny.bpe_tokenizer(bos=bos).save_pretrained(folder)
    return folder


def run(folder, stage, parent=None, seed=0):
    model(folder / "model", seed)
    (folder / "manifest.json").write_text(json.dumps({"stage": stage, "parent": parent and str(parent)}))
    return folder


def test_runs_are_named_by_their_folder_and_know_their_parents(tmp_path):
    base, sft = run(tmp_path / "base", "pretrain"), None
    sft = run(tmp_path / "sft", "sft", base, 1)
    dpo = run(tmp_path / "dpo", "dpo", sft / "model", 2)  # named by its model folder
    columns = find_columns([str(base), str(sft / "model"), str(dpo)])
    assert [(c.name, c.parent) for c in columns] == [("base", None), ("sft", "base"), ("dpo", "sft")]
    assert [path.name for path in lineage(dpo)] == ["dpo", "sft", "base"]


def test_an_ancestor_stands_in_for_a_parent_that_is_not_asked(tmp_path):
    base = run(tmp_path / "base", "pretrain")
    sft = run(tmp_path / "sft", "sft", base, 1)
    dpo = run(tmp_path / "dpo", "dpo", sft, 2)
    assert [c.parent for c in find_columns([str(base), str(dpo)])] == [None, "base"]
    assert [c.parent for c in find_columns([str(sft), str(base)])] == ["base", None]


def test_equal_names_are_told_apart_by_what_is_above_them(tmp_path):
    names = [str(run(tmp_path / where / "sft", "sft", seed=k)) for k, where in enumerate(("old", "new"))]
    assert [c.name for c in find_columns(names)] == ["old-sft", "new-sft"]


def test_a_folder_wins_over_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "gpt2")
    (column,) = find_columns(["gpt2"])  # sockets are closed here: the Hub would be an error
    assert column.model_dir == "gpt2" and column.run is None


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_fingerprint_is_of_all_that_decides_an_answer(tmp_path, file):
    folder = model(tmp_path / "m")
    (before,) = find_columns([str(folder)])
    content = bytearray((folder / file).read_bytes())
    content[-2] ^= 1
    (folder / file).write_bytes(content)
    (after,) = find_columns([str(folder)])
    assert before.fingerprint != after.fingerprint
    (folder / "README.md").write_text("about")
    assert find_columns([str(folder)])[0].fingerprint == after.fingerprint


def test_mistakes_are_one_line(tmp_path):
    folder = model(tmp_path / "m")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for names, expected in [
        ([str(folder), f"{folder}/"], "is named twice"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "adapter")], "is an adapter; write one model of it and its base first: llmkit merge"),
        ([str(tmp_path / "empty")], "has no config.json and no model/"),
    ]:
        with pytest.raises(UserError, match=expected):
            find_columns(names)
