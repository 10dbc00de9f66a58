"""DDP and FSDP2 in two gloo processes on a CPU: the same training as one process with twice the batch."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molsaki.cli import main
from molsaki.trainer import ROUTER

FSDP = processes.ROOT / "examples/distributed/fsdp2.yaml"
NAMES = ("loss", "loss_pre", "loss_exp", "loss_att", "loss_att_uniform", "entropy_teacher", "entropy_student")
NAMES += ("steps_mean", "words_mean", "without_words", "grad_norm")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Models, data of which some are without words, a store, and the run of one process with batches of 4."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny.save(folder / "teacher", 3, tiny.tokenizer(60), seed=1)
    tiny.save(folder / "student", 2)
    wordless = {"id": "w", "question": "Who has nuts?", "rationale": "Ann has nuts. They are small.", "answer": "Ann"}
    tiny.write_jsonl(folder / "train.jsonl", tiny.problems(15) + [wordless])
    extract = ["extract", "--teacher", folder / "teacher", "--data_files", folder / "train.jsonl"]
    assert main([str(word) for word in [*extract, "--store", folder / "store"]]) == 0
    one = processes.python(processes.__file__, "distill", folder / "one", *flags(folder, "one_run", 4))
    assert one.returncode == 0, one.stderr
    return folder


def flags(folder: Path, name: str, batch: int = 2, *more) -> list:
    numbers = {
        "max_steps": 6, "per_device_train_batch_size": batch, "learning_rate": 3e-3, "logging_steps": 1,
        "save_steps": 3, "router_learning_rate": 1e-3, "adam_epsilon": 1e-4, "disable_tqdm": True,
        "student": folder / "student", "train_file": folder / "train.jsonl", "store": folder / "store",
        "output_dir": folder / name,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in numbers.items()] + ["--use_cpu", *more]


def train(kind: str, folder: Path, report: str, *argv):
    action = ["distill", folder / report, *argv]
    if kind == "ddp":
        process = processes.torchrun(*action)
    else:
        launch = ["accelerate.commands.launch", "--config_file", FSDP, "--main_process_port", 0]
        process = processes.python("-m", *launch, processes.__file__, *action)
    assert process.returncode == 0, process.stderr
    return [json.loads(Path(f"{folder / report}.{rank}").read_text()) for rank in range(2)]


def losses(reports: list[dict]) -> list[list[float]]:
    return [[entry[name] for name in NAMES] for entry in reports[0]["losses"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors") | load_file(run / "checkpoint-6" / ROUTER)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one_with_twice_the_batch(work, kind):
    found = train(kind, work, kind, *flags(work, f"{kind}_run"))
    one = json.loads(Path(f"{work / 'one'}.0").read_text())
    assert [r["wrapped"] for r in found] == ["DistributedDataParallel" if kind == "ddp" else "FSDPDistiller"] * 2
    if kind == "ddp":
        assert all(r["held"] == r["all"] == one["all"] for r in found)
    else:
        assert all(r["layers_sharded"] == 3 for r in found)  # two decoder layers and the rest
        assert sum(r["held"] for r in found) == found[0]["all"] == one["all"]
    assert found[0]["router"] == found[1]["router"] != [[0.0] * len(p) for p in found[0]["router"]]
    assert found[0]["losses"][-1]["without_words"] in (0, 1)
    assert sum(entry["without_words"] for entry in found[0]["losses"]) > 0
    torch.testing.assert_close(torch.tensor(losses(found)), torch.tensor(losses([one])), rtol=2e-5, atol=1e-6)

    here, expected = weights(work / f"{kind}_run"), weights(work / "one_run")
    assert here.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(here[name], value, rtol=1e-4, atol=1e-5)
    student = AutoModelForCausalLM.from_pretrained(work / f"{kind}_run")
    embedding, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert type(student).__name__ == "LlamaForCausalLM" and embedding is head
    assert not any("student." in name or "mixture" in name for name in here)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_resume_in_two_processes(work, kind):
    """Three steps, then three more from the checkpoint, are six without interruption, bitwise."""
    straight = train(kind, work, f"{kind}_straight", *flags(work, f"{kind}_straight_run"))
    process = losing(kind, work, 4, *flags(work, f"{kind}_resumed_run"))
    assert process.returncode != 0
    resumed = train(kind, work, f"{kind}_resumed", *flags(work, f"{kind}_resumed_run", 2, "--resume"))
    assert losses(resumed) == losses(straight)
    a, b = (weights(work / f"{kind}_{name}_run") for name in ("straight", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def losing(kind: str, folder: Path, step: int, *argv):
    if kind == "ddp":
        return processes.torchrun("lose", 1, step, *argv)
    launch = ["accelerate.commands.launch", "--config_file", FSDP, "--main_process_port", 0]
    return processes.python("-m", *launch, processes.__file__, "lose", 1, step, *argv)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_capture_on_a_wrapped_model(tmp_path, kind):
    """Each process's maps are the plain model's, and the gradients the mean of the plain model's."""
    process = processes.torchrun("wrapped", kind, tmp_path / "found")
    assert process.returncode == 0, process.stderr
    found = [torch.load(f"{tmp_path / 'found'}.{rank}") for rank in range(2)]
    plain = tiny.model(2)
    for rank in range(2):
        loss, record = processes.losses_of(plain, rank)
        (loss / 2).backward()
        torch.testing.assert_close(found[rank]["maps"], record.maps.detach())
        torch.testing.assert_close(found[rank]["values"], record.values.detach())
    for name, parameter in plain.named_parameters():
        for report in found:
            torch.testing.assert_close(report["grads"][name], parameter.grad, rtol=1e-4, atol=1e-6)
