"""`llmkit grpo` on a tiny Llama: rewards tested first, answers watched, resume, refusals."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from llmkit import cli, config
from llmkit.align import grpo, reward_model
from llmkit.align.grpo import check_batches, load_rewards
from llmkit.align.job import make_console
from llmkit.align.preferences import as_prompts
from llmkit.align.preflight import get_subject
from llmkit.config import UserError
from llmkit.tuning import GrpoConfig, RewardConfig

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(eos_token_id=2).save_pretrained(folder)
    tiny.bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    made = [{"question": f"What is {i} and {i}?", "answer": f"{2 * i}", "level": "easy"} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, made[:6])))
    (folder / "text.txt").write_text("the dog ran to the cat. " * 20)
    (folder / "mine.py").write_text(
        "def the(*, completions, answer, level, **_):\n"
        "    assert level == ['easy'] * len(answer)\n"
        "    texts = [said if isinstance(said, str) else said[-1]['content'] for said in completions]\n"
        "    return [min(1.0, text.count('t') / 3) + (text.strip() == gold) for text, gold in zip(texts, answer)]\n"
    )
    return folder


@pytest.fixture
def recipe(base, rows, tmp_path) -> GrpoConfig:
    return GrpoConfig(
        output_dir=str(tmp_path / "run"), model_name_or_path=str(base), data_dir=str(rows),
        datasets=[{"path": "json", "data_files": "rows.jsonl"}], max_length=128, max_completion_length=8,
        eval_datasets=[{"path": "json", "data_files": "held.jsonl", "shard": "held"}], max_steps=4,
        per_device_train_batch_size=8, num_generations=4, learning_rate=1e-3, logging_steps=1, use_cpu=True,
        reward_funcs=[f"{rows}/mine.py:the"], gold_verifier="exact_answer", eval_steps=2,
        per_device_eval_batch_size=4,
    )  # fmt: skip


def changed(recipe: GrpoConfig, **keys) -> GrpoConfig:
    return dataclasses.replace(recipe, **keys)


def lines(folder: str | Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def done(base, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = GrpoConfig(
        output_dir=str(folder), model_name_or_path=str(base), data_dir=str(rows), max_length=128,
        datasets=[{"path": "json", "data_files": "rows.jsonl"}], max_completion_length=8, max_steps=6,
        eval_datasets=[{"path": "json", "data_files": "held.jsonl", "shard": "held"}], save_steps=2,
        per_device_train_batch_size=8, num_generations=4, learning_rate=1e-3, logging_steps=1, use_cpu=True,
        reward_funcs=[f"{rows}/mine.py:the", {"length": {"max_words": 8}}], reward_weights=[1.0, 0.5],
        gold_verifier="exact_answer", eval_steps=2, per_device_eval_batch_size=4,
        canary_datasets=[{"path": "text", "data_files": "text.txt", "shard": "pets"}],
    )  # fmt: skip
    return settings, grpo.main(settings)


def test_every_batch_is_measured_by_gold_and_every_reward(done):
    settings, result = done
    trained = [row for row in lines(settings.output_dir) if "reward" in row]
    assert len(trained) == 6 and result.status == "ok"
    wanted = {
        "hack/gold", "hack/gap", "hack/distinct_3", "hack/duplicates", "hack/clipped", "hack/length_correlation/length",
        "hack/saturation/the", "hack/echo", "hack/hedging", "hack/empty_think", "rewards/the/mean",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in trained)
    for row in trained:
        assert row["hack/proxy"] == pytest.approx(row["reward"], abs=1e-5)
        assert row["hack/gap"] == pytest.approx(row["reward"] - row["hack/gold"], abs=1e-5)
        assert row["reward"] == pytest.approx(row["rewards/the/mean"] + 0.5 * row["rewards/length/mean"], abs=1e-5)


def test_held_out_prompts_kl_and_canaries_are_measured_at_every_evaluation(done):
    settings, result = done
    looked = [row for row in lines(settings.output_dir) if "eval_gold" in row]
    assert [row["step"] for row in looked] == [0, 2, 4, 6]
    assert looked[0]["eval_kl"] == pytest.approx(0, abs=1e-6) and looked[-1]["eval_kl"] > 1e-7
    assert looked[0]["canary/pets"] > 1 and {"eval_rewards/the/mean", "eval_proxy"} <= set(looked[0])
    assert (
        result.metrics["gold"] == looked[-1]["eval_gold"]
        and result.metrics["proxy_at_start"] == looked[0]["eval_proxy"]
    )
    assert result.metrics["canary/pets"] == looked[-1]["canary/pets"]


def test_looking_changes_nothing(done, tmp_path):
    """Rewards of the same run without held-out prompts and canaries are the same to the last digit."""
    settings, _ = done
    blind = changed(
        settings,
        output_dir=str(tmp_path / "blind"),
        eval_datasets=[],
        canary_datasets=[],
        eval_steps=None,
        save_steps=None,
    )
    grpo.main(blind)
    for key in ("reward", "loss", "grad_norm"):
        assert [r[key] for r in lines(blind.output_dir) if "reward" in r] == [
            r[key] for r in lines(settings.output_dir) if "reward" in r
        ]


def test_a_run_that_goes_on_is_the_run_that_never_stopped(done, tmp_path):
    settings, _ = done
    broken = changed(settings, output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True)
    shutil.copytree(settings.output_dir, broken.output_dir)
    for name in ("model", "checkpoints/step-00000004", "checkpoints/step-00000006"):
        shutil.rmtree(Path(broken.output_dir) / name)
    (Path(broken.output_dir) / "result.json").unlink()
    grpo.main(broken)
    for key in ("reward", "loss", "eval_kl", "eval_gold", "canary/pets"):
        assert [r[key] for r in lines(broken.output_dir) if key in r] == [
            r[key] for r in lines(settings.output_dir) if key in r
        ], key


def test_the_adapter_learns_without_a_copy_of_itself(recipe):
    settings = changed(recipe, use_peft=True, beta=0.1, max_steps=2)
    result = grpo.main(settings)
    assert (Path(settings.output_dir) / "adapter").exists() and result.status == "ok"
    config = json.loads((Path(settings.output_dir) / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 16 and not (Path(settings.output_dir) / "adapter" / "ref").exists()
    assert any(row.get("kl") is not None for row in lines(settings.output_dir))


def test_the_reference_of_a_kl_penalty_knows_the_new_tokens(recipe, tmp_path):
    """A base whose tokenizer has no chat tokens: rows are added to the model, and to the reference that TRL loads."""
    bare = tmp_path / "bare"
    tokenizer = tiny.bpe_tokenizer(chat=False)
    tokenizer.save_pretrained(bare)
    for path in bare.glob("*.json"):
        path.write_text(path.read_text().replace("<|im_start|>", "<|other|>").replace("<|im_end|>", "<|another|>"))
    tiny.llama(eos_token_id=2, vocab_size=len(tokenizer)).save_pretrained(bare)
    job = grpo.prepare(changed(recipe, model_name_or_path=str(bare), beta=0.1), make_console())
    size = job.trainer.model.get_input_embeddings().weight.shape[0]
    assert job.trainer.ref_model.get_input_embeddings().weight.shape[0] == size == len(tokenizer) + 2
    result = grpo.main(changed(recipe, model_name_or_path=str(bare), beta=0.1, max_steps=1))
    assert result.status == "ok" and next(row for row in lines(recipe.output_dir) if row.get("kl") is not None)


def test_a_reward_against_gold_raises_the_alarm_and_ends_the_run_where_asked(recipe, rows, monkeypatch):
    """Gold: few words; the reward: many."""
    settings = changed(
        recipe, reward_funcs=["exact_answer", {"length": {"max_words": 8}}], reward_weights=[8.0, 1.0], max_steps=30,
        gold_verifier=f"{rows}/short.py:short", stop_on_alarm=True, per_device_train_batch_size=64, eval_datasets=[],
        eval_steps=None,
    )  # fmt: skip
    (rows / "short.py").write_text(
        "def short(*, completions, **_):\n"
        "    return [1.0 / (1 + len(said[-1]['content'].split())) for said in completions]\n"
    )
    result = grpo.main(settings)
    alerts, hacked = lines(settings.output_dir, "alerts.jsonl"), lines(settings.output_dir, "hacked.jsonl")
    assert [row["kind"] for row in alerts] == ["reward-opposes-gold"] and result.metrics["steps"] < 30
    assert {"prompt", "completion", "reward", "gold", "rewards", "alarm"} <= set(hacked[0])
    assert hacked[0]["reward"] >= hacked[-1]["reward"] and result.metrics["num_alerts"] == 1
    assert (Path(settings.output_dir) / "model").exists()


def test_a_reward_model_is_a_reward(recipe, base, tmp_path):
    pairs = [{"prompt": f"say {i}", "chosen": "yes yes", "rejected": "no"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    judge = RewardConfig(
        output_dir=str(tmp_path / "judge"), model_name_or_path=str(base), data_dir=str(tmp_path), max_steps=2,
        datasets=[{"path": "json", "data_files": "pairs.jsonl"}], max_length=64, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    reward_model.main(judge)
    rewards = load_rewards(["exact_answer", str(tmp_path / "judge")], [1.0, 0.25], recipe)
    assert [(reward.name, reward.weight) for reward in rewards] == [("exact_answer", 1.0), ("judge", 0.25)]
    prompt = [[{"role": "user", "content": "x"}]] * 3
    said = [[{"role": "assistant", "content": text}] for text in ("a", "a b c d e", "a")]
    values = rewards[1](prompts=prompt, completions=said)
    alone = [rewards[1](prompts=prompt[:1], completions=[text])[0] for text in said]
    assert np.allclose(values, alone, atol=1e-5) and values[0] == pytest.approx(values[2], abs=1e-6)
    both = ["exact_answer", str(tmp_path / "judge")]
    assert (
        grpo.main(changed(recipe, reward_funcs=both, reward_weights=[8, 1], gold_verifier=None, max_steps=1)).status
        == "ok"
    )
    with pytest.raises(UserError, match="two of them would be logged as 'judge'"):
        load_rewards([str(tmp_path / "judge"), str(tmp_path / "judge")], None, recipe)
    assert "rewards/judge/mean" in next(row for row in lines(recipe.output_dir) if "reward" in row)


def test_checks_and_inspect_take_the_trainer(recipe, tmp_path):
    for tier in (0, 1):
        assert get_subject(recipe, tier).tokenizer is not None
    job = grpo.prepare(recipe, make_console())
    assert next(iter(job.trainer.get_train_dataloader()))[0]["answer"]


def rows_of(*given: dict) -> Dataset:
    return Dataset.from_list([{"raw": json.dumps(row | {"row": i + 1})} for i, row in enumerate(given)])


def test_columns_that_some_rows_lack_reach_the_rewards():
    made = as_prompts(rows_of({"prompt": "a", "x": 1}, {"prompt": "b", "answer": "2"}))
    assert made["answer"] == [None, "2"] and made["x"] == [1, None]
    with pytest.raises(UserError, match=r"column 'answer' holds str \(row 1\), number \(row 2\)"):
        as_prompts(rows_of({"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": 2}))


def test_a_run_that_an_alarm_ended_is_measured_where_it_ended(recipe, rows):
    """Between two evaluations."""
    (rows / "anti.py").write_text(
        "def anti(*, completions, **_):\n    return [-len(said[-1]['content']) / 100 for said in completions]\n"
    )
    settings = changed(
        recipe, reward_funcs=["exact_answer", {"length": {"max_words": 8}}], reward_weights=[8.0, 1.0], max_steps=30,
        gold_verifier=f"{rows}/anti.py:anti", stop_on_alarm=True, per_device_train_batch_size=64, eval_steps=29,
        warmup_steps=0.0,
    )  # fmt: skip
    result = grpo.main(settings)
    assert 0 < result.metrics["steps"] < 29 and result.metrics["kl"] > 0


# ---- refusals


def refusal(settings: GrpoConfig) -> str:
    with pytest.raises(UserError) as error:
        grpo.main(settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_generations": 3}, "num_generations=3 does not divide the 8 answers of a generation"),
        ({"num_generations": 1}, "num_generations=1; allowed: 2 or more"),
        ({"save_steps": 3, "steps_per_generation": 2}, "goes on makes them anew; write a multiple of 2"),
        ({"reward_funcs": []}, "reward_funcs is missing"),
        ({"reward_funcs": ["exact"]}, "unknown reward 'exact'; nearest: 'exact_answer'"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 reward_funcs"),
        ({"reward_funcs": [{"length": {"is_penalty": True}}]}, "cannot tell a right answer from an empty one"),
        ({"gold_prompts": 5, "eval_datasets": []}, "gold_prompts=5 has no effect without eval_datasets"),
        ({"temperature": 0.0}, "temperature=0.0; allowed: above 0"),
        ({"reward_funcs": ["exact_answer"]}, "gold_verifier='exact_answer' is among reward_funcs"),
        ({"per_device_train_batch_size": 400}, "40 prompts, and a generation takes 100"),
        ({"reward_weights": ["x"]}, "reward_weights=['x']; allowed: numbers"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "gold", "gold_verifier": None},
            "metric_for_best_model='gold': no evaluation gives that figure; allowed: proxy",
        ),
        ({"max_completion_length": 128}, "longer than max_length - max_completion_length=0"),
    ],
)
def test_what_cannot_work_is_refused_before_training(recipe, keys, said):
    assert said in refusal(changed(recipe, **keys))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [float('nan')] * len(completions)", "value 0 is nan"),
        ("return [1.0]", "returns 1 values; expected a list of"),
        ("raise KeyError('x')", "raises KeyError"),
    ],
)
def test_a_reward_that_misbehaves_ends_the_run_in_one_line(recipe, rows, body, said):
    """After the self-test, too: on the third call."""
    (rows / "bad.py").write_text(
        "calls = []\ndef bad(*, completions, answer, **_):\n    calls.append(1)\n"
        f"    if len(calls) > 12:\n        {body}\n"
        "    return [float(said[-1]['content'] == gold) for said, gold in zip(completions, answer)]\n"
    )
    settings = changed(recipe, reward_funcs=[f"{rows}/bad.py:bad"], eval_datasets=[], eval_steps=None, max_steps=20)
    assert said in refusal(settings)
    assert json.loads((Path(settings.output_dir) / "result.json").read_text())["status"] == "failed"


def test_batches_of_several_processes_count(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_batches(changed(recipe, per_device_train_batch_size=4, num_generations=6))
    with pytest.raises(UserError, match="does not divide the 12 answers"):
        check_batches(changed(recipe, per_device_train_batch_size=4, num_generations=8))


def test_settings_of_vllm_pass_through(recipe, tmp_path):
    (tmp_path / "grpo.yaml").write_text(config.dump(recipe) + "vllm_mode: colocate\nvllm_gpu_memory_utilization: 0.4\n")
    settings = config.load(GrpoConfig, [str(tmp_path / "grpo.yaml")], "grpo")
    args = grpo.prepare(settings, make_console()).trainer.args
    assert args.vllm_mode == "colocate" and args.vllm_gpu_memory_utilization == 0.4


def test_the_self_test_is_shown_before_the_first_step(recipe, capsys):
    grpo.main(changed(recipe, max_steps=1, eval_steps=None))
    said = capsys.readouterr().out
    assert said.index("rewards") < said.index("plan") and "prompt echo" in said


def test_the_front_desk_runs_it(recipe, tmp_path, monkeypatch):
    (tmp_path / "grpo.yaml").write_text(config.dump(changed(recipe, max_steps=1, eval_steps=None)))
    assert cli.main(["grpo", str(tmp_path / "grpo.yaml")]) == 0
    assert (Path(recipe.output_dir) / "check.json").exists() and torch.is_grad_enabled()


@pytest.mark.slow
def test_two_processes_are_watched_as_one(recipe, tmp_path):
    """Groups are dealt over both; the monitor sees all answers, and both end at the alarm."""
    two = changed(recipe, num_processes=2, accelerate_config="cpu", skip_checks=True, per_device_train_batch_size=4)
    (tmp_path / "grpo.yaml").write_text(config.dump(two))
    command = [sys.executable, "-m", "llmkit", "grpo", str(tmp_path / "grpo.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    trained = [row for row in lines(two.output_dir) if "reward" in row]
    assert len(trained) == 4 and all(row["hack/proxy"] == pytest.approx(row["reward"], abs=1e-5) for row in trained)
    assert [row["step"] for row in lines(two.output_dir) if "eval_gold" in row] == [0, 2, 4]
