"""Plots as inline SVG in the page's own colours.   histogram(edges, counts, title, ...), curve(points, ...), lines(...)

Each has a title for those who cannot see it. Documents, ranks and counts span orders of magnitude: their x axes are
logarithmic. Lines over a run differ in dashes as well as in colour, and carry their names at their ends.
"""

import dataclasses
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
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def log_place(value: float, low: float, high: float, start: float, stop: float) -> float:
    span = math.log10(high) - math.log10(low) or 1.0
    return start + (stop - start) * (math.log10(value) - math.log10(low)) / span


def _svg(title: str, body: str) -> Html:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return Html(f'<svg {size} role="img"><title>{text(title)}</title>{body}</svg>')


def _axes(
    xs: list[tuple[float, str]], ys: list[tuple[float, str]], x_label: str, y_label: str, x_end: float = X1
) -> str:
    """Grid lines with their numbers, and what is counted; the x label below, the y label above the axis."""
    body = "".join(
        f'<line class="grid" x1="{x:.1f}" y1="{Y1}" x2="{x:.1f}" y2="{Y0 + 4}"/>'
        f'<text x="{x:.1f}" y="{Y0 + 17}" text-anchor="middle">{number}</text>'
        for x, number in xs
    )
    body += "".join(
        f'<line class="grid" x1="{X0}" y1="{y:.1f}" x2="{x_end}" y2="{y:.1f}"/>'
        f'<text x="{X0 - 6}" y="{y + 4:.1f}" text-anchor="end">{number}</text>'
        for y, number in ys
    )
    body += f'<text x="{(X0 + x_end) / 2:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{text(x_label)}</text>'
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


# lines over a run

LABELS = 116  # px at the right for the names of the lines
APART = 12.5  # px between two names
FEW = 12  # points up to which each is marked
NUM_STYLES = 6  # of dashes and colours, in markup.CSS
CROWDED = 4  # times the lowest value from which a linear axis would press the end of a run flat


@dataclasses.dataclass(frozen=True)
class Line:
    label: str  # "" for the only line of a plot
    points: list[list[float]]  # (x, y) by growing x
    level: float | None = None  # a dotted line that it should approach
    is_soft: bool = False  # thin and grey, behind the others


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, three to six of them: steps of 1, 2 or 5 times a power of ten."""
    size = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(s * size for s in (1, 2, 5, 10, 20) if (high - low) <= 5.001 * s * size)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(drawn: list[Line], title: str, x_label: str, y_label: str, may_be_log: bool = False) -> Html:
    """Curves over steps or tokens; `may_be_log`: the y axis is logarithmic where the highest is far above the lowest.

    A line of one point is a mark. Nothing to draw: "".
    """
    drawn = [line for line in drawn if line.points]
    if not drawn or not any(len(line.points) > 1 for line in drawn):
        return Html("")
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + [line.level for line in drawn if line.level is not None]
    low, high = min(ys), max(ys)
    is_log = may_be_log and low > 0 and high > CROWDED * low
    if not is_log:
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = (low if low == 0 else low - pad), high + pad
    x_end = X1 - LABELS if any(line.label for line in drawn) else X1
    x_low, x_high = min(xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1

    def across(x: float) -> float:
        return X0 + (x_end - X0) * (x - x_low) / (x_high - x_low)

    def up(y: float) -> float:
        return log_place(y, low, high, Y0, Y1) if is_log else Y0 + (Y1 - Y0) * (y - low) / (high - low)

    shown = ticks(x_low, x_high)
    marks = [(across(x), short(x)) for x in shown[:: 2 if len(shown) > 4 and x_end < X1 else 1]]
    body = _axes(
        marks, [(up(y), short(y)) for y in (log_ticks if is_log else ticks)(low, high)], x_label, y_label, x_end
    )
    for line, style in _styled(drawn):
        if line.level is not None:
            y = up(line.level)
            body += f'<line class="level {style}" x1="{X0}" y1="{y:.1f}" x2="{x_end}" y2="{y:.1f}"/>'
        places = [(across(x), up(y)) for x, y in line.points]
        if len(places) > 1:
            way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            body += (
                f'<polyline class="line {style}" points="{way}"><title>{text(line.label or title)}</title></polyline>'
            )
        if len(places) <= FEW:
            body += "".join(f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
    return _svg(title, body + _names([(up(line.points[-1][1]), line, style) for line, style in _styled(drawn)], x_end))


def _styled(drawn: list[Line]) -> list[tuple[Line, str]]:
    """Every line with its class; soft ones first, so that the others lie on them."""
    bold = [line for line in drawn if not line.is_soft]
    soft = [(line, "soft") for line in drawn if line.is_soft]
    return soft + [(line, f"k{i % NUM_STYLES}") for i, line in enumerate(bold)]


def _names(ends: list[tuple[float, Line, str]], x_end: float) -> str:
    """Names with last values beside the ends of their lines, never on one another; a stroke shows the dashes."""
    named = sorted((end for end in ends if end[1].label), key=lambda end: end[0])
    places: list[float] = []
    for y, _, _ in named:
        places.append(max(y, places[-1] + APART if places else Y1))
    over = max(0.0, places[-1] - Y0) if places else 0.0
    for i in reversed(range(len(places))):  # pushed out below: back up as far as need be
        limit = Y0 if i == len(places) - 1 else places[i + 1] - APART
        places[i] = min(places[i], limit) if over else places[i]
    body = ""
    for place, (y, line, style) in zip(places, named, strict=True):
        shown = line.label if len(line.label) <= 12 else line.label[:11] + "…"
        said = f"{text(shown)} {line.points[-1][1]:.3g}"
        body += (
            f'<line class="lead" x1="{x_end}" y1="{y:.1f}" x2="{x_end + 5}" y2="{place:.1f}"/>'
            f'<line class="line {style}" x1="{x_end + 6}" y1="{place:.1f}" x2="{x_end + 24}" y2="{place:.1f}"/>'
            f'<text class="of {style}" x="{x_end + 28}" y="{place + 4:.1f}">{said}</text>'
        )
    return body
