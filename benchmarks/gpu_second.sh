#!/usr/bin/env bash
# The second run on a GPU machine, at most five minutes, after gpu_first.sh on the same machine or another. README.md
# beside this file says how to prepare it (`make gpu-kit`), what it writes and how to read that.
#
#   benchmarks/gpu_second.sh
#
# It reads what the first wrote in $KIT_HOME/first. If a test failed there, it first runs those tests again, alone, with
# long tracebacks and under memcheck. Then:
# 1. flash-attn 4: unpack its second half, compare small cases with PyTorch's attention
# 2. in processes that run at once: the engine's tests, long sequences, bitwise repeats, float16, racecheck
# 3. the benchmark with flash-attn 4; the experiments
# 4. Nsight Compute on the kernels that the first run found slowest against their predictions
# 5. the tests that need most of the memory
#
# Exit status: 0 if every part passed, 1 if one failed or was stopped, 2 without a CUDA device.
# shellcheck disable=SC2329 # part calls functions by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

SCRIPT=second
TOTAL_SECONDS=${TOTAL_SECONDS:-290}
FIRST=${FIRST:-} # the first run's folder, if it was on another machine
# shellcheck source=gpu_common.sh
source benchmarks/gpu_common.sh
FIRST=${FIRST:-$KIT_HOME/first}
SITE=$KIT_HOME/flash-attn-4
export PYTHONPATH=$PYTHONPATH:$SITE:$SITE/nvidia_cutlass_dsl/dsl_packages

# Print the tests that failed in the first run, in the order in which they failed.
# After a fault in a kernel all later tests of the process fail, so the first names matter.
failed_tests() {
  if [ -d "$KIT_HOME/logs-first" ]; then
    cat "$KIT_HOME"/logs-first/*.log
  elif [ -f "$FIRST/logs.tar.gz" ]; then
    tar -xzOf "$FIRST/logs.tar.gz"
  fi 2>/dev/null | awk '
    /^tests\/[^ ]*::/ { if ($2 ~ /^(FAILED|ERROR|Fatal)/) print $1 }
    /^\[gw[0-9]+\].* (FAILED|ERROR) tests\/[^ ]*::/ { print $NF }
    /^(FAILED|ERROR) tests\/[^ ]*::/ { print $2 }' | awk '!seen[$0]++'
}

# Whether a test failed or crashed its process. A part that was stopped at its limit, or that ran no test, did not fail.
first_failed() {
  local ending='failed \(exit status (1|1[0-9][0-9])\)'
  [ -n "$(failed_tests)" ] || grep -qE "^((triton|engines|models|others): $ending|memcheck: failed)" "$FIRST/status.txt" 2>/dev/null
}

again() {
  local names
  mapfile -t names < <(failed_tests | head -n 8)
  if [ "${#names[@]}" -eq 0 ]; then
    say "again: no failed test is named in $KIT_HOME/logs-first or $FIRST/logs.tar.gz"
    return 0
  fi
  limited 50 again "$PYTHON" -m pytest -v --tb=long -p no:cacheprovider "${names[@]}" || true
  local program
  program=$(tool compute-sanitizer)
  [ -z "$program" ] || PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 50 again-memcheck \
    "$program" --tool memcheck "$PYTHON" -m pytest -v --tb=long -p no:cacheprovider "${names[0]}"
}

flash4() { limited 30 flash4 "${RUN[@]}" benchmarks.experiments flash4; }

tests() {
  local status=0 running=() files=(tests/gpu/test_engines_hardware.py tests/gpu/test_triton_hardware.py)
  export MOLSAKI_ERROR_SHARES=$OUT/shares.csv
  set -m # otherwise background processes ignore the interrupt after which pytest prints its summary
  if [ "$1" = flash4 ]; then
    suite flash4-tests 75 5 -m "gpu and not memory" -k "flash_attn and not long and not torch.float32" \
      tests/gpu/test_engines_hardware.py tests/gpu/test_widened_hardware.py & running+=($!)
    suite preprocess 75 4 -m gpu tests/gpu/test_fa4_preprocess_hardware.py & running+=($!)
  fi
  suite long 75 2 -m "gpu and not memory" -k "test_long and not flex" "${files[@]}" & running+=($!)
  suite repeats 75 2 -m "gpu and not memory" -k "(bitwise or two_layouts) and not flex" "${files[@]}" & running+=($!)
  if [ -z "$REHEARSE" ]; then # the kit does not hold these kernels
    suite float16 75 6 -m "gpu and not memory" -k "torch.float16 and not flash_attn and not flex and not long" \
      tests/gpu & running+=($!)
  fi
  sanitizer racecheck 75 & running+=($!)
  together "${running[@]}" || status=1
  set +m
  unset MOLSAKI_ERROR_SHARES
  return "$status"
}

bench() {
  limited 75 bench "${RUN[@]}" benchmarks.layer --device cuda --no-flex --modes eager graph \
    "${COMPILED[@]}" --seconds 0.5 \
    --passes forward+backward --limit $((70 * SLOWER)) --csv "$OUT/layer.csv" --only "1x4096 H32/32 D128 W256" \
    "16x256 H9/3 D64 W20" "1x8192 H32/32 D128 W256" "1x4096 H32/32 D128 W16" "1x4096 H32/8 D128 W256" || return 1
  limited 25 kernels "${RUN[@]}" benchmarks.layer --device cuda --contenders "flash_attn" "flash-attn 4" \
    --only "1x4096 H32/32 D128 W256" --kernels "$OUT/kernels.csv"
}

experiments() { limited 40 experiments "${RUN[@]}" benchmarks.experiments all --csv "$OUT/experiments.csv"; }

ncu() {
  local program names
  program=$(tool ncu)
  if [ -z "$program" ] || [ -n "$REHEARSE" ]; then
    say "ncu: skipped, it is not on this machine"
    return 0
  fi
  names=$(timeout 20 "$PYTHON" -m benchmarks.gpu_kit slowest "$FIRST/kernels.csv")
  # Each kernel is replayed about twenty times per launch. The clocks are left alone.
  limited 60 ncu "$program" --clock-control none --target-processes all --kernel-name "regex:^($names)" \
    --launch-count 8 --force-overwrite --export "$LOGS/ncu" --section SpeedOfLight --section LaunchStats \
    --section Occupancy --section WarpStateStats --section MemoryWorkloadAnalysis \
    "$PYTHON" -m benchmarks.layer --device cuda --once --passes forward+backward --contenders "molsaki, sdpa" \
    --only "1x4096 H32/32 D128 W256" || return 1
  timeout 20 "$program" --import "$LOGS/ncu.ncu-rep" --page details --csv >"$OUT/ncu.csv"
}

memory() {
  export MOLSAKI_ERROR_SHARES=$OUT/shares.csv
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True suite memory 60 1 -m "gpu and memory" -k "triton" tests/gpu
}

begin
if first_failed && [ -z "$REHEARSE" ]; then
  say "a test of the first run failed: it is run again first. Report no timings of an engine whose tests failed"
  part again
fi
flash4=missing
if "$PYTHON" -c 'import flash_attn.cute.interface' 2>"$LOGS/flash4-import.log"; then
  flash4=flash4
  part flash4
else
  say "flash-attn 4: skipped, it does not import ($(tail -n 1 "$LOGS/flash4-import.log"))"
fi
part tests "$flash4"
part bench
part experiments
part ncu
part memory
finish
