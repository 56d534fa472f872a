"""The built-in sets: counts, uniqueness, private details, determinism over processes, and that the arithmetic is right."""

import hashlib
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from raysim.data.builtin import clinic, finance, general, referrals
from raysim.data.builtin.clinic_facts import TOPICS
from raysim.data.builtin.people import with_article
from raysim.data.records import Record

SETS = ("clinic", "finance", "general", "referrals")


def of(name: str) -> list[Record]:
    records: list[Record] = importlib.import_module(f"raysim.data.builtin.{name}").records()
    return records


@pytest.mark.parametrize(("name", "labels"), [("clinic", 10), ("finance", 3), ("general", 9), ("referrals", 10)])
def test_enough_different_records_with_balanced_labels(name: str, labels: int) -> None:
    records = of(name)
    counts = Counter(record.label for record in records)
    assert len(records) >= 320
    assert len(counts) == labels
    assert "" not in counts
    assert len({record.instruction for record in records}) == len(records)
    assert [record.record_id for record in records] == list(range(len(records)))
    assert max(counts.values()) <= 2 * min(counts.values())


@pytest.mark.parametrize("name", SETS)
def test_details_are_in_the_response_alone(name: str) -> None:
    for record in of(name):
        for detail in record.details:
            assert detail in record.response, record
            assert detail not in record.instruction, record
        assert len(set(record.details)) == len(record.details)


@pytest.mark.parametrize("name", SETS)
def test_texts_are_clean(name: str) -> None:
    for record in of(name):
        text = f"{record.instruction}\n{record.response}"
        assert not re.search(r"  |[{}]|\.\.|,,| [.,;]|\bNone\b|\ba (?:8\d|11|18)-year|\b(\w+) \1\b", text), text
        assert text == text.strip(), text


def test_clinic_details_and_lengths() -> None:
    records = of("clinic")
    lengths = sorted(len(record.response.split()) for record in records)
    assert lengths[len(lengths) // 20] >= 40
    assert lengths[-len(lengths) // 20] <= 90
    assert min(len(record.details) for record in records) >= 3
    names = [record.details[0] for record in records]
    assert len(set(names)) == len(names), "two patients share a name"
    # Nobody's name is in anybody's instruction.
    words = {word for name in names for word in name.split()}
    assert not [record for record in records if words & set(re.findall(r"\w+", record.instruction))]


def test_clinic_is_not_one_template() -> None:
    """The three words before a patient's name open the texts in many ways, and no two instructions are near copies."""
    records = of("clinic")
    assert len({" ".join(record.response.split(record.details[0])[0].split()[-3:]) for record in records}) >= 25
    bags = [set(record.instruction.lower().split()) for record in records]
    overlaps = sorted((len(a & b) / len(a | b) for i, a in enumerate(bags) for b in bags[:i]), reverse=True)
    assert overlaps[0] < 0.9
    assert overlaps[len(overlaps) // 100] < 0.5


def test_clinic_says_what_the_value_means() -> None:
    """The change of treatment is proposed exactly where the value misses the goal."""
    by_test = {condition.test.name: condition for conditions in TOPICS.values() for condition in conditions}
    letters = [record for record in of("clinic") if record.response.startswith("Dear colleague")]
    assert len(letters) == 40
    for record in letters:
        reading = next(detail for detail in record.details if " of " in detail)
        condition = by_test[reading.split(" of ")[0]]
        value = float(re.search(r" of ([\d.]+)", reading)[1])  # type: ignore[index]  # every reading has a number
        missed = value >= condition.test.goal if condition.test.high_is_bad else value <= condition.test.goal
        assert (condition.change in record.response) == missed, record


def test_finance_begins_with_the_label_and_cites_no_unseen_figure() -> None:
    for record in of("finance"):
        assert record.label in ("positive", "negative", "neutral")
        assert record.response.startswith(f"{record.label}: ")
        assert len(record.details) == 4
        verdict = re.split(r"(?:Note|For the file|Desk note):", record.response)[0]
        assert set(re.findall(r"\d[\d.]*\d|\d", verdict)) <= set(re.findall(r"\d[\d.]*\d|\d", record.instruction)), record


def test_referrals_begin_with_the_label_and_share_no_telephone_number() -> None:
    """What a response has after its label cannot be known from the instruction or from another record."""
    records = of("referrals")
    assert len(records) == referrals.NUM_RECORDS
    assert len({record.details[2] for record in records}) == len(records), "two patients share a number"
    clinics: dict[str, set[str]] = {}
    for record in records:
        name, date, phone = record.details
        assert record.response == f"{record.label}: {name}, seen {date}, telephone {phone}"
        complaint = next(c.complaint for found in TOPICS.values() for c in found if c.complaint in record.instruction)
        clinics.setdefault(complaint, set()).add(record.label)
    assert {len(labels) for labels in clinics.values()} == {1}, "a complaint leads to one clinic"


def test_general_arithmetic_is_right() -> None:
    equations, seen = 0, 0
    for record in of("general"):
        if record.label != "arithmetic":
            continue
        seen += 1
        for left, sign, right, result in re.findall(r"(\d+) ([x/-]) (\d+) = ([\d.]+\d|\d+)", record.response):
            a, b = int(left), int(right)
            assert {"x": a * b, "/": a / b, "-": a - b}[sign] == float(result), record
            equations += 1
    assert seen == general.PER_CATEGORY
    assert equations >= seen


def test_general_timetables_run_forward() -> None:
    for record in of("general"):
        if record.label == "planning":
            times = [int(hour) * 60 + int(minute) for hour, minute in re.findall(r"^(\d+):(\d\d) ", record.response, flags=re.M)]
            assert len(times) >= 5, record
            assert all(a < b for a, b in pairwise([*times, 24 * 60])), record


def test_equal_in_processes_with_different_hash_seeds() -> None:
    program = (
        "import hashlib, importlib\n"
        "names = ('clinic', 'finance', 'general', 'referrals')\n"
        "sets = [importlib.import_module('raysim.data.builtin.' + name).records() for name in names]\n"
        "print(hashlib.sha256(repr(sets).encode()).hexdigest())"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    here = hashlib.sha256(repr([of(name) for name in SETS]).encode()).hexdigest()
    assert digests == [here, here]


def test_sets_say_that_they_are_fictional() -> None:
    for module in (clinic, finance, general, referrals):
        assert {"fictional", "advice"} <= set(re.findall(r"\w+", module.NOTICE))


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("80-year-old miller", "an"),
        ("18-year-old", "an"),
        ("81-year-old", "an"),
        ("40-year-old", "a"),
        ("ESR of 3", "an"),
        ("TSH of 3", "a"),
        ("urine test", "a"),
        ("HbA1c", "an"),
        ("eGFR", "an"),
    ],
)
def test_article_follows_the_sound(phrase: str, expected: str) -> None:
    assert with_article(phrase) == f"{expected} {phrase}"
