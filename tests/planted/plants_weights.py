"""Bugs of stored files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import bpe_tokenizer, llama

from llmkit.check.attach import from_folder
from llmkit.check.subject import Subject
from llmkit.verbs import CheckConfig
from planted.plant import plant


def saved(folder: Path, name: str = "model", **options) -> Path:
    path = folder / name
    llama(**options).save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    return path


def edit(path: Path, change, file: str = "model.safetensors") -> None:
    tensors = load_file(path / file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / file, metadata={"format": "pt"})


def subject(path: Path, **options) -> Subject:
    return from_folder(CheckConfig(model_name_or_path=str(path), **options))


@plant("control-row-zero", caught_by="untrained-token-rows", bug="T9", evidence="<|im_end|>")
def control_row_zero(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The template's end of turn has a row of zeros."""
    path = saved(folder)
    if is_planted:
        edit(path, lambda t: t["lm_head.weight"][4].zero_())
    return subject(path)


@plant("control-rows-reserved", caught_by="untrained-token-rows", bug="T9", evidence="equals the rows")
def control_rows_reserved(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The template's tokens still have the row that all reserved tokens share."""
    path = saved(folder)
    if is_planted:

        def share(t):
            t["model.embed_tokens.weight"][[3, 4, 420, 421]] = t["model.embed_tokens.weight"][3].clone()

        edit(path, share)
    return subject(path)


@plant("tensor-missing", caught_by="weights-missing", bug="M12", evidence="q_proj")
def tensor_missing(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A projection is not in the file."""
    path = saved(folder)
    if is_planted:
        edit(path, lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"))
    return subject(path)


@plant("keys-with-prefix", caught_by="weights-missing", bug="R5", evidence="module.")
def keys_with_prefix(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Every key begins with DDP's prefix."""
    path = saved(folder)
    if is_planted:

        def prefix(t):
            renamed = {f"module.{k}": v for k, v in t.items()}
            t.clear()
            t.update(renamed)

        edit(path, prefix)
    return subject(path)


@plant("tied-key-dropped", caught_by="weights-missing", bug="M9", evidence="lm_head")
def tied_key_dropped(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The model was saved tied, and its config says untied."""
    path = saved(folder, tie_word_embeddings=True)
    if is_planted:
        config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False}
        (path / "config.json").write_text(json.dumps(config))
    return subject(path)


@plant("one-nan", caught_by="weights-not-finite", bug="P3", evidence="down_proj")
def one_nan(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """One value of one matrix is not a number."""
    path = saved(folder)
    if is_planted:
        edit(path, lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[777:778].fill_(float("nan")))
    return subject(path)


@plant("empty-tensor", caught_by="weights-not-finite", bug="X3", evidence="holds no number")
def empty_tensor(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A sharded save left a tensor of shape [0]."""
    path = saved(folder)
    if is_planted:
        edit(path, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.empty(0)}))
    return subject(path)


@plant("resize-cuts-rows", caught_by="rows-differ-from-reference", bug="T8", evidence="rows")
def resize_cuts_rows(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A resize to the tokenizer's length cut rows of a padded vocabulary."""
    reference, path = saved(folder, "before"), folder / "after"
    model = llama()
    model.resize_token_embeddings(420 if is_planted else 440)
    model.save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    return subject(path, reference=str(reference))


@plant("wrong-rows-drawn", caught_by="rows-differ-from-reference", bug="T8", evidence="17 is the first")
def wrong_rows_drawn(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The initialisation of new rows wrote old ones."""
    reference, path = saved(folder, "before"), saved(folder, "after")
    if is_planted:
        edit(path, lambda t: t["model.embed_tokens.weight"][17].fill_(0.1))
    return subject(path, reference=str(reference))


def adapter(folder: Path, **options) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(llama(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@plant("adapter-of-another-model", caught_by="adapter-does-not-fit", bug="F4", evidence="no module for")
def adapter_of_another_model(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The adapter's keys name modules that the base does not have."""
    base, path = saved(folder), adapter(folder)
    if is_planted:

        def rename(t):
            renamed = {k.replace("layers.1", "layers.7"): v for k, v in t.items()}
            t.clear()
            t.update(renamed)

        edit(path, rename, "adapter_model.safetensors")
    return subject(base, peft_adapter=str(path))


@plant("adapter-untrained", caught_by="adapter-does-not-fit", bug="F4", status="warn", evidence="never trained")
def adapter_untrained(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Every matrix B of the adapter is zero."""
    base, path = saved(folder), adapter(folder)
    if is_planted:
        edit(path, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k], "adapter_model.safetensors")
    return subject(base, peft_adapter=str(path))


@plant("orig-mod-keys", caught_by="weights-missing", bug="M12", evidence="_orig_mod")
def orig_mod_keys(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """One layer was compiled when it was saved."""
    path = saved(folder)
    if is_planted:

        def prefix(t):
            for key in [k for k in t if "layers.1." in k]:
                t[key.replace("layers.1.", "layers.1._orig_mod.")] = t.pop(key)

        edit(path, prefix)
    return subject(path)


@plant("matrix-of-another-shape", caught_by="weights-missing", bug="M12", evidence="another shape")
def matrix_of_another_shape(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The config says four key heads, the file has two."""
    path = saved(folder)
    if is_planted:
        config = json.loads((path / "config.json").read_text()) | {"num_key_value_heads": 4}
        (path / "config.json").write_text(json.dumps(config))
    return subject(path)


@plant("norm-all-zero", caught_by="weights-zero-or-constant", bug="M12", status="warn", evidence="model.norm")
def norm_all_zero(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A conversion left the last norm as it was allocated."""
    path = saved(folder)
    if is_planted:
        edit(path, lambda t: t["model.norm.weight"].zero_())
    return subject(path)


@plant("layer-all-zero", caught_by="weights-zero-or-constant", bug="X3", status="warn", evidence="layers.1.mlp")
def layer_all_zero(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A matrix of one layer of a sharded model is zero."""
    path = folder / "model"
    llama().save_pretrained(path, max_shard_size="20KB")
    bpe_tokenizer().save_pretrained(path)
    if is_planted:
        name = "model.layers.1.mlp.up_proj.weight"
        index = json.loads((path / "model.safetensors.index.json").read_text())
        edit(path, lambda t: t[name].zero_(), index["weight_map"][name])
    return subject(path)


@plant("files-in-half", caught_by="dtype-changed", bug="R7", status="warn", evidence="float16")
def files_in_half(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Files of float16 under a config of float32."""
    path = saved(folder)
    if is_planted:
        edit(path, lambda t: t.update({k: v.half() for k, v in t.items()}))
    return subject(path)


@plant("adapter-half-saved", caught_by="adapter-does-not-fit", bug="X3", evidence="no tensors for")
def adapter_half_saved(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The tensors of v_proj of one layer are not in the file."""
    base, path = saved(folder), adapter(folder)
    if is_planted:

        def drop(t):
            for key in [k for k in t if "layers.1.self_attn.v_proj" in k]:
                t.pop(key)

        edit(path, drop, "adapter_model.safetensors")
    return subject(base, peft_adapter=str(path))


@plant("adapter-module-not-saved", caught_by="adapter-does-not-fit", bug="F3", evidence="lm_head")
def adapter_module_not_saved(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The config promises a trained head that the file does not hold."""
    base, path = saved(folder), adapter(folder, modules_to_save=["lm_head"])
    if is_planted:
        edit(path, lambda t: t.pop("base_model.model.lm_head.weight"), "adapter_model.safetensors")
    return subject(base, peft_adapter=str(path))


@plant("adapter-not-finite", caught_by="adapter-does-not-fit", bug="P3", evidence="not finite")
def adapter_not_finite(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """One value of the adapter is infinite."""
    base, path = saved(folder), adapter(folder)
    if is_planted:
        edit(path, lambda t: next(iter(t.values())).view(-1)[3:4].fill_(float("inf")), "adapter_model.safetensors")
    return subject(base, peft_adapter=str(path))


@plant("adapter-of-another-base", caught_by="adapter-does-not-fit", bug="F4", status="warn", evidence="trained on")
def adapter_of_another_base(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The base has the right shapes and other weights than the one that the adapter names."""
    trained_on, base, path = saved(folder, "trained-on"), saved(folder), adapter(folder)
    config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(trained_on)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    if is_planted:
        llama(seed=1).save_pretrained(base)
    return subject(base, peft_adapter=str(path))
