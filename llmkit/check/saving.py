"""What is saved is what comes back: model, tied head, resized embeddings, adapter.

Owns the tier-2 checks that write into a temporary folder. Leaves out the user's own files (`weights.py`) and the
tokenizer's (`tokenizer.py`).
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .forward import bare, draw_ids, logits_of, text_config
from .model import difference, need_alive
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject

# fields of a config that saving and loading may change
VOLATILE = {
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "architectures",
    "auto_map",
    "_commit_hash",
}
VOLATILE |= {"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "quantization_config"}
TIGHT = 1e-6  # of the logits' deviation: the same weights in the same dtype
# what a fresh process does; it prints the path of the logits it wrote
FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], load_file(sys.argv[2])["ids"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=ids).logits.float().contiguous()}, sys.argv[3])
"""


def _plain(value: Any) -> Any:
    """Of a config as JSON holds it, without what says where it came from."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in VOLATILE}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _config_changes(before: Any, after: Any) -> list[str]:
    a, b = _plain(before.to_dict()), _plain(after.to_dict())
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


@contextlib.contextmanager
def _saved(subject: Subject) -> Iterator[tuple[Any, Tensor, Tensor, Path]]:
    """(model, ids, logits, folder) of the redrawn small model, saved."""
    subject.need("model")
    with subject.small_model() as model, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if hasattr(model, "peft_config"):
            raise NotApplicable("an adapter is trained: see adapter-lost")
        if not hasattr(model, "save_pretrained"):
            raise NotApplicable("the model has no save_pretrained")
        ids = draw_ids(model, 2, 12)
        logits = logits_of(model, ids)
        need_alive(logits)
        model.save_pretrained(folder)
        yield model, ids, logits, Path(folder)


@check("reload-differs", family="saving", tier=2, catalogue="K28")
def reload_differs(subject: Subject) -> Outcome:
    """What save_pretrained writes is not what from_pretrained reads back.

    Symptom: the evaluation after training looks fine, the published model talks nonsense.
    Example: a state dict filter that drops a tensor; keys with `_orig_mod.` in front; a buffer that is not
        recomputed on load; a save that casts to fp16; a config field that is set after construction and not stored.
    Detected: the redrawn model is saved and loaded again by its class, and by the Auto class in a fresh Python process
        where its code travels with the folder; keys, config and logits are compared.
    Tolerance: 1e-6 of the logits' deviation: the same numbers in the same dtype.
    Spares: tied keys and buffers that are not stored; fields of the config that are about where it came from.
    Fix: look at what is missing; non-persistent buffers must be recomputed in `_init_weights`, tied keys be declared in
        `_tied_weights_keys`, every config field be an argument of the config.
    Sources: transformers#43429, #45079, train-llm-from-scratch#37, pytorch#129362, transformers#10789.
    """
    with _saved(subject) as (model, ids, logits, folder):
        scale = logits.std()
        kind = getattr(model.config, "_attn_implementation", None)
        attention = {"attn_implementation": kind} if kind else {}
        loaded, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **attention)
        bad = [
            {"note": f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, info[what]))[:4])}"}
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info.get(what)
        ]
        bad += [{"note": f"config {line}"} for line in _config_changes(model.config, loaded.config)]
        moved = difference(logits, logits_of(loaded.eval().to(ids.device), ids), scale)
        where = "this process"
        if (folder / "config.json").is_file() and "auto_map" in json.loads((folder / "config.json").read_text()):
            where = "a fresh process"
            moved = max(moved, difference(logits, _fresh_logits(folder, ids), scale))
    if moved > TIGHT or any("keys" in item["note"] for item in bad):
        evidence = bad or [{"note": "no key is missing: look at buffers and at what the class computes on load"}]
        return failed(
            f"logits move by {moved:.1e} of their deviation after a reload in {where}", f"{TIGHT:.0e}", evidence
        )
    if bad:
        return warned(f"logits are the same, {len(bad)} config fields are not", "0 fields", bad)
    return passed(f"logits move by {moved:.1e} of their deviation after a reload in {where}", f"{TIGHT:.0e}")


def _fresh_logits(folder: Path, ids: Tensor) -> Tensor:
    from safetensors.torch import load_file, save_file

    given, out = folder / "ids.st", folder / "logits.st"
    save_file({"ids": ids.cpu().contiguous()}, given)
    command = [sys.executable, "-c", FRESH, str(folder), str(given), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LLMKIT_CHECK": ""}, timeout=300)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NotRun(f"a fresh process cannot load the folder: {lines[-1][:200] if lines else 'no message'}")
    return load_file(out)["logits"].to(ids.device)


@check("tied-head-broken", family="saving", tier=2, catalogue="K28")
def tied_head_broken(subject: Subject) -> Outcome:
    """The config ties the head to the embedding, and they are two tensors.

    Symptom: a reloaded model answers randomly; memory for a second vocabulary matrix; the head learns, the embedding
        does not, and only one of them is saved.
    Example: a head replaced after `post_init`; a checkpoint without the tied key and a config with tie=False.
    Detected: shared memory in the live model, and again after save and reload.
    Tolerance: none: it is one tensor or it is not.
    Spares: models without a head, quantised heads, configs that do not tie.
    Fix: call `model.tie_weights()` after replacing a head; declare `_tied_weights_keys`; set tie_word_embeddings to
        what the weights are.
    Sources: transformers#43429, #35141, vec2text#94.
    """
    subject.need("model")
    if not getattr(text_config_of(subject), "tie_word_embeddings", False):
        raise NotApplicable("the config does not tie head and embedding")

    def is_tied(model: Any) -> bool | None:
        a, b = bare(model).get_input_embeddings(), bare(model).get_output_embeddings()
        a, b = (getattr(getattr(m, "base_layer", m), "weight", None) for m in (a, b))
        return None if a is None or b is None else a.data_ptr() == b.data_ptr()

    places = {}
    with subject.small_model(draw=False) as model:
        places["as given"] = is_tied(model)
        if places["as given"] is None:
            raise NotApplicable("the model has no head of its own")
        if hasattr(model, "save_pretrained") and not hasattr(model, "peft_config"):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                places["after a reload"] = is_tied(type(model).from_pretrained(folder))
    bad = [{"note": f"{place}: two tensors"} for place, tied in places.items() if not tied]
    if bad:
        return failed("head and embedding are two tensors, tie_word_embeddings is true", "one tensor", bad)
    return passed(f"one tensor {' and '.join(places)}", "one tensor")


def text_config_of(subject: Subject) -> Any:
    return text_config(subject.model) if subject.model is not None else subject.config


@check("resize-corrupts", family="saving", tier=2, catalogue="K28")
def resize_corrupts(subject: Subject) -> Outcome:
    """Adding tokens changes what the old ones mean.

    Symptom: after adding chat tokens the model is worse at everything; or the new tokens drown all others.
    Example: a resize that rebuilds the matrix, ties it no longer, or draws new rows a hundred times too large.
    Detected: eight rows are added to the redrawn model: old rows keep every bit, logits of old ids stay, new rows have
        norms like the others, a tied head stays tied.
    Tolerance: rows bit for bit; logits 1e-5 of their deviation; norms above 0 (transformers draws around the mean
        row, which is short) and within 10 times the median.
    Spares: models that cannot be resized.
    Fix: use `model.resize_token_embeddings(n)` with n at least the present number of rows.
    Sources: unsloth-zoo#923, LlamaFactory#10547, transformers#20043.
    """
    subject.need("model")
    with subject.small_model() as model, torch.no_grad():
        inner = bare(model)
        if hasattr(model, "peft_config") or not hasattr(inner, "resize_token_embeddings"):
            raise NotApplicable("a model that is not resized here")
        ids = draw_ids(model, 2, 12)
        logits, rows = logits_of(model, ids), inner.get_input_embeddings().weight.clone()
        scale = need_alive(logits)
        count = len(rows)
        tied = inner.get_output_embeddings() is not None and (
            inner.get_output_embeddings().weight.data_ptr() == inner.get_input_embeddings().weight.data_ptr()
        )
        try:
            inner.resize_token_embeddings(count + 8)
        except (NotImplementedError, AttributeError) as error:
            raise NotApplicable(f"the model cannot be resized ({type(error).__name__})") from None
        new = inner.get_input_embeddings().weight
        head = inner.get_output_embeddings()
        bad: list[dict[str, Any]] = []
        if len(new) != count + 8:
            bad.append({"note": f"{len(new)} rows after a resize to {count + 8}"})
        elif not torch.equal(new[:count], rows):
            first = int((new[:count] != rows).any(1).nonzero()[0])
            bad.append({"ids": [first], "note": f"old rows have changed, id {first} is the first"})
        ratio = float(new[count:].norm(dim=1).median() / rows.norm(dim=1).median()) if len(new) > count else 1.0
        if not 1e-4 <= ratio <= 10:
            bad.append({"note": f"new rows are {ratio:.2g} times as long as the others"})
        if tied and head.weight.data_ptr() != new.data_ptr():
            bad.append({"note": "the head is no longer tied"})
        moved = difference(logits, logits_of(model, ids)[..., :count], scale)
        if moved > 1e-5:
            bad.append({"note": f"logits of old ids move by {moved:.1e} of their deviation"})
    if bad:
        return failed("; ".join(item["note"] for item in bad)[:160], "old rows and logits unchanged", bad)
    return passed(
        f"old rows unchanged, logits move by {moved:.1e}, new rows {ratio:.2f} times the median", "1e-5, 0.1 to 10"
    )


@check("adapter-lost", family="saving", tier=2, catalogue="K28")
def adapter_lost(subject: Subject) -> Outcome:
    """A saved adapter comes back as nothing, or as another one.

    Symptom: the loaded model answers exactly like the base; new tokens are noise after a reload.
    Example: an adapter whose keys do not match on load; trained embedding rows that are not in the file.
    Detected: with every adapter weight drawn at random (B too), the adapter is saved, loaded under another name and
        switched on: logits must be those of before and not those of the base.
    Tolerance: 1e-5 of the logits' deviation.
    Spares: models without adapter.
    Fix: look at the keys in adapter_model.safetensors; name modules that were trained in `modules_to_save`.
    Sources: peft#1323, #1932, #2118, #2699, #2772, #1300, #2898.
    """
    subject.need("model")
    if not hasattr(subject.model, "peft_config"):
        raise NotApplicable("no adapter is trained")
    with subject.small_model() as model, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if not hasattr(model, "peft_config"):
            model = _with_adapter(subject, model)
        ids = draw_ids(model, 2, 12)
        adapted = logits_of(model, ids)
        scale = need_alive(adapted)
        with model.disable_adapter():
            base = logits_of(model, ids)
        if difference(adapted, base, scale) <= 1e-4:
            name = next(iter(model.peft_config.values())).target_modules
            return failed("the adapter changes no logits: it sits on nothing", "", [{"note": f"target_modules {name}"}])
        model.save_pretrained(folder)
        found = sorted(Path(folder).rglob("adapter_model.*"))
        if not found or found[0].stat().st_size < 100:
            return failed("save_pretrained wrote no adapter weights", "", [{"note": str([p.name for p in found])}])
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.5)  # what is loaded must not depend on what is still here
        result = model.load_adapter(str(found[0].parent), adapter_name="llmkit_reloaded")
        model.set_adapter("llmkit_reloaded")
        moved = difference(adapted, logits_of(model, ids), scale)
        unexpected = list(getattr(result, "unexpected_keys", []))
    if moved > 1e-5:
        evidence = [{"note": f"keys that found no place: {', '.join(unexpected[:3])}"}] if unexpected else []
        evidence += [{"note": "trained tensors outside the adapter file count too: modules_to_save, token rows"}]
        return failed(f"logits move by {moved:.1e} of their deviation after a reload", "1e-5", evidence)
    return passed(f"logits move by {moved:.1e} of their deviation after a reload", "1e-5")


def _with_adapter(subject: Subject, model: Any) -> Any:
    """The same adapter config on the shrunk base."""
    from peft import get_peft_model

    from .subject import redraw_

    return redraw_(
        get_peft_model(copy.deepcopy(model), copy.deepcopy(next(iter(subject.model.peft_config.values()))))
    ).eval()
