"""What of a tokenizer GGUF can carry: a byte-level BPE whose pre-tokeniser llama.cpp knows by name.

Owns the names, and what is written about tokens, merges, BOS and where an answer ends.

    vocabulary = vocabulary_of(model, tokenizer);  vocabulary.add_to(writer)

Refuses by name what would give other ids. Leaves out SentencePiece, which llama.cpp's own converter takes.
"""

import dataclasses
import json
from typing import Any

from tokenizers import normalizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UserError
from ..data.tokenizer import QWEN2_SPLIT, bos_id

LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


# llama.cpp's name -> the steps in tokenizers' words; its regexes of that name do the same
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [_split(QWEN2_SPLIT), _bytes(False)],
    "llama-bpe": [_split(LLAMA3_SPLIT), _bytes(False)],
    "gpt-2": [_bytes(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(True)],
}
IGNORE_MERGES = {"llama-bpe"}  # llama.cpp takes a word that is a token as it is, there only
# options of tokenizers' BPE that llama.cpp does not have, and the values that mean "off"
BPE_OFF: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
}
# texts that llama.cpp ends an answer at wherever they are a token (its `special_eog_ids`), whatever the file says
ENDS_BY_TEXT = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>".split()
)


class Refused(UserError):
    """GGUF, as we write it, cannot hold this; llama.cpp's own converter may."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`kinds` are gguf's TokenType; `ends[0]` is EOS, two more have a place as end of turn and of message."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    bos: int
    pad: int | None
    ends: list[int]
    adds_bos: bool
    adds_eos: bool
    template: str | None

    @property
    def more_ends(self) -> list[str]:
        """Tokens that llama.cpp ends at by their text, and the model does not."""
        return [token for i, token in enumerate(self.tokens) if token in ENDS_BY_TEXT and i not in self.ends]

    def add_to(self, writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos)
        for add, token_id in zip(
            (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), self.ends, strict=False
        ):
            add(token_id)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.template:
            writer.add_chat_template(self.template)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json; raises Refused for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Refused(f"to='gguf': {type(tokenizer).__name__} is written in Python and has no tokenizer.json")
    return json.loads(backend.to_str())


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One after another, without what is not about ids."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _shown(steps: list[dict[str, Any]]) -> str:
    names = [f"{s['type']}({json.dumps(s['pattern'])[:60]})" if "pattern" in s else s["type"] for s in steps]
    return " + ".join(names) or "none"


def pre_tokenizer_name(state: dict[str, Any]) -> str:
    """As llama.cpp calls what splits the text; raises Refused for what it does not know, char-level included."""
    kind = state["model"]["type"]
    if kind == "WordLevel":
        raise Refused(
            "to='gguf': llama.cpp has no word-level tokenizer, so a char-level model cannot become GGUF; "
            "train with tokenizer_type: bpe"
        )
    steps = _steps(state["pre_tokenizer"])
    if kind != "BPE" or not any(step["type"] == "ByteLevel" for step in steps):
        raise Refused(f"to='gguf': the tokenizer is {kind} with pre-tokeniser {_shown(steps)}; allowed: byte-level BPE")
    name = next((name for name, known in PRE_TOKENIZERS.items() if steps == known), None)
    if name is None:
        raise Refused(
            f"to='gguf': llama.cpp knows no pre-tokeniser {_shown(steps)} by name; allowed: those of "
            f"{', '.join(PRE_TOKENIZERS)} (llmkit trains qwen2's)"
        )
    return name


def normalizer_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """NFC where the tokenizer composes accents first: llama.cpp does without, whoever wrote the file."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return "NFC" if backend is not None and isinstance(backend.normalizer, normalizers.NFC) else None


def _check_options(state: dict[str, Any], pre: str) -> None:
    """Raises Refused naming the option; NFC may be lacking, and is told."""
    normalizer = state["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise Refused(f"to='gguf': llama.cpp has no normaliser {normalizer['type']} before a byte-level BPE")
    model = state["model"]
    for key, off in BPE_OFF.items():
        if model.get(key) not in off:
            raise Refused(f"to='gguf': the tokenizer's {key}={model[key]!r} has no GGUF equivalent")
    ignores = bool(model.get("ignore_merges"))
    if ignores != (pre in IGNORE_MERGES):
        raise Refused(f"to='gguf': ignore_merges={ignores} goes with no pre-tokeniser {pre} in llama.cpp")
    for token in state["added_tokens"]:
        for key in ("lstrip", "rstrip", "single_word"):
            if token[key]:
                raise Refused(f"to='gguf': {key} of the added token {token['content']!r} has no GGUF equivalent")


def adds_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text opens with BOS, and closes with EOS. Raises Refused where anything else is added."""
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for front in ([], [tokenizer.bos_token_id]):
        for back in ([], [tokenizer.eos_token_id]):
            if ids == [*front, *bare, *back]:
                return bool(front), bool(back)
    added = tokenizer.convert_ids_to_tokens([i for i in ids if i not in bare])
    raise Refused(f"to='gguf': the tokenizer adds {added} around a text; GGUF can say BOS before it and EOS behind it")


def ends_of_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where `generate` ends, the tokenizer's EOS first where it is among them."""
    given = model.generation_config.eos_token_id if model.generation_config else None
    ends = given if isinstance(given, list) else [tokenizer.eos_token_id if given is None else given]
    return sorted(dict.fromkeys(ends), key=lambda i: i != tokenizer.eos_token_id)


def vocabulary_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Raises Refused for whatever would give llama.cpp other ids, or another end, than ours."""
    import gguf

    state = backend_of(tokenizer)
    pre = pre_tokenizer_name(state)
    _check_options(state, pre)
    adds_bos, adds_eos = adds_around(tokenizer)
    num_rows = model.get_input_embeddings().weight.shape[0]
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(names) >= num_rows:
        raise UserError(f"the tokenizer has ids up to {max(names)}, the model {num_rows} rows of embeddings")
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    tokens, kinds = [], []
    for i in range(num_rows):  # rows that no token has: embeddings rounded up to a round number
        kind = gguf.TokenType.NORMAL if i in names else gguf.TokenType.UNUSED
        if i in added:
            kind = gguf.TokenType.CONTROL if added[i] else gguf.TokenType.USER_DEFINED
        tokens.append(names.get(i, f"[PAD{i}]"))
        kinds.append(int(kind))
    ends = ends_of_generation(model, tokenizer)
    if len(ends) > 3:
        raise Refused(f"to='gguf': generation ends at {len(ends)} tokens; GGUF has room for three: EOS, EOT, EOM")
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        raise Refused(f"to='gguf': the tokenizer has several chat templates ({', '.join(template)}); keep one")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    return Vocabulary(
        pre, tokens, kinds, merges, bos_id(tokenizer), tokenizer.pad_token_id, ends, adds_bos, adds_eos, template
    )
