"""Questions with options: labelled records, MedQA, PubMedQA, and any JSON lines with options.

Every form becomes a prompt, its options and the number of the right one. Where options are to be known to answer at all, the prompt lists them.
Left out: questions with several right options, and forms other than JSON (one object a line, one list, or PubMedQA's object of objects).
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from raysim.data.files import json_items, read_any_text
from raysim.data.records import Record
from raysim.data.values import kind_of, listed, text_of

logger = logging.getLogger(__name__)

Fields = dict[str, Any]


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt, the texts that may be its answer, and which of them (from 0) is right."""

    prompt: str
    options: tuple[str, ...]
    answer: int
    history: tuple[tuple[str, str], ...] = ()
    """Turns before the prompt, as `Record.history`."""


def labelled_questions(records: Sequence[Record]) -> tuple[list[ChoiceQuestion], tuple[str, ...]]:
    """The records as questions whose options are the labels' words, and the labels in the options' order.

    A label's word is spelled as the responses that begin with it most often spell it.
    Errors: ValueError for fewer than two labels, or a response that does not begin with its record's label.
    """
    labels = tuple(sorted({record.label for record in records}))
    if len(labels) < 2:
        raise ValueError(f"data: labels are {', '.join(map(repr, labels)) or 'none'}; a labelled set has at least two")
    spellings: dict[str, Counter[str]] = {label: Counter() for label in labels}
    for record in records:
        word = record.response[: len(record.label)]
        if not record.label or word.lower() != record.label.lower():
            raise ValueError(
                f"data: record {record.record_id} has the label {record.label!r}, but its response begins with {record.response[:30]!r}; "
                "accuracy by label needs responses that begin with their label"
            )
        spellings[record.label][word] += 1
    options = tuple(spellings[label].most_common(1)[0][0] for label in labels)
    return [ChoiceQuestion(record.instruction, options, labels.index(record.label), record.history) for record in records], labels


def read_choices(path: Path, *, form: str) -> list[ChoiceQuestion]:
    """The questions of a file in one of FORMS, in its order.

    `medqa`: `question`, `options` (letters to texts, or a list of them, or of `key` and `value`), and `answer_idx` (a letter) or `answer`
    (an option's text). `pubmedqa`: `question`, `context` (texts under `contexts`) or `CONTEXTS`, and `final_decision` (yes, no or maybe).
    `options`: `question`, `options` or `choices` as above, and `answer` (a text, a letter, or a number from 0).

    Errors: ValueError naming the line (or entry) and the field.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is none of {', '.join(FORMS)}")
    questions = []
    try:
        for where, entry in _entries(str(path)):
            questions.append(_question(entry, where=where, form=form))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: holds no questions; give a file with at least one")
    return questions


def _question(entry: Any, *, where: str, form: str) -> ChoiceQuestion:
    try:
        if not isinstance(entry, dict):
            raise ValueError(f"is {kind_of(entry)}, not an object with fields")
        return FORMS[form](entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _entries(path: str) -> list[tuple[str, Any]]:
    """Every entry with the place where it stands: of an object of objects its name, else as `json_items` lists them."""
    text = read_any_text(path, say=lambda what: logger.warning("%s %s", path, what), remedy="give a .jsonl or .json file of questions")
    items = list(json_items(text, wanted=frozenset({"question", "QUESTION"})))
    whole = items[0][1] if len(items) == 1 else None
    if isinstance(whole, dict) and whole and all(isinstance(entry, dict) for entry in whole.values()):
        return [(f"entry {name!r}", entry) for name, entry in whole.items()]
    return items


def _medqa(entry: Fields) -> ChoiceQuestion:
    options = _options(entry, "options")
    field = "answer_idx" if "answer_idx" in entry else "answer"
    return _listed(_text(entry, "question"), options, _right(entry, field, options))


def _with_options(entry: Fields) -> ChoiceQuestion:
    options = _options(entry, "choices" if "choices" in entry and "options" not in entry else "options")
    return _listed(_text(entry, "question"), options, _right(entry, "answer", options))


def _pubmedqa(entry: Fields) -> ChoiceQuestion:
    """The published file has its fields in capitals, copies of it in small letters."""
    question = _text(entry, "QUESTION" if "QUESTION" in entry else "question")
    field = "CONTEXTS" if "CONTEXTS" in entry else "context"
    context = entry.get(field)
    texts = context.get("contexts") if isinstance(context, dict) else context
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the field {field!r} must hold a list of texts")
    decisions = ("yes", "no", "maybe")
    decision = _text(entry, "final_decision").lower()
    if decision not in decisions:
        raise ValueError(f"the field 'final_decision' is {decision!r}, which is none of {', '.join(decisions)}")
    prompt = "\n".join(text_of(text, field=field) for text in texts) + f"\n\n{question}\nAnswer with one word: yes, no or maybe."
    return ChoiceQuestion(prompt, decisions, decisions.index(decision))


FORMS: dict[str, Callable[[Fields], ChoiceQuestion]] = {"medqa": _medqa, "pubmedqa": _pubmedqa, "options": _with_options}


def _listed(question: str, options: dict[str, str], answer: int) -> ChoiceQuestion:
    """The question with its options listed below."""
    lines = "\n".join(f"{key}. {text}" for key, text in options.items())
    return ChoiceQuestion(f"{question}\n\n{lines}\n\nAnswer with the text of the right option.", tuple(options.values()), answer)


def _options(entry: Fields, field: str) -> dict[str, str]:
    """The options by their letters."""
    value = entry.get(field)
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(option, dict) for option in value):
        pairs = [(option.get("key"), option.get("value")) for option in value]
    elif isinstance(value, list) and len(value) <= len(ascii_uppercase):
        pairs = list(zip(ascii_uppercase, value, strict=False))
    else:
        raise ValueError(f"the field {field!r} must hold the options, as a list or by letters")
    texts = [text_of(text, field=field) if isinstance(text, str) else "" for _, text in pairs]
    if len(pairs) < 2 or not all(texts) or not all(isinstance(key, str) for key, _ in pairs):
        raise ValueError(f"the field {field!r} must hold at least two options, each a text")
    options = dict(zip((key for key, _ in pairs), texts, strict=True))
    if len(options) < len(pairs) or len(set(texts)) < len(texts):
        raise ValueError(f"the field {field!r} has two options that are the same")
    return options


def _right(entry: Fields, field: str, options: dict[str, str]) -> int:
    """Which option `field` names: by its text, its letter, or its number from 0."""
    value = entry.get(field)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return value
    name = value.strip() if isinstance(value, str) else None
    texts = [] if field == "answer_idx" else list(options.values())
    found = {known.index(name) for known in (texts, list(options)) if name in known}
    if len(found) != 1:
        how = "names none of the options" if not found else "is the text of one option and the letter of another of"
        raise ValueError(f"the field {field!r} is {value!r}, which {how} {', '.join(options)}")
    return found.pop()


def _text(entry: Fields, field: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {field!r} must hold a text; the entry has {listed(entry) or 'no fields'}")
    return text_of(value, field=field)
