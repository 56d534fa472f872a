"""`raysim plan`: what a run will take before anything runs: parameters, bytes of base, adapter, optimizer and activations, clients at once, seconds and bytes a round.

Memory is counted on tensors without numbers, seconds are measured on the model cut to few layers (or, for GPUs that are not here, counted in
operations). A step is that of the longest records, so that no later one takes more. Left out: the seconds of measuring, writing and attacking.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from raysim.config import Config, load, with_values
from raysim.data.tokens import Example
from raysim.federation.setup import encode_data
from raysim.lora.rule import lora_rule
from raysim.methods.call import examples_at_once
from raysim.model.base_model import BaseModel, emptied, empty_base_model, resolve_dtype
from raysim.model.footprint import Footprint, cut, filled, footprint, num_layers, seconds_per_step
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings

GIB = 2**30
PROCESS_BYTES = round(0.6 * GIB)
"""What a client's process takes on a processor before it has a model: Python, torch, transformers."""
CONTEXT_BYTES = round(0.6 * GIB)
"""What CUDA takes of a GPU for each process."""
TFLOPS = 100.0
"""Operations a second of a GPU in training, in 1e12, unless it is said."""


@dataclass(frozen=True)
class Plan(Footprint):
    """What a run will take: a client's training, and what comes of it for a round."""

    model: str
    dtype: str
    quantization: str
    where: str
    clients_at_once: int
    num_gpus: float
    """The share of a GPU that a client needs (`resources.client.num_gpus`); 0 without one."""
    step_s: float
    """Seconds of the step that was planned for."""
    round_tokens: int
    """Tokens that the clients of a round train on."""
    round_s: float
    """Seconds of training a round."""
    uplink_bytes: int
    """Of a round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("config", help="a YAML file, or the name of a shipped configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--gpus", type=int, default=0, help="plan for as many GPUs, which need not be here")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB of each (default 80)")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help=f"1e12 operations a second of each in training (default {TFLOPS:g})")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Prints the plan and returns 0."""
    config = load(arguments.config, arguments.overrides)
    found = plan(config, gpus=arguments.gpus, gpu_bytes=round(arguments.gpu_memory * 1e9), tflops=arguments.tflops)
    print(json.dumps(asdict(found) | {"client_bytes": found.client_bytes}, indent=2) if arguments.json else "\n".join(lines(found)))
    return 0


def plan(config: Config, *, gpus: int = 0, gpu_bytes: int = 0, tflops: float = TFLOPS, timed: bool = True) -> Plan:
    """What a run of `config` will take on this machine, or on `gpus` GPUs of so much memory; `timed` is False for no seconds.

    Errors: ValueError where the model or the data cannot be had as configured.
    """
    config = with_values(config, {"train.dtype": resolve_dtype(config.train.dtype, on_gpu=gpus > 0)})
    base = _empty(config)
    lm = _build(base, config)
    # Which records a client has changes nothing of what is planned, and clusters of embeddings would need the model's numbers.
    data = encode_data(with_values(config, {"partition.scheme": "iid"}), lm)
    longest = sorted(data.train, key=lambda example: -example.num_tokens)[: examples_at_once(config)]
    took = footprint(
        lm, base, longest, optimizer=_optimizer(config), keep_activations=not config.train.gradient_checkpointing, on_gpu=gpus > 0
    )
    at_once = clients_at_once(took, config, gpus=gpus, gpu_bytes=gpu_bytes)
    if gpus:
        step_s = took.flops / (tflops * 1e12) * max(1.0, at_once / gpus)
    else:
        step_s = _step_s(base, config, longest) if timed else 0.0
    round_tokens = tokens_of_round(config, data.train)
    size = 4 * sum(_mask_size(lm, config))
    return Plan(
        **vars(took),
        model=config.model.name,
        dtype=config.train.dtype,
        quantization=config.model.quantization,
        where=f"{gpus} GPUs of {gpu_bytes / 1e9:g} GB" if gpus else f"{os.cpu_count()} CPUs, {_memory() / 1e9:.0f} GB",
        clients_at_once=at_once,
        num_gpus=share_of_gpu(at_once * config.resources.client.num_ranks, gpus) if gpus else 0.0,
        step_s=step_s,
        round_tokens=round_tokens,
        round_s=step_s * round_tokens / took.num_tokens / max(1, at_once),
        uplink_bytes=size * _cohort(config),
    )


def _empty(config: Config) -> BaseModel:
    model = config.model
    return empty_base_model(
        model.name, dtype=config.train.dtype, cache_dir=model.cache_dir, attention=model.attention, quantization=model.quantization
    )


def _build(base: BaseModel, config: Config) -> LanguageModel:
    lora = config.lora
    rule = lora_rule(lora.aggregation)
    lm = build_language_model(
        base, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=list(lora.target_modules), between=rule.between
    )
    lm.train_only(rule.trainable(lm.layout, None))
    return lm


def _optimizer(config: Config) -> str:
    return config.dplora.optimizer if config.method.spec.steps_privately else config.train.optimizer


def _cohort(config: Config) -> int:
    return config.server.cohort_size or config.partition.num_clients


def _mask_size(lm: LanguageModel, config: Config) -> list[int]:
    """How many numbers a client sends of each tensor."""
    rule = lora_rule(config.lora.aggregation)
    sent = rule.sent_names(lm.layout, 0)
    size = sum(end - start for name, (start, end) in zip(lm.layout.names, lm.layout.spans(), strict=True) if name in sent)
    return [size] * (1 + len(config.method.spec.tensors))


def clients_at_once(took: Footprint, config: Config, *, gpus: int, gpu_bytes: int) -> int:
    """How many clients of a cohort fit at once: on a GPU each process has the base for itself, on processors a node has one.

    A client is as many processes as it has ranks, each of which has its part of what the engine partitions.
    """
    num_ranks, stage = (config.resources.client.num_ranks, config.deepspeed.zero_stage) if config.train.engine == "deepspeed" else (1, 0)
    base = took.base_bytes // (num_ranks if stage == 3 else 1)
    own = took.client_bytes - took.optimizer_bytes + took.optimizer_bytes // (num_ranks if stage else 1)
    if gpus:
        return min(_cohort(config), gpus * int(gpu_bytes // (CONTEXT_BYTES + base + own)) // num_ranks)
    on_node = took.base_bytes if stage == 3 else base  # its parts together
    by_memory = int((_memory() - on_node - PROCESS_BYTES) // (PROCESS_BYTES + own)) // num_ranks
    num_cpus = config.resources.client.num_cpus * num_ranks
    by_cpus = int((os.cpu_count() or 1) / num_cpus + 1e-9) if num_cpus else by_memory
    actors = config.resources.num_actors
    wanted = int(actors) if actors != "auto" else _cohort(config)
    return max(0, min(wanted, by_memory, by_cpus) if config.resources.backend == "ray" else min(1, by_memory))


def share_of_gpu(at_once: int, gpus: int) -> float:
    """What a client's `num_gpus` must be for so many at once.

    Errors: ValueError if not even one fits.
    """
    if at_once == 0:
        raise ValueError(
            "resources.client.num_gpus: not even one client fits on a GPU; use train.engine=deepspeed, model.quantization or fewer examples"
        )
    return 1.0 / max(1, -(-at_once // gpus))


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tokens_of_round(config: Config, train: tuple[Example, ...]) -> int:
    """The tokens that the clients of a round train on, on average."""
    mean = sum(example.num_tokens for example in train) / max(1, len(train))
    share = _cohort(config) / config.partition.num_clients
    if config.method.spec.steps_privately:
        steps = config.dplora.num_steps if config.dplora.mode == "example" else 1
        return round(mean * steps * config.dplora.batch_size * _cohort(config))
    most = config.train.max_steps * config.train.batch_size * config.partition.num_clients if config.train.max_steps else 10**18
    return round(mean * min(len(train) * config.train.num_epochs, most) * share)


def _step_s(base: BaseModel, config: Config, examples: list[Example]) -> float:
    """Seconds of a step here, by the model cut to few layers."""
    torch.set_num_threads(config.resources.num_threads)
    full = _build(base, config)

    def build(depth: int) -> LanguageModel:
        settings = cut(base.config, depth)
        model = config.model
        small = emptied(
            settings, tokenizer=full.tokenizer, name=base.name, dtype=base.dtype, attention=model.attention, quantization=model.quantization
        )
        return _build(filled(small), config)

    train = config.train
    settings = TrainSettings(
        num_epochs=1,
        max_steps=1,
        batch_size=len(examples),
        lr=train.lr,
        optimizer=_optimizer(config),
        weight_decay=0.0,
        max_grad_norm=train.max_grad_norm,
        prox_mu=0.0,
        keep_activations=not train.gradient_checkpointing,
    )
    return seconds_per_step(build, num_layers(base.config), examples, settings=settings)


def lines(found: Plan) -> list[str]:
    """The plan as the terminal shows it."""
    rows: list[tuple[str, Any]] = [
        ("model", f"{found.model} in {found.dtype}" + ("" if found.quantization == "none" else f", {found.quantization}")),
        ("on", found.where),
        ("parameters", f"{found.num_parameters:,} ({found.num_trained:,} trained)"),
        ("base model", megabytes(found.base_bytes)),
        ("adapter and gradient, a client", megabytes(found.adapter_bytes)),
        ("optimizer, a client", megabytes(found.optimizer_bytes)),
        ("activations, a client", f"{megabytes(found.activation_bytes)} ({found.num_tokens} tokens at once)"),
        ("clients at once", found.clients_at_once),
    ]
    if found.num_gpus:
        rows.append(("resources.client.num_gpus", f"{found.num_gpus:g}"))
    rows += [
        ("training, a round", f"{found.round_s:.3g} s ({found.round_tokens:,} tokens)"),
        ("sent by clients, a round", megabytes(found.uplink_bytes)),
    ]
    return [f"{name:<32}{value}" for name, value in rows]


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
