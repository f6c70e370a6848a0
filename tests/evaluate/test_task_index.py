"""Which tasks there are, and stock definitions on local files."""

import json

import pytest

from llmkit.config import UserError
from llmkit.evaluate import task_index
from llmkit.evaluate.task_index import expand, find_file, leaves, load, make_manager

ARC = {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy"}


def rows(path, *found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_sets_stand_for_their_tasks_once():
    assert expand(["toyworld", "gsm8k", "toyworld_recall"])[-1] == "gsm8k"
    assert expand(["core"])[:2] == ["arc_easy", "piqa"] and set(expand(["core"])) < set(expand(["full"]))


def test_ours_need_no_stock_index(tmp_path, monkeypatch):
    import lm_eval.tasks

    real, asked = lm_eval.tasks.TaskManager, []
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **k: asked.append(k["include_defaults"]) or real(**k))
    manager = make_manager(expand(["toyworld"]), None, None, tmp_path)
    assert asked == [False]
    kinds = {"facts", "spelling", "story", "sums", "system", "turns", "unknown"}
    assert set(leaves("toyworld_answers", manager.task_index)) == {f"toyworld_{kind}" for kind in kinds}


def test_toyworlds_questions_are_those_that_no_stage_trains_on(tmp_path):
    from llmkit.data import toychat

    tasks = load(make_manager(expand(["toyworld"]), None, None, tmp_path), expand(["toyworld"]))["tasks"]
    docs = [doc for name, task in tasks.items() if hasattr(task, "process_results") for doc in task.eval_docs]
    asked = [doc for doc in docs if "messages" in doc]
    assert len(asked) == 7 * 300 and len(docs) == len(asked) + 120 + 300
    trained = {json.dumps(toychat.row("prompts", "train", k)["prompt"]) for k in range(3000)}
    assert not trained & {json.dumps(list(doc["messages"])) for doc in asked}


def test_a_right_answer_is_right_word_for_word(tmp_path):
    task = load(make_manager(["toyworld_sums"], None, None, tmp_path), ["toyworld_sums"])["tasks"]["toyworld_sums"]
    doc = task.eval_docs[0]
    for said, score in ((doc["answer"], 1.0), (f" {doc['answer']}\n", 1.0), (doc["answer"] + " And more.", 0.0)):
        assert task.process_results(doc, [said]) == {"exact_match": score}


NAMES = """
arc_easy_test.jsonl  ai2_arc_test.json  ai2_arc_ARC-Easy_test.csv  arc_easy.jsonl
allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet  ai2_arc/data/test.jsonl
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_files_are_found_under_the_names_that_people_use(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert find_file("arc_easy", ARC, "test", True, tmp_path) == path


def test_a_file_without_a_split_is_what_is_scored(tmp_path):
    (tmp_path / "arc_easy.jsonl").touch()
    assert find_file("arc_easy", ARC, "train", False, tmp_path) is None


@pytest.mark.medium
def test_a_stock_task_reads_local_rows_and_changes_in_nothing_else(tmp_path):
    """gsm8k: its prompt with five examples of the local training rows, its filters and metric."""
    asked, said = "How many legs have {} dogs?", "There are {} legs.\n#### {}"
    shown = [{"question": asked.format(n), "answer": said.format(4 * n, 4 * n)} for n in range(30)]
    rows(tmp_path / "gsm8k_train.jsonl", *shown[:20])
    rows(tmp_path / "gsm8k_test.jsonl", *shown[20:])
    manager = make_manager(["gsm8k"], None, tmp_path, tmp_path / "work")
    task = load(manager, ["gsm8k"])["tasks"]["gsm8k"]
    assert len(task.eval_docs) == 10 and task.config.num_fewshot == 5
    task.set_fewshot_seed(seed=1)
    prompt = task.fewshot_context(task.eval_docs[0], 5)
    assert prompt.endswith("Question: How many legs have 20 dogs?\nAnswer:") and prompt.count("Question: ") == 6
    stock = load_stock()
    ours = task.config.to_dict()
    for key in ("doc_to_text", "doc_to_target", "generation_kwargs", "filter_list", "metric_list", "num_fewshot"):
        assert json.dumps(ours[key], default=str) == json.dumps(stock[key], default=str)


def load_stock():
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml", resolve_func=True)


@pytest.mark.medium
def test_unknown_names_and_absent_data_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="tasks: 'hellaswog' is unknown; nearest: hellaswag"):
        make_manager(["hellaswog"], None, None, tmp_path)
    manager = make_manager(["arc_easy"], None, tmp_path, tmp_path / "work")
    with pytest.raises(UserError, match=r"'arc_easy': its data cannot be read .* arc_easy_test.jsonl .* --data_dir"):
        load(manager, ["arc_easy"])
    assert "mmlu_anatomy" in set(leaves("mmlu", manager.task_index))  # a group of tags of tasks


def test_definitions_of_your_own(tmp_path):
    mine = tmp_path / "mine"
    rows(mine / "rows.jsonl", {"q": "one", "a": "two"})
    mine.joinpath("t.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {mine}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: [two, three]\ndoc_to_target: '{{a}}'\n"
    )
    task = load(make_manager(["mine"], str(mine), None, tmp_path), ["mine"])["tasks"]["mine"]
    assert task_index.describe_data(task) == f"{mine}/rows.jsonl"
    with pytest.raises(UserError, match="include_path='nowhere': no such folder"):
        make_manager(["mine"], "nowhere", None, tmp_path)
    mine.joinpath("t.yaml").write_text("task: mine\ndataset_path: json\noutput_type: generate_untill\n")
    with pytest.raises(UserError, match=r"task 'mine': cannot be set up .*; mend .*t.yaml"):
        load(make_manager(["mine"], str(mine), None, tmp_path), ["mine"])


def test_code_of_a_model_runs_only_shut_off_and_when_asked(tmp_path, monkeypatch):
    manager = make_manager(["humaneval", "toyworld_recall"], None, None, tmp_path)
    asked = []
    monkeypatch.setattr("llmkit.evaluate.coderunner.probe", lambda: asked.append(1))
    task_index.check_code(manager, ["toyworld_recall"], is_allowed=False)
    with pytest.raises(UserError, match=r"task 'humaneval' runs code that the model wrote; .* --allow_code_execution"):
        task_index.check_code(manager, ["toyworld_recall", "humaneval"], is_allowed=False)
    assert not asked
    task_index.check_code(manager, ["humaneval"], is_allowed=True)
    assert asked == [1]  # before any answer is asked for
    mine = tmp_path / "mine"
    mine.mkdir()
    mine.joinpath("t.yaml").write_text("task: humaneval\nunsafe_code: true\ndataset_path: json\n")
    with pytest.raises(UserError, match="task 'humaneval' runs code that the model wrote with all your rights"):
        task_index.check_code(make_manager(["humaneval"], str(mine), None, tmp_path), ["humaneval"], is_allowed=True)
    rows(tmp_path / "humaneval.jsonl", {"prompt": "", "test": "", "entry_point": ""})
    local = make_manager(["humaneval"], None, tmp_path, tmp_path / "work")
    assert str(local.task_index["humaneval"].yaml_path).startswith(str(tmp_path))
    task_index.check_code(local, ["humaneval"], is_allowed=True)
    mine.joinpath("t.yaml").write_text("task: mine\nunsafe_code: true\ndataset_path: json\n")
    with pytest.raises(
        UserError, match="task 'mine' runs code that the model wrote with all your rights; allowed: humaneval"
    ):
        task_index.check_code(make_manager(["mine"], str(mine), None, tmp_path), ["mine"], is_allowed=True)


def test_the_wheel_has_our_tasks():
    """They are no Python: without package-data a wheel came without them."""
    tomllib, setuptools = pytest.importorskip("tomllib"), pytest.importorskip("setuptools")
    root = task_index.OURS.parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    packed = {name.replace(".", "/") for name in setuptools.find_namespace_packages(str(root), include=["llmkit*"])}
    for path in (path for path in task_index.OURS.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        inside = path.relative_to(root)
        assert str(inside.parent) in packed and (path.suffix == ".py" or any(path.match(p) for p in patterns)), inside
