"""The loop: what comes out of a run, and that accumulation, processes and starting points change what they should.

python -m pytest tests/train/test_pretrain.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import redraw, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkit import cli, config, verbs
from llmkit.data.toyworld import document
from llmkit.deploy.generate import opens_with_bos
from llmkit.evaluate.perplexity import token_losses
from llmkit.train import build, pretrain

ROOT = Path(__file__).parent.parent.parent
RECIPE = {
    "config_overrides": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "datasets": [{"path": "builtin/toyworld", "split": "train[:300]"}],
    "eval_datasets": [{"path": "builtin/toyworld", "name": "stories", "split": "validation[:20]"}],
    "vocab_size": 512,
    "max_length": 256,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "sample_max_new_tokens": 4,
    "use_cpu": True,
}


def run(folder: Path, **keys) -> dict:
    """Pretrains in process; returns result.json."""
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"output_dir": str(folder / "run"), "store_dir": str(folder / "data")} | RECIPE | keys)
    )
    assert cli.main(["pretrain", str(path)]) == 0
    return json.loads((Path(keys.get("output_dir", folder / "run")) / "result.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_contract_says(tmp_path, capsys):
    result = run(tmp_path, save_steps=2, save_total_limit=1, eval_steps=3, ngram_order=2, optim="muon")
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml", "manifest.json", "check.json", "metrics.jsonl", "result.json", "loss.png", "model",
        "checkpoints",
    }  # fmt: skip
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    assert result["status"] == "ok" and result["stage"] == "pretrain" and result["parent"] is None
    shard = result["shards"]["stories"]
    entropy = -sum(document("stories", "validation", i).log_prob for i in range(20))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    count = sum(
        len(tokenizer(document("stories", "validation", i).text, add_special_tokens=False)["input_ids"]) + 1
        for i in range(20)
    )
    assert shard["entropy"] == pytest.approx(entropy / count)
    assert shard["closed"] == pytest.approx(
        (shard["ngram2_loss"] - shard["loss"]) / (shard["ngram2_loss"] - shard["entropy"])
    )
    rows = metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_stories_loss" in row] == [3, 6]
    assert rows[-1]["eval_stories_loss"] == shard["loss"]
    assert result["tokens"] == rows[-2]["num_input_tokens_seen"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"versions", "git_commit", "hardware", "seed", "tokenizer", "datasets", "command"} <= set(manifest)
    out = capsys.readouterr().out
    for said in (
        "true entropy",
        "gap",
        str(folder / "model"),
        "llmkit generate",
        "trust_remote_code=True",
        "llmkit export",
    ):
        assert said in out


def test_the_first_loss_is_ln_v_and_training_lowers_it(tmp_path):
    run(tmp_path, max_steps=20, optim="muon")
    rows = [row["loss"] for row in metrics(tmp_path / "run")[:-1]]
    vocab_size = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").config.vocab_size
    assert rows[0] == pytest.approx(torch.log(torch.tensor(vocab_size)).item(), abs=0.05)
    assert rows[-1] < rows[0] - 1


def test_a_resolved_recipe_runs_again_to_the_same_losses(tmp_path):
    run(tmp_path)
    again = tmp_path / "again"
    argv = ["pretrain", str(tmp_path / "run/recipe.yaml"), "--output_dir", str(again)]
    assert cli.main(argv) == 0
    first, second = (metrics(folder) for folder in (tmp_path / "run", again))
    assert [row.get("loss") for row in first] == [row.get("loss") for row in second]


def test_evaluating_and_sampling_do_not_change_training(tmp_path):
    keys = {"config_overrides": RECIPE["config_overrides"] | {"attention_dropout": 0.3}}
    losses = []
    for name, extra in {"quiet": {}, "busy": {"eval_steps": 1, "eval_on_start": True, "save_steps": 2}}.items():
        run(tmp_path, output_dir=str(tmp_path / name), **keys, **extra)
        losses.append([row["loss"] for row in metrics(tmp_path / name) if "loss" in row])
    assert losses[0] == losses[1]


def gradients(model, batches, num_tokens) -> list[torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        (token_losses(model, batch, isolate=True).sum() / num_tokens).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_accumulation_1x8_equals_8x1_on_ragged_rows():
    """Rows with 1 to 15 labels: averaging per row instead of per token would give other gradients."""
    model = redraw(tiny_model(vocab_size=50))
    ids = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(16) < torch.arange(1, 17, 2)[:, None], ids, -100)
    batch = {"input_ids": ids, "shift_labels": labels, "position_ids": torch.arange(16).expand(8, 16).contiguous()}
    num_tokens = int((labels != -100).sum())
    whole = gradients(model, [batch], num_tokens)
    parts = gradients(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(8)], num_tokens)
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() <= 1e-6


def test_accumulation_gives_the_same_run(tmp_path):
    losses = []
    for size, accumulation in ((8, 1), (1, 8)):
        folder = tmp_path / str(size)
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 4}
        run(tmp_path, output_dir=str(folder), **keys)
        losses.append([(row["loss"], row["grad_norm"]) for row in metrics(folder) if "loss" in row])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5)


@pytest.mark.medium
def test_two_processes_give_the_losses_of_one(tmp_path):
    """gloo DDP, 4 rows each against 8 rows: measured difference 3e-6."""
    run(tmp_path, per_device_train_batch_size=8, output_dir=str(tmp_path / "one"))
    argv = [
        sys.executable,
        "-m",
        "llmkit",
        "pretrain",
        str(tmp_path / "recipe.yaml"),
        "--output_dir",
        str(tmp_path / "two"),
    ]
    argv += ["--num_processes", "2", "--per_device_train_batch_size", "4"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)
    a, b = (json.loads((tmp_path / name / "result.json").read_text())["shards"]["stories"] for name in ("one", "two"))
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["gap_stderr"] == pytest.approx(
        b["gap_stderr"], abs=1e-5
    )


OTHERS = {
    "qwen3": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
              "head_dim": 16, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "llama": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
}  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.parametrize("optim", ["muon", "adamw_torch_fused"])
def test_the_same_loop_trains_other_architectures(model_type, optim, tmp_path):
    run(tmp_path, model_type=model_type, config_overrides=OTHERS[model_type], optim=optim, max_steps=12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.config.model_type == model_type
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 0.3


def test_continuing_starts_from_the_loss_that_the_first_run_reached(tmp_path):
    first = run(tmp_path, max_steps=20, optim="muon")
    keys = {
        "model_name_or_path": str(tmp_path / "run"),
        "config_overrides": {},
        "vocab_size": 1024,
        "eval_on_start": True,
    }
    second = run(tmp_path, output_dir=str(tmp_path / "more"), **keys)
    start = metrics(tmp_path / "more")[0]
    assert start["step"] == 0 and start["eval_stories_loss"] == pytest.approx(
        first["shards"]["stories"]["loss"], abs=1e-6
    )
    assert second["shards"]["stories"]["loss"] < first["shards"]["stories"]["loss"]
    assert second["parent"] == str(tmp_path / "run")


def test_lora_trains_the_adapter_alone_and_leaves_a_plain_merged_model(tmp_path):
    peft = pytest.importorskip("peft")
    run(tmp_path, max_steps=20, optim="muon")
    keys = {
        "model_name_or_path": str(tmp_path / "run"),
        "config_overrides": {},
        "vocab_size": 1024,
        "use_peft": True,
        "learning_rate": 0.005,
        "max_steps": 30,
    }
    result = run(tmp_path, output_dir=str(tmp_path / "lora"), **keys)
    base, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("run", "lora"))
    assert merged.config.model_type == "llmkit"
    assert torch.equal(base.model.embed_tokens.weight, merged.model.embed_tokens.weight)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "lora/adapter")
    ids = torch.randint(200, (2, 20))
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
    before = json.loads((tmp_path / "run/result.json").read_text())["shards"]["stories"]["loss"]
    assert result["shards"]["stories"]["loss"] < before


def test_activation_checkpointing_changes_no_loss(tmp_path):
    losses = {}
    for key in ("", "activation_checkpointing"):
        run(tmp_path, output_dir=str(tmp_path / f"x{key}"), **({key: True} if key else {}))
        losses[key] = [row["loss"] for row in metrics(tmp_path / f"x{key}") if "loss" in row]
    assert losses[""] == pytest.approx(losses["activation_checkpointing"], abs=1e-6)


@pytest.mark.slow
def test_torch_compile_changes_no_loss(tmp_path):
    losses = []
    for compiled in (False, True):
        run(tmp_path, output_dir=str(tmp_path / str(compiled)), torch_compile=compiled)
        losses.append([row["loss"] for row in metrics(tmp_path / str(compiled)) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_contiguous_and_mixtures_train(tmp_path):
    (tmp_path / "a.txt").write_text("abcd" * 2000)
    (tmp_path / "b.txt").write_text("dcba" * 2000)
    files = [
        {"path": "text", "data_files": str(tmp_path / f"{n}.txt"), "fraction": f} for n, f in (("a", 0.75), ("b", 0.25))
    ]
    shard = [{"path": "text", "data_files": str(tmp_path / "a.txt"), "shard": "a"}]
    result = run(
        tmp_path, datasets=files, eval_datasets=shard, packing_strategy="contiguous", tokenizer_type="char",
        vocab_size=1024, max_length=32, max_steps=80, optim="muon",
    )  # fmt: skip
    assert result["shards"]["a"]["loss"] < 0.3  # the order is settled by two characters


def test_a_store_made_by_datatrove_trains_unchanged(tmp_path):
    """Tokenised elsewhere: `path` names the folder with the .ds file, `tokenizer_name` its tokenizer."""
    run(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    import numpy as np

    ids = [
        [*tokenizer(document("facts", "train", i).text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for i in range(60)
    ]
    store = tmp_path / "elsewhere"
    store.mkdir()
    np.asarray([t for doc in ids for t in doc], "<u2").tofile(store / "00000.ds")
    np.cumsum([len(doc) for doc in ids]).astype("<u8").tofile(store / "00000.ds.index")
    (store / "00000.ds.metadata").write_text(f"tok|2\n{sum(map(len, ids))}\n1 T")
    result = run(
        tmp_path,
        output_dir=str(tmp_path / "new"),
        datasets=[{"path": str(store)}],
        tokenizer_name=str(tmp_path / "run/model"),
        vocab_size=1024,
    )
    assert result["tokens"] > 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*/pretrain*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_recipe_builds_and_trains_shrunk(path, tmp_path):
    settings = config.load(verbs.PretrainConfig, [str(path)])
    recipe = {key: value for key, value in yaml.safe_load(path.read_text()).items()}
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe |= {
        key: RECIPE[key] for key in ("datasets", "eval_datasets", "logging_steps", "sample_max_new_tokens", "use_cpu")
    }
    recipe |= {
        "config_overrides": settings.config_overrides | small,
        "max_length": 128,
        "max_steps": 2,
        "vocab_size": 512 if settings.tokenizer_type == "bpe" else 1024,
    }
    recipe |= {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "torch_compile": False,
        "report_to": "none",
    }
    recipe |= {"ngram_order": None, "tokenizer_name": None, "data_dir": "."}
    recipe.pop("num_train_epochs", None)
    assert run(tmp_path, **{**recipe, "output_dir": str(tmp_path / "run")})["status"] == "ok"


def test_generate_streams_and_export_gives_equal_logits(tmp_path, capsys):
    run(tmp_path, max_steps=30, optim="muon")
    capsys.readouterr()
    argv = ["generate", "--model_name_or_path", str(tmp_path / "run"), "--max_new_tokens", "12", "--prompt", "Ada had"]
    assert cli.main([*argv, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("Ada had") and len(greedy) > len("Ada had\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    ids = [tokenizer.bos_token_id, *tokenizer("Ada had", add_special_tokens=False)["input_ids"]]
    for _ in range(12):  # greedy by hand, no cache
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert greedy.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    samples = set()
    for seed in ("1", "1", "2"):
        assert cli.main([*argv, "--seed", seed]) == 0
        samples.add(capsys.readouterr().out)
    assert len(samples) == 2
    assert cli.main(["export", "--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "q")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    probe = torch.randint(model.config.vocab_size, (2, 30))
    assert plain.config.model_type == "qwen3" and torch.equal(plain(probe).logits, model(probe).logits)


def test_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "token_losses", lambda *a: token_losses(*a) * float("nan"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "run")}))
    assert cli.main(["pretrain", str(path)]) == 2
    assert "loss is nan at step 1" in capsys.readouterr().err
    assert not (tmp_path / "run/model").exists()


def test_weights_that_are_not_finite_are_not_saved_and_cost_no_checkpoint(tmp_path, monkeypatch, capsys):
    """Loss is looked at every logging_steps only; a save in between must look for itself."""
    step_of = pretrain.lr_factor

    def blow_up(step, *rest):
        return 1e45 if step == 3 else step_of(step, *rest)

    monkeypatch.setattr(pretrain, "lr_factor", blow_up)
    path = tmp_path / "recipe.yaml"
    keys = {"output_dir": str(tmp_path / "run"), "save_steps": 2, "save_total_limit": 1, "logging_steps": 100}
    path.write_text(yaml.safe_dump(RECIPE | keys))
    assert cli.main(["pretrain", str(path)]) == 2
    assert "the weights are not finite" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    "model_type, shape, said",
    [
        ("bert", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "tokens see later ones"),
        ("opt", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}, "apart"),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "apart"),
    ],
)
def test_models_that_leak_are_refused(model_type, shape, said, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    keys = {"output_dir": str(tmp_path / "run"), "model_type": model_type, "config_overrides": shape}
    path.write_text(yaml.safe_dump(RECIPE | keys))
    assert cli.main(["pretrain", str(path)]) == 2
    assert said in capsys.readouterr().err
    if said == "apart":
        assert run(tmp_path, **keys, document_isolation=False)["status"] == "ok"


def test_probing_a_model_leaves_its_weights_and_random_numbers_alone():
    model = tiny_model().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert build.probe_attention(model) == (True, True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert torch.equal(state, torch.get_rng_state())


def test_the_saved_tokenizer_opens_a_text_as_training_did(tmp_path):
    run(tmp_path, save_steps=2)
    for folder in ("run/model", "run/checkpoints/step-00000002/model"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer("Ada had")["input_ids"][0] == tokenizer.bos_token_id
        assert opens_with_bos(str(tmp_path / folder), tokenizer)


def test_the_bpe_of_a_mixture_learns_from_every_source(tmp_path):
    for name, text in {"a": "aaaa " * 3000, "b": "bbbb " * 3000}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    files = [{"path": "text", "data_files": str(tmp_path / f"{name}.txt")} for name in "ab"]
    run(tmp_path, datasets=files, eval_datasets=[], max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in (" aaaa", " bbbb")] == [1, 1]


SHAKESPEARE = ROOT.parent / "shared" / "data" / "tiny_shakespeare.txt"


@pytest.mark.slow
def test_toy_recipe_closes_nine_tenths_of_the_gap(tmp_path):
    """Minutes. The claim of recipes/toy/README.md."""
    argv = ["pretrain", str(ROOT / "recipes/toy/pretrain.yaml"), "--output_dir", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    for shard in json.loads((tmp_path / "run/result.json").read_text())["shards"].values():
        assert shard["closed"] >= 0.9
        assert shard["loss"] - shard["entropy"] > -3 * shard["gap_stderr"]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tiny_shakespeare.txt is not at hand")
def test_shakespeare_recipe_beats_1_90_nats_per_character(tmp_path):
    """Minutes. The claim of recipes/shakespeare-char/README.md."""
    recipe = str(ROOT / "recipes/shakespeare-char/pretrain.yaml")
    assert (
        cli.main(["pretrain", recipe, "--data_dir", str(SHAKESPEARE.parent), "--output_dir", str(tmp_path / "run")])
        == 0
    )
    assert json.loads((tmp_path / "run/result.json").read_text())["shards"]["validation"]["loss"] < 1.90


@pytest.mark.medium
@pytest.mark.real
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tiny_shakespeare.txt is not at hand")
def test_quick_shakespeare_recipe_is_as_good_as_nanogpts_cpu_command(tmp_path):
    """Six seconds on one thread; its CPU time is measured in benchmarks/vs_nanogpt.py."""
    recipe = str(ROOT / "recipes/shakespeare-char/pretrain_cpu_quick.yaml")
    argv = ["pretrain", recipe, "--data_dir", str(SHAKESPEARE.parent), "--output_dir", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["shards"]["validation"]["loss"] < 1.8982 and result["metrics"]["num_alerts"] == 0
