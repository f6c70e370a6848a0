"""BOS at the beginning of texts, conversations and the rows that are trained on: once, where the model is used to it.

Owns the tier-0 checks K3, of the family `tokenizer`. Leaves out the other end (`rows.py`).
"""

from typing import Any

from .conversations import conversation
from .runner import Outcome, check, failed, passed, warned
from .spans import decode
from .subject import LabelledRow, NotApplicable, NotRun, Subject
from .torture import encode


def trained_rows(subject: Subject) -> list[LabelledRow]:
    """Up to 50 rows as the loss sees them; none where there are none to be had."""
    try:
        return subject.labelled_rows(50)
    except (NotApplicable, NotRun):
        return []


def leading(ids: list[int], token: int, pad: int | None) -> int:
    """How often `token` stands at the beginning, behind padding."""
    count = 0
    for i in ids:
        if i == token:
            count += 1
        elif i != pad or count:
            break
    return count


def conversation_ids(tokenizer: Any) -> list[int]:
    """A conversation as apply_chat_template tokenises it; empty where the template takes none."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        messages, _ = conversation(tokenizer)
        out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    except Exception:  # a template may refuse every conversation: its own checks say so
        return []
    ids = out["input_ids"]
    return list(ids[0]) if ids and isinstance(ids[0], (list, tuple)) else list(ids)


def _begins_answer(row: LabelledRow, bos: int) -> int | None:
    """Where a BOS stands at the border of a masked prompt and its answer, in a row that begins with BOS."""
    first = next((t for t, label in enumerate(row.labels) if label != -100), 0)
    places = [t for t in (first - 1, first) if 0 < t < len(row.input_ids) and row.input_ids[t] == bos]
    return places[0] if places and first > 1 and row.input_ids[0] == bos else None


@check("double-bos", family="tokenizer", tier=0, catalogue="K3")
def double_bos(subject: Subject) -> Outcome:
    """A row begins with BOS twice, or its answer begins with another one.

    Symptom: slightly worse everywhere, since no row of pretraining began like that.
    Example: tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)); prompt and answer encoded one by one.
    Detected: BOS at the beginning of the rows that are trained on, of a tokenised conversation and of a plain text; and
        between a masked prompt and its answer.
    Tolerance: one BOS.
    Spares: tokenizers without BOS; in rows, a BOS that is also EOS or padding; templates that write BOS before every
        turn. A template that writes BOS under a tokenizer that adds it is fine as long as nobody encodes its text with
        special tokens.
    Fix: encode rendered text with add_special_tokens=False, or use apply_chat_template(tokenize=True).
    Sources: open-r1#462, vllm#27515, sglang#888, trl#3328, axolotl#1616.
    """
    subject.need("tokenizer")
    tokenizer = subject.tokenizer
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    if bos is None:
        raise NotApplicable("the tokenizer has no BOS")
    chat = conversation_ids(tokenizer)
    counts = {"a plain text": leading(encode(tokenizer, "Hello", True), bos, None)}
    counts |= {"a conversation": leading(chat, bos, None)} if chat else {}
    bad: list[dict[str, Any]] = [
        {"ids": [bos] * n, "note": f"{where} begins with {n} BOS"} for where, n in counts.items() if n > 1
    ]
    rows = [] if bos in (tokenizer.eos_token_id, pad) else trained_rows(subject)
    repeats = chat.count(bos) > 1
    for row in rows:
        number, at = leading(row.input_ids, bos, pad), _begins_answer(row, bos)
        if number > 1:
            position, shown, note = 1, row.input_ids[:12], f"{number} BOS"
        elif at is not None and not repeats:
            position, shown, note = at, row.input_ids[at - 4 : at + 4], "the answer begins with another BOS"
        else:
            continue
        text = decode(tokenizer, shown)
        bad.append({"row": row.index, "position": position, "ids": shown, "text": text, "note": note})
    looked = len(counts) + len(rows)
    if bad:
        return failed(f"{len(bad)} of {looked} texts and rows have a BOS too many", "1", bad[:6])
    most = max([*counts.values(), *(leading(r.input_ids, bos, pad) for r in rows)])
    return passed(f"at most {most} BOS at the beginning of {looked} texts and rows", "1")


@check("missing-bos", family="tokenizer", tier=0, catalogue="K3")
def missing_bos(subject: Subject) -> Outcome:
    """Rows lack the BOS with which the model was trained.

    Symptom: perplexity of a pretrained model is absurd (Gemma: 5.9e9 instead of 3.46).
    Example: add_special_tokens=False on text that no template opens.
    Detected: the tokenizer (or that of --reference) puts BOS before a plain text, and the rows that are trained on do
        not begin with it.
    Tolerance: a tenth of the rows.
    Spares: tokenizers that do not add BOS by themselves (GPT-2, Qwen); models trained from scratch; packed rows and
        chunks of one length, which begin anywhere (a warning where none of them holds a BOS). A template without BOS
        is a warning: such chat formats are in use.
    Fix: let the tokenizer add it, or put {{ bos_token }} at the beginning of the template.
    Sources: lm-eval#1465, #2049, transformers#29250.
    """
    subject.need("tokenizer")
    tokenizer, bos, pad = subject.tokenizer, subject.tokenizer.bos_token_id, subject.tokenizer.pad_token_id
    limit = "10% of rows"
    parent = subject.reference_tokenizer
    adds = bos is not None and leading(encode(tokenizer, "Hello", True), bos, None) > 0
    was = parent.bos_token_id if parent is not None else None
    if not adds and was is not None and leading(encode(parent, "Hello", True), was, None):
        note = "the reference's tokenizer puts BOS before a text, this one does not"
        return failed("the tokenizer adds no BOS any more", "BOS as in the reference", [{"note": note}])
    if not adds:
        raise NotApplicable("the tokenizer adds no BOS by itself")
    if subject.is_scratch:
        raise NotApplicable("the model starts from scratch: it has no habit yet")
    rows = [row for row in trained_rows(subject) if row.input_ids]
    if not rows:
        raise NotApplicable("no rows given")
    is_cut = bool(subject.settings.get("packing")) or (len(rows) > 1 and len({len(r.input_ids) for r in rows}) == 1)
    without = [r for r in rows if leading(r.input_ids, bos, pad) == 0]
    if is_cut and any(bos in row.input_ids for row in rows):
        without = []
    text = f"{len(without)} of {len(rows)} rows do not begin with BOS"
    if len(without) <= 0.1 * len(rows):
        return passed(text, limit)
    shown = [
        {"row": r.index, "position": 0, "ids": r.input_ids[:8], "text": decode(tokenizer, r.input_ids[:8])}
        for r in without[:3]
    ]
    is_template = subject.is_chat and not leading(conversation_ids(tokenizer), bos, None)
    return warned(text, limit, shown) if is_cut or is_template else failed(text, limit, shown)
