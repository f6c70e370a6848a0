"""Exact match after the normalisation of SQuAD: case, ASCII punctuation, English articles and white space aside.

    normalized_exact_match = share of predictions p with normalise(p) == normalise(r) for one of their references r
    normalise: lower case; remove !"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~; remove a, an, the; one blank between words

in this order, as the official script does it (Rajpurkar et al. 2016), so that "The U.S.A." equals "usa".
Other punctuation (« » 。) stays, as there. Each step can be switched off. "The" and "?" become nothing, and so does an
empty answer, which then is right: references like that are counted in `num_empty`.
"""

import math
import re
import string

import datasets
import evaluate

_CITATION = """\
@inproceedings{rajpurkar-etal-2016-squad,
  title={{SQ}u{AD}: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Proceedings of EMNLP},
  pages={2383--2392},
  year={2016}
}
"""
_INPUTS = """
Args:
    predictions (`list` of `str`): answers.
    references (`list` of `str`; `list` of `list` of `str` with the configuration "multiple"): what is right.
    ignore_case, ignore_punctuation, ignore_articles, ignore_white_space (`bool`, default to True): the four steps.

Returns:
    normalized_exact_match (`float`): 0 to 1; NaN of no predictions.
    num_empty (`int`): items with a reference of which normalisation leaves nothing.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("llmkit/evaluate/metrics/normalized_exact_match")
    >>> print(metric.compute(predictions=["The cat.", "dogs"], references=["cat", "dog"]))
    {'normalized_exact_match': 0.5, 'num_empty': 0}
    >>> metric = evaluate.load("llmkit/evaluate/metrics/normalized_exact_match", "multiple")
    >>> print(metric.compute(predictions=["NYC"], references=[["New York", "N.Y.C."]]))
    {'normalized_exact_match': 1.0, 'num_empty': 0}
"""
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def _normalise(text, ignore_case, ignore_punctuation, ignore_articles, ignore_white_space):
    text = text.lower() if ignore_case else text
    text = text.translate(PUNCTUATION) if ignore_punctuation else text
    text = ARTICLES.sub(" ", text) if ignore_articles else text
    return " ".join(text.split()) if ignore_white_space else text


class NormalizedExactMatch(evaluate.Metric):
    def _info(self):
        if self.config_name not in ("default", "multiple"):
            raise ValueError(f"config_name={self.config_name!r}; allowed: 'default', 'multiple' (references per item)")
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": text, "references": datasets.Sequence(text) if self.config_name == "multiple" else text}
            ),
            reference_urls=["https://aclanthology.org/D16-1264"],
        )

    def _compute(
        self,
        predictions,
        references,
        ignore_case=True,
        ignore_punctuation=True,
        ignore_articles=True,
        ignore_white_space=True,
    ):
        def normalise(text):
            return _normalise(text, ignore_case, ignore_punctuation, ignore_articles, ignore_white_space)

        accepted = [{normalise(text) for text in ([r] if isinstance(r, str) else r)} for r in references]
        right = [normalise(p) in texts for p, texts in zip(predictions, accepted, strict=True)]
        return {
            "normalized_exact_match": sum(right) / len(right) if right else math.nan,
            "num_empty": sum("" in texts for texts in accepted),
        }
