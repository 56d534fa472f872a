"""What the rest may know of a rule for combining LoRA adapters: names, traits and reasons, in one table that imports nothing of the package.

The configuration refuses by these traits what a rule cannot do; that they are those of the functions is tested.
Left out: what a rule does. That is `raysim/lora/rules/NAME.py` (see `rule`).
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RuleSpec:
    """A rule as the configuration and the table of rules see it."""

    name: str
    """The value of `lora.aggregation`."""
    label: str
    """What its authors call it."""
    paper: str
    """Its arXiv id."""
    summary: str
    """What the server makes of the adapters, in a few words."""
    no_client: str = ""
    """Why `privacy.unit: client` is refused with it; empty where it is not."""
    own_ranks: bool = False
    """Whether each client may have a rank of its own (`lora.client_ranks`)."""
    linear: bool = False
    """Whether the server adds an averaged update to its tensors, so that `server.lr` and `server.optimizer` have a step to take."""
    fixed: bool = False
    """Whether the same entries train, and mean the same, in every round, as control variates and update canaries take for granted."""
    moves_base: bool = False
    """Whether a full-weight delta of the base model stands beside the adapter."""
    between: bool = False
    """Whether an r x r factor stands between A and B."""
    prunes: bool = False
    """Whether clients may come down to a lower rank, and train under a penalty to that end."""
    personal: bool = False
    """Whether a part of the adapter stays with each client, so that there is one adapter a client and none for all."""

    @property
    def releases_its_state(self) -> bool:
        """Whether what is released is the adapter as the server keeps it, number by number."""
        return not (self.between or self.moves_base or self.personal)


_EVERY_FACTOR = "the server needs every client's own factors, which noise in a sum does not cover"
_TABLE = (
    RuleSpec("average", "FedIT", "2305.05644", "the means of A and of B", linear=True, fixed=True),
    RuleSpec("ffa", "FFA-LoRA", "2403.12313", "the mean of B, A as drawn", linear=True, fixed=True),
    RuleSpec("rolora", "RoLoRA", "2502.01755", "the mean of B and of A in turn", linear=True),
    RuleSpec(
        "fedsa",
        "FedSA-LoRA",
        "2410.01463",
        "the mean of A, each B stays",
        no_client="what comes of it are adapters with a B of one client alone, which no noise covers",
        linear=True,
        personal=True,
    ),
    RuleSpec(
        "flora", "FLoRA", "2409.05976", "all factors stacked, added to the base", no_client=_EVERY_FACTOR, own_ranks=True, moves_base=True
    ),
    RuleSpec("fedex", "FedEx-LoRA", "2410.09432", "the means, the residual added to the base", no_client=_EVERY_FACTOR, moves_base=True),
    RuleSpec("flexlora", "FlexLoRA", "2402.11505", "SVD of the mean product", no_client=_EVERY_FACTOR, own_ranks=True),
    RuleSpec(
        "hetlora", "HetLoRA", "2401.06432", "zero-padded means, weighted by norm", no_client=_EVERY_FACTOR, own_ranks=True, prunes=True
    ),
    RuleSpec("florist", "FLoRIST", "2506.09199", "SVD of the stacks to a share of energy", no_client=_EVERY_FACTOR, own_ranks=True),
    RuleSpec("fedsvd", "FedSVD", "2505.12805", "the mean of B, then SVD of B A"),
    RuleSpec("fedsb", "Fed-SB", "2502.15436", "the mean of R between fixed bases", linear=True, fixed=True, between=True),
    RuleSpec(
        "fedask",
        "FedASK",
        "2507.09990",
        "SVD of the mean product, from two sketches",
        no_client="a round releases two sketches of products, and a clipped factor does not bound its product",
    ),
)

RULES: dict[str, RuleSpec] = {spec.name: spec for spec in _TABLE}
"""Every rule by name, in the order in which they are listed; the first is that of a configuration that names none."""


def named(having: Callable[[RuleSpec], bool]) -> str:
    """The rules with a trait, as a refusal lists them: `'ffa' or 'rolora'`."""
    return " or ".join(repr(spec.name) for spec in RULES.values() if having(spec))
