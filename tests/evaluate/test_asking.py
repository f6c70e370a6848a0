"""How models are asked is decided once, from their own files, and the same for all of them."""

import pytest
import tiny

from llmkit.config import UserError
from llmkit.evaluate.asking import decide
from llmkit.evaluate.columns import Column


def column(name, parent=None):
    return Column(name, "", None, parent, "", 0)


BASE, SFT, OTHER = column("base"), column("sft", "base"), column("other")


def with_template(template):
    tokenizer = tiny.bpe_tokenizer(chat=False)
    tokenizer.chat_template = template
    return tokenizer


def test_a_base_is_asked_in_the_template_of_its_child():
    tokenizers = {"base": tiny.bpe_tokenizer(chat=False), "sft": tiny.bpe_tokenizer(bos=True)}
    asking = decide([BASE, SFT], tokenizers, None)
    assert asking.lenders == {"base": "sft"} and asking.hashes["base"] == asking.hashes["sft"]
    assert tokenizers["base"].chat_template == tiny.CHATML
    assert asking.ends == {"base": "<|im_end|>", "sft": "<|im_end|>"}
    assert asking.bos == {"base": None, "sft": "<s>"}
    assert asking.is_chat("generate_until") and not asking.is_chat("multiple_choice")
    assert asking.notes == ["base has no chat template and is asked in that of sft"]


def test_the_child_lends_before_a_stranger():
    strange = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizers = {"base": with_template(None), "other": with_template(strange), "sft": with_template(tiny.CHATML)}
    assert decide([BASE, OTHER, SFT], tokenizers, None).lenders == {"base": "sft"}


def test_nobody_is_asked_as_a_chat_where_one_cannot_be():
    foreign = "{% for m in messages %}<|turn|>{{ m['content'] }}<|over|>{% endfor %}"
    tokenizers = {"base": with_template(None), "sft": with_template(foreign)}
    asking = decide([BASE, SFT], tokenizers, None)
    assert not asking.templates and not asking.is_chat("generate_until")
    assert asking.notes == ["base cannot be asked as a chat, so nobody is"]
    assert tokenizers["base"].chat_template is None
    with pytest.raises(UserError, match="base has no chat template, and its vocabulary lacks the tokens"):
        decide([BASE, SFT], tokenizers, True)


def test_everyone_keeps_a_template_of_its_own():
    other = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizers = {"sft": with_template(tiny.CHATML), "other": with_template(other)}
    asking = decide([SFT, OTHER], tokenizers, None)
    assert not asking.lenders and len(set(asking.hashes.values())) == 2


def test_true_asks_all_tasks_as_chats_and_false_none():
    tokenizers = {"sft": tiny.bpe_tokenizer()}
    assert decide([SFT], tokenizers, True).is_chat("multiple_choice")
    assert not decide([SFT], tokenizers, False).is_chat("generate_until")
    with pytest.raises(UserError, match="none of the models has a chat template"):
        decide([BASE], {"base": tiny.bpe_tokenizer(chat=False)}, True)
