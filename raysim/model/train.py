"""Local LoRA training: batches without wasted padding, loss on the response only, and private steps with per-example clipping.

The head of the model runs on response positions alone: with a vocabulary of 49,152 and prompts longer than answers,
that is a fifth of the work and most of the memory. Batches are padded on the right and need no attention mask, since
under causal attention no real position sees what follows it.
Left out: multi-process engines for clients bigger than one device.

Shape legend: B = batch, T = tokens, D = hidden size, V = vocabulary, N = scored (response) positions of a batch,
R = LoRA rank, P = parameters of the adapter.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.privacy.canaries import canary_direction
from raysim.privacy.noise import gaussian
from raysim.rng import numpy_rng, seed_for, torch_rng

PRIVATE_BATCH = 8
"""Examples of a private step that are in memory at once (a step of many is the better one, and activations are what takes the memory)."""
GROUPING_WINDOW = 8
"""Batches among which examples are sorted by length: the fewer, the more random; the more, the less padding."""

MARGIN = 1.0 - 2.0**-40
"""Gradients are scaled to this share of the clipping bound, so that rounding cannot lift them over it."""


ADAM_EPS = 1e-8
"""Added to the denominator of an AdamW step (torch's default)."""

TRIED_STD = 0.02
"""Standard deviation of the adapter on which private training is tried before a run."""
TRIED_ERROR = 0.05
"""Most that its gradients may be off, as a share of their norm: bfloat16 is coarse, and a layer that is missed or mixed up is off by more."""
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
    canary_seeds: tuple[int, ...] = ()
    """An audit's canaries: random directions that join each step as the gradients of further examples."""
    canary_norm: float = 0.0
    """Norm of a canary's gradient before clipping."""


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
    nll_B = torch.zeros(len(examples), device=lm.device).index_add(0, row_N, nll_N)
    return nll_B, torch.tensor([len(example.scored) for example in examples], device=lm.device)


def response_token_nll(lm: LanguageModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood (nats) of every scored token, and the example each belongs to, both of shape (N,), in order.

    Equal to masking the labels of the model's full logits_BTV, as `LanguageModel.logits_at` gives them.
    """
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
    logits_NV = lm.logits_at(ids_BT, row_N, column_N - 1, use_cache=False)
    return F.cross_entropy(logits_NV.float(), ids_BT[row_N, column_N], reduction="none"), row_N


@torch.no_grad()
def mean_nll(lm: LanguageModel, examples: Sequence[Example], *, batch_size: int) -> list[tuple[float, int]]:
    """Summed response NLL (nats) and number of response tokens of each example, in order; no gradient."""
    lm.model.eval()
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    results: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
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
    optimizer = _optimizer(lm, settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay)
    shift = None if correction is None else torch.tensor(settings.lr * correction, device=lm.device)
    lengths = [example.num_tokens for example in examples]
    num_tokens = num_steps = scored = 0
    total_nll, reached = 0.0, False
    with _training(lm, seed=seed):
        for batch in _epochs(lengths, settings=settings, seed=seed):
            chosen = [examples[i] for i in batch]
            lm.flat_grad.zero_()
            with nullcontext() if num_steps else _every_factor_learns(lm):
                nll_B, count_B = response_nll(lm, chosen)
                weighted_B = nll_B if weights is None else nll_B * torch.tensor([weights[i] for i in batch], device=lm.device)
                (weighted_B.sum() / count_B.sum()).backward()  # type: ignore[no-untyped-call]  # untyped in torch
            reached = reached or bool(lm.flat_grad.any())
            if settings.prox_mu > 0:
                lm.flat_grad.add_(lm.flat - anchor, alpha=settings.prox_mu)
            if settings.max_grad_norm > 0:
                lm.flat_grad.mul_((settings.max_grad_norm / (_norm(lm.flat_grad) + 1e-6)).clamp(max=1.0))
            optimizer.step()
            if shift is not None:
                lm.flat.sub_(shift)
            num_steps += 1
            num_tokens += sum(example.num_tokens for example in chosen)
            total_nll += float(nll_B.detach().sum())
            scored += int(count_B.sum())
    _check_gradient(reached=reached, loss=total_nll)
    _check_change(lm, anchor, optimizer=settings.optimizer, lr=settings.lr)
    return lm.get_adapter(), TrainStats(num_tokens=num_tokens, num_steps=num_steps, loss=_finite_mean(total_nll, scored))


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
    optimizer = _optimizer(lm, settings.optimizer, lr=settings.lr, weight_decay=0.0)
    losses: list[float] = []
    num_tokens = num_clipped = 0
    start, reached = lm.flat.clone(), settings.noise_multiplier > 0
    with _training(lm, seed=seed):
        for step in range(settings.num_steps):
            drawn = np.flatnonzero(numpy_rng(seed, "poisson", step).random(len(examples)) < settings.sampling_prob)
            chosen = [examples[i] for i in drawn.tolist()]
            total, norms, batch_losses = clipped_gradient_sum(
                lm, chosen, clip_norm=settings.clip_norm, max_batch=min(settings.batch_size, PRIVATE_BATCH)
            )
            total += _canary_gradients(lm, settings, seed=seed, step=step)
            std = settings.noise_multiplier * settings.clip_norm
            noise = gaussian(lm.layout.num_parameters, std=std, seed=seed_for(seed, "noise", step), secure=settings.secure_noise)
            lm.flat_grad.copy_((total + torch.from_numpy(noise).to(lm.device)) / settings.batch_size)
            optimizer.step()
            losses += batch_losses
            num_tokens += sum(example.num_tokens for example in chosen)
            num_clipped += sum(norm > settings.clip_norm for norm in norms)
            reached = reached or any(norm > 0.0 for norm in norms)
    _check_gradient(reached=reached, loss=sum(losses))
    _check_change(lm, start, optimizer=settings.optimizer, lr=settings.lr)
    loss = _finite_mean(sum(losses), len(losses)) if losses else None
    clip_fraction = num_clipped / len(losses) if losses else None
    return lm.get_adapter(), TrainStats(num_tokens=num_tokens, num_steps=settings.num_steps, loss=loss, clip_fraction=clip_fraction)


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
    start = lm.flat.clone()
    with _training(lm, seed=seed), _every_factor_learns(lm):
        lm.flat_grad.zero_()
        nll_B, count_B = response_nll(lm, chosen)
        (nll_B / count_B).mean().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    nll = float(nll_B.detach().sum())
    _check_gradient(reached=settings.noise_multiplier > 0 or bool(lm.flat_grad.any()), loss=nll)
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
        lm.flat.sub_(lm.flat_grad, alpha=settings.lr)
    _check_change(lm, start, optimizer="sgd", lr=settings.lr)
    stats = TrainStats(
        num_tokens=sum(example.num_tokens for example in chosen),
        num_steps=1,
        loss=_finite_mean(nll, int(count_B.sum())),
        clip_fraction=num_clipped / 2,
    )
    return lm.get_adapter(), stats


def clipped_gradient_sum(
    lm: LanguageModel, examples: Sequence[Example], *, clip_norm: float, max_batch: int
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
    total = torch.zeros_like(lm.flat, dtype=torch.float64)
    norms: list[float] = []
    losses: list[float] = []
    for start in range(0, len(examples), max_batch):
        batch = examples[start : start + max_batch]
        per_example = torch.zeros(len(batch), lm.layout.num_parameters, device=lm.device)
        with _every_factor_learns(lm), _per_example_gradients(lm, per_example, batch):
            nll_B, count_B = response_nll(lm, batch)
            (nll_B / count_B).sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
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


def _canary_gradients(lm: LanguageModel, settings: PrivateSettings, *, seed: int, step: int) -> torch.Tensor:
    """The clipped sum of the canaries that the step's sampler draws, float64 of shape (P,): as if each were an example's gradient."""
    total = torch.zeros_like(lm.flat, dtype=torch.float64)
    for index, canary_seed in enumerate(settings.canary_seeds):
        if numpy_rng(seed, "canary poisson", step, index).random() < settings.sampling_prob:
            gradient = torch.from_numpy(canary_direction(canary_seed, size=len(total))).to(lm.device).double() * settings.canary_norm
            total += clip_factors(gradient.norm(), clip_norm=settings.clip_norm) * gradient
    return total


@contextmanager
def _per_example_gradients(lm: LanguageModel, per_example: torch.Tensor, batch: Sequence[Example]) -> Iterator[None]:
    """While open, a backward pass over the batch writes each example's gradient of every LoRA factor into `per_example`, shape (B, P)."""
    handles = []
    modules = dict(lm.model.named_modules())

    def watch(module: torch.nn.Module, start: int, end: int) -> None:
        def forward_hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            x = inputs[0].detach()

            def backward_hook(grad: torch.Tensor) -> None:
                for rows, product in _products(grad.float(), x.float(), batch):
                    per_example[rows, start:end] += product.reshape(len(product), -1)

            output.register_hook(backward_hook)  # type: ignore[no-untyped-call]  # untyped in torch

        handles.append(module.register_forward_hook(forward_hook))

    for name, (start, end) in zip(lm.layout.names, lm.layout.spans(), strict=True):
        watch(modules[name.removesuffix(".weight") + ".default"], start, end)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        with _training(lm, seed=0):
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


@contextmanager
def _every_factor_learns(lm: LanguageModel) -> Iterator[None]:
    """While open, a LoRA factor that takes part in a forward pass must get a gradient from the backward pass, be it zero.

    Errors: RuntimeError on leaving, naming a factor that got none.
    """
    handles = []
    waiting: set[str] = set()
    modules = dict(lm.model.named_modules())

    def watch(name: str) -> None:
        def forward_hook(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            waiting.add(name)
            if output.requires_grad:
                output.register_hook(lambda _: waiting.discard(name))  # type: ignore[no-untyped-call]  # untyped in torch

        handles.append(modules[name.removesuffix(".weight") + ".default"].register_forward_hook(forward_hook))

    for name in lm.layout.names:
        watch(name)
    try:
        yield
        if waiting:
            raise RuntimeError(f"training: no gradient reached LoRA tensor {min(waiting)} ({len(waiting)} such); it is frozen or detached")
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _training(lm: LanguageModel, *, seed: int) -> Iterator[None]:
    """Training mode with dropout drawn from the seed; evaluation mode and the caller's generator state after."""
    lm.check_trainable()
    lm.model.train()
    devices = [lm.device] if lm.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.set_state(torch_rng(seed, "dropout").get_state())
            if devices:
                torch.cuda.manual_seed(seed_for(seed, "dropout"))
            yield
    finally:
        lm.model.eval()


def _check_gradient(*, reached: bool, loss: float) -> None:
    """Refuses a training in which every gradient was exactly zero while the loss was not: it could never have learned.

    Not asked of a training with noise, in which nothing may be refused for what the data say, and which leaves such a point by itself.
    """
    if not reached and 0.0 < loss < math.inf:
        raise RuntimeError(
            f"training: no gradient reached the adapter although its loss is {loss:.4g}; A and B are both zero, or so large that "
            "float32 loses the gradient in them (lower the learning rate)"
        )


def _check_change(lm: LanguageModel, start: torch.Tensor, *, optimizer: str, lr: float) -> None:
    """Refuses a training that left the adapter as it was although its last step, even a fraction of it, would show in float32."""
    if not torch.equal(lm.flat, start):
        return
    direction = lm.flat_grad if optimizer == "sgd" else lm.flat_grad / (lm.flat_grad.abs() + ADAM_EPS)
    if bool((start - SHOWING * lr * direction != start).any()):
        raise RuntimeError(f"training: the adapter did not change although it has a gradient and the learning rate is {lr:g}")


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm, in float64 where float32 overflows: scaling by an infinite norm would make nothing of a finite gradient."""
    norm: torch.Tensor = gradient.norm()
    return norm if norm.isfinite() else gradient.double().norm()


def _finite_mean(total: float, count: int) -> float | None:
    """None for a training that diverged: its update is dropped, and no record of a run holds a NaN."""
    return total / count if math.isfinite(total) else None


def _optimizer(lm: LanguageModel, name: str, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    lm.flat.grad = lm.flat_grad
    if name == "sgd":
        return torch.optim.SGD([lm.flat], lr=lr)
    return torch.optim.AdamW([lm.flat], lr=lr, eps=ADAM_EPS, weight_decay=weight_decay)


def _epochs(lengths: Sequence[int], *, settings: TrainSettings, seed: int) -> Iterator[list[int]]:
    steps = 0
    for epoch in range(settings.num_epochs):
        for batch in grouped_batches(lengths, batch_size=settings.batch_size, rng=numpy_rng(seed, "batches", epoch)):
            if settings.max_steps and steps == settings.max_steps:
                return
            yield batch
            steps += 1
