"""distinct-n: how many different n-grams a set of texts uses; higher is more diverse.

    distinct_n = number of different n-grams in all texts / number of n-grams in all texts

N-grams never cross from one text into the next. Li et al. 2016 divide by the number of tokens instead
(`per="tokens"`), of which there are more by n - 1 in every text; implementations since then mostly divide by the number
of n-grams. The value falls as texts grow longer or more: compare only sets of equal size, cut by the same tokenizer.
"""

import math

import datasets
import evaluate

_CITATION = """\
@inproceedings{li-etal-2016-diversity,
  title={A Diversity-Promoting Objective Function for Neural Conversation Models},
  author={Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle={Proceedings of NAACL-HLT},
  pages={110--119},
  year={2016}
}
"""
_INPUTS = """
Args:
    predictions (`list` of `str`): the texts.
    n (`int`, defaults to 2): length of the n-grams.
    per (`str`, defaults to "ngrams"): "ngrams", or "tokens" as in the paper.
    tokenizer (`Callable`, *optional*): text -> list of tokens; splits at white space by default.

Returns:
    distinct_n (`float`): NaN where there is nothing to divide by.
    num_distinct (`int`): different n-grams.
    num_total (`int`): what it was divided by.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("llmkit/evaluate/metrics/distinct_n")
    >>> print(metric.compute(predictions=["a b a b", "a b c"], n=2))  # ab ba ab, ab bc
    {'distinct_n': 0.6, 'num_distinct': 3, 'num_total': 5}
"""


class DistinctN(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://aclanthology.org/N16-1014"],
        )

    def _compute(self, predictions, n=2, per="ngrams", tokenizer=str.split):
        if n < 1:
            raise ValueError(f"n={n}; allowed: 1 or more")
        if per not in ("ngrams", "tokens"):
            raise ValueError(f"per={per!r}; allowed: 'ngrams', 'tokens'")
        texts = [list(tokenizer(text)) for text in predictions]
        ngrams = [tuple(tokens[i : i + n]) for tokens in texts for i in range(len(tokens) - n + 1)]
        num_distinct = len(set(ngrams))
        num_total = len(ngrams) if per == "ngrams" else sum(map(len, texts))
        return {
            "distinct_n": num_distinct / num_total if num_total else math.nan,
            "num_distinct": num_distinct,
            "num_total": num_total,
        }
