"""The page about a corpus says what its figures say, and no text of the corpus can harm it."""

import copy
import io
import re

import pytest
from rich.console import Console

from llmkit.report.corpus import findings, page, print_summary, verdict


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


def summary(figures, width=80):
    written = io.StringIO()
    print_summary(figures, Console(width=width, file=written))
    return written.getvalue().splitlines()


def test_the_verdict_counts_what_came_in_and_out(figures):
    assert verdict(figures) == (
        "450 of 1,000 rows became 123,456 tokens; 1,050 were dropped, most of them (600) as "
        "gopher_quality: gopher_short_doc; 4 could not be read."
    )
    figures["reasons"] = [reason("dropped", "empty", 1)]
    assert verdict(figures).endswith("; 1 was dropped, all of them as empty.")
    figures["reasons"] = [reason("dropped", name, count) for name, count in (("a", 4), ("b", 3), ("c", 3))]
    assert verdict(figures).endswith("; 10 were dropped, most often (4) as a.")  # 4 of 10 are not most of them
    figures["reasons"] = [reason("seen", "mojibake", 5)]
    assert verdict(figures).endswith("tokens; none was dropped.")


def test_findings_name_what_to_look_at_and_nothing_else(figures):
    assert [what for what, _ in findings(figures)] == [
        "4 rows could not be read: bad-json 3, null 1",
        "gopher_quality: gopher_short_doc drops 60% of all rows",
        "7 documents hold text decoded with the wrong encoding (mojibake)",
        "1 held-back text shares runs of 13 words with so many training documents that these runs were taken for "
        "boilerplate (a licence, a header) and not held against a document",
        "train: rows of 256 tokens are only 90.0% full",
        "300 of 1,000 ids (30%) never occur in the training text",
    ]
    figures |= {"reasons": [], "boilerplate": [], "frequencies": None, "stores": {}}
    assert findings(figures) == [] and "Nothing stands out." in page(figures)


def test_what_is_as_it_should_be_is_no_finding(figures):
    figures |= {"boilerplate": [], "frequencies": {"vocabulary": 1000, "unused": 200, "under_100": 0, "zipf": []}}
    figures["stores"]["train"]["packing"] |= {
        "rows": 5,
        "utilisation": 0.79,
    }  # one row of padding: the end of any store
    # once, every reason of more than half of the rows was said to take them, and mended text to want mending
    figures["reasons"] = [reason("changed", "encoding-mended", 600, 0.6), reason("changed", "mojibake", 600, 0.6)]
    assert findings(figures) == []


def test_one_document_and_many_labels_are_spelt_right(figures):
    figures["reasons"] = [reason("seen", "null-word", 1), reason("dropped", "not-cuttable", 1)]
    figures["boilerplate"] = [f"val: line {i}" for i in range(5000)]
    found = findings(figures)
    assert [what for what, _ in found[:2]] == [
        "1 document is only the word None, null or nan",
        "1 document is over 256 KB without a place to cut it",
    ]
    assert found[2][0].startswith("5,000 held-back texts share")
    assert found[2][1].endswith("val: line 0, val: line 1, val: line 2 and 4,997 more (report.json lists them)")


def test_the_page_holds_its_parts_in_order_and_loads_nothing(figures):
    html = page(figures)
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "Things to look at", "The training text, step by step", "Reasons", "Sources", "Characters", "Commonest lines",
        "Token stores", "Vocabulary", "What it took",
    ]  # fmt: skip
    groups = re.findall(r'<h3>(.*?) <span class="soft">(.*?)</span>', html)
    dropped = ("Dropped", "1,050")
    assert groups == [("Could not be read, and left out", "4"), dropped, ("Found, and not changed", "7")]
    assert html.index('class="verdict"') < html.index("<h2>")
    assert not re.search(r"https?:|src=|url\(|@import|<link|<script", html)


def test_the_steps_show_what_is_left_and_what_each_took(figures):
    html = page(figures)
    row = re.search(r"<tr><td><bdi>near duplicates out</bdi></td>(.*?)</tr>", html)[1]
    assert re.findall(r"<bdi>(.*?)</bdi>|>(\d+)<", row) == [("", "450"), ("−450", ""), ("2.50 MB", "")]
    # of 1,000 documents 450 are left and 450 went; of 5 MB half is left and half went
    assert re.findall(r"width:([\d.]+)%", row) == ["45.00", "45.00", "50.00", "50.00"]


def test_a_reason_shows_its_figures_and_opens_to_its_examples(figures):
    html = page(figures)
    line = re.search(r"<details><summary class=\"line\"><span><bdi>near-duplicate</bdi>.*?</details>", html)[0]
    assert "<span>450</span><span><bdi>45.00%</bdi></span><span><bdi>2.00 MB</bdi></span>" in line
    assert "<bdi>x.jsonl line 3</bdi> · <bdi>a note</bdi></span><pre" in line and ">a text</pre>" in line
    figures["reasons"] = [reason("quarantined", "later version", 3)]  # a fate of another day is not lost
    assert "<h3>quarantined " in page(figures) and "later version" in page(figures)


def test_stores_and_vocabulary_are_counted(figures):
    html = page(figures)
    assert '<td class="n">123,456</td><td class="n"><bdi>1 B</bdi></td><td class="n"><bdi>4.12</bdi></td>' in html
    assert '<td class="n">40</td><td class="n">256</td><td class="n"><bdi>90.00%</bdi></td>' in html
    assert "300 of 1,000 ids never occur in the training text (30.0%); 500 occur fewer than 100 times" in html
    assert html.count("<svg") == 2 and html.count('role="img"><title>') == 2


def test_scripts_too_rare_for_a_bar_are_named(figures):
    figures["scripts"] = {"Latin": 0.9, "white space": 0.09998, "Greek": 0.00001, "Cyrillic": 0.00001}
    assert "2 rarer scripts, &lt;0.01% together: Greek, Cyrillic" in page(figures)


def test_text_of_the_corpus_is_harmless_wherever_it_stands(figures):
    harmful = "<script>alert(1)</script>\u202e\ud800\0"

    def poison(value):
        if isinstance(value, dict):  # names of scripts and stores are keys; those of the format stay
            return {k + harmful if k in ("Latin", "train", "read") else k: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return value + harmful if isinstance(value, str) and value not in ("bad", "dropped", "seen") else value

    html = page(poison(copy.deepcopy(figures)))
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 30
    assert "<script" not in html and "\u202e" not in html and "\0" not in html
    html.encode("utf-8")


@pytest.mark.parametrize("empty", [None, "missing"])
def test_a_figure_that_is_missing_is_left_out(figures, empty):
    for key in [key for key in figures if key not in ("corpus", "made")]:
        fewer = {k: v for k, v in figures.items() if k != key} | ({key: None} if empty is None else {})
        assert page(fewer).endswith("</html>\n") and isinstance(summary(fewer), list)
    assert "0 of 0 rows became 0 tokens" in page({})


def test_many_sources_and_reasons_make_a_page_of_which_nothing_is_left_out(figures):
    figures["sources"] = [figures["sources"][0] | {"name": f"source {i}"} for i in range(200)]
    figures["reasons"] = [reason("dropped", f"reason {i}", 1) for i in range(60)]
    html = page(figures)
    assert html.count("<figure>") == 201 and html.count('<summary class="line">') == 60
    assert all(f"<td><bdi>source {i}</bdi></td>" in html and f"<bdi>reason {i}</bdi>" in html for i in range(60))
    assert "<summary>180 more</summary>" in html and "<summary>lengths of 194 more sources</summary>" in html
    lines = summary(figures)
    assert "40 more, in the report" in next(line for line in lines if "more" in line)


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_fits_the_console(figures, width):
    figures["stores"]["a_store_with_quite_a_long_name_" * 3] = figures["stores"]["train"]
    lines = summary(figures, width)
    assert ["near", "duplicates", "out", "450", "2.50", "MB"] in [line.split() for line in lines]
    assert ["dropped", "near-duplicate", "450", "45.00%"] in [line.split() for line in lines]
    assert ["train", "450", "123,456", "4.12", "40", "90.00%"] in [line.split() for line in lines]
    assert max(map(len, lines)) <= width


def test_names_on_the_console_are_no_markup(figures):
    figures["stores"] = {"x[red]y": figures["stores"]["train"]}  # once, the store was called xy
    figures["reasons"] = [reason("dropped", "a[b]c\x1b[2J", 1)]
    shown = "\n".join(summary(figures))
    assert "x[red]y" in shown and "a[b]c\\x1b[2J" in shown and "\x1b" not in shown
