"""What can be done from a shell? ``convmixer-fast --help`` lists it.

Flags carry timm's names. What can be expected to go wrong (a path, an image, a checkpoint, a
setting, a missing library, a full disk) is one line on stderr and exit code 2; with
``CONVMIXER_FAST_DEBUG=1`` the traceback is shown instead. Interrupted: 130.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import environment
from .benchmark import add_benchmark, benchmark
from .common import (
    ACTIVATIONS,
    FORMATS,
    PROG,
    check_outputs,
    note,
    output_file,
    positive,
    printable,
)
from .evaluate import add_evaluate, evaluate
from .predict import add_predict, predict
from .stream import add_stream, stream

if TYPE_CHECKING:
    from ..arch import Variant


# info


def describe(variant: Variant, img_size: int | None = None) -> dict[str, Any]:
    """A published variant: what it is, and what one image costs by three ways to count."""
    arch = variant.arch
    size = (img_size, img_size) if img_size else variant.input_size[1:]
    rows, cols = arch.grid(size)
    if min(rows, cols) < 1:
        raise ValueError(
            f"{variant.name}: an image of {size[0]}x{size[1]} px is smaller than its patch of "
            f"{arch.patch_size}x{arch.patch_size}"
        )
    macs = arch.macs(size)
    convolutions = macs.pointwise + macs.depthwise + macs.stem
    return {
        "model": variant.name,
        "paper_name": variant.paper_name,
        "dim": arch.dim,
        "depth": arch.depth,
        "kernel_size": arch.kernel_size,
        "patch_size": arch.patch_size,
        "act": arch.act,
        "num_classes": arch.num_classes,
        "param_count": arch.params,
        "img_size": list(size),
        "grid": [rows, cols],
        "gmacs_timm": round(arch.macs_timm(size) / 1e9, 2),
        "macs_mmpretrain": arch.macs_mmpretrain(size),
        "macs": convolutions,
        "macs_pointwise": macs.pointwise,
        "macs_depthwise": macs.depthwise,
        "macs_stem": macs.stem,
    }


def rounded_parts(parts: Sequence[int], unit: int) -> list[int]:
    """``parts`` in whole ``unit``s that add up to their sum in whole units.

    Each is rounded down, and what the rounded sum still lacks goes to the largest remainders: a
    column of figures then adds up, where each is off by less than one unit.
    """
    floors = [part // unit for part in parts]
    lacking = round(sum(parts) / unit) - sum(floors)
    by_remainder = sorted(range(len(parts)), key=lambda i: -(parts[i] % unit))
    return [f + (i in by_remainder[:lacking]) for i, f in enumerate(floors)]


def _columns(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Aligned text: a first column of names, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*(cells for _, cells in rows), strict=True)]
    first = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name:<{first}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    )


def _info(args: argparse.Namespace) -> int:
    from ..arch import VARIANTS, find_variant

    variants = [find_variant(name) for name in args.models] or list(VARIANTS.values())
    found = [describe(v, args.img_size) for v in variants]
    if args.format == "json":
        print(json.dumps(found, indent=2))
        return 0

    def row(name: str, show: Callable[[dict[str, Any]], str]) -> tuple[str, list[str]]:
        return name, [show(d) for d in found]

    def part(i: int) -> Callable[[dict[str, Any]], str]:
        keys = ("macs_pointwise", "macs_depthwise", "macs_stem")
        return lambda d: f"{rounded_parts([d[k] for k in keys], 10**7)[i] / 100:.2f} G"

    rows = [
        row("model", lambda d: d["model"]),
        row("name in the paper", lambda d: d["paper_name"]),
        row("dim / depth", lambda d: f"{d['dim']} / {d['depth']}"),
        row("kernel / patch", lambda d: f"{d['kernel_size']} / {d['patch_size']}"),
        row("activation", lambda d: d["act"]),
        row("parameters", lambda d: f"{d['param_count']:,}"),
        row("classes", lambda d: str(d["num_classes"])),
        row("image", lambda d: "x".join(map(str, d["img_size"])) + " px"),
        row("grid of patches", lambda d: "x".join(map(str, d["grid"]))),
        row("MACs as timm counts", lambda d: f"{d['gmacs_timm']:.2f} G"),
        row("MACs as mmpretrain counts", lambda d: f"{d['macs_mmpretrain']:,}"),
        row("true MACs", lambda d: f"{d['macs'] / 1e9:.2f} G"),
        row("  pointwise", part(0)),
        row("  depthwise", part(1)),
        row("  stem", part(2)),
    ]
    print(_columns(rows))
    print(
        "\nBoth libraries leave the depthwise convolutions out and count some elementwise work "
        "instead.\nTrue MACs are those of all convolutions of one image; their parts are rounded "
        "so that they add up.\n--format json has every figure in full."
    )
    return 0


# doctor, convert, demo


def _doctor(args: argparse.Namespace) -> int:
    if args.gpu:
        return _doctor_gpu(args)
    from .. import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=2) if args.format == "json" else doctor.render(report))
    return 0 if doctor.healthy(report) else 1


def _doctor_gpu(args: argparse.Namespace) -> int:
    from .. import gpu_report

    as_json = args.format == "json"
    report = gpu_report.report(progress=note if as_json else lambda line: print(line, flush=True))
    gpu_report.write(report, args.output)
    if as_json:
        print(json.dumps(report, indent=2))
    note(f"wrote {args.output}")
    return 0 if gpu_report.healthy(report) else 1


def _convert(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..checkpoint import read_checkpoint, save_checkpoint

    held = read_checkpoint(args.source)
    if args.act:
        usual = held.arch.act
        if usual and usual != args.act:
            raise ValueError(
                f"{args.source} was trained with {usual}: --act {args.act} contradicts it"
            )
        held = replace(held, arch=replace(held.arch, act=args.act))
    save_checkpoint(held, args.target, args.format)
    tensors = held.state_dict.values()
    print(
        f"read   {printable(args.source)}\n"
        f"       {held.format} keys, {held.arch}\n"
        f"wrote  {printable(args.target)}\n"
        f"       {args.format} keys, {len(tensors)} tensors, "
        f"{sum(t.numel() for t in tensors):,} numbers"
    )
    if held.arch.act is None:
        note("the activation is not recorded: pass --act, or readers will have to be told")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .. import demo

    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    report = demo.run(rounds=args.rounds)
    print(json.dumps(report, indent=2) if args.format == "json" else demo.render(report))
    return 0 if demo.agrees(report) else 1


# The frame


class _Version(argparse.Action):
    """``--version``, looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and leave")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"{PROG} {__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG, description="ConvMixer as fast as the hardware allows."
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run, parser=sub)
        return sub

    def output_format(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--format", choices=("text", "json"), default="text", help="default: text")

    info = command("info", _info, "list the published models, their size and cost")
    info.add_argument(
        "models", nargs="*", metavar="MODEL", help="timm's or the paper's name (default: all)"
    )
    info.add_argument("--img-size", type=positive, metavar="N", help="side of the image in pixels")
    output_format(info)

    add_predict(command("predict", predict, "classify images"))
    add_evaluate(command("evaluate", evaluate, "measure accuracy on a folder of classes"))
    add_stream(
        command("stream", stream, "classify one image of any size, in memory that does not grow")
    )
    text = "time one model, with timm's flags and result keys"
    add_benchmark(command("benchmark", benchmark, text))

    doctor = command("doctor", _doctor, "say what is installed, which backends run, and check them")
    doctor.add_argument(
        "--gpu",
        action="store_true",
        help="check and time every operator on the GPU, some minutes, and write one JSON file",
    )
    doctor.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        default="convmixer_fast-gpu.json",
        help="of --gpu (default: %(default)s)",
    )
    output_format(doctor)

    convert = command("convert", _convert, "rewrite a checkpoint in another library's keys")
    convert.add_argument("source", metavar="SRC", help="checkpoint in any published format")
    convert.add_argument(
        "target", type=output_file, metavar="DST", help="file to write: .safetensors, or .pth"
    )
    convert.add_argument(
        "--format", choices=FORMATS, required=True, help="keys of the file written"
    )
    convert.add_argument("--act", choices=ACTIVATIONS, help="activation to record, where unknown")

    demo = command(
        "demo", _demo, "classify real scans and photographs, fused and plain, side by side"
    )
    demo.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="timed rounds (default: 3)"
    )
    output_format(demo)
    return parser


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Raises:
        SystemExit: from argparse, with code 2 for wrong usage and 0 for ``--help``.
    """
    for terminal in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end the run.
        if hasattr(terminal, "reconfigure"):
            terminal.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    debug = False
    try:
        debug = environment.flag("DEBUG")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
            check_outputs(args.parser, args)
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has left. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if debug:
            raise
        print(f"{PROG}: error: {printable(_message(error))}", file=sys.stderr)
        return 2
