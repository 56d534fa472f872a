"""Sweeps: the trials that a configuration describes, each an ordinary run in a folder of its own, and what they came to side by side.

Whatever dies, the same command goes on from the last finished round of each trial.
"""

import argparse
import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysim import remote, storage
from raysim.config import Config, flatten_keys, load, result_key, to_dict
from raysim.console.sweep_progress import SweepProgress
from raysim.console.tables import print_rows
from raysim.console.words import MISSING, settings_text
from raysim.errors import plain_errors
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.selection import draw_num_trials, selection_epsilon, selection_statement, worst_releases
from raysim.results import files as runfiles
from raysim.results import inputs
from raysim.runs import run as runner
from raysim.sweeps.page import write_sweep_report
from raysim.sweeps.rows import write_results
from raysim.sweeps.space import Point, check_points, first_alike, grid_points, idle_keys, probe_points, random_points, support_points
from raysim.sweeps.trial import row, trial_folder, trial_of
from raysim.sweeps.tune import LOGGERS, run_all, suggested

SWEEP_KEYS = ("space", "search", "num_samples", "seeds", "objectives", "scheduler", "grace_rounds", "private_selection")
"""Keys of the section `sweep` that decide which trials there are and how far each is run."""


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


@plain_errors()
def sweep(config: Config, *, display: bool | None = None, config_name: str = "", overrides: Sequence[str] = ()) -> SweepResult:
    """Runs the trials that `config.sweep` describes, and writes results.csv, summary.json and report.html; continues an interrupted one.

    `display` is as in `raysim.runs.run.run`; `config_name` and `overrides` are the words of the command line, for the report's commands.
    A trial that fails is a row of the results and does not stop the others.

    Errors: ValueError for what the configuration or the cluster cannot give, before any trial.
    """
    if remote.is_url(config.out):
        with remote.worked_on(config.out) as copy:
            config = dataclasses.replace(config, out=str(copy))
            return sweep(config, display=display, config_name=config_name, overrides=overrides)
    config = decided(config)
    points = planned(config)
    out = check_folder(config)
    for point in suggested(out) if config.sweep.search == "optuna" else points:
        inputs.check_inputs(trial_folder(config, point), trial_of(config, point))
    runfiles.check_writable(out)
    with storage.held(out):
        return _sweep(config, points, out=out, display=display, config_name=config_name, overrides=overrides)


def _sweep(
    config: Config, points: Sequence[Point], *, out: Path, display: bool | None, config_name: str, overrides: Sequence[str]
) -> SweepResult:
    check_folder(config)  # another command may have made it its own
    runfiles.write_config(out / runfiles.SWEEP, config)
    remote.push(out / runfiles.SWEEP)
    with SweepProgress(config.name, enabled=display) as progress:
        for warning in idle_keys(config, points):
            progress.note(warning)
        errors = run_all(config, points, progress)
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
    return SweepResult(config, out, rows, runfiles.read_json(out / runfiles.SUMMARY), path)


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
        chosen = settings.private_selection
        points = random_points(config, num=draw_num_trials(**chosen, seed=config.seed) if chosen else settings.num_samples)
    else:
        points = grid_points(config)
    check_points(config, points)
    return points


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
    manifest = runfiles.read_json(Path(config.out) / private[0]["folder"] / runfiles.PARTITION)
    mechanisms = [Mechanism.of_run(trial_of(config, point), manifest=manifest) for point in support_points(config)]
    releases = [mechanism.releases(mechanism.num_rounds) for mechanism in mechanisms]
    return selection_epsilon(worst_releases(releases, shared_samples=True), delta=private[0]["delta"], **config.sweep.private_selection)


def swept_keys(points: Sequence[Point]) -> list[str]:
    """The swept keys but for the seed, in the order of the space."""
    return list(dict.fromkeys(key for point in points for key in point.settings if key != "seed"))


# --- its folder


def check_folder(config: Config) -> Path:
    """The sweep's folder, which is new, empty, or holds this very sweep (finished or not).

    Errors: ValueError if it is something else's.
    """
    # A sweep that was killed or refused before its first trial leaves at most its own file.
    scratch = (f".{runfiles.SWEEP}.", runfiles.SWEEP, storage.LOCK)
    return runfiles.own_folder(config, file=runfiles.SWEEP, scratch=scratch, key=sweep_key, kind="sweep", other="sweep")


def sweep_key(config: Config) -> dict[str, Any]:
    """The values that the results of a sweep depend on."""
    flat = flatten_keys(to_dict(config))
    return result_key(config) | {f"sweep.{name}": flat[f"sweep.{name}"] for name in SWEEP_KEYS}


# --- the command


def print_front(summary: Mapping[str, Any]) -> None:
    """Prints the settings that no other beats in every objective, with their figures."""
    objectives = list(summary["front"]["objectives"])
    rows = [
        [settings_text(entry["settings"]), *(_shown(entry["figures"].get(key)) for key in objectives)]
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
    print(
        f"{len(done.rows)} trials, {failed} failed\nresults: {remote.origin(done.out / runfiles.RESULTS)}\nreport: {remote.origin(done.report)}"
    )
    return 1 if failed == len(done.rows) else 0
