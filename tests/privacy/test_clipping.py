"""The sensitivity of a sum of updates, for every update that can be sent, and the noise that goes with it."""

import math
import weakref
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from raysim.privacy.clipping import BLOCK, MARGIN, Entry, clip, clip_and_sum, l2_norm, noise_and_divide, sum_entries

Vector = npt.NDArray[np.float32]
HUGE, DENORMAL = float(np.finfo(np.float32).max), 1e-45

coordinates = st.one_of(st.floats(width=32), st.sampled_from([0.0, HUGE, -HUGE, 1e30, DENORMAL, 1e-38, math.nan, math.inf]))
clip_norms = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1e-44, 1e-30, 1.0, 1e30]))


@st.composite
def cohorts(draw: st.DrawFn) -> list[Vector]:
    size = draw(st.integers(1, 12))
    lists = draw(st.lists(st.lists(coordinates, min_size=size, max_size=size), min_size=2, max_size=8))
    return [np.array(values, dtype=np.float32) for values in lists]


def ones(updates: list[Vector]) -> list[float]:
    return [1.0] * len(updates)


@settings(max_examples=300, deadline=None)
@given(cohorts(), clip_norms, st.data())
def test_one_client_more_or_less_moves_the_sum_by_at_most_the_clip_norm(
    cohort: list[Vector], clip_norm: float, data: st.DataObject
) -> None:
    """Whatever the values: zero, huge, not finite, denormal, or all pulling the same way."""
    without = list(cohort)
    del without[data.draw(st.integers(0, len(cohort) - 1))]
    both = [clip_and_sum(updates, weights=ones(updates), clip_norm=clip_norm).total for updates in (cohort, without)]
    assert l2_norm(both[0] - both[1]) <= clip_norm * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 400), clip_norms)
def test_sensitivity_is_reached_by_a_large_aligned_cohort(num_clients: int, clip_norm: float) -> None:
    """Rounding of a big sum stays below the bound, and the bound is tight: a smaller claim would be false."""
    updates = [np.full(7, 1e30, dtype=np.float32)] * num_clients
    difference = (
        clip_and_sum(updates, weights=ones(updates), clip_norm=clip_norm).total
        - clip_and_sum(updates[1:], weights=ones(updates[1:]), clip_norm=clip_norm).total
    )
    assert l2_norm(difference) <= clip_norm * (1 + 1e-9)
    assert l2_norm(difference) >= clip_norm * 0.999 or clip_norm < 1e-38


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), clip_norms)
@example([HUGE] * 40, 1.0)
@example([DENORMAL] * 40, 1e-45)
@example([1.0, 1.0, 1.0], math.sqrt(3))
def test_clipped_norm_is_at_most_the_bound(values: list[float], clip_norm: float) -> None:
    update = np.array(values, dtype=np.float32)
    clipped = clip(update, clip_norm=clip_norm)
    assert clipped.dtype == np.float32
    assert sum(Fraction(float(v)) ** 2 for v in clipped) <= Fraction(clip_norm) ** 2, "in exact arithmetic"
    assert np.all(np.sign(clipped) * np.sign(update) >= 0)


def test_clipping_keeps_direction_and_reaches_the_bound() -> None:
    update = np.array([3.0, -4.0, 0.0], dtype=np.float32)
    np.testing.assert_allclose(clip(update, clip_norm=1.0), [0.6, -0.8, 0.0], rtol=1e-6)


def test_clipping_leaves_a_short_update_alone() -> None:
    update = np.array([0.3, -0.4], dtype=np.float32)
    np.testing.assert_array_equal(clip(update, clip_norm=1.0), update)


def test_clipping_large_vectors() -> None:
    """A million coordinates, where the error of a carelessly summed norm would show."""
    update = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    clipped = clip(update, clip_norm=0.1)
    assert 0.1 * (1 - 1e-6) <= math.sqrt(math.fsum(np.square(clipped, dtype=np.float64))) <= 0.1


def test_fault_clip_norm_as_order_of_the_norm() -> None:
    """The bound does not change what is measured: an L2 norm of 5 whatever the bound (not the 2.5-norm, 4.498)."""
    update = np.array([3.0, 4.0], dtype=np.float32)
    assert clip_and_sum([update], weights=[1.0], clip_norm=2.5).norms == (5.0,)
    assert l2_norm(clip(update, clip_norm=2.5)) == pytest.approx(2.5)


def test_fault_clipping_each_tensor_by_itself() -> None:
    """16 tensors that are each inside the bound are 4 bounds long together; the whole update is what is clipped."""
    tensors = [np.eye(1, 16, k, dtype=np.float32)[0] for k in range(16)]
    joint = np.concatenate(tensors)
    assert l2_norm(clip(joint, clip_norm=1.0)) <= 1.0
    assert l2_norm(np.concatenate([clip(tensor, clip_norm=1.0) for tensor in tensors])) > 3.9


def test_fault_weighted_mean_with_fixed_noise() -> None:
    """A weight other than 1 would multiply the sensitivity that the noise was set for."""
    update = np.ones(3, dtype=np.float32)
    with pytest.raises(AssertionError, match="weights of 1"):
        clip_and_sum([update, update], weights=[1.0, 40.0], clip_norm=1.0)
    with pytest.raises(AssertionError, match="weights of 1"):
        clip_and_sum([update, update], weights=[2.0, 2.0], clip_norm=1.0)


def test_update_that_is_not_finite_counts_as_zero() -> None:
    good = np.array([0.3, 0.4], dtype=np.float32)
    bad = [np.array([math.nan, 1.0], dtype=np.float32), np.array([1.0, -math.inf], dtype=np.float32)]
    summed = clip_and_sum([bad[0], good, bad[1]], weights=[1.0] * 3, clip_norm=1.0)
    np.testing.assert_array_equal(summed.total, good.astype(np.float64))
    assert (summed.num_dropped, summed.weight, summed.norms) == (2, 1.0, (pytest.approx(0.5),))


def test_weighted_sum_without_clipping() -> None:
    updates = [np.array([1.0, 2.0], dtype=np.float32), np.array([10.0, -1.0], dtype=np.float32)]
    summed = clip_and_sum(updates, weights=[3.0, 1.0], clip_norm=None)
    np.testing.assert_array_equal(summed.total, [13.0, 5.0])
    assert (summed.weight, summed.num_clipped) == (4.0, 0)


def test_clipped_are_counted() -> None:
    updates = [np.full(4, value, dtype=np.float32) for value in (0.1, 0.5, 0.51, 7.0)]
    assert clip_and_sum(updates, weights=[1.0] * 4, clip_norm=1.0).num_clipped == 2


def test_noise_on_the_average() -> None:
    """The scale is z C over the denominator; the sum's scale, or noise divided once more, are rejected."""
    total = np.full(4000, 20.0)
    mean = noise_and_divide(total, noise_std=6.0, denominator=4.0, seed=5, secure=False)
    assert mean.dtype == np.float32
    assert kstest(mean, "norm", args=(5.0, 1.5)).pvalue > 1e-6
    for wrong in (1.0, 2.25, 6.0, 6.0 / 16):
        assert kstest(mean, "norm", args=(5.0, wrong)).pvalue < 1e-9


def test_divides_exactly_without_noise() -> None:
    np.testing.assert_array_equal(
        noise_and_divide(np.array([2.0, -8.0]), noise_std=0.0, denominator=4.0, seed=1, secure=False), [0.5, -2.0]
    )


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_denominator_that_is_not_positive_is_refused(denominator: float) -> None:
    with pytest.raises(ValueError, match="denominator"):
        noise_and_divide(np.zeros(2), noise_std=1.0, denominator=denominator, seed=1, secure=False)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_bound_that_is_not_positive_is_refused(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        clip(np.ones(2, dtype=np.float32), clip_norm=clip_norm)


# --- passes over blocks that a cache holds, against one pass over everything


def exactly_clipped(update: Vector, *, clip_norm: float) -> Vector:
    """`clip` as its docstring has it, without blocks."""
    norm = float(np.sqrt(np.sum(np.square(update, dtype=np.float64))))
    if norm <= clip_norm * MARGIN:
        return update
    exact = update.astype(np.float64) * (clip_norm / norm * MARGIN)
    rounded = exact.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(exact), np.nextafter(rounded, np.float32(0)), rounded)


SIZES = [1, 7, 8, 129, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 8, 5 * BLOCK + 12_345]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-39, 1e-44])
def test_blocks_change_no_bit(size: int, scale: float) -> None:
    """Also where the results are below float32's smallest normal number, which a cut of the mantissa alone would round up."""
    rng = np.random.default_rng(size)
    updates = [(scale * rng.standard_normal(size) * rng.choice([0.0, 1.0, 1e-3], size)).astype(np.float32) for _ in range(3)]
    for update in updates:
        norm = l2_norm(update)
        assert norm == float(np.sqrt(np.sum(np.square(update, dtype=np.float64))))
        for clip_norm in (0.7 * norm, 1e-3 * norm, norm):
            if clip_norm > 0.0:
                clipped = clip(update, clip_norm=clip_norm)
                assert clipped.tobytes() == exactly_clipped(update, clip_norm=clip_norm).tobytes()
                assert clip(update, clip_norm=clip_norm, norm=norm).tobytes() == clipped.tobytes()
    weights = [3.0, 1.0, 0.25]
    expected = np.zeros(size)
    for update, weight in zip(updates, weights, strict=True):
        expected += weight * update.astype(np.float64)
    assert clip_and_sum(updates, weights=weights, clip_norm=None).total.tobytes() == expected.tobytes()


def test_each_update_is_let_go_once_it_is_added() -> None:
    """A chunk's memory does not grow with its clients."""
    alive: list[weakref.ref[Vector]] = []

    def entries() -> Iterator[Entry]:
        for _ in range(5):
            update = np.ones(10, dtype=np.float32)
            alive.append(weakref.ref(update))
            yield update, 1.0, None
            del update
            assert sum(one() is not None for one in alive) <= 1

    total = sum_entries(entries(), clip_norm=None)
    assert total is not None
    assert (total.weight, total.total.sum()) == (5.0, 50.0)
    assert sum_entries(iter(()), clip_norm=None) is None
