"""How alike two texts are: ROUGE-L, and which private details a text gives away."""

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer  # 70 MB with what it imports, and most workers never score

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F-measure in [0, 1] between two texts; Lin (2004), as the package rouge-score computes it."""
    return float(_scorer().score(reference, candidate)["rougeL"].fmeasure)


def largest_rouge_l(candidate: str, references: Sequence[str]) -> float:
    """The largest ROUGE-L of `candidate` with any of `references`; 0 if there are none."""
    return max((rouge_l(candidate, reference) for reference in references), default=0.0)


def details_found(text: str, details: Sequence[str]) -> list[str]:
    """The private details that occur in `text` as whole words, whatever their case and spacing."""
    folded = _fold(text)
    return [detail for detail in details if re.search(rf"(?<!\w){re.escape(_fold(detail))}(?!\w)", folded)]


def _fold(text: str) -> str:
    return " ".join(text.lower().split())
