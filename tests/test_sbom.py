"""The list of what raysim is made of: every pinned package once, its references closed, and the same each time."""

import json
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
