"""The trials of a sweep on Ray Tune.

A trial's client actors live in that trial's placement group, so as many trials run at once as fit and none waits for another.
The base models and the tokenised data are in the object store once, for all trials that share them.
Left out: Tune's own checkpoints and `Tuner.restore`, which would be a second account of how far a trial is.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from raysim.imports import uncollected

with uncollected():
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.air.integrations.wandb import WandbLoggerCallback
    from ray.exceptions import OutOfMemoryError
    from ray.tune.logger import TBXLoggerCallback
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

    from raysim import remote
    from raysim.config import Config
    from raysim.console.sweep_progress import SweepProgress
    from raysim.federation.on_ray import base as base_models
    from raysim.federation.on_ray import clients as actors
    from raysim.federation.on_ray import cluster, memory
    from raysim.federation.setup import data_key, encode_data
    from raysim.federation.worker import Worker
    from raysim.results import files as runfiles
    from raysim.runs import run as runner
    from raysim.sweeps.space import Point, axes, first_alike, point_of
    from raysim.sweeps.trial import WarmBackend, first_line, records_of, reported, status, trial_folder, trial_of

LOGGERS: dict[str, tuple[str, Callable[[Config], Any]]] = {
    "tensorboard": ("tensorboardX", lambda config: TBXLoggerCallback()),
    "mlflow": ("mlflow", lambda config: MLflowLoggerCallback(experiment_name=config.name)),
    "wandb": ("wandb", lambda config: WandbLoggerCallback(project=config.name)),
}
"""Each logger's package, and Ray's callback for it."""
DOMAINS: dict[str, Callable[..., Any]] = {
    "list": lambda *values: tune.choice(list(values)),
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    "randint": lambda low, high: tune.randint(int(low), int(high) + 1),  # Tune leaves the end out
}
"""Each kind of axis as Tune describes it."""
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
class TuneJob:
    """What the process of every trial is given."""

    config: Config
    """The sweep's configuration, its output folder and dtype decided."""
    base_refs: Mapping[tuple[Any, ...], Any]
    """References to the base models, each in the object store once (see `_model_key`)."""
    data_refs: Mapping[tuple[Any, ...], Any]
    """References to the tokenised data, likewise (see `data_key`); a trial whose data are not there makes its own."""
    rounds_before: Mapping[str, int] = field(default_factory=dict)
    """Rounds that a trial, by name, had done when this sitting began."""
    given_up: frozenset[str] = frozenset()
    """Names of trials for which there is not enough memory."""

    @property
    def searches(self) -> bool:
        """Whether the points are made as the trials go."""
        return self.config.sweep.search == "optuna"


def run_all(config: Config, points: Sequence[Point], progress: SweepProgress) -> dict[str, str]:
    """Runs the trials that are not over yet; returns the errors of those that failed, by name."""
    searches = config.sweep.search == "optuna"
    ran = {} if searches else first_alike(config, points)
    points = [point for point in points if searches or ran[point.name] is point]
    over = [] if searches else _over(config, points)
    progress.expect(config.sweep.num_samples if searches else len(points))
    for point in [] if searches else points:
        _show(progress, config, point, status=status(trial_folder(config, point)))
    if (len(over) == len(points)) or (searches and _all_suggested(config)):
        return {}
    remaining = [point for point in points if point not in over]
    cluster.start_ray()
    if remote.is_url(place := remote.origin(Path(config.out))) and (num_nodes := cluster.num_nodes()) > 1:
        raise ValueError(
            f"out={place!r}: the cluster has {num_nodes} nodes, whose trials need a folder that all of them see; name such a one"
        )
    for point in remaining:
        _check_fits(trial_of(config, point), point)
    if over:
        progress.note(f"{len(over)} of {len(points)} trials were over before")
    base_refs = share_models(config, remaining)
    watch = Watch(progress, config)
    _fit(TuneJob(config, base_refs, share_data(config, remaining, base_refs)), points, watch)
    return watch.errors


def _over(config: Config, points: Sequence[Point]) -> list[Point]:
    """The points whose trials are finished or stopped."""
    return [point for point in points if status(trial_folder(config, point)) != "waiting"]


def _show(progress: SweepProgress, config: Config, point: Point, *, status: str = "waiting") -> None:
    progress.add(point.name, point.settings, num_rounds=trial_of(config, point).server.num_rounds, status=status)


def _fit(job: TuneJob, points: Sequence[Point], watch: "Watch") -> None:
    """Runs the trials that are not over on Tune.

    Tune itself ends where Ray ends a trial's process for lack of memory. Then, after a while, all go on from their last rounds, half
    as many at once; a trial that was running `MOST_DEATHS` times when that happened is given up.
    """
    config, at_once, deaths = job.config, job.config.sweep.max_concurrent, Counter[str]()
    while True:
        over = [] if job.searches else _over(config, points)
        remaining = [point for point in points if point not in over]
        known = suggested(Path(config.out)) if job.searches else remaining
        rounds_before = {point.name: len(records_of(trial_folder(config, point))) for point in known}
        given_up = frozenset(name for name, number in deaths.items() if number >= MOST_DEATHS)
        job = dataclasses.replace(job, rounds_before=rounds_before, given_up=given_up)
        scheduler = scheduler_of(config)
        if scheduler is not None:
            tell(scheduler, [trial_of(config, point) for point in over])
        try:
            _tuner(job, remaining, at_once=at_once, scheduler=scheduler, callbacks=[watch, *_loggers(config, watch.progress)]).fit()
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
        settings = ", ".join(f"{key}={value}" for key, value in point.settings.items())
        raise ValueError(f"point {point.index} ({settings}): {error}") from None


def _num_actors(trial: Config) -> int:
    """The client actors of a trial: one for each client of a cohort while they fit into the cluster; one place if there are none."""
    if trial.resources.backend == "ray":
        return cluster.num_client_actors(trial, num_clients=trial.partition.num_clients)
    here = dataclasses.replace(trial, resources=dataclasses.replace(trial.resources, num_actors="auto"))
    return cluster.num_client_actors(here, num_clients=1)


def bundles(trial: Config, *, num_actors: int) -> list[dict[str, float]]:
    """The placement group of a trial: its own process, then its client actors; the process takes what a client takes if it is the client."""
    client = trial.resources.client
    needs = {"CPU": client.num_cpus, "GPU": client.num_gpus, "memory": float(int(client.memory_gb * cluster.GIB))}
    bundle = {key: value for key, value in needs.items() if value > 0} or {"CPU": 0.001}  # Ray has no empty placement groups
    return [bundle] if trial.resources.backend == "local" else [{}, *[dict(bundle) for _ in range(num_actors)]]


def share_models(config: Config, points: Sequence[Point]) -> dict[tuple[Any, ...], Any]:
    """Each base model of the trials in the object store, once."""
    trials = {_model_key(trial): trial for trial in (trial_of(config, point) for point in points)}
    return {key: base_models.share_base(functools.partial(runner.load_model, trial)) for key, trial in trials.items()}


def share_data(config: Config, points: Sequence[Point], base_refs: Mapping[tuple[Any, ...], Any]) -> dict[tuple[Any, ...], Any]:
    """The tokenised data of the trials in the object store, once for all that share them.

    Data that cannot be had are left to the trials, which say so in their rows; so are those of trials that compute on a GPU in
    their own process, since embeddings made there may differ in the last bits.
    """
    shared: dict[tuple[Any, ...], Any] = {}
    for point in points:
        trial = trial_of(config, point)
        elsewhere = trial.resources.backend == "local" and trial.resources.client.num_gpus > 0
        if elsewhere or data_key(trial) in shared:
            continue
        worker = Worker(base_models.shared_base(base_refs[_model_key(trial)]), device="cpu", num_threads=trial.resources.num_threads)
        with contextlib.suppress(ValueError):
            shared[data_key(trial)] = actors.share(encode_data(trial, worker.language_model(trial.lora)))
    return shared


def _model_key(trial: Config) -> tuple[Any, ...]:
    return (trial.model, trial.train.dtype)


def _tuner(job: TuneJob, points: Sequence[Point], *, at_once: int, scheduler: Any, callbacks: Sequence[Any]) -> Any:
    os.environ.update(QUIET)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `Watch` says what failed, in one line
    config, settings, searches = job.config, job.config.sweep, job.searches

    def room(values: dict[str, Any]) -> Any:
        trial = trial_of(config, _point(values))
        return tune.PlacementGroupFactory(bundles(trial, num_actors=_num_actors(trial)))

    return tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, job=job), room),
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
            storage_path=str(Path(job.config.out) / "tune"),
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
        records, told = records_of(Path(trial.out)), _OverTrial(trial.name)
        if not records:
            continue
        scheduler.on_trial_add(NO_OTHERS, told)
        for num_rounds in range(1, len(records)):
            if scheduler.on_trial_result(NO_OTHERS, told, reported(records[:num_rounds])) == TrialScheduler.STOP:
                break
        scheduler.on_trial_complete(NO_OTHERS, told, reported(records))


@dataclass(frozen=True)
class _OverTrial:
    """What a scheduler asks of a trial."""

    trial_id: str


NO_OTHERS: Any = SimpleNamespace(get_live_trials=list)
"""In place of Tune's controller, for a scheduler that is told of trials that are over: while nothing runs yet, no trial lives."""


def _loggers(config: Config, progress: SweepProgress) -> list[Any]:
    """Ray's callbacks for the loggers that are asked for; says once which is not installed."""
    made: list[Any] = []
    for name in config.sweep.loggers:
        package, callback = LOGGERS[name]
        if importlib.util.find_spec(package) is None:
            progress.note(f"sweep.loggers: {name} needs the package {package} (pip install {package}); the sweep goes on without")
        else:
            made.append(callback(config))
    return made


def _all_suggested(config: Config) -> bool:
    """Whether a search has made all its points, and each of them is over."""
    points = suggested(Path(config.out))
    return len(points) == config.sweep.num_samples == len(_over(config, points))


def suggested(out: Path) -> list[Point]:
    """The points that a search has suggested so far, from the sweep's folder."""
    path = out / runfiles.POINTS
    return [point_of(index, settings) for index, settings in enumerate(runfiles.read_jsonl(path) if path.is_file() else [])]


class Suggestions(OptunaSearch):
    """Optuna's suggestions as points, each written down before it is tried.

    A sweep that continues suggests the written ones first: what is finished answers at once, and the search learns it again.
    """

    def __init__(self, config: Config) -> None:
        objectives = config.sweep.objectives
        super().__init__(
            space=OptunaSearch.convert_search_space({key: DOMAINS[axis.kind](*axis.values) for key, axis in axes(config).items()}),
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
            runfiles.write_jsonl(points := Path(self._config.out) / runfiles.POINTS, [one.settings for one in self._points])
            remote.push(points)
        return {"point": dataclasses.asdict(point)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See `Searcher`: a trial that lacks an objective teaches the search nothing."""
        whole = result is not None and all(result.get(name) is not None for name in self._config.sweep.objectives)
        super().on_trial_complete(trial_id, result if whole else None, error=not whole)


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
            _show(self.progress, self._config, point)
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
            runfiles.write_json(marker := trial_folder(self._config, point) / runfiles.STOPPED, told)
            remote.push(marker)
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


_warm = WarmBackend()


def run_trial(values: dict[str, Any], *, job: TuneJob) -> None:
    """A trial, in a process of its own: a run that reports each round to Tune, and its end, good or bad."""
    trial = trial_of(job.config, _point(values))
    if trial.name in job.given_up:
        _report([], "failed", error="its process was ended again and again for lack of memory")
        return
    records = records_of(Path(trial.out))
    if job.config.sweep.scheduler != "none" and len(records) == job.rounds_before.get(trial.name, 0):
        # The scheduler of this sitting has not heard of the rounds of an earlier one; of those of this one, it has.
        for num_rounds in range(1, 1 + len(records)):
            _report_round(records[:num_rounds], trial)
    if status(Path(trial.out)) == "stopped":  # before, and a search wants to hear of it again
        _report(records, "stopped")
        return
    try:
        base_ref, data_ref = job.base_refs.get(_model_key(trial)), job.data_refs.get(data_key(trial))
        data = ray.get(data_ref) if data_ref is not None else None
        records = _warm.run(
            trial,
            base_ref=base_ref,
            data=data,
            num_actors=lambda: _actors_here(trial),
            on_round=lambda records: _report_round(records, trial),
        )
    except Exception as error:  # whatever it is, it is this trial's and not the sweep's
        _warm.close()
        _report([], "failed", error=first_line(error))
        return
    _report(records, "done")


def _report_round(records: Sequence[Mapping[str, Any]], trial: Config) -> None:
    """Reports a round; the last is reported at the end, so that no scheduler stops a trial that has only its report to write."""
    memory.return_freed_memory()  # of a trial that is its own client
    if records[-1]["round_index"] + 1 < trial.server.num_rounds:
        _report(records, "running")


def _report(records: Sequence[Mapping[str, Any]], status: str, **words: str) -> None:
    tune.report(reported(records) | {"status": status, **words})


def _actors_here(trial: Config) -> int:
    """The client actors for which this trial's placement group has bundles."""
    client, group = trial.resources.client, ray.util.get_current_placement_group()
    assert group is not None, "a trial runs in a placement group"
    return len(group.bundle_specs) if client.num_cpus or client.num_gpus or client.memory_gb else _num_actors(trial)
