"""`llmkit eval` from end to end, on tiny models that know nothing."""

import json
import shutil

import pytest
import tiny
import torch

from llmkit import cli
from llmkit.evaluate import verb

TASKS = "toyworld_recall,toyworld_facts"


def model(folder, seed=0, chat=True):
    tiny.llama(seed).save_pretrained(folder)
    tiny.bpe_tokenizer(bos=True, chat=chat).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    return [model(tmp_path / "base", 0, chat=False), model(tmp_path / "tuned", 1)]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(out, *words, tasks=TASKS, limit=12):
    flags = ["--output_dir", str(out), "--limit", str(limit), "--use_cpu"]
    return cli.main(["eval", *words, *(["--tasks", tasks] if tasks else []), *flags])


def comparison(out):
    return json.loads((out / "comparison.json").read_text())


def the_line(words, capsys):
    capsys.readouterr()
    assert cli.main(["eval", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_two_models_side_by_side(pair, out, capsys):
    assert run(out, *pair) == 0
    found = comparison(out)
    assert [c["name"] for c in found["columns"]] == ["base", "tuned"]
    assert found["how"]["templates_borrowed"] == {"base": "tuned"}
    recall, facts = found["tasks"]
    assert (recall["name"], recall["is_chat"], recall["kind"], recall["num_items"]) == (
        "toyworld_recall",
        False,
        "choice",
        12,
    )
    assert (facts["is_chat"], facts["stops"]) == (True, ["\n\n", "\nQ:", "<|im_end|>"])
    for name in ("base", "tuned"):
        rows = [json.loads(line) for line in (out / f"columns/{name}/samples/toyworld_recall.jsonl").open()]
        assert sum(row["acc"] for row in rows) / 12 == recall["scores"][name]["value"]
    (difference,) = recall["pairs"]
    values = [recall["scores"][name]["value"] for name in ("tuned", "base")]
    assert difference["difference"] == pytest.approx(values[0] - values[1])
    first = json.loads((out / "columns/tuned/prompts/toyworld_facts.json").read_text())
    assert first["text"].startswith("<|im_start|>user\n")
    assert first["ids"][:2] == [1, 3]  # one BOS, then <|im_start|>: what the model gets
    result = json.loads((out / "result.json").read_text())
    assert result["stage"] == "eval" and result["metrics"]["toyworld_recall/tuned"] == values[0]
    assert "asked     tasks that generate are asked as chats; <s> opens a prompt" in capsys.readouterr().out


def test_what_is_there_is_not_asked_again(pair, out, monkeypatch, capsys):
    run(out, pair[0])
    before = comparison(out)
    monkeypatch.setattr(verb.Job, "load", lambda *_: pytest.fail("loaded a model"))
    assert run(out, pair[0]) == 0
    assert comparison(out)["tasks"] == before["tasks"] and "all there already" in capsys.readouterr().out
    with pytest.raises(BaseException, match="loaded a model"):
        run(out, pair[0], limit=13)  # another question


def test_rows_of_local_files_decide_whether_a_task_is_asked_again(pair, out, tmp_path, capsys):
    """Local data goes through a definition at a temporary path, and its functions lie at new addresses each time."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "t.yaml").write_text(
        "task: mine\ndataset_path: me/mine\ntest_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: two\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "filter_list: [{name: f, filter: [{function: custom, filter_fn: !function utils.first}]}]\n"
    )
    (mine / "utils.py").write_text("def first(resps, docs):\n    return [answers[0] for answers in resps]\n")
    data = mine / "mine_test.jsonl"
    data.write_text('{"q": "one"}\n{"q": "two"}\n')
    words = [pair[1], "--include_path", str(mine), "--data_dir", str(mine)]
    for second, said in (("two", False), ("two", True), ("old", False)):
        data.write_text(f'{{"q": "one"}}\n{{"q": "{second}"}}\n')
        capsys.readouterr()
        assert run(out, *words, tasks="mine") == 0
        assert ("all there already" in capsys.readouterr().out) is said, second


def test_a_later_stage_joins_and_leaves_the_rest_alone(pair, out):
    run(out, pair[1])
    written = (out / "columns/tuned/results.json").stat().st_mtime_ns
    run(out, *pair)
    assert (out / "columns/tuned/results.json").stat().st_mtime_ns == written
    assert len(comparison(out)["columns"]) == 2


def test_results_of_another_model_are_not_mixed_in(pair, out, capsys):
    run(out, pair[0])
    shutil.rmtree(pair[0])
    line = the_line([model(pair[0], seed=5), "--tasks", TASKS, "--output_dir", str(out)], capsys)
    assert "columns/base: holds results of another model" in line and "remove that folder" in line


def test_prompts_that_do_not_fit_are_said(pair, out, capsys):
    run(out, pair[1], "--max_length", "60", tasks="toyworld_story", limit=5)
    score = comparison(out)["tasks"][0]["scores"]["tuned"]
    assert score["num_cut"] == 5
    said = "cut       toyworld_story, tuned: 5 prompts did not fit into the context and lost their beginning"
    assert said in capsys.readouterr().out


def test_mistakes_are_one_line(pair, out, tmp_path, capsys):
    base, tuned = pair
    for words, expected in [
        ([], "models is missing; name run folders"),
        ([base], "tasks is missing; name some"),
        ([base, "--tasks", "toyworld_recal"], "'toyworld_recal' is unknown; nearest: toyworld_recall"),
        ([base, "--tasks", TASKS, "--apply_chat_template"], "none of the models has a chat template"),
        ([tuned, "--tasks", TASKS, "--limit", "0"], "limit=0; allowed: 1 or more"),
        ([tuned, "--tasks", TASKS, "--data_dir", "nowhere"], "data_dir='nowhere': no such folder"),
        ([tuned, "--tasks", TASKS, "--accept"], "accept=true has no effect without regression"),
        (
            [tuned, "--tasks", "toyworld_facts", "--max_length", "40"],
            "48 tokens, and the context of tuned has 40",
        ),
    ]:
        assert expected in the_line([*words, "--output_dir", str(out)], capsys)
    weights = tiny.llama()
    weights.model.norm.weight.data[0] = float("nan")
    weights.save_pretrained(tuned)
    assert "tuned: the model's logits are NaN" in the_line([tuned, "--tasks", TASKS, "--output_dir", str(out)], capsys)


def test_raw_text_is_compared_document_by_document(pair, out, tmp_path):
    lines = [f"The {a} {b} sings. One {a} {b}!" for a in tiny.WORDS for b in tiny.WORDS[:3]]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    entry = {"path": "text", "data_files": str(tmp_path / "text.txt"), "sample_by": "line", "shard": "words"}
    better = tiny.llama(0)
    with torch.no_grad():
        better.lm_head.weight *= 0  # every token equally likely: better than noise
    better.save_pretrained(pair[1])
    assert run(out, *pair, "--eval_datasets", json.dumps([entry]), "--window", "32", tasks=None) == 0
    (row,) = comparison(out)["shards"]
    assert (row["name"], row["window"], row["num_documents"], row["unit"]) == ("words", 32, 60, "nats per token")
    assert row["scores"]["tuned"]["loss"] == pytest.approx(torch.tensor(424.0).log().item(), abs=1e-4)
    assert row["pairs"][0]["flag"] == "gained" and row["num_bytes"] == sum(map(len, lines))


def test_shards_of_the_runs_are_found_by_their_lineage(pair, out, tmp_path):
    (tmp_path / "text.txt").write_text("The red cat.\n\nOne blue dog.")
    for name, stage, parent in (("base", "pretrain", None), ("tuned", "sft", "base")):
        folder = tmp_path / "runs" / name
        shutil.copytree(tmp_path / name, folder / "model")
        manifest = {"stage": stage, "parent": parent and str(tmp_path / "runs" / parent)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "runs/base/recipe.yaml").write_text(
        f"max_length: 20\ndata_dir: {tmp_path}\neval_datasets: [{{path: text, data_files: text.txt, shard: mine}}]\n"
    )
    run(out, str(tmp_path / "runs/base"), str(tmp_path / "runs/tuned"), tasks=None)
    found = comparison(out)
    assert [c["parent"] for c in found["columns"]] == [None, "base"]
    assert [(row["name"], row["window"]) for row in found["shards"]] == [("mine", 20)]


def test_regression_prompts_are_kept_compared_and_accepted(pair, out, tmp_path, capsys):
    prompts = tmp_path / "p.yaml"
    prompts.write_text("- {name: one, prompt: The red, max_new_tokens: 4, expect: {not_contains: zebra}}\n")
    words = [pair[1], "--regression", str(prompts)]
    assert run(out, *words, tasks=None) == 0
    assert run(out, *words, "--accept", tasks=None) == 0
    accepted = json.loads((tmp_path / "p.accepted.json").read_text())
    assert run(out, *words, tasks=None) == 0
    accepted["columns"]["tuned"]["one"] = "something else"
    (tmp_path / "p.accepted.json").write_text(json.dumps(accepted))
    capsys.readouterr()
    assert run(out, *words, tasks=None) == 1
    said = capsys.readouterr().out
    assert "something else" in said and "1 of 1 accepted answers changed" in said
    assert comparison(out)["regression"]["prompts"][0]["answers"]["tuned"]["changed"] is True


def test_raw_text_in_another_dtype_is_scored_again(pair, out, tmp_path):
    (tmp_path / "text.txt").write_text("The red cat.\n\nOne blue dog.")
    entry = json.dumps([{"path": "text", "data_files": str(tmp_path / "text.txt"), "shard": "words"}])
    losses = []
    for dtype in ("float32", "bfloat16"):
        run(out, pair[0], "--eval_datasets", entry, "--dtype", dtype, tasks=None)
        losses.append(comparison(out)["shards"][0]["scores"]["base"]["loss"])
    assert losses[0] != losses[1]
