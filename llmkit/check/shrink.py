"""Shrink mode: a small model of the same class and configuration, for finding bugs of code in seconds.

Owns which numbers of a config may become small. Leaves out weights: they are redrawn by `subject.redraw_`.
"""

import copy
from typing import Any

import torch
from torch import nn

from .subject import SMALL, VOCABULARY, NotRun, Subject

LIMITS = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}


def count_parameters(subject: Subject) -> int:
    assert subject.make_model is not None
    with torch.device("meta"):
        return sum(p.numel() for p in subject.make_model(copy.deepcopy(subject.config)).parameters())


def build_small(subject: Subject, keep_vocabulary: bool) -> nn.Module:
    """A model of the subject's class, at full size where that is small anyway."""
    if subject.make_model is None:
        raise NotRun("the model is too large to probe, and its class cannot be built from a config")
    config: Any = copy.deepcopy(subject.config)
    if count_parameters(subject) > SMALL // 4:
        for name, limit in LIMITS.items():
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, min(getattr(config, name), limit))
        if not keep_vocabulary:
            config.vocab_size = min(config.vocab_size, VOCABULARY)
    return subject.make_model(config)
