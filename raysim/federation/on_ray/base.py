"""A base model in the object store: one copy a node, which every process there reads."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raysim.imports import uncollected

with uncollected():
    import ray

    from raysim.model.base_model import BaseModel, Keep


@dataclass(frozen=True)
class SharedBase:
    """A base model whose arrays lie in the object store, each by itself, where every process of a node reads the same copy."""

    shell: BaseModel
    """All of it but its arrays."""
    refs: dict[str, Any]

    def get(self) -> BaseModel:
        """The node's copy, its arrays read-only."""
        return replace(self.shell, tensors=dict(zip(self.refs, ray.get(list(self.refs.values())), strict=True)))


def share_base(load: Callable[[Keep], BaseModel]) -> Any:
    """A reference to the `SharedBase` of what `load` reads: each array goes to the object store as it is read, and is nowhere else."""
    refs: dict[int, Any] = {}

    def keep(array: np.ndarray) -> np.ndarray:
        ref = ray.put(array)
        kept: np.ndarray = ray.get(ref)
        refs[id(kept)] = ref
        return kept

    base = load(keep)
    return ray.put(SharedBase(replace(base, tensors={}), {name: refs[id(array)] for name, array in base.tensors.items()}))


def shared_base(base_ref: Any) -> BaseModel:
    """The node's copy of a base model that was given to `share_base`, its arrays read-only."""
    shared: SharedBase = ray.get(base_ref)
    return shared.get()
