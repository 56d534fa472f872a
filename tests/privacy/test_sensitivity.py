"""Sensitivity as a property: what one client, or one record, can do to the sum before noise, for every mechanism that claims a guarantee.

The relation and the bound are those of the ledger: C for a client or a record added or removed, 2 C for a client replaced, and
2 sqrt(2) C for a record replaced in DP-LoRA as published.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raysim.config import CHOICES, load
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.lora.spec import RULES
from raysim.methods.call import ClientCall
from raysim.methods.registry import method_of
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.private_train import PrivateSettings, clipped_gradient_sum, train_literal, train_private
from raysim.privacy.aggregation import open_sums, sum_chunk
from raysim.privacy.clipping import clip_and_sum
from raysim.privacy.mechanism import LITERAL_SENSITIVITY, Mechanism
from tests.method_calls import alone, make_call
from tests.rounds import make_round

Update = npt.NDArray[np.floating]
Total = npt.NDArray[np.float64]

HUGE32, DENORMAL32 = float(np.finfo(np.float32).max), 1e-45
DTYPES = (np.float16, np.float32, np.float64)
SPECIAL = [0.0, -0.0, 1.0, HUGE32, -HUGE32, 1e38, 1e300, DENORMAL32, 5e-324, math.nan, math.inf, -math.inf]
ROUNDING = 1e-4
"""Share of the bound that float32 arithmetic may add where examples are computed together: others change one's last bits."""

clip_norms = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1e-44, 1e-30, 1.0, 1e30]))


# --- client level: the sum of clipped updates ---


@st.composite
def updates_of(draw: st.DrawFn, size: int) -> Update:
    """An update of any floating type: one value throughout (so that several pull the same way), special ones, or a random direction."""
    dtype = draw(st.sampled_from(DTYPES))
    values = draw(
        st.one_of(
            st.sampled_from(SPECIAL).map(lambda value: np.full(size, value)),
            st.lists(st.sampled_from(SPECIAL), min_size=size, max_size=size).map(np.array),
            st.lists(st.floats(), min_size=size, max_size=size).map(np.array),
            st.tuples(st.integers(0, 99), st.sampled_from([1e-40, 1e-3, 1.0, 1e6, 1e38])).map(
                lambda pair: pair[1] * np.random.default_rng(pair[0]).standard_normal(size)
            ),
        )
    )
    with np.errstate(over="ignore"):
        update: Update = values.astype(dtype)
    return update


@st.composite
def cohorts(draw: st.DrawFn) -> list[Update]:
    size = draw(st.integers(1, 12))
    cohort: list[Update] = draw(st.lists(updates_of(size), min_size=1, max_size=9))
    return cohort


def sum_before_noise(cohort: Sequence[Update], *, clip_norm: float, chunk_size: int, size: int) -> Total:
    """As a round has it: the cohort in order, summed chunk by chunk, and the chunks' sums added in order."""
    total = np.zeros(size, dtype=np.float64)
    for start in range(0, len(cohort), chunk_size):
        chunk = cohort[start : start + chunk_size]
        total += clip_and_sum(chunk, weights=[1.0] * len(chunk), clip_norm=clip_norm).total
    return total


def distance(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> float:
    """The L2 distance, by a sum of squares without rounding."""
    return math.sqrt(math.fsum((float(a) - float(b)) ** 2 for a, b in zip(one, other, strict=True)))


@pytest.mark.filterwarnings("ignore:overflow encountered in square")  # of float64 values that no float32 holds
@settings(max_examples=300)
@given(cohorts(), clip_norms, st.integers(1, 4), st.data())
def test_a_client_added_or_removed_moves_the_sum_by_at_most_the_clip_norm(
    cohort: list[Update], clip_norm: float, chunk_size: int, data: st.DataObject
) -> None:
    """Whoever it is, in whichever chunk, and though everyone after it moves up into another chunk."""
    left_out = data.draw(st.integers(0, len(cohort) - 1))
    neighbour = cohort[:left_out] + cohort[left_out + 1 :]
    sums = [sum_before_noise(c, clip_norm=clip_norm, chunk_size=chunk_size, size=len(cohort[0])) for c in (cohort, neighbour)]
    assert np.isfinite(sums[0]).all()
    assert distance(*sums) <= clip_norm


@pytest.mark.filterwarnings("ignore:overflow encountered in square")
@settings(max_examples=150)
@given(cohorts(), clip_norms, st.integers(1, 4), st.data())
def test_a_client_replaced_moves_the_sum_by_at_most_twice_the_clip_norm(
    cohort: list[Update], clip_norm: float, chunk_size: int, data: st.DataObject
) -> None:
    index, size = data.draw(st.integers(0, len(cohort) - 1)), len(cohort[0])
    neighbour = [*cohort[:index], data.draw(updates_of(size)), *cohort[index + 1 :]]
    sums = [sum_before_noise(c, clip_norm=clip_norm, chunk_size=chunk_size, size=size) for c in (cohort, neighbour)]
    assert distance(*sums) <= 2 * clip_norm


@settings(max_examples=40)
@given(st.integers(1, 400), st.sampled_from([1e-30, 1e-6, 1.0, 1e30]), st.integers(1, 64))
@example(400, 1.0, 6)
def test_both_bounds_are_reached(num_clients: int, clip_norm: float, chunk_size: int) -> None:
    """However large and aligned the cohort: the bound holds but for rounding, and no smaller claim would be true."""
    cohort: list[Update] = [np.full(7, 1e30, dtype=np.float32)] * num_clients
    neighbours = {1: cohort[1:], 2: [-cohort[0], *cohort[1:]]}
    with_all = sum_before_noise(cohort, clip_norm=clip_norm, chunk_size=chunk_size, size=7)
    for factor, neighbour in neighbours.items():
        moved = distance(with_all, sum_before_noise(neighbour, clip_norm=clip_norm, chunk_size=chunk_size, size=7))
        assert 0.999 * factor * clip_norm <= moved <= factor * clip_norm * (1 + 1e-10)


@pytest.mark.filterwarnings("ignore:overflow encountered in square")
@settings(max_examples=25)
@given(
    st.sampled_from(["server", "client", "distributed"]),
    st.integers(1, 12).flatmap(lambda size: st.lists(updates_of(size), min_size=4, max_size=4)),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e6]),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_a_client_whose_data_are_not_used_moves_the_sum_by_at_most_the_clip_norm(
    noise_at: str, updates: list[Update], clip_norm: float, chunk_size: int, index: int
) -> None:
    """Wherever the noise is added, in the open or as masked integers, and whichever chunk the client is in."""
    keys = ["partition.num_clients=4", "privacy.unit=client", f"privacy.noise_at={noise_at}", "privacy.noise_multiplier=0"]
    mechanism = Mechanism.from_config(load("", [*keys, f"privacy.clip_norm={clip_norm}"]), shard_sizes=[10] * 4)
    unused = [np.zeros_like(update) if k == index else update for k, update in enumerate(updates)]
    sums = [sum_at_server(one, mechanism=mechanism, chunk_size=chunk_size) for one in (updates, unused)]
    assert np.isfinite(sums[0]).all()
    assert distance(*sums) <= clip_norm


def sum_at_server(updates: Sequence[Update], *, mechanism: Mechanism, chunk_size: int) -> Total:
    """The sum that the server steps with, from what left the places where the chunks' clients are."""
    round, ids, parts = make_round(mechanism), range(len(updates)), []
    for start in range(0, len(updates), chunk_size):
        chunk = slice(start, start + chunk_size)
        parts.append(
            sum_chunk(
                [{"adapter": update} for update in updates[chunk]],
                client_ids=ids[chunk],
                weights=[1.0] * len(ids[chunk]),
                round=round,
                mechanism=mechanism,
            )
        )
    opened = open_sums(parts, mechanism=mechanism, round=round)
    return sum((part.total for part in opened), np.zeros(len(updates[0])))


# --- record level: the sum of clipped gradients ---

NAN_TOKEN, HUGE_TOKEN, DENORMAL_TOKEN = 7, 8, 9
POISON = {NAN_TOKEN: math.nan, HUGE_TOKEN: 3e38, DENORMAL_TOKEN: 1e-44}


def poisoned_model() -> LanguageModel:
    """The tiny model with three tokens whose embeddings are not a number, huge, and denormal: records may hold anything."""
    base = load_base_model("tiny")
    table = base.tensors["model.embed_tokens.weight"]
    poisoned = table.copy()
    for token, value in POISON.items():
        poisoned[token] = value
    tensors = base.tensors | {"model.embed_tokens.weight": poisoned, "lm_head.weight": table}
    untied = dataclasses.replace(base, tensors=tensors, config=base.config | {"tie_word_embeddings": False})
    return build_language_model(untied, rank=2, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])


LM = poisoned_model()

tokens = st.one_of(st.integers(10, 260), st.sampled_from(sorted(POISON)))
ordinary_tokens = st.integers(10, 260)
SCALES = [0.0, 1e-38, 1e-3, 0.3, 30.0, 1e10, 1e30, 1e38]


def examples_of(token: st.SearchStrategy[int]) -> st.SearchStrategy[Example]:
    def make(prompt: list[int], response: list[int]) -> Example:
        return Example(record=Record(record_id=0, instruction="", response=""), prompt_ids=tuple(prompt), response_ids=tuple(response))

    return st.builds(make, st.lists(token, min_size=1, max_size=12), st.lists(token, min_size=1, max_size=8))


@st.composite
def adapters(draw: st.DrawFn, scales: Sequence[float] = tuple(SCALES), specials: bool = True) -> npt.NDArray[np.float32]:
    """Random values of any scale in A and of any other in B, a few of them perhaps not finite."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    vector = rng.standard_normal(LM.layout.num_parameters)
    mask = LM.layout.group_mask("A")
    vector[mask] *= draw(st.sampled_from(scales))
    vector[~mask] *= draw(st.sampled_from(scales))
    if specials and draw(st.integers(0, 9)) == 0:
        vector[rng.integers(len(vector), size=3)] = draw(st.sampled_from([math.nan, math.inf, -math.inf, HUGE32]))
    with np.errstate(over="ignore"):
        return vector.astype(np.float32)


def gradient_sum(examples: Sequence[Example], *, clip_norm: float, max_batch: int) -> Total:
    return clipped_gradient_sum(LM, examples, clip_norm=clip_norm, max_batch=max_batch)[0].numpy()


@settings(max_examples=60)
@given(st.lists(examples_of(tokens), min_size=1, max_size=4), adapters(), clip_norms, st.data())
def test_a_record_added_or_removed_moves_the_gradient_sum_by_at_most_the_clip_norm(
    shard: list[Example], adapter: npt.NDArray[np.float32], clip_norm: float, data: st.DataObject
) -> None:
    """Whatever the record says and whatever the adapter is, gradients that overflow or are not numbers included."""
    LM.set_adapter(adapter)
    index = data.draw(st.integers(0, len(shard) - 1))
    sums = [gradient_sum(s, clip_norm=clip_norm, max_batch=1) for s in (shard, shard[:index] + shard[index + 1 :])]
    assert np.isfinite(sums[0]).all()
    assert distance(*sums) <= clip_norm


@settings(max_examples=25)
@given(
    st.lists(examples_of(ordinary_tokens), min_size=1, max_size=5),
    examples_of(tokens),
    adapters(scales=(1e-3, 0.3, 3.0), specials=False),
    st.sampled_from([1e-3, 1.0, 1e6]),
    st.integers(2, 5),
    st.data(),
)
def test_a_record_moves_a_sum_in_batches_by_the_clip_norm_and_rounding(
    shard: list[Example], added: Example, adapter: npt.NDArray[np.float32], clip_norm: float, max_batch: int, data: st.DataObject
) -> None:
    """Others in the batch change an example's own gradient in its last bits alone, even beside a record that is not a number."""
    LM.set_adapter(adapter)
    at = data.draw(st.integers(0, len(shard)))
    sums = [gradient_sum(s, clip_norm=clip_norm, max_batch=max_batch) for s in (shard, [*shard[:at], added, *shard[at:]])]
    assert distance(*sums) <= clip_norm * (1 + ROUNDING)


def test_the_bound_on_a_record_is_reached() -> None:
    LM.set_adapter((0.3 * np.random.default_rng(0).standard_normal(LM.layout.num_parameters)).astype(np.float32))
    one = Example(record=Record(record_id=0, instruction="", response=""), prompt_ids=(20, 30), response_ids=(40, 50))
    for clip_norm in (1e-30, 1e-3):
        assert distance(gradient_sum([one], clip_norm=clip_norm, max_batch=1), np.zeros(LM.layout.num_parameters)) >= 0.999999 * clip_norm


def options(*, clip_norm: float, batch_size: int, sampling_prob: float) -> PrivateSettings:
    """One step of plain SGD without noise."""
    return PrivateSettings(
        1, batch_size, sampling_prob, lr=1.0, optimizer="sgd", clip_norm=clip_norm, noise_multiplier=0.0, secure_noise=False
    )


def step_before_noise(model: LanguageModel) -> Total:
    """What the last step would have added noise to: the model's flat gradient, since the multiplier was 0."""
    return model.flat_grad.double().numpy().copy()


@settings(max_examples=20)
@given(st.lists(examples_of(ordinary_tokens), min_size=2, max_size=6), st.sampled_from([0.01, 1.0, 50.0]), st.integers(0, 99))
def test_a_record_moves_a_private_step_by_at_most_the_clip_norm_over_the_batch_size(
    shard: list[Example], clip_norm: float, seed: int
) -> None:
    """The last record is in the step's Poisson batch or not, and the others are drawn as without it; the divisor is the same."""
    adapter = (0.3 * np.random.default_rng(seed).standard_normal(LM.layout.num_parameters)).astype(np.float32)
    steps = []
    for records in (shard, shard[:-1]):
        train_private(LM, adapter, records, settings=options(clip_norm=clip_norm, batch_size=3, sampling_prob=0.7), seed=seed)
        steps.append(3 * step_before_noise(LM))
    assert distance(*steps) <= clip_norm * (1 + ROUNDING)


@settings(max_examples=40)
@given(
    st.lists(examples_of(ordinary_tokens), min_size=1, max_size=4),
    examples_of(tokens),
    adapters(scales=(1e-3, 0.3, 30.0, 1e10)),
    st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_a_record_replaced_moves_a_literal_step_by_at_most_two_root_two_clip_norms(
    shard: list[Example], replacement: Example, adapter: npt.NDArray[np.float32], clip_norm: float
) -> None:
    """Even by one whose gradient is not a number: a mean that is not finite counts as zero."""
    steps = []
    for records in (shard, [*shard[:-1], replacement]):
        steps.append(literal_step(records, adapter=adapter, clip_norm=clip_norm))
    assert np.isfinite(steps).all()
    assert distance(*steps) <= LITERAL_SENSITIVITY * clip_norm * (1 + ROUNDING)


def literal_step(records: Sequence[Example], *, adapter: npt.NDArray[np.float32], clip_norm: float) -> Total:
    """A literal step before noise; zero where, without noise, it is refused because an adapter so large has no gradient left."""
    settings = options(clip_norm=clip_norm, batch_size=len(records), sampling_prob=1.0)
    try:
        train_literal(LM, adapter, records, settings=settings, seed=0)
    except RuntimeError as error:
        if "no gradient reached the adapter" not in str(error):
            raise
        return np.zeros(LM.layout.num_parameters)
    return step_before_noise(LM)


# --- every mechanism that claims a guarantee, through the method that runs it ---

CASES = {
    ("fedit", "client", "average"): ["method.name=fedit", "privacy.unit=client", "privacy.noise_multiplier=0"],
    ("dplora-example", "example", "average"): ["method.name=dplora", "privacy.noise_multiplier=0", "dplora.num_steps=1"],
    ("dplora-literal", "literal", "average"): ["method.name=dplora", "dplora.mode=literal", "privacy.noise_multiplier=0"],
}
"""(method, kind of mechanism, aggregation) -> the overrides of a round without noise."""
CLIENT_RULES = ("average", "ffa", "rolora", "fedsvd", "fedsb")
"""The LoRA rules under which a client is protected: see `test_rules`, where an adversary sends by each of them."""
CASES |= {("fedit", "client", rule): [*CASES["fedit", "client", "average"], f"lora.aggregation={rule}"] for rule in CLIENT_RULES}
CASES |= {
    ("dplora-example", "example", rule): [*CASES["dplora-example", "example", "average"], f"lora.aggregation={rule}"] for rule in RULES
}

TESTED_ELSEWHERE = ("synthesis",)
"""Private self-generation bounds next-token distributions and not gradients; its tests stand with it."""


def guaranteed_combinations() -> set[tuple[str, str, str]]:
    """Every (method, kind, aggregation) that the configuration lets claim a guarantee."""
    found = set()
    choices = ("method.name", "dplora.mode", "privacy.unit", "lora.aggregation")
    for method, mode, unit, rule in itertools.product(*(CHOICES[key] for key in choices)):
        keys = [f"method.name={method}", f"dplora.mode={mode}", f"privacy.unit={unit}", f"lora.aggregation={rule}", "fedpit.scorer=none"]
        try:
            config = load("", keys)
        except ValueError:
            continue
        kind = Mechanism.from_config(config, shard_sizes=[10] * config.partition.num_clients).kind
        if kind not in ("none", *TESTED_ELSEWHERE):
            found.add((f"dplora-{mode}" if method == "dplora" else method, kind, rule))
    return found


def test_every_combination_that_claims_a_guarantee_is_tested_here() -> None:
    assert guaranteed_combinations() == set(CASES)


texts = st.one_of(
    st.sampled_from(["", "no", "yes " * 40, "\x00\x7f\u00ff" * 9, "9" * 120]),
    st.text(st.characters(codec="utf-8"), max_size=30),
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"])


def call_for(lm: LanguageModel, shard: Sequence[str], *, case: tuple[str, str, str], clip_norm: float) -> ClientCall:
    records = [Record(record_id=i, instruction=text[:40] or "?", response=text) for i, text in enumerate(shard)]
    call = make_call(lm, *CASES[case], f"privacy.clip_norm={clip_norm}", f"dplora.batch_size={BATCH}", records=records)
    assert call.mechanism.kind == case[1]
    return call


BATCH = 8
"""More than any shard here holds, so that every record is in the step."""


@settings(max_examples=12)
@given(st.lists(texts, min_size=1, max_size=3), st.sampled_from([1e-3, 0.3, 10.0]), st.sampled_from([1.0, 100.0, math.inf]))
def test_a_client_of_fedit_adds_at_most_the_clip_norm(lm: LanguageModel, shard: list[str], clip_norm: float, scale: float) -> None:
    """Whatever it trains on and from, an adapter from which training diverges included."""
    call = call_for(lm, shard, case=("fedit", "client", "average"), clip_norm=clip_norm)
    call = dataclasses.replace(call, adapter=call.adapter * np.float32(scale))
    update = alone(method_of("fedit"))(lm, call).upload["adapter"]
    assert np.isfinite(update).all() == math.isfinite(scale)
    total = clip_and_sum([update], weights=[1.0], clip_norm=call.mechanism.update_clip_norm).total
    assert distance(total, np.zeros_like(total)) <= clip_norm
    assert total.any() == math.isfinite(scale)


@settings(max_examples=12)
@given(st.lists(texts, min_size=2, max_size=4), st.sampled_from([1e-3, 0.3, 10.0]))
def test_a_record_moves_a_client_of_dplora_by_at_most_the_clip_norm(lm: LanguageModel, shard: list[str], clip_norm: float) -> None:
    """The divisor is the expected batch and not the shard: what a step adds noise to moves by C / B."""
    steps = []
    for records in (shard, shard[:-1]):
        alone(method_of("dplora"))(lm, call_for(lm, records, case=("dplora-example", "example", "average"), clip_norm=clip_norm))
        steps.append(BATCH * step_before_noise(lm))
    assert 0.0 < distance(*steps) <= clip_norm * (1 + ROUNDING)


@settings(max_examples=12)
@given(st.lists(texts, min_size=1, max_size=3), texts, st.sampled_from([1e-3, 0.3, 10.0]))
def test_a_record_replaced_moves_a_client_of_literal_dplora_by_at_most_two_root_two_clip_norms(
    lm: LanguageModel, shard: list[str], replacement: str, clip_norm: float
) -> None:
    steps = []
    for records in (shard, [*shard[:-1], replacement]):
        alone(method_of("dplora"))(lm, call_for(lm, records, case=("dplora-literal", "literal", "average"), clip_norm=clip_norm))
        steps.append(step_before_noise(lm))
    assert distance(*steps) <= LITERAL_SENSITIVITY * clip_norm * (1 + ROUNDING)
