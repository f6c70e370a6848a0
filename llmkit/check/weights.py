"""Stored weights, tensor by tensor: what is missing, dead, not finite, or no longer what it was made from.

Owns reading safetensors in slices, so that memory stays flat in the size of the model, and the tier-3 checks.

    check_folder(path)          # raises UserError for files that are cut short
    names = Stored(path).shapes

Leaves out any forward pass.
"""

import copy
import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError
from .runner import Outcome, check, failed, passed, warned
from .subject import NotApplicable, NotRun, Subject

SLICE = 50_000_000  # elements read at once
LARGEST_LOAD = 400_000_000  # parameters up to which from_pretrained itself is asked what is missing
DEAD = 1e-3  # of the median norm


def _header(path: Path) -> dict[str, Any]:
    """Of a safetensors file. Raises UserError where the file is shorter than its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise UserError(f"{path}: is no safetensors file, or was cut short ({size:,} bytes); copy it again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: its header cannot be read; copy it again") from None
    end = max((e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise UserError(f"{path}: has {size:,} bytes, its header says {8 + length + end:,}: cut short; copy it again")
    return header


def check_folder(folder: Path) -> None:
    """Raises UserError for a shard that is missing or cut short."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{index}: cannot be read; expected an index of shards; copy it again") from None
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise UserError(
                f"{folder}: {missing[0]} is missing ({len(missing)} of {len(shards)} shards); copy it again"
            )
    for path in sorted(folder.glob("*.safetensors")):
        _header(path)


class Stored:
    """The tensors of a folder, read when they are asked for."""

    def __init__(self, folder: Path):
        check_folder(folder)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if path.name.startswith("adapter_"):
                continue
            for name, entry in _header(path).items():
                if name != "__metadata__":
                    self.files[name], self.shapes[name] = path, tuple(entry["shape"])
                    self.dtypes[name] = entry["dtype"]

    def slices(self, name: str) -> Any:
        """(first row, rows as stored) of a tensor, a few million elements at a time."""
        from safetensors import safe_open

        shape = self.shapes[name]
        with safe_open(self.files[name], framework="pt") as file:
            if len(shape) < 2:
                yield 0, file.get_tensor(name)
                return
            part, rows = file.get_slice(name), max(1, SLICE // max(1, torch.Size(shape[1:]).numel()))
            for first in range(0, shape[0], rows):
                yield first, part[first : first + rows]

    def find(self, *endings: str) -> str | None:
        return next((name for end in endings for name in self.shapes if name == end or name.endswith(f".{end}")), None)


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "embeddings.weight",
              "tok_embeddings.weight", "embedding.weight")  # fmt: skip
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "head.weight")


def _stored(subject: Subject) -> Stored:
    if subject.folder is None or not any(subject.folder.glob("*.safetensors")):
        raise NotApplicable("no folder with stored weights given")
    if "stored" not in subject._cache:
        subject._cache["stored"] = Stored(subject.folder)
    return subject._cache["stored"]


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """id -> token of what the template writes and of BOS and EOS; not of padding."""
    template = getattr(tokenizer, "chat_template", None) or ""
    template = json.dumps(template) if isinstance(template, dict) else template
    special = {t for t in tokenizer.all_special_tokens} | {str(t) for t in tokenizer.added_tokens_decoder.values()}
    wanted = {t for t in special if t in template} | {tokenizer.bos_token, tokenizer.eos_token}
    ids = {tokenizer.convert_tokens_to_ids(t): t for t in wanted if t}
    pad = tokenizer.pad_token_id
    return {i: t for i, t in ids.items() if isinstance(i, int) and (i != pad or t == tokenizer.eos_token)}


@check("untrained-token-rows", family="weights", tier=3, catalogue="K34")
def untrained_token_rows(subject: Subject) -> Outcome:
    """The template uses tokens whose rows nobody has ever trained.

    Symptom: the model never ends its turn, although every row of the data does; it works after full fine-tuning only.
    Example: a base model with reserved tokens, its chat model's template, LoRA on the attention.
    Detected: the norm of each control token's row in embedding and head, against the median; rows that equal the
        rows of other tokens bit for bit.
    Tolerance: 1/1000 of the median norm.
    Spares: the pad row; where every row is trainable it is a warning.
    Fix: train these rows (`modules_to_save=["embed_tokens", "lm_head"]`, `trainable_token_indices`), or use tokens that
        were trained.
    Sources: torchtune#2429, unsloth#915, OpenRLHF#648, llama3#77, axolotl#1666.
    """
    subject.need("tokenizer")
    stored = _stored(subject)
    tokens = control_tokens(subject.tokenizer)
    if not tokens:
        raise NotApplicable("template and tokenizer use no control token")
    bad, medians = [], []
    for name in filter(None, (stored.find(*EMBEDDINGS), stored.find(*HEADS))):
        norms, hashes = [], []
        for _, rows in stored.slices(name):
            norms.append(rows.float().norm(dim=1))
            hashes.append((rows.float() * torch.arange(1, rows.shape[1] + 1)).sum(1, dtype=torch.float64))
        norm, key = torch.cat(norms), torch.cat(hashes)
        median = float(norm.median())
        medians.append(median)
        for token_id, token in tokens.items():
            if token_id >= len(norm):
                continue
            twins = int((key == key[token_id]).sum()) - 1
            if norm[token_id] < DEAD * median:
                bad.append({"ids": [token_id], "note": f"{name}: row of {token} has norm {float(norm[token_id]):.1e}"})
            elif twins:
                bad.append(
                    {"ids": [token_id], "note": f"{name}: row of {token} equals the rows of {twins} other tokens"}
                )
    if not medians:
        raise NotRun("no embedding found among the stored tensors")
    limit = f"{DEAD:g} of the median norm {medians[0]:.3g}"
    if not bad:
        return passed(f"rows of {len(tokens)} control tokens are alive", limit)
    text = f"{len(bad)} rows of control tokens were never trained"
    return warned(text, limit, bad) if _trains_embeddings(subject) else failed(text, limit, bad)


def _trains_embeddings(subject: Subject) -> bool:
    if subject.model is None or subject.training is None:
        return False
    inner = subject.model.get_base_model() if hasattr(subject.model, "get_base_model") else subject.model
    return all(p.requires_grad for p in inner.get_input_embeddings().parameters())


@check("weights-missing", family="weights", tier=3, catalogue="K34")
def weights_missing(subject: Subject) -> Outcome:
    """Tensors that the class needs are not in the files, and are drawn at random on load.

    Symptom: a warning that scrolls by, then a model that is subtly or completely broken.
    Example: keys with a prefix that nobody strips; a tied head that was not stored while the config says untied.
    Detected: what from_pretrained reports as missing, unexpected or of another shape; for large models the names and
        shapes that the class has on the meta device.
    Tolerance: none.
    Spares: tied keys, buffers, and names that the class declares as ignorable.
    Fix: rename the keys to what the class expects, or set tie_word_embeddings to what was saved.
    Sources: train-llm-from-scratch#37, transformers#43429, nanoGPT#325.
    """
    stored = _stored(subject)
    if subject.make_model is None:
        raise NotApplicable("the class is not known")
    if sum(torch.Size(shape).numel() for shape in stored.shapes.values()) <= LARGEST_LOAD:
        info = _loading_info(subject)
        missing, unexpected = sorted(map(str, info["missing_keys"])), sorted(map(str, info["unexpected_keys"]))
        mismatched = sorted(str(m[0] if isinstance(m, (tuple, list)) else m) for m in info["mismatched_keys"])
    else:
        missing, unexpected, mismatched = _by_names(subject, stored)
    found = {"missing": missing, "of another shape": mismatched, "unexpected": unexpected}
    evidence = [
        {"note": f"{what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"}
        for what, names in found.items()
        if names
    ]
    text = f"{len(missing)} tensors missing, {len(mismatched)} of another shape, {len(unexpected)} unexpected"
    if missing or mismatched:
        return failed(text, "0", evidence)
    return warned(text, "0", evidence) if unexpected else passed(text, "0")


def _loading_info(subject: Subject) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": subject.trust_remote_code, "output_loading_info": True}
    try:
        return AutoModelForCausalLM.from_pretrained(subject.folder, ignore_mismatched_sizes=True, **options)[1]
    except Exception as error:
        raise NotRun(f"from_pretrained raises {type(error).__name__}: {str(error).splitlines()[0][:150]}") from None


def _by_names(subject: Subject, stored: Stored) -> tuple[list[str], list[str], list[str]]:
    assert subject.make_model is not None
    with torch.device("meta"):
        model: Any = subject.make_model(copy.deepcopy(subject.config))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    missing = sorted(
        set(wanted) - set(stored.shapes) - (tied if getattr(subject.config, "tie_word_embeddings", False) else set())
    )
    if len(missing) > len(wanted) // 2:
        raise NotRun("the stored names are converted on load: load the model once to see what is missing")
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unexpected = sorted(n for n in set(stored.shapes) - set(wanted) if not any(p.search(n) for p in ignored))
    return missing, unexpected, sorted(n for n in wanted.keys() & stored.shapes.keys() if wanted[n] != stored.shapes[n])


@check("weights-not-finite", family="weights", tier=3, catalogue="K34")
def weights_not_finite(subject: Subject) -> Outcome:
    """A stored tensor holds NaN or infinity, or is zero throughout.

    Symptom: NaN in the first forward pass, or a layer that does nothing.
    Example: a save in fp16 of values above 65504; a conversion that left a tensor empty.
    Detected: every stored tensor, slice by slice.
    Tolerance: none for values that are not finite; matrices of zeros warn.
    Spares: biases and norms, which may be zero; integer tensors of quantised models; output projections and LoRA B
        matrices that start at zero.
    Fix: save in bfloat16 or float32; convert that tensor again.
    Sources: transformers#5651, trl#4416.
    """
    stored, bad, dead = _stored(subject), [], []
    for name, shape in stored.shapes.items():
        if not torch.Size(shape).numel():
            bad.append({"note": f"{name}: holds no number, shape {list(shape)}"})
            continue
        largest = 0.0
        for first, rows in stored.slices(name):
            if not rows.dtype.is_floating_point:
                break
            finite = torch.isfinite(rows.float() if rows.dtype.itemsize < 2 else rows)
            if not finite.all():
                row = first + (int((~finite).flatten(1).any(1).nonzero()[0]) if rows.ndim > 1 else 0)
                bad.append({"row": row, "note": f"{name}: {int((~finite).sum())} values are not finite"})
                largest = 1.0
                break
            largest = max(largest, float(rows.abs().max()))
        else:
            if largest == 0 and len(shape) > 1:
                dead.append({"note": f"{name}: all zero"})
    text = f"{len(stored.shapes)} tensors read, {len(bad)} not finite or empty, {len(dead)} matrices all zero"
    if bad:
        return failed(text, "0", bad)
    return (
        warned(text, "0", dead, "a fresh output projection may be zero; a trained one may not")
        if dead
        else passed(text, "0")
    )


@check("rows-differ-from-reference", family="weights", tier=3, catalogue="K34")
def rows_differ_from_reference(subject: Subject) -> Outcome:
    """Rows of the embedding are no longer those of the folder that this one was made from.

    Symptom: after adding tokens, merging or exporting, old tokens mean something else.
    Example: a resize to the tokenizer's length that cuts trained rows; an init that writes the wrong rows.
    Detected: embedding and head against --reference, row by row.
    Tolerance: equal bit for bit in the same dtype; 1 % of a row's norm where the dtype changed.
    Spares: rows that were added.
    Fix: resize with `resize_token_embeddings(max(rows, len(tokenizer)))`, and initialise the new rows only.
    Sources: unsloth-zoo#923, LlamaFactory#10547.
    """
    stored = _stored(subject)
    if subject.reference is None:
        raise NotApplicable("no reference given")
    reference = Stored(subject.reference)
    compared = 0
    bad: list[dict[str, Any]] = []
    for kind in (EMBEDDINGS, HEADS):
        mine, theirs = stored.find(*kind), reference.find(*kind)
        if mine is None or theirs is None:
            continue
        a, b = stored.shapes[mine], reference.shapes[theirs]
        if a[0] < b[0]:
            bad.append({"note": f"{mine}: {a[0]} rows, the reference has {b[0]}"})
        loose = 0.01 if stored.dtypes[mine] != reference.dtypes[theirs] else 0.0
        changed: list[int] = []
        for (first, x), (_, y) in zip(stored.slices(mine), reference.slices(theirs), strict=False):
            count = min(len(x), len(y))
            x, y = x[:count].float(), y[:count].float()
            compared += count
            wrong = (x - y).norm(dim=1) > loose * y.norm(dim=1)
            changed += (first + wrong.nonzero().flatten()).tolist()
        if changed:
            note = f"{mine}: {len(changed)} rows differ, {changed[0]} is the first"
            bad.append({"ids": changed[:8], "note": note, **_name(subject, changed[0])})
    if not compared:
        raise NotRun("no embedding found in both folders")
    if bad:
        return failed("; ".join(item["note"] for item in bad)[:160], "0 rows", bad)
    return passed(f"{compared} rows are those of the reference", "0 rows")


def _name(subject: Subject, token_id: int) -> dict[str, Any]:
    if subject.tokenizer is None or token_id >= len(subject.tokenizer):
        return {}
    return {"text": subject.tokenizer.decode([token_id])}


@check("adapter-does-not-fit", family="weights", tier=3, catalogue="K34")
def adapter_does_not_fit(subject: Subject) -> Outcome:
    """The adapter's tensors have no place in this model, or were never trained.

    Symptom: the model with its adapter answers like the base.
    Example: keys renamed by a wrapper; an adapter of another base; matrices B that are all zero.
    Detected: every key of adapter_model.safetensors must name a module of the model, with fitting shapes; B is read.
    Tolerance: none.
    Spares: an adapter that was saved before the first step has zero B: a warning.
    Fix: load the adapter on the base that its adapter_config.json names; save it with PEFT's save_pretrained.
    Sources: peft#1323, #3533, #2772.
    """
    if subject.adapter is None:
        raise NotApplicable("no adapter folder given")
    subject.need("config")
    files = sorted(subject.adapter.glob("adapter_model*.safetensors"))
    if not files:
        raise NotRun("the adapter folder holds no adapter_model.safetensors")
    shapes = {n: tuple(e["shape"]) for path in files for n, e in _header(path).items() if n != "__metadata__"}
    if subject.model is not None:
        wanted = {name: tuple(p.shape) for name, p in subject.model.named_parameters()}
    else:
        assert subject.make_model is not None
        with torch.device("meta"):
            wanted = {
                n: tuple(p.shape) for n, p in subject.make_model(copy.deepcopy(subject.config)).named_parameters()
            }
    homeless, misfits, num_b, zero_b = [], [], 0, 0
    for name, shape in shapes.items():
        module = re.sub(r"^base_model\.model\.", "", name)
        kind = re.search(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.\w+)?(\.weight)?$", module)
        base = module[: kind.start()] if kind else module.replace(".modules_to_save", "").rsplit(".", 1)[0]
        home = wanted.get(f"{base}.weight") or wanted.get(f"{base}.base_layer.weight")
        if home is None:
            homeless.append(name)
        elif kind and kind[1] == "lora_A" and shape[-1] not in home:
            misfits.append(f"{name} {list(shape)} on {list(home)}")
        elif kind and kind[1] == "lora_B":
            num_b += 1
            zero_b += not _largest(files, name)
            if shape[0] not in home:
                misfits.append(f"{name} {list(shape)} on {list(home)}")
    evidence = [{"note": f"no module for {', '.join(homeless[:3])}"}] if homeless else []
    evidence += [{"note": f"does not fit: {', '.join(misfits[:3])}"}] if misfits else []
    text = f"{len(shapes)} tensors, {len(homeless)} without a module, {len(misfits)} of another shape"
    if homeless or misfits or not shapes:
        return failed(text, "0", evidence or [{"note": "the adapter is empty"}])
    if num_b and zero_b == num_b:
        return warned(f"{text}; every B is zero", "0", [{"note": "this adapter changes nothing: it was never trained"}])
    return passed(text, "0")


def _largest(files: list[Path], name: str) -> float:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  # a safe_open has no __contains__
                value: Tensor = file.get_tensor(name)
                return float(value.abs().max()) if value.numel() else 0.0
    return 0.0
