"""A picture of what a pruned cache kept of each picture."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

TILE = 240  # pixels, the longer side of each picture
GAP = 12
MARGIN = 24
CAPTION = 26
TITLE = 44
MIN_BORDERED = 12  # pixels of a patch
LEGEND = 44

PAPER = (250, 250, 248)
INK = (40, 40, 44)
FAINT = (120, 120, 126)
EVICTED = (26, 28, 36)
KEPT = (255, 176, 0)


def kept_picture(
    pictures: Sequence[npt.NDArray[np.uint8]],
    kept: Sequence[npt.NDArray[np.floating]],
    *,
    title: str = "What the pruned cache kept",
) -> Image.Image:
    """Each picture beside itself with its evicted patches darkened.

    Args:
        pictures: uint8 [height, width, 3] each, RGB.
        kept: float [rows, cols] each, in [0, 1]: the share of all (layer, KV head) pairs whose
            cache still holds the patch.
        title: the line on top.

    Returns:
        An RGB image.

    Raises:
        ValueError: there are no pictures, not as many of both, or an array is not as above.
    """
    _check(pictures, kept)
    tiles = [_fit(picture) for picture in pictures]
    width = max(tile.width for tile in tiles)
    height = max(tile.height for tile in tiles)
    n_cols = min(2, len(tiles))
    n_rows = math.ceil(len(tiles) / n_cols)
    cell_width = 2 * width + GAP + MARGIN
    cell_height = height + CAPTION + MARGIN

    page = Image.new(
        "RGB",
        (
            MARGIN + max(n_cols * cell_width, 2 * TILE + GAP + MARGIN),
            MARGIN + TITLE + n_rows * cell_height + LEGEND,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(size=20))
    for i, (tile, shares) in enumerate(zip(tiles, kept, strict=True)):
        x = MARGIN + i % n_cols * cell_width
        y = MARGIN + TITLE + i // n_cols * cell_height
        page.paste(tile, (x, y))
        page.paste(_darken(tile, shares), (x + width + GAP, y))
        caption = f"image {i + 1}"
        percent = f"{100 * float(np.mean(shares)):.0f} % of patches"
        font = ImageFont.load_default(size=14)
        draw.text((x, y + height + 6), caption, FAINT, font)
        draw.text((x + width + GAP, y + height + 6), f"{caption} \u00b7 {percent}", INK, font)
    _legend(page, MARGIN, page.height - LEGEND)
    return page


def _check(
    pictures: Sequence[npt.NDArray[np.uint8]], kept: Sequence[npt.NDArray[np.floating]]
) -> None:
    if not pictures or len(pictures) != len(kept):
        raise ValueError(f"{len(pictures)} pictures and {len(kept)} maps of what was kept")
    for i, (picture, shares) in enumerate(zip(pictures, kept, strict=True)):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"pictures[{i}] is {picture.dtype} of shape {picture.shape}")
        if shares.ndim != 2 or not shares.size or not picture.size:
            raise ValueError(f"kept[{i}] is of shape {shares.shape}, not [rows, cols]")
        if not (shares.min() >= 0 and shares.max() <= 1):
            raise ValueError(f"kept[{i}] is from {shares.min()} to {shares.max()}, not in [0, 1]")


def _fit(picture: npt.NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(picture)
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # the pixels of small pictures are worth seeing
    return image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def _darken(tile: Image.Image, shares: npt.NDArray[np.floating]) -> Image.Image:
    rows, cols = shares.shape
    y = np.arange(tile.height) * rows // tile.height
    x = np.arange(tile.width) * cols // tile.width
    share = shares[y][:, x, None]
    # an evicted patch can still be made out, in grey
    grey = np.asarray(tile.convert("L"), np.float64)[:, :, None]
    evicted = 0.82 * np.array(EVICTED) + 0.18 * grey
    pixels = share * np.asarray(tile) + (1 - share) * evicted
    image = Image.fromarray(np.rint(pixels).astype(np.uint8))

    if min(tile.width // cols, tile.height // rows) >= MIN_BORDERED:
        draw = ImageDraw.Draw(image)
        lefts = [-(-tile.width * c // cols) for c in range(cols + 1)]
        tops = [-(-tile.height * r // rows) for r in range(rows + 1)]
        for r, c in np.ndindex(rows, cols):
            box = (lefts[c], tops[r], lefts[c + 1] - 1, tops[r + 1] - 1)
            draw.rectangle(box, outline=_colour(float(shares[r, c])))
    return image


def _colour(share: float) -> tuple[int, ...]:
    return tuple(
        round((1 - share) * dark + share * bright)
        for dark, bright in zip((58, 61, 72), KEPT, strict=True)
    )


def _legend(page: Image.Image, x: int, y: int) -> None:
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=14)
    texts = ("evicted in every head", "kept in every head")
    draw.text((x, y), texts[0], FAINT, font)
    x += math.ceil(font.getlength(texts[0])) + GAP
    for i in range(100):
        draw.line((x + i, y + 3, x + i, y + 15), _colour(i / 99))
    draw.text((x + 100 + GAP, y), texts[1], FAINT, font)
