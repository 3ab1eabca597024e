"""Groups of flags that several commands share, and what they make: a model, a `Predictor`."""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .common import ACTIVATIONS, BACKENDS, DEFAULT_MODEL, INTERPOLATIONS, memory_size, positive

if TYPE_CHECKING:
    import torch

    from ..arch import Variant
    from ..inference import NativeSize, Predictor, Preprocessing
    from ..modules.model import ConvMixer

_ACT_UNKNOWN = (
    "the activation of {} cannot be read from its weights: pass --act gelu (the paper's default) "
    "or the one it was trained with"
)


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The flags of `add_model_arguments`."""

    model: str | None
    checkpoint: str | None
    pretrained: bool
    act: str | None
    num_classes: int | None


@dataclass(frozen=True, kw_only=True)
class ImageArguments:
    """The flags of `add_image_arguments`."""

    img_size: int | None
    input_size: list[int] | None
    crop_pct: float | None
    mean: list[float] | None
    std: list[float] | None
    interpolation: str | None
    native_size: bool
    suffixes: str


@dataclass(frozen=True, kw_only=True)
class RunningArguments:
    """The flags of `add_running_arguments`; ``batch_size`` is a number or ``"auto"``."""

    batch_size: int | str
    max_memory: int | None
    workers: int
    device: str | None
    amp: bool
    amp_dtype: str | None
    channels_last: bool
    backend: str


@dataclass(frozen=True, kw_only=True)
class PredictorArguments(ModelArguments, ImageArguments, RunningArguments):
    """The flags that make a `Predictor`."""


def add_model_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the flags that choose the model, for `load_model`."""
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
    """Add the flags that say how images become the model's input, for `preprocessing_of`."""
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
    """Add the flags of the computation: batch, device, precision, backend."""
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


def _batch_size(text: str) -> int | str:
    """Type of ``--batch-size``."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}") from None


def load_model(args: ModelArguments, embedding: bool = False) -> ConvMixer:
    """The model with the weights that ``--checkpoint`` or ``--pretrained`` name, in eval mode.

    Args:
        embedding: accept a model without a classifier.

    Raises:
        ValueError: neither flag is given, or the weights contradict another flag.
    """
    from ..arch import find_variant
    from ..modules.for_inference import optimize_for_inference

    variant = find_variant(args.model) if args.model else None
    if args.checkpoint:
        model = _model_of_checkpoint(args, args.checkpoint, variant)
    elif args.pretrained:
        model = _published_model(args, variant or find_variant(DEFAULT_MODEL))
    else:
        raise ValueError(
            "predictions of random weights mean nothing: pass --checkpoint FILE or --pretrained"
        )
    if model.num_classes == 0 and not embedding:
        raise ValueError(f"{args.checkpoint} has no classifier: there is nothing to predict")
    if args.num_classes not in (None, model.num_classes):
        raise ValueError(
            f"--num-classes {args.num_classes}, but the weights are for {model.num_classes} classes"
        )
    return optimize_for_inference(model.eval())


def _model_of_checkpoint(args: ModelArguments, path: str, variant: Variant | None) -> ConvMixer:
    from ..checkpoint import build_model_kwargs, load_checkpoint, read_checkpoint
    from ..modules.model import ConvMixer

    held = read_checkpoint(path)
    if variant and held.arch.shape != variant.arch.shape:
        raise ValueError(
            f"{path} holds {held.arch}, not {variant.name}: leave --model out to "
            "take the architecture from the file"
        )
    act = args.act or (variant.arch.act if variant and not held.arch.act else None)
    if not (act or held.arch.act):
        raise ValueError(_ACT_UNKNOWN.format(path))
    model = ConvMixer(**build_model_kwargs(held, act))
    # build_model_kwargs has warned of an activation that is not the file's: no second warning.
    load_checkpoint(model, replace(held, arch=replace(held.arch, act=model.arch.act)))
    return model


def _published_model(args: ModelArguments, variant: Variant) -> ConvMixer:
    from ..modules.model import ConvMixer, create_model

    kwargs: dict[str, Any] = {"act_layer": args.act} if args.act else {}
    with suppress(ImportError):  # create_model reports it
        from huggingface_hub.utils import logging

        # Silences a message for every retry; the failure itself is raised as an error.
        logging.set_verbosity_error()
    try:
        model = create_model(variant.name, pretrained=True, **kwargs)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; on the command line: --checkpoint FILE") from error
    assert isinstance(model, ConvMixer)
    return model


def preprocessing_of(args: ImageArguments, model: ConvMixer) -> Preprocessing | NativeSize:
    """The model's own preprocessing (else the published recipe), overridden by the flags."""
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
    """The device of ``--device``; by default CUDA where there is one, else the CPU.

    Raises:
        ValueError: torch has no such device, or it computes nothing.
    """
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


def make_predictor(args: PredictorArguments, model: ConvMixer, **options: Any) -> Predictor:
    """The `Predictor` of these flags; ``options`` are its other arguments."""
    from ..inference import Predictor

    device = device_of(args.device)
    amp = args.amp_dtype or ("float16" if device.type == "cuda" else "bfloat16")
    return Predictor(
        model,
        preprocessing=preprocessing_of(args, model),
        # Without a name, each copy of the Predictor chooses the device of its own machine.
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


def check_running(args: RunningArguments) -> None:
    """Check the numbers of `add_running_arguments`.

    Raises:
        ValueError: with the flag's name.
    """
    if args.workers < 0:
        raise ValueError(f"--workers must not be negative, got {args.workers}")
    if isinstance(args.batch_size, int) and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
