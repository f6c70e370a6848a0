"""Embedding and head: one tensor where they are tied, the same rows after a resize.

Owns these two checks of family `saving`. Leaves out stored rows (`weights.py`).
"""

import tempfile
from typing import Any

import torch

from .forward import bare, draw_ids, logits_of, text_config
from .measure import difference, need_alive
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject

ADDED = 8  # rows
SHORTEST, LONGEST = 1e-4, 10  # of a new row, in units of the median: transformers draws it near the mean row


def _weight(module: Any) -> Any:
    """Of a linear or embedding layer, whatever an adapter put around it."""
    if hasattr(module, "token_adapter"):  # makes its rows anew at every look
        module = module.original_module
    while module is not None and hasattr(module, "base_layer"):
        module = module.base_layer
    return getattr(module, "weight", None)


def _is_tied(model: Any) -> bool | None:
    """None where there is no head to ask."""
    a, b = (_weight(m) for m in (bare(model).get_input_embeddings(), bare(model).get_output_embeddings()))
    return None if a is None or b is None else a.data_ptr() == b.data_ptr()


@check("tied-head-broken", family="saving", tier=2, catalogue="K28")
def tied_head_broken(subject: Subject) -> Outcome:
    """The config ties the head to the embedding, and they are two tensors.

    Symptom: a reloaded model answers randomly; memory for a second vocabulary matrix; the head learns, the embedding
        does not, and only one of them is saved.
    Example: a head replaced after `post_init`; a checkpoint without the tied key and a config with tie=False.
    Detected: shared memory in the live model, after save and reload, and with an adapter around it (where peft is
        installed).
    Tolerance: none: it is one tensor or it is not.
    Spares: models without a head, quantised heads, configs that do not tie. An adapter that trains a copy of one of
        the two is warned of.
    Fix: call `model.tie_weights()` after replacing a head; declare `_tied_weights_keys`; set tie_word_embeddings to
        what the weights are; name both in `modules_to_save`, or set `ensure_weight_tying=True` in the LoraConfig.
    Sources: transformers#43429, #35141, vec2text#94.
    """
    subject.need("model")
    if not _ties(subject):
        raise NotApplicable("the config does not tie head and embedding")
    places: dict[str, bool | None] = {}
    with subject.small_model(draw=False) as model:
        model = getattr(model, "_orig_mod", model)
        places["as given"] = _is_tied(model)
        if places["as given"] is None:
            raise NotApplicable("the model has no head of its own")
        if hasattr(model, "peft_config"):
            if not places["as given"] and _copies_for_adapter(model):
                note = "the adapter trains a copy of the one, and the other stays: merged, they are two tensors"
                return warned("an adapter holds a copy of a tied embedding or head", "one tensor", [{"note": note}])
        elif hasattr(model, "save_pretrained") and hasattr(type(model), "from_pretrained"):
            places |= _elsewhere(model)
    bad = [{"note": f"{place}: two tensors"} for place, tied in places.items() if not tied]
    if bad:
        return failed("head and embedding are two tensors, tie_word_embeddings is true", "one tensor", bad)
    return passed(f"one tensor {', '.join(places)}", "one tensor")


def _ties(subject: Subject) -> bool:
    config = bare(subject.model).config if subject.model is not None else subject.config
    ties = getattr(config, "tie_word_embeddings", None)
    return bool(getattr(text_config(config), "tie_word_embeddings", False) if ties is None else ties)


def _copies_for_adapter(model: Any) -> bool:
    modules = (bare(model).get_input_embeddings(), bare(model).get_output_embeddings())
    return any(hasattr(module, "modules_to_save") for module in modules)


def _elsewhere(model: Any) -> dict[str, bool | None]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder)
        except Exception as error:
            raise NotRun(f"it cannot be saved and loaded ({type(error).__name__}): see reload-differs") from None
    found = {"after a reload": _is_tied(loaded)}
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return found
    linear = [n for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n]
    if linear:
        found["in an adapter"] = _is_tied(get_peft_model(loaded, LoraConfig(r=1, target_modules=[linear[0]])))
    return found


@check("resize-corrupts", family="saving", tier=2, catalogue="K28")
def resize_corrupts(subject: Subject) -> Outcome:
    """Adding tokens changes what the old ones mean.

    Symptom: after adding chat tokens the model is worse at everything; or the new tokens drown all others.
    Example: a resize that rebuilds the matrix, ties it no longer, or draws new rows a hundred times too large.
    Detected: eight rows are added to the redrawn model: old rows keep every bit, logits of old ids stay, new rows have
        norms like the others, a tied head stays tied, the config knows the new size.
    Tolerance: rows bit for bit; logits 1e-5 of their deviation; norms above 0 (transformers draws around the mean
        row, which is short) and within 10 times the median.
    Spares: models that cannot be resized; a head whose size does not follow the embedding's.
    Fix: use `model.resize_token_embeddings(n)` with n at least the present number of rows.
    Sources: unsloth-zoo#923, LlamaFactory#10547, transformers#20043.
    """
    subject.need("model")
    with subject.small_model() as model, torch.no_grad():
        model = getattr(model, "_orig_mod", model)
        inner = bare(model)
        if hasattr(model, "peft_config") or not hasattr(inner, "resize_token_embeddings"):
            raise NotApplicable("a model that is not resized here")
        ids = draw_ids(model, 2, 12)
        logits, rows = logits_of(model, ids), _weight(inner.get_input_embeddings()).clone()
        scale, count, was_tied = need_alive(logits), len(rows), _is_tied(model)
        knew_size = getattr(text_config(model), "vocab_size", None) == count
        try:
            inner.resize_token_embeddings(count + ADDED)
        except (NotImplementedError, AttributeError) as error:
            raise NotApplicable(f"the model cannot be resized ({type(error).__name__})") from None
        new = _weight(inner.get_input_embeddings())
        bad: list[dict[str, Any]] = []
        ratio = 0.0
        if len(new) != count + ADDED:
            bad.append({"note": f"{len(new)} rows after a resize to {count + ADDED}"})
        else:
            ratio = float(new[count:].norm(dim=1).median() / rows.norm(dim=1).median())
            if not torch.equal(new[:count], rows):
                first = int((new[:count] != rows).any(1).nonzero()[0])
                bad.append({"ids": [first], "note": f"old rows have changed, id {first} is the first"})
            if not SHORTEST <= ratio <= LONGEST:
                bad.append({"note": f"new rows are {ratio:.2g} times as long as the others"})
        if was_tied and not _is_tied(model):
            bad.append({"note": "the head is no longer tied"})
        if knew_size and (size := text_config(model).vocab_size) != len(new):
            bad.append({"note": f"config.vocab_size is {size}, the embedding has {len(new)} rows"})
        after = logits_of(model, ids)
        width = min(count, logits.shape[-1])
        moved = difference(logits[..., :width], after[..., :width], scale)
        if moved > 1e-5:
            bad.append({"note": f"logits of old ids move by {moved:.1e} of their deviation"})
    if bad:
        return failed("; ".join(item["note"] for item in bad)[:160], "old rows and logits unchanged", bad)
    measured = f"old rows unchanged, logits move by {moved:.1e}, new rows {ratio:.2f} times the median"
    return passed(measured, f"1e-5; {SHORTEST:g} to {LONGEST} times")
