"""Bugs of saving, loading and resizing."""

from pathlib import Path

import pytest
import torch
from tiny import llama
from torch import nn
from transformers import LlamaForCausalLM

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
