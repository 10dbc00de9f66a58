"""Small real tokenizers of every family, and the word problems that they are trained on."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


FORMAT = "Q: {question}\nA: {rationale}"


PAIRS = [
    (
        "A mailman is tasked with delivering 4 pieces of junk mail to each house in 16 blocks. How many in total?",
        "The mailman delivers 4 pieces to 16 blocks. Therefore, the total is 16 × 4 = 64.",
    ),
    ("Why 4?", "Why 4? 4."),  # the question again in the rationale
    ("7 is what?", "7"),
    ("Tom had $1,200.50 and 3/4 of ½ a pie.\nHow much?", "-5 + 10 = 5\n\n5% of 100 is “5”. Füße 你好 😀 12.\nSo 3.14"),
    ("How many", "4"),
    ("", "4 and 5. Then 9."),
    ("Is it 4?", ""),
]


CORPUS = [" ".join(pair) for pair in PAIRS] + [
    "How many apples are there? There are 12 apples. So the total is 16."
] * 3


def byte_level(split: str | None = None, bos: bool = False, vocabulary: int = 400) -> Tokenizer:
    core = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [pre_tokenizers.Split(Regex(split), "isolated"), byte] if split else [pre_tokenizers.Digits(True), byte]
    core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|bos|>"]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=sorted(byte.alphabet()), show_progress=False
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 2)]
        )
    return core


def word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    return core


def unigram() -> Tokenizer:
    """SentencePiece's Unigram: NFKC, a dummy prefix, byte fallback, an end token."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0)] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyzHTAQW0123456789.,?=:\n"]
    pieces += [(p, -4.0) for p in ["▁How", "▁many", "▁mail", "man", "▁the", "▁to", "tal", "▁4", "▁1", "6.", "▁is"]]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return core


def sentence_piece_bpe() -> Tokenizer:
    """Llama 2's BPE: a prepended space by normalizer, no pre-tokenizer, byte fallback."""
    words = ["▁t", "▁th", "▁the", "▁m", "▁ma", "▁mai", "▁mail", "▁H", "▁Ho", "▁How"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127)), *words]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "m"), ("▁m", "a"), ("▁ma", "i"), ("▁mai", "l"),
              ("▁", "H"), ("▁H", "o"), ("▁Ho", "w")]  # fmt: skip
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return core


def wrap(core: Tokenizer, **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


LLAMA3_SPLIT = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"


TOKENIZERS = {
    "gpt2": lambda: wrap(byte_level(), chat_template=CHATML),
    "bytes": lambda: wrap(byte_level(vocabulary=259), chat_template=CHATML),
    "llama3": lambda: wrap(
        byte_level(LLAMA3_SPLIT, bos=True), bos_token="<|bos|>", chat_template="{{ bos_token }}" + CHATML
    ),
    "bert": lambda: wrap(word_piece(), chat_template="User: {{ messages[0].content }} Bot: {{ messages[1].content }}"),
    "t5": lambda: wrap(unigram(), eos_token="</s>", chat_template=CHATML),
    "llama2": lambda: wrap(sentence_piece_bpe(), bos_token="<s>", eos_token="</s>", chat_template=LLAMA2),
}


@pytest.fixture(name="tokenizers", scope="module")
def all_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make() for name, make in TOKENIZERS.items()}


def by_pattern(pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the matches of a pattern and what lies between them."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return wrap(core)
