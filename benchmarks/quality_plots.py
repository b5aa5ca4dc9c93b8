"""The quality benchmark's plots: standalone SVG files, legible on light and dark pages.

Everything is made from `Results`. The files load nothing and run no script; each brings its own
background, for a page that shows them as images lends them no colours.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.quality_results import Results
from localization.page.charts import MARKERS
from localization.page.markup import escape

WIDTH = 760
LEFT, RIGHT = 92, 24
ROW = 40
DODGE = 6
"""Vertical distance of one set's markers, so that equal values stay visible."""

SERIES = (
    ("fine_tuned", "fine-tuning"),
    ("recovered", "recovered"),
    ("fast", "fast"),
    ("dense", "prompt tuning"),
    ("localized", "localized"),
)
LOSSES = (
    ("recovered", "recovered, against fine-tuning", "recovered_minus_fine_tuned", -1),
    ("fast", "fast, against fine-tuning", "fast_minus_fine_tuned", -1),
    ("localized", "localized, against prompt tuning", "localized_minus_dense", -1),
    ("training_free", "training-free, against a head on all", "training_free_loss", 1),
)
"""Overlay, its name, the measure of what it loses, and that measure's sign."""

MARKER_OF = {"fine_tuned": 4, "recovered": 0, "fast": 1, "dense": 3, "localized": 2}
MARKER_OF |= {"training_free": 3}
"""Colour and shape: the same overlay looks the same in both plots."""

_SHAPES = (*MARKERS, "m-1.4-4.8h2.8v3.4h3.4v2.8h-3.4v3.4h-2.8v-3.4h-3.4v-2.8h3.4z")
_STYLE = """
svg { --card: #fff; --ink: #1b1f24; --muted: #57606a; --line: #d5dae0;
  --c0: #0072b2; --c1: #d55e00; --c2: #00845f; --c3: #b0578d; --c4: #444b53; }
@media (prefers-color-scheme: dark) { svg { --card: #181d24; --ink: #e6e9ed; --muted: #a0a9b4;
  --line: #343c46; --c0: #5cb8f0; --c1: #ff8a4c; --c2: #2fc79b; --c3: #e79fca; --c4: #c3cad2; } }
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
.card { fill: var(--card); stroke: var(--line); } .quiet { fill: var(--muted); }
.title { font-weight: 600; font-size: 15px; } .small { font-size: 11px; }
.axis { stroke: var(--line); } .zero { stroke: var(--muted); stroke-dasharray: 5 4; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); }
.c3 { fill: var(--c3); } .c4 { fill: var(--c4); } .set { fill-opacity: .55; }
"""


def plots(results: Results) -> dict[str, tuple[str, str]]:
    """File name -> what it shows, and the SVG; a plot without any point is left out."""
    made = {
        "accuracy.svg": ("Test accuracy of each set", accuracy_plot(results)),
        "speed.svg": ("Accuracy lost against times as fast", speed_plot(results)),
    }
    return {name: (text, svg) for name, (text, svg) in made.items() if svg}


def accuracy_plot(results: Results) -> str:
    """One row a set, one marker a network; empty where nothing is known."""
    tasks = results["tasks"]
    values = [
        value for row in tasks.values() for key, _ in SERIES if (value := row.get(key)) is not None
    ]
    if not values:
        return ""
    ticks = ticks_around(values)
    top, bottom = 74.0, 74.0 + ROW * len(tasks)
    parts = [_title("Test accuracy, %"), *_legend([(key, name) for key, name in SERIES], 52)]
    parts += _across(ticks, top, bottom)
    for number, (name, row) in enumerate(tasks.items()):
        middle = top + ROW * (number + 0.5)
        if number:
            parts.append(_line(LEFT, middle - ROW / 2, WIDTH - RIGHT, middle - ROW / 2))
        parts.append(_text(LEFT - 10, middle + 4.5, name, "end"))
        for place, (key, text) in enumerate(SERIES):
            value = row.get(key)
            if value is not None:
                y = middle + DODGE * (place - (len(SERIES) - 1) / 2)
                parts.append(_marker(key, _x(ticks, value), y, f"{name}, {text}: {value:.1f} %"))
    return _svg("Test accuracy of each data set", bottom + 34, parts)


def speed_plot(results: Results) -> str:
    """What each overlay loses against its speed: small markers are sets, large ones means."""
    points = [
        (key, name, *place)
        for key, _, measure, sign in LOSSES
        for name, row in [*results["tasks"].items(), ("mean", results["means"])]
        if (place := _place(row, key, measure, sign)) is not None
    ]
    if not points:
        return ""
    x_ticks = ticks_around([1.0, *(x for _, _, x, _ in points)])
    y_ticks = ticks_around([0.0, *(y for _, _, _, y in points)])
    top, bottom = 116.0, 416.0
    parts = [_title("Points of accuracy lost, against times as fast")]
    parts += _legend([(key, name) for key, name, _, _ in LOSSES], 52)
    parts += _across(x_ticks, top, bottom)
    for tick in y_ticks:
        y = _y(y_ticks, tick, top, bottom)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "zero" if tick == 0 else "axis"))
        parts.append(_text(LEFT - 10, y + 4.5, f"{tick:g}", "end", "quiet"))
    # Means last: they are drawn over the sets.
    for key, name, x, y in sorted(points, key=lambda point: point[1] == "mean"):
        place = _x(x_ticks, x), _y(y_ticks, y, top, bottom)
        tip = f"{name}, {key.replace('_', '-')}: {y:.1f} points lost, {x:.2f} times as fast"
        size, kind = (1.9, "") if name == "mean" else (1.0, " set")
        parts.append(_marker(key, *place, tip, size, kind))
    parts.append(_text(LEFT - 10, top - 14, "points lost", "start", "quiet"))
    parts.append(
        _text(
            (LEFT + WIDTH) / 2,
            bottom + 42,
            "times as fast as prompt tuning; training-free: as the whole network; large: means",
            "middle",
            "quiet",
        )
    )
    return _svg("Points of accuracy lost against speed-up", bottom + 58, parts)


def _place(
    row: Mapping[str, float | None], key: str, measure: str, sign: int
) -> tuple[float, float] | None:
    """Speed-up and points lost."""
    # What has no prompt on either side is compared without one.
    against = "speedup" if key == "training_free" else "speedup_over_prompt"
    speed, lost = row.get(f"{key}_{against}"), row.get(measure)
    return None if speed is None or lost is None else (speed, sign * lost)


def ticks_around(values: Iterable[float]) -> tuple[float, ...]:
    """Round numbers, equally spaced, the first and last around all values."""
    found = list(values)
    low, high = min(found), max(found)
    rough = max(high - low, 0.5) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(step * number, 10) for number in range(first, max(last, first + 1) + 1))


def _x(ticks: Sequence[float], value: float) -> float:
    return LEFT + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - RIGHT - LEFT)


def _y(ticks: Sequence[float], value: float, top: float, bottom: float) -> float:
    return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)


def _across(ticks: Sequence[float], top: float, bottom: float) -> Iterable[str]:
    for tick in ticks:
        yield _line(_x(ticks, tick), top, _x(ticks, tick), bottom)
        yield _text(_x(ticks, tick), bottom + 20, f"{tick:g}", "middle", "quiet")


def _legend(names: Sequence[tuple[str, str]], y: float) -> Iterable[str]:
    x = 24.0
    for key, name in names:
        length = 7.2 * len(name) + 44
        if x > 24 and x + length > WIDTH:
            x, y = 24.0, y + 22
        yield _marker(key, x, y - 4.5)
        yield _text(x + 12, y, name)
        x += length


def _marker(key: str, x: float, y: float, tip: str = "", size: float = 1.0, more: str = "") -> str:
    number = MARKER_OF[key]
    title = f"<title>{escape(tip)}</title>" if tip else ""
    place = f"translate({x:.1f} {y:.1f}) scale({size:g})"
    style = f'class="c{number}{more}" transform="{place}"'
    return f'<path {style} d="M0 0{_SHAPES[number]}">{title}</path>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _title(text: str) -> str:
    return _text(24, 26, text, "start", "title")


def _svg(label: str, height: float, parts: Iterable[str]) -> str:
    box = f'width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
    card = f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" {box}>'
        f"<style>{_STYLE}</style>{card}{''.join(parts)}</svg>\n"
    )
