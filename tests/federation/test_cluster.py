"""A Ray that a command starts: it listens on the loopback address alone, and nobody else writes into its folder."""

import json
import subprocess
import sys

import pytest

from raysim.config import ClientResources, load
from raysim.federation.on_ray.cluster import num_that_fit
from raysim.runs.run import open_backend
from tests.small_runs import environment

LOOK = """
import json, os, stat
import psutil, ray
from ray._private.worker import _global_node
from raysim.federation.on_ray.cluster import start_ray, stop_ray
assert start_ray()
from ray._private import worker
@ray.remote
def here(): return os.getpid()
pids = ray.get([here.remote() for _ in range(2)])
me = psutil.Process()
hosts = {(p.name(), c.laddr.ip) for p in [me, *me.children(recursive=True)] for c in p.net_connections("inet") if c.status == "LISTEN"}
folder = worker._global_node.get_session_dir_path()
print(json.dumps({"hosts": sorted(hosts), "mode": stat.S_IMODE(os.stat(folder).st_mode), "num": len(pids)}))
stop_ray()
"""


def test_what_a_command_starts_listens_on_the_loopback_address_alone() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment(), capture_output=True, text=True, timeout=240, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["hosts"]) >= 4
    assert {host for _, host in found["hosts"]} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert found["mode"] == 0o700


def test_a_client_of_several_ranks_is_on_one_node() -> None:
    cpus = ClientResources(num_cpus=1, num_ranks=2)
    assert num_that_fit([{"CPU": 3.0}, {"CPU": 3.0}], cpus) == 2, "the third would be on both"
    gpus = ClientResources(num_cpus=0, num_gpus=1, num_ranks=2)
    assert num_that_fit([{"GPU": 1.0}, {"GPU": 1.0}], gpus) == 0
    assert num_that_fit([{"GPU": 4.0}, {"GPU": 1.0}], gpus) == 2


def test_deepspeed_that_is_not_installed_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as an import finds one that is not there
    config = load("", ["train.engine=deepspeed", "resources.backend=local", "model.name=no/such-model"])
    with pytest.raises(ValueError, match="needs the package deepspeed; run"), open_backend(config):
        pass
