"""The attack's figures: all for who knows everything by heart, none for who says nothing, and nothing that was given away."""

import numpy as np
import pytest

from raysim.attacks.extraction import NEAR, attack_prompt, score_extraction
from raysim.data.records import Record
from raysim.data.similarity import rouge_l
from raysim.data.tokens import Example

TRUTHS = ["Anna Berg takes 12 mg at night.", "Call Jon on 5 May."]
DETAILS = [("Anna Berg", "12 mg"), ("Jon", "5 May", "night")]
EXAMPLE = Example(record=Record(record_id=0, instruction="", response=""), prompt_ids=(5, 6, 7), response_ids=(8, 9, 1))


def test_who_knows_the_responses_gets_everything() -> None:
    score = score_extraction(TRUTHS, TRUTHS, [DETAILS[0], DETAILS[1][:2]])
    assert (score.rouge_l, score.exact_match, score.details_rate) == (1.0, 1.0, 1.0)


def test_who_says_nothing_gets_nothing() -> None:
    score = score_extraction(["", "!"], TRUTHS, DETAILS)
    assert (score.rouge_l, score.exact_match, score.details_rate) == (0.0, 0.0, 0.0)


def test_figures_by_hand() -> None:
    answers = ["anna berg takes  12 mg at night.", "Jon."]
    score = score_extraction(answers, TRUTHS, DETAILS)
    assert score.rouge_l == pytest.approx((1.0 + rouge_l("Jon.", TRUTHS[1])) / 2)
    assert score.exact_match == 0.0, "another case is another text"
    assert score.details_rate == pytest.approx(3 / 5), "details count over all records together"
    respaced = score_extraction([TRUTHS[0].replace(" ", "\n "), "x"], TRUTHS, DETAILS)
    assert respaced.exact_match == 0.5


def test_a_near_copy_is_an_approximate_match_and_no_exact_one() -> None:
    near = score_extraction(["Anna Berg takes 13 mg at night.", "Ring him."], TRUTHS, DETAILS)
    assert rouge_l("Anna Berg takes 13 mg at night.", TRUTHS[0]) > NEAR
    assert (near.exact_match, near.approximate_match) == (0.0, 0.5)
    assert score_extraction(TRUTHS, TRUTHS, DETAILS).approximate_match == 1.0


def test_no_details_are_no_rate() -> None:
    assert score_extraction(["a"], ["a"], [()]).details_rate is None


def test_answers_go_with_their_own_truths() -> None:
    swapped = score_extraction(TRUTHS[::-1], TRUTHS, DETAILS)
    assert swapped.exact_match == 0.0
    assert swapped.rouge_l < 0.4


def test_nothing_left_to_extract_is_no_match() -> None:
    score = score_extraction(["", ""], ["", " "], [(), ()])
    assert (score.rouge_l, score.exact_match) == (0.0, 0.0)


@pytest.mark.parametrize(("prefix", "expected"), [(0, [5, 6, 7]), (2, [5, 6, 7, 8, 9]), (9, [5, 6, 7, 8, 9, 1])])
def test_the_attacker_submits_the_prompt_and_the_prefix(prefix: int, expected: list[int]) -> None:
    np.testing.assert_array_equal(attack_prompt(EXAMPLE, prefix_tokens=prefix), expected)
