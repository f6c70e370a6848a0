"""What stands between lm-eval and the model changes no answer, keeps what was computed, and counts what was cut."""

import random

import numpy as np
import pytest
import tiny
import torch
from lm_eval.api.instance import Instance

from llmkit.config import UserError
from llmkit.evaluate import harness, task_index
from llmkit.evaluate.harness import Journal, make_lm

GREEDY = {"until": ["."], "max_gen_toks": 6, "do_sample": False}


def requests(kind, *arguments):
    named = enumerate(arguments)
    return [Instance(request_type=kind, doc={}, arguments=a, idx=k, metadata=("t", k, 1)) for k, a in named]


def scored(count=40):
    words = tiny.WORDS
    pairs = [(f"The {words[k % 7]} {' '.join(words[: k % 9])}", f" {words[k % 11]}") for k in range(count)]
    return requests("loglikelihood", *pairs)


def written(count=20):
    return requests("generate_until", *[(" ".join(tiny.WORDS[: 1 + k % 9]), GREEDY) for k in range(count)])


def found(name, folder):
    return task_index.load(task_index.make_manager([name], None, None, folder), [name])


def lm(journal=None, bos=False, max_length=None, batch_size=4, model=None):
    model = model or tiny.llama().eval()
    return make_lm("m", model, tiny.bpe_tokenizer(bos=bos), batch_size, max_length, Journal(journal), "salt")


def plain(bos=False, batch_size=4, **options):
    from lm_eval.models.huggingface import HFLM

    harness.quiet()
    return HFLM(tiny.llama().eval(), tokenizer=tiny.bpe_tokenizer(bos=bos), batch_size=batch_size, **options)


def test_answers_are_lm_evals_to_the_bit():
    for bos in (False, True):
        assert lm(bos=bos).loglikelihood(scored(), True) == plain(bos).loglikelihood(scored(), True)
        assert lm(bos=bos).generate_until(written(), True) == plain(bos).generate_until(written(), True)


def test_choices_of_one_token_share_a_forward_pass_as_in_lm_eval():
    asked = [(f"The {word}", f" {choice}") for word in tiny.WORDS[:9] for choice in ("cat", "dog", "bird")]
    ours = lm()
    calls = []
    forward = ours.model.forward
    ours.model.forward = lambda *a, **k: calls.append(1) or forward(*a, **k)
    answers = ours.loglikelihood(requests("loglikelihood", *asked), True)
    assert len(calls) == 3  # 9 contexts, 4 in a batch
    assert answers == plain().loglikelihood(requests("loglikelihood", *asked), True)


def test_rolling_perplexity_has_one_bos():
    """lm-eval scores a tokenizer with a BOS of its own behind two of them; here it is as without that."""
    texts = requests("loglikelihood_rolling", *[(f"The {w} runs. " * 30,) for w in tiny.WORDS[:3]])
    ours = lm(bos=True, max_length=64).loglikelihood_rolling(texts, True)
    assert ours == plain(True, max_length=64, add_bos_token=False).loglikelihood_rolling(texts, True)
    assert ours != plain(True, max_length=64).loglikelihood_rolling(texts, True)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_an_interrupted_evaluation_goes_on_and_gives_the_same(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(harness, "BLOCK", 1)
    asked = scored() if kind == "loglikelihood" else written()
    ask = lambda m: getattr(m, kind)(asked, True)  # noqa: E731
    path = tmp_path / "journal.jsonl"
    whole, dies = ask(lm()), lm(path)
    hook = "_model_call" if kind == "loglikelihood" else "_model_generate"
    done, real = [], getattr(type(dies).__mro__[2], hook)

    def some(self, *a, **k):
        if len(done) == 2:
            raise Killed
        done.append(1)
        return real(self, *a, **k)

    monkeypatch.setattr(type(dies).__mro__[2], hook, some)
    with pytest.raises(Killed):
        ask(dies)
    with path.open("a") as file:
        file.write('["cut sho')  # by the kill
    calls = []
    monkeypatch.setattr(type(dies).__mro__[2], hook, lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    assert ask(lm(path)) == whole
    num_all = len(calls) + 2
    calls.clear()
    assert ask(lm(path)) == whole and not calls and num_all > 4


def test_another_model_does_not_read_the_journal(tmp_path):
    answers = []
    for seed, salt in ((0, "a"), (1, "b"), (2, "a")):
        journal = Journal(tmp_path / "j")
        model = make_lm("m", tiny.llama(seed).eval(), tiny.bpe_tokenizer(), 4, None, journal, salt)
        answers.append(model.loglikelihood(scored(), True))
    assert answers[0] != answers[1] and answers[0] == answers[2]


def test_prompts_that_do_not_fit_are_counted():
    long = " ".join(tiny.WORDS * 3)  # 60 tokens
    asked = requests("loglikelihood", ("The", " cat"), (long, " cat"), (long, " dog"))
    ours = lm(max_length=32)
    ours.loglikelihood(asked, True)
    assert ours.num_cut == {"t": 2}
    ours = lm(max_length=32)
    ours.generate_until(requests("generate_until", ("The", GREEDY), (long, GREEDY)), True)
    assert ours.num_cut == {"t": 1}


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_nan_ends_the_evaluation_with_a_line(kind):
    model = tiny.llama().eval()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match=r"^m: the model's logits are NaN; check its weights and dtype"):
        getattr(lm(model=model), kind)(scored() if kind == "loglikelihood" else written(), True)


def test_a_task_that_generates_more_than_the_context_is_refused(tmp_path):
    tasks = found("toyworld_sums", tmp_path)["tasks"]
    with pytest.raises(UserError, match=r"'toyworld_sums' generates 48 tokens, and the context of m has 40; .* 20"):
        harness.prepare_tasks(tasks, lm(max_length=40), None, {})
    harness.prepare_tasks(tasks, lm(max_length=40), None, {"max_gen_toks": 20}, "<|im_end|>")
    settings = tasks["toyworld_sums"].config.generation_kwargs
    assert settings["max_gen_toks"] == 20 and settings["until"] == ["\n\n", "\nQ:", "<|im_end|>"]


def test_random_numbers_come_back(tmp_path):
    loaded = found("toyworld_recall", tmp_path)
    model = lm()
    harness.prepare_tasks(loaded["tasks"], model, None, {})
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    harness.run(model, {"tasks": loaded["tasks"]}, False, 3, None, False)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
