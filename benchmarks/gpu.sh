#!/usr/bin/env bash
# Runs everything that needs a CUDA machine, in one call of less than nine minutes: the `gpu` tests, compute-sanitizer on
# small cases, the benchmark grid. It installs nothing.
#
#   benchmarks/gpu.sh [tests] [sanitizer] [bench]             all three, in this order, by default
#   benchmarks/gpu.sh [triton] [engines] [flex] [models]      the four processes of `tests`, one by one
#
# `tests` runs its four processes at once: they spend most of their time compiling on the host, and they share the GPU's
# memory (predicted: at most 60 GiB). `bench` measures the most informative shapes first; another call with the previous
# layer.csv in OUT continues. Results go to ${OUT:-benchmarks/results/local} as soon as they exist: machine.txt, one log
# per part, layer.csv, layer.json, and status.txt with one line per part. A part that exceeds its time is stopped, its
# output stays, and the next one starts. The exit status is 0 if every part passed. Do not report timings of a run whose
# tests failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-benchmarks/results/local}
TESTS_SECONDS=${TESTS_SECONDS:-240}
SANITIZER_SECONDS=${SANITIZER_SECONDS:-40} # for the cases alone, then per tool
BENCH_SECONDS=${BENCH_SECONDS:-150}
PYTHON=${PYTHON:-python3}

mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # required by PyTorch's deterministic algorithms
unset TRITON_INTERPRET
failed=0

# limited SECONDS NAME LOG COMMAND...: run it, keep its output, record how it ended
limited() {
  local seconds=$1 name=$2 log=$3 begin=$SECONDS status ending
  shift 3
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$OUT/$log" 2>&1
  status=$?
  case $status in
    0) ending=passed ;;
    124 | 137) ending="stopped after $seconds s" ;;
    *) ending="failed (exit status $status)" ;;
  esac
  tail -n 3 "$OUT/$log"
  echo "$name: $ending, $((SECONDS - begin)) s" | tee -a "$OUT/status.txt"
  return "$((status != 0))"
}

machine() {
  date -u +"date %Y-%m-%dT%H:%M:%SZ"
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
  "$PYTHON" -c 'import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
print(torch.cuda.get_device_properties(0))'
}

# suite NAME ARGUMENTS...: run a part of the gpu tests in one process
suite() {
  local name=$1
  shift
  # A test file that needs a missing package must not prevent the others from running.
  limited "$TESTS_SECONDS" "$name" "$name.log" "$PYTHON" -m pytest -m gpu -v --durations=15 \
    --continue-on-collection-errors -p no:cacheprovider "$@"
}

ENGINES_FILE=tests/gpu/test_engines_hardware.py
MODELS_FILE=tests/gpu/test_models_hardware.py
triton() { suite triton tests/kernels tests/gpu/test_triton_hardware.py; }
engines() { suite engines "$ENGINES_FILE" -k "not flex"; }
flex() { suite flex "$ENGINES_FILE" -k flex; } # compiles for seconds per case
# The trainer refuses a single process with several GPUs.
models() { CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} suite models "$MODELS_FILE"; }

tests() {
  local part status=0 running=()
  set -m # otherwise background processes ignore the interrupt after which pytest prints its summary
  for part in triton engines flex models; do
    "$part" &
    running+=($!)
  done
  for part in "${running[@]}"; do wait "$part" || status=1; done
  set +m
  return "$status"
}

sanitizer() {
  local tool sanitizer status=0
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
  small_cases >"$OUT/sanitizer_cases.py"
  # First without the tool, which compiles the kernels and shows whether the cases themselves pass.
  limited "$SANITIZER_SECONDS" "sanitizer cases" sanitizer-none.log "$PYTHON" "$OUT/sanitizer_cases.py" || status=1
  if [ -z "$sanitizer" ]; then
    echo "sanitizer: skipped, compute-sanitizer is not on this machine" | tee -a "$OUT/status.txt"
    return "$status"
  fi
  for tool in memcheck racecheck; do
    # One allocation per tensor, so that memcheck knows its bounds.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$SANITIZER_SECONDS" "sanitizer $tool" "sanitizer-$tool.log" \
      "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" "$OUT/sanitizer_cases.py" || status=1
  done
  return "$status"
}

small_cases() {
  cat <<'EOF'
"""Runs every kernel of the project once or twice, on shapes that end inside a tile."""

import torch

from molsaki_kernels import StepPlan, pool_values, stepwise_attention, stepwise_map
from molsaki_kernels._triton.lse_gradient import fold_dlse_into_out

torch.manual_seed(0)
steps = [[(0, 9), (9, 50), (60, 130)], [(3, 4)], []]
words = [[[0], [7, 8], [129]], [[5], [2]], []]
plan = StepPlan.from_spans(steps, words, device="cuda")


def leaf(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


for D, options in ((64, {}), (128, dict(window=33, softcap=20.0))):
    q, k, v = leaf(3, 4, 130, D), leaf(3, 2, 130, D), leaf(3, 2, 130, D)
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    out, maps = stepwise_attention(q, k, v, plan, sinks=sinks, engine="triton", **options)
    (out.float().square().sum() + maps.square().sum()).backward()
    lse = torch.randn(3, 4, 130, device="cuda").add_(9).requires_grad_()
    stepwise_map(q, k, lse, plan, engine="triton", **options).square().sum().backward()
    folded, upstream = fold_dlse_into_out(out.detach(), torch.randn_like(out), torch.randn(3, 4, 130, device="cuda"))

bounds = torch.tensor([0, 130, 134, 134], dtype=torch.int32, device="cuda")
plan = StepPlan.from_spans(steps[:1] + [[(3, 4)]] + steps[2:], words[:1] + [[[0], [2]]] + words[2:], device="cuda")
q, k, v = leaf(1, 4, 134, 64), leaf(1, 2, 134, 64), leaf(1, 2, 134, 64)
out, maps = stepwise_attention(q, k, v, plan, cu_seqlens=bounds, head_reduction="none", engine="triton")
(out.float().square().sum() + maps.square().sum()).backward()
for heads, lengths, packed in (("concat", None, bounds), ("mean", torch.tensor([130], device="cuda"), None)):
    pool_values(v, lengths, heads=heads, cu_seqlens=packed).square().sum().backward()
torch.cuda.synchronize()
print("small cases: done")
EOF
}

bench() {
  limited "$BENCH_SECONDS" bench bench.log \
    "$PYTHON" -m benchmarks.layer --device cuda --limit $((BENCH_SECONDS - 10)) --csv "$OUT/layer.csv" --json "$OUT/layer.json"
}

for part in "$@"; do
  case $part in
    tests | triton | engines | flex | models | sanitizer | bench) ;;
    *) echo "expected tests, triton, engines, flex, models, sanitizer or bench, got $part" >&2 && exit 2 ;;
  esac
done
[ $# -gt 0 ] || set -- tests sanitizer bench
: >"$OUT/status.txt"
machine 2>&1 | tee "$OUT/machine.txt"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device found; every test would be skipped" | tee -a "$OUT/status.txt" >&2
  exit 2
fi
for part in "$@"; do "$part" || failed=1; done
echo "--- $OUT/status.txt"
cat "$OUT/status.txt"
exit "$failed"
