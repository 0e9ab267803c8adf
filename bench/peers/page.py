"""Write docs/benchmarks.md from a log: python bench/peers/page.py LOG PAGE"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from csp_edge.bench.spread import Spread, spread
from csp_edge.errors import CspEdgeError, OptionError
from csp_edge.eval.log import Entry, read_log
from csp_edge.eval.table import Table

MIB = 2**20
BASE = "llama.cpp", "f16"

INTRO = """\
# Benchmarks

csp-edge beside what else there is, on the same machine, with the same weights, prompts and budgets.

```sh
bench/peers.sh logs --threads {threads}
```

measures it all again and writes this page from its log. Every line is a process of its own, and all
take turns; figures are medians. KL, in nats, and top-1 agreement are of the next token's
distribution over what the prompt left in the cache, along a given continuation, against the full
cache of the same library: kvpress against transformers' own, the others against llama.cpp's with
f16. The first token of an answer, which comes before pruning, doesn't count.

- llama.cpp: the library that comes with llama-cpp-python, through its C interface, with flash
  attention, and a context no longer than it needs.
- llama-cpp-python: its `MTMDChatHandler`, as its users call it.
- transformers: the same GGUF, dequantized to float32, and once to bfloat16; so is its cache.
- kvpress: SnapKV, and of all presses that run here and free what they evict the one with the least
  KL over both budgets on the first windows; in float32. It prunes the first prompt alone.
- csp-edge: as it comes. Each question's prompt is pruned."""

TITLES = {"text": "SmolLM2-135M-Instruct, {}: a text", "demo": "The demo model, {}: pictures"}
ABOUT = {
    "text": """\
A prompt of {n_prompt} tokens of Python's language reference, 32 decoded after it, then a second
question of 64. Agreement: {n_compared} windows of 1024 tokens, {n_steps} steps.""",
    "demo": """\
{n_pictures} pictures and a question, {n_prompt} tokens, its answer, and a second question about
them. Agreement: the right answers to the questions of {n_compared} drawn conversations,
{n_steps} steps. csp-edge is `EdgeVLM.chat`. transformers has no such model with pictures: it
reads our projector's embeddings, so it has no time to the first token.""",
}


class Line(NamedTuple):
    """One side's figures. Where they are None, they aren't told."""

    name: str
    prefill: Spread | None  # tokens/s
    decode: Spread  # tokens/s
    first: Spread | None  # s
    second: Spread  # s
    kv: float  # bytes
    peak: float  # bytes
    agree: dict[str, Any] | None


def page(header: Entry, entries: list[Entry]) -> str:
    """Markdown.

    Raises:
        OptionError: the log is of something else, or not whole.
    """
    if header["log"] != "peers":
        raise OptionError(f"a log of {header['log']}: give one of bench/peers.sh")
    try:
        parts = [INTRO.format(threads=header["threads"]), _machine(header)]
        for case, about in header["cases"].items():
            parts += _case(case, about, [e for e in entries if e["case"] == case])
    except (KeyError, StopIteration, IndexError, ValueError) as error:
        raise OptionError(f"the log is not whole ({error!r}): measure anew") from None
    return "\n\n".join(parts) + "\n"


def _machine(header: Entry) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    threads = "1 thread" if header["threads"] == 1 else f"{header['threads']} threads"
    return (
        f"Measured on: {header['processor']}; {threads} each; load average {header['load']:.1f} "
        f"at the start. {versions}."
    )


def _case(case: str, about: Entry, entries: list[Entry]) -> list[str]:
    lines = _lines(entries, about["n_prompt"])
    base = lines[BASE]
    if not base.agree:
        raise ValueError(f"no agreement of {BASE}")
    same = next(e["same"] for e in entries if "same" in e)
    told = ABOUT[case].format(**about, n_steps=base.agree["n_steps"])
    told += (
        f"\nThe full caches of llama.cpp and of transformers differ by a KL of {same['kl']:.1g}."
    )
    parts = ["## " + TITLES[case].format(about["quantization"]), told]
    for table in (_ratios(lines), _absolute(lines), _presses(entries)):
        parts += [f"### {table.title}", table.markdown()]
    return parts


def _lines(entries: list[Entry], n_prompt: int) -> dict[tuple[str, str], Line]:
    sides = dict.fromkeys((e["side"], e["cache"]) for e in entries if "turn" in e)
    libraries = list(dict.fromkeys(name for name, _ in sides))
    sides = dict.fromkeys(sorted(sides, key=lambda side: libraries.index(side[0])))
    return {
        side: _line(side, [e for e in entries if (e.get("side"), e.get("cache")) == side], n_prompt)
        for side in sides
    }


def _line(side: tuple[str, str], entries: list[Entry], n_prompt: int) -> Line:
    turns = [e["turn"] for e in entries if "turn" in e]
    peak = next(e["memory"]["peak"] for e in entries if "memory" in e)
    agree = next((e["agree"] for e in entries if "agree" in e), None)
    has = {name: turns[0][name] is not None for name in ("prefill_s", "first_token_s")}
    return Line(
        _name(*side),
        spread([n_prompt / t["prefill_s"] for t in turns]) if has["prefill_s"] else None,
        spread([t["n_decode"] / t["decode_s"] for t in turns]),
        spread([t["first_token_s"] for t in turns]) if has["first_token_s"] else None,
        spread([t["second_s"] for t in turns]),
        turns[0]["kv_bytes"],
        peak,
        agree,
    )


def _name(side: str, cache: str) -> str:
    if side != "kvpress":
        return f"{side}, {cache.replace(':', ', window ')}"
    press, _, budget = cache.partition(":")
    if press == "full":
        return ", ".join(filter(None, ["transformers, full", budget]))
    return f"kvpress {press.replace('Press', '')}, {budget}"


def _ratios(lines: dict[tuple[str, str], Line]) -> Table:
    base = lines[BASE]
    columns = ["", "prefill speed", "decode speed", "first token after", "second question's after"]
    columns += ["K and V", "memory at most", "KL", "top-1"]
    rows = []
    for line in lines.values():
        spreads = zip(line[1:5], base[1:5], strict=True)
        ratios = [f"{a.median / b.median:.2f}" if a and b else "" for a, b in spreads]
        ratios += [f"{line.kv / base.kv:.2f}", f"{line.peak / base.peak:.2f}"]
        agree = [_kl(line.agree["kl"]), f"{line.agree['top1']:.1%}"] if line.agree else ["", ""]
        rows.append([line.name, *ratios, *agree])
    return Table(f"As ratios: {base.name} = 1", columns, rows)


def _kl(value: float) -> str:
    return "0" if value < 5e-5 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def _absolute(lines: dict[tuple[str, str], Line]) -> Table:
    columns = ["", "prefill, tokens/s", "decode, tokens/s", "first token, s"]
    columns += ["second question's, s", "K and V, MiB", "memory at most, MiB"]
    rows = [
        [
            line.name,
            _text(line.prefill, 1),
            _text(line.decode, 1),
            _text(line.first, 3),
            _text(line.second, 3),
            f"{line.kv / MIB:.2f}",
            f"{line.peak / MIB:.0f}",
        ]
        for line in lines.values()
    ]
    notes = [
        "± half of what is between the quartiles. Memory is all of the process, its libraries too."
    ]
    return Table("In absolute figures", columns, rows, notes)


def _text(found: Spread | None, n_digits: int) -> str:
    return found.text(n_digits) if found else ""


def _presses(entries: list[Entry]) -> Table:
    runs: dict[str, dict[str, Entry]] = {}
    errors: dict[str, str] = {}
    for found in (e["screened"] for e in entries if "screened" in e):
        name = found["press"].replace("Press", "")
        if "error" in found:
            errors[name] = found["error"]
        else:
            runs.setdefault(name, {})[found["budget"]] = found
    best_first = sorted(runs.items(), key=lambda run: sum(f["kl"] for f in run[1].values()))
    budgets = list(best_first[0][1])
    rows = []
    for name, of in best_first:
        figures = [f"{_kl(of[b]['kl'])}, {of[b]['top1']:.0%}" if b in of else "" for b in budgets]
        frees = max(found["kv_share"] for found in of.values()) < 0.5
        evicts = max(found["kl"] for found in of.values()) > 0
        rows.append([name, *figures, "yes" if frees else "no" if evicts else "evicts nothing"])
    notes = [f"Over the first {best_first[0][1][budgets[0]]['n_steps']} steps."]
    notes += [f"{name} doesn't run here: {error}" for name, error in errors.items()]
    columns = ["", *(f"KL and top-1 at {b}" for b in budgets), "frees memory"]
    return Table("All presses of kvpress that run", columns, rows, notes)


def main() -> None:
    try:
        text = page(*read_log(Path(sys.argv[1])))
    except CspEdgeError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
    Path(sys.argv[2]).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
