"""What counts as the same text and the same words."""

import random

import numpy as np
import pytest

from llmkit.data.decontaminate import COMMON, Index, judge
from llmkit.data.dedup import bags, exact_duplicates, near_duplicates, similarity
from llmkit.data.words import ngrams, normalise, pieces, text_hash, word_hashes, words


@pytest.mark.parametrize("other", ["THE  cat\n sat.", "\tthe cat sat.\r\n", "ｔｈｅ cat sat.", "the\u00a0cat sat."])
def test_case_width_and_white_space_make_no_difference(other):
    assert normalise(other) == "the cat sat." and text_hash(other) == text_hash("the cat sat.")


def test_other_texts_have_other_hashes():
    texts = ["the cat sat", "thecat sat", "the cat sat.", "the cat  sat down", "cat the sat", "thé cat sat", ""]
    assert len(set(map(text_hash, texts))) == len(texts)


def test_words_of_scripts_without_blanks_are_their_characters():
    assert list(words("Don't! naïve_x 42, Ünder 漢字とカナ สวัสดี")) == [
        "don", "t", "naïve_x", "42", "ünder", *"漢字とカナ", *"สวัสดี",
    ]  # fmt: skip


def test_pieces_join_to_the_text_and_change_no_hash(monkeypatch):
    rng = random.Random(0)
    text = "".join(rng.choice("aB é\n\t 漢") for _ in range(5000)) + "x" * 300 + " end"
    parts = list(pieces(text, 50))
    assert "".join(parts) == text and len(parts) > 50 and all(part[0] in " \n" for part in parts[1:])
    whole = text_hash(text), list(words(text))
    monkeypatch.setattr("llmkit.data.words.pieces", lambda t: pieces(t, 50))
    assert (text_hash(text), list(words(text))) == whole


def test_runs_of_words_have_one_hash_each_and_depend_on_their_order():
    a, b = word_hashes("a b c d a b c"), word_hashes("c b a")
    runs = ngrams(a, 3)
    assert len(runs) == 5 and runs[0] == runs[4] and len(set(runs.tolist())) == 4
    assert ngrams(b, 3)[0] not in runs and not len(ngrams(b, 4))


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ("a b c d e f g h i j", "a b c d e f g h i x", 9 / 11),
        ("a a b", "a b b", 2 / 4),  # as often as they occur
        ("a b", "B, A!", 1),  # order and signs make no difference to the words
        ("", "", 1),
        ("a", "b", 0),
    ],
)
def test_similarity_by_hand(a, b, expected):
    assert similarity(bags(a), bags(b)) == pytest.approx(expected)


def test_the_first_of_equal_hashes_stays_across_tasks():
    tasks = [np.array([[1, 1], [2, 2], [1, 1]], np.uint64), np.array([[1, 2], [2, 2]], np.uint64)]
    assert [first.tolist() for first in exact_duplicates(tasks)] == [[0, 1, 0], [3, 1]]
    assert exact_duplicates([]) == []


def test_groups_of_near_duplicates_keep_their_first_document():
    texts = {(0, 0): "a b c d", (0, 1): "w x y z", (1, 0): "a b c d e", (1, 1): "a b c d e f", (2, 0): "w x y z"}
    pairs = [[[0, 0], [0, 1]], [[0, 1], [2, 0]], [[1, 0], [1, 1]], [[0, 0], [1, 0]]]
    found = near_duplicates(np.array(pairs), lambda place: bags(texts[place]), 0.8)
    assert set(found) == {(2, 0), (1, 0), (1, 1)}
    assert found[2, 0] == ((0, 1), 1.0) and found[1, 0] == ((0, 0), 0.8)


def test_the_index_finds_whole_texts_and_runs_of_thirteen_words():
    run = " ".join(f"w{i}" for i in range(20))
    index = Index.build([run, "short text"])
    assert len(index.runs) == 8 and index.owners.tolist() == [0] * 8
    assert len(index.hits(f"so {run.upper()} it")) == 8
    twelve = " ".join(run.split()[3:15])
    assert len(index.hits(f"{twelve} other")) == 0 and len(index.hits(f"{twelve}, w15 other")) == 1
    hashes = np.array([text_hash("SHORT  text"), text_hash("short texts")], np.uint64)
    assert index.whole(hashes).tolist() == [1, -1]


def test_runs_of_many_documents_condemn_nobody():
    condemns, boilerplate = judge(np.array([5] * COMMON + [7] * (COMMON + 1)))
    assert condemns.tolist() == [True] * COMMON + [False] * (COMMON + 1) and boilerplate.tolist() == [7]
