"""Adapter hashes of small runs, to be made before a change that must keep every bit, and compared after it.

    python -m tests.invariance.adapter_hashes                  # compares with tests/invariance/adapter_hashes.json
    python -m tests.invariance.adapter_hashes --quickstart     # and the quickstart's four adapters on the default model (minutes)
    python -m tests.invariance.adapter_hashes --write          # makes the file anew

Every method with each of its private modes runs on the tiny model in float32, in this process and on one and three Ray actors. The last bits
depend on the processor and on the pinned libraries: the file names those it was made with, and says nothing on others.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch

import tests.conftest  # noqa: F401  (one thread a process, as in the suite)
from raysim.config import load
from raysim.runs.compare import compare
from raysim.runs.run import Backend, open_backend, run
from tests.invariance.test_same_bits import PRIVATE, QUICK, RAY
from tests.small_runs import METHODS, small

FILE = Path(__file__).with_suffix(".json")
QUICKSTART = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "quickstart-seed0.json"
NUM_ACTORS = {"in process": 0, "1 actor": 1, "3 actors": 3}
CLIENT = ["fedit-client", *QUICK]
MORE = {
    "fedprox": ["fedit", *QUICK, "train.prox_mu=0.5", "train.num_epochs=3"],
    "later-fedpit": ["fedpit", *QUICK, "fedpit.local_train_on=real", "fedpit.share_mix=0.4"],
    "poisson": [*CLIENT, "partition.num_clients=5", "server.cohort_size=2"],
    "fixed": [*CLIENT, "partition.num_clients=5", "server.cohort_size=2", "privacy.sampler=fixed"],
    "target-epsilon": [*CLIENT, "privacy.target_epsilon=8"],
    "simulated-noise": [*CLIENT, "privacy.noise_cohort_size=100", "privacy.population=1000"],
    "yogi": ["fedit", *QUICK, "server.optimizer=yogi", "server.lr=0.01"],
    "adagrad": ["fedit", *QUICK, "server.optimizer=adagrad", "server.lr=0.01"],
    "drop-outs": ["fedit", *QUICK, "partition.num_clients=5", "clients.dropout=0.4"],
    "secrets": ["fedit", *QUICK, "audit.multiplicities=[1,2]", "audit.num_references=7"],
    "record-canaries": ["dplora-example", *QUICK, "audit.num_canaries=6", "audit.canary=record"],
    "gradient-canaries": ["dplora-example", *QUICK, "audit.num_canaries=6", "audit.canary=gradient"],
    "update-canaries": [*CLIENT, "audit.num_canaries=6", "audit.canary=update"],
    "lora-dropout": ["fedit", *QUICK, "lora.dropout=0.1"],
    "all-linear-private": ["dplora-example", *QUICK, "lora.target_modules=all-linear"],
    "cosine-sgd": ["fedit", *QUICK, "train.optimizer=sgd", "train.lr_schedule=cosine", "train.lr=0.1"],
}
"""Settings that change how clients, noise or server work, beside the methods of `small_runs` and the modes of `test_same_bits`."""
SETTINGS = {**{name: [name, *QUICK] for name in METHODS}, **PRIVATE, **MORE}


def hashes(folder: Path) -> dict[str, dict[str, str]]:
    """By setting and place, the released adapter's SHA-256 and one over what was written and answered, of runs made under `folder`."""
    found: dict[str, dict[str, str]] = {name: {} for name in SETTINGS}
    with _backend(folder) as backend:
        for name, (method, *settings) in SETTINGS.items():
            for place, num_actors in NUM_ACTORS.items():
                out = folder / name / place.replace(" ", "-")
                on_ray = [*RAY[:1], f"resources.num_actors={num_actors}"] if num_actors else []
                run(small(method, *settings, *on_ray, out=out), display=False, backend=_first(backend, num_actors))
                found[name][place] = json.loads((out / "summary.json").read_text())["adapter_sha256"]
            found[name]["texts"] = texts_sha256(folder / name / "in-process")
            print(f"{name:24}{found[name]['in process'][:12]}", flush=True)
    return found


def texts_sha256(out: Path) -> str:
    """SHA-256 over a run's answers and synthetic records."""
    files = [path for path in (out / "answers.jsonl", out / "synthetic.jsonl") if path.is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def quickstart_hashes() -> dict[str, str]:
    """The adapter hashes of the shipped quickstart, seed 0, by name of the run."""
    with tempfile.TemporaryDirectory() as folder:
        compare(load("quickstart", [f"out={folder}"]), display=False)
        return {entry["name"]: entry["adapter_sha256"] for entry in json.loads((Path(folder) / "summary.json").read_text())["runs"]}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """A line for every value that is not the expected one, and for every one that only one side has."""
    flat = [{(name, key): value for name, values in side.items() for key, value in values.items()} for side in (found, expected)]
    keys = sorted(set(flat[0]) | set(flat[1]))
    pairs = [(", ".join(key), flat[0].get(key, "none"), flat[1].get(key, "none")) for key in keys]
    return [f"{where}: {ours[:16]}, expected {theirs[:16]}" for where, ours, theirs in pairs if ours != theirs]


def made_with() -> dict[str, str]:
    """What the last bits depend on."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().split("\n") if line.startswith(("model name", "flags"))]
    flags = next((line for line in lines if line.startswith("flags")), "")
    widest = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    return {"python": platform.python_version(), "machine": platform.machine(), "vector": " ".join(widest), **libraries}


@contextlib.contextmanager
def _backend(folder: Path) -> Iterator[Backend]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=512 * 2**20, log_to_driver=False)
    try:
        with open_backend(small("fedit", *RAY, out=folder / "backend")) as backend:
            yield backend
    finally:
        ray.shutdown()


def _first(backend: Backend, num_actors: int) -> Backend:
    if not num_actors:
        return dataclasses.replace(backend, ray=None)
    fewer = copy.copy(backend.ray)
    assert fewer is not None
    fewer.actors = fewer.actors[:num_actors]
    return dataclasses.replace(backend, ray=fewer)


def main() -> int:
    """The exit status: 1 if a hash differs."""
    parser = argparse.ArgumentParser(description="Compare the adapter hashes of small runs with those of the file.")
    parser.add_argument("--write", action="store_true", help="make the file anew")
    parser.add_argument("--quickstart", action="store_true", help="compare the quickstart's adapters with the committed ones as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = hashes(Path(folder))
    if options.write:
        FILE.write_text(json.dumps({"made_with": made_with(), "sha256": found}, indent=1) + "\n")
        return 0
    expected = json.loads(FILE.read_text())
    if expected["made_with"] != made_with():
        print(f"the file was made with {expected['made_with']}, this is {made_with()}: last bits may differ")
    lines = differences(found, expected["sha256"])
    if options.quickstart:
        committed = {entry["name"]: entry["adapter_sha256"] for entry in json.loads(QUICKSTART.read_text())["runs"]}
        lines += differences({"quickstart": quickstart_hashes()}, {"quickstart": committed})
    num = sum(len(values) for values in found.values())
    print("\n".join(lines) or f"all {num} values are equal{', and the four of the quickstart' if options.quickstart else ''}")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
