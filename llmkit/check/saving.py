"""What is saved is what comes back: weights, buffers, config, template.

Owns the tier-2 checks that write a model or tokenizer into a temporary folder. Leaves out embeddings and heads
(`embeddings.py`), adapters (`adapters.py`), the user's own files (`weights.py`) and text (`tokenizer.py`).
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import adapters, embeddings  # noqa: F401  # checks of this family
from .forward import draw_ids, logits_of
from .measure import EQUAL, difference, need_alive, noise
from .runner import Outcome, check, failed, first_line, passed, warned
from .stored import Stored
from .subject import NotApplicable, NotRun, Subject
from .torture import load_again

# fields of a config that saving and loading may change
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "auto_map"}
VOLATILE |= {"_commit_hash", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
VOLATILE |= {"quantization_config", "_from_model_config"}
TIGHT = 1e-5  # of the logits' deviation: the same numbers, which may lie in memory otherwise; fp16 would move 1e-3
STOCK = "transformers.models."
TIMEOUT_S = 300
# what a fresh process does
FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], load_file(sys.argv[2])["ids"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    out = model(input_ids=ids)
    save_file({"logits": (out.logits if hasattr(out, "logits") else out[0]).float().contiguous()}, sys.argv[3])
"""


@dataclass
class Saved:
    model: Any  # redrawn, in eval mode
    ids: Tensor  # (B, T)
    logits: Tensor  # (B, T, V)
    folder: Path


def save(subject: Subject, model: Any, folder: Path) -> None:
    """As the trainer does at the end, where there is one."""
    if subject.training is not None and hasattr(subject.training, "save"):
        subject.training.save(model, folder)
    else:
        model.save_pretrained(folder)


@contextlib.contextmanager
def _redrawn(subject: Subject) -> Iterator[Saved]:
    """The redrawn small model, nothing of it written yet. Its values are such that the live dtype holds them."""
    subject.need("model")
    dtypes = {n: p.dtype for n, p in subject.model.named_parameters()} if subject.is_small else {}
    with subject.small_model() as model, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        if hasattr(model, "peft_config"):
            raise NotApplicable("an adapter is trained: see adapter-lost")
        if not hasattr(model, "save_pretrained") or not hasattr(type(model), "from_pretrained"):
            raise NotApplicable("the model has no save_pretrained and from_pretrained")
        for name, p in model.named_parameters():
            p.data = p.data.to(dtypes.get(name, p.dtype)).to(p.dtype)
        ids = draw_ids(model, 2, 12)
        logits = logits_of(model, ids)
        need_alive(logits)
        yield Saved(model, ids, logits, Path(folder))


@check("reload-differs", family="saving", tier=2, catalogue="K28")
def reload_differs(subject: Subject) -> Outcome:
    """What save_pretrained writes is not what from_pretrained reads back.

    Symptom: the evaluation after training looks fine, the published model talks nonsense.
    Example: a state dict filter that drops a tensor; keys with `_orig_mod.` in front; a buffer that is not
        recomputed on load; a save that casts to fp16; a config field that is set after construction and not stored.
    Detected: the redrawn model is saved (by the trainer where there is one) and loaded again by its class. Keys,
        weights, config, generation config and logits are compared.
    Tolerance: 1e-5 of the logits' deviation, or 10 times what rounding does to this model: the same numbers in the
        same dtype (fp16 moves logits by 1e-3).
    Spares: tied keys and buffers that are not stored; buffers that the live model holds rounded; fields of the config
        that are about where it came from. Only warned of: bfloat16 files of a float32 model, config fields that change
        no logits.
    Fix: look at what is named; non-persistent buffers must be recomputed in `_init_weights`, tied keys be declared in
        `_tied_weights_keys`, every config field be an argument of the config.
    Sources: transformers#43429, #45079, train-llm-from-scratch#37, pytorch#129362, transformers#10789.
    """
    with _redrawn(subject) as saved:
        model, scale = saved.model, saved.logits.std()
        most = max(TIGHT, 10 * noise(model, saved.ids))
        try:
            save(subject, model, saved.folder)
        except Exception as error:
            return failed("the model cannot be saved", "", [{"note": first_line(error)}])
        if not (saved.folder / "config.json").is_file():
            raise NotRun("the trainer's save_model writes no config.json, so no transformers folder")
        kind = getattr(model.config, "_attn_implementation", None)
        options = {"attn_implementation": kind} if kind else {}
        try:
            loaded, info = type(model).from_pretrained(
                saved.folder, dtype=torch.float32, output_loading_info=True, **options
            )
        except TypeError as error:
            fix = "Give `__init__` a config and nothing else, so that from_pretrained can call it."
            return warned("its class cannot load what it saved", "", [{"note": first_line(error)}], fix)
        except Exception as error:
            return failed("its class cannot load what it saved", "", [{"note": first_line(error)}])
        loaded = loaded.eval().to(saved.ids.device)
        lost = _unequal(model, loaded)
        moved = difference(saved.logits, logits_of(loaded, saved.ids), scale)
        if moved > most and lost and _take_rounded_buffers(model, loaded):
            saved.logits = logits_of(model, saved.ids)
            lost, moved = _unequal(model, loaded), difference(saved.logits, logits_of(loaded, saved.ids), scale)
        keys = [
            {"note": f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, info[what]))[:4])}"}
            for what in ("missing_keys", "mismatched_keys", "unexpected_keys")
            if info.get(what)
        ]
        fields = [{"note": f"config {line}"} for line in _changes(model.config, loaded.config)]
        generation = [getattr(m, "generation_config", None) for m in (model, loaded)]
        if all(generation):
            fields += [{"note": f"generation config {line}"} for line in _changes(*generation)]
        measured = f"logits move by {moved:.1e} of their deviation after a reload"
        limit = f"{most:.0e}"
        if moved > most or info.get("missing_keys") or info.get("mismatched_keys"):
            stored = Stored(saved.folder).dtypes.values()
            evidence = keys + fields + [{"note": f"{name} is not what it was"} for name in lost[:4]]
            if not keys and "BF16" in stored and _is_rounded(model, loaded):
                return warned(f"{measured}: stored in bfloat16", limit, evidence[:3], "Save in the dtype of training.")
            if narrow := sorted(set(stored) & {"F16", "BF16"}):
                evidence.append({"note": f"tensors are stored as {', '.join(narrow)}, the model is wider"})
            if not lost:
                evidence.append({"note": "every weight is what it was: look at what the class computes on load"})
            return failed(measured, limit, evidence)
    if keys or fields:
        return warned(f"{measured}, but keys or config are not the same", "no difference", keys + fields)
    return passed(measured, limit)


def _plain(value: Any) -> Any:
    """Of a config as JSON holds it, without what says where it came from."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in VOLATILE}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _changes(before: Any, after: Any) -> list[str]:
    a, b = _plain(before.to_dict()), _plain(after.to_dict())
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def _tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _unequal(model: Any, loaded: Any) -> list[str]:
    """Names of parameters and buffers that have other values."""
    mine, theirs = _tensors(model), _tensors(loaded)
    return [n for n, t in mine.items() if n in theirs and not _same(t, theirs[n])]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float().cpu(), b.float().cpu())


def _is_rounded(model: Any, loaded: Any) -> bool:
    """Whatever differs is the value rounded to bfloat16."""
    mine, theirs = _tensors(model), _tensors(loaded)
    return all(n in theirs and _same(mine[n].to(torch.bfloat16), theirs[n].to(torch.bfloat16)) for n in mine)


def _take_rounded_buffers(model: Any, loaded: Any) -> bool:
    """Buffers that `.bfloat16()` rounded are computed anew on load, in full: not the bug of this check."""
    theirs, taken = dict(loaded.named_buffers()), 0
    for name, buffer in model.named_buffers():
        if buffer.dtype.itemsize < 4 and name in theirs and _same(buffer, theirs[name].to(buffer.dtype)):
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, theirs[name].to(buffer.device))
            taken += 1
    return taken > 0


@check("auto-class-differs", family="saving", tier=2, catalogue="K28")
def auto_class_differs(subject: Subject) -> Outcome:
    """AutoModelForCausalLM makes another model of what was saved than its own class does.

    Symptom: the model is right where it was trained, and wrong or unknown wherever it is served.
    Example: a subclass of LlamaForCausalLM whose folder everyone loads as Llama; travelling code that imports a module
        which only its author has.
    Detected: for classes that are not transformers' own, the saved folder is loaded by AutoModelForCausalLM: in a
        fresh Python process where the code travels with the folder, in this one otherwise; logits are compared.
    Tolerance: 1e-4 of the logits' deviation, or 30 times what rounding does to this model: another process may choose
        another attention backend.
    Spares: subclasses that change no logits (another loss, say). A class that is registered nowhere is a warning: its
        author may load it by name.
    Fix: register the class (`AutoConfig.register`, `AutoModelForCausalLM.register`) where it is loaded, or let its code
        travel with the weights: `MyConfig.register_for_auto_class()`,
        `MyModel.register_for_auto_class("AutoModelForCausalLM")` before `save_pretrained`.
    Sources: transformers#43429, train-llm-from-scratch#37.
    """
    subject.need("model")
    kind = type(getattr(subject.model, "_orig_mod", subject.model)) if subject.model is not None else None
    if kind is not None and kind.__module__.startswith(STOCK):
        raise NotApplicable("the class is transformers' own")
    with _redrawn(subject) as saved:
        name = type(saved.model).__name__
        if type(saved.model).__module__.startswith(STOCK):
            raise NotApplicable("the class is transformers' own")
        limit = max(EQUAL, 30 * noise(saved.model, saved.ids))
        try:
            saved.model.save_pretrained(saved.folder)
        except Exception as error:
            raise NotRun(f"the model cannot be saved ({first_line(error)}): see reload-differs") from None
        if "auto_map" in json.loads((saved.folder / "config.json").read_text(encoding="utf-8")):
            logits = _fresh_logits(saved)
            if isinstance(logits, str):
                return failed("a fresh process cannot load the folder", "", [{"note": logits}])
            moved = difference(saved.logits, logits, saved.logits.std())
            measured = f"logits move by {moved:.1e} of their deviation in a fresh process"
            note = "look at what the travelling code imports or leaves out, and at buffers"
            return (
                passed(measured, f"{limit:.0e}")
                if moved <= limit
                else failed(measured, f"{limit:.0e}", [{"note": note}])
            )
        from transformers import AutoModelForCausalLM

        try:
            other = AutoModelForCausalLM.from_pretrained(saved.folder, dtype=torch.float32).eval().to(saved.ids.device)
            moved = difference(saved.logits, logits_of(other, saved.ids), saved.logits.std())
        except Exception as error:
            note = f"AutoModelForCausalLM: {first_line(error)}"
            return warned(f"only {name}.from_pretrained can load the folder", "", [{"note": note}])
    if moved <= limit:
        return passed(f"logits move by {moved:.1e} of their deviation by AutoModelForCausalLM", f"{limit:.0e}")
    if type(other).__name__ == name:
        return failed(
            f"logits move by {moved:.1e} by AutoModelForCausalLM", f"{limit:.0e}", [{"note": f"it makes a {name}"}]
        )
    note = f"AutoModelForCausalLM makes a {type(other).__name__} of it, whose logits are off by {moved:.1e}"
    return warned(f"only {name}.from_pretrained loads what was saved", "the same class", [{"note": note}])


def _fresh_logits(saved: Saved) -> Tensor | str:
    """Of the folder in a Python process that has imported nothing; what it says where it cannot load the folder."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "ids.safetensors", Path(folder) / "logits.safetensors"
        save_file({"ids": saved.ids.cpu().contiguous()}, given)
        # -P: not even the folder that this one was started in is on its path
        command = [sys.executable, "-P", "-c", FRESH, str(saved.folder), str(given), str(out)]
        modules = {"HF_MODULES_CACHE": str(Path(folder) / "modules")}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | modules, cwd=folder, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise NotRun(f"a fresh process does not load the folder within {TIMEOUT_S} s") from None
        if done.returncode < 0:
            raise NotRun(f"a fresh process was ended by signal {-done.returncode}")
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return lines[-1][:200] if lines else "no message"
        return load_file(out)["logits"].to(saved.ids.device)


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": "On the roof."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two\nlines, please.\n"},
        {"role": "assistant", "content": "Here:\n\n  one\n  zwei, drei: äöü 你好"},
        {"role": "user", "content": "Thanks"},
    ],
]


@check("template-lost-on-save", family="saving", tier=2, catalogue="K28")
def template_lost_on_save(subject: Subject) -> Outcome:
    """The chat template is not saved with the tokenizer, or another one is.

    Symptom: the model was trained on one format, and whoever loads it prompts it with another one.
    Example: a save that leaves `chat_template.jinja` behind; a template set on a copy of the tokenizer.
    Detected: the tokenizer is saved and loaded again; template and rendered conversations must be the same bytes. With
        --reference, the folder must still have a template where the reference had one.
    Tolerance: none.
    Spares: tokenizers without a template; another template than the reference's is a warning.
    Fix: save with `tokenizer.save_pretrained(folder)`, and keep `chat_template.jinja` beside tokenizer_config.json.
    Sources: llama-cpp-rs#1096, ollama#6823, LlamaFactory#5834, mlc-llm#3484.
    """
    subject.need("tokenizer")
    tokenizer, reference = subject.tokenizer, subject.reference_tokenizer
    before, theirs = (getattr(t, "chat_template", None) for t in (tokenizer, reference))
    if theirs and not before:
        note = f"the reference's has {len(theirs)} characters"
        return failed("the reference has a chat template, this tokenizer has none", "the same", [{"note": note}])
    if not before:
        raise NotApplicable("the tokenizer has no chat template")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        written = sorted(p.name for p in Path(folder).iterdir())
        try:
            loaded = load_again(tokenizer, folder)
        except Exception as error:
            raise NotRun(f"the saved tokenizer cannot be loaded: {first_line(error)}") from None
    after = loaded.chat_template
    if after != before:
        note = f"{len(after or '')} characters after, {len(before)} before; files: {', '.join(written)}"
        what = "has another chat template" if after else "has no chat template"
        return failed(f"the saved tokenizer {what}", "the same template", [{"note": note}])
    rendered = 0
    for messages in CONVERSATIONS:
        text, again = (_render(t, messages) for t in (tokenizer, loaded))
        if text != again:
            evidence = [{"text": str(again)[:200], "note": "as rendered after a reload"}]
            return failed("a conversation is rendered otherwise after a reload", "the same bytes", evidence)
        rendered += text is not None
    measured = f"template of {len(before)} characters and {rendered} rendered conversations are the same after a reload"
    if theirs and theirs != before:
        note = f"{len(before)} characters here, {len(theirs)} in the reference"
        fix = "Prompt the model with the template that it was trained on."
        return warned(f"{measured}, but not the reference's", "the same template", [{"note": note}], fix)
    return passed(measured, "the same bytes")


def _render(tokenizer: Any, messages: list[dict[str, Any]]) -> str | None:
    """None where the template refuses such a conversation."""
    try:
        return tokenizer.apply_chat_template(copy.deepcopy(messages), tokenize=False)
    except Exception:
        return None
