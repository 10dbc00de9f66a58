"""Measures one optimizer step of a student: with stored maps, without maps, and as two eager models.

    python -m benchmarks.step --model FOLDER [--student FOLDER] [--device cpu|cuda] [--csv FILE] [--shape 1x1024]
                              [--contenders 'NAME; NAME'] [--measure time memory profile] [--compile] [--seconds S]
                              [--dtype float32|bfloat16] [--long]

``--model`` is the teacher and, without ``--student``, also the student; ``tiny``, ``tiny-teacher``, ``long``,
``smollm2-135m`` and ``1b`` are random Llamas. ``--long`` measures texts of 4,096 to 32,768 tokens that consist almost
entirely of a thinking trace, with as many sentences and numbers as concatenated rationales of GSM8K have. Contenders:

- ``dss``: the two tasks (Eq. 7 without L_att), packed into one forward that encodes the question once;
- ``molsaki, stored maps``: the same with the maps of every layer, the router and L_att; "time over dss" is the cost;
- ``molsaki, live teacher``: with the teacher's forward in every step;
- ``dss, packed`` and ``molsaki, packed``: one forward that encodes the question in both tasks;
- ``dss, padded`` and ``molsaki, padded``: one padded forward per task;
- ``dss, sdpa``: the same with transformers' "sdpa" instead of our attention;
- ``eager``: the usual implementation: both models with ``attn_implementation="eager"`` and ``output_attentions=True``,
  all weights kept and reduced afterwards, logits of all tokens, one padded forward per task; the same losses.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import gc
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from molsaki.batches.batch import TextBatch
from molsaki.batches.collator import Collator
from molsaki.batches.tokenized import TokenizedExample, TokenizedText
from molsaki.method import losses
from molsaki.method.losses import IGNORE
from molsaki.method.objectives import objective_of
from molsaki.modeling.attention_hook import NAME
from molsaki.teacher.teacher_maps import mixture_of, probe, teacher_maps
from molsaki.text.spans import Spans
from molsaki.training.config import DistillConfig
from molsaki.training.distiller import Distiller
from molsaki_kernels import pool_values

from .check import indicators
from .layer import describe, read_records, write_csv
from .measure import memory_status, ratio, without_malloc_reserve
from .roofline import gpu_named

RANDOM = {
    "1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "smollm2-135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
    "small": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8192,
    ),
    "long": dict(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=8192,
    ),
    "tiny-teacher": dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        initializer_range=0.3,
    ),
    "tiny": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        initializer_range=0.3,
    ),
}
LAYOUTS = ("packed", "padded")  # besides the default, packed with a shared question
CONTENDERS = (
    "dss",
    "molsaki, stored maps",
    "molsaki, live teacher",
    *(f"dss, {layout}" for layout in LAYOUTS),
    "dss, sdpa",
    *(f"molsaki, {layout}" for layout in LAYOUTS),
    "eager",
)
OURS = "molsaki, stored maps"
DTYPES = {"float32": "float32", "bfloat16": "bf16 autocast"}  # the option and its name in a record
TARGETS = {
    (OURS, "time over dss"): 1.10,
    (OURS, "times faster than eager"): 3.0,
    (OURS, "share of eager's peak"): 0.333,
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """N examples of ``tokens`` tokens, or ragged from half of that; 40 % are the question, 4 tokens the answer.

    Attributes:
        is_trace: the question is 2 % instead.
    """

    size: int
    tokens: int
    words: int
    steps: int
    ragged: bool = False
    is_trace: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}x{self.tokens}" + " ragged" * self.ragged + " trace" * self.is_trace

    def question(self, length: int) -> int:
        """The tokens of the question in a text of ``length``."""
        return int((0.02 if self.is_trace else 0.4) * length)

    def examples(self, vocabulary: int, seed: int = 0) -> list[TokenizedExample]:
        g = np.random.default_rng(seed)
        return [self._example(n, g, vocabulary) for n in range(self.size)]

    def _example(self, n: int, g: np.random.Generator, vocabulary: int) -> TokenizedExample:
        length = int(g.integers(self.tokens // 2, self.tokens + 1)) if self.ragged else self.tokens
        question = self.question(length)
        ids = g.integers(2, vocabulary, length + 4).astype(np.int32)
        cuts = [0, *sorted(g.choice(np.arange(1, length), self.steps - 1, replace=False).tolist()), length]
        words = [[token] for token in sorted(g.choice(length, self.words, replace=False).tolist())]
        steps = list(zip(cuts[:-1], cuts[1:], strict=True))
        explain = TokenizedText(ids[:length], question, steps, words)
        predict = TokenizedText(np.concatenate([ids[:question], ids[length:]]), question, [], [])
        return TokenizedExample(str(n), Spans("", (), (), 0), explain, predict, explain)


BATCHES = [Batch(4, 256, 20, 5), Batch(4, 256, 20, 5, ragged=True), Batch(1, 1024, 50, 10)]
LONG_BATCHES = [Batch(1, tokens, tokens // 9, tokens // 16, is_trace=True) for tokens in (4096, 8192, 16384, 32768)]
CUDA_BATCHES = [Batch(16, 256, 20, 5), Batch(4, 1024, 50, 10), Batch(1, 8192, 400, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1b", help=f"folder of the teacher, or {', '.join(RANDOM)}")
    parser.add_argument("--student", help="folder of the student; default: the teacher")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="append the records to this file")
    parser.add_argument("--shape", default="", help="only batches whose name begins with this, such as 1x1024")
    parser.add_argument("--contenders", help=f"only these of {'; '.join(CONTENDERS)}, separated by semicolons")
    parser.add_argument(
        "--seconds", type=float, default=60, help="to time a batch, after one warm-up call per contender"
    )
    parser.add_argument("--measure", nargs="+", choices=list(MEASURES), default=["time"], help="what to measure")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="bfloat16 is autocast (default: float32 on a CPU, bfloat16 on CUDA)"
    )
    parser.add_argument("--long", action="store_true", help="long thinking traces instead of the usual batches")
    parser.add_argument("--compile", action="store_true", help="torch.compile the student and its losses")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    names = arguments.contenders.split(";") if arguments.contenders else CONTENDERS
    machine = describe(device)
    records = read_records(arguments.csv)
    for batch in LONG_BATCHES if arguments.long else CUDA_BATCHES if device.type == "cuda" else BATCHES:
        if batch.name.startswith(arguments.shape):
            student, dtype = arguments.student or arguments.model, arguments.dtype or default_dtype(device)
            setup = Setup(arguments.model, student, batch, arguments.compile, str(device), dtype)
            for measure in arguments.measure:
                records += measured(measure, setup, [name.strip() for name in names], arguments.seconds, machine)
            if arguments.csv:
                write_csv(arguments.csv, records)


def default_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


@dataclasses.dataclass(frozen=True)
class Setup:
    """The properties that define a step; picklable for the processes that measure memory."""

    teacher: str
    student: str
    batch: Batch
    compiled: bool
    device: str
    dtype: str

    def record(self, name: str, quantity: str, value: float, machine: dict) -> dict:
        """One measured quantity of contender ``name``, with five digits, as the CSV files hold it."""
        return {
            "teacher": Path(self.teacher).name,
            "student": Path(self.student).name,
            "batch": self.batch.name,
            **{field: getattr(self.batch, field) for field in ("tokens", "words", "steps")},
            "dtype": DTYPES[self.dtype],
            "compiled": self.compiled,
            "contender": name,
            "quantity": quantity,
            "value": float(f"{value:.5g}"),
            "target": TARGETS.get((name, quantity)),
            **machine,
        }

    def step(self, name: str) -> Callable[[], Tensor]:
        """Load what contender ``name`` needs; return its step, which returns the loss."""
        torch.manual_seed(0)
        device, config = torch.device(self.device), _config("dss" if name.startswith("dss") else "molsaki")
        student = load(self.student, device).train()
        examples = self.batch.examples(student.config.vocab_size)
        needs_teacher = name in ("eager", "molsaki, live teacher")
        teacher = load(self.teacher, device).eval().requires_grad_(False) if needs_teacher else None
        if name == "eager":
            loss, parameters = eager_loss(student, teacher, config, examples, device)
        else:
            layout = name.rpartition(", ")[2]
            loss, parameters = own_loss(student, teacher, config, examples, self, layout)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

        def step() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
                total = loss()
            total.backward()
            optimizer.step()
            return total.detach()

        return step


def load(name: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a model in float32: one of `RANDOM` or a folder."""
    if name in RANDOM:
        torch.manual_seed(0)
        config = LlamaConfig(**RANDOM[name], tie_word_embeddings=True, max_position_embeddings=1 << 17)
        with torch.device(device):
            return LlamaForCausalLM(config)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)


def _config(objective: str) -> DistillConfig:
    return DistillConfig(output_dir=tempfile.gettempdir(), objective=objective)


def own_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    config: DistillConfig,
    examples: list[TokenizedExample],
    setup: Setup,
    layout: str,
) -> tuple[Callable[[], Tensor], Iterable[torch.nn.Parameter]]:
    """Return the loss of ``DistillTrainer``'s module on one batch, and the parameters to train."""
    device = torch.device(setup.device)
    student.set_attn_implementation("sdpa" if layout == "sdpa" else NAME)
    depth, layers, width = probe(student, "concat")
    teacher_depth = depth if setup.teacher == setup.student else probe(teacher or load(setup.teacher))[0]
    mixture = None
    if objective_of(config.objective).maps:
        mixture = mixture_of(config, teacher_depth, depth, layers, width).to(device)
    distiller = Distiller(student, mixture, config)
    packing = layout not in ("padded", "sdpa")
    collator = Collator(0, 0, packing, packing, share_question=layout not in LAYOUTS)
    batch = collator([(example, None) for example in examples]).to(device)
    plan, texts = batch.plan, batch.teacher
    batch = dataclasses.replace(batch, teacher=None)
    if mixture is not None and teacher is None:  # in the form of a store
        maps = torch.rand(len(plan), 1, plan.num_steps, plan.num_words, device=device)
        weights = torch.full((len(plan), 1, teacher_depth), 1 / teacher_depth, device=device)
        batch = dataclasses.replace(batch, teacher_map=maps, teacher_weights=weights)
    if teacher is not None:
        teacher.set_attn_implementation(NAME)
    run = torch.compile(distiller) if setup.compiled else distiller

    def loss() -> Tensor:
        if teacher is None:
            return run(batch)["loss"].mean()
        weights, mixed = mixture.teacher(teacher_maps(teacher, plan=texts.plan, **texts.model_inputs()), plan)
        return run(dataclasses.replace(batch, teacher_map=mixed, teacher_weights=weights))["loss"].mean()

    return loss, distiller.parameters()


def eager_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    config: DistillConfig,
    examples: list[TokenizedExample],
    device: torch.device,
) -> tuple[Callable[[], Tensor], Iterable[torch.nn.Parameter]]:
    """Return the same loss computed by two models with eager attention, and the parameters to train."""
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    depth, width = (
        student.config.num_hidden_layers,
        student.config.num_key_value_heads * student.model.layers[0].self_attn.head_dim,
    )
    mixture = mixture_of(config, teacher.config.num_hidden_layers, depth, depth, width).to(device)
    batch = Collator(0, 0)([(example, None) for example in examples]).to(device)
    (explain, predict), plan = batch.student, batch.plan
    rows_of_step, columns_of_word = indicators(plan, explain.input_ids.shape[1])
    values: list[Tensor] = []
    for layer in student.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out))

    def entropy(texts: TextBatch, logits: Tensor) -> Tensor:
        labels = torch.full_like(texts.input_ids, IGNORE).flatten()
        labels[texts.index] = texts.targets
        return losses.cross_entropy(logits, labels.view(texts.input_ids.shape))

    def reduced(weights: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # maps are float32
            return torch.stack([rows_of_step @ layer.float().mean(1) @ columns_of_word for layer in weights], 1)

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
        total = 0.5 * entropy(explain, out.logits) + losses.attention(student_map, teacher_map, plan)
        out = student(predict.input_ids, predict.attention_mask, use_cache=False)
        return (total + 0.5 * entropy(predict, out.logits)).mean()

    return loss, [*student.parameters(), *mixture.parameters()]


def measured(measure: str, setup: Setup, names: list[str], seconds: float, machine: dict) -> list[dict]:
    """Measure one batch; return records of contender, quantity and value."""
    records = []
    for name, quantity, value in MEASURES[measure](setup, names, seconds):
        records.append(setup.record(name, quantity, value, machine))
        value, target = records[-1]["value"], records[-1]["target"]
        print(
            f"{setup.batch.name:14s} {name:22s} {quantity:60s} {value:10.4f}"
            + (f"  (target {target})" if target else "")
        )
    return records


def measure_time(setup: Setup, names: list[str], seconds: float) -> Iterator[tuple[str, str, float]]:
    """Yield seconds per step, ratios, and the loss, which shows that the contenders compute the same."""
    steps, device = {}, torch.device(setup.device)
    for name in names:
        try:
            steps[name] = setup.step(name)
            yield name, "loss", steps[name]().item()
        except torch.OutOfMemoryError as reason:  # the others are still measured
            print(f"{setup.batch.name}: {name} does not fit in memory: {str(reason).splitlines()[0]}")
            steps.pop(name, None)
            torch.cuda.empty_cache()
    times = timed(steps, device, seconds)
    work = model_flops(setup)
    for name in times:
        median = statistics.median(times[name])
        yield name, "seconds", median
        yield name, "tokens a second", setup.batch.size * setup.batch.tokens / median
        if device.type == "cuda" and (gpu := gpu_named(torch.cuda.get_device_name(device))) is not None:
            yield name, "model FLOP utilization", work / median / gpu.flops
        yield name, "steps timed", len(times[name])
        if "dss" in times and name != "dss":
            yield name, "time over dss", ratio(times[name], times["dss"])
        alike = name.replace("molsaki", "dss")
        if alike != name and alike in times:
            yield name, f"time over {alike}", ratio(times[name], times[alike])
        if "eager" in times and name != "eager":
            yield name, "times faster than eager", ratio(times["eager"], times[name])


def model_flops(setup: Setup) -> float:
    """Return the FLOPs that a step of the student cannot avoid: the question once, the head on labelled tokens only.

    A multiply and an add are two, forward and backward are three times the forward, attention is causal. The same for
    every contender, so that what a contender computes beyond it lowers its utilization. The teacher is not counted.
    """
    config, batch = load_config(setup.student), setup.batch
    answer, question = 4, batch.question(batch.tokens)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    projections = config.hidden_size * (width * 2 * (heads + kv_heads) + 3 * config.intermediate_size)
    tokens, labelled = batch.tokens + answer, batch.tokens - question + answer
    attention = 2 * heads * width * (batch.tokens**2 + (question + answer) ** 2 - question**2)  # half of the square
    layer = 2 * projections * tokens + attention
    forward = config.num_hidden_layers * layer + 2 * config.hidden_size * config.vocab_size * labelled
    return 3 * batch.size * forward


def measure_memory(setup: Setup, names: list[str], seconds: float) -> Iterator[tuple[str, str, float]]:
    """Yield the peak MiB of a step: beyond what is allocated between steps, and in total."""
    del seconds
    eager = None
    for name in sorted(names, key=lambda name: name != "eager"):
        try:
            above, whole = peak_memory(setup, name)
        except torch.OutOfMemoryError:
            print(f"{setup.batch.name}: {name} does not fit in memory")
            continue
        yield name, "peak MiB of a step", above
        yield name, "peak MiB with weights and optimizer", whole
        if name == "eager":
            eager = (above, whole)
        elif eager is not None:
            yield name, "share of eager's peak", above / eager[0]
            yield name, "share of eager's peak, with weights and optimizer", whole / eager[1]


def measure_profile(setup: Setup, names: list[str], seconds: float) -> Iterator[tuple[str, str, float]]:
    """Yield the seconds of a step per kind of work, and on CUDA their sum and the numbers of `CALLS`."""
    del seconds
    for name in names:
        step = setup.step(name)
        step()
        step()
        parts, calls = profiled(step, setup)
        for part, spent in parts.items():
            yield name, f"seconds, {part}", spent
        if setup.device.startswith("cuda"):
            yield name, "seconds, all", sum(parts.values())
            for call, count in calls.items():
                yield name, call, count


# Calls of CUDA's runtime by what they do, of which a step of a small model has too many.
CALLS = {
    "kernel launches": re.compile(r"cu(da)?Launch(Kernel|Cooperative)"),
    "copies": re.compile(r"cudaMemcpy"),
    "synchronizations": re.compile(r"cuda(Stream|Event|Device)Synchronize"),
}

MEASURES = {"time": measure_time, "memory": measure_memory, "profile": measure_profile}


def timed(steps: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Time the steps in turns; each has run once before."""
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


def profiled(step: Callable, setup: Setup) -> tuple[dict[str, float], collections.Counter[str]]:
    """Return the seconds of a step per kind of work (on CUDA those of the device), and the numbers of `CALLS`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_cuda = setup.device.startswith("cuda")
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    vocabulary = load_config(setup.student).vocab_size
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    parts: dict[str, float] = collections.defaultdict(float)
    calls = collections.Counter(dict.fromkeys(CALLS, 0))
    for event in profile.events():
        calls.update(call for call, names in CALLS.items() if names.match(event.name))
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel: its operator's event has its time
            continue
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        parts[_part(event, vocabulary)] += microseconds / 1e6
    return dict(sorted(parts.items(), key=lambda item: -item[1])), calls


def load_config(name: str) -> PretrainedConfig:
    return LlamaConfig(**RANDOM[name]) if name in RANDOM else AutoConfig.from_pretrained(name)


def _part(event: Any, vocabulary: int) -> str:
    """Return the kind of work of a profiler event, by the names of the autograd functions and operators around it."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    names = " ".join(e.name for e in chain)
    if "Optimizer" in names:
        return "optimizer"
    if "flash_attention" in names or "aten::_softmax" in names:
        return "attention"
    if re.search(r"\b_Pooling|molsaki::pool_values", names):
        return "pooled values"
    if re.search(r"\b_(Attention|Map)(Backward)?\b|molsaki::stepwise", names):
        return "maps and what joins them to attention"
    if any(vocabulary in shape for e in chain for shape in (e.input_shapes or []) if isinstance(shape, list)):
        return "embedding, head and cross-entropy"
    if re.search(r"aten::(addmm|mm|linear|matmul|bmm)\b", names):
        return "linear layers" if "aten::bmm" not in names else "products of batches"
    return "the rest: norms, activations, rotations, adding up"


def peak_memory(setup: Setup, name: str) -> tuple[float, float]:
    """Return the peak MiB of one step: beyond what is allocated between steps, and in total."""
    if setup.device.startswith("cuda"):
        gc.collect()  # the model before, whose hooks refer to it
        step = setup.step(name)
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
        return (peak - before) / 2**20, peak / 2**20
    spawn = multiprocessing.get_context("spawn")
    with without_malloc_reserve(), concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_cpu_peak, setup, name).result()


def _cpu_peak(setup: Setup, name: str) -> tuple[float, float]:
    """Run in a process of its own; a first step allocates the optimizer's state and working memory."""
    step = setup.step(name)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_status("VmRSS")
    step()
    return memory_status("VmHWM") - before, memory_status("VmHWM")


if __name__ == "__main__":
    main()
