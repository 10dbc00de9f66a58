"""One whole optimizer step of a student: distilled with stored maps against without maps, and against two eager models.

    python -m benchmarks.step --model FOLDER [--student FOLDER] [--device cpu|cuda] [--csv FILE] [--shape 1x1024]
                              [--contenders 'NAME; NAME'] [--measure time memory profile] [--compile] [--seconds S]
                              [--dtype float32|bfloat16]

``--model`` is the teacher and, without ``--student``, also the student; ``tiny``, ``tiny-teacher`` and ``1b`` are
random Llamas. What is measured:

- ``dss``: the two tasks (Eq. 7 without L_att), packed into one forward that runs the question once;
- ``molsaki, stored maps``: the same with the maps of every layer, the router and L_att: ``over_dss`` is its price;
- ``molsaki, live teacher``: with the teacher's forward in every step;
- ``dss, packed`` and ``molsaki, packed``: one forward that runs the question in both tasks;
- ``dss, padded`` and ``molsaki, padded``: a padded forward for each task;
- ``eager``: what everyone writes: both models with ``attn_implementation="eager"`` and ``output_attentions=True``, all
  weights kept and reduced afterwards, logits of all tokens, a padded forward for each task; the same losses.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from molsaki.batches.batch import IGNORE, TextBatch
from molsaki.batches.collator import Collator
from molsaki.batches.tokenized import TokenizedExample, TokenizedText
from molsaki.config import DistillConfig
from molsaki.modeling.attention_hook import NAME
from molsaki.teacher.extract import mixture_of, probe, teacher_maps
from molsaki.training import losses
from molsaki.training.distiller import Distiller
from molsaki_kernels import StepPlan, pool_values

from .layer import describe, write_csv
from .measure import ratio

RANDOM = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "small": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
                  num_key_value_heads=3, vocab_size=8192),
    "tiny-teacher": dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=256, initializer_range=0.3),
    "tiny": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=256, initializer_range=0.3),
}  # fmt: skip
LAYOUTS = ("packed", "padded")  # other than the default's
CONTENDERS = (
    "dss", "molsaki, stored maps", "molsaki, live teacher", *(f"dss, {layout}" for layout in LAYOUTS),
    *(f"molsaki, {layout}" for layout in LAYOUTS), "eager",
)  # fmt: skip
OURS = "molsaki, stored maps"
DTYPES = {"float32": "float32", "bfloat16": "bf16 autocast"}  # the option, and what a row says
TARGETS = {
    (OURS, "time over dss"): 1.10,
    (OURS, "times faster than eager"): 3.0,
    (OURS, "share of eager's peak"): 0.333,
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """N examples of ``tokens`` each, or ragged between half of that and all; 40 % are the question, 4 the answer."""

    size: int
    tokens: int
    words: int
    steps: int
    ragged: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}x{self.tokens}" + (" ragged" if self.ragged else "")

    def rows(self, vocabulary: int, seed: int = 0) -> list[TokenizedExample]:
        g = np.random.default_rng(seed)
        return [self._row(n, g, vocabulary) for n in range(self.size)]

    def _row(self, n: int, g: np.random.Generator, vocabulary: int) -> TokenizedExample:
        length = int(g.integers(self.tokens // 2, self.tokens + 1)) if self.ragged else self.tokens
        question = int(0.4 * length)
        ids = g.integers(2, vocabulary, length + 4).astype(np.int32)
        cuts = [0, *sorted(g.choice(np.arange(1, length), self.steps - 1, replace=False).tolist()), length]
        words = [[token] for token in sorted(g.choice(length, self.words, replace=False).tolist())]
        steps = list(zip(cuts[:-1], cuts[1:], strict=True))
        explain = TokenizedText(ids[:length], question, steps, words)
        predict = TokenizedText(np.concatenate([ids[:question], ids[length:]]), question, [], [])
        return TokenizedExample(str(n), None, explain, predict, explain)


BATCHES = [Batch(4, 256, 20, 5), Batch(4, 256, 20, 5, ragged=True), Batch(1, 1024, 50, 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1b", help=f"folder of the teacher, or {', '.join(RANDOM)}")
    parser.add_argument("--student", help="folder of the student, if it is another")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write the rows here, after those that are there")
    parser.add_argument("--shape", default="", help="only batches whose name begins so, such as 1x1024")
    parser.add_argument("--contenders", help=f"only these of {'; '.join(CONTENDERS)}, separated by semicolons")
    parser.add_argument("--seconds", type=float, default=60, help="of timing a batch, after one call each")
    parser.add_argument("--measure", nargs="+", choices=list(MEASURES), default=["time"], help="what to measure")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="bfloat16 is autocast (default: float32 on a CPU, bfloat16 on CUDA)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the student and its losses")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    names = arguments.contenders.split(";") if arguments.contenders else CONTENDERS
    machine = describe(device)
    rows = []
    if arguments.csv and arguments.csv.exists():
        rows = list(csv.DictReader(arguments.csv.open()))
    for batch in BATCHES:
        if batch.name.startswith(arguments.shape):
            student, dtype = arguments.student or arguments.model, arguments.dtype or default_dtype(device)
            setup = Setup(arguments.model, student, batch, arguments.compile, str(device), dtype)
            for measure in arguments.measure:
                rows += measured(measure, setup, [name.strip() for name in names], arguments.seconds, machine)
            if arguments.csv:
                write_csv(arguments.csv, rows)


def default_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a step is of; goes to the processes that measure memory."""

    teacher: str
    student: str
    batch: Batch
    compiled: bool
    device: str
    dtype: str

    def step(self, name: str) -> Callable[[], Tensor]:
        """Everything that contender ``name`` needs, and its step, which returns the loss."""
        torch.manual_seed(0)
        device, config = torch.device(self.device), _config("dss" if name.startswith("dss") else "molsaki")
        student = load(self.student).to(device).train()
        rows = self.batch.rows(student.config.vocab_size)
        needs_teacher = name in ("eager", "molsaki, live teacher")
        teacher = load(self.teacher).to(device).eval().requires_grad_(False) if needs_teacher else None
        if name == "eager":
            loss, parameters = eager_loss(student, teacher, config, rows, device)
        else:
            layout = name.rpartition(", ")[2]
            loss, parameters = own_loss(student, teacher, config, rows, device, layout, self)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

        def step() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
                total = loss()
            total.backward()
            optimizer.step()
            return total.detach()

        return step


def load(name: str) -> PreTrainedModel:
    """A model in float32; one of `RANDOM` or a folder."""
    if name in RANDOM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**RANDOM[name], tie_word_embeddings=True, max_position_embeddings=2048))
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def _config(objective: str) -> DistillConfig:
    return DistillConfig(output_dir=tempfile.gettempdir(), objective=objective)


def own_loss(student, teacher, config, rows, device, layout, setup):
    student.set_attn_implementation(NAME)
    depth, width = probe(student)
    teacher_depth = depth if setup.teacher == setup.student else probe(teacher or load(setup.teacher))[0]
    mixture = mixture_of(config, teacher_depth, depth, width).to(device) if config.objective == "molsaki" else None
    distiller = Distiller(student, mixture, config)
    packing = layout != "padded"
    collator = Collator(0, 0, packing, packing, share_question=layout not in LAYOUTS)
    batch = collator([(row, None) for row in rows]).to(device)
    plan, side = batch.plan, batch.teacher
    batch = dataclasses.replace(batch, teacher=None)
    if mixture is not None and teacher is None:  # as a store gives them
        maps = torch.rand(len(plan), 1, plan.num_steps, plan.num_words, device=device)
        weights = torch.full((len(plan), 1, teacher_depth), 1 / teacher_depth, device=device)
        batch = dataclasses.replace(batch, teacher_map=maps, teacher_weights=weights)
    if teacher is not None:
        teacher.set_attn_implementation(NAME)
    run = torch.compile(distiller) if setup.compiled else distiller

    def loss() -> Tensor:
        if teacher is None:
            return run(batch)["loss"].mean()
        weights, mixed = mixture.teacher(teacher_maps(teacher, plan=side.plan, **side.model_inputs()), plan)
        return run(dataclasses.replace(batch, teacher_map=mixed, teacher_weights=weights))["loss"].mean()

    return loss, distiller.parameters()


def eager_loss(student, teacher, config, rows, device):
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    depth, width = (
        student.config.num_hidden_layers,
        student.config.num_key_value_heads * student.model.layers[0].self_attn.head_dim,
    )
    mixture = mixture_of(config, teacher.config.num_hidden_layers, depth, width).to(device)
    batch = Collator(0, 0)([(row, None) for row in rows]).to(device)
    (explain, predict), plan = batch.student, batch.plan
    step_rows, word_columns = indicators(plan, explain.input_ids.shape[1])
    values: list[Tensor] = []
    for layer in student.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out))

    def entropy(task: TextBatch, out) -> Tensor:
        labels = torch.full_like(task.input_ids, IGNORE).flatten()
        labels[task.index] = task.targets
        return losses.cross_entropy(out.logits, labels.view(task.input_ids.shape))

    def reduced(weights: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # maps are float32
            return torch.stack([step_rows @ layer.float().mean(1) @ word_columns for layer in weights], 1)

    def loss() -> Tensor:
        with torch.no_grad():
            out = teacher(explain.input_ids, explain.attention_mask, output_attentions=True, use_cache=False)
            _, teacher_map = mixture.teacher(reduced(out.attentions), plan)
        values.clear()
        out = student(explain.input_ids, explain.attention_mask, output_attentions=True, use_cache=False)
        pooled = [
            pool_values(v.unflatten(-1, (student.config.num_key_value_heads, -1)).transpose(1, 2)) for v in values
        ]
        _, student_map = mixture.student(reduced(out.attentions), torch.stack(pooled, 1), plan)
        total = 0.5 * entropy(explain, out) + losses.attention(student_map, teacher_map, plan)
        out = student(predict.input_ids, predict.attention_mask, use_cache=False)
        return (total + 0.5 * entropy(predict, out)).mean()

    return loss, [*student.parameters(), *mixture.parameters()]


def indicators(plan: StepPlan, length: int) -> tuple[Tensor, Tensor]:
    """``(N, S, M)`` and ``(N, M, W)``: which rows a step has, which columns a word."""
    row = torch.arange(length, device=plan.device)
    steps = (row >= plan.steps[..., :1]) & (row < plan.steps[..., 1:])
    words = torch.zeros(len(plan), length, plan.num_words, device=plan.device)
    for n in range(len(plan)):
        own = plan.word_of_token[n] >= 0
        words[n, plan.tokens[n][own], plan.word_of_token[n][own]] = 1
    return steps.float(), words


def measured(measure: str, setup: Setup, names: list[str], seconds: float, machine: dict) -> list[dict]:
    """The rows of one batch: contender, quantity and value each."""
    common = {
        "teacher": Path(setup.teacher).name,
        "student": Path(setup.student).name,
        "batch": setup.batch.name,
        **{field: getattr(setup.batch, field) for field in ("tokens", "words", "steps")},
        "dtype": DTYPES[setup.dtype],
        "compiled": setup.compiled,
    }
    rows = []
    for name, quantity, value in MEASURES[measure](setup, names, seconds):
        target = TARGETS.get((name, quantity))
        value = float(f"{value:.5g}")
        rows.append(common | {"contender": name, "quantity": quantity, "value": value, "target": target} | machine)
        print(
            f"{setup.batch.name:14s} {name:22s} {quantity:60s} {value:10.4f}"
            + (f"  (target {target})" if target else "")
        )
    return rows


def measure_time(setup: Setup, names: list[str], seconds: float) -> Iterator[tuple[str, str, float]]:
    """Seconds of a step and its ratios; and the loss, which says that the contenders compute the same."""
    steps = {name: setup.step(name) for name in names}
    for name, step in steps.items():
        yield name, "loss", step().item()
    times = timed(steps, torch.device(setup.device), seconds)
    for name in names:
        yield name, "seconds", statistics.median(times[name])
        yield name, "steps timed", len(times[name])
        if "dss" in times and name != "dss":
            yield name, "time over dss", ratio(times[name], times["dss"])
        alike = name.replace("molsaki", "dss")
        if alike != name and alike in times:
            yield name, f"time over {alike}", ratio(times[name], times[alike])
        if "eager" in times and name != "eager":
            yield name, "times faster than eager", ratio(times["eager"], times[name])


def measure_memory(setup: Setup, names: list[str], seconds: float) -> Iterator[tuple[str, str, float]]:
    """MiB of a step at its worst moment: above what rests between steps, and with it."""
    del seconds
    eager = None
    for name in sorted(names, key=lambda name: name != "eager"):
        above, whole = peak_memory(setup, name)
        yield name, "peak MiB of a step", above
        yield name, "peak MiB with weights and optimizer", whole
        if name == "eager":
            eager = (above, whole)
        elif eager is not None:
            yield name, "share of eager's peak", above / eager[0]
            yield name, "share of eager's peak, with weights and optimizer", whole / eager[1]


def measure_profile(setup: Setup, names: list[str], seconds: float) -> Iterator[tuple[str, str, float]]:
    """Seconds of a step by what they are spent on."""
    del seconds
    for name in names:
        step = setup.step(name)
        step()
        for part, spent in profiled(step, setup).items():
            yield name, f"seconds, {part}", spent


MEASURES = {"time": measure_time, "memory": measure_memory, "profile": measure_profile}


def timed(steps: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of every step, round after round; one call each has gone before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[next(iter(times))]) < 2:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return times


def profiled(step: Callable, setup: Setup) -> dict[str, float]:
    """Seconds of a step by what they are spent on, from PyTorch's profiler (on CUDA of the device)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_cuda = setup.device.startswith("cuda")
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    vocabulary = load_config(setup.student).vocab_size
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
    parts: dict[str, float] = collections.defaultdict(float)
    for event in profile.events():
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        parts[_part(event, vocabulary)] += microseconds / 1e6
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def load_config(name: str):
    from transformers import AutoConfig

    return LlamaConfig(**RANDOM[name]) if name in RANDOM else AutoConfig.from_pretrained(name)


def _part(event, vocabulary: int) -> str:
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    names = " ".join(e.name for e in chain)
    if "Optimizer" in names:
        return "optimizer"
    if "flash_attention" in names or "aten::_softmax" in names:
        return "attention"
    if "pool_values" in names:
        return "pooled values"
    if "molsaki" in names:
        return "maps and what joins them to attention"
    if any(vocabulary in shape for e in chain for shape in (e.input_shapes or []) if isinstance(shape, list)):
        return "embedding, head and cross-entropy"
    if re.search(r"aten::(addmm|mm|linear|matmul|bmm)\b", names):
        return "linear layers" if "aten::bmm" not in names else "products of batches"
    return "the rest: norms, activations, rotations, adding up"


def peak_memory(setup: Setup, name: str) -> tuple[float, float]:
    """MiB of one step at its worst moment: above what rests between steps, and with it."""
    if setup.device.startswith("cuda"):
        step = setup.step(name)
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
        return (peak - before) / 2**20, peak / 2**20
    spawn = multiprocessing.get_context("spawn")
    with _without_hoarding(), concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_cpu_peak, setup, name).result()


@contextlib.contextmanager
def _without_hoarding() -> Iterator[None]:
    """Processes started inside give freed tensors back: glibc would keep 100 MiB or more of them, now and then."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(1 << 18)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _cpu_peak(setup: Setup, name: str) -> tuple[float, float]:
    """In a process of its own. One step goes before: the optimizer's state and working memory are made then."""
    from .measure import _status

    step = setup.step(name)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before, _status("VmHWM")


if __name__ == "__main__":
    main()
