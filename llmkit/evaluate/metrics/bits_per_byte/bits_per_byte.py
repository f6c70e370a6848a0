"""Bits per UTF-8 byte of texts under a language model; lower is better.

    bits_per_byte = sum of -log p(text), in nats / (ln 2 * number of UTF-8 bytes of the texts)

Unlike perplexity per token it compares models with different tokenizers (Gao et al. 2020). One ratio over all texts,
not a mean of ratios: a text weighs as much as its bytes. Bytes are those of the raw text, without the special tokens
around it; whether the end of the text is scored is up to who sums, and should be the same for everyone compared.
"""

import math

import datasets
import evaluate

_CITATION = """\
@article{gao2020pile,
  title={The {P}ile: An 800{GB} Dataset of Diverse Text for Language Modeling},
  author={Gao, Leo and Biderman, Stella and Black, Sid and Golding, Laurence and Hoppe, Travis and Foster, Charles and
          Phang, Jason and He, Horace and Thite, Anish and Nabeshima, Noa and Presser, Shawn and Leahy, Connor},
  journal={arXiv preprint arXiv:2101.00027},
  year={2020}
}
"""
_INPUTS = """
Args:
    predictions (`list` of `float`): of each text, the negative log-likelihood of its tokens, summed, in nats.
    references (`list` of `str`): the raw texts.

Returns:
    bits_per_byte (`float`): NaN where there is not a single byte.
    num_bytes (`int`): UTF-8 bytes of all texts.

Raises:
    ValueError: for NaN, and for a negative value, which is a log-likelihood with the wrong sign.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("llmkit/evaluate/metrics/bits_per_byte")
    >>> results = metric.compute(predictions=[2.0, 3.0], references=["abc", "é"])
    >>> print(round(results["bits_per_byte"], 4), results["num_bytes"])  # 5 / ln 2 / (3 + 2)
    1.4427 5
"""


class BitsPerByte(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(self, predictions, references):
        for i, nats in enumerate(predictions):
            if not nats >= 0:  # NaN too
                raise ValueError(
                    f"predictions[{i}]={nats}; expected a negative log-likelihood in nats, 0 or more: the sum of "
                    "-log p over the tokens of the text"
                )
        num_bytes = sum(len(text.encode("utf-8")) for text in references)
        bits = math.fsum(predictions) / math.log(2)
        return {"bits_per_byte": bits / num_bytes if num_bytes else math.nan, "num_bytes": num_bytes}
