"""How many client actors a cluster gets, and what it refuses at once instead of waiting for resources that never come."""

import time
from pathlib import Path

import pytest

from raysim.config import load
from raysim.federation.on_ray.cluster import num_client_actors
from raysim.runs.run import run
from tests.small_runs import small

pytestmark = pytest.mark.usefixtures("ray_session")  # one node with 4 CPUs and 2 GPUs on paper


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["partition.num_clients=3"], 3),
        (["partition.num_clients=12"], 8),  # half a CPU each
        (["partition.num_clients=12", "server.cohort_size=5"], 5),
        (["partition.num_clients=12", "resources.client.num_cpus=4"], 1),
        (["partition.num_clients=12", "resources.client.num_cpus=0"], 12),
        (["partition.num_clients=12", "resources.client.num_gpus=0.5"], 4),
        (["partition.num_clients=12", "resources.client.num_gpus=0.3"], 6),
        (["partition.num_clients=12", "resources.client.num_gpus=0.6"], 2),  # two shares of 0.6 do not fit into one GPU
        (["partition.num_clients=12", "resources.client.num_gpus=1"], 2),
        (["partition.num_clients=3", "resources.num_actors=8"], 8),
        (["partition.num_clients=3", "resources.num_actors=1"], 1),
    ],
)
def test_there_is_one_actor_per_client_of_a_cohort_while_they_fit(settings: list[str], expected: int) -> None:
    config = load("", settings)
    assert num_client_actors(config, num_clients=config.partition.num_clients) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["resources.client.num_gpus=1", "resources.num_actors=3"], "2 client actors of 0.5 CPUs, 1 GPUs"),
        (["resources.client.num_cpus=5"], "5 CPUs"),
        (["resources.client.memory_gb=100000"], "100000 GiB"),
        (["resources.num_actors=9"], "resources.num_actors=9: 8 client actors"),
        (["resources.num_actors=5", "resources.client.num_gpus=0.5"], "resources.num_actors=5: 4 client actors"),
    ],
)
def test_what_no_node_has_is_refused_at_once_and_the_message_says_what_there_is(tmp_path: Path, settings: list[str], named: str) -> None:
    config = small("fedit", "resources.backend=ray", *settings, out=tmp_path / "run")
    started = time.monotonic()
    with pytest.raises(ValueError) as refusal:
        run(config, display=False)
    assert time.monotonic() - started < 30, "a refusal waits for nothing"
    assert named in str(refusal.value)
    assert "1 node: 4 CPUs, 2 GPUs" in str(refusal.value)
    assert not (tmp_path / "run").exists()
