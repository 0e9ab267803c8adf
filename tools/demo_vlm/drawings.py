"""Collect the emoji drawings of csp_edge/eval/drawings from their vendors' npm packages.

    python tools/demo_vlm/drawings.py     (needs npm, and resvg_py for the vendor that ships SVG)

One PNG a vendor: 8 x 4 drawings of 64 x 64 pixels with alpha, in the order of `EMOJI`.
"""

import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

from csp_edge.eval.scenes import EMOJI, N_PIXELS_DRAWING

OUT = Path(__file__).parents[2] / "csp_edge" / "eval" / "drawings"

CODES = (
    "1f431 1f436 1f41f 1f438 1f437 1f41d 1f333 1f337 "
    "1f34e 1f34c 1f34b 1f955 1f355 1f382 1f697 1f68c "
    "1f6b2 26f5 2708 1f680 1f3e0 23f0 1f511 1f512 "
    "1f514 1f4d7 2614 1f3a9 1f451 1f3b8 1f4f7 26bd"
).split()

FLUENT = (
    "cat-face dog-face fish frog pig-face honeybee deciduous-tree tulip "
    "red-apple banana lemon carrot pizza birthday-cake automobile bus "
    "bicycle sailboat airplane rocket house alarm-clock key locked "
    "bell green-book umbrella-with-rain-drops top-hat crown guitar camera soccer-ball"
).split()

# vendor: package, folder in it
PACKAGES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64"),
    "emojione": ("emojione@2.2.7", "package/assets/png_128x128"),
    "fluent": ("fluentui-emoji@1.3.0", "package/icons/flat"),
}


def unpack(package: str, folder: Path) -> tarfile.TarFile:
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    return tarfile.open(folder / packed.stdout.split()[-1])


def drawing(archive: tarfile.TarFile, folder: str, vendor: str, i: int) -> Image.Image:
    if vendor == "fluent":
        import resvg_py

        svg = archive.extractfile(f"{folder}/{FLUENT[i]}.svg").read().decode()
        data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))
    else:
        names = (f"{folder}/{CODES[i]}{suffix}.png" for suffix in ("", "-fe0f"))
        name = next(n for n in names if n in archive.getnames())
        data = archive.extractfile(name).read()
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((N_PIXELS_DRAWING, N_PIXELS_DRAWING), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (N_PIXELS_DRAWING, N_PIXELS_DRAWING))
    canvas.paste(image, tuple((N_PIXELS_DRAWING - n) // 2 for n in image.size))
    return canvas


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for vendor, (package, folder) in PACKAGES.items():
        sheet = Image.new("RGBA", (8 * N_PIXELS_DRAWING, 4 * N_PIXELS_DRAWING))
        with tempfile.TemporaryDirectory() as temporary:
            archive = unpack(package, Path(temporary))
            for i in range(len(EMOJI)):
                xy = i % 8 * N_PIXELS_DRAWING, i // 8 * N_PIXELS_DRAWING
                sheet.paste(drawing(archive, folder, vendor, i), xy)
        sheet.save(OUT / f"{vendor}.png", optimize=True)


if __name__ == "__main__":
    main()
