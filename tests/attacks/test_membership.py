"""Membership scores by hand, likelihoods against the full logits, and an attack on models whose members are known."""

import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from raysim.attacks.membership import (
    OWN_VARIANCE_SHADOWS,
    calibrated_scores,
    lira_scores,
    loss_scores,
    membership_report,
    min_k_scores,
    token_nlls,
    zlib_scores,
)
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.lora.layout import Vector, initial_adapter
from raysim.model.language_model import LanguageModel
from raysim.model.train import TrainSettings, response_nll, train_adapter
from tests.tiny_models import build, encode, sharp_base

Floats = NDArray[np.float64]

RECORDS = [
    Record(record_id=i, instruction=question, response=answer)
    for i, (question, answer) in enumerate(
        [
            ("Name the ferry.", "Odile"),
            ("Which street?", "9 Quay Lane, over the mill"),
            ("How many?", "714"),
            ("Who keeps the key to the boat house in winter?", "Tove"),
            ("What did the letter say?", "Come by noon, and bring the blue ledger."),
            ("Where?", "Ravn"),
            ("Under which name was the parcel left?", "Z. Ibarra"),
            ("When?", "On the 3rd"),
        ]
    )
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base(), rank=8)


@pytest.fixture(scope="module")
def examples(lm: LanguageModel) -> list[Example]:
    return encode(lm, RECORDS)


@pytest.fixture(scope="module")
def adapter(lm: LanguageModel) -> Vector:
    """An adapter that does something: random in both factors."""
    return np.random.default_rng(0).normal(scale=0.1, size=lm.layout.num_parameters).astype(np.float32)


# --- likelihoods ---


@torch.no_grad()
def test_token_nlls_are_those_of_the_full_logits(lm: LanguageModel, examples: list[Example], adapter: Vector) -> None:
    nlls = token_nlls(lm, adapter, examples, batch_size=3)
    lm.set_adapter(adapter)
    for example, nll in zip(examples, nlls, strict=True):
        ids = torch.tensor([[*example.prompt_ids, *example.response_ids]])
        log_probs = torch.log_softmax(lm.model(input_ids=ids).logits[0, :-1], dim=-1)
        expected = -log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(example.prompt_ids) - 1 :]
        assert nll.shape == (len(example.response_ids),)
        np.testing.assert_allclose(nll, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_token_nlls_add_up_to_what_training_minimises(lm: LanguageModel, examples: list[Example], adapter: Vector) -> None:
    nlls = token_nlls(lm, adapter, examples, batch_size=8)
    with torch.no_grad():
        sums, counts = response_nll(lm, examples)
    np.testing.assert_allclose([nll.sum() for nll in nlls], sums.numpy(), rtol=1e-4)
    assert [len(nll) for nll in nlls] == counts.tolist()


def test_batches_and_order_change_nothing(lm: LanguageModel, examples: list[Example], adapter: Vector) -> None:
    together = token_nlls(lm, adapter, examples, batch_size=100)
    for batch_size in (1, 3):
        for one, other in zip(together, token_nlls(lm, adapter, examples, batch_size=batch_size), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(together[::-1], token_nlls(lm, adapter, examples[::-1], batch_size=3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert token_nlls(lm, adapter, [], batch_size=3) == []


def test_the_adapter_given_is_the_one_scored(lm: LanguageModel, examples: list[Example], adapter: Vector) -> None:
    before = token_nlls(lm, initial_adapter(lm.layout, seed=0), examples, batch_size=8)
    under = token_nlls(lm, adapter, examples, batch_size=8)
    np.testing.assert_array_equal(lm.get_adapter(), adapter)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(before, under, strict=True))


# --- scores by hand ---

NLLS = [np.array([1.0, 2.0, 6.0]), np.array([0.5]), np.array([4.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 3.0, 0.0, 0.0])]


def test_loss_is_the_mean_of_the_tokens() -> None:
    np.testing.assert_allclose(loss_scores(NLLS), [-3.0, -0.5, -0.8])


def test_calibration_subtracts_the_base() -> None:
    base = [np.array([3.0, 3.0, 3.0]), np.array([2.5]), np.zeros(10)]
    np.testing.assert_allclose(calibrated_scores(NLLS, base), [0.0, 2.0, -0.8])
    np.testing.assert_allclose(calibrated_scores(NLLS, NLLS), np.zeros(3))


def test_zlib_is_bits_over_bits() -> None:
    texts = ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "q7", "é"]
    expected = [-nll.sum() / math.log(2) / (8 * len(zlib.compress(text.encode()))) for nll, text in zip(NLLS, texts, strict=True)]
    np.testing.assert_allclose(zlib_scores(NLLS, texts), expected)
    same_nll = zlib_scores([NLLS[0]] * 2, ["a" * 60, "x9!kQ@z0-=1mW;vRt8#bN5&yLp3^uHc7*sJf2(dGo4)iEa6_qTn"])
    assert same_nll[0] < same_nll[1], "what zlib finds hard counts for more"


def test_min_k_is_the_worst_fifth() -> None:
    np.testing.assert_allclose(min_k_scores(NLLS), [-6.0, -0.5, -3.5])
    np.testing.assert_allclose(min_k_scores(NLLS, share=1.0), loss_scores(NLLS))
    np.testing.assert_allclose(min_k_scores([np.arange(100.0)], share=0.29), [-np.arange(71.0, 100.0).mean()])
    with pytest.raises(ValueError, match=r"share=0\.0"):
        min_k_scores(NLLS, share=0.0)


@settings(max_examples=30)
@given(st.lists(st.lists(st.floats(0, 20), min_size=1, max_size=12), min_size=1, max_size=5), st.floats(0.01, 5))
def test_lower_losses_are_higher_scores(nlls: list[list[float]], drop: float) -> None:
    texts = ["text"] * len(nlls)
    better = [[value - drop for value in nll] for nll in nlls]
    for scores in (loss_scores, min_k_scores, lambda values: zlib_scores(values, texts), lambda values: calibrated_scores(values, nlls)):
        assert (scores(better) > scores(nlls)).all()


# --- LiRA ---


def test_few_shadows_share_one_variance() -> None:
    shadows = np.array([[-1.0, -5.0], [-3.0, -5.5], [99.0, -4.5]])
    is_out = np.array([[True, True], [True, True], [False, True]])
    variance = (1.0 + 1.0 + 0.0 + 0.25 + 0.25) / 3
    expected = [(-1.5 + 2.0) / math.sqrt(variance), (-5.0 + 5.0) / math.sqrt(variance)]
    np.testing.assert_allclose(lira_scores([-1.5, -5.0], shadows, is_out=is_out), expected)
    shadows[2, 0] = math.nan
    np.testing.assert_allclose(lira_scores([-1.5, -5.0], shadows, is_out=is_out), expected)


def test_many_shadows_have_a_variance_for_each_example() -> None:
    rng = np.random.default_rng(1)
    spread = np.array([0.1, 1.0, 3.0])
    shadows = rng.normal(-4.0, 1.0, size=(400, 3)) * spread
    target = np.array([-0.3, -3.0, -8.0])
    own = lira_scores(target, shadows, is_out=np.ones_like(shadows))
    np.testing.assert_allclose(own, (target - shadows.mean(axis=0)) / shadows.std(axis=0, ddof=1))
    one_short = lira_scores(target, shadows[: OWN_VARIANCE_SHADOWS - 1], is_out=np.ones((OWN_VARIANCE_SHADOWS - 1, 3)))
    differences = target - shadows[: OWN_VARIANCE_SHADOWS - 1].mean(axis=0)
    np.testing.assert_allclose(one_short / one_short[2], differences / differences[2])


def test_of_one_shadow_only_the_difference_is_known() -> None:
    np.testing.assert_allclose(lira_scores([-1.0, -2.0], [[-3.0, -2.5]], is_out=[[1, 1]]), [2.0, 0.5])


def test_an_example_in_every_shadow_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 examples"):
        lira_scores([-1.0, -2.0], np.zeros((2, 2)), is_out=[[True, False], [True, False]])


def test_lira_finds_members_that_difficulty_hides() -> None:
    """Losses differ far more between examples than by membership: LiRA's AUC is what the shift allows, loss's is no better than chance."""
    rng = np.random.default_rng(2)
    number = 600
    difficulty = rng.normal(-10, 5, size=number)
    member = np.arange(number) < number // 2
    target = difficulty + 1.5 * member + rng.normal(size=number)
    shadow_member = rng.random((100, number)) < 0.4
    shadows = difficulty + 1.5 * shadow_member + rng.normal(size=(100, number))
    few = lira_scores(target, shadows[:16], is_out=~shadow_member[:16])
    many = lira_scores(target, shadows, is_out=~shadow_member)
    best = norm.cdf(1.5 / math.sqrt(2))
    assert roc_auc_score(member, target) < 0.65
    assert roc_auc_score(member, few) == pytest.approx(best, abs=0.04)
    assert roc_auc_score(member, many) == pytest.approx(best, abs=0.03)


# --- the report, and a model with members ---


def test_report_holds_every_figure() -> None:
    report = membership_report(np.arange(50.0, 150.0), np.arange(0.0, 100.0))
    assert json.loads(json.dumps(report)) == report
    assert (report["num_in"], report["num_out"]) == (100, 100)
    assert report["auc"] == pytest.approx(0.875)
    assert report["auc_interval"][0] < 0.875 < report["auc_interval"][1]
    assert (report["tpr_at_0.1pct"], report["tpr_at_1pct"]) == (0.5, 0.51)
    assert report["tpr_at_0.1pct_interval"][0] == 0.0, "a hundred non-members cannot show so strict a threshold"
    assert 0.51 < report["tpr_at_1pct_interval"][1] <= 1.0


def test_members_of_a_trained_model_stand_out(lm: LanguageModel, examples: list[Example]) -> None:
    """Half of the records are trained on: every score sees it, and none does before training."""
    settings = TrainSettings(
        num_epochs=60, max_steps=0, batch_size=8, lr=0.01, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0
    )
    others = [replace(record, response=record.response[::-1]) for record in RECORDS]
    inside, outside = examples, encode(lm, others)
    everyone, texts = [*inside, *outside], [record.response for record in [*RECORDS, *others]]
    fresh = initial_adapter(lm.layout, seed=0)
    tuned, _ = train_adapter(lm, fresh, inside, settings=settings, seed=0)
    base, trained = (token_nlls(lm, vector, everyone, batch_size=8) for vector in (fresh, tuned))
    half = len(inside)
    for scores in (loss_scores, min_k_scores, lambda nlls: zlib_scores(nlls, texts), lambda nlls: calibrated_scores(nlls, base)):
        values = scores(trained)
        assert membership_report(values[:half], values[half:])["auc"] > 0.95
        before = scores(base)
        assert 0.15 < membership_report(before[:half], before[half:])["auc"] < 0.85
