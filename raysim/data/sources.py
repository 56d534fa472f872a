"""Records from a built-in set, a local file or the Hub, and the split into training and held-out records.

Left out: downloading by URL and scripts of data sets (nothing from a data source is executed), and stratified splits
(a split by group is what keeps near-copies of a record out of the held-out side).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from raysim.config import DataConfig
from raysim.data.builtin import clinic, finance, general, referrals
from raysim.data.conversations import CHAT_FIELDS
from raysim.data.copies import linked
from raysim.data.files import file_rows, hub_rows
from raysim.data.presets import PRESETS, Preset
from raysim.data.records import Record
from raysim.data.rows import OPTIONAL, Reading, lacks, read_row
from raysim.rng import numpy_rng

logger = logging.getLogger(__name__)

BUILTIN: dict[str, Callable[[], list[Record]]] = {
    "clinic": clinic.records,
    "finance": finance.records,
    "general": general.records,
    "referrals": referrals.records,
}


@dataclass(frozen=True)
class Source:
    """The records of a source, and how much of it is not in them."""

    records: tuple[Record, ...]
    num_left_out: int = 0
    """Records without an instruction or a response."""
    num_conversations_cut: int = 0
    """Conversations that lack turns: the assistant's before the user first speaks, or the user's after the last answer."""
    num_details_left_out: int = 0
    """Details that cannot leak."""

    @property
    def num_lost(self) -> dict[str, int]:
        """How much is not in the records, by name."""
        return {name: number for name, number in vars(self).items() if name != "records"}


UNREAD_CONTEXT = ("system", "history")
"""Names under which some sets keep what was said before; nothing of a record is passed over without a word."""


def read_source(spec: DataConfig, *, section: str = "data") -> Source:
    """All records of a source, in its order; a record's id is its position there. Errors name the keys of the `section` that names it.

    A field is looked up by its name, and a name with dots (`meta.ward`) inside objects too. An input, details and a group may be null
    or absent in some records. Left out, counted and logged are records without an instruction or a response, turns that answer nothing or
    that nothing answers, and details that cannot leak (those that no response has, or that an instruction has).
    Errors: ValueError in one line for a source that is missing, empty, malformed, or lacks a field or its content.
    """
    if spec.source in BUILTIN:
        return Source(tuple(BUILTIN[spec.source]()))
    if spec.source not in ("jsonl", "hub"):
        raise ValueError(f"{section}.source={spec.source!r} is none of {', '.join([*BUILTIN, 'jsonl', 'hub'])}")
    if spec.preset and spec.preset not in PRESETS:
        raise ValueError(f"{section}.preset={spec.preset!r} is none of {', '.join(PRESETS)}")
    if spec.preset and spec.chat_field:
        raise ValueError(
            f"data.chat_field={spec.chat_field!r} has no place with data.preset={spec.preset!r}, which names the fields; leave one out"
        )
    try:
        readings = _readings(spec, section=section, fields=PRESETS[spec.preset] if spec.preset else _own_fields(spec, section=section))
    except ValueError as error:
        raise ValueError(f"{section}.path={spec.path}: {error}") from None
    except MemoryError:
        raise ValueError(f"{section}.path={spec.path}: the records do not fit into memory; split the file") from None
    source = Source(
        records=tuple(reading.record for reading in readings if reading.record),
        num_left_out=sum(reading.record is None for reading in readings),
        num_conversations_cut=sum(reading.num_turns_cut > 0 for reading in readings),
        num_details_left_out=sum(reading.num_details_left_out for reading in readings),
    )
    _log_losses(source, readings, path=f"{section}.path={spec.path}")
    return source


def split_records(records: list[Record], *, num_train: int, num_heldout: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, each in source order; `num_train=0` takes all that is left for training.

    *Guarantees*: no group is on both sides, and no record whose copy is on the other (see `linked`); the held-out side does not depend on
    `num_train`, and a larger training side contains a smaller one. Groups come in a seeded order, to the held-out side with all copies of
    their records; the last group of either side is cut to the number asked for, and what is cut from the held-out side is not used at all.
    Errors: ValueError where there are too few records.
    """
    order = linked(records, copies=False)
    permuted = [order[i] for i in numpy_rng(seed, "split").permutation(len(order))]
    with_copies = {index: group for group in linked(records) for index in group}
    heldout: dict[int, None] = {}
    for group in permuted:
        if len(heldout) < num_heldout:
            heldout |= dict.fromkeys(with_copies[group[0]])
    rest = [index for group in permuted for index in group if index not in heldout]
    if len(heldout) < num_heldout or len(rest) < max(num_train, 1):
        num_linked = len(order) - len({group[0] for group in with_copies.values()})
        remedy = f", or remove copies, which join {num_linked} groups to others" if num_linked else ""
        raise ValueError(
            f"data.num_train={num_train} and data.num_heldout={num_heldout} need more than there is: {len(records)} records"
            f" in {len(order)} groups leave {len(rest)} for training after the held-out groups and their copies; lower one of them{remedy}"
        )
    train = rest[:num_train] if num_train else rest
    return [records[i] for i in sorted(train)], [records[i] for i in sorted(list(heldout)[:num_heldout])]


def _own_fields(spec: DataConfig, *, section: str) -> Preset:
    def names(name: str) -> tuple[str, ...]:
        return (name,) if name else ()

    return Preset(
        instruction=names(spec.instruction_field),
        input=names(spec.input_field),
        response=names(spec.response_field),
        label=names(spec.label_field),
        details=names(spec.details_field),
        group=names(spec.group_field),
        remedy="set data.preset, data.chat_field or the data.*_field keys" if section == "data" else f"set {section}.preset",
    )


def _readings(spec: DataConfig, *, section: str, fields: Preset) -> list[Reading]:
    """What is read of every row.

    Errors: ValueError for a row that cannot be read, for a field that no row has, for labels that some lack, and for no records.
    """
    wanted = {
        *fields.instruction,
        *fields.response,
        *(name for role in OPTIONAL for name in fields.names(role)),
        spec.chat_field,
        *CHAT_FIELDS,
    }
    rows = (file_rows if spec.source == "jsonl" else hub_rows)(
        spec.path, wanted=frozenset(wanted - {""}), say=lambda what: logger.warning("%s.path=%s %s", section, spec.path, what)
    )
    readings, first = [], None
    for index, (at, values) in enumerate(rows):
        first = first or (at, values)
        readings.append(read_row(index, values, at=at, fields=fields, chat_field=spec.chat_field))
    if first is None:
        raise ValueError("holds no records; give a file with at least one")
    unread = [name for name in UNREAD_CONTEXT if first[1].get(name) and name not in wanted]
    if unread:
        logger.warning(
            "%s.path=%s: the field %s beside a record's own is not read: put such turns into a list under 'messages', or set data.system_prompt",
            section,
            spec.path,
            " and ".join(map(repr, unread)),
        )
    for role in OPTIONAL:
        names = fields.names(role)
        if names and not (role == "input" and spec.preset) and not any(role in reading.found for reading in readings):
            raise lacks(first[1], names, at=first[0], remedy="no record has it" if len(readings) > 1 else "")
    empty = [reading for reading in readings if reading.record is None]
    if len(empty) == len(readings):
        raise ValueError(f"{empty[0].missing}{', as in all records' if len(empty) > 1 else ''}; fill it in or remove the record")
    unlabelled = [reading for reading in readings if reading.record and not reading.record.label] if fields.label else []
    if unlabelled:
        raise ValueError(
            f"{unlabelled[0].at}: the field {fields.label[0]!r} is empty, in {len(unlabelled)} of {len(readings)} records;"
            " give each a label, remove those records, or set no label field"
        )
    return readings


def _log_losses(source: Source, readings: list[Reading], *, path: str) -> None:
    if source.num_left_out:
        first = next(reading.missing for reading in readings if reading.missing)
        logger.warning(
            "%s: %d of %d records are left out, since there is nothing to learn (%s)", path, source.num_left_out, len(readings), first
        )
    if source.num_conversations_cut:
        first = next(reading.at for reading in readings if reading.num_turns_cut)
        logger.warning(
            "%s: %d conversations are read without turns before the user speaks or after the last answer (%s)",
            path,
            source.num_conversations_cut,
            first,
        )
    if source.num_details_left_out:
        num_given = source.num_details_left_out + sum(len(record.details) for record in source.records)
        logger.warning(
            "%s: %d of %d details are left out, since they are not in the response alone", path, source.num_details_left_out, num_given
        )
