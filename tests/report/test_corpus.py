"""The page about a corpus says what its figures say, and no text of the corpus can harm it."""

import re

import pytest
from rich.console import Console

from llmkit.report.corpus import HEIGHT, LEFT, WIDTH, curve, findings, histogram, page, print_summary, verdict


def reason(fate, name, count, share=0.01, text="a text", note="a note"):
    example = {"where": "x.jsonl line 3", "text": text, "note": note}
    return {"fate": fate, "reason": name, "count": count, "share": share, "bytes": 2_000_000, "examples": [example]}


@pytest.fixture
def figures():
    source = {
        "name": "json x.jsonl train", "role": "train", "store": "train", "rows": 1000, "bad_rows": 4, "documents": 900,
        "bytes": 5_000_000, "characters": 4_900_000, "quantiles": {"0.1": 100.0, "0.5": 500.0, "0.9": 9000.0},
        "longest": 70_000, "histogram": [[1, 10, 100, 1000], [0, 30, 60]],
    }  # fmt: skip
    packing = {"max_length": 256, "rows": 40, "utilisation": 0.9, "restarts": 0}
    return {
        "corpus": "runs/x",
        "made": "2026-01-01 00:00",
        "flow": [
            {"step": "rows", "documents": 1000, "bytes": None},
            {"step": "clean", "documents": 900, "bytes": 5_000_000},
            {"step": "near duplicates out", "documents": 450, "bytes": 2_500_000},
        ],
        "sources": [source],
        "reasons": [
            reason("bad", "bad-json", 3),
            reason("bad", "null", 1),
            reason("dropped", "near-duplicate", 450, 0.45),
            reason("dropped", "gopher_quality: gopher_short_doc", 600, 0.6),
            reason("seen", "mojibake", 7),
        ],
        "boilerplate": ["validation: x.jsonl line 9"],
        "scripts": {"Latin": 0.9, "white space": 0.1},
        "lines": [["All rights reserved.", 12]],
        "stores": {
            "train": {"documents": 450, "tokens": 123_456, "bytes": 1, "bytes_per_token": 4.125, "packing": packing}
        },
        "frequencies": {"vocabulary": 1000, "unused": 300, "under_100": 500, "zipf": [[1, 1000], [10, 100], [100, 10]]},
        "seconds": {"read": {"wall_s": 12.0, "cpu_s": 11.0}},
    }


def test_the_verdict_counts_what_came_in_and_out(figures):
    expected = "1,000 rows became 450 documents of 123,456 tokens; 1,054 fell out, most of them as gopher_quality: "
    assert verdict(figures).startswith(expected)
    figures["reasons"] = []
    assert verdict(figures).endswith("tokens; none was dropped.")


def test_findings_name_what_to_look_at_and_nothing_else(figures):
    found = findings(figures)
    starts = ["rows that could not be read: bad-json 3, null 1", "gopher_quality: gopher_short_doc takes 60%"]
    starts += ["7 × mojibake", "runs of 13 words of 1 held-back texts", "train: rows of 256 are 90.0% full"]
    starts += ["300 of 1,000 ids never occur"]
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts
    figures |= {"reasons": [], "boilerplate": [], "frequencies": None, "stores": {}}
    assert findings(figures) == []


def test_the_page_holds_its_parts_in_order_and_loads_nothing(figures):
    html = page(figures)
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "The training text, step by step", "Rows that could not be read", "Documents that were dropped",
        "Found, and kept as it is", "Token stores", "Sources", "Characters", "Commonest lines", "Vocabulary",
    ]  # fmt: skip
    assert "http" not in html and "src=" not in html
    assert '<i style="width:45.00%"></i><i style="width:45.00%"></i>' in html  # 450 of 1,000 left, 450 lost
    assert '<td class="n">90.00% of 40 × 256</td>' in html and '<td class="n">−450</td>' in html


def test_text_of_the_corpus_is_harmless_and_its_white_space_visible(figures):
    figures["reasons"] = [reason("dropped", "empty", 1, text="<script>alert(1)</script>\t\x00\n", note="<b>")]
    figures["lines"] = [["<img onerror=x>", 3]]
    figures["sources"][0]["name"] = "<i>name</i>"
    figures["corpus"] = "<u>"
    html = page(figures)
    body = html[html.index("<body>") :]
    assert "<script>" not in body and "<img" not in body and "<b>" not in body.replace("<b>&lt;u&gt;</b>", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;<i>\\t</i><i>\\x00</i><i>\\n\n</i>" in body


def test_a_histogram_begins_at_its_first_bar_and_fills_the_width():
    svg = histogram([1, 10, 100, 1000], [0, 30, 60])
    bars = re.findall(r'<rect class="mark" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    middle = (LEFT + WIDTH - 12) / 2
    full = HEIGHT - 34 - 14
    assert [tuple(map(float, bar)) for bar in bars] == [
        (LEFT, 14 + full / 2, middle - LEFT - 1, full / 2),
        (middle, 14, middle - LEFT - 1, full),
    ]


def test_a_power_law_is_a_straight_line():
    svg = curve([[1, 1000], [10, 100], [100, 10], [1000, 0]], "rank", "count")
    places = [tuple(map(float, p.split(","))) for p in re.search(r'points="(.*?)"', svg)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1) and y1 - y0 == pytest.approx(y2 - y1) and (x0, y0) == (LEFT, 14)


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_fits_the_console(figures, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(figures, console)
    lines = console.export_text().splitlines()
    assert ["train", "450", "123,456", "4.12", "40", "90.00%"] in [line.split() for line in lines]
    assert max(map(len, lines)) <= width


def test_many_sources_and_reasons_make_a_page(figures):
    figures["sources"] *= 200
    figures["reasons"] *= 60
    assert page(figures).count("<figure>") == 7
