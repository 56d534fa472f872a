"""What training takes, found out without doing it: bytes of base, adapter, optimizer and activations, and floating-point operations.

A step is run on tensors that have shapes and no numbers, so that whatever a model computes is counted, and nothing is computed. Seconds are measured,
on the same model cut to one layer and to a few. Left out: what libraries take for themselves, and fragments between tensors.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from raysim.data.tokens import Example
from raysim.lora.layout import initial_adapter
from raysim.model.base_model import BaseModel
from raysim.model.language_model import LanguageModel
from raysim.model.train import TrainSettings, response_nll, train_adapter, training_mode

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Under which of these a model's configuration names its layers, differs."""
SHALLOW, DEEPER = 1, 4
"""Layers of the two models that are timed."""
FRAGMENTS = {True: 1.25, False: 1.15}
"""How much of a processor's memory a step takes for its tensors and the holes that glibc leaves between them, by whether activations are kept
(measured: EXPERIMENTS.md)."""
PATIENCE_S = 8.0
"""How long one of them is timed at most, beyond its first step."""


@dataclass(frozen=True)
class Footprint:
    """What a client's training takes."""

    num_parameters: int
    num_trained: int
    """Parameters of the adapter."""
    base_bytes: int
    """Of the base, which clients of one node share where they are on its processors."""
    adapter_bytes: int
    """Of the adapter, its gradient, and the copy from which a client starts."""
    optimizer_bytes: int
    activation_bytes: int
    """The most that a step holds beside these, with what lies unused between its tensors."""
    flops: float
    """Floating-point operations of the step."""
    num_tokens: int
    """Tokens of the step, without padding."""

    @property
    def client_bytes(self) -> int:
        """What each client takes beside the base."""
        return self.adapter_bytes + self.optimizer_bytes + self.activation_bytes


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Counts the bytes of the tensors that are made while it is open and not yet gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._add(one.untyped_storage())
        return result

    def known(self, tensors: Sequence[torch.Tensor]) -> None:
        """These were there before, and are not counted."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def footprint(
    lm: LanguageModel, base: BaseModel, examples: Sequence[Example], *, optimizer: str, keep_activations: bool = True, on_gpu: bool = False
) -> Footprint:
    """What a step on these examples at once takes, here or on a GPU; `base` may be an empty one."""
    lm.keep_activations(keep_activations)
    num_trained = lm.layout.num_parameters
    without_numbers = FakeTensorMode(allow_non_fake_inputs=True)
    weights = [without_numbers.from_tensor(tensor) for tensor in (*lm.model.parameters(), *lm.model.buffers())]
    with training_mode(lm, seed=0), without_numbers, FlopCounterMode(display=False) as counter, Live() as live:
        live.known(weights)
        nll_B, count_B = response_nll(lm, examples)
        parameters = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(nll_B.sum() / count_B.sum(), parameters, allow_unused=True)
    return Footprint(
        num_parameters=base.num_parameters,
        num_trained=num_trained,
        base_bytes=base.num_bytes,
        adapter_bytes=3 * 4 * num_trained,
        optimizer_bytes=(8 if optimizer == "adamw" else 0) * num_trained,
        activation_bytes=round(live.peak * (1.0 if on_gpu else FRAGMENTS[keep_activations])),
        flops=float(counter.get_total_flops()),
        num_tokens=sum(example.num_tokens for example in examples),
    )


def cut(settings: dict[str, Any], depth: int) -> dict[str, Any]:
    """A model's configuration with its first layers alone.

    Errors: ValueError if it names no number of layers.
    """
    names = [name for name in DEPTHS if isinstance(settings.get(name), int)]
    if not names:
        raise ValueError("the configuration of the model names no number of layers")
    whole = settings[names[0]]
    lists = {name: value[:depth] for name, value in settings.items() if isinstance(value, list) and len(value) == whole}
    return settings | {name: min(depth, whole) for name in names} | lists


def num_layers(settings: dict[str, Any]) -> int:
    """How many layers a configuration names."""
    return int(next(settings[name] for name in DEPTHS if isinstance(settings.get(name), int)))


def filled(base: BaseModel) -> BaseModel:
    """An empty base model with small random numbers: times depend on none of them, but memory that was never written is faster than any."""
    rng = np.random.default_rng(0)
    return replace(base, tensors={name: _numbers(array, rng) for name, array in base.tensors.items()})


def _numbers(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if array.dtype == np.float32:
        return np.asarray(0.02 * rng.standard_normal(array.shape, dtype=np.float32))
    if array.dtype == np.uint16:  # bfloat16, of about 0.02
        return np.asarray(
            rng.integers(0x3C00, 0x3CC0, size=array.shape, dtype=np.uint16) | (rng.integers(0, 2, size=array.shape, dtype=np.uint16) << 15)
        )
    return np.asarray(rng.integers(1, 100, size=array.shape).astype(array.dtype))


def seconds_per_step(build: Callable[[int], LanguageModel], depth: int, examples: Sequence[Example], *, settings: TrainSettings) -> float:
    """Seconds that a step on these examples takes on a model of `depth` layers, from those of two that are cut (`build`)."""
    shallow = min(SHALLOW, depth)
    first = _timed(build(shallow), examples, settings=settings)
    if depth == shallow:
        return first
    deeper = min(DEEPER, depth)
    return first + (_timed(build(deeper), examples, settings=settings) - first) / (deeper - shallow) * (depth - shallow)


def _timed(lm: LanguageModel, examples: Sequence[Example], *, settings: TrainSettings) -> float:
    """The least seconds of a step, of as many as there is time for; the first one is not counted."""
    adapter = initial_adapter(lm.layout, seed=0)
    one = replace(settings, num_epochs=1, max_steps=1, batch_size=len(examples))
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 2 or (len(times) < 4 and time.perf_counter() - started < PATIENCE_S):
        before = time.perf_counter()
        train_adapter(lm, adapter, examples, settings=one, seed=0)
        times.append(time.perf_counter() - before)
    return min(times[1:])
