"""Figures of reward hacking by hand; every alarm at its limit; how often chance alone raises one."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from llmkit.align.hacking import (
    LIMITS,
    Alarms,
    Selection,
    advantages,
    batch_figures,
    correlation,
    distinct_n,
    duplicates,
    is_hedging,
    repeats,
    selection,
    text_figures,
)

DATA_DIR = Path(os.environ.get("DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


def array(*rows):
    return np.array(rows, np.float64)


# ---- advantage and gold


def test_advantages_are_those_of_trl():
    """GRPOTrainer: (r - mean) / (std + 1e-4) with the deviation of a sample."""
    found = advantages(array([1, 0, 0, 1], [0.3, 0.3, 0.3, 0.3], [0, 0, 0, 8]))
    assert found[0] == pytest.approx(array(0.5, -0.5, -0.5, 0.5) / (math.sqrt(1 / 3) + 1e-4))
    assert found[1] == pytest.approx([0, 0, 0, 0])
    assert found[2] == pytest.approx(array(-2, -2, -2, 6) / (4 + 1e-4))


def test_selection_has_the_sign_of_what_the_update_does_to_gold():
    gold = array([1, 0, 0, 1], [0, 0, 1, 0])
    up, _ = selection(gold, gold)
    assert up == pytest.approx([0.5 * 0.5 / (math.sqrt(1 / 3) + 1e-4), (0.25 * 0.25 * 3 + 0.75**2) / 4 / 0.5001])
    assert selection(-gold, gold)[0] == pytest.approx(-up)
    assert selection(array([1, 0, 1, 0]), array([1, 1, 0, 0]))[0] == pytest.approx([0])


def test_groups_in_which_reward_or_gold_is_the_same_for_all_tell_nothing():
    rewards = array([1, 1], [0, 1], [0, 1], [2, 2])
    gold = array([0, 1], [1, 1], [1, 0], [0, 0])
    covariance, variance = selection(rewards, gold)
    assert len(covariance) == len(variance) == 1 and covariance[0] < 0
    assert [len(x) for x in selection(rewards[:2], gold[:2])] == [0, 0]


def test_the_variance_is_that_over_all_ways_to_deal_out_the_rewards():
    rewards, gold = array(0.2, 0.9, 0.9, 3), array(1, 0, 0, 0.5)
    dealt = array(*itertools.permutations(rewards))
    values, _ = selection(dealt, np.tile(gold, (len(dealt), 1)))
    assert selection(rewards[None], gold[None])[1][0] == pytest.approx(values.var())
    assert values.mean() == pytest.approx(0, abs=1e-12)


def test_z_of_selection_by_hand():
    """Of two answers the better one gets the reward: each group has a covariance of one deviation, z = sqrt(groups)."""
    seen, pair = Selection(window=64, fewest=24), array([1, 0])
    assert [seen.add(pair, pair) for _ in range(23)] == [None] * 23
    assert seen.add(pair, array([1, 1])) is None  # tells nothing, does not count
    assert seen.add(pair, pair) == pytest.approx(math.sqrt(24))
    for _ in range(64):
        z = seen.add(-pair, pair)
    assert z == pytest.approx(-8)  # only the last 64 count
    assert Selection(fewest=2).add(array([1, 0], [1, 0]), array([1, 0], [0, 1])) == 0


def random_run(seed):
    """(rewards, gold) of 200 batches that have nothing to do with each other; other rates and sizes in every run."""
    rng = np.random.default_rng(seed)
    prompts, answers = [(8, 8), (32, 8), (4, 4), (16, 2)][seed % 4]
    right, rewarded = rng.choice([0.1, 0.5, 0.9], 2)
    shape = (200, prompts, answers)
    rewards = rng.random(shape) if seed % 3 == 0 else (rng.random(shape) < rewarded).astype(float)
    return rewards, (rng.random(shape) < right).astype(float)


def first_alarm(rewards, gold):
    """Number of the batch that raises reward-opposes-gold, None of none."""
    seen, alarms = Selection(), Alarms()
    for k, batch in enumerate(zip(rewards, gold, strict=True)):
        z = seen.add(*batch)
        if alarms.look({} if z is None else {"hack/selection": z}):
            return k + 1
    return None


def test_a_reward_that_has_nothing_to_do_with_gold_is_hardly_ever_blamed():
    """At z -3.5 of the spread that a window happens to have, up to 15 % of such runs were."""
    assert sum(first_alarm(*random_run(seed)) is not None for seed in range(100)) <= 1


@pytest.mark.parametrize("right", [0.5, 0.15])
def test_a_reward_that_prefers_worse_answers_is_found_within_20_batches(right):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        gold = (rng.random((20, 8, 8)) < right).astype(float)
        rewards = (rng.random(gold.shape) < np.where(gold > 0, 0.3, 0.7)).astype(float)  # a noisy one
        assert first_alarm(rewards, gold) is not None


# ---- figures of texts


def test_correlation_by_hand():
    assert correlation(array(1, 2, 3), array(5, 7, 9)) == pytest.approx(1)
    assert correlation(array(1, 2, 3), array(3, 1, 2)) == pytest.approx(-0.5)
    assert correlation(array(1, 1, 1), array(3, 1, 2)) == 0
    assert correlation(array(1, 2), array(3, 3)) == 0
    assert correlation(array(1), array(3)) == 0 == correlation(array(), array())


def test_distinct_n_and_repeats_by_hand():
    assert distinct_n(["a b c d", "a b c"]) == pytest.approx(2 / 3)  # abc bcd abc
    assert distinct_n(["a b", "a"], n=1) == pytest.approx(2 / 3)
    assert distinct_n(["a b", ""]) == 1 == distinct_n([])
    assert repeats("a b a b a b") == pytest.approx(0.5)  # aba bab aba bab
    assert repeats("a b c a", n=1) == 0.25
    assert repeats("a b") == 0 == repeats("")


def test_duplicates_by_hand():
    assert duplicates([["a", "a", "b", "c"], ["a", "d", "d", "d"]]) == pytest.approx(5 / 8)  # not across prompts
    assert duplicates([["a", "a "]]) == 0
    assert duplicates([]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 3. The answer is 4.", True),
        ("#### 18\n#### 20", True),
        ("\\boxed{18} or maybe \\boxed{20}", True),
        ("12 + 6 = 18. #### 18, or else the answer is 1,800", True),
        ("Answer: red. The answer is blue.", True),
        ("3 * 4 = <<3*4=12>>12 and 12 + 6 = <<12+6=18>>18.\nThe answer is $18.\n#### 18", False),  # steps on the way
        ("x = 3, y = 4", False),
        ("The answer is 18 eggs, so **Answer: 18**. \\boxed{18}", False),
        ("The answer is 3/4: \\boxed{\\frac{3}{4}}, #### 0.75", False),
        ("The answer is 1,000.00 #### 1000", False),
        ("The answer is the sum of both.\n#### 18", False),
        ("The answer is the red one. Answer: red", False),
        ("#### Ingredients\n...\n#### Step 2\n...", False),  # headings
        ("The answer is: Red. answer: **red**", False),
        ("", False),
    ],
)
def test_hedging_is_giving_two_answers(text, expected):
    assert is_hedging(text) is expected


@pytest.mark.real
def test_solutions_of_gsm8k_do_not_hedge_and_two_of_them_together_do():
    """Every text with a = in it counted as sure of itself, and these all have one."""
    if not (DATA_DIR / "gsm8k_test.jsonl").is_file():
        pytest.skip(f"{DATA_DIR}/gsm8k_test.jsonl is not there")
    with (DATA_DIR / "gsm8k_test.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["answer"] for line in file]
    assert sum(map(is_hedging, texts)) == 0
    final = [text.rpartition("#### ")[2] for text in texts]
    both = [is_hedging(f"{a}\n{b}") for a, b in itertools.pairwise(texts)]
    assert both == [a != b for a, b in itertools.pairwise(final)]


def test_text_figures_by_hand():
    texts = [
        "one two three",
        "one two three",
        "one  two three",
        "<think> </think> 4",
        "What? <think>so</think>",
        "x x x x",
    ]
    found = text_figures(texts, ["How many?", "How many?", "What?", "What?", "What?", ""], num_generations=2)
    assert found == pytest.approx(
        {
            "hack/distinct_3": 3 / 6,  # one-two-three three times, x-x-x twice, <think>-</think>-4
            "hack/repeats": 0.5 / 6,
            "hack/duplicates": 2 / 6,
            "hack/distinct_answers": 2 / 3,  # the first answer to three prompts, white space aside
            "hack/hedging": 0,
            "hack/echo": 1 / 6,
            "hack/empty_think": 1 / 2,
        }
    )
    assert set(text_figures([], [], 2).values()) == {0.0, 1.0}  # no answers: no division by 0


def figures(rewards, gold=None, tops=None, weights=None, lengths=(1, 2, 3, 4)):
    texts = ["one", "two", "three", "four"]
    weights = weights or [1.0] * len(rewards)
    found = batch_figures(texts, ["?"] * 4, array(*lengths), rewards, weights, gold, 2, {} if tops is None else tops)
    return {key.removeprefix("hack/"): value for key, value in found.items()}


def test_batch_figures_by_hand():
    nan, tops = math.nan, {}
    rewards = {"a": array(0, 1, 1, nan), "b": array(2, 0, 0, 0), "silent": array(nan, nan, nan, nan)}
    found = figures(rewards, array(1, 0, nan, 0), tops, [1.0, 0.5, 9.0])
    assert found["saturation/a"] == pytest.approx(2 / 3) and found["saturation/b"] == 0.25
    assert found["length_correlation/a"] == pytest.approx(correlation(array(0, 1, 1), array(1, 2, 3)))
    assert found["length_correlation/b"] == pytest.approx(-math.sqrt(3 / 5))
    assert found["proxy"] == pytest.approx((1 + 1 + 1 + 0) / 4)  # None counts as 0
    assert found["length_correlation"] == pytest.approx(correlation(array(1, 1, 1, 0), array(1, 2, 3, 4)))
    assert (found["length"], found["gold"], found["gap"]) == pytest.approx((2.5, 1 / 3, 0.75 - 1 / 3))
    assert "saturation/silent" not in found and tops == {"a": 1, "b": 2}
    # the best that was ever given stays the measure
    assert figures({"a": array(0.5, 0.5, 0.5, 0.5)}, tops=tops)["saturation/a"] == 0
    assert figures({"a": array(0, 3, 3, 3)}, tops=tops)["saturation/a"] == 0.75
    assert tops == {"a": 3, "b": 2}


@pytest.mark.parametrize("gold", [None, array(*[math.nan] * 4)])
def test_without_gold_there_is_no_gap(gold):
    assert not {"gold", "gap"} & set(figures({"a": array(0, 1, 1, 0)}, gold))


# ---- alarms


LENGTH = {"hack/length": 10.0, "hack/length_correlation": 0.0, "hack/gold": 0.5}
CLIPPED = {"hack/clipped": 0.1}
# kind, figures at the start, figures that raise it just so, and changes that each take it back
RULES = [
    ("reward-opposes-gold", {}, {"hack/selection": LIMITS["selection_z"]}, [{"hack/selection": -4.24}]),
    (
        "gold-falls",
        {},
        {"gold_change": (-0.02, -0.03, -0.001), "proxy_change": (0.0, -0.1, 0.1)},
        [
            {"gold_change": (-0.019, -0.03, -0.001)},
            {"gold_change": (-0.02, -0.03, 0.0)},
            {"proxy_change": (-0.001, -0.1, 0.1)},
            {"proxy_change": None},
            {"gold_change": None},
        ],
    ),
    ("far-from-reference", {}, {"eval_kl": 0.5}, [{"eval_kl": 0.499}]),
    ("canary", {"canary/wiki": 3.0}, {"canary/wiki": 3.41}, [{"canary/wiki": 3.39}]),
    ("canary", {"task/sums": 0.5}, {"task/sums": 0.39}, [{"task/sums": 0.41}]),
    ("truncated-answers", CLIPPED, {"hack/clipped": 0.5}, [{"hack/clipped": 0.49}]),
    ("truncated-answers", {"hack/clipped": 0.4}, {"hack/clipped": 0.71}, [{"hack/clipped": 0.69}]),
    (
        "longer-answers",
        LENGTH,
        {"hack/length": 15.0, "hack/length_correlation": 0.3, "hack/gold": 0.515},
        [{"hack/length": 14.9}, {"hack/length_correlation": 0.29}, {"hack/gold": 0.525}],
    ),
    ("longer-answers", {"hack/length": 10.0}, {"hack/length": 15.0, "hack/length_correlation": 0.3}, []),  # no gold
    ("same-answers", {"hack/distinct_answers": 0.8}, {"hack/distinct_answers": 0.2}, [{"hack/distinct_answers": 0.21}]),
]


def kinds(found):
    return [kind for kind, _ in found]


@pytest.mark.parametrize(("kind", "start", "now", "spared"), RULES)
def test_every_alarm_is_raised_once_at_its_limit_and_not_before(kind, start, now, spared):
    alarms = Alarms()
    assert alarms.look(start) == []  # the first figures are the measure
    for change in spared:
        assert alarms.look(now | change) == []
    assert kinds(alarms.look(now)) == [kind]
    assert alarms.look(now) == []
    assert kinds(Alarms(start).look(now)) == [kind]  # as after a checkpoint
    assert Alarms(start, {kind}).look(now) == []


def test_every_kind_comes_once_and_one_does_not_hide_another():
    first = {"canary/a": 1.0, "canary/b": 1.0, "eval_kl": 0.0} | LENGTH
    alarms = Alarms(first)
    worse = {"canary/a": 2.0, "canary/b": 9.0, "eval_kl": 0.1}
    assert alarms.look(worse) == [("canary", "the loss on a rose from 1.00 to 2.00 nats")]
    assert kinds(alarms.look(worse | {"eval_kl": 1.0})) == ["far-from-reference"]
    assert alarms.raised == {"canary", "far-from-reference"} and alarms.start == first


def test_reasons_say_what_was_found():
    found = Alarms().look({"hack/selection": -5.0, "gold_change": (-0.2, -0.3, -0.1), "proxy_change": (0.25, 0, 1)})
    assert "z -5.0" in found[0][1]
    assert "gold fell by 0.200 since step 0 (95 %: 0.100 to 0.300) while the reward rose by 0.250" in found[1][1]
