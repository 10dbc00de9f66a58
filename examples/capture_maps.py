"""Where each sentence of a word problem looks, in any Hugging Face decoder, without eager attention.

    python examples/capture_maps.py                                              # a tiny random model, offline
    python examples/capture_maps.py --model HuggingFaceTB/SmolLM2-135M-Instruct  # or a folder

`molsaki.capture` gives the maps of all layers with their gradient; `molsaki.attention_map` wraps these lines where only
the numbers are wanted. Needs the extra `train`.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import molsaki

QUESTION = "A mailman delivers 4 letters to each house in 16 blocks of 17 houses. How many letters does he deliver?"
RATIONALE = "There are 16 × 17 = 272 houses. He delivers 272 × 4 = 1088 letters."


def main(name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    spans = molsaki.segment(QUESTION, RATIONALE)  # steps and numbers, as ranges of characters
    plan = molsaki.plan(spans, tokenizer)  # the same, in tokens
    with torch.no_grad(), molsaki.capture(model, plan) as record:
        model(**tokenizer(spans.text, return_tensors="pt"))
    mean = record.maps.mean(1)[0]  # over layers: (steps, words)
    words = [spans.text[start:stop] for start, stop in spans.words]
    print(" ".join(f"{word:>6s}" for word in words))
    for (start, stop), masses in zip(spans.steps, mean.tolist(), strict=True):
        print(" ".join(f"{mass:6.2f}" for mass in masses), spans.text[start:stop].strip())
    return record.maps


if __name__ == "__main__":
    from tiny_models import arguments

    main(*arguments(__doc__, "model"))
