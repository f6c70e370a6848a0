"""The ways in, and that a mistake there is one line and exit code 2."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file
from tiny import bpe_tokenizer, chat_rows, llama

from llmkit import cli
from llmkit.check import attach
from llmkit.check.attach import from_parts
from llmkit.config import UserError
from llmkit.verbs import CheckConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama(vocab_size=len(bpe_tokenizer()), pad_token_id=0).save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def check(*words: object) -> int:
    return cli.main(["check", *map(str, words)])


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("llmkit: ")
    return captured.err


def test_a_clean_folder_passes_and_leaves_json(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(8)))
    out = tmp_path / "out.json"
    code = check("--model_name_or_path", folder, "--dataset", rows, "--chat", "--tier", 3, "--json", out)
    report = json.loads(out.read_text())
    assert code == 0, [c for c in report["checks"] if c["status"] in ("fail", "not_run")]
    assert report["version"] == 1 and report["summary"]["fail"] == 0 and report["summary"]["pass"] > 25
    assert {c["tier"] for c in report["checks"]} == {0, 1, 2, 3}
    assert "passed" in capsys.readouterr().out


def test_a_broken_folder_is_exit_1_and_the_console_says_why(copy, capsys):
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|late|>"]})
    tokenizer.save_pretrained(copy)
    assert check("--model_name_or_path", copy, "--tier", 0) == 1
    out = capsys.readouterr().out
    assert "ids-beyond-embedding" in out and "<|late|>" in out and "resize_token_embeddings" in out


def test_nothing_to_check(capsys):
    assert check() == 2
    assert "nothing to check" in one_line(capsys)


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert check("--model_name_or_path", tmp_path) == 2
    assert "has no config.json" in one_line(capsys)
    assert check("--model_name_or_path", tmp_path / "missing") == 2
    assert "no such folder" in one_line(capsys)


def test_a_model_with_its_own_code_is_not_run_unasked(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "somebodys"}))  # not ours: unknown here
    (tmp_path / "configuration_llmkit.py").write_text("open('/nowhere/ran', 'w')")
    assert check("--model_name_or_path", tmp_path) == 2
    assert "--trust_remote_code" in one_line(capsys)


def test_pickled_weights_are_refused_with_the_safe_way(copy, capsys):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert check("--model_name_or_path", copy) == 2
    line = one_line(capsys)
    assert "pytorch_model.bin" in line and "save_pretrained" in line


@pytest.mark.parametrize("keep", [4, 200, -7])
def test_a_checkpoint_cut_short(copy, keep, capsys):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert check("--model_name_or_path", copy) == 2
    assert "cut short" in one_line(capsys)


def test_a_shard_that_is_missing(copy, capsys):
    (copy / "model.safetensors").rename(copy / "model-00002-of-00002.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check("--model_name_or_path", copy) == 2
    assert "model-00001-of-00002.safetensors" in one_line(capsys)


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"question": "x", "label": 1}\n', "no usable column in ['label', 'question']"),
        ("", "holds no rows"),
        ("{broken\n", "cannot be read"),
        ("[1, 2]", "holds no rows"),
    ],
)
def test_a_data_set_that_cannot_be_used(folder, tmp_path, content, said, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content)
    assert check("--model_name_or_path", folder, "--dataset", rows) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--only", "future-leek"], "nearest: 'future-leak'"),
        (["--tier", "7"], "allowed: 0, 1, 2, 3"),
        (["--json", "/no/such/folder/x.json"], "does not exist"),
        (["--check_ignore", "[{check: future-leak}]"], "expected {check: NAME, reason: TEXT}"),
        (["--check_ignore", "[{check: future-leak, reason: ''}]"], "no reason"),
        (["--peft_adapter", "/no/such"], "no such folder"),
        (["--max_lenght", "7"], "nearest: 'max_length'"),
    ],
)
def test_wrong_flags(folder, words, said, capsys):
    assert check("--model_name_or_path", folder, *words) == 2
    assert said in one_line(capsys)


def test_alpaca_and_from_value_rows_become_messages():
    alpaca = attach.with_trl_columns({"instruction": "Add", "input": "1 2", "output": "3"})
    assert [m["content"] for m in alpaca["messages"]] == ["Add\n\n1 2", "3"]
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert attach.with_trl_columns({"conversations": turns, "id": 3}) == {
        "id": 3,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    }
    assert attach.with_trl_columns({"text": "x"}) == {"text": "x"}


def test_an_ignored_fail_is_a_warning_with_its_reason():
    model = llama(vocab_size=8)
    from llmkit.check import run

    options = {"only": "ids-beyond-embedding", "tokenizer": bpe_tokenizer()}
    assert run(model=model, **options).exit_code == 1
    report = run(model=model, ignore=[{"check": "ids-beyond-embedding", "reason": "rows come later"}], **options)
    assert report.exit_code == 0 and "rows come later" in report["ids-beyond-embedding"].fix


def test_a_folder_may_be_given_to_python_too(folder):
    subject = from_parts(model=folder)
    assert subject.tokenizer is not None and subject.model is None and subject.config.vocab_size == 330
    with pytest.raises(UserError, match="no such folder"):
        attach.from_folder(CheckConfig(model_name_or_path="./missing"))
