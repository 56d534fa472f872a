"""Gaussian noise, from a named seed or from the operating system.

Left out: protection against attacks on the floating-point grid of the noise (Mironov 2012); a deployment would sample
discrete noise.
"""

import os

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 20
"""Pairs of normals drawn at a time from the operating system, which bounds the memory in use."""


def gaussian(size: int, *, std: float, seed: int, secure: bool) -> npt.NDArray[np.float32]:
    """A float32 vector of independent N(0, std^2) draws (computed in float64).

    `secure` draws from the operating system's generator and ignores `seed`: nobody can repeat it, and so nobody can
    subtract it. Otherwise the draw is a function of `seed`, repeatable, and only as secret as the seed.
    """
    if not std >= 0.0:
        raise ValueError(f"noise std={std!r} must be at least 0")
    unit = _system_normals(size) if secure else np.random.default_rng(seed).standard_normal(size)
    return (std * unit).astype(np.float32)


def _system_normals(size: int) -> npt.NDArray[np.float64]:
    """Standard normals by Box and Muller (1958) from `os.urandom`: 53 random bits a uniform, hence no value beyond 8.6."""
    normals = np.empty(size + size % 2, dtype=np.float64)
    for start in range(0, len(normals), 2 * BLOCK):
        pairs = min(BLOCK, (len(normals) - start) // 2)
        bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64) >> np.uint64(11)
        uniform = (bits.astype(np.float64) + 1.0) * 2.0**-53
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
        normals[start : start + pairs] = radius * np.cos(angle)
        normals[start + pairs : start + 2 * pairs] = radius * np.sin(angle)
    return normals[:size]
