"""What models and contexts are loaded with."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from csp_edge import native
from csp_edge.errors import ModelError
from csp_edge.model_info import KV_TYPES
from csp_edge.native import llama

Progress: TypeAlias = Callable[[str, int, int], None]


def load_model(
    path: Path, *, n_gpu_layers: int, mmap: bool, devices: Any, progress: Progress
) -> Any:
    """llama.cpp's model.

    Args:
        n_gpu_layers: layers to offload, -1: all.
        mmap: map the weights, or read them.
        devices: that take layers, as llama.cpp's array of them. None: this machine's.
        progress: called with ("load", percent, 100). What it raises ends the loading.

    Raises:
        ModelError: it can't be loaded.
    """
    failures: list[BaseException] = []

    @llama.llama_progress_callback  # type: ignore[untyped-decorator, unused-ignore]
    def report(share: float, _: object) -> bool:
        try:
            progress("load", round(share * 100), 100)
        except BaseException as failure:  # it can't pass through C
            failures.append(failure)
        return not failures

    params = llama.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    if not mmap:
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
    if devices is not None:
        params.devices = devices
    params.progress_callback = report
    model, why = native.explained(llama.llama_model_load_from_file, os.fsencode(path), params)
    if failures:
        raise failures[0]
    if not model:
        raise ModelError(f"{path}: llama.cpp can't load it: {why or 'unknown reason'}")
    return model


def check_can_chat(path: Path, model: Any) -> None:
    """Raises ModelError for a model that doesn't write text token by token."""
    vocab = llama.llama_model_get_vocab(model)
    if llama.llama_vocab_type(vocab) == llama.LLAMA_VOCAB_TYPE_NONE:
        raise ModelError(f"{path}: has no vocabulary, so it can't chat: use a chat model")
    if llama.llama_model_has_encoder(model) or llama.llama_model_is_diffusion(model):
        raise ModelError(f"{path}: not a model that writes token by token: use a chat model")


def context_params(*, n_ctx: int, n_ubatch: int, kv_type: str, on_gpu: bool) -> Any:
    """llama.cpp's, of a context of one sequence that can be pruned.

    Args:
        n_ctx: cells. n_ubatch: tokens that are computed at once.
        kv_type: type of K and V, one of KV_TYPES.
        on_gpu: whether the cache is where its layers are.
    """
    params = llama.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = n_ubatch
    params.n_seq_max = 1
    params.n_outputs_max = 1
    # compaction gathers rows of V, which only flash attention leaves in rows
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = KV_TYPES[kv_type]
    params.offload_kqv = on_gpu
    params.swa_full = False
    params.no_perf = True
    return params
