"""How alike two texts are: ROUGE-L, and which private details a text gives away; both in any script (see `words`)."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from raysim.data.words import INHERITED, UNSPACED, fold, is_mark, script, words

MEASURE = "ROUGE-L over words, and over characters where a script puts no blanks between words"
"""The likeness that leakage, the filters of synthetic records and reports use, in words."""

# Words of one letter or two that Arabic, Hebrew and Amharic write onto the next one: and, so, in, for, as, the; that, from; of, about, to.
_PREFIXES = {
    "ARABIC": re.compile("[وف]?[بلك]?(ال)?"),
    "HEBREW": re.compile("[ושהבלכמ]{1,3}"),
    "ETHIOPIC": re.compile("[የለበከ]|እነ|ስለ|ወደ|እንደ"),
}


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F-measure in [0, 1] between two texts over their `words`; Lin (2004), for ASCII texts as the package rouge-score has it."""
    said, wanted = words(candidate), words(reference)
    length = longest_common_subsequence(said, wanted)
    if not length:
        return 0.0
    precision, recall = length / len(said), length / len(wanted)
    return 2 * precision * recall / (precision + recall)


def largest_rouge_l(candidate: str, references: Sequence[str]) -> float:
    """The largest ROUGE-L of `candidate` with any of `references`; 0 if there are none."""
    return max((rouge_l(candidate, reference) for reference in references), default=0.0)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence; Hyyrö (2004), Bit-parallel LCS-length computation revisited.

    Texts cut into characters are long: a table of all pairs takes a second where the bits of one integer take a millisecond.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = unmatched = (1 << len(first)) - 1
    for word in second:
        matched = unmatched & places.get(word, 0)
        unmatched = (unmatched + matched | unmatched - matched) & everywhere
    return len(first) - unmatched.bit_count()


def details_found(text: str, details: Sequence[str]) -> list[str]:
    """The private details that occur in `text` as whole words, however both are written (see `fold`) and spaced.

    A word ends where a script without blanks begins, so that there a detail is found in running text; a Korean word may go on with its
    particles, and an Arabic, Hebrew or Amharic one may begin with what these write onto the next word.
    """
    spaced = _spaced(text)
    return [detail for detail in details if _occurs(_spaced(detail), spaced)]


def place_of(detail: str, text: str) -> int | None:
    """Where in `text` the detail begins, as it stands or else however it is written; None where it does not occur."""
    if detail in text:
        return text.find(detail)
    wanted = _spaced(detail)
    if not wanted or wanted not in _spaced(text):
        return None
    # Folding moves places, so the shortest beginning that holds the detail is looked for, and then the shortest end of that.
    end = bisect_left(range(len(text)), True, key=lambda size: wanted in _spaced(text[:size]))
    return end - bisect_left(range(end), True, key=lambda size: wanted in _spaced(text[end - size : end]))


def _spaced(text: str) -> str:
    """The folded text with single blanks, and none between letters of scripts that put none."""
    folded = " ".join(fold(text).split())
    if folded.isascii():
        return folded
    kept = (
        char for place, char in enumerate(folded) if char != " " or not {script(folded[place - 1]), script(folded[place + 1])} <= UNSPACED
    )
    return "".join(kept)


def _occurs(detail: str, text: str) -> bool:
    """Whether the detail stands somewhere in the text as whole words."""
    forms = {detail, re.sub("^ال", "لل", detail)}  # an article after "to" is written in another way
    return bool(detail) and any(_stands(text, start, start + len(form)) for form in forms for start in _starts(form, text))


def _starts(detail: str, text: str) -> Iterator[int]:
    start = text.find(detail)
    while start >= 0:
        yield start
        start = text.find(detail, start + 1)


def _stands(text: str, start: int, end: int) -> bool:
    """Whether whole words begin at `start` and end at `end`."""
    if end < len(text) and not _may_end(text[end - 1], text[end]):
        return False
    first = start
    while first > 0 and not _borders(text[first], text[first - 1]):
        first -= 1
    prefix = _PREFIXES.get(script(text[start]))
    return first == start or (prefix is not None and prefix.fullmatch(text, first, start) is not None)


def _may_end(last: str, outside: str) -> bool:
    particle = script(last) == script(outside) == "HANGUL"
    return not is_mark(outside) and (particle or _borders(last, outside))


def _borders(edge: str, outside: str) -> bool:
    """Whether a word that has the character `edge` at its end stops there though `outside` is next to it."""
    inner, outer = script(edge), script(outside)
    if UNSPACED & {inner, outer}:
        return True
    if not inner or not outer:
        return not outer and outside != "_"
    if "DIGIT" in (inner, outer):
        return "HANGUL" in (inner, outer)
    return inner != outer and not INHERITED & {inner, outer}
