"""Makes a shrunk model one that trains what the live model trains.

Owns the adapter around it and what of it is frozen. Leaves out its size (`shrink.py`).
"""

import copy
from typing import Any

from torch import nn

from .subject import NotRun


def trained_alike(live: Any, small: nn.Module) -> nn.Module:
    """`small`, in the live model's kind of adapter, with the same parameters frozen by name."""
    if live is None:
        return small
    if hasattr(live, "peft_config"):
        from peft import get_peft_model

        try:
            small = get_peft_model(small, copy.deepcopy(live.peft_config[live.active_adapter]))
        except Exception as error:
            raise NotRun(f"the adapter cannot be put on a small model: {str(error).splitlines()[0][:150]}") from None
    is_trained = {name: p.requires_grad for name, p in live.named_parameters()}
    for name, p in small.named_parameters():
        p.requires_grad_(is_trained.get(name, p.requires_grad))
    return small
