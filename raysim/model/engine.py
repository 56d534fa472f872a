"""What turns a loss into a step: the one thing in which training on one device and on several differs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.model.sharded import Group, Holder, ShardedOptimizer

ADAM_EPS = 1e-8
"""Added to the denominator of an AdamW step (torch's default)."""


class Engine(Protocol):
    """Gradients lie in the model's `flat_grad`, where clipping, noise and proximal terms find them between the two calls."""

    def share(self, batch: Sequence[int]) -> list[tuple[int, bool]]:
        """What of a batch is to be done in this process, and whether it counts."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the loss's gradient to that of the adapter; what is frozen has none."""

    def gathered(self, value: float) -> float:
        """Ends the backward passes of a step: the gradient is then the whole batch's, and so is the value that is returned."""

    def step(self) -> None:
        """Steps along the gradient."""

    def gather(self) -> Vector:
        """The adapter, float32 of shape (P,)."""


@dataclass(frozen=True)
class TorchEngine:
    """Plain torch, on the model's device."""

    lm: LanguageModel
    optimizer: torch.optim.Optimizer

    def share(self, batch: Sequence[int]) -> list[tuple[int, bool]]:
        """See `Engine`: all of it."""
        return [(index, True) for index in batch]

    def gathered(self, value: float) -> float:
        """See `Engine`."""
        return value

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


@dataclass(frozen=True)
class DeepSpeedEngine:
    """A group of ranks, each with its share of every batch; after `gathered` all have the same gradient, and step alike."""

    lm: LanguageModel
    optimizer: ShardedOptimizer
    group: Group

    def share(self, batch: Sequence[int]) -> list[tuple[int, bool]]:
        """See `Engine`."""
        return self.group.share(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`: the gradient of this rank's share."""
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch

    def gathered(self, value: float) -> float:
        """See `Engine`."""
        self.group.summed(self.lm.flat_grad)
        if self.lm.frozen is not None:
            self.lm.flat_grad[self.lm.frozen] = 0.0
        return float(self.group.summed(torch.tensor([value], dtype=torch.float64, device=self.lm.device)))

    def step(self) -> None:
        """See `Engine`: what is frozen stays."""
        before = self.lm.flat.clone() if self.lm.frozen is not None else None
        self.optimizer.step(self.lm.flat, self.lm.flat_grad)
        if before is not None:
            self.lm.flat[self.lm.frozen] = before[self.lm.frozen]

    def gather(self) -> Vector:
        """See `Engine`."""
        return self.lm.get_adapter()


def make_engine(lm: LanguageModel, optimizer: str, *, lr: float, weight_decay: float = 0.0) -> Engine:
    """The engine for `adamw` or `sgd`, its optimizer made afresh."""
    if lm.group is not None:
        if optimizer not in lm.sharded:
            holder = Holder(lm.flat)
            lm.sharded[optimizer] = ShardedOptimizer(_optimizer(holder.flat, optimizer, lr=lr, weight_decay=weight_decay), holder, lm.group)
        lm.sharded[optimizer].begin(lr=lr, weight_decay=weight_decay if optimizer == "adamw" else 0.0)
        return DeepSpeedEngine(lm, lm.sharded[optimizer], lm.group)
    lm.flat.grad = lm.flat_grad
    return TorchEngine(lm, _optimizer(lm.flat, optimizer, lr=lr, weight_decay=weight_decay))


def _optimizer(flat: torch.Tensor, name: str, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD([flat], lr=lr)
    return torch.optim.AdamW([flat], lr=lr, eps=ADAM_EPS, weight_decay=weight_decay)
