"""Drawn scenes: emoji, coloured shapes and short signs on a grid of three by three cells."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EMOJI = (
    "cat dog fish frog pig bee tree tulip "
    "apple banana lemon carrot pizza cake car bus "
    "bike boat plane rocket house clock key lock "
    "bell book umbrella hat crown guitar camera ball"
).split()
SHAPES = "circle square triangle star ring diamond heart cross".split()
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 225),
    "yellow": (240, 205, 40),
    "purple": (145, 50, 195),
    "orange": (248, 135, 25),
    "brown": (120, 75, 40),
    "pink": (250, 130, 190),
}
CELLS = (
    "top left,top,top right,left,center,right,bottom left,bottom,bottom right".split(",")
)  # fmt: skip

VENDORS = ("noto", "twemoji", "emojione")
VENDOR_HELD_OUT = "fluent"

N_PIXELS = 96  # side of a picture
N_PIXELS_CELL = N_PIXELS // 3
N_PIXELS_CHAR = N_PIXELS // 4
N_PIXELS_DRAWING = 64  # side of a drawing as stored
SIGN_MAX = 4  # characters

Rng: TypeAlias = np.random.Generator


@dataclass(frozen=True, slots=True)
class Thing:
    """An emoji, or a shape and its color."""

    kind: str
    color: str | None = None

    def __str__(self) -> str:
        return f"{self.color} {self.kind}" if self.color else self.kind


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: things by cell (0 to 8, row by row), and a sign: its row and text."""

    things: dict[int, Thing]
    sign: tuple[int, str] | None = None

    def find(self, kind: str) -> list[int]:
        """The cells of all things of a kind."""
        return [cell for cell, thing in self.things.items() if thing.kind == kind]


def draw(scene: Scene, seed: Sequence[int] | Rng, vendor: str) -> Image.Image:
    """The picture of a scene, RGB, N_PIXELS a side: sizes and places within the cells vary."""
    rng = np.random.default_rng(seed)
    tint = np.clip(rng.uniform(205, 250) + rng.normal(0, 8, 3), 0, 255).astype(int)
    picture = Image.new("RGB", (N_PIXELS, N_PIXELS), tuple(tint.tolist()))
    for cell, thing in scene.things.items():
        drawing = _drawing(vendor, thing, int(rng.integers(24, 31)))
        slack = N_PIXELS_CELL - drawing.width
        x, y = (int(v) for v in rng.integers(0, slack + 1, 2))
        corner = cell % 3 * N_PIXELS_CELL + x, cell // 3 * N_PIXELS_CELL + y
        picture.paste(drawing, corner, drawing)
    if scene.sign:
        row, text = scene.sign
        _write(picture, row, text, rng)
    return picture


def _write(picture: Image.Image, row: int, text: str, rng: Rng) -> None:
    ink = tuple(rng.integers(0, 70, 3).tolist())
    size = int(rng.integers(25, 29))
    y = int(row * N_PIXELS_CELL + N_PIXELS_CELL / 2 + rng.integers(-1, 2))
    for i, char in enumerate(text):
        x = int((i + 0.5) * N_PIXELS_CHAR + rng.integers(-1, 2))
        ImageDraw.Draw(picture).text((x, y), char, fill=ink, font=_font(size), anchor="mm")


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@functools.cache
def _drawing(vendor: str, thing: Thing, size: int) -> Image.Image:
    """RGBA, `size` pixels a side."""
    if thing.color:
        drawing = _shape(thing.kind, COLORS[thing.color])
    else:
        i = EMOJI.index(thing.kind)
        x, y = i % 8 * N_PIXELS_DRAWING, i // 8 * N_PIXELS_DRAWING
        drawing = _sheet(vendor).crop((x, y, x + N_PIXELS_DRAWING, y + N_PIXELS_DRAWING))
    return drawing.resize((size, size), Image.Resampling.LANCZOS)


@functools.cache
def _sheet(vendor: str) -> Image.Image:
    with (files("csp_edge.eval") / "drawings" / f"{vendor}.png").open("rb") as file:
        return Image.open(file).convert("RGBA")


def _shape(kind: str, color: tuple[int, int, int]) -> Image.Image:
    side = 4 * N_PIXELS_DRAWING
    image = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(image)
    low, high, middle = 0.06 * side, 0.94 * side, side / 2
    box = (low, low, high, high)
    match kind:
        case "circle":
            pen.ellipse(box, fill=color)
        case "square":
            pen.rectangle(box, fill=color)
        case "triangle":
            pen.polygon([(middle, low), (high, high), (low, high)], fill=color)
        case "star":
            radii = (0.46 * side, 0.19 * side)
            angles = [math.pi * i / 5 for i in range(10)]
            pen.polygon(
                [
                    (
                        middle + radii[i % 2] * math.sin(angle),
                        middle - radii[i % 2] * math.cos(angle),
                    )
                    for i, angle in enumerate(angles)
                ],
                fill=color,
            )
        case "ring":
            pen.ellipse(box, outline=color, width=side // 6)
        case "diamond":
            pen.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], fill=color)
        case "heart":
            pen.ellipse((low, low, 0.54 * side, 0.56 * side), fill=color)
            pen.ellipse((0.46 * side, low, high, 0.56 * side), fill=color)
            pen.polygon(
                [(0.1 * side, 0.44 * side), (0.9 * side, 0.44 * side), (middle, high)], fill=color
            )
        case "cross":
            pen.rectangle((0.37 * side, low, 0.63 * side, high), fill=color)
            pen.rectangle((low, 0.37 * side, high, 0.63 * side), fill=color)
    return image
