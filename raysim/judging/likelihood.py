"""A judge that is a local causal model: of its verdicts it is asked how likely they are, not to write them down.

For each answer and criterion the model's probabilities of the scores 1 to 5, in the place where a score belongs, give an expected
score. Nothing has to be parsed, a model too weak to keep to a form can be asked all the same, and how weak it is shows in how far it
agrees with itself when the answers are swapped.
Left out: verdicts in words, and calibration by the scores of empty answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysim.data.chat import ChatFormat
from raysim.data.tokens import encode_chat
from raysim.judging.pairwise import CRITERIA, MAX_SCORE, MIN_SCORE, Question, Ratings
from raysim.judging.prompts import line_turns, score_openings
from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.model.score import Branches, next_token_logprobs

SCORES = range(MIN_SCORE, MAX_SCORE + 1)


@dataclass(frozen=True)
class LikelihoodJudge:
    """A `Judge` that is a local model. `adapter` is None for the base model itself; it stays loaded after a call.

    Guarantees: no draw is made; equal questions get equal ratings to the last bit, so that an answer equal to its reference ties; in float32
    `batch_size` and the other questions move a score by no more than last bits.
    """

    lm: LanguageModel
    adapter: Vector | None
    batch_size: int

    def rate(self, questions: Sequence[Question]) -> list[Ratings | None]:
        """The expected scores of each question, in order.

        Errors: ValueError if a question does not fit the model's context, or its tokenizer does not tell scores apart by one token.
        """
        base = np.zeros(self.lm.layout.num_parameters, dtype=np.float32)
        self.lm.set_adapter(base if self.adapter is None else self.adapter)
        openings, score_ids = score_tokens(self.lm.tokenizer)
        unique = list(dict.fromkeys(questions))
        rows = [Branches(_prompt_ids(self.lm.tokenizer, question), openings) for question in unique]
        logprobs = next_token_logprobs(self.lm, rows, score_ids, batch_size=self.batch_size)
        ratings = {question: expected_ratings(found) for question, found in zip(unique, logprobs, strict=True)}
        return [ratings[question] for question in questions]


def expected_ratings(logprobs: "np.ndarray[Any, np.dtype[np.float64]]") -> Ratings:
    """The mean score under the model's probabilities of the five scores, given that it says one of them; `logprobs` is (8, 5)."""
    probs = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    expected = (probs @ np.array(SCORES, dtype=np.float64) / probs.sum(axis=1)).clip(MIN_SCORE, MAX_SCORE).tolist()
    return Ratings(first=tuple(expected[: len(CRITERIA)]), second=tuple(expected[len(CRITERIA) :]))


def score_tokens(tokenizer: Any) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """What a reply has before each score, as token ids (a space may belong to it), and the five tokens by which scores differ.

    Errors: ValueError if the scores do not differ in their last token alone.
    """
    openings: list[tuple[int, ...]] = []
    last: set[tuple[int, ...]] = set()
    for opening in score_openings():
        written = [tuple(tokenizer(f"{opening} {score}", add_special_tokens=False)["input_ids"]) for score in SCORES]
        if len({ids[:-1] for ids in written}) != 1 or len({ids[-1] for ids in written}) != len(SCORES):
            raise ValueError(f"tokenizer: {opening!r} with the scores {MIN_SCORE} to {MAX_SCORE} does not differ in the last token alone")
        openings.append(written[0][:-1])
        last.add(tuple(ids[-1] for ids in written))
    if len(last) != 1:
        raise ValueError("tokenizer: a score is another token after other words; take a judge with another tokenizer")
    return tuple(openings), last.pop()


def _prompt_ids(tokenizer: Any, question: Question) -> tuple[int, ...]:
    return tuple(encode_chat(tokenizer, line_turns(question), chat=ChatFormat()))
