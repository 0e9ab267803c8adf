"""What csp-edge eval does: run, go on from a log, print tables."""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from csp_edge.errors import OptionError
from csp_edge.eval import fidelity as along_text
from csp_edge.eval import report, run
from csp_edge.eval.answers import Answer
from csp_edge.eval.contenders import RIVALS, parse_budgets, parse_contenders
from csp_edge.eval.data import milebench_samples
from csp_edge.eval.fidelity import Divergence
from csp_edge.eval.log import Log
from csp_edge.eval.milebench import score_path
from csp_edge.eval.page import Found, answer_tables, as_they_come, found_in, page, read_runs
from csp_edge.eval.plot import check_plot, plot
from csp_edge.eval.samples import Sample
from csp_edge.eval.suite import SKILLS, suite
from csp_edge.eval.table import Table
from csp_edge.policies import CSP
from csp_edge.session import model_sha256
from csp_edge.terminal import Progress
from csp_edge.vlm import EdgeVLM

_VERSION = 1  # of what logs hold, and of how it is measured


def evaluate(args: argparse.Namespace) -> None:
    """csp-edge eval.

    Raises:
        CspEdgeError: an option, the model or the log can't be used.
        KeyboardInterrupt: Ctrl-C. The log holds what was found.
    """
    if args.plot:
        check_plot(args.plot)
    contenders = parse_contenders(args.policies or ",".join(RIVALS))
    cells = run.cells(contenders, parse_budgets(args.budgets))
    data, samples = _samples(args)
    progress = Progress()
    with _load(args, progress) as vlm:
        header = {
            **_identity("answers", vlm),
            "data": data,
            "seed": None if args.data else args.seed,
            "max_tokens": args.max_tokens,
        }
        found = _collect(
            progress,
            args.log,
            header,
            run.keys(samples, cells, args.turns),
            lambda done: run.sweep(
                vlm, samples, cells, n_turns=args.turns, max_tokens=args.max_tokens, done=done
            ),
        )
    answers = [each for each in found if isinstance(each, Answer)]
    _print(answer_tables(answers, args.by))
    if args.plot:
        plot(answers, args.plot, f"{header['model']} on {data}")


def _samples(args: argparse.Namespace) -> tuple[str, list[Sample]]:
    """What the data is called, and its samples."""
    if args.data:
        for name in ("images", "vendor"):
            if getattr(args, name):
                raise OptionError(f"--{name} is of the built-in suite: leave it or --data out")
        names = ", ".join(folder.resolve().name for folder in args.data)
        return names, milebench_samples(args.data, args.skills, args.samples)
    if args.seed < 0:
        raise OptionError(f"seed={args.seed}: give an integer of at least 0")
    samples = suite(
        args.skills or tuple(SKILLS),
        n_samples=args.samples or 10,
        n_images=args.images or (1, 2, 4, 8, 16),
        vendor=args.vendor,
        seed=args.seed,
    )
    found = list(samples)
    if not found:
        raise OptionError("nothing to ask: some skills need 2 images or more")
    by = f" drawn by {args.vendor}" if args.vendor else ""
    return f"the built-in suite{by}", found


def fidelity(args: argparse.Namespace) -> None:
    """csp-edge eval fidelity. Raises as evaluate() does."""
    contenders = parse_contenders(args.policies or ",".join(RIVALS))
    budgets = parse_budgets(args.budgets)
    texts = {"Python's language reference": along_text.default_text()}
    if args.text:
        texts = {path.name: along_text.read_text(path) for path in args.text}
        if len(texts) < len(args.text):
            raise OptionError("--text: two files of the same name: rename one of them")
    sizes = {
        "n_windows": args.windows,
        "n_prompt": args.tokens,
        "n_continuation": args.continuation,
    }
    progress = Progress()
    with _load(args, progress) as vlm:
        header = {
            **_identity("fidelity", vlm),
            "data": ", ".join(texts),
            "data_sha256": [hashlib.sha256(t.encode()).hexdigest() for t in texts.values()],
            **sizes,
        }
        windows = [
            window
            for name, text in texts.items()
            for window in along_text.windows(vlm.engine, name, text, **sizes)
        ]
        found = _collect(
            progress,
            args.log,
            header,
            along_text.keys(windows, contenders, budgets),
            lambda done: along_text.diverge(vlm.engine, windows, contenders, budgets, done=done),
        )
    divergences = [each for each in found if isinstance(each, Divergence)]
    _print([report.kl(divergences), report.top1(divergences)])


def score(path: Path) -> None:
    """csp-edge eval score.

    Raises:
        OptionError: there are no predictions, or they are malformed.
    """
    found = score_path(path)
    known = {level for scores in found.values() for level in scores.by_quantity()}
    levels = [level for level in ("Few", "Medium", "Many") if level in known]
    rows = []
    for name, scores in found.items():
        by_level = {level: repr(mean) for level, (mean, _) in scores.by_quantity().items()}
        rows.append([name, scores.metric, repr(scores.mean), str(len(scores.by_sample))])
        rows[-1] += [by_level.get(level, "") for level in levels]
    columns = ["set", "scored by", "score", "samples", *(f"{level} pictures" for level in levels)]
    _print([Table("MileBench's scores", columns, rows)])


def write_report(logs: list[Path], output: Path | None, picture: Path | None) -> None:
    """csp-edge eval report.

    Raises:
        OptionError: a log can't be read, or a file can't be written.
    """
    runs = read_runs(logs)
    plots = {}
    if picture:
        drawn = next((run for run in runs if run.answers), None)
        if not drawn:
            raise OptionError(f"--plot {picture}: there are no answers in these logs")
        plot(as_they_come(drawn.answers), picture, drawn.title)
        plots[drawn.title] = picture
    text = page(runs, plots, output.parent if output else Path())
    if not output:
        print(text, end="")
        return
    try:
        output.write_text(text, "utf-8")
    except OSError as error:
        raise OptionError(f"{output}: can't be written: {error.strerror}") from None


def _load(args: argparse.Namespace, progress: Progress) -> EdgeVLM:
    def show(stage: str, done: int, total: int) -> None:
        # prompts are parts of a run, which has a bar of its own
        if progress.stopped or stage == "load":
            progress(stage, done, total)

    options = {"mmproj": args.mmproj, "n_threads": args.threads, "cache": CSP(), "progress": show}
    with progress:
        if args.model is None:
            return EdgeVLM.demo(**options)
        return EdgeVLM(args.model, **options)


def _identity(log: str, vlm: EdgeVLM) -> dict[str, Any]:
    """What a log has to be of, to go on in it."""
    info = vlm.engine.info
    return {
        "log": log,
        "version": _VERSION,
        "model": info.name or info.path.stem,
        "model_sha256": model_sha256(info.path),
        "mmproj_sha256": model_sha256(info.projector.path) if info.projector else None,
    }


def _collect(
    progress: Progress,
    path: Path | None,
    header: Mapping[str, Any],
    wanted: Set[Any],
    run: Callable[[Set[Any]], Iterator[Found]],
) -> list[Found]:
    """What a log holds, and then what a run finds, with a bar on a terminal."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise OptionError("the progress bar needs tqdm: pip install csp-edge[eval]") from None

    with ExitStack() as stack:
        log = stack.enter_context(Log(path, header)) if path else None
        found = found_in(log.path, header, log.entries) if log else []
        done = {each.key for each in found}
        n_before, start = len(found), time.perf_counter()
        bar = stack.enter_context(tqdm(total=len(wanted - done), unit="", disable=None))
        stack.enter_context(progress)
        try:
            for each in run(done):
                if log:
                    log.append(asdict(each))
                found.append(each)
                bar.update()
                if progress.stopped:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            bar.close()
            if log:
                print(f"stopped: the same command goes on from {log.path}", file=sys.stderr)
            raise
    seconds = time.perf_counter() - start
    print(f"{len(found) - n_before} of {len(found)} measured now, in {seconds:.1f} s\n")
    return found


def _print(tables: list[Table]) -> None:
    print("\n\n".join(table.text() for table in tables))
