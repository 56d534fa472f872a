"""Two-sided comparison: an answer against a reference answer, judged twice with the order swapped, and what to make of it.

A judge sees two answers in some order and scores each of them from 1 to 5 on four criteria (PPFedIT, ACM TIST 17(5), 2026,
section 4.1); everything else is done here. How the two orders are combined is not published; here each side's scores are averaged over
them, and sides with equal averages tie. How far a judge agrees with itself when the order is swapped is part of the result.
Left out: comparing more than two answers at once, and several judges.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from raysim.privacy.audit_bounds import clopper_pearson

CRITERIA = ("helpfulness", "relevance", "correctness", "coherence")
MIN_SCORE, MAX_SCORE = 1, 5
OUTCOMES = ("win", "tie", "lose")


@dataclass(frozen=True)
class Pair:
    """An answer to an instruction, and the reference answer that it is compared with."""

    instruction: str
    answer: str
    reference: str


@dataclass(frozen=True)
class Question:
    """An instruction and two answers, in the order in which a judge reads them."""

    instruction: str
    first: str
    second: str


@dataclass(frozen=True)
class Ratings:
    """A judge's scores of the first and the second answer, one for each of CRITERIA."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.first) == len(self.second) == len(CRITERIA), self
        assert all(MIN_SCORE <= score <= MAX_SCORE for score in (*self.first, *self.second)), self


class Judge(Protocol):
    """Who scores two answers."""

    def rate(self, questions: Sequence[Question]) -> list[Ratings | None]:
        """The ratings of each question, in order; None where the judge said nothing that can be read as such."""


@dataclass(frozen=True)
class Judgement:
    """What a judge said of a pair: with the answer read first, and with the answer read second; None where that was unreadable."""

    pair: Pair
    answer_first: Ratings | None
    answer_second: Ratings | None

    @property
    def by_order(self) -> tuple[str | None, str | None]:
        """How the answer does in either order on its own: `win`, `tie`, `lose`, or None where that judgement is missing."""
        first, second = self.answer_first, self.answer_second
        return (
            None if first is None else _outcome(first.first, first.second),
            None if second is None else _outcome(second.second, second.first),
        )

    @property
    def scores(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The scores of the answer and of the reference, each the four of one order and the four of the other; None if one is missing."""
        first, second = self.answer_first, self.answer_second
        if first is None or second is None:
            return None
        return first.first + second.second, first.second + second.first

    @property
    def outcome(self) -> str | None:
        """How the answer does over both orders: `win`, `tie`, `lose`, or None where one of them is missing."""
        return None if self.scores is None else _outcome(*self.scores)


def judge_pairs(pairs: Sequence[Pair], judge: Judge) -> list[Judgement]:
    """Every pair as the judge sees it in both orders."""
    swapped = [Question(pair.instruction, pair.reference, pair.answer) for pair in pairs]
    ratings = judge.rate([Question(pair.instruction, pair.answer, pair.reference) for pair in pairs] + swapped)
    assert len(ratings) == 2 * len(pairs), (len(ratings), len(pairs))
    return [Judgement(*judged) for judged in zip(pairs, ratings[: len(pairs)], ratings[len(pairs) :], strict=True)]


def summarise(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Win, tie and lose with counts and shares of the judged pairs, mean scores, the judge's agreement with itself, and its leaning.

    A pair counts as judged if both orders could be read; `num_unparsed` counts the others. `win_tie_interval` is the 95% interval of
    Clopper and Pearson. `self_agreement`: the share of judged pairs in which both orders name the same winner (or a tie), and Cohen's
    kappa of the two orders over win, tie and lose: 1 is perfect, 0 what chance gives, None if both orders always say one and the same.
    `position`: of all readable judgements, the shares that prefer the answer read first, neither, and the one read second, and by how much
    the first leads in the mean of its scores. `num_different` of `num_readings` readable judgements have scores of their own: a judge
    that says one and the same of everything ties all pairs, agrees with itself, and tells nothing. Shares and means are None where
    there is nothing to count.
    """
    outcomes = [judgement.outcome for judgement in judgements if judgement.outcome is not None]
    readings = _readings(judgements)
    counts = Counter(outcomes)
    num_good = counts["win"] + counts["tie"]
    return {
        "num_pairs": len(judgements),
        "num_judged": len(outcomes),
        "num_unparsed": len(judgements) - len(outcomes),
        **{f"num_{name}": counts[name] for name in OUTCOMES},
        **{name: _share(counts[name], len(outcomes)) for name in OUTCOMES},
        "win_tie": _share(num_good, len(outcomes)),
        "win_tie_interval": list(clopper_pearson(num_good, len(outcomes))) if outcomes else None,
        "scores": _mean_scores(judgements),
        "self_agreement": _self_agreement(judgements),
        "position": _position(readings),
        "num_readings": len(readings),
        "num_different": len(set(readings)),
    }


def in_words(summary: dict[str, Any]) -> str:
    """A summary in three sentences: how the answers did, how far the judge agrees with itself, and how much it had to say."""
    if not summary["num_judged"]:
        return f"None of {summary['num_pairs']} pairs could be judged: no reply could be read."
    agreement, position = summary["self_agreement"], summary["position"]
    kappa = "not defined" if agreement["cohen_kappa"] is None else f"{agreement['cohen_kappa']:.2f}"
    low, high = summary["win_tie_interval"]
    unread = f" ({summary['num_unparsed']} more could not be read)" if summary["num_unparsed"] else ""
    return (
        f"Win+tie {summary['win_tie']:.1%} (95% interval {low:.1%} to {high:.1%}): {summary['num_win']} won, {summary['num_tie']} tied, "
        f"{summary['num_lose']} lost of {summary['num_judged']} pairs{unread}. With the order swapped the judge names the same winner in "
        f"{agreement['share']:.1%} of them (Cohen's kappa {kappa}; 0 is chance); it prefers what it reads first {position['first']:.1%} "
        f"of the time and what it reads second {position['second']:.1%}. {_variety(summary)}"
    )


def _variety(summary: dict[str, Any]) -> str:
    different, readings = summary["num_different"], summary["num_readings"]
    if different == 1 < readings:
        return f"It gave the same scores in all {readings} readings: its verdicts say nothing."
    return f"Sets of scores in {readings} readings: {different}."


def judgement_rows(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The judgements as JSON objects: the pair, the scores in either order, and the outcome."""
    return [
        {
            "instruction": judgement.pair.instruction,
            "answer": judgement.pair.answer,
            "reference": judgement.pair.reference,
            "answer_first": _as_json(judgement.answer_first, names=("answer", "reference")),
            "answer_second": _as_json(judgement.answer_second, names=("reference", "answer")),
            "by_order": list(judgement.by_order),
            "outcome": judgement.outcome,
        }
        for judgement in judgements
    ]


def _as_json(ratings: Ratings | None, *, names: tuple[str, str]) -> dict[str, dict[str, float]] | None:
    if ratings is None:
        return None
    return {name: dict(zip(CRITERIA, side, strict=True)) for name, side in zip(names, (ratings.first, ratings.second), strict=True)}


def _outcome(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Who has the higher mean; exact, since both sides have as many scores and `fsum` rounds once, whatever their order."""
    assert len(ours) == len(theirs), (ours, theirs)
    own, other = math.fsum(ours), math.fsum(theirs)
    return "win" if own > other else "lose" if own < other else "tie"


def _share(count: int, total: int) -> float | None:
    return count / total if total else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _mean_scores(judgements: Sequence[Judgement]) -> dict[str, dict[str, float | None]]:
    """Mean score of the answers and of the references over judged pairs and both orders: overall, and by criterion."""
    judged = [judgement.scores for judgement in judgements if judgement.scores is not None]
    result: dict[str, dict[str, float | None]] = {}
    for side, name in enumerate(("answer", "reference")):
        columns = {key: [row for scores in judged for row in scores[side][i :: len(CRITERIA)]] for i, key in enumerate(CRITERIA)}
        result[name] = {"overall": _mean([score for scores in judged for score in scores[side]])}
        result[name] |= {key: _mean(column) for key, column in columns.items()}
    return result


def _self_agreement(judgements: Sequence[Judgement]) -> dict[str, float | None]:
    orders = [judgement.by_order for judgement in judgements if None not in judgement.by_order]
    share = _share(sum(a == b for a, b in orders), len(orders))
    if share is None:
        return {"share": None, "cohen_kappa": None}
    first, second = (Counter(column) for column in zip(*orders, strict=True))
    by_chance = sum(first[name] * second[name] for name in OUTCOMES) / len(orders) ** 2
    return {"share": share, "cohen_kappa": None if by_chance == 1.0 else (share - by_chance) / (1.0 - by_chance)}


def _readings(judgements: Sequence[Judgement]) -> list[Ratings]:
    return [ratings for judgement in judgements for ratings in (judgement.answer_first, judgement.answer_second) if ratings is not None]


def _position(readings: Sequence[Ratings]) -> dict[str, float | None]:
    counts = Counter(_outcome(ratings.first, ratings.second) for ratings in readings)
    leads = [(math.fsum(ratings.first) - math.fsum(ratings.second)) / len(CRITERIA) for ratings in readings]
    return {
        "first": _share(counts["win"], len(readings)),
        "neither": _share(counts["tie"], len(readings)),
        "second": _share(counts["lose"], len(readings)),
        "mean_lead_of_first": _mean(leads),
    }
