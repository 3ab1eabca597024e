"""Preprocessing: from a photograph to the input tensor of a model.

The same steps and the same rounding as timm's evaluation transform (resize of the short edge,
centre crop, normalisation, in Pillow), so that its pixels are equal to the last bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..arch import IMAGENET_MEAN, IMAGENET_STD, VARIANTS

#: Resampling filters by the names that timm's ``--interpolation`` takes.
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}

#: timm's crop if a configuration names none; ConvMixer's is 0.96.
DEFAULT_CROP_PCT = 0.875

#: The variant whose recipe is the default for models of no published shape.
_USUAL = "convmixer_768_32"


def _per_channel(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in values)
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    raise ValueError(
        f"{name} has {len(values)} values for {channels} channels: give 1 or {channels}"
    )


@dataclass(frozen=True)
class Preprocessing:
    """An image of any size -> a normalised float32 tensor (C, H, W) of ``input_size``.

    Args:
        input_size: channels (1 or 3), height, width.
        crop_pct: share of the resized image that the centre crop keeps, along each edge; above 1
            the image is smaller than the crop and black surrounds it.
        interpolation: a name in `INTERPOLATIONS`.
        mean, std: of each channel, for pixels in 0..1.

    Raises:
        ValueError: a value makes no sense.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = DEFAULT_CROP_PCT
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        channels, height, width = self.input_size
        if channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, input_size asks for {channels}")
        if height < 1 or width < 1:
            raise ValueError(f"input_size must be positive, got {height}x{width}")
        if not 0 < self.crop_pct <= min(height, width):
            raise ValueError(f"crop_pct must be above 0 and is seldom above 1, got {self.crop_pct}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"unknown interpolation {self.interpolation!r}: "
                f"use one of {', '.join(INTERPOLATIONS)}"
            )
        object.__setattr__(self, "mean", _per_channel(self.mean, channels, "mean"))
        object.__setattr__(self, "std", _per_channel(self.std, channels, "std"))
        if not all(math.isfinite(v) for v in self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not all(math.isfinite(v) and v > 0 for v in self.std):
            raise ValueError(f"std must be positive, got {self.std}")

    @classmethod
    def from_cfg(
        cls,
        pretrained_cfg: Mapping[str, Any] | None = None,
        *,
        in_chans: int | None = None,
        img_size: int | None = None,
        input_size: Sequence[int] | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Preprocessing:
        """The preprocessing of a timm ``pretrained_cfg``, with single settings overridden.

        ``input_size`` wins over ``img_size`` and ``in_chans``, as in timm. A one-channel model
        with a three-channel configuration gets the average of its mean and std.

        Raises:
            ValueError: a value makes no sense, or the configuration's crop mode is not "center".
        """
        cfg = pretrained_cfg or {}
        if cfg.get("crop_mode", "center") != "center":
            raise ValueError(f"crop_mode {cfg['crop_mode']!r} is not supported: only 'center' is")
        size = tuple(cfg.get("input_size") or (3, 224, 224))
        if in_chans is not None:
            size = (in_chans, *size[1:])
        if img_size is not None:
            size = (size[0], img_size, img_size)
        if input_size is not None:
            if len(input_size) != 3:
                raise ValueError(
                    f"input_size is (channels, height, width), got {tuple(input_size)}"
                )
            size = tuple(input_size)

        def configured(name: str, default: Sequence[float]) -> Sequence[float]:
            values = cfg.get(name) or default
            return (sum(values) / len(values),) if size[0] == 1 and len(values) == 3 else values

        return cls(
            input_size=size,
            crop_pct=cfg.get("crop_pct") or DEFAULT_CROP_PCT if crop_pct is None else crop_pct,
            interpolation=interpolation or cfg.get("interpolation") or "bicubic",
            mean=tuple(configured("mean", IMAGENET_MEAN) if mean is None else mean),
            std=tuple(configured("std", IMAGENET_STD) if std is None else std),
        )

    @property
    def channels(self) -> int:
        return self.input_size[0]

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to which an image of ``width`` x ``height`` is resized."""
        rows, cols = (math.floor(edge / self.crop_pct) for edge in self.input_size[1:])
        if rows == cols:
            # torchvision truncates the length of the long edge; the other branch rounds it.
            long = int(rows * max(width, height) / min(width, height))
            return (rows, long) if width <= height else (long, rows)
        ratio = min(height / rows, width / cols)
        return round(width / ratio), round(height / ratio)

    def __call__(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
        """(C, H, W), float32, contiguous; an image of another mode is converted first.

        Args:
            out: where to write it: on the CPU, of that shape, dtype and layout.

        Raises:
            ValueError: so long and thin an image that its resized form would not fit in memory.
        """
        channels, rows, cols = self.input_size
        image = _in_mode(image, channels)
        size = self.resized(*image.size)
        if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > 2 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"an image of {image.width}x{image.height} px would be resized to "
                f"{size[0]}x{size[1]} px: too long and thin"
            )
        image = image.resize(size, INTERPOLATIONS[self.interpolation])
        image = _center_crop(image, cols, rows)
        return _normalised(image, self.mean, self.std, out)


@dataclass(frozen=True)
class NativeSize:
    """An image -> a normalised float32 tensor (C, H, W) of its own height and width.

    Nothing is resized, cropped or padded.

    Args:
        channels: 1 or 3.
        mean, std: of each channel, for pixels in 0..1.

    Raises:
        ValueError: a value makes no sense.
    """

    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        # The same rules as for images that are resized.
        checked = Preprocessing((self.channels, 1, 1), 1.0, mean=self.mean, std=self.std)
        object.__setattr__(self, "mean", checked.mean)
        object.__setattr__(self, "std", checked.std)

    def __call__(self, image: Image.Image) -> Tensor:
        """(C, H, W), float32, contiguous; an image of another mode is converted first."""
        return _normalised(_in_mode(image, self.channels), self.mean, self.std)


def preprocessing_for(
    model: nn.Module, native: bool = False, **overrides: Any
) -> Preprocessing | NativeSize:
    """The model's preprocessing (else the published recipe), with single settings overridden.

    Args:
        model: its ``pretrained_cfg`` is used if it has one; a ConvMixer of a published shape
            without one gets that variant's.
        native: images keep their size: a `NativeSize` with the mean and std.
        overrides: as for `Preprocessing.from_cfg`.

    Warns:
        UserWarning: a setting is assumed: neither the model nor ``overrides`` have it, and the
            model is of no published shape.

    Raises:
        ValueError: a setting makes no sense, or does not suit the model.
    """
    arch = getattr(model, "arch", None)
    shape = None if arch is None else arch.shape
    known = next((v for v in VARIANTS.values() if v.arch.shape == shape), None)
    own = {**(getattr(model, "pretrained_cfg", None) or {}), **own_normalization(model)}
    # A configuration with a size is complete; timm's defaults stand for what it omits.
    cfg = own if "input_size" in own else {**(known or VARIANTS[_USUAL]).pretrained_cfg, **own}
    in_chans = getattr(model, "in_chans", None)
    sizes = ("img_size", "input_size", "crop_pct", "interpolation")
    native = native or (own.get("native_size", False) and not any(map(overrides.get, sizes)))
    is_published = known is not None and getattr(model, "num_classes", 0) == known.arch.num_classes
    found = Preprocessing.from_cfg(cfg, in_chans=in_chans, **overrides)
    channels, height, width = found.input_size
    if in_chans not in (None, channels):
        raise ValueError(f"input_size asks for {channels} channels, the model takes {in_chans}")
    if not is_published:
        _warn_of_assumptions(found, own, overrides, native)
    if native:
        return NativeSize(channels, found.mean, found.std)
    patch = 1 if arch is None else arch.patch_size
    if min(height, width) < patch:
        raise ValueError(
            f"images of {height}x{width} px are smaller than one patch of {patch}x{patch}: "
            "raise the image size"
        )
    return found


def own_normalization(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Mean and std with which the model's stem normalises uint8 images; empty if it does not."""
    normalize = getattr(getattr(model, "stem", None), "normalize", None)
    if normalize is None:
        return {}
    mean, std = normalize
    return {"mean": tuple(mean), "std": tuple(std)}


def _warn_of_assumptions(
    found: Preprocessing, own: Mapping[str, Any], overrides: Mapping[str, Any], native: bool
) -> None:
    given = {k for known in (own, overrides) for k, v in known.items() if v is not None}
    if "img_size" in given or "input_size" in own:
        given |= {"input_size"}
    if "input_size" in own:  # timm's defaults stand for what a configuration omits
        given |= {"crop_pct", "interpolation"}
    values = {"mean": found.mean, "std": found.std}
    if not native:
        size = "x".join(map(str, found.input_size))
        values |= {"input_size": size, "crop_pct": found.crop_pct}  # type: ignore[dict-item]
        values |= {"interpolation": found.interpolation}  # type: ignore[dict-item]
    assumed = [f"{name} {value}" for name, value in values.items() if name not in given]
    if assumed:
        warnings.warn(
            f"the model does not say how its images were prepared; assumed: {', '.join(assumed)}; "
            "pass preprocessing (on the command line --mean, --std, --img-size, --crop-pct), or "
            "keep it in the file by save_checkpoint(..., preprocessing=)",
            UserWarning,
            stacklevel=3,
        )


def _in_mode(image: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _normalised(
    image: Image.Image, mean: Sequence[float], std: Sequence[float], out: Tensor | None = None
) -> Tensor:
    # NumPy: torch's operators would start a team of threads in every decoding thread.
    # The values are the same to the last bit: IEEE division and subtraction in float32.
    channels = len(mean)
    pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels)
    if out is None:
        out = torch.empty(channels, image.height, image.width, dtype=torch.float32, device="cpu")
    # Plane by plane, so that a plane stays in the cache through all steps.
    for plane, values, center, scale in zip(
        out.numpy(), pixels.transpose(2, 0, 1), mean, std, strict=True
    ):
        np.copyto(plane, values)
        plane /= np.float32(255)
        plane -= np.float32(center)
        plane /= np.float32(scale)
    return out


def _center_crop(image: Image.Image, cols: int, rows: int) -> Image.Image:
    """torchvision's centre crop; a smaller image is padded with zeros, the odd one at the end."""
    width, height = image.size
    left = (cols - width) // 2 if cols > width else 0
    top = (rows - height) // 2 if rows > height else 0
    if left or top or cols > width or rows > height:
        padded = Image.new(image.mode, (max(cols, width), max(rows, height)))
        padded.paste(image, (left, top))
        image, width, height = padded, *padded.size
    # Halves are rounded to even, as in torchvision.
    left, top = round((width - cols) / 2), round((height - rows) / 2)
    return image.crop((left, top, left + cols, top + rows))
