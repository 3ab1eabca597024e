"""What callers give for images: paths, Pillow images, arrays and tensors, one or a batch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .sources import layout_of

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor"

#: Numbers of channels of Pillow's modes L, LA, RGB and RGBA.
_CHANNELS = (1, 2, 3, 4)


def has_pixels(source: Any) -> bool:
    """Whether the source is an array or tensor of numbers, not of objects or names."""
    return isinstance(source, Tensor) or (
        isinstance(source, np.ndarray) and source.dtype.kind not in "OUS"
    )


def is_one(source: Any) -> bool:
    if has_pixels(source):
        return source.ndim in (2, 3)
    return isinstance(source, (str, os.PathLike, Image.Image))


def as_pixels(picture: Any) -> npt.NDArray[np.uint8]:
    """One image as (H, W) or (H, W, C) bytes; a view, so that a memory map stays one.

    Raises:
        ValueError: it is no image; the message describes what one is.
    """
    is_tensor = isinstance(picture, Tensor)
    if is_tensor and picture.dtype != torch.uint8:
        name, array = str(picture.dtype), None
    else:
        array = picture.detach().cpu().numpy() if is_tensor else np.asanyarray(picture)
        name = str(array.dtype)
    shape = tuple(picture.shape if array is None else array.shape)
    if array is None or array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in shape:
        raise ValueError(
            f"an image is uint8, (H, W), (H, W, C) or (C, H, W), got {name} of shape {shape}: pass "
            "its bytes, 0 to 255, or what is prepared already to scores()"
        )
    layout = layout_of(shape, _CHANNELS, is_tensor)
    if layout is None:
        raise ValueError(
            f"an image has 1, 3 or 4 channels (2: grey and transparency), and no axis of {shape} "
            "has: the order of its axes is (H, W, C) or (C, H, W)"
        )
    if layout == "CHW":
        array = np.moveaxis(array, 0, -1)
    return array[:, :, 0] if layout != "HW" and array.shape[2] == 1 else array


def batch_of(images: Any, others: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
    """The images of a dict of arrays.

    Raises:
        ValueError: it looks like one image, not like a batch.
    """
    if has_pixels(images):
        shape = tuple(images.shape)
        one = len(shape) == 3 and layout_of(shape, _CHANNELS, isinstance(images, Tensor))
        # N grey images (N, H, W) are usual in arrays, and the first axis may be as short as that.
        if len(shape) < 3 or (one and (one == "HWC" or isinstance(images, Tensor))):
            raise ValueError(
                f"'image' of shape {shape} is one image, and the axes of a batch are (N, H, W, C) "
                "or (N, C, H, W): pass image[None], or of N grey images image[:, None]"
            )
    pictures = list(images)
    for name, column in others.items():
        if column.shape[:1] != (len(pictures),):
            raise ValueError(
                f"a batch has a value of {name!r} for each of its {len(pictures)} images, "
                f"got shape {column.shape}"
            )
    return pictures
