"""Copies: what counts as one, against every pair compared, and the split that keeps them on one side."""

import hashlib
import itertools
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysim.data.copies import count_copies, linked
from raysim.data.records import Record
from raysim.data.sources import BUILTIN, split_records

words = st.sampled_from(["Ask", "ask ", "ASK", "a sk", "\uff21sk", "stra\u00dfe", "STRASSE", "caf\u00e9", "cafe\u0301"])
drawn = st.lists(st.tuples(words, words, st.sampled_from(["", "", "a", "b"]), st.booleans()), max_size=14)


def made(rows: list[tuple[str, str, str, bool]]) -> list[Record]:
    turns = (("user", "Hello."), ("assistant", "Yes?"))
    return [Record(i, asked, answer, group=group, history=turns if more else ()) for i, (asked, answer, group, more) in enumerate(rows)]


def same(one: Record, other: Record) -> bool:
    """The definition: the same group, or the same text but for case, blanks and compatibility forms."""

    def folded(record: Record) -> list[str]:
        texts = [*(text for turn in record.history for text in turn), record.instruction, record.response]
        return [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]

    return (one.group != "" and one.group == other.group) or folded(one) == folded(other)


@given(drawn)
@settings(max_examples=200, deadline=None)
def test_linked_are_those_that_a_chain_of_copies_and_groups_joins(rows: list[tuple[str, str, str, bool]]) -> None:
    records = made(rows)
    reached = [{i} for i in range(len(records))]
    for _ in records:
        reached = [
            set().union(*(reached[j] for j in range(len(records)) if any(same(records[j], records[k]) for k in one))) for one in reached
        ]
    expected = sorted({tuple(sorted(one)) for one in reached})
    assert [tuple(group) for group in linked(records)] == expected


@given(drawn, st.integers(1, 6), st.integers(0, 2**62))
@settings(max_examples=200, deadline=None)
def test_no_copy_is_on_the_other_side(rows: list[tuple[str, str, str, bool]], num_heldout: int, seed: int) -> None:
    try:
        train, heldout = split_records(made(rows), num_train=0, num_heldout=num_heldout, seed=seed)
    except ValueError:
        return  # one group may be too large for the other side
    assert not [pair for pair in itertools.product(train, heldout) if same(*pair)]


def test_copies_are_counted_letter_by_letter_and_folded() -> None:
    records = [Record(i, *texts) for i, texts in enumerate([("a", "b"), ("a", "b"), ("A ", "b"), ("a", "c"), ("a", "b"), ("\uff41", "b")])]
    assert count_copies(records) == {"num_copies": 4, "num_exact_copies": 2}
    assert count_copies([]) == {"num_copies": 0, "num_exact_copies": 0}
    earlier = Record(9, "a", "b", history=(("user", "c"), ("assistant", "d")))
    assert count_copies([records[0], earlier]) == {"num_copies": 0, "num_exact_copies": 0}


# The ids of both sides for seed 0 with 48 and 32 records, and for seed 3 with all and 40.
SPLITS = {
    "clinic": ("9de50c032fcdf9c4", "f9ca4cc4a445a56d"),
    "finance": ("131dd6052eae2a1d", "af1342cfa7fb8a6a"),
    "general": ("ab1e7c722e4397d8", "db2cc08ebb399e77"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_built_in_sets_have_no_copies_and_are_split_as_ever(name: str) -> None:
    records = BUILTIN[name]()
    assert count_copies(records)["num_copies"] == 0
    for (seed, num_train, num_heldout), expected in zip(((0, 48, 32), (3, 0, 40)), SPLITS[name], strict=True):
        sides = split_records(records, num_train=num_train, num_heldout=num_heldout, seed=seed)
        ids = json.dumps([[record.record_id for record in side] for side in sides])
        assert hashlib.sha256(ids.encode()).hexdigest()[:16] == expected
