"""The configuration of a run: what other rooms may use of it. (`X as X` says that a name is passed on.)"""

from raysim.config.auto import (
    asks_for_labels as asks_for_labels,
)
from raysim.config.auto import (
    resolve_auto as resolve_auto,
)
from raysim.config.auto import (
    unresolved as unresolved,
)
from raysim.config.load import (
    find_config as find_config,
)
from raysim.config.load import (
    from_layers as from_layers,
)
from raysim.config.load import (
    load as load,
)
from raysim.config.load import (
    result_key as result_key,
)
from raysim.config.load import (
    sections as sections,
)
from raysim.config.load import (
    shipped_configs as shipped_configs,
)
from raysim.config.load import (
    shown_key as shown_key,
)
from raysim.config.load import (
    to_yaml as to_yaml,
)
from raysim.config.load import (
    unknown as unknown,
)
from raysim.config.load import (
    with_overrides as with_overrides,
)
from raysim.config.rules import (
    COMPARISON_FILES as COMPARISON_FILES,
)
from raysim.config.rules import (
    RULES as RULES,
)
from raysim.config.rules import (
    UNUSED_RULES as UNUSED_RULES,
)
from raysim.config.rules import (
    Rule as Rule,
)
from raysim.config.rules import (
    bounds_in_words as bounds_in_words,
)
from raysim.config.rules import (
    concerns as concerns,
)
from raysim.config.rules import (
    refuse as refuse,
)
from raysim.config.rules import (
    statement as statement,
)
from raysim.config.rules import (
    unused_privacy as unused_privacy,
)
from raysim.config.rules import (
    validate as validate,
)
from raysim.config.schema import (
    BUILT_IN_SETS as BUILT_IN_SETS,
)
from raysim.config.schema import (
    CHOICES as CHOICES,
)
from raysim.config.schema import (
    FLAT_DEFAULTS as FLAT_DEFAULTS,
)
from raysim.config.schema import (
    KEYS as KEYS,
)
from raysim.config.schema import (
    LEAST_ABOVE_ZERO as LEAST_ABOVE_ZERO,
)
from raysim.config.schema import (
    MOST_POINTS as MOST_POINTS,
)
from raysim.config.schema import (
    RANGES as RANGES,
)
from raysim.config.schema import (
    RESULT_NEUTRAL as RESULT_NEUTRAL,
)
from raysim.config.schema import (
    TODAY as TODAY,
)
from raysim.config.schema import (
    AttackConfig as AttackConfig,
)
from raysim.config.schema import (
    AuditConfig as AuditConfig,
)
from raysim.config.schema import (
    ClientResources as ClientResources,
)
from raysim.config.schema import (
    Config as Config,
)
from raysim.config.schema import (
    DataConfig as DataConfig,
)
from raysim.config.schema import (
    DploraConfig as DploraConfig,
)
from raysim.config.schema import (
    EvaluateConfig as EvaluateConfig,
)
from raysim.config.schema import (
    FedpitConfig as FedpitConfig,
)
from raysim.config.schema import (
    FewFedWeightConfig as FewFedWeightConfig,
)
from raysim.config.schema import (
    JudgeConfig as JudgeConfig,
)
from raysim.config.schema import (
    Key as Key,
)
from raysim.config.schema import (
    LoraConfig as LoraConfig,
)
from raysim.config.schema import (
    MethodConfig as MethodConfig,
)
from raysim.config.schema import (
    ModelConfig as ModelConfig,
)
from raysim.config.schema import (
    PartitionConfig as PartitionConfig,
)
from raysim.config.schema import (
    PrivacyConfig as PrivacyConfig,
)
from raysim.config.schema import (
    ResourcesConfig as ResourcesConfig,
)
from raysim.config.schema import (
    ServerConfig as ServerConfig,
)
from raysim.config.schema import (
    SweepConfig as SweepConfig,
)
from raysim.config.schema import (
    SynthesisConfig as SynthesisConfig,
)
from raysim.config.schema import (
    TrainConfig as TrainConfig,
)
from raysim.config.schema import (
    flatten_keys as flatten_keys,
)
from raysim.config.schema import (
    lacking as lacking,
)
from raysim.config.schema import (
    needs_in_words as needs_in_words,
)
from raysim.config.schema import (
    needs_key as needs_key,
)
from raysim.config.schema import (
    said as said,
)
from raysim.config.schema import (
    to_dict as to_dict,
)
from raysim.config.schema import (
    value_of as value_of,
)
from raysim.config.schema import (
    with_values as with_values,
)
