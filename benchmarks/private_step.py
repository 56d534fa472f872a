"""How much longer does a private step take than an ordinary one: per-example clipping and noise against plain training?

SmolLM2-135M, 8 records of the built-in clinic set at 128 tokens each, rank 8 on q and v, one AdamW step: `train_private` with every
record in the batch against `train_adapter` on the same records, by turns in one process. Reach: at most 1.35 times as long (the median
of the turns' ratios), in float32 and in bfloat16.

    python benchmarks/private_step.py [--num-threads 1] [--repeats 9] [--dtypes float32 bfloat16]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Waiting threads sleep instead of spinning, so that other work on the machine disturbs both sides less.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from raysim.data.chat import ChatFormat
from raysim.data.sources import BUILTIN
from raysim.data.tokens import Example, encode_records
from raysim.lora.layout import Vector, initial_adapter
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.private_train import PrivateSettings, train_private
from raysim.model.train import TrainSettings, train_adapter
from raysim.results.files import environment

MODEL, BATCH, LENGTH, RANK = "smollm2-135m-instruct", 8, 128, 8
REACH = 1.35
LOCAL = TrainSettings(
    num_epochs=1, max_steps=1, batch_size=BATCH, lr=1e-3, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0
)
PRIVATE = PrivateSettings(
    num_steps=1, batch_size=BATCH, sampling_prob=1.0, lr=1e-3, optimizer="adamw", clip_norm=1.0, noise_multiplier=1.0, secure_noise=False
)


def full_examples(lm: LanguageModel) -> list[Example]:
    """The first records that fill the length, so that no batch holds padding."""
    records = BUILTIN["clinic"]()
    encoded, _ = encode_records(records, tokenizer=lm.tokenizer, eos_token_id=lm.eos_token_ids[0], max_length=LENGTH, chat=ChatFormat())
    examples = [example for example in encoded if example.num_tokens == LENGTH][:BATCH]
    assert len(examples) == BATCH, f"only {len(examples)} records fill {LENGTH} tokens"
    return examples


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock seconds of a call, and processor seconds of all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def sides_of(lm: LanguageModel, adapter: Vector, examples: list[Example]) -> dict[str, Callable[[], Any]]:
    """One step of each kind from the same adapter on the same examples."""
    return {
        "plain": lambda: train_adapter(lm, adapter, examples, settings=LOCAL, seed=0),
        "private": lambda: train_private(lm, adapter, examples, settings=PRIVATE, seed=0),
    }


def measure(dtype: str, *, repeats: int) -> dict[str, Any]:
    """Seconds of each side by turns after one turn of warm-up, the medians, and the median of the turns' ratios."""
    lm = build_language_model(
        load_base_model(MODEL, dtype=dtype), rank=RANK, alpha=2 * RANK, dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    sides = sides_of(lm, initial_adapter(lm.layout, seed=0), full_examples(lm))
    for side in sides.values():
        side()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in sorted(sides, reverse=turn % 2 == 1):
            wall_s, cpu_s = timed(sides[name])
            wall[name].append(wall_s)
            cpu[name].append(cpu_s)
    ratios = {
        kind: [b / a for a, b in zip(times["plain"], times["private"], strict=True)] for kind, times in (("wall", wall), ("cpu", cpu))
    }
    return {
        "num_tokens": BATCH * LENGTH,
        "num_parameters": lm.layout.num_parameters,
        "wall_s": {name: [round(value, 4) for value in values] for name, values in wall.items()},
        "cpu_s": {name: [round(value, 4) for value in values] for name, values in cpu.items()},
        "median_wall_s": {name: round(statistics.median(values), 4) for name, values in wall.items()},
        "ratio_wall": round(statistics.median(ratios["wall"]), 3),
        "ratio_cpu": round(statistics.median(ratios["cpu"]), 3),
    }


def main() -> None:
    """Measures both kinds of step in each dtype, prints them, and writes benchmarks/results/private_step.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "private_step.json")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    results = {dtype: measure(dtype, repeats=args.repeats) for dtype in args.dtypes}
    setting = {"model": MODEL, "batch_size": BATCH, "length": LENGTH, "rank": RANK, "target_modules": ["q_proj", "v_proj"]}
    setting |= {"num_threads": args.num_threads, "repeats": args.repeats, "reach": REACH}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, "results": results, "environment": environment()}, indent=2) + "\n")
    print(f"{'':12}{'plain':>10}{'private':>10}{'ratio':>8}{'by cpu':>8}   (reach: at most {REACH})")
    for dtype, result in results.items():
        plain, private = result["median_wall_s"]["plain"], result["median_wall_s"]["private"]
        print(f"{dtype:12}{plain:9.3f}s{private:9.3f}s{result['ratio_wall']:8.2f}{result['ratio_cpu']:8.2f}")


if __name__ == "__main__":
    main()
