"""The memory that a chat takes, as predicted from headers and as the system counts it.

    python bench/plan.py

The embedded model, SmolLM2-135M, and random weights in the shapes of LLaVA-1.5-7B and
Qwen2.5-VL-3B, four layers of each. A fresh process loads, prefills, prunes and writes 32 tokens;
another one, which loads nothing, says before what that takes. Linux alone counts peaks so that they
can be taken apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "tools/random_model"))
from overhead import smollm2  # noqa: E402
from write import write  # noqa: E402

import csp_edge  # noqa: E402

PHASES = ("load", "prefill", "prune", "decode")
N_DECODE = 32
N_UBATCH = 512
MODELS = Path(csp_edge.__file__).parent / "models"
SIDE = 448  # pixels of the picture


def measure(model: str, mmproj: str | None, n_tokens: int, n_threads: int) -> dict[str, int]:
    """Peaks of this process in bytes, phase by phase, and the cells that the cache then had."""
    from csp_edge import CSP, EdgeVLM
    from csp_edge.template import normalize_messages

    peaks = {}
    _reset_peak()
    with EdgeVLM(model, mmproj=mmproj, n_threads=n_threads, cache=CSP(0.2)) as vlm:
        engine = vlm.engine
        peaks["load"] = _peak()
        noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        pictures = [noise] if mmproj else []
        words = "the quick brown fox jumps over the lazy dog " * n_tokens
        with vlm.tokenize(normalize_messages("x", pictures)) as prompt:
            n_words = max(1, n_tokens - prompt.n_tokens)
        with vlm.tokenize(normalize_messages(words[:4096])) as prompt:
            n_characters = n_words * 4096 // prompt.n_tokens
        with vlm.tokenize(normalize_messages(words[:n_characters], pictures)) as prompt:
            _reset_peak()
            amounts = vlm.cache.resolve(prompt.n_tokens, has_pictures=prompt.has_pictures)
            engine.prefill(prompt, window=amounts.window, room=N_DECODE)
            peaks["prefill"] = _peak()
            peaks["n_cells"] = prompt.n_tokens + N_DECODE
        _reset_peak()
        engine.prune(vlm.cache)
        peaks["prune"] = _peak()
        _reset_peak()
        for token in range(N_DECODE):
            engine.decode(token + 10)
        peaks["decode"] = _peak()
    return peaks


def predict(model: str, mmproj: str | None, n_cells: int) -> dict[str, int]:
    """The same from the headers."""
    from csp_edge import CSP
    from csp_edge.footprint import Layout

    with Layout(
        Path(model),
        Path(mmproj) if mmproj else None,
        n_gpu_layers=0,
        policy=CSP(0.2),
        n_pixels=SIDE * SIDE,
        n_images=1,
    ) as layout:
        found = layout.footprint(n_cells=-(-n_cells // 256) * 256, n_ubatch=N_UBATCH, kv_type="f16")
    rows = {name: getattr(found, name) for name in found.__slots__}
    return {phase: getattr(found, phase) for phase in PHASES} | {"rows": rows}


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def in_process(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def models(folder: Path, n_layer: int):
    """Names, files, and tokens of a prompt."""
    embedded = MODELS / "csp-demo-q8_0.gguf", MODELS / "mmproj-csp-demo-f16.gguf"
    yield "embedded", *embedded, 2000
    yield "SmolLM2-135M", Path(smollm2()), None, 2000
    for name in ("llava-1.5-7b", "qwen2.5-vl-3b"):
        for kind in ("q4_k", "q8_0"):
            model, mmproj = write(name, folder, type_name=kind, n_layer=n_layer)
            yield f"{name} {kind}", model, mmproj, 800
            model.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of the random models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="models with this in their name")
    parser.add_argument("--rows", action="store_true", help="show what is predicted of what")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, model, mmproj, n = args.child
        if what == "measure":
            print(json.dumps(measure(model, mmproj or None, int(n), args.threads)))
        else:
            print(json.dumps(predict(model, mmproj or None, int(n))))
        return

    print(f"{'MiB: predicted / measured':26}" + "".join(f"{phase:>20}" for phase in PHASES))
    with tempfile.TemporaryDirectory() as folder:
        for name, model, mmproj, n_tokens in models(Path(folder), args.layers):
            if args.only not in name:
                continue
            files = str(model), str(mmproj or "")
            threads = "--threads", str(args.threads)
            real = in_process(*threads, "--child", "measure", *files, str(n_tokens))
            told = in_process("--child", "predict", *files, str(real["n_cells"]))
            cells = [
                f"{told[p] / 2**20:6.0f} /{real[p] / 2**20:5.0f} {told[p] / real[p] - 1:+4.0%}"
                for p in PHASES
            ]
            print(f"{name:26}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
            if args.rows:
                print({row: round(n / 2**20, 1) for row, n in told["rows"].items()})
            highest = max(told[p] for p in PHASES) / max(real[p] for p in PHASES) - 1
            print(f"{'':26}peak {highest:+.1%}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
