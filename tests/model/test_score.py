"""Branches of one prompt against the obvious computation: each prompt and branch alone, in an ordinary forward pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysim.model.base_model import load_base_model
from raysim.model.kv_cache import has_plain_attention
from raysim.model.language_model import LanguageModel
from raysim.model.score import MIN_SHARED, Branches, branch_nlls, next_token_logprobs
from tests.tiny_models import build, sharp_base

BEGINNING = tuple(range(10, 10 + MIN_SHARED + 5))
ROWS = [
    Branches((*BEGINNING, 40, 41, 42), ((50, 51), (60,), (50, 51, 52, 53))),
    Branches((*BEGINNING, 43), ((70, 71, 72),)),
    Branches((*BEGINNING, 44, 45, 46, 47, 48, 49, 50), ((60, 61), (60, 61), (62, 60))),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A model with clear choices, and an adapter that takes part in them."""
    model = build(sharp_base())
    model.set_adapter(np.random.default_rng(0).normal(0, 0.2, model.layout.num_parameters).astype(np.float32))
    return model


def logprobs_alone(lm: LanguageModel, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of the token after each of `ids`, shape (len(ids), V), in one plain forward pass."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def nll_alone(lm: LanguageModel, prompt: tuple[int, ...], branch: tuple[int, ...]) -> float:
    logprobs = logprobs_alone(lm, prompt + branch)
    return -sum(float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(branch))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_likelihoods_are_those_of_each_branch_alone(lm: LanguageModel, batch_size: int) -> None:
    expected = [[nll_alone(lm, row.prompt_ids, branch) for branch in row.branches] for row in ROWS]
    for row, want in zip(branch_nlls(lm, ROWS, batch_size=batch_size), expected, strict=True):
        assert row == pytest.approx(want, rel=1e-5, abs=1e-5)
    assert expected[0][0] != pytest.approx(expected[2][0], rel=1e-2), "the figures tell branches apart"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_next_tokens_are_those_after_each_branch_alone(lm: LanguageModel, batch_size: int) -> None:
    wanted = (5, 99, 200)
    for row, found in zip(ROWS, next_token_logprobs(lm, ROWS, wanted, batch_size=batch_size), strict=True):
        expected = np.array([logprobs_alone(lm, row.prompt_ids + branch)[-1, list(wanted)].numpy() for branch in row.branches])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_branch_does_not_see_the_other_branches(lm: LanguageModel) -> None:
    prompt, branch = (10, 11, 12), (50, 51, 52)
    beside = [((60, 61, 62, 63, 64), branch), ((70,), branch), (branch, branch)]
    found = [branch_nlls(lm, [Branches(prompt, branches)], batch_size=1)[0][1] for branches in beside]
    assert found == pytest.approx([nll_alone(lm, prompt, branch)] * 3, rel=1e-5)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(5, 250), min_size=1, max_size=30),
            st.lists(st.lists(st.integers(5, 250), min_size=1, max_size=6), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_any_rows_score_as_they_do_alone(rows: list[tuple[list[int], list[list[int]]]], common: bool) -> None:
    lm = build(sharp_base(seed=1))
    made = [Branches((BEGINNING if common else ()) + tuple(prompt), tuple(map(tuple, branches))) for prompt, branches in rows]
    for row, found in zip(made, branch_nlls(lm, made, batch_size=2), strict=True):
        assert found == pytest.approx([nll_alone(lm, row.prompt_ids, branch) for branch in row.branches], rel=1e-4, abs=1e-4)


def test_one_prompt_may_be_the_beginning_of_another(lm: LanguageModel) -> None:
    rows = [Branches(BEGINNING, ((50, 51),)), Branches((*BEGINNING, 52), ((50, 51),)), Branches(BEGINNING, ((50, 51),))]
    found = branch_nlls(lm, rows, batch_size=3)
    assert found[0] == pytest.approx(found[2])
    assert [nlls[0] for nlls in found] == pytest.approx([nll_alone(lm, row.prompt_ids, (50, 51)) for row in rows], rel=1e-5)


def test_bfloat16_is_near() -> None:
    base = build(load_base_model("tiny", dtype="bfloat16"))
    rows = [replace(row, branches=row.branches[:1]) for row in ROWS]
    found = branch_nlls(base, rows, batch_size=3)
    plain = build(load_base_model("tiny"))
    assert [nlls[0] for nlls in found] == pytest.approx([nll_alone(plain, row.prompt_ids, row.branches[0]) for row in rows], rel=0.02)


def test_branches_share_the_prompt_s_positions_when_the_context_is_tight(lm: LanguageModel) -> None:
    tight = replace(lm, max_positions=len(BEGINNING) + 4)
    row = Branches(BEGINNING, ((50, 51, 52, 53),) * 5)
    assert branch_nlls(tight, [row], batch_size=1)[0] == pytest.approx([nll_alone(lm, BEGINNING, (50, 51, 52, 53))] * 5, rel=1e-5)
    with pytest.raises(ValueError, match=rf"rows\[0\] takes {len(BEGINNING) + 5} tokens.*={len(BEGINNING) + 4}"):
        branch_nlls(tight, [Branches(BEGINNING, ((50, 51, 52, 53, 54),))], batch_size=1)


@pytest.mark.parametrize("row", [Branches((), ((5,),)), Branches((5,), ()), Branches((5,), ((6,), ()))])
def test_rows_without_tokens_are_refused(lm: LanguageModel, row: Branches) -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] has an empty prompt or branch"):
        branch_nlls(lm, [ROWS[0], row], batch_size=2)


def test_a_short_window_scores_each_branch_behind_its_prompt_and_a_long_one_behind_one_another(lm: LanguageModel) -> None:
    """By value against each text alone: see also tests/kinds."""
    base = sharp_base()
    longest = max(row.longest for row in ROWS)
    for window, is_plain in ((8, False), (longest, True), (longest - 1, False)):
        changes: dict[str, Any] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
        mistral = build(replace(base, config=base.config | changes))
        assert has_plain_attention(mistral.model.get_base_model(), longest=longest) == is_plain
        alone = [
            [branch_nlls(mistral, [Branches(row.prompt_ids, (branch,))], batch_size=1)[0][0] for branch in row.branches] for row in ROWS
        ]
        for found, expected in zip(branch_nlls(mistral, ROWS, batch_size=2), alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


def test_empty_batches_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        branch_nlls(lm, ROWS, batch_size=0)


def test_nothing_is_scored_where_there_is_nothing(lm: LanguageModel) -> None:
    assert branch_nlls(lm, [], batch_size=1) == []
    assert next_token_logprobs(lm, [], [5], batch_size=1) == []
