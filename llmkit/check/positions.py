"""Positions: how many a model has, and whether its rotary frequencies are those of its configuration.

Owns reading rotary modules and `rope_parameters`. Checks of family `settings`. Nothing is run but constructors.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .forward import bare, text_config
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject

DEFAULT_LENGTH = 1024  # TRL's max_length where nobody sets one
HALVES = {torch.bfloat16: 7, torch.float16: 10}  # bits of the mantissa


@contextlib.contextmanager
def some_model(subject: Subject) -> Iterator[Any]:
    """The live model of whatever size, to be looked at only; else one built from the configuration, made small."""
    subject.need("model")
    if subject.model is not None:
        yield bare(subject.model)
        return
    with subject.small_model(draw=False) as model:
        yield bare(model)


@check("length-beyond-positions", family="settings", tier=0, catalogue="K7")
def length_beyond_positions(subject: Subject) -> Outcome:
    """Rows are cut at a length for which the model has no positions.

    Symptom: an index error in the middle of a run, or garbage for everything after the last trained position.
    Example: max_length 2048 for a GPT-2 of 1024 positions.
    Detected: `max_length` and the longest known row against `max_position_embeddings`, by the kind of positions.
    Tolerance: learned positions: fail where a row is longer, or where no row is known. Else a warning.
    Spares: models with RoPE scaling, ALiBi or no positions; TRL's default of 1024 where no row is that long.
    Fix: lower max_length to max_position_embeddings, or set rope_parameters that extend it.
    Sources: unsloth#7028, Soup#793.
    """
    subject.need("config", "settings")
    config = text_config(subject)
    if "max_length" not in subject.settings:
        raise NotApplicable("no max_length among the settings")
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        raise NotApplicable("the model has no limit of positions")
    with some_model(subject) as model:
        is_learned = _has_learned_positions(model, positions)
        is_rotary = any(True for _ in rotary_modules(model))
    if not is_learned and not is_rotary:
        raise NotApplicable("the model has neither learned nor rotary positions")
    if is_rotary and not is_learned and rope_types(config) - {"default"}:
        return passed(f"positions are scaled ({', '.join(sorted(rope_types(config)))})", f"{positions} unscaled")
    wanted = subject.settings["max_length"]
    rows = [len(row["input_ids"]) for row in subject.rows if hasattr(row.get("input_ids"), "__len__")]
    rows = [min(n, wanted or n) for n in rows]  # where the collator cuts them (older TRL)
    longest = max(rows, default=None)
    kind = "learned" if is_learned else "rotary, unscaled"
    limit = f"{positions} positions ({kind})"
    if longest is not None and longest > positions:
        where = rows.index(longest)
        evidence = [{"row": where, "note": f"{longest} tokens"}]
        return (failed if is_learned else warned)(f"row {where} has {longest} tokens", limit, evidence)
    if wanted is None or wanted <= positions:
        return passed(f"max_length {wanted}, longest row {longest if longest is not None else 'unknown'}", limit)
    if longest is None:
        return (failed if is_learned else warned)(f"max_length is {wanted}", limit)
    if wanted == DEFAULT_LENGTH:
        return passed(f"max_length {wanted} (the default), the longest row has {longest} tokens", limit)
    return warned(f"max_length is {wanted}, the longest row so far has {longest} tokens", limit)


def _has_learned_positions(model: nn.Module, positions: int) -> bool:
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return any(
        isinstance(module, nn.Embedding) and module is not words and 0 <= module.num_embeddings - positions <= 2
        for name, module in model.named_modules()
        if "pos" in name or "wpe" in name
    )


def rotary_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(b.endswith("inv_freq") for b, _ in module.named_buffers(recurse=False)):
            yield name, module


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """`rope_parameters`, one per kind of layer where they differ."""
    given = getattr(config, "rope_parameters", None) or {}
    if not isinstance(given, dict):
        return []
    inner = [v for v in given.values() if isinstance(v, dict) and ("rope_theta" in v or "rope_type" in v)]
    return inner or ([given] if given else [])


def rope_types(config: Any) -> set[str]:
    return {str(p.get("rope_type") or "default") for p in rope_settings(config)}


@check("rope-setting-ignored", family="settings", tier=0, catalogue="K7")
def rope_setting_ignored(subject: Subject) -> Outcome:
    """The rotary frequencies in the model are not those of its configuration.

    Symptom: good short texts, garbage beyond the old context; a changed setting changes nothing at all.
    Example: `model.config.rope_parameters = ...` after loading; a class that always uses theta 10000.
    Detected: every rotary module against one that its class builds from the configuration now; and one from a theta
        ten times as large, or without scaling, must differ.
    Tolerance: 1e-5 of a frequency. In half precision: a warning where the phase is off by 0.01 at the last position.
    Spares: layers without positions, partial rotation, a theta per kind of layer, frequencies that grow with the
        input (their original ones are compared), modules that are not built from a configuration.
    Fix: set rope_parameters before the model is built, or reload it; keep inv_freq in float32.
    Sources: unsloth#7028, Soup#793, mlx-vlm#1710, SpecForge#742, transformers#29285.
    """
    subject.need("model")
    found, checked = [], 0
    with some_model(subject) as model:
        config = text_config(model)
        modules = list(rotary_modules(model))
        if not modules:
            raise NotApplicable("no module holds rotary frequencies")
        for name, module in modules:
            own = getattr(module, "config", None)
            given = config if type(own) is type(config) or own is None else own
            expected = _rebuilt(module, given)
            if expected is None:
                continue
            checked += 1
            found += [(*fault, name) for fault in _frequency_faults(module, expected, given)]
    if not checked:
        raise NotRun("no rotary module could be built anew from the configuration")
    limit = "frequencies as the configuration says, in float32"
    kinds = ", ".join(sorted(rope_types(config))) or "default"
    if not found:
        return passed(f"{checked} rotary modules follow the configuration ({kinds})", limit)
    evidence = [{"note": f"{name}: {what}"} for _, what, name in found[:5]]
    worst = next((f for f in found if f[0] == "fail"), found[0])
    return (failed if worst[0] == "fail" else warned)(worst[1], limit, evidence)


def _rebuilt(module: nn.Module, config: Any) -> nn.Module | None:
    """A module of the same class from this configuration; None where it is not built from one alone."""
    try:
        return type(module)(config=copy.deepcopy(config))
    except Exception:
        return None


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    """By buffer name; the original ones where a forward may replace them. Attention scaling as well."""
    buffers = dict(module.named_buffers(recurse=False))
    values = {k: v for k, v in buffers.items() if k.endswith("inv_freq") and "original" not in k and "long" not in k}
    kind = getattr(module, "rope_type", None)
    for name in values:
        own_kind = str(kind.get(name.removesuffix("_inv_freq")) if isinstance(kind, dict) else kind)
        original = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
        if isinstance(original, Tensor) and ("dynamic" in own_kind or own_kind == "longrope"):
            values[name] = original
    scales = {k: torch.tensor(float(v)) for k, v in vars(module).items() if k.endswith("attention_scaling")}
    return values | scales


def _frequency_faults(module: nn.Module, expected: nn.Module, config: Any) -> list[tuple[str, str]]:
    live, due, faults = _frequencies(module), _frequencies(expected), []
    for name, wanted in due.items():
        value = live.get(name)
        if value is None or value.device.type == "meta" or wanted.shape != value.shape:
            if value is None or value.device.type != "meta":
                faults.append(("fail", f"{name} has another size than the configuration gives"))
            continue
        gap = (value.cpu().double() - wanted.cpu().double()).abs()
        relative = float((gap / wanted.cpu().double().abs().clamp(min=1e-30)).max())
        if value.dtype in HALVES and relative < 0.01:
            phase = float(gap.max()) * int(getattr(config, "max_position_embeddings", 1) or 1)
            if phase > 0.01:
                faults.append(
                    ("warn", f"{name} is in {str(value.dtype)[6:]}: {phase:.2g} rad off at the last position")
                )
        elif not relative <= 1e-5:
            faults.append(("fail", f"{name} is off by {relative:.1%} from what the configuration gives"))
    return faults or _ignored_settings(module, due, config)


def _ignored_settings(module: nn.Module, due: dict[str, Tensor], config: Any) -> list[tuple[str, str]]:
    """A larger theta, or no scaling, must make other frequencies."""
    if not rope_settings(config) or all(value.numel() <= 1 for value in due.values()):
        return []  # a single frequency is 1 under every theta
    faults = []
    other = copy.deepcopy(config)
    for parameters in rope_settings(other):
        if isinstance(parameters.get("rope_theta"), (int, float)):
            parameters["rope_theta"] = float(parameters["rope_theta"]) * 10
    if hasattr(other, "rope_theta"):
        other.rope_theta = float(other.rope_theta or 10_000.0) * 10
    if any("rope_theta" in p for p in rope_settings(config)) and _is_same(_rebuilt(module, other), due):
        faults.append(("fail", "another rope_theta makes the same frequencies: it is ignored"))
    if rope_types(config) - {"default"}:
        plain = copy.deepcopy(config)
        for parameters in rope_settings(plain):
            theta = {k: v for k, v in parameters.items() if k in ("rope_theta", "partial_rotary_factor")}
            parameters.clear()
            parameters.update(theta, rope_type="default")
        if _is_same(_rebuilt(module, plain), due) and not _is_neutral(config):
            kinds = ", ".join(sorted(rope_types(config) - {"default"}))
            faults.append(("fail", f"frequencies are those without scaling: {kinds} is ignored"))
    return faults


def _is_neutral(config: Any) -> bool:
    """Scaling by one, or only beyond the trained length, leaves the frequencies as they are."""
    return all(
        p.get("rope_type") in ("default", "dynamic", "proportional", None) or float(p.get("factor") or 1.0) == 1.0
        for p in rope_settings(config)
    )


def _is_same(module: nn.Module | None, due: dict[str, Tensor]) -> bool:
    if module is None:
        return False
    other = _frequencies(module)
    return all(k in other and other[k].shape == v.shape and torch.allclose(other[k], v) for k, v in due.items())
