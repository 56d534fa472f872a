"""One build of raysim at one piece of work: this one, or that of commit 801247d, whichever PYTHONPATH leads to. Prints one line of JSON.

    PYTHONPATH=BUILD:benchmarks/peers python benchmarks/peers/raysim_build.py transport --cohort 1000 --rounds 4
    PYTHONPATH=BUILD python benchmarks/peers/raysim_build.py many --clients 256 --batched 32

`transport`: rounds of clients without local work (each sends a multiple of what it was given), 460,800 float32, two client actors and a server
actor; with `--clip` every update is clipped. `many`: clients of the tiny model, one AdamW step on two short records each, in this process.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import resource
import statistics
import time
from typing import Any

import numpy as np

IS_OURS = importlib.util.find_spec("raysim.federation") is not None
MODEL, RANK = "smollm2-135m-instruct", 8
"""Whose adapter on q and v has 460,800 parameters."""


def install_idle_clients() -> None:
    """Has the method `fedit` of this process send a multiple of what it was given; Ray runs it in every worker."""
    if IS_OURS:
        from raysim.methods import fedit as module
        from raysim.methods.call import ClientResult
        from raysim.model.train import TrainStats

        def idle_group(lm: Any, calls: Any) -> list[Any]:
            stats = TrainStats(num_tokens=1, num_steps=0, loss=None)
            return [ClientResult(upload={"adapter": update_of(call)}, stats=stats) for call in calls]

        module.fedit = idle_group
        return
    from raysim.train import TrainStats

    from raysim import methods
    from raysim.methods.call import ClientResult

    methods.METHODS["fedit"] = lambda lm, call: ClientResult(update=update_of(call), stats=TrainStats(num_tokens=1, num_steps=0, loss=None))


def update_of(call: Any) -> Any:
    """A client's update: what it was given, times a number of its own."""
    return call.adapter * np.float32(1.0 + call.client_id % 7)


def processor_s(processes: Any) -> float:
    """Processor seconds so far of the driver, the client actors and the server: what other work on the machine disturbs least."""
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


def transport(cohort: int, *, rounds: int, clip: bool) -> dict[str, Any]:
    """Updates a second of each round but the first (which starts the workers), through the client actors and the server actor."""
    import psutil
    import ray

    environment = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}, "worker_process_setup_hook": "raysim_build.install_idle_clients"}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment, object_store_memory=3 * 2**30
    )
    if IS_OURS:
        from raysim.federation.assignment import Assignment
        from raysim.federation.loop import start
        from raysim.federation.server import begin
        from raysim.federation.setup import prepare
        from raysim.runs.run import open_backend, resolved
    else:
        from raysim.experiment import prepare
        from raysim.runner import open_backend, resolved
        from raysim.server import broadcast, clip_norm_of
        from raysim.simulate import start
        from raysim.worker import Assignment
    from raysim.config import load
    from raysim.privacy.mechanism import Mechanism

    unit = ["privacy.unit=client", "privacy.clip_norm=0.5"] if clip else []
    settings = [f"model.name={MODEL}", "train.dtype=float32", f"lora.rank={RANK}", "attack.every=-1", *unit]
    config = resolved(load("", [*settings, "resources.num_actors=2", "resources.client.num_cpus=1"]))
    with open_backend(config) as backend:
        lm = backend.worker.language_model(config.lora)
        partition, server = (
            dataclasses.replace(config.partition, num_clients=cohort),
            dataclasses.replace(config.server, weighting="uniform"),
        )
        many = dataclasses.replace(config, partition=partition, server=server)
        mechanism = Mechanism.from_config(many, shard_sizes=[1] * cohort)
        experiment = dataclasses.replace(prepare(config, lm), shards=((),) * cohort, weights=(1.0,) * cohort, mechanism=mechanism)
        assignment = Assignment(many, mechanism, experiment.weights)
        clients, stepping = backend.clients(assignment, experiment), backend.server(assignment)
        adapter = np.full(lm.layout.num_parameters, 1e-3, dtype=np.float32)
        state = start(many, experiment, layout=lm.layout)
        state = dataclasses.replace(state, **({"tensors": {"adapter": adapter}} if IS_OURS else {"adapter": adapter}))
        pids = ray.get([actor.pid.remote() for actor in [*backend.ray.actors, backend.ray.server]])
        processes = [psutil.Process(), *map(psutil.Process, pids)]
        seconds, spent, size = list[float](), list[float](), mechanism.chunk_size
        for index in range(rounds + 1):
            started, before = time.perf_counter(), processor_s(processes)
            members = mechanism.sample_cohort(index)
            chunks = [tuple(members[i : i + size]) for i in range(0, len(members), size)]
            if IS_OURS:
                round = begin(state, mechanism)
                parts = clients.run_round(round, chunks, lambda _: None)
                state, _ = stepping.step(state, round, parts)
            else:
                parts = clients.run_round(chunks, index, broadcast(state), clip_norm_of(state, mechanism), lambda _: None)
                state, _ = stepping.step(state, parts)
            clients.states(members)
            seconds.append(time.perf_counter() - started)
            spent.append((processor_s(processes) - before) / cohort)
        del parts
        server_bytes = processes[-1].memory_full_info().uss
    ray.shutdown()
    rates = [cohort / each for each in seconds[1:]]
    cpu = statistics.median(spent[1:])
    return {
        "rate": statistics.median(rates),
        "rates": rates,
        "cpu_ms": 1e3 * cpu,
        "first_round_s": seconds[0],
        "server_uss_mb": server_bytes / 1e6,
    }


def many(num_clients: int, *, batched: str) -> dict[str, Any]:
    """Clients a second of one worker, each with one step on two short records; the best of three passes after one of warm-up."""
    import torch

    from raysim.config import load
    from raysim.data.records import Record
    from raysim.data.tokens import Example
    from raysim.privacy.mechanism import Mechanism

    if IS_OURS:
        from raysim.federation.assignment import Assignment
        from raysim.federation.worker import Worker
        from raysim.model.base_model import load_base_model
        from raysim.privacy.cohort import Round
    else:
        from raysim.base import load_base_model
        from raysim.worker import Assignment, Worker
    keys = [f"clients.batched={batched}"] if IS_OURS else []
    config = load("", ["model.name=tiny", "train.dtype=float32", "lora.rank=4", "train.batch_size=2", "server.weighting=uniform", *keys])
    rng, record = np.random.default_rng(0), Record(record_id=0, instruction="", response="")

    def example() -> Example:
        ids = rng.integers(5, 261, 40).tolist()
        return Example(record=record, prompt_ids=tuple(ids[:28]), response_ids=tuple(ids[28:]))

    shards = [tuple(example() for _ in range(2)) for _ in range(num_clients)]
    worker = Worker(load_base_model("tiny", dtype="float32"), device="cpu", num_threads=1)
    lm, mechanism = worker.language_model(config.lora), Mechanism.from_config(config, shard_sizes=[2] * num_clients)
    adapter = (0.02 * rng.standard_normal(lm.layout.num_parameters)).astype(np.float32)
    assignment, everybody = Assignment(config, mechanism, (1.0,) * num_clients), tuple(range(num_clients))
    seconds = []
    for index in range(4):
        started = time.perf_counter()
        for first in range(0, num_clients, 64):
            chunk = everybody[first : first + 64]
            own, states = [shards[k] for k in chunk], [None] * len(chunk)
            if IS_OURS:
                worker.run_chunk(assignment, chunk, Round(index, everybody, everybody, None, {"adapter": adapter}), own, states)
            else:
                worker.run_chunk(assignment, chunk, index, adapter, own, states, clip_norm=None)
        seconds.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"rate": num_clients / min(seconds[1:]), "threads": torch.get_num_threads(), "max_rss_mb": memory}


def main() -> None:
    """Does one piece of work and prints what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["transport", "many"])
    parser.add_argument("--cohort", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clip", action="store_true")
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--batched", default="32")
    given = parser.parse_args()
    is_transport = given.work == "transport"
    found = transport(given.cohort, rounds=given.rounds, clip=given.clip) if is_transport else many(given.clients, batched=given.batched)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
