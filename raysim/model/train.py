"""Local LoRA training: batches without wasted padding, and loss on the response only. Private training stands in `private_train`.

The head of the model runs on response positions alone: with a vocabulary of 49,152 and prompts longer than answers,
that is a fifth of the work and most of the memory. Batches are padded on the right and need no attention mask, since
under causal attention no real position sees what follows it.
Left out: what turns a loss into a step, which is an `Engine`'s business.

Shape legend: B = batch, T = tokens, V = vocabulary, N = scored (response) positions of a batch, P = parameters of the adapter.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.lora.penalty import tail_gradient
from raysim.model.engine import ADAM_EPS, Engine, make_engine
from raysim.model.language_model import LanguageModel
from raysim.rng import numpy_rng, seed_for, torch_rng

T = TypeVar("T")
Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]
"""What torch calls after a module with its inputs and its output."""
GROUPING_WINDOW = 8
"""Batches among which examples are sorted by length: the fewer, the more random; the more, the less padding."""


SHOWING = 1.0 / 16.0
"""Share of a step that must still change the adapter for an unchanged one to be a fault: rounding and momentum may hide less."""


@dataclass(frozen=True)
class TrainSettings:
    """What local training needs; fields as in `config.TrainConfig`, `lr` already scheduled for the round."""

    num_epochs: int
    max_steps: int
    batch_size: int
    lr: float
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    prox_mu: float
    micro_batch_size: int = 0
    """Examples in memory at once, of a batch whose gradients are added up; 0 for all."""
    keep_activations: bool = True
    """Whether activations are kept for the backward pass, or computed again."""
    tail_weight: float = 0.0
    """HetLoRA: weight of the penalty on the directions from `tail_start` on (see `lora.penalty`)."""
    tail_start: int = 0


@dataclass(frozen=True)
class TrainStats:
    """Real tokens processed, steps made, mean loss over response tokens (nats), and share of examples that were clipped."""

    num_tokens: int
    num_steps: int
    loss: float | None
    clip_fraction: float | None = None


def scheduled_lr(schedule: str, *, lr: float, min_lr: float, round_index: int, num_rounds: int) -> float:
    """The round's learning rate; `cosine`: min + (lr - min) (1 + cos(pi r / R)) / 2 over the round index r of R."""
    if schedule == "constant":
        return lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * round_index / num_rounds))


def grouped_batches(lengths: Sequence[int], *, batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """One epoch of batches of indices: each index once, examples of like length together, batches in random order."""
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    window = batch_size * GROUPING_WINDOW
    for start in range(0, len(order), window):
        group = sorted(order[start : start + window].tolist(), key=lambda i: lengths[i])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def response_nll(lm: LanguageModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood of each example's scored tokens (nats) and their number, both of shape (B,)."""
    nll_N, row_N = response_token_nll(lm, examples)
    nll_B = summed_by_example(nll_N, row_N, num_examples=len(examples))
    return nll_B, torch.tensor([len(example.scored) for example in examples], device=lm.device)


def response_token_nll(lm: LanguageModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood (nats) of every scored token, and the example each belongs to, both of shape (N,), in order.

    Equal to masking the labels of the model's full logits_BTV, as `LanguageModel.logits_at` gives them.
    """
    logits_NV, token_N, row_N = response_logits(lm, examples)
    return F.cross_entropy(logits_NV.float(), token_N, reduction="none"), row_N


def response_logits(lm: LanguageModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits NV from which every scored token is predicted, those tokens, and the example each belongs to, both of shape (N,), in order."""
    width = max(example.num_tokens for example in examples)
    ids_BT = torch.full((len(examples), width), lm.pad_token_id, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    for row, example in enumerate(examples):
        ids_BT[row, : example.num_tokens] = torch.tensor(example.prompt_ids + example.response_ids)
        rows += [row] * len(example.scored)
        columns += example.scored
    ids_BT = ids_BT.to(lm.device)
    row_N, column_N = torch.tensor(rows, device=lm.device), torch.tensor(columns, device=lm.device)
    return lm.logits_at(ids_BT, row_N, column_N - 1, use_cache=False), ids_BT[row_N, column_N], row_N


def summed_by_example(nll_N: torch.Tensor, row_N: torch.Tensor, *, num_examples: int) -> torch.Tensor:
    """The sum of the tokens' losses of each example, shape (B,)."""
    return torch.zeros(num_examples, device=nll_N.device).index_add(0, row_N, nll_N)


def batches_by_length(examples: Sequence[Example], *, batch_size: int) -> list[list[int]]:
    """The places of the examples in batches of like length, shortest first, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def mean_nll(lm: LanguageModel, examples: Sequence[Example], *, batch_size: int) -> list[tuple[float, int]]:
    """Summed response NLL (nats) and number of response tokens of each example, in order; no gradient."""
    lm.model.eval()
    results: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    for batch in batches_by_length(examples, batch_size=batch_size):
        nll_B, count_B = response_nll(lm, [examples[i] for i in batch])
        for index, nll, count in zip(batch, nll_B.tolist(), count_B.tolist(), strict=True):
            results[index] = (nll, count)
    return results


def train_adapter(
    lm: LanguageModel,
    adapter: Vector,
    examples: Sequence[Example],
    *,
    settings: TrainSettings,
    seed: int,
    correction: Vector | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[Vector, TrainStats]:
    """The adapter after local training from `adapter` on `examples`, float32 of shape (P,).

    The loss of a batch is the mean over its response tokens. With no examples the adapter comes back unchanged.
    FedProx: Li et al. (2020), arXiv 1812.06127, mu/2 ||w - w_global||^2. `correction`, of shape (P,), is subtracted after each step, times
    the learning rate (SCAFFOLD's c - c_k); a correction of zeros changes no bit. `weights`, one an example, multiply its loss in the
    numerator of that mean (not in `stats`); weights of 1 change no bit.

    Errors: RuntimeError if a LoRA tensor is frozen, or if nothing was learned although there was a loss to lower.
    """
    lm.set_adapter(adapter)
    if not examples:
        return lm.get_adapter(), TrainStats(num_tokens=0, num_steps=0, loss=None)
    anchor = lm.flat.clone()
    engine = make_engine(lm, settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay)
    lm.keep_activations(settings.keep_activations)
    shift = None if correction is None else torch.tensor(settings.lr * correction, device=lm.device)
    lengths = [example.num_tokens for example in examples]
    num_tokens = num_steps = scored = 0
    total_nll, reached = 0.0, False
    with training_mode(lm, seed=seed):
        for batch in epochs(lengths, settings=settings, seed=seed):
            chosen = [examples[i] for i in batch]
            with nullcontext() if num_steps else every_factor_learns(lm):
                total_nll += accumulate(lm, engine, examples, batch, size=settings.micro_batch_size, weights=weights)
            reached = reached or bool(lm.flat_grad.any())
            if settings.prox_mu > 0:
                lm.flat_grad.add_(lm.flat - anchor, alpha=settings.prox_mu)
            if settings.tail_weight > 0:
                lm.flat_grad.add_(tail_gradient(lm.flat, lm.layout, start=settings.tail_start), alpha=settings.tail_weight)
            if settings.max_grad_norm > 0:
                lm.flat_grad.mul_((settings.max_grad_norm / (_norm(lm.flat_grad) + 1e-6)).clamp(max=1.0))
            engine.step()
            if shift is not None:
                lm.flat.sub_(shift)
            num_steps += 1
            num_tokens += sum(example.num_tokens for example in chosen)
            scored += sum(len(example.scored) for example in chosen)
    check_gradient(reached=reached, loss=total_nll)
    check_change(lm, anchor, optimizer=settings.optimizer, lr=settings.lr)
    return engine.gather(), TrainStats(num_tokens=num_tokens, num_steps=num_steps, loss=finite_mean(total_nll, scored))


@contextmanager
def factor_hooks(lm: LanguageModel, hook_of: Callable[[int], Hook]) -> Iterator[None]:
    """While open, a forward pass calls `hook_of(i)` after the module that holds the i-th LoRA factor of the layout."""
    handles = [place.module.register_forward_hook(hook_of(index)) for index, place in enumerate(lm.parts().places)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def every_factor_learns(lm: LanguageModel) -> Iterator[None]:
    """While open, a LoRA factor that takes part in a forward pass must get a gradient from the backward pass, be it zero.

    Asked until every factor has had one; what happens to the model's layers afterwards has it asked again (see `LanguageModel.proven`).
    Errors: RuntimeError on leaving, naming a factor that got none.
    """
    if len(lm.proven) == len(lm.layout.names):
        yield
        return
    waiting, seen = set[str](), set[str]()

    def watch(index: int) -> Hook:
        name = lm.layout.names[index]

        def forward_hook(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if name not in seen:  # what is computed again in the backward pass has no gradient of its own
                waiting.add(name)
            seen.add(name)
            if output.requires_grad:
                output.register_hook(lambda _: waiting.discard(name))  # type: ignore[no-untyped-call]  # untyped in torch

        return forward_hook

    with factor_hooks(lm, watch):
        yield
    if waiting:
        raise RuntimeError(f"training: no gradient reached LoRA tensor {min(waiting)} ({len(waiting)} such); it is frozen or detached")
    lm.proven |= seen


@contextmanager
def training_mode(lm: LanguageModel, *, seed: int) -> Iterator[None]:
    """Training mode with dropout drawn from the seed; evaluation mode and the caller's generator state after."""
    lm.check_trainable()
    lm.parts().switch(training=True)
    devices = [lm.device] if lm.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.set_state(torch_rng(seed, "dropout").get_state())
            if devices:
                torch.cuda.manual_seed(seed_for(seed, "dropout"))
            yield
    finally:
        lm.parts().switch(training=False)


def check_gradient(*, reached: bool, loss: float) -> None:
    """Refuses a training in which every gradient was exactly zero while the loss was not: it could never have learned.

    Not asked of a training with noise, in which nothing may be refused for what the data say, and which leaves such a point by itself.
    """
    if not reached and 0.0 < loss < math.inf:
        raise RuntimeError(
            f"training: no gradient reached the adapter although its loss is {loss:.4g}; A and B are both zero, or so large that "
            "float32 loses the gradient in them (lower the learning rate)"
        )


def check_change(lm: LanguageModel, start: torch.Tensor, *, optimizer: str, lr: float) -> None:
    """Refuses a training that left the adapter as it was although its last step, even a fraction of it, would show in float32."""
    check_change_of(lm.flat, lm.flat_grad, start, optimizer=optimizer, lr=lr)


def check_change_of(flat: torch.Tensor, gradient: torch.Tensor, start: torch.Tensor, *, optimizer: str, lr: float) -> None:
    """The same of an adapter and its last gradient that lie elsewhere than in a model."""
    if not torch.equal(flat, start):
        return
    direction = gradient if optimizer == "sgd" else gradient / (gradient.abs() + ADAM_EPS)
    if bool((start - SHOWING * lr * direction != start).any()):
        raise RuntimeError(f"training: the adapter did not change although it has a gradient and the learning rate is {lr:g}")


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm, in float64 where float32 overflows: scaling by an infinite norm would make nothing of a finite gradient."""
    norm: torch.Tensor = gradient.norm()
    return norm if norm.isfinite() else gradient.double().norm()


def accumulate(
    lm: LanguageModel, engine: Engine, examples: Sequence[Example], batch: Sequence[int], *, size: int, weights: Sequence[float] | None
) -> float:
    """The summed loss of a batch's response tokens; the gradient of their mean is then in the model's `flat_grad`.

    `size` examples are in memory at once, 0 for all; with `weights`, the gradient is that of the weighted mean.
    """
    num_scored = torch.tensor(sum(len(examples[i].scored) for i in batch), device=lm.device)
    lm.flat_grad.zero_()
    total = 0.0
    for part in micro_batches(engine.share(batch), size=size):
        nll_B, _ = response_nll(lm, [examples[i] for i, _ in part])
        if not all(counts for _, counts in part):
            nll_B = nll_B * torch.tensor([float(counts) for _, counts in part], device=lm.device)
        weighted_B = nll_B if weights is None else nll_B * torch.tensor([weights[i] for i, _ in part], device=lm.device)
        engine.backward(weighted_B.sum() / num_scored)
        total += float(nll_B.detach().sum())
    return engine.gathered(total)


def micro_batches(batch: Sequence[T], *, size: int) -> list[Sequence[T]]:
    """The batch in parts of `size`, or whole where that is 0."""
    return [batch[start : start + size] for start in range(0, len(batch), size)] if size else [batch]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device, or this machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def finite_mean(total: float, count: int) -> float | None:
    """None for a training that diverged: its update is dropped, and no record of a run holds a NaN."""
    return total / count if math.isfinite(total) else None


def epochs(lengths: Sequence[int], *, settings: TrainSettings, seed: int) -> Iterator[list[int]]:
    """The batches of a training in order: of every epoch, up to `max_steps`."""
    steps = 0
    for epoch in range(settings.num_epochs):
        for batch in grouped_batches(lengths, batch_size=settings.batch_size, rng=numpy_rng(seed, "batches", epoch)):
            if settings.max_steps and steps == settings.max_steps:
                return
            yield batch
            steps += 1
