"""Averaging A and B separately, as FedIT does; Zhang et al. (2024), arXiv 2305.05644.

The product of the mean factors is not the mean of the products B A: what that loses, other rules win back.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from raysim.lora.layout import Layout, Upload, Vector, initial_adapter
from raysim.lora.rule import LoraRule, Setting


def start(layout: Layout, seed: int) -> dict[str, Vector]:
    """A fresh adapter."""
    return {"adapter": initial_adapter(layout, seed=seed)}


def trainable(layout: Layout, turn: int | None) -> frozenset[str]:
    """Both factors."""
    return frozenset(layout.names)


def factor(layout: Layout, name: str) -> frozenset[str]:
    """The names of all A, all B or all R."""
    return frozenset(one for one in layout.names if f".lora_{name}." in one)


def upload(trained: Vector, given: Vector) -> dict[str, Vector]:
    """What training changed."""
    return {"adapter": trained - given}


def merge(uploads: Sequence[Upload], weights: Sequence[float]) -> Vector:
    """The weighted mean of the updates, float32 of shape (P,); of one it is that one."""
    if len(uploads) == 1:
        return uploads[0]["adapter"]
    total = sum(weight * one["adapter"].astype(np.float64) for one, weight in zip(uploads, weights, strict=True))
    return np.asarray(total / sum(weights), dtype=np.float32)


def release(tensors: Mapping[str, Vector]) -> dict[str, Vector]:
    """The adapter as the server keeps it."""
    return {"adapter": tensors["adapter"]}


def sensitivity(clip_norm: float) -> float:
    """One client adds or takes away one update of at most that norm: `clipping.clip_and_sum` sees to it, for all entries that travel together."""
    return clip_norm


def sent(tensors: Mapping[str, Vector], rank: int, setting: Setting) -> dict[str, Vector]:
    """Both factors."""
    return {"adapter": tensors["adapter"]}


RULE = LoraRule(
    form="sum",
    start=start,
    trainable=trainable,
    upload=upload,
    merge=merge,
    release=release,
    sensitivity=sensitivity,
    sent=sent,
)
