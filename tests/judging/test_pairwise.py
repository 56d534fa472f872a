"""Two-sided judging: known judges have known outcomes, and a judge's faults show in its agreement with itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from raysim.judging.pairwise import (
    CRITERIA,
    Judgement,
    Pair,
    Question,
    Ratings,
    in_words,
    judge_pairs,
    judgement_rows,
    summarise,
)

Scores = tuple[float, float, float, float]


def even(score: float) -> Scores:
    return (score, score, score, score)


@dataclass
class ByLength:
    """Scores an answer by its length in characters, and adds to the one it reads first."""

    lead: float = 0.0

    def rate(self, questions: Sequence[Question]) -> list[Ratings | None]:
        """Shortest answers have the lowest scores."""
        return [Ratings(even(1.0 + len(q.first) + self.lead), even(1.0 + len(q.second))) for q in questions]


@dataclass
class Told:
    """Says what it was told, in the order of the questions."""

    ratings: list[Ratings | None]

    def rate(self, questions: Sequence[Question]) -> list[Ratings | None]:
        """The ratings given."""
        assert len(questions) == len(self.ratings)
        return self.ratings


PAIRS = [Pair("i", "aa", "b"), Pair("i", "a", "b"), Pair("i", "", "bb"), Pair("i", "", "b")]


def test_a_fair_judge_is_followed_and_agrees_with_itself() -> None:
    judged = judge_pairs(PAIRS, ByLength())
    assert [judgement.outcome for judgement in judged] == ["win", "tie", "lose", "lose"]
    summary = summarise(judged)
    assert (summary["num_win"], summary["num_tie"], summary["num_lose"], summary["num_unparsed"]) == (1, 1, 2, 0)
    assert (summary["win"], summary["tie"], summary["lose"], summary["win_tie"]) == (0.25, 0.25, 0.5, 0.5)
    assert summary["win_tie_interval"] == pytest.approx([0.0676, 0.9324], abs=1e-4), "published tables of exact limits for 2 of 4"
    assert summary["self_agreement"] == {"share": 1.0, "cohen_kappa": 1.0}
    assert summary["position"] == {"first": 0.375, "neither": 0.25, "second": 0.375, "mean_lead_of_first": 0.0}
    assert summary["scores"]["answer"] == {"overall": 1.75, **dict.fromkeys(CRITERIA, 1.75)}
    assert summary["scores"]["reference"] == {"overall": 2.25, **dict.fromkeys(CRITERIA, 2.25)}
    json.dumps(summary, allow_nan=False)


def test_a_leaning_to_the_first_cancels_in_the_outcome_and_shows_beside_it() -> None:
    judged = judge_pairs(PAIRS, ByLength(lead=1.5))
    assert [judgement.outcome for judgement in judged] == ["win", "tie", "lose", "lose"]
    assert [judgement.by_order for judgement in judged] == [("win", "lose"), ("win", "lose"), ("lose", "lose"), ("win", "lose")]
    summary = summarise(judged)
    assert summary["self_agreement"]["share"] == 0.25
    assert summary["self_agreement"]["cohen_kappa"] == pytest.approx(0.0)
    assert summary["position"] == {"first": 0.875, "neither": 0.0, "second": 0.125, "mean_lead_of_first": 1.5}


def test_a_judge_that_reads_nothing_but_the_order_is_worth_nothing() -> None:
    pairs = [Pair("i", "same", "size")] * 4
    summary = summarise(judge_pairs(pairs, Told([Ratings(even(5), even(1))] * 8)))
    assert (summary["tie"], summary["self_agreement"]["share"]) == (1.0, 0.0)
    assert summary["self_agreement"]["cohen_kappa"] == pytest.approx(0.0), "always the first: what chance would give"
    assert summary["position"]["first"] == 1.0
    alternating = [Ratings(even(5), even(1)), Ratings(even(1), even(5))] * 2
    worse = summarise(judge_pairs(pairs, Told(alternating + alternating)))
    assert worse["self_agreement"]["cohen_kappa"] == pytest.approx(-1.0), "the orders contradict each other"


def test_kappa_is_not_defined_where_all_is_one() -> None:
    summary = summarise(judge_pairs(PAIRS, Told([Ratings(even(3), even(3))] * 8)))
    assert summary["self_agreement"] == {"share": 1.0, "cohen_kappa": None}
    assert (summary["win_tie"], summary["num_different"], summary["num_readings"]) == (1.0, 1, 8)
    assert in_words(summary).endswith("It gave the same scores in all 8 readings: its verdicts say nothing.")


def test_the_criteria_are_averaged_and_both_orders_count_alike() -> None:
    """4 + 4 + 4 + 4 against 5 + 5 + 5 + 1 ties in one order; a quarter of a point in the other one decides."""
    told = Told([Ratings(even(4), (5, 5, 5, 1)), Ratings((5, 5, 5, 1), (4, 4, 4, 5))])
    [judged] = judge_pairs([Pair("i", "a", "b")], told)
    assert (judged.by_order, judged.outcome) == (("tie", "win"), "win")
    assert summarise([judged])["scores"]["answer"]["coherence"] == 4.5
    assert summarise([judged])["scores"]["reference"] == {
        "overall": 4.0,
        "helpfulness": 5,
        "relevance": 5,
        "correctness": 5,
        "coherence": 1,
    }


@given(st.lists(st.floats(1, 5), min_size=8, max_size=8), st.permutations(range(8)))
def test_equal_scores_tie_in_whatever_order_they_come(scores: list[float], order: list[int]) -> None:
    mixed = [scores[i] for i in order]
    first = Ratings(tuple(scores[:4]), tuple(mixed[:4]))
    second = Ratings(tuple(mixed[4:]), tuple(scores[4:]))
    assert Judgement(Pair("i", "a", "b"), first, second).outcome == "tie"


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3])), min_size=1, max_size=30))
def test_kappa_and_share_are_those_of_scikit_learn(signs: list[tuple[int, int]]) -> None:
    told = [Ratings(even(a), even(2)) for a, _ in signs] + [Ratings(even(2), even(b)) for _, b in signs]
    summary = summarise(judge_pairs([Pair("i", "a", "b")] * len(signs), Told(list(told))))
    first, second = zip(*signs, strict=True)
    assert summary["self_agreement"]["share"] == pytest.approx(np.mean(np.equal(first, second)))
    if len({*first, *second}) == 1:
        assert summary["self_agreement"]["cohen_kappa"] is None
    else:
        assert summary["self_agreement"]["cohen_kappa"] == pytest.approx(cohen_kappa_score(first, second))


def test_what_could_not_be_read_in_one_order_is_counted_and_left_out() -> None:
    good = Ratings(even(4), even(2))
    judged = judge_pairs(PAIRS, Told([good, None, good, None, good, good, None, None]))
    assert [judgement.outcome for judgement in judged] == ["tie", None, None, None]
    summary = summarise(judged)
    assert (summary["num_pairs"], summary["num_judged"], summary["num_unparsed"]) == (4, 1, 3)
    assert summary["position"]["first"] == 1.0, "single readings still show where the judge leans"
    assert (summary["num_different"], summary["num_readings"]) == (1, 4)
    assert "(3 more could not be read)" in in_words(summary)


def test_nothing_to_count_gives_no_figures() -> None:
    for judged in ([], judge_pairs(PAIRS, Told([None] * 8))):
        summary = summarise(judged)
        assert summary["win_tie"] is summary["win_tie_interval"] is summary["self_agreement"]["cohen_kappa"] is None
        assert summary["scores"]["answer"]["overall"] is summary["position"]["mean_lead_of_first"] is None
        assert in_words(summary).startswith("None of")
        json.dumps(summary, allow_nan=False)


def test_words_and_rows_say_what_the_figures_say() -> None:
    judged = judge_pairs(PAIRS, ByLength(lead=1.5))
    words = in_words(summarise(judged))
    assert "1 won, 1 tied, 2 lost of 4 pairs" in words
    assert words.endswith("Sets of scores in 8 readings: 7.")
    assert "same winner in 25.0% of them (Cohen's kappa 0.00" in words
    assert "first 87.5% of the time and what it reads second 12.5%" in words
    row = judgement_rows(judged)[0]
    assert row["answer_first"] == {"answer": dict.fromkeys(CRITERIA, 4.5), "reference": dict.fromkeys(CRITERIA, 2.0)}
    assert row["answer_second"] == {"reference": dict.fromkeys(CRITERIA, 3.5), "answer": dict.fromkeys(CRITERIA, 3.0)}
    assert (row["answer"], row["reference"], row["by_order"], row["outcome"]) == ("aa", "b", ["win", "lose"], "win")
    assert judgement_rows(judge_pairs(PAIRS[:1], Told([None, None])))[0]["answer_first"] is None
