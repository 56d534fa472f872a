"""The server of a round: a state, and a pure transition from one to the next.

Averaging the flat vector is averaging every A and every B separately, as FedIT does (Zhang et al. 2024, arXiv 2305.05644).
Left out: keeping the state alive (an actor's business) and saving it (the checkpoint's).
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raysim.federation.server_optimizer import PLAIN, Moments, ServerOptimizer, server_step
from raysim.privacy.aggregation import MaskedSum, open_sums
from raysim.privacy.clipping import ChunkSum, Total, l2_norm, noise_and_divide
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.secagg import TooFewSurvivors
from raysim.rng import seed_for


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds."""

    round_index: int
    """Rounds done, and so the index of the next."""
    adapter: npt.NDArray[np.float32]
    """The released adapter, one flat vector."""
    clip_norm: float | None = None
    """The bound of the next round where clipping is adaptive; None for the mechanism's own."""
    memory: Mapping[str, Moments] = field(default_factory=dict)
    """What else it remembers, float64 arrays of the adapter's length by name: the optimizer's `momentum` and `variance`, and SCAFFOLD's `control`."""


def step(
    state: ServerState,
    parts: Sequence[ChunkSum | MaskedSum],
    *,
    mechanism: Mechanism,
    lr: float,
    seed: int,
    optimizer: ServerOptimizer = PLAIN,
) -> tuple[ServerState, dict[str, Any]]:
    """The state after a round whose updates were summed into `parts`, and the server's part of the round's record.

    Guarantees: equal arguments give equal bits (unless the noise is the operating system's), so a retried call releases
    nothing new; sums are added in the order given.
    Edge cases: an empty cohort, or one whose updates were all dropped, leaves the adapter as it was, or moves it by noise
    alone where there is noise; the record's `empty_round` says so. A round that lost more clients than distributed noise
    allows releases nothing (`aborted`).
    Errors: RuntimeError if the new adapter would not be finite.
    """
    clip_norm = clip_norm_of(state, mechanism)
    _check_parts(parts, state=state, clip_norm=clip_norm)
    aborted = False
    try:
        sums = open_sums(parts, mechanism=mechanism, round_index=state.round_index, clip_norm=clip_norm)
    except TooFewSurvivors:
        sums, aborted = [], True
    total = np.zeros(len(state.adapter), dtype=np.float64)
    for part in sums:
        total += part.total
    weight = sum(part.weight for part in sums)
    record = _record(sums, state=state, mechanism=mechanism, clip_norm=clip_norm) | {
        "empty_round": weight == 0.0,
        "aborted": aborted,
        "signal_to_noise": _signal_to_noise(total, mechanism=mechanism, clip_norm=clip_norm, round_index=state.round_index),
    }
    num_kept = sum(len(part.norms) for part in sums)
    num_short = num_kept - sum(part.num_clipped for part in sums)
    new_clip = mechanism.next_clip_norm(state.clip_norm or clip_norm, num_short=num_short, num_kept=num_kept, round_index=state.round_index)
    kept_clip = new_clip if mechanism.clipping == "adaptive" else state.clip_norm
    denominator = weight if mechanism.denominator is None else mechanism.denominator
    if aborted or denominator == 0.0 or not (sums or mechanism.sum_noise_multiplier):
        return dataclasses.replace(state, round_index=state.round_index + 1, clip_norm=kept_clip), record
    mean = _noised_mean(total, denominator=denominator, round_index=state.round_index, mechanism=mechanism, clip_norm=clip_norm, seed=seed)
    with np.errstate(over="ignore", invalid="ignore"):
        direction, memory = server_step(mean, state.memory, optimizer=optimizer)
        adapter = (state.adapter + lr * direction).astype(np.float32)
    if "control" in state.memory:
        memory["control"] = _next_control(state.memory["control"], sums, mechanism=mechanism)
    if not np.isfinite(adapter).all():
        raise RuntimeError(f"round {state.round_index}: the new adapter is not finite; lower train.lr or server.lr={lr:g}")
    return ServerState(state.round_index + 1, adapter, kept_clip, memory), record


def broadcast(state: ServerState) -> npt.NDArray[np.float32]:
    """What the server sends to a client: the adapter, followed by the control variate where there is one."""
    if "control" not in state.memory:
        return state.adapter
    return np.concatenate([state.adapter, state.memory["control"].astype(np.float32)])


def _next_control(control: Moments, sums: Sequence[ChunkSum], *, mechanism: Mechanism) -> Moments:
    """c plus the changes of the clients' control variates, over the weight of all clients: the mean of every c_k, as before."""
    changes = sum((part.control for part in sums if part.control is not None), start=np.zeros(len(control)))
    return control + changes / sum(weights_for(mechanism.shard_sizes, weighting=mechanism.weighting))


def clip_norm_of(state: ServerState, mechanism: Mechanism) -> float | None:
    """The bound on updates in the state's next round; None where they are not clipped."""
    return mechanism.update_clip_norm if state.clip_norm is None else state.clip_norm


def _check_parts(parts: Sequence[ChunkSum | MaskedSum], *, state: ServerState, clip_norm: float | None) -> None:
    assert all(part.clip_norm == clip_norm for part in parts), (
        f"sums clipped to {[part.clip_norm for part in parts]} but the mechanism accounts for {clip_norm}"
    )
    for part in parts:
        size = len(part.total) if isinstance(part, ChunkSum) else len(part.messages)
        if size != len(state.adapter):
            raise RuntimeError(
                f"round {state.round_index}: a sum of {size} numbers came for an adapter of {len(state.adapter)}; an upload holds more, or less"
            )
        control = part.control if isinstance(part, ChunkSum) else None
        assert (control is not None) == ("control" in state.memory), (
            "control variates come from clients that were sent one, and from all of them"
        )
        assert control is None or len(control) == size, f"a sum of {len(control)} changes came for a control variate of {size}"


def _noised_mean(
    total: Total, *, denominator: float, round_index: int, mechanism: Mechanism, clip_norm: float | None, seed: int
) -> npt.NDArray[np.float32]:
    earlier = [
        (weight, seed_for(seed, "noise", index)) for index, weight in mechanism.noise_weights(round_index).items() if index != round_index
    ]
    return noise_and_divide(
        total,
        noise_std=mechanism.sum_noise_multiplier * (clip_norm or 0.0),
        denominator=denominator,
        seed=seed_for(seed, "noise", round_index),
        secure=mechanism.secure_noise,
        earlier=earlier,
    )


def weights_for(shard_sizes: Sequence[int], *, weighting: str) -> tuple[float, ...]:
    """The weight of each client: its number of examples for `examples`, 1 for `uniform`, and for `adaptive` until it asks for another."""
    if weighting not in ("examples", "uniform", "adaptive"):
        raise ValueError(f"server.weighting={weighting!r} must be 'examples', 'uniform' or 'adaptive'")
    return tuple(float(size) if weighting == "examples" else 1.0 for size in shard_sizes)


def _record(sums: Sequence[ChunkSum], *, state: ServerState, mechanism: Mechanism, clip_norm: float | None) -> dict[str, Any]:
    norms = [norm for part in sums for norm in part.norms]
    clipped = sum(part.num_clipped for part in sums)
    spent = mechanism.epsilon(state.round_index + 1)
    num_contributed = round(sum(part.weight for part in sums)) if mechanism.is_masked else len(norms)
    num_dropped = sum(part.num_dropped for part in sums)
    std = mechanism.average_noise_std(clip_norm=clip_norm or 0.0, round_index=state.round_index, num_noisy=num_contributed + num_dropped)
    return {
        "update_norm_median": statistics.median(norms) if norms else None,
        "clip_fraction": clipped / len(norms) if norms and mechanism.update_clip_norm is not None else None,
        "clip_norm": clip_norm,
        "num_contributed": num_contributed,
        "num_dropped": num_dropped,
        "noise_std": std,
        "epsilon": spent.quoted if spent else None,
        "epsilon_rdp": spent.rdp if spent else None,
    }


def _signal_to_noise(total: Total, *, mechanism: Mechanism, clip_norm: float | None, round_index: int) -> float | None:
    """Norm of the average update before noise over the expected norm of the noise; None without noise at the server."""
    if mechanism.sum_noise_multiplier == 0.0:
        return None
    std = mechanism.average_noise_std(clip_norm=clip_norm or 0.0, round_index=round_index, num_noisy=0)
    return l2_norm(total) / mechanism.expected_cohort / (std * float(np.sqrt(len(total))))
