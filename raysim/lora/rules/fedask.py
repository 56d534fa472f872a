"""FedASK: the mean product from two sketches, without any client's factors; Chen et al. (2025), arXiv 2507.09990, algorithm 1.

Trip one: each client sends Y_k = B_k (A_k Omega) for a shared Gaussian Omega of `lora.oversampling` columns more than the rank, and the server
takes Q, an orthonormal basis of the mean Y. Trip two: each sends A_k^T (B_k^T Q). The mean of these, P, gives Q P^T, which is the mean product
if that has no higher rank than the sketch has columns (Halko et al. 2011, arXiv 0909.4061), and it is cut to the rank of the adapter. A client
keeps its trained factors from the first trip to the second.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from raysim.lora.factors import Floats, Layer, layers, leading, on_one_thread, pairs, refactored
from raysim.lora.layout import Upload, Vector
from raysim.lora.rule import Kept, Setting, Trips
from raysim.lora.rules import average
from raysim.rng import numpy_rng, seed_for

TRAINED = "trained"
"""The array in which a client keeps its factors between the trips."""
NEGLIGIBLE = 1e-6
"""Of the largest singular value: what is smaller is rounding in float32, and its direction starts afresh."""


def width(layer: Layer, setting: Setting) -> int:
    """Columns of a layer's sketch."""
    return min(layer.rank + setting.oversampling, layer.num_outputs, layer.num_inputs)


def sketch_size(setting: Setting) -> int:
    """Numbers in the sketch of all layers."""
    return sum(layer.num_outputs * width(layer, setting) for layer in layers(setting.layout))


@on_one_thread
def sketch(trained: Vector, setting: Setting, round_index: int) -> dict[str, Vector]:
    """B (A Omega) of each layer."""
    found = []
    for layer, (b, a) in zip(layers(setting.layout), pairs(trained, setting.layout), strict=True):
        rng = numpy_rng(setting.seed, "sketch", round_index, layer.module)
        found.append(b @ (a @ rng.standard_normal((layer.num_inputs, width(layer, setting)))))
    return {"adapter": _flat(found)}


def kept(trained: Vector, before: Vector, rank: int, setting: Setting) -> Kept:
    """Its factors."""
    return {TRAINED: trained}


@on_one_thread
def relay(mean: Upload, setting: Setting) -> dict[str, Vector]:
    """Q of each layer."""
    return {"basis": _flat([np.linalg.qr(y)[0] for y in _columns(mean["adapter"], setting, of="num_outputs")])}


@on_one_thread
def answer(kept: Kept, sent: Upload, setting: Setting) -> dict[str, Vector]:
    """A^T (B^T Q) of each layer."""
    bases = _columns(sent["basis"], setting, of="num_outputs")
    return {"adapter": _flat([a.T @ (b.T @ q) for (b, a), q in zip(pairs(kept[TRAINED], setting.layout), bases, strict=True)])}


@on_one_thread
def combine(
    tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, round_index: int
) -> dict[str, Vector]:
    """B = U S^1/2 and A = S^1/2 V^T of each layer's Q P^T, cut to rank r."""
    found = []
    means = _columns(average.merge(uploads, weights), setting, of="num_inputs")
    for q, p in zip(_columns(tensors["basis"], setting, of="num_outputs"), means, strict=True):
        u, values, vt, _ = leading(q, p.T, rank=setting.rank)
        roots = np.sqrt(np.where(values > NEGLIGIBLE * values.max(initial=0.0), values, 0.0))
        found.append((u * roots, roots[:, None] * vt))
    return {"adapter": refactored(found, setting.layout, seed=seed_for(setting.seed, "fresh adapter", round_index + 1))}


def _flat(matrices: Sequence[Floats]) -> Vector:
    return np.concatenate([matrix.reshape(-1) for matrix in matrices]).astype(np.float32)


def _columns(flat: Vector, setting: Setting, *, of: str) -> Iterator[Floats]:
    """The matrices of a flat sketch, as many rows each as its layer has inputs or outputs."""
    start = 0
    for layer in layers(setting.layout):
        rows, columns = {"num_inputs": layer.num_inputs, "num_outputs": layer.num_outputs}[of], width(layer, setting)
        yield flat[start : start + rows * columns].astype(np.float64).reshape(rows, columns)
        start += rows * columns


RULE = replace(average.RULE, kept=kept, sketch=sketch, sketch_size=sketch_size, trips=Trips(relay, answer), combine=combine)
