"""From logits to tokens to text."""

import codecs
import ctypes
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csp_edge import gbnf, native
from csp_edge.errors import ModelError, OptionError
from csp_edge.native import llama
from csp_edge.policies.base import is_number

_PENALTY_LAST_N = 64
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

# where a JSON schema holds others: by a name, and as they are
_SCHEMAS_BY_NAME = frozenset({"properties", "$defs", "definitions"})
_SCHEMAS = frozenset({"items", "prefixItems", "additionalProperties", "oneOf", "anyOf", "allOf"})
# of its keywords, what the converter takes no notice of
_SCHEMA_UNKNOWN = frozenset(
    """
    minimum maximum exclusiveMinimum exclusiveMaximum multipleOf uniqueItems contains minContains
    maxContains minProperties maxProperties patternProperties propertyNames dependentRequired
    dependentSchemas dependencies unevaluatedItems unevaluatedProperties not if then else
    """.split()
)
_SCHEMA_FORMATS = r"uuid[1-5]?|date|time|date-time"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, in llama.cpp's terms and order.

    Args:
        temperature: 0: always the likeliest token.
        top_k: draw from the likeliest `top_k` tokens. 0: from all.
        top_p: draw from the likeliest tokens that make up this share.
        min_p: drop tokens less likely than this share of the likeliest one.
        repeat_penalty: divides the logits of the last 64 tokens. 1: none.
        frequency_penalty, presence_penalty: subtracted per occurrence, and once. 0: none.
        seed: for the same draw again. None: another each time.

    Raises:
        OptionError: a setting is of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda x: x >= 0, "a number of at least 0")
        _check("top_p", self.top_p, lambda x: 0 < x <= 1, "a number above 0 and up to 1")
        _check("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        _check("repeat_penalty", self.repeat_penalty, lambda x: x > 0, "a number above 0")
        _check("frequency_penalty", self.frequency_penalty, lambda x: True, "a number")
        _check("presence_penalty", self.presence_penalty, lambda x: True, "a number")
        _check_int("top_k", self.top_k, 2**31 - 1)
        if self.seed is not None:
            _check_int("seed", self.seed, 2**32 - 2)


class Sampler:
    """Draws tokens for one answer. close() frees what llama.cpp holds of it.

    Args:
        model: llama.cpp's model.
        grammar: GBNF that the answer must follow, from `root` on.

    Raises:
        OptionError: the grammar is broken.
    """

    def __init__(self, model: Any, sampling: Sampling, grammar: str | None = None) -> None:
        self._vocab = llama.llama_model_get_vocab(model)
        self._ids = np.arange(llama.llama_vocab_n_tokens(self._vocab), dtype=np.int32)
        self._grammar = self._chain = None
        if grammar is not None:
            self._grammar = _grammar(self._vocab, grammar)
        self._chain = _chain(self._vocab, len(self._ids), sampling)

    def close(self) -> None:
        for sampler in (self._grammar, self._chain):
            if sampler:
                llama.llama_sampler_free(sampler)
        self._grammar = self._chain = None

    def sample(self, logits: npt.NDArray[np.float32]) -> int | None:
        """The next token by `logits`, float32 [n_vocab]. None: the grammar leaves none.

        Raises:
            ModelError: the logits are not numbers.
        """
        if np.isnan(logits).any():
            raise ModelError("the model computes no numbers (NaN): its weights may be damaged")
        token = self._draw(self._ids, logits)
        # asking the grammar about one token is much cheaper than about all of them
        if self._grammar and not len(self._allowed(np.array([token], np.int32), logits)):
            allowed = self._allowed(self._ids, logits)
            if not len(allowed):
                return None
            token = self._draw(allowed, logits)

        llama.llama_sampler_accept(self._chain, token)
        # the grammar aborts the process at a token that it doesn't allow
        if self._grammar and not llama.llama_vocab_is_eog(self._vocab, token):
            llama.llama_sampler_accept(self._grammar, token)
        return token

    def _draw(self, ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> int:
        candidates, array = _candidates(ids, logits)
        llama.llama_sampler_apply(self._chain, array)
        token: int = array.data[array.selected].id
        del candidates
        return token

    def _allowed(
        self, ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.int32]:
        candidates, array = _candidates(ids, logits)
        llama.llama_sampler_apply(self._grammar, array)
        allowed: npt.NDArray[np.int32] = ids[np.isfinite(candidates["logit"])]
        return allowed


class TextStream:
    """Text from the bytes of tokens, held back while it may still turn into a stop string.

    `stopped` tells that a stop string came; it and what follows are dropped.

    Args:
        stop: stop strings.
        lead: dropped where the text begins with it.

    Raises:
        OptionError: a stop string is empty or not a string.
    """

    def __init__(self, stop: str | Sequence[str] | None = None, *, lead: str = "") -> None:
        stops: Any = () if stop is None else stop
        is_one = isinstance(stops, str) or not isinstance(stops, Iterable)
        self._stop: list[str] = [stops] if is_one else list(stops)
        for text in self._stop:
            if not isinstance(text, str) or not text:
                raise OptionError(f"stop={text!r}: give strings that are not empty")
        # a character may span several tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lead = lead
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """The text that is certain, once `piece` has come."""
        return self._take(self._decoder.decode(piece))

    def flush(self) -> str:
        """The rest, when no more comes."""
        text = self._take(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        if self._lead and len(text) < len(self._lead) and self._lead.startswith(text):
            self._held = text
            return ""
        text, self._lead = text.removeprefix(self._lead), ""
        ends = [i for stop in self._stop if (i := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def schema_to_grammar(schema: str | Mapping[str, Any]) -> str:
    """GBNF for a JSON schema, given as a mapping or as JSON text.

    Raises:
        OptionError: it is not JSON, or uses what can't be turned into a grammar.
    """
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        parsed = json.loads(text)
        if not isinstance(parsed, dict):
            raise OptionError(f"json_schema={schema!r}: give an object")
        _check_schema(parsed)
        grammar: str = json_schema_to_gbnf(text)
    except OptionError:
        raise
    except RecursionError:
        raise OptionError("json_schema: nested too deeply, or it refers to itself") from None
    except Exception as error:  # the converter asserts, and raises what comes
        raise OptionError(f"json_schema: {type(error).__name__}: {_one_line(error)}") from None
    return grammar


def _check_schema(schema: Any) -> None:
    """The converter leaves out what it doesn't know, and writes out what comes often."""
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        is_unknown = name == "format" and not re.fullmatch(_SCHEMA_FORMATS, str(value))
        if value is not False and (is_unknown or name in _SCHEMA_UNKNOWN):
            raise OptionError(
                f"json_schema: {name}={value!r} can't be kept to: leave it out, check the answer"
            )
        counts = []
        if name in ("minLength", "maxLength", "minItems", "maxItems"):
            counts = re.findall(r"\d+", str(value)) if isinstance(value, int) else []
        elif name == "pattern" and isinstance(value, str):
            counts = [n for pair in re.findall(r"\{(\d*),?(\d*)\}", value) for n in pair if n]
        for n in counts:
            if len(n) > 9 or int(n) > gbnf.MAX_REPETITIONS:
                raise OptionError(
                    f"json_schema: {name}={value!r}: repeat {gbnf.MAX_REPETITIONS} times at most"
                )
        if name in _SCHEMAS_BY_NAME and isinstance(value, dict):
            value = [*value.values()]
        elif name not in _SCHEMAS:
            continue
        for part in value if isinstance(value, list) else [value]:
            _check_schema(part)


def _chain(vocab: Any, n_vocab: int, sampling: Sampling) -> Any:
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    samplers = [
        _suppressed(vocab, n_vocab),
        llama.llama_sampler_init_penalties(
            n_vocab,
            _PENALTY_LAST_N,
            sampling.repeat_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        ),
    ]
    if sampling.temperature == 0:
        samplers.append(llama.llama_sampler_init_greedy())
    else:
        seed = llama.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed
        samplers += [
            llama.llama_sampler_init_top_k(sampling.top_k),
            llama.llama_sampler_init_top_p(sampling.top_p, 1),
            llama.llama_sampler_init_min_p(sampling.min_p, 1),
            llama.llama_sampler_init_temp(sampling.temperature),
            llama.llama_sampler_init_dist(seed),
        ]
    for sampler in samplers:
        llama.llama_sampler_chain_add(chain, sampler)
    return chain


def _suppressed(vocab: Any, n_vocab: int) -> Any:
    """Tokens that the model's file says must not be drawn."""
    n = ctypes.c_int32()
    tokens = llama.llama_vocab_get_suppress_tokens(vocab, n)
    biases = [llama.llama_logit_bias(tokens[i], -math.inf) for i in range(n.value)]
    array = (llama.llama_logit_bias * len(biases))(*biases)
    return llama.llama_sampler_init_logit_bias(n_vocab, len(biases), array)


def _grammar(vocab: Any, grammar: str) -> Any:
    gbnf.check(grammar)
    sampler, why = native.explained(
        llama.llama_sampler_init_grammar, vocab, grammar.encode(), b"root"
    )
    if not sampler:
        raise OptionError(f"grammar: {why or 'llama.cpp refuses it'}")
    return sampler


def _candidates(
    ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[Any], Any]:
    candidates = np.zeros(len(ids), _CANDIDATE)
    candidates["id"], candidates["logit"] = ids, logits[ids]
    data = candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
    return candidates, llama.llama_token_data_array(data, len(ids), -1, False)


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


def _check(name: str, value: Any, is_fine: Callable[[float], bool], kind: str) -> None:
    if not (is_number(value) and is_fine(value)):
        raise OptionError(f"{name}={value!r}: give {kind}")


def _check_int(name: str, value: object, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise OptionError(f"{name}={value!r}: give an integer from 0 to {high}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
