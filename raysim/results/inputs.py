"""What a run read from outside: its data, public records, questions and model, each with the SHA-256 of its content.

The hashes stand in `environment.json` under `inputs`. A folder whose results came from other files than lie there now is neither
continued nor shown as the result of these; a path alone does not tell that a file has changed.
Left out: built-in data and the model `tiny`, which belong to the version of raysim, and every byte of a file of a model above
`WHOLE_BYTES`, of which blocks spread over its whole length are hashed (reading 14 GB at each start would cost half a minute).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from raysim.config import Config
from raysim.data.records import Record
from raysim.model.find import package_of
from raysim.results import files
from raysim.results.folders import RunFolder

WHOLE_BYTES = 2**28
"""A model's files up to this size are hashed whole."""
NUM_BLOCKS, BLOCK_BYTES = 256, 2**16
"""Of larger ones, so many blocks of this size."""
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
"""What is read of a model's folder."""
Print = Mapping[str, Any]
"""Of one file: `num_bytes` and `sha256`, or `sha256_of_blocks`; of a package or a Hub's model, `version`."""


def input_files(config: Config) -> dict[str, dict[str, Print]]:
    """Configuration key -> file (below what the key names; empty for that itself) -> its print; a key whose files are not here has none."""
    paths: dict[str, str] = {}
    if config.data.source in ("jsonl", "hub"):
        paths["data.path"] = config.data.path
    if config.synthesis.source == "file":
        paths["synthesis.path"] = config.synthesis.path
    if config.evaluate.choices_path:
        paths["evaluate.choices_path"] = config.evaluate.choices_path
    found = {key: _prints(Path(path).expanduser(), patterns=("*",), whole=True) for key, path in paths.items()}
    found["model.name"] = _model_prints(config.model.name)
    return {key: prints for key, prints in found.items() if prints}


def records_print(records: Iterable[Record]) -> Print:
    """The print of records as read, in their order; labels are left out, since clusters stand in for missing ones."""
    digest = hashlib.sha256()
    for record in records:
        values = dataclasses.asdict(record)
        del values["label"]
        digest.update(json.dumps(values, sort_keys=True).encode() + b"\n")
    return {"sha256": digest.hexdigest()}


def changed_inputs(out: Path, now: Mapping[str, Mapping[str, Print]]) -> list[str]:
    """One line for each key whose files are not those that the run in `out` recorded; none where it recorded none.

    What is not here any more says nothing: it cannot be taken for the new either.
    """
    folder = RunFolder(out)
    then = folder.environment.inputs if folder.has(files.ENVIRONMENT) else {}
    return [_difference(key, then[key], now[key]) for key in then if key in now and now[key] != then[key]]


def check_inputs(out: Path, config: Config, *, now: Mapping[str, Mapping[str, Print]] | None = None) -> None:
    """Refuses a folder that holds results of other files than the configuration's keys name now; `now` where the files were read before.

    Errors: ValueError naming key, file and both hashes.
    """
    if not ((out / files.ROUNDS).is_file() or any((out / files.STATE).glob("round-*"))):
        return  # nothing was computed from them yet
    for line in changed_inputs(out, input_files(config) if now is None else now):
        raise ValueError(f"{line}; out={str(out)!r} holds results of the former: restore the file, or choose another folder")


def _difference(key: str, then: Mapping[str, Print], now: Mapping[str, Print]) -> str:
    name = next(name for name in [*then, *now] if then.get(name) != now.get(name))
    before, after = (_in_words(prints.get(name)) for prints in (then, now))
    return f"{key}: {name or 'the file'} has changed since the run began ({before} then, {after} now)"


def _in_words(found: Print | None) -> str:
    if found is None:
        return "not there"
    if "version" in found:
        return f"version {found['version']}"
    [(kind, digest)] = [(key, value) for key, value in found.items() if key.startswith("sha256")]
    size = f", {found['num_bytes']} bytes" if "num_bytes" in found else ""
    return f"{kind} {digest[:12]}...{size}"


def _prints(root: Path, *, patterns: tuple[str, ...], whole: bool) -> dict[str, Print]:
    """The prints of a file, or of the files of a folder (not of hidden ones), by their name below it."""
    if root.is_file():
        return {root.name: _print(root, whole=whole)}
    if not root.is_dir():
        return {}
    files = {path for pattern in patterns for path in root.rglob(pattern) if path.is_file()}
    shown = {path.relative_to(root): path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)}
    return {str(name): _print(path, whole=whole) for name, path in sorted(shown.items())}


def _model_prints(name: str) -> dict[str, Print]:
    package = package_of(name)
    if package is not None:
        return _package_print(package)
    path = Path(name).expanduser()
    if path.exists():
        return _prints(path, patterns=MODEL_FILES, whole=False)
    return _cached_print(name) if name.count("/") == 1 else {}


def _package_print(package: str) -> dict[str, Print]:
    try:
        return {package: {"version": importlib.metadata.version(package)}}
    except (importlib.metadata.PackageNotFoundError, ValueError):  # refused with its remedy where the model is loaded
        return {}


def _cached_print(name: str) -> dict[str, Print]:
    """The commit of a Hub's model that is in the cache, without asking the Hub."""
    from huggingface_hub import try_to_load_from_cache  # only a model that is named by a Hub id has a cache to look into

    found = try_to_load_from_cache(name, "config.json")
    return {name: {"version": Path(found).parent.name}} if isinstance(found, str) else {}


def _print(path: Path, *, whole: bool) -> Print:
    stat = path.stat()
    return dict(_hashed(path.resolve(), stat.st_size, stat.st_mtime_ns, whole or stat.st_size <= WHOLE_BYTES))


@lru_cache(maxsize=4096)
def _hashed(path: Path, num_bytes: int, changed_ns: int, whole: bool) -> tuple[tuple[str, Any], ...]:
    """The print's items; kept while size and time of change are the same, for a sweep asks for the same files once a trial."""
    if whole:
        with path.open("rb") as file:
            return ("num_bytes", num_bytes), ("sha256", hashlib.file_digest(file, "sha256").hexdigest())
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(NUM_BLOCKS):
            file.seek((num_bytes - BLOCK_BYTES) * i // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return ("num_bytes", num_bytes), ("sha256_of_blocks", digest.hexdigest())
