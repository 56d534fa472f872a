"""A model's weights read from its folder one tensor at a time, so that no second model lies in memory while they are read.

Files are read and not mapped: what was read of them is no part of this process's memory. Left out: checkpoints whose tensors have other names or
shapes than the model's own (fused experts, pickled files), which transformers reads.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from raysim.model.find import quiet_transformers

MAP_NORESERVE = 0x4000
"""Linux: of such pages none is set aside (mman.h; Python does not name it)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the types of numbers."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        content = np.fromfile(self.path, dtype=np.uint8, count=self.num_bytes, offset=self.offset)
        return torch.from_numpy(content).view(self.dtype).reshape(self.shape)


def empty_model(config: Any, *, dtype: str, attention: str = "auto") -> Any:
    """The model of transformers that `config` describes, without weights; `attention` is the implementation, `auto` for transformers' choice."""
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False), quiet_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], **chosen)  # type: ignore[no-untyped-call]  # transformers has no type here


def places(folder: Path) -> dict[str, Place]:
    """Where each tensor of the folder's safetensors files lies; empty where there are none, or a type of number that is not known.

    Errors: ValueError for a file that is no safetensors file, or not whole.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    else:
        files = [single] if single.is_file() else []
    found = {name: place for path in files for name, place in _places_in(path).items()}
    return found if all(place is not None for place in found.values()) else {}  # type: ignore[return-value]  # none is None


def _places_in(path: Path) -> Mapping[str, Place | None]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length)) if length < size else {}
    start, found = 8 + length, dict[str, Place | None]()
    if start + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=size) > size:
        raise ValueError(f"{path} is cut short, or no safetensors file")
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            dtype = STORED_DTYPES.get(entry["dtype"])
            found[name] = None if dtype is None else Place(path, start + first, end - first, dtype, tuple(entry["shape"]))
    return found


def matching(core: Any, stored: Mapping[str, Place]) -> dict[str, Place] | None:
    """Where each of the model's tensors lies, by its name and in its order, those that are tied once; None unless the folder holds just these."""
    core.tie_weights()
    groups: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in core.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
        shapes[name] = tuple(tensor.shape)
    found: dict[str, Place] = {}
    for names in groups.values():
        here = [name for name in names if name in stored]
        if len(here) != 1 or stored[here[0]].shape != shapes[names[0]]:
            return None
        found[names[0]] = stored[here[0]]
    return found if len(found) == len(stored) else None


def read_all(found: Mapping[str, Place]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor with its name, read when it is asked for."""
    for name, place in found.items():
        yield name, place.read()


def unused(shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
    """An array that takes no memory until it is used: this machine need not have what all of a model takes."""
    size = math.prod(shape) * kind.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return np.frombuffer(pages, dtype=kind, count=math.prod(shape)).reshape(shape)
