"""Sweeps in this process's Ray: what a trial's row says, what fails, stops, continues, fits, and is refused.

Left out: whole commands, and being killed (tests/e2e/test_sweep.py).
"""

import contextlib
import csv
import dataclasses
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler

from raysim.config import Config, load
from raysim.console.sweep_progress import SweepProgress
from raysim.federation.on_ray.base import shared_base
from raysim.federation.setup import data_key, encode_data, prepare
from raysim.federation.worker import Worker
from raysim.privacy.selection import draw_num_trials, selection_epsilon, worst_releases
from raysim.results.files import HASHES, hashes
from raysim.results.folders import RunFolder
from raysim.runs.run import load_model, resolved, run
from raysim.sweeps.space import support_points, trial_config
from raysim.sweeps.sweep import decided, planned, selection, sweep
from raysim.sweeps.trial import status, trial_folder
from raysim.sweeps.tune import NO_OTHERS, Watch, bundles, scheduler_of, share_data, share_models, tell
from tests.conftest import SMALL
from tests.small_runs import results

PATIENCE_S = 200
"""The longest that a test waits for a trial."""
TIMES = ("wall_s", "tokens_per_s")
pytestmark = pytest.mark.usefixtures("ray_session")  # one node with 4 CPUs and 2 GPUs on paper


def small_sweep(out: Path, *overrides: str) -> Config:
    """A small sweep into `out`, one trial after the other in a process beside this one, which takes seconds to start."""
    return load("", [*SMALL, f"out={out}", "resources.client.num_cpus=1", "sweep.loggers=[]", "sweep.max_concurrent=1", *overrides])


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A line of results.csv but for what depends on the machine."""
    return {key: value for key, value in row.items() if key not in TIMES}


@dataclasses.dataclass(frozen=True)
class Newcomer:
    """What a scheduler asks of a trial."""

    trial_id: str = "newcomer"


def write_rounds(folder: Path, losses: list[float]) -> None:
    """A run's records with these held-out losses."""
    folder.mkdir(parents=True)
    common = {"num_tokens": 1, "uplink_bytes": 1, "wall_s": 1.0, "epsilon": None, "attack": None}
    lines = [json.dumps({"round_index": i, "eval": {"heldout_nll": loss}} | common) for i, loss in enumerate(losses)]
    (folder / "rounds.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A sweep of three trials of which one cannot be: no layer has such a name."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return small_sweep(out, "sweep.space={lora.target_modules: [[q_proj], [v_proj], [no_such_layer]]}", "sweep.max_concurrent=2")


@pytest.fixture(scope="module")
def finished(failing: Config, ray_session: None) -> Any:
    """That sweep at its end."""
    return sweep(failing, display=False)


def test_a_trial_is_the_run_that_its_settings_make_and_one_that_fails_is_a_row(failing: Config, finished: Any, tmp_path: Path) -> None:
    points = planned(decided(failing))
    assert [row["trial"] for row in finished.rows] == [point.name for point in points]
    assert [row["status"] for row in finished.rows] == ["done", "done", "failed"]
    alone = run(dataclasses.replace(trial_config(failing, points[1], out=""), out=str(tmp_path / "alone")), display=False)
    row = finished.rows[1]
    assert row["adapter_sha256"] == alone.summary["adapter_sha256"] != finished.rows[0]["adapter_sha256"]
    assert (row["heldout_nll"], row["leakage"]) == (alone.summary["eval"]["heldout_nll"], alone.summary["attack"]["train_rouge_l"])
    assert (row["num_rounds"], row["uplink_bytes"], row["num_tokens"]) == tuple(
        alone.summary[key] for key in ("num_rounds", "uplink_bytes", "num_tokens")
    )
    assert row["epsilon"] is None
    assert "no_such_layer" in finished.rows[2]["error"]
    assert "\n" not in finished.rows[2]["error"]
    assert finished.rows[2]["heldout_nll"] is None


def test_the_table_on_disk_says_the_same_and_the_page_stands_beside_it(finished: Any) -> None:
    with (finished.out / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{key: str("" if row.get(key) is None else row[key]) for key in table[0]} for row in finished.rows] == table
    assert table[0]["folder"] == f"trials/{table[0]['trial']}"
    assert (finished.out / table[0]["folder"] / "adapter" / "adapter_model.safetensors").is_file()
    assert finished.summary["num_trials"] == {"all": 3, "done": 2, "stopped": 0, "failed": 1}
    assert finished.report.read_text().lstrip().lower().startswith("<!doctype html>")


def test_what_is_finished_is_not_run_again_what_failed_is_and_how_many_run_at_once_does_not_matter(failing: Config, finished: Any) -> None:
    done = [trial_folder(finished.config, point) for point in planned(finished.config)][:2]
    before = {path: path.stat().st_mtime_ns for folder in done for path in folder.rglob("*")}
    fewer = dataclasses.replace(failing, sweep=dataclasses.replace(failing.sweep, max_concurrent=1))
    assert sweep(fewer, display=False).rows == finished.rows
    assert {path: path.stat().st_mtime_ns for folder in done for path in folder.rglob("*")} == before
    assert len(list((finished.out / "tune").iterdir())) == 2, "Tune was started once more, for what had failed"


def test_another_sweeps_folder_is_refused(failing: Config, finished: Any) -> None:
    more = dataclasses.replace(failing.sweep, space={"lora.rank": [2, 4, 8]})
    with pytest.raises(ValueError, match=r"belongs to another sweep \(sweep.space="):
        sweep(dataclasses.replace(failing, sweep=more), display=False)
    with pytest.raises(ValueError, match=r"belongs to another sweep \(seed=0 there and 1 here"):
        sweep(dataclasses.replace(failing, seed=1), display=False)


def test_points_that_come_to_one_run_share_it(tmp_path: Path) -> None:
    done = sweep(small_sweep(tmp_path / "out", "sweep.space={privacy.target_epsilon: [1, 2], method.name: [fedit, dplora]}"), display=False)
    assert [(row["status"], row["privacy.target_epsilon"], row["method.name"]) for row in done.rows] == [
        ("done", epsilon, method) for epsilon in (1, 2) for method in ("fedit", "dplora")
    ]
    assert done.rows[0]["folder"] == done.rows[2]["folder"]
    assert done.rows[0]["adapter_sha256"] == done.rows[2]["adapter_sha256"] != done.rows[1]["adapter_sha256"]
    assert len(list((done.out / "trials").iterdir())) == 3
    assert 0 < done.rows[1]["epsilon"] <= 1 < done.rows[3]["epsilon"] <= 2


def test_tokenised_data_are_made_once_for_all_trials_that_can_share_them(tmp_path: Path) -> None:
    config = decided(
        small_sweep(tmp_path / "out", "attack.memory_records=0", "sweep.space={lora.rank: [2, 4], data.num_train: [6, 8], seed: [0, 1]}")
    )
    points = planned(config)
    trials = [resolved(trial_config(config, point, out=tmp_path)) for point in points]
    base_refs = share_models(config, points)
    assert len(base_refs) == 1
    shared = share_data(config, points, base_refs)
    assert set(shared) == {data_key(trial) for trial in trials}
    assert len(shared) == 4, "one for each size and seed, whatever the rank"
    worker = Worker(shared_base(next(iter(base_refs.values()))), device="cpu", num_threads=1)
    for trial in trials[:3]:
        lm, data = worker.language_model(trial.lora), ray.get(shared[data_key(trial)])
        assert data == encode_data(trial, lm)
        unable = dataclasses.replace(lm, tokenizer=None)
        assert prepare(trial, unable, data=data).shards == prepare(trial, lm).shards, "nothing is tokenised again"
    absent = decided(small_sweep(tmp_path / "out", "data.source=jsonl", "data.path=missing.jsonl", "sweep.space={lora.rank: [2, 4]}"))
    assert share_data(absent, planned(absent), base_refs) == {}, "each trial says for itself that there is no such file"


def test_a_scheduler_stops_the_worse_trial_and_it_stays_stopped_by_what_was_over_before(tmp_path: Path) -> None:
    """Two trials, the second better, then a bad one that is stopped after its first round, by the same rule in a second sitting."""
    settings = ("server.num_rounds=2", "sweep.space={train.lr: [4e-3, 5e-3, 1e-9]}", "sweep.scheduler=asha")
    config = small_sweep(tmp_path / "out", *settings)
    first = sweep(config, display=False)
    assert [(row["status"], row["num_rounds"]) for row in first.rows] == [("done", 2), ("done", 2), ("stopped", 1)]
    assert first.rows[1]["heldout_nll"] < first.rows[0]["heldout_nll"] < first.rows[2]["heldout_nll"]
    assert "adapter_sha256" not in first.rows[2], "it released nothing"
    assert sweep(config, display=False).rows == first.rows, "a trial that was stopped stays stopped"
    (first.out / first.rows[2]["folder"] / "stopped.json").unlink()  # as if the driver had died at that moment
    again = sweep(config, display=False)
    assert again.rows == first.rows


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_search_under_a_scheduler_continues_to_the_same_rows(scheduler: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = "sweep.space={train.lr: {loguniform: [1e-4, 1e-2]}}"
    search = (space, "server.num_rounds=2", "sweep.search=optuna", "sweep.num_samples=3")
    config = small_sweep(tmp_path / "out", *search, f"sweep.scheduler={scheduler}", "sweep.objectives={heldout_nll: min}")
    first = sweep(config, display=False)
    (first.out / first.rows[0]["folder"] / "summary.json").unlink()
    again = sweep(config, display=False)
    assert [without_times(row) for row in again.rows] == [without_times(row) for row in first.rows]


def test_rounds_that_were_over_before_are_told_to_a_scheduler(tmp_path: Path) -> None:
    """A trial that is worse in its first round than three that were over is stopped, by a rule that was told of them."""
    config = small_sweep(tmp_path / "out", "server.num_rounds=4", "sweep.scheduler=asha", "sweep.space={lora.rank: [2]}")
    trials = [dataclasses.replace(config, name=f"trial-{number}", out=str(tmp_path / str(number))) for number in range(3)]
    for number, trial in enumerate(trials):
        write_rounds(Path(trial.out), [1.0 + number / 10] * 4)
    for name in ("asha", "median"):
        chosen = dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, scheduler=name))
        for told in (trials, []):
            scheduler = scheduler_of(chosen)
            tell(scheduler, told)
            newcomer = Newcomer()
            scheduler.on_trial_add(NO_OTHERS, newcomer)
            decision = scheduler.on_trial_result(NO_OTHERS, newcomer, {"round": 1, "heldout_nll": 9.0})
            assert decision == (TrialScheduler.STOP if told else TrialScheduler.CONTINUE), name


def test_a_trial_whose_process_is_killed_goes_on_from_its_last_round(tmp_path: Path) -> None:
    config = small_sweep(tmp_path / "out", "server.num_rounds=4", "train.num_epochs=8", "sweep.space={lora.rank: [4]}")
    [point] = planned(decided(config))
    killed: list[int] = []
    earlier = set(trial_processes())  # of trials of other tests, which may take a while to end

    def kill() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not list((tmp_path / "out").glob("trials/*/state/round-00001")):
            if time.monotonic() > deadline:
                return  # nothing killed: the test fails below instead of waiting for ever
            time.sleep(0.01)
        assert status(trial_folder(config, point)) == "waiting"
        killed.extend(set(trial_processes()) - earlier)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    [row] = sweep(config, display=False).rows
    assert len(killed) == 1
    alone = run(dataclasses.replace(trial_config(config, point, out=""), out=str(tmp_path / "alone")), display=False)
    assert (row["status"], row["num_rounds"], row["adapter_sha256"]) == ("done", 4, alone.summary["adapter_sha256"])


def trial_processes() -> list[int]:
    """The processes of trials that run in this process's Ray."""
    raylets = [child.pid for child in psutil.Process().children(recursive=True) if child.name() == "raylet"]
    children = [child for pid in raylets for child in psutil.Process(pid).children()]
    return [child.pid for child in children if is_trial(child)]


def is_trial(process: psutil.Process) -> bool:
    """Whether a process is a trial's, at work or between two calls."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(word.startswith("ray::ImplicitFunc") for word in process.cmdline())
    return False


def test_a_search_by_optuna_writes_its_points_down_and_learns_them_again(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = "sweep.space={lora.rank: [2, 4], train.lr: {loguniform: [1e-4, 1e-2]}, train.batch_size: {randint: [1, 3]}}"
    config = small_sweep(tmp_path / "out", space, "sweep.search=optuna", "sweep.num_samples=2")
    first = sweep(config, display=False)
    assert [row["status"] for row in first.rows] == ["done", "done"]
    for row in first.rows:
        assert row["lora.rank"] in (2, 4)
        assert 1e-4 <= row["train.lr"] <= 1e-2
        assert row["train.batch_size"] in (1, 2, 3)
    assert first.rows[0]["train.lr"] != first.rows[1]["train.lr"]
    (first.out / first.rows[1]["folder"] / "summary.json").unlink()
    again = sweep(config, display=False)
    assert [without_times(row) for row in again.rows] == [without_times(row) for row in first.rows]


def test_a_private_selection_draws_how_many_trials_there_are_and_says_what_choosing_costs(tmp_path: Path) -> None:
    settings = ["method.name=dplora", "privacy.secure_noise=true", "privacy.delta=1e-3", "sweep.search=random"]
    space = "sweep.space={lora.rank: [2, 4], privacy.noise_multiplier: {uniform: [1, 2]}}"
    config = small_sweep(tmp_path / "out", *settings, space, "sweep.private_selection={distribution: geometric, mean: 2}")
    config = dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, objectives={"heldout_nll": "min"}))
    done = sweep(config, display=False)
    assert len(done.rows) == draw_num_trials(distribution="geometric", mean=2, seed=config.seed)
    told = re.search(r"Choosing the best trial is \(([0-9.]+), 0.001\)-differentially private", done.summary["selection"])
    assert told is not None, done.summary["selection"]
    assert float(told.group(1)) > max(row["epsilon"] for row in done.rows), "choosing costs more than one trial"
    many = {len(planned(dataclasses.replace(decided(config), seed=seed))) for seed in range(8)}
    assert len(many) > 1, "the number is drawn"


def test_a_private_selection_counts_the_canaries_that_a_run_inserts(tmp_path: Path) -> None:
    settings = [
        "method.name=dplora",
        "privacy.secure_noise=true",
        "privacy.delta=1e-3",
        "sweep.search=random",
        "audit.multiplicities=[1, 4]",
    ]
    # Noise that is solved for a target depends on the sizes of the shards, noise that is given does not.
    space, quick = "sweep.space={privacy.target_epsilon: [2]}", ["evaluate.every=0", "attack.every=-1", "server.num_rounds=1"]
    config = small_sweep(tmp_path / "out", *settings, *quick, space, "sweep.private_selection={distribution: geometric, mean: 2}")
    config = decided(dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, objectives={"heldout_nll": "min"})))
    [point] = support_points(config)
    trial = resolved(trial_config(config, point, out=config.out))
    done = run(trial, display=False)
    experiment = prepare(trial, Worker(load_model(trial), device="cpu", num_threads=1).language_model(trial.lora))
    assert sum(experiment.manifest["num_canary_records"]) == 10
    assert experiment.mechanism.shard_sizes == tuple(len(shard) for shard in experiment.shards)
    assert RunFolder(done.out).mechanism == experiment.mechanism
    releases = worst_releases([experiment.mechanism.releases(1)], shared_samples=True)
    expected = selection_epsilon(releases, delta=1e-3, distribution="geometric", mean=2)
    row = {"folder": str(done.out.relative_to(config.out)), "epsilon": done.ledger["epsilon"], "delta": 1e-3}
    assert f"is ({expected:.4g}, 0.001)-differentially private" in selection(config, [row])


def test_a_trial_on_actors_gives_the_same_bits_as_a_run_in_process(tmp_path: Path) -> None:
    config = small_sweep(tmp_path / "ray", "sweep.space={lora.rank: [4]}", "partition.num_clients=2", "resources.backend=ray")
    [row] = sweep(config, display=False).rows
    assert (row["status"], row["error"]) == ("done", "")
    trial = Path(config.out) / row["folder"]
    run(load(trial / "config.yaml", [f"out={tmp_path / 'alone'}", "resources.backend=local"]), display=False)
    assert results(trial) == results(tmp_path / "alone")


def test_a_trial_that_can_never_fit_is_refused_with_what_there_is(tmp_path: Path) -> None:
    config = small_sweep(tmp_path / "out", "sweep.space={lora.rank: [2], resources.client.num_cpus: [1, 9]}")
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"point 1 \(lora.rank=2, resources.client.num_cpus=9.*1 node: 4 CPUs, 2 GPUs"):
        sweep(config, display=False)
    assert time.monotonic() - started < 30
    assert not (tmp_path / "out" / "trials").exists()
    with pytest.raises(ValueError, match=r"point 0 \(resources.client.num_cpus=7"):  # and not: belongs to another sweep
        sweep(dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, space={"resources.client.num_cpus": [7]})), display=False)


def test_trials_that_hold_all_gpus_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Three clients of a quarter of a GPU each, four trials, two GPUs: two trials at a time."""
    config = load("", ["partition.num_clients=3", "resources.client.num_gpus=0.25", "resources.client.num_cpus=0.25"])

    def trial(values: dict[str, Any]) -> None:
        @ray.remote(num_gpus=0.25, num_cpus=0.25)
        class Client:
            def gpus(self) -> list[int]:
                return list(ray.get_gpu_ids())

        clients = [Client.remote() for _ in range(3)]
        tune.report({"gpus": sum(len(ids) for ids in ray.get([client.gpus.remote() for client in clients], timeout=100))})

    started = time.monotonic()
    done = tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory(bundles(config, num_actors=3))),
        param_space={"number": tune.grid_search(list(range(4)))},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert [result.metrics["gpus"] for result in done] == [3] * 4
    assert time.monotonic() - started < 200


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["resources.client.num_cpus=2", "resources.client.memory_gb=1"], [{}, {"CPU": 2, "memory": 2**30}, {"CPU": 2, "memory": 2**30}]),
        (["resources.client.num_gpus=0.5"], [{}, {"CPU": 0.5, "GPU": 0.5}, {"CPU": 0.5, "GPU": 0.5}]),
        (["resources.backend=local", "resources.client.num_cpus=2"], [{"CPU": 2}]),
        (["resources.backend=local", "resources.client.num_cpus=0"], [{"CPU": 0.001}]),
    ],
)
def test_a_trial_reserves_what_its_clients_need_and_nothing_for_who_waits(settings: list[str], expected: list[dict[str, float]]) -> None:
    assert bundles(load("", settings), num_actors=2) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["sweep.space={}"], "sweep.space"),
        (["sweep.space={lora.rank: [4, 0]}"], r"point 1 \(lora.rank=0\)"),
        (["sweep.space={lora.rank: [4]}", "sweep.objectives={accuracy: max}"], "accuracy"),
        (["sweep.space={lora.rank: [4]}", "sweep.loggers=[telegraph]"], "telegraph"),
        (["sweep.space={lora.rank: [4]}", "attack.every=-1"], "leakage"),
        (["sweep.space={lora.rank: [4]}", "sweep.scheduler=asha", "evaluate.every=0"], "evaluate.every"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, settings: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sweep(small_sweep(tmp_path / "out", *settings), display=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    config = small_sweep(tmp_path, "sweep.space={lora.rank: [4]}")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not a sweep's folder"):
        sweep(config, display=False)
    with pytest.raises(ValueError, match="is a file"):
        sweep(dataclasses.replace(config, out=str(tmp_path / "letter.txt")), display=False)


def test_a_trials_status_is_read_from_its_folder(tmp_path: Path) -> None:
    assert status(tmp_path / "absent") == "waiting"
    (tmp_path / "summary.json").write_text("{}")
    assert status(tmp_path) == "waiting", "a run without its page is not finished"
    (tmp_path / "stopped.json").write_text("{}")
    assert status(tmp_path) == "stopped"
    (tmp_path / "report.html").write_text("")
    (tmp_path / HASHES).write_text(json.dumps(hashes(tmp_path)))
    assert status(tmp_path) == "done"
    (tmp_path / "summary.json").write_text("[]")
    assert status(tmp_path) == "stopped", "a run whose files changed is not finished"


@dataclasses.dataclass(frozen=True)
class Died:
    """What a watch asks of a trial whose process died: `config` as Tune gives it, and the file of its errors."""

    config: dict[str, Any]
    num_failures: int
    error_file: str


def test_a_trial_that_lacked_memory_waits_longer_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, waited = small_sweep(tmp_path, "sweep.space={lora.rank: [4]}"), list[float]()
    monkeypatch.setattr("raysim.sweeps.tune.time.sleep", waited.append)
    values = {"point": dataclasses.asdict(planned(config)[0])}
    failures = ["killed by a signal", "the node was low on memory", "low on memory", "killed by a signal", "low on memory"]
    with SweepProgress("demo") as progress:
        for number, _ in enumerate(failures, start=1):
            texts = [f"Failure # {index} (occurred at noon)\n{text}\n" for index, text in enumerate(failures[:number], start=1)]
            (tmp_path / "error.txt").write_text("".join(texts))
            trial = Died(values, num_failures=number, error_file=str(tmp_path / "error.txt"))
            Watch(progress, config).on_trial_recover(number, [], trial)
    assert waited == [4.0, 8.0, 32.0]
    printed = capsys.readouterr().out.splitlines()
    assert ["lack of memory" in line for line in printed] == [False, True, True, False, True]
    assert printed[1].endswith("it goes on from its last finished round in 4 s")
