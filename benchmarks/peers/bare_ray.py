"""Bare Ray actors at a round without local work: what anybody writes first. Prints one line of JSON.

Two actors, one call a client: the actor multiplies a vector of 460,800 float32, which lies in the object store, and returns it; the driver adds what
comes, in float64.

    python benchmarks/peers/bare_ray.py --cohort 1000 --rounds 3
"""

import argparse
import json
import statistics
import time

import numpy as np
import ray

SIZE = 460_800


@ray.remote
class Client:
    """Whoever answers for a client."""

    def update(self, given: np.ndarray, client_id: int) -> np.ndarray:
        """What a client sends."""
        return given * np.float32(1.0 + client_id % 7)


def main() -> None:
    """Times the rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cohort", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=3 * 2**30)
    adapter, seconds = np.full(SIZE, 1e-3, dtype=np.float32), []
    actors = [Client.remote() for _ in range(2)]  # type: ignore[attr-defined]  # ray.remote gives a class no type
    for _ in range(given.rounds + 1):
        started, reference, total = time.perf_counter(), ray.put(adapter), np.zeros(SIZE)
        waiting = [actors[k % 2].update.remote(reference, k) for k in range(given.cohort)]
        while waiting:
            [ready], waiting = ray.wait(waiting, num_returns=1)
            total += ray.get(ready)
        adapter = (total / given.cohort / 4).astype(np.float32)
        seconds.append(time.perf_counter() - started)
    ray.shutdown()
    print(json.dumps({"rate": statistics.median([given.cohort / each for each in seconds[1:]]), "first_round_s": seconds[0]}))


if __name__ == "__main__":
    main()
