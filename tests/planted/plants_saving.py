"""Bugs of saving, loading and resizing."""

from pathlib import Path

import pytest
import torch
from tiny import bpe_tokenizer, llama, lm_trainer
from torch import nn
from transformers import LlamaForCausalLM, Trainer

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant


@plant("state-dict-filter", caught_by="reload-differs", bug="M12", evidence="missing keys")
def state_dict_filter(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """save_pretrained of a subclass leaves the last norm out."""

    class Filtered(LlamaForCausalLM):
        def save_pretrained(self, *args, **kwargs):
            kwargs["state_dict"] = {k: v for k, v in self.state_dict().items() if k != "model.norm.weight"}
            super().save_pretrained(*args, **kwargs)

    return from_parts(model=(Filtered if is_planted else LlamaForCausalLM)(llama().config))


@plant("saved-in-half", caught_by="reload-differs", bug="R7", evidence="logits move")
def saved_in_half(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """What is saved was cast to fp16."""
    if is_planted:
        save = LlamaForCausalLM.save_pretrained

        def half(self, *args, **kwargs):
            save(self, *args, state_dict={k: v.half() for k, v in self.state_dict().items()}, **kwargs)

        patch.setattr(LlamaForCausalLM, "save_pretrained", half)
    return from_parts(model=llama())


@plant("compiled-prefix", caught_by="reload-differs", bug="M12", evidence="_orig_mod")
def compiled_prefix(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Keys carry the prefix of torch.compile."""
    if is_planted:
        save = LlamaForCausalLM.save_pretrained

        def prefixed(self, *args, **kwargs):
            save(self, *args, state_dict={f"_orig_mod.{k}": v for k, v in self.state_dict().items()}, **kwargs)

        patch.setattr(LlamaForCausalLM, "save_pretrained", prefixed)
    return from_parts(model=llama())


class Scaled(LlamaForCausalLM):
    """Multiplies its logits by a buffer that nothing recomputes on load."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=self.stored)
        self.post_init()

    stored = False

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.scale
        return out


class ScaledAndStored(Scaled):
    stored = True


@plant("buffer-not-recomputed", caught_by="reload-differs", bug="M8")
def buffer_not_recomputed(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A non-persistent buffer holds garbage after from_pretrained."""
    model = (Scaled if is_planted else ScaledAndStored)(llama().config)
    return from_parts(model=model)


@plant("head-drawn-again", caught_by="reload-differs", bug="M9")
def head_drawn_again(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Loading re-initialises the head after the weights are in place."""
    if is_planted:
        load = LlamaForCausalLM.from_pretrained.__func__

        def drawn(cls, *args, **kwargs):
            out = load(cls, *args, **kwargs)
            nn.init.normal_((out[0] if isinstance(out, tuple) else out).lm_head.weight)
            return out

        patch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(drawn))
    return from_parts(model=llama())


@plant("config-field-lost", caught_by="reload-differs", bug="M8", evidence="rms_norm_eps")
def config_field_lost(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A field of the config is not written, and comes back as its default."""
    model = llama(rms_norm_eps=0.3)
    if is_planted:
        to_diff = type(model.config).to_diff_dict
        patch.setattr(
            type(model.config),
            "to_diff_dict",
            lambda self: {k: v for k, v in to_diff(self).items() if k != "rms_norm_eps"},
        )
    return from_parts(model=model)


@plant("head-untied", caught_by="tied-head-broken", bug="M9", evidence="two tensors")
def head_untied(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A new head is put in place of the tied one."""
    model = llama(tie_word_embeddings=True)
    if is_planted:
        model.lm_head = nn.Linear(32, model.config.vocab_size, bias=False)
    return from_parts(model=model)


@plant("resize-draws-all", caught_by="resize-corrupts", bug="T8", evidence="old rows")
def resize_draws_all(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A resize initialises the whole matrix, not the new rows."""
    if is_planted:
        resize = LlamaForCausalLM.resize_token_embeddings

        def drawn(self, *args, **kwargs):
            out = resize(self, *args, **kwargs)
            nn.init.normal_(self.get_input_embeddings().weight, std=0.02)
            return out

        patch.setattr(LlamaForCausalLM, "resize_token_embeddings", drawn)
    return from_parts(model=llama())


@plant("resize-too-large", caught_by="resize-corrupts", bug="T8", evidence="times as long")
def resize_too_large(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """New rows are a hundred times as long as the others."""
    if is_planted:
        resize = LlamaForCausalLM.resize_token_embeddings

        def huge(self, count, *args, **kwargs):
            before = self.get_input_embeddings().num_embeddings
            out = resize(self, count, *args, **kwargs)
            self.get_input_embeddings().weight.data[before:] = 100.0
            return out

        patch.setattr(LlamaForCausalLM, "resize_token_embeddings", huge)
    return from_parts(model=llama())


def with_adapter(**options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    )


@plant("adapter-keys-renamed", caught_by="adapter-lost", bug="F4", evidence="no place")
def adapter_keys_renamed(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Adapter keys are saved under names that load nothing."""
    if is_planted:
        import peft.peft_model as module

        get = module.get_peft_model_state_dict
        patch.setattr(
            module,
            "get_peft_model_state_dict",
            lambda *a, **k: {n.replace("self_attn", "attn"): v for n, v in get(*a, **k).items()},
        )
    return from_parts(model=with_adapter())


@plant("trained-embedding-not-saved", caught_by="adapter-lost", bug="F3", evidence="adapter file")
def trained_embedding_not_saved(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The embedding is unfrozen by hand beside the adapter, so the adapter's file lacks it."""
    model = with_adapter(**({} if is_planted else {"modules_to_save": ["embed_tokens"]}))
    if is_planted:
        model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    return from_parts(model=model)


@plant("trainer-saves-half", caught_by="reload-differs", bug="R7", evidence="F16")
def trainer_saves_half(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The trainer's own save_model casts to fp16 to save room."""

    class Halving(Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            state = {k: v.half() for k, v in self.model.state_dict().items()}
            self.model.save_pretrained(output_dir, state_dict=state)

    return from_parts(lm_trainer(cls=Halving if is_planted else Trainer))


@plant("saved-in-bfloat16", caught_by="reload-differs", bug="R7", status="warn", evidence="bfloat16")
def saved_in_bfloat16(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A float32 model is written in bfloat16."""

    class Rounded(LlamaForCausalLM):
        def save_pretrained(self, *args, **kwargs):
            super().save_pretrained(*args, **kwargs, state_dict={k: v.bfloat16() for k, v in self.state_dict().items()})

    return from_parts(model=(Rounded if is_planted else LlamaForCausalLM)(llama().config))


class RotaryTable(nn.Module):
    """cos and sin of a custom model: (T, D) buffers that from_pretrained leaves as it allocated them."""

    def __init__(self, width: int, is_stored: bool):
        super().__init__()
        angles = torch.arange(64.0)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=is_stored)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=is_stored)

    def forward(self, x, position_ids):
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


class Rotated(LlamaForCausalLM):
    is_stored = True

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = RotaryTable(config.head_dim, self.is_stored)


class RotatedByGarbage(Rotated):
    is_stored = False


@plant("rope-table-garbage", caught_by="reload-differs", bug="M8", evidence="rotary_emb")
def rope_table_garbage(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The RoPE table of a custom class is not recomputed after from_pretrained."""
    return from_parts(model=(RotatedByGarbage if is_planted else Rotated)(llama().config))


@plant("memory-shared", caught_by="reload-differs", bug="M9", evidence="cannot be saved")
def memory_shared(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Two matrices share memory that nothing declares as tied: the first save raises."""
    model = llama()
    if is_planted:
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return from_parts(model=model)


@plant("generation-config-lost", caught_by="reload-differs", bug="C9", status="warn", evidence="eos_token_id")
def generation_config_lost(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The stop tokens of the live generation config are not written."""
    model = llama()
    model.generation_config.eos_token_id = [2, 4]
    if is_planted:
        patch.setattr("transformers.GenerationConfig.save_pretrained", lambda *args, **kwargs: None)
    return from_parts(model=model)


class Louder(LlamaForCausalLM):
    """Changes what Llama says, and is registered nowhere."""

    factor = 3.0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.factor
        return out


@plant("served-as-another-class", caught_by="auto-class-differs", bug="M12", status="warn", evidence="LlamaForCausalLM")
def served_as_another_class(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A subclass with maths of its own is what everyone will load as Llama."""
    if not is_planted:
        patch.setattr(Louder, "factor", 1.0)
    return from_parts(model=Louder(llama().config))


@plant("config-forgets-resize", caught_by="resize-corrupts", bug="T8", evidence="config.vocab_size")
def config_forgets_resize(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """An own resize swaps the matrices and leaves the config as it was."""
    if is_planted:

        def swap(self, count, *args, **kwargs):
            for name in ("model.embed_tokens", "lm_head"):
                old = self.get_submodule(name)
                new = nn.Embedding(count, 32) if "embed" in name else nn.Linear(32, count, bias=False)
                new.weight.data[: len(old.weight)] = old.weight.data
                owner, _, last = name.rpartition(".")
                setattr(self.get_submodule(owner), last, new)

        patch.setattr(LlamaForCausalLM, "resize_token_embeddings", swap)
    return from_parts(model=llama())


@plant("resize-unties", caught_by="resize-corrupts", bug="M9", evidence="no longer tied")
def resize_unties(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """After a resize the head is a copy."""
    if is_planted:
        resize = LlamaForCausalLM.resize_token_embeddings

        def copied(self, *args, **kwargs):
            out = resize(self, *args, **kwargs)
            self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())
            return out

        patch.setattr(LlamaForCausalLM, "resize_token_embeddings", copied)
    return from_parts(model=llama(tie_word_embeddings=True))


@plant("template-left-behind", caught_by="template-lost-on-save", bug="C11", evidence="no chat template")
def template_left_behind(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A save copies tokenizer.json and its config, and forgets chat_template.jinja."""
    tokenizer = bpe_tokenizer()
    if is_planted:
        save = type(tokenizer).save_pretrained

        def without(self, path, *args, **kwargs):
            out = save(self, path, *args, **kwargs)
            (Path(path) / "chat_template.jinja").unlink()
            return out

        patch.setattr(type(tokenizer), "save_pretrained", without)
    return from_parts(tokenizer=tokenizer)


@plant("template-of-reference-lost", caught_by="template-lost-on-save", bug="C11", evidence="reference")
def template_of_reference_lost(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A merge wrote the tokenizer without the template that the base came with."""
    bpe_tokenizer().save_pretrained(folder / "base")
    return from_parts(tokenizer=bpe_tokenizer(chat=not is_planted), reference=folder / "base")


@plant("second-adapter-on-nothing", caught_by="adapter-lost", bug="F2", evidence="no parameter")
def second_adapter_on_nothing(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The second adapter's parameters were dropped, and its config stays."""
    from peft import LoraConfig

    model = with_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if is_planted:
        for module in model.modules():
            if isinstance(module, nn.ModuleDict) and "second" in module:
                del module["second"]
    return from_parts(model=model)


@plant("adapter-written-empty", caught_by="adapter-lost", bug="X3", evidence="no adapter weights")
def adapter_written_empty(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The adapter's file has a header and nothing else, as ZeRO-3 once wrote it."""
    if is_planted:
        patch.setattr("peft.peft_model.get_peft_model_state_dict", lambda *args, **kwargs: {})
    return from_parts(model=with_adapter())
