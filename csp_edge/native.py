"""The C side: llama_cpp bound to our libraries, and llama-csp.h, which only ours have."""

import ctypes
import importlib
import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from csp_edge.errors import LibraryError

logger = logging.getLogger("csp_edge")

try:
    llama: Any = importlib.import_module("llama_cpp").llama_cpp
    mtmd: Any = importlib.import_module("llama_cpp.mtmd_cpp")
    llama._lib.llama_csp_init  # noqa: B018
except (FileNotFoundError, AttributeError):
    raise LibraryError(
        "the patched llama.cpp libraries are not in the package: "
        "install csp-edge anew, with `pip install .`"
    ) from None
except (ImportError, OSError, RuntimeError) as error:
    raise LibraryError(f"the patched llama.cpp libraries do not load: {error}") from None


# what llama.cpp says

_ERROR, _CONTINUED = 4, 5
_said = threading.local()


@llama.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _log(level: int, text: bytes, _: object) -> None:
    line = text.decode(errors="replace").strip()
    if level == _ERROR and line:
        _said.__dict__.setdefault("errors", []).append(line)
    if line and level != _CONTINUED:
        logger.debug("%s", line)


llama.llama_log_set(_log, None)
mtmd.mtmd_helper_log_set(_log, None)
llama.llama_backend_init()


def explained(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What `function(*args)` returns, and the first error that llama.cpp logged in it, or ""."""
    errors: list[str] = []
    _said.errors = errors
    result = function(*args)
    return result, re.sub(r"^(\w+: )+", "", errors[0]) if errors else ""


class _Elements:
    def __init__(self, pointer: Any, shape: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "data": (ctypes.addressof(pointer.contents), False),
            "shape": shape,
            "typestr": np.dtype(pointer._type_).str,
            "version": 3,
        }


def array(pointer: Any, *shape: int) -> npt.NDArray[Any]:
    """What a ctypes pointer points to, as long as that is there. No copy.

    numpy.ctypeslib.as_array makes a new ctypes type of each shape, some KiB that live on in cycles.
    """
    return np.asarray(_Elements(pointer, shape))


# llama-csp-policy.h


class CspView(ctypes.Structure):
    _fields_ = [
        ("i_layer", ctypes.c_uint32),
        ("n_layer", ctypes.c_uint32),
        ("n_head_kv", ctypes.c_uint32),
        ("n_embd_head_k", ctypes.c_uint32),
        ("n_cells", ctypes.c_uint32),
        ("budget", ctypes.c_uint32),
        ("recent", ctypes.c_uint32),
        ("n_threads", ctypes.c_uint32),
        ("token", ctypes.POINTER(ctypes.c_uint32)),
        ("modality", ctypes.POINTER(ctypes.c_int8)),
        ("self", ctypes.POINTER(ctypes.c_float)),
        ("cross", ctypes.POINTER(ctypes.c_float)),
        ("k", ctypes.POINTER(ctypes.c_float)),
    ]


class CspChoice(ctypes.Structure):
    _fields_ = [
        ("n_kept", ctypes.POINTER(ctypes.c_uint32)),
        ("kept", ctypes.POINTER(ctypes.c_uint32)),
        ("merge", ctypes.POINTER(ctypes.c_uint32)),
    ]


CspPolicy = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.POINTER(CspView), ctypes.POINTER(CspChoice), ctypes.c_void_p
)


def csp_policy(name: str) -> Any:
    """One of llama-csp-policies.h, by name."""
    return CspPolicy((name, llama._lib))


# llama-csp.h


class CspParams(ctypes.Structure):
    _fields_ = [
        ("budget", ctypes.c_uint32),
        ("recent", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("n_answer", ctypes.c_uint32),
        ("answer", ctypes.c_float),
        ("n_score", ctypes.c_float),
        ("n_decode", ctypes.c_float),
        ("sink", ctypes.c_int),
        ("keys", ctypes.c_int),
        ("policy", CspPolicy),
        ("policy_settings", ctypes.c_void_p),
        ("inspect", ctypes.c_bool),
    ]


class CspStats(ctypes.Structure):
    _fields_ = [
        ("n_layer", ctypes.c_uint32),
        ("n_cells", ctypes.c_uint32),
        ("n_kept", ctypes.c_uint32),
        ("n_recent", ctypes.c_uint32),
        ("n_tokens", ctypes.c_uint32),
        ("n_window", ctypes.c_uint32),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("modality", ctypes.POINTER(ctypes.c_int8)),
        ("window_pos", ctypes.POINTER(ctypes.c_int32)),
        ("window_modality", ctypes.POINTER(ctypes.c_int8)),
        ("t_score_us", ctypes.c_int64),
        ("t_select_us", ctypes.c_int64),
        ("t_compact_us", ctypes.c_int64),
    ]


class CspLayer(ctypes.Structure):
    _fields_ = [
        ("il", ctypes.c_int32),
        ("n_head", ctypes.c_uint32),
        ("n_head_kv", ctypes.c_uint32),
        ("n_embd_head_k", ctypes.c_uint32),
        ("kq_scale", ctypes.c_float),
        ("n_kept", ctypes.POINTER(ctypes.c_uint32)),
        ("kept", ctypes.POINTER(ctypes.c_uint32)),
        ("sink", ctypes.POINTER(ctypes.c_float)),
        ("n_cells", ctypes.POINTER(ctypes.c_uint32)),
        ("token", ctypes.POINTER(ctypes.c_uint32)),
        ("q", ctypes.POINTER(ctypes.c_float)),
        ("k", ctypes.POINTER(ctypes.c_float)),
        ("self", ctypes.POINTER(ctypes.c_float)),
        ("cross", ctypes.POINTER(ctypes.c_float)),
    ]


SINK_NONE, SINK_FIXED, SINK_MASS = range(3)
KEYS_NONE, KEYS_MEDIA, KEYS_ALL = range(3)


def _function(
    name: str, result: Any, *arguments: Any, library: Any = llama._lib
) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(library, name)
    function.restype = result  # type: ignore[attr-defined]
    function.argtypes = list(arguments)  # type: ignore[attr-defined]
    return function


csp_default_params = _function("llama_csp_default_params", CspParams)
csp_last_error = _function("llama_csp_last_error", ctypes.c_char_p)
csp_init_context = _function(
    "llama_csp_init_context",
    llama.llama_context_p_ctypes,
    llama.llama_model_p_ctypes,
    llama.llama_context_params,
    ctypes.c_uint32,
)
csp_init = _function("llama_csp_init", ctypes.c_void_p, ctypes.c_void_p)
csp_free = _function("llama_csp_free", None, ctypes.c_void_p)
csp_observe = _function("llama_csp_observe", ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint32)
csp_probe = _function(
    "llama_csp_probe",
    ctypes.c_bool,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_int32),
    ctypes.POINTER(ctypes.c_int32),
    ctypes.c_uint32,
)
csp_resize = _function("llama_csp_resize", ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint32)
csp_n_cells = _function("llama_csp_n_cells", ctypes.c_uint32, ctypes.c_void_p)
csp_prune = _function("llama_csp_prune", ctypes.c_bool, ctypes.c_void_p, CspParams)
csp_keep_evicted = _function(
    "llama_csp_keep_evicted", ctypes.c_bool, ctypes.c_void_p, ctypes.c_int, ctypes.c_int
)
csp_recall = _function("llama_csp_recall", ctypes.c_bool, ctypes.c_void_p, CspParams)
csp_take_snapshot = _function("llama_csp_take_snapshot", ctypes.c_void_p, ctypes.c_void_p)
csp_restore = _function("llama_csp_restore", ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)
csp_free_snapshot = _function("llama_csp_free_snapshot", None, ctypes.c_void_p)
CspWrite = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
CspRead = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
csp_write_snapshot = _function(
    "llama_csp_write_snapshot", ctypes.c_bool, ctypes.c_void_p, CspWrite, ctypes.c_void_p
)
csp_read_snapshot = _function(
    "llama_csp_read_snapshot",
    ctypes.c_void_p,
    ctypes.c_void_p,
    CspRead,
    ctypes.c_void_p,
    ctypes.c_size_t,
)
csp_get_stats = _function("llama_csp_get_stats", CspStats, ctypes.c_void_p)
csp_get_layer = _function("llama_csp_get_layer", CspLayer, ctypes.c_void_p, ctypes.c_uint32)


# llama-csp-memory.h


class CspMemory(ctypes.Structure):
    _fields_ = [
        ("weights", ctypes.c_uint64),
        ("repacked", ctypes.c_uint64),
        ("cache", ctypes.c_uint64),
        ("compute", ctypes.c_uint64),
        ("work", ctypes.c_uint64),
        ("device_weights", ctypes.c_uint64),
        ("device_cache", ctypes.c_uint64),
        ("device_compute", ctypes.c_uint64),
    ]


csp_get_memory = _function("llama_csp_get_memory", CspMemory, llama.llama_context_p_ctypes)
csp_free_device_memory = _function("llama_csp_free_device_memory", ctypes.c_uint64)


# llama-csp-rpc.h


csp_rpc_init = _function(
    "llama_csp_rpc_init", ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_size_t
)
csp_rpc_free = _function("llama_csp_rpc_free", None, ctypes.c_void_p)
csp_rpc_devices = _function("llama_csp_rpc_devices", ctypes.c_void_p, ctypes.c_void_p)
csp_rpc_is_connected = _function("llama_csp_rpc_is_connected", ctypes.c_bool, ctypes.c_char_p)
csp_rpc_serve = _function("llama_csp_rpc_serve", None, ctypes.c_char_p, ctypes.c_uint32)


# mtmd-csp-memory.h


class MtmdCspMemory(ctypes.Structure):
    _fields_ = [
        ("weights", ctypes.c_uint64),
        ("compute", ctypes.c_uint64),
        ("work", ctypes.c_uint64),
        ("n_tiles", ctypes.c_uint32),
        ("nx", ctypes.c_uint32),
        ("ny", ctypes.c_uint32),
        ("n_tokens", ctypes.c_uint32),
        ("n_embd", ctypes.c_uint32),
    ]


mtmd_csp_get_memory = _function(
    "mtmd_csp_get_memory",
    ctypes.c_bool,
    ctypes.c_char_p,
    ctypes.c_uint64,
    ctypes.POINTER(MtmdCspMemory),
    library=mtmd._libmtmd,
)
