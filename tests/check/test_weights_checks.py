"""Stored files: what was cut short is refused, clean but unusual folders are not called broken."""

import json
import shutil

import pytest
import torch
from planted.plants_weights import adapter, edit, saved, subject
from safetensors.torch import load_file, save_file
from tiny import bpe_tokenizer, llama
from transformers import AutoConfig, AutoModelForCausalLM

from llmkit.check.runner import get_check, run_one
from llmkit.check.stored import Stored, check_folder, header
from llmkit.check.weights import control_tokens
from llmkit.config import UserError

FAMILY = (
    "untrained-token-rows",
    "weights-missing",
    "weights-not-finite",
    "weights-zero-or-constant",
    "rows-differ-from-reference",
    "dtype-changed",
    "adapter-does-not-fit",
)


def problems(given) -> list[str]:
    results = (run_one(get_check(name), given) for name in FAMILY)
    return [f"{r.id}: {r.status} {r.measured} {r.evidence}" for r in results if r.status in ("fail", "warn", "not_run")]


# cut short


def test_a_file_that_was_cut_short_is_named(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    check_folder(path.parent)
    content = path.read_bytes()
    for count, words in ((len(content) - 1, "cut short"), (5, "cut short"), (0, "cut short"), (40, "cut short")):
        path.write_bytes(content[:count])
        with pytest.raises(UserError, match=words):
            check_folder(path.parent)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        check_folder(path.parent)


def test_a_shard_that_is_missing_is_named(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    check_folder(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        check_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index"):
        check_folder(tmp_path)


def test_a_reference_or_an_adapter_that_was_cut_short_is_wrong_usage(tmp_path):
    path, reference, lora = saved(tmp_path), saved(tmp_path, "before"), adapter(tmp_path)
    for cut in (reference / "model.safetensors", lora / "adapter_model.safetensors", path / "model.safetensors"):
        cut.write_bytes(cut.read_bytes()[:-1])
        with pytest.raises(UserError, match="cut short"):
            subject(path, reference=str(reference), peft_adapter=str(lora))


def test_a_folder_without_weights_and_an_adapter_beside_them_are_fine(tmp_path):
    check_folder(tmp_path)
    path = saved(tmp_path)
    shutil.copy(adapter(tmp_path) / "adapter_model.safetensors", path / "adapter_model.safetensors")
    check_folder(path)
    assert not any("lora" in name for name in Stored(path).shapes)


def test_slices_put_together_are_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.check.stored.SLICE", 100)
    stored = Stored(saved(tmp_path))
    parts = list(stored.slices("lm_head.weight"))
    assert len(parts) > 100 and [first for first, _ in parts] == [3 * i for i in range(len(parts))]
    whole = load_file(stored.files["lm_head.weight"])["lm_head.weight"]
    assert torch.equal(torch.cat([rows for _, rows in parts]), whole)


def test_the_header_says_shapes_and_nothing_of_metadata(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert header(tmp_path / "x.safetensors")["a"]["shape"] == [2, 3]
    assert "__metadata__" not in header(tmp_path / "x.safetensors")


# clean folders


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"vocab_size": 500}])
def test_clean_folders_pass_whole_sharded_and_in_bfloat16(tmp_path, options):
    model = llama(**options)
    for name, dtype, size in (("a", torch.float32, "1GB"), ("b", torch.float32, "20KB"), ("c", torch.bfloat16, "1GB")):
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size=size)
        bpe_tokenizer().save_pretrained(tmp_path / name)
        assert not problems(subject(tmp_path / name))


def test_both_copies_of_a_tied_pair_rotary_buffers_and_consolidated_files_are_fine(tmp_path):
    path = saved(tmp_path, tie_word_embeddings=True)

    def add(t):
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit(path, add)
    save_file({"layers.0.attention.wq.weight": torch.full((4, 4), torch.nan)}, path / "consolidated.safetensors")
    found = problems(subject(path))
    assert not [line for line in found if "rotary" not in line], found


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt2", "gemma3_text", "bloom", "gpt_neox", "opt"])
def test_names_that_are_converted_on_load_are_not_missing(tmp_path, kind):
    """Experts are stored one by one, and held as one tensor."""
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    small |= dict(num_key_value_heads=2, num_local_experts=4, num_experts=4, moe_intermediate_size=16, ffn_dim=32)
    small |= dict(word_embed_proj_dim=32, n_embd=32, n_layer=2, n_head=4, vocab_size=424)
    default = AutoConfig.for_model(kind)
    small = {k: v for k, v in small.items() if k in default.to_dict() or k in default.attribute_map}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small))
    model.save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    assert not problems(subject(tmp_path))


def test_without_accelerate_names_are_compared(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "accelerate":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    path = saved(tmp_path)
    monkeypatch.setattr("builtins.__import__", without)
    for largest in (10**9, 10):
        monkeypatch.setattr("llmkit.check.weights.LARGEST_LOAD", largest)
        assert run_one(get_check("weights-missing"), subject(path)).status == "pass"
    edit(path, lambda t: t.pop("model.norm.weight"))
    assert run_one(get_check("weights-missing"), subject(path)).status == "fail"


def test_quantised_weights_are_not_asked_for_their_names(tmp_path):
    path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (path / "config.json").write_text(json.dumps(config))
    edit(path, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32, dtype=torch.uint8)}))
    given = subject(path)
    assert run_one(get_check("weights-missing"), given).status == "not_applicable"
    assert run_one(get_check("weights-not-finite"), given).status == "pass"


# rows


def test_a_pad_row_of_zeros_is_spared_even_where_it_is_the_end_of_text(tmp_path):
    path = saved(tmp_path, pad_token_id=4)
    edit(path, lambda t: t["model.embed_tokens.weight"][4].zero_())
    assert not problems(subject(path))


def test_tokens_of_tools_alone_are_a_warning(tmp_path):
    path = saved(tmp_path)
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.chat_template += "{% if tools %}<tool>{% endif %}"
    tokenizer.save_pretrained(path)
    needed, others = control_tokens(tokenizer)
    assert set(needed.values()) == {"<|im_start|>", "<|im_end|>"} and set(others.values()) == {"<tool>"}
    edit(path, lambda t: t["lm_head.weight"][next(iter(others))].zero_())
    assert run_one(get_check("untrained-token-rows"), subject(path)).status == "warn"


def test_a_model_that_was_trained_since_is_not_called_changed(tmp_path):
    """Every matrix has moved a little, as fine-tuning moves it; new rows were added."""
    reference, path = saved(tmp_path, "before"), tmp_path / "after"
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * p.std().nan_to_num(0.1) * torch.randn_like(p)
    model.resize_token_embeddings(440)
    model.save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    assert not problems(subject(path, reference=str(reference)))
    edit(path, lambda t: t["model.embed_tokens.weight"][17].fill_(0.5))
    found = run_one(get_check("rows-differ-from-reference"), subject(path, reference=str(reference)))
    assert found.status == "warn" and found.evidence[0]["ids"] == [17]


def test_a_rounded_export_keeps_its_rows_and_is_warned_of_by_its_dtype(tmp_path):
    reference, path = saved(tmp_path, "before"), tmp_path / "after"
    llama().bfloat16().save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    given = subject(path, reference=str(reference))
    assert run_one(get_check("rows-differ-from-reference"), given).status == "pass"
    assert run_one(get_check("dtype-changed"), given).status == "warn"


# adapters


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head", "embed_tokens"]}, {"trainable_token_indices": [3, 4]}, {"use_dora": True},
     {"layers_to_transform": [1]}],
)  # fmt: skip
def test_adapters_that_hold_more_than_two_matrices_fit(tmp_path, options):
    given = subject(saved(tmp_path), peft_adapter=str(adapter(tmp_path, **options)))
    found = run_one(get_check("adapter-does-not-fit"), given)
    assert found.status == "pass", found


def test_an_adapter_fits_a_tied_base_and_a_sharded_one(tmp_path):
    path = tmp_path / "model"
    llama(tie_word_embeddings=True).save_pretrained(path, max_shard_size="20KB")
    bpe_tokenizer().save_pretrained(path)
    given = subject(path, peft_adapter=str(adapter(tmp_path, modules_to_save=["lm_head"])))
    assert run_one(get_check("adapter-does-not-fit"), given).status == "pass"
