#!/usr/bin/env bash
# Where the time of one layer goes on a CUDA machine: traces of torch.profiler, then, where Nsight Compute is, what each
# of the project's kernels waits for. The clocks are left as they are.
#
#   benchmarks/profile.sh [SHAPE]      a part of a shape's name; the one most targets are judged by if none is given
#
# Writes to ${OUT:-benchmarks/results/local}: traces/*.json (for a trace viewer) and traces/*.txt (kernels by time) of
# every contender; ncu.ncu-rep and ncu.csv, one row for each kernel and metric. PYTHON=... and NCU=... name other programs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-benchmarks/results/local}
PYTHON=${PYTHON:-python3}
SHAPE=${1:-1x4096 H32/32 D128 W256}
KERNELS='regex:^(flash_|map_|fold_|pool_|add_tiles)' # the plain attentions' kernels are in the traces
NCU=${NCU:-$(command -v ncu || ls /usr/local/cuda*/bin/ncu /opt/nvidia/nsight-compute/*/ncu 2>/dev/null | tail -n 1)}
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=0

"$PYTHON" -m benchmarks.layer --only "$SHAPE" --profile "$OUT/traces" || failed=1
for table in "$OUT"/traces/*backward-molsaki*.txt; do
  [ -e "$table" ] && echo "--- $table" && head -n 16 "$table" | cut -c 1-200
done

if [ -z "$NCU" ]; then
  echo "ncu: skipped, it is not on this machine"
  exit "$failed"
fi
# Speed of light says whether products, memory or neither is near its ceiling; the other sections why: registers and
# shared memory that limit the blocks at a time, what the warps wait for, the traffic of each level. Each kernel is
# replayed some twenty times a launch, so both passes are run twice and no more.
"$NCU" --clock-control none --target-processes all --kernel-name "$KERNELS" --force-overwrite --export "$OUT/ncu" \
  --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats \
  --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis \
  "$PYTHON" -m benchmarks.layer --only "$SHAPE" --once || failed=1
"$NCU" --import "$OUT/ncu.ncu-rep" --page details --csv >"$OUT/ncu.csv" || failed=1
exit "$failed"
