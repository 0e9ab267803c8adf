"""Make a small checkpoint of every model family, and convert it with llama.cpp's own converter.

    python tools/families/make.py build/patched/source build/families

Each becomes a folder with model.gguf and mmproj.gguf, and reference.npz where what transformers
computes is to be compared. The first argument is the llama.cpp tree whose converter is taken.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))
from convert import Converter  # noqa: E402
from models import FAMILIES, Family  # noqa: E402
from reference import PICTURES, save_reference  # noqa: E402
from vocabulary import Vocabulary, byte_level, pieces  # noqa: E402


def make(family: Family, checkpoint: Path) -> tuple[Any, Vocabulary]:
    """A model and its vocabulary, also written as transformers writes them."""
    bos = [family.bos] if family.bos else []
    special = list(dict.fromkeys([*bos, *family.special, family.eos]))
    tokens = (special, family.bos, family.eos, family.template)
    if family.vocabulary == "bytes":
        vocabulary = byte_level(checkpoint, *tokens)
    else:
        vocabulary = pieces(checkpoint, *tokens, prefix=family.vocabulary == "spaced pieces")
    ids = vocabulary.ids
    torch.manual_seed(0)
    model = family.make(ids, max(ids.values()) + 1).eval()
    randomize(model)
    for config in (model.config, model.generation_config):
        config.bos_token_id = ids[family.bos] if family.bos else None
        config.eos_token_id = ids[family.eos]
    model.save_pretrained(checkpoint)
    if type(model).__name__.startswith("InternVL"):
        # the converter looks for the names that the modules have, not for those of checkpoints
        save_file(model.state_dict(), checkpoint / "model.safetensors")
    # in some classes its name ends up below text_config
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (checkpoint / "config.json").write_text(json.dumps(config))
    if family.preprocessor:
        (checkpoint / "preprocessor_config.json").write_text(json.dumps(family.preprocessor))
    return model, vocabulary


def randomize(model: torch.nn.Module) -> None:
    """Weights with which attention looks here and there: transformers' own do next to nothing.

    They are rounded to f16, which is what they are converted to.
    """
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p += 0.2 * torch.randn_like(p)
            else:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5)
            p.copy_(p.half())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="llama.cpp's tree")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="one family")
    args = parser.parse_args()
    torch.set_num_threads(1)
    converter = Converter(args.source)
    for name, family in FAMILIES.items():
        if args.only not in (None, name):
            continue
        print(name, flush=True)
        out = args.out / name
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = Path(directory)
            model, vocabulary = make(family, checkpoint)
            if name in PICTURES:
                save_reference(PICTURES[name], model, family, vocabulary, out / "reference.npz")
            if family.convert == "minicpmv":
                converter.minicpmv(checkpoint, out, randomize)
            elif family.convert == "llava":
                converter.llava(checkpoint, out)
            else:
                converter.both(checkpoint, out)


if __name__ == "__main__":
    main()
