"""Records and their split among clients as a configuration asks for them: what a run deals, and what a verification deals again."""

import json
from pathlib import Path

from raysim.config import Config, DataConfig, EvaluateConfig, SynthesisConfig
from raysim.data.chat import ChatFormat
from raysim.data.choices import ChoiceQuestion, read_choices
from raysim.data.partition import partition_records
from raysim.data.presets import PRESETS
from raysim.data.records import Record
from raysim.data.sources import read_source


def chat_format(data: DataConfig) -> ChatFormat:
    """How conversations are put to the model, as configured."""
    return ChatFormat(data.system_prompt, template_args=json.dumps(data.template_args, sort_keys=True), date=data.template_date)


def instruction_opening(data: DataConfig) -> str:
    """The text with which every instruction of a known set begins, such as a question about the sentence that follows; empty for others."""
    return PRESETS[data.preset].opening if _is_known(data) else ""


def responses_are_labels(data: DataConfig) -> bool:
    """Whether a response of the set is its label and nothing else, by the set's form, whatever its records hold."""
    if _is_known(data):
        return PRESETS[data.preset].labelled
    return data.source in ("jsonl", "hub") and data.label_field == data.response_field


def _is_known(data: DataConfig) -> bool:
    return data.source in ("jsonl", "hub") and data.preset in PRESETS


def public_records(synthesis: SynthesisConfig) -> list[Record]:
    """The records that stand in for self-generated ones; none unless they come from a file.

    Errors: as `read_source`, naming `synthesis.path` and the line.
    """
    if synthesis.source != "file":
        return []
    return list(read_source(DataConfig("jsonl", synthesis.path, synthesis.preset), section="synthesis").records)


def configured_questions(evaluate: EvaluateConfig) -> list[ChoiceQuestion]:
    """The multiple-choice questions that releases answer; none unless there is a file of them.

    Errors: as `read_choices`, naming `evaluate.choices_path` and the line.
    """
    if not evaluate.choices_path:
        return []
    try:
        questions = read_choices(Path(evaluate.choices_path), form=evaluate.choices_form)
    except ValueError as error:
        raise ValueError(f"evaluate.choices_path={error}") from None
    return questions[: evaluate.num_choices or None]


def configured_shards(labels: list[str], config: Config) -> list[list[int]]:
    """The positions of each client's records, given every training record's label; one shard where data are pooled ."""
    if config.method.spec.pools:
        return [list(range(len(labels)))]
    partition = config.partition
    return partition_records(
        labels,
        scheme=partition.scheme,
        num_clients=partition.num_clients,
        alpha=partition.alpha,
        min_examples=partition.min_examples,
        seed=config.seed,
    )
