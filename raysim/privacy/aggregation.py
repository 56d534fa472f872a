"""From a chunk's updates to the sum that the server works with, in the open or under secure aggregation.

What a client does (`sum_chunk`: clip, add its share of noise, mask) and what the server does with what arrives (`open_sums`) stand
side by side, each given the mechanism, so that bound, noise and accountant cannot disagree.

Left out: what the server adds and divides by (`clipping.noise_and_divide`).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raysim.lora.layout import Upload
from raysim.privacy import secagg
from raysim.privacy.clipping import ChunkStack, ChunkSum, Entry, Total, Vector, add_weighted, clip, stack, sum_entries
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.noise import gaussian
from raysim.rng import seed_for


@dataclass(frozen=True)
class MaskedSum:
    """The sum of the masked messages of some clients: uniform integers to whoever lacks the others' and the unmasking shares."""

    messages: secagg.Encoded
    """Integers modulo 2^64, one a parameter."""
    client_ids: tuple[int, ...]
    """Whose messages are in it."""
    clip_norm: float | None
    """The bound that was applied before masking."""


Part = ChunkSum | ChunkStack | MaskedSum
"""What a chunk of clients sends to the server."""
Sent = tuple[int, Upload, float]
"""A client, what it sends, and its weight."""


def sum_chunk(
    uploads: Sequence[Upload],
    *,
    client_ids: Sequence[int],
    weights: Sequence[float],
    round: Round,
    mechanism: Mechanism,
    form: Literal["sum", "stack"] = "sum",
) -> Part:
    """What leaves the place where these clients are, as `sum_sent` has it of those who come one by one."""
    part = sum_sent(zip(client_ids, uploads, weights, strict=True), round=round, mechanism=mechanism, form=form)
    assert part is not None, "a chunk holds at least one client"
    return part


def sum_sent(sent: Iterable[Sent], *, round: Round, mechanism: Mechanism, form: Literal["sum", "stack"] = "sum") -> Part | None:
    """What leaves the place where these clients are: their bounded sum (or stack), each with its noise where clients add it; None of nobody.

    Into a sum each upload goes as it comes, and is let go. Under secure aggregation only masked integers leave. There an update that is
    not finite counts as zero and still carries its noise, and nothing says that it did.
    """
    if form == "stack":
        assert mechanism.kind != "client", "noise goes into a sum, and a stack opens every upload to the server"
        sent = list(sent)
        return stack([upload for _, upload, _ in sent], weights=[w for _, _, w in sent], clip_norm=round.clip_norm) if sent else None
    if mechanism.is_masked:
        return _masked_sum(sent, round=round, mechanism=mechanism)
    further: dict[str, Total] = {}
    total = sum_entries(_entries(sent, further, round=round, mechanism=mechanism), clip_norm=round.clip_norm)
    return None if total is None else dataclasses.replace(total, further=further)


def _entries(sent: Iterable[Sent], further: dict[str, Total], *, round: Round, mechanism: Mechanism) -> Iterator[Entry]:
    """Each update with its weight and noise; what else was sent is added to `further`."""
    for client_id, upload, weight in sent:
        _check_bounded(upload, round)
        for name in upload.keys() - {"adapter"}:
            add_weighted(further.setdefault(name, np.zeros(len(upload[name]))), upload[name], weight)
        yield upload["adapter"], weight, client_noise(len(upload["adapter"]), mechanism=mechanism, client_id=client_id, round=round)


def _check_bounded(upload: Upload, round: Round) -> None:
    assert round.clip_norm is None or set(upload) == {"adapter"}, "a second tensor would need a bound of its own"


def _masked_sum(sent: Iterable[Sent], *, round: Round, mechanism: Mechanism) -> MaskedSum | None:
    cohort, clip_norm = round.cohort, round.clip_norm
    assert clip_norm is not None, "secure aggregation sums clipped updates"
    grid, seed = _grid(mechanism, clip_norm, len(cohort)), _mask_seed(mechanism, round.index)
    messages: dict[int, secagg.Encoded] = {}
    for client_id, upload, _ in sent:
        _check_bounded(upload, round)
        update = upload["adapter"]
        noise = client_noise(len(update), mechanism=mechanism, client_id=client_id, round=round)
        finite = update if np.isfinite(update).all() else np.zeros_like(update)
        encoded = secagg.encode(clip(finite, clip_norm=clip_norm), grid=grid, max_clients=len(cohort))
        if noise is not None:
            encoded += secagg.encode_noise(noise, grid=grid, max_clients=len(cohort))
        messages[client_id] = secagg.masked_message(client_id, cohort, encoded, seed=seed)
    if not messages:
        return None
    size = len(next(iter(messages.values())))
    return MaskedSum(secagg.add_messages(list(messages.values()), size=size), tuple(messages), clip_norm)


def client_noise(size: int, *, mechanism: Mechanism, client_id: int, round: Round) -> Vector | None:
    """The noise that this client adds to its update in this round (equal whenever it is asked for, unless `secure_noise`), if any."""
    multiplier = mechanism.update_noise_multiplier(len(round.cohort))
    if multiplier == 0.0 or round.clip_norm is None:
        return None
    seed = seed_for(mechanism.seed, "client noise", round.index, client_id)
    return gaussian(size, std=multiplier * round.clip_norm, seed=seed, secure=mechanism.secure_noise)


def open_sums(parts: Sequence[ChunkSum | MaskedSum], *, mechanism: Mechanism, round: Round) -> list[ChunkSum]:
    """The sums that the server works with; masked ones are added up and unmasked together.

    Errors: `secagg.TooFewSurvivors` where fewer clients sent than distributed noise or the unmasking needs.
    """
    plain = [part for part in parts if isinstance(part, ChunkSum)]
    masked = [part for part in parts if isinstance(part, MaskedSum)]
    assert not (plain if mechanism.is_masked else masked), "a round is masked or it is not"
    cohort, clip_norm, survivors = round.cohort, round.clip_norm, sorted(k for part in masked for k in part.client_ids)
    if not (mechanism.is_masked and cohort):
        return plain
    assert clip_norm is not None, "secure aggregation sums clipped updates"
    threshold = mechanism.min_survivors(len(cohort))
    if len(survivors) < threshold:
        raise secagg.TooFewSurvivors(f"{len(survivors)} of {len(cohort)} clients sent, and {threshold} are needed")
    seed, size = _mask_seed(mechanism, round.index), len(masked[0].messages)
    shares = {k: secagg.unmasking_shares(k, cohort, survivors=survivors, threshold=threshold, seed=seed) for k in survivors}
    correction = secagg.unmasking_correction(
        shares, survivors=survivors, posted=secagg.public_keys(cohort, seed=seed), threshold=threshold, size=size
    )
    total = secagg.add_messages([*(part.messages for part in masked), correction], size=size)
    decoded = secagg.decode(total, grid=_grid(mechanism, clip_norm, len(cohort)))
    return [ChunkSum(decoded, weight=float(len(survivors)), norms=(), num_clipped=0, num_dropped=0, clip_norm=clip_norm)]


def _grid(mechanism: Mechanism, clip_norm: float, cohort_size: int) -> float:
    std = mechanism.update_noise_multiplier(cohort_size) * clip_norm
    return secagg.grid_for(clip_norm, noise_std=std, max_clients=cohort_size)


def _mask_seed(mechanism: Mechanism, round_index: int) -> int:
    return seed_for(mechanism.seed, "masks", round_index)
