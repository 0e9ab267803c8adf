"""Small vocabularies of a family's kind: bytes, a few merges, and its own special tokens."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

PRE_TOKENIZER = "qwen2"  # llama.cpp's name for how byte_level() cuts words
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LINES = [
    "What is in the picture? A red star, a blue boat and two green fish.",
    "Which image shows the boat? The second image shows the boat and a fish.",
    "How many stars are in image 1, and what color is the largest of them?",
    "USER: ASSISTANT: user assistant system User: Assistant: <end_of_turn>",
    "",
    "0123456789 !?.,:;'\"()[]{}<>/|_-+*=#",
    *["So\n\n"] * 9,
]


@dataclass(frozen=True)
class Vocabulary:
    """ids: by token. encode: the tokens of a text with special tokens in it, none added."""

    ids: Mapping[str, int]
    encode: Callable[[str], list[int]]


def byte_level(
    directory: Path, special: Sequence[str], bos: str | None, eos: str, template: str
) -> Vocabulary:
    """Byte-level BPE, cut into words as Qwen's and many others, written as transformers does."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=256 + 64 + len(special),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return Vocabulary(fast.get_vocab(), lambda text: fast.encode(text, add_special_tokens=False))


def pieces(
    directory: Path, special: Sequence[str], bos: str, eos: str, template: str, *, prefix: bool
) -> Vocabulary:
    """SentencePiece's BPE, with bytes for what it doesn't know.

    Args:
        prefix: begin every text with a space.
    """
    SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=256 + 128 + len(special),
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=[token for token in special if token not in (bos, eos)],
        bos_piece=bos,
        eos_piece=eos,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    config = {"bos_token": bos, "eos_token": eos, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    processor = SentencePieceProcessor(str(directory / "tokenizer.model"))
    ids = {processor.id_to_piece(i): i for i in range(len(processor))}
    marks = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def encode(text: str) -> list[int]:
        tokens = []
        for part in filter(None, marks.split(text)):
            tokens += [ids[part]] if part in special else processor.encode(part)
        return tokens

    return Vocabulary(ids, encode)
