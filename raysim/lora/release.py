"""What is released of a run's adapter: one adapter of one rank that plain PEFT loads, whatever the LoRA rule keeps at the server.

An R between A and B is taken into B. Where a rule moves the base model, the whole change of every adapted weight is saved beside the adapter, which
is then the best one of its rank, and what that loses is known.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from raysim import storage
from raysim.lora.factors import delta_size, deltas, layers, on_one_thread, pairs, products, truncated, written
from raysim.lora.layout import Layout, Released, Vector, by_name, flatten, initial_adapter, read_tensors

DELTA = "delta.safetensors"


@dataclass(frozen=True)
class Exported:
    """A released adapter as plain PEFT has it."""

    adapter: Vector
    layout: Layout
    rank: int
    alpha: float
    delta: Vector | None = None
    """The change of every adapted weight, as `factors.deltas` has it, where the base was moved; None where the adapter is all."""
    loss: float | None = None
    """How far the adapter is from that change: the Frobenius norm of the difference over that of the change."""


@on_one_thread
def exported(released: Released, layout: Layout, *, alpha: float, rank: int) -> Exported:
    """The adapter of plain factors; where the base was moved of rank `rank`, or of as much as its layers have, else as it is."""
    tensors, own_rank = by_name(released), layers(layout)[0].rank
    adapter = tensors["adapter"]
    if "delta" in tensors:
        rank = min(rank, max(min(layer.num_outputs, layer.num_inputs) for layer in layers(layout)))
        return _cut(products(adapter, layout, scale=alpha / own_rank, delta=tensors["delta"]), layout, scale=alpha / own_rank, rank=rank)
    if layers(layout)[0].r is None:
        return Exported(adapter, layout, own_rank, alpha)
    plain = plain_layout(layout, rank=own_rank)
    return Exported(written(pairs(adapter, layout), plain), plain, own_rank, alpha)


def _cut(changes: list[np.ndarray], layout: Layout, *, scale: float, rank: int) -> Exported:
    plain = plain_layout(layout, rank=rank)
    found = [truncated(change, rank) for change in changes]
    adapter = written([(u * values / scale, vt) for u, values, vt in found], plain)
    lost = sum(float(np.square(c - (u * s) @ vt).sum()) for c, (u, s, vt) in zip(changes, found, strict=True))
    whole = sum(float(np.square(change).sum()) for change in changes)
    delta = np.concatenate([change.reshape(-1) for change in changes]).astype(np.float32)
    return Exported(adapter, plain, rank, scale * rank, delta, float(np.sqrt(lost / whole)) if whole else 0.0)


def plain_layout(layout: Layout, *, rank: int) -> Layout:
    """The layout of the same layers with an A and a B of some rank alone."""
    kept = [(name, shape) for name, shape in zip(layout.names, layout.shapes, strict=True) if ".lora_R." not in name]
    shapes = ((rank, shape[1]) if ".lora_A." in name else (shape[0], rank) for name, shape in kept)
    return Layout(tuple(name for name, _ in kept), tuple(shapes))


def save_delta(folder: Path, delta: Vector, layout: Layout) -> None:
    """Writes the change of every adapted weight by the name of that weight in the base model, each outputs by inputs."""
    parts = zip(layers(layout), deltas(delta, layout), strict=True)
    tensors = {
        f"{layer.module.removeprefix('base_model.model.')}.weight": torch.from_numpy(np.ascontiguousarray(part)) for layer, part in parts
    }
    storage.write_bytes(folder / DELTA, save(tensors, metadata={"format": "pt"}), private=True)


def load_released(folder: Path, layout: Layout, *, seed: int) -> Released:
    """What `exported` wrote, as a model with this layout takes it: with R the identity, or a fresh adapter on the delta.

    Errors: ValueError if a key is missing, unknown, or has another shape.
    """
    path = folder / (DELTA if (folder / DELTA).is_file() else "adapter_model.safetensors")
    tensors = read_tensors(path)
    try:
        if path.name == DELTA:
            return {"adapter": initial_adapter(layout, seed=seed), "delta": _delta(tensors, layout)}
        between = {name: torch.eye(shape[0]) for name, shape in zip(layout.names, layout.shapes, strict=True) if ".lora_R." in name}
        return flatten({**tensors, **between}, layout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore the file, or run into another folder") from None


def _delta(tensors: dict[str, torch.Tensor], layout: Layout) -> Vector:
    delta = np.zeros(delta_size(layout), dtype=np.float32)
    for layer, part in zip(layers(layout), deltas(delta, layout), strict=True):
        name = f"{layer.module.removeprefix('base_model.model.')}.weight"
        if name not in tensors or tuple(tensors[name].shape) != part.shape:
            raise ValueError(f"tensor {name} is missing, or not of shape {part.shape}")
        part[:] = tensors[name].numpy()
    return delta
