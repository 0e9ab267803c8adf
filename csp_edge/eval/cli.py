"""The command line: csp-edge eval, and what it has below it."""

import argparse
from pathlib import Path
from typing import Any

# NumPy, Pillow and the libraries are imported where a command needs them: --help doesn't

EVAL_EXAMPLES = """\
examples:
  csp-edge eval --samples 1 --images 2 --policies csp,snapkv --budgets 10%,20%
  csp-edge eval --policies csp,csp:cross_ratio=0.5,window=32 --log csp.jsonl --plot csp.svg
  csp-edge eval -m model.gguf --data MileBench/ActionSequence --budgets 10% --max-tokens 8
"""
FIDELITY_EXAMPLES = """\
examples:
  csp-edge eval fidelity --policies csp,random --budgets 20% --tokens 64 --windows 2
  csp-edge eval fidelity -m model.gguf --text book.txt --log book.jsonl
"""
SCORE_EXAMPLES = """\
examples:
  csp-edge eval score ActionSequence/pred.json
"""
REPORT_EXAMPLES = """\
examples:
  csp-edge eval report csp.jsonl -o results.md --plot results.svg
"""


def add_eval(commands: Any) -> None:
    """Add the command to a parser's."""
    run = commands.add_parser(
        "eval",
        help="how much of the full cache's quality each policy keeps",
        description="Ask questions about pictures over the full cache and over pruned ones. Each "
        "prompt is prefilled once and pruned by every policy to every budget.",
        epilog=EVAL_EXAMPLES,
    )
    run.set_defaults(run=_eval)
    _add_run(run)
    run.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        nargs="+",
        help="MileBench's folders; default: the built-in suite",
    )
    run.add_argument("--skills", metavar="NAME,...", type=_names, help="of these alone")
    run.add_argument(
        "--samples",
        metavar="N",
        type=natural,
        help="conversations: of the suite for each skill and number of pictures, default 10; "
        "of MileBench the first of each set, default all",
    )
    run.add_argument(
        "--images",
        metavar="N,...",
        type=naturals,
        help="pictures in a prompt of the suite; default: 1,2,4,8,16",
    )
    run.add_argument("--vendor", metavar="NAME", help="whose emoji the suite is drawn with")
    run.add_argument("--seed", metavar="N", type=int, default=0, help="of the suite; default: 0")
    run.add_argument(
        "--turns", metavar="N", type=natural, help="no more questions of a conversation"
    )
    run.add_argument(
        "--max-tokens", metavar="N", type=natural, default=64, help="of an answer; default: 64"
    )
    run.add_argument(
        "--by",
        metavar="FIELD",
        action="append",
        default=[],
        choices=("skill", "group", "dataset", "n_images", "turn"),
        help="one more table for each budget: skill, group, dataset, n_images or turn",
    )
    run.add_argument("--plot", metavar="FILE", type=Path, help="a .png or .svg of the accuracies")

    below = run.add_subparsers(metavar="[COMMAND]")
    fidelity = below.add_parser(
        "fidelity",
        help="divergence from the full cache along a text, for any model",
        description="KL divergence and top-1 agreement of the next token's distribution, over "
        "pruned caches and over the full one, along the true continuation of a text.",
        epilog=FIDELITY_EXAMPLES,
    )
    fidelity.set_defaults(run=_fidelity)
    _add_run(fidelity)
    fidelity.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="in UTF-8; default: Python's language reference",
    )
    fidelity.add_argument(
        "--tokens", metavar="N", type=natural, default=512, help="of a prompt; default: 512"
    )
    fidelity.add_argument(
        "--continuation", metavar="N", type=natural, default=32, help="tokens; default: 32"
    )
    fidelity.add_argument(
        "--windows", metavar="N", type=natural, default=16, help="of each text; default: 16"
    )

    score = below.add_parser(
        "score",
        help="the scores of MileBench's prediction files",
        description="Score predictions as MileBench does.",
        epilog=SCORE_EXAMPLES,
    )
    score.set_defaults(run=_score)
    score.add_argument("path", metavar="PATH", type=Path, help="pred.json, or a folder of sets")

    report = below.add_parser(
        "report",
        help="a page of tables from logs",
        description="Write a page of tables, in Markdown, from the logs of runs.",
        epilog=REPORT_EXAMPLES,
    )
    report.set_defaults(run=_report)
    report.add_argument("logs", metavar="LOG", type=Path, nargs="+", help="from --log")
    report.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: stdout")
    report.add_argument("--plot", metavar="FILE", type=Path, help="a .png or .svg, shown on it")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", metavar="PATH", help="a GGUF file or folder; default: the demo model"
    )
    parser.add_argument(
        "--mmproj", metavar="PATH", help="the projector; default: the one beside the model"
    )
    parser.add_argument(
        "--policies",
        metavar="NAME:SETTING=VALUE,...",
        help="what to compare, with settings: csp,snapkv:kernel=5,window=32; default: all",
    )
    parser.add_argument(
        "--budgets",
        metavar="20%,512,...",
        default="5%,10%,20%,40%",
        help="shares of the prompt, or cells; default: 5%%,10%%,20%%,40%%",
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads; default: one for each CPU"
    )
    parser.add_argument(
        "--log",
        metavar="FILE",
        type=Path,
        help="JSON lines; the same command goes on from where one was stopped",
    )


def _names(text: str) -> list[str]:
    return text.split(",")


def natural(text: str) -> int:
    n = int(text)
    if n < 1:
        raise ValueError
    return n


def naturals(text: str) -> list[int]:
    return [natural(part) for part in text.split(",")]


# argparse names what could not be read by these
natural.__name__ = "number above 0"
naturals.__name__ = "list of numbers above 0"


def _eval(args: argparse.Namespace) -> None:
    from csp_edge.eval import commands

    commands.evaluate(args)


def _fidelity(args: argparse.Namespace) -> None:
    from csp_edge.eval import commands

    commands.fidelity(args)


def _score(args: argparse.Namespace) -> None:
    from csp_edge.eval import commands

    commands.score(args.path)


def _report(args: argparse.Namespace) -> None:
    from csp_edge.eval import commands

    commands.write_report(args.logs, args.output, args.plot)
