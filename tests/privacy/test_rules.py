"""Privacy under each LoRA rule: what a client can do to the sum, what a record can do to a step, what is made of a noised mean, and what is refused.

The sensitivity stands with the clip (`average.sensitivity`, `clipping.clip_and_sum`): whatever travels of an adapter in a round, A, B, R or both
factors, is one vector and clipped as one.
"""

import dataclasses
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysim.config import CHOICES, load
from raysim.data.records import Record
from raysim.federation.adversary import canary_sums
from raysim.federation.server import ServerState, begin, step
from raysim.lora import spec
from raysim.lora.factors import products
from raysim.lora.rule import LoraRule, Setting, frozen_throughout, lora_rule
from raysim.measure.audits import plan_canaries
from raysim.methods.registry import method_of
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.privacy import clipping
from raysim.privacy.aggregation import sum_chunk
from raysim.privacy.clipping import ChunkSum, l2_norm
from raysim.privacy.cohort import Round
from raysim.privacy.ledger import ledger_of
from raysim.privacy.mechanism import Mechanism
from raysim.rng import numpy_rng
from tests.lora_rounds import setting_for, some_tensors
from tests.method_calls import alone, make_call
from tests.privacy.test_mutation import SEEDS, audited, contradicted, without_clip_on_updates, without_noise_on_updates
from tests.privacy.test_sensitivity import CASES, CLIENT_RULES, ROUNDING, distance, step_before_noise, texts

SIZES = [(7, 5), (6, 6)]
SPECIAL = [0.0, 1.0, -1e30, 3e38, 1e-45, math.nan, math.inf]


# --- clients


def begun(rule: LoraRule, setting: Setting, mechanism: Mechanism, *, tensors: dict[str, Any], index: int = 0) -> tuple[ServerState, Round]:
    state = ServerState(index, tensors)
    turn = 0 if rule.turn is None else rule.turn(tensors, setting, index)
    return state, dataclasses.replace(begin(state, mechanism), turn=turn)


@settings(max_examples=60)
@given(st.sampled_from(CLIENT_RULES), st.integers(0, 1), st.sampled_from([1e-3, 1.0, 1e6]), st.data())
def test_a_client_that_sends_what_it_likes_moves_the_sum_by_at_most_the_sensitivity(
    name: str, index: int, clip_norm: float, data: st.DataObject
) -> None:
    """Its adapter is anything at all, beside two honest ones, and only what travels of it reaches the sum."""
    rule = lora_rule(name)
    setting = setting_for(rule, SIZES, rank=2, alpha=7.0)
    keys = ["method.name=fedit", "privacy.unit=client", "privacy.noise_multiplier=0", "privacy.delta=1e-5"]
    mechanism = Mechanism.from_config(
        load("", [*keys, f"lora.aggregation={name}", f"privacy.clip_norm={clip_norm}"]), shard_sizes=[4, 4, 4]
    )
    tensors = some_tensors(rule, setting, seed=1)
    state, round = begun(rule, setting, mechanism, tensors=tensors, index=index)
    value = data.draw(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)))
    hostile = np.where(numpy_rng(0, "signs").random(len(state.adapter)) < 0.5, np.float32(value), np.float32(-1.0))
    honest = [state.adapter + 0.1 * numpy_rng(k, "honest").standard_normal(len(state.adapter)).astype(np.float32) for k in (0, 1)]
    uploads = []
    with np.errstate(invalid="ignore", over="ignore"):
        for one in (*honest, hostile.astype(np.float32)):
            uploads.append(rule.message(one, state.adapter, rank=2, setting=setting, round_index=index, turn=round.turn))
    parts = []
    for ids in ([0, 1, 2], [0, 1]):
        part = sum_chunk([uploads[k] for k in ids], client_ids=ids, weights=[1.0] * len(ids), round=round, mechanism=mechanism)
        assert isinstance(part, ChunkSum)
        parts.append(part)
    assert distance(parts[0].total, parts[1].total) <= rule.sensitivity(clip_norm) == clip_norm
    after = [step(state, round, [p], mechanism=mechanism, lr=1.0, seed=0, rule=rule, setting=setting)[0] for p in parts]
    moved = [products(one.adapter, setting.layout, scale=1.0) for one in after]
    assert all(np.isfinite(one).all() for of_step in moved for one in of_step)
    if rule.settle is None:
        assert distance(after[0].adapter, after[1].adapter) <= clip_norm / mechanism.expected_cohort * (1 + 1e-5) + 1e-6


def noised(name: str, *, noise_multiplier: float, seed: int = 0) -> tuple[ServerState, ServerState, Setting]:
    """A server's state before and after a round in which nobody had anything to send."""
    rule = lora_rule(name)
    setting = setting_for(rule, SIZES, rank=2, alpha=7.0)
    keys = ["method.name=fedit", "privacy.unit=client", f"privacy.noise_multiplier={noise_multiplier}", "privacy.delta=1e-5"]
    mechanism = Mechanism.from_config(load("", [*keys, f"lora.aggregation={name}"]), shard_sizes=[4, 4, 4])
    state, round = begun(rule, setting, mechanism, tensors=some_tensors(rule, setting, seed=1))
    upload = rule.message(state.adapter, state.adapter, rank=2, setting=setting, round_index=0, turn=round.turn)
    part = sum_chunk([upload], client_ids=[0], weights=[1.0], round=round, mechanism=mechanism)
    return state, step(state, round, [part], mechanism=mechanism, lr=1.0, seed=seed, rule=rule, setting=setting)[0], setting


@pytest.mark.parametrize("name", CLIENT_RULES)
def test_noise_falls_on_what_travels_and_on_nothing_else(name: str) -> None:
    before, after, setting = noised(name, noise_multiplier=1.0)
    rule = lora_rule(name)
    if rule.settle is None:
        mask = rule.mask(setting, 0)
        moved = before.adapter != after.adapter
        assert moved.all() if mask is None else (moved == mask).all()
        stds = [
            np.std((noised(name, noise_multiplier=1.0, seed=seed)[1].adapter - before.adapter)[slice(None) if mask is None else mask])
            for seed in range(40)
        ]
        assert np.mean(stds) == pytest.approx(1.0 / 3, rel=0.1), "z C over the cohort"


def test_the_singular_values_of_fedsvd_are_made_of_the_noised_mean_and_change_no_product() -> None:
    """Post-processing: the same noised mean of B, in the same A, whatever lies under it."""
    before, after, setting = noised("fedsvd", noise_multiplier=1.0)
    rule = lora_rule("fedsvd")
    plain = dataclasses.replace(rule, settle=None)
    mechanism = Mechanism.from_config(load("", ["method.name=fedit", "privacy.unit=client", "privacy.delta=1e-5"]), shard_sizes=[4, 4, 4])
    state, round = begun(rule, setting, mechanism, tensors=dict(before.tensors))
    upload = rule.message(state.adapter, state.adapter, rank=2, setting=setting, round_index=0)
    part = sum_chunk([upload], client_ids=[0], weights=[1.0], round=round, mechanism=mechanism)
    unsettled, _ = step(state, round, [part], mechanism=mechanism, lr=1.0, seed=0, rule=plain, setting=setting)
    assert rule.settle is not None
    assert rule.settle(unsettled.tensors, setting)["adapter"].tobytes() == after.adapter.tobytes()
    for one, other in zip(*(products(s.adapter, setting.layout, scale=1.0) for s in (unsettled, after)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def audit_by_rule(name: str, *, seed: int) -> dict[str, Any]:
    """The audit of rounds with update canaries, as `test_mutation` has it, of what travels under a rule."""
    rule = lora_rule(name)
    setting = setting_for(rule, [(48, 40), (40, 48)], rank=32 if name == "fedsb" else 12, alpha=7.0)
    keys = ["method.name=fedit", "privacy.unit=client", "audit.num_canaries=200", "audit.confidence=0.999", "privacy.delta=1e-5"]
    config = load("", [*keys, f"lora.aggregation={name}", "privacy.noise_multiplier=4", "server.num_rounds=2", f"seed={seed}"])
    mechanism = Mechanism.from_config(config, shard_sizes=[4] * 3)
    plan, tensors = plan_canaries(config, first_record_id=0), some_tensors(rule, setting, seed=seed)
    state, frozen = ServerState(0, tensors), frozen_throughout(rule, setting.layout)
    for index in range(2):
        state, round = begun(rule, setting, mechanism, tensors=dict(state.tensors), index=index)
        mask, parts = rule.mask(setting, round.turn), list[Any]()
        size = len(state.adapter) if mask is None else int(mask.sum())
        for k in round.survivors:
            update = ((0.5 + k) * numpy_rng(seed, index, k).standard_normal(size) / size**0.5).astype(np.float32)
            parts.append(sum_chunk([{"adapter": update}], client_ids=[k], weights=[1.0], round=round, mechanism=mechanism))
        parts += canary_sums(plan.num_updates, mechanism=mechanism, scale=100.0, round=round, sent=mask, frozen=frozen)
        state, _ = step(state, round, parts, mechanism=mechanism, lr=1.0, seed=seed, rule=rule, setting=setting)
    return audited(config, plan, mechanism, first=tensors["adapter"], last=state.adapter, frozen=frozen)


def with_half_of_it_unclipped(patch: pytest.MonkeyPatch) -> None:
    """As where one factor is clipped and the other forgotten."""
    clip = clipping.clip

    def half(update: Any, *, clip_norm: float, norm: float | None = None) -> Any:
        middle = len(update) // 2
        return np.concatenate([clip(update[:middle], clip_norm=clip_norm), update[middle:]])

    patch.setattr(clipping, "clip", half)


AUDITED = ("average", "ffa", "rolora", "fedsb")
"""FedSVD sums as FFA-LoRA does; its canaries would be followed along coordinates that every round makes anew."""


@pytest.mark.parametrize("name", AUDITED)
def test_clients_who_are_protected_by_a_rule_are_never_found_out(name: str) -> None:
    assert not any(contradicted([audit_by_rule(name, seed=seed) for seed in SEEDS]))


@pytest.mark.parametrize("mutant", [without_noise_on_updates, without_clip_on_updates, with_half_of_it_unclipped])
@pytest.mark.parametrize("name", AUDITED)
def test_clients_of_a_broken_rule_are_found_out(monkeypatch: pytest.MonkeyPatch, name: str, mutant: Any) -> None:
    mutant(monkeypatch)
    assert all(contradicted([audit_by_rule(name, seed=seed) for seed in SEEDS]))


# --- records


@cache
def model_for(name: str) -> LanguageModel:
    rule = lora_rule(name)
    lm = build_language_model(
        load_base_model("tiny"), rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"], between=rule.between
    )
    lm.train_only(rule.trainable(lm.layout, 0))
    return lm


@pytest.mark.parametrize("name", spec.RULES)
@settings(max_examples=4)
@given(shard=st.lists(texts, min_size=2, max_size=4), clip_norm=st.sampled_from([1e-3, 0.3, 10.0]))
def test_a_record_moves_a_private_step_by_at_most_the_clip_norm_whatever_the_rule_trains(
    name: str, shard: list[str], clip_norm: float
) -> None:
    """And all that a rule makes of an adapter (sketches, stacks, ranks, weights by norm) is made of one that was trained in such steps."""
    lm, steps = model_for(name), []
    for records in (shard, shard[:-1]):
        data = [Record(record_id=i, instruction=text[:40] or "?", response=text) for i, text in enumerate(records)]
        case = CASES["dplora-example", "example", name]
        call = make_call(lm, *case, f"privacy.clip_norm={clip_norm}", "dplora.batch_size=8", records=data)
        alone(method_of("dplora"))(lm, call)
        steps.append(8 * step_before_noise(lm))
        if lm.frozen is not None:
            assert not steps[-1][lm.frozen.numpy()].any()
    assert distance(*steps) <= clip_norm * (1 + ROUNDING)


@pytest.mark.parametrize("name", ["fedsvd", "fedask", "ffa"])
def test_a_client_is_accounted_for_in_every_cohort_and_every_round(name: str) -> None:
    """Public code of FedSVD and FedASK noises for the expected participation, and prints the epsilon of one round."""
    keys = ["method.name=dplora", f"lora.aggregation={name}", "partition.num_clients=6", "server.num_rounds=10", "privacy.delta=1e-5"]
    every, some = (Mechanism.from_config(load("", [*keys, f"server.cohort_size={size}"]), shard_sizes=[40] * 6) for size in (0, 3))
    stated = [ledger_of(one, 10)["epsilon"] for one in (every, some)]
    assert stated[0] == stated[1], "half the cohort does not halve what one client may be asked for"
    assert every.num_releases(10) == 10 * every.num_steps
    expected, of_one = (some.epsilon(rounds) for rounds in (5, 1))
    assert expected is not None
    assert of_one is not None
    assert of_one.quoted < expected.quoted < stated[1]


def test_delta_is_of_the_protected_units_and_not_of_batches() -> None:
    """Public code of Fed-SB takes one over the number of batches, far too much."""
    config = load("", ["method.name=dplora", "lora.aggregation=fedsb", "dplora.batch_size=8"])
    mechanism = Mechanism.from_config(config, shard_sizes=[400] * 3)
    assert mechanism.delta == pytest.approx(1200**-1.1)
    assert mechanism.delta < 1 / 1200 < 1 / (1200 / 8)


# --- refusals


def test_every_rule_protects_clients_or_says_why_it_does_not() -> None:
    for name in CHOICES["lora.aggregation"]:
        one = spec.RULES[name]
        keys = ["method.name=fedit", "privacy.unit=client", f"lora.aggregation={name}"]
        if name in CLIENT_RULES:
            assert load("", keys).lora.aggregation == name
            assert not one.no_client
            assert lora_rule(name).form == "sum"
        else:
            with pytest.raises(
                ValueError, match=rf"^privacy\.unit='client' is no guarantee with lora\.aggregation='{name}': .*; use 'average' or"
            ):
                load("", keys)
        assert load("", ["method.name=dplora", f"lora.aggregation={name}"]).privacy.unit == "example"


def test_what_a_hostile_client_sends_is_bounded_in_all_that_travels_together() -> None:
    """Both factors as one vector, and not C for each of them."""
    setting = setting_for(lora_rule("average"), SIZES, rank=2, alpha=7.0)
    huge = np.full(setting.layout.num_parameters, 1e6, dtype=np.float32)
    total = clipping.clip_and_sum([huge], weights=[1.0], clip_norm=2.0).total
    assert l2_norm(total) <= 2.0
    assert l2_norm(total) == pytest.approx(2.0)
