"""The verb: what is printed and written, what is refused before anything is loaded, and the exit code."""

import io
import json
import sys
from xml.etree import ElementTree

import pytest
from tiny import bpe_tokenizer, chat_rows, llama

from llmkit import cli
from llmkit.check import runner, verb
from llmkit.check.attach import from_parts
from llmkit.check.report import CheckResult, Report
from llmkit.check.subject import NotRun
from llmkit.config import UserError
from llmkit.verbs import CheckConfig


def subject(eos: str = "<|im_end|>"):
    ids = {"<|im_end|>": 4, "</s>": 2}
    tokenizer = bpe_tokenizer(eos_token=eos)
    return from_parts(model=llama(eos_token_id=ids[eos]), tokenizer=tokenizer, dataset=chat_rows(8), chat=True)


def main(item=None, command=None, **settings) -> int:
    return verb.main(CheckConfig(**settings), item, command)


def refused(message: str, item=None, command=None, **settings) -> None:
    with pytest.raises(UserError, match=message):
        main(item, command, **settings)


# exit codes


def test_a_clean_subject_ends_in_0_and_a_broken_one_in_1(capsys):
    assert main(subject(), only="stop-token-missing") == 0
    assert main(subject("</s>"), only="stop-token-missing") == 1
    assert capsys.readouterr().out.count("FAIL  stop-token-missing") == 1


def test_a_check_that_did_not_run_ends_in_3(monkeypatch, capsys):
    def not_run(subject):
        raise NotRun("no control")

    check = runner.get_check("stop-token-missing")
    monkeypatch.setitem(runner._CHECKS, check.id, runner.Check(check.id, "tokenizer", 0, "K2", not_run))
    assert main(subject(), only="stop-token-missing") == 3
    assert "not run  stop-token-missing" in capsys.readouterr().out


def test_an_ignored_fail_warns_with_its_reason(capsys):
    ignore = [{"check": "stop-token-missing", "reason": "the server has its own stop list"}]
    assert main(subject("</s>"), only="stop-token-missing", check_ignore=ignore) == 0
    assert "ignored by check_ignore: the server has its own stop list" in capsys.readouterr().out


# outputs


def test_json_and_html_are_written_and_named(tmp_path, capsys):
    paths = {"json": str(tmp_path / "x.json"), "html": str(tmp_path / "x.html")}
    assert main(subject("</s>"), tier=0, **paths) == 1
    assert json.loads((tmp_path / "x.json").read_text())["summary"]["fail"] >= 1
    assert "stop-token-missing" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert f"json: {paths['json']}\nhtml: {paths['html']}\n" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["junit", "github"])
def test_another_format_is_all_there_is_on_stdout(format, capsys, monkeypatch):
    """Whatever a model of the user's prints while it is checked."""
    item = subject("</s>")
    item.model.register_forward_pre_hook(lambda *_: print("hello from my forward"))
    main(item, only="stop-token-missing,future-leak", format=format)
    out, err = capsys.readouterr()
    assert "hello" in err and "hello" not in out
    if format == "junit":
        assert len(ElementTree.fromstring(out)) == 2
    else:
        assert all(line.startswith("::") for line in out.splitlines())


def test_redact_holds_for_what_is_printed_and_written(tmp_path, capsys):
    item = subject()
    item.rows = [{"messages": [{"role": "user", "content": "zebra " * 30}, {"role": "assistant", "content": "ok"}]}]
    item.settings["max_length"] = 40
    paths = {"json": str(tmp_path / "x.json"), "html": str(tmp_path / "x.html")}

    def seen(**settings) -> str:
        assert main(item, only="answer-truncated", **paths, **settings) == 1
        return capsys.readouterr().out + "".join((tmp_path / name).read_text() for name in ("x.json", "x.html"))

    assert seen().count("zebra") >= 3  # control: console, JSON, page
    assert "zebra" not in seen(redact=True)


def test_characters_that_the_terminal_lacks_become_escapes(monkeypatch):
    """LANG=en_US.ISO-8859-1, or a Windows console."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    evidence = [{"text": "مرحبا  👍"}]
    report = Report("x", [CheckResult("a", "rows", 1, "fail", "m", evidence=evidence)])
    for format in ("text", "github", "junit"):
        assert verb.show(report, CheckConfig(format=format)) == 1
    assert b"\\u0645" in raw.getvalue()


def test_piped_output_has_no_progress_and_no_colour(capsys):
    main(subject(), only="tokenizer")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and err == ""


# what is refused, before anything is loaded


@pytest.mark.parametrize("key", ["json", "html"])
def test_a_file_that_could_not_be_written_is_refused_first(key, tmp_path):
    """`model_name_or_path` does not exist either: that would be told later."""
    refused(f"{key}=.*the folder .*nosuch.* does not exist", **{key: str(tmp_path / "nosuch" / "x")},
            model_name_or_path="/nosuch")  # fmt: skip
    refused("is a folder; name a file", **{key: str(tmp_path)}, model_name_or_path="/nosuch")


def test_wrong_names_are_refused_with_the_nearest(tmp_path):
    refused("'future-leek'; nearest: 'future-leak'", explain="future-leek")
    refused("'future-leek'; nearest: 'future-leak'", only="future-leek", model_name_or_path="/nosuch")
    refused("'future-leek'; nearest: 'future-leak'", demo="future-leek")
    refused("tier=4; allowed: 0, 1, 2, 3", tier=4)


def test_flags_that_would_be_ignored_are_refused():
    refused("--list stands alone; leave out --html", list=True, html="x.html")
    refused("--explain stands alone; leave out the command", command=["python"], explain="future-leak")
    refused("--max_length is not used with a command", command=["python", "x.py"], max_length=5)
    refused("--dataset is not used with a recipe", item=subject(), dataset="rows.jsonl")
    refused("nothing to check")


# what there is


def test_list_shows_every_check_once(capsys):
    assert main(list=True) == 0
    out = capsys.readouterr().out
    ids = [c.id for c in runner.all_checks()]
    assert sorted(ids) == sorted(
        line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "
    )
    assert f"{len(ids)} checks" in out


@pytest.mark.parametrize("item", runner.all_checks(), ids=lambda item: item.id)
def test_explain_shows_every_section(item, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(explain=item.id) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == item.id
    assert [line for line in lines if line in runner.SECTIONS] == list(runner.SECTIONS)
    assert max(map(len, lines)) <= 80


def test_demo_is_reached(capsys):
    assert main(demo="list") == 0
    assert "future-leak" in capsys.readouterr().out


# through the front desk


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    assert cli.main(["check", "--explain", "future-leek"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nearest: 'future-leak'" in err


def test_a_folder_is_checked_from_the_command_line(tmp_path, capsys):
    llama(eos_token_id=2).save_pretrained(tmp_path / "model")
    bpe_tokenizer(eos_token="</s>").save_pretrained(tmp_path / "model")
    words = ["check", "--model_name_or_path", str(tmp_path / "model"), "--chat", "--tier", "0"]
    assert cli.main(words) == 1
    assert "<|im_end|> is no stop token" in capsys.readouterr().out
