"""Canaries that nothing but training can give away, exposure as it is defined, and a model that remembers what it saw often."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, chisquare, kstest

from raysim.attacks import canaries as module
from raysim.attacks.canaries import (
    Canary,
    continuation_nlls,
    exposure,
    exposures,
    make_canaries,
    membership_canaries,
    references,
    secret_examples,
    secret_nlls,
    secret_tokens,
)
from raysim.attacks.membership import loss_scores, token_nlls
from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import Example, encode_chat
from raysim.lora.layout import Vector, initial_adapter
from raysim.model.language_model import LanguageModel
from raysim.model.train import TrainSettings, train_adapter
from raysim.privacy.audit_bounds import one_run_audit
from tests.tiny_models import build, encode, sharp_base

Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base(), rank=8)


@pytest.fixture(scope="module")
def adapter(lm: LanguageModel) -> Vector:
    """An adapter that does something: random in both factors."""
    return np.random.default_rng(0).normal(scale=0.1, size=lm.layout.num_parameters).astype(np.float32)


# --- records ---


def test_canaries_are_what_was_asked_for() -> None:
    canaries = make_canaries(multiplicities=[0, 1, 4], num_per_multiplicity=3, seed=5, first_record_id=100)
    assert [canary.multiplicity for canary in canaries] == [0, 0, 0, 1, 1, 1, 4, 4, 4]
    assert [canary.included for canary in canaries] == [False] * 3 + [True] * 6
    assert [canary.record.record_id for canary in canaries] == list(range(100, 109))
    assert len({canary.secret for canary in canaries}) == len({canary.record.instruction for canary in canaries}) == 9
    assert len({canary.record.group for canary in canaries}) == 9
    for canary in canaries:
        assert canary.record.response.endswith(canary.secret)
        assert canary.record.details == (canary.secret,)
        assert canary.secret not in canary.record.instruction
        digits = canary.secret.split("-")
        assert [len(part) for part in digits] == [3, 3, 3]
        assert "".join(digits).isdigit()
    inserted = {canary.record.record_id: canary.num_copies for canary in canaries if canary.num_copies}
    assert inserted == {103: 1, 104: 1, 105: 1, 106: 4, 107: 4, 108: 4}


def test_seeds_and_kinds_have_canaries_of_their_own() -> None:
    def secrets(canaries: list[Canary]) -> set[str]:
        return {canary.secret for canary in canaries}

    first = make_canaries(multiplicities=[1], num_per_multiplicity=50, seed=0, first_record_id=0)
    assert first == make_canaries(multiplicities=[1], num_per_multiplicity=50, seed=0, first_record_id=0)
    assert not secrets(first) & secrets(make_canaries(multiplicities=[1], num_per_multiplicity=50, seed=1, first_record_id=0))
    others = membership_canaries(50, seed=0, first_record_id=0)
    assert not secrets(first) & secrets(others)
    assert not {c.record.instruction for c in first} & {c.record.instruction for c in others}


def test_a_number_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="multiplicities"):
        make_canaries(multiplicities=[1, -1], num_per_multiplicity=1, seed=0, first_record_id=0)
    with pytest.raises(ValueError, match="1000001"):
        membership_canaries(10**6 + 1, seed=0, first_record_id=0)


@pytest.mark.parametrize("seed", range(3))
def test_coins_are_fair_and_blind(seed: int) -> None:
    """As many in as out, no runs, and nothing in a record or in its place that goes with the coin."""
    canaries = membership_canaries(4000, seed=seed, first_record_id=0)
    coins = np.array([canary.included for canary in canaries])
    low, high = binom.ppf([1e-4, 1 - 1e-4], 4000, 0.5)
    assert low <= coins.sum() <= high
    assert low <= (coins[1:] == coins[:-1]).sum() <= high
    numbers = np.array([int(canary.secret.replace("-", "")) for canary in canaries])
    assert abs(np.corrcoef(coins, numbers)[0, 1]) < 4 / math.sqrt(4000)
    assert abs(np.corrcoef(coins, np.arange(4000))[0, 1]) < 4 / math.sqrt(4000)
    assert sum(canary.num_copies for canary in canaries) == coins.sum()
    assert all(canary.multiplicity == 1 for canary in canaries)


def test_coins_differ_between_seeds() -> None:
    first, second = (np.array([c.included for c in membership_canaries(400, seed=seed, first_record_id=0)]) for seed in (0, 1))
    assert 150 < (first == second).sum() < 250


def test_references_are_nobodys_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a space of a thousand secrets, most of each half is drawn: the halves never meet, whatever the seed."""
    monkeypatch.setattr(module, "NUM_SECRETS", 1000)
    owned: set[str] = set()
    drawn: set[str] = set()
    for seed in range(4):
        canaries = make_canaries(multiplicities=[1], num_per_multiplicity=400, seed=seed, first_record_id=0)
        owned |= {canary.secret for canary in [*canaries, *membership_canaries(400, seed=seed, first_record_id=0)]}
        others = references(canaries[0], num_references=400, seed=seed)
        assert len(set(others)) == 400
        drawn |= set(others)
    assert not owned & drawn
    assert len(owned) + len(drawn) > 900


def test_references_are_of_the_same_form_and_their_own() -> None:
    first, second = make_canaries(multiplicities=[1], num_per_multiplicity=2, seed=0, first_record_id=7)
    others = references(first, num_references=500, seed=0)
    assert others == references(first, num_references=500, seed=0)
    assert not set(others) & set(references(second, num_references=500, seed=0))
    assert not set(others) & set(references(first, num_references=500, seed=1))
    assert {len(secret) for secret in others} == {len(first.secret)}


@pytest.mark.parametrize("half", ["canaries", "references"])
def test_secrets_are_uniform(half: str) -> None:
    """Every digit in every place as often as every other, in the canaries' half and in the references'."""
    canaries = membership_canaries(4000, seed=3, first_record_id=0)
    secrets = [c.secret for c in canaries] if half == "canaries" else references(canaries[0], num_references=4000, seed=3)
    for place in (0, 1, 2, 4, 5, 6, 8, 9, 10):
        counts = Counter(secret[place] for secret in secrets)
        assert chisquare([counts[str(digit)] for digit in range(10)]).pvalue > 1e-5


# --- exposure ---


def test_exposure_by_hand() -> None:
    others = [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert exposure(4.0, others) == 3.0
    assert exposure(5.5, others) == 2.0
    assert exposure(12.0, others) == 0.0
    assert exposure(5.0, others) == 2.0, "a tie counts for the reference"
    assert exposure(1.0, [1.0] * 7) == 0.0, "a model that tells nothing apart exposes nothing"


@settings(max_examples=50)
@given(st.floats(-5, 5), st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40))
def test_exposure_is_the_share_of_likelier_secrets(own: float, others: list[float]) -> None:
    value = exposure(own, others)
    assert 2**-value == pytest.approx((1 + sum(other <= own for other in others)) / (len(others) + 1))
    assert 0 <= value <= math.log2(len(others) + 1)
    assert exposure(own - 1, others) >= value


def test_secrets_never_seen_are_exposed_as_rarely_as_stated() -> None:
    rng = np.random.default_rng(1)
    values = np.array([exposure(draw[0], draw[1:]) for draw in rng.normal(size=(4000, 64))])
    for level in (1, 2, 4, 6):
        assert binom.ppf(1e-4, 4000, 2.0**-level) <= (values >= level).sum() <= binom.ppf(1 - 1e-4, 4000, 2.0**-level)


def test_unusable_likelihoods_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        exposure(math.nan, [1.0])
    with pytest.raises(ValueError, match="must be finite"):
        exposure(0.0, [1.0, math.nan])
    with pytest.raises(ValueError, match="at least 1"):
        exposure(0.0, [])


# --- scoring a model ---


def test_secret_is_scored_where_training_meets_it(lm: LanguageModel) -> None:
    """Prompt, opening and secret are, token for token, the record as it is trained on, less its end."""
    canary = make_canaries(multiplicities=[1], num_per_multiplicity=1, seed=0, first_record_id=0)[0]
    (example,) = encode(lm, [canary.record])
    (scored,) = secret_examples(lm.tokenizer, [canary])
    assert [*scored.prompt_ids, *scored.response_ids, 1] == [*example.prompt_ids, *example.response_ids]
    assert lm.tokenizer.decode(scored.response_ids) == canary.secret
    spoken = secret_tokens(lm.tokenizer, canary, [canary.secret], chat=ChatFormat("Be brief."))[0]
    assert spoken[: -len("The access code is ")] == encode_chat(
        lm.tokenizer, [("user", canary.record.instruction)], chat=ChatFormat("Be brief.")
    )


def test_tokens_that_run_together_belong_to_the_secret() -> None:
    class Pairs:
        """Two characters a token, from the left: the boundary falls inside a token when the opening is odd."""

        chat_template = None

        def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [int.from_bytes(text[i : i + 2].encode(), "big") for i in range(0, len(text), 2)]}

    record = Record(record_id=0, instruction="Which?", response="abc482-109-375")
    canary = Canary(record=record, secret="482-109-375", multiplicity=1, included=True)
    prompt, secrets = secret_tokens(Pairs(), canary, ["482-109-375", "582-109-375"], chat=ChatFormat())
    spelled = ["".join(token.to_bytes(2, "big").strip(b"\0").decode() for token in ids) for ids in (prompt, *secrets)]
    assert spelled[0].endswith("Response:\nab") or spelled[0].endswith("ab")
    assert spelled[1:] == ["c482-109-375", "c582-109-375"]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_one_prompt_for_many_is_each_on_its_own(lm: LanguageModel, adapter: Vector, batch_size: int) -> None:
    rng = np.random.default_rng(3)
    prompt = rng.integers(5, 200, size=17).tolist()
    continuations = [rng.integers(5, 200, size=length).tolist() for length in (5, 1, 9, 5, 2, 7, 1)]
    record = Record(record_id=0, instruction="", response="")
    whole = [Example(record=record, prompt_ids=tuple(prompt), response_ids=tuple(ids)) for ids in continuations]
    expected = [nll.sum() for nll in token_nlls(lm, adapter, whole, batch_size=4)]
    np.testing.assert_allclose(continuation_nlls(lm, prompt, continuations, batch_size=batch_size), expected, rtol=1e-5)


def test_exposures_are_of_the_secrets_given(lm: LanguageModel, adapter: Vector) -> None:
    """A model's figures, put together again from examples that are scored one by one."""
    canaries = make_canaries(multiplicities=[1], num_per_multiplicity=2, seed=1, first_record_id=3)
    scored = secret_nlls(lm, adapter, canaries, num_references=9, seed=4, batch_size=4)
    values = exposures(lm, adapter, canaries, num_references=9, seed=4, batch_size=4)
    own = -loss_scores(token_nlls(lm, adapter, secret_examples(lm.tokenizer, canaries), batch_size=1)) * 11
    np.testing.assert_allclose([nll for nll, _ in scored], own, rtol=1e-4)
    for canary, (own_nll, other_nlls), value in zip(canaries, scored, values, strict=True):
        opening = canary.record.response.removesuffix(canary.secret)
        others = [
            Record(record_id=0, instruction=canary.record.instruction, response=opening + secret)
            for secret in references(canary, num_references=9, seed=4)
        ]
        nlls = [nll[len(opening) : -1].sum() for nll in token_nlls(lm, adapter, encode(lm, others), batch_size=9)]
        np.testing.assert_allclose(other_nlls, nlls, rtol=1e-4)
        assert value == exposure(own_nll, other_nlls)


def test_an_untrained_model_exposes_nothing(lm: LanguageModel) -> None:
    """Exposures under the random base are those of random ranks: 2^-exposure is uniform."""
    canaries = make_canaries(multiplicities=[0], num_per_multiplicity=60, seed=2, first_record_id=0)
    values = exposures(lm, initial_adapter(lm.layout, seed=0), canaries, num_references=63, seed=0, batch_size=64)
    assert kstest(np.exp2(-np.array(values)), "uniform").pvalue > 1e-3


def train_on(lm: LanguageModel, canaries: list[Canary], *, num_epochs: int) -> Vector:
    """An adapter trained, without any protection, on the canaries that are included."""
    settings = TrainSettings(
        num_epochs=num_epochs, max_steps=0, batch_size=8, lr=0.01, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0
    )
    examples = encode(lm, [canary.record for canary in canaries for _ in range(canary.num_copies)])
    return train_adapter(lm, initial_adapter(lm.layout, seed=0), examples, settings=settings, seed=0)[0]


def test_exposure_rises_with_how_often_a_secret_was_seen(lm: LanguageModel) -> None:
    canaries = make_canaries(multiplicities=[0, 1, 4, 16], num_per_multiplicity=4, seed=0, first_record_id=0)
    trained = train_on(lm, canaries, num_epochs=4)
    values = np.array(exposures(lm, trained, canaries, num_references=255, seed=0, batch_size=256)).reshape(4, 4)
    means = values.mean(axis=1)
    assert means[0] < 3.0, "secrets that were not trained on are not exposed"
    assert (np.diff(means) > 0).all(), means
    assert means[3] > 6.0, "of 256 secrets, the one seen most often is among the first four"


def test_one_run_audit_refutes_a_model_without_protection(lm: LanguageModel) -> None:
    """From canaries to epsilon: what was trained on is told apart, and other coins for the same scores refute nothing."""
    canaries = membership_canaries(32, seed=0, first_record_id=0)
    examples = secret_examples(lm.tokenizer, canaries)
    scores = loss_scores(token_nlls(lm, train_on(lm, canaries, num_epochs=60), examples, batch_size=32))
    found = one_run_audit(scores, [canary.included for canary in canaries], delta=1e-5, num_guesses=32)
    assert found.epsilon_lower > 1.0
    others = [canary.included for canary in membership_canaries(32, seed=1, first_record_id=0)]
    assert one_run_audit(scores, others, delta=1e-5, num_guesses=32).epsilon_lower < 0.2
    before = loss_scores(token_nlls(lm, initial_adapter(lm.layout, seed=0), examples, batch_size=32))
    assert one_run_audit(before, [canary.included for canary in canaries], delta=1e-5, num_guesses=32).epsilon_lower < 0.2
