"""`raysim verify RUN_DIR`: whether a run's folder says the same thing throughout, and whether its epsilon is right.

Every file has the hash that `sha256.json` states. What can be derived is derived again: epsilon by dp-accounting from the ledger's own
numbers, the ledger and its sentence from the configuration, the summary from the rounds, rounds and answers from the checkpoint, the model
card and PEFT's settings from all of these, and the cohorts that were drawn are held against the sampler that was accounted for.
Left out: training again. Who doubts the numbers of a round can run `config.yaml` again: the same seed gives the same hash.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from scipy.stats import binom, chi2

from raysim.config import Config
from raysim.data.configured import configured_shards
from raysim.data.partition import partition_manifest
from raysim.data.sources import read_source, split_records
from raysim.errors import shown
from raysim.federation.checkpoint import load_checkpoint
from raysim.lora.layout import ORDER, Vector, adapter_sha256
from raysim.privacy.accounting import Release, quiet_about_skipped_orders
from raysim.privacy.ledger import ledger_of
from raysim.results import files
from raysim.results.folders import RunFolder, runs_below
from raysim.results.inputs import changed_inputs, input_files

LEAST_P = 1e-4
"""Below this p-value, cohorts do not look like the sampler that was accounted for."""
LEAST_EXPECTED = 5.0
"""A chi-square test needs this many expected in each of its cells."""
MANY_CLIENTS = 30
"""From so many clients on, participation that is more even than chance is a finding too."""
CLOSE = 0.01
"""By how much, as a share, epsilon computed again may differ."""
LARGEST_PLD = 1e6
"""Above this an epsilon is compared by RDP alone: the grid of losses would not fit into memory."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
"""A number in a sentence."""


class Violation(Exception):
    """What a check found to be wrong."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    """What was found, or why it could not be looked at."""


def verify(run_dir: Path) -> list[Check]:
    """Everything that was looked at in the folder of a run, in the order of `CHECKS`.

    Errors: ValueError if the folder is no run's.
    """
    run = RunFolder(run_dir)
    if not run.is_run:
        runs = [folder.name for folder in runs_below(run_dir)]
        remedy = f"; it holds runs: {', '.join(runs[:6])}" if runs else ""
        raise ValueError(f"{str(run_dir)!r} is not the folder of a run (no {files.CONFIG}){remedy}")
    return [look(name, run) for name in CHECKS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `raysim verify`."""
    parser.add_argument("folder", help="the folder of a run, such as runs/quickstart/fedpit")


def main(arguments: argparse.Namespace) -> int:
    """Prints a line for each check and returns the exit status: 0 if all hold, 1 otherwise.

    Errors: ValueError if the folder is no run's.
    """
    checks = verify(Path(arguments.folder))
    console = Console(file=sys.stdout, force_jupyter=False, highlight=False)
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = Text("ok    ", style="green") if check.ok else Text("FAILED", style="bold red")
        console.print(mark, Text(check.name.ljust(width)), Text(check.detail), soft_wrap=True)
    failed = sum(not check.ok for check in checks)
    console.print(f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks hold", soft_wrap=True)
    return 1 if failed else 0


def look(name: str, run: RunFolder) -> Check:
    """The outcome of one of `CHECKS`; a file that cannot be read, or says something of the wrong kind, fails what needs it."""
    try:
        return Check(name, True, CHECKS[name](run))
    except Violation as violation:
        return Check(name, False, str(violation))
    except FileNotFoundError as error:
        place = error.filename or str(error).rpartition(" ")[2]  # safetensors says it in its message alone
        return Check(name, False, f"{Path(place).name} is missing")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return Check(name, False, f"cannot be looked at ({type(error).__name__}: {first})")


# --- files and hashes


def check_files(run: RunFolder) -> str:
    """Every file of the contract is there."""
    if not run.has(files.SUMMARY):
        raise Violation(f"{files.SUMMARY} is missing: the run is not finished; the same command continues it")
    names = [files.ENVIRONMENT, files.PARTITION, files.ROUNDS, files.LEDGER, files.REPORT, f"{files.ADAPTER}/{files.CARD}"]
    names += [f"{folder}/{name}" for folder in _adapter_folders(run) for name in ("adapter_config.json", files.TENSORS)]
    names += [files.SYNTHETIC] if any(record.synthetic for record in run.records) else []
    patterns = [f"{files.FIGURES}/*.png", *([f"{files.STATE}/round-*"] if run.rounds else [])]
    missing = [name for name in names if not run.has(name)] + [pattern for pattern in patterns if not any(run.path.glob(pattern))]
    if missing:
        raise Violation(f"missing: {', '.join(missing)}")
    return f"{len(names) + 2} files, with figures{' and state' if run.rounds else ''}"


def check_hashes(run: RunFolder) -> str:
    """Every file is what it was when the run ended, and no file of a run has come to it."""
    if run.damage:
        raise Violation(run.damage)
    return f"{len(run.json(files.HASHES))} files as {files.HASHES} says"


def check_adapter(run: RunFolder) -> str:
    """The released tensors have the hash that the summary and the model card state."""
    summary = run.summary
    vectors = [_released(run, folder) for folder in _adapter_folders(run)]
    digest = adapter_sha256(vectors)
    if digest != summary.adapter_sha256:
        raise Violation(f"adapter/ has {digest[:12]}..., {files.SUMMARY} says {str(summary.adapter_sha256)[:12]}...")
    card = files.model_card(run.config, summary=run.json(files.SUMMARY), digest=digest, version=run.environment.raysim)
    if run.text(f"{files.ADAPTER}/{files.CARD}") != card:
        raise Violation(f"adapter/{files.CARD} says something else than {files.SUMMARY} and {files.CONFIG}")
    for folder in _adapter_folders(run):
        stated, expected = run.json(f"{folder}/adapter_config.json"), files.adapter_config(run.config)
        if not run.config.lora.spec.releases_its_state:  # whose rank the LoRA rule makes, and the tensors have
            expected |= {key: stated.get(key) for key in ("r", "lora_alpha")}
        if stated != expected:
            raise Violation(f"{folder}/adapter_config.json says something else than {files.CONFIG}")
    for vector in vectors:
        if len(vector) != summary.num_parameters:
            raise Violation(f"adapter/ holds {len(vector)} parameters, {files.SUMMARY} says {summary.num_parameters}")
    return f"{digest[:12]}..., {len(vectors)} adapter{'s' if len(vectors) > 1 else ''} of {summary.num_parameters:,} parameters"


def check_partition(run: RunFolder) -> str:
    """The split hashes to what partition.json says when the records are dealt again."""
    stated, config = run.partition, run.config
    digest = f"{stated.sha256[:12]}..."
    if not re.fullmatch(r"[0-9a-f]{64}", stated.sha256) or stated.num_clients != len(stated.clients):
        raise Violation(f"{files.PARTITION} is not whole: no SHA-256, or another number of clients than it lists")
    if config.data.source == "hub":
        return f"{digest} as recorded (data from the Hub are not fetched again)"
    try:
        found = _dealt_again(config)
    except ValueError as error:
        return f"{digest} as recorded (the data cannot be read again: {error})"
    if found is None:
        return f"{digest} as recorded (its labels are clusters, which only the model gives again)"
    if found["sha256"] != stated.sha256:
        raise Violation(f"the records dealt again hash to {found['sha256'][:12]}..., {files.PARTITION} says {digest}")
    for again, client in zip(found["clients"], map(asdict, stated.clients), strict=True):
        for key in ("client_id", "num_examples", "label_counts"):
            if again[key] != client[key]:
                raise Violation(
                    f"client {again['client_id']}: {key} is {again[key]} when dealt again, {files.PARTITION} says {client[key]}"
                )
    return f"{digest}, the records dealt again"


def check_inputs(run: RunFolder) -> str:
    """The files that the run read (data, public records, questions, model) are those that lie there now."""
    recorded = [key for key in run.environment.inputs if key not in ("records", "partition")]
    now = input_files(run.config)
    for line in changed_inputs(run.path, now):
        raise Violation(line)
    gone = [key for key in recorded if key not in now]
    if gone:
        return f"as recorded, but for {', '.join(gone)}, whose files are not here"
    return f"{', '.join(recorded)} as recorded" if recorded else "none recorded (built-in data and model)"


def check_checkpoints(run: RunFolder) -> str:
    """Every checkpoint's files have the hashes of its manifest."""
    folders = sorted((run.path / files.STATE).glob("round-*"))
    for folder in folders:
        try:
            load_checkpoint(folder)
        except ValueError as error:
            raise Violation(f"{files.STATE}/{folder.name}: {error}") from None
    if run.rounds and not folders:
        raise Violation("state/ holds no checkpoint")
    return f"{len(folders)} checkpoints" if folders else "none: nothing was trained"


def check_records(run: RunFolder) -> str:
    """rounds.jsonl is complete, and is what the newest checkpoint holds."""
    found = [record.round_index for record in run.rounds]
    if found != list(range(len(found))):
        raise Violation(f"{files.ROUNDS} holds the rounds {found[:8]}, not 0 to {len(found) - 1}")
    for name, num_rounds in {files.SUMMARY: run.summary.num_rounds, files.LEDGER: run.ledger.num_rounds}.items():
        if num_rounds != len(found):
            raise Violation(f"{files.ROUNDS} holds {len(found)} rounds, {name} says {num_rounds}")
    if not found:
        return "no rounds: the base model as it was"
    if run.snapshot is None:
        raise Violation("state/ holds no whole checkpoint to compare with")
    if run.snapshot.num_rounds != len(found):
        raise Violation(f"{files.ROUNDS} holds {len(found)} rounds, the newest whole checkpoint {run.snapshot.num_rounds}")
    for record, saved in zip(run.jsonl(files.ROUNDS), run.snapshot.records, strict=True):
        different = [key for key in saved | record if record.get(key) != saved.get(key)]
        if different:
            raise Violation(f"round {record['round_index']}: {different[0]} differs from the checkpoint")
    for name, rows in {files.ANSWERS: run.snapshot.answers, files.SYNTHETIC: run.snapshot.synthetic}.items():
        if (run.jsonl(name) if run.has(name) else []) != rows:
            raise Violation(f"{name} is not what the newest checkpoint holds")
    return f"{len(found)} rounds, as in the newest checkpoint"


def check_summary(run: RunFolder) -> str:
    """summary.json is what the rounds and the ledger come to."""
    stated, ledger = run.json(files.SUMMARY), run.json(files.LEDGER)
    expected = files.summarise(run.config, records=run.jsonl(files.ROUNDS), ledger=ledger, num_rounds=len(run.rounds))
    expected |= {"num_parameters": stated.get("num_parameters")}  # held against the adapter
    for key, value in _as_json(expected).items():
        if key not in stated or not _alike(stated[key], value, tolerance=1e-9):
            raise Violation(f"{files.SUMMARY} says {key}={shown(stated.get(key))}, the rounds and the ledger {shown(value)}")
    return f"{len(expected)} values from the rounds and the ledger"


def _adapter_folders(run: RunFolder) -> list[str]:
    """Folders of the released adapters: one, or one for each client where nothing is shared."""
    if not (run.config.method.spec.separates or run.config.lora.spec.personal):
        return ["adapter"]
    return [f"adapter/{path.name}" for path in sorted((run.path / "adapter").glob("client-*"))] or ["adapter/client-000"]


def _released(run: RunFolder, folder: str) -> Vector:
    """A released adapter as one vector. A file of tensors has no order of its own: that of the checkpoint's vector is taken."""
    tensors = load_file(run.path / folder / files.TENSORS)
    with safe_open(run.path / folder / files.TENSORS, framework="np") as file:
        noted = (file.metadata() or {}).get(ORDER)
    if noted is not None:  # by a rule whose release is not what the server keeps
        return np.concatenate([tensors[name].reshape(-1) for name in json.loads(noted)])
    reference = None
    if run.snapshot is not None:
        name = folder.removeprefix("adapter/client-")
        reference = run.snapshot.adapter if name == folder else run.snapshot.client_arrays[int(name)]["adapter"]
    if reference is None:
        return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors, key=_natural)])
    left, parts, start = dict(tensors), list[Vector](), 0
    for _ in tensors:
        fits = [name for name, tensor in left.items() if tensor.tobytes() == reference[start : start + tensor.size].tobytes()]
        if not fits:
            raise Violation(f"{folder}/ is not what the newest checkpoint holds (from parameter {start} on)")
        part = left.pop(max(fits, key=lambda name: left[name].size)).reshape(-1)
        parts.append(part)
        start += part.size
    return np.concatenate(parts)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _dealt_again(config: Config) -> dict[str, Any] | None:
    """The manifest of the configuration's split, from the records; None where labels would have to come from a model."""
    data, records = config.data, list(read_source(config.data).records)
    train, _ = split_records(records, num_train=data.num_train, num_heldout=data.num_heldout, seed=config.seed)
    labels = [record.label for record in train]
    if config.partition.scheme in ("dirichlet", "natural") and not all(labels):
        return None
    return partition_manifest(configured_shards(labels, config), records=train, num_tokens=[0] * len(train))


# --- epsilon


def check_epsilon(run: RunFolder) -> str:
    """dp-accounting gives the ledger's epsilon for the ledger's own numbers."""
    ledger = run.ledger
    claimed = {"epsilon": ledger.epsilon, "epsilon_rdp": ledger.epsilon_rdp}
    if ledger.unit == "none":
        if any(value is not None for value in claimed.values()) or ledger.accounted_multiplier != 0 or ledger.releases:
            raise Violation("the ledger protects no unit and yet states an epsilon, noise or releases")
        return "none is claimed"
    if ledger.delta is None:
        raise Violation("the ledger protects a unit and states no delta")
    pld, rdp = recomputed_epsilon(ledger.releases, delta=ledger.delta)
    found = {"epsilon": rdp if pld is None else pld, "epsilon_rdp": rdp}
    for key, value in claimed.items():
        if value is None and math.isinf(found[key]):
            continue
        if value is None or not math.isclose(value, found[key], rel_tol=CLOSE):
            raise Violation(f"dp-accounting gives {key} {found[key]:.4g} for the ledger's numbers, which say {value}")
    if ledger.epsilon is None:
        return "none is claimed, and the noise gives none"
    return f"{ledger.epsilon:.4g} at delta {ledger.delta:.3g}; dp-accounting gives {found['epsilon']:.4g} (RDP {rdp:.4g})"


def recomputed_epsilon(releases: Sequence[Release], *, delta: float) -> tuple[float | None, float]:
    """Epsilon by PLD (None where dp-accounting has no such event) and by RDP, for what a ledger says was released.

    Written out against dp-accounting alone, so that it shares no figure with what wrote the ledger.
    """
    if any(release.noise_multiplier == 0 and release.count for release in releases):
        return math.inf, math.inf
    fixed = any(release.sampler == "fixed" for release in releases)
    events = [(_event(release, replace_one=fixed), release.count) for release in releases]
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE if fixed else dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    by_rdp = RdpAccountant(neighboring_relation=relation)
    with quiet_about_skipped_orders():
        for event, count in events:
            by_rdp.compose(event, count)
    rdp = float(by_rdp.get_epsilon(delta))
    if fixed or rdp > LARGEST_PLD:
        return (None if fixed else rdp), rdp
    by_pld = PLDAccountant(value_discretization_interval=max(1e-4, 1e-5 * rdp))
    for event, count in events:
        by_pld.compose(event, count)
    return float(by_pld.get_epsilon(delta)), rdp


def _event(release: Release, *, replace_one: bool) -> dp_accounting.DpEvent:
    """A release as an event; replacing a unit moves a sum by twice what one unit adds, so it halves the noise multiplier."""
    gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier / (2.0 if replace_one else 1.0))
    if release.sampler == "poisson" and release.sampling_prob < 1.0:
        return dp_accounting.PoissonSampledDpEvent(release.sampling_prob, gaussian)
    if release.sampler == "fixed":
        return dp_accounting.SampledWithoutReplacementDpEvent(release.population, release.sample_size, gaussian)
    return gaussian


def check_epsilon_by_round(run: RunFolder) -> str:
    """Epsilon never falls from round to round, and ends where the ledger and the summary say."""
    spent, end, summary = [record.epsilon for record in run.records], run.ledger.epsilon, run.summary.epsilon
    if summary != end:
        raise Violation(f"{files.SUMMARY} says {summary}, {files.LEDGER} {end}")
    if end is None:
        if any(value is not None for value in spent):
            raise Violation("a round states an epsilon, the ledger none")
        return "none in any round"
    before = 0.0
    for i, after in enumerate(spent):
        if after is None or after < before:
            raise Violation(f"round {i}: epsilon is {after} after {before:.4g}")
        before = after
    if not math.isclose(before, end, rel_tol=1e-6):
        raise Violation(f"the last round says {before:.4g}, the ledger {end:.4g}")
    return f"rises from {spent[0]:.4g} to {before:.4g}"


# --- the ledger against the configuration and the rounds


def check_releases(run: RunFolder) -> str:
    """As many releases are accounted for as the rounds made."""
    ledger, num_rounds = run.ledger, len(run.rounds)
    expected = run.mechanism.num_releases(num_rounds)
    if ledger.num_releases != expected:
        raise Violation(f"{num_rounds} rounds make {expected} releases, the ledger accounts for {ledger.num_releases}")
    listed = sum(release.count for release in ledger.releases)
    if ledger.unit != "none" and run.mechanism.sampler != "cyclic" and listed != expected:  # in a fixed order, all turns are one release
        raise Violation(f"{num_rounds} rounds make {expected} releases, the ledger lists {listed}")
    if run.config.method.spec.steps_privately:
        for record in run.rounds:
            if record.num_steps * num_rounds > len(record.cohort) * expected:
                raise Violation(f"round {record.round_index}: {record.num_steps} private steps, more than its clients were accounted for")
    return f"{expected} in {num_rounds} rounds"


def check_configured(run: RunFolder) -> str:
    """Noise, bound, delta, sampling and the rest stand in the ledger as the configuration has them."""
    stated, expected = run.json(files.LEDGER), _as_json(ledger_of(run.mechanism, len(run.rounds)))
    tolerance = 2e-3 if run.config.privacy.target_epsilon else 1e-9  # a solved multiplier may differ between versions of dp-accounting
    for key in expected | stated:
        if key not in stated or key not in expected or not _alike(stated[key], expected[key], tolerance=tolerance):
            raise Violation(f"{key} is {shown(stated.get(key))} in the ledger and {shown(expected.get(key))} by {files.CONFIG}")
    epsilon, privacy = run.ledger.epsilon, run.config.privacy
    for key, limit in {"target_epsilon": privacy.target_epsilon, "max_epsilon": privacy.max_epsilon}.items():
        if limit and not run.ledger.unit == "none" and (epsilon is None or epsilon > limit):
            raise Violation(f"epsilon {epsilon} is more than privacy.{key}={limit:g}")
    if run.ledger.unit == "none":
        return "no mechanism"
    clip = run.ledger.clip_norm
    return f"noise multiplier {run.ledger.noise_multiplier:.4g}, clip norm {'none' if clip is None else format(clip, 'g')}, {run.ledger.sampler}"


def check_noise(run: RunFolder) -> str:
    """Each round states the noise on its average that the ledger's multiplier and bound give."""
    ledger = run.ledger
    plain = ledger.unit == "client" and ledger.noise_at == "server" and run.mechanism.clipping == "flat"
    if not plain or run.mechanism.sampler == "cyclic" or ledger.simulated:
        if ledger.unit == "none" and any(record.noise_std for record in run.records):
            raise Violation("a round states noise, the ledger none")
        return "not at the server, or not the same in every round"
    expected = ledger.noise_multiplier * (ledger.clip_norm or 0.0) / ledger.expected_cohort
    for record in run.rounds:
        if not math.isclose(record.noise_std, expected, rel_tol=1e-6):
            raise Violation(f"round {record.round_index}: noise_std is {record.noise_std:.4g}, the ledger gives {expected:.4g}")
    return f"standard deviation {expected:.4g} on every average"


def _alike(found: Any, expected: Any, *, tolerance: float) -> bool:
    """Whether two JSON values are equal, numbers to a relative `tolerance`, in sentences too."""
    if isinstance(expected, Mapping):
        return (
            isinstance(found, Mapping)
            and set(found) == set(expected)
            and all(_alike(found[key], expected[key], tolerance=tolerance) for key in expected)
        )
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        return (
            isinstance(found, Sequence)
            and len(found) == len(expected)
            and all(_alike(a, b, tolerance=tolerance) for a, b in zip(found, expected, strict=True))
        )
    if isinstance(expected, bool) or isinstance(found, bool):
        return found is expected
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=tolerance)
    if isinstance(expected, str) and isinstance(found, str):
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (found, expected)]
        return NUMBER.sub("", found) == NUMBER.sub("", expected) and _alike(*numbers, tolerance=tolerance)
    return bool(found == expected)


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """The object as a file would give it back."""
    found: dict[str, Any] = json.loads(json.dumps(value))
    return found


# --- cohorts


def check_drawn(run: RunFolder) -> str:
    """The cohorts are those that the seed draws."""
    for record in run.rounds:
        expected = tuple(run.mechanism.sample_cohort(record.round_index))
        if record.cohort != expected:
            raise Violation(f"round {record.round_index}: cohort {_short(record.cohort)}, the seed draws {_short(expected)}")
    return f"{len(run.rounds)} drawn again from seed {run.config.seed}"


def check_sampler(run: RunFolder) -> str:
    """The cohorts look like the sampler that was accounted for, whatever the seed."""
    num_clients, cohorts = len(run.shard_sizes), [record.cohort for record in run.rounds]
    size = run.config.server.cohort_size if num_clients > 1 else 0
    size = size or num_clients
    if not cohorts:
        return "no rounds"
    for i, cohort in enumerate(cohorts):
        if sorted(set(cohort)) != list(cohort) or (cohort and not 0 <= cohort[0] <= cohort[-1] < num_clients):
            raise Violation(f"round {i}: {_short(cohort)} is no ascending list of different clients below {num_clients}")
    if run.ledger.sampler == "poisson over clients":
        return poisson_detail(cohorts, num_clients=num_clients, prob=size / num_clients)
    odd = [i for i, cohort in enumerate(cohorts) if len(cohort) != size]
    if odd:
        raise Violation(f"round {odd[0]}: {len(cohorts[odd[0]])} clients instead of {size}")
    if size == num_clients:
        return f"every client in each of {len(cohorts)} rounds"
    if run.ledger.sampler == "fixed order of clients":
        return _fixed_order_detail(cohorts, num_cohorts=num_clients // size)
    return fixed_size_detail(cohorts, num_clients=num_clients, size=size)


def poisson_detail(cohorts: Sequence[Sequence[int]], *, num_clients: int, prob: float) -> str:
    """What tests of Poisson cohorts say: their sizes against Binomial(n, q), and how often each client took part.

    Errors: Violation where a p-value is below `LEAST_P`.
    """
    sizes = sizes_p_value([len(cohort) for cohort in cohorts], num_clients=num_clients, prob=prob)
    counts = participation_p_value(cohorts, num_clients=num_clients, prob=prob, fixed=False)
    return _judged(
        {"cohort sizes": sizes, "participation": counts}, num_rounds=len(cohorts), sampler=f"Poisson with probability {prob:.3g}"
    )


def fixed_size_detail(cohorts: Sequence[Sequence[int]], *, num_clients: int, size: int) -> str:
    """What a test of cohorts of one size says: how often each client took part.

    Errors: Violation where its p-value is below `LEAST_P`.
    """
    counts = participation_p_value(cohorts, num_clients=num_clients, prob=size / num_clients, fixed=True)
    return _judged({"participation": counts}, num_rounds=len(cohorts), sampler=f"{size} of {num_clients} without replacement")


def sizes_p_value(sizes: Sequence[int], *, num_clients: int, prob: float) -> float | None:
    """Pearson's chi-square test of cohort sizes against Binomial(`num_clients`, `prob`); None where there are too few rounds for it."""
    num_cells = min(10, int(len(sizes) / LEAST_EXPECTED))
    if num_cells < 2:
        return None
    edges = np.unique(binom.ppf(np.arange(1, num_cells) / num_cells, num_clients, prob))
    expected = len(sizes) * np.diff(np.concatenate([[0.0], binom.cdf(edges, num_clients, prob), [1.0]]))
    observed = np.bincount(np.searchsorted(edges, sizes, side="left"), minlength=len(expected)).astype(float)
    cells = _pooled(expected.tolist(), observed.tolist())
    if len(cells) < 2:
        return None
    statistic = sum((seen - mean) ** 2 / mean for mean, seen in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def participation_p_value(cohorts: Sequence[Sequence[int]], *, num_clients: int, prob: float, fixed: bool) -> float | None:
    """Chi-square test of how often each client took part, if each is in a cohort with `prob`; None where there are too few rounds.

    With many clients it is two-sided, so that taking turns does not pass for chance.
    """
    num_rounds = len(cohorts)
    if num_clients < 2 or num_rounds * min(prob, 1.0 - prob) < LEAST_EXPECTED:
        return None
    counts = np.bincount(np.concatenate([np.asarray(cohort, dtype=int) for cohort in cohorts]), minlength=num_clients)
    statistic = float(np.sum((counts - num_rounds * prob) ** 2) / (num_rounds * prob * (1.0 - prob)))
    degrees = num_clients
    if fixed:  # the counts sum to a constant
        statistic, degrees = statistic * (num_clients - 1) / num_clients, num_clients - 1
    upper = float(chi2.sf(statistic, degrees))
    return upper if num_clients < MANY_CLIENTS else min(1.0, 2.0 * min(upper, float(chi2.cdf(statistic, degrees))))


def _pooled(expected: Sequence[float], observed: Sequence[float]) -> list[tuple[float, float]]:
    """Neighbouring cells (expected, observed) added up until each expects `LEAST_EXPECTED`."""
    cells = [(0.0, 0.0)]
    for mean, seen in zip(expected, observed, strict=True):
        cells[-1] = (cells[-1][0] + mean, cells[-1][1] + seen)
        if cells[-1][0] >= LEAST_EXPECTED:
            cells.append((0.0, 0.0))
    rest = cells.pop()
    if cells:
        cells[-1] = (cells[-1][0] + rest[0], cells[-1][1] + rest[1])
    return cells


def _judged(tests: Mapping[str, float | None], *, num_rounds: int, sampler: str) -> str:
    for name, p_value in tests.items():
        if p_value is not None and p_value < LEAST_P:
            raise Violation(f"{name} of {num_rounds} rounds does not look like {sampler} (chi-square, p = {p_value:.1g})")
    said = [
        f"{name} p = {p_value:.2g}" if p_value is not None else f"{num_rounds} rounds are too few to test {name}"
        for name, p_value in tests.items()
    ]
    return f"{sampler}: {', '.join(said)}"


def _fixed_order_detail(cohorts: Sequence[Sequence[int]], *, num_cohorts: int) -> str:
    for i, cohort in enumerate(cohorts):
        seen = {client_id for earlier in cohorts[max(0, i - num_cohorts + 1) : i] for client_id in earlier}
        if seen & set(cohort):
            raise Violation(f"round {i}: client {min(seen & set(cohort))} takes part again within {num_cohorts} rounds")
    return f"in turn, each client once in {num_cohorts} rounds"


def _short(cohort: Sequence[int]) -> str:
    return f"[{', '.join(map(str, cohort[:8]))}{', ...' if len(cohort) > 8 else ''}]"


CHECKS: dict[str, Callable[[RunFolder], str]] = {
    "files": check_files,
    "file hashes": check_hashes,
    "adapter hash": check_adapter,
    "input files": check_inputs,
    "partition hash": check_partition,
    "checkpoint hashes": check_checkpoints,
    "round records": check_records,
    "summary": check_summary,
    "epsilon": check_epsilon,
    "epsilon by round": check_epsilon_by_round,
    "releases": check_releases,
    "ledger as configured": check_configured,
    "noise by round": check_noise,
    "cohorts drawn": check_drawn,
    "cohorts and sampler": check_sampler,
}
