"""A client of two ranks on Ray: the run of plain torch, base weights in halves, and the same again after ranks were killed."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.torch import load_file

from raysim.federation.setup import Experiment
from raysim.federation.worker import MOST_DEATHS
from raysim.results.folders import RunFolder
from raysim.runs.run import open_backend, resolved, run
from tests.failing_clients import FAILS, Failing, deadly, failing_at_one_rank
from tests.small_runs import METHODS, small, wait_for

pytest.importorskip("deepspeed")

HERE = ["partition.num_clients=2", "resources.num_actors=1", "attack.memory_records=0", "server.num_rounds=2", "lora.rank=4"]
RANKS = ["resources.backend=ray", "train.engine=deepspeed", "deepspeed.zero_stage=3", "resources.client.num_ranks=2"]


def adapter(out: Path) -> np.ndarray:
    """The released adapter of a run."""
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].numpy().reshape(-1) for name in sorted(tensors)])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("method", ["fedit", "fedpit", "scaffold"])
def test_two_ranks_come_to_the_run_of_plain_torch(tmp_path: Path, method: str) -> None:
    assert method in METHODS
    config = resolved(small(method, *HERE, *RANKS, out=tmp_path / "ranks"))
    with open_backend(config) as backend:
        run(config, display=False, backend=backend)
        assert backend.ray is not None
        [group] = backend.ray.groups
        whole = sum(array.size for array in backend.worker._base.tensors.values())
        assert ray.get([actor.num_held.remote() for actor in (group.first, *group.others)]) == [pytest.approx(whole / 2, rel=0.01)] * 2
    run(small(method, *HERE, out=tmp_path / "torch"), display=False)
    np.testing.assert_allclose(adapter(tmp_path / "ranks"), adapter(tmp_path / "torch"), atol=1e-5)
    losses = [[record["eval"]["heldout_nll"] for record in RunFolder(tmp_path / name).jsonl("rounds.jsonl")] for name in ("ranks", "torch")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_changes_nothing(tmp_path: Path, killed: int) -> None:
    """While a chunk of the second round is trained: the whole group begins it anew."""
    config = resolved(small("fedit", *HERE, *RANKS, "train.num_epochs=8", out=tmp_path / "killed"))
    rounds = tmp_path / "killed" / "rounds.jsonl"
    with open_backend(config) as backend:
        assert backend.ray is not None
        [group] = backend.ray.groups
        before = ray.get((group.first, *group.others)[killed].pid.remote())

        def kill() -> None:
            wait_for(lambda: rounds.is_file() and "\n" in rounds.read_text())
            os.kill(before, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        run(config, display=False, backend=backend)
        thread.join()
        after = ray.get((group.first, *group.others)[killed].pid.remote())
    assert before != after
    run(resolved(small("fedit", *HERE, *RANKS, "train.num_epochs=8", out=tmp_path / "quiet")), display=False)
    assert adapter(tmp_path / "killed").tobytes() == adapter(tmp_path / "quiet").tobytes()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("spoil", [deadly, failing_at_one_rank])
def test_a_client_at_whose_work_a_group_always_ends_is_given_up(tmp_path: Path, spoil: Callable[[Experiment], Experiment]) -> None:
    """It ends the processes of all ranks, or one rank alone fails, so that they never agree."""
    few = ["partition.num_clients=3", "server.num_rounds=1", "attack.every=-1", "evaluate.every=0"]
    config = resolved(small("fedit", *HERE, *RANKS, *few, out=tmp_path / "ranks"))
    with open_backend(config) as backend:
        failing = Failing(backend.key, backend.worker, backend.ray, spoil)
        [record] = run(config, display=False, backend=failing).records
        without = [*few, "clients.dropout_by_client=[0,0,0.99]"]
        run(resolved(small("fedit", *HERE, *RANKS, *without, out=tmp_path / "without")), display=False, backend=backend)
    assert record["failures"] == [{"client_id": FAILS, "reason": f"its process died {MOST_DEATHS} times"}]
    assert record["num_contributed"] == 2
    assert adapter(tmp_path / "ranks").tobytes() == adapter(tmp_path / "without").tobytes()
