"""Tokenizers: byte-level BPE and char-level, trained here, saved as ordinary fast tokenizers.

Owns training and loading. Both kinds keep every character: decode(encode(text)) == text, except that a char-level
tokenizer maps characters it never saw to <|unk|>.

    tokenizer = train_bpe(texts, vocab_size=1024); tokenizer.save_pretrained(folder)

The BPE splits text exactly as Qwen2 does (without its NFC step, which would change text), so that llama.cpp knows the
pre-tokeniser by name ("qwen2"). A char-level vocabulary cannot become GGUF. Leaves out how good a tokenizer is.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..config import UserError

BOS, EOS, PAD, UNK = "<|bos|>", "<|endoftext|>", "<|pad|>", "<|unk|>"
CHAT = ["<|im_start|>", "<|im_end|>"]  # reserved from the start, so that chat tuning never resizes the model
SPECIAL = [BOS, EOS, PAD, *CHAT]

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wrap(
    core: Tokenizer, special: list[str], control: Sequence[str], unk_token: str | None = None
) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=unk_token,
        extra_special_tokens=list(control),
        clean_up_tokenization_spaces=False,
        padding_side="left",  # for batched generation; training rows are packed and never padded by the tokenizer
    )


def train_bpe(texts: Iterable[str], vocab_size: int, control: Sequence[str] = CHAT) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` ids, special tokens first; raises UserError below 256 bytes + specials.

    `control`: special tokens besides BOS, EOS and padding.
    """
    special = [BOS, EOS, PAD, *control]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size={vocab_size} is too small; allowed: at least {smallest} (256 bytes + special tokens)"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return _wrap(core, special, control)


def train_char(texts: Iterable[str], control: Sequence[str] = CHAT) -> PreTrainedTokenizerFast:
    """One id per character seen, in code point order, after the special tokens."""
    special = [BOS, EOS, PAD, *control, UNK]
    chars = sorted({char for text in texts for char in set(text)})
    vocab = {token: i for i, token in enumerate([*special, *chars])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return _wrap(core, special, control, unk_token=UNK)


def add_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Opens every text with BOS, as the model will see it in training, wherever the saved tokenizer is used."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )


def train_tokenizer(
    kind: str, texts: Iterable[str], vocab_size: int, opens_with_bos: bool, control: Sequence[str] = CHAT
) -> PreTrainedTokenizerFast:
    """As recipes say it: `tokenizer_type` bpe or char; a char-level one has as many ids as there are characters."""
    made = train_char(texts, control) if kind == "char" else train_bpe(texts, vocab_size, control)
    if opens_with_bos:
        add_bos(made)
    return made


def load_tokenizer(
    name_or_path: str, trust_remote_code: bool = False, key: str = "tokenizer_name", revision: str = "main"
) -> PreTrainedTokenizerBase:
    """Any Hub or local tokenizer; raises UserError when there is none, or when it has no EOS to end documents with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{key}={name_or_path!r}: no tokenizer could be loaded ({str(error).splitlines()[0]}); "
            "give a folder with tokenizer.json or a Hub id that is in reach"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer_name={name_or_path!r}: has no eos_token, so documents could not be ended; set one")
    return tokenizer


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that opens a document: BOS, or EOS for tokenizers that have no BOS (Qwen, GPT-2 style)."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides ids: vocabulary, merges, splitting, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = repr(sorted(tokenizer.get_vocab().items()))
    if backend is not None:  # less what is not about the text: padding, truncation, added BOS
        core = json.dumps(json.loads(backend.to_str()) | {"padding": None, "truncation": None, "post_processor": None})
    return hashlib.sha256(f"{core}{tokenizer.special_tokens_map}".encode()).hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
