"""What the configuration refuses, before any work: values out of bounds, and the one table of what cannot be combined.

`load`, every point of a sweep and the pages of keys read the same rows. Left out: checks that need the data, the model or
the cluster, which are made where each is first read.
"""

import datetime
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raysim.config.auto import where_noise_is_added
from raysim.config.schema import KEYS, TODAY, Config, DataConfig, Key, lacking, value_of
from raysim.errors import check_folder_name, check_path, did_you_mean, shown
from raysim.lora import spec as lora_rules
from raysim.methods import spec as methods
from raysim.remote import check_url

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


@dataclass(frozen=True)
class Rule:
    """A combination that is refused, as data: the refusal and the page of a key are made of the same row."""

    about: str
    """The key, with the value that is refused: as it stands (`privacy.unit='client'`), or `{value}` for whichever is set."""
    when: Callable[[Config], bool]
    reason: str
    """Why it is refused; values of other keys stand as `{method.name}`."""
    remedy: str = ""
    """What to do instead, where the reason does not say it."""

    @property
    def key(self) -> str:
        """The key whose value is refused."""
        return re.split("[= ]", self.about, maxsplit=1)[0]


def refusal(rule: Rule, config: Config) -> str:
    """The line that refuses `config` by `rule`, with its values."""
    cohort = config.server.cohort_size or config.partition.num_clients
    values = {"value": shown(value_of(config, rule.key)), "cycle": config.partition.num_clients // cohort}
    return _sentence(rule).format(**vars(config), **values)


def statement(rule: Rule) -> str:
    """What `rule` says of any configuration: its line without values."""
    return re.sub(r" \([\w.]*=?\{[^{}]*\}\)|(, not |=)?\{[^{}]*\}", "", _sentence(rule))


def concerns(rule: Rule, key: str) -> bool:
    """Whether a rule names a key (a word such as `name` or `out` is one only where the rule is about it)."""
    return key == rule.key if "." not in key else re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", _sentence(rule)) is not None


def _sentence(rule: Rule) -> str:
    return f"{rule.about} {rule.reason}{'; ' * bool(rule.remedy)}{rule.remedy}"


def refuse(rules: Iterable[Rule], config: Config) -> None:
    """Refuses `config` by the first rule that holds.

    Errors: ValueError of one line.
    """
    for rule in rules:
        if rule.when(config):
            raise ValueError(refusal(rule, config))


# --- combinations


def unused_privacy(config: Config) -> dict[str, Any]:
    """The privacy keys that are set but mean nothing for this run's unit, with the values that unset them.

    A run is refused for them; the entries of a comparison do without.
    """
    found = {}
    for key in _ONLY:
        unset = where_noise_is_added(config) if key.name == "privacy.noise_at" else key.default
        if value_of(config, key.name) != unset and lacking(key.only, config):
            found[key.name] = unset
    return found


_ONLY = tuple(key for key in KEYS.values() if key.only)


def _unused(key: Key, *, unit: str, remedy: str) -> Rule:
    def when(config: Config) -> bool:
        return config.privacy.unit == unit and not (config.compare or config.sweep.space) and key.name in unused_privacy(config)

    return Rule(key.name, when, f"is set but means nothing with privacy.unit={unit!r} (method.name={{method.name!r}})", remedy)


def _unused_rules() -> Iterator[Rule]:
    for key in _ONLY:
        yield _unused(key, unit="none", remedy="set privacy.unit=client, or method.name=dplora, or leave it out")
        if key.only == "privacy.unit=client":
            at_client = key.name == "privacy.noise_at"
            remedy = "noise is added at the client: use 'client'" if at_client else "it is for privacy.unit='client'"
            yield _unused(key, unit="example", remedy=remedy)


UNUSED_RULES = tuple(_unused_rules())
"""Of the keys that are refused unless `privacy.unit` is as they need it."""


def _for_clients(when: Callable[[Config], bool]) -> Callable[[Config], bool]:
    return lambda config: config.privacy.unit == "client" and when(config)


def _for_canaries(when: Callable[[Config], bool]) -> Callable[[Config], bool]:
    return lambda config: config.audit.num_canaries > 0 and when(config)


def num_hostile(num_clients: int, share: float) -> int:
    """How many of the clients are hostile."""
    return int(share * num_clients + 1e-9)


def hostile_note(config: Config) -> str:
    """How many clients are hostile, in which way, and how the server combines updates, in words; empty where none is."""
    if config.adversary.attack == "none":
        return ""
    num = num_hostile(config.partition.num_clients, config.adversary.share)
    return (
        f"{num} of {config.partition.num_clients} clients {'is' if num == 1 else 'are'} hostile ({config.adversary.attack}); "
        f"the server combines updates by {config.server.rule}"
    )


OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.lr_schedule",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_param": "deepspeed.offload",
    "zero_optimization.offload_optimizer": "deepspeed.offload",
}
"""What DeepSpeed's own configuration may not say, and the key that says it."""


def _together(config: Config) -> bool:
    """Whether several clients are asked to train in one pass."""
    return config.clients.batched not in ("auto", "1")


def _ours(config: Config) -> list[str]:
    """The entries of `deepspeed.config` that other keys say."""
    zero = config.deepspeed.config.get("zero_optimization", {})
    named = {*config.deepspeed.config, *(f"zero_optimization.{name}" for name in (zero if isinstance(zero, dict) else {}))}
    return sorted(named & OURS.keys())


def _cohort(config: Config) -> int:
    return config.server.cohort_size or config.partition.num_clients


def _at_the_server(key: str, when: Callable[[Config], bool]) -> Rule:
    """What only the server can do with updates."""
    reason = "needs privacy.noise_at='server', not {privacy.noise_at!r}"
    return Rule(key, _for_clients(lambda c: c.privacy.noise_at != "server" and when(c)), reason)


def _needs_a_path(key: str, value: str, path: str, what: str) -> Rule:
    """A source that is nothing without a path, unless a comparison's entries or a sweep's points, each of which is validated, may set it."""

    def when(config: Config) -> bool:
        set_later = bool(config.compare) or path in config.sweep.space or path.partition(".")[0] in config.sweep.space
        return value_of(config, key) == value and not value_of(config, path) and not set_later

    return Rule(path, when, f"is empty but {key}={value!r} needs {what}")


def _no_client_guarantee() -> Iterator[Rule]:
    for spec in lora_rules.RULES.values():
        if spec.no_client:
            yield Rule(
                "privacy.unit='client'",
                _for_clients(lambda c, name=spec.name: c.lora.aggregation == name),  # type: ignore[misc]  # a default that binds
                f"is no guarantee with lora.aggregation={spec.name!r}: {spec.no_client}",
                f"use {lora_rules.named(lambda one: not one.no_client)}",
            )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _ranks_in_shares(config: Config) -> list[int]:
    return [int(rank) for rank in config.lora.rank_shares if rank.isdecimal()]


def _is_owned(config: Config) -> bool:
    return bool(config.lora.client_ranks or config.lora.rank_shares)


def _combines(config: Config) -> bool:
    """Whether adapters are combined otherwise than by averaging."""
    return config.lora.aggregation != next(iter(lora_rules.RULES))


CLIENT_METHODS = methods.named(lambda spec: "client" in spec.units)
STEPPING_METHODS = methods.named(lambda spec: spec.steps_privately)
RULES: tuple[Rule, ...] = (
    Rule(
        "model.name", lambda c: not c.model.name.strip(), "is empty", "name a model, such as smollm2-135m-instruct, or the path of a folder"
    ),
    Rule("compare_seeds={value}", lambda c: len(set(c.compare_seeds)) < len(c.compare_seeds), "must be different numbers"),
    Rule(
        "lora.target_modules={value}",
        lambda c: not c.lora.target_modules,
        "adapts nothing",
        "name at least one linear layer, such as q_proj",
    ),
    Rule(
        "lora.target_modules={value}",
        lambda c: not all(name.strip() for name in c.lora.target_modules),
        "holds an empty name",
        "name layers, such as q_proj",
    ),
    Rule(
        "data.chat_field={value}",
        lambda c: bool(c.data.chat_field and c.data.preset),
        "means nothing with data.preset={data.preset!r}, which has its own fields",
        "leave one out",
    ),
    Rule(
        "server.cohort_size={value}",
        lambda c: c.server.cohort_size > c.partition.num_clients,
        "must be at most partition.num_clients={partition.num_clients}",
    ),
    Rule(
        "clients.dropout_by_client={value}",
        lambda c: len(c.clients.dropout_by_client) not in (0, c.partition.num_clients),
        "must have one probability for each of partition.num_clients={partition.num_clients} clients",
    ),
    Rule(
        "evaluate.exactness_gap=true",
        lambda c: c.evaluate.exactness_gap and c.privacy.unit == "client",
        "would be that of the noise, which privacy.unit='client' adds to the mean",
        "leave it out",
    ),
    Rule(
        "evaluate.exactness_gap=true",
        lambda c: c.evaluate.exactness_gap and (c.server.rule != "mean" or c.server.optimizer != "none" or c.server.lr != 1),
        "is one from the mean, and server.rule={server.rule!r} with server.optimizer={server.optimizer!r} makes something else on purpose",
        "leave it out",
    ),
    Rule(
        "evaluate.exactness_gap=true",
        lambda c: c.evaluate.exactness_gap and (c.method.spec.separates or not c.method.spec.trains or c.lora.spec.personal),
        "needs one adapter that all clients train, and share whole",
        "leave it out",
    ),
    Rule(
        "evaluate.exactness_gap=true",
        lambda c: c.evaluate.exactness_gap and (c.adversary.attack != "none" or c.clients.late == "stale"),
        "needs clients that send what they trained, in the round in which they trained it",
        "leave it out",
    ),
    Rule(
        "clients.overselect={value}",
        lambda c: c.clients.overselect > 1 and not c.server.cohort_size,
        "draws more clients than a round needs, and server.cohort_size=0 needs them all",
        "set server.cohort_size",
    ),
    Rule(
        "clients.overselect={value}",
        lambda c: c.clients.overselect > 1 and c.privacy.unit != "none",
        "lets one client decide by its speed whether another one counts, which privacy.unit={privacy.unit!r} does not account for",
        "use 1",
    ),
    Rule(
        "clients.deadline_s={value}",
        lambda c: (
            c.clients.deadline_s > 0 and (c.privacy.unit == "example" or (c.privacy.unit == "client" and c.privacy.noise_at != "server"))
        ),
        "shows how long a client's records are by whether it comes in time, which no noise covers with privacy.unit={privacy.unit!r} and "
        "privacy.noise_at={privacy.noise_at!r}",
        "use 0, or privacy.unit=client with privacy.noise_at=server",
    ),
    Rule(
        "clients.late='stale'",
        lambda c: c.clients.late == "stale" and c.privacy.unit == "client",
        "lets a client count twice in a round, more than privacy.unit='client' bounds",
        "use 'drop'",
    ),
    Rule(
        "clients.late='stale'",
        lambda c: c.clients.late == "stale" and (c.method.spec.has_control_variate or c.lora.aggregation != "average"),
        "adds updates of the round before to a sum, which lora.aggregation={lora.aggregation!r} and control variates of another round are not",
        "use 'drop'",
    ),
    Rule(
        "clients.late='stale'",
        lambda c: c.clients.late == "stale" and c.server.rule != "mean",
        "adds sums of the round before, and server.rule={server.rule!r} looks at every update by itself",
        "use 'drop'",
    ),
    Rule(
        "server.rule={value}",
        lambda c: c.server.rule != "mean" and c.privacy.unit == "client",
        "looks at every client's own update, which privacy.unit='client' adds noise to the sum of: how far one client moves such a rule is not "
        "bounded by privacy.clip_norm",
        "use 'mean', which clips every update",
    ),
    Rule(
        "server.rule={value}",
        lambda c: c.server.rule != "mean" and (c.method.spec.has_control_variate or c.lora.aggregation != "average"),
        "combines updates of the adapter alone, not what lora.aggregation={lora.aggregation!r} merges by itself, nor control variates",
        "use 'mean'",
    ),
    Rule(
        "adversary.share={value}",
        lambda c: c.adversary.attack != "none" and not num_hostile(c.partition.num_clients, c.adversary.share),
        "makes none of partition.num_clients={partition.num_clients} clients hostile",
        "raise it",
    ),
    Rule(
        "adversary.attack={value}",
        lambda c: c.adversary.attack != "none" and (c.method.spec.pools or c.method.spec.separates or not c.method.spec.trains),
        "needs clients that send updates, which method.name={method.name!r} has not",
        "use method.name=fedit",
    ),
    Rule(
        "adversary.attack={value}",
        lambda c: (
            c.adversary.attack in ("sign_flip", "scale", "gaussian", "replacement")
            and c.privacy.unit == "client"
            and c.privacy.noise_at != "server"
        ),
        "would be clipped by privacy.noise_at={privacy.noise_at!r} where the client is, which a hostile one need not do",
        "use privacy.noise_at=server",
    ),
    Rule(
        "adversary.trigger and adversary.target",
        lambda c: c.adversary.has_trigger and not (c.adversary.trigger.strip() and c.adversary.target.strip()),
        "must not be empty with adversary.attack={adversary.attack!r}",
    ),
    Rule(
        "server.min_clients={value}",
        lambda c: c.server.min_clients > 1 and c.privacy.unit == "client",
        "would tell how many clients came, which privacy.unit='client' does not account for",
        "use 1; distributed noise has privacy.dropout_tolerance",
    ),
    Rule(
        "server.min_clients={value}",
        lambda c: (
            c.server.min_clients > (c.server.cohort_size or c.partition.num_clients) and c.method.spec.trains and not c.method.spec.pools
        ),
        "is more than a round has clients",
        "lower it",
    ),
    Rule(
        "partition.num_clients={value}",
        lambda c: 0 < c.data.num_train < c.partition.num_clients * c.partition.min_examples,
        "is more than data.num_train={data.num_train} examples can fill with partition.min_examples={partition.min_examples}",
        "lower num_clients or raise num_train",
    ),
    Rule(
        "privacy.unit='example'",
        lambda c: c.privacy.unit == "example" and "example" not in c.method.spec.units,
        f"needs method.name={methods.named(lambda spec: 'example' in spec.units)} (method.name={{method.name!r}} does not bound what one record does)",
    ),
    Rule(
        "privacy.unit={value}",
        lambda c: c.privacy.unit not in c.method.spec.units and "none" not in c.method.spec.units,
        f"does not fit method.name={methods.named(lambda spec: 'none' not in spec.units)}, whose unit is 'example'",
        "for client-level privacy use method.name=fedit",
    ),
    Rule(
        "privacy.unit='client'",
        _for_clients(lambda c: c.method.spec.has_control_variate),
        f"does not cover method.name={methods.named(lambda spec: spec.has_control_variate)}: control variates are a second upload, "
        "neither clipped nor noised",
        "use method.name=fedit",
    ),
    Rule(
        "privacy.unit='client'",
        _for_clients(lambda c: "client" not in c.method.spec.units),
        f"is a guarantee for method.name={CLIENT_METHODS} only, not {{method.name!r}}",
    ),
    Rule(
        "server.weighting='examples'",
        _for_clients(lambda c: c.server.weighting == "examples"),
        "is unbounded in one client and has no guarantee with privacy.unit='client'",
        "use uniform",
    ),
    Rule(
        "fedpit.share_mix and fedpit.scorer",
        lambda c: c.privacy.unit == "example" and c.method.spec.writes and (c.fedpit.share_mix > 0 or c.fedpit.scorer != "none"),
        "use private records: privacy.unit='example' needs share_mix=0 and scorer='none'",
    ),
    *UNUSED_RULES,
    *_no_client_guarantee(),
    Rule(
        "lora.aggregation={value}",
        lambda c: _combines(c) and (c.method.spec.separates or not c.method.spec.trains),
        "means nothing with method.name={method.name!r}, which shares no adapter",
        "leave it out",
    ),
    Rule(
        "lora.aggregation={value}",
        lambda c: c.method.spec.has_control_variate and not c.lora.spec.fixed,
        f"does not fit method.name={methods.named(lambda spec: spec.has_control_variate)}: a control variate corrects the same entries in every round",
        f"use {lora_rules.named(lambda one: one.fixed)}",
    ),
    Rule(
        "lora.aggregation={value}",
        lambda c: c.lora.spec.moves_base and c.method.spec.has_private_adapter,
        f"does not fit method.name={methods.named(lambda spec: spec.has_private_adapter)}: an adapter that a client keeps stands on the base of its "
        "round, which the rule moves",
        "use 'average'",
    ),
    Rule(
        "lora.aggregation={value}",
        lambda c: c.lora.spec.personal and c.method.spec.has_private_adapter,
        f"does not fit method.name={methods.named(lambda spec: spec.has_private_adapter)}, whose clients keep an adapter of another kind",
        "use 'average'",
    ),
    Rule(
        "lora.aggregation={value}",
        lambda c: _combines(c) and c.method.spec.steps_privately and c.dplora.mode == "literal",
        "is not in the algorithm of dplora.mode='literal', whose sensitivity is that of A and B clipped each by itself",
        "use dplora.mode=example",
    ),
    Rule(
        "lora.aggregation={value}",
        lambda c: c.audit.canary == "update" and c.audit.num_canaries > 0 and (not c.lora.spec.linear or c.lora.spec.personal),
        "makes new coordinates of every mean, along which no update canary can be followed",
        f"use {lora_rules.named(lambda one: one.linear and not one.no_client)}, or audit.num_canaries=0",
    ),
    Rule(
        "server.optimizer={value}",
        lambda c: c.server.optimizer != "none" and not c.lora.spec.linear,
        "remembers steps in coordinates that lora.aggregation={lora.aggregation!r} makes anew in every round",
        "use 'none'",
    ),
    Rule(
        "server.lr={value}",
        lambda c: c.server.lr != 1.0 and not c.lora.spec.linear,
        "means nothing with lora.aggregation={lora.aggregation!r}, which makes new factors and adds no update",
        "use 1",
    ),
    Rule(
        "lora.client_ranks={value}",
        lambda c: _is_owned(c) and not c.lora.spec.own_ranks,
        "needs lora.aggregation="
        + lora_rules.named(lambda spec: spec.own_ranks)
        + ", not {lora.aggregation!r}, which takes all of one rank",
    ),
    Rule(
        "lora.client_ranks={value}",
        lambda c: _is_owned(c) and (c.method.spec.pools or c.method.spec.has_private_adapter),
        "means nothing with method.name={method.name!r}: pooled data are one client's, and an adapter that clients keep has the rank of the release",
        "leave it out",
    ),
    Rule(
        "lora.client_ranks={value}",
        lambda c: bool(c.lora.client_ranks and c.lora.rank_shares),
        "and lora.rank_shares are two ways to say the same",
        "leave one out",
    ),
    Rule(
        "lora.client_ranks={value}",
        lambda c: bool(c.lora.client_ranks) and len(c.lora.client_ranks) != c.partition.num_clients,
        "must name a rank for each of partition.num_clients={partition.num_clients}",
        "or give shares of clients by rank",
    ),
    Rule(
        "lora.client_ranks={value}",
        lambda c: max(c.lora.client_ranks, default=0) > c.lora.rank,
        "must be at most lora.rank={lora.rank}, the rank of the server's adapter",
        "raise lora.rank",
    ),
    Rule(
        "lora.rank_shares={value}",
        lambda c: (
            bool(c.lora.rank_shares)
            and not (
                len(_ranks_in_shares(c)) == len(c.lora.rank_shares)
                and all(0 < rank <= c.lora.rank for rank in _ranks_in_shares(c))
                and all(map(_is_share, c.lora.rank_shares.values()))
                and math.isclose(sum(c.lora.rank_shares.values()), 1.0, abs_tol=1e-6)
            )
        ),
        "must map ranks of at most lora.rank={lora.rank} to shares of clients that sum to 1, such as 4 and 16 to 0.5 each",
    ),
    Rule(
        "privacy.sampler='all'",
        _for_clients(lambda c: c.privacy.sampler == "all" and _cohort(c) != c.partition.num_clients),
        "contradicts server.cohort_size={server.cohort_size}",
        "use 'poisson', or cohort_size=0",
    ),
    _at_the_server("privacy.clipping", lambda c: c.privacy.clipping != "flat"),
    _at_the_server("privacy.noise_cohort_size", lambda c: c.privacy.noise_cohort_size > 0),
    Rule(
        "privacy.sampler='fixed'",
        _for_clients(lambda c: c.privacy.sampler == "fixed" and (c.privacy.clipping == "adaptive" or c.privacy.noise_at != "server")),
        "has no event in the accountant for privacy.clipping='adaptive', nor for privacy.noise_at='client' or 'distributed'",
        "use 'poisson' or 'all'",
    ),
    Rule(
        "privacy.sampler='cyclic'",
        _for_clients(
            lambda c: (
                c.privacy.sampler == "cyclic"
                and bool(c.partition.num_clients % _cohort(c) or c.privacy.noise_at != "server" or c.privacy.clipping == "adaptive")
            )
        ),
        "needs a server.cohort_size that divides partition.num_clients, privacy.noise_at='server' and privacy.clipping='flat'",
        "or use 'poisson'",
    ),
    Rule(
        "privacy.num_bands={value}",
        _for_clients(
            lambda c: (
                c.privacy.num_bands > 1
                and (c.privacy.sampler != "cyclic" or c.privacy.num_bands > c.partition.num_clients // _cohort(c) or c.privacy.secure_noise)
            )
        ),
        "needs privacy.sampler='cyclic', at least as many cohorts in its cycle ({cycle}), and seeded noise, privacy.secure_noise=false "
        "(later rounds subtract what earlier ones added)",
    ),
    Rule(
        "privacy.noise_cohort_size={value}",
        _for_clients(lambda c: c.privacy.noise_cohort_size > 0 and c.privacy.sampler not in ("poisson", "all")),
        "needs privacy.sampler='poisson' or 'all', not {privacy.sampler!r}",
    ),
    Rule(
        "privacy.population={value}",
        _for_clients(lambda c: 0 < c.privacy.population < c.privacy.noise_cohort_size),
        "must be at least privacy.noise_cohort_size={privacy.noise_cohort_size}",
    ),
    Rule(
        "privacy.population={value}",
        _for_clients(lambda c: c.privacy.population > 0 and not c.privacy.noise_cohort_size),
        "needs privacy.noise_cohort_size, the cohort drawn from it",
    ),
    Rule(
        "privacy.dropout_tolerance={value}",
        _for_clients(lambda c: c.privacy.dropout_tolerance > 0 and c.privacy.noise_at != "distributed"),
        "needs privacy.noise_at='distributed', not {privacy.noise_at!r}",
    ),
    Rule(
        "audit.num_shadows=1",
        lambda c: c.audit.num_shadows == 1,
        "leaves half of the records in every shadow's training set, and no score for them",
        "use 0, or 2 or more",
    ),
    Rule(
        "audit.canary='update'",
        _for_canaries(
            lambda c: c.audit.canary == "update" and ("client" not in c.method.spec.units or c.privacy.noise_at == "distributed")
        ),
        f"needs method.name={CLIENT_METHODS} and updates that reach the server one by one, which privacy.noise_at='distributed' prevents",
        "use 'record'",
    ),
    Rule(
        "audit.canary='gradient'",
        _for_canaries(lambda c: c.audit.canary == "gradient" and not (c.method.spec.steps_privately and c.dplora.mode == "example")),
        f"needs method.name={STEPPING_METHODS} with dplora.mode='example'",
        "use 'record'",
    ),
    Rule(
        "audit.canary='record'",
        _for_canaries(lambda c: c.audit.canary == "record" and c.privacy.unit == "client"),
        "audits a record where privacy.unit='client' protects a client",
        "use 'update'",
    ),
    Rule(
        "audit.num_canaries",
        _for_canaries(lambda c: not c.method.spec.trains),
        f"needs a method that trains; method.name={methods.named(lambda spec: not spec.trains)} does not",
    ),
    Rule(
        "train.prox_mu={value}",
        lambda c: c.method.spec.steps_privately and c.train.prox_mu > 0,
        f"has no place in the private step of method.name={STEPPING_METHODS}",
        "set it to 0",
    ),
    Rule(
        "server.lr={value}",
        lambda c: c.server.optimizer in ("adam", "yogi", "adagrad") and c.server.lr >= 1,
        "is too much for server.optimizer={server.optimizer!r} ('adam', 'yogi' and 'adagrad' move every parameter by about that much in a round)",
        "it must be less than 1, such as 0.001",
    ),
    _needs_a_path("data.source", "jsonl", "data.path", "a file"),
    _needs_a_path("data.source", "hub", "data.path", "a data set id"),
    _needs_a_path("synthesis.source", "file", "synthesis.path", "a file of public records"),
    Rule(
        "synthesis.path and synthesis.preset",
        lambda c: c.synthesis.source == "self" and bool(c.synthesis.path or c.synthesis.preset),
        "mean nothing with synthesis.source='self'",
        "set it to 'file', or leave them out",
    ),
    Rule(
        "synthesis.source='file'",
        lambda c: c.synthesis.source == "file" and c.privacy.unit == "example" and c.method.spec.writes,
        "writes nothing from private records, so privacy.unit='example' has nothing to protect",
        "use 'none'",
    ),
    Rule(
        "server.weighting='adaptive'",
        lambda c: c.server.weighting == "adaptive" and not c.method.spec.adapts_weights,
        f"is for method.name={methods.named(lambda spec: spec.adapts_weights)}, not {{method.name!r}}",
        "use examples or uniform",
    ),
    Rule(
        "resources.num_actors={value}",
        lambda c: c.resources.num_actors != "auto" and not re.fullmatch(r"[1-9][0-9]{0,5}", c.resources.num_actors),
        "must be 'auto' or a number of at least 1",
    ),
    Rule(
        "clients.batched={value}",
        lambda c: c.clients.batched != "auto" and not re.fullmatch(r"[1-9][0-9]{0,5}", c.clients.batched),
        "must be 'auto' or a number of at least 1",
    ),
    Rule(
        "clients.batched={value}",
        lambda c: _together(c) and c.privacy.unit == "client",
        "would let the last bits of a client's update depend on who trains beside it, and privacy.unit='client' bounds what one client changes of them all",
        "use 1",
    ),
    Rule(
        "clients.batched={value}",
        lambda c: _together(c) and (c.train.micro_batch_size > 0 or c.train.gradient_checkpointing),
        "holds the batches of all of a group at once, which train.micro_batch_size and train.gradient_checkpointing are there to avoid",
        "use 1, or leave those out",
    ),
    Rule(
        "clients.batched={value}",
        lambda c: _together(c) and c.train.engine == "deepspeed",
        "trains several clients in one process, and with train.engine='deepspeed' a client is several",
        "use 1",
    ),
    Rule(
        "resources.client.num_ranks={value}",
        lambda c: c.resources.client.num_ranks > 1 and c.train.engine != "deepspeed",
        "needs train.engine='deepspeed': with 'torch' a client is one process",
        "set it, or leave num_ranks out",
    ),
    Rule(
        "resources.client.num_ranks={value}",
        lambda c: c.resources.client.num_ranks > 1 and c.resources.backend == "local",
        "needs resources.backend='ray': in this process there is one",
        "use 'ray', or 1",
    ),
    Rule(
        "resources.client.num_ranks={value}",
        lambda c: c.resources.client.num_ranks > 1 and c.lora.dropout > 0,
        "would drop out other entries than one process does, since each rank draws for the examples that it has; lora.dropout={lora.dropout:g} changes results then",
        "set it to 0, or use 1",
    ),
    Rule(
        "resources.client.num_ranks={value}",
        lambda c: c.resources.client.num_ranks > 1 and 0 < c.resources.client.num_gpus < 1,
        "is of ranks that have a GPU each, and resources.client.num_gpus={resources.client.num_gpus:g} would put two on one",
        "use resources.client.num_gpus=1",
    ),
    Rule(
        "train.engine='deepspeed'",
        lambda c: c.train.engine == "deepspeed" and c.privacy.unit == "example",
        "has no guarantee with privacy.unit='example': each of a client's ranks has examples of a step to itself, and the bound is on their sum in one",
        "use 'torch'",
    ),
    Rule(
        "train.engine='deepspeed'",
        lambda c: c.train.engine == "deepspeed" and c.deepspeed.zero_stage == 3 and c.model.quantization != "none",
        "cannot have a base in parts (deepspeed.zero_stage=3) that model.quantization stores in blocks",
        "use model.quantization=none, or a lower stage",
    ),
    Rule(
        "train.engine='deepspeed'",
        lambda c: c.train.engine == "deepspeed" and bool(c.sweep.space),
        "has no place in a sweep, whose trials share actors of one process",
        "use 'torch'",
    ),
    Rule(
        "deepspeed.config={value}",
        lambda c: bool(_ours(c)),
        "names what raysim sets itself (" + "; ".join(f"{name}: {why}" for name, why in OURS.items()) + ")",
        "leave it out",
    ),
    Rule(
        "resources.client.num_gpus={value}",
        lambda c: c.resources.client.num_gpus > 1,
        "is more than one GPU, and a process runs on one device",
        "use at most 1, and train.engine=deepspeed with resources.client.num_ranks for several",
    ),
)


# --- values


def validate(config: Config) -> Config:
    """`config` itself if every value and combination is allowed.

    Errors: ValueError naming key, value, bound and remedy.
    """
    for key in KEYS.values():
        _check_value(key, value_of(config, key.name))
    _check_names(config)
    check_url(config.out, key="out")
    _check_template(config.data)
    refuse(RULES, config)
    return config


def _check_value(key: Key, value: Any) -> None:
    if key.choices and value not in key.choices:
        hint = did_you_mean(value, key.choices, quoted=True)
        raise ValueError(f"{key.name}={shown(value)} is not one of {', '.join(map(repr, key.choices))}{hint}")
    if key.is_path:
        check_path(value, key=key.name)
    if key.bounds is not None:
        low, high, inclusive = key.bounds
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, int | float):  # what a list of a file may hold all the same
                raise ValueError(f"{key.name}={shown(value)} must hold numbers, and {shown(one)} is none")
            if not (low < one <= high or (inclusive and one == low)):  # which not-a-number is not either
                raise ValueError(f"{key.name}={shown(value)} must {'all ' * isinstance(value, list)}be {bounds_in_words(key)}")
    if key.nonzero and 0 < value < key.nonzero:
        raise ValueError(f"{key.name}={value!r} must be 0, or at least {key.nonzero:g}")


def bounds_in_words(key: Key) -> str:
    """Between what the numbers of a key must be, as a refusal says it."""
    assert key.bounds is not None
    low, high, inclusive = key.bounds
    return f"{'at least' if inclusive else 'greater than'} {exactly(low)} and at most {exactly(high)}"


def exactly(bound: float) -> str:
    """A bound with all its digits."""
    return str(bound) if isinstance(bound, int) else f"{bound:.15g}"


def _check_names(config: Config) -> None:
    """Names that become folders."""
    check_folder_name(config.name, key="name")
    folded: dict[str, str] = {}
    for name, overrides in config.compare.items():
        check_folder_name(name, key="compare", taken=COMPARISON_FILES)
        twin = folded.setdefault(name.casefold(), name)
        if twin != name:
            raise ValueError(f"compare: {twin!r} and {name!r} differ by case only, which is one folder on some disks; rename one")
        if not isinstance(overrides or {}, dict):
            raise ValueError(f"compare.{name}={shown(overrides)} must hold the overrides that make the run, such as {{method.name: fedit}}")


def _check_template(data: DataConfig) -> None:
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


def _is_plain(value: Any) -> bool:
    """Whether a value is one that JSON has, so that the same template gives the same text everywhere."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(below) for key, below in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
