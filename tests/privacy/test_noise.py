"""The noise has the standard deviation it is asked for, is normal, and repeats exactly when and only when it should."""

import numpy as np
import pytest
from scipy.stats import kstest

from raysim.privacy.noise import BLOCK, gaussian
from raysim.rng import seed_for


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("std", [0.3, 1.0, 40.0])
def test_accepts_the_right_scale_and_rejects_a_wrong_one(secure: bool, std: float) -> None:
    noise = gaussian(4000, std=std, seed=seed_for(0, "noise", 1), secure=secure)
    assert noise.dtype == np.float32
    assert kstest(noise, "norm", args=(0, std)).pvalue > 1e-6
    assert kstest(noise, "norm", args=(0, std * 2 / 3)).pvalue < 1e-9
    assert kstest(noise, "norm", args=(0, std * 3 / 2)).pvalue < 1e-9


def test_system_noise_is_normal_in_every_part() -> None:
    """Beyond one block, in both halves of a pair, and for an odd size; neighbours and pairs are uncorrelated."""
    noise = gaussian(2 * BLOCK + 7, std=1.0, seed=0, secure=True)
    assert len(noise) == 2 * BLOCK + 7
    first, second = noise[:BLOCK], noise[BLOCK : 2 * BLOCK]
    assert kstest(first[:20000], "norm").pvalue > 1e-6
    assert kstest(second[:20000], "norm").pvalue > 1e-6
    assert abs(np.mean(noise)) < 6 / np.sqrt(len(noise))
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / np.sqrt(BLOCK)
    assert abs(np.corrcoef(np.square(first), np.square(second))[0, 1]) < 6 / np.sqrt(BLOCK)


def test_seeded_noise_repeats() -> None:
    seed = seed_for(3, "noise", 0)
    np.testing.assert_array_equal(gaussian(50, std=1.0, seed=seed, secure=False), gaussian(50, std=1.0, seed=seed, secure=False))


def test_system_noise_does_not_repeat() -> None:
    assert not np.array_equal(gaussian(50, std=1.0, seed=1, secure=True), gaussian(50, std=1.0, seed=1, secure=True))


def test_negative_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="std=-1"):
        gaussian(3, std=-1.0, seed=0, secure=False)
