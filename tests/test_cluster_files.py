"""cluster.yaml and runtime_env.yaml against Ray's own validation, and against the files of this project that they lean on.

Left out: launching a cloud's machines. What a job does on a cluster is in tests/e2e/test_jobs.py.
"""

import copy
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jsonschema import ValidationError
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from tests.conftest import ROOT

CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
RUNTIME_ENV = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
MOST_BYTES = 10_000_000
"""The upload of a job: source text, with room to grow."""


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The cluster's configuration with Ray's defaults, as `ray up` makes and checks it."""
    complete = prepare_config(copy.deepcopy(config))
    validate_config(complete)
    return complete


def test_rays_launcher_takes_the_cluster() -> None:
    complete = prepared(CLUSTER)
    types = complete["available_node_types"]
    head, workers = types[complete["head_node_type"]], [t for name, t in types.items() if name != complete["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert [(t["min_workers"], t["max_workers"]) for t in workers] == [(1, 4)], "workers come and go between bounds"
    assert all(t["resources"]["GPU"] >= 1 for t in workers)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda c: c.update(max_worker=4), ValidationError),
        (lambda c: c.update(max_workers="four"), ValidationError),
        (lambda c: c.update(max_workers=0), ValueError),
        (lambda c: c.update(head_node_type="boss"), ValueError),
        (lambda c: c["available_node_types"]["gpu-worker"]["resources"].update(GPU=0.5), ValidationError),
        (lambda c: c["available_node_types"]["gpu-worker"].update(setup_commands=["true"]), ValidationError),
        (lambda c: c["docker"].pop("container_name"), AssertionError),
        (lambda c: c["setup_commands"].append({"run": "pip"}), ValidationError),
        (lambda c: c["provider"].pop("type"), KeyError),
    ],
)
def test_the_check_refuses_a_spoilt_cluster(spoil: Callable[[dict[str, Any]], Any], error: type[Exception]) -> None:
    config = copy.deepcopy(CLUSTER)
    spoil(config)
    with pytest.raises(error):
        prepared(config)


def test_every_shell_command_of_the_cluster_parses() -> None:
    complete = prepared(CLUSTER)
    commands = [text for key, value in complete.items() if key.endswith("_commands") for text in value]
    assert len(commands) >= 10
    for text in commands:
        done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}: {done.stderr}"
    unclosed = subprocess.run(["bash", "-n", "-c", "which a || (b"], capture_output=True, check=False)
    assert unclosed.returncode != 0, "bash tells a command that does not parse"


def test_the_clusters_installation_is_that_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (setup,) = CLUSTER["setup_commands"]
    assert setup.split(" && ") == ["cd /home/ray/raysim", "python -m tools.install"]
    assert "$(BIN)/python -m tools.install\n" in makefile


def test_ray_takes_the_environment_that_stands_there_as_a_comment_and_the_lists_that_it_names_are_there() -> None:
    commented = re.search(r"^# (uv:\n(?:#   .*\n)+)", (ROOT / "runtime_env.yaml").read_text(), re.MULTILINE)
    assert commented is not None
    field = yaml.safe_load(commented[1].replace("\n# ", "\n"))
    environment = RuntimeEnv(**RUNTIME_ENV, **field)
    assert environment["uv"]["uv_pip_install_options"] == ["--no-deps"]
    named = [package.removeprefix("-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/") for package in environment["uv"]["packages"]]
    assert named == ["requirements.lock", "tools/torch-cuda.lock"]
    assert all((ROOT / name).is_file() for name in named)
    assert not any(name.startswith(part) for name in named for part in RUNTIME_ENV["excludes"]), "a job brings them along"


def test_runs_go_to_storage_that_every_node_mounts_and_the_container_sees() -> None:
    shared = "/mnt/raysim"
    assert any(f" {shared}" in text and "mountpoint -q" in text for text in CLUSTER["initialization_commands"])
    assert f"--volume={shared}:{shared}" in CLUSTER["docker"]["run_options"]
    used = re.findall(r"out=(\S+?)/", (ROOT / "cluster.yaml").read_text() + (ROOT / "runtime_env.yaml").read_text())
    assert len(used) >= 2
    assert all(path.startswith("/mnt") for path in used)


def test_what_the_cluster_mounts_is_there_but_for_the_token_which_the_user_makes() -> None:
    local = [path for path in CLUSTER["file_mounts"].values() if not path.startswith("~")]
    assert local == ["."]
    assert list(CLUSTER["file_mounts"].values()).count("~/.ray/auth_token") == 1
    for starts in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in CLUSTER[starts][-1], "no node is open to whoever reaches it"


def test_ray_takes_the_runtime_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    environment = RuntimeEnv(**RUNTIME_ENV, working_dir=".")
    assert environment.env_vars() == RUNTIME_ENV["env_vars"]
    assert set(RUNTIME_ENV) <= RuntimeEnv.known_fields, "Ray only warns of a field that it does not know"


@pytest.mark.parametrize(
    "spoilt", [{"env_vars": {"OMP_NUM_THREADS": 1}}, {"excludes": ".git"}, {"env_vars": ["A=1"]}, {"pip": {"package": ["a"]}}]
)
def test_ray_refuses_a_spoilt_runtime_environment(spoilt: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        RuntimeEnv(**(RUNTIME_ENV | spoilt))


@pytest.mark.parametrize("named", [True, False], ids=["with runtime_env.yaml", "with --working-dir alone"])
def test_a_job_brings_the_package_and_the_configurations_and_nothing_big(tmp_path: Path, named: bool) -> None:
    tree = working_tree(tmp_path / "tree")
    package = tmp_path / "job.zip"
    excludes = [".git", ".venv", *(RUNTIME_ENV["excludes"] if named else [])]  # the first two are Ray's own
    create_package(str(tree), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as file:
        names = set(file.namelist())
    assert {"raysim/cli.py", "raysim/reports/templates/page.html.j2", "configs/sweep-smoke.yaml", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv/", "runs/", ".mypy_cache/")) or "__pycache__" in name]
    assert named != any(name.startswith("tests/") for name in names)
    assert package.stat().st_size < MOST_BYTES


def test_without_its_ignored_files_a_job_would_bring_the_results(tmp_path: Path) -> None:
    tree = working_tree(tmp_path / "tree")
    (tree / ".gitignore").unlink()
    create_package(str(tree), tmp_path / "job.zip", include_gitignore=True, excludes=[])
    assert (tmp_path / "job.zip").stat().st_size > MOST_BYTES


def working_tree(folder: Path) -> Path:
    """The sources as a checkout has them, with results, a virtual environment and a history beside them."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("raysim", "configs", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in (".gitignore", "pyproject.toml", "README.md", "runtime_env.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("runs/mine/adapter/model.bin", ".venv/lib/torch.so", ".git/objects/aa", ".mypy_cache/3.json", "raysim/__pycache__/a.pyc"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(256)) * 20_000)
    (folder / "runs/mine/adapter/model.bin").write_bytes(np.random.default_rng(0).bytes(MOST_BYTES + 1))  # which do not compress
    return folder
