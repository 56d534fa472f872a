"""A client for which memory runs out is begun anew with half the micro-batch, and comes to what it would have with that from the start."""

import json
import subprocess
import sys

import pytest

from raysim.config import load
from raysim.federation.assignment import Assignment
from raysim.federation.worker import Worker, smaller_micro_batch
from raysim.model.base_model import load_base_model
from raysim.model.train import is_out_of_memory
from raysim.privacy.clipping import ChunkSum
from tests.conftest import SMALL
from tests.failing_clients import Hungry
from tests.method_calls import make_call
from tests.small_runs import environment

SCRIPT = """
import json, logging, resource, sys
import torch
from raysim.config import load
from raysim.federation.assignment import Assignment
from raysim.federation.worker import Worker
from raysim.model.base_model import load_base_model
from tests.conftest import SMALL
from tests.method_calls import make_call

said = []
logging.getLogger("raysim.federation.worker").addFilter(lambda record: said.append(record.getMessage()))


def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))


def sent(size, *, limit=None):
    config = load("", [*SMALL, *sys.argv[1:], f"train.micro_batch_size={size}"])
    worker = Worker(load_base_model("tiny"), device="cpu", num_threads=1)
    lm = worker.language_model(config.lora)
    call = make_call(lm, *sys.argv[1:])
    shard = call.shard * 40
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    part, outcomes, _ = worker.run_chunk(Assignment(config, call.mechanism, (1.0,) * 9), (0,), call.round, [shard], [None])
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not outcomes[0].failure, outcomes[0].trace
    return part.total.tobytes().hex()[:4000]


sent(1)
low = status("VmSize")
limited = sent(0, limit=low + 4_000_000)
size = int(said[-1].rpartition("=")[2]) if said else 0
same, other = limited == sent(size), limited == sent(0)
print(json.dumps({"spare": status("VmPeak") - low, "said": said, "same": same, "other": other}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_a_client_out_of_memory_comes_to_what_a_smaller_micro_batch_does() -> None:
    settings = ["train.batch_size=64", "train.max_steps=1", "lora.target_modules=all-linear"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *settings],
        env=environment() | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["spare"] > 20e6, "else the limit is none"
    assert found["said"], "the limit was never met"
    assert "out of memory; clients [0] again, train.micro_batch_size=32" in found["said"][0]
    assert found["same"]
    assert not found["other"], "else the test could not tell"


def test_a_client_that_runs_out_of_memory_one_example_at_a_time_fails_and_the_others_count(caplog: pytest.LogCaptureFixture) -> None:
    config = load("", [*SMALL, "train.batch_size=4", "clients.batched=2"])
    worker = Worker(load_base_model("tiny"), device="cpu", num_threads=1)
    call = make_call(worker.language_model(config.lora))
    assignment = Assignment(config, call.mechanism, (1.0,) * 9)
    [example, *_] = call.shard
    hungry = (Hungry(example.record, example.prompt_ids, example.response_ids),)
    with caplog.at_level("WARNING", logger="raysim.federation.worker"):
        part, outcomes, _ = worker.run_chunk(assignment, (0, 2), call.round, [call.shard, hungry], [None, None])
    assert [(one.client_id, one.failure.partition(":")[0], one.stats is None) for one in outcomes] == [
        (0, "", False),
        (2, "MemoryError", True),
    ]
    alone, _, _ = worker.run_chunk(assignment, (0,), call.round, [call.shard], [None])
    assert isinstance(part, ChunkSum)
    assert isinstance(alone, ChunkSum)
    assert (part.total.tobytes(), part.weight) == (alone.total.tobytes(), 1.0)
    tried = [message for message in caplog.messages if "clients [2] again" in message]
    assert [message.rpartition("=")[2] for message in tried][-1] == "1", "down to one example"


def test_the_micro_batch_is_halved_down_to_one() -> None:
    for settings, expected in (
        (["train.batch_size=8"], 4),
        (["train.batch_size=8", "train.micro_batch_size=3"], 1),
        (["train.batch_size=8", "train.micro_batch_size=1"], None),
        (["method.name=dplora", "dplora.batch_size=64"], 4),
        (["method.name=dplora", "dplora.batch_size=64", "train.micro_batch_size=32"], 16),
        (["method.name=dplora", "dplora.batch_size=64", "dplora.mode=literal"], 32),
        (["method.name=dplora", "dplora.batch_size=2"], 1),
    ):
        assert smaller_micro_batch(load("", [*SMALL, *settings])) == expected


def test_other_errors_are_no_lack_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"))
    assert not is_out_of_memory(RuntimeError("training: no gradient reached LoRA tensor"))
