"""`python -m tools.install` on a small tree with lists of its own: what it takes, what it refuses, and what it says.

Its packages are wheels made on the spot, found in a folder; no index is asked. Left out: uv, which lies in no such folder. The
set-up that every run of the suite starts from is made by it.
"""

import hashlib
import inspect
import os
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools.install import sources

pytestmark = pytest.mark.slow


def make_wheel(folder: str, name: str, version: str) -> str:
    """The name of a wheel of one module, written into `folder`."""
    stem, info = f"{name}-{version}", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(f"{folder}/{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: absent\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{stem}-py3-none-any.whl"


BACKEND = f"""
import zipfile

{inspect.getsource(make_wheel)}

def build_editable(folder, config_settings=None, metadata_directory=None):
    return make_wheel(folder, "tree", "1.0")
"""
LISTS = {
    "requirements.lock": [("rich", "1.0"), ("setuptools", "999.0")],
    "tools/torch-cpu.lock": [("torch", "1.0+cpu")],
    "tools/torch-cuda.lock": [("torch", "1.0"), ("triton", "1.0")],
    "tools/deepspeed.lock": [("deepspeed", "1.0")],
    "tools/installer.lock": [("uv", "1.0")],
}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment, to be copied."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def tree(empty: Path, tmp_path: Path) -> Path:
    """A tree that can be set up from a folder of wheels, where uv's is missing."""
    wheels = tmp_path / "wheels"
    for folder in (wheels, tmp_path / "tools"):
        folder.mkdir()
    shutil.copy(ROOT / "tools" / "install.py", tmp_path / "tools")
    for path, pins in LISTS.items():
        lines = []
        for name, version in pins:
            wheel = wheels / make_wheel(str(wheels), name, version)
            lines.append(f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
        (tmp_path / path).write_text("".join(lines))
    (wheels / "uv-1.0-py3-none-any.whl").unlink()
    (tmp_path / "backend.py").write_text(BACKEND)
    (tmp_path / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    shutil.copytree(empty, tmp_path / "venv", symlinks=True)
    (tmp_path / "new.txt").write_text("\n".join(distributions(tmp_path)))
    return tmp_path


def set_up(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the set-up of a tree said."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "PYTHON"))}
    alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tree / "wheels")}
    command = [str(tree / "venv" / "bin" / "python"), "-m", "tools.install"]
    return subprocess.run(command, cwd=tree, env={**kept, **alone, **variables}, capture_output=True, text=True, timeout=240, check=False)


def installed(tree: Path) -> set[str]:
    """What is installed in the tree's environment, beside what a new one has."""
    return distributions(tree) - set((tree / "new.txt").read_text().split("\n"))


def distributions(tree: Path) -> set[str]:
    """The packages of the tree's environment, with their versions."""
    return {path.name.removesuffix(".dist-info") for path in (tree / "venv").glob("lib/python3*/site-packages/*.dist-info")}


def test_pip_is_taken_where_uv_cannot_be_had_and_says_so_in_one_line(tree: Path) -> None:
    done = set_up(tree)
    assert done.returncode == 0, done.stderr
    assert installed(tree) == {"deepspeed-1.0", "rich-1.0", "setuptools-999.0", "torch-1.0+cpu", "tree-1.0"}, (
        "not what a package asks for besides"
    )
    said, torch = done.stdout.splitlines()
    assert said.startswith("uv cannot be had here (ERROR: No matching distribution found for uv==1.0")
    assert "pip installs instead" in said
    assert torch == "torch: the CPU build"


def test_without_a_source_of_cpu_builds_it_is_the_cuda_build_with_its_packages(tree: Path) -> None:
    (tree / "wheels" / "torch-1.0+cpu-py3-none-any.whl").unlink()
    done = set_up(tree)
    assert done.stdout.splitlines()[-1] == "torch: the CUDA build"
    assert installed(tree) == {"deepspeed-1.0", "rich-1.0", "setuptools-999.0", "torch-1.0", "triton-1.0", "tree-1.0"}


@pytest.mark.parametrize("name", ["torch", "setuptools"])
def test_a_file_that_is_not_the_listed_one_is_refused_and_a_set_up_goes_on_once_it_is_the_right_one(tree: Path, name: str) -> None:
    (wheel,) = [path for path in (tree / "wheels").glob(f"{name}-*.whl") if name != "torch" or "cpu" in path.name]
    right = wheel.read_bytes()
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr(f"{name}_more.py", "")
    refused = set_up(tree, INSTALLER="pip")
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not any(package.startswith((name, "tree")) for package in installed(tree))
    wheel.write_bytes(right)
    assert set_up(tree, INSTALLER="pip").returncode == 0
    assert "tree-1.0" in installed(tree)


def test_a_package_that_was_stopped_half_way_is_made_whole_by_the_next_set_up(tree: Path) -> None:
    assert set_up(tree, INSTALLER="pip").returncode == 0
    (module,) = (tree / "venv").glob("lib/python3*/site-packages/rich.py")
    module.unlink()
    (tree / "venv" / ".unfinished").touch()
    done = set_up(tree, INSTALLER="pip")
    assert done.stdout.startswith("the set-up before this one did not end: everything is installed once more\n")
    assert module.exists()
    assert not (tree / "venv" / ".unfinished").exists()


def test_another_installer_is_refused_in_one_line(tree: Path) -> None:
    done = set_up(tree, INSTALLER="conda")
    assert done.returncode != 0
    assert done.stderr == "INSTALLER=conda is neither uv nor pip\n"
    assert not installed(tree)


def test_uv_is_told_what_pip_would_take_and_in_which_order() -> None:
    settings = """\
:env:.find-links='/a /b'
download.index-url='https://other'
global.extra-index-url='https://one\\nhttps://two'
global.find-links='/never'
global.index-url='https://global'
global.timeout='60'
install.index-url='https://install'
"""
    assert sources(settings) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://install",
        "UV_INDEX": "https://one https://two",
        "UV_FIND_LINKS": "/a,/b",
    }
    assert sources("") == {"UV_INDEX_STRATEGY": "unsafe-best-match"}
