"""HetLoRA: factors of different ranks, padded with zeros and weighted by the norm of their product; Cho et al. (2024), arXiv 2401.06432.

Each client has the first r_k rows of A and columns of B, all scaled by the server's alpha / r, so that padding changes no product. It trains under
a penalty on its last directions (see `TrainSettings.tail_weight`), and lowers its rank if these have become smaller (section 3.2). The server's
weights are ||B_k A_k|| by layer (section 3.3); where all products are zero, the clients' own weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from raysim.lora.factors import Floats, Pair, on_one_thread, pairs, written
from raysim.lora.layout import Upload, Vector
from raysim.lora.penalty import tail_start
from raysim.lora.rule import Kept, Setting
from raysim.lora.rules import flexlora, flora

RANK = "rank"
"""The array in which a client keeps the rank that it has come down to."""


def scale(setting: Setting, rank: int) -> float:
    """The server's, whatever the rank."""
    return setting.scale


def given(tensors: Mapping[str, Vector], kept: Kept, rank: int, setting: Setting) -> Vector:
    """The first rows of A and columns of B."""
    return written(pairs(tensors["adapter"], setting.layout, rank=rank), setting.layout)


def kept(trained: Vector, before: Vector, rank: int, setting: Setting) -> Kept:
    """Its rank in the rounds to come: less if the last directions' products have become smaller."""
    cut = tail_start(rank, pruned_share=setting.pruned_share)
    shrank = 0 < cut < rank and tail_norm(trained, cut, setting) < tail_norm(before, cut, setting)
    return {RANK: np.array([cut if shrank else rank])}


def tail_norm(vector: Vector, cut: int, setting: Setting) -> float:
    """The sum over layers of ||B[:, cut:]|| ||A[cut:]||."""
    return float(sum(np.linalg.norm(b[:, cut:]) * np.linalg.norm(a[cut:]) for b, a in pairs(vector, setting.layout)))


def product_norm(b: Floats, a: Floats) -> float:
    """||B A||, without the product."""
    return float(np.sqrt(max(0.0, np.sum((b.T @ b) * (a @ a.T)))))


@on_one_thread
def combine(
    tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, round_index: int
) -> dict[str, Vector]:
    """The means of the padded factors."""
    found = [flora.factors_of(one, setting)[0] for one in uploads]
    return {"adapter": written((_mean(of_layer, weights, setting.rank) for of_layer in zip(*found, strict=True)), setting.layout)}


def _mean(of_layer: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    norms = np.array([product_norm(b, a) for b, a in of_layer])
    shares = norms / norms.sum() if norms.any() else np.array(weights) / sum(weights)
    mean_b, mean_a = np.zeros((len(of_layer[0][0]), rank)), np.zeros((rank, of_layer[0][1].shape[1]))
    for share, (b, a) in zip(shares, of_layer, strict=True):
        mean_b[:, : b.shape[1]] += share * b
        mean_a[: len(a)] += share * a
    return mean_b, mean_a


RULE = replace(flexlora.RULE, given=given, kept=kept, combine=combine, scale=scale)
