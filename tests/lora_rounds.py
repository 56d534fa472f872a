"""Rounds of adapters that nobody trained: random factors sent as each LoRA rule sends them, through the sums and the step of the server."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysim.config import load
from raysim.federation.server import ServerState, begin, relay, step
from raysim.lora.factors import entries, layers, products, spread
from raysim.lora.layout import Layout, Vector
from raysim.lora.rule import LoraRule, Setting
from raysim.privacy.aggregation import sum_chunk
from raysim.privacy.mechanism import Mechanism

Floats = npt.NDArray[np.float64]


def layout_of(sizes: Sequence[tuple[int, int]], *, rank: int, between: bool = False) -> Layout:
    """Layers of these outputs and inputs."""
    names, shapes = [], []
    for i, (num_outputs, num_inputs) in enumerate(sizes):
        names += [f"base_model.model.layers.{i}.lora_{factor}.weight" for factor in ("ABR" if between else "AB")]
        shapes += [(rank, num_inputs), (num_outputs, rank), *([(rank, rank)] if between else [])]
    return Layout(tuple(names), tuple(shapes))


@dataclass(frozen=True)
class Done:
    """A round: what each client's adapter came to, and what the server made of them."""

    before: Mapping[str, Vector]
    after: Mapping[str, Vector]
    trained: list[Vector]
    ideal: list[Floats]
    """The weighted mean of the clients' effective changes of each weight."""
    found: list[Floats]
    """The effective change of each weight after the server."""

    @property
    def error(self) -> float:
        """The Frobenius norm of what is lost."""
        return float(np.sqrt(sum(np.square(i - f).sum() for i, f in zip(self.ideal, self.found, strict=True))))

    @property
    def size(self) -> float:
        """The Frobenius norm of the ideal, and of what rounding is measured against."""
        return float(np.sqrt(sum(np.square(i).sum() for i in self.ideal))) + 1e-30


def some_tensors(rule: LoraRule, setting: Setting, *, seed: int) -> dict[str, Vector]:
    """The server's tensors in the middle of a run: every factor that the rule trains is somewhere, and so is a delta."""
    tensors, rng = rule.start(setting.layout, seed), np.random.default_rng(seed)
    mask = entries(setting.layout, rule.trainable(setting.layout, None), setting.rank)
    size = setting.layout.num_parameters if mask is None else int(mask.sum())
    adapter = spread(rng.standard_normal(size).astype(np.float32), mask, over=tensors["adapter"])
    moved = {"delta": rng.standard_normal(len(tensors["delta"])).astype(np.float32)} if "delta" in tensors else {}
    tensors = {**tensors, "adapter": adapter, **moved}
    return tensors if rule.settle is None else rule.settle(tensors, setting)


def one_round(
    rule: LoraRule,
    setting: Setting,
    *,
    weights: Sequence[float],
    ranks: Sequence[int] | None = None,
    idle: Sequence[int] = (),
    seed: int = 0,
    round_index: int = 0,
    chunk_size: int = 2,
    tensors: Mapping[str, Vector] | None = None,
) -> Done:
    """A round of as many clients as weights; those that are `idle` train nothing."""
    before = some_tensors(rule, setting, seed=seed) if tensors is None else tensors
    mechanism = Mechanism.from_config(load("", ["method.name=fedit"]), shard_sizes=[4] * len(weights))
    state = ServerState(round_index, dict(before))
    round = begin(state, mechanism)
    round = dataclasses.replace(round, turn=0 if rule.turn is None else rule.turn(before, setting, round_index))
    trained, uploads, kept = [], [], []
    for k, rank in enumerate(ranks or [setting.rank] * len(weights)):
        given = before["adapter"] if rule.given is None else rule.given(before, {}, rank, setting)
        mask = entries(setting.layout, rule.trainable(setting.layout, round.turn), rank)
        size = len(given) if mask is None else int(mask.sum())
        change = np.random.default_rng((seed, round_index, k)).standard_normal(size).astype(np.float32) * (k not in idle)
        trained.append(given + spread(change, mask))
        uploads.append(rule.message(trained[-1], given, rank=rank, setting=setting, round_index=round_index, turn=round.turn))
        kept.append({} if rule.kept is None else rule.kept(trained[-1], given, rank, setting))
    ids = list(range(len(weights)))
    chunks = [ids[i : i + chunk_size] for i in range(0, len(ids), chunk_size)]

    def sent(messages: Sequence[Mapping[str, Vector]]) -> list[object]:
        return [
            sum_chunk(
                [messages[k] for k in c],
                client_ids=c,
                weights=[weights[k] for k in c],
                round=round,
                mechanism=mechanism,
                form=rule.form,
            )
            for c in chunks
        ]

    parts = sent(uploads)
    if rule.trips is not None:
        round = relay(round, parts, mechanism=mechanism, rule=rule, setting=setting)  # type: ignore[arg-type]  # whatever was sent
        parts = sent([rule.trips.answer(one, round.broadcast, setting) for one in kept])
    after, _ = step(state, round, parts, mechanism=mechanism, lr=1.0, seed=seed, rule=rule, setting=setting)  # type: ignore[arg-type]  # as above
    scales = [rule.scale(setting, rank) for rank in ranks or [setting.rank] * len(weights)]
    of_clients = [products(one, setting.layout, scale=s, delta=before.get("delta")) for one, s in zip(trained, scales, strict=True)]
    shares = np.array(weights) / sum(weights)
    ideal = [sum(share * one for share, one in zip(shares, of_layer, strict=True)) for of_layer in zip(*of_clients, strict=True)]
    found = products(after.adapter, setting.layout, scale=setting.scale, delta=after.tensors.get("delta"))
    return Done(before, after.tensors, trained, ideal, found)


def best_error(ideal: Sequence[Floats], ranks: Sequence[int]) -> float:
    """What the nearest matrices of these ranks lose: the tails of the singular values, by Eckart and Young."""
    tails = [np.linalg.svd(one, compute_uv=False)[rank:] for one, rank in zip(ideal, ranks, strict=True)]
    return float(np.sqrt(sum(np.square(tail).sum() for tail in tails)))


def setting_for(rule: LoraRule, sizes: Sequence[tuple[int, int]], *, rank: int, alpha: float, **more: float) -> Setting:
    """A setting with layers of these sizes."""
    values = {"energy": 0.9, "oversampling": 8, "pruned_share": 0.99} | more
    return Setting(layout_of(sizes, rank=rank, between=rule.between), alpha=alpha, seed=3, **values)  # type: ignore[arg-type]  # numbers by name


def num_layers(setting: Setting) -> int:
    """Layers of a setting's layout."""
    return len(layers(setting.layout))
