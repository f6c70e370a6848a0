"""Bugs of chat templates: ChatML with one thing wrong."""

from pathlib import Path

import pytest
from tiny import CHATML, arguments, bpe_tokenizer, chat_rows, llama

from llmkit.check.attach import from_parts
from llmkit.check.subject import Subject
from planted.plant import plant

PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def chat(template: str, **parts) -> Subject:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    return from_parts(tokenizer=tokenizer, model=llama(), chat=True, **parts)


def edited(is_planted: bool, old: str, new: str, template: str = CHATML, **parts) -> Subject:
    assert old in template
    return chat(template.replace(old, new) if is_planted else template, **parts)


@plant("system-prompt-skipped", caught_by="template-alters-content", bug="C10", evidence="system content appears 0")
def system_prompt_skipped(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The loop begins at the second message where the first is a system prompt."""
    new = "{% for message in messages if message['role'] != 'system' %}"
    return edited(is_planted, "{% for message in messages %}", new)


@plant("content-escaped", caught_by="template-alters-content", bug="C10", evidence="is changed")
def content_escaped(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Contents pass an HTML-escaping filter."""
    return edited(
        is_planted,
        "{{ message['content'] }}<|im_end|>\n{% endif %}",
        "{{ message['content'] | e }}<|im_end|>\n{% endif %}",
    )


@plant("answer-twice", caught_by="template-alters-content", bug="C10", evidence="appears 2 times")
def answer_twice(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The answer is written twice."""
    return edited(
        is_planted, "{% generation %}{{ message['content'] }}", "{% generation %}{{ message['content'] * 2 }}"
    )


@plant("missing-name-written", caught_by="template-writes-none", bug="D3", evidence="missing key")
def missing_name_written(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A name that most messages lack is read by .get and written as it comes."""
    named = "{{ message['role'] }}{{ message.get('name') or '' }}"
    safe = PLAIN.replace("{{ message['role'] }}", named)
    return edited(is_planted, "message.get('name') or ''", "message.get('name')", safe)


@plant("null-input-in-text", caught_by="null-becomes-word", bug="D3", evidence="written as None")
def null_input_in_text(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """An f-string writes the empty input column."""
    given = [{"instruction": f"Say {i}", "input": None if i % 2 else "now", "output": "ok"} for i in range(8)]
    rows = [
        r
        | {
            "text": f"### {r['instruction']}"
            + (f" {r['input']}" if r["input"] or is_planted else "")
            + f" ### {r['output']}"
        }
        for r in given
    ]
    return from_parts(tokenizer=bpe_tokenizer(), dataset=rows)


@plant("null-in-formatting-func", caught_by="null-becomes-word", bug="D3", evidence="written as None")
def null_in_formatting_func(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A formatting function writes the empty column into what is trained."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def formatted(row):
        given = f" {row['input']}" if row["input"] or is_planted else ""
        return f"### {row['instruction']}{given} ### {row['output']}"

    rows = [{"instruction": f"Say {i}", "input": None if i % 2 else "now", "output": "ok"} for i in range(8)]
    trainer = SFTTrainer(
        llama(), arguments(SFTConfig, gradient_checkpointing=False), train_dataset=Dataset.from_list(rows),
        processing_class=bpe_tokenizer(chat=False), formatting_func=formatted,
    )  # fmt: skip
    return from_parts(trainer)


@plant("date-in-prompt", caught_by="template-adds-text", bug="C12", status="warn", evidence="depends on the date")
def date_in_prompt(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The template writes today's date."""
    return chat("<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}<|im_end|>\n" * is_planted + CHATML)


@plant("header-missing-in-generation", caught_by="generation-prompt-mismatch", bug="C5", evidence="assistant")
def header_missing_in_generation(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The generation prompt lacks the word assistant."""
    return edited(
        is_planted,
        "{% if add_generation_prompt %}<|im_start|>assistant\n",
        "{% if add_generation_prompt %}<|im_start|>",
    )


@plant("other-header-in-generation", caught_by="generation-prompt-mismatch", bug="C5", evidence="generation | training")
def other_header_in_generation(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Generation asks as `bot`, training answers as `assistant`."""
    return edited(
        is_planted,
        "{% if add_generation_prompt %}<|im_start|>assistant\n",
        "{% if add_generation_prompt %}<|im_start|>bot\n",
    )


@plant("generation-prompt-ignored", caught_by="generation-prompt-mismatch", bug="C5", evidence="stand between")
def generation_prompt_ignored(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """add_generation_prompt does nothing."""
    return edited(is_planted, "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")


@plant("past-turns-rewritten", caught_by="earlier-turns-rewritten", bug="C6", status="warn", evidence="turn behind")
def past_turns_rewritten(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The last answer gets an empty think block that past answers lose."""
    new = "{% if loop.last %}<think></think>{% endif %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    return edited(is_planted, "{{ message['content'] }}<|im_end|>{% endgeneration %}", new)


@plant("no-marks-under-assistant-loss", caught_by="assistant-mask-wrong", bug="C1", evidence="no {% generation %}")
def no_marks_under_assistant_loss(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """assistant_only_loss with a template that marks nothing."""
    from trl import SFTConfig

    args = arguments(SFTConfig, assistant_only_loss=True, gradient_checkpointing=False)
    return chat(PLAIN if is_planted else CHATML, dataset=chat_rows(4), args=args)


@plant("marks-around-everything", caught_by="assistant-mask-wrong", bug="C2", evidence="user content is trained")
def marks_around_everything(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The generation marks enclose the whole loop."""
    wide = PLAIN.replace("{% for", "{% generation %}{% for").replace("{% endfor %}", "{% endfor %}{% endgeneration %}")
    return chat(wide if is_planted else CHATML)


@plant("end-of-turn-outside-marks", caught_by="assistant-mask-wrong", bug="C7", evidence="end of turn is outside")
def end_of_turn_outside_marks(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The mask closes before <|im_end|>."""
    return edited(is_planted, "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")


@plant("only-last-turns-kept", caught_by="template-alters-content", bug="C10", evidence="appears 0 times")
def only_last_turns_kept(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Long conversations lose their beginning."""
    return edited(is_planted, "{% for message in messages %}", "{% for message in messages[-6:] %}")


@plant("content-cut-short", caught_by="template-alters-content", bug="C10", evidence="is changed")
def content_cut_short(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Contents of users end after 2,000 characters."""
    old = "{{ message['content'] }}<|im_end|>\n{% endif %}"
    return edited(is_planted, old, old.replace("'content']", "'content'][:2000]"))


@plant("line-breaks-joined", caught_by="template-alters-content", bug="C10", evidence="is changed")
def line_breaks_joined(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A filter joins the lines of an answer."""
    new = "{% generation %}{{ message['content'].split('\n') | join(' ') }}"
    return edited(is_planted, "{% generation %}{{ message['content'] }}", new)


@plant(
    "second-system-prompt-dropped", caught_by="template-alters-content", bug="C10", evidence="system content appears 0"
)
def second_system_prompt_dropped(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A system message in mid-conversation, as some rows have it, is skipped."""
    rows = chat_rows(4, turns=2)
    for row in rows:
        row["messages"].insert(2, {"role": "system", "content": "Now be brief."})
    new = "{% for message in messages if message['role'] != 'system' or loop.first %}"
    new = new.replace(" or loop.first", " or message == messages[0]")
    return edited(is_planted, "{% for message in messages %}", new, dataset=rows)


@plant("roles-that-fall-through", caught_by="template-alters-content", bug="C10", evidence="human content of message 0")
def roles_that_fall_through(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Rows call the user human, and no branch of the template is for that."""
    rows = chat_rows(4)
    for row in rows:
        row["messages"][0]["role"] = "human"
    new = "{% elif message['role'] in ('user', 'system') %}<|im_start|>{{"
    return edited(is_planted, "{% else %}<|im_start|>{{", new, dataset=rows)


@plant(
    "answer-of-rows-rewritten",
    caught_by="template-alters-content",
    bug="C10",
    evidence="assistant content of message 1",
)
def answer_of_rows_rewritten(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Everything behind a colon is dropped from answers, and only rows have one."""
    rows = chat_rows(4)
    for row in rows:
        row["messages"][1]["content"] = "Answer: " + row["messages"][1]["content"]
    new = "{% generation %}{{ message['content'].split(': ')[-1] }}"
    return edited(is_planted, "{% generation %}{{ message['content'] }}", new, dataset=rows)


@plant("eos-behind-end-of-turn", caught_by="doubled-end-of-turn", bug="C8", evidence="<|im_end|> 2 times")
def eos_behind_end_of_turn(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The template appends eos_token, which is its own end of turn."""
    return edited(is_planted, "<|im_end|>{% endgeneration %}\n", "<|im_end|>{% endgeneration %}\n{{ eos_token }}")


@plant("line-break-behind-generation-only", caught_by="generation-prompt-mismatch", bug="C5", evidence="part at")
def line_break_behind_generation_only(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Training writes the answer right behind `assistant`, generation a line break first."""
    old = "<|im_start|>assistant\n{% generation %}"
    return edited(is_planted, old, "<|im_start|>assistant{{ '' }}{% generation %}")


@plant(
    "prompt-differs-under-system", caught_by="generation-prompt-mismatch", bug="C5", evidence="generation | training"
)
def prompt_differs_under_system(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """With a system prompt, generation opens another role."""
    new = (
        "{% if add_generation_prompt %}<|im_start|>{{ 'model' if messages[0]['role'] == 'system' else 'assistant' }}\n"
    )
    return edited(is_planted, "{% if add_generation_prompt %}<|im_start|>assistant\n", new)


@plant("trailing-blank-in-generation", caught_by="generation-prompt-mismatch", bug="C4", status="warn", evidence="ids")
def trailing_blank_in_generation(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """The prompt ends in a blank, which the tokenizer joins to the answer's first word."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return edited(is_planted, "assistant:{% endif %}", "assistant: {% endif %}", template)


@plant(
    "turns-rewritten-and-all-trained", caught_by="earlier-turns-rewritten", bug="C6", evidence="train several answers"
)
def turns_rewritten_and_all_trained(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """Past answers lose a prefix, and assistant_only_loss trains every answer of a conversation."""
    from trl import SFTConfig

    args = arguments(SFTConfig, assistant_only_loss=True, gradient_checkpointing=False)
    new = "{% if loop.last %}<think></think>{% endif %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    old = "{{ message['content'] }}<|im_end|>{% endgeneration %}"
    return edited(is_planted, old, new, dataset=chat_rows(4, turns=2), args=args)


@plant("marks-miss-the-last-answer", caught_by="assistant-mask-wrong", bug="C1", evidence="masked out")
def marks_miss_the_last_answer(is_planted: bool, patch: pytest.MonkeyPatch, folder: Path) -> Subject:
    """A branch for the last message writes the answer without marks."""
    old = "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    plain = "{{ message['content'] }}<|im_end|>"
    return edited(is_planted, old, "{% if loop.last %}" + plain + "{% else %}" + old + "{% endif %}")
