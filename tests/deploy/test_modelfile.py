"""TEMPLATE renders what apply_chat_template does, or is not there. Go's constructs are rendered by a few lines here."""

import re

import pytest
from exported import bpe
from tiny import bpe_tokenizer

from llmkit.check.conversations import render
from llmkit.data.template import CHATML
from llmkit.deploy.modelfile import modelfile

ENDS = ["<|im_end|>", "<|endoftext|>"]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% else %}{{ raise_exception('no') }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|end|>\n\n{% endif %}"
)
BRACES = (
    "{% for m in messages %}{{ '{{' + m['role'] + '}} \"é' }}{{ m['content'] }}{{ '\"\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}You are X.\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
)
LAST_IS_OPEN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '' if loop.last else '|' }}{% endfor %}"
CHATS = [
    [("user", 'Hi {{ .Role }} "q" <d>&\'')],
    [("user", "a\nb"), ("assistant", "c"), ("user", "d")],
    [("system", "be é"), ("user", "u"), ("assistant", "a"), ("user", "v")],
]


def go(template, messages):
    """`range .Messages`, in it `if eq .Role "x"`, `else if` and `end`; .Content and quoted strings."""

    def text(part, message=None):
        part = re.sub(r"\{\{ \.Content \}\}", lambda _: message["content"], part)
        return re.sub(r'\{\{ "((?:[^"\\]|\\.)*)" \}\}', lambda m: re.sub(r"\\(.)", unescape, m[1]), part)

    def unescape(match):
        return {"n": "\n"}.get(match[1], match[1])

    head, body, tail = re.fullmatch(
        r"(?s)(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template
    ).groups()
    cases = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body)
    by_role = dict(zip(cases[1::2], cases[2::2], strict=True))
    return text(head) + "".join(text(by_role[m["role"]], m) for m in messages) + text(tail)


def template_in(text):
    found = re.search(r'TEMPLATE """(.*?)"""\n', text, re.S)
    return found and found[1]


@pytest.mark.parametrize("jinja", [CHATML, MISTRAL, LLAMA3, BRACES], ids=["chatml", "mistral", "llama3", "braces"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_template_renders_as_jinja_does(jinja, adds_bos):
    tokenizer = bpe_tokenizer(bos=True)
    tokenizer.chat_template = jinja
    text, notes = modelfile("m.gguf", tokenizer, ENDS, adds_bos, 128)
    template, seen = template_in(text), 0
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        try:
            expected = render(tokenizer, messages, True)
        except Exception:
            continue
        found, seen = go(template, messages), seen + 1
        assert ("<s>" if adds_bos and expected.startswith("<s>") else "") + found == expected
    assert seen >= 2
    assert any("trims messages" in note for note in notes) == (jinja == LLAMA3)
    assert any("writes no <s>, and llama.cpp adds one" in note for note in notes) == (jinja == BRACES and adds_bos)


@pytest.mark.parametrize(
    "jinja", [DEFAULT_SYSTEM, LAST_IS_OPEN, "{{ messages[-1]['content'] }}", "{{ raise_exception('') }}"]
)
def test_a_template_that_is_no_row_of_turns_is_left_out_and_told(jinja):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = jinja
    text, notes = modelfile("m.gguf", tokenizer, ENDS, False, None)
    assert template_in(text) is None and "more than a row of turns" in notes[0]
    assert text == 'FROM ./m.gguf\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'


def test_three_quotes_cannot_be_said():
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = '{% for m in messages %}{{ m[\'role\'] }}: """{{ m[\'content\'] }}"""{% endfor %}'
    text, notes = modelfile("m.gguf", tokenizer, ENDS, False, None)
    assert template_in(text) is None and '"""' in notes[0]


def test_a_model_without_chat_continues_its_prompt_and_context_is_told():
    text, notes = modelfile("m.gguf", bpe(None), ["<|endoftext|>"], True, 256)
    assert notes == []
    assert (
        text == 'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 256\n'
    )
