"""Adapters: what is trained, what is saved, what is refused; on every kind of base and of quantisation."""

import dataclasses
import json
import shutil

import pytest
import torch
from adapters import BASES, CPU, KINDS, ROWS, adapted, base, fresh, ids, logits, save_run, settings, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmkit.align import lora
from llmkit.align.lora import load_base_and_adapter, quantization, save_adapter, train_in_float32
from llmkit.config import UserError
from llmkit.hardware import Device
from llmkit.tuning import SftConfig

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "llmkit"]


def ends(model):
    """Embedding and head, as they compute."""
    return [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]


def changed_rows(before, after):
    return (before != after).any(1).nonzero().flatten().tolist()


# ---- training, saving, reading back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_adapter_and_new_rows_learn_and_come_back_equal(name, kind, tmp_path):
    model = fresh(name, new_tokens=2, **KINDS[kind])
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    learning = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    before, rows = [w.clone() for w in ends(model)], ids(2)
    train(model, rows)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    assert not any(torch.equal(now[n], p) for n, p in learning.items())
    assert [changed_rows(a, b) for a, b in zip(before, ends(model), strict=True)] == [[ROWS, ROWS + 1]] * 2

    save_adapter(model, tmp_path)
    again = load_base_and_adapter(
        str(tmp_path), quantization_config=quantization(settings(**KINDS[kind]), base(name), CPU)
    )
    assert torch.equal(logits(again, rows), logits(model, rows)) and not any(m.training for m in again.modules())
    sizes = [w.shape[0] for n, w in load_file(tmp_path / "adapter_model.safetensors").items() if "lora" not in n]
    assert sizes == [2] * (2 if name == "llama" else 1)  # rows of new tokens, the tied ones once; no whole matrix


def test_a_head_with_bias_is_trained_in_full_since_peft_would_drop_the_bias(tmp_path):
    """Rows of Phi's head under PEFT 0.21: logits off by 1.3 after the merge."""
    model = adapted("phi", new_tokens=2)
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_base_and_adapter(str(tmp_path)), ids(2)), logits(model, ids(2)))


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_tied_head_trained_in_full_stays_tied(name, tmp_path):
    model = adapted(name, new_tokens=2, lora_modules_to_save=["lm_head"])
    embedding, head = ends(model)
    assert torch.equal(embedding, head)
    assert len(changed_rows(embedding[:ROWS], AutoModelForCausalLM.from_pretrained(base(name)).lm_head.weight)) > 2
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_base_and_adapter(str(tmp_path)), ids(2)), logits(model, ids(2)))


def test_an_adapter_that_peft_saved_by_itself_is_read_too(tmp_path):
    """It adds the grown matrices, and a head that is trained in full twice."""
    model = adapted("llama", new_tokens=2, lora_modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_base_and_adapter(str(tmp_path)), ids(2)), logits(model, ids(2)))


def test_rows_that_nobody_trained_grow_back_as_the_mean_of_the_others(tmp_path):
    """The adapter's tokenizer has more ids than its trained rows say."""
    from tiny import bpe_tokenizer

    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(ROWS + 3 - len(tokenizer))])
    save_adapter(adapted("llama"), tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weight = load_base_and_adapter(str(tmp_path)).get_input_embeddings().weight
    assert len(weight) == len(tokenizer) == ROWS + 3
    torch.testing.assert_close(weight[ROWS:], weight[:ROWS].mean(0).expand(3, -1))


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["lora", "qlora4"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_new_rows_of_the_head_learn_under_trl_which_never_calls_the_head(name, kind):
    """TRL multiplies by `lm_head.weight` and reads `lm_head.bias`, which PEFT's wrapper lacks: it crashed."""
    from tiny import sft_trainer

    model = lora.add_adapter(fresh_base(name, kind), settings(**KINDS[kind]), [3, 4])
    before = [w.clone() for w in ends(model)]
    trainer = sft_trainer(model=model, max_steps=2, learning_rate=1e-2, assistant_only_loss=True)
    train_in_float32(trainer.model)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert [changed_rows(a, b) for a, b in zip(before, ends(trainer.model), strict=True)] == [[3, 4]] * 2


def fresh_base(name, kind):
    how = quantization(settings(**KINDS[kind]), base(name), CPU)
    return AutoModelForCausalLM.from_pretrained(base(name), dtype=torch.float32, quantization_config=how)


@pytest.mark.parametrize("name", ["llama", "odd-llama"])
def test_4bit_gradients_survive_an_evaluation_whatever_the_width(name):
    """bitsandbytes repacks 4-bit layers at the first evaluation on a CPU with bfloat16, and loses their gradients."""
    model, rows = fresh(name, load_in_4bit=True), ids()

    def gradients():
        model.train()
        torch.manual_seed(0)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        return found

    first, trained = gradients(), model(input_ids=rows, use_cache=False).logits.detach()
    assert torch.equal(logits(model.eval(), rows), trained)
    assert all(torch.equal(g, first[n]) for n, g in gradients().items())


# ---- how a base is loaded


def test_4bit_arithmetic_is_bfloat16_only_where_the_gpu_has_it():
    config = settings(load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    for kind, bf16, expected in [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float32),
        ("cpu", True, torch.float32),
    ]:
        how = quantization(config, base("llama"), Device(kind, "x", bf16, 1, None))
        assert how.load_in_4bit and how.bnb_4bit_quant_type == "fp4" and how.bnb_4bit_use_double_quant
        assert how.bnb_4bit_compute_dtype == expected
    assert quantization(settings(load_in_8bit=True), base("llama"), CPU).load_in_8bit
    assert quantization(settings(), base("llama"), CPU) is None


@pytest.mark.parametrize(
    "keys, device, expected",
    [
        (dict(load_in_4bit=True, load_in_8bit=True), "cpu", "load_in_4bit=true and load_in_8bit=true: a base has one"),
        (dict(load_in_4bit=True, use_peft=False), "cpu", "load_in_4bit=true: quantised weights cannot be trained"),
        (dict(load_in_8bit=True, use_peft=False), "cuda", "load_in_8bit=true: quantised weights cannot be trained"),
        (dict(load_in_8bit=True), "mps", "load_in_8bit=true: not on mps (x); remove it, or set use_cpu: true"),
    ],
)
def test_what_cannot_be_quantised_is_refused(keys, device, expected):
    with pytest.raises(UserError, match="^" + expected.replace("(", r"\(").replace(")", r"\)")):
        quantization(settings(**keys), base("llama"), Device(device, "x", True, 1, None))


def test_quantising_without_bitsandbytes_names_it(monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="load_in_4bit=true needs bitsandbytes"):
        quantization(settings(load_in_4bit=True), base("llama"), CPU)
    with pytest.raises(UserError, match="use_peft=true needs peft"):
        lora.add_adapter(torch.nn.Linear(1, 1), settings())


def test_a_base_that_is_stored_in_4bit_needs_an_adapter_and_no_key(tmp_path):
    fresh("llama", load_in_4bit=True).unload().save_pretrained(tmp_path)
    assert quantization(settings(), str(tmp_path), CPU) is None
    with pytest.raises(UserError, match=r"load_in_8bit=true: .* is stored in quantised form already"):
        quantization(settings(load_in_8bit=True), str(tmp_path), CPU)
    with pytest.raises(UserError, match=r"use_peft=false: .* is stored in quantised form"):
        quantization(settings(use_peft=False), str(tmp_path), CPU)


# ---- keys that fit no module


@pytest.mark.parametrize(
    "name, keys, expected",
    [
        ("llama", dict(lora_target_modules=["q_proj", "v_prj"]), r"has no module 'v_prj'; nearest: v_proj"),
        ("llama", dict(lora_target_modules="q_proj"), r"has no module 'q_proj'; text is a regular .* \[q_proj\]"),
        ("llama", dict(lora_target_modules="*proj"), r"no regular expression"),
        ("llama", dict(lora_target_modules=[]), r"is empty; allowed: all-linear"),
        ("llama", dict(lora_target_modules=["q_proj", "lm_head"]), r"an adapter on lm_head would never be trained"),
        ("gpt2", dict(lora_target_modules=["wte"]), r"transformer.wte is also the head \(tied\)"),
        ("gpt2", dict(lora_target_modules=["q_proj"]), r"GPT2LMHeadModel has no module 'q_proj'"),
        ("llama", dict(lora_target_modules=["input_layernorm"]), r"'input_layernorm'\]: Target module"),
        ("llama", dict(lora_modules_to_save=["head"]), r"lora_modules_to_save=\['head'\]: .* nearest: lm_head"),
        (
            "gpt2",
            dict(lora_modules_to_save=["wte"]),
            r"are tied, and would be trained apart; name the head \(lm_head\)",
        ),
    ],
)
def test_names_that_would_do_nothing_or_harm_are_refused(name, keys, expected):
    with pytest.raises(UserError, match=expected) as error:
        fresh(name, **keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("targets", [["q_proj", "layers.1.mlp.up_proj"], r".*\.(q_proj|1\.mlp\.up_proj)"])
def test_targets_are_ends_of_names_or_one_expression(targets):
    names = {
        n.split(".lora_A")[0]
        for n, _ in fresh("llama", lora_target_modules=targets).named_parameters()
        if "lora_A" in n
    }
    assert {n.removeprefix("base_model.model.model.layers.") for n in names} == {
        "0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"
    }  # fmt: skip


def test_every_peft_key_has_its_bound_or_its_condition():
    keys = {f.name for f in dataclasses.fields(SftConfig)}
    ours = {k for k in keys if k.startswith(("lora_", "use_rs", "use_do", "bnb_", "use_bnb"))}
    assert {key for row in lora.DEPENDENT for key in row[0].split()} == ours
    for names, is_allowed, _ in lora.BOUNDS:
        assert all(is_allowed(getattr(SftConfig(), key)) and not is_allowed(-1) for key in names.split())
    plain, with_peft = settings(use_peft=False), settings(load_in_4bit=True)
    assert not any(is_used(plain) for _, is_used, _ in lora.DEPENDENT)
    assert all(is_used(with_peft) for _, is_used, _ in lora.DEPENDENT)


# ---- an adapter on the wrong base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_run(adapted("llama", new_tokens=2), tmp_path_factory.mktemp("run") / "adapter")


def refusal(*args, **kwargs):
    with pytest.raises(UserError) as error:
        load_base_and_adapter(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_folder_stands_for_its_adapter(adapter):
    assert torch.equal(logits(load_base_and_adapter(str(adapter.parent)), ids(2)), logits(adapted("llama", 2), ids(2)))


@pytest.mark.parametrize(
    "other, key",
    [("odd-llama", "hidden_size is 40"), ("deep-llama", "num_hidden_layers is 3"), ("qwen3", "model_type is qwen3")],
)
def test_an_adapter_of_another_base_is_refused_by_the_base_it_names(adapter, other, key):
    assert f"was trained on another base: {key}, that of" in refusal(str(adapter), base(other))


@pytest.mark.parametrize(
    "other, expected", [("odd-llama", "size mismatch"), ("gpt2", "not found"), ("llama", "has no place for 14 tensors")]
)
def test_an_adapter_of_another_base_is_refused_by_its_tensors(other, expected, tmp_path):
    """The base that it names is gone; one of fewer layers would have been taken without a word."""
    save_adapter(adapted("deep-llama"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/at/all"}))
    found = refusal(str(tmp_path), base(other))
    assert "does not fit the base" in found and expected in found
    assert "names the base '/nowhere/at/all', which is not there; give base_model_name_or_path" in refusal(
        str(tmp_path)
    )


def test_an_adapter_that_lacks_tensors_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "layers.1.mlp.up_proj" not in n}, file)
    assert "lacks 2 tensors, e.g. base_model.model.model.layers.1.mlp.up_proj" in refusal(str(tmp_path / "a"))


def test_folders_that_are_no_adapter_say_so(adapter, tmp_path):
    assert "has no adapter_config.json" in refusal(base("llama"))
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json: cannot be read (JSONDecodeError)" in refusal(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "names no base; give base_model_name_or_path" in refusal(str(tmp_path))
    assert "cannot be loaded" in refusal(str(adapter), str(tmp_path))
    shutil.copytree(adapter, tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"half a file")
    assert "the adapter cannot be read" in refusal(str(tmp_path / "b"))
    (tmp_path / "b" / "adapter_model.safetensors").rename(tmp_path / "b" / "adapter_model.bin")
    assert "adapter_model.safetensors: is missing" in refusal(str(tmp_path / "b"))


def test_the_zoo_of_bases_is_what_the_tests_say():
    tied = {name for name in BASES if torch.equal(*ends(AutoModelForCausalLM.from_pretrained(base(name))))}
    assert tied == {"qwen3", "gemma3", "gpt2", "llmkit"}


def test_dora_on_a_matrix_of_zeros_is_refused():
    """A fresh model of ours has zero output projections: the loss was nan from the first step on."""
    from helpers import TINY

    from llmkit.model import LlmkitConfig, LlmkitForCausalLM

    with pytest.raises(UserError, match=r"self_attn\.o_proj is all zero, and DoRA divides by its norm"):
        lora.add_adapter(LlmkitForCausalLM(LlmkitConfig(**TINY)), settings(use_peft=True, use_dora=True))
