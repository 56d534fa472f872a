"""The attack across clients: contexts are counted, queries are seeded one by one, and only what others have counts."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysim.attacks.cross_client import CrossClientSettings, attack_across, contexts, score_across
from raysim.attacks.views import ATTACKS, SEES, ClientView
from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import Example, encode_records
from raysim.lora.layout import initial_adapter
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings, train_adapter

SETTINGS = CrossClientSettings(num_prefixes=2, num_samples=3, max_new_tokens=6, batch_size=4)
RECORDS = [
    Record(0, "who", "The patient is Anna Berg, seen on 5 May.", details=("Anna Berg", "5 May")),
    Record(1, "who", "The patient is Jon Lund, seen on 6 June.", details=("Jon Lund", "6 June")),
    Record(2, "who", "Eva Roos asks for Eva Roos.", details=("Eva Roos", "elsewhere")),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"])


def encoded(lm: LanguageModel, records: list[Record]) -> tuple[Example, ...]:
    examples, _ = encode_records(records, tokenizer=lm.tokenizer, eos_token_id=lm.eos_token_ids[0], max_length=400, chat=ChatFormat())
    return tuple(examples)


def test_contexts_are_the_words_before_details_commonest_first() -> None:
    found = contexts([r.response for r in RECORDS], [r.details for r in RECORDS], num_words=2)
    assert found == ["patient is", "seen on"]
    assert contexts([RECORDS[2].response], [RECORDS[2].details], num_words=2) == [], "nothing stands before it, and the other is not there"
    assert contexts(["x b", "x a", "y a"], [("b",), ("a",), ("a",)], num_words=3) == ["x", "y"]


@given(st.text("ab 1.,\n", max_size=30), st.text("ab1", min_size=1, max_size=3), st.integers(1, 4))
def test_a_context_in_ascii_is_the_last_words_by_blanks(text: str, detail: str, num_words: int) -> None:
    before = f"{text}{detail} z".partition(detail)[0].split()
    assert contexts([f"{text}{detail} z"], [(detail,)], num_words=num_words) == ([" ".join(before[-num_words:])] if before else [])


@pytest.mark.parametrize(
    ("text", "detail", "expected"),
    [
        ("昨天，患者李明来了", "李明", ["天，患者"]),
        ("患者 Anna李明来了", "李明", ["患者 Anna"]),
        ("คุณสมชาย", "สมชาย", ["คุณ"]),
        ("Le cafe\u0301 de José", "Jose\u0301", ["Le cafe\u0301 de"]),
        ("어제 김민수가", "김민수", ["어제"]),
    ],
)
def test_a_context_has_letters_where_a_script_puts_no_blanks(text: str, detail: str, expected: list[str]) -> None:
    assert contexts([text], [(detail,)], num_words=3) == expected


def test_there_is_an_answer_for_each_query_and_each_has_a_seed_of_its_own(lm: LanguageModel) -> None:
    view = ClientView(own=encoded(lm, RECORDS), release=initial_adapter(lm.layout, seed=0))
    texts = attack_across(lm, view, settings=SETTINGS, chat=ChatFormat(), seed=3)
    assert len(texts) == 6
    assert len(set(texts)) > 3
    alone = dataclasses.replace(SETTINGS, batch_size=1)
    assert attack_across(lm, view, settings=alone, chat=ChatFormat(), seed=3) == texts
    assert attack_across(lm, view, settings=SETTINGS, chat=ChatFormat(), seed=4) != texts
    fewer = dataclasses.replace(SETTINGS, num_prefixes=1)
    assert attack_across(lm, view, settings=fewer, chat=ChatFormat(), seed=3) == texts[:3]


def test_who_has_no_private_details_has_nothing_to_ask(lm: LanguageModel) -> None:
    plain = encoded(lm, [Record(0, "a", "b c")])
    view = ClientView(own=plain, release=initial_adapter(lm.layout, seed=0))
    assert attack_across(lm, view, settings=SETTINGS, chat=ChatFormat(), seed=0) == []


def test_figures_by_hand() -> None:
    texts = ["it was anna  berg", "Jon Lund or Max Falk", "Jon", "Lund, and Eva Roos"]
    score = score_across(
        texts, own=["Eva Roos"], others=["Anna Berg", "Jon Lund", "Eva Roos", "Ida Holm"], nobodys=["Max Falk", "Per Dahl", "Jon Lund"]
    )
    assert score.num_details == 3, "what the attacker has itself is no find"
    assert score.coverage == pytest.approx(2 / 3)
    assert score.heldout_coverage == 0.5, "what a client has is no control"
    assert score.efficiency == 2 / 4
    assert score.num_queries == 4


def test_a_detail_is_not_pieced_together_from_two_answers() -> None:
    assert score_across(["Jon", "Lund"], own=[], others=["Jon Lund"], nobodys=[]).coverage == 0.0


def test_nothing_to_find_is_no_rate() -> None:
    score = score_across([], own=["a"], others=["a"], nobodys=[])
    assert (score.coverage, score.heldout_coverage, score.efficiency, score.num_queries) == (None, None, 0.0, 0)


def test_what_the_default_model_learnt_by_heart_from_another_client_comes_out() -> None:
    lm = build_language_model(
        load_base_model("smollm2-135m-instruct"), rank=8, alpha=16.0, dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    victim = encoded(lm, [dataclasses.replace(RECORDS[1], instruction="")])
    settings = TrainSettings(
        num_epochs=8, max_steps=0, batch_size=1, lr=0.01, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0
    )
    start = initial_adapter(lm.layout, seed=0)
    taught, _ = train_adapter(lm, start, victim, settings=settings, seed=0)
    longer = dataclasses.replace(SETTINGS, max_new_tokens=16)
    found = {}
    for name, release in (("taught", taught), ("untaught", start)):
        view = ClientView(own=encoded(lm, RECORDS[:1]), release=release)
        texts = attack_across(lm, view, settings=longer, chat=ChatFormat(), seed=1)
        found[name] = score_across(texts, own=RECORDS[0].details, others=RECORDS[1].details, nobodys=["Max Falk"])
    assert (found["taught"].coverage, found["taught"].heldout_coverage) == (1.0, 0.0)
    assert found["untaught"].coverage == 0.0


def test_every_attack_is_by_a_party_whose_sight_is_listed() -> None:
    assert {party for _, party, _ in ATTACKS} == set(SEES)
