"""The `vlmkern` command. Exit status: 0 done, 2 bad input (one line on stderr), 3 a GPU that a candidate of `tune` made
unusable for the process, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import math
import os
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import __version__
from .._files import one_line
from ..efficiency import MODELS, SYSTEMS
from ..efficiency.formulas import MOST_TILES

_SETTINGS = ("min_pixels", "max_pixels", "max_tiles", "max_crops", "split", "frames")
_SETTING_HELP = f"of the model: {', '.join(_SETTINGS)}; may be repeated"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    _refuse_large_images()
    command: Callable[[argparse.Namespace], dict[str, Any] | list[dict[str, Any]] | None] = options.command
    try:
        report = command(options)
        if options.json:
            print(json.dumps(report))
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("vlmkern: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe left: say nothing, also not when the interpreter flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_bad_input(error) or os.environ.get("VLMKERN_TRACEBACK") == "1":
            raise
        print(f"vlmkern: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _refuse_large_images() -> None:
    # Pillow warns of a possible decompression bomb before it refuses a larger one; as an error, both are one line
    import warnings

    from PIL import Image

    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _is_bad_input(error: Exception) -> bool:
    from .. import BackendUnavailable

    return isinstance(error, (ValueError, OSError, BackendUnavailable))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line, as all bad input is answered; `--help` shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vlmkern: error: {one_line(message)} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vlmkern", description="Fused kernels for vision-language models: demonstration and reports.")
    parser.add_argument("--version", action="version", version=f"vlmkern {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], dict[str, Any] | list[dict[str, Any]] | None], text: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout and nothing else there"
        )
        command.set_defaults(command=run)
        return command

    demo = add("demo", _demo, "Run jina-vlm on a photograph and report time, work and accuracy by stage.")
    demo.add_argument("image", nargs="?", metavar="IMAGE", help="a picture (default: the bundled photograph)")
    demo.add_argument(
        "--size",
        choices=("tiny", "full"),
        default="full",
        help="of the random weights used without --checkpoint",
    )
    demo.add_argument("--checkpoint", metavar="DIR", help="a jina-vlm checkpoint directory; answers the prompt")
    demo.add_argument("--prompt", metavar="TEXT", help="question about the picture, with --checkpoint")
    demo.add_argument("--max-new-tokens", type=_count, metavar="N", help="default: 16, with --checkpoint 256")
    demo.add_argument("--report", metavar="DIR", default="vlmkern-report", help="where the picture and the figures go")

    tokens = add("tokens", _tokens, "Count the tokens a picture takes, without loading a model.")
    tokens.add_argument("image", metavar="IMAGE")
    tokens.add_argument(
        "--model",
        choices=(*SYSTEMS, "all"),
        default="jina-vlm",
        metavar="NAME",
        help=f"{', '.join(SYSTEMS)} or all (default: jina-vlm)",
    )
    tokens.add_argument("--max-crops", type=_tiles, metavar="N", help="most tiles of jina-vlm (default: 12)")
    tokens.add_argument("--option", action="append", type=_setting, metavar="KEY=VALUE", help=_SETTING_HELP)
    tokens.add_argument("--picture", metavar="FILE", help="draw how the picture is cut; PNG suits it best")

    efficiency = add(
        "efficiency",
        _efficiency,
        "The paper's efficiency table: as published, exact, and as released; or FLOPs of one picture in one model.",
    )
    efficiency.add_argument("--tiles", type=_tiles, metavar="N", help="default: 12")
    efficiency.add_argument("--sweep", type=_tiles, metavar="N", help="also the released figures of 1 to N tiles")
    efficiency.add_argument(
        "--model", choices=MODELS, metavar="NAME", help=f"what a picture costs it: {', '.join(MODELS)}"
    )
    efficiency.add_argument("--image", type=_size, metavar="WxH", help="the picture's size in pixels, with --model")
    efficiency.add_argument("--option", action="append", type=_setting, metavar="KEY=VALUE", help=_SETTING_HELP)
    efficiency.add_argument("--padded", action="store_true", help="idefics2-8b: with the padding to the largest view")

    aot = add("aot", _aot, "What every Triton kernel compiles to, for a GPU that need not be there.")
    aot.add_argument("--arch", type=int, choices=(80, 90, 100), help="compute capability (default: all)")
    aot.add_argument("--kernel", metavar="NAME", help="the Triton function's name (default: all)")

    tune = add("tune", _tune, "Time kernels' candidates on this machine's GPU and put the fastest into their tables.")
    tune.add_argument("--kernel", action="append", metavar="NAME", help="the Triton function's name; may be repeated")
    tune.add_argument("--bits", action="append", type=int, choices=(16, 32), help="of an element; may be repeated")
    tune.add_argument("--shape", type=_shape, metavar="KEY=N,...", help="problems alone that agree in these keys")
    tune.add_argument("--arch", type=int, choices=(80, 90, 100), help="with --dry-run (default: this machine's GPU's)")
    tune.add_argument("--dry-run", action="store_true", help="compile and count, time and write nothing; needs no GPU")
    tune.add_argument("--log", metavar="FILE", help="what became of each candidate; goes on where it was left")
    tune.add_argument("--from", dest="from_log", metavar="LOG", help="write tables from a log alone; needs no GPU")
    tune.add_argument("--seconds", type=_seconds, metavar="S", help="begin nothing new after them")
    tune.add_argument("--tables", metavar="DIR", help="write there, for VLMKERN_TABLES (default: the shipped tables)")
    tune.add_argument("--workers", type=_workers, metavar="N", help="processes that compile (default: one a processor)")

    info = add("info", _info, "Backends, versions and this machine.")
    info.add_argument("--ops", action="store_true", help="also which backend computes which op, by dtype")
    return parser


def _count(text: str) -> int:
    return _integer(text, 0)


def _tiles(text: str) -> int:
    return _integer(text, 1, MOST_TILES)


def _workers(text: str) -> int:
    return _integer(text, 1)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {reprlib.repr(text)}, expected a positive number")
    return value


def _shape(text: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key and value.isascii() and value.isdecimal() for key, _, value in pairs):
        raise argparse.ArgumentTypeError(f"got {reprlib.repr(text)}, expected KEY=N,..., e.g. head_dim=72,tokens=729")
    return {key: int(value) for key, _, value in pairs}


def _size(text: str) -> tuple[int, int]:
    width, by, height = text.partition("x")
    if not (by and all(side.isascii() and side.isdecimal() and len(side) < 20 for side in (width, height))):
        raise argparse.ArgumentTypeError(f"got {reprlib.repr(text)}, expected WIDTHxHEIGHT, e.g. 1024x768")
    return int(width), int(height)


def _setting(text: str) -> tuple[str, int | bool]:
    key, _, value = text.partition("=")
    if key in _SETTINGS and value in ("true", "false"):
        return key, value == "true"
    if not (key in _SETTINGS and value.isascii() and value.isdecimal() and len(value) < 20):
        raise argparse.ArgumentTypeError(
            f"got {reprlib.repr(text)}, expected KEY=VALUE, e.g. max_tiles=6, split=false, with KEY one of "
            f"{', '.join(_SETTINGS)}"
        )
    return key, int(value)


def _integer(text: str, low: int, high: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise argparse.ArgumentTypeError(f"got {reprlib.repr(text)}, expected {wanted}")
    return value


# each command's imports stay inside it, so that --help and errors in arguments come at once


def _demo(options: argparse.Namespace) -> dict[str, Any] | None:
    from .demo import run

    return run(options)


def _tokens(options: argparse.Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    from .tokens import run

    return run(options)


def _efficiency(options: argparse.Namespace) -> dict[str, Any]:
    from .efficiency import run

    return run(options)


def _aot(options: argparse.Namespace) -> list[dict[str, Any]]:
    from .aot import run

    return run(options)


def _tune(options: argparse.Namespace) -> dict[str, Any]:
    from .tune import run

    return run(options)


def _info(options: argparse.Namespace) -> dict[str, Any] | None:
    from .info import run

    return run(options)
