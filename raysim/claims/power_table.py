"""How small a difference between two entries of a comparison its seeds would still tell, by each measure of memory and of utility.

A row a figure: the difference (first less second; an NLL counts against an entry), its 95% interval, the smallest difference that so many
seeds of this size call with probability 0.8 (see `power`), and that in units of the difference that was seen: below 1, an effect as large
as this one is found. How many times less that is than for the first attack's ROUGE-L lets measures in different units be compared.
Left out: contrasts of more than two entries; a claims page says of each what it could see.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from raysim.claims.decide import FIGURE_WORDS, FIGURES, Runs, above, difference, smallest_difference
from raysim.console.words import MISSING

REFERENCE = "leakage"
"""The figure that all others are held against."""


@dataclass(frozen=True)
class PowerRow:
    """A figure, what it saw of the difference between two entries, and what it could have seen."""

    figure: str
    observed: float
    low: float | None
    high: float | None
    verdict: str
    detectable: float
    """The smallest difference that is called with probability 0.8."""
    relative: float | None
    """The same in units of the observed difference; None where that is 0."""
    times_smaller: float | None
    """Of REFERENCE the relative smallest difference, over that of this figure; None where either is missing."""


def power_rows(runs: Runs, first: str, second: str, *, num_seeds: int = 0) -> list[PowerRow]:
    """A row for each figure in which both entries were measured over two seeds or more; `num_seeds=0` is as many as there are.

    Errors: ValueError if an entry has no runs.
    """
    for entry in (first, second):
        if not runs.get(entry):
            raise ValueError(f"there is no finished run of {entry!r}, but of {', '.join(runs)}")
    contrast = above(first, second)
    found = []
    for figure in FIGURES:
        seen = difference(contrast, figure, runs)
        least = smallest_difference(contrast, figure, runs, num_seeds=num_seeds)
        if seen.mean is not None and least is not None:
            found.append((figure, seen, seen.mean, least))
    relative = {figure: least / abs(mean) for figure, _, mean, least in found if mean}
    times = {figure: relative[REFERENCE] / own for figure, own in relative.items() if REFERENCE in relative and own}
    return [
        PowerRow(figure, mean, seen.low, seen.high, seen.verdict, least, relative.get(figure), times.get(figure))
        for figure, seen, mean, least in found
    ]


def power_markdown(rows: Sequence[PowerRow], *, first: str, second: str) -> str:
    """The rows as a table."""
    lines = [
        f"| figure | {first} less {second} (95% interval) | smallest difference seen | the same, of the observed | times smaller than ROUGE-L's |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ends = f" ({row.low:+.4f} to {row.high:+.4f})" if row.low is not None and row.high is not None else ""
        shares = [f"{value:.2f}" if value is not None else MISSING for value in (row.relative, row.times_smaller)]
        lines.append(f"| {FIGURE_WORDS[row.figure]} | {row.observed:+.4f}{ends} | {row.detectable:.4f} | {' | '.join(shares)} |")
    return "\n".join(lines)
