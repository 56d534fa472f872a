"""The figures of a sweep's report: settings with their averaged figures in, matplotlib figures out, with a name for each mark.

What lies under the pointer is named by an SVG title, which needs no library.
Left out: zooming and filtering; the table beside the figures sorts, and the numbers are in results.csv.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from raysim.console.words import is_number
from raysim.reports.figures import (
    COLOURS,
    FULL_WIDTH,
    GRID,
    INK,
    MARKERS,
    MUTED,
    SPARE_COLOURS,
    SURFACE,
    WIDTH,
    add_legend,
    beside,
    colours_of,
    label_text,
    name_values,
    styled,
)
from raysim.sweeps.scales import Measure, Scale, Sense, is_range, key_scale, measure_scale

PALETTE = [light for name, (light, _) in COLOURS.items() if name != "grey"] + [light for light, _ in SPARE_COLOURS]
ACCENT = COLOURS["blue"][0]
SHADES = LinearSegmentedColormap.from_list("shades", ["#dcebf5", "#7db3d8", "#0b5c93"])
ON_LIGHT, ON_DARK = "#14181d", "#ffffff"  # on the shades, which are the same on a dark page
NUM_BINS = 5
BEHIND_TEXT: Any = {"boxstyle": "round,pad=0.15", "facecolor": SURFACE, "edgecolor": "none", "alpha": 0.75}


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
    colours, markers, legend = [ACCENT] * len(rows), ["o"] * len(rows), list[tuple[str, str, str]]()
    for key in few[:1]:
        values = _in_order([row[key] for row in rows])
        paints = colours_of([str(v) for v in values]) if key == "method.name" else PALETTE
        of_value = dict(zip(map(str, values), paints, strict=False))
        colours = [of_value[str(row[key])] for row in rows]
        legend += [(f"{names[key]}={value}", colour, "") for value, colour in of_value.items()]
    for key in few[1:2]:
        shapes = dict(zip(map(str, _in_order([row[key] for row in rows])), MARKERS, strict=False))
        markers = [shapes[str(row[key])] for row in rows]
        legend += [(f"{names[key]}={value}", MUTED, shape) for value, shape in shapes.items()]
    return Marking(colours, markers, legend)


def _in_order(values: Sequence[Any]) -> list[Any]:
    distinct = list({str(v): v for v in values}.values())
    return sorted(distinct) if all(is_number(v) for v in distinct) else distinct


# --- the figures


@styled()
def front(
    rows: Sequence[Mapping[str, Any]], *, on_front: Sequence[int], pairs: Sequence[tuple[Measure, Measure]], marks: Marking
) -> Figure:
    """Every pair of measures with all settings; those on the front are filled and large, the dashed line is the pair's own front.

    Each setting is an element `mark-INDEX-PANEL`, for `inline_svg`.
    """
    wide = len(pairs) > 1
    figure = Figure(figsize=(FULL_WIDTH if wide else WIDTH, 4.5 if wide else 4.1), layout="constrained")
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
    _legend(figure, marks.legend)
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


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    handles = [Line2D([], [], linestyle="", marker=marker or "o", color=colour, markersize=7) for _, colour, marker in entries]
    if handles:
        add_legend(figure, [label for label, _, _ in entries], handles=handles, ncols=min(len(handles), 7))


@styled()
def by_key(rows: Sequence[Mapping[str, Any]], *, key: str, label: str, measures: Sequence[Measure], text: Callable[[Any], str]) -> Figure:
    """One panel a measure over the values of one key: pale, every setting; bold, the mean over all other keys."""
    width = FULL_WIDTH if len(measures) > 1 else WIDTH
    figure = Figure(figsize=(width, 3.3), layout="constrained")
    across = key_scale(label, [row[key] for row in rows], text=text)
    for panel, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), panel + 1)
        known = [row for row in rows if is_number(row[measure.key])]
        up = measure_scale(measure, [row[measure.key] for row in known])
        places = _places(known, keys=(key, measure.key), scales=(across, up)).values()
        axes.plot([x for x, _ in places], [y for _, y in places], "o", color=ACCENT, alpha=0.3, markersize=5)
        _draw_means(axes, [(row[key], row[measure.key]) for row in known], across=across, up=up)
        _draw_axis(axes.xaxis, across)
        axes.set_yticks([position for position, _ in up.ticks()], [word for _, word in up.ticks()])
        name_values(axes, f"{measure.label} ({'lower' if measure.sense == 'min' else 'higher'} is better)", pad=None)
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.1, 1.1) if across.kind != "steps" else axes.set_xlim(0, 1)
        axes.set_ylim(-0.1, 1.16)
    return figure


def _draw_means(axes: Axes, drawn: Sequence[tuple[Any, float]], *, across: Scale, up: Scale) -> None:
    """The mean of each value of a key (of each fifth of the settings where it is a range), joined where the key has an order."""
    if is_range([x for x, _ in drawn]):
        ordered = sorted(drawn)
        parts = [ordered[i * len(ordered) // NUM_BINS : (i + 1) * len(ordered) // NUM_BINS] for i in range(NUM_BINS)]
        means = [(statistics.fmean([across.position(x) or 0.0 for x, _ in part]), statistics.fmean([y for _, y in part])) for part in parts]
    else:
        values = _in_order([x for x, _ in drawn])
        means = [(across.position(value) or 0.0, statistics.fmean([y for x, y in drawn if str(x) == str(value)])) for value in values]
    means.sort()
    heights = [up.position(mean) or 0.0 for _, mean in means]
    joined = across.kind != "steps" or all(is_number(step) for step in across.steps)
    axes.plot([x for x, _ in means], heights, "o-" if joined else "o", color=ACCENT, linewidth=2.2, markersize=8)
    for (x, mean), height in zip(means, heights, strict=True) if len(means) <= 8 else ():
        style = {"ha": "center", "va": "baseline", "fontsize": 9.5, "fontweight": "bold", "color": ACCENT, "bbox": BEHIND_TEXT}
        beside(axes, up.exact(mean), (x, height), offset=(0, 8), **style)


@styled({"axes.grid": False})
def heat_map(
    rows: Sequence[Mapping[str, Any]], *, keys: tuple[str, str], names: Mapping[str, str], measure: Measure, text: Callable[[Any], str]
) -> Figure:
    """The mean of a measure for every pair of values of two keys, darker where it is better, with the numbers written in."""
    columns, lines = (_in_order([row[key] for row in rows]) for key in keys)
    figure = Figure(figsize=(WIDTH, min(1.3 + 0.46 * len(lines), 6.5)), layout="constrained")
    axes = figure.add_subplot()
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if is_number(row[measure.key]):
            at = ([str(v) for v in columns].index(str(row[keys[0]])), [str(v) for v in lines].index(str(row[keys[1]])))
            cells.setdefault(at, []).append(row[measure.key])
    means = {at: statistics.fmean(values) for at, values in cells.items()}
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


@styled({"axes.grid": False})
def parallel(rows: Sequence[Mapping[str, Any]], *, scales: Mapping[str, Scale], on_front: Sequence[int], marks: Marking) -> Figure:
    """Every setting as a line across the swept keys and the measures; those on the front are strong.

    Each setting is an element `mark-INDEX-0`, for `inline_svg`.
    """
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
            beside(axes, word, (x, position), offset=(6, 0), fontsize=9, color=INK, zorder=4, bbox=BEHIND_TEXT)
    axes.set_xticks(range(len(scales)), [scale.label for scale in scales.values()])
    axes.tick_params(axis="x", labelcolor=INK, labeltop=True, labelbottom=False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.1, len(scales) - 0.55)
    axes.set_ylim(-0.06, 1.06)
    _legend(figure, [entry for entry in marks.legend if not entry[2]])
    return figure
