"""A model's weights in Q4_0, for figures beside those of its own.

    python bench/requantize.py model.gguf model-q4_0.gguf

Q4_0 is what llama.cpp rearranges for the CPU. From weights that are quantized already it loses more
than from the original ones: good for speed, not for answers.
"""

import argparse
import ctypes
import os
from pathlib import Path

from csp_edge.native import llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.exists():  # it may be the model, which is read while this is written
        raise SystemExit(f"{args.out}: exists already: give another name")
    params = llama.llama_model_quantize_default_params()
    params.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    paths = os.fsencode(args.model), os.fsencode(args.out)
    if llama.llama_model_quantize(*paths, ctypes.byref(params)) != 0:
        raise SystemExit(f"{args.model}: can't be written as Q4_0")


if __name__ == "__main__":
    main()
