"""The privacy cost of choosing the best of several private trials: Papernot and Steinke (2022), arXiv 2110.03620, by dp-accounting.

Showing only the best of k private trials tells more than one of them would: which one is best depends on the data. If the number of
trials is itself random, from one of a few distributions, and the trials are independent runs of one mechanism, the best one
is private, at about two to three times the epsilon of a trial (more for many Poisson trials). What is sound here:

- Drawing a trial's settings at random, from a distribution that does not depend on the data, is part of that one mechanism.
  Since a trial shows its settings, its Renyi divergence at each order is at most the greatest over all settings *that could be
  drawn*; `worst_releases` gives releases that cost at least as much at every order. The greatest over the trials that happened
  to be drawn is no bound: the number drawn, and so that greatest, is not fixed beforehand.
- Trials must draw their noise independently. Cohorts and batches that all trials share (those of one seed) are no secret
  of any one of them, so that for shared samples the releases must be taken as if every unit were in each of them.
- The score by which the best is chosen must be a function of the trial's release and of data that are not protected, such as
  held-out records. Choosing by what is measured on the protected records themselves (leakage) has no bound.
- The number of trials may be 0. Then nothing is shown; drawing again would be another mechanism.
- The guarantee is for showing the best trial alone: neither the other trials nor how many there were.

Left out: fixed numbers of trials and grids, for which there is no such theorem (showing all k trials costs what they compose to, which bounds
showing the best of them too), and searches that learn from earlier trials.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from dp_accounting import ComposedDpEvent, DpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from scipy.optimize import brentq

from raysim.privacy.accounting import Release, quiet_about_skipped_orders, rdp_accountant
from raysim.rng import numpy_rng

DISTRIBUTIONS = ("poisson", "geometric", "negative_binomial")
LEAST_GAMMA = 1e-12
"""Where the search for a distribution's parameter ends: a mean of some 1e11 trials."""

ZERO_IS_RARE = 30.0
"""Where an untruncated draw is 0 with a probability of e to the minus this, the truncated distribution is the same for any purpose."""


def selection_epsilon(releases: Sequence[Release], *, delta: float, distribution: str, mean: float, shape: float | None = None) -> float:
    """Epsilon at `delta` of the best of a random number of independent trials that each make `releases`, by RDP.

    The number of trials is `poisson` (0 included), `geometric`, or truncated `negative_binomial` of this `shape` (1 is geometric, 0
    logarithmic), with this mean. Where the trials differ, `releases` are those of `worst_releases`.

    At equal means a Poisson number has the lowest bound for a few trials, and by far the highest for many.

    Guarantees: more trials, more releases and less noise never cost less.
    Edge cases: nothing released costs 0; a release without noise costs `math.inf`.
    Errors: ValueError for a distribution, mean or shape that the theorem does not cover.
    """
    shape = _shape(distribution, mean=mean, shape=shape)
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta={delta!r} must be greater than 0 and less than 1")
    made = [release for release in releases if release.count]
    if not made:
        return 0.0
    if any(release.noise_multiplier == 0.0 for release in made):
        return math.inf
    accountant, replaces = rdp_accountant(made)
    trial = ComposedDpEvent([SelfComposedDpEvent(release.event(replace_one=replaces), release.count) for release in made])
    event: DpEvent = RepeatAndSelectDpEvent(trial, mean, shape)
    with quiet_about_skipped_orders():
        return float(accountant.compose(event).get_epsilon(delta))


def worst_releases(trials: Sequence[Sequence[Release]], *, shared_samples: bool) -> tuple[Release, ...]:
    """Releases that cost at least as much, at every Renyi order, as those of any one of `trials`.

    `trials` holds the releases of all settings that a trial could be given. With `shared_samples`, as where all trials draw
    cohorts and batches from one seed, sampling amplifies nothing. A trial's position-wise releases are covered by the
    least noise, the greatest sampling and the greatest number among the trials, in each of which an epsilon is monotone.

    Errors: ValueError if there is no trial, if one releases nothing or without noise, or if some protect against adding or
    removing a unit and others against replacing one.
    """
    made = [[release for release in trial if release.count] for trial in trials]
    if not made or not all(made) or any(release.noise_multiplier == 0.0 for trial in made for release in trial):
        raise ValueError("a selection has a bound only where every trial that could be drawn releases something, with noise")
    if len({release.sampler == "fixed" for trial in made for release in trial}) > 1:
        raise ValueError("some trials protect against replacing a unit and others against adding or removing one; fix privacy.sampler")
    plain = [[_unsampled(release) for release in trial] for trial in made] if shared_samples else made
    width = max(len(trial) for trial in plain)
    return tuple(_worst([trial[i] for trial in plain if i < len(trial)]) for i in range(width))


def draw_num_trials(*, distribution: str, mean: float, shape: float | None = None, seed: int) -> int:
    """The number of trials of a private selection, from the distribution that `selection_epsilon` accounts for.

    It is part of what must stay secret, as the noise is. `poisson` may give 0: then no trial is run and nothing is shown.

    Errors: ValueError for a distribution, mean or shape that the theorem does not cover.
    """
    shape = _shape(distribution, mean=mean, shape=shape)
    rng = numpy_rng(seed, "private selection")
    if shape == math.inf:
        return int(rng.poisson(mean))
    gamma = success_prob(mean, shape=shape)
    if gamma == 1.0:
        return 1
    if -shape * math.log(gamma) > ZERO_IS_RARE:
        return max(1, int(rng.negative_binomial(shape, gamma)))
    # Probabilities of 1, 2, ... trials, each a multiple of the one before, added up until they pass a uniform number.
    target, num = float(rng.random()), 1
    prob = (1 - gamma) / -math.log(gamma) if shape == 0.0 else shape * (1 - gamma) / math.expm1(-shape * math.log(gamma))
    passed = prob
    while passed < target and prob > 0.0:
        prob *= (1 - gamma) * (num + shape) / (num + 1)
        num += 1
        passed += prob
    return num


def success_prob(mean: float, *, shape: float) -> float:
    """The parameter gamma of the truncated negative binomial distribution with this mean (Papernot and Steinke 2022, definition 1)."""
    if mean == 1.0:
        return 1.0
    if shape == 1.0:
        return 1.0 / mean
    least, most = math.log(LEAST_GAMMA), -1e-9
    if not _mean_of(least, shape) > mean:
        raise ValueError(f"mean={mean!r} is more trials than a distribution of shape={shape!r} can be drawn with; lower it")
    if not _mean_of(most, shape) < mean:
        return 1.0
    return math.exp(brentq(lambda log_gamma: _mean_of(log_gamma, shape) - mean, least, most, xtol=1e-13))


def selection_statement(
    *,
    epsilon: float | None,
    delta: float | None,
    distribution: str = "",
    mean: float = 0.0,
    num_private: int,
    reads_private: bool,
) -> str:
    """Plain sentences for a report: what choosing the best trial costs, or that it has no bound and why.

    `epsilon` is `selection_epsilon`'s, and `distribution` and `mean` those of `sweep.private_selection`, or None and empty without it.
    `num_private` is the number of trials with a guarantee of their own; `reads_private` says that trials are compared by something
    that is measured on protected records.
    """
    if not num_private:
        return "No trial has a privacy guarantee of its own, so choosing one of them has none."
    if not distribution:
        return (
            "Choosing the best of these trials has no privacy bound of its own: how many there are was fixed beforehand, or depended on "
            "their results. A trial's epsilon holds for a trial that was picked without looking at the results; whoever sees the results of "
            f"all private trials ({num_private}) has what they tell together. For a bound, set sweep.private_selection, which draws "
            f"the number of trials at random.{_SCORES if reads_private else ''}"
        )
    if reads_private:
        return "Choosing the best of these trials has no privacy bound: it looks at a figure that is measured on the protected records themselves."
    if epsilon is None or delta is None or not math.isfinite(epsilon):
        return "Choosing the best of these trials has no privacy bound: a trial that could have been drawn has no finite epsilon."
    return (
        f"Choosing the best trial is ({epsilon:.4g}, {delta:.3g})-differentially private with respect to the units that each trial protects "
        f"(Papernot and Steinke 2022; the number of trials is {distribution.replace('_', ' ')} with mean {mean:g}; accounted by RDP for the "
        "costliest settings that could be drawn). It holds if only the chosen trial is shown, chosen by figures on held-out records, which "
        "it does not protect: neither the other trials nor how many there were; and as long as the noise and the seed stay secret."
    )


_SCORES = " Leakage, besides, is measured on the protected records themselves: no choice that looks at it has a bound."


def _shape(distribution: str, *, mean: float, shape: float | None) -> float:
    """The shape by which dp-accounting knows a distribution: infinity for Poisson, 1 for geometric."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} must be one of {', '.join(map(repr, DISTRIBUTIONS))}")
    if not (mean >= 1.0 and math.isfinite(mean)):
        raise ValueError(f"mean={mean!r} must be at least 1 and finite")
    if distribution != "negative_binomial":
        if shape is not None:
            raise ValueError(f"shape={shape!r} belongs to distribution='negative_binomial', not to {distribution!r}; leave it out")
        return math.inf if distribution == "poisson" else 1.0
    if shape is None or not (shape >= 0.0 and math.isfinite(shape)):
        raise ValueError(f"shape={shape!r} must be at least 0 and finite for distribution='negative_binomial'")
    return float(shape)


def _unsampled(release: Release) -> Release:
    """What a release costs whoever knows its sample: a unit in it moves the sum by C, and by 2 C where it is replaced by another."""
    return Release(release.noise_multiplier / (2.0 if release.sampler == "fixed" else 1.0), sampler="all", count=release.count)


def _worst(releases: Sequence[Release]) -> Release:
    """One release that costs at least as much as each of `releases`, which are all of one neighbouring relation."""
    noise, count = min(release.noise_multiplier for release in releases), max(release.count for release in releases)
    if releases[0].sampler == "fixed":
        widest = max(releases, key=lambda release: release.sample_size / release.population)
        return replace(widest, noise_multiplier=noise, count=count)
    sampling_prob = max(release.sampling_prob for release in releases)
    sampler = "all" if sampling_prob == 1.0 else "poisson"
    return Release(noise, sampler=sampler, sampling_prob=sampling_prob, count=count)


def _mean_of(log_gamma: float, shape: float) -> float:
    """The mean of the truncated negative binomial distribution: shape (1 / gamma - 1) / (1 - gamma^shape), and its limit at shape 0."""
    odds = math.expm1(-log_gamma)
    return odds / -log_gamma if shape == 0.0 else shape * odds / -math.expm1(shape * log_gamma)
