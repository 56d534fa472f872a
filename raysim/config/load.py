"""One way from files and command lines to a configuration: defaults, then a file, then `key=value` overrides, through one OmegaConf merge.

`data=NAME` is short for a set, and `lora.target_modules` may be one text. Left out: what a value may be (`schema`), and what is refused (`rules`).
"""

import contextlib
import copy
import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from importlib import resources as package_resources
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from raysim.config.auto import resolve_auto
from raysim.config.rules import validate
from raysim.config.schema import BUILT_IN_SETS, FLAT_DEFAULTS, KEYS, PRESETS, WHOLE_KEYS, Config, flatten_keys, to_dict, value_of
from raysim.errors import LONGEST_SHOWN, did_you_mean, one_line, shown

MOST_BYTES, MOST_VALUES = 2**20, 10**5
"""Of a configuration's file, and of the values in it with every alias written out: a few lines of YAML can name a billion."""
LONGEST_REASON = 300
"""Characters of what the parser says."""
SECTIONS = frozenset(field.name for field in dataclasses.fields(Config))
"""The fields of a configuration, most of which are sections."""


def load(source: str | Path = "", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The validated configuration: defaults, then a file or shipped config, then `key=value` overrides.

    `source` is a path, or the name of a shipped config such as `quickstart`; empty means defaults only.

    Errors: ValueError in one line naming the key, the value, and the bound or remedy.
    """
    layers = [_read(find_config(source))] if str(source) else []
    return _validated(_merged([*layers, *map(_override, overrides)]))


def from_layers(layers: list[DictConfig]) -> Config:
    """The validated configuration made of the defaults and `layers`, the later ones winning.

    Errors: ValueError in one line naming the key, the value, and the bound or remedy.
    """
    return _validated(_merged([_checked(layer) for layer in layers]))


def _checked(layer: DictConfig) -> DictConfig:
    """A layer whose keys there are and whose lists and mappings are such."""
    layer = _with_lists(layer)
    for key in flatten_keys({str(k): v for k, v in _plain(layer).items() if k != "compare"}):
        if reason := unknown(key):
            raise ValueError(reason)
    _refuse_other_shapes(layer)
    return layer


def _merged(layers: Sequence[DictConfig]) -> Config:
    """The defaults and checked layers, merged by OmegaConf: those sections alone that a layer names, unless a value refers to others."""
    named = frozenset(str(key) for layer in layers for key in layer)
    whole = not named <= SECTIONS or any("${" in repr(_plain(layer)) for layer in layers)
    with _as_refusals():
        merged = OmegaConf.merge(_defaults() if whole else _part(named), *layers)
        for key in (key.name for key in KEYS.values() if key.replaced):
            for layer in layers:
                given = OmegaConf.select(layer, key)
                if given is not None:
                    OmegaConf.update(merged, key, given, merge=False)
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _validated(config: Config) -> Config:
    return validate(resolve_auto(dataclasses.replace(config, out=os.path.expanduser(config.out))))


@contextlib.contextmanager
def _as_refusals() -> Iterator[None]:
    """Turns what OmegaConf says of a value, in whatever kind of exception and number of lines, into a ValueError of one line.

    What it is given is the user's, so that any exception is about that.
    """
    try:
        yield
    except OmegaConfBaseException as error:
        text = str(error).partition("\n    full_key")[0]
        remedy = (
            r"; a plain dollar sign before a brace is written \${"
            if isinstance(error, InterpolationResolutionError | GrammarParseError)
            else ""
        )
        raise ValueError(f"{shown_key(error.full_key)}: {' '.join(text.split())[:LONGEST_REASON]}{remedy}") from None
    except Exception as error:
        raise ValueError(f"configuration: {type(error).__name__}: {one_line(error)[:LONGEST_REASON]}") from None


def shown_key(key: Any) -> str:
    """A key as a refusal names it."""
    text = " ".join(str(key).split()) if key else "configuration"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _with_lists(layer: DictConfig) -> DictConfig:
    """A layer in which `lora.target_modules`, PEFT's way, may be one text (`all-linear`), and is then the list of it; and `lora.client_ranks` a mapping,
    which is then `lora.rank_shares`."""
    plain = _plain(layer)
    for place, key in ((plain, "lora.target_modules"), (plain.get("lora"), "target_modules")):
        if isinstance(place, dict) and isinstance(value := place.get(key), str) and "${" not in value:
            if re.search(r"[\s,]", value):
                raise ValueError(
                    f"lora.target_modules={shown(value)} is one text; list the layers' names, such as lora.target_modules=[q_proj,v_proj]"
                )
            with _as_refusals():
                layer = copy.deepcopy(layer)
                OmegaConf.update(layer, "lora.target_modules", [value], merge=False)
    return _with_shares(layer)


def _with_shares(layer: DictConfig) -> DictConfig:
    """A layer in which shares of clients by rank stand under `lora.rank_shares`, the ranks as texts, wherever they were given."""
    section = _plain(layer).get("lora")
    if not isinstance(section, dict):
        return layer
    for key in ("rank_shares", "client_ranks"):
        if isinstance(value := section.get(key), dict):
            with _as_refusals():
                layer = copy.deepcopy(layer)
                OmegaConf.update(layer, f"lora.{key}", [] if key == "client_ranks" else {}, merge=False)
                OmegaConf.update(layer, "lora.rank_shares", {str(rank): share for rank, share in value.items()}, merge=False)
    return layer


def _refuse_other_shapes(layer: DictConfig) -> None:
    """Refuses a text or number where a list is wanted, and whatever is no mapping where one is, with the form that is meant."""
    flat = flatten_keys({str(k): v for k, v in _plain(layer).items()})
    shapes = {key: type(default) for key, default in FLAT_DEFAULTS.items() if isinstance(default, list)}
    for key, shape in (shapes | dict.fromkeys((*WHOLE_KEYS, "compare"), dict)).items():
        value = flat.get(key)
        if value is None or isinstance(value, shape) or (isinstance(value, str) and "${" in value):
            continue
        form = f"a list, such as {key}=[{shown(value)}]" if shape is list else f"a mapping, such as {key}={{name: value}}"
        raise ValueError(f"{key}={shown(value)} must be {form}")


def _plain(layer: DictConfig) -> dict[str, Any]:
    """What a layer holds, references (`${...}`) as they stand."""
    with _as_refusals():
        plain = OmegaConf.to_container(layer)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]  # keys of other types are refused by name


def with_overrides(config: Config, overrides: dict[str, Any]) -> Config:
    """A copy of the valid `config` with dotted keys replaced, validated again."""
    layer = OmegaConf.create({})
    with _as_refusals():
        for key, value in overrides.items():
            OmegaConf.update(layer, str(key), value, merge=True)
    layer = _checked(layer)
    named = {str(key) for key in layer}
    before = OmegaConf.create({name: value for name, value in to_dict(config).items() if name in named})
    merged = _merged([before, layer])
    return _validated(dataclasses.replace(config, **{name: attrgetter(name)(merged) for name in named}))


def to_yaml(config: Config) -> str:
    """The complete, resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def result_key(config: Config) -> dict[str, Any]:
    """The part of the configuration that results depend on: what is not `neutral`."""
    return {name: value_of(config, name) for name, key in KEYS.items() if not key.neutral}


def find_config(source: str | Path) -> Path:
    """The path of a config file, or of the shipped config of that name.

    Errors: ValueError if neither exists, listing the shipped names.
    """
    path = Path(source)
    if os.path.isfile(source):  # which takes names of any length
        return path
    folder = shipped_configs()
    if str(source) == path.name:
        candidate = folder / f"{path.name.removesuffix('.yaml')}.yaml"
        if os.path.isfile(candidate):
            return candidate
    names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise ValueError(f"config: no file {shown(str(source))} and no shipped config of that name (shipped: {names})")


def shipped_configs() -> Path:
    """The folder of shipped configs: inside the installed package, or `configs/` of a source tree."""
    installed = Path(str(package_resources.files("raysim"))) / "configs"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "configs"


@cache
def _defaults() -> DictConfig:
    """The schema with its defaults (a merge copies it)."""
    merged = OmegaConf.structured(Config)
    _thaw(merged)
    assert isinstance(merged, DictConfig)
    return merged


@cache
def _part(names: frozenset[str]) -> DictConfig:
    """Of the schema with its defaults these sections alone; what is made of it has the defaults of the others."""
    part = copy.deepcopy(_defaults())
    OmegaConf.set_struct(part, False)
    for name in SECTIONS - names:
        del part[name]
    OmegaConf.set_struct(part, None)
    return part


def _thaw(node: Any) -> None:
    """Clears the read-only flag that OmegaConf derives from frozen dataclasses (the result is frozen again)."""
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, None)
        for key in node:
            _thaw(node._get_node(key))
    elif isinstance(node, ListConfig):
        OmegaConf.set_readonly(node, None)


def _read(path: Path) -> DictConfig:
    """A file's layer."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read: {error.strerror or one_line(error)}") from None
    return _layer_of(path, content)


@lru_cache(maxsize=64)
def _layer_of(path: Path, content: bytes) -> DictConfig:
    """The layer of a file with this content (a merge copies it)."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"config: {path} has more than the {MOST_BYTES:,} bytes that a configuration may have; name the YAML file")
    try:
        num_values = _num_values(yaml.compose(content, Loader=yaml.SafeLoader), {})
        if num_values > MOST_VALUES:
            raise ValueError(f"it comes to {num_values:,} values, of which a configuration may have {MOST_VALUES:,}; use fewer aliases")
        loaded = OmegaConf.load(path)
    except Exception as error:  # the parser and OmegaConf raise many kinds
        raise ValueError(f"config: {path} is not valid YAML: {one_line(error)[:LONGEST_REASON]}") from None
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"config: {path} must hold key: value pairs")
    return _checked(loaded)


def _num_values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a YAML node comes to once its aliases are written out, each counted as often as it is named."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # for one that holds itself
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


@lru_cache(maxsize=4096)
def _override(item: str) -> DictConfig:
    """The layer of one `key=value` (a merge copies it)."""
    return _checked(_parse_override(item))


def _parse_override(item: str) -> DictConfig:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {shown(item)} is not of the form key=value, such as lora.rank=8")
    if key.strip() == "data":
        return _data_alias(value.strip())
    try:
        return OmegaConf.from_dotlist([item])
    except Exception as error:
        raise ValueError(f"{shown_key(key)}: cannot read the value in {shown(item)}: {one_line(error)[:LONGEST_REASON]}") from None


def _data_alias(name: str) -> DictConfig:
    """What `data=NAME` is short for: a built-in set, or the local file `data.path` of a known one."""
    if name in BUILT_IN_SETS:
        return OmegaConf.create({"data": {"source": name, "path": "", "preset": ""}})
    if name in PRESETS:
        return OmegaConf.create({"data": {"source": "jsonl", "preset": name}})
    raise ValueError(
        f"data={shown(name)} is none of {', '.join((*BUILT_IN_SETS, *PRESETS))}; data is a section, so else set its keys, such as data.source"
    )


def sections() -> tuple[str, ...]:
    """The sections of the configuration, those within others with their dotted names."""
    return tuple(dict.fromkeys(name.rsplit(".", n)[0] for name in KEYS for n in range(name.count("."), 0, -1)))


def unknown(key: str, *, also: Iterable[str] = ()) -> str:
    """Why `key` is no key, with the one (or one of `also`) that may have been meant; empty for a key."""
    if key in KEYS:
        return ""
    if key in sections():
        return f"{key} is a section, not a value; set one of its keys, such as {min(k for k in KEYS if k.startswith(key + '.'))}"
    leaves = {name.rsplit(".", 1)[-1]: name for name in KEYS}
    hint = did_you_mean(key, (*KEYS, *also))
    if not hint and (near := difflib.get_close_matches(key[:LONGEST_SHOWN].rsplit(".", 1)[-1], leaves, n=1)):
        hint = f"; did you mean {leaves[near[0]]}?"
    return f"unknown key {shown_key(key)}{hint}"
