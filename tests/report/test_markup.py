"""What a page is made of is harmless, whatever text it shows."""

import re

import pytest

from llmkit.report.markup import Html, differing, document, folded, name, percent, quoted, size_text, table, text, track


def test_text_from_outside_is_never_markup():
    harmful = "<script>alert(1)</script> <img src=x onerror='a'> \" & </title>"
    for made in (text(harmful), name(harmful), quoted(harmful), table(["a"], [[harmful]]), folded(harmful, "")):
        assert "<script" not in made and "<img" not in made and "'" not in made
    assert text("<b a='1'>&\"") == "&lt;b a=&#x27;1&#x27;&gt;&amp;&quot;"
    assert "</title> " not in document(harmful, [])


def test_white_space_is_shown_and_lines_end_where_they_do():
    assert quoted("a b") == '<pre dir="auto">a b</pre>'  # a single blank is seen anyway
    assert quoted("  a  b ") == '<pre dir="auto"><bdi>··</bdi>a<bdi>··</bdi>b<bdi>·</bdi></pre>'
    assert quoted("a \n\tb\r\n") == (
        '<pre dir="auto">a<bdi>·</bdi><bdi>\\n</bdi>\n<bdi>\\t</bdi>b<bdi>\\r</bdi><bdi>\\n</bdi>\n</pre>'
    )
    assert quoted("") == ""


@pytest.mark.parametrize(
    ("char", "shown"),
    [("\0", "\\x00"), ("\x1b", "\\x1b"), ("\xa0", "\\xa0"), ("\u202e", "\\u202e"), ("\u2066", "\\u2066"),
     ("\u200b", "\\u200b"), ("\ufeff", "\\ufeff"), ("\u3000", "\\u3000"), ("\U000e0041", "\\U000e0041")],
)  # fmt: skip
def test_what_is_unseen_or_reorders_a_line_stands_as_an_escape(char, shown):
    assert text(f"a{char}b") == f"a{shown}b"
    assert quoted(f"a{char}b") == f'<pre dir="auto">a<bdi>{shown}</bdi>b</pre>'


def test_joiners_and_letters_of_any_script_stay():
    for kept in ("👩\u200d👧", "می\u200cخواهم", "שלום", "日本語", "é"):
        assert text(kept) == kept


def test_half_a_surrogate_pair_can_be_written():
    html = document("\udfff", [text("\ud800"), quoted("\ud800"), name("\udc00")])
    assert "\\ud800" in html.encode("utf-8").decode("utf-8")


def test_names_and_texts_are_isolated_from_the_direction_of_the_line():
    assert name("שלום") == "<bdi>שלום</bdi>" and '<pre dir="auto">' in quoted("שלום")
    assert "<td><bdi>שלום</bdi></td>" in table(["a"], [["שלום"]])


def test_the_document_forbids_scripts_and_loads_nothing():
    html = document("t", ["<p>a</p>", ""])
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in html
    assert "script" not in html and not re.search(r"https?:|//|src=|url\(|@import|<link", html)
    assert html.endswith("<body>\n<p>a</p>\n</body></html>\n")


def test_numbers_stand_right_with_separators():
    made = table(["a", ">b", "|", "||"], [["x", 1234567, track(0.5), None], ["y", "2.50", None, Html("<i></i>")]])
    assert (
        '<th><bdi>a</bdi></th><th class="n"><bdi>b</bdi></th><th class="bar"></th><th class="bar roomy"></th>' in made
    )
    assert '<td><bdi>x</bdi></td><td class="n">1,234,567</td>' in made
    assert '<td class="n"><bdi>2.50</bdi></td><td class="bar"></td><td class="bar roomy"><i></i></td>' in made


def test_a_bar_keeps_within_its_track():
    assert track(0.25, 0.5).count("<i") == 2 and 'width:25.00%"></i><i style="width:50.00%' in track(0.25, 0.5)
    assert "width:100.00%" in track(3.0) and "<i" not in track(0.0)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(None, ""), (0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (34_000, "34.0 KB"), (658_410, "658 KB"),
     (999_600, "1.00 MB"), (1_700_000, "1.70 MB"), (9_996_000_000, "10.0 GB"), (2.5e15, "2,500 TB")],
)  # fmt: skip
def test_sizes_have_three_digits(size, shown):
    assert size_text(size) == shown


def test_a_share_that_is_not_nothing_never_reads_as_nothing():
    assert [percent(share) for share in (0, 0.000001, 0.0001, 0.6209, 1, None)] == [
        "0.00%", "<0.01%", "0.01%", "62.09%", "100.00%", ""
    ]  # fmt: skip


def test_what_differs_is_marked_word_by_word_and_stays_harmless():
    made = differing("the <b>red</b> hat ", "the blue  hat")
    assert made == (
        '<pre dir="auto">the <del>&lt;b&gt;red&lt;/b&gt;<bdi>·</bdi></del><ins>blue<bdi>··</bdi></ins>hat'
        "<del><bdi>·</bdi></del></pre>"
    )
    assert differing("same", "same") == '<pre dir="auto">same</pre>'


def test_texts_of_thousands_of_words_are_not_compared_word_by_word():
    long = " ".join(map(str, range(3000)))
    made = differing(long, f"{long} more")  # 6,000 words and blanks each: minutes, compared
    assert made.count("<del>") == made.count("<ins>") == 1 and made.startswith('<pre dir="auto"><del>0 1')
