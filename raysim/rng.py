"""Named random streams: every draw in a run comes from `seed_for(root, *key)`, so that no draw depends on another.

Left out: a global generator. A stream's name is the whole of its identity, which is what makes a retried or resumed
call draw the same numbers.
"""

import hashlib
import operator

import numpy as np
import torch

Key = str | int


def seed_for(root: int, *key: Key) -> int:
    """A 63-bit seed that is a function of `root` and the stream's name only.

    Guarantees: equal arguments give equal seeds on every machine; distinct names give unrelated seeds
    (SHA-256 of an unambiguous encoding, so `("a", "b")` and `("ab",)` differ, and so do `1` and `"1"`).
    """
    text = "|".join([str(int(root)), *(_encoded(part) for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _encoded(part: Key) -> str:
    """A part of a stream's name with its kind and length; numpy's integers count as the integers they are."""
    kind = "str" if isinstance(part, str) else "int"
    value = part if isinstance(part, str) else operator.index(part)
    return f"{kind}:{len(str(value))}:{value}"


def numpy_rng(root: int, *key: Key) -> np.random.Generator:
    """A numpy generator for the stream `key`."""
    return np.random.default_rng(seed_for(root, *key))


def torch_rng(root: int, *key: Key) -> torch.Generator:
    """A CPU torch generator for the stream `key` (draws are made on the CPU so that devices do not change them)."""
    return torch.Generator().manual_seed(seed_for(root, *key))
