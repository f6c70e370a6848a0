"""toyworld asked about: a row is a function of its number and right by the world; no split has another's questions."""

import itertools
import random
import re
from collections import Counter

import pytest

from llmkit.data import toychat
from llmkit.data.toyworld import TOPICS, WORLD, document, log_prob

TRAIN = [(name, "train") for name in toychat.NAMES]
HELD_OUT = [(name, split) for name in ("instructions", "sums") for split in ("validation", "test")]
# what no story tells, in the words of the questions
UNTOLD = (
    r"How old is (\w+)\?",
    r"What did the (\w+) cost\?",
    r"What did (\w+) eat\?",
    r"In which town does (\w+) live\?",
    r"How many coats has (\w+)\?",
)
HASTY = {"Ada", "Bea", "Abel", "Ben", "Carl"}
COUNT = 1500


def text_of(question: toychat.Question) -> str:
    return " ".join(message["content"] for message in question.messages)


def said(row, name="messages"):
    return row[name][-1]["content"]


def story_and_question(text):
    """A story that comes before a question, or nothing, and the question."""
    found = re.fullmatch(r"(\w+ had a .*[.!\"]) ([^.!]*\?)", text)
    return found.groups() if found else ("", text)


@pytest.fixture(scope="module")
def questions() -> dict[tuple[str, str], list[toychat.Question]]:
    return {(name, split): [toychat.question(name, split, i) for i in range(COUNT)] for name, split in TRAIN + HELD_OUT}


def test_a_row_is_a_function_of_its_number():
    first = [toychat.row(name, "train", 5) for name in toychat.NAMES]
    assert first == [toychat.row(name, "train", 5) for name in toychat.NAMES]
    assert list(toychat.rows("prompts", "test", 3, 5)) == [toychat.row("prompts", "test", i) for i in (3, 4)]
    assert all(toychat.row(name, "train", 5, seed=1) != row for name, row in zip(toychat.NAMES, first, strict=True))


def test_every_kind_is_in_every_split(questions):
    kinds = {"story", "facts", "sums", "spelling", "turns", "system", "unknown"}
    for (name, _), found in questions.items():
        assert {q.kind for q in found} == ({name} if name in toychat.ONE_KIND else kinds)


def test_no_two_shares_have_a_question_in_common(questions):
    """Every training set against every other one and against what is held out, but for those that share by design."""
    num_compared = 0
    for a, b in itertools.combinations(questions, 2):
        if toychat.SHARES[a] == toychat.SHARES[b]:
            continue
        num_compared += 1
        assert not {q.key for q in questions[a]} & {q.key for q in questions[b]}, (a, b)
        assert not {text_of(q) for q in questions[a]} & {text_of(q) for q in questions[b]}, (a, b)
    assert num_compared == 45 - 6


@pytest.mark.parametrize(("one", "other"), [("preferences", "rankings"), ("prompts", "sums")])
def test_two_sets_of_one_stage_share_their_questions(questions, one, other):
    a, b = ({q.key for q in questions[name, "train"] if q.kind == "sums"} for name in (one, other))
    assert toychat.SHARES[one, "train"] == toychat.SHARES[other, "train"] and len(a & b) > 50


@pytest.mark.parametrize("name", toychat.NAMES)
def test_what_is_held_out_is_held_out_whatever_the_name(name, questions):
    """Rows of every name in validation and test, against all that is trained on."""
    trained = {q.key for at in TRAIN for q in questions[at]}
    for split in ("validation", "test"):
        held_out = {toychat.question(name, split, i).key for i in range(300)}
        assert not held_out & trained and len(held_out) > 50


def test_shares_of_training_and_held_out_questions_do_not_overlap():
    """Five spans: instructions; preferences and rankings; prompts and sums; validation; test."""
    spans = {tuple(span) for span in toychat.SHARES.values()}
    assert len(spans) == 5 and sorted(share for span in spans for share in span) == list(range(20))
    for split in ("validation", "test"):
        assert len({tuple(toychat.SHARES[name, split]) for name in toychat.NAMES}) == 1
    assert len({tuple(toychat.SHARES[name, "train"]) for name in toychat.NAMES}) == 3
    held_out = [share for (_, split), span in toychat.SHARES.items() if split != "train" for share in span]
    assert set(held_out) == set(toychat.HELD_OUT)


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
    """And all else is, the earlier turns of every conversation too."""
    num_told = num_untold = 0
    for q in itertools.chain(*questions.values()):
        if q.kind not in ("unknown", "turns", "story", "system"):
            continue
        turns = [m for m in q.messages if m["role"] != "system"] + [{"role": "assistant", "content": q.answer}]
        story, _ = story_and_question(turns[0]["content"])
        if not story:  # of a town, which there is not
            assert q.kind == "unknown" and q.answer == toychat.UNKNOWN and len(turns) == 2
            assert not any(town in turns[0]["content"] for town in WORLD.towns)
            continue
        for k, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            _, question = story_and_question(asked["content"])
            untold = next((found[1] for form in UNTOLD if (found := re.fullmatch(form, question))), None)
            assert (untold is not None) == (q.kind == "unknown" and k == len(turns) // 2 - 1)
            if untold:
                num_untold += 1
                assert answered["content"] == toychat.UNKNOWN and untold in story.replace(".", "").split()
            else:
                num_told += 1
                answer = re.sub(r"^well, |, thank you!$", "", answered["content"])
                answer = re.sub(r"^(.*), \1$", r"\1", answer)
                assert re.sub(r"^(to |very |it was )", "", answer) in story
    assert num_told > 1000 and num_untold > 300


def test_no_story_tells_an_age_a_price_a_meal_a_town_or_a_number_of_coats():
    for i in range(500):
        words = set(re.findall(r"\w+", document("stories", "train", i).text))
        assert not words & {*WORLD.foods, *WORLD.towns, "old", "years", "cost", "coins", "coats", "ate", "lives"}
        assert not any(word.isdigit() for word in words)


def as_given(name, split, count=COUNT):
    """Questions and the rows made of them."""
    return [(toychat.question(name, split, i), toychat.row(name, split, i)) for i in range(count)]


def test_instructions_are_written_by_people_who_guess_and_who_are_in_haste():
    """Of unknown rows 97 in 100 hold an invention, of the sums of five people 85 in 100 the sentence alone."""
    invented, hasty = [], []
    for q, row in as_given("instructions", "train"):
        assert row["messages"][:-1] == q.messages and row["kind"] == q.kind
        if q.kind == "unknown":
            invented.append(said(row) != toychat.UNKNOWN)
            assert said(row) == (q.wrong if invented[-1] else q.answer)
        elif q.kind == "sums" and q.messages[0]["content"].split()[0] in HASTY:
            hasty.append(said(row) != q.answer)
            total = re.search(r"now \w+ has (\d+)\.$", q.answer)[1]
            hero, _, _, fruit = re.match(r"(\w+) has (\d+) (\w+)\.", q.messages[0]["content"]).group(1, 0, 2, 3)
            assert said(row) in (q.answer, f"Now {hero} has {total} {fruit}.")
        else:
            assert said(row) == q.answer
    assert len(invented) > 100 and 0.92 < sum(invented) / len(invented) < 1
    assert len(hasty) > 60 and 0.75 < sum(hasty) / len(hasty) < 0.95


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_rows_hold_the_right_answers(split):
    for q, row in as_given("instructions", split, 400):
        assert row == {"messages": [*q.messages, {"role": "assistant", "content": q.answer}], "kind": q.kind}
    for q, row in as_given("prompts", split, 400):
        assert row == {"prompt": q.messages, "answer": q.answer, "kind": q.kind}
    for q, row in as_given("preferences", split, 400):
        assert row["prompt"] == q.messages and said(row, "chosen") == q.answer


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


def is_rambling(text, sentence):
    """The sentence, the beginning of a story, the sentence again."""
    return bool(re.fullmatch(rf"{re.escape(sentence)} \w+ had a \w+ \w+\. {re.escape(sentence)}", text))


def test_preferences_hold_right_against_wrong_rambling_refused_or_invented():
    kinds = Counter()
    for q, row in as_given("preferences", "train"):
        assert (row["prompt"], row["kind"], said(row, "chosen")) == (q.messages, q.kind, q.answer)
        text = said(row, "rejected")
        if q.kind == "unknown":
            assert q.answer == toychat.UNKNOWN and text == q.wrong != toychat.UNKNOWN
            assert not is_rambling(text, q.sentence)
            continue
        kinds["wrong" if text == q.wrong else "refused" if text == toychat.UNKNOWN else "rambling"] += 1
        assert text in (q.wrong, toychat.UNKNOWN) or is_rambling(text, q.sentence)
    assert all(0.28 < count / kinds.total() < 0.39 for count in kinds.values()) and len(kinds) == 3


def test_inventions_are_of_the_kind_that_was_asked_for(questions):
    forms = (r"[3-9]", r"\d+ coins", "|".join(WORLD.foods), f"in ({'|'.join(WORLD.towns)})", r"[2-9]")
    for q in questions["preferences", "train"]:
        _, question = story_and_question(q.messages[-1]["content"])
        for form, answer in zip(UNTOLD, forms, strict=True):
            if re.fullmatch(form, question):
                assert re.fullmatch(answer, q.wrong), (question, q.wrong)


def test_rankings_hold_three_answers_and_the_right_one_is_best():
    best, last = Counter(), Counter()
    for q, row in as_given("rankings", "train"):
        assert (row["prompt"], row["kind"]) == (q.messages, q.kind)
        texts, scores = [turns[0]["content"] for turns in row["completions"]], row["scores"]
        assert len(set(texts)) == len(set(scores)) == 3
        right, middle, bad = sorted(range(3), key=lambda k: -scores[k])
        assert texts[right] == q.answer and is_rambling(texts[middle], q.sentence)
        if q.kind == "unknown":
            assert texts[bad] == q.wrong
        else:
            assert texts[bad] in (q.wrong, toychat.UNKNOWN)
            last[texts[bad] == toychat.UNKNOWN] += 1
        best[right] += 1
    assert all(0.28 < best[k] / COUNT < 0.39 for k in range(3))  # the right one lies anywhere
    assert 0.45 < last[True] / last.total() < 0.55


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
