"""The stem by one Triton kernel, from floats and from uint8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.pointwise import PATCH_EMBED
from ...ops.registry import implements
from ...ops.stem import PATCH_EMBED_UINT8
from ..kernel_key import pixels_of
from ..layout import aligned, into, stem_format, vectors
from . import functions
from .implementation import TritonImplementation


@implements(PATCH_EMBED, "triton")
@implements(PATCH_EMBED_UINT8, "triton")
class TritonStem(TritonImplementation):
    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        act: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        config: Any = None,
        **_: Any,
    ) -> Tensor:
        n, h, w = x.shape[0], *x.shape[2:]
        d, p = weight.shape[0], weight.shape[-1]
        out = torch.empty(
            (n, d, h // p, w // p),
            dtype=weight.dtype,
            device=x.device,
            memory_format=stem_format(x, p),
        )
        pixels = pixels_of(x.detach().resolve_neg())
        operands = [aligned(weight), *vectors(bias, scale, shift), act]
        run = functions.kernels().patch_embed
        return into(
            out, lambda out: run(pixels, *operands, out=out, config=config, mean=mean, std=std)
        )
