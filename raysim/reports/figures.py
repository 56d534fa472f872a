"""The figures of a report: plain numbers in, matplotlib figures out, written as PNG files and as SVG for the page.

A method keeps its colour in every figure; the colours (after Okabe and Ito 2008, and Tol 2021 for labels of data) stay apart
for colour-blind readers. Lines carry their names at their ends, so that no legend has to be matched.
Left out: pyplot and its global state; interactive figures.
"""

import contextlib
import html
import io
import logging
import re
import statistics
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from raysim import storage
from raysim.console.words import human_bytes
from raysim.methods.spec import spec_of

logger = logging.getLogger(__name__)

# Each colour on paper and on a dark page. A method says which is its own; runs of methods without one take the spare ones in order.
COLOURS: dict[str, tuple[str, str]] = {
    "grey": ("#74797f", "#a3a9b1"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f08a3c"),
    "green": ("#00896a", "#2fc69c"),
    "violet": ("#5b4fa3", "#a79bee"),
    "olive": ("#4d7300", "#a5cf4c"),
    "brown": ("#8c3b3b", "#e08080"),
    "pink": ("#b0588c", "#e295c0"),
    "plum": ("#7a2f5c", "#f2bcd9"),
    "amber": ("#a87400", "#e6b422"),
}
SPARE_COLOURS = (("#3d5a80", "#9bb6d8"), ("#6b4f3a", "#c9a98c"), ("#00707f", "#4fc3d4"))
INK, MUTED, GRID, SURFACE = "#1c2530", "#5d6772", "#dfe3e8", "#fffffe"
DARK = {INK: "#e8ecf1", MUTED: "#a4aeba", GRID: "#343c47", SURFACE: "#171c23"}
LABEL_COLOURS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#c3a6e0", "#cfcfcf")
KEPT_COLOUR = "#44bb99"
ON_LABEL = "#14181d"
MARKERS = "osD^vPX*"
OTHER = "other"

STYLE: Any = {  # Any: the keys of matplotlib settings are a closed set of literals in its stubs
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": SURFACE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # labels and names are the user's: `$5 off $10` is no formula
}
WIDTH, FULL_WIDTH = 7.2, 11.0
"""Inches of a figure that stands beside another, and of one that takes the whole width of a page."""
LONGEST_LABEL = 40
"""Characters of a name or label in a figure; tables and pages have them whole."""


@dataclass(frozen=True)
class Line:
    """One run's values by rounds completed; `control` is drawn dashed in the same colour, `kept` dotted."""

    label: str
    colour: str
    marker: str
    values: Sequence[tuple[int, float]]
    control: Sequence[tuple[int, float]] = ()
    kept: Sequence[tuple[int, float]] = ()
    band: Sequence[tuple[int, float, float]] = ()
    """Intervals of the values, drawn pale."""


@dataclass(frozen=True)
class RunEnd:
    """One run at its end, for the trade-off figure."""

    label: str
    colour: str
    marker: str
    nll: float
    leakage: float
    control: float | None
    interval: tuple[float, float] | None = None
    """Of the leakage."""


@dataclass(frozen=True)
class Curve:
    """A figure by a setting: places on the axis, each with the mean over seeds and the lowest and highest seed."""

    label: str
    colour: str
    marker: str
    points: list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Roc:
    """How well scores tell who was in: (false-positive, true-positive) rates for thresholds from high to low."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Level:
    """A value that does not depend on the setting, such as the base model's."""

    label: str
    colour: str
    value: float


@contextlib.contextmanager
def styled(settings: Any = None) -> Iterator[None]:
    """A place, or a function, in which figures have this package's style and further settings, and no warning for each character that a font lacks."""
    with matplotlib.rc_context({**STYLE, **(settings or {})}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def label_text(text: str) -> str:
    """A user's label as a figure can draw it: one line, without control characters, cut where it is long."""
    line = " ".join("".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") else " " for c in text).split())
    return line if len(line) <= LONGEST_LABEL else f"{line[: LONGEST_LABEL - 1]}…"


def colours_of(methods: Sequence[str]) -> list[str]:
    """The light-page colour of each method, the same for the same method."""
    names = {method: spec_of(method).colour for method in methods}
    unknown = [method for method, name in names.items() if not name]
    spare = {method: SPARE_COLOURS[i % len(SPARE_COLOURS)][0] for i, method in enumerate(unknown)}
    return [COLOURS[names[method]][0] if names[method] else spare[method] for method in methods]


def markers_of(methods: Sequence[str]) -> list[str]:
    """A marker for each run that tells runs of one method apart."""
    return [MARKERS[list(methods[:i]).count(method) % len(MARKERS)] for i, method in enumerate(methods)]


@styled()
def by_round(lines: Sequence[Line], *, axis: str, least_span: float, percent: bool = False, note: str = "") -> Figure:
    """Values against rounds completed, one line a run, each named at its end.

    The value axis covers at least `least_span`, so that a difference of nothing does not look like one.
    """
    figure, axes = _canvas(height=3.7)
    for line in lines:
        _draw_line(axes, line)
    _round_axis(axes, lines)
    name_values(axes, axis)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    values = [y for line in lines for _, y in [*line.values, *line.control, *line.kept]]
    values += [end for line in lines for _, *ends in line.band for end in ends]
    _value_limits(axes, values, least_span=least_span, from_zero=percent)
    ends = [(line.label, line.colour, line.values[-1]) for line in lines if line.values]
    _label_ends(axes, ends, "{:.1%}" if percent else "{:.2f}")
    if note:
        axes.set_xlabel(f"rounds completed    ({note})")
    return figure


@styled()
def by_queries(lines: Sequence[Line], *, axis: str, note: str) -> Figure:
    """Shares against the power of ten of a number of queries, one line a run, its held-out control dashed."""
    figure, axes = _canvas(height=3.7)
    for line in lines:
        _draw_line(axes, line)
    powers = [power for power, _ in lines[0].values]
    margin = 0.04 * (powers[-1] - powers[0])
    axes.set_xlim(powers[0] - margin, powers[-1] + margin)
    axes.set_xticks(
        powers,
        [f"{10**power:,}" if power < 3 else f"{10 ** (power - 3):,} k" if power < 6 else f"{10 ** (power - 6):,} M" for power in powers],
    )
    name_values(axes, axis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    _value_limits(axes, [y for line in lines for _, y in [*line.values, *line.control]], least_span=0.1, from_zero=True)
    _label_ends(axes, [(line.label, line.colour, line.values[-1]) for line in lines], "{:.0%}")
    axes.set_xlabel(f"samples drawn for each record    ({note})")
    return figure


@styled()
def trade_off(runs: Sequence[RunEnd], *, axis: str, least_span: float) -> Figure:
    """Utility against leakage at the end of every run; a hollow mark is the held-out control, a bar the interval."""
    figure, axes = _canvas(height=3.7)
    for run in runs:
        if run.control is not None:
            axes.plot([run.nll] * 2, [run.control, run.leakage], color=run.colour, linewidth=1.6, alpha=0.6)
            axes.plot([run.nll], [run.control], run.marker, color=run.colour, markerfacecolor=SURFACE, markersize=7)
        if run.interval is not None:
            axes.plot([run.nll] * 2, run.interval, color=run.colour, linewidth=1.6, alpha=0.6)
        axes.plot([run.nll], [run.leakage], run.marker, color=run.colour, markersize=8)
    name_values(axes, axis)
    axes.set_xlabel("held-out NLL (left is better)")
    values = [v for run in runs for v in (run.leakage, run.control, *(run.interval or ())) if v is not None]
    _value_limits(axes, values, least_span=least_span, from_zero=False)
    axes.margins(x=0.18)
    heights = _spread([run.leakage for run in runs], *axes.get_ylim(), at_least=0.055)
    for run, height in zip(runs, heights, strict=True):
        beside(axes, label_text(run.label), (run.nll, height), color=run.colour, fontweight="bold")
    return figure


def partition(clients: Sequence[tuple[str, Mapping[str, int]]]) -> Figure:
    """Who holds what: a bar a client (named, with its records by label), coloured by label; the rarest labels become one."""
    labels = _labels_shown([counts for _, counts in clients])
    counts = [[_count(label_counts, label, labels) for label in labels] for _, label_counts in clients]
    return _stacked_bars([name for name, _ in clients], labels, counts, colours=LABEL_COLOURS, axis="training examples")


def candidates(fates: Sequence[tuple[str, Mapping[str, int]]]) -> Figure:
    """What became of the synthetic candidates: a bar a round, kept first, then each reason of rejection."""
    reasons = list(dict.fromkeys(reason for _, fate in fates for reason in fate if reason != "kept"))
    labels = ["kept", *reasons]
    counts = [[int(fate.get(label, 0)) for label in labels] for _, fate in fates]
    colours = [KEPT_COLOUR, *[colour for colour in LABEL_COLOURS if colour != KEPT_COLOUR]]
    return _stacked_bars([name for name, _ in fates], labels, counts, colours=colours, axis="synthetic candidates")


@styled()
def nearness(clients: Sequence[tuple[str, Sequence[float]]], *, bound: float | None, part: str = "response") -> Figure:
    """How near each synthetic record of a client (named, with a value in [0, 1] a record) comes to a private one: a row of marks a client.

    What was compared is the `part` of the records, `response` or `instruction`. A tall mark is the row's median, the dashed line the `bound`
    above which the filter of that part drops a record, if there is a filter.
    """
    filter_name = {"response": "copy filter", "instruction": "diversity filter"}[part]
    figure, axes = _canvas(height=max(1.9, 0.42 * len(clients) + 1.3))
    for row, (_, values) in enumerate(clients):
        axes.plot(values, [row] * len(values), "|", color=KEPT_COLOUR, markersize=13, markeredgewidth=1.4, alpha=0.65)
        axes.plot([statistics.median(values)], [row], "|", color=KEPT_COLOUR, markersize=22, markeredgewidth=3.0)
    if bound is not None:
        axes.axvline(bound, color=MUTED, linestyle=(0, (4, 2)), linewidth=1.4)
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_yticks(range(len(clients)), [label_text(name) for name, _ in clients])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(
        f"largest ROUGE-L with a private {part} of the client" + (f"    (dashed: the {filter_name})" if bound is not None else "")
    )
    return figure


@styled()
def against(
    curves: Sequence[Curve], *, axis: str, label: str, ticks: Sequence[tuple[float, str]], least_span: float, levels: Sequence[Level] = ()
) -> Figure:
    """Means over seeds against a setting, with a bar from the lowest to the highest seed; `levels` are dashed lines across.

    `ticks` are the places on the horizontal axis and what stands under them.
    """
    figure, axes = _canvas(height=3.7)
    for curve in curves:
        xs, means, lows, highs = zip(*curve.points, strict=True)
        spans = [np.subtract(means, lows), np.subtract(highs, means)]
        axes.errorbar(
            xs, means, yerr=spans, color=curve.colour, marker=curve.marker, markersize=6, linewidth=2.0, elinewidth=1.2, capsize=3
        )
    for level in levels:
        axes.axhline(level.value, color=level.colour, linestyle=(0, (4, 2)), linewidth=1.4)
    places = [place for place, _ in ticks]
    margin = 0.06 * (max(places) - min(places)) or 0.5
    axes.set_xlim(min(places) - margin, max(places) + margin)
    axes.set_xticks(places, [label_text(text) for _, text in ticks])
    axes.set_xlabel(label)
    axes.grid(axis="x", visible=False)
    name_values(axes, axis)
    values = [value for curve in curves for point in curve.points for value in point[1:]] + [level.value for level in levels]
    _value_limits(axes, values, least_span=least_span, from_zero=False)
    ends = [(curve.label, curve.colour, curve.points[-1][1]) for curve in curves] + [(one.label, one.colour, one.value) for one in levels]
    _label_ends(axes, [(label, colour, (max(places), y)) for label, colour, y in ends], "{:.2f}")
    return figure


@styled()
def roc(curves: Sequence[Roc], *, bound: Sequence[tuple[float, float]], label: str = "what the ledger allows") -> Figure:
    """True-positive against false-positive rates, both in logarithms (Carlini et al. 2022, arXiv 2112.03570).

    The dashed line is the most that the guarantee allows (no line without one), above which nothing may run but by chance; the thin one is guessing.
    """
    figure, axes = _canvas(height=4.6)
    least = min([rate for curve in curves for point in curve.points for rate in point if rate > 0.0] + [0.1]) / 1.5
    handles = []
    for curve in curves:
        fpr, tpr = zip(*curve.points, strict=True)
        shown = np.maximum(fpr, least), np.maximum(tpr, least)
        handles += axes.plot(*shown, color=curve.colour, linewidth=2.0, drawstyle="steps-post")
    if bound:
        handles += axes.plot(*zip(*bound, strict=True), color=INK, linewidth=1.6, linestyle=(0, (4, 2)))
    handles += axes.plot([least, 1.0], [least, 1.0], color=MUTED, linewidth=1.0)
    axes.set(xscale="log", yscale="log", xlim=(least, 1.0), ylim=(least, 1.15), xlabel="false-positive rate")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axis.set_minor_formatter(NullFormatter())
    name_values(axes, "True-positive rate")
    add_legend(figure, [*(curve.label for curve in curves), *([label] if bound else []), "guessing"], handles=handles, ncols=2)
    return figure


@styled()
def traffic(runs: Sequence[tuple[str, str, float, float]]) -> Figure:
    """Bytes sent over the whole run, up (solid) and down (pale), for (label, colour, uplink, downlink)."""
    figure, axes = _canvas(height=1.2 + 0.62 * len(runs))
    largest = max([max(up, down) for _, _, up, down in runs] + [1.0])
    for i, (_, colour, up, down) in enumerate(runs):
        for offset, amount, alpha, word in ((-0.19, up, 1.0, "up"), (0.19, down, 0.4, "down")):
            axes.barh(i + offset, amount, height=0.32, color=colour, alpha=alpha)
            axes.text(amount + largest * 0.012, i + offset, f"{human_bytes(amount)} {word}", va="center", fontsize=9.5)
    axes.set_yticks(range(len(runs)), [label_text(label) for label, _, _, _ in runs])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(runs) - 0.45, -0.55)
    axes.set_xlim(0, largest * 1.22)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes `figure` for print (200 dots an inch, on white)."""
    lacking = _choose_fonts(figure)
    if lacking:
        logger.warning("%s: no font of this machine draws %s; install one that does, such as Noto Sans", path, "".join(sorted(lacking)))
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    storage.write_bytes(path, buffer.getvalue())


def inline_svg(figure: Figure, *, name: str, title: str, titles: Sequence[str] = ()) -> str:
    """`figure` as an SVG element that follows the page's colours and font, its ids made unique by `name`.

    Its element with the gid `mark-INDEX-...` says `titles[INDEX]` under the pointer.
    """
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with styled({"svg.hashsalt": name}):  # the reader's browser has its own fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r'\bid="', f'id="{name}-', svg[svg.index("<svg") :])
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"""(['"]?)DejaVu Sans\1(, *[^;"]*)?""", "var(--sans)", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(
        r"<svg [^>]*viewBox=\"([^\"]*)\"[^>]*>",
        lambda found: f'<svg viewBox="{found[1]}" role="img" aria-label="{html.escape(title)}">',
        svg,
        count=1,
    )
    for colour in themed_colours():
        svg = re.sub(colour, f"var(--f{colour[1:]})", svg, flags=re.IGNORECASE)

    def named(found: re.Match[str]) -> str:
        return f'<g id="{found[1]}" class="mark"><title>{html.escape(titles[int(found[2])])}</title>'

    return re.sub(rf'<g id="({re.escape(name)}-mark-(\d+)-\d+)">', named, svg)


def _choose_fonts(figure: Figure) -> set[str]:
    """Gives the texts of a figure further fonts for what the usual one lacks, and returns the characters that no font of this machine has."""
    ticks = [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    texts = [*ticks, *(text for text in figure.findobj(Text) if isinstance(text, Text))]
    families = list(STYLE["font.sans-serif"])
    usual = _characters(findfont(families[0]))
    lacking = {char for text in texts for char in text.get_text() if char.isprintable()} - usual
    if not lacking:
        return lacking
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
        if lacking & _characters(font.fname) and not font.name.startswith("Last Resort"):  # that font draws a box for each
            families.append(font.name)
            lacking -= _characters(font.fname)
    for text in texts:
        if not usual.issuperset(text.get_text()):
            text.set_fontfamily(families)
    return lacking


@cache
def _characters(path: str) -> frozenset[str]:
    return frozenset(map(chr, get_font(path).get_charmap()))


def themed_colours() -> dict[str, str]:
    """Every colour that changes on a dark page, with its replacement there."""
    return {**dict(COLOURS.values()), **dict(SPARE_COLOURS), **DARK}


def _canvas(*, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def beside(axes: Axes, text: str, place: tuple[float, float], *, offset: tuple[float, float] = (9, 0), **style: Any) -> None:
    """Writes a text so many points beside a place."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", **{"va": "center", **style})


def add_legend(figure: Figure, labels: Sequence[str], *, handles: Sequence[Any], ncols: int, **options: Any) -> None:
    """Writes above the figure what each handle is called."""
    numbers = [str(i) for i in range(len(labels))]
    legend = figure.legend(
        handles, numbers, loc="outside upper left", ncols=ncols, fontsize=9.5, handlelength=1, columnspacing=1.4, **options
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label_text(label))  # only now: matplotlib leaves out of a legend what begins with an underscore


def name_values(axes: Axes, text: str, *, pad: float | None = 10) -> None:
    """Writes above the axes what their values are."""
    axes.set_title(text, loc="left", fontsize=10.5, color=MUTED, pad=pad)


def _draw_line(axes: Axes, line: Line) -> None:
    if line.band:
        xs, lows, highs = zip(*line.band, strict=True)
        axes.fill_between(xs, lows, highs, color=line.colour, alpha=0.15, linewidth=0)
    for values, style, width in ((line.control, (0, (4, 2)), 1.5), (line.kept, (0, (1, 1.4)), 1.8), (line.values, "-", 2.2)):
        if values:
            marker = line.marker if style == "-" else ""
            marker = line.marker if len(values) == 1 else marker
            face = line.colour if style == "-" else SURFACE
            xs, ys = zip(*values, strict=True)
            axes.plot(xs, ys, linestyle=style, color=line.colour, linewidth=width, marker=marker, markersize=5.5, markerfacecolor=face)


def _round_axis(axes: Axes, lines: Sequence[Line]) -> None:
    xs = [x for line in lines for x, _ in line.values] or [0]
    first, last = min(xs), max(xs)
    margin = 0.04 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.set_xticks(range(first, last + 1, max(1, -(-(last - first) // 10))))
    axes.set_xlabel("rounds completed")
    axes.grid(axis="x", visible=False)


def _value_limits(axes: Axes, values: Sequence[float], *, least_span: float, from_zero: bool) -> None:
    low, high = min(values), max(values)
    if from_zero:
        axes.set_ylim(-0.03 * max(high, least_span), 1.08 * max(high, least_span))
        return
    spare = max(0.1 * (high - low), (least_span - (high - low)) / 2)
    axes.set_ylim(max(low - spare, -0.1 * spare) if low >= 0 else low - spare, high + spare)  # nothing drawn here falls below zero


def _label_ends(axes: Axes, ends: Sequence[tuple[str, str, tuple[float, float]]], label_format: str) -> None:
    """Writes each (label, colour) beside the end of its line."""
    heights = _spread([y for _, _, (_, y) in ends], *axes.get_ylim(), at_least=0.075)
    for (label, colour, end), height in zip(ends, heights, strict=True):
        axes.annotate(
            f"{label_text(label)} {label_format.format(end[1])}",
            end,
            xytext=(axes.get_xlim()[1], height),
            textcoords="data",
            color=colour,
            va="center",
            fontweight="bold",
            fontsize=10,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


def _spread(values: Sequence[float], low: float, high: float, *, at_least: float) -> list[float]:
    """`values` moved apart so that neighbours differ by at least that share of the axis, and stay on it where they fit."""
    gap = at_least * (high - low)
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [0.0] * len(values)
    below = low - gap
    for i in order:
        placed[i] = below = max(values[i], below + gap)
    above = max(high, low + gap * len(values))
    for i in reversed(order):
        placed[i] = above = min(placed[i], above)
        above -= gap
    return placed


def _labels_shown(label_counts: Sequence[Mapping[str, int]]) -> list[str]:
    totals: Counter[str] = Counter()
    for counts in label_counts:
        totals.update(counts)
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    room = len(LABEL_COLOURS)
    return ranked if len(ranked) <= room else [*ranked[: room - 1], OTHER]


def _count(label_counts: Mapping[str, int], label: str, shown: Sequence[str]) -> int:
    if label == OTHER and OTHER not in label_counts:
        return sum(count for name, count in label_counts.items() if name not in shown)
    return int(label_counts.get(label, 0))


@styled()
def _stacked_bars(
    names: Sequence[str], labels: Sequence[str], counts: Sequence[Sequence[int]], *, colours: Sequence[str], axis: str
) -> Figure:
    """Horizontal stacked bars with the counts written where they fit and the total at the end."""
    legend_rows = -(-len(labels) // 3)
    figure, axes = _canvas(height=1.0 + 0.24 * legend_rows + min(0.46 * len(names), 2.8 + 0.03 * len(names), 7.0))
    widest = max([sum(row) for row in counts] + [1])
    lefts, drawn = [0] * len(names), []
    for j in range(len(labels)):
        column = [row[j] for row in counts]
        bars = axes.barh(range(len(names)), column, left=lefts, color=colours[j % len(colours)], height=0.74, edgecolor=SURFACE)
        crowded = len(names) > 18
        texts = [str(count) if count >= 0.035 * widest and not crowded else "" for count in column]
        axes.bar_label(bars, labels=texts, label_type="center", color=ON_LABEL, fontsize=9)
        lefts = [left + count for left, count in zip(lefts, column, strict=True)]
        drawn.append(bars)
    _finish_bars(axes, names, lefts, widest, axis)
    if labels:
        add_legend(figure, labels, handles=drawn, ncols=3, handleheight=1)
    return figure


def _finish_bars(axes: Axes, names: Sequence[str], totals: Sequence[int], widest: int, axis: str) -> None:
    step = -(-len(names) // 16)
    axes.set_yticks(range(0, len(names), step), [label_text(name) for name in names][::step])
    axes.tick_params(axis="y", labelcolor=INK)
    for i in range(len(names) if step == 1 else 0):
        axes.text(totals[i] + 0.012 * widest, i, str(totals[i]), va="center", fontsize=9.5, fontweight="bold")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, widest * 1.06)
    axes.set_xlabel(axis)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(axis="y", visible=False)
