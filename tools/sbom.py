"""Writes what raysim is made of as a CycloneDX 1.6 document: `make sbom`, or `python -m tools.sbom [FILE]`.

One component for each package that the lock files pin, with its licence and what it asks for itself, as the installed packages say. The same lists give the same
document: no time and no serial number stands in it. Left out: the hashes, which are in the lock files, one for each file of a release; and packages for other
platforms and for GPUs, which are named with their versions, but not installed where this runs.
"""

import json
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from raysim import __version__
from tools.install import ROOT, blocks

LISTS = ("requirements.lock", "tools/torch-cuda.lock", "tools/deepspeed.lock", "tools/installer.lock")
"""What is pinned; of torch's two builds, which are one release, the one with more beside it."""
LONGEST_NAME = 120
"""Some packages have the whole text of their licence where others have its name."""


def main(arguments: list[str]) -> None:
    """Writes the document, sbom.json in the root of the sources if no file is named."""
    path = Path(arguments[0]) if arguments else ROOT / "sbom.json"
    found = document()
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(found['components'])} packages")


def document() -> dict[str, Any]:
    """The document: raysim, what it asks for, and what that leads to."""
    pins = pinned()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    root = {"type": "application", "bom-ref": "raysim", "name": "raysim", "version": __version__, "description": project["description"]}
    root |= {"licenses": [{"license": {"id": project["license"]}}], "purl": f"pkg:pypi/raysim@{__version__}"}
    direct = [canonicalize_name(Requirement(text).name) for text in project["dependencies"]]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": root},
        "components": [component(name, version) for name, version in pins.items()],
        "dependencies": [
            {"ref": "raysim", "dependsOn": sorted(reference(name, pins[name]) for name in direct)},
            *({"ref": reference(name, version), "dependsOn": asked(name, pins)} for name, version in pins.items()),
        ],
    }


def pinned() -> dict[str, str]:
    """The version of every package in the lists, by its name."""
    pins = [Requirement(block.split("\\")[0]) for path in LISTS for block in blocks((ROOT / path).read_text(encoding="utf-8"))]
    return dict(sorted((canonicalize_name(pin.name), str(pin.specifier).removeprefix("==")) for pin in pins))


def reference(name: str, version: str) -> str:
    """The package's address, which is also its reference within the document."""
    return f"pkg:pypi/{name}@{version}"


def component(name: str, version: str) -> dict[str, Any]:
    """A package's entry."""
    found: dict[str, Any] = {"type": "library", "bom-ref": reference(name, version), "name": name, "version": version}
    return found | {"purl": reference(name, version)} | licence(of_package(name))


def licence(found: PackageMetadata | None) -> dict[str, Any]:
    """What a package says of its licence: an expression, or names; nothing where it says nothing or is not installed."""
    if found is None:
        return {}
    if found.get("License-Expression"):
        return {"licenses": [{"expression": found["License-Expression"]}]}
    named = [text.rpartition(" :: ")[2] for text in found.get_all("Classifier") or [] if text.startswith("License :: ")]
    text = (found.get("License") or "").strip()
    named = [name for name in named if name != "OSI Approved"] or ([text] if text and "\n" not in text and len(text) < LONGEST_NAME else [])
    return {"licenses": [{"license": {"name": name}} for name in named]} if named else {}


def asked(name: str, pins: Mapping[str, str]) -> list[str]:
    """References of the pinned packages that a package asks for on this platform."""
    found = of_package(name)
    needed = [Requirement(text) for text in (found.get_all("Requires-Dist") or [] if found else [])]
    names = {canonicalize_name(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}
    return sorted(reference(other, pins[other]) for other in names & set(pins))


def of_package(name: str) -> PackageMetadata | None:
    """The metadata of an installed package."""
    try:
        return metadata(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(sys.argv[1:])
