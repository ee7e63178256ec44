#!/usr/bin/env bash
# compute-sanitizer over the small GPU tests of the compiled kernels: addresses, races in shared memory, and what is read
# before it is written. Needs a CUDA device and compute-sanitizer of the CUDA toolkit. One argument: a folder for the logs.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
LOGS=${1:-outputs/sanitize}
SMALL='(rules or half_width or topologies or sizes or segments or ranks or out_of_range) and not 4097'
mkdir -p "$LOGS"
# PyTorch's caching allocator would hide what lies beyond a tensor, and what nobody has written.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
status=0
for tool in memcheck racecheck initcheck; do
  # initcheck has to see what other kernels write.
  only=(--kernel-name kns=gut_fast)
  if [ "$tool" = initcheck ]; then only=(); fi
  if compute-sanitizer --tool "$tool" ${only[@]+"${only[@]}"} --error-exitcode 9 \
    "$PYTHON" -m pytest tests/test_cuda.py -q -m gpu -k "$SMALL" >"$LOGS/$tool.txt" 2>&1; then
    echo "$tool: clean"
  else
    echo "$tool: failed, see $LOGS/$tool.txt"
    status=1
  fi
done
exit $status
