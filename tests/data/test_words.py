"""Words of any script: one form for all spellings of a text, units that fit the script, and ASCII as rouge-score and `split` have it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from raysim.data.sources import BUILTIN
from raysim.data.words import fold, pieces, words

ASCII = st.text(st.characters(max_codepoint=127))
MANY = st.text(
    st.sampled_from("aZ1 \n.-_'éÉe\u0301ßİıΣςάЁё١१李明、カｶﾞー々〇สวัดีខ្មែမြန်한글ᄒ\u1161أاةـ\u064eדָּ क्षि་བོད½②℃ﬁ\u200b\u00ad\ufffd😀"),
    max_size=40,
)


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in pieces(text)]


@given(ASCII)
def test_ascii_is_cut_as_by_rouge_score_and_counted_as_by_split(text: str) -> None:
    assert list(words(text)) == DefaultTokenizer(use_stemmer=False).tokenize(text)
    assert cut(text) == text.split()
    assert fold(text) == text.lower()


@given(st.text(st.characters(exclude_categories=["Cs"], codec="latin-1")))
def test_texts_with_blanks_between_words_are_counted_as_by_split(text: str) -> None:
    assert cut(text) == text.split()


@pytest.mark.parametrize("source", ["clinic", "finance", "general"])
def test_built_in_records_are_cut_as_by_rouge_score(source: str) -> None:
    """One word of theirs is not ASCII, which rouge-score cuts short: each word stands for one of its words all the same."""
    package = DefaultTokenizer(use_stemmer=False)
    texts = [text for record in BUILTIN[source]() for text in (record.instruction, record.response, *record.details)]
    assert len(texts) > 600
    for text in texts:
        assert [word.replace("café", "caf") for word in words(text)] == package.tokenize(text)


@given(MANY)
def test_spellings_of_a_text_have_one_form(text: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert fold(unicodedata.normalize(form, text)) == fold(text)
    assert fold(fold(text)) == fold(text)
    assert fold(text.casefold()) == fold(text)


@given(MANY)
def test_words_are_all_letters_and_digits_in_order_and_no_word_begins_with_a_mark_of_the_last(text: str) -> None:
    kept = "".join(char for char in fold(text) if unicodedata.category(char)[0] in "LMN")
    assert "".join(words(text)) == kept
    assert all(words(text))
    assert "".join("".join(cut(text)).split()) == "".join(text.replace("\u0f0b", " ").split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Le café’s naïve", ["le", "café", "s", "naïve"]),
        ("well—known, co-op", ["well", "known", "co", "op"]),
        ("患者COVID感染", ["患", "者", "covid", "感", "染"]),
        ("Tシャツを2枚", ["t", "シ", "ャ", "ツ", "を", "2", "枚"]),
        ("２０２４年、ｶﾞｽ", ["2024", "年", "ガ", "ス"]),
        ("人々は", ["人", "々", "は"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("한국어는 김민수가", ["한국어는", "김민수가"]),
        ("राम की किताब", ["राम", "की", "किताब"]),
        ("كِتَابٌ ٢", ["كتاب", "2"]),
        ("བོད་ཡིག", ["བོད", "ཡིག"]),
        ("½ m² ① 😀", ["1", "2", "m2", "1"]),
    ],
)
def test_words_by_hand(text: str, expected: list[str]) -> None:
    assert list(words(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("写一首诗。", ["写", "一", "首", "诗。"]),
        ("请用 Python，写（好）", ["请", "用", "Python，", "写（", "好）"]),
        ("用Python写", ["用", "Python", "写"]),
        ("김민수는 왔다.", ["김민수는", "왔다."]),
        ("วันนี้ ดี", ["วั", "น", "นี้", "ดี"]),
        ("བོད་ཡིག།", ["བོད", "ཡིག།"]),
        ("- - é", ["-", "-", "é"]),
        ("。", ["。"]),
        ("", []),
    ],
)
def test_pieces_by_hand(text: str, expected: list[str]) -> None:
    assert cut(text) == expected
