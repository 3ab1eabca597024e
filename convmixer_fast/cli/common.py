"""What do commands share? Their names for things, the model they load, how they speak."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..inference import LeftOut, NativeSize, Prediction, Predictor, Preprocessing
    from ..model import ConvMixer

PROG = "convmixer-fast"
DEFAULT_MODEL = "convmixer_768_32"

# Values that argparse lists in its help. The modules that own them are not imported here, so that
# help and errors of usage come at once; the tests hold both lists together.
ACTIVATIONS = ("gelu", "relu", "silu", "hardswish", "identity")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
FORMATS = ("timm", "locuslab", "mmpretrain", "tweet")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}

_ACT_UNKNOWN = (
    "the activation of {} cannot be read from its weights: pass --act gelu (the paper's default) "
    "or the one it was trained with"
)


def add_model_arguments(sub: argparse.ArgumentParser) -> None:
    """Which model: for `load_model`."""
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
    model.add_argument("--act", choices=ACTIVATIONS, help="activation, where the file cannot tell")
    model.add_argument("--num-classes", type=positive, metavar="N", help="classes to expect")


def add_image_arguments(sub: argparse.ArgumentParser) -> None:
    """How images become the model's input: for `preprocessing_of`."""
    images = sub.add_argument_group("images (default: as the model was trained)")
    images.add_argument("--img-size", type=positive, metavar="N", help="side of the model's input")
    images.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    images.add_argument("--crop-pct", type=float, metavar="X", help="share kept by the centre crop")
    images.add_argument("--mean", type=float, nargs="+", metavar="X", help="of pixels in 0..1")
    images.add_argument("--std", type=float, nargs="+", metavar="X")
    images.add_argument("--interpolation", choices=INTERPOLATIONS)
    images.add_argument(
        "--native-size", action="store_true", help="no resize and no crop: images as they are"
    )
    images.add_argument(
        "--suffixes",
        default=".png,.jpg,.jpeg",
        metavar="LIST",
        help="of files in folders and patterns, like .jpg,.webp; all: what Pillow and its plugins "
        "read; '*': every file (default: .png,.jpg,.jpeg; what is left out is named)",
    )


def add_running_arguments(sub: argparse.ArgumentParser) -> None:
    """How it is computed."""
    run = sub.add_argument_group("running")
    run.add_argument(
        "-b",
        "--batch-size",
        type=_batch_size,
        default="auto",
        metavar="N",
        help="images at once; default: auto, 32 on a CPU, halved where memory is short",
    )
    run.add_argument(
        "--max-memory",
        type=memory_size,
        metavar="SIZE",
        help="like 2GB: an image whose maps take more is streamed (default: 1GiB; cuda: 8GiB)",
    )
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
    run.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels (default: auto)")


def load_model(args: argparse.Namespace) -> ConvMixer:
    """The model with the weights that ``--checkpoint`` or ``--pretrained`` name, in eval mode."""
    from dataclasses import replace

    from ..arch import find_variant
    from ..checkpoint import build_model_kwargs, load_checkpoint, read_checkpoint
    from ..model import ConvMixer, create_model

    variant = find_variant(args.model) if args.model else None
    if args.checkpoint:
        held = read_checkpoint(args.checkpoint)
        if variant and held.arch.shape != variant.arch.shape:
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
    if model.num_classes == 0 and getattr(args, "output_type", "") != "embedding":
        raise ValueError(f"{args.checkpoint} has no classifier: there is nothing to predict")
    if args.num_classes not in (None, model.num_classes):
        raise ValueError(
            f"--num-classes {args.num_classes}, but the weights are for {model.num_classes} classes"
        )
    return model.eval()


def note_left_out(left_out: LeftOut) -> None:
    """Say what a search for images did not take, and how to take it."""
    if left_out:
        note(str(left_out))


def preprocessing_of(args: argparse.Namespace, model: ConvMixer) -> Preprocessing | NativeSize:
    """What the model was trained on (else the published recipe), with the flags on top."""
    from ..inference import preprocessing_for

    return preprocessing_for(
        model,
        native=args.native_size,
        img_size=args.img_size,
        input_size=args.input_size,
        crop_pct=args.crop_pct,
        interpolation=args.interpolation,
        mean=args.mean,
        std=args.std,
    )


def device_of(name: str | None) -> torch.device:
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


def make_predictor(args: argparse.Namespace, model: ConvMixer, **options: Any) -> Predictor:
    """The `Predictor` that the flags of `add_model_arguments` and its two fellows ask for.

    ``options`` are its others.
    """
    from ..inference import Predictor

    device = device_of(args.device)
    amp = args.amp_dtype or ("float16" if device.type == "cuda" else "bfloat16")
    return Predictor(
        model,
        preprocessing=preprocessing_of(args, model),
        # Unnamed, it is chosen again wherever a copy of the Predictor comes to run.
        device=device if args.device else None,
        amp_dtype=amp if args.amp or args.amp_dtype else None,
        channels_last=args.channels_last,
        batch_size=args.batch_size,
        max_memory=args.max_memory,
        backend=args.backend,
        **options,
    )


def describe_predictor(predictor: Predictor) -> str:
    """The model, the device, and how images are prepared, in one line."""
    model: Any = predictor.model
    prepare: Any = predictor.preprocessing
    images = "as large as they are"
    if hasattr(prepare, "input_size"):
        size = "x".join(map(str, prepare.input_size))
        images = f"as {size}, crop {prepare.crop_pct:g}, {prepare.interpolation}"
    if hasattr(prepare, "mean"):
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (prepare.mean, prepare.std))
        images += f", mean {mean}, std {std}"
    return f"{model.arch} on {predictor.device}; images {images}"


def check_running(args: argparse.Namespace) -> None:
    """Refuse what no run can be made with.

    Raises:
        ValueError: with the flag's name.
    """
    if args.workers < 0:
        raise ValueError(f"--workers must not be negative, got {args.workers}")
    if args.batch_size != "auto" and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")


def _batch_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}") from None


def add_target_argument(group: Any) -> None:
    group.add_argument(
        "--target", type=int, metavar="N", help="class of the heatmap (default: the likeliest)"
    )


def output_file(text: str) -> str:
    """Type of the options that name a file to write: `main` checks those before the work."""
    return text


def output_folder(text: str) -> str:
    """Type of the options that name a folder to write files into."""
    return text


def check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse files that could not be written, or would be destroyed, at the end.

    Raises:
        OSError: with the file's name.
    """
    from ..files import check_output

    for action in parser._actions:
        name = getattr(args, action.dest, None)
        # Addresses (s3://...) are not this machine's, and are refused by those who know.
        if action.type is output_file and name not in (None, action.default) and "://" not in name:
            check_output(name)


def memory_size(text: str) -> int:
    """Bytes of a size like ``2GB``, ``512MiB`` or ``1000000``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"must be a size like 2GB or 512MiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def printable(text: str) -> str:
    """One line without control characters, whatever a file is called."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))


def note(text: str) -> None:
    print(f"{PROG}: {printable(text)}", file=sys.stderr, flush=True)


def table(row: Prediction, output_type: str) -> str:
    """A file's name, and its classes below."""
    lines = [printable(row.filename)]
    width = max(len(str(i)) for i in row.indices)
    for index, label, score in zip(row.indices, row.labels, row.scores, strict=True):
        shown = f"{score:8.2%}" if output_type == "prob" else f"{score:8.3f}"
        name = "" if label == str(index) else f"  {label}"
        lines.append(f"  {shown}  {index:>{width}}{name}")
    return "\n".join(lines)
