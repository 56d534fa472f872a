"""How far a release is from the mean of what its clients trained: against that mean as written down by its definition, and in runs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysim.lora import spec
from raysim.lora.factors import products
from raysim.lora.properties import Trained, exactness_gap
from raysim.lora.rule import lora_rule
from raysim.results.folders import RunFolder
from raysim.runs.run import Backend, open_backend, run
from tests.lora_rounds import one_round, setting_for
from tests.small_runs import small

SIZES, WEIGHTS, RANK = [(7, 5), (4, 9), (6, 6)], [3.0, 1.0, 6.0], 2
EXACT = 1e-5
"""What float32 factors of a small adapter lose."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as opened:
        yield opened


@pytest.mark.parametrize("name", [one.name for one in spec.RULES.values() if not one.personal])
@pytest.mark.parametrize("round_index", [0, 1])
def test_the_gap_is_what_the_definition_says(name: str, round_index: int) -> None:
    rule = lora_rule(name)
    setting = setting_for(rule, SIZES, rank=RANK, alpha=7.0)
    ranks = [1, 2, 2] if spec.RULES[name].own_ranks else [RANK] * len(WEIGHTS)
    done = one_round(rule, setting, weights=WEIGHTS, ranks=ranks, round_index=round_index)
    clients = [Trained(*one) for one in zip(done.trained, ranks, WEIGHTS, strict=True)]
    start = products(done.before["adapter"], setting.layout, scale=setting.scale, delta=done.before.get("delta"))
    moved = np.sqrt(sum(np.square(ideal - one).sum() for ideal, one in zip(done.ideal, start, strict=True)))
    gap = exactness_gap(done.before, done.after, clients, rule=rule, setting=setting)
    assert gap == pytest.approx(done.error / moved, rel=1e-6, abs=1e-12)


def test_where_nobody_moved_there_is_no_gap() -> None:
    rule = lora_rule("average")
    setting = setting_for(rule, SIZES, rank=RANK, alpha=7.0)
    done = one_round(rule, setting, weights=[1.0], idle=[0])
    assert exactness_gap(done.before, done.after, [Trained(done.trained[0], RANK, 1.0)], rule=rule, setting=setting) is None


@pytest.mark.parametrize(
    ("name", "exact"), [("average", False), ("ffa", True), ("rolora", True), ("fedex", True), ("flora", True), ("hetlora", False)]
)
def test_a_run_says_it_by_round(name: str, exact: bool, backend: Backend, tmp_path: Path) -> None:
    more = ["evaluate.exactness_gap=true", f"lora.aggregation={name}", "train.lr=1e-2", "attack.every=-1", "evaluate.every=0"]
    ranks = ["lora.client_ranks=[1,2,4]"] if spec.RULES[name].own_ranks else []
    done = run(small("fedit", *more, *ranks, out=tmp_path / "run"), display=False, backend=backend)
    gaps = [record.exactness_gap for record in RunFolder(done.out).records]
    assert len(gaps) == 2
    assert None not in gaps
    # In the first round B begins at zero, so that one step moves B alone, and every rule is exact.
    assert (max(gap or 0.0 for gap in gaps) < EXACT) == exact, gaps
    assert "What combining loses, by round" in done.page.read_text()


def test_measuring_it_changes_no_other_result(backend: Backend, tmp_path: Path) -> None:
    with_it, without = (
        run(small("fedit", *more, "attack.every=-1", out=tmp_path / str(len(more))), display=False, backend=backend)
        for more in (["evaluate.exactness_gap=true"], [])
    )
    assert with_it.summary["adapter_sha256"] == without.summary["adapter_sha256"]
    assert RunFolder(without.out).records[0].exactness_gap is None
