"""Starts subprocesses for tests, and is the program of each: ``python tests/helpers/processes.py ACTION ...``.

`torchrun` and `python` start them as a user does. Importing everything takes each of them ten seconds of processor
time, so `ranks` and `by_hand` fork them from a server that has imported it once per pytest worker.

accelerate 1.15 supports FSDP on accelerators only and ignores it on a CPU, although PyTorch supports it over gloo.
`_allow_fsdp_on_a_cpu` removes that one condition. Everything else is the same as in a user's processes.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.commands import launch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from molsaki import StepwiseAttentionLoss, capture, cli, plan, segment
from molsaki.flags import parse
from molsaki.teacher import extract as extract_module
from molsaki.training import checkpoints
from molsaki.training.config import DistillConfig
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tensor_parallel

ROOT = Path(__file__).parents[2]
FSDP = ROOT / "examples/distributed/fsdp2.yaml"
LIMIT = 240  # seconds per process


def torchrun(*argv, processes: int = 2) -> subprocess.CompletedProcess:
    """Run this program in several gloo processes under torchrun, which chooses a free port."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, __file__]
    return python("-m", *launcher, *argv)


def python(*argv, **environment) -> subprocess.CompletedProcess:
    """Run Python with these arguments and additional environment variables, in the repository's root."""
    words = [sys.executable, *map(str, argv)]
    env = _environment(environment)
    try:
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")
        raise TimeoutError(f"{' '.join(words)}: still runs after {LIMIT} s and said\n{said[-8000:]}") from None


class Forked:
    """A process that runs an action of this program, with the methods of a `subprocess.Popen` that the tests use."""

    def __init__(self, *words, **environment):
        self._output = tempfile.TemporaryDirectory()
        files = [Path(self._output.name, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        argv, environment = [str(word) for word in words], _environment(environment)
        self.process = _server().Process(target=_forked, args=(argv, environment, os.getcwd(), files), daemon=True)
        self.process.start()
        weakref.finalize(self, self.process.kill)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float = LIMIT) -> tuple[str, str]:
        self.process.join(timeout)
        still_runs = self.process.exitcode is None
        if still_runs:
            self.process.kill()
            self.process.join()
        said = [Path(self._output.name, name).read_text(errors="replace") for name in ("stdout", "stderr")]
        if still_runs:
            raise TimeoutError(f"still runs after {timeout} s and said\n{said[1][-8000:]}")
        return said[0], said[1]


def by_hand(*words, processes: int = 2, **environment) -> list[Forked]:
    """Start the processes one by one, as on several machines: no launcher stops the others when one is lost."""
    if processes == 1:
        return [Forked(*words, **environment)]
    _server()  # whose imports take longer than a port stays free
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environment
    return [Forked(*words, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(processes)]


@functools.cache
def fsdp() -> dict[str, str]:
    """The environment variables of ``accelerate launch --config_file examples/distributed/fsdp2.yaml``."""
    args = launch.launch_command_parser().parse_args(["--config_file", str(FSDP), __file__])
    args, _, _ = launch._validate_launch_command(args)
    made = prepare_multi_gpu_env(args)
    return {name: value for name, value in made.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def ranks(*words, processes: int = 2, **environment) -> subprocess.CompletedProcess:
    """Run an action in forked gloo processes. When one fails, the others get SIGTERM and, 30 seconds later, SIGKILL, as
    under torchrun."""
    elastic = {"LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_RUN_ID": "none"}
    started = by_hand(*words, processes=processes, **elastic | environment)
    end, is_failed = time.monotonic() + LIMIT, False
    try:
        while time.monotonic() < end and any(one.returncode is None for one in started):
            if any(one.returncode for one in started) and not is_failed:
                is_failed, end = True, min(end, time.monotonic() + 30)
                for one in started:
                    one.process.terminate()
            left = [one.process.sentinel for one in started if one.returncode is None]
            multiprocessing.connection.wait(left, timeout=1)
        if is_failed:
            for one in started:
                one.process.kill()
        said = [one.communicate(1) for one in started]
    finally:
        for one in started:
            one.process.kill()
    codes = [one.returncode or 0 for one in started]
    out, err = ("".join(texts) for texts in zip(*said, strict=True))
    failed = [code for code in codes if code and code != -signal.SIGKILL] or [code for code in codes if code]
    return subprocess.CompletedProcess(words, failed[0] if failed else 0, out, err)


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"):
        first = context.Process(target=int)
        first.start()
    first.join()
    return context


def _forked(words: list[str], environment: dict[str, str], folder: str, files: list[Path]) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # a data loader may have processes of its own
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.exit(_main(words))


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


def _destroy_the_group_after_ddp() -> None:
    """Refuse to destroy a process group that a model's DDP wrapper still uses: the process may wait forever."""
    original = torch.distributed.destroy_process_group

    def destroy(*args, **kwargs):
        # Not isinstance: it looks through weak proxies, and raises if one is dead.
        wrapped = [each for each in gc.get_objects() if issubclass(type(each), nn.parallel.DistributedDataParallel)]
        assert not wrapped, f"{len(wrapped)} model(s) wrapped in DDP outlive their process group"
        original(*args, **kwargs)

    torch.distributed.destroy_process_group = destroy


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
    trainer.end_training()


def distill_but(fault: str, rank: str, step: str, *argv: str) -> int:
    """Run ``molsaki distill`` with a fault in one process: it is killed (``lost``) or has NaN written into its weights
    (``nan``) at the start of a step, or gets SIGTERM in the middle of it (``signal``).

    With ``signal:NAME`` one function takes two seconds in the first process: that which completes the checkpoint
    (``seal``), closes the trackers (``on_train_end``), leaves the process group (``end_training``), or says how to
    continue (``interrupted``). The other process says whether this was over when it ended.
    """
    fault, _, slow = fault.partition(":")
    if slow:
        over = Path(argv[argv.index("--output_dir") + 1] + ".over")
        owner = {"seal": checkpoints, "on_train_end": CallbackHandler, "end_training": DistillTrainer}.get(slow, cli)
        setattr(owner, slow, _slow(getattr(owner, slow), over))

    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if args.process_index == int(rank) and state.global_step == int(step):
                if fault == "lost":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "nan":
                    next(model.student.parameters()).data.fill_(float("nan"))

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if fault == "signal" and args.process_index == int(rank) and state.global_step == int(step):
                os.kill(os.getpid(), signal.SIGTERM)

    original = DistillTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Fault())

    DistillTrainer.__init__ = init
    code = cli.main(["distill", *argv])
    if slow and os.environ["RANK"] != "0":
        print("ended after it" if over.exists() else "ended before it", file=sys.stderr)
    return code


def _slow(function, over):
    @functools.wraps(function)
    def later(*args, **kwargs):
        if os.environ["RANK"] != "0":
            return function(*args, **kwargs)
        time.sleep(2)
        found = function(*args, **kwargs)
        over.touch()
        return found

    return later


def command(*argv: str) -> int:
    """Run a command of ``molsaki``."""
    return cli.main(argv)


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
    gc.collect()
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


def _main(words: list[str]) -> Any:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LIMIT - 30)  # where each process waits, in the message of `python` and `ranks`
    _destroy_the_group_after_ddp()
    _allow_fsdp_on_a_cpu()
    actions = {
        "distill": distill, "distill_but": distill_but, "lose_extract": lose_extract, "wrapped": wrapped,
        "command": command, "router_gradients": router_gradients, "example": example,
        "tensor_parallel": tensor_parallel.main,
    }  # fmt: skip
    return actions[words[0]](*words[1:])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
