"""Copies among records: which records say the same, letter by letter or but for case, blanks and the form of their characters.

Left out: near-copies that say the same in other words. `data.group_field` keeps those together.
"""

import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

from scipy.cluster.hierarchy import DisjointSet

from raysim.data.records import Record


def linked(records: Sequence[Record], *, copies: bool = True) -> list[list[int]]:
    """The positions of records that belong together, in the order of their first ones: those of one group, copies, and whatever these link.

    A copy is one after NFKC, case folding and with single blanks, over all that is said (label, details and group do not count).
    Without `copies`, those of one group only.
    """
    together, firsts = DisjointSet(range(len(records))), dict[tuple[str, str], int]()
    for index, record in enumerate(records):
        said = [("said", _digest(_said(record, folded=True)))] if copies else []
        for key in [*said, *([("group", record.group)] if record.group else [])]:
            together.merge(firsts.setdefault(key, index), index)
    return sorted(sorted(part) for part in together.subsets())


def count_copies(records: Sequence[Record]) -> dict[str, int]:
    """How many records are copies of one before them: `num_copies` as `linked` compares them, and `num_exact_copies` letter by letter."""
    kinds = {"num_copies": True, "num_exact_copies": False}
    return {name: len(records) - len({_digest(_said(record, folded=folded)) for record in records}) for name, folded in kinds.items()}


def _said(record: Record, *, folded: bool) -> str:
    turns = [*record.history, ("user", record.instruction), ("assistant", record.response)]
    if folded:
        turns = [(role, " ".join(unicodedata.normalize("NFKC", text).casefold().split())) for role, text in turns]
    return "\0".join(part for turn in turns for part in turn)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()
