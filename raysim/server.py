"""The server of a round: a state, and a pure transition from one to the next.

Left out: server-side momentum and adaptive optimizers; keeping the state alive (an actor's business) and saving it (the
checkpoint's). Averaging the flat vector is averaging every A and every B separately, as FedIT does
(Zhang et al. 2024, arXiv 2305.05644).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raysim.privacy.clipping import ChunkSum, Total, l2_norm, noise_and_divide
from raysim.privacy.mechanism import Mechanism
from raysim.rng import seed_for


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds."""

    round_index: int
    """Rounds done, and so the index of the next."""
    adapter: npt.NDArray[np.float32]
    """The released adapter, one flat vector."""


def step(state: ServerState, sums: Sequence[ChunkSum], *, mechanism: Mechanism, lr: float, seed: int) -> tuple[ServerState, dict[str, Any]]:
    """The state after a round whose updates were summed into `sums`, and the server's part of the round's record.

    Guarantees: equal arguments give equal bits (unless the noise is the operating system's), so a retried call releases
    nothing new; sums are added in the order given.
    Edge cases: an empty cohort, or one whose updates were all dropped, leaves the adapter as it was, or moves it by noise
    alone where there is noise; the record's `empty_round` says so.
    Errors: RuntimeError if the new adapter would not be finite.
    """
    assert all(part.clip_norm == mechanism.update_clip_norm for part in sums), (
        f"sums clipped to {[part.clip_norm for part in sums]} but the mechanism accounts for {mechanism.update_clip_norm}"
    )
    total = np.zeros(len(state.adapter), dtype=np.float64)
    for part in sums:
        total += part.total
    weight = sum(part.weight for part in sums)
    denominator = weight if mechanism.denominator is None else mechanism.denominator
    done = state.round_index + 1
    record = _record(sums, mechanism=mechanism, num_rounds=done) | {
        "empty_round": weight == 0.0,
        "signal_to_noise": _signal_to_noise(total, mechanism=mechanism),
    }
    if denominator == 0.0:
        return ServerState(done, state.adapter), record
    noise_seed = seed_for(seed, "noise", state.round_index)
    mean = noise_and_divide(
        total, noise_std=mechanism.sum_noise_std, denominator=denominator, seed=noise_seed, secure=mechanism.secure_noise
    )
    with np.errstate(over="ignore"):
        adapter = (state.adapter + lr * mean.astype(np.float64)).astype(np.float32)
    if not np.isfinite(adapter).all():
        raise RuntimeError(f"round {state.round_index}: the new adapter is not finite; lower train.lr or server.lr={lr:g}")
    return ServerState(done, adapter), record


def weights_for(shard_sizes: Sequence[int], *, weighting: str) -> tuple[float, ...]:
    """The weight of each client: its number of examples for `examples`, 1 for `uniform`."""
    if weighting not in ("examples", "uniform"):
        raise ValueError(f"server.weighting={weighting!r} must be 'examples' or 'uniform'")
    return tuple(float(size) if weighting == "examples" else 1.0 for size in shard_sizes)


def _record(sums: Sequence[ChunkSum], *, mechanism: Mechanism, num_rounds: int) -> dict[str, Any]:
    norms = [norm for part in sums for norm in part.norms]
    clipped = sum(part.num_clipped for part in sums)
    spent = mechanism.epsilon(num_rounds)
    return {
        "update_norm_median": statistics.median(norms) if norms else None,
        "clip_fraction": clipped / len(norms) if norms and mechanism.update_clip_norm is not None else None,
        "num_contributed": len(norms),
        "num_dropped": sum(part.num_dropped for part in sums),
        "noise_std": mechanism.noise_std,
        "epsilon": spent.pld if spent else None,
        "epsilon_rdp": spent.rdp if spent else None,
    }


def _signal_to_noise(total: Total, *, mechanism: Mechanism) -> float | None:
    """Norm of the average update before noise over the expected norm of the noise; None without noise at the server."""
    if mechanism.sum_noise_std == 0.0:
        return None
    return l2_norm(total) / (mechanism.sum_noise_std * float(np.sqrt(len(total))))
