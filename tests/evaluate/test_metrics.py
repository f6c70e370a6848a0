"""The modules for `evaluate.load`: loaded by path, offline; every expected value is worked out by hand beside it."""

import ast
import doctest
import math
import shutil
from pathlib import Path

import evaluate
import pytest

ROOT = Path(__file__).parent.parent.parent
METRICS = ROOT / "llmkit/evaluate/metrics"
NAMES = sorted(path.name for path in METRICS.iterdir() if path.is_dir() and path.name != "__pycache__")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that ends in an error leaves its lock behind."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def load(name: str, *config: str, **options):
    return evaluate.load(str(METRICS / name), *config, **options)


def compute(name: str, *, options: dict | None = None, **inputs) -> dict:
    return load(name).compute(**inputs, **options or {})


def test_there_are_four_and_the_wheel_has_them():
    setuptools = pytest.importorskip("setuptools")
    assert NAMES == ["bits_per_byte", "distinct_n", "normalized_exact_match", "repetition"]
    packed = setuptools.find_namespace_packages(str(ROOT), include=["llmkit*"])  # as pyproject.toml does
    assert {f"llmkit.evaluate.metrics.{name}" for name in NAMES} <= set(packed)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_the_file_alone_loads_and_explains_itself(name, tmp_path):
    (tmp_path / name).mkdir()
    shutil.copy(METRICS / name / f"{name}.py", tmp_path / name)
    module = evaluate.load(str(tmp_path / name))
    assert module.name == name and module.module_type == "metric"
    assert all((module.description, module.citation, module.inputs_description, module.reference_urls))


@pytest.mark.parametrize("name", NAMES)
def test_imports_are_such_that_the_library_understands_them(name):
    """Its scanner takes `import a, b` and a comment after an import for something to install."""
    source = (METRICS / name / f"{name}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(len(node.names) == 1 and "#" not in lines[node.lineno - 1] for node in imports)
    assert {node.names[0].name for node in imports} <= {"datasets", "evaluate", "math", "re", "string"}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_in_the_docstring_prints_what_it_says(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestParser().get_doctest(load(name).inputs_description, {}, name, None, None)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


EMPTY = {
    "bits_per_byte": ({"references": []}, {"bits_per_byte": math.nan, "num_bytes": 0}),
    "distinct_n": ({}, {"distinct_n": math.nan, "num_distinct": 0, "num_total": 0}),
    "normalized_exact_match": ({"references": []}, {"normalized_exact_match": math.nan, "num_empty": 0}),
    "repetition": ({}, {"seq_rep_n": math.nan, "loop": math.nan, "num_too_short": 0}),
}


@pytest.mark.parametrize("name", NAMES)
def test_of_nothing_a_ratio_is_undefined(name):
    inputs, expected = EMPTY[name]
    assert load(name).compute(predictions=[], **inputs) == pytest.approx(expected, nan_ok=True)


BATCHES = {
    "bits_per_byte": [([2.0, 3.0], ["abc", "é"]), ([1.0], ["字"])],
    "distinct_n": [(["a b", "b c"], None), (["a b"], None)],
    "normalized_exact_match": [(["Ja.", "no"], ["ja", "ja"]), (["the ü"], ["Ü"])],
    "repetition": [(["a a a a a a"], None), (["a b c d e f", "a"], None)],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_batches_add_up_to_one_call(name, keep_in_memory):
    module, all_at_once = load(name, keep_in_memory=keep_in_memory), {"predictions": [], "references": []}
    for predictions, references in BATCHES[name]:
        given = {"predictions": predictions} | ({"references": references} if references else {})
        module.add_batch(**given)
        for key, values in given.items():
            all_at_once[key] += values
    all_at_once = {key: values for key, values in all_at_once.items() if values}
    assert module.compute() == load(name).compute(**all_at_once)


# ---- bits per byte


def test_bits_per_byte_weighs_texts_by_their_bytes():
    """3 + 2 + 3 bytes (é has two, 字 three), 8 ln 2 nats: one bit per byte. A mean of ratios would give 1.11."""
    found = compute("bits_per_byte", predictions=[n * math.log(2) for n in (2, 4, 2)], references=["abc", "é", "字"])
    assert found == {"bits_per_byte": pytest.approx(1.0), "num_bytes": 8}


def test_a_uniform_model_of_bytes_needs_eight_bits():
    text = "naïve 🙂"  # 6 + 1 + 4 bytes
    found = compute("bits_per_byte", predictions=[11 * math.log(256)], references=[text])
    assert found == {"bits_per_byte": pytest.approx(8.0), "num_bytes": 11}


def test_an_impossible_text_costs_infinitely_much():
    assert compute("bits_per_byte", predictions=[math.inf], references=["a"])["bits_per_byte"] == math.inf


@pytest.mark.parametrize("nats", [-1.0, math.nan])
def test_a_log_likelihood_with_the_wrong_sign_is_refused(nats):
    with pytest.raises(ValueError, match=r"predictions\[1\]=.*negative log-likelihood in nats, 0 or more"):
        compute("bits_per_byte", predictions=[1.0, nats], references=["a", "b"])


# ---- distinct-n

LINES = ["i do not know", "i do not know", "ça va bien"]


@pytest.mark.parametrize(
    ("n", "per", "num_distinct", "num_total"),
    [
        (1, "ngrams", 7, 11),  # i do not know ça va bien
        (1, "tokens", 7, 11),
        (2, "ngrams", 5, 8),  # three of four words, twice; two of three
        (2, "tokens", 5, 11),
        (4, "ngrams", 1, 2),  # "ça va bien" has none
    ],
)
def test_distinct_n(n, per, num_distinct, num_total):
    found = compute("distinct_n", predictions=LINES, options={"n": n, "per": per})
    expected = {"distinct_n": num_distinct / num_total, "num_distinct": num_distinct, "num_total": num_total}
    assert found == pytest.approx(expected)


def test_no_ngram_crosses_from_one_text_into_the_next():
    assert compute("distinct_n", predictions=["a b", "c d"])["num_total"] == 2


def test_any_tokenizer_can_count():
    """Characters of "ааб" (Cyrillic): аа, аб."""
    assert compute("distinct_n", predictions=["ааб"], options={"tokenizer": list})["num_distinct"] == 2


@pytest.mark.parametrize(("options", "said"), [({"n": 0}, "n=0; allowed: 1"), ({"per": "words"}, "per='words'; allow")])
def test_distinct_n_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        compute("distinct_n", predictions=["a"], options=options)


# ---- repetition


def test_seq_rep_is_the_mean_over_texts_that_have_an_ngram():
    """ "a a a a a": 2 four-grams, both the same: 1/2. "a b c d": 0. "a b c": too short for four."""
    found = compute("repetition", predictions=["a a a a a", "a b c d", "a b c", ""])
    assert found == pytest.approx({"seq_rep_n": 0.25, "loop": 0.0, "num_too_short": 2})


@pytest.mark.parametrize(
    ("text", "is_loop"),
    [
        ("x y a b c a b c", True),  # a phrase of three, twice
        ("a b c a b c y", False),  # not at the end
        ("x a b a b a b", False),  # a phrase of two, three times
        ("x " + "a b " * 51, True),
        ("a " * 50, False),  # "no no no ..." is a loop from 51 times on
        ("a " * 51, True),
        ("日 本 語 日 本 語", True),
        ("a a b a a b", True),  # ends in "b" once, in "a a b" twice
        (" ".join(map(str, [*range(90), *range(90)])), True),
        (" ".join(map(str, [*range(91), *range(91)])), False),  # longer than what is looked for
        ("a", False),
    ],
)
def test_a_loop_at_the_end(text, is_loop):
    assert compute("repetition", predictions=[text])["loop"] == is_loop


def test_repetition_refuses_ngrams_of_nothing():
    with pytest.raises(ValueError, match="n=0; allowed: 1 or more"):
        compute("repetition", predictions=["a"], options={"n": 0})


# ---- exact match


@pytest.mark.parametrize(
    ("prediction", "reference", "off", "is_right"),
    [
        ("The U.S.A.", "usa", "", True),
        ("a  cat\n", "Cat", "", True),
        ("Cat", "cat", "ignore_case", False),
        ("cat.", "cat", "ignore_punctuation", False),
        ("the cat", "cat", "ignore_articles", False),
        ("a  cat", "a cat", "ignore_white_space", False),
        ("theatre", "atre", "", False),  # articles are whole words
        ("a.b", "b", "", False),  # "ab": punctuation goes before articles
        ("ÉTÉ", "été", "", True),
        ("«oui»", "oui", "", False),  # as in the official script: ASCII only
        ("12", "1.2", "", True),  # a known trap of it
    ],
)
def test_normalisation(prediction, reference, off, is_right):
    options = {off: False} if off else {}
    found = compute("normalized_exact_match", predictions=[prediction], references=[reference], options=options)
    assert found == {"normalized_exact_match": float(is_right), "num_empty": 0}


def test_one_of_several_references_is_enough_and_empty_ones_are_counted():
    module = load("normalized_exact_match", "multiple")
    found = module.compute(predictions=["NYC", "", "x"], references=[["New York", "nyc"], ["The"], ["y", "z"]])
    assert found == {"normalized_exact_match": pytest.approx(2 / 3), "num_empty": 1}


def test_exact_match_refuses_an_unknown_configuration():
    with pytest.raises(ValueError, match="config_name='many'; allowed: 'default', 'multiple'"):
        load("normalized_exact_match", "many")
