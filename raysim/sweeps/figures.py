"""The figures of a sweep's report: settings with their averaged figures in, matplotlib figures out, with a text for each mark.

Every axis is a `Scale` that turns values into positions between 0 and 1, so that logarithmic keys, names of methods and
runs without an epsilon have one way of being drawn. What lies under the pointer is named by an SVG title, which needs no library.
Left out: zooming and filtering; the table beside the figures sorts, and the numbers are in results.csv.
"""

import html
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from raysim.console.progress import human_bytes
from raysim.reports.figures import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    MUTED,
    SPARE_COLOURS,
    STYLE,
    SURFACE,
    colours_of,
    inline_svg,
    label_text,
)

PALETTE = [light for name, (light, _) in COLOURS.items() if name != "grey"] + [light for light, _ in SPARE_COLOURS]
ACCENT = COLOURS["blue"][0]
SHADES = LinearSegmentedColormap.from_list("shades", ["#dcebf5", "#7db3d8", "#0b5c93"])
ON_LIGHT, ON_DARK = "#14181d", "#ffffff"  # on the shades, which are the same on a dark page
MOST_STEPS = 12  # more different values of a key than this are a range, not a list
NUM_BINS = 5
MOST_TICKS = 7
ROUND_STEPS = [1, 2, 2.5, 5, 10]
BEHIND_TEXT: Any = {"boxstyle": "round,pad=0.15", "facecolor": SURFACE, "edgecolor": "none", "alpha": 0.75}
FULL_WIDTH, HALF_WIDTH = 11.0, 7.2
PLACE_OF_MISSING = 0.8  # values end here where the place at the end is for runs that have none

Sense = str


@dataclass(frozen=True)
class Scale:
    """How the values of one key or figure become positions on an axis from 0 to 1.

    `kind` is `steps` (equally spaced, in the order of `steps`), `linear` or `log` between `low` and `high`; `missing` is
    the word at the end of the axis for runs without a value, or empty where these are not drawn.
    """

    label: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    steps: tuple[Any, ...] = ()
    shown: tuple[float, ...] = ()
    missing: str = ""
    text: Callable[[Any], str] = str
    exact: Callable[[Any], str] = str

    def position(self, value: Any) -> float | None:
        """Where `value` lies, or None if it has no place."""
        if self.kind == "steps":
            return (self.steps.index(value) + 0.5) / len(self.steps) if value in self.steps else None
        if not is_number(value):
            return 1.0 if self.missing else None
        low, high, at = (math.log(v) for v in (self.low, self.high, value)) if self.kind == "log" else (self.low, self.high, value)
        share = (at - low) / (high - low) if high > low else 0.5
        return share * (PLACE_OF_MISSING if self.missing else 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """(position, text) of the values to name on the axis."""
        values = self.steps or self.shown
        placed = [(self.position(value), self.text(value)) for value in values]
        named = [(position, label_text(text)) for position, text in placed if position is not None]
        return [*named, (1.0, self.missing)] if self.missing else named


@dataclass(frozen=True)
class Measure:
    """A figure that trials are judged by."""

    key: str
    label: str
    sense: Sense
    text: Callable[[Any], str]
    least_span: float = 0.0
    """The axis covers at least this much, so that a difference of nothing does not look like one."""
    missing: str = ""
    log_from: float = 20.0
    """The axis is logarithmic where the largest value is this many times the smallest."""
    exact: Callable[[Any], str] = str
    """The text of a value that stands alone, where `text` is for round numbers on an axis."""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (and no truth value)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_range(values: Sequence[Any]) -> bool:
    """Whether a key's values are numbers drawn from a range rather than a list of a few."""
    return len({str(v) for v in values}) > MOST_STEPS and all(is_number(v) for v in values)


def key_scale(label: str, values: Sequence[Any], *, text: Callable[[Any], str] = str) -> Scale:
    """The axis of a swept key: numbers where they belong, on a logarithm where they are spaced like one, names side by side."""
    distinct = list({str(v): v for v in values}.values())
    numbers = sorted(v for v in distinct if is_number(v))
    if len(numbers) < len(distinct) or len(numbers) < 2:
        return Scale(label, "steps", steps=(*numbers, *[v for v in distinct if not is_number(v)]), text=text)
    log = _spaced_like_log(numbers)
    if not log and numbers[0] == 0 and len(numbers) > 3 and _spaced_like_log(numbers[1:]):
        return Scale(label, "steps", steps=tuple(numbers), text=text)  # "none" beside values on a logarithm
    return Scale(label, "log" if log else "linear", low=numbers[0], high=numbers[-1], shown=_shown(numbers, log=log), text=text)


def measure_scale(measure: Measure, values: Sequence[Any]) -> Scale:
    """The axis of a figure, at least `least_span` long, with a place for runs without it where the measure names one."""
    numbers = sorted(v for v in values if is_number(v)) or [0.0]
    words: dict[str, Any] = {"text": measure.text, "exact": measure.exact, "missing": measure.missing if len(numbers) < len(values) else ""}
    if numbers[0] > 0 and numbers[-1] / numbers[0] >= measure.log_from:
        distinct = list({measure.text(v): v for v in numbers}.values())
        return Scale(measure.label, "log", low=numbers[0], high=numbers[-1], shown=_shown(distinct, log=True), **words)
    middle, half = (numbers[0] + numbers[-1]) / 2, max(numbers[-1] - numbers[0], measure.least_span) / 2
    low, high = middle - half, middle + half
    if numbers[0] >= 0 > low:  # no figure that is never negative has an axis below zero
        low, high = 0.0, high - low
    if low == high:
        return Scale(measure.label, "linear", low=low, high=high, shown=(low,), **words)
    shown = tuple(v for v in MaxNLocator(5, steps=ROUND_STEPS).tick_values(low, high) if low <= v <= high)
    return Scale(measure.label, "linear", low=low, high=high, shown=shown, **words)


def _spaced_like_log(numbers: Sequence[float]) -> bool:
    """Whether sorted numbers are more even on a logarithm, or stretch over more than two powers of ten."""
    if numbers[0] <= 0:
        return False
    if numbers[-1] / numbers[0] >= 100:
        return True
    if len(numbers) < 3:
        return False
    gaps = [b - a for a, b in itertools.pairwise(numbers)]
    log_gaps = [math.log(b / a) for a, b in itertools.pairwise(numbers)]
    return max(log_gaps) / min(log_gaps) < 0.8 * max(gaps) / min(gaps)


def _shown(numbers: Sequence[float], *, log: bool) -> tuple[float, ...]:
    """The values to write on an axis: the numbers themselves where they are few, else round ones."""
    if len(numbers) <= MOST_TICKS:
        return tuple(numbers)
    low, high = numbers[0], numbers[-1]
    if not log:
        return tuple(v for v in MaxNLocator(6, steps=ROUND_STEPS).tick_values(low, high) if low <= v <= high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[step * 10.0**power for power in powers for step in steps] for steps in ((1, 2, 5), (1, 3), (1,))]
    rounds = [[v for v in choice if low <= v <= high] for choice in choices]
    return tuple(next((choice for choice in rounds if 2 <= len(choice) <= 4), [low, high]))


# --- which mark is which


@dataclass(frozen=True)
class Marking:
    """Colour and marker of every setting, and what they mean, as (text, colour, marker) for a legend."""

    colours: list[str]
    markers: list[str]
    legend: list[tuple[str, str, str]]


def marking(rows: Sequence[Mapping[str, Any]], *, keys: Sequence[str], names: Mapping[str, str]) -> Marking:
    """A colour by method (or else by the key with the fewest values) and a marker by another key with few values."""
    counts = {key: len({str(row[key]) for row in rows}) for key in keys}
    few = sorted((key for key in keys if 2 <= counts[key] <= len(MARKERS)), key=lambda key: (key != "method.name", counts[key]))
    colours = dict.fromkeys(map(str, range(len(rows))), ACCENT)
    legend: list[tuple[str, str, str]] = []
    if few:
        values = _in_order([row[few[0]] for row in rows])
        paints = colours_of([str(v) for v in values]) if few[0] == "method.name" else PALETTE
        of_value = dict(zip(map(str, values), paints, strict=False))
        colours = {str(i): of_value[str(row[few[0]])] for i, row in enumerate(rows)}
        legend += [(f"{names[few[0]]}={value}", of_value[str(value)], "") for value in values]
    markers = ["o"] * len(rows)
    if len(few) > 1:
        values = _in_order([row[few[1]] for row in rows])
        shape = {str(value): MARKERS[i] for i, value in enumerate(values)}
        markers = [shape[str(row[few[1]])] for row in rows]
        legend += [(f"{names[few[1]]}={value}", MUTED, shape[str(value)]) for value in values]
    return Marking(list(colours.values()), markers, legend)


def _in_order(values: Sequence[Any]) -> list[Any]:
    distinct = list({str(v): v for v in values}.values())
    return sorted(distinct) if all(is_number(v) for v in distinct) else distinct


# --- the figures


def front(
    rows: Sequence[Mapping[str, Any]], *, on_front: Sequence[int], pairs: Sequence[tuple[Measure, Measure]], marks: Marking
) -> Figure:
    """Every pair of measures with all settings; those on the front are filled and large, the dashed line is the pair's own front.

    Each setting is an element `mark-INDEX-PANEL`, for `with_titles`.
    """
    with matplotlib.rc_context(STYLE):
        wide = len(pairs) > 1
        figure = Figure(figsize=(FULL_WIDTH if wide else HALF_WIDTH, 4.5 if wide else 4.1), layout="constrained")
        for panel, (across, up) in enumerate(pairs):
            axes = figure.add_subplot(1, len(pairs), panel + 1)
            scales = [measure_scale(measure, [row[measure.key] for row in rows]) for measure in (across, up)]
            places = _places(rows, keys=(across.key, up.key), scales=scales)
            _stairs(axes, list(places.values()), senses=(across.sense, up.sense))
            for i in sorted(places, key=lambda i: i in on_front):
                _mark(axes, places[i], colour=marks.colours[i], marker=marks.markers[i], bold=i in on_front, gid=f"mark-{i}-{panel}")
            _draw_axis(axes.xaxis, scales[0], sense=across.sense, better=("left", "right"))
            _draw_axis(axes.yaxis, scales[1], sense=up.sense, better=("down", "up"))
            axes.set_xlim(-0.06, 1.06)
            axes.set_ylim(-0.08, 1.08)
        _legend(figure, marks)
        return figure


def _places(rows: Sequence[Mapping[str, Any]], *, keys: tuple[str, str], scales: Sequence[Scale]) -> dict[int, tuple[float, float]]:
    """Where the rows lie in a picture of two keys; those without a place are left out."""
    places = {}
    for i, row in enumerate(rows):
        x, y = (scale.position(row[key]) for key, scale in zip(keys, scales, strict=True))
        if x is not None and y is not None:
            places[i] = (x, y)
    return places


def _mark(axes: Axes, place: tuple[float, float], *, colour: str, marker: str, bold: bool, gid: str) -> None:
    axes.plot(
        [place[0]],
        [place[1]],
        marker,
        color=colour,
        markersize=10 if bold else 6.5,
        markerfacecolor=colour if bold else SURFACE,
        markeredgewidth=1.4,
        alpha=1.0 if bold else 0.75,
        zorder=3 if bold else 2,
        gid=gid,
    )


def _stairs(axes: Axes, places: Sequence[tuple[float, float]], *, senses: tuple[Sense, Sense]) -> None:
    """The front of two measures alone, as steps through the settings that no other beats in both."""
    signs = [1.0 if sense == "min" else -1.0 for sense in senses]
    points = sorted((signs[0] * x, signs[1] * y) for x, y in places)
    best: list[tuple[float, float]] = []
    for x, y in points:
        if not best or y < best[-1][1]:
            best.append((x, y))
    if len(best) > 1:
        xs, ys = [signs[0] * x for x, _ in best], [signs[1] * y for _, y in best]
        axes.step(xs, ys, where="post", color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)), alpha=0.7, zorder=1)


def _draw_axis(axis: Any, scale: Scale, *, sense: Sense = "", better: tuple[str, str] = ("", "")) -> None:
    """Ticks, and the label with the direction that is better."""
    ticks = scale.ticks()
    axis.set_ticks([position for position, _ in ticks], [text for _, text in ticks])
    direction = f" ({better[0] if sense == 'min' else better[1]} is better)" if sense else ""
    axis.set_label_text(scale.label + direction)


def _legend(figure: Figure, marks: Marking) -> None:
    handles = [Line2D([], [], linestyle="", marker=marker or "o", color=colour, markersize=7) for _, colour, marker in marks.legend]
    if handles:
        legend = figure.legend(
            handles=handles,
            labels=[str(i) for i in range(len(handles))],
            loc="outside upper left",
            ncols=min(len(handles), 7),
            fontsize=9.5,
            handlelength=1,
            columnspacing=1.4,
        )
        for text, (label, _, _) in zip(legend.get_texts(), marks.legend, strict=True):
            text.set_text(label_text(label))


def by_key(rows: Sequence[Mapping[str, Any]], *, key: str, label: str, measures: Sequence[Measure], text: Callable[[Any], str]) -> Figure:
    """One panel a measure over the values of one key: pale, every setting; bold, the mean over all other keys."""
    with matplotlib.rc_context(STYLE):
        width = FULL_WIDTH if len(measures) > 1 else HALF_WIDTH
        figure = Figure(figsize=(width, 3.3), layout="constrained")
        across = key_scale(label, [row[key] for row in rows], text=text)
        for panel, measure in enumerate(measures):
            axes = figure.add_subplot(1, len(measures), panel + 1)
            drawn = [(row[key], row[measure.key]) for row in rows if is_number(row[measure.key])]
            up = measure_scale(measure, [y for _, y in drawn])
            places = _places([row for row in rows if is_number(row[measure.key])], keys=(key, measure.key), scales=(across, up)).values()
            axes.plot([x for x, _ in places], [y for _, y in places], "o", color=ACCENT, alpha=0.3, markersize=5)
            _draw_means(axes, drawn, across=across, up=up)
            _draw_axis(axes.xaxis, across)
            axes.set_yticks([position for position, _ in up.ticks()], [word for _, word in up.ticks()])
            axes.set_title(
                f"{measure.label} ({'lower' if measure.sense == 'min' else 'higher'} is better)", loc="left", fontsize=10.5, color=MUTED
            )
            axes.grid(axis="x", visible=False)
            axes.set_xlim(-0.1, 1.1) if across.kind != "steps" else axes.set_xlim(0, 1)
            axes.set_ylim(-0.1, 1.16)
        return figure


def _draw_means(axes: Axes, drawn: Sequence[tuple[Any, float]], *, across: Scale, up: Scale) -> None:
    """The mean of each value of a key (of each fifth of the settings where it is a range), joined where the key has an order."""
    if is_range([x for x, _ in drawn]):
        ordered = sorted(drawn)
        parts = [ordered[i * len(ordered) // NUM_BINS : (i + 1) * len(ordered) // NUM_BINS] for i in range(NUM_BINS)]
        means = [(_mean([across.position(x) or 0.0 for x, _ in part]), _mean([y for _, y in part])) for part in parts]
    else:
        values = _in_order([x for x, _ in drawn])
        means = [(across.position(value) or 0.0, _mean([y for x, y in drawn if str(x) == str(value)])) for value in values]
    means.sort()
    heights = [up.position(mean) or 0.0 for _, mean in means]
    joined = across.kind != "steps" or all(is_number(step) for step in across.steps)
    axes.plot([x for x, _ in means], heights, "o-" if joined else "o", color=ACCENT, linewidth=2.2, markersize=8)
    for (x, mean), height in zip(means, heights, strict=True):
        if len(means) <= 8:
            axes.annotate(
                up.exact(mean),
                (x, height),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                fontweight="bold",
                color=ACCENT,
                bbox=BEHIND_TEXT,
            )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def heat_map(
    rows: Sequence[Mapping[str, Any]], *, keys: tuple[str, str], names: Mapping[str, str], measure: Measure, text: Callable[[Any], str]
) -> Figure:
    """The mean of a measure for every pair of values of two keys, darker where it is better, with the numbers written in."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        columns, lines = (_in_order([row[key] for row in rows]) for key in keys)
        figure = Figure(figsize=(HALF_WIDTH, min(1.3 + 0.46 * len(lines), 6.5)), layout="constrained")
        axes = figure.add_subplot()
        cells: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            if is_number(row[measure.key]):
                at = ([str(v) for v in columns].index(str(row[keys[0]])), [str(v) for v in lines].index(str(row[keys[1]])))
                cells.setdefault(at, []).append(row[measure.key])
        means = {at: _mean(values) for at, values in cells.items()}
        _draw_cells(axes, means, size=(len(columns), len(lines)), measure=measure)
        axes.set_xticks(range(len(columns)), [label_text(text(v)) for v in columns])
        axes.set_yticks(range(len(lines)), [label_text(text(v)) for v in lines])
        axes.set_xlabel(names[keys[0]])
        axes.set_ylabel(names[keys[1]])
        axes.spines[:].set_visible(False)
        return figure


def _draw_cells(axes: Axes, means: Mapping[tuple[int, int], float], *, size: tuple[int, int], measure: Measure) -> None:
    low, high = min(means.values()), max(means.values())
    span = max(high - low, measure.least_span) or 1.0
    for i, j in itertools.product(range(size[0]), range(size[1])):
        mean = means.get((i, j))
        if mean is None:
            axes.text(i, j, "—", ha="center", va="center", color=MUTED)
            continue
        share = (high - mean if measure.sense == "min" else mean - low) / span
        axes.add_patch(Rectangle((i - 0.48, j - 0.46), 0.96, 0.92, facecolor=SHADES(share), edgecolor="none"))
        axes.text(i, j, measure.exact(mean), ha="center", va="center", fontsize=9.5, color=ON_DARK if share > 0.6 else ON_LIGHT)
    axes.set_xlim(-0.5, size[0] - 0.5)
    axes.set_ylim(size[1] - 0.5, -0.5)


def parallel(rows: Sequence[Mapping[str, Any]], *, scales: Mapping[str, Scale], on_front: Sequence[int], marks: Marking) -> Figure:
    """Every setting as a line across the swept keys and the measures; those on the front are strong.

    Each setting is an element `mark-INDEX-0`, for `with_titles`.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(FULL_WIDTH, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for i in sorted(range(len(rows)), key=lambda i: i in on_front):
            places = [(x, scale.position(rows[i][key])) for x, (key, scale) in enumerate(scales.items())]
            drawn = [(x, y) for x, y in places if y is not None]
            bold = i in on_front
            axes.plot(
                [x for x, _ in drawn],
                [y for _, y in drawn],
                color=marks.colours[i],
                linewidth=2.6 if bold else 1.2,
                alpha=0.95 if bold else 0.35,
                zorder=3 if bold else 2,
                gid=f"mark-{i}-0",
            )
        for x, scale in enumerate(scales.values()):
            axes.axvline(x, color=GRID, linewidth=1.2, zorder=1)
            for position, word in scale.ticks():
                axes.annotate(
                    word,
                    (x, position),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                    color=INK,
                    zorder=4,
                    bbox=BEHIND_TEXT,
                )
        axes.set_xticks(range(len(scales)), [scale.label for scale in scales.values()])
        axes.tick_params(axis="x", labelcolor=INK, labeltop=True, labelbottom=False)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_xlim(-0.1, len(scales) - 0.55)
        axes.set_ylim(-0.06, 1.06)
        _legend(figure, Marking(marks.colours, marks.markers, [item for item in marks.legend if not item[2]]))
        return figure


def with_titles(figure: Figure, *, name: str, title: str, titles: Sequence[str]) -> str:
    """`figure` as an SVG element in which the element `mark-INDEX-...` says `titles[INDEX]` under the pointer."""
    svg = inline_svg(figure, name=name, title=html.escape(title))

    def named(found: re.Match[str]) -> str:
        text = html.escape(titles[int(found[2])])
        return f'<g id="{found[1]}" class="mark"><title>{text}</title>'

    return re.sub(rf'<g id="({re.escape(name)}-mark-(\d+)-\d+)">', named, svg)


def bytes_text(value: Any) -> str:
    """A number of bytes as on the rest of the page."""
    return human_bytes(value)
