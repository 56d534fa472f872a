"""Bounded sums of updates and the noise that goes with the bound. The sensitivity is stated here and nowhere else.

With `clip_norm` set, every update enters the sum with weight 1 and L2 norm at most `clip_norm`, and an update that is
not finite enters as zero. So adding or removing one client moves the sum by at most `clip_norm` (not twice that: the
relation is add/remove, not replace). `noise_and_divide` adds noise to that same sum and divides by a number that does
not depend on who came.

Left out: how the bound is chosen (the mechanism's business), and weights under clipping (a weight is a second, unbounded factor).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysim.privacy.noise import gaussian

Vector = npt.NDArray[np.float32]
Total = npt.NDArray[np.float64]

MARGIN = 1.0 - 2.0**-40
"""Updates are scaled to this share of the bound, so that rounding in the measured norm cannot lift them over it."""
BLOCK = 2**15
"""Entries that are worked on at once: 256 KiB in float64, which a core's cache holds, where a whole update would go to memory and back each time."""
FLOAT32_BITS = np.int64(~(2**29 - 1))
"""The bits of a float64 that a float32 has room for."""

Entry = tuple[Vector, float, Vector | None]
"""An update, its weight, and the noise that comes with it."""


@dataclass(frozen=True)
class ChunkSum:
    """The sum over a chunk of clients, and what the record of the round says about them."""

    total: Total
    """Sum of weight times (clipped) update, in float64: in float32 the rounding of a large sum would itself exceed the bound."""
    weight: float
    """Sum of the weights of the updates that were kept."""
    norms: tuple[float, ...]
    """L2 norm of each kept update before clipping."""
    num_clipped: int
    """How many kept updates were longer than the bound."""
    num_dropped: int
    """How many updates were not finite and count as zero."""
    clip_norm: float | None
    """The bound that was applied; None for none."""
    further: Mapping[str, Total] = field(default_factory=dict)
    """Sums of weight times each other tensor that clients sent, by name (never under clipping, which bounds the adapter's update alone)."""


@dataclass(frozen=True)
class ChunkStack:
    """A chunk of clients each by itself, for rules that need every client's own upload; bounded as in `ChunkSum`."""

    uploads: tuple[Mapping[str, Vector], ...]
    weights: tuple[float, ...]
    norms: tuple[float, ...]
    num_clipped: int
    num_dropped: int
    clip_norm: float | None

    @property
    def weight(self) -> float:
        """Sum of the weights of the uploads that were kept."""
        return sum(self.weights)

    @property
    def further(self) -> dict[str, Total]:
        """Sums of weight times each tensor beside the adapter, by name, as those of a `ChunkSum`."""
        names = [name for name in self.uploads[0] if name != "adapter"] if self.uploads else []
        return {name: weighted_sum([upload[name] for upload in self.uploads], self.weights) for name in names}


def clip_and_sum(
    updates: Sequence[Vector], *, weights: Sequence[float], clip_norm: float | None, noises: Sequence[Vector | None] = ()
) -> ChunkSum:
    """The weighted sum of a chunk's updates, in the order given, each clipped to `clip_norm` unless that is None.

    `noises` (one an update, or none at all) are added after clipping, for updates that are left out as well: whether noise
    comes must not depend on the data.

    Guarantees: with `clip_norm`, one update more or less moves `total` by at most `clip_norm`, whatever its values.
    Edge cases: an update with a NaN or an infinity is left out and counted.
    """
    assert updates, "a chunk holds at least one client"
    assert len(updates) == len(weights), f"{len(updates)} updates but {len(weights)} weights"
    total = sum_entries(zip(updates, weights, noises or [None] * len(updates), strict=True), clip_norm=clip_norm)
    assert total is not None, "there is an update"
    return total


def sum_entries(entries: Iterable[Entry], *, clip_norm: float | None) -> ChunkSum | None:
    """What `clip_and_sum` returns of entries that come one by one, each of which is let go once it is added; None if there are none."""
    total: Total | None = None
    kept_weight, norms, num_clipped, num_dropped = 0.0, list[float](), 0, 0
    for update, weight, noise in entries:
        assert clip_norm is None or weight == 1.0, f"clipping bounds a sum with weights of 1 only, not {weight}"
        total = np.zeros(len(update), dtype=np.float64) if total is None else total
        if noise is not None:
            total += noise
        assert update.shape == total.shape, f"an update of shape {update.shape} in a chunk of shape {total.shape}"
        norm = l2_norm(update)
        if not np.isfinite(norm):  # squares in float64 neither overflow nor cancel: an entry is a NaN or infinite
            num_dropped += 1
            continue
        if clip_norm is not None:
            update = clip(update, clip_norm=clip_norm, norm=norm)
            num_clipped += norm > clip_norm
        add_weighted(total, update, weight)
        kept_weight += weight
        norms.append(norm)
    return None if total is None else ChunkSum(total, kept_weight, tuple(norms), num_clipped, num_dropped, clip_norm)


def add_weighted(total: Total, update: Vector, weight: float) -> None:
    """Adds weight times update to `total`, in float64."""
    scratch = np.empty(min(BLOCK, len(update)))
    for block in _blocks(len(update)):
        part = scratch[: block.stop - block.start]
        part[...] = update[block]
        if weight != 1.0:
            part *= weight
        total[block] += part


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def weighted_sum(tensors: Sequence[Vector], weights: Sequence[float]) -> Total:
    """The sum of weight times tensor, in float64 and in the order given."""
    total = np.zeros(len(tensors[0]), dtype=np.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        add_weighted(total, tensor, weight)
    return total


def stack(uploads: Sequence[Mapping[str, Vector]], *, weights: Sequence[float], clip_norm: float | None) -> ChunkStack:
    """A chunk's uploads in the order given, their adapters clipped to `clip_norm` unless that is None; what is not finite is left out and counted."""
    finite = [(upload, w) for upload, w in zip(uploads, weights, strict=True) if all(np.isfinite(t).all() for t in upload.values())]
    norms = tuple(l2_norm(upload["adapter"]) for upload, _ in finite)
    if clip_norm is not None:
        finite = [({**upload, "adapter": clip(upload["adapter"], clip_norm=clip_norm)}, w) for upload, w in finite]
    num_clipped = 0 if clip_norm is None else sum(norm > clip_norm for norm in norms)
    kept, kept_weights = tuple(upload for upload, _ in finite), tuple(w for _, w in finite)
    return ChunkStack(kept, kept_weights, norms, num_clipped, len(uploads) - len(finite), clip_norm)


def noise_and_divide(
    total: Total, *, noise_std: float, denominator: float, seed: int, secure: bool, earlier: Sequence[tuple[float, int]] = ()
) -> Vector:
    """(total + N(0, noise_std^2 I)) / denominator, in float32: the average that is released.

    `earlier` lists weights and seeds of noise that earlier rounds added, of which this round adds so much (correlated noise).

    `noise_std` is on the sum, so it is the noise multiplier times `clip_norm`; `denominator` must not depend on the cohort
    where there is noise. Equal arguments give equal bits unless `secure`.
    """
    if not denominator > 0.0:
        raise ValueError(f"denominator={denominator!r} must be greater than 0")
    noisy = total if noise_std == 0.0 else total + gaussian(len(total), std=noise_std, seed=seed, secure=secure)
    if noise_std > 0.0:
        assert not (earlier and secure), "noise that nobody can repeat cannot be added again"
        for weight, earlier_seed in earlier:
            noisy = noisy + weight * gaussian(len(total), std=noise_std, seed=earlier_seed, secure=False).astype(np.float64)
    with np.errstate(over="ignore"):
        return (noisy / denominator).astype(np.float32)


def clip(update: Vector, *, clip_norm: float, norm: float | None = None) -> Vector:
    """`update` scaled down to L2 norm at most `clip_norm` (over all its coordinates together); itself if it is shorter.

    `norm` is its L2 norm where that is known. Equal to rounding `update * (clip_norm / norm * MARGIN)` toward zero.
    Guarantees: the norm of the float32 result, in exact arithmetic, is at most `clip_norm`, for every finite input: the scaling is done
    in float64, and the result is rounded toward zero.
    """
    if not clip_norm > 0.0:
        raise ValueError(f"clip_norm={clip_norm!r} must be greater than 0")
    norm = l2_norm(update) if norm is None else norm
    if norm <= clip_norm * MARGIN:
        return update
    clipped, scratch = np.empty(len(update), dtype=np.float32), np.empty(min(BLOCK, len(update)))
    for block in _blocks(len(update)):
        exact = scratch[: block.stop - block.start]
        exact[...] = update[block]
        exact *= clip_norm / norm * MARGIN
        clipped[block] = _toward_zero(exact)
    return clipped


def _toward_zero(exact: Total) -> Vector:
    """The numbers in float32, rounded toward zero; writes over `exact`."""
    bits = exact.view(np.int64)
    bits &= FLOAT32_BITS
    rounded = exact.astype(np.float32)
    if np.array_equal(rounded, exact):
        return rounded
    return np.where(np.abs(rounded) > np.abs(exact), np.nextafter(rounded, np.float32(0)), rounded)  # below the smallest normal number


def l2_norm(update: Vector | Total) -> float:
    """The L2 norm, squared and summed in float64, where neither 1e38 overflows nor a float32 denormal vanishes.

    Equal in every bit to `np.sqrt(np.sum(np.square(update, dtype=np.float64)))`.
    """
    return float(np.sqrt(_sum_of_squares(update.ravel(), np.empty(min(BLOCK, update.size)))))


def _sum_of_squares(values: Vector | Total, scratch: Total) -> np.float64:
    """The sum of squares, halved where numpy's own pairwise summation halves."""
    if len(values) <= BLOCK:
        squares = scratch[: len(values)]
        squares[...] = values
        squares *= squares
        return np.float64(np.add.reduce(squares))
    middle = len(values) // 2
    middle -= middle % 8
    return np.float64(_sum_of_squares(values[:middle], scratch) + _sum_of_squares(values[middle:], scratch))
