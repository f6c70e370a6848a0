"""Every planted bug is caught by the check that names it, and its twin without the bug passes that check."""

import pytest

from llmkit.check import runner
from planted.plant import Plant, all_plants


@pytest.mark.parametrize("item", all_plants().values(), ids=lambda item: item.name)
def test_planted_bug_is_caught_and_its_twin_passes(item: Plant, monkeypatch, tmp_path):
    for is_planted in (False, True):
        folder = tmp_path / str(is_planted)
        folder.mkdir()
        with monkeypatch.context() as patch:
            result = runner.run_one(runner.get_check(item.caught_by), item.build(is_planted, patch, folder))
        if is_planted:
            assert result.status == item.status, f"not caught: {result}"
            assert item.evidence.lower() in f"{result.measured} {result.evidence}".lower()
            assert result.fix
        else:
            assert result.status == "pass", f"false alarm: {result}"
