"""Train a small model of the study's world from scratch: a teacher on problems, or a student's base on drills.

The matrices of the layers are trained by Muon, the rest by AdamW, on problems that never repeat.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.io import write_json
from studies.world import Problem, decoder, drill, problem, problems, tokenizer

POOL = 8  # batches that are sorted by length together
SAVE = 250  # steps after which the state is saved
STATE = "state.pt"
OPTIONS = "pretraining.json"


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in float32, all matrices of one shape at once.

    torch.optim.Muon computes in bfloat16, one matrix at a time: 4 times as long per step on a CPU without bfloat16.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                wide = update if update.shape[0] <= update.shape[1] else update.T
                shapes.setdefault(wide.shape, []).append((p, wide))
            for members in shapes.values():
                x = torch.stack([update for _, update in members])
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):  # Newton-Schulz
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                for (p, _), update in zip(members, x, strict=True):
                    scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                    p.sub_(update if update.shape == p.shape else update.T, alpha=group["lr"] * scale)


def batch(rows: Sequence[Problem], tokens: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels ``(N, M)``, padded on the right; only rationales are labelled, -100 elsewhere."""
    questions = [len(ids) for ids in tokens([row["question"] for row in rows]).input_ids]
    texts = tokens([row["question"] + " " + row["rationale"] for row in rows]).input_ids
    texts = [[*ids, tokens.eos_token_id] for ids in texts]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [tokens.pad_token_id] * (longest - len(text)) for text in texts])
    labels = torch.tensor(
        [
            [-100] * start + text[start:] + [-100] * (longest - len(text))
            for start, text in zip(questions, texts, strict=True)
        ]
    )
    return ids, labels


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokens: PreTrainedTokenizerBase, rows: Sequence[Problem], size: int = 250
) -> float:
    """Share of problems whose greedy rationale ends in the right number."""
    model.eval()  # type: ignore[no-untyped-call]
    tokens.padding_side = "left"
    right = 0
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        inputs = tokens(
            [row["question"] for row in part], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs.input_ids.shape[1] :]
        replies = tokens.batch_decode(out, skip_special_tokens=True)
        right += sum(
            reply.split("=")[-1].strip().rstrip(".") == row["answer"] for reply, row in zip(replies, part, strict=True)
        )
    model.train()
    return right / len(rows)


def pretrain(
    folder: Path,
    *,
    layers: int,
    width: int,
    heads: int,
    seed: int,
    steps: int,
    drills: Sequence[tuple[float, float]],
    size: int = 32,
    muon: float = 0.01,
    adam: float = 2e-3,
    applied: float = 0.0,
    target: float = 1.0,
    check: int = 0,
    enough: float = 0.0,
) -> None:
    """Train and save a model, with its log (`save`).

    Args:
        folder: the output; a finished one is left as it is, and an interrupted one is continued.
        seed: of the weights and of the problems.
        drills: pairs (progress, share): up to that part of the steps, this share of texts are drills, not problems.
        size: texts per step.
        applied: the share of drills that compute sums (`drill`).
        muon, adam: peak learning rates, constant for half of the steps, then a cosine to 2 %.
        target, check: every ``check`` steps, stop if this share of 500 validation problems is right.
        enough: stop if the mean loss of 50 steps is below this.

    Raises:
        RuntimeError: the loss never fell below ``enough``.
        ValueError: the folder has a model, finished or not, of other options.
    """
    options = {"layers": layers, "width": width, "heads": heads, "seed": seed, "steps": steps, "size": size}
    options |= {"drills": [list(pair) for pair in drills], "applied": applied, "muon": muon, "adam": adam}
    options |= {"target": target, "check": check, "enough": enough}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / OPTIONS).exists() and not any((folder / name).exists() for name in ("model.safetensors", STATE)):
        write_json(folder / OPTIONS, options)
    found = json.loads((folder / OPTIONS).read_text(encoding="utf-8")) if (folder / OPTIONS).exists() else None
    if found != options:
        raise ValueError(f"{folder}: has a model of options {found}, not {options}; delete it or take another folder")
    if (folder / "model.safetensors").exists():
        return
    tokens, model = tokenizer(), decoder(layers, width, heads, seed)
    matrices = [w for name, w in model.named_parameters() if w.ndim == 2 and ".layers." in name]
    rest = [w for name, w in model.named_parameters() if not (w.ndim == 2 and ".layers." in name)]
    optimizers = [torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.98), weight_decay=0.0), Muon(matrices, lr=muon)]
    rng, begun = random.Random(1_000_000 + seed), time.time()
    pool: list[list[Problem]] = []
    validation = problems("validation", 500)
    window: list[float] = []
    first, spent = 0, 0.0
    saved = folder / STATE
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, one in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(one)
        rng.setstate(state["rng"])
        pool, window, first, spent = state["pool"], state["window"], state["step"], state["seconds"]
    log_file = folder / "log.jsonl"
    kept = log_file.read_text(encoding="utf-8").splitlines(keepends=True) if first else []
    log_file.write_text("".join(line for line in kept if json.loads(line)["step"] <= first), encoding="utf-8")
    log = open(log_file, "a", encoding="utf-8")  # noqa: SIM115
    for step in range(first, steps):
        progress = step / steps
        if not pool:
            share = next(share for end, share in drills if progress < end)
            rows = [_text(rng, share, applied) for _ in range(POOL * size)]
            rows.sort(key=lambda row: len(row["question"]) + len(row["rationale"]))
            pool = [rows[first : first + size] for first in range(0, len(rows), size)]
            rng.shuffle(pool)
        ids, labels = batch(pool.pop(), tokens)
        rate = min(1, (step + 1) / 40)
        if progress > 0.5:
            rate *= max(0.02, 0.5 * (1 + math.cos(math.pi * (progress - 0.5) / 0.5)))
        for optimizer, peak in zip(optimizers, (adam, muon), strict=True):
            optimizer.param_groups[0]["lr"] = rate * peak
        targets = labels[:, 1:]
        hidden = model.model(input_ids=ids)[0][:, :-1][targets != -100]
        loss = F.cross_entropy(model.lm_head(hidden), targets[targets != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        window.append(loss.item())
        seconds = spent + time.time() - begun
        if (step + 1) % 50 == 0 or step + 1 == steps:
            row = {"step": step + 1, "seconds": round(seconds, 1), "loss": sum(window) / len(window)}
            window = []
            if check and ((step + 1) % check == 0 or step + 1 == steps):
                row["accuracy"] = accuracy(model, tokens, validation)
            print(json.dumps(row), file=log, flush=True)
            done = row["loss"] < enough
            if done or row.get("accuracy", 0) >= target:
                break
            if enough and step + 1 == steps:
                raise RuntimeError(f"{folder}: the loss did not fall below {enough} in {steps} steps")
        if (step + 1) % SAVE == 0:
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            state |= {"rng": rng.getstate(), "pool": pool, "window": window, "step": step + 1, "seconds": seconds}
            torch.save(state, folder / f"{STATE}.part")
            os.replace(folder / f"{STATE}.part", saved)
    log.close()
    tokens.save_pretrained(folder)
    save(model, folder)
    saved.unlink(missing_ok=True)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save a float32 model with weights rounded to bfloat16, half the size. They are loaded as float32 again."""
    tied = set(model.all_tied_weights_keys)
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items() if name not in tied}
    model.save_pretrained(folder, state_dict=weights)


def _text(rng: random.Random, drills: float, applied: float) -> Problem:
    if rng.random() < drills:
        return drill(rng, rng.random() < applied)
    return problem(rng, (1, 2), (1, 2)) if rng.random() < 0.1 else problem(rng)
