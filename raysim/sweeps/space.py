"""The points of a sweep: which settings each trial has, checked before anything starts, without torch or Ray.

A trial's configuration is the sweep's own with the point's settings put in, as `raysim.config.with_overrides` would make it, but
without merging the whole configuration again for each of hundreds of points.
Left out: what suggests points one by one (a search library's business, by the axes given here), and checks that need the
data, the model or the cluster, which a trial makes for itself before its first round.
"""

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import OmegaConf

from raysim.config import (
    FLAT_DEFAULTS,
    KEYS,
    MOST_POINTS,
    Config,
    Key,
    Rule,
    SweepConfig,
    lacking,
    refuse,
    resolve_auto,
    unknown,
    unresolved,
    unused_privacy,
    validate,
    value_of,
    with_values,
)
from raysim.errors import LONGEST_SHOWN, did_you_mean, shown
from raysim.methods.spec import METHODS

DISTRIBUTIONS = ("loguniform", "uniform", "randint")
OBJECTIVES = ("heldout_nll", "heldout_rouge_l", "leakage", "epsilon", "uplink_bytes")
SELECTIONS = ("poisson", "geometric", "negative_binomial")
NOT_SWEPT = ("name", "out", "compare", "sweep")
"""Keys that a trial is given by the sweep."""
DIGITS = 6
"""Significant digits of a number drawn at random, so that a trial's command can be read and typed."""
MOST_REDRAWS = 1000
"""Draws in a row that repeat earlier points before a random search is refused."""
LARGEST_END = 2.0**62
"""Beyond plus or minus this no key has a value, and arithmetic with whole numbers and others overflows."""
MOST_MEAN = 1000
"""Trials that a private selection may expect."""
LONGEST_NAME = 120
"""Characters of a trial's name, a folder's, at most."""
ACCOUNTED = ("privacy", "server", "method", *(s for spec in METHODS.values() if "example" in spec.units for s in spec.sections))
"""Sections on which the releases of a run depend, as long as its data and their split stay the same."""


@dataclass(frozen=True)
class Axis:
    """What one key of a space may be."""

    key: str
    kind: str
    """`list`, or one of `DISTRIBUTIONS`."""
    values: tuple[Any, ...]
    """The values of a list; the least and the greatest value of a distribution (of `randint` too, both are drawn)."""


@dataclass(frozen=True)
class Point:
    """The settings of one trial."""

    index: int
    settings: dict[str, Any]
    """Dotted key -> value, the seed included where seeds are swept."""
    name: str
    """Unique in its sweep, and fit to be a folder's name."""


# --- the space ---


def axes(config: Config) -> dict[str, Axis]:
    """The axes of `config.sweep.space` by dotted key, every value of the type that the key takes.

    A key that is named twice, as `lora.rank` and below `lora`, takes what comes last, as from the command line.

    Errors: ValueError for a space that is empty, names an unknown key or one that is not swept, or holds something that is
    neither a list of distinct values nor a distribution that fits the key.
    """
    found = {key: _axis(key, value) for key, value in _flat_space(config.sweep.space)}
    if not found:
        raise ValueError("sweep.space is empty: name the keys to sweep with their values, such as sweep.space={lora.rank: [4, 16]}")
    return found


def _flat_space(space: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of a space that may be nested, in order."""
    for name, value in space.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and any(known.startswith(f"{key}.") for known in FLAT_DEFAULTS):
            yield from _flat_space(value, f"{key}.")
        else:
            yield key, value


def _axis(key: str, value: Any) -> Axis:
    if any(key == name or key.startswith(f"{name}.") for name in NOT_SWEPT):
        raise ValueError(f"sweep.space: {key} belongs to the whole sweep and cannot be swept")
    if key not in FLAT_DEFAULTS:
        raise ValueError(f"sweep.space: {unknown(key)}")
    if isinstance(value, dict):
        return _distribution(key, value)
    if not isinstance(value, list):
        raise ValueError(f"sweep.space: {key}={shown(value)} must be a list of values, or a distribution such as {{loguniform: [0.3, 3]}}")
    if not value:
        raise ValueError(f"sweep.space: {key}=[] has no value to try; name at least one")
    values = tuple(_typed(key, one) for one in value)
    for i, one in enumerate(values):
        if one in values[:i]:
            raise ValueError(f"sweep.space: {key} has the value {shown(one)} twice, which makes duplicate points; name each value once")
    return Axis(key, "list", values)


def _distribution(key: str, value: dict[str, Any]) -> Axis:
    shape = f"sweep.space: {key}={shown(value)} is no distribution"
    kind = next(iter(value), "")
    if len(value) != 1 or kind not in DISTRIBUTIONS:
        hint = did_you_mean(kind, DISTRIBUTIONS) if len(value) == 1 else ""
        raise ValueError(f"{shape}: it must be one of {', '.join(f'{{{name}: [low, high]}}' for name in DISTRIBUTIONS)}{hint}")
    ends = value[kind]
    if not isinstance(ends, list) or len(ends) != 2 or not all(_is_number(end) for end in ends):
        raise ValueError(f"{shape}: {kind} takes two finite numbers, [low, high]")
    low, high = ends
    if not low < high:
        raise ValueError(f"{shape}: low={low!r} must be less than high={high!r}")
    if kind == "loguniform" and not low > 0:
        raise ValueError(f"{shape}: low={low!r} must be greater than 0 for loguniform; use uniform")
    if kind == "randint" and not (low == int(low) and high == int(high)):
        raise ValueError(f"{shape}: randint takes whole numbers; use uniform")
    default = FLAT_DEFAULTS[key]
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise ValueError(f"{shape}: {key} takes no numbers; list its values")
    if isinstance(default, int) and kind != "randint":
        raise ValueError(f"{shape}: {key} takes whole numbers; use randint")
    if kind == "randint":
        low, high = int(low), int(high)
    return Axis(key, kind, (_typed(key, low), _typed(key, high)))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_END <= value <= LARGEST_END


def _typed(key: str, value: Any) -> Any:
    """`value` as the type that `key` takes, converted as OmegaConf converts it.

    Errors: ValueError if it cannot be.
    """
    if isinstance(value, bool | int | float | str):
        return _typed_scalar(key, value)
    return _convert(key, value)


@lru_cache(maxsize=65536, typed=True)
def _typed_scalar(key: str, value: bool | int | float | str) -> Any:
    return _convert(key, value)


def _convert(key: str, value: Any) -> Any:
    *sections, leaf = key.split(".")
    owner: Any = Config()
    for section in sections:
        owner = getattr(owner, section)
    node = OmegaConf.structured(type(owner))
    OmegaConf.set_readonly(node, False)
    if key == "lora.target_modules" and isinstance(value, str):
        value = [value]
    try:
        OmegaConf.update(node, leaf, value)
        plain = OmegaConf.to_container(node, resolve=True)
    except Exception as error:  # OmegaConf raises many kinds, all of them about the user's value
        reason = str(error).partition("\n    full_key")[0]  # what follows is OmegaConf's name for the same key
        raise ValueError(f"{key}={shown(value)}: {' '.join(reason.split())[:LONGEST_SHOWN]}") from None
    assert isinstance(plain, dict)
    return plain[leaf]


# --- points ---


def grid_points(config: Config) -> list[Point]:
    """Every combination of the listed values, the last key changing fastest, each with each seed of `sweep.seeds`.

    With `sweep.num_samples` only so many combinations, drawn without repeats by the configuration's seed, in the grid's order.

    Errors: ValueError as `axes` and `check_sweep`; if an axis is a distribution.
    """
    listed = axes(config)
    check_sweep(config)
    num = math.prod(len(axis.values) for axis in listed.values())
    if num * max(1, len(config.sweep.seeds)) > MOST_POINTS:
        raise ValueError(f"sweep.space has {num} combinations, and a grid at most {MOST_POINTS} points; use sweep.search=random")
    combinations = list(_product(listed.values()))
    if 0 < config.sweep.num_samples < len(combinations):
        kept = sorted(_rng(config).sample(range(len(combinations)), config.sweep.num_samples))
        combinations = [combinations[i] for i in kept]
    return _with_seeds(config, combinations)


def random_points(config: Config, *, num: int) -> list[Point]:
    """`num` combinations drawn independently and evenly (by the logarithm for `loguniform`), each with each seed of `sweep.seeds`.

    Guarantees: equal configurations give equal points, of which a smaller `num` gives the first ones. No combination comes twice,
    except under `sweep.private_selection`, whose guarantee is for draws that do not depend on each other.
    Errors: ValueError as `axes` and `check_sweep`; if the space has too few combinations.
    """
    drawn, rng = axes(config), _rng(config)
    check_sweep(config)
    combinations: list[dict[str, Any]] = []
    seen: set[str] = set()
    repeats = 0
    while len(combinations) < num:
        settings = {key: _draw(axis, rng) for key, axis in drawn.items()}
        if repr(settings) in seen and not config.sweep.private_selection:
            repeats += 1
            if repeats > MOST_REDRAWS:
                raise ValueError(
                    f"sweep.num_samples={num} is more than the space has combinations (found {len(combinations)}); lower it, or use "
                    "sweep.search=grid"
                )
            continue
        repeats = 0
        seen.add(repr(settings))
        combinations.append(settings)
    return _with_seeds(config, combinations)


def probe_points(config: Config) -> list[Point]:
    """Points that try every value and both ends of every distribution at least once: what can be checked before a search suggests its own."""
    found = axes(config)
    first = {key: axis.values[0] for key, axis in found.items()}
    changed = [first | {key: value} for key, axis in found.items() for value in axis.values[1:]]
    return _with_seeds(config, [first, *changed])


def support_points(config: Config) -> list[Point]:
    """The combinations among which are those with the costliest releases of the space: all values and both ends of what is accounted.

    Keys that no release depends on stand at their first value. Between the ends of a distribution the noise, the sampling and
    the number of releases lie between those at its ends.
    """
    found = axes(config)
    kept = [axis if axis.key.split(".")[0] in ACCOUNTED else dataclasses.replace(axis, values=axis.values[:1]) for axis in found.values()]
    return _numbered(_product(kept))


def point_of(index: int, settings: dict[str, Any]) -> Point:
    """The point of a trial that a search suggested.

    Errors: ValueError naming the point if a value is not of the type that its key takes.
    """
    try:
        typed = {key: _typed(key, value) for key, value in settings.items()}
    except ValueError as error:
        raise ValueError(f"point {index} ({_described(settings)}): {error}") from None
    return Point(index, typed, _name(index, typed))


def _product(of: Iterable[Axis]) -> Iterable[dict[str, Any]]:
    listed = list(of)
    for values in itertools.product(*(axis.values for axis in listed)):
        yield {axis.key: value for axis, value in zip(listed, values, strict=True)}


def _with_seeds(config: Config, combinations: Iterable[dict[str, Any]]) -> list[Point]:
    seeds = config.sweep.seeds
    return _numbered(settings | {"seed": seed} for settings in combinations for seed in seeds) if seeds else _numbered(combinations)


def _numbered(settings: Iterable[dict[str, Any]]) -> list[Point]:
    return [point_of(index, one) for index, one in enumerate(settings)]


def _rng(config: Config) -> random.Random:
    """The stream of a sweep's draws; Python's own, whose seeding by text is the same on every machine and imports nothing."""
    return random.Random(f"sweep points|{config.seed}")


def _draw(axis: Axis, rng: random.Random) -> Any:
    if axis.kind == "list":
        return rng.choice(axis.values)
    low, high = axis.values
    if axis.kind == "randint":
        return _typed(axis.key, rng.randint(int(low), int(high)))
    if axis.kind == "uniform":
        value = rng.uniform(low, high)
    else:
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def _name(index: int, settings: dict[str, Any]) -> str:
    parts = [f"{index:03d}", *(f"{key}={_text(value)}" for key, value in settings.items())]
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", "-".join(parts))[:LONGEST_NAME].rstrip(".-")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in settings.items())


# --- trials ---


def trial_config(config: Config, point: Point, *, out: str | Path) -> Config:
    """The configuration of a trial of the sweep whose folder is `out`, in a folder of its own below `out/trials`.

    What `auto` decided for the sweep's own method is decided again for the trial's, and what means nothing without privacy is
    dropped where a point has none.

    Errors: ValueError naming the point.
    """
    values = unresolved(config) | point.settings
    values |= {"name": point.name, "out": str(Path(out) / "trials" / point.name), "compare": {}, "sweep": SweepConfig()}
    try:
        typed = {key: value if key in NOT_SWEPT else _typed(key, value) for key, value in values.items()}
        entry = resolve_auto(with_values(config, typed))
        return validate(with_values(entry, unused_privacy(entry)))
    except ValueError as error:
        raise ValueError(f"point {point.index} ({_described(point.settings)}): {error}") from None


# --- checks ---


def check_points(config: Config, points: Sequence[Point]) -> None:
    """Refuses what cannot be swept: every point is made into its trial's configuration, which is validated.

    Errors: ValueError in one line, naming the point where it is one point's.
    """
    found = axes(config)
    check_sweep(config)
    selects = bool(config.sweep.private_selection)
    if not points and not selects:
        raise ValueError("sweep.space gives no point")
    seen: dict[str, Point] = {}
    trials = []
    for point in points:
        trials.append(trial_config(config, point, out=""))
        twin = seen.setdefault(repr(sorted(point.settings.items())), point)
        if twin is not point and not selects:
            raise ValueError(f"points {twin.index} and {point.index} are the same ({_described(point.settings)}); leave one out")
    _check_reported(config, points, trials)
    if selects:
        _check_selection(config, list(found), points, trials)


SWEEP_RULES = (
    Rule(
        "sweep.num_samples=0",
        lambda c: c.sweep.search != "grid" and c.sweep.num_samples == 0 and not c.sweep.private_selection,
        "with sweep.search={sweep.search!r} tries nothing",
        "set it to the number of points",
    ),
    Rule(
        "sweep.seeds and sweep.space.seed",
        lambda c: bool(c.sweep.seeds) and "seed" in c.sweep.space,
        "both say which seeds to run",
        "leave out one of them",
    ),
    Rule(
        "sweep.seeds={value}",
        lambda c: len(set(c.sweep.seeds)) < len(c.sweep.seeds),
        "has a seed twice, which makes duplicate points",
        "name each once",
    ),
    Rule(
        "sweep.objectives",
        lambda c: not c.sweep.objectives,
        "is empty",
        "name a figure to optimise, such as sweep.objectives.heldout_nll=min",
    ),
)
"""What a sweep cannot be, whatever its points; other commands read none of it."""


SELECTION_RULES = tuple(
    Rule("sweep.private_selection", when, reason, remedy)
    for when, reason, remedy in (
        (lambda c: c.sweep.search != "random", "needs sweep.search='random', not {sweep.search!r}", "trials must not depend on each other"),
        (lambda c: c.sweep.num_samples > 0, "draws the number of trials", "leave out sweep.num_samples={sweep.num_samples}"),
        (lambda c: c.sweep.scheduler != "none", "needs sweep.scheduler='none'", "a trial stopped for others' results depends on them"),
        (lambda c: bool(c.sweep.seeds), "counts every run as a trial", "leave out sweep.seeds={sweep.seeds}"),
        (
            lambda c: "leakage" in c.sweep.objectives,
            "has no bound where it is an objective: leakage is measured on the protected records themselves",
            "leave it out of sweep.objectives",
        ),
        (lambda c: not c.privacy.secure_noise, "needs privacy.secure_noise=true", "with one seed all trials would share their noise"),
    )
)
"""What a private selection cannot be: its guarantee does not cover it (see `raysim.privacy.selection`)."""


def check_sweep(config: Config) -> None:
    """Refuses what is wrong with `config.sweep` itself, whatever its points.

    Errors: ValueError in one line that names the key.
    """
    sweep, found = config.sweep, axes(config)
    drawn = next((axis for axis in found.values() if axis.kind != "list"), None)
    if sweep.search == "grid" and drawn is not None:
        raise ValueError(
            f"sweep.space: {drawn.key} has a distribution, which sweep.search='grid' cannot list; use random or optuna, or list values"
        )
    refuse(SWEEP_RULES, config)
    for name, direction in sweep.objectives.items():
        if name not in OBJECTIVES:
            raise ValueError(f"sweep.objectives: {name} is none of {', '.join(OBJECTIVES)}{did_you_mean(name, OBJECTIVES)}")
        if direction not in ("min", "max"):
            raise ValueError(f"sweep.objectives.{name}={shown(direction)} must be min or max")
    if sweep.private_selection:
        _check_selection_values(sweep)


def _check_reported(config: Config, points: Sequence[Point], trials: Sequence[Config]) -> None:
    """Refuses an objective that no trial reports, and a scheduler whose objective is not reported by round."""
    objectives = list(config.sweep.objectives)
    if "leakage" in objectives and trials and all(trial.attack.every == -1 for trial in trials):
        raise ValueError("sweep.objectives: no round reports leakage with attack.every=-1; set attack.every=0, or leave out the objective")
    if "epsilon" in objectives and trials and not any(_has_guarantee(trial) for trial in trials):
        raise ValueError(
            "sweep.objectives: no round reports epsilon, since no point has a privacy guarantee; set privacy.unit=client or method.name=dplora, "
            "or leave out the objective"
        )
    if config.sweep.scheduler == "none":
        return
    first = objectives[0]
    key = {"heldout_nll": "evaluate.every", "heldout_rouge_l": "evaluate.every", "leakage": "attack.every"}.get(first, "")
    for point, trial in zip(points, trials, strict=True):
        every = {"evaluate.every": trial.evaluate.every, "attack.every": trial.attack.every}.get(key, 1)
        if every < 1 and trial.method.spec.trains:
            raise ValueError(
                f"point {point.index} ({_described(point.settings)}): sweep.scheduler={config.sweep.scheduler!r} compares {first} by round, "
                f"which {key}={every} does not report; set {key}=1"
            )
        if first == "epsilon" and not _has_guarantee(trial):
            raise ValueError(
                f"point {point.index} ({_described(point.settings)}): sweep.scheduler={config.sweep.scheduler!r} compares epsilon, which "
                "this point does not have; put another objective first"
            )


def _has_guarantee(trial: Config) -> bool:
    return trial.privacy.unit != "none" and (trial.privacy.noise_multiplier > 0 or trial.privacy.target_epsilon > 0)


def _check_selection_values(sweep: SweepConfig) -> None:
    given = sweep.private_selection
    for key in given:
        if key not in ("distribution", "mean", "shape"):
            raise ValueError(f"sweep.private_selection: unknown key {key}; it takes distribution, mean and, for negative_binomial, shape")
    distribution, mean = given.get("distribution"), given.get("mean")
    if distribution not in SELECTIONS:
        raise ValueError(f"sweep.private_selection.distribution={shown(distribution)} is none of {', '.join(SELECTIONS)}")
    if not (_is_number(mean) and 1 <= mean <= MOST_MEAN):
        raise ValueError(
            f"sweep.private_selection.mean={shown(mean)} must be a number of at least 1 and at most {MOST_MEAN}, the trials expected"
        )
    if distribution != "negative_binomial" and "shape" in given:
        raise ValueError(f"sweep.private_selection.shape belongs to negative_binomial, not to {distribution}; leave it out")
    shape = given.get("shape")
    if distribution == "negative_binomial" and not (_is_number(shape) and 0 <= shape <= MOST_MEAN):
        raise ValueError(
            f"sweep.private_selection.shape={shown(shape)} must be a number of at least 0 and at most {MOST_MEAN} (1 is geometric, 0 logarithmic)"
        )


def _check_selection(config: Config, keys: Sequence[str], points: Sequence[Point], trials: Sequence[Config]) -> None:
    """Refuses what the guarantee of a selection does not cover (see `raysim.privacy.selection`)."""
    why = "sweep.private_selection"
    refuse(SELECTION_RULES, config)
    for key in keys:
        if key in ("seed", "privacy.delta", "privacy.unit", "privacy.secure_noise") or key.split(".")[0] in ("data", "partition", "audit"):
            raise ValueError(f"{why}: {key} cannot be swept, since all trials must protect the same units of the same split at one delta")
    units = {trial.privacy.unit for trial in trials}
    for point, trial in zip(points, trials, strict=True):
        if not _has_guarantee(trial) or trial.privacy.noise_cohort_size:
            raise ValueError(f"point {point.index} ({_described(point.settings)}): {why} needs a privacy guarantee in every trial")
    if len(units) > 1:
        raise ValueError(f"{why}: some trials protect a client and others a record ({', '.join(sorted(units))}); fix privacy.unit")


# --- keys that change nothing ---


UNREAD = (*(section for spec in METHODS.values() for section in spec.sections), "privacy")
"""Sections that a run may not read at all: what differs in them alone is one run."""
NEUTRAL = "any setting (it changes where and how fast, never results)"


def first_alike(config: Config, points: Sequence[Point]) -> dict[str, Point]:
    """For each point's name the first point whose run is the same, which may be the point itself: each run is needed once.

    Two runs are the same where every key is, but for the sections that are another method's, and `privacy` in runs without any.
    Draws of a private selection, and noise from the operating system, are never the same.
    """
    firsts: dict[str, Point] = {}
    found = {}
    for point in points:
        trial = trial_config(config, point, out="")
        single = bool(config.sweep.private_selection) or trial.privacy.secure_noise
        found[point.name] = point if single else firsts.setdefault(_run_key(trial), point)
    return found


def _run_key(trial: Config) -> str:
    return "\n".join(
        f"{name}={value_of(trial, name)!r}" for name, key in KEYS.items() if name not in NOT_SWEPT and not _is_unread(key, trial)
    )


def _is_unread(key: Key, trial: Config) -> bool:
    """Whether a key's whole section means nothing in a trial, which is the first of what the key needs."""
    return key.name.partition(".")[0] in UNREAD and bool(key.needs and lacking(key.needs[0], trial))


def idle_keys(config: Config, points: Sequence[Point]) -> list[str]:
    """One line for each swept key that changes nothing in some points, and which points only repeat others for that reason."""
    trials = [trial_config(config, point, out="") for point in points]
    alike = first_alike(config, points)
    idle = [{key: why for key in point.settings if (why := _why_idle(key, trial))} for point, trial in zip(points, trials, strict=True)]
    by_index = {point.index: point for point in points}
    firsts: dict[str, Point] = {}
    repeats: dict[int, Point] = {}
    for point, keys in zip(points, idle, strict=True):
        counted = repr(sorted((key, value) for key, value in point.settings.items() if key not in keys))
        first = firsts.setdefault(counted, point)
        if first is not point:
            repeats[point.index] = first
    lines = []
    for key in dict.fromkeys(key for point in points for key in point.settings):
        concerned = [(point, keys[key]) for point, keys in zip(points, idle, strict=True) if key in keys]
        if not concerned:
            continue
        reasons = " or ".join(dict.fromkeys(why for _, why in concerned))
        twins = [point.index for point, _ in concerned if point.index in repeats and _differ(point, repeats[point.index], key)]
        again = [index for index in twins if alike[by_index[index].name].index == index]
        taken = [index for index in twins if index not in again]
        told = _repeats(taken, "not run again") + _repeats(again, "run all the same")
        lines.append(f"{key} changes nothing in {_listed([point.index for point, _ in concerned])} ({reasons}){told}")
    return lines


def _repeats(indices: Sequence[int], what: str) -> str:
    if not indices:
        return ""
    one = len(indices) == 1
    return f"; {_listed(indices)} repeat{'s' * one} an earlier point's result and {'is' if one else 'are'} {what}"


def _differ(point: Point, other: Point, key: str) -> bool:
    return bool(point.settings.get(key) != other.settings.get(key))


def _why_idle(key: str, trial: Config) -> str:
    """Why a key changes nothing in a trial; empty where it may change something."""
    reasons = (lacking(needs, trial) for needs in KEYS[key].needs)
    return next(filter(None, reasons), NEUTRAL if KEYS[key].neutral else "")


def _listed(indices: Sequence[int]) -> str:
    """`point 3`, `points 1-3, 5`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"point{'s' * (len(indices) != 1)} {text}"
