"""The one frozen object that feeds the sampler, the clip, the noise and the accountant, so that they cannot disagree.

Five kinds, by whom they protect and how:

- `none`: every client, or a fixed-size cohort; nothing is clipped, nothing noised, nothing promised.
- `client`: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963). Updates clipped; noise at the server, at each client (local), or in
  shares under secure aggregation (distributed); clipping may be adaptive (Andrew et al. 2021, arXiv 1905.03871) and the noise of
  a fixed order of clients correlated (banded matrix factorisation, Choquette-Choo et al. 2023, arXiv 2306.08153).
- `example`: DP-SGD at each client (Abadi et al. 2016, arXiv 1607.00133). Poisson batches of records, noise at the client.
- `literal`: DP-LoRA as published (Liu et al. 2023, arXiv 2312.17493), with the accountant its sensitivity calls for.
- `synthesis`: FEDPIT with private self-generation (after Tang et al. 2024, arXiv 2309.11765).

Against a server that sees who takes part (local and distributed noise), sampling does not amplify, and is not accounted.
The guarantee covers the released adapters. It does not cover the other files of a run, such as losses and update norms
by round, which a simulation shows because its data are its own.
Left out: zero-concentrated and discrete noise (no library gives them for this), the cost of choosing hyper-parameters on private data.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysim.config import Config
from raysim.privacy import factorization
from raysim.privacy.accounting import Epsilon, Release, default_delta, epsilon_of, solve_noise_multiplier
from raysim.privacy.noise import gaussian
from raysim.privacy.secagg import majority
from raysim.rng import numpy_rng, seed_for

LITERAL_SENSITIVITY = 2.0 * math.sqrt(2.0)
"""In units of C: replacing a record can carry the clipped mean gradient of A, and that of B, across a ball of diameter 2 C."""


@dataclass(frozen=True)
class Mechanism:
    """How clients and records are drawn, bounded, noised and accounted in a run."""

    kind: str
    """`none`, `client`, `example`, `literal` or `synthesis`."""
    method: str
    """Name of the method, for the sentence that states what is promised."""
    shard_sizes: tuple[int, ...]
    """Records of each client; treated as public."""
    cohort_size: int
    """Clients of a round: exactly, or expected where the cohort is Poisson."""
    weighting: str
    """`examples` or `uniform`."""
    noise_multiplier: float
    """z: noise standard deviation over sensitivity (of a round, with the count's share where clipping is adaptive)."""
    clip_norm: float
    """C: bound on the norm of an update (in the first round, where clipping is adaptive), or of a gradient."""
    delta: float
    """delta of the guarantee."""
    batch_size: int
    """B: (expected) records of a private step, or of all demonstrations of a synthetic record; unused by `none` and `client`."""
    num_steps: int
    """Private steps of a client in a round, or synthetic records; unused by `none` and `client`."""
    secure_noise: bool
    """Whether noise comes from the operating system instead of the run's seed."""
    seed: int
    """Root of the run's random streams."""
    num_rounds: int
    """Rounds planned; noise in a fixed order is scaled to them."""
    noise_at: str = "server"
    """`server`, `client` or `distributed`."""
    sampler: str = "auto"
    """`poisson`, `fixed`, `all` or `cyclic` cohorts of the kind `client`."""
    clipping: str = "flat"
    """`flat` or `adaptive`."""
    clip_quantile: float = 0.5
    """Share of updates that adaptive clipping wants short."""
    clip_lr: float = 0.2
    """Step of log C under adaptive clipping."""
    given_count_noise: float = 0.0
    """Noise standard deviation on the count of short updates; 0 to choose one."""
    num_bands: int = 1
    """Rounds over which the noise of a fixed order is correlated; 1 for independent noise."""
    noise_cohort_size: int = 0
    """Cohort whose noise is simulated; 0 for the real one."""
    population: int = 0
    """Clients from which simulated cohorts are drawn; 0 keeps the real sampling probability."""
    num_drawn: int = 0
    """Clients that are drawn for a round of `cohort_size`, where more are than count (kind `none` alone); 0 for as many."""
    dropout_tolerance: float = 0.0
    """Share of a cohort that may fail while distributed noise still suffices."""
    num_tokens: int = 1
    """Noised token choices of a synthetic record (`synthesis`)."""

    @staticmethod
    def from_config(config: Config, *, shard_sizes: Sequence[int]) -> "Mechanism":
        """The mechanism of a run whose clients hold `shard_sizes` records, its noise solved for where a target epsilon is set.

        Errors: ValueError if `server.cohort_size` exceeds the clients, `auto` is unresolved, no client holds a record, or the
        target or the limit on epsilon cannot be met.
        """
        _check_config(config, shard_sizes)
        kind, privacy = _kind(config), config.privacy
        batch_size, num_steps, num_tokens = _steps(config, kind)
        mechanism = Mechanism(
            kind=kind,
            method=config.method.name,
            shard_sizes=tuple(int(size) for size in shard_sizes),
            cohort_size=config.server.cohort_size or len(shard_sizes),
            weighting=config.server.weighting,
            noise_multiplier=privacy.noise_multiplier,
            clip_norm=privacy.clip_norm,
            delta=privacy.delta,
            batch_size=batch_size,
            num_steps=num_steps,
            secure_noise=privacy.secure_noise,
            seed=config.seed,
            num_rounds=config.server.num_rounds,
            noise_at=privacy.noise_at,
            sampler=privacy.sampler,
            clipping=privacy.clipping,
            clip_quantile=privacy.clip_quantile,
            clip_lr=privacy.clip_lr,
            given_count_noise=privacy.count_noise,
            num_bands=privacy.num_bands,
            noise_cohort_size=privacy.noise_cohort_size,
            population=privacy.population,
            num_drawn=min(len(shard_sizes), math.ceil(config.clients.overselect * config.server.cohort_size)),
            dropout_tolerance=privacy.dropout_tolerance,
            num_tokens=num_tokens,
        )
        return mechanism._checked(target_epsilon=privacy.target_epsilon, max_epsilon=privacy.max_epsilon)

    @staticmethod
    def of_run(config: Config, *, manifest: Mapping[str, Any]) -> "Mechanism":
        """The mechanism of the run whose `partition.json` holds `manifest`: a run, a verification and a selection all take it from here.

        Errors: as `from_config`.
        """
        sizes = held_records(manifest)
        if len(sizes) == 1:  # pooled data are one client, which is always there
            config = dataclasses.replace(config, server=dataclasses.replace(config.server, cohort_size=0))
        return Mechanism.from_config(config, shard_sizes=sizes)

    def _checked(self, *, target_epsilon: float, max_epsilon: float) -> "Mechanism":
        """Itself with a delta, its noise solved for if there is a target."""
        mechanism = dataclasses.replace(self, delta=self.delta or default_delta(max(2, self.num_units)))
        if target_epsilon and self.kind != "none":

            def releases(noise_multiplier: float) -> tuple[Release, ...]:
                return dataclasses.replace(self, noise_multiplier=noise_multiplier).releases(self.num_rounds)

            solved = solve_noise_multiplier(target_epsilon, delta=mechanism.delta, make_releases=releases)
            mechanism = dataclasses.replace(mechanism, noise_multiplier=solved)
        if mechanism.clipping == "adaptive" and not mechanism.count_noise > mechanism.noise_multiplier / 2:
            raise ValueError(
                f"privacy.count_noise={mechanism.count_noise:g} must be more than half the noise multiplier {mechanism.noise_multiplier:g}, "
                "or nothing is left for the updates; raise it, or leave it at 0"
            )
        if max_epsilon and mechanism.affordable_rounds(max_epsilon) == 0:
            raise ValueError(f"privacy.max_epsilon={max_epsilon:g} is less than one round costs; raise it, or privacy.noise_multiplier")
        return mechanism

    # --- sampler ---

    @property
    def num_clients(self) -> int:
        """Clients of the run."""
        return len(self.shard_sizes)

    @property
    def num_units(self) -> int:
        """Clients (of the simulated population, where there is one), or records of all clients: whichever is protected."""
        return self.num_simulated if self.kind == "client" else sum(self.shard_sizes)

    @property
    def num_simulated(self) -> int:
        """Clients among whom one hides: those of the simulated population, where there is one."""
        return (self.population or round(self.noise_cohort_size / self.cohort_prob)) if self.noise_cohort_size else self.num_clients

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

    @property
    def num_cohorts(self) -> int:
        """Cohorts in a cycle of the `cyclic` sampler, and so rounds between two turns of a client."""
        return self.num_clients // self.cohort_size

    def sample_cohort(self, round_index: int) -> tuple[int, ...]:
        """The clients of a round in ascending order; a Poisson cohort (`client`) varies in size and may be empty."""
        if self.sampler == "cyclic":
            return tuple(range(round_index % self.num_cohorts, self.num_clients, self.num_cohorts))
        if max(self.cohort_size, self.num_drawn) == self.num_clients:
            return tuple(range(self.num_clients))
        rng = numpy_rng(self.seed, "cohort", round_index)
        if self.kind == "client" and self.sampler != "fixed":
            return tuple(int(k) for k in (rng.random(self.num_clients) < self.cohort_prob).nonzero()[0])
        return tuple(sorted(int(k) for k in rng.choice(self.num_clients, size=max(self.cohort_size, self.num_drawn), replace=False)))

    def min_survivors(self, cohort_size: int) -> int:
        """Clients of a cohort that must send for distributed noise to suffice: never fewer than unmasking needs."""
        return max(majority(cohort_size), math.ceil((1.0 - self.dropout_tolerance) * cohort_size - 1e-9))

    def record_prob(self, client_id: int) -> float:
        """Probability with which each record of a client enters one of its Poisson batches (0 for a client without records)."""
        size = self.shard_sizes[client_id]
        return min(1.0, self.batch_size / size) if size else 0.0

    # --- clip and noise ---

    @property
    def is_masked(self) -> bool:
        """Whether updates are summed under secure aggregation."""
        return self.kind == "client" and self.noise_at == "distributed"

    @property
    def update_clip_norm(self) -> float | None:
        """Bound on the norm of a client's update (in the first round); None where updates are not clipped."""
        return self.clip_norm if self.kind == "client" else None

    @property
    def denominator(self) -> float | None:
        """What the sum of updates is divided by; None for the weight that arrived, which is allowed only without server noise."""
        return self.expected_cohort if self.kind == "client" else None

    @property
    def count_noise(self) -> float:
        """Noise standard deviation on the count of short updates: given, or m / 20 (Andrew et al. 2021), or z if that is more.

        As accounted: of the simulated cohort, where noise is simulated.
        """
        return self.given_count_noise or max((self.noise_cohort_size or self.cohort_size) / 20, self.noise_multiplier)

    @property
    def _noise_scale(self) -> float:
        """What noise is multiplied by where that of another cohort is simulated, for the same noise on the average."""
        return self.cohort_size / self.noise_cohort_size if self.noise_cohort_size else 1.0

    @property
    def sum_noise_multiplier(self) -> float:
        """The server's noise on the sum of updates, over the clipping bound.

        Under adaptive clipping the updates get (z^-2 - (2 sigma_b)^-2)^(-1/2), so that with the count, whose sensitivity is
        1/2, a round costs what z costs (Andrew et al. 2021, theorem 1).
        """
        z = self.noise_multiplier
        if self.kind != "client" or self.noise_at != "server" or z == 0.0:
            return 0.0
        if self.clipping == "adaptive":
            z = (z**-2 - (2.0 * self.count_noise) ** -2) ** -0.5
        if self.sampler == "cyclic":
            z *= self.sensitivity(self.num_rounds)
        return z * self._noise_scale

    def update_noise_multiplier(self, cohort_size: int) -> float:
        """The noise that each client of a cohort adds to its clipped update, over the clipping bound; 0 where the server adds it."""
        if self.kind != "client" or self.noise_at == "server":
            return 0.0
        return self.noise_multiplier / (math.sqrt(self.min_survivors(cohort_size)) if self.is_masked else 1.0)

    def noise_weights(self, round_index: int) -> dict[int, float]:
        """The rounds whose noise enters this round's sum, and with which weight: row of the inverse factor (1 for itself alone)."""
        if self.num_bands == 1:
            return {round_index: 1.0}
        weights = factorization.noise_weights(round_index, num_bands=self.num_bands)
        return {index: float(weight) for index, weight in enumerate(weights) if weight != 0.0}

    def average_noise_std(self, *, sensitivity: float, round_index: int, cohort_size: int, num_noisy: int) -> float:
        """Standard deviation of the noise on the average update of a round to which `num_noisy` clients of a cohort sent; 0 without noise on updates."""
        if self.kind != "client":
            return 0.0
        mixing = math.sqrt(sum(weight**2 for weight in self.noise_weights(round_index).values()))
        shares = math.sqrt(num_noisy) * self.update_noise_multiplier(cohort_size) if num_noisy else 0.0
        return sensitivity * math.hypot(self.sum_noise_multiplier * mixing, shares) / self.expected_cohort

    def next_clip_norm(self, clip_norm: float | None, *, num_short: int, num_kept: int, round_index: int) -> float | None:
        """The bound of the next round: C exp(-eta (b - gamma)), b the noised share of short updates (Andrew et al. 2021, algorithm 1)."""
        if self.clipping != "adaptive" or clip_norm is None:
            return clip_norm
        std = self.count_noise * self._noise_scale if self.noise_multiplier else 0.0
        noise = float(gaussian(1, std=std, seed=seed_for(self.seed, "count noise", round_index), secure=self.secure_noise)[0])
        share = (num_short - num_kept / 2 + noise) / self.expected_cohort + 0.5
        return clip_norm * math.exp(-self.clip_lr * (share - self.clip_quantile))

    # --- accountant ---

    @property
    def accounted_multiplier(self) -> float:
        """Noise over the sensitivity of one release, as given to the accountant: z, but z / (2 sqrt 2) in `literal`, and z over the
        square root of the tokens of a record in `synthesis`."""
        if self.kind == "synthesis":
            return self.noise_multiplier / math.sqrt(self.num_tokens)
        return self.noise_multiplier / (LITERAL_SENSITIVITY if self.kind == "literal" else 1.0)

    @property
    def sampling_prob(self) -> float:
        """Sampling probability given to the accountant (1 for no amplification); of the smallest shard where records are drawn."""
        if self.kind == "literal" or (self.kind == "client" and (self.noise_at != "server" or self.sampler in ("all", "cyclic"))):
            return 1.0 if not (self.kind == "client" and self.noise_cohort_size and self.population) else self._simulated_prob
        if self.kind in ("example", "synthesis"):
            return max(self.record_prob(client_id) for client_id in range(self.num_clients))
        return self._simulated_prob if self.noise_cohort_size else self.cohort_prob

    @property
    def _simulated_prob(self) -> float:
        return self.noise_cohort_size / self.population if self.population else self.cohort_prob

    def num_releases(self, num_rounds: int) -> int:
        """Releases that can depend on one protected unit after `num_rounds`, with its client in every cohort."""
        return num_rounds * (self.num_steps if self.kind in ("example", "synthesis") else 1)

    def releases(self, num_rounds: int) -> tuple[Release, ...]:
        """What the accountant composes for `num_rounds` rounds."""
        if self.kind == "none" or num_rounds == 0:
            return ()
        if self.sampler == "cyclic":
            share = self.sensitivity(self.num_rounds) / self.sensitivity(num_rounds)
            return (Release(self.noise_multiplier * share, sampler="all"),)
        count = self.num_releases(num_rounds)
        if self.kind == "client" and self.sampler == "fixed":
            return (
                Release(self.noise_multiplier, sampler="fixed", population=self.num_clients, sample_size=self.cohort_size, count=count),
            )
        if self.sampling_prob == 1.0:
            return (Release(self.accounted_multiplier, sampler="all", count=count),)
        return (Release(self.accounted_multiplier, sampler="poisson", sampling_prob=self.sampling_prob, count=count),)

    def epsilon(self, num_rounds: int) -> Epsilon | None:
        """Epsilon spent after `num_rounds` rounds; None where there is no guarantee (no noise, or too little for a finite one)."""
        if self.kind == "none" or self.noise_multiplier == 0.0:
            return None
        spent = _epsilon_of(self.releases(num_rounds), self.delta)
        return spent if math.isfinite(spent.quoted) else None

    def affordable_rounds(self, max_epsilon: float) -> int:
        """The most rounds, up to those planned, whose epsilon stays within `max_epsilon`."""
        low, high = 0, self.num_rounds
        while low < high:
            middle = (low + high + 1) // 2
            spent = self.epsilon(middle)
            low, high = (middle, high) if spent is not None and spent.quoted <= max_epsilon else (low, middle - 1)
        return low

    def sensitivity(self, num_rounds: int) -> float:
        """How far one client moves the noise's inverse factor times the sums of that many rounds, in units of the bound (fixed order)."""
        turns = factorization.participations(num_rounds, num_cohorts=self.num_cohorts)
        return factorization.sensitivity(num_rounds, self.num_bands, max_participations=turns)


def held_records(manifest: Mapping[str, Any]) -> list[int]:
    """The records that each client of a `partition.json` holds, inserted canaries with them."""
    sizes = [int(client["num_examples"]) for client in manifest["clients"]]
    canaries = manifest.get("num_canary_records") or [0] * len(sizes)
    return [size + num for size, num in zip(sizes, canaries, strict=True)]


def _check_config(config: Config, shard_sizes: Sequence[int]) -> None:
    if "auto" in (config.privacy.unit, config.server.weighting):
        raise ValueError("privacy.unit and server.weighting must be resolved; make the configuration with raysim.config.load")
    if config.server.cohort_size > len(shard_sizes):
        raise ValueError(f"server.cohort_size={config.server.cohort_size} must be at most the number of clients, {len(shard_sizes)}")
    if not any(shard_sizes):
        raise ValueError("partition: no client holds a record; raise data.num_train")
    if config.privacy.unit == "client" and config.server.weighting != "uniform":
        raise ValueError(f"server.weighting={config.server.weighting!r} is unbounded in one client; privacy.unit='client' needs 'uniform'")


def _kind(config: Config) -> str:
    if config.privacy.unit != "example":
        return config.privacy.unit
    if config.method.spec.writes:
        return "synthesis"
    return "literal" if config.dplora.mode == "literal" else "example"


def _steps(config: Config, kind: str) -> tuple[int, int, int]:
    """Expected records of a private step, steps of a round, and noised choices of a step."""
    fedpit, dplora = config.fedpit, config.dplora
    if kind == "synthesis":
        return fedpit.num_subsets * fedpit.subset_size, fedpit.num_candidates, fedpit.max_instruction_tokens + fedpit.max_response_tokens
    return dplora.batch_size, 1 if kind == "literal" else dplora.num_steps, 1


@functools.lru_cache(maxsize=4096)
def _epsilon_of(releases: tuple[Release, ...], delta: float) -> Epsilon:
    return epsilon_of(releases, delta=delta)
