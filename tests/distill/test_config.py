from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from molsaki import presets
from molsaki.config import AnnotateConfig, EvaluateConfig, ExtractConfig, PlotConfig, require
from molsaki.flags import parse
from molsaki.method.objectives import OBJECTIVES
from molsaki.training.config import DistillConfig

CONFIGS = [AnnotateConfig, DistillConfig, EvaluateConfig, ExtractConfig, PlotConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_has_a_help_text(config_class):
    assert [f.name for f in dataclasses.fields(config_class) if f.init and not f.metadata.get("help")] == []


def test_flags_override_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "alpha: 0.2\nbeta: 3\nlearning_rate: 1e-4\nresume: true\nlora_targets: [q_proj, v_proj]\neval_file: null\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nuse_cpu: true\n"
        "predict_template: '{question} = {answer}'\n"
    )
    config = parse(DistillConfig, ["--config", str(path), "--alpha", "0.4", "--output_dir", str(tmp_path / "o")])
    assert (config.alpha, config.beta, config.learning_rate, config.resume) == (0.4, 3.0, 1e-4, True)
    assert config.lora_targets == ["q_proj", "v_proj"]
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert config.eval_file == []
    assert config.predict_template == "{question} = {answer}"


def test_defaults():
    config = DistillConfig(use_cpu=True)
    assert (config.objective, config.mixture, config.alpha, config.beta) == (None, "mixture", 0.5, 1.0)
    assert (config.tau_t, config.tau_s, config.report_to) == (0.1, 0.5, [])
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}
    other = DistillConfig(use_cpu=True)
    assert other.gradient_checkpointing_kwargs is not config.gradient_checkpointing_kwargs


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("alfa: 0.2\n", "c.yaml: alfa: no such key; did you mean alpha?"),
        ("alpha: many\n", "c.yaml: --alpha: invalid float value: 'many'"),
        ("objective: best\n", "objective: expected one of vanilla, cot, dss, mmi, logits, molsaki, or module:name"),
        ("- alpha\n", "expected `name: value` lines, got list"),
        ("alpha: [1\n", "c.yaml: not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, lines, message):
    path = tmp_path / "c.yaml"
    path.write_text(lines)
    with pytest.raises(ValueError) as error:
        parse(DistillConfig, ["--config", str(path)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate: no such flag; did you mean --learning_rate?"),
        (["--alpha", "3"], "alpha: expected a number from 0 to 1, got 3.0"),
        (["--temperature", "0"], "temperature: expected a positive number"),
        (["--mixture", "all"], "mixture: expected one of mixture, matched, single, last, uniform, one_to_one, reverse"),
        (["--key", "digits"], "key: expected one of numbers, keywords, random, words, given, regex:PATTERN or module"),
        (["--key", "regex:("], "key: 'regex:(' is not a regular expression: missing )"),
        (["--splitter", "words:0"], "splitter: expected words:N with N of at least 1, got 'words:0'"),
        (["--splitter", "nowhere:f"], "splitter: expected module:name that can be imported, got 'nowhere:f'"),
        (["--key_of", "answer"], "invalid choice: 'answer'"),
        (["--max_key_words", "-1"], "max_key_words: expected at least 0, got -1"),
        (["stray"], "stray: no such flag"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(ValueError) as error:
        parse(DistillConfig, argv)
    assert message in str(error.value)


def test_python_callers_get_the_same_checks():
    with pytest.raises(
        ValueError, match=f"objective: expected one of {', '.join(OBJECTIVES)}, or module:name, got 'sft'"
    ):
        DistillConfig(objective="sft", use_cpu=True)
    with pytest.raises(ValueError, match="mode: expected one of answer, rationale"):
        EvaluateConfig(mode="both")
    with pytest.raises(ValueError, match="key: expected one of numbers, keywords, random, .* got 'digits'"):
        ExtractConfig(key="digits")
    with pytest.raises(ValueError, match="key_occurrence: expected one of all, first, last, got 'second'"):
        ExtractConfig(key_occurrence="second")


def test_missing_file_and_required_fields(tmp_path):
    with pytest.raises(FileNotFoundError):
        parse(EvaluateConfig, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match="--data_file: required"):
        require(EvaluateConfig(model="m"), "data_file")
    assert require(EvaluateConfig(model="m"), "model") == "m"


def test_the_objective_follows_from_the_teacher(caplog):
    assert DistillConfig(use_cpu=True, store="maps").objective == "molsaki"
    assert DistillConfig(use_cpu=True, teacher="t", attention_share=0.1).objective == "molsaki"
    assert DistillConfig(use_cpu=True, teacher="t", objective="dss").objective == "dss"
    assert DistillConfig(use_cpu=True).choose_objective(has_teacher=True) == "molsaki"
    config = DistillConfig(use_cpu=True)
    assert not caplog.records and config.choose_objective(has_teacher=False) == config.objective == "dss"
    assert "objective: dss, answer and rationale alone, since there is no teacher and no store" in caplog.text
    for options in ({"mixture": "uniform"}, {"beta": 2.0}, {"attention_share": 0.1}, {"teacher_layers": [1]}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: an option of the attention loss, which needs a"):
            DistillConfig(use_cpu=True, **options).choose_objective(has_teacher=False)


def test_presets(tmp_path):
    """A preset is below the YAML file, which is below the flags, and gives a config only the options that it has."""
    flags = ["--preset", "paper", "--output_dir", str(tmp_path)]
    paper = parse(DistillConfig, [*flags, "--beta", "7"])
    assert (paper.splitter, paper.pooling, paper.normalise, paper.beta) == ("periods", "sum", "softmax", 7)
    (tmp_path / "c.yaml").write_text("preset: paper\nsplitter: rules\ntau_t: 0.5\n")
    mixed = parse(DistillConfig, ["--config", str(tmp_path / "c.yaml"), "--tau_t", "0.7", "--output_dir", "x"])
    assert (mixed.splitter, mixed.tau_t, mixed.pooling) == ("rules", 0.7, "sum")
    assert parse(ExtractConfig, ["--preset", "paper"]).splitter == "periods"
    for name in presets.PRESETS:
        built = DistillConfig(output_dir=str(tmp_path), use_cpu=True, **presets.options(name, DistillConfig))
        given = parse(DistillConfig, ["--preset", name, "--output_dir", str(tmp_path), "--use_cpu", "true"])
        for option, value in presets.PRESETS[name].items():
            assert getattr(built, option) == getattr(given, option) == value
    advised = parse(DistillConfig, ["--preset", "recommended", "--teacher", "t", "--output_dir", str(tmp_path)])
    assert advised.objective == "dss"
    with pytest.raises(ValueError, match="invalid choice: 'best'"):
        parse(DistillConfig, ["--preset", "best"])
    with pytest.raises(ValueError, match="preset: expected one of paper"):
        presets.options("best", DistillConfig)


def test_a_tracker_that_is_not_installed_or_unknown(tmp_path):
    assert importlib.util.find_spec("wandb") is None
    with pytest.raises(ValueError, match=r"^report_to: .*wandb.* install"):
        DistillConfig(output_dir=str(tmp_path), report_to="wandb")
    with pytest.raises(ValueError, match="^report_to: .*nonesuch"):
        DistillConfig(output_dir=str(tmp_path), report_to="nonesuch")
    assert DistillConfig(output_dir=str(tmp_path), report_to="tensorboard").report_to == ["tensorboard"]
