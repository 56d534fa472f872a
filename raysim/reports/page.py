"""Run folders in, one self-contained page out: tables, figures and plain sentences about utility, leakage, epsilon and cost.

Everything is read from the files of a run, so a report can be written again at any time, by anyone, without the model.
A folder that is not finished gives a report that says so. Left out: judging whether a difference matters; the page gives
the control beside each leakage and the number of prompts, and leaves the conclusion to the reader.
"""

import csv
import html
import io
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from raysim import config as configuration
from raysim.attacks.views import ATTACKS, PUBLIC, SEES
from raysim.console.progress import COLUMNS, MISSING, NO_GUARANTEE, clock, human_bytes
from raysim.data.configured import responses_are_labels
from raysim.data.similarity import MEASURE
from raysim.measure.audits import verdict
from raysim.methods.spec import METHODS, spec_of
from raysim.reports import figures
from raysim.results.files import json_lines, read_json, write_json, write_text

TEMPLATES = Path(__file__).parent / "templates"
UNINTERESTING_KEYS = ("name", "out", "compare", "compare_seeds", "claims")
SAMPLE_KEPT, SAMPLE_REJECTED, SAMPLE_CHARACTERS = 60, 30, 700
MOST_CLIENTS = 20
"""Rows of the picture of how near synthetic records come to private ones."""
SMALL_GAP = 0.03  # of ROUGE-L between training and held-out prompts; a few dozen prompts scatter by about as much
LOWER_IS_BETTER = ("heldout_nll", "leakage", "train_exact_match", "train_details_rate", "epsilon", "uplink_bytes")
HIGHER_IS_BETTER = ("heldout_rouge_l", "tokens_per_s")


@dataclass(frozen=True)
class Run:
    """What the files of one run folder say; `notes` are plain sentences about what is missing, or must be said of the method."""

    folder: Path
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    config: dict[str, Any]
    partition: dict[str, Any]
    ledger: dict[str, Any]
    environment: dict[str, Any]
    synthetic: list[dict[str, Any]]
    audit: dict[str, Any]
    """audit.json; empty where there was no audit."""
    judge: dict[str, Any]
    """judge.json; empty where nothing was judged."""
    notes: list[str]

    @property
    def verdict(self) -> str | None:
        """What was claimed and what an audit found, in one line; None where none was made."""
        return verdict(self.audit["one_run"]) if self.audit.get("one_run") else None

    @property
    def method(self) -> str:
        return str(self.summary["method"])


@dataclass(frozen=True)
class Panel:
    """A figure with the words around it."""

    name: str
    title: str
    note: str
    figure: Figure


def write_run_report(run_dir: Path) -> Path:
    """The path of `report.html`, written into `run_dir` together with `figures/*.png`.

    Errors: ValueError if the folder holds no `config.yaml`.
    """
    run = read_run(run_dir)
    return _write_page(Path(run_dir), [run], title=_run_title(run))


def write_comparison_report(out_dir: Path, run_dirs: Sequence[Path]) -> Path:
    """The path of `report.html` over several runs, written into `out_dir` with `figures/*.png`, `summary.json` and `results.csv`.

    Errors: ValueError if `run_dirs` is empty or one of them holds no `config.yaml`.
    """
    runs = write_comparison_tables(out_dir, run_dirs)
    return _write_page(Path(out_dir), runs, title=f"{Path(out_dir).resolve().name}: {len(runs)} runs compared")


def write_comparison_tables(out_dir: Path, run_dirs: Sequence[Path]) -> list[Run]:
    """Writes `summary.json` and `results.csv` of several runs into `out_dir`, and returns what their files say.

    Errors: ValueError if `run_dirs` is empty or one of them holds no `config.yaml`.
    """
    if not run_dirs:
        raise ValueError("run_dirs=[] leaves nothing to compare; give at least one run folder")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    runs = [read_run(folder) for folder in run_dirs]
    summaries = [run.summary for run in runs]
    write_json(out_dir / "summary.json", {"runs": summaries})
    _write_csv(out_dir / "results.csv", summaries)
    return runs


def comparison_rows(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a run, with numbers under the keys of `COLUMNS`, their `text`, and the columns in which the run is `best`.

    The best is taken among trained runs, by the printed value, and only where those differ; epsilons of different privacy
    units or deltas are not ranked. A run whose clients keep private adapters also has their figures, as `private_text`.
    """
    rows = []
    for label, summary in zip(_labels(summaries), summaries, strict=True):
        values = _values(summary)
        row: dict[str, Any] = {"label": label, "method": summary["method"], **values, "best": set()}
        row["text"] = {"label": label + ("" if summary.get("finished", True) else " (unfinished)"), **_texts(values)}
        if not spec_of(str(summary["method"])).trains:
            row["text"]["epsilon"] = MISSING  # it has seen no record, so there is nothing to guarantee
        private = summary.get("private")
        if private:
            kept = dict.fromkeys(values) | _measured(private)
            row["private_text"] = {"label": "└ kept private", **_texts(kept), "epsilon": "not sent"}
        rows.append(row)
    _mark_best(rows, summaries)
    return rows


def read_run(run_dir: Path) -> Run:
    """Everything the files of a run say, with a note for each that is missing or cut short.

    Errors: ValueError if the folder holds no `config.yaml`.
    """
    folder, notes = Path(run_dir), list[str]()
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"run folder {str(folder)!r} has no config.yaml; give the folder of a run, such as runs/quickstart/fedit")
    nested = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(nested, dict)
    config = configuration.flatten_keys({str(key): value for key, value in nested.items() if key != "compare"})
    records = _read_lines(folder / "rounds.jsonl", notes)
    ledger = _read_json(folder / "ledger.json", notes)
    summary = _summary(folder, config=config, records=records, ledger=ledger, notes=notes)
    notes += filter(None, [spec_of(str(summary["method"])).note])
    return Run(
        folder=folder,
        summary=summary,
        records=records,
        config=config,
        partition=_read_json(folder / "partition.json", notes),
        ledger=ledger,
        environment=_read_json(folder / "environment.json", notes),
        synthetic=_read_lines(folder / "synthetic.jsonl", notes, optional=True),
        audit=_read_json(folder / "audit.json", notes) if (folder / "audit.json").is_file() else {},
        judge=_read_json(folder / "judge.json", notes) if (folder / "judge.json").is_file() else {},
        notes=notes,
    )


def _summary(
    folder: Path, *, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], ledger: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """summary.json with the privacy unit and `finished`; for an unfinished run, what its rounds so far amount to."""
    path = folder / "summary.json"
    unit = ledger.get("unit") if ledger.get("epsilon") is not None else None
    if path.is_file():
        return {**read_json(path), "unit": unit, "finished": True}
    num_rounds = int(config.get("server.num_rounds", 0))
    done = sum(1 for record in records if record["round_index"] >= 0)
    notes.append(f"This run is not finished: {done} of {num_rounds} rounds are recorded. The figures are those of the last one.")
    seconds = sum(record.get("wall_s") or 0.0 for record in records)
    return {
        "name": config.get("name", folder.name),
        "method": config.get("method.name", "unknown"),
        "seed": config.get("seed"),
        "num_rounds": num_rounds,
        "eval": _last(records, "eval"),
        "attack": _last(records, "attack"),
        "private": _last(records, "private") or None,
        "cross_client": _last(records, "cross_client") or None,
        "epsilon": records[-1].get("epsilon") if records else None,
        "delta": ledger.get("delta"),
        "guarantee": ledger.get("guarantee", ""),
        "adapter_sha256": None,
        "num_parameters": None,
        "uplink_bytes": sum(record.get("uplink_bytes") or 0 for record in records),
        "downlink_bytes": sum(record.get("downlink_bytes") or 0 for record in records),
        "wall_s": seconds,
        "tokens_per_s": sum(record.get("num_tokens") or 0 for record in records) / seconds if seconds > 0 else None,
        "num_dropped": sum(record.get("num_dropped") or 0 for record in records),
        "simulated": ledger.get("simulated", False),
        "unit": unit,
        "finished": False,
    }


def _last(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    return next((dict(record[key]) for record in reversed(records) if record.get(key)), {})


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return {}
    return read_json(path)


def _read_lines(path: Path, notes: list[str], *, optional: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that was cut short is left out, with a note."""
    if not path.is_file():
        if not optional:
            notes.append(f"{path.name} is missing.")
        return []
    lines = json_lines(path)
    records = []
    for number, line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < lines[-1][0]:
                raise ValueError(f"{path}: line {number} is not JSON; restore the file, or remove that line") from None
            notes.append(f"The last line of {path.name} was cut short and is left out.")
    return records


def _labels(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run that no other has: its method, else its name, else with its seed, else with its number."""
    methods = [spec_of(str(summary["method"])).label for summary in summaries]
    names = [str(summary["name"]) for summary in summaries]
    seeded = [f"{name} seed {summary['seed']}" for name, summary in zip(names, summaries, strict=True)]
    numbered = [f"{name} #{i}" for i, name in enumerate(names, start=1)]
    labels = []
    for choices in zip(methods, names, seeded, numbered, strict=True):
        unique = [choice for choice, column in zip(choices, (methods, names, seeded, numbered), strict=True) if column.count(choice) == 1]
        labels.append(unique[0])
    simulated = [bool(summary.get("simulated")) for summary in summaries]
    return [label + (" (simulated)" if noted else "") for label, noted in zip(labels, simulated, strict=True)]


def _values(summary: Mapping[str, Any]) -> dict[str, Any]:
    epsilon = summary.get("epsilon")
    return {
        **_measured(summary),
        "epsilon": epsilon if epsilon is not None and math.isfinite(epsilon) else None,
        "uplink_bytes": summary.get("uplink_bytes"),
        "tokens_per_s": summary.get("tokens_per_s"),
    }


def _measured(release: Mapping[str, Any]) -> dict[str, Any]:
    """Utility and leakage of a summary, or of the private part of one."""
    evaluation, attack = release.get("eval") or {}, release.get("attack") or {}
    return {
        "heldout_nll": evaluation.get("heldout_nll"),
        "heldout_rouge_l": evaluation.get("heldout_rouge_l"),
        "leakage": attack.get("train_rouge_l"),
        "control": attack.get("heldout_rouge_l"),
        "train_exact_match": attack.get("train_exact_match"),
        "train_details_rate": attack.get("train_details_rate"),
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    leakage = _number(values["leakage"])
    if values["leakage"] is not None and values["control"] is not None:
        leakage += f" / {_number(values['control'])}"
    return {
        "heldout_nll": _number(values["heldout_nll"]),
        "heldout_rouge_l": _number(values["heldout_rouge_l"]),
        "leakage": leakage,
        "train_exact_match": _percent(values["train_exact_match"]),
        "train_details_rate": _percent(values["train_details_rate"]),
        "epsilon": NO_GUARANTEE if values["epsilon"] is None else f"{values['epsilon']:.3g}",
        "uplink_bytes": human_bytes(values["uplink_bytes"]),
        "tokens_per_s": MISSING if values["tokens_per_s"] is None else f"{values['tokens_per_s']:,.0f}",
    }


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def _mark_best(rows: Sequence[dict[str, Any]], summaries: Sequence[Mapping[str, Any]]) -> None:
    guarantees = {(s.get("unit"), s.get("delta")) for s in summaries if s.get("epsilon") is not None}
    comparable = len(guarantees) == 1 and all(unit is not None for unit, _ in guarantees)  # a run whose unit is unknown is not ranked
    for key in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
        trained = [row for row in rows if spec_of(row["method"]).trains and row[key] is not None]
        printed = {_printed(row, key) for row in trained}
        if len(printed) < 2 or (key == "epsilon" and not comparable):
            continue
        ranked = sorted(trained, key=operator.itemgetter(key), reverse=key in HIGHER_IS_BETTER)
        best = _printed(ranked[0], key)
        for row in trained:
            if _printed(row, key) == best:
                row["best"].add(key)


def _printed(row: Mapping[str, Any], key: str) -> str:
    """The part of a cell that is ranked (of a leakage, the value without its control)."""
    return str(row["text"][key]).split(" / ")[0]


def _write_csv(path: Path, summaries: Sequence[Mapping[str, Any]]) -> None:
    flat = [configuration.flatten_keys(dict(summary)) for summary in summaries]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(flat)
    write_text(path, text.getvalue())


def page_environment() -> jinja2.Environment:
    """The templates of all pages: text is escaped, and a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["measure"] = MEASURE
    return environment


def _write_page(out_dir: Path, runs: Sequence[Run], *, title: str) -> Path:
    labels = _labels([run.summary for run in runs])
    panels = _panels(runs, labels)
    drawn = []
    for panel in panels:
        figures.save_png(panel.figure, out_dir / "figures" / f"{panel.name}.png")
        drawn.append({"panel": panel, "svg": figures.inline_svg(panel.figure, name=panel.name, title=html.escape(panel.title))})
    environment = page_environment()
    page = environment.get_template("page.html.j2").render(
        title=title,
        runs=list(zip(labels, runs, strict=True)),
        rows=comparison_rows([run.summary for run in runs]),
        columns=COLUMNS,
        cards=_cards(runs, labels),
        drawn=drawn,
        fictional=_fictional(runs),
        settings=_settings(runs),
        full_settings=[sorted(run.config.items()) for run in runs],
        environments=_environments(runs),
        samples=[(label, _sample(run.synthetic)) for label, run in zip(labels, runs, strict=True) if run.synthetic],
        colours=dict(zip(labels, figures.colours_of([run.method for run in runs]), strict=True)),
        themed=figures.themed_colours(),
        across=[(label, run.summary["cross_client"]) for label, run in zip(labels, runs, strict=True) if run.summary.get("cross_client")],
        accuracies=_accuracies(runs, labels),
        attacks=_attacks_made(runs),
        public=PUBLIC,
        human_bytes=human_bytes,
        clock=clock,
    )
    path = out_dir / "report.html"
    write_text(path, page)  # at once: a run with a page is a finished one
    return path


def _run_title(run: Run) -> str:
    label, name = spec_of(run.method).label, str(run.summary["name"])
    return label if name.lower() in (run.method, label.lower()) else f"{name} ({label})"


def _fictional(runs: Sequence[Run]) -> bool:
    return all(run.config.get("data.source") in configuration.BUILT_IN_SETS for run in runs)


def _cards(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, str]]:
    """The four answers of the headline: how good, what leaks, at what epsilon, at what cost."""
    rows = comparison_rows([run.summary for run in runs])
    base = next((row for row in rows if not spec_of(row["method"]).trains), None)
    trained = [row for row in rows if spec_of(row["method"]).trains] or rows
    return [_utility_card(trained, base), _leakage_card(trained, base), _guarantee_card(runs, labels), _cost_card(runs, labels)]


def _utility_card(trained: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> dict[str, str]:
    question = "How good is it?"
    ranked = sorted((row for row in trained if row["heldout_nll"] is not None), key=operator.itemgetter("heldout_nll"))
    if not ranked:
        return {"question": question, "value": MISSING, "text": "Utility was not measured."}
    text = f"{ranked[0]['label']} has the lowest loss on held-out records" if len(ranked) > 1 else "Loss a token on held-out records"
    if base is not None and base["heldout_nll"] is not None and base is not ranked[0]:
        text += f"; the base model without training has {base['heldout_nll']:.2f}"
    others = ", ".join(f"{row['label']} {row['heldout_nll']:.2f}" for row in ranked[1:4])
    return {
        "question": question,
        "value": f"NLL {ranked[0]['heldout_nll']:.2f}",
        "text": text + "." + (f" Next: {others}." if others else ""),
    }


def _leakage_card(trained: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> dict[str, str]:
    question = "What leaks?"
    ranked = sorted((row for row in trained if row["leakage"] is not None), key=operator.itemgetter("leakage"), reverse=True)
    if not ranked:
        return {"question": question, "value": MISSING, "text": "Extraction was not tried."}
    worst, least = ranked[0], ranked[-1]
    same = f"{worst['leakage']:.2f}" == f"{least['leakage']:.2f}"
    parts = [
        f"{worst['label']} repeats its training answers the most."
        if not same
        else "How close extracted answers come to the training records."
    ]
    if same and len(ranked) > 1:
        parts = ["No run repeats its training answers more than another."]
    if worst["control"] is not None:
        gap = worst["leakage"] - worst["control"]
        meaning = "the gap is memory" if gap > SMALL_GAP else "so small a gap can be chance" if gap > 0 else "no memory shows"
        parts.append(f"On held-out prompts it scores {worst['control']:.2f}: {meaning}.")
    if worst["train_details_rate"] is not None:
        parts.append(f"{_percent(worst['train_details_rate'])} of the private details come out.")
    if not same:
        parts.append(f"Least: {least['label']} {least['leakage']:.2f}.")
    if base is not None and base["leakage"] is not None and base is not worst:
        parts.append(f"Base model: {base['leakage']:.2f}.")
    return {"question": question, "value": f"ROUGE-L {worst['leakage']:.2f}", "text": " ".join(parts)}


def _guarantee_card(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, str]:
    question = "At what epsilon?"
    named = [(label, run) for label, run in zip(labels, runs, strict=True) if spec_of(run.method).trains]
    given = [(label, run) for label, run in named if _values(run.summary)["epsilon"] is not None]
    without = [label for label, run in named if _values(run.summary)["epsilon"] is None]
    if not given:
        return {
            "question": question,
            "value": NO_GUARANTEE.capitalize(),
            "text": "What is measured here is one attack; a better one may find more.",
        }
    parts = []
    for label, run in given:
        unit = f" for one {run.summary['unit']}" if run.summary.get("unit") else ""
        delta = f" at δ = {run.summary['delta']:g}" if run.summary.get("delta") is not None else ""
        parts.append(f"{label}: ε = {run.summary['epsilon']:.3g}{delta}{unit}.")
    value = "ε = " + " · ".join(f"{run.summary['epsilon']:.3g}" for _, run in given) if len(given) <= 3 else f"{len(given)} runs with ε"
    tail = f" {', '.join(without)}: {NO_GUARANTEE}." if without else ""
    return {"question": question, "value": value, "text": " ".join(parts) + tail}


def _cost_card(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, str]:
    question = "At what cost?"
    trained = [(label, run.summary) for label, run in zip(labels, runs, strict=True) if spec_of(run.method).trains]
    seconds = sum(run.summary.get("wall_s") or 0.0 for run in runs)
    if not trained:
        return {"question": question, "value": _duration(seconds), "text": "No training, nothing sent."}
    senders: dict[str, list[str]] = {}
    for label, summary in trained:
        senders.setdefault(human_bytes(summary.get("uplink_bytes")), []).append(label)
    sent = "; ".join(f"{', '.join(names)} {amount}{' each' if len(names) > 1 else ''}" for amount, names in senders.items())
    rates = [summary["tokens_per_s"] for _, summary in trained if summary.get("tokens_per_s")]
    speed = ""
    if rates:
        speed = f" Speed: {min(rates):,.0f}{f' to {max(rates):,.0f}' if max(rates) > min(rates) else ''} tokens/s."
    return {
        "question": question,
        "value": _duration(seconds),
        "text": f"{'All runs together. ' if len(runs) > 1 else ''}Sent to the server: {sent}.{speed}",
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _panels(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    """The figures that the runs have numbers for, in reading order."""
    panels = [*_round_panels(runs, labels), *_trade_off_panel(runs, labels), *_epsilon_panel(runs, labels), *_exposure_panels(runs, labels)]
    panels += [*_partition_panels(runs, labels), *_traffic_panel(runs, labels)]
    return [*panels, *_candidate_panels(runs, labels), *_nearness_panels(runs, labels)]


def _round_panels(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    panels = []
    leakage = _lines(runs, labels, ("attack", "train_rouge_l"), control=("attack", "heldout_rouge_l"))
    if leakage:
        note = (
            "The attacker has the released adapter and true training prompts, and asks for the answers. Solid: how close the answers come "
            "to the training records (ROUGE-L, 1 is word for word). Dashed: the same for records the model never saw. Only the gap between the two is memory."
        )
        figure = figures.by_round(
            leakage, axis="Extraction ROUGE-L", least_span=0.1, note="solid: training prompts, dashed: held-out control"
        )
        panels.append(Panel("leakage", "Leakage by round", note, figure))
    utility = _lines(runs, labels, ("eval", "heldout_nll"), kept=("eval", "heldout_nll"))
    if utility:
        note = "Mean loss a token (negative log-likelihood) on held-out records: lower is better. "
        note += "Round 0 is the base model. " if any(line.values[0][0] == 0 for line in utility) else ""
        kept = any(line.kept for line in utility)
        note += "Dotted: the adapters that clients keep for themselves and never send." if kept else ""
        figure = figures.by_round(utility, axis="Held-out NLL", least_span=0.1, note="dotted: kept by the clients" if kept else "")
        panels.append(Panel("utility", "Utility by round", note, figure))
    details = _lines(runs, labels, ("attack", "train_details_rate"), control=("attack", "heldout_details_rate"))
    if details:
        note = "Of the names, dates and values in the attacked records, how many appear in the extracted answers. Dashed: by chance, on held-out records."
        figure = figures.by_round(details, axis="Private details recovered", least_span=0.05, percent=True, note="dashed: held-out control")
        panels.append(Panel("details", "Private details recovered by round", note, figure))
    prefixed = _lines(runs, labels, ("attack", "prefixed_train_rouge_l"), control=("attack", "prefixed_heldout_rouge_l"))
    if prefixed:
        given = sorted({run.config["attack.long_prefix_tokens"] for run in runs if run.config.get("attack.long_prefix_tokens")})
        note = (
            f"The same attack by someone who knows the first {', '.join(map(str, given))} tokens of the true response too, and asks for the rest. "
            "Dashed: on held-out records. Only the gap between the two is memory."
        )
        figure = figures.by_round(
            prefixed, axis="Extraction ROUGE-L of the rest", least_span=0.1, note="solid: training prompts, dashed: held-out control"
        )
        panels.append(Panel("prefixed", "Leakage by round, with a prefix", note, figure))
    return panels


def _lines(
    runs: Sequence[Run],
    labels: Sequence[str],
    key: tuple[str, str],
    *,
    control: tuple[str, str] | None = None,
    kept: tuple[str, str] | None = None,
) -> list[figures.Line]:
    """A line for each run that has values; where there is a base run, every line starts from it at 0 completed rounds."""
    methods = [run.method for run in runs]
    base = next((run.records for run in runs if not spec_of(run.method).trains), [])
    lines = []
    for label, run, colour, marker in zip(labels, runs, figures.colours_of(methods), figures.markers_of(methods), strict=True):
        records = [*base, *run.records] if spec_of(run.method).trains else run.records
        own = _series(run.records, key)
        if not own:
            continue
        private = [record["private"] | {"round_index": record["round_index"]} for record in run.records if record.get("private")]
        lines.append(
            figures.Line(
                label=label,
                colour=colour,
                marker=marker,
                values=_series(records, key),
                control=_series(records, control) if control else [],
                kept=_series(private, kept) if kept else [],
            )
        )
    return lines


def _series(records: Sequence[Mapping[str, Any]], key: tuple[str, str]) -> list[tuple[int, float]]:
    """(rounds completed, value) of the records that have the value."""
    section, name = key
    found = [(record["round_index"] + 1, (record.get(section) or {}).get(name)) for record in records]
    return [(x, float(y)) for x, y in found if y is not None]


def _trade_off_panel(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    methods = [run.method for run in runs]
    points = []
    for label, run, colour, marker in zip(labels, runs, figures.colours_of(methods), figures.markers_of(methods), strict=True):
        values = _measured(run.summary)
        if values["heldout_nll"] is not None and values["leakage"] is not None:
            points.append(figures.Point(label, colour, marker, values["heldout_nll"], values["leakage"], values["control"]))
    if len(points) < 2:
        return []
    note = "Each run at its end. Left is better at the task; the longer the bar between the two marks, the more of the training records comes out."
    return [Panel("tradeoff", "Utility against leakage", note, figures.trade_off(points))]


def _epsilon_panel(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    methods = [run.method for run in runs]
    lines = []
    for label, run, colour, marker in zip(labels, runs, figures.colours_of(methods), figures.markers_of(methods), strict=True):
        values = [
            (r["round_index"] + 1, float(r["epsilon"])) for r in run.records if r.get("epsilon") is not None and math.isfinite(r["epsilon"])
        ]
        if values:
            lines.append(figures.Line(label, colour, marker, [(0, 0.0), *values], [], []))
    if not lines:
        return []
    note = "What the guarantee costs so far: each round is another release, and epsilon grows. Smaller is stronger. Epsilons of different units do not compare."
    return [
        Panel(
            "epsilon", "Epsilon by round", note, figures.by_round(lines, axis="Epsilon spent", least_span=0.1, note="nothing released at 0")
        )
    ]


def _exposure_panels(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    """One picture for each run that had Secret Sharer canaries: a line for each number of copies."""
    panels = []
    for index, (label, run) in enumerate(zip(labels, runs, strict=True)):
        measured = [(r["round_index"] + 1, r["exposure"]) for r in run.records if r.get("exposure")]
        again = not measured
        measured = measured or [(r["round_index"] + 1, r) for r in (run.audit.get("exposure") or {}).get("by_round", [])]
        if not measured:
            continue
        counts = list(measured[0][1]["by_multiplicity"])
        colours = figures.colours_of([f"{count} copies" for count in counts])
        lines = [
            figures.Line(
                f"{count} cop{'y' if count == '1' else 'ies'}",
                colour,
                "o",
                [(x, exposure["by_multiplicity"][count]) for x, exposure in measured],
                [],
                [],
            )
            for count, colour in zip(counts, colours, strict=True)
        ]
        most = measured[0][1]["max"]
        note = (
            f"Invented records with random secrets, put into the shards once or several times: how far up each secret ranks among others, in bits. "
            f"1 is what chance gives on average, {most:.1f} the most that can be seen here."
        )
        note += " From the run made again with canaries for the audit." if again else ""
        figure = figures.by_round(lines, axis="Exposure (bits)", least_span=2.0, note=f"at most {most:.1f}")
        panels.append(Panel(f"exposure-{index}", f"Exposure of canaries, {label}", note, figure))
    return panels


def _partition_panels(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    """One picture for each different split."""
    splits: dict[str, list[tuple[str, Run]]] = {}
    for label, run in zip(labels, runs, strict=True):
        if run.partition.get("clients") and spec_of(run.method).trains:
            splits.setdefault(run.partition["sha256"], []).append((label, run))
    if not splits:
        splits = {run.partition["sha256"]: [(label, run)] for label, run in zip(labels, runs, strict=True) if run.partition.get("clients")}
    panels = []
    for i, (sha256, members) in enumerate(splits.items()):
        run = members[0][1]
        tokens = sum(client["num_tokens"] for client in run.partition["clients"])
        who = "" if len(splits) == 1 else f" of {', '.join(label for label, _ in members)}"
        note = f"Each bar is a client's training records by label; {tokens:,} tokens in all. Uneven colours are what makes federation hard. Split {sha256[:12]}."
        name = "partition" if i == 0 else f"partition-{i + 1}"
        panels.append(Panel(name, f"The partition{who}", note, figures.partition(run.partition["clients"])))
    return panels


def _traffic_panel(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    colours = figures.colours_of([run.method for run in runs])
    rows = []
    for label, run, colour in zip(labels, runs, colours, strict=True):
        up, down = run.summary.get("uplink_bytes") or 0, run.summary.get("downlink_bytes") or 0
        if spec_of(run.method).trains:
            rows.append((label, colour, float(up), float(down)))
    if not any(up or down for _, _, up, down in rows):
        return []
    note = "What all clients together sent to the server (solid) and received from it (pale) over the whole run."
    return [Panel("bytes", "Bytes sent", note, figures.traffic(rows))]


def _candidate_panels(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    panels = []
    for i, (label, run) in enumerate((label, run) for label, run in zip(labels, runs, strict=True) if _fates(run)):
        note = "Clients ask the shared model for new records; filters drop those that break the format, repeat one another, or copy a local record."
        duplicates = [
            record["synthetic"]["duplicate_rate"]
            for record in run.records
            if (record.get("synthetic") or {}).get("duplicate_rate") is not None
        ]
        if duplicates:
            note += f" Candidates that repeat another one, in the last round: {100 * duplicates[-1]:.1f}%."
        name = "candidates" if i == 0 else f"candidates-{i + 1}"
        panels.append(Panel(name, f"Synthetic candidates of {label}", note, figures.candidates(_fates(run))))
    return panels


def _nearness_panels(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    """One picture for each run whose synthetic records were held against the private ones."""
    panels: list[Panel] = []
    for label, run in zip(labels, runs, strict=True):
        by_client: dict[int, list[float]] = {}
        for text in run.synthetic:
            if text["kept"] and text.get("response_rouge_l") is not None:
                by_client.setdefault(text["client_id"], []).append(text["response_rouge_l"])
        if not by_client:
            continue
        rows = [(f"client {client}", values) for client, values in sorted(by_client.items())][:MOST_CLIENTS]
        part = "instruction" if _by_instruction(run.config) else "response"
        note = f"Each mark is a kept synthetic record, at its largest ROUGE-L with one of its client's private {part}s; the tall mark is the median."
        note += " Responses are labels, which everybody has, so instructions are compared." if part == "instruction" else ""
        note += f" The first {len(rows)} of {len(by_client)} clients." if len(rows) < len(by_client) else ""
        name = f"nearness-{len(panels) + 1}" if panels else "nearness"
        figure = figures.nearness(rows, bound=_copy_bound(run.config), part=part)
        panels.append(Panel(name, f"How near synthetic records of {label} come to private ones", note, figure))
    return panels


def _by_instruction(config: Mapping[str, Any]) -> bool:
    """Whether synthetic records were held against private ones by their instructions (see `synthesis.nearest_to_private`)."""
    data = configuration.DataConfig(**{key.removeprefix("data."): value for key, value in config.items() if key.startswith("data.")})
    return spec_of(config["method.name"]).writes and responses_are_labels(data)


def _copy_bound(config: Mapping[str, Any]) -> float | None:
    """The ROUGE-L with a private record above which a synthetic one is dropped; None where there is no such filter.

    FewFedWeight drops none, and private self-generation may not look at private records for that.
    """
    filters = spec_of(config["method.name"]).writes and config["privacy.unit"] != "example"
    return float(config["fedpit.max_rouge_l"]) if filters else None


def _accuracies(runs: Sequence[Run], labels: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(run, questions, cells) of what the runs answer by likelihood: labels of held-out records, and multiple choice."""
    rows = []
    for label, run in zip(labels, runs, strict=True):
        found = run.summary.get("eval") or {}
        if found.get("label_accuracy") is not None:
            cells = [_percent(found["label_accuracy"]), _percent(found["label_macro_f1"]), MISSING]
            rows.append(
                (label, "labels of held-out records", [*cells, f"{_percent(found['label_accuracy_of_commonest'])} (the commonest label)"])
            )
        if found.get("choice_accuracy") is not None:
            cells = [_percent(found["choice_accuracy"]), MISSING, _percent(found["choice_accuracy_per_byte"])]
            asked = f"{found['choice_num_questions']} multiple-choice questions"
            rows.append((label, asked, [*cells, f"{_percent(found['choice_accuracy_by_chance'])} (by chance)"]))
    return rows


def _attacks_made(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """(attack, whose, what it does, what that party sees) of the attacks that one of the runs was put to."""
    made = set()
    for run in runs:
        audit = run.audit
        signs = {
            "extraction": bool(run.summary.get("attack")),
            "extraction across clients": bool(run.summary.get("cross_client")),
            "gradient inversion": bool(audit.get("inversion")),
            "membership inference": bool(audit.get("membership")),
            "canaries": bool(audit.get("one_run") or audit.get("exposure") or any(record.get("exposure") for record in run.records)),
        }
        made |= {attack for attack, sign in signs.items() if sign}
    return [(attack, party, does, "; ".join(SEES[party])) for attack, party, does in ATTACKS if attack in made]


def _fates(run: Run) -> list[tuple[str, dict[str, int]]]:
    """(round, how many candidates were kept and dropped for which reason), from the records or else from the texts."""
    recorded = [(record["round_index"], record["synthetic"]) for record in run.records if record.get("synthetic")]
    if recorded:
        return [(f"round {index + 1}", {"kept": s["num_kept"], **(s.get("num_rejected") or {})}) for index, s in recorded]
    fates: dict[int, dict[str, int]] = {}
    for text in run.synthetic:
        fate = fates.setdefault(text["round_index"], {})
        verdict = "kept" if text["kept"] else str(text["verdict"])
        fate[verdict] = fate.get(verdict, 0) + 1
    return [(f"round {index + 1}", fates[index]) for index in sorted(fates)]


def _sample(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Evenly spaced kept and rejected records, shortened for the page."""
    kept = _spaced([text for text in texts if text["kept"]], SAMPLE_KEPT)
    rejected = _spaced([text for text in texts if not text["kept"]], SAMPLE_REJECTED)
    shown = sorted([*kept, *rejected], key=lambda text: (text["round_index"], text["client_id"], not text["kept"]))
    rows = [{**text, "instruction": _shortened(text["instruction"]), "response": _shortened(text["response"])} for text in shown]
    verdicts = sorted({str(text["verdict"]) for text in shown if not text["kept"]})
    return {"rows": rows, "total": len(texts), "clients": sorted({text["client_id"] for text in shown}), "verdicts": verdicts}


def _spaced(items: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    return list(items) if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS].rstrip() + " …"


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], str]]:
    """(key, value in each run, default) of the settings that differ between runs; of a single run, from the defaults."""
    method = runs[0].config.get("method.name")
    known = method in METHODS  # a single run is compared with its own method's defaults
    defaults = configuration.flatten_keys(
        configuration.to_dict(configuration.load("", [f"method.name={method}"] if known and len(runs) == 1 else []))
    )
    rows = []
    for key in sorted({key for run in runs for key in run.config}):
        if key in UNINTERESTING_KEYS:
            continue
        values = [_setting(run.config.get(key)) for run in runs]
        default = _setting(defaults.get(key))
        if len(set(values)) > 1 or (len(runs) == 1 and values[0] != default):
            rows.append((key, values, default))
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return MISSING if value is None or value == "" else str(value)


def _environments(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, values) of environment.json: one value where all runs agree, else one for each run."""
    flat = [configuration.flatten_keys(run.environment) for run in runs if run.environment]
    rows = []
    for key in dict.fromkeys(key for environment in flat for key in environment):
        rows.append((key, list(dict.fromkeys(_setting(environment.get(key)) for environment in flat))))
    return rows
