"""What the files of a run's folder hold, as the readers in `folders` give it: the contract that other programs read.

A key that is not listed here is passed over, so that a later version may add one; a key that is missing, or of another kind, is refused by
the reader with the file's name. A field with a default stands in a file only where there is something to say. Figures of utility and
leakage are means over records (`evaluate`), sizes are bytes, durations seconds, losses nats a token.
Left out: what no reader here asks for, such as the criteria of a judge or the parameters that only one kind of noise has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raysim.privacy.accounting import Release


@dataclass(frozen=True)
class Eval:
    """The utility of an adapter; what starts with `label_` and `choice_` only where such questions were asked."""

    heldout_nll: float
    """Mean loss a token on held-out records."""
    heldout_perplexity: float
    heldout_rouge_l: float | None
    """None where no answer was asked for."""
    heldout_nll_interval: tuple[float, float] | None = None
    """95%, over records; means over clients have none."""
    label_accuracy: float | None = None
    """Share of held-out records of which the likeliest label is the right one."""
    label_accuracy_interval: tuple[float, float] | None = None
    """95%, exact."""
    label_macro_f1: float | None = None
    label_accuracy_of_commonest: float | None = None
    """What always naming the commonest label would give."""
    label_macro_f1_of_commonest: float | None = None
    choice_num_questions: int | float | None = None
    choice_accuracy: float | None = None
    choice_accuracy_per_byte: float | None = None
    """The same by likelihood a byte of the option's text."""
    choice_accuracy_by_chance: float | None = None


@dataclass(frozen=True)
class Memory:
    """What an adapter remembers of training records beyond held-out ones, by likelihood (see `attacks.memory.memory_report`); means over clients have no intervals."""

    bits_per_record: float
    nats_per_token: float
    auc: float | None
    """How well it tells a training record from a held-out one; None where there was one training record."""
    tpr_at_1pct: float
    """Share of training records found where a hundredth of the held-out ones is taken for such."""
    num_members: int | float
    """Training records compared."""
    num_heldout: int | float
    strata: str | None
    """`label` where records are compared with those of their label, `all` where with all; None where clients differ in it."""
    bits_per_record_interval: tuple[float, float] | None = None
    nats_per_token_interval: tuple[float, float] | None = None
    auc_interval: tuple[float, float] | None = None
    tpr_at_1pct_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class SampledExtraction:
    """How many records come out word by word when the attacker samples, by number of queries (see `attacks.memory.extraction_report`)."""

    queries: tuple[int, ...]
    members: tuple[float, ...]
    """Shares of the training records that come out within so many."""
    heldout: tuple[float, ...]
    probability: float
    """How surely."""
    temperature: float
    top_k: int
    target_tokens: int
    median_bits_members: float | None
    """-log2 of the probability that one query gives the record; None where more than half never come out."""
    median_bits_heldout: float | None
    num_members: int | float
    """Records with a target."""
    num_heldout: int | float


@dataclass(frozen=True)
class Details:
    """What training added to private details, less what it added to such details of held-out records (see `attacks.details.details_report`)."""

    num_details: int | float
    num_control: int | float
    gain_bits: float
    """By how many bits a detail became likelier, over the base model."""
    gain_bits_members: float
    gain_bits_control: float
    num_exposed: int | float
    """Details that were ranked among references."""
    exposure: float | None = None
    """In bits; None where none was ranked."""
    exposure_members: float | None = None
    exposure_control: float | None = None
    num_references: float | None = None
    max: float | None = None
    """What the exposure could have come to."""
    gain_bits_interval: tuple[float, float] | None = None
    exposure_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Attack:
    """What an extraction attack got out of an adapter: `train` of records trained on, `heldout` of the control, `prefixed` with the longer prefix."""

    train_rouge_l: float
    train_exact_match: float
    """Share of answers that are the record word by word."""
    train_details_rate: float | None
    """Share of the private details that came out; None where the records have none."""
    heldout_rouge_l: float
    heldout_exact_match: float
    heldout_details_rate: float | None
    num_examples: int | float
    """Attacked records."""
    prefixed_train_rouge_l: float | None = None
    prefixed_heldout_rouge_l: float | None = None
    memory: Memory | None = None
    """None where it was not measured."""
    extraction: SampledExtraction | None = None
    details: Details | None = None


@dataclass(frozen=True)
class Private:
    """Means over the adapters that clients keep for themselves."""

    eval: Eval | None
    attack: Attack | None


@dataclass(frozen=True)
class CrossClient:
    """What clients draw out of the release of each other's details: means over attackers, and a row for each of them."""

    coverage: float | None
    heldout_coverage: float | None
    """The same of details that nobody has: what is guessed."""
    efficiency: float | None
    """Details found a query."""
    num_queries: int
    by_attacker: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Exposure:
    """How exposed the Secret Sharer canaries are, in bits."""

    by_multiplicity: Mapping[str, float]
    """By how often a secret was inserted."""
    max: float
    """The most that could be seen."""
    num_secrets: int
    round_index: int | None = None
    """Where the row stands in audit.json; a round's record has its own."""


@dataclass(frozen=True)
class Nearest:
    """How near the kept synthetic responses of a round come to private ones (ROUGE-L)."""

    median: float
    max: float


@dataclass(frozen=True)
class Fate:
    """What became of the synthetic candidates of a round."""

    num_candidates: int
    num_kept: int
    num_rejected: Mapping[str, int]
    """By reason."""
    duplicate_rate: float
    """Share of candidates whose instruction repeats another one's."""
    response_rouge_l: Nearest | None = None


@dataclass(frozen=True)
class Backdoor:
    """How often a release gives a backdoor's answer."""

    success_rate: float
    """Share of held-out prompts with the trigger that bring it."""
    control_rate: float
    """The same without the trigger."""
    num_prompts: int


@dataclass(frozen=True)
class Failure:
    """A client whose update did not count in a round."""

    client_id: int
    reason: str


@dataclass(frozen=True)
class RoundRecord:
    """A line of rounds.jsonl; that of the untouched base model has index -1, an empty cohort and no traffic."""

    round_index: int
    cohort: tuple[int, ...]
    """The clients drawn, ascending."""
    num_tokens: int
    """Tokens trained on."""
    num_dropped: int
    """Updates that were not finite, and left out."""
    train_loss: float | None
    update_norm_median: float | None
    clip_fraction: float | None
    noise_std: float
    """Standard deviation of the noise on each parameter of the average."""
    signal_to_noise: float | None
    epsilon: float | None
    """Spent so far; None where nothing is promised."""
    uplink_bytes: int
    downlink_bytes: int
    wall_s: float
    tokens_per_s: float | None
    eval: Eval | None
    attack: Attack | None
    num_failed: int = 0
    """Clients drawn whose updates did not count: they sent nothing, or what is not finite (`num_dropped`)."""
    failures: tuple[Failure, ...] = ()
    """Each of them, and why."""
    num_late: int = 0
    """Clients that sent after the deadline, and count in the next round."""
    simulated_s: float = 0.0
    """Simulated time that the server waited for its clients."""
    num_steps: int = 0
    """Optimiser steps of all clients."""
    client_s: float = 0.0
    """Time that training took."""
    epsilon_rdp: float | None = None
    clip_norm: float | None = None
    client_clip_fraction: float | None = None
    """Share of examples clipped at the clients, where updates are clipped as well."""
    num_contributed: int | None = None
    exactness_gap: float | None = None
    """How far the release is from the mean of what the clients trained, as a share of how far that mean moved; None where it was not measured."""
    empty_round: bool = False
    aborted: bool = False
    """Too few clients sent, to open a secure sum or for `server.min_clients`: nothing was released."""
    synthetic: Fate | None = None
    private: Private | None = None
    exposure: Exposure | None = None
    cross_client: CrossClient | None = None
    backdoor: Backdoor | None = None


@dataclass(frozen=True)
class Ledger:
    """ledger.json: what was promised to whom, and what it was accounted for."""

    unit: str
    """Whom a promise protects: `client`, `example`, or `none`."""
    neighbouring_relation: str | None
    sampler: str
    sampling_prob: float
    noise_multiplier: float
    """As configured, or as solved for."""
    accounted_multiplier: float
    """What the accountant is given: noise over the sensitivity of one release."""
    clip_norm: float | None
    num_releases: int
    delta: float | None
    epsilon: float | None
    epsilon_rdp: float | None
    guarantee: str
    """The promise in a sentence."""
    simulated: bool
    """Whether the noise was drawn for a larger cohort than trained."""
    num_rounds: int
    noise_at: str
    expected_cohort: float
    releases: tuple[Release, ...]
    accountant: str | None
    seeded_noise: bool
    paper_epsilon_per_step: float | None = None
    """Of the published algorithm: what its paper states for a step."""


@dataclass(frozen=True)
class ClientShard:
    """What a client holds."""

    client_id: int
    num_examples: int
    num_tokens: int
    label_counts: Mapping[str, int]


@dataclass(frozen=True)
class Partition:
    """partition.json: who holds what."""

    sha256: str
    """Of every client's records, in order."""
    num_clients: int
    clients: tuple[ClientShard, ...]
    num_heldout: int
    num_cut: int
    """Training responses that were cut to `max_length` tokens."""
    num_heldout_cut: int
    max_length: int
    num_canary_records: tuple[int, ...]
    """Inserted for audits, by client."""
    num_copies: int
    num_exact_copies: int
    num_left_out: int = 0
    """Records of a file that could not be used."""
    num_conversations_cut: int = 0
    num_details_left_out: int = 0


@dataclass(frozen=True)
class Environment:
    """environment.json: what computed the run, and from what."""

    raysim: str
    commit: str | None
    python: str
    platform: str
    processor: str
    num_cpus: int | None
    gpus: tuple[str, ...]
    packages: Mapping[str, str | None]
    likeness: str
    """How likeness of texts is measured."""
    inputs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """By configuration key and file, the print of what was read (see `inputs`)."""
    chat: Mapping[str, Any]
    """How conversations are written."""


@dataclass(frozen=True)
class Summary:
    """summary.json: what a run came to, written when it is over; of an unfinished run, what its rounds so far amount to."""

    name: str
    method: str
    seed: int
    num_rounds: int
    eval: Eval | None
    attack: Attack | None
    private: Private | None
    cross_client: CrossClient | None
    unit: str | None
    epsilon: float | None
    delta: float | None
    guarantee: str
    simulated: bool
    num_dropped: int
    uplink_bytes: int
    downlink_bytes: int
    tokens_per_s: float | None
    wall_s: float
    num_tokens: int
    simulated_s: float = 0.0
    """Simulated time of all rounds."""
    num_parameters: int | None = None
    """Of a released adapter."""
    num_base_parameters: int | None = None
    """Of the base model."""
    adapter_sha256: str | None = None
    method_note: str | None = None
    finished: bool = True


@dataclass(frozen=True)
class Answer:
    """A line of answers.jsonl: a record or question, and what an adapter made of it after a round."""

    round_index: int
    owner: int | None
    """The client that keeps the adapter; None for the release."""
    side: str
    """`heldout`, `control`, `train`, `prefixed_control`, `prefixed_train`, `member` (a training record's likelihood), or `choice` for a question."""
    record_id: int | None = None
    question: int | None = None
    nll: float | None = None
    """Summed over the tokens."""
    num_tokens: int | None = None
    client_id: int | None = None
    """Of a member, who holds it."""
    label: str | None = None
    base_nll: float | None = None
    """Under the base model, of a member and of a held-out record that is compared with them."""
    extraction_bits: float | None = None
    """-log2 of the probability that sampling writes the target; None where it never does."""
    target_tokens: int | None = None
    """Tokens of the target; 0 where the prefix leaves none."""
    details: tuple[Mapping[str, Any], ...] | None = None
    """Its private details, each with its bits, and with its exposure where it was ranked (see `attacks.details.detail_rows`)."""
    instruction: str | None = None
    reference: str | None = None
    """The record's own response."""
    answer: str | None = None
    rouge_l: float | None = None
    label_right: bool | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Synthetic:
    """A line of synthetic.jsonl: a candidate and what became of it."""

    client_id: int
    round_index: int
    instruction: str
    response: str
    kept: bool
    verdict: str
    """`kept`, or the filter that dropped it."""
    max_rouge_l: float | None = None
    score: float | None = None
    response_rouge_l: float | None = None
    """The largest ROUGE-L with a private record of its client."""


@dataclass(frozen=True)
class Judged:
    """A line of judged.jsonl: an answer and whether it won against the record's own; no outcome where a reply could not be read."""

    record_id: int
    outcome: str | None


@dataclass(frozen=True)
class Judge:
    """judge.json: what a judge made of a run's last answers."""

    made_from: Mapping[str, Any]
    """The judge's kind, model and settings, and the hash of the answers."""
    words: str


@dataclass(frozen=True)
class ExposureByRound:
    """The exposure of canaries after each round that measured it."""

    by_round: tuple[Exposure, ...]


@dataclass(frozen=True)
class Audit:
    """audit.json: what attacks on the release found; None for what was not tried."""

    one_run: Mapping[str, Any] | None = None
    membership: Mapping[str, Mapping[str, Any]] | None = None
    """By score, its report."""
    inversion: tuple[Mapping[str, Any], ...] | None = None
    exposure: ExposureByRound | None = None
    roc: Mapping[str, Mapping[str, Any]] | None = None
    """Of `canaries` and of records (`membership`): the measured curve, and what the ledger allows at each false-positive rate."""


@dataclass(frozen=True)
class Member:
    """A run of a comparison: an entry with a seed; entries that come to the same run share its folder."""

    entry: str
    seed: int
    folder: str


@dataclass(frozen=True)
class Comparison:
    """comparison.json: whose claims are decided (empty for none), and by which runs."""

    claims: str
    members: tuple[Member, ...]
