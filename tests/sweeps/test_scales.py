"""An axis fits its values."""

from typing import Any

import numpy as np
import pytest

from raysim.sweeps.scales import Measure, key_scale, measure_scale

# --- axes


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([4, 16, 64], "log"),
        ([1, 2, 4, 8], "log"),
        ([0.001, 1], "log"),
        ([3, 10], "linear"),
        ([1, 2, 3, 4], "linear"),
        ([0, 1, 10, 100], "steps"),
        ([0, 1, 2], "linear"),
        (["fedit", "dplora"], "steps"),
        ([True, False], "steps"),
        ([7], "steps"),
    ],
)
def test_a_key_has_the_axis_that_fits_its_values(values: list[Any], kind: str) -> None:
    scale = key_scale("key", values)
    assert scale.kind == kind
    positions = [scale.position(value) for value in values]
    assert all(position is not None and 0 <= position <= 1 for position in positions)
    assert len(set(positions)) == len(values)
    assert [text for _, text in scale.ticks()] == [str(value) for value in values]
    if kind == "log" and len(values) > 2:
        gaps = np.diff(np.array(positions, dtype=float))
        assert gaps == pytest.approx([gaps[0]] * len(gaps))


def test_runs_without_an_epsilon_have_a_place_beyond_all_others() -> None:
    measure = Measure("epsilon", "epsilon", "min", str, missing="none")
    scale = measure_scale(measure, [1.0, 4.0, None])
    without = scale.position(None)
    assert without == 1.0
    assert all((scale.position(value) or 0.0) < 0.9 for value in (1.0, 4.0))
    assert scale.ticks()[-1] == (1.0, "none")
    assert measure_scale(measure, [1.0, 4.0]).position(None) is None


def test_an_axis_of_equal_values_names_them_and_stays_above_zero() -> None:
    scale = measure_scale(Measure("epsilon", "epsilon", "min", "{:g}".format, missing="none"), [4.0, 4.0, None])
    assert [text for _, text in scale.ticks()] == ["4", "none"]
    assert 0 < (scale.position(4.0) or 0) < 1
    scale = measure_scale(Measure("leakage", "leakage", "min", "{:g}".format, least_span=0.05), [0.0, 0.0])
    assert scale.position(0.0) == 0.0
    assert min(float(text) for _, text in scale.ticks()) == 0.0


def test_a_difference_of_nothing_looks_like_one() -> None:
    scale = measure_scale(Measure("heldout_nll", "NLL", "min", str, least_span=0.1), [2.500, 2.501])
    low, high = scale.position(2.500), scale.position(2.501)
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(0.01)
