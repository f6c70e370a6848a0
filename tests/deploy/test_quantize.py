"""A quantised folder is what `from_pretrained` reads, its cost is measured on that, and what was left is named."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from llmkit import cli
from llmkit.deploy import layers, quantize
from llmkit.deploy.cost import Cost
from llmkit.deploy.layers import plan_layers
from llmkit.evaluate.texts import score_texts
from llmkit.model import LlmkitConfig, LlmkitForCausalLM
from llmkit.verbs import QuantizeConfig

pytest.importorskip("bitsandbytes")
TEXT = "".join(tiny.CORPUS[:6])
WIDE = dict(hidden_size=64, intermediate_size=128)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No fresh processes, one round: their figures are the benchmark's business."""
    monkeypatch.setattr(quantize, "resident_growth", lambda *_: 1)
    monkeypatch.setattr("llmkit.deploy.cost.ROUNDS", 1)


@pytest.fixture(scope="module")
def learnt() -> dict[str, torch.Tensor]:
    """Weights of a model that knows the text by heart."""
    model, ids = tiny.llama(**WIDE), tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    optim = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optim.step()
        optim.zero_grad()
    return model.state_dict()


def tokenizer():
    return tiny.bpe_tokenizer(bos=True, chat=False)


@pytest.fixture
def source(tmp_path, learnt) -> Path:
    model = tiny.llama(**WIDE)
    model.load_state_dict(learnt)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, TEXT[:90])))
    return tmp_path / "model"


def words(source: Path, out: Path, *flags: str) -> list[str]:
    text = "[{path: json, data_files: held.jsonl, shard: held}]"
    given = ["--model_name_or_path", str(source), "--output_dir", str(out), "--use_cpu"]
    return ["quantize", *given, "--eval_datasets", text, "--data_dir", str(source.parent), *flags]


def the_line(argv: list[str], capsys) -> str:
    capsys.readouterr()
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def plan(model, **keys) -> layers.Plan:
    return plan_layers(model, QuantizeConfig("m", "o", **keys))


# ---- which layers


def test_layers_whose_width_does_not_divide_stay_and_are_named():
    made = plan(tiny.llama(hidden_size=64, intermediate_size=96), load_in_4bit=True)
    assert made.told() == (
        "model.embed_tokens (embedding); 2 x model.layers.*.mlp.down_proj (width 96 does not divide by 64); "
        "lm_head (head)"
    )
    assert made.skip_modules == [
        "lm_head",
        "down_proj",
    ]  # the head too: given any name, transformers keeps nothing else
    assert len(made.quantized) == 2 * 6
    assert plan(tiny.llama(hidden_size=64, intermediate_size=96), load_in_8bit=True).skip_modules == []


def test_one_layer_of_many_is_skipped_by_its_whole_name():
    model = tiny.llama(**WIDE)
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(96, 64)
    made = plan(model, load_in_4bit=True)
    assert made.skip_modules == ["lm_head", "layers.1.mlp.down_proj"]
    assert "model.layers.0.mlp.down_proj" in made.quantized and "model.layers.1.mlp.down_proj" not in made.quantized


def test_transposed_layers_of_gpt2_count_by_what_they_compute():
    """Conv1D holds (in, out): 64 -> 96 divides by 64 and 32, the other way round it would not."""
    config = GPT2Config(
        vocab_size=100, n_embd=64, n_inner=96, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    made = plan(GPT2LMHeadModel(config), load_in_4bit=True)
    assert "transformer.h.0.mlp.c_fc" in made.quantized
    assert made.left["transformer.h.0.mlp.c_proj"] == "width 96 does not divide by 64"
    assert made.left["transformer.wpe"] == "embedding"
    assert made.left["lm_head"] == "head, tied to the embedding"


def test_names_to_skip_are_looked_up(source, tmp_path, capsys):
    line = the_line(words(source, tmp_path / "o", "--load_in_4bit", "--llm_int8_skip_modules", "[down_porj]"), capsys)
    assert (
        "'down_porj' fits no linear layer of LlamaForCausalLM; allowed: ends of names" in line and "down_proj" in line
    )
    made = plan(tiny.llama(**WIDE), load_in_8bit=True, llm_int8_skip_modules=["model.layers.0", "up_proj"])
    assert made.told().count("llm_int8_skip_modules") == 1 and len(made.quantized) == 6
    assert made.skip_modules == ["lm_head", "model.layers.0", "up_proj"]


# ---- the verb


@pytest.mark.medium
@pytest.mark.parametrize("flags", [["--load_in_8bit"], ["--load_in_4bit", "--use_bnb_nested_quant"]])
def test_what_is_measured_is_what_is_read_back(source, tmp_path, flags):
    out = tmp_path / "out"
    assert cli.main(words(source, out, *flags, "--max_perplexity_ratio", "9")) == 0
    result, manifest = (json.loads((out / name).read_text()) for name in ("result.json", "manifest.json"))
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()  # as anyone loads it
    scores = score_texts(model, tokenizer(), [TEXT, TEXT[:90]], 256, 1)
    held = result["shards"]["held"]
    assert held["loss"] == pytest.approx(scores.loss, abs=2e-3)  # batches of 2: padded rows round otherwise in bfloat16
    original = score_texts(AutoModelForCausalLM.from_pretrained(source).eval(), tokenizer(), [TEXT, TEXT[:90]], 256, 1)
    assert held["original_loss"] == pytest.approx(original.loss, abs=1e-5)
    assert held["loss"] != held["original_loss"]
    assert (held["num_documents"], held["num_tokens"]) == (2, int(scores.num_tokens.sum()) + 2)
    assert result["metrics"]["disk_bytes"] < result["metrics"]["original_disk_bytes"]
    assert (result["status"], result["parent"], manifest["parent"]) == ("ok", str(source), str(source))
    assert manifest["quantization"] == ("8bit" if "8bit" in flags[0] else "nf4-double")
    assert len(manifest["quantized_layers"]) == 14 and set(manifest["left_layers"]) == {"model.embed_tokens", "lm_head"}


@pytest.mark.medium
@pytest.mark.parametrize(("ratio", "code", "said"), [
    (1.06, 1, "FAILED    perplexity on held is 1.0600 times the original's, limit 1.05; the interval [1.0400, "),
    (1.05, 0, "ok        perplexity at most 1.0500 times the original's (held); limit 1.05; the interval "),
])  # fmt: skip
def test_a_loss_above_the_limit_fails_and_keeps_the_folder(source, tmp_path, capsys, monkeypatch, ratio, code, said):
    told = Cost(0.3, 0.2, ratio, ratio - 0.02, ratio + 0.02, 0.9, 0.01, 2, 100)
    monkeypatch.setattr(quantize, "compare_on", lambda original, others, *_: dict.fromkeys(others, told))
    assert cli.main(words(source, tmp_path / "out", "--load_in_4bit")) == code
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["status"] == ("failed" if code else "ok")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").is_quantized


@pytest.mark.medium
@pytest.mark.parametrize(("flag", "limit", "code"), [("--load_in_8bit", 1.01, 1), ("--load_in_4bit", 1.05, 0)])
def test_the_worst_text_counts_against_the_limit_of_the_bits(source, tmp_path, monkeypatch, flag, limit, code):
    def told(original, others, passages, *_):
        ratio = 1.03 if passages.num_documents == 2 else 1.0
        return dict.fromkeys(others, Cost(0.3, 0.2, ratio, ratio, ratio, 0.9, 0.01, 2, 100))

    monkeypatch.setattr(quantize, "compare_on", told)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    both = "[{path: json, data_files: held.jsonl, shard: two}, {path: json, data_files: one.jsonl, shard: one}]"
    argv = words(source, tmp_path / "out", flag)
    argv[argv.index("--eval_datasets") + 1] = both
    assert cli.main(argv) == code
    metrics = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    assert (metrics["perplexity_ratio"], metrics["max_perplexity_ratio"]) == (1.03, limit)


def test_entropy_is_told_per_token():
    cost = Cost(0.3, 0.2, 1.1, 1.0, 1.2, 0.9, 0.01, 2, 100)
    assert quantize._shard(cost, 50.0)["entropy"] == 0.5 and quantize._shard(cost, None)["entropy"] is None


@pytest.mark.medium
def test_the_folder_holds_what_was_asked_for_and_tasks_are_asked_before_and_after(source, tmp_path, monkeypatch):
    class Scorer:
        def __init__(self, *_):
            pass

        def figures(self):
            return ["acc"]

        def score(self, model):
            return {"acc": 0.4 if getattr(model, "is_quantized", False) else 0.5}

    monkeypatch.setattr("llmkit.evaluate.in_training.TaskScorer", Scorer)
    flags = ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant", "--eval_tasks", "[any]"]
    cli.main(words(source, tmp_path / "out", *flags))
    how = json.loads((tmp_path / "out" / "model" / "config.json").read_text())["quantization_config"]
    assert (how["bnb_4bit_quant_type"], how["bnb_4bit_use_double_quant"]) == ("fp4", True)
    metrics = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    assert (metrics["original_acc"], metrics["acc"]) == (0.5, 0.4)


@pytest.mark.medium
@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (64, 100), (128, 352)])
def test_layers_that_do_not_divide_do_not_break_the_folder(tmp_path, hidden, width):
    """Quantised, they end in a RuntimeError or AssertionError at the first use on a CPU with AVX512-BF16."""
    sizes = dict(hidden_size=hidden, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4)
    config = LlmkitConfig(vocab_size=424, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, **sizes)
    LlmkitForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    assert cli.main(words(tmp_path / "model", tmp_path / "out", "--load_in_4bit")) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model(torch.tensor([[1, 5, 7]])).logits.isfinite().all()


@pytest.mark.medium
def test_an_adapter_is_merged_first(source, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(source)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_alpha=1))
    adapted.save_pretrained(tmp_path / "adapter")
    argv = words(tmp_path / "adapter", tmp_path / "out", "--load_in_8bit", "--max_perplexity_ratio", "9")
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "merged    LORA of rank 2" in said
    assert said.count("load it") == 1, "the folder of the merged model has gone again"
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        far = (read(ids).logits - adapted.eval()(ids).logits).abs().max()
        apart = (read(ids).logits - AutoModelForCausalLM.from_pretrained(source)(ids).logits).abs().max()
    assert far < apart / 5


@pytest.mark.medium
def test_what_does_not_run_quantised_is_said_in_one_line_and_not_kept(tmp_path, capsys):
    """Mamba uses the weight of a layer by itself; in 8 bit that ended in a traceback, with the folder there."""
    config = MambaConfig(vocab_size=424, hidden_size=32, num_hidden_layers=1, state_size=4, bos_token_id=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    capsys.readouterr()
    assert cli.main(words(tmp_path / "model", tmp_path / "out", "--load_in_8bit")) == 2
    assert "model: does not run in 8bit and was not kept (" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.medium
def test_a_quantised_folder_is_a_column_of_an_evaluation(source, tmp_path, capsys):
    assert cli.main(words(source, tmp_path / "nf4", "--load_in_4bit", "--max_perplexity_ratio", "9")) == 0
    text = f"[{{path: json, data_files: {tmp_path}/held.jsonl, shard: held}}]"
    argv = ["eval", str(source), str(tmp_path / "nf4"), "--output_dir", str(tmp_path / "eval"), "--use_cpu"]
    assert cli.main([*argv, "--eval_datasets", text]) == 0
    found = json.loads((tmp_path / "eval" / "comparison.json").read_text())
    plain, packed = found["columns"]
    assert plain["num_parameters"] == packed["num_parameters"]  # two of which stand in one byte
    measured = json.loads((tmp_path / "nf4" / "result.json").read_text())["shards"]["held"]
    assert found["shards"][0]["scores"][packed["name"]]["loss"] == pytest.approx(measured["loss"], abs=2e-3)
    assert packed["run"] == str(tmp_path / "nf4")


# ---- mistakes


def test_mistakes_are_one_line(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert "neither is set; choose one" in the_line(words(source, out), capsys)
    assert "both are set; choose one" in the_line(words(source, out, "--load_in_8bit", "--load_in_4bit"), capsys)
    line = the_line(words(source, out, "--load_in_8bit", "--bnb_4bit_quant_type", "fp4"), capsys)
    assert "bnb_4bit_quant_type='fp4' has no effect without load_in_4bit: true" in line
    line = the_line(words(source, out, "--load_in_8bit", "--max_perplexity_ratio", "0.9"), capsys)
    assert "max_perplexity_ratio=0.9; allowed: 1 or more, or null" in line
    line = the_line(words(source, out, "--load_in_8bit", "--eval_tasks_limit", "5"), capsys)
    assert "eval_tasks_limit=5 has no effect without eval_tasks; remove it" in line
    argv = ["quantize", "--model_name_or_path", str(source), "--output_dir", str(out), "--load_in_8bit"]
    assert "eval_datasets is missing" in the_line(argv, capsys)
    assert "data_dir='x' has no effect without eval_datasets" in the_line([*argv, "--data_dir", "x"], capsys)
    assert not out.exists()


@pytest.mark.medium
def test_a_quantised_folder_is_not_quantised_again(source, tmp_path, capsys):
    assert cli.main(words(source, tmp_path / "once", "--load_in_8bit")) == 0
    line = the_line(words(tmp_path / "once", tmp_path / "twice", "--load_in_4bit"), capsys)
    assert "is stored in quantised form already; name the original model" in line
    assert not (tmp_path / "twice").exists()


def test_where_no_width_divides_8_bit_is_offered(tmp_path, capsys):
    tiny.llama(hidden_size=48, intermediate_size=100).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    line = the_line(words(tmp_path / "model", tmp_path / "out", "--load_in_4bit"), capsys)
    assert "no layer can be quantised in 4 bit" in line and line.endswith("--load_in_8bit takes any width")
    assert "2 x model.layers.*.self_attn.q_proj" in line and "(widths 48 and 48 do not divide by 64 and 32)" in line
