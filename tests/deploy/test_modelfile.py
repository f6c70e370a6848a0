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
OPEN_BRACE = "{% for m in messages %}{{ m['role'] + ': {' }}{{ m['content'] }}{{ '}\n' }}{% endfor %}"
THREE_QUOTES = "{% for m in messages %}{{ m['role'] + ': \"\"\"' }}{{ m['content'] }}{{ '\"\"\"' }}{% endfor %}"
NO_BREAK = (
    "{% for m in messages %}{{ m['role'] }}\u00a0{{ m['content'] }}\u200b\t\U0001f469\u200d\U0001f680\n{% endfor %}"
)
ROWS = {
    "chatml": CHATML, "mistral": MISTRAL, "llama3": LLAMA3, "braces": BRACES, "open brace": OPEN_BRACE,
    "three quotes": THREE_QUOTES, "no-break": NO_BREAK,
}  # fmt: skip
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


ACTION = re.compile(r'\{\{ (range \.Messages|(?:else )?if eq \.Role "\w+"|\.Content|end|"(?:[^"\\]|\\.)*") \}\}')


def pieces_of(template):
    """As Go reads it: text up to the first two braces, then an action, which must be one of those that we write."""
    while template:
        text, braces, rest = template.partition("{{")
        yield "text", text
        action = ACTION.match(braces + rest) if braces else None
        assert action or not braces, f"unexpected in action: {rest[:20]!r}"
        yield "action", action[1] if action else ""
        template = (braces + rest)[action.end() :] if action else ""


def go(template, messages):
    """A head, `range .Messages`, in it a case for each role, two times `end`, a tail."""
    pieces = list(pieces_of(template))
    start = pieces.index(("action", "range .Messages"))
    end = len(pieces) - pieces[::-1].index(("action", "end"))
    by_role = {}
    for piece in pieces[start + 1 : end - 1]:
        if case := re.search(r'if eq \.Role "(\w+)"', piece[1]) if piece[0] == "action" else None:
            role = by_role[case[1]] = []
        elif by_role:
            role.append(piece)
    turns = [write(by_role[m["role"]], m["content"]) for m in messages]
    return write(pieces[:start]) + "".join(turns) + write(pieces[end:])


def write(pieces, content=None):
    def one(kind, text):
        if kind == "text":
            return text
        if text == ".Content":
            return content
        text = re.sub(r"\\U(\w{8})", lambda m: chr(int(m[1], 16)), text[1:-1]) if text.startswith('"') else ""
        return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text)

    return "".join(one(*piece) for piece in pieces)


def template_in(text):
    """What Ollama's parser makes of the file: what cannot be printed is dropped, and nothing is unescaped."""
    found = re.search(r'TEMPLATE """(.*?)"""\n', text, re.S)
    return found and "".join(c for c in found[1] if c.isprintable() or c in "\t\r\n")


@pytest.mark.parametrize("jinja", ROWS.values(), ids=ROWS)
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
    assert any("writes no <s>, and llama.cpp adds one" in note for note in notes) == (
        "<s>" not in expected and adds_bos
    )


@pytest.mark.parametrize(
    "jinja", [DEFAULT_SYSTEM, LAST_IS_OPEN, "{{ messages[-1]['content'] }}", "{{ raise_exception('') }}"]
)
def test_a_template_that_is_no_row_of_turns_is_left_out_and_told(jinja):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = jinja
    text, notes = modelfile("m.gguf", tokenizer, ENDS, False, None)
    assert template_in(text) is None and "more than a row of turns" in notes[0]
    assert text == 'FROM ./m.gguf\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'


def test_a_stop_is_written_as_it_is():
    """Ollama takes what is between the outer quotes, and unescapes nothing."""
    text, _ = modelfile("m.gguf", bpe(None), ['a "b"', "back\\slash", "\n"], False, None)
    assert text.endswith('PARAMETER stop "a "b""\nPARAMETER stop "back\\slash"\nPARAMETER stop "\n"\n')


def test_a_model_without_chat_continues_its_prompt_and_context_is_told():
    text, notes = modelfile("m.gguf", bpe(None), ["<|endoftext|>"], True, 256)
    assert notes == []
    assert (
        text == 'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 256\n'
    )
