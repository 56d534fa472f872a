"""What does a card do of what it could? Training and generation of one client, beside the card's own rate of matrix products.

The default model with LoRA of rank 16 on q and v, 8 examples of 256 tokens: a step's tokens a second in float32 and bfloat16, with activations
computed again, and on an nf4 base (where bitsandbytes is installed); 64 greedy answers of 64 tokens. Floating-point operations are
counted by torch; *of the card* is their rate over that of a product of two 4,096 x 4,096 matrices of the same type in the same run.
Left out: several clients on one card, which `tests/gpu` checks.

    python benchmarks/gpu.py [--device cuda] [--model smollm2-135m-instruct]        # --device cpu --model tiny shows that it works
"""

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.lora.layout import initial_adapter
from raysim.model.base_model import DTYPES, load_base_model
from raysim.model.generate import Sampling, write_texts
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings, response_nll, train_adapter, training_mode

BATCH, LENGTH, STEPS = 8, 256, 8
PROMPTS, NEW_TOKENS = 64, 64
SIDE = {"cuda": 4096, "cpu": 1024}
"""Rows of the matrices by which a device's own rate is measured."""


@dataclass(frozen=True)
class Row:
    """A workload and how fast it went."""

    work: str
    tokens_per_s: float
    of_the_device: float | None
    """Floating-point operations a second over those of a matrix product; None where they are not counted."""
    peak_gb: float | None
    """Most memory that was allocated on the card."""


def seconds(work: Callable[[], object], device: str) -> float:
    """Seconds of one call, once the device is done, after a call for warming up."""
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_rate(dtype: str, device: str) -> float:
    """Operations a second of a square product on the device."""
    side = SIDE[device]
    left, right = (torch.randn(side, side, dtype=DTYPES[dtype], device=device) for _ in range(2))
    return 20 * 2 * side**3 / seconds(lambda: [left @ right for _ in range(20)], device)


def examples() -> list[Example]:
    """Examples that fill the length, half prompt and half response."""
    record = Record(record_id=0, instruction="", response="", label="")
    ids = [tuple((7 * number + place) % 200 + 5 for place in range(LENGTH)) for number in range(BATCH)]
    return [Example(record=record, prompt_ids=one[: LENGTH // 2], response_ids=one[LENGTH // 2 :]) for one in ids]


def train_row(lm: LanguageModel, work: str, *, rate: float, device: str, keep: bool = True) -> Row:
    """The speed of STEPS steps of training."""
    settings = TrainSettings(
        num_epochs=STEPS, max_steps=0, batch_size=BATCH, lr=1e-4, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0,
        keep_activations=keep,
    )  # fmt: skip
    chosen, adapter = examples(), initial_adapter(lm.layout, seed=0)
    taken = seconds(lambda: train_adapter(lm, adapter, chosen, settings=settings, seed=0), device)
    with training_mode(lm, seed=0), FlopCounterMode(display=False) as counter:
        response_nll(lm, chosen)[0].sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return Row(work, STEPS * BATCH * LENGTH / taken, STEPS * counter.get_total_flops() / taken / rate, peak)


def generation_row(lm: LanguageModel, work: str, *, device: str) -> Row:
    """The speed of PROMPTS greedy answers of NEW_TOKENS tokens at most; what is counted is what was written."""
    prompts = [list(range(5 + number, 5 + number + LENGTH // 4)) for number in range(PROMPTS)]
    written = 0

    def answer() -> None:
        nonlocal written
        written = sum(map(len, write_texts(lm, prompts, sampling=Sampling(NEW_TOKENS), batch_size=PROMPTS)))

    taken = seconds(answer, device)
    return Row(work, written / taken, None, torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None)


def measured(model: str, device: str) -> list[Row]:
    """All rows."""
    kinds = [("float32", "none"), ("bfloat16", "none")]
    kinds += [("bfloat16", "nf4")] if importlib.util.find_spec("bitsandbytes") else []
    rows = []
    for dtype, quantization in kinds:
        base = load_base_model(model, dtype=dtype, quantization=quantization)
        lm = build_language_model(base, rank=16, alpha=32, dropout=0.0, target_modules=["q_proj", "v_proj"], device=device)
        name, rate = dtype if quantization == "none" else quantization, matmul_rate(dtype, device)
        rows.append(train_row(lm, f"training, {name}", rate=rate, device=device))
        if quantization == "none":
            rows.append(train_row(lm, f"training, {name}, activations again", rate=rate, device=device, keep=False))
        rows.append(generation_row(lm, f"generation, {name}", device=device))
    return rows


def main() -> None:
    """Measures, prints the table, and writes benchmarks/results/gpu.json for a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIDE), default="cuda")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or platform.machine()
    rows = measured(given.model, given.device)
    print(f"{given.model} on {name}\n{'':40}{'tokens/s':>10}{'of the device':>15}{'peak, GB':>10}")
    for row in rows:
        share = "—" if row.of_the_device is None else f"{row.of_the_device:.2f}"
        print(f"{row.work:40}{row.tokens_per_s:10.0f}{share:>15}{'—' if row.peak_gb is None else f'{row.peak_gb:.2f}':>10}")
    if given.device == "cuda":
        table = {"device": name, "model": given.model, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        (Path(__file__).parent / "results" / "gpu.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
