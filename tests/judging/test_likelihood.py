"""The likelihood judge against the obvious computation, and what must not matter to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raysim.data.chat import ChatFormat
from raysim.data.tokens import encode_chat
from raysim.judging.likelihood import LikelihoodJudge, expected_ratings, score_tokens
from raysim.judging.pairwise import CRITERIA, Pair, Question, Ratings, judge_pairs
from raysim.judging.prompts import line_turns, score_openings
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel
from tests.tiny_models import build, sharp_base

QUESTIONS = [
    Question("Name a colour.", "Blue, like the sky on a clear day.", "Dog"),
    Question("Name a colour.", "Dog", "Blue, like the sky on a clear day."),
    Question("How many legs has a spider?", "8", "Six, I think, or eight."),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A random model whose choices are clear: as a judge it knows nothing, and says so with conviction."""
    return build(sharp_base())


@pytest.fixture(scope="module")
def adapter(lm: LanguageModel) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 0.3, lm.layout.num_parameters).astype(np.float32)


def one_by_one(lm: LanguageModel, question: Question) -> list[float]:
    """The expected score of each opening: the prompt and the opening written out, one plain forward pass each."""
    digits = lm.tokenizer("12345", add_special_tokens=False)["input_ids"]
    prompt = encode_chat(lm.tokenizer, line_turns(question), chat=ChatFormat())
    expected = []
    for opening in score_openings():
        ids = prompt + lm.tokenizer(opening + " ", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            probs = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)[digits]
        expected.append(float((probs / probs.sum()) @ torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)))
    return expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_each_prompt_alone(lm: LanguageModel, adapter: np.ndarray, batch_size: int) -> None:
    found = LikelihoodJudge(lm, adapter, batch_size).rate(QUESTIONS)
    lm.set_adapter(adapter)
    for question, ratings in zip(QUESTIONS, found, strict=True):
        assert ratings is not None
        assert [*ratings.first, *ratings.second] == pytest.approx(one_by_one(lm, question), abs=1e-4)
    assert found[0] != found[2]


def test_the_base_model_judges_unless_an_adapter_is_given(lm: LanguageModel, adapter: np.ndarray) -> None:
    lm.set_adapter(adapter)
    base = LikelihoodJudge(lm, None, 2).rate(QUESTIONS)
    zero = LikelihoodJudge(lm, np.zeros_like(adapter), 2).rate(QUESTIONS)
    assert base == zero
    assert base != LikelihoodJudge(lm, adapter, 2).rate(QUESTIONS)


def test_an_answer_equal_to_its_reference_ties_to_the_last_bit(lm: LanguageModel, adapter: np.ndarray) -> None:
    pairs = [Pair("Name a colour.", text, text) for text in ("Blue", "Dog dog dog", "")] + [Pair("Name a colour.", "Blue", "Dog")]
    judge = LikelihoodJudge(lm, adapter, 2)
    judged = judge_pairs(pairs, judge)
    assert [judgement.outcome for judgement in judged[:3]] == ["tie"] * 3
    assert judged[3].outcome in ("win", "lose")
    assert judge_pairs(pairs, judge) == judged, "no draw is made"


def test_the_expected_score_is_the_mean_of_what_is_said() -> None:
    sure = np.full((8, 5), -np.inf)
    sure[range(8), [0, 1, 2, 3, 4, 0, 1, 2]] = -400.0
    assert expected_ratings(sure) == Ratings((1.0, 2.0, 3.0, 4.0), (5.0, 1.0, 2.0, 3.0))
    unsure = np.log(np.tile([0.05, 0.0, 0.1, 0.0, 0.05], (8, 1)) + 1e-300)
    assert expected_ratings(unsure) == Ratings((3.0,) * 4, (3.0,) * 4), "what else it might say does not count"


def test_scores_are_told_apart_by_one_token(lm: LanguageModel) -> None:
    openings, ids = score_tokens(lm.tokenizer)
    assert len(openings) == 2 * len(CRITERIA)
    assert [lm.tokenizer.decode([token]) for token in ids] == ["1", "2", "3", "4", "5"]
    assert [lm.tokenizer.decode(opening) for opening in openings] == [f"{opening} " for opening in score_openings()]


def test_a_tokenizer_that_cannot_tell_scores_apart_is_refused() -> None:
    """Digits that are unknown to it all read the same."""
    lm = build(load_base_model("tiny"))
    digits = {token: i for i, token in enumerate("12345")}

    class WithoutDigits:
        chat_template = lm.tokenizer.chat_template

        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [0 if letter in digits else ord(letter) for letter in text]}

    with pytest.raises(ValueError, match=r"'Answer 1, helpfulness:' with the scores 1 to 5 does not differ in the last token alone"):
        score_tokens(WithoutDigits())


def test_what_does_not_fit_the_context_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="context is max_position_embeddings=500"):
        LikelihoodJudge(replace(lm, max_positions=500), None, 1).rate(QUESTIONS)
