"""Small charts as inline SVG: no library, no network, readable without a script.

The page's script adds values on hover from the same numbers, which every chart also returns as
plain data. Colours come from the page's style sheet by class, so that both themes work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 460.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 14.0, 14.0, 34.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: ``role`` is the style sheet's class (``harm``, ``utility``, ``term``)."""

    label: str
    role: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Marker:
    """A ringed point with a word beside it."""

    x: float
    y: float
    label: str
    role: str


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """A chart of lines over one horizontal axis.

    Parameters
    ----------
    name
        Unique within the page; ties the drawing to its data.
    description
        What a reader who cannot see it should know.
    limit
        Height and label of a horizontal reference line.
    shaded
        Stretches of x to shade, for example where utility has broken down.
    y_range
        Ends of the vertical axis; found from the points when None.
    """

    name: str
    description: str
    series: Sequence[Series]
    x_label: str
    y_range: tuple[float, float] | None = None
    limit: tuple[float, str] | None = None
    shaded: Sequence[tuple[float, float]] = ()
    marker: Marker | None = None
    height: float = HEIGHT

    def data(self) -> dict[str, Any]:
        """Return the numbers and the geometry that the page's script needs."""
        left, right, low, high = self._bounds()
        return {
            "x_label": self.x_label,
            "plot": [LEFT, TOP, WIDTH - RIGHT, self.height - BOTTOM],
            "x": [left, right],
            "y": [low, high],
            "series": [
                {"label": line.label, "role": line.role, "points": [list(p) for p in line.points]}
                for line in self.series
            ],
        }

    def svg(self) -> Markup:
        """Return the drawing."""
        x_low, x_high, y_low, y_high = self._bounds()

        def x(value: float) -> float:
            share = (value - x_low) / ((x_high - x_low) or 1)
            return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

        def y(value: float) -> float:
            share = (value - y_low) / ((y_high - y_low) or 1)
            return round(self.height - BOTTOM - share * (self.height - TOP - BOTTOM), 2)

        floor, ceiling = self.height - BOTTOM, TOP
        parts: list[Markup] = []
        for start, end in self.shaded:
            parts.append(
                Markup('<rect class="shaded" x="{}" y="{}" width="{}" height="{}"/>').format(
                    x(start), ceiling, max(x(end) - x(start), 1.5), floor - ceiling
                )
            )
        for tick in _ticks(y_low, y_high, 4):
            parts.append(
                Markup(
                    '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                    '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
                ).format(
                    LEFT, WIDTH - RIGHT, y(tick), y(tick), LEFT - 7, y(tick) + 3.5, _short(tick)
                )
            )
        for tick in _ticks(x_low, x_high, 6):
            parts.append(
                Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    x(tick), floor + 15, _short(tick)
                )
            )
        parts.append(
            Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(
                WIDTH - RIGHT, self.height - 4, self.x_label
            )
        )
        if self.limit:
            height, label = self.limit
            parts.append(
                Markup(
                    '<line class="limit" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                    '<text class="limit-label" x="{}" y="{}" text-anchor="end">{}</text>'
                ).format(
                    LEFT, WIDTH - RIGHT, y(height), y(height), WIDTH - RIGHT, y(height) - 5, label
                )
            )
        for line in self.series:
            if len(line.points) > 1:
                path = "M" + "L".join(f"{x(px)} {y(py)}" for px, py in line.points)
                parts.append(Markup('<path class="line {}" d="{}"/>').format(line.role, path))
            if len(line.points) <= 40:
                parts += [
                    Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.6"/>').format(
                        line.role, x(px), y(py)
                    )
                    for px, py in line.points
                ]
        if self.marker:
            parts.append(self._marker(x(self.marker.x), y(self.marker.y)))
        return Markup(
            '<svg class="chart" data-chart="{}" viewBox="0 0 {} {}" role="img" tabindex="0" '
            'aria-label="{}">{}</svg>'
        ).format(self.name, WIDTH, self.height, self.description, Markup("").join(parts))

    def _marker(self, x: float, y: float) -> Markup:
        assert self.marker is not None
        anchor = "end" if x > WIDTH * 0.7 else "middle" if x > WIDTH * 0.25 else "start"
        above = y > TOP + 26
        return Markup(
            '<circle class="ring {}" cx="{}" cy="{}" r="6"/>'
            '<text class="callout {}" x="{}" y="{}" text-anchor="{}">{}</text>'
        ).format(
            self.marker.role, x, y, self.marker.role, x, y - 11 if above else y + 20, anchor,
            self.marker.label,
        )  # fmt: skip

    def _bounds(self) -> tuple[float, float, float, float]:
        xs = [x for line in self.series for x, _ in line.points] or [0.0, 1.0]
        if self.y_range:
            return min(xs), max(xs), *self.y_range
        ys = [y for line in self.series for _, y in line.points] or [0.0, 1.0]
        low, high = min(ys), max(ys)
        if low == high:
            low, high = low - 0.5, high + 0.5
        margin = 0.06 * (high - low)
        return min(xs), max(xs), low - margin, high + margin


@dataclass(frozen=True, kw_only=True)
class ShareBar:
    """A bar divided into shares that sum to 1, as an SVG strip."""

    description: str
    shares: Mapping[str, float]

    def svg(self) -> Markup:
        """Return the drawing; each part's class is ``share-`` and its name."""
        parts, start = [], 0.0
        width, height = 860.0, 26.0
        for name, share in self.shares.items():
            if share <= 0:
                continue
            span = share * width
            parts.append(
                Markup(
                    '<rect class="share share-{}" x="{}" y="0" width="{}" height="{}">'
                    "<title>{}: {}</title></rect>"
                ).format(
                    name, round(start, 2), round(max(span - 1.5, 0.5), 2), height,
                    name.replace("_", " "), percent(share),
                )
            )  # fmt: skip
            if span >= 38:
                parts.append(
                    Markup(
                        '<text class="share-label share-label-{}" x="{}" y="17.5" '
                        'text-anchor="middle">{}</text>'
                    ).format(name, round(start + (span - 1.5) / 2, 2), percent(share))
                )
            start += span
        return Markup(
            '<svg class="bar" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        ).format(width, height, self.description, Markup("").join(parts))


@dataclass(frozen=True, kw_only=True)
class IntervalBar:
    """A share with its interval on a line from 0 to 1, as a small strip.

    Parameters
    ----------
    limit
        Drawn as a dashed line.
    other
        A share to compare with, drawn as a hollow dot.
    role
        The style sheet's class of the interval (``kept``, ``warned``, ``harmful``, ``soft``).
    """

    description: str
    low: float
    estimate: float
    high: float
    limit: float
    role: str
    other: float | None = None

    def svg(self) -> Markup:
        """Return the drawing."""
        width, height, margin = 150.0, 16.0, 6.0

        def x(share: float) -> float:
            return round(margin + min(max(share, 0.0), 1.0) * (width - 2 * margin), 2)

        parts = [
            Markup('<rect class="gauge-track" x="{}" y="6.5" width="{}" height="3" rx="1.5"/>')
            .format(x(0), x(1) - x(0)),
            Markup('<path class="limit" d="M{x} 1V15"/>').format(x=x(self.limit)),
            Markup('<path class="interval {}" d="M{} 8H{}"/>').format(
                self.role, x(self.low), x(self.high)
            ),
        ]  # fmt: skip
        if self.other is not None:
            parts.append(
                Markup('<circle class="other" cx="{}" cy="8" r="3.4"/>').format(x(self.other))
            )
        parts.append(
            Markup('<circle class="point {}" cx="{}" cy="8" r="3.4"/>').format(
                self.role, x(self.estimate)
            )
        )
        return Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        ).format(width, height, self.description, Markup("").join(parts))


def percent(share: float) -> str:
    """Return a share as a whole percentage, its sign kept on the same line."""
    return f"{100 * share:.0f}\u00a0%"


def stretches(steps: Sequence[float], flags: Sequence[bool]) -> list[tuple[float, float]]:
    """Return the runs of consecutive steps whose flag is set, widened halfway to neighbours."""
    found: list[tuple[float, float]] = []
    for index, flag in enumerate(flags):
        if not flag:
            continue
        before = steps[index] if index == 0 else (steps[index - 1] + steps[index]) / 2
        last = index == len(steps) - 1
        after = steps[index] if last else (steps[index] + steps[index + 1]) / 2
        if found and math.isclose(found[-1][1], before):
            found[-1] = (found[-1][0], after)
        else:
            found.append((before, after))
    return found


def _ticks(low: float, high: float, about: int) -> list[float]:
    span = high - low
    if span <= 0:
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]


def _short(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:g}"


__all__ = ["IntervalBar", "LineChart", "Marker", "Series", "ShareBar", "percent", "stretches"]
