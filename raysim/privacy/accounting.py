"""Epsilon of composed Gaussian releases: thin functions over dp-accounting, and nothing else.

Left out: an accountant of our own, and accounting for the choice of hyper-parameters (several runs on the same private
data each spend their own epsilon; nothing here adds them up).
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

FINEST_INTERVAL = 5e-5
"""Smallest step of the discretised privacy loss: half a second an epsilon, which finer steps change by about 1% at most."""
RELATIVE_INTERVAL = 1e-5
"""Step as a share of the RDP epsilon, so that a run with almost no privacy does not fill the memory with its loss grid."""
LARGEST_PLD = 1e6
"""Above this the RDP epsilon, also an upper bound, stands for both: such losses overflow the grid and protect nobody."""


@functools.lru_cache(maxsize=4096)
def epsilon_pld(noise_multiplier: float, *, sampling_prob: float, num_releases: int, delta: float) -> float:
    """Epsilon at `delta` of `num_releases` Poisson-sampled Gaussian releases, by privacy loss distributions.

    `noise_multiplier` is noise standard deviation over the sensitivity of one release. With `sampling_prob` below 1 the
    neighbouring relation is add/remove; at 1 it is whichever relation the sensitivity was stated for.

    Guarantees: within 1% of dp-accounting at its default grid; about 1 s for a few hundred releases.
    Edge cases: 0 releases cost 0; no noise costs `math.inf`.
    """
    bound = epsilon_rdp(noise_multiplier, sampling_prob=sampling_prob, num_releases=num_releases, delta=delta)
    if bound == 0.0 or bound > LARGEST_PLD:
        return bound
    interval = max(FINEST_INTERVAL, RELATIVE_INTERVAL * bound)
    accountant = PLDAccountant(value_discretization_interval=interval)
    return float(accountant.compose(_event(noise_multiplier, sampling_prob), num_releases).get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def epsilon_rdp(noise_multiplier: float, *, sampling_prob: float, num_releases: int, delta: float) -> float:
    """The same epsilon by Renyi differential privacy: a looser bound, from different mathematics, to check the first."""
    _check(noise_multiplier, sampling_prob, num_releases, delta)
    if num_releases == 0:
        return 0.0
    if noise_multiplier == 0.0:
        return math.inf
    with _quiet_about_skipped_orders():
        return float(RdpAccountant().compose(_event(noise_multiplier, sampling_prob), num_releases).get_epsilon(delta))


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


def _event(noise_multiplier: float, sampling_prob: float) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return gaussian if sampling_prob == 1.0 else dp_accounting.PoissonSampledDpEvent(sampling_prob, gaussian)


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
def _quiet_about_skipped_orders() -> Iterator[None]:
    """Hides the accountant's notes on Renyi orders it leaves out: it takes the best of the others, which is still a bound."""
    logger = logging.getLogger("absl")
    logger.addFilter(_is_not_about_orders)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_about_orders)


def _is_not_about_orders(record: logging.LogRecord) -> bool:
    return "Excluding this order" not in record.getMessage()
