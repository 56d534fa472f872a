"""The list of what raysim is made of: every pinned package once, its references closed, and the same each time."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from raysim import __version__
from tests.conftest import ROOT
from tools.install import blocks
from tools.sbom import LISTS, document, main


def test_every_pinned_package_is_in_it_once_with_its_version() -> None:
    components = document()["components"]
    pins = {line.split()[0] for path in LISTS for line in blocks((ROOT / path).read_text())}
    assert sorted(f"{c['name']}=={c['version']}" for c in components) == sorted(pins)
    assert all(c["purl"] == c["bom-ref"] == f"pkg:pypi/{c['name']}@{c['version']}" for c in components)


def test_every_reference_leads_somewhere_and_everything_is_led_to_by_raysim_but_tools_and_tests() -> None:
    found = document()
    edges = {one["ref"]: one["dependsOn"] for one in found["dependencies"]}
    assert set(edges) == {"raysim", *(c["bom-ref"] for c in found["components"])}
    assert {reference for targets in edges.values() for reference in targets} <= set(edges)
    reached, waiting = set[str](), ["raysim"]
    while waiting:
        reference = waiting.pop()
        waiting += [] if reference in reached else edges[reference]
        reached.add(reference)
    names = {reference.removeprefix("pkg:pypi/").partition("@")[0] for reference in reached}
    assert {"torch", "ray", "transformers", "tokenizers", "safetensors", "dp-accounting", "scipy"} <= names
    assert not {"pytest", "moto", "uv"} & names


def test_nearly_every_package_says_its_licence() -> None:
    components = document()["components"]
    silent = [c["name"] for c in components if "licenses" not in c and not c["name"].startswith(("nvidia-", "cuda-", "triton"))]
    assert len(silent) < 0.15 * len(components), silent


def test_it_is_a_file_of_cyclonedx_and_the_same_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one.json", "two.json"):
        main([str(tmp_path / name)])
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    found = json.loads((tmp_path / "one.json").read_text())
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found["metadata"]["component"]["version"] == __version__
    assert f"{tmp_path / 'one.json'}: {len(found['components'])} packages" in capsys.readouterr().out


def test_the_source_archive_of_a_release_has_it(tmp_path: Path) -> None:
    """By the commands of `make release`, in a copy of what they read, which ignores the list as the tree does."""
    (recipe,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "hatchling build" in line]
    place = tmp_path / "tree"
    shutil.copytree(ROOT / "raysim", place / "raysim")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, place)
    main([str(place / "sbom.json")])
    words = recipe.replace("$(BIN)/python", sys.executable).split()
    subprocess.run([*words, "-t", "sdist"], cwd=place, check=True, capture_output=True, timeout=120)
    (path,) = (place / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("/sbom.json")]
        packed = archive.extractfile(name)
        assert packed is not None
        assert json.load(packed) == document()
