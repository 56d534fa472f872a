"""Partitions: every index once, sizes as asked for, seeds, the label skew that alpha means, and the manifest."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysim.data.partition import cluster_labels, partition_manifest, partition_records
from raysim.data.records import Record

label_lists = st.lists(st.sampled_from("abcde"), min_size=1, max_size=120)
seeds = st.integers(0, 2**62)
alphas = st.floats(1e-8, 1e8)


def partition(labels: list[str], **changes: object) -> list[list[int]]:
    arguments = {"scheme": "dirichlet", "num_clients": 3, "alpha": 1.0, "min_examples": 0, "seed": 0, **changes}
    return partition_records(labels, **arguments)  # type: ignore[arg-type]  # a dict of mixed values


@given(label_lists, st.sampled_from(["dirichlet", "iid", "quantity"]), st.integers(1, 12), alphas, seeds, st.data())
@settings(max_examples=200, deadline=None)
def test_every_index_once_and_every_minimum_met(
    labels: list[str], scheme: str, num_clients: int, alpha: float, seed: int, data: st.DataObject
) -> None:
    minimum = data.draw(st.integers(0, len(labels) // num_clients))
    shards = partition(labels, scheme=scheme, num_clients=num_clients, alpha=alpha, min_examples=minimum, seed=seed)
    assert len(shards) == num_clients
    assert sorted(i for shard in shards for i in shard) == list(range(len(labels)))
    assert all(shard == sorted(shard) and len(shard) >= minimum for shard in shards)
    if scheme != "quantity":
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert shards == partition(labels, scheme=scheme, num_clients=num_clients, alpha=alpha, min_examples=minimum, seed=seed)


@given(label_lists)
def test_natural_gives_each_label_to_one_client(labels: list[str]) -> None:
    shards = partition(labels, scheme="natural", num_clients=len(set(labels)))
    assert [{labels[i] for i in shard} for shard in shards] == [{label} for label in sorted(set(labels))]
    assert sorted(i for shard in shards for i in shard) == list(range(len(labels)))


@pytest.mark.parametrize("scheme", ["dirichlet", "iid", "quantity"])
def test_another_seed_gives_another_partition(scheme: str) -> None:
    labels = list("abcdefgh") * 10
    assert len({str(partition(labels, scheme=scheme, seed=seed)) for seed in range(10)}) == 10


def label_distance(alpha: float, *, scheme: str = "dirichlet") -> float:
    """Mean total variation distance of the clients' label mixes from the global one, over ten seeds."""
    labels = ["a"] * 300 + ["b"] * 200 + ["c"] * 100
    target = np.array([0.5, 1 / 3, 1 / 6])
    distances = []
    for seed in range(10):
        for shard in partition(labels, scheme=scheme, num_clients=5, alpha=alpha, seed=seed):
            counts = Counter(labels[i] for i in shard)
            distances.append(0.5 * np.abs(np.array([counts[name] for name in "abc"]) / len(shard) - target).sum())
    return float(np.mean(distances))


def test_alpha_sets_the_label_skew() -> None:
    distances = [label_distance(alpha) for alpha in (1e6, 100.0, 1.0, 0.01)]
    assert distances == sorted(distances), distances
    # A large alpha is a draw of 120 from the global mix, as iid is: about 0.04. A tiny one cannot give every client a label
    # of its own for long, because five clients of equal size share three labels.
    assert abs(distances[0] - label_distance(1.0, scheme="iid")) < 0.02
    assert distances[3] > 0.3


def test_dirichlet_moments_match_the_definition() -> None:
    """The share of label a in a client's first draws has mean p and the Beta-binomial variance of Dir(alpha p).

    What would come out of the concentration alpha for every label instead of alpha p is rejected.
    """
    alpha, shares, num_draws = 2.0, [], 8
    labels = ["a"] * 100 + ["b"] * 100
    for seed in range(600):
        # 25 clients with 8 records each: the labels run out for late turns only, and one client's shard hardly moves them.
        shard = partition(labels, num_clients=25, alpha=alpha, seed=seed)[0]
        shares.append(np.mean([labels[i] == "a" for i in shard]))

    def variance(concentration: float) -> float:
        return 0.25 / (concentration + 1) + 0.25 * concentration / (concentration + 1) / num_draws

    assert abs(np.mean(shares) - 0.5) < 4 * np.sqrt(variance(alpha) / len(shares))
    assert 0.85 * variance(alpha) < np.var(shares) < 1.15 * variance(alpha)
    assert not 0.85 * variance(2 * alpha) < np.var(shares) < 1.15 * variance(2 * alpha)


def test_quantity_sizes_follow_alpha_and_the_minimum() -> None:
    labels = ["a"] * 200
    spread = {
        alpha: np.std([len(shard) for seed in range(20) for shard in partition(labels, scheme="quantity", alpha=alpha, seed=seed)])
        for alpha in (0.2, 5.0, 1e6)
    }
    assert spread[0.2] > 2 * spread[5.0] > 4 * spread[1e6]
    # Far too rare to be drawn, so that examples are moved.
    shards = partition(["a"] * 40, scheme="quantity", num_clients=20, alpha=1e-3, min_examples=2)
    assert [len(shard) for shard in shards] == [2] * 20


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_clients": 4, "min_examples": 3}, ["partition.min_examples=3", "partition.num_clients=4", "needs 12", "there are 10"]),
        ({"scheme": "natural", "num_clients": 3}, ["partition.num_clients=3", "2", "set partition.num_clients=2"]),
        ({"scheme": "natural", "num_clients": 2, "min_examples": 4}, ["partition.min_examples=4", "'b' has (3)"]),
        ({"scheme": "random"}, ["partition.scheme='random'", "dirichlet, iid, natural, quantity"]),
    ],
)
def test_what_cannot_be_met_is_refused(changes: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        partition(["a"] * 7 + ["b"] * 3, **changes)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_clusters_find_the_groups_and_repeat() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 25)
    embeddings = (10 * np.eye(4, 6)[truth] + rng.normal(size=(100, 6))).astype(np.float32)
    labels = cluster_labels(embeddings, num_clusters=4, seed=3)
    assert len(set(zip(labels, truth.tolist(), strict=True))) == len(set(labels)) == 4
    assert labels == cluster_labels(embeddings, num_clusters=4, seed=3)
    with pytest.raises(ValueError, match=r"partition.num_clusters=5 is more than the 4"):
        cluster_labels(embeddings[:4], num_clusters=5, seed=0)


def test_manifest_counts_and_hashes_the_contents() -> None:
    records = [Record(i, f"ask {i}", f"answer {i}", label="ab"[i % 2]) for i in range(5)]
    manifest = partition_manifest([[0, 2, 3], [1, 4], []], records=records, num_tokens=[10, 20, 30, 40, 50])
    assert manifest["num_clients"] == 3
    assert manifest["clients"][0] == {"client_id": 0, "num_examples": 3, "num_tokens": 80, "label_counts": {"a": 2, "b": 1}}
    assert manifest["clients"][2] == {"client_id": 2, "num_examples": 0, "num_tokens": 0, "label_counts": {}}
    moved = partition_manifest([[0, 2], [1, 3, 4], []], records=records, num_tokens=[10, 20, 30, 40, 50])
    changed = [*records[:4], Record(4, "ask 4", "answer 4.", label="a")]
    edited = partition_manifest([[0, 2, 3], [1, 4], []], records=changed, num_tokens=[10, 20, 30, 40, 50])
    earlier = [*records[:4], dataclasses.replace(records[4], history=(("user", "Hello."), ("assistant", "Yes?")))]
    told = partition_manifest([[0, 2, 3], [1, 4], []], records=earlier, num_tokens=[10, 20, 30, 40, 50])
    assert len({manifest["sha256"], moved["sha256"], edited["sha256"], told["sha256"]}) == 4
    assert manifest == partition_manifest([[0, 2, 3], [1, 4], []], records=records, num_tokens=[10, 20, 30, 40, 50])
