"""What turns a loss into a step: the one thing in which training on one device and on several would differ.

Left out: clients bigger than one device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel

ADAM_EPS = 1e-8
"""Added to the denominator of an AdamW step (torch's default)."""


class Engine(Protocol):
    """Gradients lie in the model's `flat_grad`, where clipping, noise and proximal terms find them between the two calls."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the loss's gradient to that of the adapter; what is frozen has none."""

    def step(self) -> None:
        """Steps along the gradient."""

    def gather(self) -> Vector:
        """The adapter, float32 of shape (P,)."""


@dataclass(frozen=True)
class TorchEngine:
    """Plain torch, on the model's device."""

    lm: LanguageModel
    optimizer: torch.optim.Optimizer

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        if self.lm.frozen is not None:
            self.lm.flat_grad[self.lm.frozen] = 0.0

    def step(self) -> None:
        """See `Engine`: what is frozen stays, whatever noise or decay would do to it."""
        before = self.lm.flat.clone() if self.lm.frozen is not None else None
        self.optimizer.step()
        if before is not None:
            self.lm.flat[self.lm.frozen] = before[self.lm.frozen]

    def gather(self) -> Vector:
        """See `Engine`."""
        return self.lm.get_adapter()


def make_engine(lm: LanguageModel, optimizer: str, *, lr: float, weight_decay: float = 0.0) -> Engine:
    """The engine for `adamw` or `sgd`, its optimizer made afresh."""
    lm.flat.grad = lm.flat_grad
    if optimizer == "sgd":
        return TorchEngine(lm, torch.optim.SGD([lm.flat], lr=lr))
    return TorchEngine(lm, torch.optim.AdamW([lm.flat], lr=lr, eps=ADAM_EPS, weight_decay=weight_decay))
