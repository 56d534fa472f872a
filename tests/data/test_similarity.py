"""Likeness of texts: ROUGE-L as its package and by hand, and details found as whole words only, in the scripts that have them."""

import re
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from raysim.data.similarity import details_found, largest_rouge_l, longest_common_subsequence, place_of, rouge_l
from raysim.data.sources import BUILTIN
from raysim.data.words import words

WORDS = st.lists(st.sampled_from(["take", "the", "Tablet", "at", "night,", "12", "mg", "-", "_", "it's"]), max_size=12).map(" ".join)
ASCII = st.text(st.characters(max_codepoint=127), max_size=40)
SCORER = RougeScorer(["rougeL"])


def by_the_package(candidate: str, reference: str) -> float:
    return float(SCORER.score(target=reference, prediction=candidate)["rougeL"].fmeasure)


@given(WORDS | ASCII, WORDS | ASCII)
def test_rouge_l_of_ascii_is_the_packages(candidate: str, reference: str) -> None:
    assert rouge_l(candidate, reference) == by_the_package(candidate, reference)


@pytest.mark.parametrize("source", ["clinic", "finance", "general"])
def test_rouge_l_of_built_in_records_is_the_packages(source: str) -> None:
    records = BUILTIN[source]()[:120]
    for one, other in pairwise(records):
        assert rouge_l(one.response, other.response) == by_the_package(one.response, other.response)
        assert rouge_l(one.instruction, other.instruction) == by_the_package(one.instruction, other.instruction)


class _OurWords:
    """A tokenizer for the package: our words."""

    def tokenize(self, text: str) -> list[str]:
        return list(words(text))


@given(
    st.text(st.sampled_from("aB é1李明。 สวรี한글 ا\u064f-"), max_size=60),
    st.text(st.sampled_from("aB é1李明。 สวรี한글 ا\u064f-"), max_size=60),
)
def test_rouge_l_is_the_packages_with_our_words(candidate: str, reference: str) -> None:
    scorer = RougeScorer(["rougeL"], tokenizer=_OurWords())
    assert rouge_l(candidate, reference) == scorer.score(target=reference, prediction=candidate)["rougeL"].fmeasure


@given(st.text("abc", max_size=150), st.text("abc", max_size=150))
def test_longest_common_subsequence_is_that_of_the_table(first: str, second: str) -> None:
    row = [0] * (len(second) + 1)
    for a in first:
        above = row
        row = [0]
        for j, b in enumerate(second):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
    assert longest_common_subsequence(first, second) == row[-1]


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "A, b! C? d.", 1.0),
        ("a b c d", "e f", 0.0),
        ("a c", "a b c d", 2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4)),
        ("a b c d", "b a d c", 0.5),  # longest common subsequence of 2 words in 4 and 4
        ("", "a", 0.0),
    ],
)
def test_rouge_l_by_hand(candidate: str, reference: str, expected: float) -> None:
    assert rouge_l(candidate, reference) == pytest.approx(expected)


def test_largest_rouge_l() -> None:
    assert largest_rouge_l("a b", []) == 0.0
    assert largest_rouge_l("a b", ["x", "a c", "a b"]) == 1.0
    assert largest_rouge_l("a b", ["x", "a c"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "detail", "found"),
    [
        ("Seen: Anna Berg.", "Anna Berg", True),
        ("seen: ANNA\n   berg", "Anna Berg", True),
        ("Anna  Berg's knee", "anna berg", True),
        ("Joanna Bergen", "Anna Berg", False),
        ("Anna Bergen", "Anna Berg", False),
        ("Anna met Berg", "Anna Berg", False),
        ("takes 12 mg", "12 mg", True),
        ("takes 112 mg", "12 mg", False),
        ("takes 12 mgs", "12 mg", False),
        ("(3.5%)", "3.5%", True),
        ("345", "3.5", False),
        ("on 2024-01-05.", "2024-01-05", True),
        ("ID_77", "77", False),
        ("", "x", False),
    ],
)
def test_details_are_whole_words_whatever_case_and_space(text: str, detail: str, found: bool) -> None:
    assert details_found(text, [detail]) == ([detail] if found else [])


@given(st.text("aB1_ .%-\n", max_size=12), st.text("aB1_ .%-", min_size=1, max_size=4).filter(str.strip))
def test_details_in_ascii_are_whole_words_by_the_regular_expression(text: str, detail: str) -> None:
    folded, wanted = (" ".join(one.lower().split()) for one in (text, detail))
    expected = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", folded) is not None
    assert details_found(text, [detail]) == ([detail] if expected else [])


def test_details_come_back_as_given_and_in_order() -> None:
    assert details_found("b then A", ["a", "c", "B"]) == ["a", "B"]


@pytest.mark.parametrize(
    ("text", "detail", "found"),
    [
        ("患者Anna今天来", "Anna", True),
        ("患者Joanna今天来", "Anna", False),
        ("李明2024年来", "李明", True),
        ("2024年", "2024", True),
        ("12024年", "2024", False),
        ("電話：０９０-１２", "090-12", True),
        ("李　明", "李明", True),
        ("李\n明", "李 明", True),
        ("李, 明", "李明", False),
        ("김민수입니다", "김민수", True),
        ("최김민수", "김민수", False),
        ("45세", "45", True),
        ("عمره ٤٥ سنة", "45", True),
        ("عمره ٤٥٦ سنة", "45", False),
        ("فبالسعودية", "السعودية", True),
        ("للسعودية", "السعودية", True),
        ("والسعودية", "سعودية", True),
        ("الاحمد", "احمد", True),
        ("محمدأحمد", "أحمد", False),
        ("أحـــمد", "احمد", True),
        ("نمی\u200cآید", "نمیآید", True),
        ("वर्मा", "वर्म", False),
        ("नमस्ते राम।", "राम", True),
        ("รามา", "ราม", True),
        ("มิ", "ม", False),
        ("Hawaiʻi", "Hawai", False),
        ("m\u0303a", "m", False),
        ("Jose\u0301 Ruiz", "José Ruiz", True),
        ("Jose Ruiz", "José Ruiz", False),
        ("STRASSE 5", "Straße 5", True),
        ("ISTANBUL", "İstanbul", True),
        ("Kızılay", "KIZILAY", True),
        ("O\u2019Brien", "O'Brien", True),
        ("No. 12\u20133", "12-3", True),
        ("Anna\u00a0Berg", "Anna Berg", True),
        ("An\u00adna Berg", "Anna Berg", True),
        ("\ufeffAnna", "Anna", True),
        ("מדניאל", "דניאל", True),
        ("דניאלה", "דניאל", False),
        ("Аннаanna", "anna", True),
        ("х", "", False),
    ],
)
def test_details_in_other_scripts(text: str, detail: str, found: bool) -> None:
    assert details_found(text, [detail]) == ([detail] if found else [])


@pytest.mark.parametrize(
    ("detail", "text", "place"),
    [
        ("Berg", "Anna Berg", 5),
        ("berg", "Anna Berg", 5),
        ("José", "Señor Jose\u0301 y José", 14),
        ("jos\u00e9", "Sen\u0303or Jose\u0301", 7),
        ("12 mg", "是１２　mg", 1),
        ("김민수", unicodedata.normalize("NFD", "어제 김민수"), 5),
        ("x", "Anna", None),
        ("李明", "", None),
    ],
)
def test_where_a_detail_begins(detail: str, text: str, place: int | None) -> None:
    assert place_of(detail, text) == place
