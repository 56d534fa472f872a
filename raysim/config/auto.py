"""What a configuration leaves to be decided: every `auto` that the other keys decide.

Left out: `train.dtype` and `resources.num_actors`, which the machine decides.
"""

from collections.abc import Callable
from typing import Any

from raysim.config.schema import LABELLED_SETS, Config, value_of, with_values
from raysim.methods.spec import spec_of


def where_noise_is_added(config: Config) -> str:
    """What `privacy.noise_at=auto` comes to."""
    return {"client": "server", "example": "client"}.get(config.privacy.unit, "auto")


def _weighting(config: Config) -> str:
    if config.privacy.unit != "none":
        return "uniform"
    return "adaptive" if spec_of(config.method.name).adapts_weights else "examples"


def _sampler(config: Config) -> str:
    if config.privacy.unit != "client":
        return "auto"
    return "all" if config.server.cohort_size in (0, config.partition.num_clients) else "poisson"


# (`spec_of` takes any name: one that is none of the choices is refused when all is decided)
AUTOMATIC: dict[str, Callable[[Config], str]] = {
    "privacy.unit": lambda config: spec_of(config.method.name).units[0],
    "privacy.noise_at": where_noise_is_added,
    "privacy.sampler": _sampler,
    "server.weighting": _weighting,
    "audit.canary": lambda config: "update" if config.privacy.unit == "client" else "record",
}
"""Keys whose `auto` is decided by the others, with what decides it, in the order in which one may read what another decided."""


def resolve_auto(config: Config) -> Config:
    """The configuration with every `auto` decided by the others."""
    for key, decided in AUTOMATIC.items():
        if value_of(config, key) == "auto":
            config = with_values(config, {key: decided(config)})
    return config


def unresolved(config: Config) -> dict[str, Any]:
    """The overrides that make `auto` again of what `auto` had decided for this method, for use with another method."""
    return {key: "auto" for key, decided in AUTOMATIC.items() if decided(config) == value_of(config, key)}


def asks_for_labels(config: Config) -> bool:
    """Whether held-out records are also asked for their label (`evaluate.labels`)."""
    known = (config.data.preset if config.data.source in ("jsonl", "hub") else config.data.source) in LABELLED_SETS
    return config.evaluate.labels == "always" or (config.evaluate.labels == "auto" and known)
