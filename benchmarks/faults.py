"""Does a run end with the same files whatever dies, fills up or is damaged on the way? 66 seeded faults, each against an undisturbed run.

Faults: SIGKILL, SIGTERM and SIGINT of the command, SIGSTOP with SIGCONT, SIGKILL of a client actor or the server actor, a disk that is full at a
write, a flipped bit in a checkpoint, a flipped bit in a finished run. Runs: every method, and the privacy modes, server optimizers, robust rules and
late clients, a comparison and a sweep. Compared are the adapter's hash, ledger.json, answers.jsonl, synthetic.jsonl and rounds.jsonl, times aside.
Reach: all of them survive. Left out: nodes and networks (`tests/e2e/test_nodes.py`), and file systems that lie about what is on the disk.

    python benchmarks/faults.py [--faults 66] [--seed 0] [--model tiny]
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raysim.results.files import environment

TIMES = ("wall_s", "client_s", "tokens_per_s")
PATIENCE_S = 900.0
TINY = [
    "model.name=tiny",
    "data.num_train=12",
    "data.num_heldout=4",
    "data.max_length=900",
    "lora.rank=4",
    "train.batch_size=4",
    "train.dtype=float32",
    "server.num_rounds=3",
    "evaluate.num_generated=2",
    "evaluate.max_new_tokens=4",
    "evaluate.batch_size=4",
    "attack.num_examples=2",
    "privacy.delta=1e-5",
]
SMALL = [
    "data.num_train=12",
    "data.num_heldout=4",
    "train.dtype=float32",
    "server.num_rounds=2",
    "evaluate.num_generated=2",
    "attack.every=-1",
]
WRITING = [
    "fedpit.num_candidates=2",
    "fedpit.num_kept=2",
    "fedpit.min_instruction_words=1",
    "fedpit.max_rouge_l=1",
    "fedpit.max_response_tokens=24",
]
CLIENT = ["run", "method.name=fedit", "privacy.unit=client"]
KINDS: dict[str, list[str]] = {
    "fedit": ["run", "method.name=fedit"],
    "fedpit": ["run", "method.name=fedpit", *WRITING],
    "fedmit": ["run", "method.name=fedmit", *WRITING],
    "fewfedweight": ["run", "method.name=fewfedweight", "fewfedweight.max_response_tokens=16"],
    "scaffold": ["run", "method.name=scaffold"],
    "dplora": ["run", "method.name=dplora", "dplora.batch_size=2", "dplora.num_steps=2"],
    "dplora-literal": ["run", "method.name=dplora", "dplora.mode=literal", "dplora.batch_size=2"],
    "locit": ["run", "method.name=locit"],
    "locit_synthetic": ["run", "method.name=locit_synthetic", *WRITING],
    "cenit": ["run", "method.name=cenit"],
    "base": ["run", "method.name=base"],
    "client": CLIENT,
    "local": [*CLIENT, "privacy.noise_at=client"],
    "distributed": [
        *CLIENT,
        "partition.num_clients=5",
        "privacy.noise_at=distributed",
        "clients.dropout=0.3",
        "privacy.dropout_tolerance=0.5",
    ],
    "adaptive": [*CLIENT, "privacy.clipping=adaptive"],
    "cyclic": [*CLIENT, "partition.num_clients=4", "server.cohort_size=1", "privacy.sampler=cyclic", "privacy.num_bands=3"],
    "adam": ["run", "method.name=fedit", "server.optimizer=adam", "server.lr=0.01"],
    "momentum": ["run", "method.name=fedit", "server.optimizer=momentum"],
    "robust": [
        "run",
        "method.name=fedit",
        "partition.num_clients=5",
        "server.rule=median",
        "adversary.attack=gaussian",
        "adversary.share=0.4",
    ],
    "late": ["run", "method.name=fedit", "clients.speed=lognormal", "clients.spread=2", "clients.deadline_s=1", "clients.late=stale"],
    "compare": ["compare", "compare={a: {method.name: fedit}, b: {method.name: locit}}"],
    "sweep": ["sweep", "method.name=fedit", "sweep.space={lora.rank: [2, 4]}", "resources.num_actors=1"],
}
"""What is run: the command, and its settings."""
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
FAULTS = (*SIGNALS, "pause", "kill client actor", "kill server actor", "full disk", "bit in a checkpoint", "bit in a finished run")
ON_RAY = ("kill client actor", "kill server actor")
FULL_DISK = """
import errno, os, sys
from raysim import storage
from raysim.cli import main
left, write = [int(sys.argv[1])], storage._write
def on_a_full_disk(path, content, *, mode):
    left[0] -= 1
    if left[0] < 0:
        write(path, content[: len(content) // 2], mode=mode)
        raise OSError(errno.ENOSPC, "No space left on device")
    write(path, content, mode=mode)
storage._write = on_a_full_disk
sys.exit(main(sys.argv[2:]))
"""


Finish = Callable[[Sequence[str]], tuple[int, str]]


@dataclass(frozen=True)
class Fault:
    """A fault, what it strikes, and when: the share of the undisturbed run's time, or of its writes."""

    number: int
    kind: str
    fault: str
    moment: float

    @property
    def on_ray(self) -> bool:
        """Whether the run needs actors."""
        return self.fault in ON_RAY or self.kind == "sweep"


def campaign(num_faults: int, *, seed: int) -> list[Fault]:
    """The faults in their order: every kind of run and every fault as often as any other, at drawn moments."""
    rng, kinds, struck = random.Random(seed), list(KINDS), dict.fromkeys(FAULTS, 0)
    chosen = []
    for number in range(num_faults):
        kind = kinds[number % len(kinds)]
        fault = min((one for one in FAULTS if fits(one, kind)), key=lambda one: (struck[one], rng.random()))
        struck[fault] += 1
        chosen.append(Fault(number, kind, fault, rng.uniform(0.05, 0.95)))
    return chosen


def fits(fault: str, kind: str) -> bool:
    """Whether a kind of run can meet a fault: without training there are no checkpoints, and trials have actors of their own."""
    if kind == "base":
        return fault not in ("bit in a checkpoint", *ON_RAY)
    return kind not in ("sweep", "compare") or fault in (*SIGNALS, "pause")


def arguments(fault: Fault, *, out: Path, model: str) -> list[str]:
    """The words of the command that a fault strikes."""
    command, *settings = KINDS[fault.kind]
    sizes = TINY if model == "tiny" else [f"model.name={model}", *SMALL]
    backend = ["resources.backend=ray", "resources.num_actors=2"] if fault.on_ray and fault.kind != "sweep" else []
    local = [] if fault.on_ray else ["resources.backend=local"]
    path = out.parent / f"{out.name}.yaml"
    path.write_text("{}\n", encoding="utf-8")
    return [command, str(path), *sizes, *settings, *backend, *local, f"out={out}", "--quiet"]


def start(words: Sequence[str], *, room: int | None = None) -> subprocess.Popen[bytes]:
    """The command in a process group of its own; with `room` for so many files on the disk."""
    program = ["-m", "raysim"] if room is None else ["-c", FULL_DISK, str(room)]
    told = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *words], env=told, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(words: Sequence[str]) -> tuple[int, str]:
    """The status of the finished command, and what it said of its failure."""
    process = start(words)
    _, said = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said.decode()


def strike(fault: Fault, *, out: Path, usual_s: float, model: str, finish: Finish = finish) -> str:
    """Starts the run, lets the fault happen, and runs the same command until it ends well; what went wrong, or nothing."""
    words = arguments(fault, out=out, model=model)
    if fault.fault == "full disk":
        process = start(words, room=int(40 * fault.moment))
        _, said = process.communicate(timeout=PATIENCE_S)
        if process.returncode not in (0, 1) or b"Traceback" in said:
            return f"status {process.returncode}: {said[-200:]!r}"
    elif fault.fault == "bit in a finished run":
        finish(words)
        flip(next(out.glob("adapter/**/*.safetensors")), fault.moment)
    else:
        disturb(fault, start(words), usual_s=usual_s, out=out)
    status, said_again = finish(words)
    return "" if status == 0 else f"status {status}: {said_again[-200:]!r}"


def disturb(fault: Fault, process: subprocess.Popen[bytes], *, usual_s: float, out: Path) -> None:
    """Waits for the moment and does to the running command what the fault is."""
    deadline = time.monotonic() + fault.moment * usual_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        if fault.fault in ON_RAY:
            name = "ClientActor" if "client" in fault.fault else "ServerActor"
            for child in psutil.Process(process.pid).children(recursive=True):
                if name in child.name() or any(name in word for word in child.cmdline()):
                    child.kill()
                    break
        elif fault.fault == "pause":
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(2.0)
            os.killpg(process.pid, signal.SIGCONT)
        else:
            process.send_signal(SIGNALS.get(fault.fault, signal.SIGKILL))
    process.communicate(timeout=PATIENCE_S)
    if fault.fault == "bit in a checkpoint" and (tensors := sorted(out.glob("state/round-*/*.safetensors"))):
        flip(tensors[-1], fault.moment)


def flip(path: Path, moment: float) -> None:
    """Turns a bit of a file in place."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * moment)] ^= 1
    with path.open("r+b") as file:
        file.write(content)


def results(out: Path) -> dict[str, Any]:
    """All results below a folder by file, without the times they took."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("summary.json")):
        run = path.parent
        if not (run / "ledger.json").is_file():
            continue
        name = str(run.relative_to(out))
        found[f"{name}: adapter"] = json.loads(path.read_text(encoding="utf-8"))["adapter_sha256"]
        found[f"{name}: ledger"] = json.loads((run / "ledger.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text(encoding="utf-8").split("\n") if line]
        found[f"{name}: rounds"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        for file in ("answers.jsonl", "synthetic.jsonl"):
            found[f"{name}: {file}"] = (run / file).read_bytes() if (run / file).is_file() else None
    return found


def undisturbed(fault: Fault, *, out: Path, model: str, finish: Finish = finish) -> tuple[dict[str, Any], float]:
    """The results of the fault's run when nothing happens to it, and its seconds."""
    began = time.monotonic()
    status, said = finish(arguments(fault, out=out, model=model))
    assert status == 0, said
    return results(out), time.monotonic() - began


def survived(fault: Fault, expected: tuple[dict[str, Any], float], *, out: Path, model: str, finish: Finish = finish) -> str:
    """What differs from the undisturbed run after the fault, or what went wrong before; nothing if it survived."""
    problem = strike(fault, out=out, usual_s=expected[1], model=model, finish=finish)
    found = {} if problem else results(out)
    return problem or next((f"{key} differs" for key in expected[0] if found.get(key) != expected[0][key]), "")


def main() -> int:
    """Runs the campaign, prints and writes a line a fault, and returns 1 unless all survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=66)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--only", default="", help="kinds of runs, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    given = parser.parse_args()
    chosen = [fault for fault in campaign(given.faults, seed=given.seed) if not given.only or fault.kind in given.only.split(",")]
    rows, expected = [], dict[str, tuple[dict[str, Any], float]]()
    with tempfile.TemporaryDirectory() as scratch:
        for fault in chosen:
            if fault.kind not in expected:
                expected[fault.kind] = undisturbed(fault, out=Path(scratch) / f"undisturbed-{fault.kind}", model=given.model)
            out = Path(scratch) / f"fault-{fault.number}"
            problem = survived(fault, expected[fault.kind], out=out, model=given.model)
            rows.append(
                {"number": fault.number, "run": fault.kind, "fault": fault.fault, "moment": round(fault.moment, 3), "problem": problem}
            )
            print(f"{fault.number:3d}  {fault.kind:<16} {fault.fault:<22} at {fault.moment:.2f}  {problem or 'survived'}", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    num_survived = sum(not row["problem"] for row in rows)
    print(f"{num_survived} / {len(rows)} survived")
    where = environment()
    machine = {key: where[key] for key in ("commit", "processor", "num_cpus", "packages")} | {"python": platform.python_version()}
    table = {"model": given.model, "seed": given.seed, "survived": num_survived, "total": len(rows), "faults": rows, "environment": machine}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0 if num_survived == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
