"""Drawings of the page, as SVG: colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 38  # margins
COLOURS = 8  # of lines, in the style sheet
MAP_SIZE, MAP_MARGIN = 640, 12


def line_chart(
    title: str, x_label: str, x: Sequence[float], lines: dict[str, Sequence[float | None]], *, log: bool = False
) -> str:
    """A figure with a line for each of `lines`, and a legend. `log`: of the y axis, for positive values."""
    known = [y for line in lines.values() for y in line if y is not None]
    y_axis = _Axis(min(known), max(known), HEIGHT - BOTTOM, TOP, log)
    x_axis = _Axis(min(x), max(x), LEFT, WIDTH - RIGHT)
    parts = []
    for tick in y_axis.ticks():
        at = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_axis.ticks():
        if tick == int(tick):
            parts.append(f'<text x="{x_axis(tick):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{tick:.0f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for n, line in enumerate(lines.values()):
        points = [f"{x_axis(a):.1f},{y_axis(b):.1f}" for a, b in zip(x, line, strict=True) if b is not None]
        if len(points) == 1:
            across, down = points[0].split(",")
            parts.append(f'<circle class="dot s{n % COLOURS}" cx="{across}" cy="{down}" r="3"/>')
        else:
            parts.append(f'<polyline class="line s{n % COLOURS}" points="{" ".join(points)}"/>')
    said = "; ".join(f"{name} from {_number(line[0])} to {_number(line[-1])}" for name, line in lines.items())
    legend = "".join(
        f'<li><span class="key s{n % COLOURS}" aria-hidden="true"></span>{escape(name)}</li>'
        for n, name in enumerate(lines)
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}, over {x_label}: {said}")}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def scatter(title: str, points: Sequence[dict[str, Any]]) -> str:
    """A map of `points`: places from -1 to 1 (`x`, `y`), `name`, and `colour`, a number that points share.

    It is as wide and as high as the places need.
    """
    scale = MAP_SIZE / 2 - MAP_MARGIN
    right, top = (MAP_MARGIN + scale * max(abs(point[axis]) for point in points) for axis in ("x", "y"))
    circles = [
        f'<circle class="c{point["colour"]}" cx="{right + scale * point["x"]:.1f}" cy="{top - scale * point["y"]:.1f}" '
        f'r="4"><title>{escape(point["name"])}</title></circle>'
        for point in points
    ]
    return (
        f'<div class="map"><svg viewBox="0 0 {2 * right:.1f} {2 * top:.1f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(circles)}</svg></div>"
    )


def point_colours(count: int) -> str:
    """Style of the points' colours `0` to `count - 1`: the first ones differ most."""
    rules = []
    for n in range(count):
        hue, light = n * 137.508 % 360, n // 9 % 3  # the golden angle
        rules.append(f".c{n}{{fill:hsl({hue:.0f} 68% var(--l{light}))}}")
    return "".join(rules)


class _Axis:
    """From values between `low` and `high` to places between `start` and `stop`."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool = False):
        if low == high:  # all the same: in the middle
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.start, self.stop, self.log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5)):
                ticks = [f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p <= self.high]
                if len(ticks) >= 3:
                    return ticks[:: 1 + len(ticks) // 8]
        rough = (self.high - self.low) / 4
        power = 10 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
