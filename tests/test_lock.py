"""The lock files: they are complete, they pin what pyproject.toml asks for, and they name nothing but releases and hashes.

Left out: what a package asks for on another platform than this one, where its metadata differ by wheel; and what the CUDA packages
ask for, which are not installed here. `make lock` had the index's own metadata for both.
"""

import itertools
import re
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT
from tools.install import blocks
from tools.lock import LOCKS, MODEL

PYTHONS = ("3.11.0", "3.12.0", "3.13.0")
MACHINES = ("x86_64", "aarch64")
TEXTS = {name: (ROOT / name).read_text() for name in LOCKS}
PINS = {name: [Requirement(block.split("\\")[0]) for block in blocks(text)] for name, text in TEXTS.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [Requirement(text) for text in (*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values()))]


def environment(python: str, machine: str) -> dict[str, str]:
    """What markers see with CPython on Linux."""
    return {
        "implementation_name": "cpython",
        "implementation_version": python,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": "linux",
    }


def pinned(name: str, build: str, seen: Mapping[str, str]) -> dict[str, str]:
    """The version of each package that `name`, the list of a build of torch and what comes after it pin in an environment; none may be pinned twice."""
    lists = (name, f"tools/torch-{build}.lock", "tools/deepspeed.lock")
    pins = [pin for one in lists for pin in PINS[one] if pin.marker is None or pin.marker.evaluate(seen)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    return versions


def needed(asked: list[Requirement], seen: Mapping[str, str]) -> dict[str, list[Requirement]]:
    """Everything that `asked` leads to, by name, as the packages that are installed here state it."""
    found: dict[str, list[Requirement]] = {}
    open_, done = [(requirement, "") for requirement in asked], set()
    while open_:
        requirement, extra = open_.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({**seen, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, []).append(requirement)
        for wanted in {"", *requirement.extras} - {extra for package, extra in done if package == name}:
            done.add((name, wanted))
            open_ += [(Requirement(text), wanted) for text in requires(name) or []]
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_list_holds_pins_with_hashes_and_comments_and_nothing_else(name: str) -> None:
    text = TEXTS[name]
    assert text.startswith(LOCKS[name])
    assert "".join(blocks(text)) == text.removeprefix(LOCKS[name]), "no line that is neither comment nor pin"
    for block in blocks(text):
        pin, *hashes = block.rstrip("\n").split(" \\\n")
        assert re.fullmatch(r"[a-z0-9.-]+==[^ ;]+( ; .+)?", pin)
        assert hashes, f"{pin} has no hash"
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes)
    assert "://" not in text
    assert not re.search(r"(^|[\s'\"=@])/\w", text, re.MULTILINE), "a path of one machine"


def test_only_the_cpu_build_of_torch_has_a_local_version() -> None:
    local = [(name, str(pin)) for name, pins in PINS.items() for pin in pins if "+" in str(pin.specifier)]
    (torch,) = [pin for pin in PINS["tools/torch-cuda.lock"] if pin.name == "torch"]
    assert local == [("tools/torch-cpu.lock", f"{torch}+cpu")]


@pytest.mark.parametrize("build", ["cpu", "cuda"])
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_lists_pin_what_is_asked_for_and_all_that_it_leads_to_and_no_more(python: str, machine: str, build: str) -> None:
    seen = environment(python, machine)
    assert Version(python) in Requirement(f"raysim{PROJECT['requires-python']}").specifier
    versions = pinned("requirements.lock", build, seen)
    every = needed(ASKED, seen)
    for name, requirements in every.items():
        assert name in versions, f"{requirements[0]} is not pinned"
        for requirement in requirements:
            assert requirement.specifier.contains(versions[name], prereleases=True), f"{requirement} is not met by {versions[name]}"
    more = set(versions) - set(every) - {canonicalize_name(MODEL)}
    if build == "cpu":
        assert not more
    else:
        assert {"triton", "cuda-toolkit", "nvidia-cublas", "nvidia-nccl-cu13"} <= more
        assert all(re.match(r"nvidia-|cuda-|triton$", name) for name in more)


def test_what_is_installed_here_is_what_the_lists_pin() -> None:
    """The lists of a CPU build and of a CUDA build agree but for torch's local version."""
    for name, pin in pinned("requirements.lock", "cuda", default_environment()).items():
        try:
            assert version(name).partition("+")[0] == pin
        except PackageNotFoundError:
            assert re.match(r"nvidia-|cuda-|triton$", name), f"{name} is not installed"
