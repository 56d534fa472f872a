"""Epsilon of composed Gaussian releases, and the noise that an epsilon asks for: thin functions over dp-accounting.

A noise multiplier is a standard deviation over C, the most that one unit can add to a sum. Adding or removing a unit moves
the sum by C. Replacing one moves it by up to 2 C, so that where the neighbouring relation is replace-one (fixed-size
samples: their size must not tell whether a unit is there) the accountant is given half the multiplier.

Left out: an accountant of our own, and accounting for the choice of hyper-parameters (several runs on the same private
data each spend their own epsilon; nothing here adds them up).
"""

import contextlib
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

FINEST_INTERVAL = 5e-5
"""Smallest step of the discretised privacy loss: half a second an epsilon, which finer steps change by about 1% at most."""
RELATIVE_INTERVAL = 1e-5
"""Step as a share of the RDP epsilon, so that a run with almost no privacy does not fill the memory with its loss grid."""
LARGEST_PLD = 1e6
"""Above this the RDP epsilon, also an upper bound, stands for both: such losses overflow the grid and protect nobody."""
LEAST_EXCESS = 1e-4
"""By which share an epsilon may lie above the exact one where nobody asks for more."""
SAMPLERS = ("poisson", "fixed", "all")
TOLERANCE = 1e-3
"""How far above the smallest noise multiplier a solved one may lie, as a share of it."""
LEAST_NOISE, MOST_NOISE = 1e-6, 1e9
"""Where the search for a noise multiplier gives up."""
LEAST_SPENT = math.log(0.995)
"""The search goes on until this share of the target is spent, as a logarithm."""
FAR = 50.0
"""The logarithm that stands for a cost of nothing (negative) or without bound, over the target."""
MOST_STEPS = 100
MET = "target_epsilon={!r} is met with next to no noise, so there is nothing to solve for; lower it, or delta"
Tried = tuple[float, float]
"""A noise multiplier, and the logarithm of what it costs over the target."""
REPLACE_ONE = dp_accounting.NeighboringRelation.REPLACE_ONE


@dataclass(frozen=True)
class Epsilon:
    """An upper bound on epsilon, computed in two ways."""

    pld: float | None
    """By privacy loss distributions: the figure to quote; None where dp-accounting has none (fixed-size samples)."""
    rdp: float
    """By Renyi differential privacy: the looser cross-check, and the figure to quote where there is no other."""

    @property
    def quoted(self) -> float:
        """The figure to quote: `pld` where there is one, else `rdp`."""
        return self.rdp if self.pld is None else self.pld


@dataclass(frozen=True)
class Release:
    """`count` Gaussian releases, each of a sum over a sample of the units that is drawn anew."""

    noise_multiplier: float
    """Noise standard deviation over C, the most that one unit adds to the sum."""
    sampler: str = "all"
    """`poisson` (each unit by itself), `fixed` (a sample of one size, without replacement) or `all` (every unit)."""
    sampling_prob: float = 1.0
    """For `poisson`: the probability with which a unit is in a sample."""
    population: int = 0
    """For `fixed`: how many units there are, which is taken to be public."""
    sample_size: int = 0
    """For `fixed`: how many of them are in a sample."""
    count: int = 1
    """How many such releases."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} must be one of {', '.join(map(repr, SAMPLERS))}")
        if self.sampler != "poisson" and self.sampling_prob != 1.0:
            raise ValueError(f"sampling_prob={self.sampling_prob!r} belongs to sampler='poisson', not to {self.sampler!r}")
        if self.sampler == "fixed" and not 1 <= self.sample_size <= self.population:
            raise ValueError(f"sample_size={self.sample_size!r} must be at least 1 and at most population={self.population!r}")
        _check(self.noise_multiplier, self.sampling_prob, self.count, 0.5)

    def event(self, *, replace_one: bool = False) -> dp_accounting.DpEvent:
        """dp-accounting's event for one of the releases, when a unit is added or removed, or replaced by another.

        Errors: ValueError where it has no such event.
        """
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier / (2.0 if replace_one else 1.0))
        if self.sampler == "fixed":
            if not replace_one:
                raise ValueError("sampler='fixed' has no event for adding or removing a unit; use sampler='poisson'")
            return dp_accounting.SampledWithoutReplacementDpEvent(self.population, self.sample_size, gaussian)
        if self.sampling_prob == 1.0:
            return gaussian
        if replace_one:
            # By PLD there is one, but fixed-size samples, the reason to ask, are in the RDP accountant alone, which has none.
            raise ValueError("sampler='poisson' has no event for replacing a unit beside fixed-size samples; use sampler='fixed' or 'all'")
        return dp_accounting.PoissonSampledDpEvent(self.sampling_prob, gaussian)


@functools.lru_cache(maxsize=4096)
def epsilon_pld(noise_multiplier: float, *, sampling_prob: float, num_releases: int, delta: float) -> float:
    """Epsilon at `delta` of `num_releases` Poisson-sampled Gaussian releases, by privacy loss distributions.

    `noise_multiplier` is noise standard deviation over the sensitivity of one release. With `sampling_prob` below 1 the
    neighbouring relation is add/remove; at 1 it is whichever relation the sensitivity was stated for.

    Guarantees: within 1% of dp-accounting at its default grid; about 1 s for a few hundred releases.
    Edge cases: 0 releases cost 0; no noise costs `math.inf`.
    """
    _check(noise_multiplier, sampling_prob, num_releases, delta)
    release = Release(noise_multiplier, "poisson", sampling_prob=sampling_prob, count=num_releases)
    return _pld((release,), delta=delta, excess=0.0)


def epsilon_of(releases: Sequence[Release], *, delta: float, excess: float = LEAST_EXCESS) -> Epsilon:
    """Epsilon at `delta` of all `releases` together, in whatever order they are made.

    Without fixed-size samples the neighbouring relation is add/remove. With them it is replace-one, for which dp-accounting
    has an event in its RDP accountant only, so `pld` is None. `pld` is an upper bound that lies above the exact epsilon by a
    share of about `excess` at most; 0 takes the finest grid of losses, ten times slower.

    Edge cases: nothing released costs 0; a release without noise costs `math.inf`.
    Errors: ValueError where fixed-size and Poisson samples meet: of replacing a unit, dp-accounting has the former by RDP alone and the
    latter by PLD alone.
    """
    _check(1.0, 1.0, 0, delta)
    merged = _merged(releases)
    if not _replaces(merged):
        return Epsilon(pld=_pld(merged, delta=delta, excess=excess), rdp=_rdp(merged, delta=delta))
    return Epsilon(pld=None, rdp=_rdp(merged, delta=delta))


def solve_noise_multiplier(
    target_epsilon: float,
    *,
    delta: float,
    make_releases: Callable[[float], Sequence[Release]],
    excess: float = LEAST_EXCESS,
    start: float | None = None,
) -> float:
    """The smallest noise multiplier z, to a relative `TOLERANCE`, whose `make_releases(z)` costs at most `target_epsilon` at `delta`.

    The cost is the epsilon that `epsilon_of` quotes with this `excess`. `start` is a guess, which saves time.

    Guarantees: the realised epsilon is at most `target_epsilon`, and at least 99% of it.
    Errors: ValueError if no noise multiplier reaches the target, or if every one does.
    """
    if not (target_epsilon > 0.0 and math.isfinite(target_epsilon)):
        raise ValueError(f"target_epsilon={target_epsilon!r} must be greater than 0 and finite")
    if not any(release.count for release in make_releases(1.0)):
        raise ValueError(f"target_epsilon={target_epsilon!r}: nothing is released, so no noise is needed; raise the number of rounds")

    def spent(z: float) -> float:
        return epsilon_of(make_releases(z), delta=delta, excess=excess).quoted

    def spent_by_rdp(z: float) -> float:
        return _rdp(_merged(make_releases(z)), delta=delta)

    if start is None:
        start = _seed(spent_by_rdp, target_epsilon)
    return _least(spent, target_epsilon, start=start, stride=0.05)


def default_delta(num_units: int) -> float:
    """The delta used where none is given: `num_units` to the power of -1.1, somewhat below one in as many units.

    Errors: ValueError for fewer than 2 units, among whom nobody can hide.
    """
    if num_units < 2:
        raise ValueError(f"num_units={num_units!r} must be at least 2 for a default delta; give delta")
    return float(num_units**-1.1)


def paper_epsilon(noise_multiplier: float, *, delta: float) -> float:
    """The classical Gaussian mechanism's epsilon of one release, sqrt(2 ln(1.25 / delta)) / sigma.

    This is what DP-LoRA states per iteration (Liu et al. 2023, arXiv 2312.17493). It holds below 1 only and does not
    compose, so it is reported beside the accountant's epsilon and never as a run's total.
    """
    return math.sqrt(2 * math.log(1.25 / delta)) / noise_multiplier


def paper_sigma(epsilon: float, *, delta: float) -> float:
    """The noise multiplier that the classical formula asks for; too small for large epsilon (Balle and Wang 2018)."""
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def analytic_epsilon(noise_multiplier: float, *, delta: float) -> float:
    """The exact epsilon of one Gaussian release (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    return float(dp_accounting.get_epsilon_gaussian(noise_multiplier, delta))


def analytic_sigma(epsilon: float, *, delta: float) -> float:
    """The smallest noise multiplier with which one Gaussian release is (epsilon, delta)-private (Balle and Wang 2018)."""
    return float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def _merged(releases: Sequence[Release]) -> tuple[Release, ...]:
    """`releases` with equal ones counted together, since an accountant composes a count faster than a list."""
    counts: Counter[Release] = Counter()
    for release in releases:
        counts[replace(release, count=1)] += release.count
    return tuple(replace(release, count=count) for release, count in counts.items() if count)


def _replaces(releases: Sequence[Release]) -> bool:
    return any(release.sampler == "fixed" for release in releases)


@functools.lru_cache(maxsize=4096)
def _pld(releases: tuple[Release, ...], *, delta: float, excess: float) -> float:
    bound = _rdp(releases, delta=delta)
    if bound == 0.0 or bound > LARGEST_PLD:
        return bound
    step = _grid_step(bound, releases, excess=excess)
    epsilon = _pld_on_grid(releases, delta=delta, step=step)
    # The step that the epsilon itself needs; the losses are as wide as the bound says, and must fit into memory.
    needed = max(RELATIVE_INTERVAL * bound, _grid_step(epsilon, releases, excess=excess))
    return epsilon if needed > 0.7 * step else _pld_on_grid(releases, delta=delta, step=needed)


def _pld_on_grid(releases: tuple[Release, ...], *, delta: float, step: float) -> float:
    accountant = PLDAccountant(value_discretization_interval=step)
    for release in releases:
        accountant.compose(release.event(), release.count)
    return float(accountant.get_epsilon(delta))


def _grid_step(epsilon: float, releases: tuple[Release, ...], *, excess: float) -> float:
    """The step of a grid of losses on which about that epsilon is found at most a share `excess` too large.

    Rounding a release's loss to a grid of step h adds up to h^2 / 4 to its variance, and so up to n h^2 / 4 to that of n of
    them, whose tail at delta lies some 5 to 7 standard deviations out. Unsampled releases are composed before rounding.
    """
    rounded = sum(release.count if release.sampling_prob < 1.0 else 1 for release in releases)
    return max(FINEST_INTERVAL, RELATIVE_INTERVAL * epsilon, epsilon * math.sqrt(excess / (rounded * (3.0 + epsilon / 2))))


def rdp_accountant(releases: Sequence[Release]) -> tuple[RdpAccountant, bool]:
    """An empty accountant by Renyi differential privacy that can take these releases, and whether it is about replacing a unit.

    Errors: ValueError where fixed-size and Poisson samples meet.
    """
    replaces = _replaces(releases)
    if replaces and any(release.sampling_prob < 1.0 for release in releases):
        raise ValueError(
            "sampler='fixed' and sampler='poisson' cannot be accounted together: no accountant has both for replacing a unit; "
            "use 'poisson' for every release that samples"
        )
    return (RdpAccountant(neighboring_relation=REPLACE_ONE) if replaces else RdpAccountant()), replaces


@functools.lru_cache(maxsize=4096)
def _rdp(releases: tuple[Release, ...], *, delta: float) -> float:
    if not any(release.count for release in releases):
        return 0.0
    if any(release.count and release.noise_multiplier == 0.0 for release in releases):
        return math.inf
    accountant, replaces = rdp_accountant(releases)
    with quiet_about_skipped_orders():
        for release in releases:
            accountant.compose(release.event(replace_one=replaces), release.count)
        return float(accountant.get_epsilon(delta))


def _seed(cost: Callable[[float], float], target: float) -> float:
    """A noise multiplier to start from, by a looser cost; 1 where that one, which has a floor, cannot reach the target."""
    cost(1.0)  # refuses what cannot be accounted at all
    try:
        return _least(cost, target, start=1.0, stride=0.2, tolerance=0.05)
    except ValueError:
        return 1.0


def _least(cost: Callable[[float], float], target: float, *, start: float, stride: float, tolerance: float = TOLERANCE) -> float:
    """The smallest z, to a relative `tolerance`, with cost(z) <= target, for a cost that falls in z.

    It is sought from `start` outwards, first by a relative `stride`, then by ever longer ones.
    """

    def excess(z: float) -> float:
        spent = cost(z)
        return min(max(math.log(max(spent, 1e-300) / target), -FAR), FAR) if spent < math.inf else FAR

    low, high = _bracket(excess, target, start=start, stride=stride)
    for step in range(MOST_STEPS):
        ratio = high[0] / low[0]
        if ratio <= 1.0 + tolerance and (high[1] >= LEAST_SPENT or high[1] == -FAR or ratio <= 1.0 + 1e-9):
            break
        z = _between(low, high, tolerance=tolerance, halve=step % 3 == 2)
        point = (z, excess(z))
        low, high = (point, high) if point[1] > 0.0 else (low, point)
    if high[1] < LEAST_SPENT:
        raise ValueError(MET.format(target))
    return high[0]


def _bracket(excess: Callable[[float], float], target: float, *, start: float, stride: float) -> tuple[Tried, Tried]:
    """Two noise multipliers, each with its excess over the target, of which the first costs more than the target and the second not.

    Errors: ValueError if there is no such pair.
    """
    low = high = (start, excess(start))
    factor = 1.0 + stride
    while high[1] > 0.0:
        if high[0] >= MOST_NOISE:
            raise ValueError(
                f"target_epsilon={target!r} is out of reach: whatever the noise, {target * math.exp(high[1]):.4g} is spent; raise it"
            )
        z = min(high[0] * factor, MOST_NOISE)
        low, high, factor = high, (z, excess(z)), factor**2
    while low[1] <= 0.0:
        if low[0] <= LEAST_NOISE:
            raise ValueError(MET.format(target))
        z = max(low[0] / factor, LEAST_NOISE)
        low, high, factor = (z, excess(z)), low, factor**2
    return low, high


def _between(low: Tried, high: Tried, *, tolerance: float, halve: bool) -> float:
    """Where to look next: at the crossing of the line through both ends (in logarithms), a little towards the farther end.

    That little draws in the farther end too, so that both close in on the crossing.
    """
    width = math.log(high[0] / low[0])
    if halve:
        return low[0] * math.exp(0.5 * width)
    share = low[1] / (low[1] - high[1])
    nudge = min(0.4 * tolerance / width, 0.25)
    share += nudge if share < 0.5 else -nudge
    return low[0] * math.exp(width * min(max(share, 0.02), 0.98))


def _check(noise_multiplier: float, sampling_prob: float, num_releases: int, delta: float) -> None:
    if not noise_multiplier >= 0.0:
        raise ValueError(f"noise_multiplier={noise_multiplier!r} must be at least 0")
    if not 0.0 < sampling_prob <= 1.0:
        raise ValueError(f"sampling_prob={sampling_prob!r} must be greater than 0 and at most 1")
    if num_releases < 0:
        raise ValueError(f"num_releases={num_releases!r} must be at least 0")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta={delta!r} must be between 0 and 1")


@contextlib.contextmanager
def quiet_about_skipped_orders() -> Iterator[None]:
    """Hides the accountant's notes on Renyi orders it leaves out: it takes the best of the others, which is still a bound."""
    logger = logging.getLogger("absl")
    logger.addFilter(_is_not_about_orders)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_about_orders)


def _is_not_about_orders(record: logging.LogRecord) -> bool:
    return "Excluding this order" not in record.getMessage()
