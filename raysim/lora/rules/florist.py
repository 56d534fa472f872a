"""FLoRIST: the singular values of the stacked factors up to a share of their energy; Ramesh and Dass (2025), arXiv 2506.09199.

As FlexLoRA, but that each layer keeps the fewest directions that hold `lora.energy` of the squared singular values, and only those are sent. They go
on in an adapter of the server's rank, which bounds them; the other directions start afresh, from the seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from raysim.lora.factors import Floats, layers, leading, on_one_thread, pairs, refactored
from raysim.lora.layout import Layout, Upload, Vector
from raysim.lora.rule import Setting
from raysim.lora.rules import average, flexlora, flora
from raysim.rng import seed_for


def start(layout: Layout, seed: int) -> dict[str, Vector]:
    """A fresh adapter, of which no direction has been sent."""
    return average.start(layout, seed) | {"ranks": np.zeros(len(layers(layout)), dtype=np.float32)}


@on_one_thread
def combine(
    tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, round_index: int
) -> dict[str, Vector]:
    """U S / (alpha / r) and V^T of each layer's mean product, to the rank that its energy asks for; and those ranks."""
    found, ranks = [], []
    for left, right in flora.stacks(uploads, weights, setting):
        u, values, vt, energy = leading(left, right, rank=setting.rank)
        rank = rank_of(values, energy=energy, share=setting.energy)
        found.append((u[:, :rank] * values[:rank] / setting.scale, vt[:rank]))
        ranks.append(rank)
    adapter = refactored(found, setting.layout, seed=seed_for(setting.seed, "fresh adapter", round_index + 1))
    return {"adapter": adapter, "ranks": np.array(ranks, dtype=np.float32)}


def rank_of(values: Floats, *, energy: float, share: float) -> int:
    """The fewest of the singular values, in descending order, whose squares sum to a share of all energy; 0 where there is none."""
    if energy == 0.0:
        return 0
    held = np.cumsum(np.square(values)) / energy
    return min(len(values), int(np.searchsorted(held, share * (1.0 - 1e-12))) + 1)


def sent(tensors: Mapping[str, Vector], rank: int, setting: Setting) -> dict[str, Vector]:
    """The directions that were kept, up to the client's rank, and how many there are."""
    ranks = np.minimum(tensors["ranks"], rank).astype(int)
    kept = [(b[:, :k], a[:k]) for k, (b, a) in zip(ranks, pairs(tensors["adapter"], setting.layout), strict=True)]
    flat = [matrix.reshape(-1) for pair in kept for matrix in pair]
    return {"adapter": np.concatenate(flat).astype(np.float32), "ranks": tensors["ranks"]}


RULE = replace(flexlora.RULE, start=start, combine=combine, sent=sent)
