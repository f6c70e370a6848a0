"""The monitor: what it notices, what it leaves alone, and that a bad step never reaches the weights.

python -m pytest tests/train/test_monitor.py
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_model
from safetensors.torch import load_file
from test_pretrain import RECIPE, metrics, run
from torch import nn

from llmkit import cli
from llmkit.evaluate.perplexity import ShardScore, token_losses
from llmkit.run import Run
from llmkit.train import pretrain
from llmkit.train.monitor import LEAST_HISTORY, WINDOW, Monitor, NotFinite, first_not_finite


def monitor(folder: Path) -> Monitor:
    return Monitor(Run(folder, "pretrain"), torch.device("cpu"), lambda line: None)


def alerts(folder: Path) -> list[dict]:
    path = folder / "alerts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def judge(watch: Monitor, loss: float, norm: float = 1.0) -> bool:
    return bool(watch.judge(torch.tensor(loss), torch.tensor(norm)))


def quiet_steps(watch: Monitor, count: int) -> None:
    """Losses 1 and 3 in turn: mean 2, standard deviation 1 (a little more, since it is the sample's)."""
    for i in range(count):
        assert not judge(watch, 1.0 + 2 * (i % 2))


@pytest.mark.parametrize("loss, is_spike", [(8.01, False), (8.04, True)])
def test_a_spike_is_six_standard_deviations_above_the_window(loss, is_spike, tmp_path):
    """128 losses of mean 2 and deviation 1.0039: the limit is 8.0236."""
    watch = monitor(tmp_path)
    quiet_steps(watch, WINDOW)
    assert judge(watch, loss) == is_spike
    watch.drain()
    assert watch.num_skipped == is_spike and [a["kind"] for a in alerts(tmp_path)] == ["spike-skipped"] * is_spike
    assert all(a["step"] == WINDOW + 1 for a in alerts(tmp_path))


def test_the_gradient_norm_is_judged_too_and_a_drop_is_none(tmp_path):
    watch = monitor(tmp_path)
    quiet_steps(watch, WINDOW)
    assert not judge(watch, -50.0, 0.0)
    assert not judge(watch, 2.0, norm=15.0)  # heavy tails are no spikes
    assert judge(watch, 2.0, norm=100.0)


def test_nothing_is_a_spike_before_there_is_a_history(tmp_path):
    watch = monitor(tmp_path)
    quiet_steps(watch, LEAST_HISTORY - 1)
    assert not judge(watch, 1000.0)


def test_a_lasting_change_is_accepted_after_a_while(tmp_path):
    """Were spikes left out of the window, a harder data set would be skipped for ever."""
    watch = monitor(tmp_path)
    quiet_steps(watch, WINDOW)
    verdicts = [judge(watch, 12.0) for _ in range(40)]
    assert verdicts[0] and not verdicts[-1]


def test_one_huge_spike_does_not_hide_the_next(tmp_path):
    watch = monitor(tmp_path)
    quiet_steps(watch, WINDOW)
    assert judge(watch, 1e9) and judge(watch, 100.0)


def test_spikes_are_judged_from_the_64th_step_of_history(tmp_path):
    watch = monitor(tmp_path)
    quiet_steps(watch, LEAST_HISTORY)
    assert judge(watch, 1000.0)


def test_a_loss_that_hardly_moves_makes_no_spike(tmp_path):
    """0.01 of the mean is the least deviation: 2.0 +- 0 has its limit at 2.12."""
    watch = monitor(tmp_path)
    for _ in range(WINDOW):
        assert not judge(watch, 2.0)
    assert not judge(watch, 2.1) and judge(watch, 2.3)


@pytest.mark.parametrize("count", [WINDOW, WINDOW + 40])
def test_the_window_holds_exactly_the_last_steps(count, tmp_path):
    watch, values = monitor(tmp_path), torch.linspace(3.0, 2.0, count)
    for value in values.tolist():
        assert not judge(watch, value)
    assert torch.equal(watch.window[0].sort().values, values[-WINDOW:].sort().values)


@pytest.mark.parametrize("loss, norm", [(float("nan"), 1.0), (2.0, float("inf"))])
def test_after_a_value_that_is_not_finite_no_update_is_made_any_more(loss, norm, tmp_path):
    """On a GPU the host learns of it later: until then the device itself refuses every update."""
    watch = monitor(tmp_path)
    assert not judge(watch, 2.0) and judge(watch, loss, norm) and judge(watch, 2.0)
    with pytest.raises(NotFinite) as raised:
        watch.drain()
    assert raised.value.step == 2 and ("loss is nan" if loss != loss else "gradient norm is inf") in str(raised.value)


def test_the_same_batch_twice_in_an_epoch_is_noticed_once(tmp_path):
    watch, ids = monitor(tmp_path), torch.arange(8).view(2, 4)
    for step, epoch, batch in ((1, 0, ids), (2, 0, ids + 1), (3, 1, ids), (4, 1, ids + 1)):
        watch.see_batch(step, epoch, batch)
    assert not alerts(tmp_path)
    watch.see_batch(5, 1, ids.clone())
    watch.see_batch(6, 1, ids)
    assert [(a["step"], a["kind"]) for a in alerts(tmp_path)] == [(5, "batch-repeated")]


def test_a_tensor_without_gradient_for_three_steps_is_named(tmp_path):
    watch = monitor(tmp_path)
    for step in range(3):
        watch.see_gradients(step, {"dead": 0.0, "alive": 1e-9, "late": float(step == 2)})
    assert [(a["kind"], a["tensor"]) for a in alerts(tmp_path)] == [("zero-gradient", "dead")]


def test_rates_off_the_schedule_are_noticed_once(tmp_path):
    watch = monitor(tmp_path)
    watch.see_learning_rates(1, [0.1, 0.003], [0.1, 0.003])
    watch.see_learning_rates(2, [0.1, 0.0031], [0.1, 0.003])
    watch.see_learning_rates(3, [0.1, 0.0031], [0.1, 0.003])
    assert [(a["step"], a["kind"]) for a in alerts(tmp_path)] == [(2, "learning-rate-off-plan")]


@pytest.mark.parametrize("loss, entropy, kinds", [(1.0, 1.1, ["below-entropy"]), (1.07, 1.1, []), (1.0, None, [])])
def test_a_loss_below_the_entropy_is_a_leak(loss, entropy, kinds, tmp_path):
    monitor(tmp_path).see_scores(9, {"a": ShardScore(loss, None, entropy, 0.01, 100)})
    assert [a["kind"] for a in alerts(tmp_path)] == kinds


def test_a_restored_monitor_gives_the_same_verdicts(tmp_path):
    first, second = monitor(tmp_path), monitor(tmp_path)
    quiet_steps(first, 100)
    first.see_batch(100, 3, torch.arange(4))
    first.drain()
    second.restore({key: value.clone() for key, value in first.state.items()}, step=100)
    for loss in (2.0, 7.9, 9.0, 2.0):
        assert torch.equal(
            first.judge(torch.tensor(loss), torch.ones(())), second.judge(torch.tensor(loss), torch.ones(()))
        )
    second.see_batch(101, 3, torch.arange(4))
    second.drain()
    assert [(a["step"], a["kind"]) for a in alerts(tmp_path)] == [(101, "batch-repeated"), (103, "spike-skipped")]


def test_restored_counts_go_on(tmp_path):
    first, second = monitor(tmp_path), monitor(tmp_path)
    quiet_steps(first, WINDOW)
    judge(first, 50.0)
    first.drain()
    first.see_learning_rates(1, [1.0], [2.0])
    second.restore(first.state, step=WINDOW + 1)
    assert (second.num_skipped, second.num_alerts) == (first.num_skipped, first.num_alerts) == (1, 2)
    second.see_learning_rates(2, [1.0], [2.0])
    assert second.num_alerts == 2  # said already


# ---- the first module that goes bad


def culprit(model: nn.Module) -> str | None:
    ids = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0))
    return first_not_finite(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())


def test_a_healthy_model_has_no_culprit_and_keeps_no_hooks():
    model = tiny_model()
    assert culprit(model) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_weight_that_is_not_a_number_is_named():
    model = tiny_model(num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[5, 7] = float("nan")
    assert culprit(model) == "model.layers.3.mlp.up_proj: weight 'weight' (1 of 3,072 values are nan)"


def test_an_output_that_overflows_is_named_not_the_layers_after_it():
    model = tiny_model(num_hidden_layers=4)
    model.model.layers[3].mlp.act_fn.register_forward_hook(lambda m, args, out: out / 0)
    found = culprit(model)
    assert found.startswith("model.layers.3.mlp.act_fn: its output")


def test_a_gradient_that_goes_bad_on_the_way_back_is_named():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    model = tiny_model(num_hidden_layers=4)
    model.model.layers[3].mlp.register_forward_hook(lambda m, args, out: Bad.apply(out))
    found = culprit(model)
    assert found.startswith("model.layers.3.mlp.down_proj: the gradient at its output")


def test_a_bad_input_is_named_when_no_module_made_it():
    """A residual sum belongs to no module: the norm after it is the first to see it."""
    model = tiny_model()
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_pre_hook(lambda m, args: (args[0] * float("nan"),), prepend=True)
    assert culprit(model).startswith("model.layers.1.post_attention_layernorm: its input")


def test_a_bad_gradient_of_a_weight_is_named_when_the_outputs_gradients_are_fine():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda grad: grad * float("nan"))
    assert culprit(model).startswith("model.layers.1.mlp.up_proj.weight: its gradient")


# ---- in a run


def test_a_failed_run_without_checkpoints_may_be_started_anew(tmp_path, monkeypatch):
    plant(monkeypatch, 2, lambda losses: losses * float("nan"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "run")}))
    assert cli.main(["pretrain", str(path)]) == 2
    monkeypatch.undo()
    assert run(tmp_path)["status"] == "ok" and not (tmp_path / "run/alerts.jsonl").exists()


def plant(monkeypatch, step: int, damage) -> None:
    """Lets `damage(losses)` change the per-token losses of one step of the loop."""
    calls = [0]

    def losses(model, batch, isolate):
        if model.training:
            calls[0] += 1
        out = token_losses(model, batch, isolate)
        return damage(out) if model.training and calls[0] == step else out

    monkeypatch.setattr(pretrain, "token_losses", losses)


@pytest.mark.medium
def test_a_planted_spike_is_skipped_and_training_goes_on(tmp_path, monkeypatch):
    keys = {"max_steps": 80, "optim": "muon", "save_steps": 69, "logging_steps": 1}
    plant(monkeypatch, 70, lambda losses: losses * 50)
    result = run(tmp_path, **keys)
    rows = {row["step"]: row for row in metrics(tmp_path / "run") if "loss" in row}
    assert result["metrics"]["num_skipped_steps"] == result["metrics"]["num_alerts"] == 1
    assert [(a["step"], a["kind"]) for a in alerts(tmp_path / "run")] == [(70, "spike-skipped")]
    assert rows[70]["loss"] > 20 * rows[69]["loss"] and rows[80]["loss"] < 1.1 * rows[69]["loss"]
    assert rows[69]["num_skipped_steps"] == 0 and rows[70]["num_skipped_steps"] == 1


@pytest.mark.medium
def test_a_skipped_step_leaves_weights_and_optimizer_alone(tmp_path, monkeypatch):
    """The checkpoints on both sides of the spike hold the same tensors."""
    plant(monkeypatch, 70, lambda losses: losses * 50)
    run(tmp_path, max_steps=70, optim="muon", save_steps=1, save_total_limit=2)
    before, after = (tmp_path / f"run/checkpoints/step-000000{n}" for n in (69, 70))
    for name in ("model/model.safetensors", "optimizer.safetensors"):
        a, b = load_file(before / name), load_file(after / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_nan_in_layer_3s_mlp_is_named_before_the_update_and_its_batch_is_kept(tmp_path, monkeypatch, capsys):
    built = pretrain.get_model

    def planted(config, tokenizer):
        model = built(config, tokenizer)
        calls = [0]

        def hook(module, args, out):
            calls[0] += module.training
            return out * float("nan") if calls[0] >= 3 else out

        model.model.layers[3].mlp.register_forward_hook(hook)
        return model

    monkeypatch.setattr(pretrain, "get_model", planted)
    folder, path = tmp_path / "run", tmp_path / "recipe.yaml"
    shape = RECIPE["config_overrides"] | {"num_hidden_layers": 4}
    keys = {"output_dir": str(folder), "config_overrides": shape, "save_steps": 2}
    path.write_text(yaml.safe_dump(RECIPE | keys))
    assert cli.main(["pretrain", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "loss is nan at step 3" in error and "model.layers.3.mlp: its output" in error
    alert = alerts(folder)[0]
    assert (alert["step"], alert["kind"]) == (3, "not-finite") and "layers.3.mlp" in alert["first"]
    batch = load_file(folder / alert["batch"])
    assert batch["input_ids"].shape == (4, 256) and set(batch) == {"input_ids", "shift_labels", "position_ids"}
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"] and not (folder / "model").exists()
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert run(tmp_path, **keys, resume_from_checkpoint=True)["status"] == "ok"


@pytest.mark.parametrize("optim", ["muon", "adamw_torch_fused"])
def test_masked_updates_equal_updates_that_were_not_made(optim):
    """What a GPU does without waiting: found_inf = 1 leaves weights and state as they are, 0 changes nothing."""
    from llmkit.train.optim import build_optimizer
    from llmkit.verbs import PretrainConfig

    results = []
    for flags in ((None, None), (0.0, 1.0, 0.0)):
        model = tiny_model(seed=1)
        optimizer = build_optimizer(model, PretrainConfig(optim=optim))
        generator = torch.Generator().manual_seed(0)
        for flag in flags:
            scale = float("nan") if flag else 1.0
            for p in model.parameters():
                p.grad = torch.full_like(p, scale) if flag else torch.randn(p.shape, generator=generator)
            optimizer.found_inf = None if flag is None else torch.tensor(flag)
            optimizer.step()
        results.append([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_loop_shows_the_monitor_everything(tmp_path, monkeypatch):
    seen: dict[str, list[int]] = {}
    for name in ("see_batch", "see_gradients", "see_learning_rates", "see_scores"):
        before = getattr(Monitor, name)

        def note(self, step, *rest, name=name, before=before):
            seen.setdefault(name, []).append(step)
            return before(self, step, *rest)

        monkeypatch.setattr(Monitor, name, note)
    run(tmp_path, warmup_steps=2, eval_steps=3)
    steps = [1, 2, 3, 4, 5, 6]
    assert seen == {"see_batch": steps, "see_learning_rates": steps, "see_gradients": [3, 4, 5], "see_scores": [3, 6]}


def test_the_batch_that_is_kept_is_the_one_that_went_bad(tmp_path, monkeypatch):
    """Accumulation: the second micro-batch of step 3 is the bad one."""
    ids, built = [], pretrain.get_model

    def planted(config, tokenizer):
        model = built(config, tokenizer)

        def see(module, args, kwargs):
            if module.training:
                ids.append((args[0] if args else kwargs["input_ids"]).clone())

        def spoil(module, args, out):
            return out * float("nan") if module.training and len(ids) >= 6 and torch.equal(ids[-1], ids[5]) else out

        model.model.register_forward_pre_hook(see, with_kwargs=True)
        model.model.layers[0].mlp.register_forward_hook(spoil)
        return model

    monkeypatch.setattr(pretrain, "get_model", planted)
    path = tmp_path / "recipe.yaml"
    keys = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    path.write_text(yaml.safe_dump(RECIPE | keys))
    assert cli.main(["pretrain", str(path)]) == 2
    alert = alerts(tmp_path / "run")[0]
    assert alert["step"] == 3 and alert["first"].startswith("model.layers.0.mlp: its output")
    assert torch.equal(load_file(tmp_path / "run" / alert["batch"])["input_ids"], ids[5])
