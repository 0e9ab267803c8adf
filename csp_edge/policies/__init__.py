"""Cache policies: what is kept of a prompt's KV cache once it has been prefilled."""

from dataclasses import fields
from typing import Any

from csp_edge.errors import PolicyError
from csp_edge.policies.adakv import AdaKV
from csp_edge.policies.base import LayerView, Policy, Resolved, check_amount
from csp_edge.policies.csp import CSP
from csp_edge.policies.full import Full
from csp_edge.policies.h2o import H2O
from csp_edge.policies.lookm import LookM
from csp_edge.policies.pyramid import Pyramid
from csp_edge.policies.random import Random
from csp_edge.policies.snapkv import SnapKV
from csp_edge.policies.streaming import Streaming

__all__ = [
    "CSP",
    "H2O",
    "POLICIES",
    "AdaKV",
    "Full",
    "LayerView",
    "LookM",
    "Policy",
    "Pyramid",
    "Random",
    "Resolved",
    "SnapKV",
    "Streaming",
    "parse_budget",
    "policy",
]

POLICIES: dict[str, type[Policy] | type[Full]] = {
    "csp": CSP,
    "full": Full,
    "snapkv": SnapKV,
    "h2o": H2O,
    "streaming": Streaming,
    "lookm": LookM,
    "pyramid": Pyramid,
    "adakv": AdaKV,
    "random": Random,
}


def policy(name: str, **options: Any) -> Policy | Full:
    """The policy called `name`, one of `POLICIES`, with its settings.

    Raises:
        PolicyError: there is no such policy, it has no such setting, or one is out of range.
    """
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    kind = POLICIES[name]
    unknown = options.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise PolicyError(f"policy {name!r} has no setting {min(unknown)!r}")
    return kind(**options)


def parse_budget(text: str) -> int | float:
    """A budget as written on a command line: "20%", "0.2" (a share) or "512" (cells).

    Raises:
        PolicyError: it is neither, or out of range.
    """
    try:
        if text.strip().endswith("%"):
            budget: int | float = float(text.strip()[:-1]) / 100
        else:
            budget = float(text) if "." in text else int(text)
    except ValueError:
        raise PolicyError(
            f"budget {text!r}: give a share like 20% or 0.2, or cells like 512"
        ) from None
    check_amount("budget", budget, least=1)
    return budget
