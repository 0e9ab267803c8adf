"""What csp-edge bench does: measure, print tables, write files."""

import argparse
import json
from pathlib import Path

from csp_edge.bench.case import Case
from csp_edge.bench.plot import plot
from csp_edge.bench.report import tables
from csp_edge.bench.run import bench
from csp_edge.errors import OptionError
from csp_edge.eval.contenders import parse_budgets
from csp_edge.eval.plot import check_plot
from csp_edge.model_files import find_model
from csp_edge.terminal import Progress
from csp_edge.vlm import DEMO_MODEL

_LENGTHS = (512, 2048)


def measure(args: argparse.Namespace) -> None:
    """csp-edge bench.

    Raises:
        CspEdgeError: an option, the model or a file can't be used.
        KeyboardInterrupt: Ctrl-C.
    """
    for path in filter(None, (args.json, args.plot)):
        # not after a long run
        if not path.parent.is_dir():
            raise OptionError(f"{path}: can't be written: no folder {path.parent}")
    if args.plot:
        check_plot(args.plot)
    budgets = parse_budgets(args.budgets)
    files = find_model(args.model or DEMO_MODEL)
    mmproj = args.mmproj or files.mmproj
    case = Case(
        str(files.model),
        str(mmproj) if mmproj else None,
        args.images,
        args.threads,
        args.gpu_layers,
        args.kv_type,
    )
    lengths = sorted(set(args.lengths or ())) or ([None] if args.images else list(_LENGTHS))
    with Progress() as progress:
        run = bench(case, lengths, budgets, n_rounds=args.rounds, progress=progress)
    print("\n\n".join(table.text() for table in tables(run)))
    if args.json:
        _write(args.json, json.dumps(run.as_dict(), indent=1) + "\n")
    if args.plot:
        plot(run, args.plot)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise OptionError(f"{path}: can't be written: {error.strerror}") from None
