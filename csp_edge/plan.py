"""How a chat fits into the memory there is: cells, their type, batches and GPU layers."""

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from csp_edge import native
from csp_edge.errors import MemoryLimitError, OptionError
from csp_edge.footprint import Footprint, Layout
from csp_edge.model_info import KV_TYPES, ggml_type
from csp_edge.policies import CSP, Full, Policy

_N_UBATCH = (512, 256, 128, 64)
_STEP = 256  # cells; what llama.cpp rounds up to
# fewer cells than this share of what smaller batches would leave are not worth the speed
_WORTH = 0.8
# what pictures may take where they can be scaled down, and the tokens that are left to them
_PICTURE_SHARE = 0.25
_PICTURE_TOKENS = 128
_REPACKED_SHARE = 0.1
_MAX_MEMORY = 2**60

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings under which a chat stays within `memory` bytes, and what it takes then.

    n_cells: at most, of the cache. n_tokens: what the conversation was taken to have; if more than
    n_cells, its cache is pruned while it is read.
    n_images_most: pictures that the model's context holds, if it holds less than there are.
    tokens_per_picture: of the largest. max_image_tokens: that pictures have to be scaled down to.
    None: the projector's own limit.
    mmap: map the weights. Not where most of them are rearranged for this CPU: they would be in
    memory twice.
    """

    memory: int
    n_cells: int
    n_tokens: int
    n_images_most: int | None
    tokens_per_picture: int
    max_image_tokens: int | None
    kv_type: str
    n_ubatch: int
    n_gpu_layers: int
    mmap: bool
    footprint: Footprint

    def rows(self) -> dict[str, str]:
        """A table for people: settings, what takes memory, and the peaks that come of it."""
        found, per_picture = self.footprint, self.tokens_per_picture
        share = min(1.0, self.n_cells / self.n_tokens)
        rows = {
            "cells of the cache": f"{self.n_cells:,}, {share:.0%} of {self.n_tokens:,} tokens",
            "tokens of a picture": f"{per_picture:,} at most" if per_picture else "no projector",
            "pictures are scaled to": f"{self.max_image_tokens} tokens"
            if self.max_image_tokens
            else "what the projector takes",
            "type of the cache": self.kv_type,
            "tokens at once": f"{self.n_ubatch}",
            "GPU layers": f"{self.n_gpu_layers}",
            "weights are": "mapped" if self.mmap else "read",
        }
        if self.n_images_most is not None:
            rows["pictures of a conversation"] = f"{self.n_images_most:,} at most, by its context"
        sizes = {
            "program and libraries": found.program,
            "weights": found.weights,
            "weights for this CPU": found.repacked,
            "projector": found.projector,
            "a picture's graph": found.vision,
            "pictures": found.picture,
            "cache, K and V": found.cache,
            "half a layer while it grows": found.moving,
            "the model's graph": found.compute,
            "observed queries": found.queries,
            "scoring": found.scoring,
            "logits and candidates": found.sampling,
            "on devices": found.device,
            "when loaded": found.load,
            "while reading": found.prefill,
            "while pruning": found.prune,
            "while writing": found.decode,
            "at most": found.peak,
            "of": self.memory,
        }
        return rows | {name: f"{n / 2**20:10,.1f} MiB" for name, n in sizes.items() if n}


@dataclass(frozen=True, slots=True)
class _Fit:
    n_cells: int
    kv_type: str
    n_ubatch: int
    footprint: Footprint


def parse_memory(memory: str | int) -> int:
    """Bytes of "4GiB", "512 MB", "1.5G" (as GiB) or an integer.

    Raises:
        OptionError: it is none of these, or not between 1 byte and 1 EiB.
    """
    amount: float | None = None
    if isinstance(memory, int) and not isinstance(memory, bool):
        amount = memory
    elif isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kmgt]?)(i?b?)\s*", memory.lower())
        if found and not (found[3].startswith("i") and not found[2]):
            base = 1000 if found[3] == "b" else 1024
            amount = float(found[1]) * base ** _UNITS[found[2]]
    if amount is None or not 1 <= amount <= _MAX_MEMORY:
        raise OptionError(f'memory={memory!r}: give bytes, or text like "4GiB" or "512 MB"')
    return int(amount)


def plan(
    model: Path,
    mmproj: Path | None,
    memory: str | int,
    *,
    n_images: int | None = None,
    n_pixels: int | None = None,
    kv_type: str = "auto",
    n_gpu_layers: int | None = 0,
    policy: Policy | Full = CSP(),  # noqa: B008
    recall: bool | str = False,
) -> Plan:
    """The settings that keep most of a conversation within `memory`, from the files' headers alone.

    Where not all cells fit, their type is chosen by the measured loss of fewer cells and of fewer
    bits, at equal bytes ("More Tokens, Lower Precision", arXiv 2412.12706): see
    bench/cells_or_bits.py.

    Args:
        model, mmproj: GGUF files.
        memory: bytes, or text like "4GiB". Of the host; devices have what they have.
        n_images: pictures of a conversation. None: as many as the model's context holds.
        n_pixels: of each, where the projector takes any size. None: the largest that it takes, or
            that leaves three quarters of the memory to other things.
        kv_type: type of K and V in the cache, or "auto".
        n_gpu_layers: layers to offload, -1: all. None: as many as fit.
        policy: what prunes the cache.
        recall: keep what is evicted, in a file, as this type or, where this is True, the cache's.

    Raises:
        MemoryLimitError: it doesn't fit, with the smallest memory that would do.
        OptionError: a setting is out of range.
        ModelError, ProjectorError: a file can't be read, or they don't belong together.
    """
    n_bytes = parse_memory(memory)
    kv_types = _kv_types(kv_type)
    _check("n_images", n_images, 0)
    _check("n_pixels", n_pixels, 1)
    _check("n_gpu_layers", n_gpu_layers, -1)
    if not isinstance(recall, bool):
        ggml_type("recall", recall)

    def laid_out(n: int) -> Layout:
        return Layout(
            model,
            mmproj,
            n_gpu_layers=n,
            policy=policy,
            n_pixels=n_pixels,
            n_images=n_images,
            recall=recall,
        )

    if n_gpu_layers is None:
        n_gpu_layers = _fitting_layers(laid_out)
    with laid_out(n_gpu_layers) as layout:
        if n_pixels is None:
            return _choose_pictures(layout, n_bytes, kv_types, n_gpu_layers)
        found = _choose(layout, n_bytes, kv_types, n_gpu_layers)
        return replace(found, max_image_tokens=layout.tokens_per_tile)


def _fitting_layers(laid_out: Callable[[int], Layout]) -> int:
    """As many as the devices hold with a whole context in f16."""
    free = native.csp_free_device_memory()
    if not free:
        return 0
    with laid_out(0) as layout:
        n_cells, low, high = _padded(layout.info.n_ctx), 0, layout.info.n_layer + 1
    while low < high:
        n = (low + high + 1) // 2
        with laid_out(n) as layout:
            found = layout.footprint(n_cells=n_cells, n_ubatch=_N_UBATCH[0], kv_type="f16")
        low, high = (n, high) if found and found.device <= free else (low, n - 1)
    return low


def _kv_types(kv_type: str) -> list[str]:
    if kv_type == "auto":
        return list(_losses())
    if kv_type not in KV_TYPES:
        raise OptionError(f"unknown kv_type {kv_type!r}: choose one of auto, {', '.join(KV_TYPES)}")
    return [kv_type]


def _check(name: str, value: object, least: int) -> None:
    if value is not None and (type(value) is not int or not least <= value < 2**31):
        raise OptionError(f"{name}={value!r}: give an integer of at least {least}, or None")


def _choose_pictures(layout: Layout, n_bytes: int, kv_types: list[str], n_gpu_layers: int) -> Plan:
    """Scale pictures down, by halves, until they leave room for other things."""
    max_image_tokens = None
    while True:
        if _picture_bytes(layout) <= _PICTURE_SHARE * n_bytes:
            with suppress(MemoryLimitError):
                found = _choose(layout, n_bytes, kv_types, n_gpu_layers)
                return replace(found, max_image_tokens=max_image_tokens)
        if layout.tokens_per_tile < 2 * _PICTURE_TOKENS or not layout.shrink_pictures():
            found = _choose(layout, n_bytes, kv_types, n_gpu_layers)
            return replace(found, max_image_tokens=max_image_tokens)
        max_image_tokens = layout.tokens_per_tile


def _choose(layout: Layout, n_bytes: int, kv_types: list[str], n_gpu_layers: int) -> Plan:
    info, n_tokens = layout.info, layout.n_tokens
    most = _padded(n_tokens)
    mmap = not _is_repacked(layout)

    fits = []
    smallest = []
    for kind in kv_types:
        found = []
        for n_ubatch in _N_UBATCH:
            footprint = partial(layout.footprint, n_ubatch=n_ubatch, kv_type=kind, mmap=mmap)
            # a sliding window's cache is as large as it reaches, however few cells there are
            reach = layout.n_swa + n_ubatch if layout.n_swa else 0
            least = min(most, _padded(max(2 * n_ubatch, 2 * layout.tokens_per_tile, reach)))
            lowest = footprint(n_cells=least)
            if lowest is None:
                break
            smallest.append(lowest.peak)
            fit = _most_cells(footprint, n_bytes, least, most)
            if fit:
                found.append(_Fit(fit[0], kind, n_ubatch, fit[1]))
        if found:
            enough = _WORTH * max(fit.n_cells for fit in found)
            fits.append(next(fit for fit in found if fit.n_cells >= enough))
    if not smallest:
        raise OptionError(f"kv_type={kv_types[0]!r}: {info.path} has heads of another size")
    if not fits:
        raise MemoryLimitError(
            f"{info.path}: {n_bytes:,} bytes are too few, the least is {min(smallest):,}: "
            f'give memory="{math.ceil(min(smallest) / 2**20)}MiB" or more, or a smaller model'
        )
    best = min(fits, key=lambda fit: kv_loss(fit.kv_type, fit.n_cells / most))
    return Plan(
        n_bytes,
        best.n_cells,
        n_tokens,
        layout.n_images_most,
        layout.tokens_per_picture,
        None,
        best.kv_type,
        best.n_ubatch,
        n_gpu_layers,
        mmap,
        best.footprint,
    )


def _picture_bytes(layout: Layout) -> int:
    found = layout.footprint(n_cells=_STEP, n_ubatch=_N_UBATCH[-1], kv_type="f16")
    return found.vision + found.picture if found else 0


def _is_repacked(layout: Layout) -> bool:
    """Whether that would take so much that weights had better not be mapped beside it."""
    found = layout.footprint(n_cells=_STEP, n_ubatch=_N_UBATCH[-1], kv_type="f16")
    return found is not None and found.repacked > _REPACKED_SHARE * layout.info.weight_bytes


def _most_cells(
    footprint: Callable[..., Footprint | None], n_bytes: int, least: int, most: int
) -> tuple[int, Footprint] | None:
    best = None
    low, high = least // _STEP, max(least, most) // _STEP
    while low <= high:
        middle = (low + high + 1) // 2 if best else low
        found = footprint(n_cells=middle * _STEP)
        if found and found.peak <= n_bytes:
            best = middle * _STEP, found
            low = middle + 1
        else:
            high = middle - 1
    return best


def _padded(n: int) -> int:
    return -(-n // _STEP) * _STEP


def _losses() -> dict[str, dict[float, float]]:
    """For every type of cache, and share of the cells kept, the measured loss."""
    table = json.loads((files("csp_edge") / "kv_precision.json").read_text())
    return {
        kind: {float(share): loss for share, loss in losses.items()}
        for kind, losses in table["loss"].items()
    }


def kv_loss(kv_type: str, share: float) -> float:
    """The loss of a cache of this type that keeps this share of its cells, in (0, 1].

    KL of the next token's distribution, in nats: by a line through the measured points, over the
    logarithm of the share.
    """
    measured = sorted(_losses().get(kv_type, {1.0: 0.0}).items())
    for (share0, loss0), (share1, loss1) in zip(measured, measured[1:], strict=False):
        if share < share1:
            # below the first point the line goes on
            t = math.log(share / share0) / math.log(share1 / share0)
            return loss0 + t * (loss1 - loss0)
    return measured[-1][1]
