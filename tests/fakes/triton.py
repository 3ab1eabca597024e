"""Fake of the Triton kernels: PyTorch on CPU tensors, as strict about arguments.

It tests what the operators do around a kernel without a GPU and without Triton. `FakeTriton.calls`
counts; `FakeTriton.wrong` and `FakeTriton.error` make a kernel wrong or raise.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends import self_check, tuning_cache
from convmixer_fast.backends.operands import accumulation_dtype
from convmixer_fast.backends.triton import functions, support
from convmixer_fast.backends.triton.configs import ProductConfig
from convmixer_fast.ops import use_backend


def is_packed_channels_last(x: Tensor) -> bool:
    _, c, h, w = x.shape
    return x.stride() == (h * w * c, 1, w * c, c)


class FakeTriton:
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.wrong: set[str] = set()
        self.error: dict[str, Exception] = {}
        self.configs: list[object] = []

    def _finish(
        self, name: str, x: Tensor, y: Tensor, out: Tensor | None, config: object
    ) -> Tensor:
        self.configs.append(config)
        self.calls[name] += 1
        self.shapes.append((name, tuple(x.shape)))
        if name in self.error:
            raise self.error[name]
        if name in self.wrong:
            y = y * 1.01
        if out is None:
            return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
        assert out.shape == y.shape, (out.shape, y.shape)
        assert out.dtype == x.dtype
        assert is_packed_channels_last(out)
        out.copy_(y)
        return out

    @staticmethod
    def _affine(h: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
        assert scale.dtype == shift.dtype == accumulation_dtype(h.dtype)
        assert scale.is_contiguous()
        assert shift.is_contiguous()
        return ACTIVATIONS[act]()(h) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    def pack_taps(self, weight: Tensor) -> Tensor:
        self.calls["pack_taps"] += 1
        c, _, k, _ = weight.shape
        return weight.reshape(c, k * k).t().contiguous()

    def depthwise_mix(
        self, x, taps, bias, scale, shift, act, kernel_size, out=None, config=None
    ) -> Tensor:
        assert is_packed_channels_last(x)
        assert taps.shape == (kernel_size**2, x.shape[1])
        k = kernel_size
        weight = taps.t().reshape(-1, 1, k, k).float()
        padded = F.pad(x.float(), [(k - 1) // 2, k // 2] * 2)
        h = F.conv2d(padded, weight, None if bias is None else bias.float(), groups=x.shape[1])
        y = self._affine(h, scale, shift, act) + x.float()
        return self._finish("depthwise_mix", x, y, out, config)

    def pointwise_mix(self, x, weight, bias, scale, shift, act, out=None, config=None) -> Tensor:
        assert is_packed_channels_last(x)
        assert weight.is_contiguous()
        h = F.conv2d(x.float(), weight.float(), None if bias is None else bias.float())
        return self._finish("pointwise_mix", x, self._affine(h, scale, shift, act), out, config)

    def patch_embed(
        self, x, weight, bias, scale, shift, act, out=None, config=None, mean=None, std=None
    ) -> Tensor:
        assert weight.is_contiguous()
        p = weight.shape[-1]
        bias = None if bias is None else bias.float()
        assert (x.dtype == torch.uint8) == (mean is not None) == (std is not None)
        name = "patch_embed"
        if mean is not None:
            name = "patch_embed_uint8"
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
            x = ((x / 255 - mean) / std).to(weight.dtype)
        h = F.conv2d(x.float(), weight.float(), bias, stride=p)
        return self._finish(name, x, self._affine(h, scale, shift, act), out, config)

    def after_product_(self, h, bias, scale, shift, act) -> Tensor:
        assert is_packed_channels_last(h)
        wide = h.to(accumulation_dtype(h.dtype))
        if bias is not None:
            wide = wide + bias.to(wide.dtype).view(1, -1, 1, 1)
        return self._finish(
            "after_product_", h, self._affine(wide, scale, shift, act), h, ProductConfig()
        )


@contextmanager
def emulated() -> Iterator[None]:
    """Inside the block, kernels run on CPU tensors, for the whole process.

    Under ``auto`` the CPU's own backend keeps computing CPU tensors; ask for ``triton`` by name.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "is_emulated", lambda: True)
        support.invalidate_routes()
        try:
            yield
        finally:
            support.invalidate_routes()


@contextmanager
def installed(backend: str = "triton", fake: FakeTriton | None = None) -> Iterator[FakeTriton]:
    """Replace the Triton kernels by the fake and request a backend by name, inside the block."""
    fake = fake or FakeTriton()
    with pytest.MonkeyPatch.context() as patch, emulated(), use_backend(backend):
        patch.setattr(support, "_why_no_triton", lambda: "")
        names = ("pack_taps", "depthwise_mix", "pointwise_mix", "patch_embed", "after_product_")
        table = functions.Kernels(*(getattr(fake, name) for name in names))
        patch.setattr(functions, "kernels", lambda: table)
        # Neither earlier tuning nor earlier self-checks count, and none is left behind.
        patch.setenv(tuning_cache.ENVIRONMENT, tempfile.mkdtemp())
        self_check.forget()
        tuning_cache.forget()
        try:
            yield fake
        finally:
            self_check.forget()
            tuning_cache.forget()
            shutil.rmtree(os.environ[tuning_cache.ENVIRONMENT], ignore_errors=True)
