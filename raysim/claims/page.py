"""`claims.md` and the page of a comparison that holds published claims against its runs.

Everything is read from the runs' files, so both can be written again at any time. The same runs give the same text, byte by byte.
Left out: a page for each run (each run's folder has one), and absolute comparisons with published figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raysim.claims.decide import (
    FAILS,
    FIGURE_WORDS,
    FIGURES,
    HOLDS,
    OPEN,
    Difference,
    Reading,
    Row,
    RunData,
    Runs,
    decide,
    figure_of,
    load_runs,
    mean_and_spread,
    over_seeds,
)
from raysim.claims.papers import ALPHAS, BETAS, CLAIMS, EPSILONS, RANKS, dplora, sent_bytes, sigma_table
from raysim.console.words import MISSING, clock
from raysim.methods.spec import spec_of
from raysim.reports import figures
from raysim.reports.figures import SPARE_COLOURS, Curve, Level, Line
from raysim.reports.page import write_comparison_tables
from raysim.reports.rendering import Panel, draw, render
from raysim.results import files
from raysim.results.folders import ComparisonFolder, RunFolder

TITLES = {
    "fedpit": "What FEDPIT's papers claim, and what these runs show",
    "dplora": "What DP-LoRA's paper claims, and what these runs show",
}
HOW = (
    "A verdict is computed. Each claim is a sum of differences between runs, record by record, averaged within a seed (NLL by tokens) and over seeds, positive "
    "where the claim is right. The interval is at each end the wider of two: Student's for the seeds' differences, and a paired bootstrap (4,000 replicates) that "
    "draws seeds with replacement and within each drawn seed its records. *holds*: every 95% interval lies above 0. *does not hold*: one lies below 0 (at 95% "
    "for all differences of the claim together). *not decided*: the rest, of which it is said what an effect must be smaller than. *could see* is the smallest "
    "effect that such an experiment calls with probability 0.8. An exact test over three seeds alone cannot reach 5% (the sign test ends at 1/4), and "
    "a verdict is about these splits and records like these. Nothing corrects for the number of rows."
)
WEAK_JUDGE = (
    "The judge was the base model by likelihood: see how far it agrees with itself before reading its win rates. It decides no claim."
)
LINES_SHOWN = ("base", "fedit", "fedpit", "fedmit", "fewfedweight", "cenit", "locit", "dplora-literal")
LEAST_NLL, LEAST_ROUGE, LEAST_BITS = 0.1, 0.05, 0.05


@dataclass(frozen=True)
class EntryRow:
    """An entry of the comparison: its figures over seeds in words."""

    entry: str
    num_seeds: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class EntryTable:
    """A row an entry, with a cell for each heading."""

    headings: tuple[str, ...]
    rows: tuple[EntryRow, ...]


def write_claims_report(out_dir: Path) -> Path:
    """The path of `report.html`, written into `out_dir` from the runs of its `comparison.json`, with claims.md, claims.json, summary.json,
    results.csv and `figures/*.png`.

    Errors: ValueError if there is no such file, or it names no claims.
    """
    out_dir = Path(out_dir)
    found = ComparisonFolder(out_dir)
    name, folders = found.comparison.claims, found.run_folders
    if name not in CLAIMS:
        raise ValueError(f"{str(out_dir)!r} is a comparison without claims; set claims={' or '.join(CLAIMS)} and run it again")
    runs = load_runs(out_dir)
    rows = [decide(claim, runs) for claim in CLAIMS[name]]
    write_comparison_tables(out_dir, folders)
    files.write_text(out_dir / files.CLAIMS_TABLE, as_markdown(rows, runs, title=TITLES[name]))
    files.write_json(out_dir / files.CLAIMS, [as_json(row) for row in rows])
    files.write_text(out_dir / files.REPORT, _page(out_dir, rows, runs, name=name, folders=folders))
    return out_dir / files.REPORT


def as_markdown(rows: Sequence[Row], runs: Runs, *, title: str) -> str:
    """The table of claims, how it was decided, and what every entry came to."""
    lines = [f"# {title}", "", HOW, "", f"Seeds: {', '.join(map(str, seeds_of(runs)))}.", ""]
    lines += ["| claim | stated in | published | ours | difference (95% interval) | verdict |", "|---|---|---|---|---|---|"]
    for row in rows:
        claim, first = row.claim, row.readings[0]
        cells = [claim.text, claim.where, claim.published, ours_in_words(row), differences_in_words(first), f"**{row.verdict}**"]
        lines.append(_table_row(cells))
    lines += [
        "",
        "The same claims by the other figures:",
        "",
        "| claim | figure | difference (95% interval) | verdict |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines += [
            _table_row([row.claim.text, FIGURE_WORDS[other.figure], differences_in_words(other), other.verdict])
            for other in row.readings[1:]
        ]
    table = entry_table(runs)
    lines += ["", "Every entry (mean over seeds, standard deviation):", "", _table_row(["entry", "seeds", *table.headings])]
    lines.append("|---" * (2 + len(table.headings)) + "|")
    lines += [_table_row([_plain(row.entry), str(row.num_seeds), *row.cells]) for row in table.rows]
    lines += ["", *map(_plain, notes(runs))]
    return "\n".join(lines).rstrip() + "\n"


def seeds_of(runs: Runs) -> list[int]:
    """The seeds of the comparison, ascending."""
    return sorted({seed for members in runs.values() for seed in members})


def _plain(text: str) -> str:
    """A text in Markdown that is no HTML and no formula."""
    return " ".join(text.replace("<", "&lt;").replace("$", "\\$").split())


def _table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table, whatever stands in its cells."""
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


FURTHER = (
    ("with a prefix", "attack", "prefixed_train_rouge_l"),
    ("control with it", "attack", "prefixed_heldout_rouge_l"),
    ("found across clients", "cross_client", "coverage"),
    ("guessed", "cross_client", "heldout_coverage"),
    ("accuracy by label", "eval", "label_accuracy"),
    ("macro-F1 by label", "eval", "label_macro_f1"),
    ("accuracy of the commonest label", "eval", "label_accuracy_of_commonest"),
    ("accuracy on multiple choice", "eval", "choice_accuracy"),
    ("by chance", "eval", "choice_accuracy_by_chance"),
)
"""Figures that only some sets and entries have: how they are called, and where a run's summary has them."""


def entry_table(runs: Runs) -> EntryTable:
    """What every entry came to. A figure that no entry has is left out."""
    columns: list[tuple[str, list[str]]] = []
    for heading, figure in (
        ("held-out NLL", "nll"),
        ("held-out ROUGE-L", "rouge_l"),
        ("memory, bits a token", "bits"),
        ("leakage", "leakage"),
    ):
        columns.append((heading, [_spread(over_seeds(runs, entry, figure)) for entry in runs]))
    columns.append(("control", [_spread([_control(run) for run in members.values()]) for members in runs.values()]))
    for heading, section, key in FURTHER:
        found = [[_further(run, section, key) for run in members.values()] for members in runs.values()]
        columns.append((heading, [_spread(values) for values in found]))
    columns.append(("win+tie", [_spread(over_seeds(runs, entry, "win_tie")) for entry in runs]))
    columns.append(("epsilon", [_largest([run.summary.epsilon for run in members.values()]) for members in runs.values()]))
    kept = [(heading, cells) for heading, cells in columns if set(cells) != {MISSING}]
    rows = [EntryRow(entry, len(members), tuple(cells[place] for _, cells in kept)) for place, (entry, members) in enumerate(runs.items())]
    return EntryTable(tuple(heading for heading, _ in kept), tuple(rows))


def _further(run: RunData, section: str, key: str) -> float | None:
    found = getattr(run.summary, section)
    return None if found is None else getattr(found, key)


def _control(run: RunData) -> float | None:
    leakage, memory = figure_of(run, "leakage"), figure_of(run, "memory")
    return leakage - memory if leakage is not None and memory is not None else None


def notes(runs: Runs) -> list[str]:
    """What must be said of methods and judges wherever their figures are shown."""
    methods = dict.fromkeys(run.summary.method for members in runs.values() for run in members.values())
    lines = [note for method in methods if (note := spec_of(method).note)]
    judges = [(entry, seed, run.judge) for entry, members in runs.items() for seed, run in members.items() if run.judge]
    if any(judge.made_from["kind"] == "likelihood" for _, _, judge in judges):
        lines.append(WEAK_JUDGE)
    return lines + [f"Judged {entry}, seed {seed}: {judge.words}" for entry, seed, judge in judges]


def ours_in_words(row: Row) -> str:
    """The deciding figure of each entry that the claim speaks of."""
    words, values = our_values(row)
    return f"{words}: {'; '.join(values)}" if values else words


def our_values(row: Row) -> tuple[str, list[str]]:
    """What is measured, and its value for each entry that the claim speaks of; a claim on other grounds has its text alone."""
    first = row.readings[0]
    if not row.ours:
        return first.text or MISSING, []
    return FIGURE_WORDS[first.figure], [f"{label} {_with_spread(mean, spread)}" for label, mean, spread in row.ours]


def differences_in_words(reading: Reading) -> str:
    """Each difference with its interval and how many seeds agree with it."""
    return "<br>".join(_lines(reading)) or MISSING


def _lines(reading: Reading) -> list[str]:
    return [_in_words(one, named=len(reading.differences) > 1) for one in reading.differences]


def _in_words(one: Difference, *, named: bool) -> str:
    start = f"{one.text}: " if named else ""
    if one.mean is None or one.low is None or one.high is None:
        return f"{start}{one.why}"
    agree = sum(value > 0 for value in one.by_seed.values())
    power = f"; could see {one.detectable:.4f}" if one.detectable is not None else ""
    end = f": smaller than {one.bound:.4f}" if one.bound is not None else ""
    return f"{start}{one.mean:+.4f} ({one.low:+.4f} to {one.high:+.4f}; {agree} of {len(one.by_seed)} seeds above 0{power}){end}"


def as_json(row: Row) -> dict[str, Any]:
    """A claim with its readings as a JSON object."""
    claim = row.claim
    stated = {"key": claim.key, "claim": claim.text, "where": claim.where, "published": claim.published}
    ours = [{"entry": label, "mean": mean, "spread": spread} for label, mean, spread in row.ours]
    return {**stated, "verdict": row.verdict, "ours": ours, "readings": [asdict(reading) for reading in row.readings]}


def in_short(out_dir: Path) -> str:
    """The verdict of each claim of a comparison's folder, a line each."""
    rows = ComparisonFolder(out_dir).verdicts
    width = max(len(verdict) for verdict, _ in rows)
    return "\n".join(f"{verdict:<{width}}  {claim}" for verdict, claim in rows)


def _spread(found: Sequence[float | None]) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return MISSING
    return _with_spread(*mean_and_spread(values))


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def _largest(found: Sequence[float | None]) -> str:
    values = [value for value in found if value is not None]
    return f"{max(values):.3g}" if values else MISSING


# --- the page


def _page(out_dir: Path, rows: Sequence[Row], runs: Runs, *, name: str, folders: Sequence[Path]) -> str:
    distinct = {(run.summary.name, run.summary.seed): run for members in runs.values() for run in members.values()}  # entries may share one
    return render(
        "claims.html.j2",
        title=TITLES[name],
        config=RunFolder(folders[0]).config,
        seeds=seeds_of(runs),
        how=HOW.replace("*", ""),
        tally=[(verdict, sum(row.verdict == verdict for row in rows)) for verdict in (HOLDS, FAILS, OPEN)],
        shown=[(row, *our_values(row), _lines(row.readings[0])) for row in rows],
        others=[(row.claim, FIGURE_WORDS[r.figure], _lines(r) or [MISSING], r.verdict) for row in rows for r in row.readings[1:]],
        drawn=draw(panels(runs, name=name), out_dir),
        entries=entry_table(runs),
        notes=notes(runs),
        folders=[folder.name for folder in folders],
        sigmas=sigma_table() if name == "dplora" else [],
        time=clock(sum(run.summary.wall_s for run in distinct.values())),
    )


AXES = {"nll": ("Held-out NLL", LEAST_NLL), "leakage": ("Extraction ROUGE-L", LEAST_ROUGE), "bits": ("Memory, bits a token", LEAST_BITS)}
"""Of a figure that is drawn: its axis, and the least that the axis spans."""
BARS = "Bars reach from the lowest to the highest seed."


def panels(runs: Runs, *, name: str) -> list[Panel]:
    """The figures that the runs have numbers for."""
    betas = [_beta_panel(runs, figure) for figure in ("nll", "bits", "leakage")]
    own = [_alpha_panel(runs), *betas] if name == "fedpit" else [_epsilon_panel(runs)]
    return [panel for panel in [_memory_panel(runs), _leakage_panel(runs), *own, _bytes_panel(runs)] if panel is not None]


def _memory_panel(runs: Runs) -> Panel | None:
    """Memory by round; every line starts from the base model, which by definition has gained nothing over itself."""
    note = (
        "How much likelier a training record's response became than under the base model, in bits a token, less the same of held-out records. "
        "Mean over seeds."
    )
    return _by_round_panel(runs, "bits", {0: 0.0}, title="Memory by round", note=note, axis="Memory, bits a token")


def _leakage_panel(runs: Runs) -> Panel | None:
    """Leakage by round; every line starts from the base model."""
    base = dict(enumerate(_means(runs, "base", "leakage")))
    note = "The attacker asks the release the true training prompts; how close the answers come to the training records (ROUGE-L). Mean over seeds."
    return _by_round_panel(runs, "leakage", base, title="Leakage by round", note=note, axis="Extraction ROUGE-L on training prompts")


def _by_round_panel(runs: Runs, figure: str, base: dict[int, float], *, title: str, note: str, axis: str) -> Panel | None:
    """A figure by rounds, a line an entry, the mean over seeds, from the base model's own figure."""
    lines: list[Line] = []
    for entry in LINES_SHOWN:
        own = _by_round(runs.get(entry, {}), figure)
        points = base | own
        if own and (len(points) > 1 or entry == "base"):
            marker = figures.MARKERS[len(lines) % len(figures.MARKERS)]
            lines.append(Line(_label(entry, runs), _colour(entry, runs), marker, sorted(points.items())))
    if not lines:
        return None
    return Panel(figure, title, note, figures.by_round(lines, axis=axis, least_span=AXES[figure][1]))


def _by_round(members: Mapping[int, RunData], figure: str) -> dict[int, float]:
    """An entry's figure by rounds completed, the mean over seeds."""
    found: dict[int, list[float]] = {}
    for run in members.values():
        for round_index in set.intersection(*[set(run.measures.get(measure, {})) for _, measure in FIGURES[figure]]):
            at_round = replace(run, measures={measure: {round_index: run.measures[measure][round_index]} for _, measure in FIGURES[figure]})
            found.setdefault(round_index + 1, []).append(figure_of(at_round, figure) or 0.0)
    return {x: sum(values) / len(values) for x, values in sorted(found.items())}


def _alpha_panel(runs: Runs) -> Panel | None:
    curves = [
        _curve(runs, [(float(i), f"{method}{suffix}") for i, (_, suffix) in enumerate(ALPHAS)], "nll", label=method, number=number)
        for number, method in enumerate(("fedit", "fedpit"))
    ]
    note = f"Held-out NLL (lower is better) by Dirichlet alpha: small is heterogeneous. {BARS}"
    ticks = [(float(i), text) for i, (text, _) in enumerate(ALPHAS)]
    return _against("alpha", "Utility against alpha", note, curves, label="Dirichlet alpha", ticks=ticks, runs=runs)


def _beta_panel(runs: Runs, figure: str) -> Panel | None:
    curves = [_curve(runs, [(float(beta), entry) for beta, entry in BETAS], figure, label="fedpit", number=0)]
    ticks = [(float(beta), beta) for beta, _ in BETAS]
    name, title = {
        "nll": ("beta", "Utility against beta"),
        "bits": ("beta-bits", "Memory against beta"),
        "leakage": ("beta-leakage", "Leakage against beta"),
    }[figure]
    note = f"beta is the share of the adapter trained on real records in what a client sends; 1 is FEDIT. {BARS}"
    return _against(name, title, note, curves, label="beta", ticks=ticks, runs=runs, figure=figure)


def _epsilon_panel(runs: Runs) -> Panel | None:
    colours = [*figures.colours_of(["dplora"]), *[light for light, _ in SPARE_COLOURS]]
    curves = []
    for number, rank in enumerate(RANKS):
        places = [(float(i), dplora(epsilon, rank)) for i, epsilon in enumerate(EPSILONS)]
        curves.append(_curve(runs, places, "nll", label=f"rank {rank}", number=number, colour=colours[number]))
    note = f"Held-out NLL (lower is better) of DP-LoRA by epsilon for one record, without noise at the right. {BARS}"
    ticks = [(float(i), epsilon if epsilon != "none" else "no noise") for i, epsilon in enumerate(EPSILONS)]
    return _against("epsilon", "Utility against epsilon, by rank", note, curves, label="epsilon", ticks=ticks, runs=runs)


def _against(
    name: str,
    title: str,
    note: str,
    curves: Sequence[Curve | None],
    *,
    label: str,
    ticks: Sequence[tuple[float, str]],
    runs: Runs,
    figure: str = "nll",
) -> Panel | None:
    drawn = [curve for curve in curves if curve is not None]
    if not drawn:
        return None
    levels = [Level(spec_of("base").label, figures.colours_of(["base"])[0], value) for value in _means(runs, "base", figure)]
    axis, span = AXES[figure]
    return Panel(name, title, note, figures.against(drawn, axis=axis, label=label, ticks=ticks, least_span=span, levels=levels))


def _curve(runs: Runs, places: Sequence[tuple[float, str]], figure: str, *, label: str, number: int, colour: str = "") -> Curve | None:
    found = [(place, over_seeds(runs, entry, figure)) for place, entry in places]
    points = [(place, sum(values) / len(values), min(values), max(values)) for place, values in found if values]
    marker = figures.MARKERS[number % len(figures.MARKERS)]
    return Curve(spec_of(label).label, colour or figures.colours_of([label])[0], marker, points) if points else None


def _bytes_panel(runs: Runs) -> Panel | None:
    """Bytes of the first seed of each different entry, and what full fine-tuning would have sent in the same rounds."""
    rows: dict[tuple[str, float], tuple[str, str, float, float]] = {}
    for entry, members in runs.items():
        run = members[min(members)]
        up, down = float(run.summary.uplink_bytes), float(run.summary.downlink_bytes)
        rank = run.factors[0][0] if run.factors else 0
        label = f"{spec_of(run.summary.method).label}, rank {rank}, {run.summary.num_rounds} rounds"
        if up or down:
            rows.setdefault((label, up), (label, _colour(entry, runs), up, down))
    if not rows:
        return None
    bars = list(rows.values())
    for run in list(runs.get("fedit", {}).values())[:1]:
        full = float(sent_bytes(run)[2])
        bars.append((f"full fine-tuning (by formula), {run.summary.num_rounds} rounds", figures.MUTED, full, full))
    note = "What all clients together sent to the server (solid) and received from it (pale) over a run."
    return Panel("bytes", "Bytes sent", note, figures.traffic(bars))


def _means(runs: Runs, entry: str, figure: str) -> list[float]:
    """The mean over seeds, as a list of one; empty if there is none."""
    values = over_seeds(runs, entry, figure)
    return [sum(values) / len(values)] if values else []


def _method(entry: str, runs: Runs) -> str:
    return next(iter(runs[entry].values())).summary.method


def _label(entry: str, runs: Runs) -> str:
    return entry if entry.startswith("dplora") else spec_of(_method(entry, runs)).label


def _colour(entry: str, runs: Runs) -> str:
    return figures.colours_of([_method(entry, runs)])[0]
