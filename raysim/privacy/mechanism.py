"""The one frozen object that feeds the sampler, the clip, the noise and the accountant, so that they cannot disagree.

Four kinds, by whom they protect and how:

- `none`: every client, or a fixed-size cohort; nothing is clipped, nothing noised, nothing promised.
- `client`: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963). Poisson cohorts, updates clipped, noise at the server.
- `example`: DP-SGD at each client (Abadi et al. 2016, arXiv 1607.00133). Poisson batches of records, noise at the client.
- `literal`: DP-LoRA as published (Liu et al. 2023, arXiv 2312.17493), with the accountant its sensitivity calls for.

The guarantee covers the released adapters. It does not cover the other files of a run, such as losses and update norms
by round, which a simulation shows because its data are its own.
Left out: adaptive clipping, correlated noise, and the cost of choosing hyper-parameters on private data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysim.config import Config
from raysim.privacy.accounting import epsilon_pld, epsilon_rdp, paper_epsilon
from raysim.rng import numpy_rng

LITERAL_SENSITIVITY = 2.0 * math.sqrt(2.0)
"""In units of C: replacing a record can carry the clipped mean gradient of A, and that of B, across a ball of diameter 2 C."""

NO_GUARANTEE = {
    "fedit": "No differential-privacy guarantee: FEDIT releases averages of unclipped, unnoised updates.",
    "fedpit": "No differential-privacy guarantee: FEDPIT's protection is empirical only, since the synthetic records it trains the "
    "shared adapter on are written from private demonstrations.",
    "locit": "No differential-privacy guarantee: each client's adapter is trained on its own records without noise, and stays with it.",
    "cenit": "No differential-privacy guarantee: all records are pooled in one place and trained on without noise.",
    "base": "Nothing is learned from the clients' records: the base model is released as it was. No mechanism is needed or claimed.",
}


@dataclass(frozen=True)
class Epsilon:
    """An upper bound on epsilon, computed in two ways."""

    pld: float
    """By privacy loss distributions: the figure to quote."""
    rdp: float
    """By Renyi differential privacy: the looser cross-check."""


@dataclass(frozen=True)
class Mechanism:
    """How clients and records are drawn, bounded, noised and accounted in a run."""

    kind: str
    """`none`, `client`, `example` or `literal`."""
    method: str
    """Name of the method, for the sentence that states what is promised."""
    shard_sizes: tuple[int, ...]
    """Records of each client; treated as public."""
    cohort_size: int
    """Clients of a round: exactly, or expected where the cohort is Poisson."""
    weighting: str
    """`examples` or `uniform`."""
    noise_multiplier: float
    """z: noise standard deviation over `clip_norm`."""
    clip_norm: float
    """C: bound on the norm of an update, or of a gradient."""
    delta: float
    """delta of the guarantee."""
    batch_size: int
    """B: (expected) records of a private step; unused by `none` and `client`."""
    num_steps: int
    """Private steps of a client in a round; unused by `none` and `client`."""
    secure_noise: bool
    """Whether noise comes from the operating system instead of the run's seed."""
    seed: int
    """Root of the run's random streams."""

    @staticmethod
    def from_config(config: Config, *, shard_sizes: Sequence[int]) -> "Mechanism":
        """The mechanism of a run whose clients hold `shard_sizes` records.

        Errors: ValueError if `server.cohort_size` exceeds the clients, `auto` is unresolved, or no client holds a record.
        """
        unit, literal = config.privacy.unit, config.dplora.mode == "literal"
        if unit == "auto" or config.server.weighting == "auto":
            raise ValueError("privacy.unit and server.weighting must be resolved; make the configuration with raysim.config.load")
        if config.server.cohort_size > len(shard_sizes):
            raise ValueError(f"server.cohort_size={config.server.cohort_size} must be at most the number of clients, {len(shard_sizes)}")
        if not any(shard_sizes):
            raise ValueError("partition: no client holds a record; raise data.num_train")
        if unit == "client" and config.server.weighting != "uniform":
            raise ValueError(
                f"server.weighting={config.server.weighting!r} is unbounded in one client; privacy.unit='client' needs 'uniform'"
            )
        return Mechanism(
            kind="literal" if unit == "example" and literal else unit,
            method=config.method.name,
            shard_sizes=tuple(int(size) for size in shard_sizes),
            cohort_size=config.server.cohort_size or len(shard_sizes),
            weighting=config.server.weighting,
            noise_multiplier=config.privacy.noise_multiplier,
            clip_norm=config.privacy.clip_norm,
            delta=config.privacy.delta,
            batch_size=config.dplora.batch_size,
            num_steps=1 if literal else config.dplora.num_steps,
            secure_noise=config.privacy.secure_noise,
            seed=config.seed,
        )

    # --- sampler ---

    @property
    def num_clients(self) -> int:
        """Clients of the run."""
        return len(self.shard_sizes)

    @property
    def cohort_prob(self) -> float:
        """Probability that a given client is in a round's cohort."""
        return self.cohort_size / self.num_clients

    @property
    def expected_cohort(self) -> float:
        """Expected number of clients in a round."""
        return float(self.cohort_size)

    @property
    def chunk_size(self) -> int:
        """Clients whose updates are summed together, from the expected cohort alone: places and actors do not change sums."""
        return max(1, self.cohort_size // 64)

    def sample_cohort(self, round_index: int) -> tuple[int, ...]:
        """The clients of a round in ascending order; a Poisson cohort (`client`) varies in size and may be empty."""
        if self.cohort_size == self.num_clients:
            return tuple(range(self.num_clients))
        rng = numpy_rng(self.seed, "cohort", round_index)
        if self.kind == "client":
            return tuple(int(k) for k in (rng.random(self.num_clients) < self.cohort_prob).nonzero()[0])
        return tuple(sorted(int(k) for k in rng.choice(self.num_clients, size=self.cohort_size, replace=False)))

    def record_prob(self, client_id: int) -> float:
        """Probability with which each record of a client enters one of its Poisson batches (0 for a client without records)."""
        size = self.shard_sizes[client_id]
        return min(1.0, self.batch_size / size) if size else 0.0

    # --- clip and noise ---

    @property
    def uniform_weights(self) -> bool:
        """Whether every update enters the sum with weight 1."""
        return self.weighting == "uniform"

    @property
    def update_clip_norm(self) -> float | None:
        """Bound on the norm of a client's update; None where updates are not clipped."""
        return self.clip_norm if self.kind == "client" else None

    @property
    def denominator(self) -> float | None:
        """What the sum of updates is divided by; None for the weight that arrived, which is allowed only without server noise."""
        return self.expected_cohort if self.kind == "client" else None

    @property
    def sum_noise_std(self) -> float:
        """Standard deviation of the server's noise on the sum of updates."""
        return self.noise_multiplier * self.clip_norm if self.kind == "client" else 0.0

    @property
    def noise_std(self) -> float:
        """Standard deviation of the server's noise on the average update; 0 where the noise is added by clients or not at all."""
        return self.sum_noise_std / self.expected_cohort

    @property
    def step_noise_std(self) -> float:
        """Standard deviation of a client's noise on the mean gradient of a private step: z C / B, or z C in `literal`; else 0."""
        if self.kind not in ("example", "literal"):
            return 0.0
        return self.noise_multiplier * self.clip_norm / (self.batch_size if self.kind == "example" else 1)

    # --- accountant ---

    @property
    def accounted_multiplier(self) -> float:
        """Noise over the sensitivity of one release, as given to the accountant; z, but z / (2 sqrt 2) in `literal`."""
        return self.noise_multiplier / (LITERAL_SENSITIVITY if self.kind == "literal" else 1.0)

    @property
    def sampling_prob(self) -> float:
        """Poisson sampling probability given to the accountant (1 for no amplification); of the smallest shard in `example`."""
        if self.kind == "literal":
            return 1.0
        if self.kind == "example":
            return max(self.record_prob(client_id) for client_id in range(self.num_clients))
        return self.cohort_prob

    def num_releases(self, num_rounds: int) -> int:
        """Releases that can depend on one protected unit after `num_rounds`, with its client in every cohort."""
        return num_rounds * (self.num_steps if self.kind == "example" else 1)

    def epsilon(self, num_rounds: int) -> Epsilon | None:
        """Epsilon spent after `num_rounds` rounds; None where there is no guarantee (no noise, or too little for a finite one)."""
        if self.kind == "none" or self.noise_multiplier == 0.0:
            return None
        spent = [
            bound(self.accounted_multiplier, sampling_prob=self.sampling_prob, num_releases=self.num_releases(num_rounds), delta=self.delta)
            for bound in (epsilon_pld, epsilon_rdp)
        ]
        return Epsilon(*spent) if all(math.isfinite(value) for value in spent) else None

    def ledger(self, num_rounds: int) -> dict[str, Any]:
        """What was promised to whom after `num_rounds`: the content of ledger.json.

        `epsilon` is dp-accounting's for `num_releases` Gaussian releases of `noise_multiplier`, Poisson-sampled with
        `sampling_prob`, at `delta`; null where nothing is promised.
        """
        spent, private = self.epsilon(num_rounds), self.kind != "none"
        entries: dict[str, Any] = {
            "unit": {"literal": "example"}.get(self.kind, self.kind),
            "neighbouring_relation": RELATIONS[self.kind],
            "sampler": self._sampler(),
            "sampling_prob": self.sampling_prob,
            "noise_multiplier": self.accounted_multiplier if private else 0.0,
            "clip_norm": self.clip_norm if private else None,
            "num_releases": self.num_releases(num_rounds),
            "delta": self.delta if private else None,
            "epsilon": spent.pld if spent else None,
            "epsilon_rdp": spent.rdp if spent else None,
            "guarantee": self.guarantee(num_rounds),
            "noise_at": NOISE_AT[self.kind],
            "expected_cohort": self.expected_cohort,
            "num_rounds": num_rounds,
            "seeded_noise": private and self.noise_multiplier > 0.0 and not self.secure_noise,
        }
        return entries | self._literal_entries()

    def guarantee(self, num_rounds: int) -> str:
        """One plain sentence: who is protected against whom, by how much, and under which assumptions."""
        if self.kind == "none":
            return NO_GUARANTEE[self.method]
        spent = self.epsilon(num_rounds)
        if spent is None:
            return (
                f"No differential-privacy guarantee: noise_multiplier={self.noise_multiplier:g} is too little noise for a finite epsilon."
            )
        secrecy = (
            "its sampling stays secret" if self.secure_noise else "the run's seed, from which noise and sampling are drawn, stays secret"
        )
        who = PROMISES[self.kind].format(
            budget=f"({spent.pld:.4g}, {self.delta:g})-differentially private", num_rounds=num_rounds, clip=self.clip_norm
        )
        return f"{who}; it holds for the released adapters, not for the diagnostics beside them, and as long as {secrecy}."

    def _sampler(self) -> str:
        if self.kind == "example":
            return "poisson over records"
        if self.kind == "literal":
            return "fixed-size batches (not amplified)"
        if self.cohort_size == self.num_clients:
            return "every client"
        return "poisson over clients" if self.kind == "client" else "fixed-size cohorts"

    def _literal_entries(self) -> dict[str, Any]:
        if self.kind != "literal":
            return {}
        stated = paper_epsilon(self.noise_multiplier, delta=self.delta) if self.noise_multiplier else None
        return {
            "paper_noise_multiplier": self.noise_multiplier,
            "sensitivity_over_clip_norm": LITERAL_SENSITIVITY,
            "paper_epsilon_per_step": stated,
            "paper_epsilon_note": "the paper's formula: of one step, for a sensitivity of C, valid below 1 only; invalid as a total",
        }


RELATIONS = {
    "none": None,
    "client": "add or remove one client",
    "example": "add or remove one record",
    "literal": "replace one record",
}

NOISE_AT = {"none": "none", "client": "server", "example": "client", "literal": "client"}

PROMISES = {
    "client": "Client-level: {num_rounds} rounds are {budget} with respect to adding or removing any one client with all its records "
    "(updates clipped to {clip:g}, noise at a trusted server)",
    "example": "Record-level: what a client sends in {num_rounds} rounds is {budget} with respect to adding or removing any one of its "
    "records, against the server and all others (gradients clipped to {clip:g} per record, noise at the client, its client in every "
    "cohort, shard sizes public)",
    "literal": "Record-level: what a client sends in {num_rounds} rounds is {budget} with respect to replacing any one of its records, "
    "against the server and all others (gradients of A and of B each clipped to {clip:g} per batch, hence a sensitivity of 2 sqrt(2) "
    "times that, no amplification by sampling, its client in every cohort, shard sizes public)",
}
