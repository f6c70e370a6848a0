"""The grammar knows its own probabilities: enumerated in a tiny world, counted by hand in the full one."""

import math
import re

import pytest

from llmkit.data import toyworld
from llmkit.data.sources import Source, documents
from llmkit.data.toyworld import HE, SHE, WORLD, World, derivations, document, log_prob

TINY = World(
    people=(("Ada", SHE), ("Abel", HE)),
    things=("ball", "book"),
    colours=("red", "blue", "green"),
    places=(("the park", "behind a tree"), ("the farm", "in the barn")),
    weathers=("sunny",),
    mishaps=(("was lost", "sad"), ("fell down", "worried")),
    foods=("eggs", "figs"),
    towns=dict(list(WORLD.towns.items())[:3]),
    num_town_facts=2,
    num_sums=2,
    largest_number=3,
)
# hero 2, colour 3, thing 2, place 2, meeting 2, mishap 2, question 1 + 2 wrong colours, end 2
# towns 3 * 2, twice: 3 topics * 2 wordings * 2 topics left * 2 wordings
# hero 2, start 4, food 2, twice: 3 changes * 2 verbs
NUM_TEXTS = {"stories": 576, "facts": 6 * 24**2, "arithmetic": 16 * 6**2}
KINDS = list(NUM_TEXTS)


@pytest.fixture(params=KINDS)
def language(request, monkeypatch):
    """Kind and all derivations of the tiny world, with three topics to talk about."""
    monkeypatch.setattr(toyworld, "TOWN_FACTS", dict(list(toyworld.TOWN_FACTS.items())[:3]))
    return request.param, list(derivations(request.param, TINY))


def test_all_texts_of_a_small_world_are_distinct_and_their_probabilities_sum_to_one(language):
    kind, docs = language
    assert len(docs) == len({doc.text for doc in docs}) == NUM_TEXTS[kind]
    assert math.fsum(math.exp(doc.log_prob) for doc in docs) == pytest.approx(1, abs=1e-12)


def test_mean_log_prob_of_drawn_documents_approaches_the_exact_entropy(language):
    kind, docs = language
    known = {doc.text: doc.log_prob for doc in docs}
    entropy = -math.fsum(math.exp(p) * p for p in known.values())
    variance = math.fsum(math.exp(p) * (p + entropy) ** 2 for p in known.values())
    drawn = [document(kind, "train", i, world=TINY) for i in range(2000)]
    assert all(known[doc.text] == pytest.approx(doc.log_prob, abs=1e-12) for doc in drawn)
    mean = -math.fsum(doc.log_prob for doc in drawn) / len(drawn)
    assert abs(mean - entropy) <= 4 * math.sqrt(variance / len(drawn)) + 1e-9
    assert len({doc.text for doc in drawn}) > 0.4 * min(len(docs), len(drawn))  # it reaches the language, not a corner


PERSON = r"[A-Z][a-z]+"
STORY = re.compile(
    rf"(?P<hero>{PERSON}) had a (?P<colour>\w+) (?P<thing>\w+)\. One \w+ day (?P=hero) went to (?P<place>the \w+), "
    rf"and (?P<she>s?he) took the (?P=thing) along\.(?: There (?P=she) met)? (?P<friend>{PERSON})"
    r"(?:, who was a good friend| was there too, and they played for a while)\. But then the (?P=thing) [a-z ]+, "
    r'and (?P=hero) was very \w+\.(?P<asked> "Is it this \w+ one\?" asked (?P=friend)\. "No," said (?P=hero), '
    r'"the (?P=thing) that I had is (?P=colour)\.")? After some time (?P=friend) found it [a-z ]+ and gave it back\.'
    r"(?: (?P=hero) thanked (?P=friend) and left (?P=place) with (?:her|his) (?P=colour) (?P=thing)\."
    r"| S?[Hh]e smiled and said: thank you, (?P=friend)!)"
)
FACTS = re.compile(
    r"\w+ is a small town\.(?: [^.]+\.){N} Another town is \w+\.(?: [^.]+\.){N}".replace("N", str(WORLD.num_town_facts))
)
START = re.compile(r"\w+ has (\d+) \w+\.")
CHANGE = re.compile(r" Then s?he (gets|finds|eats|sells) (\d)( more)?, so now s?he has (\d+)\.")


def surprise_by_hand(kind: str, text: str) -> float:
    """-log p in nats, from the sizes of the word lists and the branches that the text took."""
    if kind == "stories":
        asked = 7 if STORY.fullmatch(text)["asked"] else 1  # the wrong colour
        return math.log(20 * 8 * 16 * 6 * 8 * 19 * 2 * 4 * 2 * asked * 2)
    if kind == "facts":
        assert FACTS.fullmatch(text)
        num_towns, topics_and_wordings = len(WORLD.towns), (6 * 2, 5 * 2, 4 * 2, 3 * 2)[: WORLD.num_town_facts]
        return math.log(num_towns * (num_towns - 1) * math.prod(topics_and_wordings) ** 2)
    start = START.match(text)
    count, options = int(start[1]), 20 * 16 * 6
    changes = CHANGE.findall(text)
    assert len(changes) == 4 and START.sub("", text, count=1) == "".join(m[0] for m in CHANGE.finditer(text))
    for verb, size, more, total in changes:
        options *= 2 * (min(9, count) + min(9, 15 - count))  # two verbs; ways down, ways up
        count += int(size) if verb in ("gets", "finds") else -int(size)
        assert count == int(total) and bool(more) == (verb in ("gets", "finds"))
    return math.log(options)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_of_full_world_documents_equals_the_parser_and_a_count_by_hand(kind):
    for i in range(30):
        doc = document(kind, "validation", i)
        assert doc.log_prob == pytest.approx(-surprise_by_hand(kind, doc.text), abs=1e-9)
        assert log_prob(doc.text, kind) == pytest.approx(doc.log_prob, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_text_outside_the_language_has_no_probability(kind):
    text, other = document(kind, "train", 1).text, document(KINDS[KINDS.index(kind) - 1], "train", 1).text
    for wrong in ("", other, text[:-1], text + " ", text.replace(" ", "  ", 1), text.replace("a", "A")):
        assert log_prob(wrong, kind) == -math.inf


def test_changing_one_total_makes_a_count_impossible():
    text = document("arithmetic", "train", 0).text
    head, last = re.fullmatch(r"(.* )(\d+)\.", text).groups()
    assert log_prob(text, "arithmetic") > -math.inf == log_prob(f"{head}{int(last) + 1}.", "arithmetic")


def test_document_is_a_pure_function_of_its_arguments():
    first = [document(kind, "train", i) for kind in KINDS for i in range(20)]
    again = [document(kind, "train", i) for kind in reversed(KINDS) for i in reversed(range(20))]
    assert first == again[::-1]
    variants = [
        document("stories", split, i, seed) for split in ("train", "validation") for i in (0, 1) for seed in (0, 1)
    ]
    assert len({doc.text for doc in variants}) == 8


def test_a_town_fact_never_changes():
    said: dict[tuple[str, str], set[str]] = {}  # town, sentence less its last word -> last words
    for i in range(300):
        for part in re.split(r" Another town is ", document("facts", "train", i).text):
            town, *sentences = part.replace(" is a small town", "").rstrip(".").split(". ")
            for sentence in sentences:
                head, _, fact = sentence.rpartition(" ")
                said.setdefault((town, head), set()).add(fact)
    assert len(said) == len(WORLD.towns) * 12 and all(len(facts) == 1 for facts in said.values())


def test_no_validation_document_of_the_recipe_occurs_in_its_training_documents():
    train = {doc.text for doc in documents(Source("builtin/toyworld", split="train[:45000]"), None)}
    for kind in KINDS:
        shard = Source("builtin/toyworld", name=kind, split="validation[:400]")
        validation = [doc.text for doc in documents(shard, None)]
        assert len(set(validation)) == 400 and not train.intersection(validation)


def test_unnamed_corpus_takes_the_kinds_in_turn():
    docs = list(documents(Source("builtin/toyworld", split="train[1:5]"), None))
    expected = [("facts", 1), ("arithmetic", 2), ("stories", 3), ("facts", 4)]
    assert [tuple(doc) for doc in docs] == [tuple(document(kind, "train", i)) for kind, i in expected]
