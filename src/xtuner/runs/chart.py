"""Draw curves as SVG, without scripts: colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from xtuner.engine.hooks.loss_curve import running_mean

WIDTH, HEIGHT = 720, 260
"""Of a drawing, which is scaled to the page."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 34
_MOST_POINTS = 500

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: Shown in the legend.
        points: (x, y), in order of x.
        style: Class of the style sheet: 'faint', 'main', 'second', ...
        dots: Mark the points; for few of them.
    """

    label: str
    points: Points
    style: str = "main"
    dots: bool = False


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The running mean of `points`, as in the run's loss_curve.png."""
    finite = _finite(points)
    return list(zip((x for x, _ in finite), running_mean(finite), strict=True))


def draw(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    marks: Sequence[float] = (),
    marks_label: str = "",
) -> str:
    """Draw `lines` into one SVG with axes, whose y axis contains 0, and a legend. The x axis is in
    whole steps.

    Args:
        lines: Curves; points that are not finite are left out.
        label: Read out by screen readers.
        x_label: The title of the x axis.
        marks, marks_label: Points of the x axis to mark, and what they are.
    """
    lines = [Line(line.label, _finite(line.points), line.style, line.dots) for line in lines]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        return ""
    frame = _Frame((min([*xs, *marks]), max([*xs, *marks])), (min(ys), max(ys)))
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">',
        *frame.axes(x_label),
        *(part for line in lines if line.points for part in _curve(line, frame)),
        *(frame.mark(value) for value in marks),
        "</svg>",
    ]
    keys = [(line.style, line.label) for line in lines if line.points and line.label]
    keys += [("third", marks_label)] if marks and marks_label else []
    legend = "".join(f'<span class="key {style}">{escape(text)}</span>' for style, text in keys)
    return "".join(parts) + (f'<div class="legend">{legend}</div>' if legend else "")


class _Frame:
    """Maps values to pixels."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self.x_low, self.x_high = xs[0], max(xs[1], xs[0] + 1)
        self.y_low, self.y_high = 1.05 * min(ys[0], 0.0), 1.05 * max(ys[1], 0.0)
        if self.y_high == self.y_low:
            self.y_high = 1.0

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        bottom = HEIGHT - _BOTTOM
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return bottom - share * (bottom - _TOP)

    def mark(self, value: float) -> str:
        """A triangle on the x axis."""
        x, bottom = self.x(value), HEIGHT - _BOTTOM
        corners = f"{x - 5:.1f},{bottom} {x + 5:.1f},{bottom} {x:.1f},{bottom - 9}"
        return f'<polygon class="third" points="{corners}"/>'

    def axes(self, x_label: str) -> Iterator[str]:
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        for value in _ticks(self.y_low, self.y_high, HEIGHT // 50):
            y = self.y(value)
            yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            yield f"{_number(value)}</text>"
        for value in _ticks(self.x_low, self.x_high, WIDTH // 100, integers=True):
            x = self.x(value)
            yield f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
            yield f"{_number(value)}</text>"
        yield f'<text class="tick" x="{right}" y="{HEIGHT - 4}" text-anchor="end">'
        yield f"{escape(x_label)}</text>"


def _curve(line: Line, frame: _Frame) -> Iterator[str]:
    points = _thinned(line.points)
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    yield f'<polyline class="{line.style}" points="{path}"/>'
    if line.dots or len(points) == 1:
        for x, y in points:
            yield f'<circle class="{line.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3">'
            yield f"<title>{_number(x)}: {y:.4g}</title></circle>"


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` points; of each bucket the lowest and the highest, so that peaks
    stay visible."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


def _ticks(low: float, high: float, count: int, *, integers: bool = False) -> list[float]:
    """At most about `count` round values from `low` to `high`, integers if `integers`."""
    raw = (high - low) / max(1, count)
    if integers:
        raw = max(raw, 1.0)
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if integers else (1, 2, 2.5, 5, 10)
    step = next(power * factor for factor in factors if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000 and value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
