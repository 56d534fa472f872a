"""`raysim budget`: from an epsilon to the noise it asks for, or from noise to the epsilon it spends, before anything runs.

The answer is for one unit, a client or a record, that may be in every round; a table and a picture show what more or fewer
rounds and larger or smaller samples would change.
Left out: what the noise does to the model. That is for a run to measure.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysim.privacy.accounting import SAMPLERS, Epsilon, Release, default_delta, epsilon_of, solve_noise_multiplier

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Rounds and sample sizes of the table, as multiples of those asked for."""
CELL_EXCESS = 5e-3
"""How far above the exact epsilon a cell of the table or a point of the picture may lie, as a share of it."""
SHARES = (0.02, 0.05, *(i / 10 for i in range(1, 11)))
"""Points of a line of the picture, as shares of twice the rounds; more of them where epsilon rises fast."""
DIGITS = 5
"""Significant digits of a solved noise multiplier, so that it can be copied and still keeps to the target."""
UNREACHABLE = "-"


@dataclass(frozen=True)
class Plan:
    """What would be released about whom."""

    num_rounds: int
    num_units: int
    """Clients, or records of the client with the fewest."""
    sample_size: int
    """Units of a release: exactly, or expected where the sampler is Poisson."""
    sampler: str
    """`poisson`, `fixed` or `all`."""
    delta: float
    unit: str = "client"
    """`client` or `record`."""
    num_steps: int = 1
    """Releases of a round that a unit can be in."""

    def releases(self, noise_multiplier: float) -> tuple[Release, ...]:
        """The releases of the whole plan, as the accountant takes them."""
        count = self.num_rounds * self.num_steps
        if self.sampler == "fixed":
            return (Release(noise_multiplier, "fixed", population=self.num_units, sample_size=self.sample_size, count=count),)
        if self.sampler == "all":
            return (Release(noise_multiplier, "all", count=count),)
        return (Release(noise_multiplier, "poisson", sampling_prob=self.sample_size / self.num_units, count=count),)


@dataclass(frozen=True)
class Answer:
    """A noise multiplier, and the epsilon that it spends."""

    plan: Plan
    noise_multiplier: float
    epsilon: Epsilon
    target_epsilon: float | None
    """The epsilon that was asked for; None where the noise multiplier was."""


def answer(plan: Plan, *, target_epsilon: float | None = None, noise_multiplier: float | None = None) -> Answer:
    """The smallest noise multiplier (rounded up to `DIGITS`) that keeps `plan` within `target_epsilon`, or what `noise_multiplier` spends.

    Errors: ValueError unless exactly one of the two is given, and where it is out of range or no noise serves.
    """
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ValueError("give either --target-epsilon or --noise-multiplier: the other one is the answer")
    if target_epsilon is not None:
        if not (target_epsilon > 0.0 and math.isfinite(target_epsilon)):
            raise ValueError(f"--target-epsilon={target_epsilon:g} must be greater than 0 and finite")
        try:
            solved = solve_noise_multiplier(target_epsilon, delta=plan.delta, make_releases=plan.releases)
        except ValueError as error:
            raise ValueError(str(error).replace("target_epsilon=", "--target-epsilon=", 1)) from None
        unit = 10.0 ** (math.floor(math.log10(solved)) + 1 - DIGITS)
        noise_multiplier = float(f"{math.ceil(solved / unit) * unit:.{DIGITS}g}")
    assert noise_multiplier is not None
    if not (noise_multiplier > 0.0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"--noise-multiplier={noise_multiplier:g} must be greater than 0 and finite: without noise there is no epsilon")
    return Answer(plan, noise_multiplier, epsilon_of(plan.releases(noise_multiplier), delta=plan.delta), target_epsilon)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `raysim budget`."""
    ask = parser.add_argument_group("what is given (one of the two)")
    ask.add_argument("--target-epsilon", type=float, metavar="EPS", help="the epsilon to stay within; the answer is a noise multiplier")
    ask.add_argument("--noise-multiplier", type=float, metavar="Z", help="noise std over the clipping bound; the answer is an epsilon")
    parser.add_argument("--rounds", type=int, required=True, metavar="N", help="rounds of the run")
    parser.add_argument("--delta", type=float, metavar="D", help="delta of the guarantee (default: 1/n^1.1 for n units)")
    parser.add_argument("--sampler", default="poisson", metavar="NAME", help="poisson (default), fixed (samples of one size) or all")
    client = parser.add_argument_group("to protect a client with all its records")
    client.add_argument("--clients", type=int, metavar="N", help="clients there are")
    client.add_argument("--per-round", type=int, metavar="N", help="clients of a round (expected number for poisson)")
    record = parser.add_argument_group("to protect one record of a client that may be in every round")
    record.add_argument("--examples", type=int, metavar="N", help="records of the client with the fewest")
    record.add_argument("--batch", type=int, metavar="N", help="records of a private step (expected number for poisson)")
    record.add_argument("--steps", type=int, metavar="N", help="private steps of a client in a round (default: 1)")
    parser.add_argument("--figure", metavar="FILE.png", help="write a picture: epsilon against rounds for several sample sizes")


def main(arguments: argparse.Namespace) -> int:
    """Prints the answer to `arguments` and returns the exit status.

    Errors: ValueError in one line that names the option.
    """
    plan = plan_of(arguments)
    figure = None if arguments.figure is None else Path(arguments.figure)
    if figure is not None and figure.suffix != ".png":
        raise ValueError(f"--figure={arguments.figure} must end in .png")
    found = answer(plan, target_epsilon=arguments.target_epsilon, noise_multiplier=arguments.noise_multiplier)
    for line in warnings_of(plan):
        print(f"raysim: warning: {line}", file=sys.stderr)
    console = Console(file=sys.stdout, force_jupyter=False, highlight=False)
    first, *rest = lines_of(found)
    console.print(Text(first, style="bold"), soft_wrap=not console.is_terminal)
    console.print(Text("\n".join(rest)), soft_wrap=not console.is_terminal)
    title, note = titles_of(found, fancy=console.is_terminal)
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=not console.is_terminal)
    console.print(table_of(found, fancy=console.is_terminal))
    console.print(Text(note, style="dim"), soft_wrap=not console.is_terminal)
    if figure is not None:
        write_figure(found, figure)
        console.print(Text(f"picture: {figure}"), soft_wrap=not console.is_terminal)
    return 0


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the options describe.

    Errors: ValueError in one line that names the option.
    """
    given = vars(arguments)
    by_record = given["examples"] is not None
    unit, units, size = ("record", "examples", "batch") if by_record else ("client", "clients", "per_round")
    _refuse_strangers(given, by_record=by_record)
    if given["sampler"] not in SAMPLERS:
        raise ValueError(f"--sampler={given['sampler']} is not one of {', '.join(SAMPLERS)}")
    num_units = _whole(given, units, remedy="give how many there are" + ("" if by_record else ", or --examples to protect a record"))
    if given["sampler"] == "all" and given[size] is None:
        given = given | {size: num_units}
    sample_size = _whole(given, size, most=num_units, remedy="give how many take part, or --sampler=all")
    if given["sampler"] == "all" and sample_size != num_units:
        raise ValueError(f"{_option(size)}={sample_size} does not fit --sampler=all, which takes all {num_units}; leave it out")
    if given["delta"] is None and num_units < 2:
        raise ValueError(f"--delta is missing: it has no default for {_option(units)}={num_units}")
    delta = default_delta(num_units) if given["delta"] is None else given["delta"]
    if not 0.0 < delta < 1.0:
        raise ValueError(f"--delta={delta:g} must be greater than 0 and less than 1")
    return Plan(
        num_rounds=_whole(given, "rounds"),
        num_units=num_units,
        sample_size=sample_size,
        sampler="all" if given["sampler"] == "poisson" and sample_size == num_units else given["sampler"],
        delta=delta,
        unit=unit,
        num_steps=1 if given["steps"] is None else _whole(given, "steps"),
    )


def warnings_of(plan: Plan) -> list[str]:
    """What a user should reconsider, one line each."""
    if plan.delta <= 1.0 / plan.num_units:
        return []
    better = f"; the default is {default_delta(plan.num_units):.2g}" if plan.num_units > 1 else ""
    return [f"--delta={plan.delta:g} is above 1/{plan.num_units}: that allows publishing one of them{better}"]


def lines_of(found: Answer) -> list[str]:
    """The answer in plain sentences, the first of which stands alone."""
    plan, z, epsilon = found.plan, f"{found.noise_multiplier:.5g}", f"{found.epsilon.quoted:.4g}"
    first = f"epsilon {epsilon} at delta {plan.delta:.3g} is what noise multiplier {z} spends"
    if found.target_epsilon is not None:
        first = f"noise multiplier {z} keeps within epsilon {found.target_epsilon:g} at delta {plan.delta:.3g} (it spends {epsilon})"
    steps = f" of {plan.num_steps:,} private steps" if plan.num_steps > 1 else ""
    what = "client's update" if plan.unit == "client" else "record's gradient"
    mean = found.noise_multiplier / plan.sample_size
    change = "replacing one" if plan.sampler == "fixed" else "adding or removing one"
    whose = "client with all its records" if plan.unit == "client" else "record of a client that is in every round"
    check = f"Cross-check by RDP: epsilon {found.epsilon.rdp:.4g}."
    if found.epsilon.pld is None:
        check = "Accounted by RDP, the one way for samples of a fixed size; Poisson samples need less noise."
    return [
        first,
        f"{plan.num_rounds:,} rounds{steps}; {_sampling(plan)}.",
        f"Each {what} is clipped to C; their sum gets noise of standard deviation {z} C, their average {mean:.3g} C.",
        f"The guarantee is for {change} {whose}. {check}",
    ]


def table_of(found: Answer, *, fancy: bool) -> Table:
    """What would have been answered for other rounds (down) and sample sizes (across); the plan's own cell stands out."""
    plan = found.plan
    table = Table(box=box.SIMPLE_HEAD if fancy else None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    sizes = _scaled(plan.sample_size, most=plan.num_units) if plan.sampler != "all" else [plan.num_units]
    table.add_column("rounds", justify="right")
    for size in sizes:
        table.add_column(f"{size:,}" + ("" if fancy else " "), justify="right", no_wrap=True)
    columns = [list(_column(found, size)) for size in sizes]
    for i, num_rounds in enumerate(_scaled(plan.num_rounds)):
        row = [Text(f"{num_rounds:,}")]
        for size, column in zip(sizes, columns, strict=True):
            own = (num_rounds, size) == (plan.num_rounds, plan.sample_size)
            text = _number(column[i])
            row.append(Text(text, style="bold green" if own else "") if fancy else Text(text + ("*" if own else " ")))
        table.add_row(*row)
    return table


def titles_of(found: Answer, *, fancy: bool) -> tuple[str, str]:
    """What stands over the table, and the note under it."""
    plan = found.plan
    what = f"Epsilon at delta {plan.delta:.3g} with noise multiplier {found.noise_multiplier:.5g}"
    if found.target_epsilon is not None:
        what = f"Noise multiplier for epsilon {found.target_epsilon:g} at delta {plan.delta:.3g}"
    across = f"{plan.unit}s of a {'round' if plan.unit == 'client' else 'step'}"
    how = "by RDP" if found.epsilon.pld is None else f"by privacy loss distributions, at most about {CELL_EXCESS:.1%} too large"
    return f"{what}, by rounds (down) and {across} (across)", f"{'Bold' if fancy else '*'}: as asked. Cells are {how}."


def write_figure(found: Answer, path: Path) -> None:
    """Writes a picture of epsilon against rounds, at the answer's noise, for the table's sample sizes."""
    from raysim.reports import figures  # matplotlib: a second to import, and only who asks for a picture draws one

    plan = found.plan
    colours = [figures.COLOURS[name][0] for name in ("blue", "orange", "green", "pink", "amber")]  # five that stay apart
    last = 2 * plan.num_rounds
    rounds = sorted({0, 1, *(max(1, round(last * share)) for share in SHARES)})
    lines = []
    for i, size in enumerate(_scaled(plan.sample_size, most=plan.num_units) if plan.sampler != "all" else [plan.num_units]):
        plans = [replace(plan, num_rounds=num_rounds, sample_size=size) for num_rounds in rounds]
        spent = [_quick_epsilon(one, found.noise_multiplier) for one in plans]
        points = [(num_rounds, value) for num_rounds, value in zip(rounds, spent, strict=True) if math.isfinite(value)]
        lines.append(figures.Line(f"{size:,} {plan.unit}s", colours[i], figures.MARKERS[i], points))
    title = f"epsilon at delta {plan.delta:.3g}, noise multiplier {found.noise_multiplier:.5g}, {plan.num_units:,} {plan.unit}s in all"
    figure = figures.by_round(lines, axis=title, least_span=0.0)
    axes = figure.axes[0]
    axes.axvline(plan.num_rounds, color=figures.MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
    axes.axhline(found.epsilon.quoted, color=figures.MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
    figures.save_png(figure, path)


def _column(found: Answer, size: int) -> Iterator[float | None]:
    """The table's answers for one sample size, None where there is none."""
    solved: list[float] = []
    for num_rounds in _scaled(found.plan.num_rounds):
        plan = replace(found.plan, num_rounds=num_rounds, sample_size=size)
        if plan == found.plan:
            value = found.epsilon.quoted if found.target_epsilon is None else found.noise_multiplier
        elif found.target_epsilon is None:
            value = _quick_epsilon(plan, found.noise_multiplier)
        else:
            # Rounds double from row to row, and the noise grows by a factor that itself hardly changes.
            guess = solved[-1] ** 2 / solved[-2] if len(solved) > 1 else solved[-1] if solved else found.noise_multiplier
            try:
                value = solve_noise_multiplier(
                    found.target_epsilon, delta=plan.delta, make_releases=plan.releases, excess=CELL_EXCESS, start=guess
                )
            except ValueError:
                yield None
                continue
        solved.append(value)
        yield value


def _quick_epsilon(plan: Plan, noise_multiplier: float) -> float:
    """The epsilon of a plan, at most about `CELL_EXCESS` too large."""
    return epsilon_of(plan.releases(noise_multiplier), delta=plan.delta, excess=CELL_EXCESS).quoted


def _scaled(value: int, *, most: int | None = None) -> list[int]:
    """`value` times each of `MULTIPLES`, in whole numbers from 1 to `most`."""
    return sorted({min(max(1, round(value * multiple)), most or round(value * MULTIPLES[-1])) for multiple in MULTIPLES})


def _sampling(plan: Plan) -> str:
    each = "each round" if plan.unit == "client" else "each step"
    whole = f"{plan.num_units:,} {plan.unit}s"
    if plan.sampler == "all":
        return f"{each} takes all {whole}"
    if plan.sampler == "fixed":
        return f"{each} draws {plan.sample_size:,} of {whole}, without replacement"
    prob = plan.sample_size / plan.num_units
    return f"{each} draws each of {whole} with probability {prob:.3g} (Poisson; {plan.sample_size:,} expected)"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return UNREACHABLE
    return f"{value:,.0f}" if 1000 <= value < math.inf else f"{value:.3g}"


def _refuse_strangers(given: dict[str, Any], *, by_record: bool) -> None:
    for key in ("clients", "per_round") if by_record else ("batch", "steps"):
        if given[key] is None:
            continue
        if by_record:
            raise ValueError(f"{_option(key)}={given[key]} does not count where --examples says that the unit is a record; leave it out")
        raise ValueError(f"{_option(key)}={given[key]} is about records: give --examples to protect a record, or leave it out")


def _whole(given: dict[str, Any], key: str, *, most: int | None = None, remedy: str = "give one") -> int:
    """An option's value, a whole number from 1 to `most`."""
    value = given[key]
    if value is None:
        raise ValueError(f"{_option(key)} is missing: {remedy}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{_option(key)}={value} must be at least 1" + (f" and at most {most}" if most is not None else ""))
    return int(value)


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"
