"""A run that is killed in the middle of any round and started again ends as one that was left alone."""

import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from raysim.config import Config, load, to_yaml
from raysim.federation import checkpoint
from raysim.runs.run import Backend, open_backend, run
from tests.small_runs import command, environment, results, small, started, wait_for, warm_raysim

NUM_ROUNDS = 4
ROUNDS = [f"server.num_rounds={NUM_ROUNDS}", "train.num_epochs=4"]
LATE = [
    "partition.num_clients=4",
    "clients.speed=lognormal",
    "clients.spread=2",
    "clients.token_s=0.1",
    "clients.deadline_s=60",
    "clients.late=stale",
]
PATIENCE_S = 240


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The tiny model in this process."""
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def undisturbed(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function to the folder of a method's run that was left alone, each made once."""
    folders: dict[tuple[str, ...], Path] = {}

    def make(method: str, *more: str) -> Path:
        if (method, *more) not in folders:
            out = folders[method, *more] = tmp_path_factory.mktemp("undisturbed") / "run"
            run(small(method, *ROUNDS, *more, out=out), display=False, backend=backend)
        return folders[method, *more]

    return make


@pytest.mark.parametrize(
    ("method", "more"), [("fedit", []), ("fedpit", []), ("dplora-example", []), ("scaffold", ["server.optimizer=adam", "server.lr=0.01"])]
)
def test_a_run_killed_in_its_first_and_in_later_rounds_ends_like_an_undisturbed_one(
    undisturbed: Callable[..., Path], tmp_path: Path, method: str, more: list[str]
) -> None:
    out = tmp_path / "run"
    config = saved(small(method, *ROUNDS, *more, out=out), tmp_path)
    for reached in (out / "partition.json", out / "state" / "round-00002"):
        kill_when(reached, config, out=out)
    finish(config, tmp_path)
    assert results(out) == results(undisturbed(method, *more))


@pytest.mark.slow
def test_a_run_on_ray_that_is_killed_ends_like_an_undisturbed_one_in_process(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = saved(small("fedpit", *ROUNDS, "resources.backend=ray", "resources.num_actors=2", out=out), tmp_path)
    kill_when(out / "state" / "round-00001", config, out=out)
    finish(config, tmp_path)
    assert results(out) == results(undisturbed("fedpit"))


INTERRUPTED = """
import signal, sys, time
import raysim
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    raysim.run(raysim.load(sys.argv[1]))
except KeyboardInterrupt:
    time.sleep(3)  # for all that Ray may have to say
    sys.exit("interrupted")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sent", "status", "last"),
    [
        (command("run"), signal.SIGTERM, 143, "raysim: interrupted; the same command continues from the last finished round"),
        ([sys.executable, "-c", INTERRUPTED], signal.SIGINT, 1, "interrupted"),
    ],
    ids=["command", "python"],
)
def test_a_run_that_is_interrupted_while_its_actors_are_at_work_says_so_and_no_more(
    tmp_path: Path, words: list[str], sent: signal.Signals, status: int, last: str
) -> None:
    long = ["server.num_rounds=2", "train.num_epochs=50", "resources.backend=ray", "resources.num_actors=2"]
    out = tmp_path / "run"
    words = [*words, str(saved(small("fedit", *long, out=out), tmp_path))]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)
    wait_for((out / "state" / "round-00001").exists, process)
    time.sleep(0.5)  # the clients train for longer than this
    process.send_signal(sent)
    printed = process.communicate(timeout=PATIENCE_S)[0].decode()
    assert process.returncode == status, printed
    assert printed.splitlines()[-1] == last
    assert not re.search(r"raylet|task_manager", printed), "Ray tells of the tasks that ended with their actors"
    assert not (out / "state" / "round-00002").exists(), "the run was over before it was interrupted"


@pytest.mark.parametrize("name", ["server.safetensors", "client-00001.safetensors", "records.json", "manifest.json"])
def test_a_checkpoint_with_a_flipped_bit_is_passed_over_for_the_one_before(
    backend: Backend, undisturbed: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    out = unfinished(undisturbed("fedpit"), tmp_path / "run")
    damaged = out / "state" / f"round-{NUM_ROUNDS:05d}" / name
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    before = (out / "state" / f"round-{NUM_ROUNDS - 1:05d}" / "manifest.json").stat().st_mtime_ns
    run(small("fedpit", *ROUNDS, out=out), display=False, backend=backend)
    assert results(out) == results(undisturbed("fedpit"))
    assert (out / "state" / f"round-{NUM_ROUNDS - 1:05d}" / "manifest.json").stat().st_mtime_ns == before, "one round is repeated, not two"


ADAPTIVE = ("fedit-client", "privacy.clipping=adaptive", "privacy.delta=1e-5")
FORGED: dict[str, tuple[tuple[str, ...], Callable[[Path], object], str]] = {
    "adapter": (
        ("scaffold",),
        lambda at: change(at / "server.safetensors", "adapter", lambda one: one[:-1]),
        "the server's adapter has another",
    ),
    "late": (("fedit", *LATE), lambda at: change(at / "server.safetensors", "late_weight", lambda one: one * np.inf), "are not finite"),
    "control": (("scaffold",), lambda at: change(at / "client-00001.safetensors", "control", lambda one: one[:3]), "client 1 .*: control"),
    "nan": (("fedpit",), lambda at: change(at / "client-00001.safetensors", "adapter", lambda one: one * np.nan), "client 1 .*: adapter"),
    "of a rule": (
        ("fedit", "lora.aggregation=fedsa"),
        lambda at: change(at / "client-00002.safetensors", "lora.own_B", lambda one: one[1:]),
        r"client 2 .*: lora\.own_B",
    ),
    "bound": (ADAPTIVE, lambda at: rewrite(at / "records.json", clip_norm=math.nan), "clip_norm=nan is no bound"),
    "no bound": (("scaffold",), lambda at: rewrite(at / "records.json", clip_norm=1.0), "clip_norm=1 is no bound"),
    "number": (("scaffold",), lambda at: rewrite(at / "manifest.json", num_rounds=99), "it says 99 rounds of 4"),
}
"""By name a run, a change to its last checkpoint that leaves every checksum right, and what is said of it."""


@pytest.mark.parametrize("name", FORGED)
def test_a_checkpoint_with_right_checksums_that_cannot_be_of_the_run_is_passed_over(
    backend: Backend, undisturbed: Callable[..., Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (method, *more), forge, said = FORGED[name]
    expected = undisturbed(method, *more)
    out = unfinished(expected, tmp_path / "run")
    newest = out / "state" / f"round-{NUM_ROUNDS:05d}"
    forge(newest)
    sign(newest)
    if name == "number":
        newest = newest.rename(newest.with_name("round-00099"))
    assert checkpoint.load_checkpoint(newest), "by its checksums it is sound"
    capsys.readouterr()
    run(small(method, *ROUNDS, *more, out=out), backend=backend)
    notes = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(notes) == 1
    assert re.search(f"checkpoint {newest.name} is damaged .*{said}", notes[0])
    assert results(out) == results(expected)


def change(path: Path, name: str, changed: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes one array of a file."""
    arrays = load_file(path)
    save_file(arrays | {name: np.ascontiguousarray(changed(arrays[name]))}, path)


def rewrite(path: Path, **values: object) -> None:
    """Changes values of an object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sign(folder: Path) -> None:
    """Gives a checkpoint's manifest the checksums of what is there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in manifest["files"]}
    signature = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    rewrite(folder / "manifest.json", files=manifest["files"], sha256=signature)


def test_a_bit_flipped_anywhere_in_a_checkpoints_list_of_files_is_seen(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    state = shutil.copytree(undisturbed("fedit") / "state", tmp_path / "state")
    manifest = state / f"round-{NUM_ROUNDS:05d}" / "manifest.json"
    sound = manifest.read_bytes()
    for position in range(0, len(sound) - 1, 13):
        manifest.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        snapshot, problems = checkpoint.load_latest(state)
        assert snapshot is not None
        assert (snapshot.num_rounds, len(problems)) == (NUM_ROUNDS - 1, 1), sound[position - 20 : position + 20]


def test_without_a_sound_checkpoint_a_run_starts_over(backend: Backend, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    out = unfinished(undisturbed("fedit"), tmp_path / "run")
    for folder in (out / "state").iterdir():
        (folder / "server.safetensors").unlink()
    run(small("fedit", *ROUNDS, out=out), display=False, backend=backend)
    assert results(out) == results(undisturbed("fedit"))


def test_a_finished_run_is_not_run_again(backend: Backend, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed("fedit"), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run(small("fedit", *ROUNDS, out=out), display=False, backend=None)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert again.summary == json.loads((out / "summary.json").read_text())
    assert [record["round_index"] for record in again.records] == list(range(NUM_ROUNDS))
    assert again.ledger == json.loads((out / "ledger.json").read_text())


def test_a_run_continues_where_and_how_fast_another_way_but_not_with_other_settings(
    backend: Backend, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    out = unfinished(undisturbed("fedit"), tmp_path / "run", keep=NUM_ROUNDS - 1)
    neutral = ["name=other", "resources.client.num_cpus=0.25", "resources.num_actors=2"]
    for different in ("train.lr=1e-3", "seed=1", "server.num_rounds=9", "resources.num_threads=2"):
        with pytest.raises(ValueError, match=different.split("=")[0]):
            run(small("fedit", *ROUNDS, different, out=out), display=False, backend=backend)
    run(small("fedit", *ROUNDS, *neutral, out=out), display=False, backend=backend)
    assert results(out) == results(undisturbed("fedit"))


def test_a_checkpoint_from_before_a_setting_existed_had_its_default(
    backend: Backend, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    out = unfinished(undisturbed("fedit"), tmp_path / "run", keep=NUM_ROUNDS - 1)
    snapshot, _ = checkpoint.load_latest(out / "state")
    assert snapshot is not None
    shutil.rmtree(out / "state")
    older = {key: value for key, value in snapshot.config_key.items() if key != "server.optimizer"}
    checkpoint.save(out / "state", dataclasses.replace(snapshot, config_key=older))
    text = (out / "config.yaml").read_text()
    assert text.count("  optimizer: none\n") == 1
    (out / "config.yaml").write_text(text.replace("  optimizer: none\n", "  optimizer: momentum\n"))
    with pytest.raises(ValueError, match=r"other settings \(server\.optimizer\)"):
        run(small("fedit", *ROUNDS, "server.optimizer=momentum", out=out), display=False, backend=backend)
    (out / "config.yaml").write_text(text.replace("  optimizer: none\n", ""))
    run(small("fedit", *ROUNDS, out=out), display=False, backend=backend)
    assert results(out) == results(undisturbed("fedit"))


def saved(config: Config, folder: Path) -> Path:
    """The configuration as a file for the command line."""
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    assert load(path) == dataclasses.replace(config), "the file says what the configuration says"
    return path


def kill_when(reached: Path, config: Path, *, out: Path) -> None:
    """Starts the run and kills it with all it started at a random moment of the round after `reached` appears."""
    command = started("run", str(config), cwd=config.parent)
    wait_for(reached.exists, command, patience_s=PATIENCE_S)
    time.sleep(random.uniform(0.0, 0.15))
    command.kill()
    assert not (out / "summary.json").exists(), "the run was over before it was killed"


def finish(config: Path, folder: Path) -> None:
    """Gives the same command again, which must succeed."""
    done = warm_raysim("run", str(config), "--quiet", cwd=folder)
    assert done.returncode == 0, done.stderr


def unfinished(finished: Path, out: Path, *, keep: int = NUM_ROUNDS) -> Path:
    """A copy of a run's folder as it was before its end, with checkpoints up to round `keep`."""
    shutil.copytree(finished, out)
    for name in ("summary.json", "report.html", "rounds.jsonl", "ledger.json"):
        (out / name).unlink()
    for number in range(keep + 1, NUM_ROUNDS + 1):
        shutil.rmtree(out / "state" / f"round-{number:05d}")
    return out
