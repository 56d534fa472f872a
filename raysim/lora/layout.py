"""An adapter is one contiguous float32 vector and a `Layout`: how it is laid out, made, read, saved and hashed.

Left out: anything that knows a federated method. Shape legend: P = parameters of the adapter.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from raysim import storage
from raysim.errors import one_line
from raysim.rng import torch_rng

Vector = NDArray[np.float32]
Upload = Mapping[str, Vector]
"""What goes over the wire, either way: float32 tensors by name, of which `adapter` is one. Nothing is told apart by its length."""
Released = Vector | Upload
"""What an evaluation is of: an adapter, or, where a LoRA rule moves the base model, an `adapter` and a `delta` by name."""

QUANTIZATION = "base_model_quantization"
"""Under which an adapter's configuration says how the base was stored that it was trained on; absent where that was as it is."""
ORDER = "order"
"""What a file of tensors notes the order of the vector under."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an adapter's tensors, in the order in which they lie in the vector.

    Names are PEFT's keys, such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def num_parameters(self) -> int:
        """Length P of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each tensor in the vector."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes]).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def group_mask(self, group: str) -> NDArray[np.bool_]:
        """Which entries of the vector belong to the factor `A` or `B`, bool of shape (P,)."""
        mask = np.zeros(self.num_parameters, dtype=bool)
        for name, (start, end) in zip(self.names, self.spans(), strict=True):
            mask[start:end] = f".lora_{group}." in name
        return mask


def by_name(release: Released) -> Upload:
    """The tensors of a release by name."""
    return {"adapter": release} if isinstance(release, np.ndarray) else release


def flatten(tensors: dict[str, torch.Tensor], layout: Layout) -> Vector:
    """The tensors as one float32 vector of shape (P,).

    Errors: ValueError if a tensor is missing, has another shape, holds integers, or is not part of the layout.
    """
    unknown = set(tensors) - set(layout.names)
    if unknown:
        raise ValueError(f"adapter: tensor {min(unknown)} is not part of the layout ({len(unknown)} such)")
    vector = np.empty(layout.num_parameters, dtype=np.float32)
    for name, shape, (start, end) in zip(layout.names, layout.shapes, layout.spans(), strict=True):
        if name not in tensors:
            raise ValueError(f"adapter: tensor {name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"adapter: tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"adapter: tensor {name} holds {tensors[name].dtype}, expected floating-point numbers")
        vector[start:end] = tensors[name].detach().to("cpu", torch.float32).reshape(-1).numpy()
    return vector


def unflatten(vector: Vector, layout: Layout) -> dict[str, torch.Tensor]:
    """The vector as named tensors (copies), the inverse of `flatten`."""
    check_adapter(vector, layout)
    return {
        name: torch.from_numpy(np.array(vector[start:end], dtype=np.float32).reshape(shape))
        for name, shape, (start, end) in zip(layout.names, layout.shapes, layout.spans(), strict=True)
    }


def check_adapter(vector: Vector, layout: Layout) -> Vector:
    """`vector` itself, if it is an adapter or an update of this layout and nothing more: float32 of shape (P,).

    Errors: ValueError naming the type and shape it has and those it should have.
    """
    return check_vector(vector, layout.num_parameters)


def check_vector(vector: Vector, size: int) -> Vector:
    """`vector` itself, if it is float32 of that size.

    Errors: as `check_adapter`.
    """
    if not isinstance(vector, np.ndarray):
        raise ValueError(f"adapter: {type(vector).__name__} instead of a vector of {size} float32 numbers")
    if vector.dtype != np.float32 or vector.shape != (size,):
        raise ValueError(f"adapter: {vector.dtype} of shape {vector.shape}, expected float32 of shape ({size},)")
    return vector


def initial_adapter(layout: Layout, *, seed: int) -> Vector:
    """A fresh adapter: A Kaiming-uniform with a = sqrt(5), B zero (Hu et al. 2021, arXiv 2106.09685), so that B A = 0."""
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        tensors[name] = torch.zeros(shape)
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(tensors[name], a=math.sqrt(5), generator=torch_rng(seed, "adapter", name))
    return flatten(tensors, layout)


def adapter_sha256(vectors: Vector | Iterable[Vector]) -> str:
    """SHA-256 over the little-endian float32 bytes of one adapter, or of several in order."""
    digest = hashlib.sha256()
    for vector in [vectors] if isinstance(vectors, np.ndarray) else vectors:
        digest.update(np.ascontiguousarray(vector, dtype="<f4").tobytes())
    return digest.hexdigest()


def save_adapter(
    folder: Path,
    vector: Vector,
    layout: Layout,
    *,
    base_model: str,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str],
    quantization: str = "none",
    with_order: bool = False,
) -> None:
    """Writes `folder` in PEFT's format, so that `peft.PeftModel.from_pretrained` loads it without raysim.

    `with_order` notes in the file how the tensors lie in the vector, for who has no vector to tell it by.
    """
    metadata = {"format": "pt"} | ({ORDER: json.dumps(layout.names)} if with_order else {})
    content = save(unflatten(vector, layout), metadata=metadata)
    storage.write_bytes(folder / "adapter_model.safetensors", content, private=True)  # it remembers private texts
    settings = peft_settings(
        base_model=base_model, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, quantization=quantization
    )
    storage.write_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")


def peft_settings(
    *, base_model: str, rank: int, alpha: float, dropout: float, target_modules: list[str], quantization: str = "none"
) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of an adapter; of one that fits a quantised base, that too."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": "all-linear" if target_modules == ["all-linear"] else sorted(target_modules),
        "bias": "none",
        "inference_mode": True,
    } | ({} if quantization == "none" else {QUANTIZATION: quantization})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Errors: ValueError naming the file if it is missing or no such file.
    """
    try:
        found: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no adapter ({one_line(error)}); restore the file, or run into another folder") from None
    return found


def load_adapter(folder: Path, layout: Layout) -> Vector:
    """The vector of an adapter saved in PEFT's format.

    Errors: ValueError naming the file if it is missing or holds no tensors, or a key is missing, unknown, or has another shape or no finite value.
    """
    path = folder / "adapter_model.safetensors"
    tensors = read_tensors(path)
    try:
        vector = flatten(tensors, layout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore the file, or run into another folder") from None
    if not np.isfinite(vector).all():
        raise ValueError(f"{path}: the adapter is not finite; restore the file, or run into another folder")
    return vector
