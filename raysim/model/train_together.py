"""Local training of several clients in one forward and backward pass of one base: each row of a batch goes through its own client's adapter.

In every adapted layer the low-rank factors of K clients lie in one tensor, and a layer's rows are K groups of equally many, so that a factor is a
batched product. The loss is the sum of the clients' own: no client's gradient holds a term of another's, which is all that a client's optimizer,
clipping and proximal term see. Equal to `train.train_adapter` of each client by itself, but for the order in which float32 sums are taken.
Left out: models that draw in training (dropout), whose draws would be shared; weights of single examples; layers that see other rows than all
tokens of all examples (experts, adapted output layers). `check_together` refuses those before a run.

Shape legend: K = clients, R = rows of a client in a batch, T = tokens, I = inputs of a layer, O = its outputs, N = scored positions, P = parameters.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.model.engine import ADAM_EPS
from raysim.model.language_model import LanguageModel
from raysim.model.train import (
    TrainSettings,
    TrainStats,
    check_change_of,
    check_gradient,
    epochs,
    every_factor_learns,
    finite_mean,
    is_out_of_memory,
    response_nll,
    train_adapter,
    training_mode,
)
from raysim.rng import numpy_rng

TRIED_STD = 0.02
"""Standard deviation of the adapters on which a group is tried before a run."""
TRIED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Most that their gradients may be off, as a share of their norm."""
CANDIDATES = (1, 4, 16, 64)
"""Sizes of groups that are measured where the configuration leaves the choice."""
GAIN = 1.1
"""Times as fast a larger group must be to be preferred."""


@dataclass
class _Group:
    """Clients in training: the first of them are those with the most steps, so that whoever still trains comes first."""

    flat_KP: torch.Tensor
    start_KP: torch.Tensor
    grad_KP: torch.Tensor
    """Each client's last gradient."""
    mean_KP: torch.Tensor
    square_KP: torch.Tensor
    """AdamW's moments."""
    reached_K: torch.Tensor
    """Whether a gradient that is not zero has reached each."""


def train_together(
    lm: LanguageModel,
    adapters: Sequence[Vector],
    shards: Sequence[Sequence[Example]],
    *,
    settings: TrainSettings,
    seeds: Sequence[int],
    corrections: Sequence[Vector] | None = None,
) -> list[tuple[Vector, TrainStats]]:
    """What `train_adapter` returns of each client, from its own adapter, examples and seed; groups of one, and what is left out here, go there.

    Guarantees: a client's gradient is that of its own loss, to 1e-5 of its norm in float32.
    Errors: as `train_adapter`, of the group.
    """
    if len(shards) == 1 or settings.tail_weight > 0 or draws(lm) or not all(shards):
        shifts: Sequence[Vector | None] = [None] * len(shards) if corrections is None else corrections
        return [
            train_adapter(lm, adapter, shard, settings=settings, seed=seed, correction=shift)
            for adapter, shard, seed, shift in zip(adapters, shards, seeds, shifts, strict=True)
        ]
    plans = [list(epochs([e.num_tokens for e in shard], settings=settings, seed=seed)) for shard, seed in zip(shards, seeds, strict=True)]
    order = sorted(range(len(shards)), key=lambda k: -len(plans[k]))
    group = _begun([adapters[k] for k in order], lm)
    shift_KP = None if corrections is None else torch.tensor(settings.lr * np.stack([corrections[k] for k in order]), device=lm.device)
    nlls, scored, tokens = np.zeros(len(order)), np.zeros(len(order), dtype=int), np.zeros(len(order), dtype=int)
    with training_mode(lm, seed=seeds[0]):
        for step in range(len(plans[order[0]])):
            batches = [[shards[k][i] for i in plans[k][step]] for k in order if len(plans[k]) > step]
            now = slice(0, len(batches))
            nll_K, count_K = _gradients(lm, group, batches)
            _step(lm, group, settings, number=step + 1, now=now, shift_KP=shift_KP)
            nlls[now] += nll_K.numpy()
            scored[now] += count_K.numpy()
            tokens[now] += [sum(example.num_tokens for example in batch) for batch in batches]
    _check(group, nlls, settings=settings)
    found = group.flat_KP.cpu().numpy()
    done: list[tuple[Vector, TrainStats]] = [(found[0], TrainStats(0, 0, None))] * len(order)
    for place, k in enumerate(order):
        stats = TrainStats(int(tokens[place]), len(plans[k]), finite_mean(float(nlls[place]), int(scored[place])))
        done[k] = found[place].copy(), stats
    return done


def _begun(adapters: Sequence[Vector], lm: LanguageModel) -> _Group:
    flat_KP = torch.tensor(np.stack(adapters), device=lm.device)
    grad_KP, mean_KP, square_KP = (torch.zeros_like(flat_KP) for _ in range(3))
    reached_K = torch.zeros(len(adapters), dtype=torch.bool, device=lm.device)
    return _Group(flat_KP, flat_KP.clone(), grad_KP, mean_KP, square_KP, reached_K)


def _gradients(lm: LanguageModel, group: _Group, batches: Sequence[Sequence[Example]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed losses and scored tokens of the clients that still train, on the CPU; their gradients are in the group."""
    num_rows = max(len(batch) for batch in batches)
    filler = Example(record=batches[0][0].record, prompt_ids=(lm.pad_token_id,), response_ids=())
    rows = [example for batch in batches for example in (*batch, *[filler] * (num_rows - len(batch)))]
    live_KP = group.flat_KP[: len(batches)].detach().requires_grad_()
    width = max(example.num_tokens for example in rows)
    with every_factor_learns(lm), _adapters_of(lm, live_KP, num_rows=len(rows) * width):
        nll_R, count_R = response_nll(lm, rows)
        nll_K, count_K = (one.view(len(batches), num_rows).sum(dim=1) for one in (nll_R, count_R))
        (nll_K / count_K).sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    assert live_KP.grad is not None, "a loss depends on the adapters"
    group.grad_KP[: len(batches)] = live_KP.grad
    return nll_K.detach().double().cpu(), count_K.cpu()


@contextmanager
def _adapters_of(lm: LanguageModel, live_KP: torch.Tensor, *, num_rows: int) -> Iterator[None]:
    """While open, every LoRA factor multiplies each of K equal groups of rows by its own client's matrix.

    Errors: RuntimeError where a layer sees other rows than all tokens of all examples.
    """
    places = lm.parts().places
    parts = torch.split(live_KP, [math.prod(shape) for shape in lm.layout.shapes], dim=1)  # whose gradients are put together once
    try:
        for place, part, shape in zip(places, parts, lm.layout.shapes, strict=True):
            place.module.forward = _product(part.view(len(live_KP), *shape), num_rows=num_rows)
        yield
    finally:
        for place in places:
            place.module.__dict__.pop("forward", None)


def _product(weight_KOI: torch.Tensor, *, num_rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1].numel() != num_rows:
            raise RuntimeError(f"training: an adapted layer saw {x.shape[:-1].numel()} rows of {num_rows}, so clients cannot be told apart")
        out: torch.Tensor = x.reshape(len(weight_KOI), -1, x.shape[-1]) @ weight_KOI.transpose(1, 2)
        return out.reshape(*x.shape[:-1], -1)

    return forward


@torch.no_grad()
def _step(lm: LanguageModel, group: _Group, settings: TrainSettings, *, number: int, now: slice, shift_KP: torch.Tensor | None) -> None:
    """One step of each client that still trains, as `train_adapter` and torch's own optimizers make it."""
    flat, grad = group.flat_KP[now], group.grad_KP[now]
    frozen = lm.frozen
    if frozen is not None:
        grad[:, frozen] = 0.0
    group.reached_K[now] |= grad.any(dim=1)
    if settings.prox_mu > 0:
        grad.add_(flat - group.start_KP[now], alpha=settings.prox_mu)
    if settings.max_grad_norm > 0:
        norm_K = grad.norm(dim=1)
        norm_K = norm_K if norm_K.isfinite().all() else grad.double().norm(dim=1)
        grad.mul_((settings.max_grad_norm / (norm_K + 1e-6)).clamp(max=1.0)[:, None])
    before = None if frozen is None else flat.clone()
    if settings.optimizer == "sgd":
        flat.sub_(grad, alpha=settings.lr)
    else:
        _adamw(flat, grad, group.mean_KP[now], group.square_KP[now], settings=settings, number=number)
    if before is not None:
        flat[:, frozen] = before[:, frozen]
    if shift_KP is not None:
        flat.sub_(shift_KP[now])


def _adamw(
    flat: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, *, settings: TrainSettings, number: int
) -> None:
    """The `number`-th step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with torch's betas, 0.9 and 0.999."""
    flat.mul_(1.0 - settings.lr * settings.weight_decay)
    mean.lerp_(grad, 0.1)
    square.mul_(0.999).addcmul_(grad, grad, value=0.001)
    denominator = (square.sqrt() / math.sqrt(1.0 - 0.999**number)).add_(ADAM_EPS)
    flat.addcdiv_(mean, denominator, value=-settings.lr / (1.0 - 0.9**number))


def _check(group: _Group, nlls: np.ndarray, *, settings: TrainSettings) -> None:
    """Refuses a client in which nothing was learned, as `train_adapter` does."""
    same_K = (group.flat_KP == group.start_KP).all(dim=1)
    for reached, loss in zip(group.reached_K.tolist(), nlls.tolist(), strict=True):
        check_gradient(reached=reached, loss=loss)
    for k in same_K.nonzero().flatten().tolist():
        check_change_of(group.flat_KP[k], group.grad_KP[k], group.start_KP[k], optimizer=settings.optimizer, lr=settings.lr)


def draws(lm: LanguageModel) -> bool:
    """Whether the model draws in training: by a dropout module, or by a probability in its configuration (of attention, which no module applies)."""
    if any(isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0 for module in lm.parts().modules):
        return True
    values: dict[str, Any] = lm.model.get_base_model().config.to_dict()  # type: ignore[union-attr, operator]  # torch types any attribute as a tensor
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in values.items())


def check_together(lm: LanguageModel, examples: Sequence[Example], *, size: int) -> None:
    """Refuses a model whose clients cannot be trained together: the gradients of two must be those of each by itself. Leaves the model's own adapter.

    Errors: ValueError naming `clients.batched`.
    """
    own, reason = lm.get_adapter(), "the gradients of clients that train together are not those of each by itself"
    if draws(lm):
        raise ValueError(
            f"clients.batched={size}: the model draws dropout in training, and clients that train together would share the draws; use 1"
        )
    adapters = [(TRIED_STD * numpy_rng(k, "tried").standard_normal(len(own))).astype(np.float32) for k in range(2)]
    shards, once = [examples[:1], examples[-2:]], TrainSettings(1, 1, 2, 1.0, "sgd", 0.0, 0.0, 0.0)
    try:
        together = train_together(lm, adapters, shards, settings=once, seeds=[0, 1])
        alone = [
            train_together(lm, [a], [shard], settings=once, seeds=[k])[0] for k, (a, shard) in enumerate(zip(adapters, shards, strict=True))
        ]
        steps = [(own[0] - adapter, one[0] - adapter) for own, one, adapter in zip(alone, together, adapters, strict=True)]
        is_right = all(np.linalg.norm(two - one) <= TRIED_ERROR[lm.compute_dtype] * np.linalg.norm(one) for one, two in steps)
    except RuntimeError as error:
        is_right, reason = False, str(error)
    finally:
        lm.set_adapter(own)
    if not is_right:
        raise ValueError(f"clients.batched={size}: this model's clients cannot be trained together ({reason}); use 1")


def measured_size(lm: LanguageModel, shards: Sequence[Sequence[Example]], *, settings: TrainSettings) -> int:
    """The size of a group, one of `CANDIDATES`, at which a client's first step is fastest here, by a short measurement.

    1 where groups are no gain, or where this model's clients cannot be trained together; no larger than what memory holds.
    """
    first = [shard for shard in shards if shard][: CANDIDATES[-1]]
    if len(first) < 2 or draws(lm):
        return 1
    try:
        check_together(lm, [example for shard in first for example in shard], size=len(first))
    except ValueError:
        return 1
    step, own = dataclasses.replace(settings, max_steps=1), lm.get_adapter()
    adapter = (TRIED_STD * numpy_rng(0, "tried").standard_normal(len(own))).astype(np.float32)
    best, best_s = 1, math.inf
    for size in [size for size in CANDIDATES if size <= len(first)]:
        client_s = []
        try:
            for _ in range(2):
                started = time.perf_counter()
                train_together(lm, [adapter] * size, first[:size], settings=step, seeds=range(size))
                client_s.append((time.perf_counter() - started) / size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            break
        if GAIN * min(client_s) < best_s:
            best, best_s = size, min(client_s)
    lm.set_adapter(own)
    return best
