"""Repetition within texts: seq-rep-n, and the share that ends in a loop; lower is better.

    seq_rep_n(text) = 1 - number of different n-grams / number of n-grams        (Welleck et al. 2020)

averaged over the texts that have an n-gram at all; 0 where nothing is said twice, near 1 in a loop.

A text ends in a loop as the code of Holtzman et al. 2020 counts it: of all phrases of up to 90 tokens that end it, take
the one that stands there most often in a row (of those the shortest); that is a loop where it has 3 tokens or more and
stands there twice, or has fewer and stands there more than 50 times. Both papers count BPE tokens: pass `tokenizer` for
figures that compare with theirs. Hand over what the model wrote, without the prompt.
"""

import math

import datasets
import evaluate

_CITATION = """\
@inproceedings{welleck2020neural,
  title={Neural Text Generation With Unlikelihood Training},
  author={Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
  booktitle={International Conference on Learning Representations},
  year={2020}
}
@inproceedings{holtzman2020curious,
  title={The Curious Case of Neural Text Degeneration},
  author={Holtzman, Ari and Buys, Jan and Du, Li and Forbes, Maxwell and Choi, Yejin},
  booktitle={International Conference on Learning Representations},
  year={2020}
}
"""
_INPUTS = """
Args:
    predictions (`list` of `str`): what a model wrote, one text per prompt.
    n (`int`, defaults to 4): length of the n-grams.
    tokenizer (`Callable`, *optional*): text -> list of tokens; splits at white space by default.

Returns:
    seq_rep_n (`float`): mean over the texts of n tokens or more; NaN where there is none.
    loop (`float`): share of all texts that end in a loop; NaN of no texts.
    num_too_short (`int`): texts of fewer than n tokens, which seq_rep_n leaves out.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("llmkit/evaluate/metrics/repetition")
    >>> print(metric.compute(predictions=["so it goes so it goes", "all is well"], n=2))  # 1 - 3/5, 1 - 2/2
    {'seq_rep_n': 0.2, 'loop': 0.5, 'num_too_short': 0}
"""
LONGEST_PHRASE = 90  # the three numbers of Holtzman et al.
SHORTEST_PHRASE = 3
OFTEN = 50


def _seq_rep(tokens, n):
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams)


def _times_at_end(tokens, length):
    """How often the last `length` tokens stand there in a row."""
    times, phrase = 1, tokens[-length:]
    while tokens[-(times + 1) * length : -times * length] == phrase:
        times += 1
    return times


def _ends_in_loop(tokens):
    times = {length: _times_at_end(tokens, length) for length in range(1, min(LONGEST_PHRASE, len(tokens)) + 1)}
    length = max(times, key=times.__getitem__, default=0)  # the shortest of the most frequent
    return bool(times) and times[length] > 1 and (length >= SHORTEST_PHRASE or times[length] > OFTEN)


class Repetition(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/1908.04319", "https://arxiv.org/abs/1904.09751"],
        )

    def _compute(self, predictions, n=4, tokenizer=str.split):
        if n < 1:
            raise ValueError(f"n={n}; allowed: 1 or more")
        texts = [list(tokenizer(text)) for text in predictions]
        repeated = [_seq_rep(tokens, n) for tokens in texts if len(tokens) >= n]
        return {
            "seq_rep_n": math.fsum(repeated) / len(repeated) if repeated else math.nan,
            "loop": sum(map(_ends_in_loop, texts)) / len(texts) if texts else math.nan,
            "num_too_short": len(texts) - len(repeated),
        }
