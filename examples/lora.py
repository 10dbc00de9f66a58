"""Distils into LoRA adapters: the student's own weights do not change.

    python examples/lora.py                                                      # tiny random models, offline
    python examples/lora.py --student HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher HuggingFaceTB/SmolLM2-360M-Instruct --train_file train.jsonl --output_dir run

The attention loss reaches the weights through the adapters of the query and key projections. `save_model` writes the
merged student and, in the folder `adapter`, the adapter alone. Needs the extra `train`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from molsaki import DistillConfig, DistillTrainer


def main(student: str, teacher: str, train_file: str, output_dir: str, learning_rate: str) -> dict:
    args = DistillConfig(
        output_dir=output_dir, train_file=[train_file], normalise="sum", causal_words=True, pooling="mean",
        max_steps=20, per_device_train_batch_size=4, learning_rate=float(learning_rate), save_strategy="no",
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"])
    trainer = DistillTrainer(student, teacher, args, peft_config=lora)  # on the shell: --lora_rank 4 --lora_alpha 8
    model = trainer.model.student
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters are trained")
    trainer.train()
    trainer.save_model()

    merged = AutoModelForCausalLM.from_pretrained(output_dir)
    base = AutoModelForCausalLM.from_pretrained(student)
    adapted = PeftModel.from_pretrained(base, Path(output_dir) / "adapter")
    ids = AutoTokenizer.from_pretrained(output_dir)("Ann has 3 bags of 2 nuts.", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (merged(ids).logits - adapted(ids).logits).abs().max().item()
    print(f"merged student and base with adapter: logits differ by at most {difference:.1e}")
    logged = [row for row in trainer.state.log_history if "loss_att" in row]
    return {"trained": trained, "difference": difference, "logged": logged}


if __name__ == "__main__":
    from tiny_models import arguments

    main(*arguments(__doc__, "student", "teacher", "train_file", "output_dir", "learning_rate"))
