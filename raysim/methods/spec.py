"""What the rest may know of a method: names, traits and words, in one table that imports neither torch nor the configuration.

Whoever must treat methods differently asks for a trait and never for a name, so that a method is added here and in its own file.
Left out: what a method does. That is a function in `raysim/methods/` (see `registry`).
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class MethodSpec:
    """A method as the configuration, the simulation, reports and guarantees see it."""

    name: str
    """The value of `method.name`."""
    label: str
    """What its authors call it: in tables, figures and pages."""
    summary: str = ""
    """What a client does in a round, in a few words that follow on from the entry before."""
    no_guarantee: str = ""
    """The ledger's sentence where nothing is promised; empty where `privacy.unit` cannot be `none`."""
    note: str = ""
    """What must be said wherever its results are shown; empty for nothing."""
    function: str = ""
    """`module:function` below `raysim.methods`; empty where both have the method's name."""
    colour: str = ""
    """Its colour in figures, by name (see `raysim.reports.figures.COLOURS`); empty takes a spare one."""
    units: tuple[str, ...] = ("none",)
    """The values that `privacy.unit` can have with it; the first is what `auto` means."""
    sections: tuple[str, ...] = ()
    """Sections of the configuration that are read by it, and not by every method."""
    tensors: tuple[str, ...] = ()
    """Tensors beside the adapter that the server keeps (each as long as the adapter, zero at first) and that travel both ways."""
    trains: bool = True
    """Whether anything is trained: without it there are no rounds, and the model is measured as it is."""
    separates: bool = False
    """Whether nothing leaves a client: the adapters are the clients' own, and there is one release for each."""
    pools: bool = False
    """Whether all records lie in one place, as one client's."""
    writes: bool = False
    """Whether it trains on synthetic records, made as `fedpit.*` and `synthesis.*` say."""
    has_private_adapter: bool = False
    """Whether a client keeps a second, private adapter beside the one that it shares."""
    adapts_weights: bool = False
    """Whether a client's weight is its own to ask for (`server.weighting: adaptive`)."""
    only_trains: bool = False
    """Whether a client's work is `train.*` and nothing more, so that several clients can be trained in one pass (`clients.batched`)."""

    @property
    def has_control_variate(self) -> bool:
        """Whether a control variate travels with the adapter, a second upload."""
        return "control" in self.tensors

    @property
    def trains_together(self) -> bool:
        """Whether what is released was trained on more than one client's records."""
        return self.trains and not self.separates

    @property
    def writes_privately(self) -> bool:
        """Whether a record is protected by how synthetic ones are written (`privacy.unit: example`)."""
        return self.writes and "example" in self.units

    @property
    def steps_privately(self) -> bool:
        """Whether a record is protected in every local step (`privacy.unit: example`), which `dplora.*` describes instead of `train.*`."""
        return "example" in self.units and not self.writes


_WRITING = ("fedpit", "synthesis")
_NO = "No differential-privacy guarantee: "
_TABLE = (
    MethodSpec(
        "fedit",
        "FEDIT",
        summary="trains the shared adapter on its records and sends the difference (with `train.prox_mu`: FedProx)",
        no_guarantee=f"{_NO}FEDIT releases averages of unclipped, unnoised updates.",
        colour="blue",
        units=("none", "client"),
        only_trains=True,
    ),
    MethodSpec(
        "scaffold",
        "SCAFFOLD",
        summary="the same, each step corrected by control variates against client drift",
        no_guarantee=f"{_NO}SCAFFOLD releases averages of unclipped, unnoised updates, and its clients send control variates beside them.",
        colour="violet",
        tensors=("control",),
        only_trains=True,
    ),
    MethodSpec(
        "fedpit",
        "FEDPIT",
        summary="shares an adapter that is trained on synthetic records, keeps a private one",
        no_guarantee=f"{_NO}FEDPIT's protection is empirical only, since the synthetic records it trains the shared adapter on are written from "
        "private demonstrations.",
        colour="orange",
        units=("none", "example"),
        sections=_WRITING,
        writes=True,
        has_private_adapter=True,
    ),
    MethodSpec(
        "fedmit",
        "FedMIT",
        summary="one adapter for real and synthetic records together",
        no_guarantee=f"{_NO}FedMIT releases averages of unclipped, unnoised updates from real and synthetic records.",
        colour="olive",
        sections=_WRITING,
        writes=True,
    ),
    MethodSpec(
        "fewfedweight",
        "FewFedWeight",
        summary="learns from the shared model's answers as well, weighted by energy (a reconstruction)",
        no_guarantee=f"{_NO}FewFedWeight releases averages of unclipped, unnoised updates, weighted by how well each client's adapter does on its "
        "own records.",
        note="FewFedWeight is a reconstruction: its published formulas were not available, so these figures say nothing certain of the original.",
        colour="brown",
        sections=("fewfedweight",),
        adapts_weights=True,
    ),
    MethodSpec(
        "dplora", "DP-LoRA", summary="private steps, as `dplora.mode` says", colour="green", units=("example",), sections=("dplora",)
    ),
    MethodSpec(
        "locit",
        "LOCIT",
        summary="keeps an adapter of its own, without federation",
        no_guarantee=f"{_NO}each client's adapter is trained on its own records without noise, and stays with it.",
        colour="pink",
        separates=True,
    ),
    MethodSpec(
        "locit_synthetic",
        "LOCIT+SG",
        summary="the same, with records of its own writing",
        no_guarantee=f"{_NO}each client's adapter is trained on its own records, and on what it writes from them, without noise, and stays with it.",
        function="locit:locit_synthetic",
        colour="plum",
        sections=_WRITING,
        separates=True,
        writes=True,
    ),
    MethodSpec(
        "cenit",
        "CENIT",
        summary="all data in one place",
        no_guarantee=f"{_NO}all records are pooled in one place and trained on without noise.",
        function="fedit:fedit",
        colour="amber",
        pools=True,
    ),
    MethodSpec(
        "base",
        "base model",
        summary="trains nothing, and the model is as it was",
        no_guarantee="Nothing is learned from the clients' records: the base model is released as it was. No mechanism is needed or claimed.",
        colour="grey",
        trains=False,
    ),
)

METHODS: dict[str, MethodSpec] = {spec.name: spec for spec in _TABLE}
"""Every method by name, in the order in which they are listed; the first is that of a configuration that names none."""


def spec_of(name: str) -> MethodSpec:
    """What is known of a method: for a name that is not in the table (in a folder from elsewhere), the name itself as its label."""
    return METHODS.get(name) or MethodSpec(name, label=name)


def named(having: Callable[[MethodSpec], bool]) -> str:
    """The methods with a trait, as a refusal lists them: `'dplora' or 'fedpit'`."""
    return " or ".join(sorted(repr(spec.name) for spec in METHODS.values() if having(spec)))
