"""The measured models and images, and their float64 results."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convmixer_fast import create_model
from convmixer_fast.arch import Arch, find_variant
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import trained_like_


@dataclass(frozen=True)
class Case:
    """A published model with trained-like weights: the plain one, and ours with equal weights."""

    arch: Arch
    side: int
    plain: nn.Module
    ours: nn.Module

    def images(self, batch: int, side: int | None = None) -> Tensor:
        """(batch, in_chans, side, side), float32; the first images of a greater batch."""
        side = side or self.side
        # One seed an image: a batch of 4 is the beginning of a batch of 16.
        shape = (self.arch.in_chans, side, side)
        return torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(batch)]
        )

    def oracle(self, x: Tensor) -> Tensor:
        """The plain model's output in float64."""
        with torch.no_grad():
            exact: Tensor = copy.deepcopy(self.plain).double()(x.double())
        return exact


@functools.lru_cache(maxsize=1)
def case(variant: str) -> Case:
    """The case of a published variant; the one used last is kept."""
    published = find_variant(variant)
    arch = published.arch
    small = 4 * arch.patch_size
    plain = trained_like_(ReferenceConvMixer(arch), (4, arch.in_chans, small, small))
    ours = create_model(variant).eval()
    ours.load_state_dict(plain.state_dict())
    return Case(arch, published.input_size[1], plain, ours)


@functools.lru_cache(maxsize=1)
def oracle(variant: str, batch: int) -> Tensor:
    """The float64 output for the variant's first ``batch`` images."""
    it = case(variant)
    return it.oracle(it.images(batch))
