"""Sweeps: whole simulations as Ray Tune trials, each an ordinary run in a folder of its own below the sweep's.

A trial's client actors live in that trial's placement group, so as many trials run at once as fit and none waits for another.
The run folder is the trial's checkpoint: whatever dies, the same command goes on from the last finished round.
The base models and the tokenised data are in the object store once, for all trials that share them.
Left out: Tune's own checkpoints and `Tuner.restore`, which would be a second account of how far a trial is.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib.util
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.exceptions import OutOfMemoryError
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raysim.config import Config, flatten_keys, load, result_key, to_dict, to_yaml
from raysim.console.progress import MISSING, print_rows
from raysim.errors import one_line, plain_errors
from raysim.federation.on_ray import clients as actors
from raysim.federation.on_ray import cluster, memory
from raysim.federation.setup import EncodedData, data_key, encode_data
from raysim.federation.worker import Worker
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.selection import draw_num_trials, selection_epsilon, selection_statement, worst_releases
from raysim.results import files as runfiles
from raysim.results import inputs
from raysim.runs import run as runner
from raysim.sweeps.page import write_sweep_report
from raysim.sweeps.progress import SweepProgress
from raysim.sweeps.space import (
    Axis,
    Point,
    axes,
    check_points,
    first_alike,
    grid_points,
    idle_keys,
    point_of,
    probe_points,
    random_points,
    support_points,
    trial_config,
)

COLUMNS_BEFORE = ("trial", "status", "error")
COLUMNS_AFTER = (
    "seed",
    "num_rounds",
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
    "adapter_sha256",
    "folder",
)
SWEEP_KEYS = ("space", "search", "num_samples", "seeds", "objectives", "scheduler", "grace_rounds", "private_selection")
"""Keys of the section `sweep` that decide which trials there are and how far each is run."""
LOGGERS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
MOST_DEATHS = 3
"""Times that a trial whose process or node died is started again."""
LOW_MEMORY = "low on memory"
"""What Ray says where it ended a process to save a node's memory."""
LOW_MEMORY_DELAY_S = 2.0
"""The wait before what lacked memory is started again; it doubles each time, so that what took the memory has time to give it back."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once: the run folders hold all that is worth saving
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a table of its own even where it is told to be silent
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of data and models mean what they mean to the driver
}


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    config: Config
    out: Path
    rows: list[dict[str, Any]]
    """The lines of results.csv: None where there is no value."""
    summary: dict[str, Any]
    report: Path | None
    """None where no trial was drawn, so that there is nothing to show."""


@dataclass(frozen=True)
class Plan:
    """What every trial is given."""

    config: Config
    """The sweep's configuration, its output folder and dtype decided."""
    base_refs: Mapping[tuple[str, str, str], Any]
    """References to the base models, each in the object store once (see `_model_key`)."""
    data_refs: Mapping[tuple[Any, ...], Any]
    """References to the tokenised data, likewise (see `data_key`); a trial whose data are not there makes its own."""
    rounds_before: Mapping[str, int] = field(default_factory=dict)
    """Rounds that a trial, by name, had done when this sitting began."""
    given_up: frozenset[str] = frozenset()
    """Names of trials for which there is not enough memory."""

    def trial(self, point: Point) -> Config:
        """The configuration of a trial, all decided."""
        return _trial(self.config, point)


# --- the sweep


@plain_errors()
def sweep(config: Config, *, display: bool | None = None, config_name: str = "", overrides: Sequence[str] = ()) -> SweepResult:
    """Runs the trials that `config.sweep` describes, and writes results.csv, summary.json and report.html; continues an interrupted one.

    `display` is as in `raysim.runner.run`; `config_name` and `overrides` are the words of the command line, for the report's commands.
    A trial that fails is a row of the results and does not stop the others.

    Errors: ValueError for what the configuration or the cluster cannot give, before any trial.
    """
    config = decided(config)
    points = planned(config)
    out = check_folder(config)
    for point in suggested(out) if config.sweep.search == "optuna" else points:
        inputs.check_inputs(trial_folder(config, point), _trial(config, point))
    write_start(config, out)
    with SweepProgress(config.name, enabled=display) as progress:
        for warning in idle_keys(config, points):
            progress.note(warning)
        errors = _run_all(config, points, progress)
    if config.sweep.search == "optuna":
        points = suggested(out)
    ran = first_alike(config, points)
    rows = [row(config, point, ran=ran[point.name], error=errors.get(ran[point.name].name, "")) for point in points]
    write_results(out, rows, swept=swept_keys(points))
    if not rows:
        return SweepResult(config, out, [], {}, None)
    path = write_sweep_report(
        out,
        title=config.name,
        objectives=config.sweep.objectives,
        swept=swept_keys(points),
        selection=selection(config, rows),
        config_name=config_name,
        overrides=overrides,
    )
    return SweepResult(config, out, rows, runfiles.read_json(out / "summary.json"), path)


def decided(config: Config) -> Config:
    """`config` with the sweep's folder and `train.dtype` decided."""
    return runner.resolved(dataclasses.replace(config, out=str(Path(config.out or f"runs/{config.name}-sweep").absolute()), compare={}))


def planned(config: Config) -> list[Point]:
    """The trials, every one of them checked; for a search that makes them as it goes, points that try every value of its space.

    Errors: ValueError naming the point.
    """
    settings = config.sweep
    for name in settings.loggers:
        if name not in LOGGERS:
            raise ValueError(f"sweep.loggers: {name!r} is none of {', '.join(LOGGERS)}")
    if settings.search == "optuna":
        _check_optuna(config)
        points = probe_points(config)
    elif settings.search == "random":
        points = random_points(config, num=_num_drawn(config))
    else:
        points = grid_points(config)
    check_points(config, points)
    return points


def _num_drawn(config: Config) -> int:
    """`sweep.num_samples`, or the number that `sweep.private_selection` draws."""
    chosen = config.sweep.private_selection
    return draw_num_trials(**chosen, seed=config.seed) if chosen else config.sweep.num_samples


def _check_optuna(config: Config) -> None:
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("sweep.search='optuna' needs the package optuna; run: pip install optuna")
    if config.sweep.seeds:
        raise ValueError(
            f"sweep.seeds={config.sweep.seeds} has no place in sweep.search='optuna', which learns from single trials; leave it out"
        )


def selection(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The sentences on what choosing the best of the trials costs in privacy."""
    chosen = config.sweep.private_selection
    private = [values for values in rows if values["epsilon"] is not None]
    epsilon = _selection_epsilon(config, private) if chosen and private else None
    return selection_statement(
        epsilon=epsilon,
        delta=private[0]["delta"] if private else None,
        distribution=chosen.get("distribution", ""),
        mean=chosen.get("mean", 0.0),
        num_private=len(private),
        reads_private="leakage" in config.sweep.objectives,
    )


def _selection_epsilon(config: Config, private: Sequence[Mapping[str, Any]]) -> float:
    """Epsilon of a private selection: of the costliest settings that could have been drawn, on the split that all trials share."""
    manifest = runfiles.read_json(Path(config.out) / private[0]["folder"] / "partition.json")
    mechanisms = [Mechanism.of_run(_trial(config, point), manifest=manifest) for point in support_points(config)]
    releases = [mechanism.releases(mechanism.num_rounds) for mechanism in mechanisms]
    return selection_epsilon(worst_releases(releases, shared_samples=True), delta=private[0]["delta"], **config.sweep.private_selection)


def _trial(config: Config, point: Point) -> Config:
    return runner.resolved(trial_config(config, point, out=config.out))


def trial_folder(config: Config, point: Point) -> Path:
    """The run folder of a trial."""
    return Path(config.out) / "trials" / point.name


def swept_keys(points: Sequence[Point]) -> list[str]:
    """The swept keys but for the seed, in the order of the space."""
    return list(dict.fromkeys(key for point in points for key in point.settings if key != "seed"))


# --- its folder


def check_folder(config: Config) -> Path:
    """The sweep's folder, which is new, empty, or holds this very sweep (finished or not).

    Errors: ValueError if it is something else's.
    """
    # A sweep that was killed or refused before its first trial leaves at most its own file.
    scratch = (".sweep.yaml.", "sweep.yaml")
    return runfiles.own_folder(config, file="sweep.yaml", scratch=scratch, key=sweep_key, kind="sweep", other="sweep")


def sweep_key(config: Config) -> dict[str, Any]:
    """The values that the results of a sweep depend on."""
    flat = flatten_keys(to_dict(config))
    return result_key(config) | {f"sweep.{name}": flat[f"sweep.{name}"] for name in SWEEP_KEYS}


def write_start(config: Config, out: Path) -> None:
    """Writes sweep.yaml, the complete configuration.

    Errors: ValueError if the folder cannot be written.
    """
    try:
        runfiles.write_text(out / "sweep.yaml", to_yaml(config))
    except OSError as error:
        raise ValueError(f"out={config.out!r} cannot be written ({error.strerror or error}); choose another folder") from None


def row(config: Config, point: Point, *, ran: Point, error: str = "") -> dict[str, Any]:
    """A trial's line of results.csv, read from the folder of the point whose run is its own; `error` is why it failed, if it is not finished."""
    folder = trial_folder(config, ran)
    found = status(folder)
    ledger = _read_json(folder / "ledger.json") or {}
    values: dict[str, Any] = {"trial": point.name, "status": "failed" if found == "waiting" else found}
    values["error"] = (error or "not finished") if found == "waiting" else ""
    values |= point.settings | {"seed": point.settings.get("seed", config.seed), "folder": str(folder.relative_to(config.out))}
    values |= figures(_records(folder))
    values |= {key: ledger.get(key) for key in ("delta", "unit", "simulated", "noise_multiplier")}
    if found == "done":
        summary = _read_json(folder / "summary.json") or {}
        values |= {"adapter_sha256": summary["adapter_sha256"], "wall_s": summary["wall_s"]}
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
    }


def status(folder: Path) -> str:
    """`done`, `stopped` (by a scheduler) or `waiting`, of a trial's folder."""
    if (folder / "summary.json").is_file() and (folder / "report.html").is_file():
        return "done"
    return "stopped" if (folder / "stopped.json").is_file() else "waiting"


def write_results(out: Path, rows: Sequence[Mapping[str, Any]], *, swept: Sequence[str]) -> None:
    """Writes results.csv: an empty cell where there is no value."""
    text = io.StringIO()
    columns = [*COLUMNS_BEFORE, *swept, *COLUMNS_AFTER]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for values in rows:
        writer.writerow({key: "" if values.get(key) is None else values[key] for key in columns})
    runfiles.write_text(out / "results.csv", text.getvalue())


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.jsonl"
    return runfiles.read_jsonl(path) if path.is_file() else []


def _read_json(path: Path) -> Any:
    return runfiles.read_json(path) if path.is_file() else None


# --- its trials on Ray Tune


def _run_all(config: Config, points: Sequence[Point], progress: SweepProgress) -> dict[str, str]:
    """Runs the trials that are not over yet; returns the errors of those that failed, by name."""
    searches = config.sweep.search == "optuna"
    if not searches:
        ran = first_alike(config, points)
        points = [point for point in points if ran[point.name] is point]
    over = [] if searches else [point for point in points if status(trial_folder(config, point)) != "waiting"]
    remaining = [point for point in points if point not in over]
    progress.expect(config.sweep.num_samples if searches else len(points))
    for point in [] if searches else points:
        found = status(trial_folder(config, point))
        progress.add(point.name, point.settings, num_rounds=_trial(config, point).server.num_rounds, status=found)
    if not remaining or (searches and _all_suggested(config)):
        return {}
    cluster.start_ray()
    for point in remaining:
        _check_fits(_trial(config, point), point)
    if over:
        progress.note(f"{len(over)} of {len(points)} trials were over before")
    base_refs = share_models(config, remaining)
    watch = Watch(progress, config)
    _fit(Plan(config, base_refs, share_data(config, remaining, base_refs)), points, watch)
    return watch.errors


def _fit(plan: Plan, points: Sequence[Point], watch: "Watch") -> None:
    """Runs the trials that are not over on Tune.

    Tune itself ends where Ray ends a trial's process for lack of memory. Then, after a while, all go on from their last rounds, half
    as many at once; a trial that was running `MOST_DEATHS` times when that happened is given up.
    """
    config, at_once = plan.config, plan.config.sweep.max_concurrent
    searches, deaths = config.sweep.search == "optuna", Counter[str]()
    while True:
        over = [] if searches else [point for point in points if status(trial_folder(config, point)) != "waiting"]
        remaining = [point for point in points if point not in over]
        known = suggested(Path(config.out)) if searches else remaining
        rounds_before = {point.name: len(_records(trial_folder(config, point))) for point in known}
        given_up = frozenset(name for name, number in deaths.items() if number >= MOST_DEATHS)
        plan = dataclasses.replace(plan, rounds_before=rounds_before, given_up=given_up)
        scheduler = scheduler_of(config)
        if scheduler is not None:
            tell(scheduler, [_trial(config, point) for point in over])
        try:
            _tuner(plan, remaining, at_once=at_once, scheduler=scheduler, callbacks=[watch, *_loggers(config, watch.progress)]).fit()
            return
        except RuntimeError as error:
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
        running = watch.running()
        deaths.update(running)
        at_once = max(1, len(running) // 2)
        watch.progress.note(f"a node ran out of memory; going on from the last finished rounds, at most {at_once} at once")
        time.sleep(_delay_s(max(deaths.values(), default=1)))


def _check_fits(trial: Config, point: Point) -> None:
    try:
        _num_actors(trial)
    except ValueError as error:
        raise ValueError(f"point {point.index} ({_settings_text(point)}): {error}") from None


def _settings_text(point: Point) -> str:
    return ", ".join(f"{key}={value}" for key, value in point.settings.items())


def _num_actors(trial: Config) -> int:
    """The client actors of a trial: one for each client of a cohort while they fit into the cluster; one place if there are none."""
    if trial.resources.backend == "ray":
        return cluster.num_client_actors(trial, num_clients=trial.partition.num_clients)
    return cluster.num_client_actors(_with_actors(trial, "auto"), num_clients=1)


def _with_actors(trial: Config, num_actors: str) -> Config:
    return dataclasses.replace(trial, resources=dataclasses.replace(trial.resources, num_actors=num_actors))


def bundles(trial: Config, *, num_actors: int) -> list[dict[str, float]]:
    """The placement group of a trial: its own process, then its client actors; the process takes what a client takes if it is the client."""
    client = trial.resources.client
    needs = {"CPU": client.num_cpus, "GPU": client.num_gpus, "memory": float(int(client.memory_gb * cluster.GIB))}
    bundle = {key: value for key, value in needs.items() if value > 0} or {"CPU": 0.001}  # Ray has no empty placement groups
    if trial.resources.backend == "local":
        return [bundle]
    return [{}, *[dict(bundle) for _ in range(num_actors)]]


def share_models(config: Config, points: Sequence[Point]) -> dict[tuple[str, str, str], Any]:
    """Each base model of the trials in the object store, once."""
    trials = {_model_key(trial): trial for trial in (_trial(config, point) for point in points)}
    return {key: actors.share(runner.load_model(trial)) for key, trial in trials.items()}


def share_data(config: Config, points: Sequence[Point], base_refs: Mapping[tuple[str, str, str], Any]) -> dict[tuple[Any, ...], Any]:
    """The tokenised data of the trials in the object store, once for all that share them.

    Data that cannot be had are left to the trials, which say so in their rows; so are those of trials that compute on a GPU in
    their own process, since embeddings made there may differ in the last bits.
    """
    shared: dict[tuple[Any, ...], Any] = {}
    for point in points:
        trial = _trial(config, point)
        elsewhere = trial.resources.backend == "local" and trial.resources.client.num_gpus > 0
        if elsewhere or data_key(trial) in shared:
            continue
        worker = Worker(actors.shared_base(base_refs[_model_key(trial)]), device="cpu", num_threads=trial.resources.num_threads)
        with contextlib.suppress(ValueError):
            shared[data_key(trial)] = actors.share(encode_data(trial, worker.language_model(trial.lora)))
    return shared


def _model_key(trial: Config) -> tuple[str, str, str]:
    return (trial.model.name, trial.train.dtype, trial.model.cache_dir)


def _tuner(plan: Plan, points: Sequence[Point], *, at_once: int, scheduler: Any, callbacks: Sequence[Any]) -> Any:
    os.environ.update(QUIET)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `Watch` says what failed, in one line
    config, settings, searches = plan.config, plan.config.sweep, plan.config.sweep.search == "optuna"

    def room(values: dict[str, Any]) -> Any:
        trial = _trial(config, _point(values))
        return tune.PlacementGroupFactory(bundles(trial, num_actors=_num_actors(trial)))

    return tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, plan=plan), room),
        param_space={} if searches else {"point": tune.grid_search([dataclasses.asdict(point) for point in points])},
        tune_config=tune.TuneConfig(
            search_alg=Suggestions(config) if searches else None,
            num_samples=settings.num_samples if searches else 1,
            scheduler=scheduler,
            max_concurrent_trials=at_once or None,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: _point(trial.config).name,
        ),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06d}",
            storage_path=str(Path(plan.config.out) / "tune"),
            failure_config=tune.FailureConfig(max_failures=MOST_DEATHS),
            callbacks=list(callbacks),
            verbose=0,
        ),
    )


def _point(values: Mapping[str, Any]) -> Point:
    return Point(**values["point"])


def scheduler_of(config: Config) -> Any:
    """Tune's scheduler for `sweep.scheduler` on the first objective; None for `none`."""
    settings = config.sweep
    metric, mode = next(iter(settings.objectives.items()))
    if settings.scheduler == "asha":
        return ASHAScheduler("round", metric, mode, max_t=config.server.num_rounds, grace_period=settings.grace_rounds)
    if settings.scheduler == "median":
        return MedianStoppingRule("round", metric, mode, grace_period=settings.grace_rounds)
    return None


def tell(scheduler: Any, trials: Sequence[Config]) -> None:
    """Tells a scheduler of the rounds of trials that were over before, so that it compares with them as if it had watched."""
    for trial in trials:
        records, told = _records(Path(trial.out)), _OverTrial(trial.name)
        if not records:
            continue
        scheduler.on_trial_add(NO_OTHERS, told)
        for num_rounds in range(1, len(records)):
            result = _reported(records[:num_rounds], trial)
            if scheduler.on_trial_result(NO_OTHERS, told, result) == TrialScheduler.STOP:
                break
        scheduler.on_trial_complete(NO_OTHERS, told, _reported(records, trial))


@dataclass(frozen=True)
class _OverTrial:
    """What a scheduler asks of a trial."""

    trial_id: str


class _NoOthers:
    """What a scheduler may ask Tune while nothing runs yet."""

    def get_live_trials(self) -> list[Any]:
        """None."""
        return []


NO_OTHERS = _NoOthers()
"""In place of Tune's controller, for a scheduler that is told of trials that are over."""


def _loggers(config: Config, progress: SweepProgress) -> list[Any]:
    """Ray's callbacks for the loggers that are asked for; says once which is not installed."""
    made: list[Any] = []
    for name in config.sweep.loggers:
        if importlib.util.find_spec(LOGGERS[name]) is None:
            progress.note(
                f"sweep.loggers: {name} needs the package {LOGGERS[name]} (pip install {LOGGERS[name]}); the sweep goes on without"
            )
        elif name == "tensorboard":
            made.append(TBXLoggerCallback())
        elif name == "mlflow":
            made.append(MLflowLoggerCallback(experiment_name=config.name))
        else:
            made.append(WandbLoggerCallback(project=config.name))
    return made


def _all_suggested(config: Config) -> bool:
    """Whether a search has made all its points, and each of them is over."""
    points = suggested(Path(config.out))
    return len(points) == config.sweep.num_samples and all(status(trial_folder(config, point)) != "waiting" for point in points)


def suggested(out: Path) -> list[Point]:
    """The points that a search has suggested so far, from the sweep's folder."""
    path = out / "points.jsonl"
    return [point_of(index, settings) for index, settings in enumerate(runfiles.read_jsonl(path) if path.is_file() else [])]


class Suggestions(OptunaSearch):
    """Optuna's suggestions as points, each written down before it is tried.

    A sweep that continues suggests the written ones first: what is finished answers at once, and the search learns it again.
    """

    def __init__(self, config: Config) -> None:
        objectives = config.sweep.objectives
        super().__init__(
            space=OptunaSearch.convert_search_space({key: _domain(axis) for key, axis in axes(config).items()}),
            metric=list(objectives),
            mode=list(objectives.values()),
            seed=config.seed,
        )
        logging.getLogger("optuna").setLevel(logging.ERROR)
        self._config, self._points = config, suggested(Path(config.out))
        self._num = 0

    def suggest(self, trial_id: str) -> Any:
        """See `Searcher`."""
        if self._num == self._config.sweep.num_samples:
            return Searcher.FINISHED
        if self._num < len(self._points):
            study: Any = self._ot_study
            study.enqueue_trial(self._points[self._num].settings)
        settings: Any = super().suggest(trial_id)
        point = point_of(self._num, settings)
        self._num += 1
        if self._num > len(self._points):
            self._points.append(point)
            runfiles.write_jsonl(Path(self._config.out) / "points.jsonl", [one.settings for one in self._points])
        return {"point": dataclasses.asdict(point)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See `Searcher`: a trial that lacks an objective teaches the search nothing."""
        whole = result is not None and all(result.get(name) is not None for name in self._config.sweep.objectives)
        super().on_trial_complete(trial_id, result if whole else None, error=not whole)


def _domain(axis: Axis) -> Any:
    """An axis as Tune describes it, whose `randint` leaves its end out."""
    if axis.kind == "list":
        return tune.choice(list(axis.values))
    low, high = axis.values
    if axis.kind == "randint":
        return tune.randint(int(low), int(high) + 1)
    return tune.loguniform(low, high) if axis.kind == "loguniform" else tune.uniform(low, high)


class Watch(tune.Callback):
    """Hears of the trials from Tune: tells the display, keeps errors, and marks what a scheduler stopped."""

    def __init__(self, progress: SweepProgress, config: Config) -> None:
        self.progress, self._config = progress, config
        self.errors: dict[str, str] = {}

    def running(self) -> list[str]:
        """The names of the trials that are running."""
        return [name for name, view in self.progress.trials.items() if view.status == "running"]

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a `Tuner.restore`, which is not how a sweep continues."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `tune.Callback`."""
        point = _point(trial.config)
        if point.name not in self.progress.trials:
            self.progress.add(point.name, point.settings, num_rounds=_trial(self._config, point).server.num_rounds)
        self.progress.start(point.name)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """See `tune.Callback`."""
        if result["status"] == "running":
            self.progress.round(_point(trial.config).name, result, round=result["round"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `tune.Callback`: the trial has ended by itself, or a scheduler has ended it."""
        point, result = _point(trial.config), trial.last_result
        name = point.name
        if result["status"] == "done":
            self.progress.round(name, result, round=result["round"])
        over_before = status(trial_folder(self._config, point))
        if result["status"] == "running" and over_before != "waiting":  # told again, and stopped this time
            self.progress.end(name, over_before)
        elif result["status"] == "running":
            told = {"num_rounds": result["round"], "scheduler": self._config.sweep.scheduler}
            runfiles.write_json(trial_folder(self._config, point) / "stopped.json", told)
            self.progress.end(name, "stopped")
        else:
            self._end(name, result["status"], error=result.get("error", ""))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `tune.Callback`. Where memory lacked, Tune, and with it the news of other trials, waits a few seconds."""
        name, in_time = _point(trial.config).name, "it goes on from its last finished round"
        if LOW_MEMORY not in _last_failure(trial):
            self.progress.note(f"{name}: its process died; {in_time}")
            return
        delay_s = _delay_s(trial.num_failures)
        self.progress.note(f"{name}: its process was ended for lack of memory; {in_time} in {delay_s:g} s")
        time.sleep(delay_s)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `tune.Callback`: the trial's process died too often."""
        why = "for lack of memory" if LOW_MEMORY in _last_failure(trial) else "by itself or by a signal"
        self._end(_point(trial.config).name, "failed", error=f"its process ended {MOST_DEATHS + 1} times, the last time {why}")

    def _end(self, name: str, status: str, *, error: str) -> None:
        if error:
            self.errors[name] = error
        self.progress.end(name, status, error=error)


def _last_failure(trial: Any) -> str:
    """What Tune wrote down when a trial's process last died; empty if nothing."""
    path = trial.error_file  # `get_error` reads a copy, which comes later
    return Path(path).read_text(encoding="utf-8", errors="replace").split("Failure #")[-1] if path and Path(path).is_file() else ""


def _delay_s(num_deaths: int) -> float:
    """Seconds to wait after the first, second, ... death for lack of memory."""
    return LOW_MEMORY_DELAY_S * 2.0 ** (max(num_deaths, 1) - 1)


# --- inside a trial


def run_trial(values: dict[str, Any], *, plan: Plan) -> None:
    """A trial, in a process of its own: a run that reports each round to Tune, and its end, good or bad."""
    trial = plan.trial(_point(values))
    if trial.name in plan.given_up:
        tune.report(_reported([], trial) | {"status": "failed", "error": "its process was ended again and again for lack of memory"})
        return
    if plan.config.sweep.scheduler != "none":
        _report_again(trial, rounds_before=plan.rounds_before.get(trial.name, 0))
    if status(Path(trial.out)) == "stopped":  # before, and a search wants to hear of it again
        tune.report(_reported(_records(Path(trial.out)), trial) | {"status": "stopped"})
        return
    try:
        base_ref, data_ref = plan.base_refs.get(_model_key(trial)), plan.data_refs.get(data_key(trial))
        data = ray.get(data_ref) if data_ref is not None else None
        records = _warm.run(trial, base_ref=base_ref, data=data, on_round=lambda records: _report_round(records, trial))
    except Exception as error:  # whatever it is, it is this trial's and not the sweep's
        _warm.close()
        tune.report(_reported([], trial) | {"status": "failed", "error": _first_line(error)})
        return
    tune.report(_reported(records, trial) | {"status": "done"})


def _report_again(trial: Config, *, rounds_before: int) -> None:
    """Reports the rounds of an earlier sitting, which the scheduler of this one has not heard of; not those of this one, which it has."""
    records = _records(Path(trial.out))
    for num_rounds in range(1, 1 + (rounds_before if len(records) == rounds_before else 0)):
        _report_round(records[:num_rounds], trial)


def _report_round(records: Sequence[Mapping[str, Any]], trial: Config) -> None:
    """Reports a round; the last is reported at the end, so that no scheduler stops a trial that has only its report to write."""
    memory.return_freed_memory()  # of a trial that is its own client
    if records[-1]["round_index"] + 1 < trial.server.num_rounds:
        tune.report(_reported(records, trial) | {"status": "running"})


def _reported(records: Sequence[Mapping[str, Any]], trial: Config) -> dict[str, Any]:
    found = {key: value for key, value in figures(records).items() if value is not None}
    return found | {"round": found.pop("num_rounds"), "train_loss": records[-1].get("train_loss") if records else None}


def _first_line(error: BaseException) -> str:
    return one_line(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {one_line(error)}"


class WarmBackend:
    """The backend of this process, kept for the next trial that Tune gives it (same model, same resources)."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._backend: runner.Backend | None = None

    def run(self, trial: Config, *, base_ref: Any, data: EncodedData | None, on_round: runner.OnRound) -> list[dict[str, Any]]:
        """The records of the finished trial."""
        if self._backend is None or self._backend.key != runner.backend_key(trial):
            self.close()
            num_actors = _actors_here(trial)
            self._backend = self._stack.enter_context(runner.open_backend(trial, display=False, base_ref=base_ref, num_actors=num_actors))
        return runner.run(trial, display=False, backend=self._backend, data=data, on_round=on_round).records

    def close(self) -> None:
        """Ends the actors, if there are any."""
        self._backend = None
        self._stack.close()


_warm = WarmBackend()


def _actors_here(trial: Config) -> int:
    """The client actors for which this trial's placement group has bundles."""
    client, group = trial.resources.client, ray.util.get_current_placement_group()
    assert group is not None, "a trial runs in a placement group"
    return len(group.bundle_specs) if client.num_cpus or client.num_gpus or client.memory_gb else _num_actors(trial)


# --- the command


def print_front(summary: Mapping[str, Any]) -> None:
    """Prints the settings that no other beats in every objective, with their figures."""
    objectives = list(summary["front"]["objectives"])
    rows = [
        [" ".join(f"{key}={value}" for key, value in entry["settings"].items()), *(_shown(entry["figures"].get(key)) for key in objectives)]
        for entry in summary["front"]["settings"]
    ]
    if rows:
        print_rows("Pareto front (mean over seeds): what no other setting beats in everything", ["settings", *objectives], rows)


def _shown(value: Any) -> str:
    return MISSING if value is None else f"{value:.4g}"


def main(arguments: argparse.Namespace) -> int:
    """`raysim sweep`: status 0, whatever became of single trials, unless every one of them failed (1)."""
    config = load(arguments.config, arguments.overrides)
    done = sweep(config, display=False if arguments.quiet else None, config_name=arguments.config, overrides=arguments.overrides)
    if done.report is None:
        print("sweep.private_selection drew 0 trials: nothing was run, and nothing may be shown")
        return 0
    failed = sum(values["status"] == "failed" for values in done.rows)
    print_front(done.summary)
    print(f"{len(done.rows)} trials, {failed} failed\nresults: {done.out / 'results.csv'}\nreport: {done.report}")
    return 1 if failed == len(done.rows) else 0
