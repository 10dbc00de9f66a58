#!/usr/bin/env bash
# Profiles one layer on a CUDA machine: traces of torch.profiler and, where Nsight Compute is installed, the stalls of
# each of the project's kernels. It does not change the clocks.
#
#   benchmarks/profile.sh [SHAPE]      a part of a shape's name; default: 1x4096 H32/32 D128 W256
#
# Writes to ${OUT:-benchmarks/results/local}: traces/*.json (for a trace viewer) and traces/*.txt (kernels by time) of
# every contender; ncu.ncu-rep and ncu.csv, one line per kernel and metric. PYTHON=... and NCU=... name other programs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=${OUT:-benchmarks/results/local}
PYTHON=${PYTHON:-python3}
SHAPE=${1:-1x4096 H32/32 D128 W256}
KERNELS='regex:^(flash_|map_|fold_|pool_|add_tiles)' # kernels of plain attention are in the traces only
NCU=${NCU:-$(type -P ncu || find /usr/local/cuda*/bin /opt/nvidia/nsight-compute -maxdepth 2 -name ncu 2>/dev/null | tail -n 1)}
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=0

"$PYTHON" -m benchmarks.layer --only "$SHAPE" --profile "$OUT/traces" || failed=1
for table in "$OUT"/traces/*backward-molsaki*.txt; do
  [ -e "$table" ] && echo "--- $table" && head -n 16 "$table" | cut -c 1-200
done

if [ -z "$NCU" ]; then
  echo "ncu: skipped, it is not installed"
  exit "$failed"
fi
# SpeedOfLight shows whether products or memory are near their limit; the other sections show why: registers and shared
# memory that limit occupancy, stalls of the warps, traffic per level. ncu replays each kernel about twenty times per
# launch, so both passes run only twice.
"$NCU" --clock-control none --target-processes all --kernel-name "$KERNELS" --force-overwrite --export "$OUT/ncu" \
  --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats \
  --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis \
  "$PYTHON" -m benchmarks.layer --only "$SHAPE" --once || failed=1
"$NCU" --import "$OUT/ncu.ncu-rep" --page details --csv >"$OUT/ncu.csv" || failed=1
exit "$failed"
