"""`raysim audit RUN_DIR`: attacks on a finished run, whose outcome could prove its ledger wrong.

- `membership`: loss, reference-calibrated, zlib and Min-K% scores of the released adapter on training and held-out records.
- `lira`: offline LiRA with shadow adapters trained here on random halves of those records.
- `one-run`: the run once more with canaries of the ledger's own unit, for a lower bound on epsilon (Mahloujifar et al. 2024).
- `canaries`: the run once more with Secret Sharer canaries, for exposure by round.
- `inversion`: what a server reads in one client's update (DAGER), by rank, batch and noise.

Everything is added to RUN_DIR/audit.json and to the page. Runs that are made again lie in RUN_DIR/audit/ and are not repeated.
Left out: choosing what to attack by how it came out; what is asked for is reported.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raysim import storage
from raysim.config import Config, with_overrides
from raysim.console.tables import print_rows
from raysim.federation.assignment import Assignment
from raysim.federation.loop import start
from raysim.federation.setup import prepare
from raysim.lora.release import load_released
from raysim.lora.rule import lora_rule
from raysim.measure.audits import Audited, inversion_rows, lira_attack, membership_attack, verdict
from raysim.model.base_model import load_base_model
from raysim.model.language_model import build_language_model
from raysim.reports.page import write_run_report
from raysim.results import files, inputs
from raysim.results.folders import RunFolder
from raysim.runs.run import open_backend, run

ATTACKS = ("membership", "lira", "one-run", "canaries", "inversion")
DEFAULT_ATTACKS = ("membership", "one-run")
MULTIPLICITIES = [1, 2, 4]
MOST_VECTORS, LEAST_WIDTH = 5000, 3
"""Gradient and update canaries unless told otherwise, and parameters for each of them at least: more show more, and cost next to nothing."""
LEAST_CANARIES = 8
FEW = 100
"""Canaries of which each is a record in a shard, or sends a message of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", help="the folder of a finished run, such as runs/quickstart/dplora")
    parser.add_argument(
        "--attack",
        action="append",
        choices=ATTACKS,
        help="what to run; give it several times for several (default: membership and one-run)",
    )
    parser.add_argument(
        "--canaries",
        type=int,
        default=0,
        help=f"one-run audit: how many, each in the run with probability 1/2 (default {MOST_VECTORS} directions, fewer for a small adapter, or "
        f"{FEW} records or clients with noise of their own)",
    )
    parser.add_argument(
        "--canary",
        choices=("auto", "record", "gradient", "update"),
        default="auto",
        help="one-run audit: what they are (default: the strongest kind of the ledger's unit)",
    )
    parser.add_argument("--shadows", type=int, default=4, help="lira: shadow adapters to train (default 4)")
    parser.add_argument("--confidence", type=float, default=0.95, help="confidence of the lower bound on epsilon (default 0.95)")
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def main(arguments: argparse.Namespace) -> int:
    """Runs the attacks asked for, prints what they found, and writes it beside the run.

    Errors: ValueError for a folder that holds no finished run, or an attack that this run does not admit.
    """
    run_dir = Path(arguments.folder)
    config = finished_config(run_dir)
    inputs.check_inputs(run_dir, config)
    attacks = tuple(dict.fromkeys(arguments.attack or _default_attacks(config)))
    _check(config, run_dir, attacks, arguments)
    with storage.held(run_dir):
        found = _found(config, run_dir, attacks, arguments)
        files.write_json(run_dir / files.AUDIT, found)
        write_run_report(run_dir)
        files.seal(run_dir, files.AUDIT)
    _print(found, attacks)
    return 0


def _found(config: Config, run_dir: Path, attacks: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the attacks found, added to what earlier ones did."""
    found = _audit_of(run_dir)
    display = False if arguments.quiet else None
    curves = dict(found.get("roc") or {})
    again: dict[str, Callable[[], dict[str, Any]]] = {
        "one-run": lambda: one_run(config, run_dir, arguments, display=display),
        "canaries": lambda: {"exposure": exposure(config, run_dir, display=display)},
        "inversion": lambda: {"inversion": inversion(config)},
    }
    for attack in attacks:
        if attack in again:
            found |= again[attack]()
            curves |= found.get("roc") or {}
    direct = [attack for attack in attacks if attack not in again]
    if direct:
        reports, of_records = membership(config, run_dir, direct, arguments, display=display)
        found["membership"] = (found.get("membership") or {}) | reports
        curves |= of_records
    found["roc"] = curves or None
    return found


def finished_config(run_dir: Path) -> Config:
    """The configuration of the finished run in `run_dir`.

    Errors: ValueError if there is none, or its files are not as it left them.
    """
    folder = RunFolder(run_dir)
    if not (folder.has(files.SUMMARY) and folder.is_run):
        raise ValueError(f"{run_dir} holds no finished run (no {files.SUMMARY}); finish it first: raysim run CONFIG out={run_dir}")
    if folder.damage:
        raise ValueError(f"{run_dir}: {folder.damage}; finish it again: raysim run {run_dir / files.CONFIG} out={run_dir}")
    return dataclasses.replace(folder.config, out=str(run_dir), compare={})


# --- attacks that make the run once more ---


def one_run(config: Config, run_dir: Path, arguments: argparse.Namespace, *, display: bool | None) -> dict[str, Any]:
    """The `one_run` and `roc` entries of audit.json: the run's own if it had canaries, else of the run made again with them."""
    own = RunFolder(run_dir).audit
    if own.one_run and config.audit.num_canaries:
        return {"one_run": dict(own.one_run), "roc": own.roc}
    again = _with_canaries(config, run_dir, arguments)
    _say(f"one-run audit: the run once more with {again.audit.num_canaries} {again.audit.canary} canaries", display=display)
    found = RunFolder(run(again, display=display).out).audit
    assert found.one_run is not None, "a run with canaries audits itself"
    return {"one_run": dict(found.one_run), "roc": found.roc}


def _with_canaries(config: Config, run_dir: Path, arguments: argparse.Namespace) -> Config:
    """The run once more with canaries of the one-run audit."""
    kind = _strongest_canary(config) if arguments.canary == "auto" else arguments.canary
    number = arguments.canaries or _enough_canaries(config, run_dir, kind)
    changes = {"audit.num_canaries": number, "audit.canary": kind, "audit.confidence": arguments.confidence}
    return _again(config, run_dir / files.AGAIN / f"one-run-{kind}-{number}-{arguments.confidence:g}", changes)


def _enough_canaries(config: Config, run_dir: Path, kind: str) -> int:
    """How many canaries are taken where nobody says."""
    if kind == "record" or (kind == "update" and config.privacy.noise_at == "client"):
        return FEW
    num_parameters = RunFolder(run_dir).summary.num_parameters
    assert num_parameters is not None, "a finished run says how large its adapter is"
    return min(MOST_VECTORS, max(LEAST_CANARIES, num_parameters // LEAST_WIDTH))


def exposure(config: Config, run_dir: Path, *, display: bool | None) -> dict[str, Any]:
    """The `exposure` entry of audit.json: by round, of the run's own canaries or of the run made again with some."""
    if config.audit.multiplicities:
        audited = run_dir
    else:
        changes: dict[str, Any] = {"audit.multiplicities": MULTIPLICITIES, "audit.num_canaries": 0, "attack.every": 1}
        _say(f"canaries: the run once more with secrets inserted {', '.join(map(str, MULTIPLICITIES))} times", display=display)
        audited = run(_again(config, run_dir / files.AGAIN / "canaries", changes), display=display).out
    records = RunFolder(audited).jsonl(files.ROUNDS)
    return {"by_round": [{"round_index": record["round_index"], **record["exposure"]} for record in records if record.get("exposure")]}


def _again(config: Config, folder: Path, changes: dict[str, Any]) -> Config:
    """The same run with canaries, measured no more than the audit needs."""
    cheap: dict[str, Any] = {"evaluate.every": 0, "evaluate.num_generated": 1, "audit.membership": False}
    cheap |= {"attack.every": 0, "attack.num_examples": 1, "attack.prefix_tokens": 0, "attack.long_prefix_tokens": 0}
    return with_overrides(config, cheap | changes | {"out": str(folder), "name": f"{config.name}-audit"})


def _strongest_canary(config: Config) -> str:
    """The kind that tells most while it belongs to the unit that the ledger names, and leaves the mechanism as it was where it can."""
    if config.privacy.unit == "client":
        return "update"
    return "gradient" if config.method.spec.steps_privately and config.dplora.mode == "example" else "record"


# --- attacks on the release ---


def membership(
    config: Config, run_dir: Path, attacks: Sequence[str], arguments: argparse.Namespace, *, display: bool | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `membership` entry of audit.json, one report a score, and what it adds to `roc`."""
    with _audited(config, run_dir, display=display) as audited:
        ledger = RunFolder(run_dir).json(files.LEDGER)
        reports, curves = membership_attack(audited, ledger=ledger) if "membership" in attacks else ({}, {})
        if "lira" in attacks:
            reports["lira"] = lira_attack(audited, num_shadows=arguments.shadows)
    return reports, curves


@contextlib.contextmanager
def _audited(config: Config, run_dir: Path, *, display: bool | None) -> Iterator[Audited]:
    with open_backend(config, display=display) as backend:
        lm = backend.worker.language_model(config.lora)
        experiment = prepare(config, lm)
        clients = backend.clients(Assignment(config, experiment.mechanism, experiment.weights), experiment)
        yield Audited(
            config,
            members=experiment.real_examples,
            nonmembers=experiment.heldout,
            first=lora_rule(config.lora.aggregation).release(start(config, experiment, layout=lm.layout).tensors),
            last=load_released(run_dir / files.ADAPTER, lm.layout, seed=config.seed),
            evaluate=lambda work: clients.evaluate(work, lambda: None),
        )


def inversion(config: Config) -> list[dict[str, Any]]:
    """The `inversion` entry of audit.json, on the run's own records and model."""
    base = load_base_model(config.model.name, dtype="float32", cache_dir=config.model.cache_dir)
    lora = config.lora
    lm = build_language_model(base, rank=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=list(lora.target_modules))
    return inversion_rows(config, prepare(config, lm).real_examples)


def _default_attacks(config: Config) -> tuple[str, ...]:
    """What is done unless something is asked for; no canary can be in a secure sum."""
    return ("membership",) if _is_masked(config) else DEFAULT_ATTACKS


def _is_masked(config: Config) -> bool:
    return config.privacy.unit == "client" and config.privacy.noise_at == "distributed"


def _check(config: Config, run_dir: Path, attacks: Sequence[str], arguments: argparse.Namespace) -> None:
    if config.lora.spec.personal and set(attacks) != {"inversion"}:
        raise ValueError(
            f"lora.aggregation={config.lora.aggregation!r} leaves a part of every adapter with its client, so that there is none of all to attack; "
            "only --attack inversion means something"
        )
    if not config.method.spec.trains_together and set(attacks) != {"inversion"}:
        raise ValueError(
            f"method.name={config.method.name!r} releases nothing that was trained together; audit another run, or --attack inversion"
        )
    for option, value, least in (("canaries", arguments.canaries or LEAST_CANARIES, LEAST_CANARIES), ("shadows", arguments.shadows, 2)):
        if value < least:
            raise ValueError(f"--{option}={value} must be at least {least}")
    if not 0.5 <= arguments.confidence < 1:
        raise ValueError(f"--confidence={arguments.confidence:g} must be at least 0.5 and less than 1")
    if "one-run" in attacks and _is_masked(config):
        raise ValueError(
            "--attack one-run: privacy.noise_at='distributed' lets the server see a sum only, which no canary update can join; "
            "audit the same run with privacy.noise_at=server"
        )
    if "one-run" in attacks and not config.audit.num_canaries:
        _with_canaries(config, run_dir, arguments)


def _say(line: str, *, display: bool | None) -> None:
    if display is not False:
        print(line, flush=True)


def _audit_of(run_dir: Path) -> dict[str, Any]:
    """audit.json, to which what is found is added."""
    folder = RunFolder(run_dir)
    return folder.json(files.AUDIT) if folder.has(files.AUDIT) else {}


# --- what is printed ---


def _print(found: dict[str, Any], attacks: Sequence[str]) -> None:
    if found.get("membership") and {"membership", "lira"} & set(attacks):
        rows = [
            [name.replace("_", " "), *(_interval(report, key) for key in ("auc", "tpr_at_0.1pct", "tpr_at_1pct"))]
            for name, report in found["membership"].items()
        ]
        print_rows("membership of training records", ["score", "AUC", "TPR at 0.1% FPR", "TPR at 1% FPR"], rows)
    if "canaries" in attacks:
        _print_exposure(found["exposure"]["by_round"])
    if "inversion" in attacks:
        rows = [_inversion_cells(row) for row in found["inversion"]]
        print_rows("inversion of one client's update (DAGER)", [heading for heading, _ in INVERSION_COLUMNS.values()], rows)
    if found.get("one_run"):
        print(verdict(found["one_run"]), flush=True)


def _print_exposure(by_round: Sequence[dict[str, Any]]) -> None:
    if not by_round:
        return
    counts = list(by_round[0]["by_multiplicity"])
    rows = [[str(line["round_index"] + 1), *(f"{line['by_multiplicity'][count]:.2f}" for count in counts)] for line in by_round]
    headings = ["after round", *("once" if count == "1" else f"{count} times" for count in counts)]
    print_rows(f"exposure of canaries in bits (at most {by_round[0]['max']:.2f})", headings, rows)


INVERSION_COLUMNS: dict[str, tuple[str, str]] = {
    "rank": ("rank", "d"),
    "batch": ("batch", "d"),
    "noise": ("noise", "g"),
    "distinct_tokens": ("distinct tokens", "d"),
    "span_dim": ("span", "d"),
    "token_recall": ("token recall", ".2f"),
    "token_precision": ("precision", ".2f"),
    "rouge_l": ("ROUGE-L", ".3f"),
}
"""Column of the sweep -> its heading and the format of its figures."""


def _inversion_cells(row: dict[str, Any]) -> list[str]:
    return [format(row[key], form) for key, (_, form) in INVERSION_COLUMNS.items()]


def _interval(report: dict[str, Any], key: str) -> str:
    low, high = report[f"{key}_interval"]
    return f"{report[key]:.3f} ({low:.3f} to {high:.3f})"
