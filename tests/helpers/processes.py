"""Starts subprocesses for tests, and is the program of each: ``python tests/helpers/processes.py ACTION ...``.

accelerate 1.15 supports FSDP on accelerators only and ignores it on a CPU, although PyTorch supports it over gloo.
`_allow_fsdp_on_a_cpu` removes that one condition. Everything else is the same as in a user's processes.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import TrainerCallback

from molsaki import StepwiseAttentionLoss, capture, cli, plan, segment
from molsaki.flags import parse
from molsaki.teacher import extract as extract_module
from molsaki.training.config import DistillConfig
from molsaki.training.trainer import DistillTrainer

ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds per subprocess


def torchrun(*argv, processes: int = 2) -> subprocess.CompletedProcess:
    """Run this program in several gloo processes under torchrun, which chooses a free port."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, __file__]
    return python("-m", *launcher, *argv)


def python(*argv, **environment) -> subprocess.CompletedProcess:
    """Run Python with these arguments and additional environment variables, in the repository's root."""
    words = [sys.executable, *map(str, argv)]
    env = _environment(environment)
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)


def by_hand(*argv, processes: int = 2) -> list[subprocess.Popen]:
    """Start the processes one by one, as on several machines: no launcher stops the others when one is lost."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, __file__, *map(str, argv)]
    return [
        subprocess.Popen(
            words, cwd=ROOT, env=_environment(shared | {"RANK": rank, "LOCAL_RANK": rank}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def _environment(more: dict) -> dict[str, str]:
    base = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return base | {name: str(value) for name, value in more.items()}


def _allow_fsdp_on_a_cpu() -> None:
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def distill(report: str, *argv: str) -> None:
    """Run ``molsaki distill`` and write the state of each process afterwards to ``REPORT.RANK``."""
    config = parse(DistillConfig, argv)
    trainer = DistillTrainer(args=config)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    found = {
        "wrapped": type(trainer.model_wrapped).__name__,
        "held": sum(_local(p).numel() for p in trainer.model.parameters()),
        "all": sum(p.numel() for p in trainer.model.parameters()),
        "layers_sharded": sum(isinstance(m, FSDPModule) for m in trainer.model.modules()),
        "router": [_whole(p).flatten().tolist() for p in trainer.model.mixture.parameters()],
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    Path(f"{report}.{config.process_index}").write_text(json.dumps(found))
    trainer.accelerator.end_training()


def distill_but(fault: str, rank: str, step: str, *argv: str) -> int:
    """Run ``molsaki distill``; at the start of a step one process kills itself or has NaN written into its weights."""

    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if args.process_index == int(rank) and state.global_step == int(step):
                if fault == "lost":
                    os.kill(os.getpid(), signal.SIGKILL)
                next(model.student.parameters()).data.fill_(float("nan"))

    original = DistillTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Fault())

    DistillTrainer.__init__ = init
    return cli.main(["distill", *argv])


def lose_extract(rank: str, batch: str, *argv: str) -> int:
    """Run ``molsaki extract``; one process kills itself before a forward pass."""
    run, batches = extract_module.mixed_maps, []

    def counted(*args):
        if os.environ["RANK"] == rank and len(batches) == int(batch):
            os.kill(os.getpid(), signal.SIGKILL)
        batches.append(1)
        return run(*args)

    extract_module.mixed_maps = counted
    return cli.main(["extract", *argv])


def wrapped(report: str) -> None:
    """Write maps, values and gradients of a wrapped model to ``REPORT.KIND.RANK``; each process has one text."""
    from tests.helpers import tiny

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for kind in ("ddp", "fsdp2"):
        model = tiny.model(2)
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        loss, record = losses_of(model, rank)
        loss.backward()
        gradients = {name.removeprefix("module."): _whole(p.grad) for name, p in model.named_parameters()}
        found = {"maps": record.maps.detach(), "values": record.values.detach(), "grads": gradients}
        torch.save(found, f"{report}.{kind}.{rank}")
    torch.distributed.destroy_process_group()


def router_gradients(report: str) -> None:
    """Write the gradients of a router, of one text per process, to ``REPORT.RANK``."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save(gradients_of_a_router(rank), f"{report}.{rank}")
    torch.distributed.destroy_process_group()


def gradients_of_a_router(number: int) -> dict[str, Tensor]:
    """The gradients of the router of a `StepwiseAttentionLoss` of one text."""
    from tests.helpers import tiny

    problem, tokenizer, student, teacher = tiny.problems(2)[number], tiny.tokenizer(), tiny.model(2), tiny.model(3)
    attention_loss = StepwiseAttentionLoss.for_models(student, teacher, normalise="sum")
    spans, records = segment(problem["question"], problem["rationale"]), []
    for model in (student, teacher):
        with attention_loss.capture(model, plan(spans, tokenizer)) as record:
            model(**tokenizer(spans.text, return_tensors="pt"))
        records.append(record)
    attention_loss(*records)[0].backward()
    return {name: parameter.grad for name, parameter in attention_loss.named_parameters()}


def example(path: str, report: str, *argv: str) -> None:
    """Run an example's ``main`` and write what it returns to ``REPORT.RANK``."""
    found = runpy.run_path(str(ROOT / "examples" / path))["main"](*argv)
    Path(f"{report}.{os.environ.get('RANK', 0)}").write_text(json.dumps(found))


def losses_of(model: nn.Module, number: int):
    """A loss of the logits, maps and values of one text, and the record."""
    from tests.helpers import tiny

    problem = tiny.problems(2)[number]
    spans = segment(problem["question"], problem["rationale"])
    tokenizer = tiny.tokenizer()
    with capture(model, plan(spans, tokenizer), values=True) as record:
        out = model(**tokenizer(spans.text, return_tensors="pt"), use_cache=False)
    return out.logits.logsumexp(-1).mean() + record.maps.square().mean() + record.values.square().mean(), record


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    torch.set_num_threads(1)
    _allow_fsdp_on_a_cpu()
    actions = {
        "distill": distill, "distill_but": distill_but, "lose_extract": lose_extract, "wrapped": wrapped,
        "router_gradients": router_gradients, "example": example,
    }  # fmt: skip
    sys.exit(actions[sys.argv[1]](*sys.argv[2:]))
