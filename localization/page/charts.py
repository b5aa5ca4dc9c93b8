"""Inline SVG charts: lines, intervals, bars, and grids of shaded cells.

Knows numbers and names; nothing of tasks or networks. Every chart is `WIDTH` units wide and as high
as it needs, scales with the page, and takes its colours from the page's style sheet. `label` says
in words what the chart shows, for those who do not see it. All names are plain text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from localization.page.markup import escape, shorten

WIDTH = 480
LETTER = 8.0
"""Width of a letter at the style sheet's size, in units: wide fonts have it, usual ones less."""
COLOURS = 6
MARKERS = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.6-3.6h7.2v7.2h-7.2z",
    "m0-4.8l4.8 8.4h-9.6z",
    "m0-5.2l5.2 5.2l-5.2 5.2l-5.2-5.2z",
)
MOST_MARKERS = 25
"""Lines of more points show only the last one's marker."""

Anchor = Literal["start", "middle", "end"]
Tone = Literal["right", "wrong"]


@dataclass(frozen=True)
class Series:
    """A named line through its points, from left to right."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Range:
    """A measured value between the ends of its confidence interval."""

    name: str
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One shaded cell of a grid: `depth` 0 (empty) to 1 (full colour)."""

    row: int
    column: int
    depth: float
    tip: str
    text: str = ""
    tone: Tone = "right"


@dataclass(frozen=True)
class Key:
    """What a grid's shades mean: a text beside samples of them."""

    text: str
    depths: tuple[float, ...]
    tone: Tone = "right"


RAMP = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class _Axis:
    """Values along one direction of the chart, from `start` to `end` in units."""

    ticks: tuple[float, ...]
    start: float
    end: float

    def at(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def lines(
    label: str,
    series: Sequence[Series],
    x_axis: str,
    y_axis: str,
    reference: tuple[str, float] | None = None,
    whole: bool = False,
) -> str:
    """Lines over two axes; `reference` is a dashed horizontal line with its name.

    `whole` keeps the ticks of x at whole numbers. There must be at least one point.
    """
    points = [point for one in series for point in one.points]
    heights = [y for _, y in points] + ([reference[1]] if reference else [])
    top = 34 + 20 * math.ceil((len(series) + (reference is not None)) / 2)
    x = _Axis(_ticks([x for x, _ in points], whole), 44, WIDTH - 14)
    y = _Axis(_ticks(heights), top + 200, top)
    parts = [_legend(series, reference), _text(4, top - 12, y_axis, "start", "quiet")]
    parts += _axes(x, y, x_axis)
    if reference:
        height = y.at(reference[1])
        parts.append(_line(x.start, height, x.end, height, "reference"))
    parts += [_curve(number, one, x, y) for number, one in enumerate(series)]
    return _svg(label, top + 246, parts)


def _legend(series: Sequence[Series], reference: tuple[str, float] | None) -> str:
    names = [one.name for one in series] + ([reference[0]] if reference else [])
    parts = []
    for number, name in enumerate(names):
        x, y = 4 + 238 * (number % 2), 12 + 20 * (number // 2)
        if number == len(series):
            parts.append(_line(x, y, x + 24, y, "reference"))
        else:
            parts.append(_line(x, y, x + 24, y, f"path {_colour(number)}"))
            parts.append(_marker(number, x + 12, y))
        parts.append(_text(x + 32, y + 4.5, shorten(name, 28)))
    return "".join(parts)


def _axes(x: _Axis, y: _Axis, x_axis: str) -> Iterable[str]:
    for tick in y.ticks:
        yield _line(x.start, y.at(tick), x.end, y.at(tick), "axis")
        yield _text(x.start - 7, y.at(tick) + 4.5, f"{tick:g}", "end", "quiet")
    for tick in x.ticks:
        yield _line(x.at(tick), y.start, x.at(tick), y.start + 5, "axis")
        yield _text(x.at(tick), y.start + 19, f"{tick:g}", "middle", "quiet")
    yield _text((x.start + x.end) / 2, y.start + 38, x_axis, "middle", "quiet")


def _curve(number: int, one: Series, x: _Axis, y: _Axis) -> str:
    places = [(x.at(across), y.at(up)) for across, up in one.points]
    corners = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
    parts = [f'<polyline class="path {_colour(number)}" style="fill:none" points="{corners}"/>']
    marked = list(zip(one.points, places, strict=True))
    for (across, up), place in marked if len(marked) <= MOST_MARKERS else marked[-1:]:
        parts.append(_marker(number, *place, f"{one.name}: {up:.1f} at {across:g}"))
    return "".join(parts)


def intervals(label: str, ranges: Sequence[Range], x_axis: str) -> str:
    """Values with their confidence intervals, one below the other; the first is the reference."""
    gutter = _gutter([one.name for one in ranges])
    ends = [end for one in ranges for end in (one.low, one.high)]
    x = _Axis(_ticks(ends), gutter, WIDTH - 20)
    bottom = 14 + 34 * len(ranges)
    parts = []
    for tick in x.ticks:
        parts.append(_line(x.at(tick), 8, x.at(tick), bottom, "axis"))
        parts.append(_text(x.at(tick), bottom + 17, f"{tick:g}", "middle", "quiet"))
    middle = x.at(ranges[0].middle)
    parts.append(_line(middle, 8, middle, bottom, "reference"))
    for number, one in enumerate(ranges):
        y = 28 + 34 * number
        tip = f"{one.name}: {one.middle:.1f} ({one.low:.1f} to {one.high:.1f})"
        parts.append(_text(gutter - 10, y + 4.5, one.name, "end"))
        parts.append(_line(x.at(one.low), y, x.at(one.high), y, f"whisker {_colour(number)}"))
        parts.append(_marker(number, x.at(one.middle), y, tip))
    parts.append(_text((x.start + x.end) / 2, bottom + 38, x_axis, "middle", "quiet"))
    return _svg(label, bottom + 46, parts)


def bars(label: str, shares: Sequence[tuple[str, float, str]], x_axis: str) -> str:
    """Shares of 0 to 1 as bars on a full-length track: name, share, and the text at its end."""
    gutter = _gutter([name for name, _, _ in shares])
    room = max(len(text) for _, _, text in shares) * LETTER + 12
    length = WIDTH - gutter - room
    parts = []
    for number, (name, share, text) in enumerate(shares):
        y = 4 + 22 * number
        parts.append(_text(gutter - 8, y + 12.5, name, "end"))
        parts.append(_rect(gutter, y, length, 16, "none"))
        parts.append(_rect(gutter, y, length * share, 16, "right", 1, f"{name}: {text}"))
        parts.append(_text(WIDTH - 2, y + 12.5, text, "end"))
    bottom = 4 + 22 * len(shares)
    parts.append(_text(gutter, bottom + 12, "0", "middle", "quiet"))
    parts.append(_text(gutter + length, bottom + 12, "100 %", "middle", "quiet"))
    parts.append(_text(gutter + length / 2, bottom + 14, x_axis, "middle", "quiet"))
    return _svg(label, bottom + 22, parts)


def grid(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Iterable[Cell],
    x_axis: str,
    y_axis: str,
    keys: Sequence[Key],
    row_height: float | None = None,
) -> str:
    """Shaded cells; what has no cell stays empty. Empty names leave rows, columns and axes unnamed.

    Without `row_height` cells are square where that leaves room for their texts.
    """
    gutter = _gutter([*rows, "000"])
    width = (WIDTH - gutter - 14) / len(columns)
    height = row_height or min(max(width, 4.0), 40.0)
    top = 24.0 if y_axis else 6.0
    bottom = top + height * len(rows)
    gap = 1.5 if min(width, height) > 7 else 0.0
    parts = [_rect(gutter, top, width * len(columns), bottom - top, "none")] if not gap else []
    if y_axis:
        parts.append(_text(4, 14, y_axis, "start", "quiet"))
    for cell in cells:
        x, y = gutter + width * cell.column, top + height * cell.row
        kind = f"cell {cell.tone}" if cell.depth else "cell none"
        shade = _shade(cell.depth)
        parts.append(_rect(x, y, width - gap, height - gap, kind, shade, cell.tip))
        if cell.text:
            colour = "inside" if cell.depth > 0.55 else ""
            middle = y + (height - gap) / 2 + 4.5
            parts.append(_text(x + (width - gap) / 2, middle, cell.text, "middle", colour))
    for number, name in enumerate(rows):
        if name:
            parts.append(
                _text(gutter - 8, top + 4.5 + height * (number + 0.5), shorten(name, 16), "end")
            )
    names = [(gutter + width * (number + 0.5), name) for number, name in enumerate(columns) if name]
    below = bottom + _column_names(parts, names, bottom)
    if x_axis:
        parts.append(
            _text(gutter + width * len(columns) / 2, below + 14, x_axis, "middle", "quiet")
        )
        below += 20
    return _svg(label, below + _keys(parts, keys, below + 8), parts)


def _column_names(parts: list[str], names: Sequence[tuple[float, str]], bottom: float) -> float:
    """Write them below the cells, slanted where they would touch. Returns the height they take."""
    room = min(
        (right - left for (left, _), (right, _) in pairwise(names)),
        default=WIDTH,
    )
    shown = [(x, shorten(name, 16)) for x, name in names]
    longest = max((len(name) for _, name in shown), default=0) * LETTER
    if longest + 4 <= room:
        parts += [_text(x, bottom + 15, name, "middle") for x, name in shown]
        return 20
    for x, name in shown:
        turn = f'transform="rotate(-45 {x:.1f} {bottom + 10:.1f})"'
        parts.append(_text(x + 3, bottom + 13, name, "end", "", turn))
    return longest * 0.71 + 14


def _keys(parts: list[str], keys: Sequence[Key], y: float) -> float:
    x = 4.0
    top = y
    for key in keys:
        length = 16 * len(key.depths) + 8 + len(key.text) * LETTER
        if x > 4 and x + length > WIDTH:
            x, y = 4.0, y + 20
        for depth in key.depths:
            kind = f"cell {key.tone}" if depth else "cell none"
            parts.append(_rect(x, y, 16, 12, kind, _shade(depth)))
            x += 16
        parts.append(_text(x + 6, y + 10.5, key.text, "start", "quiet"))
        x += length - 16 * len(key.depths) + 18
    return y - top + 24 if keys else 8


def _shade(depth: float) -> float:
    # The faintest cell that is not empty must still be seen.
    return round(0.15 + 0.85 * depth, 2) if depth else 1.0


def _ticks(values: Iterable[float], whole: bool = False) -> tuple[float, ...]:
    """Four to eight round numbers around all values."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low < 1e-9:
        low, high = (low - 1, high) if high >= 1 else (low, high + 1)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(number * step, 10) for number in range(first, last + 1))


def _gutter(names: Sequence[str]) -> float:
    return min(max(len(name) for name in names), 16) * LETTER + 14


def _colour(number: int) -> str:
    return f"c{number % COLOURS}"


def _marker(number: int, x: float, y: float, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    shape = MARKERS[number % len(MARKERS)]
    return f'<path class="{_colour(number)}" d="M{x:.1f} {y:.1f}{shape}">{title}</path>'


def _rect(
    x: float, y: float, width: float, height: float, kind: str, shade: float = 1, tip: str = ""
) -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    opacity = "" if shade == 1 else f' fill-opacity="{shade:g}"'
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect class="{kind}" {place}{opacity}>{title}</rect>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(
    x: float, y: float, text: str, anchor: Anchor = "start", kind: str = "", more: str = ""
) -> str:
    style = f' class="{kind}"' if kind else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}{style} {more}>{escape(text)}</text>"


def _svg(label: str, height: float, parts: Iterable[str]) -> str:
    box = f"0 0 {WIDTH} {math.ceil(height)}"
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="{box}">{"".join(parts)}</svg>'
