"""The demo model's vocabulary: the 256 bytes, and every word of the suite as one token.

Byte-level BPE as llama.cpp runs it (tokenizer "gpt2"). The merges spell each word from its space
on, letter by letter: a word's longest known beginning is one token, and any text can be said.
"""

import re

from csp_edge.eval.scenes import CELLS, COLORS, EMOJI, SHAPES
from csp_edge.eval.suite import PLURALS, STEPS

BOS, EOS, PAD, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"

_WORDS = [
    *"What Which Where How what which where how".split(),
    *"color is the in image shows written many are changed from to".split(),
    *"became appeared vanished moved".split(),
    *" ".join([*STEPS, *CELLS]).split(),
    *EMOJI,
    *SHAPES,
    *COLORS,
    *(PLURALS.get(kind, kind + "s") for kind in [*EMOJI, *SHAPES]),
    *(str(i) for i in range(10)),
    *(str(i) for i in range(10, 17)),  # images
    *(chr(c) for c in range(ord("A"), ord("Z") + 1)),
]


def _byte_chars() -> list[str]:
    """GPT-2's printable character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


BYTES = _byte_chars()
SPACE = BYTES[32]

TOKENS = list(BYTES)
MERGES: list[str] = []
for _word in dict.fromkeys(_WORDS):
    for _i in range(len(_word)):
        _left, _char = SPACE + _word[:_i], _word[_i]
        if _left + _char not in TOKENS:
            TOKENS.append(_left + _char)
            MERGES.append(f"{_left} {_char}")
SPECIAL = [BOS, EOS, PAD, USER, ASSISTANT]
TOKENS += SPECIAL
TOKENS += [f"<unused{i}>" for i in range(-len(TOKENS) % 256)]

IDS = {token: i for i, token in enumerate(TOKENS)}

_PIECES = re.compile(" ?[A-Za-z]+| ?[0-9]+| ?[^ A-Za-z0-9]+| +")


def encode(text: str) -> list[int]:
    """Tokens of ASCII text without special tokens."""
    ids = []
    for piece in _PIECES.findall(text):
        chars = "".join(BYTES[b] for b in piece.encode())
        while chars:
            n = next(n for n in range(len(chars), 0, -1) if chars[:n] in IDS)
            ids.append(IDS[chars[:n]])
            chars = chars[n:]
    return ids
