"""How much faster is `raysim.generate` than `model.generate` on the padded batch in arrival order?

32 prompts from the built-in clinic records on the default model with a LoRA adapter, greedy, in float32 and in bfloat16:
`plain` (the instructions alone: lengths differ little, so that what is gained is gained where answers end early) and
`demonstrations` (none to two other records before each, as in self-generation: lengths differ much). Both sides run in
one process, by turns. Reach: 1.3 times as fast, with equal tokens in float32 (the benchmark fails where they differ).

    python benchmarks/generate.py [--num-threads 2] [--repeats 3] [--max-new-tokens 128]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

# Waiting threads sleep instead of spinning, so that other work on the machine disturbs both sides less.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import peft
import torch
import transformers

from raysim.data.chat import ChatFormat
from raysim.data.sources import BUILTIN
from raysim.data.tokens import encode_chat
from raysim.model.base_model import load_base_model
from raysim.model.generate import Sampling, generate
from raysim.model.language_model import LanguageModel, build_language_model

NUM_PROMPTS = 32
WORKLOADS = {"plain": 0, "demonstrations": 2}
"""The most demonstrations before a prompt."""
REACH = 1.3
Rows = list[list[int]]


def make_prompts(model: LanguageModel, *, max_demonstrations: int) -> Rows:
    """Prompts from records drawn with a fixed seed, each after none to `max_demonstrations` records with their responses."""
    records = BUILTIN["clinic"]()
    rng = np.random.default_rng(0)
    prompts = []
    for index in rng.choice(len(records), NUM_PROMPTS, replace=False):
        demonstrations = rng.choice(len(records), int(rng.integers(max_demonstrations + 1)), replace=False)
        turns = [turn for i in demonstrations for turn in (("user", records[i].instruction), ("assistant", records[i].response))]
        prompts.append(encode_chat(model.tokenizer, [*turns, ("user", records[index].instruction)], chat=ChatFormat()))
    return prompts


def ours(model: LanguageModel, prompts: Rows, *, max_new_tokens: int) -> Rows:
    """The new tokens by `raysim.generate`."""
    dtype = None if model.compute_dtype == torch.float32 else model.compute_dtype
    return generate(
        model.model,
        prompts,
        sampling=Sampling(max_new_tokens),
        eos_token_ids=model.eos_token_ids,
        pad_token_id=model.pad_token_id,
        autocast_dtype=dtype,
    )


def reference(model: LanguageModel, prompts: Rows, *, max_new_tokens: int) -> Rows:
    """The new tokens by `model.generate` on one left-padded batch in arrival order."""
    longest = max(map(len, prompts))
    tokens_BT = torch.tensor([[model.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.model.eval()
    with torch.inference_mode(), model.autocast():
        text_BT = model.model.generate(  # type: ignore[no-untyped-call]  # untyped in peft
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(model.eos_token_ids),
            pad_token_id=model.pad_token_id,
        )
    return [until_end(row, model.eos_token_ids) for row in text_BT[:, longest:].tolist()]


def until_end(row: list[int], end: tuple[int, ...]) -> list[int]:
    """The tokens before the first that ends the row."""
    return row[: next((i for i, token in enumerate(row) if token in end), len(row))]


def timed(call: Callable[[], Rows]) -> tuple[Rows, float, float]:
    """What `call` returns, its wall-clock seconds and the processor seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    rows = call()
    return rows, time.perf_counter() - wall, time.process_time() - cpu


def measure(workload: str, dtype: str, *, max_new_tokens: int, repeats: int) -> dict[str, object]:
    """Times of both sides by turns, their medians, and how many rows agree."""
    base = load_base_model("smollm2-135m-instruct", dtype=dtype)
    model = build_language_model(base, rank=8, alpha=16, dropout=0.0, target_modules=["q_proj", "v_proj"])
    prompts = make_prompts(model, max_demonstrations=WORKLOADS[workload])
    sides = {"ours": ours, "model.generate": reference}
    for side in sides.values():
        side(model, prompts[:2], max_new_tokens=2)
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    rows: dict[str, Rows] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            rows[name], wall_s, cpu_s = timed(lambda side=side: side(model, prompts, max_new_tokens=max_new_tokens))  # type: ignore[misc]  # bound now, called now
            wall[name].append(round(wall_s, 2))
            cpu[name].append(round(cpu_s, 2))
            print(f"{workload:14} {dtype:9} {name:15} {wall_s:7.1f} s wall {cpu_s:7.1f} s cpu", flush=True)
    equal = sum(a == b for a, b in zip(rows["ours"], rows["model.generate"], strict=True))
    if dtype == "float32" and equal != NUM_PROMPTS:
        raise SystemExit(f"{workload}, float32: {NUM_PROMPTS - equal} of {NUM_PROMPTS} answers differ from model.generate's")
    return {
        "prompt_tokens": sorted(map(len, prompts)),
        "answer_tokens": sorted(map(len, rows["ours"])),
        "wall_s": wall,
        "cpu_s": cpu,
        "speedup_wall": round(statistics.median(wall["model.generate"]) / statistics.median(wall["ours"]), 3),
        "speedup_cpu": round(statistics.median(cpu["model.generate"]) / statistics.median(cpu["ours"]), 3),
        "equal_answers": equal,
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.json")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped in transformers
    results = {
        workload: {
            dtype: measure(workload, dtype, max_new_tokens=args.max_new_tokens, repeats=args.repeats) for dtype in ("float32", "bfloat16")
        }
        for workload in WORKLOADS
    }
    setting = {
        "model": "smollm2-135m-instruct",
        "num_prompts": NUM_PROMPTS,
        "max_new_tokens": args.max_new_tokens,
        "num_threads": args.num_threads,
        "repeats": args.repeats,
        "reach": REACH,
    }
    machine = {"processor": processor(), "num_cores": os.cpu_count(), "python": platform.python_version()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, "results": results, "machine": machine, "versions": versions}, indent=2) + "\n")
    print(f"\n{'':24} {'speedup':>8} {'by cpu':>8} {'equal':>8}   (reach {REACH})")
    for workload, by_dtype in results.items():
        for dtype, result in by_dtype.items():
            print(
                f"{workload:14} {dtype:9} {result['speedup_wall']:8} {result['speedup_cpu']:8} {result['equal_answers']:>5}/{NUM_PROMPTS}"
            )


if __name__ == "__main__":
    main()
