"""Flower at a round of clients without local work, vectors of 460,800 float32, in its simulation engine. Prints one line of JSON.

Each client returns a multiple of what it was given; FedAvg averages. The start of the engine is in the first round.

    python benchmarks/peers/flower.py --cohort 300 --rounds 2
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

SIZE = 460_800


class Idle(NumPyClient):
    """A client that multiplies."""

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """What it sends."""
        return [parameters[0] * np.float32(1.5)], 1, {}


class Clocked(FedAvg):
    """FedAvg that notes when each round has been averaged."""

    times: list[float]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Averages, then notes the time."""
        found = super().aggregate_fit(server_round, results, failures)
        self.times.append(time.perf_counter())
        return found


def main() -> None:
    """Times the rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cohort", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    strategy = Clocked(
        fraction_evaluate=0.0,
        min_fit_clients=given.cohort,
        min_available_clients=given.cohort,
        initial_parameters=ndarrays_to_parameters([np.full(SIZE, 1e-3, dtype=np.float32)]),
    )
    strategy.times = [time.perf_counter()]

    def components(context: Context) -> ServerAppComponents:
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=given.rounds + 1))

    run_simulation(
        server_app=ServerApp(server_fn=components),
        client_app=ClientApp(client_fn=lambda context: Idle().to_client()),
        num_supernodes=given.cohort,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    seconds = [later - earlier for earlier, later in zip(strategy.times[:-1], strategy.times[1:], strict=True)]
    print(json.dumps({"rate": statistics.median([given.cohort / each for each in seconds[1:]]), "first_round_s": seconds[0]}))


if __name__ == "__main__":
    main()
