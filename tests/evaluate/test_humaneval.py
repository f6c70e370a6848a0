"""HumanEval as lm-eval has it, on our code runner: right answers score 1.0, empty ones 0.0, in one batch."""

import json
import os
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks._yaml_loader import load_yaml

from llmkit.config import UserError
from llmkit.evaluate import coderunner, task_index

DATA_DIR = Path(os.environ.get("DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))
OURS = task_index.OURS / "humaneval" / "humaneval.yaml"
STOCK = Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"
ROWS = [
    {
        "task_id": f"Toy/{name}",
        "prompt": f"def {name}(x):\n",
        "entry_point": name,
        "canonical_solution": f"    return x {sign} 2\n",
        "test": f"def check(candidate):\n    assert candidate(3) == 3 {sign} 2\n",
    }
    for name, sign in (("add", "+"), ("times", "*"))
]


class Answers(LM):
    """Answers every prompt from its row."""

    device = "cpu"

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked = [request.args for request in requests]
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture(autouse=True)
def isolated():
    try:
        coderunner.probe()
    except UserError as error:
        pytest.skip(str(error))


def ask(data_dir: Path, work: Path, answer):
    """lm-eval's results and samples, and what was asked."""
    manager = task_index.make_manager(["humaneval"], None, data_dir, work)
    tasks = task_index.load(manager, ["humaneval"])["tasks"]
    lm = Answers(answer)
    found = lm_eval.evaluate(lm=lm, task_dict={"tasks": tasks}, confirm_run_unsafe_code=True, bootstrap_iters=0)
    return found["results"]["humaneval"], found["samples"]["humaneval"], lm.asked


def toy(tmp_path: Path) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "humaneval.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_all_but_who_runs_the_programs_is_stock():
    ours, stock = (load_yaml(path, resolve_func=False) for path in (OURS, STOCK))
    told_apart = ("metric_list", "filter_list", "process_docs")
    assert {k: v for k, v in ours.items() if k not in told_apart} == {
        k: v for k, v in stock.items() if k not in told_apart
    }
    assert [f["name"] for f in ours["filter_list"]] == [f["name"] for f in stock["filter_list"]] == ["create_test"]
    assert ours["unsafe_code"] is True


def test_answers_are_scored_one_by_one_and_run_together(tmp_path, monkeypatch):
    calls = []
    run_many = coderunner.run_many
    wrong = "    import os\n    os._exit(0)\n"
    answers = {"add": ROWS[0]["canonical_solution"], "times": wrong}
    manager = task_index.make_manager(["humaneval"], None, toy(tmp_path), tmp_path / "work")
    task = task_index.load(manager, ["humaneval"])["tasks"]["humaneval"]
    ours = task.config.metric_list[0]["metric"].__globals__
    monkeypatch.setitem(ours, "run_many", lambda programs: calls.append(len(programs)) or run_many(programs))
    monkeypatch.setitem(ours, "passed", {})
    found = lm_eval.evaluate(
        lm=(lm := Answers(lambda doc: answers[doc["entry_point"]])),
        task_dict={"tasks": {"humaneval": task}}, confirm_run_unsafe_code=True, bootstrap_iters=0,
    )  # fmt: skip
    samples = found["samples"]["humaneval"]
    assert found["results"]["humaneval"]["pass@1,create_test"] == 0.5 and calls == [2]
    assert {sample["doc"]["entry_point"]: sample["pass@1"] for sample in samples} == {"add": 1.0, "times": 0.0}
    assert samples[0]["filtered_resps"] == [[ROWS[0]["prompt"] + ROWS[0]["canonical_solution"]]]
    assert [context for context, _ in lm.asked] == [row["prompt"] for row in ROWS]


def test_without_consent_nothing_runs(tmp_path):
    manager = task_index.make_manager(["humaneval"], None, toy(tmp_path), tmp_path / "work")
    tasks = task_index.load(manager, ["humaneval"])["tasks"]
    with pytest.raises(ValueError, match="unsafe"):
        lm_eval.evaluate(lm=Answers(lambda doc: ""), task_dict={"tasks": tasks}, bootstrap_iters=0)


def test_where_programs_cannot_run_no_model_is_asked(tmp_path, monkeypatch):
    """Of lm-eval's own command line too: the task itself refuses to be set up."""
    monkeypatch.setattr(sys, "platform", "darwin")
    coderunner.probe.cache_clear()
    with pytest.raises(UserError, match="needs Linux"):
        ask(toy(tmp_path), tmp_path / "work", lambda doc: pytest.fail("asked"))


@pytest.mark.real
@pytest.mark.medium
@pytest.mark.parametrize("column, score", [("canonical_solution", 1.0), ("nothing", 0.0)])
def test_right_answers_score_one_and_empty_ones_nothing(column, score, tmp_path):
    if not (DATA_DIR / "humaneval.jsonl").is_file():
        pytest.skip(f"{DATA_DIR}/humaneval.jsonl is not there")
    results, samples, asked = ask(DATA_DIR, tmp_path, lambda doc: doc.get(column, ""))
    assert results["pass@1,create_test"] == score and len(samples) == len(asked) == 164
