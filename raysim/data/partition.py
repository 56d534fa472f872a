"""Partition of training records into client shards: Dirichlet over labels, IID, natural or by quantity; and its manifest.

Left out: Dirichlet over each label's clients (shares of every label drawn at once), whose shard sizes and label mixes
cannot be set apart; here `dirichlet` skews labels at equal sizes and `quantity` skews sizes at equal labels.
"""

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np

from raysim.data.records import Record
from raysim.rng import numpy_rng, seed_for

NUM_REDRAWS = 100
"""Draws of shard sizes before examples are moved to the shards that are too small."""


def partition_records(labels: list[str], *, scheme: str, num_clients: int, alpha: float, min_examples: int, seed: int) -> list[list[int]]:
    """The indices of each client's examples, sorted; client c's shard is at position c.

    `dirichlet`: client c draws its label mix q_c ~ Dir(alpha p), with p the global mix, and its examples from q_c without
    replacement; sizes differ by one at most (Hsu et al. 2019, arXiv:1909.06335). `iid`: a shuffled deal. `natural`: one client
    per label, in sorted order. `quantity`: sizes ~ Dir(alpha), labels at random.
    *Guarantees*: every index is in exactly one shard; every shard has `min_examples`; equal arguments give equal shards.
    Errors: ValueError where `num_clients` or `min_examples` cannot be met.
    """
    if num_clients * min_examples > len(labels):
        raise ValueError(
            f"partition.min_examples={min_examples} for partition.num_clients={num_clients} needs {num_clients * min_examples} records,"
            f" of which there are {len(labels)}; raise data.num_train or lower either"
        )
    rng = numpy_rng(seed, "partition")
    if scheme == "natural":
        shards = _natural(labels, num_clients=num_clients, min_examples=min_examples)
    elif scheme == "dirichlet":
        shards = _dirichlet(labels, num_clients=num_clients, alpha=alpha, rng=rng)
    elif scheme == "iid":
        shards = _deal(rng.permutation(len(labels)), sizes=_even_sizes(len(labels), num_clients))
    elif scheme == "quantity":
        sizes = _dirichlet_sizes(len(labels), num_clients=num_clients, alpha=alpha, min_examples=min_examples, rng=rng)
        shards = _deal(rng.permutation(len(labels)), sizes=sizes)
    else:
        raise ValueError(f"partition.scheme={scheme!r} is none of dirichlet, iid, natural, quantity")
    assert sorted(i for shard in shards for i in shard) == list(range(len(labels))), "an index is missing or twice"
    return [sorted(shard) for shard in shards]


def _dirichlet(labels: list[str], *, num_clients: int, alpha: float, rng: np.random.Generator) -> list[list[int]]:
    """Clients take turns, so that none is left with what the others did not want; a used-up label leaves every client's mix."""
    names = sorted(set(labels))
    pools = [list(rng.permutation([i for i, label in enumerate(labels) if label == name])) for name in names]
    global_mix = np.array([len(pool) for pool in pools]) / max(len(labels), 1)
    concentration = np.maximum(alpha * global_mix, np.finfo(float).tiny)
    mixes = rng.dirichlet(concentration, size=num_clients)
    shards: list[list[int]] = [[] for _ in range(num_clients)]
    for turn in range(len(labels)):
        client_id = turn % num_clients
        left = np.array([len(pool) for pool in pools])
        weights = mixes[client_id] * (left > 0)
        if not weights.sum() > 0:
            weights = left.astype(float)
        label_index = rng.choice(len(names), p=weights / weights.sum())
        shards[client_id].append(int(pools[label_index].pop()))
    return shards


def _natural(labels: list[str], *, num_clients: int, min_examples: int) -> list[list[int]]:
    counts = Counter(labels)
    if len(counts) != num_clients:
        raise ValueError(
            f"partition.num_clients={num_clients} does not fit partition.scheme=natural: the training records have {len(counts)}"
            f" distinct labels; set partition.num_clients={len(counts)}"
        )
    rarest = min(counts, key=lambda name: (counts[name], name))
    if counts[rarest] < min_examples:
        raise ValueError(
            f"partition.min_examples={min_examples} is more than label {rarest!r} has ({counts[rarest]}), and a natural client"
            " cannot take another's records; lower it or raise data.num_train"
        )
    return [[i for i, label in enumerate(labels) if label == name] for name in sorted(counts)]


def _even_sizes(total: int, num_clients: int) -> list[int]:
    return [total // num_clients + (client_id < total % num_clients) for client_id in range(num_clients)]


def _dirichlet_sizes(total: int, *, num_clients: int, alpha: float, min_examples: int, rng: np.random.Generator) -> list[int]:
    """Sizes ~ Dir(alpha), redrawn until every one has `min_examples`; after `NUM_REDRAWS` the largest give to the smallest.

    Redrawing samples the Dirichlet conditioned on the minimum, which is what the minimum means; giving only serves
    where that event is too rare to draw.
    """
    sizes = np.zeros(num_clients, dtype=int)
    for _ in range(NUM_REDRAWS):
        shares = rng.dirichlet(np.full(num_clients, alpha))
        bounds = np.rint(np.cumsum(shares) / shares.sum() * total).astype(int)
        sizes = np.diff(bounds, prepend=0)
        if sizes.min() >= min_examples:
            break
    while sizes.min() < min_examples:
        sizes[sizes.argmax()] -= 1
        sizes[sizes.argmin()] += 1
    return [int(size) for size in sizes]


def _deal(order: np.ndarray, *, sizes: list[int]) -> list[list[int]]:
    ends = np.cumsum(sizes)
    return [[int(i) for i in order[end - size : end]] for size, end in zip(sizes, ends, strict=True)]


def cluster_labels(embeddings: np.ndarray, *, num_clusters: int, seed: int) -> list[str]:
    """The k-means cluster of each row, as a label (`cluster-0`, ...), for sets without labels.

    Errors: ValueError where there are fewer rows than clusters.
    """
    from sklearn.cluster import KMeans  # with pandas and pyarrow, 100 MB that an actor never needs

    if num_clusters > len(embeddings):
        raise ValueError(f"partition.num_clusters={num_clusters} is more than the {len(embeddings)} training records; lower it")
    model = KMeans(n_clusters=num_clusters, n_init=10, random_state=seed_for(seed, "clusters") % 2**32)
    return [f"cluster-{cluster}" for cluster in model.fit_predict(np.asarray(embeddings, dtype=np.float64))]


def partition_manifest(shards: list[list[int]], *, records: list[Record], num_tokens: list[int]) -> dict[str, Any]:
    """The contents of `partition.json`: a sha256 of who holds what, and each client's counts.

    `num_tokens` has one entry per record. The hash covers the ids and contents of every client's records, in order.
    """
    assert len(num_tokens) == len(records), f"{len(num_tokens)} token counts for {len(records)} records"
    digest = hashlib.sha256()
    for client_id, shard in enumerate(shards):
        for index in shard:
            record = records[index]
            row = [client_id, record.record_id, record.instruction, record.response, record.label, list(record.details), record.group]
            row += [record.history] if record.history else []
            digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    clients = [
        {
            "client_id": client_id,
            "num_examples": len(shard),
            "num_tokens": sum(num_tokens[i] for i in shard),
            "label_counts": dict(sorted(Counter(records[i].label for i in shard).items())),
        }
        for client_id, shard in enumerate(shards)
    ]
    return {"sha256": digest.hexdigest(), "num_clients": len(shards), "clients": clients}
