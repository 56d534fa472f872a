"""Linear layers stored in eight or four bits by bitsandbytes, as plain arrays that processes share, and put back into a model.

`nf4`: Dettmers et al. (2023), arXiv 2305.14314, blocks of 64 with a float32 scale each; `int8`: Dettmers et al. (2022), arXiv 2208.07339, a scale
for each output and no column of outliers, so that what one example computes never depends on another. Weights are computed with in the type of
the activations. Left out: second quantisation of the scales, embeddings, output layers, and weights that are no `nn.Linear`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

BLOCK = 64
"""Weights that share a scale (`nf4`)."""
PIECE = BLOCK * 2**14
"""Weights that are quantised at once."""
SCALES = {"int8": ".scale", "nf4": ".absmax"}
"""What is added to a weight's name for that of its scales."""


def quantizable(core: Any, kind: str) -> frozenset[str]:
    """The names of the weights that can be quantised: those of linear layers other than the output layer.

    For `nf4`, of such whose rows are whole blocks: of others bitsandbytes 0.50.2 makes wrong numbers on a processor (tests/model/test_quantize.py).

    Errors: ValueError if there are none.
    """
    head = core.get_output_embeddings()
    linear = ((name, module) for name, module in core.named_modules() if type(module) is torch.nn.Linear and module is not head)
    found = {f"{name}.weight" for name, module in linear if kind != "nf4" or module.in_features % BLOCK == 0}
    if not found:
        raise ValueError("model.quantization: the model has no linear layer of torch that could be quantised; use 'none'")
    return frozenset(found)


def quantized_parts(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """What is stored of a weight, by what is added to its name.

    Errors: ValueError if bitsandbytes is not installed.
    """
    functional = bitsandbytes().functional
    if kind == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return {"": values, SCALES[kind]: scales}
    pieces = weight.reshape(-1).split(PIECE)  # type: ignore[no-untyped-call]  # untyped in torch; what is computed on the way is many times as large as a piece
    done = [functional.quantize_4bit(one.float(), blocksize=BLOCK, compress_statistics=False, quant_type=kind) for one in pieces]
    return {"": torch.cat([packed for packed, _ in done]), SCALES[kind]: torch.cat([state.absmax for _, state in done])}


def quantized_shapes(shape: tuple[int, ...], kind: str) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """The shapes and types of what `quantized_parts` makes of a weight."""
    size, scales = math.prod(shape), np.dtype(np.float32)
    if kind == "int8":
        return {"": (shape, np.dtype(np.int8)), SCALES[kind]: (shape[:1], scales)}
    return {"": (((size + 1) // 2, 1), np.dtype(np.uint8)), SCALES[kind]: ((-(-size // BLOCK),), scales)}


def put_quantized(core: Any, state: Mapping[str, torch.Tensor], *, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replaces the layers of `core` whose weights are quantised, by such over the tensors of `state`, which are not copied.

    PEFT and transformers know such a model by the flag that this sets.
    """
    modules = dict(core.named_modules())
    for name, shape in shapes.items():
        place = name.removesuffix(".weight")
        parent, _, own = place.rpartition(".")
        make = _int8_layer if kind == "int8" else _nf4_layer
        setattr(modules[parent], own, make(modules[place], state[name], state[f"{name}{SCALES[kind]}"], shape))
    core.is_loaded_in_8bit, core.is_loaded_in_4bit = kind == "int8", kind == "nf4"


def _nf4_layer(plain: torch.nn.Linear, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...]) -> torch.nn.Module:
    library = bitsandbytes()
    layer = library.nn.Linear4bit(
        shape[1], shape[0], bias=plain.bias is not None, quant_type="nf4", compress_statistics=False, device="meta"
    )
    state = library.functional.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=library.functional.get_4bit_type("nf4", device="cpu"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=plain.weight.dtype,
    )
    layer.weight = library.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=False,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.bias, layer.quant_state = plain.bias, state
    layer.support_avx512bf16_for_cpu = False  # it would lay the shared weights out anew, for other bits than in training
    return layer  # type: ignore[no-any-return]  # bitsandbytes has no types


def _int8_layer(plain: torch.nn.Linear, values: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.nn.Module:
    library = bitsandbytes()
    layer = library.nn.Linear8bitLt(shape[1], shape[0], bias=plain.bias is not None, has_fp16_weights=False, threshold=0.0, device="meta")
    layer.weight = library.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    layer.bias = plain.bias
    return layer  # type: ignore[no-any-return]  # bitsandbytes has no types


def bitsandbytes() -> Any:
    """The library.

    Errors: ValueError if it is not installed.
    """
    try:
        import bitsandbytes as library  # a second, and only quantised bases need it
    except ImportError:
        raise ValueError("model.quantization needs the package bitsandbytes; run: pip install 'raysim[quantized]', or use 'none'") from None
    return library
