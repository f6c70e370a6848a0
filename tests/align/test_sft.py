"""`llmkit sft` on a tiny Llama: what it trains, writes, resumes and refuses."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkit import cli, config
from llmkit.align import job, sft
from llmkit.align.job import make_console
from llmkit.align.watch import Watch
from llmkit.config import UserError
from llmkit.data.template import CHATML
from llmkit.run import Run
from llmkit.tuning import SftConfig

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model folder without chat template, whose tokenizer has the tokens of ChatML."""
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(eos_token_id=2).save_pretrained(folder)
    tiny.bpe_tokenizer(chat=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny.chat_rows(40))))
    return folder


@pytest.fixture
def recipe(base, rows, tmp_path) -> SftConfig:
    return SftConfig(
        output_dir=str(tmp_path / "run"), model_name_or_path=str(base), data_dir=str(rows),
        datasets=[{"path": "json", "data_files": "rows.jsonl"}], test_split_size=0.1, max_length=128, max_steps=4,
        per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
    )  # fmt: skip


def changed(recipe: SftConfig, **keys) -> SftConfig:
    return dataclasses.replace(recipe, **keys)


def losses(folder: str) -> list[float]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


# ---- what a run leaves


@pytest.fixture(scope="module")
def done(base, rows, tmp_path_factory):
    """One run that evaluates, answers and saves."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = SftConfig(
        output_dir=str(folder), model_name_or_path=str(base), data_dir=str(rows),
        datasets=[{"path": "json", "data_files": "rows.jsonl"}], test_split_size=0.1, max_length=128, max_steps=6,
        per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True, eval_steps=3, save_steps=3,
        eval_answers=2, max_new_tokens=4, lora_dropout=0.05,
    )  # fmt: skip
    return folder, sft.main(settings)


def test_the_model_loads_in_plain_transformers_with_its_template_and_its_end_of_turn(done):
    folder, result = done
    assert result.model_dir == str(folder / "model") and result.status == "ok"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    assert tokenizer.chat_template == CHATML and tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.config.use_cache


def test_the_run_folder_says_what_was_done(done, base):
    folder, result = done
    manifest, told = (json.loads((folder / name).read_text()) for name in ("manifest.json", "result.json"))
    assert told == dataclasses.asdict(result) and told["parent"] == str(base) and told["stage"] == "sft"
    assert manifest["chat_template"] and manifest["datasets"]["train"]["rows"] == 36
    assert len(losses(folder)) == 6 and losses(folder)[-1] < losses(folder)[0]
    assert config.load(SftConfig, [str(folder / "recipe.yaml")], "sft").output_dir == str(folder)
    answers = [json.loads(line) for line in (folder / "answers_validation.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and {"question", "expected", "given", "exact"} <= set(answers[0])
    assert told["metrics"]["validation_exact_match"] == sum(a["exact"] for a in answers) / 2


def test_validation_is_the_loss_per_token_and_its_bits_per_byte(done, rows):
    """By hand, row by row, without TRL."""
    folder, result = done
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    settings = config.load(SftConfig, [str(folder / "recipe.yaml")], "sft")
    from llmkit.align.rows import Labeller, get_data

    held_out = get_data(settings, Labeller(tokenizer, settings)).shards["validation"]
    nats, count, size = 0.0, 0, 0
    model.requires_grad_(False)
    for row in held_out:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(ids).logits[:, :-1]
        nats += float(F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="sum"))
        count += int((labels[:, 1:] != -100).sum())
        size += sum(len(m["content"]) for m in json.loads(row["raw"])["messages"] if m["role"] == "assistant")
    shard = result.shards["validation"]
    assert shard["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert shard["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_peft": True, "packing": True}])
def test_a_run_that_goes_on_has_the_losses_of_one_that_never_stopped(recipe, tmp_path, more):
    whole = changed(recipe, max_steps=6, save_steps=2, **more)
    sft.main(whole)
    broken = changed(whole, output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True)
    shutil.copytree(whole.output_dir, broken.output_dir)
    for name in ("model", "adapter", "checkpoints/step-00000004", "checkpoints/step-00000006"):
        shutil.rmtree(Path(broken.output_dir) / name, ignore_errors=True)
    (Path(broken.output_dir) / "result.json").unlink()
    (Path(broken.output_dir) / "checkpoints/checkpoint-4").mkdir()  # killed while it was written
    result = sft.main(broken)
    assert losses(broken.output_dir) == losses(whole.output_dir)
    assert not (Path(broken.output_dir) / "checkpoints/checkpoint-4").exists()
    assert result.tokens == json.loads((Path(whole.output_dir) / "result.json").read_text())["tokens"]
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = Path(whole.output_dir) / name, Path(broken.output_dir) / name
        assert not a.exists() or a.read_bytes() == b.read_bytes()


def test_other_rows_or_another_batch_cannot_go_on(recipe, rows, tmp_path):
    sft.main(changed(recipe, save_steps=2))
    again = changed(recipe, save_steps=2, resume_from_checkpoint=True, max_steps=8)
    for key, value, said in (
        ("per_device_train_batch_size", 2, "the batch differs"),
        ("data_seed", 7, "the dataset differs"),
        ("max_length", 96, "the dataset differs"),
    ):
        with pytest.raises(UserError, match=said):
            sft.main(changed(again, **{key: value}))
    with pytest.raises(UserError, match="step 4 is reached already"):
        sft.main(changed(again, max_steps=4))


def test_a_signal_saves_a_checkpoint_and_says_stopped(recipe, monkeypatch):
    calls = []

    @contextlib.contextmanager
    def signals(**_):
        yield lambda: len(calls.append(1) or calls) == 2

    monkeypatch.setattr(job, "stop_signals", signals)
    assert sft.main(recipe).status == "stopped"
    checkpoints = [path.name for path in (Path(recipe.output_dir) / "checkpoints").iterdir()]
    assert checkpoints == ["step-00000002"] and not (Path(recipe.output_dir) / "model").exists()


def test_a_loss_that_is_not_finite_ends_the_run(recipe):
    with pytest.raises(UserError, match="loss is nan at step"):
        sft.main(changed(recipe, learning_rate=1e12, max_grad_norm=0.0, warmup_steps=0, max_steps=20))
    result = json.loads((Path(recipe.output_dir) / "result.json").read_text())
    assert result["status"] == "failed" and not (Path(recipe.output_dir) / "model").exists()
    assert json.loads((Path(recipe.output_dir) / "alerts.jsonl").read_text())["kind"] == "not-finite"


# ---- overfit


def test_overfit_learns_rows_by_heart_in_a_folder_of_its_own(recipe):
    result = sft.main(changed(recipe, overfit=4, max_steps=0, num_train_epochs=1.0))
    assert result.status == "ok" and result.metrics["overfit_exact_match"] == 1
    assert Path(result.model_dir).parent.name == "run-overfit" and not Path(recipe.output_dir).exists()
    assert result.metrics["steps"] < 100  # it stops when every token is right
    sft.main(changed(recipe, overfit=4, max_steps=1))  # and may be tried again
    assert json.loads((Path(f"{recipe.output_dir}-overfit") / "result.json").read_text())["status"] == "failed"


# ---- the template


def test_a_template_that_differs_from_the_parents_is_refused(recipe, done, tmp_path):
    folder, _ = done
    (tmp_path / "other.jinja").write_text(CHATML.replace("user", "USER").replace("\\n", " "))
    child = changed(recipe, model_name_or_path=str(folder))
    with pytest.raises(UserError, match="differs from the template that sft of this model was trained with"):
        sft.main(changed(child, chat_template_path=str(tmp_path / "other.jinja")))
    assert sft.main(changed(child, max_steps=1)).parent == str(folder)


def test_tokens_of_the_template_are_added_and_end_generation(recipe, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>", unk_token="?")
    tiny.llama(vocab_size=3, bos_token_id=0, eos_token_id=0, pad_token_id=None).save_pretrained(tmp_path / "small")
    plain.save_pretrained(tmp_path / "small")
    result = sft.main(changed(recipe, model_name_or_path=str(tmp_path / "small"), max_steps=1))
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 5
    assert model.generation_config.eos_token_id == [4, 0]


# ---- settings


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--deepspeed x", "key 'deepspeed' of TRL is not used here; write accelerate_config: zero2"),
        ("--learnin_rate 1", "nearest: 'learning_rate'"),
        ("--packing_strategy wrapped", "packing_strategy='wrapped' has no effect without packing: true"),
        ("--lora_r 4", "lora_r=4 has no effect without use_peft: true"),
        ("--max_length 0", "max_length=0; allowed: 1 or more"),
        ("--datasets []", "datasets is missing"),
        ("--chat_template_path nowhere.jinja", "chat_template_path='nowhere.jinja': cannot be read"),
        ("--eos_token <x>", "the tokenizer has no such token"),
        ("--max_length 512", "exceeds the model's max_position_embeddings=256"),
        ("--model_name_or_path nowhere", "no tokenizer could be loaded"),
        ("--neftune_noise_alpha x", "neftune_noise_alpha='x' is str; allowed: float | None"),
        ("--optim adam", "adam"),
    ],
)
def test_a_users_mistake_is_one_line(recipe, tmp_path, capsys, flags, said):
    (tmp_path / "sft.yaml").write_text(config.dump(recipe))
    assert cli.main(["sft", str(tmp_path / "sft.yaml"), "--skip_checks", *flags.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and not any(line.startswith("Traceback") for line in lines)


def test_further_keys_of_trl_reach_its_config_and_the_saved_recipe(recipe, tmp_path):
    (tmp_path / "sft.yaml").write_text(config.dump(recipe) + "neftune_noise_alpha: 5.0\n")
    settings = config.load(SftConfig, [str(tmp_path / "sft.yaml"), "--loss_type", "dft"], "sft")
    assert settings.passed_on == {"neftune_noise_alpha": 5.0, "loss_type": "dft"}
    job = sft.prepare(settings, make_console())
    assert job.trainer.args.neftune_noise_alpha == 5.0 and job.trainer.args.loss_type == "dft"
    (tmp_path / "again.yaml").write_text(config.dump(settings))
    assert config.load(SftConfig, [str(tmp_path / "again.yaml")], "sft") == settings


def test_on_a_cpu_nothing_is_in_bf16_or_recomputed(recipe):
    args = sft.prepare(recipe, make_console()).trainer.args
    assert not args.bf16 and not args.fp16 and not args.gradient_checkpointing and args.use_cpu


def test_a_killed_save_leaves_no_checkpoint_of_that_name(recipe, tmp_path, monkeypatch):
    run = Run(tmp_path, "sft")
    watch = Watch(run, make_console(), recipe, {})
    written = tmp_path / "checkpoints/checkpoint-4"
    written.mkdir(parents=True)
    (written / "model.safetensors").write_bytes(b"x")

    class At:
        output_dir, global_step = str(tmp_path / "checkpoints"), 4

    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        watch.on_save(At, At, None, model=torch.nn.Linear(1, 1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]


# ---- in processes of their own


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", "zero2"])
def test_two_processes_have_the_losses_of_one(recipe, tmp_path, engine):
    sft.main(recipe)
    two = changed(recipe, output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, accelerate_config=engine)
    (tmp_path / "sft.yaml").write_text(config.dump(changed(two, num_processes=2, skip_checks=True)))
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "sft", str(tmp_path / "sft.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(two.output_dir) == pytest.approx(losses(recipe.output_dir), abs=1e-4)
    found, expected = (
        json.loads((Path(c.output_dir) / "result.json").read_text())["shards"]["validation"]["loss"]
        for c in (two, recipe)
    )
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_whose_template_has_no_marks_is_tuned_with_its_own_template(recipe, tmp_path, capsys):
    """Tier 0 once failed there: the settings asked for a mask that the rows do not need."""
    template = tiny.CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.chat_template = template
    tiny.llama().save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "sft.yaml").write_text(
        config.dump(changed(recipe, model_name_or_path=str(tmp_path / "chat"), max_steps=1))
    )
    assert cli.main(["sft", str(tmp_path / "sft.yaml")]) == 0
    said = capsys.readouterr().out
    assert "chat, completions are trained" in said and "the tokenizer's own" in said and "checks" in said
    saved = AutoTokenizer.from_pretrained(Path(recipe.output_dir) / "model")
    assert saved.chat_template == template


@pytest.mark.parametrize("more", [{}, {"use_peft": True, "lora_dropout": 0.0}], ids=["full", "lora"])
def test_tasks_are_asked_on_the_way_and_the_best_step_is_kept(recipe, more):
    """The loss falls, so what is best by its opposite is the first evaluation: model/ is that of step 2."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "validation_loss", "greater_is_better": True}
    tasks = {"eval_tasks": ["toyworld_facts"], "eval_tasks_limit": 4, "eval_steps": 2}
    result = sft.main(changed(recipe, max_steps=6, **tasks, **best, **more))
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if "eval_toyworld_facts_exact_match" in row] == [2, 4, 6]
    first = next(row["eval_validation_loss"] for row in rows if "eval_validation_loss" in row)
    assert result.metrics["best_step"] == 2
    assert result.shards["validation"]["loss"] == pytest.approx(first, abs=1e-5)
    again = changed(recipe, model_name_or_path=recipe.output_dir, output_dir=recipe.output_dir + "-again", max_steps=1)
    sft.main(changed(again, eval_on_start=True, learning_rate=0.0))
    line = (Path(again.output_dir) / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["eval_validation_loss"] == pytest.approx(first, abs=1e-4)  # of what model/ holds
