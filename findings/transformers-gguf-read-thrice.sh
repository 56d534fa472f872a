#!/usr/bin/env bash
# Versions: transformers 5.23.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0, numpy 2.4.6; Python 3.11. Seen since 2026-11-28.
#
# What happens: loading the tokenizer and the model of a GGUF file opens the file three times, and each time parses the whole head of it,
# the vocabulary and the merges included. The table of tensor names, which is the same for the whole model, is built once for every module,
# and it has entries for every layer: its cost grows with the square of the number of layers.
#
# Seen:
#   2 layers: the head is parsed 1 time for the tokenizer and 2 times for the model; 33 tables for 33 modules, 19767 names in all
#   4 layers: the head is parsed 1 time for the tokenizer and 2 times for the model; 59 tables for 59 modules, 67319 names in all
#
# Why it matters: a real head holds some hundred thousand tokens, token types and merges, which are read one at a time in Python. For a small
# model, that and the tables are much of the loading time.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

cd "$work"
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
venv/bin/python - <<'PYTHON'
from collections import Counter

import gguf
import numpy as np

WIDTH, INNER, TOKENS = 16, 32, ["<s>", "</s>", "ab", *"abcdefghijklmnopqrstuvwxyz"]


def write(name, layers):
    """A random Llama as a GGUF file."""
    file = gguf.GGUFWriter(name, "llama")
    file.add_context_length(64)
    file.add_embedding_length(WIDTH)
    file.add_block_count(layers)
    file.add_feed_forward_length(INNER)
    file.add_head_count(2)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(len(TOKENS))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(TOKENS)
    file.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    file.add_token_merges(["a b"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    square, up, down = (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(layers):
        block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_gate": up, "ffn_up": up, "ffn_down": down}
        block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in block.items()}
    draw = np.random.default_rng(0)
    for part, shape in shapes.items():
        file.add_tensor(f"{part}.weight", draw.standard_normal(shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


calls = Counter()
parse, build = gguf.GGUFReader.__init__, gguf.get_tensor_name_map


def counted_parse(self, *args, **options):
    calls["heads"] += 1
    parse(self, *args, **options)


def counted_build(*args, **options):
    table = build(*args, **options)
    calls["tables"] += 1
    calls["names"] += len(table.mapping)
    return table


gguf.GGUFReader.__init__, gguf.get_tensor_name_map = counted_parse, counted_build  # before transformers looks them up

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
seen = {}
for layers in (2, 4):
    name = f"{layers}.gguf"
    write(name, layers)
    calls.clear()
    AutoTokenizer.from_pretrained(".", gguf_file=name)
    for_tokenizer = calls["heads"]
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=name)
    modules = sum(1 for _ in model.modules())
    seen[layers] = for_tokenizer, calls["heads"] - for_tokenizer, calls["tables"], modules, calls["names"]
    print(
        f"{layers} layers: the head is parsed {seen[layers][0]} time for the tokenizer and {seen[layers][1]} times for the model; "
        f"{calls['tables']} tables for {modules} modules, {calls['names']} names in all"
    )

if seen != {2: (1, 2, 33, 33, 19767), 4: (1, 2, 59, 59, 67319)}:
    raise SystemExit(f"the behaviour has changed: {seen}")
PYTHON
