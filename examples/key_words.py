"""Other key words than numbers: keywords, a regular expression, spans in the data, a function.

    python examples/key_words.py                                                 # tiny random models, offline
    python examples/key_words.py --student HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher HuggingFaceTB/SmolLM2-360M-Instruct

`--key` of `molsaki extract` and `molsaki distill` takes the same values; docs/key-words.md has all of them.
Needs the extra `train`.
"""

from __future__ import annotations

import re

import molsaki
from molsaki import DistillConfig, DistillTrainer

ROW = {
    "question": "Ann parks her red car behind the blue van. Which one is in front?",
    "rationale": "The red car is behind the van. So the blue van is in front of the red car.",
    "answer": "the blue van",
    "keywords": ["car", "van"],
    "key_spans": {"question": [[0, 3]], "rationale": [[34, 46]]},  # characters: "Ann", "the blue van"
}


def colours(text: str) -> list[tuple[int, int]]:
    """The spans of the key words of a text. It is called with the question and with the rationale."""
    return [match.span() for match in re.finditer(r"\b(red|blue|green)\b", text)]


KEYS = {
    "keywords": "the row's own list, wherever the words occur",
    r"regex:\b(?:behind|in front)\b": "the matches of a regular expression",
    "given": "the row's spans",
    "key_words:colours": "the function above: MODULE:FUNCTION",
}


def main(student: str, teacher: str, output_dir: str, learning_rate: str) -> dict[str, dict]:
    found = {}
    for key, meaning in KEYS.items():
        fields = {name: ROW[name] for name in ("question", "rationale", "keywords")}
        spans = molsaki.segment(**fields, key=key, key_spans=ROW["key_spans"] if key == "given" else None)
        words = [spans.text[start:stop] for start, stop in spans.words]
        args = DistillConfig(
            output_dir=output_dir, key=key, normalise="sum", causal_words=True, pooling="mean", max_steps=4,
            learning_rate=float(learning_rate), logging_steps=4, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = DistillTrainer(student, teacher, args, train_dataset=[ROW])
        trainer.train()
        (logged,) = (row for row in trainer.state.log_history if "loss_att" in row)
        found[key] = {"words": words, "words_mean": logged["words_mean"], "loss_att": logged["loss_att"]}
        print(f"--key '{key}', {meaning}: {', '.join(words)}; attention loss {logged['loss_att']:.3f}\n")
    return found


if __name__ == "__main__":
    from tiny_models import arguments

    main(*arguments(__doc__, "student", "teacher", "output_dir", "learning_rate"))
