"""How long does the server of a round take with each rule for combining adapters, and in how much memory?

Rank 16 on the q and v projections of SmolLM2-135M (30 layers, 576 wide, values 192), 64 clients with random factors, on one thread: from the parts that
arrive to the next state. Sums are of clients already added up where they are; a stack is of all of them. Reach: at most 1.0 s for every rule.

    python benchmarks/rules.py [--clients 64] [--repeats 3]
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from raysim.config import load
from raysim.federation.server import ServerState, begin, relay, step
from raysim.lora.factors import entries
from raysim.lora.layout import Layout
from raysim.lora.rule import LoraRule, Setting, lora_rule
from raysim.lora.spec import RULES
from raysim.privacy.aggregation import Part, sum_chunk
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism
from raysim.results.files import environment

RANK, WIDTH, VALUES, NUM_LAYERS, REACH_S = 16, 576, 192, 30, 1.0
OUT = Path(__file__).parent / "results" / "rules.json"


def layout_for(rule: LoraRule) -> Layout:
    """The adapter's layout on SmolLM2-135M."""
    names, shapes = [], []
    for i in range(NUM_LAYERS):
        for layer, size in (("q_proj", WIDTH), ("v_proj", VALUES)):
            for factor, shape in (("A", (RANK, WIDTH)), ("B", (size, RANK)), ("R", (RANK, RANK)))[: 3 if rule.between else 2]:
                names.append(f"base_model.model.model.layers.{i}.self_attn.{layer}.lora_{factor}.weight")
                shapes.append(shape)
    return Layout(tuple(names), tuple(shapes))


def arrived(
    rule: LoraRule, setting: Setting, state: ServerState, round: Round, mechanism: Mechanism, basis: dict[str, Any] | None = None
) -> list[Part]:
    """What the clients' chunks send: random adapters, as the rule sends them (of two trips the second, once there is a basis)."""
    mask = entries(setting.layout, rule.trainable(setting.layout, round.turn), RANK)
    parts: list[Part] = []
    for k in round.survivors:
        drawn = 0.01 * np.random.default_rng(k).standard_normal(len(state.adapter)).astype(np.float32)
        trained = state.adapter + (drawn if mask is None else np.where(mask, drawn, np.float32(0)))
        upload = rule.message(trained, state.adapter, rank=RANK, setting=setting, round_index=0, turn=round.turn)
        if basis is not None and rule.trips is not None and rule.kept is not None:
            upload = rule.trips.answer(rule.kept(trained, state.adapter, RANK, setting), basis, setting)
        parts.append(sum_chunk([upload], client_ids=[k], weights=[1.0], round=round, mechanism=mechanism, form=rule.form))
    return parts


def measure(name: str, *, num_clients: int, repeats: int) -> dict[str, Any]:
    """The seconds of the server's part of a round, the median of some repeats, and the bytes that wait there."""
    rule = lora_rule(name)
    config = load("", ["method.name=fedit", f"lora.aggregation={name}", f"partition.num_clients={num_clients}", "data.num_train=0"])
    setting = Setting(layout_for(rule), alpha=32.0, seed=0, energy=0.9, oversampling=8, pruned_share=0.99)
    mechanism = Mechanism.from_config(config, shard_sizes=[8] * num_clients)
    state = ServerState(0, rule.start(setting.layout, 0))
    round = begin(state, mechanism)
    parts, relay_s = arrived(rule, setting, state, round, mechanism), 0.0
    if rule.trips is not None:
        began = time.perf_counter()
        round = relay(round, parts, mechanism=mechanism, rule=rule, setting=setting)
        relay_s = time.perf_counter() - began
        parts = arrived(rule, setting, state, round, mechanism, basis=dict(round.broadcast))
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        step(state, round, parts, mechanism=mechanism, lr=1.0, seed=0, rule=rule, setting=setting)
        seconds.append(time.process_time() - began)
    return {"rule": name, "form": rule.form, "server_s": statistics.median(seconds) + relay_s, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measures every rule, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rules", nargs="*", default=list(RULES))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.rules:
        rows.append(measure(name, num_clients=arguments.clients, repeats=arguments.repeats))
        print(
            f"{name:10}{rows[-1]['form']:7}{rows[-1]['server_s']:8.2f} s of processor time{'' if rows[-1]['server_s'] <= REACH_S else '  over'}",
            flush=True,
        )
    found = {"num_clients": arguments.clients, "rank": RANK, "reach_s": REACH_S, "rows": rows, "environment": environment()}
    OUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
