"""Vision-language models on laptops, over a KV cache pruned with Cross-Self Pruning (CSP).

>>> from csp_edge import EdgeVLM, CSP, Full
>>> vlm = EdgeVLM("path/to/model.gguf", cache=CSP(budget=0.2))
>>> vlm.chat("What color is the star in image 2?", images=["a.png", "b.png"]).text
"""

from typing import TYPE_CHECKING, Any

from csp_edge import libraries
from csp_edge.errors import (
    CspEdgeError,
    ImageError,
    LibraryError,
    MemoryLimitError,
    ModelError,
    OptionError,
    PolicyError,
    ProjectorError,
    PromptError,
    ServerError,
    SessionError,
    TemplateError,
)
from csp_edge.policies import CSP, Full, Policy

if TYPE_CHECKING:
    from csp_edge.results import CacheFigures, ChatResult, Timings, Usage
    from csp_edge.stream import ChatStream
    from csp_edge.vlm import EdgeVLM

__all__ = [
    "CSP",
    "CacheFigures",
    "ChatResult",
    "ChatStream",
    "CspEdgeError",
    "EdgeVLM",
    "Full",
    "ImageError",
    "LibraryError",
    "MemoryLimitError",
    "ModelError",
    "OptionError",
    "Policy",
    "PolicyError",
    "ProjectorError",
    "PromptError",
    "ServerError",
    "SessionError",
    "TemplateError",
    "Timings",
    "Usage",
]

libraries.bind(__path__)


def __getattr__(name: str) -> Any:
    # what needs NumPy and the libraries waits until it is asked for
    if name in __all__:
        from csp_edge import results, stream, vlm

        return getattr({"EdgeVLM": vlm, "ChatStream": stream}.get(name, results), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
