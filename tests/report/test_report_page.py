"""The report says what the files of the runs say, whatever state they are in, and no text in them can harm it."""

import copy
import io
import itertools
import json
import re
from pathlib import Path

import pytest
from example_runs import NAMES, comparison, write, write_family, write_lines, write_run
from rich.console import Console

from llmkit import cli
from llmkit.config import UserError
from llmkit.report import runs
from llmkit.report.curves import loss_plot, read_curves, reward_plots, thin
from llmkit.report.report import default_page, gather, page, print_summary
from llmkit.report.svg import APART, Y0, Line, lines, ticks
from llmkit.report.verdict import differences

FLAG = re.compile(r'class="flag (\w+)"')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_family(tmp_path / "toy")
    return tmp_path / "toy"


def report(*folders: Path) -> dict:
    return gather([str(folder) for folder in folders])


def change(root: Path, edit) -> None:
    """Rewrites comparison.json as `edit(comparison)` leaves it."""
    found = comparison(root)
    edit(found)
    write(root / "eval" / "comparison.json", found)


def alone(html: str, anchor: str) -> str:
    """The part of a page from one heading to the next."""
    return html.split(f'<h2 id="{anchor}">')[1].split("<h2")[0]


# the verdict


def test_the_verdict_says_who_lost_and_who_gained_what(root):
    bad, good = report(root)["verdict"]
    assert bad == (
        "grpo lost more than the noise on 2 of 6 (toyworld_spelling −0.080, loss on stories +0.0126); "
        "sft on 1 of 6 (loss on stories +0.0128); 1 regression prompt fails; 2 recorded answers changed; "
        "2 alarms in grpo."
    )
    assert good == "sft gained on 5 of 6 (most: toyworld_facts +1.000); dpo on 2 of 6 (most: toyworld_unknown +0.129)."


def test_the_answer_comes_first_then_the_benchmarks_then_the_rest(root):
    html = page(report(root))
    marks = ['class="verdict"', "grpo lost against dpo", 'class="chain"', 'id="benchmarks"', 'id="lineage"']
    marks += ['id="curves"', 'id="rewards"', 'id="alarms"', 'id="prompts"', 'id="checks"', 'id="fingerprints"']
    places = [html.index(mark) for mark in [*marks, 'id="sizes"', 'id="contamination"', 'id="commands"']]
    assert places == sorted(places)


def test_a_loss_is_marked_by_sign_and_word_with_its_interval(root):
    table = alone(page(report(root)), "benchmarks")
    row = re.search(r"toyworld_spelling</bdi>.*?</tr>", table, re.S)[0]
    assert FLAG.findall(row) == ["gained", "same", "lost"]
    last = row.split("<td")[-1]
    assert "<b>0.820</b>" in last and "±0.019" in last and "✗ lost" in last and "−0.080" in last
    assert "[−0.110, −0.050]" in last


def test_perplexity_stands_beside_the_true_entropy(root):
    row = re.search(r"stories</bdi>.*?</tr>", alone(page(report(root)), "benchmarks"), re.S)[0]
    assert "true entropy 0.2230 (perplexity 1.25)" in row  # exp(0.2230)
    assert "<b>0.2403</b>" in row and "perplexity 1.272" in row  # exp(0.2403)


def test_without_a_loss_the_verdict_says_so(root):
    def calm(found):
        found["regression"]["prompts"] = []
        for row in [*found["tasks"], *found["shards"]]:
            row["pairs"] = [pair | {"flag": None} for pair in row["pairs"]]

    change(root, calm)
    (root / "grpo" / "alerts.jsonl").unlink()
    assert report(root)["verdict"] == [
        "No stage lost more than the noise against its parent.",
        "No stage gained more than the noise.",
    ]


def test_without_an_evaluation_nothing_is_called_compared(root):
    figures = report(root / "pretrain", root / "sft")
    assert figures["verdict"] == ["No evaluation compares these stages."]
    assert f"llmkit eval {root}/pretrain {root}/sft" in page(figures)
    assert 'id="benchmarks"' not in page(figures) and "0.2230" in alone(page(figures), "own")


def test_a_group_of_many_tasks_counts_as_a_whole(root):
    """57 tasks of one benchmark would give three false alarms each time."""

    def grow(found):
        tasks = found["tasks"]
        found["tasks"] = [copy.deepcopy(tasks[1]) | {"name": f"part_{i}"} for i in range(13)]
        found["groups"][0]["pairs"][2]["flag"] = None

    change(root, grow)
    figures = report(root)
    assert not any("part_" in line for line in figures["regressions"])
    assert "grpo lost more than the noise on 1 of 3 (loss on stories" in figures["verdict"][0]  # group and two shards
    shown = alone(page(figures), "benchmarks")
    assert "part_" not in shown.split("<details>")[0] and "part_12" in shown  # folded, and there all the same


def test_a_small_group_counts_where_none_of_its_tasks_lost(root):
    def only_the_group(found):
        found["groups"][0]["pairs"][2]["flag"] = "lost"
        found["tasks"][1]["pairs"][2]["flag"] = None

    change(root, only_the_group)
    lost = [line for line in report(root)["regressions"] if line.startswith("grpo against")]
    assert [line.split(": ")[1].split(" −")[0] for line in lost][:1] == ["toyworld"]
    change(root, lambda found: found["groups"][0]["pairs"][2].update(flag="lost"))
    assert not any("dpo: toyworld −" in line for line in report(root)["regressions"])


def test_a_difference_to_another_column_than_the_parent_is_shown_and_not_counted(root):
    """The harness compares a column without a parent with the first one."""

    def orphan(found):
        found["columns"][3]["parent"] = None
        for row in [*found["tasks"], *found["groups"], *found["shards"]]:
            row["pairs"][-1]["against"] = "pretrain"

    change(root, orphan)
    figures = report(root)
    assert not any(line.startswith("grpo against") for line in figures["regressions"])
    assert "against <bdi>pretrain</bdi>" in alone(page(figures), "benchmarks").split("toyworld_spelling")[1]


def test_how_they_were_asked_is_said_once_where_it_is_the_same_for_all(root):
    """The harness writes a value for every column."""

    def by_column(found):
        found["how"]["bos"] = dict.fromkeys(NAMES, "<|bos|>")
        found["how"]["templates_borrowed"] = {"pretrain": "sft"}
        found["how"]["notes"] = ["pretrain is asked in the template of sft"]

    change(root, by_column)
    said = re.sub("<[^>|]+>", "", alone(page(report(root)), "benchmarks"))
    assert "BOS before a prompt &lt;|bos|&gt;; " in said and "templates borrowed pretrain: sft; " in said
    assert "note pretrain is asked in the template of sft" in said and "window of raw text 256 tokens" in said
    assert "examples before the question as each task says; items of each task at most all" in said
    assert "toyworld_sums: as a chat, generate, 0 examples before it, builtin/toyworld sums" in said


def test_flags_by_chance_are_announced(root):
    table = alone(page(report(root)), "benchmarks")
    assert "Of 21 such comparisons about 1 are flagged by chance alone." in table  # 7 rows, 3 pairs each, 5 %


# regression prompts


def test_a_failing_prompt_counts_at_the_end_of_the_chain_or_where_the_parent_passed(root):
    def fails(answers):
        return [{"name": "q", "prompt": "?", "expect": "", "answers": {
            name: {"answer": "x", "passed": passed, "recorded": None, "changed": False}
            for name, passed in zip(NAMES, answers, strict=True)
        }}]  # fmt: skip

    counted = {
        (False, True, True, True): [],  # a base model cannot chat
        (False, False, False, False): ["grpo"],
        (True, False, False, True): ["sft"],
        (True, True, True, False): ["grpo"],
    }
    for answers, expected in counted.items():
        change(root, lambda found, a=answers: found["regression"].update(prompts=fails(a)))
        lines_ = [line for line in report(root)["regressions"] if "prompt q fails" in line]
        assert [line.split(":")[0] for line in lines_] == expected


def test_prompts_are_named_once_for_each_stage_and_first_among_what_fails(root):
    found = [one["what"] for one in report(root)["findings"] if one["at"] == "prompts"]
    dpo = "dpo answers the regression prompt count otherwise than recorded"
    assert found == ["grpo fails the regression prompt where", dpo]

    def fail_more(found):
        answer = {"answer": "", "passed": False, "recorded": "x", "changed": True}
        found["regression"]["prompts"] = [
            {"name": f"p{i}", "answers": {"dpo": dict(answer), "grpo": dict(answer)}} for i in range(5)
        ]

    change(root, fail_more)
    found = [one["what"] for one in report(root)["findings"] if one["at"] == "prompts"]
    every = "5 regression prompts (p0, p1, p2, p3, …)"
    assert found == [f"grpo fails {every}", f"dpo answers {every} otherwise than recorded"]


def test_old_and_new_answers_stand_beside_each_other_with_what_differs(root):
    shown = alone(page(report(root)), "prompts")
    assert "<p>old</p><pre" in shown and "the Esk</pre><p>new</p>" in shown
    assert "<del>Esk</del><ins>river Esk.</ins>" in shown
    assert shown.index("<h3><bdi>where</bdi></h3>") < shown.index("1 as before") < shown.index("<bdi>colour</bdi></h3>")
    assert "has<del>·</del><ins>··</ins>4." in shown.replace("<bdi>", "").replace("</bdi>", "")


# exit codes and words


@pytest.mark.parametrize(
    "edit",
    [lambda f: f["regression"].update(prompts=[]),
     lambda f: [f["shards"].clear(), f["tasks"].clear(), f["groups"].clear()]],
    ids=["lost", "prompt"],
)  # fmt: skip
def test_fail_on_regression_is_exit_1_for_either_kind(root, edit, capsys):
    change(root, edit)
    assert cli.main(["report", str(root)]) == 0
    assert "regressed" not in capsys.readouterr().out
    assert cli.main(["report", "--fail_on_regression", str(root)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"\nregressed grpo(: regression prompt where fails| against dpo: toyworld_spelling −0.080)", out)
    assert out.endswith("\n3 regressions\n")


def test_fail_on_regression_is_exit_0_where_nothing_got_worse(root, capsys):
    def calm(found):
        found["regression"]["prompts"] = []
        found["shards"] = []
        found["tasks"][1]["pairs"][2]["flag"] = None

    change(root, calm)
    assert cli.main(["report", str(root), "--fail_on_regression"]) == 0


def test_fail_on_regression_without_an_evaluation_is_no_success(root, capsys):
    assert cli.main(["report", str(root / "sft"), "--fail_on_regression"]) == 2
    assert "so nothing was compared" in capsys.readouterr().err
    (root / "eval" / "comparison.json").write_text("{")
    assert cli.main(["report", str(root), "--fail_on_regression"]) == 2


def test_an_evaluation_that_still_runs_is_no_run_and_is_named(root):
    (root / "eval" / "comparison.json").unlink()
    figures = report(root)
    assert [s["name"] for s in figures["stages"]] == NAMES
    assert f"{root}/eval: comparison.json is missing" in [one["what"] for one in figures["findings"]]


def test_a_corpus_keeps_its_own_page(tmp_path, capsys):
    write(tmp_path / "corpus" / "manifest.json", {"stage": "data"})
    assert cli.main(["report", str(tmp_path / "corpus")]) == 2
    assert not (tmp_path / "corpus" / "report.html").exists()


def test_page_and_json_are_written_where_they_are_asked_for(root, capsys):
    out = root.parent
    words = [str(root / "sft"), str(root / "eval"), "--html", f"{out}/a.html", "--json", f"{out}/a.json"]
    assert cli.main(["report", *words]) == 0
    figures = json.loads((out / "a.json").read_text(), parse_constant=pytest.fail)
    assert (out / "a.html").read_text().startswith("<!doctype html>")
    assert figures["verdict"] and [stage["name"] for stage in figures["stages"]] == ["sft"]
    assert f"{out}/a.html and {out}/a.json" in capsys.readouterr().out


def test_the_page_goes_to_the_folder_that_the_words_share(root, monkeypatch):
    assert default_page([str(root)]) == root / "report.html"
    assert default_page([str(root / "sft"), str(root / "eval")]) == root / "report.html"
    monkeypatch.chdir(root)
    assert default_page(["sft", "dpo"]) == Path("report.html")
    assert default_page(["sft", "/"]) == Path("report.html")


@pytest.mark.parametrize(
    "words, said",
    [([], "runs is missing"), (["nowhere"], "no such folder"), (["empty"], "it holds no folder"),
     (["file"], "is a file"), (["toy/sft", "--html", "no/where.html"], "name a file in a folder that exists")],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_one_line(root, words, said, monkeypatch, capsys):
    monkeypatch.chdir(root.parent)
    Path("empty").mkdir()
    Path("file").write_text("")
    assert cli.main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_folder_of_folders_stands_for_the_runs_in_it_each_once(root):
    write(root / "corpus" / "manifest.json", {"stage": "data"})
    write(root / "corpus" / "result.json", {"stage": "data", "status": "ok"})
    (root / "tokenizer").mkdir()
    write(root / "data" / "store" / "manifest.json", {"num_tokens": 3})
    figures = report(root, root / "sft", root / "." / "eval")
    assert [stage["name"] for stage in figures["stages"]] == NAMES
    assert len(figures["evals"]) == 1 and list(figures["corpora"]) == [str(root / "corpus")]


# lineage


def test_parents_come_before_their_children_in_whatever_order_they_are_named(root):
    figures = report(*(root / name for name in ("grpo", "sft", "dpo", "pretrain")))
    assert [(s["name"], s["parent_name"]) for s in figures["stages"]] == [
        ("pretrain", None), ("sft", "pretrain"), ("dpo", "sft"), ("grpo", "dpo"),
    ]  # fmt: skip


def test_runs_that_were_moved_keep_their_lineage(root):
    moved = root.rename(root.parent / "backup")
    assert [s["parent_name"] for s in report(moved)["stages"]] == [None, "pretrain", "sft", "dpo"]
    assert [c["stage_name"] for c in report(moved)["evals"][0]["columns"]] == NAMES


def test_a_run_of_another_family_is_no_parent_by_its_name_alone(root):
    write_run(root.parent / "other" / "sft", "sft", [], "runs/gone/pretrain")
    figures = report(root / "pretrain", root.parent / "other" / "sft")
    assert [s["parent_name"] for s in figures["stages"]] == [None, None]
    assert "<bdi>runs/gone/pretrain</bdi>" in page(figures).split("</ol>")[1]


def test_a_second_child_begins_a_line_of_its_own(root):
    write_run(root / "kto", "kto", [], str(root / "sft" / "model"))
    figures = report(root)
    assert next(s for s in figures["stages"] if s["name"] == "kto")["parent_name"] == "sft"
    html = page(figures)
    assert html.count('<ol class="chain"') == 2


def test_runs_that_name_each_other_end_no_report(root):
    write_run(root / "sft", "sft", [], str(root / "dpo"))
    assert sorted(s["name"] for s in report(root)["stages"]) == sorted(NAMES)


def test_runs_of_one_name_are_told_apart(root):
    write_run(root.parent / "other" / "sft", "sft", [])
    names = [s["name"] for s in report(root / "sft", root.parent / "other" / "sft")["stages"]]
    assert sorted(names) == ["other/sft", "toy/sft"]


# runs in any state


def test_a_run_without_an_end_is_shown_as_such(root):
    (root / "sft" / "result.json").unlink()
    (root / "dpo" / "result.json").write_text('{"stage": "dpo", ')
    write_run(root / "grpo", "grpo", [{"step": 7, "loss": 1.0}], str(root / "dpo"), status="failed")
    with (root / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 510, "loss": 0.')
    figures = report(root)
    assert [s["status"] for s in figures["stages"]] == ["ok", "unfinished", "broken", "failed"]
    bad = figures["verdict"][0]
    assert bad.startswith(
        "sft has not finished (no result.json); dpo is broken (result.json cannot be read); grpo failed"
    )
    html = page(figures)
    assert "1 of 51 lines of metrics.jsonl are no JSON and left out" in html  # 50 whole ones
    assert "last logged at step 500" in html and "✗ unfinished" in html


def test_numbers_that_are_not_finite_are_counted_and_never_drawn(root):
    rows = [{"step": n, "loss": float("nan") if n == 3 else 5.0 - n, "num_tokens": n} for n in range(1, 5)]
    write_run(root / "sft", "sft", rows, str(root / "pretrain"), metrics={"score": float("inf")})
    figures = report(root)
    stage = figures["stages"][1]
    assert stage["curves"]["series"]["loss"] == [[1, 4.0], [2, 3.0], [4, 1.0]]
    assert "1 numbers in metrics.jsonl are not finite" in stage["problems"][0] and stage["metrics"] == {}
    json.dumps(figures, allow_nan=False)


def test_a_stage_that_trains_nothing_needs_no_metrics(root):
    write_run(root / "quantise", "quantise", [], str(root / "sft"), tokens=0)
    (root / "quantise" / "metrics.jsonl").unlink()
    assert report(root / "quantise")["stages"][0]["problems"] == []
    write_run(root / "quantise", "quantise", [], str(root / "sft"), tokens=9)
    (root / "quantise" / "metrics.jsonl").unlink()
    assert report(root / "quantise")["stages"][0]["problems"] == ["metrics.jsonl is missing"]


def test_an_empty_folder_of_metrics_is_a_run(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "metrics.jsonl").write_text("")
    html = page(report(tmp_path))
    assert "manifest.json is missing" in html and "unknown, there is no check.json" in html


def replaced(value, path=()):
    """The value with each part in turn missing or of another type."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []:
        for other in (None, "x", 10**400, [3], {"a": 1}):
            yield (*path, key), other
        yield from replaced(value[key], (*path, key))


@pytest.mark.medium
@pytest.mark.parametrize("file", ["eval/comparison.json", "sft/result.json", "sft/manifest.json", "sft/check.json"])
def test_no_field_of_any_type_breaks_the_page(root, file):
    for name in ("dpo", "grpo"):  # they add time and no kind of field
        for path in (root / name).iterdir():
            path.unlink()
        (root / name).rmdir()
    (root / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    (root / "pretrain" / "metrics.jsonl").write_text("")
    whole = json.loads((root / file).read_text())
    if file.startswith("eval"):
        whole["tasks"], whole["shards"] = whole["tasks"][1:2], whole["shards"][:1]
        whole["columns"], whole["regression"]["prompts"] = whole["columns"][:2], whole["regression"]["prompts"][1:2]
        for row in [*whole["tasks"], *whole["groups"], *whole["shards"]]:
            row["pairs"], row["scores"] = row["pairs"][:1], {name: row["scores"][name] for name in NAMES[:2]}
    for path, other in replaced(whole):
        broken = copy.deepcopy(whole)
        at = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = other
        write(root / file, broken)
        figures = report(root)
        assert page(figures), (path, other)
        print_summary(figures, Console(file=io.StringIO()))
        json.dumps(figures, allow_nan=False)


def test_text_from_outside_is_never_markup(root):
    harm = "<script>alert(1)</script><img src=x onerror=a>\u202e"

    def poison(found):
        found["tasks"][0]["name"] = found["tasks"][0]["metric"] = found["tasks"][0]["data"] = harm
        found["how"]["bos"] = found["how"][harm] = harm
        for prompt in found["regression"]["prompts"]:
            prompt |= {"name": harm, "prompt": harm, "expect": harm}
            prompt["answers"]["sft"] |= {"answer": harm, "recorded": f"{harm} x", "changed": True, "note": harm}

    change(root, poison)
    write_run(root / "dpo", "dpo", [{"step": n, "loss": n, harm: n, f"eval_{harm}_loss": n} for n in (1, 2)],
              str(root / "sft"), command=[harm, "--x"], git_commit=harm, hardware=harm, engine=harm, started=harm,
              metrics={harm: 1.0}, shards={harm: {"loss": 1.0}}, versions={harm: harm})  # fmt: skip
    write_lines(root / "dpo" / "alerts.jsonl", [{"step": 1, "kind": harm, "message": harm}])
    check = {"id": harm, "status": "fail", "title": harm, "measured": harm, "fix": harm}
    write(root / "dpo" / "check.json", {"checks": [check]})
    (root / "dpo" / "recipe.yaml").write_text(json.dumps({"datasets": [{"path": harm}]}))
    html = page(report(root))
    assert html.count("&lt;script&gt;") > 20 and "\u202e" not in html
    assert "<script" not in html and "<img" not in html and "http" not in html.replace("http-equiv", "")


# curves


def test_thinning_keeps_the_ends_and_every_extreme():
    points = [[x, x * 7919 % 1000] for x in range(100_000)]
    points[0][1] = points[-1][1] = 500  # neither the lowest nor the highest around
    points[54_321][1], points[54_322][1] = 9999, -7
    kept = thin(points, 300)
    assert len(kept) <= 302 and kept == sorted(kept)
    assert all(points[x] in kept for x in (0, 99_999, 54_321, 54_322))
    assert thin(points[:300], 300) == points[:300]


def test_evaluations_stand_at_the_tokens_that_were_seen(tmp_path):
    rows = [{"step": 0, "eval_a_loss": 3.0}, {"step": 10, "loss": 2.0, "num_tokens": 500},
            {"step": 10, "eval_a_loss": 1.0, "samples": ["text"]}]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", rows)
    found = read_curves(tmp_path / "metrics.jsonl")
    assert found["x"] == "tokens" and found["series"] == {"eval_a_loss": [[0.0, 3.0], [500, 1.0]], "loss": [[500, 2.0]]}
    write_lines(tmp_path / "metrics.jsonl", [{"step": 4, "loss": 1.0}])
    assert read_curves(tmp_path / "metrics.jsonl")["x"] == "step"


def stage_of(series: dict, stage: str = "sft", shards: dict | None = None) -> dict:
    return {"name": "x", "stage": stage, "shards": shards or {}, "curves": {"x": "tokens", "series": series}}


def test_the_loss_plot_has_every_shard_with_its_true_entropy():
    series = {"loss": [[1, 3.0], [9, 0.3]], "eval_a_loss": [[9, 0.4]], "eval_b_loss": [[1, 2.0], [9, 0.5]]}
    plot = loss_plot(stage_of(series, shards={"a": {"entropy": 0.2}, "b": {"entropy": None}}))
    assert "dotted: the true entropy" in plot and "dotted" not in loss_plot(stage_of(series))
    assert plot.count("<polyline") == 2 and plot.count('class="level') == 1
    assert all(f">{label}</text>" in plot for label in ("train 0.3", "a 0.4", "b 0.5"))
    assert "nats per token" in plot and "nats per token" not in loss_plot(stage_of(series, "dpo"))


def test_lines_are_told_apart_without_colour_and_their_names_never_overlap():
    drawn = [Line(f"s{i}", [[0, 1.0], [1, i / 1e4]]) for i in range(9)]
    plot = lines(drawn, "t", "tokens", "y")
    names = [float(y) for y in re.findall(r'<text class="of [^"]*" x="[^"]*" y="([^"]*)"', plot)]
    assert len(names) == 9 and all(b - a >= APART - 0.11 for a, b in itertools.pairwise(names))
    assert max(names) <= Y0 + 4  # 4 px below the middle of its text: none leaves the plot
    assert len(set(re.findall(r'polyline class="line (k\d)"', plot))) == 6


def test_a_curve_that_never_moves_is_a_line_of_text():
    (figure,) = reward_plots(stage_of({"kl": [[0, 0.5], [1, 0.5]]}))
    assert "0.5 throughout" in figure and "<svg" not in figure


def test_reward_curves_are_found_by_trls_names():
    moving = [[0, 0.0], [1, 1.0]]
    keys = ("rewards/chosen", "rewards/rejected", "eval_questions_rewards/chosen", "eval_mean_token_accuracy",
            "rewards/exact_match/mean", "reward", "unheard_of")  # fmt: skip
    plots = "".join(reward_plots(stage_of(dict.fromkeys(keys, moving))))
    for label in ("chosen 1", "rejected 1", "chosen ques… 1", "reward 1", "exact_match 1"):
        assert f">{label}</text>" in plots, label
    assert plots.count("<figure>") == 3 and "Next token right" in plots and "Chosen above" not in plots


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.2, 1, [-3, -2, -1, 0, 1]),
        (0.29, 0.31, [0.29, 0.295, 0.3, 0.305, 0.31]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


# what else may explain a number


def test_differences_between_the_runs_are_pointed_out(root):
    write_run(root / "sft", "sft", [], str(root / "pretrain"),
              hardware="cpu (AMD EPYC), 2 threads, float32, 0.05 TFLOP/s peak",
              versions={"torch": "2.12.0", "trl": "1.16.0"})  # fmt: skip
    said = differences(report(root / "pretrain", root / "sft", root / "grpo"))
    assert "sft has another tokenizer than pretrain" in said
    assert "torch: 2.13.0 (pretrain, grpo); 2.12.0 (sft)" in said
    assert "hardware: cpu (AMD EPYC), 2 threads, float32 (pretrain, sft); cuda (NVIDIA L4), bfloat16 (grpo)" in said
    assert any("reached 0.2 TFLOP/s before pretrain and 0.05 before sft" in line for line in said)


def test_speeds_of_different_hardware_are_not_compared(root):
    assert "Measured on different hardware" in alone(page(report(root)), "sizes")
    assert "Measured on different hardware" not in alone(page(report(root / "pretrain", root / "sft")), "sizes")
    assert ">1,000<" in alone(page(report(root)), "sizes")  # 50,000 tokens in 50 s


def test_an_evaluation_older_than_its_run_is_doubted(root):
    write_run(root / "dpo", "dpo", [], str(root / "sft"), started="2026-01-03T10:00:00+0000")
    found = [one["what"] for one in report(root)["findings"]]
    assert f"dpo was started again after {root}/eval evaluated it" in found
    assert not any(one.startswith("sft was started again") for one in found)


def test_what_was_not_evaluated_or_was_cut_is_said(root):
    def cut(found):
        found["columns"] = found["columns"][:3]
        found["tasks"][2]["scores"]["sft"]["num_cut"] = 8  # of 350: 2.3 %

        found["how"]["limit"] = 50

    change(root, cut)
    write_run(root / "overfit", "sft", [], str(root / "pretrain"), overfit=1000)
    found = [one["what"] for one in report(root)["findings"]]
    assert "only 50 items of each task were asked" in found
    assert "not evaluated: grpo" in found  # and not the test run
    assert "sft: 8 of 350 items of toyworld_sums were cut to fit" in found


def test_contamination_is_what_the_corpus_says_and_else_unknown(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    reasons = [
        {"fate": "dropped", "reason": "contaminated", "count": 7},
        {"fate": "dropped", "reason": "short", "count": 9},
        {"fate": "seen", "reason": "contaminated", "count": 50},
    ]
    sources = [{"role": "train", "store": "train"}, {"role": "validation", "store": "web"}]
    write(root.parent / "corpus" / "report.json", {"reasons": reasons, "sources": sources, "boilerplate": ["a"]})
    benchmark = {"path": "json", "data_files": "gsm8k.jsonl"}
    write(root.parent / "corpus" / "recipe.yaml", {"benchmark_datasets": [benchmark], "decontaminate": True})
    (root / "pretrain" / "recipe.yaml").write_text("datasets:\n- {path: corpus/train}\n- {path: elsewhere}\n")
    said = re.sub("<[^>]+>", "", alone(page(report(root)), "contamination"))
    assert "corpus/train: 7 documents were dropped that held text of shard web, json gsm8k.jsonl; 1 texts" in said
    assert "elsewhere: unknown, there is no report of `llmkit data` for it" in said
    write(root.parent / "corpus" / "recipe.yaml", {"decontaminate": False})
    assert "unknown, corpus was made with decontaminate: false" in re.sub("<[^>]+>", "", page(report(root)))


def test_checks_list_what_warned_and_say_where_none_ran(root):
    shown = alone(page(report(root)), "checks")
    assert "! WARN <bdi>pad-trained</bdi>" in shown and "3 of 50 rows" in shown and "→ mask it" in shown
    assert "1 passed, 1 warned" in shown and shown.count("unknown, there is no check.json") == 3


def test_the_commands_reproduce_it_in_order(root):
    shown = alone(page(report(root)), "commands")
    places = [shown.index(f"llmkit {verb}") for verb in ("pretrain", "sft", "dpo", "grpo", "eval", "report")]
    assert places == sorted(places)


def test_the_summary_fits_80_columns(root):
    written = io.StringIO()
    print_summary(report(root), Console(width=80, file=written))
    table = written.getvalue().split("\n\n")[1].splitlines()
    assert all(len(line) <= 80 for line in table)
    assert any(re.search(r"toyworld_spelling +0\.000 +0\.912 gained +0\.900 +0\.820 lost", line) for line in table)


def test_words_must_name_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        gather([str(tmp_path / "x")])


def test_a_run_that_learns_by_heart_is_no_stage(tmp_path):
    for name, overfit in (("sft", None), ("sft-overfit", 32)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"stage": "sft", "overfit": overfit}))
        (tmp_path / name / "result.json").write_text("{}")
    folders, _, _ = runs.find([str(tmp_path)])
    assert [folder.name for folder in folders] == ["sft"]
    folders, _, _ = runs.find([str(tmp_path / "sft-overfit")])  # named, it is shown
    assert [folder.name for folder in folders] == ["sft-overfit"]


def test_an_export_beside_its_run_is_no_stage_of_its_own(tmp_path):
    """Three exports of the toy models stood in the chain, and were said to be not evaluated."""
    for name, stage in (("sft", "sft"), ("gguf", "export"), ("merged", "merge")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"stage": stage}))
    assert [folder.name for folder in runs.find([str(tmp_path)])[0]] == ["merged", "sft"]
    assert [folder.name for folder in runs.find([str(tmp_path / "gguf")])[0]] == ["gguf"]  # named, it is shown
