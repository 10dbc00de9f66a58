#!/usr/bin/env bash
# The first of two runs on a GPU machine, at most six minutes: does it work, and how fast is it. README.md beside this
# file says how to prepare it (`make gpu-kit`), what it writes and how to read that.
#
#   benchmarks/gpu_first.sh
#
# 1. versions; unpack the kit; does its cache of compiled kernels fit this machine
# 2. every kernel once, on small cases. If this fails, the script ends at once with exit status 3
# 3. correctness, in processes that run at once: Triton kernels, engines, models, training, FlexAttention; the small cases
#    under compute-sanitizer's memcheck
# 4. alone: the shapes that decide, against every plain attention and eager; the time of each of our kernels
#
# Exit status: 0 if every part passed, 1 if one failed or was stopped, 2 without a CUDA device, 3 as above. Do not report
# timings of a run whose tests failed.
# shellcheck disable=SC2329 # part calls functions by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

SCRIPT=first
TOTAL_SECONDS=${TOTAL_SECONDS:-345}
SMALL_SECONDS=${SMALL_SECONDS:-45}
TESTS_SECONDS=${TESTS_SECONDS:-150}
BENCH_SECONDS=${BENCH_SECONDS:-100}
KERNELS_SECONDS=${KERNELS_SECONDS:-30}
# shellcheck source=gpu_common.sh
source benchmarks/gpu_common.sh

small() { limited "$SMALL_SECONDS" small "${RUN[@]}" benchmarks.small_cases; }

tests() {
  local status=0 running=() others wide="not torch.float16" # bfloat16 and float32 only
  export MOLSAKI_ERROR_SHARES=$OUT/shares.csv
  set -m # otherwise background processes ignore the interrupt after which pytest prints its summary
  suite triton "$TESTS_SECONDS" 4 -m "gpu and not memory" -k "$wide and not long" \
    tests/gpu/test_triton_hardware.py tests/kernels/triton & running+=($!)
  suite engines "$TESTS_SECONDS" 6 -m "gpu and not memory" -k "(sdpa or triton) and not long and $wide" \
    tests/gpu/test_engines_hardware.py & running+=($!)
  suite models "$TESTS_SECONDS" 2 -m "gpu and not memory" -k "bfloat16 and (Llama or Gemma2 or GptOss)" \
    tests/gpu/test_models_hardware.py & running+=($!)
  suite training "$TESTS_SECONDS" 4 -m "gpu and not memory" tests/gpu/test_training_hardware.py & running+=($!)
  if [ -z "$REHEARSE" ]; then # the stand-in cannot compile FlexAttention
    TORCHINDUCTOR_COMPILE_THREADS=1 suite flex "$TESTS_SECONDS" 4 -m "gpu and not memory" \
      -k "flex and bfloat16 and (test_features or test_one_gradient)" tests/gpu/test_engines_hardware.py & running+=($!)
  fi
  mapfile -t others < <(find tests/gpu -name 'test_*.py' | grep -vE '/test_(triton|engines|models|training)_hardware.py' | sort)
  if [ "${#others[@]}" -gt 0 ]; then
    suite others "$TESTS_SECONDS" 3 -m "gpu and not memory" -k "$wide and not flash_attn and not flex and not long" \
      "${others[@]}" & running+=($!)
  fi
  sanitizer memcheck "$TESTS_SECONDS" & running+=($!)
  together "${running[@]}" || status=1
  set +m
  unset MOLSAKI_ERROR_SHARES
  return "$status"
}

SHAPES=("1x4096 H32/32 D128 W256" "16x256 H9/3 D64 W20" "2x2048 H32/32 D128 W64" "1x16384 H32/32 D128 W1024")

bench() {
  limited "$BENCH_SECONDS" bench "${RUN[@]}" benchmarks.layer --device cuda --no-flex --modes eager graph \
    "${COMPILED[@]}" --seconds 0.6 --limit $((BENCH_SECONDS * SLOWER - 5)) --only "${SHAPES[@]}" --csv "$OUT/layer.csv"
}

kernels() {
  limited "$KERNELS_SECONDS" kernels "${RUN[@]}" benchmarks.layer --device cuda --no-flex --contenders molsaki cuDNN \
    --only "${SHAPES[@]:0:2}" --kernels "$OUT/kernels.csv"
}

begin
if ! small; then
  keep
  sed -n '/Traceback/,$p' "$LOGS/small.log" | tail -n 25
  say "the first kernels failed: nothing else was started, $SECONDS s"
  keep
  exit 3
fi
say "kernels compiled for the small cases: $(($(kernels_in_cache) - KERNELS_BEFORE)) (0 if the kit fits this machine)"
part tests
part bench
part kernels
finish
