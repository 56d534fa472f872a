"""The command that runs one trial of a sweep again, to the letter.

Where a trial's settings, added to what the sweep was started with, do not give exactly the configuration in its folder, the command
names that folder's `config.yaml` instead.
"""

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysim import config as configuration
from raysim.results.files import CONFIG
from raysim.sweeps.rows import Trial, read_override


def command_for(row: Trial, *, config_name: str, overrides: Sequence[str] = ()) -> str:
    """The command that runs the trial of `row` again: `config_name`, then `overrides` (but for `out` and `sweep`), then its settings.

    The settings are the columns that are keys of a configuration, and the seed. It writes a folder of its own below `runs/`.
    """
    of_runs = [item for item in overrides if not item.startswith(("out=", "sweep."))]
    words = [config_name, *of_runs, *[f"{key}={_override_text(value)}" for key, value in _settings_of(row).items()]]
    return shlex.join(["raysim", "run", *words, f"out=runs/{row['trial']}"])


def _settings_of(row: Trial) -> dict[str, Any]:
    return {key: value for key, value in row.items() if ("." in key or key == "seed") and value is not None}


def _override_text(value: Any) -> str:
    """`value` as it must stand after the equals sign to be read back as itself."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        same = read_override(text) == value
    except Exception:  # a YAML reader raises errors of many kinds, and all mean the same: quote it
        same = False
    return text if same else json.dumps(value)


def exact_command(row: Trial, *, out_dir: Path, config_name: str, overrides: Sequence[str]) -> str:
    """The command by settings where it gives the very configuration that the trial had, else the one by the trial's own file."""
    own_file = trial_folder(row, out_dir) / CONFIG
    if not own_file.is_file():
        return command_for(row, config_name=config_name or str(out_dir / CONFIG), overrides=overrides)
    own = configuration.result_key(configuration.load(own_file))
    by_settings = _command_by_settings(row, own, config_name=config_name, overrides=overrides) if config_name else None
    return by_settings or shlex.join(["raysim", "run", str(own_file), f"out=runs/{row['trial']}"])


def _command_by_settings(row: Trial, own: Trial, *, config_name: str, overrides: Sequence[str]) -> str | None:
    """The command that makes the settings `own` out of what the sweep was started with, or None.

    Beside the swept keys it sets what the trial had to do without (a target of epsilon, for a method without noise), and
    what `auto` was decided to be on the machine of the sweep.
    """
    changed = {key: own[key] for key in _settings_of(row) if key in own}
    command = partial(command_for, config_name=config_name, overrides=overrides)
    try:
        file = OmegaConf.load(configuration.find_config(config_name))
        start = OmegaConf.to_container(OmegaConf.merge(file, OmegaConf.from_dotlist(list(overrides))))
        assert isinstance(start, dict)
        given = configuration.flatten_keys({str(key): value for key, value in start.items()})
        changed |= {key: own[key] for key, value in given.items() if key in own and key not in changed and value not in (own[key], "auto")}
        again = configuration.result_key(_loaded(command({"trial": row["trial"], **changed})))
        changed |= {key: own[key] for key, value in again.items() if value == "auto" and own.get(key) != "auto"}
        found = command({"trial": row["trial"], **changed})
        return found if configuration.result_key(_loaded(found)) == own else None
    except (ValueError, OmegaConfBaseException):
        return None


def _loaded(command: str) -> configuration.Config:
    words = shlex.split(command)
    return configuration.load(words[2], words[3:])


def trial_folder(row: Trial, out_dir: Path) -> Path:
    """The folder of a trial's run below the sweep's, which may be that of another trial that came to the same run."""
    place = out_dir / (row.get("folder") or "")
    return place if row.get("folder") and place.is_dir() else out_dir / "trials" / str(row["trial"])
