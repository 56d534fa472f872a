"""Likeness of texts: ROUGE-L as its package and by hand, and details found as whole words only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from raysim.data.similarity import details_found, largest_rouge_l, rouge_l

WORDS = st.lists(st.sampled_from(["take", "the", "Tablet", "at", "night,", "12", "mg", "-", "é"]), max_size=12).map(" ".join)


@given(WORDS, WORDS)
def test_rouge_l_is_the_packages(candidate: str, reference: str) -> None:
    expected = RougeScorer(["rougeL"]).score(target=reference, prediction=candidate)["rougeL"].fmeasure
    assert rouge_l(candidate, reference) == expected


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "A, b! C? d.", 1.0),
        ("a b c d", "e f", 0.0),
        ("a c", "a b c d", 2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4)),
        ("a b c d", "b a d c", 0.5),  # longest common subsequence of 2 words in 4 and 4
        ("", "a", 0.0),
    ],
)
def test_rouge_l_by_hand(candidate: str, reference: str, expected: float) -> None:
    assert rouge_l(candidate, reference) == pytest.approx(expected)


def test_largest_rouge_l() -> None:
    assert largest_rouge_l("a b", []) == 0.0
    assert largest_rouge_l("a b", ["x", "a c", "a b"]) == 1.0
    assert largest_rouge_l("a b", ["x", "a c"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "detail", "found"),
    [
        ("Seen: Anna Berg.", "Anna Berg", True),
        ("seen: ANNA\n   berg", "Anna Berg", True),
        ("Anna  Berg's knee", "anna berg", True),
        ("Joanna Bergen", "Anna Berg", False),
        ("Anna Bergen", "Anna Berg", False),
        ("Anna met Berg", "Anna Berg", False),
        ("takes 12 mg", "12 mg", True),
        ("takes 112 mg", "12 mg", False),
        ("takes 12 mgs", "12 mg", False),
        ("(3.5%)", "3.5%", True),
        ("345", "3.5", False),
        ("on 2024-01-05.", "2024-01-05", True),
        ("ID_77", "77", False),
        ("", "x", False),
    ],
)
def test_details_are_whole_words_whatever_case_and_space(text: str, detail: str, found: bool) -> None:
    assert details_found(text, [detail]) == ([detail] if found else [])


def test_details_come_back_as_given_and_in_order() -> None:
    assert details_found("b then A", ["a", "c", "B"]) == ["a", "B"]
