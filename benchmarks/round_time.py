"""How many tokens a second does a federated round train, against a plain PEFT loop in one process?

SmolLM2-135M, batch 8 x 128 tokens, rank 8 on q and v, 4 clients x 4 steps x 2 rounds, after one round of warm-up each.
The plain loop is what one writes first: transformers' forward with labels, one optimizer, all cores, float32. Reach: two
actors in float32 at least 1.10 times it, the default settings at least 2.0 times it, four actors' private memory (USS) at
most 0.45 GB each.

    python benchmarks/round_time.py [--rounds 2]
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from raysim.config import Config, load
from raysim.data.tokens import Example
from raysim.federation.assignment import Assignment
from raysim.federation.loop import start
from raysim.federation.server import begin
from raysim.federation.setup import prepare
from raysim.model.base_model import load_base_model
from raysim.model.language_model import build_language_model
from raysim.results.files import environment
from raysim.runs.run import open_backend, resolved

NUM_CLIENTS, NUM_STEPS, BATCH, LENGTH, RANK = 4, 4, 8, 128, 8
SETTINGS = [
    f"partition.num_clients={NUM_CLIENTS}",
    "partition.scheme=iid",
    f"data.num_train={NUM_CLIENTS * NUM_STEPS * BATCH}",
    f"data.max_length={LENGTH}",
    f"lora.rank={RANK}",
    f"lora.alpha={2 * RANK}",
    f"train.batch_size={BATCH}",
]
REACH = {"float32, two actors": 1.10, "default settings": 2.0}
USS_REACH_GB = 0.45


def plain_loop(examples: list[Example], *, rounds: int) -> float:
    """Tokens a second of a plain PEFT loop over all examples, `rounds` times, after a warm-up."""
    torch.set_num_threads(os.cpu_count() or 1)
    base = load_base_model("smollm2-135m-instruct", dtype="float32")
    lm = build_language_model(base, rank=RANK, alpha=2 * RANK, dropout=0.0, target_modules=["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW([p for p in lm.model.parameters() if p.requires_grad], lr=2e-3, foreach=False)
    lm.model.train()

    def one_round() -> None:
        for start_index in range(0, len(examples), BATCH):
            batch = examples[start_index : start_index + BATCH]
            ids = torch.tensor([[*e.prompt_ids, *e.response_ids] for e in batch])
            labels = torch.tensor([[-100] * len(e.prompt_ids) + list(e.response_ids) for e in batch])
            lm.flat_grad.zero_()
            lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
            optimizer.step()

    one_round()
    started = time.perf_counter()
    for _ in range(rounds):
        one_round()
    return rounds * sum(e.num_tokens for e in examples) / (time.perf_counter() - started)


def federated(config: Config, *, rounds: int) -> dict[str, Any]:
    """Tokens a second of `rounds` rounds over Ray actors after a warm-up, and the actors' private memory in GB."""
    config = resolved(config)
    with open_backend(config) as backend:
        lm = backend.worker.language_model(config.lora)
        experiment = prepare(config, lm)
        assert all(e.num_tokens == LENGTH for shard in experiment.shards for e in shard), "every example fills the length"
        clients = backend.clients(Assignment(config, experiment.mechanism, experiment.weights), experiment)
        first = begin(start(config, experiment, layout=lm.layout), experiment.mechanism)
        chunks = [(k,) for k in range(NUM_CLIENTS)]
        num_tokens = 0

        def count(reports: Any) -> None:
            nonlocal num_tokens
            num_tokens += sum(report.stats.num_tokens for report in reports)

        clients.run_round(first, chunks, lambda _: None)
        started = time.perf_counter()
        for round_index in range(1, rounds + 1):
            clients.run_round(dataclasses.replace(first, index=round_index), chunks, count)
        seconds = time.perf_counter() - started
        assert backend.ray is not None
        pids = ray.get([actor.pid.remote() for actor in backend.ray.actors])
        uss = [psutil.Process(pid).memory_full_info().uss / 1e9 for pid in pids]
    return {"tokens_per_s": num_tokens / seconds, "num_actors": len(pids), "dtype": config.train.dtype, "uss_gb": uss}


def main() -> None:
    """Measures the three, prints them with their ratios, and writes benchmarks/results/round_time.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "round_time.json")
    arguments = parser.parse_args()

    two = load("", [*SETTINGS, "train.dtype=float32", "resources.num_actors=2", "resources.client.num_cpus=1"])
    default = load("", SETTINGS)
    measured = {"float32, two actors": federated(two, rounds=arguments.rounds)}
    measured["default settings"] = federated(default, rounds=arguments.rounds)
    ray.shutdown()
    base = load_base_model("smollm2-135m-instruct", dtype="float32")
    lm = build_language_model(base, rank=RANK, alpha=2 * RANK, dropout=0.0, target_modules=["q_proj", "v_proj"])
    examples = [e for shard in prepare(two, lm).shards for e in shard]
    plain = plain_loop(examples, rounds=arguments.rounds)

    print(f"{'':24}{'tokens/s':>10}{'ratio':>8}{'reach':>8}{'USS a worker':>16}")
    print(f"{'plain loop, float32':24}{plain:10.0f}{1:8.2f}")
    for name, result in measured.items():
        result["ratio"] = result["tokens_per_s"] / plain
        uss = f"{statistics.mean(result['uss_gb']):.2f} GB x {result['num_actors']}"
        print(f"{name:24}{result['tokens_per_s']:10.0f}{result['ratio']:8.2f}{REACH[name]:8.2f}{uss:>16}")
    print(f"largest USS of the default settings' actors: {max(measured['default settings']['uss_gb']):.2f} GB (reach: {USS_REACH_GB})")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"plain_tokens_per_s": plain, "measured": measured, "reach": REACH, "uss_reach_gb": USS_REACH_GB}
    arguments.out.write_text(json.dumps(record | {"machine": platform.machine(), "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
