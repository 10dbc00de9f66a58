"""The config dataclasses, which are also the command line: every field is a flag, with the field's help text.

`molsaki.flags` reads them. This module does not import torch, so that ``--help`` is fast. `DistillConfig`, which adds
`DistillOptions` to transformers' ``TrainingArguments``, therefore has a module of its own, `molsaki.training.config`.
"""

from __future__ import annotations

import dataclasses
import json
import urllib.parse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from molsaki.functions import is_named
from molsaki.text.formats import AUTO, FORMATS
from molsaki.text.key_words import KEY_WORDS, selector_of
from molsaki.text.sentences import splitter_of

if TYPE_CHECKING:
    pass

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Options whose value may also be ``module:name``, see `molsaki.functions`.
MIXTURE_NAMES = ("mixture", "matched", "single", "last", "uniform", "one_to_one", "reverse", "random")
OBJECTIVE_NAMES = ("vanilla", "cot", "dss", "mmi", "logits", "molsaki")
OR_YOUR_OWN = {"mixture": MIXTURE_NAMES, "objective": OBJECTIVE_NAMES}

PREDICT_TEMPLATE = "{question}\nAnswer: {answer}"
COT_TEMPLATE = "{rationale} The answer is {answer}."
PREDICT_HELP = (
    "The text of the answer task, with {question} and then {answer}; with a chat template, the part before {answer} is "
    "the user's turn."
)


DATA_FILES = "JSON lines, a JSON array, CSV, TSV or Parquet"


def option(default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    """A dataclass field with a help text and, for some, choices; default lists and dicts are copied per config."""
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DataOptions:
    """How the records of data files are read."""

    data_format: str = option(
        AUTO,
        "The format of the records: auto recognises it by their keys, for each record, and logs it; or one of "
        f"{', '.join(FORMATS)}; molsaki is our own format: question, rationale and answer.",
        choices=(AUTO, *FORMATS),
    )


@dataclasses.dataclass
class TextOptions:
    """How a text is read and cut: must be the same when maps are stored and when they are used."""

    key: str = option(
        "numbers",
        f"The key words: {'; '.join(f'{name} = {select.__doc__}' for name, select in KEY_WORDS.items())}; "
        "regex:PATTERN = the matches of a regular expression; module:function = your own function from a text to "
        "spans.",
    )
    key_of: Literal["all", "question"] = option("all", "Key words of the whole text, or of the question only.")
    key_occurrence: Literal["all", "first", "last"] = option(
        "all", "Of key words that differ only in case: all, or only the first or the last."
    )
    max_key_words: int = option(0, "The most key words of a text, the first ones; 0: no limit.")
    splitter: str = option(
        "rules",
        "How steps end: by rules for abbreviations and decimals (rules), at every period as in the paper (periods), by "
        "rules and before every number (numbers), at line ends (lines), at blank lines (paragraphs), after N words "
        "(words:N), by the package sentencex (sentencex:LANGUAGE), or by your own function from a text to the ends of "
        "its steps (module:function).",
    )
    number_words: bool = option(False, "Numbers written out, such as twenty-five, are key words too.")
    teacher_template: str = option(
        "plain",
        "The template of the teacher's texts: plain, chat (its chat template) or a format such as "
        "'Q: {question} A: {rationale}'.",
    )
    student_template: str = option("plain", "The template of the student's texts: plain, chat or a format, as above.")
    teacher_max_length: int | None = option(None, "Longest teacher text in tokens; the teacher's context if unset.")
    max_length: int | None = option(None, "Longest student text in tokens; the student's context if unset.")
    too_long: Literal["skip", "cut"] = option(
        "skip",
        "A text longer than that is left out and counted (skip), or cut at the same place for both models (cut).",
    )
    drop_wrong: bool = option(False, "Leave out examples whose rationale ends in an answer other than the gold one.")


@dataclasses.dataclass
class MixtureOptions:
    """Which layers of the teacher are matched with which layers of the student."""

    mixture: str = option(
        "mixture",
        "The paper's weighted mixture of all layers (mixture), learnt weights for each of teacher_layers (matched), "
        "one of the fixed pairings of layers (single, last, uniform, one_to_one, reverse, random), or your own: "
        "module:function of the numbers of layers of teacher and student, which returns pairs of layers.",
    )
    map_heads: Literal["mean", "each"] = option(
        "mean", "One map per layer, the mean over its heads, or one per head, which then counts as a layer (each)."
    )
    tau_t: float = option(0.1, "Temperature of the teacher's layer weights (Eq. 4).")
    tau_s: float = option(0.5, "Temperature of the student's layer weights (Eq. 5).")
    teacher_scale: Literal["none", "std"] = option(
        "none", "Divide the teacher's layer scores by their standard deviation over layers before the temperature."
    )
    router: Literal["joint", "shared"] = option(
        "joint", "The student's router (Eq. 5): one linear map of all layers' values, or one per layer."
    )
    value_heads: Literal["concat", "mean"] = option(
        "concat", "The router's input from the value vectors: all KV heads side by side, or their mean."
    )
    pooling: Literal["sum", "mean"] = option("sum", "How value vectors are pooled over the tokens of a text (Eq. 5).")
    teacher_layer: int = option(-1, "mixture=single: the teacher's layer; negative counts from the end.")
    student_layer: int = option(-1, "mixture=single: the student's layer; negative counts from the end.")
    teacher_layers: list[int] = option([], "mixture=matched: the teacher's layers. Default: all.")
    mixture_seed: int = option(0, "mixture=random: the seed of the pairing of layers.")


@dataclasses.dataclass
class ExtractConfig(DataOptions, TextOptions, MixtureOptions):
    """``molsaki extract``: run the teacher once over a data set and store its maps."""

    teacher: str | None = option(None, "Folder or hub name of the white-box teacher.")
    data_files: list[str] = option(
        [], f"Files with id, question, rationale and answer: {DATA_FILES}. They share one store."
    )
    store: str | None = option(None, "Folder of the store; an unfinished store is continued.")
    student: str | None = option(
        None, "Folder or hub name of the student; needed with too_long=cut and for mixtures that pair up layers."
    )
    all_layers: bool = option(False, "Store the map of every layer, so that any mixture can be used later.")
    packing: bool | None = option(
        None, "Pack the texts of a forward pass without padding. Default: on if the teacher supports it."
    )
    batch_tokens: int = option(8192, "Tokens per forward pass of the teacher, padding included.")
    shard_size: int = option(
        1024,
        "Examples per file of the store, or fewer if their maps are large (256 MiB); an interruption loses at most the "
        "work on one file.",
    )
    dtype: Dtype = option("auto", "The teacher's floating-point type.")
    device_map: dict[str, Any] | str | None = option(
        None,
        "How to spread a teacher that is larger than one device, as in from_pretrained: auto (all devices, then "
        "memory, then disk), or JSON of modules and devices. Each process needs its own devices "
        "(CUDA_VISIBLE_DEVICES).",
    )
    quantize: Literal["none", "8bit", "4bit"] = option(
        "none", "Load the teacher's linear layers with 8 or 4 bits (needs bitsandbytes)."
    )
    limit: int | None = option(None, "Use only this many examples, the first ones.")

    def __post_init__(self) -> None:
        check_options(self, batch_tokens=1, shard_size=1, limit=1)


@dataclasses.dataclass
class DistillOptions(DataOptions, TextOptions, MixtureOptions):
    """``molsaki distill``: train a student. Besides these, it takes every option of transformers' TrainingArguments."""

    student: str | None = option(None, "Folder or hub name of the student.")
    teacher: str | None = option(None, "Folder or hub name of the white-box teacher, to run it live.")
    store: str | None = option(None, "Folder of the teacher's stored maps, instead of a live teacher.")
    train_file: list[str] = option([], f"File with id, question, rationale and answer, or several: {DATA_FILES}.")
    eval_file: list[str] = option([], "File, or several, whose losses are computed with eval_strategy steps or epoch.")
    streaming: bool = option(
        False,
        "Read the training data in order while training, instead of once before it. Needs max_steps; examples are not "
        "shuffled.",
    )
    eval_accuracy: int = option(
        0,
        "Also decode replies to the first N examples of the evaluation data and log the share of right ones as "
        "eval_accuracy; --metric_for_best_model accuracy chooses the checkpoint by it. 0: none.",
    )
    eval_accuracy_mode: Literal["answer", "rationale"] = option(
        "answer", "The reply requested for eval_accuracy: the answer alone, or a rationale that ends in it."
    )
    objective: str | None = option(
        None,
        "The loss: of answers only (vanilla); of one text with rationale and answer (cot, Fine-tune-CoT); of answers "
        "and rationales as two texts (dss); with the mutual information of the two (mmi), the teacher's logits "
        "(logits) or the teacher's attention (molsaki) added; or your own, module:name of an Objective. Default: "
        "molsaki if there is a teacher or a store, else dss; the attention loss was not clearly better than dss in "
        "docs/evidence.md.",
    )
    alpha: float = option(0.5, "Weight of the answer's cross-entropy; the rationale's has 1 - alpha (Eq. 7).")
    beta: float = option(1.0, "Weight of the attention loss (Eq. 7).")
    beta_until: float = option(
        1.0, "The fraction of the training, 0 to 1, after which the weight of the attention loss is 0."
    )
    attention_share: float | None = option(
        None,
        "Change beta during training so that the norm of the attention loss's gradient is this share of the norm of "
        "the other losses' gradient (in the student's weights), such as 0.1. beta is then the weight before the first "
        "measurement, and the weight in eval_loss.",
    )
    share_steps: int = option(
        0, "Number of steps between measurements of that share, which is logged; 0: never, or 20 with attention_share."
    )
    beta_mmi: float = option(0.1, "objective=mmi: weight of the cross-entropy between the two tasks' predictions.")
    beta_logits: float = option(0.3, "objective=logits: weight of the divergence from the teacher's logits.")
    temperature: float = option(2.0, "objective=logits: temperature that softens both models' logits.")
    normalise: Literal["softmax", "sum"] = option(
        "softmax", "How each row of a map becomes a distribution over words (Eq. 6)."
    )
    causal_words: bool = option(False, "Leave out of each row of a map the words after the last token of its step.")
    map_steps: Literal["all", "rationale"] = option(
        "all", "The rows of a map in the attention loss: all steps, or those of the rationale only."
    )
    teacher_temperature: float = option(
        1.0, "Temperature of each row of the teacher's map; below 1 it sharpens the row."
    )
    control: Literal["none", "other_example"] = option(
        "none", "A control: each example gets the teacher's map of another example of its batch (other_example)."
    )
    predict_template: str = option(PREDICT_TEMPLATE, PREDICT_HELP)
    cot_template: str = option(
        COT_TEMPLATE, "objective=cot: the text after the question, with {rationale} and then {answer}."
    )
    packing: bool | None = option(
        None, "Pack all texts of a batch, of both tasks, without padding. Default: on if the student supports it."
    )
    share_question: bool | None = option(
        None, "Encode the shared question once per packed example. Default: on if the student supports it."
    )
    fused_cross_entropy: Literal["auto", "torch", "liger"] = option(
        "auto",
        "The implementation of the labels' cross-entropy: torch, in chunks of labels, or liger-kernel's fused kernel. "
        "auto: liger on CUDA if it is installed, else torch.",
    )
    student_dtype: Dtype = option(
        "float32", "The student's floating-point type; float32 with --bf16 is mixed precision."
    )
    teacher_dtype: Dtype = option("auto", "The live teacher's floating-point type.")
    freeze: list[str] = option([], "Regular expressions of the names of the student's parameters that are not trained.")
    lora_rank: int = option(0, "Train LoRA adapters of this rank (needs peft); 0 trains the model itself.")
    lora_alpha: float = option(16.0, "Scale of the LoRA adapters.")
    lora_dropout: float = option(0.0, "Dropout of the LoRA adapters.")
    lora_targets: list[str] = option(["all-linear"], "Modules that get LoRA adapters: names, or all-linear.")
    router_learning_rate: float | None = option(
        None, "Learning rate of the student's router. Default: that of the student."
    )
    resume: bool = option(False, "Continue from the last complete checkpoint in output_dir, if there is one.")
    limit: int | None = option(None, "Use only this many training examples, the first ones.")

    logging_steps: float = option(10, "Number of steps between log entries; below 1, a fraction of all steps.")
    report_to: None | str | list[str] = option("none", "Trackers to report to, such as tensorboard.")
    remove_unused_columns: bool = option(False, "Must stay False: the batches are nested.")
    ddp_find_unused_parameters: bool | None = option(False, "For models with parameters that some batches do not use.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        {"use_reentrant": False}, "Keyword arguments of the checkpoint function."
    )


@dataclasses.dataclass
class EvaluateConfig(DataOptions):
    """``molsaki evaluate``: decode greedily, score exactly, write every prediction."""

    model: str | None = option(None, "Folder or hub name of the model: any causal language model.")
    data_file: str | None = option(
        None, f"File with id, question and gold (or answer), and optionally choices: {DATA_FILES}."
    )
    output_dir: str | None = option(
        None, "Folder for predictions.jsonl and summary.json; with --predictions for summary.json and compare.csv."
    )
    mode: Literal["answer", "rationale"] = option(
        "answer", "Ask for the answer alone, or for a rationale whose last number (or choice) is the answer."
    )
    predict_template: str | None = option(None, f"{PREDICT_HELP} Default: that of the model's run of molsaki distill.")
    template: str | None = option(
        None, "The template of the question. Default: the student_template of the model's run, else plain."
    )
    thinking: bool | None = option(
        None,
        "With mode rationale: whether the reply begins with a <think> trace, which some chat templates need to know. "
        "Default: whether most rationales of the model's run have one.",
    )
    predictions: list[str] = option(
        [],
        "Score earlier output of evaluate without running a model: its folders or predictions.jsonl files, one per "
        "seed, all on the same data.",
    )
    compare: list[str] = option(
        [],
        "predictions.jsonl of another model on the same data, or its folder, for a paired test; with --predictions one "
        "per seed, in the same order.",
    )
    batch_size: int = option(32, "Questions per batch.")
    max_new_tokens: int | None = option(None, "Longest reply in tokens. Default: 16 for answers, 256 for rationales.")
    dtype: Dtype = option("auto", "The model's floating-point type.")
    device: str | None = option(None, "The device. Default: the first CUDA device, else the CPU.")
    limit: int | None = option(None, "Use only this many examples, the first ones.")

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("predictions", "compare"):
            if not isinstance(getattr(self, name), list):
                raise ValueError(f"{name}: expected a list of paths, got {getattr(self, name)!r}")


@dataclasses.dataclass
class PlotConfig(DataOptions, TextOptions, MixtureOptions):
    """``molsaki plot``: draw the losses and layer weights of a run, and the maps of texts."""

    run: str | None = option(
        None, "Output folder of molsaki distill: draw its log, and use its options and router for the maps."
    )
    data_file: str | None = option(None, "File with the examples whose maps are drawn.")
    teacher: str | None = option(None, "Folder or hub name of the teacher, which runs live if no store is given.")
    store: str | None = option(None, "Folder of the teacher's stored maps.")
    student: str | None = option(None, "Folder or hub name of the student, or a checkpoint with its router.")
    examples: int = option(3, "Number of examples to draw, the first ones of the data.")
    ids: list[str] = option([], "Ids of the examples to draw, instead of the first ones.")
    output_dir: str | None = option(None, "Folder of the pictures. Default: plots in the run's folder.")
    format: list[str] = option(
        ["png", "svg"],
        "File formats: png for slides and chats, svg for the web and papers (its text can be searched), pdf for LaTeX.",
        choices=("png", "svg", "pdf"),
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not isinstance(self.format, list) or not self.format or {*self.format} - {"png", "svg", "pdf"}:
            raise ValueError(f"format: expected some of png, svg and pdf in a list, got {self.format!r}")


@dataclasses.dataclass
class ReportConfig(DataOptions):
    """``molsaki report RUN``: one HTML file about a run: curves, layer weights, maps, predictions, configuration."""

    run: str | None = option(
        None, "Output folder of molsaki distill; also as the first word: molsaki report RUN. Its options are used."
    )
    output_file: str | None = option(None, "The HTML file to write. Default: report.html in the run's folder.")
    teacher: str | None = option(
        None,
        "Folder or hub name of the teacher, run live for the map of each of its layers. Default: the folder that the "
        "run was trained with, if it still exists.",
    )
    store: str | None = option(
        None, "Folder of the teacher's stored maps. Default: that of the run, if it still exists."
    )
    student: str | None = option(
        None, "Folder or hub name of the student. Default: the run's folder, or its last checkpoint."
    )
    data_file: str | None = option(
        None, "File whose examples' maps are shown. Default: the run's eval_file, else its train_file."
    )
    predictions: list[str] = option(
        [],
        "predictions.jsonl of molsaki evaluate, or its folder: first the student's, then those of other models to "
        "show next to them, such as the student before training. Default: the one in the run's folder, if any.",
    )
    examples: int = option(
        8,
        "Number of examples whose maps are shown, the first of the data; also the number of right and of wrong "
        "predictions.",
    )
    ids: list[str] = option([], "Ids of the examples whose maps are shown, instead of the first ones.")

    def __post_init__(self) -> None:
        check_options(self, examples=0)


@dataclasses.dataclass
class AnnotateConfig(DataOptions):
    """``molsaki annotate``: a teacher writes rationales, and those that end in the right answer are kept."""

    teacher: str | None = option(
        None, "Folder or hub name of the teacher: any causal language model; with endpoint, the model's name there."
    )
    data_file: str | None = option(
        None, f"File with id, question and gold (or answer), and optionally choices and task: {DATA_FILES}."
    )
    output_file: str | None = option(
        None, "JSON lines file to write. Its .work.jsonl keeps all replies, so an interrupted run can be continued."
    )
    examples: str | None = option(
        None,
        "Demonstrations: JSON lines file with question, rationale, answer, and optionally task, choices and keywords. "
        "Default: the package's own, four for math and four for commonsense.",
    )
    shots: int | None = option(None, "Show only this many demonstrations per task, the first ones; 0 shows none.")
    template: str = option(
        "plain",
        "The form of the prompt: plain, chat (its chat template, demonstrations as earlier turns) or a format with "
        "{question}, {rationale} and {answer}; plain is 'Question: {question}', 'Rationale: {rationale}' and 'Answer: "
        "{answer}', each on a separate line.",
    )
    instruction: str = option(
        "Answer each question: first reason step by step in a few sentences, then give the answer on a line of its own "
        "that starts with 'Answer:'.",
        "The text before the first demonstration; may be empty.",
    )
    hint: str = option(
        "{question}\nHint: The answer is {answer}.", "The question of the second phase, which shows the gold answer."
    )
    rationales: Literal["write", "keep"] = option(
        "write",
        "keep: write no rationales; ask for the key words of the rationales in data_file, and write its records with "
        "the field keywords added. Records that have key words keep them.",
    )
    keywords: Literal["none", "teacher"] = option(
        "none", "teacher: also ask the teacher for the key words of each kept text, for key=keywords."
    )
    thinking: Literal["drop", "keep"] = option(
        "drop",
        "A thinking trace before the rationale: drop it, or keep it in <think> tags at the beginning of the "
        "rationale, so that the student learns it too.",
    )
    keep_wrong: bool = option(False, "Write the refused replies, with their reasons, to the output's .wrong.jsonl.")
    max_new_tokens: int = option(256, "Longest reply in tokens.")
    batch_size: int = option(16, "Replies per batch.")
    samples: int = option(1, "Replies per question and phase; every distinct right reply is kept. Needs temperature.")
    temperature: float = option(0.0, "0 decodes greedily; above 0, replies are sampled at this temperature.")
    seed: int = option(0, "Seed of the sampling.")
    dtype: Dtype = option("auto", "The teacher's floating-point type.")
    device: str | None = option(None, "The device. Default: the first CUDA device, else the CPU.")
    device_map: str | None = option(None, "How the teacher is spread over devices, as in from_pretrained; e.g. auto.")
    limit: int | None = option(None, "Use only this many examples, the first ones.")

    endpoint: str | None = option(
        None,
        "Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1, to use instead of a local model: "
        "its chat completions with template=chat, else its completions.",
    )
    api_key_env: str = option(
        "OPENAI_API_KEY", "The environment variable with the endpoint's API key; none is sent if it is not set."
    )
    concurrency: int = option(8, "Number of concurrent requests.")
    request: dict[str, Any] | str | None = option(
        None,
        "Further fields of each request, as JSON, such as '{\"top_p\": 0.9}'; null leaves a field out, as in "
        '\'{"max_tokens": null, "max_completion_tokens": 2048}\' for servers that want the other name.',
    )
    timeout: float = option(600.0, "Seconds after which a request without a reply fails.")
    retries: int = option(
        8,
        "How often a request is repeated after status 408, 409, 425, 429 or 5xx, a timeout or a lost connection, with "
        "increasing pauses, or the pause that the server asks for.",
    )
    price_in: float | None = option(None, "Price of a million prompt tokens; with price_out, the cost is computed.")
    price_out: float | None = option(None, "Price of a million completion tokens, reasoning included.")
    max_cost: float | None = option(
        None,
        "Stop before a request could raise the cost above this, keeping all replies. Assumes the longest reply and a "
        "token per byte of the prompt. Needs both prices.",
    )

    def __post_init__(self) -> None:
        check_options(
            self, max_new_tokens=1, batch_size=1, samples=1, shots=0, limit=1, concurrency=1, retries=0, price_in=0,
            price_out=0, max_cost=0,
        )  # fmt: skip
        self._check_endpoint()
        if self.rationales == "keep":
            if self.keywords == "none":
                raise ValueError("rationales: keep needs keywords=teacher, or there is nothing to ask for")
            self._refuse(
                "rationales=keep", "instruction", "hint", "keep_wrong", "samples", "temperature", "seed", "thinking"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: {self.samples} greedy replies are all the same; give a temperature above 0")
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"device: give either device or device_map, got {self.device!r} and {self.device_map!r}")
        if "{question}" not in self.hint or "{answer}" not in self.hint:
            raise ValueError(f"hint: expected a text with {{question}} and {{answer}}, got {self.hint!r}")

    def _check_endpoint(self) -> None:
        """Refuse options that have no effect with an endpoint, or without one, and values that no server takes."""
        if self.endpoint is None:
            names = ("api_key_env", "concurrency", "request", "timeout", "retries", "price_in", "price_out", "max_cost")
            self._refuse("a teacher that is loaded here; it needs endpoint", *names)
            return
        self._refuse("endpoint, whose server decides it", "dtype", "device", "device_map", "batch_size")
        url = urllib.parse.urlsplit(self.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query or url.fragment:
            raise ValueError(
                "endpoint: expected a base URL such as http://localhost:8000/v1, without user, password and query, got "
                f"{url._replace(netloc=url.netloc.rpartition('@')[2], query='', fragment='').geturl()!r}"
            )
        if self.timeout <= 0:
            raise ValueError(f"timeout: expected seconds above 0, got {self.timeout}")
        if isinstance(self.request, str):
            try:
                self.request = json.loads(self.request)
            except ValueError as error:
                raise ValueError(f"request: expected a JSON object, got {self.request!r}: {error}") from None
        fields = self.request or {}
        if not isinstance(fields, dict):
            raise ValueError(f"request: expected a JSON object, got {fields!r}")
        for name in ("model", "messages", "prompt", "n", "stream"):
            if name in fields:
                raise ValueError(f"request: {name}: is set by the command and cannot be changed")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in, price_out: expected both or neither, got one of them")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("max_cost: needs price_in and price_out")
        limit = fields.get("max_completion_tokens") or fields.get("max_tokens", self.max_new_tokens)
        if self.max_cost is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"max_cost: needs a longest reply in tokens; by request it is {limit!r}")

    def _refuse(self, reason: str, *names: str) -> None:
        """Refuse the options of these names that are set."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name}: {value!r} has no effect with {reason}")


@dataclasses.dataclass
class KeysConfig(DataOptions):
    """``molsaki keys``: write the words that matter most to a teacher as the key words of each text."""

    teacher: str | None = option(None, "Folder or hub name of the teacher: any causal language model.")
    data_file: str | None = option(None, f"File with id, question, rationale and answer: {DATA_FILES}.")
    output_file: str | None = option(
        None,
        "JSON lines file to write: the same records with key_spans, for --key given. An interrupted run is continued.",
    )
    by: Literal["attention", "gradient"] = option(
        "attention",
        "The score of a word: the attention it receives from the later steps of the rationale and from the answer "
        "(attention), or the norm of the gradient of the answer's cross-entropy in its embeddings (gradient, as in "
        "arXiv 2506.07851).",
    )
    top: int | None = option(None, "The number of key words of a text, those with the largest scores.")
    top_share: float | None = option(None, "Alternatively, the share of the text's words that are key words.")
    among: str = option("words", "The words that are scored: any value of --key of molsaki extract, such as numbers.")
    of: Literal["all", "question"] = option("all", "Words of the whole text, or of the question only.")
    number_words: bool = option(False, "among=numbers: numbers written out, such as twenty-five, too.")
    splitter: str = option("rules", "by=attention: how steps end, as in molsaki extract.")
    layers: list[int] = option([], "by=attention: the decoder layers to use, from 0. Default: all.")
    labels: Literal["answer", "reply"] = option(
        "answer", "by=gradient: the cross-entropy of the answer, or of rationale and answer (reply)."
    )
    cot_template: str = option(
        COT_TEMPLATE, "The text after the question, with {rationale} and then {answer}, once each."
    )
    teacher_template: str = option("plain", "The template of the texts: plain, chat or a format, as in extract.")
    teacher_max_length: int | None = option(None, "Longest text in tokens; the teacher's context if unset.")
    drop_wrong: bool = option(False, "Leave out examples whose rationale ends in an answer other than the gold one.")
    batch_tokens: int = option(2048, "Tokens per forward pass of the teacher, padding included.")
    dtype: Dtype = option("auto", "The teacher's floating-point type.")
    device_map: dict[str, Any] | str | None = option(
        None, "How the teacher is spread over devices, as in extract. Default: the first CUDA device, else the CPU."
    )
    quantize: Literal["none", "8bit", "4bit"] = option(
        "none", "Load the teacher's linear layers with 8 or 4 bits (needs bitsandbytes)."
    )
    limit: int | None = option(None, "Use only this many examples, the first ones.")

    def __post_init__(self) -> None:
        check_options(self, top=1, batch_tokens=1, teacher_max_length=1, limit=1)
        if (self.top is None) == (self.top_share is None):
            raise ValueError(f"top, top_share: expected one of them, got {self.top} and {self.top_share}")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise ValueError(f"top_share: expected a share above 0, at most 1, got {self.top_share}")
        try:
            selector_of(self.among)
        except (ValueError, TypeError) as error:
            raise type(error)("among" + str(error).removeprefix("key")) from None
        splitter_of(self.splitter)
        if self.number_words and self.among not in ("numbers", "random"):
            raise ValueError(f'number_words: needs among="numbers", got {self.among}')
        if self.by == "gradient" and self.layers:
            raise ValueError(f"layers: expected none with by=gradient, got {self.layers}")
        if self.by == "attention" and self.labels != "answer":
            raise ValueError(f"labels: {self.labels} needs by=gradient, got by=attention")
        before, _, after = self.cot_template.partition("{answer}")
        if before.count("{rationale}") != 1 or f"{before}{{answer}}{after}".count("{answer}") != 1:
            raise ValueError(
                "cot_template: expected a text with {rationale} and then {answer}, once each, got "
                f"{self.cot_template!r}"
            )


def check_options(config: Any, **least: float) -> None:
    """Refuse a value that is not among its field's choices or is below the ``least`` value given for it.

    The parser checks choices too, but not for configs that are built in Python.
    """
    hints = get_type_hints(type(config))
    if isinstance(config, TextOptions):
        selector_of(config.key)
        splitter_of(config.splitter)
        if config.max_key_words < 0:
            raise ValueError(f"max_key_words: expected at least 0, got {config.max_key_words}")
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name, None), hints[field.name]
        names = OR_YOUR_OWN.get(field.name)
        if names is not None and value not in (None, *names) and not is_named(value):
            raise ValueError(f"{field.name}: expected one of {', '.join(names)}, or module:name, got {value!r}")
        literals = [one for one in (hint, *get_args(hint)) if get_origin(one) is Literal]  # or None, if that is allowed
        choices = get_args(literals[0]) if literals else field.metadata.get("choices", ())
        is_checked = literals or field.default in choices
        if is_checked and value != field.default and value not in choices:
            raise ValueError(f"{field.name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
        if field.name in least and value is not None and value < least[field.name]:
            raise ValueError(f"{field.name}: expected at least {least[field.name]}, got {value}")


def require(config: Any, name: str) -> Any:
    """The value of a field of a config; an error with the field's help text if it is unset."""
    value = getattr(config, name)
    if not value:
        help_text = next(field.metadata["help"] for field in dataclasses.fields(config) if field.name == name)
        raise ValueError(f"--{name}: required. {help_text}")
    return value
