"""FLoRA: every client's factors stacked, their product added to the base model; Wang et al. (2024), arXiv 2409.05976.

The stack's product is the weighted mean of the products (alpha / r_k) B_k A_k, whatever the ranks r_k, so that nothing is lost. Each round starts
from a fresh adapter, drawn from the seed, on a base that the rounds before have moved. That is kept beside the base as a full-weight `delta`,
and so travels: a client that was away lacks all of it. Left out: sending the stacks alone to clients that were always there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from raysim.lora.factors import Pair, delta_size, deltas, entries, on_one_thread, pairs, resized, spread, stacked
from raysim.lora.layout import Layout, Upload, Vector, initial_adapter
from raysim.lora.rule import Kept, Setting
from raysim.lora.rules import average
from raysim.rng import seed_for


def start(layout: Layout, seed: int) -> dict[str, Vector]:
    """A fresh adapter on the base as it is."""
    return average.start(layout, seed) | {"delta": np.zeros(delta_size(layout), dtype=np.float32)}


def upload(trained: Vector, given: Vector) -> dict[str, Vector]:
    """The factors themselves."""
    return {"adapter": trained}


def given(tensors: Mapping[str, Vector], kept: Kept, rank: int, setting: Setting) -> Vector:
    """The first rows of A and columns of B, up to the client's rank, scaled so that their product counts for as much."""
    if rank == setting.rank:
        return tensors["adapter"]
    return resized(tensors["adapter"], setting.layout, rank=rank, factor=rank / setting.rank)


def factors_of(upload: Upload, setting: Setting) -> tuple[list[Pair], int]:
    """Each layer's B and A in a client's upload, and its rank."""
    rank = int(upload["rank"][0])
    mask = entries(setting.layout, frozenset(setting.layout.names), rank)
    return list(pairs(spread(upload["adapter"], mask), setting.layout, rank=rank)), rank


def stacks(uploads: Sequence[Upload], weights: Sequence[float], setting: Setting) -> list[Pair]:
    """Each layer's stacks, whose product is the weighted mean of (alpha / r_k) B_k A_k."""
    found = [factors_of(one, setting) for one in uploads]
    shares = [weight / sum(weights) * setting.alpha / rank for weight, (_, rank) in zip(weights, found, strict=True)]
    return stacked([factors for factors, _ in found], shares)


@on_one_thread
def combine(
    tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, round_index: int
) -> dict[str, Vector]:
    """The stacks' product added to the delta, and a fresh adapter."""
    delta = tensors["delta"].copy()
    for base, (left, right) in zip(deltas(delta, setting.layout), stacks(uploads, weights, setting), strict=True):
        base += left @ right
    fresh = initial_adapter(setting.layout, seed=seed_for(setting.seed, "fresh adapter", round_index + 1))
    return {"adapter": fresh, "delta": delta}


def release(tensors: Mapping[str, Vector]) -> dict[str, Vector]:
    """The adapter and the delta of the base that it stands on."""
    return {"adapter": tensors["adapter"], "delta": tensors["delta"]}


def sent(tensors: Mapping[str, Vector], rank: int, setting: Setting) -> dict[str, Vector]:
    """The delta."""
    return {"delta": tensors["delta"]}


RULE = replace(average.RULE, form="stack", start=start, upload=upload, given=given, combine=combine, release=release, sent=sent)
