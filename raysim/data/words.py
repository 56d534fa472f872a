"""Texts of any script as words: which spellings are one, and what a text is cut into.

Likeness, lengths and private details are all told in these units. A word is a run of letters, marks and digits. Where a script puts no
blanks between its words (Chinese, Japanese, Thai, Khmer ...) each letter with its marks is a unit of its own. Korean puts blanks, and is
cut at them; Tibetan is cut at its syllable dots. On ASCII text the words are those of the package rouge-score.
Left out: dictionaries that find the words of such scripts; stems and inflected forms (Anna, Annan, Анну); names in another script;
traditional against simplified Chinese characters, and hiragana against katakana.
"""

import re
import unicodedata
from functools import cache, lru_cache

# The scripts that put no blanks between words, by the first word of their letters' Unicode names. IDEOGRAPHIC are an iteration mark and
# the zero, NEW and TAI the four Tai scripts, of which the names have two or three words.
UNSPACED = frozenset(
    (
        *("BALINESE", "BOPOMOFO", "CJK", "HENTAIGANA", "HIRAGANA", "IDEOGRAPHIC", "JAVANESE", "KATAKANA", "KATAKANA-HIRAGANA"),
        *("KHMER", "LAO", "MYANMAR", "NEW", "NUSHU", "TAI", "TANGUT", "THAI", "YI"),
    )
)
# What takes the script of the letter beside it.
INHERITED = frozenset(("COMBINING", "MODIFIER"))

FULL_STOPS = ".!" + "\u0589\u06d4\u0964\u0965\u0f0d\u104b\u1362\u17d4\u3002"
"""What ends a sentence that asks nothing, as `fold` leaves it: also Armenian, Urdu, Indian, Tibetan, Burmese, Ethiopic, Khmer, Chinese."""
_SEPARATORS = frozenset("\u0f0b\u0f0c\u1361")  # what Tibetan and old Ethiopic texts write for blanks

# Letters that writers of one language use for each other, as the Arabic, Persian and Greek normalizers of Apache Lucene fold them: forms
# of alef, yeh and kaf, final teh marbuta, accented Greek vowels. Then the Russian yo, the Turkish dotless i, curly quotes, and dashes.
_ALIKE = (
    *(("ا", "أإآٱ"), ("ي", "ىی"), ("ك", "ک"), ("ه", "ةۀ")),
    *(("α", "ά"), ("ε", "έ"), ("η", "ή"), ("ι", "ίϊΐ"), ("ο", "ό"), ("υ", "ύϋΰ"), ("ω", "ώ")),
    *(("е", "ё"), ("i", "ı"), ("'", "\u2018\u2019\u02bc"), ("-", "\u2010\u2011\u2012\u2013\u2014\u2212")),
)
_LETTERS = {letter: plain for plain, letters in _ALIKE for letter in letters}
# Vowel points of Arabic and Hebrew and the line-filling tatweel, which most texts leave out.
_POINTS = frozenset(map(chr, (*range(0x0591, 0x05C8), 0x0640, *range(0x064B, 0x0660), 0x0670))) - {"\u05be", "\u05c0", "\u05c3", "\u05c6"}


def fold(text: str) -> str:
    """The text in the one form in which spellings are compared.

    Case, Unicode's compatible forms (composed or not, full or half width), digits of any script, vowel points that may be left out,
    invisible characters, and letters, quotes and dashes used for each other make no difference. ASCII text becomes its lower case.
    """
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = "".join(map(_folded, folded)).replace("i\u0307", "i")  # what the case folding makes of the Turkish capital
    folded = unicodedata.normalize("NFKC", folded)
    return folded if folded == text else fold(folded)  # what was dropped may have stood between a letter and its accent


@lru_cache(maxsize=2048)
def words(text: str) -> tuple[str, ...]:
    """The units by which texts are compared: folded words, and letters with their marks where a script puts no blanks between words."""
    if text.isascii():
        return tuple(re.findall("[a-z0-9]+", text.lower()))
    folded = fold(text)
    return tuple(folded[m.start() : m.end()] for m in re.finditer("um*|[wm]+", "".join(map(_kind, folded))))


def pieces(text: str) -> list[tuple[int, int]]:
    """Where the units by which lengths are counted begin and end: what blanks separate, and letters of scripts without blanks one by one.

    Punctuation belongs to the unit that it touches. Where all scripts put blanks these are the parts of `text.split()`. The dots of
    Tibetan count as blanks.
    """
    return [m.span() for m in re.finditer("o*um*o*|[^us]+", "".join(map(_kind, text)))]


@cache
def script(char: str) -> str:
    """The script of a letter or mark, as the first word of its Unicode name; `DIGIT` of a digit, empty for what is no part of a word."""
    category = unicodedata.category(char)
    if category[0] == "N":
        name = unicodedata.name(char, "")
        return "CJK" if name.startswith(("CJK", "IDEOGRAPHIC")) else "DIGIT"
    return unicodedata.name(char, "UNNAMED").partition(" ")[0] if category[0] in "LM" else ""


def is_mark(char: str) -> bool:
    """Whether a character belongs to the letter before it, as accents and the vowel signs of Indian scripts do."""
    return unicodedata.category(char)[0] == "M"


@cache
def _kind(char: str) -> str:
    """`s` for a blank, `m` for a mark, `u` for a letter of a script without blanks, `w` for other parts of words, `o` for the rest."""
    if char.isspace() or char in _SEPARATORS:
        return "s"
    if is_mark(char):
        return "m"
    return "u" if script(char) in UNSPACED else "w" if script(char) else "o"


@cache
def _folded(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    invisible = category == "Cf" or char in _POINTS or "\ufe00" <= char <= "\ufe0f"
    return "" if invisible else _LETTERS.get(char, char)
