"""Private local training: per-example gradients clipped and noised (DP-SGD), and DP-LoRA's step as it was published.

Left out: ghost clipping, which would need a second backward pass; a LoRA factor's per-example gradients are small.

Shape legend: B = batch, T = tokens, D = hidden size, N = scored (response) positions of a batch, P = parameters of the adapter.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.model.engine import Engine, make_engine
from raysim.model.language_model import LanguageModel
from raysim.model.train import (
    Hook,
    TrainStats,
    check_change,
    check_gradient,
    every_factor_learns,
    factor_hooks,
    finite_mean,
    micro_batches,
    response_nll,
    training_mode,
)
from raysim.privacy.canaries import Directions, canary_directions, mixture
from raysim.privacy.noise import gaussian
from raysim.rng import numpy_rng, seed_for

PRIVATE_BATCH = 8
"""Examples of a private step that are in memory at once (a step of many is the better one, and activations are what takes the memory)."""


MARGIN = 1.0 - 2.0**-40
"""Gradients are scaled to this share of the clipping bound, so that rounding cannot lift them over it."""


TRIED_STD = 0.02
"""Standard deviation of the adapter on which private training is tried before a run."""


TRIED_ERROR = 0.05
"""Most that its gradients may be off, as a share of their norm: bfloat16 is coarse, and a layer that is missed or mixed up is off by more."""


@dataclass(frozen=True)
class PrivateSettings:
    """What private local training needs: DP-SGD (Abadi et al. 2016, arXiv 1607.00133).

    `batch_size` is the fixed divisor B, `sampling_prob` the probability of each example to be in a step's Poisson batch.
    """

    num_steps: int
    batch_size: int
    sampling_prob: float
    lr: float
    optimizer: str
    clip_norm: float
    noise_multiplier: float
    secure_noise: bool
    micro_batch_size: int = 0
    """Examples in memory at once; 0 for `PRIVATE_BATCH`."""
    keep_activations: bool = True
    """Whether activations are kept for the backward pass, or computed again."""
    canaries: tuple[int, ...] = ()
    """An audit's canaries that are in this client's training: directions that join each step as the gradients of further examples."""
    num_canaries: int = 0
    """Canaries of the whole run, among whom the coordinates are dealt."""
    canary_seed: int = 0
    """From which the directions are drawn."""
    canary_norm: float = 0.0
    """Norm of a canary's gradient before clipping."""


def train_private(
    lm: LanguageModel, adapter: Vector, examples: Sequence[Example], *, settings: PrivateSettings, seed: int
) -> tuple[Vector, TrainStats]:
    """The adapter after `num_steps` of DP-SGD on `examples`: Poisson batches, per-example clipping, noise sigma C / B.

    Guarantees: each step's sum of clipped gradients moves by at most `clip_norm` when one example is added or removed,
    and carries Gaussian noise of standard deviation `noise_multiplier * clip_norm`; the divisor is `batch_size`,
    never the realised batch. The loss of an example is the mean over its own response tokens.
    Errors: RuntimeError if a LoRA tensor is frozen, or if, without noise, nothing was learned although an example had a loss to lower.
    """
    lm.set_adapter(adapter)
    if not examples:
        return lm.get_adapter(), TrainStats(num_tokens=0, num_steps=0, loss=None)
    engine, directions = make_engine(lm, settings.optimizer, lr=settings.lr), _directions(lm, settings)
    lm.keep_activations(settings.keep_activations)
    losses: list[float] = []
    num_tokens = num_clipped = 0
    start, reached = lm.flat.clone(), settings.noise_multiplier > 0
    with training_mode(lm, seed=seed):
        for step in range(settings.num_steps):
            drawn = np.flatnonzero(numpy_rng(seed, "poisson", step).random(len(examples)) < settings.sampling_prob)
            chosen = [examples[i] for i in drawn.tolist()]
            total, norms, batch_losses = clipped_gradient_sum(
                lm,
                chosen,
                clip_norm=settings.clip_norm,
                max_batch=settings.micro_batch_size or min(settings.batch_size, PRIVATE_BATCH),
                engine=engine,
            )
            if directions is not None:
                total += _canary_gradients(directions, settings, seed=seed, step=step).to(lm.device)
            std = settings.noise_multiplier * settings.clip_norm
            noise = gaussian(lm.layout.num_parameters, std=std, seed=seed_for(seed, "noise", step), secure=settings.secure_noise)
            lm.flat_grad.copy_((total + torch.from_numpy(noise).to(lm.device)) / settings.batch_size)
            engine.step()
            losses += batch_losses
            num_tokens += sum(example.num_tokens for example in chosen)
            num_clipped += sum(norm > settings.clip_norm for norm in norms)
            reached = reached or any(norm > 0.0 for norm in norms)
    check_gradient(reached=reached, loss=sum(losses))
    check_change(lm, start, optimizer=settings.optimizer, lr=settings.lr)
    loss = finite_mean(sum(losses), len(losses)) if losses else None
    clip_fraction = num_clipped / len(losses) if losses else None
    return engine.gather(), TrainStats(num_tokens=num_tokens, num_steps=settings.num_steps, loss=loss, clip_fraction=clip_fraction)


def train_literal(
    lm: LanguageModel, adapter: Vector, examples: Sequence[Example], *, settings: PrivateSettings, seed: int
) -> tuple[Vector, TrainStats]:
    """The adapter after one step of DP-LoRA as published: Liu et al. (2023), arXiv 2312.17493, algorithm 1.

    The gradient of the mean batch loss is clipped to C for the A factors and for the B factors separately, noise of
    standard deviation sigma C per coordinate is added to both (not divided by the batch), and plain SGD follows.
    Guarantees: one example may move each clipped group anywhere in its ball, so the joint sensitivity is 2 sqrt(2) C; a group whose
    gradient is not finite counts as zero.
    Errors: RuntimeError if a LoRA tensor is frozen, or if, without noise, no gradient reached the adapter that had a loss to lower.
    """
    lm.set_adapter(adapter)
    if not examples:
        return lm.get_adapter(), TrainStats(num_tokens=0, num_steps=0, loss=None)
    size = min(settings.batch_size, len(examples))
    chosen = [examples[i] for i in numpy_rng(seed, "batch").choice(len(examples), size=size, replace=False)]
    start, engine = lm.flat.clone(), make_engine(lm, "sgd", lr=settings.lr)
    lm.keep_activations(settings.keep_activations)
    nll, scored = 0.0, sum(len(example.scored) for example in chosen)
    with training_mode(lm, seed=seed), every_factor_learns(lm):
        lm.flat_grad.zero_()
        for part in micro_batches(range(size), size=settings.micro_batch_size):
            nll_B, count_B = response_nll(lm, [chosen[i] for i in part])
            engine.backward((nll_B / count_B).mean() * (len(part) / size))
            nll += float(nll_B.detach().sum())
    check_gradient(reached=settings.noise_multiplier > 0 or bool(lm.flat_grad.any()), loss=nll)
    num_clipped = 0
    for group in ("A", "B"):
        mask = torch.from_numpy(lm.layout.group_mask(group)).to(lm.device)
        norm = float(lm.flat_grad[mask].double().norm())
        num_clipped += norm > settings.clip_norm
        if math.isfinite(norm):
            lm.flat_grad[mask] /= max(1.0, norm / settings.clip_norm)
        else:
            lm.flat_grad[mask] = 0.0
    std = settings.noise_multiplier * settings.clip_norm
    noise = gaussian(lm.layout.num_parameters, std=std, seed=seed_for(seed, "noise", 0), secure=settings.secure_noise)
    with torch.no_grad():
        lm.flat_grad.add_(torch.from_numpy(noise).to(lm.device))
    engine.step()
    check_change(lm, start, optimizer="sgd", lr=settings.lr)
    stats = TrainStats(
        num_tokens=sum(example.num_tokens for example in chosen),
        num_steps=1,
        loss=finite_mean(nll, scored),
        clip_fraction=num_clipped / 2,
    )
    return engine.gather(), stats


def clipped_gradient_sum(
    lm: LanguageModel, examples: Sequence[Example], *, clip_norm: float, max_batch: int, engine: Engine | None = None
) -> tuple[torch.Tensor, list[float], list[float]]:
    """The sum over examples of their gradients clipped to `clip_norm`, float64 of shape (P,); the norms; the losses (nats a token).

    The gradient of a LoRA factor for one example is the product of what went into the factor and of the gradient at its
    output, both of which one ordinary backward pass has anyway: no per-example gradient of the base model exists.
    Equal to clipping each example's own backward pass. An example with a non-finite gradient contributes zero, and its norm
    and loss are left out. The sum is taken in float64: in float32 its rounding, or a scale below the smallest normal number,
    could exceed the bound. Examples are processed `max_batch` at a time, which bounds memory and changes no sum but in its last bits
    (with an adapter so large that float32 loses itself in it, entries of a hundred and more, others in the batch change more than that).

    Errors: RuntimeError naming a LoRA factor that took part and got no gradient.
    """
    if not clip_norm > 0:
        raise ValueError(f"privacy.clip_norm={clip_norm!r} must be greater than 0")
    engine = engine or make_engine(lm, "sgd", lr=0.0)
    total = torch.zeros_like(lm.flat, dtype=torch.float64)
    norms: list[float] = []
    losses: list[float] = []
    for start in range(0, len(examples), max_batch):
        batch = examples[start : start + max_batch]
        per_example = torch.zeros(len(batch), lm.layout.num_parameters, device=lm.device)
        with every_factor_learns(lm), _per_example_gradients(lm, per_example, batch):
            nll_B, count_B = response_nll(lm, batch)
            engine.backward((nll_B / count_B).sum())
        if lm.frozen is not None:
            per_example[:, lm.frozen] = 0.0
        finite_B = per_example.isfinite().all(dim=1)
        exact = per_example[finite_B].double()
        norm_B = exact.norm(dim=1)
        total += clip_factors(norm_B, clip_norm=clip_norm) @ exact
        norms += norm_B.tolist()
        losses += (nll_B / count_B)[finite_B].tolist()
    return total, norms, losses


def clip_factors(norm_B: torch.Tensor, *, clip_norm: float) -> torch.Tensor:
    """What each example's gradient is multiplied by so that its norm is at most `clip_norm`."""
    return clip_norm / norm_B.clamp(min=clip_norm) * MARGIN


def _canary_gradients(directions: Directions, settings: PrivateSettings, *, seed: int, step: int) -> torch.Tensor:
    """The clipped sum of the canaries that the step's sampler draws, float64 of shape (P,): as if each were an example's gradient."""
    draws_M = numpy_rng(seed, "canary poisson", step).random(settings.num_canaries)
    weight_M = np.zeros(settings.num_canaries)
    weight_M[[i for i in settings.canaries if draws_M[i] < settings.sampling_prob]] = settings.canary_norm
    factor_M = clip_factors(torch.from_numpy(weight_M), clip_norm=settings.clip_norm).numpy()
    return torch.from_numpy(mixture(directions, factor_M * weight_M))


def frozen_coordinates(lm: LanguageModel) -> npt.NDArray[np.bool_] | None:
    """Which entries of the adapter no step changes, bool of shape (P,); None where every entry is trained."""
    return None if lm.frozen is None else np.asarray(lm.frozen.cpu().numpy())


def _directions(lm: LanguageModel, settings: PrivateSettings) -> Directions | None:
    if not settings.canaries:
        return None
    size, frozen = lm.layout.num_parameters, frozen_coordinates(lm)
    return canary_directions(settings.num_canaries, size=size, seed=settings.canary_seed, frozen=frozen)


@contextmanager
def _per_example_gradients(lm: LanguageModel, per_example: torch.Tensor, batch: Sequence[Example]) -> Iterator[None]:
    """While open, a backward pass over the batch writes each example's gradient of every LoRA factor into `per_example`, shape (B, P)."""
    spans = lm.layout.spans()

    def watch(index: int) -> Hook:
        start, end = spans[index]

        def forward_hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            x = inputs[0].detach()

            def backward_hook(grad: torch.Tensor) -> None:
                for rows, product in _products(grad.float(), x.float(), batch):
                    per_example[rows, start:end] += product.reshape(len(product), -1)

            output.register_hook(backward_hook)  # type: ignore[no-untyped-call]  # untyped in torch

        return forward_hook

    with factor_hooks(lm, watch):
        yield


def _products(grad: torch.Tensor, x: torch.Tensor, batch: Sequence[Example]) -> Iterator[tuple[slice, torch.Tensor]]:
    """The gradients of a factor, of shape (examples, out, in), for slices of the batch: of each example, the sum over its tokens of grad x^T.

    A layer sees the batch as BTD, as one row a token (OPT's feed-forward part), or, as the output layer does, the scored tokens alone.
    Errors: RuntimeError for a layer that sees other rows, such as an expert that is given some of the tokens.
    """
    width = max(example.num_tokens for example in batch)
    num_rows = x.shape[:-1].numel()
    if x.dim() == 3 and len(x) == len(batch):
        yield slice(None), torch.einsum("bto,bti->boi", grad, x)
    elif num_rows == len(batch) * width:
        shaped = (len(batch), width, -1)
        yield slice(None), torch.einsum("bto,bti->boi", grad.reshape(shaped), x.reshape(shaped))
    elif num_rows == sum(len(example.scored) for example in batch):
        grad_NO, x_NI, first = grad.flatten(0, -2), x.flatten(0, -2), 0
        for index, example in enumerate(batch):
            rows = slice(first, first := first + len(example.scored))
            yield slice(index, index + 1), (grad_NO[rows].T @ x_NI[rows])[None]
    else:
        raise RuntimeError(
            f"training: an adapted layer saw {num_rows} rows for {len(batch)} examples, so no gradient can be told apart by example"
        )


def check_private(lm: LanguageModel, examples: Sequence[Example]) -> None:
    """Refuses a model of which per-example gradients cannot be had, so that a run does so before it starts: those of two examples must add up to
    the gradient of both. A random adapter is tried, since a fresh one has no gradient at A; the model's own is loaded again.

    Errors: ValueError naming `lora.target_modules`.
    """
    own = lm.get_adapter()
    lm.set_adapter((TRIED_STD * numpy_rng(0, "tried").standard_normal(len(own))).astype(np.float32))
    reason = "the gradients of single examples do not add up to that of the batch"
    try:
        with training_mode(lm, seed=0):
            lm.flat_grad.zero_()
            total, _, _ = clipped_gradient_sum(lm, examples[:2], clip_norm=1e30, max_batch=2)
            whole = lm.flat_grad.double()
        is_right = bool((total - whole).norm() <= TRIED_ERROR * whole.norm())
    except RuntimeError as error:
        is_right, reason = False, str(error)
    finally:
        lm.flat_grad.zero_()
        lm.set_adapter(own)
    if not is_right:
        raise ValueError(f"lora.target_modules: private training cannot adapt these layers of this model ({reason}); choose others")
