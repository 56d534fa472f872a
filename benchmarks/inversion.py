"""What does a server that looks at one client's update read in it, by rank, batch size and noise?

DAGER (Petrov et al. 2024, arXiv 2405.15586) for LoRA against SmolLM2-135M in float32, adapter on q and v, one SGD step on
1, 2 or 4 short examples. Two parts: A's gradient at an adapter whose B is drawn from N(0, 0.01^2), as B is not zero after
the first round; and B's gradient at a fresh adapter (B = 0), where A's gradient is zero. Noise is relative to the clip,
which is the gradient's own norm, and the attacker knows its size. Expected: everything at ranks whose rows are more than the
tokens, nothing where they are fewer, and nothing under noise.

    python benchmarks/inversion.py [--ranks 8 64 256]
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from raysim.attacks.inversion import InversionSettings, inversion_sweep, template_opening
from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import encode_records
from raysim.model.base_model import load_base_model
from raysim.model.language_model import build_language_model
from raysim.results.files import environment

MODEL, TARGETS, B_STD, SEED = "smollm2-135m-instruct", ["q_proj", "v_proj"], 0.01, 0
BATCH_SIZES, NOISE_MULTIPLIERS = [1, 2, 4], [0.0, 1e-3, 1e-1, 1.0]
BATCH_SIZES_ROUND_0 = [1, 4]
TEXTS = [
    ("When is Maria Keller's next visit?", "On 14 May at 9:30, with Dr. Osei."),
    ("What does Jonas Lind take for his heart?", "He takes 50 mg of metoprolol every morning."),
    ("Who pays the rent for 8 Mill Lane?", "Priya Nair, from account 4471."),
    ("Where did the Ortega family move?", "They left Lisbon for a farm near Ghent."),
]
COLUMNS = ("factor", "rank", "batch", "noise", "distinct_tokens", "num_rows", "span_dim", "sequence_dim", "num_candidates")
FIGURES = ("token_recall", "token_precision", "nearest_recall", "rouge_1", "rouge_l", "exact_match")


def measure(ranks: list[int]) -> list[dict[str, Any]]:
    """The rows of both parts."""
    base = load_base_model(MODEL, dtype="float32")

    def build(rank: int) -> Any:
        return build_language_model(base, rank=rank, alpha=2.0 * rank, dropout=0.0, target_modules=TARGETS)

    lm = build(min(ranks))
    records = [Record(record_id=i, instruction=instruction, response=response) for i, (instruction, response) in enumerate(TEXTS)]
    examples, num_cut = encode_records(records, tokenizer=lm.tokenizer, eos_token_id=lm.eos_token_ids[0], max_length=256, chat=ChatFormat())
    assert num_cut == 0, "every example is seen whole"
    opening = template_opening(lm.tokenizer, chat=ChatFormat())
    sweep = partial(inversion_sweep, build, examples, opening=opening, ranks=ranks, seed=SEED)
    rows = sweep(batch_sizes=BATCH_SIZES, noise_multipliers=NOISE_MULTIPLIERS, b_std=B_STD, settings=InversionSettings(factor="A"))
    return rows + sweep(batch_sizes=BATCH_SIZES_ROUND_0, noise_multipliers=[0.0], b_std=0.0, settings=InversionSettings(factor="B"))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned columns."""
    names = (*COLUMNS, *FIGURES)
    lines = ["  ".join(f"{name:>6}" for name in names)]
    for row in rows:
        cells = [f"{row[name]:.2f}" if name in FIGURES else str(row[name]) for name in names]
        lines.append("  ".join(f"{cell:>{max(len(name), 6)}}" for name, cell in zip(names, cells, strict=True)))
    return "\n".join(lines)


def main() -> None:
    """Runs the sweep, prints it and writes benchmarks/results/inversion.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "inversion.json")
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = measure(arguments.ranks)
    wall_s = time.perf_counter() - started
    print(table(rows))
    print(f"{len(rows)} attacks in {wall_s:.0f} s")
    settings = {"model": MODEL, "target_modules": TARGETS, "b_std": B_STD, "seed": SEED, "texts": TEXTS}
    record = settings | {"rows": rows, "wall_s": wall_s, "environment": environment()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
