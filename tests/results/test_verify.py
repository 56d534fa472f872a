"""`raysim verify`: a real run passes every check, and each thing that is tampered with fails the check that is for it."""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from raysim.privacy.accounting import Release, epsilon_of
from raysim.results.files import seal
from raysim.results.folders import RunFolder
from raysim.results.verify import (
    CHECKS,
    Violation,
    fixed_size_detail,
    look,
    main,
    participation_p_value,
    poisson_detail,
    recomputed_epsilon,
    sizes_p_value,
    verify,
)
from raysim.runs.run import open_backend, run
from tests.small_runs import METHODS, small

pytestmark = pytest.mark.pictures

EXTRA = {"fedit-client": ["server.cohort_size=2", "server.num_rounds=3", "privacy.delta=1e-5"], "fedit": ["server.cohort_size=2"]}
QUICK = ["attack.every=-1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A function from a method to the folder of its small run, each made once; not to be changed."""
    runs: dict[str, Path] = {}
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as backend:

        def make(method: str) -> Path:
            if method not in runs:
                config = small(method, *QUICK, *EXTRA.get(method, []), out=tmp_path_factory.mktemp(method) / "run")
                runs[method] = run(config, display=False, backend=backend).out
            return runs[method]

        yield make


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_nobody_touched_passes(finished: Callable[[str], Path], method: str) -> None:
    checks = verify(finished(method))
    assert [check for check in checks if not check.ok] == []
    assert [check.name for check in checks] == list(CHECKS)
    assert all(check.detail for check in checks)


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change of a JSON file's object."""

    def tamper(out: Path) -> None:
        value = json.loads((out / name).read_text())
        change(value)
        (out / name).write_text(json.dumps(value))

    return tamper


def edit_round(index: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change of one line of rounds.jsonl."""

    def tamper(out: Path) -> None:
        records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        change(records[index])
        (out / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    return tamper


def edit_config(old: str, new: str) -> Callable[[Path], None]:
    """A change of a line of config.yaml."""

    def tamper(out: Path) -> None:
        text = (out / "config.yaml").read_text()
        assert text.count(f"{old}\n") == 1, old
        (out / "config.yaml").write_text(text.replace(f"{old}\n", f"{new}\n"))

    return tamper


def remove(name: str) -> Callable[[Path], None]:
    """The removal of a file or folder."""

    def tamper(out: Path) -> None:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return tamper


def flip(name: str) -> Callable[[Path], None]:
    """Another last bit in the last byte of a file."""

    def tamper(out: Path) -> None:
        path = next(out.glob(name))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.unlink()  # checkpoints share files
        path.write_bytes(content)

    return tamper


def drop_last_round(out: Path) -> None:
    """rounds.jsonl without its last line."""
    lines = (out / "rounds.jsonl").read_text().splitlines(keepends=True)
    (out / "rounds.jsonl").write_text("".join(lines[:-1]))


def more_noise(ledger: dict[str, Any]) -> None:
    """A ledger that states more noise than there was, consistently."""
    ledger["noise_multiplier"] *= 2
    ledger["accounted_multiplier"] *= 2
    for release in ledger["releases"]:
        release["noise_multiplier"] *= 2


# what was done -> (method, how, the checks of which at least these must fail)
TAMPERED: dict[str, tuple[str, Callable[[Path], None], set[str]]] = {
    "a file removed": ("fedit-client", remove("environment.json"), {"files"}),
    "no summary": ("fedit-client", remove("summary.json"), {"files", "adapter hash", "epsilon by round"}),
    "no ledger": ("fedit-client", remove("ledger.json"), {"files", "epsilon", "releases"}),
    "no state": ("fedit", remove("state"), {"files", "checkpoint hashes", "round records"}),
    "no synthetic records": ("fedpit", remove("synthetic.jsonl"), {"files"}),
    "adapter changed": ("fedit-client", flip("adapter/adapter_model.safetensors"), {"adapter hash"}),
    "a client's adapter changed": ("locit", flip("adapter/client-001/adapter_model.safetensors"), {"adapter hash"}),
    "a client's adapter removed": ("locit", remove("adapter/client-002"), {"adapter hash"}),
    "another hash": ("fedit", edit("summary.json", lambda s: s.update(adapter_sha256="0" * 64)), {"adapter hash"}),
    "another hash on the card": ("fedit", lambda out: (out / "adapter" / "README.md").write_text("# adapter\n") and None, {"adapter hash"}),
    "more parameters": ("fedit", edit("summary.json", lambda s: s.update(num_parameters=1)), {"adapter hash"}),
    "another split's hash": ("fedit", edit("partition.json", lambda p: p.update(sha256="a" * 64)), {"partition hash"}),
    "another split": ("fedit", edit_config("  alpha: 1.0", "  alpha: 0.2"), {"partition hash"}),
    "a shard's size": ("fedit", edit("partition.json", lambda p: p["clients"][0].update(num_examples=99)), {"partition hash"}),
    "a checkpoint's file": ("fedit", flip("state/round-00001/server.safetensors"), {"checkpoint hashes"}),
    "a client's state": ("fedpit", flip("state/round-00002/client-00001.safetensors"), {"checkpoint hashes"}),
    "a manifest": ("fedit", edit("state/round-00001/manifest.json", lambda m: m.update(num_rounds=7)), {"checkpoint hashes"}),
    "a round removed": ("fedit-client", drop_last_round, {"round records", "releases", "epsilon by round"}),
    "a loss changed": ("fedit", edit_round(1, lambda r: r.update(train_loss=0.1)), {"round records"}),
    "a smaller epsilon": (
        "fedit-client",
        edit("ledger.json", lambda entries: entries.update(epsilon=entries["epsilon"] * 0.9)),
        {"epsilon", "epsilon by round"},
    ),
    "a smaller cross-check": ("fedit-client", edit("ledger.json", lambda entries: entries.update(epsilon_rdp=0.5)), {"epsilon"}),
    "no epsilon": ("fedit-client", edit("ledger.json", lambda entries: entries.update(epsilon=None)), {"epsilon", "epsilon by round"}),
    "an epsilon of nothing": ("fedit", edit("ledger.json", lambda entries: entries.update(epsilon=1.0)), {"epsilon", "epsilon by round"}),
    "words for an epsilon": ("fedit-client", edit("ledger.json", lambda entries: entries.update(epsilon="small")), {"epsilon"}),
    "more noise": ("fedit-client", edit("ledger.json", more_noise), {"epsilon", "ledger as configured", "noise by round"}),
    "another configured noise": (
        "fedit-client",
        edit("ledger.json", lambda entries: entries.update(noise_multiplier=9.0)),
        {"ledger as configured"},
    ),
    "another accounted noise": (
        "fedit-client",
        edit("ledger.json", lambda entries: entries.update(accounted_multiplier=9.0)),
        {"ledger as configured"},
    ),
    "a larger delta": ("fedit-client", edit("ledger.json", lambda entries: entries.update(delta=0.1)), {"epsilon", "ledger as configured"}),
    "another bound": ("fedit-client", edit("ledger.json", lambda entries: entries.update(clip_norm=0.5)), {"ledger as configured"}),
    "fewer releases": ("dplora-example", edit("ledger.json", lambda entries: entries.update(num_releases=1)), {"releases"}),
    "fewer releases listed": (
        "dplora-example",
        edit("ledger.json", lambda entries: entries["releases"][0].update(count=2)),
        {"epsilon", "releases"},
    ),
    "more private steps": ("dplora-example", edit_round(0, lambda r: r.update(num_steps=99)), {"releases", "round records"}),
    "more noise in the configuration": (
        "fedit-client",
        edit_config("  noise_multiplier: 1.0", "  noise_multiplier: 2.0"),
        {"ledger as configured"},
    ),
    "another bound in the configuration": ("fedit-client", edit_config("  clip_norm: 1.0", "  clip_norm: 0.1"), {"ledger as configured"}),
    "another seed": ("fedit-client", edit_config("seed: 0", "seed: 1"), {"partition hash", "cohorts drawn"}),
    "a configuration of nothing": ("fedit", lambda out: (out / "config.yaml").write_text("lora: [") and None, {"files", "partition hash"}),
    "a falling epsilon": ("fedit-client", edit_round(1, lambda r: r.update(epsilon=0.01)), {"epsilon by round"}),
    "a lower end": ("fedit-client", edit_round(-1, lambda r: r.update(epsilon=r["epsilon"] * 0.999)), {"epsilon by round"}),
    "less noise in a round": ("fedit-client", edit_round(0, lambda r: r.update(noise_std=0.0)), {"noise by round"}),
    "another cohort": (
        "fedit-client",
        edit_round(1, lambda r: r.update(cohort=sorted({0, 1, 2} - set(r["cohort"])))),
        {"round records", "cohorts drawn"},
    ),
    "a larger cohort": ("fedit", edit_round(0, lambda r: r.update(cohort=[0, 1, 2])), {"cohorts drawn", "cohorts and sampler"}),
    "a client twice": ("fedit-client", edit_round(0, lambda r: r.update(cohort=[1, 1])), {"cohorts and sampler"}),
    "an unknown client": ("fedit-client", edit_round(0, lambda r: r.update(cohort=[1, 3])), {"cohorts and sampler"}),
    "a missing client": ("dplora-example", edit_round(0, lambda r: r.update(cohort=[0, 2])), {"cohorts drawn", "cohorts and sampler"}),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_tampered_with_fails_its_check(finished: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    method, tamper, expected = TAMPERED[case]
    out = Path(shutil.copytree(finished(method), tmp_path / "run"))
    tamper(out)
    failed = {check.name for check in verify(out) if not check.ok}
    assert failed >= expected


def test_the_command_says_each_check_and_its_status(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished("fedit-client"), tmp_path / "run"))
    assert main(argparse.Namespace(folder=str(out))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) + 1
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1] == f"all {len(CHECKS)} checks hold"
    remove("environment.json")(out)
    assert main(argparse.Namespace(folder=str(out))) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAILED")] == [
        "FAILED files                missing: environment.json",
        "FAILED file hashes          environment.json is missing",
        "FAILED adapter hash         environment.json is missing",
        "FAILED input files          environment.json is missing",
    ]
    assert lines[-1] == f"4 of {len(CHECKS)} checks failed"


SEALED = ("fedit-client", "fedpit", "locit")


@pytest.mark.parametrize("method", SEALED)
def test_a_flipped_bit_in_any_file_is_found(finished: Callable[[str], Path], tmp_path: Path, method: str) -> None:
    out = Path(shutil.copytree(finished(method), tmp_path / "run"))
    names = [path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file()]
    assert {"config.yaml", "answers.jsonl", "report.html", "sha256.json"} <= {path.name for path in names}
    for name in names:
        content = (out / name).read_bytes()
        (out / name).write_bytes(bytes([*content[:-2], content[-2] ^ 1, content[-1]]))
        assert [check.name for check in verify(out) if not check.ok], name
        (out / name).write_bytes(content)
    assert all(check.ok for check in verify(out))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value in an object that holds no others."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from [path] if not items else (leaf for key, inner in items for leaf in leaves(inner, (*path, key)))


def other(value: Any) -> Any:
    """A value of the same kind that says something else."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 1.5 + 1
    return "(0.1, 1e-05)-differentially private" if isinstance(value, str) else 0.5


@pytest.mark.parametrize("name", ["ledger.json", "summary.json"])
@pytest.mark.parametrize("method", ["fedit-client", "dplora-example", "fedit"])
def test_every_value_of_the_ledger_and_the_summary_is_derived_again(
    finished: Callable[[str], Path], tmp_path: Path, method: str, name: str
) -> None:
    """Whoever changes one may as well write the hashes anew."""
    out = Path(shutil.copytree(finished(method), tmp_path / "run"))
    before = (out / name).read_text()
    likely = "summary"
    for *path, last in leaves(json.loads(before)):
        changed = json.loads(before)
        place = changed
        for key in path:
            place = place[key]
        place[last] = other(place[last])
        (out / name).write_text(json.dumps(changed))
        seal(out)
        # What found the last one is asked first, since computing each epsilon again takes long.
        failed = next((check for check in (likely, *CHECKS) if not look(check, RunFolder(out)).ok), "")
        assert failed or last == "num_base_parameters", (path, last)  # which only the base model tells
        likely = failed or likely
    (out / name).write_text(before)
    seal(out)
    assert all(check.ok for check in verify(out))


RESEALED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "answers cut short": (lambda out: (out / "answers.jsonl").write_text("") and None, "round records"),
    "no answers": (remove("answers.jsonl"), "round records"),
    "a larger rank": (edit("adapter/adapter_config.json", lambda c: c.update(r=64)), "adapter hash"),
    "another alpha": (edit("adapter/adapter_config.json", lambda c: c.update(lora_alpha=1)), "adapter hash"),
    "another base model": (edit("adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path="gpt")), "adapter hash"),
    "a promise on the card": (
        lambda out: (out / "adapter/README.md").write_text((out / "adapter/README.md").read_text() + "\nepsilon 0.1\n") and None,
        "adapter hash",
    ),
    "a checkpoint's stray file": (lambda out: (out / "state/round-00002/stray").write_text("x") and None, "checkpoint hashes"),
    "a nested ledger": (lambda out: (out / "ledger.json").write_text('{"a":' * 50_000) and None, "ledger as configured"),
    "a nested manifest": (lambda out: (out / "state/round-00002/manifest.json").write_text("[" * 50_000) and None, "checkpoint hashes"),
    "a nested configuration": (lambda out: (out / "config.yaml").write_text("a: " + "[" * 5_000) and None, "partition hash"),
}


@pytest.mark.parametrize("case", RESEALED)
def test_what_can_be_derived_is_not_believed_for_its_hash(finished: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    out = Path(shutil.copytree(finished("fedit-client"), tmp_path / "run"))
    tamper, expected = RESEALED[case]
    tamper(out)
    seal(out)
    failed = {check.name for check in verify(out) if not check.ok}
    assert expected in failed
    assert "file hashes" not in failed


def test_a_folder_that_is_no_run_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a run \(no config.yaml\)$"):
        main(argparse.Namespace(folder=str(tmp_path / "none")))
    shutil.copytree(finished("fedit"), tmp_path / "all" / "fedit")
    with pytest.raises(ValueError, match=r"it holds runs: fedit$"):
        verify(tmp_path / "all")


# --- epsilon from a ledger


def test_epsilon_is_computed_again_as_it_was_computed() -> None:
    for releases in (
        [Release(1.1, "poisson", sampling_prob=0.2, count=12)],
        [Release(5.0, count=12)],
        [Release(4.0), Release(6.0, count=3)],
    ):
        spent = epsilon_of(releases, delta=1e-5)
        assert recomputed_epsilon(releases, delta=1e-5) == (pytest.approx(spent.pld, rel=1e-3), pytest.approx(spent.rdp, rel=1e-9))
    assert recomputed_epsilon([Release(0.0)], delta=1e-5) == (math.inf, math.inf)


def test_a_list_of_fixed_size_samples_is_accounted_for_replacement() -> None:
    fixed = Release(4.0, "fixed", population=30, sample_size=3, count=5)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(30, 3, dp_accounting.GaussianDpEvent(2.0)), 5)
    assert recomputed_epsilon([fixed], delta=1e-5) == (None, pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9))


# --- cohorts against samplers, without a run


def poisson_cohorts(rng: np.random.Generator, *, num_clients: int, prob: float, num_rounds: int) -> list[list[int]]:
    return [(rng.random(num_clients) < prob).nonzero()[0].tolist() for _ in range(num_rounds)]


def fixed_cohorts(rng: np.random.Generator, *, num_clients: int, size: int, num_rounds: int) -> list[list[int]]:
    return [sorted(rng.choice(num_clients, size=size, replace=False).tolist()) for _ in range(num_rounds)]


@pytest.mark.parametrize(("num_clients", "prob", "num_rounds"), [(3, 0.5, 40), (12, 0.3, 60), (100, 0.1, 80), (1000, 0.01, 600)])
def test_the_sampler_that_was_used_passes(num_clients: int, prob: float, num_rounds: int) -> None:
    """p-values of the true sampler are about uniform: few below 5%, none below the threshold."""
    rng = np.random.default_rng(num_clients)
    values: dict[str, list[float]] = {"sizes": [], "poisson": [], "fixed": []}
    for _ in range(200):
        cohorts = poisson_cohorts(rng, num_clients=num_clients, prob=prob, num_rounds=num_rounds)
        sizes = sizes_p_value([len(cohort) for cohort in cohorts], num_clients=num_clients, prob=prob)
        counts = participation_p_value(cohorts, num_clients=num_clients, prob=prob, fixed=False)
        assert sizes is not None
        assert counts is not None
        values["sizes"].append(sizes)
        values["poisson"].append(counts)
        if num_clients <= 100 and num_clients > 3:
            size = round(prob * num_clients)
            drawn = fixed_cohorts(rng, num_clients=num_clients, size=size, num_rounds=num_rounds)
            p_value = participation_p_value(drawn, num_clients=num_clients, prob=size / num_clients, fixed=True)
            assert p_value is not None
            values["fixed"].append(p_value)
    for name, found in values.items():
        assert not found or min(found) >= 1e-4, name
        assert not found or np.mean(np.array(found) < 0.05) < 0.12, name
        assert not found or np.mean(np.array(found) < 0.5) > 0.3, name


def test_another_sampler_than_accounted_for_is_found() -> None:
    rng = np.random.default_rng(0)
    fixed = fixed_cohorts(rng, num_clients=20, size=5, num_rounds=40)
    with pytest.raises(Violation, match="cohort sizes of 40 rounds does not look like Poisson"):
        poisson_detail(fixed, num_clients=20, prob=0.25)
    with pytest.raises(Violation, match="cohort sizes"):
        poisson_detail(poisson_cohorts(rng, num_clients=50, prob=0.3, num_rounds=50), num_clients=50, prob=0.15)
    in_turn = [[(5 * i + j) % 40 for j in range(5)] for i in range(80)]
    with pytest.raises(Violation, match="participation of 80 rounds does not look like 5 of 40"):
        fixed_size_detail(in_turn, num_clients=40, size=5)
    favoured = [sorted({0, *rng.choice(np.arange(1, 20), size=4, replace=False).tolist()}) for _ in range(40)]
    with pytest.raises(Violation, match="participation"):
        fixed_size_detail(favoured, num_clients=20, size=5)
    with_replacement = [sorted(set(rng.integers(0, 20, size=10).tolist())) for _ in range(60)]
    with pytest.raises(Violation, match="cohort sizes"):
        poisson_detail(with_replacement, num_clients=20, prob=0.5)


def test_too_few_rounds_say_so() -> None:
    few = [[0, 2], [1], []]
    assert poisson_detail(few, num_clients=3, prob=0.5).count("3 rounds are too few to test") == 2
    assert "2 rounds are too few to test participation" in fixed_size_detail([[0, 1], [1, 2]], num_clients=3, size=2)
    assert sizes_p_value([1] * 9, num_clients=3, prob=0.5) is None
