"""Folders of sweeps as a sweep leaves them, with invented figures that behave like real ones."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysim.rng import numpy_rng

COLUMNS = (
    "heldout_nll",
    "heldout_rouge_l",
    "leakage",
    "control",
    "details_rate",
    "epsilon",
    "delta",
    "unit",
    "simulated",
    "noise_multiplier",
    "uplink_bytes",
    "num_tokens",
    "tokens_per_s",
    "wall_s",
    "simulated_s",
    "adapter_sha256",
    "folder",
)


def trial_row(index: int, settings: Mapping[str, Any], *, seed: int = 0, error: str = "") -> dict[str, Any]:
    """A row of results.csv: less noise and a higher rank give a lower NLL and more leakage."""
    name = f"{index:03d}-{'-'.join(f'{key}={value}' for key, value in settings.items())}-seed={seed}"
    row = {"trial": name, "status": "failed" if error else "done", "error": error, **settings, "seed": seed, "num_rounds": 3}
    if error:
        return row | dict.fromkeys(COLUMNS, "") | {"folder": f"trials/{name}"}
    noise = numpy_rng(7, "sweep-row", index)
    rank = float(settings.get("lora.rank", 16))
    epsilon = settings.get("privacy.target_epsilon") if settings.get("method.name", "fedit") in ("fedit", "dplora") else None
    learnt = (
        0.25 * rank**0.2 * (1.0 if epsilon is None else epsilon / (2 + epsilon)) * (0.8 if settings.get("method.name") == "dplora" else 1)
    )
    return row | {
        "heldout_nll": 2.9 - learnt + noise.normal(0, 0.015),
        "heldout_rouge_l": 0.2 + 0.2 * learnt,
        "leakage": 0.22 + 0.3 * learnt**2 + noise.normal(0, 0.005),
        "control": 0.21,
        "details_rate": 0.1 * learnt,
        "epsilon": "" if epsilon is None else 0.995 * epsilon,
        "delta": "" if epsilon is None else 0.0125,
        "unit": "" if epsilon is None else "client",
        "simulated": False,
        "noise_multiplier": "" if epsilon is None else 4 / epsilon,
        "uplink_bytes": int(rank * 92_160),
        "num_tokens": 40_000,
        "tokens_per_s": 900.0 + index,
        "wall_s": 60.0 + index,
        "simulated_s": "",
        "adapter_sha256": f"{index:064x}",
        "folder": f"trials/{name}",
    }


def grid_rows(space: Mapping[str, Sequence[Any]], *, seeds: Sequence[int] = (0,)) -> list[dict[str, Any]]:
    """A row for every combination of the values, with each seed."""
    points = [(dict(zip(space, values, strict=True)), seed) for values in itertools.product(*space.values()) for seed in seeds]
    return [trial_row(index, settings, seed=seed) for index, (settings, seed) in enumerate(points)]


def write_sweep(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """`folder`, with its results.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder
