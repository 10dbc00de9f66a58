"""The help of the commands: options in groups, in the order in which a user needs them, and examples.

`molsaki.command_parser` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

DRY_RUN = "Load, count, and measure one or two batches; print what the command would do without doing it."
LOG_FORMAT = (
    "Logs and results as text, or as JSON: one object per line on standard error, the result on standard output."
)
CONFIG = "YAML file that sets these options by name; options given as flags override it."
PRESET = (
    "paper: every option of the method as in arXiv 2604.15701; recommended: objective dss, since no form of the "
    "attention loss was clearly better in docs/evidence.md. Explicit options override it."
)
HELP_ALL = "Show this help with the options of transformers' TrainingArguments too, all of which the command takes."
OTHERS = "more options"

_TEXTS = ("key", "key_of", "key_occurrence", "max_key_words", "number_words", "splitter")
_MIXTURE = (
    "mixture", "map_heads", "tau_t", "tau_s", "teacher_scale", "router", "value_heads", "pooling", "teacher_layer",
    "student_layer", "teacher_layers", "mixture_seed",
)  # fmt: skip
_LENGTHS = ("teacher_template", "student_template", "teacher_max_length", "max_length", "too_long", "drop_wrong")

# The inherited options of distill that almost every run sets: name -> (help, default of TrainingArguments).
TRAINING = {
    "num_train_epochs": ("Number of passes over the training data.", 3.0),
    "max_steps": ("Number of optimizer steps; overrides num_train_epochs. -1: not set.", -1),
    "per_device_train_batch_size": ("Examples per forward and backward pass in each process.", 8),
    "gradient_accumulation_steps": ("Passes per optimizer step, for batches that do not fit in memory.", 1),
    "learning_rate": ("The largest learning rate.", 5e-5),
    "lr_scheduler_type": ("How the learning rate decreases: linear, cosine, constant, ...", "linear"),
    "warmup_steps": ("Steps of learning-rate warmup; below 1, a fraction of all steps.", 0),
    "bf16": ("Mixed precision: bfloat16 in matrix products. Several times faster on hardware that supports it.", False),
    "gradient_checkpointing": ("Recompute activations in the backward pass: less memory, more time.", False),
    "eval_strategy": ("When the losses of eval_file are computed: no, steps or epoch.", "no"),
    "eval_steps": ("eval_strategy=steps: number of steps between evaluations. Default: logging_steps.", None),
    "save_steps": ("Number of steps between checkpoints.", 500),
    "save_total_limit": ("Keep only this many of the latest checkpoints. Default: all.", None),
    "load_best_model_at_end": ("Export the checkpoint with the best evaluation instead of the last one.", False),
    "seed": ("Seed of all randomness in the training.", 42),
}


class Help(NamedTuple):
    """The parts of a command's help besides the texts of its options.

    Attributes:
        usage: after the name of the command.
        about: what the command does.
        groups: titles and the names of the options below them; those in no group are shown last.
        examples: what each does, and the command.
        dry_run: whether it has --dry_run.
    """

    usage: str
    about: str
    groups: Mapping[str, Sequence[str]]
    examples: Sequence[tuple[str, str]]
    dry_run: bool = False


HELP = {
    "annotate": Help(
        "--teacher MODEL --data_file FILE --output_file FILE [options]",
        "A teacher writes rationales, and those that end in the right answer are kept. If its answer is wrong, it is "
        "asked again with the right answer as a hint. The same command continues an interrupted run.",
        {
            "required": ("teacher", "data_file", "output_file"),
            "the prompt": ("template", "examples", "shots", "instruction", "hint"),
            "what is written": ("rationales", "keywords", "thinking", "keep_wrong"),
            "decoding": ("max_new_tokens", "samples", "temperature", "seed"),
            "a teacher behind an endpoint": (
                "endpoint", "api_key_env", "concurrency", "request", "timeout", "retries", "price_in", "price_out",
                "max_cost",
            ),  # fmt: skip
            "a teacher on this machine": ("batch_size", "dtype", "device", "device_map"),
            "the data": ("data_format", "limit"),
        },
        [
            ("A model on this machine", "molsaki annotate --teacher Qwen/Qwen3-4B --template chat --data_file "
             "questions.jsonl --output_file train.jsonl"),
            ("A model behind an endpoint, with a limit on the cost; first see how many requests it needs",
             "molsaki annotate --teacher gpt-x --template chat --endpoint https://api.example.com/v1 --price_in 0.4 "
             "--price_out 1.6 --max_cost 20 --data_file questions.csv --output_file train.jsonl --dry_run"),
            ("Ask only for the key words of rationales that exist", "molsaki annotate --rationales keep --keywords "
             "teacher --teacher Qwen/Qwen3-4B --data_file train.jsonl --output_file train.keywords.jsonl"),
        ],
        dry_run=True,
    ),
    "keys": Help(
        "--teacher MODEL --data_file FILE --output_file FILE (--top N | --top_share X) [options]",
        "Choose the words of each text that matter most to a teacher, and write them into the records, where --key "
        "given reads them. The same command continues an interrupted run.",
        {
            "required": ("teacher", "data_file", "output_file"),
            "how many (one of them is required)": ("top", "top_share"),
            "the score of a word": ("by", "among", "of", "number_words", "layers", "labels", "splitter"),
            "the texts": ("cot_template", "teacher_template", "teacher_max_length", "drop_wrong"),
            "speed and memory": ("batch_tokens", "dtype", "device_map", "quantize"),
            "the data": ("data_format", "limit"),
        },
        [
            ("The eight words with most attention", "molsaki keys --teacher Qwen/Qwen3-4B --top 8 --data_file "
             "train.jsonl --output_file train.keys.jsonl"),
            ("A fifth of the numbers, by the gradient of the answer", "molsaki keys --teacher Qwen/Qwen3-4B --by "
             "gradient --among numbers --top_share 0.2 --data_file train.jsonl --output_file train.keys.jsonl"),
        ],
        dry_run=True,
    ),
    "extract": Help(
        "--teacher MODEL --data_files FILE... --store FOLDER [options]",
        "Run the white-box teacher once over a data set and store its maps, steps x key words, from which `molsaki "
        "distill --store` trains students without the teacher. The same command continues an interrupted run.",
        {
            "required": ("teacher", "data_files", "store"),
            "key words and steps (the same as in distill)": _TEXTS,
            "the texts (the same as in distill)": _LENGTHS,
            "which maps are stored": ("all_layers", "student", *_MIXTURE),
            "speed and memory": ("batch_tokens", "packing", "dtype", "device_map", "quantize", "shard_size"),
            "the data": ("data_format", "limit"),
        },
        [
            ("The maps of numbers, mixed over layers as in the paper", "molsaki extract --teacher Qwen/Qwen3-4B "
             "--data_files train.jsonl --store maps"),
            ("Every layer's maps, for any mixture; first see how large the store becomes", "molsaki extract --teacher "
             "Qwen/Qwen3-4B --data_files train.jsonl eval.jsonl --store maps --all_layers --dry_run"),
            ("Four processes on four GPUs share the work", "torchrun --nproc_per_node 4 -m molsaki.cli extract "
             "--teacher Qwen/Qwen3-32B --dtype bfloat16 --data_files train.jsonl --store maps"),
        ],
        dry_run=True,
    ),
    "distill": Help(
        "--student MODEL --train_file FILE... --output_dir FOLDER [--teacher MODEL | --store FOLDER] [options]",
        "Train a student on answers, rationales and the teacher's attention to key words, step by step. Ctrl-C saves a "
        "checkpoint at the end of the step, and --resume continues from the last one. Besides the options below the "
        "command takes all of transformers' TrainingArguments: --help_all.",
        {
            "required": ("student", "train_file", "output_dir"),
            "the teacher (one of them, or none)": ("teacher", "store"),
            "the most used options of TrainingArguments": tuple(TRAINING),
            "the loss": (
                "objective", "alpha", "beta", "beta_until", "attention_share", "share_steps", "normalise",
                "causal_words", "map_steps", "teacher_temperature", "control", "beta_mmi", "beta_logits", "temperature",
            ),  # fmt: skip
            "key words and steps": _TEXTS,
            "which layers teach which": _MIXTURE,
            "the texts": (*_LENGTHS, "predict_template", "cot_template"),
            "evaluation during the training": ("eval_file", "eval_accuracy", "eval_accuracy_mode"),
            "which parameters are trained": (
                "freeze", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "router_learning_rate",
            ),  # fmt: skip
            "speed and memory": (
                "student_dtype", "teacher_dtype", "packing", "share_question", "fused_cross_entropy", "streaming",
            ),  # fmt: skip
            "the run": ("resume", "logging_steps", "report_to"),
            "the data": ("data_format", "limit"),
            "options that rarely change": (
                "remove_unused_columns", "ddp_find_unused_parameters", "gradient_checkpointing_kwargs",
            ),  # fmt: skip
        },
        [
            ("From stored maps", "molsaki distill --student HuggingFaceTB/SmolLM2-135M --store maps --train_file "
             "train.jsonl --output_dir run"),
            ("With a live teacher; first see how long it takes", "molsaki distill --student student --teacher "
             "Qwen/Qwen3-4B --train_file train.jsonl --output_dir run --bf16 --dry_run"),
            ("Continue an interrupted run", "molsaki distill --config distill.yaml --output_dir run --resume"),
            ("Two processes", "torchrun --nproc_per_node 2 -m molsaki.cli distill --config distill.yaml"),
        ],
        dry_run=True,
    ),
    "evaluate": Help(
        "--model MODEL --data_file FILE --output_dir FOLDER [options]",
        "Ask a model every question, decode greedily, compare the answers exactly, and write every prediction.",
        {
            "required, unless --predictions is given": ("model", "data_file", "output_dir"),
            "what is asked": ("mode", "predict_template", "template", "thinking", "max_new_tokens"),
            "comparison": ("compare", "predictions"),
            "speed and memory": ("batch_size", "dtype", "device"),
            "the data": ("data_format", "limit"),
        },
        [
            ("Rationales that end in the answer", "molsaki evaluate --model run --mode rationale --data_file "
             "test.jsonl --output_dir results/run"),
            ("Compared with another model on the same questions", "molsaki evaluate --model run --data_file "
             "test.jsonl --output_dir results/run --compare results/before"),
            ("Two methods with three seeds each, from the output of evaluate", "molsaki evaluate --predictions "
             "results/a1 results/a2 results/a3 --compare results/b1 results/b2 results/b3 --output_dir results/a-b"),
        ],
        dry_run=True,
    ),
    "plot": Help(
        "[--run FOLDER] [--data_file FILE] [--teacher MODEL | --store FOLDER] [options]",
        "Draw the losses and layer weights of a run, and the maps of texts.",
        {
            "what is drawn (a run, maps, or both)": ("run", "data_file", "teacher", "store", "student"),
            "which texts": ("examples", "ids"),
            "the pictures": ("output_dir", "format"),
            "key words and steps (of the run, if one is given)": _TEXTS,
            "which layers teach which (of the run, if one is given)": _MIXTURE,
            "the texts": (*_LENGTHS, "data_format"),
        },
        [
            ("Curves and layer weights of a run", "molsaki plot --run run"),
            ("Maps of teacher and student side by side", "molsaki plot --run run --teacher Qwen/Qwen3-4B --student run "
             "--data_file test.jsonl --examples 5 --output_dir pictures"),
            ("Stored maps, as SVG", "molsaki plot --store maps --data_file train.jsonl --ids p3 p7 --format svg "
             "--output_dir pictures"),
        ],
    ),
    "report": Help(
        "RUN [options]",
        "Write one HTML file about a run of molsaki distill: curves, layer weights, maps of teacher and student, "
        "predictions, configuration. It needs no network.",
        {
            "required": ("run",),
            "maps of teacher and student": ("teacher", "store", "student", "data_file", "examples", "ids"),
            "predictions": ("predictions",),
            "the page": ("output_file",),
            "the texts": ("data_format",),
        },
        [
            ("Everything that the run recorded", "molsaki report run"),
            ("With the predictions of molsaki evaluate, next to those before training",
             "molsaki report run --predictions after before --teacher Qwen/Qwen3-4B --data_file test.jsonl"),
        ],
    ),
    "study": Help(
        "FILE [options]",
        "Train and evaluate a grid of methods, seeds and data sets that a YAML file describes, and compare them: see "
        "docs/study.md. The same command continues an interrupted study; finished runs are never repeated.",
        {},
        [
            ("See the runs and what is left", "molsaki study study.yaml --dry_run"),
            ("All runs, in four processes", "molsaki study study.yaml --processes 4"),
            ("The tables and pictures of the finished runs", "molsaki study study.yaml --report"),
        ],
        dry_run=True,
    ),
    "store": Help(
        "{verify,info,head} FOLDER [options]",
        "Look at a store of maps that `molsaki extract` wrote.",
        {},
        [
            ("Check every file; exit code 1 if one is damaged", "molsaki store verify maps"),
            ("How it was made, and how large it is", "molsaki store info maps"),
            ("Its first ten examples", "molsaki store head maps -n 10"),
        ],
    ),
    "doctor": Help(
        "[options]",
        "Report what this machine can run, what is missing and how to fix it; run every ready engine once and compare "
        "it with eager attention. Exit code 1 if something required is broken.",
        {},
        [("A report to read", "molsaki doctor"), ("A report to attach to an issue", "molsaki doctor --json")],
    ),
    "completion": Help(
        "{bash,zsh,fish}",
        "Print a script that completes commands, flags, choices and files in a shell. Needs the package shtab "
        '(pip install "molsaki-kernels[completion]").',
        {},
        [
            ("Bash, for this user", "molsaki completion bash > ~/.local/share/bash-completion/completions/molsaki"),
            ("Zsh, in a folder of $fpath", "molsaki completion zsh > ~/.zfunc/_molsaki"),
            ("Fish", "molsaki completion fish > ~/.config/fish/completions/molsaki.fish"),
        ],
    ),
}  # fmt: skip
