"""Finds the silent bugs of anyone's causal LM, tokenizer, template, data set and trainer, on a laptop, in a minute.

    report = llmkit.check.run(trainer)          # or model=, tokenizer=, dataset=, args=, ...
    report.raise_on_fail()

Nothing of what is checked has changed afterwards. Stands alone: imports only `config`, `run` and `hardware` of llmkit.
"""

from typing import Any


def run(trainer: Any = None, **parts: Any) -> Any:
    """Checks a live Trainer, or the parts that are given; returns a `Report`. See `attach.run_python` for the parts."""
    from .attach import run_python

    return run_python(trainer, **parts)
