"""Checks of chat templates: clean but unusual ones do not fail."""

import pytest
from tiny import CHATML, arguments, bpe_tokenizer, chat_rows, llama

from llmkit.check import runner
from llmkit.check.attach import from_parts
from llmkit.check.conversations import conversation, own_conversation, turn_ends, written_by_template

PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GEMMA = (  # no system role, roles must alternate, assistant is model, contents are trimmed
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
MISTRAL = (  # the system prompt goes into the first user's turn
    "{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.s = m['content'] ~ '\n\n' %}"
    "{% elif m['role'] == 'user' %}[INST] {{ ns.s }}{{ m['content'] }} [/INST]{% set ns.s = '' %}"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
QWEN3 = (  # thinks: past turns lose their think block, the last one gets an empty one
    "{% for m in messages %}{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    + PROMPT
)
PREFILL = PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
HARMONY = (  # <|im_end|> delimits, </s> stops
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant<|channel|>final\n{{ m['content'] }}"
    "{{ '</s>' if loop.last else '<|im_end|>' }}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "None of you is null. You are kind and helpful to me.<|im_end|>\n{% endif %}" + PLAIN
)
VISION = (  # contents are lists of parts
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}" + PROMPT
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n### Response:\n"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n\n{% else %}{{ m['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
)
NAMED = PLAIN.replace(
    "{{ message['role'] }}", "{{ message['role'] }}{% if message.name is defined %} {{ message.name }}{% endif %}"
)
TOOLS = PLAIN.replace(
    "{% else %}<|im_start|>",
    "{% elif message['role'] == 'tool' %}<tool_response>{{ message['content'] | tojson }}</tool_response>\n"
    "{% else %}<|im_start|>",
)
CLEAN = {
    "chatml": CHATML, "plain": PLAIN, "gemma": GEMMA, "mistral": MISTRAL, "qwen3": QWEN3, "prefill": PREFILL,
    "harmony": HARMONY, "default system": DEFAULT_SYSTEM, "vision": VISION, "alpaca": ALPACA, "named": NAMED,
    "tools": TOOLS,
}  # fmt: skip


def subject(template, **parts):
    tokenizer = bpe_tokenizer(eos_token="</s>" if template in (MISTRAL, HARMONY, ALPACA) else "<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|channel|>"]})
    tokenizer.chat_template = template
    model = llama(eos_token_id=tokenizer.eos_token_id)
    return from_parts(**dict(tokenizer=tokenizer, model=model, chat=True) | parts)


def result(check, template, **parts):
    return runner.run_one(runner.get_check(check), subject(template, **parts))


def rows_of(template):
    rows = chat_rows(4, turns=2)
    rows[0]["messages"][1]["content"] = "<think>\nhm\n</think>\n\nIt is  so.\n"  # thinks, and ends in white space
    rows[1]["messages"][0]["content"] = "None of it is null\n\n  def f():\n\treturn 1"
    if template == TOOLS:
        rows[2]["messages"].insert(2, {"role": "tool", "content": '{"a": "Größe"}'})
    return rows


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("name", CLEAN)
def test_clean_templates_do_not_fail(name, with_rows):
    template = CLEAN[name]
    item = subject(template, dataset=rows_of(template) if with_rows and name != "vision" else None)
    report = runner.run(item, runner.Selection(only=("template", "tokenizer")))
    bad = [(c.id, c.measured, c.evidence) for c in report.checks if c.status in ("fail", "not_run")]
    assert not bad


@pytest.mark.parametrize("name", ["chatml", "plain", "gemma", "mistral", "default system", "alpaca", "tools"])
def test_common_templates_pass_every_check(name):
    report = runner.run(subject(CLEAN[name]), runner.Selection(only=("template",)))
    assert {c.status for c in report.checks} <= {"pass", "not_applicable"}, report.checks


@pytest.mark.parametrize(
    ("check", "name"),
    [
        ("earlier-turns-rewritten", "qwen3"),
        ("generation-prompt-mismatch", "qwen3"),
        ("generation-prompt-mismatch", "prefill"),
        ("generation-prompt-mismatch", "harmony"),
    ],
)
def test_thinking_templates_are_warned_of(check, name):
    assert result(check, CLEAN[name]).status == "warn"


def test_rewritten_turns_are_a_warning_where_everything_is_trained():
    assert result("earlier-turns-rewritten", QWEN3, dataset=chat_rows(4, turns=2)).status == "warn"


def test_trl_trains_a_stock_thinking_template_by_its_own():
    """Under assistant_only_loss TRL replaces stock Qwen3's template by one with marks that keeps earlier turns."""
    from pathlib import Path

    trl = pytest.importorskip("trl")
    from trl import SFTConfig

    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    args = arguments(SFTConfig, assistant_only_loss=True, gradient_checkpointing=False)
    for check in ("earlier-turns-rewritten", "assistant-mask-wrong"):
        assert result(check, template, dataset=chat_rows(4, turns=2), args=args).status == "pass"


def test_trimming_is_noted():
    found = result("template-alters-content", GEMMA)
    assert found.status == "pass"
    assert "trimmed" in found.measured


def test_default_system_prompt_is_noted_and_its_own_words_are_no_nulls():
    assert "serving must write them too" in result("template-adds-text", DEFAULT_SYSTEM).measured
    assert result("template-writes-none", DEFAULT_SYSTEM).status == "pass"


def test_optional_key_that_no_row_holds_is_a_warning_at_most():
    assert result("template-writes-none", NAMED, dataset=chat_rows(4)).status in ("pass", "warn")


def test_mask_of_a_single_answer_and_of_several():
    assert "answers with their end of turn" in result("assistant-mask-wrong", CHATML).measured


def test_generation_prompt_inside_the_marks_is_a_warning():
    wide = CHATML.replace("<|im_start|>assistant\n{% generation %}", "{% generation %}<|im_start|>assistant\n")
    assert result("assistant-mask-wrong", wide).status == "warn"


def test_template_without_marks_is_fine_unless_they_are_asked_for():
    assert result("assistant-mask-wrong", PLAIN, dataset=chat_rows(4)).status == "not_applicable"


def test_two_different_tokens_may_end_an_answer():
    template = PLAIN.replace("<|im_end|>\n{% else %}", "<|im_end|></s>\n{% else %}")
    assert template != PLAIN
    assert result("doubled-end-of-turn", template).status == "pass"


def test_template_that_renders_nothing_is_not_run():
    found = result("template-alters-content", "{{ raise_exception('no') }}")
    assert found.status == "not_run"
    assert "TemplateError" in found.measured


def test_clock_is_put_back():
    from transformers.utils import chat_template_utils

    before = chat_template_utils.datetime
    result("template-adds-text", "{{ strftime_now('%Y') }}" + PLAIN)
    assert chat_template_utils.datetime is before


def test_conversations_take_the_roles_that_a_template_takes():
    tokenizer = bpe_tokenizer()
    assert conversation(tokenizer)[0][0]["role"] == "system"
    tokenizer.chat_template = GEMMA
    assert [m["role"] for m in conversation(tokenizer)[0]] == ["user", "assistant"] * 2
    tokenizer.chat_template = VISION
    assert isinstance(conversation(tokenizer)[0][0]["content"], list)


def test_end_of_turn_is_found_behind_answers():
    tokenizer = bpe_tokenizer()
    assert turn_ends(tokenizer) == {4}
    assert written_by_template(tokenizer).literals == ["<|im_start|>", "<|im_end|>"]
    tokenizer.chat_template = QWEN3
    assert turn_ends(tokenizer) == {4}


def test_rows_of_prompts_and_answers_are_conversations():
    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    assert own_conversation({"prompt": prompt, "completion": answer}) == prompt + answer
    assert own_conversation({"prompt": prompt, "chosen": answer, "rejected": answer}) == prompt + answer
    assert own_conversation({"text": "a"}) == own_conversation({"prompt": "a", "completion": "b"}) == []
