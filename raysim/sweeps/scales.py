"""The axes of a sweep's figures: values of keys and figures as positions between 0 and 1.

So logarithmic keys, names of methods and runs without an epsilon have one way of being drawn.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from raysim.console.words import is_number
from raysim.reports.figures import label_text

MOST_STEPS = 12  # more different values of a key than this are a range, not a list
MOST_TICKS = 7
ROUND_STEPS = [1, 2, 2.5, 5, 10]
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
