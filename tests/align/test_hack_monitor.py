"""The monitor: its measures against answers one by one; its files, its alarms and what a run that goes on knows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tiny import bpe_tokenizer, llama

from llmkit.align import monitor as module
from llmkit.align.hacking import Selection
from llmkit.align.monitor import Monitor, _some_texts, _worst, answer_logps, sample_ids, score
from llmkit.align.rewards import Reward, get_rewards
from llmkit.config import UserError
from llmkit.data.sources import parse_sources
from llmkit.run import LOGS, Run
from llmkit.tuning import GrpoConfig

# [prompt ids, answer ids] of different lengths
ROWS = [[[5, 6, 7], [8, 9]], [[10], [11, 12, 13, 14, 4]], [[20, 21, 22, 23, 24, 25], [4]]]


def model(seed=0):
    """Larger weights than usual, or all tokens are about equally likely."""
    return llama(seed, initializer_range=0.3)


def alone(model, prompt, answer):
    """Log-probabilities of an answer in a batch of its own, read off token by token."""
    with torch.no_grad():
        logps = model.eval()(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return [logps[len(prompt) + k - 1, token].item() for k, token in enumerate(answer)]


# ---- measures


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_logps_of_answers_are_those_without_padding(batch_size):
    it = model().train()
    found = answer_logps(it, ROWS, batch_size)
    assert it.training  # as it was
    for row, (prompt, answer) in zip(found, ROWS, strict=True):
        assert row.dtype == np.float64
        assert row == pytest.approx(alone(it, prompt, answer), abs=1e-5)  # float32
    answer_logps(it.eval(), ROWS, 2)
    assert not it.training


def test_sampled_answers_end_with_their_end_and_fit():
    tokenizer, it = bpe_tokenizer(), model()
    torch.manual_seed(0)
    answers = sample_ids(it, tokenizer, [[5, 6], [7]] * 32, 200)
    assert len(answers) == 64 and all(len(answer) <= 200 for answer in answers)
    ended = [answer for answer in answers if answer[-1] == 4]
    assert ended and all(4 not in answer[:-1] for answer in answers)
    assert all(len(answer) == 200 for answer in answers if answer not in ended)


def test_scores_of_answers_by_name_with_the_columns_of_the_rows():
    rewards = get_rewards(["exact_answer", "numeric_answer"])
    chats = [{"prompt": [{"role": "user", "content": "?"}], "answer": a, "row": 7} for a in ("4", "red")]
    for rows in (chats, [row | {"prompt": "?"} for row in chats]):
        found = score(rewards, rows, ["4", "4"])
        assert found["exact_answer"].tolist() == [1, 0]
        assert found["numeric_answer"][0] == 1 and np.isnan(found["numeric_answer"][1])


def test_a_reward_gets_on_held_out_prompts_what_trl_gives_it():
    """One that asked for `trainer_state`, as TRL offers, failed at the first evaluation."""

    def mine(prompts, completions, completion_ids, trainer_state, log_metric, answer, **kwargs):
        log_metric("seen", 1.0)
        return [float(trainer_state.global_step + len(prompt)) for prompt in prompts]

    assert score([Reward("mine", 1.0, mine)], [{"prompt": "abc", "answer": "x"}], ["y"])["mine"].tolist() == [3]


def test_the_worst_earn_most_of_those_that_gold_calls_worse_than_the_best():
    total, gold = np.array([3.0, 1.0, 4.0, 9.0]), np.array([0.0, 0.0, 0.5, 1.0])
    rewards = {"a": np.array([3.0, 1.0, np.nan, 9.0]), "b": np.array([0.0, 0.0, 4.0, 0.0])}
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "r"}]
    found = _worst(["p", "q", chat, "t"], ["0", "1", "2", "3"], rewards, total, gold)
    assert [row["completion"] for row in found] == ["2", "0", "1"]
    expected = {"prompt": "r", "completion": "2", "reward": 4.0, "gold": 0.5, "rewards": {"a": None, "b": 4.0}}
    assert found[0] == expected and json.dumps(found)
    same = _worst(["p"] * 4, ["0", "1", "2", "3"], rewards, total, np.ones(4))  # gold tells nothing: all of them
    assert [row["completion"] for row in same] == ["3", "2", "0", "1"]
    many = _worst(["p"] * 40, ["x"] * 40, {}, np.arange(40.0), np.zeros(40))
    assert [row["reward"] for row in many] == [39.0 - k for k in range(16)]


def texts_of(tmp_path, lines):
    (tmp_path / "canary.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines), encoding="utf-8")
    (source,) = parse_sources([{"path": "canary.jsonl", "shard": "c"}], "canary_datasets")
    return _some_texts(source, tmp_path)


def test_canaries_are_the_first_64_documents_and_64_000_characters(tmp_path):
    assert texts_of(tmp_path, [f"text {i}" for i in range(100)]) == [f"text {i}" for i in range(64)]
    assert list(map(len, texts_of(tmp_path, ["x" * 30_000] * 9))) == [30_000, 30_000, 4_000]
    assert list(map(len, texts_of(tmp_path, ["x" * 64_000, "y"]))) == [64_000]
    assert texts_of(tmp_path, ["a", " ", "b"]) == ["a", "b"]
    with pytest.raises(UserError):
        texts_of(tmp_path, [])


# ---- a run


def reward(name, of):
    """Of the text alone."""
    return Reward(name, 1.0, lambda prompts, completions, **more: [float(of(text)) for text in completions])


def stub(folder, step=0, **settings):
    """(monitor, state, control) of a run in `folder`, which goes on where `step` is not 0."""
    it, tokenizer = model(), bpe_tokenizer()
    given = dict(per_device_eval_batch_size=3, max_length=64, max_completion_length=6, num_generations=4, eval_steps=2)
    config = GrpoConfig(**given | settings)
    rows = Dataset.from_list(
        [{"raw": json.dumps({"prompt": f"The {w} ", "answer": w})} for w in ("cat", "dog", "bird")]
    )
    state = SimpleNamespace(global_step=step, max_steps=10)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda m: m), state=state, model=it)
    job = SimpleNamespace(
        config=config, kind="single", tokenizer=tokenizer, trainer=trainer, console=Console(quiet=True),
        data=SimpleNamespace(shards={"held": rows}, train=rows), scorer=None,
    )  # fmt: skip
    # longer answers earn more; gold wants them short
    found = Monitor([reward("long", len)], reward("short", lambda text: -len(text)))
    run = Run.start(folder, "grpo", config, {}, resume_step=step or None)
    found.selection = Selection(fewest=24)
    found.begin(job, run, SimpleNamespace(best=None))
    control = SimpleNamespace(should_training_stop=False)
    found.on_train_begin(None, state, control, model=it)
    return found, state, control


def see(it, step, opposed=True, longer=1):
    """A batch of 16 prompts with 4 answers each, of which the longer ones earn more, and are worse or better."""
    texts = [f"{i // 4} " + "a" * (i % 4) for i in range(64)]
    it.job.trainer.state.global_step = step
    rewards = np.array([len(text) for text in texts], np.float64)
    ids = [[7] * (i % 4 * longer) + [4] for i in range(64)]  # 2.5 tokens on average
    return it.see(["?"] * 64, texts, ids, rewards[:, None], -rewards if opposed else rewards)


def lines(folder, name):
    path = folder / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_before_the_first_step_nothing_has_changed(tmp_path):
    it, *_ = stub(tmp_path / "run")
    start = json.loads((tmp_path / "run" / "monitor.json").read_text())
    assert len(start["answers"]) == len(start["logps"]) == 3 and len(start["bests"][0]["gold"]) == 3
    assert (
        it.last["eval_kl"] == 0 and it.last["eval_proxy"] == -it.last["eval_gold"] == it.last["eval_rewards/long/mean"]
    )
    assert start["figures"]["eval_kl"] == 0
    assert it.measure(it.job.trainer.model, 0)["gold_change"] == (0, 0, 0)
    assert lines(tmp_path / "run", "metrics.jsonl")[0]["eval_kl"] == 0
    assert not lines(tmp_path / "run", "alerts.jsonl")


def test_kl_is_the_mean_of_k3_and_above_0_for_another_model(tmp_path):
    it, *_ = stub(tmp_path / "run")
    for seed in range(1, 4):
        other, ratios = model(seed), []
        for (prompt, answer), before in zip(it.start["answers"], it.start["logps"], strict=True):
            ratios += [new - old for new, old in zip(alone(other, prompt, answer), before, strict=True)]
        expected = sum(np.exp(r) - 1 - r for r in ratios) / len(ratios)
        assert it.measure(other, 0)["eval_kl"] == pytest.approx(expected, rel=1e-4) and expected > 0.1


def test_changes_are_against_the_evaluation_at_which_gold_was_best_so_far(tmp_path, monkeypatch):
    """Gold of held-out prompts is 9 at step 2 and -99 at step 4; a run that goes on after step 1 knows neither."""
    it, *_ = stub(tmp_path / "run")
    assert [best["step"] for best in it.start["bests"]] == [0]
    for step, value in ((2, 9.0), (4, -99.0)):
        monkeypatch.setattr(
            "llmkit.align.monitor.score", lambda rewards, rows, texts, v=value: {r.name: np.full(3, v) for r in rewards}
        )
        figures = it.measure(it.job.trainer.model, step)
    assert [best["step"] for best in it.start["bests"]] == [0, 2] and figures["best_step"] == 2
    assert figures["gold_change"][0] == -108
    it._save()
    again, *_ = stub(tmp_path / "other")
    again._go_on(tmp_path / "run" / "monitor.json", 1)
    assert [best["step"] for best in again.start["bests"]] == [0]


def test_tasks_are_canaries(tmp_path):
    it, *_ = stub(tmp_path / "run")
    for step, recall in ((0, 0.9), (2, 0.81), (4, 0.79)):
        it.see_tasks(step, {"recall": recall})
    raised = lines(tmp_path / "run", "alerts.jsonl")
    assert [(row["step"], row["kind"]) for row in raised] == [(4, "canary")]
    assert raised[0]["message"] == "recall fell from 0.90 to 0.79"


def test_measuring_uses_up_no_random_number_and_leaves_the_mode(tmp_path):
    it, state, control = stub(tmp_path / "run")
    it.job.trainer.model.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    it.on_train_begin(None, state, control, model=it.job.trainer.model)
    assert torch.equal(torch.get_rng_state(), before) and it.job.trainer.model.training


def test_held_out_prompts_are_asked_every_eval_steps_and_at_the_end(tmp_path):
    it, state, control = stub(tmp_path / "run", eval_steps=4)
    for step in range(1, 11):
        state.global_step = step
        it.on_step_end(None, state, control, model=it.job.trainer.model)
    assert [row["step"] for row in lines(tmp_path / "run", "metrics.jsonl")] == [0, 4, 8, 10]


def test_an_alarm_is_written_once_with_the_answers_that_show_it(tmp_path):
    it, *_ = stub(tmp_path / "run")
    assert "hack/selection" not in see(it, 1)  # 16 groups are not enough
    assert see(it, 2)["hack/selection"] < -5 and it.is_alarmed
    see(it, 3)
    (alert,) = lines(tmp_path / "run", "alerts.jsonl")
    assert (alert["step"], alert["kind"]) == (2, "reward-opposes-gold") and "worse" in alert["message"]
    hacked = lines(tmp_path / "run", "hacked.jsonl")
    assert len(hacked) == 16 and {(row["step"], row["alarm"]) for row in hacked} == {(2, "reward-opposes-gold")}
    assert hacked[0]["completion"] == "10 aaa" and hacked[0]["reward"] == -hacked[0]["gold"] == 6


def test_a_reward_that_agrees_with_gold_raises_nothing(tmp_path):
    it, *_ = stub(tmp_path / "run")
    assert [see(it, step, opposed=False).get("hack/selection", 9) > 5 for step in range(1, 6)] == [True] * 5
    assert not it.is_alarmed and not lines(tmp_path / "run", "hacked.jsonl")


def test_answers_that_never_end_are_counted(tmp_path):
    it, *_ = stub(tmp_path / "run")
    texts, ids = ["a", "b", "c", "d"], [[7, 4], [7, 7], [4], [7, 8, 4]]
    found = it.see(["?"] * 4, texts, ids, np.array([[1.0], [np.nan], [0.0], [0.0]]), None)
    assert found["hack/clipped"] == 0.25 and found["hack/proxy"] == 0.25 and "hack/gold" not in found


@pytest.mark.parametrize("stops", [True, False])
def test_stop_on_alarm_ends_the_run(stops, tmp_path):
    it, state, control = stub(tmp_path / "run", stop_on_alarm=stops, eval_steps=None)
    it.on_step_end(None, state, control, model=it.job.trainer.model)
    assert not control.should_training_stop
    see(it, 1), see(it, 2)
    it.on_step_end(None, state, control, model=it.job.trainer.model)
    assert control.should_training_stop is stops


def test_all_ranks_end_where_one_is_alarmed(tmp_path, monkeypatch):
    """Alarms of held-out prompts are raised by the main rank alone: it ended, and the others waited for it."""
    it, state, control = stub(tmp_path / "run", stop_on_alarm=True, eval_steps=None)
    monkeypatch.setattr(module, "any_rank", lambda alarmed: True)
    it.on_step_end(None, state, control, model=it.job.trainer.model)
    assert not it.is_alarmed and control.should_training_stop


def test_a_run_that_goes_on_is_measured_against_the_same_and_raises_nothing_twice(tmp_path):
    """What the first batches were was kept only from an alarm on: later ones became the measure."""
    first, *_ = stub(tmp_path / "run")
    see(first, 1), see(first, 2)
    written = (tmp_path / "run" / "monitor.json").read_text()
    first.run.unlock()
    it, *_ = stub(tmp_path / "run", step=2)
    assert it.start == json.loads(written) and it.alarms.start == first.alarms.start
    assert it.alarms.start["hack/length"] == 2.5 and it.alarms.raised == {"reward-opposes-gold"}
    assert it.measure(it.job.trainer.model, 0) == first.measure(first.job.trainer.model, 0)
    see(it, 3), see(it, 4, longer=3)
    alerts = lines(tmp_path / "run", "alerts.jsonl")
    assert [(row["step"], row["kind"]) for row in alerts] == [(2, "reward-opposes-gold"), (4, "longer-answers")]
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 1  # held-out prompts are not asked again at the start


def test_an_alarm_after_the_checkpoint_is_raised_again(tmp_path):
    """alerts.jsonl is cut where a run goes on, and monitor.json still said that the alarm had been raised."""
    first, *_ = stub(tmp_path / "run")
    see(first, 1), see(first, 3)
    first.run.unlock()
    it, *_ = stub(tmp_path / "run", step=2)
    assert not lines(tmp_path / "run", "alerts.jsonl") and not lines(tmp_path / "run", "hacked.jsonl")
    see(it, 3), see(it, 4)
    assert [row["step"] for row in lines(tmp_path / "run", "alerts.jsonl")] == [4]
    assert {row["step"] for row in lines(tmp_path / "run", "hacked.jsonl")} == {4}


def test_a_run_that_starts_over_has_no_lines_of_the_one_before(tmp_path):
    first, *_ = stub(tmp_path / "run")
    see(first, 1), see(first, 2)
    (tmp_path / "run" / "samples.jsonl").write_text('{"step": 1}\n')
    first.run.unlock()
    stub(tmp_path / "run")
    assert {name: len(lines(tmp_path / "run", name)) for name in LOGS} == {
        "metrics.jsonl": 1, "alerts.jsonl": 0, "samples.jsonl": 0, "hacked.jsonl": 0,
    }  # fmt: skip


def test_without_held_out_prompts_kl_is_measured_on_those_of_training(tmp_path):
    it, *_ = stub(tmp_path / "run", gold_prompts=0)
    assert len(it.start["answers"]) == 3 and it.last == {"eval_kl": 0.0}


def test_where_no_rank_has_the_whole_model_batches_are_watched_all_the_same(tmp_path):
    it, state, control = stub(tmp_path / "run")
    it.can_ask, it.start = False, {}
    it.alarms = module.Alarms()
    it.on_train_begin(None, state, control)
    it.on_step_end(None, state, control)
    see(it, 1), see(it, 2)
    assert (
        it.is_alarmed and json.loads((tmp_path / "run" / "monitor.json").read_text())["figures"]["hack/length"] == 2.5
    )
