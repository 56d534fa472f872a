"""Does a run end with the same files whatever dies, fills up or is damaged on the way? 66 seeded faults, each against an undisturbed run.

Faults: SIGKILL, SIGTERM and SIGINT of the command, SIGSTOP with SIGCONT of the command, of a client actor or of the server actor, SIGKILL of such an
actor, a disk that is full at a write or at the last two, a flipped bit in a checkpoint, a flipped bit in a finished run. Runs: every method, and the
privacy modes, server optimizers, robust rules and late clients, a comparison, a sweep, and the writing of a report. Moments are drawn as a share of
what the undisturbed run took from its first file (or first checkpoint) on, or of its writes. A process that was over before is struck anew, earlier;
a fault that hit nothing counts as a problem. Compared are the adapter's files and hash, ledger.json, answers.jsonl, synthetic.jsonl and
rounds.jsonl, times aside, and the page where a report is written.
Reach: all of them survive. Left out: nodes and networks (`tests/e2e/test_nodes.py`), and file systems that lie about what is on the disk.

    python benchmarks/faults.py [--faults 66] [--seed 0] [--model tiny]
"""

import argparse
import contextlib
import hashlib
import json
import math
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
from dataclasses import dataclass, replace
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
    "fedpit.num_demonstrations=2",
    "fedpit.num_response_demonstrations=2",
    "fedpit.min_instruction_words=1",
    "fedpit.max_rouge_l=1",
    "fedpit.max_instruction_tokens=8",
    "fedpit.max_response_tokens=8",
]
CLIENT = ["run", "method.name=fedit", "privacy.unit=client"]
KINDS: dict[str, list[str]] = {
    "report": ["run", "method.name=fedit"],
    "compare": ["compare", "compare={a: {method.name: fedit}, b: {method.name: locit}}"],
    "sweep": ["sweep", "method.name=fedit", "sweep.space={lora.rank: [2, 4]}", "resources.num_actors=1"],
    "fedit": ["run", "method.name=fedit"],
    "fedpit": ["run", "method.name=fedpit", *WRITING],
    "fedmit": ["run", "method.name=fedmit", *WRITING],
    "fewfedweight": ["run", "method.name=fewfedweight", "fewfedweight.max_response_tokens=8"],
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
}
"""What is run: the command, and its settings; of `report` the run whose report is then written again."""
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
ON_RAY = ("kill client actor", "kill server actor", "pause client actor", "pause server actor")
PAUSES = ("pause", "pause client actor", "pause server actor")
FULL_DISKS = ("full disk", "full disk at the end")
FAULTS = (*SIGNALS, "pause", *ON_RAY, *FULL_DISKS, "bit in a checkpoint", "bit in a finished run")
FROM_CHECKPOINT = (*ON_RAY, "bit in a checkpoint")
"""Those that strike once a first round is done; the others do from a run's first file on."""
PAUSE_S = 3.0
LOOK_S = 0.01
TRIES, EARLIER = 8, 0.6
"""How often a process is struck that was over before its moment, and at which share of that moment the next time."""
DISK = Path(__file__).with_name("disk.py")


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


@dataclass(frozen=True)
class Process:
    """A command at work: its process, its status once it is over, and the file of what it says on standard error."""

    pid: int
    poll: Callable[[], int | None]
    said: Path


Start = Callable[[Sequence[str], int, Path], Process]
"""Starts the command of these words on a disk with room for so many files (see `disk.limit`), each of which is noted in the log."""


@dataclass(frozen=True)
class Undisturbed:
    """What a run comes to when nothing happens to it: its folder, its results, its rounds, its writes, and when it was how far."""

    folder: Path
    results: dict[str, Any]
    num_rounds: int
    num_writes: int
    times: dict[str, float]
    """Of a clock in seconds: the first `state`, the first `checkpoint`, the last `round` and the last `write`."""

    def span_s(self, fault: str) -> float:
        """The seconds in which a fault has something to strike: actors have work until the last round is over."""
        first = "checkpoint" if fault in FROM_CHECKPOINT else "state"
        return self.times["round" if fault in ON_RAY else "write"] - self.times[first]


@dataclass(frozen=True)
class Outcome:
    """What a fault hit (nothing if it is empty), the rounds that were done by then, and what went wrong (nothing if it is empty)."""

    struck: str
    rounds_done: int
    problem: str = ""


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
    """Whether a kind of run can meet a fault.

    Without training there are no checkpoints and nothing for actors to do; a report has neither, nor much to stand still; a comparison is run
    without actors here; and trials of a sweep have processes of their own, which write their files.
    """
    if kind == "base":
        return fault not in FROM_CHECKPOINT
    if kind == "report":
        return fault in (*SIGNALS, "full disk")
    if kind == "sweep":
        return fault in (*SIGNALS, "pause")
    return kind != "compare" or fault not in ON_RAY


def arguments(fault: Fault, *, out: Path, model: str) -> list[str]:
    """The words of the command that makes a fault's run."""
    command, *settings = KINDS[fault.kind]
    sizes = TINY if model == "tiny" else [f"model.name={model}", *SMALL]
    backend = ["resources.backend=ray", "resources.num_actors=2"] if fault.on_ray and fault.kind != "sweep" else []
    local = [] if fault.on_ray else ["resources.backend=local"]
    path = out.parent / f"{out.name}.yaml"
    path.write_text("{}\n", encoding="utf-8")
    return [command, str(path), *sizes, *settings, *backend, *local, f"out={out}", "--quiet"]


def target(fault: Fault, *, out: Path, model: str) -> list[str]:
    """The words of the command that a fault strikes."""
    return ["report", str(out)] if fault.kind == "report" else arguments(fault, out=out, model=model)


def start(words: Sequence[str], room: int, log: Path) -> Process:
    """The command, in an interpreter and a process group of its own."""
    told = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    program, said = [sys.executable, "-P", str(DISK), str(room), str(log)], log.with_suffix(".said")
    with said.open("wb") as file:
        process = subprocess.Popen([*program, *words], env=told, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)
    return Process(process.pid, process.poll, said)


def ended(process: Process, look: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """The status of the process once it is over, and what it said of its failure; it `look`s on until then."""
    deadline = time.monotonic() + PATIENCE_S
    while (status := process.poll()) is None:
        look()
        time.sleep(LOOK_S)
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            deadline = math.inf
    return status, process.said.read_text(encoding="utf-8", errors="replace")


def undisturbed(fault: Fault, *, out: Path, model: str, start: Start = start) -> Undisturbed:
    """The fault's run when nothing happens to it, in the folder `out`.

    Errors: RuntimeError with what the command said if it failed.
    """
    if fault.kind == "report":
        status, said = ended(start(arguments(fault, out=out, model=model), -1, fresh_log(out)))
        if status != 0:
            raise RuntimeError(said)
    log, times, last = fresh_log(out), dict[str, float](), {"round": rounds_done(out), "write": 0}

    def look() -> None:
        counts, at = {"round": rounds_done(out), "write": len(noted(log))}, time.monotonic()
        if has_state(fault, out, log):
            times.setdefault("state", at)
        for name, count in counts.items():
            if count > last[name]:
                last[name], times[name] = count, at
        if "round" in times:
            times.setdefault("checkpoint", at)

    status, said = ended(start(target(fault, out=out, model=model), -1, log), look)
    if status != 0:
        raise RuntimeError(said)
    look()
    return Undisturbed(out, results(fault, out), last["round"], last["write"], times)


def survived(fault: Fault, expected: Undisturbed, *, out: Path, model: str, start: Start = start) -> Outcome:
    """What the fault hit, and what differs from the undisturbed run once the same command has ended well, or what went wrong before."""
    outcome = Outcome("", 0)
    for number in range(TRIES):
        shutil.rmtree(out, ignore_errors=True)
        if fault.kind == "report" or fault.fault == "bit in a finished run":
            shutil.copytree(expected.folder, out)
        earlier = replace(fault, moment=fault.moment * EARLIER**number)
        outcome = strike(earlier, expected, out=out, model=model, start=start)
        if outcome.struck or outcome.problem:
            break
    if outcome.problem or not outcome.struck:
        return replace(outcome, problem=outcome.problem or "nothing was struck")
    status, said = ended(start(target(fault, out=out, model=model), -1, fresh_log(out)))
    if status != 0:
        return replace(outcome, problem=f"status {status}: {said[-200:]!r}")
    found = results(fault, out)
    return replace(outcome, problem=next((f"{key} differs" for key in expected.results if found.get(key) != expected.results[key]), ""))


def strike(fault: Fault, expected: Undisturbed, *, out: Path, model: str, start: Start = start) -> Outcome:
    """Starts the command and lets the fault happen to it, or to what it left."""
    if fault.fault == "bit in a finished run":
        return Outcome(flip(min(out.rglob("adapter/**/*.safetensors")), fault.moment, out=out), rounds_done(out))
    words, log = target(fault, out=out, model=model), fresh_log(out)
    if fault.fault in FULL_DISKS:
        return fill(fault, words, expected, out=out, log=log, start=start)
    process = start(words, -1, log)
    wait_for_moment(fault, process, expected, out=out, log=log)
    rounds, writes = rounds_done(out), len(noted(log))
    at_work = rounds < expected.num_rounds if fault.fault in ON_RAY else writes < expected.num_writes
    struck = disturb(fault, process) if at_work and process.poll() is None else ""
    status, said = ended(process)
    if fault.fault in PAUSES or fault.fault in ON_RAY:
        problem = f"status {status}: {said[-200:]!r}" if status else ""
        return Outcome(struck and f"{struck} after {writes} of {expected.num_writes} files", rounds, problem)
    if status == 0:  # it was over before the signal came
        return Outcome("", rounds)
    struck = struck and f"{struck} after {len(noted(log))} of {expected.num_writes} files"
    if struck and fault.fault == "bit in a checkpoint":
        newest = max(out.glob("**/state/round-*"), key=lambda path: (path.stat().st_mtime, path.name))
        struck = flip(max(newest.glob("*.safetensors")), fault.moment, out=out)
    return Outcome(struck, rounds_done(out))


def fill(fault: Fault, words: Sequence[str], expected: Undisturbed, *, out: Path, log: Path, start: Start) -> Outcome:
    """Runs the command on a disk that is full at a file of its moment, or at one of the last two: the page and the hashes."""
    at_the_end = expected.num_writes - (2 if fault.moment < 0.5 else 1)
    room = at_the_end if fault.fault == "full disk at the end" else int(expected.num_writes * fault.moment)
    status, said = ended(start(words, room, log))
    if not noted(log).endswith(b"x"):
        return Outcome("", rounds_done(out), f"status {status}: {said[-200:]!r}" if status else "")
    problem = f"status {status}: {said[-200:]!r}" if status != 1 or "Traceback" in said else ""
    return Outcome(f"file {room + 1} of {expected.num_writes}", rounds_done(out), problem)


def wait_for_moment(fault: Fault, process: Process, expected: Undisturbed, *, out: Path, log: Path) -> None:
    """Returns at the moment of a fault, or when the process is over."""
    deadline = math.inf
    while process.poll() is None and time.monotonic() < deadline:
        begun = rounds_done(out) > 0 if fault.fault in FROM_CHECKPOINT else has_state(fault, out, log)
        if begun and deadline == math.inf:
            deadline = time.monotonic() + fault.moment * expected.span_s(fault.fault)
        time.sleep(LOOK_S)


def disturb(fault: Fault, process: Process) -> str:
    """Does to the running command, or to an actor of it, what the fault is; what it hit, or nothing if that is no longer there."""
    if fault.fault == "pause":
        return "the command" if paused(process.pid, group=True) else ""
    if fault.fault not in ON_RAY:
        os.kill(process.pid, SIGNALS.get(fault.fault, signal.SIGKILL))
        return "the command"
    name = "ray::ClientActor" if "client" in fault.fault else "ray::ServerActor"
    with contextlib.suppress(psutil.NoSuchProcess):
        titles = {child: " ".join(child.cmdline()) for child in psutil.Process(process.pid).children(recursive=True)}
        actors = [child for child, title in titles.items() if title.startswith(name)]
        if actors:
            actor = max(actors, key=lambda child: "." in titles[child])  # one with a call, if there is one
            if fault.fault in PAUSES:
                return titles[actor] if paused(actor.pid) else ""
            actor.kill()
            return titles[actor]
    return ""


def paused(pid: int, *, group: bool = False) -> bool:
    """Whether the process (with its group) was stopped for a while, which it was not if it is over."""
    tell = os.killpg if group else os.kill
    try:
        tell(pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        stood = psutil.Process(pid).status() == psutil.STATUS_STOPPED
        tell(pid, signal.SIGCONT)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    return stood


def flip(path: Path, moment: float, *, out: Path) -> str:
    """Turns a bit of a file in place, and returns which."""
    content = bytearray(path.read_bytes())
    place = int(len(content) * moment)
    content[place] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    return f"{path.relative_to(out)}, byte {place}"


def fresh_log(out: Path) -> Path:
    """The log of a command's writes, empty."""
    log = out.with_name(f"{out.name}.writes")
    log.write_bytes(b"")
    return log


def noted(log: Path) -> bytes:
    """What the log holds, a byte a file (see `disk.py`)."""
    return log.read_bytes()


def runs(out: Path) -> list[Path]:
    """The folders of the runs that have begun: `out` itself, or those of a comparison or a sweep."""
    return [path.parent for where in ("", "*/", "trials/*/") for path in out.glob(f"{where}partition.json")]


def has_state(fault: Fault, out: Path, log: Path) -> bool:
    """Whether the folder has the first of what a run begins with, or a report's first file was written anew."""
    return bool(noted(log) if fault.kind == "report" else runs(out))


def rounds_done(out: Path) -> int:
    """The rounds of which a complete checkpoint has been written, of all runs together."""
    newest = (max((path.name for path in (run / "state").glob("round-*")), default="0") for run in runs(out))
    return sum(int(name.removeprefix("round-")) for name in newest)


def results(fault: Fault, out: Path) -> dict[str, Any]:
    """All results below a folder by file, without the times they took; of a report its page and the hashes, which are of its figures too."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("summary.json")):
        run = path.parent
        if not (run / "ledger.json").is_file():
            continue
        name = str(run.relative_to(out))
        found[f"{name}: adapter"] = json.loads(path.read_text(encoding="utf-8"))["adapter_sha256"]
        adapters = sorted((run / "adapter").rglob("*.safetensors"))
        found[f"{name}: adapter's files"] = {str(one.relative_to(run)): hashlib.sha256(one.read_bytes()).hexdigest() for one in adapters}
        found[f"{name}: ledger"] = json.loads((run / "ledger.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text(encoding="utf-8").split("\n") if line]
        found[f"{name}: rounds"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        for file in ("answers.jsonl", "synthetic.jsonl"):
            found[f"{name}: {file}"] = (run / file).read_bytes() if (run / file).is_file() else None
    pages = ("report.html", "sha256.json") if fault.kind == "report" else ()
    return found | {file: (out / file).read_bytes() for file in pages}


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
    rows, expected = [], dict[tuple[str, bool], Undisturbed]()
    with tempfile.TemporaryDirectory() as scratch:
        for fault in chosen:
            key, out = (fault.kind, fault.on_ray), Path(scratch) / f"fault-{fault.number}"
            place = Path(scratch) / f"undisturbed-{fault.kind}{'-on-ray' if fault.on_ray else ''}"
            try:
                if key not in expected:
                    expected[key] = undisturbed(fault, out=place, model=given.model)
                outcome = survived(fault, expected[key], out=out, model=given.model)
            except RuntimeError as error:
                outcome = Outcome("", 0, f"undisturbed: {str(error)[-200:]!r}")
            row = {"number": fault.number, "run": fault.kind, "fault": fault.fault, "moment": round(fault.moment, 3)}
            rows.append(row | {"struck": outcome.struck, "rounds_done": outcome.rounds_done, "problem": outcome.problem})
            hit = f"{outcome.struck}, {outcome.rounds_done} rounds done"
            print(
                f"{fault.number:3d}  {fault.kind:<16} {fault.fault:<22} at {fault.moment:.2f}  {outcome.problem or 'survived'}  ({hit})",
                flush=True,
            )
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
