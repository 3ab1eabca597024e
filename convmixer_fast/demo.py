"""A demonstration on real images without downloads: agreement, accuracy and speed.

1. A small ConvMixer, trained by ``examples/train_digits.py``, classifies the held-out scans of
   scikit-learn's handwritten digits: the fused and the plain model must agree on every one.
2. The published 768/32 architecture, with random weights and the photographs' own BatchNorm
   statistics, classifies scikit-learn's two photographs at 224 px: difference and time of both
   models. So deep a random network multiplies rounding errors, PyTorch's own included: both models
   are measured against float64.
"""

from __future__ import annotations

import statistics
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .arch import Arch, find_variant
from .diagnostics.doctor import cpu_name
from .diagnostics.explain import explain
from .diagnostics.timing import interleaved_times
from .inference import Preprocessing
from .modules.model import ConvMixer, create_model
from .reference import ReferenceConvMixer
from .testing import error_report, trained_like_

#: The network of the digits: scans of 8x8 pixels, one pixel a patch.
DIGITS_ARCH = Arch(64, 4, kernel_size=5, patch_size=1, in_chans=1, num_classes=10, act="gelu")
DIGITS_FILE = "digits.safetensors"
SPLIT_SEED = 0
HELD_OUT = 450
# Mean and deviation of all pixels, which range over 0..16.
_MEAN, _STD = 4.88, 6.02
#: For scans stored as 8-bit images.
PREPROCESSING = Preprocessing((1, 8, 8), crop_pct=1.0, mean=(_MEAN / 16,), std=(_STD / 16,))


class Digits(NamedTuple):
    """Scans (N, 1, 8, 8), float32, normalised, and their digits (N,), int64."""

    images: Tensor
    targets: Tensor


def _sklearn(name: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('scikit-learn is missing: pip install "convmixer_fast[demo]"') from error
    return getattr(datasets, name)


def digits_split() -> tuple[Digits, Digits]:
    """1347 training scans and 450 held-out scans: the same split on every machine.

    Raises:
        ImportError: scikit-learn is missing.
    """
    data = _sklearn("load_digits")()
    pixels = (data.images - _MEAN) / _STD
    images = torch.tensor(pixels, dtype=torch.float32, device="cpu")[:, None]
    targets = torch.tensor(data.target, dtype=torch.int64, device="cpu")
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(targets)))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[train], targets[train]), Digits(images[held_out], targets[held_out])


def photographs() -> list[Image.Image]:
    """scikit-learn's two sample photographs, 640 x 427.

    Raises:
        ImportError: scikit-learn is missing.
    """
    return [Image.fromarray(pixels) for pixels in _sklearn("load_sample_images")().images]


def digits_model() -> ConvMixer:
    """The trained network that ships with the package, in eval mode."""
    with resources.as_file(resources.files("convmixer_fast") / "data" / DIGITS_FILE) as path:
        return ConvMixer.from_checkpoint(path, act=DIGITS_ARCH.act)


def plain_twin(model: ConvMixer) -> ReferenceConvMixer:
    """`ReferenceConvMixer` with copies of the same weights, in eval mode."""
    plain = ReferenceConvMixer(model.arch)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def _compare(ours: Tensor, plain: Tensor, oracle: Tensor) -> dict[str, Any]:
    """Difference of two results, and whether ``ours`` keeps the numerics rule (see `testing`).

    ``oracle`` is the float64 result of all images or of the first ones.
    """
    largest = (ours - plain).abs().max().item()
    n = len(oracle)
    rule = error_report(ours[:n], plain[:n], oracle)
    return {
        "max_logit_difference": largest,
        "relative_difference": largest / plain.abs().max().item(),
        "max_error": rule.max_error,
        "plain_max_error": rule.torch_max_error,
        "ok": rule.ok,
    }


def _backends(model: nn.Module, x: Tensor) -> list[str]:
    return sorted({row.backend for row in explain(model, x)})


@torch.inference_mode()
def evaluate_digits() -> dict[str, Any]:
    """Accuracy of both models on the held-out scans, and their difference."""
    _, held_out = digits_split()
    model = digits_model()
    twin = plain_twin(model)
    ours, plain = model(held_out.images), twin(held_out.images)
    oracle = twin.double()(held_out.images.double())
    right = [(logits.argmax(1) == held_out.targets).sum().item() for logits in (ours, plain)]
    return {
        "model": str(model.arch),
        "param_count": model.arch.params,
        "backends": _backends(model, held_out.images),
        "images": len(held_out.targets),
        "right_fused": right[0],
        "right_plain": right[1],
        "top1_fused": 100 * right[0] / len(held_out.targets),
        "top1_plain": 100 * right[1] / len(held_out.targets),
        "same_predictions": (ours.argmax(1) == plain.argmax(1)).sum().item(),
        **_compare(ours, plain, oracle),
    }


@torch.no_grad()
def measure_statistics_(model: nn.Module, images: Tensor) -> None:
    """Set every BatchNorm's running statistics to those of ``images``; leave the eval mode on."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.inference_mode()
def compare_on_photographs(rounds: int = 3, name: str = "convmixer_768_32") -> dict[str, Any]:
    """Difference and time of both models on the two photographs, on the CPU in float32."""
    images = photographs()
    variant = find_variant(name)
    preprocessing = Preprocessing.from_cfg(variant.pretrained_cfg)
    batch = torch.stack([preprocessing(image) for image in images])
    model = create_model(name)
    assert isinstance(model, ConvMixer)
    # Weights first, on images of 2x2 patches. The statistics of such noise are then replaced: with
    # them, the values of a photograph reach 1e9 after 32 blocks.
    trained_like_(model, (2, *variant.input_size[:1], *[2 * variant.arch.patch_size] * 2), seed=0)
    measure_statistics_(model, batch)
    plain = plain_twin(model)
    # Only the first image is compared with float64, which is slow.
    oracle = plain_twin(model).double()(batch[:1].double())
    compared = _compare(model(batch), plain(batch), oracle)
    paths = {"fused": lambda: model(batch), "plain": lambda: plain(batch)}
    times = interleaved_times(paths, rounds)
    median = {path: statistics.median(seconds) for path, seconds in times.items()}
    return {
        "model": str(model.arch),
        "param_count": model.arch.params,
        "backends": _backends(model, batch),
        "images": len(images),
        "img_size": list(preprocessing.input_size[1:]),
        **compared,
        "seconds_fused": median["fused"],
        "seconds_plain": median["plain"],
        "speedup": median["plain"] / median["fused"],
        "rounds": rounds,
        "all_seconds": times,
    }


def run(rounds: int = 3) -> dict[str, Any]:
    """The results of both parts as JSON data.

    Raises:
        ImportError: scikit-learn is missing.
    """
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "digits": evaluate_digits(),
        "photographs": compare_on_photographs(rounds),
    }


def agrees(report: dict[str, Any]) -> bool:
    """Whether both models gave the same predictions and the numerics rule holds."""
    digits = report["digits"]
    same = digits["same_predictions"] == digits["images"]
    return bool(same and digits["ok"] and report["photographs"]["ok"])


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    digits, photos = report["digits"], report["photographs"]
    n = digits["images"]
    fused = photos["backends"] != ["reference"]
    ours = "fused" if fused else "convmixer_fast"

    def right(path: str) -> str:
        return f"{digits[f'right_{path}']} of {n} right ({digits[f'top1_{path}']:.2f} %)"

    def speed(path: str) -> str:
        seconds = photos[f"seconds_{path}"]
        return f"{1e3 * seconds:.0f} ms, {photos['images'] / seconds:.2f} img/s"

    def accuracy(part: dict[str, Any]) -> list[tuple[str, str]]:
        apart = f"{part['max_logit_difference']:.1e}"
        relative = f"{part['relative_difference']:.1e} of the largest logit"
        against = f"{part['max_error']:.1e}, plain PyTorch {part['plain_max_error']:.1e}"
        return [
            ("largest logit difference", f"{apart} ({relative})"),
            ("largest error vs. float64", against if part["ok"] else f"{against}: TOO LARGE"),
        ]

    def section(title: str, about: dict[str, Any], rows: list[tuple[str, str]]) -> list[str]:
        network = f"  {about['model']}, {about['param_count']:,} parameters"
        return [title, network, *(f"    {name:<26} {value}" for name, value in rows), ""]

    side = "x".join(map(str, photos["img_size"]))
    times = [(ours, speed("fused")), ("plain PyTorch", speed("plain"))]
    ratio = "speed, fused : plain" if fused else "speed, ours : plain"
    times.append((ratio, f"{photos['speedup']:.2f}"))
    lines = section(
        f"Handwritten digits: {n} held-out scans of scikit-learn's data set, 8x8 px",
        digits,
        [
            (ours, right("fused")),
            ("plain PyTorch", right("plain")),
            ("same prediction", f"{digits['same_predictions']} of {n}"),
            *accuracy(digits),
        ],
    )
    lines += section(
        f"Photographs: scikit-learn's {photos['images']} samples, {side} px, random weights",
        photos,
        [*accuracy(photos), *(times if photos["ok"] else [])],
    )
    lines += [
        f"float32 on {report['cpu']}, {report['threads']} threads, torch {report['torch']};",
        f"times are medians of {photos['rounds']} rounds in turn, after a warm-up.",
        f"Fused operators ran on: {', '.join(photos['backends'])}."
        if fused
        else "No fused kernel ran, both models are PyTorch's: convmixer-fast doctor says why.",
    ]
    if not agrees(report):
        lines.append("FAILED: the two models do not agree.")
    return "\n".join(lines)
