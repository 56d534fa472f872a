"""Draws configurations as users bring them, well-formed and not, loads them, and makes small runs of the well-formed ones.

`python -m tests.kinds.draw --loads 20000 --runs 200` prints what became of each and ends with status 1 if one was a fault of ours: an
exception that is neither a ValueError nor a RuntimeError, a message of several lines, or a refusal after the first round.
Left out: data, models and tokenizers, which have files of tests of their own beside this one.
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raysim.config import CHOICES, FLAT_DEFAULTS, RANGES, load
from raysim.runs.compare import comparison
from raysim.runs.run import run
from raysim.sweeps.space import check_points, check_sweep, grid_points, probe_points, random_points

GARBAGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, -0.0, 10**400, -(10**400), 2**63, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "\t",
        "a b",
        "a\nb",
        "null",
        "~",
        "1e400",
        "0x10",
        "1_000",
        "on",
        "${x}",
        "${oc.env:HOME}",
        "${",
        "${a.b",
        "???",
        "$5",
        "%s",
        "{}",
    ),
    *(
        "..",
        "../..",
        "/",
        "/abs",
        "a/b",
        ".",
        "\0",
        "\x1b[31m",
        "\u2028",
        "\x85",
        "\ud800",
        "𝄞",
        "中文",
        "é" * 130,
        "x" * 5000,
        "-",
        "²",
        "٣",
    ),
    *([], [[]], [None], [1, "a", {}], {}, {"a": 1}, {1: 2}, {"a": {"b": [1]}}, ["q_proj"], [1e400], [10**400], {"x" * 300: 1}, {"": 1}),
)
TEXTS = (
    *("", "a: b: c", "\t- x", "[1, 2", "{a: 1", "a: 'x", "- 1\n- 2", "42", "just text", "a: &x [*x]", "a: *nowhere", "? [1]\n: 2", "<<: 1"),
    *("a: !!python/object:os.system x", "%YAML 9.9\n---\na: 1", "a: 1\n---\nb: 2", "data: {source: clinic}\ndata: {source: finance}"),
    *("model: {name: tiny", "lora.rank: 4", "lora: [1]", "lora:", "lora: {}", "1: 2", "null: 3", "true: 1", "[1]: 2", "a: 2020-01-01"),
    *("compare: [1]", "compare: {a: 5}", "compare: {a: {b: {c: {}}}}", "sweep: {space: 5}", "sweep: {space: [1]}", "compare: {1: {}}"),
    *(
        "data: {template_args: {a: {b: [1, {c: null}]}}}",
        "data: {template_args: [1]}",
        "data: {template_args: {1: 2}}",
        "seed: 0o17",
        "seed: 1:30",
    ),
)


@dataclass(frozen=True)
class Fault:
    """What went wrong, and with what."""

    given: Any
    what: str


def drawn_value(rng: random.Random, key: str, *, wild: float = 0.3) -> Any:
    """A value for a key: one that it takes, at the edges of its range as well, or, with the probability `wild`, anything."""
    if rng.random() < wild:
        return rng.choice([*GARBAGE, rng.choice(CHOICES[rng.choice(list(CHOICES))])])
    if key in CHOICES:
        return rng.choice(CHOICES[key])
    if key in RANGES:
        low, high, _ = RANGES[key]
        inside: list[Any] = [low, high, low + 1, (low + high) / 2, FLAT_DEFAULTS[key], 2 * FLAT_DEFAULTS[key]]
        value = rng.choice([low - 1, high + 1] if rng.random() < wild / 3 else inside)
        return int(value) if isinstance(FLAT_DEFAULTS[key], int) else value
    return FLAT_DEFAULTS[key]


def drawn_settings(rng: random.Random, *, most: int = 5) -> dict[str, Any]:
    """Some keys, some of them none, with drawn values: of a user who means well, or who does not know the keys."""
    keys, wild = rng.sample(list(FLAT_DEFAULTS), rng.randrange(most + 1)), rng.choice([0.0, 0.0, 0.1, 0.5])
    found = {key: drawn_value(rng, key, wild=wild) for key in keys}
    if rng.random() < 0.1:
        found[
            rng.choice(["lora", "nowhere", "lora.rnk", "", ".", "a..b", "data.", "compare.a", "sweep.space.x", "seed.x", "[0]", "a[0]"])
        ] = 1
    return found


def drawn_overrides(rng: random.Random) -> list[str]:
    """`key=value` words as typed, of which some are none."""
    words = [f"{key}={_typed(value)}" for key, value in drawn_settings(rng).items()]
    return words + (
        [rng.choice(["", "=", "=1", "lora.rank", "data=clinic", "data=x", "a=b=c", "lora.rank=[", "x={"])] if rng.random() < 0.1 else []
    )


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, list | dict) else str(value)


def drawn_space(rng: random.Random) -> Any:
    """A sweep's space, or something else."""
    if rng.random() < 0.1:
        return rng.choice(GARBAGE)
    space: dict[Any, Any] = {}
    for key in rng.sample(list(FLAT_DEFAULTS), rng.randrange(1, 4)):
        if rng.random() < 0.3:
            ends = [rng.choice([drawn_value(rng, key), rng.choice(GARBAGE)]) for _ in range(rng.choice([2, 2, 2, 1, 3]))]
            space[key] = {rng.choice(["loguniform", "uniform", "randint", "normal", 5]): ends}
        else:
            space[key] = [drawn_value(rng, key) for _ in range(rng.randrange(4))] if rng.random() < 0.9 else rng.choice(GARBAGE)
    if rng.random() < 0.1:
        space[rng.choice(["lora", "nowhere", 5, "", "name", "out", "sweep.seeds"])] = rng.choice([[1], {"rank": [4, 8]}, {"rank": 1}])
    return space


def drawn_sweep(rng: random.Random) -> dict[str, Any]:
    """A section `sweep`."""
    sweep: dict[str, Any] = {"space": drawn_space(rng)}
    for key in rng.sample(
        ["search", "num_samples", "seeds", "objectives", "scheduler", "grace_rounds", "private_selection"], rng.randrange(4)
    ):
        sweep[key] = rng.choice([drawn_value(rng, f"sweep.{key}"), *GARBAGE[:8]])
    if rng.random() < 0.2:
        sweep["private_selection"] = {"distribution": rng.choice(["poisson", "geometric", 3]), "mean": rng.choice(GARBAGE)}
    if rng.random() < 0.2:
        sweep["objectives"] = {rng.choice(["leakage", "epsilon", "x", 5]): rng.choice(["min", "max", "up", 3])}
    return sweep


def drawn_compare(rng: random.Random) -> Any:
    """A section `compare`."""
    names = ["fedit", "a", "A", "..", "/abs", "", "report.html", "x" * 300, "a b", "$5% off $10", 5, "a\nb", "é" * 120]
    entries = {rng.choice(names): rng.choice([{}, None, 5, [1], drawn_settings(rng, most=2)]) for _ in range(rng.randrange(1, 4))}
    return entries if rng.random() < 0.9 else rng.choice(GARBAGE)


def nested(settings: dict[Any, Any]) -> dict[Any, Any]:
    """Dotted keys as the sections of a file."""
    whole: dict[Any, Any] = {}
    for key, value in settings.items():
        place, parts = whole, str(key).split(".")
        for part in parts[:-1]:
            below = place.setdefault(part, {})
            if not isinstance(below, dict):
                below = place[part] = {}
            place = below
        place[parts[-1]] = value
    return whole


def drawn_file(rng: random.Random) -> bytes:
    """The content of a configuration file."""
    if rng.random() < 0.25:
        return rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    content = nested(drawn_settings(rng)) if rng.random() < 0.8 else drawn_settings(rng)
    if rng.random() < 0.3:
        content["compare"] = drawn_compare(rng)
    if rng.random() < 0.3:
        content["sweep"] = drawn_sweep(rng)
    text = yaml.safe_dump(content, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        place = rng.randrange(len(text) + 1)
        text = rng.choice([text[:place], text[:place] + rng.choice([b"\xff", b"\x00", b"\t", b"[", b'"', b"\xed\xa0\x80"]) + text[place:]])
    return text


def one_load(rng: random.Random, path: Path) -> tuple[Any, Callable[[], str]]:
    """What is given, and what loads it and checks its sweep and comparison; the latter returns what became of it."""
    content, overrides = drawn_file(rng), drawn_overrides(rng) if rng.random() < 0.7 else []
    source = rng.choice([str(path)] * 8 + ["", "quickstart", "sweep-smoke", "x" * 5000, "no\0where", "..", "/"])
    if rng.random() < 0.2:
        overrides.append(f"sweep.space={_typed(drawn_space(rng))}")
    path.write_bytes(content)

    def tried() -> str:
        config = load(source, overrides)
        if config.compare:
            comparison(config)
        if config.sweep.space:
            check_sweep(config)
            searches = {"grid": grid_points, "optuna": probe_points, "random": lambda c: random_points(c, num=min(c.sweep.num_samples, 50))}
            check_points(config, searches[config.sweep.search](config))
        return "loaded"

    return (source, overrides, content), tried


def outcome(given: Any, tried: Callable[[], str]) -> str | Fault:
    """What became of it, or the fault."""
    try:
        return tried()
    except ValueError as error:
        text = str(error)
        if "\n" in text or not text.strip() or isinstance(error, UnicodeError | json.JSONDecodeError):
            return Fault(given, f"{type(error).__name__} that is no refusal: {text[:300]!r}")
        return "refused"
    except Exception:
        return Fault(given, traceback.format_exc())


def loads(num: int, *, seed: int) -> tuple[collections.Counter[str], list[Fault]]:
    """`num` drawn configurations loaded."""
    counts, faults = collections.Counter[str](), list[Fault]()
    with tempfile.TemporaryDirectory() as folder:
        for index in range(num):
            found = outcome(*one_load(random.Random(f"load|{seed}|{index}"), Path(folder) / "config.yaml"))
            counts["fault" if isinstance(found, Fault) else found] += 1
            faults += [found] if isinstance(found, Fault) else []
    return counts, faults


# --- runs

TINY = [
    *(
        "model.name=tiny",
        "train.dtype=float32",
        "resources.backend=local",
        "data.num_train=10",
        "data.num_heldout=4",
        "data.max_length=400",
    ),
    *("lora.rank=2", "server.num_rounds=1", "evaluate.num_generated=2", "evaluate.max_new_tokens=3", "attack.num_examples=2"),
    *("fedpit.num_candidates=2", "fedpit.num_kept=2", "fedpit.max_instruction_tokens=4", "fedpit.max_response_tokens=4"),
    *(
        "fewfedweight.max_response_tokens=4",
        "privacy.delta=1e-3",
        "dplora.num_steps=1",
        "audit.num_references=3",
        "partition.num_clients=2",
    ),
]
RUN_VALUES: dict[str, Sequence[Any]] = {
    "method.name": CHOICES["method.name"],
    "data.source": ("clinic", "finance", "general"),
    "data.num_train": (0, 1, 2, 5, 10, 10**9),
    "data.num_heldout": (1, 2, 10**9),
    "data.max_length": (8, 32, 120, 400, 16384, 10**9),
    "data.system_prompt": ("", "Be brief.", "中文", "$x", "null"),
    "data.template_date": ("today", "2024-07-26", "1999-12-31"),
    "data.template_args": ("{enable_thinking: false}", "{a: [1, {b: c}]}"),
    "partition.scheme": CHOICES["partition.scheme"],
    "partition.num_clients": (1, 2, 3, 10, 10**6),
    "partition.alpha": (1e-6, 1e-3, 0.1, 1, 1e3, 1e6),
    "partition.min_examples": (0, 1, 3, 10**9),
    "partition.num_clusters": (1, 2, 8, 10**9),
    "lora.rank": (1, 2, 40, 65536),
    "lora.alpha": (1e-9, 1, 1e9),
    "lora.dropout": (0, 0.5, 0.99),
    "lora.target_modules": ("all-linear", "[q_proj]", "[down_proj,v_proj]", "[nowhere]", "lm_head", "[q_proj,q_proj]"),
    "train.num_epochs": (1, 2),
    "train.max_steps": (0, 1, 10**9),
    "train.batch_size": (1, 3, 10**9),
    "train.lr": (1e-300, 1e-3, 1, 1e38),
    "train.lr_schedule": CHOICES["train.lr_schedule"],
    "train.min_lr": (0, 1e-6, 1e9),
    "train.optimizer": CHOICES["train.optimizer"],
    "train.weight_decay": (0, 0.1, 1e9),
    "train.max_grad_norm": (0, 1e-9, 1, 1e9),
    "train.prox_mu": (0, 0.1, 1e9),
    "train.dtype": ("float32", "bfloat16"),
    "fedpit.share_mix": (0, 0.5, 1),
    "fedpit.local_train_on": CHOICES["fedpit.local_train_on"],
    "fedpit.num_candidates": (0, 1, 3),
    "fedpit.num_kept": (0, 1, 10**9),
    "fedpit.pool_size": (0, 1, 10**9),
    "fedpit.scorer": CHOICES["fedpit.scorer"],
    "fedpit.num_demonstrations": (1, 2, 10**9),
    "fedpit.num_response_demonstrations": (1, 2, 10**9),
    "fedpit.max_rouge_l": (0, 0.5, 1),
    "fedpit.temperature": (0, 1e-300, 1e-3, 1, 1e9),
    "fedpit.repetition_penalty": (1, 1.1, 1e9),
    "fedpit.max_response_tokens": (1, 8, 10**9),
    "fedpit.max_instruction_tokens": (1, 8, 10**9),
    "fedpit.min_instruction_words": (1, 10**9),
    "fedpit.num_retries": (1, 2),
    "fedpit.num_subsets": (1, 2, 8),
    "fedpit.subset_size": (1, 2, 10**9),
    "fedpit.private_decoding": CHOICES["fedpit.private_decoding"],
    "fedpit.top_k": (2, 50, 10**9),
    "fewfedweight.pseudo_weight": (0, 1, 1e9),
    "fewfedweight.energy_temperature": (1e-300, 1e-3, 1, 1e9),
    "fewfedweight.aggregation_temperature": (1e-300, 1e-3, 1, 1e9),
    "fewfedweight.validation_share": (0, 0.2, 0.9),
    "dplora.mode": CHOICES["dplora.mode"],
    "dplora.batch_size": (1, 3, 10**9),
    "dplora.num_steps": (1, 2),
    "dplora.lr": (1e-300, 1e-3, 1e38),
    "dplora.optimizer": CHOICES["dplora.optimizer"],
    "server.num_rounds": (1, 2),
    "server.cohort_size": (0, 1, 2, 10**6),
    "server.weighting": CHOICES["server.weighting"],
    "server.lr": (1e-300, 0.5, 1, 1e38),
    "server.optimizer": CHOICES["server.optimizer"],
    "server.beta1": (0, 0.9, 0.9999),
    "server.beta2": (0, 0.99, 0.9999),
    "server.tau": (1e-300, 1e-3, 1e9),
    "clients.dropout": (0, 0.5, 0.99),
    "privacy.unit": CHOICES["privacy.unit"],
    "privacy.noise_at": CHOICES["privacy.noise_at"],
    "privacy.sampler": CHOICES["privacy.sampler"],
    "privacy.noise_multiplier": (0, 1e-6, 1e-3, 0.5, 1, 100, 1e9),
    "privacy.target_epsilon": (0, 1e-3, 1, 100, 1e9),
    "privacy.max_epsilon": (0, 1e-9, 1, 1e9),
    "privacy.delta": (0, 1e-100, 1e-15, 1e-6, 0.1, 0.5),
    "privacy.clip_norm": (1e-300, 1e-9, 1, 1e9),
    "privacy.clipping": CHOICES["privacy.clipping"],
    "privacy.clip_quantile": (0.01, 0.5, 0.99),
    "privacy.clip_lr": (1e-300, 0.2, 1e9),
    "privacy.count_noise": (0, 1e-6, 1, 1e9),
    "privacy.num_bands": (1, 2, 10**6),
    "privacy.noise_cohort_size": (0, 1, 100, 10**12),
    "privacy.population": (0, 100, 10**12),
    "privacy.dropout_tolerance": (0, 0.3, 0.5),
    "privacy.secure_noise": (True, False),
    "evaluate.every": (0, 1, 10**9),
    "evaluate.num_generated": (1, 2, 10**9),
    "evaluate.max_new_tokens": (1, 5, 10**9),
    "evaluate.batch_size": (1, 3, 10**9),
    "evaluate.labels": CHOICES["evaluate.labels"],
    "evaluate.private": (True, False),
    "attack.every": (-1, 0, 1, 10**9),
    "attack.num_examples": (1, 3, 10**9),
    "attack.prefix_tokens": (0, 1, 5, 10**9),
    "attack.long_prefix_tokens": (0, 5, 10**9),
    "attack.memory_records": (0, 1, 3, 256),
    "attack.target_tokens": (0, 2, 50, 10**9),
    "attack.temperature": (0, 1e-3, 1, 1e9),
    "attack.top_k": (0, 1, 40, 10**9),
    "attack.detail_records": (0, 1, 12, 10**9),
    "attack.detail_references": (7, 15, 100),
    "attack.cross_prefixes": (0, 1),
    "attack.cross_samples": (1, 2),
    "attack.cross_tokens": (1, 3, 10**9),
    "audit.multiplicities": ("[]", "[1]", "[1,2]", "[10000]"),
    "audit.num_secrets": (1, 2),
    "audit.num_references": (1, 3),
    "audit.num_canaries": (0, 1, 4),
    "audit.canary": CHOICES["audit.canary"],
    "audit.canary_scale": (1e-300, 1, 1e9),
    "audit.confidence": (0.5, 0.95, 0.9999),
    "audit.membership": (True, False),
    "audit.num_shadows": (0, 1, 2),
    "resources.num_threads": (1, 2),
    "judge.kind": ("none", "likelihood"),
    "judge.batch_size": (1, 10**9),
    "seed": (0, 1, 2**62),
    "name": ("run", "$5% off $10", "_x"),
}


def drawn_run(rng: random.Random, out: Path) -> list[str]:
    """The settings of a small run into `out`: valid values of some keys, of those that go with the method more often."""
    method = rng.choice(CHOICES["method.name"])
    own = [key for key in RUN_VALUES if key.split(".")[0] in (method, "fedpit" if "synthetic" in method or method == "fedmit" else method)]
    keys = rng.sample(list(RUN_VALUES), rng.randrange(1, 5)) + rng.sample(own, min(len(own), rng.randrange(3)))
    if rng.random() < 0.3:
        unit = rng.choice(["client", "example"])
        method = "fedit" if unit == "client" else rng.choice(["dplora", "fedpit"])
        keys += rng.sample([key for key in RUN_VALUES if key.startswith("privacy.")], 2)
        base = [f"privacy.unit={unit}", *(["fedpit.scorer=none"] if method == "fedpit" else [])]
    else:
        base = []
    words = [f"{key}={rng.choice(RUN_VALUES[key])}" for key in dict.fromkeys(keys)]
    return [*TINY, f"method.name={method}", *base, *words, f"out={out}"]


def one_run(words: Sequence[str], out: Path) -> str:
    """What became of a run: `ended`, `refused` before any round, or `failed by name` of round and client; else what is wrong with its end."""
    try:
        run(load("", list(words)), display=False)
    except (RecursionError, NotImplementedError):
        return f"a fault of ours: {traceback.format_exc()}"
    except (ValueError, RuntimeError) as error:
        text, begun = str(error), [*out.glob("rounds.jsonl"), *(out / "state").glob("round-*")]
        if "\n" in text:
            return f"several lines: {text}"
        if isinstance(error, RuntimeError):
            return "failed by name" if "round" in text else f"names no round: {text}"
        return f"refused after a round: {text}" if begun else "refused"
    except Exception:
        return f"a fault of ours: {traceback.format_exc()}"
    return "ended"


def runs(num: int, *, seed: int, first: int = 0, say: bool = False) -> tuple[collections.Counter[str], list[Fault]]:
    """`num` drawn small runs."""
    counts, faults = collections.Counter[str](), list[Fault]()
    for index in range(first, first + num):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            words = drawn_run(random.Random(f"run|{seed}|{index}"), out)
            started = time.monotonic()
            found = one_run(words, out)
        if found not in ("ended", "refused", "failed by name"):
            faults.append(Fault(words[len(TINY) :], found))
            found = "fault"
        counts[found] += 1
        if say:
            print(f"{index} {found} {time.monotonic() - started:.1f} s: {' '.join(words[len(TINY) : -1])}", flush=True)
    return counts, faults


def main() -> int:
    """The command; status 1 if there was a fault."""
    parser = argparse.ArgumentParser(description="draw configurations and small runs")
    parser.add_argument("--loads", type=int, default=20000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first run")
    arguments = parser.parse_args()
    loaded, faults = loads(arguments.loads, seed=arguments.seed)
    print(f"loads: {dict(loaded)}", flush=True)
    for fault in faults[:20]:
        print(f"--- {fault.given!r:.600}\n{fault.what}", flush=True)
    ran, more = runs(arguments.runs, seed=arguments.seed, first=arguments.first, say=True)
    print(f"runs: {dict(ran)}")
    for fault in more:
        print(f"--- {fault.given!r:.600}\n{fault.what}")
    return 1 if faults or more else 0


if __name__ == "__main__":
    sys.exit(main())
