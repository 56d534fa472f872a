"""The matrices in a flat adapter, their products, and singular values of a product that is never larger than it must be.

Everything is computed in float64 on one thread of BLAS, whose number changes the last bits of a product.
Shape legend: d = outputs of a layer, n = inputs, r = rank, m = columns of stacked factors, P = parameters of the adapter.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, svds
from threadpoolctl import threadpool_limits

from raysim.lora.layout import Layout, Vector, initial_adapter

Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]
"""B of shape (d, r) and A of shape (r, n)."""
DENSE = 8
"""Of a core less than this many times as wide as the singular values that are wanted, all are computed."""

P = ParamSpec("P")
T = TypeVar("T")
Number = TypeVar("Number", bound=np.floating)


def on_one_thread(function: Callable[P, T]) -> Callable[P, T]:
    """The function on one thread of BLAS, so that it gives the same bits in every process."""

    @wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> T:
        with threadpool_limits(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited


@dataclass(frozen=True)
class Layer:
    """Where the factors of one adapted layer lie in the flat vector."""

    module: str
    """The layer's name, such as `base_model.model.model.layers.0.self_attn.q_proj`."""
    a: tuple[int, int]
    b: tuple[int, int]
    rank: int
    num_inputs: int
    num_outputs: int
    r: tuple[int, int] | None = None
    """The r x r factor between the two, where there is one."""


@cache
def layers(layout: Layout) -> tuple[Layer, ...]:
    """The adapted layers of a layout, in its order."""
    spans = dict(zip(layout.names, layout.spans(), strict=True))
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    found = []
    for name in layout.names:
        if ".lora_A." in name:
            other, between = name.replace(".lora_A.", ".lora_B."), name.replace(".lora_A.", ".lora_R.")
            rank, num_inputs = shapes[name]
            module = name.partition(".lora_A.")[0]
            found.append(Layer(module, spans[name], spans[other], rank, num_inputs, shapes[other][0], spans.get(between)))
    return tuple(found)


def pairs(vector: Vector, layout: Layout, *, rank: int | None = None) -> Iterator[Pair]:
    """Each layer's B and A as float64 copies, an R between them taken into B, up to `rank` where that is less than the layout's."""
    for layer in layers(layout):
        a, b = (vector[slice(*span)].astype(np.float64) for span in (layer.a, layer.b))
        left, right = b.reshape(layer.num_outputs, layer.rank), a.reshape(layer.rank, layer.num_inputs)
        if layer.r is not None:
            left = left @ vector[slice(*layer.r)].astype(np.float64).reshape(layer.rank, layer.rank)
        yield left[:, :rank], right[:rank]


def written(factors: Iterable[Pair], layout: Layout) -> Vector:
    """The flat adapter of each layer's B and A, the inverse of `pairs`; what they lack in rank is zero."""
    vector = np.zeros(layout.num_parameters, dtype=np.float32)
    for layer, (b, a) in zip(layers(layout), factors, strict=True):
        assert layer.r is None, "an adapter with an R has no two factors of its own"
        vector[slice(*layer.a)].reshape(layer.rank, layer.num_inputs)[: len(a)] = a
        vector[slice(*layer.b)].reshape(layer.num_outputs, layer.rank)[:, : b.shape[1]] = b
    return vector


def products(vector: Vector, layout: Layout, *, scale: float, delta: Vector | None = None) -> list[Floats]:
    """Each layer's effective change of its weight, scale B A (scale B R A) and a delta of the base, of shape (d, n)."""
    found = [scale * (b @ a) for b, a in pairs(vector, layout)]
    if delta is not None:
        found = [one + base for one, base in zip(found, deltas(delta, layout), strict=True)]
    return found


def delta_size(layout: Layout) -> int:
    """Length of a delta of every adapted weight."""
    return sum(layer.num_outputs * layer.num_inputs for layer in layers(layout))


def deltas(vector: NDArray[np.floating], layout: Layout) -> Iterator[NDArray[np.floating]]:
    """Each layer's part of a delta, a view of shape (d, n): outputs by inputs, whichever way the base keeps its weight."""
    start = 0
    for layer in layers(layout):
        end = start + layer.num_outputs * layer.num_inputs
        yield vector[start:end].reshape(layer.num_outputs, layer.num_inputs)
        start = end


@cache
def entries(layout: Layout, names: frozenset[str], rank: int) -> NDArray[np.bool_] | None:
    """Which entries of the flat adapter the named tensors have up to `rank`, bool of shape (P,); None for all of them."""
    mask = np.zeros(layout.num_parameters, dtype=bool)
    for name, shape, (start, end) in zip(layout.names, layout.shapes, layout.spans(), strict=True):
        if name in names:
            tensor = mask[start:end].reshape(shape)
            tensor[(slice(rank),) if ".lora_A." in name else (slice(None), slice(rank))] = True
    mask.setflags(write=False)
    return None if mask.all() else mask


def gathered(vector: NDArray[Number], mask: NDArray[np.bool_] | None) -> NDArray[Number]:
    """The entries of a flat vector that `mask` has; all where it is None."""
    return vector if mask is None else vector[mask]


def spread(part: NDArray[Number], mask: NDArray[np.bool_] | None, *, over: NDArray[Number] | None = None) -> NDArray[Number]:
    """The flat vector with these entries, elsewhere zero or as in `over`: the inverse of `gathered`."""
    if mask is None:
        return part
    vector = np.zeros(len(mask), dtype=part.dtype) if over is None else over.copy()
    vector[mask] = part
    return vector


def stacked(all_pairs: Sequence[Sequence[Pair]], weights: Sequence[float]) -> list[Pair]:
    """Each layer's stacks, (d, m) and (m, n), whose product is the weighted sum of the pairs' products."""
    return [
        (
            np.concatenate([weight * b for weight, (b, _) in zip(weights, of_layer, strict=True)], axis=1),
            np.concatenate([a for _, a in of_layer]),
        )
        for of_layer in zip(*all_pairs, strict=True)
    ]


def refactored(found: Iterable[tuple[Floats, Floats]], layout: Layout, *, seed: int) -> Vector:
    """The flat adapter of each layer's B and A; a direction in which B is zero gets a fresh row of A, as a new adapter has it.

    Without that, a direction in which both are zero would never train again.
    """
    fresh = pairs(initial_adapter(layout, seed=seed), layout)
    return written((_filled(b, a, new) for (b, a), (_, new) in zip(found, fresh, strict=True)), layout)


def _filled(b: Floats, a: Floats, fresh: Floats) -> Pair:
    lives = b.any(axis=0)
    kept = int(lives.sum())
    whole_b = np.zeros((len(b), len(fresh)))
    whole_b[:, :kept] = b[:, lives]
    return whole_b, np.concatenate([a[lives], fresh[kept:]])


def resized(vector: Vector, layout: Layout, *, rank: int, factor: float) -> Vector:
    """The first `rank` columns of each B, times `factor`, and rows of each A; what lies beyond is zero."""
    return written(((factor * b, a) for b, a in pairs(vector, layout, rank=rank)), layout)


def leading(left: Floats, right: Floats, *, rank: int) -> tuple[Floats, Floats, Floats, float]:
    """U (d, k), the k = min(rank, d, n, m) largest singular values, V^T (k, n) of left @ right, and the sum of all squared singular values.

    A side with more than m rows goes through QR first, so that no matrix is larger than min(d, m) by min(n, m). By Eckart and Young
    (1936) no product of rank k is nearer.
    """
    m = left.shape[1]
    q_left, left = np.linalg.qr(left) if m < left.shape[0] else (None, left)
    q_right, flipped = np.linalg.qr(right.T) if m < right.shape[1] else (None, right.T)
    core = left @ flipped.T
    u, values, vt = truncated(core, rank)
    return (
        u if q_left is None else q_left @ u,
        values,
        vt if q_right is None else vt @ q_right.T,
        float(np.square(core).sum()),
    )


def truncated(core: Floats, rank: int) -> tuple[Floats, Floats, Floats]:
    """U, the largest singular values in descending order, and V^T of a matrix, up to `rank`."""
    if min(core.shape) >= DENSE * rank and core.any():
        try:
            u, values, vt = svds(core, rank, v0=np.ones(min(core.shape)))
        except ArpackError:  # which a core of low rank may be
            pass
        else:
            order = np.argsort(-values)
            return u[:, order], values[order], vt[order]
    u, values, vt = np.linalg.svd(core, full_matrices=False)
    return u[:, :rank], values[:rank], vt[:rank]
