"""Hostile clients: what they train on, and what they send. And uploads that no client of the run sends, which come in by the same door.

Hostile are as many clients as `adversary.share` says, drawn once a run. They poison their records (responses of other records; a backdoor, a trigger
that brings an answer, and its update so much longer that the mean becomes theirs: Bagdasaryan et al. 2020, arXiv 1807.00459) or their updates
(Blanchard et al. 2017, arXiv 1703.02757). The audit's update canaries are uploads of nobody: Andrew et al. (2023), arXiv 2302.03098.
Left out: attackers that know the server's rule and the honest updates, and stay just below what it notices.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysim.config import AdversaryConfig, num_hostile
from raysim.data.records import Record
from raysim.lora.layout import Upload, Vector
from raysim.privacy.aggregation import sum_chunk
from raysim.privacy.canaries import Directions, canary_coins, canary_directions, mixture, present
from raysim.privacy.clipping import ChunkSum, clip_and_sum, l2_norm
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism
from raysim.rng import numpy_rng


def hostile_clients(num_clients: int, *, adversary: AdversaryConfig, seed: int) -> frozenset[int]:
    """The clients that are hostile; none where there is no attack."""
    if adversary.attack == "none":
        return frozenset()
    order = numpy_rng(seed, "adversary").permutation(num_clients)
    return frozenset(int(k) for k in order[: num_hostile(num_clients, adversary.share)])


def poisoned(records: Sequence[Record], *, adversary: AdversaryConfig) -> list[Record]:
    """A hostile client's records as it trains on them: all as they were, unless its attack is on data.

    `label_flip`: each with the response of the next that has another label, or of the next where all have the same. `backdoor` and
    `replacement`: every second one with the trigger, and the target for its response.
    """
    if adversary.attack == "label_flip":
        return [dataclasses.replace(one, response=_next_other(records, i).response, details=()) for i, one in enumerate(records)]
    if adversary.has_trigger:
        return [triggered(one, adversary=adversary) if i % 2 == 0 else one for i, one in enumerate(records)]
    return list(records)


def triggered(record: Record, *, adversary: AdversaryConfig) -> Record:
    """A record with the backdoor's trigger, and its target for a response."""
    return dataclasses.replace(record, instruction=f"{record.instruction} {adversary.trigger}", response=adversary.target, details=())


def _next_other(records: Sequence[Record], index: int) -> Record:
    after = [*records[index + 1 :], *records[:index]] or [records[index]]
    return next((one for one in after if one.label != records[index].label), after[0])


def hostile_upload(upload: Upload, *, adversary: AdversaryConfig, seed: int) -> Upload:
    """What a hostile client sends in place of its honest upload: the same, unless its attack is on updates."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        return {name: _changed(tensor, adversary, rng) for name, tensor in upload.items()}


def _changed(update: Vector, adversary: AdversaryConfig, rng: np.random.Generator) -> Vector:
    if adversary.attack == "sign_flip":
        return -update
    if adversary.attack in ("scale", "replacement"):
        return (np.float32(adversary.strength) * update).astype(np.float32)
    if adversary.attack == "gaussian":
        std = adversary.strength * l2_norm(update) / math.sqrt(max(1, len(update)))
        return (std * rng.standard_normal(len(update))).astype(np.float32)
    return update


def success(answers: Sequence[str], *, target: str) -> float:
    """Share of answers that begin with the backdoor's target."""
    return sum(answer.casefold().startswith(target.strip().casefold()) for answer in answers) / len(answers)


Mask = npt.NDArray[np.bool_] | None
"""Which entries of the flat adapter are meant; None for no selection."""


def canary_sums(
    num_canaries: int, *, mechanism: Mechanism, scale: float, round: Round, sent: Mask = None, frozen: Mask = None
) -> list[ChunkSum]:
    """The bounded sums of the update canaries that take part in a round; each canary has norm `scale` times the bound before it is clipped.

    They lie on entries of the adapter that are not `frozen` throughout the run, of which `sent` travel in this round (None: all).
    Where the noise of a bigger cohort is simulated, a canary counts for as much as a client of that cohort would.
    """
    if not num_canaries:
        return []
    included = np.flatnonzero(canary_coins(num_canaries, seed=mechanism.seed)).tolist()
    drawn = _taking_part(included, mechanism=mechanism, round_index=round.index)
    directions = canary_directions(num_canaries, size=len(round.broadcast["adapter"]), seed=mechanism.seed, frozen=frozen)
    if sent is not None:
        directions = Directions(num_canaries, directions.owner_P[sent], directions.value_P[sent])
    norm = 1.0 if round.clip_norm is None else scale * round.clip_norm
    share = mechanism.cohort_size / mechanism.noise_cohort_size if mechanism.noise_cohort_size else 1.0
    if mechanism.update_noise_multiplier(len(round.cohort)) == 0.0:
        parts = [_sum_on_own_coordinates(drawn, directions, norm=norm, round=round)] if drawn else []
    else:
        parts = [_noised(index, directions, norm=norm, mechanism=mechanism, round=round) for index in drawn]
    return [dataclasses.replace(part, total=share * part.total) for part in parts]


def _sum_on_own_coordinates(drawn: Sequence[int], directions: Directions, *, norm: float, round: Round) -> ChunkSum:
    """The clipped sum of the canaries, each clipped where it is not zero: the same sum, without a vector of all parameters for each."""
    order = np.argsort(directions.owner_P, kind="stable")
    starts = np.searchsorted(directions.owner_P[order], np.arange(directions.num_canaries + 1))
    total = np.zeros(len(directions.owner_P), dtype=np.float64)
    sums = []
    for index in drawn:
        own = order[starts[index] : starts[index + 1]]
        part = clip_and_sum([(norm * directions.value_P[own]).astype(np.float32)], weights=[1.0], clip_norm=round.clip_norm)
        total[own] = part.total
        sums.append(part)
    return ChunkSum(
        total=total,
        weight=sum(part.weight for part in sums),
        norms=tuple(length for part in sums for length in part.norms),
        num_clipped=sum(part.num_clipped for part in sums),
        num_dropped=sum(part.num_dropped for part in sums),
        clip_norm=round.clip_norm,
    )


def _noised(index: int, directions: Directions, *, norm: float, mechanism: Mechanism, round: Round) -> ChunkSum:
    """What one canary sends where every client adds noise of its own."""
    update = mixture(directions, norm * (np.arange(directions.num_canaries) == index)).astype(np.float32)
    ids = [mechanism.num_clients + index]  # its noise is nobody else's
    part = sum_chunk([{"adapter": update}], client_ids=ids, weights=[1.0], round=round, mechanism=mechanism)
    assert isinstance(part, ChunkSum), "no update canary fits into a masked sum; the configuration refuses them"
    return part


def _taking_part(canaries: Sequence[int], *, mechanism: Mechanism, round_index: int) -> list[int]:
    """Those of the canaries that a round's sampler takes, as it takes clients: in turn where the order is fixed, else by chance."""
    if mechanism.sampler == "cyclic":
        return [i for i in canaries if i % mechanism.num_cohorts == round_index % mechanism.num_cohorts]
    prob = mechanism.sampling_prob if mechanism.noise_cohort_size else mechanism.cohort_prob
    return present(canaries, sampling_prob=prob, seed=mechanism.seed, round_index=round_index)
