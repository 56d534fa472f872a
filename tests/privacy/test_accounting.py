"""The accountant's figures against independent ones: dp-accounting's own, closed forms, and the order they must have."""

import math
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from raysim.privacy.accounting import Release, analytic_epsilon, analytic_sigma, epsilon_of, epsilon_pld, paper_epsilon, paper_sigma

# noise multiplier, sampling probability, releases, delta, epsilon by PLD, epsilon by RDP (dp-accounting 0.6.0, add/remove)
GOLDEN = [
    (1.0, 1.0, 1, 1e-5, 4.3772, 4.7285),
    (2.0, 1.0, 1, 1e-5, 1.9931, 2.1657),
    (1.0, 0.01, 1000, 1e-5, 1.8282, 2.1014),
    (1.0, 0.1, 100, 1e-5, 7.0466, 7.9039),
    (1.0, 0.01, 200, 1e-5, 0.9125, 1.3401),
    (1.0, 0.04, 30, 1e-5, 1.8440, 2.3187),
    (2.0, 0.5, 100, 1e-5, 14.2845, 15.7253),
    (1.0, 0.001, 1000, 1e-6, 0.1856, 0.8697),
    (1.0, 1.0, 10, 1e-5, 17.857, 19.054),
    (1.0, 1.0, 50, 1e-5, 54.3766, 57.3017),
    (0.7071, 1.0, 50, 1e-5, 91.817, 96.116),
]


def epsilon_rdp(noise_multiplier: float, *, sampling_prob: float, num_releases: int, delta: float) -> float:
    return epsilon_of((Release(noise_multiplier, "poisson", sampling_prob=sampling_prob, count=num_releases),), delta=delta).rdp


@pytest.mark.parametrize(("noise_multiplier", "sampling_prob", "num_releases", "delta", "pld", "rdp"), GOLDEN)
def test_golden_table(noise_multiplier: float, sampling_prob: float, num_releases: int, delta: float, pld: float, rdp: float) -> None:
    event = {"sampling_prob": sampling_prob, "num_releases": num_releases, "delta": delta}
    assert epsilon_pld(noise_multiplier, **event) == pytest.approx(pld, rel=0.01)
    assert epsilon_rdp(noise_multiplier, **event) == pytest.approx(rdp, rel=0.01)


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """delta of one Gaussian release at `epsilon` (Balle and Wang 2018, theorem 8), written out independently."""
    half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    return float(norm.cdf(half - shift) - math.exp(epsilon) * norm.cdf(-half - shift))


@pytest.mark.parametrize(("noise_multiplier", "num_releases"), [(1.0, 1), (2.0, 3), (0.8, 7), (4.0, 40)])
def test_closed_form_without_sampling(noise_multiplier: float, num_releases: int) -> None:
    epsilon = epsilon_pld(noise_multiplier, sampling_prob=1.0, num_releases=num_releases, delta=1e-5)
    equivalent = noise_multiplier / math.sqrt(num_releases)
    assert gaussian_delta(epsilon, equivalent) == pytest.approx(1e-5, rel=0.02)
    assert epsilon == pytest.approx(analytic_epsilon(equivalent, delta=1e-5), rel=1e-3)


@settings(max_examples=8, deadline=None)
@given(st.floats(0.5, 4.0), st.floats(0.005, 0.5), st.integers(1, 60), st.floats(1.2, 2.0))
def test_monotone(noise_multiplier: float, sampling_prob: float, num_releases: int, factor: float) -> None:
    """More noise costs less; more sampling and more releases cost more; RDP is never below PLD."""
    bases = []
    for bound in (epsilon_pld, epsilon_rdp):
        base = bound(noise_multiplier, sampling_prob=sampling_prob, num_releases=num_releases, delta=1e-5)
        bases.append(base)
        assert bound(noise_multiplier * factor, sampling_prob=sampling_prob, num_releases=num_releases, delta=1e-5) < base
        assert bound(noise_multiplier, sampling_prob=sampling_prob * factor, num_releases=num_releases, delta=1e-5) > base
        assert bound(noise_multiplier, sampling_prob=sampling_prob, num_releases=num_releases + 5, delta=1e-5) > base
    assert bases[1] >= bases[0]


def test_calibration_table_of_one_release() -> None:
    """The classical formula asks for too much noise at small epsilon and for too little at 10, where it no longer holds."""
    for epsilon, classical, exact in [
        (1, 4.8448, 3.7306),
        (2, 2.4224, 1.9938),
        (4, 1.2112, 1.0812),
        (6, 0.8075, 0.7636),
        (8, 0.6056, 0.6002),
        (10, 0.4845, 0.4999),
    ]:
        assert paper_sigma(epsilon, delta=1e-5) == pytest.approx(classical, abs=1e-4)
        assert analytic_sigma(epsilon, delta=1e-5) == pytest.approx(exact, abs=1e-4)
        assert paper_epsilon(classical, delta=1e-5) == pytest.approx(epsilon, rel=1e-3)


def test_dplora_critique_figures() -> None:
    """sigma = 2: the paper's figure, the exact one of one step, the corrected one of 50, and 50 of a Poisson-sampled batch."""
    corrected = 2 / (2 * math.sqrt(2))
    assert paper_epsilon(2.0, delta=1e-5) == pytest.approx(2.42, abs=0.005)
    assert analytic_epsilon(2.0, delta=1e-5) == pytest.approx(1.99, abs=0.005)
    assert epsilon_pld(corrected, sampling_prob=1.0, num_releases=50, delta=1e-5) == pytest.approx(91.8, rel=0.001)
    sampled = {"sampling_prob": 8 / 51494, "num_releases": 50, "delta": 1e-5}
    assert epsilon_pld(corrected, **sampled) == pytest.approx(0.018, abs=0.0005)
    assert epsilon_rdp(corrected, **sampled) == pytest.approx(1.05, abs=0.005)


def test_fault_classical_formula_beyond_its_range() -> None:
    """The classical noise for epsilon = 25 spends more than 25: a formula that several systems use at any epsilon."""
    assert analytic_epsilon(paper_sigma(25, delta=1e-5), delta=1e-5) > 25.5


def test_nothing_released_costs_nothing() -> None:
    assert epsilon_pld(1.0, sampling_prob=0.1, num_releases=0, delta=1e-5) == 0.0


def test_no_noise_costs_everything() -> None:
    assert epsilon_pld(0.0, sampling_prob=0.1, num_releases=1, delta=1e-5) == math.inf


@pytest.mark.parametrize("noise_multiplier", [1e-6, 0.01, 0.3])
def test_little_noise_is_answered_quickly(noise_multiplier: float) -> None:
    """A tiny noise multiplier has a loss so wide that a fixed grid would need gigabytes."""
    start = time.perf_counter()
    assert epsilon_pld(noise_multiplier, sampling_prob=0.5, num_releases=200, delta=1e-5) > 100
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.nan),
        ("sampling_prob", 0.0),
        ("sampling_prob", 1.5),
        ("num_releases", -1),
        ("delta", 0.0),
    ],
)
def test_out_of_range_is_refused(key: str, value: float) -> None:
    event = {"noise_multiplier": 1.0, "sampling_prob": 0.5, "num_releases": 1, "delta": 1e-5} | {key: value}
    with pytest.raises(ValueError, match=key):
        epsilon_pld(event.pop("noise_multiplier"), **event)  # type: ignore[arg-type]  # num_releases is an integer in each case


def test_accounting_loads_no_other_framework() -> None:
    code = "import raysim.privacy.accounting, sys; print(sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
