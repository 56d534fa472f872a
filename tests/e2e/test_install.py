"""What a user gets from `pip install`: a wheel with the shipped configs and templates, and an installed copy that finds them."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raysim.config import load, to_yaml

ROOT = Path(__file__).resolve().parent.parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

pytestmark = pytest.mark.slow


def run(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree, built with the build backend at hand, or in isolation where there is none."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    run([*PIP, "wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), str(ROOT)], cwd=folder)
    (built,) = folder.glob("raysim-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, without its dependencies (those of the test's interpreter serve)."""
    target = tmp_path_factory.mktemp("installed")
    run([*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], cwd=target)
    return target


def test_the_wheel_holds_the_package_and_the_shipped_configs_and_nothing_else(wheel: Path) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "raysim").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    configs = {f"raysim/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "raysim/configs/quickstart.yaml" in names
    assert any(name.endswith(".j2") for name in names)
    assert names == sources | configs


def test_an_installed_copy_finds_the_shipped_config_by_name(installed: Path, tmp_path: Path) -> None:
    script = "import raysim.config as c; print(c.__file__); print(c.find_config('quickstart')); print(c.to_yaml(c.load('quickstart')))"
    module, config, *text = run([sys.executable, "-c", script], cwd=tmp_path, env=only(installed)).splitlines()
    assert Path(module) == installed / "raysim" / "config" / "__init__.py"
    assert Path(config) == installed / "raysim" / "configs" / "quickstart.yaml"
    assert "\n".join(text).strip() == to_yaml(load("quickstart")).strip()


def test_the_command_and_the_module_of_an_installed_copy_answer(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "raysim"
    helped = run([sys.executable, str(script), "--help"], cwd=tmp_path, env=only(installed))
    assert run([sys.executable, "-m", "raysim", "--help"], cwd=tmp_path, env=only(installed)) == helped
    assert "compare" in helped


def only(installed: Path) -> dict[str, str]:
    """The environment in which the installed copy comes before any other on the import path."""
    return {**os.environ, "PYTHONPATH": str(installed)}
