"""Two processes: both extract the teacher's maps into one store, then train one student from it.

    python examples/two_processes.py        # starts torchrun with two processes; tiny random models, offline
    torchrun --nproc_per_node 2 examples/two_processes.py --student HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher HuggingFaceTB/SmolLM2-360M-Instruct --train_file train.jsonl --store maps --output_dir run

The processes divide the files of the store among themselves by locks; a repeated run finds a finished store and runs no
teacher. The training is DDP: gloo on a CPU, NCCL on GPUs. `examples/distributed` has FSDP2 and DeepSpeed. Needs the
extra `train`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from accelerate.utils import gather_object

from molsaki import DistillConfig, DistillTrainer
from molsaki.config import ExtractConfig
from molsaki.teacher.extract import extract


def main(student: str, teacher: str, train_file: str, store: str, output_dir: str, learning_rate: str) -> dict:
    summary = extract(ExtractConfig(teacher=teacher, data_files=[train_file], store=store, shard_size=4))
    args = DistillConfig(
        output_dir=output_dir, train_file=[train_file], normalise="sum", causal_words=True, pooling="mean",
        max_steps=10, per_device_train_batch_size=2, learning_rate=float(learning_rate), logging_steps=5,
        save_strategy="no",
    )  # fmt: skip
    trainer = DistillTrainer(student, args=args, store=store)  # no process holds a teacher
    trainer.train()
    trainer.save_model()  # process 0 writes

    mine = {
        "examples": summary["examples"],
        "shards_written": summary["shards_written"],
        "weights": sum(parameter.double().sum().item() for parameter in trainer.model.student.parameters()),
    }
    found = {"processes": gather_object([mine]), "logged": [row for row in trainer.state.log_history if "loss" in row]}
    if args.process_index == 0:
        for rank, process in enumerate(found["processes"]):
            print(f"process {rank}: wrote {process['shards_written']} of the store's files; "
                  f"sum of the trained weights {process['weights']:.9f}")  # fmt: skip
        print(json.dumps(found))
    trainer.end_training()
    return found


if __name__ == "__main__":
    from tiny_models import arguments

    names = ("student", "teacher", "train_file", "store", "output_dir", "learning_rate")
    values = arguments(__doc__, *names)
    if "RANK" in os.environ:
        main(*values)
    else:  # start both processes, with the same files
        options = [word for name, value in zip(names, values, strict=True) for word in (f"--{name}", value)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        sys.exit(subprocess.run([*launch, *options]).returncode)
