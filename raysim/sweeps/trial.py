"""A trial of a sweep: an ordinary run in a folder of its own, what it reports as it goes, and its line of results.csv.

The run folder is the trial's checkpoint: whatever dies, the same trial goes on from its last finished round.
Left out: where trials run, and how many at once (`tune`).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysim.config import Config
from raysim.errors import one_line
from raysim.federation.setup import EncodedData
from raysim.results.files import LEDGER, ROUNDS
from raysim.results.folders import RunFolder
from raysim.runs import run as runner
from raysim.sweeps.space import Point, trial_config


def trial_of(config: Config, point: Point) -> Config:
    """The configuration of a trial, all decided."""
    return runner.resolved(trial_config(config, point, out=config.out))


def trial_folder(config: Config, point: Point) -> Path:
    """The run folder of a trial."""
    return Path(config.out) / "trials" / point.name


# --- what its folder says


def status(folder: Path) -> str:
    """`done`, `stopped` (by a scheduler) or `waiting`, of a trial's folder."""
    run = RunFolder(folder)
    return "done" if run.is_finished else "stopped" if run.is_stopped else "waiting"


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The rounds that a trial has finished."""
    return RunFolder(folder).jsonl(ROUNDS)


def row(config: Config, point: Point, *, ran: Point, error: str = "") -> dict[str, Any]:
    """A trial's line of results.csv, read from the folder of the point whose run is its own; `error` is why it failed, if it is not finished."""
    folder = RunFolder(trial_folder(config, ran))
    found = status(folder.path)
    values: dict[str, Any] = {"trial": point.name, "status": "failed" if found == "waiting" else found}
    values["error"] = (error or "not finished") if found == "waiting" else ""
    values |= point.settings | {"seed": point.settings.get("seed", config.seed), "folder": str(folder.path.relative_to(config.out))}
    values |= figures(records_of(folder.path))
    ledger = folder.json(LEDGER) if folder.has(LEDGER) else {}
    values |= {key: ledger.get(key) for key in ("delta", "unit", "simulated", "noise_multiplier")}
    if found == "done":
        values |= {"adapter_sha256": folder.summary.adapter_sha256, "wall_s": folder.summary.wall_s}
    return values


def figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a run after its last record, those measured less often from the last that has them."""
    evaluation: Mapping[str, Any] = next((r["eval"] for r in reversed(records) if r["eval"]), {})
    attack: Mapping[str, Any] = next((r["attack"] for r in reversed(records) if r["attack"]), {})
    seconds = sum(r.get("client_s", 0.0) for r in records)
    tokens = sum(r["num_tokens"] for r in records)
    return {
        "num_rounds": records[-1]["round_index"] + 1 if records else 0,
        "heldout_nll": evaluation.get("heldout_nll"),
        "heldout_rouge_l": evaluation.get("heldout_rouge_l"),
        "leakage": attack.get("train_rouge_l"),
        "control": attack.get("heldout_rouge_l"),
        "details_rate": attack.get("train_details_rate"),
        "epsilon": records[-1]["epsilon"] if records else None,
        "uplink_bytes": sum(r["uplink_bytes"] for r in records),
        "num_tokens": tokens,
        "tokens_per_s": tokens / seconds if seconds else None,
        "wall_s": sum(r["wall_s"] for r in records),
        "simulated_s": sum(r.get("simulated_s", 0.0) for r in records) or None,
    }


def reported(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a scheduler and a search hear of a trial after these rounds."""
    found = {key: value for key, value in figures(records).items() if value is not None}
    last = records[-1].get("train_loss") if records else None
    return found | {"round": found.pop("num_rounds"), "train_loss": last}


# --- running it


class WarmBackend:
    """The backend of this process, kept for the next trial that runs in it (same model, same resources)."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._backend: runner.Backend | None = None

    def run(
        self, trial: Config, *, base_ref: Any, data: EncodedData | None, num_actors: Callable[[], int], on_round: runner.OnRound
    ) -> list[dict[str, Any]]:
        """The records of the finished trial; `num_actors` says how many client actors there is room for."""
        if self._backend is None or self._backend.key != runner.backend_key(trial):
            self.close()
            opened = runner.open_backend(trial, display=False, base_ref=base_ref, num_actors=num_actors())
            self._backend = self._stack.enter_context(opened)
        return runner.run(trial, display=False, backend=self._backend, data=data, on_round=on_round).records

    def close(self) -> None:
        """Ends the actors, if there are any."""
        self._backend = None
        self._stack.close()


def first_line(error: BaseException) -> str:
    """Why a trial failed, for its row."""
    return one_line(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {one_line(error)}"
