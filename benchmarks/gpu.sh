#!/usr/bin/env bash
# All that needs a card, in under ten minutes: the tests that other machines skip, then benchmarks/gpu.py, which writes results/gpu.json.
#   bash benchmarks/gpu.sh          # after `make setup`, or with raysim and its test extra installed
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
$python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: there is nothing to measure here")'
timeout 360 $python -m pytest tests/gpu -v
timeout 240 $python benchmarks/gpu.py
