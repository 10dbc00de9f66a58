# shellcheck shell=bash
# Functions of gpu_first.sh, gpu_second.sh, gpu_steps.sh and gpu_study.sh, which source this file. See README.md beside it.
#
# Everything that a script writes goes to $OUT at once: machine.txt, status.txt (a line per part with its seconds),
# CSVs, and logs.tar.gz, packed again after each part: at most eight files. $KIT_HOME/first keeps the first script's
# files for the second.

OUT=${OUT:-benchmarks/results/local}
PYTHON=${PYTHON:-python3}
KIT=${KIT:-gpu-kit}                           # what `make gpu-kit` wrote
KIT_HOME=${KIT_HOME:-/tmp/molsaki-gpu-kit}    # where it is unpacked; Triton's cache holds this path
REHEARSE=${REHEARSE:-}                        # dry or fill: run on the stand-in instead of a GPU (benchmarks/stand_in.py)
SLOWER=1                                      # factor of all time limits
LOGS=$KIT_HOME/logs-$SCRIPT
failed=0

mkdir -p "$OUT" "$LOGS"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8                  # required by PyTorch's deterministic algorithms
export TRITON_CACHE_DIR=$KIT_HOME/triton
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=$KIT_HOME/flash-attn-4-cache
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # the trainer refuses one process with several GPUs
unset TRITON_INTERPRET
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || cat "$KIT/$SCRIPT/commit" 2>/dev/null || echo unknown)}
export COMMIT

COMPILED=() # of the benchmark: --compiled where the kit was unpacked, to expect no time to compile kernels

RUN=("$PYTHON" -m) # in front of a module and its arguments
case $REHEARSE in
  "") ;;
  dry) RUN+=(benchmarks.stand_in --dry --keys "$OUT/keys.jsonl") SLOWER=20 ;;
  fill)
    export TRITON_STORE_BINARY_ONLY=1
    RUN+=(benchmarks.stand_in --keys "$OUT/keys.jsonl") SLOWER=100
    ;;
  *) echo "REHEARSE: expected dry or fill, got $REHEARSE" >&2 && exit 2 ;;
esac
if [ -n "$REHEARSE" ]; then # flash-attn 4 asks the driver otherwise
  export FLASH_ATTENTION_ARCH=sm_90 CUTE_DSL_ARCH=sm_90a FLASH_ATTENTION_NUM_SMS=132
fi

say() { echo "$*" | tee -a "$OUT/status.txt"; }

# Give a part at most the seconds that are left of the script's.
left() { echo $((TOTAL_SECONDS * SLOWER - SECONDS)); }

# limited SECONDS NAME COMMAND...: run it, keep its output in a log, and record how it ended
limited() {
  local limit=$(($1 * SLOWER)) name=$2 begin=$SECONDS status ending
  shift 2
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    say "$name: not started, no time left"
    return 1
  fi
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  status=$?
  case $status in
    0) ending=passed ;;
    124 | 137) ending="stopped after $limit s" ;;
    *) ending="failed (exit status $status)" ;;
  esac
  tail -n 2 "$LOGS/$name.log" | cut -c 1-200
  say "$name: $ending, $((SECONDS - begin)) s"
  return "$((status != 0))"
}

keep() {
  tar -czf "$OUT/.logs.tar.gz" -C "$LOGS" . && mv "$OUT/.logs.tar.gz" "$OUT/logs.tar.gz"
  mkdir -p "$KIT_HOME/$SCRIPT"
  cp "$OUT"/*.txt "$OUT"/*.csv "$KIT_HOME/$SCRIPT/" 2>/dev/null
  return 0
}

# part FUNCTION [ARGUMENTS...]: run a part of the script
part() {
  "$@" || failed=1
  keep
}

machine() {
  date -u +"date %Y-%m-%dT%H:%M:%SZ"
  echo "commit $COMMIT${REHEARSE:+, a rehearsal without a GPU: no number means anything}"
  timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv 2>/dev/null
  timeout 120 "$PYTHON" -c 'import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no CUDA device")'
}

begin() {
  : >"$OUT/status.txt"
  machine 2>&1 | tee "$OUT/machine.txt"
  if [ -z "$REHEARSE" ]; then
    if ! timeout 120 "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
      say "no CUDA device"
      exit 2
    fi
    [[ $SCRIPT = st* ]] || timeout 90 "$PYTHON" -m benchmarks.gpu_kit unpack "$SCRIPT" --kit "$KIT" --home "$KIT_HOME" 2>&1 | tee -a "$OUT/status.txt"
  fi
  KERNELS_BEFORE=$(kernels_in_cache)
  # shellcheck disable=SC2034 # the scripts use it
  [ "$KERNELS_BEFORE" -eq 0 ] || COMPILED=(--compiled)
  keep
}

kernels_in_cache() { find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l; }

# Print the status, and what a reader needs first; end with the status of the parts.
finish() {
  say "kernels compiled in this run, because the kit did not hold them: $(($(kernels_in_cache) - KERNELS_BEFORE))"
  if [ -s "$OUT/shares.csv" ]; then
    timeout 20 "$PYTHON" -m tests.helpers.budget "$OUT/shares.csv" | tee "$LOGS/shares.txt" | tail -n 40
  fi
  say "end: $SECONDS s"
  keep
  echo "--- $OUT/status.txt"
  cat "$OUT/status.txt"
  exit "$failed"
}

# suite NAME SECONDS PROCESSES ARGUMENTS...: run a part of the gpu tests, in several processes if pytest-xdist is there.
# A process in which a kernel failed ends, and another goes on (tests/conftest.py).
suite() {
  local name=$1 seconds=$2 processes=()
  if [ -z "$REHEARSE" ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then
    processes=(-n "$3" --max-worker-restart 40)
  fi
  shift 3
  # A test file that needs a missing package must not prevent the others from running.
  limited "$seconds" "$name" "${RUN[@]}" pytest -v --durations=15 --tb=short -p no:cacheprovider \
    --continue-on-collection-errors "${processes[@]}" "$@"
}

# together NAME...: wait for the suites that were started in the background
together() {
  local one status=0
  for one in "$@"; do wait "$one" || status=1; done
  return "$status"
}

tool() { # the path of one of NVIDIA's programs, or nothing
  type -P "$1" || find /usr/local/cuda*/bin /opt/nvidia/nsight-compute -maxdepth 2 -name "$1" 2>/dev/null | sort | tail -n 1
}

# sanitizer TOOL SECONDS: run the small cases under a tool of compute-sanitizer
sanitizer() {
  local program
  program=$(tool compute-sanitizer)
  if [ -z "$program" ] || [ -n "$REHEARSE" ]; then
    say "$1: skipped, compute-sanitizer is not on this machine"
    return 0
  fi
  # One allocation per tensor, so that memcheck knows its bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$2" "$1" \
    "$program" --tool "$1" --error-exitcode 9 "$PYTHON" -m benchmarks.small_cases
}
