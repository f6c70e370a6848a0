"""HumanEval: answers completed to programs, run shut off from this machine (coderunner.py), not by `code_eval`.

lm-eval scores item by item, but filters all answers at once: there they run, as many at a time as there are cores.
Differs from `code_eval` in that time is CPU time (3 s; there of the clock) and memory is limited (1 GiB a process).
"""

from typing import Any

from llmkit.evaluate.coderunner import probe, run_many

passed: dict[str, bool] = {}  # by program: from the filter to the metric


def refuse_early(docs: Any) -> Any:
    """The rows as they are; UserError before a model is asked, where its programs could not be run."""
    probe()
    return docs


def complete(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Prompt and answer, as lm-eval's own filter gives them; each is run with its tests. Raises UserError."""
    predictions = [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(resps, docs, strict=True)]
    targets = [f"{doc['test']}\ncheck({doc['entry_point']})" for doc in docs]
    _run([_program(p, target) for ps, target in zip(predictions, targets, strict=True) for p in ps])
    return predictions


def pass_at_1(references: list[str], predictions: list[list[str]]) -> dict[str, float]:
    """{"pass@1": share of one item's answers that pass its tests}."""
    programs = [_program(prediction, references[0]) for prediction in predictions[0]]
    _run(programs)
    return {"pass@1": sum(passed[program] for program in programs) / len(programs)}


def _program(prediction: str, target: str) -> str:
    return f"{prediction}\n{target}"


def _run(programs: list[str]) -> None:
    unknown = [program for program in dict.fromkeys(programs) if program not in passed]
    if unknown:
        outcomes = run_many(unknown)
        passed.update((program, o.status == "passed") for program, o in zip(unknown, outcomes, strict=True))
