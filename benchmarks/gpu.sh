#!/usr/bin/env bash
# Checks and times everything on an NVIDIA GPU: prints tables, appends to
# benchmarks/results. Needs an environment with jllm[cuda13,test] (or cuda12); torch is
# compared where it is installed.
#   PYTHON=.venv/bin/python bash benchmarks/gpu.sh             on a GPU
#   PYTHON=.venv/bin/python bash benchmarks/gpu.sh --dry-run   tiny, on the CPU
set -uo pipefail
cd "$(dirname "$0")/.."
readonly PYTHON=${PYTHON:-python3}
status=0
if [[ " $* " != *" --dry-run "* ]]; then
  export JAX_PLATFORMS=cuda,cpu
  # Greedy tokens first, then small shapes against float64 on the device itself.
  timeout 180 "$PYTHON" -m jllm generate --prompt "Once upon a time" --max-tokens 32 ||
    status=1
  timeout 420 "$PYTHON" -m pytest -q -m "not aot and not slow" tests/pallas_kernels ||
    status=1
fi
"$PYTHON" -m benchmarks.gpu.run "$@" || status=1
exit "$status"
