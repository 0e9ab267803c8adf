"""llama.cpp's converter, and those that it has for older projectors."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from models import TEXT, VISION, vision
from transformers import SiglipVisionConfig, SiglipVisionModel
from vocabulary import PRE_TOKENIZER


class Converter:
    """Writes model.gguf and mmproj.gguf, in f16.

    Args:
        source: llama.cpp's tree.
    """

    def __init__(self, source: Path) -> None:
        self._script = source / "convert_hf_to_gguf.py"
        self._older = source / "tools" / "mtmd" / "legacy-models"
        sys.path[:0] = [str(source), str(source / "gguf-py")]
        import conversion
        from conversion.llava import LlavaVisionModel

        # by a hash of some tokens it finds out how a known vocabulary cuts words: ours isn't known
        for kind in (conversion.ModelBase, conversion.TextModel):
            kind.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
        # the embedding of [IMG_BREAK] goes into Pixtral's projector, but is filtered out before
        LlavaVisionModel.filter_tensors = classmethod(lambda cls, item: item)

    def model(self, checkpoint: Path, out: Path) -> None:
        _run(self._script, checkpoint, "--outtype", "f16", "--outfile", out / "model.gguf")

    def both(self, checkpoint: Path, out: Path) -> None:
        self.model(checkpoint, out)
        options = ["--mmproj", "--outtype", "f16", "--outfile", out / "mmproj.gguf"]
        _run(self._script, checkpoint, *options)

    def llava(self, checkpoint: Path, out: Path) -> None:
        """Projectors on CLIP: the encoder is cut out of the checkpoint, then converted."""
        self.model(checkpoint, out)
        _run(self._older / "llava_surgery_v2.py", "-C", "-m", checkpoint)
        encoder = checkpoint / "encoder"
        encoder.mkdir()
        config = json.loads((checkpoint / "config.json").read_text())
        encoder_config = config["vision_config"]
        encoder_config["vision_feature_layer"] = config["vision_feature_layer"]
        if "image_grid_pinpoints" in config:
            encoder_config["image_grid_pinpoints"] = config["image_grid_pinpoints"]
            encoder_config["mm_patch_merge_type"] = "spatial_unpad"
        (encoder / "config.json").write_text(json.dumps(encoder_config))
        shutil.copy(checkpoint / "llava.clip", encoder / "pytorch_model.bin")
        script = self._older / "convert_image_encoder_to_gguf.py"
        options = ["--llava-projector", checkpoint / "llava.projector", "--output-dir", checkpoint]
        _run(script, "--clip-model-is-vision", "-m", encoder, *options)
        shutil.move(checkpoint / "mmproj-model-f16.gguf", out / "mmproj.gguf")

    def minicpmv(
        self, checkpoint: Path, out: Path, randomize: Callable[[torch.nn.Module], None]
    ) -> None:
        """The language model, with an encoder and a resampler, which transformers doesn't have."""
        self.model(checkpoint, out)
        encoder_config = vision(image_size=560, patch_size=8, model_type="siglip")
        config = {"image_size": 64, "query_num": 16, "vision_config": encoder_config}
        (checkpoint / "config.json").write_text(json.dumps(TEXT | config))
        encoder = SiglipVisionModel(SiglipVisionConfig(**encoder_config, vision_use_head=False))
        randomize(encoder)
        torch.save(encoder.vision_model.state_dict(), checkpoint / "minicpmv.clip")
        torch.save(_resampler(), checkpoint / "minicpmv.projector")
        script = self._older / "minicpmv-convert-image-encoder-to-gguf.py"
        _run(script, "-m", checkpoint, "--minicpmv_version", 3)
        shutil.move(checkpoint / "mmproj-model-f16.gguf", out / "mmproj.gguf")


def _resampler() -> dict[str, torch.Tensor]:
    n, n_vision = TEXT["hidden_size"], VISION["hidden_size"]
    shapes = {"query": (16, n), "kv_proj.weight": (n, n_vision), "proj": (n, n)}
    shapes |= {"attn.in_proj_weight": (3 * n, n), "attn.in_proj_bias": (3 * n,)}
    shapes |= {"attn.out_proj.weight": (n, n), "attn.out_proj.bias": (n,)}
    tensors = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    for norm in ("ln_q", "ln_kv", "ln_post"):
        tensors |= {f"{norm}.weight": torch.ones(n), f"{norm}.bias": torch.zeros(n)}
    return {f"resampler.{name}": tensor for name, tensor in tensors.items()}


def _run(script: Path, *arguments: object) -> None:
    """What a script does when called so. What it says is shown if it fails."""
    before, sys.argv = sys.argv, [str(script), *map(str, arguments)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(script), run_name="__main__")
    except BaseException:
        print(said.getvalue()[-3000:], file=sys.stderr)
        raise
    finally:
        sys.argv = before
