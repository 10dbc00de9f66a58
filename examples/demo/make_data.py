"""Writes word problems with step-by-step rationales, from reasoning-gym's ``gsm_symbolic``, as JSON lines.

One object per line: ``id, question, rationale, answer``. Only short problems are kept, each text once, and only those
whose rationale ends in the gold answer. The same seed always gives the same files.
"""

import argparse
import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import reasoning_gym
from tqdm import tqdm

from atomic import new_folder

INSTRUCTION = " Give the result as your final answer. Do not include units."
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def problems(seed: int, max_chars: int) -> Iterator[dict[str, str]]:
    """Endless short problems, no text twice."""
    seen = set()
    for block in count():
        for item in reasoning_gym.create_dataset("gsm_symbolic", seed=seed + block, size=1000):
            question = item["question"].removesuffix(INSTRUCTION)
            rationale = item["metadata"]["answer_cot"].rpartition("####")[0].strip()
            answer = item["answer"]
            numbers = NUMBER.findall(rationale)
            short = len(question) + len(rationale) <= max_chars
            right = numbers and float(numbers[-1].replace(",", "")) == float(answer)
            if short and right and question not in seen:
                seen.add(question)
                yield {"question": question, "rationale": rationale, "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to create, with train.jsonl and test.jsonl")
    parser.add_argument("--train", type=int, default=128, help="training problems")
    parser.add_argument(
        "--test", type=int, default=32, help="test problems; their texts differ from the training problems"
    )
    parser.add_argument("--max-chars", type=int, default=230, help="longest question and rationale together")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same problems")
    args = parser.parse_args()
    if args.out.exists():
        return print(f"{args.out}: exists already")

    source = problems(args.seed, args.max_chars)
    with new_folder(args.out) as folder:
        for split, size in (("train", args.train), ("test", args.test)):
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for i in tqdm(range(size), desc=split):
                    file.write(json.dumps({"id": f"{split}-{i}", **next(source)}, ensure_ascii=False) + "\n")
    print(f"{args.out}: {args.train} problems to train on, {args.test} to test on")


if __name__ == "__main__":
    main()
