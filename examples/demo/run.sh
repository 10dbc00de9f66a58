#!/usr/bin/env bash
# The demo that `make demo` runs: one command after another, from texts to a distilled student and pictures.
#
# Existing results are reused, so it can be interrupted and run again; delete a folder to compute it again.
# Other models, from the hub or from a folder:  TEACHER=Qwen/Qwen3-0.6B OUT=demo-qwen make demo
set -euo pipefail
cd "$(dirname "$0")/../.."
scripts=examples/demo
out=${OUT:-demo}
teacher=${TEACHER:-$out/teacher}
started=$SECONDS
# Mixed precision: matrix products are 2.5 times faster on a CPU with avx512_bf16, and far slower on one without it.
bf16=false
if grep -qs avx512_bf16 /proc/cpuinfo || nvidia-smi >/dev/null 2>&1; then bf16=true; fi

stage=0 stages=8
say() { printf '\n[%d of %d, %d s] %s\n' $((++stage)) $stages $((SECONDS - started)) "$*"; }

if [ "$teacher" = "$out/teacher" ]; then
  stages=9
  say "The teacher: SmolLM2-135M-Instruct, from its PyPI package"
  python $scripts/make_teacher.py "$teacher"
fi

say "The student: 12 of the teacher's layers"
python $scripts/cut_student.py "$teacher" "$out/student" --layers 12

say "The data: word problems with step-by-step rationales"
python $scripts/make_data.py "$out/data" --train 128 --test 32

say "The teacher's attention to the numbers, step by step, once for every problem"
molsaki extract --config $scripts/extract.yaml --teacher "$teacher" --data_files "$out/data/train.jsonl" \
  --store "$out/store"

say "The student before training"
[ -f "$out/before/summary.json" ] ||
  molsaki evaluate --config $scripts/evaluate.yaml --model "$out/student" --data_file "$out/data/test.jsonl" \
    --output_dir "$out/before"

say "Distillation"
[ -f "$out/distilled/trainer_state.json" ] ||
  molsaki distill --config $scripts/distill.yaml --student "$out/student" --store "$out/store" \
    --train_file "$out/data/train.jsonl" --output_dir "$out/distilled" --bf16 $bf16 --resume

say "The student after training"
[ -f "$out/after/summary.json" ] ||
  molsaki evaluate --config $scripts/evaluate.yaml --model "$out/distilled" --data_file "$out/data/test.jsonl" \
    --output_dir "$out/after" --compare "$out/before/predictions.jsonl"

say "Pictures"
molsaki plot --config $scripts/plot.yaml --teacher "$teacher" --student "$out/distilled" --run "$out/distilled" \
  --data_file "$out/data/test.jsonl" --output_dir "$out/plots"

printf '\nAll files but the report:\n'
find "$out" -type f -not -path '*/.*' -not -path '*/checkpoint-*' | sort

say "The report, to be opened in a browser:"
molsaki report "$out/distilled" --teacher "$teacher" --data_file "$out/data/test.jsonl" \
  --predictions "$out/after" "$out/before"
