"""What the server makes of the clients' adapters, held against the weighted mean of their effective weights, for every rule.

Exact where a rule says so; the error of the best matrix of that rank where it cuts; its published gap for FedIT. And each fault that was found in
public code, put into the rule, is found out by the same check.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysim.lora import spec
from raysim.lora.factors import deltas, entries, layers, leading, pairs, refactored, resized, stacked, written
from raysim.lora.layout import Upload, Vector
from raysim.lora.rule import LoraRule, Setting, lora_rule
from raysim.lora.rules import average, fedsa, flora, florist, hetlora
from raysim.privacy.clipping import l2_norm
from tests.lora_rounds import Done, best_error, one_round, setting_for, some_tensors

EXACT = ("ffa", "rolora", "flora", "fedex", "fedsvd", "fedsb")
CLOSE = 1e-6
SIZES = [(7, 5), (4, 9), (6, 6)]
"""Outputs and inputs of layers: neither way square, and square, where a transposed matrix fits as well."""
WEIGHTS = [3.0, 1.0, 6.0]
sizes = st.lists(st.tuples(st.integers(3, 9), st.integers(3, 9)), min_size=1, max_size=3)
weighted = st.lists(st.sampled_from([0.5, 1.0, 3.0, 40.0]), min_size=1, max_size=5)


@st.composite
def rounds(draw: st.DrawFn, names: Sequence[str]) -> tuple[str, Done, Setting]:
    """A round under one of the rules: any sizes and weights, alpha that is not the rank, clients of rank 1, or without an update."""
    name = draw(st.sampled_from(list(names)))
    rule, rank = lora_rule(name), draw(st.integers(1, 3))
    setting = setting_for(rule, draw(sizes), rank=rank, alpha=draw(st.sampled_from([1.0, 7.0, 32.0])))
    weights = draw(weighted)
    ranks = draw(st.lists(st.integers(1, rank), min_size=len(weights), max_size=len(weights))) if spec.RULES[name].own_ranks else None
    idle = draw(st.sets(st.integers(0, len(weights) - 1)))
    index = draw(st.integers(0, 3))
    done = one_round(rule, setting, weights=weights, ranks=ranks, idle=tuple(idle), seed=draw(st.integers(0, 99)), round_index=index)
    return name, done, setting


def rounding(done: Done) -> float:
    """What float32 may lose: against the weights themselves, and against the products of which a small mean was made."""
    largest = max(l2_norm(one) ** 2 for one in (*done.trained, done.before["adapter"]))
    return CLOSE * (done.size + largest)


@settings(max_examples=150)
@given(rounds(EXACT))
def test_an_exact_rule_gives_the_mean_of_the_clients_effective_weights(case: tuple[str, Done, Setting]) -> None:
    _, done, _ = case
    assert done.error <= rounding(done)


@settings(max_examples=60)
@given(rounds(["flexlora", "fedask"]))
def test_a_rule_that_cuts_loses_what_the_best_matrix_of_its_rank_loses(case: tuple[str, Done, Setting]) -> None:
    """FedASK as well: these means have no higher rank than its sketch has columns."""
    _, done, setting = case
    best = best_error(done.ideal, [setting.rank] * len(done.ideal))
    assert done.error == pytest.approx(best, abs=rounding(done) * 10)


@settings(max_examples=40)
@given(rounds(["florist"]))
def test_florist_keeps_the_fewest_directions_that_hold_the_energy(case: tuple[str, Done, Setting]) -> None:
    _, done, setting = case
    ranks = done.after["ranks"].astype(int).tolist()
    assert done.error == pytest.approx(best_error(done.ideal, ranks), abs=rounding(done) * 10)
    for one, rank in zip(done.ideal, ranks, strict=True):
        energies = np.cumsum(np.square(np.linalg.svd(one, compute_uv=False)))
        enough = [k + 1 for k, held in enumerate(energies) if held >= setting.energy * energies[-1] * (1 - 1e-6)]
        assert rank == min([*enough, setting.rank]) or not one.any()


@settings(max_examples=40)
@given(rounds(["average"]))
def test_averaging_has_its_published_gap(case: tuple[str, Done, Setting]) -> None:
    """The mean product less the product of the means (FedEx-LoRA's residual), and no other."""
    _, done, setting = case
    assert gap_of_averaging(done, setting) == pytest.approx(done.error, abs=rounding(done) * 10)


def gap_of_averaging(done: Done, setting: Setting, weights: Sequence[float] | None = None) -> float:
    """The norm of mean(B_k A_k) - mean B mean A, from what the server's adapter holds."""
    means = [setting.scale * (b @ a) for b, a in pairs(done.after["adapter"], setting.layout)]
    return float(np.sqrt(sum(np.square(i - m).sum() for i, m in zip(done.ideal, means, strict=True))))


def test_averaging_is_of_all_clients_factors_and_loses_something() -> None:
    setting = setting_for(average.RULE, SIZES, rank=3, alpha=7.0)
    done = one_round(average.RULE, setting, weights=WEIGHTS)
    mean = sum(w * one.astype(np.float64) for w, one in zip(WEIGHTS, done.trained, strict=True)) / sum(WEIGHTS)
    np.testing.assert_allclose(done.after["adapter"], mean, rtol=1e-5, atol=1e-6)
    assert done.error > 0.1 * done.size


@settings(max_examples=30)
@given(rounds(["hetlora"]))
def test_hetlora_pads_with_zeros_and_weighs_by_the_norm_of_the_product(case: tuple[str, Done, Setting]) -> None:
    _, done, setting = case
    for i, (b, a) in enumerate(pairs(done.after["adapter"], setting.layout)):
        own = [list(pairs(one, setting.layout))[i] for one in done.trained]
        norms = np.array([np.linalg.norm(left @ right) for left, right in own])
        if norms.any():
            shares = norms / norms.sum()
            np.testing.assert_allclose(b, sum(s * left for s, (left, _) in zip(shares, own, strict=True)), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(a, sum(s * right for s, (_, right) in zip(shares, own, strict=True)), rtol=1e-4, atol=1e-5)


def test_a_client_of_hetlora_prunes_the_last_directions_once_they_have_shrunk_and_never_grows() -> None:
    setting = setting_for(hetlora.RULE, SIZES, rank=4, alpha=7.0)
    before = some_tensors(hetlora.RULE, setting, seed=1)["adapter"]
    cut = entries(setting.layout, frozenset(setting.layout.names), 3)
    assert cut is not None
    smaller, larger = before.copy(), before.copy()
    smaller[~cut] *= np.float32(0.5)
    larger[~cut] *= np.float32(2.0)
    for trained, rank in ((smaller, 3), (larger, 4), (before, 4)):
        assert hetlora.kept(trained, before, 4, setting)["rank"].tolist() == [rank]
    assert hetlora.kept(smaller, before, 1, setting)["rank"].tolist() == [1], "one direction is the least"
    unpruned = dataclasses.replace(setting, pruned_share=0.0)
    assert hetlora.kept(smaller, before, 4, unpruned)["rank"].tolist() == [4]


def personal(rule: LoraRule, done: Done, setting: Setting) -> list[float]:
    """By client, how far its adapter after the round is from the shared A with its own B."""
    assert rule.given is not None
    assert rule.kept is not None
    errors = []
    for trained in done.trained:
        own = rule.given(done.after, rule.kept(trained, done.before["adapter"], setting.rank, setting), setting.rank, setting)
        expected = zip(pairs(trained, setting.layout), pairs(done.after["adapter"], setting.layout), strict=True)
        errors.append(
            max(
                np.abs(b @ a - own_b @ own_a).max()
                for ((own_b, _), (_, own_a)), (b, a) in zip(expected, pairs(own, setting.layout), strict=True)
            )
        )
    return errors


def test_a_client_of_fedsa_has_the_shared_a_and_its_own_b() -> None:
    setting = setting_for(fedsa.RULE, SIZES, rank=3, alpha=7.0)
    done = one_round(fedsa.RULE, setting, weights=WEIGHTS)
    assert max(personal(fedsa.RULE, done, setting)) < 1e-5
    mask = entries(setting.layout, average.factor(setting.layout, "B"), 3)
    assert (done.after["adapter"][mask] == done.before["adapter"][mask]).all(), "no B has reached the server"
    first = fedsa.given(done.after, {}, 3, setting)
    assert first.tobytes() == done.after["adapter"].tobytes(), "who never came has the server's"


def test_fedsvd_has_orthonormal_rows_and_keeps_every_product() -> None:
    rule = lora_rule("fedsvd")
    for shapes in (SIZES, [(2, 9), (9, 2)]):
        setting = setting_for(rule, shapes, rank=3, alpha=7.0)
        done = one_round(rule, setting, weights=WEIGHTS)
        assert done.error <= rounding(done)
        for _, a in pairs(done.after["adapter"], setting.layout):
            live = a[np.linalg.norm(a, axis=1) > 0.5]
            np.testing.assert_allclose(live @ live.T, np.eye(len(live)), atol=1e-6)
            assert len(live) == min(a.shape)


def test_the_bases_of_fedsb_are_orthonormal_drawn_from_the_seed_and_left_alone() -> None:
    """Public code takes them from the unnoised gradients of all clients' data: these know no data."""
    rule = lora_rule("fedsb")
    setting = setting_for(rule, SIZES, rank=3, alpha=7.0)
    first, other = (rule.start(setting.layout, seed)["adapter"] for seed in (1, 2))
    assert first.tobytes() == rule.start(setting.layout, 1)["adapter"].tobytes() != other.tobytes()
    for layer in layers(setting.layout):
        a = first[slice(*layer.a)].reshape(layer.rank, -1).astype(np.float64)
        b = first[slice(*layer.b)].reshape(-1, layer.rank).astype(np.float64)
        for gram in (a @ a.T, b.T @ b):
            np.testing.assert_allclose(gram, np.eye(3), atol=1e-6)
    done = one_round(rule, setting, weights=WEIGHTS)
    fixed = ~entries(setting.layout, average.factor(setting.layout, "R"), 3)  # type: ignore[operator]  # a mask
    assert (done.after["adapter"][fixed] == done.before["adapter"][fixed]).all()


def test_the_sketch_of_fedask_is_exact_from_the_rank_of_the_mean_on() -> None:
    rule = lora_rule("fedask")
    errors = []
    for oversampling in (0, 2, 4, 6):
        setting = setting_for(rule, [(24, 20)], rank=3, alpha=7.0, oversampling=oversampling)
        done = one_round(rule, setting, weights=[1.0] * 3)  # a mean of rank 9
        errors.append(done.error / best_error(done.ideal, [3]))
    assert min(errors[:3]) > 1.001
    assert errors[3] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", spec.RULES)
def test_one_client_alone_is_the_mean(name: str) -> None:
    rule = lora_rule(name)
    setting = setting_for(rule, SIZES, rank=3, alpha=7.0, energy=1.0)
    done = one_round(rule, setting, weights=[5.0])
    if name == "fedsa":
        assert max(personal(rule, done, setting)) < 1e-5
    else:
        assert done.error <= rounding(done) * 10


@pytest.mark.parametrize("name", ["flexlora", "florist", "fedask"])
def test_a_direction_that_nobody_uses_starts_afresh_and_can_train(name: str) -> None:
    rule = lora_rule(name)
    setting = setting_for(rule, SIZES, rank=3, alpha=7.0)
    nothing = {**rule.start(setting.layout, 0)}
    done = one_round(rule, setting, weights=[1.0, 2.0], idle=(0, 1), tensors=nothing)
    for b, a in pairs(done.after["adapter"], setting.layout):
        assert not b.any()
        assert np.abs(a).max(axis=1).all(), "B and A both zero would never learn again"


@pytest.mark.parametrize("name", [name for name, one in spec.RULES.items() if one.own_ranks])
def test_a_client_of_a_lower_rank_starts_from_the_first_directions_of_the_server(name: str) -> None:
    """Their product counts for as much as at the server: scaled by alpha over the client's own rank, where the rule does that."""
    rule = lora_rule(name)
    setting = setting_for(rule, SIZES, rank=3, alpha=7.0)
    tensors = some_tensors(rule, setting, seed=5)
    assert rule.given is not None
    own = rule.given(tensors, {}, 2, setting)
    for (b, a), (all_b, all_a) in zip(pairs(own, setting.layout), pairs(tensors["adapter"], setting.layout), strict=True):
        np.testing.assert_allclose(rule.scale(setting, 2) * (b @ a), setting.scale * (all_b[:, :2] @ all_a[:2]), rtol=1e-5, atol=1e-6)
        assert not b[:, 2:].any()
        assert not a[2:].any()


# --- faults that were found in public code


def only_the_first_client(uploads: Sequence[Upload], weights: Sequence[float]) -> Vector:
    """A misspelt variable: the sum is begun anew for each client, and the first client's part is what is left."""
    return uploads[0]["adapter"] * np.float32(weights[0] / sum(weights))


def combining(change: Callable[..., dict[str, Vector]]) -> Callable[[LoraRule], LoraRule]:
    return lambda rule: dataclasses.replace(rule, combine=change)


def unscaled_stacks(tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, _: int) -> Any:
    delta = tensors["delta"].copy()
    shares = [weight / sum(weights) for weight in weights]
    for base, (b, a) in zip(
        deltas(delta, setting.layout), stacked([flora.factors_of(u, setting)[0] for u in uploads], shares), strict=True
    ):
        base += b @ a
    return {"adapter": flora.initial_adapter(setting.layout, seed=0), "delta": delta}


def residual(change: Callable[[Any, float], Any]) -> Callable[..., dict[str, Vector]]:
    """FedEx-LoRA with another residual added to the delta."""

    def combine(tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, index: int) -> Any:
        right = lora_rule("fedex").combine
        assert right is not None
        done = right(tensors, uploads, weights, setting, index)
        delta = tensors["delta"].copy()
        for old, new, base in zip(*(deltas(one, setting.layout) for one in (tensors["delta"], done["delta"], delta)), strict=True):
            base += change(new - old, setting.scale)
        return {**done, "delta": delta}

    return combine


def root_once(tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, _: int) -> Any:
    found = [leading(left, right, rank=setting.rank) for left, right in flora.stacks(uploads, weights, setting)]
    return {"adapter": written([(u * np.sqrt(s) / setting.scale, vt) for u, s, vt, _ in found], setting.layout)}


def one_dictionary(rule: LoraRule) -> LoraRule:
    """The same dictionary is filled for every client and appended, so that the list holds the last client's factors throughout."""
    right = rule.combine
    assert right is not None
    return dataclasses.replace(rule, combine=lambda tensors, uploads, *more: right(tensors, [uploads[-1]] * len(uploads), *more))


FAULTS = {
    "flora: alpha / r dropped": ("flora", combining(unscaled_stacks)),
    "fedex: residual transposed": ("fedex", combining(residual(lambda change, scale: change.T))),
    "fedex: alpha / r dropped": ("fedex", combining(residual(lambda change, scale: change / scale))),
    "flexlora: the root taken once": ("flexlora", combining(root_once)),
    "florist: one dictionary for all clients": ("florist", one_dictionary),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_public_code_is_found_out(fault: str) -> None:
    """Square layers throughout, where a transposed matrix raises nothing."""
    name, broken = FAULTS[fault]
    rule = lora_rule(name)
    setting = setting_for(rule, [(6, 6), (5, 5)], rank=3, alpha=7.0, energy=1.0)
    for one, right in ((rule, True), (broken(rule), False)):
        done = one_round(one, setting, weights=WEIGHTS)
        least = 0.0 if name in EXACT else best_error(done.ideal, [3, 3])
        assert (done.error <= least + 10 * rounding(done)) == right


def test_averaging_that_keeps_the_first_client_alone_is_found_out() -> None:
    broken = dataclasses.replace(average.RULE, form="stack", merge=only_the_first_client)
    setting = setting_for(average.RULE, SIZES, rank=3, alpha=7.0)
    for rule, right in ((dataclasses.replace(average.RULE, form="stack"), True), (broken, False)):
        done = one_round(rule, setting, weights=WEIGHTS)
        mean = sum(w * one.astype(np.float64) for w, one in zip(WEIGHTS, done.trained, strict=True)) / sum(WEIGHTS)
        assert np.allclose(done.after["adapter"], mean, rtol=1e-4, atol=1e-5) == right


def test_a_b_that_flows_from_one_client_to_the_next_is_found_out() -> None:
    """Public code of FedSA-LoRA leaves B in the one model that all clients train in turn."""
    setting = setting_for(fedsa.RULE, SIZES, rank=3, alpha=7.0)
    last: dict[str, Any] = {}

    def shared(trained: Vector, before: Vector, rank: int, setting: Setting) -> Any:
        last.update(fedsa.kept(trained, before, rank, setting))
        return last

    broken = dataclasses.replace(
        fedsa.RULE, given=lambda tensors, kept, rank, setting: fedsa.given(tensors, last, rank, setting), kept=shared
    )
    done = one_round(broken, setting, weights=WEIGHTS)
    assert broken.given is not None
    own = [broken.given(done.after, {}, 3, setting) for _ in done.trained]
    assert len({one.tobytes() for one in own}) == 1, "all have the last client's"
    done = one_round(fedsa.RULE, setting, weights=WEIGHTS)
    right = [fedsa.given(done.after, fedsa.kept(one, done.before["adapter"], 3, setting), 3, setting) for one in done.trained]
    assert len({one.tobytes() for one in right}) == len(WEIGHTS)


# --- the pieces


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_singular_values_of_a_product_are_those_of_the_product(d: int, n: int, m: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((d, m)), rng.standard_normal((m, n))
    u, values, vt, energy = leading(left, right, rank=rank)
    expected = np.linalg.svd(left @ right, compute_uv=False)
    k = min(rank, d, n, m)
    np.testing.assert_allclose(values, expected[:k], rtol=1e-9)
    assert energy == pytest.approx(np.square(expected).sum())
    np.testing.assert_allclose(u.T @ u, np.eye(k), atol=1e-9)
    assert np.linalg.norm(left @ right - (u * values) @ vt) == pytest.approx(np.linalg.norm(expected[k:]), abs=1e-8)


@pytest.mark.parametrize("inner", [0, 1, 3, 60])
def test_a_few_singular_values_of_many_are_those_of_the_product(inner: int) -> None:
    """By Lanczos' method, of products of low rank and of none as well."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((60, max(inner, 1))) * bool(inner), rng.standard_normal((max(inner, 1), 50))
    left, right = np.pad(left, ((0, 0), (0, 70 - left.shape[1]))), np.pad(right, ((0, 70 - right.shape[0]), (0, 0)))
    u, values, vt, _ = leading(left, right, rank=4)
    expected = np.linalg.svd(left @ right, compute_uv=False)
    np.testing.assert_allclose(values, expected[:4], atol=1e-9 * (1 + expected[0]))
    assert np.linalg.norm(left @ right - (u * values) @ vt) == pytest.approx(np.linalg.norm(expected[4:]), abs=1e-8)


def test_factors_are_read_and_written_inverse_and_cut_to_a_rank() -> None:
    setting = setting_for(average.RULE, SIZES, rank=3, alpha=7.0)
    adapter = some_tensors(average.RULE, setting, seed=2)["adapter"]
    assert written(pairs(adapter, setting.layout), setting.layout).tobytes() == adapter.tobytes()
    cut = resized(adapter, setting.layout, rank=1, factor=2.0)
    mask = entries(setting.layout, frozenset(setting.layout.names), 1)
    assert mask is not None
    assert not cut[~mask].any()
    assert refactored(pairs(adapter, setting.layout), setting.layout, seed=0).tobytes() == adapter.tobytes()


def test_florist_counts_directions_by_their_energy() -> None:
    values = np.array([3.0, 2.0, 1.0])
    assert [florist.rank_of(values, energy=14.0, share=share) for share in (0.5, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert florist.rank_of(values, energy=0.0, share=0.9) == 0
