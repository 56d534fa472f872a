"""FEDPIT: FEDIT at one end of its mix, synthetic records alone at the other, and a private adapter that stays private."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raysim.data.records import Record
from raysim.methods.call import ClientState
from raysim.methods.fedit import fedit as fedit_group
from raysim.methods.fedpit import fedpit as fedpit_group
from raysim.methods.fedpit import mix
from raysim.methods.synthesis.pool import select
from raysim.methods.synthesis.write import Candidate, instruction_following_scores
from raysim.model.language_model import LanguageModel
from raysim.model.train import train_adapter
from tests.method_calls import RECORDS, alone, in_round, make_call, other_responses, some_adapter
from tests.tiny_models import build, encode, sharp_base, spelling_base

fedit = alone(fedit_group)
fedpit = alone(fedpit_group)

# A model that writes the same pair whatever it is shown, each word with white space of its own.
INSTRUCTION = [*".Do", "ĉ", *"my", "ċ", *"le", "Ċ"]
ANSWER = ["<|assistant|>", *"Big", "č", *"cat", "Ġ", *"runs", "<|end|>"]
PAIR = {"instruction": "Do my le", "response": "Big\rcat runs"}
FEDPIT = ["method.name=fedpit", "fedpit.max_instruction_tokens=16", "fedpit.max_response_tokens=24", "fedpit.num_candidates=4"]
REPEATING = [*FEDPIT, "fedpit.max_rouge_l=1"]  # equal pairs pass the filters, so that there is something to choose from
VECTORS = arrays(np.float32, 7, elements=st.floats(-1e3, 1e3, width=32))


@pytest.fixture(scope="module")
def speller() -> LanguageModel:
    """Given an adapter of zeros it spells; the tests' calls start from zeros."""
    return build(spelling_base(INSTRUCTION, ANSWER))


def spelling_call(lm: LanguageModel, *overrides: str, **options: Any) -> Any:
    """A call from an adapter whose B is zero, under which the model spells."""
    call = make_call(lm, *overrides, **options)
    return replace(call, adapter=np.where(lm.layout.group_mask("A"), call.adapter, np.float32(0)))


def synthetic_of(lm: LanguageModel, pairs: list[dict[str, str]]) -> list[Any]:
    return encode(lm, [Record(record_id=i, label="synthetic", **pair) for i, pair in enumerate(pairs)])


# --- the two ends of the mix ---


def test_all_private_and_real_only_is_fedit_bit_for_bit(speller: LanguageModel) -> None:
    settings = ["fedpit.share_mix=1", "fedpit.num_candidates=0", "fedpit.local_train_on=real"]
    call = make_call(speller, *FEDPIT, *settings)
    result = fedpit(speller, call)
    assert result.upload["adapter"].any()
    assert result.upload["adapter"].tobytes() == fedit(speller, call).upload["adapter"].tobytes()
    assert result.synthetic == ()


def test_without_synthetic_records_nothing_is_shared(speller: LanguageModel) -> None:
    result = fedpit(speller, make_call(speller, *FEDPIT, "fedpit.num_candidates=0"))
    assert not result.upload["adapter"].any()
    assert result.state is not None
    assert result.state.arrays["adapter"].tobytes() != some_adapter(speller).tobytes(), "the private adapter was not trained"


@pytest.mark.parametrize("train_on", ["real", "real+synthetic"])
def test_the_update_is_of_synthetic_records_and_the_private_adapter_stays(speller: LanguageModel, train_on: str) -> None:
    call = spelling_call(speller, *FEDPIT, f"fedpit.local_train_on={train_on}")
    result = fedpit(speller, call)
    assert result.state is not None
    assert result.state.records == [PAIR]
    synthetic = synthetic_of(speller, [PAIR])
    options = {"settings": call.train_settings()}
    public, _ = train_adapter(speller, call.adapter, synthetic, **options, seed=call.seed("synthetic"))
    local = [*call.shard, *(synthetic if train_on == "real+synthetic" else [])]
    private, _ = train_adapter(speller, call.adapter, local, **options, seed=call.seed("train"))
    assert result.upload["adapter"].tobytes() == (public - call.adapter).tobytes()
    assert result.upload["adapter"].any()
    assert result.state.arrays.keys() == {"adapter"}
    assert result.state.arrays["adapter"].tobytes() == private.tobytes()
    assert (private - call.adapter).tobytes() != result.upload["adapter"].tobytes()


@pytest.mark.parametrize("train_on", ["real", "real+synthetic"])
def test_private_records_reach_the_update_through_what_is_written_only(speller: LanguageModel, train_on: str) -> None:
    """Other records from which the same pairs are written: the same update, bit for bit, and another private adapter."""
    call, other = (
        spelling_call(speller, *FEDPIT, f"fedpit.local_train_on={train_on}", records=records)
        for records in (RECORDS, other_responses(RECORDS))
    )
    first, second = fedpit(speller, call), fedpit(speller, other)
    assert first.state is not None
    assert second.state is not None
    assert first.state.records == second.state.records == [PAIR]
    assert first.upload["adapter"].tobytes() == second.upload["adapter"].tobytes()
    assert first.state.arrays["adapter"].tobytes() != second.state.arrays["adapter"].tobytes()
    shared = [fedpit(speller, replace(c, config=replace(c.config, fedpit=replace(c.config.fedpit, share_mix=0.5)))) for c in (call, other)]
    assert shared[0].upload["adapter"].tobytes() != shared[1].upload["adapter"].tobytes(), "with a mix, real updates are sent"


@given(VECTORS, VECTORS, st.floats(0, 1))
def test_mix_is_exact_at_its_ends_and_elementwise_between(private: Any, public: Any, share: float) -> None:
    assert mix(private, public, share=0.0).tobytes() == public.tobytes()
    assert mix(private, public, share=1.0).tobytes() == private.tobytes()
    mixed = mix(private, public, share=share)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, share * private.astype(float) + (1 - share) * public.astype(float), rtol=1e-5, atol=1e-3)


def test_share_mix_mixes_both_adapters(speller: LanguageModel) -> None:
    updates = []
    for share in (0.0, 0.25, 1.0):
        call = spelling_call(speller, *FEDPIT, f"fedpit.share_mix={share}")
        updates.append(fedpit(speller, call).upload["adapter"])
    np.testing.assert_allclose(updates[1], 0.75 * updates[0] + 0.25 * updates[2], rtol=1e-3, atol=1e-6)


# --- pool and selection ---


def test_no_more_than_num_kept_are_kept_and_the_pool_holds_the_newest(speller: LanguageModel) -> None:
    past = [{"instruction": f"Old task number {i}", "response": f"Old answer number {i}"} for i in range(3)]
    call = spelling_call(speller, *REPEATING, "fedpit.num_kept=2", "fedpit.pool_size=4")
    call = replace(in_round(call, 1), state=ClientState(arrays={"adapter": some_adapter(speller)}, records=past))
    result = fedpit(speller, call)
    assert [row["verdict"] for row in result.synthetic].count("kept") == 2
    assert [row["verdict"] for row in result.synthetic].count("score") == 2
    assert result.state is not None
    assert result.state.records == [*past[1:], PAIR, PAIR]
    public, _ = train_adapter(
        speller, call.adapter, synthetic_of(speller, result.state.records), settings=call.train_settings(), seed=call.seed("synthetic")
    )
    assert result.upload["adapter"].tobytes() == (public - call.adapter).tobytes()
    assert past == [{"instruction": f"Old task number {i}", "response": f"Old answer number {i}"} for i in range(3)]


def test_the_pool_is_at_least_as_large_as_what_is_kept(speller: LanguageModel) -> None:
    result = fedpit(speller, spelling_call(speller, *REPEATING, "fedpit.num_kept=3", "fedpit.pool_size=1"))
    assert result.state is not None
    assert result.state.records == [PAIR] * 3
    none = fedpit(speller, spelling_call(speller, *REPEATING, "fedpit.num_kept=0", "fedpit.pool_size=0"))
    assert none.state is not None
    assert none.state.records == []
    assert not none.upload["adapter"].any()


def test_what_an_earlier_round_wrote_is_not_written_again(speller: LanguageModel) -> None:
    first = fedpit(speller, spelling_call(speller, *FEDPIT))
    assert [row["verdict"] for row in first.synthetic] == ["kept"] + ["diversity"] * 3
    again = fedpit(speller, replace(in_round(spelling_call(speller, *FEDPIT), 1), state=first.state))
    assert {row["verdict"] for row in again.synthetic} == {"diversity"}
    assert again.state is not None
    assert again.state.records == [PAIR], "the pool of earlier rounds still serves"
    assert again.upload["adapter"].any()


CANDIDATES = [Candidate(instruction=f"Task {i}: say {'very ' * i}much", response=f"{i} reply {'x' * (7 * i % 5)} done") for i in range(5)]
CANDIDATES[2] = replace(CANDIDATES[2], verdict="copy")


@pytest.mark.parametrize("num_kept", [0, 1, 2, 4, 9])
def test_selection_keeps_the_lowest_scores(num_kept: int) -> None:
    lm = build(sharp_base())
    scorer = some_adapter(lm, seed=5)
    results = select(lm, scorer, CANDIDATES, call=make_call(lm, *FEDPIT, f"fedpit.num_kept={num_kept}"))
    passed = [0, 1, 3, 4]
    pairs = synthetic_of(lm, [{"instruction": CANDIDATES[i].instruction, "response": CANDIDATES[i].response} for i in passed])
    scores = dict(zip(passed, instruction_following_scores(lm, scorer, pairs, batch_size=4), strict=True))
    best = sorted(passed, key=scores.__getitem__)[:num_kept]
    assert [i for i in passed if results[i].verdict == "kept"] == sorted(best)
    assert {results[i].verdict for i in passed if i not in best} <= {"score"}
    assert {i: results[i].score for i in passed} == scores
    assert results[2] == CANDIDATES[2]
    assert sorted(passed, key=scores.__getitem__) != passed, "the order of scores is the order of generation: nothing is tested"


def test_a_scorer_that_diverged_gives_no_scores() -> None:
    """No NaN reaches a file, and the first candidates are kept."""
    lm = build(sharp_base())
    diverged = np.full(lm.layout.num_parameters, np.inf, dtype=np.float32)
    results = select(lm, diverged, CANDIDATES, call=make_call(lm, *FEDPIT, "fedpit.num_kept=2"))
    assert [candidate.verdict for candidate in results] == ["kept", "kept", "copy", "score", "score"]
    json.dumps([candidate.as_dict() for candidate in results], allow_nan=False)


def test_without_a_scorer_the_first_are_kept() -> None:
    lm = build(sharp_base())
    results = select(lm, some_adapter(lm), CANDIDATES, call=make_call(lm, *FEDPIT, "fedpit.scorer=none", "fedpit.num_kept=2"))
    assert [candidate.verdict for candidate in results] == ["kept", "kept", "copy", "score", "score"]
    assert {candidate.score for candidate in results} == {None}


@pytest.mark.parametrize("train_on", ["real", "real+synthetic"])
def test_the_scorer_is_the_private_adapter(speller: LanguageModel, train_on: str) -> None:
    """Later version: as just trained on real records. First version: as kept from the round before."""
    kept = some_adapter(speller, seed=4)
    call = spelling_call(speller, *FEDPIT, f"fedpit.local_train_on={train_on}")
    call = replace(call, state=ClientState(arrays={"adapter": kept}, records=[]))
    result = fedpit(speller, call)
    real, _ = train_adapter(speller, call.adapter, call.shard, settings=call.train_settings(), seed=call.seed("train"))
    scorer = real if train_on == "real" else kept
    expected = instruction_following_scores(speller, scorer, synthetic_of(speller, [PAIR]), batch_size=4)
    assert [row["score"] for row in result.synthetic] == [*expected, None, None, None]


def test_stats_add_up_and_the_loss_is_of_what_is_sent(speller: LanguageModel) -> None:
    call = spelling_call(speller, *FEDPIT)
    result = fedpit(speller, call)
    synthetic = synthetic_of(speller, [PAIR])
    _, public = train_adapter(speller, call.adapter, synthetic, settings=call.train_settings(), seed=call.seed("synthetic"))
    assert result.stats.loss == public.loss
    assert result.stats.num_tokens == sum(e.num_tokens for e in call.shard) + 2 * synthetic[0].num_tokens
