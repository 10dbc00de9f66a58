#!/usr/bin/env bash
# What only a CUDA machine can show, in one call of less than nine minutes: the `gpu` tests, compute-sanitizer on small
# cases, the benchmark grid. Nothing is installed.
#
#   benchmarks/gpu.sh [tests] [sanitizer] [bench]             all three, in this order, if none is named
#   benchmarks/gpu.sh [triton] [engines] [flex] [models]      the tests' four processes, each by itself
#
# `tests` runs those four at once: they wait for compilers on the host far more than for the GPU, whose memory they
# share (predicted: 60 GiB at most). `bench` measures the most telling shapes first; another call with the layer.csv of
# the one before in OUT measures what is left. Results are written as they come to ${OUT:-benchmarks/results/local}:
# machine.txt, a log for each part, layer.csv, layer.json. status.txt has one line a part. A part that runs out of its
# time is stopped, what it wrote stays, and the next one starts. The exit status is 0 if every part was right. Figures
# of a run whose tests failed are for finding the fault, not for reporting.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-benchmarks/results/local}
TESTS_SECONDS=${TESTS_SECONDS:-240}
SANITIZER_SECONDS=${SANITIZER_SECONDS:-40} # for the cases alone, then for each tool
BENCH_SECONDS=${BENCH_SECONDS:-150}
PYTHON=${PYTHON:-python3}

mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what PyTorch's deterministic algorithms ask for
unset TRITON_INTERPRET
failed=0

# limited SECONDS NAME LOG COMMAND...: run it, keep its output, note how it ended
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

# suite NAME ARGUMENTS...: some of the gpu tests, in a process of their own
suite() {
  local name=$1
  shift
  # A test file that needs a package this machine has not must not keep the others from running.
  limited "$TESTS_SECONDS" "$name" "$name.log" "$PYTHON" -m pytest -m gpu -v --durations=15 \
    --continue-on-collection-errors -p no:cacheprovider "$@"
}

ENGINES_FILE=tests/gpu/test_engines_hardware.py
MODELS_FILE=tests/gpu/test_models_hardware.py
triton() { suite triton tests --ignore "$ENGINES_FILE" --ignore "$MODELS_FILE"; }
engines() { suite engines "$ENGINES_FILE" -k "not flex"; }
flex() { suite flex "$ENGINES_FILE" -k flex; } # compiles for seconds a case
# A process of several GPUs is refused by the trainer.
models() { CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} suite models "$MODELS_FILE"; }

tests() {
  local part status=0 running=()
  set -m # else what runs in the background ignores the interrupt that ends it with a summary
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
  # Without the tool first: compiles the kernels, and says whether the cases themselves are in order.
  limited "$SANITIZER_SECONDS" "sanitizer cases" sanitizer-none.log "$PYTHON" "$OUT/sanitizer_cases.py" || status=1
  if [ -z "$sanitizer" ]; then
    echo "sanitizer: skipped, compute-sanitizer is not on this machine" | tee -a "$OUT/status.txt"
    return "$status"
  fi
  for tool in memcheck racecheck; do
    # An allocation for each tensor, so that memcheck sees where one ends.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$SANITIZER_SECONDS" "sanitizer $tool" "sanitizer-$tool.log" \
      "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" "$OUT/sanitizer_cases.py" || status=1
  done
  return "$status"
}

small_cases() {
  cat <<'EOF'
"""Every kernel of the project once or twice, on shapes that end inside a tile."""

import torch

from molsaki_kernels import StepPlan, pool_values, stepwise_attention, stepwise_map
from molsaki_kernels._triton.lse_gradient import fold

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
    stepwise_map(q, k, lse, plan, backend="triton", **options).square().sum().backward()
    folded, upstream = fold(out.detach(), torch.randn_like(out), torch.randn(3, 4, 130, device="cuda"))

bounds = torch.tensor([0, 130, 134, 134], dtype=torch.int32, device="cuda")
plan = StepPlan.from_spans(steps[:1] + [[(3, 4)]] + steps[2:], words[:1] + [[[0], [2]]] + words[2:], device="cuda")
q, k, v = leaf(1, 4, 134, 64), leaf(1, 2, 134, 64), leaf(1, 2, 134, 64)
out, maps = stepwise_attention(q, k, v, plan, cu_seqlens=bounds, heads="none", engine="triton")
(out.float().square().sum() + maps.square().sum()).backward()
for heads, lengths, packed in (("concat", None, bounds), ("mean", torch.tensor([130], device="cuda"), None)):
    pool_values(v, lengths, heads=heads, cu_seqlens=packed, backend="triton").square().sum().backward()
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
  echo "no CUDA device: every test would be skipped" | tee -a "$OUT/status.txt" >&2
  exit 2
fi
for part in "$@"; do "$part" || failed=1; done
echo "--- $OUT/status.txt"
cat "$OUT/status.txt"
exit "$failed"
