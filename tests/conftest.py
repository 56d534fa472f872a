"""Fixtures shared by the whole suite: a small configuration, one Ray session, and the place of data that may be absent.

Left out: models and data sets. A test makes the small one it needs, so that what it depends on stands in the test.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

# Set before torch and Ray are first imported: one thread each, since the number of threads changes the last bits of a
# matmul and the suite shares few cores; the rest keeps a test run from talking to a display or to a usage server.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of a hundred processes compiles the package anew

import hypothesis
import pytest
import ray
import torch

from raysim.config import Config, load
from tests.pictures import undrawn

# How long an example takes depends on what else the machine does, and says nothing about the property.
hypothesis.settings.register_profile("raysim", deadline=None)
hypothesis.settings.load_profile("raysim")

ROOT = Path(__file__).resolve().parent.parent

SMALL = [
    "model.name=tiny",
    "data.num_train=12",
    "data.num_heldout=4",
    "data.max_length=900",
    "lora.rank=4",
    "train.batch_size=4",
    "train.dtype=float32",
    "fedpit.num_candidates=4",
    "fedpit.num_kept=4",
    "fedpit.num_demonstrations=2",
    "fedpit.num_response_demonstrations=2",
    "fedpit.max_instruction_tokens=8",
    "fedpit.max_response_tokens=8",
    "dplora.batch_size=2",
    "dplora.num_steps=2",
    "server.num_rounds=2",
    "evaluate.num_generated=2",
    "evaluate.max_new_tokens=4",
    "evaluate.batch_size=4",
    "attack.num_examples=2",
    "resources.backend=local",
]


LONGEST = ("sweeps", "invariance", "e2e")
"""The folders of tests whose files take minutes: they come first, in this order, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and skips what is marked `gpu` on a machine without a CUDA device."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.parent.name, len(place)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Runs a test marked `alone` while no other one runs, with its fixtures, in any of the suite's processes."""
    with _turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextlib.contextmanager
def _turn(*, alone: bool) -> Iterator[None]:
    """Holds a lock that many tests share and one that is `alone` has to itself; who waits for it stands in the door, and nobody passes."""
    with open(ROOT / "pyproject.toml") as door, open(ROOT / "requirements.lock") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One torch thread in the test process, so that bits do not depend on the machine's core count."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., Config]:
    """A function from `key=value` overrides to a configuration that runs in seconds, with its output under `tmp_path`."""

    def make(*overrides: str) -> Config:
        return load("", [*SMALL, f"out={tmp_path / 'run'}", *overrides])

    return make


@pytest.fixture(scope="module", autouse=True)
def _pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pages without figures, but for files that are marked `pictures`."""
    with contextlib.nullcontext() if request.node.get_closest_marker("pictures") else undrawn():
        yield


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of this process's own, with 4 CPUs and 2 GPUs on paper: placement is tested, no GPU is touched."""
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, object_store_memory=512 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data files, which is not part of the repository: $RAYSIM_TEST_DATA, or shared/data beside it."""
    folder = Path(os.environ.get("RAYSIM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data files: {folder} does not exist; set RAYSIM_TEST_DATA to a folder that holds them")
    return folder
