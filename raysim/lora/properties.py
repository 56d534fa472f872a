"""What a rule for combining adapters does, found out by asking its functions: what trains, what travels, and how much of the mean is lost.

Left out: what it promises, which the configuration knows.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raysim.lora.factors import Floats, deltas, entries, on_one_thread, pairs, products, spread
from raysim.lora.layout import Layout, Vector
from raysim.lora.rule import LoraRule, Setting
from raysim.rng import numpy_rng

SIZES, RANK, ALPHA, WEIGHTS = ((24, 20), (20, 24), (18, 18)), 3, 7.0, (3.0, 1.0, 6.0, 2.0)
"""Layers, and clients' weights, on which a rule is tried; clients and rank together do not fill a layer."""
TURNS = (0, 1)


@dataclass(frozen=True)
class Trained:
    """An adapter that a client trained, its rank, and the weight with which it counts."""

    adapter: Vector
    rank: int
    weight: float


def means(delta: Vector | None, clients: Sequence[Trained], rule: LoraRule, setting: Setting) -> Iterator[Floats]:
    """Each layer's weighted mean of the clients' effective changes of its weight, of shape (d, n); `delta` is that of the base they started from."""
    total = sum(one.weight for one in clients)
    bases = itertools.repeat(0.0) if delta is None else deltas(delta, setting.layout)
    of_clients = [pairs(one.adapter, setting.layout, rank=one.rank) for one in clients]
    for base, *found in zip(bases, *of_clients, strict=False):
        scaled = [rule.scale(setting, one.rank) * one.weight / total * (b @ a) for one, (b, a) in zip(clients, found, strict=True)]
        yield np.sum(scaled, axis=0) + base


@on_one_thread
def exactness_gap(
    before: Mapping[str, Vector], after: Mapping[str, Vector], clients: Sequence[Trained], *, rule: LoraRule, setting: Setting
) -> float | None:
    """How far the server's effective weights after a round are from the mean of its clients', as a share of how far that mean moved, both in the Frobenius norm.

    0 where the rule is exact; None if the mean did not move. `before` and `after` are the server's tensors.
    """
    lost = moved = 0.0
    layers_of = [products(one["adapter"], setting.layout, scale=setting.scale, delta=one.get("delta")) for one in (before, after)]
    for mean, start, end in zip(means(before.get("delta"), clients, rule, setting), *layers_of, strict=True):
        lost += float(np.square(end - mean).sum())
        moved += float(np.square(mean - start).sum())
    return float(np.sqrt(lost / moved)) if moved else None


def tried_layout(rule: LoraRule) -> Layout:
    """The layout on which a rule is tried."""
    factors = "ABR" if rule.between else "AB"
    names = [(f"layers.{i}.lora_{factor}.weight", factor, size) for i, size in enumerate(SIZES) for factor in factors]
    shapes = [{"A": (RANK, size[1]), "B": (size[0], RANK), "R": (RANK, RANK)}[factor] for _, factor, size in names]
    return Layout(tuple(name for name, _, _ in names), tuple(shapes))


def trained(rule: LoraRule) -> str:
    """The factors that clients train: `A, B`, or `B, A in turn`."""
    return _said([rule.trainable(tried_layout(rule), turn) for turn in TURNS])


def sent(rule: LoraRule) -> str:
    """What of them goes up."""
    return "two sketches" if rule.trips else _said([rule.sent_names(tried_layout(rule), turn) for turn in TURNS])


def _said(names: list[frozenset[str]]) -> str:
    turns = [", ".join(factor for factor in "ABR" if any(f".lora_{factor}." in name for name in some)) for some in names]
    return turns[0] if len(set(turns)) == 1 else f"{', '.join(turns)} in turn"


def losses(rule: LoraRule) -> tuple[float, float]:
    """What one round loses of the mean of the clients' effective weights, as a share of that mean, and what the best matrices of the rank would lose.

    On random clients that start from an adapter in the middle of a run; the worse of two rounds.
    """
    return max(_losses(rule, turn) for turn in TURNS)


def _losses(rule: LoraRule, turn: int) -> tuple[float, float]:
    layout = tried_layout(rule)
    setting = Setting(layout, ALPHA, seed=0, energy=0.9, oversampling=3 * RANK, pruned_share=0.99)
    before = _somewhere(rule, layout)
    mask = entries(layout, rule.trainable(layout, turn), RANK)
    clients = [before["adapter"] + _drawn(layout, mask, "client", turn, k) for k in range(len(WEIGHTS))]
    after = _after(rule, before, clients, setting, turn)
    ideal = list(
        means(before.get("delta"), [Trained(*one) for one in zip(clients, [RANK] * len(clients), WEIGHTS, strict=True)], rule, setting)
    )
    found = products(after["adapter"], layout, scale=setting.scale, delta=after.get("delta"))
    whole = sum(float(np.square(one).sum()) for one in ideal)
    lost = sum(float(np.square(one - other).sum()) for one, other in zip(ideal, found, strict=True))
    best = sum(float(np.square(np.linalg.svd(one, compute_uv=False)[RANK:]).sum()) for one in ideal)
    return float(np.sqrt(lost / whole)), float(np.sqrt(best / whole))


def _after(rule: LoraRule, before: Mapping[str, Vector], clients: list[Vector], setting: Setting, turn: int) -> Mapping[str, Vector]:
    """The server's tensors after a round without noise."""
    given = before["adapter"]
    uploads = [rule.message(one, given, rank=RANK, setting=setting, round_index=turn, turn=turn) for one in clients]
    tensors = dict(before)
    if rule.trips is not None and rule.kept is not None:
        mean = _mean([upload["adapter"] for upload in uploads])
        tensors |= rule.trips.relay({"adapter": mean}, setting)
        uploads = [rule.trips.answer(rule.kept(one, given, RANK, setting), tensors, setting) for one in clients]
    if rule.combine is not None and rule.form == "stack":
        return rule.combine(tensors, uploads, WEIGHTS, setting, turn)
    mean = _mean([upload["adapter"] for upload in uploads])
    if rule.combine is not None:
        return rule.combine(tensors, [{"adapter": mean}], [1.0], setting, turn)
    tensors["adapter"] = given + spread(mean, rule.mask(setting, turn))
    return tensors if rule.settle is None else rule.settle(tensors, setting)


def _mean(vectors: list[Vector]) -> Vector:
    return np.asarray(np.average(np.stack(vectors).astype(np.float64), axis=0, weights=WEIGHTS), dtype=np.float32)


def _somewhere(rule: LoraRule, layout: Layout) -> dict[str, Vector]:
    tensors = rule.start(layout, 0)
    mask = entries(layout, rule.trainable(layout, None), RANK)
    tensors["adapter"] = tensors["adapter"] + _drawn(layout, mask, "server")
    return tensors


def _drawn(layout: Layout, mask: np.ndarray | None, *key: str | int) -> Vector:
    drawn = numpy_rng(0, *key).standard_normal(layout.num_parameters).astype(np.float32)
    return drawn if mask is None else np.where(mask, drawn, np.float32(0))
