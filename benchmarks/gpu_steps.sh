#!/usr/bin/env bash
# A third run on a GPU machine, at most four minutes, after gpu_second.sh: whole training steps with stored maps, without
# maps, and as two eager models. README.md beside this file says what it writes and how to read that.
#
#   benchmarks/gpu_steps.sh
#
# Models with random weights of the sizes of SmolLM2-135M and of a Llama of 1 billion parameters; bfloat16 autocast. Last,
# while time is left, the smaller one under torch.compile. In between, the kernels of a step by kind of work, and its
# launches, of a model of six layers: the profiler's own work grows with the number of launches.
#
# Exit status: 0 if every part passed, 1 if one failed or was stopped, 2 without a CUDA device.
# shellcheck disable=SC2329 # part calls functions by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

SCRIPT=steps
TOTAL_SECONDS=${TOTAL_SECONDS:-240}
# shellcheck source=gpu_common.sh
source benchmarks/gpu_common.sh

# steps NAME SECONDS SECONDS_PER_BATCH ARGUMENTS...
steps() {
  local name=$1 limit=$2 seconds=$3
  shift 3
  limited "$limit" "$name" "${RUN[@]}" benchmarks.step --device cuda --seconds "$seconds" --csv "$OUT/step.csv" \
    --contenders "dss; molsaki, stored maps; eager" "$@"
}

begin
part steps smollm2-135m 90 3 --model smollm2-135m --measure time memory
part steps profile 40 1 --model small --measure profile --shape 16x256
part steps 1b 90 4 --model 1b --measure time memory
part steps compiled 60 2 --model smollm2-135m --compile --shape 4x1024
finish
