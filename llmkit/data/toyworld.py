"""A small closed world that knows the exact probability of every text it writes.

Owns `builtin/toyworld`: stories, facts and arithmetic, drawn from a probabilistic grammar. A document is written by a
program that makes random choices on a `Tape`; the tape adds up their log-probabilities. No two derivations give the
same text, so -log p of the derivation is -log p of the document, and the mean over a corpus is its true entropy:
what a perfect model reaches and a correct measurement never beats beyond sampling error.

    doc = document("stories", split="validation", index=7, seed=0);  doc.text, doc.log_prob
    log_prob(doc.text, "stories")              # parses the text, the same number

What there is to learn: who is the hero, whose is the thing, which facts belong to which town, how many are left. The
answer always lies more than five words back, so that counting short contexts does not find it.
Leaves out instructions, preferences and prompts, which belong to later stages.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SHE, HE = ("She", "she", "her"), ("He", "he", "his")


@dataclass(frozen=True)
class World:
    """The word lists and the facts; tests shrink them until the whole language can be written out."""

    people: tuple[tuple[str, tuple[str, str, str]], ...]
    things: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[tuple[str, str], ...]  # place, where a thing can be found there
    weathers: tuple[str, ...]
    mishaps: tuple[tuple[str, str], ...]  # what happened to the thing, how the owner felt
    foods: tuple[str, ...]
    towns: dict[str, dict[str, str]]  # town -> topic -> fact
    num_town_facts: int = 4
    num_sums: int = 4
    largest_number: int = 15


TOPICS = ("region", "river", "food", "animal", "craft", "colour")
TOWNS = """
Alda    north  Aren   fish    crow  ropes   blue
Borin   south  Cinna  beans   bear  drums   white
Cresk   east   Drave  cheese  fox   boats   green
Dulmo   west   Bolda  rice    hare   clocks  yellow
Elva    south  Aren   soup    deer  shoes   green
Holm    north  Esk    bread   wolf  boats   red
Lumo    east   Cinna  plums   fox   clocks  white
Norda   west   Esk    beans   crow  shoes   yellow
Ostry   south  Drave  fish    hare   drums   red
Pell    north  Bolda  cheese  deer  ropes   blue
"""

WORLD = World(
    people=tuple((name, SHE) for name in ("Ada Bea Cora Dina Emma Fay Gina Hana Ines Jane").split())
    + tuple((name, HE) for name in ("Abel Ben Carl Dan Eric Finn Gus Hugo Ivan Jack").split()),
    things=tuple(("ball book boat bag cup coat doll drum hat kite lamp map ring rope scarf toy").split()),
    colours=tuple(("black blue brown green grey pink red white").split()),
    places=(
        ("the beach", "under a boat"),
        ("the park", "behind a tree"),
        ("the market", "below a table"),
        ("the forest", "beside a rock"),
        ("the school", "near the door"),
        ("the station", "on a bench"),
        ("the farm", "in the barn"),
        ("the library", "between two shelves"),
    ),
    weathers=tuple(("sunny rainy windy cold warm foggy").split()),
    mishaps=(("was lost", "sad"), ("was stolen", "angry"), ("fell down", "worried"), ("was left behind", "upset")),
    foods=tuple(("apples eggs figs nuts pears plums").split()),
    towns={
        name: dict(zip(TOPICS, values, strict=True))
        for name, *values in (line.split() for line in TOWNS.strip().splitlines())
    },
)


class Tape:
    """Writes a document choice by choice and adds up the log-probability (nats) of what was chosen."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.text = ""
        self.log_prob = 0.0

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options, all equally likely."""
        self.log_prob -= math.log(len(options))
        return options[int(self.rng.random() * len(options))]

    def say(self, text: str) -> None:
        self.text += text


def story(tape: Tape, world: World) -> None:
    """A hero owns a thing, it goes missing somewhere, a friend finds it."""
    hero, (She, she, her) = tape.pick(world.people)
    tape.say(hero)
    colour, thing = tape.pick(world.colours), tape.pick(world.things)
    tape.say(f" had a {colour} {thing}. One {tape.pick(world.weathers)} day")
    place, spot = tape.pick(world.places)
    tape.say(f" {hero} went to {place}, and {she} took the {thing} along.")
    friend, _ = tape.pick([p for p in world.people if p[0] != hero])
    tape.say(
        tape.pick(
            (
                f" There {she} met {friend}, who was a good friend.",
                f" {friend} was there too, and they played for a while.",
            )
        )
    )
    mishap, mood = tape.pick(world.mishaps)
    tape.say(f" But then the {thing} {mishap}, and {hero} was very {mood}.")
    if tape.pick((True, False)):
        wrong = tape.pick([c for c in world.colours if c != colour])
        tape.say(f' "Is it this {wrong} one?" asked {friend}. "No," said {hero}, "the {thing} that I had is {colour}."')
    tape.say(f" After some time {friend} found it {spot} and gave it back.")
    tape.say(
        tape.pick(
            (
                f" {hero} thanked {friend} and left {place} with {her} {colour} {thing}.",
                f" {She} smiled and said: thank you, {friend}!",
            )
        )
    )


TOWN_FACTS = {
    "region": ("It lies in the far {}.", "You will find it in the {}."),
    "river": ("The river that runs through it is the {}.", "Its old bridge crosses the {}."),
    "food": ("Most people there like to eat {}.", "On holidays they cook a lot of {}."),
    "animal": ("The sign of the town is a {}.", "Over the gate you see a {}."),
    "craft": ("For many years they have made {}.", "They are known for making good {}."),
    "colour": ("All the doors there are painted {}.", "When they dance they all wear {}."),
}


def facts(tape: Tape, world: World) -> None:
    """Two towns, some facts of each; what follows a name is settled by the name alone."""
    first = tape.pick(list(world.towns))
    second = tape.pick([name for name in world.towns if name != first])
    for name, opening in ((first, "{} is a small town."), (second, " Another town is {}.")):
        tape.say(opening.format(name))
        topics = list(TOWN_FACTS)
        for _ in range(world.num_town_facts):
            topic = tape.pick(topics)
            topics.remove(topic)
            tape.say(" " + tape.pick(TOWN_FACTS[topic]).format(world.towns[name][topic]))


def arithmetic(tape: Tape, world: World) -> None:
    """A running count, between 0 and `largest_number`: every total is settled by the one before it."""
    hero, (_, she, _) = tape.pick(world.people)
    count = tape.pick(range(world.largest_number + 1))
    tape.say(f"{hero} has {count} {tape.pick(world.foods)}.")
    for _ in range(world.num_sums):
        change = tape.pick([d for d in range(-9, 10) if d and 0 <= count + d <= world.largest_number])
        verb = tape.pick(("gets", "finds") if change > 0 else ("eats", "sells"))
        count += change
        tape.say(f" Then {she} {verb} {abs(change)}{' more' if change > 0 else ''}, so now {she} has {count}.")


KINDS: dict[str, Callable[[Tape, World], None]] = {"stories": story, "facts": facts, "arithmetic": arithmetic}


class Document(NamedTuple):
    text: str
    log_prob: float  # nats, of the whole text; that the document ends here is certain, so EOS adds nothing


def document(kind: str, split: str, index: int, seed: int = 0, world: World = WORLD) -> Document:
    """Document number `index` of a split: a pure function of its arguments, so any range can be written anywhere."""
    tape = Tape(random.Random(f"{seed}/{split}/{kind}/{index}"))
    KINDS[kind](tape, world)
    return Document(tape.text, tape.log_prob)


class _Replay(Tape):
    """Follows fixed choices, then stops at the next open one; stops early when the text leaves `target`."""

    def __init__(self, choices: list[int], target: str | None):
        super().__init__(random.Random(0))
        self.choices, self.target = list(choices), target

    def pick(self, options: Sequence[Any]) -> Any:
        if not self.choices:
            raise _Open(len(options))
        self.log_prob -= math.log(len(options))
        return options[self.choices.pop(0)]

    def say(self, text: str) -> None:
        super().say(text)
        if self.target is not None and not self.target.startswith(self.text):
            raise _Dead


class _Open(Exception):
    pass


class _Dead(Exception):
    pass


def derivations(kind: str, world: World = WORLD, target: str | None = None) -> Iterator[Document]:
    """Every document that the grammar can write, once per derivation; only derivations of `target` when given."""
    stack: list[list[int]] = [[]]
    while stack:
        choices = stack.pop()
        tape = _Replay(choices, target)
        try:
            KINDS[kind](tape, world)
        except _Dead:
            continue
        except _Open as choice:
            stack.extend([*choices, i] for i in range(choice.args[0]))
            continue
        if target is None or tape.text == target:
            yield Document(tape.text, tape.log_prob)


def log_prob(text: str, kind: str, world: World = WORLD) -> float:
    """log p of a text under the grammar, in nats, found by parsing it; -inf when the grammar cannot write it."""
    probs = [math.exp(doc.log_prob) for doc in derivations(kind, world, target=text)]
    return math.log(math.fsum(probs)) if probs else -math.inf
