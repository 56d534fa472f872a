"""How many clients does a round carry: this build against that of commit 801247d and against peers, all in one run?

One table: rounds without local work through the client and server actors (460,800 float32, two actors; 1,000 clients without and with clipping, and
this build at 10,000), clients with a step of their own on the tiny model, the files and pages of 10,000 clients, and the first training step of a
fresh command. The earlier build is unpacked from git beside this one; peers are installed at pinned versions into environments of their own, and a row
without a figure says why. Only ratios within one run count: the sides take turns.

    python benchmarks/scale.py [--quick] [--without-peers]
"""

import argparse
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from raysim.results.files import environment

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).parent / "peers"
BEFORE = "801247d"
VERSIONS = {"pfl": "pfl==0.6.0"}
"""Peers that are installed, as pip takes them."""
REACH = {"transport": 10.0, "transport, 10,000": 0.8, "many": 8.0}
"""Times the earlier build's rate; for 10,000 clients, times this build's own rate at 1,000."""
PATIENCE_S = 400


def unpacked(commit: str, folder: Path) -> Path:
    """The source tree of a commit, below `folder`."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def measured(program: str, *arguments: str, tree: Path = ROOT, python: str = sys.executable) -> dict[str, Any]:
    """What a program of `peers/` printed, run with the package of a source tree; `why` in place of figures where it failed."""
    path = os.pathsep.join([str(tree), str(PEERS)])
    threads = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path}
    command = [python, str(PEERS / program), *arguments]
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):  # pipes would stay open as long as a daemon that was left
        process = subprocess.Popen(command, env=os.environ | threads, stdout=out, stderr=err, text=True, start_new_session=True)
        try:
            status = process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {"why": f"longer than {PATIENCE_S} s"}
        out.seek(0)
        err.seek(0)
        lines, said = out.read().strip().split("\n"), (err.read().strip() or "nothing").split("\n")
    if status or not lines[-1].startswith("{"):
        return {"why": said[-1][:200]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def installed(peer: str, folder: Path) -> str:
    """The interpreter of an environment with a peer in it.

    Errors: RuntimeError saying why it cannot be had.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    [own] = (folder / "lib").glob("python*/site-packages")
    (own / "outer.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")  # torch and Ray are those of this environment
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", VERSIONS[peer]], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "pip failed").split("\n")[-1][:200])
    return str(python)


def by_turns(*arguments: str, before: Path, ours: tuple[str, ...] = (), turns: int) -> dict[str, Any]:
    """Both builds at the same work, in turns: each one's median rate, and the median of the turns' ratios."""
    found: dict[str, list[dict[str, Any]]] = {"before": [], "ours": []}
    for _ in range(turns):
        found["before"].append(measured("raysim_build.py", *arguments, tree=before))
        found["ours"].append(measured("raysim_build.py", *arguments, *ours))
    failed = [each["why"] for side in found.values() for each in side if "why" in each]
    if failed:
        return {"why": failed[0], "turns": found}
    pairs = [(one["rate"], other["rate"]) for one, other in zip(found["before"], found["ours"], strict=True)]
    return {
        "before": statistics.median(one for one, _ in pairs),
        "ours": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(other / one for one, other in pairs),
        "turns": found,
    }


def first_step(tree: Path) -> dict[str, Any]:
    """Seconds from the command to the end of the first round of a tiny run on Ray, in a fresh process, and of its later rounds."""
    settings = ["model.name=tiny", "train.dtype=float32", "train.max_steps=1", "server.num_rounds=3", "attack.every=-1", "evaluate.every=3"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "raysim", "run", "sweep-smoke", *settings, "resources.num_actors=2", f"out={folder}/run"]
        started = time.perf_counter()
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(tree)}, cwd=tree, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        total = time.perf_counter() - started
        if done.returncode:
            return {"why": (done.stderr.strip() or "nothing").split("\n")[-1][:200]}
        rounds = [json.loads(line)["client_s"] for line in (Path(folder) / "run" / "rounds.jsonl").read_text().strip().split("\n")]
    return {"command_s": total, "first_round_s": rounds[0], "later_round_s": statistics.median(rounds[1:])}


def peers_at(cohort: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Each peer's rate at a round without local work (of those that must train, one SGD step on the vector)."""
    found = {"bare Ray actors": measured("bare_ray.py", "--cohort", str(cohort))}
    for peer, program in (("pfl", "pfl_research.py"),):
        try:
            python = installed(peer, folder / peer)
            found[peer] = measured(program, "--cohort", str(min(cohort, 300)), python=python)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found[peer] = {"why": str(error)[:200]}
    return found


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """The rows as they are printed."""
    lines = [f"{'work':44}{'801247d':>10}{'ours':>10}{'ratio':>8}{'reach':>8}   unit"]
    for name, row in rows:
        if "why" in row:
            lines.append(f"{name:44}{row['why']}")
            continue
        cells = [f"{row[key]:>{width}.{digits}f}" if key in row else " " * width for key, width, digits in COLUMNS]
        lines.append(f"{name:44}{''.join(cells)}   {row['unit']}")
    return "\n".join(lines)


COLUMNS = (("before", 10, 0), ("ours", 10, 0), ("ratio", 8, 2), ("reach", 8, 1))


def main() -> None:
    """Measures, prints the table, and writes benchmarks/results/scale.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller cohorts and one turn, to see that it works")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    given = parser.parse_args()
    cohort, clients, turns = ("200", "64", 1) if given.quick else ("1000", "256", 2)
    rows: list[tuple[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        before = unpacked(BEFORE, Path(scratch) / "before")
        for name, more in (("", ()), (", clipped", ("--clip",))):
            both = by_turns("transport", "--cohort", cohort, *more, before=before, turns=turns)
            rows.append((f"round of {int(cohort):,} idle clients{name}", both | {"unit": "updates/s", "reach": REACH["transport"]}))
        ten = measured("raysim_build.py", "transport", "--cohort", str(10 * int(cohort)), "--rounds", "2")
        if "rate" in ten and "ours" in rows[0][1]:
            ten |= {"ours": ten["rate"], "ratio": ten["rate"] / rows[0][1]["ours"]}
        rows.append(
            (
                f"the same with {10 * int(cohort):,} (ratio: to the first row)",
                ten | {"unit": "updates/s", "reach": REACH["transport, 10,000"]},
            )
        )
        for size in ("1", "32"):
            both = by_turns("many", "--clients", clients, before=before, ours=("--batched", size), turns=turns)
            reach = {"reach": REACH["many"]} if size != "1" else {}
            rows.append((f"clients of one step, clients.batched={size}", both | {"unit": "clients/s"} | reach))
        starts = {"before": first_step(before), "ours": first_step(ROOT)}
        peers = {} if given.without_peers else peers_at(int(cohort), Path(scratch))
    rows += [(name, {"ours": row["rate"], "unit": "updates/s (peer)"} if "rate" in row else row) for name, row in peers.items()]
    print(table(rows))
    print(f"from the command to the end of a small run: {starts}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"rows": dict(rows), "starts": starts, "peers": peers, "machine": platform.machine(), "environment": environment()}
    given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
