"""pfl (apple/pfl-research) at a round of one SGD step on a vector of 460,800 float32, in one process. Prints one line of JSON.

python benchmarks/peers/pfl_research.py --cohort 300 --rounds 2
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.dataset import Dataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

SIZE = 460_800


class Vector(torch.nn.Module):
    """A model that is one vector, with the square of its distance to the data as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((SIZE,), 1e-3))

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor, eval: bool = False) -> torch.Tensor:
        """Of one client."""
        return 0.5 * (self.weight - targets.float().mean()).square().mean()

    def metrics(self, inputs: torch.Tensor, targets: torch.Tensor, eval: bool = False) -> dict[str, Weighted]:
        """None that costs anything."""
        return {"loss": Weighted(0.0, 1)}


class Clock(TrainingProcessCallback):
    """The time at the end of each round."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def after_central_iteration(self, aggregate_metrics: object, model: object, *, central_iteration: int) -> tuple[bool, object]:
        """Notes it."""
        self.times.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """Times the rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cohort", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    sampler = MinimizeReuseUserSampler(list(range(given.cohort)))
    data = FederatedDataset(lambda user: Dataset((np.zeros((1, 1)), np.full((1, 1), float(user % 7))), user_id=str(user)), sampler)
    module, clock = Vector(), Clock()
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    parameters = NNAlgorithmParams(
        central_num_iterations=given.rounds + 1, evaluation_frequency=1000, train_cohort_size=given.cohort, val_cohort_size=0
    )
    FederatedAveraging().run(
        algorithm_params=parameters,
        backend=SimulatedBackend(training_data=data, val_data=None),
        model=model,
        model_train_params=NNTrainHyperParams(local_learning_rate=0.1, local_num_epochs=1, local_batch_size=1),
        model_eval_params=NNEvalHyperParams(local_batch_size=1),
        callbacks=[clock],
    )
    seconds = [later - earlier for earlier, later in zip(clock.times[:-1], clock.times[1:], strict=True)]
    print(json.dumps({"rate": statistics.median([given.cohort / each for each in seconds[1:]]), "first_round_s": seconds[0]}))


if __name__ == "__main__":
    main()
