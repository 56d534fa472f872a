"""Accuracy by likelihood against one plain forward pass an option, and F1 against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from raysim.data.chat import ChatFormat
from raysim.data.choices import ChoiceQuestion, labelled_questions
from raysim.data.records import Record
from raysim.data.tokens import encode_chat
from raysim.measure.options import accuracy, choice_figures, choose, label_figures, macro_f1, option_nlls
from raysim.model.language_model import LanguageModel
from tests.tiny_models import build, encode, learn_by_heart, sharp_base

QUESTIONS = [
    ChoiceQuestion("Which colour has the sky?", ("blue", "green, mostly", "red"), 0),
    ChoiceQuestion("Is it so? Answer yes or no.", ("yes", "no"), 1),
    ChoiceQuestion("Which colour has grass in spring, after rain?", ("blue", "green", "it is red or brown", "é"), 1),
]
CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base(), rank=8)


@pytest.fixture(scope="module")
def adapter(lm: LanguageModel) -> np.ndarray:
    return np.random.default_rng(2).normal(0, 0.2, lm.layout.num_parameters).astype(np.float32)


def one_by_one(lm: LanguageModel, question: ChoiceQuestion, *, chat: ChatFormat) -> list[float]:
    """The summed NLL of each option after the prompt, in a forward pass of its own."""
    prompt = encode_chat(lm.tokenizer, [("user", question.prompt)], chat=chat)
    nlls = []
    for option in question.options:
        ids = lm.tokenizer(option, add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + ids])
        with torch.no_grad():
            nlls.append(float(lm.model(input_ids=torch.tensor([prompt + ids]), labels=labels).loss) * len(ids))
    return nlls


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("chat", [ChatFormat(), ChatFormat("Be brief.")])
def test_likelihoods_are_those_of_each_option_alone(lm: LanguageModel, adapter: np.ndarray, batch_size: int, chat: ChatFormat) -> None:
    found = option_nlls(lm, adapter, QUESTIONS, batch_size=batch_size, chat=chat)
    for question, nlls in zip(QUESTIONS, found, strict=True):
        assert nlls == pytest.approx(one_by_one(lm, question, chat=chat), rel=1e-4)
    assert lm.get_adapter().tolist() == adapter.tolist()


def test_who_learnt_the_labels_by_heart_has_them_all(lm: LanguageModel) -> None:
    texts = [("Profit is up", "good: more"), ("Loss again", "bad: less"), ("A date is set", "none: a date"), ("Sales grow", "good: sales")]
    records = [Record(i, text, response, label=response.split(":")[0]) for i, (text, response) in enumerate(texts)]
    questions, labels = labelled_questions(records)
    assert labels == ("bad", "good", "none")
    adapter = learn_by_heart(lm, encode(lm, records))
    figures = label_figures(questions, option_nlls(lm, adapter, questions, batch_size=2, chat=ChatFormat()), labels)
    assert figures == {
        "num_questions": 4,
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "accuracy_of_commonest": 0.5,
        "macro_f1_of_commonest": pytest.approx(2 / 3 / 3),
        "chosen": {"bad": 1, "good": 2, "none": 1},
    }
    wrong = [replace(question, answer=(question.answer + 1) % 3) for question in questions]
    nlls = option_nlls(lm, adapter, wrong, batch_size=2, chat=ChatFormat())
    assert label_figures(wrong, nlls, labels)["accuracy"] == choice_figures(wrong, nlls)["accuracy"] == 0.0


def test_long_options_are_not_punished_per_byte() -> None:
    """Options of 4, 13 and 3 bytes; the last question's `é` has two."""
    nlls = [[4.0, 6.5, 4.5], [3.0, 2.0], [9.0, 9.5, 9.9, 9.0]]
    assert choose(QUESTIONS, nlls, per_byte=False) == [0, 1, 0]
    assert choose(QUESTIONS, nlls, per_byte=True) == [1, 0, 2]
    assert choose(QUESTIONS[2:], [[9.0, 9.5, 19.9, 2.0]], per_byte=True) == [3]
    assert choose(QUESTIONS[2:], [[9.0, 11.25, 99.0, 4.5]], per_byte=True) == [0], "of equal ones the first"
    assert choice_figures(QUESTIONS, nlls) == {
        "num_questions": 3,
        "accuracy": pytest.approx(2 / 3),
        "accuracy_per_byte": 0.0,
        "accuracy_by_chance": pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3),
    }


@given(CLASSES)
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    chosen, right = (list(column) for column in zip(*pairs, strict=True))
    assert accuracy(chosen, right) == pytest.approx(accuracy_score(right, chosen))
    assert macro_f1(chosen, right) == pytest.approx(f1_score(right, chosen, average="macro", zero_division=0))


def test_a_question_that_does_not_fit_is_refused(lm: LanguageModel, adapter: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"rows\[2\] takes .* tokens, but the model's context is max_position_embeddings=60"):
        option_nlls(replace(lm, max_positions=60), adapter, QUESTIONS, batch_size=1, chat=ChatFormat())
