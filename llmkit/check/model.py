"""How a model behaves: causality, padding, packing, cache. Redrawn weights, float32, tiny rows.

Owns the tier-2 checks of the forward pass. Leaves out the loss (`loss.py`) and saved files (`saving.py`).
"""

import torch

from .runner import Outcome, check, failed, passed
from .subject import NotRun, Subject


@check("future-leak", family="model", tier=2, catalogue="K19")
def future_leak(subject: Subject) -> Outcome:
    """A token sees tokens that come after it.

    Symptom: training loss falls far below what held-out text allows, and generation is garbage: the model copies its
        targets from the future.
    Example: attention with `is_causal=False`, or a mask that one branch (sdpa without padding) forgets.
    Detected: the last token of a row is changed; logits before it must not move.
    Tolerance: 1e-5 of the logits' standard deviation, or 8 times what the same forward moves when it is repeated.
    Spares: prefix-LM and diffusion models, whose attention is bidirectional by design.
    Fix: look for the mask of the branch that is named; in transformers models `is_causal` and `create_causal_mask`.
    Sources: transformers#48748, keras#23038, LLMs-from-scratch#1062.
    """
    subject.need("model")
    with subject.small_model() as model, torch.no_grad():
        size = min(model.get_input_embeddings().num_embeddings, 200)
        ids = torch.randint(size, (2, 24), generator=torch.Generator().manual_seed(0)).to(model.device)
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % size
        a, b = (model(input_ids=x, use_cache=False).logits for x in (ids, other))
        scale = a.std()
        if (a - b)[:, -1].abs().max() <= 1e-4 * scale:
            raise NotRun("changing a token does not even move its own logits: no positive control")
        moved = float((a - b)[:, :-1].abs().max() / scale)
    if moved > 1e-5:
        return failed(f"earlier logits move by {moved:.1e} of their deviation", "1e-5")
    return passed(f"earlier logits move by {moved:.1e} of their deviation", "1e-5")
