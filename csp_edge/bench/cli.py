"""The command line: csp-edge bench."""

import argparse
from pathlib import Path
from typing import Any

from csp_edge.eval.cli import natural, naturals

# NumPy, Pillow and the libraries are imported where a command needs them: --help doesn't

BENCH_EXAMPLES = """\
examples:
  csp-edge bench
  csp-edge bench -m model.gguf --lengths 1024,4096 --budgets 5%,10%,20% --plot speed.svg
  csp-edge bench -m model.gguf --images 4 --rounds 3 --json speed.json
"""


def add_bench(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "bench",
        help="speed and memory of a model, full and pruned",
        description="Speed and memory over the full cache and over pruned ones, which take turns. "
        "Prompts are English text, after pictures where there are some.",
        epilog=BENCH_EXAMPLES,
    )
    parser.set_defaults(run=_bench)
    parser.add_argument(
        "-m", "--model", metavar="PATH", help="a GGUF file or folder; default: the demo model"
    )
    parser.add_argument(
        "--mmproj", metavar="PATH", help="the projector; default: the one beside the model"
    )
    parser.add_argument(
        "--lengths",
        metavar="N,...",
        type=naturals,
        help="tokens of a prompt; default: 512,2048, or what --images take and a question",
    )
    parser.add_argument(
        "--budgets",
        metavar="20%,512,...",
        default="10%,20%",
        help="shares of the prompt, or cells; default: 10%%,20%%",
    )
    parser.add_argument(
        "--images", metavar="N", type=natural, default=0, help="drawn pictures in each prompt"
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=natural,
        default=5,
        help="how often each prompt is read; default: 5",
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads; default: one for each CPU"
    )
    parser.add_argument(
        "--gpu-layers", metavar="N", type=int, default=0, help="-1: all layers; default: none"
    )
    parser.add_argument(
        "--kv-type",
        metavar="TYPE",
        default="f16",
        help="of the cache: f32, f16, bf16, q8_0 or q4_0; default: f16",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="every measurement, with medians and quartiles"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="a .png or .svg over the lengths")


def _bench(args: argparse.Namespace) -> None:
    from csp_edge.bench import commands

    commands.measure(args)
