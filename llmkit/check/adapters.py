"""Adapters: what is trained is saved, comes back, and has its place in the model.

Owns `adapter-lost` (a live adapter, family `saving`) and `adapter-does-not-fit` (files, family `weights`). Leaves out
whether it gets a gradient (`trainer.py`).
"""

import copy
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..config import UserError
from .forward import bare, draw_ids, logits_of
from .measure import difference, need_alive
from .runner import Outcome, check, failed, first_line, passed, warned
from .stored import Stored, weight_files
from .subject import NotApplicable, NotRun, Subject, redraw_

MOVES, SAME = 1e-4, 1e-5  # of the logits' deviation: an adapter that does something, two that are the same
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE", "ADAPTION_PROMPT")


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V) without the virtual tokens of a prompt."""
    return logits_of(model, ids)[:, -ids.shape[1] :]


@check("adapter-lost", family="saving", tier=2, catalogue="K28")
def adapter_lost(subject: Subject) -> Outcome:
    """A saved adapter comes back as nothing, or as another one.

    Symptom: the loaded model answers exactly like the base; new tokens are noise after a reload.
    Example: an adapter whose keys do not match on load; trained embedding rows that are not in the file; a second
        adapter whose targets match no module.
    Detected: with every adapter weight drawn at random (B too), the adapter is saved (by the trainer where there is
        one), all that is trained is changed, and the files are loaded onto a copy of the base: logits must be those
        of before and not those of the base.
    Tolerance: 1e-5 of the logits' deviation.
    Spares: models without adapter; adapters that were never trained, since their weights are drawn here; PiSSA and its
        like, which change the base.
    Fix: look at the keys in adapter_model.safetensors; name modules that were trained in `modules_to_save`, rows of
        new tokens in `trainable_token_indices`.
    Sources: peft#1323, #1932, #2118, #2699, #2772, #1300, #2898, #3533.
    """
    subject.need("model")
    if not hasattr(subject.model, "peft_config"):
        raise NotApplicable("no adapter is trained")
    from .saving import save

    config = subject.model.peft_config[_active(subject.model)]
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal", "eva"):
        raise NotApplicable(f"init_lora_weights={start!r} changes the base: what is saved must be converted")
    with subject.small_model(draw=False) as model, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        active = _active(model)
        _redraw(model, active)
        for wrapped in (model, bare(model)):  # TRL's forward is closed over this very model, accelerate's rounds
            vars(wrapped).pop("forward", None)
        names = [name for name, _ in model.named_parameters()]
        targeted = [
            a for a, c in model.peft_config.items() if str(getattr(c.peft_type, "value", c.peft_type)) not in PROMPTS
        ]
        if empty := [a for a in targeted if not any(f".{a}." in f"{name}." for name in names)]:
            targets = getattr(model.peft_config[empty[0]], "target_modules", None)
            note = f"adapter {empty[0]!r} has no parameter; target_modules {targets}"
            return failed(f"{len(empty)} of {len(model.peft_config)} adapters are empty", "0", [{"note": note}])
        ids = _with_trained_tokens(draw_ids(model, 2, 12), config)
        adapted = _logits(model, ids)
        scale = need_alive(adapted)
        with model.disable_adapter():
            base = _logits(model, ids)
        if (effect := difference(adapted, base, scale)) <= MOVES:
            note = f"target_modules {getattr(config, 'target_modules', None)}"
            return failed(f"the adapter moves logits by {effect:.1e}: it sits on nothing", "", [{"note": note}])
        try:
            save(subject, model, Path(folder))
        except Exception as error:
            return failed("the adapter cannot be saved", "", [{"note": first_line(error)}])
        place = Path(folder) if active == "default" else Path(folder) / active
        if not (place / "adapter_config.json").is_file():
            raise NotRun("no adapter_config.json is written: the trainer saves something else, or a merged model")
        files = sorted(place.glob("adapter_model*.safetensors"))
        if not any(Stored(place, files).shapes):
            return failed(
                "no adapter weights are written", "", [{"note": str(sorted(p.name for p in place.iterdir()))}]
            )
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.5)  # what is loaded must not depend on what is still here
        try:
            loaded = _reload(model, place)
        except Exception as error:
            return failed("the saved adapter cannot be loaded", "", [{"note": first_line(error)}])
        moved = difference(adapted, _logits(loaded, ids), scale)
        homes = {name: _home(name, _modules(subject)) for name in Stored(place, files).shapes} if moved > SAME else {}
        unexpected = [name for name, home in homes.items() if home is None]
    measured = f"logits move by {moved:.1e} of their deviation after a reload, by {effect:.1e} without the adapter"
    if moved > SAME:
        evidence = [{"note": f"keys that found no place: {', '.join(unexpected[:3])}"}] if unexpected else []
        evidence += [{"note": "trained tensors outside the adapter file count too: modules_to_save, token rows"}]
        return failed(measured, f"{SAME:.0e}", evidence)
    return passed(measured, f"{SAME:.0e}")


def _active(model: Any) -> str:
    return model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]


def _redraw(model: Any, active: str) -> None:
    """All weights; what an adapter only counts in parameters (AdaLoRA's ranks) stays."""
    kept = {p: p.data.float() for n, p in model.named_parameters() if f".{active}" in n and not p.requires_grad}
    redraw_(model)
    for p, data in kept.items():
        p.data = data.clone()


def _with_trained_tokens(ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows that hold the tokens of which an adapter trains the rows."""
    tokens = getattr(config, "token_indices", None) or getattr(config, "trainable_token_indices", None) or []
    tokens = next(iter(tokens.values()), []) if isinstance(tokens, dict) else tokens
    for place, token in enumerate(list(tokens)[:6]):
        ids[:, place] = token
    return ids


def _reload(model: Any, place: Path) -> Any:
    """The saved adapter on a copy of the base, whose weights that the adapter trains are others by now."""
    copied = copy.deepcopy(model)
    base = copied.unload() if hasattr(copied.base_model, "unload") else copied.get_base_model()
    loaded = type(model).from_pretrained(base, str(place))
    return loaded.eval()


@check("adapter-does-not-fit", family="weights", tier=3, catalogue="K34")
def adapter_does_not_fit(subject: Subject) -> Outcome:
    """The adapter's tensors have no place in this model, are missing, or were never trained.

    Symptom: the model with its adapter answers like the base.
    Example: keys renamed by a wrapper; an adapter of another base; a save that left layers out; matrices B all zero.
    Detected: every key of adapter_model.safetensors must name a module of the model, with fitting shapes; every module
        that adapter_config.json names must have its tensors; the values are read.
    Tolerance: none.
    Spares: prompts, which belong to no module. An adapter that was saved before the first step has zero B, and a base
        with other weights than the one it was trained on: warnings.
    Fix: load the adapter on the base that its adapter_config.json names; save it with PEFT's save_pretrained.
    Sources: peft#1323, #3533, #2772, trl#4416.
    """
    if subject.adapter is None:
        raise NotApplicable("no adapter folder given")
    subject.need("model")
    config = json.loads((subject.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") in PROMPTS:
        raise NotApplicable(f"{config['peft_type']} belongs to no module")
    files = sorted(subject.adapter.glob("adapter_model*.safetensors"))
    if not files:
        raise NotRun("the adapter folder holds no adapter_model.safetensors")
    stored, modules = Stored(subject.adapter, files), _modules(subject)
    homes = {name: _home(name, modules) for name in stored.shapes}
    homeless = [name for name, home in homes.items() if home is None]
    misfits = [
        f"{name} {list(stored.shapes[name])} in {home}"
        for name, home in homes.items()
        if home is not None and not _fits(name, stored.shapes[name], modules.get(home, {}))
    ]
    incomplete = _incomplete(config, modules, {home for home in homes.values() if home}, set(stored.shapes))
    sizes = {name: _largest(stored, name) for name in stored.shapes}
    broken = [name for name, size in sizes.items() if not size < float("inf")]
    found = {
        "no module for": homeless,
        "does not fit:": misfits,
        "no tensors for": incomplete,
        "not finite:": broken,
    }
    evidence = [
        {"note": f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"}
        for what, names in found.items()
        if names
    ]
    text = (
        f"{len(stored.shapes)} tensors, {len(homeless)} without a module, {len(misfits)} of another shape, "
        f"{len(broken)} not finite; {len(incomplete)} modules without a tensor"
    )
    if evidence or not stored.shapes:
        return failed(text, "0", evidence or [{"note": "the adapter is empty"}])
    second = [size for name, size in sizes.items() if re.search(r"lora_(embedding_)?B\b", name)]
    if second and not any(second):
        note = "every matrix B is zero: this adapter changes nothing, it was never trained"
        return warned(text, "0", [{"note": note}])
    if (other := _another_base(subject, config)) is not None:
        return warned(text, "0", [{"note": other}])
    return passed(text, "0")


def _modules(subject: Subject) -> dict[str, dict[str, tuple[int, ...]]]:
    """{path of a module that has parameters of its own: {parameter: shape}} of the base."""
    if subject.make_model is None:
        base = bare(subject.model)
    else:
        with torch.device("meta"):
            base = subject.make_model(copy.deepcopy(subject.config))
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, p in base.named_parameters():
        path, _, last = name.replace(".base_layer.", ".").rpartition(".")
        found.setdefault(path, {})[last] = tuple(p.shape)
    head = getattr(base, "get_output_embeddings", lambda: None)()
    for name, module in base.named_modules():  # a tied head is no parameter of its own
        if module is head and name and isinstance(getattr(head, "weight", None), torch.Tensor):
            found.setdefault(name, {"weight": tuple(head.weight.shape)})
    return found


def _home(key: str, modules: dict[str, Any]) -> str | None:
    """The module that a key of an adapter file belongs to, the longest path it begins with; empty: the whole model."""
    if key.startswith("base_model.") and not key.startswith("base_model.model."):
        return ""
    parts = key.removeprefix("base_model.model.").replace(".modules_to_save.", ".").split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((path for path in paths if path in modules), None)


def _fits(key: str, shape: tuple[int, ...], parameters: dict[str, tuple[int, ...]]) -> bool:
    weight = parameters.get("weight")
    if weight is None or len(weight) != 2 or not torch.Size(shape).numel():
        return bool(torch.Size(shape).numel())
    if re.search(r"lora_A\b", key):
        return shape[-1] in weight
    if re.search(r"lora_B\b", key):
        return shape[0] in weight
    return True


def _incomplete(config: dict[str, Any], modules: dict[str, Any], homes: set[str], keys: set[str]) -> list[str]:
    """Modules that the config names and that have no tensor, or A without B."""
    alone = [key for key in keys if re.sub(r"lora_A\b", "lora_B", key) not in keys]

    def named(words: Any) -> list[str]:
        words = [w for w in words or () if isinstance(words, list)]
        return [path for path in modules if any(path == w or path.endswith(f".{w}") for w in words)]

    wanted = named(config.get("modules_to_save"))
    chooses = ("layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication")
    if not any(config.get(key) for key in chooses):
        wanted += named(config.get("target_modules"))
    return [*alone, *(path for path in dict.fromkeys(wanted) if path not in homes)]


def _largest(stored: Stored, name: str) -> float:
    """Of the absolute values; infinite for NaN."""
    found = 0.0
    for _, rows in stored.slices(name):
        value = float(rows.float().abs().max()) if rows.numel() else 0.0
        found = max(found, value if value == value else float("inf"))
    return found


def _another_base(subject: Subject, config: dict[str, Any]) -> str | None:
    """What is wrong where the folder that adapter_config.json names is here, and holds other weights."""
    named = config.get("base_model_name_or_path")
    if not named or subject.folder is None or not Path(named).is_dir() or Path(named).samefile(subject.folder):
        return None
    try:
        if not weight_files(Path(named)):
            return None
        a, b = Stored(subject.folder), Stored(Path(named))
    except UserError:
        return None
    for name in a.shapes:
        if name in b.shapes and len(a.shapes[name]) == 2:
            (_, x), (_, y) = next(a.slices(name)), next(b.slices(name))
            if x.shape != y.shape or (x.float() - y.float()).norm() > 0.01 * y.float().norm():
                return f"it was trained on {named}, whose {name} has other values"
            return None
    return None
