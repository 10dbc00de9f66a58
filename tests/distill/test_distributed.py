"""DDP and FSDP2 in two gloo processes on a CPU: the same training as one process with twice the batch."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molsaki.cli import main
from molsaki.run_files import ROUTER
from molsaki.training.checkpoints import last_checkpoint
from tests.helpers import processes, tiny

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
    one = processes.ranks("distill", folder / "one", *flags(folder, "one_run", 4), processes=1)
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


def train(kind: str, folder: Path, report: str, *argv) -> list[dict]:
    process = launched(kind, "distill", folder / report, *argv)
    assert process.returncode == 0, process.stderr
    return reports(folder / report)


def launched(kind: str, *argv):
    return processes.ranks(*argv, **(processes.fsdp() if kind == "fsdp2" else {}))


def reports(report: Path) -> list[dict]:
    return [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(2)]


def losses(reports: list[dict]) -> list[list[float]]:
    return [[entry[name] for name in NAMES] for entry in reports[0]["losses"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors") | load_file(run / "checkpoint-6" / ROUTER)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def straight(work, request):
    """The kind, and what its two processes report of a run without interruption."""
    return request.param, train(request.param, work, request.param, *flags(work, f"{request.param}_run"))


def test_two_processes_are_one_with_twice_the_batch(work, straight):
    kind, found = straight
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


@pytest.mark.parametrize("options", [[], ["--attention_share=0.1"]])
def test_the_share_of_the_gradient_is_that_of_all_processes(work, options):
    """That of the mean of both processes' gradients, whose norm is not the mean of their norms."""
    name = f"share{len(options)}"
    more = ["--share_steps=1", "--max_steps=3", "--save_strategy=no", *options]
    one = processes.ranks("distill", work / f"{name}_one", *flags(work, f"{name}_a", 4, *more), processes=1)
    assert one.returncode == 0, one.stderr
    expected = json.loads(Path(f"{work / f'{name}_one'}.0").read_text())["losses"]
    for found in train("ddp", work, name, *flags(work, f"{name}_b", 2, *more)):
        for a, b in zip(found["losses"], expected, strict=True):
            for key in ("attention_share", "beta", "loss", "loss_att", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_two_processes_share_a_stream(work):
    """Each reads all rows and takes its share: the same steps as one process with twice the batch."""
    more = ["--streaming=true", "--save_strategy=no"]
    one = processes.ranks("distill", work / "stream_one", *flags(work, "stream_a", 4, *more), processes=1)
    assert one.returncode == 0, one.stderr
    found = train("ddp", work, "stream", *flags(work, "stream_b", 2, *more))
    expected = json.loads(Path(f"{work / 'stream_one'}.0").read_text())
    torch.testing.assert_close(torch.tensor(losses(found)), torch.tensor(losses([expected])), rtol=2e-5, atol=1e-6)


def test_resume_in_two_processes(work, straight):
    """One process is lost; torchrun ends the other and says so. The rest of the run is that without interruption,
    bitwise, with DDP from the last but one checkpoint, since the last one is damaged."""
    kind, expected = straight
    run = work / f"{kind}_resumed_run"
    lost = ["distill_but", "lost", 1, 5, *flags(work, run.name, 2, "--save_steps=2")]
    begin = time.perf_counter()
    process = processes.torchrun(*lost) if kind == "ddp" else launched(kind, *lost)
    assert process.returncode != 0 and time.perf_counter() - begin < 90
    if kind == "ddp":
        assert "Signal 9 (SIGKILL)" in process.stderr and "Traceback" in process.stderr
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    file = run / "checkpoint-4/model.safetensors"
    if kind == "ddp":
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    process = launched(kind, "distill", work / f"{kind}_resumed", *flags(work, run.name, 2, "--resume"))
    assert process.returncode == 0, process.stderr
    if kind == "ddp":
        for name in ("model.safetensors has changed since it was written", "going back to the one before"):
            assert name in process.stderr
    resumed = reports(work / f"{kind}_resumed")
    assert losses(resumed) == losses(expected)
    a, b = (weights(work / name) for name in (f"{kind}_run", run.name))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_process_lost_without_torchrun(work):
    """The other one ends by itself, and before the timeout if its connection breaks."""
    argv = flags(work, "lost_run", 2, "--ddp_timeout=60")
    begin = time.perf_counter()
    survivor, lost = processes.by_hand("distill_but", "lost", 1, 3, *argv)
    _, message = survivor.communicate(timeout=processes.LIMIT)
    lost.communicate(timeout=10)
    assert lost.returncode == -9
    assert survivor.returncode not in (0, None) and time.perf_counter() - begin < 100
    assert "Connection closed by peer" in message or "Timed out" in message or "Connection reset" in message


def test_a_loss_that_is_not_finite_in_one_process_stops_both(work):
    """Started by hand, so that each has to stop by itself; the batch is saved and the weights do not change."""
    stopped = processes.by_hand("distill_but", "nan", 1, 4, *flags(work, "nan_run", 2))
    messages = [process.communicate(timeout=processes.LIMIT)[1] for process in stopped]
    assert [process.returncode for process in stopped] == [2, 2]
    assert "the loss of another process is not finite after step 4" in messages[0]
    assert "the loss is not finite after step 4, on example(s)" in messages[1]
    assert [path.name for path in (work / "nan_run").glob("bad_batch*")] == ["bad_batch_step4_rank1.pt"]
    assert last_checkpoint(work / "nan_run") == str(work / "nan_run/checkpoint-3")


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    report = tmp_path_factory.mktemp("wrapped") / "found"
    process = processes.ranks("wrapped", report)
    assert process.returncode == 0, process.stderr
    return report


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_capture_on_a_wrapped_model(captured, kind):
    """Each process has the unwrapped model's maps, and the mean of the unwrapped model's gradients."""
    found = [torch.load(f"{captured}.{kind}.{rank}") for rank in range(2)]
    plain = tiny.model(2)
    for rank in range(2):
        loss, record = processes.losses_of(plain, rank)
        (loss / 2).backward()
        torch.testing.assert_close(found[rank]["maps"], record.maps.detach())
        torch.testing.assert_close(found[rank]["values"], record.values.detach())
    for name, parameter in plain.named_parameters():
        for report in found:
            torch.testing.assert_close(report["grads"][name], parameter.grad, rtol=1e-4, atol=1e-6)
