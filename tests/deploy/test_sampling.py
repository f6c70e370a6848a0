"""Continuations: our loop and transformers' write the same tokens, and end for the same reason."""

import dataclasses

import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from tiny import bpe_tokenizer, llama, sentencepiece_tokenizer
from transformers import GenerationConfig

from llmkit.deploy.decode import LeanDecoder
from llmkit.deploy.sampling import Settings, settings_for, stops_here, write, write_batch

TOKENIZER = bpe_tokenizer()
PROMPT = TOKENIZER("The red cat runs")["input_ids"]
SETTINGS = Settings(eos=(2, 4), pad=0, max_new_tokens=40, context=64)
WAYS = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "cooled": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "penalty": {"repetition_penalty": 1.5},
    "all": {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
}


def model_of(size: int = 424):
    return tiny_model(vocab_size=size, eos_token_id=4)


def both(settings: Settings, ids=PROMPT, seed: int = 3):
    model = model_of()
    torch.manual_seed(seed)
    theirs = write_batch(model, TOKENIZER, [ids], settings)[0]
    torch.manual_seed(seed)
    return write(LeanDecoder(model), TOKENIZER, ids, settings), theirs


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_both_ways_write_the_same_tokens(how):
    ours, theirs = both(dataclasses.replace(SETTINGS, **how, wants_probs=True))
    assert ours.ids == theirs.ids and ours.ended == theirs.ended
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_samples_come_at_their_probabilities():
    """min_p against the definition: what is below 0.3 of the likeliest never comes, the rest in proportion."""
    decoder = LeanDecoder(model_of())
    probs = decoder.forward(torch.tensor(PROMPT)).softmax(-1)
    allowed = probs >= 0.3 * probs.max()
    assert 1 < allowed.sum() < 50
    settings = dataclasses.replace(SETTINGS, temperature=1.0, min_p=0.3, max_new_tokens=1)
    torch.manual_seed(0)
    counts = torch.zeros(len(probs))
    for _ in range(2000):
        counts[write(decoder, TOKENIZER, PROMPT, settings).ids[0]] += 1
    expected = torch.where(allowed, probs, 0)
    expected = expected / expected.sum()
    assert counts[~allowed].sum() == 0
    assert (counts / 2000 - expected).abs().max() < 4 * (0.25 / 2000) ** 0.5


def test_logprobs_are_those_of_the_bare_model():
    model = model_of()
    settings = dataclasses.replace(SETTINGS, temperature=0.5, top_k=3, wants_probs=True, max_new_tokens=8)
    found = write(LeanDecoder(model), TOKENIZER, PROMPT, settings)
    logits = model(torch.tensor([PROMPT + found.ids])).logits[0].log_softmax(-1).detach()
    expected = [float(logits[len(PROMPT) - 1 + i, token]) for i, token in enumerate(found.ids)]
    assert found.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_text_ends_at_any_of_the_end_tokens():
    ours, theirs = both(dataclasses.replace(SETTINGS, context=None, max_new_tokens=200, temperature=1.5))
    assert ours.ids == theirs.ids
    free = ours.ids
    ended, also = both(dataclasses.replace(SETTINGS, temperature=1.5, eos=(free[5], 2)))
    assert ended.ids == also.ids == free[: free.index(free[5]) + 1]
    assert ended.ended == also.ended == "end of text"


def test_the_context_is_never_passed_and_the_reason_is_said():
    for context, limit, reason, count in [(20, 40, "context", 20 - len(PROMPT)), (64, 6, "max_new_tokens", 6)]:
        settings = dataclasses.replace(SETTINGS, context=context, max_new_tokens=limit, eos=(423,))
        for found in both(settings):
            assert (found.ended, len(found.ids)) == (reason, count)


def test_a_stop_string_ends_where_generate_ends():
    free = both(dataclasses.replace(SETTINGS, eos=(423,)))[0].ids
    text = TOKENIZER.decode(free[:12])
    for stop in (text[4:9], text[7:8], TOKENIZER.decode(free[6:8])):
        ours, theirs = both(dataclasses.replace(SETTINGS, eos=(423,), stop_strings=("not there", stop)))
        assert ours.ids == theirs.ids and ours.ended == theirs.ended == "stop string"
        assert stop in TOKENIZER.decode(ours.ids) and len(ours.ids) <= 12


def test_a_stop_string_counts_only_where_it_ends_in_the_last_token():
    red, cat = (TOKENIZER(word)["input_ids"] for word in (" red", " cat"))
    assert stops_here(TOKENIZER, red + cat, ["cat"])
    assert stops_here(TOKENIZER, red + cat, ["d c"])  # begins in the token before
    assert not stops_here(TOKENIZER, red + cat, ["red"])  # was there already
    assert stops_here(TOKENIZER, cat + red + cat, ["cat"])  # twice
    assert stops_here(TOKENIZER, [*red, 4], ["<|im_end|>"])
    assert not stops_here(TOKENIZER, red + cat, [])


@pytest.mark.parametrize("stop", ["é", "a😀", "日本"])
def test_a_stop_string_may_end_in_a_character_of_several_tokens(stop):
    """Its first bytes decode to one character already, so that the whole one seemed to be nothing new."""
    ids = TOKENIZER(f"The {stop} red")["input_ids"]
    found = [i for i in range(len(ids)) if stops_here(TOKENIZER, ids[: i + 1], [stop])]
    assert found[0] == len(TOKENIZER(f"The {stop}")["input_ids"]) - 1


def test_a_stop_string_may_open_with_a_space_that_sentencepiece_drops():
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer("one cat")["input_ids"]
    assert tokenizer.decode(ids[-1:]) == "cat" and stops_here(tokenizer, ids, [" "])


def test_what_a_models_own_generation_config_asks_for_does_not_count():
    """A model from the Hub brings penalties and filters; the lean decoder never followed them, `generate` did."""
    model = model_of()
    own = GenerationConfig(
        do_sample=True, top_k=3, min_p=0.3, repetition_penalty=1.5, no_repeat_ngram_size=2, suppress_tokens=[5, 6, 7]
    )
    for how in (WAYS["sampled"], WAYS["greedy"]):
        settings = dataclasses.replace(SETTINGS, **how)
        model.generation_config = GenerationConfig()
        torch.manual_seed(1)
        expected = write_batch(model, TOKENIZER, [PROMPT], settings)[0].ids
        model.generation_config = own
        torch.manual_seed(1)
        assert write_batch(model, TOKENIZER, [PROMPT], settings)[0].ids == expected
        assert model.generation_config is own
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))  # of zeros; asks its base for settings
    assert write_batch(adapted, TOKENIZER, [PROMPT], settings)[0].ids == expected


@pytest.mark.parametrize("model", [model_of(), llama()], ids=["ours", "llama"])
def test_a_prompt_in_a_batch_is_continued_as_if_alone(model):
    texts = ["The red cat runs", "old", "The small green bird sings. One"]
    rows = [TOKENIZER(text)["input_ids"] for text in texts]
    settings = dataclasses.replace(SETTINGS, max_new_tokens=20, wants_probs=True)
    alone = [write_batch(model, TOKENIZER, [row], settings)[0] for row in rows]
    for one, other in zip(alone, write_batch(model, TOKENIZER, rows, settings), strict=True):
        assert one.ids == other.ids and one.ended == other.ended
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_tokens_are_told_as_they_come():
    for live in (True, False):
        heard: list[int] = []
        model, tell = model_of(), lambda token, logprob: heard.append(token)  # noqa: B023
        if live:
            found = write(LeanDecoder(model), TOKENIZER, PROMPT, SETTINGS, tell)
        else:
            found = write_batch(model, TOKENIZER, [PROMPT], SETTINGS, tell)[0]
        assert heard == found.ids and len(heard) > 3


def test_beams_are_transformers_own():
    model = model_of()
    found = write_batch(model, TOKENIZER, [PROMPT], dataclasses.replace(SETTINGS, num_beams=3, max_new_tokens=10))[0]
    expected = model.generate(
        torch.tensor([PROMPT]), num_beams=3, max_new_tokens=10, do_sample=False, eos_token_id=[2, 4], pad_token_id=0
    )
    assert found.ids == expected[0, len(PROMPT) :].tolist()


def test_ends_and_context_come_from_the_models_own_files():
    model = model_of()
    model.generation_config.eos_token_id = [4, 7]
    found = settings_for(model, TOKENIZER, max_new_tokens=5)
    assert (found.eos, found.pad, found.context, found.room(60)) == ((4, 7), 0, 64, 4)
    model.generation_config.eos_token_id = None
    assert settings_for(model, TOKENIZER, max_new_tokens=5).eos == (TOKENIZER.eos_token_id,)
