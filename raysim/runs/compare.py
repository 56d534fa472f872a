"""Several runs side by side: the entries of `compare`, once or over seeds, and the page that compares them or decides claims by them."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysim import remote, storage
from raysim.claims.page import write_claims_report
from raysim.config import Config, JudgeConfig, result_key, unresolved, unused_privacy, validate, with_overrides
from raysim.console.progress import run_line
from raysim.errors import plain_errors
from raysim.federation.setup import EncodedData, data_key, encode_data
from raysim.reports.page import write_comparison_report
from raysim.results import files, inputs
from raysim.runs import judged
from raysim.runs.run import Backend, Run, backend_key, dated, load_run, open_backend, resolved, run


@plain_errors()
def compare(config: Config, *, display: bool | None = None) -> list[Run]:
    """Runs each entry of `config.compare` into a folder of its own below `config.out`, and writes the page that compares them.

    With `compare_seeds` each entry is run once a seed, entries that come to the same run share it, and with `claims` the page holds the
    published claims against the runs. Returns the runs in the order of `comparison`.

    Errors: as `run`; ValueError if `compare` is empty. Every entry is validated before the first starts.
    """
    if not config.compare:
        raise ValueError(
            "compare is empty: the configuration must name the runs to compare, such as compare: {fedit: {method.name: fedit}}"
        )
    if remote.is_url(config.out):
        with remote.worked_on(config.out) as copy:
            return compare(dataclasses.replace(config, out=str(copy)), display=display)
    configs = [resolved(entry) for entry in comparison(config)]
    firsts = first_alike(configs) if config.compare_seeds else configs
    judged.check(config.judge)
    for entry in firsts:
        inputs.check_inputs(files.check_folder(entry), entry)
    out = comparison_folder(config)
    files.check_writable(out)
    with storage.held(out):
        return _compare(config, configs, firsts, out=out, display=display)


def _compare(config: Config, configs: Sequence[Config], firsts: Sequence[Config], *, out: Path, display: bool | None) -> list[Run]:
    done = _run_all(firsts, display=display)
    folders = list(done)
    if config.compare_seeds:
        members = [{"entry": e.name, "seed": e.seed, "folder": Path(first.out).name} for e, first in zip(configs, firsts, strict=True)]
        files.write_json(out / files.COMPARISON, {"claims": config.claims, "members": members})
    judged.judge_runs(config, folders, journal=out / files.JOURNAL, display=display)
    write_comparison_report(out, folders) if not config.claims else write_claims_report(out)
    return [done[Path(first.out)] for first in firsts]


def _run_all(configs: Sequence[Config], *, display: bool | None) -> dict[Path, Run]:
    """The runs by folder, each made once; they share what they can: the backend, and the tokenised data. Over seeds each is announced."""
    entries = {Path(entry.out): entry for entry in configs}
    done = {out: finished for out, entry in entries.items() if (finished := load_run(entry, out)) is not None}
    waiting = {out: entry for out, entry in entries.items() if out not in done}
    is_announced = display is not False and len({entry.seed for entry in configs}) > 1
    with contextlib.ExitStack() as stack:
        backend: Backend | None = None
        shared: dict[tuple[Any, ...], EncodedData] = {}
        for out, entry in waiting.items():
            if backend is None or backend.key != backend_key(entry):
                stack.close()
                backend = stack.enter_context(open_backend(entry, display=display))
            if is_announced:
                left_s = time_left_s(list(done.values()), [other for place, other in waiting.items() if place not in done])
                print(run_line(len(done) + 1, len(entries), name=entry.name, seed=entry.seed, left_s=left_s), flush=True)
            if data_key(entry) not in shared:
                lm = backend.worker.language_model(entry.lora)
                judged.check_tokenizer(entry.judge, lm.tokenizer)
                shared[data_key(entry)] = encode_data(entry, lm)
            unjudged = dataclasses.replace(entry, judge=JudgeConfig())
            done[out] = run(unjudged, display=display, backend=backend, data=shared[data_key(entry)])
    return {out: done[out] for out in entries}


def time_left_s(done: Sequence[Run], waiting: Sequence[Config]) -> float | None:
    """Seconds that the `waiting` runs will take: each what its entry took with other seeds, or else what a finished run that trains took in the mean.

    None before any such run. What lies between runs is not in it.
    """
    by_name: dict[str, list[float]] = {}
    for finished in done:
        by_name.setdefault(finished.config.name, []).append(finished.summary["wall_s"])
    trained = [finished.summary["wall_s"] for finished in done if finished.config.method.spec.trains]
    if not trained:
        return None
    usual = sum(trained) / len(trained)
    return sum(sum(took) / len(took) if (took := by_name.get(entry.name)) else usual for entry in waiting)


def comparison(config: Config) -> list[Config]:
    """The configurations that `config.compare` names, each with a folder below `config.out`; all of the first seed, then of the next.

    Errors: ValueError naming the entry.
    """
    if config.claims and not config.compare_seeds:
        raise ValueError(f"claims={config.claims!r} needs compare_seeds, such as [0, 1, 2]: a claim is not decided by one run")
    config = dated(config, sorted(comparison_folder(config).glob(f"*/{files.CONFIG}")))  # all entries are told the same day
    seeds: list[int | None] = [*config.compare_seeds] or [None]
    return [_entry(config, name, seed=seed) for seed in seeds for name in config.compare]


def _entry(config: Config, name: str, *, seed: int | None) -> Config:
    overrides, folder = dict(config.compare[name] or {}), name if seed is None else f"{name}-seed-{seed}"
    if seed is not None and "seed" in overrides:
        raise ValueError(f"compare.{name}: seed={overrides['seed']} contradicts compare_seeds; leave one of them out")
    values = unresolved(config) | overrides | {"name": name, "out": str(comparison_folder(config) / folder)}
    try:
        entry = with_overrides(config, values if seed is None else values | {"seed": seed})
        entry = with_overrides(entry, unused_privacy(entry))
        return validate(dataclasses.replace(entry, compare={}, compare_seeds=[], claims=""))
    except ValueError as error:
        raise ValueError(f"compare.{name}: {error}") from None


def first_alike(configs: Sequence[Config]) -> list[Config]:
    """For each configuration the first with the same results, which may be itself; noise from the operating system is never the same."""
    firsts: dict[str, Config] = {}
    return [c if c.privacy.secure_noise else firsts.setdefault(repr(sorted(result_key(c).items())), c) for c in configs]


def comparison_folder(config: Config) -> Path:
    """Where a comparison goes."""
    return Path(config.out or f"runs/{config.name}")
