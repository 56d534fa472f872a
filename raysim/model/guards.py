"""What a walk through a model found of its LoRA tensors, so that a training can ask in microseconds whether all is still so.

A walk names every module and takes as long as a short training step. It is made once; afterwards each tensor is looked up where it was found,
and whatever is not as it was then has the model walked again, which says what is wrong.
Left out: modules that are replaced whole, with their adapters, behind the model's back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from raysim.lora.layout import Layout

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Place:
    """Where a LoRA tensor was found."""

    name: str
    """Its name in the layout."""
    start: int
    """Its first entry in the flat adapter."""
    parameter: torch.nn.Parameter
    module: torch.nn.Module
    """What holds it, and multiplies by it."""
    siblings: torch.nn.Module
    """What holds that module, and would hold those of further adapters."""


@dataclass(frozen=True)
class Walked:
    """A model as a walk found it."""

    places: tuple[Place, ...]
    """In the order of the layout."""
    modules: tuple[torch.nn.Module, ...]
    """Every module, the model itself first."""
    is_plain: bool
    """Whether none of them does more when its mode changes (transformers' own models do with compiled kernels alone, which are never used here)."""

    def is_loaded_into(self, flat: torch.Tensor) -> bool:
        """Whether every LoRA tensor is where it was, alone there, and a view into `flat`."""
        first = flat.data_ptr()
        return all(
            place.module._parameters.get("weight") is place.parameter
            and len(place.siblings._modules) == 1
            and place.parameter.data_ptr() == first + FLOAT32_BYTES * place.start
            for place in self.places
        )

    def trains_into(self, flat_grad: torch.Tensor) -> bool:
        """Whether every LoRA tensor trains, and its gradient is a view into `flat_grad`."""
        first = flat_grad.data_ptr()
        return all(
            place.parameter.requires_grad
            and place.parameter.grad is not None
            and place.parameter.grad.data_ptr() == first + FLOAT32_BYTES * place.start
            for place in self.places
        )

    def switch(self, *, training: bool) -> None:
        """Puts every module into training mode or out of it, as `Module.train` does."""
        if not self.is_plain:
            self.modules[0].train(training)
            return
        for module in self.modules:
            module.__dict__["training"] = training  # what `Module.train` sets, without the checks of an assignment


def walked(model: torch.nn.Module, layout: Layout, named: Mapping[str, torch.nn.Parameter], *, adapter: str) -> Walked:
    """The model as it is, its LoRA tensors given by their names in the layout.

    Errors: RuntimeError naming a LoRA tensor that is in the model or in its layout, but not in both.
    """
    if odd := named.keys() ^ set(layout.names):
        raise RuntimeError(f"model: LoRA tensor {min(odd)} is in the model or in its layout, but not in both")
    modules = dict(model.named_modules())
    owners: Sequence[str] = [name.removesuffix(".weight") for name in layout.names]
    places = [
        Place(name, start, named[name], modules[f"{owner}.{adapter}"], modules[owner])
        for name, owner, (start, _) in zip(layout.names, owners, layout.spans(), strict=True)
    ]
    is_plain = all(type(module).train in (torch.nn.Module.train, PreTrainedModel.train) for module in modules.values())
    return Walked(tuple(places), tuple(modules.values()), is_plain)
