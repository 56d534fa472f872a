"""Known data sets: the names of their fields, how their instructions are put, and how their responses are read."""

import math
from collections.abc import Callable
from dataclasses import dataclass


def _by_number(words: dict[str, str]) -> Callable[[str], str]:
    """Reads a class number or an already spelled label."""

    def read(value: str) -> str:
        word = words.get(value, value.lower())
        if word not in words.values():
            raise ValueError(f"{value!r} is none of {', '.join([*words, *words.values()])}")
        return word

    return read


def _by_score(value: str) -> str:
    """FiQA's score in [-1, 1] as a word, neutral within 0.1 of zero (or an already spelled label)."""
    if value.lower() in ("negative", "neutral", "positive"):
        return value.lower()
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not -1 <= score <= 1:
        raise ValueError(f"{value!r} is neither a score in [-1, 1] nor negative, neutral or positive")
    return "neutral" if abs(score) < 0.1 else "positive" if score > 0 else "negative"


@dataclass(frozen=True)
class Preset:
    """Field names of a known set; where releases of the set differ, the names are alternatives and the first present one counts."""

    instruction: tuple[str, ...]
    response: tuple[str, ...]
    input: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    empty_input: tuple[str, ...] = ("",)
    """Spellings of an input that is not there."""
    ask: str = "{}"
    """How the instruction is put; `{}` stands for the field's text."""
    read_response: Callable[[str], str] = str
    """Turns the response field into words."""
    remedy: str = ""
    """What to do where the response field is missing."""

    def names(self, role: str) -> tuple[str, ...]:
        """The names of the field with that role: input, label, details or group."""
        return {"input": self.input, "label": self.label, "details": self.details, "group": self.group}[role]

    @property
    def opening(self) -> str:
        """What stands before the field's text in every instruction."""
        return self.ask.partition("{}")[0]

    @property
    def labelled(self) -> bool:
        """Whether a response is its label and nothing else."""
        return self.label == self.response


_SENTIMENT = "What is the sentiment of this {kind} for an investor? Answer with one word: negative, neutral or positive.\n\n{{}}"

PRESETS: dict[str, Preset] = {
    "alpacare": Preset(
        instruction=("instruction",),
        input=("input",),
        response=("output",),
        empty_input=("", "<noinput>"),
        remedy="the seed file has no outputs: use the 52k set (MedInstruct-52k), or MedInstruct-test with data.preset=medinstruct",
    ),
    "medinstruct": Preset(
        instruction=("instruction",),
        response=("gpt-4-answer",),
        label=("difficulty",),
        remedy="the seed file has no outputs: use MedInstruct-test.jsonl, or the 52k set with data.preset=alpacare",
    ),
    "medquad": Preset(
        instruction=("question",),
        response=("answer",),
        label=("collection", "document_source"),
        group=("focus", "question_focus"),
        remedy="MedQuAD's three MedlinePlus collections are published without answers: leave them out",
    ),
    "icliniq": Preset(
        instruction=("input",),
        response=("answer_icliniq", "output"),
        remedy="use the file of iCliniq-10k whose answers were written by doctors",
    ),
    "fpb": Preset(
        instruction=("sentence",),
        response=("label",),
        label=("label",),
        ask=_SENTIMENT.format(kind="sentence from the financial news"),
        read_response=_by_number({"0": "negative", "1": "neutral", "2": "positive"}),
    ),
    "fiqa": Preset(
        instruction=("sentence",),
        response=("sentiment_score", "score", "label"),
        label=("sentiment_score", "score", "label"),
        ask=_SENTIMENT.format(kind="headline or post"),
        read_response=_by_score,
    ),
    "tfns": Preset(
        instruction=("text",),
        response=("label",),
        label=("label",),
        ask=_SENTIMENT.format(kind="post on financial news"),
        read_response=_by_number({"0": "negative", "1": "positive", "2": "neutral"}),
    ),
    "dolly": Preset(instruction=("instruction",), input=("context",), response=("response",), label=("category",)),
    "alpaca": Preset(instruction=("instruction",), input=("input",), response=("output",)),
}
