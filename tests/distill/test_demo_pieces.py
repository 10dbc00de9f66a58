"""The demo's scripts: shallower students, word problems, folders that are complete or absent."""

import copy
import json
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, Qwen2Config

from atomic import new_folder
from cut_student import keep_layers, spread

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
MLP = {"intermediate_size": 48, "num_hidden_layers": 6, "max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **MLP),
    "gemma": GemmaConfig(**SIZES, **MLP, head_dim=8),
    "qwen2": Qwen2Config(**SIZES, **MLP, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=6, n_head=4, n_positions=64),
}


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


@pytest.mark.parametrize("depth, layers", [(30, 10), (30, 2), (30, 3), (30, 29), (30, 30), (4, 3), (12, 6), (2, 2)])
def test_spread_is_ascending_and_keeps_both_ends(depth, layers):
    kept = spread(depth, layers)
    assert len(kept) == layers
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, depth - 1)


@pytest.mark.parametrize("layers", [1, 7])
def test_spread_refuses_a_depth_the_teacher_does_not_have(layers):
    with pytest.raises(ValueError, match="expected 2 to 6"):
        spread(6, layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_student_has_the_chosen_layers(name, tmp_path):
    kept = [0, 2, 5]
    teacher, student = model_of(name), keep_layers(model_of(name), kept)
    weights = dict(student.named_parameters())
    for key, weight in teacher.named_parameters():
        layer = re.search(r"\.(\d+)\.", key)
        if layer is None:
            torch.testing.assert_close(weights.pop(key), weight, rtol=0, atol=0)
        elif int(layer[1]) in kept:
            new = f".{kept.index(int(layer[1]))}."
            torch.testing.assert_close(weights.pop(key.replace(layer[0], new)), weight, rtol=0, atol=0)
    assert not weights
    assert student.config.num_hidden_layers == 3
    if getattr(teacher.config, "layer_types", None):
        assert student.config.layer_types == [teacher.config.layer_types[i] for i in kept]

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(16).reshape(2, 8)
    torch.testing.assert_close(again(ids).logits, student(ids).logits)
    # with the cache, whose entries are counted by each layer's own index
    cached = student.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    uncached = student.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert cached.tolist() == uncached.tolist()


def make_data(monkeypatch, out, *options):
    module = pytest.importorskip("make_data", reason="needs reasoning-gym", exc_type=ImportError)
    monkeypatch.setattr(sys, "argv", ["make_data.py", str(out), *map(str, options)])
    module.main()
    return [[json.loads(line) for line in (out / f"{split}.jsonl").open()] for split in ("train", "test")]


def test_problems_are_right_short_and_each_there_once(monkeypatch, tmp_path):
    train, test = make_data(monkeypatch, tmp_path / "data", "--train", 40, "--test", 10, "--max-chars", 300)
    assert (len(train), len(test)) == (40, 10)
    assert len({record["question"] for record in train + test}) == 50
    assert len({record["id"] for record in train + test}) == 50
    for record in train + test:
        assert list(record) == ["id", "question", "rationale", "answer"]
        assert len(record["question"]) + len(record["rationale"]) <= 300
        assert float(re.findall(r"\d+(?:\.\d+)?", record["rationale"])[-1]) == float(record["answer"])
        assert "####" not in record["rationale"]
        assert "final answer" not in record["question"]


def test_the_same_seed_gives_the_same_problems(monkeypatch, tmp_path):
    first, again, other = (
        make_data(monkeypatch, tmp_path / name, "--train", 8, "--test", 4, "--seed", seed)
        for name, seed in (("first", 0), ("again", 0), ("other", 5))
    )
    assert first == again
    assert first != other


def test_data_that_is_there_is_left_alone(monkeypatch, tmp_path, capsys):
    first = make_data(monkeypatch, tmp_path / "data", "--train", 4, "--test", 2)
    assert make_data(monkeypatch, tmp_path / "data", "--train", 9, "--test", 9) == first
    assert "exists already" in capsys.readouterr().out


def test_new_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "deep").rglob("*")] == ["new", "file"]
