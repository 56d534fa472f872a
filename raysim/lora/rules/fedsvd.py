"""FedSVD: B is trained and averaged, then singular values make new factors of B A; Lee et al. (2025), arXiv 2505.12805, algorithm 1.

A has orthonormal rows throughout. The new factors have the same product, so that nothing is lost, and they are made of the mean alone: under noise
that is post-processing, which costs no privacy. Clients are sent both factors, since one that was away lacks the A of the round.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from raysim.lora.factors import Floats, Pair, on_one_thread, pairs, written
from raysim.lora.layout import Layout, Vector
from raysim.lora.rule import Setting
from raysim.lora.rules import average, ffa


def start(layout: Layout, seed: int) -> dict[str, Vector]:
    """A fresh adapter whose A has orthonormal rows."""
    return {"adapter": orthonormal(average.start(layout, seed)["adapter"], layout)}


def settle(tensors: Mapping[str, Vector], setting: Setting) -> dict[str, Vector]:
    """B = U S and A = V^T."""
    return {**tensors, "adapter": orthonormal(tensors["adapter"], setting.layout)}


@on_one_thread
def orthonormal(adapter: Vector, layout: Layout) -> Vector:
    """The adapter with the same products, its A with orthonormal rows along the singular vectors."""
    return written((_refactor(b, a) for b, a in pairs(adapter, layout)), layout)


def _refactor(b: Floats, a: Floats) -> Pair:
    q, triangle = np.linalg.qr(a.T)
    core = b @ triangle.T
    u, values, vt = np.linalg.svd(core, full_matrices=core.shape[0] < core.shape[1])
    left = np.zeros((len(b), len(vt)))
    left[:, : len(values)] = u[:, : len(values)] * values
    return left, vt @ q.T


RULE = replace(average.RULE, start=start, trainable=ffa.trainable, settle=settle)
