"""`llmkit dpo | kto | rrhf | reward` on a tiny Llama: first losses, resume, what is written, what is refused."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llmkit import config
from llmkit.align import dpo, kto, reward_model, rrhf
from llmkit.align.build import trl_arguments
from llmkit.align.job import make_console
from llmkit.align.preflight import get_subject
from llmkit.align.samples import PreferenceWatch
from llmkit.config import UserError
from llmkit.evaluate.answers import Answer, AnswerScore
from llmkit.hardware import detect
from llmkit.train.best import Best
from llmkit.tuning import DpoConfig, KtoConfig, RewardConfig, RrhfConfig

pytestmark = pytest.mark.medium
VERBS = {
    "dpo": (dpo, DpoConfig), "kto": (kto, KtoConfig), "rrhf": (rrhf, RrhfConfig), "reward": (reward_model, RewardConfig)
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(eos_token_id=2).save_pretrained(folder)
    tiny.bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    made = []
    for i, row in enumerate(tiny.chat_rows(40)):
        good = row["messages"][-1]["content"]
        bad = "the dog " * (1 + i % 3)
        made.append({"prompt": row["messages"][:-1], "chosen": good, "rejected": bad})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    return folder


@pytest.fixture
def recipe(base, rows, tmp_path):
    def make(verb: str, **keys):
        settings = {
            "output_dir": str(tmp_path / verb), "model_name_or_path": str(base), "data_dir": str(rows),
            "datasets": [{"path": "json", "data_files": "rows.jsonl"}], "test_split_size": 0.1, "max_length": 128,
            "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1,
            "use_cpu": True,
        }  # fmt: skip
        if verb != "reward":
            settings |= {"eval_samples": 2, "max_new_tokens": 4}
        return VERBS[verb][1](**settings | keys)

    return make


def log_of(folder: str, key: str = "loss") -> list[float]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if "loss" in row]


# ---- what a run leaves


@pytest.mark.parametrize("more", [{}, {"use_peft": True}], ids=["full", "lora"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_run_learns_and_leaves_a_model_that_plain_transformers_loads(recipe, verb, more, base):
    settings = recipe(verb, max_steps=8, learning_rate=1e-2, eval_on_start=True, **more)
    result = VERBS[verb][0].main(settings)
    folder = Path(settings.output_dir)
    looked = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_validation_loss"] for row in looked if "eval_validation_loss" in row]
    assert result.status == "ok" and len(log_of(settings.output_dir)) == 8 and losses[-1] < losses[0]
    assert result.stage == verb and result.parent == str(base)
    cls = AutoModelForSequenceClassification if verb == "reward" else AutoModelForCausalLM
    model, tokenizer = cls.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_tensors="pt", return_dict=True)
    assert model(**ids).logits.isfinite().all() and tokenizer.chat_template
    if verb == "reward":
        assert model.config.num_labels == 1 and result.metrics["validation_accuracy"] >= 0.5
    else:
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 4  # two prompts, before and after
    assert (folder / "adapter").exists() == bool(more)


@pytest.mark.parametrize("more", [{}, {"use_peft": True}], ids=["full", "lora"])
def test_the_first_dpo_loss_is_ln_2(recipe, more):
    settings = recipe("dpo", max_steps=2, **more)
    dpo.main(settings)
    assert log_of(settings.output_dir)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert log_of(settings.output_dir, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)


def test_the_reference_of_a_resumed_run_is_still_the_parent(recipe, tmp_path):
    """A reference made of the weights at hand would give ln 2 again, and margins of 0."""
    whole = recipe("dpo", max_steps=6, save_steps=3, learning_rate=1e-2)
    dpo.main(whole)
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True)
    shutil.copytree(whole.output_dir, broken.output_dir)
    for name in ("model", "checkpoints/step-00000006", "result.json"):
        path = Path(broken.output_dir) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    dpo.main(broken)
    for key in ("loss", "rewards/margins"):
        assert log_of(broken.output_dir, key) == log_of(whole.output_dir, key)
    assert log_of(broken.output_dir, "rewards/margins")[3] > 0.01
    for name in ("samples.jsonl", "alerts.jsonl"):
        both = [Path(c.output_dir) / name for c in (whole, broken)]
        assert len({path.read_text() if path.exists() else "" for path in both}) == 1, name


@pytest.mark.parametrize("verb", ["kto", "rrhf", "reward"])
def test_a_run_that_goes_on_has_the_losses_of_one_that_never_stopped(recipe, tmp_path, verb):
    more = {"use_peft": True} if verb != "rrhf" else {}
    whole = recipe(verb, max_steps=4, save_steps=2, **more)
    VERBS[verb][0].main(whole)
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True)
    shutil.copytree(whole.output_dir, broken.output_dir)
    for name in ("model", "adapter", "checkpoints/step-00000004"):
        shutil.rmtree(Path(broken.output_dir) / name, ignore_errors=True)
    (Path(broken.output_dir) / "result.json").unlink()
    VERBS[verb][0].main(broken)
    assert log_of(broken.output_dir) == log_of(whole.output_dir)


def test_an_adapter_has_no_copy_of_itself_as_reference(recipe):
    """TRL adds an adapter `ref`; it costs memory, and checkpoints would hold it."""
    for verb in ("dpo", "kto"):
        model = VERBS[verb][0].prepare(recipe(verb, use_peft=True), make_console()).trainer.model
        assert list(model.peft_config) == ["default"]


def test_evaluation_is_a_mean_over_rows_however_the_batches_fall(recipe):
    figures = []
    for size in (1, 3, 4):
        job = dpo.prepare(recipe("dpo", per_device_eval_batch_size=size), make_console())
        with torch.no_grad():  # away from the reference
            job.trainer.model.lm_head.weight.add_(
                torch.randn(job.trainer.model.lm_head.weight.shape, generator=torch.manual_seed(0))
            )
        figures.append(job.trainer.figures(job.data.shards["validation"]))
    assert set(figures[0]) >= {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    for other in figures[1:]:
        assert {
            k: other[k] for k in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")
        } == pytest.approx(
            {k: figures[0][k] for k in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")}, rel=1e-4
        )


def test_answers_to_one_prompt_are_not_held_out_and_trained_on_at_once(recipe):
    data = kto.prepare(recipe("kto", test_split_size=0.25), make_console()).data
    trained, held = (
        {json.dumps(ids) for ids in rows["prompt_ids"]} for rows in (data.train, data.shards["validation"])
    )
    assert not trained & held and len(data.shards["validation"]) == 20 and len(data.train) == 60


def test_steps_for_tasks_alone_ask_trl_for_no_evaluation(recipe):
    """It would refuse one without a data set, in a traceback."""
    from trl import DPOConfig

    for size, strategy in ((0.0, "no"), (0.1, "steps")):
        asked = recipe("dpo", eval_steps=2, eval_tasks=["toyworld_recall"], test_split_size=size)
        assert trl_arguments(DPOConfig, asked, detect(use_cpu=True), "none").eval_strategy == strategy


def test_best_knows_that_a_ranking_loss_is_better_when_lower(tmp_path):
    assert not Best(tmp_path, "v_nll", None, None).is_up and not Best(tmp_path, "v_ranking", None, None).is_up


def test_ktos_other_answers_stay_with_their_rows(recipe):
    job = kto.prepare(recipe("kto"), make_console())
    batch = next(iter(job.trainer.get_train_dataloader()))
    prompts = (batch["attention_mask"] - batch["completion_mask"]).sum(1)
    others = (batch["KL_attention_mask"] - batch["KL_completion_mask"]).sum(1)
    assert prompts.tolist() == others.tolist()
    for row, kl, size in zip(batch["input_ids"], batch["KL_input_ids"], prompts.tolist(), strict=True):
        assert row[:size].tolist() == kl[:size].tolist()


def test_checks_take_the_trainers_of_every_verb(recipe):
    for verb in VERBS:
        for tier in (0, 1):
            subject = get_subject(recipe(verb), tier)
            assert subject.tokenizer is not None and subject.rows


# ---- alarms


class _Told:
    def __init__(self):
        self.alerts, self.lines = [], []

    def append(self, name, row):
        self.alerts.append((name, row["kind"]))

    def print(self, *text, **_):
        self.lines.append(text)


def watch_of(beta: float) -> tuple[PreferenceWatch, _Told]:
    watch, told = PreferenceWatch(), _Told()
    config = SimpleNamespace(beta=beta, eval_samples=0)
    data = SimpleNamespace(shards={}, train={"raw": []})
    watch.begin(SimpleNamespace(config=config, data=data, kind="none", console=told), told, None)
    return watch, told


@pytest.mark.parametrize(("nats", "rejected", "count"), [(-1.2, -3.0, 1), (-0.8, -3.0, 0), (-1.2, -1.0, 0)])
def test_chosen_answers_that_become_less_likely_are_an_alarm_once(nats, rejected, count):
    """By 1 nat or more against the reference, on the mean of five lines, while the rejected fall further."""
    watch, told = watch_of(beta=0.1)
    state = SimpleNamespace(global_step=10)
    for _ in range(4):
        watch.on_log(None, state, None, {"loss": 0.1, "rewards/chosen": 0.1 * nats, "rewards/rejected": 0.1 * rejected})
    assert not told.alerts
    for _ in range(6):
        watch.on_log(None, state, None, {"loss": 0.1, "rewards/chosen": 0.1 * nats, "rewards/rejected": 0.1 * rejected})
    assert told.alerts == [("alerts.jsonl", "chosen-less-likely")] * count


def test_answers_half_as_long_again_are_an_alarm(recipe, monkeypatch):
    """At the start 4 characters, in the chosen answers 4, later 6."""
    job = dpo.prepare(recipe("dpo"), make_console())
    watch, told = job.callbacks[0], _Told()
    lengths = iter([4, 5, 6, 6])
    monkeypatch.setattr(
        "llmkit.align.samples.score_answers",
        lambda *_: AnswerScore([Answer("q", "cats", "x" * next(lengths), "", True)]),
    )
    told.is_main, job.console = True, told
    watch.begin(job, told, None)
    told.append = lambda name, row: told.alerts.append((name, row.get("kind")))
    watch.on_train_begin(None, SimpleNamespace(global_step=0), None, job.trainer.model)
    for step in (1, 2, 3):
        watch.on_evaluate(None, SimpleNamespace(global_step=step), None, job.trainer.model)
    assert [alert for alert in told.alerts if alert[0] == "alerts.jsonl"] == [("alerts.jsonl", "longer-answers")]


# ---- refusals


def refusal(verb: str, settings) -> str:
    with pytest.raises(UserError) as error:
        VERBS[verb][0].main(settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_reference_with_another_tokenizer_is_refused(recipe, tmp_path):
    other = tmp_path / "other"
    tiny.llama(eos_token_id=2).save_pretrained(other)
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    vocab = json.loads(tokenizer.backend_tokenizer.to_str())
    a, b = sorted(vocab["model"]["vocab"], key=vocab["model"]["vocab"].get)[-2:]
    vocab["model"]["vocab"][a], vocab["model"]["vocab"][b] = vocab["model"]["vocab"][b], vocab["model"]["vocab"][a]
    tokenizer.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(vocab))
    said = refusal("dpo", recipe("dpo", ref_model_name_or_path=str(other)))
    assert "another tokenizer" in said and "2 tokens differ" in said and "ref_model_name_or_path" in said


def test_a_reference_trained_with_another_template_is_refused(recipe, tmp_path, base):
    parent = tmp_path / "parent"
    shutil.copytree(base, parent / "model")
    (parent / "manifest.json").write_text(json.dumps({"stage": "sft", "chat_template": "0" * 64}))
    assert "another chat template" in refusal("dpo", recipe("dpo", ref_model_name_or_path=str(parent / "model")))
    said = refusal("dpo", recipe("dpo", model_name_or_path=str(parent / "model"), chat_template_path="chatml"))
    assert "differs from the template that sft of this model was trained with" in said


def test_another_reference_is_used(recipe, tmp_path):
    other = tmp_path / "other"
    tiny.llama(seed=1, eos_token_id=2).save_pretrained(other)
    tiny.bpe_tokenizer().save_pretrained(other)
    settings = recipe("dpo", ref_model_name_or_path=str(other), max_steps=1)
    dpo.main(settings)
    assert abs(log_of(settings.output_dir)[0] - math.log(2)) > 1e-4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_dropout": 0.1, "use_peft": True}, "lora_dropout=0.1 has no effect with disable_dropout: true"),
        ({"loss_weights": [1.0]}, "loss_weights=[1.0] has no effect with one loss_type"),
        (
            {"eval_steps": 2, "test_split_size": 0.0},
            "eval_steps=2 has no effect without a validation shard or eval_tasks",
        ),
        ({"beta": -1.0}, "beta=-1.0; allowed: 0 or more"),
        ({"eval_samples": 0}, "max_new_tokens=4 has no effect without eval_answers or eval_samples"),
        ({"loss_type": "sigmoidd"}, "loss_type='sigmoidd'; allowed: sigmoid, hinge,"),
    ],
)
def test_settings_that_cannot_be_or_count_for_nothing_are_refused(recipe, keys, said):
    assert said in refusal("dpo", recipe("dpo", **keys))


def test_bad_rows_are_counted_by_reason(recipe, tmp_path, capsys):
    good = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(8)]
    bad = [
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "", "rejected": "no"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "x", "chosen": "word " * 200, "rejected": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, good + bad)))
    settings = recipe("dpo", data_dir=str(tmp_path), test_split_size=0.0, max_steps=1)
    said = refusal("dpo", settings)
    for part in ("4 rows cannot be trained on", "chosen = rejected (first: row 9)", "empty answer", "no prompt"):
        assert part in said
    result = dpo.main(dataclasses.replace(settings, max_bad_rows=4))
    assert result.metrics["num_bad_rows"] == 4 and "1 longer than max_length=128" in capsys.readouterr().out


def test_kto_wants_good_and_bad_answers(recipe, tmp_path):
    rows = [{"prompt": f"say {i}", "completion": "yes", "label": True} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = refusal("kto", recipe("kto", data_dir=str(tmp_path), test_split_size=0.0))
    assert "all 8 labels are true" in said


def test_rows_of_another_verb_are_refused_in_one_line(recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny.chat_rows(4))))
    for verb, wanted in (("dpo", "chosen and rejected"), ("kto", "label"), ("rrhf", "scores")):
        assert wanted in refusal(verb, recipe(verb, data_dir=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", "zero2"])
@pytest.mark.parametrize("verb", ["dpo", "rrhf", "reward"])
def test_two_processes_have_the_losses_of_one(recipe, tmp_path, verb, engine):
    one = recipe(verb, test_split_size=0.15, per_device_eval_batch_size=4)  # 6 rows: 4 for one process, 2 for the other
    VERBS[verb][0].main(one)
    two = dataclasses.replace(
        one, output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, accelerate_config=engine,
        num_processes=2, skip_checks=True,
    )  # fmt: skip
    (tmp_path / f"{verb}.yaml").write_text(config.dump(two))
    command = [sys.executable, "-m", "llmkit", verb, str(tmp_path / f"{verb}.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert log_of(two.output_dir) == pytest.approx(log_of(one.output_dir), abs=1e-4, rel=1e-5)
    found, expected = (json.loads((Path(c.output_dir) / "result.json").read_text())["metrics"] for c in (two, one))
    names = [name for name in expected if name.startswith("validation_")]
    assert len(names) > 3
    assert {n: found[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-3, abs=1e-4)
