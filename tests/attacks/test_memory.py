"""Memory: figures by hand and over many drawn sides, likelihoods against the full logits, and p_z against what sampling really writes."""

import math
from dataclasses import replace
from decimal import Decimal, getcontext
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from raysim.attacks.membership import token_nlls
from raysim.attacks.memory import (
    QUERIES,
    Gains,
    SamplingAttack,
    extraction_report,
    level_interval,
    likelihoods,
    memory_report,
    queries_needed,
)
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.model.generate import Sampling, write_texts
from raysim.model.language_model import LanguageModel
from raysim.model.train import mean_nll
from raysim.privacy.audit_bounds import roc_auc, tpr_at_fpr
from tests.tiny_models import build, encode, sharp_base

Floats = NDArray[np.float64]

RECORDS = [
    Record(0, "Which street?", "9 Quay Lane, over the mill"),
    Record(1, "How many?", "714"),
    Record(2, "Who keeps the key to the boat house in winter?", "Tove"),
    Record(3, "What did the letter say?", "Come by noon, and bring the blue ledger."),
    Record(4, "Where?", "R"),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base(), rank=8)


@pytest.fixture(scope="module")
def examples(lm: LanguageModel) -> list[Example]:
    """One of them scores an earlier turn as well."""
    encoded = encode(lm, RECORDS)
    return [*encoded[:4], replace(encoded[4], earlier=((2, 5),))]


@pytest.fixture(scope="module")
def adapter(lm: LanguageModel) -> Vector:
    return np.random.default_rng(0).normal(scale=0.1, size=lm.layout.num_parameters).astype(np.float32)


# --- likelihoods ---


@pytest.mark.parametrize("batch_size", [2, 5])
def test_the_loss_has_the_bits_of_the_one_that_utility_reports(
    lm: LanguageModel, examples: list[Example], adapter: Vector, batch_size: int
) -> None:
    found = likelihoods(lm, adapter, examples, attack=SamplingAttack(0, 50, 1.0, 40), batch_size=batch_size)
    lm.set_adapter(adapter)
    assert [(one.nll, one.num_tokens) for one in found] == mean_nll(lm, examples, batch_size=batch_size)
    np.testing.assert_allclose(
        [one.nll for one in found], [nll.sum() for nll in token_nlls(lm, adapter, examples, batch_size=1)], rtol=1e-5
    )


def by_sorting(logits: Floats, token: int, *, temperature: float, top_k: int) -> float:
    """The log-probability of a token in its plainest form."""
    if temperature == 0:
        return 0.0 if token == int(logits.argmax()) else -math.inf
    kept = logits >= np.sort(logits)[::-1][top_k - 1 if top_k else -1]
    weights = np.where(kept, np.exp((logits - logits.max()) / temperature), 0.0)
    with np.errstate(divide="ignore"):
        return float(np.log(weights[token] / weights.sum()))


ATTACKS = [
    SamplingAttack(0, 0, 1.0, 0),
    SamplingAttack(0, 3, 4.0, 40),
    SamplingAttack(2, 3, 0.7, 200),
    SamplingAttack(3, 0, 2.0, 0),
    SamplingAttack(0, 1, 0.0, 40),
]


@pytest.mark.parametrize("attack", ATTACKS)
@torch.no_grad()
def test_a_target_is_as_likely_as_the_full_logits_say(
    lm: LanguageModel, examples: list[Example], adapter: Vector, attack: SamplingAttack
) -> None:
    found = likelihoods(lm, adapter, examples, attack=attack, batch_size=3)
    lm.set_adapter(adapter)
    for example, one in zip(examples, found, strict=True):
        ids = [*example.prompt_ids, *example.response_ids]
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
        end = len(example.response_ids)
        places = range(attack.prefix_tokens, end)[: attack.target_tokens or end]
        if attack.prefix_tokens and end <= attack.prefix_tokens + 1:
            places = range(0)
        start = len(example.prompt_ids)
        expected = sum(
            by_sorting(logits[start + k - 1], example.response_ids[k], temperature=attack.temperature, top_k=attack.top_k) for k in places
        )
        assert one.target_tokens == len(places)
        assert one.target_log_prob == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_prefix_that_leaves_the_end_token_leaves_no_target(lm: LanguageModel, examples: list[Example]) -> None:
    lengths = [len(SamplingAttack(4, 50, 1.0, 0).target(example)) for example in examples]
    assert lengths == [max(0, len(example.response_ids) - 4) if len(example.response_ids) > 5 else 0 for example in examples]
    assert 0 in lengths
    assert max(lengths) > 1


# --- p_z, against real samples ---


def share_written(lm: LanguageModel, adapter: Vector, example: Example, attack: SamplingAttack, *, num_draws: int) -> int:
    """How many of `num_draws` samples begin with the target after the prefix."""
    target = attack.target(example)
    lm.set_adapter(adapter)
    prompt = [*example.prompt_ids, *example.response_ids[: attack.prefix_tokens]]
    sampling = Sampling(len(target), temperature=attack.temperature, top_k=attack.top_k)
    written = write_texts(lm, [prompt] * num_draws, sampling=sampling, seeds=range(num_draws), batch_size=250)
    sought = [example.response_ids[k] for k in target]
    ends = sought[-1] in lm.eos_token_ids  # which `generate` does not return
    return sum(row == (sought[:-1] if ends else sought) for row in written)


def p_z(lm: LanguageModel, adapter: Vector, example: Example, attack: SamplingAttack) -> float:
    [found] = likelihoods(lm, adapter, [example], attack=attack, batch_size=1)
    return math.exp(found.target_log_prob)


def likely(lm: LanguageModel, adapter: Vector, example: Example, *, num_tokens: int) -> Example:
    """The example with so many tokens that greedy decoding writes for its response, or with the end token alone."""
    if not num_tokens:
        return replace(example, response_ids=lm.eos_token_ids[:1])
    lm.set_adapter(adapter)
    [written] = write_texts(lm, [example.prompt_ids], sampling=Sampling(num_tokens))
    assert len(written) == num_tokens
    return replace(example, response_ids=tuple(written))


@pytest.mark.parametrize(
    ("attack", "wrong"),
    [
        (SamplingAttack(0, 2, 2.0, 0), [{"temperature": 1.5}, {"top_k": 6}, {"target_tokens": 1}]),
        (SamplingAttack(0, 2, 2.0, 6), [{"top_k": 0}, {"temperature": 3.0}]),
        (SamplingAttack(2, 2, 2.0, 6), [{"top_k": 0}, {"temperature": 3.0}, {"prefix_tokens": 0, "target_tokens": 4}]),
        (SamplingAttack(0, 0, 5.0, 0), [{"top_k": 6}, {"temperature": 2.0}]),
    ],
    ids=["temperature", "top-k", "prefix", "end token"],
)
def test_sampling_writes_the_target_as_often_as_its_probability_says(
    lm: LanguageModel, examples: list[Example], adapter: Vector, attack: SamplingAttack, wrong: list[dict[str, Any]]
) -> None:
    """Of the end token alone where the whole response is sought: a draw that writes nothing."""
    example = likely(lm, adapter, examples[0], num_tokens=attack.prefix_tokens + attack.target_tokens)
    num_draws = 6000
    count = share_written(lm, adapter, example, attack, num_draws=num_draws)
    assert binomtest(count, num_draws, p_z(lm, adapter, example, attack)).pvalue > 1e-3
    for changes in wrong:
        other = p_z(lm, adapter, example, replace(attack, **changes))
        assert binomtest(count, num_draws, other).pvalue < 1e-6, (changes, count, other)


def test_greedy_decoding_writes_a_target_surely_or_never(lm: LanguageModel, examples: list[Example], adapter: Vector) -> None:
    greedy = SamplingAttack(1, 3, 0.0, 40)
    surely = likely(lm, adapter, examples[0], num_tokens=4)
    *most, last = surely.response_ids
    never = replace(surely, response_ids=(*most, last + 1))
    for example, expected in ((surely, 1.0), (never, 0.0)):
        assert p_z(lm, adapter, example, greedy) == expected
        assert share_written(lm, adapter, example, greedy, num_draws=5) == 5 * expected


# --- queries ---


def test_queries_are_the_fewest_of_which_one_succeeds_so_surely() -> None:
    for chance in (0.9, 0.5, 0.3, 0.01, 1e-4):
        for probability in (0.5, 0.99):
            exact = float(queries_needed(math.log(chance), probability=probability))
            for n in (math.ceil(exact - 1e-9), math.ceil(exact - 1e-9) - 1):
                assert (1 - (1 - chance) ** n >= probability - 1e-12) == (n >= exact - 1e-9)


def test_queries_are_exact_for_chances_that_rounding_would_swallow() -> None:
    getcontext().prec = 400
    for log_chance in (-1e-18, -1e-9, -0.5, -20.0, -50.0, -300.0, -600.0):
        chance = Decimal(log_chance).exp()
        expected = (Decimal(1) - Decimal("0.5")).ln() / (Decimal(1) - chance).ln()
        assert float(queries_needed(log_chance, probability=0.5)) == pytest.approx(float(expected), rel=1e-12)
    naive = math.log(0.5) / math.log(1 - math.exp(-30.0))
    assert abs(naive / float(queries_needed(-30.0, probability=0.5)) - 1) > 1e-4, "what rounding does to the plain formula"


def test_what_is_never_written_needs_infinitely_many_and_what_is_always_written_one() -> None:
    assert queries_needed([-math.inf, 0.0], probability=0.5).tolist() == [math.inf, 0.0]
    with pytest.raises(ValueError, match=r"probability=1\.0 must be between 0 and 1"):
        queries_needed(0.0, probability=1.0)


def test_shares_are_of_those_extractable_within_so_many_queries() -> None:
    """A record of chance c needs about 0.69 / c queries."""
    members = np.log([1.0, 0.5, 0.02, 1e-5])
    heldout = [math.log(1e-7), -math.inf, -math.inf]
    report = extraction_report(members, heldout, attack=SamplingAttack(0, 50, 1.0, 40))
    assert report["queries"] == list(QUERIES) == [1, 10, 100, 1000, 10**4, 10**5, 10**6]
    assert report["members"] == [0.5, 0.5, 0.75, 0.75, 0.75, 1.0, 1.0]
    assert report["heldout"] == [0.0] * 7
    assert report["median_bits_members"] == pytest.approx((1 + math.log2(50)) / 2)
    assert report["median_bits_heldout"] is None
    assert (report["num_members"], report["num_heldout"], report["probability"]) == (4, 3, 0.5)


# --- members against held-out records ---


def gains(nats: list[float], num_tokens: list[int], labels: str) -> Gains:
    return Gains(np.array(nats, dtype=np.float64), np.array(num_tokens, dtype=np.float64), list(labels))


def test_the_figures_by_hand() -> None:
    """Held-out gains a token: 0.3 for a, and 0.5 for b; c has no member, and is passed over."""
    members = gains([10.0, 4.0, 9.0], [20, 10, 10], "aab")
    heldout = gains([1.0, 2.0, 3.0, 7.0, 100.0], [4, 6, 10, 10, 1], "aabbc")
    report = memory_report(members, heldout, seed=0)
    excess = [10 - 20 * 0.3, 4 - 10 * 0.3, 9 - 10 * 0.5]
    assert report["bits_per_record"] == pytest.approx(np.mean(excess) / math.log(2))
    assert report["nats_per_token"] == pytest.approx(sum(excess) / 40)
    inside = [4 / 20, 1 / 10, 4 / 10]
    outside = [1 / 4 - 2 / 6, 2 / 6 - 1 / 4, 3 / 10 - 7 / 10, 7 / 10 - 3 / 10]
    auc, tpr = roc_auc(inside, outside), tpr_at_fpr(inside, outside, fpr=0.01)
    assert (report["auc"], report["auc_interval"]) == (pytest.approx(auc.value), pytest.approx([auc.lower, auc.upper]))
    assert (report["tpr_at_1pct"], report["tpr_at_1pct_interval"]) == (tpr.value, pytest.approx([tpr.lower, tpr.upper]))
    assert (report["num_members"], report["num_heldout"], report["strata"]) == (3, 4, "label")


@pytest.mark.parametrize(
    ("members", "heldout", "strata"),
    [
        ("aab", "aabb", "label"),
        ("aa", "aabbb", "label"),
        ("aab", "aab", "all"),
        ("aab", "aaaa", "all"),
        ("aaa", "aaa", "all"),
    ],
)
def test_records_are_held_against_their_label_where_each_has_two(members: str, heldout: str, strata: str) -> None:
    sides = [gains([float(i) for i in range(len(labels))], [3] * len(labels), labels) for labels in (members, heldout)]
    report = memory_report(*sides, seed=0)
    assert report["strata"] == strata
    assert report["num_heldout"] == (2 if heldout == "aabbb" else len(heldout))


def test_an_adapter_that_changes_nothing_remembers_nothing() -> None:
    report = memory_report(gains([0.0] * 3, [5, 6, 7], "aab"), gains([0.0] * 4, [5, 6, 7, 8], "aabb"), seed=0)
    figures = [report[key] for key in ("bits_per_record", "nats_per_token", "auc", "tpr_at_1pct")]
    assert figures == [0.0, 0.0, 0.5, 0.0]
    assert report["bits_per_record_interval"] == [0.0, 0.0]


def test_of_a_single_member_there_is_no_auc() -> None:
    report = memory_report(gains([4.0], [4], "a"), gains([1.0, 1.0], [4, 4], "aa"), seed=0)
    assert (report["bits_per_record"], report["auc"], report["auc_interval"]) == (pytest.approx(3 / math.log(2)), None, None)


def test_the_intervals_are_a_function_of_the_figures_and_the_seed() -> None:
    sides = drawn_sides(np.random.default_rng(0), excess=0.1)
    first, again, other = (memory_report(*sides, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["bits_per_record_interval"] != other["bits_per_record_interval"]


LEVELS = {"a": 0.1, "b": 0.6, "c": 0.3, "d": 0.9}


def drawn_sides(rng: np.random.Generator, *, excess: float, num_heldout: int = 4) -> tuple[Gains, Gains]:
    """Members and held-out records of four labels that are learned unlike well; members gain `excess` nats a token more."""

    def side(num: int, more: float) -> Gains:
        labels = [label for label in LEVELS for _ in range(num)]
        num_tokens = rng.integers(20, 60, size=len(labels)).astype(np.float64)
        rate = np.array([LEVELS[label] for label in labels]) + more + 0.2 * rng.standard_normal(len(labels))
        return Gains(rate * num_tokens, num_tokens, labels)

    return side(12, excess), side(num_heldout, 0.0)


def test_the_interval_covers_the_true_memory_and_no_other() -> None:
    """With four held-out records a label, of which a bootstrap that draws all four would give a variance too small by a quarter."""
    rng, truth, num_times = np.random.default_rng(7), 0.3, 300
    covered: dict[float, int] = dict.fromkeys((truth, 0.0, 2 * truth), 0)
    for _ in range(num_times):
        low, high = memory_report(*drawn_sides(rng, excess=truth), seed=0)["nats_per_token_interval"]
        for value in covered:
            covered[value] += low <= value <= high
    assert binomtest(covered[truth], num_times, 0.94).pvalue > 1e-3, covered
    assert covered[0.0] + covered[2 * truth] < 0.05 * num_times, covered


def test_where_nothing_is_remembered_no_side_is_favoured() -> None:
    """Above the best of eight held-out records lies a ninth of members like them; where those set their own level, it would be more."""
    rng, num_times = np.random.default_rng(3), 200
    aucs, found, naive = [], [], []
    for _ in range(num_times):
        members, heldout = drawn_sides(rng, excess=0.0, num_heldout=2)
        report = memory_report(members, heldout, seed=0)
        levels = {label: heldout.taken(np.array([i for i, own in enumerate(heldout.labels) if own == label])).level for label in LEVELS}
        scores = [side.nats / side.num_tokens - np.array([levels[label] for label in side.labels]) for side in (members, heldout)]
        aucs.append(report["auc"])
        found.append(report["tpr_at_1pct"])
        naive.append(tpr_at_fpr(*scores, fpr=0.01).value)
    assert abs(np.mean(aucs) - 0.5) < 4 * np.std(aucs) / math.sqrt(num_times)
    assert np.mean(found) < 1 / 9 < 0.2 < np.mean(naive)


def test_the_interval_of_a_level_covers_it_nineteen_times_in_twenty() -> None:
    """Records of different lengths with a true loss of 2 a token: a normal interval of half its width would cover it two times in three."""
    rng = np.random.default_rng(5)
    covered, halved = 0, 0
    for _ in range(400):
        counts = rng.integers(20, 60, size=40).astype(float)
        totals = counts * rng.normal(2.0, 0.4, size=40)
        low, high = level_interval(totals, counts)
        middle, reach = (low + high) / 2, (high - low) / 4
        covered += low <= 2.0 <= high
        halved += abs(middle - 2.0) <= reach
    assert 0.92 <= covered / 400 <= 0.975
    assert halved / 400 < 0.8
