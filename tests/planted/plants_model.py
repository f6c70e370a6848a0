"""Bugs of the forward pass: in one branch only, where that is how people meet them."""

from pathlib import Path

import pytest
import torch
from tiny import llama
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant

causal_mask = modeling_llama.create_causal_mask
window_mask = modeling_mistral.create_sliding_window_causal_mask


def opened(mask):
    """A mask that hides nothing."""
    if mask is None:
        return None
    return torch.ones_like(mask) if mask.dtype == torch.bool else torch.zeros_like(mask)


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6,
    )  # fmt: skip
    return MistralForCausalLM(config)


@plant("no-causal-mask", caught_by="future-leak", bug="M1", evidence="no mask")
def no_causal_mask(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Attention is told that it is not causal, and no mask is built."""
    if is_planted:
        patch.setattr(modeling_llama, "create_causal_mask", lambda **kwargs: None)
        make = modeling_llama.LlamaAttention.__init__

        def init(self, *args, **kwargs):
            make(self, *args, **kwargs)
            self.is_causal = False

        patch.setattr(modeling_llama.LlamaAttention, "__init__", init)
    return from_parts(model=llama())


@plant("leak-in-training-only", caught_by="future-leak", bug="M1", evidence="training")
def leak_in_training_only(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """sdpa without mask is causal in evaluation and not in training."""
    if is_planted:
        forward = modeling_llama.LlamaAttention.forward

        def unmasked(self, *args, **kwargs):
            self.is_causal = not self.training
            return forward(self, *args, **kwargs)

        patch.setattr(modeling_llama.LlamaAttention, "forward", unmasked)
    return from_parts(model=llama())


@plant("leak-where-padded-left", caught_by="future-leak", bug="M1", evidence="padded left")
def leak_where_padded_left(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The mask of a left-padded batch is the padding mask alone."""

    def mask(**kwargs):
        padding, out = kwargs.get("attention_mask"), causal_mask(**kwargs)
        return opened(out) if padding is not None and padding.ndim == 2 and (padding[:, 0] == 0).any() else out

    if is_planted:
        patch.setattr(modeling_llama, "create_causal_mask", mask)
    return from_parts(model=llama())


@plant("leak-beyond-the-window", caught_by="future-leak", bug="M1")
def leak_beyond_the_window(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Rows longer than the sliding window get no mask at all."""

    def mask(**kwargs):
        out = window_mask(**kwargs)
        return opened(out) if kwargs["inputs_embeds"].shape[1] > 6 else out

    if is_planted:
        patch.setattr(modeling_mistral, "create_sliding_window_causal_mask", mask)
    return from_parts(model=mistral())


@plant("logits-centred-along-the-row", caught_by="future-leak", bug="M1", evidence="logits at position")
def logits_centred_along_the_row(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A mean over positions is taken from the logits."""

    class Centred(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits - 0.01 * out.logits.mean(1, keepdim=True)
            return out

    return from_parts(model=(Centred if is_planted else LlamaForCausalLM)(llama().config))


class OwnGpt(nn.Module):
    """Somebody's own model: no transformers class, a forward of two arguments, a tuple or a tensor out."""

    def __init__(self, is_causal: bool):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.is_causal = PretrainedConfig(vocab_size=100), is_causal
        self.embedding, self.head = nn.Embedding(100, 32), nn.Linear(32, 100)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        hidden, length = self.embedding(input_ids), input_ids.shape[1]
        mask = torch.triu(torch.ones(length, length), 1).bool() if self.is_causal else None
        logits = self.head(self.layer(hidden, src_mask=mask))
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


@plant("own-class-without-mask", caught_by="future-leak", bug="M1", evidence="only backend")
def own_class_without_mask(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A plain module forgets the mask."""
    return from_parts(model=OwnGpt(is_causal=not is_planted))


@plant("padding-not-masked", caught_by="padding-changes-logits", bug="M4", evidence="padded left")
def padding_not_masked(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The padding mask is dropped on the way to the attention."""
    if is_planted:
        patch.setattr(modeling_llama, "create_causal_mask", lambda **k: causal_mask(**k | {"attention_mask": None}))
    return from_parts(model=llama())


@plant("positions-count-padding", caught_by="padding-changes-logits", bug="M4", evidence="generate")
def positions_count_padding(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """generate hands no positions to a model with learned ones."""

    class Counted(GPT2LMHeadModel):
        def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
            inputs = super().prepare_inputs_for_generation(
                input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
            )
            inputs.pop("position_ids", None)
            return inputs

    ids = dict(bos_token_id=1, eos_token_id=2)
    config = GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=256, **ids)
    return from_parts(model=(Counted if is_planted else GPT2LMHeadModel)(config))


@plant("batch-centred", caught_by="batch-changes-logits", bug="E3", evidence="other rows replaced")
def batch_centred(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Activations are centred over the batch."""

    class Centred(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits - 0.01 * out.logits.mean(0, keepdim=True)
            return out

    return from_parts(model=(Centred if is_planted else LlamaForCausalLM)(llama().config))


@plant("mask-from-ids", caught_by="pads-inferred-from-ids", bug="I4", evidence="no mask against")
def mask_from_ids(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Without a mask every pad id counts as padding."""
    if is_planted:
        forward = modeling_llama.LlamaModel.forward

        def guessed(self, input_ids=None, attention_mask=None, **kwargs):
            if attention_mask is None and input_ids is not None:
                attention_mask = (input_ids != self.config.pad_token_id).long()
            return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

        patch.setattr(modeling_llama.LlamaModel, "forward", guessed)
    return from_parts(model=llama())


@plant("packing-mask-without-positions", caught_by="packed-documents-leak", bug="M2", evidence="document before")
def packing_mask_without_positions(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The mask is built without position_ids, so packed documents see each other."""
    if is_planted:
        patch.setattr(modeling_llama, "create_causal_mask", lambda **k: causal_mask(**k | {"position_ids": None}))
    return from_parts(model=llama())


@plant("packing-on-a-model-without-positions", caught_by="packed-documents-leak", bug="M2", evidence="forward")
def packing_on_a_model_without_positions(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Packing is switched on for an architecture that cannot keep documents apart."""
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=200, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    subject = from_parts(model=bloom if is_planted else llama())
    subject.settings["packing"] = True
    return subject


@plant("cache-positions-restart", caught_by="cache-differs", bug="M5", evidence="token by token")
def cache_positions_restart(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Positions begin at 0 with every cached step."""
    if is_planted:
        forward = modeling_llama.LlamaModel.forward

        def restarted(self, input_ids=None, *args, past_key_values=None, **kwargs):
            if past_key_values is not None and input_ids is not None:
                kwargs["position_ids"] = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
            return forward(self, input_ids, *args, past_key_values=past_key_values, **kwargs)

        patch.setattr(modeling_llama.LlamaModel, "forward", restarted)
    return from_parts(model=llama())


@plant("cache-only-wrong-in-generate", caught_by="cache-differs", bug="M5", evidence="generate")
def cache_only_wrong_in_generate(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """generate hands positions that are one ahead from the second token on."""

    class Ahead(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
            inputs = super().prepare_inputs_for_generation(
                input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
            )
            if inputs.get("position_ids") is not None and inputs["input_ids"].shape[1] == 1:
                inputs["position_ids"] = inputs["position_ids"] + 7
            return inputs

    return from_parts(model=(Ahead if is_planted else LlamaForCausalLM)(llama().config))


@plant("eager-drops-the-mask", caught_by="backend-changes-logits", bug="M7", evidence="eager")
def eager_drops_the_mask(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The eager attention ignores what the mask hides."""
    if is_planted:
        attention = modeling_llama.eager_attention_forward
        patch.setattr(
            modeling_llama,
            "eager_attention_forward",
            lambda module, q, k, v, mask, **rest: attention(module, q, k, v, None, **rest),
        )
    return from_parts(model=llama())


@plant("window-lost-in-sdpa", caught_by="backend-changes-logits", bug="M6", evidence="against")
def window_lost_in_sdpa(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Only eager attention is given the sliding window."""

    def mask(**kwargs):
        is_sdpa = kwargs["config"]._attn_implementation == "sdpa"
        return modeling_mistral.create_causal_mask(**kwargs) if is_sdpa else window_mask(**kwargs)

    if is_planted:
        patch.setattr(modeling_mistral, "create_sliding_window_causal_mask", mask)
    return from_parts(model=mistral())


@plant("window-lost-everywhere", caught_by="window-not-applied", bug="M6", evidence="the config says")
def window_lost_everywhere(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """No backend is given the sliding window."""
    if is_planted:
        patch.setattr(modeling_mistral, "create_sliding_window_causal_mask", modeling_mistral.create_causal_mask)
    return from_parts(model=mistral())


@plant("dropout-in-evaluation", caught_by="forward-not-repeatable", bug="E4", evidence="two passes")
def dropout_in_evaluation(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Functional dropout that evaluation mode does not switch off."""
    model = llama()
    if is_planted:
        hook = lambda module, args, out: nn.functional.dropout(out, 0.3, training=True)  # noqa: E731
        model.model.layers[0].mlp.register_forward_hook(hook)
    return from_parts(model=model)
