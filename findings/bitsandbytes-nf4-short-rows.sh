#!/usr/bin/env bash
# Versions: bitsandbytes 0.50.2, torch 2.13.0, numpy 2.4.6; Python 3.11, x86-64 Linux without a GPU. Seen since 2026-11-29.
#
# What happens: on a processor, dequantize_4bit gives back other weights than those that quantize_4bit stored, for matrices whose rows are
# 32 or 96 numbers long with blocks of 64: errors of the size of the largest weights, where four bits cost a fifth of that. The stored bytes
# are right: read as one long row they come back well. Rows of 64, of 128 and even of 100 are read well. Nothing is said.
#
# Seen (64 rows of normal numbers, nf4; largest error by rows, and of the same bytes read as one row):
#   rows of  32: 1.89, as one row 0.39
#   rows of  64: 0.45, as one row 0.45
#   rows of  96: 2.04, as one row 0.44
#   rows of 100: 0.50, as one row 0.50
#   rows of 128: 0.47, as one row 0.47
#
# Why it matters: a tiny model made for a test, or one with such a width, answers nonsense in nf4 on a processor, and its LoRA is trained
# against weights that are not the base model's. raysim leaves layers whose inputs are no multiple of 64 as they are.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6

cd "$work"
cat >rows.py <<'PYTHON'
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit


def error(weight):
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return (dequantize_4bit(packed, state) - weight).abs().max().item(), packed


torch.manual_seed(0)
for width in (32, 64, 96, 100, 128):
    weight = torch.randn(64, width)
    (by_rows, packed), (as_one, same) = error(weight), error(weight.reshape(1, -1))
    assert torch.equal(packed.flatten(), same.flatten())
    print(f"rows of {width:3d}: {'wrong' if by_rows > 1 else 'right'}, as one row {'wrong' if as_one > 1 else 'right'} ({by_rows:.2f}, {as_one:.2f})")
PYTHON
CUDA_VISIBLE_DEVICES="" venv/bin/python rows.py 2>/dev/null | tee said
sed 's/ (.*//' said >seen

cat >expected <<'END'
rows of  32: wrong, as one row right
rows of  64: right, as one row right
rows of  96: wrong, as one row right
rows of 100: right, as one row right
rows of 128: right, as one row right
END
diff expected seen || { echo "the behaviour has changed" >&2; exit 1; }
