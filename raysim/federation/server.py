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

from raysim.federation.faults import Attendance, Fleet, attendance
from raysim.federation.robust import Combine
from raysim.federation.server_optimizer import PLAIN, Moments, ServerOptimizer, server_step
from raysim.lora.layout import Vector
from raysim.lora.rule import LoraRule, lora_rule
from raysim.privacy.aggregation import MaskedSum, Part, open_sums
from raysim.privacy.clipping import ChunkStack, ChunkSum, Total, l2_norm, noise_and_divide
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.secagg import TooFewSurvivors
from raysim.rng import seed_for

AVERAGE = lora_rule("average")


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds."""

    round_index: int
    """Rounds done, and so the index of the next."""
    tensors: Mapping[str, npt.NDArray[Any]]
    """What it sends, by name: the `adapter` (float32, one flat vector), and for SCAFFOLD the `control` variate (float64 here, float32 on its way)."""
    clip_norm: float | None = None
    """The bound of the next round where clipping is adaptive; None for the mechanism's own."""
    memory: Mapping[str, Moments] = field(default_factory=dict)
    """What the server's optimizer remembers, float64 arrays of the adapter's length: `momentum` and `variance`."""
    late: ChunkSum | None = None
    """What came after the last round's deadline, and counts in the next; None for nothing."""

    @property
    def adapter(self) -> Vector:
        """The adapter, as clients are sent it."""
        adapter: Vector = self.tensors["adapter"]
        return adapter


def begin(state: ServerState, mechanism: Mechanism, fleet: Fleet | None = None) -> Round:
    """The state's next round: its cohort drawn, who of it counts decided (everybody without a `fleet`), its bound fixed."""
    cohort = mechanism.sample_cohort(state.round_index)
    there = attendance(cohort, fleet=fleet, round_index=state.round_index) if fleet else Attendance(tuple(cohort), (), {}, 0.0)
    return Round(
        index=state.round_index,
        cohort=cohort,
        survivors=there.survivors,
        late=there.late,
        absent=there.absent,
        simulated_s=there.simulated_s,
        clip_norm=mechanism.update_clip_norm if state.clip_norm is None else state.clip_norm,
        broadcast={name: np.asarray(tensor, dtype=np.float32) for name, tensor in state.tensors.items()},
    )


def step(
    state: ServerState,
    round: Round,
    parts: Sequence[Part],
    *,
    mechanism: Mechanism,
    lr: float,
    seed: int,
    optimizer: ServerOptimizer = PLAIN,
    rule: LoraRule = AVERAGE,
    late: Sequence[ChunkSum] = (),
    min_clients: int = 1,
    combine: Combine | None = None,
) -> tuple[ServerState, dict[str, Any]]:
    """The state after a round whose uploads came as `parts`, and the server's part of the round's record.

    What came `late` counts in the next round, with the weight that it would have had. `combine` stands in for the mean of uploads that came apart.

    Guarantees: equal arguments give equal bits (unless the noise is the operating system's), so a retried call releases
    nothing new; sums are added in the order given.
    Edge cases: an empty cohort, or one whose updates were all dropped, leaves the adapter as it was, or moves it by noise
    alone where there is noise; the record's `empty_round` says so. A round that lost more clients than distributed noise
    allows releases nothing (`aborted`), nor does one to which fewer than `min_clients` sent.
    Errors: RuntimeError if the new adapter would not be finite.
    """
    _check_parts(parts, round)
    stacks = [part for part in parts if isinstance(part, ChunkStack)]
    opened = _opened([part for part in parts if not isinstance(part, ChunkStack)], mechanism=mechanism, round=round)
    sums = [*(opened or []), *([state.late] if state.late else [])]
    total = np.zeros(len(state.adapter), dtype=np.float64)
    for part in sums:
        total += part.total
    arrived: Sequence[ChunkSum | ChunkStack] = [*sums, *stacks]
    weight = sum(part.weight for part in arrived)
    bound = rule.sensitivity(round.clip_norm or 0.0)
    counted = _record(arrived, round=round, mechanism=mechanism, bound=bound)
    aborted = opened is None or 1 < min_clients > counted["num_contributed"]
    record = counted | {
        "empty_round": weight == 0.0,
        "aborted": aborted,
        "signal_to_noise": _signal_to_noise(total, mechanism=mechanism, bound=bound, round=round),
    }
    num_kept = sum(len(part.norms) for part in arrived)
    num_short = num_kept - sum(part.num_clipped for part in arrived)
    new_clip = mechanism.next_clip_norm(round.clip_norm, num_short=num_short, num_kept=num_kept, round_index=round.index)
    kept_clip = new_clip if mechanism.clipping == "adaptive" else state.clip_norm
    denominator = weight if mechanism.denominator is None else mechanism.denominator
    if aborted or denominator == 0.0 or not (arrived or mechanism.sum_noise_multiplier):
        return dataclasses.replace(state, round_index=round.index + 1, clip_norm=kept_clip, late=_together(late)), record
    if not stacks:
        noised = _noised_mean(total, denominator=denominator, round=round, mechanism=mechanism, bound=bound, seed=seed)
    mean = rule.merge([{"adapter": noised}], [1.0]) if not stacks else _merged(stacks, rule=rule, combine=combine)
    with np.errstate(over="ignore", invalid="ignore"):
        direction, memory = server_step(mean, state.memory, optimizer=optimizer)
        adapter = (state.adapter + lr * direction).astype(np.float32)
    if not np.isfinite(adapter).all():
        raise RuntimeError(f"round {round.index}: the new adapter is not finite; lower train.lr or server.lr={lr:g}")
    tensors = {"adapter": adapter} | _further(state, arrived, mechanism=mechanism)
    return ServerState(round.index + 1, tensors, kept_clip, memory, _together(late)), record


def _opened(parts: Sequence[ChunkSum | MaskedSum], *, mechanism: Mechanism, round: Round) -> list[ChunkSum] | None:
    """The sums that the server works with; None where too few came to open them."""
    try:
        return open_sums(parts, mechanism=mechanism, round=round)
    except TooFewSurvivors:
        return None


def _merged(stacks: Sequence[ChunkStack], *, rule: LoraRule, combine: Combine | None) -> Vector:
    """What the LoRA rule makes of every client's own upload, or of what they are combined to."""
    uploads, weights = [upload for part in stacks for upload in part.uploads], [w for part in stacks for w in part.weights]
    if combine is None:
        return rule.merge(uploads, weights)
    one = combine(np.stack([upload["adapter"].astype(np.float64) for upload in uploads]), np.array(weights))
    return rule.merge([{"adapter": one.astype(np.float32)}], [1.0])


def _together(parts: Sequence[ChunkSum]) -> ChunkSum | None:
    """The sum of what came late, in the order given; None for nothing. What is known of single updates stays with their round."""
    if not parts:
        return None
    total = sum((part.total for part in parts[1:]), start=parts[0].total)
    return ChunkSum(total, sum(part.weight for part in parts), (), 0, 0, None)


def _further(state: ServerState, arrived: Sequence[ChunkSum | ChunkStack], *, mechanism: Mechanism) -> dict[str, Moments]:
    """Each tensor beside the adapter, moved by the sum of its changes over the weight of all clients, there or not.

    So SCAFFOLD's control variate stays the mean of every client's own.
    """
    everybody = sum(weights_for(mechanism.shard_sizes, weighting=mechanism.weighting))
    changes = [part.further for part in arrived if part.further]  # none where all of a stack were dropped
    further = {name: tensor for name, tensor in state.tensors.items() if name != "adapter"}
    return {
        name: tensor + sum((change[name] for change in changes), start=np.zeros(len(tensor))) / everybody
        for name, tensor in further.items()
    }


def _check_parts(parts: Sequence[Part], round: Round) -> None:
    assert all(part.clip_norm == round.clip_norm for part in parts), (
        f"sums clipped to {[part.clip_norm for part in parts]} but the mechanism accounts for {round.clip_norm}"
    )
    expected = {name: len(tensor) for name, tensor in round.broadcast.items()}
    for part in parts:
        for tensors in _sent(part):
            sizes = {name: len(tensor) for name, tensor in tensors.items()}
            if sizes != expected:
                raise RuntimeError(
                    f"round {round.index}: sums of {sizes} numbers came where {expected} had been sent; an upload holds more, or less"
                )


def _sent(part: Part) -> Sequence[Mapping[str, npt.NDArray[Any]]]:
    """The named tensors in a part: of a stack each client's own, else the sums."""
    if isinstance(part, ChunkStack):
        return part.uploads
    return [{"adapter": part.total, **part.further} if isinstance(part, ChunkSum) else {"adapter": part.messages}]


def _noised_mean(total: Total, *, denominator: float, round: Round, mechanism: Mechanism, bound: float, seed: int) -> Vector:
    weights = mechanism.noise_weights(round.index).items()
    earlier = [(weight, seed_for(seed, "noise", index)) for index, weight in weights if index != round.index]
    return noise_and_divide(
        total,
        noise_std=mechanism.sum_noise_multiplier * bound,
        denominator=denominator,
        seed=seed_for(seed, "noise", round.index),
        secure=mechanism.secure_noise,
        earlier=earlier,
    )


def weights_for(shard_sizes: Sequence[int], *, weighting: str) -> tuple[float, ...]:
    """The weight of each client: its number of examples for `examples`, 1 for `uniform`, and for `adaptive` until it asks for another."""
    if weighting not in ("examples", "uniform", "adaptive"):
        raise ValueError(f"server.weighting={weighting!r} must be 'examples', 'uniform' or 'adaptive'")
    return tuple(float(size) if weighting == "examples" else 1.0 for size in shard_sizes)


def _record(arrived: Sequence[ChunkSum | ChunkStack], *, round: Round, mechanism: Mechanism, bound: float) -> dict[str, Any]:
    norms = [norm for part in arrived for norm in part.norms]
    clipped = sum(part.num_clipped for part in arrived)
    spent = mechanism.epsilon(round.index + 1)
    num_contributed = int(sum(part.weight for part in arrived)) if mechanism.is_masked else len(norms)
    num_dropped = sum(part.num_dropped for part in arrived)
    num_noisy = num_contributed + num_dropped
    return {
        "update_norm_median": statistics.median(norms) if norms else None,
        "clip_fraction": clipped / len(norms) if norms and mechanism.update_clip_norm is not None else None,
        "clip_norm": round.clip_norm,
        "num_contributed": num_contributed,
        "num_dropped": num_dropped,
        "noise_std": mechanism.average_noise_std(
            sensitivity=bound, round_index=round.index, cohort_size=len(round.cohort), num_noisy=num_noisy
        ),
        "epsilon": spent.quoted if spent else None,
        "epsilon_rdp": spent.rdp if spent else None,
    }


def _signal_to_noise(total: Total, *, mechanism: Mechanism, bound: float, round: Round) -> float | None:
    """Norm of the average update before noise over the expected norm of the noise; None without noise at the server."""
    if mechanism.sum_noise_multiplier == 0.0:
        return None
    std = mechanism.average_noise_std(sensitivity=bound, round_index=round.index, cohort_size=len(round.cohort), num_noisy=0)
    return l2_norm(total) / mechanism.expected_cohort / (std * float(np.sqrt(len(total))))
