"""Writes run folders with invented numbers, in the shape of the file contract, for tests of what reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from raysim import config as configuration
from raysim.results.contents import Ledger, RoundRecord, Summary
from raysim.results.folders import typed

TOPICS = ["asthma", "diabetes", "hypertension", "migraine", "allergy", "thyroid", "sleep", "skin"]
# method -> (NLL, train ROUGE-L, train details) that its rounds approach, and epsilon a round (0 for none)
ENDS: dict[str, tuple[float, float, float, float]] = {
    "base": (2.41, 0.262, 0.02, 0.0),
    "fedit": (1.86, 0.421, 0.234, 0.0),
    "fedpit": (1.97, 0.314, 0.071, 0.0),
    "dplora": (2.18, 0.274, 0.023, 1.7),
    "locit": (2.05, 0.392, 0.19, 0.0),
    "cenit": (1.79, 0.463, 0.31, 0.0),
}

ENVIRONMENT = {
    "raysim": "0.1.0",
    "commit": "0f3c9a1",
    "python": "3.12.3",
    "platform": "Linux",
    "processor": "x86_64",
    "num_cpus": 2,
    "gpus": [],
    "packages": {"torch": "2.13.0", "ray": "2.60.0"},
    "likeness": "ROUGE-L",
    "inputs": {},
    "chat": {},
}


def write_run(folder: Path, method: str, *, num_rounds: int = 5, num_clients: int = 3, finished: bool = True, **overrides: Any) -> Path:
    """The folder of an invented run; `overrides` are dotted configuration keys with `__` for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"name": method, "method.name": method, "server.num_rounds": num_rounds, "partition.num_clients": num_clients}
    values |= {"attack.long_prefix_tokens": 50}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    config = configuration.load("", [f"{key}={value}" for key, value in values.items()])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(configuration.to_dict(config))))
    records = [
        record(method, i, num_clients) for i in ([-1] if method == "base" else range(num_rounds if finished else max(1, num_rounds // 2)))
    ]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    _write(folder / "partition.json", partition(num_clients))
    _write(folder / "environment.json", ENVIRONMENT)
    _write(folder / "ledger.json", ledger(method, records))
    if method == "fedpit":
        (folder / "synthetic.jsonl").write_text("".join(json.dumps(t) + "\n" for t in synthetic(num_rounds, num_clients)))
    if finished:
        _write(folder / "summary.json", summary(config.name, method, records, seed=config.seed))
    return folder


def record(method: str, round_index: int, num_clients: int) -> dict[str, Any]:
    """An invented round."""
    part = 0.0 if round_index < 0 else 1 - 0.55 ** (round_index + 1)
    trained = round_index >= 0
    result: dict[str, Any] = {
        "round_index": round_index,
        "cohort": list(range(num_clients)) if trained else [],
        "num_tokens": 5214 * trained,
        "train_loss": 2.6 - 0.7 * part if trained else None,
        "update_norm_median": 0.8 if trained else None,
        "clip_fraction": 0.4 if method == "dplora" else 0.0,
        "num_dropped": 0,
        "noise_std": 0.1 if method == "dplora" else 0.0,
        "signal_to_noise": 0.7 if method == "dplora" else None,
        "epsilon": ENDS[method][3] * (round_index + 1) ** 0.7 if ENDS[method][3] else None,
        "uplink_bytes": 0 if method in ("base", "locit", "cenit") else 3_686_400 * num_clients // 3,
        "downlink_bytes": 0 if method in ("base", "locit", "cenit") else 3_686_400 * num_clients // 3,
        "wall_s": 16.4,
        "tokens_per_s": 412.6 if method == "fedpit" else 655.2 + 40 * part,
        **released(method, part),
    }
    if method == "fedpit" and trained:
        result["private"] = released("cenit", part * 0.8)
        result["synthetic"] = {
            "num_candidates": 48,
            "num_kept": 29 + round_index % 3,
            "num_rejected": {"format": 6 - round_index % 3, "copy": 3, "duplicate": 5, "score": 5},
            "duplicate_rate": 0.031,
        }
    return result


def released(method: str, part: float) -> dict[str, Any]:
    """Invented utility and leakage of a release, `part` of the way from the base model to the method's end."""
    nll, rouge, details = (start + part * (end - start) for start, end in zip(ENDS["base"][:3], ENDS[method][:3], strict=True))
    control = 0.259 + 0.03 * part
    bits = 180 * (rouge - 0.262)
    auc = min(0.97, 0.5 + bits / 60)
    shares = [round(max(0.0, min(1.0, 0.02 * power * bits / 10)), 4) for power in range(7)]
    return {
        "eval": {
            "heldout_nll": nll,
            "heldout_perplexity": 2.718281828**nll,
            "heldout_rouge_l": control,
            "heldout_nll_interval": [nll - 0.1, nll + 0.1],
        },
        "attack": {
            "train_rouge_l": rouge,
            "train_exact_match": max(0.0, rouge - 0.33),
            "train_details_rate": details,
            "heldout_rouge_l": control,
            "heldout_exact_match": 0.0,
            "heldout_details_rate": 0.018,
            "prefixed_train_rouge_l": 1.2 * rouge,
            "prefixed_heldout_rouge_l": 1.2 * control,
            "num_examples": 24,
            "memory": {
                "bits_per_record": bits,
                "bits_per_record_interval": [bits - 2.5, bits + 2.5],
                "nats_per_token": bits / 50,
                "nats_per_token_interval": [bits / 50 - 0.05, bits / 50 + 0.05],
                "auc": auc,
                "auc_interval": [auc - 0.04, auc + 0.03],
                "tpr_at_1pct": auc - 0.5,
                "tpr_at_1pct_interval": [0.0, 0.6],
                "num_members": 48,
                "num_heldout": 32,
                "strata": "label",
            },
            "extraction": {
                "queries": [10**power for power in range(7)],
                "members": shares,
                "heldout": [share / 10 for share in shares],
                "probability": 0.5,
                "temperature": 1.0,
                "top_k": 40,
                "target_tokens": 50,
                "median_bits_members": 90 - bits,
                "median_bits_heldout": 92.0,
                "num_members": 48,
                "num_heldout": 32,
            },
        },
    }


def partition(num_clients: int) -> dict[str, Any]:
    """An invented uneven split."""
    counts = [{topic: (7 * i + 5 * j) % 11 % 6 for j, topic in enumerate(TOPICS)} for i in range(num_clients)]
    clients = [
        {
            "client_id": i,
            "num_examples": sum(c.values()),
            "num_tokens": 108 * sum(c.values()),
            "label_counts": {k: v for k, v in c.items() if v},
        }
        for i, c in enumerate(counts)
    ]
    rest = {"num_heldout": 8, "num_cut": 0, "num_heldout_cut": 0, "max_length": 512, "num_copies": 0, "num_exact_copies": 0}
    sha256 = f"{num_clients:02d}" + "c1a9" * 15 + "00"
    return {"sha256": sha256, "num_clients": num_clients, "clients": clients, **rest, "num_canary_records": [0] * num_clients}


def ledger(method: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """An invented ledger."""
    epsilon = records[-1]["epsilon"] if records else None
    guarantee = "No formal privacy guarantee: what the attack did not find, another one may."
    if epsilon is not None:
        guarantee = f"With ({epsilon:.2f}, 1e-05)-differential privacy for one training example: whoever sees every release learns little more with it than without it."
    return {
        "unit": "example" if epsilon is not None else "none",
        "neighbouring_relation": "add or remove one",
        "sampler": "poisson",
        "sampling_prob": 0.3,
        "noise_multiplier": 1.0,
        "accounted_multiplier": 1.0,
        "clip_norm": 1.0,
        "num_releases": len(records),
        "delta": 1e-5,
        "epsilon": epsilon,
        "epsilon_rdp": None if epsilon is None else epsilon * 1.1,
        "accountant": None if epsilon is None else "pld",
        "releases": [],
        "guarantee": guarantee,
        "simulated": False,
        "noise_at": "none" if epsilon is None else "client",
        "expected_cohort": 3.0,
        "num_rounds": sum(r["round_index"] >= 0 for r in records),
        "seeded_noise": epsilon is not None,
    }


def summary(name: str, method: str, records: list[dict[str, Any]], *, seed: int) -> dict[str, Any]:
    """The invented summary of invented rounds."""
    last = records[-1]
    return {
        "name": name,
        "method": method,
        "seed": seed,
        "num_rounds": len([r for r in records if r["round_index"] >= 0]),
        "eval": last["eval"],
        "attack": last["attack"],
        "private": last.get("private"),
        "cross_client": {"coverage": 0.123, "heldout_coverage": None, "efficiency": 0.0456, "num_queries": 1536, "by_attacker": []},
        "unit": ledger(method, records)["unit"],
        "simulated": False,
        "num_tokens": sum(r["num_tokens"] for r in records),
        "epsilon": last["epsilon"],
        "delta": 1e-5 if last["epsilon"] is not None else None,
        "guarantee": ledger(method, records)["guarantee"],
        "adapter_sha256": (method.encode().hex() * 64)[:64],
        "num_parameters": 921_600,
        "uplink_bytes": sum(r["uplink_bytes"] for r in records),
        "downlink_bytes": sum(r["downlink_bytes"] for r in records),
        "wall_s": sum(r["wall_s"] for r in records),
        "tokens_per_s": last["tokens_per_s"],
        "num_dropped": 0,
    }


def synthetic(num_rounds: int, num_clients: int) -> list[dict[str, Any]]:
    """Invented synthetic records."""
    texts = []
    for i in range(16 * num_rounds * num_clients):
        topic, verdict = TOPICS[i % 8], ("kept", "kept", "format", "copy", "kept")[i % 5]
        texts.append(
            {
                "client_id": i % num_clients,
                "round_index": i // (16 * num_clients),
                "instruction": f"A patient with {topic} asks how often the dose number {i} should be taken.",
                "response": f"Twice a day with food <b>and</b> water; a review after {i % 9 + 1} weeks is usual for {topic}.",
                "kept": verdict == "kept",
                "verdict": verdict,
                "score": None if verdict == "format" else 0.4 + 0.01 * (i % 50),
                "max_rouge_l": 0.2 + 0.01 * (i % 40),
                "response_rouge_l": None if verdict == "format" else 0.1 + 0.01 * (i % 50),
            }
        )
    return texts


def a_summary(**changes: Any) -> Summary:
    """An invented summary, as it is read."""
    return typed(Summary, summary("run", "fedit", [record("fedit", 0, 3)], seed=0) | changes, where="summary")


def a_ledger(**changes: Any) -> Ledger:
    """An invented ledger, as it is read."""
    return typed(Ledger, ledger("dplora", [record("dplora", 0, 3)]) | changes, where="ledger")


def a_round(**changes: Any) -> RoundRecord:
    """An invented round, as it is read."""
    return typed(RoundRecord, record("fedit", 0, 3) | changes, where="round")


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
