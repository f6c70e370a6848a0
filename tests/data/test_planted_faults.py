"""Faults planted in a corpus by code that shares nothing with what finds them; the clean originals raise no alarm."""

import json
import random
from pathlib import Path

import pytest

from llmkit.data import prepare
from llmkit.verbs import DataConfig

DATA = Path(__file__).parents[3] / "shared" / "data"
SYLLABLES = "ka lo mi ten ra su vel dor in pa que sto mar le fi on gra ti ber no".split()
ACCENTED = [
    "café",
    "naïve",
    "Ærø",
    "déjà vu",
    "Ångström",
    "señor",
    "über",
    "Île",
    "œuvre",
    "Čapek",
    "“quoted”",
    "it’s",
    "±5 °C",
]


def _vocabulary(rng):
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(4000)]


def _document(rng, vocabulary, num_words):
    """Zipf-like words in sentences, a few of them with accents."""
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    words = rng.choices(vocabulary, weights, k=num_words)
    for _ in range(max(1, num_words // 60)):
        words[rng.randrange(num_words)] = rng.choice(ACCENTED)
    return " ".join(word + (". " if i % 11 == 10 else "") for i, word in enumerate(words))


def _made_up(num):
    rng = random.Random(1)
    vocabulary = _vocabulary(rng)
    return [_document(rng, vocabulary, rng.randint(40, 400)) for _ in range(num)]


def _real(data_dir):
    rows = [json.loads(line)["text"] for line in (data_dir / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("wiki_demo.txt", "wikitext2_valid.txt"):
        rows += (data_dir / name).read_text(encoding="utf-8").split("\n")
    return [row[:1500] for row in dict.fromkeys(rows) if len(row.split()) >= 40]


def _replace_words(rng, text, share):
    """`share` of the words become other words of this language, at random places."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if word.strip()]
    for i in rng.sample(places, max(1, round(share * len(places)))):
        words[i] = "".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 9)))
    return " ".join(words)


def _run(tmp_path, train, validation=(), **keys):
    for name, texts in (("train", train), ("validation", validation)):
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shards = [{"path": "json", "data_files": "validation.jsonl", "shard": "held"}] if validation else []
    keys = {"vocab_size": 300, "num_workers": 1} | keys
    datasets = [{"path": "json", "data_files": "train.jsonl"}]
    config = DataConfig(
        output_dir=str(tmp_path / "corpus"), data_dir=str(tmp_path), datasets=datasets, eval_datasets=shards, **keys
    )
    figures = prepare.main(config)
    return {(r["fate"], r["reason"]): r for r in figures["reasons"]}, tmp_path / "corpus"


def _lines(path):
    """Line numbers of train.jsonl that a list names."""
    return {int(json.loads(line)["where"].split()[-1]) for line in path.read_text(encoding="utf-8").splitlines()}


@pytest.fixture(params=["made up", pytest.param("real", marks=pytest.mark.real)])
def originals(request):
    if request.param == "made up":
        return _made_up(200)
    if not (DATA / "c4_demo.jsonl").exists():
        pytest.skip("c4_demo.jsonl is not at hand")
    return _real(DATA)


def test_clean_originals_raise_no_alarm(tmp_path, originals):
    half = len(originals) // 2
    found, corpus = _run(tmp_path, originals[half:], originals[:half])
    for reason in ("exact-duplicate", "near-duplicate", "contaminated", "mojibake"):
        count = sum(r["count"] for (_, name), r in found.items() if name == reason)
        assert count <= 0.001 * len(originals), reason
    assert len(_lines(corpus / "duplicates.jsonl")) <= 0.001 * len(originals)  # the real ones: two lists of one crew


def test_every_exact_duplicate_is_found(tmp_path, originals):
    rng = random.Random(2)
    copies = rng.sample(originals, 40)
    changes = [str, str.upper, lambda t: t.replace(" ", "  "), lambda t: f"\n{t}\n\n"]
    planted = [changes[i % 4](text) for i, text in enumerate(copies)]
    found, corpus = _run(tmp_path, [*originals, *planted], near_dedup=False)
    assert _lines(corpus / "duplicates.jsonl") == set(range(len(originals) + 1, len(originals) + 41))
    assert found["dropped", "exact-duplicate"]["count"] == 40


def test_near_duplicates_with_a_tenth_of_the_words_replaced_are_found(tmp_path, originals):
    rng = random.Random(3)
    planted = [_replace_words(rng, text, 0.1) for text in rng.sample(originals, 100)]
    _, corpus = _run(tmp_path, [*originals, *planted])
    found = _lines(corpus / "duplicates.jsonl")
    assert len(found & set(range(len(originals) + 1, len(originals) + 101))) >= 95
    assert len(found & set(range(1, len(originals) + 1))) <= 0.001 * len(originals)


def test_texts_that_share_only_half_of_their_words_stay(tmp_path):
    originals = _made_up(40)
    rng = random.Random(4)
    _, corpus = _run(tmp_path, [*originals, *(_replace_words(rng, text, 0.5) for text in originals)])
    assert not _lines(corpus / "duplicates.jsonl")


def test_every_row_of_mojibake_is_found(tmp_path, originals):
    accented = [text for text in originals if not text.isascii() and "\ufffd" not in text][:100]
    broken = [
        text.encode("utf-8").decode("latin-1" if i % 2 else "cp1252", "strict" if i % 2 else "replace")
        for i, text in enumerate(accented)
    ]
    found, _ = _run(tmp_path, broken, near_dedup=False)
    assert found["seen", "mojibake"]["count"] == len(broken)


def test_every_leak_of_validation_text_is_found(tmp_path, originals):
    rng = random.Random(5)
    held, train = originals[:60], originals[60:]
    hosts = rng.sample(range(len(train)), 40)
    for i, host in enumerate(hosts):
        victim = held[i].split(" ")
        if i % 2:  # 13 words in a row, in the middle of another text
            words = [word for word in victim if word.strip()]
            start = rng.randrange(len(words) - 12)
            at = len(train[host]) // 2
            at += len(train[host][at:]) - len(train[host][at:].lstrip())
            train[host] = f"{train[host][:at]} . {' '.join(words[start : start + 13])} . {train[host][at:]}"
        else:
            train[host] = f"{train[host][:50]}\n{held[i]}\n{train[host][50:]}"
    whole = [text.lower() for text in held[40:60]]
    _, corpus = _run(tmp_path, [*train, *whole], held)
    expected = {host + 1 for host in hosts} | set(range(len(train) + 1, len(train) + 21))
    assert _lines(corpus / "contaminated.jsonl") == expected
