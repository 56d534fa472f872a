"""One test for each fault that other systems' privacy code was found to have, named after what this one does instead.

The numbers are those of the list of faults: 1 and so on. What a test measures is what is released, or what is promised about it.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant
from safetensors.torch import save_file
from scipy.stats import binomtest, chi2, chisquare, kstest, norm

from raysim.config import CHOICES, flatten_keys, load, to_dict
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.federation.server import weights_for
from raysim.lora.layout import initial_adapter, load_adapter, unflatten
from raysim.methods.registry import method_of
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import PrivateSettings, clipped_gradient_sum, train_private
from raysim.privacy.accounting import paper_sigma
from raysim.privacy.clipping import clip, clip_and_sum, noise_and_divide
from raysim.privacy.ledger import ledger_of
from raysim.privacy.mechanism import Mechanism
from tests.method_calls import RECORDS, alone, make_call, some_adapter
from tests.rounds import next_step, state_of
from tests.tiny_models import build, encode

Vector = npt.NDArray[np.float32]
DELTA = 1e-5
CLIENT = ("privacy.unit=client", "server.weighting=uniform")


def mechanism(*keys: str, sizes: Sequence[int] = (10,) * 6) -> Mechanism:
    fixed = [f"partition.num_clients={len(sizes)}", f"data.num_train={sum(sizes)}", "partition.min_examples=0", f"privacy.delta={DELTA}"]
    return Mechanism.from_config(load("", [*fixed, *keys]), shard_sizes=sizes)


def quoted(one: Mechanism, num_rounds: int) -> float:
    epsilon: float = ledger_of(one, num_rounds)["epsilon"]
    return epsilon


def released(
    one: Mechanism, updates: Sequence[Vector], *, weights: Sequence[float] = (), start: Vector | None = None, round_index: int = 0
) -> Vector:
    """The adapter after a round with these updates, from `start` (zero unless given)."""
    sums = [
        clip_and_sum([update], weights=[weight], clip_norm=one.update_clip_norm)
        for update, weight in zip(updates, weights or [1.0] * len(updates), strict=True)
    ]
    size = len(updates[0]) if updates else SIZE
    state = state_of(round_index, np.zeros(size, dtype=np.float32) if start is None else start)
    return next_step(state, sums, mechanism=one, lr=1.0, seed=3)[0].adapter


SIZE = 3000


def random_updates(count: int, *, scale: float = 1.0) -> list[Vector]:
    return list((scale * np.random.default_rng(1).standard_normal((count, SIZE))).astype(np.float32))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(load_base_model("tiny"))


def examples_of(*response_lengths: int) -> list[Example]:
    """Examples with a prompt of two tokens and responses of these lengths."""
    record, rng = Record(record_id=0, instruction="", response=""), np.random.default_rng(0)
    return [Example(record, (11, 12), tuple(rng.integers(20, 260, length).tolist())) for length in response_lengths]


PRIVATE = PrivateSettings(
    num_steps=1, batch_size=4, sampling_prob=1.0, lr=1.0, optimizer="sgd", clip_norm=0.5, noise_multiplier=0.0, secure_noise=False
)


# --- 1: FedML ---


@pytest.mark.parametrize("clip_norm", [1.0, 2.0, 2.5, 7.0])
def test_clip_norm_is_not_the_order_of_the_norm(lm: LanguageModel, clip_norm: float) -> None:
    """100 ones are 10 long whatever the bound; as an order, 2.5 would find 6.3 and 7 would find 1.9."""
    update = np.ones(100, dtype=np.float32)
    assert clip_and_sum([update], weights=[1.0], clip_norm=clip_norm).norms == (10.0,)
    np.testing.assert_allclose(clip(update, clip_norm=clip_norm), clip_norm / 10, rtol=1e-6)
    lm.set_adapter(some_adapter(lm))
    norms = clipped_gradient_sum(lm, examples_of(3, 5), clip_norm=clip_norm, max_batch=2)[1]
    assert norms == clipped_gradient_sum(lm, examples_of(3, 5), clip_norm=1e-3, max_batch=2)[1]


def test_noise_scale_is_not_divided_again_on_every_tensor(lm: LanguageModel) -> None:
    """From the first tensor of an adapter to the last, the released noise has the one scale."""
    one = mechanism(*CLIENT, "privacy.noise_multiplier=2", "privacy.clip_norm=0.5")
    noise = released(one, [np.zeros(lm.layout.num_parameters, dtype=np.float32)]).astype(float) / (2 * 0.5 / 6)
    assert len(lm.layout.spans()) == 28
    for start, end in lm.layout.spans():
        assert 1e-6 < chi2.cdf(float(np.sum(noise[start:end] ** 2)), end - start) < 1 - 1e-6


def test_noising_returns_what_was_noised() -> None:
    """Not nothing, and not what was given: the sum with noise, divided, while the sum stays as it was."""
    total = np.linspace(-1.0, 1.0, 50)
    before = total.copy()
    mean = noise_and_divide(total, noise_std=0.7, denominator=4.0, seed=9, secure=False)
    expected = (total + (0.7 * np.random.default_rng(9).standard_normal(50)).astype(np.float32)) / 4.0
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_array_equal(total, before)


# --- 2 and 3: DP-FedLoRA, Flower's LocalDpMod ---


def test_the_joint_update_is_clipped_and_not_each_tensor(lm: LanguageModel) -> None:
    """28 tensors of length C each are clipped to C together, not to sqrt(28) C."""
    update = np.zeros(lm.layout.num_parameters, dtype=np.float32)
    update[[start for start, _ in lm.layout.spans()]] = 0.5
    one = mechanism(*CLIENT, "privacy.noise_multiplier=0", "privacy.clip_norm=0.5")
    assert np.linalg.norm(update) == pytest.approx(0.5 * math.sqrt(28))
    assert np.linalg.norm(released(one, [update])) * one.expected_cohort == pytest.approx(0.5, rel=1e-6)


def test_the_update_is_clipped_and_not_the_weights(lm: LanguageModel) -> None:
    """An adapter a thousand times longer than the bound stays where it is, and moves by its clients' short updates."""
    one = mechanism(*CLIENT, "privacy.noise_multiplier=0", "privacy.clip_norm=0.5")
    start, updates = random_updates(1, scale=10.0)[0], random_updates(6, scale=1e-4)
    np.testing.assert_allclose(released(one, updates, start=start), start + np.mean(updates, axis=0), rtol=1e-6, atol=1e-6)
    call = make_call(build(load_base_model("tiny")), "method.name=fedit", *CLIENT)
    far = dataclasses.replace(call, adapter=some_adapter(lm) * np.float32(30))
    update = alone(method_of("fedit"))(lm, far).upload["adapter"]
    assert 0 < np.linalg.norm(update) < 0.05 * np.linalg.norm(far.adapter)


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """delta of one Gaussian release (Balle and Wang 2018, theorem 8)."""
    half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    return float(norm.cdf(half - shift) - math.exp(epsilon) * norm.cdf(-half - shift))


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 5.0, 10.0, 25.0])
def test_the_classical_formula_is_not_used_at_any_epsilon(epsilon: float) -> None:
    """What is promised for the formula's noise is true by the exact curve; what is solved for a target is just enough noise."""
    promised = quoted(mechanism(*CLIENT, f"privacy.noise_multiplier={paper_sigma(epsilon, delta=DELTA)}"), 1)
    assert gaussian_delta(promised, paper_sigma(epsilon, delta=DELTA)) <= DELTA * 1.01
    assert (promised > epsilon) == (epsilon >= 10), "the formula asks for too little from about 9 on"
    solved = mechanism(*CLIENT, "server.num_rounds=1", f"privacy.target_epsilon={epsilon}").noise_multiplier
    assert gaussian_delta(epsilon, solved) <= DELTA * 1.01
    assert gaussian_delta(epsilon, 0.97 * solved) > DELTA


def test_the_sensitivity_is_the_clip_norm_and_not_a_setting_of_its_own() -> None:
    assert not [key for key in flatten_keys(to_dict(load(""))) if "sensitivity" in key]
    narrow, wide = (mechanism(*CLIENT, f"privacy.clip_norm={c}", "privacy.noise_multiplier=1.5") for c in (0.5, 2.0))
    noise, wider = (released(one, []).astype(float) for one in (narrow, wide))
    np.testing.assert_allclose(wider, 4 * noise, rtol=1e-5)
    assert quoted(narrow, 5) == quoted(wide, 5)
    sums = [clip_and_sum(random_updates(1), weights=[1.0], clip_norm=2.0)]
    with pytest.raises(AssertionError, match=r"accounts for 0\.5"):
        next_step(state_of(0, np.zeros(SIZE, dtype=np.float32)), sums, mechanism=narrow, lr=1.0, seed=3)


# --- 4: Flower's central DP ---


def test_noise_and_sampling_do_not_come_from_global_generators(lm: LanguageModel) -> None:
    """Seeding numpy's and torch's own generators differently changes nothing, and nothing is drawn from them."""
    one = mechanism(*CLIENT, "server.cohort_size=3")
    call = make_call(lm, "method.name=dplora")
    outcomes, left = [], []
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002  # the global generator is what must not matter
        torch.manual_seed(seed)
        untouched = (np.random.get_state()[1].tobytes(), torch.get_rng_state())  # type: ignore[index]  # noqa: NPY002  # as above
        outcomes.append(
            (released(one, []).tobytes(), alone(method_of("dplora"))(lm, call).upload["adapter"].tobytes(), one.sample_cohort(4))
        )
        left.append(np.random.get_state()[1].tobytes() == untouched[0] and torch.equal(torch.get_rng_state(), untouched[1]))  # type: ignore[index]  # noqa: NPY002  # as above
    assert outcomes[0] == outcomes[1]
    assert left == [True, True]


def test_adaptive_clipping_is_paid_for() -> None:
    """The updates get more noise than z, by just so much that with the count of short updates a round costs what z costs."""
    keys = [*CLIENT, "privacy.noise_multiplier=1.2", "privacy.clip_norm=0.5"]
    flat, adaptive = mechanism(*keys), mechanism(*keys, "privacy.clipping=adaptive", "privacy.count_noise=0.9")
    assert quoted(adaptive, 5) == quoted(flat, 5)
    updates_multiplier = (1.2**-2 - (0.5 / 0.9) ** 2) ** -0.5
    noise = released(adaptive, []).astype(float) * 6 / 0.5
    assert kstest(noise, "norm", args=(0, updates_multiplier)).pvalue > 1e-6
    assert kstest(noise, "norm", args=(0, 1.2)).pvalue < 1e-9, "the count was free"
    both = GaussianDpEvent(updates_multiplier), GaussianDpEvent(0.9 / 0.5)  # one client moves the count by a half
    one_round = RdpAccountant().compose(both[0]).compose(both[1]).get_epsilon(DELTA)
    assert one_round == pytest.approx(RdpAccountant().compose(GaussianDpEvent(1.2)).get_epsilon(DELTA), rel=1e-6)
    assert one_round >= quoted(adaptive, 1)


def test_the_bound_of_adaptive_clipping_moves_by_a_noised_count() -> None:
    """Without noise the bound would tell how many updates were short; with it, its logarithm has the stated spread."""
    keys = [*CLIENT, "privacy.noise_multiplier=1.2", "privacy.clip_norm=0.5", "privacy.clipping=adaptive", "privacy.count_noise=0.9"]
    one, bounds = mechanism(*keys, "privacy.clip_quantile=0.5", "privacy.clip_lr=0.2"), []
    for seed in range(1000):
        state = state_of(0, np.zeros(2, dtype=np.float32))
        bounds.append(next_step(state, [], mechanism=dataclasses.replace(one, seed=seed), lr=1.0, seed=seed)[0].clip_norm)
    moves = [math.log(bound / 0.5) for bound in bounds if bound is not None]
    assert len(moves) == 1000
    assert kstest(moves, "norm", args=(0, 0.2 * 0.9 / 6)).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert kstest(moves, "norm", args=(0, wrong * 0.2 * 0.9 / 6)).pvalue < 1e-4


def test_noise_for_a_uniform_mean_is_not_added_to_a_weighted_one() -> None:
    """Asked for, weights by examples are refused; not asked for, a client with a hundred times the records weighs the same."""
    with pytest.raises(ValueError, match=r"server\.weighting='examples'"):
        mechanism("privacy.unit=client", "server.weighting=examples")
    config = load("", ["privacy.unit=client"])
    assert weights_for([1000, 10, 0], weighting=config.server.weighting) == (1.0, 1.0, 1.0)
    updates = random_updates(2)
    with pytest.raises(AssertionError, match="weights of 1"):
        released(mechanism(*CLIENT), updates, weights=[1000.0, 10.0])


# --- 5: FATE-LLM ---


def test_the_poisson_batches_that_are_accounted_for_are_trained_on(lm: LanguageModel) -> None:
    """Of six records, each is in a step by a coin of its own: response lengths are powers of two, so the tokens say who was in."""
    call = make_call(lm, "method.name=dplora", "dplora.batch_size=2", "dplora.num_steps=1")
    accounted = ledger_of(call.mechanism, 1)["sampling_prob"]
    settings = dataclasses.replace(call.private_settings(), sampling_prob=accounted)
    assert accounted == pytest.approx(1 / 3)
    drawn = np.zeros((150, 6), dtype=int)
    for seed, row in enumerate(drawn):
        _, stats = train_private(lm, call.adapter, examples_of(1, 2, 4, 8, 16, 32), settings=settings, seed=seed)
        row[:] = next(
            bits for bits in itertools.product((0, 1), repeat=6) if sum(b * (2 + 2**i) for i, b in enumerate(bits)) == stats.num_tokens
        )
    assert all(binomtest(int(count), 150, 1 / 3).pvalue > 1e-6 for count in drawn.sum(axis=0))
    sizes = np.bincount(drawn.sum(axis=1), minlength=7)
    expected = 150 * np.array([math.comb(6, k) * 2 ** (6 - k) / 3**6 for k in range(7)])
    assert chisquare([*sizes[:4], sizes[4:].sum()], [*expected[:4], expected[4:].sum()]).pvalue > 1e-6
    assert chisquare([150 * (k == 2) for k in range(5)], [*expected[:4], expected[4:].sum()]).pvalue < 1e-9, (
        "batches of two would be refused"
    )


def test_parts_of_a_batch_make_one_step_with_one_noise(lm: LanguageModel) -> None:
    """Twelve records in a batch meant for three are computed in four parts: one sum, one noise, one step."""
    examples, start = examples_of(*[3, 4, 5] * 4), some_adapter(lm)
    settings = dataclasses.replace(PRIVATE, batch_size=3, noise_multiplier=1.5)
    trained, stats = train_private(lm, start, examples, settings=settings, seed=2)
    plain, _ = train_private(lm, start, examples, settings=dataclasses.replace(settings, noise_multiplier=0.0), seed=2)
    lm.set_adapter(start)
    total = clipped_gradient_sum(lm, examples, clip_norm=0.5, max_batch=12)[0].numpy()
    np.testing.assert_allclose(start - plain, total / 3, rtol=1e-3, atol=1e-6)
    assert stats.num_steps == 1
    noise, std = (plain.astype(float) - trained), 1.5 * 0.5 / 3
    assert kstest(noise, "norm", args=(0, std)).pvalue > 1e-6
    assert kstest(noise, "norm", args=(0, 2 * std)).pvalue < 1e-9, "noise on each of the four parts"


# --- 6: FedASK, FedSVD ---


def test_a_client_drawn_more_often_than_expected_is_within_its_budget() -> None:
    """Two of ten a round: somebody comes twice as often as expected, and the ledger has counted on coming every time."""
    one = mechanism("method.name=dplora", "server.cohort_size=2", "dplora.num_steps=3", sizes=(40,) * 10)
    turns = np.bincount(np.concatenate([one.sample_cohort(r) for r in range(20)]), minlength=10)
    assert turns.sum() == 40
    assert turns.max() > 4
    assert ledger_of(one, 20)["num_releases"] == 20 * 3 >= 3 * turns.max()
    assert sum(release["count"] for release in ledger_of(one, 20)["releases"]) == 20 * 3
    every = mechanism("method.name=dplora", "dplora.num_steps=3", sizes=(40,) * 10)
    assert quoted(one, 20) == quoted(every, 20)


# --- 7: FederatedScope's NbAFL ---


def test_noise_leaves_the_frozen_base_model_alone(lm: LanguageModel) -> None:
    def digest() -> str:
        frozen = [p.detach().numpy().tobytes() for p in lm.model.parameters() if not p.requires_grad]
        assert len(frozen) > 10
        return hashlib.sha256(b"".join(frozen)).hexdigest()

    before = digest()
    settings = dataclasses.replace(PRIVATE, noise_multiplier=100.0)
    trained, _ = train_private(lm, some_adapter(lm), examples_of(4), settings=settings, seed=0)
    assert (trained != some_adapter(lm)).all()
    assert digest() == before
    assert set(unflatten(trained, lm.layout)) == {name for name in lm.layout.names if ".lora_" in name}


@pytest.mark.parametrize(
    "keys", [CLIENT, (*CLIENT, "server.cohort_size=2"), ("method.name=dplora",), ("method.name=dplora", "dplora.mode=literal")]
)
def test_rounds_are_composed(keys: tuple[str, ...]) -> None:
    """Every round costs: more than the one before alone, and as dp-accounting composes them where nothing is sampled."""
    one = mechanism(*keys, "privacy.noise_multiplier=2")
    spent = [quoted(one, num_rounds) for num_rounds in (1, 2, 10)]
    assert spent[0] < spent[1] < spent[2]
    if one.sampling_prob == 1.0:
        equivalent = ledger_of(one, 10)["accounted_multiplier"] / math.sqrt(10)  # ten Gaussian releases are one of less noise
        assert gaussian_delta(spent[2], equivalent) == pytest.approx(DELTA, rel=0.03)


# --- 8: pfl ---


@pytest.mark.parametrize("sampler", ["poisson", "fixed", "cyclic"])
def test_cohorts_are_drawn_as_they_are_accounted_for_and_without_replacement(sampler: str) -> None:
    """Nobody is in a cohort twice, and sizes vary under the sampler whose accounting says that they do."""
    one = mechanism(*CLIENT, f"privacy.sampler={sampler}", "server.cohort_size=3", "server.num_rounds=40", sizes=(5,) * 12)
    cohorts = [one.sample_cohort(round_index) for round_index in range(400)]
    assert all(len(set(cohort)) == len(cohort) for cohort in cohorts)
    sizes = np.array([len(cohort) for cohort in cohorts])
    [release] = ledger_of(one, 40)["releases"]
    assert release["sampler"] == {"poisson": "poisson", "fixed": "fixed", "cyclic": "all"}[sampler]
    if sampler == "poisson":
        assert release["sampling_prob"] == 3 / 12
        assert 0.7 < sizes.var() / (12 * 0.25 * 0.75) < 1.4
    else:
        assert set(sizes) == {3}
    if sampler == "fixed":
        assert (release["population"], release["sample_size"]) == (12, 3)
    turns = np.bincount(np.concatenate([np.array(cohort, dtype=int) for cohort in cohorts]), minlength=12)
    assert all(binomtest(int(count), 400, 0.25).pvalue > 1e-6 for count in turns)


def test_a_resumed_run_draws_the_same_cohorts_and_noise() -> None:
    """Round 7 by itself, in a mechanism made anew, is round 7 after rounds 0 to 6: no generator carries a state over."""
    keys = [*CLIENT, "server.cohort_size=3", "privacy.noise_multiplier=1e-4"]  # so little noise that its epsilon takes no time
    first = mechanism(*keys)
    seen = [(first.sample_cohort(r), released(first, [], round_index=r).tobytes()) for r in range(8)]
    resumed = mechanism(*keys)
    assert (resumed.sample_cohort(7), released(resumed, [], round_index=7).tobytes()) == seen[7]
    assert len({noise for _, noise in seen}) == 8


# --- 9: NVFlare's PercentilePrivacy ---


@pytest.mark.parametrize("method", CHOICES["method.name"])
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_nothing_is_called_private_that_is_not(method: str, noise_multiplier: float) -> None:
    """A sentence that says so comes with noise and with an epsilon; without, there is none, and the sentence says that."""
    units = {"fedit": ("none", "client"), "dplora": ("example",)}.get(method, ("none",))
    for unit in units:
        ledger = ledger_of(mechanism(f"method.name={method}", f"privacy.unit={unit}", f"privacy.noise_multiplier={noise_multiplier}"), 3)
        private = noise_multiplier > 0 and unit != "none"
        assert (ledger["epsilon"] is not None) == private
        assert ("differentially private" in ledger["guarantee"]) == private
        assert ("No differential-privacy guarantee" in ledger["guarantee"] or method == "base") == (not private)


# --- 10: opacus ---


def test_the_divisor_does_not_depend_on_the_data(lm: LanguageModel) -> None:
    """Three records move a private step three times as far as one, and three clients a release: nothing is averaged over who came."""
    [one_example], start = examples_of(6), some_adapter(lm)
    settings = dataclasses.replace(PRIVATE, clip_norm=1e-2)
    alone, three = (train_private(lm, start, [one_example] * n, settings=settings, seed=0)[0].astype(float) - start for n in (1, 3))
    np.testing.assert_allclose(three, 3 * alone, rtol=1e-2, atol=1e-7)
    assert np.linalg.norm(alone) == pytest.approx(1e-2 / 4, rel=1e-3)
    one = mechanism(*CLIENT, "privacy.noise_multiplier=0", "privacy.clip_norm=0.5")
    update = random_updates(1)[0]
    np.testing.assert_allclose(released(one, [update] * 3), 3 * released(one, [update]), rtol=1e-5)


def test_no_lora_weight_stays_untrained_in_silence(lm: LanguageModel) -> None:
    """Private training without noise moves every tensor; one that is frozen is an error, noise or not."""
    start = some_adapter(lm)
    trained, _ = train_private(lm, start, examples_of(5, 7), settings=dataclasses.replace(PRIVATE, num_steps=2), seed=0)
    for name, (first, last) in zip(lm.layout.names, lm.layout.spans(), strict=True):
        assert (trained[first:last] != start[first:last]).any(), name
    spoilt = build(load_base_model("tiny"))
    next(p for p in spoilt.model.parameters() if p.requires_grad).requires_grad_(False)
    for noise_multiplier in (0.0, 1.0):
        with pytest.raises(RuntimeError, match="is frozen"):
            train_private(spoilt, start, examples_of(5), settings=dataclasses.replace(PRIVATE, noise_multiplier=noise_multiplier), seed=0)


# --- 11: everywhere ---


@pytest.mark.parametrize("keys", [CLIENT, ("method.name=dplora",), ("method.name=dplora", "dplora.mode=literal")])
def test_shard_sizes_are_no_weights_where_a_guarantee_is_claimed(keys: tuple[str, ...]) -> None:
    """Whatever `auto` resolves to, and for record-level privacy as well: a client's records must not say how far it moves the rest."""
    config = load("", [key for key in keys if not key.startswith("server.")])
    assert config.privacy.unit in ("client", "example")
    assert weights_for([3, 3000], weighting=config.server.weighting) == (1.0, 1.0)
    small, large = random_updates(2, scale=1e-4)
    one = mechanism(*keys, "privacy.noise_multiplier=0", sizes=(3, 3000))
    np.testing.assert_allclose(released(one, [small, large]), (small + large) / 2, rtol=1e-5, atol=1e-9)


# --- 12: FLoRA, FedEx-LoRA, Fed-SB, Shepherd ---


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_every_client_is_in_the_average_and_not_the_first_alone(chunk_size: int) -> None:
    updates, one = random_updates(5), mechanism(sizes=(1, 2, 3, 4, 5))
    weights = [1.0, 2.0, 3.0, 4.0, 5.0]
    sums = [clip_and_sum(updates[i : i + chunk_size], weights=weights[i : i + chunk_size], clip_norm=None) for i in range(0, 5, chunk_size)]
    new = next_step(state_of(0, np.zeros(SIZE, dtype=np.float32)), sums, mechanism=one, lr=1.0, seed=0)[0].adapter
    np.testing.assert_allclose(new, np.average(updates, axis=0, weights=weights), rtol=1e-4, atol=1e-6)
    for left_out in range(5):
        others = [k for k in range(5) if k != left_out]
        without = np.average([updates[k] for k in others], axis=0, weights=[weights[k] for k in others])
        assert np.linalg.norm(new - without) > 0.01 * np.linalg.norm(new)


def test_b_times_a_is_not_transposed(lm: LanguageModel) -> None:
    """For linear layers that are wider than long and longer than wide: the adapted model is the base with B A added to its weights."""
    lm.set_adapter(some_adapter(lm))
    ids = torch.tensor([[20, 30, 40, 50, 60]])
    tensors, shapes = unflatten(some_adapter(lm), lm.layout), set()
    with torch.no_grad():
        adapted = lm.model(input_ids=ids).logits
        merged = build(load_base_model("tiny")).model.unload()
        for name in (name for name in lm.layout.names if ".lora_A." in name):
            weight = merged.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A", ""))
            product = tensors[name.replace(".lora_A.", ".lora_B.")] @ tensors[name]
            weight.copy_(weight + 2.0 * product)  # alpha over rank
            shapes.add(tuple(weight.shape))
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert {(64, 32), (32, 64), (16, 32)} <= shapes


def test_the_first_adapter_owes_nothing_to_the_data(lm: LanguageModel) -> None:
    """It is a function of seed and layout; an initialisation from private gradients would be a release to account for."""
    first = initial_adapter(lm.layout, seed=4)
    train_private(lm, first, encode(lm, RECORDS), settings=PRIVATE, seed=1)
    assert initial_adapter(lm.layout, seed=4).tobytes() == first.tobytes()
    assert not any(tensor.any() for name, tensor in unflatten(first, lm.layout).items() if ".lora_B." in name)


def test_no_adapter_key_is_dropped_in_a_load(lm: LanguageModel, tmp_path: Path) -> None:
    tensors = unflatten(some_adapter(lm), lm.layout)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert load_adapter(tmp_path, lm.layout).tobytes() == some_adapter(lm).tobytes()
    for name in (lm.layout.names[0], lm.layout.names[-1]):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=f"{name} is missing"):
            load_adapter(tmp_path, lm.layout)
        save_file({("x." + key if key == name else key): tensor for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=f"x.{name} is not part of the layout"):
            load_adapter(tmp_path, lm.layout)
