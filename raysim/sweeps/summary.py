"""What a sweep came to, the content of its summary.json: how its trials ended, the best of each objective and budget, and the front."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raysim.console.words import is_number
from raysim.sweeps.rows import METRICS, STATUSES, Setting, Trial, best_under, pareto_front

BUDGETS = (1.0, 3.0, 8.0)


def sweep_summary(
    rows: Sequence[Trial],
    groups: Sequence[Setting],
    *,
    title: str,
    objectives: Mapping[str, str],
    swept: Sequence[str],
    selection: str,
    command: Callable[[Trial], str],
) -> dict[str, Any]:
    """The content of summary.json. Settings that came to the same runs are one, without the keys that changed nothing."""
    done = [group for group in groups if group["status"] == "done"]
    of_trial = {row["trial"]: row for row in rows}
    keys = [key for key in swept if key != "seed"]

    def runs(group: Setting) -> frozenset[Any]:
        return frozenset(_run_of(of_trial[trial]) for trial in group["trials"])

    def entry(group: Setting) -> dict[str, Any]:
        first = next(row for row in map(of_trial.__getitem__, group["trials"]) if row["status"] == "done")
        alike = [other for other in done if runs(other) == runs(group)]
        settings = {key: group[key] for key in keys if all(other[key] == group[key] for other in alike)}
        figures = _figures(group)
        return {"settings": settings, "figures": figures, "trials": group["trials"], "trial": first["trial"], "command": command(first)}

    sought = front_objectives(done, objectives)
    beaten_by_none = [done[i] for i in front_of(done, sought)]
    front = [group for i, group in enumerate(beaten_by_none) if runs(group) not in map(runs, beaten_by_none[:i])]
    ranked = [*front, *[group for group in done if group not in front]]  # of equals, one on the front is the best
    best = [(key, sense, best_under(ranked, objective=key, budget={}, sense=sense)) for key, sense in objectives.items()]
    statuses = [row["status"] for row in rows]
    return {
        "title": title,
        "num_trials": {"all": len(rows)} | {status: statuses.count(status) for status in STATUSES},
        "num_runs": len(set(map(_run_of, rows))),
        "wall_s": math.fsum({_run_of(row): row["wall_s"] for row in rows if is_number(row.get("wall_s"))}.values()),
        "objectives": dict(objectives),
        "swept": {key: list({json.dumps(row[key]): row[key] for row in rows}.values()) for key in swept},
        "selection": selection,
        "best": [{"objective": key, "sense": sense, **entry(group)} for key, sense, group in best if group is not None],
        "best_under": [found | entry(group) for found, group in _under_budgets(ranked, objectives)],
        "front": {"objectives": sought, "settings": [entry(group) for group in front]},
        "failed": [{"trial": row["trial"], "error": row.get("error")} for row in rows if row["status"] == "failed"],
    }


def _run_of(row: Trial) -> str:
    """What tells a trial's run from others: its folder, which trials that came to the same run share."""
    return str(row.get("folder") or row["trial"])


def _figures(group: Setting) -> dict[str, Any]:
    spreads = [f"{metric}_std" for metric in METRICS if group[f"{metric}_std"] is not None]
    return {key: group[key] for key in (*METRICS, *spreads, "unit", "simulated", "num_done", "num_stopped", "num_failed")}


def front_objectives(done: Sequence[Setting], objectives: Mapping[str, str]) -> dict[str, str]:
    """The objectives that were measured, and epsilon wherever there is one: a front of utility without its epsilon would mislead."""
    wanted = {**objectives, **({} if "epsilon" in objectives else {"epsilon": "min"})}
    return {key: sense for key, sense in wanted.items() if any(is_number(group.get(key)) for group in done)}


def _promise(group: Setting) -> tuple[str, bool]:
    """What an epsilon is about; those of different kinds do not compare."""
    return str(group["unit"]), bool(group["simulated"])


def promises(done: Sequence[Setting]) -> list[tuple[str, bool]]:
    """The kinds of epsilon that there are: whom each protects, and whether the noise was drawn for a simulated cohort."""
    return list(dict.fromkeys(_promise(group) for group in done if group["epsilon"] is not None))


def front_of(done: Sequence[Setting], objectives: Mapping[str, str]) -> list[int]:
    """The Pareto front, on which a setting is beaten only by settings whose epsilon compares with its own."""
    if not objectives:
        return []
    if "epsilon" not in objectives or len(promises(done)) < 2:
        return pareto_front(done, objectives=objectives)
    beaten: set[int] = set()
    for promise in promises(done):
        members = [i for i, group in enumerate(done) if group["epsilon"] is None or _promise(group) == promise]
        found = pareto_front([done[i] for i in members], objectives=objectives)
        beaten |= set(members) - {members[i] for i in found}
    return sorted(set(range(len(done))) - beaten)


def _under_budgets(done: Sequence[Setting], objectives: Mapping[str, str]) -> list[tuple[dict[str, Any], Setting]]:
    """The best first objective within each budget of epsilon, for each kind of epsilon, where a setting is within it."""
    objective, sense = next(iter(objectives.items()))
    found = []
    for promise, bound in itertools.product(promises(done), BUDGETS):
        alike = [group for group in done if _promise(group) == promise]
        group = best_under(alike, objective=objective, budget={"epsilon": bound}, sense=sense)
        if group is not None and objective != "epsilon":
            found.append(({"objective": objective, "sense": sense, "budget": {"epsilon": bound}}, group))
    return found
