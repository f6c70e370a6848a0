"""Plots as inline SVG in the page's own colours.   histogram(edges, counts, title, ...) -> svg;  curve(points, ...)

Each has a title for those who cannot see it. Leaves out everything but logarithmic x axes: documents, ranks and counts
span orders of magnitude.
"""

import math

from .markup import Html, text

WIDTH, HEIGHT = 460, 210  # of a plot, in px
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 22, 38  # margins around the drawn area
X0, X1, Y0, Y1 = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP  # Y0 is below Y1: y points down
MOST_TICKS = 6


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with fewer than three of them also their double and fivefold; else the two ends."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        ticks = [float(step * 10**p) for p in powers for step in steps if low <= step * 10**p <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / MOST_TICKS)]
    return ticks if len(ticks) == 2 else [low, high]


def count_ticks(top: int) -> list[int]:
    """Whole numbers from 0 to top, two to five steps of 1, 2 or 5 times a power of ten."""
    size = 10 ** max(0, math.floor(math.log10(max(top, 1))) - 1)
    step = next(s * size for s in (1, 2, 5, 10, 20, 50) if top <= 5 * s * size)
    return list(range(0, top + 1, step))


def short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def log_place(value: float, low: float, high: float, start: float, stop: float) -> float:
    span = math.log10(high) - math.log10(low) or 1.0
    return start + (stop - start) * (math.log10(value) - math.log10(low)) / span


def _svg(title: str, body: str) -> Html:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return Html(f'<svg {size} role="img"><title>{text(title)}</title>{body}</svg>')


def _axes(xs: list[tuple[float, str]], ys: list[tuple[float, str]], x_label: str, y_label: str) -> str:
    """Grid lines with their numbers, and what is counted; the x label below, the y label above the axis."""
    body = "".join(
        f'<line class="grid" x1="{x:.1f}" y1="{Y1}" x2="{x:.1f}" y2="{Y0 + 4}"/>'
        f'<text x="{x:.1f}" y="{Y0 + 17}" text-anchor="middle">{number}</text>'
        for x, number in xs
    )
    body += "".join(
        f'<line class="grid" x1="{X0}" y1="{y:.1f}" x2="{X1}" y2="{y:.1f}"/>'
        f'<text x="{X0 - 6}" y="{y + 4:.1f}" text-anchor="end">{number}</text>'
        for y, number in ys
    )
    body += f'<text x="{(X0 + X1) / 2:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{text(x_label)}</text>'
    return body + f'<text x="2" y="11">{text(y_label)}</text>'


def _log_x(low: float, high: float) -> list[tuple[float, str]]:
    return [(log_place(tick, low, high, X0, X1), short(tick)) for tick in log_ticks(low, high)]


def histogram(
    edges: list[float], counts: list[int], title: str, x_label: str, y_label: str, middle: float | None = None
) -> Html:
    """Bars between edges > 0 on a logarithmic axis, from the first bar to the last that is not empty; `middle` is a
    dashed line."""
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return Html("")
    low, high, top = edges[filled[0]], edges[filled[-1] + 1], max(counts)
    ys = [(Y0 + (Y1 - Y0) * tick / top, f"{tick:,}" if tick < 10_000 else short(tick)) for tick in count_ticks(top)]
    body = _axes(_log_x(low, high), ys, x_label, y_label)
    for i in filled:
        a, b = (log_place(edges[i + k], low, high, X0, X1) for k in (0, 1))
        y = Y0 + (Y1 - Y0) * counts[i] / top
        place = f'x="{a:.1f}" y="{y:.1f}" width="{max(1, b - a - 1):.1f}" height="{Y0 - y:.1f}"'
        hint = f"{edges[i]:,.0f} to {edges[i + 1]:,.0f}: {counts[i]:,}"
        body += f'<rect class="mark" {place}><title>{hint}</title></rect>'
    if middle is not None and low <= middle <= high:
        x = log_place(middle, low, high, X0, X1)
        anchor = "end" if x > (X0 + X1) / 2 else "start"
        body += f'<line class="middle" x1="{x:.1f}" y1="{Y1 - 6}" x2="{x:.1f}" y2="{Y0}"/>'
        body += f'<text class="middle" x="{x:.1f}" y="11" text-anchor="{anchor}">median {middle:,.0f}</text>'
    return _svg(title, body)


def curve(points: list[list[int]], title: str, x_label: str, y_label: str) -> Html:
    """A line through (x, y) by growing x, both axes logarithmic; points that are not above 0 are left out."""
    shown = [(x, y) for x, y in points if x > 0 and y > 0]
    if len(shown) < 2:
        return Html("")
    (x_low, x_high), (y_low, y_high) = ((min(values), max(values)) for values in zip(*shown, strict=True))
    ys = [(log_place(tick, y_low, y_high, Y0, Y1), short(tick)) for tick in log_ticks(y_low, y_high)]
    places = " ".join(
        f"{log_place(x, x_low, x_high, X0, X1):.1f},{log_place(y, y_low, y_high, Y0, Y1):.1f}" for x, y in shown
    )
    body = _axes(_log_x(x_low, x_high), ys, x_label, y_label)
    return _svg(title, f'{body}<polyline class="curve" points="{places}"/>')
