"""The tokenizer and its ids: bounds, control tokens, BOS, round trips, what it is after a save and beside its parent.

Owns the tier-0 checks that need no template. Leaves out what templates do (`template.py`) and rows of a trainer's own
making (`rows.py`), except for the BOS at their beginning.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from .audit import closing_ids
from .runner import Outcome, check, failed, passed, warned
from .spans import segments, special_texts, template_marks
from .subject import NotApplicable, NotRun, Subject

# what gets lost: white space, scripts, joined emoji, code. A sample is judged by what the tokenizer can spell at all.
TORTURE = {
    "newlines": "one\n\ntwo\nthree\n",
    "tabs and indents": "def f():\n\tif x:\n\t\treturn 1\n    y = 2\n",
    "CRLF": "a\r\nb\r\n",
    "trailing blanks": "end   ",
    "leading blanks": "   start",
    "runs of blanks": "a  b   c    d",
    "digits": "1234567890 3.14159 1,000,000 2026-11-25",
    "code": 'for (int i=0; i<n; ++i) { a[i] = "x\\n"; }  // end',
    "accents": "Ünïcödé naïve façade",
    "decomposed accents": "e\u0301 a\u0308 n\u0303",
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd",
    "right to left": "שלום عربى",
    "ideographs": "你好，世界。こんにちは",
    "punctuation": 'Hello , world ! don\'t "quote" ... (a) [b]',
}
WHITE = ("newlines", "tabs and indents", "trailing blanks", "runs of blanks", "CRLF", "leading blanks")
TURN = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?[a-zA-Z_]{1,24}>")  # <|im_end|>, <end_of_turn>, </s>
CONTROL = re.compile(r"turn|start|end|im_|eot|bos|eos|system|user|assistant|^</?s>$", re.I)


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def first_difference(a: Any, b: Any) -> int:
    """Where two sequences part; the length of the shorter one where it begins the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def own_texts(subject: Subject) -> list[str]:
    """A few dozen texts of the user's rows, their beginnings."""
    rows = subject.rows[:40]
    found = [v for row in rows for v in row.values() if isinstance(v, str)]
    turns = [m for row in rows for m in row.get("messages") or [] if isinstance(m, dict)]
    found += [m["content"] for m in turns if isinstance(m.get("content"), str)]
    return [text[:400] for text in found[:60]]


def embedding_rows(subject: Subject) -> int | None:
    """Of the live model, or what its config promises."""
    if subject.model is not None:
        inner = subject.model.get_base_model() if hasattr(subject.model, "get_base_model") else subject.model
        return inner.get_input_embeddings().num_embeddings
    config = subject.config.get_text_config() if hasattr(subject.config, "get_text_config") else subject.config
    return getattr(config, "vocab_size", None)


def named_ids(subject: Subject, kind: str) -> set[int]:
    """bos_token_id, eos_token_id or pad_token_id of config and generation config, as a set."""
    found: set[int] = set()
    generation = getattr(subject.model, "generation_config", None)
    if generation is None and subject.folder and (subject.folder / "generation_config.json").is_file():
        generation = json.loads((subject.folder / "generation_config.json").read_text(encoding="utf-8"))
    config = getattr(subject.model, "config", None) or subject.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (config, generation):
        value = holder.get(kind) if isinstance(holder, dict) else getattr(holder, kind, None)
        found |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    return found


@check("ids-beyond-embedding", family="tokenizer", tier=0, catalogue="K1")
def ids_beyond_embedding(subject: Subject) -> Outcome:
    """The tokenizer has ids for which the model has no row.

    Symptom: an index error in the middle of an epoch, or a device-side assert with no message.
    Example: tokens added to the tokenizer without `model.resize_token_embeddings`.
    Detected: the largest id of the vocabulary against the rows of the embedding.
    Tolerance: none.
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
    if beyond:
        evidence = [{"ids": [i], "note": f"token {token!r}"} for i, token in beyond[:5]]
        return failed(f"{len(beyond)} ids, up to {largest}, for {rows} rows", f"largest id {rows - 1}", evidence)
    return passed(f"largest id {largest}, {rows} rows", f"largest id {rows - 1}")


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
    if rows < before:
        return failed(
            f"{rows} rows, the reference has {before}", f"{before}", [{"note": f"{before - rows} rows are gone"}]
        )
    return passed(f"{rows} rows, the reference has {before}", f"{before}")


def _turn_literals(tokenizer: Any) -> list[str]:
    """Control literals that the template writes around contents."""
    found = segments(tokenizer, ("user", "assistant", "user", "assistant")) or []
    found += segments(tokenizer, ("system", "user", "assistant")) or []
    literals = dict.fromkeys(m for part in found for m in TURN.findall(part))
    return [x for x in literals if x.startswith("<|") or CONTROL.search(x.strip("<>/")) or x in ("<s>", "</s>")]


@check("special-token-split", family="tokenizer", tier=0, catalogue="K2")
def special_token_split(subject: Subject) -> Outcome:
    """A control token is not one id: it is spelled out of ordinary tokens.

    Symptom: the end of a turn is never recognised, generation goes on; each marker costs six tokens.
    Example: a ChatML template on a base tokenizer that has no <|im_end|>.
    Detected: every <|...|> and turn marker that the template writes, and the declared BOS, EOS and padding, are
        encoded: one id each, the declared one.
    Tolerance: none.
    Spares: markers that are words by design: [INST], ### Response:, <think>, <tools>.
    Fix: add them as special tokens (`tokenizer.add_special_tokens`), resize the embedding, train the new rows.
    Sources: fms-hf-tuning#470, llama.cpp#2820, xtuner#105.
    """
    subject.need("tokenizer")
    tokenizer, bad = subject.tokenizer, []
    declared = {k: getattr(tokenizer, k) for k in ("bos_token", "eos_token", "pad_token")}
    for name, token in declared.items():
        ids = encode(tokenizer, token) if token else None
        wanted = getattr(tokenizer, f"{name}_id")
        if ids is not None and ids != [wanted]:
            bad.append({"ids": ids, "note": f"{name} {token!r} encodes to {len(ids)} ids, its own is {wanted}"})
    literals = _turn_literals(tokenizer)
    for literal in literals:
        ids = encode(tokenizer, literal)
        if len(ids) != 1 and literal not in declared.values():
            bad.append({"ids": ids, "note": f"the template's {literal!r} encodes to {len(ids)} ids"})
    count = len(set(literals) | {t for t in declared.values() if t})
    if not count:
        raise NotApplicable("no special token is declared, and no template writes one")
    if bad:
        return failed(f"{len(bad)} of {count} control tokens are not one id", "one id each", bad)
    return passed(f"{count} control tokens are one id each", "one id each")


@check("stop-token-missing", family="tokenizer", tier=0, catalogue="K2")
def stop_token_missing(subject: Subject) -> Outcome:
    """The token that ends a turn does not end generation.

    Symptom: the model answers, and then goes on to play the user's part until the length limit.
    Example: a base model's EOS with a ChatML template: <|im_end|> is written, <|endoftext|> is waited for.
    Detected: the control token behind an answer in the template must be among eos_token_id of generation config,
        config or tokenizer.
    Tolerance: none.
    Spares: templates that end turns in words; channel delimiters, where another token of the template ends the answer.
    Fix: set tokenizer.eos_token to it, or add its id to generation_config.eos_token_id.
    Sources: mlx-vlm#2112, LlamaFactory#7454, Qwen3#927, trl#3299.
    """
    subject.need("tokenizer")
    tokenizer = subject.tokenizer
    marks = template_marks(tokenizer)
    closing = closing_ids(tokenizer, marks)
    if not closing:
        raise NotApplicable("no template that ends a turn by a control token")
    stops = named_ids(subject, "eos_token_id") | {tokenizer.eos_token_id} - {None}
    shown = ", ".join(sorted(tokenizer.convert_ids_to_tokens(sorted(closing))))
    if not closing & stops:
        evidence = [
            {"ids": sorted(closing), "note": f"the template ends answers by {shown}; stop ids are {sorted(stops)}"}
        ]
        return failed(f"{shown} is no stop token", "one of the stop tokens", evidence)
    return passed(f"{shown} stops generation", "one of the stop tokens")


@check("tokenizer-of-another-model", family="tokenizer", tier=0, catalogue="K2")
def tokenizer_of_another_model(subject: Subject) -> Outcome:
    """The tokenizer does not belong to this model.

    Symptom: loss starts far above that of the base model and never comes down to it.
    Example: GPT-2's tokenizer on a Llama checkpoint.
    Detected: ids of BOS and EOS in config and tokenizer, the size of the vocabulary against the rows; with --reference
        the ids of common tokens.
    Tolerance: rows may be twice the ids (padding, tokens to come); 1 % of common tokens may have moved.
    Spares: extended tokenizers, another EOS chosen for chat.
    Fix: load the tokenizer of the same folder as the model; align config.eos_token_id with it.
    Sources: pytorch/rl#3887.
    """
    subject.need("tokenizer", "config")
    tokenizer = subject.tokenizer
    notes: list[dict[str, Any]] = []
    for kind in ("bos_token_id", "eos_token_id"):
        theirs, mine = named_ids(subject, kind), getattr(tokenizer, kind)
        if theirs and mine is not None and mine not in theirs:
            notes.append({"ids": [mine], "note": f"{kind}: tokenizer {mine}, model {sorted(theirs)}"})
    rows, size = embedding_rows(subject) or 0, len(tokenizer)
    is_small = rows > 2 * size + 64
    if is_small:
        notes.append({"note": f"{size} ids for {rows} rows"})
    if subject.reference_tokenizer is not None:
        a, b = tokenizer.get_vocab(), subject.reference_tokenizer.get_vocab()
        common = [token for token in a if token in b]
        moved = [token for token in common if a[token] != b[token]]
        if len(moved) > 0.01 * max(len(common), 1):
            notes.append({"ids": [a[moved[0]]], "note": f"{len(moved)} of {len(common)} common tokens have another id"})
            return failed(f"{len(moved)} ids differ from the reference's", "1%", notes)
    text = "; ".join(item["note"] for item in notes)
    if len(notes) >= 2:
        return failed(text, "ids agree", notes)
    if notes:
        return warned(text, "ids agree", notes)
    return passed(f"BOS and EOS agree, {size} ids for {rows} rows", "ids agree")


def _leading(ids: list[int], token: int, pad: int | None) -> int:
    count = 0
    for i in ids:
        if i == token:
            count += 1
        elif i != pad or count:
            break
    return count


def _rows(subject: Subject) -> list[Any]:
    try:
        return subject.labelled_rows(50)
    except (NotApplicable, NotRun):
        return []


@check("double-bos", family="tokenizer", tier=0, catalogue="K3")
def double_bos(subject: Subject) -> Outcome:
    """A row begins with BOS twice.

    Symptom: slightly worse everywhere, since no row of pretraining began like that.
    Example: tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).
    Detected: BOS at the beginning of the rows that are trained on, of a tokenised conversation and of a plain text.
    Tolerance: one BOS.
    Spares: tokenizers without BOS; BOS that is also EOS or padding. A template that writes BOS under a tokenizer that
        adds it is fine as long as nobody encodes its text with special tokens.
    Fix: encode rendered text with add_special_tokens=False, or use apply_chat_template(tokenize=True).
    Sources: open-r1#462, vllm#27515, sglang#888, trl#3328.
    """
    subject.need("tokenizer")
    tokenizer = subject.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or bos in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise NotApplicable("the tokenizer has no BOS of its own")
    counts = {"a plain text": _leading(encode(tokenizer, "Hello", True), bos, None)}
    if getattr(tokenizer, "chat_template", None):
        ids = _conversation_ids(tokenizer)
        if ids:
            counts["a conversation"] = _leading(ids, bos, None)
    bad: list[dict[str, Any]] = [
        {"ids": [bos] * n, "note": f"{where} begins with {n}"} for where, n in counts.items() if n > 1
    ]
    rows = _rows(subject)
    for row in rows:
        if (n := _leading(row.input_ids, bos, tokenizer.pad_token_id)) > 1:
            text = decode(tokenizer, row.input_ids[:12])
            bad.append({"row": row.index, "position": 1, "ids": row.input_ids[:12], "text": text, "note": f"{n} BOS"})
    most = max([*counts.values(), *(_leading(r.input_ids, bos, tokenizer.pad_token_id) for r in rows)])
    if bad:
        return failed(f"{most} BOS at the beginning", "1", bad[:6])
    return passed(f"at most {most} BOS at the beginning of {len(counts) + len(rows)} rows", "1")


def _conversation_ids(tokenizer: Any) -> list[int]:
    for roles in (("user", "assistant"), ("user",)):
        messages = [{"role": role, "content": "Hello"} for role in roles]
        try:
            out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
            ids = out["input_ids"]
            return list(ids[0]) if ids and isinstance(ids[0], (list, tuple)) else list(ids)
        except Exception:  # a template may refuse this conversation
            continue
    return []


@check("missing-bos", family="tokenizer", tier=0, catalogue="K3")
def missing_bos(subject: Subject) -> Outcome:
    """Rows lack the BOS with which the model was trained.

    Symptom: perplexity of a pretrained model is absurd (Gemma: 5.9e9 instead of 3.46).
    Example: add_special_tokens=False on text that no template opens.
    Detected: the tokenizer puts BOS before a plain text, and the rows that are trained on do not begin with it.
    Tolerance: a tenth of the rows (packed and cut ones).
    Spares: tokenizers that do not add BOS by themselves (GPT-2, Qwen); packed rows; models trained from scratch.
        Where a template decides it is a warning: chat formats without BOS are in use.
    Fix: let the tokenizer add it, or put {{ bos_token }} at the beginning of the template.
    Sources: lm-eval#1465, #2049, transformers#29250.
    """
    subject.need("tokenizer")
    tokenizer, bos = subject.tokenizer, subject.tokenizer.bos_token_id
    if bos is None or _leading(encode(tokenizer, "Hello", True), bos, None) == 0:
        raise NotApplicable("the tokenizer adds no BOS by itself")
    if subject.is_scratch or subject.settings.get("packing"):
        raise NotApplicable("rows are packed, or the model starts from scratch")
    rows = _rows(subject)
    if not rows:
        raise NotApplicable("no rows given")
    without = [r for r in rows if _leading(r.input_ids, bos, tokenizer.pad_token_id) == 0]
    text, limit = f"{len(without)} of {len(rows)} rows do not begin with BOS", "10% of rows"
    if len(without) <= 0.1 * len(rows):
        return passed(text, limit)
    shown = [
        {"row": r.index, "position": 0, "ids": r.input_ids[:8], "text": decode(tokenizer, r.input_ids[:8])}
        for r in without[:3]
    ]
    return warned(text, limit, shown) if subject.is_chat else failed(text, limit, shown)


def _spoken(tokenizer: Any, text: str) -> str:
    """What the tokenizer's declared normaliser makes of a text: a change that is not a loss."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return normalizer.normalize_str(text) if normalizer is not None else text


def _splits_on_white(tokenizer: Any) -> bool:
    """The pre-tokeniser throws white space away by design (WordPiece, word level)."""
    try:
        state = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    except (AttributeError, ValueError):
        return False
    kinds = {state.get("type"), *(p.get("type") for p in state.get("pretokenizers", []))}
    return bool(kinds & {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}) and not kinds & {
        "ByteLevel",
        "Metaspace",
    }


def _is_same_text(tokenizer: Any, text: str, back: str) -> bool:
    """Equal, but for what normalisers and a dummy prefix are declared to do at the left edge."""
    marked = "\u2581"
    forms = {form.replace(marked, " ") for form in (text, _spoken(tokenizer, text))}
    return any(back.replace(marked, " ").lstrip(" ") == form.lstrip(" ") for form in forms)


@check("text-lost", family="tokenizer", tier=0, catalogue="K4")
def text_lost(subject: Subject) -> Outcome:
    """Encoding and decoding a text does not give it back.

    Symptom: generated code has no line breaks or indents; spaces before punctuation vanish in answers.
    Example: a newline that pre-tokenisation throws away; a control token declared with lstrip and rstrip.
    Detected: a torture set (line breaks, tabs, indents, CRLF, trailing blanks, joined emoji, accents in both forms,
        right to left, digits, code), the user's own rows, and text around each control token go there and back.
    Tolerance: what the vocabulary can spell must come back; the normaliser's declared changes do not count.
    Spares: characters that the vocabulary lacks (counted), a dummy prefix, NFKC and lower-casing normalisers,
        tokenizers that split on white space by design (a warning), tokens that strip on one side.
    Fix: keep white space in the pre-tokeniser and decoder; declare special tokens without lstrip and rstrip.
    Sources: transformers#21120, #24569, #33371, tokenizers#959.
    """
    subject.need("tokenizer")
    tokenizer = subject.tokenizer
    unknown, samples = 0, dict(TORTURE)
    lost: list[dict[str, Any]] = []
    own = [str(v) for row in subject.rows[:40] for v in row.values() if isinstance(v, str)]
    own += [
        str(m.get("content")) for row in subject.rows[:40] for m in row.get("messages") or [] if isinstance(m, dict)
    ]
    samples |= {f"row text {k}": text[:400] for k, text in enumerate(own[:60]) if text}
    for name, text in samples.items():
        ids = encode(tokenizer, text)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            unknown += 1
            continue
        back = decode(tokenizer, ids)
        if not _is_same_text(tokenizer, text, back):
            at = next(
                (i for i, (x, y) in enumerate(zip(text, back, strict=False)) if x != y), min(len(text), len(back))
            )
            start = max(0, at - 12)
            note = f"{name}: comes back otherwise from character {at} on"
            lost.append(
                {
                    "position": at,
                    "ids": ids[:8],
                    "text": f"{text[start : at + 12]} -> {back[start : at + 12]}",
                    "note": note,
                }
            )
    stripped = _stripping_tokens(tokenizer)
    text = f"{len(lost)} of {len(samples) - unknown} samples come back otherwise"
    text += f"; {unknown} hold characters outside the vocabulary" if unknown else ""
    if stripped:
        return failed(
            f"{text}; white space around {stripped[0]['note'].split()[0]} is eaten", "0", [*stripped, *lost[:4]]
        )
    if lost:
        is_own = any(item["note"].startswith("row text") for item in lost)
        if _splits_on_white(tokenizer) and not is_own:
            return warned(text, "0", lost[:5], "this tokenizer splits on white space: line breaks cannot be learned")
        return failed(text, "0", lost[:6])
    if unknown == len(samples):
        raise NotRun("no sample can be spelled by this vocabulary")
    return passed(text, "0")


def _stripping_tokens(tokenizer: Any) -> list[dict[str, Any]]:
    """Control tokens that eat white space on both sides of them."""
    found = []
    for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if not (getattr(token, "lstrip", False) and getattr(token, "rstrip", False)):
            continue
        text = f"a \n{token}\n b"
        back = decode(tokenizer, encode(tokenizer, text))
        if back != text and str(token) != getattr(tokenizer, "mask_token", None):
            found.append({"ids": [token_id], "note": f"{token} strips both sides", "text": f"{text} -> {back}"})
    return found


def _fingerprint(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    return {
        "ids": [encode(tokenizer, text) for text in texts],
        "with special tokens": encode(tokenizer, "Hello", True),
        "special ids": {k: getattr(tokenizer, f"{k}_id") for k in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "control tokens": special_texts(tokenizer),
        "chat template": getattr(tokenizer, "chat_template", None),
        "padding side": tokenizer.padding_side,
        "vocabulary size": len(tokenizer),
    }


@check("tokenizer-changes-on-reload", family="tokenizer", tier=0, catalogue="K4")
def tokenizer_changes_on_reload(subject: Subject) -> Outcome:
    """The tokenizer that is saved is not the one that comes back.

    Symptom: the published model answers worse than the one that was evaluated.
    Example: a chat template that is not saved; a change of the backend that only lives in memory.
    Detected: save_pretrained and from_pretrained in a temporary folder: ids of a torture set, special ids, template.
    Tolerance: none.
    Spares: fields that say where a tokenizer came from.
    Fix: make the change before saving through the tokenizer's own methods, and save the template with it.
    Sources: transformers#25814, LlamaFactory#5232, llama-cpp-rs#1096.
    """
    subject.need("tokenizer")
    tokenizer = subject.tokenizer
    if not hasattr(tokenizer, "save_pretrained"):
        raise NotApplicable("the tokenizer cannot be saved")
    texts = [*TORTURE.values(), *special_texts(tokenizer)[:20]]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            loaded = _load(tokenizer, folder)
        except Exception as error:
            note = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
            return failed("what was saved cannot be loaded", "equal", [{"note": note}])
    a, b = _fingerprint(tokenizer, texts), _fingerprint(loaded, texts)
    bad = [key for key in a if a[key] != b[key]]
    evidence: list[dict[str, Any]] = []
    for key in bad:
        if key == "ids":
            k = next(k for k in range(len(texts)) if a["ids"][k] != b["ids"][k])
            evidence.append({"ids": b["ids"][k][:12], "text": texts[k], "note": f"was {a['ids'][k][:12]}"})
        elif key == "chat template":
            evidence.append({"note": "the chat template is another one" if b[key] else "the chat template is gone"})
        else:
            evidence.append({"note": f"{key}: {a[key]!r} -> {b[key]!r}"[:200]})
    if bad:
        return failed(f"{', '.join(bad)} changed", "equal", evidence)
    return passed(f"{len(texts)} texts, special ids and template are the same", "equal")


def _load(tokenizer: Any, folder: str) -> Any:
    from transformers import AutoTokenizer

    config = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "auto_map" in config or type(tokenizer).__module__.startswith("transformers_modules"):
        return type(tokenizer).from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@check("tokenizer-differs-from-reference", family="tokenizer", tier=0, catalogue="K4")
def tokenizer_differs_from_reference(subject: Subject) -> Outcome:
    """Texts have other ids than under the parent's tokenizer.

    Symptom: a fine-tuned model starts far above its parent's loss.
    Example: another pre-tokeniser expression after a conversion; digits split otherwise.
    Detected: ids of a torture set and of the user's rows under this tokenizer and that of --reference.
    Tolerance: none.
    Spares: tokens that were added; a message that a library prints says nothing, only ids do.
    Fix: use the parent's tokenizer.json and add tokens to it.
    Sources: transformers#42131, #42591, Tokenicer#61.
    """
    subject.need("tokenizer", "reference_tokenizer")
    mine, theirs = subject.tokenizer, subject.reference_tokenizer
    added = [t for t in special_texts(mine) if t not in theirs.get_vocab()]
    texts = {**TORTURE, **{f"row text {k}": text for k, text in enumerate(own_texts(subject))}}
    bad = []
    for name, text in texts.items():
        a, b = encode(mine, text), encode(theirs, text)
        if a != b and not any(t in text for t in added):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            bad.append(
                {"position": at, "ids": a[:12], "text": text[:60], "note": f"{name}: the reference has {b[:12]}"}
            )
    if bad:
        return failed(f"{len(bad)} of {len(texts)} texts have other ids", "0", bad[:5])
    return passed(f"{len(texts)} texts have the reference's ids", "0")
