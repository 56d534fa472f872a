"""Fed-SB: only an r x r factor R between two fixed bases is trained and averaged; Singhal et al. (2025), arXiv 2502.15436.

The update is (alpha / r) B R A, linear in R, so that the mean is exact and noise enters it once. The paper takes the bases from a gradient of all
clients' data, which would have to be paid for; ours are drawn from the seed, with orthonormal columns of B and rows of A, and R starts at zero.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from raysim.lora.factors import entries, layers
from raysim.lora.layout import Layout, Vector
from raysim.lora.rule import Setting
from raysim.lora.rules import average
from raysim.rng import numpy_rng


def start(layout: Layout, seed: int) -> dict[str, Vector]:
    """Orthonormal bases, and an R of zero."""
    vector = np.zeros(layout.num_parameters, dtype=np.float32)
    for layer in layers(layout):
        for name, span, size in (("A", layer.a, layer.num_inputs), ("B", layer.b, layer.num_outputs)):
            drawn = numpy_rng(seed, "basis", layer.module, name).standard_normal((size, layer.rank))
            basis = np.linalg.qr(drawn)[0]
            whole = np.zeros((size, layer.rank))
            whole[:, : basis.shape[1]] = basis
            vector[slice(*span)] = (whole.T if name == "A" else whole).reshape(-1)
    return {"adapter": vector}


def trainable(layout: Layout, turn: int | None) -> frozenset[str]:
    """R."""
    return average.factor(layout, "R")


def sent(tensors: Mapping[str, Vector], rank: int, setting: Setting) -> dict[str, Vector]:
    """R."""
    return {"adapter": tensors["adapter"][entries(setting.layout, average.factor(setting.layout, "R"), rank)]}


RULE = replace(average.RULE, start=start, trainable=trainable, sent=sent, between=True)
