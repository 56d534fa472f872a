"""How small an effect an experiment over seeds would still have called, by the rule that decides claims (`decide.interval`).

The rule moves with its numbers: an effect added to every difference moves the interval by as much. So the smallest effect that is called
with probability 0.8 is the 80% quantile, over experiments in which there is none, of how far below 0 the interval's lower end lies.
Such experiments are drawn from the real one: seeds with replacement, within each its records with replacement, centred at their means.
What a seed adds beyond its records is drawn from a normal distribution of the variance that the seeds show beyond what their records
explain: of three seeds there is no shape to resample, and drawing the three themselves would give a third less spread than they tell of.
The interval of a drawn experiment is the wider of two, as the rule has it. The bootstrap's is taken from its standard error in closed
form, with normal quantiles, in place of thousands of replicates for each of thousands of experiments: where the two differ (a handful of
seeds that lie far apart) Student's interval is the wider one, and decides.

From three seeds the spread of seeds, and so this figure, is known to within a factor of two or so. Left out: an interval for it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from raysim.rng import numpy_rng

Floats = NDArray[np.float64]
Part = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]
"""Values and weights of the records of one side (held-out or training), summed over the terms of a contrast."""

POWER = 0.8
"""The probability with which the smallest effect is called."""
NUM_EXPERIMENTS = 2000
"""Experiments drawn for a figure."""


def smallest_effect(seeds: Sequence[Sequence[Part]], *, level: float, key: str, num_seeds: int = 0, power: float = POWER) -> float | None:
    """The smallest effect that the rule calls at `level` with probability `power` in `num_seeds` seeds (0: as many as given) of these sizes.

    `seeds` are the differences of each seed, record by record. None where there are fewer than two seeds.
    Guarantees: the same for the same `key` and numbers.
    """
    num_seeds = num_seeds or len(seeds)
    if min(len(seeds), num_seeds) < 2:
        return None
    rng = numpy_rng(0, "power", key)
    which = rng.integers(len(seeds), size=(NUM_EXPERIMENTS, num_seeds))
    by_seed, within = np.zeros(which.shape), np.zeros(which.shape)
    for i, parts in enumerate(seeds):
        drawn = which == i
        for values, weights in parts:
            picked = rng.integers(len(values), size=(int(drawn.sum()), len(values)))
            means, variances = mean_and_variance((values - np.average(values, weights=weights))[picked], weights[picked])
            by_seed[drawn] += means
            within[drawn] += variances
    by_seed += math.sqrt(between_seeds(seeds)) * rng.standard_normal(which.shape)
    return float(np.quantile(reach(by_seed, within, level=level) - by_seed.mean(axis=1), power))


def between_seeds(seeds: Sequence[Sequence[Part]]) -> float:
    """The variance of the seeds' differences less what their records explain of it; 0 where these explain all."""
    found = [[mean_and_variance(values, weights) for values, weights in parts] for parts in seeds]
    means, within = (np.array([sum(float(pair[i]) for pair in parts) for parts in found]) for i in (0, 1))
    return max(0.0, float(means.var(ddof=1) - within.mean()))


def mean_and_variance(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The weighted mean over the last axis, and the variance that a bootstrap over its records gives it (to first order, for unequal weights)."""
    total = weights.sum(axis=-1)
    mean = np.asarray((values * weights).sum(axis=-1) / total)
    return mean, np.asarray((weights**2 * (values - mean[..., None]) ** 2).sum(axis=-1) / total**2)


def reach(by_seed: Floats, within: Floats, *, level: float) -> Floats:
    """How far the interval reaches to each side of the mean over seeds, the last axis: the wider of Student's and the bootstrap's.

    `within` is the bootstrap variance of each seed's difference over its records. The bootstrap draws seeds, whose variance is that of the
    seeds about their mean, and records within them: both add up.
    """
    num_seeds = by_seed.shape[-1]
    student = scipy.stats.t.ppf(1 - level / 2, num_seeds - 1) * by_seed.std(axis=-1, ddof=1)
    bootstrap = scipy.stats.norm.ppf(1 - level / 2) * np.sqrt(by_seed.var(axis=-1) + within.mean(axis=-1))
    return np.asarray(np.maximum(student, bootstrap) / math.sqrt(num_seeds))
