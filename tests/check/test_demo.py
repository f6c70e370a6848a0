"""`llmkit check --demo NAME`: every demo shows its bug being caught, offline, with the base install."""

import subprocess
import sys

import pytest

from llmkit.check.demo import DEMOS, Demo, checked, run_demo
from llmkit.check.runner import FAMILIES, get_check
from llmkit.config import UserError

OPTIONAL = ("trl", "peft", "datasets", "accelerate")
BASE_INSTALL = f"""
import importlib.machinery, importlib.util, sys
find = importlib.machinery.PathFinder.find_spec
hidden = {OPTIONAL!r}
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] in hidden else find(name, *rest)
)
assert not any(map(importlib.util.find_spec, hidden))
from llmkit.check.demo import run_demo
sys.exit(max(map(run_demo, sys.argv[1:])))
"""


@pytest.mark.parametrize("item", DEMOS.values(), ids=lambda item: item.name)
def test_the_bug_is_caught_and_the_toy_without_it_passes(item):
    clean, planted = checked(item, is_planted=False), checked(item, is_planted=True)
    assert clean.status == "pass", clean
    assert planted.status == "fail" and planted.evidence and planted.fix, planted
    assert checked(item, is_planted=False).status == "pass"  # nothing of the bug is left behind


def test_demos_cover_every_family_that_the_base_install_can_show():
    assert {get_check(name).family for name in DEMOS} == set(FAMILIES) - {"trainer"}


def test_what_is_planted_is_shown_as_it_stands_in_a_few_lines():
    assert DEMOS["initial-loss"].code == "torch.nn.init.normal_(toy.model.lm_head.weight)"
    for item in DEMOS.values():
        lines = item.code.splitlines()
        assert 1 <= len(lines) <= 9 and max(map(len, lines)) <= 100, item.name
        assert item.what.endswith(".") and "\n" not in item.what


def test_a_demo_says_what_was_planted_and_that_it_was_caught(capsys):
    assert run_demo("generation-prompt-mismatch") == 0
    out = capsys.readouterr().out
    for text in ("planted", "seen as", "toy.tokenizer.chat_template = ", "without the bug\nok", "with the bug\nFAIL"):
        assert text in out
    assert out.index("with the bug") < out.index("\ncaught (") < out.index("--explain generation-prompt-mismatch")


def test_a_bug_that_slips_through_is_not_called_caught(capsys, monkeypatch):
    def nothing(toy):
        """Nothing is planted."""
        del toy

    monkeypatch.setitem(DEMOS, "text-lost", Demo("text-lost", nothing, is_saved=False))
    assert run_demo("text-lost") == 1
    assert "not caught" in capsys.readouterr().out


def test_list_names_every_demo(capsys):
    assert run_demo("list") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == list(DEMOS)


def test_an_unknown_demo_names_the_nearest():
    with pytest.raises(UserError, match="'future-leek'; nearest: 'future-leak'; `llmkit check --demo list`"):
        run_demo("future-leek")
    with pytest.raises(UserError, match="'zzz'; `llmkit check --demo list`"):
        run_demo("zzz")


@pytest.mark.medium
def test_demos_need_no_more_than_the_base_install():
    done = subprocess.run([sys.executable, "-c", BASE_INSTALL, *DEMOS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
