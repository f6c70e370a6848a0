"""toyworld asked about: a row is a function of its number and right by the world; no split has another's questions."""

import itertools
import random
import re

import pytest

from llmkit.data import toychat
from llmkit.data.toyworld import TOPICS, WORLD, document, log_prob

TRAIN = [(name, "train") for name in toychat.NAMES]
HELD_OUT = [("instructions", "validation"), ("instructions", "test")]
COUNT = 1500


def text_of(question: toychat.Question) -> str:
    return " ".join(message["content"] for message in question.messages)


@pytest.fixture(scope="module")
def questions() -> dict[tuple[str, str], list[toychat.Question]]:
    return {(name, split): [toychat.question(name, split, i) for i in range(COUNT)] for name, split in TRAIN + HELD_OUT}


def test_a_row_is_a_function_of_its_number():
    first = [toychat.row(name, "train", 5) for name in toychat.NAMES]
    assert first == [toychat.row(name, "train", 5) for name in toychat.NAMES]
    assert list(toychat.rows("prompts", "test", 3, 5)) == [toychat.row("prompts", "test", i) for i in (3, 4)]
    assert toychat.row("prompts", "train", 5, seed=1) != first[2]


def test_every_kind_is_in_every_split(questions):
    kinds = {"story", "facts", "sums", "spelling", "turns", "system", "unknown"}
    assert all({q.kind for q in found} == kinds for found in questions.values())


def test_no_two_splits_share_a_question(questions):
    for a, b in itertools.combinations(questions, 2):
        assert not {q.key for q in questions[a]} & {q.key for q in questions[b]}, (a, b)
        assert not {text_of(q) for q in questions[a]} & {text_of(q) for q in questions[b]}, (a, b)


def test_shares_of_training_and_held_out_questions_do_not_overlap():
    """Validation and test are the same for every name; all else is apart."""
    spans = {split: set(span) for (name, split), span in toychat.SHARES.items() if split != "train"}
    spans |= {name: set(toychat.SHARES[name, "train"]) for name in toychat.NAMES}
    assert sum(map(len, spans.values())) == len(set().union(*spans.values())) == 20


def test_every_fact_is_asked_in_every_split_and_no_wording_in_two():
    """All 600 questions about the towns."""
    for town, topic in itertools.product(WORLD.towns, TOPICS):
        shares = [toychat.share_of_key(f"fact {town} {topic} {k}") for k in range(len(toychat.WORDINGS))]
        assert sorted(shares) == sorted(toychat.DEALT)
    assert all(set(toychat.DEALT) & set(span) for span in toychat.SHARES.values())


def test_sums_of_one_step_are_held_out_by_their_numbers():
    """All of them: 16 numbers, up to 18 changes."""
    keys = [f"sum {a} {d}" for a in range(16) for d in range(-9, 10) if d and 0 <= a + d <= 15]
    held_out = [k for k in keys if toychat.share_of_key(k) >= 16]
    assert len(keys) == 198 and 25 <= len(held_out) <= 55


def test_no_step_of_a_sum_that_is_trained_is_held_out(questions):
    """A sum of two steps says the total of each: 21 of 21 held-out sums were once told so."""
    held_out = {q.key for at in HELD_OUT for q in questions[at] if q.kind == "sums"}
    told = {part for at in TRAIN for q in questions[at] for part in q.parts}
    assert len([k for k in held_out if k.count(" ") == 2]) > 10 and told and not told & held_out


def test_answers_are_right_by_the_world(questions):
    for q in itertools.chain(*questions.values()):
        text = text_of(q)
        if q.kind == "sums":
            start = re.match(r"\w+ has (\d+) \w+\.", text)
            count, said = int(start[1]), [start[0]]
            for step, verb, number in re.findall(r"(Then \w+ (\w+) (\d+)(?: more)?)\.", text):
                count += int(number) * (1 if verb in ("gets", "finds") else -1)
                said.append(f"{step}, so now {step.split()[1]} has {count}.")
            assert q.answer == " ".join(said) and 0 <= count <= 15
        elif q.kind == "spelling":
            assert q.answer == " ".join(re.search(r"Spell (\w+)\.", text)[1])
        elif q.kind == "facts":
            town = next(name for name in WORLD.towns if name in text)
            assert q.answer.split()[-1].removesuffix(".") in WORLD.towns[town].values()
        elif q.kind in ("story", "turns") and q.answer != toychat.UNKNOWN:
            assert re.sub(r"^(to |very |it was )", "", q.answer) in q.messages[0]["content"]
        assert q.wrong != q.answer


def test_what_cannot_be_known_is_not_told(questions):
    """Also in the earlier turns of a conversation."""
    for q in itertools.chain(*questions.values()):
        if q.kind not in ("unknown", "turns", "story"):
            continue
        turns = [*q.messages, {"role": "assistant", "content": q.answer}]
        story = re.match(r"(.* had a .*[.!]) [^.!]*\?$", turns[0]["content"])
        told = story[1] if story else ""
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            question = re.split(r"[.!] ", asked["content"])[-1] if told else asked["content"]
            names = [w for w in (*WORLD.things, *(n for n, _ in WORLD.people)) if re.search(rf"\b{w}\b", question)]
            if told and answered["content"] == toychat.UNKNOWN:
                assert names and not any(re.search(rf"\b{name}\b", told) for name in names)
            elif told:
                assert all(re.search(rf"\b{name}\b", told) for name in names)
            else:
                assert not any(town in question for town in WORLD.towns)


def test_stories_are_toyworlds_own(questions):
    q = next(q for q in questions["instructions", "train"] if q.kind == "story")
    told = q.messages[0]["content"].rsplit(". ", 1)[0] + "."
    told = (
        told
        if told.endswith("!") or log_prob(told, "stories") > -100
        else q.messages[0]["content"].rsplit("! ", 1)[0] + "!"
    )
    assert log_prob(told, "stories") > -60


def test_a_story_is_read_back():
    for i in range(200):
        text = document("stories", "train", i).text
        parts = toychat.read_story(text)
        assert text.startswith(f"{parts['hero']} had a {parts['colour']} {parts['thing']}. One {parts['weather']} day")
        assert f"{parts['friend']} found it {parts['spot']} and" in text and f"went to {parts['place']}," in text


def test_preferences_hold_right_against_wrong_rambling_or_invented():
    rows = list(toychat.rows("preferences", "train", 0, 400))
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("unknown", "story")}
    assert all(row["chosen"][0]["content"] == "I don't know." for row in by_kind["unknown"])
    assert all("know" not in row["rejected"][0]["content"] for row in by_kind["unknown"])
    assert all(row["chosen"] != row["rejected"] for row in rows)
    longer = [len(row["rejected"][0]["content"]) > 2 * len(row["chosen"][0]["content"]) for row in by_kind["story"]]
    assert 0.3 < sum(longer) / len(longer) < 0.8


@pytest.mark.parametrize("index", range(12))
def test_the_verifier_takes_the_answer_alone(index):
    row = toychat.row("prompts", "train", index)
    assert toychat.verify(row, row["answer"]) and toychat.verify(row, f" {row['answer']}\n")
    every = " ".join([*WORLD.colours, *WORLD.things, *map(str, range(16)), "I don't know."])
    for text in (
        "",
        every,
        row["prompt"][-1]["content"],
        f"{row['answer']} {row['answer']}",
        f"{row['answer']}, I think",
    ):
        assert not toychat.verify(row, text)


def test_made_up_words_have_the_syllables_asked_for():
    words = [toychat.made_up_word(random.Random(i), 2, 3) for i in range(50)]
    assert {len(word) for word in words} == {4, 6}
