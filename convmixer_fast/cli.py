"""What can be done from a shell? ``convmixer-fast info | predict | doctor | convert | demo``, and
``benchmark``, which has a module of its own.

Flags carry timm's names. What can be expected to go wrong (a path, an image, a checkpoint, a
setting, a missing library, a full disk) is one line on stderr and exit code 2; with
``CONVMIXER_FAST_DEBUG=1`` the traceback is shown instead. Interrupted: 130.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .arch import Variant
    from .inference import Prediction, Preprocessing
    from .model import ConvMixer

PROG = "convmixer-fast"
DEBUG = "CONVMIXER_FAST_DEBUG"
DEFAULT_MODEL = "convmixer_768_32"

# Values that argparse lists in its help. The modules that own them are not imported here, so that
# help and errors of usage come at once; the tests hold both lists together.
_ACTIVATIONS = ("gelu", "relu", "silu", "hardswish", "identity")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
_FORMATS = ("timm", "locuslab", "mmpretrain", "tweet")


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
    from .arch import VARIANTS, find_variant

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


_ACT_UNKNOWN = (
    "the activation of {} cannot be read from its weights: pass --act gelu (the paper's default) "
    "or the one it was trained with"
)


# predict


def _load_model(args: argparse.Namespace) -> ConvMixer:
    """The model with the weights that ``--checkpoint`` or ``--pretrained`` name, in eval mode."""
    from dataclasses import replace

    from .arch import find_variant
    from .checkpoint import build_model_kwargs, load_checkpoint, read_checkpoint
    from .model import ConvMixer, create_model

    variant = find_variant(args.model) if args.model else None
    if args.checkpoint:
        held = read_checkpoint(args.checkpoint)
        if variant and _shape(held.arch) != _shape(variant.arch):
            raise ValueError(
                f"{args.checkpoint} holds {held.arch}, not {variant.name}: leave --model out to "
                "take the architecture from the file"
            )
        act = args.act or (variant.arch.act if variant and not held.arch.act else None)
        if not (act or held.arch.act):
            raise ValueError(_ACT_UNKNOWN.format(args.checkpoint))
        model = ConvMixer(**build_model_kwargs(held, act))
        # An activation that is not the file's was remarked upon above; once is enough.
        load_checkpoint(model, replace(held, arch=replace(held.arch, act=model.arch.act)))
    elif args.pretrained:
        variant = variant or find_variant(DEFAULT_MODEL)
        kwargs = {"act_layer": args.act} if args.act else {}
        with suppress(ImportError):  # told by create_model
            from huggingface_hub.utils import logging

            # Its accounts of every retry; the failure itself comes as an error.
            logging.set_verbosity_error()
        try:
            created = create_model(variant.name, pretrained=True, **kwargs)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; on the command line: --checkpoint FILE") from error
        assert isinstance(created, ConvMixer)
        model = created
    else:
        raise ValueError(
            "predictions of random weights mean nothing: pass --checkpoint FILE or --pretrained"
        )
    if model.num_classes == 0:
        raise ValueError(f"{args.checkpoint} has no classifier: there is nothing to predict")
    if args.num_classes not in (None, model.num_classes):
        raise ValueError(
            f"--num-classes {args.num_classes}, but the weights are for {model.num_classes} classes"
        )
    return model.eval()


def _shape(arch: Any) -> tuple[int, ...]:
    return arch.dim, arch.depth, arch.kernel_size, arch.patch_size


def _preprocessing(args: argparse.Namespace, model: ConvMixer) -> Preprocessing:
    """What the model was trained on (else the published recipe), with the flags on top."""
    from .arch import VARIANTS
    from .inference import Preprocessing

    known = (v for v in VARIANTS.values() if _shape(v.arch) == _shape(model.arch))
    cfg = model.pretrained_cfg or next(known, VARIANTS[DEFAULT_MODEL]).pretrained_cfg
    found = Preprocessing.from_cfg(
        cfg,
        in_chans=model.in_chans,
        img_size=args.img_size,
        input_size=args.input_size,
        crop_pct=args.crop_pct,
        interpolation=args.interpolation,
        mean=args.mean,
        std=args.std,
    )
    channels, height, width = found.input_size
    if channels != model.in_chans:
        raise ValueError(
            f"--input-size asks for {channels} channels, the model takes {model.in_chans}"
        )
    patch = model.arch.patch_size
    if min(height, width) < patch:
        raise ValueError(
            f"images of {height}x{width} px are smaller than one patch of {patch}x{patch}: "
            "raise --img-size"
        )
    return found


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: torch knows no such device, try cpu or cuda") from error
    if device.type == "meta":
        raise ValueError("--device meta: that device computes nothing, try cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device")
    return device


def _table(row: Prediction, output_type: str) -> str:
    """A file's name, and its classes below."""
    lines = [_printable(row.filename)]
    width = max(len(str(i)) for i in row.indices)
    for index, label, score in zip(row.indices, row.labels, row.scores, strict=True):
        shown = f"{score:8.2%}" if output_type == "prob" else f"{score:8.3f}"
        name = "" if label == str(index) else f"  {label}"
        lines.append(f"  {shown}  {index:>{width}}{name}")
    return "\n".join(lines)


def _predict(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from .inference import ResultFile, class_labels, find_images, image_batches, top_predictions
    from .ops import use_backend
    from .ops.backends import recording

    if args.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {args.topk}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers < 0:
        raise ValueError(f"--workers must not be negative, got {args.workers}")
    inputs = [*args.paths, *([args.data_dir] if args.data_dir else [])]
    if not inputs:
        raise ValueError("no images: name files or folders")
    paths = find_images(inputs)
    device = _device(args.device)
    model = _load_model(args)
    preprocessing = _preprocessing(args, model)
    labels = class_labels(model.num_classes, args.class_map)
    topk = min(args.topk, model.num_classes)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    size = "x".join(map(str, preprocessing.input_size))
    _note(
        f"{model.arch} on {device}; images as {size}, crop {preprocessing.crop_pct:g}, "
        f"{preprocessing.interpolation}"
    )

    amp: Any = nullcontext()
    if args.amp or args.amp_dtype:
        default = "float16" if device.type == "cuda" else "bfloat16"
        amp = torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype or default))
    console = not args.no_console_results
    done = failed = 0
    kernels: set[str] = set()
    start = time.perf_counter()
    with ExitStack() as stack:
        # Pillow's remarks about odd files (a palette with transparency) are no failure.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        results = None
        if args.results_file:
            results = stack.enter_context(ResultFile(args.results_file, topk, args.output_type))
        stack.enter_context(use_backend(args.backend))
        stack.enter_context(torch.inference_mode())
        # Where results scroll by on the same screen, they are the progress.
        quiet = not sys.stderr.isatty() or (console and sys.stdout.isatty())
        bar = stack.enter_context(tqdm(total=len(paths), unit="img", disable=quiet))
        for batch in image_batches(paths, preprocessing, args.batch_size, args.workers):
            for error in batch.failures:
                if args.on_error == "stop":
                    raise error
                failed += 1
                bar.clear()
                _note(f"skipped {error}")
            if batch.images is not None:
                images = batch.images.to(device=device, memory_format=layout)
                with amp, recording() as calls:
                    logits = model(images)
                kernels.update(call.choice.backend for call in calls)
                names = [str(path) for path in batch.paths]
                for row in top_predictions(names, logits, labels, topk, args.output_type):
                    if results:
                        results.write(row)
                    if console:
                        try:
                            print(_table(row, args.output_type), flush=True)
                        except BrokenPipeError:
                            if not results:
                                raise
                            console = False  # the reader has seen enough; the file has not
                done += len(names)
            bar.update(len(batch.paths) + len(batch.failures))
        if not done:
            raise ValueError(f"no image could be read, of {len(paths)}")
    seconds = time.perf_counter() - start
    skipped = f", {failed} skipped" if failed else ""
    written = f"; wrote {args.results_file}" if args.results_file else ""
    used = " and ".join(sorted(kernels))
    count = "1 image" if done == 1 else f"{done} images"
    _note(
        f"{count}{skipped} in {seconds:.1f} s ({done / seconds:.1f} img/s, {used} kernels){written}"
    )
    return 0


# doctor, convert, demo


def _doctor(args: argparse.Namespace) -> int:
    if args.gpu:
        return _doctor_gpu(args)
    from . import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=2) if args.format == "json" else doctor.render(report))
    return 0 if doctor.healthy(report) else 1


def _doctor_gpu(args: argparse.Namespace) -> int:
    from . import gpu_report

    as_json = args.format == "json"
    report = gpu_report.report(progress=_note if as_json else lambda line: print(line, flush=True))
    gpu_report.write(report, args.output)
    if as_json:
        print(json.dumps(report, indent=2))
    _note(f"wrote {args.output}")
    return 0 if gpu_report.healthy(report) else 1


def _convert(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from .checkpoint import read_checkpoint, save_checkpoint

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
        f"read   {_printable(args.source)}\n"
        f"       {held.format} keys, {held.arch}\n"
        f"wrote  {_printable(args.target)}\n"
        f"       {args.format} keys, {len(tensors)} tensors, "
        f"{sum(t.numel() for t in tensors):,} numbers"
    )
    if held.arch.act is None:
        _note("the activation is not recorded: pass --act, or readers will have to be told")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from . import demo

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
        from . import __version__

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
        sub.set_defaults(run=run)
        return sub

    def output_format(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--format", choices=("text", "json"), default="text", help="default: text")

    info = command("info", _info, "list the published models, their size and cost")
    info.add_argument(
        "models", nargs="*", metavar="MODEL", help="timm's or the paper's name (default: all)"
    )
    info.add_argument("--img-size", type=_positive, metavar="N", help="side of the image in pixels")
    output_format(info)

    _add_predict(command("predict", _predict, "classify images"))

    from . import cli_benchmark  # it uses this module's helpers

    cli_benchmark.add_arguments(
        command("benchmark", cli_benchmark.run, "time one model, with timm's flags and result keys")
    )

    doctor = command("doctor", _doctor, "say what is installed, which backends run, and check them")
    doctor.add_argument(
        "--gpu",
        action="store_true",
        help="check and time every operator on the GPU, some minutes, and write one JSON file",
    )
    doctor.add_argument(
        "--output",
        metavar="FILE",
        default="convmixer_fast-gpu.json",
        help="of --gpu (default: %(default)s)",
    )
    output_format(doctor)

    convert = command("convert", _convert, "rewrite a checkpoint in another library's keys")
    convert.add_argument("source", metavar="SRC", help="checkpoint in any published format")
    convert.add_argument("target", metavar="DST", help="file to write: .safetensors, or .pth")
    convert.add_argument(
        "--format", choices=_FORMATS, required=True, help="keys of the file written"
    )
    convert.add_argument("--act", choices=_ACTIVATIONS, help="activation to record, where unknown")

    demo = command(
        "demo", _demo, "classify real scans and photographs, fused and plain, side by side"
    )
    demo.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="timed rounds (default: 3)"
    )
    output_format(demo)
    return parser


def _add_predict(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "Exit code: 0 when at least one image was classified (the others are named on stderr), "
        "2 when none was, or with --on-error stop at the first that cannot be read."
    )
    sub.add_argument(
        "paths", nargs="*", metavar="PATH", help="images, and folders of .png, .jpg, .jpeg"
    )
    sub.add_argument("--data-dir", metavar="DIR", help="another folder of images")

    model = sub.add_argument_group("model")
    model.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        help=f"timm's or the paper's name (default: as --checkpoint says, else {DEFAULT_MODEL})",
    )
    weights = model.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="weights, in any published format")
    weights.add_argument("--pretrained", action="store_true", help="fetch the published weights")
    model.add_argument("--act", choices=_ACTIVATIONS, help="activation, where the file cannot tell")
    model.add_argument("--num-classes", type=_positive, metavar="N", help="classes to expect")

    images = sub.add_argument_group("images (default: as the model was trained)")
    images.add_argument("--img-size", type=_positive, metavar="N", help="side of the model's input")
    images.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    images.add_argument("--crop-pct", type=float, metavar="X", help="share kept by the centre crop")
    images.add_argument("--mean", type=float, nargs="+", metavar="X", help="of pixels in 0..1")
    images.add_argument("--std", type=float, nargs="+", metavar="X")
    images.add_argument("--interpolation", choices=_INTERPOLATIONS)

    output = sub.add_argument_group("results")
    output.add_argument(
        "--topk", type=int, default=5, metavar="N", help="classes shown (default: 5)"
    )
    output.add_argument(
        "--class-map",
        "--label-file",
        metavar="FILE",
        help="class names: text, one a line, or JSON (default: ImageNet's for 1000 classes, "
        "where timm or torchvision is installed)",
    )
    output.add_argument("--output-type", choices=("prob", "logit"), default="prob")
    output.add_argument(
        "--results-file",
        metavar="FILE",
        help="CSV: filename, index, label, prob (index_0, index_1, ... when --topk > 1)",
    )
    output.add_argument("--no-console-results", action="store_true", help="print no table")
    output.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="for a bad image"
    )

    run = sub.add_argument_group("running")
    run.add_argument("-b", "--batch-size", type=int, default=32, metavar="N", help="default: 32")
    run.add_argument(
        "-j", "--workers", type=int, default=2, metavar="N", help="decoders (default: 2)"
    )
    run.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    run.add_argument("--amp", action="store_true", help="mixed precision")
    run.add_argument(
        "--amp-dtype",
        choices=("float16", "bfloat16"),
        help="default: float16 on cuda, else bfloat16",
    )
    run.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    run.add_argument("--backend", choices=_BACKENDS, default="auto", help="kernels (default: auto)")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _printable(text: str) -> str:
    """One line without control characters, whatever a file is called."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))


def _note(text: str) -> None:
    print(f"{PROG}: {_printable(text)}", file=sys.stderr, flush=True)


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
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _note(f"warning: {message}")
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
        if os.environ.get(DEBUG, "") not in ("", "0"):
            raise
        print(f"{PROG}: error: {_printable(_message(error))}", file=sys.stderr)
        return 2
