"""The command line: csp-edge chat, demo, inspect, plan, rpc-server, bench and eval."""

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from csp_edge.bench.cli import add_bench
from csp_edge.errors import CspEdgeError, PromptError, printable
from csp_edge.eval.cli import add_eval
from csp_edge.policies import POLICIES, parse_budget, policy
from csp_edge.terminal import Progress, answer, write

# NumPy, Pillow and the libraries are imported where a command needs them: --help doesn't

if TYPE_CHECKING:
    from csp_edge.model_info import ModelInfo
    from csp_edge.results import ChatResult

_MAX_STDIN = 2**26  # bytes

EXAMPLES = """\
examples:
  csp-edge demo
  csp-edge chat -i photo.png "What is in image 1?"
  csp-edge chat -i a.png -i b.png --budget 10% "What color is the star in image 2?"
  csp-edge inspect model.gguf
  csp-edge plan -m model.gguf --memory 4GiB --images 12
  csp-edge eval --skills find --samples 1 --images 2 --policies csp --budgets 20%
"""
CHAT_EXAMPLES = """\
examples:
  csp-edge chat
  csp-edge chat -i photo.png "What is in image 1?"
  csp-edge chat -i photo.png < question.txt
  csp-edge chat -m model.gguf --budget 512 --kv-type q8_0 -i a.png -i b.png "What is in image 2?"
  csp-edge chat -m model.gguf --memory 4GiB -i photo.png "What is in image 1?"
  csp-edge chat --session talk.csp -i photo.png "What is in image 1?"
  csp-edge chat --session talk.csp "And what color is it?"
  csp-edge chat --policy full --temp 0.8 --seed 1 --json -i photo.png "What is in image 1?"
"""
DEMO_EXAMPLES = """\
examples:
  csp-edge demo
  csp-edge demo --png kept.png
"""
INSPECT_EXAMPLES = """\
examples:
  csp-edge inspect model.gguf
  csp-edge inspect .
"""
PLAN_EXAMPLES = """\
examples:
  csp-edge plan -m model.gguf --memory 4GiB
  csp-edge plan -m model.gguf --memory 4GiB --images 12 --pixels 640x480
  csp-edge plan -m model.gguf --memory "2 GB" --kv-type q8_0
"""
RPC_SERVER_EXAMPLES = """\
examples:
  csp-edge rpc-server
  csp-edge rpc-server --host 192.168.1.2 --port 50052
  csp-edge chat --rpc 192.168.1.2:50052,192.168.1.3:50052 -m model.gguf
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 after an error, 130 after Ctrl-C.

    Args:
        argv: its arguments. None: the process's.

    Raises:
        SystemExit: after --help and --version, and with status 2 where the arguments are wrong.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # an answer may hold characters that the terminal's encoding doesn't
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:
        # closed: print() would take stdout for it, which is for answers
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        print(end="", flush=True)
    except CspEdgeError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
            return _fail(str(error))
        # stdout is gone or full: what is still buffered must not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        is_pipe = isinstance(error, BrokenPipeError)
        return 141 if is_pipe else _fail(f"stdout: {error.strerror}")
    return 0


def _fail(message: str) -> int:
    print(f"csp-edge: error: {message}", file=sys.stderr)
    return 1


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"csp-edge {version('csp-edge')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="csp-edge",
        description="Chat with pictures, over a KV cache pruned with Cross-Self Pruning (CSP).",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    chat = commands.add_parser(
        "chat",
        help="answer a question, or hold a conversation",
        description="Answer a question about pictures. Without one, hold a conversation.",
        epilog=CHAT_EXAMPLES,
    )
    chat.set_defaults(run=_chat, parser=chat)
    chat.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question; -: from stdin")
    chat.add_argument(
        "-m", "--model", metavar="PATH", help="a GGUF file or folder; default: the demo model"
    )
    chat.add_argument(
        "--mmproj", metavar="PATH", help="the projector; default: the one beside the model"
    )
    chat.add_argument(
        "-i",
        "--image",
        metavar="PICTURE",
        action="append",
        default=[],
        help="a picture, before the question; may be repeated",
    )
    chat.add_argument(
        "--allow-urls", action="store_true", help="fetch pictures given as http(s) URLs"
    )
    chat.add_argument(
        "--policy",
        metavar="|".join(POLICIES),
        help="what prunes the cache, full keeps every cell; default: csp",
    )
    chat.add_argument(
        "--budget",
        metavar="20%|512",
        help="what is kept, a share of the prompt or cells; default: 20%%, at least 128",
    )
    chat.add_argument(
        "--kv-type",
        metavar="TYPE",
        help="of the cache: f32, f16, bf16, q8_0 or q4_0; default: f16, or by --memory",
    )
    chat.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads; default: one for each CPU"
    )
    chat.add_argument(
        "--gpu-layers",
        metavar="N",
        type=int,
        help="-1: all layers; default: none, or all with --rpc",
    )
    chat.add_argument(
        "--rpc",
        metavar="HOST:PORT,...",
        help="machines that take layers, where csp-edge rpc-server runs",
    )
    chat.add_argument(
        "--ctx", metavar="N", type=int, help="cells of the cache; default: as many as needed"
    )
    chat.add_argument(
        "--max-tokens", metavar="N", type=int, default=512, help="of an answer; default: 512"
    )
    chat.add_argument(
        "--temp",
        metavar="T",
        type=float,
        default=0.0,
        help="temperature; default: 0, always the likeliest token",
    )
    chat.add_argument("--seed", metavar="N", type=int, help="for the same draws again")
    chat.add_argument(
        "--memory",
        metavar="4GiB",
        help="what this process may take; see csp-edge plan; default: what the prompt needs",
    )
    chat.add_argument(
        "--recall",
        action="store_true",
        help="keep what is pruned, in the host's memory or, with --memory, in a file: later "
        "questions and words bring it back",
    )
    chat.add_argument(
        "--session",
        metavar="FILE",
        help="go on with the conversation in FILE, if there is one, and save it after each answer",
    )
    chat.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object with text, usage, timings and cache",
    )

    demo = commands.add_parser(
        "demo",
        help="the embedded model on the embedded pictures, full and pruned",
        description="Conversations about twelve pictures, over the full cache and over 20 % of it.",
        epilog=DEMO_EXAMPLES,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--png",
        metavar="PATH",
        type=Path,
        default=Path("csp-edge-demo.png"),
        help="where to show which patches were kept (csp-edge-demo.png)",
    )

    inspect = commands.add_parser(
        "inspect",
        help="figures of a model and its projector",
        description="Figures of a model and of the projector beside it, from their headers.",
        epilog=INSPECT_EXAMPLES,
    )
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("path", metavar="PATH", help="GGUF file or folder")

    plan = commands.add_parser(
        "plan",
        help="how a chat fits into the memory there is",
        description="The settings under which a chat stays within the memory given, and what it "
        "takes then. Reads headers alone.",
        epilog=PLAN_EXAMPLES,
    )
    plan.set_defaults(run=_plan, parser=plan)
    plan.add_argument("-m", "--model", metavar="PATH", required=True, help="a GGUF file or folder")
    plan.add_argument(
        "--mmproj", metavar="PATH", help="the projector; default: the one beside the model"
    )
    plan.add_argument("--memory", metavar="4GiB", required=True, help="of the host, in all")
    plan.add_argument(
        "--images",
        metavar="N",
        type=int,
        help="pictures of a conversation; default: as many as the model's context holds",
    )
    plan.add_argument(
        "--pixels",
        metavar="WxH",
        help="of a picture, where the projector takes any size; default: the largest",
    )
    plan.add_argument(
        "--kv-type",
        metavar="TYPE",
        default="auto",
        help="of the cache: f32, f16, bf16, q8_0 or q4_0; default: what loses least",
    )
    plan.add_argument(
        "--gpu-layers", metavar="N", type=int, help="-1: all layers; default: as many as fit"
    )
    plan.add_argument("--recall", action="store_true", help="keep what is pruned, in a file")

    server = commands.add_parser(
        "rpc-server",
        help="lend this machine to a model that outgrows another one",
        description="Lend this machine's GPUs, or else its CPU, to csp-edge chat --rpc on another "
        "machine, one process at a time, until Ctrl-C. It trusts whoever connects: listen in a "
        "network of your own machines alone.",
        epilog=RPC_SERVER_EXAMPLES,
    )
    server.set_defaults(run=_rpc_server)
    server.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="this machine's address to listen on; default: 127.0.0.1, for itself alone",
    )
    server.add_argument("--port", metavar="PORT", type=int, default=50052, help="default: 50052")
    server.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads; default: one for each CPU"
    )

    add_bench(commands)
    add_eval(commands)
    return parser


def _chat(args: argparse.Namespace) -> None:
    prompt = _prompt(args.prompt)
    if prompt is None and args.json:
        args.parser.error("--json needs a PROMPT")
    budget = {} if args.budget is None else {"budget": parse_budget(args.budget)}
    cache = policy(args.policy or "csp", **budget) if args.policy or budget else None

    from csp_edge.conversation import converse
    from csp_edge.images import Pictures
    from csp_edge.vlm import EdgeVLM

    pictures = Pictures(allow_url=args.allow_urls).open(args.image)
    model = {
        "mmproj": args.mmproj,
        "n_ctx": args.ctx,
        "n_threads": args.threads,
        "n_gpu_layers": args.gpu_layers,
        "rpc": args.rpc.split(",") if args.rpc is not None else None,
        "kv_type": args.kv_type,
        "memory": args.memory,
        "recall": args.recall or None,
        "cache": cache,
    }
    model = {name: value for name, value in model.items() if value is not None}
    options = {"max_tokens": args.max_tokens, "temperature": args.temp, "seed": args.seed}
    with Progress() as progress:
        model["progress"] = progress
        if args.session is not None and os.path.lexists(args.session):
            vlm = EdgeVLM.load(args.session, args.model, **model)
        else:
            vlm = EdgeVLM.demo(**model) if args.model is None else EdgeVLM(args.model, **model)
    with vlm:
        if prompt is None:
            converse(
                vlm,
                progress,
                pictures,
                allow_urls=args.allow_urls,
                session=args.session,
                **options,
            )
            return
        show = (lambda piece: None) if args.json else write
        question = {"role": "user", "content": prompt}
        asked = [*vlm.messages, question] if vlm.messages else prompt
        result = answer(vlm, progress, show, asked, pictures, **options)
        if args.session is not None:
            vlm.save(args.session)
    if not args.json:
        print()
    if result.finish_reason == "cancelled":
        raise KeyboardInterrupt
    if args.json:
        print(_json(result))


def _prompt(argument: str | None) -> str | bytes | None:
    """The argument, or what stdin holds. None: a conversation."""
    if argument not in (None, "-"):
        return argument
    if sys.stdin is None:
        raise PromptError("no PROMPT, and stdin is closed")
    if argument is None and sys.stdin.isatty():
        return None
    data = sys.stdin.buffer.read(_MAX_STDIN + 1)
    if len(data) > _MAX_STDIN:
        raise PromptError(f"stdin: more than {_MAX_STDIN} bytes, shorten the prompt")
    return data.rstrip(b"\r\n")


def _json(result: "ChatResult") -> str:
    import json
    from dataclasses import asdict

    cache = result.cache
    return json.dumps(
        {
            "text": result.text,
            "finish_reason": result.finish_reason,
            "usage": asdict(result.usage),
            "timings": asdict(result.timings),
            "cache": {
                "policy": type(cache.policy).__name__.lower(),
                **asdict(cache.policy),
                "cells_before": cache.cells_before,
                "cells_after": cache.cells_after,
                "bytes_before": cache.bytes_before,
                "bytes_after": cache.bytes_after,
                "pictures": [asdict(picture) for picture in cache.pictures],
                "kept": [[head.tolist() for head in layer] for layer in cache.kept],
            },
        }
    )


def _demo(args: argparse.Namespace) -> None:
    from csp_edge.demo import demo

    demo(args.png)


def _inspect(args: argparse.Namespace) -> None:
    from csp_edge.model_files import find_model
    from csp_edge.model_info import describe

    info = describe(*find_model(args.path))
    projector = info.projector
    rows = {
        "model": str(info.path),
        "name": info.name,
        "licence": info.license or "not given",
        "architecture": info.architecture,
        "parameters": f"{info.n_params:,}",
        "layers": f"{info.n_layer}",
        "heads": f"{info.n_head}, with {info.n_head_kv} KV heads",
        "head size": f"{info.head_dim_k} (K), {info.head_dim_v} (V)",
        "embedding": f"{info.n_embd}",
        "context": f"{info.n_ctx:,} tokens",
        "vocabulary": f"{info.n_vocab:,} tokens",
        "quantization": _quantization(info),
        "weights": _bytes(info.weight_bytes),
        "projector": str(projector.path) if projector else "none beside the model",
    }
    if projector:
        size = f"{projector.image_size} x {projector.image_size}" if projector.image_size else "any"
        rows |= {
            "  type": projector.type,
            "  weights": _bytes(projector.weight_bytes),
            "  picture": f"{size} pixels, patches of {projector.patch_size}",
            "  tokens": f"{projector.tokens_per_picture or 'depends on the picture'}",
        }
    rows["KV per token"] = f"{_bytes(info.kv_bytes_per_token)}, {info.kv_type}"
    if projector:
        n_bytes = info.kv_bytes_per_picture
        rows["KV per picture"] = _bytes(n_bytes) if n_bytes else "depends on the picture"
    for name, value in rows.items():
        print(f"{name:<14}  {printable(value)}")


def _plan(args: argparse.Namespace) -> None:
    n_pixels = None
    if args.pixels is not None:
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", args.pixels.lower())
        n_pixels = int(found[1]) * int(found[2]) if found else 0
        if not n_pixels:
            args.parser.error(f"argument --pixels: {args.pixels!r}: give a size like 640x480")

    from csp_edge.model_files import find_model
    from csp_edge.plan import plan

    files = find_model(args.model)
    planned = plan(
        files.model,
        files.mmproj if args.mmproj is None else Path(args.mmproj),
        args.memory,
        n_images=args.images,
        n_pixels=n_pixels,
        kv_type=args.kv_type,
        n_gpu_layers=args.gpu_layers,
        recall=args.recall,
    )
    for name, value in planned.rows().items():
        print(f"{name:<28}  {printable(value)}")


def _rpc_server(args: argparse.Namespace) -> None:
    from csp_edge.engine import cpus
    from csp_edge.rpc import serve

    serve(args.host, args.port, cpus() if args.threads is None else args.threads)


def _quantization(info: "ModelInfo") -> str:
    shares = (f"{n / info.weight_bytes:.1%} {kind}" for kind, n in info.bytes_by_type.items())
    return f"{info.quantization} ({', '.join(shares)})"


def _bytes(n: float) -> str:
    exact = f"{n:,.0f} bytes"
    return f"{exact} ({n / 2**20:,.1f} MiB)" if n >= 2**20 else exact
