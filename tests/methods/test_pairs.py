"""Every method with every partition, every size of cohort and every kind of server step, by pairs; and FEDPIT at the end where it is FEDIT."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raysim.config import CHOICES, Config
from raysim.console.progress import Progress
from raysim.federation.assignment import Assignment, LocalServer
from raysim.federation.in_process import LocalClients
from raysim.federation.loop import Simulation, run_round, start
from raysim.federation.setup import prepare
from raysim.federation.worker import Worker
from raysim.lora.layout import Vector
from raysim.methods.spec import METHODS as SPECS
from raysim.model.base_model import load_base_model
from tests.small_runs import METHODS, small

WORDS = ["lamp", "boat", "chair", "river", "stone", "cloud", "horse", "glass"]
TOPICS = ["home", "sea", "work", "field"]
NUM_CLIENTS, NUM_ROUNDS = 4, 2
TRAINED = [name for name in METHODS if name != "base"]
SCHEMES = CHOICES["partition.scheme"]
COHORTS = (0, 2, 1)
OPTIMIZERS = (
    ["server.optimizer=none"],
    ["server.optimizer=momentum", "server.lr=0.5"],
    ["server.optimizer=adam", "server.lr=0.01"],
    ["server.optimizer=yogi", "server.lr=0.01"],
    ["server.optimizer=adagrad", "server.lr=0.01"],
)
# Each method with each partition; the cohort and the optimizer turn with them, so that every pair of values meets.
CASES = [
    (method, scheme, COHORTS[(i + j) % len(COHORTS)], OPTIMIZERS[(i + 2 * j) % len(OPTIMIZERS)])
    for i, method in enumerate(TRAINED)
    for j, scheme in enumerate(SCHEMES)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of sixteen short records on four topics, and a public one of other records."""
    folder = tmp_path_factory.mktemp("data")
    own = [
        {"instruction": f"Buy a {w}?", "response": f"No {w}, {n}", "topic": t}
        for w, t in zip(WORDS, TOPICS * 2, strict=True)
        for n in (1, 2)
    ]
    public = [{"instruction": f"Sell the {w}?", "response": f"Yes {w}"} for w in WORDS]
    for name, rows in (("own", own), ("public", public)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(load_base_model("tiny"), device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def simulated(data: Path, worker: Worker) -> Callable[..., tuple[Simulation, Vector]]:
    """A function from a method and settings to a simulation after its rounds, nothing of it measured, and its first adapter."""

    def make(method: str, *settings: str) -> tuple[Simulation, Vector]:
        public = ["synthesis.source=file", f"synthesis.path={data / 'public.jsonl'}", "fedpit.max_rouge_l=1"]
        config = small(
            method,
            "data.source=jsonl",
            f"data.path={data / 'own.jsonl'}",
            "data.label_field=topic",
            "data.num_train=0",
            "data.num_heldout=1",
            f"partition.num_clients={NUM_CLIENTS}",
            f"server.num_rounds={NUM_ROUNDS + 1}",
            "evaluate.every=0",
            "attack.every=0",
            "privacy.delta=1e-5",
            *(public if SPECS[method.partition("-")[0]].writes else []),
            *settings,
            out=data / "unused",
        )
        return rounds_of(config, worker)

    return make


def rounds_of(config: Config, worker: Worker) -> tuple[Simulation, Vector]:
    """A simulation of `config` after all rounds but the last, in which everything would be measured, and the adapter it began with."""
    lm = worker.language_model(config.lora)
    experiment = prepare(config, lm)
    assignment = Assignment(config, experiment.mechanism, experiment.weights, experiment.public)
    simulation = Simulation(
        config=config,
        experiment=experiment,
        clients=LocalClients(worker, assignment, experiment),
        server=LocalServer(assignment),
        tokenizer=lm.tokenizer,
        progress=Progress(NUM_ROUNDS, "pairs", enabled=False),
        state=start(config, experiment, layout=lm.layout),
        num_rounds=NUM_ROUNDS + 1,
    )
    first = simulation.state.adapter
    for round_index in range(NUM_ROUNDS):
        run_round(simulation, round_index)
    return simulation, first


def test_every_pair_of_values_meets() -> None:
    assert {name.partition("-")[0] for name in TRAINED} | {"base"} == set(CHOICES["method.name"])
    assert {settings[0].partition("=")[2] for settings in OPTIMIZERS} == set(CHOICES["server.optimizer"])
    values = [[str(case[k]) for case in CASES] for k in range(4)]
    for (a, first), (b, second) in itertools.combinations(enumerate(values), 2):
        missing = set(itertools.product(set(first), set(second))) - set(zip(first, second, strict=True))
        assert len(missing) <= (len(TRAINED) if (a, b) == (0, 3) else 0), (a, b, missing)


@pytest.mark.parametrize(("method", "scheme", "cohort", "optimizer"), CASES)
def test_a_method_works_with_a_partition_a_cohort_and_a_server_step(
    simulated: Callable[..., tuple[Simulation, Vector]], method: str, scheme: str, cohort: int, optimizer: list[str]
) -> None:
    done, first = simulated(method, f"partition.scheme={scheme}", f"server.cohort_size={cohort}", *optimizer)
    name, spec = done.config.method.name, done.config.method.spec
    size = 1 if name == "cenit" else cohort or NUM_CLIENTS
    cohorts = [record["cohort"] for record in done.records]
    if done.experiment.mechanism.sampler != "poisson":
        assert [len(one) for one in cohorts] == [size] * NUM_ROUNDS
    assert np.isfinite(done.state.adapter).all()
    assert (done.state.adapter.tobytes() == first.tobytes()) == (spec.separates or not any(cohorts))
    vectors = 0 if spec.separates or spec.pools else 1 + len(spec.tensors)
    sent = [len(one) * 4 * len(first) * vectors for one in cohorts]
    assert [record["downlink_bytes"] for record in done.records] == sent
    assert set(done.kept) <= set().union(*cohorts)
    keep = {"scaffold": {"control"}, "fewfedweight": {"own"}, "fedmit": set()} | {
        key: {"adapter"} for key in ("fedpit", "locit", "locit_synthetic")
    }
    assert all(set(state.arrays) == keep[name] for state in done.kept.values())
    assert bool(done.kept) == (name in keep)
    assert bool(done.synthetic) == (spec.writes or name == "fewfedweight")


@pytest.mark.parametrize("train_on", ["real", "real+synthetic"])
def test_fedpit_that_shares_all_of_an_adapter_for_real_records_releases_what_fedit_does(
    simulated: Callable[..., tuple[Simulation, Vector]], train_on: str
) -> None:
    """beta = 1 and no synthetic records: bit for bit in float32, after rounds in which cohorts and shards differ."""
    settings = ["partition.scheme=quantity", "server.cohort_size=2", "train.dtype=float32"]
    nothing = ["fedpit.share_mix=1", "fedpit.num_candidates=0", f"fedpit.local_train_on={train_on}"]
    plain, same, other = (
        simulated(method, *settings, *more)[0].state.adapter.tobytes()
        for method, more in (("fedit", []), ("fedpit", nothing), ("fedpit", ["fedpit.share_mix=1", f"fedpit.local_train_on={train_on}"]))
    )
    assert same == plain
    assert (other == plain) == (train_on == "real"), "synthetic records reach the private adapter only where it is trained on them"
