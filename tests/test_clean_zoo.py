"""Clean models are not called broken: no check fails on any of them, and nine of ten applicable checks pass."""

import pytest
from zoo import ANIMALS, animal

from llmkit.check import runner
from llmkit.check.attach import from_parts

# more than five seconds: a fresh process loads the code that travels with the folder
HEAVY = {"llmkit", "llmkit-relu2-softcap"}


@pytest.mark.medium
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in ANIMALS])
def test_a_clean_model_passes(name):
    model, tokenizer = animal(name)
    report = runner.run(from_parts(model=model, tokenizer=tokenizer), runner.Selection(tier=2))
    unclear = [(c.id, c.status, c.measured, c.evidence) for c in report.checks if c.status in ("fail", "not_run")]
    assert not unclear
    passed, applicable = report.count("pass"), len(report.checks) - report.count("not_applicable")
    assert passed >= 0.9 * applicable, [(c.id, c.measured) for c in report.checks if c.status == "warn"]
