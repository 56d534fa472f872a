"""What the server makes of the averaged update: it adds it, or lets momentum or an adaptive optimizer take the step.

Momentum: Hsu et al. (2019), arXiv 1909.06335 (FedAvgM). Adam, Yogi and Adagrad: Reddi et al. (2021), arXiv 2003.00295,
algorithm 2 (FedOpt). The averaged update D stands where a negative gradient would. Under a guarantee D is the noised average,
which is what is released: all that is computed from it is post-processing, and the guarantee stays what it was.
Left out, as in the paper: bias correction and schedules. A round that releases nothing makes no step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Moments = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ServerOptimizer:
    """Fields as in `config.ServerConfig`: `name` is `none`, `momentum`, `adam`, `yogi` or `adagrad`."""

    name: str
    beta1: float
    beta2: float
    tau: float


PLAIN = ServerOptimizer(name="none", beta1=0.0, beta2=0.0, tau=0.0)
"""Adds the averaged update."""


def server_step(
    mean: npt.NDArray[np.float32], memory: Mapping[str, Moments], *, optimizer: ServerOptimizer
) -> tuple[Moments, dict[str, Moments]]:
    """The step for an averaged update D, before the learning rate, and what the optimizer remembers after it, float64 of shape (P,).

    `none`: D. `momentum`: m = b1 m + D, step m. The others: m = b1 m + (1 - b1) D, step m / (sqrt(v) + tau), where
    `adam` v = b2 v + (1 - b2) D^2, `yogi` v = v - (1 - b2) D^2 sign(v - D^2), `adagrad` v = v + D^2. m starts at 0, v at tau^2.
    """
    update = mean.astype(np.float64)
    if optimizer.name == "none":
        return update, {}
    start = {"momentum": np.zeros(len(mean)), "variance": np.full(len(mean), optimizer.tau**2)} | dict(memory)
    if optimizer.name == "momentum":
        momentum = optimizer.beta1 * start["momentum"] + update
        return momentum, {"momentum": momentum}
    momentum = optimizer.beta1 * start["momentum"] + (1.0 - optimizer.beta1) * update
    variance = _second_moment(start["variance"], np.square(update), optimizer=optimizer)
    return momentum / (np.sqrt(variance) + optimizer.tau), {"momentum": momentum, "variance": variance}


def _second_moment(variance: Moments, square: Moments, *, optimizer: ServerOptimizer) -> Moments:
    if optimizer.name == "adam":
        return optimizer.beta2 * variance + (1.0 - optimizer.beta2) * square
    if optimizer.name == "yogi":
        return variance - (1.0 - optimizer.beta2) * square * np.sign(variance - square)
    assert optimizer.name == "adagrad", optimizer.name
    return variance + square
