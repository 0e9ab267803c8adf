"""What transformers computes for a prompt with a picture, with the same weights and pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from models import Family
from transformers import Qwen2VLImageProcessor
from vocabulary import Vocabulary

QUESTION = "What is in the picture?"
_PICTURE = "<picture>"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # what LLaVA's converter writes
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Layout:
    """A picture in a prompt.

    size: of its sides, in pixels, at which nothing scales it.
    token: stands n_tokens times for it, between begin and end.
    inputs: the model's, of pixels uint8 [rows, columns, 3].
    """

    size: int
    token: str
    n_tokens: int
    inputs: Callable[[np.ndarray], dict[str, torch.Tensor]]
    begin: str | None = None
    end: str | None = None


def save_reference(
    layout: Layout, model: Any, family: Family, vocabulary: Vocabulary, path: Path
) -> None:
    """Write arrays of what it computes for a picture, a question, and an answer.

    pixels: uint8 [rows, columns, 3]. text: the tokens of the prompt but the picture's. answer:
    tokens. logits: float32 [answer's tokens, vocabulary], those before each of them.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (layout.size, layout.size, 3), dtype=np.uint8)
    content = [{"type": "text", "text": _PICTURE}, {"type": "text", "text": QUESTION}]
    prompt = jinja2.Template(family.template).render(
        messages=[{"role": "user", "content": content}],
        add_generation_prompt=True,
        bos_token=family.bos,
    )
    before, after = (vocabulary.encode(text) for text in prompt.split(_PICTURE))
    if family.vocabulary != "bytes" and before[0] != vocabulary.ids[family.bos]:
        before = [vocabulary.ids[family.bos], *before]
    if layout.begin and layout.end:
        before = [*before, vocabulary.ids[layout.begin]]
        after = [vocabulary.ids[layout.end], *after]
    answer = rng.integers(300, 320, 6).tolist()
    picture = [vocabulary.ids[layout.token]] * layout.n_tokens
    ids = torch.tensor([[*before, *picture, *after, *answer]])
    with torch.inference_mode():
        given = layout.inputs(pixels)
        if "token_type_ids" in given:
            given["token_type_ids"] = (ids == picture[0]).int()
        logits = model(input_ids=ids, **given).logits[0]
    np.savez(
        path,
        pixels=pixels,
        text=before + after,
        answer=answer,
        logits=logits[-len(answer) - 1 : -1].numpy(),
    )


def _clip(pixels: np.ndarray) -> dict[str, torch.Tensor]:
    return {"pixel_values": _scaled(pixels, _CLIP_MEAN, _CLIP_STD)}


def _half(pixels: np.ndarray) -> dict[str, torch.Tensor]:
    return {"pixel_values": _scaled(pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def _gemma(pixels: np.ndarray) -> dict[str, torch.Tensor]:
    return _half(pixels) | {"token_type_ids": torch.empty(0)}


def _scaled(
    pixels: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    scaled = (torch.tensor(pixels) / 255 - torch.tensor(mean)) / torch.tensor(std)
    return scaled.permute(2, 0, 1)[None]


def _qwen(pixels: np.ndarray) -> dict[str, torch.Tensor]:
    processor = Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return dict(processor(pixels, return_tensors="pt"))


_QWEN = Layout(128, "<|image_pad|>", 64, _qwen, "<|vision_start|>", "<|vision_end|>")
PICTURES = {
    "LLaVA-1.5": Layout(64, "<image>", 64, _clip),
    "Qwen2-VL": _QWEN,
    "Qwen2.5-VL": _QWEN,
    "Qwen3-VL": _QWEN,
    "InternVL": Layout(64, "<IMG_CONTEXT>", 16, _half, "<img>", "</img>"),
    "Gemma 3": Layout(64, "<image_soft_token>", 16, _gemma, "<start_of_image>", "<end_of_image>"),
    "GLM-4V": Layout(128, "<|image|>", 64, _qwen, "<|begin_of_image|>", "<|end_of_image|>"),
    "Janus-Pro": Layout(64, "<image_placeholder>", 64, _half),
}
