"""Questions with options: every form gives the same question, and what is wrong with a file is named by line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from raysim.config import DataConfig
from raysim.data.choices import ChoiceQuestion, labelled_questions, read_choices
from raysim.data.records import Record
from raysim.data.sources import BUILTIN, read_source

LISTED = ChoiceQuestion(
    "Which vitamin is missing in scurvy?\n\nA. Vitamin A\nB. Vitamin B12\nC. Vitamin C\n\nAnswer with the text of the right option.",
    ("Vitamin A", "Vitamin B12", "Vitamin C"),
    2,
)
QUESTION = {"question": "Which vitamin is missing in scurvy?"}
TEXTS = ["Vitamin A", "Vitamin B12", "Vitamin C"]
BY_LETTER = dict(zip("ABC", TEXTS, strict=True))
PUBMED = {"QUESTION": "Does it help?", "CONTEXTS": ["It was tried.", "It helped."], "final_decision": "yes", "LONG_ANSWER": "It does."}
PUBMED_ASKED = ChoiceQuestion(
    "It was tried.\nIt helped.\n\nDoes it help?\nAnswer with one word: yes, no or maybe.", ("yes", "no", "maybe"), 0
)


def written(tmp_path: Path, *entries: Any) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize(
    ("form", "entry"),
    [
        ("medqa", {**QUESTION, "options": BY_LETTER, "answer": "Vitamin C", "answer_idx": "C", "meta_info": "step1"}),
        ("medqa", {**QUESTION, "options": BY_LETTER, "answer": "Vitamin C"}),
        ("medqa", {**QUESTION, "options": [{"key": k, "value": v} for k, v in BY_LETTER.items()], "answer_idx": "C"}),
        ("options", {**QUESTION, "options": TEXTS, "answer": "Vitamin C"}),
        ("options", {**QUESTION, "options": TEXTS, "answer": " C "}),
        ("options", {**QUESTION, "choices": TEXTS, "answer": 2}),
        ("options", {**QUESTION, "options": BY_LETTER, "answer": 2}),
    ],
)
def test_every_form_gives_the_same_question(tmp_path: Path, form: str, entry: dict[str, Any]) -> None:
    assert read_choices(written(tmp_path, entry), form=form) == [LISTED]


def test_pubmedqa_is_read_as_it_was_published_and_as_it_is_copied(tmp_path: Path) -> None:
    published = tmp_path / "ori_pqal.json"
    published.write_text(json.dumps({"21645374": PUBMED, "16418930": PUBMED | {"final_decision": "maybe"}}, indent=4))
    found = read_choices(published, form="pubmedqa")
    assert found[0] == PUBMED_ASKED
    assert found[1].answer == 2
    copied = {"pubid": 1, "question": "Does it help?", "context": {"contexts": PUBMED["CONTEXTS"]}, "final_decision": "Yes"}
    assert read_choices(written(tmp_path, copied), form="pubmedqa") == [PUBMED_ASKED]


def test_one_list_and_lines_between_empty_ones_are_read_alike(tmp_path: Path) -> None:
    entry = {**QUESTION, "options": TEXTS, "answer": 2}
    path = tmp_path / "q.json"
    for text in (json.dumps([entry, entry]), f"\n{json.dumps(entry)}\n\n{json.dumps(entry)}\n", f"\ufeff{json.dumps([entry, entry])}"):
        path.write_text(text, encoding="utf-8")
        assert read_choices(path, form="options") == [LISTED, LISTED]


GOOD = {**QUESTION, "options": TEXTS, "answer": 2}


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("options", {"question": ""}, "the field 'question' must hold a text; the entry has question, options, answer"),
        ("options", {"question": 5}, "the field 'question' must hold a text"),
        ("options", {"options": None}, "the field 'options' must hold the options, as a list or by letters"),
        ("options", {"options": "A B C"}, "the field 'options' must hold the options"),
        ("options", {"options": ["one"]}, "the field 'options' must hold at least two options"),
        ("options", {"options": ["one", ""]}, "the field 'options' must hold at least two options, each a text"),
        ("options", {"options": ["one", 2]}, "the field 'options' must hold at least two options, each a text"),
        ("options", {"options": ["one", "one "]}, "the field 'options' has two options that are the same"),
        ("options", {"options": [{"key": "A", "value": "x"}, {"key": "A", "value": "y"}]}, "has two options that are the same"),
        ("options", {"answer": 3}, "the field 'answer' is 3, which names none of the options A, B, C"),
        ("options", {"answer": -1}, "the field 'answer' is -1, which names none"),
        ("options", {"answer": True}, "the field 'answer' is True, which names none"),
        ("options", {"answer": "Vitamin D"}, "the field 'answer' is 'Vitamin D', which names none"),
        ("options", {"options": ["B", "x"], "answer": "B"}, "is the text of one option and the letter of another of A, B"),
        ("medqa", {"answer_idx": "E"}, "the field 'answer_idx' is 'E', which names none of the options A, B, C"),
        ("medqa", {"answer_idx": "Vitamin C"}, "the field 'answer_idx' is 'Vitamin C'"),
        ("pubmedqa", {}, "the field 'context' must hold a list of texts"),
        ("pubmedqa", {"context": {"contexts": [1]}}, "the field 'context' must hold a list of texts"),
        ("pubmedqa", {"CONTEXTS": []}, "the field 'CONTEXTS' must hold a list of texts"),
        (
            "pubmedqa",
            {"context": ["x"], "final_decision": "perhaps"},
            "the field 'final_decision' is 'perhaps', which is none of yes, no, maybe",
        ),
        ("pubmedqa", {"context": ["x"]}, "the field 'final_decision' must hold a text"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_field(tmp_path: Path, form: str, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, PUBMED if form == "pubmedqa" else GOOD, GOOD | changes)
    with pytest.raises(ValueError, match=rf"questions.jsonl: line 2: .*{message}"):
        read_choices(path, form=form)


def test_files_that_hold_no_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for text, message in (
        ("", "holds no questions"),
        ("[]", "holds no questions"),
        (json.dumps(GOOD) + "\n{broken\n", "line 2 is not JSON"),
        ("[1, 2]", "item 1: is a number, not an object"),
        ('"text"', "line 1: is a text, not an object"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_choices(path, form="options")
    path.write_bytes(b"\xff\xfa")
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        read_choices(path, form="options")
    with pytest.raises(ValueError, match=r"the file does not exist; give a .jsonl or .json file of questions"):
        read_choices(tmp_path / "none.jsonl", form="options")
    with pytest.raises(ValueError, match="form='csv' is none of medqa, pubmedqa, options"):
        read_choices(path, form="csv")


def test_the_finance_set_is_a_labelled_one() -> None:
    records = BUILTIN["finance"]()
    questions, labels = labelled_questions(records)
    assert labels == questions[0].options == ("negative", "neutral", "positive")
    assert [labels[question.answer] for question in questions] == [record.label for record in records]
    assert [question.prompt for question in questions] == [record.instruction for record in records]


def test_a_label_is_spelled_as_most_responses_spell_it() -> None:
    responses = [("up", "Up, since"), ("up", "up"), ("up", "Up."), ("down", "DOWN")]
    questions, labels = labelled_questions([Record(i, "q", text, label=label) for i, (label, text) in enumerate(responses)])
    assert (labels, questions[0].options, questions[0].answer) == (("down", "up"), ("DOWN", "Up"), 1)


@pytest.mark.parametrize("preset", ["fpb", "tfns", "fiqa"])
def test_sentiment_presets_are_labelled_sets(tmp_path: Path, preset: str) -> None:
    rows = {
        "fpb": [{"sentence": "Profit rose.", "label": 2}, {"sentence": "It fell.", "label": 0}],
        "tfns": [{"text": "Profit rose.", "label": 1}, {"text": "It fell.", "label": 0}],
        "fiqa": [{"sentence": "Profit rose.", "score": 0.6}, {"sentence": "It fell.", "score": -0.5}],
    }
    records = list(read_source(DataConfig("jsonl", str(written(tmp_path, *rows[preset])), preset)).records)
    questions, labels = labelled_questions(records)
    assert labels == questions[0].options == ("negative", "positive")
    assert [labels[question.answer] for question in questions] == ["positive", "negative"]


def test_sets_without_labels_in_their_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="labels are ''; a labelled set has at least two"):
        labelled_questions([Record(0, "q", "r")])
    with pytest.raises(ValueError, match="labels are none"):
        labelled_questions([])
    clinic = BUILTIN["clinic"]()
    with pytest.raises(ValueError, match=rf"record 0 has the label {clinic[0].label!r}, but its response begins with"):
        labelled_questions(clinic)
    with pytest.raises(ValueError, match="record 1 has the label ''"):
        labelled_questions([Record(0, "q", "yes", label="yes"), Record(1, "q", "no")])
