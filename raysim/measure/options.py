"""Accuracy by likelihood: which of a question's options a model finds most likely as its response.

Nothing is generated, so nothing has to be parsed; all options of a question share one reading of its prompt. Options are compared by the
summed log-likelihood of their tokens, and by that per byte of their text, which does not punish long options and does not depend on the
tokenizer. The end of the response is not scored: an option may be the beginning of one.
Left out: few-shot prompts, and calibration by an empty prompt. Perplexity stands beside the held-out NLL in `evaluate`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from raysim.data.chat import ChatFormat
from raysim.data.choices import ChoiceQuestion
from raysim.data.tokens import encode_chat
from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.model.score import Branches, branch_nlls


def option_nlls(
    lm: LanguageModel, adapter: Vector, questions: Sequence[ChoiceQuestion], *, batch_size: int, chat: ChatFormat
) -> list[list[float]]:
    """The negative log-likelihood (nats) of each option of each question as the response, summed over its tokens. `adapter` stays loaded.

    Guarantees: in float32 neither `batch_size` nor the other questions and options change more than last bits.
    Errors: ValueError if a question with its longest option does not fit the model's context (see `check_fit`).
    """
    lm.set_adapter(adapter)
    rows = [_row(lm, question, chat=chat) for question in questions]
    return branch_nlls(lm, rows, batch_size=batch_size)


def check_fit(lm: LanguageModel, questions: Sequence[ChoiceQuestion], *, chat: ChatFormat) -> None:
    """Refuses questions that the model cannot read whole, so that a run does so before it starts.

    Errors: ValueError naming the first question that with its longest option does not fit the model's context.
    """
    for number, question in enumerate(questions, 1):
        num_tokens = _row(lm, question, chat=chat).longest
        if num_tokens > lm.max_positions:
            raise ValueError(
                f"question {number} ({question.prompt[:30]!r}...) takes {num_tokens} tokens with its longest option, but the model's context "
                f"is max_position_embeddings={lm.max_positions}; leave it out, shorten it, or take a model with a longer context"
            )


def _row(lm: LanguageModel, question: ChoiceQuestion, *, chat: ChatFormat) -> Branches:
    return Branches(
        prompt_ids=tuple(encode_chat(lm.tokenizer, [*question.history, ("user", question.prompt)], chat=chat)),
        branches=tuple(tuple(lm.tokenizer(option, add_special_tokens=False)["input_ids"]) for option in question.options),
    )


def choose(questions: Sequence[ChoiceQuestion], nlls: Sequence[Sequence[float]], *, per_byte: bool) -> list[int]:
    """The number of the likeliest option of each question, the first of equal ones; `per_byte` divides by the length of its text."""
    chosen = []
    for question, values in zip(questions, nlls, strict=True):
        lengths = [len(option.encode()) if per_byte else 1 for option in question.options]
        chosen.append(int(np.argmin([nll / length for nll, length in zip(values, lengths, strict=True)])))
    return chosen


def accuracy(chosen: Sequence[int], right: Sequence[int]) -> float:
    """The share of questions answered rightly."""
    assert len(chosen) == len(right) > 0, (len(chosen), len(right))
    return sum(a == b for a, b in zip(chosen, right, strict=True)) / len(right)


def macro_f1(chosen: Sequence[int], right: Sequence[int]) -> float:
    """The mean over classes of F1 = 2 hits / (times chosen + times right), each class counting alike; classes that are neither are left out."""
    assert len(chosen) == len(right) > 0, (len(chosen), len(right))
    classes = sorted({*chosen, *right})
    hits = {c: sum(a == b == c for a, b in zip(chosen, right, strict=True)) for c in classes}
    return sum(2 * hits[c] / (list(chosen).count(c) + list(right).count(c)) for c in classes) / len(classes)


def choice_figures(questions: Sequence[ChoiceQuestion], nlls: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Accuracy by summed likelihood and per byte, with what guessing among the options would give."""
    right = [question.answer for question in questions]
    return {
        "num_questions": len(questions),
        "accuracy": accuracy(choose(questions, nlls, per_byte=False), right),
        "accuracy_per_byte": accuracy(choose(questions, nlls, per_byte=True), right),
        "accuracy_by_chance": sum(1 / len(question.options) for question in questions) / len(questions),
    }


def label_figures(questions: Sequence[ChoiceQuestion], nlls: Sequence[Sequence[float]], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy and macro-F1 by summed likelihood of the labels' words, with what always saying the commonest label would give.

    `questions` and `labels` are those of `labelled_questions`; `chosen` counts how often each label was chosen.
    """
    right = [question.answer for question in questions]
    chosen = choose(questions, nlls, per_byte=False)
    commonest = max(range(len(labels)), key=right.count)
    return {
        "num_questions": len(questions),
        "accuracy": accuracy(chosen, right),
        "macro_f1": macro_f1(chosen, right),
        "accuracy_of_commonest": accuracy([commonest] * len(right), right),
        "macro_f1_of_commonest": macro_f1([commonest] * len(right), right),
        "chosen": {label: chosen.count(number) for number, label in enumerate(labels)},
    }
