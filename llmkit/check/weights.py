"""Stored weights, tensor by tensor: what is missing, dead, not finite, or no longer what it was made from.

Owns the tier-3 checks of a folder, which read it in slices (`stored.py`). Leaves out any forward pass, and adapters
(`adapters.py`).
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import adapters  # noqa: F401  # a check of this family
from .forward import bare
from .runner import Outcome, check, failed, first_line, passed, warned
from .stored import Stored, weight_files
from .subject import NotApplicable, NotRun, Subject

LARGEST_LOAD = 400_000_000  # parameters up to which the weights themselves are loaded where accelerate is missing
DEAD = 1e-3  # of the median norm of the rows
REPLACED = 0.5  # of a row's norm: more than training moves it
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "embeddings.weight",
    "tok_embeddings.weight", "embedding.weight",
)  # fmt: skip
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "head.weight")


def _stored(subject: Subject) -> Stored:
    if subject.folder is None or not weight_files(subject.folder):
        raise NotApplicable("no folder with stored weights given")
    folder = subject.folder
    return subject.once("stored", lambda: Stored(folder))


def _matrices(stored: Stored) -> dict[str, str]:
    """Names of embedding and head: matrices with a row per id."""
    embedding = stored.find(*EMBEDDINGS)
    if embedding is None or len(stored.shapes[embedding]) != 2:
        return {}
    head = stored.find(*HEADS)
    if head is None or stored.shapes[head] != stored.shapes[embedding]:
        return {"embedding": embedding}
    return {"embedding": embedding, "head": head}


# control tokens

CHAT = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


def control_tokens(tokenizer: Any) -> tuple[dict[int, str], dict[int, str]]:
    """id -> token of what a plain conversation, BOS and EOS need; and of what else the template may write."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = {str(t) for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    text = "".join(_render(tokenizer, messages) for messages in (CHAT, CHAT[1:])) if template else ""
    needed = {t for t in known if t in text}
    started = tokenizer("a")["input_ids"]
    needed |= {t for t in known if tokenizer.convert_tokens_to_ids(t) in started}
    if tokenizer.eos_token:
        needed.add(tokenizer.eos_token)
    others = {t for t in known if t in template} - needed

    def ids(tokens: set[str]) -> dict[int, str]:
        found = {tokenizer.convert_tokens_to_ids(t): t for t in sorted(tokens)}
        pad = None if tokenizer.pad_token in needed else tokenizer.pad_token_id
        return {i: t for i, t in found.items() if isinstance(i, int) and i != pad}

    return ids(needed), ids(others)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Empty where the template refuses such a conversation (a system message, say)."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:
        return ""


@check("untrained-token-rows", family="weights", tier=3, catalogue="K34")
def untrained_token_rows(subject: Subject) -> Outcome:
    """The template uses tokens whose rows nobody has ever trained.

    Symptom: the model never ends its turn, although every row of the data does; it works after full fine-tuning only.
    Example: a base model with reserved tokens, its chat model's template, LoRA on the attention.
    Detected: the norm of each control token's row in embedding and head, against the median; rows that equal the
        rows of other tokens bit for bit.
    Tolerance: 1/1000 of the median norm.
    Spares: the pad row; weights drawn at random. A warning where a trainer trains these rows, and for tokens that a
        plain conversation does not need (of tools).
    Fix: train these rows (`modules_to_save=["embed_tokens", "lm_head"]`, `trainable_token_indices`), or use tokens that
        were trained.
    Sources: torchtune#2429, unsloth#915, OpenRLHF#648, llama3#77, axolotl#1666.
    """
    subject.need("tokenizer")
    stored = _stored(subject)
    needed, others = control_tokens(subject.tokenizer)
    if not needed:
        raise NotApplicable("template and tokenizer use no control token")
    matrices = _matrices(stored)
    if not matrices:
        raise NotRun("no embedding found among the stored tensors")
    bad: dict[bool, list[dict[str, Any]]] = {True: [], False: []}  # by: a plain conversation needs it
    median = 0.0
    for kind, name in matrices.items():
        norm, key = _rows(stored, name)
        median = float(norm.median())
        for token_id, token in {**others, **needed}.items():
            if token_id >= len(norm):
                continue
            twins = int((key == key[token_id]).sum()) - 1
            note = ""
            if kind == "embedding" and norm[token_id] == 0 and token_id == _padding_id(subject):
                continue  # nothing trains the row of a padding_idx, and nothing needs to
            if norm[token_id] < DEAD * median:
                note = f"{name}: row of {token} has norm {float(norm[token_id]):.1e}"
            elif twins:
                note = f"{name}: row of {token} equals the rows of {twins} other tokens"
            if note:
                bad[token_id in needed].append({"ids": [token_id], "note": note})
    limit = f"{DEAD:g} of the median norm {median:.3g}, like no other row"
    evidence = bad[True] + bad[False]
    if not evidence:
        return passed(f"rows of {len(needed) + len(others)} control tokens are alive", limit)
    text = f"{len(evidence)} rows of control tokens were never trained"
    is_spared = not bad[True] or _trains_embeddings(subject)
    return warned(text, limit, evidence) if is_spared else failed(text, limit, evidence)


def _padding_id(subject: Subject) -> int | None:
    given = getattr(subject.config, "pad_token_id", None)
    return given if given is not None else subject.tokenizer.pad_token_id


def _rows(stored: Stored, name: str) -> tuple[Tensor, Tensor]:
    """(V,) norms of the rows, and (V,) a number that equal rows share."""
    norms, keys = [], []
    for _, rows in stored.slices(name):
        if not rows.dtype.is_floating_point:
            raise NotRun(f"{name} is stored as {rows.dtype}: its rows cannot be read as they are")
        values, factors = rows.float(), torch.arange(1, rows.shape[1] + 1, dtype=torch.float64).sqrt()
        norms.append(values.norm(dim=1))
        keys.append((values.double() * factors).sum(1))
    return torch.cat(norms), torch.cat(keys)


def _trains_embeddings(subject: Subject) -> bool:
    if subject.model is None or subject.training is None:
        return False
    return any(p.requires_grad for p in bare(subject.model).get_input_embeddings().parameters())


# what the class needs


@check("weights-missing", family="weights", tier=3, catalogue="K34")
def weights_missing(subject: Subject) -> Outcome:
    """Tensors that the class needs are not in the files, and are drawn at random on load.

    Symptom: a warning that scrolls by, then a model that is subtly or completely broken.
    Example: keys with a prefix that nobody strips; a tied head that was not stored while the config says untied.
    Detected: what from_pretrained on the meta device reports as missing, unexpected or of another shape, so names
        that transformers converts (fused experts) are converted; without accelerate, the weights are loaded, or, where
        they are too many, names and shapes compared.
    Tolerance: none.
    Spares: tied keys, both copies of a tied pair, buffers, and names that the class declares as ignorable; unexpected
        tensors are a warning.
    Fix: rename the keys to what the class expects, or set tie_word_embeddings to what was saved.
    Sources: train-llm-from-scratch#37, transformers#43429, nanoGPT#325.
    """
    stored = _stored(subject)
    if subject.make_model is None:
        raise NotApplicable("the class is not known")
    if getattr(subject.config, "quantization_config", None) is not None:
        raise NotApplicable("quantised weights have names of their own")
    missing, unexpected, mismatched = _loading_info(subject, stored)
    found = {"missing": missing, "of another shape": mismatched, "unexpected": unexpected}
    evidence = [
        {"note": f"{what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"}
        for what, names in found.items()
        if names
    ]
    text = f"{len(missing)} tensors missing, {len(mismatched)} of another shape, {len(unexpected)} unexpected"
    if missing or mismatched:
        return failed(text, "0", evidence)
    return warned(text, "0", evidence) if unexpected else passed(text, "0")


Names = tuple[list[str], list[str], list[str]]


def _loading_info(subject: Subject, stored: Stored) -> Names:
    """Names that are missing, unexpected, and of another shape."""
    is_small = sum(torch.Size(shape).numel() for shape in stored.shapes.values()) <= LARGEST_LOAD
    try:
        import accelerate  # noqa: F401  # which transformers asks for with a device_map

        return _load(subject, device_map="meta")
    except (ImportError, NotImplementedError):  # 5.9 compares both copies of a tied pair, which the meta device cannot
        return _load(subject) if is_small else _by_names(subject, stored)


def _load(subject: Subject, **options: Any) -> Names:
    from transformers import AutoModelForCausalLM

    options |= {"trust_remote_code": subject.trust_remote_code, "output_loading_info": True}
    try:
        info = AutoModelForCausalLM.from_pretrained(subject.folder, ignore_mismatched_sizes=True, **options)[1]
    except NotImplementedError:
        raise
    except Exception as error:
        raise NotRun(f"from_pretrained raises {first_line(error)}") from None
    mismatched = sorted(str(m[0] if isinstance(m, (tuple, list)) else m) for m in info["mismatched_keys"])
    return sorted(map(str, info["missing_keys"])), sorted(map(str, info["unexpected_keys"])), mismatched


def _by_names(subject: Subject, stored: Stored) -> Names:
    assert subject.make_model is not None
    with torch.device("meta"):
        model: Any = subject.make_model(copy.deepcopy(subject.config))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    missing = sorted(
        set(wanted) - set(stored.shapes) - (tied if getattr(subject.config, "tie_word_embeddings", False) else set())
    )
    if len(missing) > len(wanted) // 2:
        raise NotRun("the stored names are converted on load: install accelerate to see what is missing")
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unexpected = sorted(n for n in set(stored.shapes) - set(wanted) if not any(p.search(n) for p in ignored))
    return missing, unexpected, sorted(n for n in wanted.keys() & stored.shapes.keys() if wanted[n] != stored.shapes[n])


# what is in them


@dataclass
class Values:
    """Of one stored tensor of floating point."""

    lowest: float
    highest: float
    num_wrong: int = 0  # not finite
    first_wrong: int = 0  # row


def _values(subject: Subject, stored: Stored) -> dict[str, Values | None]:
    """Read once for all checks; None for integers and for tensors without numbers."""
    return subject.once("values", lambda: {name: _read(stored, name) for name in stored.shapes})


def _read(stored: Stored, name: str) -> Values | None:
    found: Values | None = None
    if not torch.Size(stored.shapes[name]).numel():
        return None
    for first, rows in stored.slices(name):
        if not rows.dtype.is_floating_point:
            return None
        values = rows.float() if rows.dtype.itemsize < 2 else rows
        finite = torch.isfinite(values)
        lowest, highest = (float(x) for x in torch.aminmax(values.nan_to_num(0, 0, 0)))
        found = found or Values(lowest, highest)
        found.lowest, found.highest = min(lowest, found.lowest), max(highest, found.highest)
        if not finite.all():
            if not found.num_wrong:
                found.first_wrong = first + (int((~finite).flatten(1).any(1).nonzero()[0]) if values.ndim > 1 else 0)
            found.num_wrong += int((~finite).sum())
    return found


@check("weights-not-finite", family="weights", tier=3, catalogue="K34")
def weights_not_finite(subject: Subject) -> Outcome:
    """A stored tensor holds NaN or infinity, or no number at all.

    Symptom: NaN in the first forward pass, or an error about shapes on load.
    Example: a save in fp16 of values above 65504; a sharded save that left a tensor empty.
    Detected: every stored tensor, slice by slice.
    Tolerance: none.
    Spares: integer tensors of quantised models.
    Fix: save in bfloat16 or float32; convert that tensor again; gather sharded parameters before saving.
    Sources: transformers#5651, trl#4416.
    """
    stored = _stored(subject)
    bad = [
        {"row": v.first_wrong, "note": f"{name}: {v.num_wrong} values are not finite"}
        for name, v in _values(subject, stored).items()
        if v is not None and v.num_wrong
    ]
    empty = [n for n, shape in stored.shapes.items() if not torch.Size(shape).numel()]
    bad += [{"note": f"{name}: holds no number, shape {list(stored.shapes[name])}"} for name in empty]
    text = f"{len(stored.shapes)} tensors read, {len(bad)} not finite or empty"
    return failed(text, "0", bad) if bad else passed(text, "0")


@check("weights-zero-or-constant", family="weights", tier=3, catalogue="K34")
def weights_zero_or_constant(subject: Subject) -> Outcome:
    """A stored tensor is one number throughout, where the class would not have it so.

    Symptom: a layer that does nothing; a model that is worse than its size.
    Example: a conversion that left a tensor as it was allocated; a norm whose weights are all zero.
    Detected: lowest and highest value of every stored tensor, against the tensor of that name in a fresh small model.
    Tolerance: none; always a warning, since training may leave such a tensor.
    Spares: whatever a fresh model has too: norms of one, biases of zero, output projections that start at zero;
        tensors of fewer than 8 numbers.
    Fix: convert that tensor again, or look at whether anything trains it.
    Sources: trl#4416.
    """
    stored = _stored(subject)
    constant = {
        name: v.lowest
        for name, v in _values(subject, stored).items()
        if v is not None and v.lowest == v.highest and torch.Size(stored.shapes[name]).numel() >= 8 and not v.num_wrong
    }
    fresh = _fresh_constants(subject) if constant else {}
    dead = {name: v for name, v in constant.items() if v not in fresh.get(_kind(name), set())}
    text = f"{len(stored.shapes)} tensors read, {len(constant)} constant, {len(dead)} of them not so in a fresh model"
    evidence = [{"note": f"{name}: all {value:g}"} for name, value in list(dead.items())[:6]]
    return warned(text, "0", evidence) if dead else passed(text, "0")


def _kind(name: str) -> str:
    """A tensor's name from behind the number of its layer; its last two words where it belongs to none."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 3)
    return ".".join(parts[last + 1 :])


def _fresh_constants(subject: Subject) -> dict[str, set[float]]:
    """Kind of name -> the numbers of which a fresh model has whole tensors."""
    if not subject.can_build():
        return {}
    found: dict[str, set[float]] = {}
    fresh = Subject("fresh", config=subject.config, make_model=subject.make_model)  # never the live weights
    with fresh.small_model(draw=False) as model:
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.numel() and value.min() == value.max():
                found.setdefault(_kind(name), set()).add(float(value.min()))
    return found


# against what it was made from


@check("rows-differ-from-reference", family="weights", tier=3, catalogue="K34")
def rows_differ_from_reference(subject: Subject) -> Outcome:
    """Rows of the embedding are no longer those of the folder that this one was made from.

    Symptom: after adding tokens, merging or exporting, old tokens mean something else.
    Example: a resize to the tokenizer's length that cuts trained rows; an init that writes the wrong rows.
    Detected: embedding and head against --reference, row by row; and which other tensors have changed.
    Tolerance: equal bit for bit in the same dtype; 1 % of a row's norm where the dtype changed. Where other tensors
        have changed too, as after training, only rows that moved by half of their norm count, and are a warning.
    Spares: rows that were added; models that were trained since.
    Fix: resize with `resize_token_embeddings(max(rows, len(tokenizer)))`, and initialise the new rows only.
    Sources: unsloth-zoo#923, LlamaFactory#10547.
    """
    stored = _stored(subject)
    if subject.reference is None:
        raise NotApplicable("no reference given")
    reference = Stored(subject.reference)
    theirs = _matrices(reference)
    pairs = [(name, theirs[kind]) for kind, name in _matrices(stored).items() if kind in theirs]
    if not pairs:
        raise NotRun("no embedding found in both folders")
    num_others, changed_others = _other_changes(stored, reference, {n for pair in pairs for n in pair})
    is_trained = bool(changed_others)
    cut: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    compared = 0
    for mine, other in pairs:
        a, b = stored.shapes[mine], reference.shapes[other]
        if a[1:] != b[1:]:
            raise NotRun(f"{mine} has rows of {a[1]} numbers, the reference's {b[1]}: another model")
        if a[0] < b[0]:
            cut.append({"note": f"{mine}: {a[0]} rows, the reference has {b[0]}"})
        loose = REPLACED if is_trained else 0.01 if stored.dtypes[mine] != reference.dtypes[other] else 0.0
        changed: list[int] = []
        for (first, x), (_, y) in zip(stored.slices(mine), reference.slices(other), strict=False):
            count = min(len(x), len(y))
            x, y = x[:count].float(), y[:count].float()
            compared += count
            size = y.norm(dim=1)
            if is_trained:  # a row that nobody had trained may move as far as the others are long
                size = size.clamp_min(float(size.median()))
            wrong = (x - y).norm(dim=1) > loose * size
            changed += (first + wrong.nonzero().flatten()).tolist()
        if changed:
            note = f"{mine}: {len(changed)} rows differ, {changed[0]} is the first"
            bad.append({"ids": changed[:8], "note": note, **_name(subject, changed[0])})
    text = f"{compared} rows compared; {len(changed_others)} of {num_others} other tensors have changed"
    if cut or (bad and not is_trained):
        return failed("; ".join(item["note"] for item in cut + bad)[:160], "0 rows", cut + bad)
    if bad:
        fix = "If these tokens were not meant to be learned anew, look at what initialised their rows."
        return warned(f"{text}, as in training; some rows were replaced", "half of a row's norm", bad, fix)
    return passed(text, "0 rows")


def _other_changes(stored: Stored, reference: Stored, embeddings: set[str]) -> tuple[int, list[str]]:
    """How many tensors both folders have, and which of them changed by more than another dtype rounds."""
    common = [n for n in stored.shapes if n in reference.shapes and n not in embeddings]
    changed = []
    for name in common:
        if stored.shapes[name] != reference.shapes[name]:
            changed.append(name)
            continue
        loose = 0.01 if stored.dtypes[name] != reference.dtypes[name] else 0.0
        for (_, x), (_, y) in zip(stored.slices(name), reference.slices(name), strict=True):
            if (x.float() - y.float()).norm() > loose * y.float().norm():
                changed.append(name)
                break
    return len(common), changed


def _name(subject: Subject, token_id: int) -> dict[str, Any]:
    if subject.tokenizer is None or token_id >= len(subject.tokenizer):
        return {}
    return {"text": subject.tokenizer.decode([token_id])}


WIDTHS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@check("dtype-changed", family="weights", tier=3, catalogue="K34")
def dtype_changed(subject: Subject) -> Outcome:
    """The weights are stored in another dtype than the config says, or the reference had.

    Symptom: a merged or exported model that is a little worse; values above 65504 that became infinite.
    Example: a save in fp16 of a model trained in bf16; a config that says float32 over bf16 files.
    Detected: the dtype that most stored numbers have, against `dtype` of the config and that of --reference.
    Tolerance: none; always a warning.
    Spares: a few tensors that are kept in float32 (norms, routers); quantised weights.
    Fix: save in the dtype of training, and set `dtype` in config.json to it.
    Sources: transformers#10789.
    """
    stored = _stored(subject)
    if getattr(subject.config, "quantization_config", None) is not None:
        raise NotApplicable("quantised weights")
    mine = _most_common_dtype(stored)
    if mine is None:
        raise NotApplicable("no weights of floating point")
    given = getattr(subject.config, "dtype", None)
    says = str(given).removeprefix("torch.") if given is not None else None
    before = _most_common_dtype(Stored(subject.reference)) if subject.reference else None
    said = (("config.dtype is", says), ("the reference has", before))
    evidence = [{"note": f"{who} {other}"} for who, other in said if other not in (None, mine)]
    text = f"most numbers are stored as {mine}"
    return warned(text, "the dtype of the config and of the reference", evidence) if evidence else passed(text)


def _most_common_dtype(stored: Stored) -> str | None:
    counts: dict[str, int] = {}
    for name, dtype in stored.dtypes.items():
        if dtype in WIDTHS:
            counts[dtype] = counts.get(dtype, 0) + torch.Size(stored.shapes[name]).numel()
    return WIDTHS[max(counts, key=lambda d: counts[d])] if counts else None
