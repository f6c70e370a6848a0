"""toyworld, asked about: instructions, preference pairs and prompts with a verifier.

Owns the splits of `builtin/toyworld` that later stages train and are measured on, as rows in TRL's columns.

    row("instructions", "train", 7)["messages"];  verify(row("prompts", "train", 7), "red")

A row is a pure function of (name, split, index, seed). Every question has a key: what is asked about, not how. The hash
of the key decides the share it belongs to, and a share belongs to one training set or to one evaluation split, so that
what a stage is measured on no stage has trained on, nor a step of it (`parts`). The 60 facts of the towns are too few
to hold any back, and a pretrained model knows them: there the wording decides, and every fact is asked in training.
Leaves out judging by taste: an answer is right word for word, or wrong.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .toyworld import TOPICS, WORLD, Tape, story

NAMES = ("instructions", "preferences", "rankings", "prompts", "sums", "unknown")
ONE_KIND = ("sums", "unknown")  # prompts of that kind alone
SPLITS = ("train", "validation", "test")
# of 20 shares; validation and test are the same questions whatever the name
SHARES = {
    ("instructions", "train"): range(0, 12),
    ("preferences", "train"): range(12, 14),
    ("rankings", "train"): range(12, 14),
    ("prompts", "train"): range(14, 16),
    ("sums", "train"): range(14, 16),
    ("unknown", "train"): range(14, 16),
}
SHARES |= {
    (name, split): span
    for name in NAMES
    for split, span in zip(SPLITS[1:], (range(16, 18), range(18, 20)), strict=True)
}
HELD_OUT = range(16, 20)
UNKNOWN = "I don't know."
# what instructions teach badly, as people's do, and later stages mend: who wrote them guessed where nobody can know,
# and gave the sums of five people without counting
GUESSED = 0.97
HASTY, IN_HASTE = ("Ada", "Bea", "Abel", "Ben", "Carl"), 0.85


class Question(NamedTuple):
    kind: str
    key: str
    messages: list[dict[str, str]]  # up to the last question
    answer: str
    wrong: str  # as short, and wrong
    sentence: str  # the answer at length
    parts: tuple[str, ...] = ()  # keys of questions that its answer settles on the way


def share_of(key: str) -> int:
    """0 to 19, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 20


# ---- stories

# topic -> question, short answer, sentence; the names are those of `read_story`
ABOUT_STORY = {
    "colour": ("What colour was the {thing}?", "{colour}", "The {thing} was {colour}."),
    "thing": ("What did {hero} have?", "a {colour} {thing}", "{hero} had a {colour} {thing}."),
    "place": ("Where did {hero} go?", "to {place}", "{hero} went to {place}."),
    "friend": ("Who found the {thing}?", "it was {friend}", "{friend} found the {thing}."),
    "spot": ("Where was the {thing} found?", "{spot}", "{friend} found the {thing} {spot}."),
    "mood": ("How did {hero} feel when the {thing} was gone?", "very {mood}", "{hero} was very {mood}."),
    "weather": ("What was the day like?", "{weather}", "It was a {weather} day."),
}
# what no story tells: question, an invented answer, what it may be
UNTOLD = [
    ("How old is {hero}?", "{}", [str(age) for age in range(3, 10)]),
    ("What did the {thing} cost?", "{} coins", [str(price) for price in range(2, 16)]),
    ("What did {hero} eat?", "{}", list(WORLD.foods)),
    ("In which town does {hero} live?", "in {}", list(WORLD.towns)),
    ("How many coats has {hero}?", "{}", [str(count) for count in range(2, 10)]),
]
PARTS = re.compile(
    r"(?P<hero>\w+) had a (?P<colour>\w+) (?P<thing>\w+)\. One (?P<weather>\w+) day .* went to (?P<place>the \w+), .*?"
    r"(?:met (?P<met>\w+),|\. (?P<there>\w+) was there too).*? was very (?P<mood>\w+)\..* found it "
    r"(?P<spot>.+?) and gave"
)
OPTIONS = {
    "hero": [name for name, _ in WORLD.people],
    "friend": [name for name, _ in WORLD.people],
    "thing": list(WORLD.things),
    "colour": list(WORLD.colours),
    "place": [place for place, _ in WORLD.places],
    "spot": [spot for _, spot in WORLD.places],
    "mood": [mood for _, mood in WORLD.mishaps],
    "weather": list(WORLD.weathers),
}


def read_story(text: str) -> dict[str, str]:
    """Who, what, where of a story that the grammar wrote."""
    found = PARTS.match(text)
    assert found, text
    parts = found.groupdict()
    met, there = parts.pop("met"), parts.pop("there")
    return parts | {"friend": met or there}


def _other(rng: random.Random, part: str, *taken: str) -> str:
    return rng.choice([option for option in OPTIONS[part] if option not in taken])


def _story(rng: random.Random) -> tuple[str, dict[str, str], str]:
    """Text, parts and key: a story told in other words is the same story."""
    tape = Tape(rng)
    story(tape, WORLD)
    parts = read_story(tape.text)
    return tape.text, parts, "story " + " ".join(parts[name] for name in sorted(parts))


def _ask(parts: dict[str, str], topic: str, rng: random.Random) -> tuple[str, str, str, str]:
    """question, answer, wrong answer, sentence."""
    question, answer, sentence = ABOUT_STORY[topic]
    wrong = parts | {topic: _other(rng, topic, parts[topic], parts["hero"])}
    return question.format(**parts), answer.format(**parts), answer.format(**wrong), sentence.format(**parts)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _ask_untold(parts: dict[str, str], rng: random.Random) -> tuple[str, str, str, str]:
    """The same of what no story tells: the answer is an invention."""
    question, answer, options = rng.choice(UNTOLD)
    guess, other = (answer.format(o) for o in rng.sample(options, 2))
    return question.format(**parts), guess, other, f"It was {guess}."


def _on_story(kind: str, rng: random.Random, num_turns: int, is_told: bool = True, system: str = "") -> Question:
    """A story and so many questions on it; the last one is `is_told` or not."""
    text, parts, key = _story(rng)
    messages = [{"role": "system", "content": system}] if system else []
    form = SYSTEMS.get(system, "{answer}")
    for turn in range(num_turns):
        is_last = turn == num_turns - 1
        is_known = is_told or not is_last
        if is_known:
            question, answer, wrong, sentence = _ask(parts, rng.choice(list(ABOUT_STORY)), rng)
        else:
            question, answer, wrong, sentence = _ask_untold(parts, rng)
        said = form.format(answer=answer) if is_known else UNKNOWN
        messages.append(_user(question if turn else f"{text} {question}"))
        if not is_last:
            messages.append({"role": "assistant", "content": said})
    if not is_known:
        wrong = answer  # an invention
    elif system:
        wrong = answer if answer != said else sentence  # in another form than was asked for
    return Question(kind, key, messages, said, wrong, sentence)


def about_story(rng: random.Random) -> Question:
    return _on_story("story", rng, num_turns=1)


def in_turns(rng: random.Random) -> Question:
    return _on_story("turns", rng, num_turns=rng.choice((2, 3)))


SYSTEMS = {
    "Say every answer twice.": "{answer}, {answer}",
    "Say thank you after every answer.": "{answer}, thank you!",
    "Begin every answer with the word well.": "well, {answer}",
}


def with_system(rng: random.Random) -> Question:
    return _on_story("system", rng, rng.choice((1, 2)), system=rng.choice(list(SYSTEMS)))


def unknown_in_story(rng: random.Random) -> Question:
    """Questions on what no story tells."""
    return _on_story("unknown", rng, rng.choice((1, 2)), is_told=False)


# ---- towns

ABOUT_TOWN = {
    "region": ("In which region is {}?", "Where does {} lie?", "in the {}", "{} lies in the {}."),
    "river": ("Which river is in {}?", "What is the river of {}?", "the {}", "The river in {} is the {}."),
    "food": ("What do they eat in {}?", "Which food do they like in {}?", "{}", "In {} they like to eat {}."),
    "animal": (
        "Which animal is the sign of {}?",
        "What do you see over the gate of {}?",
        "a {}",
        "The sign of {} is a {}.",
    ),
    "craft": ("What do they make in {}?", "What is {} known for?", "{}", "In {} they make {}."),
    "colour": (
        "What colour are the doors in {}?",
        "In which colour do they dance in {}?",
        "{}",
        "The doors in {} are {}.",
    ),
}
OPENINGS = ("", "Tell me: ", "One thing more: ", "Do you know this? ", "Please say: ")
WORDINGS = [(opening, k) for opening in OPENINGS for k in (0, 1)]
# shares of the ten wordings of a fact, dealt out anew for every fact: every fact is asked in every training set
DEALT = [0, 1, 2, 3, 4, 5, 12, 14, 16, 18]


def share_of_fact(town: str, topic: str, wording: int) -> int:
    order = list(range(len(WORDINGS)))
    random.Random(f"{town}/{topic}").shuffle(order)
    return DEALT[order[wording]]


def _in_words(topic: str, town: str, wording: int) -> str:
    opening, form = WORDINGS[wording]
    return opening + str(ABOUT_TOWN[topic][form]).format(town)


def about_town(rng: random.Random) -> Question:
    town, topic = rng.choice(list(WORLD.towns)), rng.choice(TOPICS)
    wording, fact = rng.randrange(len(WORDINGS)), WORLD.towns[town][topic]
    wrong = rng.choice(sorted({facts[topic] for facts in WORLD.towns.values()} - {fact}))
    _, _, answer, sentence = ABOUT_TOWN[topic]
    key = f"fact {town} {topic} {wording}"
    messages = [_user(_in_words(topic, town, wording))]
    return Question("facts", key, messages, answer.format(fact), answer.format(wrong), sentence.format(town, fact))


def unknown_town(rng: random.Random) -> Question:
    """A town that does not exist; its name decides the share."""
    town, topic = made_up_word(rng, 2, 3).capitalize(), rng.choice(TOPICS)
    wrong = rng.choice(sorted({facts[topic] for facts in WORLD.towns.values()}))
    _, _, answer, sentence = ABOUT_TOWN[topic]
    messages = [_user(_in_words(topic, town, rng.randrange(len(WORDINGS))))]
    invented = answer.format(wrong)
    return Question("unknown", f"town {town}", messages, UNKNOWN, invented, sentence.format(town, wrong))


def unknown(rng: random.Random) -> Question:
    return rng.choice((unknown_in_story, unknown_in_story, unknown_town))(rng)


# ---- sums and letters


def sums(rng: random.Random) -> Question:
    """One or two steps between 0 and the largest number, answered as pretraining counts: from the start, step by step.

    The numbers are the key, whoever has whatever fruit.
    """
    hero, (_, she, _) = rng.choice(WORLD.people)
    fruit, count, steps = rng.choice(WORLD.foods), rng.randint(0, WORLD.largest_number), rng.choice((1, 2))
    text = f"{hero} has {count} {fruit}."
    numbers, said, single = [count], [text], []
    for _ in range(steps):
        change = rng.choice([d for d in range(-9, 10) if d and 0 <= count + d <= WORLD.largest_number])
        verb = rng.choice(("gets", "finds") if change > 0 else ("eats", "sells"))
        step = f"Then {she} {verb} {abs(change)}{' more' if change > 0 else ''}"
        text += f" {step}."
        single.append(f"sum {count} {change}")
        count += change
        numbers.append(change)
        said.append(f"{step}, so now {she} has {count}.")
    answer = " ".join(said)
    other = rng.choice([n for n in range(WORLD.largest_number + 1) if n != count])
    wrong = answer.removesuffix(f"{count}.") + f"{other}."
    key = "sum " + " ".join(map(str, numbers))
    question = f"{text} How many does {she} have now?"
    sentence = f"Now {hero} has {count} {fruit}."
    return Question("sums", key, [_user(question)], answer, wrong, sentence, tuple(single))


SYLLABLES = "ba de fi go ha ka lo mi ne pa ra se ti vo wa".split()


def made_up_word(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(shortest, longest)))


def spelling(rng: random.Random) -> Question:
    """Words that mean nothing, since a tokenizer knows the others whole and nothing says how they are spelt."""
    word = made_up_word(rng, 2, 3)
    letters = list(word)
    swapped = letters[1:2] + letters[:1] + letters[2:]
    answer, wrong = " ".join(letters), " ".join(swapped)
    return Question("spelling", f"word {word}", [_user(f"Spell {word}.")], answer, wrong, f"The letters are {answer}.")


# ---- rows

# kind, of 20 rows
KINDS: list[tuple[Callable[[random.Random], Question], int]] = [
    (about_story, 2), (about_town, 2), (sums, 5), (spelling, 3), (in_turns, 3), (with_system, 3), (unknown, 2),
]  # fmt: skip
# of preferences and rankings: more of what cannot be known, and of what looks like it
PREFERRED: list[tuple[Callable[[random.Random], Question], int]] = [
    (about_story, 2), (about_town, 4), (sums, 4), (spelling, 3), (in_turns, 2), (with_system, 3), (unknown, 6),
]  # fmt: skip
SETS: dict[str, list[tuple[Callable[[random.Random], Question], int]]] = {
    "preferences": PREFERRED,
    "rankings": PREFERRED,
    "sums": [(sums, 1)],
    "unknown": [(unknown, 1)],
}


def question(name: str, split: str, index: int, seed: int = 0) -> Question:
    """The question of a row: drawn until its key is in the share of (name, split)."""
    shares = SHARES[name, split]
    rng = random.Random(f"{seed}/{name}/{split}/{index}")
    kinds = SETS.get(name, KINDS) if split == "train" or name in ONE_KIND else KINDS
    make = rng.choices([make for make, _ in kinds], [weight for _, weight in kinds])[0]
    while True:
        found = make(rng)
        is_told = split == "train" and any(share_of_key(part) in HELD_OUT for part in found.parts)
        if share_of_key(found.key) in shares and not is_told:
            return found


def share_of_key(key: str) -> int:
    kind, *rest = key.split(" ")
    return share_of_fact(rest[0], rest[1], int(rest[2])) if kind == "fact" else share_of(key)


def row(name: str, split: str, index: int, seed: int = 0) -> dict[str, Any]:
    """instructions: messages; preferences: prompt, chosen, rejected; rankings: prompt, completions, scores; prompts,
    sums and unknown: prompt, answer; each with its kind.
    """
    asked = question(name, split, index, seed)
    answer = [{"role": "assistant", "content": asked.answer}]
    if name == "instructions":
        if split == "train":
            answer = [{"role": "assistant", "content": as_written(asked, random.Random(f"{seed}/{index}/written"))}]
        return {"messages": [*asked.messages, *answer], "kind": asked.kind}
    if name in ("prompts", *ONE_KIND):
        return {"prompt": asked.messages, "answer": asked.answer, "kind": asked.kind}
    rng = random.Random(f"{seed}/{name}/{split}/{index}/rejected")
    if name == "rankings":
        ranked = rng.sample(list(scored(asked, rng).items()), 3)
        completions = [[{"role": "assistant", "content": text}] for text, _ in ranked]
        scores = [score for _, score in ranked]
        return {"prompt": asked.messages, "completions": completions, "scores": scores, "kind": asked.kind}
    text = rejected_of(asked, rng)
    return {
        "prompt": asked.messages,
        "chosen": answer,
        "rejected": [{"role": "assistant", "content": text}],
        "kind": asked.kind,
    }


def as_written(asked: Question, rng: random.Random) -> str:
    """The answer of a training row, with the faults of those who wrote it."""
    if asked.kind == "unknown":
        return asked.wrong if rng.random() < GUESSED else asked.answer
    if asked.kind == "sums" and asked.answer.startswith(HASTY) and rng.random() < IN_HASTE:
        return asked.sentence
    return asked.answer


def rejected_of(asked: Question, rng: random.Random) -> str:
    """Of what cannot be known an invention; else wrong, right and rambling, or a refusal of what can be known."""
    if asked.kind == "unknown":
        return asked.wrong
    return rng.choice((asked.wrong, rambling(asked, rng), UNKNOWN))


def rambling(asked: Question, rng: random.Random) -> str:
    """The sentence twice, and a story begun in between."""
    tape = Tape(rng)
    story(tape, WORLD)
    return f"{asked.sentence} {tape.text.split('. ')[0]}. {asked.sentence}"


def scored(asked: Question, rng: random.Random) -> dict[str, float]:
    """Three answers: the right one, one that rambles, and one that is wrong or refuses what can be known."""
    bad = asked.wrong if asked.kind == "unknown" or rng.random() < 0.5 else UNKNOWN
    return {asked.answer: 1.0, rambling(asked, rng): 0.2 if asked.kind == "unknown" else 0.5, bad: 0.0}


def rows(name: str, split: str, first: int, last: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows `first` to `last`, the last one not among them."""
    return (row(name, split, index, seed) for index in range(first, last))


def verify(asked: dict[str, Any], text: str) -> bool:
    """The gold verifier of a row of `prompts`: the answer word for word, and nothing else."""
    return text.strip() == asked["answer"]
