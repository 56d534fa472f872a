"""What a release remembers of the private details themselves: how likely each is where it stands, and how exposed among others like it.

A detail (`Record.details`: a name, a date, a value with its unit, a telephone number) is scored by its tokens alone, given the true words
before it. Two figures, both in bits: its gain in log-likelihood over the base model, from the token losses of a pass that is made anyway;
and its exposure, Carlini et al. (2019), arXiv 1802.08232, among references of the same form, put in its place one by one.
What context gives away (a name said earlier, a value that the question implies) counts in both, so held-out details, which nobody trained
on, are the control: `details_report` has the members' means less the control's.

A reference is never a detail of a training record. First come other held-out details of the same form, which under no training are as
likely as the true one to stand there; where there are too few, the detail is written anew. In a detail with numbers only these change: the
words around them ("ferritin of ... ug/L", "August") belong to what is said, and other words would be told apart without memory. A detail
without numbers gets its words from held-out details of its form, each from the same place.
Left out: where a detail occurs again in its response (there it can be copied), and other spellings of it.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from unicodedata import decimal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raysim.attacks.canaries import exposure
from raysim.data.chat import ChatFormat, finished_texts
from raysim.data.records import Record
from raysim.data.similarity import details_found, place_of
from raysim.data.tokens import Example
from raysim.data.words import fold, script
from raysim.data.written import written_text
from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.model.score import Branches, branch_nlls
from raysim.rng import numpy_rng

Floats = NDArray[np.float64]
Row = Mapping[str, Any]

MIN_REFERENCES = 7
"""A detail with fewer references has no exposure: it could not come to 3 bits."""
TRIES = 20
"""Draws for each reference that is wanted, after which there are held to be no more."""
FEW = 5
"""Of fewer numbers than these the smallest and the largest say nothing of their range."""
MAX_DIGITS = 9
"""Longer runs of digits are drawn in parts."""
BRANCHES_A_ROW = 64
"""References that are read behind one copy of their prompt."""
NUM_REPLICATES = 2000
"""Bootstrap replicates of an interval."""
LEVEL = 0.05
"""One less the confidence of an interval."""


# --- where a detail stands ---


@dataclass(frozen=True)
class DetailSpan:
    """A detail, and which of its example's scored tokens it takes: `start` to `end`, the last one excluded."""

    detail: str
    start: int
    end: int


def detail_spans(example: Example, tokenizer: Any) -> list[DetailSpan]:
    """Where each detail of the record stands first in the scored tokens of its response, in the record's order.

    A token in which the detail and what stands beside it run together belongs to the detail. Found in what the tokens say, so that
    any tokenizer serves. Left out are details that the response has not, as those of an earlier turn, or has beyond its cut.
    """
    ids = example.response_ids
    text, shift = written_text(tokenizer, ids), len(example.scored) - len(ids)
    special = set(tokenizer.all_special_ids)

    def length(size: int) -> int:
        return len(written_text(tokenizer, ids[:size]))

    spans = []
    for detail in dict.fromkeys(example.record.details):
        if (place := place_in(text, detail)) is None:
            continue
        first = bisect_left(range(len(ids)), place[0], key=length)
        first -= length(first) > place[0]
        end = bisect_left(range(len(ids)), place[1], key=length)
        while ids[first] in special:
            first += 1
        spans.append(DetailSpan(detail, first + shift, end + shift))
    return spans


def place_in(text: str, detail: str) -> tuple[int, int] | None:
    """Where in `text` the detail begins and ends: the first time as whole words, else as any part of it; None where it does not occur.

    So the first of May is not looked for in the eleventh.
    """
    for start in _starts(text, detail):
        end = start + len(detail)
        if details_found(text[text.rfind(" ", 0, start) + 1 : end + 1], [detail]):
            return start, end
    start_or_none = place_of(detail, text)
    if start_or_none is None:
        return None
    rest = text[start_or_none:]
    size = bisect_left(range(len(rest)), True, key=lambda size: place_of(detail, rest[:size]) is not None)
    return start_or_none, start_or_none + size


def _starts(text: str, detail: str) -> Iterator[int]:
    start = text.find(detail)
    while start >= 0:
        yield start
        start = text.find(detail, start + 1)


# --- how likely it is there ---


def detail_bits(token_nlls: ArrayLike, spans: Sequence[DetailSpan]) -> list[float]:
    """The negative log-probability (bits) of each detail given the true words before it, from the NLLs (nats) of its example's scored tokens."""
    nlls = np.asarray(token_nlls, dtype=np.float64)
    assert all(0 <= span.start < span.end <= len(nlls) for span in spans), (spans, nlls.shape)
    return [float(nlls[span.start : span.end].sum() / np.log(2)) for span in spans]


# --- others of its form ---


@dataclass(frozen=True)
class DetailPool:
    """The details of a data set by their form (see `form_of`)."""

    untrained: Mapping[str, tuple[str, ...]]
    """Those of held-out records that no training record has, in order."""
    numbers: Mapping[str, tuple[tuple[str, ...], ...]]
    """The numbers of each different detail, trained or not, by its form and by that with any words: what is drawn lies in their range."""
    trained: frozenset[str]
    """Details of training records, folded."""


def form_of(detail: str) -> str:
    """What details must share to take each other's place: all but the numbers, or in a detail without numbers all but its words.

    `ferritin of 158 ug/L` has the form `ferritin of 9 ug/l`, `555-638-9077` the form `9-9-9`, `Milos Ashgrove` that of two Latin words.
    """
    return _form(detail, keeps_words=bool(_numbers(detail)))


def _form(detail: str, *, keeps_words: bool) -> str:
    shown = (
        "9" if kind == "9" else f"<{script(text[0])}>" if kind == "w" and not keeps_words else fold(text) for kind, text in _pieces(detail)
    )
    return "".join(shown)


def pool_of(trained: Sequence[Record], heldout: Sequence[Record]) -> DetailPool:
    """The pool for details of these records."""
    known = frozenset(fold(detail) for record in trained for detail in record.details)
    every = dict.fromkeys(detail for record in (*trained, *heldout) for detail in record.details)
    nobodys = dict.fromkeys(detail for record in heldout for detail in record.details if fold(detail) not in known)
    numbers: dict[str, list[tuple[str, ...]]] = {}
    for detail in every:
        for keeps_words in (True, False):
            numbers.setdefault(_form(detail, keeps_words=keeps_words), []).append(_numbers(detail))
    untrained: dict[str, list[str]] = {}
    for detail in nobodys:
        untrained.setdefault(form_of(detail), []).append(detail)
    return DetailPool(
        {form: tuple(found) for form, found in untrained.items()}, {form: tuple(found) for form, found in numbers.items()}, known
    )


def make_references(record: Record, detail: str, *, pool: DetailPool, num_references: int, seed: int) -> list[str]:
    """Up to `num_references` different strings of the detail's form for its place in the record: held-out details, then ones written anew.

    Guarantees: none is a detail of a training record, or of this record; they depend on the arguments only. There are fewer where the
    form has few values (a score of two digits): numbers keep their number of digits, and stay in the range that such details have.
    """
    rng = numpy_rng(seed, "details", record.record_id, detail)
    taken = pool.trained | {fold(own) for own in (*record.details, detail)}
    others = pool.untrained.get(form_of(detail), ())
    found: dict[str, str] = {}

    def add(candidate: str) -> None:
        if len(found) < num_references and (key := fold(candidate)) not in taken:
            found.setdefault(key, candidate)

    for place in rng.permutation(len(others)).tolist():
        add(others[place])
    choices = _choices(detail, pool)
    for _ in range(TRIES * num_references):
        if len(found) == num_references:
            break
        add("".join(_drawn(choice, rng) for choice in choices))
    return list(found.values())


@dataclass(frozen=True)
class _Digits:
    """The numbers that may take a number's place."""

    low: int
    high: int
    width: int
    zero: int
    """The code point of its script's digit zero."""


def _choices(detail: str, pool: DetailPool) -> list[tuple[str, ...] | _Digits]:
    """What each piece of the detail may become."""
    own = _numbers(detail)
    others = [_pieces(other) for other in pool.untrained.get(form_of(detail), ())]
    narrow, wide = (zip(*pool.numbers.get(_form(detail, keeps_words=keeps), (own,)), strict=True) for keeps in (True, False))
    usual = zip(narrow, wide, strict=True)
    choices: list[tuple[str, ...] | _Digits] = []
    for place, (kind, text) in enumerate(_pieces(detail)):
        if kind == "9":
            choices.append(_range(text, *next(usual)))
        elif kind == "w" and not own:
            choices.append(tuple(dict.fromkeys(other[place][1] for other in others)) or (text,))
        else:
            choices.append((text,))
    return choices


def _range(number: str, *usual: Sequence[str]) -> _Digits:
    """From the smallest to the largest of the first usual numbers of as many digits that are enough, or one and the same; else all there are."""
    width, zero = len(number), ord(number[0]) - decimal(number[0])
    for numbers in usual:
        values = [int(other) for other in numbers if len(other) == width]
        if len(values) >= FEW or (len(values) > 1 and len(set(values)) == 1):
            return _Digits(min(values), max(values), width, zero)
    least = 0 if width == 1 or decimal(number[0]) == 0 else 10 ** (width - 1)
    return _Digits(least, 10**width - 1, width, zero)


def _drawn(choice: tuple[str, ...] | _Digits, rng: np.random.Generator) -> str:
    if not isinstance(choice, _Digits):
        return choice[int(rng.integers(len(choice)))] if len(choice) > 1 else choice[0]
    drawn = int(rng.integers(choice.low, choice.high + 1))
    return "".join(chr(choice.zero + int(digit)) for digit in f"{drawn:0{choice.width}d}")


def _pieces(detail: str) -> list[tuple[str, str]]:
    """The detail in parts `(kind, text)`: `9` for digits, `w` for letters and marks of one script, and other characters as their own kind."""
    found = []
    for kind, run in groupby(detail, key=_kind):
        text = "".join(run)
        size = MAX_DIGITS if kind == "9" else len(text)
        found += [(kind[0], text[start : start + size]) for start in range(0, len(text), size)]
    return found


def _kind(char: str) -> str:
    return "9" if char.isdecimal() else "w" if script(char) else char


def _numbers(detail: str) -> tuple[str, ...]:
    return tuple(text for kind, text in _pieces(detail) if kind == "9")


# --- how exposed it is ---


def detail_queries(
    examples: Sequence[Example],
    spans: Sequence[Sequence[DetailSpan]],
    *,
    pool: DetailPool,
    tokenizer: Any,
    chat: ChatFormat,
    num_references: int,
    seed: int,
) -> list[Branches]:
    """For each detail of each example, in order, what stands before it and the tokens that may follow: its own first, then its references'.

    `spans` are the examples' `detail_spans`, `chat` what the examples were encoded with.
    """
    queries = []
    for example, placed in zip(examples, spans, strict=True):
        for span in placed:
            others = make_references(example.record, span.detail, pool=pool, num_references=num_references, seed=seed)
            queries.append(_query(example, span.detail, others, tokenizer=tokenizer, chat=chat))
    return queries


def _query(example: Example, detail: str, references: Sequence[str], *, tokenizer: Any, chat: ChatFormat) -> Branches:
    """Prompt and opening, and the detail and each reference behind them; a token in which both run together belongs to what follows.

    All are cut into tokens behind the whole prompt, as the finished conversation is (see `encode_records`).
    """
    record = example.record
    prompt, answer = finished_texts(tokenizer, [*record.history, ("user", record.instruction)], record.response, chat=chat)
    place = place_in(answer, detail)
    assert place is not None, f"{detail!r} stands in the tokens of record {record.record_id}, but not in its text"
    texts = [answer[: place[0]] + secret for secret in ("", answer[slice(*place)], *references)]
    before, *whole = tokenizer([prompt, *(prompt + text for text in texts)], add_special_tokens=False)["input_ids"]
    if all(ids[: len(before)] == before for ids in whole):
        opening, *answers = [ids[len(before) :] for ids in whole]
    else:
        opening, *answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
    shared = _num_shared([opening, *answers])
    own, *others = [tuple(ids[shared:]) for ids in answers]
    return Branches((*example.prompt_ids, *opening[:shared]), (own, *(other for other in others if other)))


def _num_shared(sequences: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all begin with alike."""
    alike = (len(set(column)) == 1 for column in zip(*sequences, strict=False))
    return next((place for place, same in enumerate(alike) if not same), min(map(len, sequences)))


def detail_exposures(lm: LanguageModel, adapter: Vector, queries: Sequence[Branches], batch_size: int) -> list[float | None]:
    """The exposure (bits) of each query's first branch among its others under `adapter`; None where these are fewer than MIN_REFERENCES.

    References that do not fit the model's context are passed over. `batch_size` rows of up to BRANCHES_A_ROW branches are read at once.
    In bfloat16, rounding moves each NLL by some tenths of a nat, details' and references' alike. `adapter` stays loaded.
    """
    lm.set_adapter(adapter)
    fitting = [_fitting(query, room=lm.max_positions - len(query.prompt_ids)) for query in queries]
    rows = [
        Branches(query.prompt_ids, branches[start : start + BRANCHES_A_ROW])
        for query, branches in zip(queries, fitting, strict=True)
        for start in range(0, len(branches), BRANCHES_A_ROW)
    ]
    nlls = iter([nll for row in branch_nlls(lm, rows, batch_size=batch_size) for nll in row])
    scored = [[next(nlls) for _ in branches] for branches in fitting]
    return [exposure(own[0], own[1:]) if own else None for own in scored]


def _fitting(query: Branches, *, room: int) -> tuple[tuple[int, ...], ...]:
    """The branches that are scored: none where too few references fit."""
    own, *others = query.branches
    fitting = (own, *(other for other in others if len(other) <= room))
    return fitting if len(fitting) > MIN_REFERENCES else ()


# --- figures ---


def detail_rows(
    record_id: int,
    spans: Sequence[DetailSpan],
    *,
    bits: Sequence[float],
    base_bits: Sequence[float],
    exposures: Sequence[tuple[float | None, int]] = (),
) -> list[dict[str, Any]]:
    """A row a detail of the record: `record_id`, `detail`, `bits` and `base_bits` of it, its `exposure`, and `num_references` among which it is.

    `bits` and `base_bits` are under the adapter and the base model (see `detail_bits`), `exposures` what was found of the queries made from
    the same spans, each with the number of its references; none where the record's details were not compared with references.
    """
    found = exposures or [(None, 0)] * len(spans)
    return [
        {"record_id": record_id, "detail": span.detail, "bits": own, "base_bits": base, "exposure": exposed, "num_references": num}
        for span, own, base, (exposed, num) in zip(spans, bits, base_bits, found, strict=True)
    ]


def untrained_rows(rows: Sequence[Row], pool: DetailPool) -> list[Row]:
    """The rows whose detail no training record has: what may serve as the control."""
    return [row for row in rows if fold(row["detail"]) not in pool.trained]


def details_report(rows_members: Sequence[Row], rows_control: Sequence[Row]) -> dict[str, Any] | None:
    """What training added to the details of members: means over details, less those of the control; None where either side has none.

    `gain_bits` is bits a detail gained over the base model, `exposure` bits of exposure, each with a 95% interval (paired with nothing, so
    both sides are drawn: a bootstrap over records, whose details go together), and each side's own mean as `_members` and `_control`.
    `max` is what the members' mean exposure could have come to. The exposure is None where either side has no detail with enough references.
    """
    if not rows_members or not rows_control:
        return None
    report: dict[str, Any] = {"num_details": len(rows_members), "num_control": len(rows_control)}
    for figure, value in (("gain_bits", _gain), ("exposure", _exposure)):
        members, control = (_by_record(rows, value) for rows in (rows_members, rows_control))
        report |= _compared(figure, members, control)
    scored = [row for row in rows_members if row["exposure"] is not None]
    report["num_exposed"] = len(scored)
    report["num_references"] = float(np.mean([row["num_references"] for row in scored])) if scored else None
    report["max"] = float(np.mean([np.log2(row["num_references"] + 1) for row in scored])) if scored else None
    return report


def _gain(row: Row) -> float:
    return float(row["base_bits"] - row["bits"])


def _exposure(row: Row) -> float | None:
    return None if row["exposure"] is None else float(row["exposure"])


def _by_record(rows: Sequence[Row], value: Any) -> Floats:
    """Sum and number of the records' values, of shape (records, 2), less the records that have none."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (one := value(row)) is not None:
            found.setdefault(row["record_id"], []).append(one)
    return np.array([[sum(values), len(values)] for values in found.values()]).reshape(-1, 2)


def _compared(figure: str, members: Floats, control: Floats) -> dict[str, Any]:
    """A figure's difference of means with its interval, and both means."""
    if not len(members) or not len(control):
        return dict.fromkeys((figure, f"{figure}_interval", f"{figure}_members", f"{figure}_control"))
    own, other = (float(side[:, 0].sum() / side[:, 1].sum()) for side in (members, control))
    draws = [_drawn_means(side, numpy_rng(0, "details", figure, name)) for name, side in (("members", members), ("control", control))]
    interval = np.quantile(draws[0] - draws[1], [LEVEL / 2, 1 - LEVEL / 2]).tolist()
    return {figure: own - other, f"{figure}_interval": interval, f"{figure}_members": own, f"{figure}_control": other}


def _drawn_means(side: Floats, rng: np.random.Generator) -> Floats:
    """The means of NUM_REPLICATES draws of as many records, with replacement."""
    counts = rng.multinomial(len(side), np.full(len(side), 1 / len(side)), size=NUM_REPLICATES)
    sums = counts @ side
    return np.asarray(sums[:, 0] / sums[:, 1], dtype=np.float64)
