#!/usr/bin/env bash
# Checks and times everything on an NVIDIA GPU: prints tables, appends to
# benchmarks/results. Needs an environment with jllm[cuda13,test] (or cuda12); torch is
# compared where it is installed.
#   PYTHON=.venv/bin/python bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
readonly PYTHON=${PYTHON:-python3}
export JAX_PLATFORMS=cuda,cpu
status=0
# Small shapes against float64 on the device itself; then the tests of the steps.
"$PYTHON" -m pytest -q -m "not aot and not slow" tests/pallas_kernels || status=1
# Real shapes: checked, then timed beside the limits and the peers.
"$PYTHON" -m benchmarks.kernels.run --record "$@" || status=1
# The whole engine, greedy tokens first.
"$PYTHON" -m jllm generate --prompt "Once upon a time" --max-tokens 32 || status=1
exit "$status"
