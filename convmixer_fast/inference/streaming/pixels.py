"""Stored pixel values as input of a model's stem, and as a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...arch import IMAGENET_MEAN, IMAGENET_STD
from ..images import ImageError
from ..preprocessing import Preprocessing, own_normalization


class Pixels:
    """Stored values as input of the stem: scaled, normalised, in the model's dtype.

    Integers are pixels: (value / largest of the type - mean) / std. Floating-point values are not
    changed, as in ``model(image)``.
    """

    def __init__(self, preprocessing: Preprocessing, dtype: torch.dtype, device: Any) -> None:
        view = (1, -1, 1, 1)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(view)
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._dtype, self._device = dtype, device

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.dtype == torch.bool or rows.is_complex():
            raise ImageError(f"pixels cannot be {rows.dtype}: pass whole numbers or floats")
        if not rows.is_floating_point():
            largest = torch.iinfo(rows.dtype).max
            values = rows.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            rows = values.div_(largest).sub_(self._mean).div_(self._std)
        return rows.to(device=self._device, dtype=self._dtype)

    def visible(self, rows: Tensor) -> Tensor:
        """The same rows as bytes of a picture, with 1 or 3 channels."""
        if rows.is_floating_point():
            shown = rows.float().cpu() * self._std + self._mean
        else:
            shown = rows.float() / torch.iinfo(rows.dtype).max
        if shown.shape[1] not in (1, 3):
            shown = shown.mean(1, keepdim=True)
        return shown.clamp(0, 1).mul(255).round().to(torch.uint8)


def default_preprocessing(model: nn.Module) -> Preprocessing:
    """The normalisation of the model's stem, else of its ``pretrained_cfg``, else ImageNet's."""
    cfg: Any = {**(getattr(model, "pretrained_cfg", None) or {}), **own_normalization(model)}
    channels = int(getattr(model, "in_chans", 3))

    def per_channel(name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        values = tuple(cfg.get(name) or default)
        return values if len(values) in (1, channels) else (sum(values) / len(values),)

    mean, std = per_channel("mean", IMAGENET_MEAN), per_channel("std", IMAGENET_STD)
    return Preprocessing(input_size=(channels, 224, 224), mean=mean, std=std)
