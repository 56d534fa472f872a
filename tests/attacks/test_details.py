"""Private details: found in any tokens, compared with others that nobody trained on, scored as each whole text alone, and told from a control."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

from raysim.attacks.canaries import exposure
from raysim.attacks.details import (
    MIN_REFERENCES,
    DetailPool,
    DetailSpan,
    detail_bits,
    detail_exposures,
    detail_queries,
    detail_rows,
    detail_spans,
    details_report,
    form_of,
    make_references,
    place_in,
    pool_of,
    untrained_rows,
)
from raysim.attacks.membership import token_nlls
from raysim.data.builtin import clinic
from raysim.data.chat import DEFAULT_CHAT
from raysim.data.records import Record
from raysim.data.tokens import Example, encode_records
from raysim.data.words import fold
from raysim.lora.layout import Vector, initial_adapter
from raysim.model.language_model import LanguageModel
from raysim.model.score import Branches
from tests.data.test_written import TOKENIZERS
from tests.kinds.tokenizers import SHAPES, TURNS, Shape, make
from tests.tiny_models import build, encode, learn_by_heart, sharp_base


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base(), rank=8)


@pytest.fixture(scope="module")
def adapter(lm: LanguageModel) -> Vector:
    """An adapter that does something: random in both factors."""
    return np.random.default_rng(0).normal(scale=0.1, size=lm.layout.num_parameters).astype(np.float32)


def a_record(response: str, *details: str, record_id: int = 0, **more: Any) -> Record:
    return Record(record_id, "Who came, and when?", response, details=details, **more)


def encoded(tokenizer: Any, record: Record, *, max_length: int = 2000, loss_on: str = "last") -> Example:
    (example,), _ = encode_records(
        [record], tokenizer=tokenizer, eos_token_id=tokenizer.eos_token_id, max_length=max_length, chat=DEFAULT_CHAT, loss_on=loss_on
    )
    return example


# --- where a detail stands ---

WRITTEN = {
    "latin": a_record("Seen: Milos Ashgrove (555-638-9077) on 11 August 2019.", "11 August 2019", "Milos Ashgrove", "555-638-9077"),
    "first words": a_record("Milos Ashgrove came.", "Milos Ashgrove"),
    "last words": a_record("It was Milos Ashgrove", "Milos Ashgrove"),
    "chinese": a_record("患者李明于2019年8月11日入院。", "李明", "2019年8月11日"),
    "thai": a_record("ผู้ป่วยสมชายมาวันนี้", "สมชาย"),
    "devanagari": a_record("कल सविता शर्मा आईं।", "सविता शर्मा"),
    "accents": a_record("Hier kam Zoë Núñez 😀 an.", "Zoë Núñez"),
    "merged": a_record("Massage for Ass Aass, 10 passes.", "Ass Aass", "10 passes"),
}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("name", [*SHAPES, *TOKENIZERS])
def test_the_tokens_of_a_detail_say_it_and_no_word_before_it(name: str, written: str) -> None:
    tokenizer = make(SHAPES[name]) if name in SHAPES else TOKENIZERS[name]
    example = encoded(tokenizer, WRITTEN[written])
    spans = detail_spans(example, tokenizer)
    says_all = name != "words with their space" or written not in ("chinese", "thai", "devanagari")  # it knows no such letters
    assert [span.detail for span in spans] == (list(example.record.details) if says_all else [])
    for span in spans:
        before, said, shorter = (
            tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (
                example.response_ids[: span.start],
                example.response_ids[span.start : span.end],
                example.response_ids[span.start : span.end - 1],
            )
        )
        assert said.strip() == span.detail, "these tokenizers join nothing with what follows"
        assert span.detail not in shorter
        assert (before + said).strip() == example.record.response[: example.record.response.index(span.detail)] + span.detail


def test_a_token_in_which_the_detail_and_its_neighbours_run_together_belongs_to_it() -> None:
    tokenizer = make(Shape(TURNS, "", "", merges=(("Ġ", "M"), ("e", "."))))
    example = encoded(tokenizer, a_record("So Milos Ashgrove.", "Milos Ashgrove"))
    [span] = detail_spans(example, tokenizer)
    assert tokenizer.decode(example.response_ids[span.start : span.end]) == " Milos Ashgrove."
    assert tokenizer.decode(example.response_ids[: span.start]) == "So"


def test_a_detail_is_looked_for_as_whole_words_first() -> None:
    text = "Seen on 11 May 2020, and on 1 May 2020."
    assert place_in(text, "1 May 2020") == (28, 38)
    assert place_in("only 11 May 2020", "1 May 2020") == (6, 16), "as part of a word where there is no other"
    assert place_in("MILOS  ASHGROVE came", "Milos Ashgrove") == (0, 15), "however it is written"
    assert place_in("nobody", "Milos") is None
    assert place_in("11\n1 May", "1 May") == (3, 8)


def test_details_that_are_cut_or_said_in_an_earlier_turn_are_left_out(lm: LanguageModel) -> None:
    record = a_record("Milos Ashgrove came on 11 August 2019.", "11 August 2019", "Milos Ashgrove", "Ivo Quayle", "Ivo Quayle")
    spoken = dataclasses.replace(record, history=(("user", "Who?"), ("assistant", "Ivo Quayle.")))
    whole = encoded(lm.tokenizer, spoken)
    assert [span.detail for span in detail_spans(whole, lm.tokenizer)] == ["11 August 2019", "Milos Ashgrove"]
    cut = encoded(lm.tokenizer, spoken, max_length=len(whole.prompt_ids) + len("Milos Ashgrove came on 11 Aug"))
    assert [span.detail for span in detail_spans(cut, lm.tokenizer)] == ["Milos Ashgrove"]


def test_places_count_the_earlier_turns_that_are_scored(lm: LanguageModel) -> None:
    history = (("user", "Who?"), ("assistant", "Ivo Quayle."))
    record = a_record("Then Milos Ashgrove came.", "Milos Ashgrove", history=history)
    example = encoded(lm.tokenizer, record, loss_on="every")
    assert example.earlier
    [span] = detail_spans(example, lm.tokenizer)
    ids = [*example.prompt_ids, *example.response_ids]
    assert lm.tokenizer.decode([ids[place] for place in example.scored[span.start : span.end]]) == "Milos Ashgrove"


# --- how likely it is there ---


def test_bits_are_those_of_the_details_tokens() -> None:
    nlls = np.array([9.0, 1.0, 2.0, 4.0]) * math.log(2)
    assert detail_bits(nlls, [DetailSpan("a", 1, 3), DetailSpan("b", 0, 4)]) == [pytest.approx(3.0), pytest.approx(16.0)]
    assert detail_bits(nlls, []) == []
    with pytest.raises(AssertionError):
        detail_bits(nlls, [DetailSpan("a", 2, 5)])


def test_bits_of_a_model_are_the_log_probability_of_the_detail_after_the_true_words(lm: LanguageModel, adapter: Vector) -> None:
    """Against the chain rule: the whole text's NLL less that of the text before the detail."""
    record = WRITTEN["latin"]
    example = encoded(lm.tokenizer, record)
    spans = detail_spans(example, lm.tokenizer)
    found = detail_bits(token_nlls(lm, adapter, [example], batch_size=1)[0], spans)
    for span, bits in zip(spans, found, strict=True):
        before, until = (dataclasses.replace(example, response_ids=example.response_ids[:end]) for end in (span.start, span.end))
        nll_before, nll_until = (nll.sum() for nll in token_nlls(lm, adapter, [before, until], batch_size=1))
        assert bits == pytest.approx((nll_until - nll_before) / math.log(2), rel=1e-4)


# --- others of its form ---


@pytest.mark.parametrize(
    ("detail", "other", "is_alike"),
    [
        ("Milos Ashgrove", "Anna Berg", True),
        ("Milos Ashgrove", "Anna", False),
        ("Milos Ashgrove", "Нина Орлова", False),
        ("李明", "王秀英", True),
        ("555-638-9077", "555-111-0000", True),
        ("555-638-9077", "555 111 0000", False),
        ("11 August 2019", "3 august 2021", True),
        ("11 August 2019", "11 May 2019", False),
        ("ferritin of 158 ug/L", "ferritin of 9 ug/L", True),
        ("ferritin of 158 ug/L", "calcium of 158 ug/L", False),
        ("2019年8月11日", "2020年12月1日", True),
    ],
)
def test_words_make_the_form_where_there_are_numbers_and_numbers_never_do(detail: str, other: str, is_alike: bool) -> None:
    assert (form_of(detail) == form_of(other)) == is_alike


def a_pool(trained: Sequence[str], heldout: Sequence[str]) -> DetailPool:
    return pool_of([a_record("", *trained, record_id=1)], [a_record("", detail, record_id=100 + i) for i, detail in enumerate(heldout)])


def references(detail: str, pool: DetailPool, *, num: int = 50, record_id: int = 0, seed: int = 0) -> list[str]:
    return make_references(a_record("", detail, record_id=record_id), detail, pool=pool, num_references=num, seed=seed)


def test_no_reference_is_the_detail_of_a_training_record_or_of_its_own() -> None:
    """Over a whole data set: most dates and names are taken, and none of them comes out, however it is written."""
    records = clinic.records()
    trained, heldout = records[:300], records[300:]
    pool = pool_of(trained, heldout)
    taken = {fold(detail) for record in trained for detail in record.details}
    nums = []
    for record in [*trained[::12], *heldout[::4]]:
        for detail in record.details:
            others = make_references(record, detail, pool=pool, num_references=63, seed=0)
            folded = {fold(other) for other in others}
            assert len(folded) == len(others)
            assert not folded & (taken | {fold(own) for own in record.details})
            assert {form_of(other) for other in others} == {form_of(detail)}
            assert others == make_references(record, detail, pool=pool, num_references=63, seed=0)
            nums.append(len(others))
    assert np.mean(np.array(nums) == 63) > 0.7, "scores of a digit or two have fewer"


def test_held_out_details_come_first_and_the_seed_and_the_record_decide_which() -> None:
    heldout = [f"555-{i:03d}-0{i:03d}" for i in range(10, 30)]
    pool = a_pool(["555-011-0011", "555-400-0400"], heldout)
    found = references("555-400-0400", pool, num=40)
    assert set(found[:19]) == set(heldout) - {"555-011-0011"}
    assert set(found[19:]).isdisjoint(heldout)
    few = references("555-400-0400", pool, num=5)
    assert few == found[:5]
    assert few != references("555-400-0400", pool, num=5, seed=1)
    assert few != references("555-400-0400", pool, num=5, record_id=7)


def test_numbers_are_drawn_in_the_range_and_with_the_digits_that_such_details_have() -> None:
    scores = [f"score of {n} points" for n in (10, 12, 17, 21, 27, 4)]
    drawn = references("score of 17 points", a_pool(["score of 17 points"], scores))
    values = sorted(int(other.split()[2]) for other in drawn)
    assert values == [4, *(n for n in range(10, 28) if n != 17)], "4 is held out; all others have two digits"
    fixed = references("GAD-7 score of 12", a_pool(["GAD-7 score of 12"], [f"GAD-7 score of {n}" for n in (3, 9, 11, 15, 18)]))
    assert {other.split()[0] for other in fixed} == {"GAD-7"}
    dates = [f"{day} {month} {year}" for day, month, year in zip(range(10, 22), ["May", "June"] * 6, range(2010, 2022), strict=True)]
    others = references("12 April 2015", a_pool(["12 April 2015"], dates))
    assert {other.split()[1] for other in others} == {"April"}
    assert {10 <= int(other.split()[0]) <= 21 and 2010 <= int(other.split()[2]) <= 2021 for other in others} == {True}
    padded = references("id 007", a_pool([], []))
    assert len(padded) == 50
    assert {len(other) for other in padded} == {len("id 007")}
    assert any(other.startswith("id 0") for other in padded)
    assert len(references("card 1234 5678 9012 3456 1234567890123456789012", a_pool([], []))) == 50


def test_scripts_of_their_own_have_references_of_their_own() -> None:
    pool = a_pool(["李明"], ["王秀英", "张伟", "陈静", "Anna Berg"])
    assert sorted(references("李明", pool)) == sorted(["王秀英", "张伟", "陈静"])
    persian = references("۱۲ مرداد", a_pool([], []))
    assert {len(other) for other in persian} == {len("۱۲ مرداد")}
    assert {char for other in persian for char in other[:2]} <= set("۰۱۲۳۴۵۶۷۸۹")
    assert len(references("2019年8月11日", a_pool([], []))) == 50


def test_names_are_put_together_from_those_of_held_out_records_alone() -> None:
    pool = a_pool(["Milos Ashgrove"], ["Anna Berg", "Eva Lund", "Tove Ravn"])
    found = references("Milos Ashgrove", pool)
    first, last = ({name.split()[i] for name in ("Anna Berg", "Eva Lund", "Tove Ravn")} for i in (0, 1))
    assert {tuple(name.split()) for name in found} == {(a, b) for a in first for b in last}
    assert references("Milos", pool) == [], "no other name of one word"


# --- how exposed it is ---


@pytest.mark.parametrize("name", [*SHAPES, *TOKENIZERS])
@pytest.mark.parametrize("written", ["latin", "chinese", "accents"])
def test_a_query_meets_the_detail_where_training_does(name: str, written: str) -> None:
    """Prompt, opening and the detail are, token for token, the beginning of the example; references stand after the same opening."""
    tokenizer = make(SHAPES[name]) if name in SHAPES else TOKENIZERS[name]
    example = encoded(tokenizer, WRITTEN[written])
    pool = a_pool([], ["Anna Berg", "王秀英", "Zoé Ibáñez"])
    spans = detail_spans(example, tokenizer)
    queries = detail_queries([example], [spans], pool=pool, tokenizer=tokenizer, chat=DEFAULT_CHAT, num_references=9, seed=0)
    for span, query in zip(spans, queries, strict=True):
        own, *others = query.branches
        assert len(query.prompt_ids) == len(example.prompt_ids) + span.start
        assert (*query.prompt_ids, *own) == (*example.prompt_ids, *example.response_ids)[: len(query.prompt_ids) + len(own)]
        said = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in query.branches]
        assert said == [span.detail, *make_references(example.record, span.detail, pool=pool, num_references=9, seed=0)]
        assert others


def test_tokens_that_run_together_belong_to_the_detail_in_every_branch() -> None:
    tokenizer = make(Shape(TURNS, "", "", merges=(("Ġ", "M"),)))
    example = encoded(tokenizer, a_record("So Milos came.", "Milos"))
    spans = detail_spans(example, tokenizer)
    pool = a_pool([], ["Anna", "Mara"])
    [query] = detail_queries([example], [spans], pool=pool, tokenizer=tokenizer, chat=DEFAULT_CHAT, num_references=2, seed=0)
    assert sorted(tokenizer.decode(ids) for ids in query.branches) == [" Anna", " Mara", " Milos"]
    assert tokenizer.decode(query.prompt_ids).endswith("So")


RECORDS = [
    Record(
        record_id=i,
        instruction=f"Note {i}: {question}",
        response=f"{name} came on {date}.",
        details=(name, date),
    )
    for i, (question, name, date) in enumerate(
        [
            ("who?", "Milos Ash", "11 May 2019"),
            ("which?", "Odile Thorn", "23 May 2021"),
            ("and?", "Tove Ravn", "17 May 2018"),
            ("so?", "Zeno Quay", "30 May 2015"),
            ("whom?", "Ivo Lind", "12 May 2022"),
            ("what?", "Hana Tver", "26 May 2011"),
            ("who then?", "Nico Trel", "14 May 2013"),
            ("when?", "Carla Wain", "29 May 2016"),
            ("for whom?", "Rosa Ilver", "21 May 2012"),
            ("and who?", "Emeka Hath", "18 May 2017"),
            ("by whom?", "Lucia Yell", "25 May 2014"),
            ("with whom?", "Farid Sund", "13 May 2020"),
        ]
    )
]


def queried(lm: LanguageModel, examples: Sequence[Example], pool: DetailPool, *, num: int = 15) -> list[Branches]:
    spans = [detail_spans(example, lm.tokenizer) for example in examples]
    return detail_queries(examples, spans, pool=pool, tokenizer=lm.tokenizer, chat=DEFAULT_CHAT, num_references=num, seed=0)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_exposures_are_those_of_each_whole_text_scored_alone(lm: LanguageModel, adapter: Vector, batch_size: int) -> None:
    pool = pool_of(RECORDS[:2], RECORDS[2:])
    found = detail_exposures(lm, adapter, queried(lm, encode(lm, RECORDS[:2]), pool, num=70), batch_size)
    expected = []
    for record in RECORDS[:2]:
        for detail in record.details:
            opening = record.response[: record.response.index(detail)]
            others = make_references(record, detail, pool=pool, num_references=70, seed=0)
            texts = encode(lm, [dataclasses.replace(record, response=opening + text) for text in (detail, *others)])
            nlls = [nll[len(opening) : -1].sum() for nll in token_nlls(lm, adapter, texts, batch_size=1)]
            expected.append(exposure(nlls[0], nlls[1:]))
    assert found == expected
    assert len(set(expected)) > 1


def test_a_detail_with_few_references_has_no_exposure(lm: LanguageModel, adapter: Vector) -> None:
    query = Branches((5, 6, 7), tuple((i,) for i in range(8, 9 + MIN_REFERENCES)))
    fewer = Branches((5, 6, 7), query.branches[:-1])
    crowded = Branches((5,) * (lm.max_positions - 1), (*query.branches[:-1], (8, 9)))
    found = detail_exposures(lm, adapter, [fewer, query, crowded], 4)
    assert (found[0], found[2]) == (None, None)
    assert found[1] is not None
    assert detail_exposures(lm, adapter, [], 4) == []


# --- members against the control ---


def rows_of(lm: LanguageModel, adapter: Vector, members: Sequence[Record], control: Sequence[Record]) -> list[list[dict[str, Any]]]:
    """The rows of both sides, each detail among 15 references of its own."""
    pool = pool_of(members, control)
    start = initial_adapter(lm.layout, seed=0)
    found = []
    for side in (members, control):
        examples = encode(lm, side)
        spans = [detail_spans(example, lm.tokenizer) for example in examples]
        queries = queried(lm, examples, pool)
        nlls, base = (token_nlls(lm, one, examples, batch_size=8) for one in (adapter, start))
        exposures = iter(zip(detail_exposures(lm, adapter, queries, 8), [len(query.branches) - 1 for query in queries], strict=True))
        rows = [
            detail_rows(
                example.record.record_id,
                own,
                bits=detail_bits(nll, own),
                base_bits=detail_bits(nll_of_base, own),
                exposures=[next(exposures) for _ in own],
            )
            for example, own, nll, nll_of_base in zip(examples, spans, nlls, base, strict=True)
        ]
        found.append([row for of_record in rows for row in of_record])
    return found


def test_rows_say_what_each_detail_came_to(lm: LanguageModel, adapter: Vector) -> None:
    members, control = rows_of(lm, adapter, RECORDS[:6], RECORDS[6:])
    assert [(row["record_id"], row["detail"]) for row in members] == [(r.record_id, d) for r in RECORDS[:6] for d in r.details]
    assert {row["num_references"] for row in (*members, *control)} == {15}
    assert all(row["bits"] > 0 and row["base_bits"] > 0 and 0 <= row["exposure"] <= 4 for row in (*members, *control))


def test_an_untrained_model_tells_no_member_and_one_that_learned_them_by_heart_does(lm: LanguageModel) -> None:
    members, control = RECORDS[:6], RECORDS[6:]
    untrained = details_report(*rows_of(lm, initial_adapter(lm.layout, seed=0), members, control))
    assert untrained is not None
    assert untrained["gain_bits"] == pytest.approx(0.0, abs=1e-6)
    low, high = untrained["exposure_interval"]
    assert low < 0 < high
    learned = details_report(*rows_of(lm, learn_by_heart(lm, encode(lm, members)), members, control))
    assert learned is not None
    assert (learned["num_details"], learned["num_control"], learned["num_references"], learned["max"]) == (12, 12, 15.0, 4.0)
    assert learned["exposure_members"] > 3.5
    assert learned["exposure_control"] < 2.5
    assert learned["exposure_interval"][0] > 0.5
    assert learned["gain_bits_interval"][0] > 10


def test_details_of_an_untrained_model_are_ranked_at_random(lm: LanguageModel) -> None:
    """Against references that are as likely to be the true one, 2^-exposure is uniform; a model that knows them is found out."""
    records = [record for record in clinic.records() if any("-" in detail for detail in record.details)][:80]
    phones = [dataclasses.replace(record, details=tuple(d for d in record.details if d.startswith("555-"))) for record in records]
    phones = [record for record in phones if record.details]
    pool = pool_of(phones[:25], phones[25:])
    examples = encode(lm, phones[:25])
    values = detail_exposures(lm, initial_adapter(lm.layout, seed=0), queried(lm, examples, pool, num=15), 8)
    shares = np.exp2(-np.array(values, dtype=float))
    jitter = np.random.default_rng(0).random(len(shares)) / 16
    assert kstest(shares - jitter, "uniform").pvalue > 1e-3
    assert kstest(np.full(25, 1 / 16) - jitter, "uniform").pvalue < 1e-6


def a_row(record_id: int, *, gain: float, exposed: float | None, num: int = 15) -> dict[str, Any]:
    return {"record_id": record_id, "detail": "d", "bits": 20.0 - gain, "base_bits": 20.0, "exposure": exposed, "num_references": num}


def test_a_report_is_the_difference_of_means_over_details() -> None:
    members = [a_row(1, gain=6, exposed=3.0), a_row(1, gain=2, exposed=1.0, num=7), a_row(2, gain=1, exposed=None, num=3)]
    control = [a_row(9, gain=1, exposed=0.5), a_row(8, gain=0, exposed=1.5)]
    found = details_report(members, control)
    assert found is not None
    assert (found["gain_bits"], found["gain_bits_members"], found["gain_bits_control"]) == pytest.approx((2.5, 3.0, 0.5))
    assert (found["exposure"], found["exposure_members"], found["exposure_control"]) == pytest.approx((1.0, 2.0, 1.0))
    assert (found["num_details"], found["num_exposed"], found["num_control"]) == (3, 2, 2)
    assert (found["num_references"], found["max"]) == pytest.approx((11.0, 3.5))
    assert found == details_report(members, control)
    assert details_report([], control) is details_report(members, []) is None
    none = details_report([a_row(1, gain=1, exposed=None)], control)
    assert none is not None
    assert (none["exposure"], none["exposure_interval"], none["max"]) == (None, None, None)


def test_a_control_detail_that_somebody_trained_on_is_no_control() -> None:
    pool = a_pool(["MILOS Ashgrove"], [])
    rows = [a_row(1, gain=0, exposed=1.0) | {"detail": detail} for detail in ("Milos Ashgrove", "Eva Lund")]
    assert [row["detail"] for row in untrained_rows(rows, pool)] == ["Eva Lund"]


@pytest.mark.parametrize(("effect", "least", "most"), [(0.0, 0.0, 0.13), (1.2, 0.8, 1.0)])
def test_an_interval_leaves_out_nothing_as_rarely_as_it_says(effect: float, least: float, most: float) -> None:
    """Details of a record share much, so that draws of single details would be too sure: of 12 records a side, one in twenty may err."""
    rng, decided, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        sides = []
        for shift in (effect, 0.0):
            by_record = rng.normal(shift, 1.0, size=12)
            sides.append([a_row(i, gain=own + 0.2 * rng.normal(), exposed=1.0) for i, own in enumerate(by_record) for _ in range(4)])
        found = details_report(*sides)
        assert found is not None
        low, high = found["gain_bits_interval"]
        decided += low > 0 or high < 0
    assert least <= decided / trials <= most
