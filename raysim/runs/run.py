"""A whole run, from a configuration to its folder: what the command line and Python users call (several side by side: `compare`)."""

import contextlib
import dataclasses
import datetime
import errno
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raysim import remote, storage
from raysim.config import (
    TODAY,
    Config,
    SweepConfig,
    hostile_note,
    load,
    validate,
    with_values,
)
from raysim.console.progress import Progress
from raysim.data.configured import chat_format
from raysim.data.tokens import describe_chat
from raysim.errors import plain_errors
from raysim.federation.assignment import Assignment, LocalServer
from raysim.federation.in_process import LocalClients
from raysim.federation.loop import Clients, Server, Simulation, owned, released, simulate, start
from raysim.federation.on_ray import base as shared
from raysim.federation.on_ray import clients as actors
from raysim.federation.on_ray import cluster, metrics
from raysim.federation.setup import EncodedData, Experiment, prepare
from raysim.federation.worker import Worker
from raysim.lora.release import exported
from raysim.lora.rule import frozen_throughout, lora_rule
from raysim.measure.audits import Audited, final_audit
from raysim.methods.call import CANARY_NOTES
from raysim.model.base_model import BaseModel, Keep, load_base_model, resolve_dtype
from raysim.model.language_model import LanguageModel
from raysim.model.sharded import Sharding, check_library, free_address, join, leave
from raysim.model.train import TrainSettings, is_out_of_memory, mean_nll
from raysim.model.train_together import check_together, measured_size
from raysim.privacy.ledger import ledger_of
from raysim.reports.page import write_run_report
from raysim.results import files, inputs
from raysim.results.folders import RunFolder
from raysim.runs import judged

LARGE_DELTA = 1e-3
"""A default delta above this protects too little to go unmentioned."""


OnRound = Callable[[list[dict[str, Any]]], None]
"""Hears of all records so far after each round, once they are on disk."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: Config
    out: Path
    records: list[dict[str, Any]]
    """The lines of rounds.jsonl."""
    ledger: dict[str, Any]
    summary: dict[str, Any]

    @property
    def page(self) -> Path:
        """Its report."""
        return self.out / files.REPORT


@dataclass
class Backend:
    """Where clients run: a worker in this process, and actors on Ray unless everything is to stay here."""

    key: tuple[Any, ...]
    worker: Worker
    ray: actors.RayBackend | None
    of_base: dict[str, list[Any]] = field(default_factory=dict, init=False)
    """Likelihoods under the base model, which the next run of the same records need not compute again (see `loop.Simulation`)."""

    def clients(self, assignment: Assignment, experiment: Experiment) -> Clients:
        """The clients of a run."""
        if self.ray is None:
            return LocalClients(self.worker, assignment, experiment)
        return actors.RayClients(self.ray, assignment, experiment)

    def server(self, assignment: Assignment) -> Server:
        """The server of a run."""
        return LocalServer(assignment) if self.ray is None else actors.RayServer(self.ray, assignment)


@plain_errors()
def run(
    config: Config,
    *,
    display: bool | None = None,
    backend: Backend | None = None,
    data: EncodedData | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Runs `config` to its end and writes its folder; continues one that was interrupted, returns one that is finished.

    An `out` in a bucket is worked on as a copy, which is what the result names. `display` is False for silence, None for a live display on a terminal and plain lines elsewhere. `data` is the run's data where
    they were tokenised before.

    Errors: ValueError for what the configuration, the data, the model or the cluster cannot give, before any work starts;
    RuntimeError naming round and client for what fails later, or what the disk refuses, after which the same call continues.
    """
    if remote.is_url(config.out):
        with remote.worked_on(config.out) as copy:
            config = dataclasses.replace(config, out=str(copy))
            return run(config, display=display, backend=backend, data=data, on_round=on_round)
    config = validate(dataclasses.replace(resolved(config), compare={}, compare_seeds=[], claims="", sweep=SweepConfig()))
    out = files.check_folder(config)
    inputs.check_inputs(out, config)
    judged.check(config.judge)
    done = load_run(config, out)
    if done is None:
        files.check_writable(out)
        with storage.held(out):
            files.check_folder(config)  # another command may have made it its own
            with contextlib.nullcontext(backend) if backend else open_backend(config, display=display) as opened:
                done = _run(config, out, opened, data=data, display=display, on_round=on_round)
    if judged.judge_runs(config, [out], journal=out / files.JOURNAL, display=display):
        with storage.held(out):
            write_run_report(out)
    return done


def resolved(config: Config) -> Config:
    """`config` with its output folder, `train.dtype` and `data.template_date` decided, so that a resumed run computes as it began."""
    dtype = resolve_dtype(config.train.dtype, on_gpu=config.resources.client.num_gpus > 0)
    out = config.out or f"runs/{config.name}-{config.method.name}"
    config = dated(config, [Path(out) / name for name in (files.CONFIG, files.SWEEP)])
    if config.clients.batched == "auto" and (Path(out) / files.CONFIG).is_file():
        config = with_values(config, {"clients.batched": load(Path(out) / files.CONFIG).clients.batched})
    return dataclasses.replace(config, out=out, train=dataclasses.replace(config.train, dtype=dtype))


def dated(config: Config, begun: Sequence[Path]) -> Config:
    """`config` with `data.template_date` decided where it is `today`: the day of the first of the `begun` configurations, or else this day."""
    if config.data.template_date != TODAY:
        return config
    days = [day for path in begun if path.is_file() and (day := load(path).data.template_date) != TODAY]
    day = days[0] if days else datetime.date.today().isoformat()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=day))


def load_run(config: Config, out: Path) -> Run | None:
    """The finished run in `out`, or None for none, or one whose files are not as it left them: it is finished again from its checkpoint."""
    folder = RunFolder(out)
    if not folder.is_finished:
        return None
    return Run(config, out, folder.jsonl(files.ROUNDS), folder.json(files.LEDGER), folder.json(files.SUMMARY))


def backend_key(config: Config) -> tuple[Any, ...]:
    """What two runs must share to use one backend."""
    cohort = min(config.partition.num_clients, config.server.cohort_size or config.partition.num_clients)
    return (config.model, config.train.dtype, config.train.engine, repr(config.deepspeed), config.resources, cohort)


@contextlib.contextmanager
def open_backend(config: Config, *, display: bool | None = False, base_ref: Any = None, num_actors: int | None = None) -> Iterator[Backend]:
    """A backend for `config` (its dtype resolved), closed on leaving; says what it starts unless `display` is False.

    `base_ref` is a base model that others share (`base.share_base`), None to load it; `num_actors` the client actors for
    which there is room, None to ask the cluster.

    Errors: ValueError if the model or the resources cannot be had.
    """
    resources, on_ray = config.resources, config.resources.backend == "ray"
    sharding = sharding_of(config)
    is_ours = on_ray and cluster.start_ray()
    if on_ray:
        num_actors = num_actors or cluster.num_client_actors(config, num_clients=config.partition.num_clients)
    if display is not False:
        place = f"{num_actors} client actors on Ray" if on_ray else "clients in this process"
        print(f"loading {config.model.name} in {config.train.dtype}, {place}, threads each: {resources.num_threads}", flush=True)
    if on_ray and base_ref is None:
        base_ref = shared.share_base(functools.partial(load_model, config))
    base = shared.shared_base(base_ref) if base_ref is not None else load_model(config)
    ray_backend = actors.RayBackend(base_ref, resources=resources, num_actors=num_actors or 0, sharding=sharding) if on_ray else None
    local_device = "cuda" if resources.client.num_gpus > 0 and not on_ray else "cpu"
    group = join(free_address(), 0, sharding) if sharding is not None and not on_ray else None
    worker = Worker(base, device=local_device, num_threads=resources.num_threads, group=group)
    try:
        yield Backend(backend_key(config), worker, ray_backend)
    except KeyboardInterrupt:
        if is_ours:
            cluster.stop_ray()  # killed actors would have Ray tell of each task that was under way
        raise
    finally:
        if ray_backend is not None:
            ray_backend.close()
        if group is not None:
            leave()


def base_losses(config: Config, lm: LanguageModel, experiment: Experiment) -> tuple[dict[str, float], list[str]]:
    """The held-out loss (nats a response token) of the base as it is, and as it is stored; the first is read anew and given up again.

    Where memory does not hold both, the first is left out, and the second value says so.
    """
    how = config.model.quantization
    losses = {how: base_loss(config, lm, experiment)}
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="none"))
    try:
        plain = Worker(load_model(whole), device=str(lm.device), num_threads=config.resources.num_threads).language_model(config.lora)
        return {"none": base_loss(config, plain, experiment)} | losses, []
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return losses, [f"the loss of the base without model.quantization={how} is not shown: memory does not hold it beside the other"]


def base_loss(config: Config, lm: LanguageModel, experiment: Experiment) -> float:
    """The held-out loss of a base, nats a response token."""
    lm.set_delta(None)
    lm.set_adapter(np.zeros(lm.layout.num_parameters, dtype=np.float32))
    found = mean_nll(lm, experiment.heldout, batch_size=config.evaluate.batch_size)
    return sum(nll for nll, _ in found) / sum(count for _, count in found)


def sharding_of(config: Config) -> Sharding | None:
    """How each client is a group of ranks; None where it is a process of plain torch.

    Errors: ValueError if DeepSpeed is asked for and not installed.
    """
    if config.train.engine == "torch":
        return None
    check_library()
    deepspeed = config.deepspeed
    return Sharding(config.resources.client.num_ranks, deepspeed.zero_stage, deepspeed.offload, deepspeed.config)


def load_model(config: Config, keep: Keep = lambda array: array) -> BaseModel:
    """The base model of a run (its dtype resolved), each array where `keep` puts it."""
    model = config.model
    return load_base_model(
        model.name,
        dtype=config.train.dtype,
        cache_dir=model.cache_dir,
        attention=model.attention,
        quantization=model.quantization,
        keep=keep,
    )


def _may_be_grouped(config: Config) -> bool:
    """Whether `clients.batched=auto` may come to more than 1: what `n` is refused for aside, it is measured where the clients train."""
    on_another_device = config.resources.backend == "ray" and config.resources.client.num_gpus > 0
    try:
        validate(with_values(config, {"clients.batched": "2"}))
    except ValueError:
        return False
    return not on_another_device


def _run(config: Config, out: Path, backend: Backend, *, data: EncodedData | None, display: bool | None, on_round: OnRound | None) -> Run:
    lm = backend.worker.language_model(config.lora)
    judged.check_tokenizer(config.judge, lm.tokenizer)
    experiment = prepare(config, lm, data=data)
    config = grouped(config, lm, experiment)
    assignment = Assignment(dataclasses.replace(config, compare={}), experiment.mechanism, experiment.weights, experiment.public, lm.layout)
    found = inputs.input_files(config) | _prints_of(experiment)
    inputs.check_inputs(out, config, now=found)
    chat = describe_chat(lm.tokenizer, chat=chat_format(config.data), stop_token_ids=lm.eos_token_ids)
    damage = _damage(out)
    files.unseal(out)
    files.write_start(out, config, manifest=experiment.manifest, inputs=found, chat=chat)

    def after_round(simulation: Simulation) -> None:
        if not (out / files.CONFIG).is_file():  # what is written from here on would be half a run
            raise FileNotFoundError(errno.ENOENT, "it was taken away while the run was at work", str(out))
        ledger = ledger_of(experiment.mechanism, simulation.state.round_index)
        _write_progress(out, simulation, ledger=ledger)
        remote.push(out)
        tell(simulation.records)
        if on_round is not None:
            on_round(simulation.records)

    losses, unmeasured = base_losses(config, lm, experiment) if config.model.quantization != "none" else ({}, [])
    with Progress(rounds_to_run(experiment, config), config.name, enabled=display) as progress, metrics.monitored(config.name) as tell:
        for line in [*damage, *unmeasured, *notes(experiment, config)]:
            progress.note(line)
        simulation = simulate(
            Simulation(
                config=config,
                experiment=experiment,
                clients=backend.clients(assignment, experiment),
                server=backend.server(assignment),
                tokenizer=lm.tokenizer,
                progress=progress,
                state=start(config, experiment, layout=lm.layout),
                num_rounds=rounds_to_run(experiment, config),
                of_base=backend.of_base,
                layout=lm.layout,
            ),
            state_dir=out / files.STATE,
            after_round=after_round,
        )
    done = _finish(config, out, simulation, layout=lm.layout, num_base_parameters=backend.worker.num_base_parameters, base=losses)
    remote.push(out)
    return done


def grouped(config: Config, lm: LanguageModel, experiment: Experiment) -> Config:
    """`config` with `clients.batched` decided: measured where it is `auto`, and tried where it is more than 1.

    Errors: ValueError where this model's clients cannot be trained together.
    """
    batched, examples = config.clients.batched, experiment.real_examples
    alone = not config.method.spec.only_trains or len(examples) < 2
    if batched == "1" or alone or (batched == "auto" and not _may_be_grouped(config)):
        return with_values(config, {"clients.batched": "1"}) if batched == "auto" else config
    if batched != "auto":
        check_together(lm, examples, size=int(batched))
        return config
    train = config.train
    settings = TrainSettings(1, 1, train.batch_size, train.lr, train.optimizer, train.weight_decay, train.max_grad_norm, train.prox_mu)
    return with_values(config, {"clients.batched": str(measured_size(lm, experiment.shards, settings=settings))})


def _damage(out: Path) -> list[str]:
    """What is wrong with the run that was over in this folder, if one was."""
    folder = RunFolder(out)
    return [f"{folder.damage}: the run is finished again from its newest checkpoint"] if folder.is_over else []


def _prints_of(experiment: Experiment) -> dict[str, dict[str, inputs.Print]]:
    """The prints of the records as read (of a Hub's data set there is no file) and of how they were dealt."""
    held = (*experiment.real_examples, *experiment.heldout)
    return {
        "records": {"": inputs.records_print(sorted((example.record for example in held), key=lambda record: record.record_id))},
        "partition": {"": {"sha256": experiment.manifest["sha256"]}},
    }


def _write_progress(out: Path, simulation: Simulation, *, ledger: dict[str, Any]) -> None:
    files.write_progress(out, records=simulation.records, synthetic=simulation.synthetic, answers=simulation.answers, ledger=ledger)


def rounds_to_run(experiment: Experiment, config: Config) -> int:
    """The rounds configured, or as many of them as `privacy.max_epsilon` allows."""
    limit = config.privacy.max_epsilon
    return experiment.mechanism.affordable_rounds(limit) if limit else config.server.num_rounds


def notes(experiment: Experiment, config: Config) -> list[str]:
    """What a user should know before the run: of its method, responses that were cut, noise solved for, a budget that ends it, a large delta."""
    lines, mechanism = [config.method.spec.note] if config.method.spec.note else [], experiment.mechanism
    if config.clients.batched != "1" and not config.method.spec.only_trains:
        lines.append(
            f"clients.batched={config.clients.batched}: clients of method.name={config.method.name!r} do more than train, and go one by one"
        )
    lines += filter(None, [hostile_note(config)])
    cut = experiment.manifest["num_cut"] + experiment.manifest["num_heldout_cut"]
    if cut:
        lines.append(f"{cut} responses cut to data.max_length={experiment.manifest['max_length']} tokens")
    copies, exact = experiment.manifest["num_copies"], experiment.manifest["num_exact_copies"]
    if copies:
        lines.append(f"{copies} records are copies of others ({exact} letter by letter); no copy of a training record is held out")
    if mechanism.kind == "none":
        return lines
    if config.privacy.target_epsilon:
        lines.append(
            f"privacy.noise_multiplier={mechanism.noise_multiplier:.4g} for epsilon {config.privacy.target_epsilon:g} at delta {mechanism.delta:.3g}"
        )
    num_rounds = rounds_to_run(experiment, config)
    if num_rounds < config.server.num_rounds:
        lines.append(f"privacy.max_epsilon={config.privacy.max_epsilon:g} allows {num_rounds} of {config.server.num_rounds} rounds")
    if not config.privacy.delta and mechanism.delta > LARGE_DELTA:
        lines.append(
            f"privacy.delta defaults to {mechanism.delta:.3g} for {mechanism.num_units} protected units; with so few, set it yourself"
        )
    if mechanism.delta > 1 / mechanism.num_units:
        lines.append(
            f"privacy.delta={mechanism.delta:.3g} is more than 1 in the {mechanism.num_units} protected units: one may be exposed outright"
        )
    return lines


def _finish(config: Config, out: Path, simulation: Simulation, *, layout: Any, num_base_parameters: int, base: dict[str, float]) -> Run:
    ledger = ledger_of(simulation.experiment.mechanism, simulation.state.round_index)
    _write_progress(out, simulation, ledger=ledger)
    summary = files.summarise(config, records=simulation.records, ledger=ledger, num_rounds=simulation.state.round_index)
    lora = config.lora
    release = exported(released(simulation), layout, alpha=lora.alpha, rank=lora.release_rank or lora.rank)
    summary |= {"num_parameters": release.layout.num_parameters, "num_base_parameters": num_base_parameters}
    if base:
        summary["base_heldout_nll"] = base
        simulation.progress.note(f"held-out NLL of the base: {', '.join(f'{loss:.4f} ({how})' for how, loss in base.items())}")
    if release.loss is not None:
        summary["release_loss"] = release.loss
        simulation.progress.note(
            f"the released adapter of rank {release.rank} is off by {release.loss:.2%} of the change that is saved beside it"
        )
    digest = files.write_release(out, config, release=release, owned=owned(simulation), summary=summary)
    audit = _audit(config, simulation, ledger=ledger, layout=layout)
    if audit is not None:
        files.write_json(out / files.AUDIT, audit)
    summary["adapter_sha256"] = digest
    files.write_json(out / files.SUMMARY, summary)
    write_run_report(out)
    files.seal(out)
    return Run(config, out, simulation.records, ledger, summary)


def _audit(config: Config, simulation: Simulation, *, ledger: dict[str, Any], layout: Any) -> dict[str, Any] | None:
    experiment = simulation.experiment
    audited = Audited(
        config,
        members=experiment.real_examples,
        nonmembers=experiment.heldout,
        first=simulation.first,
        last=released(simulation),
        evaluate=lambda work: simulation.clients.evaluate(work, lambda: None),
        frozen=frozen_throughout(lora_rule(config.lora.aggregation), layout),
        notes={k: state.arrays[CANARY_NOTES] for k, state in simulation.kept.items() if CANARY_NOTES in state.arrays},
    )
    return final_audit(experiment.canaries, audited, tokenizer=simulation.tokenizer, ledger=ledger, mechanism=experiment.mechanism)
