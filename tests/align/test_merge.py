"""Merging: by the papers' formulas, written only when it is right, never unasked onto other weights than trained on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import KINDS, ROWS, adapted, base, fresh, ids, logits, save_run
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from llmkit.align import merge as module
from llmkit.align.merge import compare, get_logits, main, merge, probe_rows
from llmkit.config import UserError
from llmkit.data.tokenizer import load_tokenizer
from llmkit.verbs import MergeConfig

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "llmkit"]


def run(adapter: Path, folder: Path, **keys):
    return main(MergeConfig(model_name_or_path=str(adapter), output_dir=str(folder), use_cpu=True, **keys))


def refusal(adapter, folder, **keys) -> str:
    with pytest.raises(UserError) as error:
        run(adapter, folder, **keys)
    assert "\n" not in str(error.value)
    assert not Path(folder).exists() or not list(Path(folder).parent.glob(f".{Path(folder).name}.*"))
    return str(error.value)


# ---- the formulas


def matrices(model, name):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    found = {
        key.split(name + ".")[1].split(".")[0]: w.detach().clone() for key, w in tensors.items() if f"{name}." in key
    }
    return found["base_layer"], found["lora_A"], found["lora_B"], found.get("lora_magnitude_vector")


@pytest.mark.parametrize("keys, scale", [({}, 8 / 4), (dict(use_rslora=True), 8 / 4**0.5), (dict(lora_r=2), 8 / 2)])
def test_lora_is_w_plus_scale_times_b_a(keys, scale):
    """Hu et al. 2021, eq. 3; with use_rslora alpha / sqrt(r) (Kalajdzievski 2023)."""
    model = adapted("llama", **keys)
    name = "model.layers.1.mlp.up_proj"
    w, a, b, _ = matrices(model, name)
    assert b.abs().max() > 0.01
    torch.testing.assert_close(merge(model).get_submodule(name).weight, w + scale * b @ a)


def test_lora_of_conv1d_is_transposed():
    model = adapted("gpt2")
    name = "transformer.h.0.attn.c_attn"
    tensors = {k: p.detach().clone() for k, p in model.named_parameters() if name in k}
    w, a, b = (next(p for k, p in tensors.items() if part in k) for part in ("base_layer.weight", "lora_A", "lora_B"))
    torch.testing.assert_close(merge(model).get_submodule(name).weight, w + 2.0 * (b @ a).T)


def test_dora_scales_every_output_row_to_its_magnitude():
    """Liu et al. 2024, eq. 5: m (W + sBA) / |W + sBA|; PEFT takes the norm of what one output is made of."""
    model = adapted("llama", use_dora=True)
    name = "model.layers.0.self_attn.q_proj"
    w, a, b, m = matrices(model, name)
    assert (m - w.norm(dim=1)).abs().max() > 0.01  # it learnt
    v = w + 2.0 * b @ a
    torch.testing.assert_close(merge(model).get_submodule(name).weight, m[:, None] * v / v.norm(dim=1, keepdim=True))


def test_compare_by_hand():
    a = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    found = compare(a, torch.tensor([[0.0, 1.0, 1.0], [3.0, 0.0, 0.5]]))
    assert (found.max, found.mean, found.positions) == (1.0, pytest.approx(1.5 / 6), 2)
    assert found.top1 == 0.5  # the first row's likeliest is now the first of two equal ones
    assert found.deviation == pytest.approx((sum((x - 1) ** 2 for x in (0, 1, 2, 3, 0, 0)) / 5) ** 0.5)


def test_probes_hold_new_tokens_texts_and_chats():
    model = fresh("llama", new_tokens=2)
    rows = probe_rows(model, load_tokenizer(base("llama")))
    assert len(rows) == 9 and all(row.shape[0] == 1 and 1 < row.shape[1] <= 64 for row in rows)
    assert rows[0][0, :4].tolist() == [ROWS - 2, ROWS - 1, ROWS, ROWS + 1]
    assert len(probe_rows(model)) == 1


# ---- `merge`, as a training run calls it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_exact_whatever_the_dtype_of_the_base(dtype):
    model = adapted("qwen3", new_tokens=2)
    expected = logits(model, ids(2))
    for p in model.get_base_model().parameters():
        p.data = p.data.to(dtype)
    merged = merge(model)
    assert merged.dtype == dtype and not any("lora" in name for name, _ in merged.named_modules())
    assert compare(expected, logits(merged, ids(2))).relative < (1e-4 if dtype == torch.float32 else 0.2)


def test_merge_refuses_quantised_weights_and_what_is_no_change_of_weights():
    from peft import PromptTuningConfig, get_peft_model

    with pytest.raises(UserError, match="the base is quantised"):
        merge(adapted("llama", load_in_4bit=True))
    prompts = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base("llama")),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(UserError, match="PROMPT_TUNING, which is no change of weights"):
        merge(prompts)


# ---- the verb


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_folder_is_the_adapted_model(name, kind, tmp_path, capsys):
    model = adapted(name, new_tokens=2, **KINDS[kind])
    model.generation_config.eos_token_id = [4, 2]
    save_run(model, tmp_path / "adapter")
    is_quantized = kind.startswith("q")
    result = run(tmp_path / "adapter", tmp_path / "m", dequantize=is_quantized)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert len(embedding) == len(head) == merged.config.vocab_size == ROWS + 2
    assert (embedding is head) == (name != "llama")
    assert merged.generation_config.eos_token_id == [4, 2] and merged.config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template
    assert result.model_dir == str(tmp_path / "m") and result.parent == str(tmp_path / "adapter")
    difference = compare(logits(model, ids(2))[0], logits(merged, ids(2))[0])
    assert (difference.relative < 1e-4) != is_quantized
    out = capsys.readouterr().out
    assert ("likeliest token is the same at" in out) == is_quantized and "largest logit difference" in out


@pytest.mark.parametrize("name, written", [("gpt2", "lm_head"), ("gpt2", "transformer.wte"), ("qwen3", "lm_head")])
def test_a_tied_head_trained_in_full_is_one_with_its_embedding_again(name, written, tmp_path):
    """PEFT writes down the embedding, and then leaves two equal matrices and a config that says so."""
    model = adapted(name, new_tokens=2, lora_modules_to_save=["lm_head"])
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
    model.peft_config["default"].modules_to_save = [written]
    run(save_run(model, tmp_path / "a"), tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert compare(logits(model, ids(2))[0], logits(merged, ids(2))[0]).relative < 1e-4


def test_how_far_it_is_from_the_quantised_model_is_measured(tmp_path):
    """Against PEFT's own loading of base and adapter."""
    save_run(adapted("llama", load_in_4bit=True), tmp_path / "adapter")
    found = run(tmp_path / "adapter", tmp_path / "m", dequantize=True).metrics
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(base("llama"), quantization_config=how)
    quantized = PeftModel.from_pretrained(quantized, tmp_path / "adapter").train()  # bfloat16 only when evaluated
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    rows = probe_rows(merged, load_tokenizer(base("llama")))
    grads_on = [quantized(inputs_embeds=quantized.get_input_embeddings()(r).requires_grad_()).logits[0] for r in rows]
    expected = compare(torch.cat(grads_on).detach(), get_logits(merged, rows))
    assert found["quantized_max"] == pytest.approx(expected.max, rel=1e-3) and expected.max > 0.1
    assert found["quantized_mean"] == pytest.approx(expected.mean, rel=1e-3)
    assert found["quantized_top1"] == pytest.approx(expected.top1, abs=0.005)


@pytest.mark.parametrize("kind, bits", [("qlora4", 4), ("qlora8", 8)])
def test_an_adapter_of_a_quantised_base_is_not_merged_unasked(kind, bits, tmp_path):
    """Known from the adapter folder, wherever it was copied; or from the recipe of its run."""
    folder = save_run(adapted("llama", **KINDS[kind]), tmp_path / "run" / "adapter")
    expected = f"was trained on a base in {bits} bit"
    assert expected in refusal(folder, tmp_path / "m") and "--dequantize true" in refusal(folder, tmp_path / "m")
    (folder / "base_quantization.json").unlink()
    assert run(folder, tmp_path / "unknown").status == "ok"  # nobody wrote it down
    (tmp_path / "run" / "manifest.json").write_text('{"stage": "sft"}')
    (tmp_path / "run" / "recipe.yaml").write_text(f"load_in_{bits}bit: true\nuse_bnb_nested_quant: false\n")
    assert expected in refusal(tmp_path / "run", tmp_path / "m")
    assert "quantized_max" in run(tmp_path / "run", tmp_path / "m", dequantize=True).metrics


@pytest.mark.parametrize("name, kind", [("llama", "qlora4"), ("gpt2", "qlora4"), ("llmkit", "qlora8")])
def test_a_base_that_is_stored_quantised_is_merged_into_its_own_rounded_values(name, kind, tmp_path):
    stored = tmp_path / "stored"
    fresh(name, **KINDS[kind]).unload().save_pretrained(stored)
    folder = save_run(adapted(name, **KINDS[kind]), tmp_path / "adapter")
    (folder / "base_quantization.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(stored)}))
    assert "was trained on a base in" in refusal(folder, tmp_path / "m")
    assert "was trained on a base in" in refusal(folder, tmp_path / "m", base_model_name_or_path=base(name))
    found = run(folder, tmp_path / "m", dequantize=True).metrics
    assert found["quantized_max"] < (1e-4 if kind == "qlora4" else 0.5)  # the same values; 8 bit rounds activations too
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert (
        run(folder, tmp_path / "full", dequantize=True, base_model_name_or_path=base(name)).metrics["quantized_max"]
        > 0.01
    )


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 0.2), ("float16", 0.02)])
def test_rounding_is_measured_and_said(dtype, bound, tmp_path, capsys):
    save_run(adapted("llama"), tmp_path / "a")
    found = run(tmp_path / "a", tmp_path / "m", dtype=dtype).metrics
    assert 1e-4 < found["rounding_max"] < bound and "rounded   to torch." + dtype in capsys.readouterr().out
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(n).dtype) for n in file.keys()} == {"torch." + dtype}  # noqa: SIM118


def test_a_merge_that_changes_the_model_is_not_written(tmp_path, monkeypatch):
    model = adapted("llama")
    folder, real = save_run(model, tmp_path / "a"), type(model.base_model).merge_and_unload

    def spoilt(self, *args, **kwargs):
        merged = real(self, *args, **kwargs)
        merged.model.layers[1].mlp.up_proj.weight.data[0] += 0.01
        return merged

    monkeypatch.setattr(type(model.base_model), "merge_and_unload", spoilt)
    assert "merged logits differ from the adapted model's" in refusal(folder, tmp_path / "m")
    with pytest.raises(UserError, match="nothing was written"):
        merge(model)


def test_a_folder_that_reads_back_as_another_model_is_not_left_behind(tmp_path, monkeypatch):
    folder = save_run(adapted("llama"), tmp_path / "a")
    real = AutoModelForCausalLM.from_pretrained

    def spoilt(path, *args, **kwargs):
        model = real(path, *args, **kwargs)
        if Path(path).name.startswith(".m."):
            model.lm_head.weight.data[5] *= 2
        return model

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", spoilt)
    assert "after writing and reading back; nothing was written" in refusal(folder, tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_weights_too_large_for_float16_are_refused(tmp_path):
    model = adapted("llama")
    dict(model.named_parameters())["base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"].data *= 1e7
    assert "dtype=float16: logits are not finite in it" in refusal(
        save_run(model, tmp_path / "a"), tmp_path / "m", dtype="float16"
    )


def test_mistakes_are_one_line(tmp_path):
    folder = save_run(adapted("llama"), tmp_path / "a")
    (tmp_path / "there").mkdir()
    assert "output_dir is missing" in refusal(folder, "")
    assert "model_name_or_path is missing" in refusal("", tmp_path / "m")
    assert "exists already" in refusal(folder, tmp_path / "there")
    assert "has no adapter_config.json" in refusal(base("llama"), tmp_path / "m")
    assert "dequantize=true has no effect" in refusal(folder, tmp_path / "m", dequantize=True)
    assert "trained on another base" in refusal(folder, tmp_path / "m", base_model_name_or_path=base("gpt2"))


def test_tokenizer_and_template_are_the_bases_where_the_adapter_has_none(tmp_path):
    from llmkit.align.lora import save_adapter

    save_adapter(adapted("llama"), tmp_path / "a")
    run(tmp_path / "a", tmp_path / "m")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == load_tokenizer(base("llama")).chat_template


@pytest.mark.medium
def test_a_fresh_process_without_peft_and_llmkit_loads_it(tmp_path):
    code = 'import sys; sys.modules["peft"] = sys.modules["llmkit"] = None\n'
    code += "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    expected = []
    for name in ("llama", "llmkit"):
        model, folder = adapted(name, new_tokens=2), str(tmp_path / name)
        run(save_run(model, tmp_path / f"{name}-adapter"), Path(folder))
        expected.append(logits(model, ids(2)).double().abs().sum().item())
        code += f"m = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code={name == 'llmkit'})\n"
        code += (
            f"AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=False).chat_template.index('generation')\n"
        )
        code += f"print(m(torch.tensor({ids(2).tolist()})).logits.double().abs().sum().item())\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx(expected, rel=1e-5)
