"""Equal bits wherever a run runs: in this process, on one to three client actors, and after actors were killed.

The backends of these tests are one set of actors, of which a run gets the first few: starting an actor takes seconds.
"""

import copy
import dataclasses
import json
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.numpy import load_file

from raysim.federation.assignment import Assignment
from raysim.federation.on_ray.server import ServerActor
from raysim.federation.server import ServerState
from raysim.federation.worker import MOST_DEATHS
from raysim.lora.spec import RULES
from raysim.privacy.cohort import Round
from raysim.runs.run import Backend, open_backend, run
from tests.failing_clients import FAILS, Failing, broken, deadly
from tests.small_runs import results, small

FEDERATED = ["fedit", "fedpit", "dplora-example", "dplora-literal", "fedit-client"]
PAUSE_S = 2.0
RAY = ["resources.backend=ray", "resources.num_actors=3"]
QUICK = [
    "server.num_rounds=3",
    "data.max_length=300",
    "data.num_heldout=1",
    "evaluate.every=0",
    "evaluate.num_generated=1",
    "attack.every=-1",
    "privacy.delta=1e-5",
]
CLIENT = ["fedit-client", *QUICK]
PRIVATE = {
    "distributed": [
        *CLIENT,
        "partition.num_clients=5",
        "privacy.noise_at=distributed",
        "clients.dropout=0.3",
        "privacy.dropout_tolerance=0.5",
    ],
    "local": [*CLIENT, "privacy.noise_at=client"],
    "adaptive": [*CLIENT, "privacy.clipping=adaptive"],
    "cyclic": [*CLIENT, "partition.num_clients=4", "server.cohort_size=1", "privacy.sampler=cyclic", "privacy.num_bands=3"],
    "adam": [*CLIENT, "server.optimizer=adam", "server.lr=0.01"],
    "scaffold": ["scaffold", *QUICK, "partition.num_clients=4", "server.cohort_size=2"],
    "fedmit": ["fedmit", *QUICK],
    "fewfedweight": ["fewfedweight", *QUICK],
    "momentum": ["fedit", *QUICK, "server.optimizer=momentum"],
    "robust": ["fedit", *QUICK, "partition.num_clients=5", "server.rule=median", "adversary.attack=gaussian", "adversary.share=0.4"],
    "stale": [
        "fedit",
        *QUICK,
        "partition.num_clients=5",
        "server.cohort_size=3",
        "clients.overselect=1.3",
        "clients.speed=lognormal",
        "clients.spread=2",
        "clients.token_s=0.1",
        "clients.deadline_s=60",
        "clients.late=stale",
        "clients.dropout=0.2",
    ],
    "synthesis": [
        "fedpit",
        *QUICK,
        "privacy.unit=example",
        "privacy.noise_multiplier=8",
        "fedpit.scorer=none",
        "fedpit.num_candidates=2",
        "fedpit.num_subsets=2",
        "fedpit.max_response_tokens=32",
        "fedpit.top_k=8",
    ],
}
"""Runs in which noise, clipping bound, server or synthetic records depend on what other rounds and clients did: a method, and its settings."""
TURNS = [*QUICK, "partition.num_clients=4", "server.cohort_size=2"]
RANKS = "lora.client_ranks=[1,4,2,3]"
COMBINED = {
    name: ["fedit", *TURNS, f"lora.aggregation={name}", *([RANKS] if one.own_ranks else [])]
    for name, one in RULES.items()
    if name != "average"
} | {
    "ffa-scaffold": ["scaffold", *TURNS, "lora.aggregation=ffa"],
    "rolora-momentum": ["fedit", *TURNS, "lora.aggregation=rolora", "server.optimizer=momentum", "server.lr=0.5"],
    "fedsvd-client": [*CLIENT, "lora.aggregation=fedsvd", "privacy.clipping=adaptive"],
    "fedsb-masked": [*CLIENT, "lora.aggregation=fedsb", "privacy.noise_at=distributed"],
    "fedask-dplora": ["dplora-example", *TURNS, "lora.aggregation=fedask"],
    "hetlora-dplora": ["dplora-example", *TURNS, "lora.aggregation=hetlora", "lora.client_ranks={2: 0.5, 4: 0.5}"],
    "flexlora-fedpit": ["fedpit", *TURNS, "lora.aggregation=flexlora"],
}
"""Runs under every rule for combining adapters, in which not every client is in every round."""


@pytest.fixture(scope="module")
def backend(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Three client actors and a server actor over the tiny model."""
    with open_backend(small("fedit", *RAY, out=tmp_path_factory.mktemp("backend"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def in_process(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function to the folder of a run in this process, each made once."""
    folders: dict[tuple[str, ...], Path] = {}

    def make(method: str, *more: str) -> Path:
        if (method, *more) not in folders:
            out = tmp_path_factory.mktemp("local") / "run"
            run(small(method, *more, out=out), display=False, backend=dataclasses.replace(backend, ray=None))
            folders[method, *more] = out
        return folders[method, *more]

    return make


def first(backend: Backend, num_actors: int) -> Backend:
    """The backend with its first `num_actors` client actors only."""
    assert backend.ray is not None
    assert len(backend.ray.actors) >= num_actors, (len(backend.ray.actors), num_actors)
    fewer = copy.copy(backend.ray)
    fewer.actors = backend.ray.actors[:num_actors]
    return dataclasses.replace(backend, ray=fewer)


@pytest.mark.parametrize("method", FEDERATED)
def test_the_number_of_actors_changes_nothing(backend: Backend, in_process: Callable[..., Path], tmp_path: Path, method: str) -> None:
    expected = results(in_process(method))
    for num_actors in (1, 2, 3):
        out = tmp_path / str(num_actors)
        run(small(method, *RAY[:1], f"resources.num_actors={num_actors}", out=out), display=False, backend=first(backend, num_actors))
        assert results(out) == expected, f"{num_actors} actors"


def test_the_runs_that_are_compared_differ_from_one_another_and_from_another_seed(in_process: Callable[..., Path]) -> None:
    runs = [results(in_process(method))["adapter_sha256"] for method in FEDERATED]
    runs.append(results(in_process("fedit", "seed=1"))["adapter_sha256"])
    assert len(set(runs)) == len(runs)
    assert any('"kept": true' in line for line in results(in_process("fedpit"))["synthetic"].splitlines())


@pytest.mark.parametrize("name", [*PRIVATE, *COMBINED])
def test_private_runs_are_the_same_on_actors(backend: Backend, in_process: Callable[..., Path], tmp_path: Path, name: str) -> None:
    method, *settings = {**PRIVATE, **COMBINED}[name]
    run(small(method, *RAY, *settings, out=tmp_path / "run"), display=False, backend=first(backend, 2))
    assert results(tmp_path / "run") == results(in_process(method, *settings))


@pytest.mark.parametrize("name", [*PRIVATE, *COMBINED])
def test_private_runs_that_are_resumed_end_like_undisturbed_ones(
    backend: Backend, in_process: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """After the second round of three: the noise, the bound and the server's memory of the third build on those before."""
    method, *settings = {**PRIVATE, **COMBINED}[name]
    undisturbed, out = in_process(method, *settings), tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "state" / "round-00003")
    (out / "summary.json").unlink()
    resumed = run(small(method, *settings, out=out), display=False, backend=dataclasses.replace(backend, ray=None))
    assert results(out) == results(undisturbed)
    walls = [[record["wall_s"] for record in records] for records in (resumed.records, rounds(undisturbed))]
    assert [own == other for own, other in zip(*walls, strict=True)] == [True, True, False], "the third round alone was run again"


def test_the_private_runs_that_are_compared_do_what_they_are_named_for(in_process: Callable[..., Path]) -> None:
    done = {name: rounds(in_process(*settings)) for name, settings in PRIVATE.items()}
    failed = [(record["num_failed"] > 0, record["aborted"]) for record in done["distributed"]]
    assert (True, False) in failed, "a round must lose a client and count"
    assert (True, True) in failed, "a round must lose too many"
    assert len({record["clip_norm"] for record in done["adaptive"]}) == 3
    assert len({record["noise_std"] for record in done["cyclic"]}) == 3, "each round takes back more of the noise before it"
    assert [record["cohort"] for record in done["cyclic"]] == [[0], [1], [2]]
    remembered = {"adam": {"adapter", "momentum", "variance"}, "momentum": {"adapter", "momentum"}, "scaffold": {"adapter", "control"}}
    for name, arrays in remembered.items():
        assert load_file(in_process(*PRIVATE[name]) / "state" / "round-00003" / "server.safetensors").keys() == arrays
    assert any(record["synthetic"]["num_kept"] for record in done["synthesis"][:2]), "something must be trained on, and kept for later"
    digests = {results(in_process(*settings))["adapter_sha256"] for settings in PRIVATE.values()}
    assert len(digests) == len(PRIVATE)


def rounds(out: Path) -> list[dict[str, Any]]:
    """The records of a run's rounds, with their times."""
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_killed_client_actors_change_nothing(backend: Backend, in_process: Callable[..., Path], tmp_path: Path) -> None:
    busy = ["train.num_epochs=12", "evaluate.every=0", "attack.every=-1"]
    expected = results(in_process("fedit", *busy))
    two = first(backend, 2)
    before = pids(two)
    with killing(before["clients"], once=tmp_path / "run" / "state" / "round-00001", after_s=0.1):
        run(small("fedit", *RAY, *busy, out=tmp_path / "run"), display=False, backend=two)
    assert not set(pids(two)["clients"]) & set(before["clients"]), "the actors that ran were the ones that were to be killed"
    assert results(tmp_path / "run") == expected


@pytest.mark.parametrize("method", ["fedpit", "scaffold"])
def test_killed_actors_of_clients_that_keep_a_state_change_nothing(
    backend: Backend, in_process: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    expected = results(in_process(method))
    one = first(backend, 1)
    before = pids(one)
    with killing(before["clients"], once=tmp_path / "run" / "state" / "round-00001", after_s=0.05):
        run(small(method, *RAY, out=tmp_path / "run"), display=False, backend=one)
    assert not set(pids(one)["clients"]) & set(before["clients"]), "the actor that ran was the one that was to be killed"
    assert results(tmp_path / "run") == expected


def test_a_killed_server_actor_changes_nothing(backend: Backend, in_process: Callable[..., Path], tmp_path: Path) -> None:
    expected = results(in_process("fedit-client"))
    before = pids(backend)
    with killing(before["server"], once=tmp_path / "run" / "state" / "round-00001", after_s=0.0):
        run(small("fedit-client", *RAY, out=tmp_path / "run"), display=False, backend=backend)
    assert not set(pids(backend)["server"]) & set(before["server"]), "the server that stepped was the one that was to be killed"
    assert results(tmp_path / "run") == expected


@pytest.mark.parametrize("who", ["clients", "server"])
def test_paused_actors_change_nothing(backend: Backend, in_process: Callable[..., Path], tmp_path: Path, who: str) -> None:
    busy = ["train.num_epochs=12", "evaluate.every=0", "attack.every=-1"]
    expected = results(in_process("fedit", *busy))
    two = first(backend, 2)
    before = pids(two)
    done = time.monotonic()
    with killing(before[who], once=tmp_path / "run" / "state" / "round-00001", after_s=0.0, pause_s=PAUSE_S) as paused:
        run(small("fedit", *RAY, *busy, out=tmp_path / "run"), display=False, backend=two)
        done = time.monotonic()
    assert paused.ended_at is not None, "they were not paused"
    assert paused.ended_at < done, "the run was over before they went on"
    assert pids(two)[who] == before[who], "they are the ones that were paused"
    assert results(tmp_path / "run") == expected


@pytest.mark.parametrize("method", ["fedit", "fedit-client"])
def test_a_client_that_raises_on_an_actor_is_the_failure_that_it_is_in_process(backend: Backend, tmp_path: Path, method: str) -> None:
    for name, where in (("ray", first(backend, 2).ray), ("here", None)):
        run(small(method, *RAY, out=tmp_path / name), display=False, backend=Failing(backend.key, backend.worker, where, broken))
    assert results(tmp_path / "ray") == results(tmp_path / "here")
    [failure] = rounds(tmp_path / "ray")[0]["failures"]
    assert (failure["client_id"], failure["reason"].partition(":")[0]) == (FAILS, "IndexError")


def test_a_client_that_always_ends_its_process_is_given_up_and_the_others_count(backend: Backend, tmp_path: Path) -> None:
    settings = ["server.num_rounds=1", "evaluate.every=0", "attack.every=-1"]
    one = Failing(backend.key, backend.worker, first(backend, 1).ray, deadly)
    run(small("fedit", *RAY, *settings, out=tmp_path / "ray"), display=False, backend=one)
    local = Failing(backend.key, backend.worker, None, broken)
    run(small("fedit", *settings, out=tmp_path / "here"), display=False, backend=local)
    [record], [other] = rounds(tmp_path / "ray"), rounds(tmp_path / "here")
    assert record["failures"] == [{"client_id": FAILS, "reason": f"its process died {MOST_DEATHS} times"}]
    assert (record["num_failed"], record["num_contributed"]) == (other["num_failed"], other["num_contributed"]) == (1, 2)
    assert results(tmp_path / "ray")["adapter_sha256"] == results(tmp_path / "here")["adapter_sha256"]


def test_such_a_client_ends_the_run_in_one_line_where_records_are_protected(backend: Backend, tmp_path: Path) -> None:
    one = Failing(backend.key, backend.worker, first(backend, 1).ray, deadly)
    with pytest.raises(RuntimeError, match=f"^round 0, client {FAILS}: its process died {MOST_DEATHS} times$"):
        run(small("dplora-example", *RAY, *QUICK, out=tmp_path / "run"), display=False, backend=one)


def test_the_order_of_evaluation_jobs_changes_nothing(backend: Backend, tmp_path: Path) -> None:
    every = ["data.num_heldout=8", "evaluate.num_generated=8", "evaluate.batch_size=2", "attack.num_examples=8"]
    out = tmp_path / "forward"
    run(small("fedit", *every, out=out), display=False, backend=dataclasses.replace(backend, ray=None))
    config = small("fedit", *RAY, *every, out=tmp_path / "backward")
    run(config, display=False, backend=dataclasses.replace(backend, ray=Backward(backend.ray)))
    assert results(tmp_path / "backward") == results(out)


class Backward:
    """A Ray backend that hands work out in the opposite order, to one actor."""

    def __init__(self, inner: Any) -> None:
        self.base_ref, self.server = inner.base_ref, inner.server
        self._inner = copy.copy(inner)
        self._inner.actors = inner.actors[:1]

    def run(self, items: Any, submit: Any, done: Any) -> None:
        """See `RayBackend.run`."""
        self._inner.run([(-cost, item) for cost, item in reversed(items)], submit, done)


def test_the_server_process_never_holds_what_a_client_keeps(backend: Backend, tmp_path: Path) -> None:
    assert backend.ray is not None
    listening = copy.copy(backend.ray)
    listening.server = ray.remote(recording_server()).options(num_cpus=0).remote()
    run(small("fedpit", *RAY, out=tmp_path / "run"), display=False, backend=dataclasses.replace(backend, ray=listening))
    calls: list[tuple[list[str], bytes]] = ray.get(listening.server.seen.remote())
    ray.kill(listening.server)
    assert [names for names, _ in calls] == [["Assignment", "ServerState", "Round", "ChunkSum", "ChunkSum", "ChunkSum"]] * 2
    received = b"".join(data for _, data in calls)
    saved = [load_file(path) for path in sorted((tmp_path / "run" / "state").glob("round-*/client-*.safetensors"))]
    released = [load_file(path)["adapter"] for path in sorted((tmp_path / "run" / "state").glob("round-*/server.safetensors"))]
    assert len(saved) == 6
    assert len(released) == 2
    assert released[0].tobytes() in received, "the search must find an adapter that the server was given"
    for state in saved:
        assert state["adapter"].tobytes() not in received
        assert state["adapter"].tobytes()[:256] not in received


def recording_server() -> type:
    """A server actor that remembers the types and the bytes of what its `step` was given (defined here, so that Ray ships its code)."""

    class RecordingServer(ServerActor):
        def __init__(self) -> None:
            self._calls: list[tuple[list[str], bytes]] = []

        def step(
            self, assignment: Assignment, state: ServerState, round: Round, num_late: int, *parts: Any
        ) -> tuple[ServerState, dict[str, Any]]:
            given = (assignment, state, round, *parts)
            self._calls.append(([type(value).__name__ for value in given], pickle.dumps(given, protocol=5)))
            return super().step(assignment, state, round, num_late, *parts)

        def seen(self) -> list[tuple[list[str], bytes]]:
            return self._calls

    return RecordingServer


def pids(backend: Backend) -> dict[str, list[int]]:
    """The processes of a backend's client actors and of its server."""
    assert backend.ray is not None
    return {"clients": ray.get([actor.pid.remote() for actor in backend.ray.actors]), "server": [ray.get(backend.ray.server.pid.remote())]}


class killing:
    """While open, a thread that waits for the folder `once`, then `after_s` seconds, and kills the processes; or has them stop for `pause_s`."""

    def __init__(self, victims: list[int], *, once: Path, after_s: float, pause_s: float = 0.0) -> None:
        self._victims, self._once, self._after_s, self._pause_s = victims, once, after_s, pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._kill)
        self.ended_at: float | None = None
        """When the processes went on."""

    def __enter__(self) -> "killing":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _kill(self) -> None:
        while not self._once.is_dir():
            if self._stop.wait(0.01):
                return
        time.sleep(self._after_s)
        for pid in self._victims:
            os.kill(pid, signal.SIGSTOP if self._pause_s else signal.SIGKILL)
        if not self._pause_s:
            return
        time.sleep(self._pause_s)
        for pid in self._victims:
            os.kill(pid, signal.SIGCONT)
        self.ended_at = time.monotonic()
