"""Run folders in, one self-contained page out: tables, figures and plain sentences about utility, leakage, epsilon and cost.

Everything is read from the files of a run, so a report can be written again at any time, by anyone, without the model.
A folder that is not finished gives a report that says so.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raysim.attacks.views import PUBLIC
from raysim.config import BUILT_IN_SETS, flatten_keys, hostile_note
from raysim.console.tables import columns_of
from raysim.methods.spec import spec_of
from raysim.reports.cards import cards
from raysim.reports.named import named_runs
from raysim.reports.panels import MOST_RUNS, panels
from raysim.reports.rendering import draw, render
from raysim.reports.tables import (
    accuracies,
    attacks_made,
    comparison_rows,
    environments,
    exactness,
    failed_clients,
    robustness,
    settings_table,
)
from raysim.results.contents import Summary, Synthetic
from raysim.results.files import FIGURES, REPORT, RESULTS, SUMMARY, seal, write_csv, write_json, write_text
from raysim.results.folders import RunSoFar, so_far

SAMPLE_KEPT, SAMPLE_REJECTED, SAMPLE_CHARACTERS = 60, 30, 700


def write_run_report(run_dir: Path) -> Path:
    """The path of `report.html`, written into `run_dir` together with `figures/*.png`.

    Errors: ValueError if the folder holds no `config.yaml`.
    """
    run = so_far(run_dir)
    page = _write_page(Path(run_dir), [run], title=_run_title(run.summary))
    seal(Path(run_dir), REPORT, FIGURES)
    return page


def write_comparison_report(out_dir: Path, run_dirs: Sequence[Path]) -> Path:
    """The path of `report.html` over several runs, written into `out_dir` with `figures/*.png`, `summary.json` and `results.csv`.

    Errors: ValueError if `run_dirs` is empty or one of them holds no `config.yaml`.
    """
    runs = write_comparison_tables(out_dir, run_dirs)
    return _write_page(Path(out_dir), runs, title=f"{Path(out_dir).resolve().name}: {len(runs)} runs compared")


def write_comparison_tables(out_dir: Path, run_dirs: Sequence[Path]) -> list[RunSoFar]:
    """Writes `summary.json` and `results.csv` of several runs into `out_dir`, and returns what their files say.

    Errors: ValueError if `run_dirs` is empty or one of them holds no `config.yaml`.
    """
    if not run_dirs:
        raise ValueError("run_dirs=[] leaves nothing to compare; give at least one run folder")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    runs = [so_far(folder) for folder in run_dirs]
    write_json(out_dir / SUMMARY, {"runs": [run.stored for run in runs]})
    flat = [flatten_keys(dict(run.stored)) for run in runs]
    write_csv(out_dir / RESULTS, flat, columns=list(dict.fromkeys(key for row in flat for key in row)))
    return runs


def _write_page(out_dir: Path, runs: Sequence[RunSoFar], *, title: str) -> Path:
    named, rows = named_runs(runs), comparison_rows([run.summary for run in runs])
    samples = [(one.label, _sample(one.run.synthetic)) for one in named if one.run.synthetic]
    page = render(
        "page.html.j2",
        title=title,
        runs=named,
        rows=rows,
        columns=columns_of(rows),
        cards=cards(named),
        drawn=draw(panels(named), out_dir),
        most_drawn=MOST_RUNS,
        fictional=all(run.folder.config.data.source in BUILT_IN_SETS for run in runs),
        settings=settings_table(named),
        environments=environments(named),
        samples=samples,
        colours={one.label: one.colour for one in named},
        accuracies=accuracies(named),
        attacks=attacks_made(named),
        public=PUBLIC,
        failed=failed_clients(named),
        robust=robustness(named),
        exactness=exactness(named),
        hostile=hostile_note(runs[0].folder.config) if len(runs) == 1 else "",
    )
    write_text(out_dir / REPORT, page, private=bool(samples))
    return out_dir / REPORT


def _run_title(summary: Summary) -> str:
    label = spec_of(summary.method).label
    return label if summary.name.lower() in (summary.method, label.lower()) else f"{summary.name} ({label})"


def _sample(texts: Sequence[Synthetic]) -> dict[str, Any]:
    """Evenly spaced kept and rejected records, shortened for the page."""
    kept = _spaced([text for text in texts if text.kept], SAMPLE_KEPT)
    rejected = _spaced([text for text in texts if not text.kept], SAMPLE_REJECTED)
    shown = sorted([*kept, *rejected], key=lambda text: (text.round_index, text.client_id, not text.kept))
    rows = [replace(text, instruction=_shortened(text.instruction), response=_shortened(text.response)) for text in shown]
    verdicts = sorted({text.verdict for text in rejected})
    return {"rows": rows, "total": len(texts), "clients": sorted({text.client_id for text in shown}), "verdicts": verdicts}


def _spaced(items: Sequence[Synthetic], most: int) -> Sequence[Synthetic]:
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def _shortened(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS].rstrip() + " …"
