"""Small runs of every method, in this process and as a command, and what two runs of the same results must share."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysim.config import Config, load
from raysim.methods.spec import METHODS as SPECS
from tests import warm
from tests.conftest import ROOT, SMALL

# Bytes from a random model rarely make words: these settings let some of its synthetic records through the filters.
FEDPIT = [
    "method.name=fedpit",
    "fedpit.min_instruction_words=1",
    "fedpit.max_rouge_l=1",
    "fedpit.repetition_penalty=20",
    "fedpit.max_response_tokens=64",
]
WRITING = FEDPIT[1:]
METHODS = {
    "fedit": ["method.name=fedit"],
    "fedpit": FEDPIT,
    "scaffold": ["method.name=scaffold"],
    "dplora-example": ["method.name=dplora", "dplora.mode=example"],
    "dplora-literal": ["method.name=dplora", "dplora.mode=literal"],
    "fedit-client": ["method.name=fedit", "privacy.unit=client"],
    "fedmit": ["method.name=fedmit", *WRITING],
    "fewfedweight": ["method.name=fewfedweight", "fewfedweight.max_response_tokens=24"],
    "locit": ["method.name=locit"],
    "locit_synthetic": ["method.name=locit_synthetic", *WRITING],
    "cenit": ["method.name=cenit"],
    "base": ["method.name=base"],
}
METHODS |= {name: [f"method.name={name}"] for name in SPECS if name not in {key.partition("-")[0] for key in METHODS}}
PATIENCE_S = 200
"""The longest that a test waits for a command."""
TIMES = ("wall_s", "client_s", "tokens_per_s")
"""Keys of a round's record that say how fast it was; every other one is a result."""


def overrides(method: str, *more: str, out: Path) -> list[str]:
    """The `key=value` settings of a small run of a method into the folder `out`."""
    return [*SMALL, *METHODS[method], f"out={out}", *more]


def small(method: str, *more: str, out: Path) -> Config:
    """The configuration of a small run of a method into the folder `out`."""
    return load("", overrides(method, *more, out=out))


def results(out: Path) -> dict[str, Any]:
    """All results in a run's folder, without the times it took."""
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    synthetic = out / "synthetic.jsonl"
    return {
        "adapter_sha256": json.loads((out / "summary.json").read_text())["adapter_sha256"],
        "ledger": json.loads((out / "ledger.json").read_text()),
        "partition": json.loads((out / "partition.json").read_text()),
        "rounds": [{key: value for key, value in record.items() if key not in TIMES} for record in records],
        "synthetic": synthetic.read_text() if synthetic.is_file() else None,
        "answers": (out / "answers.jsonl").read_text(),
    }


def table(out: Path) -> list[dict[str, str]]:
    """The rows of a sweep's results.csv, without the times it took."""
    with (out / "results.csv").open(newline="") as file:
        return [{key: text for key, text in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def command(*arguments: str) -> list[str]:
    """The command line `raysim ARGUMENTS`, as a module of this interpreter."""
    return [sys.executable, "-m", "raysim", *arguments]


def environment() -> dict[str, str]:
    """This process's environment, with the package of this source tree and one thread, and with no cluster to connect to."""
    outside = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONWARNINGS")}
    return {**outside, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def warm_raysim(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same as `raysim`, without the time that an interpreter and its imports take (see `warm`)."""
    return warm.raysim(*arguments, cwd=cwd, env=environment())


def started(*arguments: str, cwd: Path) -> warm.Command:
    """The command `raysim ARGUMENTS`, started in the folder `cwd` in such a process; what it prints is kept there."""
    said = cwd / f"said-{len(list(cwd.glob('said-*')))}"
    return warm.start(*arguments, cwd=cwd, env=environment(), said=said)


def raysim(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The finished command `raysim ARGUMENTS`, run in the folder `cwd`."""
    return subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def wait_for(
    reached: Callable[[], object],
    process: subprocess.Popen[bytes] | warm.Command | None = None,
    *,
    patience_s: float = PATIENCE_S,
    pause_s: float = 0.005,
) -> None:
    """Returns once `reached()` is true, which must be before the process ends, if one is given.

    It looks often, since what some tests wait for lasts only a round; the deadline, and not the pause, decides.
    """
    deadline = time.monotonic() + patience_s
    while not reached():
        assert process is None or process.poll() is None, "the command ended by itself"
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(pause_s)
