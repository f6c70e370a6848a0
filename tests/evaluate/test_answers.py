"""Answers compared word for word: what is asked, what counts as right."""

import pytest
import tiny

from llmkit.evaluate.answers import Answer, AnswerScore, question_of, score_answers

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


def answer(given: str, ended: bool = True, kind: str = "") -> Answer:
    return Answer("q", "red", given, kind, ended)


@pytest.mark.parametrize(
    ("given", "ended", "is_exact"),
    [("red", True, True), (" red\n", True, True), ("red", False, False), ("red.", True, False), ("Red", True, False)],
)
def test_only_the_same_words_that_end_by_themselves_are_exact(given, ended, is_exact):
    assert answer(given, ended).is_exact is is_exact


def test_scores_by_kind():
    score = AnswerScore([answer("red", kind="a"), answer("blue", kind="a"), answer("red", kind="b")])
    assert score.exact_match == pytest.approx(2 / 3) and score.by_kind() == {"a": 0.5, "b": 1.0}


def test_the_question_ends_where_the_last_answer_begins():
    tokenizer = tiny.bpe_tokenizer()
    ids, expected = question_of({"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "He"}]}, tokenizer)
    assert expected == "He"
    start = "<|im_start|>"
    assert tokenizer.decode(ids) == (
        f"{start}user\nHi<|im_end|>\n{start}assistant\nHo<|im_end|>{start}user\nHi<|im_end|>\n{start}assistant\n"
    )
    assert question_of({"prompt": [USER], "completion": [ANSWER]}, tokenizer)[1] == "Ho"
    assert question_of({"prompt": "Q: a\nA:", "completion": " b"}, tokenizer)[1] == " b"
    for nothing in ({"text": "x"}, {"messages": [USER]}, {"messages": [USER, ANSWER | {"tool_calls": [1]}]}):
        assert question_of(nothing, tokenizer) is None


def test_batches_give_the_answers_of_single_questions_in_the_order_of_the_rows():
    model, tokenizer = tiny.llama().eval(), tiny.bpe_tokenizer()
    rows = [row | {"kind": str(i)} for i, row in enumerate(tiny.chat_rows(5))] + [{"text": "x"}]
    one, many = (score_answers(model, tokenizer, rows, size, 6).answers for size in (1, 4))
    assert one == many and [a.kind for a in many] == list("01234")
    assert not model.training


def test_a_model_that_repeats_the_answer_is_right(monkeypatch):
    """Through generate itself: a model whose next token is always the end of the turn answers nothing."""
    import torch

    model, tokenizer = tiny.llama().eval(), tiny.bpe_tokenizer()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 1.0
    model.model.norm.weight.data.fill_(0)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[tokenizer.eos_token_id] = 1.0
    rows = [{"messages": [USER, {"role": "assistant", "content": ""}]}, {"messages": [USER, ANSWER]}]
    assert [a.is_exact for a in score_answers(model, tokenizer, rows, 2, 4).answers] == [True, False]


def test_answers_are_greedy_whatever_the_models_own_settings_say():
    """A generation_config.json with a repetition penalty or with beams used to change them."""
    model, tokenizer, rows = tiny.llama(seed=7).eval(), tiny.bpe_tokenizer(), tiny.chat_rows(3)
    before = score_answers(model, tokenizer, rows, 4, 12).answers
    vars(model.generation_config).update(repetition_penalty=9.0, num_beams=3, no_repeat_ngram_size=1)
    assert score_answers(model, tokenizer, rows, 4, 12).answers == before


def test_a_model_that_names_no_end_goes_on_to_the_limit():
    model, tokenizer = tiny.llama().eval(), tiny.bpe_tokenizer(eos_token=None)
    model.generation_config.eos_token_id = None
    (found,) = score_answers(model, tokenizer, tiny.chat_rows(1), 1, 4).answers
    assert not found.ended
