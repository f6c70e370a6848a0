"""Bugs of the forward pass."""

from pathlib import Path

import pytest
from tiny import llama
from transformers.models.llama import modeling_llama

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant


@plant("no-causal-mask", caught_by="future-leak", bug="M1")
def no_causal_mask(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The mask is never built and attention is not causal."""
    if is_planted:
        patch.setattr(modeling_llama, "create_causal_mask", lambda **kwargs: None)
        patch.setattr(modeling_llama.LlamaAttention, "is_causal", False, raising=False)
        make = modeling_llama.LlamaAttention.__init__

        def init(self, *args, **kwargs):
            make(self, *args, **kwargs)
            self.is_causal = False

        patch.setattr(modeling_llama.LlamaAttention, "__init__", init)
    return from_parts(model=llama())
