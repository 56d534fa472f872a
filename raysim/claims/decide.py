"""Published claims held against finished runs: paired differences over seeds and records in, a verdict out.

A claim about utility or leakage is one or more contrasts: sums of runs' figures, with signs, that are positive where the claim is right.
Each contrast is computed record by record, so that what is compared is the same record under two methods, then averaged within a seed
(NLL by tokens) and over seeds. Its interval is at each end the wider of two: Student's for the seeds' differences (n - 1 degrees of
freedom; it takes them to be normal), and a paired bootstrap over seeds and records (seeds are drawn with replacement, and within each
drawn seed its records). The bootstrap alone would not do: of three seeds that differ by chance only, a quarter agree in sign, and drawing
from three that agree never gives another sign. An exact test over three seeds alone cannot reach 5% (the sign test ends at 1/4).
A verdict is computed, never typed:

- *holds*: the whole 95% interval of every contrast is above 0;
- *does not hold*: of some contrast the whole interval is below 0 (at 95% for all contrasts of the claim together);
- *not decided*: anything else, and whatever lacks a run or a second seed.

That a claim is not decided does not say that there is no effect: beside each interval stand the smallest effect that such an experiment
calls with probability 0.8 (see `power`), and what an effect that was not seen is smaller than.
Left out: a correction for the number of claims on a page; the numbers are there to be corrected.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from raysim.claims.power import Part, smallest_effect
from raysim.results.contents import Answer, Judge, Judged, Ledger, RoundRecord, Summary
from raysim.results.folders import ComparisonFolder, RunFolder
from raysim.rng import numpy_rng

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
NUM_REPLICATES = 4000
"""Bootstrap replicates of a contrast."""
LEVEL = 0.05
"""One less the confidence of an interval."""
MIN_SEEDS = 2

# A figure is a sum of measures with signs; those of utility grow with it.
FIGURES: dict[str, tuple[tuple[int, str], ...]] = {
    "win_tie": ((1, "win_tie"),),
    "nll": ((-1, "nll"),),
    "rouge_l": ((1, "rouge_l"),),
    "label_accuracy": ((1, "label_accuracy"),),
    "choice_accuracy": ((1, "choice_accuracy"),),
    "leakage": ((1, "leakage"),),
    "memory": ((1, "leakage"), (-1, "control")),
    "bits": ((1, "member_gain"), (-1, "heldout_gain")),
}
FIGURE_WORDS = {
    "win_tie": "win+tie against the true answer (judge)",
    "nll": "held-out NLL (lower is better; differences are in its favour)",
    "rouge_l": "held-out ROUGE-L",
    "label_accuracy": "accuracy by label",
    "choice_accuracy": "accuracy on multiple choice",
    "leakage": "extraction ROUGE-L on training prompts",
    "memory": "extraction ROUGE-L, less that on held-out prompts",
    "bits": "memory, bits a token: gain in likelihood over the base model on training records, less that on held-out ones",
    "bytes": "bytes",
    "epsilon": "epsilon",
}
UTILITY = ("win_tie", "nll", "rouge_l", "label_accuracy", "choice_accuracy")
LEAKAGE = ("bits", "leakage", "memory")

Values = dict[int, tuple[float, float]]
"""Of a measure: by record, its value and its weight in the mean."""


@dataclass(frozen=True)
class RunData:
    """What a claim is decided by, of a finished run."""

    summary: Summary
    rounds: Sequence[RoundRecord]
    ledger: Ledger
    measures: Mapping[str, Mapping[int, Values]]
    """By measure and round."""
    factors: tuple[tuple[int, int], ...] = ()
    """Of each LoRA factor in the released adapter its rank, and how many inputs (A) or outputs (B) its layer has."""
    judge: Judge | None = None
    """None where nothing was judged."""

    def values(self, measure: str, when: str) -> Values:
        """A measure after the `first` or the `last` round in which it was taken; empty if it was not."""
        taken = self.measures.get(measure, {})
        return taken[(max if when == "last" else min)(taken)] if taken else {}


Runs = Mapping[str, Mapping[int, RunData]]
"""By entry of the comparison and seed."""


@dataclass(frozen=True)
class Term:
    """A run's figure with its factor; `when` is `last`, or `first` for the first measured round."""

    factor: float
    entry: str
    when: str = "last"


@dataclass(frozen=True)
class Contrast:
    """A sum that is positive where the claim is right."""

    text: str
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Difference:
    """What a contrast came to."""

    text: str
    mean: float | None
    """The mean over seeds; None where it could not be computed."""
    low: float | None
    high: float | None
    by_seed: dict[int, float]
    verdict: str
    why: str = ""
    """What is missing, where nothing could be computed."""
    detectable: float | None = None
    """The smallest effect that such an experiment calls with probability 0.8."""
    bound: float | None = None
    """Where nothing is decided: what an effect in either direction is smaller than, by the interval."""


@dataclass(frozen=True)
class Reading:
    """A claim seen through one figure."""

    figure: str
    verdict: str
    text: str = ""
    """Further numbers in words."""
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A published claim: where it stands, what its paper gives, and how it is held against our runs.

    It is decided by the first of `figures` that was measured; the others are shown beside it. `compute` takes the place of contrasts
    where nothing is random.
    """

    key: str
    text: str
    where: str
    published: str
    figures: tuple[str, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    compute: Callable[[Runs], Reading] | None = None


@dataclass(frozen=True)
class Row:
    """A claim with its verdict."""

    claim: Claim
    readings: tuple[Reading, ...]
    ours: tuple[tuple[str, float, float | None], ...]
    """Of each entry that the claim speaks of, by the deciding figure: mean over seeds, and standard deviation."""

    @property
    def verdict(self) -> str:
        """That of the deciding figure."""
        return self.readings[0].verdict


def decide(claim: Claim, runs: Runs) -> Row:
    """The claim held against the runs."""
    if claim.compute is not None:
        return Row(claim, (claim.compute(runs),), ())
    figures = [figure for figure in claim.figures if _deciding(figure, claim, runs)] or [claim.figures[-1]]
    readings = tuple(read(claim, figure, runs) for figure in figures)
    return Row(claim, readings, entry_means(claim, figures[0], runs))


def _deciding(figure: str, claim: Claim, runs: Runs) -> bool:
    """Whether any run that the claim speaks of has the figure; a win rate of the likelihood judge is shown by its own page, and decides nothing."""
    entries = {term.entry for contrast in claim.contrasts for term in contrast.terms}
    found = [run for entry in entries for run in runs.get(entry, {}).values()]
    if figure == "win_tie":
        return any(run.judge is not None and run.judge.made_from["kind"] == "endpoint" for run in found)
    return any(all(run.values(measure, "last") for _, measure in FIGURES[figure]) for run in found)


def read(claim: Claim, figure: str, runs: Runs) -> Reading:
    """The claim seen through one figure."""
    share = LEVEL / len(claim.contrasts)
    results = tuple(difference(contrast, figure, runs, against_level=share) for contrast in claim.contrasts)
    verdicts = [result.verdict for result in results]
    verdict = HOLDS if set(verdicts) == {HOLDS} else FAILS if FAILS in verdicts else OPEN
    return Reading(figure, verdict, differences=results)


def difference(contrast: Contrast, figure: str, runs: Runs, *, against_level: float = LEVEL) -> Difference:
    """A contrast's mean, 95% interval and verdict; `against_level` is what it takes to call it wrong."""
    absent = sorted({term.entry for term in contrast.terms if not runs.get(term.entry)})
    if absent:
        return Difference(contrast.text, None, None, None, {}, OPEN, f"no run of {', '.join(absent)}")
    parts = _parts_by_seed(contrast, figure, runs)
    seeds = list(parts)
    if not seeds or not all(parts.values()):
        return Difference(contrast.text, None, None, None, {}, OPEN, "not measured on records that the runs share")
    by_seed = {seed: sum(_mean(values, weights) for values, weights in parts[seed]) for seed in seeds}
    mean = sum(by_seed.values()) / len(seeds)
    if len(seeds) < MIN_SEEDS:
        return Difference(contrast.text, mean, None, None, by_seed, OPEN, f"{mean:+.4f}, but one seed decides nothing")
    replicates = bootstrap([parts[seed] for seed in seeds], key=f"{contrast.text} {figure}")
    low, high = interval(list(by_seed.values()), replicates, level=LEVEL)
    ceiling = interval(list(by_seed.values()), replicates, level=against_level)[1]
    verdict = HOLDS if low > 0 else FAILS if ceiling < 0 else OPEN
    seen = smallest_difference(contrast, figure, runs)
    bound = max(high, -low) if verdict == OPEN else None
    return Difference(contrast.text, mean, low, high, by_seed, verdict, detectable=seen, bound=bound)


def smallest_difference(contrast: Contrast, figure: str, runs: Runs, *, num_seeds: int = 0) -> float | None:
    """The smallest mean of a contrast that `num_seeds` seeds like these (0: as many) call with probability 0.8; None if it was not measured."""
    parts = list(_parts_by_seed(contrast, figure, runs).values())
    return smallest_effect(parts, level=LEVEL, key=f"{contrast.text} {figure}", num_seeds=num_seeds) if all(parts) else None


def interval(by_seed: Sequence[float], replicates: "np.ndarray[Any, Any]", *, level: float) -> tuple[float, float]:
    """Student's interval for the mean of the seeds' differences, or that of the bootstrap's `replicates`: at each end the wider one."""
    mean, spread = mean_and_spread(by_seed)
    reach = float(scipy.stats.t.ppf(1 - level / 2, len(by_seed) - 1)) * (spread or 0.0) / math.sqrt(len(by_seed))
    low, high = (float(q) for q in np.quantile(replicates, [level / 2, 1 - level / 2]))
    return min(low, mean - reach), max(high, mean + reach)


def _parts_by_seed(contrast: Contrast, figure: str, runs: Runs) -> dict[int, list[Part]]:
    """The parts of each seed that all entries have, ascending."""
    seeds = sorted(set.intersection(*[set(runs[term.entry]) for term in contrast.terms]))
    return {seed: _parts(contrast, figure, runs, seed) for seed in seeds}


def _parts(contrast: Contrast, figure: str, runs: Runs, seed: int) -> list[Part]:
    """For each measure of the figure, the contrast record by record; empty where a run has no record of it in common with the others."""
    parts = []
    for sign, measure in FIGURES[figure]:
        tables = [(term.factor * sign, runs[term.entry][seed].values(measure, term.when)) for term in contrast.terms]
        shared = sorted(set.intersection(*[set(table) for _, table in tables]))
        if not shared:
            return []
        values = [sum(factor * table[record][0] for factor, table in tables) for record in shared]
        parts.append((np.array(values), np.array([tables[0][1][record][1] for record in shared])))
    return parts


def _mean(values: "np.ndarray[Any, Any]", weights: "np.ndarray[Any, Any]") -> float:
    return float((values * weights).sum() / weights.sum())


def bootstrap(seeds: Sequence[Sequence[Part]], *, key: str) -> "np.ndarray[Any, Any]":
    """NUM_REPLICATES means over seeds drawn with replacement, each of records drawn with replacement within it.

    Guarantees: the same for the same `key` and numbers.
    """
    rng = numpy_rng(0, "claims", key)
    total = np.zeros(NUM_REPLICATES)
    rows = np.arange(NUM_REPLICATES)
    for _ in seeds:
        drawn = np.zeros((len(seeds), NUM_REPLICATES))
        for i, parts in enumerate(seeds):
            for values, weights in parts:
                picked = rng.integers(len(values), size=(NUM_REPLICATES, len(values)))
                drawn[i] += (values * weights)[picked].sum(axis=1) / weights[picked].sum(axis=1)
        total += drawn[rng.integers(len(seeds), size=NUM_REPLICATES), rows]
    return total / len(seeds)


def entry_means(claim: Claim, figure: str, runs: Runs) -> tuple[tuple[str, float, float | None], ...]:
    """Of each entry and moment that the claim speaks of: the figure's mean over seeds, and its standard deviation."""
    found: dict[str, tuple[str, float, float | None]] = {}
    for term in [term for contrast in claim.contrasts for term in contrast.terms]:
        values = over_seeds(runs, term.entry, figure, when=term.when)
        label = term.entry if term.when == "last" else f"{term.entry}, {term.when} measured round"
        if values:
            found[label] = (label, *mean_and_spread(values))
    return tuple(found.values())


def over_seeds(runs: Runs, entry: str, figure: str, *, when: str = "last") -> list[float]:
    """The figure of each seed's run of an entry that has it."""
    return [value for run in runs.get(entry, {}).values() if (value := figure_of(run, figure, when=when)) is not None]


def figure_of(run: RunData, figure: str, *, when: str = "last") -> float | None:
    """A run's figure as it is printed (an NLL is a loss, not a gain); None if it was not measured."""
    total = 0.0
    for sign, measure in FIGURES[figure]:
        table = run.values(measure, when)
        if not table:
            return None
        values, weights = (np.array(column) for column in zip(*table.values(), strict=True))
        total += (1 if figure == "nll" else sign) * _mean(values, weights)
    return total


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of two or more."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else None
    return mean, spread


# --- from files


def load_runs(folder: Path) -> dict[str, dict[int, RunData]]:
    """The finished runs of a comparison's folder.

    Errors: ValueError if it is no comparison over seeds.
    """
    runs: dict[str, dict[int, RunData]] = {}
    for member in ComparisonFolder(folder).comparison.members:
        if (found := RunFolder(folder / member.folder)).is_over:
            runs.setdefault(member.entry, {})[member.seed] = load_run(found)
    return runs


def load_run(run: RunFolder) -> RunData:
    """What the files of a finished run say."""
    return RunData(run.summary, run.records, run.ledger, measures_of(run.answers, run.judged), run.factors, run.judge)


def measures_of(answers: Sequence[Answer], judged: Sequence[Judged]) -> dict[str, dict[int, Values]]:
    """The measures in a run's answers and judged pairs, of the release; where nothing is released, the mean over the clients' own.

    The control of the attack is that with its prefix, where it has one, else the held-out answers. The second attack, with a longer
    prefix, decides nothing here. Gains in likelihood over the base model are in bits a token. A question's number stands where a
    record's id does.
    """
    released = [row for row in answers if row.owner is None] or answers
    controlled = any(row.side == "control" for row in released)
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for row in released:
        unit = row.question if row.record_id is None else row.record_id
        assert unit is not None, "an answer is to a record or a question"
        for measure, value, weight in _row_values(row, controlled=controlled):
            found.setdefault((measure, row.round_index, unit), []).append((value, weight))
    last = max((row.round_index for row in released), default=0)
    for pair in judged:
        if pair.outcome is not None:
            found.setdefault(("win_tie", last, pair.record_id), []).append((float(pair.outcome != "lose"), 1.0))
    measures: dict[str, dict[int, Values]] = {}
    for (measure, round_index, unit), values in found.items():
        mean, weight = sum(value for value, _ in values) / len(values), values[0][1]
        measures.setdefault(measure, {}).setdefault(round_index, {})[unit] = (mean, weight)
    return measures


def _row_values(row: Answer, *, controlled: bool) -> list[tuple[str, float, float]]:
    """The measures that a row has, each with its weight in a mean."""
    nll = row.nll / row.num_tokens if row.nll is not None and row.num_tokens else None
    gain = (row.base_nll / row.num_tokens - nll) / math.log(2) if nll is not None and row.base_nll is not None and row.num_tokens else None
    found: dict[str, list[tuple[str, float | None, float | None]]] = {
        "train": [("leakage", row.rouge_l, 1.0)],
        "control": [("control", row.rouge_l, 1.0)],
        "member": [("member_gain", gain, row.num_tokens)],
        "choice": [("choice_accuracy", row.right, 1.0)],
        "heldout": [
            ("nll", nll, row.num_tokens),
            ("heldout_gain", gain, row.num_tokens),
            ("rouge_l", row.rouge_l, 1.0),
            ("control", None if controlled else row.rouge_l, 1.0),
            ("label_accuracy", row.label_right, 1.0),
        ],
    }
    return [(measure, float(value), float(weight or 0)) for measure, value, weight in found.get(row.side, []) if value is not None]


# --- how contrasts are put


def above(better: str, worse: str) -> Contrast:
    """That one entry's figure is above another's."""
    return Contrast(f"{better} above {worse}", (Term(1, better), Term(-1, worse)))


def rising(*entries: str) -> tuple[Contrast, ...]:
    """That the figure rises from each entry to the next."""
    return tuple(Contrast(f"{b} above {a}", (Term(-1, a), Term(1, b))) for a, b in itertools.pairwise(entries))
