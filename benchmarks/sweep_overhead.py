"""What does a sweep cost beyond its trials' own rounds, and how fast does a trial start once a process is warm?

16 FEDIT trials of SmolLM2-135M, each about 20 s of rounds in one process with one thread, as many at once as there are cores;
`raysim sweep` as a command, from its start to its end. The work is what the trials' own records say of their rounds. A trial's
start-up lasts from when its place was free (the command's start, or the last round of the trial before it) to its first round.
Reach: wall time at most 1.15 times the work divided by the trials at once; the trials that follow in a warm process start in at
most 0.25 times the first one's start-up time.

    python benchmarks/sweep_overhead.py [--trials 16] [--rounds 1]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysim.results.files import environment

REACH = {"wall_over_ideal": 1.15, "warm_over_first_start": 0.25}
POLL_S = 0.05
SETTINGS = (
    "method.name=fedit",
    "resources.backend=local",
    "resources.client.num_cpus=1",
    "partition.num_clients=2",
    "data.num_train=32",
    "data.num_heldout=8",
    "evaluate.every=0",
    "evaluate.num_generated=4",
    "attack.every=0",
    "attack.num_examples=4",
)


@dataclass
class Watched:
    """When the rounds of a trial were first seen on disk, seconds after the command's start."""

    first: float
    last: float
    num_rounds: int
    work_s: float
    first_round_s: float

    @property
    def begin(self) -> float:
        """When its first round began."""
        return self.first - self.first_round_s


def look(out: Path, seen: dict[str, Watched], now: float) -> None:
    """Notes what is new in the trials' rounds.jsonl."""
    for path in out.glob("trials/*/rounds.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        known = seen.get(path.parent.name)
        if not records or (known and known.num_rounds == len(records)):
            continue
        first, first_round_s = (known.first, known.first_round_s) if known else (now, records[0]["wall_s"])
        seen[path.parent.name] = Watched(first, now, len(records), sum(record["wall_s"] for record in records), first_round_s)


def run_sweep(out: Path, *, num_trials: int, rounds: int) -> tuple[float, dict[str, Watched]]:
    """The wall time of the command, and its trials."""
    rates = [round(1e-3 + 1e-4 * k, 6) for k in range(num_trials)]
    words = [sys.executable, "-m", "raysim", "sweep", "quickstart", f"sweep.space={{train.lr: {rates}}}", f"server.num_rounds={rounds}"]
    seen: dict[str, Watched] = {}
    started = time.perf_counter()
    process = subprocess.Popen([*words, *SETTINGS, f"out={out}", "--quiet"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        look(out, seen, time.perf_counter() - started)
        time.sleep(POLL_S)
    wall_s = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"the sweep ended with status {process.returncode}")
    return wall_s, seen


def start_ups(trials: list[Watched], *, at_once: int) -> list[float]:
    """Seconds from a free place to the first round, in the order of the trials' starts."""
    ordered = sorted(trials, key=lambda trial: trial.begin)
    ends = sorted(trial.last for trial in trials)
    return [trial.begin - (0.0 if k < at_once else ends[k - at_once]) for k, trial in enumerate(ordered)]


def measure(*, num_trials: int, rounds: int) -> dict[str, Any]:
    """The figures of one sweep."""
    at_once = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        wall_s, seen = run_sweep(Path(folder) / "out", num_trials=num_trials, rounds=rounds)
    trials = list(seen.values())
    assert len(trials) == num_trials, f"{len(trials)} of {num_trials} trials were seen"
    work = [trial.work_s for trial in trials]
    starts = start_ups(trials, at_once=at_once)
    ideal = sum(work) / at_once
    return {
        "num_trials": num_trials,
        "at_once": at_once,
        "work_s_median": statistics.median(work),
        "wall_s": wall_s,
        "ideal_s": ideal,
        "wall_over_ideal": wall_s / ideal,
        "first_start_s": starts[0],
        "cold_starts_s": starts[:at_once],
        "warm_start_s_median": statistics.median(starts[at_once:]),
        "warm_start_s_max": max(starts[at_once:]),
        "warm_over_first_start": max(starts[at_once:]) / starts[0],
    }


def main() -> None:
    """Prints the figures and writes them to benchmarks/results/sweep_overhead.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    figures = measure(num_trials=arguments.trials, rounds=arguments.rounds)
    result = {"environment": environment(), "rounds": arguments.rounds, "reach": REACH, **figures}
    for key, bound in REACH.items():
        print(f"{key}: {figures[key]:.3f} (reach: at most {bound:g}) {'met' if figures[key] <= bound else 'missed'}")
    for key in ("work_s_median", "wall_s", "ideal_s", "first_start_s", "warm_start_s_median", "warm_start_s_max"):
        print(f"{key}: {figures[key]:.2f}")
    path = Path(__file__).parent / "results" / "sweep_overhead.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
