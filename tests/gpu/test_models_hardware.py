"""Tests model architectures and a training run on a GPU.

The architectures are those of ``tests/helpers/architectures.py``, with heads wide enough for every engine. Maps and
weight gradients in bfloat16 and float32 are compared with the model's own eager attention in float64 on the same
weights. The budget is twice the error of its eager attention in the working dtype.
"""

import copy
import os

import pytest
import torch

import molsaki
from molsaki.config import ExtractConfig
from molsaki.store.map_store import Store
from molsaki.teacher.extract import extract
from molsaki.training.config import DistillConfig
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny
from tests.helpers.architectures import ARCHITECTURES, TRANSFORMERS, batch, eager, make, objective
from tests.helpers.budget import assert_within_budget

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
WIDE = {"hidden_size": 128, "head_dim": 32}


def on_device(name: str, dtype: torch.dtype):
    """A model with head_dim 32, which flash attention and the Triton kernels support."""
    wanted = {"n_embd": 128} if name == "GPT2" else {k: v for k, v in WIDE.items() if k in ARCHITECTURES[name]}
    if name == "GptOss":
        wanted["num_experts_per_tok"] = 2  # all experts, so that rounding cannot change the choice
    model = make(name, torch.float32, **wanted).to(dtype)
    return model.to(DEVICE)


def results(model, run, batches: int = 1) -> dict[str, torch.Tensor]:
    """The maps and the gradient of every weight, flat, for several batches one after the other."""
    found = [results_of_a_batch(model, run, seed) for seed in range(1, batches + 1)]
    return {name: torch.cat([one[name].flatten() for one in found]) for name in found[0]}


def results_of_a_batch(model, run, seed: int) -> dict[str, torch.Tensor]:
    inputs, plan = batch(seed=seed)
    inputs, plan = {name: t.to(DEVICE) for name, t in inputs.items()}, plan.to(DEVICE)
    maps, logits = run(model, inputs, plan)
    mask = inputs["attention_mask"]
    loss = objective(maps.cpu(), logits.cpu(), mask.cpu())
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {name: g for name, g in zip(named, grads, strict=True) if g is not None}
    return {"maps": maps.detach(), **found}


def ours(model, inputs, plan):
    with molsaki.capture(model, plan) as record:
        logits = model(**inputs).logits
    return record.maps, logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_maps_and_weight_gradients(name, dtype):
    if TRANSFORMERS < 5 and name == "GPT2":
        pytest.skip("transformers 4's GPT-2 passes no extra keywords to its attention")
    model = on_device(name, dtype)
    exact_model = copy.deepcopy(model).double()
    if name == "GptOss" and TRANSFORMERS > 4:
        exact_model.set_experts_implementation("eager")  # the grouped product does not support float64
    # The gradient of the sinks of a layer is four numbers, each a difference of large terms, in which the error of one
    # batch is a matter of chance.
    batches = 4 if any("sinks" in key for key, _ in model.named_parameters()) else 1
    exact = results(exact_model, eager, batches)
    by_eager = results(model, eager, batches)
    found = results(model, ours, batches)
    assert found.keys() == exact.keys()
    groups = grouped(exact)
    typical = torch.stack([joined(exact, keys).double().norm() for keys in groups.values()]).median()
    for group, keys in groups.items():
        expected = joined(exact, keys).double()
        if group == "maps" or expected.norm() > 1e-3 * typical:  # others, as of a key's bias, are only rounding
            assert_within_budget(f"{name}: {group}", joined(found, keys), expected, joined(by_eager, keys))


def grouped(results: dict) -> dict[str, list[str]]:
    """Names of results: each weight of an attention alone, the other weights of a layer together.

    Some gradients of the latter, such as that of a router's bias, are differences of large terms, in which the error of
    eager attention is a matter of chance.
    """
    groups: dict[str, list[str]] = {}
    for key in results:
        alone = key == "maps" or "attn" in key or "attention" in key
        layer = next((part for part in key.split(".") if part.isdigit()), "outside")
        groups.setdefault(key if alone else f"other weights of layer {layer}", []).append(key)
    return groups


def joined(results: dict, keys: list[str]) -> torch.Tensor:
    return torch.cat([results[key] for key in keys])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate(implementation):
    """Greedy generation for a padded batch in float32 gives the same tokens as the model's own attention."""
    model = on_device("Llama", torch.float32)
    prompt = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation(implementation)
    expected = model.generate(prompt, **arguments)
    model.set_attn_implementation("molsaki")
    assert torch.equal(model.generate(prompt, **arguments), expected)


def distilled(folder, store: Store | None, **options) -> list[dict]:
    """The log of twenty training steps of a tiny student, with a live teacher or with stored maps."""
    config = DistillConfig(
        output_dir=str(folder / f"out-{store is None}"), train_file=str(folder / "train.jsonl"), max_steps=20,
        per_device_train_batch_size=4, learning_rate=1e-2, adam_epsilon=1e-3, logging_steps=1, save_strategy="no",
        disable_tqdm=True, seed=3, use_cpu=DEVICE == "cpu", report_to=[], **options,
    )  # fmt: skip
    teacher: dict = {}
    if store is None:
        teacher = {"teacher_model": tiny.model(3, 318, seed=1), "teacher_processing_class": tiny.tokenizer(60)}
    trainer = DistillTrainer(tiny.model(2), args=config, processing_class=tiny.tokenizer(), store=store, **teacher)
    trainer.train()
    assert trainer.model.student.device.type == DEVICE
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
def test_distillation(tmp_path, bf16):
    """The losses fall, L_att is between 0 and 1, and stored maps give the losses of a live teacher."""
    if torch.cuda.device_count() > 1:
        pytest.skip("several GPUs in one process are refused: CUDA_VISIBLE_DEVICES=0")
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(16))
    teacher, tokenizer = tiny.model(3, 318, seed=1), tiny.tokenizer(60)
    assert len(tokenizer) == 318
    extract(ExtractConfig(data_files=[str(data)], store=str(tmp_path / "store")), teacher, tokenizer)
    stored = distilled(tmp_path, Store(tmp_path / "store"), bf16=bf16)
    live = distilled(tmp_path, None, bf16=bf16)
    assert len(stored) == len(live) == 20
    for name in ("loss", "loss_pre", "loss_exp"):
        assert sum(e[name] for e in live[-4:]) < 0.8 * sum(e[name] for e in live[:4]), name
    assert all(0 < e["loss_att"] < 1 for e in live)
    # The live teacher also uses mixed precision, but extraction does not. Later steps differ by accumulated rounding.
    for a, b in zip(stored[:3], live[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2 if bf16 else 1e-4)
        assert a["loss_att"] == pytest.approx(b["loss_att"], rel=5e-2 if bf16 else 1e-3)
