"""A figure reads the same on every screen and page."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysim.console.words import FORMS, MISSING, clock, figure_text, human_bytes, listed


@given(st.integers(0, 10**15))
def test_human_bytes_is_close_and_short(num_bytes: int) -> None:
    number, unit = human_bytes(num_bytes).split()
    value = float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert value == pytest.approx(num_bytes, rel=0.06, abs=0.5)
    assert unit == "GB" or len(number) <= 4


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3600, 36_125)] == ["0:00", "1:00", "1:01", "1:00:00", "10:02:05"]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, True])
def test_what_is_no_number_is_a_dash_and_no_epsilon_is_no_guarantee(value: float | None) -> None:
    assert {figure_text(key, value) for key in (*FORMS, "heldout_nll") if key != "epsilon"} == {MISSING}
    assert figure_text("epsilon", value) == "no guarantee"


@given(st.floats(0, 1))
def test_a_share_is_shown_to_a_tenth_of_a_percent(share: float) -> None:
    text = figure_text("details_rate", share)
    assert float(text.removesuffix("%")) == pytest.approx(100 * share, abs=0.0501)
    assert figure_text("train_exact_match", share) == text


def test_words_make_a_sentence() -> None:
    assert [listed(list(words)) for words in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
