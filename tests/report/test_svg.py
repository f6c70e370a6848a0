"""Plots put what they show where it belongs: the drawn area is x 56 to 448, y 172 (zero) to 22 (top)."""

import re

import pytest

from llmkit.report.svg import count_ticks, curve, histogram, log_ticks, short

BAR = re.compile(r'<rect class="mark" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"')


def bars(svg):
    return [tuple(map(float, bar)) for bar in BAR.findall(svg)]


def test_a_histogram_begins_at_its_first_bar_and_fills_the_width():
    svg = histogram([1, 10, 100, 1000], [0, 30, 60], "lengths", "bytes", "documents")
    # 10 to 1000 over 392 px: 196 px a decade, less one between bars; 60 is all of 150 px, 30 half of them
    assert bars(svg) == [(56, 97, 195, 75), (252, 22, 195, 150)]


def test_empty_bars_between_are_left_out_and_the_median_stands_at_its_place():
    svg = histogram([1, 10, 100, 1000], [4, 0, 1], "lengths", "bytes", "documents", middle=10)
    # 392 / 3 = 130.67 px a decade; 1 of 4 is 37.5 px
    assert bars(svg) == [(56, 22, 129.7, 150), (317.3, 134.5, 129.7, 37.5)]
    assert '<line class="middle" x1="186.7" y1="16" x2="186.7" y2="172"/>' in svg and ">median 10<" in svg


def test_nothing_to_draw_draws_nothing():
    assert histogram([1, 10, 100], [0, 0], "t", "x", "y") == ""
    assert curve([[1, 5]], "t", "x", "y") == "" and curve([], "t", "x", "y") == ""


def test_a_power_law_is_a_straight_line_between_the_corners():
    svg = curve([[1, 1000], [10, 100], [100, 10], [1000, 0]], "title", "rank", "count")
    assert re.search(r'points="(.*?)"', svg)[1] == "56.0,22.0 252.0,97.0 448.0,172.0"  # the zero is left out


def test_axes_have_grid_lines_numbers_and_names():
    svg = curve([[1, 1000], [100, 10]], "Counts <by> rank", "rank", "count")
    assert svg.count('<line class="grid"') == 6  # 1, 10, 100 along x; 10, 100, 1k along y
    assert '<line class="grid" x1="252.0" y1="22" x2="252.0" y2="176"/>' in svg  # 10
    assert '<line class="grid" x1="56" y1="97.0" x2="448" y2="97.0"/>' in svg  # 100
    assert ">rank</text>" in svg and ">count</text>" in svg
    assert '<svg viewBox="0 0 460 210" width="460" height="210" role="img"><title>Counts &lt;by&gt; rank</title>' in svg


def test_a_count_stands_at_its_own_height():
    svg = histogram([1, 10], [11], "t", "x", "y")  # once, the line at 5.5 of 11 was called 6
    assert '<line class="grid" x1="56" y1="103.8" x2="448" y2="103.8"/>' in svg  # 5 of 11: 172 - 150 * 5 / 11
    assert ">5</text>" in svg and ">10</text>" in svg and ">6</text>" not in svg


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1, 1000, [1, 10, 100, 1000]), (300, 30_000, [500, 1000, 2000, 5000, 10_000, 20_000]),
     (1200, 1900, [1200, 1900]), (1, 1e9, [1, 100, 1e4, 1e6, 1e8]), (1, 2, [1, 2]), (7, 7, [7, 7])],
)  # fmt: skip
def test_ticks_of_a_logarithmic_axis(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("top", "ticks"),
    [(1, [0, 1]), (5, [0, 1, 2, 3, 4, 5]), (11, [0, 5, 10]), (64, [0, 20, 40, 60]), (237, [0, 50, 100, 150, 200]),
     (999_999, [0, 200_000, 400_000, 600_000, 800_000])],
)  # fmt: skip
def test_ticks_of_counts_are_whole(top, ticks):
    assert count_ticks(top) == ticks


def test_short_numbers():
    assert [short(n) for n in (0, 50, 1000, 1500, 200_000, 1e6, 2e9)] == ["0", "50", "1k", "1.5k", "200k", "1M", "2G"]
