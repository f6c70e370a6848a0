"""Every chat template in TRL's wheel, under three kinds of tokenizers: nothing fails that a reader would dispute."""

import importlib.util
import re
from pathlib import Path

import pytest
from tiny import CORPUS, bpe_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmkit.check import runner
from llmkit.check.attach import from_parts
from llmkit.check.conversations import turn_ends

trl = importlib.util.find_spec("trl")
FOLDER = Path(trl.origin).parent / "chat_templates" if trl and trl.origin else Path()
TEMPLATES = sorted(FOLDER.glob("*.jinja"))
LITERAL = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|>|<(?:start|end)_of_(?:turn|utterance)>|</?s>|<[｜|][^<>\s'\"{}]{1,40}[｜|]>|<turn\|>|<\|turn>"
)
# what a reader of the template agrees with: template -> checks
AGREED: dict[str, set[str]] = {}


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: unigram over words and characters, a dummy prefix, BOS by the post-processor."""
    characters = sorted({c for text in CORPUS for c in text} | {chr(i) for i in range(32, 127)} | {"\n", "\u2581"})
    words = sorted({f"\u2581{w}" for text in CORPUS for w in re.findall(r"\w+", text)})
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((w, -3.0) for w in words)]
    vocabulary += [(c, -8.0) for c in characters if c != " "]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def char_tokenizer() -> PreTrainedTokenizerFast:
    characters = ["<unk>", "<eos>", *(chr(i) for i in range(32, 127)), "\n", "\t"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", bos_token="<eos>")


@pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")
@pytest.mark.parametrize("make", [bpe_tokenizer, metaspace_tokenizer, char_tokenizer], ids=["bpe", "unigram", "char"])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_nothing_disputable_fails(path, make):
    tokenizer = make()
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    literals = sorted(set(LITERAL.findall(tokenizer.chat_template)))
    tokenizer.add_special_tokens({"extra_special_tokens": literals})
    ends = turn_ends(tokenizer)
    if ends and "eos_token" not in tokenizer.chat_template:  # whoever ships a template makes its end of turn the EOS
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(ends))
    report = runner.run(from_parts(tokenizer=tokenizer, chat=True), runner.Selection(only=("tokenizer", "template")))
    fails = {c.id: (c.measured, c.evidence) for c in report.checks if c.status == "fail"}
    assert fails.keys() <= AGREED.get(path.stem, set()), fails
    assert not [c for c in report.checks if "crashed" in c.measured]
