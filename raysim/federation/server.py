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
from raysim.lora.factors import gathered, spread
from raysim.lora.layout import Upload, Vector
from raysim.lora.rule import LoraRule, Setting, lora_rule
from raysim.privacy.aggregation import Part, open_sums
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
    setting: Setting | None = None,
    late: Sequence[ChunkSum] = (),
    min_clients: int = 1,
    robust: Combine | None = None,
) -> tuple[ServerState, dict[str, Any]]:
    """The state after a round whose uploads came as `parts`, and the server's part of the round's record.

    What came `late` counts in the next round. `robust` stands in for the mean of uploads that came apart.

    Guarantees: equal arguments give equal bits (unless the noise is the operating system's), so a retried call releases
    nothing new; sums are added in the order given.
    Edge cases: an empty cohort, or one whose updates were all dropped, leaves the adapter as it was, or moves it by noise
    alone where there is noise; the record's `empty_round` says so. A round that lost more clients than distributed noise
    allows releases nothing (`aborted`), nor does one to which fewer than `min_clients` sent.
    Errors: RuntimeError if the new adapter would not be finite.
    """
    mask = None if setting is None or rule.combine is not None else rule.mask(setting, round.turn)
    size = len(state.adapter) if mask is None else int(mask.sum())
    _check_parts(parts, round, size=size if rule.combine is None else None)
    stacks = [part for part in parts if isinstance(part, ChunkStack)]
    sums, aborted = _opened(parts, mechanism=mechanism, round=round, late=state.late)
    total = _total(sums, size=size)
    arrived: Sequence[ChunkSum | ChunkStack] = [*sums, *stacks]
    weight = sum(part.weight for part in arrived)
    bound = rule.sensitivity(round.clip_norm or 0.0)
    counted = _record(arrived, round=round, mechanism=mechanism, bound=bound)
    aborted = aborted or 1 < min_clients > counted["num_contributed"]
    record = counted | {
        "empty_round": weight == 0.0,
        "aborted": aborted,
        "signal_to_noise": _signal_to_noise(total, mechanism=mechanism, bound=bound, round=round),
    }
    kept_clip = _next_clip_norm(arrived, round, mechanism=mechanism) if mechanism.clipping == "adaptive" else state.clip_norm
    denominator = weight if mechanism.denominator is None else mechanism.denominator
    if aborted or denominator == 0.0 or not (arrived or mechanism.sum_noise_multiplier):
        return dataclasses.replace(state, round_index=round.index + 1, clip_norm=kept_clip, late=_together(late)), record
    uploads, weights = _uploads(stacks, robust)
    if not stacks:
        uploads = [{"adapter": _noised_mean(total, denominator=denominator, round=round, mechanism=mechanism, bound=bound, seed=seed)}]
    memory: Mapping[str, Moments] = {}
    if rule.combine is None:
        adapter, memory = _moved(state, rule.merge(uploads, weights), mask, optimizer=optimizer, lr=lr)
        tensors = _finite({"adapter": adapter}, round, lr=lr)
        tensors = tensors if rule.settle is None else rule.settle(tensors, _known(setting))
    else:
        tensors = rule.combine({**state.tensors, **round.broadcast}, uploads, weights, _known(setting), round.index)
        _finite(tensors, round, lr=lr)
    further = {name: tensor for name, tensor in state.tensors.items() if name not in tensors}
    tensors = {**tensors, **_further(further, arrived, mask, mechanism=mechanism)}
    return ServerState(round.index + 1, tensors, kept_clip, memory, _together(late)), record


def _total(sums: Sequence[ChunkSum], *, size: int) -> Total:
    """The sums added in the order given, in place: a vector for each would be the most that a server holds."""
    total = np.zeros(len(sums[0].total) if sums else size, dtype=np.float64)
    for part in sums:
        total += part.total
    return total


def _next_clip_norm(arrived: Sequence[ChunkSum | ChunkStack], round: Round, *, mechanism: Mechanism) -> float | None:
    """The bound of the next round, by how many of the updates were short."""
    num_kept = sum(len(part.norms) for part in arrived)
    num_short = num_kept - sum(part.num_clipped for part in arrived)
    return mechanism.next_clip_norm(round.clip_norm, num_short=num_short, num_kept=num_kept, round_index=round.index)


def _opened(parts: Sequence[Part], *, mechanism: Mechanism, round: Round, late: ChunkSum | None) -> tuple[list[ChunkSum], bool]:
    """The sums among the parts with what came late before, and whether too few clients sent for any to be opened."""
    before = [late] if late else []
    try:
        return open_sums([part for part in parts if not isinstance(part, ChunkStack)], mechanism=mechanism, round=round) + before, False
    except TooFewSurvivors:
        return [], True


def _known(setting: Setting | None) -> Setting:
    assert setting is not None, "a rule that makes factors anew knows their layout"
    return setting


def _finite(tensors: dict[str, Vector], round: Round, *, lr: float) -> dict[str, Vector]:
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise RuntimeError(f"round {round.index}: the new adapter is not finite; lower train.lr or server.lr={lr:g}")
    return tensors


def _uploads(stacks: Sequence[ChunkStack], robust: Combine | None) -> tuple[list[Upload], list[float]]:
    """Every client's own upload with its weight, or the one that a robust rule makes of them; of none, the weight of the one that a sum gives."""
    uploads, weights = [upload for part in stacks for upload in part.uploads], [one for part in stacks for one in part.weights]
    if not stacks:
        return [], [1.0]
    if robust is None:
        return list(uploads), weights
    one = robust(np.stack([upload["adapter"].astype(np.float64) for upload in uploads]), np.array(weights))
    return [{"adapter": one.astype(np.float32)}], [1.0]


def _together(parts: Sequence[ChunkSum]) -> ChunkSum | None:
    """The sum of what came late, in the order given; None for nothing. What is known of single updates stays with their round."""
    if not parts:
        return None
    total = sum((part.total for part in parts[1:]), start=parts[0].total)
    return ChunkSum(total, sum(part.weight for part in parts), (), 0, 0, None)


def relay(round: Round, parts: Sequence[Part], *, mechanism: Mechanism, rule: LoraRule, setting: Setting) -> Round:
    """The second trip of a round: the same clients, sent what the LoRA rule makes of the mean of what they sent; nothing where nobody did."""
    assert rule.trips is not None, "a rule of one trip relays nothing"
    sums = [part for part in parts if isinstance(part, ChunkSum)]
    weight = sum(part.weight for part in sums)
    if weight == 0.0:
        return dataclasses.replace(round, trip=1, survivors=())
    mean = (sum((part.total for part in sums), start=np.zeros(len(sums[0].total))) / weight).astype(np.float32)
    return dataclasses.replace(round, trip=1, broadcast=rule.trips.relay({"adapter": mean}, setting))


def _moved(
    state: ServerState, mean: Vector, mask: npt.NDArray[np.bool_] | None, *, optimizer: ServerOptimizer, lr: float
) -> tuple[Vector, dict[str, Moments]]:
    """The adapter after the server's step along an averaged update of those entries that clients sent, and what the optimizer remembers."""
    memory = {name: np.asarray(gathered(moment, mask)) for name, moment in state.memory.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        direction, memory = server_step(mean, memory, optimizer=optimizer)
        moved = (gathered(state.adapter, mask) + lr * direction).astype(np.float32)
    if mask is None:
        return moved, memory
    unmoved = {"momentum": np.zeros(len(mask)), "variance": np.full(len(mask), optimizer.tau**2)} | dict(state.memory)
    return spread(moved, mask, over=state.adapter), {name: spread(moment, mask, over=unmoved[name]) for name, moment in memory.items()}


def _further(
    further: Mapping[str, npt.NDArray[Any]],
    arrived: Sequence[ChunkSum | ChunkStack],
    mask: npt.NDArray[np.bool_] | None,
    *,
    mechanism: Mechanism,
) -> dict[str, npt.NDArray[Any]]:
    """Each tensor beside the rule's own, moved by the sum of its changes over the weight of all clients, there or not.

    So SCAFFOLD's control variate stays the mean of every client's own.
    """
    everybody = sum(weights_for(mechanism.shard_sizes, weighting=mechanism.weighting))
    changes = [part.further for part in arrived if part.further]  # none where all of a stack were dropped
    found = {}
    for name, tensor in further.items():
        change = sum((one[name] for one in changes), start=np.zeros(len(gathered(tensor, mask)))) / everybody
        found[name] = tensor + spread(change, mask)
    return found


def _check_parts(parts: Sequence[Part], round: Round, *, size: int | None) -> None:
    assert all(part.clip_norm == round.clip_norm for part in parts), (
        f"sums clipped to {[part.clip_norm for part in parts]} but the mechanism accounts for {round.clip_norm}"
    )
    if size is None:  # whose sizes are those of each client's rank, or of a sketch
        return
    expected = dict.fromkeys(round.broadcast, size)
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
