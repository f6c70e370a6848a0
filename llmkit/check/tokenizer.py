"""The tokenizer's ids: within the model's rows, one for each control token, the model's own.

Owns the tier-0 checks K1 and K2. Leaves out BOS (`bos.py`), EOS and forging (`control.py`) and round trips
(`torture.py`), whose checks are of this family as well, and what templates do (`template.py`).
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import control  # noqa: F401  its checks are of this family
from .bos import trained_rows
from .conversations import turn_ends, written_by_template
from .forward import bare, text_config
from .runner import Outcome, check, failed, passed, warned
from .spans import decode
from .subject import NotApplicable, NotRun, Subject
from .torture import encode

STRUCTURE = re.compile(r"turn|start|end|begin|im_|eot|eom|bos|eos|header|^s$", re.I)
ROLE = re.compile(r"system|user|assistant|human|bot|model|tool|observation|developer", re.I)
PLACEHOLDER = re.compile(r"image|audio|video|vision", re.I)  # of a multimodal sibling: Gemma 3's text model has one


def embedding_rows(subject: Subject) -> int | None:
    """Of the live model, the smaller of embedding and head, or what its config promises."""
    if subject.model is not None:
        inner = bare(subject.model)
        names = ("get_input_embeddings", "get_output_embeddings")
        layers = [getattr(inner, name)() for name in names if hasattr(inner, name)]
        weights = [w for layer in layers if isinstance(w := getattr(layer, "weight", None), Tensor)]
        rows = [w.shape[0] for w in weights if w.ndim == 2 and w.is_floating_point()]  # a quantised head is packed
        if any(rows):  # a tensor that is sharded away has none
            return min(filter(None, rows))
    return getattr(text_config(subject), "vocab_size", None)


def _generation_config(subject: Subject) -> Any:
    generation = getattr(subject.model, "generation_config", None)
    if generation is None and subject.folder and (subject.folder / "generation_config.json").is_file():
        return json.loads((subject.folder / "generation_config.json").read_text(encoding="utf-8"))
    return generation


def _text_config(subject: Subject) -> Any:
    return text_config(getattr(subject.model, "config", None) or subject.config)


def named_ids(subject: Subject, kind: str) -> set[int]:
    """bos_token_id, eos_token_id or pad_token_id of config and generation config, as a set."""
    found: set[int] = set()
    for holder in (_text_config(subject), _generation_config(subject)):
        value = holder.get(kind) if isinstance(holder, dict) else getattr(holder, kind, None)
        found |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    return found


# K1: bounds


@check("ids-beyond-embedding", family="tokenizer", tier=0, catalogue="K1")
def ids_beyond_embedding(subject: Subject) -> Outcome:
    """The tokenizer or the rows have ids for which the model has no row.

    Symptom: an index error in the middle of an epoch, or a device-side assert with no message.
    Example: tokens added to the tokenizer without `model.resize_token_embeddings`.
    Detected: the largest id of the vocabulary and of the rows that are trained on, against the rows of the embedding
        and of the head.
    Tolerance: none. A placeholder for images or sound that nothing writes: a warning (Gemma 3's text models).
    Spares: more rows than ids (padded vocabularies: Qwen, Gemma).
    Fix: model.resize_token_embeddings(len(tokenizer)) where that is more rows than now.
    Sources: transformers#2825, LLM-Shearing#65.
    """
    subject.need("tokenizer", "config")
    rows = embedding_rows(subject)
    if rows is None:
        raise NotRun("the config does not say how many rows the embedding has")
    vocabulary = subject.tokenizer.get_vocab()
    largest = max(vocabulary.values())
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= rows)
    evidence: list[dict[str, Any]] = [{"ids": [i], "note": f"token {token!r}"} for i, token in beyond[:5]]
    measured, limit = f"largest id {largest}, {rows} rows", f"largest id {rows - 1}"
    for row in trained_rows(subject):
        at = next((k for k, i in enumerate(row.input_ids) if not 0 <= i < rows), None)
        if at is not None:
            ids = row.input_ids[at : at + 8]
            measured = f"a row holds id {ids[0]}, the model has {rows} rows"
            return failed(measured, limit, [{"row": row.index, "position": at, "ids": ids}, *evidence])
    if not beyond:
        return passed(measured, limit)
    measured = f"{len(beyond)} ids, up to {largest}, for {rows} rows"
    source = str(getattr(subject.tokenizer, "chat_template", None))
    if all(PLACEHOLDER.search(token) and token not in source for _, token in beyond):
        return warned(measured, limit, evidence, "keep images and sound away from this model")
    return failed(measured, limit, evidence)


@check("ids-overflow-storage", family="tokenizer", tier=0, catalogue="K1")
def ids_overflow_storage(subject: Subject) -> Outcome:
    """The stored rows use an integer type that is too small for the vocabulary.

    Symptom: nothing fails; nearly half of the tokens are others than the text says.
    Example: np.uint16 with a vocabulary of 128,000: ids wrap around at 65,536.
    Detected: the largest value of the type in which the training set (or the token store) holds its ids, against the
        largest id.
    Tolerance: none.
    Spares: data sets that are tokenised on the fly, and lists of Python integers.
    Fix: store ids as uint32.
    Sources: transformers#2825, LLM-Shearing#65, distillm#14.
    """
    subject.need("tokenizer")
    name = subject.settings.get("store_dtype")  # of a token store that is to be written
    if name is None:
        subject.need("training")
        name = _stored_type(getattr(getattr(subject.training, "trainer", None), "train_dataset", None))
    if name is None:
        raise NotApplicable("the training set does not hold ids in an integer type")
    largest, most = max(subject.tokenizer.get_vocab().values()), int(np.iinfo(name).max)
    measured, limit = f"largest id {largest}, stored as {name}", f"largest id {most}"
    if largest > most:
        return failed(measured, limit, [{"ids": [largest], "note": f"would be stored as {largest % (most + 1)}"}])
    return passed(measured, limit)


def _stored_type(dataset: Any) -> str | None:
    """The integer type of `input_ids`: of a table's column, or of the array that a data set of one's own reads from."""
    feature = (getattr(dataset, "features", None) or {}).get("input_ids")
    names = [getattr(getattr(feature, "feature", None), "dtype", None)]
    for holder in (dataset, getattr(dataset, "dataset", None)):
        arrays = [v for v in getattr(holder, "__dict__", {}).values() if isinstance(v, np.ndarray)]
        names += [str(a.dtype) for a in arrays if a.size > 1]
    try:
        item = dataset[0]
        value = item.get("input_ids") if hasattr(item, "get") else None
        names.append(str(getattr(value, "dtype", "")).removeprefix("torch."))
    except Exception:  # a stream, or a data set that wants another index
        pass
    whole = [n for n in names if isinstance(n, str) and re.fullmatch(r"u?int\d+", n)]
    return min(whole, key=lambda n: np.iinfo(n).max) if whole else None


@check("embedding-rows-lost", family="tokenizer", tier=0, catalogue="K1")
def embedding_rows_lost(subject: Subject) -> Outcome:
    """The model has fewer rows than the one it was made from.

    Symptom: trained rows of a padded vocabulary are gone; other tools refuse the checkpoint.
    Example: resize_token_embeddings(len(tokenizer)) on a model whose vocabulary was padded.
    Detected: rows of the model against those of --reference.
    Tolerance: none.
    Spares: more rows than before.
    Fix: resize to max(rows, len(tokenizer)).
    Sources: unsloth-zoo#923.
    """
    subject.need("config", "reference")
    assert subject.reference is not None
    path = subject.reference / "config.json"
    if not path.is_file():
        raise NotRun("the reference has no config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    before = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    rows = embedding_rows(subject)
    if before is None or rows is None:
        raise NotRun("one of the configs names no vocab_size")
    measured, limit = f"{rows} rows, the reference has {before}", f"{before} rows"
    if rows < before:
        return failed(measured, limit, [{"note": f"{before - rows} rows are gone"}])
    return passed(measured, limit)


# K2: control tokens


def _declared(tokenizer: Any) -> dict[str, str]:
    names = ("bos_token", "eos_token", "pad_token")
    return {name: token for name in names if (token := getattr(tokenizer, name, None))}


def _pieces(tokenizer: Any, text: str) -> list[int]:
    """Its ids, but for a dummy prefix."""
    ids = encode(tokenizer, text)
    return [i for k, i in enumerate(ids) if k or len(ids) == 1 or decode(tokenizer, [i]).strip()]


def _undeclared_id(tokenizer: Any, name: str, token: str) -> dict[str, Any] | None:
    """Evidence where a declared special token does not encode to the id that is declared for it."""
    ids, wanted = _pieces(tokenizer, token), getattr(tokenizer, f"{name}_id")
    if wanted is None or (wanted == tokenizer.unk_token_id and token != tokenizer.unk_token):
        return {"ids": ids, "note": f"{name} {token!r} is not in the vocabulary"}
    if ids != [wanted]:
        return {"ids": ids, "note": f"{name} {token!r} encodes to {len(ids)} ids, its own is {wanted}"}
    return None


def _has_bars(literal: str) -> bool:
    return "|" in literal or "｜" in literal


def _is_single(tokenizer: Any, literal: str, ids: list[int]) -> bool:
    """One id by itself, and recognised where the template writes it (among `ids`)."""
    alone = _pieces(tokenizer, literal)
    return len(alone) == 1 and alone[0] != tokenizer.unk_token_id and alone[0] in ids


@check("special-token-split", family="tokenizer", tier=0, catalogue="K2")
def special_token_split(subject: Subject) -> Outcome:
    """A control token is not one id: it is spelled out of ordinary tokens.

    Symptom: the end of a turn is never recognised, generation goes on; each marker costs six tokens.
    Example: a ChatML template on a base tokenizer that has no <|im_end|>.
    Detected: the declared BOS, EOS and padding are encoded, and so is a conversation with every <|...|> and turn marker
        that the template writes: one id each, the declared one.
    Tolerance: none for declared tokens, ends of turns and markers of structure (start, end, turn, header). Role
        markers that are all spelled (<|user|> in Zephyr): a warning.
    Spares: markers that are words by design: [INST], ### Response:, <think>, <tools>.
    Fix: add them as special tokens (`tokenizer.add_special_tokens`), resize the embedding, train the new rows.
    Sources: fms-hf-tuning#470, llama.cpp#2820, xtuner#105.
    """
    subject.need("tokenizer")
    tokenizer = subject.tokenizer
    declared = _declared(tokenizer)
    bad = [item for name, token in declared.items() if (item := _undeclared_id(tokenizer, name, token))]
    written = written_by_template(tokenizer)
    literals: list[str] = []
    spelled: list[dict[str, Any]] = []
    if written:
        text, end = written.text, written.end
        literals = [x for x in written.literals if STRUCTURE.search(x.strip("<>/|｜")) or _has_bars(x)]
        ids = encode(tokenizer, text)
        is_single = {x: _is_single(tokenizer, x, ids) for x in literals}
        has_single_roles = any(is_single[x] for x in literals if ROLE.search(x))
        for literal in [x for x in literals if not is_single[x]]:
            note = f"the template's {literal!r} is spelled by {len(encode(tokenizer, literal))} ids"
            item = {"ids": encode(tokenizer, literal), "note": note}
            is_structure = bool(STRUCTURE.search(literal.strip("<>/|｜")))
            is_worse = is_structure or literal == end or (has_single_roles and ROLE.search(literal))
            (bad if is_worse else spelled).append(item)
    count = len(set(literals) | set(declared.values()))
    if not count:
        raise NotApplicable("no special token is declared, and no template writes one")
    if bad:
        return failed(f"{len(bad) + len(spelled)} of {count} control tokens are not one id", "one id each", bad)
    if spelled:
        return warned(f"{len(spelled)} of {count} markers are spelled, as words are", "one id each", spelled)
    return passed(f"{count} control tokens are one id each", "one id each")


@check("stop-token-missing", family="tokenizer", tier=0, catalogue="K2")
def stop_token_missing(subject: Subject) -> Outcome:
    """The token that ends a turn does not end generation.

    Symptom: the model answers, and then goes on to play the user's part until the length limit.
    Example: a base model's EOS with a ChatML template: <|im_end|> is written, <|endoftext|> is waited for.
    Detected: the control token behind an answer in the template must be among eos_token_id of generation config,
        config or tokenizer.
    Tolerance: none; without a model, whose generation config may name more stop tokens, a warning.
    Spares: templates that end turns in words; channel delimiters, where another token of the template ends the answer;
        templates that write a stop token behind the end of the last turn (Phi-3).
    Fix: set tokenizer.eos_token to it, or add its id to generation_config.eos_token_id.
    Sources: mlx-vlm#2112, LlamaFactory#7454, Qwen3#927, trl#3299.
    """
    subject.need("tokenizer")
    tokenizer = subject.tokenizer
    closing = turn_ends(tokenizer)
    if not closing:
        raise NotApplicable("no template that ends a turn by a control token")
    model_stops = named_ids(subject, "eos_token_id")
    stops = model_stops | ({tokenizer.eos_token_id} - {None})
    shown = ", ".join(sorted(tokenizer.convert_ids_to_tokens(sorted(closing))))
    limit = "one of the stop tokens"
    written = written_by_template(tokenizer)
    if closing & stops or (written and stops & set(encode(tokenizer, written.tail))):
        return passed(f"{shown} stops generation", limit)
    evidence = [{"ids": sorted(closing), "note": f"the template ends answers by {shown}; stop ids are {sorted(stops)}"}]
    text = f"{shown} is no stop token"
    if _text_config(subject) is None:
        return warned(f"{text} of the tokenizer; there is no generation config to look at", limit, evidence)
    return failed(text, limit, evidence)


def own_tokenizer(subject: Subject) -> Any:
    """The tokenizer of the folder that the model's weights came from, where that is another than the one given."""
    name = str(subject.folder or getattr(_text_config(subject), "_name_or_path", None) or "")
    given, folder = getattr(subject.tokenizer, "name_or_path", None) or "", Path(name)
    if not name or not folder.is_dir() or not any(folder.glob("tokenizer*.json")):
        return None
    if Path(given).resolve() == folder.resolve():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=subject.trust_remote_code)
    except Exception:  # a folder whose tokenizer needs its own code says nothing
        return None


def _default_ids(subject: Subject, kind: str) -> set[Any]:
    """What the class of the config has where nobody set it."""
    try:
        value = getattr(type(_text_config(subject))(), kind, None)
    except Exception:  # a class that cannot be made without arguments
        return set()
    return set(value if isinstance(value, (list, tuple)) else [value])


def _moved(mine: Any, theirs: Any) -> dict[str, Any] | None:
    """Evidence where more than 1% of the tokens that both have carry another id, or texts have other ids."""
    a, b = mine.get_vocab(), theirs.get_vocab()
    common = [token for token in a if token in b]
    moved = [token for token in common if a[token] != b[token]]
    if len(moved) > 0.01 * len(common):
        note = f"{len(moved)} of {len(common)} tokens that both have carry another id than the model's own tokenizer"
        return {"ids": [a[moved[0]]], "note": note}
    if len(common) < 0.5 * min(len(a), len(b)):
        return {"note": f"only {len(common)} of {len(b)} tokens of the model's own tokenizer are in it"}
    return None


@check("tokenizer-of-another-model", family="tokenizer", tier=0, catalogue="K2")
def tokenizer_of_another_model(subject: Subject) -> Outcome:
    """The tokenizer does not belong to this model.

    Symptom: loss starts far above that of the base model and never comes down to it.
    Example: GPT-2's tokenizer on a Llama checkpoint.
    Detected: the ids of tokens in the model's own folder or in --reference; bos_token_id and eos_token_id of config and
        generation config against the tokenizer's; the size of the vocabulary against the rows.
    Tolerance: 1% of the ids. Without another tokenizer to compare with: no special id agrees, and two of BOS, EOS and
        size do not fit (all three, where the config has the defaults of its class). Less than that is a warning.
    Spares: padded vocabularies, added tokens, several stop tokens; models from scratch whose config kept the defaults.
    Fix: use the tokenizer in the model's own folder; or set the ids of config and generation config.
    Sources: pytorch/rl#3887.
    """
    subject.need("tokenizer", "config")
    tokenizer, limit = subject.tokenizer, "ids agree"
    for other in (subject.reference_tokenizer, own_tokenizer(subject)):
        if other is not None and (item := _moved(tokenizer, other)):
            return failed("its ids are not those of the model's own tokenizer", limit, [item])
    rows, size = embedding_rows(subject) or 0, len(tokenizer)
    notes: list[dict[str, Any]] = []
    is_chosen, agree = True, 0
    for kind in ("bos_token_id", "eos_token_id"):
        theirs, mine = {i for i in named_ids(subject, kind) if not rows or i < rows}, getattr(tokenizer, kind)
        if not theirs or mine is None:
            continue
        agree += mine in theirs
        if mine not in theirs:
            what = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens([i for i in sorted(theirs) if i < size]))
            note = f"{kind}: tokenizer {mine}, model {sorted(theirs)}" + (f", which is {what} here" if what else "")
            notes.append({"ids": [mine], "note": note})
            is_chosen = is_chosen and theirs != _default_ids(subject, kind)
    differ = len(notes)
    fits_not = rows and (rows > 2 * size + 64 or size > 1.05 * rows)
    if fits_not:
        notes.append({"note": f"{size} ids for {rows} rows"})
    text = "; ".join(item["note"] for item in notes)
    is_other = differ + bool(fits_not) >= (2 if is_chosen else 3)
    if differ and not agree and is_other and not subject.is_scratch:
        return failed(text, limit, notes)
    if notes:
        return warned(text, limit, notes)
    return passed(f"special ids agree, {size} ids for {rows} rows", limit)
